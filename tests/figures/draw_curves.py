"""Draw the validation mAP of several training runs over their epochs, one line a network.

    python tests/figures/draw_curves.py runs/*/log.jsonl --ceiling 77.83 --out curves.png

A line is named after the folder of its log.jsonl. --ceiling is the order-blind ceiling, which
train.py prints for the toy. Bad input is reported in one line, and the exit status is then 2.
"""
import argparse
import json
import math
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

# Pixels. README shows the picture at about half of this width, so it stays sharp on fine screens.
WIDTH = 1800
HEIGHT = 900
LEFT = 110           # room for the numbers of the vertical axis
TOP = 90             # room for the title
BOTTOM = 100         # room for the numbers of the horizontal axis
LINE = 6
THIN = 2
TEXT = 28
LABEL_HEIGHT = 38    # smallest distance between the labels at the ends of two lines
LABEL_GAP = 60       # between the end of a line and its label

TICKS = 10           # largest number of steps on an axis

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
    """Read the validation lines of a log.jsonl: [(epoch, mAP in percent), ...].

    Raises OSError for a file that cannot be read, ValueError for one without validation lines or
    with a line that is not of a log.
    """
    points = []
    text = Path(path).read_text(encoding="utf-8", errors="replace")
    for number, row in enumerate(text.splitlines(), start=1):
        try:
            line = json.loads(row)
            if "val_map" in line:
                points.append((float(line["epoch"]), 100 * float(line["val_map"])))
        except (ValueError, TypeError, KeyError):
            raise ValueError(f"{path}, line {number}: not a line of train.py's log") from None

    if not points:
        raise ValueError(f"{path}: no validation lines; has the first epoch ended?")
    return points


def read_ceiling(text):
    """--ceiling as a number; raises ValueError unless it is a percentage."""
    try:
        ceiling = float(text)
    except ValueError:
        raise ValueError(f"--ceiling {text}: not a number") from None
    if not 0 <= ceiling <= 100:
        raise ValueError(f"--ceiling {text}: a percentage lies between 0 and 100")
    return ceiling


def tick_step(span, smallest):
    """The distance between ticks: 1, 2 or 5 times a power of ten, at most TICKS of them in span."""
    power = 10.0 ** math.floor(math.log10(span / TICKS))
    for factor in (1, 2, 5, 10):
        step = factor * power
        if step * TICKS >= span:
            break
    return max(step, smallest)


def spread_out(wanted, top, bottom):
    """Heights of labels near the wanted ones, LABEL_HEIGHT apart and between top and bottom.

    The wanted heights are in ascending order, and so are the returned ones.
    """
    heights = list(wanted)

    # from the top down: each label leaves room for the one above it
    limit = top
    for i in range(len(heights)):
        heights[i] = max(heights[i], limit)
        limit = heights[i] + LABEL_HEIGHT

    # from the bottom up: what was pushed out of the picture comes back
    limit = bottom
    for i in reversed(range(len(heights))):
        heights[i] = min(heights[i], limit)
        limit = heights[i] - LABEL_HEIGHT
    return heights


def dashed_line(draw, left, right, y, colour, width, dash, gap):
    """A horizontal line of dashes with gaps between them."""
    x = left
    while x < right:
        draw.line((x, y, min(x + dash, right), y), colour, width)
        x += dash + gap


def picture(curves, ceiling=None):
    """Draw {name: [(epoch, mAP), ...]} and the ceiling (percent, or None) as an RGB image."""
    font = ImageFont.load_default(size=TEXT)

    # the ranges of both axes
    last_epoch = 1
    values = []
    names = list(curves)
    for points in curves.values():
        last_epoch = max(last_epoch, points[-1][0])
        for _, value in points:
            values.append(value)
    if ceiling is not None:
        values.append(ceiling)
        ceiling_name = f"order-blind ceiling {ceiling:g}"
        names.append(ceiling_name)
    epoch_step = tick_step(last_epoch, smallest=1)
    value_step = tick_step(max(max(values) - min(values), 5), smallest=0.5)
    lowest = value_step * math.floor(min(values) / value_step)
    highest = value_step * math.ceil(max(values) / value_step)
    if highest == lowest:
        highest = lowest + value_step

    # the plot's sides, in pixels; the longest label decides how much room is left on the right
    longest = max(font.getlength(name) for name in names)
    height = max(HEIGHT, TOP + BOTTOM + LABEL_HEIGHT * len(names))
    right = WIDTH - LABEL_GAP - math.ceil(longest) - 30
    bottom = height - BOTTOM

    def x_of(epoch):
        return LEFT + (right - LEFT) * epoch / last_epoch

    def y_of(value):
        return bottom - (bottom - TOP) * (value - lowest) / (highest - lowest)

    image = Image.new("RGB", (WIDTH, height), BACKGROUND)
    draw = ImageDraw.Draw(image)
    draw.text((LEFT, 40), "mAP on validation, percent", INK, font, anchor="lm")

    # the vertical axis
    for i in range(round((highest - lowest) / value_step) + 1):
        value = lowest + i * value_step
        y = y_of(value)
        draw.line((LEFT, y, right, y), GRID, THIN)
        draw.text((LEFT - 16, y), f"{value:.4g}", GREY, font, anchor="rm")

    # the horizontal axis
    epoch = 0
    while epoch <= last_epoch:
        x = x_of(epoch)
        draw.line((x, bottom, x, bottom + 10), GREY, THIN)
        draw.text((x, bottom + 30), f"{epoch:.0f}", GREY, font, anchor="mm")
        epoch += epoch_step
    draw.text(((LEFT + right) / 2, bottom + 70), "epoch", GREY, font, anchor="mm")

    # the lines; what is written at their ends is kept for the labels
    ends = []  # (y, x, text, colour) of every line's end
    if ceiling is not None:
        y = y_of(ceiling)
        dashed_line(draw, LEFT, right, y, GREY, width=4, dash=22, gap=14)
        ends.append((y, right, ceiling_name, GREY))
    for i, (name, points) in enumerate(curves.items()):
        colour = COLOURS[i % len(COLOURS)]
        pixels = [(x_of(epoch), y_of(value)) for epoch, value in points]
        draw.line(pixels, colour, width=LINE, joint="curve")
        x, y = pixels[-1]
        draw.circle((x, y), 9, colour)
        ends.append((y, x, name, colour))

    # the labels; dots lead from a line that ends early to the plot's edge, a stroke from there on
    ends.sort()
    heights = spread_out([end[0] for end in ends], TOP, bottom)
    for (y, x, text, colour), label_y in zip(ends, heights):
        dashed_line(draw, x, right, y, colour, THIN, dash=3, gap=12)
        draw.line((right, y, right + LABEL_GAP - 12, label_y), colour, THIN)
        draw.text((right + LABEL_GAP, label_y), text, colour, font, anchor="lm")
    return image


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("logs", nargs="+", metavar="log.jsonl", help="written by train.py")
    parser.add_argument("--ceiling", metavar="MAP", help="draw a dashed line at this percentage")
    parser.add_argument("--out", required=True, metavar="FILE.png", help="the picture")
    args = parser.parse_args()

    try:
        ceiling = None
        if args.ceiling is not None:
            ceiling = read_ceiling(args.ceiling)
        curves = {}
        for path in args.logs:
            name = Path(path).resolve().parent.name
            if name in curves:
                raise ValueError(f"{path}: a second log in a folder named {name}")
            curves[name] = read_curve(path)
        picture(curves, ceiling).save(args.out, optimize=True)
    except (OSError, ValueError) as error:
        print(f"draw_curves.py: {error}", file=sys.stderr)
        return 2
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
