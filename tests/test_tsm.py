"""TSM is its authors' function: their logits from their checkpoints, a shift like a loop over frames and channels, in
the blocks they shift; and convert() reads every layout that is a TSM and no other.

    python -m pytest tests/test_tsm.py
"""
import pytest
import torch
import torchvision
from torch.utils.flop_counter import FlopCounterMode

import tin
import tsm
from conftest import golden, golden_names


@pytest.mark.parametrize("name", golden_names("tsm"))
def test_logits_are_those_of_the_original_code(name):
    case = golden(name)
    model = tsm.TSM(**case.options).eval()
    model.load_state_dict(tsm.convert(case.checkpoint))
    with torch.no_grad():
        for key, clip in ("logits", case.clip), ("logits_perm", case.clip[:, case.arrays["perm"]]):
            expected = torch.from_numpy(case.arrays[key])
            torch.testing.assert_close(model(clip), expected, rtol=0, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("frames, channels", [(1, 8), (2, 16), (5, 20), (8, 64), (3, 7)])
def test_shift_is_a_loop_over_frames_and_channels(frames, channels):
    x = torch.randn(2, frames, channels, 3, 2)
    expected = torch.zeros_like(x)
    for t in range(frames):
        for c in range(channels):
            source = t + 1 if c < channels // 8 else t - 1 if c < 2 * (channels // 8) else t
            if 0 <= source < frames:
                expected[:, t, c] = x[:, source, c]
    assert torch.equal(tsm.temporal_shift(x), expected)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradient_of_the_shift(layout):
    x = torch.randn(8, 9, 2, 3, dtype=torch.float64).to(memory_format=layout).unflatten(0, (2, 4)).requires_grad_()
    assert torch.autograd.gradcheck(tsm.temporal_shift, x)  # against finite differences


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_channels_last_stays_channels_last(dtype):
    x = torch.randn(2 * 8, 20, 3, 2, dtype=dtype)
    last = x.to(memory_format=torch.channels_last).unflatten(0, (2, 8)).requires_grad_()
    y = tsm.temporal_shift(last)
    assert torch.equal(y, tsm.temporal_shift(x.unflatten(0, (2, 8))))
    assert y.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
    (gradient,) = torch.autograd.grad(y, last, torch.randn_like(y))
    assert gradient.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
    assert tsm.temporal_shift(x.unflatten(0, (2, 8))).is_contiguous()


def test_shift_is_interlacing_by_whole_frames():
    x = torch.randn(2, 6, 32, 2, 3)
    moved = tin.temporal_interlace(x[:, :, :8], torch.tensor([[-1.0, 1.0]]).expand(2, 2))
    assert torch.equal(tsm.temporal_shift(x), torch.cat([moved, x[:, :, 8:]], dim=2))


@pytest.mark.parametrize("depth, shift_every, blocks", [
    (18, None, [[0, 1]] * 4),
    (50, None, [[0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4, 5], [0, 1, 2]]),
    (50, 2, [[0, 2], [0, 2], [0, 2, 4], [0, 2]]),
    (101, None, [[0, 2], [0, 2], list(range(0, 23, 2)), [0, 2]]),  # 18 of 33
    (101, 1, [[0, 1, 2], [0, 1, 2, 3], list(range(23)), [0, 1, 2]]),
])
def test_blocks_that_shift(depth, shift_every, blocks, monkeypatch):
    with torch.device("meta"):  # no memory and no arithmetic, only the order of calls
        model = tsm.TSM(3, frames=2, depth=depth, shift_every=shift_every)
        clip = torch.empty(1, 2, 3, 32, 32)
    calls, shift = [], tsm.temporal_shift
    monkeypatch.setattr(tsm, "temporal_shift", lambda x: calls.append("shift") or shift(x))
    stages = [getattr(model.backbone, f"layer{n}") for n in (1, 2, 3, 4)]
    for s, stage in enumerate(stages):
        for i, block in enumerate(stage):
            block.conv1.register_forward_pre_hook(lambda module, x, place=(s, i): calls.append(place))
    model(clip)
    shifted = [place for before, place in zip(calls, calls[1:]) if before == "shift"]
    assert shifted == [(s, i) for s, numbers in enumerate(blocks) for i in numbers]
    assert len(calls) == len(shifted) + sum(map(len, stages))


@pytest.mark.parametrize("depth, frames, giga", [(50, 8, 32.70), (50, 16, 65.40), (101, 8, 62.40), (101, 16, 124.80)])
def test_multiply_adds(depth, frames, giga):
    with torch.device("meta"):
        model, clip = tsm.TSM(313, frames, depth), torch.empty(1, frames, 3, 224, 224)
    with FlopCounterMode(display=False) as counter:
        model(clip)
    assert counter.get_total_flops() / 2e9 == pytest.approx(giga, abs=0.005)


def test_a_clip_of_other_frames_is_refused():
    with pytest.raises(ValueError, match="8 frames, got 4"):
        tsm.TSM(3, frames=8, depth=18)(torch.zeros(1, 4, 3, 32, 32))


def test_convert_reads_every_spelling_of_one_file():
    theirs = golden("tsm_mit_r50_t8").checkpoint["state_dict"]
    expected = tsm.convert({"state_dict": theirs})
    bare = {key.removeprefix("module."): tensor for key, tensor in theirs.items()}
    spellings = {
        "X-Temporal": {"model": bare, "epoch": 1},
        "dropout 0": {"state_dict": {key.replace("new_fc", "base_model.fc"): bare[key] for key in bare}},
        "TSN's": {"state_dict": {key.replace(".net.", "."): theirs[key] for key in theirs}},
        "PyTorch 0.4": {key: bare[key] for key in bare if "num_batches" not in key},
        "ours": {"model": expected, "config": {}},
    }
    for name, file in spellings.items():
        state = tsm.convert(file)
        assert state.keys() == expected.keys(), name
        assert all(torch.equal(state[key], expected[key]) for key in state), name


def test_convert_leaves_out_the_classifier_of_imagenet():
    state = tsm.convert(torchvision.models.resnet18().state_dict())
    missing, unexpected = tsm.TSM(3, depth=18).load_state_dict(state, strict=False)
    assert missing == ["fc.weight", "fc.bias"] and not unexpected


@pytest.mark.parametrize("key", [
    "base_model.layer1.0.net.conv1.weight",  # the shift before the whole block
    "backbone.layer1.0.net.conv1.conv.weight",
    "base_model.layer2.net.0.conv1.net.weight",  # temporal pooling
    "base_model.layer1.0.conv2.net.weight",  # a second shift in every block
    "base_model.layer2.0.block.conv1.net.weight",  # non-local blocks
    "base_model.layer2.0.nl.g.weight",
    "backbone.layer2.0.non_local_block.g.conv.weight",
    "base_model.layer1.0.conv1.net1.biasnet.net.fc.weight",  # TIN
    "base_model.layer1.0.conv1.net2.weight",
])
def test_convert_refuses_other_networks(key):
    file = {"state_dict": {"module.base_model.conv1.weight": torch.zeros(1), "module." + key: torch.zeros(1)}}
    with pytest.raises(ValueError, match=f"1 of 2 keys: module.{key}"):
        tsm.convert(file)
