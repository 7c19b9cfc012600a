"""data.py: what a list line means, which frames and pixels of a video a network sees, what the toy
videos show, and how videos become frames.

    python -m pytest tests/test_data.py

The first parts begin with examples that can be checked by hand. Where there is an independent
answer (Pillow's, torchvision's, a naive formula's, or the set of all possible outcomes), it
follows. Where a test draws at random, it draws often enough to see every outcome. "The authors'
code" is X-Temporal, as in data.py. Commands that are misused are in test_bad_input.py.
"""
import io
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tracemalloc
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from numpy.random import default_rng
from PIL import Image
from torch.testing import assert_close
from torchvision.transforms import functional as vision

import data
import evaluate
from conftest import ROOT, call, data_folder, needs_ffmpeg, noise, write, write_frames

# Clips of 8 segments, crops of 32 pixels. "multiscale" is a way to crop in training here, and has
# nothing to do with the protocol of this name.
RECIPE = {**data.RECIPE, **data.TOY, "frames": 8, "augment": "multiscale", "flip": True}


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

def read(text, format="auto", num_classes=None):
    """What a list file with this text says: "path frames labels" for each video. The frames are
    "None" if the list gives no number."""
    videos = data.read_list(write("list.txt", text), format, num_classes)
    return [data.list_line(video) for video in videos]


def test_a_line_holds_path_frames_and_labels():
    text = "cooking/a 90 7,2\nmy video 1 45 0\nb 8 -1\n"  # -1: unlabelled
    assert data.read_list(write("list.txt", text)) == [  # path, frames, labels, number of the line
        ("cooking/a", 90, [7, 2], 1), ("my video 1", 45, [0], 2), ("b", 8, [], 3)]
    assert read(text) == text.splitlines()


def test_labels_of_a_repeated_path_are_united():
    assert read("a 9 0\nb 8 1\na 9 2\na 9 0\n") == ["a 9 0,2", "b 8 1"]


def test_extra_white_space_is_ignored():
    """And so are the byte-order mark and the line ends of Windows."""
    assert read("\ufeffa  9   1, 2\r\n\n \n b\t8\t3 ") == ["a 9 1,2", "b 8 3"]


@pytest.mark.parametrize("text, reason", [
    ("a 9 1\n\nb 9 -2\n", "expected path num_frames id[,id...] (-1: unlabelled)"),
    ("a 9 1\n\nb 9999999999999999 1\n", "expected path num_frames id"),  # at most 15 digits
    ("a 9 1\n\na 8 1\n", "a has 8 frames here and 9 in line 1"),
    ("a 9 1\n\nb 9 3,10\n", "label 10, but the last class of categories.txt is 9"),
    ("a.mp4,1\n\nC:\\b.mp4,3\n", "must be a relative path inside the folder"),
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
        read(text, num_classes=10)


# ---- lists of other projects and spreadsheets ------------------------------------------------

# the same three videos in every list
WITH_FRAMES = ["adult+female/a-3_1 91 266,33", "boating/b-6-2_9 93 37", "c 45 0,69,83"]
WITHOUT_FRAMES = ["adult+female/a-3_1 None 266,33", "boating/b-6-2_9 None 37", "c None 0,69,83"]


@pytest.mark.parametrize("format, text, expected", [
    ("auto",  # M-MiT
     "adult+female/a-3_1.mp4,266,33\nboating/b-6-2_9.mp4,37\nc.mp4,0,69,83\n", WITHOUT_FRAMES),
    ("auto",  # X-Temporal, of video files
     "adult+female/a-3_1.mp4 91 266,33\nboating/b-6-2_9.mp4 93 37\nc.mp4 45 0,69,83\n",
     WITH_FRAMES),
    ("mmaction2-frames",  # its tool lists a video again, with 0 frames of optical flow: ignored
     "adult+female/a-3_1 91 266 33\nadult+female/a-3_1 0 266 33\nboating/b-6-2_9 93 37\n"
     "c 45 0 69 83\n", WITH_FRAMES),
    ("mmaction2-videos",
     "adult+female/a-3_1.mp4 266 33\nboating/b-6-2_9.mp4 37\nc.mp4 0 69 83\n", WITHOUT_FRAMES),
])
def test_lists_of_other_projects_are_read(format, text, expected):
    assert read(text, format) == expected


@pytest.mark.parametrize("line, expected", [
    ("a.MP4, 0,,", "a None 0"),
    ('a.mp4, "0,2"', "a None 0,2"),
    ('"a, b.mp4",3', "a, b None 3"),
    ("a.mp4,run,eating/feeding", "a None run,eating/feeding"),
    ("a.v2,3", "a.v2 None 3"),  # not an ending of a video file, so it stays
])
def test_a_csv_is_read_as_spreadsheets_write_it(line, expected):
    assert read(line) == [expected]


def test_a_line_of_two_meanings_needs_a_format():
    line = "a.mp4 92 69\n"  # 92: its frames, or a label?
    assert read(line, "ours") == ["a 92 69"]
    assert read(line, "mmaction2-videos") == ["a None 92,69"]
    with pytest.raises(ValueError, match="several ways.*--format"):
        read("b.mp4 5\n" + line)  # "b.mp4 5" is not ours: no decision
    assert read("b 9 1,2\n" + line) == ["b 9 1,2", "a 92 69"]  # mmaction2 has no commas

    with pytest.raises(ValueError, match="several ways.*--format"):
        read("x 90 7 264\n")  # a video "x 90" of 7 frames, or "x" of 90 frames?


# ---- class names -----------------------------------------------------------------------------

@pytest.mark.parametrize("text, names", [
    ("c+d\na/b\n", ["c+d", "a/b"]),
    ("c+d,1\na/b,0\n", ["a/b", "c+d"]),  # M-MiT: name,id
    ("\ufeff b \r\na\r\n\r\n", ["b", "a"]),
    ("id,name\n1,b\n0,a\n", ["a", "b"]),
    ("class_id;class_name\n0;a\n1;b\n", ["a", "b"]),
    ('"id","name"\n"0","a"\n"1","b"\n', ["a", "b"]),
    ("0: a\n1: b\n", ["a", "b"]),
    ("a|0\nb|1\n", ["a", "b"]),
    ("0 phase 1\n1 phase 2\n", ["phase 1", "phase 2"]),
    # the numbers belong to the names
    ("phase 1\nphase 2\n", ["phase 1", "phase 2"]),
    ("0\n1\n", ["0", "1"]),
    ("phase 0\nphase 1\nother\n", ["phase 0", "phase 1", "other"]),
])
def test_categories_are_names_by_id(text, names):
    write("categories.txt", text)
    assert data.read_categories(".") == names


@pytest.mark.parametrize("text, reason", [
    ("1 a\n2 b\n", "the ids begin at 1; subtract 1, here and in the lists: 0 to 1; if the numbers "
                   "belong to the names, write name,id"),  # Kinetics
    ("id,name\n0,a\n5,b\n", "the ids must be 0 to 1, each once, but they are 0 to 5; if the "
                            "numbers belong to the names, write name,id"),
    ("a,0\nb,1\nc\n", "'c' has no id, but other lines have one; write name,id in every line"),
    ("name\na\nb\n", "'name' looks like a line of column titles; remove it"),
])
def test_unclear_categories_are_refused(text, reason):
    write("categories.txt", text)
    with pytest.raises(ValueError, match=re.escape(f"categories.txt: {reason}")):
        data.read_categories(".")


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
    """Of 9 frames, the middle one lies half in the first part and half in the second."""
    recipe = {"sampling": "segments", "frames": 2, "stride": 7}  # the stride is ignored
    rng = default_rng(0)
    draws = np.array([data.sample_indices(9, recipe, rng) for _ in range(200)])
    assert set(draws[:, 0]) == {0, 1, 2, 3, 4}
    assert set(draws[:, 1]) == {4, 5, 6, 7, 8}  # the authors' code never draws the last one


def test_no_random_frame_lies_after_the_last():
    """With the largest number below 1, the place in the last part is rounded up to the end of the
    video, 90, which is not a frame."""
    rng = mock.Mock()
    rng.random.return_value = np.nextafter(1, 0)
    assert data.segment_indices(90, 5, rng)[-1] == 89


def test_a_clip_wraps_around_at_the_end():
    assert data.clip_indices(5, length=6, stride=2, start=1).tolist() == [1, 3, 0, 2, 4, 1]


def test_clips_start_evenly_over_the_video():
    """Clips of 32 frames, 2 apart."""
    assert data.clip_starts(90, 32, 2, views=4).tolist() == [0, 8, 17, 26]  # 26 = 90 - 2 * 32
    assert data.clip_starts(90, 32, 2, views=1).tolist() == [13]  # a single one in the middle
    assert data.clip_starts(9, 32, 2, views=2).tolist() == [0, 0]  # shorter than a clip


def test_a_training_clip_starts_anywhere():
    """The last start is 70 - 2 * 32 = 6, as the gap after the last frame counts. The authors' code
    never draws it."""
    recipe = {"sampling": "clip", "frames": 32, "stride": 2}
    rng = default_rng(0)
    drawn = {data.sample_indices(70, recipe, rng)[0] for _ in range(200)}
    assert drawn == {0, 1, 2, 3, 4, 5, 6}
    assert data.sample_indices(70, recipe).tolist() == list(range(3, 67, 2))  # the middle one
    assert data.sample_indices(50, recipe, rng)[0] == 0  # shorter than a clip


# ---- which pixels ----------------------------------------------------------------------------

def test_frames_are_read_as_rgb_and_decoded_once():
    colour = noise(0, 5, 6, 3)
    grey = noise(1, 5, 6)
    write_frames("video", [colour, grey])
    with mock.patch.object(Image, "open", wraps=Image.open) as opened:
        frames = data.read_frames("video", [1, 0, 1])
    grey_as_rgb = np.stack([grey, grey, grey], axis=-1)
    assert np.array_equal(frames, [grey_as_rgb, colour, grey_as_rgb])
    assert opened.call_count == 2


@pytest.mark.parametrize("width, height, sides", [  # 1, .875, .75 and .66 of the short side
    (254, 424, [254, 224, 190, 167]),  # 222 is within 2 of the crop, 224
    (424, 253, [253, 221, 189, 166]),  # 221 is not, and stays
    (424, 222, [222, 194, 166, 146]),  # 224 does not fit in
])
def test_a_multiscale_crop_is_a_square_or_nearly(width, height, sides):
    """Its width and height are the same or adjacent entries of the sides: 4 + 2 x 3 pairs."""
    rng = default_rng(0)
    boxes = [data.multiscale_box(width, height, 224, rng) for _ in range(1000)]
    pairs = {(w, h) for x, y, w, h in boxes}
    assert len(pairs) == 10
    for w, h in pairs:
        assert abs(sides.index(w) - sides.index(h)) <= 1


def test_a_multiscale_crop_lies_at_one_of_13_places():
    """A square of 240, .75 of the short side, leaves 184 x 80 pixels free."""
    rng = default_rng(0)
    boxes = [data.multiscale_box(424, 320, 224, rng) for _ in range(3000)]
    assert {(x, y) for x, y, w, h in boxes if w == h == 240} == {
        *product((0, 92, 184), (0, 40, 80)),  # corners, middles of the edges, centre
        *product((46, 138), (20, 60))}  # halfway from the centre to the corners


def test_a_jitter_crop_lies_anywhere():
    """The short side, 40, is resized to 20 ... 24, then a square of 16 is cut. In the original its
    side is 40 * 16 / 20 = 32 ... 40 * 16 / 24 = 27, rounded."""
    expected = set()
    for side in (32, 30, 29, 28, 27):
        expected |= {*product(range(40 - side + 1), range(48 - side + 1), [side], [side])}
    rng = default_rng(0)
    drawn = {data.jitter_box(40, 48, 16, (20, 24), rng) for _ in range(20_000)}
    assert drawn == expected


@pytest.mark.parametrize("augment, flip, draw_box", [
    ("multiscale", False, partial(data.multiscale_box, 48, 40, 16)),
    ("jitter", True, partial(data.jitter_box, 48, 40, 16, (20, 24))),
])
def test_all_frames_of_a_clip_are_cut_and_mirrored_alike(augment, flip, draw_box):
    """Half of the clips are mirrored: left and right change places."""
    frames = noise(0, 3, 40, 48, 3)
    folder = write_frames("video", frames)
    recipe = {**RECIPE, "augment": augment, "crop": 16, "jitter": (20, 24), "flip": flip}
    for seed in range(20):
        clip = data.make_clip(folder, [2, 0], recipe, default_rng(seed))

        rng = default_rng(seed)
        x, y, w, h = draw_box(rng)
        crop = torch.from_numpy(frames[[2, 0], y : y + h, x : x + w])
        expected = data.resize(crop, (16, 16))
        if flip and rng.random() < 0.5:
            expected = expected.flip(2)
        assert torch.equal(clip, expected)


@pytest.mark.parametrize("width, height, size, torchvisions", [
    (320, 426, 112, 112),  # a number is the short side
    (568, 321, 256, 256),
    (320, 426, (200, 100), (100, 200)),  # torchvision takes the height first
])
def test_resizing_is_torchvisions(width, height, size, torchvisions):
    """As it resizes a Pillow image, give or take one grey level."""
    frame = noise(0, height, width, 3)
    expected = vision.pil_to_tensor(vision.resize(Image.fromarray(frame), torchvisions))
    resized = data.resize(torch.from_numpy(frame)[None], size)[0].permute(2, 0, 1)
    assert_close(resized, expected, rtol=0, atol=1)


def test_draft_decodes_a_jpeg_at_half_its_size_if_that_suffices():
    """draft_side is the short side that is needed. A clip hardly changes."""
    os.mkdir("video")
    Image.radial_gradient("L").resize((96, 80)).save("video/img_00001.jpg")
    assert data.read_frames("video", [0], draft_side=40).shape == (1, 40, 48, 3)
    assert data.read_frames("video", [0], draft_side=41).shape == (1, 80, 96, 3)

    recipe = {**RECIPE, "augment": "jitter", "jitter": (36, 40)}
    clip = data.make_clip("video", [0], recipe, default_rng(0))
    draft = data.make_clip("video", [0], {**recipe, "draft": True}, default_rng(0))
    assert 0 < abs(draft - clip.float()).mean() < 2  # grey levels of 255


@pytest.mark.parametrize("channels_last", [False, True])
def test_normalising_is_torchvisions(channels_last):
    clips = torch.from_numpy(noise(0, 2, 3, 4, 5, 3))
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    expected = vision.normalize(clips.permute(0, 1, 4, 2, 3) / 255, mean, std)
    normalised = data.normalise(clips, mean, std, channels_last)
    assert_close(normalised, expected)
    assert normalised.is_contiguous() != channels_last


# ---- the list in memory ----------------------------------------------------------------------

def list_of(text):
    """The VideoList of a list with this text. Its frames are not there."""
    write("categories.txt", "a\nb\nc\n")
    write("train.txt", text)
    return data.VideoList(".", "train")


def test_a_list_has_one_row_per_video():
    videos = list_of("p 9 0,2\n\nr 8 -1\nq 7 2\n")
    assert videos.paths.tolist() == ["p", "r", "q"]
    assert videos.num_frames.tolist() == [9, 8, 7]
    assert videos.labels(0).tolist() == [0, 2]
    assert videos.label_matrix().tolist() == [[1, 0, 1], [0, 0, 0], [0, 0, 1]]
    assert videos.place(2) == "train.txt:4"  # the empty line counts
    assert list_of("p 9 -1\n").label_matrix() is None  # no video has a label


def test_lists_in_a_data_folder_are_always_read_as_ours():
    """Even if a line has two meanings."""
    videos = list_of("a.mp4 92 2\nx 90 7 1\n")
    assert videos.paths.tolist() == ["a", "x 90"]
    with pytest.raises(ValueError, match="train.txt:1: the file is read as ours"):
        list_of("a.mp4,2\n")


def test_the_hash_depends_on_the_lines_and_their_order():
    """The byte-order mark and the line ends of Windows do not change it."""
    known = list_of("p 9 0\nq 9 1").hash
    assert list_of("\ufeffp 9 0\r\nq 9 1\r\n").hash == known
    assert list_of("q 9 1\np 9 0\n").hash != known
    assert list_of("p 9 0\nq 9 2\n").hash != known


def test_a_long_list_holds_no_python_objects():
    """A worker process shares arrays, but would copy objects. The arrays take 16 bytes for a short
    path and 8 each for its number of frames, line, label, and where its labels begin."""
    pickled = pickle.dumps(list_of("".join(f"video/{row:05d} 90 1\n" for row in range(20_000))))
    tracemalloc.start()
    videos = pickle.loads(pickled)
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert videos.path(19_999) == "video/19999"
    assert size == pytest.approx(20_000 * (16 + 4 * 8), rel=0.1)


# ---- the training clips ----------------------------------------------------------------------

def train_clips():
    """Training clips by (epoch, row in the list)."""
    return data.TrainClips(data.VideoList(".", "train"), RECIPE, seed=4)


def test_zips_change_no_clip():
    data_folder(".", ["p 3 0"])
    clip, _ = train_clips()[0, 0]
    data.pack_folder(Path("frames/p"))
    assert os.listdir("frames") == ["p.zip"]
    from_zip, _ = train_clips()[0, 0]
    assert torch.equal(from_zip, clip)


def test_a_clip_is_drawn_from_seed_epoch_and_row():
    data_folder(".", ["p 3 1", "q 3 0,2"])
    clip, labels = train_clips()[5, 1]  # epoch 5, row 1
    rng = default_rng([4, 5, 1])
    indices = data.sample_indices(3, RECIPE, rng)
    assert torch.equal(clip, data.make_clip("frames/q", indices, RECIPE, rng))
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
    """A frame; in the place of a zip it is just not a zip."""
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
    file = folder / "img_00003.jpg"
    if place == "zip":
        file = data.pack_folder(folder)
    damage(file)
    if place == "frame in a zip":
        data.pack_folder(folder)

    with pytest.raises(OSError) as error:
        train_clips()[0, 1]
    message = str(error.value)
    assert message.startswith("train.txt:3: frames/q/r")
    if place != "zip":
        assert f"{file}: " in message
    assert "\n" not in message
    assert " at 0x" not in message  # of an object in memory

    assert call("data", "check", ".") == 2
    assert "\ntrain.txt:3: q/r: " in capsys.readouterr().out


class TwoReadable:
    """Training clips of 14 rows, of which only 0 and 12 can be read."""

    def __len__(self):
        return 14

    def __getitem__(self, index):
        epoch, row = index
        if row not in (0, 12):
            raise OSError(f"row {row}")
        return index


def test_skip_broken_takes_the_next_readable_video(capsys):
    """It looks at most ten rows on; the first row follows the last."""
    clips = data.SkipBroken(TwoReadable())
    assert clips[3, 13] == (3, 0)
    assert capsys.readouterr().err == "row 13: skipped; using the next video\n"
    assert clips[3, 2] == (3, 12)
    with pytest.raises(OSError, match="row 11"):
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
        "val.txt is missing: training needs it",  # not among the 4: evaluation works
        "4 problems"]


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
    with Image.open(toy / "frames/train/00000/img_00024.jpg") as image:
        assert image.format == "JPEG"


def test_a_label_says_where_the_shape_moves():
    """Even rows have one shape. On each axis it moves 1.2 to 1.6 pixels a frame, about 4 in three
    frames, and returns at the opposite edge, so np.roll by 4 pixels lays it on itself."""
    for row in range(0, 40, 2):
        video, labels = data.draw_video(row, default_rng([0, row]))
        name = data.TOY_CATEGORIES[labels[0]]
        right = name.count("right") - name.count("left")
        down = name.count("down") - name.count("up")
        background = np.median(video, axis=0)  # a shape covers a pixel in few frames
        shape = (video != background).any(axis=-1)  # (24, 36, 40)
        rolled = np.roll(shape[:-3], (4 * down, 4 * right), axis=(1, 2))
        overlap = (rolled & shape[3:]).sum() / shape[3:].sum()
        assert overlap > 0.8  # another direction would be 4 of about 10 pixels off


def test_odd_rows_have_two_motions_and_every_fifth_row_has_a_background():
    """Two motions are on different axes: never left and right."""
    seen = set()
    for row, labels in enumerate(toy_labels(range(200))):
        motions = [label for label in labels if label < 8]
        backgrounds = [label for label in labels if label >= 8]
        axes = {label // 2 for label in motions}
        assert len(motions) == len(axes) == 1 + row % 2
        assert bool(backgrounds) == (row % 5 == 0)
        seen.update(labels)
    assert seen == set(range(10))


def test_checkers_change_downwards_and_stripes_do_not():
    """The brightness of a pattern changes by 40 after every fourth pixel."""
    for row in range(0, 40, 5):
        video, labels = data.draw_video(row, default_rng([0, row]))
        background = np.median(video, axis=0)
        change = abs(background[4:] - background[:-4]).mean()
        assert (change > 20) == (data.TOY_CATEGORIES[labels[-1]] == "checkered+ground")


def test_each_validation_video_has_its_reversal(toy):
    """A model that is blind to the order of frames cannot tell them apart."""
    names = data.TOY_CATEGORIES
    assert [names[data.reversed_label(label)] for label in range(10)] == [
        "moving+left", "moving+right", "moving+up", "moving+down", "moving+up+left",
        "moving+down+right", "moving+down+left", "moving+up+right", "checkered+ground",
        "striped+ground"]
    videos = data.VideoList(toy, "val")
    for row in (0, 2):
        backwards = [data.reversed_label(label) for label in videos.labels(row)]
        assert videos.labels(row + 1).tolist() == backwards
        frames = list(contents(videos.folder(row)).values())
        assert list(contents(videos.folder(row + 1)).values()) == frames[::-1]


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
        for truth in (labels, backward):
            truth = np.tile(np.isin(union, truth), (len(scores), 1))
            precisions.append(evaluate.average_precision(scores, truth))
        best.append(np.mean(precisions, axis=0).max())
    assert round(100 * np.mean(best), 2) == 77.83


def test_a_smaller_toy_is_the_beginning_of_a_larger_one(toy):
    data.draw_toy("smaller", videos=8, seed=3)
    smaller = contents("smaller/frames/train").items()
    assert len(smaller) == 8 * 24
    assert smaller <= contents(toy / "frames/train").items()


def test_another_seed_draws_another_toy(toy):
    assert call("data", "toy", "other", "--videos", 16, "--seed", 5) == 0
    first = "frames/train/00000/img_00001.jpg"
    assert Path("other", first).read_bytes() != Path(toy, first).read_bytes()


def test_a_toy_that_is_stopped_leaves_nothing():
    with mock.patch.object(data, "write_lines", side_effect=KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt):
            data.draw_toy("toy", videos=8)
    assert os.listdir() == []


# ---- extraction: what FFmpeg makes of videos -------------------------------------------------

def ffmpeg(*arguments):
    subprocess.run(["ffmpeg", "-nostdin", "-v", "error", "-y", *map(str, arguments)], check=True)


def film(file, *options, frames=2, size="64x48", rate=30):
    """A video file of a test picture."""
    ffmpeg("-f", "lavfi", "-i", f"testsrc=size={size}:rate={rate}", "-frames:v", frames,
           "-c:v", "mpeg4", *options, file)
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
    write("the videos/notes.txt", "not named as a video either\n")
    os.makedirs("the videos/deep/er")
    film("the videos/deep/er/one.MOV", frames=9)
    assert call("data", "extract", "--videos", "the videos", "--out", "new/the data",
                "--split", "train") == 0
    stderr = capsys.readouterr().err
    assert "the videos: 1 files skipped, whose ending is not one of mp4 " in stderr
    assert "\nvideos 2/2, " in stderr  # the progress

    out = Path("new/the data")
    assert (out / "train.txt").read_text() == "deep/er/one 9 -1\n"
    assert (out / "train_failed.txt").read_text().startswith("text\tffmpeg: ")
    assert os.listdir(out / "frames") == ["deep"]  # no part of a failed video


@needs_ffmpeg
def test_a_phones_upright_video_becomes_320_pixels_wide():
    """Its tag says how to turn it. FFmpeg 6 and later write it by one option, older ones by
    another."""
    plain = film("plain.mp4")
    try:
        ffmpeg("-display_rotation", 90, "-i", plain, "-c", "copy", "turned.mp4")
    except subprocess.CalledProcessError:
        ffmpeg("-i", plain, "-c", "copy", "-metadata:s:v:0", "rotate=90", "turned.mp4")
    assert decode("turned.mp4")[0].shape == (2, 426, 320, 3)


@needs_ffmpeg
def test_frames_are_30_a_second():
    """A video of 0.8 seconds has 24, give or take 2: FFmpeg's versions differ."""
    frames, _ = decode(film("slow.avi", frames=8, rate=10))
    assert 22 <= len(frames) <= 26


@needs_ffmpeg
def test_a_picture_track_may_begin_after_the_sound():
    """As it does in a trimmed video. The gap is not filled with copies."""
    ffmpeg("-f", "lavfi", "-i", "sine=duration=3", "-itsoffset", 2, "-i", film("a.mp4"),
           "-c:v", "copy", "-c:a", "aac", "late.mp4")
    assert len(decode("late.mp4")[0]) == 2


@needs_ffmpeg
def test_what_is_left_of_a_damaged_video_is_kept():
    """The second half of the file is missing, but not its index, which comes first."""
    whole = film("whole.mp4", "-movflags", "+faststart", frames=30)
    cut = Path(shutil.copy(whole, "cut.mp4"))
    truncated(cut)
    frames, complaint = decode(cut)
    last = len(frames) - 1  # the file ends within this frame
    assert last >= 10  # not 15: the index and the first frame are larger than what changes later
    assert torch.equal(frames[:last], decode(whole)[0][:last])
    assert complaint.startswith("ffmpeg: ")
    assert " @ 0x" not in complaint  # an address, of no use to anybody


@needs_ffmpeg
def test_a_video_may_change_its_size_and_pixel_format():
    codec = ["-c:v", "mpeg2video"]
    first = film("a.ts", *codec, frames=30)
    second = film("b.ts", *codec, "-pix_fmt", "yuv422p", frames=30, size="128x64")
    frames, _ = decode(write("joined.ts", first.read_bytes() + second.read_bytes()))
    assert frames.shape == (60, 320, 426, 3)  # the first size, 64x48, enlarged


@needs_ffmpeg
@pytest.mark.parametrize("matrix, scale", [  # from RGB to YUV: the stream's name, the filter's
    ("bt709", "bt709"),  # HD
    ("smpte170m", "bt601"),  # older
])
def test_colours_of_hd_and_older_videos_are_kept(matrix, scale):
    red = [200, 60, 40]
    ffmpeg("-f", "lavfi", "-i", f"color=c=0x{bytes(red).hex()}:size=64x48:rate=30",
           "-frames:v", 2, "-vf", f"scale=out_color_matrix={scale}", "-pix_fmt", "yuv420p",
           "-c:v", "mpeg2video", "-q:v", 1, "-colorspace", matrix, "red.mkv")
    colour = decode("red.mkv")[0].float().mean((0, 1, 2))
    assert abs(colour - torch.tensor(red)).max() <= 4  # grey levels of 255


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


def extract(listing=None, split="train", **options):
    """Extract the videos into the folder data, one after another -> the text of the list, and of
    the list of failures. listing: the text of a csv that names the videos; None: all."""
    if listing is not None:
        options["list_path"] = write("list.csv", listing)
    data.extract("videos", "data", split, workers=1, **options)
    return Path(f"data/{split}.txt").read_text(), Path(f"data/{split}_failed.txt").read_text()


def test_a_full_disk_stops_the_extraction(fake_ffmpeg):
    """Otherwise every video that follows would be listed as broken. FFmpeg's status may be 0."""
    write("videos/b.mp4", "fill the disk")
    with pytest.raises(OSError, match="no space left on the disk; free some"):
        extract()
    assert os.listdir("data") == ["frames"]
    assert not os.path.exists("data/frames/b")


def test_ffmpeg_runs_in_a_session_of_its_own(fake_ffmpeg):
    """So Ctrl-C does not reach it: it would end with half of the frames."""
    write("videos/b.mp4", "fail without a session of its own")
    assert extract() == (ABC, "")


@pytest.mark.parametrize("text, failure", [
    ("stop", "ffmpeg was stopped (status 255)"),
    ("get killed", "ffmpeg was stopped (status -9)"),
    ("write nothing", "ffmpeg: no frame\n"),
])
def test_a_video_fails_if_ffmpeg_is_stopped_or_writes_no_frame(fake_ffmpeg, text, failure):
    write("videos/b.mp4", text)
    lines, failures = extract()
    assert lines == "a 2 -1\nc 2 -1\n"
    assert failures.startswith(f"b\t{failure}")
    assert not os.path.exists("data/frames/b")


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


# ---- extraction: a second run ----------------------------------------------------------------

def test_a_second_run_keeps_what_is_whole(fake_ffmpeg):
    # a: a zip, whose video is gone
    zipped = data.pack_folder(write_frames("data/frames/a", noise(0, 4, 4, 4, 3)))
    os.unlink("videos/a.mp4")

    # b: a folder, whose video is a link to nowhere; it comes before the zip beside it
    write_frames("data/frames/b", noise(1, 3, 4, 4, 3))
    write("data/frames/b/notes.txt", "not a frame, and not counted\n")
    os.unlink("videos/b.mp4")
    os.symlink("gone", "videos/b.mp4")
    kept = contents("data/frames")
    shutil.copy(zipped, "data/frames/b.zip")

    # not whole: c, a broken zip, and d, a folder without its first frame
    write("data/frames/c.zip", zipped.read_bytes()[:-30])
    write("data/frames/d/img_00002.jpg", "")
    write("videos/d.mp4", "")

    assert extract("a.mp4,0\nb.mp4,0\nc.mp4,0\nd.mp4,0\n") == (
        "a 4 0\nb 3 0\nc 2 0\nd 2 0\n", "")
    assert kept.items() <= contents("data/frames").items()


@pytest.mark.parametrize("now_packed", [False, True])
@pytest.mark.parametrize("once_packed", [False, True])
def test_frames_older_than_their_video_are_decoded_again(fake_ffmpeg, once_packed, now_packed):
    frames = write_frames("data/frames/a", noise(0, 3, 4, 4, 3))
    if once_packed:
        data.pack_folder(frames)
    old = contents("data")
    for file in old:
        make_old(f"data/{file}")

    # the old ones stay until the new ones are whole
    write("videos/a.mp4", "get killed")
    assert extract(pack=now_packed)[0] == "b 2 -1\nc 2 -1\n"
    assert old.items() <= contents("data").items()

    write("videos/a.mp4", "")
    assert extract(pack=now_packed)[0] == ABC
    assert (frames.exists(), Path("data/frames/a.zip").exists()) == (not now_packed, now_packed)


def test_the_same_command_again_decodes_nothing(fake_ffmpeg, capsys):
    listing = "a.mp4,x\nb.mp4,y\n"
    extract(listing, val=0.5)
    before = contents("data")
    write("bin/ffmpeg", "#!/bin/false\n")
    extract(listing, val=0.5)
    assert contents("data") == before
    stderr = capsys.readouterr().err
    assert "2 of 2 videos were extracted earlier" in stderr
    assert "replaced" not in stderr


def test_zips_of_equal_frames_are_equal():
    """The files' dates do not matter."""
    frames = noise(0, 3, 4, 4, 3)
    new = write_frames("new", frames)
    old = write_frames("old", frames)
    make_old("old/img_00001.jpg")
    assert data.pack_folder(new).read_bytes() == data.pack_folder(old).read_bytes()


# ---- extraction: several at once -------------------------------------------------------------

def before_decoding(monkeypatch, action):
    """Call `action` once, in an extraction that is about to decode its first video."""
    decode_video = data.decode_video

    def decode(*arguments):
        monkeypatch.setattr(data, "decode_video", decode_video)
        action()
        return decode_video(*arguments)

    monkeypatch.setattr(data, "decode_video", decode)


@pytest.mark.parametrize("packed", [False, True])
def test_the_same_split_may_be_extracted_twice_at_once(fake_ffmpeg, monkeypatch, packed):
    results = []
    before_decoding(monkeypatch, lambda: results.append(extract(pack=packed)))
    results.append(extract(pack=packed))
    assert results == [(ABC, "")] * 2
    assert len(os.listdir("data/frames")) == 3


def test_frames_of_a_quicker_extraction_are_taken(fake_ffmpeg, monkeypatch):
    def put_frames(folder, final, pack):
        write_frames(final, noise(0, 3, 4, 4, 3))
        raise OSError("Directory not empty")

    monkeypatch.setattr(data, "put_frames", put_frames)
    assert extract() == ("a 3 -1\nb 3 -1\nc 3 -1\n", "")


def test_another_split_extracted_meanwhile_must_agree(fake_ffmpeg, monkeypatch):
    before_decoding(monkeypatch, lambda: extract("b.mp4,run\n", "val"))
    with pytest.raises(ValueError, match="categories.txt: another command has written it"):
        extract("a.mp4,jump\n")
    assert not Path("data/train.txt").exists()

    before_decoding(monkeypatch, lambda: extract("c.mp4,run\n", "test"))
    with pytest.raises(ValueError, match="test.txt: another command .* names c too"):
        extract("a.mp4,run\nc.mp4,run\n")


def test_only_old_leftovers_are_removed(fake_ffmpeg):
    """Those of the last hour may belong to a run that is at work, and do not disturb this one."""
    # of a process with our number, in another container
    young = f"data/frames/.part-train-{os.getpid()}"
    busy = "data/frames/.part-train-1"  # old, but the folder x in it is young
    old = ["data/frames/.part-train-2", "toy.part-2"]
    for path in [young, busy, *old]:
        write(f"{path}/x/img_00001.jpg", "")
    old_list = "data/a.txt.part-2"
    write(old_list, "")
    for path in [busy, *old, *[f"{path}/x" for path in old], old_list]:
        make_old(path)
    extract()
    data.draw_toy("toy", videos=8)
    paths = [young, busy, *old, old_list]
    assert [path for path in paths if os.path.exists(path)] == [young, busy]


# ---- extraction: files -----------------------------------------------------------------------

# é in Unicode's two forms: as one character, and as e and an accent, as macOS writes file names
NFC, NFD = "\u00e9", "e\u0301"


def test_videos_are_found_by_their_endings():
    for name in ("a.ts", "b.mts", "c.M2TS", "d.ogv", "e.gif", "f.mp4", "g.webm", "i.txt"):
        write(name, "")
    write("h.avi.mp4", "")  # a converted file
    assert list(data.find_videos(".")) == list("abcdefgh")


def test_links_are_followed_but_not_in_a_circle():
    write("y/clip.mp4", "")
    write("z/clip.mp4", "")
    os.symlink("y", "a")
    os.symlink("..", "z/back")
    assert list(data.find_videos(".")) == ["a/clip", "y/clip", "z/clip"]


def test_a_folder_that_cannot_be_read_is_an_error():
    with mock.patch.object(os, "scandir", side_effect=PermissionError("Permission denied")):
        with pytest.raises(OSError, match="Permission denied"):
            data.find_videos(".")


@pytest.mark.parametrize("name", [
    " space", "two\nlines", "two\u2028lines", "run\\d", "\udcff"])  # the last is not UTF-8
def test_a_name_that_no_line_can_hold_fails(fake_ffmpeg, name):
    write(f"videos/{name}.mp4", "")
    lines, failures = extract()
    assert lines == ABC
    assert failures.endswith("\tno list line can hold this path: rename the file\n")
    assert failures.count("\n") == 1


def test_a_list_may_come_from_windows(fake_ffmpeg):
    write("videos/run/d.mp4", "")
    assert extract("run\\d.mp4,0\n.\\b.mp4,0\n") == ("run/d 2 0\nb 2 0\n", "")


def test_a_listed_file_with_a_backslash_in_its_name_fails(fake_ffmpeg):
    write("videos/run\\d.mp4", "")
    assert extract("run\\d.mp4,0\nb.mp4,0\n") == (
        "b 2 0\n", "run/d\tno list line can hold the name of this file: rename it\n")


def test_a_list_may_have_another_unicode_form_than_the_files(fake_ffmpeg):
    """Both forms name the same video."""
    write(f"videos/{NFD}.mp4", "")
    assert extract(f"{NFD}.mp4,0\na.mp4,0\n{NFC}.mp4,1\n") == (f"{NFD} 2 0,1\na 2 0\n", "")


def test_a_video_beside_a_folder_of_its_name_fails(fake_ffmpeg):
    write("videos/a/d.mp4", "")
    assert extract() == (
        "a/d 2 -1\nb 2 -1\nc 2 -1\n",
        "a\ta folder of this name holds videos too: rename the file or the folder\n")


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


# ---- extraction: lists -----------------------------------------------------------------------

def test_a_list_of_another_project_becomes_ours(fake_ffmpeg, capsys):
    write("videos/d.mp4", "write nothing")
    write("list.txt", "b.mp4 7 264\n"
                      "absent.mp4 3\n"
                      "./a.mp4 2\n"
                      "d.mp4 5\n"
                      "c.mp4 -1\n"
                      "a.mp4 8\n")  # a second label of a
    assert extract(split="test", list_path="list.txt", format="mmaction2-videos") == (
        "b 2 7,264\na 2 2,8\nc 2 -1\n", "absent\tno such video\nd\tffmpeg: no frame\n")
    assert "6 lines, 5 videos" in capsys.readouterr().err


@pytest.mark.parametrize("fraction, chosen", [(0.4, "bc"), (0.01, "c"), (0.99, "abcd")])
def test_a_hash_of_the_path_decides_which_videos_validate(fraction, chosen):
    """By crc32 the order is c b d a e. Both lists keep the order of the videos. At least one video
    validates, and one trains."""
    videos = [data.Video(path, 9, [], 1) for path in "abcde"]
    train, val = data.split_videos(videos, fraction)
    assert [video.path for video in val] == list(chosen)
    assert train == [video for video in videos if video not in val]


def test_one_video_cannot_be_split():
    with pytest.raises(ValueError, match="--val 0.2: 1 .* cannot be split"):
        data.split_videos([data.Video("a", 9, [], 1)], 0.2)


def test_a_path_of_another_list_fails(fake_ffmpeg):
    """It may be another video of the same name, whose frames would be those of the first."""
    write("data/train.txt", "a 2 0\n")
    write("data/notes.txt", "not a list, so ignored\n")
    write("data/old_failed.txt", "b 2 0\n")  # a list of failures: ignored
    labels = write("data/labels.txt", "a 2 0\nb 2 0\n")  # the list that is read: ignored
    lines, failures = extract(split="val", list_path=labels, format="ours")
    assert lines == "b 2 0\n"
    assert failures.startswith("a\tdata/train.txt names this path too: ")


def test_the_user_is_told_that_a_list_was_replaced(fake_ffmpeg, capsys):
    extract("a.mp4,0\nb.mp4,0\n")
    extract("a.mp4,0\n")
    assert ("data/train.txt: replaced; it had 2 lines, the paths of 1 are no longer listed, and it "
            "has 1 now\n") in capsys.readouterr().err
    extract("a.mp4,1\n")  # another label
    assert "it had 1 lines, the paths of 0 are" in capsys.readouterr().err


def test_a_list_stays_if_nothing_was_extracted(fake_ffmpeg):
    extract("a.mp4,0\n")
    write("typo.csv", "typo.mp4,0\n")
    assert call("data", "extract", "--videos", "videos", "--list", "typo.csv", "--out", "data",
                "--split", "train") == 2
    assert Path("data/train.txt").read_text() == "a 2 0\n"
    assert Path("data/train_failed.txt").read_text() == "typo\tno such video\n"


# ---- extraction: class names -----------------------------------------------------------------

def test_class_names_of_a_csv_become_ids(fake_ffmpeg):
    """The order is that of the alphabet, or of the categories.txt that is there."""
    listing = "a.mp4,walk\nb.mp4,cook,run\nc.mp4,-1\na.mp4,run\n"
    assert extract(listing) == ("a 2 2,1\nb 2 0,1\nc 2 -1\n", "")
    assert Path("data/categories.txt").read_text() == "cook\nrun\nwalk\n"

    # run|jump would look like two labels, but it is a class there
    write("data/categories.txt", "run\nwalk\nrun|jump\ncook\n")
    assert extract(listing + "c.mp4,run|jump\n") == ("a 2 1,0\nb 2 3,0\nc 2 2\n", "")


@pytest.mark.parametrize("names", [
    "phase 1", "shot 0,take 1", "a 0,b 1", "0 a,1 b", "a:0,b:1", "class id,x", "1st,2nd"])
def test_extracted_categories_read_back_as_written(fake_ffmpeg, names):
    extract(f"a.mp4,{names}\n")
    assert data.read_categories("data") == names.split(",")


@pytest.mark.parametrize("field", [
    "run|jump", "run;jump", "run\tjump", '"run, jump"', "['run']",
    '"[""run""]"'])  # ["run"], as a csv writes it
def test_joined_labels_are_not_a_class(fake_ffmpeg, field):
    with pytest.raises(ValueError, match="list.csv:2: .* looks like several labels"):
        extract(f"a.mp4,run\nb.mp4,{field}\n")
    assert not os.path.exists("data")


@pytest.mark.parametrize("file, text, listing, reason", [
    ("categories.txt", "run\nwalk\n", "b.mp4,run\nc.mp4,1\n",
     "list.csv:2: the id 1, but other lines hold class names"),
    ("categories.txt", "run\nwalk\n", "b.mp4,jump\n",
     "'jump' is not in data/categories.txt; if it is a new class, append"),
    ("train.txt", "a 2 0\n", "b.mp4,jump\n",
     "data/categories.txt: missing, but the ids in data/train.txt belong to it"),
])
def test_classes_must_fit_the_data_folder(fake_ffmpeg, file, text, listing, reason):
    write(f"data/{file}", text)
    with pytest.raises(ValueError, match=re.escape(reason)):
        extract(listing, "val")
    assert os.listdir("data") == [file]


def test_a_class_name_may_hold_brackets_and_other_signs(fake_ffmpeg):
    # sorted: [run], eat/feed (one's cat), run+jump
    assert extract("a.mp4,run+jump,[run],eat/feed (one's cat)\n") == ("a 2 2,0,1\n", "")


def test_both_unicode_forms_of_a_class_name_are_one_class(fake_ffmpeg):
    assert extract(f"a.mp4,{NFC}\na.mp4,{NFD},x\nb.mp4,{NFD}\n") == ("a 2 1,0\nb 2 1\n", "")


def test_the_user_sees_the_classes_counted(fake_ffmpeg, capsys):
    """A column that is not a label shows then, here 90."""
    extract("a.mp4,90,3\nb.mp4,90,5\n")
    assert ("3 classes, 2.00 labels a video; most videos: 90 (2), fewest: 3 (1)"
            in capsys.readouterr().out)


def test_val_says_which_classes_one_side_lacks(fake_ffmpeg, capsys):
    lines, _ = extract("a.mp4,run,swim\nb.mp4,run,jump\n", val=0.5)
    assert lines == "a 2 1,2\n"
    assert Path("data/val.txt").read_text() == "b 2 1,0\n"  # crc32: b 0x71BEEFF9, a 0xE8B7BE43
    assert capsys.readouterr().out.splitlines() == [
        "3 classes, 2.00 labels a video; most videos: run (2), fewest: jump (1)",
        "train.txt has no video of these classes: jump",
        "val.txt has no video of these classes: swim"]


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


def test_a_character_that_the_console_lacks_becomes_a_question_mark(sound_folder, monkeypatch):
    write("categories.txt", "a\ncrêpes\nc\n")
    console = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", console)
    assert call("data", "check", ".") == 0
    console.flush()
    assert b"most videos: cr?pes (3)" in console.buffer.getvalue()


def test_a_lost_connection_is_reported_in_one_line(monkeypatch, capsys):
    error = RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer")
    monkeypatch.setattr(data, "main", mock.Mock(side_effect=error))
    assert call("data") == 2
    assert capsys.readouterr().err == (
        "data.py: another process has ended; its own line says why\n")
