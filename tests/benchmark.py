"""How fast everything is: on a CPU beside plain references, and on a GPU.

    python tests/benchmark.py                   CPU: ours beside a plain reference
    python tests/benchmark.py --gpu             GPU: networks, the loader
    python tests/benchmark.py --tiny [--gpu]    the rows at tiny sizes, on any machine

The output is Markdown. Nothing is downloaded: videos are drawn into a temporary folder, and all
weights are random.
"""
import argparse
import ctypes
import functools
import itertools
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

from tables import print_head, print_row  # with it, Python finds the scripts
import data
import evaluate
import tin
import train
import tsm

CLASSES = 313  # of Multi-Moments in Time
THREADS = torch.get_num_threads()


def timer(call, threads=THREADS):
    return Timer("call()", globals={"call": call}, num_threads=threads)


def compare(args, row, work, reference, ours, theirs, threads=THREADS):
    """Print the median times of theirs() and ours(), after ± the distance between the quartiles,
    and our speed as a multiple of the reference's. A wide distance means a busy machine."""
    medians = []
    cells = []
    for call in (theirs, ours):
        times = timer(call, threads).blocked_autorange(min_run_time=0.01 if args.tiny else 5)
        medians.append(times.median)
        cells.append(f"{1000 * times.median:,.1f} ± {1000 * times.iqr:,.1f} ms")
    print_row(row, work, reference, *cells, f"{medians[0] / medians[1]:.2f}")


RESNET50 = {"tsn": dict(backbone="resnet50", frames=8), "slowfast": dict(depth=50)}


def report_recipe(args, name):
    """(module, recipe) at the report's size for ResNet-50; --tiny: the toy's row."""
    row = "toy" if args.tiny else None  # None: the first
    pages = (data.RECIPE, evaluate.RECIPE, train.RECIPE)
    module, recipe = evaluate.open_model(name, row, pages)
    if not args.tiny:
        recipe.update(RESNET50.get(name, {}))  # the others' first rows are ResNet-50 with 8 frames
    return module, recipe


def make_model(args, name):
    """A network and its recipe."""
    module, recipe = report_recipe(args, name)
    with args.device:  # the first weights are drawn there
        return module.build(recipe, CLASSES), recipe


def random_clips(args, recipe, size):
    shape = (size, recipe["frames"], recipe["crop"], recipe["crop"], 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8, device=args.device)


def make_step(args, model, recipe, size=2, amp="off", channels_last=False):
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
    data.write_lines(folder / "categories.txt", data.TOY_CATEGORIES)
    return data.VideoList(folder, "train")


# ---- CPU: ours beside a reference --------------------------------------------------------------

def keep_memory():
    """Keep the memory that the process has once had, as on GPUs. Otherwise glibc gives large blocks
    back, and the kernel fills each new one with zeros, which may take longer than the work."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # other systems have none
        libc.mallopt(-4, 0)   # M_MMAP_MAX: no blocks outside the heap
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks


def compare_clips(args):
    """A training clip, on one core; the reference decodes as many frames."""
    files = sorted(args.videos.folder(0).iterdir())
    _, image = report_recipe(args, "tsm")
    _, video = report_recipe(args, "slowfast")
    for recipe in [image, video, {**video, "draft": True}]:
        clips = data.TrainClips(args.videos, recipe, seed=0)
        side = recipe["crop"]
        epochs = itertools.count()

        def ours():
            clips[next(epochs), 0]  # each time other frames and another crop

        def decode_and_resize():
            for file in files[: recipe["frames"]]:
                with Image.open(file) as frame:
                    frame.resize((side, side), Image.BILINEAR)

        work = f"a training clip of {recipe['frames']} x {side}, draft {recipe['draft']}"
        compare(args, "clip", work, "Pillow's decoding and one resize", ours, decode_and_resize,
                threads=1)


def compare_operators(args):
    """Forward and backward on features as after ResNet-50's first stage: 8 frames, 256 channels."""
    side = 4 if args.tiny else 56
    x = torch.randn(8, 256, side, side, requires_grad=True)

    def run(operator):
        x.grad = None
        y = operator(x)
        y.backward(torch.ones_like(y))

    def shift(x):
        return tsm.temporal_shift(x[None])  # a batch of one video

    for row, operator in [("shift", shift), ("interlace", tin.TemporalInterlace(256, frames=8))]:
        compare(args, row, f"8 x 256 x {side} x {side}, forward and backward", "x.clone()",
                functools.partial(run, operator), functools.partial(run, torch.clone))


def compare_steps(args):
    tsn, recipe = make_model(args, "tsn")
    plain = torch.nn.Sequential(
        torch.nn.Flatten(0, 1),  # frames are images
        torchvision.models.get_model(recipe["backbone"], num_classes=CLASSES),
        torch.nn.Unflatten(0, (2, -1)),
        torch.nn.AdaptiveAvgPool2d((1, None)),  # the mean over frames
        torch.nn.Flatten(),
    )
    work = "training step, 2 clips"
    tsn_step = make_step(args, tsn, recipe)
    compare(args, "tsn", work, "torchvision's ResNet", tsn_step, make_step(args, plain, recipe))
    for name in ["tsm", "tin"]:
        compare(args, name, work, "our TSN", make_step(args, *make_model(args, name)), tsn_step)


def inputs_of(kind, call):
    """Call call() -> [(layer, its input), ...] of the layers of a kind."""
    inputs = []

    def remember_input(layer, arguments):
        if isinstance(layer, kind):
            [x] = arguments
            inputs.append((layer, x.detach().requires_grad_(x.requires_grad)))

    hook = torch.nn.modules.module.register_module_forward_pre_hook(remember_input)
    call()
    hook.remove()
    return inputs


def compare_slowfast(args):
    """The reference is SlowFast's convolutions alone."""
    model, recipe = make_model(args, "slowfast")
    step = make_step(args, model, recipe)
    inputs = inputs_of(torch.nn.Conv3d, step)

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
    labels = rng.random((10_000, CLASSES)) < 1.96 / CLASSES
    ours = functools.partial(evaluate.sample_map, scores, labels)
    sort = functools.partial(np.sort, scores)
    compare(args, "map", "sample-level mAP, 10,000 x 313", "np.sort of the scores", ours, sort)


def compare_extraction(args):
    """A video of 90 frames."""
    ffmpeg = ["ffmpeg", "-nostdin", "-y", "-v", "error", "-threads", "1", "-i"]
    folder = args.folder / "videos"
    folder.mkdir()
    video = folder / "video.mp4"
    frames = args.videos.folder(0) / "img_%05d.jpg"
    subprocess.run([*ffmpeg, frames, video], check=True)

    def ours():
        out = tempfile.mkdtemp(dir=args.folder)  # what is there is not extracted again
        data.extract(folder, out, "train", workers=1, pack=True)

    def ffmpeg_alone():
        subprocess.run([*ffmpeg, video, "-vf", "fps=30,scale=-2:320", "-q:v", "2",
                        args.folder / "img_%05d.jpg"], check=True)

    compare(args, "extract", "a video, --pack", "ffmpeg alone, one thread", ours, ffmpeg_alone)


def compare_views(args):
    """All 90 views of a video, from its frames on. The reference is what the network does."""
    model, recipe = make_model(args, "slowfast")
    model.eval()
    if args.tiny:
        recipe.update(clips=1)
    protocol = evaluate.make_protocol(recipe, "multiscale")
    views = evaluate.VideoViews(args.videos, recipe, protocol)

    def ours():
        _, scales = evaluate.stack_views([views[0]])  # a batch of one video
        evaluate.score_views(model, scales, recipe, args.device)

    inputs = inputs_of(type(model), ours)

    @torch.no_grad()
    def forward_passes():
        for network, x in inputs:
            network(x)

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
        seconds = {}
        for name in SIZES:
            shape, seconds[name], memory, scoring = time_network(args, name, *setting)
            print_row(name, *setting, shape, f"{shape[0] / seconds[name]:,.0f}",
                      f"{seconds[name] / seconds['tsn']:.2f}", f"{memory:.1f}",
                      f"{shape[0] / scoring:,.0f}")


def time_network(args, name, amp, channels_last, compiled):
    """-> the shape of the clips, the seconds and peak GiB of a training step, and the seconds of
    scoring every clip as the one view of a video."""
    size = 2 if args.tiny else SIZES[name]
    turns = 1 if args.tiny else 10
    model, recipe = make_model(args, name)
    if channels_last:
        evaluate.use_channels_last(model)
    if compiled:
        model = torch.compile(model)
    step = make_step(args, model, recipe, size, amp, channels_last)
    step()  # cuDNN tries its algorithms, and some need more memory
    if args.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = timer(step).timeit(turns).mean
    memory = torch.cuda.max_memory_allocated() / 2**30  # 0 on a CPU

    clips = random_clips(args, recipe, size)
    model.eval()
    autocast = evaluate.make_autocast(args.device, amp)

    def score():
        evaluate.score_views(model, [clips[:, None]], recipe, args.device, size, autocast,
                             channels_last)

    return tuple(clips.shape[:4]), seconds, memory, timer(score).timeit(turns).mean


def time_loaders(args):
    """Training clips a second. The first batch of each worker is not counted: workers start one
    after another."""
    print_head("Clips a second from the loader", "workers", "8 x 224", "32 x 112")
    turns = 2 if args.tiny else 13  # of each worker
    for workers in [1] if args.tiny else [1, 4, 8, 16]:
        rates = []
        for name in ["tsm", "slowfast"]:
            _, recipe = report_recipe(args, name)
            options = argparse.Namespace(recipe={**recipe, "batch": 4}, seed=0, workers=workers,
                                         skip_broken=False)
            batches = train.load_clips(args.videos, options, start=0, total=turns * workers,
                                       rank=0, world=1, device=args.device)
            arrivals = [time.perf_counter() for _ in batches][workers - 1 :]
            seconds = (arrivals[-1] - arrivals[0]) / (len(arrivals) - 1)
            rates.append(f"{4 / seconds:,.0f}")
        print_row(workers, *rates)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="tiny sizes")
    parser.add_argument("--gpu", action="store_true", help="what needs a GPU")
    args = parser.parse_args()

    print(f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, "
          f"Python {sys.version.split()[0]}, torch {torch.__version__}", flush=True)
    args.device = torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        args.folder = Path(folder)
        args.videos = draw_videos(args.folder / "data")
        if args.gpu:
            _, _, args.device = evaluate.start_process()  # the GPU if there is one
            torch.backends.cudnn.benchmark = True  # as in train.py
            print(f"device {args.device}")
            if args.device.type == "cuda":
                print(torch.cuda.get_device_name())
            time_networks(args)
            time_loaders(args)
        else:
            keep_memory()
            print_head("Ours beside a reference", "row", "work", "reference", "its time",
                       "our time", "our speed / its speed")
            compare_clips(args)
            compare_operators(args)
            compare_steps(args)
            compare_slowfast(args)
            compare_map(args)
            compare_extraction(args)
            compare_views(args)


if __name__ == "__main__":
    main()
