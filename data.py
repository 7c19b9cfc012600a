"""Videos -> frames and lists -> training clips; and the toy videos.

    python data.py extract --videos DIR --list FILE.csv --out DATA --val 0.2     decode videos
    python data.py check DATA                       compare every list with the frames it names
    python data.py toy OUT                          draw small videos whose labels are motions

A data folder:

    categories.txt                   one class name per line; the first line is class 0
    train.txt  val.txt  [test.txt]   path num_frames label[,label...]     (label -1: unlabelled)
    frames/<path>/img_00001.jpg ...  or, after extract --pack, one file frames/<path>.zip

How a clip is made: list line -> frame indices -> only those JPEGs are decoded -> one crop and one
flip for the whole clip -> uint8 (T, H, W, 3). It stays uint8 until it is on the training device,
because floats would be four times the bytes. Everything random about a training clip comes from
np.random.default_rng([seed, epoch, row]), where row is the video's number in the list (a row of
RECIPES is something else). So it matters neither which worker makes a clip nor what was made
before.

N videos, K classes, B clips, T frames in a clip, H height, W width. Frame indices count from 0:
index i is the file img_(i + 1).jpg.

In comments on settings, "report" means that the report of the team (arXiv 2003.05837) gives the
value. "ours" means that it does not; then comes our source, or the reason. "The authors' code" is
X-Temporal, which the report's authors published.
"""
import argparse
import collections
import concurrent.futures
import contextlib
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

# How a clip is taken from a video: one of three dicts of shared settings (the others are in
# evaluate.py and train.py). A row of RECIPES in a model file overrides what differs, and adds what
# belongs to the network, such as "frames", the T of a clip.
RECIPE = dict(
    # which frames
    sampling="segments",  # "segments": one frame from each of T equal parts (report, for 2D
                          # networks); "clip": T frames from one window (report, for SlowFast)
    stride=1,             # distance in frames between neighbouring frames of the clip, 1:
                          # consecutive; ignored when sampling is "segments"

    # which pixels, in training
    augment="multiscale", # "multiscale": crops of 1, .875, .75 and .66 of the short side (the
                          # report, for 2D networks, calls it "spatial jittering"); "jitter":
                          # random short side, then a random crop (report, for SlowFast)
    crop=224,             # side of the square that the network sees, in pixels; report
    jitter=(256, 320),    # smallest and largest short side; ignored when augment is "multiscale"
    flip=True,            # mirror a clip with probability 1/2; report
    draft=False,          # decode JPEGs at a smaller size when augment is "jitter": faster, but
                          # pixels differ by about one grey level; ours: off, for exactness

    # colours
    mean=(0.485, 0.456, 0.406),  # RGB in 0..1; ours: ImageNet's, as the pretrained weights need
    std=(0.229, 0.224, 0.225),
)

FRAME = "img_{:05d}.jpg"


# ---- a list: one video per line ----------------------------------------------------------------

class Video(NamedTuple):
    path: str           # its frames are in the folder DATA/frames/path
    frames: int | None  # None: the list does not say (lists of other projects)
    labels: list        # class ids, or names in a csv of names; no repeats; empty: unlabelled
    line: int           # its line in the list file, counted from 1


def read_list(path, format="auto", num_classes=None):
    """A list file -> [Video, ...] in its order.

    format: "ours", one of the FORMATS of other projects, or "auto", which decides between ours and
    csv. If several lines name one path, their labels are united, and their numbers of frames must
    agree. A video of 0 frames is left out. A line that cannot be read, or a label >= num_classes,
    raises a ValueError that names the file and the line.
    """
    lines = numbered_lines(read_text(path))
    if format == "auto":
        format = detect_format(path, lines)

    videos = {}
    for number, line in lines:
        try:
            video = parse_line(line, number, format, num_classes)
            if video.frames == 0:
                continue
            if video.path in videos:
                video = merge(videos[video.path], video)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
        videos[video.path] = video

    if not videos:
        raise ValueError(f"{path}: lists no video that has frames")
    return list(videos.values())


# ---- which frames --------------------------------------------------------------------------------

def segment_indices(num_frames, segments, rng=None):
    """One frame from each of `segments` equal parts of the video: int array (segments,).

    rng None: the middle of each part; otherwise a random place in it. Works for every
    num_frames >= 1: a short video repeats frames, in order. The report says "evenly select".
    The authors' code rounds the length of a part down, so the last frames are never trained on.
    Here every frame can be drawn.
    """
    k = np.arange(segments)
    if rng is None:
        return (2 * k + 1) * num_frames // (2 * segments)  # (k + 1/2) * num_frames / segments
    places = (k + rng.random(segments)) * num_frames / segments
    places = np.minimum(places, num_frames - 1)  # floating point may round up to num_frames
    return places.astype(int)


def clip_indices(num_frames, length, stride, start):
    """`length` frames from `start` on, `stride` apart: int array (length,). A video that is too
    short for the clip is repeated from its beginning, as in the authors' code."""
    return (start + stride * np.arange(length)) % num_frames


def clip_starts(num_frames, length, stride, views):
    """First frames of clips that are spread evenly over the video, one for each view: int array
    (views,). A single clip is the middle one. As in the authors' code, a clip takes up length *
    stride frames: the gap after its last frame counts too."""
    room = max(0, num_frames - length * stride)
    if views == 1:
        return np.array([room // 2])
    return room * np.arange(views) // (views - 1)


def sample_indices(num_frames, recipe, rng=None):
    """The frames of a clip, as the recipe's `sampling` says: int array (T,). With rng a random clip
    for training; without it the middles of the segments, or the middle window (for the picture of
    evaluate.py --video)."""
    length = recipe["frames"]
    stride = recipe["stride"]
    if recipe["sampling"] == "segments":
        return segment_indices(num_frames, length, rng)

    room = max(0, num_frames - length * stride)
    if rng is None:
        start = room // 2
    else:
        start = rng.integers(room + 1)
    return clip_indices(num_frames, length, stride, start)


# ---- which pixels --------------------------------------------------------------------------------

def read_frames(folder, indices, draft_side=None):
    """Whole frames of a video by index -> uint8 (T, H, W, 3).

    draft_side: JPEGs may be decoded at 1/2, 1/4 or 1/8 of their size, if their short side is then
    still at least this long. A missing or broken frame raises an OSError with its file name.
    """
    names = [FRAME.format(index + 1) for index in indices]
    files = read_files(folder, set(names))  # {name: bytes}, from the folder or its zip

    frames = {}  # a frame that the clip holds twice is decoded once
    for name in files:
        frames[name] = decode_image(files[name], folder, name, draft_side)  # (H, W, 3)

    size = frames[names[0]].shape
    for name in names:
        if frames[name].shape != size:
            raise OSError(f"{folder}/{name}: its size is not that of the clip's first frame")
    return torch.from_numpy(np.stack([frames[name] for name in names]))


def multiscale_box(width, height, target, rng):
    """The multi-scale crop of TSN's authors: the box (x, y, w, h) of a frame, which will be resized
    to target x target.

    w and h are each 1, .875, .75 or .66 of the short side, the same or adjacent entries, so that
    the resize stretches the picture only a little. The box lies at one of 13 places: the corners,
    the centre, the middles of the edges, and halfway from the centre to each corner.
    """
    short = min(width, height)
    sides = [int(short * scale) for scale in (1, 0.875, 0.75, 0.66)]
    if target <= short:  # as in their code: a side within 2 pixels of the target becomes the target
        sides = [target if abs(side - target) < 3 else side for side in sides]
    pairs = []
    for i in range(4):
        for j in range(4):
            if abs(i - j) <= 1:
                pairs.append((sides[i], sides[j]))

    # the places (right, down), in quarters of the free width and height; the quarters are rounded
    # down to whole pixels
    places = [(0, 0), (4, 0), (0, 4), (4, 4), (2, 2), (0, 2), (4, 2), (2, 4), (2, 0), (1, 1),
              (3, 1), (1, 3), (3, 3)]

    w, h = pairs[rng.integers(len(pairs))]
    right, down = places[rng.integers(len(places))]
    return right * ((width - w) // 4), down * ((height - h) // 4), w, h


def jitter_box(width, height, target, jitter, rng):
    """SlowFast's crop: resize the short side to a length drawn from `jitter` (a range of at least
    the target), then cut out a random target x target square.

    To resize the square alone instead of the whole frame, this returns where the square lies in the
    original frame: its box (x, y, side, side).
    """
    short = rng.integers(jitter[0], jitter[1] + 1)
    side = round(target * min(width, height) / short)
    y = int(rng.integers(height - side + 1))
    x = int(rng.integers(width - side + 1))
    return x, y, side, side


def resize(frames, size):
    """Resize frames, uint8 (T, h, w, 3); bilinear and antialiased, as Pillow does it. size: (width,
    height), or one number, the new short side."""
    h, w = frames.shape[1:3]
    if isinstance(size, tuple):
        width, height = size
    elif w < h:
        width, height = size, size * h // w  # the long side is rounded down, as in torchvision
    else:
        width, height = size * w // h, size
    if (width, height) == (w, h):
        return frames

    images = frames.permute(0, 3, 1, 2)  # (T, 3, h, w)
    images = F.interpolate(images, (height, width), mode="bilinear", antialias=True)
    return images.permute(0, 2, 3, 1)  # (T, height, width, 3)


def make_clip(folder, indices, recipe, rng):
    """A training clip: uint8 (T, crop, crop, 3), one crop and one flip for all its frames."""
    draft_side = None
    if recipe["draft"] and recipe["augment"] == "jitter":
        draft_side = recipe["jitter"][1]  # the largest, so that a draft is never enlarged
    frames = read_frames(folder, indices, draft_side)  # (T, H, W, 3)

    # the crop
    crop = recipe["crop"]
    height, width = frames.shape[1:3]
    if recipe["augment"] == "multiscale":
        x, y, w, h = multiscale_box(width, height, crop, rng)
    else:
        x, y, w, h = jitter_box(width, height, crop, recipe["jitter"], rng)
    clip = frames[:, y : y + h, x : x + w].contiguous()  # resize is faster on contiguous memory
    clip = resize(clip, (crop, crop))

    # the flip, along the width
    if recipe["flip"] and rng.random() < 0.5:
        clip = clip.flip(2)
    return clip.contiguous()


def normalise(clips, mean, std, channels_last=False):
    """(clips / 255 - mean) / std: uint8 (B, T, H, W, 3) -> float32 (B, T, 3, H, W) on the same
    device. In memory, the channels of clips are innermost; channels_last=True keeps them so, which
    is faster on GPUs."""
    mean = torch.tensor(mean, device=clips.device).view(3, 1, 1)
    std = torch.tensor(std, device=clips.device).view(3, 1, 1)
    clips = clips.permute(0, 1, 4, 2, 3)
    if not channels_last:
        clips = clips.contiguous()
    return (clips / 255).sub_(mean).div_(std)


# ---- the list in memory, and the training clips --------------------------------------------------

class VideoList:
    """DATA/<split>.txt as arrays over its N videos: paths, numbers of frames, class ids.

    Arrays, because the loader's worker processes can share an array's memory. A million Python
    objects would soon be copied into every worker, since merely using an object writes to its
    reference count.
    """

    def __init__(self, data_dir, split):
        self.file = find_list(data_dir, split)
        self.frames_dir = Path(data_dir, "frames")
        self.categories = read_categories(data_dir)
        videos = read_list(self.file, "ours", len(self.categories))

        # StringDType: texts of any length (an array of "U" would pad all of them to the longest)
        self.paths = np.array([video.path for video in videos], np.dtypes.StringDType())  # (N,)
        self.num_frames = np.array([video.frames for video in videos])                    # (N,)
        self.lines = np.array([video.line for video in videos])                           # (N,)

        # the class ids of all videos, one after another; those of row i begin at label_starts[i]
        self.label_starts = np.cumsum([0] + [len(video.labels) for video in videos])  # (N + 1,)
        self.label_ids = np.array([label for video in videos for label in video.labels], int)

        self.class_counts = np.bincount(self.label_ids, minlength=len(self.categories))  # (K,)
        self.num_lines, self.hash = describe_file(self.file)  # for the log, and for checkpoints

    def __len__(self):
        return len(self.paths)

    def path(self, row):
        return str(self.paths[row])

    def folder(self, row):
        return self.frames_dir / self.path(row)

    def labels(self, row):
        """The class ids of a video: int array."""
        return self.label_ids[self.label_starts[row] : self.label_starts[row + 1]]

    def multi_hot(self, row):
        """The labels of a video: float32 (K,), 1 for each class that it shows, else 0."""
        labels = torch.zeros(len(self.categories))
        labels[self.labels(row)] = 1
        return labels

    def label_matrix(self):
        """The labels of all videos: uint8 (N, K), or None if no video has any."""
        if len(self.label_ids) == 0:
            return None
        labels = np.zeros((len(self), len(self.categories)), np.uint8)
        for row in range(len(self)):
            labels[row, self.labels(row)] = 1
        return labels

    def place(self, row):
        """Where the video is listed, such as DATA/val.txt:12."""
        return f"{self.file}:{self.lines[row]}"

    @contextlib.contextmanager
    def naming_line(self, row):
        """Put the video's place in front of an error about its frames."""
        try:
            yield
        except OSError as error:
            raise OSError(f"{self.place(row)}: {error}") from None


class TrainClips(torch.utils.data.Dataset):
    """A random, augmented clip of a video: (uint8 (T, crop, crop, 3), labels float32 (K,)).

    The index is (epoch, row), because augmentation differs from epoch to epoch.
    """

    def __init__(self, videos, recipe, seed):
        self.videos = videos  # a VideoList
        self.recipe = recipe
        self.seed = seed

    def __len__(self):
        return len(self.videos)

    def __getitem__(self, index):
        epoch, row = index
        rng = np.random.default_rng([self.seed, epoch, row])
        indices = sample_indices(self.videos.num_frames[row], self.recipe, rng)
        with self.videos.naming_line(row):
            clip = make_clip(self.videos.folder(row), indices, self.recipe, rng)
        return clip, self.videos.multi_hot(row)


# ==== Skip on first reading: other people's lists and files, the toy, extract, check ==============

# ---- lists of other projects and spreadsheets ----------------------------------------------------

# Fields are read from the right, so a path may hold spaces. In our format exactly two fields follow
# the path; mmaction2's path ends before the trailing numbers.
IDS = r"-1|\d+(?:\s*,\s*\d+)*"
FORMATS = {  # name: (an example for messages, the pattern of a line)
    "ours": (
        "path num_frames id[,id...]",
        re.compile(rf"(?P<path>.*\S)\s+(?P<frames>\d{{1,15}})\s+(?P<labels>{IDS})"),
    ),
    "csv": (  # M-MiT's own; see split_csv
        "name.mp4,id[,id...]",
        None,
    ),
    "mmaction2-frames": (
        "path num_frames id [id ...]",
        re.compile(r"(?P<path>.+?)\s+(?P<frames>\d{1,15})\s+(?P<labels>-1|\d+(?:\s+\d+)*)"),
    ),
    "mmaction2-videos": (
        "name.mp4 id [id ...]",
        re.compile(r"(?P<path>.+?)\s+(?P<labels>-1|\d+(?:\s+\d+)*)"),
    ),
}
ENDINGS = "mp4 m4v avi mkv mov webm mpg mpeg flv wmv 3gp ts mts m2ts ogv gif"  # of video files
# Strips repeated endings at once: a path that kept one would lose it when the list is read back.
ENDING = re.compile(r"(\.(" + ENDINGS.replace(" ", "|") + r"))+$", re.IGNORECASE)


def numbered_lines(text):
    """[(line number from 1, line), ...] without empty lines."""
    stripped = [line.strip() for line in text.split("\n")]
    return [(number, line) for number, line in enumerate(stripped, 1) if line]


def detect_format(path, lines):
    """The format of a whole list file: "ours" if any line fits it, else "csv". A ValueError asks
    for --format where a line could be read in several ways."""
    _, pattern = FORMATS["ours"]
    paths = []
    for _, line in lines:
        match = pattern.fullmatch(line)
        if match:
            paths.append(match["path"])
    if not paths:
        return "csv"

    # In "a.mp4 92 69" the 92 is a number of frames in our format and a label in mmaction2's. A
    # comma in any line rules mmaction2 out.
    if not any("," in line for _, line in lines):
        for name in paths:
            if ENDING.search(name) or re.search(r"\s\d+$", name):
                ways = []
                for format in ("ours", "mmaction2-frames", "mmaction2-videos"):
                    ways.append(f"{format}: {FORMATS[format][0]}")
                raise ValueError(f"{path}: the line of {name!r} can be read in several ways; "
                                 f"choose one with --format ({'; '.join(ways)})")
    return "ours"


def parse_line(line, number, format, num_classes=None):
    """A list line -> Video. Errors name the expected format; the caller adds the file and line."""
    if format == "csv":
        fields = split_csv(line)
    else:
        fields = split_fields(line, format)
    if fields is None:
        raise ValueError(f"the file is read as {format}, but {line!r} does not fit: expected "
                         f"{FORMATS[format][0]} (-1: unlabelled); data.py extract --format reads "
                         "other formats")
    name, frames, labels = fields

    # the path
    path = name.replace("\\", "/").removeprefix("./")  # lists of Windows have backslashes
    if "." in path:
        path = ENDING.sub("", path)
    parts = path.split("/")
    has_drive = parts[0][1:] == ":"  # such as C: on Windows
    if has_drive or "" in parts or "." in parts or ".." in parts:
        raise ValueError(f"{name!r} must be a relative path inside the folder, such as some/video")

    # the labels
    if labels == ["-1"]:
        return Video(path, frames, [], number)
    if all(map(str.isdecimal, labels)):
        labels = [int(label) for label in labels]
        if num_classes is not None and max(labels) >= num_classes:
            raise ValueError(f"label {max(labels)}, but the last class of categories.txt is "
                             f"{num_classes - 1}")
    else:
        labels = [unicodedata.normalize("NFC", label) for label in labels]
        check_names(labels, name, line)
    if len(set(labels)) < len(labels):
        raise ValueError("a label appears twice; expected the ids of the classes, not a column of "
                         "0 or 1 for each class")
    return Video(path, frames, labels, number)


def split_fields(line, format):
    """A list line -> (path, number of frames or None, [label, ...] as text), or None if it does not
    have the format."""
    match = FORMATS[format][1].fullmatch(line)
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


def check_names(labels, name, line):
    """Check labels that are not all ids: they must all be class names."""
    expected = FORMATS["csv"][0]
    if "-1" in labels:
        raise ValueError(f"-1 means unlabelled and stands alone, in {line!r}")
    if any(map(str.isdecimal, labels)):
        raise ValueError(f"{line!r} mixes class names and numbers, as the single-label Moments in "
                         f"Time does; expected {expected}")
    for label in labels:
        if not any(map(str.isalpha, label)):
            raise ValueError(f"{label!r} is neither an id nor the name of a class, in {line!r}")
    if not ENDING.search(name):
        raise ValueError(f"{name!r} has no ending of a video file; expected "
                         "name.mp4,class[,class...], without a line of column titles")


def merge(first, second):
    """One Video with the labels of two lines that name the same path."""
    if first.frames != second.frames:
        raise ValueError(f"{second.path} has {second.frames} frames here and {first.frames} in "
                         f"line {first.line}")
    new = [label for label in second.labels if label not in first.labels]
    return first._replace(labels=first.labels + new)


def list_line(video):
    """Video -> its line: path num_frames label[,label...]."""
    labels = ",".join(map(str, video.labels)) or "-1"
    return f"{video.path} {video.frames} {labels}"


def describe_file(file):
    """(number of lines that are not empty, a hash by which checkpoints recognise the list)."""
    text = read_text(file)
    return len(numbered_lines(text)), hashlib.sha256(text.encode().strip()).hexdigest()[:16]


def describe_videos(videos):
    """A sentence on a VideoList for the log."""
    mean_labels = len(videos.label_ids) / len(videos)
    lines = describe_lines(videos.num_lines, len(videos))
    text = f"{videos.file}: {lines}, {mean_labels:.2f} labels each"
    unlabelled = np.count_nonzero(np.diff(videos.label_starts) == 0)
    if unlabelled:
        text += f", {unlabelled:,} without a label"
    return text


def describe_lines(lines, videos):
    """How many videos are in a list, and what its other lines are."""
    if lines == videos:
        return f"{videos:,} videos"
    return (f"{lines:,} lines, {videos:,} videos (the other lines repeat a path or name a video "
            "without frames)")


def find_list(data_dir, split):
    """The file DATA/<split>.txt; ValueError with the remedy if it is missing."""
    file = Path(data_dir, f"{split}.txt")
    if not file.exists():
        raise ValueError(f"{file}: missing; python data.py extract --out {data_dir} --split "
                         f"{split} writes it, or --val 0.2 both train.txt and val.txt")
    return file


def read_text(path):
    """A text file in UTF-8, with or without a byte-order mark, as programs on Windows write it."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a text file in UTF-8; save it as one") from None


# ---- class names ---------------------------------------------------------------------------------

def read_categories(data_dir):
    """DATA/categories.txt -> class names by id, in Unicode's form NFC."""
    path = Path(data_dir) / "categories.txt"
    if not path.exists():
        raise ValueError(f"{path}: missing; write the names of the classes there, one a line "
                         "(the first line is class 0)")
    lines = [line.strip() for line in read_text(path).rstrip().split("\n")]
    if lines == [""]:
        raise ValueError(f"{path}: names no class")
    if "" in lines:
        raise ValueError(f"{path}:{lines.index('') + 1}: an empty line would shift the ids of all "
                         "classes below it; remove it or write a name")
    try:
        names = parse_categories(lines)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None

    seen = set()
    for name in names:
        if name in seen:
            raise ValueError(f"{path}: the name {name!r} appears twice")
        seen.add(name)
    return names


TITLES = {"id", "index", "number", "name", "class", "category", "label"}  # of columns


def parse_categories(lines):
    """The lines of categories.txt -> class names by id.

    A line is a name, or a name and an id, as in "running,3", "3 running" and M-MiT's own file. The
    numbers are ids if every line but a header has one at the same end, and the names that remain
    all differ: "phase 1", "phase 2" are names, and so are "0", "1".
    """
    lines = [unicodedata.normalize("NFC", line) for line in lines]
    has_header = False
    if not re.search(r"\d", lines[0]):
        words = re.findall(r"[^\W_]+", lines[0].lower())
        has_header = len(words) > 0 and TITLES.issuperset(words)
    rows = lines
    if has_header:
        rows = lines[1:]

    # names and ids, with commas or else with other signs between them
    for separator in (r"\s*,\s*", r"(?:\s*[;:|]\s*|\s+)"):
        names = names_by_id(rows, separator)
        if names:
            return names

    # names alone
    if has_header:
        raise ValueError(f"{lines[0]!r} looks like a line of column titles; remove it, or, if it "
                         "is a class, write name,id in every line")
    with_id = [re.fullmatch(r".+,\s*\d+|\d+\s*,.+", row) is not None for row in rows]
    if any(with_id) and not all(with_id):
        raise ValueError(f"{rows[with_id.index(False)]!r} has no id, but other lines have one; "
                         "write name,id in every line")
    return lines


def names_by_id(rows, separator):
    """Rows of names and ids -> names by id; None if they are something else."""
    problem = None
    for pattern in (rf'"?(?P<name>.+?)"?{separator}"?(?P<id>\d+)"?',
                    rf'"?(?P<id>\d+)"?{separator}"?(?P<name>.+?)"?'):
        matches = [re.fullmatch(pattern, row) for row in rows]
        if not rows or None in matches:
            continue
        if len({match["name"] for match in matches}) < len(rows):
            continue
        by_id = {int(match["id"]): match["name"] for match in matches}
        if sorted(by_id) == list(range(len(rows))):
            return [by_id[number] for number in range(len(rows))]
        problem = (f"the ids must be 0 to {len(rows) - 1}, each once, but they are {min(by_id)} to "
                   f"{max(by_id)}")
        if sorted(by_id) == list(range(1, len(rows) + 1)):
            problem = f"the ids begin at 1; subtract 1, here and in the lists: 0 to {len(rows) - 1}"
    if problem:
        raise ValueError(f"{problem}; if the numbers belong to the names, write name,id")
    return None


def category_lines(names):
    """The opposite of parse_categories. The ids stand beside the names only where the names alone
    would be read as something else."""
    try:
        if parse_categories(names) == names:
            return names
    except ValueError:
        pass
    return [f"{name},{number}" for number, name in enumerate(names)]


def compare_categories(ours, our_place, theirs, their_place):
    """Raise a ValueError that names the first difference, if two places do not name the same
    classes in the same order."""
    for number, (our_name, their_name) in enumerate(zip(ours, theirs)):
        if our_name != their_name:
            raise ValueError(f"class {number} is {our_name!r} in {our_place}, but {their_name!r} "
                             f"in {their_place}: both must name the same classes in the same order")
    if len(ours) != len(theirs):
        raise ValueError(f"{our_place} names {len(ours)} classes, {their_place} {len(theirs)}")


# ---- files of frames, folders or zips ------------------------------------------------------------

def packed_file(folder):
    """The zip of a video's frames, or None if they are in a folder."""
    packed = Path(f"{folder}.zip")
    if packed.exists() and not Path(folder, FRAME.format(1)).exists():
        return packed
    return None


def read_files(folder, names):
    """{name: bytes} of some frames of a video, from its folder or else from its zip."""
    packed = packed_file(folder)
    if packed is None:
        opened = contextlib.nullcontext()
    else:
        try:
            opened = zipfile.ZipFile(packed)
        except Exception as error:  # a damaged zip raises many kinds of errors
            raise OSError(f"{packed}: {error}") from None

    files = {}
    with opened as archive:
        for name in names:
            try:
                if archive is None:
                    files[name] = Path(folder, name).read_bytes()
                else:
                    files[name] = archive.read(name)
            except Exception as error:
                raise frame_error(folder, name, error) from None
    return files


def decode_image(content, folder, name, draft_side=None):
    """The bytes of an image file -> uint8 (H, W, 3), RGB."""
    try:
        image = Image.open(io.BytesIO(content))
        if draft_side is not None:
            image.draft(None, (draft_side, draft_side))
        if image.mode != "RGB":  # convert would copy an RGB image too
            image = image.convert("RGB")
        return np.asarray(image)
    except UnidentifiedImageError:
        raise OSError(f"{folder}/{name}: not an image") from None
    except Exception as error:  # Pillow raises many kinds of errors for broken files
        raise frame_error(folder, name, error) from None


def frame_error(folder, name, error):
    """An OSError that names the frame, in the words of another error."""
    reason = getattr(error, "strerror", None) or str(error) or repr(error)
    return OSError(f"{folder}/{name}: {reason}")


def frame_names(folder):
    """The file names in a video's folder or else in its zip."""
    packed = packed_file(folder)
    if packed is not None:
        try:
            with zipfile.ZipFile(packed) as archive:
                return archive.namelist()
        except Exception:  # a damaged zip raises many kinds of errors
            return []
    if not os.path.isdir(folder):
        return []
    return [entry.name for entry in os.scandir(folder) if not entry.is_dir()]


def count_frames(folder):
    """The number of frames of a video; 0 if img_00001.jpg is not there."""
    names = frame_names(folder)
    if FRAME.format(1) not in names:
        return 0
    return sum(re.fullmatch(r"img_\d{5,}\.jpg", name) is not None for name in names)


# ---- the loader's worker processes ---------------------------------------------------------------

class SkipBroken(torch.utils.data.Dataset):
    """TrainClips in which the next readable video, at most 10 rows further on, stands in for one
    that cannot be read."""

    def __init__(self, clips):
        self.clips = clips

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, index):
        epoch, row = index
        for _ in range(10):
            try:
                return self.clips[epoch, row]
            except OSError as error:
                print(f"{error}: skipped; using the next video", file=sys.stderr, flush=True)
            row = (row + 1) % len(self)
        return self.clips[epoch, row]


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


# ---- the toy videos ------------------------------------------------------------------------------

# What belongs to the toy videos, whichever network sees them: it overrides the three shared dicts,
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

TOY_CATEGORIES = ["moving+right", "moving+left", "moving+down", "moving+up", "moving+down+right",
                  "moving+up+left", "moving+up+right", "moving+down+left", "checkered+ground",
                  "striped+ground"]
VELOCITIES = [(1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, -1), (1, -1), (-1, 1)]  # x, y by label
MOTIONS = len(VELOCITIES)


def draw_toy(out, videos=1200, seed=0):
    """Draw the toy into the new folder `out`: `videos` for training, a quarter as many to validate.

    One or two shapes, each moving along its own axis, drift over a background; a shape that leaves
    at one edge returns at the opposite one. The labels are the directions, which no single frame
    shows. Every fifth video has a patterned background: a label that every frame shows. Validation
    holds each video together with its reversal.
    Of 24 frames, 8 segments have the middle frames 1, 4, 7 ... 22. Played backwards they are the
    same frames, so a model that is blind to the order of frames scores both videos alike.
    """
    out = Path(out)
    if os.path.lexists(out):
        raise FileExistsError(f"{out}: already there; name a new folder")

    pairs = videos // 8
    lists = {"train": [], "val": []}
    progress = Progress("toy videos", videos + pairs)
    remove_leftovers(out.parent, f"{out.name}.part-*")
    with replacing(out) as part:
        for row in range(videos):
            frames, labels = draw_video(row, np.random.default_rng([seed, row]))
            lists["train"].append(write_video(part, f"train/{row:05d}", frames, labels))
            progress.update(row + 1)
        for row in range(videos, videos + pairs):
            frames, labels = draw_video(row, np.random.default_rng([seed, row]))
            path = f"val/{row:05d}"
            backwards = [reversed_label(label) for label in labels]
            lists["val"].append(write_video(part, path, frames, labels))
            lists["val"].append(write_video(part, f"{path}_reversed", frames[::-1], backwards))
            progress.update(row + 1)
        write_lines(part / "train.txt", lists["train"])
        write_lines(part / "val.txt", lists["val"])
        write_lines(part / "categories.txt", TOY_CATEGORIES)


def reversed_label(label):
    """The label of a toy video played backwards: motions come in pairs (0, 1), (2, 3), ..."""
    if label >= MOTIONS:
        return label  # a background looks the same backwards
    if label % 2 == 0:
        return label + 1
    return label - 1


def write_video(data_dir, path, frames, labels):
    """Write a toy video's frames; its list line is the result."""
    folder = data_dir / "frames" / path
    folder.mkdir(parents=True)
    for number, frame in enumerate(frames, 1):
        Image.fromarray(frame).save(folder / FRAME.format(number), quality=90)
    return list_line(Video(path, len(frames), labels, 0))


def draw_video(row, rng, frames=24, width=40, height=36):
    """A toy video: uint8 (frames, height, width, 3) and its labels. Every other row has two moving
    shapes instead of one, every fifth row a patterned background."""
    y, x = np.mgrid[:height, :width]
    t = np.arange(frames)[:, None, None]

    # a dark background with grain that does not move
    colour = rng.integers(40, 100, 3)
    grain = rng.normal(0, 5, (height, width, 1))
    video = np.tile(colour + grain, (frames, 1, 1, 1))

    # one motion for each shape, on different axes
    num_shapes = 1 + row % 2
    axes = rng.permutation(4)[:num_shapes]
    labels = [int(2 * axis + rng.integers(2)) for axis in axes]
    motions = [VELOCITIES[label] for label in labels]

    if row % 5 == 0:
        kind = int(rng.integers(2))
        labels.append(MOTIONS + kind)
        pattern = x // 4 % 2  # striped
        if kind == 0:
            pattern = (x // 4 + y // 4) % 2  # checkered
        video += 40 * pattern[..., None]

    for vx, vy in motions:
        distance = rng.uniform(1.2, 1.6) * t  # pixels, on each axis
        # each pixel's distances from the shape's centre, which wrap around at the edges
        dx = (x - rng.uniform(0, width) - vx * distance) % width - width / 2
        dy = (y - rng.uniform(0, height) - vy * distance) % height - height / 2
        bright = rng.integers(180, 256, 3)
        if rng.integers(2):
            shape = np.maximum(abs(dx), abs(dy)) < 5  # a square
        else:
            shape = dx**2 + dy**2 < 32                # a disc
        video[shape] = bright
    return video.clip(0, 255).astype(np.uint8), labels


# ---- extraction ----------------------------------------------------------------------------------

def extract(videos_dir, out, split="train", list_path=None, format="auto", workers=os.cpu_count(),
            pack=False, val=None):
    """Decode videos into OUT/frames and write OUT/<split>.txt and OUT/<split>_failed.txt.

    list_path None: every video below videos_dir, unlabelled. val: a fraction of the videos, which
    are then listed in val.txt and all others in train.txt. Returns the numbers of (extracted,
    failed) videos. A video's folder, or with pack its zip, gets its name only when it is whole, so
    an interrupted run can be started again.
    """
    require_ffmpeg()
    if not re.fullmatch(r"[\w-]+", split) or split == "categories" or split.endswith("_failed"):
        raise ValueError(f"--split {split}: a name such as train, of letters, digits, _ and -")
    if val is not None and not 0 < val < 1:
        raise ValueError(f"--val {val}: a fraction between 0 and 1, such as 0.2")
    splits = [split]
    if val is not None:
        splits = ["train", "val"]

    # what to decode
    out = Path(out)
    listed = paths_of_other_lists(out, splits, list_path)
    files = find_videos(videos_dir)
    videos = [Video(path, None, [], 0) for path in files]
    categories = None
    if list_path is not None:
        videos, categories = read_labels(list_path, format, out, listed)

    # decode
    extracted, failed = extract_videos(videos, files, out / "frames", split, workers, pack, listed)

    # write the lists
    write_lines(out / f"{split}_failed.txt", failed)
    if not extracted:
        return 0, len(failed)  # a list that is there stays
    parts = [extracted]
    if val is not None:
        parts = split_videos(extracted, val)
    refuse_what_came_meanwhile(out, categories, extracted,
                               paths_of_other_lists(out, splits, list_path))
    if categories is not None and not (out / "categories.txt").exists():
        write_lines(out / "categories.txt", category_lines(categories))
    for name, part in zip(splits, parts):
        write_list(out / f"{name}.txt", part)
    print_classes(categories, dict(zip(splits, parts)))
    return len(extracted), len(failed)


def paths_of_other_lists(out, splits, list_path):
    """{file_key of a path: (the list that names it, its Video)}, for all lists of the data folder
    but those of `splits`, which the command writes anew, and the one that it reads."""
    passed_over = {"categories.txt", *[f"{split}.txt" for split in splits]}
    listed = {}
    for file in sorted(out.glob("*.txt")):
        if file.name in passed_over or file.name.endswith("_failed.txt"):
            continue
        if list_path is not None and file.resolve() == Path(list_path).resolve():
            continue
        try:
            videos = read_list(file, "ours")
        except (ValueError, OSError):  # some other text file
            continue
        for video in videos:
            listed[file_key(video.path)] = (file, video)
    return listed


def refuse_what_came_meanwhile(out, categories, extracted, listed):
    """Raise a ValueError if another command wrote into the data folder while this one decoded, and
    the two contradict each other."""
    file = out / "categories.txt"
    if categories is not None and file.exists() and read_categories(out) != categories:
        raise ValueError(f"{file}: another command has written it meanwhile; run this one again")
    for video in extracted:
        if file_key(video.path) in listed:
            other, _ = listed[file_key(video.path)]
            raise ValueError(f"{other}: another command has written it meanwhile, and it names "
                             f"{video.path} too; run this one again")


def extract_videos(videos, files, frames_dir, split, workers, pack, listed):
    """Decode several videos at once. files: {file_key of a path: its Path}. listed: the result of
    paths_of_other_lists. Returns (the extracted Videos, with their numbers of frames; the lines
    "path, tab, reason" of failed ones)."""
    frames_dir.mkdir(parents=True, exist_ok=True)
    remove_leftovers(frames_dir, ".part-*")
    remove_leftovers(frames_dir.parent, "*.txt.part-*")
    temporary = frames_dir / f".part-{split}-{own_name()}"
    temporary.mkdir()
    kept_paths = []  # extracted earlier
    folders = set()
    for video in videos:
        folders.update(parent.as_posix() for parent in Path(video.path).parents)
    # a list reads "\" as "/", so no line can name these files
    unlistable = {key.replace("\\", "/") for key in files if "\\" in key}

    def work(row):
        """Decode a video -> (number of frames, None or what is wrong)."""
        try:
            return try_video(row)
        except OSError as error:  # one video's name or place must not stop the others
            if error.errno == errno.ENOSPC:
                raise
            return 0, str(error)

    def try_video(row):
        path = videos[row].path
        final = frames_dir / path
        key = file_key(path)
        if not can_be_listed(path):
            return 0, "no list line can hold this path: rename the file"
        if key in listed:
            other, _ = listed[key]
            return 0, (f"{other} names this path too: if it is another video, extract from a "
                       "folder whose sub-folder has another name; if one video belongs in both "
                       "lists, copy its line")
        count = current_frames(final, files.get(key))
        if count > 0:
            kept_paths.append(path)
            return count, None
        if key not in files and path in unlistable:
            return 0, "no list line can hold the name of this file: rename it"
        if key not in files:
            return 0, "no such video"
        if path in folders and not pack:
            return 0, "a folder of this name holds videos too: rename the file or the folder"
        return extract_video(files[key], final, temporary / str(row), pack)

    extracted = []
    failed = []
    progress = Progress("videos", len(videos))
    # threads suffice, because ffmpeg does the work in processes of its own
    pool = concurrent.futures.ThreadPoolExecutor(workers)
    try:
        for video, (count, problem) in zip(videos, pool.map(work, range(len(videos)))):
            if problem:
                failed.append(f"{video.path}\t{problem}")
            else:
                extracted.append(video._replace(frames=count))
            progress.update(len(extracted) + len(failed))
    finally:  # also after Ctrl-C; finished videos stay
        pool.shutdown(cancel_futures=True)
        shutil.rmtree(temporary, ignore_errors=True)

    if kept_paths:
        print(f"{len(kept_paths)} of {len(videos)} videos were extracted earlier; their frames are "
              "kept", file=sys.stderr)
    return extracted, failed


def extract_video(file, final, folder, pack):
    """Decode one video into the folder `final`, or with pack its zip -> (number of frames, None or
    the problem). folder: a temporary place for the frames."""
    folder.mkdir()
    count, message = decode_video(file, folder)
    if count == 0:
        return 0, message
    if message:
        print(f"{file}: {count} frames kept; {message}", file=sys.stderr)
    try:
        put_frames(folder, final, pack)
    except OSError:
        count = current_frames(final, file)  # another extraction may have put its frames there
        if count == 0:
            raise
    return count, None


def current_frames(final, file):
    """The number of a video's frames, in their folder or zip; 0 if they are missing, or older than
    the video file, as in make."""
    count = count_frames(final)
    if count == 0 or file is None or not file.exists():  # a link may lead nowhere
        return count
    try:
        written = os.path.getmtime(packed_file(final) or final / FRAME.format(1))
    except FileNotFoundError:  # another extraction is replacing them
        return 0
    if written < os.path.getmtime(file):
        return 0
    return count


def put_frames(folder, final, pack):
    """Move a folder of new frames, or with pack their zip, to its place `final`. Frames that an
    earlier extraction left there are moved away."""
    has_frames = (final / FRAME.format(1)).exists()
    if final.is_dir() and (has_frames or not pack):
        if any(entry.is_dir() or entry.name.endswith(".zip") for entry in os.scandir(final)):
            raise OSError(f"{final} holds other videos too: rename the file or the folder")
    final.parent.mkdir(parents=True, exist_ok=True)
    packed = Path(f"{final}.zip")
    older = Path(f"{folder}.old")  # goes with the temporary folder

    if pack:
        os.replace(pack_folder(folder), packed)
    if has_frames or (final.is_dir() and not pack):
        with contextlib.suppress(FileNotFoundError):  # another extraction may do the same
            os.replace(final, older)
    if not pack:
        os.replace(folder, final)
        if packed.is_file():
            packed.unlink(missing_ok=True)


def decode_video(file, folder, progress=False):
    """FFmpeg writes a video's frames into a folder: 30 a second, short side 320, as in the report.
    Returns (number of frames, "" or FFmpeg's complaint). What can be decoded of a damaged video is
    kept. The frames are counted, because what the file says about their number is often wrong."""
    filters = ("setpts=PTS-STARTPTS,"  # if the sound starts first, do not fill the gap with copies
               "fps=30,"
               "scale='if(gte(iw,ih),-2,320)':'if(gte(iw,ih),320,-2)'"
               ":out_color_matrix=bt601")  # JPEG's colours; HD videos have those of BT.709
    command = ["ffmpeg", "-nostdin", "-v", "error", "-threads", "1",
               "-reinit_filter", "0",  # one size for all frames, even if the video changes its own
               "-i", f"file:{os.path.abspath(file)}", "-vf", filters,
               "-q:v", "2", "-start_number", "1", "img_%05d.jpg"]
    # a session of its own: Ctrl-C must not make ffmpeg end early with half of the frames
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                          start_new_session=True) as process:
        complaint = None
        try:
            while complaint is None:
                try:
                    _, complaint = process.communicate(timeout=5)
                except subprocess.TimeoutExpired:
                    if progress:
                        print(f"{file}: {count_frames(folder)} frames so far", file=sys.stderr)
        finally:
            process.kill()  # only if it is still running, after Ctrl-C
    complaint = complaint.decode(errors="replace").strip()
    first_line = complaint.split("\n")[0]
    message = ""
    if first_line:
        message = "ffmpeg: " + re.sub(" @ 0x[0-9a-f]+", "", first_line)  # without an address
    elif process.returncode != 0:
        message = f"ffmpeg: status {process.returncode}"

    if "No space left on device" in complaint or "Disk quota exceeded" in complaint:
        raise OSError(errno.ENOSPC, "no space left on the disk; free some, then run the command "
                                    "again")
    if process.returncode < 0 or process.returncode == 255:  # 255: it caught the signal
        return 0, f"ffmpeg was stopped (status {process.returncode}); run the command again"
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


def can_be_listed(path):
    """Whether a reader of the list would find this path in its line. It would not if a file name
    holds a line break or bytes that are not UTF-8."""
    line = list_line(Video(path, 1, [], 0))
    try:
        line.encode()
        return parse_line(line.strip(), 0, "ours").path == path and len(line.splitlines()) == 1
    except ValueError:  # a UnicodeEncodeError is one too
        return False


def read_labels(list_path, format, out, listed):
    """The videos of a list, with ids for labels, and the names of the classes (None: unknown).

    The labels of a csv may be class names. With OUT/categories.txt there, names are looked up in
    it and ids are checked against it; otherwise the names that occur, sorted, become the classes.
    """
    file = Path(out, "categories.txt")
    known = None
    num_classes = None
    if file.exists():
        known = read_categories(out)
        num_classes = len(known)
    by_key = {}  # a path in both of Unicode's forms is one video
    for video in read_list(list_path, format, num_classes):
        key = file_key(video.path)
        if key in by_key:
            video = merge(by_key[key], video)
        by_key[key] = video
    videos = list(by_key.values())
    num_lines = len(numbered_lines(read_text(list_path)))
    if num_lines > len(videos):
        print(f"{list_path}: {describe_lines(num_lines, len(videos))}", file=sys.stderr)

    names = set()
    for video in videos:
        names.update(label for label in video.labels if isinstance(label, str))
    if not names:
        return videos, known
    for other, video in listed.values():
        if known is None and video.labels:
            raise ValueError(f"{file}: missing, but the ids in {other} belong to it; restore it, "
                             "or name another --out")

    # class names -> ids
    categories = known or sorted(names)
    ids = {name: number for number, name in enumerate(categories)}
    for row, video in enumerate(videos):
        for label in video.labels:
            if not isinstance(label, str):
                raise ValueError(f"{list_path}:{video.line}: the id {label}, but other lines hold "
                                 "class names; write one or the other")
            if looks_joined(label) and label not in (known or []):
                raise ValueError(f"{list_path}:{video.line}: {label!r} looks like several labels; "
                                 "write each in a field of its own (name.mp4,run,jump), or, if it "
                                 f"is one class, write the names of all classes into {file} "
                                 "first")
            if label not in ids:
                raise ValueError(f"{list_path}:{video.line}: the class {label!r} is not in {file}; "
                                 "if it is a new class, append its name there")
        videos[row] = video._replace(labels=[ids[label] for label in video.labels])
    return videos, categories


def looks_joined(label):
    """Whether a class name is probably several: run|jump, "run, jump", ['run', 'jump']."""
    return re.search(r"""[|;,\t"]|^[\[({]\s*'""", label) is not None


def write_list(path, videos):
    """Write a list. If it takes the place of one with other lines, say so."""
    lines = [list_line(video) for video in videos]
    before = []
    if path.exists():
        before = path.read_text("utf-8-sig", errors="replace").splitlines()
    write_lines(path, lines)
    if before and before != lines:
        paths = {video.path for video in videos}
        listed = [FORMATS["ours"][1].fullmatch(line.strip()) for line in before]
        gone = [match["path"] for match in listed if match and match["path"] not in paths]
        print(f"{path}: replaced; it had {len(before)} lines, the paths of {len(gone)} are no "
              f"longer listed, and it has {len(lines)} now", file=sys.stderr)


def print_classes(categories, lists):
    """After an extraction: the number of classes and labels, the most and the least frequent class,
    and classes that one side of --val lacks, so that a mistake in a list is seen.
    lists: {name: its Videos}. categories None: only ids are known."""
    counts = {}
    for name, videos in lists.items():
        counts[name] = collections.Counter()
        for video in videos:
            counts[name].update(video.labels)
    total = sum(counts.values(), collections.Counter())
    if not total:
        return
    if categories is None:
        names = {label: str(label) for label in sorted(total)}
    else:
        names = dict(enumerate(categories))

    mean_labels = total.total() / sum(map(len, lists.values()))
    extremes = describe_extremes(list(names.values()), np.array([total[label] for label in names]))
    print(f"{len(names)} classes, {mean_labels:.2f} labels a video; {extremes}")
    for name, count in counts.items():
        absent = [names[label] for label in sorted(total) if label not in count]
        if absent:
            print(f"{name}.txt has no video of these classes: {', '.join(absent)}")


def describe_extremes(categories, counts):
    most = counts.argmax()
    fewest = counts.argmin()
    return (f"most videos: {categories[most]} ({counts[most]}), fewest: {categories[fewest]} "
            f"({counts[fewest]})")


def split_videos(videos, fraction):
    """Videos -> (training videos, validation videos), each in their order. Videos are ordered by a
    hash of their path; the first ones go to validation, at least one and never all. So the same
    videos are always split alike."""
    if len(videos) < 2:
        raise ValueError(f"--val {fraction}: {len(videos)} extracted videos cannot be split, it "
                         "takes 2; train_failed.txt says what is wrong with the others")

    def hash_of_path(video):
        return zlib.crc32(video.path.encode()), video.path

    count = round(fraction * len(videos))
    count = min(max(count, 1), len(videos) - 1)
    chosen = {video.path for video in sorted(videos, key=hash_of_path)[:count]}
    train = [video for video in videos if video.path not in chosen]
    val = [video for video in videos if video.path in chosen]
    return train, val


# ---- check ---------------------------------------------------------------------------------------

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
    seen = {}  # path -> the list that names it
    for split in splits:
        videos = VideoList(data_dir, split)
        progress = Progress(videos.file.name, len(videos))
        for row in range(len(videos)):
            path = videos.path(row)
            problem = check_frames(videos.folder(row), int(videos.num_frames[row]))
            if problem:
                problems.append(f"{videos.place(row)}: {path}: {problem}")
            if path in seen:
                problems.append(f"{videos.place(row)}: {path} is also in {seen[path]}")
            seen[path] = videos.file
            progress.update(row + 1)

        print(describe_videos(videos))
        print(f"  {describe_extremes(videos.categories, videos.class_counts)}")
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
    present = names & expected
    if len(present) != count:
        return f"{len(present)} of {count} frames"
    if names != expected:
        return f"{len(names - expected)} files that are not among its {count} frames"
    try:
        read_frames(folder, [0, count // 2, count - 1])
    except OSError as error:
        return str(error)
    return None


# ---- what the scripts share ----------------------------------------------------------------------

@contextlib.contextmanager
def replacing(path):
    """A temporary name beside `path` for a new file or folder, which takes the name `path` when the
    block ends well. When it does not, it is removed, and nothing is left half-written."""
    path = Path(path)
    part = path.with_name(f"{path.name}.part-{own_name()}")
    try:
        yield part
        try:
            os.replace(part, path)
        except OSError:
            if not path.is_dir():
                raise
            # a folder, unlike a file, is not overwritten
            raise FileExistsError(f"{path}: another process has made it meanwhile") from None
    finally:
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink(missing_ok=True)


def own_name():
    """The process's number, and four random bytes: in containers the number is always the same."""
    return f"{os.getpid()}-{os.urandom(4).hex()}"


def remove_leftovers(folder, pattern):
    """Remove temporary files and folders of runs that were killed. Those of runs that are at work,
    perhaps on another machine, are younger than an hour."""
    for part in folder.glob(pattern):
        with contextlib.suppress(OSError):  # another process may remove it too
            # a folder is changed by each new file in it, but not by files further down
            changes = [part.stat().st_mtime]
            changes += [os.path.getmtime(inner) for inner, _, _ in os.walk(part)]
            if time.time() - max(changes) < 3600:
                continue
            if part.is_dir():
                shutil.rmtree(part, ignore_errors=True)
            else:
                part.unlink()


def write_lines(path, lines):
    lines = [line.replace("\n", "\\n") for line in lines]  # a file name may hold a line break
    text = "".join(f"{line}\n" for line in lines)
    with replacing(path) as part:
        # in a list of failures a file name may hold bytes that are not UTF-8
        part.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")


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
        stream.reconfigure(errors="replace")  # a character that the console cannot show becomes a ?
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
        # When one of several processes ends, the others lose their connection to it, which is
        # "closed by peer" or "reset by peer".
        if "by peer" not in str(error):
            raise
        print(f"{script}: another process has ended; its own line says why", file=sys.stderr,
              flush=True)
        status = 2
    except KeyboardInterrupt:
        print(f"{script}: {stopped}", file=sys.stderr, flush=True)
        status = 130
    sys.exit(status)


def at_least(low, kind=int):
    """For argparse's `type`: a finite number from `low` on."""
    def number(text):
        value = kind(text)
        if not low <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text}: at least {low}")
        return value

    return number


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="data.py toy OUT | extract --videos DIR --out DATA ... | check DATA   (--help)")
    commands = parser.add_subparsers(dest="command", required=True, prog="data.py")

    toy = commands.add_parser("toy", help="draw the toy videos into a new folder",
                              usage="data.py toy OUT [--videos N] [--seed S]")
    toy.add_argument("out", metavar="OUT", help="a folder that is not there yet")
    toy.add_argument("--videos", type=at_least(8), default=1200,
                     help="videos for training; a quarter as many validate (%(default)s)")
    toy.add_argument("--seed", type=at_least(0), default=0,
                     help="of the random drawing (%(default)s)")

    extraction = commands.add_parser(
        "extract", help="decode videos and write their list",
        usage="data.py extract --videos DIR [--list FILE] --out DATA --split NAME | --val FRACTION")
    add = extraction.add_argument
    add("--videos", required=True, metavar="DIR", help="the folder of videos; sub-folders count")
    add("--list", metavar="FILE", help="which videos, with their labels (default: all, unlabelled)")
    add("--format", default="auto", choices=["auto", *FORMATS],
        help="the form of the list; auto tells ours from csv (%(default)s)")
    add("--out", required=True, metavar="DATA", help="the data folder to fill")
    splits = extraction.add_mutually_exclusive_group(required=True)
    splits.add_argument("--split", help="write DATA/SPLIT.txt; a name such as train")
    splits.add_argument("--val", type=float, metavar="FRACTION",
                        help="write train.txt and val.txt, this part of the videos in val.txt. "
                             "Clips cut from one film may fall on both sides: for these write two "
                             "lists, and pass --split train, then --split val")
    add("--pack", action="store_true", help="one zip a video instead of a folder of frames")
    add("--workers", type=at_least(1), default=os.cpu_count(),
        help="videos decoded at once (%(default)s)")

    checking = commands.add_parser("check", help="compare the lists with the frames",
                                   usage="data.py check DATA")
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
    print(f"{extracted} videos extracted, {failed} failed")
    if failed > 0:
        print(f"why: {args.out}/{split}_failed.txt")
    if extracted == 0:
        return 2
    if not Path(args.out, "categories.txt").exists():
        print(f"next: write the class names into {args.out}/categories.txt, one a line")
    print(f"next: python data.py check {args.out}")
    return 0


if __name__ == "__main__":
    run_script(main, "stopped; run the same command again to go on")
