"""TIN moves a quarter of the channels along time, by distances that it computes from the clip.

    python -m pytest tests/test_tin.py

The shift: four frames by hand, TSM, a naive loop, the slope of an offset, the original operator.
The module: its groups by hand, gradients, first weights. The network: the offsets, weights and
logits of the original code. test_models.py has what is the same for all model files.
"""
import math

import pytest
import torch

import tin
import tsm
from conftest import close, drawn_clip, fill, golden, golden_names, remember


# ---- the shift -------------------------------------------------------------------------------

@pytest.mark.parametrize("offset, expected", [
    (1, [0, 1, 2, 3]),
    (-1, [2, 3, 4, 0]),
    (0.5, [0.5, 1.5, 2.5, 3.5]),
    (-0.5, [1.5, 2.5, 3.5, 2]),
    (1.25, [0, 0.75, 1.75, 2.75]),
    (4, [0, 0, 0, 0]),
])
def test_four_frames_by_hand(offset, expected):
    """a b c d are 1 2 3 4."""
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 4, 1, 1, 1)
    offsets = torch.tensor([[float(offset)]])
    assert tin.temporal_interlace(x, offsets).flatten().tolist() == expected

    # A weight belongs to the frame that content arrives at.
    weights = torch.tensor([[[1.0, 10.0, 100.0, 1000.0]]])
    y = tin.temporal_interlace(x, offsets, weights).flatten()
    for t in range(4):
        assert y[t].item() == 10**t * expected[t]


def test_offsets_of_minus_1_and_weights_of_1_are_tsm():
    x = torch.randn(2, 6, 32, 2, 3)
    offsets = torch.tensor([[-1.0, -1.0, 1.0, 1.0]]).expand(2, 4)  # o0, o1, -o0, -o1
    moved = tin.temporal_interlace(x[:, :, :8], offsets, torch.ones(2, 4, 6))
    assert torch.equal(torch.cat([moved, x[:, :, 8:]], dim=2), tsm.temporal_shift(x))


def test_the_shift_is_a_naive_loop():
    """Of five frames, by offsets of four groups of three channels: within the clip, and around its
    end and beyond. Where n is an offset rounded down, frame t shows the frames t - n - 1 and t - n.
    """
    x = drawn_clip((2, 5, 12, 2, 3), seed=1).double()
    offsets = torch.tensor([[0.37, -1.62, 1.9, -0.1], [2.5, -4.5, 4.75, -7.4]]).double()
    weights = 2 * torch.rand(2, 4, 5, dtype=torch.float64)

    expected = torch.zeros_like(x)
    for b in range(2):
        for c in range(12):
            n = math.floor(offsets[b, c // 3])
            fraction = offsets[b, c // 3] - n
            for t in range(5):
                if 0 <= t - n < 5:
                    expected[b, t, c] += (1 - fraction) * x[b, t - n, c]
                if 0 <= t - n - 1 < 5:
                    expected[b, t, c] += fraction * x[b, t - n - 1, c]
                expected[b, t, c] *= weights[b, c // 3, t]
    close(tin.temporal_interlace(x, offsets, weights), expected, 1e-12)


@pytest.mark.parametrize("offset, slope", [
    (0.5, -4),  # the sum over frames is 10 at offset 0 and 6 at offset 1
    (-0.5, 1),  # 9 at offset -1
    (0.0, 0),  # -4 to the right and +1 to the left; at such a kink the gradient is 0
])
def test_gradient_of_an_offset_by_hand(offset, slope):
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 4, 1, 1, 1)
    offsets = torch.tensor([[offset]], requires_grad=True)
    tin.temporal_interlace(x, offsets).sum().backward()
    assert offsets.grad.item() == slope


def test_shift_and_gradients_are_those_of_the_authors_operator():
    arrays = golden("tin_xtemporal_r50_t8").arrays
    x = torch.from_numpy(arrays["op_input"]).requires_grad_()
    offsets = torch.from_numpy(arrays["op_offsets"]).requires_grad_()
    y = tin.temporal_interlace(x, offsets)
    y.backward(torch.from_numpy(arrays["op_grad_output"]))
    close(y.detach(), arrays["op_output"], 1e-5)
    close(x.grad, arrays["op_grad_input"], 1e-5)
    close(offsets.grad, arrays["op_grad_offsets"], 1e-5)


def test_distances_are_float32_for_a_bfloat16_clip():
    """An offset of 1 + 1/512 is 1 in bfloat16."""
    x = torch.zeros(1, 16, 1, 1, 1, dtype=torch.bfloat16)
    x[0, 12] = 1
    y = tin.temporal_interlace(x, torch.tensor([[1 + 1 / 512]])).flatten()
    assert y.dtype == torch.bfloat16
    assert y[14].item() == 1 / 512


# ---- the module ------------------------------------------------------------------------------

@torch.no_grad()
def test_four_groups_by_hand():
    """The first 4 of 16 channels are the four groups. a b c d are 1 2 3 4 in every channel."""
    module = tin.TemporalInterlace(16, 4)

    # Without weights the last layers of both nets answer with their biases, whatever the clip:
    # offsets 4 * (sigmoid(log 3) - 1/2) = 4 * (3/4 - 1/2) = 1 and 4 * (5/8 - 1/2) = 1/2,
    # weights 2 * sigmoid(-log 3) = 2 * 1/4 = 1/2 and 2 * 3/4 = 3/2.
    module.offset_fc2.weight.zero_()
    module.offset_fc2.bias.copy_(torch.tensor([math.log(3), math.log(5 / 3)]))
    module.weight_conv.weight.zero_()
    module.weight_conv.bias.copy_(torch.tensor([-math.log(3), math.log(3)]))

    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(4, 1, 1, 1).expand(4, 16, 1, 1)
    y = module(x)[:, :, 0, 0].T  # (C, T)
    close(y[0], 1 / 2 * torch.tensor([0, 1, 2, 3]), 1e-6)  # offset +1
    close(y[1], 3 / 2 * torch.tensor([0.5, 1.5, 2.5, 3.5]), 1e-6)  # offset +1/2
    close(y[2], 1 / 2 * torch.tensor([2, 3, 4, 0]), 1e-6)  # offset -1
    close(y[3], 3 / 2 * torch.tensor([1.5, 2.5, 3.5, 2]), 1e-6)  # offset -1/2
    for channel in range(4, 16):
        assert y[channel].tolist() == [1, 2, 3, 4]


def test_gradients_are_those_of_finite_differences():
    """x is moved, and both nets see it: its gradient has all three parts."""
    module = fill(tin.TemporalInterlace(16, 5)).double()
    x = drawn_clip((10, 1, 16, 1, 2), seed=7).squeeze(1).double().requires_grad_()
    assert torch.autograd.gradcheck(module, x)


def test_first_weights():
    """Offsets start near half a frame, weights near 1; the rest is PyTorch's."""
    module = tin.TemporalInterlace(channels=16, frames=8)
    assert 4 * (module.offset_fc2.bias.sigmoid() - 0.5).tolist()[0] == pytest.approx(0.5, abs=1e-4)
    assert 2 * module.weight_conv.bias.sigmoid().tolist()[0] == 1


def test_both_nets_compute_in_float32_under_autocast():
    module = tin.TemporalInterlace(16, 8)
    calls = [remember(layer) for layer in module.children()]
    with torch.autocast("cpu", torch.bfloat16):
        y = module(torch.randn(8, 16, 2, 2, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    for [(_, output)] in calls:
        assert output.dtype == torch.float32


# ---- the network -----------------------------------------------------------------------------

@pytest.mark.parametrize("name", golden_names("tin"))
@torch.no_grad()
def test_logits_offsets_and_weights_are_those_of_the_authors(name, monkeypatch):
    case = golden(name)
    model = tin.TIN(**case.options).eval()
    model.load_state_dict(tin.convert(case.tensors))

    # what each block's shift is given: offsets (B, 4) and weights (B, 4, T)
    given = []
    shift = tin.temporal_interlace

    def spy(x, offsets, weights):
        given.append((offsets[:, :2], weights[:, :2].transpose(1, 2)))
        return shift(x, offsets, weights)

    monkeypatch.setattr(tin, "temporal_interlace", spy)
    close(model(case.clip), case.arrays["logits"])
    assert len(given) == 16
    for i, (offsets, weights) in enumerate(given):
        close(offsets, case.arrays["block_offsets"][i])
        close(weights, case.arrays["block_weights"][i])


def test_a_tsm_is_a_start_for_a_tin():
    """Its tensors are all but the two nets of each block."""
    file = golden("tsm_mmaction2_r50_t8").tensors
    assert tin.convert(file) == tsm.convert(file)
