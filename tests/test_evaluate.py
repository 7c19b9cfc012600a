"""The metric is scikit-learn's sample-level mAP, ties included. The views of a video are the
report's. The scores are those of a loop that runs one view at a time, for any batch and any number
of processes. Other people's files are read, or refused in one line. A video gets its labels.

    python -m pytest tests/test_evaluate.py

The tests follow evaluate.py from top to bottom. A network of two layers (TINY in conftest.py)
stands for the five, since a model file beside the scripts is all that a new model takes.

tests/golden/metrics.npz has what scikit-learn and two other programs answer: X-Temporal, which is
the code of the challenge's winners, and mmaction2, a collection of networks by other people.
"""
import argparse
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
    """Classes 0 and 2 are the labels, and the scores rank the classes 0, 1, 2.

    Down to class 0, 1 of 1 class is a label; down to class 2, 2 of 3 are. AP is the mean of the
    two.
    """
    assert precision_of([0.9, 0.5, 0.1], [1, 0, 1]) == (1 / 1 + 2 / 3) / 2


def test_a_class_that_ties_with_a_label_counts_as_ranked_above_it():
    """Class 0, the label, and class 1 have equal scores. If class 1 is no label, this costs half
    the precision: down to class 0, 1 of 2 classes is a label. If class 1 is a label too, it costs
    nothing: 2 of 2 are."""
    assert precision_of([0.5, 0.5, 0.1], [1, 0, 0]) == 1 / 2
    assert precision_of([0.5, 0.5, 0.1], [1, 1, 0]) == (2 / 2 + 2 / 2) / 2


@pytest.mark.parametrize("scores, labels, expected", [
    ([1, 1, 1, 1], [0, 0, 1, 0], 1 / 4),   # all tie
    ([2, 1, 1, 0], [0, 1, 0, 1], (1 / 3 + 2 / 4) / 2),
    ([2, 1, 1, 0], [0, 1, 1, 0], (2 / 3 + 2 / 3) / 2),
    ([3, 2, 1, 0], [0, 0, 0, 0], 0),       # no label: 0, as scikit-learn has it
    ([0, 0, 3, 1], [1, 1, 1, 1], 1),       # every class is a label
    ([-np.inf, 0, np.inf], [0, 0, 1], 1),
])
def test_average_precision_by_hand(scores, labels, expected):
    assert precision_of(scores, labels) == expected


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


@pytest.mark.parametrize("levels", [2, 5, 10**9])
def test_average_precision_is_the_loop(levels):
    """With 2 or 5 different scores nearly all of them tie."""
    rng = np.random.default_rng(levels)
    scores = rng.integers(levels, size=(40, 11)) / levels
    labels = rng.random((40, 11)) < rng.random((40, 1))
    labels[0] = False  # a video without labels
    labels[1] = True   # a video to which every class belongs
    expected = [looped_precision(*video) for video in zip(scores, labels)]
    assert expected[:2] == [0, 1]
    close(evaluate.average_precision(scores, labels), np.array(expected), 1e-12)


@pytest.mark.parametrize("case", range(int(METRICS["n"])))
def test_the_metric_is_that_of_scikit_learn_and_of_the_winners_code(case):
    """And mmaction2's, but for a video without labels, which has NaN there."""
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


def test_scores_are_compared_as_they_are_stored():
    """In float32 these two would be equal and tie."""
    assert precision_of([1 + 1e-12, 1], [1, 0]) == 1


@pytest.mark.parametrize("scores, labels, message", [
    ([[0.5, np.nan]], [[1, 0]], "not a number"),
    ([[0.5, 0.1]], [[2, 0]], "0 or 1"),
    ([[0.5, 0.1]], [[np.nan, 0]], "0 or 1"),
    ([[0.5, 0.1]], [[1, 0, 0]], r"\(1, 2\) .* \(1, 3\)"),
    ([0.5, 0.1], [1, 0], r"\(2,\) .* \(2,\)"),
])
def test_the_metric_refuses(scores, labels, message):
    with pytest.raises(ValueError, match=message):
        evaluate.sample_map(scores, labels)


def test_hit_rates_by_hand():
    """The only label of each video is: the likeliest class, the second, the sixth (too late for the
    five likeliest), and class 0 of seven equals, where the lower number comes first."""
    scores = np.array([[7, 6, 5, 4, 3, 2, 1]] * 3 + [[1, 1, 1, 1, 1, 1, 1]])
    labels = np.zeros((4, 7), int)
    labels[[0, 1, 2, 3], [0, 1, 5, 0]] = 1
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


# ---- the views of a video


@pytest.mark.parametrize("model, row, one_view, clips, sides", [
    ("tin", "r50_8f", (256, 224), 5, [256]),
    ("slowfast", "r101_8x8", (128, 112), 10, [128, 144, 160]),
    ("tin", "toy", (36, 32), 5, [32]),
    ("slowfast", "toy", (36, 32), 10, [32, 30, 28]),
])
def test_protocols_are_the_reports(model, row, one_view, clips, sides):
    """A size is a frame's short side and a crop's. Of dense views the two are equal: three crops
    along the long side then cover the whole frame."""
    _, recipe = evaluate.open_model(model, row)
    clip = evaluate.make_protocol(recipe)
    dense = evaluate.make_protocol(recipe, "dense")
    multiscale = evaluate.make_protocol(recipe, "multiscale")
    sizes = [(side, side) for side in sides]
    assert clip == {"name": "clip", "clips": 1, "crops": "1", "sizes": [one_view]}
    assert dense == {"name": "dense", "clips": clips, "crops": "3", "sizes": sizes[:1]}
    assert multiscale == {**dense, "name": "multiscale", "sizes": sizes}
    assert evaluate.count_views(clip) == 1
    assert evaluate.count_views(multiscale) == clips * 3 * len(sides)
    assert evaluate.count_views({**multiscale, "crops": "random"}) == clips * 3 * len(sides)


@pytest.mark.parametrize("width, height, crop, crops, places", [
    (340, 256, 256, "3", [(0, 0), (84, 0), (42, 0)]),        # left, right, centre
    (256, 340, 256, "3", [(0, 0), (0, 84), (0, 42)]),        # portrait: top, bottom, centre
    (256, 256, 256, "3", [(0, 0), (0, 0), (0, 0)]),          # a square has one place
    (340, 256, 224, "3", [(0, 16), (116, 16), (58, 16)]),
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
    assert reached == {(x, y) for y in range(3) for x in range(5)}  # a room of 4 has 5 places


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
    """Views of Frames, (V, T, h, w, 3) -> [(frame indices, x, y of the top left corner), ...]."""
    return [(view[:, 0, 0, 0].tolist(), *view[0, 0, 0, 1:].tolist()) for view in views]


def views_of(width, height, num_frames, protocol="dense", name="a name", **recipe):
    recipe = {"stride": 1, "crops": "3", "scales": (16,), **recipe}
    protocol = evaluate.make_protocol(recipe, protocol)
    return evaluate.test_views(Frames(width, height), num_frames, name, recipe, protocol)


def test_the_views_of_a_video_of_forty_frames():
    """Two clips of four frames, three crops of each, two scales. The first clip is the middles of
    four equal parts, the second takes a random frame of each part."""
    views = views_of(20, 16, 40, "multiscale", sampling="segments", frames=4, clips=2,
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
    assert views[1][:, :, 6, 6, 0].tolist() == [clip for clip, x, y in expected]


def test_ten_clips_are_spread_over_a_video_of_three_seconds():
    """SlowFast 8x8 sees 32 frames, 2 apart: 64 of 90, so the last clip starts at frame 26. A
    single clip is the middle one, and its crop the centre."""
    slowfast = dict(sampling="clip", frames=32, stride=2, clips=10)
    [views] = views_of(20, 16, 90, **slowfast)
    expected = []
    for start in [0, 2, 5, 8, 11, 14, 17, 20, 23, 26]:
        for x in (0, 4, 2):
            expected.append((list(range(start, start + 64, 2)), x, 0))
    assert described(views) == expected

    [views] = views_of(20, 16, 90, "clip", **slowfast, test_resize=16, test_crop=8)
    assert described(views) == [(list(range(13, 77, 2)), 6, 4)]


@pytest.mark.parametrize("sampling", ["segments", "clip"])
def test_every_frame_is_decoded_once(sampling):
    recipe = dict(sampling=sampling, frames=8, stride=2, clips=5, crops="3", scales=(16, 20))
    video = Frames(22, 16)
    protocol = evaluate.make_protocol(recipe, "multiscale")
    views = evaluate.test_views(video, 20, "a", recipe, protocol)
    [asked_for] = video.asked_for
    seen = set(torch.cat([view[:, :, 9, 9, 0] for view in views]).flatten().tolist())
    assert sorted(seen) == sorted(asked_for)


@pytest.mark.parametrize("crops", ["3", "random"])
def test_randomness_belongs_to_the_videos_name(crops):
    def views(name, seed):
        np.random.seed(seed)
        torch.manual_seed(seed)
        [views] = views_of(24, 18, 200, name=name, sampling="segments", frames=8, clips=5,
                           crops=crops)
        return described(views)

    first = views("a", seed=0)
    assert views("a", seed=1) == first
    assert views("b", seed=0) != first
    assert len({x for frames, x, y in first}) == 3 or crops == "random"


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


def one_pixel_views(*logits):
    """Views of one video for Corner, with these logits: uint8 (1, V, 1, 1, 1, 3)."""
    return torch.tensor([[[[[[red, green, 0]]]] for red, green in logits]], dtype=torch.uint8)


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
    cross-entropy (ce) the classes exclude each other: they sum to 1."""
    recipe = {**PLAIN, "loss": loss}
    one_scale = [one_pixel_views((0, 2), (0, 0))]
    two_scales = [one_pixel_views((0, 2)), one_pixel_views((0, 0))]
    for views in (one_scale, two_scales):
        scores = evaluate.score_views(Corner(), views, recipe, CPU, average=average)
        assert scores.tolist() == [pytest.approx(expected, abs=1e-4)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_do_not_tie(dtype):
    """In half precision sigmoid(9) and sigmoid(12) are both 1, a tie for the metric."""
    scores = evaluate.score_views(Corner(dtype), [one_pixel_views((9, 12))], PLAIN, CPU)
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

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "__file__", str(folder / "evaluate.py"))
        patch.setitem(sys.modules, "tiny", tiny)
        _, recipe = evaluate.open_model("tiny", "toy")
    recipe = {**recipe, "clips": 3, "scales": (36, 40)}
    model = fill(tiny.build(recipe, 10)).eval()
    with torch.no_grad():
        model.fc.weight *= 20  # so that the averages of probabilities and of logits differ
    config = {"model": "tiny", "recipe": recipe, "categories": data.TOY_CATEGORIES}
    torch.save({"model": model.state_dict(), "config": config, "iteration": 12},
               folder / "tiny.pt")
    return SimpleNamespace(folder=folder, toy=toy, checkpoint=folder / "tiny.pt", tiny=tiny,
                           model=model, recipe=recipe)


def video_list(lab, name="clip", split="seven", recipe=None):
    """The videos of a list, with the views of a protocol."""
    recipe = recipe or lab.recipe
    protocol = evaluate.make_protocol(recipe, name)
    views = functools.partial(evaluate.test_views, recipe=recipe, protocol=protocol)
    return data.VideoList(lab.toy, split, recipe, train=False, views=views)


@torch.no_grad()
def one_view_at_a_time(lab, recipe, protocol, average="prob"):
    """The scores of seven.txt by definition: every view is loaded, resized, cut, normalised and run
    by itself; the last step is the average."""
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
            starts = data.clip_starts(video.frames, length, stride, protocol["clips"])
            clips = [data.clip_indices(video.frames, length, stride, start) for start in starts]

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


@pytest.mark.parametrize("sampling", ["segments", "clip"])
@pytest.mark.parametrize("name", ["clip", "dense", "multiscale"])
def test_scores_are_those_of_one_view_at_a_time(lab, name, sampling):
    recipe = {**lab.recipe, "sampling": sampling, "stride": 5}
    protocol = evaluate.make_protocol(recipe, name)
    videos = video_list(lab, name, recipe=recipe)
    expected = {}
    for average in ("prob", "logit"):
        expected[average] = one_view_at_a_time(lab, recipe, protocol, average)
        ours = evaluate.predict(lab.model, videos, 10, recipe, CPU, average=average)
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, expected[average], rtol=0, atol=1e-5)

    # The videos and, of several views, the two averages can be told apart by these scores.
    assert abs(expected["prob"][0] - expected["prob"][1]).max() > 1e-3
    assert name == "clip" or abs(expected["prob"] - expected["logit"]).max() > 1e-3


@pytest.mark.parametrize("model", ["tin", "slowfast"])
def test_the_one_view_is_the_clip_that_validation_sees(lab, model):
    _, recipe = evaluate.open_model(model, "toy")
    clips = data.VideoList(lab.toy, "two", recipe, train=False)
    videos = video_list(lab, split="two", recipe=recipe)
    for row in range(2):
        found, [views] = videos[row]
        assert found == row
        assert torch.equal(views, clips[row][0][None])


@pytest.mark.parametrize("batch, view_batch, workers", [(1, 1, 0), (7, 5, 0), (3, 1000, 2)])
def test_batches_and_workers_change_nothing(lab, batch, view_batch, workers):
    videos = video_list(lab, "multiscale")
    expected = evaluate.predict(lab.model, videos, 10, lab.recipe, CPU)
    ours = evaluate.predict(lab.model, videos, 10, lab.recipe, CPU, batch=batch,
                            view_batch=view_batch, workers=workers)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)


def test_the_network_runs_in_evaluation_mode_on_view_batch_views(lab):
    """Seven videos of nine views at each scale are 63 views: twelve times five, and three."""
    sizes = []

    class Spy(torch.nn.Module):
        def forward(self, clip):
            assert not self.training
            sizes.append(tuple(clip.shape))
            return clip[:, 1, 1, 3, :10]

    model = Spy().train()
    videos = video_list(lab, "multiscale")
    evaluate.predict(model, videos, 10, lab.recipe, CPU, batch=7, view_batch=5)
    assert model.training  # as before
    assert sizes == [
        *[(5, 4, 3, 36, 36)] * 12, (3, 4, 3, 36, 36),
        *[(5, 4, 3, 40, 40)] * 12, (3, 4, 3, 40, 40)]


JOB = '''
"""Every process predicts, all must get the same scores, and the first one saves them."""
import functools
import numpy as np
import torch.distributed as dist
import data
import evaluate
import tiny

rank, world, device = evaluate.start_process("cpu")
checkpoint = evaluate.read_checkpoint("tiny.pt")
recipe = checkpoint["config"]["recipe"]
model, _ = evaluate.load_weights(tiny, recipe, checkpoint, "tiny.pt")
results = {}
for split, batch in (("seven", 1), ("seven", 8), ("two", 1)):
    protocol = evaluate.make_protocol(recipe, "multiscale")
    views = functools.partial(evaluate.test_views, recipe=recipe, protocol=protocol)
    videos = data.VideoList("toy", split, recipe, train=False, views=views)
    scores = evaluate.predict(model, videos, 10, recipe, device, batch)
    results[f"{split} {batch}"] = scores

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
    """Neither 2 nor 3 divides seven videos; of two videos, the third process gets none.

    With one video a batch every process computes what one process does, and the rows are put
    together bit for bit. Larger batches hold other videos, which is float32 noise.
    """
    (lab.folder / "job.py").write_text(JOB)
    result = torchrun(processes, "job.py", cwd=lab.folder)
    assert result.returncode == 0, result.stderr
    scores = np.load(lab.folder / f"scores_of_{processes}.npz")
    for split in ("seven", "two"):
        videos = video_list(lab, "multiscale", split)
        alone = evaluate.predict(lab.model, videos, 10, lab.recipe, CPU, batch=1)
        np.testing.assert_array_equal(scores[f"{split} 1"], alone)
    protocol = evaluate.make_protocol(lab.recipe, "multiscale")
    expected = one_view_at_a_time(lab, lab.recipe, protocol)
    np.testing.assert_allclose(scores["seven 8"], expected, rtol=0, atol=1e-5)


# ---- networks and their weights


def test_a_recipe_is_the_shared_pages_and_a_row():
    module, recipe = evaluate.open_model("tin", "r101_16f")
    assert module is tin
    assert recipe == {"loss": "bce", **data.RECIPE, **evaluate.RECIPE, **tin.RECIPES["r101_16f"]}
    assert evaluate.open_model("tin")[1] == evaluate.open_model("tin", "r50_8f")[1]

    # What belongs to the toy comes before the row: SlowFast's has scales and a rate of its own.
    _, recipe = evaluate.open_model("tin", "toy")
    assert (recipe["crop"], recipe["scales"], recipe["lr"]) == (32, (32,), 0.03)
    _, recipe = evaluate.open_model("slowfast", "toy")
    assert (recipe["crop"], recipe["scales"], recipe["lr"]) == (32, (32, 30, 28), 0.05)


def test_epochs_and_iterations_clear_each_other():
    """A run counts one of them: SlowFast's rows iterations, the page of train.py epochs."""
    pages = (data.RECIPE, evaluate.RECIPE, train.RECIPE)
    _, recipe = evaluate.open_model("slowfast", "r101_8x8", pages)
    assert (recipe["iterations"], recipe["epochs"]) == (180000, 0)
    assert evaluate.override({"iterations": 50}, {"epochs": 3}) == {"iterations": 0, "epochs": 3}
    both = {"iterations": 7, "epochs": 3}
    assert evaluate.override({"lr": 1}, both) == {"lr": 1, **both}


def test_every_recipe_key_is_a_flag():
    recipe = {"clips": 5, "lr": 0.1, "crops": "3", "flip": True, "scales": (256,), "mean": (0.5,),
              "test_crop": 224, "alpha": None}
    parser = argparse.ArgumentParser()
    evaluate.add_recipe_flags(parser, recipe)
    assert vars(parser.parse_args([])) == {}  # what is not given leaves no trace

    flags = ("--clips 3 --lr 1 --crops random --no-flip --scales 128 144 --mean 0.4 0.3 0.2 "
             "--test-crop 112 --alpha 8")
    given = vars(parser.parse_args(flags.split()))
    assert given == {"clips": 3, "lr": 1.0, "crops": "random", "flip": False, "scales": [128, 144],
                     "mean": [0.4, 0.3, 0.2], "test_crop": 112, "alpha": 8}


@pytest.mark.parametrize("kind", ["zip", "pickle", "pickle of NumPy 1"])
def test_numpy_numbers_in_a_checkpoint_are_read(tmp_path, kind):
    """PyTorch writes a zip, and wrote bare pickles before. NumPy 1 had another name inside."""
    numbers = {"map": np.float64(0.5), "lr": np.float32(0.25), "epoch": np.int64(3),
               "done": np.bool_(True)}
    weights = torch.arange(6.0).view(2, 3)
    content = {"state_dict": {"w": weights}, "array": np.arange(3), **numbers}
    path = tmp_path / "file.pth"
    torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    if kind == "pickle of NumPy 1":
        written = path.read_bytes()
        assert b"numpy._core" in written
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


@pytest.mark.parametrize("content", [
    Call(os.system, "touch touched"),
    Call(np.savetxt, "touched", [0]),  # other objects of NumPy are allowed
    argparse.Namespace(lr=1),          # harmless, and common
])
def test_a_file_that_could_run_code_is_refused_and_does_not_run(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    torch.save({"w": torch.zeros(1), "args": content}, "file.pth")
    with pytest.raises(ValueError, match=r"^file\.pth: .* save the state_dict alone"):
        evaluate.read_checkpoint("file.pth")
    assert os.listdir() == ["file.pth"]


class NewModelFile:
    """It knows no container and no prefix: convert hands back what it gets."""

    @staticmethod
    def convert(checkpoint):
        return checkpoint


@pytest.mark.parametrize("container, prefix", [
    ("state_dict", ""), ("model", "module."), ("model_state", "_orig_mod."),
    ("model_state_dict", "module._orig_mod."), ("net", ""),
])
def test_a_new_model_file_gets_every_container_as_model(container, prefix):
    checkpoint = {"epoch": 3, container: {f"{prefix}net.module.weight": 1}}
    converted = evaluate.convert(NewModelFile, checkpoint, "file.pth")
    assert converted == {"model": {"net.module.weight": 1}}


def test_containers_that_are_none_and_several():
    """A file that is a bare state_dict stays one."""
    assert evaluate.convert(NewModelFile, {"module.fc.weight": 1}, "file.pth") == {
        "model": {"fc.weight": 1}}
    checkpoint = {"model": "tin", "net": {"a": 1}}  # a text is no container
    assert evaluate.convert(NewModelFile, checkpoint, "file.pth") == {"model": {"a": 1}}
    checkpoint = {"net": {"b": 1}, "model": {"c": 1}, "state_dict": {"a": 1}}
    assert evaluate.convert(NewModelFile, checkpoint, "file.pth") == {"model": {"a": 1}}
    with pytest.raises(ValueError, match=r"^file\.pth: .*lr"):
        evaluate.convert(tin, {"lr": 1}, "file.pth")


@pytest.mark.parametrize("num_classes", [1, 10])
def test_the_file_knows_the_number_of_classes(lab, num_classes):
    state = fill(lab.tiny.build(lab.recipe, num_classes)).state_dict()
    model, found = evaluate.load_weights(lab.tiny, lab.recipe, {"model": state}, "file.pth")
    assert found == num_classes
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[key])


def test_weights_that_do_not_fit_are_told_with_both_shapes(lab):
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


# ---- processes


def test_channels_last_moves_weights_and_keeps_their_values():
    for layer, layout in ((torch.nn.Conv2d(4, 4, 3), torch.channels_last),
                          (torch.nn.Conv3d(4, 4, 3), torch.channels_last_3d)):
        before = layer.weight.clone()
        evaluate.use_channels_last(layer)
        assert layer.weight.is_contiguous(memory_format=layout)
        assert torch.equal(layer.weight, before)


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


def public_weights(lab):
    """Write the tiny network's weights as other people do -> the flags that name them."""
    torch.save({"state_dict": lab.model.state_dict()}, "PUBLIC.pth")
    return ["--model", "tiny", "--weights", "PUBLIC.pth", "--recipe", "toy"]


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Two whole videos of a second, one that was cut short, and one that is none."""
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


@needs_ffmpeg
def test_a_video_gets_the_scores_that_it_would_get_in_a_list(lab, run, clips):
    """The same videos are extracted into a data folder and scored there: equal pixels, equal views.
    """
    data.extract(clips, "DATA", "all", workers=1)
    data.write_lines(Path("DATA", "categories.txt"), data.TOY_CATEGORIES)
    flags = ["--checkpoint", lab.checkpoint, "--protocol", "multiscale", "--workers", 0]
    run(*flags, "--data", "DATA", "--split", "all", "--out", "scores.npz")
    with np.load("scores.npz") as file:
        expected = dict(zip(file["paths"].tolist(), file["scores"]))

    names = ["landscape", "portrait", "cut"]
    files = [str(clips / f"{name}.mp4") for name in names]
    status, lines, _ = run(*flags, "--json", "--top", 10, "--video", *files)
    results = json.loads("\n".join(lines))
    assert status == 0
    assert [result["video"] for result in results] == files
    for name, result in zip(names, results):
        scores = [result["labels"][category] for category in data.TOY_CATEGORIES]
        np.testing.assert_allclose(scores, expected[name], rtol=0, atol=1e-5)
        assert list(result["labels"].values()) == sorted(scores, reverse=True)


@needs_ffmpeg
def test_a_file_that_cannot_be_read_does_not_stop_the_others(lab, run, clips):
    files = [str(clips / f"{name}.mp4") for name in ("text", "landscape", "none", "cut")]
    status, lines, err = run("--checkpoint", lab.checkpoint, "--top", 2, "--video", *files)
    assert status == 2
    assert [lines[0], lines[3]] == [files[1], files[3]]
    for line in lines[1:3] + lines[4:]:
        percent, name = re.fullmatch(r" *(\d+\.\d\d) %  (.+)", line).groups()
        assert name in data.TOY_CATEGORIES
    assert len(lines) == 6

    # a line for each of the two, and one for what is missing of the third
    assert len(err) == 3
    assert err[0].startswith(f"{files[0]}: 0 frames; ffmpeg: ")
    assert err[1].startswith(f"{files[2]}: 0 frames; ffmpeg: ")
    assert re.match(rf"{re.escape(files[3])}: [1-9]\d* frames; ffmpeg: ", err[2])


@needs_ffmpeg
def test_a_picture_shows_the_middle_clip_in_its_own_shape(lab, run, clips):
    """Frames are 128 pixels high and 4 apart: of 426x320 and 320x426 pixels
    they become 170 and 96 wide."""
    files = [clips / "landscape.mp4", clips / "portrait.mp4"]
    run("--checkpoint", lab.checkpoint, "--picture", "out.png", "--top", 1, "--video", *files)
    picture = Image.open("out.png")
    assert picture.format == "PNG"
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


@needs_ffmpeg
def test_weights_without_class_names_take_them_from_the_data_folder(lab, run, clips):
    flags = [*public_weights(lab), "--json", "--video", clips / "landscape.mp4"]
    numbers = json.loads("\n".join(run(*flags)[1]))[0]["labels"]
    names = json.loads("\n".join(run(*flags, "--data", lab.toy)[1]))[0]["labels"]
    categories = [f"class {data.TOY_CATEGORIES.index(name)}" for name in names]
    assert numbers == dict(zip(categories, names.values()))


# ---- the script


def scored(lab, run, *flags, checkpoint=None):
    """Score seven.txt by the script -> (scores, meta)."""
    network = ["--checkpoint", checkpoint or lab.checkpoint]
    if "--weights" in flags:
        network = []
    status, _, err = run(*network, "--data", lab.toy, "--split", "seven", "--workers", 0,
                         "--out", "scores.npz", *flags)
    assert status == 0, err
    with np.load("scores.npz") as file:
        return file["scores"], json.loads(str(file["meta"]))


@pytest.mark.parametrize("flags, name, changed", [
    ("--clips 2 --protocol dense", "dense", {"clips": 2}),
    ("--clips 2 --crops 1", "multiscale", {"clips": 2, "crops": "1"}),
    ("--scales 36 38 44 --average logit", "multiscale", {"scales": [36, 38, 44]}),
    ("--test-resize 40 --test-crop 24", "clip", {"test_resize": 40, "test_crop": 24}),
    ("--std 0.2 0.3 0.4 --sampling clip --stride 5", "clip",
     {"std": [0.2, 0.3, 0.4], "sampling": "clip", "stride": 5}),
])
def test_flags_choose_the_protocol(lab, run, flags, name, changed):
    """Without --protocol, one of --clips, --crops and --scales asks for all views."""
    scores, meta = scored(lab, run, *flags.split())
    recipe = {**lab.recipe, **changed}
    protocol = evaluate.make_protocol(recipe, name)
    average = "logit" if "logit" in flags else "prob"
    assert meta["protocol"] == json.loads(json.dumps({**protocol, "average": average}))
    assert meta["recipe"] == json.loads(json.dumps(recipe))
    expected = one_view_at_a_time(lab, recipe, protocol, average)
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-5)


def test_a_score_file_says_where_it_comes_from(lab, run):
    status, lines, err = run("--checkpoint", lab.checkpoint, "--data", lab.toy, "--split", "seven",
                             "--workers", 0, "--out", "scores.npz")
    videos = data.read_list(lab.toy / "seven.txt")
    with np.load("scores.npz", allow_pickle=False) as file:
        assert file["paths"].tolist() == [video.path for video in videos]
        assert file["scores"].dtype == np.float32 and file["labels"].dtype == np.uint8
        for labels, video in zip(file["labels"], videos):
            assert np.flatnonzero(labels).tolist() == sorted(video.labels)
        expected_map = evaluate.sample_map(file["scores"], file["labels"])
        meta = json.loads(str(file["meta"]))
    assert meta == {
        "model": "tiny", "recipe": json.loads(json.dumps(lab.recipe)),
        "checkpoint": str(lab.checkpoint), "iteration": 12, "list": str(lab.toy / "seven.txt"),
        "classes": 10, "categories": data.TOY_CATEGORIES,
        "protocol": {"name": "clip", "clips": 1, "crops": "1", "sizes": [[36, 32]],
                     "average": "prob"},
        "left_out": 0, "map": expected_map}
    assert status == 0
    assert "seven.txt: 7 videos" in lines[0]
    assert lines[-1] == f"mAP {100 * expected_map:.2f}"
    assert err[-1].startswith("videos 7/7, ")


def test_a_list_without_labels_gets_scores_but_no_map(lab, run):
    _, lines, _ = run("--checkpoint", lab.checkpoint, "--data", lab.toy, "--split", "test",
                      "--workers", 0, "--out", "scores.npz")
    assert "no mAP" in lines[-1]
    with np.load("scores.npz") as file:
        assert sorted(file) == ["meta", "paths", "scores"]
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
    ("", 16),                       # one view each
    ("--protocol dense --view-batch 40", 4),  # 3 clips x 3 crops
    ("--protocol multiscale", 1),   # 18 views, more than 16
    ("--protocol multiscale --batch 7", 7),
])
def test_as_many_videos_are_loaded_as_one_pass_holds(lab, run, monkeypatch, flags, expected):
    batches = []

    def predict(model, videos, num_classes, recipe, device, batch, *others, **options):
        batches.append(batch)
        return np.zeros((len(videos), num_classes), np.float32)

    monkeypatch.setattr(evaluate, "predict", predict)
    run("--checkpoint", lab.checkpoint, "--data", lab.toy, *flags.split())
    assert batches == [expected]


@needs_ffmpeg
def test_a_network_trained_by_cross_entropy_is_scored_by_softmax(lab, run, clips):
    """Its classes exclude each other, as on Kinetics, so the scores of a video sum to 1."""
    checkpoint = evaluate.read_checkpoint(lab.checkpoint)
    checkpoint["config"]["recipe"]["loss"] = "ce"
    torch.save(checkpoint, "ce.pt")
    public = public_weights(lab)
    for scores, _ in (scored(lab, run, checkpoint="ce.pt"),
                      scored(lab, run, *public, "--loss", "ce")):
        np.testing.assert_allclose(scores.sum(axis=1), 1, rtol=0, atol=1e-5)
    scores, _ = scored(lab, run, *public)
    assert abs(scores.sum(axis=1) - 1).min() > 0.1

    video = clips / "landscape.mp4"
    _, lines, _ = run("--checkpoint", "ce.pt", "--json", "--top", 10, "--video", video)
    labels = json.loads("\n".join(lines))[0]["labels"]
    assert sum(labels.values()) == pytest.approx(1, abs=1e-5)


def test_other_peoples_weights_score_as_our_checkpoint_does(lab, run):
    flags = ["--data", lab.toy, "--split", "seven", "--workers", 0]
    public = public_weights(lab)
    ours = run("--checkpoint", lab.checkpoint, *flags)
    assert run(*public, *flags)[:2] == ours[:2]

    status, _, err = run(*public, *flags, "--frames", 8)
    assert status == 2
    assert "fc.weight is (10, 32) in the file, (10, 64) in the network" in err[-1]
    status, _, err = run("--checkpoint", "PUBLIC.pth", *flags)
    assert status == 2
    assert err[-1].endswith("--model NAME --weights PUBLIC.pth")


def test_classes_are_compared_by_their_names(lab, run):
    """The same names in another order would score the wrong columns."""
    names = data.TOY_CATEGORIES
    for folder, categories in (("swapped", [*names[:2], names[3], names[2], *names[4:]]),
                               ("eleven", [*names, "another"])):
        os.mkdir(folder)
        shutil.copy(lab.toy / "seven.txt", folder)
        os.symlink(lab.toy / "frames", Path(folder, "frames"))
        data.write_lines(Path(folder, "categories.txt"), categories)
    flags = ["--split", "seven", "--workers", 0]

    status, _, [error] = run("--checkpoint", lab.checkpoint, "--data", "swapped", *flags)
    assert status == 2
    assert f"class 2 is 'moving+down' in {lab.checkpoint}, but 'moving+up' in swapped" in error
    status, _, [error] = run("--checkpoint", lab.checkpoint, "--data", "eleven", *flags)
    assert status == 2
    assert f"{lab.checkpoint} names 10 classes, eleven/categories.txt 11" in error

    # Other people's files hold no names: only the number of classes can be compared.
    public = public_weights(lab)
    assert run(*public, "--data", "swapped", *flags)[0] == 0
    status, _, [error] = run(*public, "--data", "eleven", *flags)
    assert status == 2
    assert "PUBLIC.pth knows 10 classes, eleven/categories.txt names 11" in error


def test_a_key_that_is_younger_than_the_checkpoint_has_the_rows_value(lab, run):
    checkpoint = evaluate.read_checkpoint(lab.checkpoint)
    del checkpoint["config"]["recipe"]["stride"]
    torch.save(checkpoint, "old.pt")
    assert scored(lab, run, checkpoint="old.pt")[1]["recipe"]["stride"] == 1


def test_the_toy_is_drawn_once_where_no_data_is_named(lab, run, monkeypatch):
    drawn = []

    def draw_toy(out):
        drawn.append(str(out))
        shutil.copytree(lab.toy, out)

    monkeypatch.setattr(data, "draw_toy", draw_toy)
    flags = ["--checkpoint", lab.checkpoint, "--workers", 0]
    first = run(*flags)
    assert run(*flags)[:2] == first[:2] and first[0] == 0
    assert drawn == [str(Path("runs", "toy"))]


def test_flags_of_speed_change_scores_little(lab, run, monkeypatch):
    expected, _ = scored(lab, run, "--protocol", "multiscale")
    fp16, _ = scored(lab, run, "--protocol", "multiscale", "--amp", "fp16")
    bf16, _ = scored(lab, run, "--protocol", "multiscale", "--amp", "bf16")
    fine = abs(fp16 - expected).max()    # 10 bits after the point
    coarse = abs(bf16 - expected).max()  # 7 bits
    assert 0 < 2 * fine < coarse < 0.1
    scores, _ = scored(lab, run, "--protocol", "multiscale", "--channels-last")
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-5)

    # Compiling takes a minute; here it is enough that it is asked for.
    compiled = []

    def compile(model):
        compiled.append(model)
        return model

    monkeypatch.setattr(torch, "compile", compile)
    scored(lab, run, "--compile")
    assert len(compiled) == 1


def test_two_processes_say_once_what_one_says(lab, run, monkeypatch):
    flags = ["--checkpoint", "tiny.pt", "--data", "toy", "--split", "seven", "--workers", 0]
    result = torchrun(2, "evaluate.py", *flags, "--out", "two.npz", cwd=lab.folder)
    assert result.returncode == 0, result.stderr
    monkeypatch.chdir(lab.folder)
    _, lines, _ = run(*flags, "--out", "one.npz")
    assert result.stdout.splitlines() == lines
    assert "videos 4/4" in result.stderr and "videos 3/3" not in result.stderr  # the first's part
    one = np.load("one.npz")
    two = np.load("two.npz")
    assert one["paths"].tolist() == two["paths"].tolist()
    np.testing.assert_allclose(one["scores"], two["scores"], rtol=0, atol=1e-5)


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
