"""TRN adds up what small networks say of ordered tuples of frames.

    python -m pytest tests/test_trn.py

The tests follow trn.py from top to bottom: the tuples of four frames, a pair by hand, the draw in
training, the mean over all draws in evaluation, the answers of the original code, other people's
weights. test_models.py has what is the same for all model files.
"""
import itertools

import pytest
import torch

import trn
from conftest import close, drawn_clip, fill, golden, golden_names


# ---- one scale -------------------------------------------------------------------------------

@pytest.mark.parametrize("scale, tuples, terms", [
    (4, [[0, 1, 2, 3]], 1),
    (3, [[0, 1, 2], [0, 1, 3], [0, 2, 3], [1, 2, 3]], 3),
    (2, [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]], 3),
])
def test_the_tuples_of_four_frames(scale, tuples, terms):
    """a b c d are 0 1 2 3. Training draws three of them, or all if there are fewer."""
    relation = trn.Relation(frames=4, scale=scale, hidden=8, num_classes=5)
    assert relation.tuples.tolist() == tuples
    assert relation.terms == terms


@torch.no_grad()
def test_a_pair_of_frames_by_hand():
    """One feature a frame is used. The hidden layer is 1 x the first frame's + 10 x the second's
    - 20, the logit 2 x hidden + 1, and a negative number becomes 0 before both layers."""
    relation = trn.Relation(frames=2, scale=2, hidden=1, num_classes=1).eval()
    relation.hidden.weight.zero_()
    relation.hidden.weight[0, 0] = 1
    relation.hidden.weight[0, 256] = 10
    relation.hidden.bias.fill_(-20)
    relation.fc.weight.fill_(2)
    relation.fc.bias.fill_(1)

    def logit(first, second):
        f = torch.zeros(1, 2, 256)
        f[0, 0, 0] = first
        f[0, 1, 0] = second
        return relation(f).item()

    assert logit(3, 5) == 2 * (3 + 50 - 20) + 1
    assert logit(5, 3) == 2 * (5 + 30 - 20) + 1
    assert logit(30, -1) == 2 * (30 + 0 - 20) + 1
    assert logit(3, 1) == 1


def test_training_draws_tuples_from_pytorchs_cpu_generator():
    relation = trn.Relation(frames=5, scale=3, hidden=4, num_classes=2).train()
    inputs = []

    def remember(hidden, arguments):
        inputs.append(arguments[0])

    relation.hidden.register_forward_pre_hook(remember)
    f = torch.eye(5, 256).expand(2, 5, 256)  # frame t is 1 at feature t alone, which names it
    torch.manual_seed(0)
    relation(f)

    # of the 10 triples, three different ones, the same for the whole batch
    torch.manual_seed(0)
    expected = relation.tuples[torch.randperm(10)[:3]]
    drawn = inputs[0].unflatten(2, (3, 256)).argmax(dim=3)  # (B, n, k)
    assert torch.equal(drawn, expected.expand(2, 3, 3))


# ---- the network -----------------------------------------------------------------------------

def looped(model, f, chosen):
    """The sum over scales and their chosen tuples, one clip and one tuple after another."""
    logits = torch.zeros(len(f), 3)
    for b in range(len(f)):
        for relation in model.relations:
            for indices in chosen[relation.scale]:
                x = torch.cat([f[b, t] for t in indices]).clamp(min=0)
                x = (relation.hidden.weight @ x + relation.hidden.bias).clamp(min=0)
                logits[b] += relation.fc.weight @ x + relation.fc.bias
    return logits


@torch.no_grad()
def test_evaluation_is_the_mean_over_all_draws():
    """Three of 4 triples and three of 6 pairs: 4 x 20 draws."""
    model = fill(trn.TRN(3, 4, "resnet18")).eval()
    clip = drawn_clip((2, 4, 3, 32, 32), seed=1)
    f = model.features(clip)

    answers = []
    triples = itertools.combinations(range(4), 3)
    for three in itertools.combinations(triples, 3):
        pairs = itertools.combinations(range(4), 2)
        for two in itertools.combinations(pairs, 3):
            answers.append(looped(model, f, {4: [(0, 1, 2, 3)], 3: three, 2: two}))
    assert len(answers) == 80
    close(model(clip), torch.stack(answers).mean(dim=0))


def test_sizes_that_are_refused():
    with pytest.raises(ValueError, match="2 to 10 frames, got 1, which makes no pair"):
        trn.TRN(3, 1, "resnet18")
    with pytest.raises(ValueError, match="2 to 10 frames, got 11, whose 2,036 tuples are too many"):
        trn.TRN(3, 11, "resnet18")
    with torch.device("meta"):  # shapes without memory
        with pytest.raises(ValueError, match="backbone vgg11 is not one of torchvision's ResNets"):
            trn.TRN(3, 8, "vgg11")
        assert len(trn.TRN(3, 10, "resnet18").relations) == 9
        assert len(trn.TRN(3, 16, "resnet18", multiscale=False).relations) == 1


@pytest.mark.parametrize("name", golden_names("trn"))
@torch.no_grad()
def test_logits_and_features_are_those_of_the_authors(name):
    case = golden(name)
    model = trn.TRN(**case.options).eval()
    model.load_state_dict(trn.convert(case.checkpoint))
    close(model.features(case.clip), case.arrays["features"])
    close(model(case.clip), case.arrays["logits"])

    # a forward pass of their own, with the tuples that it had drawn
    if "logits_sampled" in case.arrays:
        drawn = {}
        for scale in range(2, 9):
            drawn[scale] = torch.from_numpy(case.arrays[f"sampled_{scale}"])
        close(model(case.clip, drawn), case.arrays["logits_sampled"])


# ---- other people's weights ------------------------------------------------------------------

@pytest.mark.parametrize("key, expected", [
    # TRN-pytorch with one scale, mmaction2 with several
    ("module.consensus.classifier.1.weight", "relations.0.hidden.weight"),
    ("module.consensus.classifier.3.bias", "relations.0.fc.bias"),
    ("cls_head.consensus.fc_fusion_scales.6.1.bias", "relations.6.hidden.bias"),
    ("cls_head.consensus.fc_fusion_scales.6.3.weight", "relations.6.fc.weight"),
])
def test_other_peoples_names(key, expected):
    """Their other layouts are in the test of their answers."""
    assert trn.our_name(key) == expected


def test_the_classifier_of_a_tsn_is_left_out():
    """With 256 classes it has the shape of the frame layer."""
    state = trn.convert({"state_dict": {
        "backbone.conv1.weight": torch.zeros(64, 3, 7, 7),
        "cls_head.fc_cls.weight": torch.zeros(256, 512),
        "cls_head.fc_cls.bias": torch.zeros(256),
    }})
    assert list(state) == ["backbone.conv1.weight"]


@pytest.mark.parametrize("key", [
    "base_model.layer1.0.conv1.net.weight",  # TSM
    "base_model.layer1.0.conv1.net2.weight",  # TIN
    "consensus.classifiers.0.weight",  # a deeper TRN, of which there are no public weights
])
def test_another_networks_file_is_refused(key):
    file = {"module.base_model.bn1.weight": torch.zeros(64), f"module.{key}": torch.zeros(1)}
    with pytest.raises(ValueError, match=f"trn.py has no place for the key module.{key}$"):
        trn.convert({"state_dict": file})
