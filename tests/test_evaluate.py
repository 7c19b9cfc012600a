"""The metric is scikit-learn's sample-level mAP, ties included. The views of a video are the
report's. The scores are those of a loop that runs one view at a time, whatever the batch and the
number of processes. Other people's files are read, or refused in one line.

    python -m pytest tests/test_evaluate.py

The tests follow evaluate.py from top to bottom. Other bad input is in test_bad_input.py.

tests/golden/metrics.npz holds the answers of scikit-learn and of two other programs: X-Temporal,
the code of the challenge's winners, and mmaction2, a collection of networks by OpenMMLab.
"""
import argparse
import copy
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import data
import evaluate
import tin
import tsn
from conftest import ROOT, call, close, fill, needs_ffmpeg, remember, torchrun, write

CPU = torch.device("cpu")
METRICS = dict(np.load(ROOT / "tests" / "golden" / "metrics.npz"))


# ---- the metric ----------------------------------------------------------------------------------

def precision_of(scores, labels):
    """The average precision of one video."""
    return evaluate.average_precision([scores], [labels])[0]


def test_average_precision_of_three_classes():
    """Classes 0 and 2 are the labels, and the scores rank the classes 0, 1, 2.

    Down to class 0, one class of one is a label; down to class 2, two of three are. AP is the mean
    of these two fractions.
    """
    assert precision_of([0.9, 0.5, 0.1], [1, 0, 1]) == (1 / 1 + 2 / 3) / 2


def test_a_tied_class_counts_as_ranked_above():
    """Class 0, the label, and class 1 have equal scores. If class 1 is no label, this costs half
    the precision: of the two classes down to here, one is a label. If it is one, it costs nothing.
    """
    assert precision_of([0.5, 0.5, 0.1], [1, 0, 0]) == 1 / 2
    assert precision_of([0.5, 0.5, 0.1], [1, 1, 0]) == (2 / 2 + 2 / 2) / 2


def test_average_precision_at_the_edges():
    assert precision_of([4, 3, 2, 1], [0, 0, 0, 0]) == 0  # no label: as scikit-learn has it
    assert precision_of([4, 3, 2, 1], [1, 1, 1, 1]) == 1  # nothing but labels
    assert precision_of([1 + 1e-12, 1], [1, 0]) == 1      # in float32 these two would tie


def looped_precision(scores, labels):
    """AP of one video by its definition: a loop over its labels, and loops over the classes."""
    positives = np.flatnonzero(labels)
    total = 0.0
    for u in positives:
        labels_ahead = sum(scores[p] >= scores[u] for p in positives)
        classes_ahead = sum(score >= scores[u] for score in scores)
        total += labels_ahead / classes_ahead
    return total / max(len(positives), 1)


@pytest.mark.parametrize("levels", [3, 10**9])
def test_average_precision_equals_the_loop(levels):
    """With three different scores nearly all of them tie, with 10^9 none."""
    rng = np.random.default_rng(levels)
    scores = rng.integers(levels, size=(40, 11))
    labels = rng.random((40, 11)) < rng.random((40, 1))
    expected = [looped_precision(scores[i], labels[i]) for i in range(40)]
    close(evaluate.average_precision(scores, labels), np.array(expected), 1e-12)


@pytest.mark.parametrize("case", range(int(METRICS["n"])))
def test_the_metric_of_other_programs(case):
    """mmaction2's is the same, except for a video without labels, which has NaN there."""
    scores = METRICS[f"scores_{case}"]
    labels = METRICS[f"labels_{case}"]
    ours = evaluate.average_precision(scores, labels)
    close(ours, METRICS[f"sklearn_rows_{case}"], 1e-12)
    labelled = labels.any(axis=1)
    if labelled.any():
        close(ours[labelled], METRICS[f"mmaction2_rows_{case}"][labelled], 1e-12)
    assert abs(evaluate.sample_map(scores, labels) - METRICS[f"xtemporal_{case}"]) < 1e-12


@pytest.mark.parametrize("scores, labels, message", [
    ([0.5, np.nan], [1, 0], "not a number"),
    ([0.5, 0.1], [2, 0], "0 or 1"),
    ([0.5, 0.1], [1, 0, 0], r"\(1, 2\) .* \(1, 3\)"),
])
def test_the_metric_refuses(scores, labels, message):
    with pytest.raises(ValueError, match=message):
        precision_of(scores, labels)


# ---- the views of a video ------------------------------------------------------------------------

@pytest.mark.parametrize("model, name, clips, crops, sizes", [
    ("tin", "clip", 1, "1", [(256, 224)]),
    ("tin", "dense", 5, "3", [(256, 256)]),
    ("slowfast", "clip", 1, "1", [(128, 112)]),
    ("slowfast", "dense", 10, "3", [(128, 128)]),
    ("slowfast", "multiscale", 10, "3", [(128, 128), (144, 144), (160, 160)]),
])
def test_protocols_are_the_reports(model, name, clips, crops, sizes):
    """A size is (short side of the frame, side of the crop). In dense views both are equal: three
    crops along the long side then cover the whole frame."""
    _, recipe = evaluate.open_model(model)
    protocol = evaluate.make_protocol(recipe, name)
    assert protocol == {"name": name, "clips": clips, "crops": crops, "sizes": sizes}
    assert evaluate.count_views(protocol) == clips * int(crops) * len(sizes)


def test_places_of_the_crops():
    """Of 340x256 pixels, a crop of 224 leaves 116 to its right and 32 below it."""
    assert evaluate.crop_places(116, 32, "3", None) == [(0, 16), (116, 16), (58, 16)]
    assert evaluate.crop_places(32, 116, "3", None) == [(16, 0), (16, 116), (16, 58)]  # portrait
    assert evaluate.crop_places(59, 57, "1", None) == [(30, 28)]  # halves become even


def test_random_crops_reach_every_place():
    rng = np.random.default_rng(0)
    places = []
    for _ in range(100):
        places += evaluate.crop_places(1, 2, "random", rng)
    assert set(places) == {(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)}


@pytest.fixture
def frames_read(monkeypatch):
    """Every video has frames of 20x16 pixels that say where they are: red is the frame's index,
    green x, blue y. The fixture is the list of what was read."""
    calls = []

    def read_frames(folder, indices):
        calls.append(indices.tolist())
        frames = torch.zeros(len(indices), 16, 20, 3, dtype=torch.uint8)
        frames[..., 0] = torch.tensor(indices)[:, None, None]
        frames[..., 1] = torch.arange(20)
        frames[..., 2] = torch.arange(16)[:, None]
        return frames

    monkeypatch.setattr(data, "read_frames", read_frames)
    return calls


def views_of(num_frames, protocol, name="a name", **recipe):
    """For each scale: the views, and [(frame indices, x, y of the top left corner), ...]."""
    recipe = {"stride": 1, "crops": "3", "scales": (16,), **recipe}
    protocol = evaluate.make_protocol(recipe, protocol)
    result = []
    for views in evaluate.make_views("folder", num_frames, name, recipe, protocol):
        places = [(view[:, 0, 0, 0].tolist(), *view[0, 0, 0, 1:].tolist()) for view in views]
        result.append((views, places))
    return result


def test_the_single_view(frames_read):
    """The middle 8 of 40 frames, every second of them, and the middle 8x8 of 20x16 pixels."""
    [(views, places)] = views_of(40, "clip", sampling="clip", frames=4, stride=2, test_resize=16,
                                 test_crop=8)
    assert (views.shape, views.dtype) == ((1, 4, 8, 8, 3), torch.uint8)
    assert places == [([16, 18, 20, 22], 6, 4)]


def test_two_clips_three_crops_two_scales(frames_read):
    """The first clip is the middles of four equal parts, the second a random frame of each."""
    [(large, places), (small, _)] = views_of(40, "multiscale", sampling="segments", frames=4,
                                             clips=2, scales=(16, 12))
    clips = [clip for clip, _, _ in places]
    middle, random = clips[0], clips[3]
    assert middle == [5, 15, 25, 35] != random
    assert [index // 10 for index in random] == [0, 1, 2, 3]
    assert clips == 3 * [middle] + 3 * [random]
    assert [(x, y) for _, x, y in places] == 2 * [(0, 0), (4, 0), (2, 0)]
    assert small.shape == (6, 4, 12, 12, 3)
    assert torch.equal(small[:, :, 6, 6, 0], large[:, :, 6, 6, 0])  # the same frames


def test_ten_clips_of_three_seconds(frames_read):
    """A clip of SlowFast 8x8, 32 frames that are 2 apart, takes 64 of the 90 frames, so the last
    clip starts at frame 26. Frames that several clips share are decoded once."""
    [(_, places)] = views_of(90, "dense", sampling="clip", frames=32, stride=2, clips=10)
    clips = [clip for clip, _, _ in places[::3]]  # each has three crops
    for clip, start in zip(clips, [0, 2, 5, 8, 11, 14, 17, 20, 23, 26], strict=True):
        assert clip == list(range(start, start + 64, 2))
    assert frames_read == [sorted({index for clip in clips for index in clip})]


def test_randomness_belongs_to_the_name(frames_read):
    def places(name):
        [(_, places)] = views_of(200, "dense", name, sampling="segments", frames=8, clips=5,
                                 crops="random")
        return places

    assert places("a") == places("a") != places("b")


# ---- scores --------------------------------------------------------------------------------------

def corner(clip):
    """A network of two classes: its logits are the red and the green of a clip's first pixel."""
    return clip[:, 0, :2, 0, 0]


# With this mean and std a normalised pixel is what it was before, 0 to 255.
PLAIN = dict(mean=(0, 0, 0), std=(1 / 255, 1 / 255, 1 / 255), loss="bce")


def one_pixel_views(*logits):
    """Views of one video for corner, with these logits: uint8 (1, V, 1, 1, 1, 3)."""
    pixels = [(red, green, 0) for red, green in logits]
    return torch.tensor(pixels, dtype=torch.uint8).view(1, len(logits), 1, 1, 1, 3)


@pytest.mark.parametrize("loss, expected", [
    ("bce", [0.5, 0.6904]),    # sigmoid(2) = .8808 and sigmoid(0) = .5
    ("ce", [0.3096, 0.6904]),  # softmax(0, 2) = (.1192, .8808) and softmax(0, 0) = (.5, .5)
])
def test_two_views_by_hand(loss, expected):
    """One view has the logits (0, 2), the other (0, 0). After training by cross-entropy (ce) the
    classes exclude each other: their probabilities sum to 1."""
    views = [one_pixel_views((0, 2), (0, 0))]
    scores = evaluate.score_views(corner, views, {**PLAIN, "loss": loss}, CPU)
    assert scores.tolist() == [pytest.approx(expected, abs=1e-4)]


def test_half_precision_logits_do_not_tie():
    """In half precision sigmoid(9) and sigmoid(12) are both 1, a tie for the metric."""
    def half_corner(clip):
        return corner(clip).bfloat16()

    [[first, second]] = evaluate.score_views(half_corner, [one_pixel_views((9, 12))], PLAIN, CPU)
    assert first < second < 1


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """Toy videos, and a checkpoint of TSN on a ResNet-18 and two frames, with random weights.

    .toy .checkpoint     paths
    .model .recipe       the network, and the recipe of a run with --clips 3 --scales 36 40
    """
    folder = tmp_path_factory.mktemp("lab")
    toy = folder / "toy"
    data.draw_toy(toy, videos=32)
    lines = (toy / "val.txt").read_text().splitlines()
    data.write_lines(toy / "seven.txt", lines[6::-1])  # not in the order of the paths
    data.write_lines(toy / "two.txt", lines[:2])

    _, recipe = evaluate.open_model("tsn", "toy")
    recipe = {**recipe, "loss": "bce", "frames": 2, "clips": 3, "scales": [36, 40]}
    model = fill(tsn.build(recipe, 10)).eval()
    with torch.no_grad():
        model.fc.weight *= 5  # so that the videos differ
    config = {"model": "tsn", "recipe": recipe, "categories": data.TOY_CATEGORIES}
    torch.save({"model": model.state_dict(), "config": config, "iteration": 12}, folder / "tsn.pt")
    return SimpleNamespace(toy=toy, checkpoint=folder / "tsn.pt", model=model, recipe=recipe)


def open_views(lab, recipe, protocol):
    protocol = evaluate.make_protocol(recipe, protocol)
    return evaluate.VideoViews(data.VideoList(lab.toy, "seven"), recipe, protocol)


@torch.no_grad()
def one_view_at_a_time(lab, recipe, protocol):
    """The scores of seven.txt: every view is run by itself, and the last step is the mean."""
    result = []
    for _, scales in open_views(lab, recipe, protocol):
        scores = []
        for view in [view for views in scales for view in views]:
            clip = data.normalise(view[None], recipe["mean"], recipe["std"])
            scores.append(lab.model(clip)[0].sigmoid())
        result.append(torch.stack(scores).mean(dim=0).numpy())
    return np.stack(result)


def test_batches_workers_and_mode_change_nothing(lab):
    """Seven videos of nine views are 63 views at each scale: six times ten, and three."""
    model = copy.deepcopy(lab.model).train()
    calls = remember(model)
    views = open_views(lab, lab.recipe, "multiscale")
    ours = evaluate.predict(model, views, 10, lab.recipe, CPU, batch=7, view_batch=10, workers=2)
    close(ours, one_view_at_a_time(lab, lab.recipe, "multiscale"), 1e-5)
    assert abs(ours[0] - ours[1]).max() > 1e-3  # the videos can be told apart
    assert [len(clips) for clips, _ in calls] == 2 * [10, 10, 10, 10, 10, 10, 3]
    assert model.training  # as before


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    """run(*arguments) -> (exit status, lines on stdout, lines on stderr but for the progress) of
    evaluate.py. The working folder is tmp_path."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        capfd.readouterr()
        status = call("evaluate", *arguments)
        captured = capfd.readouterr()
        notes = [line for line in captured.err.splitlines() if not line.endswith(" s left")]
        return status, captured.out.splitlines(), notes

    return run


def flags_of(lab, *flags):
    """Of a flag that is given twice the last counts."""
    return ["--checkpoint", lab.checkpoint, "--data", lab.toy, "--split", "seven", "--workers", 0,
            "--out", "scores.npz", *flags]


def scored(lab, run, *flags):
    """Score seven.txt by the script -> (what --out holds, lines on stdout)."""
    status, lines, err = run(*flags_of(lab, *flags))
    assert status == 0, err
    file = dict(np.load("scores.npz"))
    file["meta"] = json.loads(str(file["meta"]))
    return file, lines


@pytest.mark.parametrize("processes, split", [(2, "seven"), (3, "two")])
def test_several_processes_score_as_one(lab, run, processes, split):
    """Two do not divide seven videos; of two videos, the third process gets none. With one video a
    batch they compute what one process does, and the rows are put together bit for bit."""
    flags = ["--split", split, "--batch", 1]
    one, lines = scored(lab, run, *flags)
    result = torchrun(processes, ROOT / "evaluate.py", *flags_of(lab, *flags, "--out", "all.npz"),
                      cwd=os.getcwd())
    assert result.stdout.splitlines() == lines  # once, not by every process
    np.testing.assert_array_equal(np.load("all.npz")["scores"], one["scores"])


class Corner(torch.nn.Module):
    def forward(self, clip):
        return corner(clip)


FIVE_VIDEOS = [(row, [one_pixel_views((row, 2 * row))[0]]) for row in range(5)]


def predict_as(rank, folder):
    """One of two processes. What predict returns to it is written into a file."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank,
                                         world_size=2)
    np.save(Path(folder, f"{rank}.npy"), evaluate.predict(Corner(), FIVE_VIDEOS, 2, PLAIN, CPU))
    torch.distributed.destroy_process_group()


def test_every_process_gets_all_scores(tmp_path):
    # forked processes need not import torch again
    torch.multiprocessing.start_processes(predict_as, (tmp_path,), 2, start_method="fork")
    expected = evaluate.predict(Corner(), FIVE_VIDEOS, 2, PLAIN, CPU)
    for rank in (0, 1):
        assert np.array_equal(np.load(tmp_path / f"{rank}.npy"), expected)


# ---- what is printed -----------------------------------------------------------------------------

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
    assert first == "class-level mAP 66.67, top-1 hit rate 50.00, top-5 100.00"
    assert "1 of 3 videos have no label" in second
    assert "mAP of the others 75.00" in second  # (1 + 1/2) / 2
    assert last == "mAP 50.00"  # (1 + 1/2 + 0) / 3


def test_hit_rates_by_hand():
    """The label of four videos is the likeliest class, the second, the sixth (too late for the five
    likeliest), and one of seven equals, of which the lower number comes first."""
    scores = np.array([[7, 6, 5, 4, 3, 2, 1]] * 3 + [[1, 1, 1, 1, 1, 1, 1]])
    labels = np.eye(7, dtype=int)[[0, 1, 5, 0]]
    assert evaluate.hit_rates(scores, labels) == (2 / 4, 3 / 4)

    # a video without a label does not count
    scores = np.vstack([scores, scores[:1]])
    labels = np.vstack([labels, 0 * labels[:1]])
    assert evaluate.hit_rates(scores, labels) == (2 / 4, 3 / 4)


# ---- score files ---------------------------------------------------------------------------------

def test_a_score_file(lab, run):
    file, lines = scored(lab, run)
    videos = data.read_list(lab.toy / "seven.txt")
    assert file["paths"].tolist() == [video.path for video in videos]
    assert (file["scores"].dtype, file["labels"].dtype) == (np.float32, np.uint8)
    for labels, video in zip(file["labels"], videos):
        assert np.flatnonzero(labels).tolist() == sorted(video.labels)

    meta = file["meta"]
    assert (meta["model"], meta["iteration"], meta["left_out"]) == ("tsn", 12, 0)
    assert meta["categories"] == data.TOY_CATEGORIES
    assert meta["protocol"] == {"name": "clip", "clips": 1, "crops": "1", "sizes": [[36, 32]]}
    assert meta["map"] == evaluate.sample_map(file["scores"], file["labels"])
    assert lines[-1] == f"mAP {100 * meta['map']:.2f}"


def test_a_list_without_labels_and_a_video_without_frames(lab, run):
    data.write_lines(lab.toy / "test.txt", ["val/none 0 -1", "val/00032 24 -1"])
    file, lines = scored(lab, run, "--split", "test")
    assert "no mAP" in lines[-1]
    assert sorted(file) == ["meta", "paths", "scores"]
    assert file["paths"].tolist() == ["val/00032"]
    assert (file["meta"]["map"], file["meta"]["left_out"]) == (None, 1)


# ---- --video -------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A whole video of a second, one that was cut short, and a file that is no video."""
    folder = tmp_path_factory.mktemp("clips")
    command = ("ffmpeg -v error -f lavfi -i testsrc2=size=64x48:rate=30:duration=1 -c:v mpeg4 -g 1 "
               "-movflags +faststart whole.mp4")
    subprocess.run(command.split(), cwd=folder, check=True)
    content = (folder / "whole.mp4").read_bytes()
    write(folder / "cut.mp4", content[: len(content) // 2])
    write(folder / "text.mp4", "this is no video\n")
    return folder


def labels_of(run, *flags):
    """{label: probability} of a video, as --json prints them."""
    _, lines, _ = run("--top", 10, "--json", *flags)
    [result] = json.loads("\n".join(lines))
    assert result["video"] == str(flags[-1])
    return result["labels"]


@needs_ffmpeg
def test_a_video_gets_the_scores_of_a_list(lab, run, clips):
    """The same videos are extracted into a data folder and scored there."""
    data.extract(clips, "DATA", "all", workers=1)
    data.write_lines(Path("DATA", "categories.txt"), data.TOY_CATEGORIES)
    file, _ = scored(lab, run, "--protocol", "dense", "--data", "DATA", "--split", "all")
    for name, expected in zip(["cut", "whole"], file["scores"], strict=True):
        labels = labels_of(run, "--checkpoint", lab.checkpoint, "--protocol", "dense", "--video",
                           clips / f"{name}.mp4")
        close([labels[category] for category in data.TOY_CATEGORIES], expected, 1e-5)
        assert list(labels.values()) == sorted(labels.values(), reverse=True)


@needs_ffmpeg
def test_an_unreadable_video_does_not_stop_the_others(lab, run, clips):
    """Of a video that was cut short, what is whole is labelled."""
    flags = ["--checkpoint", lab.checkpoint, "--video"]
    text = f"{clips}/text.mp4"
    cut = f"{clips}/cut.mp4"
    status, lines, [first, second] = run("--top", 2, *flags, text, cut)
    assert status == 2
    name, probability = list(labels_of(run, *flags, cut).items())[0]
    assert lines[:2] == [cut, f"{100 * probability:6.2f} %  {name}"]
    assert len(lines) == 3
    assert first.startswith(f"{text}: 0 frames; ffmpeg: ")
    assert re.match(rf"{re.escape(cut)}: [1-9]\d* frames; ffmpeg: ", second)


@needs_ffmpeg
def test_a_picture_of_the_middle_clip(lab, run, clips):
    """Its two frames, of 426x320 pixels, are 170x128 in the picture, and 4 apart."""
    video = clips / "whole.mp4"
    run("--checkpoint", lab.checkpoint, "--picture", "out.png", "--video", video)
    data.decode_video(video, Path())
    first, second = data.read_frames(".", [7, 22]).numpy()  # the middles of two parts of 30
    picture = np.asarray(Image.open("out.png"))
    for x, frame in ((0, first), (174, second)):
        expected = Image.fromarray(frame).resize((170, 128))
        assert np.array_equal(picture[:128, x : x + 170], expected)


@needs_ffmpeg
def test_progress_while_ffmpeg_decodes(lab, run, clips, monkeypatch):
    """Every five seconds; here every hundredth of a second."""
    communicate = subprocess.Popen.communicate

    def hurry(process, timeout):
        return communicate(process, timeout=timeout / 500)

    monkeypatch.setattr(subprocess.Popen, "communicate", hurry)
    video = clips / "whole.mp4"
    _, lines, [line, *_] = run("--checkpoint", lab.checkpoint, "--json", "--video", video)
    assert re.fullmatch(rf"{re.escape(str(video))}: \d+ frames so far", line)
    assert json.loads("\n".join(lines))


def test_a_video_of_a_minute_is_said_to_be_long(lab, run, frames_read, monkeypatch):
    for seconds, notes in ((60, 0), (61, 1)):
        monkeypatch.setattr(data, "decode_video", lambda *_, **__: (30 * seconds, ""))
        _, _, err = run("--checkpoint", lab.checkpoint, "--video", "long.mp4")
        assert len(err) == notes
    assert err[0].startswith("long.mp4: 61 seconds long")
    assert "cut longer ones" in err[0]


def test_a_picture_is_of_one_video(lab, run):
    flags = ["--checkpoint", lab.checkpoint, "--picture", "out.png", "--video", "a.mp4", "b.mp4"]
    _, _, [error] = run(*flags)
    assert "--picture: of one video, but --video names 2" in error


@needs_ffmpeg
def test_only_the_first_process_labels(lab, run, clips, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    video = clips / "whole.mp4"
    assert run("--checkpoint", lab.checkpoint, "--video", video, "none.mp4") == (0, [], [])


# ---- networks and their recipes ------------------------------------------------------------------

def test_a_recipe_is_the_shared_settings_and_a_row():
    module, recipe = evaluate.open_model("tin", "r101_16f")
    assert module is tin
    assert recipe == {**data.RECIPE, **evaluate.RECIPE, **tin.RECIPES["r101_16f"]}
    assert evaluate.open_model("tin") == evaluate.open_model("tin", "r50_8f")  # the first row


def test_the_toys_values_come_before_the_row():
    """SlowFast's row has scales of its own."""
    _, recipe = evaluate.open_model("slowfast", "toy")
    assert (recipe["crop"], recipe["scales"]) == (32, (32, 30, 28))


@pytest.mark.parametrize("flags", [["--data", "DATA"], ["--video", "a.mp4"]])
def test_toy_as_the_first_row_is_not_for_real_videos(lab, run, monkeypatch, flags):
    """As in a model file that was begun on the toy: its videos have 32 pixels."""
    monkeypatch.setattr(tsn, "RECIPES", {"toy": tsn.RECIPES["toy"]})
    status, _, [error] = run("--model", "tsn", "--weights", lab.checkpoint, *flags)
    assert status == 2
    assert "put a row for real data before it, or pass --recipe toy" in error


def test_epochs_and_iterations_clear_each_other():
    assert evaluate.override({"iterations": 50}, {"epochs": 3}) == {"iterations": 0, "epochs": 3}
    assert evaluate.override({"epochs": 3}, {"iterations": 50}) == {"iterations": 50, "epochs": 0}


def test_classes_without_names_are_numbered():
    """Other people's weights do not hold the names."""
    args = SimpleNamespace(categories=None)
    assert evaluate.name_classes(args, None, 2) == ["class 0", "class 1"]


# ---- weights of any file -------------------------------------------------------------------------

@pytest.mark.parametrize("module", [b"numpy._core", b"numpy.core"])  # of NumPy 2 and NumPy 1
def test_numpy_numbers_in_a_checkpoint(tmp_path, module):
    numbers = {"map": np.float64(0.5), "epoch": np.int64(3), "done": np.bool_(True)}
    # PyTorch's old format is a bare pickle, in which the name of a module can be replaced.
    path = tmp_path / "file.pth"
    torch.save({"array": np.arange(3), **numbers}, path, _use_new_zipfile_serialization=False)
    written = path.read_bytes()
    assert b"numpy._core" in written
    path.write_bytes(written.replace(b"numpy._core", module))
    content = evaluate.read_checkpoint(path)
    assert content.pop("array").tolist() == [0, 1, 2]
    assert content == numbers


class Attack:
    """An object that writes a file when it is unpickled."""

    def __reduce__(self):
        return np.savetxt, ("touched", [0])


def test_a_file_that_could_run_code_does_not(tmp_path, monkeypatch):
    """Its function is NumPy's, of which only numbers and arrays are allowed."""
    monkeypatch.chdir(tmp_path)
    torch.save({"w": torch.zeros(1), "args": Attack()}, "file.pth")
    with pytest.raises(ValueError, match=r"^file\.pth: .* save the state_dict alone"):
        evaluate.read_checkpoint("file.pth")
    assert os.listdir() == ["file.pth"]


@pytest.mark.parametrize("name", ["a.safetensors", "pytorch_model.bin"])
def test_a_safetensors_file_is_refused_with_its_conversion(tmp_path, name):
    header = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    write(tmp_path / name, len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(ValueError, match=rf"{name}: a safetensors .* torch\.save\(s\.load_file\("):
        evaluate.read_checkpoint(tmp_path / name)


W = torch.ones(1)


@pytest.mark.parametrize("checkpoint", [
    {"a.module.w": W},
    {"epoch": 3, "state_dict": {"module.a.module.w": W}, "net": {"ema": 2}},
    {"epoch": 3, "model_state": {"model.a.module.w": W}},
    {"model": "tin", "net": {"module.model._orig_mod.a.module.w": W}},  # a text is no container
    {"blobs": {"a.module.w": np.ones(1, np.float32)}},
])
def test_tensors_without_container_and_prefix(checkpoint):
    assert evaluate.tensors_of(checkpoint) == {"a.module.w": W}


def test_the_prefix_model_stays_if_one_key_lacks_it():
    tensors = {"model.w": W, "fc.w": W}
    assert evaluate.tensors_of(tensors) == tensors


@pytest.mark.parametrize("name", ["tsn", "trn", "tsm", "tin", "slowfast"])
def test_the_prefix_of_lightning_goes(name):
    module, recipe = evaluate.open_model(name, "toy")
    with torch.device("meta"):
        state = module.build(recipe, 3).state_dict()
    checkpoint = {"state_dict": {f"model.{key}": tensor for key, tensor in state.items()}}
    assert evaluate.state_of(module, checkpoint, "file.ckpt") == state


def test_in_our_checkpoint_every_prefix_stays():
    """A network of ours may consist of a part that is called model."""
    config = {"model": "tsn", "recipe": {}, "categories": None}
    checkpoint = {"model": {"model.w": W}, "config": config}
    assert evaluate.state_of(tsn, checkpoint, "best.pt") == {"model.w": W}


@pytest.mark.parametrize("checkpoint, message", [
    ({"state_dict": {}}, "holds no tensors"),
    ({"w": W, "epoch": 3}, "epoch is not a tensor"),
])
def test_a_file_without_tensors_is_refused(checkpoint, message):
    with pytest.raises(ValueError, match=message):
        evaluate.tensors_of(checkpoint)


def test_a_model_file_without_convert_reads_our_checkpoints(lab):
    module = SimpleNamespace(__name__="new")
    checkpoint = evaluate.read_checkpoint(lab.checkpoint)
    assert evaluate.state_of(module, checkpoint, "file.pth") == checkpoint["model"]
    with pytest.raises(ValueError, match="^file.pth: .* new.py has no convert"):
        evaluate.state_of(module, checkpoint["model"], "file.pth")


def test_weights_from_before_batch_norms_counted(lab):
    """And the number of classes, here one, is the classifier's."""
    state = tsn.build(lab.recipe, 1).state_dict()
    old = {key: x for key, x in state.items() if not key.endswith("num_batches_tracked")}
    model, num_classes = evaluate.load_weights(tsn, lab.recipe, old, "file.pth")
    assert num_classes == 1
    assert torch.equal(model.fc.weight, state["fc.weight"])


def test_weights_that_do_not_fit_are_named(lab):
    state = lab.model.state_dict()
    state["backbone.conv1.weight"] = torch.zeros(64, 3, 5, 5)
    del state["backbone.bn1.weight"]
    state["backbone.layer1.0.conv3.weight"] = torch.zeros(1)
    message = ("file.pth: does not fit the network: backbone.conv1.weight is (64, 3, 5, 5) in the "
               "file, (64, 3, 7, 7) in the network; backbone.bn1.weight is not in the file; "
               "backbone.layer1.0.conv3.weight is not in the network (3 misfits in all). The end "
               "of tsn.py lists the flags of public weights")
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        evaluate.load_weights(tsn, lab.recipe, state, "file.pth")


def test_other_peoples_weights_score_as_ours(lab, run):
    """A network that was trained by cross-entropy is scored by softmax."""
    ours, _ = scored(lab, run)
    tensors = {f"module.{key}": tensor for key, tensor in lab.model.state_dict().items()}
    torch.save({"state_dict": tensors}, "PUBLIC.pth")
    flags = ["--model", "tsn", "--weights", "PUBLIC.pth", "--recipe", "toy", "--frames", 2,
             *flags_of(lab)[2:]]
    run(*flags)
    np.testing.assert_array_equal(np.load("scores.npz")["scores"], ours["scores"])
    run(*flags, "--loss", "ce")
    close(np.load("scores.npz")["scores"].sum(axis=1), np.ones(7), 1e-5)


def test_a_tsn_is_no_tsm(lab, run):
    """It would load, but its weights know nothing of shifted channels."""
    tensors = {}
    for key, tensor in lab.model.state_dict().items():
        tensors[key.replace("backbone", "base_model").replace("fc", "new_fc")] = tensor
    torch.save(tensors, "tsn.pth")
    flags = ["--weights", "tsn.pth", "--recipe", "toy", "--frames", 2, *flags_of(lab)[2:]]
    assert run("--model", "tsn", *flags)[0] == 0
    status, _, [error] = run("--model", "tsm", *flags)
    assert status == 2
    assert "tsn.pth: no block of the file's network shifts" in error


@pytest.mark.parametrize("model, change, words", [
    ("tsn", dict(mean=(0.5, 0.5, 0.5)), "mean [0.485, 0.456, 0.406] there, [0.5, 0.5, 0.5] here"),
    ("tsn", dict(sampling="clip", stride=2), "sampling segments there, clip here; stride 1 there, "
                                             "2 here"),
    ("tsm", dict(frames=16, shift_every=2), "frames 8 there, 16 here; shift_every 1 there, 2 here"),
    ("slowfast", dict(alpha=8), "alpha None there, 8 here"),
    ("tsn", dict(loss="ce"), "loss bce there, ce here"),
])
def test_settings_that_are_not_those_of_the_run_are_named(model, change, words):
    module, recipe = evaluate.open_model(model, "toy")
    recipe = {"loss": "bce", **recipe}
    config = {"model": model, "recipe": json.loads(json.dumps(recipe)), "categories": []}

    def notes(recipe, model=module):
        return evaluate.notes_on_file(model, recipe, set(), {"config": config}, "best.pt")

    assert notes({**recipe, "test_resize": 40, "clips": 2}) == []  # usual choices
    [note] = notes({**recipe, **change})
    assert note == f"note: best.pt was trained with other settings: {words}"


def test_weights_of_another_model_of_ours_are_said(lab, run):
    """A TSN in TSM's place loads completely, and settings that only one of them has do not count.
    The note is not on stdout."""
    flags = ["--weights", lab.checkpoint, "--recipe", "toy", "--frames", 2, *flags_of(lab)[2:]]
    assert run("--model", "tsn", *flags)[2] == []
    status, lines, [note] = run("--model", "tsm", *flags)
    assert status == 0
    assert "settings: model tsn there, tsm here. --checkpoint" in note
    assert not any("note" in line for line in lines)


def test_the_recipe_of_a_checkpoint(lab, run):
    """Its loss decides on softmax. A key missing from an old checkpoint has the row's value."""
    checkpoint = evaluate.read_checkpoint(lab.checkpoint)
    recipe = checkpoint["config"]["recipe"]
    recipe["loss"] = "ce"
    del recipe["stride"]
    torch.save(checkpoint, "other.pt")
    file, _ = scored(lab, run, "--checkpoint", "other.pt")
    close(file["scores"].sum(axis=1), np.ones(7), 1e-5)
    assert file["meta"]["recipe"]["stride"] == 1


# ---- processes -----------------------------------------------------------------------------------

def test_the_first_process_draws_the_toy_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    drawn = []

    def draw_toy(out):
        drawn.append(out)
        out.mkdir(parents=True)

    monkeypatch.setattr(data, "draw_toy", draw_toy)
    for rank, drawn_by_now in ((1, 0), (0, 1), (0, 1)):
        assert evaluate.toy_folder(rank) == Path("runs", "toy")
        assert len(drawn) == drawn_by_now


def test_flags_of_speed_change_scores_little(lab, run, monkeypatch):
    def scores(*flags):
        return scored(lab, run, *flags)[0]["scores"]

    expected = scores()
    for amp in ("fp16", "bf16"):
        assert 0 < abs(scores("--amp", amp) - expected).max() < 0.1

    # Compiling takes a minute; here it is enough that it is asked for.
    monkeypatch.setenv("CXX", sys.executable)  # in place of a compiler
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or model)
    close(scores("--compile", "--channels-last"), expected, 1e-5)
    [model] = compiled
    assert model.backbone.conv1.weight.is_contiguous(memory_format=torch.channels_last)


def test_without_a_compiler_compile_is_refused(lab, run, monkeypatch):
    monkeypatch.setenv("CXX", "no-compiler")
    status, _, [error] = run(*flags_of(lab, "--compile"))
    assert status == 2
    assert "--compile: torch.compile needs a C++ compiler, and no-compiler is missing" in error


def test_several_tasks_of_srun_are_refused(lab, run, monkeypatch):
    """A batch script that starts one process has SLURM_NTASKS too."""
    monkeypatch.setenv("SLURM_NTASKS", "2")
    assert evaluate.start_process("cpu") == (0, 1, CPU)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    status, _, [error] = run(*flags_of(lab))
    assert status == 2
    assert "torchrun --nnodes N --nproc-per-node GPUS" in error


def test_channels_last_of_3d_convolutions():
    layer = evaluate.use_channels_last(torch.nn.Conv3d(4, 4, 3))
    assert layer.weight.is_contiguous(memory_format=torch.channels_last_3d)


def test_what_training_scored_is_what_it_saved(lab, run):
    """Without SyncBN two processes have different running means: train.py must score the network
    that it saves, and evaluate.py then prints the same mAP."""
    flags = "--model tsn --recipe toy --frames 2 --epochs 1 --workers 0 --data"
    result = torchrun(2, ROOT / "train.py", *flags.split(), lab.toy, cwd=os.getcwd())
    assert result.returncode == 0, result.stderr
    _, lines, _ = run("--checkpoint", "runs/tsn/best.pt", "--data", lab.toy, "--workers", 0)
    assert result.stdout.splitlines()[-1] == f"best val {lines[-1]} (epoch 1)"


# ---- flags ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("key, value, flag, given", [
    ("momentum", 0.1, "--momentum 1", 1.0),
    ("flip", True, "--no-flip", False),
    ("scales", (256,), "--scales 128 144", [128, 144]),
    ("slow_index", "stride", "--slow-index linspace", "linspace"),
    ("alpha", None, "--alpha 8", 8),
])
def test_a_recipe_key_is_a_flag(key, value, flag, given):
    parser = argparse.ArgumentParser()
    evaluate.add_recipe_flags(parser, {key: value})
    assert vars(parser.parse_args([])) == {}
    assert vars(parser.parse_args(flag.split())) == {key: given}


@pytest.mark.parametrize("flags, protocol", [
    ("", "clip"),
    ("--protocol dense --clips 2", "dense"),
    ("--crops 1", "multiscale"),  # one of --clips, --crops and --scales asks for all views
])
def test_the_protocol(lab, run, flags, protocol):
    file, _ = scored(lab, run, *flags.split())
    assert file["meta"]["protocol"]["name"] == protocol


def test_flags_reach_the_views(lab, run):
    flags = "--scales 36 44 --std 0.2 0.3 0.4 --sampling clip --stride 5"
    file, _ = scored(lab, run, *flags.split())
    given = {"scales": [36, 44], "std": [0.2, 0.3, 0.4], "sampling": "clip", "stride": 5}
    recipe = {**lab.recipe, **given}
    assert file["meta"]["recipe"] == json.loads(json.dumps(recipe))
    close(file["scores"], one_view_at_a_time(lab, recipe, "multiscale"), 1e-5)


def test_scales_follow_test_resize(lab, run):
    """The run's are 36 and 40, for --test-resize 36."""
    status, _, [note] = run(*flags_of(lab, "--test-resize", 72, "--protocol", "multiscale"))
    assert status == 0
    assert note == "note: the scales follow --test-resize: [72, 80]"
    meta = json.loads(str(np.load("scores.npz")["meta"]))
    assert meta["protocol"]["sizes"] == [[72, 72], [80, 80]]


@pytest.mark.parametrize("flags, warned", [
    ("--protocol dense", []),
    ("--scales 22 54", []),  # 32 / 1.5 and 36 x 1.5
    ("--scales 21 55", [21, 55]),
    ("--protocol dense --scales 36 55", []),  # it uses the first one alone
    ("--test-resize 72 --test-crop 64 --scales 256 72", [256]),
])
def test_scales_far_from_the_one_view_are_said(lab, run, monkeypatch, flags, warned):
    monkeypatch.setattr(evaluate, "predict", lambda *_, **__: np.zeros((7, 10), np.float32))
    _, _, notes = run(*flags_of(lab, *flags.split()))
    assert [int(re.match(r"warning: the scale (\d+) is far", note)[1]) for note in notes] == warned
