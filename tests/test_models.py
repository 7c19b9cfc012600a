"""What all five model files have in common (the copies among them: test_repo.py).

    python -m pytest tests/test_models.py

The rows and figures of the report, sizes, how a network behaves in training, evaluation and export,
the checkpoints that every converter reads, and that a file works alone. A network is the one of its
row "toy", on clips of 32 pixels.
"""
import copy
import functools
import inspect
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
from conftest import ROOT, close, drawn_clip, fill, python

IMAGE_MODELS = [tsn, trn, tsm, tin]
MODELS = [*IMAGE_MODELS, slowfast]
PAGES = (data.RECIPE, evaluate.RECIPE, train.RECIPE)


# ---- the rows of the report ------------------------------------------------------------------

@pytest.mark.parametrize("module, rows", [
    (tsn, {
        "r101_5f": (5, 43_141_497, 58.92),
        "inception_resnet_v2_5f": (5, 54_787_545, 57.45),
        "senet154_5f": (5, 113_681_321, 53.19),
        "toy": (8, 11_337_081, None),
    }),
    (trn, {
        "r50_8f": (8, 26_891_215, None),
        "toy": (8, 14_166_479, None),
    }),
    (tsm, {  # as many parameters as TSN: a shift has no weights
        "r50_8f": (8, 24_149_369, 59.85),
        "r50_16f": (16, 24_149_369, 61.12),
        "r101_8f": (8, 43_141_497, 61.06),
        "toy": (8, 11_337_081, None),
    }),
    (tin, {
        "r50_8f": (8, 24_180_377, 62.23),
        "r101_8f": (8, 43_213_254, 62.22),
        "r101_16f": (16, 43_220_382, 62.49),
        "toy": (8, 11_341_137, None),
    }),
    (slowfast, {
        "r101_8x8": (32, 62_625_192, (59.89, 61.52, 63.52)),
        "r101_11x8": (44, 62_625_192, (60.41, 61.60, 64.00)),
        "r101_fast_16x2": (16, 60_750_656, (59.05, 61.55, 63.45)),
        "r101_fast_32x2": (32, 60_750_656, (62.03, 63.59, 64.81)),
        "r101_slow_8x4": (8, 60_180_544, (59.02, 61.68, 62.99)),
        "r101_slow_8x8": (8, 60_180_544, None),
        "toy": (24, 11_611_176, None),
    }),
])
def test_every_row_builds_and_has_the_reports_figures(module, rows):
    """Frames, parameters with 313 classes, and the mAP in the report's tables."""
    assert list(module.RECIPES) == list(rows)
    assert [*module.REPORTED, "toy"] == list(rows)

    for row, (frames, parameters, reported) in rows.items():
        recipe = evaluate.open_model(module.__name__, row)[1]
        with torch.device("meta"):  # shapes without memory
            model = module.build(recipe, 313).eval()
            clip = torch.empty(1, frames, 3, recipe["crop"], recipe["crop"])
        assert recipe["frames"] == frames
        assert sum(parameter.numel() for parameter in model.parameters()) == parameters
        assert model(clip).shape == (1, 313)
        assert module.REPORTED.get(row) == reported


IMAGE = dict(
    sampling="segments", stride=1, augment="multiscale", crop=224, jitter=(256, 320), flip=True,
    draft=False, test_resize=256, test_crop=224, clips=5, crops="3", scales=(256,),
    mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225),
    loss="bce", loss_scale=160, class_weight="none", batch=64, reference_batch=64, lr=0.01,
    momentum=0.9, nesterov=False, weight_decay=5e-4, clip_grad=20, dropout=0.5, schedule="step",
    milestones=(10, 20), epochs=30, iterations=0, warmup=0, sync_bn=False, init="imagenet",
)
VIDEO = dict(
    IMAGE, sampling="clip", stride=2, augment="jitter", crop=112, jitter=(128, 160),
    test_resize=128, test_crop=112, clips=10, scales=(128, 144, 160),
    batch=1024, reference_batch=1024, lr=0.2, weight_decay=1e-4, clip_grad=0, schedule="cosine",
    epochs=0, iterations=180_000, warmup=8000, sync_bn=True, init="none",
)
INCEPTION = dict(IMAGE, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), init="none")
TOY = dict(
    augment="jitter", crop=32, jitter=(36, 36), flip=False, test_resize=36, test_crop=32,
    loss_scale=10 / 1.7, batch=16, reference_batch=16, iterations=0, init="none",
)


@pytest.mark.parametrize("module, row, expected", [
    *[(module, None, IMAGE) for module in IMAGE_MODELS],
    (tsn, "inception_resnet_v2_5f", INCEPTION),
    (tsm, "r101_8f", {"shift_every": 1}),  # the code of the report's authors, at any depth
    (slowfast, None, VIDEO),
    *[(module, "toy", TOY) for module in MODELS],
])
def test_a_rows_settings_are_the_reports(module, row, expected):
    """Without a name it is the file's first row."""
    recipe = evaluate.open_model(module.__name__, row, PAGES)[1]
    for key, value in expected.items():
        assert recipe[key] == value, key


@pytest.mark.parametrize("module, constructor", [
    (tsn, tsn.TSN),
    (trn, trn.TRN),
    (tsm, tsm.TSM),
    (tin, tin.TIN),
    (slowfast, slowfast.SlowFast),
])
def test_build_hands_every_value_of_a_row_to_the_constructor(module, constructor, monkeypatch):
    """A constructor's own defaults are those of the first row."""
    first_row = next(iter(module.RECIPES.values()))
    defaults = {**first_row, "shift_every": None}  # TSM's own default depends on the depth

    def remember(num_classes, **options):
        return num_classes, options

    # Any values will do, since build() does not look at them.
    recipe = {key: f"the recipe's {key}" for key in first_row}
    monkeypatch.setattr(module, constructor.__name__, remember)
    num_classes, options = module.build(recipe, 10)
    assert num_classes == 10

    known = {"frames"}.union(*PAGES)  # the keys that mean something in a row
    parameters = list(inspect.signature(constructor).parameters.values())
    for parameter in parameters[1:]:  # after num_classes
        key = parameter.name.replace("segments", "frames")
        known.add(key)
        assert options[parameter.name] == recipe[key]
        assert parameter.default == defaults[key]

    for row in module.RECIPES.values():
        assert row.keys() <= known


# ---- how a network behaves -------------------------------------------------------------------

@functools.cache
def toy(module):
    """The network of the row "toy", with drawn weights, for evaluation."""
    return fill(module.build(module.RECIPES["toy"], 10)).eval()


def toy_clip(module, videos):
    frames = module.RECIPES["toy"]["frames"]
    return drawn_clip((videos, frames, 3, 32, 32), seed=1)


@pytest.mark.parametrize("module", MODELS)
def test_gradients_reach_every_parameter(module):
    torch.manual_seed(0)
    model = copy.deepcopy(toy(module)).train()
    model(toy_clip(module, videos=2)).square().sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), key


@pytest.mark.parametrize("module", MODELS)
@torch.no_grad()
def test_training_with_dropout_1_drops_every_feature(module):
    model = fill(module.build({**module.RECIPES["toy"], "dropout": 1.0}, 10)).train()
    seen = []

    def remember(dropout, inputs, output):
        seen.append((inputs[0], output))

    model.dropout.register_forward_hook(remember)
    model(toy_clip(module, videos=2))
    [(x, y)] = seen
    assert x.any()
    assert not y.any()
    if module == slowfast:  # its 2048 + 256 features of the video
        assert x.shape == (2, 2304)
    else:  # the features of every frame
        assert x.shape == (2, 8, 512)


@pytest.mark.parametrize("module", IMAGE_MODELS)
def test_the_last_layer_over_a_frame_starts_small(module):
    torch.manual_seed(0)
    model = module.build(module.RECIPES["toy"], 313)
    layer = list(model.children())[2]  # after the backbone and the dropout
    assert layer.weight.std().item() == pytest.approx(0.001, rel=0.02)
    assert not layer.bias.any()


@pytest.mark.parametrize("module", MODELS)
@torch.no_grad()
def test_evaluation_sees_one_video_and_the_order_of_its_frames(module):
    model = toy(module)
    clip = toy_clip(module, videos=2)
    logits = model(clip)
    assert torch.equal(model(clip), logits)  # nothing is drawn at random

    one_by_one = [model(clip[:1]), model(clip[1:])]
    close(torch.cat(one_by_one), logits, 1e-5)

    if module != tsn:
        assert (model(clip.flip(1)) - logits).abs().max() > 0.01 * logits.abs().max()


@pytest.mark.parametrize("module", IMAGE_MODELS)
def test_a_clip_of_another_length_is_refused(module):
    """16 frames would divide by 8, and one video would become two without a word."""
    with pytest.raises(ValueError, match="takes clips of 8 frames, got 16"):
        toy(module)(torch.zeros(1, 16, 3, 32, 32))


@pytest.mark.parametrize("module", MODELS)
@torch.no_grad()
def test_autocast_changes_logits_by_rounding_alone(module):
    """bfloat16 rounds by up to 1/256; about 20 layers add that up to 1 %, or 2 % by chance."""
    clip = toy_clip(module, videos=2)
    with torch.autocast("cpu", torch.bfloat16):
        logits = toy(module)(clip).float()
    close(logits, toy(module)(clip), 0.02)


@pytest.mark.parametrize("module", IMAGE_MODELS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_memory_layout_is_kept_to_the_end(module, layout):
    """No convolution is handed a map, or a gradient, in another order, which it would first copy.

    SlowFast is left out: some of PyTorch's own 3D convolutions on a CPU answer in the plain order.
    """
    model = copy.deepcopy(toy(module)).to(memory_format=layout)
    seen = []

    def remember_map(conv, inputs):
        seen.append(inputs[0])

    def remember_gradient(conv, gradients_in, gradients_out):
        seen.append(gradients_out[0])

    for key, part in model.backbone.named_modules():
        if isinstance(part, nn.Conv2d) and key != "conv1":  # the first gets the plain clip
            part.register_forward_pre_hook(remember_map)
            part.register_full_backward_hook(remember_gradient)

    clip = toy_clip(module, videos=2)
    logits = model(clip)
    close(logits.detach(), toy(module)(clip).detach(), 1e-5)
    logits.square().sum().backward()
    assert len(seen) == 2 * 19
    for x in seen:
        assert x.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("module", MODELS)
@torch.no_grad()
def test_export_with_any_number_of_videos_and_compilation(module):
    clip = toy_clip(module, videos=3)
    logits = toy(module)(clip)

    videos = torch.export.Dim("videos")
    example = (toy_clip(module, videos=2),)
    exported = torch.export.export(toy(module), example, dynamic_shapes=({0: videos},))
    close(exported.module()(clip), logits, 1e-5)

    # The backend aot_eager needs no compiler on the machine.
    compiled = torch.compile(toy(module), fullgraph=True, backend="aot_eager")
    close(compiled(clip), logits, 1e-5)


# ---- checkpoints -----------------------------------------------------------------------------

@pytest.mark.parametrize("module", MODELS)
@pytest.mark.parametrize("container, prefix", [
    (None, ""),
    ("model", ""),  # as train.py writes it
    ("state_dict", "module."),
    ("model_state", "_orig_mod."),
    ("model_state_dict", ""),
    ("net", "_orig_mod.module."),
])
def test_our_own_weights_come_back_bit_for_bit(module, container, prefix):
    ours = toy(module).state_dict()
    checkpoint = {prefix + key: tensor for key, tensor in ours.items()}
    if container is not None:
        # "arch" is no container, and an entry that is no dict is none either.
        checkpoint = {"arch": {"depth": 18}, "state_dict": None, container: checkpoint}
    state = module.convert(checkpoint)
    assert state.keys() == ours.keys()
    for key in ours:
        assert torch.equal(state[key], ours[key])


@pytest.mark.parametrize("module, expected", [
    (tsn, "fc.bias"),
    (trn, "frame.bias"),  # which is no classifier
    (tsm, "fc.bias"),
    (tin, "fc.bias"),
])
def test_the_last_layer_of_x_temporal_without_dropout(module, expected):
    """Its other names are in the files of the authors."""
    assert module.our_name("base_model.fc.bias") == expected


@pytest.mark.parametrize("module", IMAGE_MODELS)
def test_torchvisions_file_gives_the_backbone_alone(module):
    """This file is from before PyTorch 0.4.1: its batch norms do not count batches."""
    file = fill(torchvision.models.resnet18()).state_dict()
    old_file = {key: x for key, x in file.items() if not key.endswith("num_batches_tracked")}
    state = module.convert(old_file)

    del file["fc.weight"], file["fc.bias"]
    assert len(state) == len(file)
    for key, tensor in file.items():
        converted = state[f"backbone.{key}"]
        assert torch.equal(converted, tensor)
        assert converted.dtype == tensor.dtype


@pytest.mark.parametrize("module", MODELS)
@pytest.mark.parametrize("checkpoint, message", [
    ({"state_dict": {}, "epoch": 3}, "finds no tensors"),
    ({"model": {"fc.weight": "none"}}, "needs a tensor under the key fc.weight"),
    ({"model": {7: torch.zeros(1)}}, "has no place for the key 7"),
])
def test_a_file_without_tensors_is_refused(module, checkpoint, message):
    with pytest.raises(ValueError, match=f"{module.__name__}.py {message}"):
        module.convert(checkpoint)


# ---- a file works alone ----------------------------------------------------------------------

ALONE = """
import importlib, sys
import torch

for name in sys.argv[1:]:
    module = importlib.import_module(name)
    recipe = module.RECIPES["toy"]
    module.build(recipe, 10).eval()(torch.zeros(1, recipe["frames"], 3, 32, 32))
"""


def test_copied_without_the_scripts_it_runs_prints_nothing_and_downloads_nothing(tmp_path):
    """That model files do not import each other is in test_repo.py."""
    (tmp_path / "alone.py").write_text(ALONE)
    names = [module.__name__ for module in MODELS]
    for name in names:
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    run = python(tmp_path / "alone.py", *names, TORCH_HOME=tmp_path)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    assert not (tmp_path / "hub").exists()  # where downloads would go
