"""Videos -> frames -> lists -> clips, and the toy videos.

    python data.py toy OUT                                         draw small videos whose labels are motions
    python data.py extract --videos DIR --out DATA --split train   FFmpeg: 30 frames a second, short side 320
    python data.py check DATA                                      every list against the frames it names

A data folder:
    categories.txt                   one name a line: the line number, from 0, is the label's id
    train.txt  val.txt  [test.txt]   path num_frames label[,label...]      (label -1: unlabelled)
    frames/<path>/img_00001.jpg ...
One clip's way: list line -> frame indices -> only those JPEGs are decoded -> one crop and flip for the whole clip ->
uint8 (T, H, W, 3), a quarter of the bytes of floats; normalising is the device's work. All that is random about a clip
comes from np.random.default_rng([seed, epoch, row]): it depends on no worker, no process and no earlier clip.
N frames in a video, T in a clip, H, W pixels. Indices count from 0: index i is the file img_(i + 1).jpg.
"""
import argparse
import concurrent.futures
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

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
    if format == "auto":
        format = list_format(path, [line.split() for _, line in lines], endings)
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
        if not re.fullmatch("[0-9]+", number) and (number != "-1" or labels != ["-1"] or number is frames):
            raise ValueError(f"{number!r} is not a whole number from 0 up" + ", nor a lone -1" * (number is not frames))
    path = ENDING.sub("", name)
    if path.startswith("/") or ".." in path.split("/"):
        raise ValueError(f"{name} leads out of the data folder")
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


PLACES = [(0, 0), (4, 0), (0, 4), (4, 4), (2, 2), (0, 2), (4, 2), (2, 4), (2, 0), (1, 1), (3, 1), (1, 3), (3, 3)]


def multiscale_box(width, height, target, rng):
    """TSN's multi-scale crop ("spatial jittering"): the part (x, y, w, h) of a frame to be resized to target x target.
    w and h are 1, .875, .75 or .66 of the short side, at most one step apart; within 2 pixels of the target they become
    the target, which spares the resize. It lies at one of 13 PLACES, quarters of the room to the right and down."""
    sides = [int(min(width, height) * scale) for scale in (1, 0.875, 0.75, 0.66)]
    sides = [target if abs(side - target) < 3 and target <= min(width, height) else side for side in sides]
    pairs = [(w, h) for i, w in enumerate(sides) for j, h in enumerate(sides) if abs(i - j) <= 1]  # 10 of 16
    (w, h), (right, down) = pairs[rng.integers(len(pairs))], PLACES[rng.integers(len(PLACES))]
    return right * ((width - w) // 4), down * ((height - h) // 4), w, h


def read_frames(folder, indices, box=None):
    """Frames of a folder by index -> uint8 (T, h, w, 3); a frame asked for twice is decoded once.
    box: (width, height) -> the part (x, y, w, h) to keep. Raises OSError with the file's name."""
    pixels = {}
    for index in dict.fromkeys(indices):
        path = os.path.join(folder, FRAME.format(index + 1))
        try:
            with Image.open(path) as image:
                if not pixels:  # one box for the whole clip
                    size = image.size
                    x, y, w, h = box(*image.size) if box else (0, 0, *image.size)
                if image.size != size:
                    raise OSError("its size is not that of the clip's first frame")
                image = image if image.mode == "RGB" else image.convert("RGB")
                pixels[index] = np.asarray(image.crop((x, y, x + w, y + h)))
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # SyntaxError: a broken header
            raise OSError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
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
    crop = recipe["crop"] if rng else recipe["test_crop"]
    if rng and recipe["augment"] == "multiscale":  # report, image models
        clip = resize(read_frames(folder, indices, lambda w, h: multiscale_box(w, h, crop, rng)), (crop, crop))
    else:  # with rng, "jitter": report, SlowFast
        short = int(rng.integers(recipe["jitter"][0], recipe["jitter"][1] + 1)) if rng else recipe["test_resize"]
        clip = resize(read_frames(folder, indices), short)
        y, x = (rng.integers(side - crop + 1) if rng else round((side - crop) / 2) for side in clip.shape[1:3])
        clip = clip[:, y : y + crop, x : x + crop]
    return (clip.flip(2) if rng and recipe["flip"] and rng.random() < 0.5 else clip).contiguous()


class VideoList(torch.utils.data.Dataset):
    """DATA/<split>.txt and its frames. An item: (clip uint8 (T, H, W, 3), labels float32 (num_classes,), row).
    train: a random, augmented clip; index epoch * len + row is the row as that epoch draws it. Else the recipe's one
    evaluation view, or with views, a function, the item (row, views(read, num_frames, path)). An unreadable video is an
    OSError with its list line; with skip_broken, training takes the next readable row, at most 10 further on."""
    def __init__(self, data_dir, split, recipe, train, seed=0, skip_broken=False, views=None):
        self.list, self.frames_dir = Path(data_dir) / f"{split}.txt", Path(data_dir) / "frames"
        self.recipe, self.train, self.seed, self.views, self.skip_broken = recipe, train, seed, views, skip_broken
        self.categories = read_categories(data_dir)
        self.videos = read_list(self.list, num_classes=len(self.categories))
        self.left_out = sum(bool(line.strip()) for line in read_text(self.list).splitlines()) - len(self.videos)
        if self.videos[0].frames is None:
            raise ValueError(f"{self.list}: no frame counts; python data.py extract --list {self.list} ... makes them")

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
                problem = OSError(f"{self.list}:{numbered_list(self.list)[path][0]}: {error}")
        raise problem


def normalise(clips, mean, std, channels_last=False):
    """uint8 (B, T, H, W, 3) -> float32 (B, T, 3, H, W) on the same device: scaled to 0..1, minus mean, over std."""
    mean, std = (torch.tensor(value, device=clips.device).view(3, 1, 1) for value in (mean, std))
    clips = clips.permute(0, 1, 4, 2, 3)  # in memory still pixel by pixel, which is what channels_last means
    return ((clips if channels_last else clips.contiguous()) / 255).sub_(mean).div_(std)


def ignore_signals(_):
    """A loader's worker leaves Ctrl-C and SIGTERM to its main process, which finishes its step and then ends it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


TOY_CATEGORIES = ["moving+right", "moving+left", "moving+down", "moving+up", "moving+down+right", "moving+up+left",
                  "moving+up+right", "moving+down+left", "checkered+ground", "striped+ground"]
VELOCITIES = [(1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, -1), (1, -1), (-1, 1)]  # of label ^ 1: the reverse


def draw_toy(out, videos=1200, seed=0):
    """Draw the toy into the new folder `out`: `videos` for training, a quarter as many for validation.
    One or two shapes drift over a torus, each on its own axis: labels that no single frame shows. Every fifth video has
    a patterned ground: a label that every frame shows. Validation holds each video with its reversal, and 24 frames are
    an odd multiple of 8 segments: both have the same middle frames, so a model blind to order scores both alike."""
    out, part, pairs = Path(out), Path(f"{out}.part-{os.getpid()}"), videos // 8
    if videos < 8 or seed < 0 or out.exists():
        raise ValueError(f"{out}: already there; name a new folder" if out.exists() else
                         f"--videos {videos} --seed {seed}: at least 8 and 0")
    lists, started = {"train": [], "val": [], "categories": TOY_CATEGORIES}, time.time()
    try:
        for row in range(videos + pairs):
            split = "train" if row < videos else "val"
            frames, labels = draw_video(row, np.random.default_rng([seed, row]))
            versions = [("", frames, labels)]
            if split == "val":
                versions += [("_reversed", frames[::-1], [label ^ (label < len(VELOCITIES)) for label in labels])]
            for ending, frames, labels in versions:
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


def extract(videos_dir, out, split, list_path=None, format="auto", workers=os.cpu_count()):
    """Decode videos into OUT/frames and write OUT/<split>.txt and OUT/<split>_failed.txt -> (whole, failed) counts.
    Report: FFmpeg, 30 fps, short side 320. A folder of frames gets its name when whole, so a stopped run can go on.
    Frames are counted: neither the container's own number nor rate x duration is right."""
    if workers < 1 or shutil.which("ffmpeg") is None:
        raise ValueError(f"--workers {workers}: at least 1" if workers < 1 else
                         "the program ffmpeg is missing; Debian: apt install ffmpeg, macOS: brew install ffmpeg")
    if Path(split).name != split:
        raise ValueError(f"--split {split}: a name such as train, not a path")
    files = find_videos(videos_dir)
    videos = read_list(list_path, format) if list_path else [Video(path, None, []) for path in files]
    (frames_dir := Path(out) / "frames").mkdir(parents=True, exist_ok=True)
    for stale in frames_dir.glob(f".part-{split}-*"):  # of a run that was killed
        shutil.rmtree(stale, ignore_errors=True)
    part = frames_dir / f".part-{split}-{os.getpid()}"
    def work(video):
        """Decode a video, if that is still to do -> the list it belongs in and its line there."""
        final, problem = frames_dir / video.path, None
        if re.search(r"[\s\udc80-\udcff]", video.path):
            problem = "white space, or a byte that is not UTF-8, in the path: no list line can hold it"
        elif not final.is_dir():
            file = files.get(video.path)
            problem = decode_video(file, part / str(id(video)), final) if file else "no such video"
        if problem:
            return failed, f"{video.path}\t{problem}"
        return whole, f"{video.path} {len(os.listdir(final))} {','.join(map(str, video.labels or [-1]))}"

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


def find_videos(folder):
    """Every video file below a folder: {its place there without the ending: its Path}, sorted."""
    found = {}
    for file in sorted(Path(parent, name) for parent, _, names in os.walk(folder) for name in names):
        path = ENDING.sub("", file.relative_to(folder).as_posix())
        if ENDING.search(file.name) and found.setdefault(path, file) is not file:
            raise ValueError(f"{found[path]} and {file} would both be called {path}: rename one of them")
    if not found:
        raise ValueError(f"{folder}: no such folder, or no video in it ({ENDING.pattern})")
    for path, parent in ((path, str(parent)) for path in found for parent in Path(path).parents):
        if parent in found:
            raise ValueError(f"{found[parent]} and {found[path]}: one's frames would lie among the other's: rename one")
    return found


def ffmpeg(file, *output, **options):
    """FFmpeg's (output, None or what went wrong) on a video: 30 frames a second, short side 320, as JPEG."""
    command = ["ffmpeg", "-nostdin", "-v", "error", "-xerror", "-threads", "1", "-i", f"file:{Path(file).resolve()}",
               "-vf", "fps=30,scale='if(gte(iw,ih),-2,320)':'if(gte(iw,ih),320,-2)'", "-q:v", "2", *output]
    run = subprocess.run(command, capture_output=True, **options)  # -xerror: a cut-off file would end with status 0
    said = [line for line in run.stderr.decode(errors="replace").split("\n") if line.strip()]
    return run.stdout, f"ffmpeg: {said[0] if said else f'status {run.returncode}'}" if run.returncode else None


def decode_video(file, temporary, final):
    """FFmpeg on one video: its frames into `temporary`, which is then renamed to `final`. None, or what went wrong."""
    temporary.mkdir(parents=True)
    problem = ffmpeg(file, "-start_number", "1", "img_%05d.jpg", cwd=temporary)[1]
    if problem or not os.listdir(temporary):
        shutil.rmtree(temporary)
        return problem or "ffmpeg: no frame"
    final.parent.mkdir(parents=True, exist_ok=True)
    os.replace(temporary, final)


def check(data_dir):
    """Hold every list of a data folder against its frames; print what is wrong, by line, and return how many things."""
    categories, problems, seen = read_categories(data_dir), [], {}
    lists = [path for name in ("train", "val", "test") if (path := Path(data_dir) / f"{name}.txt").exists()]
    if not lists:
        raise ValueError(f"{data_dir}: no train.txt, val.txt or test.txt")
    for path in lists:
        lines, started = numbered_list(path, num_classes=len(categories)), time.time()
        videos = [video for _, video in lines.values()]
        for done, (number, video) in enumerate(lines.values(), 1):
            folder, where = Path(data_dir) / "frames" / video.path, f"{path}:{number}: {video.path}"
            names = set(os.listdir(folder)) if folder.is_dir() else set()
            due = {FRAME.format(i + 1) for i in range(video.frames or 1)}
            if names != due:
                problems.append(f"{where}: {len(names & due)} of {video.frames} frames, {len(names - due)} other files")
            if seen.setdefault(video.path, path) != path:
                problems.append(f"{where} is also in {seen[video.path]}")
            progress(path.name, done, len(videos), started)
        counts = np.bincount([label for video in videos for label in video.labels], minlength=len(categories))
        print(f"{path}: {len(videos)} videos, {counts.sum() / len(videos):.2f} labels a video; largest class "
              f"{categories[counts.argmax()]}, {counts.max()}; smallest {categories[counts.argmin()]}, {counts.min()}")
    print(*problems, f"{len(problems)} problems", sep="\n")
    return len(problems)


def write_lines(path, lines):
    """Write a text file whole or not at all."""
    part = path.with_name(f"{path.name}.part-{os.getpid()}")
    part.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", errors="backslashreplace")
    os.replace(part, path)


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
    toy.add_argument("out", metavar="OUT")
    toy.add_argument("--videos", type=int, default=1200, help="for training; a quarter as many for validation")
    toy.add_argument("--seed", type=int, default=0, help="another seed, other videos")
    videos = commands.add_parser("extract", help="videos to frames and their list")
    videos.add_argument("--videos", required=True, metavar="DIR", help="the folder of videos, at any depth")
    videos.add_argument("--list", metavar="FILE", help="which of them, with their labels; without it all, unlabelled")
    videos.add_argument("--format", default="auto", choices=["auto", "mmit", "xtemporal", "mmaction2"], help="its form")
    videos.add_argument("--out", required=True, metavar="DATA", help="the data folder; videos already whole are kept")
    videos.add_argument("--split", required=True, help="writes DATA/SPLIT.txt and DATA/SPLIT_failed.txt")
    videos.add_argument("--workers", type=int, default=os.cpu_count(), help="ffmpeg processes at once")
    commands.add_parser("check", help="hold the lists against the frames").add_argument("data", metavar="DATA")
    args = parser.parse_args()
    if args.command == "toy":
        return draw_toy(args.out, args.videos, args.seed)
    if args.command == "check":
        return 2 if check(args.data) else 0
    whole, failed = extract(args.videos, args.out, args.split, args.list, args.format, args.workers)
    print(f"{whole} videos whole, {failed} failed (listed in {args.out}/{args.split}_failed.txt)")
    return 0 if whole else 2


if __name__ == "__main__":
    run_script(main)
