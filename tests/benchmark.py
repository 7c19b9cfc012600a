"""How fast everything is: on a CPU beside plain references, and on a GPU.

    python tests/benchmark.py [--only ROW ...]            CPU: ours beside a plain reference
    python tests/benchmark.py --gpu [--only ROW ...]      what needs a GPU, in eight minutes
    python tests/benchmark.py --tiny                      the rows at tiny sizes: do they work?
    python tests/benchmark.py --gpu --tiny --device cpu   the same for the rows of the GPU

The output is Markdown. Nothing is downloaded: videos are drawn into a temporary folder, and all
weights are random.
"""
import argparse
import concurrent.futures
import ctypes
import functools
import gc
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
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
import tsn

CLASSES = 313  # of Multi-Moments in Time
DEADLINE = time.monotonic() + 420  # with --gpu, no row starts later


# ---- what both halves use ----------------------------------------------------------------------

def print_row(*cells):
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def print_head(title, *columns):
    print(f"\n{title}\n")
    print_row(*columns)
    print_row(*["---"] * len(columns))


def report_recipe(name, tiny):
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


def draw_frames(folder):
    """A data folder of six videos of 90 frames, 426x320 pixels, in which coloured clouds drift. A
    frame takes about 23 kB. Drawn once."""
    if folder.exists():
        return folder
    lines = []
    for number in range(6):
        grain = np.random.default_rng(number).integers(0, 256, (20, 20, 3), np.uint8)
        clouds = np.asarray(Image.fromarray(grain).resize((540, 420), Image.BICUBIC))
        frames = [clouds[i : i + 320, i : i + 426] for i in range(90)]
        lines.append(data.write_video(folder, str(number), frames, [number]))
    data.write_lines(folder / "train.txt", lines)
    data.write_lines(folder / "categories.txt", [f"class {k}" for k in range(CLASSES)])
    return folder


def make_step(model, recipe, clips, amp="off", channels_last=False):
    """A step of train.py's loop as a function. The learning rate is 0, so all steps are alike."""
    labels = (torch.rand(len(clips), CLASSES, device=clips.device) < 1.96 / CLASSES).float()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=recipe["momentum"],
                                weight_decay=recipe["weight_decay"], fused=True)
    autocast = evaluate.make_autocast(clips.device, amp)
    max_norm = recipe["clip_grad"] or math.inf

    def step():
        x = data.normalise(clips, recipe["mean"], recipe["std"], channels_last)
        with autocast:
            logits = model(x)
        loss = train.compute_loss(logits, labels, recipe)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def random_clips(recipe, size, device="cpu"):
    shape = (size, recipe["frames"], recipe["crop"], recipe["crop"], 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8, device=device)


# ---- CPU: ours beside a reference --------------------------------------------------------------

def keep_memory():
    """Let the process keep the memory that it has once had, as on GPUs. Otherwise glibc gives
    blocks above 32 MB back to the kernel, which fills each new one with zeros, page by page; that
    can take longer than the work. Other systems have no mallopt."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)   # M_MMAP_MAX: no blocks outside the heap
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks


def compare(args, row, work, reference, ours, theirs, turns=11):
    """Print a row of the table: the median times of ours() and theirs(), and our speed as a
    multiple of the reference's. A turn is one call of each. Where the quartiles of the turns are
    far apart, the machine was busy and the figure is worth nothing."""
    if args.tiny:
        turns = 1
    times = {ours: [], theirs: []}
    pair = [ours, theirs]
    for _ in range(turns + 1):
        for call in pair:
            start = time.perf_counter()
            call()
            times[call].append(1000 * (time.perf_counter() - start))
        pair.reverse()  # each goes first in every other turn

    # the first turn does not count
    our_times = np.array(times[ours][1:])
    their_times = np.array(times[theirs][1:])
    low, ratio, high = np.percentile(their_times / our_times, [25, 50, 75])
    print_row(row, work, reference, f"{np.median(their_times):,.1f} ms",
              f"{np.median(our_times):,.1f} ms", f"{ratio:.2f} ({low:.2f} to {high:.2f})")


def compare_clips(args):
    """24 training clips, on one core; the reference decodes as many frames."""
    folder = draw_frames(args.folder / "frames")
    files = sorted((folder / "frames").rglob("*.jpg"))
    _, image = report_recipe("tsm", args.tiny)
    _, video = report_recipe("slowfast", args.tiny)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for recipe in [image, video, {**video, "draft": True}]:
        videos = data.VideoList(folder, "train", recipe, train=True)
        side = recipe["crop"]
        chosen = np.random.default_rng(0).choice(files, 24 * recipe["frames"])

        def ours():
            for index in range(24):
                videos[index]

        def decode_and_resize():
            for file in chosen:
                with Image.open(file) as frame:
                    frame.resize((side, side), Image.BILINEAR)

        work = f"24 training clips of {recipe['frames']} x {side}, draft {recipe['draft']}"
        compare(args, "clip", work, "Pillow's decoding and one resize", ours, decode_and_resize)
    torch.set_num_threads(threads)


def compare_operators(args):
    """Forward and backward on the inputs of ResNet-50's 16 blocks, for 8 frames of 224 pixels."""
    inputs = []
    interlaces = []
    for blocks, channels, side in [(1, 64, 56), (3, 256, 56), (4, 512, 28), (6, 1024, 14),
                                   (2, 2048, 7)]:
        for _ in range(blocks):
            inputs.append(torch.randn(1, 8, channels, side, side, requires_grad=True))
            interlaces.append(tin.TemporalInterlace(channels, frames=8))
    gradients = [torch.randn_like(x) for x in inputs]

    def run(operators):
        for operator, x, gradient in zip(operators, inputs, gradients):
            x.grad = None
            operator(x).backward(gradient)

    work = "16 layer inputs, forward and backward"
    clone = functools.partial(run, 16 * [torch.clone])
    shift = functools.partial(run, 16 * [tsm.temporal_shift])
    interlace = functools.partial(run, interlaces)
    compare(args, "shift", work, "x.clone()", shift, clone, 30)
    compare(args, "interlace", work, "x.clone()", interlace, clone, 30)


def build_step(args, name):
    """(a network, its training step in float32 for two clips)"""
    module, recipe = report_recipe(name, args.tiny)
    recipe["dropout"] = 0.0
    model = module.build(recipe, CLASSES).train()
    return model, make_step(model, recipe, random_clips(recipe, 2))


def compare_steps(args):
    _, recipe = report_recipe("tsn", args.tiny)
    frames = recipe["frames"]
    plain = torch.nn.Sequential(
        torch.nn.Flatten(0, 1),  # frames are images
        torchvision.models.get_model(recipe["backbone"], num_classes=CLASSES),
        torch.nn.Unflatten(0, (2, frames)),
        torch.nn.AvgPool2d((frames, 1)),  # the mean over frames
        torch.nn.Flatten(),
    )
    plain_step = make_step(plain, recipe, random_clips(recipe, 2))
    _, tsn_step = build_step(args, "tsn")
    _, tsm_step = build_step(args, "tsm")
    _, tin_step = build_step(args, "tin")
    work = "training step, 2 clips"
    compare(args, "tsn", work, "torchvision's ResNet", tsn_step, plain_step)
    compare(args, "tsm", work, "our TSN", tsm_step, tsn_step)
    compare(args, "tin", work, "our TSN", tin_step, tsn_step)


def compare_slowfast(args):
    """The reference is what no SlowFast can do without."""
    model, step = build_step(args, "slowfast")

    # an input for every convolution, of its own size; only the stems' need no gradient
    inputs = []

    def remember_input(layer, arguments):
        if isinstance(layer, torch.nn.Conv3d):
            x = torch.randn_like(arguments[0])
            inputs.append((layer, x.requires_grad_(arguments[0].requires_grad)))

    hook = torch.nn.modules.module.register_module_forward_pre_hook(remember_input)
    step()
    hook.remove()

    def convolutions():
        for conv, x in inputs:
            x.grad = None
            y = conv(x)
            y.backward(torch.ones_like(y))
        model.zero_grad()

    compare(args, "slowfast", "training step, 2 clips", "its convolutions alone", step,
            convolutions)


def compare_map(args):
    rng = np.random.default_rng(0)
    scores = rng.random((10_000, CLASSES), np.float32)
    labels = (rng.random((10_000, CLASSES)) < 1.96 / CLASSES).astype(np.uint8)
    ours = functools.partial(evaluate.sample_map, scores, labels)
    sort = functools.partial(np.sort, scores)
    compare(args, "map", "sample-level mAP, 10,000 x 313", "np.sort of the scores", ours, sort)


def compare_extraction(args):
    """A video of 90 frames."""
    frames = draw_frames(args.folder / "frames") / "frames" / "0" / "img_%05d.jpg"
    videos = args.folder / "videos"
    videos.mkdir()
    video = videos / "video.mp4"
    ffmpeg = ["ffmpeg", "-nostdin", "-v", "error", "-threads", "1"]
    subprocess.run([*ffmpeg, "-i", frames, video], check=True)

    def ours():
        out = tempfile.mkdtemp(dir=args.folder)
        assert data.extract(videos, out, "train", workers=1, pack=True) == (1, 0)

    def ffmpeg_alone():
        out = Path(tempfile.mkdtemp(dir=args.folder))
        subprocess.run([*ffmpeg, "-i", video, "-vf", "fps=30,scale=-2:320", "-q:v", "2",
                        out / "img_%05d.jpg"], check=True)

    compare(args, "extract", "a video, --pack", "ffmpeg alone, one thread", ours, ffmpeg_alone)


def compare_views(args):
    """All 90 views of a video, from its frames on."""
    module, recipe = report_recipe("slowfast", args.tiny)
    protocol = evaluate.make_protocol(recipe, "multiscale")
    folder = draw_frames(args.folder / "frames") / "frames" / "0"
    read = functools.partial(data.read_frames, folder)
    model = module.build(recipe, CLASSES).eval()

    # what the network is given, without the video
    parts = []
    for _, side in protocol["sizes"]:
        clips = torch.randn(3 * recipe["clips"], recipe["frames"], 3, side, side)
        parts += clips.split(16)

    def ours():
        views = evaluate.test_views(read, 90, "a name", recipe, protocol)
        views = [view[None] for view in views]  # a batch of one video
        evaluate.score_views(model, views, recipe, torch.device("cpu"))

    @torch.no_grad()
    def theirs():
        for part in parts:
            model(part)

    compare(args, "views", f"slowfast, {evaluate.count_views(protocol)} views of a video",
            "the forward passes alone", ours, theirs, 3)


CPU_ROWS = {
    "clip": compare_clips,
    "operators": compare_operators,
    "steps": compare_steps,
    "slowfast": compare_slowfast,
    "map": compare_map,
    "extract": compare_extraction,
    "views": compare_views,
}


# ---- GPU: how to print a row, and how to time --------------------------------------------------

def attempt(name, row, *arguments):
    """Print a row: its name and the cells that row(*arguments) returns. After an error, which is
    printed in place of the cells, the next row follows: the GPU may be there for minutes only."""
    if time.monotonic() > DEADLINE:
        print_row(name, "skipped: no time is left")
        return
    try:
        print_row(name, *row(*arguments))
    except Exception as error:
        message = str(error).strip().split("\n")[0]
        print_row(name, f"failed: {type(error).__name__}: {message}")

    # the next row finds the memory empty
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()


def wait():
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def seconds_of(turns, work, *arguments):
    """The mean time of a call, after two that do not count. As in training, nothing waits for the
    GPU between two calls."""
    for _ in range(2):
        work(*arguments)
    wait()
    start = time.perf_counter()
    for _ in range(turns):
        work(*arguments)
    wait()
    return (time.perf_counter() - start) / turns


def measure_gpu(args):
    """(bytes that a large copy reads and writes in a second, operations of a large bfloat16 product
    in a second): these two speeds bound all that follows."""
    size = 2**31
    side = 8192
    if args.tiny:
        size = 2**20
        side = 256
    source = torch.ones(size, dtype=torch.uint8, device=args.device)
    target = torch.empty_like(source)
    bandwidth = 2 * size / seconds_of(10, target.copy_, source)
    matrix = torch.randn(side, side, dtype=torch.bfloat16, device=args.device)
    arithmetic = 2 * side**3 / seconds_of(10, torch.mm, matrix, matrix)
    print(f"a large copy moves {bandwidth / 1e9:,.0f} GB/s, a large bfloat16 product does "
          f"{arithmetic / 1e12:,.0f} TFLOP/s", flush=True)
    return bandwidth, arithmetic


# ---- GPU: networks -----------------------------------------------------------------------------

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


def time_network(args, name, amp, channels_last, compiled, steps):
    """A training step and the evaluation. steps: {network: seconds of a step}, filled here."""
    module, recipe = report_recipe(name, args.tiny)
    size = 32
    turns = 10
    if name == "slowfast":
        size = 64
    if args.tiny:
        size = 2
        turns = 1
    clips = random_clips(recipe, size, args.device)
    with args.device:  # the first weights are drawn on the GPU
        model = module.build(recipe, CLASSES).train()
    if channels_last:
        evaluate.use_channels_last(model)
    step = make_step(model, recipe, clips, amp, channels_last)

    # one step is counted, and then others are timed
    with FlopCounterMode(display=False) as operations, Traffic() as traffic:
        step()
    if compiled:
        net = torch.compile(model, backend="eager" if args.tiny else "inductor")
        step = make_step(net, recipe, clips, amp, channels_last)
    step()  # here cuDNN tries its algorithms, and some need more memory
    if args.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = seconds_of(turns, step)
    memory = torch.cuda.max_memory_allocated() / 2**30

    # as a multiple of TSN's step; SlowFast's clips are others
    steps[name] = seconds
    multiple = "-"
    if name != "slowfast":
        multiple = f"{seconds / steps.get('tsn', math.nan):.2f}"

    # evaluation: every clip as the one view of a video; compiling once more would take too long
    evaluation = "-"
    if not compiled:
        model.eval()
        score = functools.partial(
            evaluate.score_views, view_batch=size, channels_last=channels_last,
            autocast=evaluate.make_autocast(args.device, amp))
        score_seconds = seconds_of(turns, score, model, [clips[:, None]], recipe, args.device)
        evaluation = f"{size / score_seconds:,.0f}"

    return [amp, channels_last, compiled, " x ".join(map(str, clips.shape[:4])),
            f"{size / seconds:,.0f}", multiple, f"{memory:.1f}",
            f"{traffic.bytes / seconds / args.bandwidth:.0%}",
            f"{operations.get_total_flops() / seconds / args.arithmetic:.0%}", evaluation]


SETTINGS = [  # train.py's --amp, --channels-last, --compile, and the networks
    ("off", False, False, ["tsn", "trn", "tsm", "tin", "slowfast"]),
    ("bf16", False, False, ["tsn", "trn", "tsm", "tin", "slowfast"]),
    ("bf16", True, False, ["tsn", "trn", "tsm", "tin", "slowfast"]),
    ("bf16", True, True, ["tsn", "tin"]),  # compiling takes a minute
]


def time_networks(args):
    print_head("Networks", "network", "--amp", "--channels-last", "--compile", "clips",
               "training clips/s", "x TSN's step", "peak GiB", "of the memory's speed",
               "of bf16 arithmetic's", "evaluation clips/s")
    settings = SETTINGS
    if args.tiny:
        settings = [("bf16", True, False, ["tsn", "slowfast"]), ("bf16", True, True, ["tsn"])]
    for *setting, names in settings:
        steps = {}
        for name in names:
            attempt(name, time_network, args, name, *setting, steps)


# ---- GPU: operators ----------------------------------------------------------------------------

def time_operator(args, operator, moves):
    """Forward and backward in bfloat16 and channels_last, on features as after ResNet-50's first
    stage. moves: how often the bytes of x must be read or written at least."""
    shape = (32, 8, 56, 56, 256)  # B, T, H, W, C
    if args.tiny:
        shape = (1, 8, 4, 4, 256)
    x = torch.randn(shape, dtype=torch.bfloat16, device=args.device).permute(0, 1, 4, 2, 3)
    x.requires_grad_()
    gradient = torch.ones_like(x)

    def forward_and_backward():
        x.grad = None
        with torch.autocast(args.device.type, torch.bfloat16):
            y = operator(x)
        y.backward(gradient)

    seconds = seconds_of(20, forward_and_backward)
    return [f"{1000 * seconds:.3f}", f"{moves * x.nbytes / args.bandwidth / seconds:.0%}"]


def time_operators(args):
    """Forward reads x and writes y; backward reads y's gradient and writes x's. Interlacing must
    also read a quarter of x again, for the gradient of the offsets."""
    print_head("Operators, forward and backward", "operator", "ms", "of the memory's speed")
    module = tin.TemporalInterlace(256, frames=8).to(args.device)
    attempt("shift", time_operator, args, tsm.temporal_shift, 4)
    attempt("interlace", time_operator, args, module, 4.25)


# ---- GPU: the loader ---------------------------------------------------------------------------

def time_loader(args, workers):
    """Training clips a second, counted once all workers are at work."""
    folder = draw_frames(args.folder / "frames")
    batch = 4
    batches = 1 if args.tiny else 12  # of each worker
    rates = []
    for name in ["tsm", "slowfast"]:
        _, recipe = report_recipe(name, args.tiny)
        videos = data.VideoList(folder, "train", recipe, train=True)
        clips = range(batch * workers * (1 + batches))
        loader = torch.utils.data.DataLoader(videos, batch, sampler=clips, num_workers=workers,
                                             pin_memory=args.device.type == "cuda")
        arrivals = [time.perf_counter() for _ in data.load(loader)]
        counted = arrivals[workers - 1 :]
        rates.append(f"{batch * (len(counted) - 1) / (counted[-1] - counted[0]):,.0f}")
    return rates


def time_loaders(args):
    print_head("Clips a second from the loader", "workers", "8 x 224", "32 x 112")
    counts = [1, 4, 8, 16]
    if args.tiny:
        counts = [1]
    for workers in counts:
        attempt(workers, time_loader, args, workers)


# ---- GPU: the toy, through the scripts -----------------------------------------------------------

def start_script(args, script, *flags):
    command = [sys.executable, ROOT / script, "--data", "toy", "--device", args.device, *flags]
    return subprocess.Popen([str(word) for word in command], cwd=args.folder, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})


def finish(process):
    """Wait for a script; a RuntimeError if it fails or takes too long."""
    try:
        output, _ = process.communicate(timeout=DEADLINE + 45 - time.monotonic())
    finally:
        process.kill()
    if process.returncode != 0:
        raise RuntimeError(output.strip().split("\n")[-1])


def train_toy(args, model, amp, kill):
    """Train on the toy. kill: after the first epoch, as a machine that is taken away would end the
    run, which is then resumed."""
    name = f"{model}-{amp}"
    command = ["train.py", "--model", model, "--recipe", "toy", "--amp", amp, "--out", name,
               "--resume"]
    if args.tiny:
        command += ["--epochs", 2, "--batch", 4]
    log = args.folder / name / "log.jsonl"
    killed = "-"
    if kill:
        process = start_script(args, *command)
        while process.poll() is None and time.monotonic() < DEADLINE:
            if log.exists() and "val_map" in log.read_text():
                break
            time.sleep(0.2)
        process.kill()
        process.wait()
        killed = log.read_text().count("val_map")
    finish(start_script(args, *command))

    lines = [json.loads(text) for text in log.read_text().splitlines()]
    maps = [100 * line["val_map"] for line in lines if "val_map" in line]
    last_step = [line for line in lines if "loss" in line][-1]
    return [amp, len(maps), killed, f"{last_step['loss']:.2f}", f"{maps[-1]:.2f}",
            f"{max(maps):.2f}", f"{last_step['clips_per_s']:.0f}"]


def compare_half(args, model, protocol):
    """What bf16 changes in the scores of the best checkpoint."""
    processes = []
    for amp in ["off", "bf16"]:
        processes.append(start_script(
            args, "evaluate.py", "--checkpoint", f"{model}-off/best.pt", "--protocol", protocol,
            "--amp", amp, "--out", f"{model}-{amp}.npz"))
    scores = []
    maps = []
    for amp, process in zip(["off", "bf16"], processes):
        finish(process)
        with np.load(args.folder / f"{model}-{amp}.npz") as file:
            scores.append(file["scores"])
            maps.append(100 * json.loads(str(file["meta"]))["map"])
    difference = abs(scores[0] - scores[1]).max()
    return [protocol, f"{maps[0]:.2f}", f"{maps[1]:.2f}", f"{difference:.4f}"]


def run_toy(args):
    data.draw_toy(args.folder / "toy", 8 if args.tiny else 1200)
    runs = [("tin", "off", True)]  # network, --amp, killed or not
    halves = [("tin", "clip")]     # network, protocol
    if not args.tiny:
        runs += [("slowfast", "off", False), ("tin", "fp16", False)]
        halves += [("slowfast", "multiscale")]

    # all at once: one alone would leave the GPU idle most of the time
    print_head("The toy", "network", "--amp", "epochs", "killed after", "last loss", "last mAP",
               "best mAP", "clips/s")
    with concurrent.futures.ThreadPoolExecutor() as pool:
        futures = [pool.submit(train_toy, args, *run) for run in runs]
        for (model, _, _), future in zip(runs, futures):
            attempt(model, future.result)

    print_head("bf16 beside float32", "network", "protocol", "mAP", "mAP in bf16",
               "largest difference of a score")
    for model, protocol in halves:
        attempt(model, compare_half, args, model, protocol)


# ---- GPU: batch norm over processes --------------------------------------------------------------

def check_sync(args):
    """The largest difference of synchronised batch norm's output from batch norm's. The layer skips
    the exchange if there is one process, so the function inside it is called."""
    dist.init_process_group("nccl", init_method=f"file://{args.folder}/store", rank=0, world_size=1)
    norm = torch.nn.BatchNorm3d(16).to(args.device)
    x = torch.randn(4, 16, 8, 14, 14, device=args.device)
    synced = torch.nn.modules._functions.SyncBatchNorm.apply(
        x, norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps, norm.momentum,
        dist.group.WORLD, 1)
    dist.destroy_process_group()
    return [f"{(synced - norm(x)).abs().max():.1e}"]


def check_nccl(args):
    print_head("Batch norm over processes", "backend", "largest difference")
    attempt("nccl, 1 process", check_sync, args)


GPU_ROWS = {
    "operators": time_operators,
    "loader": time_loaders,
    "toy": run_toy,
    "sync": check_nccl,
    "networks": time_networks,
}


# ---- the script --------------------------------------------------------------------------------

def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[*CPU_ROWS, *GPU_ROWS], metavar="ROW",
                        help=f"{' '.join(CPU_ROWS)}; with --gpu: {' '.join(GPU_ROWS)}")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes")
    parser.add_argument("--gpu", action="store_true", help="the rows that need a GPU")
    parser.add_argument("--device", default="cuda", type=torch.device, help="with --gpu")
    args = parser.parse_args()

    print(f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, "
          f"Python {sys.version.split()[0]}, torch {torch.__version__}")
    if args.gpu:
        rows = GPU_ROWS
        torch.backends.cudnn.benchmark = True  # as in train.py
        if args.device.type == "cuda":
            print(f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}")
        args.bandwidth, args.arithmetic = measure_gpu(args)
    else:
        rows = CPU_ROWS
        keep_memory()
        print_head("Ours beside a reference", "row", "work", "reference", "its time", "our time",
                   "our speed / its speed (quartiles)")
    with tempfile.TemporaryDirectory() as folder:
        args.folder = Path(folder)
        for name in args.only or rows:
            rows[name](args)


if __name__ == "__main__":
    main()
