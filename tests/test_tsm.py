"""TSM moves an eighth of the channels one frame earlier and an eighth one frame later.

    python -m pytest tests/test_tsm.py

The tests follow tsm.py from top to bottom. The shift: four frames by hand, a loop over frames and
channels, gradients, memory layouts. The network: what a block does with the shifted frames, which
blocks shift, and the logits of other people's code (that of TSM's authors and a later rewrite of
it, mmaction2) from tests/golden. Then their weights' names. What is the same for all model files is
in test_models.py.

From conftest.py: close compares two tensors, fill draws all weights of a network at random, golden
reads what other people's code answered.
"""
import pytest
import torch
import torchvision

import tsm
from conftest import close, fill, golden, golden_names


# ---- the shift -------------------------------------------------------------------------------

def test_four_frames_by_hand():
    """Each of eight channels holds 1 2 3 4 in the four frames. With eight channels, an eighth is
    one channel. Where no frame arrives, at the clip's end or its beginning, the value becomes 0."""
    frames = torch.tensor([1.0, 2.0, 3.0, 4.0])
    x = frames.view(1, 4, 1, 1, 1).expand(1, 4, 8, 1, 1)
    y = tsm.temporal_shift(x)[0, :, :, 0, 0]  # (T, C)

    assert y[:, 0].tolist() == [2, 3, 4, 0]  # each frame gets the next one's value
    assert y[:, 1].tolist() == [0, 1, 2, 3]  # each frame gets the previous one's value
    for channel in range(2, 8):  # the other six eighths stay
        assert y[:, channel].tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("frames, channels", [
    (5, 20),  # an eighth of 20 is 2
    (1, 8),  # a single frame: its two shifted channels become 0
    (3, 7),  # an eighth of 7 is rounded down to 0: nothing is shifted
])
def test_the_shift_equals_a_loop_over_frames_and_channels(frames, channels):
    x = torch.randn(2, frames, channels, 3, 2)
    eighth = channels // 8

    expected = torch.zeros_like(x)
    for t in range(frames):
        for c in range(channels):
            source = t
            if c < eighth:
                source = t + 1
            elif c < 2 * eighth:
                source = t - 1
            if 0 <= source < frames:
                expected[:, t, c] = x[:, source, c]
    assert torch.equal(tsm.temporal_shift(x), expected)


def test_the_gradient_is_shifted_back():
    """The gradients of y are 10 20 30 40 in the four frames. Each value of x gets the gradient of
    the frame that it went to. What was dropped gets 0, and the gradient of the zero that was filled
    in is lost: 40 where the channel moved earlier, 10 where it moved later. The values of x do not
    matter."""
    x = torch.zeros(1, 4, 8, 1, 1, requires_grad=True)
    gradient_of_y = torch.tensor([10.0, 20.0, 30.0, 40.0]).view(1, 4, 1, 1, 1).expand_as(x)
    tsm.temporal_shift(x).backward(gradient_of_y)
    gradient = x.grad[0, :, :, 0, 0]  # (T, C)
    assert gradient[:, 0].tolist() == [0, 10, 20, 30]  # this channel moved one frame earlier
    assert gradient[:, 1].tolist() == [20, 30, 40, 0]  # this channel moved one frame later
    assert gradient[:, 2].tolist() == [10, 20, 30, 40]  # this channel stayed


def test_gradients_are_those_of_finite_differences():
    x = torch.randn(2, 4, 9, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(tsm.temporal_shift, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_memory_layout_is_kept_by_values_and_gradients(dtype):
    """Images are stored with their pixels (contiguous) or their channels (channels_last) innermost.
    If the shift changed that, the next convolution would first have to copy what it gets."""
    images = torch.randn(2 * 8, 20, 3, 2, dtype=dtype)
    contiguous = images.unflatten(0, (2, 8))
    channels_last = images.to(memory_format=torch.channels_last).unflatten(0, (2, 8))
    channels_last.requires_grad_()

    y = tsm.temporal_shift(channels_last)
    assert y.dtype == dtype
    assert torch.equal(y, tsm.temporal_shift(contiguous))
    assert y.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
    assert tsm.temporal_shift(contiguous).is_contiguous()

    (gradient,) = torch.autograd.grad(y, channels_last, torch.randn_like(y))
    assert gradient.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)


# ---- the network -----------------------------------------------------------------------------

@pytest.mark.parametrize("depth", [18, 50])  # two convolutions in a block, and three
@torch.no_grad()
def test_only_the_main_path_of_a_block_gets_the_shifted_frames(depth):
    block = fill(torchvision.models.get_model(f"resnet{depth}").layer2[0]).eval()
    x = torch.randn(4, block.conv1.in_channels, 8, 8)
    moved = torch.randn_like(x)

    # if both paths get x, it is torchvision's own block
    close(tsm.residual(block, x, x), block(x), 1e-6)
    assert not torch.allclose(tsm.residual(block, x, moved), block(x), rtol=0.1)

    # If the main path ends in zeros, only the shortcut is left: block.downsample, which sees x.
    last_norm = getattr(block, "bn3", block.bn2)
    last_norm.weight.zero_()
    last_norm.bias.zero_()
    close(tsm.residual(block, x, moved), block.downsample(x).relu(), 1e-6)


@pytest.mark.parametrize("depth, shift_every, blocks", [
    (18, None, [[0, 1], [0, 1], [0, 1], [0, 1]]),
    (50, None, [[0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4, 5], [0, 1, 2]]),
    (50, 2, [[0, 2], [0, 2], [0, 2, 4], [0, 2]]),
    (101, None, [[0, 2], [0, 2], list(range(0, 23, 2)), [0, 2]]),
    (101, 1, [[0, 1, 2], [0, 1, 2, 3], list(range(23)), [0, 1, 2]]),
])
def test_these_blocks_shift(depth, shift_every, blocks, monkeypatch):
    """blocks: for each of the four stages, the numbers of the blocks that shift."""
    with torch.device("meta"):  # shapes alone are enough to see what is called
        model = tsm.TSM(3, frames=2, depth=depth, shift_every=shift_every)
        clip = torch.empty(1, 2, 3, 32, 32)
    shifted = []
    residual = tsm.residual

    def spy(block, x, moved):
        shifted.append(moved is not x)
        return residual(block, x, moved)

    monkeypatch.setattr(tsm, "residual", spy)
    model(clip)
    expected = []
    for stage, numbers in zip([1, 2, 3, 4], blocks):
        for i in range(len(getattr(model.backbone, f"layer{stage}"))):
            expected.append(i in numbers)
    assert shifted == expected


def test_shifting_in_no_block_is_refused():
    with pytest.raises(ValueError, match="shift_every is 0, but must be at least 1"):
        tsm.TSM(3, depth=18, shift_every=0)


@pytest.mark.parametrize("name", golden_names("tsm"))
@torch.no_grad()
def test_logits_are_those_of_the_authors(name):
    """For a clip, and for the same clip with its frames in another order: unlike TSN's, the logits
    are then others."""
    case = golden(name)
    model = tsm.TSM(**case.options).eval()
    model.load_state_dict(tsm.convert(case.checkpoint))
    close(model(case.clip), case.arrays["logits"])
    close(model(case.clip[:, case.arrays["perm"]]), case.arrays["logits_perm"])


# ---- other people's weights ------------------------------------------------------------------

@pytest.mark.parametrize("key", [
    "module.base_model.layer3.5.conv1.net.weight",  # X-Temporal, temporal-shift-module
    "backbone.layer3.5.conv1.conv.net.weight",  # mmaction2
    "module.base_model.layer3.5.conv1.weight",  # a block that does not shift, or a TSN
    "backbone.layer3.5.conv1.conv.weight",
])
def test_a_first_convolution_has_many_names(key):
    """Where a block shifts, other people's code wraps this convolution. That adds ".net" to its
    name, and no weights."""
    assert tsm.our_name(key) == "backbone.layer3.5.conv1.weight"


@pytest.mark.parametrize("key", [
    "base_model.layer1.0.net.conv1.weight",  # the shift stands before the whole block
    "backbone.layer1.0.net.conv1.conv.weight",  # the same in mmaction2
    "base_model.layer1.0.conv2.net.weight",  # a second shift in the block
    "base_model.layer2.net.0.conv1.net.weight",  # temporal pooling
    "base_model.layer2.0.nl.g.weight",  # non-local blocks
    "base_model.layer1.0.conv1.net2.weight",  # TIN
])
def test_another_networks_file_is_refused(key):
    file = {"module.base_model.bn1.weight": torch.zeros(64), f"module.{key}": torch.zeros(1)}
    with pytest.raises(ValueError, match=f"tsm.py has no place for the key module.{key}$"):
        tsm.convert({"state_dict": file})
