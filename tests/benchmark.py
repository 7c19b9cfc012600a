"""The README's tables of speed: each piece of work beside a plain reference for it, in one process, taking turns.

    python tests/benchmark.py [--only ROW ...]     the output is Markdown
    python tests/benchmark.py --quick              the same rows, smaller and with fewer turns, for a first look

A turn is one call of ours and one of the reference; the table has both medians, and of the turns' ratios the median and
the quartiles: where these are far apart the machine was busy, and no figure is worth quoting. "x its speed" is the
reference's time over ours, "x its time" ours over the reference's. The data are drawn into a temporary folder: JPEGs of
426x320 that take 23 kB, as real frames do, in folders and packed. The references are written out below. The process
keeps the memory that it has once had, as GPU allocators do (--give-back: as glibc would have it).
"""
import argparse
import concurrent.futures
import ctypes
import functools
import gc
import itertools
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
import evaluate
import slowfast
import tin
import train
import trn
import tsm
import tsn

CLASSES, CORES, THREADS, CUDA = 313, os.cpu_count(), torch.get_num_threads(), torch.cuda.is_available()
IMAGE, VIDEO = tsm.RECIPES["r50_8f"], {**slowfast.RECIPES["r101_8x8"], "depth": 50}  # 8 x 224, 32 x 112 pixels
DRAFT = {**VIDEO, "draft": True}
MODELS = {"tsn": (tsn, {**tsn.RECIPES["r101_5f"], "backbone": "resnet50", "frames": 8}), "slowfast": (slowfast, VIDEO),
          "trn": (trn, trn.RECIPES["r50_8f"]), "tsm": (tsm, IMAGE), "tin": (tin, tin.RECIPES["r50_8f"])}


def keep_memory():
    """For glibc's malloc: blocks above 32 MB go back to the kernel when freed, which then fills each new one with
    zeros, page by page. Where that is slow, a step with one more tensor is timed by it and not by its own work."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: None)  # other systems have none
    mallopt(-4, 0)  # M_MMAP_MAX: no blocks outside the heap
    mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks


def compare(run, work, reference, goal, ours, theirs, turns, threads=THREADS):
    """Print a line. run: the command line's values, row and temporary folder. ours, theirs: functions of the turn."""
    torch.set_num_threads(threads)
    times = np.zeros((turns + 1, 2))  # the first turn does not count
    for turn, side in ((turn, side) for turn in range(turns + 1) for side in ((0, 1) if turn % 2 else (1, 0))):
        start = time.perf_counter()
        (ours, theirs)[side](turn)
        times[turn, side] = time.perf_counter() - start
    mine, its = times[1:].T
    slower, limit = goal.startswith("<="), float(goal[3:])
    low, ratio, high = np.percentile(mine / its if slower else its / mine, (25, 50, 75))
    mine, its = (f"{1000 * np.median(side):,.{np.median(side) < 0.1:d}f} ms" for side in (mine, its))
    print(f"| {run.row} | {work} | {reference} | {its} | {mine} | {ratio:.2f} x its {'time' if slower else 'speed'} "
          f"({low:.2f} to {high:.2f}) | {goal} | {'yes' if (ratio <= limit) == slower else 'no'} |", flush=True)


@functools.cache
def draw_data(folder, videos=6, frames=90):
    """Two data folders in which coarse, middle and fine clouds drift: as folders of frames, and the same packed."""
    for video in range(videos):
        rng, pixels, place = np.random.default_rng(video), 0, folder / "folders" / "frames" / str(video)
        for size, weight in ((6, 0.65), (24, 0.25), (96, 0.1)):
            grain = Image.fromarray(rng.integers(0, 256, (size, size, 3), np.uint8))
            pixels = pixels + weight * np.asarray(grain.resize((540, 420), Image.BICUBIC))
        place.mkdir(parents=True)
        (folder / "packed" / "frames").mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(folder / "packed" / "frames" / f"{video}.zip", "w") as archive:
            for i in range(frames):
                name, part = data.FRAME.format(i + 1), pixels[i : i + 320, i : i + 426]
                Image.fromarray(part.astype(np.uint8)).save(place / name, quality=90)
                archive.write(place / name, name)
    for half in (folder / "folders", folder / "packed"):
        data.write_lines(half / "train.txt", [f"{video} {frames} {video},{video + 1}" for video in range(videos)])
        data.write_lines(half / "categories.txt", [f"class {number}" for number in range(CLASSES)])
    return folder / "folders", folder / "packed"


def clips(run):
    folder = draw_data(run.folder)[0]
    for size, recipe, goal in ((224, IMAGE, ">= 1.3"), (112, VIDEO, ">= 1.25"), (112, DRAFT, ">= 1.8")):
        videos = data.VideoList(folder, "train", recipe, train=True)
        clip = videos[0][0]

        def decode_and_resize(turn):
            epoch, row = divmod(turn, len(videos))  # the same frames as ours
            for i in data.sample_indices(90, recipe, np.random.default_rng([0, epoch, row])):
                with Image.open(folder / "frames" / str(row) / data.FRAME.format(i + 1)) as image:
                    image.resize((size, size), Image.BILINEAR)

        compare(run, f"{len(clip)} frames -> {size} training clip{', draft' * (recipe is DRAFT)}, one core, "
                f"{clip.dtype}, {clip.nbytes / 1e6:.2f} MB", "Pillow decode + one Pillow resize, nothing else", goal,
                videos.__getitem__, decode_and_resize, 24 if run.quick else 120, threads=1)


def operator(run, name, goal, function):
    """Forward and backward, through what ResNet-50's 16 blocks get for 8 frames of 224 pixels."""
    blocks = [(64, 56), *[(256, 56)] * 3, *[(512, 28)] * 4, *[(1024, 14)] * 6, *[(2048, 7)] * 2]  # channels, side
    inputs = [[torch.randn(1, 8, c, side, side) for _ in range(2)] for c, side in blocks]

    def through(function):
        for x, gradient in inputs:
            x.grad = None
            function(x.requires_grad_()).backward(gradient)

    compare(run, f"{name}, forward + backward, 16 layer inputs", "x.clone()", goal, lambda turn: through(function),
            lambda turn: through(torch.clone), 7 if run.quick else 30)


def interlace(x, offsets=torch.tensor([[0.5, 1.3, -0.5, -1.3]], requires_grad=True),
              weights=torch.ones(1, 4, 8, requires_grad=True)):
    """TIN's module after its two small nets."""
    moved, kept = x.split([x.shape[2] // 4, x.shape[2] - x.shape[2] // 4], dim=2)
    return torch.cat([tin.temporal_interlace(moved, offsets, weights), kept], dim=2)


def training_step(model, recipe, forward=None, device="cpu", half=None, layout=torch.contiguous_format):
    """A step of train.py's loop, as a function of a batch; its rate is 0, so that all steps are alike."""
    model.to(device, memory_format=layout).train()
    forward, criterion = forward or model, train.make_criterion(recipe, np.ones(CLASSES))
    optimizer = torch.optim.SGD(model.parameters(), 0.0, recipe["momentum"], weight_decay=recipe["weight_decay"])

    def step(batch):
        clip, labels = (x.to(device, non_blocking=True) for x in batch)
        with torch.autocast(device, half, enabled=half is not None):
            logits = forward(data.normalise(clip, recipe["mean"], recipe["std"], layout != torch.contiguous_format))
        criterion(logits, labels).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe["clip_grad"] or float("inf"))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step


def random_batch(recipe, size):
    shape = size, recipe["frames"], recipe["crop"], recipe["crop"], 3
    return torch.randint(0, 256, shape, dtype=torch.uint8), (torch.rand(size, CLASSES) < 0.006).float()


def plain_slowfast(w, clip):
    """SlowFast 8x8, R50, in training, without dropout: a function of its tensors w, layer after layer."""
    def conv(x, name, stride=(1, 1, 1)):
        return F.conv3d(x, w[f"{name}.weight"], None, stride, [side // 2 for side in w[f"{name}.weight"].shape[2:]])

    def norm(x, name):
        return F.batch_norm(x, *(w[f"{name}.{key}"] for key in ("running_mean", "running_var", "weight", "bias")), True)

    def block(x, name, stride):
        y = F.relu(norm(conv(x, f"{name}.conv1"), f"{name}.bn1"), inplace=True)
        y = F.relu(norm(conv(y, f"{name}.conv2", stride), f"{name}.bn2"), inplace=True)
        y = norm(conv(y, f"{name}.conv3"), f"{name}.bn3")
        if f"{name}.downsample.0.weight" in w:
            x = norm(conv(x, f"{name}.downsample.0", stride), f"{name}.downsample.1")
        return F.relu(y + x, inplace=True)

    maps = {"slow": clip[:, ::4].transpose(1, 2), "fast": clip.transpose(1, 2)}  # (B, C, T, H, W)
    for path, x in maps.items():
        x = F.relu(norm(conv(x, f"{path}.conv1", (1, 2, 2)), f"{path}.bn1"), inplace=True)
        maps[path] = F.max_pool3d(x, (1, 3, 3), (1, 2, 2), (0, 1, 1))
    for stage, blocks in enumerate((3, 4, 6, 3)):
        maps["slow"] = torch.cat([maps["slow"], conv(maps["fast"], f"fuse.{stage}.conv", (4, 1, 1))], dim=1)
        for i, path in itertools.product(range(blocks), maps):
            maps[path] = block(maps[path], f"{path}.layer{stage + 1}.{i}", (1, 2, 2) if stage and i == 0 else (1, 1, 1))
    return F.linear(torch.cat([x.mean(dim=(2, 3, 4)) for x in maps.values()], dim=1), w["fc.weight"])


def step_beside(run, name, goal, reference):
    module, recipe = MODELS[name][0], {**MODELS[name][1], "dropout": 0.0}
    batch, forward = random_batch(recipe, 1 if run.quick else 2), None
    other = tsn.build(MODELS["tsn"][1], CLASSES)
    if name == "tsn":
        other = torchvision.models.resnet50(num_classes=CLASSES)

        def forward(clip):
            return other(clip.flatten(0, 1)).unflatten(0, clip.shape[:2]).mean(dim=1)
    if name == "slowfast":
        other = module.build(recipe, CLASSES)
        forward = functools.partial(plain_slowfast, {**dict(other.named_parameters()), **dict(other.named_buffers())})
        torch.testing.assert_close(forward(clip := torch.randn(1, 32, 3, 64, 64)), other(clip))
    ours, theirs = training_step(module.build(recipe, CLASSES), recipe), training_step(other, recipe, forward)
    compare(run, f"{name} R50 training step, {len(batch[0])} x {recipe['frames']} x {recipe['crop']}, CPU float32",
            reference, goal, lambda turn: ours(batch), lambda turn: theirs(batch), 3 if run.quick else 11)


def mean_ap(run):
    scores, chance = np.random.default_rng(0).random((2, 10_000, CLASSES), np.float32)
    labels = (chance < 1.96 / CLASSES).astype(np.uint8)

    def block(s, truth):  # for each label, of the classes that score as high the share of labels; the mean of these
        row, column = np.nonzero(truth)
        ahead = s[row] >= s[row, column][:, None]
        precision = (ahead & truth[row]).sum(1) / ahead.sum(1)
        return np.bincount(row, precision, len(s)) / np.maximum(truth.sum(1), 1)

    def blocks():
        return np.concatenate([block(scores[i : i + 1024], labels[i : i + 1024] > 0) for i in range(0, 10_000, 1024)])

    np.testing.assert_allclose(evaluate.average_precision(scores, labels), blocks())
    compare(run, "sample-level mAP, 10,000 x 313", "blocks of 1,024 rows", ">= 0.5", lambda turn: evaluate.sample_map(
        scores, labels), lambda turn: blocks().mean(), 15)


@functools.cache
def draw_videos(folder):
    """A folder of two videos for each core."""
    folder.mkdir()
    for number in range(2 * CORES):
        subprocess.run(["ffmpeg", "-nostdin", "-v", "error", "-f", "lavfi", "-i", "testsrc2=s=640x480:r=25:d=3", "-vf",
                        "noise=c0s=12:c0f=t,format=yuv420p", folder / f"{number}.mp4"], check=True)
    return folder


def extraction(run):
    videos, pool = draw_videos(run.folder / "videos"), concurrent.futures.ThreadPoolExecutor(CORES)

    def ffmpeg_alone(file):
        subprocess.run(["ffmpeg", "-nostdin", "-v", "error", "-threads", "1", "-i", file, "-vf", "fps=30,scale=-2:320",
                        "-q:v", "2", Path(tempfile.mkdtemp(dir=run.folder), "img_%05d.jpg")], check=True)

    for pack in (False, True):
        def extract(turn):
            out = tempfile.mkdtemp(dir=run.folder)
            assert data.extract(videos, out, "train", workers=CORES, pack=pack) == (2 * CORES, 0)

        compare(run, f"extraction{', packed' * pack}, {2 * CORES} videos of 3 s, {CORES} cores",
                "ffmpeg alone, one process a core", ">= 0.9", extract,
                lambda turn: list(pool.map(ffmpeg_alone, videos.iterdir())), 3 if run.quick else 11)


def views(run):
    device, recipe = torch.device("cuda" if CUDA else "cpu"), {**VIDEO, **({"clips": 2} if run.quick else {})}
    look = functools.partial(evaluate.test_views, recipe=recipe, protocol=evaluate.make_protocol(recipe, "multiscale"))
    videos = data.VideoList(draw_data(run.folder)[0], "train", recipe, train=False, views=look)
    some, workers = torch.utils.data.Subset(videos, range(6 if CUDA else 1)), min(16, CORES) if CUDA else 0
    model, sides = slowfast.build(recipe, CLASSES).to(device).eval(), [clip.shape[1] for clip, _ in videos[0][1]]
    passes = [torch.randn(min(16, sides.count(side) - start), 32, 3, side, side, device=device)
              for side in set(sides) for start in range(0, sides.count(side), 16)]
    compare(run, f"evaluation, slowfast R50, {len(sides)} views of {len(some)} videos, {device.type}",
            "the forward passes alone", "<= 1.15",
            lambda turn: evaluate.predict(model, some, CLASSES, recipe, device, batch=1, workers=workers),
            torch.no_grad()(lambda turn: [model(x) for x in passes * len(some)][-1].cpu()), 1 if run.quick else 3)


class Traffic(TorchDispatchMode):
    """Adds up the bytes of every operator's arguments and results: at a copy's speed, the bound of an eager step."""
    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not function.is_view:
            tensors = torch.utils._pytree.tree_leaves((args, kwargs, result))
            self.bytes += sum(x.nbytes for x in tensors if isinstance(x, torch.Tensor))
        return result


def seconds_on_gpu(work, turns):
    """The median time of work(), after five calls that do not count."""
    times = []
    for _ in range(5 + turns):
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return np.median(times[5:])


GPU = {}  # (model, setting): seconds a step; what TSM and TIN take longer than TSN is their operator's share


def gpu_setting(run, name, setting, bandwidth):
    """Print a line; a function of its own, so that the next setting finds the memory empty."""
    (module, recipe), (precision, last, compiled) = MODELS[name], setting
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision != "fp32"
    torch.compiler.reset()
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    batch, model = [x.pin_memory() for x in random_batch(recipe, run.batch)], module.build(recipe, CLASSES)
    layout = getattr(torch, last + "_3d" * (module is slowfast)) if last else torch.contiguous_format
    options = "cuda", torch.bfloat16 if precision == "bf16" else None, layout
    with Traffic() as traffic:
        training_step(model, recipe, None, *options)(batch)
    step = training_step(model, recipe, torch.compile(model) if compiled else None, *options)
    GPU[name, setting] = seconds = seconds_on_gpu(lambda: step(batch), 10 if run.quick else 30)
    beside = f"{seconds / GPU['tsn', setting]:.2f}" if ("tsn", setting) in GPU and module is not slowfast else ""
    print(f"| {run.row} | {precision} | {last} | {compiled} | {run.batch / seconds:,.0f} | {beside} | "
          f"{torch.cuda.max_memory_allocated() / 2**30:.1f} | {traffic.bytes / bandwidth / seconds:.0%} |", flush=True)


def gpu(run):
    if not CUDA:
        return print(f"| {run.row} | no GPU: not run |" + " |" * 6)
    bandwidth = 2**31 / seconds_on_gpu(torch.empty(2**28, device="cuda").clone, 20)  # bytes a second, read and written
    for setting in itertools.product(("fp32", "TF32", "bf16"), ("", "channels_last"), ("", "compiled")):
        if not run.quick or (setting[0] == "bf16") == bool(setting[1]):  # quick: channels_last for bf16 alone
            gpu_setting(run, run.row.removeprefix("gpu-"), setting, bandwidth)


def loader_rate(folder, recipe, workers, batches):
    """Clips a second from a loader, once all its workers are at work."""
    videos = data.VideoList(folder, "train", recipe, train=True)
    stream = torch.utils.data.DataLoader(
        videos, 8, sampler=range(8 * workers * (1 + batches)), num_workers=workers, pin_memory=CUDA)
    arrivals = [time.perf_counter() for _ in stream][workers - 1 :]
    return 8 * workers * batches / (arrivals[-1] - arrivals[0])


def loader(run):
    kinds = list(itertools.product((IMAGE, VIDEO, DRAFT), draw_data(run.folder)))
    for workers in (2**n for n in range(CORES.bit_length())):
        rates = [loader_rate(folder, recipe, workers, 4 if run.quick else 16) for recipe, folder in kinds]
        print(f"| {run.row} | {workers} |", *(f"{rate:,.0f} |" for rate in rates), flush=True)
    best = {name: min((GPU[key] for key in GPU if key[0] == name), default=None) for name in ("tsn", "slowfast")}
    eaten = [f"{run.batch / best[name]:,.0f}" if best[name] else "not run" for name in best]
    print(f"| {run.row} | the GPU eats, at its best | {eaten[0]} | | {eaten[1]} |" + " |" * 3)


def units(run):
    """What a scale table is computed from, beside the clips a second of one worker in the table before."""
    videos, rates, sizes = draw_videos(run.folder / "videos"), [], []
    for pack, folder in enumerate(draw_data(run.folder)):
        times = []
        for _ in range(3 if run.quick else 11):
            start = time.perf_counter()
            data.extract(videos, tempfile.mkdtemp(dir=run.folder), "train", workers=CORES, pack=bool(pack))
            times.append(time.perf_counter() - start)
        rates.append(2 / np.median(times))  # each core has had two
        blocks = sum(file.stat().st_blocks for file in (folder / "frames").rglob("*"))
        sizes.append(512 * blocks / sum(video.frames for video in data.read_list(folder / "train.txt")))
    print(f"| {run.row} | videos of 3 s extracted in a second by a core | {rates[0]:.2f} | {rates[1]:.2f} |\n"
          f"| {run.row} | bytes a frame of 426x320 takes on the disk | {sizes[0]:,.0f} | {sizes[1]:,.0f} |")


TABLES = {  # title: (head, {row: its function})
    "Ours beside a reference": ("row | work | reference | its time | our time | ratio, quartiles | goal | reached", {
        "clip": clips,
        "shift": lambda run: operator(run, "TSM's shift", ">= 0.9", tsm.temporal_shift),
        "interlace": lambda run: operator(run, "TIN's interlacing", ">= 0.65", interlace),
        "tsm": lambda run: step_beside(run, "tsm", "<= 1.06", "our TSN's step"),
        "tin": lambda run: step_beside(run, "tin", "<= 1.10", "our TSN's step"),
        "tsn": lambda run: step_beside(run, "tsn", ">= 0.97", "torchvision's ResNet-50 on the same frames"),
        "slowfast": lambda run: step_beside(run, "slowfast", ">= 0.95", "a plain statement of it"),
        "map": mean_ap, "extract": extraction, "views": views}),
    "Training steps on a GPU": ("row | precision | layout | compile | clips/s | x TSN's time | peak GiB | of bound", {
        f"gpu-{name}": gpu for name in ("tsn", "trn", "tsm", "tin", "slowfast")}),
    "Clips a second from the loader": (
        "row | workers | 8 x 224 | packed | 32 x 112 | packed | 32 x 112, draft | packed", {"loader": loader}),
    "Unit rates of the scale table": ("row | unit | folders | packed", {"units": units}),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = [row for _, rows in TABLES.values() for row in rows]
    parser.add_argument("--only", nargs="+", choices=every, default=every, metavar="ROW", help=f"of {' '.join(every)}")
    parser.add_argument("--quick", action="store_true", help="small and few, for a first look")
    parser.add_argument("--batch", type=int, default=32, help="clips of a training step on a GPU (%(default)s)")
    parser.add_argument("--give-back", action="store_true", help="let freed memory go back to the system")
    args = parser.parse_args()
    if not args.give_back:
        keep_memory()
    print(time.strftime("%Y-%m-%d"), f"{CORES} cores", f"load {os.getloadavg()[0]:.1f}", f"torch {torch.__version__}",
          torch.cuda.get_device_name() if CUDA else "no GPU", " ".join(sys.argv[1:]), sep=", ")
    with tempfile.TemporaryDirectory() as folder:
        for title, (head, rows) in TABLES.items():
            if wanted := [row for row in rows if row in args.only]:
                print(f"\n{title}:\n\n| {head} |\n|{' --- |' * len(head.split('|'))}", flush=True)
            for row in wanted:
                rows[row](argparse.Namespace(row=row, folder=Path(folder), **vars(args)))


if __name__ == "__main__":
    main()
