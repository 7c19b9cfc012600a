"""The losses and learning rates are those of the report's formulas, a run takes the steps of its
recipe, and one that is killed and resumed is the uninterrupted run, bit for bit.

    python -m pytest tests/test_train.py

Whole runs train conftest.TINY on 32 toy videos in batches of 8: 4 steps an epoch and, if no flag
says otherwise, 6 epochs, so 24 steps. Most call train.main in this process, because a new one takes
seconds to import torch.

tests/golden/losses.npz holds nine problems, described by its "notes", with their losses in float64,
and the gradients of BCE and LSEP.
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
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torchvision

import data
import evaluate
import slowfast
import tin
import train
import tsm
import tsn
from conftest import ROOT, call, close, fill, free_port, python, scripts_with_tiny, torchrun, write

STOPPED = ROOT / "tests" / "stopped.py"
ctrl_c = Mock(side_effect=KeyboardInterrupt)

# The last four are not the defaults, so that a run that ignored one would be noticed.
RUN = ("--model tiny --data toy --device cpu --workers 0 --save-every 3 "
       "--warmup 3 --clip-grad 0.5 --class-weight sqrt")


# ---- the folder in which all tests run


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """The scripts, tiny.py beside them, and "toy": 32 videos to train and 8 to validate.

    In "odd" all videos have label 3, but the first of validation has none. One of training is not
    there, and three are in the list of validation too.
    """
    folder = scripts_with_tiny(tmp_path_factory.mktemp("scripts"))
    data.draw_toy(folder / "toy", videos=32)
    shutil.copytree(folder / "toy", folder / "odd")
    lines = [f"train/{row:05d} 24 3" for row in range(32)]
    data.write_lines(folder / "odd" / "val.txt", ["val/00032 24 -1", *lines[:3]])
    lines[11] = "train/gone 24 3"
    data.write_lines(folder / "odd" / "train.txt", lines)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(folder)
        patch.setattr(evaluate, "__file__", str(folder / "evaluate.py"))  # beside it are the models
        yield folder
    sys.modules.pop("tiny", None)


def train_tiny(out, flags=""):
    """train.py in this process -> its exit status."""
    return call("train", *RUN.split(), "--out", out, *flags.split())


# ---- losses


@pytest.mark.parametrize("loss, logits, labels, expected", [
    ("bce", [0, 0, 0], [0, 1, 0], math.log(2)),  # of each class, so it is their mean
    ("ce", [1, 0, 2], [1, 0, 0], math.log(1 + math.exp(0 - 1) + math.exp(2 - 1))),
    # the same sum, over all pairs of a label and a class that is none
    ("lsep", [1, 0, 2], [1, 0, 1], math.log(1 + math.exp(0 - 1) + math.exp(0 - 2))),
    # The label is at 1 and the margin is 1, so two classes violate it, by 0.5 and 2.
    ("warp", [1, 0.5, 2, -0.5], [1, 0, 0, 0], (1 + 1 / 2) * (0.5 + 2) / 2),
])
def test_losses_by_hand(loss, logits, labels, expected):
    """The logits are in half precision, as --amp gives them. The loss is computed in float32, times
    loss_scale."""
    recipe = {"loss": loss, "loss_scale": 160.0}
    ours = train.compute_loss(torch.tensor([logits]).half(), torch.tensor([labels]), recipe)
    close(ours, 160 * expected, 1e-6)


GOLDEN = dict(np.load(ROOT / "tests" / "golden" / "losses.npz"))


def problem(number):
    """Logits and labels of a golden problem, both float64 (B, K)."""
    logits = torch.from_numpy(GOLDEN[f"logits_{number}"]).requires_grad_()
    return logits, torch.from_numpy(GOLDEN[f"targets_{number}"])


@pytest.mark.parametrize("loss, name", [(train.scaled_bce, "bce160"), (train.lsep, "lsep")])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("number", range(9))
def test_losses_and_gradients_are_the_golden_ones(number, dtype, tolerance, loss, name):
    """Problem 8 has logits of 300: in float32 a naive exp would overflow."""
    logits, labels = problem(number)
    value = loss(logits.to(dtype), labels)
    close(value, GOLDEN[f"{name}_{number}"], tolerance)
    close(torch.autograd.grad(value, logits)[0], GOLDEN[f"{name}_grad_{number}"], tolerance)


@pytest.mark.parametrize("number", range(9))
def test_warp_is_the_golden_one(number):
    """No gradient of it is golden: finite differences stand for it."""
    close(train.warp(*problem(number)), GOLDEN[f"warp_exact_{number}"], 1e-12)
    torch.autograd.gradcheck(train.warp, problem(number), atol=1e-6, rtol=1e-6, fast_mode=True)


@pytest.mark.parametrize("kind", ["sqrt", "ratio"])
@pytest.mark.parametrize("number", range(9))
def test_weighted_losses_are_the_golden_ones(number, kind):
    weight = train.class_weights(GOLDEN[f"counts_{number}"], kind)  # float32
    loss = train.scaled_bce(*problem(number), weight=weight)
    close(loss, GOLDEN[f"bce160_{kind}_{number}"], 1e-6)


def test_class_weights_by_hand():
    """With "ratio" a class weighs its number of videos, divided by the mean number, here 4. One
    without videos weighs as much as the rarest."""
    counts = np.array([2, 8, 6, 0])
    close(train.class_weights(counts, "none"), [1, 1, 1, 1], 1e-6)
    close(train.class_weights(counts, "ratio"), [1 / 2, 2, 3 / 2, 1 / 2], 1e-6)


# ---- scaling the loss


def weight_after_a_step(scale, lr, decay, max_norm=math.inf):
    """Of a network with one weight, at first 1."""
    weight = torch.ones(1, requires_grad=True)
    train.scaled_bce(weight, torch.zeros(1), scale).backward()
    torch.nn.utils.clip_grad_norm_(weight, max_norm)
    torch.optim.SGD([weight], lr, weight_decay=decay).step()
    return weight.item()


def test_scaling_the_loss_is_not_scaling_the_learning_rate():
    """A step is lr * (gradient + decay * w): the rate x 160 multiplies the decay too. Clipping
    shortens only the gradient of the scaled loss."""
    loss_scaled = weight_after_a_step(160, 0.001, 0.05)
    assert weight_after_a_step(1, 160 * 0.001, 0.05 / 160) == pytest.approx(loss_scaled)
    assert weight_after_a_step(1, 160 * 0.001, 0.05) != pytest.approx(loss_scaled)

    # The gradient of the scaled loss, 117, is clipped. That of the plain one, 0.73, would not be.
    clipped = weight_after_a_step(160, 0.001, 0.05, max_norm=20)
    assert clipped != pytest.approx(loss_scaled)


# ---- learning rates


def test_image_models_divide_their_rate_after_10_and_20_epochs():
    """With 7 steps an epoch."""
    rates = [train.learning_rate(step, 30 * 7, 7, train.RECIPE) for step in range(30 * 7)]
    assert rates == pytest.approx([0.01] * 70 + [0.001] * 70 + [0.0001] * 70)


@pytest.mark.parametrize("step, rate", [
    (0, 0.02),                      # a tenth of 0.2
    (4000, (0.02 + 0.199027) / 2),  # half of the warm-up
    (8000, 0.199027),               # 0.2 (1 + cos(pi 8000 / 180,000)) / 2
    (90_000, 0.1),                  # half of the cosine
])
def test_slowfasts_rate_warms_up_then_follows_a_cosine(step, rate):
    """Half the batch takes twice as many steps, at half the rate. (The 1 is the number of steps of
    an epoch, which only milestones need.)"""
    recipe = {**train.RECIPE, **slowfast.RECIPES["r101_8x8"]}
    ours = train.learning_rate(step, 180_000, 1, recipe)
    assert ours == pytest.approx(rate, rel=1e-4)
    half = train.learning_rate(2 * step, 360_000, 1, {**recipe, "batch": 512})
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
OURS = {"model": "tin", "recipe": TIN_RECIPE, "categories": CLASSES}
NO_KEY = "$"  # a pattern that matches no key


@pytest.fixture(scope="module")
def drawn_tin():
    """The drawn tensors of a TIN: none has its initial value. 166 are read, 64 of them of
    `interlace` and 2 of `fc`; batch norm's num_batches_tracked is not counted."""
    return fill(tin.build(TIN_RECIPE, 10)).state_dict()


def load_into_tin(tensors, kept=NO_KEY, categories=CLASSES, config=OURS, **values):
    """Write the tensors to init.pt (as our own checkpoint, or without `config` as somebody else's),
    load it into a new TIN, and return what load_init says. All tensors but those that match `kept`
    must then be the file's."""
    torch.save({"model": tensors, "config": config}, "init.pt")
    recipe = {**TIN_RECIPE, **values}
    model = tin.build(recipe, len(categories))
    message = train.load_init(tin, model, recipe, categories)
    for key, value in model.state_dict().items():
        is_read = key in tensors and torch.equal(value, tensors[key])
        assert is_read == (re.match(kept, key) is None), key
    return message


def test_init_takes_our_own_checkpoint_whole(drawn_tin):
    assert load_into_tin(drawn_tin) == "init init.pt: 166 of 166 tensors read"


@pytest.mark.parametrize("origin", [tsn, tsm])
def test_init_starts_tin_from_tsn_and_tsm_of_other_classes(origin):
    """All but TIN's small networks, which these files lack, and the classifier; the message names
    three of these 66."""
    tensors = fill(origin.build(TIN_RECIPE, 10)).state_dict()
    message = load_into_tin(tensors, "interlace|fc", CLASSES[:7], config=None)
    assert message.startswith(
        "init init.pt: 100 of 166 tensors read\n  keeps its initial value: "
        "fc.weight is (10, 512) in the file, (7, 512) in the network\n")
    assert message.endswith(
        "interlace.layer1.0.offset_conv.weight is not in the file\n  and 63 others")


def test_init_does_not_read_a_classifier_of_other_classes(drawn_tin):
    """Where its size fits, only the names tell that its rows mean other classes."""
    message = load_into_tin(drawn_tin, "fc", CLASSES[::-1])
    assert "keeps its initial value: fc.weight is for other classes in the file\n" in message


def test_init_does_not_read_layers_over_other_frames(drawn_tin):
    message = load_into_tin(drawn_tin, r".*offset_(fc1\.(weight|bias)|fc2\.weight)", frames=8)
    assert "interlace.layer1.0.offset_fc1.bias is (4,) in the file, (8,) in the network" in message
    assert message.endswith(": frames 4 there, 8 here")


@pytest.mark.parametrize("removed, backbone, words", [
    # one tensor, where the file has the others of its layer
    (r".*layer3\.0\.offset_conv\.bias", "resnet18", "layer3.0.offset_conv.bias is not in the file"),
    # a convolution of another size
    (NO_KEY, "resnet50", "(64, 64, 3, 3) in the file, (64, 64, 1, 1) in the network; the file "),
    # the backbone: 64 + 2 of 166 tensors are left, fewer than 40 %
    ("backbone", "resnet18", "only 66 of 166 tensors fit; for example, backbone.conv1.weight is"),
])
def test_init_refuses_a_file_that_does_not_fit(drawn_tin, removed, backbone, words):
    tensors = {key: drawn_tin[key] for key in drawn_tin if not re.match(removed, key)}
    with pytest.raises(ValueError, match=f"^--init init.pt: .*{re.escape(words)}"):
        load_into_tin(tensors, backbone=backbone)


def test_init_imagenet_offline_takes_a_file_put_in_place(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    error = OSError("no route to host")
    monkeypatch.setattr(torch.hub, "download_url_to_file", Mock(side_effect=error))
    place = tmp_path / "hub" / "checkpoints"
    with pytest.raises(OSError, match=f"no route to host.* put it into {place}, or pass"):
        train.imagenet_weights(TIN_RECIPE)

    # torch.hub has made the folder before it tried
    torch.save(torchvision.models.resnet18().state_dict(), place / "resnet18-f37072fd.pth")
    recipe = {**TIN_RECIPE, "init": "imagenet"}
    message = train.load_init(tin, tin.build(recipe, 10), recipe, CLASSES)
    assert message.startswith("init imagenet: 100 of 166 tensors read")


# ---- whole runs


@pytest.fixture(scope="module")
def uninterrupted(folder):
    """The folder of a run that was not stopped."""
    assert train_tiny("uninterrupted") == 0
    return folder / "uninterrupted"


def read(folder, name="last.pt"):
    return torch.load(Path(folder, name), weights_only=True)


def read_log(folder):
    return [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()]


def contents(folder):
    """All that a run has left, apart from what a clock says. As a text, because == of dicts that
    hold tensors is an error."""
    log = read_log(folder)
    for line in log:
        line.pop("clips_per_s", None)
        line.pop("data_share", None)
    checkpoints = [read(folder), read(folder, "best.pt")]
    return json.dumps([checkpoints, log, sorted(os.listdir(folder))], default=torch.Tensor.tolist)


def close_weights(folder, expected, tolerance):
    model = read(folder)["model"]
    assert list(model) == list(expected)  # no prefix of DDP's or torch.compile's
    for key, value in expected.items():
        assert model[key].dtype == value.dtype
        close(model[key], value, tolerance)


@pytest.fixture(scope="module")
def default_run(folder, tmp_path_factory):
    """The folder of a run by default settings but --workers 0, started in another folder, where
    Python lacks what Windows lacks."""
    working = tmp_path_factory.mktemp("windows")
    write(working / "sitecustomize.py",  # Python imports it when it starts
          "import os, sys\n"
          "sys.modules['resource'] = sys.modules['fcntl'] = None\n"
          "del os.setpgrp, os.getpgrp, os.killpg, os.fork\n")
    run = python(folder / "train.py", "--model", "tiny", "--data", folder / "toy", "--workers", 0,
                 cwd=working, PYTHONPATH=working)
    assert run.returncode == 0, run.stderr
    return working / "runs" / "tiny"


def test_every_epoch_logs_its_steps_and_its_validation(default_run):
    log = read_log(default_run)
    assert set(log[0]) == {"epoch", "step", "loss", "lr", "grad_norm", "clips_per_s", "data_share"}
    assert set(log[1]) == {"epoch", "step", "val_map"}
    assert [line["step"] for line in log] == [4, 4, 8, 8, 12, 12, 16, 16, 20, 20, 24, 24]


def test_a_run_leaves_its_last_and_its_best_state(default_run):
    last = read(default_run)
    assert set(last) == {"model", "optimizer", "scaler", "epoch", "iteration", "validated",
                         "best_map", "best_epoch", "config", "class_counts"}
    assert (last["epoch"], last["iteration"], last["validated"]) == (6, 24, 24)
    best_map = max(line["val_map"] for line in read_log(default_run)[1::2])
    assert last["best_map"] == read(default_run, "best.pt")["best_map"] == best_map
    assert sorted(os.listdir(default_run)) == ["best.pt", "last.pt", "log.jsonl"]


def test_a_run_may_end_within_an_epoch(monkeypatch):
    """The last two of 10 steps, half an epoch, are followed by a validation too. Here every second
    step is logged."""
    monkeypatch.setattr(train, "LOG_EVERY", 2)
    assert train_tiny("within", "--iterations 10 --save-every 100") == 0
    assert [line["step"] for line in read_log("within")] == [2, 4, 4, 6, 8, 8, 10, 10]


def check_beside_a_plain_loop(folder, processes, max_norm):
    """The run in this folder has the weights and the log of a plain loop over the same steps: for
    each process its share of the batch and its own dropout; the step is by the mean gradient. (What
    gives the batches, seeds, rates and losses is tested above.)"""
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
        frames, labels = torch.utils.data.default_collate([clips[index] for index in batch])
        frames = data.normalise(frames, recipe["mean"], recipe["std"])
        for rank in range(processes):
            # Only process 0 may change the running means of net. The others change a copy.
            running = dict(net.named_buffers())
            if rank > 0:
                running = copy.deepcopy(running)
            torch.manual_seed(train.step_seed(0, step, rank))
            logits = torch.func.functional_call(net, running, frames[rank::processes])
            # not from the recipe: the toy's loss scale, 10 classes / about 1.7 labels
            loss = train.scaled_bce(logits, labels[rank::processes], 10 / 1.7, weight)
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
    check_beside_a_plain_loop(uninterrupted, processes=1, max_norm=0.5)


def test_the_best_epoch_is_the_latest_of_equals(monkeypatch):
    maps = [(0.5, ""), (0.5, ""), (0.1, "")]
    monkeypatch.setattr(train, "validate", Mock(side_effect=maps))
    assert train_tiny("equal", "--epochs 3") == 0
    assert read("equal")["best_epoch"] == 2
    assert read("equal", "best.pt")["iteration"] == 8


def test_half_precision_may_skip_the_first_step():
    """The gradient overflows until the scaler's factor, 65536 at first, has shrunk."""
    # A skipped step would leave fused SGD's momentum unset; this mode fills it with NaN.
    torch.use_deterministic_algorithms(True)
    try:
        assert train_tiny("overflow", "--amp fp16 --loss-scale 1000 --lr 0.001") == 0
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
        run = f"--model tiny --data toy --device cpu --out plan {flags}"
        assert call("train", *run.split()) == 130  # the status after Ctrl-C
        return capsys.readouterr().out
    monkeypatch.setattr(train, "load_clips", ctrl_c)
    return print_plan


@pytest.mark.parametrize("flags, words", [
    # 10 / 1.7 is the setting; these 32 videos have a few more labels
    ("", ["scale 5.88235; classes / labels per video: 5.8\n", "too few to learn much"]),
    # the convolution's 224, batch norm's 16 and the classifier's 330; bce's scale belongs to a mean
    # over all classes
    ("--recipe toy --loss lsep", ["tiny toy: 570 parameters, 10 classes\n", "scale 1;"]),
    ("--loss lsep --loss-scale 3", ["loss lsep, scale 3;"]),
    # 10 steps of 8 clips are 20 of 4
    ("--batch 4 --iterations 10", [
        "; 8 steps an epoch, 20 in all", "0.2 x 4 / 8 = 0.1\n", "--reference-batch 4 would keep"]),
    # Twice the toy's size, 36, so twice its scale, 32. The warm-up is more than a fifth of the run.
    ("--test-resize 72 --warmup 5", [
        "follow test_resize: [64]\n", "\nwarm-up 5 steps, 21 %", "shorten it with --warmup"]),
    # 6 epochs
    ("--schedule step --milestones 2 6 8", ["the milestones [6, 8], "]),
    ("--data odd --class-weight ratio", [
        "9 classes, such as moving+right, have no training video",
        "3 of 4 videos of odd/val.txt, such as train/00000, are in odd/train.txt too"]),
])
def test_the_plan_says(plan, flags, words):
    printed = plan(flags)
    for word in words:
        assert word in printed


def test_the_plan_has_a_note_only_where_it_applies(plan):
    # Without --schedule it is the cosine, which has no milestones; without --class-weight, classes
    # have no weight.
    printed = plan("--data odd --batch 4 --reference-batch 4 --iterations 100 --warmup 19 "
                   "--test-resize 72 --scales 40 --milestones 2 6 80")
    for word in ["too few", "would keep", "shorten", "follow test_resize", "milestones [",
                 "no training video"]:
        assert word not in printed


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


@pytest.mark.parametrize("processes, words", [
    (3, "--batch 8: is split over 3 processes, so it must be a multiple of 3"),
    (33, "toy/train.txt: 32 videos are too few for 33 processes"),
])
def test_processes_need_enough_videos_and_equal_shares(processes, words):
    videos = data.VideoList("toy", "train")
    with pytest.raises(ValueError, match=words):
        train.check_videos(videos, videos, {"batch": 8, "loss": "bce"}, processes)


# ---- stopped and resumed


def stop(signal_name, function, nth_call, start, workers):
    """Start the run in "stopped", or go on with it, until a signal comes in the n-th call of a
    function. start: how the workers are started."""
    command = f"{signal_name} {function} {nth_call} {start} 0 train.py {RUN} --out stopped --resume"
    run = python(STOPPED, *command.split(), "--workers", workers)
    with open("stopped/log.jsonl", "a") as file:
        file.write('{"epoch": 3, "st')  # as a kill in mid-line leaves it
    return run


def test_stopped_and_resumed_is_uninterrupted(uninterrupted):
    """Each start goes on from what the one before has left."""
    run = stop("SIGINT", "torch.nn.utils.clip_grad_norm_", nth_call=4, start="spawn", workers=1)
    assert run.returncode == 130
    assert run.stderr == (
        "train.py: stopped; the same command with --resume goes on from OUT/last.pt\n")
    assert read("stopped")["iteration"] == 3  # by --save-every 3

    # in the validation after step 8
    run = stop("SIGTERM", "evaluate.score_views", nth_call=2, start="fork", workers=2)
    assert run.returncode == -signal.SIGTERM, run.stderr
    assert read("stopped")["iteration"] == 8

    # This validation is repeated and best.pt written, but last.pt only by half.
    run = stop("SIGKILL", "torch.save", nth_call=2, start="forkserver", workers=1)
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert read("stopped", "best.pt")["iteration"] == 8
    assert read("stopped")["validated"] == 4

    assert train_tiny("stopped", "--resume --workers 2") == 0
    assert contents("stopped") == contents(uninterrupted)


@pytest.mark.skipif(multiprocessing.get_start_method() != "fork",
                    reason="only forked workers have the function that is replaced here")
def test_ctrl_c_does_not_stop_the_workers(monkeypatch):
    """In a terminal it reaches every process. Here each worker gets it with every video."""
    read_frames = data.read_frames

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return read_frames(*arguments)

    # A shell that starts pytest in the background makes it ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(data, "read_frames", interrupted)
    assert train_tiny("interrupted", "--workers 1 --epochs 1") == 0


@pytest.mark.parametrize("flags, later_flags, tolerance", [
    ("--channels-last --compile", "", 1e-3),
    ("--amp bf16", "--amp fp16", 0.1),  # half precision drifts
    ("--amp fp16", "", 0.1),
])
def test_a_run_goes_on_with_other_flags(uninterrupted, flags, later_flags, tolerance, monkeypatch):
    """Ctrl-C in the first validation; then the run goes on in another memory layout or precision,
    or not compiled. A momentum in the wrong layout would change the first digit of the weights."""
    compiled = Mock(side_effect=partial(torch.compile, backend="eager"))
    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setenv("CXX", sys.executable)  # any program: "eager" compiles nothing
    out = f"from {flags} to {later_flags}"
    with monkeypatch.context() as patch:
        patch.setattr(train, "validate", ctrl_c)
        assert train_tiny(out, flags) == 130
    assert compiled.called == ("--compile" in flags)
    assert read(out)["model"]["conv.weight"].is_contiguous() == ("--channels-last" not in flags)
    if "--amp" in flags:
        assert read_log(out)[0]["loss"] != read_log(uninterrupted)[0]["loss"]

    assert train_tiny(out, f"--resume {later_flags}") == 0
    close_weights(out, read(uninterrupted)["model"], tolerance)
    fused = read(out)["optimizer"]["param_groups"][0]["fused"]
    assert fused == ("fp16" not in later_flags)


def test_a_finished_run_says_so_and_changes_nothing(uninterrupted, capsys):
    before = contents(uninterrupted)
    last = read(uninterrupted)
    # The default milestones. The row has a tuple, a flag gives a list; train.py makes both a list.
    assert train_tiny(uninterrupted, "--resume --milestones 10 20") == 0
    printed = capsys.readouterr().out
    assert "\nfinished already\n" in printed
    assert printed.endswith(
        f"\nbest val mAP {100 * last['best_map']:.2f} (epoch {last['best_epoch']})\n")
    assert contents(uninterrupted) == before


def test_a_run_that_lacks_its_last_validation_is_not_finished(monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(train, "validate", ctrl_c)
        assert train_tiny("unvalidated", "--epochs 1") == 130
    capsys.readouterr()
    assert train_tiny("unvalidated", "--epochs 1 --resume") == 0
    printed = capsys.readouterr().out
    assert "\nresuming after step 4\nepoch 1  val mAP " in printed
    assert "finished already" not in printed


def test_resumed_without_a_checkpoint_a_log_begins_anew(tmp_path):
    write(tmp_path / "log.jsonl", '{"epoch": 1, "step": 20}\n')
    train.Log(tmp_path, resume=True, step=0, validated=0).append({"step": 1})
    assert read_log(tmp_path) == [{"step": 1}]


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    def save_half(checkpoint, path):
        path.write_bytes(b"half of a checkpoint")
        raise RuntimeError("no space left")  # as PyTorch reports it

    monkeypatch.setattr(torch, "save", save_half)
    file = write(tmp_path / "best.pt", "the previous one")
    with pytest.raises(OSError, match="best.pt: could not be written"):
        train.save(file, Mock(), Mock(), Mock(), epoch=1, step=1, run={})
    assert file.read_text() == "the previous one"
    assert os.listdir(tmp_path) == ["best.pt"]


# ---- several processes


# Of a flag given twice the last counts: --clip-grad 0 is no clipping. On a CPU batch norm is not
# synchronised even if asked for.
RUN_OF_TWO = f"train.py {RUN} --clip-grad 0 --schedule step --milestones 2 4 --sync-bn"


@pytest.fixture(scope="module")
def two_nodes(folder):
    """The folder of an uninterrupted run of two processes, on two nodes: two torchruns on this
    machine that share this folder and an address."""
    command = ("--nnodes 2 --local-addr 127.0.0.1 --rdzv-backend c10d --rdzv-endpoint "
               f"127.0.0.1:{free_port()} {RUN_OF_TWO} --out nodes")
    with ThreadPoolExecutor() as pool:
        nodes = [pool.submit(torchrun, 1, *command.split()) for _ in range(2)]
    runs = [node.result() for node in nodes]
    assert [run.returncode for run in runs] == [0, 0], runs
    assert (runs[0].stdout + runs[1].stdout).count("best val mAP") == 1
    return folder / "nodes"


def test_two_nodes_take_the_steps_of_two_processes(two_nodes):
    check_beside_a_plain_loop(two_nodes, processes=2, max_norm=math.inf)


def test_two_nodes_score_the_network_that_is_saved(two_nodes):
    """With the running means of the first process: one process gets the same mAP from last.pt."""
    flags = "--checkpoint nodes/last.pt --data toy --out scores.npz"
    assert call("evaluate", *flags.split()) == 0
    file = np.load("scores.npz")
    val_map = read_log(two_nodes)[-1]["val_map"]
    assert evaluate.sample_map(file["scores"], file["labels"]) == pytest.approx(val_map)


def test_killed_under_torchrun_and_restarted_is_uninterrupted(two_nodes):
    """torchrun ends the other process and starts both again; they resume without --resume. Twice
    the second process is killed in its 8th step: in step 8, and in step 14."""
    kill = "SIGKILL torch.nn.utils.clip_grad_norm_ 8 fork 1"
    command = f"{kill} {RUN_OF_TWO} --out restarted --workers 1"
    run = torchrun(2, "--max-restarts=2", STOPPED, *command.split())
    assert run.returncode == 0, run.stderr
    steps = "\nbatch 8 = 2 processes x 4 clips; 4 steps an epoch, 24 in all, from"
    assert f"{steps} 6\n" in run.stdout  # by --save-every 3
    assert f"{steps} 12\n" in run.stdout
    assert contents("restarted") == contents(two_nodes)


# ---- what ends a run


# The error about the video of "odd" that is missing. Of two processes the second meets it, in its
# first step.
BROKEN = "odd/train.txt:12: odd/frames/train/gone/img_"


def test_a_broken_video_is_named_with_its_rank():
    run = torchrun(2, "train.py", *RUN.split(), "--data", "odd", "--out", "broken")
    assert re.search(r"exitcode *: 2", run.stderr)
    assert f"[rank 1] train.py: {BROKEN}" in run.stderr
    assert os.listdir("broken") == []


def test_what_is_odd_about_a_list_is_said(capsys):
    """--skip-broken names a video that cannot be read. With cross-entropy, hit rates are printed
    too. If a video of validation has no label, the mAP of the others is added."""
    flags = "--data odd --skip-broken --loss ce --class-weight none --epochs 1"
    assert train_tiny("skip", flags) == 0
    printed = capsys.readouterr()
    assert re.match(f"{BROKEN}.*skipped", printed.err)
    assert re.search(r"\nepoch 1  val mAP .*  top-1 .*  top-5 .*  \(1 of 4 videos have no label",
                     printed.out)


def test_a_loss_or_gradient_that_is_not_finite_ends_a_run():
    """With fp16 only a loss does: the scaler skips a step whose gradient overflows."""
    line = {"step": 2, "loss": 1.0, "grad_norm": math.inf}
    train.check_finite(line, "fp16")
    with pytest.raises(ValueError, match="not finite"):
        train.check_finite(line, "off")
    with pytest.raises(ValueError, match="not finite"):
        train.check_finite({**line, "loss": math.nan}, "fp16")


def test_a_loss_that_is_not_finite_stops_before_a_save(capsys):
    """The first step is finite; its update makes the second one infinite."""
    assert train_tiny("infinite", "--lr 1e30 --save-every 1") == 2
    assert "is not finite at step 2 or shortly before" in capsys.readouterr().err
    assert read("infinite")["iteration"] == 1
