"""Clips -> probabilities -> sample-level mAP and scores.npz; or the labels of a video file.

    python evaluate.py --checkpoint runs/tin/best.pt --data DATA --protocol dense --out scores.npz
    torchrun --nproc-per-node 8 evaluate.py ...                    the same, by 8 processes
    python evaluate.py --model slowfast --weights PUBLIC.pth ...   other people's weights
    python evaluate.py --checkpoint runs/tin/best.pt --video FILE ... [--picture out.png]

A view is one clip of a video at one crop and one scale. The network gives it a
probability for every class; a video's score is the mean over its views.

N videos, K classes, B videos at once, V views of a video at one scale, T frames, H height, W width.
In comments on settings, "report" means that the report of the team (arXiv 2003.05837) gives the
value. "ours" means that it does not; then comes our source, or the reason. "The authors' code" is
X-Temporal, which the report's authors published.
"""
import argparse
import contextlib
import importlib
import json
import os
import re
import shutil
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

# How a video is scored: one of three dicts of shared settings (the others are in data.py and
# train.py). A row of RECIPES in a model file overrides what differs.
RECIPE = dict(
    # protocol "clip": one view
    test_resize=256,  # short side in pixels; ours: the authors' code
    test_crop=224,    # side of the centre crop; report

    # protocols "dense" and "multiscale"
    clips=5,          # clips along time; report
    crops="3",        # per clip; "1": centre; "3": start, end and centre of the long side;
                      # "random": three random places, as the report words it; ours: "3", as in
                      # the authors' code
    scales=(256,),    # short sides of the frames in pixels, and sides of the crops; report. "dense"
                      # takes the first alone; a row of RECIPES may list several
)


# ---- the metric ----------------------------------------------------------------------------------

def average_precision(scores, labels):
    """Average precision of each video over all K classes: fractions (N,), from scores and 0/1
    labels, both (N, K). Report: "mean Average Precision under sample level": a sample is a video,
    and the mean is over videos. (The more common mAP is a mean over classes.)

    AP is the mean, over the labels u of the video, of
    (labels that score at least as high as u) / (classes that score at least as high as u).
    A tied class that is not a label counts as ranked above u. A video without labels has AP 0, as
    in scikit-learn's average_precision_score.
    """
    scores = np.asarray(scores)
    labels = np.asarray(labels)
    if scores.ndim != 2 or scores.shape != labels.shape:
        raise ValueError(f"scores {scores.shape} and labels {labels.shape} must both be (N, K)")
    if np.isnan(scores).any():
        raise ValueError("a score is not a number")
    if not np.isin(labels, (0, 1)).all():
        raise ValueError("labels must be 0 or 1")

    # one row for each pair of a video and one of its labels; there are P pairs in all
    rows, classes = np.nonzero(labels)
    threshold = scores[rows, classes]
    at_or_above = scores[rows] >= threshold[:, None]  # (P, K)
    hits = at_or_above & (labels[rows] == 1)          # (P, K)
    precision = hits.sum(axis=1) / at_or_above.sum(axis=1)

    # the mean over each video's pairs
    sums = np.bincount(rows, weights=precision, minlength=len(scores))
    counts = np.count_nonzero(labels, axis=1)
    return sums / np.maximum(counts, 1)


def sample_map(scores, labels):
    """The report's metric: the mean of average_precision over the videos, a fraction."""
    return float(average_precision(scores, labels).mean())


# ---- the views of a video ------------------------------------------------------------------------

def make_protocol(recipe, name="clip"):
    """Which views of a video are scored. "clip": one; "dense": clips x crops at the first scale;
    "multiscale": clips x crops at every scale (report). The "sizes" in the result are [(short side,
    crop), ...] in pixels, one pair per scale. (Do not confuse these names with the values of
    `sampling` and `augment`.)"""
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
    """Top left corners [(x, y), ...] of the crops. right, down: frame size minus crop size."""
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


def make_views(folder, num_frames, name, recipe, protocol):
    """All views of a video: for each scale uint8 (V, T, crop, crop, 3).

    folder: where the video's frames are. What is random is seeded by the video's name, so every
    run draws the same.
    """
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    length = recipe["frames"]
    stride = recipe["stride"]

    # frame indices of the clips
    clips = []
    if recipe["sampling"] == "segments":
        # the middles of the segments, then random places in them; report: "5 random chips" (sic)
        clips.append(data.segment_indices(num_frames, length))
        for _ in range(1, protocol["clips"]):
            clips.append(data.segment_indices(num_frames, length, rng))
    else:
        for start in data.clip_starts(num_frames, length, stride, protocol["clips"]):
            clips.append(data.clip_indices(num_frames, length, stride, start))

    # Several clips may share frames; each frame is decoded and resized once.
    indices, positions = np.unique(clips, return_inverse=True)
    positions = positions.reshape(len(clips), length)  # indices[positions] are the clips again
    frames = data.read_frames(folder, indices)

    # every scale, clip and crop
    views = []
    for short_side, crop in protocol["sizes"]:
        resized = data.resize(frames, short_side)
        height, width = resized.shape[1:3]
        squares = []
        for clip_positions in positions:
            clip = resized[clip_positions]  # (T, height, width, 3)
            for x, y in crop_places(width - crop, height - crop, protocol["crops"], rng):
                squares.append(clip[:, y : y + crop, x : x + crop])
        views.append(torch.stack(squares))
    return views


class VideoViews(torch.utils.data.Dataset):
    """The videos of a data.VideoList; an item is (row, make_views(...))."""

    def __init__(self, videos, recipe, protocol):
        self.videos = videos
        self.recipe = recipe
        self.protocol = protocol

    def __len__(self):
        return len(self.videos)

    def __getitem__(self, row):
        videos = self.videos
        with videos.naming_line(row):  # an error begins with DATA/val.txt:12 or the like
            views = make_views(videos.folder(row), videos.num_frames[row], videos.path(row),
                               self.recipe, self.protocol)
        return row, views


def stack_views(items):
    """B items of VideoViews -> rows (B,), and for each scale uint8 (B, V, T, H, W, 3). A protocol
    gives every video the same number of views, so they stack."""
    rows = torch.tensor([row for row, _ in items])
    scales = zip(*[views for _, views in items])  # for each scale, the views of all videos
    return rows, [torch.stack(views) for views in scales]


# ---- scores --------------------------------------------------------------------------------------

def probabilities(logits, loss):
    """Logits -> probabilities: independent for each class, or, in a network trained by
    cross-entropy, of sum 1 over the classes."""
    if loss == "ce":
        return logits.softmax(dim=-1)
    return logits.sigmoid()


@torch.no_grad()
def score_views(model, views, recipe, device, view_batch=16, autocast=contextlib.nullcontext(),
                channels_last=False):
    """The scores (B, K) of videos whose views are, for each scale, uint8 (B, V, T, H, W, 3).

    Report: "class prediction probabilities are averaged". view_batch: views in one forward pass,
    which bounds the memory. autocast: the context of the forward pass.
    """
    total = 0
    for scale_views in views:
        num_videos, num_views = scale_views.shape[:2]
        clips = scale_views.flatten(0, 1)  # (B * V, T, H, W, 3): to the network a view is a clip
        logits = []
        for part in clips.split(view_batch):
            part = part.to(device, non_blocking=True)
            part = data.normalise(part, recipe["mean"], recipe["std"], channels_last)
            with autocast:
                output = model(part)  # (views, T, 3, H, W) -> (views, K)
            # In half precision many probabilities near 1 would round to the same value and tie.
            logits.append(output.float())

        scores = probabilities(torch.cat(logits), recipe["loss"])
        total = total + scores.unflatten(0, (num_videos, num_views)).mean(dim=1)
    return total / len(views)  # every scale has the same number of views


def predict(model, views, num_classes, recipe, device, batch=8, workers=0, progress_name=None,
            **options):
    """The scores of all videos, float32 (N, K), the same in every process.

    views: a VideoViews. batch: videos loaded at once. progress_name: label of the progress lines;
    None: silent. options: those of score_views.
    model: the network without DDP's wrapper, which synchronises all processes in every forward
    pass: a process with fewer videos would leave the others waiting for ever.
    """
    rank = 0
    world = 1
    if dist.is_initialized():
        rank = dist.get_rank()
        world = dist.get_world_size()

    # Each video is scored by exactly one process: this one takes the rows rank, rank + world, ...
    share = torch.utils.data.Subset(views, range(rank, len(views), world))
    loader = torch.utils.data.DataLoader(
        share, batch_size=batch, num_workers=workers, collate_fn=stack_views,
        pin_memory=device.type == "cuda", worker_init_fn=data.ignore_interrupts)

    was_training = model.training
    model.eval()
    scores = torch.zeros(len(views), num_classes, device=device)
    progress = data.Progress(progress_name, len(share))
    done = 0
    for rows, batch_views in data.load(loader):
        scores[rows.to(device)] = score_views(model, batch_views, recipe, device, **options)
        done += len(rows)
        if progress_name and rank == 0:
            progress.update(done)
    model.train(was_training)

    # Each row was filled by one process and is zero in the others, so the sum is exact.
    if world > 1:
        dist.all_reduce(scores)
    return scores.cpu().numpy()


# ---- the script ----------------------------------------------------------------------------------

def main():
    # parse_arguments also imports the model file (args.module) and reads the file of weights, whose
    # name is args.path (args.content)
    args = parse_arguments()
    recipe = args.recipe
    protocol = make_protocol(recipe, args.protocol)

    # processes and network
    rank, _, device = start_process(args.device)
    model, num_classes = load_weights(args.module, recipe, args.content, args.path)
    model.to(device).eval()
    if args.channels_last:
        use_channels_last(model)
    if args.compile:
        model = compile_network(model)
    options = dict(  # of score_views
        view_batch=args.view_batch,
        autocast=make_autocast(device, args.amp),
        channels_last=args.channels_last,
    )

    # video files in place of a list: one process suffices
    if args.video:
        status = 0
        if rank == 0:
            status = label_videos(args, model, num_classes, protocol, device, options)
        end_process()
        return status

    # videos
    folder = args.data or toy_folder(rank)
    categories = name_classes(args, folder, num_classes)  # an error if file and folder disagree
    videos = data.VideoList(folder, args.split)
    views = VideoViews(videos, recipe, protocol)

    # scores; by default just enough videos are loaded at once to give about view_batch views
    batch = args.batch or max(1, args.view_batch // count_views(protocol))
    scores = predict(model, views, num_classes, recipe, device, batch, args.workers,
                     progress_name="videos", **options)
    labels = videos.label_matrix()  # (N, K), or None for a test list

    # result
    if rank == 0:
        if args.out:
            meta = describe_run(args, protocol, videos, categories, scores, labels)
            paths = [videos.path(row) for row in range(len(videos))]
            save_scores(args.out, paths, scores, labels, meta)
        print(data.describe_videos(videos))
        print_metrics(scores, labels)
    end_process()
    return 0


# ==== Skip on first reading: printing, score files, --video, weights, processes, flags ============

# ---- what is printed -----------------------------------------------------------------------------

def print_metrics(scores, labels):
    """Print the sample-level mAP on a line of its own, last, after some supplementary figures."""
    if labels is None or not labels.any():
        print("the list has no labels: scores, but no mAP")
        return
    precision = average_precision(scores, labels)
    labelled = labels.any(axis=1)

    # Another metric: the average precision over the videos, for each class that a video has. It is
    # the same function with the roles exchanged: one row, whose columns are the videos.
    class_precision = []
    for k in np.flatnonzero(labels.any(axis=0)):
        class_precision.append(sample_map(scores[:, [k]].T, labels[:, [k]].T))  # both (1, N)
    top1, top5 = hit_rates(scores, labels)
    print(f"class-level mAP {100 * np.mean(class_precision):.2f}, "
          f"top-1 hit rate {100 * top1:.2f}, top-5 {100 * top5:.2f}")
    if not labelled.all():
        print(labelled_map(scores, labels))
    print(f"mAP {100 * precision.mean():.2f}")


def labelled_map(scores, labels):
    """A sentence about videos without a label, which count as AP 0; empty if there are none."""
    labelled = labels.any(axis=1)
    if labelled.all():
        return ""
    others = sample_map(scores[labelled], labels[labelled])
    return (f"{(~labelled).sum()} of {len(labels)} videos have no label and count as AP 0; mAP of "
            f"the others {100 * others:.2f}")


def hit_rates(scores, labels):
    """Top-1 and top-5 hit rates: fractions of the labelled videos whose likeliest class, or one of
    whose five likeliest, is a label. Of classes with equal scores the first ranks first."""
    labelled = labels.any(axis=1)
    scores = scores[labelled]
    labels = labels[labelled]
    likeliest = np.argsort(-scores, axis=1, kind="stable")[:, :5]
    hits = np.take_along_axis(labels, likeliest, axis=1)
    return hits[:, 0].mean(), hits.any(axis=1).mean()


# ---- score files ---------------------------------------------------------------------------------

def save_scores(path, paths, scores, labels, meta):
    """scores.npz: paths (N,), scores (N, K) float32, labels (N, K) uint8 unless None, and meta, a
    JSON text. Written whole or not at all; numpy reads it without unpickling anything."""
    arrays = {"paths": np.array(paths), "scores": scores.astype(np.float32),
              "meta": np.array(json.dumps(meta))}
    if labels is not None:
        arrays["labels"] = labels
    with data.replacing(Path(path)) as part:
        with open(part, "wb") as file:  # to a name alone numpy would append .npz
            np.savez_compressed(file, **arrays)


def describe_run(args, protocol, videos, categories, scores, labels):
    """The meta of a score file."""
    meta = dict(
        model=args.model,
        recipe=args.recipe,
        checkpoint=args.path,
        iteration=args.content.get("iteration"),
        list=str(videos.file),
        classes=len(categories),
        categories=categories,
        protocol=protocol,
        left_out=videos.num_lines - len(videos),  # lines that are not videos of their own
        map=None,
    )
    if labels is not None:
        meta["map"] = sample_map(scores, labels)
    return meta


def check_output(path):
    """Fail early if the file cannot be written."""
    if Path(path).is_dir():
        raise ValueError(f"{path}: is a folder; name a file")
    if not os.access(Path(path).absolute().parent, os.W_OK):
        raise ValueError(f"{path}: there is no such folder, or it cannot be written to")


def name_classes(args, folder, num_classes):
    """The names of the classes: the data folder's, which must fit the checkpoint; without a folder
    the checkpoint's; without both (folder None, other people's weights) numbers."""
    if folder is None:
        return args.categories or [f"class {k}" for k in range(num_classes)]
    names = data.read_categories(folder)
    if args.categories is not None:
        data.compare_categories(args.categories, args.path, names, f"{folder}/categories.txt")
    if len(names) != num_classes:
        raise ValueError(f"{args.path} knows {num_classes} classes, {folder}/categories.txt names "
                         f"{len(names)}")
    return names


# ---- --video -------------------------------------------------------------------------------------

def label_videos(args, model, num_classes, protocol, device, options):
    """Print the labels of each file of --video. Returns the exit status: 2 if a file could not be
    read. options: those of score_views."""
    categories = name_classes(args, args.data, num_classes)
    data.require_ffmpeg()
    results = []
    for file in args.video:
        with tempfile.TemporaryDirectory() as folder:
            count, message = data.decode_video(file, Path(folder), progress=True)
            if count > 60 * 30:
                print(f"{file}: {count // 30} seconds long; its label is that of a few frames or "
                      "clips. A video here is seconds long: cut longer ones", file=sys.stderr)
            if message:
                print(f"{file}: {count} frames; {message}", file=sys.stderr)
            if count == 0:
                continue
            views = make_views(folder, count, Path(file).stem, args.recipe, protocol)
            middle_clip = data.read_frames(folder, data.sample_indices(count, args.recipe))

        views = [scale[None] for scale in views]  # a batch of one video
        [scores] = score_views(model, views, args.recipe, device, **options).cpu().numpy()
        labels = {}
        for k in np.argsort(-scores, kind="stable")[: args.top]:
            labels[categories[k]] = float(scores[k])
        results.append({"video": file, "labels": labels})
        if args.picture:
            draw_labels(middle_clip, labels).save(args.picture)
        if not args.json:
            print(file)
            for name, probability in labels.items():
                print(f"{100 * probability:6.2f} %  {name}")

    if args.json:
        print(json.dumps(results, indent=1))
    if len(results) < len(args.video):
        return 2
    return 0


def draw_labels(frames, labels, height=128, line=24):
    """A picture of a clip's whole frames, uint8 (T, h, w, 3), eight in a row, and below them a bar
    for each of {label: probability}. Sizes are in pixels."""
    columns = min(8, len(frames))
    rows = -(-len(frames) // columns)  # rounded up
    width = round(height * frames.shape[2] / frames.shape[1])
    top = rows * (height + 4) + 8
    font = ImageFont.load_default(size=15)
    left = max(round(font.getlength(name)) for name in labels) + 16  # where the bars begin
    right = max(columns * (width + 4) - 80, left + 180)              # and end, at probability 1
    picture = Image.new("RGB", (right + 80, top + line * len(labels) + 8), "white")
    draw = ImageDraw.Draw(picture)

    for i, frame in enumerate(frames):
        row, column = divmod(i, columns)
        image = Image.fromarray(frame.numpy()).resize((width, height))
        picture.paste(image, (column * (width + 4), row * (height + 4)))

    for i, (name, probability) in enumerate(labels.items()):
        y = top + i * line + 3
        bottom = y + line - 6
        end = left + probability * (right - left)
        draw.text((8, y), name, fill="black", font=font)
        draw.rectangle((left, y, right, bottom), fill="#eeeeee")
        draw.rectangle((left, y, end, bottom), fill="#4a86c8")
        draw.text((right + 8, y), f"{100 * probability:.1f} %", fill="black", font=font)
    return picture


# ---- networks and their recipes ------------------------------------------------------------------

def open_model(name, row=None, pages=(data.RECIPE, RECIPE)):
    """Import the model file NAME.py and put a recipe together -> (the module, the recipe).

    A recipe is one flat dict. It starts with the shared settings (`pages`). A row of the model
    file's RECIPES (None: the first) then overrides what differs for that network. For the row "toy"
    the shared settings are first overridden by what belongs to the toy videos, data.TOY.
    """
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

    recipe = {}
    for page in pages:
        recipe = override(recipe, page)
    if row == "toy":
        recipe = override(recipe, data.TOY)
    return module, override(recipe, module.RECIPES[row])


def refuse_toy_row(name, module):
    """ValueError if the first row of a model file, which real videos get by default, is toy."""
    if next(iter(module.RECIPES)) == "toy":
        raise ValueError(f"--model {name}: the first row of its RECIPES is toy, whose settings are "
                         "for the toy videos; put a row for real data before it, or pass --recipe "
                         "toy")


def override(recipe, values):
    """The recipe with other values. The length of a run is its `epochs` or its `iterations`, and
    the one that does not count is 0: values that set only one of them set the other to 0."""
    recipe = {**recipe, **values}
    if "epochs" in values and "iterations" not in values:
        recipe["iterations"] = 0
    if values.get("iterations", 0) > 0 and "epochs" not in values:
        recipe["epochs"] = 0
    return recipe


# ---- weights of any file -------------------------------------------------------------------------

def read_checkpoint(path):
    """What a checkpoint file holds, a dict of tensors, numbers, texts, lists and dicts. ValueError
    for other files, and for a file that asks for any other Python object: it could run code."""
    # what numpy's numbers and arrays are made of
    numpy_objects = [np.dtype, np.ndarray]
    for kind in (np.float16, np.float32, np.float64, np.int32, np.int64, np.bool_):
        numpy_objects.append(type(np.dtype(kind)))
    core = np._core.multiarray
    for place in ("numpy._core.multiarray", "numpy.core.multiarray"):  # in NumPy 2 and 1
        numpy_objects.append((core.scalar, f"{place}.scalar"))
        numpy_objects.append((core._reconstruct, f"{place}._reconstruct"))
    with open(path, "rb") as file:
        is_safetensors = file.read(10)[8:] == b'{"'  # after its length in 8 bytes, a JSON text
        file.seek(0)
        try:
            with torch.serialization.safe_globals(numpy_objects):
                return dict(torch.load(file, map_location="cpu", weights_only=True))
        except Exception as error:  # damaged bytes raise many kinds of errors
            problem = str(error)
    if is_safetensors:
        raise ValueError(f"{path}: a safetensors file; convert it, after pip install safetensors: "
                         "python -c \"import sys, torch, safetensors.torch as s; torch.save("
                         f"s.load_file(sys.argv[1]), 'weights.pt')\" \"{path}\"")
    if "GLOBAL" in problem:
        raise ValueError(f"{path}: asks for a Python object that is not a tensor, and loading it "
                         "could run code; save the state_dict alone with the program that wrote "
                         "the file: torch.save(model.state_dict(), ...)")
    raise ValueError(f"{path}: not a PyTorch checkpoint, or truncated")


def is_ours(checkpoint):
    """Whether train.py has written it."""
    config = checkpoint.get("config")
    return isinstance(config, dict) and {"model", "recipe", "categories"} <= set(config)


def tensors_of(checkpoint):
    """{key: tensor} of other people's checkpoint, as a model file's convert needs it.

    The tensors may be in a dict of their own, beside the optimiser's state and the epoch; "blobs"
    is Caffe2's, and holds arrays. The keys lose the prefixes of DDP and torch.compile, and "model."
    if every key has it, as Lightning and PySlowFast write it.
    """
    tensors = checkpoint
    for container in ("state_dict", "model", "model_state", "model_state_dict", "net", "blobs"):
        if isinstance(tensors.get(container), dict):
            tensors = tensors[container]
    if not tensors:
        raise ValueError("holds no tensors")

    prefixes = r"(module\.|_orig_mod\.)*"
    if all(re.match(prefixes + r"model\.", str(key)) for key in tensors):
        prefixes = r"(module\.|_orig_mod\.|model\.)*"
    stripped = {}
    for key, tensor in tensors.items():
        if isinstance(tensor, (np.ndarray, np.generic)):
            tensor = torch.as_tensor(tensor)
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{key} is not a tensor")
        stripped[re.sub(f"^{prefixes}", "", str(key))] = tensor
    return stripped


def state_of(module, checkpoint, path):
    """The state dict of a checkpoint, in our names: train.py's as it is, others by the model file's
    convert."""
    if is_ours(checkpoint):
        return checkpoint["model"]
    if not hasattr(module, "convert"):
        raise ValueError(f"{path}: not a checkpoint of train.py, and {module.__name__}.py has no "
                         "convert, which reads other people's")
    try:
        return module.convert(tensors_of(checkpoint))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def load_weights(module, recipe, checkpoint, path):
    """What read_checkpoint has read from `path` -> (model, its number of classes). The load is
    strict: ValueError with what does not fit."""
    state = state_of(module, checkpoint, path)
    num_classes = 1  # any number will do if the file has no classifier, which is an error below
    for key in classifier_keys(module, recipe):
        if key in state:
            num_classes = len(state[key])

    model = module.build(recipe, num_classes)
    problems = list(misfits(state, model.state_dict()).values())
    if problems:
        raise ValueError(f"{path}: does not fit the network: {'; '.join(problems[:5])} "
                         f"({len(problems)} misfits in all). The end of {module.__name__}.py lists "
                         "the flags of public weights")
    model.load_state_dict(state)
    return model, num_classes


def notes_on_file(module, recipe, given, checkpoint, path):
    """What is odd about using a file's weights with this recipe: sentences. given: the keys of the
    recipe that were flags, or "init" where the weights are a start for training. The model file's
    own check, if it has one, may raise a ValueError."""
    if is_ours(checkpoint):
        keys = ["model", "mean", "std", "sampling", "frames", "stride"]
        if "init" not in given:
            keys.append("loss")  # whether to score by softmax
        return compare_config(module, recipe, checkpoint["config"], path, keys)
    if not hasattr(module, "check"):
        return []
    try:
        return module.check(recipe, given, tensors_of(checkpoint))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def compare_config(module, recipe, config, path, keys):
    """A note that names each of these settings, and of those that the network is built from, with
    which train.py wrote `path` and which is another one here."""
    read = KeysRead(recipe)
    with torch.device("meta"):  # shapes without memory
        module.build(read, 1)
    theirs = {**config["recipe"], "model": config["model"]}
    ours = {**recipe, "model": module.__name__}

    differences = []
    for key in dict.fromkeys([*keys, *sorted(read.keys_read)]):  # each once
        if key not in theirs or key not in ours:
            continue  # a setting of one of two models
        there, here = json.loads(json.dumps([theirs[key], ours[key]]))  # tuples become lists
        if there != here:
            differences.append(f"{key} {there} there, {here} here")
    if differences:
        return [f"note: {path} was trained with other settings: {'; '.join(differences)}"]
    return []


class KeysRead(dict):
    """A recipe that remembers which of its keys a model file's build has read."""

    def __init__(self, recipe):
        super().__init__(recipe)
        self.keys_read = set()

    def __getitem__(self, key):
        self.keys_read.add(key)
        return super().__getitem__(key)

    def get(self, key, default=None):
        self.keys_read.add(key)
        return super().get(key, default)


def classifier_keys(module, recipe):
    """The keys of the classifier's tensors, whatever a model file calls them: only their shapes
    change with the number of classes, which is their first dimension."""
    with torch.device("meta"):  # shapes without memory
        one = module.build(recipe, 1).state_dict()
        two = module.build(recipe, 2).state_dict()
    return [key for key in one if one[key].shape != two[key].shape]


def misfits(theirs, ours):
    """{key: what is wrong} for every key that one of two state dicts lacks, or whose tensors have
    different shapes."""
    problems = {}
    for key in {**ours, **theirs}:
        if key.endswith("num_batches_tracked"):
            continue  # PyTorch adds this counter where a file is too old to have it
        if key not in theirs:
            problems[key] = f"{key} is not in the file"
        elif key not in ours:
            problems[key] = f"{key} is not in the network"
        elif theirs[key].shape != ours[key].shape:
            problems[key] = (f"{key} is {tuple(theirs[key].shape)} in the file, "
                             f"{tuple(ours[key].shape)} in the network")
    return problems


# ---- processes -----------------------------------------------------------------------------------

def start_process(device=None):
    """(rank, world, device) of this process; torchrun's environment says whether there are
    others."""
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1 and "RANK" not in os.environ:
        raise ValueError("srun has started several tasks, which would all do the same; start one "
                         "per node, and in it torchrun --nnodes N --nproc-per-node GPUS "
                         "--rdzv-backend c10d --rdzv-endpoint HOST:29500 SCRIPT ...")
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
        with contextlib.suppress(FileExistsError):  # another run has drawn it meanwhile
            data.draw_toy(folder)
    if dist.is_initialized():
        dist.barrier()
    return folder


def make_autocast(device, amp):
    """The context in which the network runs, for a value of --amp. In half precision, matrix
    products and convolutions are faster; weights stay float32."""
    dtypes = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
    return torch.autocast(device.type, dtype=dtypes[amp], enabled=amp != "off")


def compile_network(model):
    """torch.compile, which would end in a traceback where its C++ compiler is missing."""
    usual = {"darwin": "clang++", "win32": "cl"}
    compiler = os.environ.get("CXX", usual.get(sys.platform, "g++"))
    if shutil.which(compiler) is None:
        raise ValueError(f"--compile: torch.compile needs a C++ compiler, and '{compiler}' is "
                         "missing; install it (Debian: apt install g++), name another one in the "
                         "variable CXX, or leave out --compile")
    return torch.compile(model)


def use_channels_last(model):
    """Store the weights with channels innermost, which is faster on GPUs. Values stay the same."""
    if 5 in [parameter.dim() for parameter in model.parameters()]:  # a 3D convolution
        return model.to(memory_format=torch.channels_last_3d)
    return model.to(memory_format=torch.channels_last)


# ---- flags and checks ----------------------------------------------------------------------------

CHOICES = {  # the allowed values of recipe keys that are words
    "sampling": ["segments", "clip"],
    "augment": ["multiscale", "jitter"],
    "crops": ["1", "3", "random"],
    "loss": ["bce", "lsep", "warp", "ce"],
    "class_weight": ["none", "sqrt", "ratio"],
    "schedule": ["step", "cosine"],
}
AT_LEAST_ONE = ["frames", "stride", "crop", "jitter", "batch", "reference_batch", "test_resize",
                "test_crop", "clips", "scales"]
ANY_LENGTH = ["scales", "milestones"]


def add_shared_flags(parser):
    """The flags that train.py and evaluate.py share."""
    add = parser.add_argument
    add("--workers", type=data.at_least(0), default=2,
        help="loader processes per process, 0: none (%(default)s)")
    add("--device", help="cpu, cuda, ... (default: cuda if there is one)")
    add("--amp", default="off", choices=["off", "bf16", "fp16"],
        help="half precision; bf16 changed the toy's scores by at most 0.008 (%(default)s)")
    add("--channels-last", action="store_true", help="channels innermost in memory: faster on GPUs")
    add("--compile", action="store_true", help="torch.compile the network")


def add_recipe_flags(parser, recipe):
    """A flag for every key of the recipe. Absent flags are not in the namespace."""
    group = parser.add_argument_group("the recipe's values")
    for key, value in recipe.items():
        options = {"default": argparse.SUPPRESS, "help": str(value)}
        if isinstance(value, (tuple, list)):
            options["nargs"] = len(value)
            if key in ANY_LENGTH:
                options["nargs"] = "+"
            value = value[0]

        if isinstance(value, bool):
            options["action"] = argparse.BooleanOptionalAction
        elif isinstance(value, float):
            options["type"] = data.at_least(0, float)
        elif key in CHOICES:
            options["choices"] = CHOICES[key]
        elif key in AT_LEAST_ONE:
            options["type"] = data.at_least(1)
        elif not isinstance(value, str):  # None (SlowFast's alpha): the network chooses a number
            options["type"] = data.at_least(0)
        group.add_argument(f"--{key.replace('_', '-')}", **options)


def with_scales(recipe, given):
    """The values that were given as flags. If test_resize is one of them and scales is not, the
    scales of the fuller protocols follow it in proportion."""
    if "test_resize" not in given or "scales" in given:
        return given
    factor = given["test_resize"] / recipe["test_resize"]
    return {**given, "scales": [max(1, round(scale * factor)) for scale in recipe["scales"]]}


def check_recipe(recipe):
    """ValueError if values that are fine by themselves do not go together."""
    if recipe["test_crop"] > recipe["test_resize"]:
        raise ValueError(f"--test-crop {recipe['test_crop']}: larger than the short side that it "
                         f"is cut from, --test-resize {recipe['test_resize']}")
    if recipe["jitter"][0] > recipe["jitter"][1]:
        raise ValueError(f"--jitter {recipe['jitter']}: the smaller number comes first")
    if recipe["augment"] == "jitter" and recipe["crop"] > recipe["jitter"][0]:
        raise ValueError(f"--crop {recipe['crop']}: larger than the short side that it is cut "
                         f"from, --jitter {recipe['jitter'][0]}")
    if min(recipe["std"]) == 0:
        raise ValueError(f"--std {recipe['std']}: no standard deviation is 0")


def parse_arguments():
    """Read the command line and the file of weights -> args: the flags, and

    .path .content      the file of weights, and what it holds
    .model .module      the name of the model file, and its module
    .recipe             a row of the model file, overridden by the checkpoint's, then by flags
    .categories         the checkpoint's names of the classes, or None
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s --checkpoint FILE [--data DATA] [--protocol P] ... (all flags: --help)",
        allow_abbrev=False,
        epilog="The recipe's keys are flags too: --clips 10 --crops random --scales 128 144.")
    add = parser.add_argument
    add("--checkpoint", metavar="FILE",
        help="written by train.py; it holds its model, recipe and classes")
    add("--model", metavar="NAME",
        help="with --weights: a model file beside this script, such as tin")
    add("--weights", metavar="FILE", help="other people's weights; the model file converts them")
    add("--recipe", metavar="ROW", dest="row",
        help="with --weights: a row of the model's RECIPES (default: its first)")
    add("--loss", choices=["bce", "ce"],
        help="ce: trained by cross-entropy, as on Kinetics, so scored by softmax; bce: by sigmoid "
             "(default: the checkpoint's, or bce)")
    add("--data", metavar="DATA", help="a data folder (default: the toy, runs/toy)")
    add("--split", default="val", help="which of its lists (%(default)s)")
    add("--protocol", choices=["clip", "dense", "multiscale"],
        help="one view, clips x crops at the first scale, or at all scales (default: clip, or "
             "multiscale if --clips, --crops or --scales is given)")
    add("--out", metavar="FILE.npz", help="write paths, scores and labels, for ensemble.py")
    add("--batch", type=data.at_least(1), metavar="VIDEOS",
        help="videos loaded at once (default: VIEW_BATCH / views of a video)")
    add("--view-batch", type=data.at_least(1), default=16, metavar="VIEWS",
        help="views in one forward pass (%(default)s)")
    add_shared_flags(parser)
    add("--video", nargs="+", metavar="FILE", help="label these video files instead of a list")
    add("--top", type=data.at_least(1), default=5, help="labels per video (%(default)s)")
    add("--json", action="store_true", help="print the labels as JSON")
    add("--picture", metavar="OUT.png",
        help="of one video: draw the middle clip's frames, uncropped, and the labels")
    args, others = parser.parse_known_args()
    if not args.checkpoint and not (args.model and args.weights):
        parser.error("which network? --checkpoint FILE, or --model NAME --weights FILE")
    check_arguments(args)

    # the file of weights
    args.path = args.checkpoint or args.weights
    args.content = read_checkpoint(args.path)
    config = {"model": args.model, "recipe": {}, "categories": None}
    if args.checkpoint:
        if not is_ours(args.content):
            raise ValueError(f"{args.path}: not a checkpoint of train.py; for other people's "
                             f"files: --model NAME --weights {args.path}")
        config = args.content["config"]
    args.model = config["model"]
    args.categories = config["categories"]

    # the recipe
    args.module, recipe = open_model(args.model, args.row)
    if args.weights and (args.data or args.video) and args.row is None:
        refuse_toy_row(args.model, args.module)
    recipe_parser = argparse.ArgumentParser(usage=parser.usage, allow_abbrev=False)
    add_recipe_flags(recipe_parser, recipe)
    given = vars(recipe_parser.parse_args(others))
    recipe = {"loss": "bce", **recipe, **config["recipe"]}
    args.recipe = {**recipe, **with_scales(recipe, given)}
    if args.loss:
        args.recipe["loss"] = args.loss
    check_recipe(args.recipe)
    if args.protocol is None:
        args.protocol = "clip"
        if {"clips", "crops", "scales"} & set(given):
            args.protocol = "multiscale"

    for note in odd_settings(args, set(given)):
        if int(os.environ.get("RANK", 0)) == 0:
            print(note, file=sys.stderr)
    return args


def odd_settings(args, given):
    """What is odd about an evaluation: sentences. given: the keys of the recipe that were flags."""
    recipe = args.recipe
    notes = notes_on_file(args.module, recipe, given, args.content, args.path)
    if notes and args.weights and is_ours(args.content):
        notes[0] += f". --checkpoint {args.path} takes them from the file"

    if args.protocol != "clip" and "test_resize" in given and "scales" not in given:
        notes.append(f"note: the scales follow --test-resize: {recipe['scales']}")
    smallest = recipe["test_crop"] / 1.5
    largest = recipe["test_resize"] * 1.5
    for side, _ in make_protocol(recipe, args.protocol)["sizes"]:
        if not smallest <= side <= largest:
            notes.append(f"warning: the scale {side} is far from the sizes of the one view, "
                         f"--test-resize {recipe['test_resize']} and --test-crop "
                         f"{recipe['test_crop']}, so scores may suffer; choose with --scales")
    return notes


def check_arguments(args):
    """ValueError if two flags do not go together, or a file cannot be written."""
    if args.checkpoint and (args.model or args.weights or args.row):
        raise ValueError("--model, --weights and --recipe are for other people's weights; a "
                         "checkpoint of train.py, --checkpoint, holds its model and recipe")
    if args.out and args.video:
        raise ValueError("--out goes with a list of videos, not with --video")
    if (args.json or args.picture) and not args.video:
        raise ValueError("--json and --picture go with --video")
    if args.out:
        check_output(args.out)
    if args.picture:
        if len(args.video) > 1:
            raise ValueError(f"--picture: of one video, but --video names {len(args.video)}")
        check_output(args.picture)
        ending = Path(args.picture).suffix.lower()
        if Image.registered_extensions().get(ending) not in Image.SAVE:
            raise ValueError(f"--picture {args.picture}: unknown kind of picture; try .png")


if __name__ == "__main__":
    data.run_script(main)
