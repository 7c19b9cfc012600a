"""What several test files need: the scripts on the path, one thread, a second process for half of the tests, and the
golden figures of the original authors.

tests/golden/*.npz hold what the authors' own code answered, but no weights: every tensor of their checkpoint is redrawn
from (seed, its name, its shape), so that a file in their own layout can be made on any machine.
"""
import json
import os
import subprocess
import sys
import tempfile
import time
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


BESIDE = {"test_train.py", "test_repo.py", "test_figures.py"}  # half of the time, and most of it is waiting for scripts
REPORTS = os.environ.pop("TESTS_BESIDE", None)  # in the second process: the file for its reports, each a line of JSON


def pytest_configure(config):
    config.addinivalue_line("markers", "torture: many kills of a training run; TORTURE=1 runs them")


@pytest.hookimpl(trylast=True)  # after -k has chosen
def pytest_collection_modifyitems(config, items):
    """Where tests of both kinds are asked for, a second pytest with the same arguments runs those of BESIDE. This one
    takes them last, and says what the second found."""
    beside = [item for item in items if item.path.name in BESIDE]
    if REPORTS:
        items[:], config.reports = beside, open(REPORTS, "w")
    elif 0 < len(beside) < len(items) and not config.option.collectonly and not config.option.usepdb:
        items.sort(key=lambda item: item.path.name in BESIDE)
        folder = tempfile.TemporaryDirectory()
        reports, output = (Path(folder.name, name) for name in ("reports", "output"))
        reports.touch()
        command = [sys.executable, "-m", "pytest", *config.invocation_params.args, "-o", f"cache_dir={folder.name}/cache"]
        process = subprocess.Popen(command, env={**os.environ, "TESTS_BESIDE": reports}, stderr=subprocess.STDOUT,
                                   stdout=open(output, "w"), cwd=config.invocation_params.dir)
        config.beside = SimpleNamespace(process=process, reports=open(reports), output=output)
        for last in (folder.cleanup, process.wait, process.terminate):  # called in reverse
            config.add_cleanup(last)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(item):
    """The second process hands its reports over."""
    report = yield
    if REPORTS:
        line = item.config.hook.pytest_report_to_serializable(config=item.config, report=report)
        print(json.dumps(line), file=item.config.reports, flush=True)
    return report


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item):
    """A test that the second process runs: wait for its reports, and log them as this one's."""
    beside = getattr(item.config, "beside", None)
    if beside is None or item.path.name not in BESIDE:
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    report, line = None, ""
    while report is None or report.when != "teardown":
        ended, line = beside.process.poll() is not None, line + beside.reports.readline()
        if line.endswith("\n"):
            report, line = item.config.hook.pytest_report_from_serializable(config=item.config, data=json.loads(line)), ""
            assert report.nodeid == item.nodeid, "the two processes have other tests: choose them one file at a time"
            item.ihook.pytest_runtest_logreport(report=report)
        elif ended:
            raise RuntimeError(f"the process beside ended before {item.nodeid}:\n{beside.output.read_text()[-3000:]}")
        else:
            time.sleep(0.05)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


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
