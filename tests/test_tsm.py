"""TSM moves an eighth of the channels one frame earlier and an eighth one frame later.

    python -m pytest tests/test_tsm.py

The shift: four frames by hand, a loop over frames and channels, gradients. The network: what a
block does with the shifted frames, which blocks shift, and the answers of the authors' code and of
mmaction2. test_models.py has what is the same for all model files.
"""
import pytest
import torch
import torchvision

import evaluate
import tsm
from conftest import close, fill, golden, golden_names


# ---- the shift -------------------------------------------------------------------------------

def test_four_frames_by_hand():
    """Each of eight channels holds 1 2 3 4 in the four frames; an eighth is one channel."""
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
def test_the_shift_is_a_naive_loop(frames, channels):
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


def test_gradients_are_those_of_finite_differences():
    x = torch.randn(2, 4, 9, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(tsm.temporal_shift, x)


# ---- the network -----------------------------------------------------------------------------

@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])  # blocks of two and three layers
@torch.no_grad()
def test_only_the_main_path_of_a_block_gets_the_shifted_frames(backbone):
    block = fill(torchvision.models.get_model(backbone).layer2[0]).eval()
    x = torch.randn(4, block.conv1.in_channels, 8, 8)
    assert torch.equal(tsm.residual(block, x, x), block(x))  # torchvision's own

    # If the main path ends in zeros, only the shortcut is left: block.downsample, which sees x.
    last_norm = getattr(block, "bn3", block.bn2)
    last_norm.weight.zero_()
    last_norm.bias.zero_()
    y = tsm.residual(block, x, torch.randn_like(x))
    assert torch.equal(y, block.downsample(x).relu())


@pytest.mark.parametrize("backbone, shift_every, blocks", [
    ("resnet18", None, [[0, 1], [0, 1], [0, 1], [0, 1]]),
    ("resnet50", None, [[0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4, 5], [0, 1, 2]]),
    ("resnet50", 2, [[0, 2], [0, 2], [0, 2, 4], [0, 2]]),
    ("resnet101", None, [[0, 2], [0, 2], list(range(0, 23, 2)), [0, 2]]),
    ("resnet101", 1, [[0, 1, 2], [0, 1, 2, 3], list(range(23)), [0, 1, 2]]),
])
def test_these_blocks_shift(backbone, shift_every, blocks, monkeypatch):
    """blocks: for each of the four stages, the numbers of the blocks that shift."""
    with torch.device("meta"):  # shapes alone are enough to see what is called
        model = tsm.TSM(3, frames=2, backbone=backbone, shift_every=shift_every)
        clip = torch.empty(1, 2, 3, 32, 32)
    shifted = []
    residual = tsm.residual

    def spy(block, x, y):
        shifted.append(block)
        return residual(block, x, y)

    monkeypatch.setattr(tsm, "residual", spy)
    model(clip)
    expected = []
    for stage, numbers in enumerate(blocks, 1):
        layer = getattr(model.backbone, f"layer{stage}")
        expected += [layer[i] for i in numbers]
    assert shifted == expected


@pytest.mark.parametrize("name", golden_names("tsm"))
@torch.no_grad()
def test_logits_are_those_of_the_authors(name):
    """For a clip, and for the same clip with its frames in another order."""
    case = golden(name)
    model = tsm.TSM(**case.options).eval()
    model.load_state_dict(tsm.convert(case.tensors))
    close(model(case.clip), case.arrays["logits"])
    close(model(case.clip[:, case.arrays["perm"]]), case.arrays["logits_perm"])


# ---- files of other people -------------------------------------------------------------------

MIT = "base_model.layer{}.{}.conv1.{}weight"
MMACTION2 = "backbone.layer{}.{}.conv1.conv.{}weight"


def file_of(name, *shifts):
    """The keys of a ResNet-101 that shifts in these blocks of every stage."""
    tensors = {"new_fc.weight": None}
    for stage, blocks in enumerate([3, 4, 23, 3], 1):
        for i in range(blocks):
            net = "net." if i in shifts else ""
            tensors[name.format(stage, i, net)] = None
    return tensors


def recipe_of(shift_every):
    return {"backbone": "resnet101", "shift_every": shift_every}


@pytest.mark.parametrize("name", [MIT, MMACTION2])
def test_a_file_that_shifts_in_other_blocks_names_the_flag(name):
    every_second = file_of(name, *range(0, 23, 2))
    for shift_every in (2, None):
        assert tsm.check(recipe_of(shift_every), set(), every_second) == []
    [warning] = tsm.check(recipe_of(1), {"init"}, every_second)
    assert warning.endswith("pass --shift-every 2")
    [warning] = tsm.check(recipe_of(2), set(), file_of(name, *range(23)))
    assert warning.endswith("pass --shift-every 1")
    [warning] = tsm.check(recipe_of(1), set(), file_of(name, 1, 2))
    assert "other blocks than any --shift-every" in warning


def test_a_tsn_is_a_start_for_a_tsm_and_no_tsm():
    assert tsm.check(recipe_of(1), {"init"}, file_of(MIT)) == []
    with pytest.raises(ValueError, match="use --model tsn, or train a TSM .* --init"):
        tsm.check(recipe_of(1), set(), file_of(MIT))
    assert tsm.check(recipe_of(1), set(), {"backbone.conv1.weight": None}) == []  # our names


@pytest.mark.parametrize("name", golden_names("tsm"))
def test_the_authors_files_shift_where_ours_does(name):
    _, recipe = evaluate.open_model("tsm")
    assert tsm.check(recipe, set(), golden(name).tensors) == []
