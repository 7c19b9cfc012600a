"""Clips -> probabilities -> sample-level mAP -> scores.npz; or one video -> its labels.

    python evaluate.py --checkpoint runs/tin/best.pt --data DATA [--split val] [--protocol dense] [--out scores.npz]
    torchrun --nproc-per-node 8 evaluate.py ...                      the same figures, sooner
    python evaluate.py --model slowfast --weights PUBLIC.pth ...     other people's weights, through slowfast.convert
    python evaluate.py --checkpoint runs/tin/best.pt --video FILE ... [--top 5] [--json] [--picture out.png]

A video's views (clips in time, crops in space, scales) are scored one by one and their probabilities averaged. Each
video is scored by exactly one process. N videos, K classes, B clips, T frames, H, W pixels.
"""
import argparse
import contextlib
import functools
import importlib
import inspect
import io
import json
import os
import pickle
import re
import shutil
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw

import data


def average_precision(scores, labels):
    """The average precision of each video over its classes: fractions (N,) from scores and 0/1 labels, both (N, K).

    AP = mean over the video's labels u of #{labels p: score p >= score u} / #{classes c: score c >= score u}: equal
    scores count against the label. Without labels 0, as in scikit-learn. Report: "mAP under sample level"."""
    scores, labels = np.asarray(scores), np.asarray(labels)
    if scores.shape != labels.shape or scores.ndim != 2:
        raise ValueError(f"scores {scores.shape} and labels {labels.shape} must both be (videos, classes)")
    if np.isnan(scores).any() or not np.array_equal(labels, labels.astype(bool)):
        raise ValueError("a score is not a number" if np.isnan(scores).any() else "labels must be 0 or 1")
    labels = labels.astype(bool)
    rows, columns = np.nonzero(labels)
    ahead = scores[rows] >= scores[rows, columns][:, None]  # (labels of all videos, K)
    precision = (ahead & labels[rows]).sum(1) / ahead.sum(1)
    return np.bincount(rows, precision, len(scores)) / np.maximum(labels.sum(1), 1)


def sample_map(scores, labels):
    """The mean of average_precision over the videos, a fraction. Report's metric."""
    return float(average_precision(scores, labels).mean())


def crop_places(width, height, crop, crops, rng=None):
    """Where to cut windows, [(x, y), ...]: 1 in the centre, 3 along the long side (start, end, centre), or with rng any
    number at random. Report: 3 random ones; its authors' code takes these three."""
    if rng is not None:
        return [(int(rng.integers(width - crop + 1)), int(rng.integers(height - crop + 1))) for _ in range(crops)]
    if crops not in (1, 3):
        raise ValueError(f"--crops {crops}: 1, 3 or random")
    x, y = round((width - crop) / 2), round((height - crop) / 2)  # rounded as in torchvision
    ends = [(0, y), (width - crop, y)] if width >= height else [(x, 0), (x, height - crop)]
    return ends * (crops == 3) + [(x, y)]


def make_protocol(recipe, name="clip", crops=None):
    """Which views a video is seen by: "clip", the recipe's one; "dense", its clips x crops at the first of its scales;
    "multiscale", at all of them (report). crops overrides the recipe's; "random": as many, at random places."""
    if name == "clip":
        clips, count, sizes = 1, 1, [(recipe["test_resize"], recipe["test_crop"])]
    else:
        clips, count = recipe["clips"], recipe["crops"] if crops in (None, "random") else int(crops)
        sizes = [(side, side) for side in recipe["scales"]][: None if name == "multiscale" else 1]
    return {"name": name, "clips": clips, "crops": count, "sizes": sizes, "random": crops == "random"}


def test_views(read, num_frames, name, recipe, protocol):
    """All views of a video under a protocol: [(clip uint8 (T, crop, crop, 3), weight), ...], the weights summing to 1.

    read: frame indices -> uint8 (n, h, w, 3), called once. Equal views are given once, with their number as weight: in
    a short video many clips are alike. What is random is seeded by the video's name."""
    length, stride, rng = recipe["frames"], recipe["stride"], np.random.default_rng(zlib.crc32(name.encode()))
    if recipe["sampling"] == "segments":  # the middles, then random ones; report: "5 random" along time
        clips = [data.segment_indices(num_frames, length, rng if i else None) for i in range(protocol["clips"])]
    else:
        starts = data.clip_starts(num_frames, length, stride, protocol["clips"])
        clips = [data.clip_indices(num_frames, length, stride, start) for start in starts]
    wanted = np.unique(clips)
    frames, views = read(wanted), {}
    for short, crop in protocol["sizes"]:
        resized = data.resize(frames, short)  # (n, height, width, 3)
        for clip in clips:
            random = rng if protocol["random"] else None
            for x, y in crop_places(resized.shape[2], resized.shape[1], crop, protocol["crops"], random):
                window = resized[np.searchsorted(wanted, clip), y : y + crop, x : x + crop]
                views.setdefault((crop, x, y, *clip), [window, 0])[1] += 1
    total = sum(count for _, count in views.values())
    return [(clip, count / total) for clip, count in views.values()]


def by_size(items):
    """[(row, test_views), ...] of some videos -> (their number, [(clips (V, T, H, W, 3), rows (V,), weights (V,)), ...]
    by size). Few tensors: each that a loader's worker sends takes a file handle, and many systems give it 1,024."""
    groups = {}
    for row, views in items:
        for clip, weight in views:
            groups.setdefault(clip.shape, []).append((clip, row, weight))
    return len(items), [(torch.stack(clips), torch.tensor(rows), torch.tensor(weights))
                        for clips, rows, weights in (zip(*group) for group in groups.values())]


@torch.no_grad()
def predict(model, views, num_classes, recipe, device, batch=8, view_batch=16, workers=0, average="prob",
            autocast=None, what=None):
    """The scores of all videos, float32 (N, K), in every process: the mean over a video's views of the probabilities
    (report: "class prediction probabilities are averaged"), or with average "logit" the sigmoid of the mean logit.

    views: (row, test_views) of each video, by row. batch: videos loaded at once; view_batch: views in one forward pass,
    which bounds the memory. model: not its DDP wrapper, which would wait for processes with fewer videos. what: what to
    call the videos in lines on progress, None for no such lines."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine = torch.utils.data.Subset(views, range(rank, len(views), world))
    loader = torch.utils.data.DataLoader(mine, batch_size=batch, num_workers=workers, collate_fn=by_size,
                                         worker_init_fn=data.ignore_signals)
    scores = torch.zeros(len(views), num_classes, device=device)
    problem, done, started, was_training = None, 0, time.time(), model.training
    model.eval()
    try:
        for videos, groups in loader:
            for clips, rows, weights in groups:
                for some in torch.arange(len(clips)).split(view_batch):
                    chunk = data.normalise(clips[some].to(device), recipe["mean"], recipe["std"])
                    with autocast or contextlib.nullcontext():
                        values = model(chunk)
                    values = values.float()  # the sigmoid of half precision has few values near 1: they would tie
                    values = values if average == "logit" else values.sigmoid()
                    scores.index_add_(0, rows[some].to(device), values * weights[some, None].to(device))
            done += videos
            if what and rank == 0:
                data.progress(what, done, len(mine), started)
    except OSError as error:  # of one process: all have to know
        problem = str(error)
    model.train(was_training)
    if world > 1:
        problems = [None] * world
        dist.all_gather_object(problems, problem)
        problem = next(filter(None, problems), None)
        dist.all_reduce(scores)  # exact: but for the process that scored it, a row is zero everywhere
    if problem:
        raise OSError(problem)
    return (scores.sigmoid() if average == "logit" else scores).cpu().numpy()


def multi_hot(videos, num_classes):
    """[Video, ...] -> uint8 (N, K), or None if no video of the list has a label, as in a test list."""
    labels = np.zeros((len(videos), num_classes), np.uint8)
    for row, video in enumerate(videos):
        labels[row, video.labels] = 1
    return labels if labels.any() else None


def save_scores(path, paths, scores, labels, meta):
    """scores.npz: paths (N,), scores (N, K) float32, labels (N, K) uint8 unless None, meta as JSON; no pickles."""
    arrays = {"paths": np.array(paths), "scores": scores.astype(np.float32), "meta": json.dumps(meta)}
    part = Path(f"{path}.part-{os.getpid()}.npz")
    try:
        np.savez_compressed(part, **arrays, **({} if labels is None else {"labels": labels}))
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def print_metrics(scores, labels):
    """The report's metric on a line of its own, last; before it what helps to understand it."""
    if labels is None:
        return print("the list has no labels: scores, but no mAP")
    precision, some = average_precision(scores, labels), labels.any(1)
    by_class = [average_precision(scores[:, [k]].T, labels[:, [k]].T)[0] for k in np.flatnonzero(labels.any(0))]
    top = np.argsort(-scores, axis=1, kind="stable")[:, :5]
    hits = np.take_along_axis(labels, top, axis=1)[some]
    print(f"{len(scores)} videos, {(~some).sum()} without labels, whose AP counts as 0 (mAP of the others "
          f"{100 * precision[some].mean():.2f})\nclass-level mAP {100 * np.mean(by_class):.2f}, top-1 hit rate "
          f"{100 * hits[:, 0].mean():.2f}, top-5 {100 * hits.any(1).mean():.2f}\nmAP {100 * precision.mean():.2f}")


NUMPY = [np.dtype, np.ndarray, np._core.multiarray.scalar, np._core.multiarray._reconstruct,
         *(type(np.dtype(kind)) for kind in "?bBhHiIlLqQefdSU")]  # by which numpy's numbers are pickled


class ArraysOnly(pickle.Unpickler):
    """For PySlowFast's Caffe2 files: a pickle can run any code, this one makes numpy arrays and nothing else."""

    def find_class(self, module, name):
        if f"{module}.{name}" in ("_codecs.encode", "numpy.ndarray", "numpy.dtype") or re.fullmatch(
                r"numpy\._?core\.multiarray\.(_reconstruct|scalar)", f"{module}.{name}"):
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")


def read_checkpoint(path):
    """What a checkpoint file holds: a torch file, numpy scalars included, or a Caffe2 pickle of arrays. ValueError for
    other files, and for one that asks for another Python object, which could run code."""
    problem = ""
    for load in (lambda file: torch.load(file, map_location="cpu", weights_only=True),
                 lambda file: dict(ArraysOnly(file, encoding="latin1").load())):  # old torch files begin with a number
        with open(path, "rb") as file, torch.serialization.safe_globals(NUMPY):
            try:
                return load(file)
            except Exception as error:  # either lets through whatever the bytes did to it
                problem += str(error)
    name = re.search(r"GLOBAL ([\w.]+)", problem)
    raise ValueError(f"{path}: " + (f"asks for the Python object {name[1]}, which is refused: it could run code" if name
                                    else "no checkpoint, or one that was cut short"))


def convert(module, checkpoint, path):
    """The tensors of a file, as read, in our names; the model file's errors get the file's name."""
    try:
        return module.convert(checkpoint if isinstance(checkpoint, dict) else {})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def load_weights(module, recipe, checkpoint, path):
    """A checkpoint of any layout that convert knows -> (model, its number of classes), by a strict load. Where shapes
    do not fit, a ValueError with the recipe flags by which they would."""
    state = convert(module, checkpoint, path)
    theirs = {(key, tuple(tensor.shape)) for key, tensor in state.items()}

    def attempt(recipe, num_classes=None):
        """The file's number of classes, and all (key, shape) that it and a network of so many classes do not share."""
        try:
            with torch.device("meta"):  # shapes without memory
                if not num_classes:
                    two, three = (module.build(recipe, n).state_dict() for n in (2, 3))
                    key, axis = next((key, axis) for key in two for axis, side in enumerate(two[key].shape)
                                     if side != three[key].shape[axis])  # the side that grows with the classes
                    found = key in state and state[key].dim() == two[key].dim()
                    num_classes = state[key].shape[axis] if found else None
                ours = module.build(recipe, num_classes or 2).state_dict()
        except (ValueError, KeyError):  # no such network
            return None, theirs
        return num_classes, theirs ^ {(key, tuple(tensor.shape)) for key, tensor in ours.items()}

    num_classes, misfits = attempt(recipe)
    if not misfits:
        model = module.build(recipe, num_classes)
        model.load_state_dict(state)
        return model, num_classes
    key, shape = min(misfits)
    problem = f"{path}: {key} {shape} is only in the {'file' if (key, shape) in theirs else 'network'}"
    own, flags = re.findall(r'recipe\["(\w+)"\]', inspect.getsource(module.build)), ""
    values = [True, False, 3, 4, 5, 7, 8, 16, 18, 50, 101, 152, 200, "resnet18", "resnet50", "resnet101"]
    tries = dict.fromkeys(
        (key, value) for key in own for value in [*values, *(row[key] for row in module.RECIPES.values())]
        if type(value) is type(recipe[key]) and value != recipe[key])
    while misfits:  # take the value that mends most, again and again
        left, key, value = min(((attempt({**recipe, key: value}, num_classes)[1], key, value) for key, value in tries),
                               key=lambda one: len(one[0]))
        if len(left) >= len(misfits):
            raise ValueError(f"{problem}, and no recipe flag makes it fit")
        recipe, misfits, flags = {**recipe, key: value}, left, f"{flags} {flag(key, value)}"
    raise ValueError(f"{problem}; its tensors ask for{flags}")


def flag(key, value):
    """A recipe value as one would write it on the command line: --weight-decay 0.0001."""
    name = key.replace("_", "-")
    return f"--{'no-' * (value is False)}{name}" if isinstance(value, bool) else f"--{name} {value}"


def recipe_notes(module, row):
    """{recipe key: what it means, its unit and where its value comes from}: the comment on its line in the model file,
    from the row's own lines if it is there."""
    notes, owner = {}, None
    for line in inspect.getsource(module).splitlines():
        owner = name[1] if (name := re.match(r'    "(\w+)": ', line)) else None if line.startswith("R") else owner
        code, _, note = line.partition("  # ")
        for key in re.findall(r"(\w+)\"?[=:] ?", code) if note and owner in (None, row) else []:
            if (owner is None) <= (key not in notes):
                notes[key] = note
    return notes


CHOICES = {"sampling": ["segments", "clip"], "augment": ["multiscale", "jitter"], "loss": ["bce", "lsep", "warp", "ce"],
           "class_weight": ["none", "sqrt", "ratio"], "schedule": ["step", "cosine"]}


def add_recipe_flags(parser, recipe, notes):
    """A flag for every recipe key that the parser has none for; one that is not given leaves no trace."""
    group = parser.add_argument_group("the recipe's values")
    for key, value in recipe.items():
        name = "--" + key.replace("_", "-")
        kind = {"default": argparse.SUPPRESS, "help": f"{notes.get(key, '')} [{value}]".replace("%", "%%")}
        if isinstance(value, bool):
            kind["action"] = argparse.BooleanOptionalAction
        elif isinstance(value, (list, tuple)):
            kind.update(nargs="+", type=type(value[0]), metavar=key.upper())
        elif key in CHOICES:
            kind["choices"] = CHOICES[key]
        else:
            kind.update(type=int if value is None else type(value), metavar=key.upper())
        with contextlib.suppress(argparse.ArgumentError):  # the script has a flag of this name
            group.add_argument(name, **kind)


def check_recipe(recipe):
    """The recipe, if a run can use it; else a ValueError with the flag."""
    for key in ("frames", "stride", "crop", "batch", "reference_batch", "epochs", "iterations", "test_crop", "clips"):
        if recipe.get(key, 1) < 1:
            raise ValueError(f"{flag(key, recipe[key])}: at least 1")
    if min(recipe["scales"]) < 1:
        raise ValueError(f"{flag('scales', recipe['scales'])}: at least 1")
    for key, short in (("test_crop", recipe["test_resize"]), ("crop", min(recipe["jitter"]))):
        if recipe[key] > short and (key == "test_crop" or recipe["augment"] == "jitter"):
            raise ValueError(f"{flag(key, recipe[key])}: larger than the short side it is cut from, {short}")
    return recipe


def open_recipe(name, row=None):
    """--model and --recipe -> (the model file's module, its row of RECIPES or the first, the row's notes)."""
    if not name.isidentifier() or not Path(__file__).with_name(f"{name}.py").exists():
        raise ValueError(f"--model {name}: there is no {name}.py beside this script")
    module = importlib.import_module(name)
    rows = getattr(module, "RECIPES", {})
    if not rows or row not in (None, *rows):
        raise ValueError(f"--recipe {row}: {name}.py has {', '.join(rows) or 'no RECIPES'}")
    row = row or next(iter(rows))
    return module, rows[row], recipe_notes(module, row)


def start_process(device=None):
    """(rank, world, device) of this process, joined with the others where torchrun's environment names them."""
    rank, world, local = (int(os.environ.get(key, default)) for key, default in
                          (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    try:
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise ValueError(f"--device {device}: no kind of device that PyTorch knows") from None
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise ValueError(f"--device cuda: process {local} has none of the {torch.cuda.device_count()} GPUs")
        device = torch.device("cuda", local if device.index is None else device.index)
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return rank, world, device


def toy_folder(rank):
    """runs/toy, drawn by rank 0 if it is not there yet."""
    folder = Path("runs", "toy")
    if rank == 0 and not folder.exists():
        folder.parent.mkdir(exist_ok=True)
        data.draw_toy(folder)
    if dist.is_initialized():
        dist.barrier()
    return folder


def open_video(file):
    """A video file -> (read: frame indices -> uint8 (n, h, w, 3), its number of frames). The pixels are those that
    extraction would give, but the disk is not touched."""
    stream, problem = data.ffmpeg(file, "-f", "image2pipe", "-c:v", "mjpeg", "-")
    frames = [jpeg + b"\xff\xd9" for jpeg in stream.split(b"\xff\xd9")[:-1]]  # the marker at a JPEG's end
    if problem or not frames:
        raise OSError(f"{file}: {problem or 'no frame'}")
    return lambda indices: torch.from_numpy(np.stack([Image.open(io.BytesIO(frames[i])) for i in indices])), len(frames)


def draw_picture(seen):
    """A row for each (frames, {label: probability}): the frames that the model saw, and a bar per label."""
    height = 128 + 18 * max(len(labels) for _, labels in seen)
    picture = Image.new("RGB", (160 * max(len(frames) for frames, _ in seen), height * len(seen)), "white")
    draw = ImageDraw.Draw(picture)
    for top, (frames, labels) in zip(range(0, picture.height, height), seen):
        for i, frame in enumerate(frames):
            picture.paste(Image.fromarray(frame.numpy()).resize((160, 120)), (160 * i, top))
        for y, (name, p) in zip(range(top + 124, picture.height, 18), labels.items()):
            draw.rectangle((0, y, p * picture.width, y + 15), fill=(150, 190, 240))
            draw.text((4, y + 2), f"{100 * p:5.1f} %  {name}", fill="black")
    return picture


def label_videos(args, score, recipe, protocol, categories):
    """--video: print the labels of each file; the exit status. score: views -> (K,) probabilities."""
    if shutil.which("ffmpeg") is None:
        raise ValueError("the program ffmpeg is missing; Debian: apt install ffmpeg, macOS: brew install ffmpeg")
    seen, found = [], []
    for file in args.video:
        try:
            read, num_frames = open_video(file)
        except OSError as error:
            print(f"evaluate.py: {error}", file=sys.stderr)
            continue
        scores = score(test_views(read, num_frames, Path(file).stem, recipe, protocol))
        labels = {categories[k]: float(scores[k]) for k in np.argsort(-scores, kind="stable")[: args.top]}
        found.append({"video": file, "labels": labels})
        seen.append((read(data.sample_indices(num_frames, recipe)), labels))
        if not args.json:
            print(file, *(f"{100 * p:6.2f} %  {name}" for name, p in labels.items()), sep="\n")
    if args.json:
        print(json.dumps(found, indent=1))
    if args.picture and seen:
        draw_picture(seen).save(args.picture)
    return 0 if len(seen) == len(args.video) else 2


def main():
    source = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    source.add_argument("--checkpoint", metavar="FILE", help="one of ours, with its model, recipe and classes")
    source.add_argument("--model", metavar="NAME", help="with --weights: a model file beside this script, such as tin")
    source.add_argument("--weights", metavar="FILE", help="other people's weights, read by the model file's convert")
    source.add_argument("--recipe", metavar="ROW", help="with --weights: a row of its RECIPES (the first)")
    known, _ = source.parse_known_args()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     parents=[source], allow_abbrev=False)
    parser.add_argument("--data", metavar="DATA", help="a data folder (the toy, runs/toy)")
    parser.add_argument("--split", default="val", help="which of its lists (%(default)s)")
    parser.add_argument("--protocol", choices=["clip", "dense", "multiscale"], help="views: one (the default), clips x "
                        "crops, or these at all scales (the default with --clips, --crops or --scales)")
    parser.add_argument("--crops", choices=["1", "3", "random"],
                        help="crops per clip (the recipe's); random: the recipe's number, at random places")
    parser.add_argument("--average", default="prob", choices=["prob", "logit"], help="over views (%(default)s)")
    parser.add_argument("--out", metavar="FILE.npz", help="write paths, scores and labels there")
    parser.add_argument("--batch", type=int, default=8, help="videos loaded at once (%(default)s)")
    parser.add_argument("--view-batch", type=int, default=16, help="views in one forward pass (%(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="loader processes, 0: none (%(default)s)")
    parser.add_argument("--device", help="cpu, cuda, ... (cuda if there is one)")
    parser.add_argument("--video", nargs="+", metavar="FILE", help="label these video files instead of a list")
    parser.add_argument("--top", type=int, default=5, help="labels per video (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print the labels as JSON")
    parser.add_argument("--picture", metavar="OUT.png", help="the frames the model saw and a bar per label")
    config, recipe, path = {"model": known.model}, None, known.checkpoint or known.weights
    if path and (known.checkpoint or known.model):
        checkpoint = read_checkpoint(path)
        if known.checkpoint:
            config = checkpoint.get("config") if isinstance(checkpoint, dict) else None
            if not isinstance(config, dict) or not {"model", "recipe"} <= config.keys():
                raise ValueError(f"{path}: not one of our checkpoints; others': --model NAME --weights {path}")
        module, recipe, notes = open_recipe(config["model"], known.recipe)
        recipe = config.get("recipe", recipe)
        add_recipe_flags(parser, recipe, notes)
    args = parser.parse_args()
    if not recipe:
        parser.error("which network? --checkpoint FILE, or --model NAME --weights FILE")
    given = {key: value for key, value in vars(args).items() if key in recipe and key not in ("crops", "batch")}
    recipe = check_recipe({**recipe, **given})
    free = args.crops or {"clips", "scales"} & set(given)
    protocol = make_protocol(recipe, args.protocol or ("multiscale" if free else "clip"), args.crops)
    for name in ("batch", "view_batch", "top"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: at least 1")
    for file in filter(None, (args.out, args.picture)):
        if not Path(file).absolute().parent.is_dir():
            raise ValueError(f"{file}: there is no such folder")
    rank, _, device = start_process(args.device)
    model, num_classes = load_weights(module, recipe, checkpoint, path)
    model.to(device)
    score = functools.partial(predict, model, num_classes=num_classes, recipe=recipe, device=device, batch=args.batch,
                              view_batch=args.view_batch, average=args.average)
    if args.video:
        categories = config.get("categories") or (data.read_categories(args.data) if args.data else range(num_classes))
        if len(categories) != num_classes:
            raise ValueError(f"{path} knows {num_classes} classes, {args.data}/categories.txt names {len(categories)}")
        return label_videos(args, lambda views: score([(0, views)])[0], recipe, protocol, categories)
    folder = args.data or toy_folder(rank)
    views = functools.partial(test_views, recipe=recipe, protocol=protocol)
    videos = data.VideoList(folder, args.split, recipe, train=False, views=views)
    if len(videos.categories) != num_classes:
        raise ValueError(f"{path} knows {num_classes} classes, {folder}/categories.txt names {len(videos.categories)}")
    scores = score(videos, workers=args.workers, what="videos")
    if rank == 0:
        labels = multi_hot(videos.videos, num_classes)
        if args.out:
            meta = {"model": config["model"], "recipe": recipe, "checkpoint": path,
                    "iteration": checkpoint.get("iteration"), "list": str(videos.list), "classes": num_classes,
                    "protocol": {**protocol, "average": args.average},
                    "map": None if labels is None else sample_map(scores, labels)}
            save_scores(args.out, [video.path for video in videos.videos], scores, labels, meta)
        if videos.left_out:
            print(f"{videos.left_out} lines of {videos.list} left out (repeated, or no frames)")
        print_metrics(scores, labels)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    data.run_script(main)
