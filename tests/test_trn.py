"""TRN is its authors' function: their logits, for the tuples they drew too, tuple by tuple; in evaluation the exact
mean over every draw, in training a few tuples from PyTorch's generator; and convert() reads every layout of a TRN.

    python -m pytest tests/test_trn.py
"""
import itertools

import pytest
import torch
import torchvision
from torch.utils.flop_counter import FlopCounterMode

import trn
from conftest import golden, golden_names

MULTISCALE = "trn_trnpytorch_r50_t8_multiscale"


def close(values, expected):
    """The house's tolerance: 1e-4 of the largest figure."""
    expected = torch.as_tensor(expected)
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


def loaded(case):
    """Our network with the weights of a case, in evaluation."""
    model = trn.TRN(**case.options).eval()
    model.load_state_dict(trn.convert(case.checkpoint))
    return model


@pytest.mark.parametrize("name", golden_names("trn"))
@torch.no_grad()
def test_logits_and_features_are_those_of_the_original_code(name):
    case = golden(name)
    model = loaded(case)
    close(model(case.clip), case.arrays["logits"])
    close(model.features(case.clip), case.arrays["features"])


@torch.no_grad()
def test_the_tuples_the_original_code_drew_can_be_replayed():
    case = golden(MULTISCALE)
    drawn = {k: torch.from_numpy(case.arrays[f"sampled_{k}"]) for k in range(2, 9)}
    close(loaded(case)(case.clip, drawn), case.arrays["logits_sampled"])


@torch.no_grad()
def test_every_relation_says_of_every_tuple_what_the_original_does():
    case = golden(MULTISCALE)
    f = torch.from_numpy(case.arrays["features"])
    total = 0
    for relation in loaded(case).relations:
        k = relation.scale
        assert relation.tuples.tolist() == case.arrays[f"all_{k}"].tolist()
        said = torch.stack([relation(f, row[None]) for row in relation.tuples]) / relation.terms  # (R_k, B, K)
        close(said, case.arrays[f"out_{k}"])
        total = total + said.sum(dim=0)
    close(total, case.arrays["logits_sum_of_all"])


def small(segments=4, multiscale=True):
    """A TRN whose weights are large enough to tell its inputs apart; dropout 0, batch norm by running statistics."""
    model = trn.TRN(3, segments, "resnet18", multiscale, dropout=0).eval()
    torch.nn.init.normal_(model.frame.weight, std=0.1)
    return model


def by_loops(model, f, chosen):
    """The sum over scales and chosen tuples of g(tuple), one tuple and one clip at a time, as the public codes do."""
    logits = []
    for frames in f:
        total = torch.zeros(3)
        for relation in model.relations:
            for row in chosen[relation.scale]:
                x = torch.cat([frames[t] for t in row]).clamp(min=0)
                x = (relation.hidden.weight @ x + relation.hidden.bias).clamp(min=0)
                total = total + relation.fc.weight @ x + relation.fc.bias
        logits.append(total)
    return torch.stack(logits)


@torch.no_grad()
def test_evaluation_is_the_mean_over_every_draw():
    model, clip = small(), torch.randn(2, 4, 3, 32, 32)
    f = model.features(clip)
    draws = [{4: [(0, 1, 2, 3)], 3: threes, 2: twos}
             for threes in itertools.combinations(itertools.combinations(range(4), 3), 3)
             for twos in itertools.combinations(itertools.combinations(range(4), 2), 3)]
    assert len(draws) == 4 * 20
    close(model(clip), torch.stack([by_loops(model, f, draw) for draw in draws]).mean(dim=0))
    tensors = {scale: torch.tensor(rows) for scale, rows in draws[7].items()}
    close(model(clip, tensors), by_loops(model, f, draws[7]))


@torch.no_grad()
def test_one_scale_alone_is_one_network_over_all_frames():
    model, clip = small(multiscale=False), torch.randn(2, 4, 3, 32, 32)
    assert [relation.hidden.weight.shape for relation in model.relations] == [(512, 4 * 256)]
    close(model(clip), by_loops(model, model.features(clip), {4: [(0, 1, 2, 3)]}))


def test_training_draws_from_the_generator_of_pytorch():
    relation, inputs = trn.Relation(frames=5, scale=3, hidden=4, num_classes=2).train(), []
    relation.hidden.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    f = torch.eye(5, 256).expand(2, 5, 256)  # frame t is 1 at place t alone, so that a tuple can be read off
    for seed in list(range(60)) * 2:
        torch.manual_seed(seed)
        relation(f)
    drawn = [x.unflatten(2, (3, 256)).argmax(dim=3) for x in inputs]  # (B, n, k) each
    assert all(x.shape == (2, 3, 3) and torch.equal(x[0], x[1]) for x in drawn)  # one draw for the whole batch
    drawn = [[tuple(row) for row in x[0].tolist()] for x in drawn]
    assert drawn[:60] == drawn[60:]  # by the seed alone
    assert all(len(set(rows)) == 3 for rows in drawn)  # without replacement
    assert set(sum(drawn, [])) == set(itertools.combinations(range(5), 3))


@pytest.mark.parametrize("frames, scale, terms", [(8, 8, 1), (8, 7, 3), (8, 2, 3), (3, 2, 3), (2, 2, 1)])
def test_number_of_terms(frames, scale, terms):
    assert trn.Relation(frames, scale, 4, 2).terms == terms


def test_clips_and_sizes_that_are_refused():
    with pytest.raises(ValueError, match="4 frames, got 8"):
        small()(torch.zeros(1, 8, 3, 32, 32))
    with pytest.raises(ValueError, match="got 16: they make 65,519 tuples"):
        trn.TRN(3, 16, "resnet18")
    with pytest.raises(ValueError, match="got 1: "):
        trn.TRN(3, 1, "resnet18")
    assert len(trn.TRN(3, 16, "resnet18", multiscale=False).relations) == 1


def test_multiply_adds_of_the_relations():
    with torch.device("meta"):
        model, f = trn.TRN(313).eval(), torch.empty(1, 8, 256)
    with FlopCounterMode(display=False) as counter:
        for relation in model.relations:
            relation(f)
    assert sum(len(relation.tuples) for relation in model.relations) == 247
    assert counter.get_total_flops() / 2e6 == pytest.approx(67, abs=0.5)


def test_convert_reads_every_spelling_of_one_file():
    theirs = golden(MULTISCALE).checkpoint["state_dict"]
    expected = trn.convert({"state_dict": theirs})
    bare = {key.removeprefix("module."): tensor for key, tensor in theirs.items()}
    spellings = {
        "one GPU": {"state_dict": bare},
        "mmaction2's head": {
            key.replace("new_fc", "cls_head.fc_cls").replace("consensus", "cls_head.consensus"): tensor
            for key, tensor in bare.items()},
        "PyTorch 0.4": {key: bare[key] for key in bare if "num_batches" not in key},
        "ours": {"model": expected, "config": {}},
    }
    for name, file in spellings.items():
        state = trn.convert(file)
        assert state.keys() == expected.keys(), name
        assert all(torch.equal(state[key], expected[key]) for key in state), name


@pytest.mark.parametrize("classes", [10, 256])  # 256 rows do not make a classifier a frame layer
@pytest.mark.parametrize("names", ["module.new_fc", "module.base_model.fc", "cls_head.fc_cls", "fc"])
def test_convert_takes_only_the_backbone_of_a_tsn(names, classes):
    backbone = {"backbone." + key: tensor for key, tensor in torchvision.models.resnet18().state_dict().items()
                if not key.startswith("fc.")}
    state = trn.convert({"state_dict": {
        **backbone, names + ".weight": torch.zeros(classes, 512), names + ".bias": torch.zeros(classes)}})
    assert state.keys() == backbone.keys()


def test_convert_leaves_out_the_classifier_of_imagenet():
    state = trn.convert(torchvision.models.resnet18().state_dict())
    missing, unexpected = trn.TRN(3, backbone="resnet18").load_state_dict(state, strict=False)
    assert not unexpected and all(key.startswith(("frame.", "relations.")) for key in missing)


@pytest.mark.parametrize("key", [
    "base_model.layer1.0.conv1.net.weight",  # TSM
    "base_model.layer1.0.conv1.net2.weight",  # TIN
    "base_model.conv1_7x7_s2.weight",  # another backbone, BNInception
    "consensus.classifiers.0.weight",  # a deeper TRN, which nothing released uses
    "consensus.fc_fusion_scales.0.0.weight",
])
def test_convert_refuses_other_networks(key):
    file = {"state_dict": {"module.base_model.conv1.weight": torch.zeros(1), "module." + key: torch.zeros(1)}}
    with pytest.raises(ValueError, match=f"1 of 2 keys: module.{key}"):
        trn.convert(file)
