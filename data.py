"""Videos -> frames -> lists -> clips, and the toy videos.

    python data.py toy OUT                                         draw small videos whose labels are motions
    python data.py extract --videos DIR --out DATA --split train   FFmpeg: 30 frames a second, short side 320
    python data.py check DATA                                      every list against the frames it names

A data folder:
    categories.txt                   one name a line: the line number, from 0, is the label's id
    train.txt  val.txt  [test.txt]   path num_frames label[,label...]      (label -1: unlabelled)
    frames/<path>/img_00001.jpg ...  or, from extract --pack, frames/<path>.zip with these in it
One clip's way: list line -> frame indices -> only those JPEGs are decoded -> one crop and flip for the whole clip ->
uint8 (T, H, W, 3), a quarter of the bytes of floats; normalising is the device's work. All that is random about a clip
comes from np.random.default_rng([seed, epoch, row]): it depends on no worker, no process and no earlier clip.
N frames in a video, T in a clip, H, W pixels. Indices count from 0: index i is the file img_(i + 1).jpg.
"""
import argparse
import concurrent.futures
import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

ENDING = re.compile(r"(\.(mp4|m4v|avi|mkv|mov|webm|mpe?g|flv|wmv|3gp))+$", re.IGNORECASE)  # of a video file
FRAME = "img_{:05d}.jpg"


class Video(NamedTuple):
    path: str  # without a video file's ending
    frames: int | None  # None: the list's format does not say
    labels: list  # ids, each once


def read_list(path, format="auto", num_classes=None):
    """A list file -> [Video, ...] in its order, without repeated paths and videos of 0 frames.
    format: "mmit" (M-MiT's csv: name.mp4,id,...), "xtemporal" (path frames id,...; also ours), "mmaction2" (path
    frames id id ..., or name.mp4 id id ...), or "auto". Raises ValueError with the file and line."""
    return [video for _, video in numbered_list(path, format, num_classes).values()]


def numbered_list(path, format="auto", num_classes=None):
    """{a video's path: (its line in the list file, Video)}; errors as in read_list."""
    lines = [(number, line.strip()) for number, line in enumerate(read_text(path).split("\n"), 1) if line.strip()]
    endings = any(ENDING.search(re.split(r"[\s,]", line)[0]) for _, line in lines)
    format = list_format(path, [line.split() for _, line in lines], endings) if format == "auto" else format
    videos = {}
    for number, line in lines:
        try:
            video = parse_line(line, format, counted=format == "xtemporal" or not endings)
            if num_classes and max(video.labels, default=0) >= num_classes:
                raise ValueError(f"label {max(video.labels)}, but the categories end at {num_classes - 1}")
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
        if video.frames != 0:
            videos.setdefault(video.path, (number, video))
    if not videos:
        raise ValueError(f"{path}: lists no video")
    return videos


def list_format(path, lines, endings):
    """Which format a file has, from the fields of all its lines: a single line can often be read as two."""
    if all(len(fields) == 1 for fields in lines):
        return "mmit"
    if any("," in fields[-1] for fields in lines):
        return "xtemporal"
    if endings and all(len(fields) == 3 for fields in lines):
        raise ValueError(f"{path}: the second field can be a frame count or a label; say which with "
                         "--format xtemporal (frames) or --format mmaction2 (a label)")
    return "mmaction2"


def parse_line(line, format, counted):
    """A list line -> Video. counted: an mmaction2 line's second field is its frame count. Raises ValueError."""
    name, *labels = line.split("," if format == "mmit" else None)
    if format == "mmit" and len(labels) == 3 and labels[0][:1].isalpha():
        raise ValueError("this is the single-label Moments in Time (name, category, two counts of votes), not M-MiT")
    frames = labels.pop(0) if counted and labels and format != "mmit" else None
    if format == "xtemporal":
        if len(labels) != 1:
            raise ValueError("expected three fields: path frames label[,label...]")
        labels = labels[0].split(",")
    if not labels:
        raise ValueError("no label; write -1 for a video without labels")
    for number in labels if frames is None else [frames, *labels]:
        if not re.fullmatch("[0-9]{1,15}", number) and (number != "-1" or labels != ["-1"] or number is frames):
            raise ValueError(f"{number!r} is not a whole number from 0 up" + ", nor a lone -1" * (number is not frames))
    path = ENDING.sub("", name)
    if {"", ".."} & set(path.split("/")):
        raise ValueError(f"{name!r} is not a place below the data folder's frames, such as some/video")
    labels = [] if labels == ["-1"] else list(dict.fromkeys(map(int, labels)))
    return Video(path, None if frames is None else int(frames), labels)


def read_text(path):
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a text file in UTF-8") from None


def read_categories(data_dir):
    """DATA/categories.txt -> the category names by id. A line is a name, or name,id as M-MiT writes it."""
    path = Path(data_dir) / "categories.txt"
    names = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    if all(re.search(r",\d+$", name) for name in names):
        ids, names = zip(*sorted((int(name.split(",")[-1]), name.rsplit(",", 1)[0]) for name in names or ["none,1"]))
        if ids != tuple(range(len(ids))):
            raise ValueError(f"{path}: write one name a line, or name,id with the ids from 0 up, each once")
    return list(names)


def segment_indices(num_frames, segments, rng=None):
    """One frame from each of `segments` equal parts, for any num_frames >= 1: int array (segments,).
    rng None: the middle of each. Otherwise a random place in it; the authors' code rounds the parts down, and so never
    trains on a video's last frames. Report: "evenly select"; TSN's paper, section 3."""
    k = np.arange(segments)
    if rng is None:
        return (2 * k + 1) * num_frames // (2 * segments)
    return np.minimum((k + rng.random(segments)) * num_frames / segments, num_frames - 1).astype(int)


def clip_indices(num_frames, length, stride, start):
    """`length` frames from `start`, `stride` apart; where the video ends it begins anew. int array (length,)."""
    return (start + stride * np.arange(length)) % num_frames


def clip_starts(num_frames, length, stride, views):
    """The starts of `views` clips, evenly from a video's first frame to its end; of one clip, the middle. (views,)"""
    room = max(0, num_frames - length * stride)
    return np.array([room // 2]) if views == 1 else room * np.arange(views) // (views - 1)


def sample_indices(num_frames, recipe, rng=None):
    """The frames of a training clip, drawn as the recipe's `sampling` says, or without rng of the middle clip: (T,)."""
    if recipe["sampling"] == "segments":
        return segment_indices(num_frames, recipe["frames"], rng)
    room = max(0, num_frames - recipe["frames"] * recipe["stride"])
    return clip_indices(num_frames, recipe["frames"], recipe["stride"], rng.integers(room + 1) if rng else room // 2)


def multiscale_box(width, height, target, rng):
    """TSN's multi-scale crop ("spatial jittering"): the part (x, y, w, h) of a frame to be resized to target x target.
    w and h are 1, .875, .75 or .66 of the short side, at most one step apart; within 2 pixels of the target they become
    the target, which spares the resize. It lies at one of 13 places, quarters of the room to the right and down."""
    places = [(0, 0), (4, 0), (0, 4), (4, 4), (2, 2), (0, 2), (4, 2), (2, 4), (2, 0), (1, 1), (3, 1), (1, 3), (3, 3)]
    sides = [int(min(width, height) * scale) for scale in (1, 0.875, 0.75, 0.66)]
    sides = [target if abs(side - target) < 3 and target <= min(width, height) else side for side in sides]
    pairs = [(w, h) for i, w in enumerate(sides) for j, h in enumerate(sides) if abs(i - j) <= 1]  # 10 of 16
    (w, h), (right, down) = pairs[rng.integers(len(pairs))], places[rng.integers(len(places))]
    return right * ((width - w) // 4), down * ((height - h) // 4), w, h


def jitter_box(width, height, target, jitter, rng):
    """SlowFast's crop: the short side is resized to one drawn from `jitter`, then target x target cut out at random.
    Only what is cut out needs the resize: this is the part (x, y, w, h) of the frame that becomes target x target. Its
    side is rounded to whole pixels, by at most half of one, and it may lie at each of them."""
    side = round(target * min(width, height) / rng.integers(jitter[0], jitter[1] + 1))
    y, x = (int(rng.integers(room - side + 1)) for room in (height, width))
    return x, y, side, side


def read_frames(folder, indices, box=None, draft=None):
    """Frames of a video by index, from its folder or else its zip -> uint8 (T, h, w, 3); each is decoded once.
    box: (width, height) -> the part (x, y, w, h) to keep. draft: JPEGs come at 1/2, 1/4 or 1/8 of their size, box and
    all, where the short side is then still this long: faster. Raises OSError with the file's name."""
    pixels, path = {}, f"{folder}.zip"
    packed = os.path.exists(path) and not os.path.exists(os.path.join(folder, FRAME.format(1)))
    try:
        with zipfile.ZipFile(path) if packed else contextlib.nullcontext() as archive:
            for index in dict.fromkeys(indices):
                name = FRAME.format(index + 1)
                path = os.path.join(f"{folder}.zip" if packed else folder, name)
                with Image.open(io.BytesIO(archive.read(name)) if packed else path) as image:
                    if draft:
                        image.draft(None, (draft, draft))
                    if not pixels:  # one box for the whole clip
                        size = image.size
                        x, y, w, h = box(*size) if box else (0, 0, *size)
                    if image.size != size:
                        raise OSError("its size is not that of the clip's first frame")
                    image = image if image.mode == "RGB" else image.convert("RGB")
                    pixels[index] = np.asarray(image.crop((x, y, x + w, y + h)))
    except Exception as error:  # Pillow and zipfile let through whatever the bytes did to them
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else getattr(error, "strerror", None)
        raise OSError(f"{path}: {reason or str(error) or repr(error)}") from None
    return torch.from_numpy(np.stack([pixels[index] for index in indices]))


def resize(frames, size):
    """uint8 (T, h, w, 3) at size (width, height) or short side `size`, bilinear and antialiased as in Pillow."""
    h, w = frames.shape[1:3]  # the long side is rounded down, as torchvision does
    width, height = size if isinstance(size, tuple) else (size, size * h // w) if w < h else (size * w // h, size)
    if (w, h) == (width, height):
        return frames
    out = torch.nn.functional.interpolate(frames.permute(0, 3, 1, 2), (height, width), mode="bilinear", antialias=True)
    return out.permute(0, 2, 3, 1)


def make_clip(folder, indices, recipe, rng=None):
    """Decode the frames of a clip and cut them to size: one crop, one flip for all of them. uint8 (T, crop, crop, 3).
    rng None: the one evaluation view, short side test_resize, centre test_crop. Else the recipe's augmentation."""
    if rng is None:
        clip, crop = resize(read_frames(folder, indices), recipe["test_resize"]), recipe["test_crop"]
        y, x = (round((side - crop) / 2) for side in clip.shape[1:3])
        return clip[:, y : y + crop, x : x + crop].contiguous()
    crop = recipe["crop"]
    if recipe["augment"] == "multiscale":  # report, image models
        clip = read_frames(folder, indices, lambda w, h: multiscale_box(w, h, crop, rng))
    else:  # "jitter": report, SlowFast
        clip = read_frames(folder, indices, lambda w, h: jitter_box(w, h, crop, recipe["jitter"], rng),
                           draft=recipe["jitter"][1] if recipe.get("draft", False) else None)
    clip = resize(clip, (crop, crop))
    return (clip.flip(2) if recipe["flip"] and rng.random() < 0.5 else clip).contiguous()


class VideoList(torch.utils.data.Dataset):
    """DATA/<split>.txt and its frames. An item: (clip uint8 (T, H, W, 3), labels float32 (num_classes,), row).
    train: a random, augmented clip; index epoch * len + row is the row as that epoch draws it. Else the recipe's one
    evaluation view, or with views, a function, the item (row, views(read, num_frames, path)). An unreadable video is an
    OSError with its list line; with skip_broken, training takes the next readable row, at most 10 further on."""
    def __init__(self, data_dir, split, recipe, train, seed=0, skip_broken=False, views=None):
        self.list, self.frames_dir = Path(data_dir) / f"{split}.txt", Path(data_dir) / "frames"
        self.recipe, self.train, self.seed, self.views, self.skip_broken = recipe, train, seed, views, skip_broken
        self.categories = read_categories(data_dir)
        self.lines, self.videos = map(list, zip(*numbered_list(self.list, num_classes=len(self.categories)).values()))
        if self.videos[0].frames is None:
            raise ValueError(f"{self.list}: no frame counts; python data.py extract --list {self.list} ... makes them")
        self.left_out = sum(bool(line.strip()) for line in read_text(self.list).splitlines()) - len(self.videos)

    def __len__(self):
        return len(self.videos)

    def __getitem__(self, index):
        epoch, first = divmod(index, len(self))
        for row in ((first + step) % len(self) for step in range(11 if self.train and self.skip_broken else 1)):
            path, frames, ids = self.videos[row]
            folder, rng = self.frames_dir / path, np.random.default_rng([self.seed, epoch, row]) if self.train else None
            try:
                if self.views:
                    return row, self.views(lambda indices: read_frames(folder, indices), frames, path)
                clip = make_clip(folder, sample_indices(frames, self.recipe, rng), self.recipe, rng)
                return clip, torch.zeros(len(self.categories)).index_fill(0, torch.tensor(ids).long(), 1), row
            except OSError as error:
                problem = OSError(f"{self.list}:{self.lines[row]}: {error}")
        raise problem


def normalise(clips, mean, std, channels_last=False):
    """uint8 (B, T, H, W, 3) -> float32 (B, T, 3, H, W) on the same device: scaled to 0..1, minus mean, over std."""
    mean, std = (torch.tensor(value, device=clips.device).view(3, 1, 1) for value in (mean, std))
    clips = clips.permute(0, 1, 4, 2, 3)  # in memory still pixel by pixel, which is what channels_last means
    return ((clips if channels_last else clips.contiguous()) / 255).sub_(mean).div_(std)


def leave_process_group(_):
    """A loader's worker leaves the process group: signals to all of it, such as Ctrl-C, reach the main process alone,
    which finishes its step first. (Not deaf to SIGTERM: by that the main process ends its workers.)"""
    os.setpgrp()


TOY_CATEGORIES = ["moving+right", "moving+left", "moving+down", "moving+up", "moving+down+right", "moving+up+left",
                  "moving+up+right", "moving+down+left", "checkered+ground", "striped+ground"]
VELOCITIES = [(1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, -1), (1, -1), (-1, 1)]  # of label ^ 1: the reverse


def draw_toy(out, videos=1200, seed=0):
    """Draw the toy into the new folder `out`: `videos` for training, a quarter as many for validation.
    One or two shapes drift over a torus, each on its own axis: labels that no single frame shows. Every fifth video has
    a patterned ground: a label that every frame shows. Validation holds each video with its reversal, and 24 frames are
    an odd multiple of 8 segments: both have the same middle frames, so a model blind to order scores both alike."""
    out, part, pairs = Path(out), Path(f"{out}.part-{os.getpid()}"), videos // 8
    if videos < 8 or seed < 0 or os.path.lexists(out):
        raise ValueError(f"{out}: already there; name a new folder" if os.path.lexists(out) else
                         f"--videos {videos} --seed {seed}: at least 8 and 0")
    lists, started = {"train": [], "val": [], "categories": TOY_CATEGORIES}, time.time()
    try:
        for row in range(videos + pairs):
            split = "train" if row < videos else "val"
            frames, labels = draw_video(row, np.random.default_rng([seed, row]))
            backwards = "_reversed", frames[::-1], [label ^ (label < len(VELOCITIES)) for label in labels]
            for ending, frames, labels in [("", frames, labels)] + [backwards] * (split == "val"):
                path = f"{split}/{row:05d}{ending}"
                (part / "frames" / path).mkdir(parents=True)
                for i, frame in enumerate(frames, 1):
                    Image.fromarray(frame).save(part / "frames" / path / FRAME.format(i), quality=90)
                lists[split].append(f"{path} {len(frames)} {','.join(map(str, labels))}")
            progress("toy videos", row + 1, videos + pairs, started)
        for name, lines in lists.items():
            write_lines(part / f"{name}.txt", lines)
        os.replace(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def draw_video(row, rng, frames=24, width=40, height=36):
    """uint8 (frames, height, width, 3) and its labels: two movers in every other row, a pattern in every fifth."""
    y, x = np.mgrid[:height, :width]
    video = np.tile(rng.integers(40, 100, 3) + rng.normal(0, 5, (height, width, 1)), (frames, 1, 1, 1))  # grain at rest
    labels = [int(2 * axis + rng.integers(2)) for axis in rng.permutation(4)[: 1 + row % 2]]
    if row % 5 == 0:
        labels.append(len(VELOCITIES) + int(rng.integers(2)))
        video += 40 * ((x // 4 + (y // 4 if labels[-1] == len(VELOCITIES) else 0)) % 2)[..., None]
    for vx, vy in [VELOCITIES[label] for label in labels[: 1 + row % 2]]:
        way = rng.uniform(1.2, 1.6) * np.arange(frames)[:, None, None]  # pixels a frame, on each axis
        dx = (x - rng.uniform(0, width) - vx * way) % width - width / 2  # on the torus: from -width/2 to width/2
        dy = (y - rng.uniform(0, height) - vy * way) % height - height / 2
        video[np.maximum(abs(dx), abs(dy)) < 5 if rng.integers(2) else dx**2 + dy**2 < 32] = rng.integers(180, 256, 3)
    return video.clip(0, 255).astype(np.uint8), labels


def extract(videos_dir, out, split, list_path=None, format="auto", workers=os.cpu_count(), pack=False):
    """Decode videos into OUT/frames and write OUT/<split>.txt and OUT/<split>_failed.txt -> (whole, failed) counts.
    A folder of frames, or with pack a zip, gets its name when whole, so a stopped run can go on. Frames are counted:
    neither the container's own number nor rate x duration is right."""
    if not 1 <= workers <= 1000 or shutil.which("ffmpeg") is None:
        raise ValueError(f"--workers {workers}: from 1 to 1000" if shutil.which("ffmpeg") else
                         "the program ffmpeg is missing; Debian: apt install ffmpeg, macOS: brew install ffmpeg")
    if not re.fullmatch(r"[\w-]+", split) or split == "categories":
        raise ValueError(f"--split {split}: a name such as train, of letters and digits")
    files = find_videos(videos_dir)
    videos = read_list(list_path, format) if list_path else [Video(path, None, []) for path in files]
    (frames_dir := Path(out) / "frames").mkdir(parents=True, exist_ok=True)
    part = frames_dir / f".part-{split}"
    shutil.rmtree(part, ignore_errors=True)  # of a run that was killed

    def work(video):
        """Decode a video, if that is still to do -> the list it belongs in and its line there."""
        final, file, problem = frames_dir / video.path, files.get(os.path.normpath(video.path)), None
        if re.search(r"[\s\udc80-\udcff]", video.path):
            problem = "white space, or a byte that is not UTF-8, in the path: no list line can hold it"
        elif FRAME.format(1) not in frame_names(final):
            problem = decode_video(file, part / str(id(video)), final, pack) if file else "no such video"
        if problem:
            return failed, f"{video.path}\t{problem}"
        return whole, f"{video.path} {len(frame_names(final))} {','.join(map(str, video.labels or [-1]))}"

    whole, failed, started = [], [], time.time()
    pool = concurrent.futures.ThreadPoolExecutor(workers)  # threads will do: the work is ffmpeg's
    try:
        for lines, line in pool.map(work, videos):
            lines.append(line)
            progress("videos", len(whole) + len(failed), len(videos), started)
    finally:  # also when interrupted: what is whole stays
        pool.shutdown(cancel_futures=True)
        shutil.rmtree(part, ignore_errors=True)
    write_lines(Path(out) / f"{split}_failed.txt", failed)
    write_lines(Path(out) / f"{split}.txt", whole)
    return len(whole), len(failed)


def frame_names(folder):
    """The names in a video's folder or, if no first frame is there, in its zip, if that is not broken."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    with contextlib.suppress(Exception), zipfile.ZipFile(f"{folder}.zip") as archive:
        names = names if FRAME.format(1) in names else archive.namelist()
    return names


def find_videos(folder):
    """Every video file below a folder: {its place there without the ending: its Path}, sorted."""
    found, closed = {}, []
    for file in sorted(Path(top, name) for top, _, names in os.walk(folder, onerror=closed.append) for name in names):
        path = ENDING.sub("", file.relative_to(folder).as_posix())
        if ENDING.search(file.name) and found.setdefault(path, file) is not file:
            raise ValueError(f"{found[path]} and {file} would both be called {path}: rename one of them")
    if closed or not found:  # closed: folders that cannot be read, whose videos would be missing without a word
        raise closed[0] if found else ValueError(f"{folder}: no such folder, or no video in it ({ENDING.pattern})")
    for path, parent in ((path, str(parent)) for path in found for parent in Path(path).parents):
        if parent in found:
            raise ValueError(f"{found[parent]} and {found[path]}: one's frames would lie among the other's: rename one")
    return found


def ffmpeg(file, *output, **options):
    """FFmpeg's (output, None or what went wrong) on a video: JPEGs, 30 a second, short side 320, as in the report."""
    command = ["ffmpeg", "-nostdin", "-v", "error", "-xerror", "-threads", "1", "-i", f"file:{os.path.abspath(file)}",
               "-vf", "fps=30,scale='if(gte(iw,ih),-2,320)':'if(gte(iw,ih),320,-2)'", "-q:v", "2", *output]
    run = subprocess.run(command, capture_output=True, **options)  # -xerror: a cut-off file would end with status 0
    said = re.sub(" @ 0x[0-9a-f]+", "", run.stderr.decode(errors="replace")).strip().split("\n")[0]  # no address
    return run.stdout, f"ffmpeg: {said or f'status {run.returncode}'}" if run.returncode else None


def decode_video(file, temporary, final, pack):
    """FFmpeg on one video: its frames into the folder `temporary`, which is then renamed to `final`, or packed into
    final.zip, uncompressed. None, or what went wrong."""
    temporary.mkdir(parents=True)
    problem = ffmpeg(file, "-start_number", "1", "img_%05d.jpg", cwd=temporary)[1]
    names = sorted(os.listdir(temporary))
    if problem or not names:
        shutil.rmtree(temporary)
        return problem or "ffmpeg: no frame"
    final.parent.mkdir(parents=True, exist_ok=True)
    if pack:
        with zipfile.ZipFile(f"{temporary}.zip", "w") as archive:
            for name in names:  # with ZipInfo's one date, so that each run writes the same bytes
                archive.writestr(zipfile.ZipInfo(name), (temporary / name).read_bytes())
        shutil.rmtree(temporary)
        temporary, final = f"{temporary}.zip", f"{final}.zip"
    os.replace(temporary, final)


def check(data_dir):
    """Hold every list of a data folder against its frames; print what is wrong, by line, and return how many things."""
    categories, problems, seen = read_categories(data_dir), [], {}
    splits = [name for name in ("train", "val", "test") if Path(data_dir, f"{name}.txt").exists()]
    if not splits:
        raise ValueError(f"{data_dir}: no train.txt, val.txt or test.txt")
    for videos in [VideoList(data_dir, split, recipe=None, train=False) for split in splits]:
        started = time.time()
        for done, (number, (path, count, _)) in enumerate(zip(videos.lines, videos.videos), 1):
            where = f"{videos.list}:{number}: {path}"
            names = set(frame_names(videos.frames_dir / path))
            due = {FRAME.format(i + 1) for i in range(min(count, 10**6))}  # a wrong count may be any number
            if not len(names) == len(names & due) == count:
                problems.append(f"{where}: {len(names & due)} of {count} frames, {len(names - due)} other files")
            if seen.setdefault(path, videos.list) != videos.list:
                problems.append(f"{where} is also in {seen[path]}")
            progress(videos.list.name, done, len(videos), started)
        counts = np.bincount([label for video in videos.videos for label in video.labels], minlength=len(categories))
        print(f"{videos.list}: {len(videos)} videos, {counts.sum() / len(videos):.2f} labels a video; largest class "
              f"{categories[counts.argmax()]}, {counts.max()}; smallest {categories[counts.argmin()]}, {counts.min()}")
    print(*problems, f"{len(problems)} problems", sep="\n")
    return len(problems)


def write_lines(path, lines):
    """Write a text file whole or not at all."""
    part = path.with_name(f"{path.name}.part-{os.getpid()}")
    try:
        part.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", errors="backslashreplace")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def progress(what, done, total, started, last=[0.0]):
    """Every five seconds, and at the end, a line on stderr: how far, how fast, how long still (last: when it spoke)."""
    now = time.time()
    if done == total or now - max(started, last[0]) > 5:
        last[0], rate = now, done / max(now - started, 1e-9)
        print(f"{what} {done}/{total}, {rate:.1f} a second, {(total - done) / rate:.0f} s left", file=sys.stderr)


def run_script(main):
    """Run a script's main and exit with what it returns; bad input is one line on stderr and status 2, no traceback."""
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        line = str(error).strip().splitlines()[-1]  # a loader's worker puts its traceback and error name in front
        if os.environ.get("RANK", "0") == "0":
            print(f"{Path(sys.argv[0]).name}: {re.sub(r'^[A-Za-z]*Error: ', '', line)}", file=sys.stderr, flush=True)
        else:
            time.sleep(3)  # torchrun ends all processes as soon as one has: let the first one speak
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    toy = commands.add_parser("toy", help="draw the toy videos into a new folder")
    toy.add_argument("out", metavar="OUT", help="the folder, which must not be there yet")
    toy.add_argument("--videos", type=int, default=1200, help="for training; val: a quarter (%(default)s, our choice)")
    toy.add_argument("--seed", type=int, default=0, help="another one draws other videos (%(default)s, our choice)")
    videos = commands.add_parser("extract", help="videos to frames and their list")
    videos.add_argument("--videos", required=True, metavar="DIR", help="the folder of videos, at any depth")
    videos.add_argument("--list", metavar="FILE", help="which of them, with their labels (all, unlabelled)")
    videos.add_argument("--format", default="auto", choices=["auto", "mmit", "xtemporal", "mmaction2"],
                        help="the list's form (%(default)s: told from its lines)")
    videos.add_argument("--out", required=True, metavar="DATA", help="the data folder; videos already whole are kept")
    videos.add_argument("--split", required=True, help="a name such as train; writes DATA/SPLIT.txt, SPLIT_failed.txt")
    videos.add_argument("--pack", action="store_true", help="one uncompressed zip a video, not a folder of frames")
    videos.add_argument("--workers", type=int, default=os.cpu_count(), help="videos at once (%(default)s, the cores)")
    commands.add_parser("check", help="lists against frames").add_argument("data", metavar="DATA", help="its folder")
    args = parser.parse_args()
    if args.command == "toy":
        return draw_toy(args.out, args.videos, args.seed)
    if args.command == "check":
        return 2 if check(args.data) else 0
    whole, failed = extract(args.videos, args.out, args.split, args.list, args.format, args.workers, args.pack)
    print(f"{whole} videos whole, {failed} failed (listed in {args.out}/{args.split}_failed.txt)")
    return 0 if whole else 2


if __name__ == "__main__":
    run_script(main)
