"""Clips -> probabilities -> sample-level mAP -> scores.npz; or one video -> its labels.

    python evaluate.py --checkpoint runs/tin/best.pt --data DATA [--split val] [--protocol dense] [--out scores.npz]
    torchrun --nproc-per-node 8 evaluate.py ...                      the same figures, sooner
    python evaluate.py --model slowfast --weights PUBLIC.pth ...     other people's weights, through slowfast.convert
    python evaluate.py --checkpoint runs/tin/best.pt --video FILE ... [--top 5] [--json] [--picture out.png]

A video's views (clips in time, crops in space, scales) are scored one by one and their probabilities averaged. Each
video is scored by exactly one process. N videos, K classes, B clips, T frames, V views, H, W pixels.
"""
import argparse
import codecs
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
    rows, columns = np.nonzero(labels)
    ahead = scores[rows] >= scores[rows, columns][:, None]  # (labels of all videos, K)
    precision = (ahead & labels[rows].astype(bool)).sum(1) / ahead.sum(1)
    return np.bincount(rows, precision, len(scores)) / np.maximum(np.count_nonzero(labels, axis=1), 1)


def sample_map(scores, labels):
    """The mean of average_precision over the videos, a fraction. Report's metric."""
    return float(average_precision(scores, labels).mean())


def make_protocol(recipe, name="clip"):
    """Which views a video is seen by: "clip", the recipe's one; "dense", its clips x crops at the first of its scales;
    "multiscale", at all of them (report)."""
    clips, crops, sizes = recipe["clips"], str(recipe["crops"]), [(side, side) for side in recipe["scales"]]
    if name == "clip":
        clips, crops, sizes = 1, "1", [(recipe["test_resize"], recipe["test_crop"])]
    return {"name": name, "clips": clips, "crops": crops, "sizes": sizes if name == "multiscale" else sizes[:1]}


def crop_places(right, down, crops, rng):
    """Where a window goes that has so much room to its right and below, [(x, y), ...]: "1" in the centre, "3" along the
    long side (start, end, centre) as in the authors' code, or "random", three anywhere, as the report says."""
    if crops == "random":
        return [tuple(place) for place in rng.integers((right + 1, down + 1), size=(3, 2)).tolist()]
    x, y = round(right / 2), round(down / 2)  # rounded as in torchvision
    ends = [(0, y), (right, y)] if right >= down else [(x, 0), (x, down)]
    return {"1": [(x, y)], "3": [*ends, (x, y)]}[crops]


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
            for x, y in crop_places(resized.shape[2] - crop, resized.shape[1] - crop, protocol["crops"], rng):
                window = resized[np.searchsorted(wanted, clip), y : y + crop, x : x + crop]
                views.setdefault((crop, x, y, *clip), [window, 0])[1] += 1
    total = sum(count for _, count in views.values())
    return [(clip, count / total) for clip, count in views.values()]


def by_size(items):
    """[(row, test_views), ...] of some videos -> [[clips (V, T, H, W, 3), rows (V,), weights (V,)], ...], by size.
    Few tensors: each that a loader's worker sends takes a file handle, and many systems give it 1,024."""
    groups = {}
    for row, views in items:
        for clip, weight in views:
            groups.setdefault(clip.shape, []).append((clip, row, weight))
    return [torch.utils.data.default_collate(group) for group in groups.values()]


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
                                         worker_init_fn=data.leave_process_group)
    scores = torch.zeros(len(views), num_classes, device=device)
    problem, started, was_training = "", time.time(), model.training
    model.eval()
    try:
        for step, groups in enumerate(loader, 1):
            for clips, rows, weights in groups:
                for some in torch.arange(len(clips)).split(view_batch):
                    with autocast or contextlib.nullcontext():
                        values = model(data.normalise(clips[some].to(device), recipe["mean"], recipe["std"]))
                    values = values.float()  # the sigmoid of half precision has few values near 1: they would tie
                    values = values if average == "logit" else values.sigmoid()
                    scores.index_add_(0, rows[some].to(device), values * weights[some, None].to(values))
            if what and rank == 0:
                data.progress(what, min(step * batch, len(mine)), len(mine), started)
    except OSError as error:
        problem = str(error.with_traceback(None))  # whose frames would keep the loader's workers alive
    model.train(was_training)
    raise_together(problem)
    if world > 1:
        dist.all_reduce(scores)  # exact: but for the process that scored it, a row is zero everywhere
    return (scores.sigmoid() if average == "logit" else scores).cpu().numpy()


def raise_together(problem):
    """An OSError in every process if one of them has a problem, a text; else nothing."""
    problems = [problem] * (dist.get_world_size() if dist.is_initialized() else 1)
    if dist.is_initialized():
        dist.all_gather_object(problems, problem)
    if any(problems):
        raise OSError(max(problems))


def multi_hot(videos, num_classes):
    """[Video, ...] -> uint8 (N, K), or None if no video of the list has a label, as in a test list."""
    labels = np.array([np.bincount(video.labels, minlength=num_classes) for video in videos], np.uint8)
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


def check_outputs(*files):
    """ValueError, before the work, for a file that could not be written after it. None: not asked for."""
    for file in filter(None, files):
        if Path(file).is_dir() or not os.access(Path(file).absolute().parent, os.W_OK):
            raise ValueError(f"{file}: there is no such folder, or it cannot be written there")


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


class ArraysOnly(pickle.Unpickler):
    """For PySlowFast's Caffe2 files: a pickle can run any code, this one makes numpy arrays and nothing else."""
    makers = {f"{maker.__module__}.{maker.__name__}": maker for maker in (
        np.dtype, np.ndarray, np._core.multiarray.scalar, np._core.multiarray._reconstruct, codecs.encode,
        *(type(np.dtype(kind)) for kind in "?bBhHiIlLqQefdSU"))}

    def find_class(self, module, name):
        name = f"{module.replace('numpy.core', 'numpy._core')}.{name}"  # numpy 1 had no underscore
        if name not in self.makers:
            raise pickle.UnpicklingError(f"GLOBAL {name}")  # torch's word for it
        return self.makers[name]


def read_checkpoint(path):
    """What a checkpoint file holds, a dict: a torch file, numpy scalars included, or a Caffe2 pickle of arrays.
    ValueError for other files, and for one that asks for another Python object, which could run code."""
    problem = ""
    for load in (lambda file: torch.load(file, map_location="cpu", weights_only=True),
                 lambda file: ArraysOnly(file, encoding="latin1").load()):
        with open(path, "rb") as file, torch.serialization.safe_globals([*ArraysOnly.makers.values()]):
            try:
                return dict(load(file))
            except Exception as error:  # either lets through whatever the bytes did to it
                problem += str(error)
    name = re.search(r"GLOBAL ([\w.]+)", problem)
    raise ValueError(f"{path}: " + (f"asks for the Python object {name[1]}, which is refused: it could run code" if name
                                    else "no checkpoint, or one that was cut short"))


def convert(module, checkpoint, path):
    """The tensors of a file, as read, in our names; the model file's errors get the file's name."""
    try:
        return module.convert(checkpoint)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def load_weights(module, recipe, checkpoint, path):
    """A checkpoint of any layout that convert knows -> (model, its number of classes), by a strict load. Where tensors
    do not fit, a ValueError with the recipe flags by which they would."""
    state = convert(module, checkpoint, path)

    def compare(recipe):
        """What only the file or only the recipe's network has, {(key, shape), ...}, and the file's number of classes:
        the first side of what is not as in a network for one class. So first sides do not count as differences."""
        try:
            with torch.device("meta"):  # shapes without memory
                ours = module.build(recipe, 1).state_dict()
        except (ValueError, KeyError):  # no such network
            ours = {}
        sides = [len(state[key]) for key in ours if key in state and ours[key].shape != state[key].shape]
        shapes = [{(key, tensor.shape[1:]) for key, tensor in tensors.items()} for tensors in (state, ours)]
        return shapes[0] ^ shapes[1], max(sides, default=1)

    misfits, num_classes = compare(recipe)
    if not misfits:
        model = module.build(recipe, num_classes)
        model.load_state_dict(state)
        return model, num_classes
    usual = [True, False, 3, 4, 5, 7, 8, 16, 18, 50, 101, 152, 200, "resnet18", "resnet50", "resnet101"]
    tries = dict.fromkeys((key, value) for key in re.findall(r'recipe\["(\w+)"\]', inspect.getsource(module.build))
                          for value in [*(row[key] for row in module.RECIPES.values()), *usual]
                          if type(value) is type(recipe[key]))
    wanted = recipe
    while left := len(compare(wanted)[0]):  # take the value that mends most, again and again
        wanted = min(({**wanted, key: value} for key, value in tries), key=lambda one: len(compare(one)[0]))
        if len(compare(wanted)[0]) >= left:
            break
    flags = " ".join(flag(key, value) for key, value in wanted.items() if value != recipe[key])
    raise ValueError(f"{path}: {len(misfits)} tensors do not fit, such as {min(misfits)[0]}" + (
        ", and no recipe flag makes them fit" if left else f"; they ask for {flags}"))


def flag(key, value):
    """A recipe value as one would write it on the command line: --weight-decay 0.0001."""
    name = key.replace("_", "-")
    return f"--{'no-' * (value is False)}{name}" if isinstance(value, bool) else f"--{name} {value}"


def open_recipe(name, row=None):
    """--model and --recipe -> (the model file's module, its row of RECIPES or the first, {key: its note}). A note is
    the comment on the key's line, in the row or else above RECIPES: meaning, unit and where the value comes from."""
    if not name.isidentifier() or not Path(__file__).with_name(f"{name}.py").exists():
        raise ValueError(f"--model {name}: there is no {name}.py beside this script")
    module = importlib.import_module(name)
    rows = getattr(module, "RECIPES", {})
    row = row or next(iter(rows), None)
    if row not in rows:
        raise ValueError(f"--recipe {row}: {name}.py has {', '.join(rows) or 'no RECIPES'}")
    shared, _, own = inspect.getsource(module).partition("\nRECIPES = ")
    own = re.search(rf'^    "{row}": .*?(?=^    "|^}})', own, re.DOTALL | re.MULTILINE)
    lines = [line.partition("  # ") for line in (shared + (own[0] if own else "")).splitlines()]
    return module, rows[row], {key: note for code, _, note in lines if note for key in re.findall(r'(\w+)"?[=:]', code)}


def add_recipe_flags(parser, recipe, notes={}):
    """A flag for every key of the recipe; notes: {key: help}. A flag that is not given leaves no trace."""
    choices = {"sampling": ["segments", "clip"], "augment": ["multiscale", "jitter"], "crops": ["1", "3", "random"],
               "loss": ["bce", "lsep", "warp", "ce"], "class_weight": ["none", "sqrt", "ratio"],
               "schedule": ["step", "cosine"]}
    group = parser.add_argument_group("the recipe's values")
    for key, value in recipe.items():
        several = isinstance(value, (list, tuple))
        kind = str if key in choices else int if value is None else type(value[0] if several else value)
        how = {"type": kind, "choices": choices.get(key)}
        if kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        elif several:
            how["nargs"] = "+" if key in ("scales", "milestones") else len(value)
        group.add_argument(f"--{key.replace('_', '-')}", default=argparse.SUPPRESS, **how,
                           help=f"{notes.get(key, '')} [{value}]".replace("%", "%%"))


def check_recipe(recipe):
    """The recipe, if a run can use it; else a ValueError with the flag. It may hold other flags' values as well."""
    counts = ("frames stride crop jitter batch reference_batch epochs iterations milestones test_resize test_crop "
              "clips scales view_batch top")
    for keys, least, below in ((counts, 1, np.inf), ("lr warmup weight_decay clip_grad loss_scale workers", 0, np.inf),
                               ("dropout momentum", 0, 1), ("std", 1e-6, np.inf)):
        for key in keys.split():
            if not all(least <= number < below for number in np.ravel(recipe.get(key, least))):
                raise ValueError(f"{flag(key, recipe[key])}: at least {least}" + f", below {below}" * (below < np.inf))
    for key, short in (("test_crop", recipe["test_resize"]), ("crop", min(recipe["jitter"]))):
        if recipe[key] > short and (key == "test_crop" or recipe["augment"] == "jitter"):
            raise ValueError(f"{flag(key, recipe[key])}: larger than the short side it is cut from, {short}")
    return recipe


def start_process(device=None):
    """(rank, world, device) of this process, joined with the others where torchrun's environment names them."""
    rank, world, local = (int(os.environ.get(key, default)) for key, default in
                          (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(f"cuda:{local}" if device == "cuda" else device)
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # no such kind, none here, or one without values
        raise ValueError(f"--device {device}: {str(error).splitlines()[0]}") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", rank=rank, world_size=world,
                                store=fresh_store(rank, world))
    return rank, world, device


def fresh_store(rank, world):
    """The part of torchrun's store that belongs to this start of the processes.
    After an elastic restart the store still holds what the dead ones wrote, such as their addresses. So the first
    process draws a name, and answers only to those that show it a name of their own: both are new."""
    store, _, _ = next(dist.rendezvous("env://"))
    first = own = os.urandom(16).hex()
    if rank == 0:
        store.set("first", own)
        for other in range(1, world):
            store.set(store.get(f"{own}/{other}").decode(), "")  # waits for the other
    while rank and not store.check([own]):
        first = store.get("first").decode()  # perhaps still a dead one's
        store.set(f"{first}/{rank}", own)
        time.sleep(0.05)
    return dist.PrefixStore(first, store)


def end_process():
    """Leave the group of processes. First, a moment without Python's lock: a thread of gloo's needs it to let go of
    the last exchange's tensors, and who destroys the group keeps it and waits for the thread (seen in PyTorch 2.11)."""
    if dist.is_initialized():
        time.sleep(0.1)
        dist.destroy_process_group()


def toy_folder(rank):
    """runs/toy, drawn by rank 0 if it is not there yet."""
    folder = Path("runs", "toy")
    if rank == 0 and not folder.exists():
        data.draw_toy(folder)
    if dist.is_initialized():
        dist.barrier()
    return folder


def open_video(file):
    """A video file -> (read: frame indices -> uint8 (n, h, w, 3), its number of frames). The pixels are those that
    extraction would give, but the disk is not touched: the JPEGs are in memory, some 2.5 GB of them for an hour."""
    stream, problem = data.ffmpeg(file, "-f", "image2pipe", "-c:v", "mjpeg", "-")
    frames = [jpeg + b"\xff\xd9" for jpeg in stream.split(b"\xff\xd9")[:-1]]  # the marker at a JPEG's end
    if problem or not frames:
        raise OSError(f"{file}: {problem or 'no frame'}")
    return lambda indices: torch.from_numpy(np.stack([Image.open(io.BytesIO(frames[i])) for i in indices])), len(frames)


def label_videos(args, rank, score, recipe, protocol, categories):
    """--video: the first process prints the labels of each file; the exit status. score: test_views -> (K,)."""
    if shutil.which("ffmpeg") is None:
        raise ValueError("the program ffmpeg is missing; Debian: apt install ffmpeg, macOS: brew install ffmpeg")
    say, found, rows = print if rank == 0 else (lambda *_, **__: None), [], []
    for file in args.video:
        try:
            read, num_frames = open_video(file)
        except OSError as error:
            say(f"evaluate.py: {error}", file=sys.stderr)
            continue
        scores = score(test_views(read, num_frames, Path(file).stem, recipe, protocol))
        labels = {categories[k]: float(scores[k]) for k in np.argsort(-scores, kind="stable")[: args.top]}
        found.append({"video": file, "labels": labels})
        if args.picture:
            rows.append(draw_row(read(data.sample_indices(num_frames, recipe)), labels))
        if not args.json:
            say(file, *(f"{100 * p:6.2f} %  {name}" for name, p in labels.items()), sep="\n")
    if args.json:
        say(json.dumps(found, indent=1))
    if rows and rank == 0:
        Image.fromarray(np.concatenate(rows)).save(args.picture)
    return 0 if len(found) == len(args.video) else 2


def draw_row(frames, labels):
    """The frames that the model saw, uint8 (T, h, w, 3), and a bar for each of {label: probability} -> a picture."""
    picture = Image.new("RGB", (160 * len(frames), 128 + 18 * len(labels)), "white")
    draw = ImageDraw.Draw(picture)
    for i, frame in enumerate(frames):
        picture.paste(Image.fromarray(frame.numpy()).resize((160, 120)), (160 * i, 0))
    for y, (name, p) in zip(range(124, picture.height, 18), labels.items()):
        draw.rectangle((0, y, p * picture.width, y + 15), fill=(150, 190, 240))
        draw.text((4, y + 2), f"{100 * p:5.1f} %  {name}", fill="black")
    return picture


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        epilog="Every recipe value is a flag too, such as --clips 10 --crops random --scales 128 144;\n"
               "python train.py --model NAME --print-recipe shows them all, with their sources.")
    add = parser.add_argument
    add("--checkpoint", metavar="FILE", help="of train.py; it holds its model, recipe and categories")
    add("--model", metavar="NAME", help="with --weights: a model file beside this script, such as tin")
    add("--weights", metavar="FILE", help="other people's weights, read by the model file's convert")
    add("--recipe", metavar="ROW", help="with --weights: a row of the model's RECIPES (its first)")
    add("--data", metavar="DATA", help="a data folder (the toy, runs/toy)")
    add("--split", default="val", help="which of its lists (%(default)s)")
    add("--protocol", choices=["clip", "dense", "multiscale"], help="one view (the default), clips x crops, or these "
        "at all scales (the default with --clips, --crops or --scales)")
    add("--average", default="prob", choices=["prob", "logit"], help="what is averaged over the views (%(default)s)")
    add("--out", metavar="FILE.npz", help="write paths, scores and labels there, for ensemble.py")
    add("--batch", type=int, default=argparse.SUPPRESS, help="videos loaded at once (VIEW_BATCH / views, at least 1)")
    add("--view-batch", type=int, default=16, help="views in one forward pass (%(default)s)")
    add("--workers", type=int, default=2, help="loader processes per process, 0: none (%(default)s)")
    add("--device", help="cpu, cuda, ... (cuda if there is one)")
    add("--video", nargs="+", metavar="FILE", help="label these video files instead of a list")
    add("--top", type=int, default=5, help="labels per video (%(default)s)")
    add("--json", action="store_true", help="print the labels as JSON")
    add("--picture", metavar="OUT.png", help="draw the frames that the model saw and a bar per label")
    args, rest = parser.parse_known_args()
    if not args.checkpoint and not (args.model and args.weights):
        parser.error("which network? --checkpoint FILE, or --model NAME --weights FILE")
    path = args.checkpoint or args.weights
    checkpoint = read_checkpoint(path)
    config = checkpoint.get("config") if args.checkpoint else {"model": args.model, "recipe": {}}
    if not isinstance(config, dict) or [type(config.get(key)) for key in ("model", "recipe")] != [str, dict]:
        raise ValueError(f"{path}: not one of our checkpoints; others': --model NAME --weights {path}")
    module, row, _ = open_recipe(config["model"], args.recipe)
    recipe, flags = {**row, **config["recipe"]}, argparse.ArgumentParser(allow_abbrev=False)
    add_recipe_flags(flags, recipe)
    given = vars(flags.parse_args(rest))
    recipe = {**recipe, **given}
    check_recipe({**recipe, **vars(args)})
    name = "multiscale" if {"clips", "crops", "scales"} & given.keys() else "clip"
    protocol = make_protocol(recipe, args.protocol or name)
    check_outputs(args.out, args.picture)
    if args.picture and Image.registered_extensions().get(Path(args.picture).suffix.lower()) not in Image.SAVE:
        raise ValueError(f"--picture {args.picture}: no kind of picture that Pillow writes, such as .png")
    rank, _, device = start_process(args.device)
    model, num_classes = load_weights(module, recipe, checkpoint, path)
    views = protocol["clips"] * len(protocol["sizes"]) * (1 if protocol["crops"] == "1" else 3)
    batch = vars(args).get("batch", max(1, args.view_batch // views))
    score = functools.partial(predict, model.to(device), num_classes=num_classes, recipe=recipe, device=device,
                              batch=batch, view_batch=args.view_batch, average=args.average)
    folder = args.data or (None if args.video else toy_folder(rank))
    categories = data.read_categories(folder) if folder else config.get("categories", range(num_classes))
    if len(categories) != num_classes:
        raise ValueError(f"{path} knows {num_classes} classes, {folder}/categories.txt names {len(categories)}")
    status = 0
    if args.video:
        status = label_videos(args, rank, lambda views: score([(0, views)])[0], recipe, protocol, categories)
    else:
        views = functools.partial(test_views, recipe=recipe, protocol=protocol)
        videos = data.VideoList(folder, args.split, recipe, train=False, views=views)
        scores, labels = score(videos, workers=args.workers, what="videos"), multi_hot(videos.videos, num_classes)
        if rank == 0 and args.out:
            meta = {"model": config["model"], "recipe": recipe, "checkpoint": path,
                    "iteration": checkpoint.get("iteration"), "list": str(videos.list), "classes": num_classes,
                    "protocol": {**protocol, "average": args.average}, "left_out": videos.left_out,
                    "map": None if labels is None else sample_map(scores, labels)}
            save_scores(args.out, [video.path for video in videos.videos], scores, labels, meta)
        if rank == 0 and videos.left_out:
            print(f"{videos.left_out} lines of {videos.list} left out (repeated, or no frames)")
        if rank == 0:
            print_metrics(scores, labels)
    end_process()
    return status


if __name__ == "__main__":
    data.run_script(main)
