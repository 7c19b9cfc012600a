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
import re
import shutil
import signal
import subprocess
import sys
import time
import unicodedata
import zipfile
import zlib
from pathlib import Path
from types import SimpleNamespace

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
        Image.fromarray(frame).save(folder / f"img_{number:05d}.jpg", format="PNG")
    return folder


def pack(folder):
    """Every folder of frames below a folder becomes a zip, as extract --pack leaves it."""
    for parent in {file.parent for file in folder.rglob("*.jpg")}:
        with zipfile.ZipFile(f"{parent}.zip", "w") as archive:
            for file in parent.iterdir():
                archive.write(file, file.name)
        shutil.rmtree(parent)


# ---- lists -----------------------------------------------------------------------------------

def read(folder, text, format="auto", num_classes=None):
    """[(path, number of frames, labels), ...] of a list file with this text."""
    videos = data.read_list(write(folder / "list.txt", text), format, num_classes)
    return [video[:3] for video in videos]


def test_a_line_holds_a_path_a_number_of_frames_and_labels(tmp_path):
    assert read(tmp_path, "cooking/a 90 7,2\n") == [("cooking/a", 90, [7, 2])]
    assert read(tmp_path, "cooking/a 90 -1\n") == [("cooking/a", 90, [])]          # unlabelled
    assert read(tmp_path, "cooking/a.mp4,7,2\n") == [("cooking/a", None, [7, 2])]  # M-MiT's csv


FOUR_VIDEOS = [
    ("adult+female+singing/zz-demo0003_1", 91, [266, 33]),
    ("playing+sports/zz-demo0005_5", 45, [298, 312, 0, 69, 83]),
    ("boating/zz-demo-6-2_9", 93, [37, 1]),
    ("sleeping/zz-demo0010_8", 90, [240]),
]
MOMENTS_IN_TIME = """\
adult+female+singing/zz-demo0003_1.mp4,266,33
playing+sports/zz-demo0005_5.mp4,298,312,0,69,83
boating/zz-demo-6-2_9.mp4,37,1
sleeping/zz-demo0010_8.mp4,240
"""
XTEMPORAL_FRAMES = """\
adult+female+singing/zz-demo0003_1 91 266,33
playing+sports/zz-demo0005_5 45 298,312,0,69,83
boating/zz-demo-6-2_9 93 37,1
sleeping/zz-demo0010_8 90 240
"""
XTEMPORAL_VIDEOS = re.sub(r"^(\S+)", r"\1.mp4", XTEMPORAL_FRAMES, flags=re.MULTILINE)
MMACTION2_FRAMES = XTEMPORAL_FRAMES.replace(",", " ")
MMACTION2_VIDEOS = MOMENTS_IN_TIME.replace(",", " ")
# mmaction2's own program lists each video again, with 0 frames of optical flow.
MMACTION2_GENERATED = re.sub(r"(\S+) \d+ (.+)\n", r"\g<0>\1 0 \2\n", MMACTION2_FRAMES)


@pytest.mark.parametrize("text, format", [
    (MOMENTS_IN_TIME, "csv"), (MOMENTS_IN_TIME, "auto"), (XTEMPORAL_FRAMES, "ours"),
    (XTEMPORAL_FRAMES, "auto"), (XTEMPORAL_VIDEOS, "ours"), (XTEMPORAL_VIDEOS, "auto"),
    (MMACTION2_FRAMES, "mmaction2-frames"), (MMACTION2_VIDEOS, "mmaction2-videos"),
    (MMACTION2_GENERATED, "mmaction2-frames")])
def test_four_videos_are_read_from_the_lists_of_every_project(tmp_path, text, format):
    expected = FOUR_VIDEOS
    if text in (MOMENTS_IN_TIME, MMACTION2_VIDEOS):
        expected = [(path, None, labels) for path, _, labels in FOUR_VIDEOS]
    assert read(tmp_path, text, format, num_classes=313) == expected


@pytest.mark.parametrize("text", [
    "a 9 1,2\r\nb 8 3\r\n", "a 9 1,2\n\n  \nb 8 3\n\n", "a  9   1, 2\nb\t8\t3\n",
    " a 9 1,2 \n  b 8 3 \t", "\ufeffa 9 1,2\n./b 8 3\n"])
def test_white_space_and_the_mark_of_windows_programs_mean_nothing(tmp_path, text):
    assert read(tmp_path, text) == [("a", 9, [1, 2]), ("b", 8, [3])]


@pytest.mark.parametrize("line, expected", [
    ("a.mp4, 0", ("a", None, [0])),
    ("a.mp4,0,,", ("a", None, [0])),
    ('"a.mp4","0","2"', ("a", None, [0, 2])),
    ('a.mp4, "0,2"', ("a", None, [0, 2])),
    ("my video.mp4,3", ("my video", None, [3])),
    ('"a, b.mp4",3', ("a, b", None, [3])),
    ("a.MP4,-1", ("a", None, [])),
    ("a.avi.mp4,3", ("a", None, [3])),  # a converted file
    ("a.v2,4", ("a.v2", None, [4]))])
def test_a_csv_is_read_as_spreadsheets_write_it(tmp_path, line, expected):
    assert read(tmp_path, f"{line}\n") == [expected]


def test_fields_are_read_from_the_right_and_a_line_of_two_meanings_needs_a_format(tmp_path):
    assert read(tmp_path, "my video 90 7\n") == [("my video", 90, [7])]
    assert read(tmp_path, "my video 1 90 7\n", "ours") == [("my video 1", 90, [7])]
    assert read(tmp_path, "a.mp4 92 69\n", "ours") == [("a", 92, [69])]
    assert read(tmp_path, "a.mp4 92 69\n", "mmaction2-videos") == [("a", None, [92, 69])]
    assert read(tmp_path, "x 90 7 264\n", "mmaction2-frames") == [("x", 90, [7, 264])]
    for text in ("a.mp4 92 69\n", "x 90 7 264\n", "a.mp4 5\nb.mp4 92 69\n"):
        with pytest.raises(ValueError, match="several ways.*--format"):
            read(tmp_path, text)
    # one comma between ids tells for the whole file
    assert read(tmp_path, "a.mp4 92 69\nb 9 1,2\n") == [("a", 92, [69]), ("b", 9, [1, 2])]


def test_a_path_on_several_lines_gets_all_their_labels(tmp_path):
    """One line for each label is a common form. All labels but the first once were lost."""
    assert read(tmp_path, "a.mp4,0\nb.mp4,1\na.mp4,2\na.mp4,0\n") == [
        ("a", None, [0, 2]), ("b", None, [1])]
    path = write(tmp_path / "list.txt", "a 9 0\nb 0 1\na 9 2\n")
    videos, repeated, without_frames = data.read_videos(path)
    assert videos == [("a", 9, [0, 2], 1)]
    assert (repeated, without_frames) == (1, 1)
    with pytest.raises(ValueError, match="list.txt:3: a has 8 frames here and 9 in line 1"):
        read(tmp_path, "a 9 0\nb 9 0\na 8 1\n")


OURS = "path num_frames id[,id...]"
CSV = "name.mp4,id[,id...]"


@pytest.mark.parametrize("first, second, reasons", [
    ("a 9 1,2", "b 9 -2", ["read as ours", OURS]),
    ("a 9 1,2", "b 9.5 1", [OURS]),
    ("a 9 1,2", "b 9999999999999999 1", [OURS]),
    ("a 9 1,2", "b 9 3,10", ["label 10", "last class of categories.txt is 9"]),
    ("a 9 1,2", "../b 9 1", ["'../b'", "inside the folder"]),
    ("a.mp4,1", "C:\\b.mp4,3", ["inside the folder"]),
    ("a.mp4,1", "b.mp4", [CSV]),
    ("a.mp4,1", "b.mp4,-2", ["'-2' is not a class id"]),
    ("a.mp4,1", "b.mp4,3,-1", ["-1 means unlabelled and stands alone"]),
    ("a.mp4,1", "b.mp4,1,01", ["appears twice"])])
def test_a_bad_line_is_named_with_its_number_and_what_was_expected(
        tmp_path, first, second, reasons):
    with pytest.raises(ValueError) as error:
        read(tmp_path, f"{first}\n\n{second}\n", num_classes=10)
    assert str(error.value).startswith(f"{tmp_path / 'list.txt'}:3: ")  # the empty line counts
    for reason in reasons:
        assert reason in str(error.value)


def test_categories_are_names_by_id(tmp_path):
    for text, expected in (("c+d\na/b\n", ["c+d", "a/b"]), ("c+d,1\na/b,0\n", ["a/b", "c+d"]),
                           ("\ufeff b \r\na\r\n\r\n", ["b", "a"])):
        write(tmp_path / "categories.txt", text)
        assert data.read_categories(tmp_path) == expected


def test_two_places_must_name_the_same_classes_in_one_order():
    data.compare_categories(["a", "b"], "x", ["a", "b"], "y")
    with pytest.raises(ValueError, match="class 1 is 'b' in x, but 'c' in y"):
        data.compare_categories(["a", "b", "c"], "x", ["a", "c", "b"], "y")
    with pytest.raises(ValueError, match="x names 2 classes, y 3"):
        data.compare_categories(["a", "b"], "x", ["a", "b", "c"], "y")


# ---- which frames ----------------------------------------------------------------------------

def middles(num_frames, segments):
    return data.segment_indices(num_frames, segments).tolist()


def test_segments_give_the_middle_frame_of_each_part():
    assert middles(24, 8) == [1, 4, 7, 10, 13, 16, 19, 22]  # parts of 3 frames: the second of each
    assert middles(90, 5) == [9, 27, 45, 63, 81]
    assert middles(90, 8) == [5, 16, 28, 39, 50, 61, 73, 84]
    assert middles(90, 1) == [45]
    assert middles(8, 8) == [0, 1, 2, 3, 4, 5, 6, 7]
    assert middles(5, 8) == [0, 0, 1, 2, 2, 3, 4, 4]  # a short video repeats frames, in order
    assert middles(1, 8) == [0] * 8
    # the peers' formula, in floating point
    for segments in (1, 3, 5, 8, 16):
        for num_frames in range(1, 400):
            part = num_frames / segments
            assert middles(num_frames, segments) == [
                int(part / 2 + k * part) for k in range(segments)]


def draws(values):
    """A generator that draws these values, or one value again and again."""
    return SimpleNamespace(random=lambda size: np.broadcast_to(values, size))


def test_random_frames_lie_anywhere_in_their_part():
    def indices(num_frames, *places):
        """Where in its part each of five frames is drawn: 0 is the beginning, 1 the end."""
        return data.segment_indices(num_frames, 5, draws(places)).tolist()

    # 90 frames are five parts of 18
    assert indices(90, 0.0, 0.2, 0.4, 0.6, 0.8) == [0, 21, 43, 64, 86]
    assert indices(90, 0) == [0, 18, 36, 54, 72]
    assert indices(90, 1 - 1e-9) == [17, 35, 53, 71, 89]

    # 92 frames are five parts of 18.4; of 3 frames, some stand in two parts
    assert indices(92, 0) == [0, 18, 36, 55, 73]
    assert indices(92, 1 - 1e-9) == [18, 36, 55, 73, 91]
    assert indices(3, 0) == [0, 0, 1, 1, 2]
    assert indices(3, 1 - 1e-9) == [0, 1, 1, 2, 2]

    # 4 + the largest number below 1 is rounded up to 5, which would lie behind the last frame
    assert indices(90, np.nextafter(1, 0))[-1] == 89


def test_every_frame_is_drawn_and_always_in_order():
    """The authors' code never draws the last 10 of 90 frames."""
    rng = np.random.default_rng(0)
    drawn = set()
    for _ in range(2000):
        indices = data.segment_indices(90, 16, rng).tolist()
        assert indices == sorted(indices)
        drawn.update(indices)
    assert drawn == set(range(90))


def test_a_clip_that_reaches_the_end_starts_again():
    assert data.clip_indices(90, 5, 2, 13).tolist() == [13, 15, 17, 19, 21]
    assert data.clip_indices(5, 8, 1, 3).tolist() == [3, 4, 0, 1, 2, 3, 4, 0]
    assert data.clip_indices(10, 4, 8, 0).tolist() == [0, 8, 6, 4]


def test_several_clips_start_evenly_and_a_single_one_in_the_middle():
    assert data.clip_starts(90, 32, 2, 10).tolist() == [0, 2, 5, 8, 11, 14, 17, 20, 23, 26]
    assert data.clip_starts(90, 44, 2, 10).tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 1, 2]
    assert data.clip_starts(90, 32, 2, 1).tolist() == [13]
    assert data.clip_starts(65, 32, 2, 2).tolist() == [0, 1]
    assert data.clip_starts(50, 32, 2, 3).tolist() == [0, 0, 0]  # shorter than a clip
    for num_frames in range(1, 600):
        expected = np.linspace(0, max(0, num_frames - 64), 10, dtype=int)
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
    # one frame from each part, whatever the stride
    recipe = {"sampling": "segments", "frames": 5, "stride": 7}
    assert data.sample_indices(num_frames, recipe).tolist() == middles(num_frames, 5)
    assert data.sample_indices(num_frames, recipe, draws(0.0))[1] == num_frames // 5


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


@pytest.mark.parametrize("width, height, sides", [
    (320, 426, [320, 280, 240, 211]),
    (600, 254, [254, 224, 190, 167]),  # 222 is within 2 of 224
    (600, 253, [253, 221, 189, 166]),  # 221 is not
    (600, 222, [222, 194, 166, 146])])  # 224 does not fit into 222
def test_the_multiscale_crop_draws_every_pair_of_sides_and_place(width, height, sides):
    rng = np.random.default_rng(0)
    drawn = {tuple(map(int, data.multiscale_box(width, height, 224, rng))) for _ in range(3000)}
    assert drawn == legal_boxes(width, height, sides)
    assert len({(w, h) for _, _, w, h in drawn}) == 10


def test_the_multiscale_crop_stays_inside_any_frame():
    rng = np.random.default_rng(0)
    for _ in range(3000):
        width, height = rng.integers(2, 500, 2)
        x, y, w, h = data.multiscale_box(width, height, rng.integers(1, 300), rng)
        assert min(x, y) >= 0
        assert min(w, h) >= 1
        assert x + w <= width
        assert y + h <= height


@pytest.mark.parametrize("width, height", [(320, 426), (568, 321)])
def test_resizing_is_pillows_bilinear_filter_with_torchvisions_size(width, height):
    """On noise and on smooth waves no value differs by more than 1 of 255."""
    y, x = np.mgrid[:height, :width]
    waves = np.stack([127 + 127 * np.sin(x / 9 + y / 7)] * 3, -1).astype(np.uint8)
    for frame in (noise(0, height, width, 3), waves):
        for size in (112, 128, 160, 256, (224, 224)):  # a number is the short side
            theirs = np.asarray(vision.resize(Image.fromarray(frame), size)).astype(int)
            ours = data.resize(torch.from_numpy(frame)[None], size)[0]
            assert ours.dtype == torch.uint8
            assert ours.shape == theirs.shape
            assert abs(ours.numpy() - theirs).max() <= 1
            assert abs(ours.numpy() - theirs).mean() < 0.3


def test_frames_are_read_by_index_as_rgb_and_decoded_once(tmp_path, monkeypatch):
    frames = noise(0, 4, 5, 6)  # grey
    write_frames(tmp_path, frames)
    opened = []
    image_open = Image.open
    monkeypatch.setattr(Image, "open", lambda file: opened.append(file) or image_open(file))
    read = data.read_frames(tmp_path, np.array([3, 0, 3, 3]))
    assert read.dtype == torch.uint8
    assert np.array_equal(read, np.stack([frames[[3, 0, 3, 3]]] * 3, -1))
    assert len(opened) == 2


def windows(folder, indices, boxes, size):
    """[(box, flipped), ...] and their frames (N, T, size, size, 3), cut, resized and flipped by
    Pillow."""
    images = [Image.open(folder / f"img_{index + 1:05d}.jpg") for index in indices]
    keys = []
    clips = []
    for x, y, w, h in boxes:
        cut = [image.crop((x, y, x + w, y + h)).resize((size, size), Image.BILINEAR)
               for image in images]
        clip = np.stack([np.asarray(image) for image in cut]).astype(np.int16)
        keys += [((x, y, w, h), False), ((x, y, w, h), True)]
        clips += [clip, clip[:, :, ::-1]]
    return keys, np.stack(clips)


def match(clip, keys, clips):
    """The key of the one window that a clip equals, each value within 1."""
    clip = clip.numpy().astype(np.int16)
    likely = np.flatnonzero(abs(clips[:, 0, 0] - clip[0, 0]).max((1, 2)) <= 1)  # by the first row
    index, = [i for i in likely if abs(clips[i] - clip).max() <= 1]
    return keys[index]


MULTISCALE_BOXES = legal_boxes(48, 40, [40, 35, 32, 26])  # 30 is within 2 of 32
JITTER_BOXES = [(x, y, side, side) for side in (32, 30, 29, 28, 27)
                for x in range(48 - side + 1) for y in range(40 - side + 1)]


@pytest.mark.parametrize("augment, crop, boxes, draws", [
    ("multiscale", 32, MULTISCALE_BOXES, 60), ("jitter", 16, JITTER_BOXES, 600)])
def test_a_training_clip_is_one_crop_and_one_flip_of_all_frames(
        tmp_path, augment, crop, boxes, draws):
    """The clip is searched for among all that Pillow cuts: exactly one box, flipped or not,
    explains all its frames. Jitter: for short sides of 20 to 24, the 16 pixels of the crop are
    32, 30, 29, 28 or 27 of the 40 stored ones, at any offset up to both ends."""
    write_frames(tmp_path, noise(0, 3, 40, 48, 3))
    keys, clips = windows(tmp_path, [2, 0], boxes, crop)
    recipe = {"augment": augment, "crop": crop, "jitter": (20, 24), "flip": True, "draft": False}
    seen = []
    for draw in range(draws):
        rng = np.random.default_rng([7, draw])
        clip = data.make_clip(tmp_path, [2, 0], recipe, rng)
        assert clip.dtype == torch.uint8
        assert clip.is_contiguous()
        seen.append(match(clip, keys, clips))
    assert 0.4 * draws < sum(flipped for _, flipped in seen) < 0.6 * draws
    recipe["flip"] = False
    for draw in range(20):
        clip = data.make_clip(tmp_path, [2, 0], recipe, np.random.default_rng(draw))
        assert not match(clip, keys, clips)[1]

    if augment == "multiscale":
        assert len(set(seen)) > 40
        return
    for side in (32, 30, 29, 28, 27):
        xs = [x for (x, _, w, _), _ in seen if w == side]
        ys = [y for (_, y, w, _), _ in seen if w == side]
        assert (min(xs), max(xs), min(ys), max(ys)) == (0, 48 - side, 0, 40 - side)


def test_draft_mode_decodes_jpegs_at_half_their_size(tmp_path):
    """Where that is still as long as the largest short side, in training: the clip is then the one
    of frames stored at half the size."""
    y, x = np.mgrid[:80, :96]
    waves = 127 + 60 * np.stack([np.sin(x / 9), np.cos(y / 7), np.sin((x + y) / 11)], -1)
    file = write(tmp_path / "jpeg" / "img_00001.jpg", "")
    Image.fromarray(waves.astype(np.uint8)).save(file, quality=90)
    with Image.open(file) as image:
        image.draft("RGB", (48, 40))
        write_frames(tmp_path / "half", [np.asarray(image)])

    def clip(folder, draw, **changes):
        recipe = {"augment": "jitter", "jitter": (30, 40), "crop": 28, "flip": True, "draft": True}
        rng = np.random.default_rng(draw)
        return data.make_clip(tmp_path / folder, [0], {**recipe, **changes}, rng)

    for draw in range(10):
        assert torch.equal(clip("jpeg", draw), clip("half", draw, draft=False))
        assert not torch.equal(clip("jpeg", draw), clip("jpeg", draw, draft=False))
        large = {"jitter": (30, 41)}  # half of 80 is too small for it
        assert torch.equal(clip("jpeg", draw, **large), clip("jpeg", draw, draft=False, **large))


@pytest.mark.parametrize("width, height", [(341, 256), (343, 256), (256, 343)])
def test_the_evaluation_view_is_torchvisions_resize_and_centre_crop(tmp_path, width, height):
    """Offsets of 58.5 and 59.5 are both rounded to the even number."""
    frames = noise(0, 2, height, width, 3)
    write_frames(tmp_path, frames)
    for short, crop in ((256, 224), (128, 112)):
        clip = data.make_clip(tmp_path, [1, 0], {"test_resize": short, "test_crop": crop})
        assert clip.shape == (2, crop, crop, 3)
        assert clip.is_contiguous()
        for ours, frame in zip(clip.numpy().astype(int), frames[::-1]):
            theirs = vision.center_crop(vision.resize(Image.fromarray(frame), short), crop)
            assert abs(ours - np.asarray(theirs)).max() <= 1


@pytest.mark.parametrize("channels_last", [False, True])
def test_normalising_is_done_by_channel_and_moves_the_channels_forward(channels_last):
    clips = torch.from_numpy(noise(0, 2, 3, 4, 5, 3))
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    result = data.normalise(clips, mean, std, channels_last)
    assert result.shape == (2, 3, 3, 4, 5)
    assert result.dtype == torch.float32
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


def list_of(folder, text):
    """The VideoList of a list with this text, whose frames are not there."""
    write(folder / "categories.txt", "a\nb\nc\n")
    write(folder / "train.txt", text)
    return data.VideoList(folder, "train", CLIP, train=True)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """40 toy videos for training, 10 for validation. Tests share them, and none changes them."""
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
    for number in (2, 3):
        (folder / "frames" / "q" / f"img_0000{number}.jpg").unlink()
    videos = data.VideoList(folder, "train", SEGMENTS, train=False)
    assert len(videos) == 2
    clip, labels, row = videos[0]
    assert clip.shape == (8, 32, 32, 3)
    assert clip.dtype == torch.uint8
    assert labels.tolist() == [1, 0, 1]
    assert labels.dtype == torch.float32
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


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_items_are_the_same_in_any_worker_in_any_order_and_from_zips(toy, packed_toy):
    wanted = [*range(0, 40, 3), *range(200, 240, 3)]  # epochs 0 and 5
    plain = data.VideoList(toy, "train", SEGMENTS, train=True)
    packed = data.VideoList(packed_toy, "train", SEGMENTS, train=True)

    def load(videos, order, workers):
        loader = torch.utils.data.DataLoader(videos, 4, sampler=order, num_workers=workers)
        return [torch.cat(parts) for parts in zip(*data.load(loader))]

    clips, labels, rows = load(plain, wanted, workers=0)
    assert rows.tolist() == [index % 40 for index in wanted]
    for videos, workers in ((plain, 1), (plain, 3), (packed, 2)):
        others = load(videos, wanted, workers)
        assert torch.equal(clips, others[0])
        assert torch.equal(labels, others[1])
        assert torch.equal(rows, others[2])
    backwards = load(plain, wanted[::-1], workers=2)
    assert torch.equal(clips, backwards[0].flip(0))


def test_the_lines_of_a_list_are_merged_counted_and_hashed(tmp_path):
    text = "p 9 0,1\n\nq 0 1\np 9 2\nr 8 -1\n r 8 -1 \nq 7 2"
    videos = list_of(tmp_path, text)
    assert [videos.video(row) for row in range(len(videos))] == [
        ("p", 9, [0, 1, 2], 1), ("r", 8, [], 5), ("q", 7, [2], 7)]
    assert videos.class_counts.tolist() == [1, 1, 2]
    assert videos.describe() == (f"{tmp_path / 'train.txt'}: 3 videos, 1.33 labels each; 2 "
                                 "repeated lines merged, 1 lines of videos without frames left out")
    # the hash knows the lines and their order, but not the system that wrote them
    assert list_of(tmp_path, "\ufeff" + text.replace("\n", "\r\n") + "\r\n").hash == videos.hash
    assert list_of(tmp_path, text.replace("q 7 2", "q 7 1")).hash != videos.hash
    assert list_of(tmp_path, "p 9 0\nq 9 0\n").hash != list_of(tmp_path, "q 9 0\np 9 0\n").hash


def test_a_long_list_is_kept_as_bytes_and_offsets(tmp_path):
    """A million Python objects would be copied into every worker. 16 bytes a line would not."""
    text = "".join(f"videos/{row:06d} 90 {row % 3}\n" for row in range(20000))
    pickled = pickle.dumps(list_of(tmp_path, text))  # what a worker gets that is started by spawn
    assert len(pickled) < len(text) + 16 * 20000 + 5000
    assert pickle.loads(pickled).video(19999) == ("videos/019999", 90, [1], 20000)


def test_lists_in_a_data_folder_are_always_ours(tmp_path):
    videos = list_of(tmp_path, "a.mp4 92 2\nx 90 7 1\n")
    assert videos.video(0) == ("a", 92, [2], 1)
    assert videos.video(1) == ("x 90", 7, [1], 2)
    with pytest.raises(ValueError, match="train.txt:1: .* read as ours"):
        list_of(tmp_path, "a.mp4,2\n")
    with pytest.raises(ValueError, match="train.txt:1: label 3"):
        list_of(tmp_path, "a 9 3\n")
    with pytest.raises(ValueError, match="val.txt: missing; python data.py extract .*--val"):
        data.VideoList(tmp_path, "val", CLIP, train=False)


def damage(file, kind):
    """Break an image or a zip."""
    content = file.read_bytes()
    half = len(content) // 2
    if kind == "missing":
        file.unlink()
    elif kind == "truncated":
        file.write_bytes(content[:half])
    elif kind == "bit":  # a checksum tells
        file.write_bytes(content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :])
    elif kind == "size":  # other than the other frames'
        Image.fromarray(noise(9, 40, 48, 3)).save(file, format="PNG")


@pytest.mark.parametrize("name, kind, packed", [
    ("r/img_00003.jpg", "missing", False), ("r/img_00003.jpg", "truncated", True),
    ("r/img_00003.jpg", "bit", False), ("r/img_00003.jpg", "size", False),
    ("r.zip", "missing", True), ("r.zip", "truncated", True), ("r.zip", "bit", True)])
def test_a_broken_video_is_named_with_its_list_line(tmp_path, name, kind, packed):
    folder = data_folder(tmp_path, ["p 3 0", "", "q/r 3 1", "s 3 2"])
    if name == "r.zip":
        pack(folder / "frames")
    damage(folder / "frames" / "q" / name, kind)
    if packed:
        pack(folder / "frames")
    videos = data.VideoList(folder, "train", SEGMENTS, train=False)
    assert (videos[0][2], videos[2][2]) == (0, 2)
    with pytest.raises(OSError) as error:
        videos[1]
    message = str(error.value)  # the empty line counts
    assert message.startswith(f"{folder / 'train.txt'}:3: {folder / 'frames' / 'q' / 'r'}")
    assert "img_00003.jpg: " in message or name == "r.zip"
    assert len(message.splitlines()) == 1
    assert " at 0x" not in message


def test_a_broken_frame_in_a_worker_is_one_line_and_status_2(tmp_path, monkeypatch, capsys):
    folder = data_folder(tmp_path, ["p 3 0", "q 3 1"])
    damage(folder / "frames" / "q" / "img_00003.jpg", "truncated")
    videos = data.VideoList(folder, "train", SEGMENTS, train=False)
    loader = torch.utils.data.DataLoader(videos, num_workers=1)
    monkeypatch.setattr(data, "main", lambda: list(data.load(loader)))
    assert call("data") == 2
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith(f"data.py: {folder / 'train.txt'}:2: ")


def test_the_end_of_another_process_is_one_line(monkeypatch, capsys):
    def main():
        raise RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer")

    monkeypatch.setattr(data, "main", main)
    assert call("data") == 2
    assert capsys.readouterr().err == (
        "data.py: another process has ended; its own line says why\n")


def test_skip_broken_takes_the_next_row_at_most_ten_rows_on_and_says_so(tmp_path, capsys):
    """In every epoch. Of 13 videos only number 11 is there."""
    folder = data_folder(tmp_path, [f"v{row} 3 {row % 3}" for row in range(13)])
    for row in [*range(11), 12]:
        shutil.rmtree(folder / "frames" / f"v{row}")
    strict = data.VideoList(folder, "train", SEGMENTS, train=True)
    videos = data.VideoList(folder, "train", SEGMENTS, train=True, skip_broken=True)
    for epoch in (0, 3):
        clip, labels, row = videos[13 * epoch + 1]
        expected = strict[13 * epoch + 11]
        assert row == 11
        assert torch.equal(clip, expected[0])
        assert torch.equal(labels, expected[1])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 * 10
    assert lines[0].startswith(f"{folder / 'train.txt'}:2: ")
    assert lines[0].endswith("skipped, the next video is taken")

    # from video 0, number 11 is too far
    with pytest.raises(OSError, match="train.txt:11: "):
        videos[0]

    # after the last row comes the first
    write_frames(folder / "frames" / "v0", noise(0, 3, 36, 40, 3))
    assert videos[12][2] == 0

    # evaluation skips nothing
    evaluation = data.VideoList(folder, "train", SEGMENTS, train=False, skip_broken=True)
    with pytest.raises(OSError, match="train.txt:11: "):
        evaluation[10]


@pytest.mark.parametrize("message", [
    "[Errno 28] No space left on device", "unable to write to file </torch_71_2>",
    "unable to allocate shared memory(shm) for file </torch_71_2>",
    "DataLoader worker (pid 7) is killed by signal: Bus error."])
def test_too_little_shared_memory_is_one_line_that_says_what_to_do(message):
    """Docker's default is 64 MB; PyTorch speaks of a full disk."""
    def loader(message):
        yield "a batch"
        raise RuntimeError(message)

    batches = data.load(loader(message))
    assert next(batches) == "a batch"
    with pytest.raises(OSError, match="--shm-size .* fewer --workers"):
        next(batches)
    with pytest.raises(RuntimeError, match="something else"):
        list(data.load(loader("something else")))


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


def default_labels(rows):
    """Labels of the default toy by row. They are drawn before pixels, so one frame suffices."""
    return [data.draw_video(row, np.random.default_rng([0, row]), frames=1)[1] for row in rows]


def test_the_toy_has_the_form_of_real_data(toy):
    train = listed(toy, "train")
    val = listed(toy, "val")
    assert len(train) == 40
    assert len(val) == 10
    expected = {"categories.txt", "train.txt", "val.txt"}
    first_frames = set()
    for path in [*train, *val]:
        expected |= {f"frames/{path}/img_{number:05d}.jpg" for number in range(1, 25)}
        first_frames |= set(frame_bytes(toy, path, [0]))
    assert set(contents(toy)) == expected
    assert len(first_frames) == 50  # no video is there twice
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

        # the ends of 36 rows and of 40 columns are joined: row 35 is one row up
        if down > 18:
            down -= 36
        if right > 20:
            right -= 40
        words = ["moving"]
        if abs(down) > 1:
            words.append("down" if down > 0 else "up")
        if abs(right) > 1:
            words.append("right" if right > 0 else "left")
        assert data.TOY_CATEGORIES[labels[0]] == "+".join(words)
        assert 3 <= max(abs(down), abs(right)) <= 6  # 1.2 to 1.6 pixels a frame


def test_the_default_toy_has_one_or_two_motions_on_different_axes_and_seldom_a_ground():
    for rows in (range(1200), range(1200, 1350)):
        counts = np.zeros(10, int)
        grounds = 0
        for row, labels in zip(rows, default_labels(rows)):
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
            assert frames != frames[::-1]


def test_a_model_that_is_blind_to_order_scores_at_most_77_83_on_the_default_toy():
    """It gives a video and its reversal the same scores. So for each pair every order of their
    labels is tried, ties too, and the best mean of the two average precisions is taken."""
    best = []
    for labels in default_labels(range(1200, 1350)):
        backward = [data.reversed_label(label) for label in labels]
        union = sorted({*labels, *backward})
        orders = np.array(list(itertools.product(range(len(union)), repeat=len(union))))
        precisions = []
        for truth in (labels, backward):
            truth = np.tile(np.isin(union, truth), (len(orders), 1))
            precisions.append(evaluate.average_precision(orders, truth))
        best.append(np.mean(precisions, axis=0).max())
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
    def stop(*_):
        assert len(list(tmp_path.rglob("*.jpg"))) == 10 * 24
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "write_lines", stop)
    with pytest.raises(KeyboardInterrupt):
        data.draw_toy(tmp_path / "toy", videos=8)
    assert os.listdir(tmp_path) == []


# ---- extraction ------------------------------------------------------------------------------

def ffmpeg(*arguments):
    subprocess.run(["ffmpeg", "-nostdin", "-v", "error", "-y", *map(str, arguments)], check=True)


def film(file, size="340x256", rate=30, frames=2, options=()):
    """A small moving picture as a video file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    ffmpeg("-f", "lavfi", "-i", f"testsrc=size={size}:rate={rate}", "-frames:v", frames,
           "-c:v", "mpeg4", "-q:v", 3, *options, file)
    return file


# path: (frames, tolerance, width, height); other rates than 30 may differ between ffmpeg's versions
WHOLE = {
    "brighter": (15, 0, 426, 320),
    "café": (2, 0, 426, 320),
    "cut": (13, 6, 426, 320),  # the rest of its 30 frames is missing in the file
    "deep/er/portrait": (9, 0, 320, 426),
    "late": (90, 0, 426, 320),
    "odd": (4, 0, 334, 320),
    "slow": (24, 2, 426, 320),
    "turned": (2, 0, 320, 426),
    "two words 7": (1, 0, 426, 320),
    "variable": (60, 2, 426, 320),
    "whole": (30, 0, 426, 320),
}
BROKEN = {" space": "rename the file", "sound": "ffmpeg: ", "text": "ffmpeg: "}


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Videos of every kind, and files that are none. Several tests share them."""
    folder = tmp_path_factory.mktemp("the videos")
    film(folder / "deep/er/portrait.MOV", "256x340", frames=9)
    film(folder / "slow.mp4", rate=10, frames=8)
    film(folder / "two words 7.mp4", frames=1)
    plain = film(folder / f"{unicodedata.normalize('NFD', 'café')}.mp4")  # as macOS stores it
    ffmpeg("-f", "lavfi", "-i", "testsrc=size=47x45:rate=30", "-frames:v", 4, "-c:v", "mjpeg",
           "-pix_fmt", "yuvj444p", folder / "odd.avi")
    ffmpeg("-f", "lavfi", "-i", "color=black:size=68x51:rate=30,format=yuv444p,"
           "geq=lum='20+12*N':cb=128:cr=128", "-frames:v", 15, "-c:v", "mpeg4", "-q:v", 2,
           "-pix_fmt", "yuv420p", folder / "brighter.mp4")
    ffmpeg("-f", "lavfi", "-i", "testsrc=size=340x256:rate=30:duration=2,"
           "select='not(mod(n\\,7))+not(mod(n\\,11))+eq(n\\,59)'", "-c:v", "mpeg4",
           folder / "variable.mkv")

    # a trimmed clip: its picture starts two seconds after its sound
    picture = film(folder / "picture.mp4", frames=90)
    ffmpeg("-f", "lavfi", "-i", "sine=duration=5", "-itsoffset", 2, "-i", picture,
           "-c:v", "copy", "-c:a", "aac", folder / "late.mp4")
    picture.unlink()

    # a phone's clip, with a tag that says how to turn it; ffmpeg 6 writes it by another option
    try:
        ffmpeg("-display_rotation", 90, "-i", plain, "-c", "copy", folder / "turned.mp4")
    except subprocess.CalledProcessError:
        ffmpeg("-i", plain, "-c", "copy", "-metadata:s:v:0", "rotate=90", folder / "turned.mp4")

    # the file's end is missing, but not its index, which is in front of the pictures
    whole = film(folder / "whole.mp4", frames=30, options=["-movflags", "+faststart"])
    write(folder / "cut.mp4", whole.read_bytes()[: whole.stat().st_size * 6 // 10])

    # what gives no frames, or a path that no list line can hold
    ffmpeg("-f", "lavfi", "-i", "sine=duration=1", "-c:a", "aac", folder / "sound.mp4")
    write(folder / "text.mp4", "not a video\n" * 100)
    write(folder / "notes.txt", "no video either, and not named as one\n")
    shutil.copy(plain, folder / " space.mp4")
    return folder


@pytest.fixture(scope="module")
def extracted(videos, tmp_path_factory):
    """What extract makes of them, and its lines on stderr."""
    out = tmp_path_factory.mktemp("extracted") / "new" / "the data"
    result = python(ROOT / "data.py", "extract", "--videos", videos, "--out", out,
                    "--split", "train", "--workers", 2)
    assert result.returncode == 0, result.stderr
    assert f"{len(WHOLE)} videos extracted, {len(BROKEN)} failed" in result.stdout
    return out, result.stderr.splitlines()


def failures(out, split="train"):
    """{path: reason} of a list of failures."""
    lines = (out / f"{split}_failed.txt").read_text().splitlines()
    return dict(line.split("\t") for line in lines)


@needs_ffmpeg
def test_every_video_that_can_be_decoded_becomes_frames_and_a_line(extracted):
    out, _ = extracted
    assert sorted(os.listdir(out)) == ["frames", "train.txt", "train_failed.txt"]
    expected = set()
    lines = []
    for path, (count, tolerance, width, height) in WHOLE.items():
        found = len(os.listdir(out / "frames" / path))
        assert abs(found - count) <= tolerance
        lines.append(f"{path} {found} -1\n")
        expected |= {f"{path}/img_{number:05d}.jpg" for number in range(1, found + 1)}
        with Image.open(out / "frames" / path / f"img_{found:05d}.jpg") as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (width, height))
    assert (out / "train.txt").read_text() == "".join(lines)
    assert set(contents(out / "frames")) == expected  # no part of a broken video
    assert set(failures(out)) == set(BROKEN)
    for path, reason in failures(out).items():
        assert BROKEN[path] in reason


@needs_ffmpeg
def test_frames_are_in_the_order_of_the_video(extracted):
    """Frame n has luminance 20 + 12 n of 16..235, which is (4 + 12 n) x 255 / 219 in a JPEG."""
    for n in range(15):
        with Image.open(extracted[0] / f"frames/brighter/img_{n + 1:05d}.jpg") as image:
            luminance = np.asarray(image.convert("L")).mean()
        assert abs(luminance - (4 + 12 * n) * 255 / 219) < 4


@needs_ffmpeg
def test_what_was_left_out_or_damaged_is_said(videos, extracted):
    out, lines = extracted
    last = len(os.listdir(out / "frames" / "cut")) - 1  # the file ends within this frame
    assert frame_bytes(out, "cut", range(last)) == frame_bytes(out, "whole", range(last))
    kept, = [line for line in lines if "kept" in line]
    assert kept.startswith(f"{videos / 'cut.mp4'}: {last + 1} frames kept; ffmpeg: ")
    total = len(WHOLE) + len(BROKEN)
    assert lines[-1].startswith(f"videos {total}/{total}, ")
    skipped, = [line for line in lines if "skipped" in line]
    assert skipped.startswith(f"{videos}: 1 files skipped, whose ending is not one of mp4 ")


@needs_ffmpeg
def test_packed_frames_are_the_same(videos, extracted, tmp_path):
    plain, _ = extracted
    assert call("data", "extract", "--videos", videos, "--out", tmp_path, "--split", "train",
                "--pack") == 0
    for name in ("train.txt", "train_failed.txt"):
        assert (tmp_path / name).read_bytes() == (plain / name).read_bytes()
    assert set(contents(tmp_path / "frames")) == {f"{path}.zip" for path in WHOLE}
    for path in WHOLE:
        frames = contents(plain / "frames" / path)
        with zipfile.ZipFile(tmp_path / "frames" / f"{path}.zip") as archive:
            assert archive.namelist() == sorted(frames)
            for info in archive.infolist():
                assert info.compress_type == zipfile.ZIP_STORED
                assert info.date_time == (1980, 1, 1, 0, 0, 0)  # so that bytes do not change
                assert archive.read(info) == frames[info.filename]

    write(tmp_path / "categories.txt", "a\n")
    assert call("data", "check", tmp_path) == 0


def fake_extract(folder, monkeypatch, **options):
    """data.extract of folder/videos to folder/data, without ffmpeg: a video that is not empty has
    two frames."""
    def decode_video(file, target):
        if not file.read_bytes():
            return 0, "ffmpeg: no frame"
        write_frames(target, noise(0, 2, 4, 4, 3))
        return 2, ""

    monkeypatch.setattr(data, "require_ffmpeg", lambda: None)
    monkeypatch.setattr(data, "decode_video", decode_video)
    return data.extract(folder / "videos", folder / "data", workers=1, **options)


def test_a_second_run_keeps_what_is_whole_and_writes_its_lists_anew(tmp_path, monkeypatch):
    """Folders and zips side by side. A broken zip and an empty folder are not whole."""
    for name in "abcd":
        write(tmp_path / "videos" / f"{name}.mp4", "a video")
    write(tmp_path / "videos" / "e.mp4", "")
    frames = tmp_path / "data" / "frames"
    write_frames(frames / "b", noise(2, 4, 4, 4, 3))
    pack(frames)
    write_frames(frames / "a", noise(1, 3, 4, 4, 3))
    write(frames / "a" / "notes.txt", "not a frame, and not counted\n")
    kept = contents(frames)
    write(frames / "c.zip", (frames / "b.zip").read_bytes()[:-30])
    (frames / "d").mkdir()
    assert fake_extract(tmp_path, monkeypatch, pack=True) == (4, 1)
    assert (tmp_path / "data" / "train.txt").read_text() == "a 3 -1\nb 4 -1\nc 2 -1\nd 2 -1\n"
    assert failures(tmp_path / "data") == {"e": "ffmpeg: no frame"}

    write(tmp_path / "videos" / "e.mp4", "mended")
    (tmp_path / "videos" / "c.mp4").unlink()  # given up
    assert fake_extract(tmp_path, monkeypatch) == (4, 0)
    assert (tmp_path / "data" / "train.txt").read_text() == "a 3 -1\nb 4 -1\nd 2 -1\ne 2 -1\n"
    assert failures(tmp_path / "data") == {}
    assert kept.items() <= contents(frames).items()
    assert sorted(os.listdir(frames)) == ["a", "b.zip", "c.zip", "d", "d.zip", "e"]


@pytest.fixture
def fake_ffmpeg(tmp_path, monkeypatch):
    """fake_ffmpeg(lines): videos a, b, c, and an ffmpeg that begins frames, except of b: there it
    writes one frame and runs these lines of sh."""
    def make(lines):
        for name in "abc":
            write(tmp_path / "videos" / f"{name}.mp4", "a video")
        program = write(tmp_path / "bin" / "ffmpeg", "#!/bin/sh\necho frame > img_00001.jpg\n"
                        f"case \"$*\" in *b.mp4*) {lines}\nesac\necho frame > img_00002.jpg\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    return make


@pytest.mark.parametrize("lines", ["exit 255;;", "kill -9 $$;;"])
def test_a_short_video_of_a_stopped_ffmpeg_does_not_count_as_whole(tmp_path, fake_ffmpeg, lines):
    """FFmpeg ends with status 255 after a signal that it handles."""
    fake_ffmpeg(lines)
    assert data.extract(tmp_path / "videos", tmp_path / "data", "train", workers=1) == (2, 1)
    assert "ffmpeg was stopped" in failures(tmp_path / "data")["b"]
    assert sorted(os.listdir(tmp_path / "data" / "frames")) == ["a", "c"]


def test_what_a_failing_ffmpeg_has_decoded_is_kept_and_its_status_is_said(
        tmp_path, fake_ffmpeg, capsys):
    fake_ffmpeg("exit 1;;")
    assert data.extract(tmp_path / "videos", tmp_path / "data", "train", workers=1) == (3, 0)
    assert "b.mp4: 1 frames kept; ffmpeg: status 1\n" in capsys.readouterr().err


def test_a_full_disk_stops_the_extraction(tmp_path, fake_ffmpeg):
    """Otherwise every video that follows would be listed as broken. FFmpeg's status may be 0."""
    fake_ffmpeg("echo 'av_interleaved_write_frame(): No space left on device' >&2;;")
    with pytest.raises(OSError, match="no space left on the disk; free some"):
        data.extract(tmp_path / "videos", tmp_path / "data", "train", workers=1)
    assert os.listdir(tmp_path / "data") == ["frames"]
    assert "b" not in os.listdir(tmp_path / "data" / "frames")


def test_a_killed_extraction_goes_on_as_if_nothing_had_happened(tmp_path, fake_ffmpeg):
    """SIGKILL while the second of three videos is half decoded."""
    waiting = tmp_path / "waiting"
    fake_ffmpeg(f"if [ ! -e '{waiting}' ]; then echo $$ > '{waiting}.part'\n"
                f"mv '{waiting}.part' '{waiting}'; exec sleep 100; fi;;")
    process = subprocess.Popen(
        [sys.executable, ROOT / "data.py", "extract", "--videos", "videos", "--out", "killed",
         "--split", "train", "--workers", "1"], cwd=tmp_path, stderr=subprocess.DEVNULL)
    while not waiting.exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    os.kill(int(waiting.read_text()), signal.SIGKILL)
    assert sorted(os.listdir(tmp_path / "killed" / "frames")) == [".part-train", "a"]
    for out in ("killed", "whole"):
        assert data.extract(tmp_path / "videos", tmp_path / out, "train", workers=1) == (3, 0)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert sorted(os.listdir(tmp_path / "killed" / "frames")) == ["a", "b", "c"]


def test_files_are_found_by_every_ending_and_in_either_unicode_form(tmp_path):
    for name in ("a.ts", "b.mts", "c.M2TS", "d.ogv", "e.gif", "f.mp4", "g.webm", "h.avi.mp4"):
        write(tmp_path / name, "")
    assert list(data.find_videos(tmp_path)) == list("abcdefgh")
    for stored, in_list in (("NFC", "NFD"), ("NFD", "NFC")):
        file = write(tmp_path / stored / f"{unicodedata.normalize(stored, 'é')}.mp4", "")
        key = data.file_key(f"{stored}/{unicodedata.normalize(in_list, 'é')}")
        assert data.find_videos(tmp_path)[key] == file

    write(tmp_path / "a.mp4", "")  # would have the same frames as a.ts
    with pytest.raises(ValueError, match="a.mp4 and .*a.ts would both be called a"):
        data.find_videos(tmp_path)


def test_a_link_to_a_folder_does_not_hide_the_folder(tmp_path):
    write(tmp_path / "z" / "clip.mp4", "")
    (tmp_path / "a").symlink_to("z")
    (tmp_path / "z" / "back").symlink_to(tmp_path)  # would be followed for ever
    assert list(data.find_videos(tmp_path)) == ["a/clip", "z/clip"]


def test_a_folder_that_cannot_be_read_is_an_error_not_a_loss(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(OSError, match="Permission denied"):
        data.find_videos(tmp_path)


@needs_ffmpeg
def test_a_foreign_list_is_written_in_our_form_and_its_order(videos, tmp_path, capsys):
    listing = write(tmp_path / "list.txt", "slow.mp4 7 264\nabsent.mp4 3\n./odd.mp4 2\n"
                    "text.mp4 5\ntwo words 7.mp4 -1\ncafé.mp4 4 1\nodd.mp4 8\n")
    assert call("data", "extract", "--videos", videos, "--list", listing, "--out",
                tmp_path / "data", "--split", "test", "--format", "mmaction2-videos") == 0
    assert "1 repeated lines merged" in capsys.readouterr().err
    first, *others = (tmp_path / "data" / "test.txt").read_text().splitlines()
    assert first.startswith("slow 2")
    assert first.endswith(" 7,264")
    assert others == ["odd 4 2,8", "two words 7 1 -1", "café 2 4,1"]
    assert list(failures(tmp_path / "data", "test")) == ["absent", "text"]
    assert failures(tmp_path / "data", "test")["absent"] == "no such video"


def read_labels(folder, text):
    videos, categories = data.read_labels(write(folder / "list.csv", text), "auto", folder)
    return [video.labels for video in videos], categories


def test_class_names_of_a_csv_become_ids(tmp_path):
    """In the order of the alphabet, or of the categories.txt that is there."""
    text = ('a.mp4,running\nb.mp4,"cooking, slowly",running\nc.mp4,-1\nd.mp4,walking\n'
            'a.mp4,walking\n')
    assert read_labels(tmp_path, text) == (
        [[1, 2], [0, 1], [], [2]], ["cooking, slowly", "running", "walking"])
    write(tmp_path / "categories.txt", "running\nwalking\ncooking, slowly\n")
    assert read_labels(tmp_path, text) == ([[0, 1], [2, 0], [], [1]], None)
    assert read_labels(tmp_path, "a.mp4,2\n") == ([[2]], None)


@pytest.mark.parametrize("text, reason", [
    ("a.mp4,flying\n", ":1: the class 'flying' is not in .*categories.txt"),
    ("a.mp4,running,3,0\n", ":1: .*single-label Moments in Time"),
    ("a.mp4,running\nb.mp4,1\n", ":2: the id 1, but other lines hold class names"),
    ("name,label\na.mp4,running\n", ":1: 'name' has no ending of a video file"),
    ("a.mp4,2\n", ":1: label 2, but the last class of categories.txt is 1")])
def test_class_names_that_are_unknown_or_mixed_with_numbers_are_refused(tmp_path, text, reason):
    write(tmp_path / "categories.txt", "running\nwalking\n")
    with pytest.raises(ValueError, match=f"list.csv{reason}"):
        read_labels(tmp_path, text)


@pytest.mark.parametrize("label", ["3.0", "-2"])
def test_a_number_that_is_no_id_does_not_become_a_class_name(tmp_path, label):
    """Programs that fill tables write the id 3 as 3.0 if another cell is empty."""
    with pytest.raises(ValueError, match=f":1: '{label}' is neither an id nor the name of a class"):
        read_labels(tmp_path, f"a.mp4,{label}\n")


def test_the_videos_with_the_smallest_hashes_validate():
    """In both lists the videos keep their order. At least one video validates, and one trains."""
    lines = [f"v {i} 9 {i}" for i in range(10)]
    by_hash = sorted(lines, key=lambda line: zlib.crc32(line[:3].encode()))
    for fraction, count in ((0.2, 2), (0.5, 5), (0.01, 1), (0.99, 9)):
        train, val = data.split_lines(lines, fraction)
        assert set(val) == set(by_hash[:count])
        assert train == [line for line in lines if line not in val]
        assert val == [line for line in lines if line in val]
    assert [len(part) for part in data.split_lines(lines[:2], 0.2)] == [1, 1]
    with pytest.raises(ValueError, match="--val 0.2: 1 .* cannot be split"):
        data.split_lines(lines[:1], 0.2)


def test_one_csv_with_class_names_becomes_a_data_folder(tmp_path, monkeypatch):
    for name in "pqrs":
        write(tmp_path / "videos" / f"{name} 1.mp4", "a video")
    listing = write(tmp_path / "list.csv", "p 1.mp4,b\nq 1.mp4,a\nr 1.mp4,b\ns 1.mp4,a\n")
    results = []
    for _ in range(2):  # the same when run again
        assert fake_extract(tmp_path, monkeypatch, list_path=listing, val=0.25) == (4, 0)
        results.append(contents(tmp_path / "data"))
    assert results[0] == results[1]
    assert results[0]["categories.txt"] == b"a\nb\n"
    val = min("pqrs", key=lambda name: zlib.crc32(f"{name} 1".encode()))
    lines = {"p": "p 1 2 1\n", "q": "q 1 2 0\n", "r": "r 1 2 1\n", "s": "s 1 2 0\n"}
    assert results[0]["val.txt"].decode() == lines.pop(val)
    assert results[0]["train.txt"].decode() == "".join(lines.values())
    assert call("data", "check", tmp_path / "data") == 0


# ---- check -----------------------------------------------------------------------------------

@pytest.fixture
def sound_folder(tmp_path):
    """Five videos in three lists, without a fault."""
    data_folder(tmp_path, ["p 3 0,1", "", "q/r 3 1", "s 3 1"])
    data_folder(tmp_path, ["t 3 2"], split="val")
    return data_folder(tmp_path, ["u 3 -1"], split="test")


def check(folder, capsys):
    """The exit status of check, and what it prints but for the description of the lists."""
    status = call("data", "check", folder)
    lines = capsys.readouterr().out.splitlines()
    return status, [line for line in lines if "labels each" not in line and "  most" not in line]


def test_check_describes_a_sound_folder(sound_folder, capsys):
    assert call("data", "check", sound_folder) == 0
    out = capsys.readouterr().out
    assert f"{sound_folder / 'train.txt'}: 3 videos, 1.33 labels each; 0 repeated lines" in out
    assert "  most videos: b (3); fewest: c (0)\n" in out
    assert f"{sound_folder / 'test.txt'}: 1 videos, 0.00 labels each" in out
    assert out.endswith("\n0 problems\n")


@pytest.mark.parametrize("name, kind, packed, reason", [
    ("img_00001.jpg", "missing", False, "2 of 3 frames"),
    ("img_00003.jpg", "missing", True, "2 of 3 frames"),
    ("img_00003.jpg", "truncated", False, "truncated"),
    ("img_00003.jpg", "size", False, "its size is not that of the clip's first frame")])
def test_check_names_a_broken_frame_by_its_line(sound_folder, capsys, name, kind, packed, reason):
    damage(sound_folder / "frames" / "q" / "r" / name, kind)
    if packed:
        pack(sound_folder / "frames")
    status, (line, total) = check(sound_folder, capsys)
    assert status == 2
    assert total == "1 problems"
    assert line.startswith(f"{sound_folder / 'train.txt'}:3: q/r: ")
    assert reason in line


def test_check_names_every_other_problem(sound_folder, capsys):
    train = sound_folder / "train.txt"
    val = sound_folder / "val.txt"
    write_frames(sound_folder / "frames" / "p", noise(0, 4, 36, 40, 3))  # a frame too many
    shutil.rmtree(sound_folder / "frames" / "q")
    shutil.rmtree(sound_folder / "frames" / "t")
    write(sound_folder / "frames" / "t.zip", "no zip\n")
    write(val, "t 3 2\ns 3 1\nu 900000000000000 0\n")
    (sound_folder / "test.txt").unlink()
    assert check(sound_folder, capsys) == (2, [
        f"{train}:1: p: 1 files that are not among its 3 frames",
        f"{train}:3: q/r: 0 of 3 frames",
        f"{val}:1: t: 0 of 3 frames",
        f"{val}:2: s is also in {train}",
        f"{val}:3: u: 3 of 900000000000000 frames",
        "5 problems"])
    val.unlink()
    assert f"{val} is missing: training needs it" in check(sound_folder, capsys)[1]
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


def test_a_console_that_lacks_a_letter_shows_another(tmp_path):
    """As a process of its own, from another folder."""
    data_folder(tmp_path / "data", ["p 3 0"])
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
