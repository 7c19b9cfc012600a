"""Videos -> frames -> lists -> clips, and the toy videos.

    python data.py extract --videos DIR --list FILE.csv --out DATA --val 0.2     decode videos
    python data.py check DATA                       compare every list with the frames it names
    python data.py toy OUT                          draw small videos whose labels are motions

A data folder:

    categories.txt                   one class name a line; the first line is class 0
    train.txt  val.txt  [test.txt]   path num_frames label[,label...]     (label -1: unlabelled)
    frames/<path>/img_00001.jpg ...  or, after extract --pack, one file frames/<path>.zip

How a clip is made: list line -> frame indices -> only those JPEGs are decoded -> one crop and one
flip for the whole clip -> uint8 (T, H, W, 3). It stays uint8 until it is on the training device,
because floats would be four times the bytes. Everything random about a clip comes from
np.random.default_rng([seed, epoch, row]), so it depends on no worker and no earlier clip.

N frames in a video, T frames in a clip, H height, W width, B clips, K classes. Frame indices count
from 0: index i is the file img_(i + 1).jpg. In comments on settings "report" is the team's report
(arXiv 2003.05837). "ours" means that the report is silent; what we follow, or why, comes after it.
"""
import argparse
import array
import concurrent.futures
import csv
import errno
import hashlib
import io
import os
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
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError

# How a clip is taken from a video: one of three pages of shared settings (the others are in
# evaluate.py and train.py). A row of RECIPES in a model file overrides what differs, and adds what
# belongs to the network, such as "frames", the T of a clip.
RECIPE = dict(
    # which frames
    sampling="segments",  # "segments": one frame from each of T equal parts (report, image models);
                          # "clip": T frames from one window (report, SlowFast)
    stride=1,             # gap between the frames of a clip; ignored when sampling is "segments"

    # which pixels, in training
    augment="multiscale", # "multiscale": crops of 1, .875, .75 and .66 of the short side (report:
                          # "spatial jittering"); "jitter": random short side, then a random crop
    crop=224,             # side of the square that the network sees, in pixels; report
    jitter=(256, 320),    # smallest and largest short side; ignored when augment is "multiscale"
    flip=True,            # mirror half of the clips; report
    draft=False,          # decode JPEGs at a smaller size when augment is "jitter": faster, but
                          # pixels differ by about 1 of 255; ours: off

    # colours
    mean=(0.485, 0.456, 0.406),  # RGB in 0..1; ours: ImageNet's, as the pretrained weights need
    std=(0.229, 0.224, 0.225),
)

# What belongs to the toy videos, whichever network sees them: it overrides the three shared pages,
# and a model's row "toy" overrides it.
TOY = dict(
    # The videos have 40x36 pixels. Multiscale crops would cut off the shapes that move.
    augment="jitter",
    crop=32,
    jitter=(36, 36),
    flip=False,           # a mirrored video moves the other way, so a flip would swap two labels

    # Tests use crops of 32 pixels too, in every protocol: crops of 36 would give the ResNet a last
    # map of 2x2 pixels instead of 1x1, and a lower mAP.
    test_resize=36,
    test_crop=32,
    scales=(32,),

    # training: minutes on a laptop, and no download
    init="none",
    loss_scale=10 / 1.7,  # classes / labels per video; the report's 160 is 313 classes / 1.96
    batch=16,
    reference_batch=16,
    lr=0.03,
    schedule="cosine",
    epochs=9,
)

FRAME = "img_{:05d}.jpg"
ENDINGS = "mp4 m4v avi mkv mov webm mpg mpeg flv wmv 3gp ts mts m2ts ogv gif"  # of video files
# It matches repeated endings too: of a.mp4.mp4 the path is a. If it were a.mp4, a reader of the
# list that extract writes would take the ending off once more.
ENDING = re.compile(r"(\.(" + ENDINGS.replace(" ", "|") + r"))+$", re.IGNORECASE)


# ---- lists -----------------------------------------------------------------------------------

class Video(NamedTuple):
    path: str           # below DATA/frames, without the ending of a video file
    frames: int | None  # None: the list's form does not say
    labels: list        # class ids, each once; extract also accepts class names
    line: int           # where the path first appears in the list file, counted from 1


# Fields are read from the right, so a path may hold spaces. In our form exactly two fields follow
# the path; mmaction2's path ends before the run of numbers that closes the line.
IDS = r"-1|\d+(?:\s*,\s*\d+)*"
FORMATS = {
    "ours": rf"(?P<path>.*\S)\s+(?P<frames>\d{{1,15}})\s+(?P<labels>{IDS})",
    "mmaction2-frames": r"(?P<path>.+?)\s+(?P<frames>\d{1,15})\s+(?P<labels>-1|\d+(?:\s+\d+)*)",
    "mmaction2-videos": r"(?P<path>.+?)\s+(?P<labels>-1|\d+(?:\s+\d+)*)",
}
PATTERNS = {name: re.compile(pattern) for name, pattern in FORMATS.items()}
EXPECTED = {
    "ours": "path num_frames id[,id...]",
    "csv": "name.mp4,id[,id...]",
    "mmaction2-frames": "path num_frames id [id ...]",
    "mmaction2-videos": "name.mp4 id [id ...]",
}


def read_list(path, format="auto", num_classes=None):
    """A list file -> [Video, ...] in its order; a path that is repeated gets all its labels.

    format: "ours" (which is X-Temporal's too), "csv" (M-MiT's own), "mmaction2-frames",
    "mmaction2-videos", or "auto", which tells ours from csv. Videos of 0 frames are left out.
    A line that cannot be read, or a label >= num_classes, raises a ValueError that names the file
    and the line.
    """
    videos, _, _ = read_videos(path, format, num_classes)
    return videos


def read_videos(path, format="auto", num_classes=None, names_allowed=False):
    """Like read_list, but returns (videos, number of repeated lines, number of lines with 0
    frames). names_allowed: the labels of a csv may be class names instead of ids."""
    lines = numbered_lines(read_text(path))
    if format == "auto":
        format = tell_format(path, [line for _, line in lines])

    videos = {}
    repeated = 0
    without_frames = 0
    for number, line in lines:
        try:
            video = parse_line(line, number, format, num_classes, names_allowed)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
        if video.frames == 0:
            without_frames += 1
        elif video.path in videos:
            repeated += 1
            videos[video.path] = merge(videos[video.path], video, path)
        else:
            videos[video.path] = video
    if not videos:
        raise ValueError(f"{path}: lists no video that has frames")
    return list(videos.values()), repeated, without_frames


def numbered_lines(text):
    """[(line number from 1, line), ...] without empty lines."""
    stripped = [line.strip() for line in text.split("\n")]
    return [(number, line) for number, line in enumerate(stripped, 1) if line]


def tell_format(path, lines):
    """The form of a whole list file: "ours" if any line fits it, else "csv". A ValueError asks for
    --format where a line could be read in two ways."""
    paths = []
    for line in lines:
        match = PATTERNS["ours"].fullmatch(line)
        if match:
            paths.append(match["path"])
    if not paths:
        return "csv"

    # In "a.mp4 92 69" the 92 is a number of frames in our form and a label in mmaction2's. A comma
    # in any line rules mmaction2 out.
    if not any("," in line for line in lines):
        for name in paths:
            if ENDING.search(name) or re.search(r"\s\d+$", name):
                raise ValueError(
                    f"{path}: the line of {name!r} can be read in several ways; choose one with "
                    f"--format (ours: {EXPECTED['ours']}; mmaction2-frames: "
                    f"{EXPECTED['mmaction2-frames']}; mmaction2-videos: "
                    f"{EXPECTED['mmaction2-videos']})")
    return "ours"


def parse_line(line, number, format, num_classes=None, names_allowed=False):
    """A list line -> Video. Errors name the form that was expected; the caller adds the place."""
    fields = split_fields(line, format)
    if fields is None:
        raise ValueError(f"the file is read as {format}, but {line!r} does not fit: expected "
                         f"{EXPECTED[format]} (-1: unlabelled); data.py extract --format reads "
                         "other forms")
    name, frames, labels = fields

    # the path
    path = name.removeprefix("./")
    if "." in path:
        path = ENDING.sub("", path)
    parts = path.replace("\\", "/").split("/")
    drive = parts[0][1:] == ":"  # of Windows
    if drive or "" in parts or "." in parts or ".." in parts:
        raise ValueError(f"{name!r} must be a relative path inside the folder, such as some/video")

    # the labels
    if labels == ["-1"]:
        return Video(path, frames, [], number)
    if all(map(str.isdecimal, labels)):
        labels = [int(label) for label in labels]
    else:
        check_names(labels, name, line, names_allowed)
    if len(set(labels)) < len(labels):
        raise ValueError("a label appears twice; expected the ids of the classes, not a column of "
                         "0 or 1 for each class")
    if num_classes is not None and isinstance(labels[0], int) and max(labels) >= num_classes:
        raise ValueError(f"label {max(labels)}, but the last class of categories.txt is "
                         f"{num_classes - 1}")
    return Video(path, frames, labels, number)


def split_fields(line, format):
    """A list line -> (path, number of frames or None, [label, ...] as text), or None if it does not
    have the form."""
    if format == "csv":
        return split_csv(line)
    match = PATTERNS[format].fullmatch(line)
    if match is None:
        return None
    frames = None
    if format != "mmaction2-videos":
        frames = int(match["frames"])
    labels = match["labels"].replace(",", " ").split()
    return match["path"], frames, labels


def split_csv(line):
    """The same for a csv, also as spreadsheets write it: with spaces after commas, quotes around
    fields, and commas at the end of short rows."""
    try:
        path, *fields = next(csv.reader([line], skipinitialspace=True))
    except csv.Error:  # a field of 131,072 characters, say
        return None
    labels = []
    for field in fields:
        field = field.strip()
        if re.fullmatch(IDS, field):
            labels += field.replace(",", " ").split()  # quotes may hold several ids
        elif field:
            labels.append(field)  # the name of a class, which may hold a comma
    if not path or not labels:
        return None
    return path.strip(), None, labels


def check_names(labels, name, line, names_allowed):
    """Check labels that are not all ids: they must all be class names, where these are allowed."""
    if "-1" in labels:
        raise ValueError(f"-1 means unlabelled and stands alone, in {line!r}")
    if any(map(str.isdecimal, labels)):
        raise ValueError(f"{line!r} mixes class names and numbers, as the single-label Moments in "
                         f"Time does; expected {EXPECTED['csv']}")
    if not names_allowed:
        raise ValueError(f"{labels[0]!r} is not a class id; expected {EXPECTED['csv']}")
    for label in labels:
        if not any(map(str.isalpha, label)):
            raise ValueError(f"{label!r} is neither an id nor the name of a class, in {line!r}")
    if not ENDING.search(name):
        raise ValueError(f"{name!r} has no ending of a video file; expected "
                         "name.mp4,class[,class...], without a line of column titles")


def merge(first, second, file):
    """One Video with the labels of two lines that name the same path."""
    if first.frames != second.frames:
        raise ValueError(f"{file}:{second.line}: {second.path} has {second.frames} frames here and "
                         f"{first.frames} in line {first.line}")
    new = [label for label in second.labels if label not in first.labels]
    return first._replace(labels=first.labels + new)


def describe_left_out(repeated, without_frames):
    """A sentence on the lines of a list that are not videos of their own."""
    return (f"{repeated} repeated lines merged, "
            f"{without_frames} lines of videos without frames left out")


def read_text(path):
    """A text file in UTF-8, with or without a byte-order mark, as programs on Windows write it."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a text file in UTF-8; save it as one") from None


def read_categories(data_dir):
    """DATA/categories.txt -> class names by id. A line is a name, or name,id as M-MiT writes it."""
    path = Path(data_dir) / "categories.txt"
    if not path.exists():
        raise ValueError(f"{path}: missing; write the names of the classes there, one a line "
                         "(the first line is class 0)")
    names = [line.strip() for line in read_text(path).rstrip().split("\n")]
    if names == [""]:
        raise ValueError(f"{path}: names no class")
    if "" in names:
        raise ValueError(f"{path}:{names.index('') + 1}: an empty line would shift the ids of all "
                         "classes below it; remove it or write a name")

    # M-MiT's own form gives the ids; they need not be in order
    if all(re.search(r",\s*\d+$", name) for name in names):
        by_id = {}
        for line in names:
            name, number = line.rsplit(",", 1)
            by_id[int(number)] = name.strip()
        if sorted(by_id) != list(range(len(names))):
            raise ValueError(f"{path}: the ids must be 0 to {len(names) - 1}, each once")
        names = [by_id[number] for number in range(len(names))]

    for number, name in enumerate(names):
        if name in names[:number]:
            raise ValueError(f"{path}: the name {name!r} appears twice")
    return names


def compare_categories(ours, our_place, theirs, their_place):
    """Raise a ValueError that names the first difference, if two places do not name the same
    classes in the same order."""
    for number, (our_name, their_name) in enumerate(zip(ours, theirs)):
        if our_name != their_name:
            raise ValueError(f"class {number} is {our_name!r} in {our_place}, but {their_name!r} "
                             f"in {their_place}: both must name the same classes in the same order")
    if len(ours) != len(theirs):
        raise ValueError(f"{our_place} names {len(ours)} classes, {their_place} {len(theirs)}")


# ---- which frames ----------------------------------------------------------------------------

def segment_indices(num_frames, segments, rng=None):
    """One frame from each of `segments` equal parts of the video: int array (segments,).

    rng None: the middle of each part; otherwise a random place in it. Works for every
    num_frames >= 1: a short video repeats frames, in order. Report: "evenly select".
    The authors' code rounds the length of a part down, so the last frames are never trained on;
    ours reaches every frame.
    """
    k = np.arange(segments)
    if rng is None:
        return (2 * k + 1) * num_frames // (2 * segments)
    places = (k + rng.random(segments)) * num_frames / segments
    return np.minimum(places, num_frames - 1).astype(int)  # rounding can give num_frames itself


def clip_indices(num_frames, length, stride, start):
    """`length` frames from `start` on, `stride` apart: int array (length,). Indices past the end of
    the video wrap around to its beginning."""
    return (start + stride * np.arange(length)) % num_frames


def clip_starts(num_frames, length, stride, views):
    """First frames of `views` clips, spread evenly over the video: int array (views,). A single
    clip is the middle one."""
    room = max(0, num_frames - length * stride)
    if views == 1:
        return np.array([room // 2])
    return room * np.arange(views) // (views - 1)


def sample_indices(num_frames, recipe, rng=None):
    """The frames of a clip, as the recipe's `sampling` says: int array (T,). With rng a random clip
    for training, without it the middle one."""
    length = recipe["frames"]
    stride = recipe["stride"]
    if recipe["sampling"] == "segments":
        return segment_indices(num_frames, length, rng)

    room = max(0, num_frames - length * stride)
    start = room // 2
    if rng is not None:
        start = rng.integers(room + 1)
    return clip_indices(num_frames, length, stride, start)


# ---- which pixels ----------------------------------------------------------------------------

def multiscale_box(width, height, target, rng):
    """TSN's multi-scale crop ("spatial jittering"): the box (x, y, w, h) of a frame that is resized
    to target x target.

    w and h are 1, .875, .75 or .66 of the short side and at most one step apart. A side within 2
    pixels of the target becomes the target, which spares the resize. x and y are multiples of a
    quarter of the free width and height, in one of 13 combinations.
    """
    short = min(width, height)
    sides = [int(short * scale) for scale in (1, 0.875, 0.75, 0.66)]
    if target <= short:
        sides = [target if abs(side - target) < 3 else side for side in sides]
    pairs = []
    for i in range(4):
        for j in range(4):
            if abs(i - j) <= 1:
                pairs.append((sides[i], sides[j]))
    places = [(0, 0), (4, 0), (0, 4), (4, 4), (2, 2), (0, 2), (4, 2), (2, 4), (2, 0), (1, 1),
              (3, 1), (1, 3), (3, 3)]

    w, h = pairs[rng.integers(len(pairs))]
    right, down = places[rng.integers(len(places))]
    return right * ((width - w) // 4), down * ((height - h) // 4), w, h


def jitter_box(width, height, target, jitter, rng):
    """SlowFast's crop: the short side is resized to a length drawn from `jitter`, then a random
    target x target square is cut out. The result is the box (x, y, w, h) of the frame that becomes
    this square, so that only its pixels are resized. Its side is rounded to the nearest whole
    pixel."""
    short = rng.integers(jitter[0], jitter[1] + 1)
    side = round(target * min(width, height) / short)
    y = int(rng.integers(height - side + 1))
    x = int(rng.integers(width - side + 1))
    return x, y, side, side


def frame_reader(folder):
    """A function from a frame's file name to its bytes, for a video's folder or else its zip."""
    packed = f"{folder}.zip"
    first = os.path.join(folder, FRAME.format(1))
    if os.path.exists(packed) and not os.path.exists(first):
        return zipfile.ZipFile(packed).read  # closed when the function is no longer used

    def read(name):
        return Path(folder, name).read_bytes()

    return read


def decode_frame(read, name, folder, draft_side=None):
    """A frame as an RGB image of Pillow. OSError with the name of the file if it is broken."""
    try:
        image = Image.open(io.BytesIO(read(name)))
        if draft_side is not None:
            image.draft(None, (draft_side, draft_side))
        if image.mode != "RGB":
            return image.convert("RGB")
        image.load()
        return image
    except UnidentifiedImageError:
        raise OSError(f"{folder}/{name}: not an image") from None
    except Exception as error:  # Pillow and zipfile raise many kinds of errors for broken files
        reason = getattr(error, "strerror", None) or str(error) or repr(error)
        raise OSError(f"{folder}/{name}: {reason}") from None


def read_frames(folder, indices, box=None, draft_side=None):
    """Frames of a video by index -> uint8 (T, h, w, 3). A frame that is asked for twice is decoded
    once.

    box: a function (width, height) -> (x, y, w, h), the part to keep; it is called once, for the
    whole clip. draft_side: JPEGs may be decoded at 1/2, 1/4 or 1/8 of their size, if their short
    side is then still this long; the box is in those pixels. OSError with the name of the file.
    """
    try:
        read = frame_reader(folder)
    except Exception as error:  # a damaged zip raises many kinds of errors
        raise OSError(f"{folder}.zip: {error}") from None

    pixels = {}
    size = None
    for index in indices:
        if index in pixels:
            continue
        name = FRAME.format(index + 1)
        image = decode_frame(read, name, folder, draft_side)
        if size is None:
            size = image.size
            x, y, w, h = 0, 0, *size
            if box is not None:
                x, y, w, h = box(*size)
        if image.size != size:
            raise OSError(f"{folder}/{name}: its size is not that of the clip's first frame")
        pixels[index] = np.asarray(image.crop((x, y, x + w, y + h)))
    return torch.from_numpy(np.stack([pixels[index] for index in indices]))


def resize(frames, size):
    """uint8 (T, h, w, 3) -> the size (width, height), or the short side `size`; bilinear and
    antialiased, as Pillow does it."""
    h, w = frames.shape[1:3]
    if isinstance(size, tuple):
        width, height = size
    elif w < h:
        width, height = size, size * h // w  # the long side is rounded down, as in torchvision
    else:
        width, height = size * w // h, size
    if (width, height) == (w, h):
        return frames

    images = frames.permute(0, 3, 1, 2)
    images = F.interpolate(images, (height, width), mode="bilinear", antialias=True)
    return images.permute(0, 2, 3, 1)


def make_clip(folder, indices, recipe, rng=None):
    """Decode the frames of a clip and cut them to size: uint8 (T, crop, crop, 3).

    rng None: the single evaluation view, short side test_resize, then the centre test_crop.
    Otherwise the recipe's augmentation, with one crop and one flip for all frames.
    """
    if rng is None:
        crop = recipe["test_crop"]
        clip = resize(read_frames(folder, indices), recipe["test_resize"])
        y = round((clip.shape[1] - crop) / 2)
        x = round((clip.shape[2] - crop) / 2)
        return clip[:, y : y + crop, x : x + crop].contiguous()

    crop = recipe["crop"]
    draft_side = None
    if recipe["augment"] == "multiscale":
        def box(width, height):
            return multiscale_box(width, height, crop, rng)
    else:
        def box(width, height):
            return jitter_box(width, height, crop, recipe["jitter"], rng)
        if recipe["draft"]:
            draft_side = recipe["jitter"][1]

    clip = resize(read_frames(folder, indices, box, draft_side), (crop, crop))
    if recipe["flip"] and rng.random() < 0.5:
        clip = clip.flip(2)
    return clip.contiguous()


def normalise(clips, mean, std, channels_last=False):
    """(clips / 255 - mean) / std: uint8 (B, T, H, W, 3) -> float32 (B, T, 3, H, W) on the same
    device. With channels_last the result keeps its channels innermost in memory."""
    mean = torch.tensor(mean, device=clips.device).view(3, 1, 1)
    std = torch.tensor(std, device=clips.device).view(3, 1, 1)
    clips = clips.permute(0, 1, 4, 2, 3)
    if not channels_last:
        clips = clips.contiguous()
    return (clips / 255).sub_(mean).div_(std)


# ---- the data set ----------------------------------------------------------------------------

class VideoList(torch.utils.data.Dataset):
    """DATA/<split>.txt and its frames.

    train: an item is (clip uint8 (T, H, W, 3), labels float32 (K,), row), a random, augmented clip.
    What is random depends on the epoch, so the index carries it: epoch * len + row.
    Not train: the same with the recipe's single evaluation view. Or, if a function `views` is
    given, (row, views(read, num_frames, path)), where read(indices) gives whole frames.

    A video that cannot be read raises an OSError that names its list line. With skip_broken,
    training prints the error and takes the next readable row, at most 10 rows further on.

    Every line is checked here, once. What is kept is the file's bytes and where each video's line
    begins, and a line is parsed again when its video is asked for: a million Python objects would
    be copied into the memory of every worker, whereas these arrays are shared.
    """

    def __init__(self, data_dir, split, recipe, train, seed=0, skip_broken=False, views=None):
        self.list = Path(data_dir) / f"{split}.txt"
        self.frames_dir = Path(data_dir) / "frames"
        self.recipe = recipe
        self.train = train
        self.seed = seed
        self.skip_broken = skip_broken
        self.views = views
        self.categories = read_categories(data_dir)
        if not self.list.exists():
            raise ValueError(f"{self.list}: missing; python data.py extract --out {data_dir} "
                             f"--split {split} writes it, or --val 0.2 both train.txt and val.txt")
        self.text = read_text(self.list).encode()
        self.starts = array.array("q")  # by row: where the line of this video begins in the text
        self.lines = array.array("q")   # by row: the number of that line
        self.merged = {}                # the Video of each row whose path is on several lines
        self.repeated = 0               # number of lines whose path an earlier line has
        self.without_frames = 0         # number of lines with 0 frames
        self.class_counts = np.zeros(len(self.categories), int)  # videos of each class, (K,)
        # A checkpoint remembers by this hash which list it is of.
        self.hash = hashlib.sha256(self.text.strip()).hexdigest()[:16]
        self.read_lines()
        if len(self) == 0:
            raise ValueError(f"{self.list}: lists no video that has frames")

    def read_lines(self):
        rows = {}  # path -> row; forgotten afterwards
        num_classes = len(self.categories)
        counts = [0] * num_classes
        start = 0
        for number, line in enumerate(io.BytesIO(self.text), 1):
            here = start
            start += len(line)
            line = line.decode().strip()
            if not line:
                continue
            try:
                video = parse_line(line, number, "ours", num_classes)
            except ValueError as error:
                raise ValueError(f"{self.list}:{number}: {error}") from None
            if video.frames == 0:
                self.without_frames += 1
                continue
            new_labels = video.labels  # a label is counted once for each video
            if video.path in rows:
                self.repeated += 1
                row = rows[video.path]
                before = self.video(row)
                self.merged[row] = merge(before, video, self.list)
                new_labels = self.merged[row].labels[len(before.labels):]
            else:
                rows[video.path] = len(self.starts)
                self.starts.append(here)
                self.lines.append(number)
            for label in new_labels:
                counts[label] += 1
        self.class_counts += counts

    def video(self, row):
        """The Video of a row."""
        if row in self.merged:
            return self.merged[row]
        start = self.starts[row]
        end = self.text.find(b"\n", start)
        if end == -1:
            end = len(self.text)
        line = self.text[start:end].decode().strip()
        return parse_line(line, self.lines[row], "ours")

    def describe(self):
        labels = self.class_counts.sum() / len(self)
        left_out = describe_left_out(self.repeated, self.without_frames)
        return f"{self.list}: {len(self)} videos, {labels:.2f} labels each; {left_out}"

    def __len__(self):
        return len(self.starts)

    def __getitem__(self, index):
        epoch, row = divmod(index, len(self))  # the inverse of epoch * len + row
        if not (self.train and self.skip_broken):
            return self.item(epoch, row)
        for _ in range(10):
            try:
                return self.item(epoch, row)
            except OSError as error:
                print(f"{error}: skipped, the next video is taken", file=sys.stderr, flush=True)
            row = (row + 1) % len(self)
        return self.item(epoch, row)

    def item(self, epoch, row):
        video = self.video(row)
        folder = self.frames_dir / video.path
        try:
            if self.views is not None:
                def read(indices):
                    return read_frames(folder, indices)
                return row, self.views(read, video.frames, video.path)

            rng = None
            if self.train:
                rng = np.random.default_rng([self.seed, epoch, row])
            indices = sample_indices(video.frames, self.recipe, rng)
            clip = make_clip(folder, indices, self.recipe, rng)
        except OSError as error:
            raise OSError(f"{self.list}:{video.line}: {error}") from None
        labels = torch.zeros(len(self.categories))
        labels[video.labels] = 1
        return clip, labels, row


def ignore_interrupts(worker_id):
    """For a loader's worker: Ctrl-C reaches every process of the terminal, but only the main
    process acts on it, and then ends the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def load(loader):
    """The batches of a DataLoader. If shared memory runs out, the error says what to do."""
    try:
        yield from loader
    except (RuntimeError, OSError) as error:
        for phrase in ("shared memory", "No space left on device", "Bus error", "unable to write"):
            if phrase in str(error):
                raise OSError("the loader's workers have too little shared memory: give the "
                              "container more (docker run --shm-size 8g) or pass fewer --workers "
                              "(0 needs none)") from None
        raise


# ---- the toy videos --------------------------------------------------------------------------

TOY_CATEGORIES = ["moving+right", "moving+left", "moving+down", "moving+up", "moving+down+right",
                  "moving+up+left", "moving+up+right", "moving+down+left", "checkered+ground",
                  "striped+ground"]
VELOCITIES = [(1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, -1), (1, -1), (-1, 1)]  # x, y by label
MOTIONS = len(VELOCITIES)


def draw_toy(out, videos=1200, seed=0):
    """Draw the toy into the new folder `out`: `videos` for training, a quarter as many to validate.

    One or two shapes, each moving along its own axis, drift over a ground; a shape that leaves at
    one edge returns at the opposite one. The labels are the directions, which no single frame
    shows. Every fifth video has a patterned ground: a label that every frame shows. Validation
    holds each video together with its reversal.
    Of 24 frames, 8 segments have the middle frames 1, 4, 7 ... 22. Played backwards they are the
    same frames, so a model that is blind to the order of frames scores both videos alike.
    """
    out = Path(out)
    if os.path.lexists(out):
        raise ValueError(f"{out}: already there; name a new folder")
    if videos < 8:
        raise ValueError(f"--videos {videos}: at least 8")
    if seed < 0:
        raise ValueError(f"--seed {seed}: at least 0")

    pairs = videos // 8
    lists = {"train": [], "val": []}
    part = Path(f"{out}.part-{os.getpid()}")
    progress = Progress("toy videos", videos + pairs)
    try:
        for row in range(videos):
            frames, labels = draw_video(row, np.random.default_rng([seed, row]))
            lists["train"].append(write_video(part, f"train/{row:05d}", frames, labels))
            progress.update(row + 1)
        for row in range(videos, videos + pairs):
            frames, labels = draw_video(row, np.random.default_rng([seed, row]))
            path = f"val/{row:05d}"
            reversed_labels = [reversed_label(label) for label in labels]
            lists["val"].append(write_video(part, path, frames, labels))
            lists["val"].append(
                write_video(part, f"{path}_reversed", frames[::-1], reversed_labels))
            progress.update(row + 1)
        write_lines(part / "train.txt", lists["train"])
        write_lines(part / "val.txt", lists["val"])
        write_lines(part / "categories.txt", TOY_CATEGORIES)
        os.replace(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def reversed_label(label):
    """The label of a toy video played backwards: motions come in pairs (0, 1), (2, 3), ..."""
    if label >= MOTIONS:
        return label  # a ground looks the same backwards
    if label % 2 == 0:
        return label + 1
    return label - 1


def write_video(data_dir, path, frames, labels):
    """Write a toy video's frames; its list line is the result."""
    folder = data_dir / "frames" / path
    folder.mkdir(parents=True)
    for number, frame in enumerate(frames, 1):
        Image.fromarray(frame).save(folder / FRAME.format(number), quality=90)
    return f"{path} {len(frames)} {','.join(map(str, labels))}"


def draw_video(row, rng, frames=24, width=40, height=36):
    """A toy video: uint8 (frames, height, width, 3) and its labels. Every other row has two moving
    shapes instead of one, every fifth row a patterned ground."""
    y, x = np.mgrid[:height, :width]
    t = np.arange(frames)[:, None, None]

    # a dark ground with grain that does not move
    colour = rng.integers(40, 100, 3)
    grain = rng.normal(0, 5, (height, width, 1))
    video = np.tile(colour + grain, (frames, 1, 1, 1))

    # one motion for each shape, on different axes
    num_shapes = 1 + row % 2
    axes = rng.permutation(4)[:num_shapes]
    labels = [int(2 * axis + rng.integers(2)) for axis in axes]
    motions = [VELOCITIES[label] for label in labels]

    if row % 5 == 0:
        ground = int(rng.integers(2))
        labels.append(MOTIONS + ground)
        pattern = x // 4 % 2  # striped
        if ground == 0:
            pattern = (x // 4 + y // 4) % 2  # checkered
        video += 40 * pattern[..., None]

    for vx, vy in motions:
        distance = rng.uniform(1.2, 1.6) * t  # pixels, on each axis
        # distances from the shape's centre, between -width / 2 and width / 2: it wraps around
        dx = (x - rng.uniform(0, width) - vx * distance) % width - width / 2
        dy = (y - rng.uniform(0, height) - vy * distance) % height - height / 2
        bright = rng.integers(180, 256, 3)
        if rng.integers(2):
            shape = np.maximum(abs(dx), abs(dy)) < 5  # a square
        else:
            shape = dx**2 + dy**2 < 32                # a disc
        video[shape] = bright
    return video.clip(0, 255).astype(np.uint8), labels


# ---- extraction ------------------------------------------------------------------------------

def extract(videos_dir, out, split="train", list_path=None, format="auto", workers=os.cpu_count(),
            pack=False, val=None):
    """Decode videos into OUT/frames and write OUT/<split>.txt and OUT/<split>_failed.txt.

    list_path None: every video below videos_dir, unlabelled. val: a fraction of the videos, which
    are then listed in val.txt and all others in train.txt. Returns the numbers of (extracted,
    failed) videos. A video's folder, or with pack its zip, gets its name only when it is whole, so
    an interrupted run can be started again.
    """
    require_ffmpeg()
    if not 1 <= workers <= 1000:
        raise ValueError(f"--workers {workers}: from 1 to 1000")
    if not re.fullmatch(r"[\w-]+", split) or split == "categories":
        raise ValueError(f"--split {split}: a name such as train, of letters, digits, _ and -")
    if val is not None and not 0 < val < 1:
        raise ValueError(f"--val {val}: a fraction between 0 and 1, such as 0.2")

    # what to decode
    files = find_videos(videos_dir)
    videos = [Video(path, None, [], 0) for path in files]
    categories = None
    if list_path is not None:
        videos, categories = read_labels(list_path, format, out)

    # decode
    out = Path(out)
    extracted, failed = extract_videos(videos, files, out / "frames", split, workers, pack)

    # write the lists
    if categories is not None:
        write_lines(out / "categories.txt", categories)
    write_lines(out / f"{split}_failed.txt", failed)
    if val is None:
        write_lines(out / f"{split}.txt", extracted)
    else:
        train_lines, val_lines = split_lines(extracted, val)
        write_lines(out / "train.txt", train_lines)
        write_lines(out / "val.txt", val_lines)
    return len(extracted), len(failed)


def extract_videos(videos, files, frames_dir, split, workers, pack):
    """Decode several videos at once. files: {file_key of a path: its Path}. Returns (the list lines
    of extracted videos, the lines "path, tab, reason" of failed ones)."""
    frames_dir.mkdir(parents=True, exist_ok=True)
    temporary = frames_dir / f".part-{split}"
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
    temporary.mkdir()

    def work(video):
        file = files.get(file_key(video.path))
        return extract_video(video, file, frames_dir, temporary, pack)

    extracted = []
    failed = []
    progress = Progress("videos", len(videos))
    # threads suffice, because ffmpeg does the work in processes of its own
    pool = concurrent.futures.ThreadPoolExecutor(workers)
    try:
        for video, (count, problem) in zip(videos, pool.map(work, videos)):
            if problem:
                failed.append(f"{video.path}\t{problem}")
            else:
                extracted.append(list_line(video, count))
            progress.update(len(extracted) + len(failed))
    finally:  # also after Ctrl-C; finished videos stay
        pool.shutdown(cancel_futures=True)
        shutil.rmtree(temporary, ignore_errors=True)
    return extracted, failed


def require_ffmpeg():
    if shutil.which("ffmpeg") is None:
        raise ValueError("the program ffmpeg is missing; Debian: apt install ffmpeg, macOS: "
                         "brew install ffmpeg, Windows: winget install ffmpeg")


def find_videos(folder):
    """Every video file below a folder, links followed: {file_key of its path: its Path}, sorted.
    The path is relative to the folder and has no ending."""
    if not os.path.isdir(folder):
        raise ValueError(f"{folder}: no such folder")

    def stop(error):  # a folder that cannot be read would lose its videos silently
        raise error

    files = {}
    skipped = 0
    for top, folders, names in os.walk(folder, onerror=stop, followlinks=True):
        folders.sort()
        if os.path.realpath(top) in map(os.path.realpath, Path(top).parents):
            folders.clear()  # a link that leads back to a folder above it
            continue
        for name in sorted(names):
            file = Path(top, name)
            if not ENDING.search(name):
                skipped += 1
                continue
            key = file_key(ENDING.sub("", file.relative_to(folder).as_posix()))
            if key in files:
                raise ValueError(f"{files[key]} and {file} would both be called {key}: rename one")
            files[key] = file
    if skipped:
        print(f"{folder}: {skipped} files skipped, whose ending is not one of {ENDINGS}",
              file=sys.stderr)
    if not files:
        raise ValueError(f"{folder}: no video in it (endings: {ENDINGS})")
    return dict(sorted(files.items()))


def file_key(path):
    """A path as find_videos and a list both write it: Unicode has two forms of letters such as é,
    NFC and NFD, and a list may use another one than the file system."""
    return unicodedata.normalize("NFC", path)


def read_labels(list_path, format, out):
    """The videos of a list, with ids for labels, and the class names to write, or None.

    The labels of a csv may be class names. With OUT/categories.txt there, names are looked up in
    it and ids are checked against it; otherwise the names that occur, sorted, become the classes.
    """
    known = None
    if (Path(out) / "categories.txt").exists():
        known = read_categories(out)
    num_classes = None
    if known is not None:
        num_classes = len(known)
    videos, repeated, without_frames = read_videos(list_path, format, num_classes,
                                                   names_allowed=True)
    if repeated or without_frames:
        print(f"{list_path}: {describe_left_out(repeated, without_frames)}", file=sys.stderr)

    names = set()
    for video in videos:
        for label in video.labels:
            if isinstance(label, str):
                names.add(label)
    if not names:
        return videos, None

    # class names -> ids
    categories = known or sorted(names)
    ids = {name: number for number, name in enumerate(categories)}
    for i, video in enumerate(videos):
        for label in video.labels:
            if not isinstance(label, str):
                raise ValueError(f"{list_path}:{video.line}: the id {label}, but other lines hold "
                                 "class names; write one or the other")
            if label not in ids:
                raise ValueError(f"{list_path}:{video.line}: the class {label!r} is not in "
                                 f"{Path(out) / 'categories.txt'}")
        videos[i] = video._replace(labels=[ids[label] for label in video.labels])
    if known is not None:
        return videos, None
    return videos, categories


def extract_video(video, file, frames_dir, temporary, pack):
    """Decode one video, unless its frames are there -> (number of frames, None or the problem)."""
    final = frames_dir / video.path
    try:
        if read_back(list_line(video, 1)) != video.path:
            return 0, "no list line can hold this path: rename the file"
        count = count_frames(final)
        if count > 0:
            return count, None
        if file is None:
            return 0, "no such video"

        folder = temporary / str(id(video))  # a name that no other video has
        folder.mkdir()
        count, message = decode_video(file, folder)
        if count == 0:
            return 0, message
        if message:
            print(f"{file}: {count} frames kept; {message}", file=sys.stderr)
        if pack:
            folder = pack_folder(folder)
            final = Path(f"{final}.zip")
        final.parent.mkdir(parents=True, exist_ok=True)
        os.replace(folder, final)
        return count, None
    except OSError as error:  # one video's name or place must not stop the others
        if error.errno == errno.ENOSPC:
            raise
        return 0, str(error)


def decode_video(file, folder):
    """FFmpeg writes a video's frames into a folder: 30 a second, short side 320, as in the report.
    Returns (number of frames, "" or FFmpeg's complaint). What can be decoded of a damaged video is
    kept. The frames are counted, because what the file says about their number is often wrong."""
    filters = ("setpts=PTS-STARTPTS,"  # if the sound starts first, do not fill the gap with copies
               "fps=30,"
               "scale='if(gte(iw,ih),-2,320)':'if(gte(iw,ih),320,-2)'")
    command = ["ffmpeg", "-nostdin", "-v", "error", "-threads", "1",
               "-i", f"file:{os.path.abspath(file)}", "-vf", filters,
               "-q:v", "2", "-start_number", "1", "img_%05d.jpg"]
    # a session of its own: Ctrl-C must not make ffmpeg end early with half of the frames
    result = subprocess.run(command, cwd=folder, capture_output=True, start_new_session=True)
    complaint = result.stderr.decode(errors="replace").strip()
    first_line = complaint.split("\n")[0]
    message = ""
    if first_line:
        message = "ffmpeg: " + re.sub(" @ 0x[0-9a-f]+", "", first_line)  # without an address
    elif result.returncode != 0:
        message = f"ffmpeg: status {result.returncode}"

    if "No space left on device" in complaint or "Disk quota exceeded" in complaint:
        raise OSError(errno.ENOSPC, "no space left on the disk; free some, then run the command "
                                    "again")
    if result.returncode < 0 or result.returncode == 255:  # 255: it caught the signal
        return 0, f"ffmpeg was stopped (status {result.returncode}); run the command again"
    count = count_frames(folder)
    if count == 0 and not message:
        message = "ffmpeg: no frame"
    return count, message


def pack_folder(folder):
    """A folder's files -> folder.zip, not compressed, since JPEGs are."""
    packed = Path(f"{folder}.zip")
    with zipfile.ZipFile(packed, "w") as archive:
        for file in sorted(folder.iterdir()):
            # a ZipInfo has a fixed date, so every run writes the same bytes
            archive.writestr(zipfile.ZipInfo(file.name), file.read_bytes())
    shutil.rmtree(folder)
    return packed


def frame_names(folder):
    """The file names in a video's folder or, if img_00001.jpg is not there, in its zip."""
    names = []
    if os.path.isdir(folder):
        names = [entry.name for entry in os.scandir(folder) if not entry.is_dir()]
    if FRAME.format(1) not in names and os.path.exists(f"{folder}.zip"):
        try:
            with zipfile.ZipFile(f"{folder}.zip") as archive:
                names = archive.namelist()
        except Exception:  # a damaged zip raises many kinds of errors
            names = []
    return names


def count_frames(folder):
    """The number of frames of a video; 0 if img_00001.jpg is not there."""
    names = frame_names(folder)
    if FRAME.format(1) not in names:
        return 0
    return sum(re.fullmatch(r"img_\d{5,}\.jpg", name) is not None for name in names)


def list_line(video, count):
    labels = "-1"
    if video.labels:
        labels = ",".join(map(str, video.labels))
    return f"{video.path} {count} {labels}"


def read_back(line):
    """The path in a list line as a reader of the list would find it; None if it would find none,
    because a file name holds a line break or bytes that are not UTF-8."""
    try:
        line.encode()
        video = parse_line(line.strip(), 0, "ours")
    except ValueError:  # a UnicodeEncodeError is one too
        return None
    if len(line.splitlines()) > 1:
        return None
    return video.path


def split_lines(lines, fraction):
    """List lines -> (training lines, validation lines), each in their order. The videos with the
    smallest hashes of their paths validate, at least one and never all; the same videos are always
    split alike."""
    if len(lines) < 2:
        raise ValueError(f"--val {fraction}: {len(lines)} extracted videos cannot be split, it "
                         "takes 2; train_failed.txt says what is wrong with the others")

    def hash_of_path(line):
        path = PATTERNS["ours"].fullmatch(line)["path"]
        return zlib.crc32(path.encode()), path

    count = round(fraction * len(lines))
    count = min(max(count, 1), len(lines) - 1)
    chosen = set(sorted(lines, key=hash_of_path)[:count])
    train_lines = [line for line in lines if line not in chosen]
    val_lines = [line for line in lines if line in chosen]
    return train_lines, val_lines


# ---- check -----------------------------------------------------------------------------------

def check(data_dir):
    """Compare every list of a data folder with its frames, and open the first, middle and last
    frame of every video. Print what is wrong, by line, and return the number of problems."""
    read_categories(data_dir)
    splits = []
    for split in ("train", "val", "test"):
        if Path(data_dir, f"{split}.txt").exists():
            splits.append(split)
    if not splits:
        raise ValueError(f"{data_dir}: no train.txt, val.txt or test.txt; python data.py extract "
                         f"--out {data_dir} --val 0.2 writes the first two")
    problems = []
    seen = {}  # path -> the list that it stands in
    for split in splits:
        videos = VideoList(data_dir, split, recipe=None, train=False)
        progress = Progress(videos.list.name, len(videos))
        for row in range(len(videos)):
            video = videos.video(row)
            where = f"{videos.list}:{video.line}: {video.path}"
            problem = check_frames(videos.frames_dir / video.path, video.frames)
            if problem:
                problems.append(f"{where}: {problem}")
            if video.path in seen:
                problems.append(f"{where} is also in {seen[video.path]}")
            seen[video.path] = videos.list
            progress.update(row + 1)

        counts = videos.class_counts
        most = counts.argmax()
        fewest = counts.argmin()
        print(videos.describe())
        print(f"  most videos: {videos.categories[most]} ({counts[most]}); "
              f"fewest: {videos.categories[fewest]} ({counts[fewest]})")
    for problem in problems:
        print(problem)
    for split in ("train", "val"):
        if split not in splits:
            print(f"{Path(data_dir, split)}.txt is missing: training needs it")
    print(f"{len(problems)} problems")
    return len(problems)


def check_frames(folder, count):
    """What is wrong with a video's frames, or None."""
    names = set(frame_names(folder))
    limit = min(count, 10**6)  # a wrong number in a list may be huge
    expected = {FRAME.format(number) for number in range(1, limit + 1)}
    found = names & expected
    if len(found) != count:
        return f"{len(found)} of {count} frames"
    if names != expected:
        return f"{len(names - expected)} files that are not among its {count} frames"
    try:
        read_frames(folder, [0, count // 2, count - 1])
    except OSError as error:
        return str(error)
    return None


# ---- what the scripts share ------------------------------------------------------------------

def write_lines(path, lines):
    """Write a text file whole or not at all."""
    part = path.with_name(f"{path.name}.part-{os.getpid()}")
    lines = [line.replace("\n", "\\n") for line in lines]  # a file name may hold a line break
    text = "".join(f"{line}\n" for line in lines)
    try:
        # in a list of failures a file name may hold bytes that are not UTF-8
        part.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


class Progress:
    """Every five seconds, and at the end, a line on stderr: how much is done, how fast it goes and
    how long it will take."""

    def __init__(self, what, total):
        self.what = what
        self.total = total
        self.started = time.time()
        self.printed = self.started

    def update(self, done):
        now = time.time()
        if done < self.total and now - self.printed < 5:
            return
        self.printed = now
        rate = done / max(now - self.started, 1e-9)
        left = (self.total - done) / rate
        print(f"{self.what} {done}/{self.total}, {rate:.1f} a second, {left:.0f} s left",
              file=sys.stderr)


def run_script(main, stopped="stopped"):
    """Run a script's main function and exit with its result. Bad input is one line on stderr and
    exit status 2, without a traceback; with several processes the line begins with the rank.
    stopped: what to say after Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a letter that the console lacks becomes a ?
    script = Path(sys.argv[0]).name
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        script = f"[rank {os.environ['RANK']}] {script}"
    try:
        status = main()
    except (ValueError, OSError) as error:
        # An error from a loader's worker holds its whole traceback; the last line is the message.
        line = str(error).strip().split("\n")[-1]
        for name in ("OSError: ", "ValueError: "):
            line = line.removeprefix(name)
        print(f"{script}: {line}", file=sys.stderr, flush=True)
        status = 2
    except RuntimeError as error:
        # When one of several processes ends, the others lose their connection to it.
        if "by peer" not in str(error):  # "Connection closed by peer", or "reset by peer"
            raise
        print(f"{script}: another process has ended; its own line says why", file=sys.stderr,
              flush=True)
        status = 2
    except KeyboardInterrupt:
        print(f"{script}: {stopped}", file=sys.stderr, flush=True)
        status = 130
    sys.exit(status)


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    toy = commands.add_parser("toy", help="draw the toy videos into a new folder")
    toy.add_argument("out", metavar="OUT", help="a folder that is not there yet")
    toy.add_argument("--videos", type=int, default=1200,
                     help="videos for training; a quarter as many validate (%(default)s)")
    toy.add_argument("--seed", type=int, default=0, help="of the random drawing (%(default)s)")

    extraction = commands.add_parser("extract", help="decode videos and write their list")
    add = extraction.add_argument
    add("--videos", required=True, metavar="DIR", help="the folder of videos; sub-folders count")
    add("--list", metavar="FILE", help="which videos, with their labels (default: all, unlabelled)")
    add("--format", default="auto", choices=["auto", "csv", *FORMATS],
        help="the form of the list; auto tells ours from csv (%(default)s)")
    add("--out", required=True, metavar="DATA", help="the data folder to fill")
    splits = extraction.add_mutually_exclusive_group(required=True)
    splits.add_argument("--split", help="write DATA/SPLIT.txt; a name such as train")
    splits.add_argument("--val", type=float, metavar="FRACTION",
                        help="write train.txt and val.txt, with this part of the videos in val.txt")
    add("--pack", action="store_true", help="one zip a video instead of a folder of frames")
    add("--workers", type=int, default=os.cpu_count(), help="videos decoded at once (%(default)s)")

    checking = commands.add_parser("check", help="compare the lists with the frames")
    checking.add_argument("data", metavar="DATA", help="the data folder")
    return parser.parse_args()


def main():
    args = parse_arguments()
    if args.command == "toy":
        draw_toy(args.out, args.videos, args.seed)
        return 0
    if args.command == "check":
        if check(args.data) > 0:
            return 2
        return 0

    split = args.split
    if args.val is not None:
        split = "train"
    extracted, failed = extract(
        args.videos, args.out, split, list_path=args.list, format=args.format,
        workers=args.workers, pack=args.pack, val=args.val)
    print(f"{extracted} videos extracted, {failed} failed (see {args.out}/{split}_failed.txt)")
    if extracted == 0:
        return 2
    if not (Path(args.out) / "categories.txt").exists():
        print(f"next: write the class names into {args.out}/categories.txt, one a line")
    print(f"next: python data.py check {args.out}")
    return 0


if __name__ == "__main__":
    run_script(main, "stopped; run the same command again to go on")
