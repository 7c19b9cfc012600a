"""Draw the validation mAP of several training runs over their epochs, one line a network.

    python tests/figures/draw_curves.py runs/*/log.jsonl --ceiling 77.83 --out curves.png

A line is named after the folder of its log.jsonl. --ceiling is the best mAP that a network can
reach without looking at the order of frames; the toy's is 77.83.
"""
import argparse
import json
import math
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import data

# Pixels. README shows the picture at about half of this width, so it stays sharp on fine screens.
WIDTH = 1800
HEIGHT = 900
LEFT = 110           # the plot's sides; the labels at the ends of the lines are on its right
RIGHT = 1399
TOP = 90
BOTTOM = 800
LABEL_GAP = 60       # between the plot and the labels
LABEL_HEIGHT = 38    # smallest distance between two labels

# An opaque background: the picture looks the same on a light and on a dark page.
BACKGROUND = (255, 255, 255)
INK = (40, 40, 40)
GREY = (105, 105, 105)
GRID = (226, 226, 226)

# All dark enough to be read as text on the background.
COLOURS = [
    (31, 104, 180),
    (200, 85, 0),
    (30, 125, 50),
    (200, 35, 45),
    (120, 80, 180),
    (130, 80, 65),
    (195, 60, 150),
    (0, 125, 140),
]


def read_curve(path):
    """A log.jsonl -> (the name of its folder, [(epoch, mAP in percent), ...])."""
    points = []
    for text in path.read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        if "val_map" in line:
            points.append((line["epoch"], 100 * line["val_map"]))
    if not points:
        raise ValueError(f"{path}: no validation lines; has the first epoch ended?")
    return path.resolve().parent.name, points


def dashed_line(draw, left, right, y, colour, width, dash, gap):
    """A horizontal line of dashes with gaps between them."""
    x = left
    while x < right:
        draw.line((x, y, min(x + dash, right), y), colour, width)
        x += dash + gap


def picture(curves, ceiling=None):
    """Draw [(name, [(epoch, mAP), ...]), ...] and the ceiling (percent, or None)."""
    font = ImageFont.load_default(size=28)
    image = Image.new("RGB", (WIDTH, HEIGHT), BACKGROUND)
    draw = ImageDraw.Draw(image)
    draw.text((LEFT, 40), "mAP on validation, percent", INK, font, anchor="lm")

    # the ranges of both axes
    last_epoch = 1
    values = []
    for _, points in curves:
        last_epoch = max(last_epoch, points[-1][0])
        values += [value for _, value in points]
    if ceiling is not None:
        values.append(ceiling)
    lowest = 10 * math.floor(min(values) / 10)
    highest = max(10 * math.ceil(max(values) / 10), lowest + 10)

    def x_of(epoch):
        return LEFT + (RIGHT - LEFT) * epoch / last_epoch

    def y_of(value):
        return BOTTOM - (BOTTOM - TOP) * (value - lowest) / (highest - lowest)

    # the vertical axis
    for value in range(lowest, highest + 1, 10):
        y = y_of(value)
        draw.line((LEFT, y, RIGHT, y), GRID, width=2)
        draw.text((LEFT - 16, y), str(value), GREY, font, anchor="rm")

    # the horizontal axis
    for epoch in range(0, last_epoch + 1, math.ceil(last_epoch / 10)):
        x = x_of(epoch)
        draw.line((x, BOTTOM, x, BOTTOM + 10), GREY, width=2)
        draw.text((x, BOTTOM + 30), str(epoch), GREY, font, anchor="mm")
    draw.text(((LEFT + RIGHT) / 2, BOTTOM + 70), "epoch", GREY, font, anchor="mm")

    # the lines; what is written at their ends is kept for the labels
    ends = []  # (y, x, text, colour) of every line's end
    if ceiling is not None:
        y = y_of(ceiling)
        dashed_line(draw, LEFT, RIGHT, y, GREY, width=4, dash=22, gap=14)
        ends.append((y, RIGHT, f"bound {ceiling:g}", GREY))
    for i, (name, points) in enumerate(curves):
        colour = COLOURS[i % len(COLOURS)]
        pixels = [(x_of(epoch), y_of(value)) for epoch, value in points]
        draw.line(pixels, colour, width=6, joint="curve")
        x, y = pixels[-1]
        draw.circle((x, y), 9, colour)
        ends.append((y, x, name, colour))

    # the labels, from the top down: each leaves room for the one above it
    label_y = TOP - LABEL_HEIGHT
    for y, x, text, colour in sorted(ends):
        label_y = max(y, label_y + LABEL_HEIGHT)
        # dots lead from a line that ends early to the plot's edge, a stroke from there on
        dashed_line(draw, x, RIGHT, y, colour, width=2, dash=3, gap=12)
        draw.line((RIGHT, y, RIGHT + LABEL_GAP - 12, label_y), colour, width=2)
        draw.text((RIGHT + LABEL_GAP, label_y), text, colour, font, anchor="lm")
    return image


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", nargs="+", type=Path, metavar="log.jsonl", help="of train.py")
    parser.add_argument("--ceiling", type=float, metavar="MAP", help="a dashed line, in percent")
    parser.add_argument("--out", required=True, metavar="FILE.png", help="the picture")
    args = parser.parse_args()
    curves = [read_curve(path) for path in args.logs]
    picture(curves, args.ceiling).save(args.out, optimize=True)
    print(args.out)


if __name__ == "__main__":
    data.run_script(main)
