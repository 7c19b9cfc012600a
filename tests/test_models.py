"""What all five model files have in common (the copies among them: test_repo.py).

    python -m pytest tests/test_models.py

The rows and figures of the report, sizes, how a network behaves in training, evaluation and export,
the checkpoints that every converter reads, and that a file works alone. A network is the one of its
row "toy", on clips of 32 pixels.
"""
import copy
import functools
import importlib
import inspect
import re
import shutil

import pytest
import torch
import torch.nn as nn
import torchvision

import data
import evaluate
import slowfast
import tin
import train
import trn
import tsm
import tsn
from conftest import ROOT, close, drawn_clip, fill, golden, python

IMAGE_MODELS = ["tsn", "trn", "tsm", "tin"]
NAMES = [*IMAGE_MODELS, "slowfast"]
PAGES = (data.RECIPE, evaluate.RECIPE, train.RECIPE)


# ---- the rows of the report ------------------------------------------------------------------

@pytest.mark.parametrize("name, reported", [
    ("tsn", {"r101_5f": 58.92, "inception_resnet_v2_5f": 57.45, "senet154_5f": 53.19}),
    ("trn", {"r50_8f": None}),
    ("tsm", {"r50_8f": 59.85, "r50_16f": 61.12, "r101_8f": 61.06}),
    ("tin", {"r50_8f": 62.23, "r101_8f": 62.22, "r101_16f": 62.49}),
    ("slowfast", {
        "r101_8x8": (59.89, 61.52, 63.52),
        "r101_11x8": (60.41, 61.60, 64.00),
        "r101_fast_16x2": (59.05, 61.55, 63.45),
        "r101_fast_32x2": (62.03, 63.59, 64.81),
        "r101_slow_8x4": (59.02, 61.68, 62.99),
        "r101_slow_8x8": None,
    }),
])
def test_rows_and_figures_are_those_of_the_reports_tables(name, reported):
    module = importlib.import_module(name)
    assert module.REPORTED == reported
    assert list(module.RECIPES) == [*reported, "toy"]


IMAGE = dict(
    sampling="segments", stride=1, augment="multiscale", crop=224, jitter=(256, 320), flip=True,
    draft=False, test_resize=256, test_crop=224, clips=5, crops="3", scales=(256,),
    mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225),
    loss="bce", loss_scale=160, class_weight="none", batch=64, reference_batch=64, lr=0.01,
    momentum=0.9, nesterov=False, weight_decay=5e-4, clip_grad=20, dropout=0.5, schedule="step",
    milestones=(10, 20), epochs=30, iterations=0, warmup=0, sync_bn=False, init="imagenet",
)
VIDEO = dict(
    sampling="clip", augment="jitter", crop=112, jitter=(128, 160), flip=True, test_resize=128,
    test_crop=112, clips=10, crops="3", scales=(128, 144, 160), mean=(0.485, 0.456, 0.406),
    loss="bce", loss_scale=160, class_weight="none", batch=1024, reference_batch=1024, lr=0.2,
    momentum=0.9, nesterov=False, weight_decay=1e-4, clip_grad=0, dropout=0.5, schedule="cosine",
    epochs=0, iterations=180_000, warmup=8000, sync_bn=True, init="none",
)
TOY = dict(
    augment="jitter", crop=32, jitter=(36, 36), flip=False, test_resize=36, test_crop=32,
    loss_scale=10 / 1.7, batch=16, reference_batch=16, iterations=0, init="none",
)
INCEPTION = {**IMAGE, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "init": "none"}


@pytest.mark.parametrize("name, row, expected", [
    *[(name, None, IMAGE) for name in IMAGE_MODELS],
    ("tsn", "inception_resnet_v2_5f", INCEPTION),
    ("tsm", "r101_8f", {"shift_every": 1}),  # the code of the report's authors, at any depth
    ("slowfast", None, VIDEO),
    *[(name, "toy", TOY) for name in NAMES],
])
def test_a_rows_settings_are_the_reports(name, row, expected):
    """Without a name it is the file's first row."""
    module, recipe = evaluate.open_model(name, row, PAGES)
    assert {key: recipe[key] for key in expected} == expected


@pytest.mark.parametrize("constructor, signature", [
    (tsn.TSN, "segments=5, backbone='resnet101', dropout=0.5"),
    (trn.TRN, "segments=8, backbone='resnet50', multiscale=True, dropout=0.5"),
    (tsm.TSM, "frames=8, depth=50, dropout=0.5, shift_every=None"),
    (tin.TIN, "frames=8, depth=50, dropout=0.5"),
    (slowfast.SlowFast, "variant='slowfast_8x8', depth=101, dropout=0.5, fusion_kernel=5, "
     "fusion_norm=False, fc_bias=False, slow_index='stride', alpha=None"),
])
def test_build_hands_every_value_of_a_row_to_the_constructor(constructor, signature, monkeypatch):
    assert str(inspect.signature(constructor)) == f"(num_classes, {signature})"
    keys = re.findall(r"(\w+)=", signature.replace("segments", "frames"))
    module = importlib.import_module(constructor.__module__)
    for row in module.RECIPES.values():
        assert set(row) - set().union(*PAGES) == {*keys, "frames"}

    # Any values will do, since build() does not look at them.
    recipe = {key: f"the recipe's {key}" for key in keys}
    monkeypatch.setattr(module, constructor.__name__, lambda *args, **options: (args, options))
    args, options = module.build(recipe, 10)
    assert args == (10,)
    if "segments" in options:
        options["frames"] = options.pop("segments")
    assert options == recipe


@pytest.mark.parametrize("name, sizes", [
    ("tsn", [(5, 43_141_497), (5, 54_787_545), (5, 113_681_321), (8, 11_337_081)]),
    ("trn", [(8, 26_891_215), (8, 14_166_479)]),
    # as many as TSN: a shift has no weights
    ("tsm", [(8, 24_149_369), (16, 24_149_369), (8, 43_141_497), (8, 11_337_081)]),
    ("tin", [(8, 24_180_377), (8, 43_213_254), (16, 43_220_382), (8, 11_341_137)]),
    ("slowfast", [
        (32, 62_625_192), (44, 62_625_192), (16, 60_750_656), (32, 60_750_656), (8, 60_180_544),
        (8, 60_180_544), (24, 11_611_176),
    ]),
])
def test_every_row_builds_with_its_frames_and_parameters(name, sizes):
    """For 313 classes."""
    module = importlib.import_module(name)
    for row, (frames, parameters) in zip(module.RECIPES, sizes, strict=True):
        recipe = evaluate.open_model(name, row)[1]
        with torch.device("meta"):  # shapes without memory
            model = module.build(recipe, 313).eval()
            clip = torch.empty(1, recipe["frames"], 3, recipe["crop"], recipe["crop"])
        assert recipe["frames"] == frames
        assert sum(parameter.numel() for parameter in model.parameters()) == parameters
        assert model(clip).shape == (1, 313)


# ---- how a network behaves -------------------------------------------------------------------

@functools.cache
def toy(name):
    """The network of the row "toy", with drawn weights, for evaluation."""
    module = importlib.import_module(name)
    return fill(module.build(module.RECIPES["toy"], 10)).eval()


def toy_clip(name, videos, seed=1):
    frames = importlib.import_module(name).RECIPES["toy"]["frames"]
    return drawn_clip((videos, frames, 3, 32, 32), seed)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_every_parameter(name):
    torch.manual_seed(0)
    model = copy.deepcopy(toy(name)).train()
    model(toy_clip(name, videos=2)).square().sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), key


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_dropout_is_drawn_in_training_alone(name):
    module = importlib.import_module(name)
    model = fill(module.build({**module.RECIPES["toy"], "dropout": 0.25}, 10))
    seen = []

    def remember(dropout, inputs, output):
        seen.append((inputs[0], output))

    model.dropout.register_forward_hook(remember)
    clip = toy_clip(name, videos=2)
    torch.manual_seed(0)
    model.eval()(clip)
    model.train()(clip)
    (x, x_in_evaluation), (y, y_in_training) = seen
    assert torch.equal(x, x_in_evaluation)
    dropped = (y_in_training == 0)[y != 0]
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.05)
    if name in IMAGE_MODELS:  # a draw for every frame's features, not for the video's
        assert x.shape == (2, 8, 512)


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_the_last_layer_over_a_frame_starts_small(name):
    torch.manual_seed(0)
    module = importlib.import_module(name)
    model = module.build(module.RECIPES["toy"], 313)
    layer = list(model.children())[2]  # after the backbone and the dropout
    assert layer.weight.std().item() == pytest.approx(0.001, rel=0.02)
    assert not layer.bias.any()


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_evaluation_has_no_randomness_and_videos_do_not_mix(name):
    clip = toy_clip(name, videos=2)
    logits = toy(name)(clip)
    assert torch.equal(toy(name)(clip), logits)
    close(torch.cat([toy(name)(clip[:1]), toy(name)(clip[1:])]), logits, 1e-5)


@pytest.mark.parametrize("name", ["trn", "tsm", "tin", "slowfast"])
@torch.no_grad()
def test_the_order_of_frames_matters(name):
    clip = toy_clip(name, videos=2)
    logits = toy(name)(clip)
    assert (toy(name)(clip.flip(1)) - logits).abs().max() > 0.01 * logits.abs().max()


@pytest.mark.parametrize("name, frames, message", [
    *[(name, 16, "takes clips of 8 frames, got 16") for name in IMAGE_MODELS],
    ("slowfast", 26, "must be a multiple of 4, got 26"),
])
def test_a_clip_of_another_length_is_refused(name, frames, message):
    """16 frames would divide by 8, and one video would become two without a word."""
    with pytest.raises(ValueError, match=message):
        toy(name)(torch.zeros(1, frames, 3, 32, 32))


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_autocast_changes_logits_by_rounding_alone(name):
    """bfloat16 rounds by up to 1/256; about 20 layers add that up to 1 %, or 2 % by chance."""
    clip = toy_clip(name, videos=2)
    with torch.autocast("cpu", torch.bfloat16):
        logits = toy(name)(clip).float()
    close(logits, toy(name)(clip), 0.02)


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_channels_last_goes_through_to_the_end(name):
    """No convolution is handed a map, or a gradient, in another order, which it would first copy.

    SlowFast is left out: some of PyTorch's own 3D convolutions on a CPU answer in the plain order.
    """
    model = copy.deepcopy(toy(name)).to(memory_format=torch.channels_last)
    seen = []

    def remember_map(conv, inputs):
        seen.append(inputs[0])

    def remember_gradient(conv, gradients_in, gradients_out):
        seen.append(gradients_out[0])

    for key, part in model.backbone.named_modules():
        if isinstance(part, nn.Conv2d) and key != "conv1":  # the first gets the plain clip
            part.register_forward_pre_hook(remember_map)
            part.register_full_backward_hook(remember_gradient)

    clip = toy_clip(name, videos=2)
    logits = model(clip)
    close(logits.detach(), toy(name)(clip).detach(), 1e-5)
    logits.square().sum().backward()
    assert len(seen) == 2 * 19
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in seen)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_export_with_any_number_of_videos_and_compilation(name):
    clip = toy_clip(name, videos=3, seed=2)
    logits = toy(name)(clip)

    videos = torch.export.Dim("videos")
    example = (toy_clip(name, videos=2),)
    exported = torch.export.export(toy(name), example, dynamic_shapes=({0: videos},))
    close(exported.module()(clip), logits, 1e-5)

    # The backend aot_eager needs no compiler on the machine.
    compiled = torch.compile(toy(name), fullgraph=True, backend="aot_eager")
    close(compiled(clip), logits, 1e-5)


# ---- checkpoints -----------------------------------------------------------------------------

@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("container, prefix", [
    (None, ""),
    ("model", ""),  # as train.py writes it
    ("state_dict", "module."),
    ("model_state", "_orig_mod."),
    ("model_state_dict", "module._orig_mod."),
    ("net", "_orig_mod.module.module."),
])
def test_our_own_weights_come_back_bit_for_bit(name, container, prefix):
    ours = toy(name).state_dict()
    checkpoint = {prefix + key: tensor for key, tensor in ours.items()}
    if container is not None:
        # "arch" is no container, and an entry that is no dict is none either.
        checkpoint = {"arch": {"depth": 18}, "state_dict": None, container: checkpoint}
    state = importlib.import_module(name).convert(checkpoint)
    assert state.keys() == ours.keys()
    assert all(torch.equal(state[key], ours[key]) for key in ours)


@pytest.mark.parametrize("name", IMAGE_MODELS)
@pytest.mark.parametrize("classifier", ["new_fc", "base_model.fc", "cls_head.fc_cls", "fc"])
def test_the_last_layers_of_other_people(name, classifier):
    """base_model.fc is X-Temporal's without dropout. TRN's layer is no classifier."""
    expected = "fc.bias"
    if name == "trn":
        expected = "frame.bias"
    assert importlib.import_module(name).our_name(f"{classifier}.bias") == expected


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_torchvisions_file_gives_the_backbone_alone(name):
    """This file is from before PyTorch 0.4.1: its batch norms do not count batches."""
    file = fill(torchvision.models.resnet18()).state_dict()
    old_file = {key: x for key, x in file.items() if not key.endswith("num_batches_tracked")}
    state = importlib.import_module(name).convert(old_file)

    del file["fc.weight"], file["fc.bias"]
    assert len(state) == len(file)
    for key, tensor in file.items():
        converted = state[f"backbone.{key}"]
        assert torch.equal(converted, tensor)
        assert converted.dtype == tensor.dtype


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("checkpoint, message", [
    ({}, "finds no tensors"),
    ({"state_dict": {}, "epoch": 3}, "finds no tensors"),
    ({"model": {"fc.weight": "none"}}, "needs a tensor under the key fc.weight"),
    ({"model": {7: torch.zeros(1)}}, "has no place for the key 7"),
])
def test_a_file_without_tensors_is_refused(name, checkpoint, message):
    with pytest.raises(ValueError, match=f"{name}.py {message}"):
        importlib.import_module(name).convert(checkpoint)


def saved(case, path):
    torch.save(case.checkpoint, path)
    return path


@torch.no_grad()
def test_a_public_file_through_weights(tmp_path):
    """deepcs233's TIN, as `evaluate.py --model tin --weights FILE` takes it."""
    case = golden("tin_deepcs233_r50_t8")
    path = saved(case, tmp_path / "tin.pth")
    module, recipe = evaluate.open_model("tin", "r50_8f")
    checkpoint = evaluate.read_checkpoint(path)
    model, num_classes = evaluate.load_weights(module, recipe, checkpoint, path)
    assert num_classes == 10
    close(model.eval()(case.clip), case.arrays["logits"])


def test_a_public_file_through_init(tmp_path):
    """mmaction2's TSM for a TIN: the small nets of its blocks, 8 tensors each, stay as they are."""
    case = golden("tsm_mmaction2_r50_t8")
    path = saved(case, tmp_path / "tsm.pth")
    module, recipe = evaluate.open_model("tin", "r50_8f", PAGES)
    model = module.build(recipe, 10)
    message = train.load_init(module, model, {**recipe, "init": path}, ["a category"] * 10)
    assert message.startswith(f"init {path}: 320 of 448 tensors read")

    state = model.state_dict()
    for key, tensor in tsm.convert(case.checkpoint).items():
        assert torch.equal(state[key], tensor), key


# ---- a file works alone ----------------------------------------------------------------------

ALONE = """
import importlib, socket, sys
import torch

def refuse(*args, **options):
    raise OSError("there is no network in this test")

socket.socket.connect = refuse
for name in sys.argv[1:]:
    sys.path[0] = name  # a folder with this file alone
    module = importlib.import_module(name)
    recipe = module.RECIPES["toy"]
    module.build(recipe, 10).eval()(torch.zeros(1, recipe["frames"], 3, 32, 32))
"""


def test_a_file_copied_alone_runs_and_prints_nothing(tmp_path):
    (tmp_path / "run.py").write_text(ALONE)
    for name in NAMES:
        (tmp_path / name).mkdir()
        shutil.copy(ROOT / f"{name}.py", tmp_path / name)
    run = python(tmp_path / "run.py", *NAMES, cwd=tmp_path, TORCH_HOME=tmp_path)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
