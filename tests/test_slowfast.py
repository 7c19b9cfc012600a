"""SlowFast gives the logits of its authors' code, and those of three other code bases.

    python -m pytest tests/test_slowfast.py

The tests follow slowfast.py from top to bottom: the frames that the slow pathway sees, laterals,
blocks, the whole network, its size and first weights, the report's rows, other people's weights.
Networks that would take long to fill with numbers have shapes only (PyTorch's device "meta").
"""
import numpy as np
import pytest
import torch
import torch.nn as nn

import slowfast
from conftest import close, drawn_clip, fill, golden, golden_names


def shapes_only(*args, **options):
    """A SlowFast without values, for evaluation."""
    with torch.device("meta"):
        return slowfast.SlowFast(*args, **options).eval()


# ---- the frames that the slow pathway sees


@pytest.mark.parametrize("frames, alpha, slow_index, expected", [
    (32, 4, "stride", [0, 4, 8, 12, 16, 20, 24, 28]),
    (44, 4, "stride", [0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40]),
    (32, 8, "stride", [0, 8, 16, 24]),
    (32, 4, "linspace", [0, 4, 8, 13, 17, 22, 26, 31]),
    (44, 4, "linspace", [0, 4, 8, 12, 17, 21, 25, 30, 34, 38, 43]),
    (32, 8, "linspace", [0, 10, 20, 31]),
])
def test_the_slow_pathway_sees_these_frames(frames, alpha, slow_index, expected):
    clip = torch.arange(frames).view(1, frames, 1, 1, 1).expand(2, frames, 3, 1, 1)
    slow = slowfast.slow_frames(clip, alpha, slow_index)
    assert slow.shape == (2, frames // alpha, 3, 1, 1)
    assert slow[0, :, 0, 0, 0].tolist() == expected


# ---- laterals


@torch.no_grad()
def test_a_lateral_of_ones_adds_up_five_frames_around_each_slow_one():
    lateral = slowfast.Lateral(1, kernel=5, alpha=4, norm=False)
    lateral.conv.weight.fill_(1)
    slow = torch.tensor([100.0, 200.0]).view(1, 1, 2, 1, 1)
    fast = torch.arange(8.0).view(1, 1, 8, 1, 1)

    assert lateral(slow, fast)[0, :, :, 0, 0].tolist() == [
        [100, 200],                      # the slow channel stays in front
        [0 + 1 + 2, 2 + 3 + 4 + 5 + 6],  # around frames 0 and 4; before frame 0 there are zeros
        [0 + 1 + 2, 2 + 3 + 4 + 5 + 6],  # twice as many channels as the fast map has
    ]


@pytest.mark.parametrize("norm", [False, True])
@torch.no_grad()
def test_a_lateral_is_a_naive_loop(norm):
    lateral = fill(slowfast.Lateral(2, kernel=5, alpha=4, norm=norm).eval())
    slow = torch.ones(1, 3, 3, 1, 1)
    fast = drawn_clip((1, 12, 2, 1, 1), seed=1).transpose(1, 2)

    expected = torch.zeros(4, 3)  # (2c, T / alpha)
    for i in range(3):
        for k in range(5):
            frame = 4 * i + k - 2
            if 0 <= frame < 12:
                expected[:, i] += lateral.conv.weight[:, :, k, 0, 0] @ fast[0, :, frame, 0, 0]
    if norm:
        bn = lateral.bn
        scale = bn.weight / torch.sqrt(bn.running_var + 1e-5)
        shift = bn.bias - bn.running_mean * scale
        expected = (expected * scale[:, None] + shift[:, None]).clamp(min=0)

    close(lateral(slow, fast)[0, 3:, :, 0, 0], expected, 1e-5)


# ---- blocks


@torch.no_grad()
def test_a_new_block_is_its_shortcut():
    block = slowfast.Bottleneck(32, planes=8, kernel=3, stride=1).eval()
    nn.init.zeros_(block.bn3.weight)  # as SlowFast does with all its blocks
    x = drawn_clip((1, 32, 4, 5, 5), seed=2)
    assert torch.equal(block(x), x.relu())


@pytest.mark.parametrize("variant, path, stem_frames, stage_frames", [
    ("slowfast_8x8", "slow", 1, (1, 1, 3, 3)),
    ("slowfast_8x8", "fast", 5, (3, 3, 3, 3)),
    ("slow_8x8", "slow", 1, (1, 1, 3, 3)),
    ("fast_32x2", "fast", 5, (3, 3, 3, 3)),
])
def test_kernels_and_strides(variant, path, stem_frames, stage_frames):
    """(time, height, width) of every convolution: no stride is in time, and a block's stride is in
    its second convolution."""
    pathway = getattr(shapes_only(10, variant, depth=50), path)
    assert pathway.conv1.kernel_size == (stem_frames, 7, 7)
    assert pathway.conv1.stride == (1, 2, 2)

    for stage, frames in enumerate(stage_frames, start=1):
        for number, block in enumerate(getattr(pathway, f"layer{stage}")):
            side = 2 if stage > 1 and number == 0 else 1
            assert (block.conv1.kernel_size, block.conv1.stride) == ((frames, 1, 1), (1, 1, 1))
            assert (block.conv2.kernel_size, block.conv2.stride) == ((1, 3, 3), (1, side, side))
            assert (block.conv3.kernel_size, block.conv3.stride) == ((1, 1, 1), (1, 1, 1))
            assert (block.bn3.eps, block.bn3.momentum) == (1e-5, 0.1)
            if number == 0:
                assert block.downsample[0].stride == (1, side, side)
            else:
                assert block.downsample is None


# ---- the whole network


def test_shapes_at_112_pixels():
    """(C, T, H, W): both pathways keep their frames, and a lateral widens the slow map by 1/4."""
    expected = {
        "slow.maxpool": (64, 8, 28, 28), "fast.maxpool": (8, 32, 28, 28),
        "fuse.0": (80, 8, 28, 28),
        "slow.layer1": (256, 8, 28, 28), "fast.layer1": (32, 32, 28, 28),
        "fuse.1": (320, 8, 28, 28),
        "slow.layer2": (512, 8, 14, 14), "fast.layer2": (64, 32, 14, 14),
        "fuse.2": (640, 8, 14, 14),
        "slow.layer3": (1024, 8, 7, 7), "fast.layer3": (128, 32, 7, 7),
        "fuse.3": (1280, 8, 7, 7),
        "slow.layer4": (2048, 8, 4, 4), "fast.layer4": (256, 32, 4, 4),
    }
    shapes = {}
    model = shapes_only(10, depth=14)
    for name in expected:
        def remember(module, inputs, output, name=name):
            shapes[name] = tuple(output.shape[1:])

        model.get_submodule(name).register_forward_hook(remember)
    model(torch.empty(2, 32, 3, 112, 112, device="meta"))
    assert shapes == expected


@torch.no_grad()
def test_alpha_outdoes_the_variants_own():
    model = fill(shapes_only(10, "slowfast_8x8", depth=14, alpha=8))
    other = fill(shapes_only(10, "slowfast_4x16", depth=14))
    clip = drawn_clip((1, 16, 3, 32, 32), seed=5)
    assert torch.equal(model(clip), other(clip))
    with pytest.raises(ValueError, match="multiple of 8, got 12"):
        model(clip[:, :12])


@pytest.mark.parametrize("option, value, known", [
    ("variant", "slowfast_16x8", "slowfast_8x8, slowfast_4x16, slowfast_11x8, fast_32x2"),
    ("depth", 18, "14, 50, 101, 152, 200"),
    ("slow_index", "nearest", "stride, linspace"),
])
def test_an_unknown_option_is_refused_with_the_known_ones(option, value, known):
    with pytest.raises(ValueError, match=f"no {option} {value!r}, only {known}"):
        shapes_only(10, **{option: value})


REPORT = dict(num_classes=313)
ZOO = dict(num_classes=400, fusion_norm=True, fc_bias=True)  # of PySlowFast and pytorchvideo


@pytest.mark.parametrize("options, frames, pixels, expected", [
    (dict(REPORT, variant="slowfast_8x8", depth=101), 32, 112, "62.63 M 24.71 G"),
    (dict(REPORT, variant="slowfast_8x8", depth=200), 32, 112, "90.04 M 43.12 G"),
    (dict(REPORT, variant="fast_32x2"), 32, 112, "60.75 M 97.38 G"),  # "above 4x"; report
    (dict(REPORT, variant="slow_8x8"), 8, 112, "60.18 M 21.91 G"),
    (dict(ZOO, variant="slowfast_8x8", depth=50, fusion_kernel=7), 32, 256, "34.57 M 65.71 G"),
    (dict(ZOO, variant="slowfast_4x16", depth=50), 32, 256, "34.48 M 36.10 G"),
    (dict(ZOO, variant="slow_8x8", depth=50), 8, 256, "32.45 M 54.52 G"),
])
def test_parameters_and_multiply_adds(options, frames, pixels, expected):
    """Of convolutions and classifier, for a clip. Those of ZOO are the figures it publishes."""
    model = shapes_only(**options)
    multiply_adds = []

    def count(module, inputs, output):
        multiply_adds.append(output.numel() * module.weight[0].numel())

    for module in model.modules():
        if isinstance(module, (nn.Conv3d, nn.Linear)):
            module.register_forward_hook(count)
    model(torch.empty(1, frames, 3, pixels, pixels, device="meta"))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert f"{parameters / 1e6:.2f} M {sum(multiply_adds) / 1e9:.2f} G" == expected


def test_first_weights():
    torch.manual_seed(0)
    model = slowfast.SlowFast(313, depth=14, fusion_norm=True, fc_bias=True)
    for name, parameter in model.named_parameters():
        value = parameter.detach()
        if value.dim() == 5:  # He's normal: variance 2 / (channels out x size of the kernel)
            std = (2 / (value.shape[0] * value[0, 0].numel())) ** 0.5
            assert value.std().item() == pytest.approx(std, rel=3 / value.numel() ** 0.5), name
        elif name == "fc.weight":
            assert value.std().item() == pytest.approx(0.01, rel=0.01)
        elif name.endswith("bias") or name.endswith("bn3.weight"):
            assert not value.any(), name
        else:  # the other batch norms, among them those of shortcuts and laterals
            assert (value == 1).all(), name


# ---- the report's rows


@pytest.mark.parametrize("name, window", [
    ("r101_8x8", ("slowfast_8x8", 32, 2)),
    ("r101_11x8", ("slowfast_11x8", 44, 2)),
    ("r101_fast_16x2", ("fast_16x2", 16, 2)),
    ("r101_fast_32x2", ("fast_32x2", 32, 2)),
    ("r101_slow_8x4", ("slow_8x4", 8, 4)),
    ("r101_slow_8x8", ("slow_8x8", 8, 8)),
])
def test_a_row_has_the_reports_window(name, window):
    row = slowfast.RECIPES[name]
    assert (row["variant"], row["frames"], row["stride"]) == window


# ---- other people's weights

DEEP = ["slowfast_mmaction2_8x8_r101", "slowfast_xtemporal_8x8_r101", "slowfast_xtemporal_8x8_r200"]


@pytest.mark.parametrize("key, expected", [
    # X-Temporal, PySlowFast
    ("module.slow_res4.22.bn3.running_var", "slow.layer3.22.bn3.running_var"),
    ("module.lateral_res4.weight", "fuse.3.conv.weight"),
    ("s3.pathway1_res0.branch2.a_bn.weight", "fast.layer2.0.bn1.weight"),
    ("s2_fuse.bn.weight", "fuse.1.bn.weight"),
    # PySlowFast's Caffe2 files
    ("t_res4_5_branch2b_w", "fast.layer3.5.conv2.weight"),
    ("t_res2_2_branch2c_bn_subsample_bn_s", "fuse.1.bn.weight"),
    # pytorchvideo, with two pathways and with one
    ("model.blocks.1.multipathway_blocks.1.res_blocks.2.branch2.conv_c.weight",
     "fast.layer1.2.conv3.weight"),
    ("blocks.2.res_blocks.0.branch1_norm.weight", "slow.layer2.0.downsample.1.weight"),
    # mmaction2, with two pathways and with one
    ("backbone.fast_path.layer2.3.conv1.bn.weight", "fast.layer2.3.bn1.weight"),
    ("backbone.slow_path.conv1_lateral.bn.weight", "fuse.0.bn.weight"),
    ("backbone.slow_path.layer3_lateral.bn.running_mean", "fuse.3.bn.running_mean"),
    ("backbone.layer4.0.conv2.conv.weight", "slow.layer4.0.conv2.weight"),
    # ours, compiled and distributed
    ("_orig_mod.module.fuse.2.conv.weight", "fuse.2.conv.weight"),
])
def test_other_peoples_names(key, expected):
    assert slowfast.our_name(key) == expected


@pytest.mark.parametrize("name", [name for name in golden_names("slowfast") if name not in DEEP])
@torch.no_grad()
def test_logits_are_those_of_the_authors(name):
    """The order of mmaction2's classifier shows here alone: in the wrong order it loads as well."""
    case = golden(name)
    model = shapes_only(**case.options)
    model.load_state_dict(slowfast.convert(case.checkpoint), assign=True)
    close(model(case.clip), case.arrays["logits"])


@pytest.mark.parametrize("name", DEEP)
def test_names_and_shapes_of_deep_networks_fit(name):
    case = golden(name)
    shapes_only(**case.options).load_state_dict(slowfast.convert(case.checkpoint), assign=True)


@pytest.mark.parametrize("name", [
    "slowfast_pyslowfast_slow_8x8_r50",
    "slowfast_pytorchvideo_slow_8x8_r50",
    "slowfast_mmaction2_slow_8x8_r50",
])
def test_a_fast_pathway_alone_is_known_by_its_stem(name):
    """Its keys are those of a slow pathway alone; only the five frames of the stem tell."""
    slow_file = golden(name).checkpoint
    slow_file = slow_file.get("model_state") or slow_file["state_dict"]
    fast = shapes_only(10, "fast_16x2", depth=50, fc_bias=True).state_dict()
    fast_file = {key: fast[slowfast.our_name(key).replace("slow.", "fast.")] for key in slow_file}

    state = slowfast.convert({"state_dict": fast_file})
    assert state.keys() == fast.keys()
    assert all(state[name] is fast[name] for name in fast)


def test_caffe2_files_lack_axes_and_counters_and_hold_the_optimiser():
    blobs = {
        "conv1_w": np.ones((64, 3, 1, 7, 7), np.float32),
        "res_conv1_bn_riv": np.ones(64, np.float32),
        "res2_0_branch2a_w": np.ones((64, 64), np.float32),
        "pred_w": np.ones((10, 2048), np.float32),
        "pred_w_momentum": np.ones((10, 2048), np.float32),
        "model_iter": np.int64(7),
        "lr": np.float32(0.1),
    }
    state = slowfast.convert({"blobs": blobs})
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {
        "slow.conv1.weight": (64, 3, 1, 7, 7),
        "slow.bn1.running_var": (64,),
        "slow.bn1.num_batches_tracked": (),
        "slow.layer1.0.conv1.weight": (64, 64, 1, 1, 1),
        "fc.weight": (10, 2048),
    }


@pytest.mark.parametrize("key", [
    "conv1.weight",                             # torchvision's image networks
    "backbone.conv1.weight",                    # our TSN
    "blocks.0.conv.conv_t.weight",              # pytorchvideo's X3D
    "s4.pathway0_nonlocal3.conv_theta.weight",  # PySlowFast with non-local blocks
    "s2.pathway0_res0.branch2.a.weight.more",   # has to end where a known key ends
    "lr",                                       # skipped in Caffe2's files alone
    7,
])
def test_an_unknown_key_is_named(key):
    tensors = {"slow.conv1.weight": torch.zeros(64, 3, 1, 7, 7), key: torch.zeros(1)}
    with pytest.raises(ValueError, match=f"no place for the key {key}$"):
        slowfast.convert({"state_dict": tensors})
