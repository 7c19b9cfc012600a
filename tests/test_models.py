"""The contract that all model files keep: recipes, sizes, training, evaluation, export, other people's files, and that a
file works alone.

    python -m pytest tests/test_models.py
"""
import ast
import collections
import copy
import functools
import importlib
import inspect
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensorMode

import data
import evaluate
import tin
import train
from conftest import ROOT, drawn_clip, drawn_tensors, golden

NAMES = ("tsn", "trn", "tsm", "tin", "slowfast")
KEYS = """frames stride sampling augment crop jitter flip mean std dropout loss loss_scale class_weight batch
    reference_batch lr schedule milestones warmup momentum nesterov weight_decay clip_grad sync_bn init test_resize
    test_crop clips crops scales published_map""".split()
CONSTRUCTORS = {
    "tsn": ("TSN", dict(segments=5, backbone="resnet101", dropout=0.5)),
    "trn": ("TRN", dict(segments=8, backbone="resnet50", multiscale=True, dropout=0.5)),
    "tsm": ("TSM", dict(frames=8, depth=50, dropout=0.5, shift_every=None)),
    "tin": ("TIN", dict(frames=8, depth=50, dropout=0.5)),
    "slowfast": ("SlowFast", dict(variant="slowfast_8x8", depth=101, dropout=0.5, fusion_kernel=5, fusion_norm=False,
                                  fc_bias=False, slow_index="stride", alpha=None)),
}
IMAGE = dict(dropout=0.5, crop=224, flip=True, loss="bce", loss_scale=160, batch=64, reference_batch=64, lr=0.01,
             schedule="step", milestones=(10, 20), epochs=30, momentum=0.9, nesterov=False, weight_decay=5e-4,
             clip_grad=20, sync_bn=False, init="imagenet")
VIDEO = dict(dropout=0.5, crop=112, flip=True, loss="bce", loss_scale=160, batch=1024, reference_batch=1024, lr=0.2,
             schedule="cosine", iterations=180_000, warmup=8000, momentum=0.9, nesterov=False, weight_decay=1e-4,
             clip_grad=0, sync_bn=True, init="none", jitter=(128, 160))
SIZES = {  # 313 classes: what tells a row's network -> parameters, 10^9 multiply-adds a clip of the recipe's crop
    "tsn": {("resnet101", 5): ("43141497", "39.0"), ("inception_resnet_v2", 5): ("54787545", "32.3"),
            ("senet154", 5): ("113681321", "103.4")},
    "trn": {("resnet50", 8, True): ("26891215", "32.8")},  # 32.7 of the backbone and nearly 0.1 of the relations
    "tsm": {(50, 8): ("24149369", "32.70"), (50, 16): ("24149369", "65.40"),
            (101, 8): ("43141497", "62.40"), (101, 16): ("43141497", "124.80")},
    "tin": {(50, 8): ("24180377", "32.70"), (50, 16): ("24183833", "65.40"),
            (101, 8): ("43213254", "62.40"), (101, 16): ("43220382", "124.80")},
    "slowfast": {("slowfast_8x8", 101): ("62.63 M", "24.71"), ("slowfast_11x8", 101): ("62.63 M", "33.97"),
                 ("fast_32x2", 101): ("60.75 M", "97.38"), ("fast_16x2", 101): ("60.75 M", "48.69"),
                 ("slow_8x8", 101): ("60.18 M", "21.91"), ("slow_8x4", 101): ("60.18 M", "21.91")},
}
TOLD_BY = {"tsn": ("backbone", "frames"), "trn": ("backbone", "frames", "multiscale"), "tsm": ("depth", "frames"),
           "tin": ("depth", "frames"), "slowfast": ("variant", "depth")}


@pytest.fixture(scope="module", params=NAMES)
def module(request):
    """One of the five model files; a test of it waits until it is there."""
    if not (ROOT / f"{request.param}.py").exists():
        pytest.skip(f"{request.param}.py is not there yet")
    return importlib.import_module(request.param)


@pytest.fixture(scope="module")
def model(module):
    """The toy's network in evaluation, every tensor drawn, so that no branch starts at zero and hides."""
    model = module.build(module.RECIPES["toy"], 10)
    model.load_state_dict(drawn_tensors({key: tuple(t.shape) for key, t in model.state_dict().items()}, seed=0))
    return model.eval()


def toy_clip(module, videos, seed=0):
    recipe = module.RECIPES["toy"]
    return drawn_clip((videos, recipe["frames"], 3, recipe["crop"], recipe["crop"]), seed)


def close(ours, expected, tolerance):
    """Within `tolerance` of the largest logit."""
    torch.testing.assert_close(ours, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


# What the file says.


def test_every_row_has_every_key_and_plain_values(module):
    for name, row in module.RECIPES.items():
        assert set(KEYS) <= set(row), name
        assert ("epochs" in row) != ("iterations" in row), name  # one of them says how long
        for key, value in row.items():
            parts = value if type(value) is tuple else [value]
            assert all(part is None or type(part) in (bool, int, float, str) for part in parts), (name, key)
        assert row["sampling"] in ("segments", "clip") and row["augment"] in ("multiscale", "jitter")
        assert row["schedule"] in ("step", "cosine")


def test_first_row_is_the_reports(module):
    name, row = next(iter(module.RECIPES.items()))
    assert name != "toy"
    expected = VIDEO if module.__name__ == "slowfast" else IMAGE
    assert {key: row[key] for key in expected} == expected


def test_every_key_has_its_source_on_its_line(module):
    recipes = re.split(r"\n(?:def|class) ", Path(module.__file__).read_text())[0]
    lines = [line.partition("  # ") for line in recipes.splitlines()]

    def comments(key, lines):
        return [comment for code, _, comment in lines if re.search(rf'\b{key}=|"{key}":', code)]

    for key in next(iter(module.RECIPES.values())):
        assert re.search("report|our choice: ", comments(key, lines)[0]), f"{key} has no source"
    toy = next(i for i, (code, _, _) in enumerate(lines) if '"toy"' in code)
    for key in set(module.RECIPES["toy"]) - {"published_map"}:  # nobody has published what the toy gives
        assert all(comments(key, lines[toy:])), f"the toy's {key} has no reason"


def test_constructor(module):
    name, options = CONSTRUCTORS[module.__name__]
    required, *others = inspect.signature(getattr(module, name)).parameters.values()
    assert required.name == "num_classes" and required.default is inspect.Parameter.empty
    assert {parameter.name: parameter.default for parameter in others} == options


def test_every_row_builds_and_has_the_published_size(module):
    for name, row in module.RECIPES.items():
        macs = []

        def count(part, inputs, output):
            macs.append(output.numel() * part.weight[0].numel())

        with FakeTensorMode(), torch.no_grad():  # shapes without arithmetic
            model = module.build(row, 313).eval()
            for part in model.modules():
                if isinstance(part, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)):
                    part.register_forward_hook(count)
            assert model(torch.empty(1, row["frames"], 3, row["crop"], row["crop"])).shape == (1, 313)
        if name == "toy":
            continue
        told = tuple(row[key] for key in TOLD_BY[module.__name__])
        parameters, gmac = SIZES[module.__name__][told]
        total = sum(p.numel() for p in model.parameters())
        assert (f"{total / 1e6:.2f} M" if parameters.endswith("M") else str(total)) == parameters, name
        assert f"{sum(macs) / 1e9:.{len(gmac.split('.')[1])}f}" == gmac, name


# What the network does, as the toy's recipe has it.


def test_every_parameter_gets_a_gradient(module):
    torch.manual_seed(0)
    model = module.build(module.RECIPES["toy"], 10).train()
    model(toy_clip(module, 2)).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_dropout_acts_in_training_only(module):
    torch.manual_seed(0)
    model = module.build({**module.RECIPES["toy"], "dropout": 0.25}, 10)
    (dropout,) = (part for part in model.modules() if isinstance(part, nn.Dropout))
    seen = []
    dropout.register_forward_hook(lambda part, inputs, output: seen.append((inputs[0], output)))
    with torch.no_grad():
        model.train()(toy_clip(module, 2))
        model.eval()(toy_clip(module, 2))
    (before, after), (x, y) = seen
    there, kept = before != 0, after != 0
    assert 0.7 < kept[there].float().mean() < 0.8
    torch.testing.assert_close(after[kept], before[kept] / 0.75)
    assert torch.equal(x, y)


@torch.no_grad()
def test_evaluation_is_deterministic(module, model):
    clip, answers = toy_clip(module, 2), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        answers.append(model(clip))
    assert torch.equal(*answers)


@torch.no_grad()
def test_two_videos_are_two_times_one(module, model):
    clip = toy_clip(module, 2)
    close(torch.cat([model(clip[:1]), model(clip[1:])]), model(clip), 1e-5)


@torch.no_grad()
def test_frame_order(module, model):
    clip = toy_clip(module, 2)
    forwards, backwards = model(clip), model(clip.flip(1))
    if module.__name__ == "tsn":
        close(backwards, forwards, 1e-5)
    else:
        assert (backwards - forwards).abs().max() > 0.01 * forwards.abs().max()


def test_a_clip_of_another_length_is_refused(module, model):
    frames = module.RECIPES["toy"]["frames"]
    stated = 4 if module.__name__ == "slowfast" else frames  # 4 fast frames per slow one
    with pytest.raises(ValueError) as error:
        model(torch.zeros(1, frames + 1, 3, 32, 32))
    assert {str(stated), str(frames + 1)} <= set(re.findall(r"\d+", str(error.value)))


@torch.no_grad()
def test_bfloat16_autocast(module, model):
    clip = toy_clip(module, 2)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(clip).float()
    # A layer rounds by up to 2**-9 of a value: 20 of them, a random walk, come to 1 %, and chance may double it. Where
    # order matters, the clip played backwards moves the logits by more.
    close(logits, model(clip), 0.02)


@torch.no_grad()
def test_shapes_without_memory(module):
    """On the device "meta", where a larger network can be looked at for nothing."""
    with torch.device("meta"):
        model = module.build(module.RECIPES["toy"], 10).eval()
    assert model(toy_clip(module, 2).to("meta")).shape == (2, 10)


@torch.no_grad()
def test_export_with_a_dynamic_batch(module, model):
    exported = torch.export.export(model, (toy_clip(module, 2),), dynamic_shapes=({0: torch.export.Dim("videos")},))
    clip = toy_clip(module, 3, seed=1)
    close(exported.module()(clip), model(clip), 1e-5)


@torch.no_grad()
def test_compile(module, model):
    clip = toy_clip(module, 2)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")  # needs no compiler on the machine
    close(compiled(clip), model(clip), 1e-5)


def test_channels_last_goes_through_to_the_end(module, model):
    """No convolution of a block is handed a map or a gradient in another order, which it would first copy."""
    if module.__name__ == "slowfast":
        pytest.skip("on a CPU some of PyTorch's own 3D convolutions answer in the plain order")
    clip, other, seen = toy_clip(module, 2), copy.deepcopy(model).to(memory_format=torch.channels_last), []
    for name, part in other.named_modules():
        if isinstance(part, nn.Conv2d) and "layer" in name:
            part.register_forward_pre_hook(lambda part, inputs, name=name: seen.append((name, inputs[0])))
            part.register_full_backward_hook(lambda part, inputs, outputs, name=name: seen.append((name, outputs[0])))
    logits = other(clip.flatten(0, 1).to(memory_format=torch.channels_last).unflatten(0, clip.shape[:2]))
    close(logits.detach(), model(clip).detach(), 1e-5)
    logits.square().sum().backward()
    assert len(seen) == 2 * 19  # ResNet-18's, without the stem
    assert [name for name, x in seen if not x.is_contiguous(memory_format=torch.channels_last)] == []


def test_our_own_checkpoint_comes_back_bit_for_bit(module, model):
    state = model.state_dict()
    checkpoint = {"model": state, "optimizer": {"state": {}, "param_groups": []}, "scaler": None, "epoch": 3,
                  "iteration": 225, "best_map": 0.5, "class_counts": [1] * 10,
                  "config": {"model": module.__name__, "categories": ["a"] * 10, **module.RECIPES["toy"]}}
    other = module.build(module.RECIPES["toy"], 10)
    other.load_state_dict(module.convert(checkpoint))
    assert all(torch.equal(tensor, state[key]) for key, tensor in other.state_dict().items())


# Other people's files, from the disk through --weights and --init. Every tensor holds one number of its own: that costs
# nothing, even for SENet-154, and shows where it went. Names and shapes are those of the authors' own files where
# tests/golden has one, otherwise ours under their names, as their code has them.

BARE = [(r"^backbone\.", "")]  # torchvision's names, without a prefix
XT = [(r"^backbone\.", "base_model."), (r"^(fc|frame)\.", "new_fc.")]  # tsn-pytorch's, and so of all that began there
MM = [(r"downsample\.0\.", "downsample.conv."), (r"downsample\.1\.", "downsample.bn."), (r"\bbn(\d)\.", r"conv\1.bn."),
      (r"\bconv(\d)\.weight", r"conv\1.conv.weight"), (r"^(fc|frame)\.", "cls_head.fc_cls.")]
SHIFT = [(r"(layer\d\.\d+\.conv1\.(?:conv\.)?)weight", r"\1net.weight")]
SOME_SHIFT = [(r"(layer\d\.\d*[02468]\.conv1\.)weight", r"\1net.weight")]
MM_TIN = [(r"(layer\d\.\d+\.conv1\.conv\.)weight", r"\1net2.weight"),
          (r"^interlace\.(.+)\.offset_(conv|fc1|fc2)\.", r"backbone.\1.conv1.conv.net1.offset_net.\2."),
          (r"^interlace\.(.+)\.weight_conv\.", r"backbone.\1.conv1.conv.net1.weight_net.conv.")]
SCALES = [(r"^relations\.(\d+)\.hidden\.", r"consensus.fc_fusion_scales.\1.1."),
          (r"^relations\.(\d+)\.fc\.", r"consensus.fc_fusion_scales.\1.3.")]
ONE_SCALE = [(r"^relations\.0\.hidden\.", "consensus.classifier.1."),
             (r"^relations\.0\.fc\.", "consensus.classifier.3.")]
CONTAINERS = {  # what else their files hold
    "X-Temporal": lambda tensors: {"model": tensors, "epoch": 30, "optimizer": {"state": {}, "param_groups": []},
                                   "lr_scheduler": {"base_lrs": [0.01]}, "best_prec1": np.float64(58.9)},
    "MIT": lambda tensors: {"state_dict": tensors, "epoch": 50, "arch": "resnet50", "best_prec1": torch.tensor(71.2)},
    "mmaction2": lambda tensors: {"meta": {"epoch": 50, "CLASSES": ["a"] * 10, "config": "model = ..."},
                                  "state_dict": collections.OrderedDict(tensors)},
    "bare": lambda tensors: tensors,
    "ours": lambda tensors: {"model": tensors, "config": {"model": "tsn"}, "epoch": 3},
}
R50, R101 = {"backbone": "resnet50"}, {"depth": 101}
RENAMED = {  # of networks for 10 classes: the model, its recipe's values, their names, prefix, container
    "X-Temporal's TSN": ("tsn", R50, XT, "module.", "X-Temporal"),
    "X-Temporal's TSN, one GPU": ("tsn", R50, XT, "", "X-Temporal"),
    "tsn-pytorch, dropout 0": ("tsn", R50, [(r"^fc\.", "base_model.fc."), XT[0]], "module.", "MIT"),
    "MIT's TSN": ("tsn", R50, XT, "module.", "MIT"),
    "mmaction2's TSN": ("tsn", R50, MM, "", "mmaction2"),
    "moments_models": ("tsn", R50, BARE, "module.", "MIT"),
    "Cadene's Inception-ResNet-v2": ("tsn", {"backbone": "inception_resnet_v2"}, [(r"^fc\.", "backbone.last_linear.")],
                                     "", "bare"),
    "timm's inside mmaction2": ("tsn", {"backbone": "inception_resnet_v2"}, MM[-1:], "", "mmaction2"),
    "TRN-pytorch, one scale": ("trn", {"multiscale": False}, XT + ONE_SCALE, "module.", "MIT"),
    "mmaction2's TRN": ("trn", {}, MM + SCALES + [("^consensus", "cls_head.consensus")], "", "mmaction2"),
    "X-Temporal's TSM": ("tsm", {}, XT + SHIFT, "module.", "X-Temporal"),
    "X-Temporal's TSM, ResNet-101": ("tsm", R101, XT + SHIFT, "module.", "X-Temporal"),
    "MIT's TSM, ResNet-101": ("tsm", R101, XT + SOME_SHIFT, "module.", "MIT"),
    "mmaction2's TSM, ResNet-101": ("tsm", R101, MM + SHIFT, "", "mmaction2"),
    "mmaction2's TIN": ("tin", {}, MM + MM_TIN, "", "mmaction2"),
    "a TSN for a TSM": ("tsm", {}, XT, "module.", "MIT"),
    **{f"our {name}": (name, {}, [], "", "ours") for name in NAMES},
}
GOLDEN = sorted(path.stem for path in (ROOT / "tests" / "golden").glob("*.npz") if path.stem.split("_")[0] in NAMES)


@pytest.fixture
def empty_networks(monkeypatch):
    """Networks without initial values, and so at once."""
    for name in ("kaiming_uniform_", "kaiming_normal_", "uniform_", "normal_", "trunc_normal_"):
        monkeypatch.setattr(nn.init, name, lambda tensor, *_, **__: tensor)


def numbered(shapes):
    """{name: shape} -> {name: tensor of that shape, of one number that no other has}."""
    return {name: (torch.tensor(i) if name.endswith("num_batches_tracked") else torch.tensor(float(i))).expand(shape)
            for i, (name, shape) in enumerate(shapes.items(), 1)}


def network_shapes(module, recipe):
    with torch.device("meta"):
        return {name: tuple(x.shape) for name, x in module.build(recipe, 10).state_dict().items()}


def under_their_names(name):
    """A row of RENAMED -> (module, recipe, its file as read, {our name: tensor})."""
    model, changes, names, prefix, container = RENAMED[name]
    module = importlib.import_module(model)
    recipe = {**next(iter(module.RECIPES.values())), **changes}
    state = numbered(network_shapes(module, recipe))
    tensors = {prefix + functools.reduce(lambda key, rule: re.sub(*rule, key), names, key): x
               for key, x in state.items()}
    assert len(tensors) == len(state)
    return module, recipe, CONTAINERS[container](tensors), state


def of_the_authors(name):
    """The same for a case of tests/golden; whether convert put the tensors where they belong, the logits tell."""
    with np.load(ROOT / "tests" / "golden" / f"{name}.npz") as file:
        meta = json.loads(str(file["meta"]))
    module, prefix, key = meta["ours"]["module"], meta["container"]["prefix"] or "", meta["container"]["key"]
    options = {"frames" if option == "segments" else option: value for option, value in meta["ours"]["options"].items()}
    tensors = numbered({prefix + name: shape for name, shape in meta["shapes"].items()})
    if key == "blobs":
        tensors = {name: x.numpy() for name, x in tensors.items()}
    module, file = importlib.import_module(module), {key: tensors, "epoch": 1} if key else tensors
    return module, {**next(iter(module.RECIPES.values())), **options}, file, module.convert(file)


@pytest.mark.parametrize("case", [*RENAMED, *GOLDEN])
def test_public_file_through_weights_and_init(case, tmp_path, empty_networks):
    module, recipe, file, expected = (of_the_authors if case in GOLDEN else under_their_names)(case)
    path = tmp_path / ("PUBLIC.pkl" if "blobs" in file else "PUBLIC.pth.tar")
    path.write_bytes(pickle.dumps(file, 2)) if "blobs" in file else torch.save(file, path)
    loaded, num_classes = evaluate.load_weights(module, recipe, evaluate.read_checkpoint(path), path)
    started = module.build(recipe, 10)
    sentence = train.start_from(module, started, {**recipe, "init": str(path)})
    assert num_classes == 10 and sentence == f"init {path}: {len(expected)} of {len(expected)} tensors read"
    for model in (loaded, started):
        state = model.state_dict()
        assert state.keys() == expected.keys()
        assert [key for key in state if not torch.equal(state[key], expected[key])] == []


@pytest.mark.parametrize("name, changes, head, classes", [
    *[(name, R50 if name in ("tsn", "trn") else {}, "fc", 1000) for name in ("tsn", "trn", "tsm", "tin")],
    ("tsn", {}, "fc", 1000),  # ResNet-101
    ("tsn", {"backbone": "inception_resnet_v2"}, "classif", 1000),  # timm's
    ("tsn", {"backbone": "inception_resnet_v2"}, "last_linear", 1001),  # Cadene's, with the background
    ("tsn", {"backbone": "senet154"}, "last_linear", 1000),  # both
])
def test_imagenet_file_through_init(name, changes, head, classes, tmp_path, empty_networks):
    module, path = importlib.import_module(name), tmp_path / "imagenet.pth"
    recipe = {**next(iter(module.RECIPES.values())), **changes, "init": str(path)}
    shapes = network_shapes(module, recipe)
    expected = numbered({key: shape for key, shape in shapes.items() if key.startswith("backbone.")})
    torch.save({**{key.removeprefix("backbone."): x for key, x in expected.items()},
                f"{head}.weight": torch.zeros(1).expand(classes, 2048), f"{head}.bias": torch.zeros(classes)}, path)
    model = module.build(recipe, 10)
    sentence = train.start_from(module, model, recipe)
    state = model.state_dict()
    assert [key for key in expected if not torch.equal(state[key], expected[key])] == []
    assert f"{len(expected)} of {len(shapes)} tensors read" in sentence
    kept = set(re.findall(r"keeps its initial value: (\w+) \(not in the file", sentence))
    assert kept == {key.split(".")[0] for key in shapes} - {"backbone"}


@pytest.fixture(scope="module")
def few_videos(tmp_path_factory):
    """A data folder of 10 classes, with 8 videos for training and 2 for validation."""
    folder = tmp_path_factory.mktemp("few") / "toy"
    data.draw_toy(folder, videos=8)
    return folder


def redrawn(name, path):
    """A case of tests/golden, its checkpoint, as its authors' code would have left it, in the file `path`."""
    case = golden(name)
    if "blobs" in case.checkpoint:
        tensors = {key: x.numpy() for key, x in case.checkpoint["blobs"].items()}
        path.write_bytes(pickle.dumps({"blobs": tensors}, 2))
    else:
        torch.save(case.checkpoint, path)
    return case


def command(script, *args):
    """The lines that a script prints, called as one would, on frames of 36 pixels."""
    size = ["--test-resize", "36", "--test-crop", "32", "--workers", "0"]
    run = subprocess.run([sys.executable, ROOT / script, *map(str, args), *size], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


@pytest.mark.parametrize("name, flags", [
    ("tsm_mmaction2_r50_t8", ""),
    ("slowfast_pyslowfast_c2_8x8_r50",
     "--depth 50 --fusion-kernel 7 --fusion-norm --fc-bias --slow-index linspace --stride 1"),
], ids=["torch", "Caffe2"])
def test_evaluate_scores_with_a_public_file(name, flags, few_videos, tmp_path):
    case = redrawn(name, tmp_path / "PUBLIC.pth")
    printed = command("evaluate.py", "--model", case.module, "--weights", tmp_path / "PUBLIC.pth", *flags.split(),
                      "--data", few_videos, "--out", tmp_path / "scores.npz")
    assert re.fullmatch(r"mAP \d+\.\d\d", printed[-1])
    module, recipe, _ = evaluate.open_recipe(case.module)
    recipe = {**recipe, "test_resize": 36, "test_crop": 32, "stride": 1}
    views = functools.partial(evaluate.test_views, recipe=recipe, protocol=evaluate.make_protocol(recipe))
    [(clip, _)] = data.VideoList(few_videos, "val", recipe, train=False, views=views)[0][1]
    model = getattr(module, CONSTRUCTORS[case.module][0])(**case.options).eval()
    model.load_state_dict(module.convert(case.checkpoint))
    with torch.no_grad():
        logits = model(data.normalise(clip[None], recipe["mean"], recipe["std"]))
    np.testing.assert_allclose(np.load(tmp_path / "scores.npz")["scores"][0], logits[0].sigmoid(), atol=1e-5)


def test_train_starts_from_a_public_file(few_videos, tmp_path):
    case, path = redrawn("tin_deepcs233_r50_t8", tmp_path / "PUBLIC.pth"), tmp_path / "PUBLIC.pth"
    options = "--epochs 1 --batch 8 --lr 0 --crop 32 --augment jitter --jitter 36 36"
    printed = command("train.py", "--model", "tin", "--init", path, "--data", few_videos, "--out", tmp_path / "run",
                      *options.split())
    assert f"init {path}: 448 of 448 tensors read" in printed
    trained = evaluate.read_checkpoint(tmp_path / "run" / "best.pt")["model"]
    for key, tensor in tin.convert(case.checkpoint).items():  # at a rate of 0 it is what it was
        assert "running" in key or "num_batches" in key or torch.equal(trained[key], tensor), key


# The file alone.


def test_imports_pytorch_and_the_standard_library_only(module):
    tree = ast.parse(Path(module.__file__).read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in imported} <= {"torch", "torchvision", *sys.stdlib_module_names}


ALONE = """
import socket, sys
def refuse(*args, **kwargs):
    raise OSError("this test has no network")
socket.getaddrinfo = socket.socket.connect = refuse
import {name} as module
import torch
torch.set_num_threads(1)
recipe = module.RECIPES["toy"]
print(*module.build(recipe, 10).eval()(torch.zeros(1, recipe["frames"], 3, 32, 32)).shape)
"""


def test_copied_alone_it_runs_and_prints_nothing_of_its_own(module, tmp_path):
    shutil.copy(module.__file__, tmp_path)
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    env.update(HOME=str(tmp_path), TORCH_HOME=str(tmp_path))  # weights that were fetched before are out of reach
    run = subprocess.run([sys.executable, "-c", ALONE.format(name=module.__name__)], cwd=tmp_path, env=env,
                         capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "1 10\n", "")
