"""The README's table of speeds: each piece of work beside a plain reference for it, in one process, taking turns.

    python tests/benchmark.py                     all rows; the output is Markdown
    python tests/benchmark.py --quick             the same rows, smaller and with fewer turns: to see that they run
    python tests/benchmark.py --only map shift    some rows; gpu-tsn ... gpu-slowfast and loader are rows too

A turn is one call of ours and one of the reference. The table has the medians, and of the turns' ratios the median and
the quartiles: on a busy machine these are far apart, and the figures not worth quoting. "x its speed" is the reference's
time over ours, "x its time" ours over the reference's. The data are drawn into a temporary folder: 426x320 JPEGs of the
size that real frames have. References are written out below, and checked to compute the same where they compute.
"""
import argparse
import concurrent.futures
import contextlib
import functools
import io
import itertools
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import PIL
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
import evaluate
import slowfast
import tin
import train
import trn
import tsm
import tsn

CLASSES, CORES, THREADS = 313, os.cpu_count(), torch.get_num_threads()
IMAGE = tsm.RECIPES["r50_8f"]  # a frame from each of 8 segments, 224 pixels
VIDEO = {**slowfast.RECIPES["r101_8x8"], "depth": 50}  # 32 frames, 112 pixels
RECIPES = {"tsn": (tsn, {**tsn.RECIPES["r101_5f"], "backbone": "resnet50", "frames": 8}), "trn": (trn, trn.RECIPES["r50_8f"]),
           "tsm": (tsm, IMAGE), "tin": (tin, tin.RECIPES["r50_8f"]), "slowfast": (slowfast, VIDEO)}


class Case(NamedTuple):
    """A line of the table. ours and theirs are called with the turn's number."""
    work: str
    reference: str
    goal: str  # ">= 1.3": times the reference's speed; "<= 1.06": times its time; "": none
    ours: Callable
    theirs: Callable
    turns: int
    threads: int = THREADS


@functools.cache
def draw_data(folder, videos=6, frames=90):
    """A data folder: clouds drift over `videos` videos of 426x320, in JPEGs of about 23 kB, as ffmpeg -q:v 2 makes them."""
    for video in range(videos):
        rng, clouds = np.random.default_rng(video), np.zeros((420, 540, 3))
        for size, height in ((6, 60), (24, 30), (96, 16), (420, 9)):  # coarse and strong, fine and weak
            grain = [Image.fromarray(rng.normal(0, height, (size, size)).astype(np.float32)) for _ in range(3)]
            clouds += np.stack([np.asarray(image.resize((540, 420), Image.BICUBIC)) for image in grain], axis=2)
        pixels = (128 + clouds).clip(0, 255).astype(np.uint8)
        (folder / "frames" / str(video)).mkdir(parents=True)
        for i in range(frames):
            Image.fromarray(pixels[i : i + 320, i : i + 426]).save(
                folder / "frames" / str(video) / data.FRAME.format(i + 1), quality=90)
    data.write_lines(folder / "train.txt", [f"{video} {frames} {video},{video + 1}" for video in range(videos)])
    data.write_lines(folder / "categories.txt", [f"class {number}" for number in range(CLASSES)])
    return folder


# The rows: functions of (a temporary folder, --quick) that yield cases.


def clips(folder, quick):
    draw_data(folder)
    for size, recipe, goal in ((224, IMAGE, ">= 1.3"), (112, VIDEO, ">= 1.25"), (112, {**VIDEO, "draft": True}, ">= 1.8")):
        if "draft" in recipe and "draft" not in slowfast.RECIPES["r101_8x8"]:
            continue  # a recipe key that data.py does not have
        videos = data.VideoList(folder, "train", recipe, train=True)

        def decode_and_resize(turn, size=size, recipe=recipe, videos=videos):
            epoch, row = divmod(turn, len(videos))  # the same frames as ours
            indices = data.sample_indices(90, recipe, np.random.default_rng([0, epoch, row]))
            for i in indices:
                with Image.open(folder / "frames" / str(row) / data.FRAME.format(i + 1)) as image:
                    image.resize((size, size), Image.BILINEAR)

        clip = videos[0][0]
        yield Case(f"{len(clip)} frames -> {size} training clip{', draft' if recipe.get('draft') else ''}, one core, "
                   f"{str(clip.dtype)[6:]}, {clip.nbytes / 1e6:.2f} MB", "Pillow decode + one Pillow resize", goal,
                   videos.__getitem__, decode_and_resize, 18 if quick else 90, threads=1)


def layer_inputs(shapes):
    """For 8 frames of 224 pixels the inputs of ResNet-50's 16 blocks as the operators get them, and gradients."""
    with torch.device("meta"):  # shapes without memory
        net = torchvision.models.resnet50()
        for block in itertools.chain(net.layer1, net.layer2, net.layer3, net.layer4):
            block.register_forward_pre_hook(lambda block, inputs: shapes.append(inputs[0].shape))
        net(torch.empty(8, 3, 224, 224))
    return [(torch.randn(1, *shape, requires_grad=True), torch.randn(1, *shape)) for shape in shapes]


def operators(*names):
    """Forward and backward through each layer input, the gradient written where it belongs, beside x.clone()."""
    inputs = layer_inputs([])
    offsets, weights = torch.tensor([[0.5, 1.3, -0.5, -1.3]], requires_grad=True), torch.ones(1, 4, 8, requires_grad=True)
    modules = {x.shape[2]: tin.TemporalInterlace(x.shape[2], 8) for x, _ in inputs}

    def interlace(x):
        moved, kept = x.split([x.shape[2] // 4, x.shape[2] - x.shape[2] // 4], dim=2)
        return torch.cat([tin.temporal_interlace(moved, offsets, weights), kept], dim=2)

    def through(operator, _):
        for x, gradient in inputs:
            x.grad = None
            operator(x).backward(gradient)

    ours = {"TSM's shift": (tsm.temporal_shift, ">= 0.9"), "TIN's interlacing": (interlace, ">= 0.65"),
            "TIN's interlacing with its offset and weight nets": (lambda x: modules[x.shape[2]](x), "")}
    for name in names:
        yield f"{name}, forward + backward, 16 layer inputs", ours[name][1], functools.partial(through, ours[name][0]), \
            functools.partial(through, torch.clone)


def operator_cases(*names):
    def row(folder, quick):
        for work, goal, ours, theirs in operators(*names):
            yield Case(work, "x.clone()", goal, ours, theirs, 7 if quick else 30)
    return row


class Frames(torch.nn.Module):
    """torchvision's ResNet-50 on the frames of a clip (B, T, 3, H, W), the mean of their logits (B, K)."""

    def __init__(self):
        super().__init__()
        self.net = torchvision.models.resnet50(num_classes=CLASSES)

    def forward(self, clip):
        return self.net(clip.flatten(0, 1)).unflatten(0, clip.shape[:2]).mean(dim=1)


def training_step(model, recipe, forward=None, device="cpu", half=None, channels_last=False):
    """A step of train.py's loop as a function of a batch; the rate is 0, so that the weights stay and the work too."""
    model.to(device).train()
    for parameter in model.parameters():
        if channels_last and parameter.dim() in (4, 5):
            layout = torch.channels_last if parameter.dim() == 4 else torch.channels_last_3d
            parameter.data = parameter.data.contiguous(memory_format=layout)
    forward, criterion = forward or model, train.make_criterion(recipe, np.ones(CLASSES))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=recipe["momentum"], weight_decay=recipe["weight_decay"])

    def step(batch):
        clip, labels = (x.to(device, non_blocking=True) for x in batch)
        with torch.autocast(device, half) if half else contextlib.nullcontext():
            logits = forward(evaluate.normalise(clip, recipe["mean"], recipe["std"], channels_last))
        criterion(logits, labels).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe["clip_grad"] or float("inf"))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step


def random_batch(recipe, size):
    clip = torch.randint(0, 256, (size, recipe["frames"], recipe["crop"], recipe["crop"], 3), dtype=torch.uint8)
    return clip, (torch.rand(size, CLASSES) < 0.006).float()


def image_steps(name, goal, reference):
    def row(folder, quick):
        module, recipe = RECIPES[name]
        ours = training_step(module.build(recipe, CLASSES), recipe)
        theirs = training_step(Frames() if reference else tsn.build(RECIPES["tsn"][1], CLASSES), recipe)
        batch = random_batch(recipe, 1 if quick else 2)
        yield Case(f"{name.upper()} training step, R50, {len(batch[0])} x 8 x 224, CPU float32",
                   reference or "our TSN's step", goal, lambda _: ours(batch), lambda _: theirs(batch), 3 if quick else 9)
    return row


def plain_slowfast(w, clip):
    """SlowFast 8x8, R50, in training, without dropout: a function of its tensors w, layer after layer. (B, T, 3, H, W)."""
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

    slow, fast = (F.max_pool3d(F.relu(norm(conv(x.transpose(1, 2), f"{path}.conv1", (1, 2, 2)), f"{path}.bn1"), inplace=True),
                               (1, 3, 3), (1, 2, 2), (0, 1, 1)) for path, x in (("slow", clip[:, ::4]), ("fast", clip)))
    for stage, blocks in enumerate((3, 4, 6, 3)):
        slow = torch.cat([slow, conv(fast, f"fuse.{stage}.conv", (4, 1, 1))], dim=1)
        for i in range(blocks):
            stride = (1, 2, 2) if stage and i == 0 else (1, 1, 1)
            slow, fast = (block(x, f"{path}.layer{stage + 1}.{i}", stride) for path, x in (("slow", slow), ("fast", fast)))
    return F.linear(torch.cat([x.mean(dim=(2, 3, 4)) for x in (slow, fast)], dim=1), w["fc.weight"])


def slowfast_step(folder, quick):
    recipe = {**VIDEO, "dropout": 0.0}
    model, plain = (slowfast.build(recipe, CLASSES) for _ in range(2))
    plain.load_state_dict(model.state_dict())
    tensors, batch = {**dict(plain.named_parameters()), **dict(plain.named_buffers())}, random_batch(recipe, 1 if quick else 2)
    clip = evaluate.normalise(batch[0], recipe["mean"], recipe["std"])
    torch.testing.assert_close(plain_slowfast(tensors, clip), model(clip))
    ours, theirs = training_step(model, recipe), training_step(plain, recipe, functools.partial(plain_slowfast, tensors))
    yield Case(f"SlowFast 8x8 training step, R50, {len(clip)} x 32 x 112, CPU float32", "a plain statement of it", ">= 0.95",
               lambda _: ours(batch), lambda _: theirs(batch), 3 if quick else 9)


def blocks_of_rows(scores, labels, rows=1024):
    """Sample-level AP by blocks: labels at least as good / classes at least as good, for each label, their mean."""
    result = []
    for start in range(0, len(scores), rows):
        s, truth = scores[start : start + rows], labels[start : start + rows].astype(bool)
        row, column = np.nonzero(truth)
        ahead = s[row] >= s[row, column][:, None]
        precision = (ahead & truth[row]).sum(1) / ahead.sum(1)
        result.append(np.bincount(row, precision, len(s)) / np.maximum(truth.sum(1), 1))
    return np.concatenate(result)


def mean_ap(folder, quick):
    rng = np.random.default_rng(0)
    scores, labels = rng.random((10_000, CLASSES), np.float32), (rng.random((10_000, CLASSES)) < 1.96 / CLASSES).astype(np.uint8)
    np.testing.assert_allclose(evaluate.average_precision(scores, labels), blocks_of_rows(scores, labels))
    yield Case("sample-level mAP, 10,000 x 313", "blocks of 1,024 rows", ">= 0.5", lambda _: evaluate.sample_map(scores, labels),
               lambda _: blocks_of_rows(scores, labels).mean(), 7 if quick else 30)


def extraction(folder, quick):
    videos, count = folder / "videos", 2 * CORES if quick else 6 * CORES
    videos.mkdir()
    for number in range(count):
        subprocess.run(["ffmpeg", "-nostdin", "-v", "error", "-f", "lavfi", "-i", "testsrc2=s=640x480:r=25:d=3", "-pix_fmt",
                        "yuv420p", "-vf", f"noise=c0s=12:c0f=t:c0_seed={number},hue=h={number}", videos / f"{number}.mp4"], check=True)

    def ffmpeg_alone(turn):
        def one(file):
            out = folder / f"alone{turn}" / file.stem
            out.mkdir(parents=True, exist_ok=True)
            subprocess.run(["ffmpeg", "-nostdin", "-y", "-v", "error", "-threads", "1", "-i", file, "-vf", "fps=30,scale=-2:320",
                            "-q:v", "2", out / "img_%05d.jpg"], check=True)
        with concurrent.futures.ThreadPoolExecutor(CORES) as pool:  # it only waits for the processes
            list(pool.map(one, videos.iterdir()))

    def ours(turn):
        place = folder / tempfile.mkdtemp(dir=folder)
        with contextlib.redirect_stderr(io.StringIO()):
            assert data.extract(videos, place, "train", workers=CORES) == (count, 0)

    yield Case(f"extraction, {count} videos of 3 s, {CORES} cores", "ffmpeg alone, one process a core", ">= 0.9", ours,
               ffmpeg_alone, 2 if quick else 5)


def views(folder, quick):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    recipe = {**VIDEO, "clips": 2 if quick else 10}
    protocol = evaluate.make_protocol(recipe, "multiscale")
    videos = data.VideoList(draw_data(folder), "train", recipe, train=False,
                            views=functools.partial(evaluate.test_views, recipe=recipe, protocol=protocol))
    some = torch.utils.data.Subset(videos, range(6 if device.type == "cuda" else 1))
    model = slowfast.build(recipe, CLASSES).to(device).eval()
    sides = [clip.shape[1] for clip, _ in videos[0][1]]
    full = {side: torch.randn(16, 32, 3, side, side, device=device) for side in set(sides)}

    @torch.no_grad()
    def forward(_):
        for side, _ in itertools.product(full, some.indices):
            for start in range(0, sides.count(side), 16):
                logits = model(full[side][: sides.count(side) - start])
        return logits.cpu()

    def ours(_):
        return evaluate.predict(model, some, CLASSES, recipe, device, batch=1, view_batch=16,
                                workers=min(16, CORES) if device.type == "cuda" else 0)

    yield Case(f"evaluation, SlowFast R50, {len(sides)} views of {len(some)} videos, {device.type}", "the forward passes alone",
               "<= 1.15", ours, forward, 1 if quick else 3)


ROWS = {"clip": clips, "shift": operator_cases("TSM's shift"),
        "interlace": operator_cases("TIN's interlacing", "TIN's interlacing with its offset and weight nets"),
        "tsm": image_steps("tsm", "<= 1.06", None), "tin": image_steps("tin", "<= 1.10", None),
        "tsn": image_steps("tsn", ">= 0.97", "torchvision's ResNet-50 on the same frames"), "slowfast": slowfast_step,
        "map": mean_ap, "extract": extraction, "views": views}


def compare(row, case):
    """Time a case; its line of the table."""
    torch.set_num_threads(case.threads)
    times = []
    for turn in range(-1, case.turns):  # the first does not count
        seconds = {}
        for side in ("ours", "theirs") if turn % 2 else ("theirs", "ours"):
            start = time.perf_counter()
            getattr(case, side)(max(turn, 0))
            seconds[side] = time.perf_counter() - start
        times.append((seconds["ours"], seconds["theirs"]))
    ours, theirs = np.array(times[1:]).T
    slower = case.goal.startswith("<")
    low, ratio, high = np.percentile(ours / theirs if slower else theirs / ours, (25, 50, 75))
    reached = "" if not case.goal else "yes" if (ratio <= float(case.goal[3:]) if slower else ratio >= float(case.goal[3:])) else "no"
    ours, theirs = (f"{1000 * np.median(side):,.{1 if np.median(side) < 0.1 else 0}f} ms" for side in (ours, theirs))
    return (f"| {row} | {case.work} | {case.reference} | {theirs} | {ours} | {ratio:.2f} x its {'time' if slower else 'speed'} "
            f"({low:.2f} to {high:.2f}) | {case.goal} | {reached} |")


# On a GPU: whole training steps, and the loader that has to feed them.


class Traffic(TorchDispatchMode):
    """Adds up the bytes of all operators' arguments and results: what has to be read and written, each once."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not function.is_view:
            self.bytes += sum(x.nbytes for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor))
        return result


def seconds_on(device, work, turns):
    """The median time of work() on a device that works asynchronously, after three calls that do not count."""
    times = []
    for _ in range(3 + turns):
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[3:])


def gpu_lines(name, device, quick, size, tsn_seconds):
    """Lines for one model. tsn_seconds: {settings: TSN's time}, filled by TSN, for the operators' cost."""
    module, recipe = RECIPES[name]
    batch = random_batch(recipe, size)
    batch = tuple(x.pin_memory() for x in batch) if device == "cuda" else batch
    x = torch.empty(2**28 if device == "cuda" else 2**22, device=device)
    bandwidth = 2 * x.nbytes / seconds_on(device, lambda: x.clone(), 20)
    every = list(itertools.product(("fp32", "TF32", "bf16"), (False, True), (False, True)))
    some = [("fp32", False, False), ("TF32", True, False), ("bf16", True, False), ("bf16", True, True)]
    for settings in some if quick else every:
        precision, channels_last, compiled = settings
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision != "fp32"
        torch._dynamo.reset()
        model = module.build(recipe, CLASSES)
        options = {"device": device, "half": torch.bfloat16 if precision == "bf16" else None, "channels_last": channels_last}
        with Traffic() as traffic:
            training_step(model, recipe, **options)(batch)
        step = training_step(model, recipe, torch.compile(model) if compiled else None, **options)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = seconds_on(device, lambda: step(batch), 10 if quick else 30)
        memory = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0
        if name == "tsn":
            tsn_seconds[settings] = seconds
        beside = f"{seconds / tsn_seconds[settings]:.2f}" if settings in tsn_seconds and name != "slowfast" else ""
        yield (f"| {name} | {precision} | {'channels_last' if channels_last else ''} | {'compiled' if compiled else ''} | "
               f"{size / seconds:,.0f} | {beside} | {memory:.1f} | {traffic.bytes / bandwidth / seconds:.0%} |")


def loader_lines(folder, quick):
    draw_data(folder)
    count = 1
    while count <= CORES:
        rates = []
        for recipe in (IMAGE, VIDEO):
            videos, clips = data.VideoList(folder, "train", recipe, train=True), (16 if quick else 128) * count
            loader = torch.utils.data.DataLoader(videos, batch_size=8, sampler=range(8 * count + clips), num_workers=count,
                                                 pin_memory=torch.cuda.is_available())
            for number, _ in enumerate(loader):
                if number == count - 1:  # by then all workers are at work
                    start = time.perf_counter()
            rates.append(clips / (time.perf_counter() - start))
        yield f"| {count} | {rates[0]:,.0f} | {rates[1]:,.0f} |"
        count *= 2


def main():
    gpu_rows = [f"gpu-{name}" for name in RECIPES]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[*ROWS, *gpu_rows, "loader"], metavar="ROW", help="of %(choices)s")
    parser.add_argument("--quick", action="store_true", help="small and few, for a first look")
    parser.add_argument("--batch", type=int, default=32, help="clips of a step on a GPU (%(default)s)")
    args = parser.parse_args()
    wanted = args.only or [*ROWS, *gpu_rows, "loader"]
    cuda = torch.cuda.is_available()
    print(f"{time.strftime('%Y-%m-%d')}, {CORES} cores, load {os.getloadavg()[0]:.1f}, Python {platform.python_version()}, torch "
          f"{torch.__version__}, torchvision {torchvision.__version__}, Pillow {PIL.__version__}, "
          f"{torch.cuda.get_device_name() if cuda else 'no GPU'}{', --quick' if args.quick else ''}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        if set(wanted) & set(ROWS):
            print("\n| row | work | reference | its time | our time | ours, quartiles | goal | reached |\n" + "| --- " * 8 + "|")
        for row in [row for row in ROWS if row in wanted]:
            for case in ROWS[row](Path(folder), args.quick):
                print(compare(row, case), flush=True)
        torch.set_num_threads(THREADS)
        if set(wanted) & set(gpu_rows):
            print(f"\nTraining steps of {args.batch} clips:" + (" no GPU: not run" if not cuda else "\n\n| model | precision | layout "
                  "| compile | clips/s | x TSN's time | peak GiB | of the traffic bound |\n" + "| --- " * 8 + "|"))
        tsn_seconds = {}
        for name in [name for name in RECIPES if f"gpu-{name}" in wanted and cuda]:
            for line in gpu_lines(name, "cuda", args.quick, args.batch, tsn_seconds):
                print(line, flush=True)
        if "loader" in wanted:
            print("\nThe loader, clips/s:\n\n| workers | 8 frames -> 224 | 32 frames -> 112 |\n" + "| --- " * 3 + "|", flush=True)
            for line in loader_lines(Path(folder), args.quick):
                print(line, flush=True)


if __name__ == "__main__":
    main()
