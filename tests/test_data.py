"""Lists of every known form, the choice of frames, crops and flips, the data set, the toy, extraction and `check`:
against literal lists, Pillow and torchvision, naive loops, uninterrupted runs. Clips come from ffmpeg's generators.

    python -m pytest tests/test_data.py

Measured: resizing differs from Pillow's by at most 1 of 255 levels; in the mean by 0.26 at worst, on noise resized
from 211x240 to 224x224, and below 0.05 elsewhere. Draft mode changes a training clip of real 426x320 frames by 0.6 to
1.3 levels in the mean.
"""
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as vision

import data
from conftest import ROOT

needs_ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None and os.environ.get("CI") != "true",
                                  reason="the program ffmpeg is missing")


@pytest.fixture
def command(monkeypatch, capsys):
    """data.py's command line without the seconds that a new process takes: arguments -> (status, stdout, stderr)."""
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["data.py", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            data.run_script(data.main)
        return end.value.code or 0, *capsys.readouterr()
    return run


def script(*arguments, cwd, **options):
    """data.py as a user starts it."""
    return subprocess.run([sys.executable, ROOT / "data.py", *map(str, arguments)], cwd=cwd, capture_output=True,
                          text=True, **options)


def one_line(status, err, *parts):
    """Bad input: status 2 and one line on stderr, which holds all the parts."""
    assert status == 2 and len(err.splitlines()) == 1 and err.startswith("data.py: "), err
    for part in parts:
        assert part in err


def write(path, text):
    """A file of text or bytes, its folders made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def write_frames(folder, frames):
    """Arrays (h, w, 3) as img_00001.jpg ...: PNG inside, so that no pixel changes. Pillow goes by the content."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, frame in enumerate(frames, 1):
        Image.fromarray(np.asarray(frame, np.uint8)).save(folder / f"img_{number:05d}.jpg", format="PNG")
    return folder


def pack(folder):
    """Every folder of frames below a folder -> its zip, as extract --pack leaves it."""
    for parent in {file.parent for file in Path(folder).rglob("*.jpg")}:
        with zipfile.ZipFile(f"{parent}.zip", "w") as archive:
            for file in sorted(parent.iterdir()):
                archive.write(file, file.name)
        shutil.rmtree(parent)


def content(folder):
    """{place below a folder: bytes} of every file."""
    files = (file for file in Path(folder).rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


# Lists. Ten invented videos as each project writes them.

TEN = [("cooking/zz-demo0001_3", 90, [7, 264, 311]), ("trimming/zz-demo0002_12", 89, [144]),
       ("adult+female+singing/zz-demo0003_1", 91, [266, 33]), ("raining/zz-demo0004_77", 90, [2]),
       ("playing+sports/zz-demo0005_5", 45, [298, 312, 0, 69, 83]), ("boating/zz-demo-6-2_9", 93, [37, 1]),
       ("running/zz-demo0007_40", 90, [83]), ("opening/zz-demo0008_15", 3, [197, 188]),
       ("climbing/zz-demo0009_2", 87, [241, 280, 92, 8]), ("sleeping/zz-demo0010_8", 90, [240])]
NO_COUNTS = [(path, None, labels) for path, _, labels in TEN]

MMIT = """\
cooking/zz-demo0001_3.mp4,7,264,311
trimming/zz-demo0002_12.mp4,144
adult+female+singing/zz-demo0003_1.mp4,266,33
raining/zz-demo0004_77.mp4,2
playing+sports/zz-demo0005_5.mp4,298,312,0,69,83
boating/zz-demo-6-2_9.mp4,37,1
running/zz-demo0007_40.mp4,83
opening/zz-demo0008_15.mp4,197,188
climbing/zz-demo0009_2.mp4,241,280,92,8
sleeping/zz-demo0010_8.mp4,240
"""
XTEMPORAL_FRAMES = """\
cooking/zz-demo0001_3 90 7,264,311
trimming/zz-demo0002_12 89 144
adult+female+singing/zz-demo0003_1 91 266,33
raining/zz-demo0004_77 90 2
playing+sports/zz-demo0005_5 45 298,312,0,69,83
boating/zz-demo-6-2_9 93 37,1
running/zz-demo0007_40 90 83
opening/zz-demo0008_15 3 197,188
climbing/zz-demo0009_2 87 241,280,92,8
sleeping/zz-demo0010_8 90 240
"""
XTEMPORAL_VIDEOS = """\
cooking/zz-demo0001_3.mp4 90 7,264,311
trimming/zz-demo0002_12.mp4 89 144
adult+female+singing/zz-demo0003_1.mp4 91 266,33
raining/zz-demo0004_77.mp4 90 2
playing+sports/zz-demo0005_5.mp4 45 298,312,0,69,83
boating/zz-demo-6-2_9.mp4 93 37,1
running/zz-demo0007_40.mp4 90 83
opening/zz-demo0008_15.mp4 3 197,188
climbing/zz-demo0009_2.mp4 87 241,280,92,8
sleeping/zz-demo0010_8.mp4 90 240
"""
MMACTION2_FRAMES = """\
cooking/zz-demo0001_3 90 7 264 311
trimming/zz-demo0002_12 89 144
adult+female+singing/zz-demo0003_1 91 266 33
raining/zz-demo0004_77 90 2
playing+sports/zz-demo0005_5 45 298 312 0 69 83
boating/zz-demo-6-2_9 93 37 1
running/zz-demo0007_40 90 83
opening/zz-demo0008_15 3 197 188
climbing/zz-demo0009_2 87 241 280 92 8
sleeping/zz-demo0010_8 90 240
"""
MMACTION2_VIDEOS = """\
cooking/zz-demo0001_3.mp4 7 264 311
trimming/zz-demo0002_12.mp4 144
adult+female+singing/zz-demo0003_1.mp4 266 33
raining/zz-demo0004_77.mp4 2
playing+sports/zz-demo0005_5.mp4 298 312 0 69 83
boating/zz-demo-6-2_9.mp4 37 1
running/zz-demo0007_40.mp4 83
opening/zz-demo0008_15.mp4 197 188
climbing/zz-demo0009_2.mp4 241 280 92 8
sleeping/zz-demo0010_8.mp4 240
"""
MMACTION2_AS_GENERATED = """\
cooking/zz-demo0001_3 90 7 264 311
cooking/zz-demo0001_3 0 7 264 311
trimming/zz-demo0002_12 89 144
trimming/zz-demo0002_12 0 144
adult+female+singing/zz-demo0003_1 91 266 33
adult+female+singing/zz-demo0003_1 0 266 33
raining/zz-demo0004_77 90 2
raining/zz-demo0004_77 0 2
playing+sports/zz-demo0005_5 45 298 312 0 69 83
playing+sports/zz-demo0005_5 0 298 312 0 69 83
"""


@pytest.mark.parametrize("text, named, wanted", [
    (MMIT, "mmit", NO_COUNTS), (XTEMPORAL_FRAMES, "xtemporal", TEN), (XTEMPORAL_VIDEOS, "xtemporal", TEN),
    (MMACTION2_FRAMES, "mmaction2", TEN), (MMACTION2_VIDEOS, "mmaction2", NO_COUNTS),
    (MMACTION2_AS_GENERATED, "mmaction2", TEN[:5])],
    ids=["mmit", "xtemporal_frames", "xtemporal_videos", "mmaction2_frames", "mmaction2_videos", "mmaction2_generated"])
def test_ten_videos_in_every_format(tmp_path, text, named, wanted):
    path = write(tmp_path / "list.txt", text)
    assert data.read_list(path, num_classes=313) == wanted
    assert data.read_list(path, format=named) == wanted


@pytest.mark.parametrize("text, format, wanted", [
    ("a/b.mp4 92 69\n", "xtemporal", [("a/b", 92, [69])]),
    ("a/b.mp4 92 69\n", "mmaction2", [("a/b", None, [92, 69])]),
    ("a/b.mp4 5\nc.mp4 92 69\n", "auto", [("a/b", None, [5]), ("c", None, [92, 69])]),
    ("a 92 69\n", "auto", [("a", 92, [69])]),  # with one label both forms are the same
    ("a 92 69\n", "xtemporal", [("a", 92, [69])]),
    ("a 92 69\n", "mmaction2", [("a", 92, [69])]),
    ("a 92 69\nb 9 1,2\n", "auto", [("a", 92, [69]), ("b", 9, [1, 2])]),  # one comma tells for the whole file
    ("a b.mp4,3\n", "mmit", [("a b", None, [3])]),
    ("a.MP4,3\nb.webm,-1\nc.v2,4\n", "auto", [("a", None, [3]), ("b", None, []), ("c.v2", None, [4])]),
    ("a 9 -1\nb 9 3\n", "auto", [("a", 9, []), ("b", 9, [3])]),
    ("a 9 3,1,3,1,2\n", "auto", [("a", 9, [3, 1, 2])]),  # each id once
    ("s\u00e9rie/\u5199 9 3\n", "auto", [("s\u00e9rie/\u5199", 9, [3])]),
])
def test_format_is_told_per_file_or_named(tmp_path, text, format, wanted):
    assert data.read_list(write(tmp_path / "list.txt", text), format) == wanted


@pytest.mark.parametrize("text", [
    "a 9 1,2\r\nb 8 3\r\n", "a 9 1,2\n\n  \nb 8 3\n\n", "a  9   1,2\nb\t8\t3\n", "a 9 1,2 \nb 8 3  \t\n",
    " a 9 1,2\n  b 8 3", "\ufeffa 9 1,2\nb 8 3\n"],
    ids=["carriage_return", "blank_lines", "runs_of_spaces", "at_the_end", "in_front", "mark"])
def test_white_space_means_nothing(tmp_path, text):
    """mark: the byte order mark with which Windows programs begin a file."""
    path = write(tmp_path / "list.txt", text)
    assert data.read_list(path) == [("a", 9, [1, 2]), ("b", 8, [3])]


@pytest.mark.parametrize("first, second, parts", [
    ("a.mp4,1", "b.mp4,10", ["label 10", "9"]),
    ("a 9 1,2", "b 9 3,10,4", ["label 10", "9"]),
    ("a 9 1 2", "b 9 3 10 4", ["label 10", "9"]),
    ("a.mp4 1 2 3", "b.mp4 99", ["label 99", "9"]),
    ("a 9 1,2", "b 9 -2", ["'-2'"]),
    ("a 9 1,2", "b 9 3,-1", ["'-1'"]),
    ("a 9 1,2", "b 9 -1,-1", ["'-1'"]),
    ("a 9 1 2", "b 9 -1 3", ["'-1'"]),
    ("a.mp4,1", "b.mp4,-2", ["'-2'"]),
    ("a.mp4,1", "b.mp4,3,-1", ["'-1'"]),
    ("a.mp4,1", "b.mp4,-1,2,3", ["'-1'"]),  # three fields, but no category and votes
    ("a 9 1,2", "b 9 2.0", ["'2.0'"]),
    ("a 9 1,2", "b 9 x", ["'x'"]),
    ("a 9 1,2", "b 9.5 1", ["'9.5'"]),
    ("a 9 1,2", "b -1 1", ["'-1'"]),
    ("a 9 1,2", "b -1 -1", ["'-1'"]),
    ("a 9 1,2", "b 9 1,", ["''"]),
    ("a 9 1,2", "b 9 1 2", ["three fields"]),
    ("a 9 1,2", "b 9", ["three fields"]),
    ("a 9 1,2", "b 9 1, 2", ["three fields"]),
    ("a 9 1 2", "b 9", ["no label"]),
    ("a 9 1 2", "b", ["no label"]),
    ("a.mp4 1 2 3", "b.mp4", ["no label"]),
    ("a.mp4,1", "b.mp4", ["no label"]),
    ("a.mp4,1", "b.mp4,", ["''"]),
    ("a.mp4,1", "raining/b.mp4,raining,3,1", ["single-label"]),
    ("a 9 1,2", "../b 9 1", ["../b"]),
    ("a 9 1,2", "b/../../c 9 1", ["b/../../c"]),
    ("a 9 1,2", "/b 9 1", ["/b"]),
])
def test_bad_lines_are_named(tmp_path, first, second, parts):
    path = write(tmp_path / "list.txt", f"{first}\n\n{second}\n")  # the blank line counts
    with pytest.raises(ValueError) as error:
        data.read_list(path, num_classes=10)
    assert str(error.value).startswith(f"{path}:3: "), error.value
    for part in parts:
        assert part in str(error.value)


def test_the_highest_label_is_classes_minus_one(tmp_path):
    path = write(tmp_path / "list.txt", "a 9 0,9\n")
    assert data.read_list(path, num_classes=10) == data.read_list(path) == [("a", 9, [0, 9])]
    with pytest.raises(ValueError, match="label 9"):
        data.read_list(path, num_classes=9)


@pytest.mark.parametrize("text, parts", [
    ("a.mp4 92 69\nb.mp4 90 1\n", ["--format xtemporal", "--format mmaction2"]),
    ("singing/a.mp4,singing,3,1\nraining/b.mp4,raining,5,0\n", [":1:", "single-label"]),
    (b"caf\xe9 9 1\n", ["UTF-8"]), (b"\xff\xd8\xff\xe0\x00\x10JFIF", ["UTF-8"]), ("", ["no video"]),
    ("\n  \r\n", ["no video"]), ("a 0 1,2\n", ["no video"])],
    ids=["ambiguous", "votes", "latin_1", "picture", "empty", "blank", "no_frames"])
def test_bad_lists_are_named(tmp_path, text, parts):
    path = write(tmp_path / "list.txt", text)
    with pytest.raises(ValueError) as error:
        data.read_list(path)
    for part in [str(path), *parts]:
        assert part in str(error.value)


def test_lines_left_out_are_counted(tmp_path):
    write(tmp_path / "categories.txt", "a\nb\nc\n")
    write(tmp_path / "train.txt", "p 9 0,1\n\nq 0 1\np 9 2\nr 8 -1\n r 8 -1 \nq 7 2\n")
    videos = data.VideoList(tmp_path, "train", CLIP, train=True)
    assert videos.videos == [("p", 9, [0, 1]), ("r", 8, []), ("q", 7, [2])]  # the first whole line of each
    assert len(videos) == 3 and videos.left_out == 3


@pytest.mark.parametrize("text, wanted", [
    ("adult+female+singing\neating/feeding\n", ["adult+female+singing", "eating/feeding"]),
    ("eating/feeding,0\ncooking,1\n", ["eating/feeding", "cooking"]),
    ("cooking,1\neating/feeding,0\n", ["eating/feeding", "cooking"]),
    ("\r\n a \r\n\r\nb\r\n", ["a", "b"]), ("b,1\r\n\r\na,0\r\n", ["a", "b"])])
def test_categories_in_both_forms(tmp_path, text, wanted):
    write(tmp_path / "categories.txt", text)
    assert data.read_categories(tmp_path) == wanted


@pytest.mark.parametrize("text", ["", "\n\n", "a,0\nb,2\n", "a,1\nb,2\n", "a,0\nb,0\n", "a,0\nb,1\nc,1\n",
                                  b"caf\xe9\n"],
                         ids=["empty", "blank", "gap", "from_1", "twice", "last_twice", "latin_1"])
def test_bad_categories_are_named(tmp_path, text):
    path = write(tmp_path / "categories.txt", text)
    with pytest.raises(ValueError) as error:
        data.read_categories(tmp_path)
    assert str(path) in str(error.value)


# Which frames.

@pytest.mark.parametrize("num_frames, segments, wanted", [
    (90, 5, [9, 27, 45, 63, 81]), (90, 8, [5, 16, 28, 39, 50, 61, 73, 84]), (24, 8, [1, 4, 7, 10, 13, 16, 19, 22]),
    (8, 8, [0, 1, 2, 3, 4, 5, 6, 7]), (5, 8, [0, 0, 1, 2, 2, 3, 4, 4]), (3, 5, [0, 0, 1, 2, 2]), (1, 8, [0] * 8),
    (90, 1, [45])])
def test_middle_frames(num_frames, segments, wanted):
    indices = data.segment_indices(num_frames, segments)
    assert indices.tolist() == wanted and indices.dtype.kind == "i"


def test_middle_frames_are_the_peers():
    for segments in (1, 3, 5, 8, 16):
        for num_frames in range(1, 400):
            floats = [int(num_frames / segments / 2 + k * num_frames / segments) for k in range(segments)]
            assert data.segment_indices(num_frames, segments).tolist() == floats


class Constant:
    """A generator whose every draw is the same."""

    def __init__(self, value):
        self.value = value

    def random(self, size=None):
        return np.full(size, self.value)


@pytest.mark.parametrize("num_frames, first, last", [
    (90, [0, 18, 36, 54, 72], [17, 35, 53, 71, 89]), (92, [0, 18, 36, 55, 73], [18, 36, 55, 73, 91]),
    (3, [0, 0, 1, 1, 2], [0, 1, 1, 2, 2]), (1, [0] * 5, [0] * 5)])
def test_random_frames_at_their_ends(num_frames, first, last):
    assert data.segment_indices(num_frames, 5, Constant(0.0)).tolist() == first
    assert data.segment_indices(num_frames, 5, Constant(1 - 1e-9)).tolist() == last
    assert data.segment_indices(num_frames, 5, Constant(np.nextafter(1, 0)))[-1] == num_frames - 1  # rounded up


@pytest.mark.parametrize("segments", [1, 3, 5, 8, 16])
@pytest.mark.parametrize("num_frames", [1, 3, 8, 24, 90, 97])
def test_random_frames_stay_in_their_part_and_reach_every_frame(num_frames, segments):
    rng = np.random.default_rng(0)
    drawn = np.array([data.segment_indices(num_frames, segments, rng) for _ in range(2000)])
    assert drawn.dtype.kind == "i" and (np.diff(drawn, axis=1) >= 0).all()
    k = np.arange(segments)
    assert (drawn >= k * num_frames // segments).all()
    assert (drawn < -(-(k + 1) * num_frames // segments)).all()
    assert set(drawn.flat) == set(range(num_frames))  # the last frames too, which the peers never draw


@pytest.mark.parametrize("arguments, wanted", [
    ((90, 5, 2, 13), [13, 15, 17, 19, 21]), ((5, 8, 1, 3), [3, 4, 0, 1, 2, 3, 4, 0]), ((10, 4, 8, 0), [0, 8, 6, 4]),
    ((1, 3, 2, 0), [0, 0, 0]), ((64, 4, 21, 0), [0, 21, 42, 63])])
def test_clips_wrap(arguments, wanted):
    indices = data.clip_indices(*arguments)
    assert indices.tolist() == wanted and indices.dtype.kind == "i"


@pytest.mark.parametrize("arguments, wanted", [
    ((90, 32, 2, 10), [0, 2, 5, 8, 11, 14, 17, 20, 23, 26]), ((90, 44, 2, 10), [0, 0, 0, 0, 0, 1, 1, 1, 1, 2]),
    ((90, 32, 2, 1), [13]), ((90, 44, 2, 1), [1]), ((50, 32, 2, 3), [0, 0, 0]), ((50, 32, 2, 1), [0]),
    ((64, 32, 2, 2), [0, 0]), ((65, 32, 2, 2), [0, 1])])
def test_starts_of_clips(arguments, wanted):
    starts = data.clip_starts(*arguments)
    assert np.asarray(starts).tolist() == wanted and starts.dtype.kind == "i"


@pytest.mark.parametrize("window", [32, 64, 88])
def test_starts_of_ten_clips_are_linspace(window):
    for num_frames in range(1, 600):
        room = max(0, num_frames - window)
        assert data.clip_starts(num_frames, window // 2, 2, 10).tolist() == np.linspace(0, room, 10, dtype=int).tolist()


@pytest.mark.parametrize("num_frames, starts, centre", [(64, [0], 0), (65, [0, 1], 0), (70, range(7), 3), (50, [0], 0)])
def test_clip_for_training_starts_anywhere_and_for_evaluation_in_the_middle(num_frames, starts, centre):
    recipe = {"sampling": "clip", "frames": 32, "stride": 2}
    rng = np.random.default_rng(0)
    drawn = {tuple(data.sample_indices(num_frames, recipe, rng)) for _ in range(200)}
    assert drawn == {tuple((start + 2 * i) % num_frames for i in range(32)) for start in starts}
    assert tuple(data.sample_indices(num_frames, recipe)) == tuple((centre + 2 * i) % num_frames for i in range(32))


def test_segments_ignore_the_stride():
    recipe = {"sampling": "segments", "frames": 5, "stride": 7}
    assert data.sample_indices(90, recipe).tolist() == [9, 27, 45, 63, 81]
    drawn = data.sample_indices(90, recipe, np.random.default_rng(3))
    assert drawn.tolist() == data.segment_indices(90, 5, np.random.default_rng(3)).tolist()


# Which pixels.

# The 13 places by name: corners and centre, middles of the edges, centres of the quarters; in quarters of the room.
THIRTEEN = {(0, 0), (4, 0), (0, 4), (4, 4), (2, 2), (0, 2), (4, 2), (2, 4), (2, 0), (1, 1), (3, 1), (1, 3), (3, 3)}


def legal_boxes(width, height, sides):
    """All boxes (x, y, w, h) of TSN's multi-scale crop from the four sides: 10 pairs, 13 places."""
    pairs = [(w, h) for i, w in enumerate(sides) for j, h in enumerate(sides) if i - j in (-1, 0, 1)]
    return {(px * ((width - w) // 4), py * ((height - h) // 4), w, h) for w, h in pairs for px, py in THIRTEEN}


@pytest.mark.parametrize("width, height, target, sides", [
    (426, 320, 224, [320, 280, 240, 211]), (320, 426, 224, [320, 280, 240, 211]), (340, 256, 224, [256, 224, 192, 168]),
    (426, 320, 112, [320, 280, 240, 211]), (600, 254, 224, [254, 224, 190, 167]),  # 222 is 2 from 224
    (600, 258, 224, [258, 224, 193, 170]), (600, 253, 224, [253, 221, 189, 166]),  # 225; 221 is 3 from 224
    (600, 260, 224, [260, 227, 195, 171]), (600, 226, 224, [224, 197, 169, 149]),  # 227 is 3 from 224; 226
    (600, 222, 224, [222, 194, 166, 146]),  # 224 would not fit into 222
    (40, 36, 32, [36, 32, 27, 23])])
def test_every_pair_and_place_of_the_multiscale_crop(width, height, target, sides):
    rng = np.random.default_rng(0)
    drawn = {tuple(map(int, data.multiscale_box(width, height, target, rng))) for _ in range(3000)}
    assert drawn == legal_boxes(width, height, sides)
    assert len({(w, h) for _, _, w, h in drawn}) == 10


def test_multiscale_crop_is_uniform_over_pairs_and_places():
    rng = np.random.default_rng(0)
    boxes = [data.multiscale_box(426, 320, 224, rng) for _ in range(13000)]
    pairs = np.unique([w * 1000 + h for _, _, w, h in boxes], return_counts=True)[1]
    places = [(x // ((426 - w) // 4), y // ((320 - h) // 4)) for x, y, w, h in boxes if h < 320]
    places = np.unique([x * 10 + y for x, y in places], return_counts=True)[1]
    for counts, kinds in ((pairs, 10), (places, 13)):  # within 5 standard deviations
        assert len(counts) == kinds and (abs(counts - counts.sum() / kinds) < 5 * np.sqrt(counts.sum() / kinds)).all()


def test_multiscale_crop_stays_inside_any_frame():
    rng = np.random.default_rng(1)
    for _ in range(3000):
        width, height = (int(side) for side in rng.integers(2, 500, 2))
        x, y, w, h = data.multiscale_box(width, height, int(rng.integers(1, 300)), rng)
        assert x >= 0 and y >= 0 and w >= 1 and h >= 1 and x + w <= width and y + h <= height


def noise(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


@pytest.mark.parametrize("width, height, size, wanted", [
    (426, 320, (224, 224), (224, 224)), (426, 320, (112, 112), (112, 112)), (211, 240, (224, 224), (224, 224)),
    (426, 320, 256, (340, 256)), (320, 426, 256, (256, 340)), (426, 320, 128, (170, 128)), (40, 36, 64, (71, 64)),
    (1280, 720, 160, (284, 160)), (320, 320, 160, (160, 160)), (340, 256, 256, (340, 256))])
def test_resize_is_pillows(width, height, size, wanted):
    y, x = np.mgrid[:height, :width]
    smooth = np.stack([255 * x / width, 255 * y / height, 127 + 127 * np.sin(x / 9 + y / 7)], -1).astype(np.uint8)
    frames = np.stack([noise(0, height, width, 3), smooth])
    resized = data.resize(torch.from_numpy(frames), size)
    assert resized.dtype == torch.uint8 and tuple(resized.shape) == (2, wanted[1], wanted[0], 3)
    for frame, ours in zip(frames, resized.numpy().astype(int)):
        difference = abs(ours - np.asarray(Image.fromarray(frame).resize(wanted, Image.BILINEAR)))
        assert difference.max() <= 1 and difference.mean() < (0.3 if (width, height) == (211, 240) else 0.05)


@pytest.mark.parametrize("short", [112, 128, 160, 256])
def test_resize_rounds_the_long_side_as_torchvision(short):
    for width, height in ((426, 320), (320, 426), (568, 320), (569, 320), (320, 1023), (321, 320), (37, 23)):
        theirs = vision.resize(Image.new("RGB", (width, height)), short).size
        assert tuple(data.resize(torch.zeros(1, height, width, 3, dtype=torch.uint8), short).shape[2:0:-1]) == theirs


def test_frames_are_read_by_index_and_decoded_once(tmp_path, monkeypatch):
    frames = noise(0, 4, 5, 6, 3)
    write_frames(tmp_path, frames)
    opened, opens = [], Image.open
    monkeypatch.setattr(Image, "open", lambda path: opened.append(Path(path).name) or opens(path))
    read = data.read_frames(tmp_path, np.array([3, 0, 3, 3]))
    assert read.dtype == torch.uint8 and np.array_equal(read, frames[[3, 0, 3, 3]])
    assert sorted(opened) == ["img_00001.jpg", "img_00004.jpg"]


def test_frames_of_other_colour_modes_become_rgb(tmp_path):
    gray = noise(0, 5, 6)
    Image.fromarray(gray).save(tmp_path / "img_00001.jpg", format="PNG")
    assert np.array_equal(data.read_frames(tmp_path, [0])[0], np.stack([gray] * 3, -1))


def found(clip, candidates):
    """The keys of {key: frames (T, h, w, 3)} that a clip is, each value within 1."""
    clip = clip.numpy().astype(np.int16)
    return [key for key, frames in candidates.items() if abs(frames - clip).max() <= 1]


def windows(folder, indices, sizes):
    """{(x, y, w, h, target w, target h, flipped): frames} cut, resized and flipped by Pillow, frame by frame."""
    images = [Image.open(folder / f"img_{i + 1:05d}.jpg").convert("RGB") for i in indices]
    cut = {}
    for x, y, w, h, *size in sizes:
        frames = [image.crop((x, y, x + w, y + h)).resize(size, Image.BILINEAR) for image in images]
        for flipped in (False, True):
            cut[x, y, w, h, *size, flipped] = np.stack([
                np.asarray(vision.hflip(frame) if flipped else frame).astype(np.int16) for frame in frames])
    return cut


@pytest.mark.parametrize("width, height", [(48, 36), (36, 48)])
def test_multiscale_clip_has_one_legal_crop_and_one_flip(tmp_path, width, height):
    """Searched for among all that Pillow cuts: exactly one of the legal boxes, flipped or not, explains all frames."""
    recipe = {"augment": "multiscale", "crop": 32, "flip": True}
    write_frames(tmp_path, noise(0, 3, height, width, 3))
    boxes = legal_boxes(width, height, [36, 32, 27, 23])  # 31 is within 2 of 32
    candidates = windows(tmp_path, [2, 0], [(*box, 32, 32) for box in boxes])
    seen = []
    for draw in range(40):
        clip = data.make_clip(tmp_path, np.array([2, 0]), recipe, np.random.default_rng(draw))
        assert clip.dtype == torch.uint8 and tuple(clip.shape) == (2, 32, 32, 3) and clip.is_contiguous()
        matches = found(clip, candidates)
        assert len(matches) == 1
        seen += matches
    assert len(set(seen)) > 30 and 10 < sum(key[-1] for key in seen) < 30
    straight = [data.make_clip(tmp_path, np.array([2, 0]), {**recipe, "flip": False}, np.random.default_rng(draw))
                for draw in range(40)]
    assert not any(found(clip, candidates)[0][-1] for clip in straight)


def test_jittered_clip_has_every_size_and_offset(tmp_path):
    """Short sides 20 to 24 inclusive, of which 16 pixels are 32, 30, 29, 28 and 27 of the 40 stored; each window lies
    anywhere, up to both ends of both axes, and is the same for all frames."""
    recipe = {"augment": "jitter", "jitter": (20, 24), "crop": 16, "flip": True}
    write_frames(tmp_path, noise(0, 3, 40, 48, 3))
    places = [(x, y, side, side, 16, 16) for side in (32, 30, 29, 28, 27)
              for x in range(48 - side + 1) for y in range(40 - side + 1)]
    cut = windows(tmp_path, [1, 2], places)
    keys, frames = list(cut), np.stack(list(cut.values()))
    seen = []
    for draw in range(600):
        clip = data.make_clip(tmp_path, np.array([1, 2]), recipe, np.random.default_rng([7, draw]))
        assert tuple(clip.shape) == (2, 16, 16, 3) and clip.is_contiguous()
        corner = abs(frames[:, 0, :2, :2] - clip[0, :2, :2].numpy().astype(np.int16)).max((1, 2, 3))
        matches = found(clip, {keys[i]: frames[i] for i in np.flatnonzero(corner <= 1)})
        assert len(matches) == 1
        seen += matches
    assert {side for _, _, side, *_ in seen} == {32, 30, 29, 28, 27}
    for side in (32, 30, 29, 28, 27):
        xs, ys = zip(*[(x, y) for x, y, one, *_ in seen if one == side])
        assert (min(xs), max(xs), min(ys), max(ys)) == (0, 48 - side, 0, 40 - side)
    assert 240 < sum(flipped for *_, flipped in seen) < 360


def test_jittered_clip_is_the_crop_of_a_resized_frame(tmp_path):
    """At half the stored size, where both have whole pixels: the window at 2x, 2y is the crop at x, y of the frame that
    Pillow resized, but for its rim, where the resized frame also knows what lies outside. At any size the pixels of a
    ramp tell where each was taken: the distance is the exact one to within half a stored pixel over the clip's side."""
    frame = noise(1, 40, 48, 3)
    write_frames(tmp_path / "half", [frame])
    half = np.asarray(Image.fromarray(frame).resize((24, 20), Image.BILINEAR)).astype(np.int16)
    recipe, even = {"augment": "jitter", "jitter": (20, 20), "crop": 16, "flip": False}, 0
    for draw in range(40):
        clip = data.make_clip(tmp_path / "half", [0], recipe, np.random.default_rng(draw))[0].numpy().astype(np.int16)
        x, y, *_ = data.jitter_box(48, 40, 16, (20, 20), np.random.default_rng(draw))
        if x % 2 == y % 2 == 0:
            even += 1
            assert abs(clip - half[y // 2 : y // 2 + 16, x // 2 : x // 2 + 16])[1:-1, 1:-1].max() <= 1
    assert even > 3
    y, x = np.mgrid[:180, :240]
    write_frames(tmp_path / "ramp", [np.stack([x, y, 0 * x], -1)])
    for draw in range(60):
        clip = data.make_clip(tmp_path / "ramp", [0], {**recipe, "jitter": (70, 90), "crop": 64},
                              np.random.default_rng(draw))[0].numpy().astype(float)
        exact = 180 / np.random.default_rng(draw).integers(70, 91)  # the first draw is the short side
        for row in (clip[32, 1:-1, 0], clip[1:-1, 32, 1]):  # over 61 steps, each value rounded by up to 1
            assert abs((row[-1] - row[0]) / 61 - exact) < 0.5 / 64 + 2 / 61


def test_draft_mode_reads_the_frames_at_half_their_size(tmp_path):
    """Where the stored short side is at least twice the largest of `jitter`, in training, for JPEGs: the clip is then
    the one of frames stored at half the size."""
    y, x = np.mgrid[:80, :96]
    waves = np.stack([np.sin(x / 9), np.cos(y / 7), np.sin((x + y) / 11)], -1)
    frames = [127 + 60 * waves + noise(i, 80, 96, 3) / 8 for i in range(3)]
    for i, frame in enumerate(frames, 1):
        image = Image.fromarray(frame.astype(np.uint8))
        image.save(write(tmp_path / "jpeg" / f"img_{i:05d}.jpg", ""), quality=90)
        image.crop((0, 0, 96, 79)).save(write(tmp_path / "less" / f"img_{i:05d}.jpg", ""), quality=90)
    halves = []
    for i in (1, 2, 3):
        with Image.open(tmp_path / "jpeg" / f"img_{i:05d}.jpg") as image:
            image.draft("RGB", (48, 40))
            halves.append(np.asarray(image))
    assert halves[0].shape == (40, 48, 3)
    write_frames(tmp_path / "half", halves)
    shutil.copytree(tmp_path / "jpeg", tmp_path / "zipped")
    pack(tmp_path / "zipped")
    plain = {"augment": "jitter", "jitter": (30, 40), "crop": 28, "flip": True, "test_resize": 40, "test_crop": 36}
    draft = {**plain, "draft": True}

    def clip(folder, recipe, draw=None):
        rng = None if draw is None else np.random.default_rng(draw)
        return data.make_clip(tmp_path / folder, [2, 0], recipe, rng)

    for draw in range(10):
        assert torch.equal(clip("jpeg", draft, draw), clip("half", plain, draw))
        assert torch.equal(clip("zipped", draft, draw), clip("half", plain, draw))
        assert not torch.equal(clip("jpeg", draft, draw), clip("jpeg", plain, draw))
        larger = {"jitter": (30, 41)}  # 41 of 80 is more than half
        assert torch.equal(clip("jpeg", {**draft, **larger}, draw), clip("jpeg", {**plain, **larger}, draw))
        assert torch.equal(clip("jpeg", {**draft, "draft": False}, draw), clip("jpeg", plain, draw))
        assert torch.equal(clip("less", draft, draw), clip("less", plain, draw))  # 40 of 79 is more than half
        assert torch.equal(clip("half", draft, draw), clip("half", plain, draw))  # PNG inside
    assert torch.equal(clip("jpeg", draft), clip("jpeg", plain))  # evaluation
    whole = data.resize(data.read_frames(tmp_path / "jpeg", [0, 1, 2], lambda w, h: (8, 4, 72, 72)), (28, 28)).int()
    small = data.resize(data.read_frames(tmp_path / "jpeg", [0, 1, 2], lambda w, h: (4, 2, 36, 36), draft=40), (28, 28))
    assert 0 < abs(whole - small.int()).float().mean() < 2


@pytest.mark.parametrize("width, height, crop, left, top", [
    (340, 256, 224, 58, 16), (256, 340, 224, 16, 58), (341, 256, 224, 58, 16), (343, 256, 224, 60, 16),  # .5 to even
    (455, 256, 256, 100, 0), (256, 256, 256, 0, 0)])
def test_centre_crop_is_torchvisions(tmp_path, width, height, crop, left, top):
    """On an image whose pixels are their coordinates, at its own size."""
    y, x = np.mgrid[:height, :width]
    image = np.stack([x % 256, y % 256, x // 256 + 2 * (y // 256)], -1)
    write_frames(tmp_path, [image])
    clip = data.make_clip(tmp_path, [0], {"test_resize": 256, "test_crop": crop, "flip": True})
    assert np.array_equal(clip[0], image[top : top + crop, left : left + crop])
    assert np.array_equal(clip[0], np.asarray(vision.center_crop(Image.fromarray(image.astype(np.uint8)), crop)))


@pytest.mark.parametrize("short, crop, left, top, resized", [
    (256, 224, 58, 16, (340, 256)), (128, 112, 29, 8, (170, 128))])
def test_evaluation_view_of_a_frame(tmp_path, short, crop, left, top, resized):
    """426x320 -> 340x256 -> 224x224 from (58, 16), and SlowFast's."""
    frame = noise(0, 320, 426, 3)
    write_frames(tmp_path, [frame, 255 - frame])
    clip = data.make_clip(tmp_path, [1, 0], {"test_resize": short, "test_crop": crop, "flip": True})
    assert tuple(clip.shape) == (2, crop, crop, 3) and clip.dtype == torch.uint8 and clip.is_contiguous()
    for ours, theirs in zip(clip.numpy().astype(int), (255 - frame, frame)):
        theirs = Image.fromarray(theirs).resize(resized, Image.BILINEAR).crop((left, top, left + crop, top + crop))
        assert abs(ours - np.asarray(theirs)).max() <= 1


# The toy.

OPPOSITE = {"moving+right": "moving+left", "moving+left": "moving+right", "moving+down": "moving+up",
            "moving+up": "moving+down", "moving+down+right": "moving+up+left", "moving+up+left": "moving+down+right",
            "moving+up+right": "moving+down+left", "moving+down+left": "moving+up+right"}


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A toy of 40 videos for training, 10 for validation. Not to be changed: tests share it."""
    out = tmp_path_factory.mktemp("toy") / "toy"
    data.draw_toy(out, videos=40, seed=3)
    return out


def listed(folder, split):
    """{path: set of category names} of a toy list, read here line by line."""
    names = (folder / "categories.txt").read_text().split()
    lines = [line.split(" ") for line in (folder / f"{split}.txt").read_text().splitlines()]
    assert all(len(line) == 3 and line[1] == "24" for line in lines)
    return {path: {names[int(label)] for label in labels.split(",")} for path, _, labels in lines}


def test_toy_has_the_form_of_real_data(toy):
    assert sorted(file.name for file in toy.iterdir()) == ["categories.txt", "frames", "train.txt", "val.txt"]
    train, val = listed(toy, "train"), listed(toy, "val")
    assert len(train) == 40 and len(val) == 10 and not set(train) & set(val)
    assert {name for labels in train.values() for name in labels} == set((toy / "categories.txt").read_text().split())
    folders = {file.parent.relative_to(toy / "frames").as_posix() for file in (toy / "frames").rglob("*.jpg")}
    assert folders == set(train) | set(val)
    for path in folders:
        names = sorted(os.listdir(toy / "frames" / path))
        assert names == [f"img_{number:05d}.jpg" for number in range(1, 25)]
    with Image.open(toy / "frames" / path / "img_00001.jpg") as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (40, 36))


def test_toy_labels_are_motions_on_different_axes_and_seldom_a_ground(toy):
    for split in ("train", "val"):
        videos = listed(toy, split)
        grounds = [labels - set(OPPOSITE) for labels in videos.values()]
        assert 5 * sum(map(bool, grounds)) <= len(videos) and max(map(len, grounds)) == 1
        for labels in videos.values():
            motions = labels & set(OPPOSITE)
            assert len(motions) in (1, 2) and not motions & {OPPOSITE[motion] for motion in motions}
        assert {len(labels & set(OPPOSITE)) for labels in videos.values()} == {1, 2}


def test_toy_of_the_usual_size_has_a_ground_in_a_fifth():
    """Labels are drawn before pixels: a frame a video suffices to count them."""
    for rows in (range(1200), range(1200, 1350)):
        labels = [data.draw_video(row, np.random.default_rng([0, row]), frames=1)[1] for row in rows]
        assert 5 * sum(any(label >= len(OPPOSITE) for label in some) for some in labels) == len(labels)
        counts = np.bincount(np.concatenate(labels), minlength=10)
        assert len(counts) == 10 and counts.min() > 0


def test_toy_validation_holds_each_video_with_its_reversal(toy):
    videos = listed(toy, "val")
    forward = [path for path in videos if not path.endswith("_reversed")]
    assert set(videos) == {*forward, *(f"{path}_reversed" for path in forward)} and len(forward) == 5
    for path in forward:
        ours, theirs = ([(toy / "frames" / name / f"img_{number:05d}.jpg").read_bytes() for number in range(1, 25)]
                        for name in (path, f"{path}_reversed"))
        assert ours == theirs[::-1] and ours != theirs
        assert videos[f"{path}_reversed"] == {OPPOSITE.get(label, label) for label in videos[path]}


@pytest.mark.parametrize("recipe", [{"sampling": "segments", "frames": 8, "stride": 1},
                                    {"sampling": "clip", "frames": 16, "stride": 1}], ids=["segments", "clip"])
def test_toy_video_and_reversal_have_the_same_middle_frames(toy, recipe):
    indices = data.sample_indices(24, recipe)
    for path in listed(toy, "val"):
        if not path.endswith("_reversed"):
            ours, theirs = ([(toy / "frames" / name / f"img_{i + 1:05d}.jpg").read_bytes() for i in indices]
                            for name in (path, f"{path}_reversed"))
            assert sorted(ours) == sorted(theirs) and ours != theirs


def test_toy_labels_are_what_moves():
    """Where the one mover of every other video goes, from its pixels: the shift that best lays a frame on the next."""
    for row in range(0, 40, 2):
        video, labels = data.draw_video(row, np.random.default_rng([0, row]))
        moving = abs(video.astype(float) - np.median(video, axis=0)).max(-1) > 20  # the ground is at rest
        spectrum = np.fft.fft2(moving)
        shift = np.fft.ifft2(spectrum[3:] * spectrum[:-3].conj()).real.sum(0)  # over 3 frames, on the torus
        down, right = np.unravel_index(shift.argmax(), shift.shape)
        down, right = int(down + 18) % 36 - 18, int(right + 20) % 40 - 20
        words = ["up" if down < 0 else "down"] * (abs(down) > 1) + ["left" if right < 0 else "right"] * (abs(right) > 1)
        assert data.TOY_CATEGORIES[labels[0]] == "+".join(["moving", *words])


def test_toy_depends_on_its_seed_alone(tmp_path):
    for name, seed in (("one", 5), ("same", 5), ("other", 6)):
        data.draw_toy(tmp_path / "new" / name, videos=8, seed=seed)
    one, same, other = (content(tmp_path / "new" / name) for name in ("one", "same", "other"))
    assert one == same and len(one) == 10 * 24 + 3
    frames = [path for path in one if path.endswith(".jpg")]
    assert set(one) == set(other) and not any(one[path] == other[path] for path in frames)
    assert sorted(os.listdir(tmp_path / "new")) == ["one", "other", "same"]


def test_toy_stopped_half_way_leaves_nothing(tmp_path, monkeypatch):
    saves, save = [], Image.Image.save

    def fail(image, file, **options):
        saves.append(file)
        if len(saves) > 30:
            raise OSError("No space left on device")
        save(image, file, **options)

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="No space left"):
        data.draw_toy(tmp_path / "toy", videos=8)
    assert len(saves) == 31 and os.listdir(tmp_path) == []


# The data set.

SEGMENTS = {"frames": 8, "stride": 1, "sampling": "segments", "augment": "multiscale", "crop": 32, "jitter": (32, 36),
            "flip": True, "test_resize": 36, "test_crop": 32}
CLIP = {**SEGMENTS, "frames": 6, "stride": 3, "sampling": "clip", "augment": "jitter"}


def folder_of(tmp_path, lines, split="train", categories="a\nb\nc\n", frames=3):
    """A data folder of small frames, one folder for each path of the list lines."""
    write(tmp_path / "categories.txt", categories)
    write(tmp_path / f"{split}.txt", "".join(f"{line}\n" for line in lines))
    for row, line in enumerate(lines):
        if line.strip():
            write_frames(tmp_path / "frames" / line.split()[0], noise(row, frames, 36, 40, 3))
    return tmp_path


@pytest.mark.parametrize("recipe", [SEGMENTS, CLIP], ids=["segments", "clip"])
@pytest.mark.parametrize("split, train", [("train", True), ("val", False)])
def test_items(toy, recipe, split, train):
    videos = data.VideoList(toy, split, recipe, train=train)
    listing, names = listed(toy, split), (toy / "categories.txt").read_text().split()
    assert len(videos) == len(listing) and videos.left_out == 0
    for row, path in enumerate(listing):
        clip, labels, number = videos[row]
        assert clip.dtype == torch.uint8 and tuple(clip.shape) == (recipe["frames"], 32, 32, 3) and number == row
        assert labels.dtype == torch.float32 and tuple(labels.shape) == (10,)
        assert {names[i] for i in range(10) if labels[i] == 1} == listing[path] and labels.sum() == len(listing[path])
        rng = np.random.default_rng([0, 0, row]) if train else None
        indices = data.sample_indices(24, recipe, rng)
        assert torch.equal(clip, data.make_clip(toy / "frames" / path, indices, recipe, rng))


@pytest.fixture(scope="session")
def packed_toy(toy):
    """The same toy, its frames in zips."""
    folder = shutil.copytree(toy, toy.parent / "packed")
    pack(folder / "frames")
    return folder


@pytest.mark.filterwarnings("ignore:This DataLoader will create 8 worker")
@pytest.mark.parametrize("recipe", [SEGMENTS, CLIP], ids=["segments", "clip"])
def test_items_are_the_same_in_any_worker_in_any_order_and_packed(toy, packed_toy, recipe):
    assert not list(packed_toy.rglob("*.jpg")) and len(list(packed_toy.rglob("*.zip"))) == 50
    plain, packed = (data.VideoList(folder, "train", recipe, train=True, seed=4) for folder in (toy, packed_toy))
    wanted = [*range(0, 40, 3), *range(40, 80, 3), *range(200, 240, 3)]  # epochs 0, 1 and 5
    ways = [(plain, wanted, 0), (plain, wanted, 2), (plain, wanted, 8), (plain, wanted[::-1], 0),
            (packed, wanted, 0), (packed, wanted, 2), (packed, wanted, 8)]
    loaded = [[item for batch in torch.utils.data.DataLoader(videos, 4, sampler=order, num_workers=workers,
                                                             collate_fn=list) for item in batch]
              for videos, order, workers in ways]
    loaded[3].reverse()
    assert [row for _, _, row in loaded[0]] == [index % 40 for index in wanted]
    for other in loaded[1:]:
        assert len(other) == len(wanted)
        for ours, theirs in zip(loaded[0], other):
            assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1]) and ours[2] == theirs[2]


def test_packed_video_in_evaluation(toy, packed_toy):
    """Its one view, the frames that views ask for, and no file left open."""
    plain, packed = (data.VideoList(folder, "val", SEGMENTS, train=False) for folder in (toy, packed_toy))
    files = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for row in range(10):
        assert torch.equal(plain[row][0], packed[row][0])
    assert not files or len(os.listdir("/proc/self/fd")) == files
    path = plain.videos[3].path
    assert torch.equal(data.read_frames(packed_toy / "frames" / path, [23, 0, 23]),
                       data.read_frames(toy / "frames" / path, [23, 0, 23]))


def test_folder_goes_before_a_zip_of_its_name(tmp_path):
    write_frames(tmp_path / "v", noise(1, 2, 5, 6, 3))
    pack(tmp_path)
    write_frames(tmp_path / "v", noise(2, 2, 5, 6, 3))
    assert np.array_equal(data.read_frames(tmp_path / "v", [0, 1]), noise(2, 2, 5, 6, 3))
    shutil.rmtree(tmp_path / "v")
    assert np.array_equal(data.read_frames(tmp_path / "v", [0, 1]), noise(1, 2, 5, 6, 3))


def test_epochs_and_seeds_draw_differently(toy):
    videos = data.VideoList(toy, "train", SEGMENTS, train=True, seed=4)
    other = data.VideoList(toy, "train", SEGMENTS, train=True, seed=5)
    for row in range(0, 40, 5):
        (first, labels, _), (second, same, number) = videos[row], videos[40 + row]
        assert not torch.equal(first, second) and torch.equal(labels, same) and number == row
        assert not torch.equal(first, other[row][0])
        rng = np.random.default_rng([4, 1, row])  # DESIGN: seed, epoch, row
        indices = data.sample_indices(24, SEGMENTS, rng)
        assert torch.equal(second, data.make_clip(toy / "frames" / videos.videos[row].path, indices, SEGMENTS, rng))
    val = data.VideoList(toy, "val", SEGMENTS, train=False)
    assert torch.equal(val[0][0], val[10][0])  # evaluation has no epochs


def test_views_are_given_the_frames(toy):
    def views(read, num_frames, path):
        return read([2, 0]), num_frames, path

    videos = data.VideoList(toy, "val", SEGMENTS, train=False, views=views)
    row, (frames, count, path) = videos[3]
    assert (row, count, path) == (3, 24, list(listed(toy, "val"))[3])
    assert torch.equal(frames, data.read_frames(toy / "frames" / path, [2, 0]))


def test_unlabelled_and_short_videos(tmp_path):
    folder = folder_of(tmp_path, ["p 1 -1", "q 3 0,2"], split="test")
    videos = data.VideoList(folder, "test", SEGMENTS, train=False)
    assert videos[0][1].tolist() == [0, 0, 0] and videos[1][1].tolist() == [1, 0, 1]
    assert all(torch.equal(frame, videos[0][0][0]) for frame in videos[0][0])
    assert tuple(videos[0][0].shape) == (8, 32, 32, 3)


def test_list_without_frame_counts_is_refused(tmp_path):
    folder = folder_of(tmp_path, ["p.mp4,0"])
    with pytest.raises(ValueError, match="train.txt.*extract --list"):
        data.VideoList(folder, "train", SEGMENTS, train=True)


def damage(folder, kind):
    """Break the third frame of a folder, or all of it."""
    file = folder / "img_00003.jpg"
    if kind == "folder":
        shutil.rmtree(folder)
    elif kind == "missing":
        file.unlink()
    elif kind == "size":
        Image.fromarray(noise(9, 40, 48, 3)).save(file, format="PNG")
    else:
        png = file.read_bytes()
        Image.fromarray(noise(9, 36, 40, 3)).save(file, format="JPEG")
        whole = file.read_bytes()
        write(file, {"truncated": whole[: len(whole) // 2], "empty": b"", "text": b"not an image\n",
                     "header": png[:8] + whole[:40], "chunk": png[:35] + b"\0" + png[36:]}[kind])


DAMAGES = ["missing", "truncated", "empty", "text", "header", "chunk", "size"]


@pytest.mark.parametrize("kind", ["folder", *DAMAGES, *(f"packed {kind}" for kind in DAMAGES)])
@pytest.mark.parametrize("train, augment", [(True, "multiscale"), (True, "jitter"), (False, "jitter")])
def test_broken_frame_is_named(tmp_path, kind, train, augment):
    """size: another than the other frames' of the video. chunk: a wrong length inside, Pillow's SyntaxError."""
    folder = folder_of(tmp_path, ["p 3 0", "", "q/r 3 1", "s 3 2"])
    damage(folder / "frames" / "q" / "r", kind.removeprefix("packed "))
    file = folder / "frames" / "q" / "r"
    if kind.startswith("packed"):
        pack(folder / "frames")
        file = folder / "frames" / "q" / "r.zip"
    videos = data.VideoList(folder, "train", {**SEGMENTS, "augment": augment}, train=train)
    assert videos[0][2] == 0 and videos[2][2] == 2
    with pytest.raises(OSError) as error:
        videos[1]
    assert str(error.value).startswith(f"{folder / 'train.txt'}:3: {file}/img_0000")  # the blank line counts
    assert ("img_00003.jpg: " in str(error.value) or kind == "folder") and " at 0x" not in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("kind", ["truncated", "empty", "text", "folder", "flipped"])
def test_broken_zip_is_named(tmp_path, kind):
    """flipped: one bit of a frame, which its checksum tells."""
    folder = folder_of(tmp_path, ["p 3 0", "q 3 1"])
    pack(folder / "frames")
    file = folder / "frames" / "q.zip"
    whole = file.read_bytes()
    file.unlink()
    if kind == "folder":
        file.mkdir()
    else:
        middle = len(whole) // 2
        write(file, {"truncated": whole[:-30], "empty": b"", "text": b"no zip\n",
                     "flipped": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]}[kind])
    videos = data.VideoList(folder, "train", SEGMENTS, train=False)
    assert videos[0][2] == 0
    with pytest.raises(OSError) as error:
        videos[1]
    assert str(error.value).startswith(f"{folder / 'train.txt'}:2: {file}") and len(str(error.value).splitlines()) == 1


def test_no_damage_of_a_zip_gets_past(tmp_path):
    """Cut off anywhere, or with bytes changed: the frames are the stored ones, or the error is an OSError."""
    frames = noise(0, 3, 6, 8, 3)
    write_frames(tmp_path / "v", frames)
    pack(tmp_path)
    whole, rng, refused = (tmp_path / "v.zip").read_bytes(), np.random.default_rng(0), 0
    broken = [whole[:length] for length in range(0, len(whole), 7)]
    for _ in range(1000):
        harmed = np.frombuffer(whole, np.uint8).copy()
        harmed[rng.integers(len(whole), size=rng.integers(1, 4))] = rng.integers(256)
        broken.append(harmed.tobytes())
    for harmed in broken:
        write(tmp_path / "v.zip", harmed)
        try:
            assert np.array_equal(data.read_frames(tmp_path / "v", [0, 1, 2]), frames)
        except OSError as error:
            refused += 1
            assert str(tmp_path / "v.zip") in str(error)
    assert refused > 500


@pytest.mark.parametrize("lines, row, line", [
    (["p 3 0", "q,r 3 1"], 1, 2),  # a comma may be in a file's name
    (["p 3 0", "q 0 1", "q 3 1"], 1, 3),  # not the line that was left out
    (["p 3 0", "q 3 1", "q 3 2"], 1, 2)])
def test_broken_frame_is_named_by_the_line_it_stands_on(tmp_path, lines, row, line):
    folder = folder_of(tmp_path, lines)
    path = data.read_list(folder / "train.txt")[row].path
    damage(folder / "frames" / path, "folder")
    with pytest.raises(OSError) as error:
        data.VideoList(folder, "train", SEGMENTS, train=False)[row]
    assert str(error.value).startswith(f"{folder / 'train.txt'}:{line}: ")


def test_broken_frame_in_a_worker_is_one_line(tmp_path, monkeypatch, capsys):
    folder = folder_of(tmp_path, ["p 3 0", "q 3 1"])
    damage(folder / "frames" / "q", "truncated")
    videos = data.VideoList(folder, "train", SEGMENTS, train=False)
    monkeypatch.setattr(sys, "argv", ["data.py"])
    with pytest.raises(SystemExit) as end:
        data.run_script(lambda: list(torch.utils.data.DataLoader(videos, num_workers=1)))
    err = capsys.readouterr().err
    one_line(end.value.code, err, f"{folder / 'train.txt'}:2: {folder / 'frames' / 'q' / 'img_00003.jpg'}: ")
    assert err.startswith(f"data.py: {folder}")


def test_skip_broken_takes_the_next_row(tmp_path):
    folder = folder_of(tmp_path, [f"v{row} 3 {row % 3}" for row in range(6)])
    for row in (2, 3, 5):
        damage(folder / "frames" / f"v{row}", "folder")
    whole = data.VideoList(folder, "train", SEGMENTS, train=True, seed=2)
    videos = data.VideoList(folder, "train", SEGMENTS, train=True, seed=2, skip_broken=True)
    for row, taken in enumerate([0, 1, 4, 4, 4, 0]):  # after the last row comes the first
        for epoch in (0, 3):
            clip, labels, number = videos[6 * epoch + row]
            same, names, _ = whole[6 * epoch + taken]
            assert number == taken and torch.equal(clip, same) and torch.equal(labels, names)


def test_skip_broken_goes_at_most_ten_rows_on_and_never_in_evaluation(tmp_path):
    folder = folder_of(tmp_path, [f"v{row} 3 {row % 3}" for row in range(13)])
    for row in range(11):
        damage(folder / "frames" / f"v{row}", "folder")
    videos = data.VideoList(folder, "train", SEGMENTS, train=True, skip_broken=True)
    assert videos[1][2] == 11  # rows 1 to 10 are broken
    with pytest.raises(OSError, match=r"train\.txt:\d+: "):
        videos[0]  # rows 0 to 10
    evaluation = data.VideoList(folder, "train", SEGMENTS, train=False, skip_broken=True)
    assert evaluation[11][2] == 11
    with pytest.raises(OSError, match=r"train\.txt:11: "):
        evaluation[10]


# Extraction.

QUIET = ["ffmpeg", "-nostdin", "-v", "error", "-y"]


def generate(file, source, *output):
    """A video from one of ffmpeg's generators."""
    file.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run([*QUIET, "-f", "lavfi", "-i", source, *output, str(file)], check=True)
    return file


def moving(file, size="340x256", rate=30, frames=12, *output):
    codec = ["-frames:v", str(frames), "-c:v", "mpeg4", "-q:v", "3"]
    return generate(file, f"testsrc=size={size}:rate={rate}", *codec, *output)


def rotated(file, plain):
    """A copy of a video that is tagged to be turned by a quarter; None where this ffmpeg cannot write the tag."""
    for before, after in (([], ["-metadata:s:v:0", "rotate=90"]), (["-display_rotation", "90"], [])):
        subprocess.run([*QUIET, *before, "-i", str(plain), "-c", "copy", *after, str(file)], capture_output=True)
        about = subprocess.run(["ffmpeg", "-nostdin", "-i", str(file)], capture_output=True, text=True).stderr
        if "rotation of" in about:
            return file
    return None


# path: (frames, tolerance, width, height). 30 fps files are exact; others may differ by one between ffmpeg's versions.
WHOLE = {"landscape": (12, 0, 426, 320), "deep/er/portrait": (9, 0, 320, 426), "wide": (5, 0, 800, 320),
         "large": (6, 0, 426, 320), "square": (3, 0, 320, 320), "odd": (4, 0, 334, 320), "one": (1, 0, 426, 320),
         "brighter": (15, 0, 426, 320), "slow": (24, 2, 426, 320), "variable": (60, 2, 426, 320),
         "dot.ted-name_1": (8, 0, 426, 320)}
BROKEN = {"cut_front", "cut_end", "sound", "text", "two words", "loop"}  # cut: with the index in front and at the end


@pytest.fixture(scope="session")
def videos(tmp_path_factory):
    """A folder of videos of every kind, and what is none. Not to be changed: tests share it."""
    folder = tmp_path_factory.mktemp("the videos")
    moving(folder / "landscape.mp4")
    moving(folder / "deep/er/portrait.MOV", "256x340", 30, 9)
    moving(folder / "wide.avi", "400x160", 30, 5)
    moving(folder / "large.mkv", "640x480", 30, 6)
    moving(folder / "square.mp4", "64x64", 30, 3)
    generate(folder / "odd.avi", "testsrc=size=47x45:rate=30", "-frames:v", "4", "-c:v", "mjpeg", "-pix_fmt",
             "yuvj444p")
    moving(folder / "one.mp4", frames=1)
    generate(folder / "brighter.mp4", "color=black:size=68x51:rate=30,format=yuv444p,geq=lum='20+12*N':cb=128:cr=128",
             "-frames:v", "15", "-c:v", "mpeg4", "-q:v", "2", "-pix_fmt", "yuv420p")
    moving(folder / "slow.mp4", rate=10, frames=8)
    generate(folder / "variable.mkv", "testsrc=size=340x256:rate=30:duration=2,"
             "select='not(mod(n\\,7))+not(mod(n\\,11))+eq(n\\,59)'", "-c:v", "mpeg4")
    moving(folder / "two words.mp4", frames=2)
    shutil.copy(moving(folder / "dot.ted-name_1.mkv", frames=8), folder / "dot.ted-name_1.webm")
    (folder / "dot.ted-name_1.mkv").unlink()
    for name, options in (("cut_front", ["-movflags", "+faststart"]), ("cut_end", [])):
        file = moving(folder / f"{name}.mp4", "340x256", 30, 30, *options)
        write(file, file.read_bytes()[: file.stat().st_size * 6 // 10])
    generate(folder / "sound.mp4", "sine=duration=1", "-c:a", "aac")
    write(folder / "text.mp4", "not a video\n" * 100)
    write(folder / "notes.txt", "no video either, and not named as one\n")
    os.symlink("loop.mp4", folder / "loop.mp4")
    return folder


@pytest.fixture(scope="session")
def extracted(videos, tmp_path_factory):
    """What `extract` makes of them: (the data folder, its counts)."""
    out = tmp_path_factory.mktemp("extracted") / "new" / "the data"
    return out, data.extract(videos, out, "train", workers=2)


def failures(out, split="train"):
    """{path: reason}; each line holds just that."""
    lines = (Path(out) / f"{split}_failed.txt").read_text().split("\n")
    assert lines.pop() == "" and all(line.count("\t") == 1 for line in lines)
    return dict(line.split("\t") for line in lines)


@needs_ffmpeg
@pytest.mark.parametrize("path", WHOLE)
def test_extracted_frames(extracted, path):
    wanted, tolerance, width, height = WHOLE[path]
    folder = extracted[0] / "frames" / path
    names = sorted(os.listdir(folder))
    assert abs(len(names) - wanted) <= tolerance
    assert names == [f"img_{number:05d}.jpg" for number in range(1, len(names) + 1)]
    for name in (names[0], names[-1]):
        with Image.open(folder / name) as image:
            image.load()
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (width, height))


@needs_ffmpeg
def test_extracted_list(extracted):
    out, counts = extracted
    assert counts == (len(WHOLE), len(BROKEN))
    assert sorted(os.listdir(out)) == ["frames", "train.txt", "train_failed.txt"]
    lines = [f"{path} {len(os.listdir(out / 'frames' / path))} -1\n" for path in sorted(WHOLE)]
    assert (out / "train.txt").read_text() == "".join(lines)
    folders = {file.parent.relative_to(out / "frames").as_posix() for file in (out / "frames").rglob("*.jpg")}
    assert folders == set(WHOLE)  # nothing of the broken ones, and no part of a folder
    failed = failures(out)
    assert set(failed) == BROKEN and all(reason.strip() for reason in failed.values())
    assert "white space" in failed["two words"]
    assert [video.path for video in data.read_list(out / "train.txt")] == sorted(WHOLE)


@needs_ffmpeg
def test_packed_extraction_is_the_same(videos, extracted, tmp_path, command):
    """A zip for each folder, with the same bytes, not compressed; the same lists; and a second run keeps all of it."""
    plain, out = extracted[0], tmp_path / "packed"
    arguments = ["extract", "--videos", videos, "--out", out, "--split", "train", "--workers", "2", "--pack"]
    assert command(*arguments)[0] == 0
    assert sorted(os.listdir(out)) == sorted(os.listdir(plain))
    assert (out / "train.txt").read_text() == (plain / "train.txt").read_text()
    assert failures(out) == failures(plain)
    assert set(content(out / "frames")) == {f"{path}.zip" for path in WHOLE}
    for path in WHOLE:
        with zipfile.ZipFile(out / "frames" / f"{path}.zip") as archive:
            assert archive.namelist() == sorted(os.listdir(plain / "frames" / path))
            assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
            for name in archive.namelist():
                assert archive.read(name) == (plain / "frames" / path / name).read_bytes()
    before = {file: file.stat().st_mtime_ns for file in out.rglob("*.zip")}
    assert command(*arguments)[0] == 0 and command(*arguments[:-1])[0] == 0  # without --pack too
    assert {file: file.stat().st_mtime_ns for file in (out / "frames").rglob("*") if file.is_file()} == before
    write(out / "categories.txt", "a\n")
    assert command("check", out)[0] == 0


@needs_ffmpeg
def test_extraction_goes_on_with_folders_and_zips_side_by_side(tmp_path, monkeypatch):
    """What is whole in either form is kept; a broken zip, and a folder or zip without frames, are not whole. A disk
    that is full while packing leaves nothing behind."""
    for name in "abcdef":
        moving(tmp_path / "videos" / f"{name}.mp4", "64x48", 30, 2)
    out = tmp_path / "data"
    folder_a = write_frames(out / "frames" / "a", noise(0, 3, 4, 4, 3))
    write_frames(out / "frames" / "b", noise(1, 4, 4, 4, 3))
    pack(out / "frames" / "b")
    write(out / "frames" / "c.zip", (out / "frames" / "b.zip").read_bytes()[:-30])
    write(out / "frames" / "d.zip", "")
    (out / "frames" / "e").mkdir()
    kept = content(folder_a), (out / "frames" / "b.zip").read_bytes()
    before = content(out)

    def full(*_):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(zipfile.ZipFile, "writestr", full)
        with pytest.raises(OSError, match="No space left"):
            data.extract(tmp_path / "videos", out, "train", workers=2, pack=True)
    assert content(out) == before and sorted(os.listdir(out)) == ["frames"]
    assert data.extract(tmp_path / "videos", out, "train", workers=2, pack=True) == (6, 0)
    assert (out / "train.txt").read_text() == "a 3 -1\nb 4 -1\nc 2 -1\nd 2 -1\ne 2 -1\nf 2 -1\n"
    assert (content(folder_a), (out / "frames" / "b.zip").read_bytes()) == kept
    assert sorted(os.listdir(out / "frames")) == ["a", "b.zip", "c.zip", "d.zip", "e", "e.zip", "f.zip"]


@needs_ffmpeg
def test_variable_rate_is_really_variable(videos, extracted):
    """The file stores 15 frames over 2 seconds; the frames between are filled in."""
    packets = subprocess.run(["ffmpeg", "-nostdin", "-v", "error", "-i", videos / "variable.mkv", "-c", "copy", "-f",
                              "framecrc", "-"], capture_output=True, text=True, check=True).stdout.splitlines()
    assert sum(not line.startswith("#") for line in packets) == 15


@needs_ffmpeg
def test_extracted_frames_are_in_order(extracted):
    """Frame n of the source has luminance 20 + 12 n of 16..235, which is (4 + 12 n) x 255 / 219 in a JPEG."""
    folder = extracted[0] / "frames" / "brighter"
    for n in range(15):
        with Image.open(folder / f"img_{n + 1:05d}.jpg") as image:
            assert abs(np.asarray(image.convert("L")).mean() - (4 + 12 * n) * 255 / 219) < 4


@needs_ffmpeg
def test_rotation_tag_is_obeyed(tmp_path):
    plain = moving(tmp_path / "plain.mp4", frames=3)
    (tmp_path / "turned").mkdir()
    if rotated(tmp_path / "turned" / "v.mp4", plain) is None:
        pytest.skip("this ffmpeg writes no rotation tag")
    assert data.extract(tmp_path / "turned", tmp_path / "out", "train", workers=1) == (1, 0)
    with Image.open(tmp_path / "out" / "frames" / "v" / "img_00001.jpg") as image:
        assert image.size == (320, 426)


@needs_ffmpeg
def test_foreign_list_is_written_in_our_form(videos, tmp_path, command):
    foreign = write(tmp_path / "foreign.csv", "one.mp4,7,264,311\nabsent.mp4,3\n./landscape.mp4,2\ntext.mp4,5\n"
                    "square.mp4,-1\ntwo words.mp4,8\none.mp4,7\ndeep/er/portrait.mp4,4,1\n")
    status, out, _ = command("extract", "--videos", videos, "--list", foreign, "--format", "mmit", "--out",
                             tmp_path / "data", "--split", "val", "--workers", "1")
    assert status == 0 and "4 videos whole, 3 failed" in out and "val_failed.txt" in out
    assert (tmp_path / "data" / "val.txt").read_text() == \
        "one 1 7,264,311\n./landscape 12 2\nsquare 3 -1\ndeep/er/portrait 9 4,1\n"
    failed = failures(tmp_path / "data", "val")
    assert list(failed) == ["absent", "text", "two words"] and "no such video" in failed["absent"]
    assert sorted(os.listdir(tmp_path / "data" / "frames")) == ["deep", "landscape", "one", "square"]


@needs_ffmpeg
def test_ambiguous_list_needs_its_format(videos, tmp_path, command):
    foreign = write(tmp_path / "foreign.txt", "one.mp4 92 69\n")
    arguments = ["extract", "--videos", videos, "--list", foreign, "--out", tmp_path / "data", "--split", "train"]
    status, _, err = command(*arguments)
    one_line(status, err, str(foreign), "--format xtemporal", "--format mmaction2")
    for name, labels in (("xtemporal", "69"), ("mmaction2", "92,69")):
        assert command(*arguments, "--format", name)[0] == 0
        assert (tmp_path / "data" / "train.txt").read_text() == f"one 1 {labels}\n"


@needs_ffmpeg
def test_second_run_keeps_what_is_whole_and_rewrites_its_lists(tmp_path, command):
    videos, out = tmp_path / "videos", tmp_path / "data"
    moving(videos / "a.mp4", frames=2)
    for name in ("b", "c", "d"):
        write(videos / f"{name}.mp4", "not a video\n")
    arguments = ["extract", "--videos", videos, "--out", out, "--split", "train", "--workers", "2"]
    assert command(*arguments)[0] == 0 and list(failures(out)) == ["b", "c", "d"]
    assert (out / "train.txt").read_text() == "a 2 -1\n"
    before = {file: file.stat().st_mtime_ns for file in (out / "frames" / "a").iterdir()}
    moving(videos / "b.mp4", frames=3)  # mended
    (videos / "d.mp4").unlink()  # given up
    assert command(*arguments)[0] == 0 and list(failures(out)) == ["c"]
    assert (out / "train.txt").read_text() == "a 2 -1\nb 3 -1\n"
    assert before == {file: file.stat().st_mtime_ns for file in (out / "frames" / "a").iterdir()}
    (videos / "c.mp4").unlink()
    assert command(*arguments)[0] == 0 and failures(out) == {}


@needs_ffmpeg
def test_no_whole_video_is_status_2(tmp_path, command):
    write(tmp_path / "videos" / "a.mp4", "not a video\n")
    status, out, _ = command("extract", "--videos", tmp_path / "videos", "--out", tmp_path / "data", "--split", "train")
    assert status == 2 and "0 videos whole, 1 failed" in out and list(failures(tmp_path / "data")) == ["a"]
    assert (tmp_path / "data" / "train.txt").read_text() == "" and os.listdir(tmp_path / "data" / "frames") == []


@needs_ffmpeg
def test_killed_extraction_goes_on(tmp_path):
    """SIGKILL to python while the third of five videos is half decoded; then a second run equals an uninterrupted one.
    An ffmpeg before ffmpeg on the PATH writes one frame of that video, and then waits to be killed."""
    for name in "abcde":
        moving(tmp_path / "videos" / f"{name}.mp4", "64x48", 30, 4)
    wrapper = write(tmp_path / "bin" / "ffmpeg", f"""#!/bin/sh
case "$*" in
*/c.mp4*) echo half > img_00001.jpg
          echo $$ > '{tmp_path}/part' && mv '{tmp_path}/part' '{tmp_path}/waiting'
          exec sleep 100;;
esac
exec '{shutil.which("ffmpeg")}' "$@"
""")
    wrapper.chmod(0o755)
    arguments = ["extract", "--videos", "videos", "--split", "train", "--workers", "1", "--out"]
    slowed = {**os.environ, "PATH": f"{wrapper.parent}{os.pathsep}{os.environ['PATH']}"}
    process = subprocess.Popen([sys.executable, ROOT / "data.py", *arguments, "killed"], cwd=tmp_path, env=slowed,
                               stderr=subprocess.PIPE)
    try:
        while not (tmp_path / "waiting").exists():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
    finally:
        process.kill()
        process.communicate()
    os.kill(int((tmp_path / "waiting").read_text()), signal.SIGKILL)
    frames = tmp_path / "killed" / "frames"
    assert {"a", "b"} < set(os.listdir(frames)) and "c" not in os.listdir(frames)
    assert sum(name.startswith(".part-train") for name in os.listdir(frames)) == 1
    assert not (tmp_path / "killed" / "train.txt").exists()
    for out in ("killed", "whole"):
        assert data.extract(tmp_path / "videos", tmp_path / out, "train", workers=1) == (5, 0)
    assert content(tmp_path / "killed") == content(tmp_path / "whole")
    assert sorted(os.listdir(frames)) == ["a", "b", "c", "d", "e"]


def test_missing_ffmpeg_is_said_before_any_work(tmp_path, monkeypatch, command):
    write(tmp_path / "videos" / "a.mp4", "not a video\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    status, out, err = command("extract", "--videos", tmp_path / "videos", "--out", tmp_path / "data", "--split", "all")
    one_line(status, err, "ffmpeg is missing", "install ffmpeg")
    assert out == "" and os.listdir(tmp_path) == ["videos"]


def test_folder_of_videos_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    """Its videos would be missing in the list without a word."""
    for path in ("a.mp4", "closed/b.mp4"):
        write(tmp_path / path, "")
    scan = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    assert list(data.find_videos(tmp_path)) == ["a", "closed/b"]
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(OSError, match="Permission denied.*closed"):
        data.find_videos(tmp_path)


def test_video_that_a_list_names_like_a_folder_of_videos(tmp_path, monkeypatch):
    """frames/a is there, with the folder b in it, but no video a."""
    write(tmp_path / "videos" / "a" / "b.mp4", "")
    write_frames(tmp_path / "data" / "frames" / "a" / "b", noise(0, 2, 4, 4, 3))
    listing = write(tmp_path / "list.csv", "a.mp4,1\na/b.mp4,2\n")
    monkeypatch.setattr(shutil, "which", lambda name: name)
    assert data.extract(tmp_path / "videos", tmp_path / "data", "train", listing, workers=1) == (1, 1)
    assert (tmp_path / "data" / "train.txt").read_text() == "a/b 2 2\n"
    assert failures(tmp_path / "data") == {"a": "no such video"}


def test_list_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("No space left on device")

    write(tmp_path / "train.txt", "the one before\n")
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        data.write_lines(tmp_path / "train.txt", ["a 1 -1"])
    assert content(tmp_path) == {"train.txt": b"the one before\n"}


@needs_ffmpeg
@pytest.mark.parametrize("name", ["holiday.avi.mp4", "x,y.mp4"])
def test_our_own_list_can_be_read_whatever_the_name(tmp_path, command, name):
    """Two endings, as converted files have, and a comma."""
    videos, out = tmp_path / "videos", tmp_path / "data"
    moving(videos / name, "64x48", 30, 2)
    assert command("extract", "--videos", videos, "--out", out, "--split", "train", "--workers", "1")[0] == 0
    write(out / "categories.txt", "a\nb\n")
    assert tuple(data.VideoList(out, "train", SEGMENTS, train=False)[0][0].shape) == (8, 32, 32, 3)
    status, printed, _ = command("check", out)
    assert status == 0, printed


@needs_ffmpeg
def test_video_beside_a_folder_of_its_name(tmp_path, command):
    """a.mp4 and a/b.mp4: frames/a would hold frames and the folder b. Refused by name, or right in each run."""
    videos, out = tmp_path / "videos", tmp_path / "data"
    moving(videos / "a.mp4", "64x48", 30, 3)
    moving(videos / "a" / "b.mp4", "64x48", 30, 2)
    for _ in range(2):
        status, _, err = command("extract", "--videos", videos, "--out", out, "--split", "train", "--workers", "1")
        if status:
            one_line(status, err, str(videos / "a.mp4"), str(videos / "a" / "b.mp4"))
        else:
            assert (out / "train.txt").read_text() == "a 3 -1\na/b 2 -1\n"


@needs_ffmpeg
def test_name_that_is_not_utf_8_is_one_failure(tmp_path, command):
    videos, out = tmp_path / "videos", tmp_path / "data"
    moving(videos / "a.mp4", "64x48", 30, 2)
    try:
        shutil.copy(videos / "a.mp4", os.path.join(os.fsencode(videos), b"caf\xe9.mp4"))
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    assert command("extract", "--videos", videos, "--out", out, "--split", "train", "--workers", "1")[0] == 0
    assert (out / "train.txt").read_text() == "a 2 -1\n" and len(failures(out)) == 1


# check, and the command line.

def sound_folder(tmp_path):
    """Five videos in three lists, labels a 1, b 3, c 0 in train.txt."""
    folder_of(tmp_path, ["p 3 0,1", "", "q/r 3 1", "s 3 1"])
    folder_of(tmp_path, ["t 3 2"], split="val")
    return folder_of(tmp_path, ["u 3 -1"], split="test")


def test_check_of_a_sound_folder(tmp_path, command):
    folder = sound_folder(tmp_path)
    status, out, _ = command("check", folder)
    assert status == 0
    assert f"{folder / 'train.txt'}: 3 videos, 1.33 labels a video; largest class b, 3; smallest c, 0\n" in out
    assert f"{folder / 'val.txt'}: 1 videos, 1.00 labels a video" in out
    assert f"{folder / 'test.txt'}: 1 videos, 0.00 labels a video" in out
    assert out.endswith("\n0 problems\n")


def remove(number):
    return lambda folder: (folder / "frames/q/r" / f"img_{number:05d}.jpg").unlink()


def rename(folder):
    (folder / "frames/q/r/img_00002.jpg").rename(folder / "frames/q/r/2.jpg")


FAULTS = {
    "first": (remove(1), "2 of 3 frames"), "middle": (remove(2), "2 of 3 frames"), "last": (remove(3), "2 of 3 frames"),
    "misnamed": (rename, "2 of 3 frames, 1 other"),
    "extra": (lambda folder: write_frames(folder / "frames/q/r", noise(0, 4, 3, 3, 3)), "3 of 3 frames, 1 other"),
    "folder": (lambda folder: shutil.rmtree(folder / "frames/q"), "0 of 3 frames"),
    "count": (lambda folder: write(folder / "train.txt", "p 3 0,1\n\nq/r 5 1\ns 3 1\n"), "3 of 5 frames"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_check_names_what_is_wrong_by_line(tmp_path, command, kind):
    folder, (harm, wanted) = sound_folder(tmp_path), FAULTS[kind]
    harm(folder)
    status, out, _ = command("check", folder)
    problem, total = [line for line in out.splitlines() if "labels a video" not in line]
    assert status == 2 and total.startswith("1 problem")
    assert problem.startswith(f"{folder / 'train.txt'}:3: q/r") and wanted in problem


def test_check_counts_what_is_packed(tmp_path, command):
    """Frames in zips, one zip with a frame too few and one that is none; a folder goes before a zip."""
    folder = sound_folder(tmp_path)
    pack(folder / "frames")
    assert command("check", folder)[0] == 0
    write_frames(folder / "frames" / "t", noise(0, 2, 3, 3, 3))
    write_frames(folder / "frames" / "q" / "r", noise(0, 2, 3, 3, 3))
    (folder / "frames" / "q" / "r.zip").unlink()
    pack(folder / "frames" / "q")
    write(folder / "frames" / "s.zip", "no zip\n")
    status, out, _ = command("check", folder)
    assert status == 2 and [line for line in out.splitlines() if "labels a video" not in line] == [
        f"{folder / 'train.txt'}:3: q/r: 2 of 3 frames, 0 other files",
        f"{folder / 'train.txt'}:4: s: 0 of 3 frames, 0 other files",
        f"{folder / 'val.txt'}:1: t: 2 of 3 frames, 0 other files", "3 problems"]


def test_check_of_a_count_that_no_video_has(tmp_path, command):
    folder = folder_of(tmp_path, ["p 3 0", "q 900000000000000 1"])
    status, out, _ = command("check", folder)
    assert status == 2
    assert f"{folder / 'train.txt'}:2: q: 3 of 900000000000000 frames, 0 other files\n1 problems\n" in out


def test_check_names_a_video_in_two_lists(tmp_path, command):
    folder = sound_folder(tmp_path)
    folder_of(tmp_path, ["t 3 2", "s 3 0"], split="val")
    status, out, _ = command("check", folder)
    assert status == 2 and f"{folder / 'val.txt'}:2: s is also in {folder / 'train.txt'}" in out and "1 problem" in out


def test_check_counts_every_problem(tmp_path, command):
    folder = sound_folder(tmp_path)
    shutil.rmtree(folder / "frames")
    status, out, _ = command("check", folder)
    assert status == 2 and "\n5 problems\n" in out
    for name in ("train.txt:1: p", "train.txt:3: q/r", "train.txt:4: s", "val.txt:1: t", "test.txt:1: u"):
        assert f"{folder / name}: 0 of 3 frames" in out


def test_script_as_a_process_of_its_own(toy, tmp_path):
    """From another folder: a sound folder has status 0, one that is there already is one line and status 2."""
    checked = script("check", toy, cwd=tmp_path)
    assert checked.returncode == 0 and checked.stdout.endswith("\n0 problems\n"), checked.stderr
    again = script("toy", toy, "--videos", "8", cwd=tmp_path)
    one_line(again.returncode, again.stderr, str(toy), "already there")
    assert os.listdir(tmp_path) == []


def test_toy_from_the_command_line(tmp_path, command):
    assert command("toy", tmp_path / "one", "--videos", "8", "--seed", "1")[0] == 0
    data.draw_toy(tmp_path / "two", videos=8, seed=1)
    assert content(tmp_path / "one") == content(tmp_path / "two")


def link(path):
    """A link to itself."""
    path.symlink_to(path.name)
    return path


def bad_list(text):
    """Writes a list of this text: the arguments of an extraction by it."""
    def prepare(folder):
        return bad_extract("--list", write(folder / "list.txt", text), a_mp4="not a video\n")(folder)
    return prepare


def bad_extract(*arguments, **files):
    """Writes the videos a_mp4="text", ...: the arguments of their extraction."""
    def prepare(folder):
        for name, text in files.items():
            write(folder / "videos" / name.replace("_", "."), text)
        return ["extract", "--videos", folder / "videos", "--out", folder / "data", "--split", "train", *arguments]
    return prepare


def bad_check(**files):
    """Writes the text files of a data folder: the arguments of its check."""
    def prepare(folder):
        for name, text in files.items():
            write(folder / "data" / f"{name}.txt", text)
        return ["check", folder / "data"]
    return prepare


# name: (what to write and the arguments, what the one line must hold)
BAD_INPUT = {
    "toy_there": (lambda folder: ["toy", folder], ["already there"]),
    "toy_file_there": (lambda folder: ["toy", write(folder / "toy", "")], ["already there"]),
    "toy_too_small": (lambda folder: ["toy", folder / "toy", "--videos", "7"], ["--videos 7"]),
    "toy_seed": (lambda folder: ["toy", folder / "toy", "--seed", "-1"], ["--seed"]),
    "toy_link": (lambda folder: ["toy", link(folder / "loop")], ["loop: already there"]),
    "toy_below_a_file": (lambda folder: ["toy", write(folder / "file", "") / "toy", "--videos", "8"], ["file"]),
    "no_such_folder": (bad_extract("--videos", "absent"), ["absent"]),
    "no_video": (bad_extract(notes_txt="no video\n"), ["videos", "no video"]),
    "two_of_one_path": (bad_extract(a_mp4="x", a_avi="y"), ["a.mp4", "a.avi"]),
    "videos_are_a_file": (bad_extract("--videos", "videos/a.mp4", a_mp4="x"), ["a.mp4: no such folder"]),
    "videos_loop": (lambda folder: bad_extract("--videos", link(folder / "loop"))(folder), ["loop: no such folder"]),
    "workers": (bad_extract("--workers", "0", a_mp4="x"), ["--workers 0"]),
    "workers_negative": (bad_extract("--workers", "-2", a_mp4="x"), ["--workers -2"]),
    "workers_huge": (bad_extract("--workers", "1000000000", a_mp4="x"), ["--workers 1000000000: from 1 to 1000"]),
    "split_is_a_path": (bad_extract("--split", "a/b", a_mp4="x"), ["--split a/b"]),
    "split_is_above": (bad_extract("--split", "..", a_mp4="x"), ["--split .."]),
    "split_is_empty": (bad_extract("--split", "", a_mp4="x"), ["--split"]),
    "split_is_the_categories": (bad_extract("--split", "categories", a_mp4="x"), ["--split categories"]),
    "out_is_a_file": (bad_extract("--out", "videos/a.mp4", a_mp4="x"), ["a.mp4"]),
    "out_is_below_a_file": (bad_extract("--out", "videos/a.mp4/b", a_mp4="x"), ["a.mp4"]),
    "list_is_a_folder": (bad_extract("--list", "videos", a_mp4="x"), ["videos"]),
    "no_such_list": (bad_extract("--list", "absent.txt", a_mp4="x"), ["absent.txt"]),
    "ambiguous": (bad_list("a.mp4 92 69\n"), ["list.txt", "--format"]),
    "votes": (bad_list("singing/a.mp4,singing,3,1\n"), ["list.txt:1:", "single-label"]),
    "negative": (bad_list("a.mp4,1\nb.mp4,-3\n"), ["list.txt:2:", "'-3'"]),
    "no_integer": (bad_list("a 9 1,2\nb 9 1,x\n"), ["list.txt:2:", "'x'"]),
    "missing_field": (bad_list("a 9 1,2\n\nb 9\n"), ["list.txt:3:"]),
    "latin_1": (bad_list(b"caf\xe9.mp4,1\n"), ["list.txt", "UTF-8"]),
    "empty": (bad_list(""), ["list.txt", "no video"]),
    "leads_out": (bad_list("../a.mp4,1\n"), ["list.txt:1:", "../a.mp4"]),
    "no_name": (bad_list("a.mp4,1\n,3\n"), ["list.txt:2:", "''"]),
    "no_place": (bad_list("a.mp4,1\n.mp4,3\n"), ["list.txt:2:", "'.mp4'"]),
    "two_slashes": (bad_list("a//b.mp4,1\n"), ["list.txt:1:", "'a//b.mp4'"]),
    "huge": (bad_list("a 9 1,2\nb 9999999999999999 1,2\n"), ["list.txt:2:", "'9999999999999999'"]),
    "no_categories": (bad_check(train="a 9 0\n"), ["categories.txt"]),
    "bad_categories": (bad_check(categories="a,0\nb,2\n", train="a 9 0\n"), ["categories.txt"]),
    "too_high": (bad_check(categories="a\nb\n", train="a 9 0\nb 9 2\n"), ["train.txt:2:", "label 2"]),
    "no_list": (bad_check(categories="a\nb\n"), ["train.txt"]),
    "no_counts": (bad_check(categories="a\nb\n", train="a.mp4,0\n"), ["train.txt: no frame counts"]),
    "no_folder": (lambda folder: ["check", folder / "absent"], ["absent"]),
}


@pytest.mark.parametrize("kind", BAD_INPUT)
def test_bad_input_is_one_line_and_status_2(tmp_path, monkeypatch, command, kind):
    if shutil.which("ffmpeg") is None:  # all this is said before it would be started
        stub = write(tmp_path / "bin" / "ffmpeg", "")
        stub.chmod(0o755)
        monkeypatch.setenv("PATH", str(stub.parent))
    monkeypatch.chdir(tmp_path)
    prepare, parts = BAD_INPUT[kind]
    arguments = prepare(tmp_path)
    before = content(tmp_path)
    status, out, err = command(*arguments)
    one_line(status, err, *parts)
    assert out == "" and content(tmp_path) == before and not (tmp_path / "toy").is_dir()


@pytest.mark.parametrize("arguments", [
    "", "draw", "toy", "toy x --videos many", "extract --out x", "check",
    "extract --videos x --out y --split z --format kinetics"])
def test_wrong_arguments_are_argparses_own_error(tmp_path, monkeypatch, command, arguments):
    monkeypatch.chdir(tmp_path)
    status, out, err = command(*arguments.split())
    assert status == 2 and out == "" and err.startswith("usage: ") and os.listdir(tmp_path) == []
