"""data.py: what a list line means, which frames and pixels of a video a network sees, what the toy
videos show, and how videos become frames.

    python -m pytest tests/test_data.py

The first parts begin with examples that can be checked by hand. Where there is an independent
answer (Pillow's, torchvision's, a naive formula's, or the set of all possible outcomes), it
follows. "The authors' code" is X-Temporal, as in data.py. Commands that are misused are in
test_bad_input.py.
"""
import os
import re
import shutil
import signal
import subprocess
import sys
import tracemalloc
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from numpy.random import default_rng
from PIL import Image
from torchvision.transforms import functional as vision

import data
import evaluate
from conftest import ROOT, call, close, data_folder, needs_ffmpeg, noise, write, write_frames

# Clips of 8 segments, crops of 32 pixels out of 36.
RECIPE = {**data.RECIPE, **data.TOY, "frames": 8, "flip": True}


@pytest.fixture(autouse=True)
def new_folder(tmp_path, monkeypatch):
    """Every test runs in an empty folder of its own."""
    monkeypatch.chdir(tmp_path)


def contents(folder):
    """{path below a folder: bytes} of every file, sorted."""
    return {file.relative_to(folder).as_posix(): file.read_bytes()
            for file in sorted(Path(folder).rglob("*")) if file.is_file()}


def make_old(path):
    """Its date becomes one in 2001."""
    os.utime(path, (10**9, 10**9))


# ---- a list: one video per line --------------------------------------------------------------

def read(text, format="auto"):
    """What a list file with this text says, in lines of "path frames labels". The number of frames
    is "None" if the list gives none."""
    videos = data.read_list(write("list.txt", text), format)
    return "\n".join(map(data.list_line, videos))


OURS = "cooking/a 90 7,2\nmy video 1 45 0\nb 8 -1"  # -1: unlabelled


@pytest.mark.parametrize("format, text, expected", [
    ("auto", OURS, OURS),
    # labels of a repeated path are united
    ("auto", "a 9 0\nb 8 1\na 9 2\na 9 0\n", "a 9 0,2\nb 8 1"),
    # Extra white space is ignored, and so are the byte-order mark and the line ends of Windows.
    ("auto", "\ufeffa  9   1, 2\r\n\n \n b\t8\t3 ", "a 9 1,2\nb 8 3"),
    # X-Temporal's lists of video files; the comma tells them from mmaction2's
    ("auto", "a/b-3_1.mp4 91 266,33\nc.mp4 45 0\n", "a/b-3_1 91 266,33\nc 45 0"),

    # a csv: M-MiT's, and as spreadsheets write it
    ("auto", "adult+female/a-3_1.mp4,266,33\nc.mp4,0\n",
     "adult+female/a-3_1 None 266,33\nc None 0"),
    ("auto", 'a.MP4, 0,,\nb.mp4, "0,2"\n"c, d.mp4",3\ne.mp4,run,eating/feeding\n',
     "a None 0\nb None 0,2\nc, d None 3\ne None run,eating/feeding"),
    ("auto", "a.v2,3", "a.v2 None 3"),  # not an ending of a video file, so it stays

    # what only --format tells: 92 is a number of frames, or a label
    ("ours", "a.mp4 92 69\n", "a 92 69"),
    ("mmaction2-videos", "a.mp4 92 69\nb.mp4 5\n", "a None 92,69\nb None 5"),
    # mmaction2's tool lists a video again, with 0 frames of optical flow: ignored
    ("mmaction2-frames", "a 91 266 33\na 0 266 33\nb 93 37\n", "a 91 266,33\nb 93 37"),
])
def test_lists_are_read(format, text, expected):
    assert read(text, format) == expected


@pytest.mark.parametrize("text", [
    "b.mp4 5\na.mp4 92 69\n",  # the first line fits mmaction2 alone, the second ours too
    "x 90 7 264\n",  # a video "x 90" of 7 frames, or "x" of 90 frames?
])
def test_a_line_of_two_meanings_needs_a_format(text):
    with pytest.raises(ValueError, match="several ways.*--format"):
        read(text)


@pytest.mark.parametrize("text, reason", [
    ("a 9 1\n\nb 9 -2\n", "expected path num_frames id[,id...] (-1: unlabelled)"),
    ("a 9 1\n\nb 9999999999999999 1\n", "expected path num_frames id"),  # at most 15 digits
    ("a 9 1\n\na 8 1\n", "a has 8 frames here and 9 in line 1"),
    ("a.mp4,1\n\nC:\\b.mp4,3\n", "must be a relative path inside the folder"),
    ("a.mp4,1\n\n/b.mp4,3\n", "must be a relative path inside the folder"),
    ("a.mp4,1\n\nsome/../../b.mp4,3\n", "must be a relative path inside the folder"),
    ("a.mp4,1\n\nsome/./b.mp4,3\n", "must be a relative path inside the folder"),
    ("a.mp4,1\n\nb.mp4\n", "expected name.mp4,id[,id...] (-1: unlabelled)"),
    ("a.mp4,1\n\nb.mp4,3,-1\n", "-1 means unlabelled and stands alone"),
    ("a.mp4,1\n\nb.mp4,1,01\n", "a label appears twice"),
    ("a.mp4,1\n\nb.mp4,run,2\n", "mixes class names and numbers"),
    # a spreadsheet writes 3.0 if another cell of the column is empty
    ("a.mp4,1\n\nb.mp4,3.0\n", "'3.0' is neither an id nor the name of a class"),
    ("\n\nname,label\na.mp4,run\n", "'name' has no ending of a video file"),  # column titles
])
def test_a_bad_line_is_named_with_its_number(text, reason):
    """Empty lines count."""
    with pytest.raises(ValueError, match=f"^list.txt:3: .*{re.escape(reason)}"):
        read(text)


# ---- class names -----------------------------------------------------------------------------

@pytest.mark.parametrize("text, names", [
    ("c+d\na/b\n", "c+d\na/b"),
    ("c+d,1\na/b,0\n", "a/b\nc+d"),  # M-MiT: name,id
    ("\ufeff b \r\na\r\n\r\n", "b\na"),
    ("cafe\u0301\n", "caf\u00e9"),  # as macOS may write it
    ("id,name\n1,b\n0,a\n", "a\nb"),
    ("class_id;class_name\n0;a\n1;b\n", "a\nb"),
    ('"id","name"\n"0","a"\n"1","b"\n', "a\nb"),
    ("0: a\n1: b\n", "a\nb"),
    ("a|0\nb|1\n", "a\nb"),
    ("0 phase 1\n1 phase 2\n", "phase 1\nphase 2"),
    # the numbers belong to the names
    ("phase 1\nphase 2\n", "phase 1\nphase 2"),
    ("0\n1\n", "0\n1"),
    ("1st\n2nd\n", "1st\n2nd"),
    ("phase 0\nphase 1\nother\n", "phase 0\nphase 1\nother"),
])
def test_categories_are_names_by_id(text, names):
    write("categories.txt", text)
    assert data.read_categories(".") == names.split("\n")


@pytest.mark.parametrize("text, reason", [
    ("1 a\n2 b\n", "the ids begin at 1; subtract 1, here and in the lists"),  # Kinetics
    ("id,name\n0,a\n5,b\n", "the ids must be 0 to 1, each once, but they are 0 to 5; if the "
                            "numbers belong to the names, write name,id"),
    ("a,0\nb,1\nc\n", "'c' has no id, but other lines have one; write name,id in every line"),
    ("name\na\nb\n", "'name' looks like a line of column titles; remove it"),
])
def test_unclear_categories_are_refused(text, reason):
    write("categories.txt", text)
    with pytest.raises(ValueError, match=f"categories.txt: {reason}"):
        data.read_categories(".")


# ---- which frames ----------------------------------------------------------------------------

def test_segments_give_the_middle_of_each_part():
    # parts of 3 frames: the second of each
    assert data.segment_indices(24, 8).tolist() == [1, 4, 7, 10, 13, 16, 19, 22]
    # a short video repeats frames
    assert data.segment_indices(5, 8).tolist() == [0, 0, 1, 2, 2, 3, 4, 4]

    # the authors' formula, in floating point
    for num_frames in range(1, 400):
        part = num_frames / 5
        expected = [int(part / 2 + k * part) for k in range(5)]
        assert data.segment_indices(num_frames, 5).tolist() == expected


def test_a_random_frame_lies_anywhere_in_its_part():
    """Of 9 frames, the middle one lies half in the first part and half in the second. The authors'
    code never draws the last one."""
    recipe = {**RECIPE, "frames": 2}
    rng = default_rng(0)
    drawn = {tuple(data.sample_indices(9, recipe, rng)) for _ in range(1000)}
    assert drawn == {*product(range(5), range(4, 9))}


def test_no_random_frame_lies_after_the_last():
    """With the largest number below 1, the place in the last part is rounded up to the end of the
    video, 90, which is not a frame."""
    rng = mock.Mock()
    rng.random.return_value = np.nextafter(1, 0)
    assert data.segment_indices(90, 5, rng)[-1] == 89


def test_clips_start_evenly_over_the_video():
    """Clips of 32 frames, 2 apart: the last start is 90 - 2 * 32 = 26."""
    assert data.clip_starts(90, 32, 2, views=4).tolist() == [0, 8, 17, 26]
    assert data.clip_starts(90, 32, 2, views=1).tolist() == [13]  # a single one in the middle
    assert data.clip_starts(9, 32, 2, views=2).tolist() == [0, 0]  # shorter than a clip


def test_a_training_clip_starts_anywhere():
    """The last start is 8 - 3 * 2 = 2, as the gap after the last frame counts. The authors' code
    never draws this start."""
    recipe = {"sampling": "clip", "frames": 3, "stride": 2}
    rng = default_rng(0)
    assert {data.sample_indices(8, recipe, rng)[0] for _ in range(200)} == {0, 1, 2}
    assert data.sample_indices(8, recipe).tolist() == [1, 3, 5]  # the middle one
    # a shorter video is repeated from its beginning, where the clip starts
    assert {tuple(data.sample_indices(3, recipe, rng)) for _ in range(20)} == {(0, 2, 1)}


# ---- which pixels ----------------------------------------------------------------------------

def test_frames_are_read_as_rgb_and_decoded_once():
    colour = noise(0, 5, 6, 3)
    grey = noise(1, 5, 6)
    write_frames("video", [colour, grey])
    with mock.patch.object(Image, "open", wraps=Image.open) as opened:
        frames = data.read_frames("video", [1, 0, 1])
    grey_as_rgb = np.dstack([grey, grey, grey])
    assert np.array_equal(frames, [grey_as_rgb, colour, grey_as_rgb])
    assert opened.call_count == 2


@pytest.mark.parametrize("width, height, sides", [  # 1, .875, .75 and .66 of the short side
    (254, 424, [254, 224, 190, 167]),  # 222 is within 2 of the crop, 224
    (424, 253, [253, 221, 189, 166]),  # 221 is not, and stays
    (424, 222, [222, 194, 166, 146]),  # 224 does not fit in
])
def test_a_multiscale_crop_is_a_square_or_nearly(width, height, sides):
    """Its width and height are the same or adjacent entries of the sides."""
    rng = default_rng(0)
    drawn = {data.multiscale_box(width, height, 224, rng)[2:] for _ in range(1000)}
    assert drawn == {*zip(sides, sides), *zip(sides, sides[1:]), *zip(sides[1:], sides)}


def test_a_multiscale_crop_lies_at_one_of_13_places():
    """A square of 240, .75 of the short side, leaves 184 x 80 pixels free."""
    rng = default_rng(0)
    boxes = [data.multiscale_box(424, 320, 224, rng) for _ in range(3000)]
    assert {(x, y) for x, y, w, h in boxes if w == h == 240} == {
        *product((0, 92, 184), (0, 40, 80)),  # corners, middles of the edges, centre
        *product((46, 138), (20, 60))}  # halfway from the centre to the corners


def test_a_jitter_crop_lies_anywhere():
    """The short side, 4, is resized to 2, 3 or 4, then a square of 2 is cut. In the original its
    side is 4 * 2 / 2 = 4, 4 * 2 / 3 = 3 (rounded) or 4 * 2 / 4 = 2."""
    expected = set()
    for side in (4, 3, 2):
        expected |= {*product(range(5 - side), range(7 - side), [side], [side])}
    rng = default_rng(0)
    drawn = {data.jitter_box(4, 6, 2, (2, 4), rng) for _ in range(1000)}
    assert drawn == expected


@pytest.mark.parametrize("augment, flip, seed, x, y, mirrored", [
    ("jitter", True, 0, 5, 4, True),
    ("jitter", True, 4, 8, 3, False),
    ("jitter", False, 0, 5, 4, False),
    ("multiscale", True, 24, 4, 2, True),  # this seed cuts 32x32 pixels, which are not resized
])
def test_all_frames_of_a_clip_are_cut_and_mirrored_alike(augment, flip, seed, x, y, mirrored):
    """Squares of 32 pixels are cut from 40x36, at (x, y)."""
    frames = noise(0, 3, 36, 40, 3)
    recipe = {**RECIPE, "augment": augment, "flip": flip}
    clip = data.make_clip(write_frames("video", frames), [2, 0], recipe, default_rng(seed))
    expected = frames[[2, 0], y : y + 32, x : x + 32]
    if mirrored:
        expected = expected[:, :, ::-1]  # left and right change places
    assert np.array_equal(clip, expected)


def test_half_of_the_clips_are_mirrored():
    frames = noise(0, 1, 36, 36, 3)
    folder = write_frames("video", frames)
    rng = default_rng(0)
    mirrored = 0
    for _ in range(400):
        clip = data.make_clip(folder, [0], {**RECIPE, "crop": 36}, rng)  # the whole frame
        if not np.array_equal(clip, frames):
            mirrored += 1
    assert 160 < mirrored < 240  # 200, give or take four standard deviations


@pytest.mark.parametrize("width, height, size, expected", [
    (320, 426, 112, (112, 149)),  # a number is the short side; the long one, 149.1, rounded down
    (568, 321, 256, (452, 256)),  # 452.98
    (320, 426, (200, 100), (200, 100)),
])
def test_resizing_is_pillows(width, height, size, expected):
    """Give or take one grey level. torchvision rounds the long side down too."""
    frame = noise(0, height, width, 3)
    pillows = Image.fromarray(frame).resize(expected, Image.Resampling.BILINEAR)
    resized = data.resize(torch.from_numpy(frame)[None], size)[0]
    np.testing.assert_allclose(resized, pillows, rtol=0, atol=1)


@pytest.mark.parametrize("largest, changes", [(40, True), (41, False)])
def test_draft_decodes_a_jpeg_at_half_its_size_if_that_suffices(largest, changes):
    """A frame of 96x80 pixels. Half its short side suffices for a jitter up to 40, and a clip
    hardly changes."""
    os.mkdir("video")
    Image.radial_gradient("L").resize((96, 80)).save("video/img_00001.jpg")
    clips = []
    for draft in (False, True):
        recipe = {**RECIPE, "jitter": (36, largest), "draft": draft}
        clips.append(data.make_clip("video", [0], recipe, default_rng(0)).float())
    difference = abs(clips[1] - clips[0]).mean()
    assert difference < 2  # grey levels of 255
    assert (difference > 0) == changes


@pytest.mark.parametrize("channels_last", [False, True])
def test_normalising_is_torchvisions(channels_last):
    clips = torch.from_numpy(noise(0, 2, 3, 4, 5, 3))
    mean_and_std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    normalised = data.normalise(clips, *mean_and_std, channels_last)
    expected = vision.normalize(clips.permute(0, 1, 4, 2, 3) / 255, *mean_and_std)
    close(normalised, expected, 1e-6)
    assert normalised.is_contiguous() != channels_last


# ---- the list in memory ----------------------------------------------------------------------

def list_of(text):
    """The VideoList of a list with this text. It needs no frames."""
    write("categories.txt", "a\nb\nc\n")
    write("train.txt", text)
    return data.VideoList(".", "train")


def test_a_list_has_one_row_per_video():
    videos = list_of("p 9 0,2\n\nr 8 -1\nq 7 2\n")
    assert videos.label_matrix().tolist() == [[1, 0, 1], [0, 0, 0], [0, 0, 1]]
    assert videos.place(2) == "train.txt:4"  # the empty line counts
    assert list_of("p 9 -1\n").label_matrix() is None  # no video has a label


def test_lists_in_a_data_folder_are_always_read_as_ours():
    """Even if a line has two meanings."""
    assert list_of("a.mp4 92 2\n").paths.tolist() == ["a"]


def test_a_label_of_no_class_is_refused():
    with pytest.raises(ValueError, match="train.txt:1: label 3, but the last class .* is 2"):
        list_of("p 9 0,3\n")


def test_the_hash_depends_on_the_lines_and_their_order():
    """The byte-order mark and the line ends of Windows do not change it."""
    known = list_of("p 9 0\nq 9 1").hash
    assert list_of("\ufeffp 9 0\r\nq 9 1\r\n").hash == known
    assert list_of("q 9 1\np 9 0\n").hash != known
    assert list_of("p 9 0\nq 9 2\n").hash != known


def test_a_long_list_holds_no_python_objects():
    """A worker process shares arrays, but would copy objects. The arrays take 16 bytes for a short
    path and 8 each for its number of frames, line, label, and where its labels begin. Python would
    share the numbers up to 256."""
    text = "".join(f"video/{row:05d} {row + 257} 1\n" for row in range(50_000))
    tracemalloc.start()
    videos = list_of(text)
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size == pytest.approx(len(videos) * (16 + 4 * 8), rel=0.1)


# ---- the training clips ----------------------------------------------------------------------

def train_clips():
    """Training clips by (epoch, row in the list)."""
    return data.TrainClips(data.VideoList(".", "train"), RECIPE, seed=4)


def test_a_clip_is_drawn_from_seed_epoch_and_row():
    """A zip of the frames changes nothing."""
    data_folder(".", ["p 3 1", "q 3 0,2"])
    rng = default_rng([4, 5, 1])
    indices = data.sample_indices(3, RECIPE, rng)
    expected = data.make_clip("frames/q", indices, RECIPE, rng)
    data.pack_folder(Path("frames/q"))
    clip, labels = train_clips()[5, 1]  # epoch 5, row 1
    assert torch.equal(clip, expected)
    assert labels.tolist() == [1, 0, 1]


# ---- broken frames ---------------------------------------------------------------------------

def truncated(file):
    os.truncate(file, file.stat().st_size // 2)


def one_bit_wrong(file):
    """Byte 35 of a frame (a PNG here) belongs to a length; Pillow then raises a SyntaxError. In a
    zip it belongs to the name of the first frame."""
    content = bytearray(file.read_bytes())
    content[35] ^= 1
    file.write_bytes(content)


def not_an_image(file):
    file.write_text("a text\n")


def of_another_size(file):
    Image.new("RGB", (48, 40)).save(file, format="PNG")


@pytest.fixture
def sound_folder():
    """The current folder becomes a data folder of three lists. In train.txt line 2 is empty, and
    line 5 repeats line 4."""
    data_folder(".", ["p 3 0,1", "", "q/r 3 1", "s 3 1", "s 3 1"])
    data_folder(".", ["t 3 2"], split="val")
    data_folder(".", ["u 3 -1"], split="test")


@pytest.mark.parametrize("place", ["frame", "frame in a zip", "zip"])
@pytest.mark.parametrize("damage", [
    Path.unlink, truncated, one_bit_wrong, not_an_image, of_another_size])
def test_a_broken_video_is_named_with_its_line(sound_folder, capsys, damage, place):
    """Training stops there, and check lists it."""
    folder = Path("frames/q/r")
    if place == "frame":
        damage(folder / "img_00003.jpg")
    elif place == "frame in a zip":
        damage(folder / "img_00003.jpg")
        data.pack_folder(folder)
    else:
        damage(data.pack_folder(folder))

    with pytest.raises(OSError) as error:
        train_clips()[0, 1]
    message = str(error.value)
    assert message.startswith("train.txt:3: frames/q/r")
    if place != "zip":
        assert "frames/q/r/img_00003.jpg: " in message
    assert "\n" not in message
    assert " at 0x" not in message  # of an object in memory

    assert call("data", "check", ".") == 2
    assert "\ntrain.txt:3: q/r: " in capsys.readouterr().out


class OneReadable:
    """Training clips of 12 rows, of which only the first can be read."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        epoch, row = index
        if row > 0:
            raise OSError(f"row {row}")
        return index


def test_skip_broken_takes_the_next_readable_video(capsys):
    """It looks at most ten rows on; the first row follows the last."""
    clips = data.SkipBroken(OneReadable())
    assert clips[3, 11] == (3, 0)
    assert capsys.readouterr().err == "row 11: skipped; using the next video\n"
    assert clips[3, 2] == (3, 0)  # rows 2 to 11 fail, ten in all
    with pytest.raises(OSError, match="row 11"):  # rows 1 to 11 fail
        clips[3, 1]


def failing_loader(message):
    yield "a batch"
    raise RuntimeError(message)


@pytest.mark.parametrize("message", [
    "[Errno 28] No space left on device", "unable to write to file </torch_71_2>",
    "unable to allocate shared memory(shm) for file </torch_71_2>",
    "DataLoader worker (pid 7) is killed by signal: Bus error."])
def test_an_error_of_shared_memory_says_what_helps(message):
    """Docker's default is 64 MB; PyTorch speaks of a full disk."""
    with pytest.raises(OSError, match="--shm-size .* fewer --workers"):
        list(data.load(failing_loader(message)))


def test_other_errors_of_a_loader_are_not_changed():
    with pytest.raises(RuntimeError, match="something else"):
        list(data.load(failing_loader("something else")))


# ---- check -----------------------------------------------------------------------------------

def test_check_describes_a_sound_folder(sound_folder, capsys):
    assert call("data", "check", ".") == 0
    out = capsys.readouterr().out
    assert "train.txt: 4 lines, 3 videos" in out
    assert "1.33 labels each" in out
    assert "test.txt: 1 videos, 0.00 labels each, 1 without a label" in out
    assert out.endswith("\n0 problems\n")


def test_check_names_every_problem(sound_folder, capsys):
    write("frames/p/notes.txt", "one file too many\n")
    shutil.rmtree("frames/q")
    write("test.txt", "t 3 2\ns 3 1\nu 900000000000000 0\n")
    os.unlink("val.txt")
    assert call("data", "check", ".") == 2
    assert capsys.readouterr().out.splitlines()[-6:] == [
        "train.txt:1: p: 1 files that are not among its 3 frames",
        "train.txt:3: q/r: 0 of 3 frames",
        "test.txt:2: s is also in train.txt",
        "test.txt:3: u: 3 of 900000000000000 frames",
        "val.txt is missing: training needs it",  # not counted: a folder may be for evaluation
        "4 problems"]


@pytest.mark.parametrize("number", [1, 2, 3])
def test_check_opens_the_first_the_middle_and_the_last_frame(sound_folder, number):
    not_an_image(Path(f"frames/s/img_0000{number}.jpg"))
    assert call("data", "check", ".") == 2


# ---- the toy videos --------------------------------------------------------------------------

def toy_labels(rows):
    """Labels of the default toy by row. One frame suffices: no draw depends on their number."""
    return [data.draw_video(row, default_rng([0, row]), frames=1)[1] for row in rows]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """16 toy videos for training; for validation 2 and their reversals. Tests share them, and none
    changes them."""
    out = tmp_path_factory.mktemp("toy") / "toy"
    data.draw_toy(out, videos=16, seed=3)
    return out


def test_the_toy_is_a_data_folder(toy):
    assert call("data", "check", toy) == 0  # every listed frame is there, and nothing else
    first_frames = {file.read_bytes() for file in toy.rglob("img_00001.jpg")}
    assert len(first_frames) == 16 + 4  # no video is there twice
    assert Image.open(toy / "frames/train/00000/img_00024.jpg").format == "JPEG"


def test_a_label_says_where_the_shape_moves():
    """Even rows have one shape. Along each axis that its label names it moves 1.2 to 1.6 pixels a
    frame, about 4 in three frames, and returns at the opposite edge, so np.roll by 4 pixels lays it
    on itself. Played backwards, the video has the reversed label."""
    for row in range(0, 80, 2):
        video, labels = data.draw_video(row, default_rng([0, row]))
        background = np.median(video, axis=0)  # a shape covers a pixel in few frames
        shape = (video != background).any(axis=-1)  # (24, 36, 40)
        backwards = data.reversed_label(labels[0])
        for label, frames in ((labels[0], shape), (backwards, shape[::-1])):
            name = data.TOY_CATEGORIES[label]
            right = name.count("right") - name.count("left")
            down = name.count("down") - name.count("up")
            rolled = np.roll(frames[:-3], (4 * down, 4 * right), axis=(1, 2))
            # in another direction at least 4 pixels off, and a shape is about 10 wide
            assert (rolled & frames[3:]).sum() > 0.8 * frames[3:].sum()


def test_checkers_change_downwards_and_stripes_do_not():
    """Four pixels further down, checkers are 40 brighter or darker."""
    for row in range(0, 40, 5):
        video, labels = data.draw_video(row, default_rng([0, row]))
        background = np.median(video, axis=0)
        change = abs(background[4:] - background[:-4]).mean()
        assert (change > 30) == (data.TOY_CATEGORIES[labels[-1]] == "checkered+ground")


def test_the_lists_of_the_toy_have_the_labels_of_its_videos(toy):
    videos = data.VideoList(toy, "train")
    for row in range(16):
        _, labels = data.draw_video(row, default_rng([3, row]))
        assert videos.labels(row).tolist() == labels


def test_odd_rows_have_two_motions_and_each_fifth_a_background():
    """Two motions are on different axes: never left and right."""
    seen = set()
    for row, labels in enumerate(toy_labels(range(200))):
        axes = {label // 2 for label in labels}  # 4: a background
        has_background = row % 5 == 0
        assert (4 in axes) == has_background
        assert len(axes) == len(labels) == 1 + row % 2 + has_background
        seen.update(labels)
    assert seen == set(range(10))


def test_each_validation_video_has_its_reversal(toy):
    """A model that is blind to the order of frames cannot tell them apart."""
    videos = data.VideoList(toy, "val")
    backwards = [data.reversed_label(label) for label in videos.labels(0)]
    assert videos.labels(1).tolist() == backwards
    frames = list(contents(videos.folder(0)).values())
    assert list(contents(videos.folder(1)).values()) == frames[::-1]


def test_a_model_blind_to_order_scores_at_most_77_83():
    """On the default toy. Such a model gives a video and its reversal the same scores. So for each
    pair all rankings of their labels are tried, ties included, and the best mean of the two average
    precisions is taken."""
    best = []
    for labels in toy_labels(range(1200, 1350)):  # the rows of validation
        backward = [data.reversed_label(label) for label in labels]
        union = sorted({*labels, *backward})
        scores = np.array(list(product(range(len(union)), repeat=len(union))))
        precisions = []
        for video in (labels, backward):
            truth = np.tile(np.isin(union, video), (len(scores), 1))
            precisions.append(evaluate.average_precision(scores, truth))
        best.append(np.mean(precisions, axis=0).max())
    assert round(100 * np.mean(best), 2) == 77.83


def test_a_smaller_toy_is_the_beginning_of_a_larger_one(toy):
    """Of the same seed. The default seed, 0, draws other videos."""
    assert call("data", "toy", "smaller", "--videos", 8, "--seed", 3) == 0
    smaller = contents("smaller/frames/train").items()
    assert len(smaller) == 8 * 24
    assert smaller <= contents(toy / "frames/train").items()
    data.draw_toy("other", videos=8)
    assert smaller.isdisjoint(contents("other/frames/train").items())
    videos = data.VideoList("other", "train")
    assert [videos.labels(row).tolist() for row in range(8)] == toy_labels(range(8))


def test_a_toy_that_is_stopped_leaves_nothing():
    with mock.patch.object(data, "write_lines", side_effect=KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt):
            data.draw_toy("toy", videos=8)
    assert os.listdir() == []


# ---- extraction: what FFmpeg makes of videos -------------------------------------------------

def ffmpeg(*arguments):
    subprocess.run(["ffmpeg", "-nostdin", "-v", "error", "-y", *map(str, arguments)], check=True)


def film(file, *options, frames=2, size="64x48", rate=30, source="testsrc="):
    """A video file of a test picture."""
    ffmpeg("-f", "lavfi", "-i", f"{source}size={size}:rate={rate}", "-frames:v", frames,
           "-c:v", "mpeg2video", *options, file)
    return Path(file)


def decode(file):
    """A video file -> its frames, uint8 (T, H, W, 3), and FFmpeg's complaint."""
    folder = Path(f"{file}.frames")
    folder.mkdir()
    count, complaint = data.decode_video(file, folder)
    return data.read_frames(folder, range(count)), complaint


@needs_ffmpeg
def test_videos_become_frames_and_a_list(capsys):
    """Those that fail are in a list of their own."""
    write("the videos/text.mp4", "not a video\n" * 100)
    write("the videos/deep/er/notes.txt", "not named as a video either\n")
    film("the videos/deep/er/one.MOV", frames=9)
    assert call("data", "extract", "--videos", "the videos", "--out", "new/the data",
                "--split", "test", "--pack") == 0
    printed = capsys.readouterr()
    assert "the videos: 1 files skipped, whose ending is not one of mp4 " in printed.err
    assert "\nvideos 2/2, " in printed.err  # the progress
    assert "why: new/the data/test_failed.txt" in printed.out

    out = Path("new/the data")
    assert (out / "test.txt").read_text() == "deep/er/one 9 -1\n"
    assert (out / "test_failed.txt").read_text().startswith("text\tffmpeg: ")
    assert list(contents(out / "frames")) == ["deep/er/one.zip"]  # no part of a failed video


@needs_ffmpeg
def test_a_phones_upright_video_becomes_320_pixels_wide():
    """A tag says how to turn it. FFmpeg 6 and later write this tag by one option, older versions by
    another."""
    plain = film("plain.mp4")
    try:
        ffmpeg("-display_rotation", 90, "-i", plain, "-c", "copy", "turned.mp4")
    except subprocess.CalledProcessError:
        ffmpeg("-i", plain, "-c", "copy", "-metadata:s:v:0", "rotate=90", "turned.mp4")
    assert decode("turned.mp4")[0].shape == (2, 426, 320, 3)


@needs_ffmpeg
def test_frames_are_30_a_second_from_the_first_picture_on():
    """A film of 0.8 seconds has 24, give or take 2: FFmpeg's versions differ. Here the sound begins
    2 seconds earlier, as in a trimmed video. The gap is not filled with copies."""
    ffmpeg("-f", "lavfi", "-i", "sine=duration=3", "-itsoffset", 2,
           "-i", film("a.mp4", frames=20, rate=25), "-c:v", "copy", "-c:a", "aac", "late.mp4")
    assert 22 <= len(decode("late.mp4")[0]) <= 26


@needs_ffmpeg
def test_what_is_left_of_a_damaged_video_is_kept():
    """The second half of the file is missing, but not its index, which comes first."""
    whole = film("whole.mp4", "-movflags", "+faststart", frames=30)
    cut = Path(shutil.copy(whole, "cut.mp4"))
    truncated(cut)
    frames, complaint = decode(cut)
    last = len(frames) - 1  # the file ends within this frame
    assert last >= 10  # not 15: this half also holds the index and the large first frame
    assert torch.equal(frames[:last], decode(whole)[0][:last])
    assert complaint.startswith("ffmpeg: ")
    assert " @ 0x" not in complaint  # an address, of no use to anybody


@needs_ffmpeg
def test_a_video_may_change_its_size_and_pixel_format():
    first = film("a.ts", frames=30)
    second = film("b.ts", "-pix_fmt", "yuv422p", frames=30, size="128x64")
    frames, _ = decode(write("joined.ts", first.read_bytes() + second.read_bytes()))
    assert frames.shape == (60, 320, 426, 3)  # the first size, 64x48, enlarged


@needs_ffmpeg
@pytest.mark.parametrize("matrix", ["bt709", "smpte170m"])  # of HD, of older videos
def test_colours_of_hd_and_older_videos_are_kept(matrix):
    file = film("red.mkv", "-vf", f"scale=out_color_matrix={matrix}", "-pix_fmt", "yuv420p",
                "-q:v", 1, "-colorspace", matrix, source="color=c=0xC83C28:")
    colour = decode(file)[0].float().mean((0, 1, 2))
    assert abs(colour - torch.tensor([0xC8, 0x3C, 0x28])).max() <= 4  # grey levels of 255


# ---- extraction: when FFmpeg or the extraction ends early ------------------------------------

ABC = "a 2 -1\nb 2 -1\nc 2 -1\n"  # the list of all three videos


@pytest.fixture
def fake_ffmpeg(tmp_path, monkeypatch):
    """fake_ffmpeg.py, which does what a video's text says, takes the place of ffmpeg. The folder
    videos holds a, b and c, of two frames each."""
    program = (ROOT / "tests" / "fake_ffmpeg.py").read_text()
    write("bin/ffmpeg", f"#!{sys.executable}\n{program}").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin", prepend=os.pathsep)
    for name in "abc":
        write(f"videos/{name}.mp4", "")


def extract(listing=None, **options):
    """Extract the videos into the folder data, one after another -> the text of train.txt, and of
    the list of failures. listing: the text of a list that names the videos; None: all."""
    if listing:
        options["list_path"] = write("data/list.txt", listing)
    data.extract("videos", "data", workers=1, **options)
    return Path("data/train.txt").read_text(), Path("data/train_failed.txt").read_text()


def put_old_frames(path):
    """Write three frames, as of an earlier extraction (a new one writes two) -> their folder."""
    return write_frames(f"data/frames/{path}", noise(0, 3, 4, 4, 3))


def test_frames_of_a_damaged_video_are_kept_with_a_warning(fake_ffmpeg, capsys):
    """FFmpeg ends with an error after the first of two frames."""
    write("videos/b.mp4", "fail")
    assert extract() == ("a 2 -1\nb 1 -1\nc 2 -1\n", "")
    assert "b.mp4: 1 frames kept; ffmpeg: status 1\n" in capsys.readouterr().err


def test_a_killed_extraction_goes_on(fake_ffmpeg, capsys):
    """It is killed while the second of three videos is half decoded. The first one is kept."""
    write("videos/b.mp4", "kill the parent")
    process = get_context("fork").Process(target=extract)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert not Path("data/frames/b").exists()
    write("videos/b.mp4", "")
    assert extract() == (ABC, "")
    assert "1 of 3 videos were extracted earlier" in capsys.readouterr().err


# ---- extraction: a second run, or several at once --------------------------------------------

def test_a_second_run_keeps_what_is_whole(fake_ffmpeg):
    # a: a zip, whose video is gone
    data.pack_folder(put_old_frames("a"))
    os.unlink("videos/a.mp4")

    # b: a folder, whose video is a link to nowhere; it counts, not the broken zip beside it
    write(put_old_frames("b") / "notes.txt", "not a frame, and not counted\n")
    write("data/frames/b.zip", "")
    os.unlink("videos/b.mp4")
    os.symlink("gone", "videos/b.mp4")

    # not whole: c, a broken zip, and d, a folder without its first frame
    write("data/frames/c.zip", "")
    write("data/frames/d/img_00002.jpg", "")
    write("videos/d.mp4", "")

    assert extract("a.mp4,0\nb.mp4,0\nc.mp4,0\nd.mp4,0\n") == (
        "a 3 0\nb 3 0\nc 2 0\nd 2 0\n", "")


@pytest.mark.parametrize("now_packed", [False, True])
@pytest.mark.parametrize("once_packed", [False, True])
def test_frames_older_than_their_video_are_decoded_again(fake_ffmpeg, once_packed, now_packed):
    frames = put_old_frames("a")
    if once_packed:
        data.pack_folder(frames)
    old = contents("data")
    for file in old:
        make_old(f"data/{file}")

    # the old ones stay until the new ones are whole
    write("videos/a.mp4", "get killed")
    extract(pack=now_packed)
    assert old.items() <= contents("data").items()

    write("videos/a.mp4", "")
    assert extract(pack=now_packed) == (ABC, "")
    assert frames.exists() != now_packed
    assert Path("data/frames/a.zip").exists() == now_packed
    assert data.count_frames(frames) == 2  # the old ones were three


def test_the_same_command_again_decodes_nothing(fake_ffmpeg, capsys):
    listing = "a.mp4,x\nb.mp4,y\n"
    extract(listing, val=0.5)
    before = contents("data")
    write("bin/ffmpeg", "#!/bin/false\n")  # would fail
    extract(listing, val=0.5)
    assert contents("data") == before
    stderr = capsys.readouterr().err
    assert "2 of 2 videos were extracted earlier" in stderr
    assert "replaced" not in stderr


def test_zips_of_equal_frames_are_equal():
    """The files' dates do not matter."""
    old = put_old_frames("old")
    make_old(old / "img_00003.jpg")
    new = put_old_frames("new")
    assert data.pack_folder(old).read_bytes() == data.pack_folder(new).read_bytes()


def test_frames_of_a_quicker_extraction_are_taken(fake_ffmpeg, monkeypatch):
    """The move to the final place fails, because the other one was first."""
    def put_frames(folder, final, pack):
        put_old_frames(final.name)
        raise OSError("Directory not empty")

    monkeypatch.setattr(data, "put_frames", put_frames)
    assert extract("a.mp4,0\n") == ("a 3 0\n", "")


def test_only_old_leftovers_are_removed(fake_ffmpeg):
    """Leftovers older than an hour. Others may belong to a run that is at work, and do not disturb
    this one."""
    # In containers the number of the process is always the same, so names hold random bytes too.
    young = f"data/frames/.part-train-{os.getpid()}"
    busy = "data/frames/.part-train-1"  # old, but the folder x in it is young
    old = ["data/frames/.part-train-2", "toy.part-2"]
    for folder in [f"{busy}/x", young, *old]:
        write(f"{folder}/img_00001.jpg", "")
    old_list = write("data/a.txt.part-2", "")
    for path in [busy, *old, old_list]:
        make_old(path)
    extract()
    data.draw_toy("toy", videos=8)
    paths = [young, busy, *old, old_list]
    assert [path for path in paths if os.path.exists(path)] == [young, busy]


# ---- extraction: files -----------------------------------------------------------------------

def test_videos_are_found_by_their_endings_and_behind_links():
    for name in ("a.ts", "b.M2TS", "c.gif", "d.webm", "e.txt", "f.avi.mp4", "z/g.mp4"):
        write(name, "")
    os.symlink("z", "y")
    os.symlink("..", "z/back")  # a circle
    assert list(data.find_videos(".")) == ["a", "b", "c", "d", "f", "y/g", "z/g"]


def test_a_folder_that_cannot_be_read_is_an_error():
    with mock.patch.object(os, "scandir", side_effect=PermissionError):
        with pytest.raises(PermissionError):
            data.find_videos(".")


def test_a_name_that_no_line_can_hold_fails(fake_ffmpeg):
    for name in (" space", "two\nlines", "two\u2028lines", "run\\d", "\udcff"):  # not UTF-8
        write(f"videos/{name}.mp4", "")
    lines, failures = extract()
    assert lines == ABC
    reason = "\tno list line can hold this path: rename the file\n"
    assert failures.count(reason) == failures.count("\n") == 5


def test_a_zip_may_lie_beside_a_folder_of_its_name(fake_ffmpeg):
    write("videos/a/part.mp4", "")
    lines = "a 2 -1\na/part 2 -1\nb 2 -1\nc 2 -1\n"
    assert extract(pack=True) == (lines, "")
    assert extract() == (lines, "")  # the zips are there
    make_old("data/frames/a.zip")  # so a is decoded again
    assert extract(pack=True) == (lines, "")
    assert sorted(contents("data/frames")) == ["a.zip", "a/part.zip", "b.zip", "c.zip"]

    # a folder of frames would take the place of a/part.zip
    make_old("data/frames/a.zip")
    _, failures = extract("a.mp4,0\n")
    assert failures.startswith("a\tdata/frames/a holds other videos too: rename the file")


# ---- extraction: videos, list -> lines, failures ---------------------------------------------

# é in Unicode's two forms: as one character, and as e and an accent, as macOS writes file names
NFC, NFD = "\u00e9", "e\u0301"


# Each row: one file that is written first (a video's text tells fake_ffmpeg.py what to do), the
# list that names the videos, and what the two lists of the result hold. "videos/d.mp4", "" is an
# ordinary video; where the list does not name it, it plays no part.
@pytest.mark.parametrize("file, text, listing, lines, failures", [
    # FFmpeg is stopped, or writes no frame.
    ("videos/b.mp4", "end as if interrupted", None, "a 2 -1\nc 2 -1\n",
     "b\tffmpeg was stopped (status 255); run the command again\n"),
    ("videos/b.mp4", "get killed", None, "a 2 -1\nc 2 -1\n",
     "b\tffmpeg was stopped (status -9); run the command again\n"),
    ("videos/b.mp4", "write nothing", None, "a 2 -1\nc 2 -1\n", "b\tffmpeg: no frame\n"),
    # FFmpeg runs in a session of its own. Otherwise Ctrl-C would end it with half of the frames.
    ("videos/b.mp4", "fail without a session of its own", None, ABC, ""),
    # another extraction of the same videos
    ("videos/b.mp4", "copy the frame to its place", None, ABC, ""),

    # names: a list of Windows; a backslash in a file's name; a folder of a video's name
    ("videos/run/d.mp4", "", "run\\d.mp4,0\n.\\b.mp4,0\n", "run/d 2 0\nb 2 0\n", ""),
    ("videos/run\\d.mp4", "", "run\\d.mp4,0\nb.mp4,0\n", "b 2 0\n",
     "run/d\tno list line can hold the name of this file: rename it\n"),
    ("videos/a/d.mp4", "", None, "a/d 2 -1\nb 2 -1\nc 2 -1\n",
     "a\ta folder of this name holds videos too: rename the file or the folder\n"),
    # both Unicode forms name the same video, and the same class
    (f"videos/{NFD}.mp4", "", f"{NFD}.mp4,0\na.mp4,0\n{NFC}.mp4,1\n", f"{NFD} 2 0,1\na 2 0\n", ""),
    ("videos/d.mp4", "", f"a.mp4,{NFC}\na.mp4,{NFD},x\nb.mp4,{NFD}\n", "a 2 1,0\nb 2 1\n", ""),

    # Class names are numbered as in categories.txt. There run|jump, which would look like two
    # labels, is a class.
    ("data/categories.txt", "run\nwalk\nrun|jump\ncook\n",
     "a.mp4,walk\nb.mp4,cook,run\nc.mp4,-1\na.mp4,run\nc.mp4,run|jump\n",
     "a 2 1,0\nb 2 3,0\nc 2 2\n", ""),
    # brackets and other signs; sorted, [run] is first
    ("videos/d.mp4", "", "a.mp4,run+jump,[run],eat/feed (one's cat)\n", "a 2 2,0,1\n", ""),

    # Another list names a too. It may be another video of the same name, which would then get the
    # frames of the first one, so it fails.
    ("data/val.txt", "a 2 0\n", "a 2 0\nb 2 0\n", "b 2 0\n",
     "a\tdata/val.txt names this path too: if it is another video, extract from a folder whose "
     "sub-folder has another name; if one video belongs in both lists, copy its line\n"),
    # Not such lists: a list of failures, a text, and data/list.txt, the list that is read.
    ("data/old_failed.txt", "a 2 0\n", "a 2 0\n", "a 2 0\n", ""),
    ("data/notes.txt", "a text\n", "a 2 0\n", "a 2 0\n", ""),
    # without labels, a list needs no names
    ("data/val.txt", "c 2 -1\n", "a.mp4,run\n", "a 2 0\n", ""),
])
def test_an_extraction_lists_videos_and_failures(fake_ffmpeg, file, text, listing, lines, failures):
    write(file, text)
    assert extract(listing) == (lines, failures)


@pytest.mark.parametrize("file, text, listing, reason", [
    ("data/categories.txt", "run\nwalk\n", "b.mp4,run\nc.mp4,1\n",
     "data/list.txt:2: the id 1, but other lines hold class names"),
    ("data/categories.txt", "run\nwalk\n", "b.mp4,jump\n",
     "'jump' is not in data/categories.txt; if it is a new class, append"),
    ("data/categories.txt", "run\nwalk\n", "b.mp4,2\n",
     "data/list.txt:1: label 2, but the last class of categories.txt is 1"),
    ("data/val.txt", "a 2 0\n", "b.mp4,jump\n",
     "data/categories.txt: missing, but the ids in data/val.txt belong to it"),
    # while this command decodes, another one writes
    ("videos/a.mp4", "write categories.txt", "a.mp4,jump\n",
     "data/categories.txt: another command has written it"),
    ("videos/a.mp4", "write val.txt", "a.mp4,0\nc.mp4,0\n",
     "data/val.txt: another command has written it meanwhile, and it names c too"),
    # Otherwise the extraction would list every later video as broken. FFmpeg's status may be 0.
    ("videos/b.mp4", "report a full disk", "a.mp4,0\nb.mp4,0\n",
     "no space left on the disk; free some"),
])
def test_an_extraction_is_refused(fake_ffmpeg, file, text, listing, reason):
    write(file, text)
    with pytest.raises((ValueError, OSError), match=reason):
        extract(listing)
    assert not os.path.exists("data/train.txt")


@pytest.mark.parametrize("field", [
    "run|jump", "run;jump", "run\tjump", '"run, jump"', "['run']",
    '"[""run""]"'])  # ["run"], as a csv writes it
def test_joined_labels_are_not_a_class(fake_ffmpeg, field):
    with pytest.raises(ValueError, match="list.txt:2: .* looks like several labels"):
        extract(f"a.mp4,run\nb.mp4,{field}\n")


@pytest.mark.parametrize("names", [
    "phase 1", "shot 0,take 1", "a 0,b 1", "0 a,1 b", "a:0,b:1", "class id,x"])
def test_extracted_categories_read_back_as_written(fake_ffmpeg, names):
    extract(f"a.mp4,{names}\n")
    assert data.read_categories("data") == names.split(",")


def test_an_extraction_needs_ffmpeg(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match="the program ffmpeg is missing; Debian: apt install"):
        data.extract("videos", "data")


# ---- extraction: --val, and what the user is told --------------------------------------------

@pytest.mark.parametrize("fraction, chosen", [(0.4, "bc"), (0.01, "c"), (0.99, "abcd")])
def test_a_hash_of_the_path_decides_which_videos_validate(fraction, chosen):
    """By crc32 the order is c b d a e. Both lists keep the order of the videos. At least one video
    validates, and one trains."""
    videos = [data.Video(path, 9, [], 1) for path in "abcde"]
    train, val = data.split_videos(videos, fraction)
    assert [video.path for video in val] == list(chosen)
    assert train == [video for video in videos if video not in val]


def test_one_video_cannot_be_split(fake_ffmpeg):
    with pytest.raises(ValueError, match="--val 0.2: 1 .* cannot be split"):
        extract("a.mp4,0\n", val=0.2)


def test_val_says_which_classes_one_side_lacks(fake_ffmpeg, capsys):
    """The ids of class names are in alphabetical order."""
    lines, _ = extract("a.mp4,run,swim\nb.mp4,run,jump\n", val=0.5)
    assert lines == "a 2 1,2\n"
    assert Path("data/val.txt").read_text() == "b 2 1,0\n"  # crc32: b 0x71BEEFF9, a 0xE8B7BE43
    assert capsys.readouterr().out.splitlines() == [
        "3 classes, 2.00 labels a video; most videos: run (2), fewest: jump (1)",
        "train.txt has no video of these classes: jump",
        "val.txt has no video of these classes: swim"]
    assert extract("c.mp4,run\n") == ("c 2 1\n", "")  # a second command, while val.txt is there


def test_a_list_of_another_project_becomes_ours(fake_ffmpeg, capsys):
    """The last line holds a second label of a."""
    assert extract("b.mp4 7 264\nabsent.mp4 3\n./a.mp4 2\nc.mp4 -1\na.mp4 8\n",
                   format="mmaction2-videos") == (
        "b 2 7,264\na 2 2,8\nc 2 -1\n", "absent\tno such video\n")
    assert "5 lines, 4 videos" in capsys.readouterr().err


def test_the_user_is_told_that_a_list_was_replaced(fake_ffmpeg, capsys):
    extract("a.mp4,0\nb.mp4,0\n")
    extract("a.mp4,0\n")
    assert ("data/train.txt: replaced; it had 2 lines, the paths of 1 are no longer listed, and it "
            "has 1 now\n") in capsys.readouterr().err
    extract("a.mp4,1\n")  # another label
    assert "it had 1 lines, the paths of 0 are" in capsys.readouterr().err


def test_a_list_stays_if_nothing_was_extracted(fake_ffmpeg):
    extract("a.mp4,0\n")
    assert extract("typo.mp4,0\n") == ("a 2 0\n", "typo\tno such video\n")
    assert call("data", "extract", "--videos", "videos", "--list", "data/list.txt",
                "--out", "data", "--split", "train") == 2


def test_the_user_sees_the_classes_counted(fake_ffmpeg, capsys):
    """A column that holds no label, here the number of frames, shows as a class of every video."""
    extract("a.mp4,90,3\nb.mp4,90,5\n")
    assert ("3 classes, 2.00 labels a video; most videos: 90 (2), fewest: 3 (1)"
            in capsys.readouterr().out)


# ---- what the scripts share ------------------------------------------------------------------

def test_replacing_leaves_nothing_half_written():
    write("file", "old")
    with pytest.raises(KeyboardInterrupt), data.replacing("file") as part:
        part.write_text("half of the n")
        raise KeyboardInterrupt
    assert contents(".") == {"file": b"old"}


def test_a_folder_made_meanwhile_is_not_replaced():
    with pytest.raises(OSError, match="toy: another process has made it meanwhile"):
        with data.replacing("toy") as part:
            write(part / "file", "ours")
            write("toy/file", "theirs")
    assert contents(".") == {"toy/file": b"theirs"}


def test_what_the_console_lacks_becomes_a_question_mark(sound_folder, capsys):
    write("categories.txt", "a\ncrêpes\nc\n")
    sys.stdout.reconfigure(encoding="ascii")
    assert call("data", "check", ".") == 0
    assert "most videos: cr?pes (3)" in capsys.readouterr().out


def test_a_lost_connection_is_reported_in_one_line(monkeypatch, capsys):
    error = RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer")
    monkeypatch.setattr(data, "main", mock.Mock(side_effect=error))
    assert call("data") == 2
    assert capsys.readouterr().err == (
        "data.py: another process has ended; its own line says why\n")


def test_an_error_in_our_code_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(data, "main", mock.Mock(side_effect=RuntimeError("a mistake")))
    with pytest.raises(RuntimeError, match="a mistake"):
        data.run_script(data.main)
