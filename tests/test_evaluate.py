"""The metric is scikit-learn's sample-level mAP, ties included. The views of a video are the
report's. A video's scores are those of a loop that runs one view at a time, for any batch and any
number of processes. Other people's files are read, or refused in one line.

    python -m pytest tests/test_evaluate.py

The tests follow evaluate.py from top to bottom: the metric, the views, the scores, networks and
their weights, processes, --video, the script. A network of two layers (TINY in conftest.py) with
drawn weights stands for the five; ffmpeg generates the videos.
"""
import argparse
import functools
import importlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import data
import evaluate
import slowfast
import tin
import train
from conftest import ROOT, TINY, call, close, fill, golden, scripts_with_tiny, torchrun

CPU = torch.device("cpu")
METRICS = dict(np.load(ROOT / "tests" / "golden" / "metrics.npz"))
needs_ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None and os.environ.get("CI") != "true",
                                  reason="the program ffmpeg is missing")


# ---- the metric


def precision_of(scores, labels):
    """The average precision of one video."""
    return evaluate.average_precision([scores], [labels])[0]


def test_average_precision_of_three_classes():
    """Ranked by score: class 0, a label; class 1, none; class 2, a label.

    Down to class 0, one of 1 classes is a label. Down to class 2, two of 3 are. AP is the mean.
    """
    assert precision_of([0.9, 0.5, 0.1], [1, 0, 1]) == (1 / 1 + 2 / 3) / 2


def test_a_tie_counts_against_the_label():
    """Class 0, the label, and class 1 have one score. Two classes lie at or above it, so the
    precision is 1/2: as if the other class were ranked first."""
    assert precision_of([0.5, 0.5, 0.1], [1, 0, 0]) == 1 / 2


def test_labels_of_one_score_enter_together():
    """Classes 1 and 2, both labels, have one score: for each, two labels among three classes."""
    assert precision_of([0.9, 0.5, 0.5], [0, 1, 1]) == 2 / 3


@pytest.mark.parametrize("scores, labels, expected", [
    ([3, 2, 1, 0], [1, 0, 0, 0], 1),
    ([3, 2, 1, 0], [0, 0, 0, 1], 1 / 4),
    ([3, 2, 1, 0], [0, 1, 0, 1], (1 / 2 + 2 / 4) / 2),
    ([1, 1, 1, 1], [0, 0, 1, 0], 1 / 4),    # all tie
    ([2, 1, 1, 0], [0, 1, 0, 1], (1 / 3 + 2 / 4) / 2),
    ([3, 2, 1, 0], [0, 0, 0, 0], 0),        # no label: 0, as scikit-learn has it
    ([0, 0, 3, 1], [1, 1, 1, 1], 1),        # every class is a label
    ([-np.inf, 0, np.inf], [0, 0, 1], 1),   # infinite scores have an order too
])
def test_average_precision_by_hand(scores, labels, expected):
    assert precision_of(scores, labels) == expected


def test_the_map_is_the_mean_over_the_videos():
    """One video has AP 1, another 1/2, and one without labels counts as 0."""
    scores = [[2, 1], [2, 1], [2, 1]]
    labels = [[1, 0], [0, 1], [0, 0]]
    assert evaluate.average_precision(scores, labels).tolist() == [1, 1 / 2, 0]
    assert evaluate.sample_map(scores, labels) == 1 / 2


def looped_precision(scores, labels):
    """AP of one video by its definition, a loop over its labels."""
    positives = [k for k in range(len(labels)) if labels[k]]
    if not positives:
        return 0.0
    total = 0.0
    for u in positives:
        labels_ahead = sum(scores[p] >= scores[u] for p in positives)
        classes_ahead = sum(score >= scores[u] for score in scores)
        total += labels_ahead / classes_ahead
    return total / len(positives)


@pytest.mark.parametrize("levels", [2, 5, 10**9])
def test_average_precision_is_the_loop(levels):
    """With 2 or 5 different scores nearly all of them tie."""
    rng = np.random.default_rng(levels)
    scores = rng.integers(levels, size=(40, 11)) / levels
    labels = rng.random((40, 11)) < rng.random((40, 1))
    labels[0] = False
    labels[1] = True

    expected = [looped_precision(*video) for video in zip(scores, labels)]
    assert expected[:2] == [0, 1]
    ours = evaluate.average_precision(scores, labels)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", range(int(METRICS["n"])))
def test_the_metric_is_that_of_scikit_learn_and_of_the_authors(case):
    """mmaction2 gives the same but NaN for a video without labels."""
    scores = METRICS[f"scores_{case}"]
    labels = METRICS[f"labels_{case}"]
    ours = evaluate.average_precision(scores, labels)
    np.testing.assert_allclose(ours, METRICS[f"sklearn_rows_{case}"], rtol=0, atol=1e-12)

    mmaction2 = METRICS[f"mmaction2_rows_{case}"]
    known = ~np.isnan(mmaction2)
    np.testing.assert_allclose(ours[known], mmaction2[known], rtol=0, atol=1e-12)
    assert not labels[~known].any()

    whole = evaluate.sample_map(scores, labels)
    assert whole == pytest.approx(METRICS[f"sklearn_{case}"], rel=0, abs=1e-12)
    assert whole == pytest.approx(METRICS[f"xtemporal_{case}"], rel=0, abs=1e-12)


@pytest.mark.parametrize("scores, labels", [
    (np.array([[1 + 1e-12, 1]]), np.array([[1, 0]])),  # as float32 these would tie
    (np.array([[0.5, 0.4995]], np.float16), np.array([[True, False]])),
    (torch.tensor([[1.0, 0.5]]), torch.tensor([[1.0, 0.0]])),
])
def test_scores_are_compared_as_they_are_stored(scores, labels):
    assert evaluate.average_precision(scores, labels).tolist() == [1]


@pytest.mark.parametrize("scores, labels, message", [
    ([[0.5, np.nan]], [[1, 0]], "a score is not a number"),
    ([[0.5, 0.1]], [[2, 0]], "labels must be 0 or 1"),
    ([[0.5, 0.1]], [[-1, 0]], "labels must be 0 or 1"),
    ([[0.5, 0.1]], [[0.5, 0]], "labels must be 0 or 1"),
    ([[0.5, 0.1]], [[np.nan, 0]], "labels must be 0 or 1"),
    ([[0.5, 0.1]], [[1, 0, 0]], r"scores \(1, 2\) and labels \(1, 3\)"),
    ([0.5, 0.1], [1, 0], r"scores \(2,\) and labels \(2,\)"),
])
def test_the_metric_refuses(scores, labels, message):
    with pytest.raises(ValueError, match=message):
        evaluate.sample_map(scores, labels)


def test_hit_rates_by_hand():
    """The likeliest class is a label of the first video, the second of seven is one of the second,
    and the sixth, too late for the five likeliest, is one of the third. Of equals, the class with
    the lower number comes first, which is why the fourth video is a hit."""
    scores = np.array([[7, 6, 5, 4, 3, 2, 1]] * 3 + [[1, 1, 1, 1, 1, 1, 1]])
    labels = np.zeros((4, 7), int)
    labels[[0, 1, 2, 3], [0, 1, 5, 0]] = 1
    assert evaluate.hit_rates(scores, labels) == (2 / 4, 3 / 4)


def test_the_printed_figures_by_hand(capsys):
    """Videos (rows): AP 1, AP 1/2, and no label. Classes (columns): class 0 has its only label
    first of three scores, AP 1; class 1 has it second, AP 1/2; class 2 has none and is left out."""
    scores = np.array([[0.9, 0.6, 0.0], [0.8, 0.5, 0.0], [0.1, 0.2, 0.3]])
    labels = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 0]])
    evaluate.print_metrics(scores, labels)
    assert capsys.readouterr().out.splitlines() == [
        "3 videos; 1 without labels count as AP 0 (mAP of the others 75.00)",
        "class-level mAP 75.00, top-1 hit rate 50.00, top-5 100.00",
        "mAP 50.00",
    ]


@pytest.mark.parametrize("case", [0, 4, 13])
def test_the_printed_figures_are_those_of_scikit_learn(capsys, case):
    """Its average="macro" is the mean over classes. Case 4 has videos without labels."""
    evaluate.print_metrics(METRICS[f"scores_{case}"], METRICS[f"labels_{case}"])
    first, second, last = capsys.readouterr().out.splitlines()
    assert f"(mAP of the others {100 * METRICS[f'positive_rows_{case}']:.2f})" in first
    assert f"class-level mAP {100 * METRICS[f'macro_{case}']:.2f}," in second
    assert last == f"mAP {100 * METRICS[f'sklearn_{case}']:.2f}"


def test_a_list_without_labels_has_no_map(capsys):
    evaluate.print_metrics(np.zeros((2, 4)), None)
    assert capsys.readouterr().out == "the list has no labels: scores, but no mAP\n"


# ---- the views of a video


@pytest.mark.parametrize("model", ["tsn", "trn", "tsm", "tin", "slowfast"])
def test_protocols_of_every_row_are_the_reports(model):
    for row in importlib.import_module(model).RECIPES:
        _, recipe = evaluate.open_model(model, row)
        one_view = (256, 224)  # short side, crop
        clips = 5
        sides = [256]          # short sides, and the crops' sides
        if model == "slowfast":
            one_view = (128, 112)
            clips = 10
            sides = [128, 144, 160]
        if row == "toy":
            one_view = (36, 32)
            sides = [32]
        if row == "toy" and model == "slowfast":
            sides = [32, 30, 28]

        sizes = [(side, side) for side in sides]
        assert evaluate.make_protocol(recipe) == {
            "name": "clip", "clips": 1, "crops": "1", "sizes": [one_view]}
        assert evaluate.make_protocol(recipe, "dense") == {
            "name": "dense", "clips": clips, "crops": "3", "sizes": sizes[:1]}
        assert evaluate.make_protocol(recipe, "multiscale") == {
            "name": "multiscale", "clips": clips, "crops": "3", "sizes": sizes}


@pytest.mark.parametrize("model, changed, name, expected", [
    ("tin", {}, "clip", 1),
    ("tin", {}, "dense", 5 * 3),
    ("tin", {"crops": "random"}, "dense", 5 * 3),
    ("slowfast", {}, "dense", 10 * 3),
    ("slowfast", {}, "multiscale", 10 * 3 * 3),
    ("slowfast", {"crops": "1"}, "multiscale", 10 * 1 * 3),
])
def test_the_number_of_views_of_a_video(model, changed, name, expected):
    _, recipe = evaluate.open_model(model)
    protocol = evaluate.make_protocol({**recipe, **changed}, name)
    assert evaluate.count_views(protocol) == expected


@pytest.mark.parametrize("width, height, crop, crops, places", [
    (340, 256, 256, "3", [(0, 0), (84, 0), (42, 0)]),        # left, right, centre
    (256, 340, 256, "3", [(0, 0), (0, 84), (0, 42)]),        # portrait: top, bottom, centre
    (256, 256, 256, "3", [(0, 0), (0, 0), (0, 0)]),          # a square has one place
    (340, 256, 224, "3", [(0, 16), (116, 16), (58, 16)]),
    (256, 340, 224, "3", [(16, 0), (16, 116), (16, 58)]),
    (340, 256, 224, "1", [(58, 16)]),
    (171, 169, 112, "1", [(30, 28)]),  # 29.5 and 28.5 become even, as in Python and torchvision
])
def test_places_of_the_crops(width, height, crop, crops, places):
    assert evaluate.crop_places(width - crop, height - crop, crops, rng=None) == places


def test_random_crops_reach_every_place():
    rng = np.random.default_rng(0)
    reached = set()
    for _ in range(300):
        places = evaluate.crop_places(4, 2, "random", rng)
        assert len(places) == 3
        reached.update(places)
    assert reached == {(x, y) for y in range(3) for x in range(5)}  # 4 and 2 are places as well


class Frames:
    """A video whose pixels say where they are: red is the frame's index, green x, blue y."""

    def __init__(self, width, height):
        self.width = width
        self.height = height
        self.asked_for = []

    def __call__(self, indices):
        self.asked_for.append(list(indices))
        video = torch.zeros(len(indices), self.height, self.width, 3, dtype=torch.uint8)
        video[..., 0] = torch.tensor(indices)[:, None, None]
        video[..., 1] = torch.arange(self.width)
        video[..., 2] = torch.arange(self.height)[:, None]
        return video


def described(views):
    """Views (V, T, h, w, 3) of Frames -> [(frame indices, x, y of the top left corner), ...]."""
    return [(view[:, 0, 0, 0].tolist(), *view[0, 0, 0, 1:].tolist()) for view in views]


def test_a_video_of_forty_frames_has_these_views():
    """Two clips of four frames, three crops of each: the first clip is the middles of four equal
    parts, the second takes a random frame of each part."""
    recipe = dict(sampling="segments", frames=4, stride=1, clips=2, crops="3", scales=(16, 12))
    protocol = evaluate.make_protocol(recipe, "multiscale")
    views = evaluate.test_views(Frames(20, 16), 40, "a name", recipe, protocol)
    assert [tuple(view.shape) for view in views] == [(6, 4, 16, 16, 3), (6, 4, 12, 12, 3)]
    assert [view.dtype for view in views] == [torch.uint8, torch.uint8]

    first_clip = [5, 15, 25, 35]
    rng = np.random.default_rng(zlib.crc32(b"a name"))
    second_clip = ((np.arange(4) + rng.random(4)) * 10).astype(int).tolist()
    expected = []
    for clip in (first_clip, second_clip):
        for x in (0, 4, 2):
            expected.append((clip, x, 0))
    assert described(views[0]) == expected

    # the other scale has the same clips; a frame's index survives the resizing
    for view, (clip, _, _) in zip(views[1], expected):
        assert view[:, 6, 6, 0].tolist() == clip


def test_ten_clips_are_spread_over_a_video_of_three_seconds():
    """SlowFast 8x8 sees 32 frames, 2 apart: 64 of 90, so the last clip starts at frame 26."""
    recipe = {**slowfast.RECIPES["r101_8x8"], "scales": (16,)}
    protocol = evaluate.make_protocol(recipe, "dense")
    views = evaluate.test_views(Frames(20, 16), 90, "a", recipe, protocol)
    expected = []
    for start in [0, 2, 5, 8, 11, 14, 17, 20, 23, 26]:
        for x in (0, 4, 2):
            expected.append((list(range(start, start + 64, 2)), x, 0))
    assert described(views[0]) == expected

    one = evaluate.make_protocol({**recipe, "test_resize": 16, "test_crop": 8})
    views = evaluate.test_views(Frames(20, 16), 90, "a", recipe, one)
    assert described(views[0]) == [(list(range(13, 77, 2)), 6, 4)]


def test_ten_clips_of_eleven_frames_by_eight_are_three_different_ones():
    """SlowFast 11x8 sees 88 of the 90 frames of a video, so it can start at 0, 1 or 2."""
    recipe = slowfast.RECIPES["r101_11x8"]
    protocol = evaluate.make_protocol(recipe, "dense")
    views = evaluate.test_views(Frames(128, 128), 90, "a", recipe, protocol)
    starts = [frames[0] for frames, x, y in described(views[0])[::3]]
    assert starts == [0, 0, 0, 0, 0, 1, 1, 1, 1, 2]


@pytest.mark.parametrize("sampling", ["segments", "clip"])
@pytest.mark.parametrize("num_frames", [1, 3, 200])
def test_every_frame_is_decoded_once(sampling, num_frames):
    recipe = dict(sampling=sampling, frames=8, stride=2, clips=5, crops="3", scales=(16, 20))
    protocol = evaluate.make_protocol(recipe, "multiscale")
    video = Frames(22, 16)
    views = evaluate.test_views(video, num_frames, "a", recipe, protocol)
    [asked_for] = video.asked_for
    assert len(set(asked_for)) == len(asked_for)
    seen = set(torch.cat([view[:, :, 9, 9, 0].flatten() for view in views]).tolist())
    assert seen == set(asked_for)


@pytest.mark.parametrize("crops", ["3", "random"])
def test_randomness_belongs_to_the_videos_name(crops):
    recipe = dict(sampling="segments", frames=8, stride=1, clips=5, crops=crops, scales=(16,))
    protocol = evaluate.make_protocol(recipe, "dense")

    def views(name, seed):
        np.random.seed(seed)
        torch.manual_seed(seed)
        return described(evaluate.test_views(Frames(24, 18), 200, name, recipe, protocol)[0])

    first = views("a", seed=0)
    assert views("a", seed=1) == first
    assert views("b", seed=0) != first
    for frames, _, _ in first:
        parts = [frame // 25 for frame in frames]
        assert parts == [0, 1, 2, 3, 4, 5, 6, 7]  # each part of the video gives one frame


def test_random_crops_differ_between_clips_but_not_within_one():
    recipe = dict(sampling="segments", frames=8, stride=1, clips=5, crops="random", scales=(16,))
    protocol = evaluate.make_protocol(recipe, "dense")
    views = evaluate.test_views(Frames(64, 16), 200, "a", recipe, protocol)[0]
    for view in views:
        assert (view[:, ..., 1:] == view[:1, ..., 1:]).all()
    assert len({x for _, x, _ in described(views)}) > 5


def test_stacked_views_keep_their_scales_and_videos():
    """Two videos, two scales of three views: views of different sizes cannot be one tensor."""
    def views(video):
        large = torch.full((3, 4, 16, 16, 3), video, dtype=torch.uint8)
        small = torch.full((3, 4, 12, 12, 3), 10 + video, dtype=torch.uint8)
        return [large, small]

    rows, [large, small] = evaluate.stack_views([(7, views(1)), (2, views(2))])
    assert rows.tolist() == [7, 2]
    assert large.shape == (2, 3, 4, 16, 16, 3)
    assert small.shape == (2, 3, 4, 12, 12, 3)
    assert large[:, 0, 0, 0, 0, 0].tolist() == [1, 2]
    assert small[:, 0, 0, 0, 0, 0].tolist() == [11, 12]


# ---- scores


class Corner(torch.nn.Module):
    """A network of two classes: its logits are the red and the green of a clip's first pixel."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.dtype = dtype

    def forward(self, clip):
        return clip[:, 0, :2, 0, 0].to(self.dtype)


# With these colours a normalised pixel is what it was before: 0 to 255.
PLAIN = dict(mean=(0, 0, 0), std=(1 / 255, 1 / 255, 1 / 255), loss="bce")


def views_of(*pixels):
    """Views of one pixel, of one video: uint8 (1, V, 1, 1, 1, 3). pixels: (red, green), ..."""
    views = [[[[[red, green, 0]]]] for red, green in pixels]
    return torch.tensor([views], dtype=torch.uint8)


@pytest.mark.parametrize("loss, average, expected", [
    # sigmoid(2) = .8808 and sigmoid(0) = .5; sigmoid(1), of the mean logit, = .7311
    ("bce", "prob", [0.5, 0.6904]),
    ("bce", "logit", [0.5, 0.7311]),
    # softmax(0, 2) = (.1192, .8808) and softmax(0, 0) = (.5, .5); softmax(0, 1) = (.2689, .7311)
    ("ce", "prob", [0.3096, 0.6904]),
    ("ce", "logit", [0.2689, 0.7311]),
])
def test_two_views_by_hand(loss, average, expected):
    """A view has the logits (0, 2), the other (0, 0). Averages of probabilities and of logits
    differ, and so do classes that exclude each other (ce) and classes that do not (bce)."""
    recipe = {**PLAIN, "loss": loss}
    one_scale = [views_of((0, 2), (0, 0))]
    two_scales = [views_of((0, 2)), views_of((0, 0))]
    for views in (one_scale, two_scales):
        scores = evaluate.score_views(Corner(), views, recipe, CPU, average=average)
        assert scores.tolist() == [pytest.approx(expected, abs=1e-4)]


def test_each_video_gets_the_mean_of_its_own_views():
    first = views_of((0, 0), (2, 0), (2, 0))
    second = views_of((0, 0), (0, 0), (0, 2))
    views = [torch.cat([first, second])]
    scores = evaluate.score_views(Corner(), views, PLAIN, CPU, view_batch=4)
    close(scores, [[(0.5 + 2 * 0.8808) / 3, 0.5], [0.5, (2 * 0.5 + 0.8808) / 3]])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_do_not_tie(dtype):
    """sigmoid(9) and sigmoid(12) are both 1 in half precision. The metric would see a tie."""
    scores = evaluate.score_views(Corner(dtype), [views_of((9, 12))], PLAIN, CPU)
    assert torch.equal(scores, torch.tensor([[9.0, 12.0]]).sigmoid())
    assert scores[0, 0] < scores[0, 1] < 1


def test_the_network_runs_under_autocast():
    dtypes = []

    class Linear(torch.nn.Linear):
        def forward(self, clip):
            output = super().forward(clip.flatten(1))
            dtypes.append(output.dtype)
            return output

    for amp in ("off", "bf16"):
        autocast = evaluate.make_autocast(CPU, amp)
        scores = evaluate.score_views(
            Linear(3, 2), [views_of((1, 2))] * 2, PLAIN, CPU, autocast=autocast)
        assert scores.dtype == torch.float32
    assert dtypes == [torch.float32] * 2 + [torch.bfloat16] * 2


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A folder with the scripts, tiny.py, toy videos and a checkpoint of the tiny network.

    .folder .toy .checkpoint     paths
    .tiny .model .recipe         its module, its network, its recipe
    """
    folder = scripts_with_tiny(tmp_path_factory.mktemp("lab"))
    tiny = ModuleType("tiny")
    exec(TINY, tiny.__dict__)

    # lists of the toy: seven videos, two, unlabelled ones, and one with a video that is not there
    toy = folder / "toy"
    data.draw_toy(toy, videos=32)
    lines = (toy / "val.txt").read_text().splitlines()
    data.write_lines(toy / "seven.txt", lines[:7])
    data.write_lines(toy / "two.txt", lines[:2])
    data.write_lines(toy / "test.txt", [f"{line.split()[0]} 24 -1" for line in lines[:3]])
    data.write_lines(toy / "broken.txt", [*lines[:3], "val/none 24 1", lines[4]])

    # Large weights: the averages of probabilities and of logits must differ.
    recipe = {"loss": "bce", **data.RECIPE, **evaluate.RECIPE, **data.TOY, **tiny.RECIPES["toy"]}
    recipe = {**recipe, "clips": 3, "scales": (36, 40)}
    model = fill(tiny.build(recipe, 10)).eval()
    with torch.no_grad():
        model.fc.weight *= 20
    config = {"model": "tiny", "recipe": recipe, "categories": data.TOY_CATEGORIES}
    checkpoint = folder / "tiny.pt"
    torch.save({"model": model.state_dict(), "config": config, "iteration": 12}, checkpoint)
    return SimpleNamespace(folder=folder, toy=toy, checkpoint=checkpoint, tiny=tiny, model=model,
                           recipe=recipe)


def video_list(lab, protocol, recipe=None, split="seven"):
    recipe = recipe or lab.recipe
    views = functools.partial(evaluate.test_views, recipe=recipe, protocol=protocol)
    return data.VideoList(lab.toy, split, recipe, train=False, views=views)


@torch.no_grad()
def one_view_at_a_time(lab, recipe, protocol, average="prob"):
    """The scores of seven.txt by their definition: every view is loaded, resized, cut, normalised
    and run by itself; the last step is the average."""
    length = recipe["frames"]
    stride = recipe["stride"]
    scores = []
    for video in data.read_list(lab.toy / "seven.txt"):
        # frame indices of each clip
        if recipe["sampling"] == "segments":
            rng = np.random.default_rng(zlib.crc32(video.path.encode()))
            clips = [data.segment_indices(video.frames, length)]
            while len(clips) < protocol["clips"]:
                clips.append(data.segment_indices(video.frames, length, rng))
        else:
            room = video.frames - length * stride
            starts = [room // 2]
            if protocol["clips"] > 1:
                starts = [room * c // (protocol["clips"] - 1) for c in range(protocol["clips"])]
            clips = [range(start, start + length * stride, stride) for start in starts]

        # the logits of each view; the toy's frames have 40x36 pixels
        logits = []
        for short, crop in protocol["sizes"]:
            width = short * 40 // 36
            y = round((short - crop) / 2)
            middle = round((width - crop) / 2)
            columns = [middle]
            if protocol["crops"] == "3":
                columns = [0, width - crop, middle]
            for clip in clips:
                frames = []
                for i in clip:
                    file = lab.toy / "frames" / video.path / f"img_{i + 1:05d}.jpg"
                    frames.append(np.asarray(Image.open(file)))
                frames = data.resize(torch.from_numpy(np.stack(frames)), (width, short))
                for x in columns:
                    view = frames[:, y : y + crop, x : x + crop].float() / 255
                    view = (view - torch.tensor(recipe["mean"])) / torch.tensor(recipe["std"])
                    logits.append(lab.model(view.permute(0, 3, 1, 2)[None])[0])

        logits = torch.stack(logits)
        if average == "prob":
            scores.append(logits.sigmoid().mean(dim=0))
        else:
            scores.append(logits.mean(dim=0).sigmoid())
    return torch.stack(scores).numpy()


@pytest.mark.parametrize("average", ["prob", "logit"])
@pytest.mark.parametrize("sampling", ["segments", "clip"])
@pytest.mark.parametrize("name", ["clip", "dense", "multiscale"])
def test_scores_are_those_of_one_view_at_a_time(lab, name, sampling, average):
    recipe = {**lab.recipe, "sampling": sampling, "stride": 5}
    protocol = evaluate.make_protocol(recipe, name)
    expected = one_view_at_a_time(lab, recipe, protocol, average)
    videos = video_list(lab, protocol, recipe)
    ours = evaluate.predict(lab.model, videos, 10, recipe, CPU, average=average)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)
    assert abs(expected[0] - expected[1]).max() > 1e-3  # the videos can be told apart


def test_the_averages_of_probabilities_and_of_logits_differ_here(lab):
    """Otherwise the test above could not tell them apart."""
    protocol = evaluate.make_protocol(lab.recipe, "multiscale")
    probabilities = one_view_at_a_time(lab, lab.recipe, protocol, "prob")
    logits = one_view_at_a_time(lab, lab.recipe, protocol, "logit")
    assert abs(probabilities - logits).max() > 1e-3


@pytest.mark.parametrize("model", ["tin", "slowfast"])
def test_the_one_view_is_the_clip_that_validation_sees(lab, model):
    _, recipe = evaluate.open_model(model, "toy")
    videos = video_list(lab, evaluate.make_protocol(recipe), recipe)
    clips = data.VideoList(lab.toy, "seven", recipe, train=False)
    for row in range(7):
        assert videos[row][0] == row
        [views] = videos[row][1]
        assert torch.equal(views, clips[row][0][None])


@pytest.mark.parametrize("batch, view_batch, workers", [(1, 1, 0), (7, 5, 0), (3, 1000, 2)])
def test_batches_and_workers_change_nothing(lab, batch, view_batch, workers):
    videos = video_list(lab, evaluate.make_protocol(lab.recipe, "multiscale"))
    expected = evaluate.predict(lab.model, videos, 10, lab.recipe, CPU)
    ours = evaluate.predict(lab.model, videos, 10, lab.recipe, CPU, batch=batch,
                            view_batch=view_batch, workers=workers)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)


class Pixels(torch.nn.Module):
    """A network whose logits are ten pixels as they are, so that no batch can change them."""

    def __init__(self):
        super().__init__()
        self.sizes = []
        self.modes = []

    def forward(self, clip):
        self.sizes.append(tuple(clip.shape))
        self.modes.append(self.training)
        return clip[:, 1, 1, 3, :10]


def test_view_batch_bounds_what_runs_at_once(lab):
    """Seven videos of nine views at each scale are 63 views: twelve times five, and three."""
    model = Pixels()
    videos = video_list(lab, evaluate.make_protocol(lab.recipe, "multiscale"))
    evaluate.predict(model, videos, 10, lab.recipe, CPU, batch=7, view_batch=5)
    assert model.sizes == [
        *[(5, 4, 3, 36, 36)] * 12, (3, 4, 3, 36, 36),
        *[(5, 4, 3, 40, 40)] * 12, (3, 4, 3, 40, 40)]


@pytest.mark.parametrize("training", [True, False])
def test_the_network_is_in_evaluation_mode_for_a_while(lab, training):
    model = Pixels().train(training)
    videos = video_list(lab, evaluate.make_protocol(lab.recipe))
    evaluate.predict(model, videos, 10, lab.recipe, CPU)
    assert not any(model.modes)
    assert model.training == training


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_video_is_named_by_its_list_line(lab, workers):
    videos = video_list(lab, evaluate.make_protocol(lab.recipe), split="broken")
    with pytest.raises(OSError, match=r"broken\.txt:4: .*val/none/img_00004\.jpg"):
        evaluate.predict(lab.model, videos, 10, lab.recipe, CPU, workers=workers, batch=1)


JOB = '''
"""Every process predicts, all must get the same, and the first one saves it."""
import functools
import numpy as np
import torch
import torch.distributed as dist
import data
import evaluate
import tiny


class Pixels(torch.nn.Module):
    def forward(self, clip):
        return clip[:, 1, 1, 3, :10]


rank, world, device = evaluate.start_process("cpu")
checkpoint = evaluate.read_checkpoint("tiny.pt")
recipe = checkpoint["config"]["recipe"]
model, _ = evaluate.load_weights(tiny, recipe, checkpoint, "tiny.pt")


def predict(model, name, split, **options):
    protocol = evaluate.make_protocol(recipe, name)
    views = functools.partial(evaluate.test_views, recipe=recipe, protocol=protocol)
    videos = data.VideoList("toy", split, recipe, train=False, views=views)
    return evaluate.predict(model, videos, 10, recipe, device, **options)


results = {
    "pixels": predict(Pixels(), "clip", "seven"),
    "prob": predict(model, "multiscale", "seven", batch=1, view_batch=5),
    "logit": predict(model, "multiscale", "seven", average="logit"),
    "two videos": predict(model, "clip", "two"),
}
everywhere = [None] * world
dist.all_gather_object(everywhere, results)
for other in everywhere:
    for name in results:
        np.testing.assert_array_equal(other[name], results[name])
if rank == 0:
    np.savez(f"scores_of_{world}.npz", **results)
evaluate.end_process()
'''


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_change_nothing(lab, processes):
    """Neither 2 nor 3 divides seven videos; of two videos, the third process gets none."""
    (lab.folder / "job.py").write_text(JOB)
    result = torchrun(processes, "job.py", cwd=lab.folder)
    assert result.returncode == 0, result.stderr
    scores = np.load(lab.folder / f"scores_of_{processes}.npz")

    # The rows are put together bit for bit.
    one_view = evaluate.make_protocol(lab.recipe)
    videos = video_list(lab, one_view)
    pixels = evaluate.predict(Pixels(), videos, 10, lab.recipe, CPU)
    np.testing.assert_array_equal(scores["pixels"], pixels)

    # A real network differs by float32 noise, since other clips share its batches.
    two = evaluate.predict(lab.model, video_list(lab, one_view, split="two"), 10, lab.recipe, CPU)
    np.testing.assert_allclose(scores["two videos"], two, rtol=0, atol=1e-5)
    protocol = evaluate.make_protocol(lab.recipe, "multiscale")
    for average in ("prob", "logit"):
        expected = one_view_at_a_time(lab, lab.recipe, protocol, average)
        np.testing.assert_allclose(scores[average], expected, rtol=0, atol=1e-5)


def test_labels_are_a_row_of_zeros_and_ones(lab):
    videos = data.VideoList(lab.toy, "seven", lab.recipe, train=False)
    labels = evaluate.multi_hot(videos)
    assert labels.dtype == np.uint8 and labels.shape == (7, 10)
    for row, video in enumerate(data.read_list(lab.toy / "seven.txt")):
        assert np.flatnonzero(labels[row]).tolist() == sorted(video.labels)

    unlabelled = data.VideoList(lab.toy, "test", lab.recipe, train=False)
    assert evaluate.multi_hot(unlabelled) is None


def test_a_score_file_holds_four_plain_arrays(tmp_path):
    paths = ["ü/b", "a"]
    scores = np.array([[0.25, 0.5], [0.75, 1]])
    labels = np.array([[1, 0], [0, 1]], np.uint8)
    evaluate.save_scores(tmp_path / "scores.npz", paths, scores, labels, {"clips": [1, 2]})
    with np.load(tmp_path / "scores.npz", allow_pickle=False) as file:
        assert sorted(file) == ["labels", "meta", "paths", "scores"]
        assert file["paths"].tolist() == paths
        assert file["scores"].dtype == np.float32 and file["scores"].tolist() == scores.tolist()
        assert file["labels"].dtype == np.uint8 and file["labels"].tolist() == labels.tolist()
        assert json.loads(str(file["meta"])) == {"clips": [1, 2]}

    # A name without .npz stays as it is, and nothing else is left in the folder.
    evaluate.save_scores(tmp_path / "plain", paths, scores, None, {})
    assert sorted(np.load(tmp_path / "plain")) == ["meta", "paths", "scores"]
    assert sorted(os.listdir(tmp_path)) == ["plain", "scores.npz"]


def test_an_output_that_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evaluate.check_output("new.npz")
    evaluate.check_output(tmp_path / "new.npz")
    with pytest.raises(ValueError, match="is a folder"):
        evaluate.check_output(tmp_path)
    with pytest.raises(ValueError, match="none/new.npz: there is no such folder"):
        evaluate.check_output("none/new.npz")


# ---- networks and their weights


def test_a_recipe_is_the_shared_pages_and_a_row():
    module, recipe = evaluate.open_model("tin", "r101_16f")
    assert module is tin
    assert recipe == {"loss": "bce", **data.RECIPE, **evaluate.RECIPE, **tin.RECIPES["r101_16f"]}
    assert (recipe["frames"], recipe["depth"], recipe["crop"], recipe["clips"]) == (16, 101, 224, 5)
    assert evaluate.open_model("tin")[1] == evaluate.open_model("tin", "r50_8f")[1]


def test_the_toy_row_comes_after_what_belongs_to_the_toy():
    _, recipe = evaluate.open_model("tin", "toy")
    assert (recipe["crop"], recipe["flip"], recipe["lr"], recipe["depth"]) == (32, False, 0.03, 18)

    # SlowFast's has values of its own for both of these
    _, recipe = evaluate.open_model("slowfast", "toy")
    assert (recipe["crop"], recipe["scales"], recipe["lr"]) == (32, (32, 30, 28), 0.05)


def test_epochs_and_iterations_clear_each_other():
    """A run counts one of them. SlowFast's rows count iterations, the page of train.py epochs."""
    pages = (data.RECIPE, evaluate.RECIPE, train.RECIPE)
    _, recipe = evaluate.open_model("slowfast", "r101_8x8", pages)
    assert (recipe["iterations"], recipe["epochs"]) == (180000, 0)
    _, recipe = evaluate.open_model("tin", "r50_8f", pages)
    assert (recipe["iterations"], recipe["epochs"]) == (0, 30)

    assert evaluate.override(recipe, {"iterations": 50})["epochs"] == 0
    assert evaluate.override({"iterations": 50}, {"epochs": 3}) == {"iterations": 0, "epochs": 3}
    both = {"iterations": 7, "epochs": 3}
    assert evaluate.override(recipe, both) == {**recipe, **both}


@pytest.mark.parametrize("name, row, message", [
    ("none", None, "--model none: no model file; there are slowfast, tin, trn, tsm, tsn"),
    ("../tin", None, "--model ../tin: no model file"),
    ("data", None, "--model data: no model file"),
    ("tin", "r18", "--recipe r18: tin.py has the rows r50_8f, r101_8f, r101_16f, toy"),
])
def test_unknown_models_and_rows(name, row, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        evaluate.open_model(name, row)


def test_every_recipe_key_is_a_flag():
    recipe = {"clips": 5, "lr": 0.1, "crops": "3", "flip": True, "scales": (256,), "mean": (0.5,),
              "test_crop": 224, "alpha": None}
    parser = argparse.ArgumentParser()
    evaluate.add_recipe_flags(parser, recipe)
    assert vars(parser.parse_args([])) == {}  # what is not given leaves no trace

    flags = "--clips 3 --lr 1 --crops random --no-flip --scales 128 144 --mean 0.4 0.3 0.2 --alpha 8"
    given = vars(parser.parse_args([*flags.split(), "--test-crop", "112"]))
    assert given == {"clips": 3, "lr": 1.0, "crops": "random", "flip": False, "scales": [128, 144],
                     "mean": [0.4, 0.3, 0.2], "alpha": 8, "test_crop": 112}
    assert isinstance(given["lr"], float)


@pytest.mark.parametrize("changed, message", [
    ({"sampling": "some"}, "--sampling some: known are segments, clip"),
    ({"crops": "2"}, "--crops 2: known are 1, 3, random"),
    ({"loss": "hinge"}, "--loss hinge: known are bce, lsep, warp, ce"),
    ({"frames": 0}, "--frames 0: at least 1"),
    ({"scales": (256, 0)}, "--scales (256, 0): at least 1"),
    ({"dropout": float("nan")}, "--dropout nan: must not be negative, and must be a number"),
    ({"stride": -1}, "--stride -1: must not be negative"),
    ({"test_crop": 257}, "--test-crop 257: larger than the short side that it is cut from"),
    ({"jitter": (320, 256)}, "--jitter (320, 256): two numbers, the smaller one first"),
    ({"jitter": (256,)}, "--jitter (256,): two numbers"),
    ({"augment": "jitter", "crop": 300}, "--crop 300: larger than the short side"),
    ({"mean": (0.5, 0.5)}, "--mean and --std: three numbers each"),
    ({"std": (0.2, 0, 0.2)}, "--mean and --std: three numbers each"),
])
def test_recipes_that_no_run_could_use(changed, message):
    _, recipe = evaluate.open_model("tin")
    evaluate.check_recipe(recipe)
    with pytest.raises(ValueError, match=re.escape(message)):
        evaluate.check_recipe({**recipe, **changed})


def test_every_row_passes_the_check_and_every_word_is_known():
    pages = (data.RECIPE, evaluate.RECIPE, train.RECIPE)
    for model in ("tsn", "trn", "tsm", "tin", "slowfast"):
        for row in importlib.import_module(model).RECIPES:
            evaluate.check_recipe(evaluate.open_model(model, row, pages)[1])

    _, recipe = evaluate.open_model("tin", "r50_8f", pages)
    for key, words in evaluate.WORDS.items():
        for word in words:
            evaluate.check_recipe({**recipe, key: word})


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("numpy_1", [False, True])
def test_numpy_numbers_in_a_checkpoint_are_read(tmp_path, zipped, numpy_1):
    """PyTorch writes a zip, and wrote bare pickles before. NumPy 1 called its module numpy.core."""
    numbers = {"map": np.float64(0.5), "lr": np.float32(0.25), "epoch": np.int64(3),
               "done": np.bool_(True)}
    weights = torch.arange(6.0).view(2, 3)
    content = {"state_dict": {"w": weights}, "array": np.arange(3), **numbers}
    path = tmp_path / "file.pth"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    if numpy_1:
        written = path.read_bytes()
        assert b"numpy._core" in written
        if zipped:  # a zip stores lengths and checksums, so this name keeps its length
            pytest.skip("only the older form can be edited byte by byte")
        path.write_bytes(written.replace(b"numpy._core", b"numpy.core"))

    found = evaluate.read_checkpoint(path)
    assert {key: found[key] for key in numbers} == numbers
    assert torch.equal(found["state_dict"]["w"], weights)
    assert found["array"].tolist() == [0, 1, 2]


class Call:
    """An object that calls a function when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("kind", ["zipped", "legacy", "numpy", "arguments", "eval"])
def test_a_file_that_could_run_code_is_refused_and_does_not(tmp_path, kind):
    touch = Call(os.system, f"touch {tmp_path / 'touched'}")
    path = tmp_path / "file.pth"
    if kind == "zipped":
        torch.save({"w": torch.zeros(1), "x": touch}, path)
    elif kind == "legacy":
        torch.save({"x": touch}, path, _use_new_zipfile_serialization=False)
    elif kind == "numpy":  # a function of an allowed library
        torch.save({"x": Call(np.savetxt, str(tmp_path / "touched"), [0])}, path)
    elif kind == "arguments":  # harmless, and common
        torch.save({"x": argparse.Namespace(lr=1)}, path)
    else:
        torch.save({"x": Call(eval, f"open({str(tmp_path / 'touched')!r}, 'w')")}, path)

    message = r"file\.pth: asks for a Python object .* save the state_dict alone"
    with pytest.raises(ValueError, match=message):
        evaluate.read_checkpoint(path)
    assert os.listdir(tmp_path) == ["file.pth"]


@pytest.mark.parametrize("kind", ["cut zip", "cut legacy", "empty", "text", "arrays", "a tensor"])
def test_damaged_files_and_files_of_another_kind(tmp_path, kind):
    path = tmp_path / "file.pth"
    torch.save({"w": torch.zeros(1000)}, path, _use_new_zipfile_serialization=kind != "cut legacy")
    if kind.startswith("cut"):
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("version https://git-lfs.github.com/spec/v1\n")
    elif kind == "arrays":
        with open(path, "wb") as file:
            np.savez(file, w=np.zeros(3))
    else:
        torch.save(torch.zeros(3), path)
    with pytest.raises(ValueError, match=r"file\.pth: no checkpoint of PyTorch, or one .* cut short"):
        evaluate.read_checkpoint(path)


def test_a_file_that_is_not_there_keeps_the_systems_own_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.pth"):
        evaluate.read_checkpoint(tmp_path / "none.pth")


# A new model file, which knows none of the containers: it hands back what it gets.
NEW = SimpleNamespace(convert=lambda checkpoint: checkpoint)


@pytest.mark.parametrize("container", [
    "state_dict", "model", "model_state", "model_state_dict", "net"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_a_new_model_file_gets_every_container_as_model(container, prefix):
    checkpoint = {"epoch": 3, container: {f"{prefix}net.module.weight": 1}}
    assert evaluate.convert(NEW, checkpoint, "file.pth") == {"model": {"net.module.weight": 1}}


def test_a_file_without_a_container_loses_its_prefixes_too():
    assert evaluate.convert(NEW, {"module.fc.weight": 1}, "file.pth") == {"fc.weight": 1}

    # a text under the name of a container is none
    checkpoint = {"model": "tin", "state_dict": {"a": 1}}
    assert evaluate.convert(NEW, checkpoint, "file.pth") == {"model": {"a": 1}}


def test_a_key_that_the_model_file_refuses_is_told_with_the_file():
    with pytest.raises(ValueError, match=r"^file\.pth: .*lr"):
        evaluate.convert(tin, {"lr": 1}, "file.pth")


def test_weights_are_loaded_and_the_file_knows_the_number_of_classes(lab):
    checkpoint = evaluate.read_checkpoint(lab.checkpoint)
    model, num_classes = evaluate.load_weights(lab.tiny, lab.recipe, checkpoint, "tiny.pt")
    assert num_classes == 10
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, lab.model.state_dict()[key])

    single = {"model": lab.tiny.build(lab.recipe, 1).state_dict()}
    assert evaluate.load_weights(lab.tiny, lab.recipe, single, "one.pt")[1] == 1


@torch.no_grad()
def test_the_authors_own_file_gives_their_logits(tmp_path):
    """The way of --weights: their file, read, converted, loaded, and their answer to a clip."""
    case = golden("tsm_mit_r50_t8")
    torch.save(case.checkpoint, tmp_path / "PUBLIC.pth")
    module, recipe = evaluate.open_model("tsm", "r50_8f")
    checkpoint = evaluate.read_checkpoint(tmp_path / "PUBLIC.pth")
    model, num_classes = evaluate.load_weights(module, recipe, checkpoint, "PUBLIC.pth")
    assert num_classes == case.arrays["logits"].shape[1]
    close(model.eval()(case.clip), case.arrays["logits"])


def test_weights_that_do_not_fit_are_told_with_both_shapes(lab):
    state = dict(lab.model.state_dict())
    state["conv.weight"] = torch.zeros(8, 3, 5, 5)
    del state["norm.weight"]
    state["extra"] = torch.zeros(1)
    with pytest.raises(ValueError) as error:
        evaluate.load_weights(lab.tiny, lab.recipe, {"model": state}, "file.pth")
    assert str(error.value).startswith(
        "file.pth: does not fit the network: "
        "conv.weight is (8, 3, 5, 5) in the file, (8, 3, 3, 3) in the network; "
        "norm.weight is not in the file; extra is not in the network. README.md")


def test_only_the_first_five_misfits_are_named(lab):
    state = {"fc.bias": torch.zeros(10)}  # of eight tensors
    with pytest.raises(ValueError) as error:
        evaluate.load_weights(lab.tiny, lab.recipe, {"model": state}, "file.pth")
    assert str(error.value).count("is not in the file") == 5
    assert "; and 3 others. " in str(error.value)


# ---- processes


def test_a_process_alone_is_the_first_of_one():
    rank, world, device = evaluate.start_process("cpu")
    assert (rank, world, device) == (0, 1, CPU)
    with pytest.raises(ValueError, match="--device nothing: "):
        evaluate.start_process("nothing")


def test_channels_last_changes_where_weights_lie_and_not_what_they_are():
    flat = evaluate.use_channels_last(torch.nn.Conv2d(4, 4, 3))
    assert flat.weight.is_contiguous(memory_format=torch.channels_last)
    solid = torch.nn.Conv3d(4, 4, 3)
    before = solid.weight.clone()
    solid = evaluate.use_channels_last(solid)
    assert solid.weight.is_contiguous(memory_format=torch.channels_last_3d)
    assert torch.equal(solid.weight, before)


# ---- --video


@pytest.fixture
def run(lab, tmp_path, monkeypatch, capfd):
    """run(*arguments) -> (exit status, lines on stdout, lines on stderr) of evaluate.py, as if it
    lay beside tiny.py. The working folder is tmp_path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "__file__", str(lab.folder / "evaluate.py"))
    monkeypatch.setitem(sys.modules, "tiny", lab.tiny)

    def run(*arguments):
        capfd.readouterr()
        status = call("evaluate", *arguments)
        captured = capfd.readouterr()
        return status, captured.out.splitlines(), captured.err.splitlines()

    return run


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A folder of two whole videos, one that was cut short and one that is none."""
    folder = tmp_path_factory.mktemp("clips")

    def make(name, size, *options):
        source = f"testsrc2=size={size}:rate=30:duration=1"
        command = ["ffmpeg", "-v", "error", "-f", "lavfi", "-i", source, "-c:v", "mpeg4", *options]
        subprocess.run([*command, name], cwd=folder, check=True)

    make("landscape.mp4", "64x48")
    make("portrait.mp4", "48x64")
    make("cut.mp4", "64x48", "-g", "1", "-movflags", "+faststart")
    content = (folder / "cut.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(content[: len(content) // 2])
    (folder / "text.mp4").write_text("this is no video\n")
    return folder


@needs_ffmpeg
def test_a_video_has_the_pixels_that_extraction_stores(lab, clips, tmp_path):
    data.extract(clips, tmp_path, "all", workers=1)
    stored = {video.path: video.frames for video in data.read_list(tmp_path / "all.txt")}
    assert stored["landscape"] == stored["portrait"] == 30

    protocol = evaluate.make_protocol(lab.recipe, "multiscale")
    for name in ("landscape", "portrait", "cut"):
        seen = []

        def score(views):
            seen.append(views)
            return np.zeros(10)

        args = SimpleNamespace(video=[clips / f"{name}.mp4"], picture=None, json=True, top=5)
        evaluate.label_videos(args, score, lab.recipe, protocol, data.TOY_CATEGORIES)
        read = functools.partial(data.read_frames, tmp_path / "frames" / name)
        expected = evaluate.test_views(read, stored[name], name, lab.recipe, protocol)
        assert all(torch.equal(*pair) for pair in zip(seen[0], expected))


@needs_ffmpeg
def test_a_video_gets_its_likeliest_labels_first(lab, run, clips):
    files = [clips / "landscape.mp4", clips / "portrait.mp4"]
    status, lines, err = run("--checkpoint", lab.checkpoint, "--top", 3, "--video", *files)
    assert status == 0 and err == []
    assert len(lines) == 2 * (1 + 3)
    for first, file in ((0, files[0]), (4, files[1])):
        assert lines[first] == str(file)
        labels = []
        for line in lines[first + 1 : first + 4]:
            percent, name = re.fullmatch(r" *(\d+\.\d\d) %  (.+)", line).groups()
            assert name in data.TOY_CATEGORIES
            labels.append(float(percent))
        assert labels == sorted(labels, reverse=True)


@needs_ffmpeg
@pytest.mark.parametrize("protocol_name", ["clip", "multiscale"])
def test_json_holds_the_scores_that_a_list_would_get(lab, run, clips, protocol_name):
    """The videos are extracted into a data folder and scored as a list."""
    data.extract(clips, "DATA", "all", workers=1)
    data.write_lines(Path("DATA", "categories.txt"), data.TOY_CATEGORIES)
    flags = ["--checkpoint", lab.checkpoint, "--protocol", protocol_name, "--workers", 0]
    assert run(*flags, "--data", "DATA", "--split", "all", "--out", "scores.npz")[0] == 0
    with np.load("scores.npz") as file:
        expected = dict(zip(file["paths"].tolist(), file["scores"]))

    files = [str(clips / "landscape.mp4"), str(clips / "portrait.mp4")]
    _, lines, _ = run(*flags, "--json", "--top", 10, "--video", *files)
    results = json.loads("\n".join(lines))
    assert [result["video"] for result in results] == files
    for name, result in zip(("landscape", "portrait"), results):
        scores = [result["labels"][category] for category in data.TOY_CATEGORIES]
        np.testing.assert_allclose(scores, expected[name], rtol=0, atol=1e-5)
        assert list(result["labels"].values()) == sorted(scores, reverse=True)


@needs_ffmpeg
def test_a_file_that_cannot_be_read_does_not_stop_the_others(lab, run, clips):
    names = ["text.mp4", "landscape.mp4", "none.mp4", "cut.mp4"]
    files = [str(clips / name) for name in names]
    status, lines, err = run("--checkpoint", lab.checkpoint, "--top", 1, "--video", *files)
    assert status == 2
    assert [line for line in lines if line in files] == [files[1], files[3]]
    assert len(err) == 3  # what can be decoded of the cut one is labelled, with a message
    assert err[0].startswith(f"{files[0]}: 0 frames; ffmpeg: ")
    assert err[1].startswith(f"{files[2]}: 0 frames; ffmpeg: ")
    assert re.match(rf"{re.escape(files[3])}: [1-9]\d* frames; ffmpeg: ", err[2])


@pytest.mark.parametrize("width, height, expected", [(64, 48, 171), (48, 64, 96)])
def test_a_picture_keeps_the_shape_of_the_frames(width, height, expected):
    """Every frame is drawn 128 pixels high, eight in a row, 4 pixels apart."""
    frames = torch.randint(256, (10, height, width, 3), dtype=torch.uint8)
    picture = evaluate.draw_labels(frames, {"one": 1.0})
    assert picture.size == (8 * (expected + 4), 2 * (128 + 4) + 8 + 24 + 8)
    for i in (0, 7, 8):
        x = i % 8 * (expected + 4)
        y = i // 8 * (128 + 4)
        drawn = picture.crop((x, y, x + expected, y + 128))
        image = Image.fromarray(frames[i].numpy()).resize((expected, 128))
        assert drawn.tobytes() == image.tobytes()


def test_the_bars_of_a_picture_are_as_long_as_the_probabilities():
    frames = torch.zeros(8, 48, 64, 3, dtype=torch.uint8)
    picture = evaluate.draw_labels(frames, {"three quarters": 0.75, "nothing": 0.0})
    blue = []
    for y in (128 + 4 + 8 + 12, 128 + 4 + 8 + 24 + 12):  # the middles of two bars
        row = [picture.getpixel((x, y)) for x in range(picture.width)]
        grey = row.count((0xEE, 0xEE, 0xEE))
        blue.append(row.count((0x4A, 0x86, 0xC8)) / (row.count((0x4A, 0x86, 0xC8)) + grey))
    assert blue == [pytest.approx(0.75, abs=0.01), pytest.approx(0, abs=0.01)]


@needs_ffmpeg
def test_a_picture_shows_the_frames_of_the_middle_clip(lab, run, clips):
    """Four frames of the landscape video above its one label, then the portrait video's."""
    files = [clips / "landscape.mp4", clips / "portrait.mp4"]
    status, _, _ = run("--checkpoint", lab.checkpoint, "--picture", "out.png", "--top", 1,
                       "--video", *files)
    picture = Image.open("out.png")
    assert status == 0
    assert picture.format == "PNG" and picture.height == 2 * (128 + 4 + 8 + 24 + 8)

    os.mkdir("frames")
    data.decode_video(files[0], "frames")
    frames = data.read_frames("frames", [3, 11, 18, 26])  # the middles of four parts of 30
    for i in range(4):
        expected = Image.fromarray(frames[i].numpy()).resize((171, 128))
        drawn = picture.crop((175 * i, 0, 175 * i + 171, 128))
        assert drawn.tobytes() == expected.tobytes()


@needs_ffmpeg
def test_class_names_come_from_the_data_folder_if_the_weights_have_none(lab, run, clips):
    torch.save({"model": lab.model.state_dict()}, "PUBLIC.pth")
    flags = ["--model", "tiny", "--weights", "PUBLIC.pth", "--recipe", "toy", "--json"]
    labels = []
    for more in ([], ["--data", lab.toy]):
        _, lines, _ = run(*flags, *more, "--video", clips / "landscape.mp4")
        labels.append(json.loads("\n".join(lines))[0]["labels"])
    numbers, names = labels
    assert [data.TOY_CATEGORIES[int(name.removeprefix("class "))] for name in numbers] == list(names)
    assert list(numbers.values()) == list(names.values())


@needs_ffmpeg
def test_only_the_first_process_labels(lab, run, clips, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    flags = ["--checkpoint", lab.checkpoint, "--picture", "out.png"]
    assert run(*flags, "--video", clips / "landscape.mp4", "none.mp4") == (0, [], [])
    assert not os.path.exists("out.png")


# ---- the script


def scored(lab, run, *flags):
    """Score seven.txt by the script -> (scores, meta)."""
    status, _, err = run("--checkpoint", lab.checkpoint, "--data", lab.toy, "--split", "seven",
                         "--workers", 0, "--out", "scores.npz", *flags)
    assert status == 0, err
    with np.load("scores.npz") as file:
        return file["scores"], json.loads(str(file["meta"]))


@pytest.mark.parametrize("flags, name, changed", [
    ("", "clip", {}),
    ("--protocol dense", "dense", {}),
    ("--clips 2", "multiscale", {"clips": 2}),
    ("--clips 2 --protocol dense", "dense", {"clips": 2}),
    ("--scales 36 38 44", "multiscale", {"scales": [36, 38, 44]}),
    ("--crops 1", "multiscale", {"crops": "1"}),
    ("--test-resize 40 --test-crop 24", "clip", {"test_resize": 40, "test_crop": 24}),
    ("--std 0.2 0.3 0.4 --sampling clip --stride 5", "clip",
     {"std": [0.2, 0.3, 0.4], "sampling": "clip", "stride": 5}),
])
def test_flags_choose_the_protocol(lab, run, flags, name, changed):
    """Any of --clips, --crops and --scales alone asks for the fullest protocol."""
    scores, meta = scored(lab, run, *flags.split())
    recipe = {**lab.recipe, **changed}
    protocol = evaluate.make_protocol(recipe, name)
    assert meta["protocol"] == json.loads(json.dumps({**protocol, "average": "prob"}))
    assert meta["recipe"] == json.loads(json.dumps(recipe))
    np.testing.assert_allclose(scores, one_view_at_a_time(lab, recipe, protocol), rtol=0, atol=1e-5)


def test_the_average_is_a_flag(lab, run):
    scores, meta = scored(lab, run, "--protocol", "multiscale", "--average", "logit")
    protocol = evaluate.make_protocol(lab.recipe, "multiscale")
    expected = one_view_at_a_time(lab, lab.recipe, protocol, "logit")
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-5)
    assert meta["protocol"]["average"] == "logit"


def test_random_crops_do_not_depend_on_the_batch(lab, run):
    first, meta = scored(lab, run, "--crops", "random", "--batch", 1)
    second, _ = scored(lab, run, "--crops", "random", "--batch", 7)
    np.testing.assert_allclose(first, second, rtol=0, atol=1e-5)
    assert (meta["protocol"]["name"], meta["protocol"]["crops"]) == ("multiscale", "random")
    fixed, _ = scored(lab, run, "--crops", "3")
    assert abs(first - fixed).max() > 1e-3


def test_a_score_file_says_where_it_comes_from(lab, run):
    status, lines, err = run("--checkpoint", lab.checkpoint, "--data", lab.toy, "--split", "seven",
                             "--workers", 0, "--out", "scores.npz")
    with np.load("scores.npz") as file:
        scores = file["scores"]
        labels = file["labels"]
        paths = file["paths"].tolist()
        meta = json.loads(str(file["meta"]))
    videos = data.read_list(lab.toy / "seven.txt")
    assert paths == [video.path for video in videos]
    for row, video in enumerate(videos):
        assert np.flatnonzero(labels[row]).tolist() == sorted(video.labels)

    expected_map = evaluate.sample_map(scores, labels)
    assert meta == {
        "model": "tiny", "recipe": json.loads(json.dumps(lab.recipe)),
        "checkpoint": str(lab.checkpoint), "iteration": 12, "list": str(lab.toy / "seven.txt"),
        "classes": 10, "categories": data.TOY_CATEGORIES,
        "protocol": {"name": "clip", "clips": 1, "crops": "1", "sizes": [[36, 32]],
                     "average": "prob"},
        "left_out": 0, "map": expected_map}
    assert status == 0
    assert lines[0] == data.VideoList(lab.toy, "seven", lab.recipe, train=False).describe()
    assert lines[-1] == f"mAP {100 * expected_map:.2f}"
    assert err[-1].startswith("videos 7/7, ")


def test_a_list_without_labels_gets_scores(lab, run):
    status, lines, _ = run("--checkpoint", lab.checkpoint, "--data", lab.toy, "--split", "test",
                           "--workers", 0, "--out", "scores.npz")
    assert status == 0
    assert lines[-1] == "the list has no labels: scores, but no mAP"
    with np.load("scores.npz") as file:
        assert "labels" not in file
        assert file["scores"].shape == (3, 10)
        assert json.loads(str(file["meta"]))["map"] is None


def test_videos_without_frames_are_left_out_and_counted(lab, run):
    seven = (lab.toy / "seven.txt").read_text()
    (lab.toy / "gaps.txt").write_text(f"val/none 0 1\n{seven}val/nothing 0 2\n")
    flags = ["--checkpoint", lab.checkpoint, "--data", lab.toy, "--workers", 0]
    _, whole, _ = run(*flags, "--split", "seven")
    status, lines, _ = run(*flags, "--split", "gaps")
    assert status == 0
    assert "7 videos" in lines[0] and "2 lines of videos without frames left out" in lines[0]
    assert lines[1:] == whole[1:]


@pytest.mark.parametrize("flags, expected", [
    ("", 16),                                   # one view each
    ("--protocol dense", 1),                    # 9 views each: 3 clips, 3 crops
    ("--protocol dense --view-batch 40", 4),
    ("--protocol multiscale", 1),               # 18 views each: more than 16
    ("--batch 7 --protocol multiscale", 7),
])
def test_as_many_videos_are_loaded_as_one_pass_holds(lab, run, monkeypatch, flags, expected):
    batches = []

    def predict(model, videos, num_classes, recipe, device, batch, *others, **options):
        batches.append(batch)
        return np.zeros((len(videos), num_classes), np.float32)

    monkeypatch.setattr(evaluate, "predict", predict)
    run("--checkpoint", lab.checkpoint, "--data", lab.toy, *flags.split())
    assert batches == [expected]


def test_a_network_trained_by_cross_entropy_is_scored_by_softmax(lab, run, clips):
    """As after pre-training on Kinetics: the classes exclude each other, so they sum to 1."""
    checkpoint = evaluate.read_checkpoint(lab.checkpoint)
    checkpoint["config"]["recipe"]["loss"] = "ce"
    torch.save(checkpoint, "ce.pt")
    torch.save({"model": lab.model.state_dict()}, "PUBLIC.pth")
    public = ["--model", "tiny", "--weights", "PUBLIC.pth", "--recipe", "toy"]
    flags = ["--data", lab.toy, "--split", "seven", "--workers", 0, "--out", "scores.npz"]

    sums = []
    for network in (["--checkpoint", "ce.pt"], [*public, "--loss", "ce"], public):
        assert run(*network, *flags)[0] == 0
        with np.load("scores.npz") as file:
            sums.append(file["scores"].sum(axis=1))
    np.testing.assert_allclose(sums[0], 1, rtol=0, atol=1e-5)
    np.testing.assert_allclose(sums[1], 1, rtol=0, atol=1e-5)
    assert abs(sums[2] - 1).min() > 0.1

    _, lines, _ = run("--checkpoint", "ce.pt", "--json", "--top", 10, "--video",
                      clips / "landscape.mp4")
    labels = json.loads("\n".join(lines))[0]["labels"]
    assert sum(labels.values()) == pytest.approx(1, abs=1e-5)


def test_other_peoples_weights_score_as_our_checkpoint_does(lab, run):
    torch.save({"model": lab.model.state_dict()}, "PUBLIC.pth")
    flags = ["--data", lab.toy, "--split", "seven", "--workers", 0]
    ours = run("--checkpoint", lab.checkpoint, *flags)
    public = run("--model", "tiny", "--weights", "PUBLIC.pth", "--recipe", "toy", *flags)
    assert ours[0] == public[0] == 0
    assert ours[1] == public[1]

    status, _, err = run("--model", "tiny", "--weights", "PUBLIC.pth", *flags, "--frames", 8)
    assert status == 2
    assert "fc.weight is (10, 32) in the file, (10, 64) in the network" in err[-1]
    status, _, err = run("--checkpoint", "PUBLIC.pth", *flags)
    assert status == 2
    assert err == ["evaluate.py: PUBLIC.pth: not a checkpoint of train.py; for other people's "
                   "files: --model NAME --weights PUBLIC.pth"]


def data_folder(name, categories, lab):
    """Another categories.txt over the lists and frames of the toy."""
    os.mkdir(name)
    for entry in ("frames", "seven.txt"):
        os.symlink(lab.toy / entry, os.path.join(name, entry))
    with open(os.path.join(name, "categories.txt"), "w") as file:
        file.write("\n".join(categories))
    return name


def test_classes_are_compared_by_their_names(lab, run):
    """The same names in another order would score the wrong columns."""
    swapped = [*data.TOY_CATEGORIES[:2], *data.TOY_CATEGORIES[3:1:-1], *data.TOY_CATEGORIES[4:]]
    data_folder("swapped", swapped, lab)
    data_folder("eleven", [*data.TOY_CATEGORIES, "another"], lab)
    torch.save({"model": lab.model.state_dict()}, "PUBLIC.pth")
    ours = ["--checkpoint", lab.checkpoint]
    public = ["--model", "tiny", "--weights", "PUBLIC.pth", "--recipe", "toy"]

    status, _, err = run(*ours, "--data", "swapped", "--split", "seven")
    assert status == 2
    assert err == [f"evaluate.py: class 2 is 'moving+down' in {lab.checkpoint}, but 'moving+up' in "
                   "swapped/categories.txt: both must name the same classes in one order"]
    status, _, err = run(*ours, "--data", "eleven", "--split", "seven")
    assert status == 2
    assert err == [f"evaluate.py: {lab.checkpoint} names 10 classes, eleven/categories.txt 11"]

    # Other people's files hold no names: their number is all that can be compared.
    assert run(*public, "--data", "swapped", "--split", "seven", "--workers", 0)[0] == 0
    status, _, err = run(*public, "--data", "eleven", "--split", "seven")
    assert status == 2
    assert err == ["evaluate.py: PUBLIC.pth knows 10 classes, eleven/categories.txt names 11"]


def test_a_key_that_is_younger_than_the_checkpoint_has_the_rows_value(lab, run):
    expected, _ = scored(lab, run)
    checkpoint = evaluate.read_checkpoint(lab.checkpoint)
    del checkpoint["config"]["recipe"]["stride"]
    torch.save(checkpoint, "old.pt")
    scores, _ = scored(lab, run, "--checkpoint", "old.pt")
    np.testing.assert_array_equal(scores, expected)


def test_the_toy_is_drawn_where_no_data_is_named(lab, run, monkeypatch):
    drawn = []

    def draw_toy(out):
        drawn.append(str(out))
        shutil.copytree(lab.toy, out)

    monkeypatch.setattr(data, "draw_toy", draw_toy)
    flags = ["--checkpoint", lab.checkpoint, "--workers", 0]
    first = run(*flags)
    again = run(*flags)
    named = run(*flags, "--data", lab.toy)
    assert first[0] == 0
    assert first[1] == again[1]
    assert first[1][1:] == named[1][1:]
    assert drawn == [os.path.join("runs", "toy")]


def test_speed_flags_change_scores_little(lab, run, monkeypatch):
    expected, _ = scored(lab, run, "--protocol", "multiscale")
    for amp, tolerance in (("bf16", 0.1), ("fp16", 0.02)):
        scores, _ = scored(lab, run, "--protocol", "multiscale", "--amp", amp)
        assert 0 < abs(scores - expected).max() < tolerance
    scores, _ = scored(lab, run, "--protocol", "multiscale", "--channels-last")
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-5)

    # whether it is called; compiling would take a minute
    compiled = []

    def compile(model):
        compiled.append(type(model).__name__)
        return model

    monkeypatch.setattr(torch, "compile", compile)
    scored(lab, run, "--compile")
    assert compiled == ["Tiny"]


def test_two_processes_say_once_what_one_says(lab, run):
    flags = ["--checkpoint", "tiny.pt", "--data", "toy", "--split", "seven", "--workers", 0]
    two = torchrun(2, "evaluate.py", *flags, "--out", "two.npz", cwd=lab.folder)
    assert two.returncode == 0, two.stderr
    os.chdir(lab.folder)
    _, lines, _ = run(*flags, "--out", "one.npz")
    assert two.stdout.splitlines() == lines
    one = np.load("one.npz")
    two = np.load("two.npz")
    assert one["paths"].tolist() == two["paths"].tolist()
    np.testing.assert_allclose(one["scores"], two["scores"], rtol=0, atol=1e-5)


def test_what_training_scored_is_what_it_saved(lab, run):
    """Two processes of train.py validate and save best.pt; evaluate.py finds the same mAP in it.
    Without SyncBN each process has running means of its own, so this could go wrong."""
    result = torchrun(2, "train.py", "--model", "tiny", "--data", "toy", "--epochs", 1,
                      "--workers", 0, cwd=lab.folder)
    assert result.returncode == 0, result.stderr
    best = re.search(r"best val mAP (\d+\.\d\d) \(epoch 1\)", result.stdout.splitlines()[-1])
    status, lines, _ = run("--checkpoint", lab.folder / "runs" / "tiny" / "best.pt",
                           "--data", lab.toy, "--workers", 0)
    assert status == 0
    assert lines[-1] == f"mAP {best[1]}"


@pytest.mark.parametrize("flags, message", [
    ("", "which network? --checkpoint FILE, or --model NAME --weights FILE"),
    ("--model tiny", "which network?"),
    ("--checkpoint CKPT --protocol all", "invalid choice"),
    ("--checkpoint CKPT --fusion-kernel 7", "unrecognized arguments: --fusion-kernel 7"),
    ("--checkpoint CKPT --frames many", "invalid int value"),
    ("--checkpoint CKPT --recipe toy", "a checkpoint of train.py holds its recipe"),
    ("--checkpoint CKPT --video x --picture x.psd", "Pillow writes no such pictures"),
])
def test_wrong_flags(lab, run, flags, message):
    status, lines, err = run(*flags.replace("CKPT", str(lab.checkpoint)).split())
    assert status == 2 and lines == []
    assert message in err[-1]
