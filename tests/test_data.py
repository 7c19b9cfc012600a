"""data.py: what a list line means, which frames and pixels of a video a network sees, what the toy
videos show, and how videos become frames.

    python -m pytest tests/test_data.py

In the order of data.py: lists, frames, pixels, the data set, the toy, extraction, check, and what
the scripts share. Each part begins with examples that can be checked by hand. Then comes the
oracle: literal lists, Pillow, torchvision, naive loops, uninterrupted runs. Then the traps.
"""
import errno
import itertools
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import unicodedata
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as vision

import data
import evaluate
from conftest import ROOT, call, python

needs_ffmpeg = pytest.mark.skipif(
    shutil.which("ffmpeg") is None and os.environ.get("CI") != "true",
    reason="the program ffmpeg is missing")


def write(path, content):
    """A file of text or bytes, in folders that are made for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, str):
        content = content.encode()
    path.write_bytes(content)
    return path


def contents(folder):
    """{path below a folder: bytes} of every file."""
    return {file.relative_to(folder).as_posix(): file.read_bytes()
            for file in Path(folder).rglob("*") if file.is_file()}


def noise(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def write_frames(folder, frames):
    """Arrays (h, w, 3) as img_00001.jpg and so on. Inside they are PNG, which changes no pixel:
    Pillow looks at the content, not at the name."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, frame in enumerate(frames, 1):
        image = Image.fromarray(np.asarray(frame, np.uint8))
        image.save(folder / f"img_{number:05d}.jpg", format="PNG")
    return folder


def pack(folder):
    """Every folder of frames below a folder becomes a zip, as extract --pack leaves it."""
    for parent in {file.parent for file in folder.rglob("*.jpg")}:
        with zipfile.ZipFile(f"{parent}.zip", "w") as archive:
            for file in parent.iterdir():
                archive.write(file, file.name)
        shutil.rmtree(parent)
    return folder


# ---- lists -----------------------------------------------------------------------------------

def read(folder, text, format="auto", num_classes=None):
    """[(path, number of frames, labels), ...] of a list file with this text."""
    videos = data.read_list(write(folder / "list.txt", text), format, num_classes)
    return [video[:3] for video in videos]


def test_a_line_holds_a_path_a_number_of_frames_and_labels(tmp_path):
    assert read(tmp_path, "cooking/a 90 7,2\n") == [("cooking/a", 90, [7, 2])]
    assert read(tmp_path, "cooking/a 90 -1\n") == [("cooking/a", 90, [])]           # unlabelled
    assert read(tmp_path, "cooking/a.mp4,7,2\n") == [("cooking/a", None, [7, 2])]   # M-MiT's csv


TEN_VIDEOS = [
    ("cooking/zz-demo0001_3", 90, [7, 264, 311]),
    ("trimming/zz-demo0002_12", 89, [144]),
    ("adult+female+singing/zz-demo0003_1", 91, [266, 33]),
    ("raining/zz-demo0004_77", 90, [2]),
    ("playing+sports/zz-demo0005_5", 45, [298, 312, 0, 69, 83]),
    ("boating/zz-demo-6-2_9", 93, [37, 1]),
    ("running/zz-demo0007_40", 90, [83]),
    ("opening/zz-demo0008_15", 3, [197, 188]),
    ("climbing/zz-demo0009_2", 87, [241, 280, 92, 8]),
    ("sleeping/zz-demo0010_8", 90, [240]),
]
MOMENTS_IN_TIME = """\
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
MMACTION2_GENERATED = """\
cooking/zz-demo0001_3 90 7 264 311
cooking/zz-demo0001_3 0 7 264 311
trimming/zz-demo0002_12 89 144
trimming/zz-demo0002_12 0 144
adult+female+singing/zz-demo0003_1 91 266 33
adult+female+singing/zz-demo0003_1 0 266 33
"""  # mmaction2's own program lists the number of optical flow frames as a second video


@pytest.mark.parametrize("text, format", [
    (MOMENTS_IN_TIME, "csv"), (MOMENTS_IN_TIME, "auto"),
    (XTEMPORAL_FRAMES, "ours"), (XTEMPORAL_FRAMES, "auto"),
    (XTEMPORAL_VIDEOS, "ours"), (XTEMPORAL_VIDEOS, "auto"),
    (MMACTION2_FRAMES, "mmaction2-frames"), (MMACTION2_VIDEOS, "mmaction2-videos"),
    (MMACTION2_GENERATED, "mmaction2-frames"),
])
def test_ten_videos_are_read_from_the_lists_of_every_project(tmp_path, text, format):
    expected = TEN_VIDEOS
    if text in (MOMENTS_IN_TIME, MMACTION2_VIDEOS):
        expected = [(path, None, labels) for path, _, labels in TEN_VIDEOS]
    if text == MMACTION2_GENERATED:
        expected = TEN_VIDEOS[:3]
    assert read(tmp_path, text, format, num_classes=313) == expected


@pytest.mark.parametrize("text", [
    "a 9 1,2\r\nb 8 3\r\n", "a 9 1,2\n\n  \nb 8 3\n\n", "a  9   1,2\nb\t8\t3\n", "a 9 1, 2 \nb 8 3 \t",
    " a 9 1,2\n  b 8 3\n", "\ufeffa 9 1,2\nb 8 3\n"])
def test_white_space_and_the_mark_of_windows_programs_mean_nothing(tmp_path, text):
    assert read(tmp_path, text) == [("a", 9, [1, 2]), ("b", 8, [3])]


@pytest.mark.parametrize("line, expected", [
    ("a.mp4, 0", ("a", None, [0])),
    ("a.mp4,0,,", ("a", None, [0])),
    ('"a.mp4","0","2"', ("a", None, [0, 2])),
    ('a.mp4,"0,2"', ("a", None, [0, 2])),
    ("my video.mp4,3", ("my video", None, [3])),
    ('"a, b.mp4",3', ("a, b", None, [3])),
    ("a.MP4,-1", ("a", None, [])),
    ("a.avi.mp4,3", ("a", None, [3])),  # a converted file
    ("a.v2,4", ("a.v2", None, [4])),
])
def test_a_csv_is_read_as_spreadsheets_write_it(tmp_path, line, expected):
    assert read(tmp_path, f"{line}\n") == [expected]


def test_the_fields_are_read_from_the_right_so_a_path_may_hold_spaces(tmp_path):
    assert read(tmp_path, "my video 1 90 7\n", "ours") == [("my video 1", 90, [7])]
    assert read(tmp_path, "my video 90 7,2\n") == [("my video", 90, [7, 2])]


def test_a_file_that_can_be_read_in_two_ways_needs_its_format(tmp_path):
    for text in ("a.mp4 92 69\n", "x 90 7 264\n", "a.mp4 5\nb.mp4 92 69\n"):
        with pytest.raises(ValueError, match="several ways; say which with --format"):
            read(tmp_path, text)
    assert read(tmp_path, "a.mp4 92 69\n", "ours") == [("a", 92, [69])]
    assert read(tmp_path, "a.mp4 92 69\n", "mmaction2-videos") == [("a", None, [92, 69])]
    assert read(tmp_path, "x 90 7 264\n", "mmaction2-frames") == [("x", 90, [7, 264])]
    # one comma between ids tells for the whole file
    assert read(tmp_path, "a.mp4 92 69\nb 9 1,2\n") == [("a", 92, [69]), ("b", 9, [1, 2])]


def test_a_path_on_several_lines_gets_all_their_labels(tmp_path):
    """One line for each label is a common form. The second label once was lost."""
    assert read(tmp_path, "a.mp4,0\nb.mp4,1\na.mp4,2\na.mp4,0\n") == [
        ("a", None, [0, 2]), ("b", None, [1])]
    write(tmp_path / "list.txt", "a 9 0\nb 0 1\na 9 2\n")
    videos, repeated, without_frames = data.read_videos(tmp_path / "list.txt")
    assert videos == [("a", 9, [0, 2], 1)]
    assert (repeated, without_frames) == (1, 1)


def test_two_numbers_of_frames_for_one_path_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"list.txt:3: a has 8 frames here and 9 in line 1"):
        read(tmp_path, "a 9 0\nb 9 0\na 8 1\n")


OURS = "taken for the form ours: path num_frames id"
CSV = "taken for the form csv: name.mp4,id"


@pytest.mark.parametrize("first, second, reason", [
    ("a 9 1,2", "b 9 -2", OURS),
    ("a 9 1,2", "b 9 3,-1", OURS),
    ("a 9 1,2", "b 9 1,", OURS),
    ("a 9 1,2", "b 9.5 1", OURS),
    ("a 9 1,2", "b -1 1", OURS),
    ("a 9 1,2", "b 9", OURS),
    ("a 9 1,2", "b 9999999999999999 1", OURS),
    ("a 9 1,2", "b 9 3,10", "label 10, but the last class of categories.txt is 9"),
    ("a 9 1,2", "../b 9 1", "'../b' does not lie below"),
    ("a 9 1,2", "b/../../c 9 1", "does not lie below"),
    ("a 9 1,2", "/b 9 1", "does not lie below"),
    ("a 9 1,2", "b//c 9 1", "does not lie below"),
    ("a.mp4,1", ".mp4,3", "does not lie below"),
    ("a.mp4,1", ",3", CSV),
    ("a.mp4,1", "b.mp4", CSV),
    ("a.mp4,1", "b.mp4;0;2", CSV),
    ("a.mp4,1", "b.mp4,-2", "'-2' is not a class id"),
    ("a.mp4,1", "b.mp4,2.0", "'2.0' is not a class id"),
    ("a.mp4,1", "b.mp4,3,-1", "-1 means unlabelled and stands alone"),
    ("a.mp4,1", "b.mp4,1,0,0", "write the ids of the classes, not a column of 0 or 1"),
    ("a.mp4,1", "b.mp4,raining,3,1", "as the single-label Moments in Time"),
])
def test_a_bad_line_is_named_with_its_number_and_the_form_expected(tmp_path, first, second, reason):
    with pytest.raises(ValueError) as error:
        read(tmp_path, f"{first}\n\n{second}\n", num_classes=10)
    assert str(error.value).startswith(f"{tmp_path / 'list.txt'}:3: ")  # the empty line counts
    assert reason in str(error.value)


@pytest.mark.parametrize("content, reason", [
    (b"caf\xe9 9 1\n", "not a text file in UTF-8"), (b"\xff\xd8\xff\xe0\x00", "UTF-8"),
    ("\n  \r\n", "lists no video"), ("a 0 1,2\n", "lists no video")])
def test_a_file_that_is_no_list_is_named(tmp_path, content, reason):
    with pytest.raises(ValueError, match=f"list.txt: .*{reason}"):
        read(tmp_path, content)


@pytest.mark.parametrize("text, expected", [
    ("adult+female+singing\neating/feeding\n", ["adult+female+singing", "eating/feeding"]),
    ("cooking,1\neating/feeding,0\n", ["eating/feeding", "cooking"]),
    ("\ufeff a \r\nb\r\n\r\n", ["a", "b"])])
def test_categories_are_names_by_id_in_either_form(tmp_path, text, expected):
    write(tmp_path / "categories.txt", text)
    assert data.read_categories(tmp_path) == expected


@pytest.mark.parametrize("text, reason", [
    ("\n\n", "names no class"), ("a\n\nb\n", "txt:2: an empty line would shift the ids"),
    ("a\nb\na\n", "the name 'a' stands there twice"), ("a,0\nb,2\n", "the ids must be 0 to 1"),
    ("a,1\nb,2\n", "the ids must be"), ("a,0\nb,1\nc,1\n", "the ids must be 0 to 2"),
    (None, "missing; write the names of the classes there")])
def test_categories_that_would_shift_ids_are_refused(tmp_path, text, reason):
    if text is not None:
        write(tmp_path / "categories.txt", text)
    with pytest.raises(ValueError, match=f"categories.txt.*{reason}"):
        data.read_categories(tmp_path)


def test_two_places_must_name_the_same_classes_in_one_order():
    data.compare_categories(["a", "b"], "x", ["a", "b"], "y")
    with pytest.raises(ValueError, match="class 1 is 'b' in x, but 'c' in y"):
        data.compare_categories(["a", "b", "c"], "x", ["a", "c", "b"], "y")
    with pytest.raises(ValueError, match="x names 2 classes, y 3"):
        data.compare_categories(["a", "b"], "x", ["a", "b", "c"], "y")


# ---- which frames ----------------------------------------------------------------------------

@pytest.mark.parametrize("num_frames, segments, expected", [
    (24, 8, [1, 4, 7, 10, 13, 16, 19, 22]),  # parts of 3 frames: the second of each
    (90, 5, [9, 27, 45, 63, 81]), (90, 8, [5, 16, 28, 39, 50, 61, 73, 84]),
    (8, 8, [0, 1, 2, 3, 4, 5, 6, 7]), (5, 8, [0, 0, 1, 2, 2, 3, 4, 4]), (3, 5, [0, 0, 1, 2, 2]),
    (1, 8, [0] * 8), (90, 1, [45])])
def test_segments_give_the_middle_frame_of_each_part(num_frames, segments, expected):
    indices = data.segment_indices(num_frames, segments)
    assert indices.tolist() == expected
    assert indices.dtype.kind == "i"


def test_the_middle_frames_are_those_of_the_peers():
    """Their formula, in floating point."""
    for segments in (1, 3, 5, 8, 16):
        for num_frames in range(1, 400):
            part = num_frames / segments
            expected = [int(part / 2 + k * part) for k in range(segments)]
            assert data.segment_indices(num_frames, segments).tolist() == expected


class Constant:
    """A generator that draws one value again and again."""

    def __init__(self, value):
        self.value = value

    def random(self, size):
        return np.full(size, self.value)


@pytest.mark.parametrize("num_frames, first, last", [
    (90, [0, 18, 36, 54, 72], [17, 35, 53, 71, 89]),
    (92, [0, 18, 36, 55, 73], [18, 36, 55, 73, 91]),  # parts of 18.4 frames
    (3, [0, 0, 1, 1, 2], [0, 1, 1, 2, 2])])
def test_random_frames_lie_anywhere_in_their_part(num_frames, first, last):
    assert data.segment_indices(num_frames, 5, Constant(0.0)).tolist() == first
    assert data.segment_indices(num_frames, 5, Constant(1 - 1e-9)).tolist() == last
    # (4 + the largest number below 1) is rounded up to 5, which lies behind the last frame
    assert data.segment_indices(num_frames, 5, Constant(np.nextafter(1, 0)))[-1] == num_frames - 1


@pytest.mark.parametrize("num_frames, segments", [(97, 8), (90, 16), (3, 5)])
def test_random_frames_reach_every_frame_in_order(num_frames, segments):
    """The authors' code never draws the last frames: 10 of 90 with 16 segments."""
    rng = np.random.default_rng(0)
    drawn = [data.segment_indices(num_frames, segments, rng).tolist() for _ in range(2000)]
    assert all(indices == sorted(indices) for indices in drawn)
    assert set(itertools.chain(*drawn)) == set(range(num_frames))


@pytest.mark.parametrize("num_frames, length, stride, start, expected", [
    (90, 5, 2, 13, [13, 15, 17, 19, 21]), (5, 8, 1, 3, [3, 4, 0, 1, 2, 3, 4, 0]),
    (10, 4, 8, 0, [0, 8, 6, 4]), (1, 3, 2, 0, [0, 0, 0])])
def test_a_clip_that_reaches_the_end_starts_again(num_frames, length, stride, start, expected):
    assert data.clip_indices(num_frames, length, stride, start).tolist() == expected


@pytest.mark.parametrize("num_frames, length, views, expected", [
    (90, 32, 10, [0, 2, 5, 8, 11, 14, 17, 20, 23, 26]),
    (90, 44, 10, [0, 0, 0, 0, 0, 1, 1, 1, 1, 2]),
    (90, 32, 1, [13]), (50, 32, 3, [0, 0, 0]), (50, 32, 1, [0]), (65, 32, 2, [0, 1])])
def test_several_clips_start_evenly_and_a_single_one_in_the_middle(
        num_frames, length, views, expected):
    starts = data.clip_starts(num_frames, length, 2, views)
    assert starts.tolist() == expected
    assert starts.dtype.kind == "i"


def test_ten_clips_start_where_linspace_has_them():
    for num_frames in range(1, 600):
        room = max(0, num_frames - 64)
        expected = np.linspace(0, room, 10, dtype=int)
        assert data.clip_starts(num_frames, 32, 2, 10).tolist() == expected.tolist()


@pytest.mark.parametrize("num_frames, starts, middle", [
    (64, [0], 0), (65, [0, 1], 0), (70, range(7), 3), (50, [0], 0)])
def test_a_training_clip_starts_anywhere_and_an_evaluation_clip_in_the_middle(
        num_frames, starts, middle):
    """The authors' code never draws the last start."""
    recipe = {"sampling": "clip", "frames": 32, "stride": 2}
    rng = np.random.default_rng(0)
    drawn = {tuple(data.sample_indices(num_frames, recipe, rng)) for _ in range(200)}
    assert drawn == {tuple((start + 2 * i) % num_frames for i in range(32)) for start in starts}
    assert data.sample_indices(num_frames, recipe).tolist() == [
        (middle + 2 * i) % num_frames for i in range(32)]


def test_segments_ignore_the_stride():
    recipe = {"sampling": "segments", "frames": 5, "stride": 7}
    assert data.sample_indices(90, recipe).tolist() == [9, 27, 45, 63, 81]
    drawn = data.sample_indices(90, recipe, np.random.default_rng(3))
    assert drawn.tolist() == data.segment_indices(90, 5, np.random.default_rng(3)).tolist()


# ---- which pixels ----------------------------------------------------------------------------

# In quarters of the room to the right and below: the corners, the centre, the middles of the
# edges, the centres of the quarters.
THIRTEEN_PLACES = [(0, 0), (4, 0), (0, 4), (4, 4), (2, 2), (0, 2), (4, 2), (2, 4), (2, 0),
                   (1, 1), (3, 1), (1, 3), (3, 3)]


def legal_boxes(width, height, sides):
    """All boxes (x, y, w, h) of TSN's multi-scale crop: 10 pairs of sides at 13 places."""
    boxes = set()
    for (i, w), (j, h) in itertools.product(enumerate(sides), repeat=2):
        if abs(i - j) <= 1:
            for right, down in THIRTEEN_PLACES:
                boxes.add((right * ((width - w) // 4), down * ((height - h) // 4), w, h))
    return boxes


@pytest.mark.parametrize("width, height, target, sides", [
    (426, 320, 224, [320, 280, 240, 211]), (320, 426, 224, [320, 280, 240, 211]),
    (600, 254, 224, [254, 224, 190, 167]),  # 222 is within 2 of 224
    (600, 253, 224, [253, 221, 189, 166]),  # 221 is not
    (600, 258, 224, [258, 224, 193, 170]),  # nor are 225 and 227 further away: 225 is within 2,
    (600, 260, 224, [260, 227, 195, 171]),  # 227 is not
    (600, 222, 224, [222, 194, 166, 146]),  # 224 would not fit into 222
])
def test_the_multiscale_crop_draws_every_pair_of_sides_and_place(width, height, target, sides):
    rng = np.random.default_rng(0)
    drawn = {tuple(map(int, data.multiscale_box(width, height, target, rng))) for _ in range(3000)}
    assert drawn == legal_boxes(width, height, sides)
    assert len({(w, h) for _, _, w, h in drawn}) == 10


def test_the_multiscale_crop_is_uniform_over_pairs_and_places():
    rng = np.random.default_rng(0)
    boxes = [data.multiscale_box(426, 320, 224, rng) for _ in range(13000)]
    pairs = [(w, h) for _, _, w, h in boxes]
    places = [(x // ((426 - w) // 4), y // ((320 - h) // 4)) for x, y, w, h in boxes if h < 320]
    for drawn, kinds in ((pairs, 10), (places, 13)):
        _, counts = np.unique(drawn, axis=0, return_counts=True)
        mean = len(drawn) / kinds
        assert len(counts) == kinds
        assert abs(counts - mean).max() < 5 * np.sqrt(mean)  # five standard deviations


def test_the_multiscale_crop_stays_inside_any_frame():
    rng = np.random.default_rng(1)
    for _ in range(3000):
        width, height = rng.integers(2, 500, 2)
        x, y, w, h = data.multiscale_box(width, height, rng.integers(1, 300), rng)
        assert min(x, y) >= 0 and min(w, h) >= 1
        assert x + w <= width and y + h <= height


@pytest.mark.parametrize("width, height, size, expected", [
    (426, 320, (224, 224), (224, 224)), (426, 320, 256, (340, 256)), (320, 426, 128, (128, 170)),
    (40, 36, 64, (71, 64)), (340, 256, 256, (340, 256))])
def test_resizing_is_pillows_bilinear_filter(width, height, size, expected):
    """On noise and on smooth waves, no value differs by more than 1 of 255."""
    y, x = np.mgrid[:height, :width]
    waves = [255 * x / width, 255 * y / height, 127 + 127 * np.sin(x / 9 + y / 7)]
    frames = np.stack([noise(0, height, width, 3), np.stack(waves, -1).astype(np.uint8)])
    resized = data.resize(torch.from_numpy(frames), size)
    assert resized.dtype == torch.uint8
    for frame, ours in zip(frames, resized.numpy().astype(int)):
        theirs = np.asarray(Image.fromarray(frame).resize(expected, Image.BILINEAR))
        assert ours.shape == theirs.shape
        assert abs(ours - theirs).max() <= 1
        assert abs(ours - theirs).mean() < 0.05


def test_resizing_rounds_the_long_side_as_torchvision_does():
    for width, height in ((426, 320), (320, 426), (568, 320), (320, 1023), (37, 23)):
        for short in (112, 128, 160, 256):
            theirs = vision.resize(Image.new("RGB", (width, height)), short).size
            frames = torch.zeros(1, height, width, 3, dtype=torch.uint8)
            assert data.resize(frames, short).shape == (1, theirs[1], theirs[0], 3)


def test_frames_are_read_by_index_and_decoded_once(tmp_path, monkeypatch):
    frames = noise(0, 4, 5, 6, 3)
    write_frames(tmp_path, frames)
    opened = []
    image_open = Image.open
    monkeypatch.setattr(Image, "open", lambda file: opened.append(file) or image_open(file))
    read = data.read_frames(tmp_path, np.array([3, 0, 3, 3]))
    assert read.dtype == torch.uint8
    assert np.array_equal(read, frames[[3, 0, 3, 3]])
    assert len(opened) == 2


def test_grey_frames_become_rgb(tmp_path):
    grey = noise(0, 5, 6)
    write_frames(tmp_path, [grey])
    assert np.array_equal(data.read_frames(tmp_path, [0])[0], np.stack([grey] * 3, -1))


def test_frames_come_from_a_folder_before_a_zip_of_its_name(tmp_path):
    pack(write_frames(tmp_path / "v", noise(1, 2, 5, 6, 3)).parent)
    assert np.array_equal(data.read_frames(tmp_path / "v", [1]), noise(1, 2, 5, 6, 3)[1:])
    write_frames(tmp_path / "v", noise(2, 2, 5, 6, 3))
    assert np.array_equal(data.read_frames(tmp_path / "v", [1]), noise(2, 2, 5, 6, 3)[1:])


def windows(folder, indices, boxes, size):
    """{(box, flipped): frames (T, size, size, 3)}, cut, resized and flipped by Pillow."""
    images = [Image.open(folder / f"img_{index + 1:05d}.jpg") for index in indices]
    result = {}
    for x, y, w, h in boxes:
        frames = [np.asarray(image.crop((x, y, x + w, y + h)).resize((size, size), Image.BILINEAR))
                  for image in images]
        frames = np.stack(frames).astype(np.int16)
        result[(x, y, w, h), False] = frames
        result[(x, y, w, h), True] = frames[:, :, ::-1]
    return result


def matches(clip, candidates):
    """The keys of the windows that a clip equals, each value within 1."""
    clip = clip.numpy().astype(np.int16)
    keys = []
    for key, frames in candidates.items():
        if abs(frames[0, 0] - clip[0, 0]).max() <= 1 and abs(frames - clip).max() <= 1:
            keys.append(key)
    return keys


@pytest.mark.parametrize("recipe", [
    {"augment": "multiscale", "crop": 32}, {"augment": "jitter", "crop": 16, "jitter": (20, 24)}],
    ids=["multiscale", "jitter"])
def test_a_training_clip_is_one_crop_and_one_flip_of_all_frames(tmp_path, recipe):
    """The clip is searched for among all that Pillow cuts: exactly one box, flipped or not,
    explains all its frames. Jitter: for short sides of 20 to 24, the 16 pixels of the crop are
    32, 30, 29, 28 or 27 of the 40 stored ones, at any offset. Both ends are reached."""
    write_frames(tmp_path, noise(0, 3, 40, 48, 3))
    if recipe["augment"] == "multiscale":
        draws = 60
        boxes = legal_boxes(48, 40, [40, 35, 32, 26])  # 30 is within 2 of 32
    else:
        draws = 600
        boxes = [(x, y, side, side) for side in (32, 30, 29, 28, 27)
                 for x in range(48 - side + 1) for y in range(40 - side + 1)]
    candidates = windows(tmp_path, [2, 0], boxes, recipe["crop"])
    seen = []
    for draw in range(draws):
        rng = np.random.default_rng([7, draw])
        clip = data.make_clip(tmp_path, [2, 0], {**recipe, "flip": True, "draft": False}, rng)
        assert clip.dtype == torch.uint8 and clip.is_contiguous()
        found = matches(clip, candidates)
        assert len(found) == 1
        seen += found

    assert 0.4 * draws < sum(flipped for _, flipped in seen) < 0.6 * draws
    if recipe["augment"] == "multiscale":
        assert len(set(seen)) > 40
        return
    for side in (32, 30, 29, 28, 27):
        xs = [x for (x, _, w, _), _ in seen if w == side]
        ys = [y for (_, y, w, _), _ in seen if w == side]
        assert (min(xs), max(xs), min(ys), max(ys)) == (0, 48 - side, 0, 40 - side)


def test_a_clip_is_never_flipped_when_flip_is_off(tmp_path):
    """The frame is dark on the left and bright on the right."""
    write_frames(tmp_path, [np.tile(np.arange(40)[None, :, None], (36, 1, 3))])
    for augment in ("multiscale", "jitter"):
        recipe = {**data.RECIPE, **data.TOY, "augment": augment}
        for draw in range(20):
            clip = data.make_clip(tmp_path, [0], recipe, np.random.default_rng(draw))
            assert clip[0, 0, 0, 0] < clip[0, 0, -1, 0]


def test_the_jittered_box_is_the_crop_of_a_resized_frame(tmp_path):
    """At half the size, box (2x, 2y) is the crop at (x, y) of the frame that Pillow resized, but
    for its rim, where the resized frame also knows what lies outside."""
    frame = noise(1, 40, 48, 3)
    write_frames(tmp_path, [frame])
    half = np.asarray(Image.fromarray(frame).resize((24, 20), Image.BILINEAR)).astype(int)
    recipe = {"augment": "jitter", "jitter": (20, 20), "crop": 16, "flip": False, "draft": False}
    even = 0
    for draw in range(40):
        x, y, *_ = data.jitter_box(48, 40, 16, (20, 20), np.random.default_rng(draw))
        clip = data.make_clip(tmp_path, [0], recipe, np.random.default_rng(draw))
        if x % 2 == 0 and y % 2 == 0:
            even += 1
            crop = half[y // 2 : y // 2 + 16, x // 2 : x // 2 + 16]
            assert abs(clip[0].numpy() - crop)[1:-1, 1:-1].max() <= 1
    assert even > 3


def test_draft_mode_decodes_jpegs_at_half_their_size(tmp_path):
    """Where that is still as long as the largest short side, in training: the clip is then the one
    of frames stored at half the size."""
    y, x = np.mgrid[:80, :96]
    waves = 127 + 60 * np.stack([np.sin(x / 9), np.cos(y / 7), np.sin((x + y) / 11)], -1)
    (tmp_path / "jpeg").mkdir()
    Image.fromarray(waves.astype(np.uint8)).save(tmp_path / "jpeg" / "img_00001.jpg", quality=90)
    with Image.open(tmp_path / "jpeg" / "img_00001.jpg") as image:
        image.draft("RGB", (48, 40))
        write_frames(tmp_path / "half", [np.asarray(image)])
    recipe = {"augment": "jitter", "jitter": (30, 40), "crop": 28, "flip": True, "draft": False,
              "test_resize": 40, "test_crop": 36}

    def clip(folder, draw=None, **changes):
        rng = None
        if draw is not None:
            rng = np.random.default_rng(draw)
        return data.make_clip(tmp_path / folder, [0], {**recipe, **changes}, rng)

    for draw in range(10):
        plain = clip("jpeg", draw)
        draft = clip("jpeg", draw, draft=True)
        assert torch.equal(draft, clip("half", draw))
        assert 0 < abs(draft.int() - plain.int()).float().mean() < 2
        larger = {"jitter": (30, 41)}  # half of 80 is too small for it
        assert torch.equal(clip("jpeg", draw, draft=True, **larger), clip("jpeg", draw, **larger))
        assert torch.equal(clip("half", draw, draft=True), clip("half", draw))  # PNG inside
    assert torch.equal(clip("jpeg", draft=True), clip("jpeg"))  # evaluation
    pack(tmp_path)
    assert torch.equal(clip("jpeg", 3, draft=True), clip("half", 3))


@pytest.mark.parametrize("width, height, left, top", [
    (340, 256, 58, 16), (256, 340, 16, 58), (341, 256, 58, 16), (343, 256, 60, 16)])
def test_the_centre_crop_is_torchvisions(tmp_path, width, height, left, top):
    """On a frame whose pixels are their coordinates. 58.5 and 59.5 are rounded to even."""
    y, x = np.mgrid[:height, :width]
    frame = np.stack([x % 256, y % 256, x // 256 + 2 * (y // 256)], -1).astype(np.uint8)
    write_frames(tmp_path, [frame])
    clip = data.make_clip(tmp_path, [0], {"test_resize": 256, "test_crop": 224})
    assert np.array_equal(clip[0], frame[top : top + 224, left : left + 224])
    assert np.array_equal(clip[0], np.asarray(vision.center_crop(Image.fromarray(frame), 224)))


@pytest.mark.parametrize("recipe, resized, left, top", [
    ({"test_resize": 256, "test_crop": 224}, (340, 256), 58, 16),
    ({"test_resize": 128, "test_crop": 112}, (170, 128), 29, 8)])
def test_the_evaluation_view_is_a_resize_and_a_centre_crop(tmp_path, recipe, resized, left, top):
    frame = noise(0, 320, 426, 3)
    write_frames(tmp_path, [frame, 255 - frame])
    clip = data.make_clip(tmp_path, [1, 0], recipe)
    crop = recipe["test_crop"]
    assert clip.shape == (2, crop, crop, 3) and clip.is_contiguous()
    for ours, stored in zip(clip.numpy().astype(int), (255 - frame, frame)):
        theirs = Image.fromarray(stored).resize(resized, Image.BILINEAR)
        theirs = np.asarray(theirs.crop((left, top, left + crop, top + crop)))
        assert abs(ours - theirs).max() <= 1


@pytest.mark.parametrize("channels_last", [False, True])
def test_normalising_is_done_by_channel_and_moves_channels_before_rows(channels_last):
    clips = torch.from_numpy(noise(0, 2, 3, 4, 5, 3))
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    result = data.normalise(clips, mean, std, channels_last)
    assert result.shape == (2, 3, 3, 4, 5) and result.dtype == torch.float32
    for c in range(3):
        expected = (clips[..., c].double() / 255 - mean[c]) / std[c]
        assert (result[:, :, c] - expected).abs().max() < 1e-6
    assert result.is_contiguous() != channels_last
    assert result.permute(0, 1, 3, 4, 2).is_contiguous() == channels_last


# ---- the data set ----------------------------------------------------------------------------

SEGMENTS = {**data.RECIPE, **data.TOY, "frames": 8, "augment": "multiscale", "flip": True}
CLIP = {**data.RECIPE, **data.TOY, "frames": 6, "sampling": "clip", "stride": 3}


def data_folder(folder, lines, split="train"):
    """A data folder of three classes, with three small frames for every line of its list."""
    write(folder / "categories.txt", "a\nb\nc\n")
    write(folder / f"{split}.txt", "".join(f"{line}\n" for line in lines))
    for row, line in enumerate(lines):
        if line:
            write_frames(folder / "frames" / line.split()[0], noise(row, 3, 36, 40, 3))
    return folder


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """40 toy videos for training, 10 for validation. Several tests share them; none changes them."""
    out = tmp_path_factory.mktemp("toy") / "toy"
    data.draw_toy(out, videos=40, seed=3)
    return out


@pytest.fixture(scope="module")
def packed_toy(toy):
    """The same toy with its frames in zips."""
    folder = shutil.copytree(toy, toy.parent / "packed")
    pack(folder / "frames")
    return folder


def test_an_item_is_a_clip_its_labels_and_its_row(tmp_path):
    folder = data_folder(tmp_path, ["p 3 0,2", "q 1 -1"])
    videos = data.VideoList(folder, "train", SEGMENTS, train=False)
    assert len(videos) == 2
    clip, labels, row = videos[0]
    assert clip.shape == (8, 32, 32, 3) and clip.dtype == torch.uint8
    assert labels.tolist() == [1, 0, 1] and labels.dtype == torch.float32
    assert row == 0
    clip, labels, row = videos[1]
    assert (clip == clip[0]).all()  # its one frame, eight times
    assert labels.tolist() == [0, 0, 0]
    assert row == 1


@pytest.mark.parametrize("recipe", [SEGMENTS, CLIP], ids=["segments", "clip"])
def test_an_item_depends_on_the_seed_the_epoch_and_the_row_alone(toy, recipe):
    videos = data.VideoList(toy, "train", recipe, train=True, seed=4)
    for row in (0, 7, 39):
        clips = []
        for epoch in (0, 1, 5):
            rng = np.random.default_rng([4, epoch, row])
            indices = data.sample_indices(24, recipe, rng)
            expected = data.make_clip(toy / "frames" / f"train/{row:05d}", indices, recipe, rng)
            clip, _, number = videos[40 * epoch + row]
            assert number == row
            assert torch.equal(clip, expected)
            clips.append(clip)
        assert not torch.equal(clips[0], clips[1])
    other_seed = data.VideoList(toy, "train", recipe, train=True, seed=5)
    assert not torch.equal(videos[0][0], other_seed[0][0])
    evaluation = data.VideoList(toy, "val", recipe, train=False)
    assert torch.equal(evaluation[0][0], evaluation[10][0])  # no epochs


def test_items_are_the_same_in_any_worker_in_any_order_and_from_zips(toy, packed_toy):
    wanted = [*range(0, 40, 3), *range(200, 240, 3)]  # epochs 0 and 5
    plain = data.VideoList(toy, "train", SEGMENTS, train=True)
    packed = data.VideoList(packed_toy, "train", SEGMENTS, train=True)

    def load(videos, order, workers):
        loader = torch.utils.data.DataLoader(
            videos, batch_size=4, sampler=order, num_workers=workers)
        batches = list(data.load(loader))
        return [torch.cat(parts) for parts in zip(*batches)]

    clips, labels, rows = load(plain, wanted, workers=0)
    assert rows.tolist() == [index % 40 for index in wanted]
    for videos, order, workers in (
            (plain, wanted, 1), (plain, wanted, 3), (plain, wanted[::-1], 2), (packed, wanted, 2)):
        others = load(videos, order, workers)
        if order != wanted:
            others = [part.flip(0) for part in others]
        assert torch.equal(clips, others[0])
        assert torch.equal(labels, others[1])
        assert torch.equal(rows, others[2])


def test_views_are_given_a_function_that_reads_frames(toy, packed_toy):
    def views(read, num_frames, path):
        return read([2, 0]), num_frames, path

    for folder in (toy, packed_toy):
        videos = data.VideoList(folder, "val", SEGMENTS, train=False, views=views)
        row, (frames, num_frames, path) = videos[3]
        assert (row, num_frames, path) == (3, 24, "val/00041_reversed")
        assert torch.equal(frames, data.read_frames(toy / "frames" / path, [2, 0]))


def test_the_lines_of_a_list_are_merged_counted_and_named_by_their_numbers(tmp_path):
    folder = data_folder(tmp_path, [])
    text = "p 9 0,1\n\nq 0 1\np 9 2\nr 8 -1\n r 8 -1 \nq 7 2"
    write(folder / "train.txt", text)
    videos = data.VideoList(folder, "train", CLIP, train=True)
    assert [videos.video(row) for row in range(len(videos))] == [
        ("p", 9, [0, 1, 2], 1), ("r", 8, [], 5), ("q", 7, [2], 7)]
    assert videos.class_counts.tolist() == [1, 1, 2]
    assert videos.describe() == (f"{folder / 'train.txt'}: 3 videos, 1.33 labels each; 2 repeated "
                                 "lines merged, 1 lines of videos without frames left out")


def test_the_hash_of_a_list_knows_its_lines_and_their_order_but_not_its_spaces(tmp_path):
    hashes = []
    for text in ("p 9 0\nq 9 1\n", "\ufeffp 9 0 \r\n\r\nq 9 1", "p 9 0\nq 9 2\n", "q 9 1\np 9 0\n"):
        folder = data_folder(tmp_path, [])
        write(folder / "train.txt", text)
        hashes.append(data.VideoList(folder, "train", CLIP, train=True).hash)
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3


def test_a_long_list_is_kept_as_bytes_and_offsets(tmp_path):
    """A million Python objects would be copied into every worker. 16 bytes a line would not."""
    folder = data_folder(tmp_path, [])
    write(folder / "train.txt", "".join(f"videos/{row:06d} 90 {row % 3}\n" for row in range(20000)))
    videos = data.VideoList(folder, "train", CLIP, train=True)
    pickled = pickle.dumps(videos)
    assert len(pickled) < (folder / "train.txt").stat().st_size + 16 * 20000 + 5000
    # also what a worker gets that is started by spawn
    assert pickle.loads(pickled).video(19999) == ("videos/019999", 90, [1], 20000)


def test_lists_in_a_data_folder_are_always_ours(tmp_path):
    folder = data_folder(tmp_path, [])
    write(folder / "train.txt", "a.mp4 92 2\nx 90 7 1\n")
    videos = data.VideoList(folder, "train", CLIP, train=True)
    assert videos.video(0) == ("a", 92, [2], 1)
    assert videos.video(1) == ("x 90", 7, [1], 2)
    write(folder / "train.txt", "a.mp4,2\n")
    with pytest.raises(ValueError, match=f"train.txt:1: .*{OURS}"):
        data.VideoList(folder, "train", CLIP, train=True)
    with pytest.raises(ValueError, match="val.txt: missing; python data.py extract --out .* --val"):
        data.VideoList(folder, "val", CLIP, train=False)


def damage(file, kind):
    """Break an image or a zip."""
    content = file.read_bytes()
    half = len(content) // 2
    if kind == "missing":
        file.unlink()
    elif kind == "truncated":
        file.write_bytes(content[:half])
    elif kind == "text":
        file.write_text("not an image and not a zip\n")
    elif kind == "bit":  # a checksum tells
        file.write_bytes(content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :])
    elif kind == "size":  # other than the other frames'
        Image.fromarray(noise(9, 40, 48, 3)).save(file, format="PNG")


@pytest.mark.parametrize("kind", ["missing", "truncated", "text", "size", "bit"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_broken_frame_is_named_with_its_list_line(tmp_path, kind, packed):
    folder = data_folder(tmp_path, ["p 3 0", "", "q/r 3 1", "s 3 2"])
    damage(folder / "frames" / "q" / "r" / "img_00003.jpg", kind)
    if packed:
        pack(folder / "frames")
    for train in (True, False):
        videos = data.VideoList(folder, "train", SEGMENTS, train)
        assert videos[0][2] == 0
        assert videos[2][2] == 2
        with pytest.raises(OSError) as error:
            videos[1]
        start = f"{folder / 'train.txt'}:3: {folder / 'frames' / 'q' / 'r'}"
        assert str(error.value).startswith(start)  # the empty line counts
        assert "img_00003.jpg: " in str(error.value)
        assert len(str(error.value).splitlines()) == 1 and " at 0x" not in str(error.value)


@pytest.mark.parametrize("kind", ["missing", "truncated", "text", "bit"])
def test_a_broken_zip_is_named_with_its_list_line(tmp_path, kind):
    folder = data_folder(tmp_path, ["p 3 0", "q 3 1"])
    pack(folder / "frames")
    damage(folder / "frames" / "q.zip", kind)
    with pytest.raises(OSError) as error:
        data.VideoList(folder, "train", SEGMENTS, train=False)[1]
    start = f"{folder / 'train.txt'}:2: {folder / 'frames' / 'q'}"
    assert str(error.value).startswith(start)
    assert len(str(error.value).splitlines()) == 1


def test_no_damage_of_a_zip_goes_unnoticed(tmp_path):
    """Whatever bytes are changed, the frames are the stored ones or the error is an OSError."""
    frames = noise(0, 3, 6, 8, 3)
    pack(write_frames(tmp_path / "v", frames).parent)
    whole = (tmp_path / "v.zip").read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        changed = np.frombuffer(whole, np.uint8).copy()
        changed[rng.integers(len(whole), size=3)] = rng.integers(256)
        write(tmp_path / "v.zip", changed[: rng.integers(100, 2 * len(whole))].tobytes())
        try:
            assert np.array_equal(data.read_frames(tmp_path / "v", [0, 1, 2]), frames)
        except OSError as error:
            assert str(tmp_path / "v") in str(error)
            refused += 1
    assert 150 < refused < 300


def test_a_broken_frame_in_a_worker_is_one_line_and_status_2(tmp_path, monkeypatch, capsys):
    folder = data_folder(tmp_path, ["p 3 0", "q 3 1"])
    damage(folder / "frames" / "q" / "img_00003.jpg", "truncated")
    videos = data.VideoList(folder, "train", SEGMENTS, train=False)
    loader = torch.utils.data.DataLoader(videos, num_workers=1)
    monkeypatch.setattr(data, "main", lambda: list(data.load(loader)))
    assert call("data") == 2
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith(f"data.py: {folder / 'train.txt'}:2: ")


def test_skip_broken_takes_the_next_row_and_says_so(tmp_path, capsys):
    folder = data_folder(tmp_path, [f"v{row} 3 {row % 3}" for row in range(6)])
    for row in (2, 3, 5):
        shutil.rmtree(folder / "frames" / f"v{row}")
    strict = data.VideoList(folder, "train", SEGMENTS, train=True)
    videos = data.VideoList(folder, "train", SEGMENTS, train=True, skip_broken=True)
    for row, taken in enumerate([0, 1, 4, 4, 4, 0]):  # after the last row comes the first
        for epoch in (0, 3):
            clip, labels, number = videos[6 * epoch + row]
            expected = strict[6 * epoch + taken]
            assert number == taken
            assert torch.equal(clip, expected[0]) and torch.equal(labels, expected[1])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 * 4  # row 2 skips two
    assert lines[0].startswith(f"{folder / 'train.txt'}:3: ")
    assert lines[0].endswith("skipped, the next video is taken")


def test_skip_broken_goes_at_most_ten_rows_on_and_never_in_evaluation(tmp_path):
    folder = data_folder(tmp_path, [f"v{row} 3 {row % 3}" for row in range(13)])
    for row in range(11):
        shutil.rmtree(folder / "frames" / f"v{row}")
    videos = data.VideoList(folder, "train", SEGMENTS, train=True, skip_broken=True)
    assert videos[1][2] == 11  # rows 1 to 10 are broken
    with pytest.raises(OSError):
        videos[0]  # rows 0 to 10
    evaluation = data.VideoList(folder, "train", SEGMENTS, train=False, skip_broken=True)
    assert evaluation[11][2] == 11
    with pytest.raises(OSError, match=r"train\.txt:11: "):
        evaluation[10]


@pytest.mark.parametrize("message", [
    "unable to write to file </torch_71_2>: No space left on device (28)",
    "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's "
    "workers are out of shared memory."])
def test_too_little_shared_memory_is_one_line_that_says_what_to_do(message):
    """Docker's default is 64 MB; PyTorch speaks of a full disk."""
    def loader(message):
        yield 1
        raise RuntimeError(message)

    with pytest.raises(OSError, match="--shm-size .* fewer --workers"):
        list(data.load(loader(message)))
    with pytest.raises(RuntimeError, match="something else"):
        list(data.load(loader("something else")))
    assert next(data.load(loader(message))) == 1


# ---- the toy videos --------------------------------------------------------------------------

OPPOSITE = {
    "moving+right": "moving+left", "moving+left": "moving+right",
    "moving+down": "moving+up", "moving+up": "moving+down",
    "moving+down+right": "moving+up+left", "moving+up+left": "moving+down+right",
    "moving+up+right": "moving+down+left", "moving+down+left": "moving+up+right",
    "checkered+ground": "checkered+ground", "striped+ground": "striped+ground",
}


def listed(folder, split):
    """{path: set of class names} of a toy list, read here line by line."""
    names = (folder / "categories.txt").read_text().split()
    videos = {}
    for line in (folder / f"{split}.txt").read_text().splitlines():
        path, frames, labels = line.split(" ")
        assert frames == "24"
        videos[path] = {names[int(label)] for label in labels.split(",")}
    return videos


def frame_bytes(folder, path, indices):
    return [(folder / "frames" / path / f"img_{i + 1:05d}.jpg").read_bytes() for i in indices]


def test_the_toy_has_the_form_of_real_data(toy):
    train = listed(toy, "train")
    val = listed(toy, "val")
    assert len(train) == 40 and len(val) == 10 and not set(train) & set(val)
    expected = {"categories.txt", "train.txt", "val.txt"}
    for path in [*train, *val]:
        for number in range(1, 25):
            expected.add(f"frames/{path}/img_{number:05d}.jpg")
    assert set(contents(toy)) == expected
    with Image.open(toy / "frames" / path / "img_00001.jpg") as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (40, 36))


def test_the_labels_of_a_toy_video_are_what_moves():
    """Where the one shape of every other video goes, measured from its pixels: the shift of the
    whole picture that best lays a frame on the one three frames later."""
    for row in range(0, 40, 2):
        video, labels = data.draw_video(row, np.random.default_rng([0, row]))
        # the ground is at rest, so it is the median
        moving = abs(video.astype(float) - np.median(video, axis=0)).max(-1) > 20
        spectrum = np.fft.fft2(moving)
        overlap = np.fft.ifft2(spectrum[3:] * spectrum[:-3].conj()).real.sum(0)
        down, right = np.unravel_index(overlap.argmax(), overlap.shape)

        words = ["moving"]
        if 1 < down < 35:  # of 36 rows, whose ends are joined: 35 is one row up
            words.append("down" if down < 18 else "up")
        if 1 < right < 39:
            words.append("right" if right < 20 else "left")
        assert data.TOY_CATEGORIES[labels[0]] == "+".join(words)


def test_the_default_toy_has_one_or_two_motions_on_different_axes_and_seldom_a_ground():
    """Labels are drawn before pixels, so one frame a video suffices."""
    for rows in (range(1200), range(1200, 1350)):
        counts = np.zeros(10, int)
        grounds = 0
        for row in rows:
            _, labels = data.draw_video(row, np.random.default_rng([0, row]), frames=1)
            names = {data.TOY_CATEGORIES[label] for label in labels}
            motions = {name for name in names if OPPOSITE[name] != name}
            assert len(labels) == len(names)
            assert len(motions) == 1 + row % 2
            assert not motions & {OPPOSITE[name] for name in motions}
            grounds += len(names - motions)
            counts[labels] += 1
        assert grounds == len(rows) / 5
        assert counts.min() > 0


def test_validation_holds_each_toy_video_with_its_reversal(toy):
    """Both have the same middle frames, in opposite orders: a model that is blind to the order of
    frames cannot tell them apart."""
    videos = listed(toy, "val")
    forward = [path for path in videos if not path.endswith("_reversed")]
    assert len(forward) == 5
    segments = data.sample_indices(24, {"sampling": "segments", "frames": 8, "stride": 1})
    clip = data.sample_indices(24, {"sampling": "clip", "frames": 16, "stride": 1})
    for path in forward:
        backward = f"{path}_reversed"
        assert videos[backward] == {OPPOSITE[name] for name in videos[path]}
        for indices in (range(24), segments, clip):
            frames = frame_bytes(toy, path, indices)
            assert frames == frame_bytes(toy, backward, indices)[::-1]
            assert len(set(frames)) > len(frames) / 2


def test_a_model_that_is_blind_to_order_scores_at_most_77_83_on_the_default_toy():
    """It gives a video and its reversal the same scores. So for each pair every order of their
    labels is tried, ties too, and the best mean of the two average precisions is taken."""
    best = []
    for row in range(1200, 1350):
        _, labels = data.draw_video(row, np.random.default_rng([0, row]), frames=1)
        pair = [labels, [data.reversed_label(label) for label in labels]]
        union = sorted({*pair[0], *pair[1]})
        orders = np.array(list(itertools.product(range(len(union)), repeat=len(union))))
        mean = 0
        for video in pair:
            truth = np.tile(np.isin(union, video), (len(orders), 1))
            mean = mean + evaluate.average_precision(orders, truth) / 2
        best.append(mean.max())
    assert round(100 * np.mean(best), 2) == 77.83


def test_the_toy_depends_on_its_seed_alone(tmp_path):
    for name, seed in (("one", 5), ("other", 6)):
        data.draw_toy(tmp_path / name, videos=8, seed=seed)
    assert call("data", "toy", tmp_path / "same", "--videos", 8, "--seed", 5) == 0
    one = contents(tmp_path / "one")
    other = contents(tmp_path / "other")
    assert one == contents(tmp_path / "same")
    assert set(one) == set(other)
    assert not any(one[path] == other[path] for path in one if path.endswith(".jpg"))


def test_a_toy_that_is_stopped_half_way_leaves_nothing(tmp_path, monkeypatch):
    saved = []
    save = Image.Image.save

    def fail(image, file, **options):
        saved.append(file)
        if len(saved) > 30:
            raise OSError("No space left on device")
        save(image, file, **options)

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="No space left"):
        data.draw_toy(tmp_path / "toy", videos=8)
    assert len(saved) == 31
    assert os.listdir(tmp_path) == []


# ---- extraction ------------------------------------------------------------------------------

def ffmpeg(*arguments):
    subprocess.run(["ffmpeg", "-nostdin", "-v", "error", "-y", *map(str, arguments)], check=True)


def film(file, size="64x48", rate=30, frames=2, options=()):
    """A small moving picture as a video file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    ffmpeg("-f", "lavfi", "-i", f"testsrc=size={size}:rate={rate}", "-frames:v", frames,
           "-c:v", "mpeg4", "-q:v", 3, *options, file)
    return file


# path: (frames, tolerance, width, height); other rates than 30 may differ between ffmpeg's versions
WHOLE = {
    "brighter": (15, 0, 426, 320),
    "cut": (13, 12, 426, 320),           # the rest of its 30 frames is missing in the file
    "deep/er/portrait": (9, 0, 320, 426),
    "late": (90, 0, 426, 320),
    "odd": (4, 0, 334, 320),
    "slow": (24, 2, 426, 320),
    "two words 7": (1, 0, 426, 320),
    "variable": (60, 2, 426, 320),
    "whole": (30, 0, 426, 320),
}
BROKEN = {"index", "loop", "sound", "text"}


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Videos of every kind, and files that are none. Several tests share them."""
    folder = tmp_path_factory.mktemp("the videos")
    film(folder / "deep/er/portrait.MOV", "256x340", frames=9)
    film(folder / "slow.mp4", "340x256", rate=10, frames=8)
    film(folder / "two words 7.mp4", "340x256", frames=1)
    ffmpeg("-f", "lavfi", "-i", "testsrc=size=47x45:rate=30", "-frames:v", 4, "-c:v", "mjpeg",
           "-pix_fmt", "yuvj444p", folder / "odd.avi")
    ffmpeg("-f", "lavfi", "-i", "color=black:size=68x51:rate=30,format=yuv444p,"
           "geq=lum='20+12*N':cb=128:cr=128", "-frames:v", 15, "-c:v", "mpeg4", "-q:v", 2,
           "-pix_fmt", "yuv420p", folder / "brighter.mp4")
    ffmpeg("-f", "lavfi", "-i", "testsrc=size=340x256:rate=30:duration=2,"
           "select='not(mod(n\\,7))+not(mod(n\\,11))+eq(n\\,59)'", "-c:v", "mpeg4",
           folder / "variable.mkv")

    # a trimmed clip: its picture starts two seconds after its sound
    film(folder / "picture.mp4", frames=90)
    ffmpeg("-f", "lavfi", "-i", "sine=duration=5", "-itsoffset", 2, "-i", folder / "picture.mp4",
           "-c:v", "copy", "-c:a", "aac", folder / "late.mp4")
    (folder / "picture.mp4").unlink()

    # the file's end is missing; the index is in front of the pictures, or behind them
    whole = film(folder / "whole.mp4", "340x256", frames=30, options=["-movflags", "+faststart"])
    write(folder / "cut.mp4", whole.read_bytes()[: whole.stat().st_size * 6 // 10])
    behind = film(folder / "index.mp4", "340x256", frames=30)
    write(behind, behind.read_bytes()[: behind.stat().st_size * 6 // 10])

    ffmpeg("-f", "lavfi", "-i", "sine=duration=1", "-c:a", "aac", folder / "sound.mp4")
    write(folder / "text.mp4", "not a video\n" * 100)
    write(folder / "notes.txt", "no video either, and not named as one\n")
    os.symlink("loop.mp4", folder / "loop.mp4")
    return folder


@pytest.fixture(scope="module")
def extracted(videos, tmp_path_factory):
    out = tmp_path_factory.mktemp("extracted") / "new" / "the data"
    assert data.extract(videos, out, "train", workers=2) == (len(WHOLE), len(BROKEN))
    return out


def failures(out, split="train"):
    """{path: reason} of a list of failures."""
    lines = (out / f"{split}_failed.txt").read_text().splitlines()
    return dict(line.split("\t") for line in lines)


@needs_ffmpeg
def test_every_video_that_can_be_decoded_becomes_frames_and_a_line(extracted):
    assert sorted(os.listdir(extracted)) == ["frames", "train.txt", "train_failed.txt"]
    expected = set()
    lines = []
    for path, (count, tolerance, width, height) in WHOLE.items():
        found = len(os.listdir(extracted / "frames" / path))
        assert abs(found - count) <= tolerance
        lines.append(f"{path} {found} -1\n")
        for number in range(1, found + 1):
            expected.add(f"{path}/img_{number:05d}.jpg")
        with Image.open(extracted / "frames" / path / f"img_{found:05d}.jpg") as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (width, height))
    assert (extracted / "train.txt").read_text() == "".join(lines)
    assert set(contents(extracted / "frames")) == expected  # no part of a broken video
    assert set(failures(extracted)) == BROKEN
    assert all(reason.startswith("ffmpeg: ") for reason in failures(extracted).values())


@needs_ffmpeg
def test_frames_are_in_the_order_of_the_video(extracted):
    """Frame n has luminance 20 + 12 n of 16..235, which is (4 + 12 n) x 255 / 219 in a JPEG."""
    for n in range(15):
        with Image.open(extracted / "frames" / "brighter" / f"img_{n + 1:05d}.jpg") as image:
            luminance = np.asarray(image.convert("L")).mean()
        assert abs(luminance - (4 + 12 * n) * 255 / 219) < 4


@needs_ffmpeg
def test_a_damaged_video_keeps_what_can_be_decoded_and_says_so(videos, extracted, tmp_path, capsys):
    last = len(os.listdir(extracted / "frames" / "cut")) - 1  # the frame in which the file ends
    assert last > 5
    assert (frame_bytes(extracted, "cut", range(last))
            == frame_bytes(extracted, "whole", range(last)))
    shutil.copy(videos / "cut.mp4", tmp_path / "cut.mp4")
    assert data.extract(tmp_path, tmp_path / "data", "train", workers=1) == (1, 0)
    line, _ = capsys.readouterr().err.splitlines()  # and the line of progress
    assert line.startswith(f"{tmp_path / 'cut.mp4'}: {last + 1} frames kept; ffmpeg: ")


@needs_ffmpeg
def test_a_rotation_tag_is_obeyed(tmp_path):
    plain = film(tmp_path / "plain.mp4", "340x256", frames=3)
    turned = tmp_path / "videos" / "turned.mp4"
    turned.parent.mkdir()
    for before, after in (([], ["-metadata:s:v:0", "rotate=90"]), (["-display_rotation", 90], [])):
        try:
            ffmpeg(*before, "-i", plain, "-c", "copy", *after, turned)
        except subprocess.CalledProcessError:
            continue  # versions before 6 know only the first way, later ones only the second
        described = subprocess.run(["ffmpeg", "-i", turned], capture_output=True, text=True).stderr
        if "rotation of" in described:
            break
    data.extract(turned.parent, tmp_path / "data", "train", workers=1)
    with Image.open(tmp_path / "data" / "frames" / "turned" / "img_00001.jpg") as image:
        assert image.size == (320, 426)


@needs_ffmpeg
def test_packed_frames_are_the_same_and_either_form_is_kept(videos, extracted, tmp_path):
    arguments = ["extract", "--videos", videos, "--out", tmp_path, "--split", "train",
                 "--workers", 2]
    assert call("data", *arguments, "--pack") == 0
    for name in ("train.txt", "train_failed.txt"):
        assert (tmp_path / name).read_bytes() == (extracted / name).read_bytes()
    assert set(contents(tmp_path / "frames")) == {f"{path}.zip" for path in WHOLE}
    for path in WHOLE:
        frames = contents(extracted / "frames" / path)
        with zipfile.ZipFile(tmp_path / "frames" / f"{path}.zip") as archive:
            assert archive.namelist() == sorted(frames)
            for info in archive.infolist():
                assert info.compress_type == zipfile.ZIP_STORED
                assert archive.read(info) == frames[info.filename]

    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("frames/**/*.zip")}
    assert call("data", *arguments) == 0  # without --pack
    after = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("frames/**/*.*")}
    assert after == before
    write(tmp_path / "categories.txt", "a\n")
    assert call("data", "check", tmp_path) == 0


@needs_ffmpeg
def test_a_second_run_keeps_what_is_whole_and_writes_its_lists_anew(tmp_path):
    """Broken zips and folders without frames are not whole."""
    for name in "abcde":
        film(tmp_path / "videos" / f"{name}.mp4")
    write(tmp_path / "videos" / "f.mp4", "not a video\n")
    frames = tmp_path / "data" / "frames"
    write_frames(frames / "a", noise(0, 3, 4, 4, 3))
    write_frames(frames / "b", noise(1, 4, 4, 4, 3))
    pack(frames / "b")
    kept = contents(frames)
    write(frames / "c.zip", (frames / "b.zip").read_bytes()[:-30])
    (frames / "d").mkdir()
    assert data.extract(tmp_path / "videos", tmp_path / "data", pack=True, workers=1) == (5, 1)
    assert (tmp_path / "data/train.txt").read_text() == "a 3 -1\nb 4 -1\nc 2 -1\nd 2 -1\ne 2 -1\n"
    assert sorted(os.listdir(frames)) == ["a", "b.zip", "c.zip", "d", "d.zip", "e.zip"]

    film(tmp_path / "videos" / "f.mp4")     # mended
    (tmp_path / "videos" / "c.mp4").unlink()  # given up
    assert data.extract(tmp_path / "videos", tmp_path / "data", workers=1) == (5, 0)
    assert (tmp_path / "data/train.txt").read_text() == "a 3 -1\nb 4 -1\nd 2 -1\ne 2 -1\nf 2 -1\n"
    assert failures(tmp_path / "data") == {}
    assert kept.items() <= contents(frames).items()


@pytest.fixture
def fake_ffmpeg(tmp_path, monkeypatch):
    """fake_ffmpeg(lines): a program of that name on the PATH, which runs these lines of sh. The
    video c.mp4 goes to them, every other one to the real program."""
    def make(lines):
        program = write(tmp_path / "bin" / "ffmpeg", "#!/bin/sh\ncase \"$*\" in *c.mp4*)\n"
                        f"echo frame > img_00001.jpg\n{lines};;\n"
                        f"*) exec '{shutil.which('ffmpeg')}' \"$@\";; esac\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    return make


@needs_ffmpeg
def test_a_killed_extraction_goes_on_as_if_nothing_had_happened(tmp_path, fake_ffmpeg, monkeypatch):
    """SIGKILL while the third of four videos is half decoded."""
    for name in "abcd":
        film(tmp_path / "videos" / f"{name}.mp4")
    with monkeypatch.context() as patch:
        patch.setenv("PATH", os.environ["PATH"])
        fake_ffmpeg(f"echo $$ > '{tmp_path}/part'; mv '{tmp_path}/part' '{tmp_path}/waiting'\n"
                    "exec sleep 100")
        process = subprocess.Popen(
            [sys.executable, ROOT / "data.py", "extract", "--videos", "videos", "--out", "killed",
             "--split", "train", "--workers", "1"], cwd=tmp_path, stderr=subprocess.DEVNULL)
        while not (tmp_path / "waiting").exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
        process.wait()
        os.kill(int((tmp_path / "waiting").read_text()), signal.SIGKILL)
    monkeypatch.setenv("PATH", os.environ["PATH"].removeprefix(f"{tmp_path / 'bin'}{os.pathsep}"))
    assert sorted(os.listdir(tmp_path / "killed" / "frames")) == [".part-train", "a", "b"]
    assert not (tmp_path / "killed" / "train.txt").exists()
    for out in ("killed", "whole"):
        assert data.extract(tmp_path / "videos", tmp_path / out, "train", workers=1) == (4, 0)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert sorted(os.listdir(tmp_path / "killed" / "frames")) == ["a", "b", "c", "d"]


@needs_ffmpeg
@pytest.mark.parametrize("lines", ["exit 255", "kill -9 $$"])
def test_a_short_video_of_a_stopped_ffmpeg_does_not_count_as_whole(tmp_path, fake_ffmpeg, lines):
    """FFmpeg ends with status 255 after a signal that it handles."""
    film(tmp_path / "videos" / "a.mp4")
    write(tmp_path / "videos" / "c.mp4", "")
    fake_ffmpeg(lines)
    assert data.extract(tmp_path / "videos", tmp_path / "data", "train", workers=1) == (1, 1)
    assert "ffmpeg was stopped" in failures(tmp_path / "data")["c"]
    assert os.listdir(tmp_path / "data" / "frames") == ["a"]


@needs_ffmpeg
def test_a_full_disk_stops_the_extraction(tmp_path, fake_ffmpeg, monkeypatch):
    """Otherwise every video that follows would be listed as broken."""
    for name in "abc":
        film(tmp_path / "videos" / f"{name}.mp4")
    with monkeypatch.context() as patch:
        patch.setattr(zipfile.ZipFile, "writestr", lambda *_: os.mkdir("/full/disk"))
        patch.setattr(os, "mkdir", lambda *_: raise_full_disk())
    fake_ffmpeg("echo 'av_interleaved_write_frame(): No space left on device' >&2")
    with pytest.raises(OSError, match="no space left on the disk; free some"):
        data.extract(tmp_path / "videos", tmp_path / "data", "train", workers=1)
    assert sorted(os.listdir(tmp_path / "data")) == ["frames"]
    assert sorted(os.listdir(tmp_path / "data" / "frames")) == ["a", "b"]


def test_find_videos_follows_links_and_counts_what_it_skips(tmp_path, capsys):
    names = ["a.ts", "b.mts", "c.M2TS", "d.ogv", "e.gif", "f.mp4", "g.webm"]
    for name in names:
        write(tmp_path / "elsewhere" / name, "")
    write(tmp_path / "videos" / "h.mp4", "")
    write(tmp_path / "videos" / "notes.txt", "")
    write(tmp_path / "videos" / "list.csv", "")
    os.symlink(tmp_path / "elsewhere", tmp_path / "videos" / "link")
    os.symlink(tmp_path / "videos", tmp_path / "elsewhere" / "back")  # in a circle
    found = data.find_videos(tmp_path / "videos")
    assert list(found) == ["h", *(f"link/{name}" for name in "abcdefg")]
    assert found["link/c"] == tmp_path / "videos" / "link" / "c.M2TS"
    assert "videos: 2 files skipped, whose ending is not one of mp4 " in capsys.readouterr().err


@pytest.mark.parametrize("listed, stored", [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_name_is_found_in_either_unicode_form(tmp_path, monkeypatch, listed, stored):
    """macOS stores the letter é as e and an accent, a list usually as one letter."""
    name = unicodedata.normalize(stored, "café")
    write(tmp_path / "videos" / f"{name}.mp4", "")
    path = unicodedata.normalize(listed, "café")
    listing = write(tmp_path / "list.csv", f"./{path}.mp4,1\n")
    decoded = []

    def decode(file, folder):
        decoded.append(file)
        write_frames(folder, noise(0, 2, 4, 4, 3))
        return 2, ""

    monkeypatch.setattr(data, "decode_video", decode)
    monkeypatch.setattr(data, "require_ffmpeg", lambda: None)
    data.extract(tmp_path / "videos", tmp_path / "data", "train", listing, workers=1)
    assert decoded == [tmp_path / "videos" / f"{name}.mp4"]
    assert (tmp_path / "data" / "train.txt").read_text() == f"./{path} 2 1\n"


def test_a_folder_that_cannot_be_read_is_an_error_not_a_loss(tmp_path, monkeypatch):
    write(tmp_path / "closed" / "b.mp4", "")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(OSError, match="Permission denied.*closed"):
        data.find_videos(tmp_path)


def test_two_files_that_would_share_their_frames_are_refused(tmp_path):
    write(tmp_path / "a.mp4", "")
    write(tmp_path / "a.avi", "")
    with pytest.raises(ValueError, match="a.avi and .*a.mp4 would both be called a: rename one"):
        data.find_videos(tmp_path)


@needs_ffmpeg
def test_names_that_no_list_line_can_hold_are_failures(tmp_path):
    film(tmp_path / "videos" / "a.mp4")
    for name in (b"caf\xe9.mp4", b" b.mp4", b"c\nd.mp4"):
        try:
            shutil.copy(tmp_path / "videos" / "a.mp4",
                        os.path.join(os.fsencode(tmp_path / "videos"), name))
        except OSError:
            pytest.skip("this file system refuses such names")
    assert data.extract(tmp_path / "videos", tmp_path / "data", "train", workers=1) == (1, 3)
    assert (tmp_path / "data" / "train.txt").read_text() == "a 2 -1\n"
    assert (tmp_path / "data" / "train_failed.txt").read_text().count("rename the file") == 3


@needs_ffmpeg
def test_a_foreign_list_is_written_in_our_form_and_its_order(videos, tmp_path, capsys):
    listing = write(tmp_path / "list.txt", "slow.mp4 7 264\nabsent.mp4 3\n./odd.mp4 2\n"
                    "text.mp4 5\ntwo words 7.mp4 -1\ndeep/er/portrait.mp4 4 1\nslow.mp4 8\n")
    assert call("data", "extract", "--videos", videos, "--list", listing, "--out",
                tmp_path / "data", "--split", "test", "--format", "mmaction2-videos") == 0
    printed = capsys.readouterr()
    assert "5 videos whole" in printed.out or "4 videos whole, 2 failed" in printed.out
    assert "1 repeated lines merged" in printed.err
    lines = (tmp_path / "data" / "test.txt").read_text().splitlines()
    assert lines[0].startswith("slow 2") and lines[0].endswith(" 7,264,8")
    assert lines[1:] == ["./odd 4 2", "two words 7 1 -1", "deep/er/portrait 9 4,1"]
    assert list(failures(tmp_path / "data", "test")) == ["absent", "text"]
    assert failures(tmp_path / "data", "test")["absent"] == "no such video"


@needs_ffmpeg
def test_no_whole_video_is_status_2(tmp_path):
    write(tmp_path / "videos" / "a.mp4", "not a video\n")
    assert call("data", "extract", "--videos", tmp_path / "videos", "--out", tmp_path / "data",
                "--split", "train") == 2
    assert list(failures(tmp_path / "data")) == ["a"]
    assert os.listdir(tmp_path / "data" / "frames") == []


def read_labels(folder, text):
    videos, categories = data.read_labels(write(folder / "list.csv", text), "auto", folder)
    return [video.labels for video in videos], categories


def test_class_names_of_a_csv_become_ids(tmp_path):
    text = 'a.mp4,running\nb.mp4,"cooking, slowly",running\nc.mp4,-1\na.mp4,"cooking, slowly"\n'
    assert read_labels(tmp_path, text) == (
        [[1, 0], [0, 1], []], ["cooking, slowly", "running"])  # sorted
    write(tmp_path / "categories.txt", "running\nwalking\ncooking, slowly\n")
    assert read_labels(tmp_path, text) == ([[0, 2], [2, 0], []], None)
    assert read_labels(tmp_path, "a.mp4,2\n") == ([[2]], None)


@pytest.mark.parametrize("text, reason", [
    ("a.mp4,flying\n", r":1: the class 'flying' is not in .*categories.txt"),
    ("a.mp4,running,3,0\n", ":1: .*single-label Moments in Time"),
    ("a.mp4,running\nb.mp4,1\n", ":2: the id 1, but other lines hold class names"),
    ("name,label\na.mp4,running\n", ":1: 'name' has no ending .* without a line of column titles"),
    ("a.mp4,2\n", ":1: label 2, but the last class of categories.txt is 1")])
def test_class_names_that_are_unknown_or_mixed_with_numbers_are_refused(tmp_path, text, reason):
    write(tmp_path / "categories.txt", "running\nwalking\n")
    with pytest.raises(ValueError, match=f"list.csv{reason}"):
        read_labels(tmp_path, text)


def test_the_videos_with_the_smallest_hashes_validate():
    lines = [f"v{i} 9 {i}" for i in range(10)]
    by_hash = sorted(lines, key=lambda line: zlib.crc32(line.split()[0].encode()))
    for fraction, count in ((0.2, 2), (0.5, 5), (0.01, 1), (0.99, 9)):  # at least one, never all
        train, val = data.split_lines(lines, fraction)
        assert sorted(val) == sorted(by_hash[:count])
        assert train == [line for line in lines if line not in val]  # each in the list's order
        assert val == [line for line in lines if line in val]
    with pytest.raises(ValueError, match="--val 0.2: 1 videos cannot be split"):
        data.split_lines(lines[:1], 0.2)


@needs_ffmpeg
def test_one_command_makes_a_data_folder_of_a_csv_with_class_names(tmp_path, capsys):
    lines = []
    for i in range(4):
        film(tmp_path / "videos" / f"clip {i}.mp4")
        lines.append(f"clip {i}.mp4,{'ab'[i % 2]}\n")
    listing = write(tmp_path / "list.csv", "".join(lines))
    results = []
    for _ in range(2):
        assert call("data", "extract", "--videos", tmp_path / "videos", "--list", listing,
                    "--out", tmp_path / "data", "--val", 0.25) == 0
        results.append(contents(tmp_path / "data"))
    assert results[0] == results[1]
    assert results[0]["categories.txt"] == b"a\nb\n"
    assert results[0]["train.txt"].count(b"\n") == 3
    assert results[0]["val.txt"].count(b"\n") == 1
    assert f"next: python data.py check {tmp_path / 'data'}" in capsys.readouterr().out
    assert call("data", "check", tmp_path / "data") == 0


# ---- check -----------------------------------------------------------------------------------

@pytest.fixture
def sound_folder(tmp_path):
    """Five videos in three lists, without a fault."""
    data_folder(tmp_path, ["p 3 0,1", "", "q/r 3 1", "s 3 1"])
    data_folder(tmp_path, ["t 3 2"], split="val")
    return data_folder(tmp_path, ["u 3 -1"], split="test")


def problems(folder, capsys):
    """What `check` prints of a folder below its description of the lists, and the exit status."""
    status = call("data", "check", folder)
    lines = capsys.readouterr().out.splitlines()
    return [line for line in lines if "labels each" not in line and "most videos" not in line], status


def test_check_describes_a_sound_folder(sound_folder, capsys):
    assert call("data", "check", sound_folder) == 0
    out = capsys.readouterr().out
    assert f"{sound_folder / 'train.txt'}: 3 videos, 1.33 labels each; 0 repeated lines" in out
    assert "  most videos: b (3); fewest: c (0)\n" in out
    assert f"{sound_folder / 'test.txt'}: 1 videos, 0.00 labels each" in out
    assert out.endswith("\n0 problems\n")
    pack(sound_folder / "frames")
    assert call("data", "check", sound_folder) == 0


@pytest.mark.parametrize("name, kind, reason", [
    ("img_00001.jpg", "missing", "2 of 3 frames"), ("img_00002.jpg", "missing", "2 of 3 frames"),
    ("img_00003.jpg", "missing", "2 of 3 frames"), ("img_00001.jpg", "text", "not an image"),
    ("img_00002.jpg", "text", "not an image"), ("img_00003.jpg", "truncated", "truncated"),
    ("img_00003.jpg", "size", "its size is not that of the clip's first frame")])
@pytest.mark.parametrize("packed", [False, True])
def test_check_names_a_broken_frame_by_its_line(sound_folder, capsys, name, kind, reason, packed):
    damage(sound_folder / "frames" / "q" / "r" / name, kind)
    if packed:
        pack(sound_folder / "frames")
    (line, total), status = problems(sound_folder, capsys)
    assert status == 2 and total == "1 problems"
    assert line.startswith(f"{sound_folder / 'train.txt'}:3: q/r: ")
    assert reason in line


def test_check_names_every_other_problem(sound_folder, capsys):
    train = sound_folder / "train.txt"
    val = sound_folder / "val.txt"
    write_frames(sound_folder / "frames" / "p", noise(0, 4, 36, 40, 3))  # a frame too many
    shutil.rmtree(sound_folder / "frames" / "q")
    write(sound_folder / "frames" / "t.zip", "no zip\n")
    shutil.rmtree(sound_folder / "frames" / "t")
    write(val, "t 3 2\ns 3 1\nu 900000000000000 0\n")
    (sound_folder / "test.txt").unlink()
    found, status = problems(sound_folder, capsys)
    assert status == 2
    assert found == [
        f"{train}:1: p: 1 files that are not among its 3 frames",
        f"{train}:3: q/r: 0 of 3 frames",
        f"{val}:1: t: 0 of 3 frames",
        f"{val}:2: s is also in {train}",
        f"{val}:3: u: 3 of 900000000000000 frames",
        "5 problems"]

    val.unlink()
    found, _ = problems(sound_folder, capsys)
    assert f"{val} is missing: training needs it" in found
    train.unlink()
    assert call("data", "check", sound_folder) == 2
    assert "no train.txt, val.txt or test.txt; python data.py extract" in capsys.readouterr().err


# ---- what the scripts share ------------------------------------------------------------------

def test_a_list_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("No space left on device")

    write(tmp_path / "train.txt", "the one before\n")
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        data.write_lines(tmp_path / "train.txt", ["a 1 -1"])
    assert contents(tmp_path) == {"train.txt": b"the one before\n"}


@pytest.mark.parametrize("error, status, line", [
    (ValueError("a list is bad"), 2, "data.py: a list is bad\n"),
    (OSError("Caught OSError in worker 0.\nTraceback ...\nOSError: a frame is bad\n"), 2,
     "data.py: a frame is bad\n"),
    (KeyboardInterrupt(), 130, "data.py: stopped\n")])
def test_a_script_ends_with_one_line_and_a_status(monkeypatch, capsys, error, status, line):
    def fail():
        raise error

    monkeypatch.setattr(data, "main", fail)
    assert call("data") == status
    assert capsys.readouterr().err == line
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert call("data") == status
    assert capsys.readouterr().err == f"[rank 1] {line}"


def test_a_console_that_lacks_a_letter_shows_another(tmp_path):
    """As a process of its own, from another folder."""
    data_folder(tmp_path / "data", ["p 3 0"])
    data_folder(tmp_path / "data", ["q 3 0"], split="val")
    write(tmp_path / "data" / "categories.txt", "crêpes\nb\nc\n")
    result = python(ROOT / "data.py", "check", "data", cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert result.returncode == 0
    assert "most videos: cr?pes (1)" in result.stdout


def test_the_toy_needs_nothing_that_windows_lacks(tmp_path):
    script = write(tmp_path / "windows.py", f"""
import os, runpy, signal, sys
import numpy, torch, PIL.Image
for name in ("resource", "fcntl", "pwd", "grp", "termios"):
    sys.modules[name] = None  # to import it is now an error
for name in ("fork", "setpgrp", "setsid", "killpg", "getpgid", "getuid", "sysconf", "mkfifo"):
    delattr(os, name)
for name in ("SIGKILL", "SIGHUP", "SIGUSR1", "SIGALRM", "alarm"):
    delattr(signal, name)
sys.argv = ["data.py", "toy", "toy", "--videos", "8"]
runpy.run_path({str(ROOT / "data.py")!r}, run_name="__main__")
""")
    result = python(script, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    data.draw_toy(tmp_path / "here", videos=8)
    assert contents(tmp_path / "toy") == contents(tmp_path / "here")
