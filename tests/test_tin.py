"""TIN: the shift against a naive loop, finite differences and the authors' figures; the module, the network around it
and every checkpoint layout, with the sizes that the authors' code has.

    python -m pytest tests/test_tin.py
"""
import math
import re

import pytest
import torch
import torchvision
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import tin
from conftest import drawn_clip, drawn_tensors, golden, golden_names

CASES = golden_names("tin")


def close(ours, theirs, tolerance=1e-4):
    """Within `tolerance` of the largest value."""
    theirs = torch.as_tensor(theirs)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * float(theirs.abs().max()))


def drawn(model, seed=0):
    """The model with every tensor drawn, the running statistics too: nothing is 0, 1 or equal by accident."""
    model.load_state_dict(drawn_tensors({key: tuple(t.shape) for key, t in model.state_dict().items()}, seed))
    return model.eval()


# The shift.


def looped(x, offsets, weights):
    """Frame by frame: y[t] = (1 - a) x[t - n] + a x[t - n - 1] with n = floor(offset), a = offset - n; 0 outside."""
    y = torch.zeros_like(x)
    B, T, C = x.shape[:3]
    for b in range(B):
        for c in range(C):
            group = c // (C // offsets.shape[1])
            offset = float(offsets[b, group])
            n = math.floor(offset)
            for t in range(T):
                for source, tap in ((t - n, 1 - (offset - n)), (t - n - 1, offset - n)):
                    if 0 <= source < T:
                        y[b, t, c] += tap * x[b, source, c]
                y[b, t, c] *= weights[b, group, t]
    return y


@pytest.mark.parametrize("T", [5, 8, 16])
@pytest.mark.parametrize("fractions", ["fractional", "whole", "beyond the clip"])
def test_shift_is_the_naive_loop(T, fractions):
    offsets = {
        "fractional": [[0.37, -1.62, 1.999, -0.001], [2.5, -3.25, 4.75, -0.5]],
        "whole": [[0.0, 1.0, -1.0, 2.0], [-2.0, 3.0, 4.0, -4.0]],
        "beyond the clip": [[T - 0.5, 0.5 - T, T + 0.25, -T - 0.25], [T - 1.0, 1.0 - T, float(T), -T - 3.0]],
    }[fractions]
    offsets = torch.tensor(offsets, dtype=torch.float64)
    x = drawn_clip((2, T, 12, 2, 3), seed=T).double()
    weights = torch.rand(2, 4, T, dtype=torch.float64, generator=torch.Generator().manual_seed(T)) * 2
    close(tin.temporal_interlace(x, offsets), looped(x, offsets, torch.ones_like(weights)), 1e-12)
    close(tin.temporal_interlace(x, offsets, weights), looped(x, offsets, weights), 1e-12)


@pytest.mark.parametrize("offset, result", [
    (0.5, [0.5, 1.5, 2.5, 3.5]), (-0.5, [1.5, 2.5, 3.5, 2.0]), (1.25, [0, 0.75, 1.75, 2.75]), (-2.0, [3, 4, 0, 0]),
])
def test_shift_of_four_frames(offset, result):
    x = torch.tensor([1.0, 2, 3, 4]).reshape(1, 4, 1, 1, 1)
    assert tin.temporal_interlace(x, torch.tensor([[offset]])).flatten().tolist() == result


@pytest.mark.parametrize("offset", [1.5, -1.5, 2.0, -0.25])
def test_positive_moves_later(offset):
    frame = torch.arange(8.0)
    x = (frame == 4).float().reshape(1, 8, 1, 1, 1)  # content in frame 4 alone
    y = tin.temporal_interlace(x, torch.tensor([[offset]])).flatten()
    assert y.sum() == 1 and (frame * y).sum() == 4 + offset


def test_groups_are_equal():
    with pytest.raises(RuntimeError, match="10"):
        tin.temporal_interlace(torch.zeros(1, 8, 10, 1, 1), torch.zeros(1, 4))


def test_what_nothing_reaches_is_zero():
    x = torch.ones(1, 8, 4, 2, 2)
    y = tin.temporal_interlace(x, torch.tensor([[2.0, -2.0, 8.0, -8.0]]))[0, :, :, 0, 0].T
    assert y.tolist() == [[0] * 2 + [1] * 6, [1] * 6 + [0] * 2, [0] * 8, [0] * 8]


def test_one_frame_each_way_is_the_plain_shift():
    x = drawn_clip((2, 8, 6, 3, 3), seed=1)
    empty = torch.zeros_like(x[:, :1, :3])
    later, earlier = torch.cat([empty, x[:, :-1, :3]], dim=1), torch.cat([x[:, 1:, 3:], empty], dim=1)
    y = tin.temporal_interlace(x, torch.tensor([[1.0, -1.0]] * 2))
    assert torch.equal(y, torch.cat([later, earlier], dim=2))


def test_weights_scale_what_arrives():
    x = drawn_clip((2, 8, 4, 3, 3), seed=2)
    offsets = torch.tensor([[0.75, -1.5]] * 2)
    weights = 2 * torch.rand(2, 2, 8, generator=torch.Generator().manual_seed(2))
    of_channel = weights.transpose(1, 2).repeat_interleave(2, dim=2)[..., None, None]  # (B, T, C, 1, 1)
    y = tin.temporal_interlace(x, offsets, weights)
    close(y, tin.temporal_interlace(x, offsets) * of_channel, 1e-6)
    assert (y - tin.temporal_interlace(x * of_channel, offsets)).abs().max() > 0.1  # before the shift: another function


def test_distances_are_float32_for_a_bfloat16_clip():
    x = torch.zeros(1, 16, 1, 1, 1, dtype=torch.bfloat16)
    x[0, 12] = 1
    y = tin.temporal_interlace(x, torch.tensor([[1 + 2**-9]])).flatten()  # in bfloat16, 1 is followed by 1 + 2**-7
    assert y.dtype == torch.bfloat16 and float(y[14]) == 2**-9


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradients_are_those_of_finite_differences(layout):
    x = drawn_clip((2, 5, 8, 3, 2), seed=3).flatten(0, 1).to(memory_format=layout).unflatten(0, (2, 5)).double()
    offsets = torch.tensor([[0.37, -1.62, 1.9, -0.1], [2.5, -3.25, 4.75, -7.4]]).double()
    weights = torch.rand(2, 4, 5, generator=torch.Generator().manual_seed(3)).double()
    inputs = [tensor.requires_grad_() for tensor in (x, offsets, weights)]
    assert torch.autograd.gradcheck(tin.temporal_interlace, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("part", ["shift", "module"])
def test_channels_last_stays_channels_last(part, dtype):
    """What the shift and the module get, give, and send back as a gradient."""
    offsets = torch.tensor([[0.37, -1.62, 1.9, -0.1], [2.5, -3.25, 4.75, -7.4]])
    move = {"shift": lambda x: tin.temporal_interlace(x, offsets), "module": drawn(tin.TemporalInterlace(32, 8))}[part]
    x = drawn_clip((2, 8, 32, 3, 2), seed=15).to(dtype)
    last = x.flatten(0, 1).to(memory_format=torch.channels_last).unflatten(0, (2, 8)).requires_grad_()
    y, plain = move(last), move(x).detach()
    close(y.detach(), plain, 1e-5 if dtype == torch.float32 else 0.01)
    assert y.flatten(0, 1).is_contiguous(memory_format=torch.channels_last) and plain.is_contiguous()
    (gradient,) = torch.autograd.grad(y, last, torch.randn_like(y))
    assert gradient.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("suffix", ["", "_whole"])
def test_shift_and_its_gradients_are_the_authors(suffix):
    arrays = {key: torch.from_numpy(value) for key, value in golden("tin_xtemporal_r50_t8").arrays.items()}
    x, offsets = arrays["op_input"].requires_grad_(), arrays["op_offsets" + suffix].requires_grad_()
    y = tin.temporal_interlace(x, offsets)
    y.backward(arrays["op_grad_output"])
    close(y.detach(), arrays["op_output" + suffix], 1e-5)
    close(x.grad, arrays["op_grad_input" + suffix], 1e-5)
    if not suffix:  # at whole offsets, a kink, theirs is the slope on the right
        close(offsets.grad, arrays["op_grad_offsets"], 1e-5)
    # mmcv's operator, which mmaction2 trained with, moves the gradient the way of the data instead of back.
    wrong = arrays["op_grad_input_mmcv" + suffix]
    close(tin.temporal_interlace(arrays["op_grad_output"], offsets.detach()), wrong, 1e-5)
    assert (x.grad - wrong).abs().max() > 1


# The whole network against the authors' code.


@pytest.fixture(scope="module", params=CASES)
def case(request):
    """A golden case with .model, our network holding the case's checkpoint."""
    case = golden(request.param)
    case.model = tin.TIN(**case.options).eval()
    case.model.load_state_dict(tin.convert(case.checkpoint))
    return case


def test_logits_offsets_and_weights_are_the_authors(case, monkeypatch):
    used = []  # what the shift of each block is given

    def spy(x, offsets, weights, shift=tin.temporal_interlace):
        used.append((offsets, weights))
        return shift(x, offsets, weights)

    monkeypatch.setattr(tin, "temporal_interlace", spy)
    with torch.no_grad():
        close(case.model(case.clip), case.arrays["logits"])
    offsets, weights = (torch.stack(values) for values in zip(*used))  # (blocks, B, G), (blocks, B, G, T)
    o = torch.from_numpy(case.arrays["block_offsets"])
    w = torch.from_numpy(case.arrays["block_weights"]).transpose(2, 3)  # theirs is (blocks, B, T, 2)
    close(offsets, torch.cat([o, -o], dim=2))
    close(weights, torch.cat([w, w], dim=2))


def test_logits_of_permuted_frames_are_the_authors(case):
    with torch.no_grad():
        close(case.model(case.clip[:, case.arrays["perm"]]), case.arrays["logits_perm"])


def test_first_module_is_the_authors(case):
    x = torch.from_numpy(case.arrays["first_input"]).unflatten(0, (-1, case.model.frames))
    with torch.no_grad():
        close(case.model.interlace["layer1"][0](x).flatten(0, 1), case.arrays["first_output"], 1e-5)


# The module.


def fixed(channels, frames, offsets, weights):
    """A module that answers every clip with these two offsets (-2 to 2) and two weights (0 to 2)."""
    module = tin.TemporalInterlace(channels, frames)
    with torch.no_grad():
        module.offset_fc2.weight.zero_()
        module.offset_fc2.bias.copy_(torch.logit(torch.tensor(offsets) / 4 + 0.5))
        module.weight_conv.weight.zero_()
        module.weight_conv.bias.copy_(torch.logit(torch.tensor(weights) / 2))
    return module


@torch.no_grad()
def test_groups_and_their_order():
    x = drawn_clip((2, 8, 32, 3, 3), seed=4)
    y = fixed(32, 8, [0.5, 1.5], [0.25, 1.75])(x)
    shifts = torch.tensor([[0.5, 1.5, -0.5, -1.5]] * 2)
    weights = torch.tensor([0.25, 1.75, 0.25, 1.75]).reshape(1, 4, 1).expand(2, 4, 8)
    close(y[:, :, :8], looped(x[:, :, :8], shifts, weights), 1e-5)


@torch.no_grad()
def test_module_is_the_formula_step_by_step():
    """Descriptor, offset net, weight net, groups, shift, weight at the destination: each written out by hand."""
    B, T, f = 2, 8, 8
    module = drawn(tin.TemporalInterlace(32, T), seed=5)
    x = drawn_clip((B, T, 32, 3, 4), seed=5)
    p = {key: value.tolist() for key, value in module.named_parameters()}

    def sigmoid(value):
        return 1 / (1 + math.exp(-value))

    def over_time(name, means, out, t):  # kernel 3, padding 1
        taps = ((c, k) for c in range(f) for k in range(3) if 0 <= t + k - 1 < T)
        return p[name + ".bias"][out] + sum(p[name + ".weight"][out][c][k] * means[c][t + k - 1] for c, k in taps)

    def linear(name, values):
        return [bias + sum(a * v for a, v in zip(row, values))
                for row, bias in zip(p[name + ".weight"], p[name + ".bias"])]

    offsets, weights = [], []
    for b in range(B):
        means = [[float(x[b, t, c].mean()) for t in range(T)] for c in range(f)]
        hidden = linear("offset_fc1", [over_time("offset_conv", means, 0, t) for t in range(T)])
        o0, o1 = (4 * (sigmoid(r) - 0.5) for r in linear("offset_fc2", [max(0.0, h) for h in hidden]))
        w0, w1 = ([2 * sigmoid(over_time("weight_conv", means, j, t)) for t in range(T)] for j in range(2))
        offsets.append([o0, o1, -o0, -o1])
        weights.append([w0, w1, w0, w1])
    close(module(x)[:, :, :f], looped(x[:, :, :f], torch.tensor(offsets), torch.tensor(weights)), 1e-5)


def test_gradient_flows_through_the_descriptor_too():
    module = drawn(tin.TemporalInterlace(16, 5), seed=1).double()
    x = drawn_clip((2, 5, 16, 1, 2), seed=14).double().requires_grad_()
    assert torch.autograd.gradcheck(module, x)


@torch.no_grad()
def test_only_a_quarter_of_the_channels_moves_and_decides():
    module, x = drawn(tin.TemporalInterlace(32, 8)), drawn_clip((2, 8, 32, 3, 3), seed=6)
    y = module(x)
    assert torch.equal(y[:, :, 8:], x[:, :, 8:])
    others = torch.cat([x[:, :, :8], 5 - x[:, :, 8:]], dim=2)
    assert torch.equal(module(others)[:, :, :8], y[:, :, :8])  # the descriptor does not see the rest


@torch.no_grad()
def test_offset_0_and_weight_1_change_nothing():
    x = drawn_clip((2, 8, 32, 3, 3), seed=7)
    assert torch.equal(fixed(32, 8, [0.0, 0.0], [1.0, 1.0])(x), x)


@pytest.mark.parametrize("frames", [8, 16])
@torch.no_grad()
def test_offsets_reach_two_frames_at_most(frames):
    module = fixed(16, frames, [0.0, 0.0], [1.0, 1.0])
    module.offset_fc2.bias.fill_(100.0)  # a saturated sigmoid
    x = drawn_clip((1, frames, 16, 2, 2), seed=8)
    y, empty = module(x), torch.zeros(1, 2, 2, 2, 2)
    close(y[:, :, :2], torch.cat([empty, x[:, :-2, :2]], dim=1), 1e-6)
    close(y[:, :, 2:4], torch.cat([x[:, 2:, 2:4], empty], dim=1), 1e-6)


@pytest.mark.parametrize("frames", [8, 16])
def test_initial_values(frames):
    torch.manual_seed(0)
    module = tin.TemporalInterlace(1024, frames)
    f = 256
    assert module.offset_fc2.bias.tolist() == [pytest.approx(0.5108)] * 2
    assert module.weight_conv.bias.tolist() == [0, 0]
    for parameter, fan_in in (
            (module.offset_conv.weight, 3 * f), (module.offset_conv.bias, 3 * f), (module.offset_fc1.weight, frames),
            (module.offset_fc1.bias, frames), (module.offset_fc2.weight, frames), (module.weight_conv.weight, 3 * f)):
        largest = float(parameter.detach().abs().max()) * fan_in**0.5
        assert largest <= 1
        assert largest > 0.6 or parameter.numel() == 1  # uniform to the bound, so the largest of many is near it
    network = tin.TIN(313, depth=18)
    assert float(network.fc.weight.detach().std()) == pytest.approx(0.001, rel=0.02)
    assert not network.fc.bias.detach().any()


@torch.no_grad()
def test_offsets_start_near_half_a_frame_and_weights_near_1(monkeypatch):
    used = []
    monkeypatch.setattr(tin, "temporal_interlace", lambda x, o, w: used.append((o[:, :2], w)) or x)
    torch.manual_seed(0)
    x = drawn_clip((4, 8, 64, 3, 3), seed=9).relu()
    for _ in range(50):
        tin.TemporalInterlace(64, 8)(x)
    offsets, weights = (torch.stack(values) for values in zip(*used))
    assert float(offsets.mean()) == pytest.approx(0.5, abs=0.1)
    assert float(weights.mean()) == pytest.approx(1, abs=0.05)


# Where it sits.


@pytest.mark.parametrize("depth, blocks", [(50, [3, 4, 6, 3]), (101, [3, 4, 23, 3])])
def test_every_block_has_a_module(depth, blocks):
    with torch.device("meta"):
        network = tin.TIN(313, depth=depth)
    moved = [[module.moved for module in stage] for stage in network.interlace.values()]
    assert moved == [[16] + [64] * (blocks[0] - 1), [64] + [128] * (blocks[1] - 1),
                     [128] + [256] * (blocks[2] - 1), [256] + [512] * (blocks[3] - 1)]
    assert sum(map(len, moved)) == {50: 16, 101: 33}[depth]


@pytest.mark.parametrize("depth", [18, 50])
@torch.no_grad()
def test_conv1_gets_the_moved_frames_and_the_shortcut_does_not(depth):
    network, seen = drawn(tin.TIN(10, depth=depth)), {}

    def note(name):
        return lambda module, inputs, output: seen.update({name: (inputs[0], output)})

    for stage, modules in network.interlace.items():
        for i, (block, module) in enumerate(zip(getattr(network.backbone, stage), modules, strict=True)):
            last = block.bn3 if depth == 50 else block.bn2
            last.weight.zero_(), last.bias.zero_()  # so a block's answer is its shortcut's
            for name in ("conv1", "downsample"):
                if getattr(block, name) is not None:
                    getattr(block, name).register_forward_hook(note((stage, i, name)))
            module.register_forward_hook(note((stage, i, "interlace")))
    network(drawn_clip((2, 8, 3, 64, 64), seed=10))
    identities = 0
    for stage, modules in network.interlace.items():
        for i in range(len(modules)):
            x, moved = seen[stage, i, "interlace"]
            assert not torch.equal(x, moved)
            assert torch.equal(seen[stage, i, "conv1"][0], moved.flatten(0, 1))
            if (stage, i, "downsample") in seen:
                assert torch.equal(seen[stage, i, "downsample"][0], x.flatten(0, 1))
            elif i + 1 < len(modules):  # what the next block is given is x itself
                assert torch.equal(seen[stage, i + 1, "interlace"][0], x)
                identities += 1
    assert identities == {18: 1, 50: 8}[depth]


def test_offset_and_weight_nets_stay_in_float32_under_autocast():
    module, seen = tin.TemporalInterlace(16, 8), []
    for part in module.children():
        part.register_forward_hook(lambda part, inputs, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        y = module(drawn_clip((1, 8, 16, 2, 2), seed=11).bfloat16())
    assert seen == [torch.float32] * 4 and y.dtype == torch.bfloat16


# Other people's files.

OTHERS = {  # ours -> theirs; {} is a block, such as layer3.5; X-Temporal's names are deepcs233's too
    "xtemporal": {
        "backbone.conv1.": "base_model.conv1.", "backbone.bn1.": "base_model.bn1.",
        "backbone.{}.": "base_model.{}.", "backbone.{}.conv1.": "base_model.{}.conv1.net2.",
        "interlace.{}.offset_conv.": "base_model.{}.conv1.net1.biasnet.net.conv.",
        "interlace.{}.offset_fc1.": "base_model.{}.conv1.net1.biasnet.net.fc.",
        "interlace.{}.offset_fc2.": "base_model.{}.conv1.net1.biasnet.net.lastlayer.",
        "interlace.{}.weight_conv.": "base_model.{}.conv1.net1.weightnet.net.lastlayer.",
        "fc.": "new_fc.",
    },
    "mmaction2": {
        "backbone.conv1.": "backbone.conv1.conv.", "backbone.bn1.": "backbone.conv1.bn.",
        "backbone.{}.conv1.": "backbone.{}.conv1.conv.net2.", "backbone.{}.bn1.": "backbone.{}.conv1.bn.",
        "backbone.{}.conv2.": "backbone.{}.conv2.conv.", "backbone.{}.bn2.": "backbone.{}.conv2.bn.",
        "backbone.{}.conv3.": "backbone.{}.conv3.conv.", "backbone.{}.bn3.": "backbone.{}.conv3.bn.",
        "backbone.{}.downsample.0.": "backbone.{}.downsample.conv.",
        "backbone.{}.downsample.1.": "backbone.{}.downsample.bn.",
        "interlace.{}.offset_conv.": "backbone.{}.conv1.conv.net1.offset_net.conv.",
        "interlace.{}.offset_fc1.": "backbone.{}.conv1.conv.net1.offset_net.fc1.",
        "interlace.{}.offset_fc2.": "backbone.{}.conv1.conv.net1.offset_net.fc2.",
        "interlace.{}.weight_conv.": "backbone.{}.conv1.conv.net1.weight_net.conv.",
        "fc.": "cls_head.fc_cls.",
    },
}
STARTS = {  # of the same people: what a TSN or a TSM calls a block's first convolution
    "tsn": {"xtemporal": "base_model.{}.conv1.", "mmaction2": "backbone.{}.conv1.conv."},
    "tsm": {"xtemporal": "base_model.{}.conv1.net.", "mmaction2": "backbone.{}.conv1.conv.net."},
}


def renamed(state, names):
    """Our state dict under other names: the longest prefix of the table that fits a key is replaced."""
    theirs = {}
    for key, tensor in state.items():
        block = next(iter(re.findall(r"layer\d\.\d+", key)), "")
        prefix = max((ours for ours in names if key.startswith(ours.format(block))), key=len)
        theirs[names[prefix].format(block) + key[len(prefix.format(block)):]] = tensor
    assert len(theirs) == len(state)
    return theirs


def assert_same(ours, expected):
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[key], expected[key]) for key in expected)


@pytest.fixture(scope="module")
def state():
    """A ResNet-50 TIN's state dict, every tensor unlike the others."""
    return drawn(tin.TIN(10), seed=12).state_dict()


@pytest.fixture(scope="module")
def network():
    """Somewhere to load what was converted."""
    return tin.TIN(10)


@pytest.mark.parametrize("container", ["model", "state_dict", None])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_convert_xtemporal(state, network, container, prefix):
    theirs = {prefix + key: tensor for key, tensor in renamed(state, OTHERS["xtemporal"]).items()}
    assert len(theirs) == 448 and prefix + "base_model.layer3.5.conv1.net2.weight" in theirs
    ours = tin.convert({container: theirs, "epoch": 3, "best_prec1": 50.0} if container else theirs)
    assert_same(ours, state)
    network.load_state_dict(ours)


def test_convert_mmaction2(state, network):
    theirs = renamed(state, OTHERS["mmaction2"])
    assert len(theirs) == 448 and "backbone.layer3.5.conv1.conv.net1.offset_net.fc2.bias" in theirs
    ours = tin.convert({"state_dict": theirs, "meta": {"epoch": 3}})
    assert_same(ours, state)
    network.load_state_dict(ours)


def test_convert_keeps_the_answer_in_mmaction2s_names():
    case = golden("tin_deepcs233_r50_t8")
    theirs = renamed(tin.convert(case.checkpoint), OTHERS["mmaction2"])
    model = tin.TIN(**case.options).eval()
    model.load_state_dict(tin.convert({"state_dict": theirs, "meta": {}}))
    with torch.no_grad():
        close(model(case.clip), case.arrays["logits"])


@pytest.mark.parametrize("prefix", ["", "module."])
def test_convert_a_classifier_trained_without_dropout(state, prefix):
    theirs = renamed(state, {**OTHERS["xtemporal"], "fc.": "base_model.fc."})
    assert_same(tin.convert({"state_dict": {prefix + key: tensor for key, tensor in theirs.items()}}), state)


def test_convert_our_own_checkpoint(state):
    config = {"model": "tin", **tin.RECIPES["r50_8f"]}
    assert_same(tin.convert({"model": state, "optimizer": {"state": {}}, "epoch": 3, "config": config}), state)


def test_convert_fills_in_the_batch_counts_of_old_files(state, network):
    theirs = {key: t for key, t in renamed(state, OTHERS["xtemporal"]).items() if "num_batches_tracked" not in key}
    assert len(theirs) == 448 - 53
    ours = tin.convert(theirs)
    assert_same(ours, {**state, **{key: torch.tensor(0) for key in state if key.endswith("num_batches_tracked")}})
    network.load_state_dict(ours)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("people, container, prefix", [
    ("xtemporal", "state_dict", "module."), ("xtemporal", "model", ""), ("mmaction2", "state_dict", "")])
def test_convert_a_start_from_tsn_or_tsm(state, network, start, people, container, prefix):
    """tsn-pytorch and temporal-shift-module have X-Temporal's names, always under state_dict and module."""
    shared = {key: tensor for key, tensor in state.items() if not key.startswith("interlace.")}
    names = {**OTHERS[people], "backbone.{}.conv1.": STARTS[start][people]}
    theirs = {prefix + key: tensor for key, tensor in renamed(shared, names).items()}
    assert len(theirs) == 320
    ours = tin.convert({container: theirs, "epoch": 3})
    assert_same(ours, shared)
    missing, unexpected = network.load_state_dict(ours, strict=False)
    assert len(missing) == 16 * 8 and all(key.startswith("interlace.") for key in missing) and not unexpected


def test_convert_a_start_from_a_tsm_that_shifts_every_second_block(state):
    shared = {key: tensor for key, tensor in state.items() if not key.startswith("interlace.")}
    plain = renamed(shared, {**OTHERS["xtemporal"], "backbone.{}.conv1.": "base_model.{}.conv1."})
    theirs = {re.sub(r"(layer\d\.\d*[02468]\.conv1)\.", r"\1.net.", key): tensor for key, tensor in plain.items()}
    assert 0 < sum(".net." in key for key in theirs) < 16
    assert_same(tin.convert({"state_dict": theirs}), shared)


@pytest.mark.parametrize("counts", [True, False])
def test_convert_a_start_from_imagenet(state, network, counts):
    """torchvision's own file; its first ones had no batch counts."""
    expected = {key: tensor for key, tensor in state.items() if key.startswith("backbone.")}
    theirs = {key.removeprefix("backbone."): tensor for key, tensor in expected.items()}
    theirs |= {"fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)}
    with torch.device("meta"):
        assert theirs.keys() == torchvision.models.resnet50(weights=None).state_dict().keys()
    ours = tin.convert({key: t for key, t in theirs.items() if counts or not key.endswith("num_batches_tracked")})
    assert_same(ours, expected)
    missing, unexpected = network.load_state_dict(ours, strict=False)
    assert {key.split(".")[0] for key in missing} == {"interlace", "fc"} and not unexpected


@pytest.mark.parametrize("theirs, ours", [
    ("base_model.", "basemodel."), ("base_model.", "modul.base_model."),
    ("base_model.layer2.0.", "base_model.layer2.0.block."),  # non-local
    ("base_model.layer2.0.bn3.", "base_model.layer2.0.nl.W.1."),
    ("base_model.layer2.0.", "base_model.layer2.0.net."),  # TSM around the whole block
    ("base_model.layer2.", "base_model.layer2.net."),  # temporal pooling
    ("base_model.layer2.0.conv2.", "base_model.layer2.0.conv2.net."),  # deepcs233's TSM
    ("base_model.layer2.0.conv1.net2.", "base_model.layer2.0.conv12."),
    ("new_fc.", "new_fcs."),
])
def test_convert_refuses_what_it_cannot_place(state, theirs, ours):
    wrong = {re.sub("^" + re.escape(theirs), ours, key): t for key, t in renamed(state, OTHERS["xtemporal"]).items()}
    first = next(key for key in wrong if key.startswith(ours))
    with pytest.raises(ValueError, match=re.escape(first)):
        tin.convert({"state_dict": wrong})


@pytest.mark.parametrize("keys", [
    ["slow.conv1.weight", "slow.bn1.weight", "fc.weight"], ["module.slow_conv1.weight", "module.fc.weight"],
    ["backbone.slow_path.conv1.conv.weight", "cls_head.fc_cls.weight"], ["s1.pathway0_stem.conv.weight"],
])
def test_convert_refuses_slowfast(keys):
    with pytest.raises(ValueError, match=re.escape(keys[0])):
        tin.convert({"state_dict": {key: torch.zeros(1) for key in keys}})


@pytest.mark.parametrize("nothing", [{}, {"state_dict": {}}, {"model": {}, "config": {}}])
def test_convert_refuses_an_empty_file(nothing):
    with pytest.raises(ValueError):
        tin.convert(nothing)


# Sizes, 313 classes at 224 pixels.


@pytest.mark.parametrize("depth, frames, parameters, nets, gmac, nets_gmac, shift_gmac", [
    (50, 8, 24_180_377, 31_008, "32.70", "0.0002", "0.09"), (50, 16, 24_183_833, 34_464, "65.40", "0.0005", "0.36"),
    (101, 8, 43_213_254, 71_757, "62.40", "0.0006", None), (101, 16, 43_220_382, 78_885, "124.80", "0.0011", None),
])
def test_parameters_and_multiply_adds(depth, frames, parameters, nets, gmac, nets_gmac, shift_gmac):
    macs = {}

    def count(name):
        return lambda part, inputs, output: macs.update({name: output.numel() * part.weight[0].numel() / 1e9})

    with FakeTensorMode(), torch.no_grad():  # shapes without arithmetic
        network = tin.TIN(313, frames, depth).eval()
        for name, part in network.named_modules():
            if isinstance(part, (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Linear)):
                part.register_forward_hook(count(name))
        with FlopCounterMode(display=False) as flops:
            network(torch.empty(1, frames, 3, 224, 224))
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert len(network.state_dict()) == {50: 448, 101: 890}[depth]
    modules = [module for stage in network.interlace.values() for module in stage]
    sizes = [sum(p.numel() for p in module.parameters()) for module in modules]
    assert sizes == [9 * module.moved + frames**2 + 3 * frames + 5 for module in modules] and sum(sizes) == nets
    assert f"{sum(macs.values()):.2f}" == gmac
    assert f"{sum(value for name, value in macs.items() if name.startswith('interlace')):.4f}" == nets_gmac
    shift = flops.get_total_flops() / 2e9 - sum(macs.values())  # all that remains are the products with T x T matrices
    assert shift < 0.006 * sum(macs.values()) and shift_gmac in (None, f"{shift:.2f}")


@pytest.mark.parametrize("classes, parameters", [(174, 23_895_566), (400, 24_358_640)])
def test_parameters_are_mmaction2s(classes, parameters):
    with torch.device("meta"):
        assert sum(p.numel() for p in tin.TIN(classes).parameters()) == parameters
