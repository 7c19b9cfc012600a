"""The metric is scikit-learn's, the views are the report's, the scores are those of a loop over one view at a time for
any batch and any number of processes; files of other people are read or refused by name; a video gets its labels.

    python -m pytest tests/test_evaluate.py

A network of two layers, trained by two processes for an epoch, stands for the five: a model file beside the scripts is
all that a new model takes. Clips come from ffmpeg's generators.
"""
import argparse
import functools
import importlib
import itertools
import json
import multiprocessing
import os
import pathlib
import pickle
import re
import runpy
import shutil
import socket
import struct
import subprocess
import sys
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import data
import evaluate
import slowfast
import tin
import trn
import tsm
import tsn
from conftest import ROOT

METRICS = dict(np.load(ROOT / "tests" / "golden" / "metrics.npz"))
CPU = torch.device("cpu")
needs_ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None and os.environ.get("CI") != "true",
                                  reason="the program ffmpeg is missing")
TINY = '''
import torch.nn as nn
import tsn

RECIPES = {"toy": {**tsn.RECIPES["toy"], "frames": 4, "test_resize": 34, "clips": 3, "crops": 3, "scales": (36, 40),
                   "epochs": 1, "dropout": 0.0}}


class Tiny(nn.Module):
    """clip (B, T, 3, H, W) -> logits (B, K)."""

    def __init__(self, num_classes, frames):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 5, stride=4), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8 * frames, num_classes)

    def forward(self, clip):
        x = self.bn(self.conv(clip.flatten(0, 1))).relu().mean(dim=(2, 3))
        return self.fc(x.unflatten(0, clip.shape[:2]).flatten(1))


def build(recipe, num_classes):
    return Tiny(num_classes, recipe["frames"])


def convert(checkpoint):
    state = checkpoint.get("model", checkpoint)
    if "conv.weight" not in state:
        raise ValueError("tiny.py has no place for these keys")
    return state
'''


# The metric.


def slow_precision(scores, labels):
    """AP of one row by its definition, pair by pair."""
    positives = [u for u in range(len(labels)) if labels[u]]
    total = 0.0
    for u in positives:
        total += sum(scores[p] >= scores[u] for p in positives) / sum(score >= scores[u] for score in scores)
    return total / len(positives) if positives else 0.0


@pytest.mark.parametrize("as_float64", [False, True])
@pytest.mark.parametrize("case", range(int(METRICS["n"])))
def test_metric_is_scikit_learns(case, as_float64):
    scores, labels = METRICS[f"scores_{case}"], METRICS[f"labels_{case}"]
    scores = scores.astype(np.float64) if as_float64 else scores
    ours = evaluate.average_precision(scores, labels)
    assert ours.dtype == np.float64
    np.testing.assert_allclose(ours, METRICS[f"sklearn_rows_{case}"], rtol=0, atol=1e-12)
    assert evaluate.sample_map(scores, labels) == pytest.approx(float(METRICS[f"sklearn_{case}"]), rel=0, abs=1e-12)


@pytest.mark.parametrize("levels", [2, 5, 10**9])
def test_metric_is_the_loop_over_pairs(levels):
    rng = np.random.default_rng(levels)
    scores, labels = rng.integers(levels, size=(40, 11)) / levels, rng.random((40, 11)) < rng.random((40, 1))
    labels[0], labels[1] = False, True
    expected = [slow_precision(*row) for row in zip(scores, labels)]
    np.testing.assert_allclose(evaluate.average_precision(scores, labels), expected, rtol=0, atol=1e-12)
    assert expected[:2] == [0, 1]


@pytest.mark.parametrize("scores, labels, expected", [
    ([3, 2, 1, 0], [1, 0, 0, 0], 1),
    ([3, 2, 1, 0], [0, 0, 0, 1], 1 / 4),
    ([3, 2, 1, 0], [0, 1, 0, 1], (1 / 2 + 2 / 4) / 2),
    ([1, 1, 1, 1], [1, 0, 0, 0], 1 / 4),  # a tie counts against the label
    ([2, 1, 1, 0], [0, 1, 0, 0], 1 / 3),
    ([2, 1, 1, 0], [0, 1, 1, 0], 2 / 3),
    ([3, 2, 1, 0], [0, 0, 0, 0], 0),
    ([0, 0, 0, 0], [1, 1, 1, 1], 1),
    ([-np.inf, 0, np.inf, 1], [0, 0, 1, 0], 1),
    ([1 + 1e-12, 1, 0, 0], [1, 0, 0, 0], 1),  # compared as stored: in float32 these would tie
])
def test_metric_by_hand(scores, labels, expected):
    assert evaluate.average_precision([scores], [labels]).tolist() == [expected]


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("truth", [np.uint8, np.int64, bool, np.float32, torch.uint8, torch.bool, torch.float32])
def test_metric_of_all_types(kind, truth):
    scores, labels = METRICS["scores_0"], METRICS["labels_0"]
    scores = torch.from_numpy(scores).to(kind) if isinstance(kind, torch.dtype) else scores.astype(kind)
    labels = torch.from_numpy(labels).to(truth) if isinstance(truth, torch.dtype) else labels.astype(truth)
    expected = [slow_precision(*row) for row in zip(np.asarray(scores).tolist(), np.asarray(labels).tolist())][:5]
    np.testing.assert_allclose(evaluate.average_precision(scores, labels)[:5], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scores, labels, says", [
    ([[0.5, np.nan]], [[1, 0]], "a score is not a number"),
    ([[0.5, 0.1]], [[2, 0]], "labels must be 0 or 1"),
    ([[0.5, 0.1]], [[-1, 0]], "labels must be 0 or 1"),
    ([[0.5, 0.1]], [[0.5, 0]], "labels must be 0 or 1"),
    ([[0.5, 0.1]], [[np.nan, 0]], "labels must be 0 or 1"),
    ([[0.5, 0.1]], [[1, 0, 0]], r"scores \(1, 2\) and labels \(1, 3\)"),
    ([[0.5, 0.1]], [[1, 0], [1, 0]], r"scores \(1, 2\) and labels \(2, 2\)"),
    ([0.5, 0.1], [1, 0], r"scores \(2,\) and labels \(2,\)"),
    ([[[0.5, 0.1]]], [[[1, 0]]], r"scores \(1, 1, 2\)"),
])
def test_metric_refuses(scores, labels, says):
    with pytest.raises(ValueError, match=says):
        evaluate.average_precision(scores, labels)
    with pytest.raises(ValueError, match=says):
        evaluate.sample_map(scores, labels)


def percent(value):
    return f"{100 * value:.2f}"


def test_printed_figures_are_those_of_loops(capsys):
    rng = np.random.default_rng(3)
    scores, labels = rng.integers(50, size=(30, 12)) / 50, (rng.random((30, 12)) < 0.2).astype(np.uint8)
    labels[4], labels[:, 7] = 0, 0  # a video without labels, a class that no video has
    evaluate.print_metrics(scores, labels)
    lines = capsys.readouterr().out.splitlines()
    with_labels = [i for i in range(30) if labels[i].any()]
    rows = [slow_precision(*row) for row in zip(scores, labels)]
    columns = [slow_precision(scores[:, k], labels[:, k]) for k in range(12) if labels[:, k].any()]
    best = [sorted(range(12), key=lambda k: (-scores[i, k], k)) for i in range(30)]
    top1 = [labels[i, best[i][0]] for i in with_labels]
    top5 = [max(labels[i, k] for k in best[i][:5]) for i in with_labels]
    assert len(lines) == 3 and lines[0].startswith(f"30 videos, {30 - len(with_labels)} without labels")
    assert re.findall(r"\d+\.\d+", lines[0]) == [percent(sum(rows) / len(with_labels))]
    assert re.search(r"class-level mAP.*top-1.*top-5", lines[1])
    assert re.findall(r"\d+\.\d+", lines[1]) == [percent(np.mean(figure)) for figure in (columns, top1, top5)]
    assert lines[2] == f"mAP {percent(sum(rows) / 30)}"


def test_a_list_without_labels_has_no_map(capsys):
    videos = [data.Video("a", 3, []), data.Video("b", 3, [])]
    assert evaluate.multi_hot(videos, 4) is None
    evaluate.print_metrics(np.zeros((2, 4)), None)
    assert "no mAP" in (line := capsys.readouterr().out) and not re.search(r"\d", line)
    videos[1] = data.Video("b", 3, [0, 3])
    assert evaluate.multi_hot(videos, 4).tolist() == [[0, 0, 0, 0], [1, 0, 0, 1]]


# Views.


@pytest.mark.parametrize("width, height, crop, crops, places", [
    (340, 256, 256, 3, [(0, 0), (84, 0), (42, 0)]),
    (256, 340, 256, 3, [(0, 0), (0, 84), (0, 42)]),
    (256, 256, 256, 3, [(0, 0), (0, 0), (0, 0)]),
    (340, 256, 224, 3, [(0, 16), (116, 16), (58, 16)]),
    (256, 340, 224, 3, [(16, 0), (16, 116), (16, 58)]),
    (340, 256, 224, 1, [(58, 16)]),
    (256, 340, 224, 1, [(16, 58)]),
    (171, 169, 112, 1, [(30, 28)]),  # 29.5 and 28.5, rounded as Python and torchvision do, to even
    (170, 128, 128, 3, [(0, 0), (42, 0), (21, 0)]),
])
def test_places_of_crops(width, height, crop, crops, places):
    assert evaluate.crop_places(width - crop, height - crop, str(crops), None) == places


def test_random_places():
    rng = np.random.default_rng(0)
    places = [evaluate.crop_places(4, 2, "random", rng) for _ in range(1000)]
    assert {len(some) for some in places} == {3}
    assert {place for some in places for place in some} == set(itertools.product(range(5), range(3)))  # the last too
    assert evaluate.crop_places(4, 2, "random", np.random.default_rng(0)) == places[0]


MODELS = ("tsn", "trn", "tsm", "tin", "slowfast")


@pytest.mark.parametrize("name, row", [(name, row) for name in MODELS for row in importlib.import_module(name).RECIPES])
def test_protocols_of_every_recipe(name, row):
    recipe = importlib.import_module(name).RECIPES[row]
    three_d, toy = name == "slowfast", row == "toy"
    one = (36, 32) if toy else (128, 112) if three_d else (256, 224)
    sides = ([32, 30, 28] if three_d else [32]) if toy else [128, 144, 160] if three_d else [256]
    clips = 10 if three_d else 5
    expected = {"clip": (1, "1", [one]), "dense": (clips, "3", [(sides[0], sides[0])]),
                "multiscale": (clips, "3", [(side, side) for side in sides])}
    for protocol, values in expected.items():
        ours = evaluate.make_protocol(recipe, protocol)
        assert ours == dict(zip(("name", "clips", "crops", "sizes"), (protocol, *values)))
    assert evaluate.make_protocol(recipe) == evaluate.make_protocol(recipe, "clip")
    for crops in (1, "1", "random"):  # as in a row, and as given by a flag
        dense = evaluate.make_protocol({**recipe, "crops": crops}, "dense")
        assert dense == {**evaluate.make_protocol(recipe, "dense"), "crops": str(crops)}


class Reader:
    """Frames that show their own index: (n, height, width, 3), and whether a pixel is left, right, up or down."""

    def __init__(self, width, height):
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        self.place, self.asked = torch.stack([x, y], dim=2), []

    def __call__(self, indices):
        self.asked.append(list(indices))
        return torch.stack([torch.cat([torch.full((*self.place.shape[:2], 1), int(i)), self.place], dim=2)
                            for i in indices]).to(torch.uint8)


def seen(views):
    """[(frames, x, y, weight), ...] of the views that a Reader's frames became."""
    return [(clip[:, 0, 0, 0].tolist(), *clip[0, 0, 0, 1:].tolist(), weight) for clip, weight in views]


def test_ten_clips_of_a_short_video_are_three():
    recipe = slowfast.RECIPES["r101_11x8"]
    reader = Reader(128, 128)
    views = evaluate.test_views(reader, 90, "a", recipe, evaluate.make_protocol(recipe, "dense"))
    assert seen(views) == [([start + 2 * i for i in range(44)], 0, 0, weight) for start, weight in
                           ((0, 0.5), (1, 0.4), (2, 0.1))]  # a square frame has one place for all three crops
    assert reader.asked == [list(range(89))]  # 2 + 2 x 43 = 88 is the last


def test_clips_and_crops_of_a_long_video():
    recipe = {**slowfast.RECIPES["r101_8x8"], "scales": (16,)}
    views = seen(evaluate.test_views(Reader(20, 16), 90, "a", recipe, evaluate.make_protocol(recipe, "dense")))
    starts = [0, 2, 5, 8, 11, 14, 17, 20, 23, 26]
    assert [view[:3] for view in views] == [([start + 2 * i for i in range(32)], x, 0) for start in starts
                                            for x in (0, 4, 2)]
    assert [view[3] for view in views] == [pytest.approx(1 / 30)] * 30
    one = evaluate.make_protocol({**recipe, "test_resize": 16, "test_crop": 8})
    assert seen(evaluate.test_views(Reader(20, 16), 90, "a", recipe, one)) == [(list(range(13, 77, 2)), 6, 4, 1)]


@pytest.mark.parametrize("num_frames", [1, 3, 24, 300])
@pytest.mark.parametrize("recipe", [{**tin.RECIPES["toy"], "scales": (16, 20)},
                                    {**slowfast.RECIPES["toy"], "scales": (16, 20)}], ids=["segments", "clip"])
@pytest.mark.parametrize("name, crops", [("clip", 3), ("dense", 3), ("multiscale", 3), ("dense", "random")])
def test_frames_are_decoded_once_and_weights_sum_to_one(recipe, num_frames, name, crops):
    recipe = {**recipe, "test_resize": 16, "test_crop": 14, "crops": crops}
    reader, protocol = Reader(22, 16), evaluate.make_protocol(recipe, name)
    views = evaluate.test_views(reader, num_frames, "a", recipe, protocol)
    assert len(reader.asked) == 1 and len(set(reader.asked[0])) == len(reader.asked[0])
    assert sum(weight for _, weight in views) == pytest.approx(1, abs=1e-12)
    total = protocol["clips"] * (1 if name == "clip" else 3) * len(protocol["sizes"])
    assert all(round(weight * total, 6) == round(weight * total) > 0 for _, weight in views)
    sizes = {(recipe["frames"], crop, crop, 3) for _, crop in protocol["sizes"]}
    assert {tuple(clip.shape) for clip, _ in views} == sizes and {clip.dtype for clip, _ in views} == {torch.uint8}
    content = [(tuple(clip.shape), clip.numpy().tobytes()) for clip, _ in views]
    assert len(set(content)) == len(content)  # equal ones are merged


@pytest.mark.parametrize("crops", [3, "random"])
def test_randomness_is_the_names(crops):
    recipe = {**tin.RECIPES["toy"], "scales": (16, 18), "crops": crops}
    protocol = evaluate.make_protocol(recipe, "multiscale")

    def views(name):
        np.random.seed(len(views_so_far))
        torch.manual_seed(len(views_so_far))
        views_so_far.append(name)
        return seen(evaluate.test_views(Reader(24, 16), 200, name, recipe, protocol))

    views_so_far = []
    first, again, other = views("a"), views("a"), views("b")
    assert first == again != other
    clips = list(dict.fromkeys(tuple(view[0]) for view in first))
    assert clips[0] == tuple(data.segment_indices(200, 8)) and len(clips) == 5  # the middles, then four random ones
    for k, frames in enumerate(zip(*clips)):
        assert all(25 * k <= frame < 25 * (k + 1) for frame in frames)
    assert clips[1:] != [tuple(view[0]) for view in other][1:5]


# The laboratory: toy videos, a model file and its checkpoint, and what the scripts need, in one folder.


def free_port():
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return str(one.getsockname()[1])


def together(world, *command, cwd):
    """A script in several processes, with torchrun's environment but without its own process: the first one's lines."""
    place = {"WORLD_SIZE": str(world), "MASTER_ADDR": "localhost", "MASTER_PORT": free_port()}
    runs = [subprocess.Popen([sys.executable, *command], env={**os.environ, **place, "RANK": str(rank)}, cwd=cwd,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for rank in range(world)]
    try:
        said = [run.communicate(timeout=300) for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert [run.returncode for run in runs] == [0] * world, "\n".join(err for _, err in said)
    return said[0][0].splitlines()


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """.folder with tiny.py, evaluate.py and the toy; .trained, a checkpoint of two processes, and .said by it;
    .checkpoint and .model, the same with larger logits, so that views differ enough for averages to differ."""
    folder = tmp_path_factory.mktemp("lab")
    (folder / "tiny.py").write_text(TINY)
    for name in ("evaluate", "train"):
        shutil.copy(ROOT / f"{name}.py", folder)
    data.draw_toy(folder / "toy", videos=32)
    lines = (folder / "toy" / "val.txt").read_text().splitlines()
    (folder / "toy" / "odd.txt").write_text("\n".join(lines[:7]))
    (folder / "toy" / "few.txt").write_text("\n".join(lines[:2]))
    (folder / "toy" / "test.txt").write_text("\n".join(f"{line.split()[0]} 24 -1" for line in lines[:3]))
    (folder / "toy" / "broken.txt").write_text("\n".join([*lines[:3], "val/none 24 1", lines[4]]))
    said = together(2, "train.py", *"--model tiny --data toy --workers 0 --lr 0.3".split(), cwd=folder)
    sys.path.insert(0, str(folder))
    sys.modules.pop("tiny", None)  # of another test file, which has one of this name too
    tiny = importlib.import_module("tiny")
    checkpoint = evaluate.read_checkpoint(folder / "runs" / "tiny" / "best.pt")
    checkpoint["model"]["fc.weight"] *= 20
    torch.save(checkpoint, folder / "large.pt")
    recipe = tiny.RECIPES["toy"]
    model = evaluate.load_weights(tiny, recipe, checkpoint, "large.pt")[0].eval()
    yield SimpleNamespace(folder=folder, toy=folder / "toy", trained=folder / "runs" / "tiny" / "best.pt",
                          said=said, checkpoint=folder / "large.pt", model=model, tiny=tiny,
                          recipe=recipe)
    sys.path.remove(str(folder))


def video_list(lab, recipe, protocol, split="odd"):
    """The videos of a list, with their views."""
    views = functools.partial(evaluate.test_views, recipe=recipe, protocol=protocol)
    return data.VideoList(lab.toy, split, recipe, train=False, views=views)


@torch.no_grad()
def one_by_one(lab, recipe, protocol, average, split="odd"):
    """Every view by itself: its frames loaded, resized, cut, normalised, run, and averaged last."""
    scores = []
    for path, frames, _ in data.read_list(lab.toy / f"{split}.txt"):
        if recipe["sampling"] == "segments":
            rng = np.random.default_rng(zlib.crc32(path.encode()))
            drawn = [data.segment_indices(frames, recipe["frames"], rng) for _ in range(1, protocol["clips"])]
            clips = [data.segment_indices(frames, recipe["frames"]), *drawn]
        else:
            room, last = frames - recipe["frames"] * recipe["stride"], max(1, protocol["clips"] - 1)
            starts = [room // 2] if protocol["clips"] == 1 else [room * c // last for c in range(protocol["clips"])]
            clips = [range(start, start + recipe["frames"] * recipe["stride"], recipe["stride"]) for start in starts]
        values = []
        for (short, crop), clip in itertools.product(protocol["sizes"], clips):
            width, height = short * 40 // 36, short  # the toy's frames are 40x36
            middle = round((width - crop) / 2)
            for x in [middle] if protocol["crops"] == "1" else [0, width - crop, middle]:
                files = [lab.toy / "frames" / path / f"img_{i + 1:05d}.jpg" for i in clip]
                pixels = torch.from_numpy(np.stack([np.asarray(Image.open(file)) for file in files]))
                y = round((height - crop) / 2)
                pixels = data.resize(pixels, (width, height))[:, y : y + crop, x : x + crop].float() / 255
                pixels = (pixels - torch.tensor(recipe["mean"])) / torch.tensor(recipe["std"])
                values.append(lab.model(pixels.permute(0, 3, 1, 2)[None])[0])
        values = torch.stack(values)
        scores.append(values.sigmoid().mean(0) if average == "prob" else values.mean(0).sigmoid())
    return torch.stack(scores).numpy()


@pytest.fixture(scope="module", params=["segments", "clip"])
def recipe(lab, request):
    """The tiny recipe with either way of choosing frames."""
    return {**lab.recipe, "sampling": request.param, "stride": 5 if request.param == "clip" else 1}


@pytest.mark.parametrize("name", ["tin", "slowfast"])
def test_the_one_view_is_that_of_the_data_set(lab, name):
    recipe = importlib.import_module(name).RECIPES["toy"]
    plain = data.VideoList(lab.toy, "odd", recipe, train=False)
    for row, (clip, _, _) in enumerate(plain):
        at, [(view, weight)] = video_list(lab, recipe, evaluate.make_protocol(recipe))[row]
        assert at == row and weight == 1 and torch.equal(view, clip)
        if row == len(plain) - 1:
            break


@pytest.mark.parametrize("average", ["prob", "logit"])
@pytest.mark.parametrize("name", ["clip", "dense", "multiscale"])
def test_scores_are_those_of_one_view_at_a_time(lab, recipe, name, average):
    protocol = evaluate.make_protocol(recipe, name)
    expected = one_by_one(lab, recipe, protocol, average)
    videos = video_list(lab, recipe, protocol)
    ours = evaluate.predict(lab.model, videos, 10, recipe, CPU, average=average)
    assert ours.dtype == np.float32 and ours.shape == (7, 10)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)
    assert np.abs(expected[0] - expected[1]).max() > 1e-3  # which videos can be told apart by


def test_probabilities_and_logits_average_to_different_scores(lab):
    protocol = evaluate.make_protocol(lab.recipe, "multiscale")
    probabilities, logits = (one_by_one(lab, lab.recipe, protocol, average) for average in ("prob", "logit"))
    assert np.abs(probabilities - logits).max() > 1e-4


@pytest.mark.parametrize("batch, view_batch, workers", [(1, 1, 0), (7, 5, 0), (7, 16, 2), (1, 5, 2), (100, 1000, 0)])
def test_batches_and_workers_change_nothing(lab, batch, view_batch, workers):
    protocol = evaluate.make_protocol(lab.recipe, "multiscale")
    videos = video_list(lab, lab.recipe, protocol)
    labels = evaluate.multi_hot(videos.videos, 10)
    expected = evaluate.predict(lab.model, videos, 10, lab.recipe, CPU, batch=8, view_batch=16)
    ours = evaluate.predict(lab.model, videos, 10, lab.recipe, CPU, batch=batch, view_batch=view_batch, workers=workers)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)
    assert evaluate.sample_map(ours, labels) == evaluate.sample_map(expected, labels)


class Pixels(torch.nn.Module):
    """A network whose logits are ten values of the clip as they are, so that no batch can change them."""

    def __init__(self, kind=torch.float32):
        super().__init__()
        self.kind, self.sizes, self.modes = kind, [], []

    def forward(self, clip):
        self.sizes.append(tuple(clip.shape))
        self.modes.append(self.training)
        return clip[:, 1, 1, 3, :10].to(self.kind)


def test_rows_are_put_together_bit_for_bit(lab):
    protocol = evaluate.make_protocol(lab.recipe)
    videos = video_list(lab, lab.recipe, protocol)
    expected = np.stack([data.normalise(videos[row][1][0][0][None], lab.recipe["mean"], lab.recipe["std"])
                         [0, 1, 1, 3, :10].sigmoid() for row in range(7)])
    for options in (dict(batch=1, view_batch=1), dict(batch=3, view_batch=2), dict(batch=8, workers=2)):
        ours = evaluate.predict(Pixels(), videos, 10, lab.recipe, CPU, **options)
        np.testing.assert_array_equal(ours, expected)


def test_view_batch_bounds_what_is_run_at_once(lab):
    model, protocol = Pixels(), evaluate.make_protocol(lab.recipe, "multiscale")
    evaluate.predict(model, video_list(lab, lab.recipe, protocol), 10, lab.recipe, CPU, batch=7, view_batch=5)
    assert {size[1:] for size in model.sizes} == {(4, 3, 36, 36), (4, 3, 40, 40)}
    assert [size[0] for size in model.sizes if size[0] < 5] == [63 % 5] * 2 and max(model.sizes)[0] == 5
    assert sum(size[0] for size in model.sizes) == 7 * 18


@pytest.mark.parametrize("training", [True, False])
def test_the_models_mode_is_evaluation_for_a_while(lab, training):
    model = Pixels().train(training)
    evaluate.predict(model, video_list(lab, lab.recipe, evaluate.make_protocol(lab.recipe)), 10, lab.recipe, CPU)
    assert model.training == training and not any(model.modes)
    broken = video_list(lab, lab.recipe, evaluate.make_protocol(lab.recipe), "broken")
    with pytest.raises(OSError):
        evaluate.predict(model, broken, 10, lab.recipe, CPU)
    assert model.training == training


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision_logits_become_float32_probabilities(lab, kind):
    protocol, recipe = evaluate.make_protocol(lab.recipe), {**lab.recipe, "std": (0.02, 0.02, 0.02)}  # logits up to 20
    videos = video_list(lab, recipe, protocol)
    ours = evaluate.predict(Pixels(kind), videos, 10, recipe, CPU)
    logits = [data.normalise(videos[row][1][0][0][None], recipe["mean"], recipe["std"])[0, 1, 1, 3, :10]
              for row in range(7)]
    np.testing.assert_array_equal(ours, torch.stack(logits).to(kind).float().sigmoid().numpy())
    assert len(np.unique(ours[ours > 0.999])) > len(np.unique(torch.from_numpy(ours[ours > 0.999]).to(kind).float()))


def test_what_is_computed_is_autocast(lab):
    kinds = []

    class Linear(torch.nn.Linear):
        def forward(self, clip):
            y = super().forward(clip.flatten(1)[:, :4])
            kinds.append(y.dtype)
            return y

    videos = video_list(lab, lab.recipe, evaluate.make_protocol(lab.recipe))
    for batch, autocast in ((2, torch.autocast("cpu", torch.bfloat16)), (7, None)):
        evaluate.predict(Linear(4, 10), videos, 10, lab.recipe, CPU, batch=batch, autocast=autocast)
    assert kinds == [torch.bfloat16] * 4 + [torch.float32]


def test_a_broken_video_is_named_by_its_list_line(lab):
    for workers in (0, 2):
        videos = video_list(lab, lab.recipe, evaluate.make_protocol(lab.recipe), "broken")
        with pytest.raises(OSError, match=r"broken\.txt:4: .*val/none/img_\d+\.jpg: No such file"):
            evaluate.predict(lab.model, videos, 10, lab.recipe, CPU, workers=workers, batch=1)
        assert not multiprocessing.active_children()  # the loader's workers end at once


# Several processes.


JOB = '''
import contextlib, functools, io, os, pathlib, resource, sys
import numpy as np, torch, torch.distributed as dist
import data, evaluate, tiny

recipe = tiny.RECIPES["toy"]
checkpoint = evaluate.read_checkpoint("large.pt")


class Pixels(torch.nn.Module):
    def forward(self, clip):
        return clip[:, 1, 1, 3, :10]


def run(model, split, name, **options):
    views = functools.partial(evaluate.test_views, recipe=recipe, protocol=evaluate.make_protocol(recipe, name))
    videos = data.VideoList("toy", split, recipe, train=False, views=views)
    try:
        scores, problem = evaluate.predict(model, videos, 10, recipe, torch.device("cpu"), **options), ""
    except OSError as error:
        scores, problem = None, str(error)
    everywhere = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, (scores, problem))
    for one in everywhere:
        np.testing.assert_array_equal(one[0], scores)
        assert one[1] == problem
    return problem if scores is None else scores


def runs():
    rank, world, device = evaluate.start_process("cpu")
    assert (str(rank), str(world), str(device)) == (os.environ["RANK"], os.environ["WORLD_SIZE"], "cpu")
    model, _ = evaluate.load_weights(tiny, recipe, checkpoint, "large.pt")
    model.train()
    found = {f"{split} {name} {batch} {view_batch} {workers}":
             run(model, split, name, batch=batch, view_batch=view_batch, workers=workers)
             for split, name, batch, view_batch, workers in (
                 ("odd", "clip", 1, 1, 0), ("odd", "multiscale", 1, 5, 0), ("odd", "multiscale", 7, 1, 2),
                 ("few", "clip", 8, 8, 0))}
    found["pixels"] = run(Pixels(), "odd", "clip")
    found["logit"] = run(model, "odd", "multiscale", average="logit")
    found["problem"] = run(model, "broken", "clip", batch=1)
    assert model.training
    model.bn.running_mean += rank  # as after training without SyncBN
    for buffer in model.buffers():  # as train.py before it evaluates
        dist.broadcast(buffer, 0)
    found["broadcast"] = run(model, "odd", "clip")
    if rank == 0:
        np.savez(f"world{world}.npz", **found)
    dist.destroy_process_group()


def label(*videos):
    sys.argv = ["evaluate.py", "--checkpoint", "large.pt", "--picture", "rows.png", "--video", *videos]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        status = evaluate.main()
    pathlib.Path(f"labels{os.environ['RANK']}.txt").write_text(f"{status}\\n{out.getvalue()}")


def handles():
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
    many = {**recipe, "clips": 10}
    views = functools.partial(evaluate.test_views, recipe=many, protocol=evaluate.make_protocol(many, "multiscale"))
    videos = data.VideoList("toy", "train", many, train=False, views=views)
    scores = evaluate.predict(tiny.build(many, 10), videos, 10, many, torch.device("cpu"), workers=1)
    pathlib.Path("handles.txt").write_text(str(scores.shape))


port3, port2, port_of_labels, *videos = sys.argv[1:]
for world, port, job in ((3, port3, runs), (2, port2, runs), (2, port_of_labels, lambda: label(*videos))):
    os.environ.update(WORLD_SIZE=str(world), MASTER_PORT=port)
    if int(os.environ["RANK"]) < world and (job == runs or videos):
        job()
if os.environ["RANK"] == "2":
    handles()
'''


@pytest.fixture(scope="module")
def jobs(lab, request):
    """What three and then two processes do, in files of the laboratory."""
    (lab.folder / "job.py").write_text(JOB)
    videos = []
    if shutil.which("ffmpeg"):
        folder = request.getfixturevalue("clips")
        videos = [folder / "landscape.mp4", folder / "text.mp4"]
    together(3, "job.py", free_port(), free_port(), free_port(), *videos, cwd=lab.folder)
    return lab


@pytest.mark.parametrize("world", [2, 3])
def test_processes_change_nothing(jobs, world):
    lab = jobs
    found = dict(np.load(lab.folder / f"world{world}.npz"))
    assert str(found.pop("problem")).startswith("toy/broken.txt:4: ")  # which one process alone has met
    pixels = found.pop("pixels")
    for key, scores in found.items():
        split, name = key.split()[:2] if " " in key else ("odd", "multiscale" if key == "logit" else "clip")
        protocol = evaluate.make_protocol(lab.recipe, name)
        videos = video_list(lab, lab.recipe, protocol, split)  # few.txt: two videos, for three processes too
        alone = evaluate.predict(lab.model, videos, 10, lab.recipe, CPU, average="logit" if key == "logit" else "prob")
        np.testing.assert_allclose(scores, alone, rtol=0, atol=1e-5)
        labels = evaluate.multi_hot(videos.videos, 10)
        assert evaluate.sample_map(scores, labels) == evaluate.sample_map(alone, labels)
    videos = video_list(lab, lab.recipe, evaluate.make_protocol(lab.recipe))
    np.testing.assert_array_equal(pixels, evaluate.predict(Pixels(), videos, 10, lab.recipe, CPU))  # bit for bit


def test_many_views_need_few_file_handles(jobs):
    """A loader's worker that has used up its file handles, here 256, waits for ever. Most systems give it 1,024."""
    assert (jobs.folder / "handles.txt").read_text() == "(32, 10)"


@needs_ffmpeg
def test_the_first_process_alone_labels(jobs, clips, run):
    first, second = ((jobs.folder / f"labels{rank}.txt").read_text().splitlines() for rank in (0, 1))
    status, lines, err = run("--checkpoint", jobs.checkpoint, "--video", clips / "landscape.mp4", clips / "text.mp4",
                             "--picture", "rows.png")
    assert second == ["2"] and first == [str(status), *lines, *err] and len(lines) == 6 and len(err) == 1
    assert (jobs.folder / "rows.png").read_bytes() == pathlib.Path("rows.png").read_bytes()


# Files.


def test_score_file(tmp_path):
    paths, scores = ["ü/b", "a"], np.array([[0.25, 0.5], [0.75, 1]])
    for labels in (np.array([[1, 0], [0, 1]], np.uint8), None):
        evaluate.save_scores(tmp_path / "scores.npz", paths, scores, labels, {"model": "tin", "clips": [1, 2]})
        with np.load(tmp_path / "scores.npz", allow_pickle=False) as file:
            assert set(file) == {"paths", "scores", "meta"} | ({"labels"} if labels is not None else set())
            assert file["paths"].tolist() == paths and file["scores"].dtype == np.float32
            np.testing.assert_array_equal(file["scores"], scores)
            assert json.loads(str(file["meta"])) == {"model": "tin", "clips": [1, 2]}
            if labels is not None:
                assert file["labels"].dtype == np.uint8
                np.testing.assert_array_equal(file["labels"], labels)
    evaluate.save_scores(f"{tmp_path}/plain", paths, scores, None, {})
    assert sorted(os.listdir(tmp_path)) == ["plain", "scores.npz"]  # under the name that was asked for, and no rest
    with pytest.raises(OSError, match="none"):
        evaluate.save_scores(tmp_path / "none" / "scores.npz", paths, scores, None, {})


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files_with_numpy_numbers_are_read(tmp_path, zipped):
    numbers = {"a": np.float64(0.5), "b": np.float32(0.25), "c": np.int64(3), "d": np.bool_(True), "e": np.float16(2)}
    weights = {"w": torch.arange(6.0).view(2, 3), "h": torch.zeros(2, dtype=torch.bfloat16)}
    content = {"state_dict": weights, **numbers, "list": [1, "x", None], "array": np.arange(3)}
    torch.save(content, tmp_path / "file.pth", _use_new_zipfile_serialization=zipped)
    read = evaluate.read_checkpoint(tmp_path / "file.pth")
    assert {key: read[key] for key in numbers} == numbers and read["list"] == content["list"]
    assert all(torch.equal(read["state_dict"][key], weights[key]) for key in weights)
    assert read["array"].tolist() == [0, 1, 2]


class Call:
    """What calls a function when it is unpickled."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


def global_pickle(module, name):
    """A pickle that calls module.name("x")."""
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"X\x01\x00\x00\x00x\x85R."


@pytest.mark.parametrize("write, name", [
    (lambda path, bomb: torch.save({"w": torch.zeros(1), "x": bomb}, path), "(posix|nt).system"),
    (lambda path, bomb: torch.save(bomb, path, _use_new_zipfile_serialization=False), "(posix|nt).system"),
    (lambda path, bomb: path.write_bytes(pickle.dumps({"blobs": np.zeros(1), "x": bomb}, 2)), "(posix|nt).system"),
    (lambda path, bomb: path.write_bytes(pickle.dumps(bomb, 5)), "(posix|nt).system"),
    (lambda path, bomb: torch.save({"args": argparse.Namespace(lr=1)}, path), "argparse.Namespace"),
    (lambda path, bomb: torch.save({"args": pathlib.PurePosixPath("x")}, path), "pathlib"),
    (lambda path, bomb: path.write_bytes(global_pickle("builtins", "eval")), "eval"),
    (lambda path, bomb: path.write_bytes(global_pickle("__builtin__", "eval")), "eval"),
    (lambda path, bomb: path.write_bytes(pickle.dumps(Call(np.savetxt, f"{path}.touched", [0]), 2)), "numpy.savetxt"),
    (lambda path, bomb: path.write_bytes(global_pickle("numpy.testing", "ndarray")), "numpy.testing.ndarray"),
    (lambda path, bomb: path.write_bytes(global_pickle("numpy.core.multiarray", "fromfile")), "multiarray.fromfile"),
])
def test_files_that_could_run_code_are_refused_and_do_not(tmp_path, write, name):
    write(tmp_path / "file.pth", Call(os.system, f"touch {tmp_path}/touched"))
    with pytest.raises(ValueError, match=rf"file\.pth: asks for the Python object \S*{name}\S*, which is refused"):
        evaluate.read_checkpoint(tmp_path / "file.pth")
    assert os.listdir(tmp_path) == ["file.pth"]


def text(content):
    """A string as Python 2 pickled it."""
    return b"T" + struct.pack("<i", len(content)) + content


def python_2_array(array):
    """A float32 array as Python 2's numpy pickled it."""
    size = b"".join(b"M" + struct.pack("<H", side) for side in array.shape)
    kind = (b"cnumpy\ndtype\n" + text(b"f4") + b"K\x00K\x01\x87R(K\x03" + text(b"<")
            + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb")
    return (b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b") + b"\x87R(K\x01(" + size
            + b"t" + kind + b"\x89" + text(array.astype("<f4").tobytes()) + b"tb")


@pytest.mark.parametrize("written", ["python 2", "python 3, protocol 2", "python 3, old numpy", "protocol 4"])
def test_caffe2_pickles_are_read(tmp_path, written):
    blobs = {"conv1_w": np.random.default_rng(0).normal(size=(3, 2, 300)).astype(np.float32),
             "pred_b": np.array([0.5, -128.25, 1e30], np.float32)}
    if written == "python 2":
        inner = b"}" + b"".join(text(key.encode()) + python_2_array(array) + b"s" for key, array in blobs.items())
        content = b"\x80\x02}" + text(b"blobs") + inner + b"s" + text(b"cfg") + text(b"a: \xfc") + b"s."
    else:
        content = pickle.dumps({"blobs": blobs, "cfg": "a: ü", "lr": np.float32(2)}, 4 if "4" in written else 2)
        if "old" in written:
            content = content.replace(b"numpy._core.", b"numpy.core.")
            assert b"numpy.core.multiarray" in content
    (tmp_path / "file.pkl").write_bytes(content)
    read = evaluate.read_checkpoint(tmp_path / "file.pkl")
    assert read["cfg"] == "a: ü" and read["blobs"].keys() == blobs.keys()
    for key, array in blobs.items():
        assert read["blobs"][key].dtype == np.float32
        np.testing.assert_array_equal(read["blobs"][key], array)


@pytest.mark.parametrize("kind", ["cut torch file", "cut old torch file", "cut pickle", "empty", "text", "zip"])
def test_files_that_are_no_checkpoint(tmp_path, kind):
    path = tmp_path / "file.pth"
    torch.save({"w": torch.zeros(1000)}, path, _use_new_zipfile_serialization="old" not in kind)
    content = path.read_bytes()
    np.savez(tmp_path / "arrays.npz", w=np.zeros(3))
    contents = {"cut pickle": pickle.dumps({"blobs": {"w": np.zeros(1000)}}, 2)[:3000], "empty": b"",
                "text": b"version https://git-lfs.github.com/spec/v1\n", "zip": (tmp_path / "arrays.npz").read_bytes()}
    path.write_bytes(contents.get(kind, content[: len(content) // 2]))
    with pytest.raises(ValueError, match=r"file\.pth: no checkpoint, or one that was cut short$"):
        evaluate.read_checkpoint(path)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(OSError, match="none.pth"):
        evaluate.read_checkpoint(tmp_path / "none.pth")
    with pytest.raises(OSError, match=tmp_path.name):
        evaluate.read_checkpoint(tmp_path)


# Networks.


def test_our_own_checkpoint(lab):
    checkpoint = evaluate.read_checkpoint(lab.checkpoint)
    model, num_classes = evaluate.load_weights(lab.tiny, checkpoint["config"]["recipe"], checkpoint, lab.checkpoint)
    assert num_classes == 10
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, checkpoint["model"][key]), key


@pytest.mark.parametrize("name, row", [
    ("tin_xtemporal_r50_t8", None), ("tin_deepcs233_r50_t8", None), ("tsm_mit_r50_t8", None),
    ("tsm_mit_r50_t16", "r50_16f"), ("tsm_mmaction2_r50_t8", None), ("tsn_mmaction2_r101_t5", None),
    ("tsn_tsnpytorch_r101_t5", None),
])
def test_public_layouts(tmp_path, name, row):
    """A file in the authors' layout, each tensor filled with a number of its own."""
    content = golden_shapes(name)
    (tensors,) = content.values()  # below "state_dict" or "model"
    for number, (key, tensor) in enumerate(tensors.items()):
        kind = torch.long if key.endswith("num_batches_tracked") else torch.float
        tensors[key] = torch.full(tensor.shape, number, dtype=kind)
    torch.save({**content, "epoch": 1}, tmp_path / "PUBLIC.pth")
    module, recipe, _ = evaluate.open_recipe(name.split("_")[0], row)
    checkpoint = evaluate.read_checkpoint(tmp_path / "PUBLIC.pth")
    model, num_classes = evaluate.load_weights(module, recipe, checkpoint, "PUBLIC.pth")
    assert num_classes == 10
    expected = module.convert(content)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[key]), key


def shapes_of(module, **options):
    """A file's tensors, as shapes without values: our names of a network for 10 classes."""
    recipe = {**next(iter(module.RECIPES.values())), **options}
    with torch.device("meta"):
        return {"state_dict": module.build(recipe, 10).state_dict()}


def golden_shapes(name):
    """The tensors of an authors' file, as shapes without values."""
    with np.load(ROOT / "tests" / "golden" / f"{name}.npz") as file:
        meta = json.loads(str(file["meta"]))
    prefix, key = meta["container"]["prefix"] or "", meta["container"]["key"]
    tensors = {prefix + name: torch.empty(shape, device="meta") for name, shape in meta["shapes"].items()}
    return {key: tensors} if key else tensors


@pytest.mark.parametrize("module, file, flags", [
    (tin, dict(frames=16), "--frames 16"),
    (tin, dict(depth=101), "--depth 101"),
    (tin, dict(depth=101, frames=16), "--frames 16 --depth 101"),
    (tsm, dict(depth=101), "--depth 101"),
    (tsn, dict(backbone="resnet50"), "--backbone resnet50"),
    (tsn, dict(backbone="inception_resnet_v2"), "--backbone inception_resnet_v2"),
    (trn, dict(backbone="resnet101"), "--backbone resnet101"),
    (trn, "trn_mmaction2_r50_t8_single", "--no-multiscale"),
])
def test_flags_that_a_file_asks_for(module, file, flags):
    checkpoint = golden_shapes(file) if isinstance(file, str) else shapes_of(module, **file)
    recipe = next(iter(module.RECIPES.values()))
    with pytest.raises(ValueError) as error:
        evaluate.load_weights(module, recipe, checkpoint, "FILE.pth")
    problem, asked = re.fullmatch(r"FILE\.pth: \d+ tensors do not fit, such as (\S+); they ask for (.*)",
                                  str(error.value)).groups()
    assert asked == flags
    with torch.device("meta"):
        ours = module.build(recipe, 10).state_dict()
    theirs = module.convert(checkpoint)
    assert problem not in ours or problem not in theirs or ours[problem].shape != theirs[problem].shape


def test_flags_that_a_slowfast_file_asks_for():
    recipe = {**slowfast.RECIPES["r101_8x8"], "depth": 50}
    with pytest.raises(ValueError, match="; they ask for ") as error:
        evaluate.load_weights(slowfast, recipe, golden_shapes("slowfast_pyslowfast_8x8_r50"), "FILE.pyth")
    assert sorted(str(error.value).split(" --")[1:]) == ["fc-bias", "fusion-kernel 7", "fusion-norm"]


@pytest.mark.parametrize("module, checkpoint, says", [
    (tin, shapes_of(tsn, backbone="resnet18"), " tensors do not fit, such as interlace.layer1.0.offset_conv.bias, and "
     "no recipe flag makes them fit"),
    (tin, shapes_of(slowfast, depth=50), "tin.py has no place for "),
    (tin, {"state_dict": {}}, "tin.py has no place for 0 of 0 keys"),
    (tsn, {"lr": 1}, "tsn.py has no place for 1 of 1 keys: lr"),
])
def test_files_of_other_networks(module, checkpoint, says):
    with pytest.raises(ValueError, match=re.escape(says)) as error:
        evaluate.load_weights(module, module.RECIPES["toy"], checkpoint, "FILE.pth")
    assert str(error.value).startswith("FILE.pth: ") and "\n" not in str(error.value)


# The command line.


@pytest.fixture
def run(lab, tmp_path, monkeypatch, capfd):
    """run(*arguments) -> (exit status, lines on stdout, lines on stderr) of evaluate.py beside tiny.py, in tmp_path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "__file__", str(lab.folder / "evaluate.py"))

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            data.run_script(evaluate.main)
        out, err = capfd.readouterr()
        return end.value.code or 0, out.splitlines(), err.splitlines()

    return run


def test_training_by_two_processes_scored_what_one_process_does(lab, run):
    """Their running means differ: what was scored must be what was saved."""
    status, lines, _ = run("--checkpoint", lab.trained, "--data", lab.toy)
    figure = re.fullmatch(r"best val mAP (\d+\.\d\d) \(epoch 1\) order-blind ceiling \d+\.\d\d", lab.said[-1])[1]
    assert status == 0 and lines[-1] == f"mAP {figure}"


def test_the_script_itself(lab, run, monkeypatch, capfd):
    """Two processes of it under torchrun, which say once what one says; and one with bad input."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    flags = "--data toy --split odd --workers 0 --out two.npz --checkpoint large.pt"
    two = subprocess.run([*launch, "evaluate.py", *flags.split()], cwd=lab.folder, capture_output=True, text=True)
    status, lines, _ = run("--checkpoint", lab.checkpoint, "--data", lab.toy, "--split", "odd", "--out", "one.npz")
    assert status == 0 and (two.returncode, two.stdout.splitlines()) == (0, lines)
    with np.load("one.npz") as one, np.load(lab.folder / "two.npz") as two:
        np.testing.assert_allclose(one["scores"], two["scores"], rtol=0, atol=1e-5)
        np.testing.assert_array_equal(one["paths"], two["paths"])
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--checkpoint", "none.pt"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "evaluate.py"), run_name="__main__")
    out, err = capfd.readouterr()
    assert end.value.code == 2 and not out and re.fullmatch(r"evaluate\.py: .*none\.pt.*\n", err)


@pytest.mark.parametrize("flags, name, changed, average", [
    ("", "clip", {}, "prob"),
    ("--protocol dense", "dense", {}, "prob"),
    ("--protocol multiscale --average logit", "multiscale", {}, "logit"),
    ("--clips 2", "multiscale", {"clips": 2}, "prob"),
    ("--clips 2 --protocol dense", "dense", {"clips": 2}, "prob"),
    ("--scales 36 38 44", "multiscale", {"scales": (36, 38, 44)}, "prob"),
    ("--crops 1", "multiscale", {"crops": "1"}, "prob"),
    ("--clips 2 --crops 1 --scales 38 --average logit", "multiscale", dict(clips=2, crops="1", scales=(38,)), "logit"),
    ("--test-resize 40 --test-crop 24", "clip", {"test_resize": 40, "test_crop": 24}, "prob"),
    ("--mean 0.4 0.4 0.4 --std 0.2 0.3 0.4", "clip", {"mean": (0.4,) * 3, "std": (0.2, 0.3, 0.4)}, "prob"),
    ("--sampling clip --stride 5", "clip", {"sampling": "clip", "stride": 5}, "prob"),
])
def test_protocols_on_the_command_line(lab, run, flags, name, changed, average):
    status, lines, err = run("--checkpoint", lab.checkpoint, "--data", lab.toy, "--split", "odd", "--out", "scores.npz",
                             "--workers", "0", *flags.split())
    recipe = {**lab.recipe, **changed}
    protocol = evaluate.make_protocol(recipe, name)
    with np.load("scores.npz") as file:
        scores, labels, paths, meta = (file[key] for key in ("scores", "labels", "paths", "meta"))
    np.testing.assert_allclose(scores, one_by_one(lab, recipe, protocol, average), rtol=0, atol=1e-5)
    assert status == 0 and lines[-1] == f"mAP {100 * evaluate.sample_map(scores, labels):.2f}"
    assert not [line for line in err if "rror" in line]
    videos = data.read_list(lab.toy / "odd.txt")
    assert paths.tolist() == [video.path for video in videos]
    assert [np.flatnonzero(row).tolist() for row in labels] == [sorted(video.labels) for video in videos]
    meta = json.loads(str(meta))
    assert meta["model"] == "tiny" and meta["checkpoint"] == str(lab.checkpoint) and meta["classes"] == 10
    assert meta["list"] == str(lab.toy / "odd.txt") and meta["iteration"] == 2
    assert meta["map"] == pytest.approx(evaluate.sample_map(scores, labels), abs=1e-12)
    assert meta["protocol"] == json.loads(json.dumps({**protocol, "average": average}))
    assert all(meta["recipe"][key] == json.loads(json.dumps(value)) for key, value in changed.items())


@pytest.mark.parametrize("flags, batch", [
    ("", 16), ("--protocol dense", 1), ("--view-batch 40 --protocol dense", 4),  # 3 clips x 3 crops
    ("--clips 1", 2), ("--clips 3 --crops 1", 2),  # at two scales
    ("--batch 7 --protocol multiscale", 7), ("--view-batch 1", 1),
])
def test_no_more_videos_are_loaded_at_once_than_have_as_many_views(lab, run, monkeypatch, flags, batch):
    class Loader(torch.utils.data.DataLoader):
        def __init__(self, *args, batch_size, **kwargs):
            batches.append(batch_size)
            super().__init__(*args, batch_size=batch_size, **kwargs)

    batches = []
    monkeypatch.setattr(torch.utils.data, "DataLoader", Loader)
    status, _, _ = run("--checkpoint", lab.checkpoint, "--data", lab.toy, "--split", "few", *flags.split())
    assert status == 0 and batches == [batch]


def test_random_crops_do_not_depend_on_the_batch(lab, run):
    found = []
    for flags in (["--batch", "1"], ["--batch", "7"], ["--protocol", "dense"]):
        assert run("--checkpoint", lab.checkpoint, "--data", lab.toy, "--split", "odd", "--crops", "random", *flags,
                   "--out", "scores.npz", "--workers", "0")[0] == 0
        with np.load("scores.npz") as file:
            found.append((file["scores"], json.loads(str(file["meta"]))["protocol"]))
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=0, atol=1e-5)
    assert np.abs(found[0][0] - one_by_one(lab, lab.recipe, evaluate.make_protocol(lab.recipe, "multiscale"), "prob")
                  ).max() > 1e-4
    assert [(one["name"], one["crops"]) for _, one in found] == [
        ("multiscale", "random"), ("multiscale", "random"), ("dense", "random")]


def test_a_list_without_labels_on_the_command_line(lab, run):
    status, lines, _ = run("--checkpoint", lab.checkpoint, "--data", lab.toy, "--split", "test", "--out", "scores.npz")
    assert status == 0 and len(lines) == 1 and "no mAP" in lines[0]
    with np.load("scores.npz") as file:
        assert "labels" not in file and file["scores"].shape == (3, 10)
        assert json.loads(str(file["meta"]))["map"] is None


def test_other_peoples_weights_on_the_command_line(lab, run):
    torch.save(evaluate.read_checkpoint(lab.checkpoint)["model"], "PUBLIC.pth")
    ours = run("--checkpoint", lab.checkpoint, "--data", lab.toy, "--split", "odd")
    theirs = run("--model", "tiny", "--weights", "PUBLIC.pth", "--data", lab.toy, "--split", "odd")
    assert ours[:2] == theirs[:2] and ours[0] == 0
    status, _, err = run("--model", "tiny", "--weights", "PUBLIC.pth", "--data", lab.toy, "--frames", "8")
    assert status == 2 and len(err) == 1 and err[0].endswith("they ask for --frames 4")
    status, _, err = run("--checkpoint", "PUBLIC.pth", "--data", lab.toy)
    assert status == 2 and len(err) == 1 and err[0].startswith("evaluate.py: PUBLIC.pth: not one of our checkpoints")


def test_a_key_that_is_younger_than_the_checkpoint_has_the_rows_value(lab, run):
    checkpoint = evaluate.read_checkpoint(lab.checkpoint)
    plain = run("--checkpoint", lab.checkpoint, "--data", lab.toy, "--split", "odd")
    del checkpoint["config"]["recipe"]["stride"]
    torch.save(checkpoint, "old.pt")
    assert run("--checkpoint", "old.pt", "--data", lab.toy, "--split", "odd")[:2] == plain[:2] and plain[0] == 0


def test_the_toy_is_drawn_where_no_data_is_named(lab, run, monkeypatch):
    monkeypatch.setattr(data, "draw_toy", lambda out: shutil.copytree(lab.toy, out))
    figure = run("--checkpoint", lab.checkpoint)[1]
    assert figure == run("--checkpoint", lab.checkpoint, "--data", lab.toy)[1] and os.path.exists("runs/toy/val.txt")


def spoiled_files(lab):
    """What the bad inputs name."""
    shutil.copytree(lab.toy, "eleven", ignore=shutil.ignore_patterns("frames"))
    with open("eleven/categories.txt", "a") as file:
        file.write("another\n")
    pathlib.Path("text.pth").write_text("not a checkpoint\n")
    torch.save({"config": "a.yaml", "model": {}}, "config.pth")
    torch.save({"config": {"lr": 1}, "model": {}}, "other.pth")
    torch.save({"config": {"model": 1, "recipe": [2]}, "model": {}}, "types.pth")
    torch.save({"config": {"model": "none", "recipe": lab.recipe}, "model": {}}, "gone.pth")
    torch.save({"weights": {"a": torch.zeros(1)}}, "weights.pth")
    torch.save(evaluate.read_checkpoint(lab.checkpoint)["model"], "ours.pth")


@pytest.mark.parametrize("flags, says", [
    ("--checkpoint CKPT --data eleven", "knows 10 classes, eleven/categories.txt names 11"),
    ("--checkpoint CKPT --data none", "none/categories.txt"),
    ("--checkpoint CKPT --data TOY --split none", "none.txt"),
    ("--checkpoint CKPT --data TOY --split broken --workers 0", "broken.txt:4: "),
    ("--checkpoint CKPT --data TOY --split broken --workers 2", "broken.txt:4: "),
    ("--checkpoint none.pt", "none.pt"),
    ("--checkpoint text.pth", "text.pth: no checkpoint"),
    ("--checkpoint config.pth", "config.pth: not one of our checkpoints"),
    ("--checkpoint other.pth", "other.pth: not one of our checkpoints"),
    ("--checkpoint types.pth", "types.pth: not one of our checkpoints"),
    ("--checkpoint gone.pth", "there is no none.py beside this script"),
    ("--model tiny --weights weights.pth", "weights.pth: tiny.py has no place"),
    ("--model nothing --weights weights.pth", "there is no nothing.py beside this script"),
    ("--model ../tiny --weights weights.pth", "--model ../tiny: there is no"),
    ("--model tiny --recipe r50 --weights weights.pth", "--recipe r50: tiny.py has toy"),
    ("--checkpoint CKPT --data TOY --test-crop 50", "--test-crop 50: larger than the short side it is cut from, 34"),
    ("--checkpoint CKPT --data TOY --clips 0", "--clips 0: at least 1"),
    ("--checkpoint CKPT --data TOY --frames 0", "--frames 0: at least 1"),
    ("--checkpoint CKPT --data TOY --scales 0", "--scales"),
    ("--checkpoint CKPT --data TOY --batch 0", "batch"),
    ("--checkpoint CKPT --data TOY --view-batch 0", "--view-batch 0: at least 1"),
    ("--checkpoint CKPT --data TOY --view-batch -1", "--view-batch -1: at least 1"),
    ("--checkpoint CKPT --data TOY --workers -1", "workers"),
    ("--checkpoint CKPT --data TOY --device nothing", "--device nothing"),
    ("--checkpoint CKPT --data TOY --device meta", "--device meta"),
    ("--checkpoint CKPT --data TOY --device cuda:99", "--device cuda:99"),
    ("--checkpoint CKPT --data TOY --std 0.2 0 0.2", "--std [0.2, 0.0, 0.2]: at least 1e-06"),
    ("--checkpoint CKPT --data TOY --dropout 1", "--dropout 1.0: at least 0, below 1"),
    ("--checkpoint CKPT --data TOY --lr nan", "--lr nan: at least 0"),
    ("--checkpoint CKPT --data TOY --weight-decay inf", "--weight-decay inf: at least 0"),
    ("--checkpoint TOY --data TOY", "toy"),
    ("--checkpoint CKPT --data TOY --out none/scores.npz", "none/scores.npz: there is no such folder"),
    ("--checkpoint CKPT --data TOY --out TOY", "toy: there is no such folder, or it cannot be written there"),
    ("--checkpoint CKPT --video x --picture none/x.png", "none/x.png: there is no such folder"),
    ("--checkpoint CKPT --video x --picture x.tune", "--picture x.tune: no kind of picture that Pillow writes"),
    ("--checkpoint CKPT --video x --picture png", "--picture png: no kind of picture that Pillow writes"),
    ("--checkpoint CKPT --video x --picture x.psd", "--picture x.psd: no kind of picture"),  # one it only reads
    pytest.param("--checkpoint CKPT --video none.mp4", "none.mp4: ", marks=needs_ffmpeg),
    ("--model tiny --weights ours.pth --data eleven --video x", "knows 10 classes, eleven/categories.txt names 11"),
])
def test_bad_input_is_one_line(lab, run, flags, says):
    spoiled_files(lab)
    status, lines, err = run(*flags.replace("CKPT", str(lab.checkpoint)).replace("TOY", str(lab.toy)).split())
    assert status == 2 and not lines and says in err[-1] and err[-1].startswith("evaluate.py: ")
    assert [line for line in err[:-1] if not re.match(r"videos \d+/\d+, ", line)] == []  # lines on progress
    assert not err[-1].startswith("evaluate.py: evaluate.py") and "Traceback" not in err[-1]


def test_a_folder_that_is_not_there_is_told_before_the_work(lab, run):
    _, _, err = run("--checkpoint", lab.checkpoint, "--data", lab.toy, "--out", "none/scores.npz")
    assert len(err) == 1


@pytest.mark.parametrize("flags, says", [
    ("", "which network? --checkpoint FILE, or --model NAME --weights FILE"),
    ("--model tiny", "which network?"),
    ("--weights x.pth", "which network?"),
    ("--checkpoint CKPT --protocol all", "invalid choice"),
    ("--checkpoint CKPT --average softmax", "invalid choice"),
    ("--checkpoint CKPT --fusion-kernel 7", "unrecognized arguments: --fusion-kernel 7"),
    ("--checkpoint CKPT --frames many", "invalid int value"),
    ("--checkpoint CKPT --mean 0.5 0.5", "expected 3 arguments"),
    ("--checkpoint CKPT --sampling some", "invalid choice"),
    ("--checkpoint CKPT --data TOY --crops 2", "--crops"),
    ("--checkpoint CKPT --data TOY --crops some", "--crops"),
])
def test_wrong_flags_are_argparses(lab, run, flags, says):
    status, lines, err = run(*flags.replace("CKPT", str(lab.checkpoint)).replace("TOY", str(lab.toy)).split())
    assert status == 2 and not lines and says in err[-1]


def test_videos_without_frames_are_left_out_and_told(lab, run):
    text = (lab.toy / "odd.txt").read_text()
    (lab.toy / "empty.txt").write_text(f"val/none 0 1\n{text}\nval/none_either 0 2\n")
    plain = run("--checkpoint", lab.checkpoint, "--data", lab.toy, "--split", "odd")[1]
    status, lines, err = run("--checkpoint", lab.checkpoint, "--data", lab.toy, "--split", "empty")
    assert status == 0 and lines[-1] == plain[-1]
    assert any(re.search(r"\b2\b.*left out", line) for line in lines + err)


# One video.


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """The folder of videos: two that are whole, one of one frame, and three that hold no whole video."""
    folder = tmp_path_factory.mktemp("clips")

    def make(name, source, *options):
        subprocess.run(["ffmpeg", "-v", "error", "-f", "lavfi", "-i", source, *options, name], cwd=folder, check=True)

    make("landscape.mp4", "testsrc=size=64x48:rate=30:duration=1", "-c:v", "mpeg4")
    make("portrait.mp4", "testsrc2=size=48x64:rate=30:duration=1", "-c:v", "mpeg4")
    make("one_frame.avi", "testsrc=size=64x48:rate=30", "-frames:v", "1", "-c:v", "mpeg4")
    make("audio.mp4", "sine=duration=1", "-c:a", "aac")
    make("whole.mp4", "testsrc=size=64x48:rate=30:duration=2", "-c:v", "mpeg4", "-g", "1", "-movflags", "+faststart")
    content = (folder / "whole.mp4").read_bytes()
    (folder / "truncated.mp4").write_bytes(content[: len(content) // 2])
    (folder / "text.mp4").write_text("this is no video\n")
    return folder


@needs_ffmpeg
def test_pixels_of_a_video_are_those_of_extraction(clips, tmp_path):
    assert data.extract(clips, tmp_path, "all", workers=1) == (4, 3)
    for video in data.read_list(tmp_path / "all.txt"):
        file = clips / f"{video.path}{'.avi' if '_' in video.path else '.mp4'}"
        read, num_frames = evaluate.open_video(file)
        assert num_frames == video.frames
        some = [num_frames - 1, 0, num_frames // 2]
        assert torch.equal(read(some), data.read_frames(tmp_path / "frames" / video.path, some))


@needs_ffmpeg
def test_labels_of_good_videos_and_one_line_for_each_bad_one(lab, run, clips):
    names = ["landscape.mp4", "audio.mp4", "portrait.mp4", "truncated.mp4", "one_frame.avi", "text.mp4", "none.mp4"]
    status, lines, err = run("--checkpoint", lab.checkpoint, "--top", "3", "--video", *(clips / name for name in names))
    assert status == 2 and len(lines) == 3 * 4 and len(err) == 4
    for name, line in zip(("audio.mp4", "truncated.mp4", "text.mp4", "none.mp4"), err):
        assert re.fullmatch(rf"evaluate\.py: {clips / name}: .{{5,}}", line)
    for start, name in ((0, "landscape.mp4"), (4, "portrait.mp4"), (8, "one_frame.avi")):
        assert lines[start] == str(clips / name)
        labels = [re.fullmatch(r" *(\d+\.\d\d) %  (.+)", line).groups() for line in lines[start + 1 : start + 4]]
        assert all(name in data.TOY_CATEGORIES for _, name in labels)
        assert labels == sorted(labels, key=lambda label: -float(label[0]))


def test_a_missing_ffmpeg_is_told(lab, run, monkeypatch):
    monkeypatch.setenv("PATH", "")
    status, lines, err = run("--checkpoint", lab.checkpoint, "--video", "x.mp4", "y.mp4")
    assert status == 2 and not lines and all("the program ffmpeg is missing" in line for line in err) and err


@needs_ffmpeg
@pytest.mark.parametrize("flags, name", [((), "clip"), (("--protocol", "multiscale"), "multiscale")])
def test_json_and_picture(lab, run, clips, flags, name):
    files = [str(clips / "landscape.mp4"), str(clips / "portrait.mp4")]
    status, lines, err = run("--checkpoint", lab.checkpoint, "--json", "--picture", "out.png", "--top", "4", *flags,
                             "--video", *files)
    found = json.loads("\n".join(lines))
    assert status == 0 and not err and [one["video"] for one in found] == files
    for one in found:
        read, num_frames = evaluate.open_video(one["video"])
        protocol = evaluate.make_protocol(lab.recipe, name)
        views = evaluate.test_views(read, num_frames, pathlib.Path(one["video"]).stem, lab.recipe, protocol)
        scores = evaluate.predict(lab.model, [(0, views)], 10, lab.recipe, CPU)[0]
        best = sorted(range(10), key=lambda k: -scores[k])[:4]
        assert list(one["labels"]) == [data.TOY_CATEGORIES[k] for k in best]
        np.testing.assert_allclose(list(one["labels"].values()), scores[best], rtol=0, atol=1e-5)
    with Image.open("out.png") as picture:  # a row for each video: its four frames, 160x120, then four bars of labels
        assert picture.format == "PNG" and picture.size == (4 * 160, 2 * (128 + 4 * 18))
        read, num_frames = evaluate.open_video(files[0])
        frames = read(data.segment_indices(num_frames, 4))
        for i, frame in enumerate(frames):
            shown = picture.crop((160 * i, 0, 160 * i + 160, 120)).convert("RGB")
            assert shown.tobytes() == Image.fromarray(frame.numpy()).resize((160, 120)).tobytes()


@needs_ffmpeg
def test_a_video_and_other_peoples_weights(lab, run, clips):
    torch.save(evaluate.read_checkpoint(lab.checkpoint)["model"], "PUBLIC.pth")
    command = ["--model", "tiny", "--weights", "PUBLIC.pth", "--json", "--video", str(clips / "landscape.mp4")]
    numbers, names = (json.loads("\n".join(run(*more, *command)[1]))[0]["labels"] for more in ([], ["--data", lab.toy]))
    assert [data.TOY_CATEGORIES[int(number)] for number in numbers] == list(names)  # --data has the names
    assert list(numbers.values()) == list(names.values()) and len(names) == 5
