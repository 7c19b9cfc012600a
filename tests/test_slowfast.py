"""SlowFast gives the logits of its authors' code, and those of three other code bases.

    python -m pytest tests/test_slowfast.py

The tests follow slowfast.py from top to bottom: the frames that the slow pathway sees, laterals,
the whole network, its size and first weights, the report's rows, other people's weights.
Networks that would take long to fill with numbers have shapes only (PyTorch's device "meta").
test_models.py has what is the same for all model files.
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


# ---- the frames that the slow pathway sees ---------------------------------------------------

@pytest.mark.parametrize("frames, alpha, slow_index, expected", [
    (32, 4, "stride", [0, 4, 8, 12, 16, 20, 24, 28]),
    (32, 4, "linspace", [0, 4, 8, 13, 17, 22, 26, 31]),
    (32, 8, "linspace", [0, 10, 20, 31]),
    (4, 4, "linspace", [0]),
])
def test_the_slow_pathway_sees_these_frames(frames, alpha, slow_index, expected):
    clip = torch.arange(frames).view(1, frames, 1, 1, 1).expand(2, frames, 3, 1, 1)
    slow = slowfast.slow_frames(clip, alpha, slow_index)
    assert slow.shape == (2, frames // alpha, 3, 1, 1)
    assert slow[0, :, 0, 0, 0].tolist() == expected


# ---- laterals --------------------------------------------------------------------------------

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


@torch.no_grad()
def test_a_lateral_with_norm_is_a_naive_loop():
    lateral = fill(slowfast.Lateral(2, kernel=5, alpha=4, norm=True).eval())
    slow = torch.ones(1, 3, 3, 1, 1)
    fast = drawn_clip((1, 12, 2, 1, 1), seed=1).transpose(1, 2)

    expected = torch.zeros(4, 3)  # (2c, T / alpha)
    for i in range(3):
        for k in range(5):
            frame = 4 * i + k - 2
            if 0 <= frame < 12:
                expected[:, i] += lateral.conv.weight[:, :, k, 0, 0] @ fast[0, :, frame, 0, 0]

        # batch norm and ReLU
        bn = lateral.bn
        normal = (expected[:, i] - bn.running_mean) / torch.sqrt(bn.running_var + 1e-5)
        expected[:, i] = (bn.weight * normal + bn.bias).clamp(min=0)

    close(lateral(slow, fast)[0, 3:, :, 0, 0], expected, 1e-5)


# ---- the whole network -----------------------------------------------------------------------

@pytest.mark.parametrize("variant, path, frames", [
    ("slowfast_8x8", "slow", [1, 1, 1, 3, 3]),
    ("slowfast_8x8", "fast", [5, 3, 3, 3, 3]),
    ("slow_8x8", "slow", [1, 1, 1, 3, 3]),
    ("fast_32x2", "fast", [5, 3, 3, 3, 3]),
])
def test_a_pathways_convolutions_see_so_many_frames(variant, path, frames):
    """By that of the stem, and by the first one of a block in each of the four stages."""
    pathway = getattr(shapes_only(10, variant, depth=14), path)
    stages = [pathway.layer1, pathway.layer2, pathway.layer3, pathway.layer4]

    seen = [pathway.conv1.kernel_size[0]]
    for stage in stages:
        seen.append(stage[0].conv1.kernel_size[0])
    assert seen == frames


def test_shapes_at_112_pixels():
    """(C, T, H, W): both pathways keep their frames, and a lateral widens the slow map by 1/4."""
    expected = {  # in the order in which they are computed
        "slow.maxpool": (64, 8, 28, 28),
        "fast.maxpool": (8, 32, 28, 28),
        "fuse.0": (80, 8, 28, 28),
        "slow.layer1": (256, 8, 28, 28),
        "fast.layer1": (32, 32, 28, 28),
        "fuse.1": (320, 8, 28, 28),
        "slow.layer4": (2048, 8, 4, 4),
        "fast.layer4": (256, 32, 4, 4),
    }
    shapes = []

    def remember(module, inputs, output):
        shapes.append(tuple(output.shape[1:]))

    model = shapes_only(10, depth=14)
    for name in expected:
        model.get_submodule(name).register_forward_hook(remember)
    model(torch.empty(2, 32, 3, 112, 112, device="meta"))
    assert shapes == list(expected.values())


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


@pytest.mark.parametrize("options, frames, pixels, millions, billions", [
    (dict(REPORT, variant="slowfast_8x8"), 32, 112, 62.63, 24.71),
    (dict(REPORT, variant="fast_32x2"), 32, 112, 60.75, 97.38),
    (dict(ZOO, variant="slowfast_8x8", depth=50, fusion_kernel=7), 32, 256, 34.57, 65.71),
    (dict(ZOO, variant="slowfast_4x16", depth=50), 32, 256, 34.48, 36.10),
    (dict(ZOO, variant="slow_8x8", depth=50), 8, 256, 32.45, 54.52),
])
def test_parameters_and_multiply_adds(options, frames, pixels, millions, billions):
    """Millions of parameters, and billions of multiply-adds for a clip. Those of ZOO are the
    figures it publishes. The report says that the fast pathway alone costs "above 4x"; here it is
    97.38 / 24.71 = 3.9 times."""
    model = shapes_only(**options)
    multiply_adds = []

    def count(module, inputs, output):
        # for each output value, as many as one output channel has weights
        multiply_adds.append(output.numel() * module.weight[0].numel())

    for module in model.modules():
        if isinstance(module, (nn.Conv3d, nn.Linear)):
            module.register_forward_hook(count)
    model(torch.empty(1, frames, 3, pixels, pixels, device="meta"))
    assert round(sum(multiply_adds) / 1e9, 2) == billions
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert round(parameters / 1e6, 2) == millions


def test_first_weights():
    """A block's last norm starts at zero, and so the block as its shortcut."""
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

    for module in model.modules():
        if isinstance(module, nn.BatchNorm3d):
            assert (module.eps, module.momentum) == (1e-5, 0.1)


# ---- the report's rows -----------------------------------------------------------------------

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


# ---- other people's weights ------------------------------------------------------------------

@pytest.mark.parametrize("name", golden_names("slowfast"))
@torch.no_grad()
def test_logits_are_those_of_the_authors(name):
    """A pathway alone has the same names, slow or fast; only the five frames of the fast one's stem
    tell. The order of mmaction2's classifier shows in the logits alone: in the wrong order it loads
    as well."""
    case = golden(name)
    model = shapes_only(**case.options)
    model.load_state_dict(slowfast.convert(case.checkpoint), assign=True)
    close(model(case.clip), case.arrays["logits"])


@pytest.mark.parametrize("key, expected", [
    # X-Temporal
    ("module.slow_res4.22.bn3.running_var", "slow.layer3.22.bn3.running_var"),
    # PySlowFast, and its Caffe2 files
    ("s3.pathway1_res0.branch2.a_bn.weight", "fast.layer2.0.bn1.weight"),
    ("t_res2_2_branch2c_bn_subsample_bn_s", "fuse.1.bn.weight"),
    # pytorchvideo in PySlowFast, and alone
    ("model.blocks.1.multipathway_blocks.1.res_blocks.2.branch2.conv_c.weight",
     "fast.layer1.2.conv3.weight"),
    ("blocks.2.res_blocks.0.branch1_norm.weight", "slow.layer2.0.downsample.1.weight"),
    # mmaction2, with batch norm in the laterals
    ("backbone.slow_path.layer3_lateral.bn.running_mean", "fuse.3.bn.running_mean"),
])
def test_other_peoples_names(key, expected):
    """A key for each code base; the test of their answers has almost all."""
    assert slowfast.our_name(key) == expected


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
    "backbone.conv1.weight",                    # our TSN
    "s4.pathway0_nonlocal3.conv_theta.weight",  # PySlowFast with non-local blocks
    "s2.pathway0_res0.branch2.a.weight.more",   # has to end where a known key ends
    "lr",                                       # skipped in Caffe2's files alone
])
def test_an_unknown_key_is_named(key):
    tensors = {"slow.conv1.weight": torch.zeros(64, 3, 1, 7, 7), key: torch.zeros(1)}
    with pytest.raises(ValueError, match=f"no place for the key {key}$"):
        slowfast.convert({"state_dict": tensors})
