"""README's pictures: ideas.png is what the operators do, and draw_curves.py draws what logs say.

    python -m pytest tests/test_figures.py
"""
import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageFilter

import slowfast
import tin
import trn
import tsm
import tsn
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tests" / "figures"))
import draw_curves
import draw_ideas


def pixels(image):
    return np.asarray(image.convert("RGB")).astype(int)  # (H, W, 3)


@pytest.fixture(scope="module")
def wordless():
    """The picture of the five ideas without its text."""
    return pixels(draw_ideas.picture(words=False))


def test_the_committed_picture_is_what_the_script_draws(wordless):
    committed = pixels(Image.open(draw_ideas.PICTURE))
    drawn = pixels(draw_ideas.picture())
    difference = abs(committed - drawn)

    # Boxes and lines are the same everywhere. Versions of Pillow smooth the edges of letters
    # differently, so within 3 pixels of the letters a small mean difference (of 255) is allowed.
    letters = Image.fromarray((drawn != wordless).any(axis=2)).convert("L")
    near_letters = np.asarray(letters.filter(ImageFilter.MaxFilter(7))) > 0
    assert difference[~near_letters].max() == 0
    assert difference[near_letters].mean() < 0.02


def best_frame(self, clip):
    return self.fc(self.features(clip)).amax(dim=1)


def shift_the_other_way(x, shift=tsm.temporal_shift):
    return shift(x.flip(1)).flip(1)


def no_interlacing(x, offsets, weights=None):
    return x


def first_and_last_frames(frames, scale):
    return [tuple(frames)[:scale], tuple(frames)[-scale:]]


def slow_frames_by_linspace(clip, alpha, slow_index, pick=slowfast.slow_frames):
    return pick(clip, alpha, "linspace")


@pytest.mark.parametrize("panel, owner, name, operator", [
    (0, tsn.TSN, "forward", best_frame),
    (1, tsm, "temporal_shift", shift_the_other_way),
    (2, tin, "temporal_interlace", no_interlacing),
    (3, trn, "itertools", SimpleNamespace(combinations=first_and_last_frames)),
    (4, slowfast, "slow_frames", slow_frames_by_linspace),
])
def test_a_changed_operator_changes_its_panel_alone(
    wordless, monkeypatch, panel, owner, name, operator
):
    monkeypatch.setattr(owner, name, operator)
    changed = (pixels(draw_ideas.picture(words=False)) != wordless).any(axis=(0, 2))  # (W,)
    assert set(np.flatnonzero(changed) // draw_ideas.PANEL) == {panel}


def write_log(path, maps):
    path.parent.mkdir(exist_ok=True)
    lines = [json.dumps({"epoch": 1, "step": 20, "loss": 3.1})]
    for epoch, value in enumerate(maps, start=1):
        lines.append(json.dumps({"epoch": epoch, "step": 75 * epoch, "val_map": value}))
    path.write_text("\n".join(lines) + "\n")
    return path


def draw(monkeypatch, *arguments):
    """Run draw_curves.py; returns its exit status."""
    monkeypatch.setattr(sys, "argv", ["draw_curves.py", *map(str, arguments)])
    return draw_curves.main()


def test_curves_have_the_heights_of_their_maps(tmp_path, monkeypatch):
    low = write_log(tmp_path / "tsn" / "log.jsonl", [0.4, 0.4, 0.4])
    high = write_log(tmp_path / "tin" / "log.jsonl", [0.8, 0.8, 0.8])
    out = tmp_path / "curves.png"
    assert draw(monkeypatch, low, high, "--ceiling", "60", "--out", out) == 0

    # the axis goes from 40 to 80; this column crosses all lines
    column = pixels(Image.open(out))[:, draw_curves.LEFT + 36 * 25 + 5]
    top = draw_curves.TOP
    bottom = draw_curves.HEIGHT - draw_curves.BOTTOM
    for colour, height in [
        (draw_curves.COLOURS[0], bottom),
        (draw_curves.COLOURS[1], top),
        (draw_curves.GREY, (top + bottom) / 2),
    ]:
        rows = np.flatnonzero((column == colour).all(axis=1))
        assert abs(rows.mean() - height) <= 1


def test_labels_of_equal_curves_do_not_overlap():
    heights = draw_curves.spread_out([90, 90, 795, 800, 800], top=90, bottom=800)
    assert (heights[0], heights[-1]) == (90, 800)
    assert (np.diff(heights) >= draw_curves.LABEL_HEIGHT).all()


def test_the_ceiling_may_be_absent(tmp_path, monkeypatch):
    log = write_log(tmp_path / "slowfast" / "log.jsonl", [0.581])
    assert draw(monkeypatch, log, "--out", tmp_path / "curves.png") == 0


@pytest.mark.parametrize("text, ceiling, message", [
    (None, "60", "log.jsonl"),
    ('{"epoch": 1, "step": 20, "loss": 3.1}\n', "60", "no validation lines"),
    ("epoch 1\n", "60", "line 1"),
    ('{"epoch": 1, "step": 75, "val_map": 0.5}\n', "high", "--ceiling high: not a number"),
    ('{"epoch": 1, "step": 75, "val_map": 0.5}\n', "nan", "--ceiling nan"),
])
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, text, ceiling, message):
    log = tmp_path / "log.jsonl"
    if text is not None:
        log.write_text(text)
    out = tmp_path / "curves.png"
    assert draw(monkeypatch, log, "--ceiling", ceiling, "--out", out) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_the_benchmark_runs(tmp_path):
    script = ROOT / "tests" / "benchmark.py"
    command = [sys.executable, script, "--quick", "--only", "map"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "| map | " in run.stdout
