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


def test_lsep_by_hand():
    """One label, at 1. The other classes are at 0 and 2: -1 and +1 away."""
    loss = train.lsep(torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([[1, 0, 0]]))
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-1) + math.exp(1)))


def test_warp_by_hand():
    """The label is at 1, so a class above 0 violates the margin, by as much as it is above 0."""
    labels = torch.tensor([[1, 0, 0]])
    assert train.warp(torch.tensor([[1.0, 0.5, 2.0]]), labels) == (1 + 1 / 2) * (0.5 + 2) / 2
    assert train.warp(torch.tensor([[1.0, -0.5, 2.0]]), labels) == 1 * 2
    assert train.warp(torch.tensor([[1.0, -0.5, 0.0]]), labels) == 0


def test_cross_entropy_by_hand():
    """The label's probability is 3 / 5, and the loss is scaled by 2."""
    logits = torch.tensor([[0.0, math.log(3), 0.0]])
    labels = torch.tensor([[0, 1, 0]])
    loss = train.compute_loss(logits, labels, {"loss": "ce", "loss_scale": 2.0})
    assert loss.item() == pytest.approx(2 * math.log(5 / 3))


def test_class_weights_by_hand():
    """Of the first class there are half as many videos as on average."""
    counts = np.array([2, 4, 6])
    close(train.class_weights(counts, "none"), [1, 1, 1])
    close(train.class_weights(counts, "ratio"), [0.5, 1, 1.5])
    close(train.class_weights(counts, "sqrt"), [0.5**0.5, 1, 1.5**0.5])


def test_a_class_without_videos_weighs_as_the_rarest():
    counts = np.array([2, 4, 6, 0])  # 3 on average
    close(train.class_weights(counts, "ratio"), [2 / 3, 4 / 3, 2, 2 / 3])
    close(train.class_weights(counts, "sqrt"), [(2 / 3)**0.5, (4 / 3)**0.5, 2**0.5, (2 / 3)**0.5])


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
    close(train.scaled_bce(logits, labels), GOLDEN[f"bce160_{number}"], 1e-12)
    close(gradient_of(train.scaled_bce, logits, labels), GOLDEN[f"bce160_grad_{number}"], 1e-12)
    close(train.lsep(logits, labels), GOLDEN[f"lsep_{number}"], 1e-12)
    close(gradient_of(train.lsep, logits, labels), GOLDEN[f"lsep_grad_{number}"], 1e-12)
    close(train.warp(logits, labels), GOLDEN[f"warp_exact_{number}"], 1e-12)
    for kind in ("sqrt", "ratio"):
        weight = train.class_weights(GOLDEN[f"counts_{number}"], kind)
        loss = train.scaled_bce(logits, labels, weight=weight)
        close(loss, GOLDEN[f"bce160_{kind}_{number}"], 1e-6)  # the weights are float32


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("number", [2, 3, 4, 5, 6, 8])  # the small ones
def test_gradients_are_finite_differences(loss, number):
    logits, labels = problem(number)
    expected = torch.zeros_like(logits)
    for place in np.ndindex(*logits.shape):
        step = torch.zeros_like(logits)
        step[place] = 1e-6
        expected[place] = (loss(logits + step, labels) - loss(logits - step, labels)) / 2e-6
    close(gradient_of(loss, logits, labels), expected, 1e-6)


@pytest.mark.parametrize("size", [0.0, 1.0, 1e4])
@pytest.mark.parametrize("loss", LOSSES)
def test_losses_are_finite_far_out_and_without_labels(loss, size):
    labels = torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1], [1, 0, 1, 0]])
    right = size * (2.0 * labels - 1)
    for logits in (right, -right):
        gradient = gradient_of(loss, logits, labels)
        assert loss(logits, labels).isfinite()
        assert gradient.isfinite().all()
        if loss is not train.scaled_bce:  # the first two videos have nothing to rank
            assert loss(logits[:2], labels[:2]) == 0
            assert not gradient[:2].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_named_loss_is_computed_in_float32(dtype):
    logits, labels = problem(5)
    logits = logits.to(dtype)
    exact = logits.double()
    for name, expected in [
        ("bce", train.scaled_bce(exact, labels, 7.0)),
        ("lsep", 7 * train.lsep(exact, labels)),
        ("warp", 7 * train.warp(exact, labels)),
        ("ce", 7 * F.cross_entropy(exact, labels.argmax(dim=1))),
    ]:
        loss = train.compute_loss(logits, labels, {"loss": name, "loss_scale": 7.0})
        close(loss, expected.float(), 1e-5)


def weights_after_50_steps(scale, lr, decay, max_norm=math.inf):
    """A linear classifier's weights in float64, always from one start and the same batches."""
    torch.manual_seed(0)
    weight = torch.randn(20, 6, dtype=torch.float64).mul_(0.3).requires_grad_()
    optimizer = torch.optim.SGD([weight], lr=lr, momentum=0.9, weight_decay=decay)
    for _ in range(50):
        logits = torch.randn(8, 20, dtype=torch.float64) @ weight
        optimizer.zero_grad()
        train.scaled_bce(logits, torch.rand(8, 6) > 0.7, scale).backward()
        torch.nn.utils.clip_grad_norm_([weight], max_norm)
        optimizer.step()
    return weight.detach()


def test_scaling_the_loss_is_not_scaling_the_learning_rate():
    """The report: scaling the loss helped, scaling the learning rate as much did not.

    A step is lr (k g + wd w) = (k lr) (g + wd / k w), with gradient g and weights w. So k times the
    loss is k times the rate with the k-th part of the weight decay. The rate alone leaves the decay
    k times as strong. Clipping measures the gradient before the rate, so it ends even that.
    """
    k, lr, decay = 160.0, 1e-3, 5e-2
    for max_norm, equal in [(math.inf, True), (20, False)]:
        loss = weights_after_50_steps(k, lr, decay, max_norm)
        rate = weights_after_50_steps(1, k * lr, decay, max_norm)
        rate_and_decay = weights_after_50_steps(1, k * lr, decay / k, max_norm)
        assert not torch.allclose(rate, loss, rtol=0.1)
        assert torch.allclose(rate_and_decay, loss, rtol=1e-9) == equal


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
    assert train.learning_rate(step, 180_000, 1001, SLOWFAST) == pytest.approx(rate, rel=3e-4)


def test_half_the_batch_takes_twice_the_steps_at_half_the_rate():
    """The warm-up takes twice as many as well."""
    for step in (0, 16, 4000, 7996, 8000, 8004, 90_000, 179_996):
        half = train.learning_rate(2 * step, 2 * 180_000, 2002, {**SLOWFAST, "batch": 512})
        assert half == pytest.approx(train.learning_rate(step, 180_000, 1001, SLOWFAST) / 2)


# ---- the order of the videos


def test_an_epoch_is_a_permutation_that_the_seed_decides():
    """Five videos are two batches of two; every epoch drops another one. (epoch, row)"""
    assert list(train.batches(5, 2, seed=0, start=0, total=4, rank=0, world=1)) == [
        [(0, 2), (0, 4)], [(0, 3), (0, 0)],
        [(1, 1), (1, 4)], [(1, 3), (1, 0)]]
    assert list(train.batches(5, 2, seed=1, start=0, total=1, rank=0, world=1)) == [
        [(0, 4), (0, 0)]]


def test_every_step_of_every_process_has_its_own_seed():
    seeds = {train.step_seed(*numbers) for numbers in np.ndindex(3, 50, 4)}
    assert len(seeds) == 3 * 50 * 4


# ---- first weights

CLASSES = [f"class {k}" for k in range(10)]


def tin_recipe(init="none", **values):
    return {"frames": 4, "backbone": "resnet18", "dropout": 0.5, "init": str(init), **values}


def our_checkpoint(tensors):
    return {"model": tensors, "config": {"model": "tin", "recipe": {}, "categories": CLASSES}}


@pytest.fixture(scope="module")
def trained():
    """The state dict of a TIN that was trained: no tensor has its initial value."""
    torch.manual_seed(0)
    state = tin.build(tin_recipe(), 10).state_dict()
    for key, value in state.items():
        if value.is_floating_point():
            state[key] = value + 0.1 * torch.randn_like(value)
    return state


def load_into_tin(tmp_path, checkpoint, kept, categories=CLASSES, **values):
    """Load a checkpoint into a new TIN; return what load_init says. The TIN must hold the file's
    tensors, and its own initial values where the key fits the pattern `kept`."""
    file = tmp_path / "init.pt"
    torch.save(checkpoint, file)
    recipe = tin_recipe(file, **values)
    torch.manual_seed(1)
    model = tin.build(recipe, len(categories))
    before = copy.deepcopy(model.state_dict())
    message = train.load_init(tin, model, recipe, categories)

    theirs = evaluate.state_of(tin, checkpoint, file)
    for key, value in model.state_dict().items():
        expected = theirs.get(key)
        if re.match(kept, key):
            expected = before[key]
        if not key.endswith("num_batches_tracked"):
            assert torch.equal(value, expected), key
    return message


def test_init_takes_our_own_checkpoint_whole(tmp_path, trained):
    message = load_into_tin(tmp_path, our_checkpoint(trained), "nothing")
    assert message.endswith("init.pt: 166 of 166 tensors read")


@pytest.mark.parametrize("origin", [tsn, tsm])
def test_init_starts_tin_from_tsn_and_tsm(tmp_path, origin):
    """All but TIN's small networks, of which these files know nothing."""
    tensors = origin.build({**tin_recipe(), "shift_every": 1}, 10).state_dict()
    file = {"state_dict": {f"module.{key}": value for key, value in tensors.items()}}
    message = load_into_tin(tmp_path, file, "interlace")
    assert message.splitlines()[0].endswith("102 of 166 tensors read")
    assert "keeps its initial value: interlace.layer1.0.offset_conv.weight is not in the" in message
    assert message.endswith("and 61 others")


def test_init_keeps_the_classifier_of_other_classes(tmp_path, trained):
    """Where its size fits, only the names tell that its rows mean other classes."""
    fewer = load_into_tin(tmp_path, {"state_dict": trained}, "fc", CLASSES[:7])
    assert fewer.splitlines()[0].endswith("164 of 166 tensors read")
    assert "keeps its initial value: fc.weight is (10, 512) in the file, (7, 512) in" in fewer
    others = load_into_tin(tmp_path, our_checkpoint(trained), "fc", CLASSES[::-1])
    assert "keeps its initial value: fc.weight is for other classes in the file" in others


def test_init_with_other_frames_keeps_the_layers_over_time(tmp_path, trained):
    over_time = r".*offset_(fc1\.(weight|bias)|fc2\.weight)"
    message = load_into_tin(tmp_path, our_checkpoint(trained), over_time, frames=8)
    assert "interlace.layer1.0.offset_fc1.bias is (4,) in the file, (8,) in the network" in message


@pytest.mark.parametrize("removed, values, said", [
    (r"backbone\.bn1\.bias", {}, "backbone.bn1.bias is not in the file; the file belongs to anoth"),
    (r".*layer3\.0\.offset_conv\.bias", {}, "layer3.0.offset_conv.bias is not in the file"),
    ("nothing", {"backbone": "resnet50"}, "(64, 64, 3, 3) in the file, (64, 64, 1, 1) in the netw"),
    ("backbone|interlace", {"categories": CLASSES[::-1]}, "only 0 of 166 tensors fit; for example"),
    ("backbone", {}, "only 66 of 166 tensors fit; for example, backbone.conv1.weight is not in"),
])
def test_init_refuses_to_train_a_part_from_scratch(tmp_path, trained, removed, values, said):
    file = {key: trained[key] for key in trained if not re.match(removed, key)}
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        load_into_tin(tmp_path, our_checkpoint(file), removed, **values)
    assert str(error.value).startswith(f"--init {tmp_path}/init.pt: ")


def test_init_imagenet_offline_names_a_place_for_the_file(tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    model = tin.build(tin_recipe(), 10)
    place = tmp_path / "hub" / "checkpoints"
    with pytest.raises(OSError, match=f"no route to host.* put it into {place}, or pass"):
        train.load_init(tin, model, tin_recipe("imagenet"), CLASSES)

    weights = torchvision.models.resnet18().state_dict()
    torch.save(weights, place / "resnet18-f37072fd.pth")
    train.load_init(tin, model, tin_recipe("imagenet"), CLASSES)
    assert torch.equal(model.backbone.layer4[1].conv2.weight, weights["layer4.1.conv2.weight"])


# ---- whole runs

# The last three flags make a difference in every step.
RUN = ["--model", "tiny", "--data", "toy", "--device", "cpu", "--workers", "0", "--save-every", "3",
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


def weights(folder):
    return read(folder)["model"]


def close_models(ours, theirs, tolerance):
    assert list(ours) == list(theirs)  # no prefix of DDP's or torch.compile's
    for key, value in theirs.items():
        assert ours[key].dtype == value.dtype
        close(ours[key], value, tolerance)


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


def test_the_script_in_another_folder(scripts, tmp_path):
    """What a run of the default settings logs, saves and prints last."""
    run = python(scripts / "train.py", "--model", "tiny", "--data", scripts / "toy", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    out = tmp_path / "runs" / "tiny"
    lines = read_log(out)
    assert [(line["epoch"], line["step"]) for line in lines if "val_map" in line] == [
        (1, 4), (2, 8), (3, 12), (4, 16), (5, 20), (6, 24)]
    assert set(lines[0]) == {"epoch", "step", "loss", "lr", "grad_norm", "clips_per_s",
                             "data_share"}

    last = read(out)
    best = read(out, "best.pt")
    assert set(last) == {"model", "optimizer", "scaler", "epoch", "iteration", "validated",
                         "best_map", "best_epoch", "config", "class_counts"}
    assert (last["epoch"], last["iteration"], last["validated"]) == (6, 24, 24)
    top = max(line.get("val_map", 0) for line in lines)
    assert last["best_map"] == best["best_map"] == top
    assert last["best_epoch"] == best["epoch"]
    printed = run.stdout.splitlines()
    assert "loss bce, scale 5.88235; classes / labels per video: 5.8" in printed
    assert "learning rate 0.2 x 8 / 8 = 0.2" in printed
    assert printed[-1] == f"best val mAP {100 * top:.2f} (epoch {best['epoch']})"


def trained_by_hand(folder, processes):
    """The state dict after the run of this folder, written out. Every process has its own share of
    the batch, dropout and running means, of which the first one's are saved. All step by the mean
    of their gradients."""
    import tiny
    recipe = read(folder)["config"]["recipe"]
    videos = data.VideoList("toy", "train")
    clips = data.TrainClips(videos, recipe, seed=0)
    weight = train.class_weights(videos.class_counts, "sqrt")
    torch.manual_seed(0)
    net = tiny.build(recipe, 10)
    optimizer = torch.optim.SGD(net.parameters(), momentum=0.9, weight_decay=5e-4)
    shares = [train.batches(32, 8, 0, 0, 24, rank, processes) for rank in range(processes)]

    for step in range(24):
        for rank, share in enumerate(shares):
            frames, labels = zip(*[clips[index] for index in next(share)])
            batch = data.normalise(torch.stack(frames), recipe["mean"], recipe["std"])
            buffers = {}
            if rank > 0:
                buffers = copy.deepcopy(dict(net.named_buffers()))
            torch.manual_seed(train.step_seed(0, step, rank))
            logits = torch.func.functional_call(net, buffers, batch)
            loss = train.scaled_bce(logits, torch.stack(labels), 10 / 1.7, weight)
            (loss / processes).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 0.5)
        optimizer.param_groups[0]["lr"] = train.learning_rate(step, 24, 4, recipe)
        optimizer.step()
        optimizer.zero_grad()
    return net.state_dict()


def test_a_run_takes_the_steps_of_its_recipe(straight):
    close_models(weights(straight), trained_by_hand(straight, 1), 1e-3)


def test_the_best_epoch_is_the_latest_of_equals(folder):
    """At a learning rate of 0 and without batch norm every epoch scores alike."""
    assert train_tiny("equal", "--lr", 0, "--no-norm", "--epochs", 2) == 0
    assert read(folder / "equal")["best_epoch"] == 2
    assert read(folder / "equal", "best.pt")["iteration"] == 8


def test_unlabelled_videos_give_two_maps(folder, capsys):
    """Two of eight videos of the validation list count as AP 0."""
    change_list("two", "val", lambda lines: [
        f"{line.split()[0]} 24 -1" if row < 2 else line for row, line in enumerate(lines)])
    assert train_tiny("two/run", "--data", "two", "--epochs", 1) == 0
    printed = capsys.readouterr().out
    assert re.search(r"two/val.txt: 8 videos, .*, 2 without a label\n", printed)
    both = re.search(r"val mAP (.*)  \(2 of 8 videos have no label .* others (.*)\)\n", printed)
    assert float(both[1]) == pytest.approx(float(both[2]) * 6 / 8, abs=0.01)


def test_cross_entropy_trains_on_single_labels(folder, capsys):
    change_list("single", "train", lambda lines: [line.split(",")[0] for line in lines])
    assert train_tiny("single/run", "--data", "single", "--loss", "ce", "--class-weight", "none",
                      "--epochs", 1) == 0
    printed = capsys.readouterr().out
    assert re.search(r"epoch 1  val mAP \d+\.\d\d  top-1 \d+\.\d\d  top-5 \d+\.\d\d\n", printed)


def test_iterations_are_counted_at_the_reference_batch(folder):
    """10 steps of 8 clips are 20 of 4, at half the rate. Milestones are still in epochs."""
    assert train_tiny("counted", "--iterations", 10, "--batch", 4, "--schedule", "step",
                      "--milestones", 1, 2, "--warmup", 0, "--save-every", 100) == 0
    steps = [line for line in read_log(folder / "counted") if "loss" in line]
    assert [line["step"] for line in steps] == [8, 16, 20]
    assert [line["lr"] for line in steps] == pytest.approx([0.1, 0.01, 0.001])


def test_another_loss_has_the_scale_1(folder, monkeypatch):
    """160, or the toy's 10 / 1.7, belongs to the mean over all classes."""
    for flags, scale in [
        ("", 10 / 1.7), ("--loss bce", 10 / 1.7), ("--loss ce", 1), ("--loss ce --loss-scale 3", 3),
    ]:
        monkeypatch.setattr(sys, "argv", ["train.py", "--model", "tiny", *flags.split()])
        assert train.parse_arguments().recipe["loss_scale"] == scale


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


# ---- the plan of a run


@pytest.fixture
def plan(folder, monkeypatch, capsys):
    """A function: flags -> what is printed before the first step. A run has 24 steps."""
    def print_plan(*flags):
        monkeypatch.setattr(sys, "argv", ["train.py", "--model", "tiny", "--data", "toy", *flags])
        args = train.parse_arguments()
        videos, val_videos = [data.VideoList(args.data, split) for split in ("train", "val")]
        steps = train.count_steps(args.recipe, len(videos))
        model = args.module.build(args.recipe, len(videos.categories))
        train.print_plan(args, torch.device("cpu"), 1, model, videos, val_videos, *steps, 0)
        return capsys.readouterr().out
    return print_plan


@pytest.mark.parametrize("flags, words", [
    ("--warmup 5", "\nwarm-up 5 steps, 21 % of the run\n"),
    ("--warmup 5", "\nwarning: the warm-up's 5 steps are much of a run of 24; shorten it with --w"),
    ("--schedule step --milestones 2 6 8", "the milestones [6, 8], so the learning rate does not "),
    ("--batch 4", "--reference-batch 4 would keep 0.2)\n"),
    ("--test-resize 72", "\nthe scales of the fuller protocols follow test_resize: [64]\n"),
    ("--recipe toy", "\ntiny toy: 570 parameters, 10 classes\n"),
])
def test_the_plan_says(plan, flags, words):
    assert words in plan(*flags.split())


@pytest.mark.parametrize("flags, words", [
    ("--warmup 4", "warning: the warm-up"),          # a sixth
    ("--milestones 2 6 8", "the milestones"),        # the schedule is cosine
    ("--batch 4 --reference-batch 4", "would keep"),
    ("--test-resize 72 --scales 40", "follow"),
])
def test_the_plan_does_not_say(plan, flags, words):
    assert words not in plan(*flags.split())


def test_videos_on_both_sides_are_counted(plan):
    both = Path("toy", "train.txt").read_text().splitlines()[:3]
    change_list("shared", "val", lambda lines: lines + both)
    assert ("warning: 3 of 11 videos of shared/val.txt, such as train/00000, are in "
            "shared/train.txt too") in plan("--data", "shared")


def test_classes_without_videos_are_named(plan):
    change_list("absent", "categories", lambda names: [*names, "rare"])
    words = "warning: 1 classes, such as rare, have no training video"
    assert words in plan("--data", "absent", "--class-weight", "ratio")
    assert words not in plan("--data", "absent")


def test_a_first_row_for_the_toy_is_no_row_for_data(folder, capsys):
    Path("only_toy.py").write_text("from tiny import ROW, build\nRECIPES = {'toy': ROW}\n")
    arguments = ["train", "--model", "only_toy", "--data", "toy", "--epochs", 1, "--workers", 0]
    assert call(*arguments) == 2
    assert "row for real data before it, or pass --recipe toy" in capsys.readouterr().err
    assert call(*arguments, "--recipe", "toy") == 0


# ---- what a run needs


def test_tasks_of_srun_need_torchrun(monkeypatch):
    """SLURM_NTASKS is also set in a batch script, which starts one process."""
    monkeypatch.setenv("SLURM_NTASKS", "2")
    assert evaluate.start_process("cpu")[:2] == (0, 1)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    with pytest.raises(ValueError, match="torchrun --nnodes N"):
        evaluate.start_process("cpu")
    monkeypatch.setenv("RANK", "0")  # torchrun's
    assert evaluate.start_process("cpu")[:2] == (0, 1)


def test_compile_needs_a_compiler(folder, capsys, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    assert train_tiny("uncompiled", "--compile") == 2
    assert "--compile: torch.compile needs a C++ compiler" in capsys.readouterr().err
    assert os.listdir("uncompiled") == []


# ---- one run in a folder


def test_of_two_runs_in_one_folder_the_second_stops(tmp_path):
    first = train.Log(tmp_path, False, 0, 0)
    with pytest.raises(ValueError, match="log.jsonl: a run is there already"):
        train.Log(tmp_path, False, 0, 0)
    first.append({"step": 1})
    assert read_log(tmp_path) == [{"step": 1}]


def test_a_run_that_ends_before_its_first_line_leaves_no_log(tmp_path):
    log = train.Log(tmp_path, False, 0, 0)
    assert os.listdir(tmp_path) == ["log.jsonl"]
    del log
    assert os.listdir(tmp_path) == []


def test_resumed_without_a_checkpoint_a_log_begins_anew(tmp_path):
    data.write_lines(tmp_path / "log.jsonl", ['{"epoch": 1, "step": 20}'])
    (tmp_path / "last.pt.part-1").touch()  # of a killed run
    train.Log(tmp_path, True, 0, 0).append({"step": 1})
    assert read_log(tmp_path) == [{"step": 1}]
    assert os.listdir(tmp_path) == ["log.jsonl"]


# ---- stopped and resumed


def run_stopped(folder, out, stops, *flags, processes=1, **environ):
    """Start train.py and stop it at one place, or at one in every start by torchrun."""
    environ["STOPS"] = json.dumps(stops)
    arguments = [ROOT / "tests" / "stopped.py", "train.py", *RUN, "--out", out, *flags]
    if processes == 1:
        return python(*arguments, cwd=folder, **environ)
    return torchrun(processes, f"--max-restarts={len(stops)}", *arguments, cwd=folder, **environ)


def test_stopped_and_resumed_is_uninterrupted(folder, straight):
    """Within an epoch, in a validation, and while last.pt is written after it; by Ctrl-C, which is
    one line, and by a kill; however the workers are started. Each start goes on from what the one
    before has left."""
    out = folder / "stopped"
    for signal_name, place, call, start, workers, iteration in [
        ("SIGINT", "step", 4, "spawn", 1, 3),        # by --save-every
        ("SIGKILL", "step", 5, "fork", 2, 6),
        ("SIGTERM", "validation", 1, "fork", 0, 8),
        ("SIGKILL", "save", 2, "fork", 0, 8),        # best.pt is written, last.pt is not
        ("SIGINT", "validation", 2, "forkserver", 1, 12),
        ("SIGINT", "save", 1, "fork", 1, 12),
    ]:
        stop = {"rank": 0, "place": place, "call": call, "signal": signal_name}
        run = run_stopped(folder, out, [stop], "--resume", "--workers", workers, START=start)
        if signal_name == "SIGINT":
            assert run.returncode == 130
            assert run.stderr == (
                "train.py: stopped; the same command with --resume goes on from OUT/last.pt\n")
        else:
            assert run.returncode == -signal.Signals[signal_name], run.stderr
        assert read(out)["iteration"] == iteration
        assert len(list(out.glob("*.part-*"))) == (signal_name == "SIGKILL" and place == "save")
        with open(out / "log.jsonl", "a") as file:
            file.write('{"epoch": 3, "st')  # as a kill in mid-line leaves it
    assert train_tiny(out, "--resume", "--workers", 2) == 0
    assert_same_run(out, straight)


def test_ctrl_c_does_not_stop_the_workers(folder, monkeypatch):
    """In a terminal it reaches every process, and only the main process acts on it. Here it reaches
    the workers alone, those of training and those of validation."""
    def interrupting(function):
        def interrupt(*arguments, **options):
            for worker in multiprocessing.active_children():
                os.kill(worker.pid, signal.SIGINT)
            return function(*arguments, **options)
        return interrupt

    # a validation of several batches, so that its worker is still needed after the first
    others = Path("toy", "train.txt").read_text().splitlines()
    change_list("long", "val", lambda lines: lines + others)
    monkeypatch.setattr(train, "train_step", interrupting(train.train_step))
    monkeypatch.setattr(evaluate, "score_views", interrupting(evaluate.score_views))
    assert train_tiny("long/run", "--data", "long", "--workers", 1, "--epochs", 1) == 0


@pytest.mark.parametrize("flags, tolerance", [
    (["--channels-last"], 1e-3), (["--compile"], 1e-3), (["--amp", "fp16"], 0.1),
    (["--amp", "bf16"], 0.1)])
def test_a_run_goes_on_without_its_flags(folder, straight, flags, tolerance, monkeypatch):
    """Ctrl-C in the second validation; then the run goes on in another memory layout, precision, or
    not compiled. A momentum in the wrong layout would change its values in the first digit."""
    out = folder / f"without {flags[-1]}"
    validate = train.validate

    def interrupted(*arguments, **options):
        if read(out)["iteration"] == 8:
            raise KeyboardInterrupt
        return validate(*arguments, **options)

    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda net: compile(net, backend="eager"))
    monkeypatch.setenv("CXX", sys.executable)  # which needs no compiler
    monkeypatch.setattr(train, "validate", interrupted)
    assert train_tiny(out, *flags) == 130
    monkeypatch.setattr(train, "validate", validate)
    assert train_tiny(out, "--resume") == 0
    close_models(weights(out), weights(straight), tolerance)
    ours, theirs = [read(run)["optimizer"]["param_groups"] for run in (out, straight)]
    assert ours == theirs
    if "--amp" in flags:
        assert read_log(out)[0]["loss"] != read_log(straight)[0]["loss"]


def test_a_finished_run_says_so_and_changes_nothing(straight, capsys):
    before = (straight / "last.pt").read_bytes()
    assert train_tiny("straight", "--resume") == 0
    printed = capsys.readouterr().out
    last = read(straight)
    assert "finished already" in printed
    assert printed.splitlines()[-1] == (
        f"best val mAP {100 * last['best_map']:.2f} (epoch {last['best_epoch']})")
    assert (straight / "last.pt").read_bytes() == before


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path):
    """A limit on the size of files stands for the disk; the checkpoint has 400,000 bytes."""
    resource = pytest.importorskip("resource")
    layer = torch.nn.Linear(100_000, 1)
    parts = (layer, *train.make_optimizer(layer, train.RECIPE, torch.device("cpu"), "off"))
    train.save(tmp_path / "best.pt", *parts, 1, 1, {})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
    try:
        with pytest.raises(OSError, match="best.pt: could not be written"):
            train.save(tmp_path / "best.pt", *parts, 1, 2, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert read(tmp_path, "best.pt")["iteration"] == 1
    assert os.listdir(tmp_path) == ["best.pt"]


# ---- several processes


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
    close_models(weights(two_nodes), trained_by_hand(two_nodes, 2), 1e-3)


def test_two_nodes_score_the_network_that_is_saved(two_nodes, capsys):
    """With the running means of the first process: one process gets the same mAP from best.pt."""
    best_map = read(two_nodes)["best_map"]
    assert call("evaluate", "--checkpoint", two_nodes / "best.pt", "--data", "toy") == 0
    assert capsys.readouterr().out.endswith(f"\nmAP {100 * best_map:.2f}\n")


def test_killed_under_torchrun_and_restarted_is_uninterrupted(folder, two_nodes):
    """torchrun ends the other process and starts both again. They resume without --resume."""
    stops = [{"rank": 1, "place": "step", "call": 8, "signal": "SIGKILL"},
             {"rank": 0, "place": "validation", "call": 1, "signal": "SIGKILL"}]
    run = run_stopped(folder, "restarted", stops, "--sync-bn", "--workers", 2, processes=2)
    assert run.returncode == 0, run.stderr
    assert "24 in all, from 6\n" in run.stdout
    assert "24 in all, from 8\n" in run.stdout
    assert_same_run(folder / "restarted", two_nodes)


def test_two_processes_take_the_steps_of_one(folder):
    """Where nothing is random and there are no running means."""
    flags = ["--no-norm", "--dropout", 0, "--iterations", 5]
    assert train_tiny("one", *flags) == 0
    run = torchrun(2, "train.py", *RUN, "--out", "two", *flags, cwd=folder)
    assert run.returncode == 0, run.stderr
    assert "batch 8 = 2 processes x 4 clips; 4 steps an epoch, 5 in all" in run.stdout
    close_models(weights(folder / "one"), weights(folder / "two"), 1e-5)
    for one, two in zip(read_log(folder / "one"), read_log(folder / "two")):
        for key in {"step", "loss", "grad_norm", "val_map"} & set(one):
            assert two[key] == pytest.approx(one[key], rel=1e-5)


def test_a_batch_that_the_processes_cannot_share_is_refused(folder):
    videos = data.VideoList("toy", "train")
    with pytest.raises(ValueError, match="--batch 8: is split over 3 processes"):
        train.check_videos(videos, videos, {"batch": 8, "loss": "bce"}, 3)


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


# ---- what ends a run


def change_list(folder, split, change):
    """Make a data folder with the toy's frames and lists, of which one goes through `change`, a
    function of its lines."""
    shutil.copytree("toy", folder, ignore=shutil.ignore_patterns("frames"))
    os.symlink(os.path.abspath("toy/frames"), f"{folder}/frames")
    path = Path(folder, f"{split}.txt")
    data.write_lines(path, change(path.read_text().splitlines()))


@pytest.fixture
def broken(folder):
    """The data folder "broken" lists a video that is not there; the second of two processes meets
    it in the first step. Returns its place in the list and the beginning of a frame's name."""
    _, row = next(train.batches(32, 8, 0, 0, 1, 1, 2))[0]
    if not (folder / "broken").exists():
        change_list("broken", "train", lambda lines: [
            *lines[:row], "train/gone 24 3", *lines[row + 1 :]])
    return f"broken/train.txt:{row + 1}: broken/frames/train/gone/img_"


def test_a_broken_video_is_named_with_its_rank(broken, folder):
    run = torchrun(2, "train.py", *RUN, "--data", "broken", "--out", "broken/two", cwd=folder)
    assert run.returncode == 1  # torchrun's
    assert re.search(r"exitcode *: 2", run.stderr)
    lines = [line for line in run.stderr.splitlines() if line.startswith("[rank 1] train.py: ")]
    assert len(lines) == 1
    assert broken in lines[0]
    assert os.listdir("broken/two") == []


def test_skip_broken_says_so_and_goes_on(broken, capsys):
    assert train_tiny("broken/skip", "--data", "broken", "--skip-broken", "--epochs", 1) == 0
    line = capsys.readouterr().err.strip()
    assert line.startswith(broken)
    assert "skipped" in line


@pytest.mark.parametrize("flags", [[], ["--amp", "fp16"]])
def test_a_loss_that_is_not_finite_stops_before_a_save(folder, capsys, flags):
    """The first step is finite; its update makes the second one infinite."""
    out = folder / f"infinite{len(flags)}"
    assert train_tiny(out, "--lr", 1e30, "--save-every", 1, *flags) == 2
    message = "is not finite at step 2 or shortly before, and no checkpoint"
    assert message in capsys.readouterr().err
    last = read(out)
    assert (last["epoch"], last["iteration"]) == (1, 1)
    assert all(value.isfinite().all() for value in last["model"].values())
