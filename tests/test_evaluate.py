"""The metric is scikit-learn's sample-level mAP, ties included. The views of a video are the
report's. The scores are those of a loop that runs one view at a time, whatever the batch and the
number of processes. Other people's files are read, or refused in one line. A video file is labelled
as it would be in a list.

    python -m pytest tests/test_evaluate.py

The tests follow evaluate.py from top to bottom. A network of two layers (TINY in conftest.py)
stands for the five model files. Other bad input is in test_bad_input.py.

tests/golden/metrics.npz holds the answers of scikit-learn and of two other programs: X-Temporal,
the code of the challenge's winners, and mmaction2, a collection of networks by OpenMMLab.
"""
import argparse
import copy
import functools
import json
import os
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
import tin
import train
from conftest import ROOT, TINY, call, close, fill, scripts_with_tiny, torchrun

CPU = torch.device("cpu")
METRICS = dict(np.load(ROOT / "tests" / "golden" / "metrics.npz"))
needs_ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None and os.environ.get("CI") != "true",
                                  reason="the program ffmpeg is missing")


# ---- the metric ------------------------------------------------------------------------------

def precision_of(scores, labels):
    """The average precision of one video."""
    return evaluate.average_precision([scores], [labels])[0]


def test_average_precision_of_three_classes():
    """Classes 0 and 2 are the labels, and the scores rank the classes 0, 1, 2.

    Down to class 0, one class of one is a label; down to class 2, two of three are. AP is the mean
    of these two fractions.
    """
    assert precision_of([0.9, 0.5, 0.1], [1, 0, 1]) == (1 / 1 + 2 / 3) / 2


def test_a_class_that_ties_with_a_label_counts_as_ranked_above_it():
    """Class 0, the label, and class 1 have equal scores. If class 1 is no label, this costs half
    the precision: of the two classes down to here, one is a label. If class 1 is a label too, it
    costs nothing: both are."""
    assert precision_of([0.5, 0.5, 0.1], [1, 0, 0]) == 1 / 2
    assert precision_of([0.5, 0.5, 0.1], [1, 1, 0]) == (2 / 2 + 2 / 2) / 2


def test_average_precision_at_the_edges():
    # all four classes tie, and one is the label
    assert precision_of([1, 1, 1, 1], [0, 0, 1, 0]) == 1 / 4

    # no label: 0, as scikit-learn has it
    assert precision_of([4, 3, 2, 1], [0, 0, 0, 0]) == 0

    # every class is a label: no ranking is wrong
    assert precision_of([4, 3, 2, 1], [1, 1, 1, 1]) == 1

    # infinite scores rank as others do
    assert precision_of([-np.inf, 0, np.inf], [0, 0, 1]) == 1

    # scores are compared as they are stored: in float32 these two would be equal and tie
    assert precision_of([1 + 1e-12, 1], [1, 0]) == 1


def looped_precision(scores, labels):
    """AP of one video by its definition: a loop over its labels, and loops over the classes."""
    positives = [k for k in range(len(labels)) if labels[k]]
    if not positives:
        return 0.0
    total = 0.0
    for u in positives:
        labels_ahead = sum(scores[p] >= scores[u] for p in positives)
        classes_ahead = sum(score >= scores[u] for score in scores)
        total += labels_ahead / classes_ahead
    return total / len(positives)


@pytest.mark.parametrize("levels", [3, 10**9])
def test_average_precision_equals_the_loop(levels):
    """With three different scores nearly all of them tie, with 10^9 none."""
    rng = np.random.default_rng(levels)
    scores = rng.integers(levels, size=(40, 11)) / levels
    labels = rng.random((40, 11)) < rng.random((40, 1))
    labels[0] = False  # a video without labels
    labels[1] = True   # a video to which every class belongs
    expected = [looped_precision(scores[i], labels[i]) for i in range(40)]
    close(evaluate.average_precision(scores, labels), np.array(expected), 1e-12)


@pytest.mark.parametrize("case", range(int(METRICS["n"])))
def test_the_metric_is_that_of_scikit_learn_and_of_the_winners_code(case):
    """mmaction2's is the same, except for a video without labels, which has NaN there."""
    scores = METRICS[f"scores_{case}"]
    labels = METRICS[f"labels_{case}"]
    ours = evaluate.average_precision(scores, labels)
    close(ours, METRICS[f"sklearn_rows_{case}"], 1e-12)
    labelled = labels.any(axis=1)
    if labelled.any():
        close(ours[labelled], METRICS[f"mmaction2_rows_{case}"][labelled], 1e-12)

    whole = evaluate.sample_map(scores, labels)
    assert whole == pytest.approx(METRICS[f"sklearn_{case}"], rel=0, abs=1e-12)
    assert whole == pytest.approx(METRICS[f"xtemporal_{case}"], rel=0, abs=1e-12)


@pytest.mark.parametrize("scores, labels, message", [
    ([[0.5, np.nan]], [[1, 0]], "not a number"),
    ([[0.5, 0.1]], [[2, 0]], "0 or 1"),
    ([[0.5, 0.1]], [[1, 0, 0]], r"\(1, 2\) .* \(1, 3\)"),
    ([0.5, 0.1], [1, 0], r"\(2,\) .* \(2,\)"),
])
def test_the_metric_refuses(scores, labels, message):
    with pytest.raises(ValueError, match=message):
        evaluate.sample_map(scores, labels)


def test_hit_rates_by_hand():
    """One label for each of four videos: the likeliest class is it twice, one of the five likeliest
    three times."""
    scores = np.array([[7, 6, 5, 4, 3, 2, 1]] * 3 + [[1, 1, 1, 1, 1, 1, 1]])
    labels = np.zeros((4, 7), int)
    labels[0, 0] = 1  # the likeliest class
    labels[1, 1] = 1  # the second
    labels[2, 5] = 1  # the sixth: too late for the five likeliest
    labels[3, 0] = 1  # one of seven equals, of which the lower number comes first
    assert evaluate.hit_rates(scores, labels) == (2 / 4, 3 / 4)


def test_the_printed_figures_by_hand(capsys):
    """Rows are videos. The label of the first is ranked first, AP 1; that of the second is ranked
    second, AP 1/2; the third has none, AP 0.

    Columns are classes, each of which ranks the three videos. Class 0 belongs to the first video,
    which has its highest score: AP 1. Class 1 belongs to the second video, which has its lowest
    score: AP 1/3. Class 2 belongs to no video and does not count.
    """
    scores = np.array([[0.9, 0.6, 0.0], [0.8, 0.5, 0.0], [0.1, 0.7, 0.3]])
    labels = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 0]])
    evaluate.print_metrics(scores, labels)
    first, second, last = capsys.readouterr().out.splitlines()
    assert "1 of 3 videos" in first
    assert "mAP of the others 75.00" in first  # (1 + 1/2) / 2
    assert second == "class-level mAP 66.67, top-1 hit rate 50.00, top-5 100.00"
    assert last == "mAP 50.00"  # (1 + 1/2 + 0) / 3


# ---- the views of a video --------------------------------------------------------------------

@pytest.mark.parametrize("model, row, one_view, clips, sides", [
    ("tin", "r50_8f", (256, 224), 5, [256]),
    ("slowfast", "r101_8x8", (128, 112), 10, [128, 144, 160]),
])
def test_protocols_are_the_reports(model, row, one_view, clips, sides):
    """A size is (short side of the frame, side of the crop). In dense views both are equal: three
    crops along the long side then cover the whole frame."""
    _, recipe = evaluate.open_model(model, row)
    clip = evaluate.make_protocol(recipe)
    dense = evaluate.make_protocol(recipe, "dense")
    multiscale = evaluate.make_protocol(recipe, "multiscale")
    sizes = [(side, side) for side in sides]
    assert clip == {"name": "clip", "clips": 1, "crops": "1", "sizes": [one_view]}
    assert dense == {"name": "dense", "clips": clips, "crops": "3", "sizes": sizes[:1]}
    assert multiscale == {**dense, "name": "multiscale", "sizes": sizes}

    assert evaluate.count_views(clip) == 1
    assert evaluate.count_views({**multiscale, "crops": "random"}) == clips * 3 * len(sides)


@pytest.mark.parametrize("right, down, crops, places", [
    (84, 0, "3", [(0, 0), (84, 0), (42, 0)]),  # left, right, centre
    (0, 84, "3", [(0, 0), (0, 84), (0, 42)]),  # portrait: top, bottom, centre
    (116, 32, "3", [(0, 16), (116, 16), (58, 16)]),
    (59, 57, "1", [(30, 28)]),  # 29.5 and 28.5 become even, as in Python and torchvision
])
def test_places_of_the_crops(right, down, crops, places):
    """Of 340x256 pixels, a crop of 256 leaves 84 to its right and 0 below it, and so on."""
    assert evaluate.crop_places(right, down, crops, rng=None) == places


def test_random_crops_reach_every_place():
    rng = np.random.default_rng(0)
    reached = set()
    for _ in range(100):
        places = evaluate.crop_places(2, 1, "random", rng)
        assert len(places) == 3
        reached.update(places)
    assert reached == {(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1)}


class Frames:
    """A video of 20x16 pixels that say where they are: red is the frame's index, green x, blue y.
    """

    def __init__(self):
        self.asked_for = []

    def __call__(self, indices):
        self.asked_for.append(list(indices))
        video = torch.zeros(len(indices), 16, 20, 3, dtype=torch.uint8)
        video[..., 0] = torch.tensor(indices)[:, None, None]
        video[..., 1] = torch.arange(20)
        video[..., 2] = torch.arange(16)[:, None]
        return video


def views_of(read, num_frames, protocol, name="a name", **recipe):
    """All views of a video of Frames, which the scale 16 does not resize."""
    recipe = {"stride": 1, "crops": "3", "scales": (16,), **recipe}
    protocol = evaluate.make_protocol(recipe, protocol)
    return evaluate.test_views(read, num_frames, name, recipe, protocol)


def described(views):
    """Views of Frames, (V, T, h, w, 3) -> [(frame indices, x, y of the top left corner), ...]."""
    result = []
    for view in views:
        _, x, y = view[0, 0, 0].tolist()
        result.append((view[:, 0, 0, 0].tolist(), x, y))
    return result


def test_the_views_of_a_video_of_forty_frames():
    """Two clips of four frames, three crops of each, two scales. The first clip is the middles of
    four equal parts, the second takes a random frame of each part."""
    views = views_of(Frames(), 40, "multiscale", sampling="segments", frames=4, clips=2,
                     scales=(16, 12))
    assert [tuple(view.shape) for view in views] == [(6, 4, 16, 16, 3), (6, 4, 12, 12, 3)]
    assert views[0].dtype == views[1].dtype == torch.uint8

    rng = np.random.default_rng(zlib.crc32(b"a name"))
    random_clip = ((np.arange(4) + rng.random(4)) * 10).astype(int).tolist()
    expected = []
    for clip in ([5, 15, 25, 35], random_clip):
        for x in (0, 4, 2):
            expected.append((clip, x, 0))
    assert described(views[0]) == expected
    # in the smaller scale too; a frame is red all over, so any pixel tells its index
    assert views[1][:, :, 6, 6, 0].tolist() == [clip for clip, x, y in expected]


def test_ten_clips_are_spread_over_a_video_of_three_seconds():
    """A clip of SlowFast 8x8, 32 frames that are 2 apart, takes 64 of the 90 frames, so the last
    clip starts at frame 26. Frames that several clips share are decoded once."""
    video = Frames()
    [views] = views_of(video, 90, "dense", sampling="clip", frames=32, stride=2, clips=10)
    expected = []
    decoded = set()
    for start in [0, 2, 5, 8, 11, 14, 17, 20, 23, 26]:
        clip = list(range(start, start + 64, 2))
        decoded.update(clip)
        for x in (0, 4, 2):
            expected.append((clip, x, 0))
    assert described(views) == expected
    assert video.asked_for == [sorted(decoded)]


def test_randomness_belongs_to_the_videos_name():
    def views(name, seed):
        np.random.seed(seed)
        torch.manual_seed(seed)
        [views] = views_of(Frames(), 200, "dense", name, sampling="segments", frames=8, clips=5,
                           crops="random")
        return described(views)

    first = views("a", seed=0)
    assert views("a", seed=1) == first
    assert views("b", seed=0) != first


# ---- scores ----------------------------------------------------------------------------------

def corner(clip):
    """A network of two classes: its logits are the red and the green of a clip's first pixel."""
    return clip[:, 0, :2, 0, 0]


# With this mean and std a normalised pixel is what it was before, 0 to 255.
PLAIN = dict(mean=(0, 0, 0), std=(1 / 255, 1 / 255, 1 / 255), loss="bce")


def one_pixel_views(*logits):
    """Views of one video for corner, with these logits: uint8 (1, V, 1, 1, 1, 3)."""
    pixels = [(red, green, 0) for red, green in logits]
    return torch.tensor(pixels, dtype=torch.uint8).view(1, len(logits), 1, 1, 1, 3)


@pytest.mark.parametrize("loss, average, expected", [
    # sigmoid(2) = .8808 and sigmoid(0) = .5; sigmoid(1), of the mean logit, = .7311
    ("bce", "prob", [0.5, 0.6904]),
    ("bce", "logit", [0.5, 0.7311]),
    # softmax(0, 2) = (.1192, .8808) and softmax(0, 0) = (.5, .5); softmax(0, 1) = (.2689, .7311)
    ("ce", "prob", [0.3096, 0.6904]),
    ("ce", "logit", [0.2689, 0.7311]),
])
def test_two_views_by_hand(loss, average, expected):
    """One view has the logits (0, 2), the other (0, 0), in one scale or in two. After training by
    cross-entropy (ce) the classes exclude each other: their probabilities sum to 1."""
    recipe = {**PLAIN, "loss": loss}
    one_scale = [one_pixel_views((0, 2), (0, 0))]
    two_scales = [one_pixel_views((0, 2)), one_pixel_views((0, 0))]
    for views in (one_scale, two_scales):
        scores = evaluate.score_views(corner, views, recipe, CPU, average=average)
        assert scores.tolist() == [pytest.approx(expected, abs=1e-4)]


def test_half_precision_logits_do_not_tie():
    """In half precision sigmoid(9) and sigmoid(12) are both 1, a tie for the metric."""
    def half_corner(clip):
        return corner(clip).bfloat16()

    scores = evaluate.score_views(half_corner, [one_pixel_views((9, 12))], PLAIN, CPU)
    assert torch.equal(scores, torch.tensor([[9.0, 12.0]]).sigmoid())
    assert scores[0, 0] < scores[0, 1] < 1


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A folder with the scripts, tiny.py, toy videos and a checkpoint of the tiny network.

    .folder .toy .checkpoint     paths
    .tiny .model .recipe         its module, its network, its recipe
    """
    folder = scripts_with_tiny(tmp_path_factory.mktemp("lab"))
    tiny = ModuleType("tiny")
    exec(TINY, tiny.__dict__)

    # lists of the toy: seven videos, two, and unlabelled ones
    toy = folder / "toy"
    data.draw_toy(toy, videos=32)
    lines = (toy / "val.txt").read_text().splitlines()
    data.write_lines(toy / "seven.txt", lines[6::-1])  # not in the order of the paths
    data.write_lines(toy / "two.txt", lines[:2])
    data.write_lines(toy / "test.txt", [f"{line.split()[0]} 24 -1" for line in lines[:3]])

    # the recipe of a run: --clips 3 --scales 36 40
    recipe = {"loss": "bce", **data.RECIPE, **evaluate.RECIPE, **data.TOY}
    recipe = evaluate.override(recipe, tiny.RECIPES["toy"])
    recipe["clips"] = 3
    recipe["scales"] = [36, 40]
    recipe = json.loads(json.dumps(recipe))  # lists for tuples, as in a score file

    model = fill(tiny.build(recipe, 10)).eval()
    with torch.no_grad():
        model.fc.weight *= 20  # so that the averages of probabilities and of logits differ
    config = {"model": "tiny", "recipe": recipe, "categories": data.TOY_CATEGORIES}
    checkpoint = {"model": model.state_dict(), "config": config, "iteration": 12}
    torch.save(checkpoint, folder / "tiny.pt")
    return SimpleNamespace(folder=folder, toy=toy, checkpoint=folder / "tiny.pt", tiny=tiny,
                           model=model, recipe=recipe)


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


def scored(lab, run, *flags):
    """Score seven.txt by the script -> (what --out holds, lines on stdout). A flag that is given
    twice counts as it was given last."""
    status, lines, err = run("--checkpoint", lab.checkpoint, "--data", lab.toy, "--split", "seven",
                             "--workers", 0, "--out", "scores.npz", *flags)
    assert status == 0, err
    file = dict(np.load("scores.npz"))
    file["meta"] = json.loads(str(file["meta"]))
    return file, lines


@torch.no_grad()
def one_view_at_a_time(lab, recipe, protocol, average):
    """The scores of seven.txt by definition: every view is loaded, resized, cut, normalised and run
    by itself; the last step is the average."""
    length = recipe["frames"]
    stride = recipe["stride"]
    scores = []
    for video in data.read_list(lab.toy / "seven.txt"):
        # frame indices of each clip
        clips = []
        if recipe["sampling"] == "segments":
            rng = np.random.default_rng(zlib.crc32(video.path.encode()))
            clips.append(data.segment_indices(video.frames, length))
            while len(clips) < protocol["clips"]:
                clips.append(data.segment_indices(video.frames, length, rng))
        else:
            for start in data.clip_starts(video.frames, length, stride, protocol["clips"]):
                clips.append(data.clip_indices(video.frames, length, stride, start))

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
                frames = data.read_frames(lab.toy / "frames" / video.path, clip)
                frames = data.resize(frames, (width, short))
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


@pytest.mark.parametrize("flags, name, average, changed", [
    ("--test-resize 40 --test-crop 24", "clip", "prob", {"test_resize": 40, "test_crop": 24}),
    ("--clips 2 --protocol dense", "dense", "prob", {"clips": 2}),

    # without --protocol, one of --clips, --crops and --scales asks for all views
    ("--clips 2", "multiscale", "prob", {"clips": 2}),
    ("--crops 1 --average logit", "multiscale", "logit", {"crops": "1"}),
    ("--scales 36 38 44 --std 0.2 0.3 0.4 --sampling clip --stride 5", "multiscale", "prob",
     {"scales": [36, 38, 44], "std": [0.2, 0.3, 0.4], "sampling": "clip", "stride": 5}),
])
def test_scores_are_those_of_one_view_at_a_time(lab, run, flags, name, average, changed):
    file, _ = scored(lab, run, *flags.split())
    recipe = {**lab.recipe, **changed}
    protocol = evaluate.make_protocol(recipe, name)
    expected = one_view_at_a_time(lab, recipe, protocol, average)
    np.testing.assert_allclose(file["scores"], expected, rtol=0, atol=1e-5)
    assert abs(expected[0] - expected[1]).max() > 1e-3  # the videos can be told apart

    assert file["meta"]["protocol"]["name"] == name
    assert file["meta"]["protocol"]["average"] == average
    assert file["meta"]["recipe"] == recipe


def video_list(lab, name, split, recipe):
    """The videos of a list, with the views of a protocol."""
    protocol = evaluate.make_protocol(recipe, name)
    views = functools.partial(evaluate.test_views, recipe=recipe, protocol=protocol)
    return data.VideoList(lab.toy, split, recipe, train=False, views=views)


@pytest.mark.parametrize("model", ["tin", "slowfast"])
def test_the_one_view_is_the_clip_that_validation_sees(lab, model):
    _, recipe = evaluate.open_model(model, "toy")
    clips = data.VideoList(lab.toy, "two", recipe, train=False)
    videos = video_list(lab, "clip", "two", recipe)
    for row in range(2):
        number, [views] = videos[row]
        assert number == row
        assert torch.equal(views, clips[row][0][None])


def test_batches_workers_and_the_training_mode_change_nothing(lab):
    """Seven videos of nine views are 63 views at each scale: twelve times five, and three."""
    sizes = []

    def note_size(module, inputs):
        sizes.append(len(inputs[0]))

    model = copy.deepcopy(lab.model)
    model.register_forward_pre_hook(note_size)
    model.train()
    videos = video_list(lab, "multiscale", "seven", lab.recipe)
    ours = evaluate.predict(model, videos, 10, lab.recipe, CPU, batch=7, view_batch=5, workers=2)

    protocol = evaluate.make_protocol(lab.recipe, "multiscale")
    expected = one_view_at_a_time(lab, lab.recipe, protocol, "prob")
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)
    assert sizes == [5] * 12 + [3] + [5] * 12 + [3]
    assert model.training  # as before


JOB = '''
"""Every process predicts, and saves what it gets."""
import functools
import numpy as np
import data
import evaluate
import tiny

rank, world, device = evaluate.start_process("cpu")
checkpoint = evaluate.read_checkpoint("tiny.pt")
recipe = checkpoint["config"]["recipe"]
model, _ = evaluate.load_weights(tiny, recipe, checkpoint, "tiny.pt")
protocol = evaluate.make_protocol(recipe, "multiscale")
views = functools.partial(evaluate.test_views, recipe=recipe, protocol=protocol)
scores = {}
for split in ("seven", "two"):
    videos = data.VideoList("toy", split, recipe, train=False, views=views)
    scores[split] = evaluate.predict(model, videos, 10, recipe, device, batch=1)
np.savez(f"rank{rank}.npz", **scores)
evaluate.end_process()
'''


def test_every_process_gets_the_scores_of_one(lab):
    """Three processes do not divide seven videos; of two videos, the third process gets none. With
    one video a batch they compute what one process does, and the rows are put together bit for bit.
    """
    (lab.folder / "job.py").write_text(JOB)
    result = torchrun(3, "job.py", cwd=lab.folder)
    assert result.returncode == 0, result.stderr
    for split in ("seven", "two"):
        videos = video_list(lab, "multiscale", split, lab.recipe)
        alone = evaluate.predict(lab.model, videos, 10, lab.recipe, CPU, batch=1)
        for rank in range(3):
            scores = np.load(lab.folder / f"rank{rank}.npz")[split]
            np.testing.assert_array_equal(scores, alone)


# ---- networks and their weights --------------------------------------------------------------

def test_a_recipe_is_the_shared_pages_and_a_row():
    module, recipe = evaluate.open_model("tin", "r101_16f")
    assert module is tin
    assert recipe == {"loss": "bce", **data.RECIPE, **evaluate.RECIPE, **tin.RECIPES["r101_16f"]}
    assert evaluate.open_model("tin")[1] == evaluate.open_model("tin", "r50_8f")[1]

    # data.TOY comes before the row: SlowFast's row has views of its own
    _, recipe = evaluate.open_model("tin", "toy")
    assert (recipe["crop"], recipe["clips"], recipe["scales"]) == (32, 5, (32,))
    _, recipe = evaluate.open_model("slowfast", "toy")
    assert (recipe["crop"], recipe["clips"], recipe["scales"]) == (32, 10, (32, 30, 28))


def test_epochs_and_iterations_clear_each_other():
    """A run counts one of the two: SlowFast's rows give iterations, train.RECIPE gives epochs."""
    pages = (data.RECIPE, evaluate.RECIPE, train.RECIPE)
    _, recipe = evaluate.open_model("slowfast", "r101_8x8", pages)
    assert (recipe["iterations"], recipe["epochs"]) == (180000, 0)
    assert evaluate.override({"iterations": 50}, {"epochs": 3}) == {"iterations": 0, "epochs": 3}
    both = {"iterations": 7, "epochs": 3}
    assert evaluate.override({}, both) == both


@pytest.mark.parametrize("value, flag, given", [
    (256, "--test-size 40", 40),
    (0.1, "--test-size 1", 1.0),
    ("3", "--test-size random", "random"),
    (True, "--no-test-size", False),
    ((256,), "--test-size 128 144", [128, 144]),
    ((0.5, 0.5), "--test-size 0.4 0.3 0.2", [0.4, 0.3, 0.2]),
    (None, "--test-size 8", 8),
])
def test_a_recipe_key_is_a_flag_of_its_values_type(value, flag, given):
    parser = argparse.ArgumentParser()
    evaluate.add_recipe_flags(parser, {"test_size": value})
    assert vars(parser.parse_args([])) == {}  # what is not given leaves no trace
    assert vars(parser.parse_args(flag.split())) == {"test_size": given}


@pytest.mark.parametrize("module", [b"numpy._core", b"numpy.core"])  # of NumPy 2 and NumPy 1
def test_numpy_numbers_in_a_checkpoint_are_read(tmp_path, module):
    numbers = {"map": np.float64(0.5), "lr": np.float32(0.25), "epoch": np.int64(3),
               "done": np.bool_(True)}
    content = {"w": torch.arange(6.0), "array": np.arange(3), **numbers}

    # PyTorch's old format is a bare pickle, in which the name of a module can be replaced.
    path = tmp_path / "file.pth"
    torch.save(content, path, _use_new_zipfile_serialization=False)
    written = path.read_bytes()
    assert b"numpy._core" in written
    path.write_bytes(written.replace(b"numpy._core", module))

    found = evaluate.read_checkpoint(path)
    assert {key: found[key] for key in numbers} == numbers
    assert torch.equal(found["w"], torch.arange(6.0))
    assert found["array"].tolist() == [0, 1, 2]


class Attack:
    """An object that writes a file when it is unpickled."""

    def __reduce__(self):
        return np.savetxt, ("touched", [0])


def test_a_file_that_could_run_code_is_refused_and_does_not_run(tmp_path, monkeypatch):
    """Its function is NumPy's, of which only numbers and arrays are allowed."""
    monkeypatch.chdir(tmp_path)
    torch.save({"w": torch.zeros(1), "args": Attack()}, "file.pth")
    with pytest.raises(ValueError, match=r"^file\.pth: .* save the state_dict alone"):
        evaluate.read_checkpoint("file.pth")
    assert os.listdir() == ["file.pth"]


class NewModelFile:
    """It knows no container and no prefix: convert hands back what it gets."""

    @staticmethod
    def convert(checkpoint):
        return checkpoint


@pytest.mark.parametrize("checkpoint", [
    {"epoch": 3, "state_dict": {"net.module.weight": 1}},
    {"epoch": 3, "model": {"module.net.module.weight": 1}},
    {"epoch": 3, "model_state": {"_orig_mod.net.module.weight": 1}},
    {"epoch": 3, "model_state_dict": {"module._orig_mod.net.module.weight": 1}},
    {"model": "tin", "net": {"net.module.weight": 1}},  # a text is no container
    {"net": {"ema": 2}, "model": {"net.module.weight": 1}},
    {"net": {"ema": 2}, "model": {"ema": 2}, "state_dict": {"net.module.weight": 1}},
    {"module.net.module.weight": 1},  # no container at all
])
def test_a_new_model_file_gets_every_container_as_model(checkpoint):
    converted = evaluate.convert(NewModelFile, checkpoint, "file.pth")
    assert converted == {"model": {"net.module.weight": 1}}


def test_the_file_knows_the_number_of_classes(lab):
    one_class = {"model": lab.tiny.build(lab.recipe, 1).state_dict()}
    _, num_classes = evaluate.load_weights(lab.tiny, lab.recipe, one_class, "file.pth")
    assert num_classes == 1


def test_weights_that_do_not_fit_are_named_with_both_shapes(lab):
    state = dict(lab.model.state_dict())
    state["conv.weight"] = torch.zeros(8, 3, 5, 5)
    del state["norm.weight"]
    state["extra"] = torch.zeros(1)
    message = ("file.pth: does not fit the network: "
               "conv.weight is (8, 3, 5, 5) in the file, (8, 3, 3, 3) in the network; "
               "norm.weight is not in the file; extra is not in the network. ")
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        evaluate.load_weights(lab.tiny, lab.recipe, {"model": state}, "file.pth")

    # This file lacks eight of nine tensors; five are named.
    one = {"model": {"fc.bias": torch.zeros(10)}}
    with pytest.raises(ValueError, match="; and 3 others. ") as error:
        evaluate.load_weights(lab.tiny, lab.recipe, one, "file.pth")
    assert str(error.value).count("is not in the file") == 5


# ---- processes -------------------------------------------------------------------------------

@pytest.mark.parametrize("layer, layout", [
    (torch.nn.Conv2d(4, 4, 3), torch.channels_last),
    (torch.nn.Conv3d(4, 4, 3), torch.channels_last_3d),
])
def test_channels_last_moves_weights_and_keeps_their_values(layer, layout):
    before = layer.weight.clone()
    evaluate.use_channels_last(layer)
    assert layer.weight.is_contiguous(memory_format=layout)
    assert torch.equal(layer.weight, before)


# ---- --video ---------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Two whole videos of a second, one that was cut short, and a file that is no video."""
    folder = tmp_path_factory.mktemp("clips")
    for name, size in (("landscape", "64x48"), ("portrait", "48x64"), ("cut", "64x48")):
        source = f"testsrc2=size={size}:rate=30:duration=1"
        command = ["ffmpeg", "-v", "error", "-f", "lavfi", "-i", source, "-c:v", "mpeg4", "-g", "1",
                   "-movflags", "+faststart", f"{name}.mp4"]
        subprocess.run(command, cwd=folder, check=True)
    content = (folder / "cut.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(content[: len(content) // 2])
    (folder / "text.mp4").write_text("this is no video\n")
    return folder


def labels_of(run, *flags):
    """{label: probability} of the video that is named last, as --json prints them."""
    _, lines, _ = run("--json", *flags)
    [result] = json.loads("\n".join(lines))
    assert result["video"] == str(flags[-1])
    return result["labels"]


@needs_ffmpeg
def test_a_video_gets_the_scores_that_it_would_get_in_a_list(lab, run, clips):
    """The same videos are extracted into a data folder and scored there: equal pixels, equal views.
    """
    data.extract(clips, "DATA", "all", workers=1)
    data.write_lines(Path("DATA", "categories.txt"), data.TOY_CATEGORIES)
    file, _ = scored(lab, run, "--protocol", "multiscale", "--data", "DATA", "--split", "all")
    assert file["paths"].tolist() == ["cut", "landscape", "portrait"]

    for name, expected in zip(file["paths"], file["scores"]):
        labels = labels_of(run, "--checkpoint", lab.checkpoint, "--protocol", "multiscale",
                           "--top", 10, "--video", clips / f"{name}.mp4")
        scores = [labels[category] for category in data.TOY_CATEGORIES]
        np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-5)
        assert list(labels.values()) == sorted(scores, reverse=True)


@needs_ffmpeg
def test_a_file_that_cannot_be_read_does_not_stop_the_others(lab, run, clips):
    flags = ["--checkpoint", lab.checkpoint, "--top", 2, "--video"]
    files = [str(clips / f"{name}.mp4") for name in ("text", "landscape", "none", "cut")]
    text, landscape, none, cut = files
    status, lines, err = run(*flags, *files)
    assert status == 2

    # the labels of two videos, each below the video's name
    expected = [landscape]
    for name, probability in labels_of(run, *flags, landscape).items():
        expected.append(f"{100 * probability:6.2f} %  {name}")
    assert lines[:3] == expected
    assert lines[3] == cut
    assert len(lines) == 6

    # a line for each of the others, and one for what is missing of the video that was cut short
    assert len(err) == 3
    assert err[0].startswith(f"{text}: 0 frames; ffmpeg: ")
    assert err[1].startswith(f"{none}: 0 frames; ffmpeg: ")
    assert re.match(rf"{re.escape(cut)}: [1-9]\d* frames; ffmpeg: ", err[2])


@needs_ffmpeg
def test_a_picture_shows_the_middle_clip_in_its_own_shape(lab, run, clips):
    """Decoded frames have 426x320 or 320x426 pixels. In the picture they are 128 high, so 170 or 96
    wide, and 4 apart."""
    files = [clips / "landscape.mp4", clips / "portrait.mp4"]
    run("--checkpoint", lab.checkpoint, "--picture", "out.png", "--top", 1, "--video", *files)
    picture = Image.open("out.png")
    assert picture.width == 4 * (170 + 4)
    assert picture.height == 2 * (128 + 4 + 8 + 24 + 8)  # frames, a label, and space around it
    for file, width, y in ((files[0], 170, 0), (files[1], 96, picture.height // 2)):
        folder = Path(file.stem)
        folder.mkdir()
        data.decode_video(file, folder)
        frames = data.read_frames(folder, [3, 11, 18, 26])  # the middles of four parts of 30
        for i in range(4):
            x = i * (width + 4)
            expected = Image.fromarray(frames[i].numpy()).resize((width, 128))
            assert picture.crop((x, y, x + width, y + 128)).tobytes() == expected.tobytes()


def test_bars_are_as_long_as_the_probabilities_and_rows_hold_eight_frames():
    frames = torch.zeros(10, 48, 64, 3, dtype=torch.uint8)
    picture = evaluate.draw_labels(frames, {"three quarters": 0.75, "nothing": 0.0})
    top = 2 * (128 + 4) + 8
    assert picture.size == (8 * (171 + 4), top + 2 * 24 + 8)
    for y, expected in ((top + 12, 0.75), (top + 24 + 12, 0)):
        row = [picture.getpixel((x, y)) for x in range(picture.width)]
        blue = row.count((0x4A, 0x86, 0xC8))
        grey = row.count((0xEE, 0xEE, 0xEE))
        assert blue / (blue + grey) == pytest.approx(expected, abs=0.01)


@needs_ffmpeg
def test_only_the_first_process_labels(lab, run, clips, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    flags = ["--checkpoint", lab.checkpoint, "--picture", "out.png"]
    assert run(*flags, "--video", clips / "landscape.mp4", "none.mp4") == (0, [], [])
    assert not os.path.exists("out.png")


def public_weights(lab):
    """Write the tiny network's weights as other people do -> the flags that name them."""
    torch.save({"state_dict": lab.model.state_dict()}, "PUBLIC.pth")
    return ["--model", "tiny", "--weights", "PUBLIC.pth", "--recipe", "toy"]


@needs_ffmpeg
def test_weights_without_class_names_take_them_from_the_data_folder(lab, run, clips):
    public = public_weights(lab)
    video = clips / "landscape.mp4"
    expected = {}
    for name, probability in labels_of(run, *public, "--data", lab.toy, "--video", video).items():
        expected[f"class {data.TOY_CATEGORIES.index(name)}"] = probability
    assert labels_of(run, *public, "--video", video) == expected


# ---- the script ------------------------------------------------------------------------------

def test_a_score_file_says_where_it_comes_from(lab, run):
    file, lines = scored(lab, run)
    videos = data.read_list(lab.toy / "seven.txt")
    assert file["paths"].tolist() == [video.path for video in videos]
    assert file["scores"].dtype == np.float32
    assert file["labels"].dtype == np.uint8
    for labels, video in zip(file["labels"], videos):
        assert np.flatnonzero(labels).tolist() == sorted(video.labels)

    expected_map = evaluate.sample_map(file["scores"], file["labels"])
    protocol = {"name": "clip", "clips": 1, "crops": "1", "sizes": [[36, 32]]}
    assert file["meta"] == {
        "model": "tiny",
        "recipe": lab.recipe,
        "checkpoint": str(lab.checkpoint),
        "iteration": 12,
        "list": str(lab.toy / "seven.txt"),
        "classes": 10,
        "categories": data.TOY_CATEGORIES,
        "protocol": {**protocol, "average": "prob"},
        "left_out": 0,
        "map": expected_map,
    }
    assert "seven.txt: 7 videos" in lines[0]
    assert lines[-1] == f"mAP {100 * expected_map:.2f}"


def test_a_list_without_labels_gets_scores_but_no_map(lab, run):
    file, lines = scored(lab, run, "--split", "test")
    assert "no mAP" in lines[-1]
    assert sorted(file) == ["meta", "paths", "scores"]
    assert file["meta"]["map"] is None


def test_videos_without_frames_are_left_out_and_counted(lab, run):
    _, whole = scored(lab, run)
    seven = (lab.toy / "seven.txt").read_text()
    (lab.toy / "gaps.txt").write_text(f"val/none 0 1\n{seven}val/nothing 0 2\n")
    file, lines = scored(lab, run, "--split", "gaps")
    assert "7 videos" in lines[0]
    assert "2 lines of videos without frames left out" in lines[0]
    assert lines[1:] == whole[1:]
    assert file["meta"]["left_out"] == 2


@pytest.mark.parametrize("flags, videos_at_once, views_at_once", [
    ("--protocol dense --view-batch 40", 4, 40),  # 3 clips x 3 crops: 36 views
    ("--protocol multiscale", 1, 16),  # 18 views, more than 16
    ("--protocol multiscale --batch 7", 7, 16),
])
def test_as_many_videos_are_loaded_as_one_pass_holds(lab, run, monkeypatch, flags, videos_at_once,
                                                     views_at_once):
    calls = []

    def predict(model, videos, num_classes, recipe, device, batch, *others, view_batch, **options):
        calls.append((batch, view_batch))
        return np.zeros((len(videos), num_classes), np.float32)

    monkeypatch.setattr(evaluate, "predict", predict)
    run("--checkpoint", lab.checkpoint, "--data", lab.toy, *flags.split())
    assert calls == [(videos_at_once, views_at_once)]


@needs_ffmpeg
def test_a_network_trained_by_cross_entropy_is_scored_by_softmax(lab, run, clips):
    """Its classes exclude each other, as on Kinetics, so the scores of a video sum to 1."""
    checkpoint = evaluate.read_checkpoint(lab.checkpoint)
    checkpoint["config"]["recipe"]["loss"] = "ce"
    torch.save(checkpoint, "ce.pt")
    file, _ = scored(lab, run, "--checkpoint", "ce.pt")
    np.testing.assert_allclose(file["scores"].sum(axis=1), 1, rtol=0, atol=1e-5)

    video = clips / "landscape.mp4"
    labels = labels_of(run, *public_weights(lab), "--loss", "ce", "--top", 10, "--video", video)
    assert sum(labels.values()) == pytest.approx(1, abs=1e-5)


def test_other_peoples_weights_score_as_our_checkpoint_does(lab, run):
    _, ours = scored(lab, run)
    _, lines, _ = run(*public_weights(lab), "--data", lab.toy, "--split", "seven", "--workers", 0)
    assert lines == ours


def test_a_key_that_is_younger_than_the_checkpoint_has_the_rows_value(lab, run):
    checkpoint = evaluate.read_checkpoint(lab.checkpoint)
    del checkpoint["config"]["recipe"]["stride"]
    torch.save(checkpoint, "old.pt")
    file, _ = scored(lab, run, "--checkpoint", "old.pt")
    assert file["meta"]["recipe"]["stride"] == 1


def test_the_toy_is_drawn_once_where_no_data_is_named(lab, run, monkeypatch):
    drawn = []

    def draw_toy(out):
        drawn.append(str(out))
        shutil.copytree(lab.toy, out)

    monkeypatch.setattr(data, "draw_toy", draw_toy)
    evaluate.toy_folder(rank=1)  # of several processes the first draws it
    assert drawn == []
    for _ in range(2):
        status, _, err = run("--checkpoint", lab.checkpoint, "--workers", 0)
        assert status == 0, err
    assert drawn == [str(Path("runs", "toy"))]


def test_flags_of_speed_change_scores_little(lab, run, monkeypatch):
    def scores(*flags):
        return scored(lab, run, "--protocol", "multiscale", *flags)[0]["scores"]

    expected = scores()
    fine = abs(scores("--amp", "fp16") - expected).max()    # 10 bits after the point
    coarse = abs(scores("--amp", "bf16") - expected).max()  # 7 bits
    assert 0 < 2 * fine < coarse < 0.1
    np.testing.assert_allclose(scores("--channels-last"), expected, rtol=0, atol=1e-5)

    # Compiling takes a minute; here it is enough that it is asked for.
    compiled = []

    def compile(model):
        compiled.append(model)
        return model

    monkeypatch.setattr(torch, "compile", compile)
    scores("--compile", "--channels-last")
    [model] = compiled
    assert model.conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_two_processes_say_once_what_one_says(lab, run, monkeypatch):
    flags = ["--checkpoint", "tiny.pt", "--data", "toy", "--split", "seven", "--workers", 0]
    result = torchrun(2, "evaluate.py", *flags, "--out", "two.npz", cwd=lab.folder)
    assert result.returncode == 0, result.stderr
    monkeypatch.chdir(lab.folder)
    _, lines, _ = run(*flags, "--out", "one.npz")
    assert result.stdout.splitlines() == lines

    # only the first process shows its progress: it has four of the seven videos
    assert "videos 4/4" in result.stderr
    assert "videos 3/3" not in result.stderr

    one = np.load("one.npz")["scores"]
    two = np.load("two.npz")["scores"]
    np.testing.assert_allclose(one, two, rtol=0, atol=1e-5)


def test_what_training_scored_is_what_it_saved(lab, run):
    """Without SyncBN two processes have different running means: train.py must score the network
    that it saves, and evaluate.py then prints the same mAP."""
    result = torchrun(2, "train.py", "--model", "tiny", "--data", "toy", "--epochs", 1,
                      "--workers", 0, cwd=lab.folder)
    assert result.returncode == 0, result.stderr
    best = re.search(r"best val mAP (\d+\.\d\d) \(epoch 1\)", result.stdout.splitlines()[-1])
    checkpoint = lab.folder / "runs" / "tiny" / "best.pt"
    _, lines, _ = run("--checkpoint", checkpoint, "--data", lab.toy, "--workers", 0)
    assert lines[-1] == f"mAP {best[1]}"
