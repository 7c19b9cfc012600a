"""What several test files need: the scripts on the path, one thread, and the golden figures of the original authors.

tests/golden/*.npz hold what the authors' own code answered, but no weights: every tensor of their checkpoint is redrawn
from (seed, its name, its shape), so that a file in their own layout can be made on any machine.
"""
import json
import os
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = str(ROOT)  # for the scripts that tests start
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


def pytest_configure(config):
    config.addinivalue_line("markers", "torture: many kills of a training run; TORTURE=1 runs them")


def drawn_tensors(shapes, seed):
    """{name: shape} -> {name: tensor}, each depending only on the seed, its own name and its shape."""
    tensors = {}
    for name, shape in shapes.items():
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        if name.endswith("num_batches_tracked"):
            value = np.zeros(shape, np.int64)
        elif name.endswith("running_var"):
            value = rng.uniform(0.5, 1.5, shape)
        elif name.endswith("running_mean"):
            value = 0.1 * rng.standard_normal(shape)
        elif len(shape) >= 2:
            value = rng.standard_normal(shape) * np.sqrt(1 / np.prod(shape[1:]))
        elif name.endswith("bias"):
            value = 0.1 * rng.standard_normal(shape)
        else:
            value = rng.uniform(0.6, 1.2, shape)
        tensors[name] = torch.from_numpy(value if value.dtype == np.int64 else value.astype(np.float32))
    return tensors


def drawn_clip(shape, seed):
    """A clip (B, T, 3, H, W) of drifting waves, normalised, that really moves over T."""
    B, T, C, H, W = shape
    rng = np.random.default_rng([seed, 77])
    y, x = np.mgrid[0:H, 0:W] / max(H, W)
    clip = np.zeros(shape)
    for b in range(B):
        for c in range(C):
            for _ in range(6):
                fx, fy = rng.uniform(-6, 6, 2)
                speed, phase, size = rng.uniform(-2.5, 2.5), rng.uniform(0, 6.28), rng.uniform(0.4, 1.0)
                for t in range(T):
                    clip[b, t, c] += size * np.sin(6.28 * (fx * x + fy * y) + speed * t + phase)
    return torch.from_numpy((clip + 0.1 * rng.standard_normal(shape)).astype(np.float32))


def golden(name):
    """The case tests/golden/NAME.npz: .module, .options (of our constructor), .checkpoint (the authors' file, as read),
    .clip, and .arrays, of which "logits" is their answer."""
    with np.load(ROOT / "tests" / "golden" / f"{name}.npz") as file:
        arrays = dict(file)
    meta = json.loads(str(arrays.pop("meta")))
    tensors = drawn_tensors(meta["shapes"], meta["seed"])
    prefix, key = meta["container"].get("prefix") or "", meta["container"].get("key")
    tensors = {prefix + name: tensor for name, tensor in tensors.items()}
    return SimpleNamespace(
        module=meta["ours"]["module"], options=meta["ours"]["options"], arrays=arrays,
        checkpoint={key: tensors, "epoch": 1} if key else tensors,
        clip=drawn_clip(meta["input_shape"], meta["input_seed"]))


def golden_names(module):
    """The names of all cases of one of our model files."""
    return sorted(path.stem for path in (ROOT / "tests" / "golden").glob(f"{module}_*.npz"))


@pytest.fixture
def root():
    """The folder of the scripts."""
    return ROOT
