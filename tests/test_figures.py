"""README's pictures and figures: pictures are what their scripts draw, the benchmark's rows run.

    python -m pytest tests/test_figures.py
"""
import concurrent.futures
import json
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import slowfast
import tin
import trn
import tsm
import tsn
from conftest import ROOT, call, python

sys.path.insert(0, str(ROOT / "tests" / "figures"))
import draw_curves
import draw_ideas


def pixels(image):
    return np.asarray(image.convert("RGB")).astype(int)  # (H, W, 3)


# ---- the five ideas --------------------------------------------------------------------------

@pytest.fixture(scope="module")
def ideas():
    return pixels(draw_ideas.picture())


def test_the_committed_picture_is_what_the_script_draws(ideas):
    """Versions of Pillow smooth the edges of letters differently, which makes a mean difference of
    0.003 (of 255). One cell without its colour makes 0.05."""
    committed = pixels(Image.open(draw_ideas.PICTURE))
    assert abs(committed - ideas).mean() < 0.01


def unchanged(x, *others):
    return x


def first_frame(self, clip):
    return self.features(clip)[:, 0]


def first_and_last_frames(frames, scale):
    return [tuple(frames)[:scale], tuple(frames)[-scale:]]


@pytest.mark.parametrize("panel, owner, name, operator", [
    (0, tsn.TSN, "forward", first_frame),
    (1, tsm, "temporal_shift", unchanged),
    (2, tin, "temporal_interlace", unchanged),
    (3, trn, "itertools", SimpleNamespace(combinations=first_and_last_frames)),
    (4, slowfast, "slow_frames", unchanged),
])
def test_a_changed_operator_changes_its_panel_alone(
    ideas, monkeypatch, panel, owner, name, operator
):
    monkeypatch.setattr(owner, name, operator)
    changed = (pixels(draw_ideas.picture()) != ideas).any(axis=(0, 2))  # (W,)
    assert set(np.flatnonzero(changed) // draw_ideas.PANEL) == {panel}


# ---- the curves ------------------------------------------------------------------------------

def write_log(folder, value):
    """The log of a run with the same mAP in each of three epochs."""
    folder.mkdir()
    lines = [json.dumps({"epoch": 1, "step": 20, "loss": 3.1})]
    for epoch in [1, 2, 3]:
        lines.append(json.dumps({"epoch": epoch, "step": 75 * epoch, "val_map": value}))
    (folder / "log.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "log.jsonl"


def test_curves_have_the_heights_of_their_maps(tmp_path):
    logs = [write_log(tmp_path / "tsn", 0.4), write_log(tmp_path / "trn", 0.8),
            write_log(tmp_path / "tin", 0.8)]
    out = tmp_path / "curves.png"
    assert call("draw_curves", *logs, "--ceiling", 60, "--out", out) == 0
    tsn_colour, trn_colour, tin_colour = draw_curves.COLOURS[:3]

    # the axis goes from 40 to 80; this column crosses all lines
    top = draw_curves.TOP
    bottom = draw_curves.BOTTOM
    column = pixels(Image.open(out))[:, draw_curves.LEFT + 36 * 25 + 5]
    for colour, height in [
        (tsn_colour, bottom),
        (draw_curves.GREY, (top + bottom) / 2),
        (tin_colour, top),
    ]:
        rows = np.flatnonzero((column == colour).all(axis=1))
        assert abs(rows.mean() - height) <= 1

    # the labels of two equal curves stand one below the other
    labels = pixels(Image.open(out))[:, draw_curves.RIGHT + draw_curves.LABEL_GAP :]
    tin_rows = np.flatnonzero((labels == tin_colour).all(axis=2).any(axis=1))
    trn_rows = np.flatnonzero((labels == trn_colour).all(axis=2).any(axis=1))
    assert tin_rows.max() < trn_rows.min()

    # one run without a ceiling
    assert call("draw_curves", logs[0], "--out", out) == 0


@pytest.mark.parametrize("text, message", [
    (None, "log.jsonl"),
    ('{"epoch": 1, "step": 20, "loss": 3.1}\n', "no validation lines"),
    ("epoch 1\n", "line 1"),
])
def test_bad_input_is_one_line(tmp_path, capsys, text, message):
    log = tmp_path / "log.jsonl"
    if text is not None:
        log.write_text(text)
    out = tmp_path / "curves.png"
    assert call("draw_curves", log, "--out", out) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists()


# ---- the benchmark ---------------------------------------------------------------------------

@pytest.fixture(scope="module")
def benchmarks(tmp_path_factory):
    """What both halves of the benchmark print at tiny sizes. They run at the same time."""
    folder = tmp_path_factory.mktemp("benchmarks")

    def run(*flags):
        return python(ROOT / "tests" / "benchmark.py", "--tiny", *flags, cwd=folder)

    with concurrent.futures.ThreadPoolExecutor() as pool:
        cpu = pool.submit(run)
        gpu = pool.submit(run, "--gpu", "--device", "cpu")
    return cpu.result(), gpu.result()


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs ffmpeg")
def test_every_row_of_the_benchmark_runs(benchmarks):
    run, _ = benchmarks
    assert run.returncode == 0, run.stderr
    for row in "clip shift interlace tsn tsm tin slowfast map extract views".split():
        assert f"\n| {row} | " in run.stdout


def test_every_row_of_the_gpu_runs_on_a_cpu(benchmarks):
    """All but NCCL, which needs a GPU: its row says so, and the next rows follow."""
    _, run = benchmarks
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("failed") == 1
    assert "| nccl, 1 process | failed: " in run.stdout
    assert "| tsn | bf16 | True | True | 2 x 8 x 32 x 32 | " in run.stdout  # the last row
