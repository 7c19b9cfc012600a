"""The losses are the golden ones, the learning rates those of the report, and a run that is killed
and resumed is the uninterrupted run, bit for bit.

    python -m pytest tests/test_train.py

Whole runs train conftest.TINY for 6 epochs on 32 toy videos in batches of 8: 4 steps an epoch, 24
in all. Most call train.main in this process, because a new one takes seconds to import torch.

tests/golden/losses.npz holds nine problems, described by its "notes", and their losses in float64.
"""
import copy
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import urllib.error
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from unittest.mock import Mock

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
from conftest import ROOT, call, close, fill, free_port, python, scripts_with_tiny, torchrun, write

STOPPED = ROOT / "tests" / "stopped.py"
ctrl_c = Mock(side_effect=KeyboardInterrupt)


# ---- the folder in which all tests run


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """The scripts, tiny.py beside them, and "toy": 32 videos to train and 8 to validate."""
    folder = scripts_with_tiny(tmp_path_factory.mktemp("scripts"))
    data.draw_toy(folder / "toy", videos=32)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(folder)
        patch.setattr(evaluate, "__file__", str(folder / "evaluate.py"))  # beside it are the models
        yield folder
    sys.modules.pop("tiny", None)


def toy_lines(list_name):
    return Path("toy", f"{list_name}.txt").read_text().splitlines()


def toy_with(name, **lists):
    """Make a data folder with the toy's frames and lists. lists: the lines of those that differ."""
    shutil.copytree("toy", name, ignore=shutil.ignore_patterns("frames"))
    os.symlink(os.path.abspath("toy/frames"), f"{name}/frames")
    for list_name, lines in lists.items():
        data.write_lines(Path(name, f"{list_name}.txt"), lines)


# ---- losses: three classes, by hand


def test_zero_logits_cost_160_ln_2():
    """Each class costs ln 2, and their mean is multiplied by 160."""
    loss = train.scaled_bce(torch.zeros(1, 3), torch.tensor([[0, 1, 0]]))
    close(loss, 160 * math.log(2), 1e-6)


def test_lsep_by_hand():
    """log(1 + sum of exp(other - label)). The label is at 1, the others at 0 and 2."""
    loss = train.lsep(torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([[1, 0, 0]]))
    close(loss, math.log(1 + math.exp(-1) + math.exp(1)), 1e-6)


@pytest.mark.parametrize("others, loss", [
    ([0.5, 2.0], (1 + 1 / 2) * (0.5 + 2) / 2),  # two violators
    ([-0.5, 2.0], 1 * 2),                       # one
    ([-0.5, 0.0], 0),                           # none
])
def test_warp_by_hand(others, loss):
    """The label is at 1 and the margin is 1, so a class above 0 violates it, by its own value. The
    loss of V violators is (1 + 1/2 + ... + 1/V) times their mean."""
    assert train.warp(torch.tensor([[1.0, *others]]), torch.tensor([[1, 0, 0]])) == loss


def test_class_weights_by_hand():
    """A class weighs its number of videos, divided by the mean number, here 4, or the root of
    that."""
    counts = np.array([2, 4, 6])
    close(train.class_weights(counts, "none"), [1, 1, 1], 1e-6)
    close(train.class_weights(counts, "ratio"), [1 / 2, 1, 3 / 2], 1e-6)
    close(train.class_weights(counts, "sqrt"), [0.5**0.5, 1, 1.5**0.5], 1e-6)


def test_a_class_without_videos_weighs_as_much_as_the_rarest():
    counts = np.array([2, 4, 6, 0])  # the mean is 3
    close(train.class_weights(counts, "ratio"), [2 / 3, 4 / 3, 2, 2 / 3], 1e-6)


# ---- losses: golden figures, finite differences, extremes

GOLDEN = dict(np.load(ROOT / "tests" / "golden" / "losses.npz"))
PROBLEMS = range(9)
SMALL_PROBLEMS = [number for number in PROBLEMS if GOLDEN[f"logits_{number}"].size < 100]
LOSSES = [train.scaled_bce, train.lsep, train.warp]


def problem(number):
    """Logits and labels of a golden problem, both float64 (B, K)."""
    logits = torch.from_numpy(GOLDEN[f"logits_{number}"])
    return logits.requires_grad_(), torch.from_numpy(GOLDEN[f"targets_{number}"])


@pytest.mark.parametrize("number", PROBLEMS)
def test_losses_are_the_golden_ones(number):
    logits, labels = problem(number)
    close(train.warp(logits, labels), GOLDEN[f"warp_exact_{number}"], 1e-12)
    for loss, name in [(train.scaled_bce, "bce160"), (train.lsep, "lsep")]:
        value = loss(logits, labels)
        close(value, GOLDEN[f"{name}_{number}"], 1e-12)
        close(torch.autograd.grad(value, logits)[0], GOLDEN[f"{name}_grad_{number}"], 1e-12)
    for kind in ("sqrt", "ratio"):
        weight = train.class_weights(GOLDEN[f"counts_{number}"], kind)  # float32
        loss = train.scaled_bce(logits, labels, weight=weight)
        close(loss, GOLDEN[f"bce160_{kind}_{number}"], 1e-6)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("number", SMALL_PROBLEMS)
def test_gradients_are_finite_differences(loss, number):
    torch.autograd.gradcheck(loss, problem(number), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_losses_are_finite_far_out(loss, size):
    """The label is at `size`, the others at -size: below 0 the label is ranked last."""
    logits = torch.tensor([[size, -size, -size]], requires_grad=True)
    value = loss(logits, torch.tensor([[1, 0, 0]]))
    value.backward()
    assert value.isfinite()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("loss", [train.lsep, train.warp])
def test_a_video_with_all_labels_or_none_has_nothing_to_rank(loss):
    logits = torch.zeros(2, 3, requires_grad=True)
    value = loss(logits, torch.tensor([[1, 1, 1], [0, 0, 0]]))
    value.backward()
    assert value == 0
    assert torch.equal(logits.grad, torch.zeros(2, 3))


def test_the_recipes_loss_is_computed_in_float32():
    """The network's output is in half precision under --amp. loss_scale multiplies every loss."""
    logits, labels = problem(5)
    logits = logits.half()
    exact = logits.double()
    for name, expected in [
        ("bce", train.scaled_bce(exact, labels, scale=1)),
        ("lsep", train.lsep(exact, labels)),
        ("warp", train.warp(exact, labels)),
        ("ce", F.cross_entropy(exact, labels.argmax(dim=1))),
    ]:
        loss = train.compute_loss(logits, labels, {"loss": name, "loss_scale": 7.0})
        close(loss, 7 * expected.float(), 1e-5)


# ---- scaling the loss


def weights_after_50_steps(scale, lr, decay, max_norm):
    """Of a linear classifier, always with the same first weights and the same batches."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(20, 6).double()
    optimizer = torch.optim.SGD(layer.parameters(), lr, momentum=0.9, weight_decay=decay)
    for _ in range(50):
        optimizer.zero_grad()
        logits = layer(torch.randn(8, 20).double())
        train.scaled_bce(logits, torch.rand(8, 6) > 0.7, scale).backward()
        torch.nn.utils.clip_grad_norm_(layer.parameters(), max_norm)
        optimizer.step()
    return layer.weight


@pytest.mark.parametrize("rate_decay, max_norm, equal", [
    (0.05, math.inf, False),
    (0.05 / 160, math.inf, True),
    (0.05 / 160, 20, False),
], ids=["same decay: differs", "decay / 160: equal", "clipped: differs"])
def test_scaling_the_loss_is_not_scaling_the_learning_rate(rate_decay, max_norm, equal):
    """A step is lr * (gradient + decay * w): the rate x 160 multiplies the decay too. Clipping
    shortens only the gradient of the scaled loss."""
    loss_scaled = weights_after_50_steps(160, 0.001, 0.05, max_norm)
    rate_scaled = weights_after_50_steps(1, 160 * 0.001, rate_decay, max_norm)
    assert torch.allclose(rate_scaled, loss_scaled, rtol=1e-6) == equal


# ---- learning rates

SLOWFAST = dict(lr=0.2, batch=1024, reference_batch=1024, schedule="cosine", warmup=8000)


def test_image_models_divide_their_rate_after_10_and_20_epochs():
    """With 7 steps an epoch."""
    rates = [train.learning_rate(step, 30 * 7, 7, train.RECIPE) for step in range(30 * 7)]
    assert rates == pytest.approx([0.01] * 70 + [0.001] * 70 + [0.0001] * 70)


@pytest.mark.parametrize("step, rate", [
    (0, 0.02),                      # a tenth of 0.2
    (4000, (0.02 + 0.199027) / 2),  # half of the warm-up
    (8000, 0.199027),               # 0.2 (1 + cos(pi 8000 / 180,000)) / 2
    (90_000, 0.1),                  # half of the cosine
    (179_999, 1.5231e-11),          # 0.2 (1 + cos(pi 179,999 / 180,000)) / 2
])
def test_slowfasts_rate_warms_up_for_8000_steps_then_follows_a_cosine(step, rate):
    """A recipe's steps are for reference_batch: half the batch needs double, at half the rate. (A
    cosine does not ask for the steps of an epoch.)"""
    ours = train.learning_rate(step, total=180_000, steps_per_epoch=1, recipe=SLOWFAST)
    assert ours == pytest.approx(rate, rel=1e-4)
    half = train.learning_rate(2 * step, 360_000, 1, {**SLOWFAST, "batch": 512})
    assert half == pytest.approx(ours / 2)


# ---- the order of the videos


def test_an_epoch_is_a_permutation_that_the_seed_decides():
    """Of five videos in batches of two, each epoch leaves one out: here epoch 0 video 1. The
    figures are fixed, so that older runs can be resumed."""
    values = dict(num_videos=5, batch=2, start=0, total=3, rank=0, world=1)
    steps = [[(0, 2), (0, 4)], [(0, 3), (0, 0)], [(1, 1), (1, 4)]]
    assert list(train.batches(seed=0, **values)) == steps  # (epoch, video)
    assert list(train.batches(seed=1, **values)) != steps


def test_every_step_of_every_process_has_its_own_seed():
    seeds = {train.step_seed(*numbers) for numbers in np.ndindex(3, 50, 4)}  # seed, step, rank
    assert len(seeds) == 600


# ---- first weights

CLASSES = [f"class {k}" for k in range(10)]
TIN_RECIPE = {"frames": 4, "backbone": "resnet18", "dropout": 0.5, "shift_every": 1,
              "init": "init.pt"}
NO_KEY = "$"  # a pattern that matches no key


@pytest.fixture(scope="module")
def trained():
    """The tensors of a TIN that was trained: none has its initial value. 166 count, 64 of them in
    `interlace` and 2 in `fc`; batch norm's num_batches_tracked does not count."""
    return fill(tin.build(TIN_RECIPE, 10)).state_dict()


def load_into_tin(tensors, kept=NO_KEY, categories=CLASSES, ours=True, **values):
    """Load init.pt, our own checkpoint or somebody else's, into a new TIN; return what load_init
    says. Keys that match `kept` must have their initial values, and all others the file's."""
    checkpoint = {"state_dict": tensors}
    if ours:
        config = {"model": "tin", "recipe": TIN_RECIPE, "categories": CLASSES}
        checkpoint = {"model": tensors, "config": config}
    torch.save(checkpoint, "init.pt")
    recipe = {**TIN_RECIPE, **values}
    model = tin.build(recipe, len(categories))
    before = copy.deepcopy(model.state_dict())
    message = train.load_init(tin, model, recipe, categories)

    for key, value in model.state_dict().items():
        expected = before[key]
        if not re.match(kept, key) and not key.endswith("num_batches_tracked"):
            expected = tensors[key]
        assert torch.equal(value, expected), key
    return message


def test_init_takes_our_own_checkpoint_whole(trained):
    assert load_into_tin(trained) == "init init.pt: 166 of 166 tensors read"


@pytest.mark.parametrize("origin", [tsn, tsm])
def test_init_starts_tin_from_tsn_and_tsm(origin):
    """All but TIN's small networks, which these files lack; the message names three of the 64."""
    tensors = fill(origin.build(TIN_RECIPE, 10)).state_dict()
    lines = load_into_tin(tensors, kept="interlace", ours=False).splitlines()
    assert lines[:2] == [
        "init init.pt: 102 of 166 tensors read",
        "  keeps its initial value: interlace.layer1.0.offset_conv.weight is not in the file"]
    assert lines[4:] == ["  and 61 others"]


def test_init_does_not_read_a_classifier_of_other_classes(trained):
    message = load_into_tin(trained, kept="fc", categories=CLASSES[:7], ours=False)
    assert message.startswith("init init.pt: 164 of 166 tensors read\n  keeps its initial value: "
                              "fc.weight is (10, 512) in the file, (7, 512) in the network\n")
    # Where its size fits, only the names tell that its rows mean other classes.
    message = load_into_tin(trained, kept="fc", categories=CLASSES[::-1])
    assert "keeps its initial value: fc.weight is for other classes in the file\n" in message


def test_init_does_not_read_layers_over_other_frames(trained):
    message = load_into_tin(trained, kept=r".*offset_(fc1\.(weight|bias)|fc2\.weight)", frames=8)
    assert "interlace.layer1.0.offset_fc1.bias is (4,) in the file, (8,) in the network" in message
    assert message.endswith(
        "note: init.pt was trained with other settings: frames 4 there, 8 here")


@pytest.mark.parametrize("removed, backbone, words", [
    # one tensor, where the file has the others of its layer
    (r".*layer3\.0\.offset_conv\.bias", "resnet18", "layer3.0.offset_conv.bias is not in the file"),
    # a convolution of another size
    (NO_KEY, "resnet50", "(64, 64, 3, 3) in the file, (64, 64, 1, 1) in the network; the file "),
    # the backbone: 64 + 2 of 166 tensors are left, fewer than 40 %
    ("backbone", "resnet18", "only 66 of 166 tensors fit; for example, backbone.conv1.weight is"),
])
def test_init_refuses_a_file_that_does_not_fit(trained, removed, backbone, words):
    tensors = {key: trained[key] for key in trained if not re.match(removed, key)}
    with pytest.raises(ValueError, match=f"^--init init.pt: .*{re.escape(words)}"):
        load_into_tin(tensors, backbone=backbone)


def test_init_imagenet_offline_takes_a_file_put_in_place(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    error = urllib.error.URLError("no route to host")
    monkeypatch.setattr(torch.hub, "download_url_to_file", Mock(side_effect=error))
    recipe = {**TIN_RECIPE, "init": "imagenet"}
    model = tin.build(recipe, 10)
    place = tmp_path / "hub" / "checkpoints"
    with pytest.raises(OSError, match=f"no route to host.* put it into {place}, or pass"):
        train.load_init(tin, model, recipe, CLASSES)

    weights = torchvision.models.resnet18().state_dict()
    torch.save(weights, place / "resnet18-f37072fd.pth")
    train.load_init(tin, model, recipe, CLASSES)
    assert torch.equal(model.backbone.layer4[1].conv2.weight, weights["layer4.1.conv2.weight"])


# ---- whole runs

# The last four are not the defaults: check_by_hand has to follow them.
RUN = ("--model tiny --data toy --device cpu --workers 0 --save-every 3 "
       "--warmup 3 --clip-grad 0.5 --class-weight sqrt").split()


def train_tiny(out, *flags):
    """train.py in this process -> its exit status."""
    return call("train", *RUN, "--out", out, *flags)


@pytest.fixture(scope="module")
def uninterrupted(folder):
    """The folder of a run that was not stopped."""
    assert train_tiny("uninterrupted") == 0
    return folder / "uninterrupted"


def read(folder, name="last.pt"):
    return torch.load(Path(folder, name), weights_only=True)


def read_log(folder):
    return [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()]


def plain(value):
    """The same with lists in place of tensors, so that == compares all of it."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, torch.Tensor):
        return value.tolist()
    return value


def contents(folder):
    """All that a run has left, apart from what a clock says."""
    log = read_log(folder)
    for line in log:
        line.pop("clips_per_s", None)
        line.pop("data_share", None)
    return plain(read(folder)), plain(read(folder, "best.pt")), log, sorted(os.listdir(folder))


def close_weights(folder, expected, tolerance):
    model = read(folder)["model"]
    assert list(model) == list(expected)  # no prefix of DDP's or torch.compile's
    for key, value in expected.items():
        assert model[key].dtype == value.dtype
        close(model[key], value, tolerance)


def test_the_default_run_as_on_windows(folder, tmp_path):
    """From another folder, without `resource`, `fcntl`, fork and process groups."""
    Path("windows.py").write_text(
        "import os, runpy, sys\n"
        "sys.modules['resource'] = sys.modules['fcntl'] = None\n"
        "del os.setpgrp, os.getpgrp, os.killpg, os.fork\n"
        "del sys.argv[0]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n")
    run = python(folder / "windows.py", folder / "train.py", "--model", "tiny",
                 "--data", folder / "toy", "--workers", 0, cwd=tmp_path)
    assert run.returncode == 0, run.stderr

    # the log: a line of steps and one of the validation for every epoch
    out = tmp_path / "runs" / "tiny"
    log = read_log(out)
    assert set(log[0]) == {"epoch", "step", "loss", "lr", "grad_norm", "clips_per_s", "data_share"}
    val_maps = {line["step"]: line["val_map"] for line in log if "val_map" in line}
    assert [line["step"] for line in log[::2]] == list(val_maps) == [4, 8, 12, 16, 20, 24]

    # the checkpoints
    last = read(out)
    assert set(last) == {"model", "optimizer", "scaler", "epoch", "iteration", "validated",
                         "best_map", "best_epoch", "config", "class_counts"}
    assert (last["epoch"], last["iteration"], last["validated"]) == (6, 24, 24)
    assert last["best_map"] == read(out, "best.pt")["best_map"] == max(val_maps.values())
    assert sorted(os.listdir(out)) == ["best.pt", "last.pt", "log.jsonl"]


def check_by_hand(folder, processes, max_norm):
    """The run of this folder has the weights and the log of the same steps, written out here: each
    process has its share of the batch and its own dropout, and all step by the mean gradient."""
    import tiny
    recipe = read(folder)["config"]["recipe"]
    videos = data.VideoList("toy", "train")
    clips = data.TrainClips(videos, recipe, seed=0)
    weight = train.class_weights(videos.class_counts, "sqrt")
    torch.manual_seed(0)
    net = tiny.build(recipe, 10)
    optimizer = torch.optim.SGD(net.parameters(), momentum=0.9, weight_decay=5e-4)

    log = []  # (step, mean loss, norm of the gradient)
    losses = []  # since the last line
    batches = train.batches(num_videos=32, batch=8, seed=0, start=0, total=24, rank=0, world=1)
    for step, batch in enumerate(batches):
        for rank in range(processes):
            share = [clips[index] for index in batch[rank::processes]]
            frames, labels = torch.utils.data.default_collate(share)
            frames = data.normalise(frames, recipe["mean"], recipe["std"])
            buffers = {}  # batch norm's running means: only process 0 updates those of `net`
            if rank > 0:
                buffers = copy.deepcopy(dict(net.named_buffers()))  # lost after the step
            torch.manual_seed(train.step_seed(0, step, rank))
            logits = torch.func.functional_call(net, buffers, frames)
            # the toy's loss scale: 10 classes / about 1.7 labels
            loss = train.scaled_bce(logits, labels, 10 / 1.7, weight)
            losses.append(loss.item())
            (loss / processes).backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(net.parameters(), max_norm)
        optimizer.param_groups[0]["lr"] = train.learning_rate(step, 24, 4, recipe)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 3 == 0 or (step + 1) % 4 == 0:  # --save-every, or the end of an epoch
            log.append((step + 1, np.mean(losses), grad_norm))
            losses = []

    close_weights(folder, net.state_dict(), 1e-3)
    lines = [(line["step"], line["loss"], line["grad_norm"])
             for line in read_log(folder) if "loss" in line]
    np.testing.assert_allclose(lines, log, rtol=1e-3)


def test_a_run_takes_the_steps_of_its_recipe(uninterrupted):
    check_by_hand(uninterrupted, processes=1, max_norm=0.5)


def test_the_best_epoch_is_the_latest_of_equals(monkeypatch):
    maps = [(0.5, ""), (0.5, ""), (0.1, "")]
    monkeypatch.setattr(train, "validate", Mock(side_effect=maps))
    assert train_tiny("equal", "--epochs", 3) == 0
    assert read("equal")["best_epoch"] == 2
    assert read("equal", "best.pt")["iteration"] == 8


def test_validation_with_single_labels_and_with_none(capsys):
    """Cross-entropy also prints hit rates; a video without labels, the mAP of the others."""
    toy_with("single", train=[line.split(",")[0] for line in toy_lines("train")],
             val=["val/00032 24 -1", "val/00033 24 0"])
    flags = ["--data", "single", "--loss", "ce", "--class-weight", "none", "--epochs", 1]
    assert train_tiny("single/run", *flags) == 0
    assert re.search(r"\nepoch 1  val mAP .*  top-1 .*  top-5 .*  \(1 of 2 videos have no label",
                     capsys.readouterr().out)


def test_half_precision_may_skip_the_first_step():
    """The gradient overflows until the scaler's factor, 65536 at first, has shrunk."""
    # A skipped step would leave fused SGD's momentum unset; this mode fills it with NaN.
    torch.use_deterministic_algorithms(True)
    try:
        assert train_tiny("overflow", "--amp", "fp16", "--loss-scale", 1000, "--lr", 0.001) == 0
    finally:
        torch.use_deterministic_algorithms(False)
    last = read("overflow")
    assert last["scaler"]["scale"] < 65536
    for value in last["model"].values():
        assert value.isfinite().all()


# ---- the plan of a run


@pytest.fixture
def plan(monkeypatch, capsys):
    """A function: flags -> what is printed before the first step. A run has 24 steps."""
    def print_plan(flags):
        run = "--model tiny --data toy --device cpu --out plan".split()
        assert call("train", *run, *flags.split()) == 130  # the status after Ctrl-C
        return capsys.readouterr().out
    monkeypatch.setattr(train, "load_clips", ctrl_c)
    return print_plan


@pytest.mark.parametrize("flags, words", [
    # 10 / 1.7 is the setting; these 32 videos have a few more labels
    ("", "loss bce, scale 5.88235; classes / labels per video: 5.8\n"),
    ("--loss lsep", "loss lsep, scale 1;"),  # bce's scale belongs to a mean over all classes
    ("--loss lsep --loss-scale 3", "loss lsep, scale 3;"),
    # 10 steps of 8 clips are 20 of 4
    ("--batch 4 --iterations 10", "; 8 steps an epoch, 20 in all, from 0\n"),
    ("--batch 4", "\nlearning rate 0.2 x 4 / 8 = 0.1\n"),
    # twice the toy's size, 36, so twice its scale, 32
    ("--test-resize 72", "\nthe scales of the fuller protocols follow test_resize: [64]\n"),
    ("--warmup 5", "\nwarm-up 5 steps, 21 % of the run\n"),
    # the convolution's 224, batch norm's 16 and the classifier's 330
    ("--recipe toy", "\ntiny toy: 570 parameters, 10 classes\n"),
])
def test_the_plan_has_the_figures_of_the_run(plan, flags, words):
    assert words in plan(flags)


@pytest.mark.parametrize("words, flags, other_flags", [
    ("--reference-batch 4 would keep 0.2)\n", "--batch 4", "--batch 4 --reference-batch 4"),
    # fewer than 100 steps
    ("steps are too few to learn much", "", "--epochs 25"),
    # at least a fifth of 24 steps
    ("warning: the warm-up's", "--warmup 5", "--warmup 4"),
    # 6 epochs; without --schedule it is the cosine, which has no milestones
    ("the milestones [6, 8], so the learning rate does not ",
     "--schedule step --milestones 2 6 8", "--milestones 2 6 8"),
    ("scales of the fuller protocols", "--test-resize 72", "--test-resize 72 --scales 40"),
])
def test_the_plan_has_a_note_only_where_it_applies(plan, words, flags, other_flags):
    assert words in plan(flags)
    assert words not in plan(other_flags)


def test_videos_on_both_sides_are_counted(plan):
    toy_with("shared", val=toy_lines("val") + toy_lines("train")[:3])  # 8 + 3
    assert ("warning: 3 of 11 videos of shared/val.txt, such as train/00000, are in "
            "shared/train.txt too") in plan("--data shared")


def test_classes_without_videos_are_named(plan):
    """Only where they get a weight."""
    toy_with("absent", categories=[*toy_lines("categories"), "rare"])
    words = "warning: 1 classes, such as rare, have no training video"
    assert words in plan("--data absent --class-weight ratio")
    assert words not in plan("--data absent")


def test_a_model_file_may_warn_too(plan, monkeypatch):
    import tiny
    monkeypatch.setattr(tiny, "check", lambda recipe, given: [f"warning: {given}"], raising=False)
    assert "\nwarning: {'batch'}\n" in plan("--batch 4")


def test_data_needs_a_row_that_is_not_the_toys(monkeypatch, capsys):
    import tiny
    monkeypatch.setattr(tiny, "RECIPES", {"toy": tiny.ROW})
    assert train_tiny("only toy") == 2
    assert "row for real data before it, or pass --recipe toy" in capsys.readouterr().err


# ---- what a run needs


def test_tasks_of_srun_need_torchrun(monkeypatch):
    """SLURM_NTASKS is also set in a batch script, which starts one process."""
    monkeypatch.setenv("SLURM_NTASKS", "2")
    evaluate.start_process("cpu")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    with pytest.raises(ValueError, match="torchrun --nnodes N"):
        evaluate.start_process("cpu")
    monkeypatch.setenv("RANK", "0")  # as torchrun sets it: allowed
    evaluate.start_process("cpu")


def test_compile_needs_a_compiler(capsys, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    assert train_tiny("uncompiled", "--compile") == 2
    assert "--compile: torch.compile needs a C++ compiler" in capsys.readouterr().err
    assert os.listdir("uncompiled") == []


@pytest.mark.parametrize("processes, words", [
    (3, "--batch 8: is split over 3 processes, so it must be a multiple of 3"),
    (33, "toy/train.txt: 32 videos are too few for 33 processes"),
])
def test_processes_need_enough_videos_and_equal_shares(processes, words):
    videos = data.VideoList("toy", "train")
    with pytest.raises(ValueError, match=words):
        train.check_videos(videos, videos, {"batch": 8, "loss": "bce"}, processes)


# ---- stopped and resumed


def test_stopped_and_resumed_is_uninterrupted(uninterrupted):
    """Each start goes on from what the one before has left, and is stopped again."""
    for signal_name, place, nth_call, start, workers, saved_step in [
        # Step 4 is stopped; --save-every has saved step 3.
        ("SIGINT", "step", 4, "spawn", 1, 3),
        # Resumes after step 3; epoch 1 ends with step 4; stopped in the validation after step 8.
        ("SIGTERM", "validation", 2, "fork", 2, 8),
        # Repeats this validation and writes best.pt; last.pt is half written.
        ("SIGKILL", "save", 2, "fork", 0, 8),
        # Removes the half of last.pt; the same validation is stopped once more.
        ("SIGINT", "validation", 1, "forkserver", 1, 8),
    ]:
        run = python(STOPPED, "--by", signal_name, "--place", place, "--call", nth_call,
                     "--start", start, "train.py", *RUN, "--out", "stopped", "--resume",
                     "--workers", workers)
        if signal_name == "SIGINT":
            assert run.returncode == 130
            assert run.stderr == (
                "train.py: stopped; the same command with --resume goes on from OUT/last.pt\n")
        else:
            assert run.returncode == -signal.Signals[signal_name], run.stderr
        assert read("stopped")["iteration"] == saved_step
        with open("stopped/log.jsonl", "a") as file:
            file.write('{"epoch": 3, "st')  # as a kill in mid-line leaves it
    assert train_tiny("stopped", "--resume", "--workers", 2) == 0
    assert contents("stopped") == contents(uninterrupted)


def test_ctrl_c_does_not_stop_the_workers(monkeypatch):
    """In a terminal it reaches every process. Here it reaches the workers alone, one of training
    and one of validation."""
    # A shell that starts pytest in the background has it ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    reached = set()

    def interrupting(function):
        def interrupt(*arguments, **options):
            for worker in multiprocessing.active_children():
                os.kill(worker.pid, signal.SIGINT)
                reached.add(worker.pid)
            return function(*arguments, **options)
        return interrupt

    # a validation of several batches, so that its worker is still needed after the first
    toy_with("long", val=toy_lines("train"))
    monkeypatch.setattr(train, "train_step", interrupting(train.train_step))
    monkeypatch.setattr(evaluate, "score_views", interrupting(evaluate.score_views))
    assert train_tiny("long/run", "--data", "long", "--workers", 1, "--epochs", 1) == 0
    assert len(reached) == 2


@pytest.mark.parametrize("flags, later_flags, tolerance", [
    ("--channels-last", "", 1e-3),
    ("--compile", "", 1e-3),
    ("--amp bf16", "", 0.1),  # half precision drifts
    ("--amp fp16", "", 0.1),
    ("", "--amp fp16", 0.1),
])
def test_a_run_goes_on_with_other_flags(uninterrupted, flags, later_flags, tolerance, monkeypatch):
    """Ctrl-C in the first validation; then the run goes on in another memory layout or precision,
    or not compiled. A momentum in the wrong layout would change the first digit of the weights."""
    compile = Mock(side_effect=partial(torch.compile, backend="eager"))
    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setenv("CXX", sys.executable)  # any program: "eager" compiles nothing
    out = f"from {flags} to {later_flags}"
    with monkeypatch.context() as patch:
        patch.setattr(train, "validate", ctrl_c)
        assert train_tiny(out, *flags.split()) == 130
    assert compile.called == (flags == "--compile")
    assert read(out)["model"]["conv.weight"].is_contiguous() == (flags != "--channels-last")
    if "--amp" in flags:
        assert read_log(out)[0]["loss"] != read_log(uninterrupted)[0]["loss"]

    assert train_tiny(out, "--resume", *later_flags.split()) == 0
    close_weights(out, read(uninterrupted)["model"], tolerance)
    fused = read(out)["optimizer"]["param_groups"][0]["fused"]
    assert fused == ("fp16" not in later_flags)


def test_a_finished_run_says_so_and_changes_nothing(uninterrupted, capsys):
    before = (uninterrupted / "last.pt").read_bytes()
    last = read(uninterrupted)
    # the default, but a list where the recipe has a tuple
    assert train_tiny(uninterrupted, "--resume", "--milestones", 10, 20) == 0
    printed = capsys.readouterr().out
    assert "\nfinished already\n" in printed
    assert printed.endswith(
        f"\nbest val mAP {100 * last['best_map']:.2f} (epoch {last['best_epoch']})\n")
    assert (uninterrupted / "last.pt").read_bytes() == before


def test_resumed_without_a_checkpoint_a_log_begins_anew(tmp_path):
    data.write_lines(tmp_path / "log.jsonl", ['{"epoch": 1, "step": 20}'])
    train.Log(tmp_path, resume=True, step=0, validated=0).append({"step": 1})
    assert read_log(tmp_path) == [{"step": 1}]


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path):
    """A limit on the size of files stands for the disk; 100,000 weights have 400,000 bytes."""
    resource = pytest.importorskip("resource")
    file = write(tmp_path / "best.pt", "the previous one")
    layer = torch.nn.Linear(100_000, 1)
    optimizer, scaler = train.make_optimizer(layer, train.RECIPE, torch.device("cpu"), "off")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
    try:
        with pytest.raises(OSError, match="best.pt: could not be written"):
            train.save(file, layer, optimizer, scaler, epoch=1, step=1, run={})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert file.read_text() == "the previous one"
    assert os.listdir(tmp_path) == ["best.pt"]


# ---- several processes

# Of a flag given twice the last counts. On a CPU batch norm is not synchronised even if asked for.
RUN_OF_TWO = [*RUN, *"--clip-grad 0 --schedule step --milestones 2 4 --sync-bn".split()]


@pytest.fixture(scope="module")
def two_nodes(folder):
    """The folder of an uninterrupted run of two processes, on two nodes: two torchruns on this
    machine that share only an address."""
    flags = ["--nnodes", "2", "--local-addr", "127.0.0.1", "--rdzv-backend", "c10d",
             "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "train.py", *RUN_OF_TWO,
             "--out", "nodes"]
    with ThreadPoolExecutor() as pool:
        nodes = [pool.submit(torchrun, 1, *flags) for _ in range(2)]
    runs = [node.result() for node in nodes]
    assert [run.returncode for run in runs] == [0, 0], runs
    assert (runs[0].stdout + runs[1].stdout).count("best val mAP") == 1
    return folder / "nodes"


def test_two_nodes_take_the_steps_of_two_processes(two_nodes):
    check_by_hand(two_nodes, processes=2, max_norm=math.inf)


def test_two_nodes_score_the_network_that_is_saved(two_nodes):
    """With the running means of the first process: one process gets the same mAP from last.pt."""
    flags = ["--checkpoint", two_nodes / "last.pt", "--data", "toy", "--out", "scores.npz"]
    assert call("evaluate", *flags) == 0
    file = np.load("scores.npz")
    val_map = read_log(two_nodes)[-1]["val_map"]
    assert evaluate.sample_map(file["scores"], file["labels"]) == pytest.approx(val_map)


def test_killed_under_torchrun_and_restarted_is_uninterrupted(two_nodes):
    """torchrun ends the other process and starts both again; they resume without --resume. Twice
    the second process is killed in its 8th step: in step 8, and in step 14."""
    run = torchrun(2, "--max-restarts=2", STOPPED, "--by", "SIGKILL", "--place", "step",
                   "--call", 8, "--rank", 1, "train.py", *RUN_OF_TWO, "--out", "restarted",
                   "--workers", 2)
    assert run.returncode == 0, run.stderr
    steps = "\nbatch 8 = 2 processes x 4 clips; 4 steps an epoch, 24 in all, from"
    assert f"{steps} 6\n" in run.stdout  # by --save-every 3
    assert f"{steps} 12\n" in run.stdout
    assert contents("restarted") == contents(two_nodes)


# ---- what ends a run


@pytest.fixture(scope="module")
def broken(folder):
    """The data folder "broken" lists a video that is not there; the second of two processes meets
    it in the first step. Returns how its error begins."""
    steps = train.batches(num_videos=32, batch=8, seed=0, start=0, total=1, rank=1, world=2)
    _, row = next(steps)[0]
    lines = toy_lines("train")
    lines[row] = "train/gone 24 3"
    toy_with("broken", train=lines)
    return f"broken/train.txt:{row + 1}: broken/frames/train/gone/img_"


def test_a_broken_video_is_named_with_its_rank(broken):
    run = torchrun(2, "train.py", *RUN, "--data", "broken", "--out", "broken/two")
    assert run.returncode == 1  # torchrun's; the script's own is 2
    assert re.search(r"exitcode *: 2", run.stderr)
    [line] = [line for line in run.stderr.splitlines() if line.startswith("[rank 1] train.py: ")]
    assert broken in line
    assert os.listdir("broken/two") == []


def test_skip_broken_says_so_and_goes_on(broken, capsys):
    assert train_tiny("broken/skip", "--data", "broken", "--skip-broken", "--epochs", 1) == 0
    line = capsys.readouterr().err.strip()
    assert line.startswith(broken)
    assert "skipped" in line


def test_a_loss_or_gradient_that_is_not_finite_ends_a_run():
    """With fp16 only a loss does: the scaler skips a step whose gradient overflows."""
    for loss, grad_norm, amp in [(math.nan, 1.0, "fp16"), (1.0, math.inf, "off")]:
        with pytest.raises(ValueError, match="not finite"):
            train.check_finite({"step": 2, "loss": loss, "grad_norm": grad_norm}, amp)
    train.check_finite({"step": 2, "loss": 1.0, "grad_norm": math.inf}, "fp16")


def test_a_loss_that_is_not_finite_stops_before_a_save(capsys):
    """The first step is finite; its update makes the second one infinite."""
    assert train_tiny("infinite", "--lr", 1e30, "--save-every", 1) == 2
    message = "is not finite at step 2 or shortly before, and no checkpoint"
    assert message in capsys.readouterr().err
    last = read("infinite")
    assert last["iteration"] == 1
    assert all(value.isfinite().all() for value in last["model"].values())
