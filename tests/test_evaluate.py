"""The metric is scikit-learn's sample-level mAP, ties included. The views of a video are the
report's, and its scores are the mean over them, whatever the batch and the number of processes.
Other people's files are read, or refused in one line.

    python -m pytest tests/test_evaluate.py

The tests follow evaluate.py from top to bottom. Other bad input is in test_bad_input.py.

tests/golden/metrics.npz holds scores and labels, and the answers of scikit-learn and of X-Temporal,
the code of the challenge's winners.
"""
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock, Mock

import numpy as np
import pytest
import torch
from PIL import Image

import data
import evaluate
import slowfast
import tsn
from conftest import ROOT, call, close, fill, free_port, remember, write

CPU = torch.device("cpu")
METRICS = np.load(ROOT / "tests" / "golden" / "metrics.npz")


@pytest.fixture(scope="module", autouse=True)
def checkpoint(tmp_path_factory):
    """All tests begin in one folder. It has toy videos, a list of three of them, and tsn.pt: what
    evaluate.py reads of a checkpoint, with drawn weights. The fixture is its content."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("evaluate"))
        data.draw_toy("runs/toy", videos=8)
        write("runs/toy/three.txt", "train/00002 24 0,9\ntrain/00000 24 5\ntrain/00001 24 1\n")
        _, recipe = evaluate.open_model("tsn", "toy")
        recipe["loss"] = "bce"
        config = {"model": "tsn", "recipe": recipe, "categories": data.TOY_CATEGORIES}
        state = fill(tsn.build(recipe, 10)).state_dict()
        checkpoint = {"model": state, "config": config, "iteration": 12}
        torch.save(checkpoint, "tsn.pt")
        yield checkpoint


# ---- the metric ----------------------------------------------------------------------------------

@pytest.mark.parametrize("scores, labels, expected", [
    # ranked: class 0 (a label; 1 of 1 is right), class 1, class 2 (a label; 2 of 3 are right)
    ([0.9, 0.5, 0.1], [1, 0, 1], (1 / 1 + 2 / 3) / 2),
    # a tied class without label counts as ranked above
    ([0.5, 0.5, 0.1], [1, 0, 0], 1 / 2),
    # in float32 these two would tie
    ([1 + 1e-12, 1], [1, 0], 1),
])
def test_average_precision_by_hand(scores, labels, expected):
    assert evaluate.average_precision([scores], [labels]) == [expected]


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
        evaluate.average_precision([scores], [labels])


# ---- the views of a video ------------------------------------------------------------------------

@pytest.mark.parametrize("right, down, crops, places", [
    (32, 116, "3", [(16, 0), (16, 116), (16, 58)]),  # start, end, centre
    (59, 57, "1", [(30, 28)]),  # 29.5 and 28.5, rounded to even as in torchvision
])
def test_places_of_three_crops_and_of_one(right, down, crops, places):
    """right, down: how far a crop can move in a frame. A place is (x, y) of its top left corner."""
    assert evaluate.crop_places(right, down, crops, None) == places


def test_random_crops_reach_every_place():
    """They can move 2 down."""
    rng = np.random.default_rng(0)
    places = set()
    for _ in range(20):
        places.update(evaluate.crop_places(0, 2, "random", rng))
    assert places == {(0, 0), (0, 1), (0, 2)}


@pytest.fixture
def painted_frames(monkeypatch):
    """Every video has frames of 20x16 pixels, and the colour of a pixel is (the frame's index, y,
    x). The fixture is the list of the reads, each a list of indices."""
    reads = []

    def read_frames(folder, indices):
        reads.append(indices.tolist())
        colours = np.meshgrid(indices, range(16), range(20), indexing="ij")
        return torch.from_numpy(np.stack(colours, axis=-1)).byte()

    monkeypatch.setattr(data, "read_frames", read_frames)
    return reads


@pytest.mark.parametrize("protocol, recipe, frames, corners, sides", [
    # The middle window: 2 frames that are 3 apart are 6 long, as the gap after the last one counts.
    ("clip", dict(sampling="clip", frames=2, stride=3, test_resize=16, test_crop=8),
     [[17, 20]], [[4, 6]], [8]),
    # Three windows, spread over the video. Each is 20 long.
    ("dense", dict(sampling="clip", frames=2, stride=10, clips=3, crops="1", scales=(16, 12)),
     [[0, 10], [10, 20], [20, 30]], [[0, 2]] * 3, [16]),
    # The middles of two segments; three crops along the long side, at two scales.
    ("multiscale", dict(sampling="segments", frames=2, stride=1, clips=1, crops="3",
                        scales=(16, 12)),
     [[10, 30]] * 3, [[0, 0], [0, 4], [0, 2]], [16, 12]),
])
def test_views_by_hand(painted_frames, protocol, recipe, frames, corners, sides):
    """Of a video of 40 frames: the frames of each view, its top left corner (y, x) at the first
    scale, and the side of the crops at each scale."""
    protocol = evaluate.make_protocol(recipe, protocol)
    views = evaluate.make_views("folder", 40, "a name", recipe, protocol)
    for scale, side in zip(views, sides, strict=True):
        assert scale.shape[2:] == (side, side, 3)
        top_left = scale[:, :, 0, 0]  # (V, T, 3): frame index, y, x
        assert top_left[:, :, 0].tolist() == frames
    top_left = views[0][:, 0, 0, 0]  # (V, 3): of each view's first frame
    assert top_left[:, 1:].tolist() == corners
    assert views[0].dtype == torch.uint8
    assert evaluate.count_views(protocol) == len(frames) * len(sides)
    [indices] = painted_frames
    assert len(indices) == len(set(indices))  # a frame of two windows is read once


def test_randomness_depends_on_the_name_alone(painted_frames):
    """The first clip is the middles of two segments, the second is random, as are all crops."""
    recipe = dict(sampling="segments", frames=2, stride=1, clips=2, crops="random", scales=(12,))
    protocol = evaluate.make_protocol(recipe, "dense")

    def frames_and_corners(name):
        [views] = evaluate.make_views("folder", 40, name, recipe, protocol)
        return views[:, :, 0, 0, 0].tolist(), views[:, 0, 0, 0, 1:].tolist()

    frames, corners = frames_and_corners("a")
    assert frames_and_corners("a") == (frames, corners)
    other_frames, other_corners = frames_and_corners("b")
    assert corners != other_corners
    assert frames[:3] == other_frames[:3] == [[10, 30]] * 3  # the first clip at its three crops
    assert frames[3] != other_frames[3]


# ---- scores --------------------------------------------------------------------------------------

# With this mean and std a normalised pixel is what it was before, 0 to 255.
PLAIN = dict(mean=(0, 0, 0), std=(1 / 255, 1 / 255, 1 / 255), loss="bce")


@pytest.mark.parametrize("loss, expected", [
    # sigmoid(0) = .5 in every view; sigmoid(2) = .8808 in one, and .5 in three
    ("bce", [0.5, 0.5952, 0.5]),
    # softmax(0, 2, 0) = (.10651, .78699, .10651) in one view, and 1/3 in three
    ("ce", [0.27663, 0.44675, 0.27663]),
])
def test_a_score_is_the_mean_of_the_views_probabilities(loss, expected):
    """The logits of a clip are the colours of its only pixel. Of two views at each of two scales,
    one has the logits (0, 2, 0), the others 0. After training by cross-entropy (ce) the classes
    exclude each other: their probabilities sum to 1."""
    def network(clip):
        return clip.flatten(1).bfloat16()  # these logits are exact, but probabilities would not be

    one_scale = torch.zeros(1, 2, 1, 1, 1, 3, dtype=torch.uint8)  # (B, V, T, H, W, 3)
    other_scale = one_scale.clone()
    one_scale[0, 0, ..., 1] = 2
    scores = evaluate.score_views(network, [one_scale, other_scale], {**PLAIN, "loss": loss}, CPU)
    close(scores, [expected], 1e-4)


def test_batches_workers_and_training_mode_change_nothing():
    """Three videos (nine views) are loaded together, then two (six). At most four views are in one
    forward pass. All logits of a video are its row; in training all of them are dropped."""
    videos = [(row, [torch.full((3, 1, 1, 1, 3), row).byte()]) for row in range(5)]
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(1.0))
    calls = remember(model)
    scores = evaluate.predict(model, videos, 3, PLAIN, CPU, batch=3, view_batch=4, workers=2)
    close(scores[:, 0], torch.arange(5).sigmoid(), 1e-6)
    assert [len(clips) for clips, _ in calls] == [4, 4, 1, 4, 2]
    assert model.training  # as before


# ---- the script ----------------------------------------------------------------------------------

@pytest.fixture
def run(capfd):
    """run(flags) -> (exit status, lines on stdout, lines on stderr) of evaluate.py."""
    def call_evaluate(flags):
        status = call("evaluate", *flags.split())
        captured = capfd.readouterr()
        return status, captured.out.splitlines(), captured.err.splitlines()

    return call_evaluate


THREE = "--split three --workers 0"


@pytest.fixture
def score(run):
    """score(flags) -> (what the score file holds, lines on stdout). The list is three.txt, unless
    the flags have another --split."""
    def score_three(flags):
        status, lines, err = run(f"{THREE} --out scores.npz {flags}")
        assert status == 0, err
        file = dict(np.load("scores.npz"))
        file["meta"] = json.loads(str(file["meta"]))
        return file, lines

    return score_three


def test_flags_reach_views_and_scores(checkpoint, score):
    """Every video is scored as make_views and score_views do it with these values."""
    flags = "--scales 36 44 --std 0.2 0.3 0.4 --sampling clip --stride 2 --clips 2"
    file, _ = score(f"--checkpoint tsn.pt {flags}")
    recipe = {**checkpoint["config"]["recipe"], "scales": [36, 44], "std": [0.2, 0.3, 0.4],
              "sampling": "clip", "stride": 2, "clips": 2}
    protocol = evaluate.make_protocol(recipe, "multiscale")  # since --scales is given
    model, _ = evaluate.load_weights(tsn, recipe, checkpoint, "tsn.pt")
    for path, scores in zip(file["paths"], file["scores"], strict=True):
        views = evaluate.make_views(f"runs/toy/frames/{path}", 24, path, recipe, protocol)
        batch = [scale[None] for scale in views]
        close(scores, evaluate.score_views(model.eval(), batch, recipe, CPU)[0], 1e-5)


def evaluate_as(rank, port):
    """One of four processes, with the variables that torchrun sets. It saves what predict
    returns."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="4", MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))
    predict = evaluate.predict

    def predict_and_save(*arguments, **options):
        scores = predict(*arguments, **options)
        np.save(f"{rank}.npy", scores)
        return scores

    evaluate.predict = predict_and_save
    assert call("evaluate", *f"--checkpoint tsn.pt {THREE} --device cpu".split()) == 0


def test_four_processes_score_three_videos_as_one(score, capfd):
    """Each gets all scores. The mAP is printed once, and so is the progress of the first, which
    scores one video."""
    expected, _ = score("--checkpoint tsn.pt --device cpu")
    # forked processes need not import torch again
    torch.multiprocessing.start_processes(evaluate_as, (free_port(),), 4, start_method="fork")
    for rank in range(4):
        close(np.load(f"{rank}.npy"), expected["scores"], 1e-6)
    printed = capfd.readouterr()
    assert printed.out.count("\nmAP ") == 1
    assert printed.err.count("videos 1/1, ") == 1


def test_only_the_first_process_prints_and_writes(run, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    # for --video one process suffices; the others end before they look for the file
    for flags in (f"{THREE} --out second.npz", "--video gone.mp4"):
        status, lines, _ = run(f"--checkpoint tsn.pt {flags}")
        assert (status, lines) == (0, [])
    assert not os.path.exists("second.npz")


# ---- what is printed -----------------------------------------------------------------------------

def test_the_printed_figures_by_hand(capsys):
    """Of five videos and seven classes. The label of the first three videos ranks first, fifth and
    sixth: AP 1, 1/5, 1/6. That of the fourth is one of seven equals, AP 1/7, but for a hit rate the
    lowest class comes first. The fifth has none, AP 0."""
    scores = np.array([[7, 6, 5, 4, 3, 2, 1]] * 3 + [[1] * 7] * 2)
    labels = np.eye(7)[[0, 4, 5, 0, 0]]
    labels[4] = 0
    evaluate.print_metrics(scores, labels)
    class_line, unlabelled_line, map_line = capsys.readouterr().out.splitlines()
    # A class ranks the videos by its column of scores. Three are equal at the top: one of them has
    # class 0, one class 4, one class 5, so each class has AP 1/3. Down to the fourth video, which
    # has class 0 and ties with the fifth, 2 of 5 have it: (1/3 + 2/5) / 2. Other classes do not
    # count.
    assert class_line == "class-level mAP 34.44, top-1 hit rate 50.00, top-5 75.00"
    assert "1 of 5 videos have no label" in unlabelled_line
    assert "mAP of the others 37.74" in unlabelled_line  # (1 + 1/5 + 1/6 + 1/7) / 4
    assert map_line == "mAP 30.19"  # the same sum / 5


# ---- score files ---------------------------------------------------------------------------------

def test_a_score_file_says_what_was_scored_and_how(checkpoint, score):
    file, lines = score("--checkpoint tsn.pt")
    assert file["paths"].tolist() == ["train/00002", "train/00000", "train/00001"]
    assert np.argwhere(file["labels"]).tolist() == [[0, 0], [0, 9], [1, 5], [2, 1]]
    assert (file["scores"].dtype, file["labels"].dtype) == (np.float32, np.uint8)
    meta = file["meta"]
    assert (meta["model"], meta["iteration"], meta["left_out"]) == ("tsn", 12, 0)
    assert meta["recipe"]["backbone"] == "resnet18"
    assert meta["categories"] == data.TOY_CATEGORIES
    assert meta["protocol"]["sizes"] == [[36, 32]]  # short side and crop
    assert meta["map"] == evaluate.sample_map(file["scores"], file["labels"])
    assert lines[-1] == f"mAP {100 * meta['map']:.2f}"


def test_a_list_without_labels_and_a_video_without_frames(score):
    # 0 frames: left out; -1: no label
    write("runs/toy/test.txt", "empty 0 -1\ntrain/00000 24 -1\n")
    file, lines = score("--checkpoint tsn.pt --split test")
    assert "no mAP" in lines[-1]
    assert sorted(file) == ["meta", "paths", "scores"]
    assert (file["meta"]["map"], file["meta"]["left_out"]) == (None, 1)


# ---- --video -------------------------------------------------------------------------------------

DECODED = {  # what data.decode_video returns: the number of frames, and what is wrong
    "text.mp4": (0, "no video"),
    "films/cut.mp4": (40, "cut short"),
    "minute.mp4": (60 * 30, ""),  # 30 frames a second
    "long.mp4": (61 * 30, ""),
}


@pytest.fixture
def decoded(painted_frames, monkeypatch):
    """ffmpeg is replaced by DECODED, its frames by painted ones."""
    monkeypatch.setattr(data, "require_ffmpeg", lambda: None)
    monkeypatch.setattr(data, "decode_video", lambda file, folder, progress: DECODED[file])


def test_a_video_file_is_scored_as_in_a_list(decoded, run, score):
    """Its random clips agree as well: they depend on its name, "cut" in both."""
    write("runs/toy/cut.txt", "cut 40 -1\n")
    file, _ = score("--checkpoint tsn.pt --protocol dense --split cut")
    _, lines, _ = run("--checkpoint tsn.pt --protocol dense --top 10 --json --video films/cut.mp4")
    [result] = json.loads("\n".join(lines))
    assert result["video"] == "films/cut.mp4"
    ranking = np.argsort(-file["scores"][0])
    assert list(result["labels"]) == [data.TOY_CATEGORIES[k] for k in ranking]
    close(list(result["labels"].values()), file["scores"][0, ranking], 1e-5)


def test_progress_while_ffmpeg_decodes(run, monkeypatch):
    """FFmpeg takes more than five seconds, and writes nothing."""
    process = MagicMock(returncode=0)
    process.__enter__.return_value = process
    process.communicate.side_effect = [subprocess.TimeoutExpired("ffmpeg", 5), (b"", b"")]
    monkeypatch.setattr(subprocess, "Popen", Mock(return_value=process))
    monkeypatch.setattr(data, "require_ffmpeg", lambda: None)
    _, _, notes = run("--checkpoint tsn.pt --video slow.mp4")
    assert notes[0] == "slow.mp4: 0 frames so far"


def test_an_odd_video_is_named_and_does_not_stop_the_others(run, decoded, monkeypatch):
    scores = torch.arange(10)[None] / 10
    monkeypatch.setattr(evaluate, "score_views", Mock(return_value=scores))
    status, lines, notes = run(f"--checkpoint tsn.pt --top 2 --video {' '.join(DECODED)}")
    assert status == 2
    labels = [" 90.00 %  striped+ground", " 80.00 %  checkered+ground"]
    assert lines == ["films/cut.mp4", *labels, "minute.mp4", *labels, "long.mp4", *labels]
    *complaints, long = notes
    assert complaints == ["text.mp4: 0 frames; no video", "films/cut.mp4: 40 frames; cut short"]
    assert long.startswith("long.mp4: 61 seconds long")


def test_a_picture_of_the_middle_clip(run, decoded):
    """Its first two frames are the middles of two of eight parts of 40 frames; their red is their
    index. They have 20x16 pixels; in the picture they are 128 high, so 160 wide, and 4 apart."""
    assert run("--checkpoint tsn.pt --picture out.png --video films/cut.mp4")[0] == 0
    red = np.asarray(Image.open("out.png"))[:128, :, 0]
    assert (red[:, :160] == 2).all()
    assert (red[:, 164:324] == 7).all()


def test_a_bar_is_as_long_as_its_probability():
    frames = torch.zeros(8, 16, 20, 3, dtype=torch.uint8)
    picture = evaluate.draw_labels(frames, {"run": 0.75, "jump": 0.25})
    blue = (np.asarray(picture) == [0x4A, 0x86, 0xC8]).all(axis=-1)
    lengths = blue.sum(axis=1)
    lengths = lengths[lengths > 0]  # of all lines of pixels with blue, first those of "run"
    assert lengths[0] == pytest.approx(3 * lengths[-1], abs=3)


def test_a_picture_names_the_labels():
    """Of two names of the same letters the pictures differ."""
    frames = torch.zeros(8, 16, 20, 3, dtype=torch.uint8)
    picture = evaluate.draw_labels(frames, {"run": 0.75})
    other = evaluate.draw_labels(frames, {"urn": 0.75})
    assert picture.size == other.size
    assert picture.tobytes() != other.tobytes()


# ---- networks and their recipes ------------------------------------------------------------------

def test_a_row_overrides_the_defaults_of_evaluation():
    """Its length is given in iterations, so epochs are set to 0."""
    row = slowfast.RECIPES["r101_8x8"]
    recipe = {**data.RECIPE, **evaluate.RECIPE, **row, "epochs": 0}
    assert evaluate.open_model("slowfast", "r101_8x8") == (slowfast, recipe)
    assert evaluate.open_model("slowfast") == (slowfast, recipe)  # the first row


def test_the_row_toy_overrides_data_toy():
    """data.TOY, for all networks, has the crop 32 and the scales (32,). SlowFast's row toy has
    other scales."""
    _, recipe = evaluate.open_model("slowfast", "toy")
    assert (recipe["crop"], recipe["scales"]) == (32, (32, 30, 28))


@pytest.fixture
def parse(monkeypatch, capfd):
    """parse(flags) -> (evaluate.py's arguments, its notes on stderr)."""
    def parse_flags(flags):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *flags.split()])
        args = evaluate.parse_arguments()
        return args, capfd.readouterr().err.splitlines()

    return parse_flags


@pytest.mark.parametrize("flags", ["--data DATA", "--video a.mp4"])
def test_toy_as_the_first_row_is_not_for_real_videos(parse, monkeypatch, flags):
    """A model file begun on the toy may have no other row. Its crops of 32 pixels are too small for
    real videos."""
    monkeypatch.setattr(tsn, "RECIPES", {"toy": tsn.RECIPES["toy"]})
    with pytest.raises(ValueError, match="put a row for real data before it, or pass --recipe toy"):
        parse(f"--model tsn --weights tsn.pt {flags}")


def test_a_length_in_epochs_clears_that_in_iterations():
    assert evaluate.override({"iterations": 50}, {"epochs": 3})["iterations"] == 0


def test_classes_without_names_are_numbered():
    """Other people's weights do not hold the names."""
    args = SimpleNamespace(categories=None)
    assert evaluate.name_classes(args, folder=None, num_classes=2) == ["class 0", "class 1"]


# ---- weights of any file -------------------------------------------------------------------------

@pytest.mark.parametrize("module", [b"numpy._core", b"numpy.core"])  # of NumPy 2 and NumPy 1
def test_numpy_numbers_in_a_checkpoint(module):
    numbers = {"map": np.float64(0.5), "done": np.bool_(True), "counts": np.arange(3)}
    # PyTorch's old format is a bare pickle, in which the name of a module can be replaced.
    torch.save(numbers, "file.pth", _use_new_zipfile_serialization=False)
    write("file.pth", Path("file.pth").read_bytes().replace(b"numpy._core", module))
    np.testing.assert_equal(evaluate.read_checkpoint("file.pth"), numbers)


def test_a_file_that_could_run_code_is_refused():
    """This one names a function of NumPy, of which only numbers and arrays are allowed."""
    torch.save({"w": torch.ones(1), "args": np.savetxt}, "file.pth")
    with pytest.raises(ValueError, match=r"^file\.pth: .* save the state_dict alone"):
        evaluate.read_checkpoint("file.pth")


def test_a_safetensors_file_is_refused_with_its_conversion():
    """It is known by its first bytes, whatever its name: a length in 8 bytes, and a JSON text."""
    write("model.bin", b"\x08\0\0\0\0\0\0\0" + b'{"w":{}}')
    with pytest.raises(ValueError, match="model.bin: a safetensors file; convert it, .* python -c"):
        evaluate.read_checkpoint("model.bin")


W = torch.ones(1)  # one element, so that == of dicts that hold it is True or False


@pytest.mark.parametrize("theirs", [
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
def test_containers_and_prefixes_are_taken_off(theirs):
    """`module.` within a name stays."""
    assert evaluate.tensors_of(theirs) == {"a.module.w": W}


def test_the_prefix_model_stays_if_one_key_lacks_it():
    tensors = {"model.w": W, "fc.w": 2 * W}
    assert evaluate.tensors_of(tensors) == tensors


def build(recipe, num_classes):
    return torch.nn.Linear(2, num_classes, bias=recipe.get("bias", True))


NEW = SimpleNamespace(__name__="new", build=build)  # a model file without convert


@pytest.mark.parametrize("module, theirs, message", [
    (tsn, {"state_dict": {}}, "holds no tensors"),
    (tsn, {"w": W, "epoch": 3}, "epoch is not a tensor"),
    (NEW, {"w": W}, ".* new.py has no convert"),
])
def test_other_peoples_files_need_tensors_and_a_convert(module, theirs, message):
    with pytest.raises(ValueError, match=f"^file.pth: {message}"):
        evaluate.state_of(module, theirs, "file.pth")


def test_the_keys_of_our_checkpoints_stay(checkpoint):
    """Even if all begin with `model.`."""
    checkpoint = {**checkpoint, "model": {"model.w": W}}
    assert evaluate.state_of(NEW, checkpoint, "best.pt") == {"model.w": W}


def test_weights_that_do_not_fit_are_named(checkpoint):
    """The classifier's tensors tell the number of classes, 4."""
    checkpoint = {**checkpoint, "model": {"weight": torch.zeros(4, 3), "gain": W}}
    message = ("best.pt: does not fit the network: weight is (4, 3) in the file, (4, 2) in the "
               "network; bias is not in the file; gain is not in the network (3 misfits in all). ")
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        evaluate.load_weights(NEW, {}, checkpoint, "best.pt")


def test_tensors_alone_score_as_the_checkpoint_that_held_them(checkpoint, score):
    ours, _ = score("--checkpoint tsn.pt")
    tensors = dict(checkpoint["model"])
    del tensors["backbone.bn1.num_batches_tracked"]  # old files lack this counter
    torch.save(tensors, "bare.pth")
    file, _ = score("--model tsn --weights bare.pth --recipe toy")
    assert np.array_equal(file["scores"], ours["scores"])


def test_a_checkpoints_recipe_overrides_the_row(parse):
    """Its loss counts, for example. What it lacks is the first row's."""
    checkpoint = evaluate.read_checkpoint("tsn.pt")
    recipe = checkpoint["config"]["recipe"]
    recipe["loss"] = "ce"
    del recipe["backbone"]
    torch.save(checkpoint, "old.pt")
    args, _ = parse("--checkpoint old.pt")
    assert args.recipe == {**recipe, "backbone": "resnet101"}


def test_a_start_for_training_may_have_another_loss():
    """The settings that the network is built from are compared."""
    config = {"model": "new", "recipe": {"loss": "bce", "bias": True}, "categories": []}
    recipe = {"loss": "ce", "bias": False}
    [note] = evaluate.notes_on_file(NEW, recipe, {"init"}, {"config": config}, "best.pt")
    assert note == "note: best.pt was trained with other settings: bias True there, False here"


def test_a_model_file_may_check_the_tensors():
    """Its check gets the recipe, the keys that were flags, and the tensors of the file."""
    module = SimpleNamespace(check=Mock(side_effect=ValueError("odd")))
    with pytest.raises(ValueError, match="^file.pth: odd$"):
        evaluate.notes_on_file(module, "recipe", "given", {"module.w": W}, "file.pth")
    module.check.assert_called_once_with("recipe", "given", {"w": W})


# ---- processes, precision, speed -----------------------------------------------------------------

def test_the_first_process_draws_the_toy_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw = Mock(side_effect=os.makedirs)
    monkeypatch.setattr(data, "draw_toy", draw)
    evaluate.toy_folder(rank=1)
    assert draw.call_count == 0
    for _ in range(2):
        assert evaluate.toy_folder(rank=0) == Path("runs", "toy")
    draw.assert_called_once_with(Path("runs", "toy"))


@pytest.mark.parametrize("amp", ["fp16", "bf16"])
def test_half_precision_changes_scores_little(score, amp):
    """Measured: by 0.0007 with bf16, 0.0001 with fp16."""
    expected, _ = score("--checkpoint tsn.pt")
    half, _ = score(f"--checkpoint tsn.pt --amp {amp}")
    assert 0 < abs(half["scores"] - expected["scores"]).max() < 0.002


def test_speed_flags_change_no_score(score, monkeypatch):
    """Compiling takes a minute: here it is only asked for, not done."""
    expected, _ = score("--checkpoint tsn.pt")
    compiled = []

    def remember_model(model):
        compiled.append(model)
        return model

    monkeypatch.setattr(torch, "compile", remember_model)
    monkeypatch.setenv("CXX", sys.executable)  # in place of a compiler: any program
    file, _ = score("--checkpoint tsn.pt --compile --channels-last")
    close(file["scores"], expected["scores"], 1e-5)
    [model] = compiled
    assert model.backbone.conv1.weight.is_contiguous(memory_format=torch.channels_last)


def test_channels_last_of_3d_convolutions():
    layer = evaluate.use_channels_last(torch.nn.Conv3d(4, 4, 3))
    assert layer.weight.is_contiguous(memory_format=torch.channels_last_3d)


# ---- flags ---------------------------------------------------------------------------------------

def test_a_flag_may_give_what_the_network_chooses(parse):
    args, _ = parse("--model slowfast --weights tsn.pt --recipe toy --alpha 2")  # None in the row
    assert args.recipe["alpha"] == 2


@pytest.mark.parametrize("flags, protocol", [
    ("", "clip"),
    ("--protocol dense --clips 2", "dense"),
    ("--crops 1", "multiscale"),  # one of --clips, --crops and --scales asks for all views
])
def test_the_protocol_follows_from_the_flags(parse, flags, protocol):
    args, _ = parse(f"--checkpoint tsn.pt {flags}")
    assert args.protocol == protocol


@pytest.mark.parametrize("flags, expected", [
    ("--scales 22 54", []),
    ("--scales 21 55", ["the scale 21 is far", "the scale 55 is far"]),
    ("--protocol dense --scales 36 55", []),  # it uses the first one alone
    ("--protocol multiscale --test-resize 72", ["the scales follow --test-resize: [64]"]),
])
def test_notes_on_scales(parse, flags, expected):
    """The run has --test-resize 36, --test-crop 32 and the scale 32. Far is below 32 / 1.5 = 21.3
    or above 36 * 1.5 = 54."""
    _, notes = parse(f"--checkpoint tsn.pt {flags}")
    for note, words in zip(notes, expected, strict=True):
        assert words in note


@pytest.mark.parametrize("flags, expected", [
    # the run's own values, given as a flag
    ("--checkpoint tsn.pt --mean 0.485 0.456 0.406", []),
    ("--checkpoint tsn.pt --mean 0.5 0.5 0.5 --frames 4 --loss ce --backbone resnet50",
     ["note: tsn.pt was trained with other settings: mean [0.485, 0.456, 0.406] there, "
      "[0.5, 0.5, 0.5] here; frames 8 there, 4 here; loss bce there, ce here; backbone resnet18 "
      "there, resnet50 here"]),

    # TSM has the tensors of a TSN, so the file fits. Settings that only one has do not count.
    ("--model tsn --weights tsn.pt --recipe toy", []),
    ("--model tsm --weights tsn.pt --recipe toy",
     ["settings: model tsn there, tsm here. --checkpoint tsn.pt takes"]),
])
def test_settings_that_are_not_those_of_the_run_are_named(parse, flags, expected):
    _, notes = parse(flags)
    for note, words in zip(notes, expected, strict=True):
        assert words in note
