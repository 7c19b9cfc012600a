"""Clips -> probabilities -> scores.npz and the sample-level mAP; or the labels of single videos.

    python evaluate.py --checkpoint runs/tin/best.pt --data DATA --protocol dense --out scores.npz
    torchrun --nproc-per-node 8 evaluate.py ...                    the same, by 8 processes
    python evaluate.py --model slowfast --weights PUBLIC.pth ...   other people's weights
    python evaluate.py --checkpoint runs/tin/best.pt --video FILE ... [--picture out.png]

A view is one clip of a video at one place and one scale. A video's score is the mean over the
probabilities of its views. Each video is scored by exactly one process.

N videos, K classes, B videos at once, V views of each, T frames, H height, W width. In comments on
settings "report" is arXiv 2003.05837 and "the authors" are its authors. "ours" means that the
report is silent; what we follow, or why, comes after it.
"""
import argparse
import contextlib
import functools
import importlib
import json
import os
import pickle
import re
import sys
import tempfile
import zlib
from pathlib import Path

# Make idle CPU threads sleep; their busy-waiting makes training on a busy laptop several times
# slower. This must be set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont

import data

# How a video is scored: one of three pages of shared settings (the others are in data.py and
# train.py). A row of RECIPES in a model file overrides what differs.
RECIPE = dict(
    # protocol "clip": one view
    test_resize=256,  # short side in pixels; ours: the authors' code
    test_crop=224,    # side of the centre crop; report

    # protocols "dense" and "multiscale"; the first scale is the one of "dense"
    clips=5,          # clips along time; report
    crops="3",        # per clip; "1": centre; "3": start, end and centre of the long side (the
                      # authors' code); "random": three random places (the report's own words)
    scales=(256,),    # short sides in pixels, and the crops' sides as well; report
)

# The recipe keys whose values are words, and the words that are allowed.
WORDS = {
    "sampling": ["segments", "clip"],
    "augment": ["multiscale", "jitter"],
    "crops": ["1", "3", "random"],
    "loss": ["bce", "lsep", "warp", "ce"],
    "class_weight": ["none", "sqrt", "ratio"],
    "schedule": ["step", "cosine"],
}


# ---- the metric ------------------------------------------------------------------------------

def average_precision(scores, labels):
    """Average precision of each video over all K classes: fractions (N,), from scores and 0/1
    labels, both (N, K).

    AP is the mean, over the labels u of the video, of
    (labels that score at least as high as u) / (classes that score at least as high as u).
    Equal scores count together, so the order of the classes does not matter: a class that ties with
    u lowers the precision if it is no label of the video, and never does if it is one. A video
    without labels has AP 0, as in scikit-learn's average_precision_score. Report: "mean Average
    Precision under sample level".
    """
    scores = np.asarray(scores)
    labels = np.asarray(labels)
    if scores.ndim != 2 or scores.shape != labels.shape:
        raise ValueError(f"scores {scores.shape} and labels {labels.shape} must both be (N, K)")
    if np.isnan(scores).any():
        raise ValueError("a score is not a number")
    if not np.isin(labels, (0, 1)).all():
        raise ValueError("labels must be 0 or 1")

    # One row for each pair of a video and one of its labels; there are P pairs in all.
    videos, classes = np.nonzero(labels)
    threshold = scores[videos, classes]
    at_or_above = scores[videos] >= threshold[:, None]  # (P, K)
    hits = at_or_above & (labels[videos] == 1)          # (P, K)
    precision = hits.sum(axis=1) / at_or_above.sum(axis=1)

    # the mean over each video's pairs
    sums = np.bincount(videos, weights=precision, minlength=len(scores))
    counts = np.count_nonzero(labels, axis=1)
    return sums / np.maximum(counts, 1)


def sample_map(scores, labels):
    """The report's metric: the mean of average_precision over the videos, a fraction."""
    return float(average_precision(scores, labels).mean())


def hit_rates(scores, labels):
    """How often the likeliest class, and one of the five likeliest, is a label of the video. Of
    classes with equal scores the first counts as the likeliest."""
    likeliest = np.argsort(-scores, axis=1, kind="stable")[:, :5]
    hits = np.take_along_axis(labels, likeliest, axis=1)
    return hits[:, 0].mean(), hits.any(axis=1).mean()


def print_metrics(scores, labels):
    """Print the sample-level mAP on a line of its own, last, after some supplementary figures."""
    if labels is None or not labels.any():
        print("the list has no labels: scores, but no mAP")
        return
    precision = average_precision(scores, labels)
    labelled = labels.any(axis=1)
    if not labelled.all():
        print(f"{(~labelled).sum()} of {len(scores)} videos have no label and count as AP 0; "
              f"mAP of the others {100 * precision[labelled].mean():.2f}")

    # Another metric: the average precision over the videos, for each class that a video has. It is
    # the same function with the roles exchanged: one row, whose columns are the videos.
    class_precision = []
    for k in np.flatnonzero(labels.any(axis=0)):
        class_scores = scores[:, k][None, :]  # (1, N)
        class_labels = labels[:, k][None, :]
        class_precision.append(average_precision(class_scores, class_labels)[0])
    top1, top5 = hit_rates(scores[labelled], labels[labelled])
    print(f"class-level mAP {100 * np.mean(class_precision):.2f}, "
          f"top-1 hit rate {100 * top1:.2f}, top-5 {100 * top5:.2f}")
    print(f"mAP {100 * precision.mean():.2f}")


# ---- the views of a video --------------------------------------------------------------------

def make_protocol(recipe, name="clip"):
    """Which views of a video are scored. "clip": one; "dense": clips x crops at the first scale;
    "multiscale": clips x crops at every scale (report). The "sizes" in the result are [(short side,
    crop), ...] in pixels, one pair a scale."""
    if name == "clip":
        sizes = [(recipe["test_resize"], recipe["test_crop"])]
        return {"name": name, "clips": 1, "crops": "1", "sizes": sizes}
    sizes = [(side, side) for side in recipe["scales"]]
    if name == "dense":
        sizes = sizes[:1]
    return {"name": name, "clips": recipe["clips"], "crops": recipe["crops"], "sizes": sizes}


def count_views(protocol):
    """Views of a video, over all scales."""
    crops = 3
    if protocol["crops"] == "1":
        crops = 1
    return protocol["clips"] * crops * len(protocol["sizes"])


def crop_places(right, down, crops, rng):
    """Top left corners [(x, y), ...] of the crops. A crop in the frame's top left corner could move
    `right` pixels to the right and `down` pixels down."""
    x = round(right / 2)  # rounded as in torchvision
    y = round(down / 2)
    if crops == "1":
        return [(x, y)]
    if crops == "random":
        places = rng.integers((right + 1, down + 1), size=(3, 2))  # a row is (x, y)
        return [tuple(place) for place in places.tolist()]
    if right >= down:
        return [(0, y), (right, y), (x, y)]
    return [(x, 0), (x, down), (x, y)]


def test_views(read, num_frames, name, recipe, protocol):
    """All views of a video: for each scale uint8 (V, T, crop, crop, 3).

    read: frame indices -> uint8 (n, h, w, 3); it is called once. What is random is seeded by the
    video's name (its path in the list, or the file's name without its ending), so every run draws
    the same.
    """
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    length = recipe["frames"]
    stride = recipe["stride"]

    # frame indices of the clips
    clips = []
    if recipe["sampling"] == "segments":
        # the middles of the segments, then random places in them; report: "5 random chips"
        clips.append(data.segment_indices(num_frames, length))
        for _ in range(1, protocol["clips"]):
            clips.append(data.segment_indices(num_frames, length, rng))
    else:
        for start in data.clip_starts(num_frames, length, stride, protocol["clips"]):
            clips.append(data.clip_indices(num_frames, length, stride, start))

    # every frame is decoded and resized once, even if several clips share it
    indices = np.unique(clips)  # in order, so searchsorted finds the row of a frame
    frames = read(indices)
    views = []
    for short, crop in protocol["sizes"]:
        resized = data.resize(frames, short)
        height, width = resized.shape[1:3]
        windows = []
        for clip in clips:
            clip_frames = resized[np.searchsorted(indices, clip)]
            for x, y in crop_places(width - crop, height - crop, protocol["crops"], rng):
                windows.append(clip_frames[:, y : y + crop, x : x + crop])
        views.append(torch.stack(windows))
    return views


test_views.__test__ = False  # tells pytest that this is not a test


def stack_views(items):
    """[(row, test_views), ...] -> rows (B,), and for each scale uint8 (B, V, T, H, W, 3)."""
    rows = torch.tensor([row for row, _ in items])
    scales = zip(*[views for _, views in items])  # for each scale, the views of all videos
    return rows, [torch.stack(views) for views in scales]


# ---- scores ----------------------------------------------------------------------------------

def probabilities(logits, loss):
    """Logits -> probabilities. In a network trained by cross-entropy the classes exclude each
    other."""
    if loss == "ce":
        return logits.softmax(dim=-1)
    return logits.sigmoid()


@torch.no_grad()
def score_views(model, views, recipe, device, view_batch=16, average="prob",
                autocast=contextlib.nullcontext(), channels_last=False):
    """The scores (B, K) of videos whose views are, for each scale, uint8 (B, V, T, H, W, 3).

    Report: "class prediction probabilities are averaged". average "logit": the probability of the
    mean logit instead. view_batch: views in one forward pass, which bounds the memory. The network
    gets them normalised, (views, T, 3, H, W).
    """
    total = 0
    for scale in views:
        videos, count = scale.shape[:2]
        clips = scale.flatten(0, 1)  # the views of all videos, one after another
        logits = []
        for part in clips.split(view_batch):
            part = part.to(device, non_blocking=True)
            part = data.normalise(part, recipe["mean"], recipe["std"], channels_last)
            with autocast:
                output = model(part)
            # In half precision many probabilities near 1 would round to the same value and tie.
            logits.append(output.float())

        values = torch.cat(logits)
        if average == "prob":
            values = probabilities(values, recipe["loss"])
        total = total + values.unflatten(0, (videos, count)).mean(dim=1)

    mean = total / len(views)  # every scale has the same number of views
    if average == "logit":
        return probabilities(mean, recipe["loss"])
    return mean


def predict(model, videos, num_classes, recipe, device, batch=8, workers=0, progress_name=None,
            **options):
    """The scores of all videos, float32 (N, K), the same in every process.

    videos: a data set whose items are (row, test_views). batch: videos loaded at once.
    progress_name: what lines on progress call the videos; None: no such lines. options: those of
    score_views. model: without DDP's wrapper, in which processes wait for each other, although some
    have fewer videos.
    """
    rank = 0
    world = 1
    if dist.is_initialized():
        rank = dist.get_rank()
        world = dist.get_world_size()
    mine = torch.utils.data.Subset(videos, range(rank, len(videos), world))
    loader = torch.utils.data.DataLoader(
        mine, batch_size=batch, num_workers=workers, collate_fn=stack_views,
        pin_memory=device.type == "cuda", worker_init_fn=data.ignore_interrupts)
    progress = None
    if progress_name is not None and rank == 0:
        progress = data.Progress(progress_name, len(mine))

    was_training = model.training
    model.eval()
    scores = torch.zeros(len(videos), num_classes, device=device)
    done = 0
    for rows, views in data.load(loader):
        scores[rows.to(device)] = score_views(model, views, recipe, device, **options)
        done += len(rows)
        if progress is not None:
            progress.update(done)
    model.train(was_training)

    # Each row was filled by one process and is zero in the others, so the sum is exact.
    if world > 1:
        dist.all_reduce(scores)
    return scores.cpu().numpy()


def multi_hot(videos):
    """The labels of a VideoList: uint8 (N, K), or None if no video has one, as in a test list."""
    labels = np.zeros((len(videos), len(videos.categories)), np.uint8)
    for row in range(len(videos)):
        labels[row, videos.video(row).labels] = 1
    if not labels.any():
        return None
    return labels


def save_scores(path, paths, scores, labels, meta):
    """scores.npz: paths (N,), scores (N, K) float32, labels (N, K) uint8 unless None, and meta, a
    JSON text. Written whole or not at all; numpy reads it without unpickling anything."""
    arrays = {"paths": np.array(paths), "scores": scores.astype(np.float32),
              "meta": np.array(json.dumps(meta))}
    if labels is not None:
        arrays["labels"] = labels
    part = Path(f"{path}.part-{os.getpid()}.npz")  # numpy appends .npz to other names
    try:
        np.savez_compressed(part, **arrays)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def check_output(path):
    """Raise a ValueError before the work if the file could not be written after it."""
    if Path(path).is_dir():
        raise ValueError(f"{path}: is a folder; name a file")
    if not os.access(Path(path).absolute().parent, os.W_OK):
        raise ValueError(f"{path}: there is no such folder, or it cannot be written to")


# ---- networks and their weights --------------------------------------------------------------

def open_model(name, row=None, pages=(data.RECIPE, RECIPE)):
    """--model and --recipe -> (the model file's module, the recipe). The recipe is merged in this
    order: the shared pages, data.TOY if the row is "toy", and the row (None: the file's first)."""
    folder = Path(__file__).parent
    scripts = {"data", "evaluate", "train", "ensemble"}
    known = sorted({file.stem for file in folder.glob("*.py")} - scripts)
    if name not in known:
        raise ValueError(f"--model {name}: no model file; there are {', '.join(known)}")
    module = importlib.import_module(name)
    if not hasattr(module, "RECIPES"):
        raise ValueError(f"--model {name}: {name}.py has no RECIPES; see tsn.py for what it needs")
    if row is None:
        row = next(iter(module.RECIPES))
    if row not in module.RECIPES:
        raise ValueError(f"--recipe {row}: {name}.py has the rows {', '.join(module.RECIPES)}")

    recipe = {"loss": "bce"}  # sigmoid or softmax? Only train.RECIPE has it, which evaluation lacks
    for page in pages:
        recipe = override(recipe, page)
    if row == "toy":
        recipe = override(recipe, data.TOY)
    return module, override(recipe, module.RECIPES[row])


def override(recipe, values):
    """The recipe with other values. A run counts iterations, or epochs if iterations is 0, so
    values with only one of the two clear the other."""
    recipe = {**recipe, **values}
    if "epochs" in values and "iterations" not in values:
        recipe["iterations"] = 0
    if values.get("iterations", 0) > 0 and "epochs" not in values:
        recipe["epochs"] = 0
    return recipe


def add_recipe_flags(parser, recipe):
    """A flag for every key of the recipe. A flag that is not given leaves no trace."""
    group = parser.add_argument_group("the recipe's values")
    for key, value in recipe.items():
        options = {"default": argparse.SUPPRESS, "help": str(value)}
        if isinstance(value, bool):
            options["action"] = argparse.BooleanOptionalAction
        elif isinstance(value, (tuple, list)):
            options["type"] = type(value[0])
            options["nargs"] = "+"
        elif value is None:  # SlowFast's alpha: the network chooses a number if none is given
            options["type"] = int
        else:
            options["type"] = type(value)
        group.add_argument(f"--{key.replace('_', '-')}", **options)


AT_LEAST_ONE = ["frames", "stride", "crop", "jitter", "batch", "reference_batch", "test_resize",
                "test_crop", "clips", "scales"]


def check_recipe(recipe):
    """Raise a ValueError that names the flag if a value cannot be used."""
    for key, value in recipe.items():
        flag = f"--{key.replace('_', '-')}"
        values = [value]
        if isinstance(value, (tuple, list)):
            values = value
        numbers = [number for number in values if isinstance(number, (int, float))]

        if key in WORDS and value not in WORDS[key]:
            raise ValueError(f"{flag} {value}: known are {', '.join(WORDS[key])}")
        if not all(0 <= number < float("inf") for number in numbers):
            raise ValueError(f"{flag} {value}: must be finite and not negative")
        if key in AT_LEAST_ONE and min(numbers) < 1:
            raise ValueError(f"{flag} {value}: at least 1")
    if recipe["test_crop"] > recipe["test_resize"]:
        raise ValueError(f"--test-crop {recipe['test_crop']}: larger than the short side that it "
                         f"is cut from, --test-resize {recipe['test_resize']}")
    if len(recipe["jitter"]) != 2 or recipe["jitter"][0] > recipe["jitter"][1]:
        raise ValueError(f"--jitter {recipe['jitter']}: two numbers, the smaller one first")
    if recipe["augment"] == "jitter" and recipe["crop"] > recipe["jitter"][0]:
        raise ValueError(f"--crop {recipe['crop']}: larger than the short side that it is cut "
                         f"from, --jitter {recipe['jitter'][0]}")
    if len(recipe["mean"]) != 3 or len(recipe["std"]) != 3 or min(recipe["std"]) == 0:
        raise ValueError("--mean and --std: three numbers each, for red, green and blue; a "
                         "standard deviation is not 0")


def read_checkpoint(path):
    """What a checkpoint file holds, a dict of tensors, numbers, texts, lists and dicts. ValueError
    for other files, and for a file that asks for any other Python object: it could run code."""
    # what numpy's numbers and arrays are made of; skip on first reading
    numpy_objects = [np.dtype, np.ndarray]
    for kind in (np.float16, np.float32, np.float64, np.int32, np.int64, np.bool_):
        numpy_objects.append(type(np.dtype(kind)))
    for name in ("scalar", "_reconstruct"):
        function = getattr(np._core.multiarray, name)
        numpy_objects.append((function, f"numpy._core.multiarray.{name}"))
        numpy_objects.append((function, f"numpy.core.multiarray.{name}"))  # as NumPy 1 wrote it
    with open(path, "rb") as file:
        try:
            with torch.serialization.safe_globals(numpy_objects):
                return dict(torch.load(file, map_location="cpu", weights_only=True))
        except Exception as error:  # damaged bytes raise many kinds of errors
            problem = error
    if isinstance(problem, pickle.UnpicklingError) and "GLOBAL" in str(problem):
        raise ValueError(f"{path}: asks for a Python object that is not a tensor, and loading it "
                         "could run code; save the state_dict alone with the program that wrote "
                         "the file: torch.save(model.state_dict(), ...)")
    raise ValueError(f"{path}: not a PyTorch checkpoint, or truncated")


def convert(module, checkpoint, path):
    """The tensors of a checkpoint that read_checkpoint has read, with our names. The tensors may
    stand in a container, and their names may have prefixes of DDP and torch.compile. A new model
    file need not know these: its convert always gets {"model": tensors}, without prefixes."""
    tensors = checkpoint
    for container in ("state_dict", "model", "model_state", "model_state_dict", "net"):
        if isinstance(checkpoint.get(container), dict):
            tensors = checkpoint[container]
            break
    content = {"model": strip_prefixes(tensors)}
    if "blobs" in checkpoint:  # PySlowFast's Caffe2 arrays have a container of their own
        content = checkpoint
    try:
        return module.convert(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def strip_prefixes(tensors):
    stripped = {}
    for key, tensor in tensors.items():
        stripped[re.sub(r"^(module\.|_orig_mod\.)+", "", str(key))] = tensor
    return stripped


def load_weights(module, recipe, checkpoint, path):
    """A checkpoint of any layout that the model file knows -> (model, its number of classes). The
    load is strict; ValueError with what does not fit."""
    state = convert(module, checkpoint, path)

    num_classes = 1  # any number will do if the file has no classifier, which is an error below
    for key in classifier_keys(module, recipe):
        if key in state:
            num_classes = len(state[key])

    model = module.build(recipe, num_classes)
    problems = list(misfits(state, model.state_dict()).values())
    if problems:
        others = ""
        if len(problems) > 5:
            others = f"; and {len(problems) - 5} others"
        raise ValueError(f"{path}: does not fit the network: {'; '.join(problems[:5])}{others}. "
                         "README.md has the flags of public weights")
    model.load_state_dict(state)
    return model, num_classes


def classifier_keys(module, recipe):
    """The keys of the classifier's tensors: the only ones whose shapes depend on the number of
    classes, which is their first dimension."""
    with torch.device("meta"):  # shapes without memory
        one = module.build(recipe, 1).state_dict()
        two = module.build(recipe, 2).state_dict()
    return [key for key in one if one[key].shape != two[key].shape]


def misfits(theirs, ours):
    """{key: what is wrong} for every key that one of two state dicts lacks, or whose tensors have
    different shapes."""
    problems = {}
    for key in {**ours, **theirs}:
        if key not in theirs:
            problems[key] = f"{key} is not in the file"
        elif key not in ours:
            problems[key] = f"{key} is not in the network"
        elif theirs[key].shape != ours[key].shape:
            problems[key] = (f"{key} is {tuple(theirs[key].shape)} in the file, "
                             f"{tuple(ours[key].shape)} in the network")
    return problems


# ---- processes -------------------------------------------------------------------------------

def start_process(device=None):
    """(rank, world, device) of this process; torchrun's environment says whether there are
    others."""
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    if device is None:
        device = "cpu"
        if torch.cuda.is_available():
            device = "cuda"
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # there is no such device, or none here
        raise ValueError(f"--device {device}: {str(error).splitlines()[0]}") from None
    device = torch.device(device)

    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    if world > 1:
        # When torchrun has restarted the processes, its store still holds the addresses of the dead
        # ones. A prefix for each start hides them. Each node counts its own starts, so this works
        # on one node only; README.md says what helps on several.
        store, _, _ = next(dist.rendezvous("env://"))
        if world == int(os.environ.get("LOCAL_WORLD_SIZE", world)):  # one node
            start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            store = dist.PrefixStore(f"start {start}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    return rank, world, device


def end_process():
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def toy_folder(rank):
    """runs/toy; the first process draws it if it is not there."""
    folder = Path("runs", "toy")
    if rank == 0 and not folder.exists():
        data.draw_toy(folder)
    if dist.is_initialized():
        dist.barrier()
    return folder


def make_autocast(device, amp):
    """The context in which the network runs, for a value of --amp. In half precision, matrix
    products and convolutions are faster; weights stay float32."""
    dtypes = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
    return torch.autocast(device.type, dtype=dtypes[amp], enabled=amp != "off")


def use_channels_last(model):
    """Store the weights with channels innermost, which is faster on GPUs. Values stay the same."""
    has_3d = any(parameter.dim() == 5 for parameter in model.parameters())
    if has_3d:
        return model.to(memory_format=torch.channels_last_3d)
    return model.to(memory_format=torch.channels_last)


# ---- --video ---------------------------------------------------------------------------------

def label_videos(args, score, recipe, protocol, categories):
    """Print the labels of each file of --video. Returns the exit status: 2 if a file could not be
    read. score: test_views of one video -> (K,)."""
    data.require_ffmpeg()
    results = []
    pictures = []
    for file in args.video:
        with tempfile.TemporaryDirectory() as folder:
            count, message = data.decode_video(file, Path(folder))
            if message:
                print(f"{file}: {count} frames; {message}", file=sys.stderr)
            if count == 0:
                continue

            def read(indices):
                return data.read_frames(folder, indices)

            scores = score(test_views(read, count, Path(file).stem, recipe, protocol))
            if args.picture:
                frames = read(data.sample_indices(count, recipe))
        labels = {}
        for k in np.argsort(-scores, kind="stable")[: args.top]:
            labels[categories[k]] = float(scores[k])
        results.append({"video": file, "labels": labels})
        if args.picture:
            pictures.append(draw_labels(frames, labels))
        if not args.json:
            print(file)
            for name, probability in labels.items():
                print(f"{100 * probability:6.2f} %  {name}")

    if args.json:
        print(json.dumps(results, indent=1))
    if pictures:
        stack_pictures(pictures).save(args.picture)
    if len(results) < len(args.video):
        return 2
    return 0


def draw_labels(frames, labels, columns=8, frame_height=128, line=24):
    """A picture of a clip's whole frames, uint8 (T, h, w, 3), in order, and below them a bar for
    each of {label: probability}. Sizes are in pixels."""
    columns = min(columns, len(frames))
    rows = -(-len(frames) // columns)  # rounded up
    frame_width = round(frame_height * frames.shape[2] / frames.shape[1])
    font = ImageFont.load_default(size=15)
    names_width = max(round(font.getlength(name)) for name in labels) + 16
    width = max(columns * (frame_width + 4), names_width + 260)
    top = rows * (frame_height + 4) + 8
    picture = Image.new("RGB", (width, top + line * len(labels) + 8), "white")
    draw = ImageDraw.Draw(picture)

    for i, frame in enumerate(frames):
        row, column = divmod(i, columns)
        image = Image.fromarray(frame.numpy()).resize((frame_width, frame_height))
        picture.paste(image, (column * (frame_width + 4), row * (frame_height + 4)))

    longest = width - names_width - 80
    for i, (name, probability) in enumerate(labels.items()):
        y = top + i * line
        end = names_width + probability * longest
        draw.text((8, y + 3), name, fill="black", font=font)
        draw.rectangle((names_width, y + 3, names_width + longest, y + line - 3), fill="#eeeeee")
        draw.rectangle((names_width, y + 3, end, y + line - 3), fill="#4a86c8")
        draw.text((names_width + longest + 8, y + 3), f"{100 * probability:.1f} %", fill="black",
                  font=font)
    return picture


def stack_pictures(pictures):
    """One picture below the other."""
    width = max(picture.width for picture in pictures)
    height = sum(picture.height for picture in pictures)
    stack = Image.new("RGB", (width, height), "white")
    y = 0
    for picture in pictures:
        stack.paste(picture, (0, y))
        y += picture.height
    return stack


# ---- the script ------------------------------------------------------------------------------

def parse_arguments():
    """Read the command line and the checkpoint -> (args, module, recipe, checkpoint, path, config).
    The recipe is a row of the model file, overridden by the recipe in a checkpoint of train.py and
    then by flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="The recipe's keys are flags too: --clips 10 --crops random --scales 128 144; "
               "--loss ce for a network that was trained by cross-entropy, such as on Kinetics.")
    add = parser.add_argument
    add("--checkpoint", metavar="FILE",
        help="written by train.py; it holds its model, recipe and classes")
    add("--model", metavar="NAME",
        help="with --weights: a model file beside this script, such as tin")
    add("--weights", metavar="FILE", help="other people's weights; the model file converts them")
    add("--recipe", metavar="ROW",
        help="with --weights: a row of the model's RECIPES (default: its first)")
    add("--data", metavar="DATA", help="a data folder (default: the toy, runs/toy)")
    add("--split", default="val", help="which of its lists (%(default)s)")
    add("--protocol", choices=["clip", "dense", "multiscale"],
        help="one view, clips x crops at the first scale, or at all scales (default: clip, or "
             "multiscale if --clips, --crops or --scales is given)")
    add("--average", default="prob", choices=["prob", "logit"],
        help="what is averaged over the views (%(default)s)")
    add("--out", metavar="FILE.npz", help="write paths, scores and labels, for ensemble.py")
    add("--batch", type=int, metavar="VIDEOS",
        help="videos loaded at once (default: VIEW_BATCH / views of a video)")
    add("--view-batch", type=int, default=16, metavar="VIEWS",
        help="views in one forward pass (%(default)s)")
    add("--workers", type=int, default=2,
        help="loader processes per process, 0: none (%(default)s)")
    add("--device", help="cpu, cuda, ... (default: cuda if there is one)")
    add("--amp", default="off", choices=["off", "bf16", "fp16"],
        help="half precision; bf16 changed the toy's scores by at most 0.008 (%(default)s)")
    add("--channels-last", action="store_true", help="channels innermost in memory: faster on GPUs")
    add("--compile", action="store_true", help="torch.compile the network")
    add("--video", nargs="+", metavar="FILE", help="label these video files instead of a list")
    add("--top", type=int, default=5, help="labels per video (%(default)s)")
    add("--json", action="store_true", help="print the labels as JSON")
    add("--picture", metavar="OUT.png",
        help="draw the middle clip's frames, uncropped, and the labels")
    args, rest = parser.parse_known_args()
    if not args.checkpoint and not (args.model and args.weights):
        parser.error("which network? --checkpoint FILE, or --model NAME --weights FILE")
    check_arguments(args)

    path = args.checkpoint or args.weights
    checkpoint = read_checkpoint(path)
    config = {"model": args.model, "recipe": {}, "categories": None}
    if args.checkpoint:
        config = checkpoint.get("config")
        if not isinstance(config, dict) or not {"model", "recipe", "categories"} <= set(config):
            raise ValueError(f"{path}: not a checkpoint of train.py; for other people's files: "
                             f"--model NAME --weights {path}")
    module, recipe = open_model(config["model"], args.recipe)
    flags = argparse.ArgumentParser(allow_abbrev=False)
    add_recipe_flags(flags, recipe)
    given = vars(flags.parse_args(rest))
    recipe = {**recipe, **config["recipe"], **given}
    check_recipe(recipe)
    if args.protocol is None:
        args.protocol = "clip"
        if {"clips", "crops", "scales"} & set(given):
            args.protocol = "multiscale"
    return args, module, recipe, checkpoint, path, config


def check_arguments(args):
    if args.batch is not None and args.batch < 1:
        raise ValueError(f"--batch {args.batch}: at least 1")
    if args.view_batch < 1:
        raise ValueError(f"--view-batch {args.view_batch}: at least 1")
    if args.top < 1:
        raise ValueError(f"--top {args.top}: at least 1")
    if args.workers < 0:
        raise ValueError(f"--workers {args.workers}: at least 0")
    if args.checkpoint and (args.model or args.weights or args.recipe):
        raise ValueError("--model, --weights and --recipe are for other people's weights; a "
                         "checkpoint of train.py, --checkpoint, holds its model and recipe")
    if args.out and args.video:
        raise ValueError("--out goes with a list of videos, not with --video")
    if (args.json or args.picture) and not args.video:
        raise ValueError("--json and --picture go with --video")
    if args.out:
        check_output(args.out)
    if args.picture:
        check_output(args.picture)
        ending = Path(args.picture).suffix.lower()
        if Image.registered_extensions().get(ending) not in Image.SAVE:
            raise ValueError(f"--picture {args.picture}: unknown kind of picture; try .png")


def main():
    args, module, recipe, checkpoint, path, config = parse_arguments()
    protocol = make_protocol(recipe, args.protocol)

    # processes, device and network
    rank, _, device = start_process(args.device)
    model, num_classes = load_weights(module, recipe, checkpoint, path)
    model.to(device)
    if args.channels_last:
        use_channels_last(model)
    if args.compile:
        model = torch.compile(model)
    options = dict(view_batch=args.view_batch, average=args.average,
                   autocast=make_autocast(device, args.amp), channels_last=args.channels_last)

    # the names of the classes
    folder = args.data
    if folder is None and not args.video:
        folder = toy_folder(rank)
    categories = config["categories"]
    if folder is not None:
        names = data.read_categories(folder)
        if categories is not None:
            data.compare_categories(categories, path, names, f"{folder}/categories.txt")
        if len(names) != num_classes:
            raise ValueError(f"{path} knows {num_classes} classes, {folder}/categories.txt names "
                             f"{len(names)}")
        categories = names
    if categories is None:
        categories = [f"class {k}" for k in range(num_classes)]

    # --video: one process suffices
    if args.video:
        def score(views):
            views = [view[None] for view in views]  # a batch of one video
            return score_views(model.eval(), views, recipe, device, **options)[0].cpu().numpy()

        status = 0
        if rank == 0:
            status = label_videos(args, score, recipe, protocol, categories)
        end_process()
        return status

    # a list of videos
    views = functools.partial(test_views, recipe=recipe, protocol=protocol)
    videos = data.VideoList(folder, args.split, recipe, train=False, views=views)
    batch = args.batch or max(1, args.view_batch // count_views(protocol))
    scores = predict(model, videos, num_classes, recipe, device, batch, args.workers,
                     progress_name="videos", **options)
    labels = multi_hot(videos)
    if rank == 0:
        if args.out:
            meta = {"model": config["model"], "recipe": recipe, "checkpoint": path,
                    "iteration": checkpoint.get("iteration"), "list": str(videos.list),
                    "classes": num_classes, "categories": categories,
                    "protocol": {**protocol, "average": args.average},
                    "left_out": videos.without_frames, "map": None}
            if labels is not None:
                meta["map"] = sample_map(scores, labels)
            paths = [videos.video(row).path for row in range(len(videos))]
            save_scores(args.out, paths, scores, labels, meta)
        print(videos.describe())
        print_metrics(scores, labels)
    end_process()
    return 0


if __name__ == "__main__":
    data.run_script(main)
