"""What several test files share: the scripts on the path, ways to run them, a tiny model file, and
the golden figures.

tests/golden/NETWORK_*.npz hold what the authors' own code answered, but no weights: every tensor of
their checkpoint is redrawn from (seed, its name, its shape), so that a file in their own layout can
be made on any machine. metrics.npz holds scores, labels, and what scikit-learn and X-Temporal
answered; losses.npz holds logits, labels, losses, and the gradients of two of them.
"""
import importlib
import json
import os
import shutil
import socket
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "figures")]
os.environ["OMP_NUM_THREADS"] = "1"  # also in the scripts that tests start
torch.set_num_threads(1)

# A model file of two layers, for tests of the scripts: quick, with batch norm and dropout.
TINY = '''"""A tiny network, to test the scripts."""
import torch
import torch.nn as nn

import data


class Tiny(nn.Module):
    """clip (B, T, 3, H, W) -> logits (B, K)."""

    def __init__(self, num_classes, frames, norm, dropout):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2)
        self.norm = nn.BatchNorm2d(8) if norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(8 * frames, num_classes)

    def forward(self, clip):
        x = self.conv(clip.flatten(0, 1))
        x = torch.relu(self.norm(x)).mean(dim=(2, 3))
        x = x.unflatten(0, clip.shape[:2]).flatten(1)
        return self.fc(self.dropout(x))


def build(recipe, num_classes):
    return Tiny(num_classes, recipe["frames"], recipe["norm"], recipe["dropout"])


ROW = dict(frames=4, norm=True, dropout=0.5, lr=0.2, epochs=6, batch=8, reference_batch=8)
RECIPES = {
    "small": {**data.TOY, **ROW},  # with --data
    "toy": ROW,                    # without; data.TOY is added by itself
}
'''

# Without ffmpeg such tests are skipped, but not where CI=true: there it must not be missing.
needs_ffmpeg = pytest.mark.skipif(
    shutil.which("ffmpeg") is None and os.environ.get("CI") != "true",
    reason="the program ffmpeg is missing")


def close(ours, expected, tolerance=1e-4):
    """Assert that tensors are equal but for `tolerance` times the largest expected value."""
    expected = torch.as_tensor(expected)
    ours = torch.as_tensor(ours)
    assert ours.shape == expected.shape
    largest = expected.abs().max().item()
    assert (ours - expected).abs().max().item() <= tolerance * max(largest, 1e-6)


def call(script, *arguments):
    """Run a script's main in this process, as `python SCRIPT.py ARGUMENTS` does -> exit status."""
    module = importlib.import_module(script)
    sys_argv = sys.argv
    sys.argv = [f"{script}.py", *[str(argument) for argument in arguments]]
    try:
        with pytest.raises(SystemExit) as stop:
            importlib.import_module("data").run_script(module.main)
    finally:
        sys.argv = sys_argv
    return stop.value.code or 0


def python(*arguments, cwd=None, **environ):
    """Run `python ARGUMENTS` as a process of its own -> its status, stdout and stderr."""
    command = [sys.executable, *[str(argument) for argument in arguments]]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300,
                          env={**os.environ, **{key: str(value) for key, value in environ.items()}})


def torchrun(processes, *arguments, **options):
    """The same by several processes, as torchrun starts them."""
    return python("-m", "torch.distributed.run", "--nproc-per-node", processes,
                  "--master-port", free_port(), *arguments, **options)


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def write(path, content):
    """A file of text or bytes, in folders that are made for it -> its Path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, str):
        content = content.encode()
    path.write_bytes(content)
    return path


def noise(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def write_frames(folder, frames):
    """Arrays (h, w, 3) as img_00001.jpg and so on. Inside they are PNG, which changes no pixel:
    Pillow looks at the content, not at the name."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for number, frame in enumerate(frames, 1):
        Image.fromarray(frame).save(folder / f"img_{number:05d}.jpg", format="PNG")
    return folder


def data_folder(folder, lines, split="train"):
    """A data folder of three classes, with three small frames for every line that is not empty."""
    folder = Path(folder)
    write(folder / "categories.txt", "a\nb\nc\n")
    write(folder / f"{split}.txt", "".join(f"{line}\n" for line in lines))
    for row, line in enumerate(lines):
        if line:
            write_frames(folder / "frames" / line.split()[0], noise(row, 3, 36, 40, 3))
    return folder


def remember(layer):
    """A list that gets (input, output) whenever the layer is called."""
    calls = []

    def append(layer, inputs, output):
        calls.append((inputs[0], output))

    layer.register_forward_hook(append)
    return calls


def scripts_with_tiny(folder):
    """Copy the scripts into a folder, with tiny.py beside them: --model tiny works there."""
    for name in ("data", "evaluate", "train", "ensemble"):
        shutil.copy(ROOT / f"{name}.py", folder)
    (folder / "tiny.py").write_text(TINY)
    return folder


# ---- drawn numbers: the golden answers were computed with these, so they must never change ------

def drawn_tensors(shapes, seed):
    """{name: shape} -> {name: tensor}, each from the seed, its name and its shape alone."""
    tensors = {}
    for name, shape in shapes.items():
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        if name.endswith("num_batches_tracked"):
            tensors[name] = torch.zeros(shape, dtype=torch.int64)
            continue

        if name.endswith("running_var"):
            value = rng.uniform(0.5, 1.5, shape)
        elif name.endswith("running_mean"):
            value = 0.1 * rng.standard_normal(shape)
        elif len(shape) >= 2:  # a layer's weights: its output is about as large as its input
            value = rng.standard_normal(shape) * np.sqrt(1 / np.prod(shape[1:]))
        elif name.endswith("bias"):
            value = 0.1 * rng.standard_normal(shape)
        else:  # the weights of a batch norm
            value = rng.uniform(0.6, 1.2, shape)
        tensors[name] = torch.from_numpy(value.astype(np.float32))
    return tensors


def fill(module):
    """Draw every tensor of a module but batch norm's counters, so that none is 0, 1 or equal to
    another by accident."""
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    module.load_state_dict(drawn_tensors(shapes, seed=0), assign=True)
    return module


def drawn_clip(shape, seed):
    """A clip (B, T, C, H, W) of waves that drift over T, about as large as a normalised one."""
    B, T, C, H, W = shape
    rng = np.random.default_rng([seed, 77])
    y, x = np.mgrid[0:H, 0:W] / max(H, W)
    clip = np.zeros(shape)
    for b in range(B):
        for c in range(C):
            for wave in range(6):
                fx, fy = rng.uniform(-6, 6, 2)
                speed = rng.uniform(-2.5, 2.5)
                phase = rng.uniform(0, 6.28)
                size = rng.uniform(0.4, 1.0)
                for t in range(T):
                    clip[b, t, c] += size * np.sin(6.28 * (fx * x + fy * y) + speed * t + phase)
    clip += 0.1 * rng.standard_normal(shape)
    return torch.from_numpy(clip.astype(np.float32))


def golden(name):
    """The case tests/golden/NAME.npz.

    .options      of our constructor
    .checkpoint   the authors' file, as read
    .tensors      its tensors by name, without the container and DDP's "module."
    .clip         what they gave to their network
    .arrays       {name: array}, of which "logits" is their answer
    """
    with np.load(ROOT / "tests" / "golden" / f"{name}.npz") as file:
        arrays = dict(file)
    meta = json.loads(str(arrays.pop("meta")))

    prefix = meta["container"]["prefix"] or ""
    checkpoint = {}
    for key, tensor in drawn_tensors(meta["shapes"], meta["seed"]).items():
        checkpoint[prefix + key] = tensor
    tensors = {key.removeprefix("module."): tensor for key, tensor in checkpoint.items()}
    container = meta["container"]["key"]
    if container:
        checkpoint = {container: checkpoint, "epoch": 1}

    return SimpleNamespace(
        options=golden_options(name),
        checkpoint=checkpoint,
        tensors=tensors,
        clip=drawn_clip(meta["input_shape"], meta["input_seed"]),
        arrays=arrays,
    )


def golden_options(name):
    """The same as golden(name).options, without drawing tensors."""
    with np.load(ROOT / "tests" / "golden" / f"{name}.npz") as file:
        ours = json.loads(str(file["meta"]))["ours"]

    # two options are called by older names in the files
    options = ours["options"]
    if "segments" in options:
        options["frames"] = options.pop("segments")
    if "depth" in options and ours["module"] != "slowfast":
        options["backbone"] = f"resnet{options.pop('depth')}"
    return options


def golden_names(module):
    """The names of all cases of one of our model files."""
    return sorted(path.stem for path in (ROOT / "tests" / "golden").glob(f"{module}_*.npz"))
