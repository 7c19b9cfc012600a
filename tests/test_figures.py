"""README's pictures are what their scripts draw, and every row of the benchmark runs.

    python -m pytest tests/test_figures.py
"""
import json

import numpy as np
from PIL import Image

import draw_curves
import draw_ideas
from conftest import call, needs_ffmpeg, write


def pixels(image):
    return np.asarray(image.convert("RGB")).astype(int)  # (H, W, 3)


def test_the_committed_picture_is_what_the_script_draws():
    """Versions of Pillow smooth the edges of letters differently, which makes a mean difference of
    0.003 (of 255). One cell without its colour makes 0.05."""
    committed = pixels(Image.open(draw_ideas.PICTURE))
    assert abs(committed - pixels(draw_ideas.picture())).mean() < 0.01


def test_curves_have_the_heights_of_their_maps(tmp_path):
    """The axis goes from 40 to 80, the ceiling is in the middle."""
    logs = []
    for name, value in [("tsn", 0.4), ("tin", 0.8)]:
        lines = [{"epoch": 1, "step": 20, "loss": 3.1}]
        lines += [{"epoch": epoch, "step": 75 * epoch, "val_map": value} for epoch in (1, 2, 3)]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        logs.append(write(tmp_path / name / "log.jsonl", text))
    out = tmp_path / "curves.png"
    assert call("draw_curves", *logs, "--ceiling", 60, "--out", out) == 0

    column = pixels(Image.open(out))[:, draw_curves.LEFT + 36 * 25 + 5]  # it crosses all lines
    middle = (draw_curves.TOP + draw_curves.BOTTOM) / 2
    tsn_colour, tin_colour = draw_curves.COLOURS[:2]
    for colour, height in [(tsn_colour, draw_curves.BOTTOM), (draw_curves.GREY, middle),
                           (tin_colour, draw_curves.TOP)]:
        rows = np.flatnonzero((column == colour).all(axis=1))
        assert abs(rows.mean() - height) <= 1


def test_a_log_without_validation_is_refused_in_one_line(tmp_path, capsys):
    log = write(tmp_path / "log.jsonl", '{"epoch": 1, "step": 20, "loss": 3.1}\n')
    assert call("draw_curves", log, "--out", tmp_path / "curves.png") == 2
    assert "no validation lines" in capsys.readouterr().err


@needs_ffmpeg
def test_every_row_of_the_benchmark_runs(capsys):
    assert call("benchmark", "--tiny") == 0
    assert call("benchmark", "--tiny", "--gpu") == 0
    printed = capsys.readouterr().out
    for row in "clip shift interlace tsn tsm tin slowfast map extract views".split():
        assert f"\n| {row} | " in printed
    assert "| slowfast | off | False | False | 2 x 24 x 32 x 32 | " in printed
