"""How fast everything is: on a CPU beside plain references, and on a GPU.

    python tests/benchmark.py [--only ROW ...]            CPU: ours beside a plain reference
    python tests/benchmark.py --gpu [--only ROW ...]      GPU: networks, operators, the loader
    python tests/benchmark.py --tiny [--gpu]              the rows at tiny sizes, on any machine

The output is Markdown. Nothing is downloaded: videos are drawn into a temporary folder, and all
weights are random.
"""
import argparse
import ctypes
import functools
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from torch.utils.benchmark import Timer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import data
import evaluate
import tin
import train
import tsm

CLASSES = 313  # of Multi-Moments in Time


def print_row(*cells):
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def print_head(title, *columns):
    print(f"\n{title}\n")
    print_row(*columns)
    print_row(*["---"] * len(columns))


def timer(call):
    return Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())


def milliseconds(times):
    return f"{1000 * times.median:,.1f} ± {1000 * times.iqr:,.1f} ms"


def compare(args, row, work, reference, ours, theirs):
    """Print the median times of ours() and theirs(), the quartiles' distance, and our speed as a
    multiple of the reference's. A wide distance means that the machine was busy."""
    seconds = 0.01 if args.tiny else 5
    our_times = timer(ours).blocked_autorange(min_run_time=seconds)
    their_times = timer(theirs).blocked_autorange(min_run_time=seconds)
    print_row(row, work, reference, milliseconds(their_times), milliseconds(our_times),
              f"{their_times.median / our_times.median:.2f}")


RESNET50 = {"tsn": dict(backbone="resnet50", frames=8), "slowfast": dict(depth=50)}


def report_recipe(name, tiny):
    """(module, recipe) at the report's size for ResNet-50; tiny: the toy's row."""
    pages = (data.RECIPE, evaluate.RECIPE, train.RECIPE)
    if tiny:
        return evaluate.open_model(name, "toy", pages)
    module, recipe = evaluate.open_model(name, None, pages)
    recipe.update(RESNET50.get(name, {}))  # the first row of the others is one
    return module, recipe


def draw_videos(folder):
    """A list of six videos of 90 frames, 426x320 pixels, in which coloured clouds drift. A frame
    takes about 23 kB."""
    lines = []
    for number in range(6):
        grain = np.random.default_rng(number).integers(0, 256, (20, 20, 3), np.uint8)
        clouds = np.asarray(Image.fromarray(grain).resize((540, 420), Image.BICUBIC))
        frames = [clouds[i : i + 320, i : i + 426] for i in range(90)]
        lines.append(data.write_video(folder, str(number), frames, [number]))
    data.write_lines(folder / "train.txt", lines)
    data.write_lines(folder / "categories.txt", [f"class {k}" for k in range(CLASSES)])
    return data.VideoList(folder, "train")


def random_clips(args, recipe, size):
    shape = (size, recipe["frames"], recipe["crop"], recipe["crop"], 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8, device=args.device)


def make_step(args, model, recipe, size, amp="off", channels_last=False):
    """A step of train.py as a function. The learning rate is 0, so all steps are alike."""
    clips = random_clips(args, recipe, size)
    labels = torch.zeros(size, CLASSES, device=args.device)
    optimizer, scaler = train.make_optimizer(model, recipe, args.device, amp)
    optimizer.param_groups[0]["lr"] = 0.0
    autocast = evaluate.make_autocast(args.device, amp)

    def step():
        x = data.normalise(clips, recipe["mean"], recipe["std"], channels_last)
        train.train_step(model, x, labels, optimizer, scaler, recipe, None, autocast)

    return step


def build_step(args, name, size=2, amp="off", channels_last=False, compiled=False):
    """A network's training step, and the network."""
    module, recipe = report_recipe(name, args.tiny)
    with args.device:  # the first weights are drawn there
        model = module.build(recipe, CLASSES).train()
    if channels_last:
        evaluate.use_channels_last(model)
    net = torch.compile(model) if compiled else model
    return make_step(args, net, recipe, size, amp, channels_last), model


# ---- CPU: ours beside a reference --------------------------------------------------------------

def keep_memory():
    """Keep the memory that the process has once had, as on GPUs. Otherwise glibc returns blocks
    above 32 MB to the kernel, which fills each new one with zeros; that can outlast the work."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # other systems have none
        libc.mallopt(-4, 0)   # M_MMAP_MAX: no blocks outside the heap
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks


def compare_clips(args):
    """24 training clips, on one core; the reference decodes as many frames."""
    files = sorted(args.videos.frames_dir.rglob("*.jpg"))
    _, image = report_recipe("tsm", args.tiny)
    _, video = report_recipe("slowfast", args.tiny)
    count = 2 if args.tiny else 24
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for recipe in [image, video, {**video, "draft": True}]:
        clips = data.TrainClips(args.videos, recipe, seed=0)
        side = recipe["crop"]
        chosen = np.random.default_rng(0).choice(files, count * recipe["frames"])

        def ours():
            for i in range(count):
                clips[i, i % len(args.videos)]

        def decode_and_resize():
            for file in chosen:
                with Image.open(file) as frame:
                    frame.resize((side, side), Image.BILINEAR)

        work = f"{count} training clips of {recipe['frames']} x {side}, draft {recipe['draft']}"
        compare(args, "clip", work, "Pillow's decoding and one resize", ours, decode_and_resize)
    torch.set_num_threads(threads)


def compare_operators(args):
    """Forward and backward on features as after ResNet-50's first stage, 8 frames a video."""
    videos = 32 if args.gpu else 1
    side = 4 if args.tiny else 56
    dtype = torch.bfloat16 if args.gpu else torch.float32
    shape = (8 * videos, 256, side, side)  # B*T, C, H, W
    x = torch.randn(shape, device=args.device, dtype=dtype, requires_grad=True)

    def run(operator):
        x.grad = None
        with torch.autocast(args.device.type, torch.bfloat16, enabled=args.gpu):
            y = operator(x)
        y.backward(torch.ones_like(y))

    def shift(x):
        return tsm.temporal_shift(x.unflatten(0, (-1, 8)))

    interlace = tin.TemporalInterlace(256, frames=8).to(args.device)
    for row, operator in [("shift", shift), ("interlace", interlace)]:
        compare(args, row, f"{' x '.join(map(str, shape))}, forward and backward", "x.clone()",
                functools.partial(run, operator), functools.partial(run, torch.clone))


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
    plain_step = make_step(args, plain, recipe, size=2)
    tsn_step, _ = build_step(args, "tsn")
    compare(args, "tsn", "training step, 2 clips", "torchvision's ResNet", tsn_step, plain_step)
    for name in ["tsm", "tin"]:
        step, _ = build_step(args, name)
        compare(args, name, "training step, 2 clips", "our TSN", step, tsn_step)


def compare_slowfast(args):
    """The reference is SlowFast's convolutions alone."""
    step, model = build_step(args, "slowfast")
    inputs = []  # (layer, an input of its size); the stems' inputs need no gradient

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

    compare(args, "slowfast", "training step, 2 clips", "its convolutions", step, convolutions)


def compare_map(args):
    rng = np.random.default_rng(0)
    scores = rng.random((10_000, CLASSES), np.float32)
    labels = (rng.random((10_000, CLASSES)) < 1.96 / CLASSES).astype(np.uint8)
    ours = functools.partial(evaluate.sample_map, scores, labels)
    sort = functools.partial(np.sort, scores)
    compare(args, "map", "sample-level mAP, 10,000 x 313", "np.sort of the scores", ours, sort)


def compare_extraction(args):
    """A video of 90 frames."""
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    video = folder / "video.mp4"
    frames = args.videos.frames_dir / "0" / "img_%05d.jpg"
    ffmpeg = ["ffmpeg", "-nostdin", "-v", "error", "-threads", "1"]
    subprocess.run([*ffmpeg, "-i", frames, video], check=True)

    def ours():
        out = tempfile.mkdtemp(dir=args.folder)
        data.extract(folder, out, "train", workers=1, pack=True)

    def ffmpeg_alone():
        out = Path(tempfile.mkdtemp(dir=args.folder))
        subprocess.run([*ffmpeg, "-i", video, "-vf", "fps=30,scale=-2:320", "-q:v", "2",
                        out / "img_%05d.jpg"], check=True)

    compare(args, "extract", "a video, --pack", "ffmpeg alone, one thread", ours, ffmpeg_alone)


def compare_views(args):
    """All 90 views of a video, from its frames on."""
    module, recipe = report_recipe("slowfast", args.tiny)
    if args.tiny:
        recipe.update(clips=1)
    protocol = evaluate.make_protocol(recipe, "multiscale")
    views = evaluate.VideoViews(args.videos, recipe, protocol)
    model = module.build(recipe, CLASSES).eval()

    def ours():
        _, scales = evaluate.stack_views([views[0]])  # a batch of one video
        evaluate.score_views(model, scales, recipe, args.device)

    # what the network is given, without the video
    parts = []
    _, scales = views[0]
    for clips in scales:
        parts += data.normalise(clips, recipe["mean"], recipe["std"]).split(16)

    @torch.no_grad()
    def forward_passes():
        for part in parts:
            model(part)

    compare(args, "views", f"slowfast, {evaluate.count_views(protocol)} views of a video",
            "the forward passes alone", ours, forward_passes)


# ---- GPU ---------------------------------------------------------------------------------------

SETTINGS = [  # train.py's --amp, --channels-last, --compile
    ("off", False, False),
    ("bf16", False, False),
    ("bf16", True, False),
    ("bf16", True, True),  # compiling takes a minute a network
]
SIZES = {"tsn": 32, "trn": 32, "tsm": 32, "tin": 32, "slowfast": 64}  # clips


def time_networks(args):
    print_head("Networks", "network", "--amp", "--channels-last", "--compile", "clips",
               "training clips/s", "x TSN's step", "peak GiB", "evaluation clips/s")
    for setting in SETTINGS[:1] if args.tiny else SETTINGS:
        tsn_seconds = None
        for name in SIZES:
            seconds = time_network(args, name, tsn_seconds, *setting)
            if name == "tsn":
                tsn_seconds = seconds


def time_network(args, name, tsn_seconds, amp, channels_last, compiled):
    """Print the figures of a training step, and of scoring every clip as the one view of a video
    -> the step's seconds."""
    size = 2 if args.tiny else SIZES[name]
    turns = 1 if args.tiny else 10
    step, model = build_step(args, name, size, amp, channels_last, compiled)
    step()  # cuDNN tries its algorithms, and some need more memory
    memory = "-"
    if args.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = timer(step).timeit(turns).mean
    if args.device.type == "cuda":
        memory = f"{torch.cuda.max_memory_allocated() / 2**30:.1f}"
    multiple = "-"  # SlowFast's clips are others
    if name != "slowfast":
        multiple = f"{seconds / (tsn_seconds or seconds):.2f}"

    evaluation = "-"  # as without --compile: model is not compiled
    _, recipe = report_recipe(name, args.tiny)
    clips = random_clips(args, recipe, size)
    if not compiled:
        score = functools.partial(
            evaluate.score_views, model.eval(), [clips[:, None]], recipe, args.device, size,
            evaluate.make_autocast(args.device, amp), channels_last)
        evaluation = f"{size / timer(score).timeit(turns).mean:,.0f}"
    print_row(name, amp, channels_last, compiled, " x ".join(map(str, clips.shape[:4])),
              f"{size / seconds:,.0f}", multiple, memory, evaluation)
    return seconds


def time_loaders(args):
    """Training clips a second, counted once all workers are at work."""
    print_head("Clips a second from the loader", "workers", "8 x 224", "32 x 112")
    batch = 4
    batches = 1 if args.tiny else 12  # of each worker
    for workers in [1] if args.tiny else [1, 4, 8, 16]:
        rates = []
        for name in ["tsm", "slowfast"]:
            _, recipe = report_recipe(name, args.tiny)
            clips = data.TrainClips(args.videos, recipe, seed=0)
            rows = [(0, i % len(args.videos)) for i in range(batch * workers * (1 + batches))]
            loader = torch.utils.data.DataLoader(clips, batch, sampler=rows, num_workers=workers,
                                                 pin_memory=args.device.type == "cuda")
            arrivals = [time.perf_counter() for _ in data.load(loader)][workers - 1 :]
            seconds = arrivals[-1] - arrivals[0]
            rates.append(f"{batch * (len(arrivals) - 1) / seconds:,.0f}")
        print_row(workers, *rates)


ROWS = {
    "clip": compare_clips,
    "operators": compare_operators,
    "steps": compare_steps,
    "slowfast": compare_slowfast,
    "map": compare_map,
    "extract": compare_extraction,
    "views": compare_views,
    "networks": time_networks,
    "loader": time_loaders,
}
GPU_ROWS = ["operators", "networks", "loader"]
CPU_ROWS = [row for row in ROWS if row not in ("networks", "loader")]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=ROWS, metavar="ROW",
                        help=f"{' '.join(CPU_ROWS)}; with --gpu: {' '.join(GPU_ROWS)}")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes")
    parser.add_argument("--gpu", action="store_true", help="the rows that need a GPU")
    args = parser.parse_args()

    print(f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, "
          f"Python {sys.version.split()[0]}, torch {torch.__version__}")
    args.device = torch.device("cpu")
    if args.gpu and torch.cuda.is_available():
        args.device = torch.device("cuda")
        torch.backends.cudnn.benchmark = True  # as in train.py
        print(f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}")
    else:
        keep_memory()
    print_head("Ours beside a reference", "row", "work", "reference", "its time", "our time",
               "our speed / its speed")
    with tempfile.TemporaryDirectory() as folder:
        args.folder = Path(folder)
        args.videos = draw_videos(args.folder / "data")
        for name in args.only or (GPU_ROWS if args.gpu else CPU_ROWS):
            ROWS[name](args)


if __name__ == "__main__":
    main()
