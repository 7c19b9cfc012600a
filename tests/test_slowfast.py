"""SlowFast: logits against four code bases' own, sizes and shapes against the specification, the two ways to pick slow
frames, the laterals, the start, every checkpoint layout and every refusal.

    python -m pytest tests/test_slowfast.py

Of the networks deeper than 50 only Fast-only computes logits here (it comes at 101 alone); the others, whose weights
take long to draw, are held by the names and shapes of their authors' files.
"""
import copy
import json
import re

import numpy as np
import pytest
import torch
import torch.nn as nn

import slowfast
from conftest import ROOT, drawn_clip, drawn_tensors, golden, golden_names

CASES = golden_names("slowfast")
DEEP = ["slowfast_mmaction2_8x8_r101", "slowfast_xtemporal_8x8_r101", "slowfast_xtemporal_8x8_r200"]


def close(ours, theirs, tolerance=1e-4):
    """Within `tolerance` of the largest value."""
    theirs = torch.as_tensor(theirs)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * float(theirs.abs().max()))


def bare(*args, **options):
    """A SlowFast of shapes without values, for evaluation."""
    with torch.device("meta"):
        return slowfast.SlowFast(*args, **options).eval()


def drawn(*args, **options):
    """A SlowFast in which every tensor is drawn, the running statistics too: nothing is 0, 1 or equal by accident."""
    model = bare(*args, **options)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    model.load_state_dict(drawn_tensors(shapes, seed=0), assign=True)
    return model


def outputs(model, clip, names):
    """{name: the shape (C, T, H, W) that the part of this name gives}."""
    shapes = {}
    for name in names:
        model.get_submodule(name).register_forward_hook(
            lambda part, inputs, output, name=name: shapes.update({name: tuple(output.shape[1:])}))
    model(clip)
    return shapes


# Against the authors' own code.


@pytest.mark.parametrize("name", sorted(set(CASES) - set(DEEP)))
@torch.no_grad()
def test_logits_are_the_authors(name):
    case = golden(name)
    model = bare(**case.options)
    model.load_state_dict(slowfast.convert(case.checkpoint), assign=True)
    close(model(case.clip), case.arrays["logits"])
    if name == "slowfast_pytorchvideo_8x8_r50":
        model.slow_index = "stride"  # the other code bases' frames: no error, other logits
        assert (model(case.clip) - torch.from_numpy(case.arrays["logits"])).abs().max() > 0.005


@pytest.mark.parametrize("name", CASES)
def test_every_file_of_the_authors_fits_without_a_rest(name):
    with np.load(ROOT / "tests" / "golden" / f"{name}.npz") as file:
        meta = json.loads(str(file["meta"]))
    tensors = {(meta["container"]["prefix"] or "") + key: torch.empty(shape, device="meta")
               for key, shape in meta["shapes"].items()}
    state = slowfast.convert({meta["container"]["key"]: tensors})
    bare(**meta["ours"]["options"]).load_state_dict(state, assign=True)


# Sizes, 313 classes at 112 pixels: the specification's table of parameters and multiply-adds of a clip.

TWO = ("34.28 M", "62.63 M", "85.45 M", "90.04 M")  # at depths 50, 101, 152 and 200
FAST = ("32.85 M", "60.75 M", "83.73 M", "90.31 M")
SLOW = ("32.28 M", "60.18 M", "82.64 M", "87.12 M")
SIZES = {  # variant: fast frames, parameters and multiply-adds
    "slowfast_8x8": (32, TWO, ("13.11 G", "24.71 G", "35.49 G", "43.12 G")),
    "slowfast_4x16": (32, TWO, ("7.23 G", "13.37 G", "19.10 G", "23.24 G")),
    "slowfast_11x8": (44, TWO, ("18.02 G", "33.97 G", "48.79 G", "59.29 G")),
    "fast_32x2": (32, FAST, ("53.71 G", "97.38 G", "141.06 G", "182.16 G")),
    "fast_16x2": (16, FAST, ("26.86 G", "48.69 G", "70.53 G", "91.08 G")),
    "slow_8x8": (8, SLOW, ("10.99 G", "21.91 G", "32.01 G", "39.00 G")),
    "slow_8x4": (8, SLOW, ("10.99 G", "21.91 G", "32.01 G", "39.00 G")),
}


def size(model, *clips):
    """The parameters, then the multiply-adds of convolutions and classifier for each clip of (frames, pixels)."""
    parameters, macs = sum(p.numel() for p in model.parameters()), []
    for name, part in list(model.named_modules()):
        if isinstance(part, (nn.Conv3d, nn.Linear)):
            part.register_forward_hook(lambda part, inputs, y: macs.append(y.numel() * part.weight[0].numel()))
        elif isinstance(part, (nn.BatchNorm3d, nn.ReLU)):
            model.set_submodule(name, nn.Identity())  # not counted, and half of the time
    sizes = [f"{parameters / 1e6:.2f} M"]
    for frames, pixels in clips:
        macs.clear()
        model(torch.empty(1, frames, 3, pixels, pixels, device="meta"))
        sizes.append(f"{sum(macs) / 1e9:.2f} G")
    return sizes


@pytest.mark.parametrize("variant", SIZES)
@torch.no_grad()
def test_sizes(variant):
    assert set(SIZES) == set(slowfast.ALPHA)
    frames, *table = SIZES[variant]
    sizes = [size(bare(313, variant, depth), (frames, 112)) for depth in (50, 101, 152, 200)]
    assert sizes == [list(of_depth) for of_depth in zip(*table)]


@pytest.mark.parametrize("options, frames, expected", [
    (dict(variant="slowfast_8x8", depth=50, fusion_kernel=7), 32, ["34.57 M", "65.71 G"]),
    (dict(variant="slowfast_4x16", depth=50), 32, ["34.48 M", "36.10 G"]),
    (dict(variant="slowfast_8x8", depth=101), 32, ["62.83 M", "125.91 G"]),
    (dict(variant="slow_8x8", depth=50), 8, ["32.45 M", "54.52 G"]),
    (dict(variant="slow_8x8", depth=101), 8, ["60.36 M", "111.56 G"]),
])
@torch.no_grad()
def test_sizes_are_those_of_the_model_zoos(options, frames, expected):
    """400 classes at 256 pixels."""
    assert size(bare(400, fusion_norm=True, fc_bias=True, **options), (frames, 256)) == expected


@pytest.mark.parametrize("variant, expected", [
    ("slowfast_8x8", ["31.48 G", "40.61 G", "49.18 G"]), ("fast_32x2", ["124.28 G", "160.12 G", "194.18 G"]),
])
@torch.no_grad()
def test_sizes_at_the_test_scales(variant, expected):
    assert size(bare(313, variant), (32, 128), (32, 144), (32, 160))[1:] == expected


# Shapes.


@pytest.mark.parametrize("depth", [14, 50])
def test_shapes_at_112_pixels(depth):
    expected = {
        "slow.maxpool": (64, 8, 28, 28), "fast.maxpool": (8, 32, 28, 28),
        "slow.layer1": (256, 8, 28, 28), "fast.layer1": (32, 32, 28, 28),
        "slow.layer2": (512, 8, 14, 14), "fast.layer2": (64, 32, 14, 14),
        "slow.layer3": (1024, 8, 7, 7), "fast.layer3": (128, 32, 7, 7),
        "slow.layer4": (2048, 8, 4, 4), "fast.layer4": (256, 32, 4, 4),
    }
    assert outputs(bare(10, depth=depth), torch.empty(2, 32, 3, 112, 112, device="meta"), expected) == expected


@pytest.mark.parametrize("pixels, last", [(64, 2), (112, 4), (128, 4), (144, 5), (160, 5)])
def test_last_map(pixels, last):
    shapes = outputs(bare(10, depth=14), torch.empty(1, 32, 3, pixels, pixels, device="meta"), ["slow.layer4"])
    assert shapes["slow.layer4"] == (2048, 8, last, last)


@pytest.mark.parametrize("variant, frames, slow", [("slowfast_8x8", 32, 8), ("slowfast_4x16", 32, 4),
                                                   ("slowfast_11x8", 44, 11)])
def test_laterals(variant, frames, slow):
    """Their place, size, and the two maps that they join."""
    model, seen = bare(10, variant, 14, fusion_kernel=7), []
    for lateral in model.fuse:
        assert lateral.conv.kernel_size == (7, 1, 1) and lateral.conv.padding == (3, 0, 0)
        lateral.register_forward_hook(lambda lateral, inputs, joined: seen.append(
            [(x.shape[1], x.shape[2]) for x in (*inputs, lateral.conv(inputs[1]), joined)]))
    model(torch.empty(1, frames, 3, 64, 64, device="meta"))
    table = [(64, 8, 16, 80), (256, 32, 64, 320), (512, 64, 128, 640), (1024, 128, 256, 1280)]
    assert seen == [[(s, slow), (f, frames), (out, slow), (joined, slow)] for s, f, out, joined in table]
    assert [getattr(model.slow, f"layer{n}")[0].conv1.in_channels for n in (1, 2, 3, 4)] == [row[3] for row in table]


@pytest.mark.parametrize("variant, kernels", [
    ("slowfast_8x8", {"slow": (1, 1, 1, 3, 3), "fast": (5, 3, 3, 3, 3)}),
    ("slow_8x8", {"slow": (1, 1, 1, 3, 3)}), ("fast_32x2", {"fast": (5, 3, 3, 3, 3)}),
])
def test_kernels_and_strides(variant, kernels):
    """(time, height, width): of the stem, of a block's three convolutions, of the shortcut that a stage's first has."""
    model = bare(10, variant)
    for path, (stem, *stages) in kernels.items():
        net = getattr(model, path)
        assert (net.conv1.kernel_size, net.conv1.stride) == ((stem, 7, 7), (1, 2, 2))
        for n, kernel in enumerate(stages, 1):
            for i, block in enumerate(getattr(net, f"layer{n}")):
                stride = (1, 2, 2) if i == 0 and n > 1 else (1, 1, 1)
                convs = [part for part in block.modules() if isinstance(part, nn.Conv3d)]
                assert [(conv.kernel_size, conv.stride) for conv in convs] == [
                    ((kernel, 1, 1), (1, 1, 1)), ((1, 3, 3), stride), ((1, 1, 1), (1, 1, 1)), ((1, 1, 1), stride),
                ][: 3 + (i == 0)]
    assert [name for name, _ in model.named_children() if name in ("slow", "fast")] == list(kernels)
    for part in model.modules():
        if isinstance(part, nn.BatchNorm3d):
            assert (part.eps, part.momentum) == (1e-5, 0.1)


# Slow frames.


def picked(frames, alpha, slow_index):
    clip = torch.arange(frames).reshape(1, frames, 1, 1, 1).expand(2, frames, 3, 1, 1)
    slow = slowfast.slow_frames(clip, alpha, slow_index)
    assert slow.shape == (2, frames // alpha, 3, 1, 1)
    return slow[0, :, 0, 0, 0].tolist()


@pytest.mark.parametrize("frames, alpha, slow_index, expected", [
    (32, 4, "stride", [0, 4, 8, 12, 16, 20, 24, 28]),
    (44, 4, "stride", [0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40]),
    (32, 8, "stride", [0, 8, 16, 24]),
    (32, 4, "linspace", [0, 4, 8, 13, 17, 22, 26, 31]),
    (44, 4, "linspace", [0, 4, 8, 12, 17, 21, 25, 30, 34, 38, 43]),
    (32, 8, "linspace", [0, 10, 20, 31]),
])
def test_slow_frames(frames, alpha, slow_index, expected):
    assert picked(frames, alpha, slow_index) == expected


def test_linspace_is_that_of_pytorch():
    for alpha in (2, 4, 8):
        for frames in range(alpha, 129, alpha):
            assert picked(frames, alpha, "linspace") == torch.linspace(0, frames - 1, frames // alpha).long().tolist()


# What the parts compute.


@pytest.mark.parametrize("norm", [False, True])
@torch.no_grad()
def test_lateral_is_the_naive_loop(norm):
    lateral = slowfast.Lateral(2, 5, 4, norm).eval()
    fast, slow = drawn_clip((1, 12, 2, 1, 1), seed=1).transpose(1, 2), torch.ones(1, 3, 3, 1, 1)
    if norm:
        lateral.bn.load_state_dict(drawn_tensors({k: tuple(t.shape) for k, t in lateral.bn.state_dict().items()}, 1))
    y = lateral(slow, fast)[0, :, :, 0, 0]
    assert torch.equal(y[:3], torch.ones(3, 3))  # the slow map in front
    for c in range(4):
        for i in range(3):
            expected = sum(lateral.conv.weight[c, d, k, 0, 0] * fast[0, d, 4 * i + k - 2, 0, 0]
                           for d in range(2) for k in range(5) if 0 <= 4 * i + k - 2 < 12)
            if norm:
                bn = lateral.bn
                expected = (expected - bn.running_mean[c]) / torch.sqrt(bn.running_var[c] + 1e-5)
                expected = (expected * bn.weight[c] + bn.bias[c]).clamp(min=0)
            torch.testing.assert_close(y[3 + c, i], expected)


@torch.no_grad()
def test_slow_pathway_without_laterals_is_slow_only():
    """Laterals of zeros, and a Slow-only network that has the rest of the weights."""
    both, slow = drawn(10, depth=14), bare(10, "slow_8x8", 14)
    for lateral in both.fuse:
        lateral.conv.weight.zero_()
    weights = both.state_dict()
    slow.load_state_dict({name: weights[name][tuple(map(slice, tensor.shape))]  # the slow channels come first
                          for name, tensor in slow.state_dict().items()}, assign=True)
    clip = drawn_clip((2, 16, 3, 32, 32), seed=2)
    close(both.features(clip)[:, :2048], slow.features(clip[:, ::4]), 1e-5)


@torch.no_grad()
def test_fast_pathway_hears_nothing_from_the_slow_one():
    model, clip = drawn(10, depth=14), drawn_clip((1, 16, 3, 32, 32), seed=3)
    before = model.features(clip)
    for name, parameter in model.named_parameters():
        if name.startswith(("slow", "fuse")):
            parameter.mul_(-1.5)
    after = model.features(clip)
    assert torch.equal(before[:, 2048:], after[:, 2048:]) and not torch.equal(before[:, :2048], after[:, :2048])


@torch.no_grad()
def test_fast_only_is_the_fast_pathway_at_eight_times_the_width():
    """Without laterals; and with all but the first eighth of every layer's channels at zero it is that pathway."""
    both, fast = drawn(10, depth=14), drawn(10, "fast_32x2", 14)
    narrow, wide = both.fast.state_dict(), fast.fast.state_dict()
    assert {name.split(".")[0] for name in fast.state_dict()} == {"fast", "fc"}
    assert narrow.keys() == wide.keys()
    for name, tensor in wide.items():
        if tensor.dim():
            part = tuple(slice(side) for side in narrow[name].shape)
            tensor.fill_(1 if name.endswith("running_var") else 0)[part] = narrow[name]
    clip = drawn_clip((1, 16, 3, 32, 32), seed=4)
    alone = fast.features(clip)
    assert alone.shape == (1, 2048) and not alone[:, 256:].any()
    close(alone[:, :256], both.features(clip)[:, 2048:], 1e-5)


@torch.no_grad()
def test_logits_are_linear_in_the_features():
    for bias in (False, True):
        model, clip = drawn(7, "slow_8x4", 14, fc_bias=bias), drawn_clip((2, 8, 3, 32, 32), seed=5)
        assert set(dict(model.fc.named_parameters())) == ({"weight", "bias"} if bias else {"weight"})
        close(model(clip), model.features(clip) @ model.fc.weight.T + (model.fc.bias if bias else 0), 1e-6)


def test_alpha_outdoes_the_variant():
    clip = drawn_clip((1, 16, 3, 32, 32), seed=6)
    with torch.no_grad():
        ours, sixteen = drawn(10, "slowfast_8x8", 14, alpha=8)(clip), drawn(10, "slowfast_4x16", 14)(clip)
    assert torch.equal(ours, sixteen)
    with pytest.raises(ValueError, match="multiple of 8 frames, got 12"):
        drawn(10, "slowfast_8x8", 14, alpha=8)(clip[:, :12])


@pytest.mark.parametrize("option, value", [("variant", "slowfast_16x8"), ("depth", 18), ("slow_index", "nearest")])
def test_an_unknown_option_is_named(option, value):
    with pytest.raises(ValueError, match=f"no {option} {value!r}, only "):
        bare(10, **{option: value})


# The start.


def test_start():
    torch.manual_seed(0)
    model = slowfast.SlowFast(313, depth=14, fusion_norm=True, fc_bias=True)
    for name, parameter in model.named_parameters():
        value = parameter.detach()
        if parameter.dim() == 5:  # He's, by what goes out
            std = (2 / (len(value) * value[0, 0].numel())) ** 0.5
            assert float(value.std()) == pytest.approx(std, rel=0.2 if value.numel() < 2000 else 0.05), name
        elif name == "fc.weight":
            assert float(value.std()) == pytest.approx(0.01, rel=0.01)
        else:  # only the last norm of a block starts at 0: not a shortcut's, not a lateral's
            zero = name.endswith("bias") or name.endswith("bn3.weight")
            assert torch.equal(value, torch.zeros_like(value) if zero else torch.ones_like(value)), name
    block = slowfast.Bottleneck(32, 8, 3, 1).eval()
    nn.init.zeros_(block.bn3.weight)
    x = drawn_clip((1, 32, 4, 5, 5), seed=7)
    assert block.downsample is None and torch.equal(block(x), x.relu())


# Other people's files. Theirs is written here as the specification has it: P slow or fast, N 0 or 1 (Caffe2: nothing or
# t_), n our layer, r theirs, i block, k and a 1 or a, 2 or b, 3 or c.

LAYOUTS = {
    "xtemporal": dict(
        key="model", prefix="module.", stem="{P}_conv1.", stem_bn="{P}_bn1.", conv="{P}_res{r}.{i}.conv{k}.",
        bn="{P}_res{r}.{i}.bn{k}.", short="{P}_res{r}.0.downsample.0.", short_bn="{P}_res{r}.0.downsample.1.",
        first="lateral_p1.", lateral="lateral_res{r}.", fc="fc."),
    "pyslowfast": dict(
        key="model_state", prefix="", stem="s1.pathway{N}_stem.conv.", stem_bn="s1.pathway{N}_stem.bn.",
        conv="s{r}.pathway{N}_res{i}.branch2.{a}.", bn="s{r}.pathway{N}_res{i}.branch2.{a}_bn.",
        short="s{r}.pathway{N}_res0.branch1.", short_bn="s{r}.pathway{N}_res0.branch1_bn.",
        first="s1_fuse.conv_f2s.", first_bn="s1_fuse.bn.", lateral="s{r}_fuse.conv_f2s.", lateral_bn="s{r}_fuse.bn.",
        fc="head.projection."),
    "pytorchvideo": dict(
        key="model_state", prefix="model.", stem="blocks.0.multipathway_blocks.{N}.conv.",
        stem_bn="blocks.0.multipathway_blocks.{N}.norm.",
        conv="blocks.{n}.multipathway_blocks.{N}.res_blocks.{i}.branch2.conv_{a}.",
        bn="blocks.{n}.multipathway_blocks.{N}.res_blocks.{i}.branch2.norm_{a}.",
        short="blocks.{n}.multipathway_blocks.{N}.res_blocks.0.branch1_conv.",
        short_bn="blocks.{n}.multipathway_blocks.{N}.res_blocks.0.branch1_norm.",
        first="blocks.0.multipathway_fusion.conv_fast_to_slow.", first_bn="blocks.0.multipathway_fusion.norm.",
        lateral="blocks.{n}.multipathway_fusion.conv_fast_to_slow.", lateral_bn="blocks.{n}.multipathway_fusion.norm.",
        fc="blocks.6.proj."),
    "mmaction2": dict(
        key="state_dict", prefix="", stem="backbone.{P}_path.conv1.conv.", stem_bn="backbone.{P}_path.conv1.bn.",
        conv="backbone.{P}_path.layer{n}.{i}.conv{k}.conv.", bn="backbone.{P}_path.layer{n}.{i}.conv{k}.bn.",
        short="backbone.{P}_path.layer{n}.0.downsample.conv.", short_bn="backbone.{P}_path.layer{n}.0.downsample.bn.",
        first="backbone.slow_path.conv1_lateral.conv.", first_bn="backbone.slow_path.conv1_lateral.bn.",
        lateral="backbone.slow_path.layer{n}_lateral.conv.", lateral_bn="backbone.slow_path.layer{n}_lateral.bn.",
        fc="cls_head.fc_cls."),
    "caffe2": dict(
        key="blobs", prefix="", stem="{t}conv1_", stem_bn="{t}res_conv1_bn_", conv="{t}res{r}_{i}_branch2{a}_",
        bn="{t}res{r}_{i}_branch2{a}_bn_", short="{t}res{r}_0_branch1_", short_bn="{t}res{r}_0_branch1_bn_",
        first="t_pool1_subsample_", first_bn="t_pool1_subsample_bn_", lateral="t_res{r}_{last}_branch2c_bn_subsample_",
        lateral_bn="t_res{r}_{last}_branch2c_bn_subsample_bn_", fc="pred_"),
}
ALONE = {"pytorchvideo": ("multipathway_blocks.{N}.", ""), "mmaction2": ("{P}_path.", ""),  # a pathway alone
         "pyslowfast": ("pathway{N}", "pathway0"), "caffe2": ("{t}", "")}


def theirs(name, peer, alone=False):
    """Our name -> the peer's."""
    path, *middle, value = name.split(".")
    fields, kind = dict(P=path, N="01"[path == "fast"], t="t_" if path == "fast" else ""), "fc"
    if path == "fuse":
        n, part = int(middle[0]), middle[1]
        kind = ("lateral" if n else "first") + ("" if part == "conv" else "_bn")
        fields.update(n=n, r=n + 1, last="?235"[n])
    elif middle and middle[0] in ("conv1", "bn1"):
        kind = "stem" if middle[0] == "conv1" else "stem_bn"
    elif middle:
        layer, block, part, *half = middle
        kind = part[:-1] if not half else "short" if half == ["0"] else "short_bn"
        k = "0" if half else part[-1]
        fields.update(n=layer[-1], r=int(layer[-1]) + 1, i=block, k=k, a="?abc"[int(k)])
    if peer == "caffe2":
        value = {"weight": "s" if "bn" in kind else "w", "bias": "b", "running_mean": "rm", "running_var": "riv"}[value]
    pattern = LAYOUTS[peer]["prefix"] + LAYOUTS[peer][kind] + value
    return (pattern.replace(*ALONE[peer]).replace("blocks.6", "blocks.5") if alone else pattern).format(**fields)


def shortened(x):
    """Without the trailing axes of length 1 of a convolution's weight, as an array."""
    while x.dim() > 2 and x.shape[-1] == 1:
        x = x[..., 0]
    return x.numpy()


def checkpoint(state, peer, alone=False):
    """Our state dict -> the peer's file, as read."""
    tensors = {theirs(name, peer, alone): tensor for name, tensor in state.items()
               if not (peer == "caffe2" and name.endswith("num_batches_tracked"))}
    if peer == "mmaction2" and not alone:
        tensors["cls_head.fc_cls.weight"] = torch.cat(tensors["cls_head.fc_cls.weight"].split([2048, 256], 1)[::-1], 1)
    if peer == "caffe2":
        tensors = {key: shortened(tensor) for key, tensor in tensors.items()}
        tensors.update(lr=np.float32(0.1), model_iter=np.int64(7), pred_w_momentum=tensors["pred_w"])
    return {LAYOUTS[peer]["key"]: tensors, "epoch": 3}


def assert_same(ours, expected):
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


@pytest.mark.parametrize("variant", ["slowfast_8x8", "slow_8x8", "fast_16x2"])
@pytest.mark.parametrize("peer", LAYOUTS)
def test_layout(peer, variant):
    alone = not variant.startswith("slowfast")
    if peer == "xtemporal" and alone:
        pytest.skip("X-Temporal has no one-pathway network")
    theirs_have = peer != "xtemporal"  # mmaction2 in its "steplr" configuration
    state = drawn(10, variant, 14, fusion_norm=theirs_have, fc_bias=theirs_have).state_dict()
    file = checkpoint(state, peer, alone)
    before = copy.deepcopy(file)
    assert_same(slowfast.convert(file), state)
    for key, value in before[LAYOUTS[peer]["key"]].items():  # the file is as it was
        assert np.array_equal(file[LAYOUTS[peer]["key"]][key], value)


def test_prefixes_and_containers():
    state = drawn(10, "slow_8x8", 14).state_dict()
    assert_same(slowfast.convert(state), state)
    assert_same(slowfast.convert({"model": {"module." + name: tensor for name, tensor in state.items()}}), state)
    wrapped = checkpoint(drawn(10, depth=14).state_dict(), "xtemporal")["model"]
    bared = {key.removeprefix("module."): tensor for key, tensor in wrapped.items()}
    expected = slowfast.convert({"model": wrapped})
    for file in ({"state_dict": wrapped}, {"model": bared}, bared):
        assert_same(slowfast.convert(file), expected)


def shaped(depth, peer, change=lambda name, tensor: tensor):
    """A peer's file of two pathways, without values; change: None leaves a tensor out."""
    state = {name: change(name, tensor) for name, tensor in bare(10, depth=depth, fc_bias=True).state_dict().items()}
    return checkpoint({name: tensor for name, tensor in state.items() if tensor is not None}, peer)


def test_refuses_non_local_blocks():
    for peer, key in (("pyslowfast", "s4.pathway0_nonlocal3.conv_theta.weight"),
                      ("mmaction2", "backbone.slow_path.layer3.1.non_local_block.g.conv.weight")):
        file = shaped(14, peer)
        file[LAYOUTS[peer]["key"]][key] = torch.empty(1, device="meta")
        with pytest.raises(ValueError, match=f"non-local blocks: {re.escape(key)}"):
            slowfast.convert(file)


@pytest.mark.parametrize("peer", ["pyslowfast", "pytorchvideo"])
def test_refuses_r101_50_50(peer):
    def shorten(name, tensor):
        block = re.fullmatch(r"\w+\.layer3\.(\d+)\.conv1\.weight", name)
        return tensor[:, :, :1] if block and int(block[1]) > 5 else tensor

    with pytest.raises(ValueError, match="R101_50_50"):
        slowfast.convert(shaped(101, peer, shorten))


def test_refuses_pathways_of_two_depths():
    def shorten(name, tensor):
        block = re.match(r"fast\.layer3\.(\d+)\.", name)
        return None if block and int(block[1]) > 5 else tensor

    with pytest.raises(ValueError, match="r101-r50: backbone.slow_path.layer3.6.conv1.conv.weight"):
        slowfast.convert(shaped(101, "mmaction2", shorten))


@pytest.mark.parametrize("path", ["", "slow_path."])
def test_refuses_the_old_mmaction(path):
    tensors = {f"backbone.{path}bn1.weight": (64,), f"backbone.{path}conv1.weight": (64, 3, 1, 7, 7),
               f"backbone.{path}layer1.0.conv1.weight": (64, 64, 1, 1, 1), "cls_head.fc_cls.weight": (10, 2048)}
    with pytest.raises(ValueError, match=r"MMAction 0\.x: backbone"):
        slowfast.convert({"state_dict": {key: torch.empty(shape) for key, shape in tensors.items()}})


@pytest.mark.parametrize("keys", [
    ["conv1.weight", "layer1.0.conv1.weight", "fc.weight"],  # torchvision's ImageNet ResNets
    ["backbone.conv1.weight", "backbone.bn1.weight", "fc.weight"],  # our own image models
    ["blocks.0.conv.conv_t.weight", "blocks.0.norm.weight"],  # pytorchvideo's X3D
    ["s2.pathway0_res0.branch2.a.weight.more", "s1.pathway0_stem.conv.weight"],
    ["Mixed_3b.branch_0.weight", "a", "b", "c"],
])
def test_unknown_layouts_are_refused_with_their_keys(keys):
    unknown = [key for key in keys if slowfast.our_name(key) is None]
    with pytest.raises(ValueError) as error:
        slowfast.convert({"state_dict": {key: torch.empty(64, 3, 7, 7) for key in keys}})
    assert f"{len(unknown)} of {len(keys)} keys: {', '.join(unknown[:3])} ..." in str(error.value)


def test_an_empty_file_is_refused():
    with pytest.raises(ValueError, match="0 of 0 keys"):
        slowfast.convert({"state_dict": {}})


# The recipes.


def test_windows():
    windows = {name: (row["variant"], row["frames"], row["stride"]) for name, row in slowfast.RECIPES.items()}
    del windows["toy"]
    assert windows == {
        "r101_8x8": ("slowfast_8x8", 32, 2), "r101_11x8": ("slowfast_11x8", 44, 2),
        "r101_fast_16x2": ("fast_16x2", 16, 2), "r101_fast_32x2": ("fast_32x2", 32, 2),
        "r101_slow_8x4": ("slow_8x4", 8, 4), "r101_slow_8x8": ("slow_8x8", 8, 8)}
    assert {name: row["published_map"] for name, row in slowfast.RECIPES.items() if row["published_map"]} == {
        "r101_8x8": 59.89}


def test_toys_centre_clip_lies_in_the_middle():
    """A video and its reversal then show the network the same frames."""
    window = slowfast.RECIPES["toy"]["frames"] * slowfast.RECIPES["toy"]["stride"]
    start = (24 - window) // 2
    assert start == 24 - window - start
