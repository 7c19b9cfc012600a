"""The losses are the golden ones, the learning rates those of the report, and a run that is killed
and resumed is the uninterrupted run, bit for bit.

    python -m pytest tests/test_train.py

The tests follow train.py from top to bottom: losses, learning rates, the order of the videos, first
weights, checkpoints, whole runs; then what ends a run and how it goes on, and what is refused.
Whole runs train conftest.TINY on 32 toy videos in batches of 8: 4 steps an epoch, 24 in all. Most
of them are calls of train.main in this process, because a new process takes seconds to import
torch.
"""
import copy
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision

import data
import evaluate
import tin
import train
import tsm
import tsn
from conftest import ROOT, call, close, free_port, python, scripts_with_tiny, torchrun


# ---- losses: three classes, by hand


def gradient_of(loss, logits, labels):
    logits = logits.clone().requires_grad_()
    return torch.autograd.grad(loss(logits, labels), logits)[0]


def test_zero_logits_cost_160_ln_2():
    """Each class costs ln 2, and their mean is multiplied by 160. The logit of a label is pulled up
    as hard as any other is pulled down: by 160 / 313 / 2."""
    logits = torch.zeros(1, 313)
    labels = F.one_hot(torch.tensor([7]), 313)
    assert train.scaled_bce(logits, labels).item() == pytest.approx(110.9035, abs=1e-4)

    gradient = gradient_of(train.scaled_bce, logits, labels)
    assert gradient[0, 7].item() == pytest.approx(-0.2556, abs=5e-5)
    assert gradient[0, 8].item() == pytest.approx(0.2556, abs=5e-5)


def test_lsep_of_three_classes_by_hand():
    """One label, at 1. The other classes are at 0 and 2: -1 and +1 away."""
    loss = train.lsep(torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([[1, 0, 0]]))
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-1) + math.exp(1)))


def test_warp_of_three_classes_by_hand():
    """The label is at 1, so a class above 0 violates the margin, by as much as it is above 0."""
    labels = torch.tensor([[1, 0, 0]])
    assert train.warp(torch.tensor([[1.0, 0.5, 2.0]]), labels) == (1 + 1 / 2) * (0.5 + 2) / 2
    assert train.warp(torch.tensor([[1.0, -0.5, 2.0]]), labels) == 1 * 2
    assert train.warp(torch.tensor([[1.0, -0.5, 0.0]]), labels) == 0


@pytest.mark.parametrize("violators, weight", [(1, 1), (2, 1.5), (4, 2.083333), (312, 6.321821)])
def test_warp_weighs_a_label_by_the_classes_that_violate_its_margin(violators, weight):
    logits = torch.full((1, 313), -10.0)
    logits[0, : violators + 1] = 0  # the label and its violators, each by a margin of 1
    labels = F.one_hot(torch.tensor([0]), 313)
    assert train.warp(logits, labels).item() == pytest.approx(weight, abs=1e-6)


def test_cross_entropy_by_hand():
    logits = torch.tensor([[0.0, math.log(3), 0.0], [math.log(2), 0.0, 0.0]])
    labels = torch.tensor([[0, 1, 0], [0, 0, 1]])
    loss = train.compute_loss(logits, labels, {"loss": "ce", "loss_scale": 2.0})
    assert loss.item() == pytest.approx(2 * (math.log(5 / 3) + math.log(4)) / 2)


# ---- losses: golden figures, loops and finite differences

GOLDEN = dict(np.load(ROOT / "tests" / "golden" / "losses.npz"))
every_problem = pytest.mark.parametrize("number", range(int(GOLDEN["n"])))


def problem(number):
    """Logits and labels of a golden problem, both float64 (B, K)."""
    logits = torch.from_numpy(GOLDEN[f"logits_{number}"])
    return logits, torch.from_numpy(GOLDEN[f"targets_{number}"])


@every_problem
def test_losses_are_the_golden_ones(number):
    logits, labels = problem(number)
    close(train.scaled_bce(logits, labels), GOLDEN[f"bce160_{number}"], 1e-12)
    close(gradient_of(train.scaled_bce, logits, labels), GOLDEN[f"bce160_grad_{number}"], 1e-12)
    close(train.lsep(logits, labels), GOLDEN[f"lsep_{number}"], 1e-12)
    close(gradient_of(train.lsep, logits, labels), GOLDEN[f"lsep_grad_{number}"], 1e-12)
    rows = [train.lsep(logits[i : i + 1], labels[i : i + 1]) for i in range(len(logits))]
    close(torch.stack(rows), GOLDEN[f"lsep_rows_{number}"], 1e-12)
    close(train.warp(logits, labels), GOLDEN[f"warp_exact_{number}"], 1e-12)


@every_problem
def test_the_ranking_losses_are_loops_over_pairs(number):
    logits, labels = problem(number)
    lsep = 0.0
    warp = 0.0
    for scores, positive in zip(logits.tolist(), labels.bool().tolist()):
        negatives = [score for score, is_label in zip(scores, positive) if not is_label]
        pairs = 0.0
        for u in np.flatnonzero(positive):
            pairs += sum(math.exp(score - scores[u]) for score in negatives)
            misses = [1 - scores[u] + score for score in negatives if 1 - scores[u] + score > 0]
            if misses:
                weight = sum(1 / rank for rank in range(1, len(misses) + 1))
                warp += weight * sum(misses) / len(misses)
        lsep += math.log1p(pairs)
    assert train.lsep(logits, labels).item() == pytest.approx(lsep / len(logits), rel=1e-12)
    assert train.warp(logits, labels).item() == pytest.approx(warp / len(logits), rel=1e-12)


@pytest.mark.parametrize("number", [2, 3, 4, 5, 6, 8])  # the small ones
@pytest.mark.parametrize("loss", [train.scaled_bce, train.lsep, train.warp])
def test_gradients_are_finite_differences(loss, number):
    logits, labels = problem(number)
    expected = torch.zeros_like(logits)
    for place in np.ndindex(*logits.shape):
        step = torch.zeros_like(logits)
        step[place] = 1e-6
        expected[place] = (loss(logits + step, labels) - loss(logits - step, labels)) / 2e-6
    close(gradient_of(loss, logits, labels), expected, 1e-6)


@every_problem
@pytest.mark.parametrize("kind", ["sqrt", "ratio"])
def test_class_weights_are_the_golden_ones(number, kind):
    weight = train.class_weights(GOLDEN[f"counts_{number}"], kind)
    loss = train.scaled_bce(*problem(number), weight=weight)
    close(loss, GOLDEN[f"bce160_{kind}_{number}"], 1e-6)  # the weights are float32


# ---- losses: traps


def weights_after_50_steps(scale, lr, weight_decay, max_norm=math.inf):
    """A linear classifier's weights in float64, always from one start and the same batches."""
    torch.manual_seed(0)
    weight = torch.randn(20, 6, dtype=torch.float64).mul_(0.3).requires_grad_()
    optimizer = torch.optim.SGD([weight], lr=lr, momentum=0.9, weight_decay=weight_decay)
    for _ in range(50):
        logits = torch.randn(8, 20, dtype=torch.float64) @ weight
        train.scaled_bce(logits, torch.rand(8, 6) > 0.7, scale).backward()
        torch.nn.utils.clip_grad_norm_([weight], max_norm)
        optimizer.step()
        optimizer.zero_grad()
    return weight.detach()


def test_scaling_the_loss_is_not_scaling_the_learning_rate():
    """The report: scaling the loss helped, scaling the learning rate as much did not.

    A step is lr (k g + wd w) = (k lr) (g + wd / k w), with gradient g and weights w. So k times the
    loss is k times the rate with the k-th part of the weight decay. The rate alone leaves the decay
    k times as strong. Clipping measures the gradient before the rate, so it ends even that.
    """
    k, lr, decay = 160.0, 1e-3, 5e-2
    scaled = weights_after_50_steps(k, lr, decay)
    both = weights_after_50_steps(1.0, k * lr, decay / k)
    rate_alone = weights_after_50_steps(1.0, k * lr, decay)
    assert (both - scaled).norm() < 1e-12 * scaled.norm()
    assert (rate_alone - scaled).norm() > 0.1 * scaled.norm()

    scaled = weights_after_50_steps(k, lr, decay, max_norm=20)
    both = weights_after_50_steps(1.0, k * lr, decay / k, max_norm=20)
    assert (both - scaled).norm() > 0.01 * scaled.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_recipe_names_the_loss_and_it_is_float32_whatever_the_network_gives(dtype):
    logits, labels = problem(5)
    logits = logits.to(dtype)
    exact = logits.double()
    weight = torch.linspace(0.5, 2, 11)
    for name, expected in [
        ("bce", train.scaled_bce(exact, labels, 7.0, weight)),
        ("lsep", 7 * train.lsep(exact, labels)),
        ("warp", 7 * train.warp(exact, labels)),
        ("ce", 7 * F.cross_entropy(exact, labels.argmax(dim=1))),
    ]:
        loss = train.compute_loss(logits, labels, {"loss": name, "loss_scale": 7.0}, weight)
        assert loss.dtype == torch.float32
        close(loss, expected.float(), 1e-5)


@pytest.mark.parametrize("size", [0.0, 1.0, 1e4])
@pytest.mark.parametrize("loss", [train.scaled_bce, train.lsep, train.warp])
def test_losses_are_finite_without_positives_without_negatives_and_far_out(loss, size):
    labels = torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1], [1, 0, 1, 0]])
    right = size * (2.0 * labels - 1)
    for logits in (right, -right):
        gradient = gradient_of(loss, logits, labels)
        assert loss(logits, labels).isfinite()
        assert gradient.isfinite().all()
        if loss is not train.scaled_bce:  # the first two videos have nothing to rank
            assert loss(logits[:2], labels[:2]) == 0
            assert not gradient[:2].any()


# ---- learning rates

SLOWFAST = dict(lr=0.2, batch=1024, reference_batch=1024, schedule="cosine", warmup=8000)


def test_image_models_divide_their_rate_by_10_after_10_and_after_20_epochs():
    """With 7 steps an epoch."""
    rates = [train.learning_rate(step, 30 * 7, train.RECIPE) for step in range(30 * 7)]
    assert rates == pytest.approx([0.01] * 70 + [0.001] * 70 + [0.0001] * 70)


def test_milestones_are_exact_also_where_the_epochs_are_a_rounded_fraction():
    """60 steps of 11 an epoch: epoch 2 begins at step 22."""
    recipe = {**train.RECIPE, "milestones": (2,), "epochs": 60 / 11}
    assert train.learning_rate(21, 60, recipe) == pytest.approx(0.01)
    assert train.learning_rate(22, 60, recipe) == pytest.approx(0.001)


@pytest.mark.parametrize("step, rate", [
    (0, 0.02), (4000, (0.02 + 0.199027) / 2), (8000, 0.199027), (90_000, 0.1), (179_999, 1.523e-11),
])
def test_slowfasts_rate_rises_for_8000_steps_and_then_follows_half_a_cosine(step, rate):
    assert train.learning_rate(step, 180_000, SLOWFAST) == pytest.approx(rate, rel=3e-4)


def test_half_the_batch_takes_twice_the_steps_each_at_half_the_rate():
    """The warm-up takes twice as many as well."""
    for step in (0, 16, 4000, 7996, 8000, 8004, 90_000, 179_996):
        rate = train.learning_rate(2 * step, 2 * 180_000, {**SLOWFAST, "batch": 512})
        assert rate == pytest.approx(train.learning_rate(step, 180_000, SLOWFAST) / 2)


# ---- the order of the videos


def test_an_epoch_is_a_permutation_that_depends_on_seed_and_epoch_alone():
    """35 videos are four batches of 8; every epoch drops three others."""
    for seed in (0, 1):
        steps = list(train.batches(35, 8, seed, 0, 12, 0, 1))
        for epoch in range(3):
            rows = np.concatenate(steps[4 * epoch : 4 * epoch + 4]) - epoch * 35
            order = np.random.default_rng([seed, epoch]).permutation(35)
            assert rows.tolist() == order[:32].tolist()


@pytest.mark.parametrize("world", [2, 4])
def test_the_shares_of_the_processes_are_disjoint_and_make_up_the_batch(world):
    shares = [list(train.batches(50, 24, 3, 0, 5, rank, world)) for rank in range(world)]
    for step, batch in enumerate(train.batches(50, 24, 3, 0, 5, 0, 1)):
        parts = [share[step] for share in shares]
        assert {len(part) for part in parts} == {24 // world}
        assert sorted(sum(parts, [])) == sorted(batch)


@pytest.mark.parametrize("start", [1, 3, 4, 9, 12])
def test_a_start_in_mid_epoch_is_the_tail_of_the_whole(start):
    whole = list(train.batches(35, 8, 0, 0, 12, 1, 2))
    assert list(train.batches(35, 8, 0, start, 12, 1, 2)) == whole[start:]


def test_every_step_of_every_process_has_a_seed_of_its_own():
    seeds = {train.step_seed(*numbers) for numbers in np.ndindex(3, 50, 4)}
    assert len(seeds) == 3 * 50 * 4
    assert train.step_seed(1, 2, 3) == np.random.SeedSequence([1, 2, 3]).generate_state(1)[0]


# ---- first weights

CLASSES = [f"class {k}" for k in range(10)]


def tin_recipe(init, **values):
    return {"frames": 4, "depth": 18, "dropout": 0.5, "init": str(init), **values}


@pytest.fixture(scope="module")
def trained():
    """The state dict of a TIN that was trained: no tensor has its initial value."""
    torch.manual_seed(0)
    state = tin.build(tin_recipe("none"), 10).state_dict()
    for key, value in state.items():
        if value.is_floating_point():
            state[key] = value + 0.1 * torch.randn_like(value)
    return state


def load_into_tin(tmp_path, file, kept, categories=CLASSES, **values):
    """Load a file of these tensors into a new TIN; return what load_init says. The TIN must hold
    the file's tensors, and its own initial values where the key fits the pattern `kept`."""
    torch.save({"model": file, "config": {"categories": CLASSES}}, tmp_path / "init.pt")
    recipe = tin_recipe(tmp_path / "init.pt", **values)
    torch.manual_seed(1)
    model = tin.build(recipe, len(categories))
    before = copy.deepcopy(model.state_dict())
    message = train.load_init(tin, model, recipe, categories)

    theirs = evaluate.convert(tin, {"model": file}, "init.pt")
    for key, value in model.state_dict().items():
        expected = theirs.get(key)
        if re.match(kept, key):
            expected = before[key]
        assert torch.equal(value, expected), key
    return message


def test_init_takes_our_own_checkpoint_whole(tmp_path, trained):
    message = load_into_tin(tmp_path, trained, "nothing")
    assert message.endswith("init.pt: 186 of 186 tensors read")


@pytest.mark.parametrize("origin", [tsn, tsm])
def test_init_starts_tin_from_tsn_and_tsm(tmp_path, origin):
    """All but TIN's small networks, of which these files know nothing."""
    recipe = {**tin_recipe("none"), "backbone": "resnet18", "shift_every": 1}
    tensors = origin.build(recipe, 10).state_dict()
    file = {f"module.{key}": value for key, value in tensors.items()}  # as DDP names them
    message = load_into_tin(tmp_path, file, "interlace")
    assert message.splitlines()[0].endswith("122 of 186 tensors read")
    assert "keeps its initial value: interlace.layer1.0.offset_conv.weight is not in the" in message
    assert message.endswith("and 61 others")


def test_init_with_another_number_of_classes_keeps_the_new_classifier(tmp_path, trained):
    message = load_into_tin(tmp_path, trained, "fc", CLASSES[:7])
    assert message.splitlines()[0].endswith("184 of 186 tensors read")
    assert "keeps its initial value: fc.weight is " in message


def test_init_with_classes_of_other_names_keeps_the_new_classifier(tmp_path, trained):
    """Its size fits; nothing but the names tells that its rows mean other classes."""
    message = load_into_tin(tmp_path, trained, "fc", CLASSES[::-1])
    assert message.splitlines()[1:] == [
        "  keeps its initial value: fc.weight is for other classes in the file",
        "  keeps its initial value: fc.bias is for other classes in the file"]


def test_init_with_another_number_of_frames_keeps_the_layers_over_time(tmp_path, trained):
    over_time = r".*offset_(fc1\.(weight|bias)|fc2\.weight)"
    message = load_into_tin(tmp_path, trained, over_time, frames=8)
    assert "interlace.layer1.0.offset_fc1.bias is (4,) in the file, (8,) in the network" in message


@pytest.mark.parametrize("removed, values, said", [
    (r"backbone\.bn1\.bias", {}, "backbone.bn1.bias is not in the file; the file is of another"),
    (r".*layer3\.0\.offset_conv\.bias", {}, "layer3.0.offset_conv.bias is not in the file"),
    ("nothing", {"depth": 50}, "(64, 64, 3, 3) in the file, (64, 64, 1, 1) in the network"),
    ("backbone|interlace", {"categories": CLASSES[::-1]}, "nothing in the file fits this network"),
    ("backbone", {}, "backbone.conv1.weight is not in the file"),
])
def test_init_refuses_what_would_train_from_nothing(tmp_path, trained, removed, values, said):
    file = {key: trained[key] for key in trained if not re.match(removed, key)}
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        load_into_tin(tmp_path, file, removed, **values)
    assert str(error.value).startswith(f"--init {tmp_path}/init.pt: ")
    assert "\n" not in str(error.value)


def test_init_imagenet_offline_names_a_place_and_reads_a_file_there(tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    model = tin.build(tin_recipe("imagenet"), 10)
    with pytest.raises(OSError) as error:
        train.load_init(tin, model, tin_recipe("imagenet"), CLASSES)
    place = tmp_path / "hub" / "checkpoints"
    assert "resnet18-f37072fd.pth (<urlopen error no route to host>)" in str(error.value)
    assert f"put it into {place}, or pass --init none" in str(error.value)

    weights = torchvision.models.resnet18().state_dict()
    torch.save(weights, place / "resnet18-f37072fd.pth")
    train.load_init(tin, model, tin_recipe("imagenet"), CLASSES)
    for key, value in model.backbone.state_dict().items():
        assert torch.equal(value, weights[key]), key


# ---- writing a checkpoint


def test_a_checkpoint_is_replaced_in_one_step(tmp_path):
    """Who has the previous one open can still read it; it was not written over."""
    train.save(tmp_path / "last.pt", {"step": 1})
    before = (tmp_path / "last.pt").read_bytes()
    with open(tmp_path / "last.pt", "rb") as previous:
        train.save(tmp_path / "last.pt", {"step": 2})
        assert previous.read() == before
    assert read(tmp_path)["step"] == 2


@pytest.mark.parametrize("limit", [0, 300_000])
def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path, limit):
    """A limit on the size of files stands for the disk; the checkpoint has 400,000 bytes."""
    resource = pytest.importorskip("resource")
    train.save(tmp_path / "best.pt", {"step": 1})
    before = (tmp_path / "best.pt").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(OSError, match="best.pt: could not be written"):
            train.save(tmp_path / "best.pt", {"step": 2, "tensor": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "best.pt").read_bytes() == before
    assert os.listdir(tmp_path) == ["best.pt"]


# ---- whole runs

# The last three flags make a difference in every step.
RUN = ["--model", "tiny", "--data", "toy", "--device", "cpu", "--workers", "0",
       "--warmup", "3", "--clip-grad", "0.5", "--class-weight", "sqrt"]


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """A folder of the scripts, tiny.py beside them, and a toy of 32 videos."""
    folder = scripts_with_tiny(tmp_path_factory.mktemp("scripts"))
    data.draw_toy(folder / "toy", videos=32)
    return folder


@pytest.fixture
def folder(scripts, monkeypatch):
    """The same, as the current folder, where --model tiny is found in this process too."""
    monkeypatch.chdir(scripts)
    monkeypatch.syspath_prepend(scripts)
    monkeypatch.setattr(evaluate, "__file__", str(scripts / "evaluate.py"))
    sys.modules.pop("tiny", None)
    yield scripts
    sys.modules.pop("tiny", None)


def train_tiny(out, *flags):
    """train.py in this process -> its exit status."""
    return call("train", *RUN, "--out", out, *flags)


@pytest.fixture
def straight(folder):
    """The folder of an uninterrupted run, trained once."""
    if not (folder / "straight").exists():
        assert train_tiny("straight") == 0
    return folder / "straight"


def read(folder, name="last.pt"):
    return torch.load(folder / name, weights_only=True)


def read_log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def assert_equal(ours, theirs, place):
    """Two checkpoints, or two parts of them, bit for bit."""
    if isinstance(ours, dict):
        assert list(ours) == list(theirs), place
        for key in ours:
            assert_equal(ours[key], theirs[key], f"{place} {key}")
    elif isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs), place
    else:
        assert ours == theirs, place


def assert_same_run(ours, theirs):
    """The same checkpoints and the same log, apart from what a clock says."""
    for name in ("last.pt", "best.pt"):
        assert_equal(read(ours, name), read(theirs, name), name)
    our_log = read_log(ours)
    their_log = read_log(theirs)
    for line in our_log + their_log:
        line.pop("clips_per_s", None)
        line.pop("data_share", None)
    assert our_log == their_log
    assert sorted(os.listdir(ours)) == ["best.pt", "last.pt", "log.jsonl"]


def test_a_run_as_a_newcomer_starts_it(scripts, tmp_path):
    """The script itself, started in another folder: what it logs, saves and prints."""
    run = python(scripts / "train.py", "--model", "tiny", "--data", scripts / "toy", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    out = tmp_path / "runs" / "tiny"
    assert sorted(os.listdir(out)) == ["best.pt", "last.pt", "log.jsonl"]

    # the log
    lines = read_log(out)
    steps = [line for line in lines if "loss" in line]
    validations = [line for line in lines if "val_map" in line]
    assert [(line["epoch"], line["step"]) for line in steps] == [(5, 20), (6, 24)]
    assert [(line["epoch"], line["step"]) for line in validations] == [
        (1, 4), (2, 8), (3, 12), (4, 16), (5, 20), (6, 24)]
    for line in steps:
        assert list(line) == ["epoch", "step", "loss", "lr", "grad_norm", "clips_per_s",
                              "data_share"]
        assert 0 <= line["data_share"] <= 1
        assert line["lr"] == pytest.approx(0.1 * (1 + math.cos(math.pi * (line["step"] - 1) / 24)))
    for line in validations:
        assert list(line) == ["epoch", "step", "val_map"]

    # the checkpoints
    last = read(out)
    best = read(out, "best.pt")
    assert set(last) == {"model", "optimizer", "scaler", "epoch", "iteration", "best_map",
                         "best_epoch", "validated", "losses", "config", "class_counts"}
    assert (last["epoch"], last["iteration"], last["validated"]) == (6, 24, 24)
    top = max(validations, key=lambda line: line["val_map"])
    assert last["best_map"] == best["best_map"] == top["val_map"]
    assert last["best_epoch"] == best["best_epoch"] == best["epoch"] == top["epoch"]
    videos = data.VideoList(scripts / "toy", "train", None, train=False)
    assert last["class_counts"] == videos.class_counts.tolist()
    config = last["config"]
    assert config["recipe"]["lr"] == 0.2
    assert config["recipe"]["scales"] == [32]
    del config["recipe"]
    assert config == {"model": "tiny", "seed": 0, "categories": data.TOY_CATEGORIES, "videos": 32,
                      "list_hash": videos.hash}

    # what a person reads
    printed = run.stdout.splitlines()
    for line in [
        "  lr               0.2",
        "tiny: 570 parameters, 10 classes",
        "batch 8 = 1 processes x 8 clips; 4 steps an epoch, 24 in all, from 0",
        "learning rate 0.2 x 8 / 8 = 0.2",
        "loss bce, scale 5.88235; classes / labels per video: 5.8",
        "init none: every tensor has its initial value",
        f"epoch 3  val mAP {100 * validations[2]['val_map']:.2f}",
    ]:
        assert line in printed
    assert re.search(r"\nepoch 5 step 20/24  loss \d\.\d+ \(0\.\d+ unscaled\)  lr 0.0", run.stdout)
    assert printed[-1] == f"best val mAP {100 * top['val_map']:.2f} (epoch {top['epoch']})"


def trained_by_hand(recipe, processes):
    """The state dict of tiny after a whole run, written out. Every process has its own share of the
    batch, dropout and running means; they step by the mean of their gradients. The parts that are
    train.py's were tested above."""
    import tiny
    videos = data.VideoList("toy", "train", recipe, train=True)
    weight = train.class_weights(videos.class_counts, "sqrt")
    torch.manual_seed(0)
    nets = [tiny.build(recipe, 10)]
    for _ in range(1, processes):
        nets.append(copy.deepcopy(nets[0]))
    shares = [train.batches(32, 8, 0, 0, 24, rank, processes) for rank in range(processes)]
    optimizers = [torch.optim.SGD(net.parameters(), momentum=0.9, weight_decay=5e-4)
                  for net in nets]

    for step in range(24):
        gradients = []
        for rank, net in enumerate(nets):
            clips, labels, _ = zip(*[videos[index] for index in next(shares[rank])])
            clips = data.normalise(torch.stack(clips), recipe["mean"], recipe["std"])
            torch.manual_seed(train.step_seed(0, step, rank))
            loss = train.scaled_bce(net(clips), torch.stack(labels), 10 / 1.7, weight)
            gradients.append(torch.autograd.grad(loss, list(net.parameters())))
        for net, optimizer in zip(nets, optimizers):
            for i, parameter in enumerate(net.parameters()):
                parameter.grad = sum(gradient[i] for gradient in gradients) / processes
            torch.nn.utils.clip_grad_norm_(net.parameters(), 0.5)
            optimizer.param_groups[0]["lr"] = train.learning_rate(step, 24, recipe)
            optimizer.step()
    return nets[0].state_dict()


def assert_trained_by_hand(folder, processes):
    checkpoint = read(folder)
    expected = trained_by_hand(checkpoint["config"]["recipe"], processes)
    assert list(checkpoint["model"]) == list(expected)  # no prefix of DDP's
    for key, value in expected.items():
        close(checkpoint["model"][key], value, 1e-3)


def test_a_run_takes_the_steps_that_its_recipe_says(straight):
    assert_trained_by_hand(straight, 1)


def test_the_best_epoch_is_the_first_of_equals(folder):
    """At a learning rate of 0 and without batch norm every epoch scores alike."""
    assert train_tiny("equal", "--lr", 0, "--no-norm", "--epochs", 2) == 0
    assert read(folder / "equal")["best_epoch"] == 1
    assert read(folder / "equal", "best.pt")["iteration"] == 4


def test_cross_entropy_trains_on_a_single_label_list(folder, capsys):
    change_list("single", "train", lambda lines: [line.split(",")[0] for line in lines])
    assert train_tiny("single/run", "--data", "single", "--loss", "ce", "--class-weight", "none",
                      "--epochs", 1) == 0
    printed = capsys.readouterr().out
    assert re.search(r"epoch 1  val mAP \d+\.\d\d  top-1 \d+\.\d\d  top-5 \d+\.\d\d\n", printed)
    assert read_log(folder / "single/run")[0]["loss"] == pytest.approx(math.log(10), rel=0.5)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_half_precision_trains_almost_alike(folder, straight, amp):
    assert train_tiny(amp, "--amp", amp) == 0
    for ours, theirs in zip(read_log(folder / amp), read_log(straight)):
        if "loss" in ours:
            assert ours["loss"] != theirs["loss"]
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.02)
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=0.1)
    model = read(folder / amp)["model"]
    for key, value in read(straight)["model"].items():
        assert model[key].dtype == value.dtype
        close(model[key].float(), value.float(), 0.1)


def test_half_precision_may_skip_the_first_step(folder):
    """The gradient overflows until the scaler's factor, 65536 at first, has shrunk. Fresh memory
    holds NaN here, so that a momentum made of it would show."""
    torch.use_deterministic_algorithms(True)
    try:
        assert train_tiny("overflow", "--amp", "fp16", "--loss-scale", 1000, "--lr", 0.001) == 0
    finally:
        torch.use_deterministic_algorithms(False)
    last = read(folder / "overflow")
    assert last["scaler"]["scale"] < 65536
    for key, value in last["model"].items():
        assert value.isfinite().all(), key


@pytest.mark.parametrize("flags, tolerance", [
    (["--channels-last"], 1e-3), (["--amp", "fp16"], 0.1)])
def test_another_layout_or_precision_may_resume_a_run(folder, straight, flags, tolerance,
                                                      monkeypatch):
    """Ctrl-C in the second validation; then the run goes on without the flags. A momentum in the
    wrong memory layout would change its values in the first digit."""
    predict = evaluate.predict
    calls = []

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return predict(*arguments, **options)

    out = f"resumed{len(flags)}"
    monkeypatch.setattr(evaluate, "predict", interrupted)
    assert train_tiny(out, *flags) == 130
    assert read(folder / out)["iteration"] == 8
    assert train_tiny(out, "--resume") == 0
    for key, value in read(straight)["model"].items():
        close(read(folder / out)["model"][key], value, tolerance)


def test_a_compiled_network_is_saved_under_the_same_names(folder, straight, monkeypatch):
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda net: compile(net, backend="eager"))
    assert train_tiny("compiled", "--compile") == 0
    model = read(folder / "compiled")["model"]
    assert list(model) == list(read(straight)["model"])
    for key, value in read(straight)["model"].items():
        close(model[key], value, 1e-3)


# ---- the flags


def parse(monkeypatch, *flags):
    """The recipe of a run of tiny with these flags."""
    monkeypatch.setattr(sys, "argv", ["train.py", "--model", "tiny", *flags])
    return train.parse_arguments()[2]


def test_another_loss_has_the_scale_1_unless_one_is_given(folder, monkeypatch):
    """160, or the toy's 10 / 1.7, belongs to the mean over all classes."""
    assert parse(monkeypatch)["loss_scale"] == 10 / 1.7
    assert parse(monkeypatch, "--loss", "bce")["loss_scale"] == 10 / 1.7
    for loss in ("lsep", "warp", "ce"):
        assert parse(monkeypatch, "--loss", loss)["loss_scale"] == 1
    assert parse(monkeypatch, "--loss", "lsep", "--loss-scale", "3")["loss_scale"] == 3


def test_iterations_are_counted_at_the_reference_batch_and_milestones_in_epochs(folder, capsys):
    """10 steps of 8 clips are 20 of 4, at half the rate."""
    assert train_tiny("counted", "--iterations", 10, "--batch", 4, "--schedule", "step",
                      "--milestones", 1, 2, "--warmup", 0) == 0
    printed = capsys.readouterr().out
    assert "8 steps an epoch, 20 in all" in printed
    assert "learning rate 0.2 x 4 / 8 = 0.1" in printed
    lines = read_log(folder / "counted")
    assert [(line["epoch"], line["step"]) for line in lines] == [(1, 8), (2, 16), (3, 20), (3, 20)]
    assert lines[2]["lr"] == pytest.approx(0.001)


# ---- killed, interrupted, restarted

STOPPED = '''"""Run train.py and end it at one moment: AT="0 step 7" python stopped.py train.py ...

AT       the process, the place and the how many-th call there; several, separated by commas, are
         for the first start, for torchrun's first restart, ...
SIGNAL   SIGKILL, to this process; or SIGINT, also to its workers, as a terminal sends it
START    how the workers are started
"""
import multiprocessing
import os
import runpy
import signal
import sys

import torch

import evaluate

PLACES = {
    "step": (torch.nn.utils, "clip_grad_norm_"),
    "scoring": (evaluate, "score_views"),
    "saving": (torch, "save"),
}


def end_at(place, number):
    module, name = PLACES[place]
    function = getattr(module, name)
    calls = []

    def ending(*arguments, **options):
        calls.append(1)
        if len(calls) == int(number):
            if place == "saving":
                arguments[1].write_bytes(b"half of a checkpoint")
            if os.environ["SIGNAL"] == "SIGKILL":
                os.kill(os.getpid(), signal.SIGKILL)
            os.kill(0, signal.SIGINT)  # 0: the process group
        return function(*arguments, **options)

    setattr(module, name, ending)


if __name__ == "__main__":
    multiprocessing.set_start_method(os.environ.get("START", "fork"))
    if os.environ["SIGNAL"] == "SIGINT":
        os.setpgrp()
        # A shell that starts pytest in the background has it ignore Ctrl-C.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    moments = os.environ["AT"].split(",")
    start = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    if start < len(moments):
        rank, place, number = moments[start].split()
        if os.environ.get("RANK", "0") == rank:
            end_at(place, number)
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
'''


@pytest.fixture
def stopped(folder):
    (folder / "stopped.py").write_text(STOPPED)
    return folder / "stopped.py"


def test_killed_and_resumed_is_uninterrupted(stopped, folder, straight):
    """SIGKILL in mid-epoch, then during a validation, then while last.pt is written after it."""
    flags = ["train.py", *RUN, "--out", "killed", "--save-every", 3, "--resume"]
    for at, workers, iteration, validated in [
        ("0 step 8", 2, 6, 4),     # 6 is the last multiple of --save-every, in epoch 2
        ("0 scoring 1", 0, 8, 4),  # last.pt is written before the validation
        ("0 saving 2", 0, 8, 4),   # epoch 2 is logged and best.pt saved, but last.pt is not
    ]:
        run = python(stopped, *flags, "--workers", workers, cwd=folder, AT=at, SIGNAL="SIGKILL")
        assert run.returncode == -signal.SIGKILL, run.stderr
        last = read(folder / "killed")
        assert (last["iteration"], last["validated"]) == (iteration, validated)
        with open(folder / "killed" / "log.jsonl", "a") as file:
            file.write('{"epoch": 3, "st')  # as a kill in mid-line leaves it
    assert (folder / "killed" / "last.pt.part").exists()
    assert train_tiny("killed", "--save-every", 3, "--resume", "--workers", 2) == 0
    assert_same_run(folder / "killed", straight)


def test_ctrl_c_is_one_line_and_the_run_goes_on(stopped, folder, straight):
    """However the workers are started, and whether the run trains, validates or saves. Each start
    goes on from what the one before has left."""
    flags = ["train.py", *RUN, "--out", "interrupted", "--save-every", 2, "--resume",
             "--workers", 1]
    for start, at, iteration in [
        ("spawn", "0 step 3", 2),
        ("forkserver", "0 scoring 1", 4),
        ("fork", "0 saving 3", 4),  # best.pt and last.pt of epoch 1, then last.pt of step 6
    ]:
        run = python(stopped, *flags, cwd=folder, START=start, AT=at, SIGNAL="SIGINT")
        assert run.stderr == (
            "train.py: stopped; the same command with --resume goes on from OUT/last.pt\n")
        assert run.returncode == 130
        assert read(folder / "interrupted")["iteration"] == iteration
        assert not (folder / "interrupted" / "last.pt.part").exists()
    assert train_tiny("interrupted", "--save-every", 2, "--resume") == 0
    assert_same_run(folder / "interrupted", straight)


def test_ctrl_c_does_not_stop_the_workers(folder, monkeypatch):
    """In a terminal it reaches every process, and only the main process acts on it. Here it reaches
    the workers alone, those of training and those of validation."""
    def interrupt_workers(function):
        def interrupting(*arguments, **options):
            for worker in multiprocessing.active_children():
                os.kill(worker.pid, signal.SIGINT)
            return function(*arguments, **options)
        return interrupting

    # a validation of several batches, so that its worker is still needed after the first
    train_lines = (folder / "toy" / "train.txt").read_text().splitlines()
    change_list("long", "val", lambda lines: lines + train_lines)
    for module, name in ((torch.nn.utils, "clip_grad_norm_"), (evaluate, "score_views")):
        monkeypatch.setattr(module, name, interrupt_workers(getattr(module, name)))
    assert train_tiny("long/run", "--data", "long", "--workers", 1, "--epochs", 1) == 0


@pytest.fixture
def two_nodes(folder):
    """The folder of an uninterrupted run of two processes, trained once, on two nodes: two
    torchruns that know of each other by an address alone. Both are on this machine, and on a CPU,
    where batch norm is not synchronised even if the recipe asks for it."""
    if not (folder / "nodes").exists():
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2",
                   "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint",
                   f"127.0.0.1:{free_port()}", "--local-addr", "127.0.0.1",
                   "train.py", *RUN, "--out", "nodes", "--sync-bn"]
        nodes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        try:
            printed = [node.communicate(timeout=120)[0] for node in nodes]
        finally:
            for node in nodes:
                node.kill()
        assert [node.returncode for node in nodes] == [0, 0]
        assert "".join(printed).count("best val mAP") == 1
    return folder / "nodes"


def test_two_nodes_take_the_steps_of_two_processes(two_nodes):
    assert_trained_by_hand(two_nodes, 2)


def test_killed_under_torchrun_and_restarted_is_uninterrupted(stopped, folder, two_nodes):
    """torchrun ends the other process and starts both again. They resume without --resume."""
    run = torchrun(2, "--max-restarts=2", stopped, "train.py", *RUN, "--out", "restarted",
                   "--sync-bn", "--save-every", 3, "--workers", 2, cwd=folder,
                   AT="1 step 8,0 scoring 1", SIGNAL="SIGKILL")
    assert run.returncode == 0, run.stderr
    assert "24 in all, from 6\n" in run.stdout
    assert "24 in all, from 8\n" in run.stdout
    assert_same_run(folder / "restarted", two_nodes)


def test_one_process_and_two_take_the_same_steps_when_nothing_is_random(folder):
    flags = ["--no-norm", "--dropout", 0, "--iterations", 5]
    assert train_tiny("one", *flags) == 0
    run = torchrun(2, "train.py", *RUN, "--out", "two", *flags, cwd=folder)
    assert run.returncode == 0, run.stderr
    assert "batch 8 = 2 processes x 4 clips; 4 steps an epoch, 5 in all" in run.stdout
    for key, value in read(folder / "one")["model"].items():
        close(read(folder / "two")["model"][key], value, 1e-5)
    for one, two in zip(read_log(folder / "one"), read_log(folder / "two")):
        for key in {"step", "loss", "grad_norm", "val_map"} & set(one):
            assert two[key] == pytest.approx(one[key], rel=1e-5)


def test_a_finished_run_says_so_and_changes_nothing(straight, capsys):
    before = (straight / "last.pt").read_bytes()
    assert train_tiny("straight", "--resume") == 0
    printed = capsys.readouterr().out
    last = read(straight)
    assert "finished already" in printed
    assert printed.splitlines()[-1] == (
        f"best val mAP {100 * last['best_map']:.2f} (epoch {last['best_epoch']})")
    assert (straight / "last.pt").read_bytes() == before


def test_train_starts_on_a_system_without_posix(folder):
    """As on Windows: `resource`, `fcntl` and process groups are not there."""
    (folder / "windows.py").write_text(
        "import os, runpy, sys\n"
        "sys.modules['resource'] = sys.modules['fcntl'] = None\n"
        "del os.setpgrp, os.getpgrp, os.killpg, os.fork\n"
        "del sys.argv[0]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n")
    run = python("windows.py", "train.py", *RUN, "--out", "windows", "--epochs", 1, cwd=folder)
    assert run.returncode == 0, run.stderr


# ---- what stops a run, and what is refused


def change_list(folder, split, change):
    """Make a data folder with the toy's frames and lists, of which one goes through `change`, a
    function of its lines."""
    shutil.copytree("toy", folder, ignore=shutil.ignore_patterns("frames"))
    os.symlink(os.path.abspath("toy/frames"), f"{folder}/frames")
    path = Path(folder, f"{split}.txt")
    lines = change(path.read_text().splitlines())
    data.write_lines(path, lines)


@pytest.fixture
def broken(folder):
    """The data folder "broken" has a video of damaged frames, which the second of two processes
    meets in the first step. Returns its place in the list and the beginning of a frame's name."""
    row = next(train.batches(32, 8, 0, 0, 1, 1, 2))[0]
    if not (folder / "broken").exists():
        frames = folder / "toy" / "frames" / "train"
        shutil.copytree(frames / "00000", frames / "cut")
        for frame in (frames / "cut").iterdir():
            os.truncate(frame, 200)
        change_list("broken", "train", lambda lines: [
            *lines[:row], "train/cut 24 3", *lines[row + 1 :]])
    return f"broken/train.txt:{row + 1}: broken/frames/train/cut/img_"


def test_a_broken_video_in_one_of_two_processes_is_named_with_its_rank(broken, folder):
    run = torchrun(2, "train.py", *RUN, "--data", "broken", "--out", "broken/two", cwd=folder)
    assert run.returncode == 1  # torchrun's
    assert re.search(r"exitcode *: 2", run.stderr)
    lines = [line for line in run.stderr.splitlines() if line.startswith("[rank 1] train.py: ")]
    assert len(lines) == 1
    assert broken in lines[0]


def test_skip_broken_says_so_and_goes_on(broken, capsys):
    assert train_tiny("broken/skip", "--data", "broken", "--skip-broken", "--epochs", 1) == 0
    line = capsys.readouterr().err.strip()
    assert line.startswith(broken)
    assert line.endswith("skipped, the next video is taken")


@pytest.mark.parametrize("flags", [[], ["--amp", "fp16"]])
def test_a_loss_that_is_not_finite_stops_the_run_before_a_save(folder, capsys, flags):
    """The first step is finite; its update makes the second one infinite."""
    out = folder / f"infinite{len(flags)}"
    assert train_tiny(out, "--lr", 1e30, "--save-every", 1, *flags) == 2
    message = "is not finite at step 2 or shortly before, and no checkpoint"
    assert message in capsys.readouterr().err
    last = read(out)
    assert (last["epoch"], last["iteration"]) == (0, 1)
    assert all(value.isfinite().all() for value in last["model"].values())


def test_a_batch_that_the_processes_cannot_share_is_refused():
    with pytest.raises(ValueError, match="--batch 8: is split over 3 processes"):
        train.count_steps({"batch": 8}, range(32), 3)


def test_the_way_out_starts_a_new_run_from_the_weights(folder, straight, capsys):
    assert train_tiny("new", "--init", "straight/last.pt", "--lr", 0, "--epochs", 1) == 0
    assert "init straight/last.pt: 9 of 9 tensors read\n" in capsys.readouterr().out
    weight = read(folder / "new")["model"]["fc.weight"]
    assert torch.equal(weight, read(straight)["model"]["fc.weight"])
