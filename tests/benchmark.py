"""How fast everything is: on a CPU beside plain references, and on a GPU.

    python tests/benchmark.py [--only ROW ...]            CPU: ours beside a plain reference
    python tests/benchmark.py --quick                     the same rows, smaller and fewer turns
    python tests/benchmark.py --gpu [--seconds 420]       every row that needs a GPU, in minutes
    python tests/benchmark.py --gpu --tiny --device cpu   these rows at tiny sizes: do they work?

The output is Markdown. Nothing is downloaded: videos are drawn into a temporary folder, and all
weights are random.
"""
import argparse
import concurrent.futures
import ctypes
import datetime
import functools
import gc
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import data
import evaluate
import tin
import train
import tsm

CLASSES = 313  # of Multi-Moments in Time


# ---- videos ------------------------------------------------------------------------------------

def draw_frames(folder, videos=6, frames=90):
    """A data folder of JPEGs of 426x320 pixels in which coarse, middle and fine clouds drift. They
    take about 23 kB, as frames of real videos do. Drawn once."""
    if folder.exists():
        return folder
    for video in range(videos):
        rng = np.random.default_rng(video)
        pixels = np.zeros((420, 540, 3))
        for size, weight in ((6, 0.65), (24, 0.25), (96, 0.1)):
            grain = Image.fromarray(rng.integers(0, 256, (size, size, 3), np.uint8))
            pixels += weight * np.asarray(grain.resize((540, 420), Image.BICUBIC))
        place = folder / "frames" / str(video)
        place.mkdir(parents=True)
        for i in range(frames):
            window = pixels[i : i + 320, i : i + 426].astype(np.uint8)
            Image.fromarray(window).save(place / data.FRAME.format(i + 1), quality=90)
    lines = [f"{video} {frames} {video},{video + 1}" for video in range(videos)]
    data.write_lines(folder / "train.txt", lines)
    data.write_lines(folder / "categories.txt", [f"class {k}" for k in range(CLASSES)])
    return folder


# ---- what both halves use ------------------------------------------------------------------------

def print_head(title, columns):
    print(f"\n{title}\n\n| {' | '.join(columns)} |\n|{' --- |' * len(columns)}", flush=True)


def report_recipe(name, tiny=False):
    """(module, recipe) at the report's size for ResNet-50; tiny: the toy's row."""
    pages = (data.RECIPE, evaluate.RECIPE, train.RECIPE)
    if tiny:
        return evaluate.open_model(name, "toy", pages)
    module, recipe = evaluate.open_model(name, None, pages)
    if name == "tsn":
        recipe.update(backbone="resnet50", frames=8)
    if name == "slowfast":
        recipe.update(depth=50)
    return module, recipe


def make_step(model, recipe, device, setting):
    """A step of train.py's loop, as a function of uint8 clips (B, T, H, W, 3), labels (B, K) and
    the network as it is called. The learning rate is 0, so all steps are alike."""
    amp, channels_last, _ = setting
    if channels_last:
        evaluate.use_channels_last(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=recipe["momentum"],
                                weight_decay=recipe["weight_decay"], fused=True)
    autocast = evaluate.make_autocast(device, amp)
    max_norm = recipe["clip_grad"] or math.inf

    def step(clips, labels, net):
        clips = data.normalise(clips, recipe["mean"], recipe["std"], channels_last)
        with autocast:
            logits = net(clips)
        loss = train.compute_loss(logits, labels, recipe)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def random_batch(recipe, size, device):
    shape = (size, recipe["frames"], recipe["crop"], recipe["crop"], 3)
    clips = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    labels = (torch.rand(size, CLASSES, device=device) < 1.96 / CLASSES).float()
    return clips, labels


def loader_rate(folder, recipe, workers, batches):
    """Training clips a second from a loader, counted once all its workers are at work."""
    batch = 4
    videos = data.VideoList(folder, "train", recipe, train=True)
    clips = batch * workers * (1 + batches)
    loader = torch.utils.data.DataLoader(videos, batch, sampler=range(clips), num_workers=workers,
                                         pin_memory=torch.cuda.is_available())
    arrivals = []
    for _ in data.load(loader):
        arrivals.append(time.perf_counter())
    counted = arrivals[workers - 1 :]
    return batch * (len(counted) - 1) / (counted[-1] - counted[0])


# ---- rows on the CPU: ours beside a reference ----------------------------------------------------

class Bench:
    """What the rows on the CPU share."""

    def __init__(self, args, folder):
        self.quick = args.quick
        self.folder = folder

    def turns(self, many, few):
        if self.quick:
            return few
        return many


def keep_memory():
    """Let the process keep the memory that it has once had, as on GPUs. Otherwise glibc gives
    blocks above 32 MB back to the kernel, which fills each new one with zeros, page by page; that
    can take longer than the work. Other systems have no mallopt."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)   # M_MMAP_MAX: no blocks outside the heap
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks


def compare(row, work, reference, ours, theirs, turns, goal, slower=False):
    """Print a line of the table. ours and theirs are called with the number of the turn.

    The ratio is the reference's time over ours, which should be at least `goal`; with slower it is
    our time over the reference's, which should be at most `goal`. A turn is one call of each. Of
    the turns' ratios the line has the median and the quartiles: where these are far apart, the
    machine was busy and the figure is worth nothing.
    """
    our_times = []
    their_times = []
    for turn in range(turns + 1):
        # each goes first in every other turn
        if turn % 2 == 0:
            our_time = seconds_of(ours, turn)
            their_time = seconds_of(theirs, turn)
        else:
            their_time = seconds_of(theirs, turn)
            our_time = seconds_of(ours, turn)
        if turn > 0:  # the first turn does not count
            our_times.append(our_time)
            their_times.append(their_time)

    ratios = np.array(their_times) / np.array(our_times)
    words = "its speed"
    limit = f">= {goal}"
    if slower:
        ratios = 1 / ratios
        words = "its time"
        limit = f"<= {goal}"
    low, ratio, high = np.percentile(ratios, (25, 50, 75))
    reached = ratio >= goal
    if slower:
        reached = ratio <= goal
    print(f"| {row} | {work} | {reference} | {milliseconds(their_times)} | "
          f"{milliseconds(our_times)} | {ratio:.2f} x {words} ({low:.2f} to {high:.2f}) | "
          f"{limit} | {'yes' if reached else 'no'} |", flush=True)


def seconds_of(work, turn):
    start = time.perf_counter()
    work(turn)
    return time.perf_counter() - start


def milliseconds(times):
    return f"{1000 * np.median(times):,.1f} ms"


def compare_clips(bench):
    """One training clip, on one core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = draw_frames(bench.folder / "frames")
    _, image = report_recipe("tsm")
    _, video = report_recipe("slowfast")
    rows = [(image, "", 1.3), (video, "", 1.25), ({**video, "draft": True}, ", draft", 1.8)]
    for recipe, words, goal in rows:
        videos = data.VideoList(folder, "train", recipe, train=True)
        side = recipe["crop"]

        def ours(turn):
            videos[turn]

        def decode_and_resize(turn):
            epoch, row = divmod(turn, len(videos))
            rng = np.random.default_rng([0, epoch, row])  # the same frames as ours
            for i in data.sample_indices(90, recipe, rng):
                with Image.open(videos.frames_dir / str(row) / data.FRAME.format(i + 1)) as image:
                    image.resize((side, side), Image.BILINEAR)

        compare("clip", f"{recipe['frames']} frames -> {side} training clip{words}, one core",
                "Pillow decode + one Pillow resize, nothing else", ours, decode_and_resize,
                bench.turns(120, 24), goal)
    torch.set_num_threads(threads)


def compare_operator(bench, row, work, goal, function):
    """Forward and backward, on the inputs of ResNet-50's 16 blocks for 8 frames of 224 pixels."""
    shapes = [(64, 56)]  # channels, side
    shapes += 3 * [(256, 56)] + 4 * [(512, 28)] + 6 * [(1024, 14)] + 2 * [(2048, 7)]
    inputs = []
    for channels, side in shapes:
        x = torch.randn(1, 8, channels, side, side, requires_grad=True)
        inputs.append((x, torch.randn_like(x)))

    def through(operator):
        for x, gradient in inputs:
            x.grad = None
            operator(x).backward(gradient)

    def ours(turn):
        through(function)

    def clone(turn):
        through(torch.clone)

    compare(row, f"{work}, forward + backward, 16 layer inputs", "x.clone()", ours, clone,
            bench.turns(30, 7), goal)


def compare_shift(bench):
    compare_operator(bench, "shift", "TSM's shift", 0.9, tsm.temporal_shift)


def compare_interlace(bench):
    """TIN's module without its two small nets."""
    offsets = torch.tensor([[0.5, 1.3, -0.5, -1.3]], requires_grad=True)
    weights = torch.ones(1, 4, 8, requires_grad=True)

    def interlace(x):
        quarter = x.shape[2] // 4
        moved, kept = x.split([quarter, x.shape[2] - quarter], dim=2)
        return torch.cat([tin.temporal_interlace(moved, offsets, weights), kept], dim=2)

    compare_operator(bench, "interlace", "TIN's interlacing", 0.65, interlace)


def compare_step(bench, name, reference, theirs, goal, slower=False):
    """A training step in float32. theirs: a function (recipe) -> (model, the function that is
    called for its forward pass)."""
    device = torch.device("cpu")
    module, recipe = report_recipe(name)
    recipe["dropout"] = 0.0
    size = bench.turns(2, 1)
    clips, labels = random_batch(recipe, size, device)
    ours = module.build(recipe, CLASSES).train()
    other, forward = theirs(recipe)
    float32 = ("off", False, False)
    our_step = make_step(ours, recipe, device, float32)
    other_step = make_step(other.train(), recipe, device, float32)

    def step_ours(turn):
        our_step(clips, labels, ours)

    def step_theirs(turn):
        other_step(clips, labels, forward)

    shape = f"{size} x {recipe['frames']} x {recipe['crop']}"
    compare(name, f"{name} R50 training step, {shape}, float32", reference, step_ours, step_theirs,
            bench.turns(11, 3), goal, slower)


def our_tsn(recipe):
    module, recipe = report_recipe("tsn")
    model = module.build(recipe, CLASSES)
    return model, model


def torchvision_tsn(recipe):
    model = torchvision.models.resnet50(num_classes=CLASSES)

    def forward(clip):
        logits = model(clip.flatten(0, 1))
        return logits.unflatten(0, clip.shape[:2]).mean(dim=1)

    return model, forward


def plain_slowfast(recipe):
    module, _ = report_recipe("slowfast")
    model = module.build(recipe, CLASSES).train()
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}

    def forward(clip):
        return slowfast_function(tensors, clip)

    # it is the same network
    clip = torch.randn(1, 32, 3, 64, 64)
    torch.testing.assert_close(forward(clip), model(clip))
    return model, forward


def slowfast_function(tensors, clip):
    """SlowFast 8x8 with ResNet-50, in training, without dropout: clip (B, 32, 3, H, W) -> logits
    (B, K). A function of the network's tensors, one layer after the other."""

    def conv(x, name, stride=(1, 1, 1)):
        weight = tensors[f"{name}.weight"]
        padding = [side // 2 for side in weight.shape[2:]]
        return F.conv3d(x, weight, None, stride, padding)

    def norm(x, name):
        keys = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(x, *[tensors[f"{name}.{key}"] for key in keys], training=True)

    def block(x, name, stride):
        y = F.relu(norm(conv(x, f"{name}.conv1"), f"{name}.bn1"), inplace=True)
        y = F.relu(norm(conv(y, f"{name}.conv2", stride), f"{name}.bn2"), inplace=True)
        y = norm(conv(y, f"{name}.conv3"), f"{name}.bn3")
        if f"{name}.downsample.0.weight" in tensors:
            x = norm(conv(x, f"{name}.downsample.0", stride), f"{name}.downsample.1")
        return F.relu(y + x, inplace=True)

    # the stems
    maps = {"slow": clip[:, ::4].transpose(1, 2), "fast": clip.transpose(1, 2)}  # (B, 3, T, H, W)
    for path, x in maps.items():
        x = F.relu(norm(conv(x, f"{path}.conv1", (1, 2, 2)), f"{path}.bn1"), inplace=True)
        maps[path] = F.max_pool3d(x, (1, 3, 3), (1, 2, 2), (0, 1, 1))

    # four stages, each after a lateral from the fast map to the slow one
    for stage, blocks in enumerate((3, 4, 6, 3)):
        lateral = conv(maps["fast"], f"fuse.{stage}.conv", (4, 1, 1))
        maps["slow"] = torch.cat([maps["slow"], lateral], dim=1)
        for path in maps:
            for i in range(blocks):
                stride = (1, 1, 1)
                if stage > 0 and i == 0:
                    stride = (1, 2, 2)
                maps[path] = block(maps[path], f"{path}.layer{stage + 1}.{i}", stride)

    means = [x.mean(dim=(2, 3, 4)) for x in maps.values()]
    return F.linear(torch.cat(means, dim=1), tensors["fc.weight"])


def compare_tsm(bench):
    compare_step(bench, "tsm", "our TSN's step", our_tsn, 1.06, slower=True)


def compare_tin(bench):
    compare_step(bench, "tin", "our TSN's step", our_tsn, 1.10, slower=True)


def compare_tsn(bench):
    compare_step(bench, "tsn", "torchvision's ResNet-50 on the same frames", torchvision_tsn, 0.97)


def compare_slowfast(bench):
    compare_step(bench, "slowfast", "a plain statement of it", plain_slowfast, 0.95)


def compare_metric(bench):
    """The reference takes 1,024 videos at a time and treats ties in the same way."""
    rng = np.random.default_rng(0)
    scores = rng.random((10_000, CLASSES), np.float32)
    labels = rng.random((10_000, CLASSES), np.float32) < 1.96 / CLASSES

    def blocks():
        precisions = []
        for start in range(0, len(scores), 1024):
            block = scores[start : start + 1024]
            truth = labels[start : start + 1024]
            rows, columns = np.nonzero(truth)
            ahead = block[rows] >= block[rows, columns][:, None]
            precision = (ahead & truth[rows]).sum(axis=1) / ahead.sum(axis=1)
            sums = np.bincount(rows, precision, len(block))
            precisions.append(sums / np.maximum(truth.sum(axis=1), 1))
        return np.concatenate(precisions)

    integers = labels.astype(np.uint8)
    np.testing.assert_allclose(evaluate.average_precision(scores, integers), blocks())

    def ours(turn):
        evaluate.sample_map(scores, integers)

    def theirs(turn):
        blocks().mean()

    compare("map", "sample-level mAP, 10,000 x 313", "blocks of 1,024 rows", ours, theirs, 15, 0.5)


def draw_videos(folder):
    """A folder of two videos for each core, of 3 seconds each. Drawn once."""
    if folder.exists():
        return folder
    folder.mkdir()
    for number in range(2 * os.cpu_count()):
        subprocess.run(["ffmpeg", "-nostdin", "-v", "error",
                        "-f", "lavfi", "-i", "testsrc2=s=640x480:r=25:d=3",
                        "-vf", "noise=c0s=12:c0f=t,format=yuv420p", folder / f"{number}.mp4"],
                       check=True)
    return folder


def compare_extraction(bench):
    videos = draw_videos(bench.folder / "videos")
    cores = os.cpu_count()
    pool = concurrent.futures.ThreadPoolExecutor(cores)

    def ffmpeg_alone(file):
        folder = Path(tempfile.mkdtemp(dir=bench.folder))
        subprocess.run(["ffmpeg", "-nostdin", "-v", "error", "-threads", "1", "-i", file,
                        "-vf", "fps=30,scale=-2:320", "-q:v", "2", folder / "img_%05d.jpg"],
                       check=True)

    def theirs(turn):
        list(pool.map(ffmpeg_alone, videos.iterdir()))

    for pack in (False, True):
        def ours(turn):
            out = tempfile.mkdtemp(dir=bench.folder)
            counts = data.extract(videos, out, "train", workers=cores, pack=pack)
            assert counts == (2 * cores, 0)

        words = "extraction"
        if pack:
            words = "extraction, packed"
        compare("extract", f"{words}, {2 * cores} videos of 3 s, {cores} cores",
                "ffmpeg alone, one process a core", ours, theirs, bench.turns(11, 3), 0.9)


def compare_views(bench):
    """All views of a video, 90 of them with SlowFast's own number of clips."""
    device = torch.device("cpu")
    module, recipe = report_recipe("slowfast")
    recipe["clips"] = bench.turns(10, 2)
    protocol = evaluate.make_protocol(recipe, "multiscale")
    views = functools.partial(evaluate.test_views, recipe=recipe, protocol=protocol)
    folder = draw_frames(bench.folder / "frames")
    videos = data.VideoList(folder, "train", recipe, train=False, views=views)
    one = torch.utils.data.Subset(videos, [0])
    model = module.build(recipe, CLASSES).eval()

    # what the network is given, without the videos
    passes = []
    for _, side in protocol["sizes"]:
        clips = torch.randn(3 * recipe["clips"], 32, 3, side, side)
        passes += clips.split(16)

    def ours(turn):
        evaluate.predict(model, one, CLASSES, recipe, device, batch=1)

    @torch.no_grad()
    def theirs(turn):
        for clips in passes:
            model(clips)

    compare("views", f"evaluation, slowfast R50, {evaluate.count_views(protocol)} views of a video",
            "the forward passes alone", ours, theirs, bench.turns(3, 1), 1.15, slower=True)


def time_units(bench):
    """Print what the README's costs of a full run are computed from, on this machine."""
    # extraction
    videos = draw_videos(bench.folder / "videos")
    cores = os.cpu_count()
    rates = []
    for pack in (False, True):
        times = []
        for _ in range(bench.turns(11, 3)):
            out = tempfile.mkdtemp(dir=bench.folder)
            start = time.perf_counter()
            data.extract(videos, out, "train", workers=cores, pack=pack)
            times.append(time.perf_counter() - start)
        rates.append(2 / np.median(times))  # each core has had two videos
    print(f"| videos of 3 s extracted in a second by a core | {rates[0]:.2f} | {rates[1]:.2f} |")

    # disk
    folder = draw_frames(bench.folder / "frames")
    packed = draw_frames(bench.folder / "packed")
    for video in sorted((packed / "frames").iterdir()):
        if video.is_dir():
            data.pack_folder(video)
    frames = sum(video.frames for video in data.read_list(folder / "train.txt"))
    sizes = []
    for place in (folder, packed):
        blocks = sum(file.stat().st_blocks for file in (place / "frames").rglob("*"))
        sizes.append(512 * blocks / frames)
    print(f"| bytes of a frame of 426x320 on the disk | {sizes[0]:,.0f} | {sizes[1]:,.0f} |")

    # the loader
    _, image = report_recipe("tsm")
    _, video = report_recipe("slowfast")
    batches = bench.turns(16, 4)
    kinds = [("8 x 224", image), ("32 x 112", video), ("32 x 112, draft", {**video, "draft": True})]
    for words, recipe in kinds:
        rates = [loader_rate(place, recipe, 1, batches) for place in (folder, packed)]
        print(f"| clips of {words} in a second by one loader process | {rates[0]:,.0f} | "
              f"{rates[1]:,.0f} |", flush=True)


COMPARISONS = {
    "clip": compare_clips,
    "shift": compare_shift,
    "interlace": compare_interlace,
    "tsm": compare_tsm,
    "tin": compare_tin,
    "tsn": compare_tsn,
    "slowfast": compare_slowfast,
    "map": compare_metric,
    "extract": compare_extraction,
    "views": compare_views,
}
ROWS = [*COMPARISONS, "units"]


def run_cpu(bench, rows):
    keep_memory()
    print(f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, "
          f"torch {torch.__version__}")
    if set(rows) & set(COMPARISONS):
        print_head("Ours beside a reference", ["row", "work", "reference", "its time", "our time",
                                               "ratio, quartiles", "goal", "reached"])
    for row in rows:
        if row in COMPARISONS:
            COMPARISONS[row](bench)
    if "units" in rows:
        print_head("Unit rates of a full run", ["unit", "folders", "packed"])
        time_units(bench)


# ---- --gpu: networks ---------------------------------------------------------------------------

NETWORKS = ["tsn", "trn", "tsm", "tin", "slowfast"]
SETTINGS = [  # (--amp, --channels-last, --compile), as train.py has them
    ("bf16", True, False),
    ("off", False, False),
    ("bf16", False, False),
]
COMPILED = ("bf16", True, True)


class Session:
    """What the rows of --gpu share."""

    def __init__(self, args, folder):
        self.tiny = args.tiny
        self.device = torch.device(args.device)
        self.folder = folder
        self.started = time.time()
        self.seconds = args.seconds
        self.bandwidth = None  # bytes a second, read and written
        self.steps = {}        # (network, setting): seconds of a training step
        self.rates = {}        # network: clips a second in training, its best setting
        self.processes = {}    # name: subprocess.Popen

    def left(self):
        return self.started + self.seconds - time.time()


def run_row(session, name, work, *arguments):
    """Print one row with work(session, *arguments). An error becomes one line, and the next row
    follows: the machine may be there for minutes only."""
    if session.left() < 0:
        print(f"| {name} | skipped: the {session.seconds} seconds are over |", flush=True)
        return
    try:
        work(session, *arguments)
    except Exception as error:
        message = str(error).strip().replace("\n", " ")[:300]
        print(f"| {name} | failed: {type(error).__name__}: {message} |", flush=True)

    # the next row finds the memory empty
    torch.compiler.reset()
    gc.collect()
    if session.device.type == "cuda":
        torch.cuda.empty_cache()


def print_header(session):
    """The machine, and the two speeds that bound what follows."""
    print(f"date {time.strftime('%Y-%m-%d %H:%M')}, torch {torch.__version__}, "
          f"torchvision {torchvision.__version__}, Python {sys.version.split()[0]}, "
          f"{os.cpu_count()} cores")
    if os.path.isdir("/dev/shm"):
        print(f"shared memory {shutil.disk_usage('/dev/shm').total / 2**30:.1f} GiB")
    if session.device.type == "cuda":
        card = torch.cuda.get_device_properties(session.device)
        print(f"{card.name}, {card.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}, "
              f"cuDNN {torch.backends.cudnn.version()}")
    print(f"TF32 in convolutions: {torch.backends.cudnn.allow_tf32}, in matrix products: "
          f"{torch.backends.cuda.matmul.allow_tf32}", flush=True)

    # a copy reads and writes every byte once
    size = 2**20 if session.tiny else 2**31
    source = torch.ones(size, dtype=torch.uint8, device=session.device)
    target = torch.empty_like(source)
    seconds = median_seconds(session.device, lambda: target.copy_(source), turns=10)
    session.bandwidth = 2 * size / seconds

    # a product of n x n matrices takes 2 n^3 operations
    n = 256 if session.tiny else 8192
    matrix = torch.randn(n, n, device=session.device, dtype=torch.bfloat16)
    seconds = median_seconds(session.device, lambda: matrix @ matrix, turns=10)
    print(f"a large copy moves {session.bandwidth / 1e9:,.0f} GB/s; a bfloat16 product of "
          f"{n} x {n} matrices does {2 * n**3 / seconds / 1e12:,.0f} TFLOP/s", flush=True)


def median_seconds(device, work, turns):
    """The median time of work(), after three calls that do not count. There are fewer turns if
    they would take longer than 4 seconds. As in training, nothing waits between them."""
    for _ in range(2):
        work()
    wait_for(device)
    start = time.perf_counter()
    work()
    wait_for(device)
    turns = min(turns, max(3, int(4 / (time.perf_counter() - start))))

    if device.type != "cuda":
        times = []
        for _ in range(turns):
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
        return float(np.median(times))

    events = [torch.cuda.Event(enable_timing=True) for _ in range(turns + 1)]
    events[0].record()
    for event in events[1:]:
        work()
        event.record()
    wait_for(device)
    times = [first.elapsed_time(second) for first, second in zip(events, events[1:])]
    return float(np.median(times)) / 1000  # elapsed_time gives milliseconds


def wait_for(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Traffic(TorchDispatchMode):
    """Adds up the bytes of every operator's arguments and results. Over a copy's bandwidth, this is
    the least time of a network whose operators run one by one."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not function.is_view:
            for value in tree_leaves((args, kwargs, result)):
                if isinstance(value, torch.Tensor):
                    self.bytes += value.nbytes
        return result


def time_network(session, name, setting):
    """Print a row: a network's training step and its evaluation."""
    amp, channels_last, compiled = setting
    device = session.device
    module, recipe = report_recipe(name, session.tiny)
    torch.manual_seed(0)
    with device:  # the first weights are drawn on the GPU
        model = module.build(recipe, CLASSES)
    size = 64 if name == "slowfast" else 32
    turns = 10
    if session.tiny:
        size = 2
        turns = 2
    clips, labels = random_batch(recipe, size, device)

    # training: one step is counted, and then others are timed
    model.train()
    step = make_step(model, recipe, device, setting)
    with FlopCounterMode(display=False) as flops, Traffic() as traffic:
        step(clips, labels, model)
    net = model
    if compiled:
        backend = "eager" if session.tiny else "inductor"
        net = torch.compile(model, backend=backend)
    for _ in range(3):
        loss = step(clips, labels, net)
    assert math.isfinite(loss), f"loss {loss}"
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = median_seconds(device, lambda: step(clips, labels, net), turns)
    memory = 0.0
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(device) / 2**30
    session.steps[name, setting] = seconds
    session.rates[name] = max(session.rates.get(name, 0), size / seconds)

    # evaluation: every clip as the one view of a video
    evaluation = ""
    if not compiled:  # compiling once more takes too long
        model.eval()
        options = dict(view_batch=size, autocast=evaluate.make_autocast(device, amp),
                       channels_last=channels_last)

        def score():
            evaluate.score_views(model, [clips[:, None]], recipe, device, **options)

        evaluation = f"{size / median_seconds(device, score, turns):,.0f}"

    words = {"off": "float32", "bf16": "bf16"}[amp]
    if channels_last:
        words += " channels_last"
    if compiled:
        words += " compiled"
    beside = ""
    if ("tsn", setting) in session.steps and name != "slowfast":
        beside = f"{seconds / session.steps['tsn', setting]:.2f}"
    print(f"| {name} | {words} | {size} x {recipe['frames']} x {recipe['crop']} | "
          f"{size / seconds:,.0f} | {1000 * seconds:,.1f} | {beside} | {memory:.1f} | "
          f"{flops.get_total_flops() / seconds / 1e12:,.0f} | "
          f"{traffic.bytes / session.bandwidth / seconds:.0%} | {evaluation} |", flush=True)


NETWORK_COLUMNS = ["network", "setting", "clips x frames x pixels", "training clips/s", "ms a step",
                   "x TSN's step", "peak GiB", "TFLOP/s", "of the memory bound",
                   "evaluation clips/s"]


# ---- --gpu: operators --------------------------------------------------------------------------

def time_operator(session, name, channels_last):
    """Print a row: an operator on bfloat16 features as after ResNet-50's first stage. Of the
    memory bound: the bytes that it must read and write once, at a copy's speed, over its time.

    Forward reads x and writes y. Backward reads y's gradient and writes x's; interlacing must also
    read x again, for the gradient of the offsets. The module interlaces a quarter of x.
    """
    shape = (32, 8, 56, 56, 256)  # B, T, H, W, C
    if session.tiny:
        shape = (1, 8, 4, 4, 16)
    device = session.device
    x = torch.randn(shape, device=device, dtype=torch.bfloat16).permute(0, 1, 4, 2, 3)
    if not channels_last:
        x = x.contiguous()
    x.requires_grad_()
    offsets = torch.tensor([0.5, 1.3, -0.5, -1.3], device=device).repeat(shape[0], 1)
    offsets.requires_grad_()
    weights = torch.ones(shape[0], 4, shape[1], device=device, requires_grad=True)
    module = tin.TemporalInterlace(shape[-1], shape[1]).to(device)
    backward_moves = 2.0  # times the bytes of x
    if name == "temporal_interlace":
        backward_moves = 3.0
    if name == "TemporalInterlace":
        backward_moves = 2.25

    def forward():
        if name == "temporal_shift":
            return tsm.temporal_shift(x)
        if name == "temporal_interlace":
            return tin.temporal_interlace(x, offsets, weights)
        with torch.autocast(device.type, torch.bfloat16):
            return module(x)

    gradient = torch.ones_like(x)

    def both():
        x.grad = None
        forward().backward(gradient)

    turns = 2 if session.tiny else 20
    with torch.no_grad():
        one_way = median_seconds(device, forward, turns)
    two_ways = median_seconds(device, both, turns)
    one_bound = 2 * x.nbytes / session.bandwidth
    two_bound = (2 + backward_moves) * x.nbytes / session.bandwidth
    layout = "channels_last" if channels_last else "contiguous"
    print(f"| {name} | {layout} | {1000 * one_way:.3f} | {one_bound / one_way:.0%} | "
          f"{1000 * two_ways:.3f} | {two_bound / two_ways:.0%} |", flush=True)


# ---- --gpu: the loader -------------------------------------------------------------------------

def time_loader(session, workers):
    folder = draw_frames(session.folder / "frames")
    rates = []
    for name in ("tsm", "slowfast"):
        _, recipe = report_recipe(name)
        batches = 1 if session.tiny else 12
        rates.append(loader_rate(folder, recipe, workers, batches))
    print(f"| {workers} | {rates[0]:,.0f} | {rates[1]:,.0f} |", flush=True)


def print_consumption(session):
    images = max(session.rates[name] for name in session.rates if name != "slowfast")
    print(f"| the GPU trains on, at its best | {images:,.0f} | {session.rates['slowfast']:,.0f} |",
          flush=True)


# ---- --gpu: the toy, through the scripts ---------------------------------------------------------

def start(session, name, script, *arguments):
    """Start a script in a process; what it prints goes to <name>.txt."""
    command = [sys.executable, ROOT / script, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(session.folder / f"{name}.txt", "w") as output:
        session.processes[name] = subprocess.Popen(
            command, cwd=session.folder, env=environment, stdout=output, stderr=subprocess.STDOUT)


def finish(session, name):
    """Wait for a process and return the lines that it printed. RuntimeError if it failed."""
    process = session.processes[name]
    status = process.wait(timeout=max(5, session.left() + 45))
    lines = (session.folder / f"{name}.txt").read_text().strip().split("\n")
    if status != 0:
        raise RuntimeError(f"{name} ended with status {status}: {lines[-1]}")
    return lines


def start_training(session, name, model, *flags):
    workers = 0 if session.tiny else 2
    start(session, name, "train.py", "--model", model, "--recipe", "toy", "--data", "toy",
          "--out", name, "--workers", workers, "--device", session.device, *flags)


def read_log(session, name):
    """(losses, validation mAPs) that a run has logged."""
    path = session.folder / name / "log.jsonl"
    losses = []
    maps = []
    if path.exists():
        for text in path.read_text().splitlines():
            if not text.endswith("}"):
                continue  # it is being written
            line = json.loads(text)
            if "val_map" in line:
                maps.append(100 * line["val_map"])
            else:
                losses.append(line["loss"])
    return losses, maps


def start_toy(session):
    """Start all training runs at once: one alone would leave the GPU idle most of the time."""
    finish(session, "draw")
    size = []
    short = ["--epochs", 3]
    if session.tiny:
        size = ["--epochs", 2, "--batch", 4]
        short = size
    start_training(session, "tin", "tin", *size)
    start_training(session, "tin-resumed", "tin", *size)
    start_training(session, "tin-bf16", "tin", "--amp", "bf16", *short)
    if not session.tiny:
        start_training(session, "slowfast", "slowfast")
        start_training(session, "tin-fp16", "tin", "--amp", "fp16", *short)

    # kill one after some epochs, as a machine that is taken away would, and resume it
    epochs = 1 if session.tiny else 4
    killed = session.processes["tin-resumed"]
    while killed.poll() is None and session.left() > 0:
        if len(read_log(session, "tin-resumed")[1]) >= epochs:
            break
        time.sleep(0.2)
    status = killed.poll()
    killed.kill()
    killed.wait()
    seen = len(read_log(session, "tin-resumed")[1])
    print(f"| tin-resumed | killed after {seen} epochs (its status before: {status}) |", flush=True)
    start_training(session, "tin-resumed", "tin", *size, "--resume")


def report_training(session, name, aim):
    lines = finish(session, name)
    losses, maps = read_log(session, name)
    finite = all(map(math.isfinite, losses))
    speed = [line for line in lines if "clips/s" in line][-1]
    speed = speed.split("clips/s")[0].split()[-1]
    print(f"| {name} | {len(maps)} | {losses[0]:.2f} to {losses[-1]:.2f}, finite: {finite} | "
          f"{maps[-1]:.2f} | {max(maps):.2f} | {aim} | {speed} |", flush=True)


EVALUATIONS = {
    "multiscale": ("slowfast", ["--protocol", "multiscale"]),
    "float32": ("tin", []),
    "half": ("tin", ["--amp", "bf16"]),
    "half-multiscale": ("slowfast", ["--protocol", "multiscale", "--amp", "bf16"]),
}


def start_evaluations(session, names):
    for name in names:
        checkpoint, flags = EVALUATIONS[name]
        workers = 0 if session.tiny else 2
        start(session, name, "evaluate.py", "--checkpoint", f"{checkpoint}/best.pt",
              "--data", "toy", "--device", session.device, "--workers", workers,
              "--out", f"{name}.npz", *flags)


def report_evaluation(session, name):
    checkpoint, flags = EVALUATIONS[name]
    lines = finish(session, name)
    print(f"| {checkpoint} {' '.join(flags)} | {lines[-1]} |", flush=True)


def compare_half(session, full, half):
    """Print a row: what half precision changes in the scores."""
    with np.load(session.folder / f"{full}.npz") as file:
        scores = file["scores"]
        labels = file["labels"]
    with np.load(session.folder / f"{half}.npz") as file:
        half_scores = file["scores"]
    change = 100 * (evaluate.sample_map(half_scores, labels) - evaluate.sample_map(scores, labels))
    difference = abs(half_scores - scores)
    print(f"| {half} beside {full} | largest difference of a score {difference.max():.4f}, median "
          f"{np.median(difference):.5f}, mAP {change:+.2f} |", flush=True)


# ---- --gpu: batch norm over processes ------------------------------------------------------------

class AlwaysSync(torch.nn.SyncBatchNorm):
    """SyncBatchNorm skips its exchange if there is one process; this one never does."""

    def forward(self, x):
        return torch.nn.modules._functions.SyncBatchNorm.apply(
            x, self.weight, self.bias, self.running_mean, self.running_var, self.eps, self.momentum,
            torch.distributed.group.WORLD, torch.distributed.get_world_size())


def sync_difference(rank, world, backend, device, folder):
    """The largest difference of the features of SlowFast's toy, in training, between batch norm
    over the whole batch in one process and over `world` processes with a share each."""
    torch.distributed.init_process_group(backend, init_method=f"file://{folder}/{backend}",
                                         rank=rank, world_size=world,
                                         timeout=datetime.timedelta(seconds=60))
    torch.backends.cudnn.allow_tf32 = False  # its rounding would hide a small difference
    module, recipe = report_recipe("slowfast", tiny=True)
    torch.manual_seed(0)
    model = module.build(recipe, CLASSES).to(device).train()
    clips = torch.randn(4, recipe["frames"], 3, 32, 32).to(device)
    # In the first weights the last norm of each block is 0, which would hide everything before it.
    for norm in model.modules():
        if isinstance(norm, torch.nn.BatchNorm3d):
            torch.nn.init.ones_(norm.weight)
    with torch.no_grad():
        expected = model.features(clips)
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
        for norm in model.modules():
            if isinstance(norm, torch.nn.SyncBatchNorm):
                norm.__class__ = AlwaysSync
        share = slice(rank * len(clips) // world, (rank + 1) * len(clips) // world)
        features = model.features(clips[share])
    difference = (features - expected[share]).abs().max().item()
    torch.distributed.destroy_process_group()
    if rank == 0:
        (folder / f"{backend}.txt").write_text(f"{difference:.2e}, features up to "
                                               f"{expected.abs().max().item():.2f}")


def check_sync(session, backend, world):
    """Print a row. Two processes share the GPU by gloo, as NCCL wants a GPU for each."""
    arguments = (world, backend, session.device, session.folder)
    torch.multiprocessing.spawn(sync_difference, arguments, nprocs=world)
    result = (session.folder / f"{backend}.txt").read_text()
    print(f"| {backend} | {world} | {result} |", flush=True)


# ---- --gpu: the order of everything --------------------------------------------------------------

def run_gpu(session):
    torch.backends.cudnn.benchmark = True  # as in train.py
    toy = ["--videos", 8] if session.tiny else []
    start(session, "draw", "data.py", "toy", "toy", *toy)  # meanwhile, one core of many
    run_row(session, "header", print_header)

    print_head("Networks", NETWORK_COLUMNS)
    for setting in SETTINGS[:2] if session.tiny else SETTINGS:
        for name in NETWORKS:
            run_row(session, f"{name} {setting}", time_network, name, setting)

    print_head("Operators in bfloat16", ["operator", "layout", "ms forward", "of the memory bound",
                                         "ms forward + backward", "of the memory bound"])
    for name in ("temporal_shift", "temporal_interlace", "TemporalInterlace"):
        for channels_last in (False, True):
            run_row(session, name, time_operator, name, channels_last)

    print_head("Clips a second from the loader", ["workers", "8 x 224", "32 x 112"])
    for workers in [1] if session.tiny else [1, 4, 8, 16]:
        run_row(session, f"{workers} workers", time_loader, workers)
    run_row(session, "the GPU trains on", print_consumption)

    print_head("The toy, five runs at once", ["run", "epochs", "loss", "last mAP", "best mAP",
                                              "aim", "clips/s"])
    run_row(session, "start", start_toy)
    run_row(session, "tin", report_training, "tin", "about 97")
    run_row(session, "tin-resumed", report_training, "tin-resumed", "as tin")
    run_row(session, "tin-bf16", report_training, "tin-bf16", "finite, 3 epochs")
    if not session.tiny:
        run_row(session, "tin-fp16", report_training, "tin-fp16", "finite, 3 epochs")
        run_row(session, "slowfast", report_training, "slowfast", "about 99")

    print_head("The toy's checkpoints", ["evaluation", "result"])
    names = ["float32", "half"] if session.tiny else list(EVALUATIONS)
    run_row(session, "start", start_evaluations, names)
    for name in names:
        run_row(session, name, report_evaluation, name)
    run_row(session, "half", compare_half, "float32", "half")
    if not session.tiny:
        run_row(session, "half", compare_half, "multiscale", "half-multiscale")

    print_head("Batch norm over processes", ["backend", "processes", "largest difference"])
    if session.device.type == "cuda":  # PyTorch has it for GPUs only
        run_row(session, "nccl", check_sync, "nccl", 1)
        run_row(session, "gloo", check_sync, "gloo", 2)

    print_head("Compiled networks", NETWORK_COLUMNS)
    for name in ("tsn", "tin"):
        run_row(session, f"{name} compiled", time_network, name, COMPILED)
    print(f"\n{time.time() - session.started:.0f} seconds in all", flush=True)


# ---- the script --------------------------------------------------------------------------------

def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=ROWS, default=ROWS, metavar="ROW",
                        help=f"rows on the CPU: {' '.join(ROWS)}")
    parser.add_argument("--quick", action="store_true", help="small and few, for a first look")
    parser.add_argument("--gpu", action="store_true", help="the rows that need a GPU")
    parser.add_argument("--tiny", action="store_true", help="with --gpu: tiny sizes")
    parser.add_argument("--device", default="cuda", help="with --gpu (%(default)s)")
    parser.add_argument("--seconds", type=int, default=420,
                        help="with --gpu: no row starts later than this (%(default)s)")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        if not args.gpu:
            run_cpu(Bench(args, Path(folder)), args.only)
            return
        session = Session(args, Path(folder))
        try:
            run_gpu(session)
        finally:
            for process in session.processes.values():
                process.kill()
                process.wait()


if __name__ == "__main__":
    main()
