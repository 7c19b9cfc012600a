"""SlowFast gives the logits of its authors' code, and those of three other code bases.

    python -m pytest tests/test_slowfast.py

The frames that the slow pathway sees, laterals, the size and first weights of the whole network,
the answers of others, Caffe2's files. test_models.py has what is the same for all model files.
"""
import pytest
import torch
import torch.nn as nn

import evaluate
import slowfast
from conftest import close, drawn_clip, fill, golden, golden_names, remember


def shapes_only(*args, **options):
    """A SlowFast without values, on PyTorch's device "meta", since it takes long to fill."""
    with torch.device("meta"):
        return slowfast.SlowFast(*args, **options).eval()


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


@torch.no_grad()
def test_a_lateral_by_hand():
    """Of ones, it adds up the five frames around each slow one."""
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
def test_alpha_overrides_the_variants_own():
    model = fill(shapes_only(10, "slowfast_8x8", depth=14, alpha=8))
    other = fill(shapes_only(10, "slowfast_4x16", depth=14))
    clip = drawn_clip((1, 16, 3, 32, 32), seed=5)
    assert torch.equal(model(clip), other(clip))
    with pytest.raises(ValueError, match="multiple of 8, got 12"):
        model(clip[:, :12])


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
    """Those of ZOO are the figures it publishes. The report says that the fast pathway alone costs
    "above 4x"; here it is 97.38 / 24.71 = 3.9 times."""
    model = shapes_only(**options)
    layers = [part for part in model.modules() if isinstance(part, (nn.Conv3d, nn.Linear))]
    calls = [remember(layer) for layer in layers]
    model(torch.empty(1, frames, 3, pixels, pixels, device="meta"))

    multiply_adds = 0
    for layer, [(_, output)] in zip(layers, calls):
        multiply_adds += output.numel() * layer.weight[0].numel()
    assert round(multiply_adds / 1e9, 2) == billions
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


@pytest.mark.parametrize("name", golden_names("slowfast"))
@torch.no_grad()
def test_logits_are_those_of_the_authors(name):
    """A pathway alone has the same names, slow or fast; only the five frames of the fast one's stem
    tell. The order of mmaction2's classifier shows in the logits alone: in the wrong order it loads
    as well."""
    case = golden(name)
    model = shapes_only(**case.options)
    model.load_state_dict(slowfast.convert(case.tensors), assign=True)
    close(model(case.clip), case.arrays["logits"])


def test_caffe2_files_lack_axes_and_hold_the_optimiser():
    state = slowfast.convert({
        "conv1_w": torch.ones(64, 3, 1, 7, 7),
        "res_conv1_bn_riv": torch.ones(64),
        "res2_0_branch2a_w": torch.ones(64, 64),
        "pred_w": torch.ones(10, 2048),
        "pred_w_momentum": torch.ones(10, 2048),
        "model_iter": torch.tensor(7),
        "lr": torch.tensor(0.1),
    })
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {
        "slow.conv1.weight": (64, 3, 1, 7, 7),
        "slow.bn1.running_var": (64,),
        "slow.layer1.0.conv1.weight": (64, 64, 1, 1, 1),
        "fc.weight": (10, 2048),
    }


@pytest.mark.parametrize("row, flags, advice", [
    ("r101_8x8", dict(variant="slow_8x8"), "--frames 8 --stride 8"),
    ("r101_8x8", dict(variant="slowfast_11x8"), "--frames 44 --stride 2"),
    ("r101_8x8", dict(variant="slowfast_8x8", alpha=16), "--frames 128 --stride 1"),
    ("r101_8x8", dict(variant="slow_8x8", frames=8), "--frames 8 --stride 8"),
    ("r101_8x8", dict(variant="slow_8x8", frames=32, stride=2), None),  # chosen
    ("r101_8x8", dict(variant="slowfast_4x16"), None),  # 4 x alpha 8 frames of stride 16 / 8
    ("r101_slow_8x8", dict(variant="slow_8x8"), None),
    ("toy", dict(variant="slow_8x8"), None),
    ("r101_8x8", dict(frames=16), None),
    ("r101_8x8", dict(variant="no_such"), None),  # refused later
])
def test_the_clip_that_a_variants_name_means(row, flags, advice):
    _, recipe = evaluate.open_model("slowfast", row)
    notes = slowfast.check({**recipe, **flags}, set(flags))
    if advice is None:
        assert notes == []
    else:
        [note] = notes
        assert advice in note
