"""TRN adds up what small networks say of ordered tuples of frames.

    python -m pytest tests/test_trn.py

The tuples of four frames, a pair by hand, the draw in training, the mean over all draws in
evaluation, the answers of the original code. test_models.py has what is the same for all model
files.
"""
import itertools

import pytest
import torch

import trn
from conftest import close, drawn_clip, fill, golden, golden_names, remember


@pytest.mark.parametrize("scale, tuples, draws", [
    (4, [[0, 1, 2, 3]], 1),
    (3, [[0, 1, 2], [0, 1, 3], [0, 2, 3], [1, 2, 3]], 3),
    (2, [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]], 3),
])
def test_the_tuples_of_four_frames(scale, tuples, draws):
    """Training draws three of them, or all if there are fewer."""
    relation = trn.Relation(frames=4, scale=scale, hidden=8, num_classes=5)
    assert relation.tuples.tolist() == tuples
    assert relation.draws == draws


@torch.no_grad()
def test_a_pair_of_frames_by_hand():
    """One feature a frame is used. The hidden layer is 1 x the first frame's + 10 x the second's
    - 20, the logit 2 x hidden + 1, and a negative number becomes 0 before both layers."""
    relation = trn.Relation(frames=2, scale=2, hidden=1, num_classes=1).eval()
    relation.fc1.weight.zero_()
    relation.fc1.weight[0, 0] = 1
    relation.fc1.weight[0, 256] = 10
    relation.fc1.bias.fill_(-20)
    relation.fc2.weight.fill_(2)
    relation.fc2.bias.fill_(1)

    def logit(first, second):
        f = torch.zeros(1, 2, 256)
        f[0, :, 0] = torch.tensor([first, second])
        return relation(f).item()

    assert logit(3, 5) == 2 * (3 + 50 - 20) + 1
    assert logit(5, 3) == 2 * (5 + 30 - 20) + 1
    assert logit(30, -1) == 2 * (30 + 0 - 20) + 1
    assert logit(3, 1) == 1


def test_training_draws_from_pytorchs_cpu_generator():
    """Of the 10 triples of 5 frames three different ones, the same for the whole batch."""
    relation = trn.Relation(frames=5, scale=3, hidden=4, num_classes=2).train()
    calls = remember(relation.fc1)
    f = torch.eye(5, 256).expand(2, 5, 256)  # frame t is 1 at feature t alone, which names it
    torch.manual_seed(0)
    relation(f)

    torch.manual_seed(0)
    expected = relation.tuples[torch.randperm(10)[:3]]
    drawn = calls[0][0].unflatten(2, (3, 256)).argmax(dim=3)  # (B, n, k)
    assert torch.equal(drawn, expected.expand(2, 3, 3))


def looped(model, f, chosen):
    """The sum over scales and their chosen tuples, one clip and one tuple after another."""
    logits = torch.zeros(len(f), 3)
    for b in range(len(f)):
        for relation in model.relations:
            for indices in chosen[relation.tuples.shape[1]]:
                x = torch.cat([f[b, t] for t in indices]).clamp(min=0)
                x = (relation.fc1.weight @ x + relation.fc1.bias).clamp(min=0)
                logits[b] += relation.fc2.weight @ x + relation.fc2.bias
    return logits


@torch.no_grad()
def test_evaluation_is_the_mean_over_all_draws():
    """Three of 4 triples and three of 6 pairs: 4 x 20 draws."""
    model = fill(trn.TRN(3, 4, "resnet18")).eval()
    clip = drawn_clip((2, 4, 3, 32, 32), seed=1)
    f = model.features(clip)

    answers = []
    for three in itertools.combinations(itertools.combinations(range(4), 3), 3):
        for two in itertools.combinations(itertools.combinations(range(4), 2), 3):
            answers.append(looped(model, f, {4: [(0, 1, 2, 3)], 3: three, 2: two}))
    assert len(answers) == 80
    close(model(clip), torch.stack(answers).mean(dim=0))


def test_a_single_scale_takes_any_number_of_frames():
    trn.TRN(3, 16, "resnet18", multiscale=False)


@pytest.mark.parametrize("name", golden_names("trn"))
@torch.no_grad()
def test_logits_and_features_are_those_of_the_authors(name):
    case = golden(name)
    model = trn.TRN(**case.options).eval()
    model.load_state_dict(trn.convert(case.tensors))
    close(model.features(case.clip), case.arrays["features"])
    close(model(case.clip), case.arrays["logits"])

    # a forward pass of their own, with the tuples that it had drawn
    if "logits_sampled" in case.arrays:
        for relation in model.relations:
            drawn = case.arrays[f"sampled_{relation.tuples.shape[1]}"]
            relation.tuples = torch.from_numpy(drawn)
        close(model(case.clip), case.arrays["logits_sampled"])


def test_the_classifier_of_a_tsn_is_left_out():
    """With 256 classes it has the shape of the frame layer."""
    state = trn.convert({
        "backbone.conv1.weight": torch.zeros(64, 3, 7, 7),
        "cls_head.fc_cls.weight": torch.zeros(256, 512),
        "cls_head.fc_cls.bias": torch.zeros(256),
    })
    assert list(state) == ["backbone.conv1.weight"]
