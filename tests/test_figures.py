"""README's pictures are what their scripts draw, and every row of the benchmark runs.

    python -m pytest tests/test_figures.py
"""
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
    log = """\
{"epoch": 1, "val_map": MAP}
{"epoch": 2, "loss": 3.1}
{"epoch": 3, "val_map": MAP}
"""
    for name, value in [("tsn", "0.4"), ("tin", "0.8")]:
        logs.append(write(tmp_path / name / "log.jsonl", log.replace("MAP", value)))
    out = tmp_path / "curves.png"
    assert call("draw_curves", *logs, "--ceiling", 60, "--out", out) == 0

    top, bottom = draw_curves.TOP, draw_curves.BOTTOM
    column = pixels(Image.open(out))[:, 1015]  # it crosses all lines
    tsn_colour, tin_colour = draw_curves.COLOURS[:2]
    for colour, height in [(tsn_colour, bottom), (draw_curves.GREY, (top + bottom) / 2),
                           (tin_colour, top)]:
        rows = np.flatnonzero((column == colour).all(axis=1))
        assert abs(rows.mean() - height) <= 1


def test_a_log_without_validation_is_refused_in_one_line(tmp_path, capsys):
    log = write(tmp_path / "log.jsonl", '{"epoch": 1, "loss": 3.1}\n')
    assert call("draw_curves", log, "--out", tmp_path / "curves.png") == 2
    assert "no validation lines" in capsys.readouterr().err


@needs_ffmpeg
def test_every_row_of_the_benchmark_runs(capsys):
    assert call("benchmark", "--tiny") == 0
    assert call("benchmark", "--tiny", "--gpu") == 0
    printed = capsys.readouterr().out
    for row in "clip shift interlace tsn tsm tin slowfast map extract views".split():
        assert f"\n| {row} | " in printed
    assert "| slowfast | off | False | False | (2, 24, 32, 32) | " in printed
