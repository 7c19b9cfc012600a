"""The README's picture is what the operators do: the committed file is what its script draws, and a changed operator
draws another picture, in its own panel. And the script of the README's table of speeds runs.

    python -m pytest tests/test_figures.py
"""
import importlib.util
import itertools
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

import slowfast
import tin
import trn
import tsm
import tsn
from conftest import ROOT

SCRIPT = ROOT / "tests" / "figures" / "draw_ideas.py"


@pytest.fixture(scope="module")
def ideas():
    """draw_ideas.py as a module."""
    spec = importlib.util.spec_from_file_location("draw_ideas", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def drawn(ideas):
    """The picture with its words and without, as the operators are: int arrays (H, W, 3)."""
    return pixels(ideas.picture()), pixels(ideas.picture(words=False))


def pixels(image):
    return np.asarray(image).astype(int)


def lettered(with_words, without):
    """Where letters are, and 3 pixels around them: bool (H, W)."""
    letters = Image.fromarray((with_words != without).any(axis=2))
    return np.asarray(letters.convert("L").filter(ImageFilter.MaxFilter(7))) > 0


def compare(committed, drawn):
    """(differing pixels outside of the letters, mean difference in 0..255 where letters are).

    Boxes and lines have whole coordinates, no antialiasing: they are the same on every machine. Letters come from the
    font and the FreeType inside Pillow, whose versions smooth edges differently: 10.1 and 13.0 by 0.0005 on average.
    """
    letters, difference = lettered(*drawn), abs(committed - drawn[0])
    return difference[~letters].any(axis=1).sum(), difference[letters].mean()


def test_the_committed_picture_is_what_the_script_draws(ideas, drawn):
    with Image.open(ideas.PICTURE) as image:
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", (1200, 420))
        committed = pixels(image)
    assert ideas.PICTURE.stat().st_size < 60_000
    boxes, letters = compare(committed, drawn)
    assert boxes == 0
    assert letters < 0.02
    missing = committed.copy()
    missing[342 - 6 : 342 + 6, 274:300] = 255  # the 1/8 of one caption
    assert compare(missing, drawn)[1] > 0.05


def without_a_shift(x, *_):
    return x


OTHER_OPERATORS = {
    "TSN takes the best frame": (0, tsn.TSN, "forward", lambda self, clip: self.fc(self.features(clip)).amax(dim=1)),
    "TSM does not shift": (1, tsm, "temporal_shift", without_a_shift),
    "TSM shifts the other way": (
        1, tsm, "temporal_shift", lambda x, shift=tsm.temporal_shift: shift(x.flip(1)).flip(1)),
    "TIN does not interlace": (2, tin, "temporal_interlace", without_a_shift),
    "TIN interlaces the other way": (
        2, tin, "temporal_interlace", lambda x, o, *w, move=tin.temporal_interlace: move(x, -o, *w)),
    "TRN takes neighbours only": (3, trn, "itertools", SimpleNamespace(combinations=lambda frames, k: [
        one for one in itertools.combinations(frames, k) if one[-1] - one[0] == k - 1])),
    "SlowFast picks by linspace": (
        4, slowfast, "slow_frames", lambda clip, alpha, _, pick=slowfast.slow_frames: pick(clip, alpha, "linspace")),
    "laterals say nothing": (
        4, slowfast.Lateral, "forward", lambda self, slow, fast: torch.cat([slow, 0 * self.conv(fast)], dim=1)),
}


@pytest.mark.parametrize("change", OTHER_OPERATORS)
def test_another_operator_is_another_picture(ideas, drawn, monkeypatch, change):
    panel, owner, name, operator = OTHER_OPERATORS[change]
    monkeypatch.setattr(owner, name, operator)
    different = (pixels(ideas.picture(words=False)) != drawn[1]).any(axis=(0, 2))  # (W,)
    columns = np.flatnonzero(different) // ideas.PANEL
    assert set(columns) == {panel}
    assert len(columns) >= 20


def test_the_benchmark_runs(tmp_path):
    command = [sys.executable, ROOT / "tests" / "benchmark.py", "--quick", "--only", "map"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "| map | " in run.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_benchmark_refuses_an_unknown_row(tmp_path):
    command = [sys.executable, ROOT / "tests" / "benchmark.py", "--only", "nothing"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 2
    assert "nothing" in run.stderr.splitlines()[-1]
