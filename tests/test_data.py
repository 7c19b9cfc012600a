"""data.py: what a list line means, which frames and pixels of a video a network sees, what the toy
videos show, and how videos become frames.

    python -m pytest tests/test_data.py

Each part begins with examples that can be checked by hand. Then comes an oracle: Pillow,
torchvision, a naive formula, or all possible answers. Commands that are misused are in
test_bad_input.py.
"""
import contextlib
import io
import itertools
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
import tracemalloc
import zipfile
import zlib
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from unicodedata import normalize
from unittest import mock

import numpy as np
import pytest
import torch
from numpy.random import default_rng
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import functional as vision

import data
import evaluate
from conftest import ROOT, call, data_folder, needs_ffmpeg, noise, python, write, write_frames

RECIPE = {**data.RECIPE, **data.TOY, "frames": 8, "augment": "multiscale", "flip": True}


# ---- a list: one video a line ----------------------------------------------------------------

def read(folder, text, format="auto", num_classes=None):
    """The videos of a list file with this text, one line of ours each."""
    videos = data.read_list(write(folder / "list.txt", text), format, num_classes)
    return "".join(f"{data.list_line(video)}\n" for video in videos)


def test_a_line_holds_path_frames_and_labels(tmp_path):
    text = "cooking/a 90 7,2\nmy video 1 45 0\nb 8 -1\n"  # -1: unlabelled
    file = write(tmp_path / "list.txt", text)
    assert data.read_list(file) == [
        ("cooking/a", 90, [7, 2], 1), ("my video 1", 45, [0], 2), ("b", 8, [], 3)]
    assert read(tmp_path, text) == text


def test_a_repeated_path_gets_all_its_labels(tmp_path):
    # b has no frames
    assert read(tmp_path, "a 9 0\nb 0 1\nc 8 1\na 9 2\na 9 0\n") == "a 9 0,2\nc 8 1\n"
    with pytest.raises(ValueError, match="list.txt:2: a has 8 frames here and 9 in line 1"):
        read(tmp_path, "a 9 0\na 8 1\n")


@pytest.mark.parametrize("text", [
    "a 9 1,2\r\nb 8 3\r\n",    # Windows
    "\ufeffa 9 1,2\nb 8 3\n",  # its byte-order mark
    "a  9   1, 2\n\n \n b\t8\t3 ",
])
def test_white_space_means_nothing(tmp_path, text):
    assert read(tmp_path, text) == "a 9 1,2\nb 8 3\n"


@pytest.mark.parametrize("text, reason", [
    ("a 9 1\n\nb 9 -2\n", "expected path num_frames id"),
    ("a 9 1\n\nb 9999999999999999 1\n", "expected path num_frames id"),
    ("a 9 1\n\nb 9 3,10\n", "label 10, but the last class of categories.txt is 9"),
    ("a.mp4,1\n\nC:\\b.mp4,3\n", "must be a relative path inside the folder"),
    ("a.mp4,1\n\nb.mp4\n", "expected name.mp4,id"),
    ("a.mp4,1\n\nb.mp4,3,-1\n", "-1 means unlabelled and stands alone"),
    ("a.mp4,1\n\nb.mp4,1,01\n", "a label appears twice"),
    ("a.mp4,1\n\nb.mp4,-2\n", "'-2' is neither an id nor the name of a class"),
    ("a.mp4,1\n\nb.mp4,3.0\n", "'3.0' is neither"),  # a spreadsheet's column with an empty cell
    ("\n\nname,label\na.mp4,run\n", "'name' has no ending of a video file"),  # column titles
])
def test_a_bad_line_is_named_with_its_number(tmp_path, text, reason):
    with pytest.raises(ValueError) as error:
        read(tmp_path, text, num_classes=10)
    assert str(error.value).startswith(f"{tmp_path / 'list.txt'}:3: ")  # empty lines count
    assert reason in str(error.value)


# ---- lists of other projects and spreadsheets ------------------------------------------------

WITH_FRAMES = "adult+female/a-3_1 91 266,33\nboating/b-6-2_9 93 37\nc 45 0,69,83\n"
WITHOUT_FRAMES = "adult+female/a-3_1 None 266,33\nboating/b-6-2_9 None 37\nc None 0,69,83\n"


@pytest.mark.parametrize("format, text, expected", [
    ("csv",  # M-MiT
     "adult+female/a-3_1.mp4,266,33\nboating/b-6-2_9.mp4,37\nc.mp4,0,69,83\n", WITHOUT_FRAMES),
    ("ours",  # X-Temporal, of video files
     "adult+female/a-3_1.mp4 91 266,33\nboating/b-6-2_9.mp4 93 37\nc.mp4 45 0,69,83\n",
     WITH_FRAMES),
    ("mmaction2-frames",
     "adult+female/a-3_1 91 266 33\nboating/b-6-2_9 93 37\nc 45 0 69 83\n", WITH_FRAMES),
    ("mmaction2-frames",  # its own tool lists each video again: no frames of optical flow
     "adult+female/a-3_1 91 266 33\nadult+female/a-3_1 0 266 33\n"
     "boating/b-6-2_9 93 37\nboating/b-6-2_9 0 37\nc 45 0 69 83\nc 0 0 69 83\n", WITH_FRAMES),
    ("mmaction2-videos",
     "adult+female/a-3_1.mp4 266 33\nboating/b-6-2_9.mp4 37\nc.mp4 0 69 83\n", WITHOUT_FRAMES),
])
def test_every_project_lists_the_same_videos(tmp_path, format, text, expected):
    assert read(tmp_path, text, format, num_classes=313) == expected
    if format in ("csv", "ours"):
        assert read(tmp_path, text, "auto") == expected


@pytest.mark.parametrize("line, expected", [
    ("a.mp4, 0", "a None 0\n"),
    ("a.mp4,0,,", "a None 0\n"),
    ('"a.mp4","0","2"', "a None 0,2\n"),
    ('a.mp4, "0,2"', "a None 0,2\n"),
    ("my video.mp4,3", "my video None 3\n"),
    ('"a, b.mp4",3', "a, b None 3\n"),
    ("a.MP4,-1", "a None -1\n"),
    ("a.mp4,run,eating/feeding", "a None run,eating/feeding\n"),
    ("a.avi.mp4,3", "a None 3\n"),  # a converted file
    ("a.v2,4", "a.v2 None 4\n"),
])
def test_a_csv_as_spreadsheets_write_it(tmp_path, line, expected):
    assert read(tmp_path, line) == expected


def test_a_line_of_two_meanings_needs_a_format(tmp_path):
    line = "a.mp4 92 69\n"
    assert read(tmp_path, line, "ours") == "a 92 69\n"
    assert read(tmp_path, line, "mmaction2-videos") == "a None 92,69\n"
    for text in ("a.mp4 5\n" + line, "x 90 7 264\n"):
        with pytest.raises(ValueError, match="several ways.*--format"):
            read(tmp_path, text)
    assert read(tmp_path, line + "b 9 1,2\n") == "a 92 69\nb 9 1,2\n"  # mmaction2 has no commas


# ---- class names -----------------------------------------------------------------------------

@pytest.mark.parametrize("text, names", [
    ("c+d\na/b\n", ["c+d", "a/b"]),
    ("c+d,1\na/b,0\n", ["a/b", "c+d"]),  # M-MiT: name,id
    ("\ufeff b \r\na\r\n\r\n", ["b", "a"]),
])
def test_categories_are_names_by_id(tmp_path, text, names):
    write(tmp_path / "categories.txt", text)
    assert data.read_categories(tmp_path) == names


# ---- which frames ----------------------------------------------------------------------------

def test_segments_give_the_middle_of_each_part():
    # parts of 3 frames: the second of each
    assert data.segment_indices(24, 8).tolist() == [1, 4, 7, 10, 13, 16, 19, 22]

    # the authors' formula, in floating point
    for segments in (1, 3, 5, 8, 16):
        for num_frames in range(1, 400):
            part = num_frames / segments
            expected = [int(part / 2 + k * part) for k in range(segments)]
            assert data.segment_indices(num_frames, segments).tolist() == expected


def test_a_short_video_repeats_frames():
    assert data.segment_indices(5, 8).tolist() == [0, 0, 1, 2, 2, 3, 4, 4]


def test_a_random_frame_lies_anywhere_in_its_part():
    def indices(segments, *places):
        """Where in its part each of 90 frames is drawn: 0 is the beginning, 1 the end."""
        rng = SimpleNamespace(random=lambda count: np.resize(places, count))
        return data.segment_indices(90, segments, rng).tolist()

    assert indices(5, 0.0, 0.2, 0.4, 0.6, 0.8) == [0, 21, 43, 64, 86]
    assert indices(16, 0.99)[-2:] == [84, 89]  # the authors' code never draws the last 10
    # 4 + the largest number below 1 is rounded up to 5, which would lie behind the last frame
    assert indices(5, np.nextafter(1, 0))[-1] == 89


def test_a_clip_wraps_around_at_the_end():
    assert data.clip_indices(5, 6, 2, 1).tolist() == [1, 3, 0, 2, 4, 1]


def test_clips_start_evenly_over_the_video():
    assert data.clip_starts(90, 32, 2, 10).tolist() == [0, 2, 5, 8, 11, 14, 17, 20, 23, 26]
    assert data.clip_starts(90, 32, 2, 1) == [13]  # a single one in the middle
    for num_frames in range(1, 600):
        expected = np.linspace(0, max(0, num_frames - 64), 10, dtype=int)
        assert (data.clip_starts(num_frames, 32, 2, 10) == expected).all()


def test_a_training_clip_starts_anywhere():
    """The authors' code never draws the last start."""
    recipe = {"sampling": "clip", "frames": 32, "stride": 2}
    rng = default_rng(0)
    drawn = {data.sample_indices(70, recipe, rng)[0] for _ in range(200)}
    assert drawn == {0, 1, 2, 3, 4, 5, 6}
    assert data.sample_indices(70, recipe).tolist() == list(range(3, 67, 2))  # the middle one
    assert data.sample_indices(50, recipe, rng)[0] == 0  # shorter than a clip


def test_sampling_segments_ignores_the_stride():
    recipe = {"sampling": "segments", "frames": 4, "stride": 7}
    assert data.sample_indices(24, recipe).tolist() == [3, 9, 15, 21]
    assert data.sample_indices(24, recipe, default_rng(0)).tolist() != [3, 9, 15, 21]


# ---- which pixels ----------------------------------------------------------------------------

def test_frames_are_read_as_rgb_and_decoded_once(tmp_path):
    frames = noise(0, 4, 5, 6)  # grey
    write_frames(tmp_path, frames)
    with mock.patch.object(Image, "open", wraps=Image.open) as opened:
        clip = data.read_frames(tmp_path, [3, 0, 3, 3])
    assert np.array_equal(clip, np.stack([frames[[3, 0, 3, 3]]] * 3, -1))
    assert opened.call_count == 2


@pytest.mark.parametrize("height, sides", [
    (320, [320, 280, 240, 211]),
    (254, [254, 224, 190, 167]),  # 222 is within 2 of the target, 224
    (253, [253, 221, 189, 166]),
    (222, [222, 194, 166, 146]),  # the target does not fit in
])
def test_the_multiscale_crop(height, sides):
    rng = default_rng(0)
    boxes = {data.multiscale_box(424, height, 224, rng) for _ in range(3000)}
    for i in range(4):  # each height goes with its own width and the next ones
        widths = {w for _, _, w, h in boxes if h == sides[i]}
        assert widths == set(sides[max(0, i - 1) : i + 2])
    if height == 320:
        assert {(x, y) for x, y, w, h in boxes if w == h == 240} == {
            *itertools.product((0, 92, 184), (0, 40, 80)),  # corners, edges and the centre
            *itertools.product((46, 138), (20, 60))}


def test_the_jitter_crop():
    """With a short side of 20 to 24, a crop of 16 is 16/20 to 16/24 of the 40 stored pixels."""
    rng = default_rng(0)
    expected = set()
    for side in (32, 30, 29, 28, 27):
        places = itertools.product(range(48 - side + 1), range(40 - side + 1))
        expected |= {(x, y, side, side) for x, y in places}
    assert {data.jitter_box(48, 40, 16, (20, 24), rng) for _ in range(20_000)} == expected


@pytest.mark.parametrize("augment, box, arguments, flip", [
    ("multiscale", data.multiscale_box, [], True), ("jitter", data.jitter_box, [(20, 24)], False)])
def test_a_training_clip_is_one_crop_and_one_flip(tmp_path, augment, box, arguments, flip):
    """Of all frames, as Pillow cuts, resizes and mirrors: no value differs by more than 1."""
    frames = noise(0, 3, 40, 48, 3)
    write_frames(tmp_path, frames)
    recipe = {**RECIPE, "augment": augment, "crop": 16, "jitter": (20, 24), "flip": flip}
    for draw in range(20):
        clip = data.make_clip(tmp_path, [2, 0], recipe, default_rng(draw))
        rng = default_rng(draw)
        x, y, w, h = box(48, 40, 16, *arguments, rng)
        mirrored = flip and rng.random() < 0.5
        for ours, frame in zip(clip, frames[[2, 0]]):
            image = Image.fromarray(frame).crop((x, y, x + w, y + h))
            image = image.resize((16, 16), Image.BILINEAR)
            if mirrored:
                image = vision.hflip(image)
            assert abs(ours.numpy().astype(int) - np.asarray(image)).max() <= 1


@pytest.mark.parametrize("size", [112, 256, (224, 224)])  # a number is the short side
@pytest.mark.parametrize("width, height", [(320, 426), (568, 321)])
def test_resizing_is_torchvisions(width, height, size):
    frame = noise(0, height, width, 3)
    theirs = np.asarray(vision.resize(Image.fromarray(frame), size)).astype(int)
    ours = data.resize(torch.from_numpy(frame)[None], size)[0].numpy()
    assert ours.shape == theirs.shape
    assert abs(ours - theirs).max() <= 1


def test_draft_decodes_jpegs_at_half_their_size(tmp_path):
    """If that is still as long as the largest short side. A clip hardly changes then."""
    Image.radial_gradient("L").resize((96, 80)).save(tmp_path / "img_00001.jpg")
    assert data.read_frames(tmp_path, [0], draft_side=40).shape == (1, 40, 48, 3)
    assert data.read_frames(tmp_path, [0], draft_side=41).shape == (1, 80, 96, 3)

    recipe = {**RECIPE, "augment": "jitter", "jitter": (36, 40)}
    plain = data.make_clip(tmp_path, [0], recipe, default_rng(0)).float()
    draft = data.make_clip(tmp_path, [0], {**recipe, "draft": True}, default_rng(0)).float()
    assert 0 < abs(draft - plain).mean() < 2


@pytest.mark.parametrize("channels_last", [False, True])
def test_normalising_is_torchvisions(channels_last):
    clips = torch.from_numpy(noise(0, 2, 3, 4, 5, 3))
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    result = data.normalise(clips, mean, std, channels_last)
    expected = vision.normalize(clips.permute(0, 1, 4, 2, 3) / 255, mean, std)
    torch.testing.assert_close(result, expected)
    assert result.is_contiguous() != channels_last


# ---- the list in memory ----------------------------------------------------------------------

def list_of(folder, text):
    """The VideoList of a list with this text. Its frames are not there."""
    write(folder / "categories.txt", "a\nb\nc\n")
    write(folder / "train.txt", text)
    return data.VideoList(folder, "train")


def test_a_list_has_one_row_a_video(tmp_path):
    videos = list_of(tmp_path, "p 9 0,1\n\nq 0 1\np 9 2\nr 8 -1\nq 7 2\n")
    assert [videos.path(row) for row in range(len(videos))] == ["p", "r", "q"]
    assert videos.num_frames.tolist() == [9, 8, 7]
    assert videos.labels(0).tolist() == [0, 1, 2]
    assert videos.label_matrix().tolist() == [[1, 1, 1], [0, 0, 0], [0, 0, 1]]
    assert videos.class_counts.tolist() == [1, 1, 2]
    assert videos.place(2) == f"{tmp_path}/train.txt:6"
    assert list_of(tmp_path, "p 9 -1\n").label_matrix() is None


def test_lists_in_a_data_folder_are_always_ours(tmp_path):
    videos = list_of(tmp_path, "a.mp4 92 2\nx 90 7 1\n")
    assert (videos.path(0), videos.path(1)) == ("a", "x 90")
    with pytest.raises(ValueError, match="train.txt:1: the file is read as ours"):
        list_of(tmp_path, "a.mp4,2\n")


def test_the_hash_knows_the_lines_and_their_order(tmp_path):
    """It does not know the system that wrote them."""
    known = list_of(tmp_path, "p 9 0\nq 9 1").hash
    assert list_of(tmp_path, "\ufeffp 9 0\r\nq 9 1\r\n").hash == known
    assert list_of(tmp_path, "q 9 1\np 9 0\n").hash != known
    assert list_of(tmp_path, "p 9 0\nq 9 2\n").hash != known


LINES = 20_000


@pytest.fixture
def long_list(tmp_path):
    return list_of(tmp_path, "".join(f"videos/{row:06d} 90 {row % 3}\n" for row in range(LINES)))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_forked_worker_shares_a_long_list(long_list):
    """Whoever reads a Python object writes into it: its counter changes. A worker would copy a list
    of them, 200 bytes a line."""
    def private_kilobytes():
        text = Path("/proc/self/smaps_rollup").read_text()
        return int(re.search(r"Private_Dirty: +(\d+)", text)[1])

    def read_all():
        before = private_kilobytes()
        for row in range(LINES):
            long_list.path(row), long_list.num_frames[row], long_list.labels(row)
        queue.put(private_kilobytes() - before)

    context = get_context("fork")
    queue = context.Queue()
    context.Process(target=read_all).start()
    assert queue.get(timeout=60) < 0.06 * LINES


def test_a_spawned_worker_gets_arrays(long_list):
    """About 50 bytes a line. Python objects would be 280."""
    pickled = pickle.dumps(long_list)
    tracemalloc.start()
    videos = pickle.loads(pickled)
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size < 100 * LINES
    assert videos.path(19_999) == "videos/019999"


# ---- the training clips ----------------------------------------------------------------------

def train_clips(folder):
    return data.TrainClips(data.VideoList(folder, "train"), RECIPE, seed=4)


def pack(frames_dir):
    """Every folder of frames becomes a zip, as extract --pack leaves it."""
    for folder in {file.parent for file in frames_dir.rglob("*.jpg")}:
        data.pack_folder(folder)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """16 toy videos for training, 4 for validation. Tests share them, and none changes them."""
    out = tmp_path_factory.mktemp("toy") / "toy"
    data.draw_toy(out, videos=16, seed=3)
    return out


def test_an_item_is_a_clip_and_its_labels(tmp_path):
    clips = train_clips(data_folder(tmp_path, ["p 3 0,2", "q 1 -1"]))
    clip, labels = clips[0, 0]
    assert clip.shape == (8, 32, 32, 3)
    assert clip.dtype == torch.uint8
    assert labels.tolist() == [1, 0, 1]
    assert labels.dtype == torch.float32
    clip, labels = clips[0, 1]
    assert (clip == clip[0]).all()  # its one frame, eight times
    assert labels.tolist() == [0, 0, 0]


def test_an_item_depends_on_seed_epoch_and_row(toy):
    clips = train_clips(toy)
    for epoch, row in ((0, 7), (5, 7), (5, 12)):
        rng = default_rng([4, epoch, row])
        indices = data.sample_indices(24, RECIPE, rng)
        expected = data.make_clip(toy / "frames" / f"train/{row:05d}", indices, RECIPE, rng)
        assert torch.equal(clips[epoch, row][0], expected)


@pytest.mark.parametrize("workers, start", [(2, "fork"), (1, "spawn")])
def test_workers_and_zips_change_no_item(toy, tmp_path, workers, start):
    """Forked workers inherit the data set, spawned ones get it pickled."""
    folder = shutil.copytree(toy, tmp_path / "packed")
    pack(folder / "frames")
    indices = [(0, 3), (5, 15), (0, 12), (5, 3)]
    loader = DataLoader(data.SkipBroken(train_clips(folder)), batch_size=None, sampler=indices,
                        num_workers=workers, multiprocessing_context=start,
                        worker_init_fn=data.ignore_interrupts)
    clips = train_clips(toy)
    for index, item in zip(indices, data.load(loader), strict=True):
        torch.testing.assert_close(item, clips[index], rtol=0, atol=0)


# ---- broken frames ---------------------------------------------------------------------------

def truncated(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def one_bit_wrong(file):
    content = bytearray(file.read_bytes())
    content[35] ^= 1  # in a length: of such a frame Pillow raises a SyntaxError
    file.write_bytes(content)


def no_image(file):
    file.write_text("a text\n")


def of_another_size(file):
    Image.new("RGB", (48, 40)).save(file, format="PNG")


@pytest.fixture
def folder(tmp_path):
    """A data folder of three lists, without a fault."""
    data_folder(tmp_path, ["p 3 0,1", "", "q/r 3 1", "s 3 1", "s 3 1"])
    data_folder(tmp_path, ["t 3 2"], split="val")
    return data_folder(tmp_path, ["u 3 -1"], split="test")


@pytest.mark.parametrize("place", ["a frame", "a frame in a zip", "a zip"])
@pytest.mark.parametrize("damage", [
    Path.unlink, truncated, one_bit_wrong, no_image, of_another_size])
def test_a_broken_video_is_named_with_its_line(folder, capsys, damage, place):
    """By training and by check."""
    frames = folder / "frames" / "q"
    if place == "a zip":
        pack(frames)
        damage(frames / "r.zip")
        file = "r"
    else:
        damage(frames / "r" / "img_00003.jpg")
        file = "r/img_00003.jpg: "
    if place == "a frame in a zip":
        pack(frames)

    line = f"{folder / 'train.txt'}:3: "  # the empty line counts
    clips = train_clips(folder)
    with pytest.raises(OSError) as error:
        clips[0, 1]
    assert str(error.value).startswith(f"{line}{frames}/{file}")
    assert "\n" not in str(error.value)
    assert " at 0x" not in str(error.value)  # of an object in memory

    assert call("data", "check", folder) == 2
    assert f"\n{line}q/r: " in capsys.readouterr().out


def test_a_broken_frame_in_a_worker_is_one_line(folder, monkeypatch, capsys):
    truncated(folder / "frames" / "q" / "r" / "img_00003.jpg")
    loader = DataLoader(train_clips(folder), sampler=[(0, 1)], num_workers=1)
    monkeypatch.setattr(data, "main", lambda: list(data.load(loader)))
    assert call("data") == 2
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith(f"data.py: {folder / 'train.txt'}:3: ")


def test_skip_broken_takes_one_of_the_next_ten_rows(tmp_path, capsys):
    """Of 13 videos only number 11 is there."""
    list_of(tmp_path, "".join(f"v{row} 3 0\n" for row in range(13)))
    write_frames(tmp_path / "frames" / "v11", noise(0, 3, 36, 40, 3))
    strict = train_clips(tmp_path)
    clips = data.SkipBroken(strict)
    assert len(clips) == 13
    assert torch.equal(clips[3, 1][0], strict[3, 11][0])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10
    assert re.match(".*train.txt:2: .*skipped", lines[0])
    with pytest.raises(OSError, match="train.txt:11: "):
        clips[3, 0]

    # after the last row comes the first
    write_frames(tmp_path / "frames" / "v0", noise(1, 3, 36, 40, 3))
    assert torch.equal(clips[3, 12][0], strict[3, 0][0])


@pytest.mark.parametrize("message", [
    "[Errno 28] No space left on device", "unable to write to file </torch_71_2>",
    "unable to allocate shared memory(shm) for file </torch_71_2>",
    "DataLoader worker (pid 7) is killed by signal: Bus error."])
def test_too_little_shared_memory(message):
    """Docker's default is 64 MB; PyTorch speaks of a full disk."""
    def loader(message):
        yield "a batch"
        raise RuntimeError(message)

    with pytest.raises(OSError, match="--shm-size .* fewer --workers"):
        list(data.load(loader(message)))
    with pytest.raises(RuntimeError, match="something else"):
        list(data.load(loader("something else")))


# ---- the toy videos --------------------------------------------------------------------------

def contents(folder):
    """{path below a folder: bytes} of every file."""
    return {file.relative_to(folder).as_posix(): file.read_bytes()
            for file in Path(folder).rglob("*") if file.is_file()}


def frame_bytes(folder, path, indices):
    return [(folder / "frames" / path / f"img_{i + 1:05d}.jpg").read_bytes() for i in indices]


def default_labels(rows):
    """Labels of the default toy by row. They are drawn before pixels, so one frame suffices."""
    return [data.draw_video(row, default_rng([0, row]), frames=1)[1] for row in rows]


def test_the_toy_is_a_data_folder(toy):
    assert call("data", "check", toy) == 0  # every listed frame is there, and nothing else
    paths = [*data.VideoList(toy, "train").paths, *data.VideoList(toy, "val").paths]
    first_frames = {frame_bytes(toy, path, [0])[0] for path in paths}
    assert len(paths) == len(first_frames) == 16 + 4  # no video is there twice
    with Image.open(toy / "frames" / "train/00000" / "img_00024.jpg") as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (40, 36))


def test_a_label_says_where_the_shape_moves():
    """Even rows have one shape. It moves 1.2 to 1.6 pixels a frame, about 4 in three frames, and
    returns at the opposite edge, so np.roll by 4 pixels lays it on itself."""
    for row in range(0, 40, 2):
        video, labels = data.draw_video(row, default_rng([0, row]))
        background = np.median(video, axis=0)
        shape = abs(video - background).max(-1) > 20  # (24, 36, 40)
        overlaps = []
        for name in data.TOY_CATEGORIES[:8]:
            right = ("right" in name) - ("left" in name)
            down = ("down" in name) - ("up" in name)
            rolled = np.roll(shape[:-3], (4 * down, 4 * right), axis=(1, 2))
            overlaps.append((rolled & shape[3:]).sum() / shape[3:].sum())
        assert np.argmax(overlaps) == labels[0]
        assert max(overlaps) > 0.8


@pytest.mark.parametrize("rows", [range(1200), range(1200, 1350)], ids=["train", "val"])
def test_how_many_labels_a_toy_video_has(rows):
    seen = set()
    for row, labels in zip(rows, default_labels(rows)):
        motions = [label for label in labels if label < 8]
        axes = {label // 2 for label in motions}
        assert len(motions) == len(axes) == 1 + row % 2
        assert len(labels) - len(motions) == (row % 5 == 0)
        seen.update(labels)
    assert seen == set(range(10))


def opposite(name):
    """A class name with every direction turned round."""
    words = {"right": "left", "left": "right", "up": "down", "down": "up"}
    return "+".join(words.get(word, word) for word in name.split("+"))


def test_each_validation_video_has_its_reversal(toy):
    """Both have the same middle frames, in opposite orders: a model that is blind to the order of
    frames cannot tell them apart."""
    videos = data.VideoList(toy, "val")
    names = np.array(videos.categories)
    for row in (0, 2):
        expected = [opposite(name) for name in names[videos.labels(row)]]
        assert names[videos.labels(row + 1)].tolist() == expected
        for indices in (range(24), data.segment_indices(24, 8)):
            forward = frame_bytes(toy, videos.path(row), indices)
            backward = frame_bytes(toy, videos.path(row + 1), indices)
            assert backward == forward[::-1]


def test_a_model_blind_to_order_scores_at_most_77_83():
    """On the default toy. It gives a video and its reversal the same scores. So for each pair every
    order of their labels is tried, ties too, and the best mean of the two average precisions is
    taken."""
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


def test_the_toy_depends_on_its_seed_alone(toy, tmp_path):
    assert call("data", "toy", tmp_path / "same", "--videos", 16, "--seed", 3) == 0
    assert contents(tmp_path / "same") == contents(toy)
    data.draw_toy(tmp_path / "other", videos=8, seed=5)
    other = frame_bytes(tmp_path / "other", "train/00000", [0])
    assert other != frame_bytes(toy, "train/00000", [0])


def test_a_toy_that_is_stopped_leaves_nothing(tmp_path, monkeypatch):
    def stop(*_):
        assert len(list(tmp_path.rglob("*.jpg"))) == 10 * 24
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "write_lines", stop)
    with pytest.raises(KeyboardInterrupt):
        data.draw_toy(tmp_path / "toy", videos=8)
    assert os.listdir(tmp_path) == []


# ---- extraction: what FFmpeg makes of videos -------------------------------------------------

def ffmpeg(*arguments):
    subprocess.run(["ffmpeg", "-nostdin", "-v", "error", "-y", *map(str, arguments)], check=True)


def film(file, frames=2, size="64x48", rate=30, options=()):
    """A video file of a test picture."""
    file.parent.mkdir(parents=True, exist_ok=True)
    ffmpeg("-f", "lavfi", "-i", f"testsrc=size={size}:rate={rate}", "-frames:v", frames,
           "-c:v", "mpeg4", *options, file)
    return file


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Videos of every kind, and files that are none. Several tests share them."""
    folder = tmp_path_factory.mktemp("the videos")
    film(folder / "deep/er/portrait.MOV", frames=9, size="48x64")
    film(folder / "slow.avi", frames=8, rate=10)
    film(folder / "two words 7.mp4", frames=1)
    plain = film(folder / f"{normalize('NFD', 'café')}.mp4")  # as macOS stores it

    # a phone's clip, with a tag that says how to turn it; ffmpeg 6 writes it by another option
    try:
        ffmpeg("-display_rotation", 90, "-i", plain, "-c", "copy", folder / "turned.mp4")
    except subprocess.CalledProcessError:
        ffmpeg("-i", plain, "-c", "copy", "-metadata:s:v:0", "rotate=90", folder / "turned.mp4")

    # the file's end is missing, but not its index, which is in front of the pictures
    whole = film(folder / "whole.mp4", frames=30, options=["-movflags", "+faststart"])
    truncated(shutil.copy(whole, folder / "cut.mp4"))

    # a trimmed clip: its picture starts two seconds after its sound
    ffmpeg("-f", "lavfi", "-i", "sine=duration=3", "-itsoffset", 2, "-i", whole,
           "-c:v", "copy", "-c:a", "aac", folder / "late.mp4")

    # what gives no frames
    ffmpeg("-f", "lavfi", "-i", "sine=duration=1", "-c:a", "aac", folder / "sound.mp4")
    write(folder / "text.mp4", "not a video\n" * 100)
    write(folder / "notes.txt", "no video either, and not named as one\n")
    return folder


@pytest.fixture(scope="module")
def extracted(videos, tmp_path_factory):
    """What extract makes of them, and its lines on stderr."""
    out = tmp_path_factory.mktemp("extracted") / "new" / "the data"
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        assert data.extract(videos, out, workers=2) == (8, 2)
    return out, stderr.getvalue()


EXTRACTED = r"""café 2 -1
cut 1\d -1
deep/er/portrait 9 -1
late 30 -1
slow 2[2-6] -1
turned 2 -1
two words 7 1 -1
whole 30 -1
"""


@needs_ffmpeg
def test_every_video_becomes_frames_and_a_line(extracted):
    """30 frames a second. At other rates FFmpeg's versions differ by a few frames."""
    out, _ = extracted
    assert re.fullmatch(EXTRACTED, (out / "train.txt").read_text())
    failed = (out / "train_failed.txt").read_text()
    assert re.fullmatch("sound\tffmpeg: .+\ntext\tffmpeg: .+\n", failed)
    assert len(os.listdir(out / "frames")) == 8  # no part of a failed video
    write(out / "categories.txt", "a\n")
    assert call("data", "check", out) == 0


@needs_ffmpeg
@pytest.mark.parametrize("path, size", [
    ("whole", (426, 320)), ("deep/er/portrait", (320, 426)), ("turned", (320, 426))])
def test_the_short_side_becomes_320_pixels(extracted, path, size):
    with Image.open(extracted[0] / "frames" / path / "img_00001.jpg") as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", size)


@needs_ffmpeg
def test_what_was_left_out_or_damaged_is_said(extracted):
    out, stderr = extracted
    last = len(os.listdir(out / "frames" / "cut")) - 1  # the file ends within this frame
    assert frame_bytes(out, "cut", range(last)) == frame_bytes(out, "whole", range(last))
    assert f"the videos0/cut.mp4: {last + 1} frames kept; ffmpeg: " in stderr
    assert " @ 0x" not in stderr  # an address, of no use to anybody
    assert "the videos0: 1 files skipped, whose ending is not one of mp4 " in stderr
    assert "\nvideos 10/10, " in stderr  # the progress


@needs_ffmpeg
def test_packed_frames_are_the_same(videos, extracted, tmp_path):
    out, _ = extracted
    assert call("data", "extract", "--videos", videos, "--out", tmp_path, "--split", "train",
                "--pack") == 0
    assert (tmp_path / "train.txt").read_text() == (out / "train.txt").read_text()
    for video in data.read_list(out / "train.txt", "ours"):
        with zipfile.ZipFile(tmp_path / "frames" / f"{video.path}.zip") as archive:
            frames = {name: archive.read(name) for name in archive.namelist()}
            assert archive.infolist()[0].date_time[0] == 1980  # the same bytes in every run
        assert frames == contents(out / "frames" / video.path)


# ---- extraction: when FFmpeg or the extraction ends early ------------------------------------

FAKE_FFMPEG = f"#!{sys.executable}" + """
# Takes the place of ffmpeg: it decodes no video, but does what the video's text says.
import os, shutil, signal, sys
from pathlib import Path

assert os.getsid(0) == os.getpid()  # a session of its own, which Ctrl-C does not reach
video = sys.argv[sys.argv.index("-i") + 1]
text = Path(video.removeprefix("file:")).read_text()
frame = Path(__file__).with_name("frame.jpg")
if text == "no frame":
    sys.exit(0)

shutil.copy(frame, "img_00001.jpg")
if text == "get killed":
    os.kill(os.getpid(), signal.SIGKILL)
if text == "get stopped":
    sys.exit(255)  # as ffmpeg does after a signal that it handles
if text == "fail":
    sys.exit(1)
if text == "fill the disk":
    print("av_interleaved_write_frame(): No space left on device", file=sys.stderr)
    sys.exit(0)
if text == "kill data.py":
    os.kill(os.getppid(), signal.SIGKILL)
    sys.exit(0)

shutil.copy(frame, "img_00002.jpg")
"""


@pytest.fixture
def extract(tmp_path, monkeypatch):
    """extract({file name: what ffmpeg does}) writes such files into tmp_path / "videos" and
    extracts all that are there -> the text of the list, and of the list of failures."""
    program = write(tmp_path / "bin" / "ffmpeg", FAKE_FFMPEG)
    program.chmod(0o755)
    Image.new("RGB", (4, 4)).save(tmp_path / "bin" / "frame.jpg")
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)

    def extract(files, split="train", **options):
        for name, text in files.items():
            write(tmp_path / "videos" / name, text)
        out = tmp_path / "data"
        data.extract(tmp_path / "videos", out, split, workers=1, **options)
        return (out / f"{split}.txt").read_text(), (out / f"{split}_failed.txt").read_text()
    return extract


@pytest.fixture
def out(tmp_path):
    return tmp_path / "data"


@pytest.mark.parametrize("text", ["get stopped", "get killed"])
def test_a_stopped_ffmpeg_makes_no_video(out, extract, text):
    videos, failed = extract({"a.mp4": "", "b.mp4": text, "c.mp4": ""})
    assert videos == "a 2 -1\nc 2 -1\n"
    assert failed.startswith("b\tffmpeg was stopped")
    assert sorted(os.listdir(out / "frames")) == ["a", "c"]


def test_what_a_failing_ffmpeg_decoded_is_kept(extract, capsys):
    assert extract({"a.mp4": "", "b.mp4": "fail"}) == ("a 2 -1\nb 1 -1\n", "")
    assert "b.mp4: 1 frames kept; ffmpeg: status 1\n" in capsys.readouterr().err


def test_a_full_disk_stops_the_extraction(out, extract):
    """Otherwise every video that follows would be listed as broken. FFmpeg's status may be 0."""
    with pytest.raises(OSError, match="no space left on the disk; free some"):
        extract({"a.mp4": "", "b.mp4": "fill the disk", "c.mp4": ""})
    assert os.listdir(out) == ["frames"]
    assert "b" not in os.listdir(out / "frames")


def test_a_killed_extraction_goes_on(tmp_path, out, extract):
    """SIGKILL while the second of three videos is half decoded."""
    for name, text in (("a", ""), ("b", "kill data.py"), ("c", "")):
        write(tmp_path / "videos" / f"{name}.mp4", text)
    python(ROOT / "data.py", "extract", "--videos", "videos", "--out", "data", "--split", "train",
           "--workers", 1, cwd=tmp_path)
    first = out / "frames" / "a" / "img_00001.jpg"
    written = first.stat().st_mtime_ns
    assert not (out / "frames" / "b").exists()

    assert extract({"b.mp4": ""}) == ("a 2 -1\nb 2 -1\nc 2 -1\n", "")
    assert first.stat().st_mtime_ns == written


def test_a_second_run_keeps_what_is_whole(tmp_path, out, extract):
    """Folders and zips side by side. A broken zip and an empty folder are not whole."""
    for name in "abcd":
        write(tmp_path / "videos" / f"{name}.mp4", "")
    frames = out / "frames"
    write_frames(frames / "b", noise(2, 4, 4, 4, 3))
    pack(frames)
    write_frames(frames / "a", noise(1, 3, 4, 4, 3))
    write(frames / "a" / "notes.txt", "not a frame, and not counted\n")
    kept = contents(frames)
    write(frames / "c.zip", kept["b.zip"][:-30])
    (frames / "d").mkdir()
    assert extract({"e.mp4": "no frame"}) == (
        "a 3 -1\nb 4 -1\nc 2 -1\nd 2 -1\n", "e\tffmpeg: no frame\n")

    (tmp_path / "videos" / "c.mp4").unlink()  # given up
    assert extract({"e.mp4": "mended"}) == ("a 3 -1\nb 4 -1\nd 2 -1\ne 2 -1\n", "")
    assert kept.items() <= contents(frames).items()


# ---- extraction: files, lists and class names ------------------------------------------------

def test_videos_are_found_by_every_ending(tmp_path):
    for name in ("a.ts", "b.mts", "c.M2TS", "d.ogv", "e.gif", "f.mp4", "g.webm", "h.avi.mp4"):
        write(tmp_path / name, "")
    assert list(data.find_videos(tmp_path)) == list("abcdefgh")


@pytest.mark.parametrize("stored, listed", [("NFC", "NFD"), ("NFD", "NFC")])
def test_both_unicode_forms_of_a_name_are_one(tmp_path, stored, listed):
    file = write(tmp_path / f"{normalize(stored, 'é')}.mp4", "")
    assert data.find_videos(tmp_path)[data.file_key(normalize(listed, "é"))] == file


def test_links_are_followed_but_not_in_a_circle(tmp_path):
    write(tmp_path / "y" / "clip.mp4", "")
    write(tmp_path / "z" / "clip.mp4", "")
    (tmp_path / "a").symlink_to("y")
    (tmp_path / "z" / "back").symlink_to(tmp_path)
    assert list(data.find_videos(tmp_path)) == ["a/clip", "y/clip", "z/clip"]


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(OSError, match="Permission denied"):
        data.find_videos(tmp_path)


def test_a_name_that_fits_no_list_line_fails(extract):
    names = [" space", "two\nlines", "two\u2028lines", "\udcff"]  # the last: bytes without UTF-8
    videos, failed = extract({f"{name}.mp4": "" for name in [*names, "two words 7"]})
    assert videos == "two words 7 2 -1\n"
    assert "\ntwo\\nlines\tno list line can hold this path: rename the file\n" in failed
    assert failed.count("rename the file") == 4


def test_a_foreign_list_becomes_ours(tmp_path, extract, capsys):
    listing = write(tmp_path / "list.txt", "slow.mp4 7 264\nabsent.mp4 3\n./odd.mp4 2\n"
                    "text.mp4 5\ntwo words 7.mp4 -1\ncafé.mp4 4 1\nodd.mp4 8\n")
    videos = {"odd.mp4": "", "slow.mp4": "", "two words 7.mp4": "", "unlisted.mp4": "",
              f"{normalize('NFD', 'café')}.mp4": "", "text.mp4": "no frame"}
    assert extract(videos, "test", list_path=listing, format="mmaction2-videos") == (
        "slow 2 7,264\nodd 2 2,8\ntwo words 7 2 -1\ncafé 2 4,1\n",
        "absent\tno such video\ntext\tffmpeg: no frame\n")
    assert "7 lines, 6 videos" in capsys.readouterr().err


def test_class_names_of_a_csv_become_ids(tmp_path, out, extract):
    """In the order of the alphabet, or of the categories.txt that is there."""
    listing = write(tmp_path / "list.csv", "a.mp4,walk\nb.mp4,cook,run\nc.mp4,-1\na.mp4,run\n")
    videos = {"a.mp4": "", "b.mp4": "", "c.mp4": ""}
    assert extract(videos, list_path=listing) == ("a 2 2,1\nb 2 0,1\nc 2 -1\n", "")
    assert (out / "categories.txt").read_text() == "cook\nrun\nwalk\n"
    write(out / "categories.txt", "run\nwalk\ncook\n")
    assert extract(videos, list_path=listing) == ("a 2 1,0\nb 2 2,0\nc 2 -1\n", "")
    write(listing, "a.mp4,run\nb.mp4,1\n")
    with pytest.raises(ValueError, match="list.csv:2: the id 1, but other lines hold class names"):
        extract(videos, list_path=listing)


def test_a_hash_of_the_path_decides_who_validates():
    """In both lists the videos keep their order. At least one video validates, and one trains."""
    videos = [data.Video(f"v {row}", 9, [], row) for row in range(10)]
    by_hash = sorted(videos, key=lambda video: zlib.crc32(video.path.encode()))
    for fraction, count in ((0.2, 2), (0.01, 1), (0.99, 9)):
        train, val = data.split_videos(videos, fraction)
        assert (train, val) == (sorted(by_hash[count:]), sorted(by_hash[:count]))
    with pytest.raises(ValueError, match="--val 0.2: 1 .* cannot be split"):
        data.split_videos(videos[:1], 0.2)


def test_val_writes_two_lists(out, extract):
    videos, failed = extract({f"{name} 1.mp4": "" for name in "pqrs"}, val=0.25)
    assert videos == "p 1 2 -1\nq 1 2 -1\ns 1 2 -1\n"
    assert (out / "val.txt").read_text() == "r 1 2 -1\n"  # its hash is the smallest


# ---- extraction: what people bring -----------------------------------------------------------

def extract_list(extract, tmp_path, text, split="train", **options):
    """Extract a csv with this text. Its videos a, b, c ... are there."""
    listing = write(tmp_path / "list.csv", text)
    return extract({f"{name}.mp4": "" for name in "abcd"}, split, list_path=listing, **options)


@pytest.mark.parametrize("field, label", [
    ("run|jump", "run|jump"), ("run;jump", "run;jump"), ('"run, jump"', "run, jump"),
    ("c092 11.90 21.20;c147 0.00 12.60", "c092 11.90 21.20;c147 0.00 12.60"),  # Charades
    ("\"['run', 'jump']\"", "['run', 'jump']"), ("['run']", "['run']"), ("run\tjump", "run\tjump"),
    ('"[""run"", ""jump""]"', '["run", "jump"]'),
])
def test_joined_labels_are_no_class(tmp_path, out, extract, field, label):
    """Unless categories.txt names them."""
    with pytest.raises(ValueError, match="list.csv:2: .* looks like several labels; write each in "
                                         "a field of its own .*, or, if it is one class, .* first"):
        extract_list(extract, tmp_path, f"a.mp4,run\nb.mp4,{field}\n")
    assert not out.exists()
    write(out / "categories.txt", f"run\n{label}\n")
    videos, _ = extract_list(extract, tmp_path, f"a.mp4,run\nb.mp4,{field}\n")
    assert videos == "a 2 0\nb 2 1\n"


def test_a_class_name_may_hold_brackets(tmp_path, out, extract):
    extract_list(extract, tmp_path, "a.mp4,run+jump,[run],eat/feed (one's cat)\n")
    assert (out / "categories.txt").read_text() == "[run]\neat/feed (one's cat)\nrun+jump\n"


def test_both_unicode_forms_of_a_class_are_one(tmp_path, out, extract):
    nfc, nfd = normalize("NFC", "é"), normalize("NFD", "é")
    text = f"a.mp4,{nfc}\na.mp4,{nfd},x\nb.mp4,{nfd}\n{nfc}.mp4,x\n{nfd}.mp4,y\n"
    write(tmp_path / "videos" / f"{nfd}.mp4", "")
    videos, _ = extract_list(extract, tmp_path, text)
    assert videos == f"a 2 2,0\nb 2 2\n{nfc} 2 0,1\n"
    assert (out / "categories.txt").read_text() == f"x\ny\n{nfc}\n"


@pytest.mark.parametrize("text, line", [
    # a column that is no label
    ("a.mp4,run,train\nb.mp4,jump,train\nc.mp4,run,train\n",
     "3 classes, 2.00 labels a video; most videos: train (3), fewest: jump (1)"),
    ("a.mp4,90,3\nb.mp4,90,5\n", "3 classes, 2.00 labels a video; most videos: 90 (2), fewest: 3"),
])
def test_the_classes_are_counted_for_the_user(tmp_path, extract, capsys, text, line):
    extract_list(extract, tmp_path, text)
    assert line in capsys.readouterr().out


def test_val_says_which_classes_one_side_lacks(tmp_path, extract, capsys):
    text = "a.mp4,run,swim\nb.mp4,run,jump\nc.mp4,run\nd.mp4,run\n"
    extract_list(extract, tmp_path, text, val=0.5)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:] == ["train.txt has no video of these classes: jump",
                         "val.txt has no video of these classes: swim"]


def test_a_path_of_another_list_fails(tmp_path, out, extract):
    """It may be another video of the same name, whose frames would be those of the first."""
    write(out / "notes.txt", "no list\n")
    write(out / "old_failed.txt", "b 2 0\n")
    write(out / "labels.txt", "b 2 0\n")  # the list that is read
    assert extract({"a.mp4": ""}) == ("a 2 -1\n", "")
    write(tmp_path / "videos" / "b.mp4", "")
    write(out / "labels.txt", "a 2 0\nb 2 0\n")
    videos, failed = extract({}, "val", list_path=out / "labels.txt", format="ours")
    assert videos == "b 2 0\n"
    assert failed.startswith(f"a\t{out / 'train.txt'} names this path too: ")
    assert "folder whose sub-folder has another name" in failed
    assert "copy its line" in failed


@pytest.mark.parametrize("now_packed", [False, True])
@pytest.mark.parametrize("once_packed", [False, True])
def test_frames_older_than_their_video_are_decoded_again(
        tmp_path, out, extract, capsys, once_packed, now_packed):
    folder = write_frames(out / "frames" / "x" / "a", noise(0, 3, 4, 4, 3))
    if once_packed:
        pack(out / "frames")
    old = contents(out / "frames")
    for file in out.rglob("*.*"):
        os.utime(file, (1000, 1000))

    # the old ones stay until the new ones are whole
    videos, failed = extract({"x/a.mp4": "get killed", "b.mp4": ""}, pack=now_packed)
    assert videos == "b 2 -1\n"
    assert contents(out / "frames").items() >= old.items()

    videos, _ = extract({"x/a.mp4": ""}, pack=now_packed)
    assert videos == "b 2 -1\nx/a 2 -1\n"
    assert "1 of 2 videos were extracted earlier; their frames are kept" in capsys.readouterr().err
    assert len(os.listdir(folder.parent)) == 1
    assert folder.exists() != now_packed


def test_the_same_command_again_decodes_nothing(tmp_path, out, extract, capsys):
    extract_list(extract, tmp_path, "a.mp4,x\nb.mp4,y\n", val=0.5)
    before = contents(out)
    capsys.readouterr()
    videos = tmp_path / "videos"
    shutil.rmtree(tmp_path / "bin")
    write(tmp_path / "bin" / "ffmpeg", "#!/bin/false\n").chmod(0o755)
    data.extract(videos, out, list_path=tmp_path / "list.csv", val=0.5)
    assert contents(out) == before
    err = capsys.readouterr().err
    assert "2 of 2 videos were extracted earlier" in err
    assert "replaced" not in err


def test_a_replaced_list_is_said(tmp_path, out, extract, capsys):
    extract_list(extract, tmp_path, "a.mp4,0\nb.mp4,0\nc.mp4,0\n")
    extract_list(extract, tmp_path, "a.mp4,0\nd.mp4,0\n")
    assert (f"{out / 'train.txt'}: replaced; it had 3 lines, the paths of 2 are no longer listed, "
            "and it has 2 now\n") in capsys.readouterr().err
    extract_list(extract, tmp_path, "a.mp4,1\nd.mp4,0\n")  # other labels
    assert "it had 2 lines, the paths of 0 are" in capsys.readouterr().err


def test_a_list_stays_if_nothing_was_extracted(tmp_path, out, extract):
    extract_list(extract, tmp_path, "a.mp4,0\n")
    videos, failed = extract_list(extract, tmp_path, "typo.mp4,0\n")
    assert (videos, failed) == ("a 2 0\n", "typo\tno such video\n")


def test_a_new_class_is_appended_by_hand(tmp_path, out, extract):
    extract_list(extract, tmp_path, "a.mp4,run\n")
    with pytest.raises(ValueError, match="'jump' is not in .*; if it is a new class, append"):
        extract_list(extract, tmp_path, "b.mp4,jump\n", "val")
    write(out / "categories.txt", "run\njump\n")
    assert extract_list(extract, tmp_path, "b.mp4,jump\n", "val") == ("b 2 1\n", "")


def test_lost_categories_are_not_written_anew(tmp_path, out, extract):
    """While another list holds their ids."""
    extract_list(extract, tmp_path, "a.mp4,run\n")
    (out / "categories.txt").unlink()
    before = contents(out)
    with pytest.raises(ValueError, match="categories.txt: missing, but the ids in .*train.txt"):
        extract_list(extract, tmp_path, "b.mp4,jump\n", "val")
    assert contents(out) == before


@pytest.mark.parametrize("lines, names", [
    ("id,name\n1,b\n0,a\n", "a b"),
    ("0,a\n1,b\n", "a b"),
    ("class_id;class_name\n0;a\n1;b\n", "a b"),
    ('"id","name"\n"0","a"\n"1","b"\n', "a b"),
    ("1 b\n0 a\n", "a b"),
    ("a\t0\nb\t1\n", "a b"),
    ("0: a\n1: b\n", "a b"),
    ("a|0\nb|1\n", "a b"),
    ("0 phase 1\n1 phase 2\n", "phase.1 phase.2"),
    ("phase 1,0\nphase 2,1\n", "phase.1 phase.2"),
    # the numbers belong to the names
    ("phase 1\nphase 2\n", "phase.1 phase.2"),
    ("0\n1\n", "0 1"),
    ("phase 1\nphase 2\nother\n", "phase.1 phase.2 other"),
])
def test_the_forms_of_categories(tmp_path, lines, names):
    write(tmp_path / "categories.txt", lines)
    assert data.read_categories(tmp_path) == [name.replace(".", " ") for name in names.split()]


@pytest.mark.parametrize("lines, reason", [
    ("1 a\n2 b\n", "the ids begin at 1; subtract 1, here and in the lists: 0 to 1; if the numbers "
                   "belong to the names, write name,id"),  # Kinetics
    ("id,name\n0,a\n5,b\n", "the ids must be 0 to 1, each once, but they are 0 to 5; if the"),
    ("a,0\nb,0\n", "the ids must be 0 to 1"),
    ("a,0\nb,1\nc\n", "'c' has no id, but other lines have one; write name,id in every line"),
    ("name\na\nb\n", "'name' looks like a line of column titles; remove it, or"),
])
def test_unclear_categories_are_refused(tmp_path, lines, reason):
    file = write(tmp_path / "categories.txt", lines)
    with pytest.raises(ValueError) as error:
        data.read_categories(tmp_path)
    assert str(error.value).startswith(f"{file}: ")
    assert reason in str(error.value)


@pytest.mark.parametrize("names", [
    "take 1,shot 0", "phase 1", "a 0,b 1", "0 a,1 b", "class id,x", "name", "a:0,b:1", "1st,2nd"])
def test_extracted_categories_read_back_as_written(tmp_path, out, extract, names):
    extract_list(extract, tmp_path, f"a.mp4,{names}\n")
    assert data.read_categories(out) == sorted(names.split(","))


def test_backslashes_of_a_list_are_slashes(tmp_path, extract):
    listing = write(tmp_path / "list.csv", "run\\a.mp4,run\n.\\run\\b.mp4,run\n")
    videos, _ = extract({"run/a.mp4": "", "run/b.mp4": ""}, list_path=listing)
    assert videos == "run/a 2 0\nrun/b 2 0\n"


@pytest.mark.skipif(os.sep == "\\", reason="no file name holds a backslash there")
def test_a_backslash_in_a_file_name_fits_no_line(tmp_path, extract):
    assert extract({"run\\a.mp4": "", "b.mp4": ""}) == (
        "b 2 -1\n", "run\\a\tno list line can hold this path: rename the file\n")
    _, failed = extract_list(extract, tmp_path, "run\\a.mp4,run\nb.mp4,run\n")
    assert failed == "run/a\tno list line can hold the name of this file: rename it\n"


def test_a_video_beside_a_folder_of_its_name(out, extract):
    files = {"talk.mp4": "", "talk/part.mp4": ""}
    assert extract(files) == (
        "talk/part 2 -1\n",
        "talk\ta folder of this name holds videos too: rename the file or the folder\n")
    shutil.rmtree(out)
    assert extract(files, pack=True) == ("talk 2 -1\ntalk/part 2 -1\n", "")
    os.utime(out / "frames" / "talk.zip", (1000, 1000))  # talk is decoded again
    assert extract(files, pack=True) == ("talk 2 -1\ntalk/part 2 -1\n", "")
    assert extract({}) == ("talk 2 -1\ntalk/part 2 -1\n", "")  # they are there
    assert sorted(contents(out / "frames")) == ["talk.zip", "talk/part.zip"]


def while_decoding(monkeypatch, action):
    """Call `action` once, while the first video is decoded."""
    actions = [action]
    decode_video = data.decode_video

    def decode(*arguments):
        while actions:
            actions.pop()()
        return decode_video(*arguments)

    monkeypatch.setattr(data, "decode_video", decode)


@pytest.mark.parametrize("packed", [False, True])
def test_the_same_split_may_be_extracted_twice_at_once(out, extract, monkeypatch, packed):
    results = []
    while_decoding(monkeypatch, lambda: results.append(extract({}, pack=packed)))
    results.append(extract({"a.mp4": "", "b.mp4": ""}, pack=packed))
    assert results == [("a 2 -1\nb 2 -1\n", "")] * 2
    assert len(os.listdir(out / "frames")) == 2


def test_another_split_extracted_meanwhile_must_agree(tmp_path, out, extract, monkeypatch):
    def extract_val():
        extract_list(extract, tmp_path, "b.mp4,run\n", "val")

    while_decoding(monkeypatch, extract_val)
    with pytest.raises(ValueError, match="categories.txt: another command has written it mean"):
        extract_list(extract, tmp_path, "a.mp4,jump\n")
    assert not (out / "train.txt").exists()

    while_decoding(monkeypatch, lambda: extract({}, "test"))
    with pytest.raises(ValueError, match="test.txt: another command .* names a too; run this one"):
        extract({})


def test_a_toy_drawn_twice_at_once_is_one(tmp_path, toy, monkeypatch):
    write_lines = data.write_lines

    def draw_another(*arguments):
        monkeypatch.setattr(data, "write_lines", write_lines)
        data.draw_toy(tmp_path / "toy", videos=16, seed=3)
        write_lines(*arguments)

    monkeypatch.setattr(data, "write_lines", draw_another)
    with pytest.raises(OSError, match="toy: another process has made it meanwhile"):
        data.draw_toy(tmp_path / "toy", videos=8)
    assert os.listdir(tmp_path) == ["toy"]
    assert contents(tmp_path / "toy") == contents(toy)


def test_only_old_leftovers_are_removed(tmp_path, out, extract):
    """Others may belong to a run that is at work. Neither stops the next run."""
    def leave(path, age):
        write(path / "x" / "y" / "img_00001.jpg", "")
        for folder in (path / "x" / "y", path / "x", path):
            os.utime(folder, (time.time() - age, time.time() - age))
        return path

    frames = out / "frames"
    young = leave(frames / f".part-train-{os.getpid()}", 3000)
    busy = leave(frames / ".part-train-1", 4000)
    write(busy / "x" / "y" / "img_00002.jpg", "")
    old = leave(frames / ".part-train-2", 4000)
    toys = [leave(tmp_path / f"toy.part-{os.getpid()}", 3000), leave(tmp_path / "toy.part-1", 4000)]
    assert extract({"a.mp4": ""}) == ("a 2 -1\n", "")
    data.draw_toy(tmp_path / "toy", videos=8)
    assert [path.exists() for path in (young, busy, old, *toys)] == [True, True, False, True, False]


def test_help_says_how_to_split_the_clips_of_one_film(capsys):
    assert call("data", "extract", "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Clips cut from one film may fall on both sides: for these write two lists" in text


@needs_ffmpeg
def test_a_video_may_change_its_size_and_pixel_format(tmp_path):
    first = film(tmp_path / "a.ts", 30, "64x48", options=["-c:v", "mpeg2video"])
    second = film(tmp_path / "b.ts", 30, "128x64",
                  options=["-c:v", "mpeg2video", "-pix_fmt", "yuv422p"])
    joined = write(tmp_path / "joined.ts", first.read_bytes() + second.read_bytes())
    (tmp_path / "frames").mkdir()
    assert data.decode_video(joined, tmp_path / "frames")[0] == 60
    assert data.read_frames(tmp_path / "frames", range(60)).shape == (60, 320, 426, 3)


@needs_ffmpeg
@pytest.mark.parametrize("matrix", ["bt709", "smpte170m"])  # HD, and BT.601
def test_colours_are_those_of_the_video(tmp_path, matrix):
    scale = {"bt709": "bt709", "smpte170m": "bt601"}[matrix]
    ffmpeg("-f", "lavfi", "-i", "color=c=0xC83C28:size=64x48:rate=30", "-frames:v", 2,
           "-vf", f"scale=out_color_matrix={scale}", "-pix_fmt", "yuv420p", "-c:v", "mpeg2video",
           "-q:v", 1, "-colorspace", matrix, tmp_path / "red.mkv")
    (tmp_path / "frames").mkdir()
    data.decode_video(tmp_path / "red.mkv", tmp_path / "frames")
    colour = data.read_frames(tmp_path / "frames", [0]).float().mean((0, 1, 2))
    assert abs(colour - torch.tensor([200, 60, 40])).max() <= 4


# ---- check -----------------------------------------------------------------------------------

def test_check_describes_a_sound_folder(folder, capsys):
    assert call("data", "check", folder) == 0
    out = capsys.readouterr().out
    assert "train.txt: 4 lines, 3 videos" in out
    assert "1.33 labels each" in out
    assert "most videos: b (3)" in out
    assert out.endswith("\n0 problems\n")


def test_check_names_every_other_problem(folder, capsys):
    train = folder / "train.txt"
    val = folder / "val.txt"
    write_frames(folder / "frames" / "p", noise(0, 4, 36, 40, 3))  # a frame too many
    shutil.rmtree(folder / "frames" / "q")
    write(val, "t 3 2\ns 3 1\nu 900000000000000 0\n")
    (folder / "test.txt").unlink()
    assert call("data", "check", folder) == 2
    assert capsys.readouterr().out.splitlines()[-5:] == [
        f"{train}:1: p: 1 files that are not among its 3 frames",
        f"{train}:3: q/r: 0 of 3 frames",
        f"{val}:2: s is also in {train}",
        f"{val}:3: u: 3 of 900000000000000 frames",
        "4 problems"]
    val.unlink()
    call("data", "check", folder)
    assert f"{val} is missing: training needs it" in capsys.readouterr().out


# ---- what the scripts share ------------------------------------------------------------------

def test_replacing_leaves_nothing_half_written(tmp_path):
    file = write(tmp_path / "file", "old")
    with pytest.raises(KeyboardInterrupt), data.replacing(file) as part:
        part.write_text("half of the n")
        raise KeyboardInterrupt
    assert contents(tmp_path) == {"file": b"old"}
    with data.replacing(file) as part:
        part.write_text("new")
        assert file.read_text() == "old"
    assert contents(tmp_path) == {"file": b"new"}


def test_a_console_may_lack_a_character(folder, monkeypatch):
    write(folder / "categories.txt", "a\ncrêpes\nc\n")
    console = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", console)
    assert call("data", "check", folder) == 0
    console.flush()
    assert b"most videos: cr?pes (3)" in console.buffer.getvalue()


def test_the_end_of_another_process_is_one_line(monkeypatch, capsys):
    def main():
        raise RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer")

    monkeypatch.setattr(data, "main", main)
    assert call("data") == 2
    assert capsys.readouterr().err == (
        "data.py: another process has ended; its own line says why\n")
