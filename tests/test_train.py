"""The losses are the golden ones, the learning rates those of the report, and a run that is killed
and resumed is the uninterrupted run, bit for bit.

    python -m pytest tests/test_train.py

Whole runs train conftest.TINY on 32 toy videos in batches of 8: 4 steps an epoch, 24 in all. Most
of them are calls of train.main in this process, because a new one takes seconds to import torch.
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


# ---- losses: three classes, by hand


def test_zero_logits_cost_160_ln_2():
    """Each class costs ln 2, and their mean is multiplied by 160."""
    loss = train.scaled_bce(torch.zeros(1, 3), torch.tensor([[0, 1, 0]]))
    close(loss, 160 * math.log(2), 1e-6)


def test_lsep_by_hand():
    """One label, at 1. The other classes are at 0 and 2: -1 and +1 away."""
    loss = train.lsep(torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([[1, 0, 0]]))
    close(loss, math.log(1 + math.exp(-1) + math.exp(1)), 1e-6)


@pytest.mark.parametrize("others, loss", [
    ([0.5, 2.0], (1 + 1 / 2) * (0.5 + 2) / 2),
    ([-0.5, 2.0], 1 * 2),
    ([-0.5, 0.0], 0),
])
def test_warp_by_hand(others, loss):
    """The label is at 1, so a class above 0 violates the margin, by as much as it is above 0."""
    assert train.warp(torch.tensor([[1.0, *others]]), torch.tensor([[1, 0, 0]])) == loss


def test_class_weights_by_hand():
    """Of the first class there are half as many videos as on average. A class without videos weighs
    as much as the rarest one: with it there are 3 on average."""
    counts = np.array([2, 4, 6])
    close(train.class_weights(counts, "none"), [1, 1, 1], 1e-6)
    close(train.class_weights(counts, "ratio"), [1 / 2, 1, 3 / 2], 1e-6)
    close(train.class_weights(counts, "sqrt"), [0.5**0.5, 1, 1.5**0.5], 1e-6)
    close(train.class_weights(np.array([2, 4, 6, 0]), "ratio"), [2 / 3, 4 / 3, 2, 2 / 3], 1e-6)


# ---- losses: golden figures, finite differences, traps

GOLDEN = dict(np.load(ROOT / "tests" / "golden" / "losses.npz"))
LOSSES = [train.scaled_bce, train.lsep, train.warp]


def problem(number):
    """Logits and labels of a golden problem, both float64 (B, K)."""
    logits = torch.from_numpy(GOLDEN[f"logits_{number}"])
    return logits, torch.from_numpy(GOLDEN[f"targets_{number}"])


@pytest.mark.parametrize("number", range(int(GOLDEN["n"])))
def test_losses_are_the_golden_ones(number):
    logits, labels = problem(number)
    for loss, name in zip(LOSSES, ["bce160", "lsep", "warp_exact"]):
        close(loss(logits, labels), GOLDEN[f"{name}_{number}"], 1e-12)
    for loss, name in zip(LOSSES, ["bce160_grad", "lsep_grad"]):
        [gradient] = torch.autograd.grad(loss(logits.requires_grad_(), labels), logits)
        close(gradient, GOLDEN[f"{name}_{number}"], 1e-12)
    for kind in ("sqrt", "ratio"):
        weight = train.class_weights(GOLDEN[f"counts_{number}"], kind)
        loss = train.scaled_bce(logits, labels, weight=weight)
        close(loss, GOLDEN[f"bce160_{kind}_{number}"], 1e-6)  # the weights are float32


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("number", [2, 3, 4, 5, 6, 8])  # the small ones
def test_gradients_are_finite_differences(loss, number):
    logits, labels = problem(number)
    torch.autograd.gradcheck(loss, (logits.requires_grad_(), labels), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("size", [0, 1, -1, 1e4, -1e4])
def test_losses_are_finite_far_out_and_without_labels(loss, size):
    """The first two videos have nothing to rank."""
    labels = torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1], [1, 0, 1, 0]])
    logits = (size * (2.0 * labels - 1)).requires_grad_()
    value = loss(logits, labels)
    [gradient] = torch.autograd.grad(value, logits)
    assert value.isfinite()
    assert gradient.isfinite().all()
    if loss is not train.scaled_bce:
        assert loss(logits[:2], labels[:2]) == 0
        assert not gradient[:2].any()


def test_the_named_loss_is_computed_in_float32():
    logits, labels = problem(5)
    logits = logits.half()
    exact = logits.double()
    for name, expected in [
        ("bce", train.scaled_bce(exact, labels, 1)),
        ("lsep", train.lsep(exact, labels)),
        ("warp", train.warp(exact, labels)),
        ("ce", F.cross_entropy(exact, labels.argmax(dim=1))),
    ]:
        loss = train.compute_loss(logits, labels, {"loss": name, "loss_scale": 7.0})
        close(loss, 7 * expected.float(), 1e-5)


# ---- learning rates

SLOWFAST = dict(lr=0.2, batch=1024, reference_batch=1024, schedule="cosine", warmup=8000)


def test_image_models_divide_their_rate_after_10_and_20_epochs():
    """With 7 steps an epoch."""
    rates = [train.learning_rate(step, 30 * 7, 7, train.RECIPE) for step in range(30 * 7)]
    assert rates == pytest.approx([0.01] * 70 + [0.001] * 70 + [0.0001] * 70)


@pytest.mark.parametrize("step, rate", [
    (0, 0.02), (4000, (0.02 + 0.199027) / 2), (8000, 0.199027), (90_000, 0.1), (179_999, 1.523e-11),
])
def test_slowfasts_rate_rises_for_8000_steps_to_half_a_cosine(step, rate):
    """Half the batch takes twice the steps at half the rate, also in the warm-up."""
    assert train.learning_rate(step, 180_000, 1001, SLOWFAST) == pytest.approx(rate, rel=3e-4)
    half = train.learning_rate(2 * step, 360_000, 2002, {**SLOWFAST, "batch": 512})
    assert half == pytest.approx(train.learning_rate(step, 180_000, 1001, SLOWFAST) / 2)


# ---- the order of the videos


def test_an_epoch_is_a_permutation_that_the_seed_decides():
    """Five videos are two batches of two; every epoch drops another one."""
    steps = train.batches(5, 2, seed=0, start=0, total=4, rank=0, world=1)
    epochs, rows = np.moveaxis(list(steps), 2, 0)
    assert epochs.tolist() == [[0, 0], [0, 0], [1, 1], [1, 1]]
    assert rows.tolist() == [[2, 4], [3, 0], [1, 4], [3, 0]]
    other_steps = train.batches(5, 2, seed=1, start=0, total=4, rank=0, world=1)
    assert next(other_steps) == [(0, 4), (0, 0)]


def test_every_step_of_every_process_has_its_own_seed():
    seeds = {train.step_seed(*numbers) for numbers in np.ndindex(3, 50, 4)}
    assert len(seeds) == 3 * 50 * 4


# ---- first weights

CLASSES = [f"class {k}" for k in range(10)]
RECIPE = {"frames": 4, "backbone": "resnet18", "dropout": 0.5, "shift_every": 1, "init": "init.pt"}


@pytest.fixture(scope="module")
def trained():
    """The state dict of a TIN that was trained: no tensor has its initial value."""
    return fill(tin.build(RECIPE, 10)).state_dict()


def load_into_tin(tensors, kept, categories=CLASSES, ours=True, **values):
    """Load init.pt, our own checkpoint or somebody else's, into a new TIN; return what load_init
    says. The TIN must hold the file's tensors, and its own initial values where the key fits the
    pattern `kept`."""
    checkpoint = {"state_dict": tensors}
    if ours:
        config = {"model": "tin", "recipe": RECIPE, "categories": CLASSES}
        checkpoint = {"model": tensors, "config": config}
    torch.save(checkpoint, "init.pt")
    recipe = {**RECIPE, **values}
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
    assert load_into_tin(trained, "nothing") == "init init.pt: 166 of 166 tensors read"


@pytest.mark.parametrize("origin", [tsn, tsm])
def test_init_starts_tin_from_tsn_and_tsm(origin):
    """All but TIN's small networks, of which these files know nothing."""
    tensors = fill(origin.build(RECIPE, 10)).state_dict()
    read, first, _, _, others = load_into_tin(tensors, "interlace", ours=False).splitlines()
    assert read == "init init.pt: 102 of 166 tensors read"
    assert first == ("  keeps its initial value: interlace.layer1.0.offset_conv.weight is not in "
                     "the file")
    assert others == "  and 61 others"


def test_init_keeps_the_classifier_of_other_classes(trained):
    """Where its size fits, only the names tell that its rows mean other classes."""
    message = load_into_tin(trained, "fc", CLASSES[:7], ours=False)
    assert message.startswith("init init.pt: 164 of 166 tensors read\n  keeps its initial value: "
                              "fc.weight is (10, 512) in the file, (7, 512) in the network\n")
    message = load_into_tin(trained, "fc", CLASSES[::-1])
    assert "keeps its initial value: fc.weight is for other classes in the file\n" in message


def test_init_with_other_frames_keeps_the_layers_over_time(trained):
    message = load_into_tin(trained, r".*offset_(fc1\.(weight|bias)|fc2\.weight)", frames=8)
    assert "interlace.layer1.0.offset_fc1.bias is (4,) in the file, (8,) in the network" in message
    assert message.endswith(
        "note: init.pt was trained with other settings: frames 4 there, 8 here")


@pytest.mark.parametrize("removed, backbone, words", [
    (r".*layer3\.0\.offset_conv\.bias", "resnet18", "layer3.0.offset_conv.bias is not in the file"),
    ("nothing", "resnet50", "(64, 64, 3, 3) in the file, (64, 64, 1, 1) in the network; the file "),
    ("backbone", "resnet18", "only 66 of 166 tensors fit; for example, backbone.conv1.weight is"),
])
def test_init_refuses_to_train_a_part_from_scratch(trained, removed, backbone, words):
    tensors = {key: trained[key] for key in trained if not re.match(removed, key)}
    with pytest.raises(ValueError, match=f"^--init init.pt: .*{re.escape(words)}"):
        load_into_tin(tensors, removed, backbone=backbone)


def test_init_imagenet_offline_names_a_place_for_the_file(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    error = urllib.error.URLError("no route to host")
    monkeypatch.setattr(torch.hub, "download_url_to_file", Mock(side_effect=error))
    recipe = {**RECIPE, "init": "imagenet"}
    model = tin.build(recipe, 10)
    place = tmp_path / "hub" / "checkpoints"
    with pytest.raises(OSError, match=f"no route to host.* put it into {place}, or pass"):
        train.load_init(tin, model, recipe, CLASSES)

    weights = torchvision.models.resnet18().state_dict()
    torch.save(weights, place / "resnet18-f37072fd.pth")
    train.load_init(tin, model, recipe, CLASSES)
    assert torch.equal(model.backbone.layer4[1].conv2.weight, weights["layer4.1.conv2.weight"])


# ---- whole runs

# The last three flags make a difference in every step.
RUN = ("--model tiny --data toy --device cpu --workers 0 --save-every 3 "
       "--warmup 3 --clip-grad 0.5 --class-weight sqrt").split()


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """The current folder of all tests: the scripts, tiny.py beside them, and a toy of 32 videos."""
    folder = scripts_with_tiny(tmp_path_factory.mktemp("scripts"))
    data.draw_toy(folder / "toy", videos=32)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(folder)
        patch.setattr(evaluate, "__file__", str(folder / "evaluate.py"))  # where model files are
        yield folder
    sys.modules.pop("tiny", None)


def train_tiny(out, *flags):
    """train.py in this process -> its exit status."""
    return call("train", *RUN, "--out", out, *flags)


@pytest.fixture(scope="module")
def straight(folder):
    """The folder of an uninterrupted run."""
    assert train_tiny("straight") == 0
    return folder / "straight"


def read(folder, name="last.pt"):
    return torch.load(Path(folder, name), weights_only=True)


def read_log(folder):
    return [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()]


def plain(value):
    """The same with lists for tensors, so that == compares all of it."""
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


def test_a_run_of_the_default_settings(folder, tmp_path):
    """In another folder, on a system without POSIX, such as Windows: without `resource`, `fcntl`
    and process groups."""
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
    assert [line["step"] for line in log[1::2]] == [4, 8, 12, 16, 20, 24]
    top = max(line["val_map"] for line in log[1::2])

    # the checkpoints
    last = read(out)
    best = read(out, "best.pt")
    assert set(last) == {"model", "optimizer", "scaler", "epoch", "iteration", "validated",
                         "best_map", "best_epoch", "config", "class_counts"}
    assert (last["epoch"], last["iteration"], last["validated"]) == (6, 24, 24)
    assert last["best_map"] == best["best_map"] == top
    assert run.stdout.endswith(f"\nbest val mAP {100 * top:.2f} (epoch {best['epoch']})\n")
    assert sorted(os.listdir(out)) == ["best.pt", "last.pt", "log.jsonl"]


def check_by_hand(folder, processes, max_norm):
    """Take the steps of the run of this folder once more, written out: its weights and its log must
    come out. Every process has its own share of the batch, dropout and running means, of which the
    first one's are saved. All step by the mean of their gradients."""
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
    for step, batch in enumerate(train.batches(32, 8, 0, 0, 24, rank=0, world=1)):
        for rank in range(processes):
            frames, labels = zip(*[clips[index] for index in batch[rank::processes]])
            frames = data.normalise(torch.stack(frames), recipe["mean"], recipe["std"])
            buffers = {}
            if rank > 0:
                buffers = copy.deepcopy(dict(net.named_buffers()))
            torch.manual_seed(train.step_seed(0, step, rank))
            logits = torch.func.functional_call(net, buffers, frames)
            loss = train.scaled_bce(logits, torch.stack(labels), 10 / 1.7, weight)
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
    lines = [line for line in read_log(folder) if "loss" in line]
    lines = [(line["step"], line["loss"], line["grad_norm"]) for line in lines]
    np.testing.assert_allclose(lines, log, rtol=1e-3)


def test_a_run_takes_the_steps_of_its_recipe(straight):
    check_by_hand(straight, processes=1, max_norm=0.5)


def test_the_best_epoch_is_the_latest_of_equals():
    """At a learning rate of 0 and without batch norm every epoch scores alike."""
    assert train_tiny("equal", "--lr", 0, "--no-norm", "--epochs", 2) == 0
    assert read("equal")["best_epoch"] == 2
    assert read("equal", "best.pt")["iteration"] == 8


def toy_with(name, **lists):
    """Make a data folder with the toy's frames and lists, but for the lists given: their lines."""
    shutil.copytree("toy", name, ignore=shutil.ignore_patterns("frames"))
    os.symlink(os.path.abspath("toy/frames"), f"{name}/frames")
    for list_name, lines in lists.items():
        data.write_lines(Path(name, f"{list_name}.txt"), lines)


def toy_lines(list_name):
    return Path("toy", f"{list_name}.txt").read_text().splitlines()


def test_a_validation_of_single_labels_some_of_them_unknown(capsys):
    """Cross-entropy adds the hit rates; videos without labels add the mAP of the others."""
    toy_with("single", train=[line.split(",")[0] for line in toy_lines("train")],
             val=["val/00032 24 -1", "val/00033 24 0"])
    flags = ["--data", "single", "--loss", "ce", "--class-weight", "none", "--epochs", 1]
    assert train_tiny("single/run", *flags) == 0
    assert re.search(r"\nepoch 1  val mAP .*  top-1 .*  top-5 .*  \(1 of 2 videos have no label",
                     capsys.readouterr().out)


def test_half_precision_may_skip_the_first_step():
    """The gradient overflows until the scaler's factor, 65536 at first, has shrunk. Fresh memory
    holds NaN here, so that a momentum made of it would show."""
    torch.use_deterministic_algorithms(True)
    try:
        assert train_tiny("overflow", "--amp", "fp16", "--loss-scale", 1000, "--lr", 0.001) == 0
    finally:
        torch.use_deterministic_algorithms(False)
    last = read("overflow")
    assert last["scaler"]["scale"] < 65536
    for key, value in last["model"].items():
        assert value.isfinite().all(), key


# ---- the plan of a run


ctrl_c = Mock(side_effect=KeyboardInterrupt)


@pytest.fixture
def plan(monkeypatch, capsys):
    """A function: flags -> what is printed before the first step. A run has 24 steps."""
    def print_plan(flags):
        run = "--model tiny --data toy --device cpu --out plan".split()
        assert call("train", *run, *flags.split()) == 130
        return capsys.readouterr().out
    monkeypatch.setattr(train, "load_clips", ctrl_c)
    return print_plan


@pytest.mark.parametrize("flags, words", [
    ("", "loss bce, scale 5.88235; classes / labels per video: 5.8\n"),
    ("--loss lsep", "loss lsep, scale 1;"),  # 10 / 1.7 belongs to the mean over all classes
    ("--loss lsep --loss-scale 3", "loss lsep, scale 3;"),
    ("", "\nbatch 8 = 1 processes x 8 clips; 4 steps an epoch, 24 in all, from 0\n"),
    ("--batch 4", "\nlearning rate 0.2 x 4 / 8 = 0.1\n"),
    ("--batch 4", "--reference-batch 4 would keep 0.2)\n"),
    ("--batch 4 --iterations 10", "; 8 steps an epoch, 20 in all, from 0\n"),
    ("", "warning: 24 steps are too few to learn much"),
    ("--warmup 5", "\nwarm-up 5 steps, 21 % of the run\n"),
    ("--warmup 5", "\nwarning: the warm-up's 5 steps are much of a run of 24; shorten it with --w"),
    ("--schedule step --milestones 2 6 8", "the milestones [6, 8], so the learning rate does not "),
    ("--test-resize 72", "\nthe scales of the fuller protocols follow test_resize: [64]\n"),
    ("--recipe toy", "\ntiny toy: 570 parameters, 10 classes\n"),
])
def test_the_plan_says(plan, flags, words):
    assert words in plan(flags)


@pytest.mark.parametrize("flags, words", [
    ("--batch 4 --reference-batch 4", "would keep"),
    ("--epochs 25", "too few"),                      # 100 steps
    ("--warmup 4", "warning: the warm-up"),          # a sixth
    ("--milestones 2 6 8", "the milestones"),        # the schedule is cosine
    ("--test-resize 72 --scales 40", "follow"),
])
def test_the_plan_does_not_say(plan, flags, words):
    assert words not in plan(flags)


def test_videos_on_both_sides_are_counted(plan):
    toy_with("shared", val=toy_lines("val") + toy_lines("train")[:3])
    assert ("warning: 3 of 11 videos of shared/val.txt, such as train/00000, are in "
            "shared/train.txt too") in plan("--data shared")


def test_classes_without_videos_are_named(plan):
    toy_with("absent", categories=[*toy_lines("categories"), "rare"])
    words = "warning: 1 classes, such as rare, have no training video"
    assert words in plan("--data absent --class-weight ratio")
    assert words not in plan("--data absent")


def test_a_model_file_may_warn_too(plan, monkeypatch):
    import tiny
    monkeypatch.setattr(tiny, "check", lambda recipe, given: [f"warning: {given}"], raising=False)
    assert "\nwarning: {'batch'}\n" in plan("--batch 4")


def test_a_first_row_for_the_toy_is_no_row_for_data(monkeypatch, capsys):
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
    monkeypatch.setenv("RANK", "0")  # torchrun's
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
def test_the_processes_must_share_a_batch(processes, words):
    videos = data.VideoList("toy", "train")
    with pytest.raises(ValueError, match=words):
        train.check_videos(videos, videos, {"batch": 8, "loss": "bce"}, processes)


# ---- stopped and resumed


def test_stopped_and_resumed_is_uninterrupted(straight):
    """Within an epoch, in a validation, and while last.pt is written after it; by Ctrl-C, which is
    one line, and by a kill; however the workers are started. Each start goes on from what the one
    before has left."""
    for signal_name, place, calls, start, workers, iteration in [
        ("SIGINT", "step", 4, "spawn", 1, 3),        # by --save-every
        ("SIGTERM", "validation", 2, "fork", 2, 8),
        ("SIGKILL", "save", 2, "fork", 0, 8),        # best.pt is written, last.pt is not
        ("SIGINT", "validation", 1, "forkserver", 1, 8),
    ]:
        run = python(ROOT / "tests" / "stopped.py", signal_name, place, calls, 0, start, "train.py",
                     *RUN, "--out", "stopped", "--resume", "--workers", workers)
        if signal_name == "SIGINT":
            assert run.returncode == 130
            assert run.stderr == (
                "train.py: stopped; the same command with --resume goes on from OUT/last.pt\n")
        else:
            assert run.returncode == -signal.Signals[signal_name], run.stderr
        assert read("stopped")["iteration"] == iteration
        assert len(list(Path("stopped").glob("*.part-*"))) == (signal_name == "SIGKILL")
        with open("stopped/log.jsonl", "a") as file:
            file.write('{"epoch": 3, "st')  # as a kill in mid-line leaves it
    assert train_tiny("stopped", "--resume", "--workers", 2) == 0
    assert contents("stopped") == contents(straight)


def test_ctrl_c_does_not_stop_the_workers(monkeypatch):
    """In a terminal it reaches every process, and only the main process acts on it. Here it reaches
    the workers alone, one of training and one of validation."""
    # A shell that starts pytest in the background has it ignore Ctrl-C, and the workers too.
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
    ("--amp bf16", "", 0.1),
    ("--amp fp16", "", 0.1),
    ("", "--amp fp16", 0.1),
])
def test_a_run_goes_on_with_other_flags(straight, flags, later_flags, tolerance, monkeypatch):
    """Ctrl-C in the first validation; then the run goes on in another memory layout or precision,
    or not compiled. A momentum in the wrong layout would change its values in the first digit."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda net: compile(net, backend="eager"))
    monkeypatch.setenv("CXX", sys.executable)  # which needs no compiler
    out = f"from {flags} to {later_flags}"
    with monkeypatch.context() as patch:
        patch.setattr(train, "validate", ctrl_c)
        assert train_tiny(out, *flags.split()) == 130
    assert read(out)["model"]["conv.weight"].is_contiguous() == (flags != "--channels-last")
    if "--amp" in flags:
        assert read_log(out)[0]["loss"] != read_log(straight)[0]["loss"]

    assert train_tiny(out, "--resume", *later_flags.split()) == 0
    close_weights(out, read(straight)["model"], tolerance)
    assert read(out)["optimizer"]["param_groups"][0]["fused"] == (later_flags == "")


def test_a_finished_run_says_so_and_changes_nothing(straight, capsys):
    before = (straight / "last.pt").read_bytes()
    last = read(straight)
    same_value = ["--milestones", 10, 20]
    assert train_tiny(straight, "--resume", *same_value) == 0
    printed = capsys.readouterr().out
    assert "\nfinished already\n" in printed
    assert printed.endswith(
        f"\nbest val mAP {100 * last['best_map']:.2f} (epoch {last['best_epoch']})\n")
    assert (straight / "last.pt").read_bytes() == before


def test_resumed_without_a_checkpoint_a_log_begins_anew(tmp_path):
    data.write_lines(tmp_path / "log.jsonl", ['{"epoch": 1, "step": 20}'])
    train.Log(tmp_path, True, 0, 0).append({"step": 1})
    assert read_log(tmp_path) == [{"step": 1}]


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path):
    """A limit on the size of files stands for the disk; the checkpoint has 400,000 bytes."""
    resource = pytest.importorskip("resource")
    file = write(tmp_path / "best.pt", "the previous one")
    layer = torch.nn.Linear(100_000, 1)
    optimizer, scaler = train.make_optimizer(layer, train.RECIPE, torch.device("cpu"), "off")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
    try:
        with pytest.raises(OSError, match="best.pt: could not be written"):
            train.save(file, layer, optimizer, scaler, 1, 1, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert file.read_text() == "the previous one"
    assert os.listdir(tmp_path) == ["best.pt"]


# ---- several processes


NODES = [*RUN, *"--clip-grad 0 --schedule step --milestones 2 4 --sync-bn".split()]


@pytest.fixture(scope="module")
def two_nodes(folder):
    """The folder of an uninterrupted run of two processes, on two nodes: two torchruns that know of
    each other by an address alone. Both are on this machine, and on a CPU, where batch norm is not
    synchronised even if the recipe asks for it."""
    flags = ["--nnodes", "2", "--local-addr", "127.0.0.1", "--rdzv-backend", "c10d",
             "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "train.py", *NODES, "--out", "nodes"]
    with ThreadPoolExecutor() as pool:
        nodes = [pool.submit(torchrun, 1, *flags) for _ in range(2)]
    runs = [node.result() for node in nodes]
    assert [run.returncode for run in runs] == [0, 0], runs
    assert (runs[0].stdout + runs[1].stdout).count("best val mAP") == 1
    return folder / "nodes"


def test_two_nodes_take_the_steps_of_two_processes(two_nodes):
    check_by_hand(two_nodes, processes=2, max_norm=math.inf)


def test_two_nodes_score_the_network_that_is_saved(two_nodes, capsys):
    """With the running means of the first process: one process gets the same mAP from best.pt."""
    best_map = read(two_nodes)["best_map"]
    assert call("evaluate", "--checkpoint", two_nodes / "best.pt", "--data", "toy") == 0
    assert capsys.readouterr().out.endswith(f"\nmAP {100 * best_map:.2f}\n")


def test_killed_under_torchrun_and_restarted_is_uninterrupted(two_nodes):
    """Twice. torchrun ends the other process and starts both again; they resume without
    --resume."""
    run = torchrun(2, "--max-restarts=2", ROOT / "tests" / "stopped.py", "SIGKILL", "step", 8, 1,
                   "fork", "train.py", *NODES, "--out", "restarted", "--workers", 2)
    assert run.returncode == 0, run.stderr
    steps = "\nbatch 8 = 2 processes x 4 clips; 4 steps an epoch, 24 in all, from"
    assert f"{steps} 6\n" in run.stdout
    assert f"{steps} 12\n" in run.stdout
    assert contents("restarted") == contents(two_nodes)


# ---- what ends a run


@pytest.fixture(scope="module")
def broken(folder):
    """The data folder "broken" lists a video that is not there; the second of two processes meets
    it in the first step. Returns its place in the list and the beginning of a frame's name."""
    _, row = next(train.batches(32, 8, 0, 0, 1, 1, 2))[0]
    lines = toy_lines("train")
    lines[row] = "train/gone 24 3"
    toy_with("broken", train=lines)
    return f"broken/train.txt:{row + 1}: broken/frames/train/gone/img_"


def test_a_broken_video_is_named_with_its_rank(broken):
    run = torchrun(2, "train.py", *RUN, "--data", "broken", "--out", "broken/two")
    assert run.returncode == 1  # torchrun's
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
    for loss, grad_norm, amp in [(math.nan, 1.0, "fp16"), (1.0, math.inf, "off")]:
        with pytest.raises(ValueError, match="not finite"):
            train.check_finite({"step": 2, "loss": loss, "grad_norm": grad_norm}, amp)
    overflow = {"step": 2, "loss": 1.0, "grad_norm": math.inf}
    train.check_finite(overflow, "fp16")  # the scaler has skipped the step


def test_a_loss_that_is_not_finite_stops_before_a_save(capsys):
    """The first step is finite; its update makes the second one infinite."""
    assert train_tiny("infinite", "--lr", 1e30, "--save-every", 1) == 2
    message = "is not finite at step 2 or shortly before, and no checkpoint"
    assert message in capsys.readouterr().err
    last = read("infinite")
    assert last["iteration"] == 1
    assert all(value.isfinite().all() for value in last["model"].values())
