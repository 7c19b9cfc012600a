"""The metric is scikit-learn's sample-level mAP, ties included. The views of a video are the
report's, and its scores are the mean over them, whatever the batch and the number of processes.
Other people's files are read, or refused in one line.

    python -m pytest tests/test_evaluate.py

The tests follow evaluate.py from top to bottom. Other bad input is in test_bad_input.py.

tests/golden/metrics.npz holds scores and labels, and the answers of scikit-learn and of X-Temporal,
the code of the challenge's winners.
"""
import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

import data
import evaluate
import tsn
from conftest import ROOT, call, close, fill, free_port, needs_ffmpeg, remember, torchrun, write

CPU = torch.device("cpu")
METRICS = np.load(ROOT / "tests" / "golden" / "metrics.npz")


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Every test works in a new folder."""
    monkeypatch.chdir(tmp_path)


# ---- the metric ----------------------------------------------------------------------------------

def average_precision_of(scores, labels):
    """The average precision of one video."""
    return evaluate.average_precision([scores], [labels])[0]


def test_average_precision_of_three_classes():
    """Classes 0 and 2 are the labels, and the scores rank the classes 0, 1, 2.

    Down to class 0, one class of one is a label; down to class 2, two of three are. AP is the mean
    of these two fractions.
    """
    assert average_precision_of([0.9, 0.5, 0.1], [1, 0, 1]) == (1 / 1 + 2 / 3) / 2


def test_a_tied_class_without_label_counts_as_ranked_above():
    """Down to class 0, the label, one class of two is a label."""
    assert average_precision_of([0.5, 0.5, 0.1], [1, 0, 0]) == 1 / 2


def test_a_tie_of_two_labels_costs_nothing():
    assert average_precision_of([0.5, 0.5, 0.1], [1, 1, 0]) == (2 / 2 + 2 / 2) / 2


def test_scores_are_compared_in_double_precision():
    """In float32 these two would tie."""
    assert average_precision_of([1 + 1e-12, 1], [1, 0]) == 1


@pytest.mark.parametrize("case", range(METRICS["n"]), ids=json.loads(str(METRICS["notes"])))
def test_the_metric_is_that_of_other_programs(case):
    """The names of the cases say which have ties, and which have rows without a label."""
    scores = METRICS[f"scores_{case}"]
    labels = METRICS[f"labels_{case}"]
    close(evaluate.average_precision(scores, labels), METRICS[f"sklearn_rows_{case}"], 1e-12)
    assert abs(evaluate.sample_map(scores, labels) - METRICS[f"xtemporal_{case}"]) < 1e-12


@pytest.mark.parametrize("scores, labels, message", [
    ([0.5, np.nan], [1, 0], "not a number"),
    ([0.5, 0.1], [2, 0], "0 or 1"),
    ([0.5, 0.1], [1, 0, 0], r"\(1, 2\) .* \(1, 3\)"),
])
def test_the_metric_refuses(scores, labels, message):
    with pytest.raises(ValueError, match=message):
        average_precision_of(scores, labels)


# ---- the views of a video ------------------------------------------------------------------------

def test_views_are_clips_times_crops_times_scales():
    # a size is one scale: (short side of the frame, side of the crop)
    protocol = {"clips": 10, "crops": "3", "sizes": [(128, 128), (144, 144), (160, 160)]}
    assert evaluate.count_views(protocol) == 10 * 3 * 3
    assert evaluate.count_views({**protocol, "crops": "1"}) == 10 * 1 * 3


def test_three_crops_are_start_end_and_centre_of_the_long_side():
    """In 340x256 pixels a crop of 224x224 can move 116 to the right and 32 down."""
    assert evaluate.crop_places(116, 32, "3", None) == [(0, 16), (116, 16), (58, 16)]
    assert evaluate.crop_places(32, 116, "3", None) == [(16, 0), (16, 116), (16, 58)]  # portrait


def test_the_place_of_a_centre_crop_is_rounded_to_even():
    """59 / 2 = 29.5 becomes 30, and 57 / 2 = 28.5 becomes 28, as in torchvision."""
    assert evaluate.crop_places(59, 57, "1", None) == [(30, 28)]


def test_three_random_crops_reach_every_place():
    """20 times three crops that can move 2 down."""
    rng = np.random.default_rng(0)
    places = []
    for _ in range(20):
        places += evaluate.crop_places(0, 2, "random", rng)
    assert len(places) == 20 * 3
    assert set(places) == {(0, 0), (0, 1), (0, 2)}


@pytest.fixture
def painted_frames(monkeypatch):
    """Every video has frames of 20x16 pixels, painted by place: red is the frame's index, green x,
    blue y. The fixture is the list of the reads, each a list of indices."""
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
    """The views of a video: for each scale one tensor, uint8 (V, T, H, W, 3)."""
    protocol = evaluate.make_protocol(recipe, protocol)
    return evaluate.make_views("folder", num_frames, name, recipe, protocol)


def read_off(views):
    """What the pixels say of each view: (frame indices, x, y of the top left corner)."""
    places = []
    for view in views:
        indices = view[:, 0, 0, 0].tolist()
        _, x, y = view[0, 0, 0].tolist()
        places.append((indices, x, y))
    return places


def test_protocol_clip_is_the_middle_window_and_the_centre_crop(painted_frames):
    """A window of 4 frames that are 2 apart is 8 long, as the gap after its last frame counts; it
    lies in the middle of 40 frames. The crop is the middle 8x8 of 20x16 pixels."""
    [views] = views_of(40, "clip", sampling="clip", frames=4, stride=2, test_resize=16, test_crop=8)
    assert (views.shape, views.dtype) == ((1, 4, 8, 8, 3), torch.uint8)
    assert read_off(views) == [([16, 18, 20, 22], 6, 4)]


def test_two_clips_three_crops_two_scales(painted_frames):
    """Two segments of 40 frames: the first clip is their middles, the second a random frame of
    each. Of 20x16 pixels, a crop of 16 leaves 4 to its right."""
    large, small = views_of(40, "multiscale", sampling="segments", frames=2, stride=1, clips=2,
                            crops="3", scales=(16, 12))
    places = read_off(large)
    middle = [10, 30]
    random, _, _ = places[3]
    assert random != middle
    assert 0 <= random[0] < 20 <= random[1] < 40
    assert places == [(middle, 0, 0), (middle, 4, 0), (middle, 2, 0),
                      (random, 0, 0), (random, 4, 0), (random, 2, 0)]
    assert small.shape == (6, 2, 12, 12, 3)
    assert torch.equal(small[:, :, 0, 0, 0], large[:, :, 0, 0, 0])  # the same frames


def test_windows_are_spread_over_the_video(painted_frames):
    """A window is 4 of the 8 frames long, so the last one starts at frame 4."""
    [views] = views_of(8, "dense", sampling="clip", frames=2, stride=2, clips=3, crops="1",
                       scales=(16, 12))  # dense: the first scale alone
    assert read_off(views) == [([0, 2], 2, 0), ([2, 4], 2, 0), ([4, 6], 2, 0)]
    assert painted_frames == [[0, 2, 4, 6]]  # a frame of two windows is read once


def test_randomness_depends_on_the_name_alone(painted_frames):
    def random_places(name):
        [views] = views_of(200, "dense", name, sampling="segments", frames=8, stride=1, clips=5,
                           crops="random", scales=(12,))
        return read_off(views)

    assert random_places("a") == random_places("a")
    assert random_places("a") != random_places("b")


# ---- scores --------------------------------------------------------------------------------------

class Corner(torch.nn.Module):
    """A network of two classes: its logits are the red and the green of a clip's first pixel. In
    training all of them are dropped."""

    def __init__(self):
        super().__init__()
        self.dropout = torch.nn.Dropout(1.0)

    def forward(self, clip):
        return self.dropout(clip[:, 0, :2, 0, 0])


# With this mean and std a normalised pixel is what it was before, 0 to 255.
PLAIN = dict(mean=(0, 0, 0), std=(1 / 255, 1 / 255, 1 / 255), loss="bce")


def one_pixel_views(*logits):
    """Views of one video for Corner, with these logits: uint8 (V, 1, 1, 1, 3)."""
    pixels = [(red, green, 0) for red, green in logits]
    return torch.tensor(pixels, dtype=torch.uint8).view(len(logits), 1, 1, 1, 3)


def batch_of_one(views):
    """The views of one video as a batch, which score_views takes."""
    return [scale[None] for scale in views]


@pytest.mark.parametrize("loss, expected", [
    # sigmoid(0) = .5 in every view; sigmoid(2) = .8808 in one, and .5 in three
    ("bce", [0.5, 0.5952]),
    # softmax(0, 2) = (.1192, .8808) in one view, and softmax(0, 0) = (.5, .5) in three
    ("ce", [0.4048, 0.5952]),
])
def test_four_views_by_hand(loss, expected):
    """Of two views at each of two scales, one has the logits (0, 2), the others (0, 0). After
    training by cross-entropy (ce) the classes exclude each other: their probabilities sum to 1."""
    views = [one_pixel_views((0, 2), (0, 0)), one_pixel_views((0, 0), (0, 0))]
    recipe = {**PLAIN, "loss": loss}
    scores = evaluate.score_views(Corner().eval(), batch_of_one(views), recipe, CPU)
    close(scores, [expected], 1e-4)


def test_scores_of_half_precision_logits_do_not_tie():
    """In half precision sigmoid(9) and sigmoid(12) are both 1, a tie for the metric."""
    def half_corner(clip):
        return clip[:, 0, :2, 0, 0].bfloat16()

    batch = batch_of_one([one_pixel_views((9, 12))])
    [[first, second]] = evaluate.score_views(half_corner, batch, PLAIN, CPU)
    assert first < second < 1


# Five videos of three equal views, whose logits are (row, 0). The scores are the sigmoids of these.
FIVE_VIDEOS = [(row, [one_pixel_views((row, 0), (row, 0), (row, 0))]) for row in range(5)]
FIVE_SCORES = [[1 / (1 + np.exp(-row)), 0.5] for row in range(5)]


def test_batches_workers_and_training_mode_change_nothing():
    """Three videos (nine views) are loaded together, then two (six). At most four views are in one
    forward pass."""
    model = Corner().train()
    calls = remember(model)
    scores = evaluate.predict(model, FIVE_VIDEOS, 2, PLAIN, CPU, batch=3, view_batch=4, workers=2)
    close(scores, FIVE_SCORES, 1e-6)
    assert [len(clips) for clips, _ in calls] == [4, 4, 1, 4, 2]
    assert model.training  # as before


def predict_as(rank, port):
    """One of three processes, with the variables that torchrun sets. It saves what predict
    returns."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="3", MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))
    evaluate.start_process("cpu")
    scores = evaluate.predict(Corner(), FIVE_VIDEOS[:2], 2, PLAIN, CPU, progress_name="videos")
    np.save(f"{rank}.npy", scores)
    evaluate.end_process()


def test_every_process_gets_all_scores(capfd):
    """Of two videos the third process gets none. Only the first prints, 1 of its 1."""
    # forked processes need not import torch again
    torch.multiprocessing.start_processes(predict_as, (free_port(),), 3, start_method="fork")
    for rank in range(3):
        close(np.load(f"{rank}.npy"), FIVE_SCORES[:2], 1e-6)
    assert capfd.readouterr().err.count("videos 1/1, ") == 1


# ---- the script ----------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """What a training run leaves: toy videos and a checkpoint, here with drawn weights.

    .toy          the data folder; its list three.txt is not sorted by name
    .model        the network: a TSN on a ResNet-18 and two frames
    .recipe       its recipe: the row toy, but with frames 2, clips 3, scales 36 and 40
    .checkpoint   the file of both, as train.py writes it
    .ours         flags that name the checkpoint
    .three        flags that score three.txt into scores.npz
    """
    folder = tmp_path_factory.mktemp("lab")
    toy = folder / "toy"
    data.draw_toy(toy, videos=8)
    lines = (toy / "train.txt").read_text().splitlines()
    data.write_lines(toy / "three.txt", reversed(lines[:3]))

    _, recipe = evaluate.open_model("tsn", "toy")
    recipe = {**recipe, "loss": "bce", "frames": 2, "clips": 3, "scales": [36, 40]}
    model = fill(tsn.build(recipe, 10)).eval()
    config = {"model": "tsn", "recipe": recipe, "categories": data.TOY_CATEGORIES}
    checkpoint = folder / "tsn.pt"
    torch.save({"model": model.state_dict(), "config": config, "iteration": 12}, checkpoint)
    return SimpleNamespace(
        toy=toy,
        model=model,
        recipe=recipe,
        checkpoint=checkpoint,
        ours=["--checkpoint", checkpoint],
        three=["--data", toy, "--split", "three", "--workers", 0, "--out", "scores.npz"],
    )


@pytest.fixture
def run(capsys):
    """run(*arguments) -> (exit status, lines on stdout, lines on stderr) of evaluate.py."""
    def call_evaluate(*arguments):
        status = call("evaluate", *arguments)
        captured = capsys.readouterr()
        return status, captured.out.splitlines(), captured.err.splitlines()

    return call_evaluate


@pytest.fixture
def score(lab, run):
    """score(*flags) -> (what the score file of the three videos holds, lines on stdout)."""
    def score_three(*flags):
        status, lines, err = run(*lab.three, *flags)
        assert status == 0, err
        file = dict(np.load("scores.npz"))
        file["meta"] = json.loads(str(file["meta"]))
        return file, lines

    return score_three


def test_flags_reach_views_and_scores(lab, score):
    """Every video is scored as make_views and score_views do it with these values."""
    flags = "--scales 36 44 --std 0.2 0.3 0.4 --sampling clip --stride 5"
    file, _ = score(*lab.ours, *flags.split())
    recipe = {**lab.recipe, "scales": [36, 44], "std": [0.2, 0.3, 0.4], "sampling": "clip",
              "stride": 5}
    protocol = evaluate.make_protocol(recipe, "multiscale")  # since --scales is given
    videos = data.read_list(lab.toy / "three.txt")
    for video, scores in zip(videos, file["scores"], strict=True):
        folder = lab.toy / "frames" / video.path
        views = evaluate.make_views(folder, video.frames, video.path, recipe, protocol)
        expected = evaluate.score_views(lab.model, batch_of_one(views), recipe, CPU)
        close(scores, expected[0], 1e-5)


def test_two_processes_score_as_one(lab, score):
    expected, _ = score(*lab.ours)
    os.remove("scores.npz")
    process = torchrun(2, ROOT / "evaluate.py", *lab.three, *lab.ours, "--device", "cpu")
    assert process.stdout.count("\nmAP ") == 1, process.stderr
    close(np.load("scores.npz")["scores"], expected["scores"], 1e-6)


def test_only_the_first_process_prints_and_writes(lab, run, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    status, lines, _ = run(*lab.three, *lab.ours)
    assert (status, lines, os.listdir()) == (0, [], [])
    # for --video one process suffices; the others end before they look for the file
    assert run(*lab.ours, "--video", "gone.mp4") == (0, [], [])


# ---- what is printed -----------------------------------------------------------------------------

def test_the_printed_figures_by_hand(capsys):
    """Rows are videos. Video 0 ranks its label first, AP 1; video 1 second, AP 1/2; video 2 has
    none, AP 0.

    Columns are classes, each of which ranks the videos. Class 0 ranks its video first, AP 1; class
    1 last of three, AP 1/3; class 2 has none and does not count.
    """
    scores = np.array([[0.9, 0.6, 0.0], [0.8, 0.5, 0.0], [0.1, 0.7, 0.3]])
    labels = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 0]])
    evaluate.print_metrics(scores, labels)
    class_line, unlabelled_line, map_line = capsys.readouterr().out.splitlines()
    # (1 + 1/3) / 2; one of the two labelled videos has its label first, both among their five
    assert class_line == "class-level mAP 66.67, top-1 hit rate 50.00, top-5 100.00"
    assert "1 of 3 videos have no label" in unlabelled_line
    assert "mAP of the others 75.00" in unlabelled_line  # (1 + 1/2) / 2
    assert map_line == "mAP 50.00"  # (1 + 1/2 + 0) / 3


def test_hit_rates_by_hand():
    """Of four labelled videos, the label of two is ranked first, of three among the first five."""
    scores = np.array([[7, 6, 5, 4, 3, 2, 1]] * 3 + [[1] * 7] * 2)
    class_0, class_1, class_5 = np.eye(7, dtype=int)[[0, 1, 5]]
    labels = np.array([
        class_0,      # the likeliest
        class_1,      # the second
        class_5,      # the sixth, too late for the five likeliest
        class_0,      # of seven equals, the lowest number comes first
        0 * class_0,  # a video without a label does not count
    ])
    assert evaluate.hit_rates(scores, labels) == (2 / 4, 3 / 4)


# ---- score files ---------------------------------------------------------------------------------

def test_a_score_file_says_what_was_scored_and_how(lab, score):
    file, lines = score(*lab.ours)
    videos = data.VideoList(lab.toy, "three")
    assert file["paths"].tolist() == videos.paths.tolist()
    assert np.array_equal(file["labels"], videos.label_matrix())
    assert (file["scores"].dtype, file["labels"].dtype) == (np.float32, np.uint8)
    meta = file["meta"]
    assert (meta["model"], meta["iteration"], meta["left_out"]) == ("tsn", 12, 0)
    assert meta["recipe"]["frames"] == 2
    assert meta["categories"] == data.TOY_CATEGORIES
    # "sizes": short side and crop
    assert meta["protocol"] == {"name": "clip", "clips": 1, "crops": "1", "sizes": [[36, 32]]}
    assert meta["map"] == evaluate.sample_map(file["scores"], file["labels"])
    assert lines[-1] == f"mAP {100 * meta['map']:.2f}"


def test_a_list_without_labels_and_a_video_without_frames(lab, score):
    # 0 frames: left out; -1: no label
    data.write_lines(lab.toy / "test.txt", ["empty 0 -1", "train/00000 24 -1"])
    file, lines = score(*lab.ours, "--split", "test")
    assert "no mAP" in lines[-1]
    assert sorted(file) == ["meta", "paths", "scores"]
    assert file["paths"].tolist() == ["train/00000"]
    assert (file["meta"]["map"], file["meta"]["left_out"]) == (None, 1)


# ---- --video -------------------------------------------------------------------------------------

@needs_ffmpeg
def test_a_video_file_is_scored_as_in_a_list(lab, run, score):
    """One film of a second, as a file and in a data folder. Its random clips agree as well: they
    depend on its name, "film" in both."""
    os.mkdir("films")
    command = "ffmpeg -v error -f lavfi -i testsrc2=size=64x48:rate=30:duration=1 films/film.mp4"
    subprocess.run(command.split(), check=True)
    data.extract("films", "DATA", "all", workers=1)
    data.write_lines("DATA/categories.txt", data.TOY_CATEGORIES)
    # these flags come after those of the three videos, and replace them
    file, _ = score(*lab.ours, "--protocol", "dense", "--data", "DATA", "--split", "all")

    _, lines, _ = run(*lab.ours, "--protocol", "dense", "--top", 10, "--json",
                      "--video", "films/film.mp4")
    [result] = json.loads("\n".join(lines))
    assert result["video"] == "films/film.mp4"
    ranking = np.argsort(-file["scores"][0])
    assert list(result["labels"]) == [data.TOY_CATEGORIES[k] for k in ranking]
    close(list(result["labels"].values()), file["scores"][0, ranking], 1e-5)


def test_progress_while_ffmpeg_decodes(lab, run, painted_frames, monkeypatch):
    """A line is printed every five seconds; `hurry` makes that 0.05. fake_ffmpeg.py does what the
    video's text says."""
    program = (ROOT / "tests" / "fake_ffmpeg.py").read_text()
    write("bin/ffmpeg", f"#!{sys.executable}\n{program}").chmod(0o755)
    monkeypatch.setenv("PATH", os.path.abspath("bin"), prepend=os.pathsep)
    write("slow.mp4", "wait a second")
    communicate = subprocess.Popen.communicate

    def hurry(process, timeout):
        return communicate(process, timeout=timeout / 100)

    monkeypatch.setattr(subprocess.Popen, "communicate", hurry)
    _, _, notes = run(*lab.ours, "--video", "slow.mp4")
    assert "slow.mp4: 1 frames so far" in notes


DECODED = {  # what data.decode_video returns: the number of frames, and what is wrong
    "text.mp4": (0, "no video"),
    "cut.mp4": (40, "cut short"),
    "minute.mp4": (60 * 30, ""),  # 30 frames a second
    "long.mp4": (61 * 30, ""),
}


@pytest.fixture
def decoded(painted_frames, monkeypatch):
    """ffmpeg is replaced by DECODED, its frames by painted ones."""
    monkeypatch.setattr(data, "require_ffmpeg", lambda: None)
    monkeypatch.setattr(data, "decode_video", lambda file, folder, progress: DECODED[file])


def test_an_odd_video_is_named_and_does_not_stop_the_others(lab, run, decoded, monkeypatch):
    scores = torch.zeros(1, 10)
    scores[0, [6, 4]] = torch.tensor([0.9, 0.8])
    monkeypatch.setattr(evaluate, "score_views", Mock(return_value=scores))
    status, lines, notes = run(*lab.ours, "--top", 2, "--video", *DECODED)
    assert status == 2
    labels = [f" 90.00 %  {data.TOY_CATEGORIES[6]}", f" 80.00 %  {data.TOY_CATEGORIES[4]}"]
    assert lines == ["cut.mp4", *labels, "minute.mp4", *labels, "long.mp4", *labels]
    text, cut, long = notes
    assert text == "text.mp4: 0 frames; no video"
    assert cut == "cut.mp4: 40 frames; cut short"
    assert long.startswith("long.mp4: 61 seconds long")


def test_a_picture_of_the_middle_clip(lab, run, decoded):
    """Its two frames are the middles of two halves of 40 frames; their red is their index. They
    have 20x16 pixels; in the picture they are 128 high, so 160 wide, and 4 apart."""
    assert run(*lab.ours, "--picture", "out.png", "--video", "cut.mp4")[0] == 0
    red = np.asarray(Image.open("out.png"))[:128, :, 0]
    assert (red[:, :160] == 10).all()
    assert (red[:, 164:324] == 30).all()


# ---- networks and their recipes ------------------------------------------------------------------

def test_a_row_overrides_the_defaults_of_evaluation():
    module, recipe = evaluate.open_model("tsn", "senet154_5f")
    assert module is tsn
    assert recipe == {**data.RECIPE, **evaluate.RECIPE, **tsn.RECIPES["senet154_5f"]}
    assert evaluate.open_model("tsn") == evaluate.open_model("tsn", "r101_5f")  # the first row


def test_the_row_toy_overrides_data_toy():
    """data.TOY, for all networks, has the crop 32 and the scales (32,). SlowFast's row toy has
    other scales."""
    _, recipe = evaluate.open_model("slowfast", "toy")
    assert (recipe["crop"], recipe["scales"]) == (32, (32, 30, 28))


@pytest.fixture
def parse(monkeypatch, capsys):
    """parse(*flags) -> (evaluate.py's arguments, its notes on stderr)."""
    def parse_flags(*flags):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *[str(flag) for flag in flags]])
        args = evaluate.parse_arguments()
        return args, capsys.readouterr().err.splitlines()

    return parse_flags


@pytest.mark.parametrize("flags", [["--data", "DATA"], ["--video", "a.mp4"]])
def test_toy_as_the_first_row_is_not_for_real_videos(lab, parse, monkeypatch, flags):
    """A model file begun on the toy may have no other row. Its crops of 32 pixels are too small for
    real videos."""
    monkeypatch.setattr(tsn, "RECIPES", {"toy": tsn.RECIPES["toy"]})
    with pytest.raises(ValueError, match="put a row for real data before it, or pass --recipe toy"):
        parse("--model", "tsn", "--weights", lab.checkpoint, *flags)


def test_epochs_and_iterations_clear_each_other():
    """A run's length is one of them; the other is set to 0."""
    assert evaluate.override({"iterations": 50}, {"epochs": 3}) == {"iterations": 0, "epochs": 3}
    assert evaluate.override({"epochs": 3}, {"iterations": 50}) == {"iterations": 50, "epochs": 0}


def test_classes_without_names_are_numbered():
    """Other people's weights do not hold the names."""
    args = SimpleNamespace(categories=None)
    assert evaluate.name_classes(args, folder=None, num_classes=2) == ["class 0", "class 1"]


# ---- weights of any file -------------------------------------------------------------------------

@pytest.mark.parametrize("module", [b"numpy._core", b"numpy.core"])  # of NumPy 2 and NumPy 1
def test_numpy_numbers_in_a_checkpoint(module):
    numbers = {"map": np.float64(0.5), "epoch": np.int64(3), "done": np.bool_(True),
               "counts": np.arange(3)}
    # PyTorch's old format is a bare pickle, in which the name of a module can be replaced.
    torch.save(numbers, "file.pth", _use_new_zipfile_serialization=False)
    write("file.pth", Path("file.pth").read_bytes().replace(b"numpy._core", module))
    np.testing.assert_equal(evaluate.read_checkpoint("file.pth"), numbers)


class Attack:
    """An object that writes a file when it is unpickled."""

    def __reduce__(self):
        return np.savetxt, ("touched", [0])


def test_a_file_that_could_run_code_is_refused():
    """This one calls a function of NumPy, of which only numbers and arrays are allowed."""
    torch.save({"w": torch.zeros(1), "args": Attack()}, "file.pth")
    with pytest.raises(ValueError, match=r"^file\.pth: .* save the state_dict alone"):
        evaluate.read_checkpoint("file.pth")
    assert os.listdir() == ["file.pth"]


def test_a_safetensors_file_is_refused_with_its_conversion():
    """It is known by its first bytes, whatever its name: a length in 8 bytes, and a JSON text."""
    header = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    write("model.bin", len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(ValueError, match="model.bin: a safetensors file; convert it, .* python -c"):
        evaluate.read_checkpoint("model.bin")


W = torch.ones(1)


@pytest.mark.parametrize("checkpoint", [
    {"a.module.w": W},
    # DDP's prefix; state_dict is taken, not net
    {"epoch": 3, "net": {"ema": 2}, "state_dict": {"module.a.module.w": W}},
    # PySlowFast's prefix
    {"epoch": 3, "model_state": {"model.a.module.w": W}},
    # torch.compile's prefix among others; a text is no container
    {"model": "tin", "net": {"module.model._orig_mod.a.module.w": W}},
    # Caffe2's arrays
    {"blobs": {"a.module.w": np.ones(1, np.float32)}},
])
def test_tensors_without_container_and_prefix(checkpoint):
    """`module.` within a name stays."""
    assert evaluate.tensors_of(checkpoint) == {"a.module.w": W}


def test_the_prefix_model_stays_if_one_key_lacks_it():
    tensors = {"model.w": W, "fc.w": 2 * W}
    assert evaluate.tensors_of(tensors) == tensors


@pytest.mark.parametrize("checkpoint, message", [
    ({"state_dict": {}}, "^file.pth: holds no tensors"),
    ({"w": W, "epoch": 3}, "^file.pth: epoch is not a tensor"),
])
def test_a_file_must_hold_tensors_and_nothing_else(checkpoint, message):
    with pytest.raises(ValueError, match=message):
        evaluate.state_of(tsn, checkpoint, "file.pth")


def test_only_other_peoples_files_need_a_convert():
    """A model file's convert renames other people's tensors. The keys of our checkpoints stay, even
    if all begin with `model.`."""
    module = SimpleNamespace(__name__="new")
    config = {"model": "new", "recipe": {}, "categories": None}
    checkpoint = {"model": {"model.w": W}, "config": config}
    assert evaluate.state_of(module, checkpoint, "best.pt") == {"model.w": W}
    with pytest.raises(ValueError, match="^file.pth: .* new.py has no convert"):
        evaluate.state_of(module, {"w": W}, "file.pth")


def test_weights_that_do_not_fit_are_named(lab):
    state = lab.model.state_dict()
    state["backbone.conv1.weight"] = torch.zeros(64, 3, 5, 5)
    del state["backbone.bn1.weight"]
    state["backbone.layer1.0.conv3.weight"] = torch.zeros(1)  # a ResNet-50 has it
    message = ("file.pth: does not fit the network: backbone.conv1.weight is (64, 3, 5, 5) in the "
               "file, (64, 3, 7, 7) in the network; backbone.bn1.weight is not in the file; "
               "backbone.layer1.0.conv3.weight is not in the network (3 misfits in all). ")
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        evaluate.load_weights(tsn, lab.recipe, state, "file.pth")


def test_the_number_of_classes_is_the_classifiers(lab):
    state = tsn.build(lab.recipe, 1).state_dict()
    _, num_classes = evaluate.load_weights(tsn, lab.recipe, state, "file.pth")
    assert num_classes == 1


def test_tensors_alone_score_as_the_checkpoint_that_held_them(lab, score):
    ours, _ = score(*lab.ours)
    tensors = lab.model.state_dict()
    del tensors["backbone.bn1.num_batches_tracked"]  # old files lack this counter
    torch.save(tensors, "bare.pth")
    bare = ["--model", "tsn", "--weights", "bare.pth", "--recipe", "toy", "--frames", 2]
    file, _ = score(*bare)
    assert np.array_equal(file["scores"], ours["scores"])

    # only the flag tells how such a network was trained: now the classes sum to 1
    softmax, _ = score(*bare, "--loss", "ce")
    close(softmax["scores"].sum(axis=1), np.ones(3), 1e-5)


def test_a_checkpoints_recipe_overrides_the_row(lab, parse):
    """Its loss counts, for example. What it lacks is the first row's."""
    checkpoint = evaluate.read_checkpoint(lab.checkpoint)
    recipe = checkpoint["config"]["recipe"]
    recipe["loss"] = "ce"
    del recipe["backbone"]
    torch.save(checkpoint, "old.pt")
    args, _ = parse("--checkpoint", "old.pt")
    assert args.recipe == {**recipe, "backbone": "resnet101"}


def notes_of_a_run(given=(), **changes):
    """The notes if a run's checkpoint is used with changed settings. Its network is built from
    `width` and `gate`, which build reads. given: the keys that were flags."""
    def build(recipe, num_classes):
        return recipe["width"], recipe.get("gate")

    module = SimpleNamespace(__name__="new", build=build)
    settings = dict(mean=(0.4, 0.4, 0.4), frames=8, loss="bce", width=32, gate=None, clips=5)
    config = {"model": "new", "recipe": settings, "categories": []}
    recipe = {**settings, **changes}
    return evaluate.notes_on_file(module, recipe, given, {"config": config}, "best.pt")


def test_usual_changes_of_settings_are_not_noted():
    assert notes_of_a_run(clips=10) == []  # chosen for each evaluation
    assert notes_of_a_run(mean=[0.4, 0.4, 0.4]) == []  # a list of the same numbers
    assert notes_of_a_run({"init"}, loss="ce") == []  # --init: the file only starts a training


def test_settings_that_are_not_those_of_the_run_are_named():
    """Those that matter to any network, and those that this one is built from."""
    [note] = notes_of_a_run(mean=(0.5, 0.5, 0.5), frames=16, loss="ce", width=64, gate="relu")
    assert note == (
        "note: best.pt was trained with other settings: mean [0.4, 0.4, 0.4] there, [0.5, 0.5, 0.5]"
        " here; frames 8 there, 16 here; loss bce there, ce here; gate None there, relu here; "
        "width 32 there, 64 here")


def test_weights_of_another_model_of_ours_are_noted(lab, parse):
    """TSM has the tensors of a TSN, so the file fits. Settings that only one of them has do not
    count."""
    flags = ["--weights", lab.checkpoint, "--recipe", "toy", "--frames", 2]
    assert parse("--model", "tsn", *flags)[1] == []
    _, [note] = parse("--model", "tsm", *flags)
    assert "settings: model tsn there, tsm here. --checkpoint" in note


def test_a_model_file_may_check_the_tensors():
    """Its check gets the recipe, the keys that were flags, and the tensors of the file."""
    module = SimpleNamespace(check=Mock(side_effect=ValueError("odd")))
    with pytest.raises(ValueError, match="^file.pth: odd$"):
        evaluate.notes_on_file(module, "recipe", "given", {"module.w": W}, "file.pth")
    module.check.assert_called_once_with("recipe", "given", {"w": W})


# ---- processes, precision, speed -----------------------------------------------------------------

def test_the_first_process_draws_the_toy_once(monkeypatch):
    draw = Mock(side_effect=os.makedirs)
    monkeypatch.setattr(data, "draw_toy", draw)
    evaluate.toy_folder(rank=1)
    assert draw.call_count == 0
    for _ in range(2):
        assert evaluate.toy_folder(rank=0) == Path("runs", "toy")
    draw.assert_called_once_with(Path("runs", "toy"))


@pytest.mark.parametrize("amp", ["fp16", "bf16"])
def test_half_precision_changes_scores_little(lab, score, amp):
    """Numbers of bf16 have 8 binary digits: those between 1/2 and 1 are 1/256 apart."""
    expected, _ = score(*lab.ours)
    half, _ = score(*lab.ours, "--amp", amp)
    assert 0 < abs(half["scores"] - expected["scores"]).max() < 0.01


def test_speed_flags_change_no_score(lab, score, monkeypatch):
    """Compiling takes a minute: here it is only asked for, not done."""
    expected, _ = score(*lab.ours)
    compiled = []

    def remember_model(model):
        compiled.append(model)
        return model

    monkeypatch.setattr(torch, "compile", remember_model)
    monkeypatch.setenv("CXX", sys.executable)  # in place of a compiler: any program
    file, _ = score(*lab.ours, "--compile", "--channels-last")
    close(file["scores"], expected["scores"], 1e-5)
    [model] = compiled
    assert model.backbone.conv1.weight.is_contiguous(memory_format=torch.channels_last)


def test_channels_last_of_3d_convolutions():
    layer = evaluate.use_channels_last(torch.nn.Conv3d(4, 4, 3))
    assert layer.weight.is_contiguous(memory_format=torch.channels_last_3d)


# ---- flags ---------------------------------------------------------------------------------------

def test_a_recipe_key_is_a_flag():
    """It takes values of the default's kind: a fraction, yes or no, several numbers, a word; None
    stands for a number that the network chooses. A flag that is not given leaves no value."""
    recipe = dict(momentum=0.1, flip=True, scales=(256,), slow_index="stride", alpha=None)
    parser = argparse.ArgumentParser()
    evaluate.add_recipe_flags(parser, recipe)
    assert vars(parser.parse_args([])) == {}
    flags = "--momentum 1 --no-flip --scales 128 144 --slow-index linspace --alpha 8"
    assert vars(parser.parse_args(flags.split())) == dict(
        momentum=1.0, flip=False, scales=[128, 144], slow_index="linspace", alpha=8)


@pytest.mark.parametrize("flags, protocol", [
    ("", "clip"),
    ("--protocol dense --clips 2", "dense"),
    ("--crops 1", "multiscale"),  # one of --clips, --crops and --scales asks for all views
])
def test_the_protocol_follows_from_the_flags(lab, parse, flags, protocol):
    args, _ = parse(*lab.ours, *flags.split())
    assert args.protocol == protocol


@pytest.mark.parametrize("flags, expected", [
    ("--test-resize 72 --protocol multiscale", ["the scales follow --test-resize: [72, 80]"]),
    ("--scales 22 54", []),
    ("--scales 21 55", ["the scale 21 is far", "the scale 55 is far"]),
    ("--protocol dense --scales 36 55", []),  # it uses the first one alone
])
def test_notes_on_scales(lab, parse, flags, expected):
    """The run has --test-resize 36, --test-crop 32, and the scales 36 and 40. Far is below
    32 / 1.5 = 21.3 or above 1.5 * 36 = 54."""
    _, notes = parse(*lab.ours, *flags.split())
    for note, words in zip(notes, expected, strict=True):
        assert words in note
