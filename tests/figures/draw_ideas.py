"""Draw the five ideas in one picture, tests/figures/ideas.png of the README.

    python tests/figures/draw_ideas.py

The picture is drawn by the operators themselves. An impulse is a clip that is 1 in all channels of
one frame and 0 elsewhere. One for every frame goes through an operator, and the frame's colour is
drawn wherever its impulse arrives. So a changed operator draws another picture.

S impulses, as many as frames; T frames; C channels; R rows of a grid, such as channels.
"""
import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import slowfast
import tin
import trn
import tsm
import tsn

PICTURE = Path(__file__).with_name("ideas.png")

# Pixels. README shows the picture at about half of this width, so it stays sharp on fine screens.
WIDTH = 1840
HEIGHT = 850
PANEL = 360        # from one network to the next
MARGIN = 60        # from a panel's left end to its grid
TITLE = 44         # heights of a panel's parts
AXIS = 92
GRID = 116
CAPTION = 632
LEGEND = 814
GAP = 4            # between cells

FRAMES = "abcdefghijklmnop"  # the names of up to 16 frames
COLOURS = [                  # of frames a to h, and again of i to p
    (86, 138, 214),
    (244, 160, 72),
    (98, 184, 110),
    (222, 98, 98),
    (160, 128, 208),
    (190, 150, 110),
    (232, 146, 198),
    (206, 206, 84),
]
INK = (40, 40, 40)
GREY = (105, 105, 105)
EMPTY = (236, 236, 236)


# ---- what the operators do ----------------------------------------------------------------------

def impulses(frames, channels):
    """A batch of impulses, (S, T, C, 1, 1): clip s is 1 in frame s."""
    return torch.eye(frames)[:, :, None, None, None].repeat(1, 1, channels, 1, 1)


def at_own_time(arrivals):
    """Give every frame its own column: arrivals (S, R) -> (S, T, R), zero unless s == t."""
    return torch.eye(len(arrivals))[:, :, None] * arrivals[:, None]


def tsn_arrivals():
    """What arrives in TSN's logits, (S, C)."""
    net = tsn.TSN(16, frames=8, backbone="resnet18").eval()

    # without its weights, features and logits are the frames' own values
    net.backbone = torch.nn.Flatten()
    net.fc = torch.nn.Identity()
    return net(impulses(8, 16))


def tsm_arrivals():
    """What arrives in the channels of TSM, (S, T, C)."""
    return tsm.temporal_shift(impulses(8, 16)).flatten(2)


def tin_arrivals():
    """What arrives in the channels of TIN if the offsets are 0.5 and 1.75 frames, (S, T, C)."""
    moved, kept = impulses(8, 16).split([4, 12], dim=2)
    offsets = torch.tensor([[0.5, 1.75, -0.5, -1.75]]).expand(8, 4)
    moved = tin.temporal_interlace(moved, offsets)
    return torch.cat([moved, kept], dim=2).flatten(2)


def trn_arrivals(scale):
    """The frames in TRN's tuples of one scale, of a clip of four frames, (S, T, R)."""
    tuples = trn.Relation(4, scale, hidden=1, num_classes=1).tuples
    arrivals = torch.zeros(4, len(tuples))
    for row, frames in enumerate(tuples):
        arrivals[frames, row] = 1
    return at_own_time(arrivals)


def slowfast_arrivals():
    """What SlowFast's slow pathway sees of 16 frames, and what the first lateral adds to every slow
    frame: (S, slow frames) each."""
    net = slowfast.SlowFast(1, depth=14)
    seen = slowfast.slow_frames(impulses(16, 1), net.alpha, net.slow_index).flatten(1)

    # a lateral of ones, from 8 fast channels into a slow pathway that has no channels of its own
    lateral = net.fuse[0]
    torch.nn.init.ones_(lateral.conv.weight)
    slow = torch.zeros(16, 0, 4, 1, 1)
    fast = impulses(16, 8).transpose(1, 2)  # (S, C, T, 1, 1)
    added = lateral(slow, fast).amax(dim=(1, 3, 4))
    return seen, added.clamp(max=1)


# ---- the picture --------------------------------------------------------------------------------

def write(image, x, y, text, size=24, colour=GREY, anchor="lm"):
    font = ImageFont.load_default(size=size)
    ImageDraw.Draw(image).text((x, y), text, colour, font, anchor)


def draw_grid(image, x, y, width, height, arrivals):
    """Cells of this width and height: a column for every frame, a row for every channel.

    arrivals (S, T, R): how much of a cell comes from each frame is drawn as the width of the
    frame's colour. Where the colour is wide enough, it holds the frame's name.
    """
    draw = ImageDraw.Draw(image)
    _, columns, rows = arrivals.shape
    for column in range(columns):
        for row in range(rows):
            start = x + column * width
            top = y + row * height
            bottom = top + height - GAP - 1
            draw.rectangle((start, top, start + width - GAP - 1, bottom), EMPTY)
            for frame, weight in enumerate(arrivals[:, column, row].tolist()):
                if weight == 0:
                    continue
                end = start + round(weight * (width - GAP))  # weights are eighths and quarters
                draw.rectangle((start, top, end - 1, bottom), COLOURS[frame % 8])
                if end - start >= 14:
                    middle = (top + bottom + 1) / 2
                    write(image, (start + end) / 2, middle, FRAMES[frame], 18, INK, "mm")
                start = end


def draw_frame(image, left, title, caption, rows, time_width):
    """All of a panel but its grid: title, arrow of time, name of the rows, caption."""
    write(image, left, TITLE, title, 36, INK)
    for number, line in enumerate(caption):
        write(image, left, CAPTION + 34 * number, line, 26, INK)

    draw = ImageDraw.Draw(image)
    write(image, left, AXIS, "time")
    end = left + time_width - GAP
    draw.line((left + 60, AXIS, end - 10, AXIS), GREY, width=2)
    draw.polygon([(end - 12, AXIS - 6), (end, AXIS), (end - 12, AXIS + 6)], GREY)

    # the rows' name reads from bottom to top
    label = Image.new("RGB", (160, 32), "white")
    write(label, 80, 16, rows, anchor="mm")
    image.paste(label.rotate(90, expand=True), (left - 38, GRID + 160))


def draw_tsn(image, left):
    caption = ["Each frame on its own;", "the logits are averaged."]
    draw_frame(image, left, "TSN", caption, "channels", 8 * 26)
    draw_grid(image, left, GRID, 26, 30, impulses(8, 16).flatten(2))
    write(image, left + 252, AXIS, "logits", anchor="mm")
    draw_grid(image, left + 220, GRID, 68, 30, tsn_arrivals()[:, None])


def draw_tsm(image, left):
    caption = ["1/8 of the channels move", "one frame earlier, and", "1/8 one frame later."]
    draw_frame(image, left, "TSM", caption, "channels", 8 * 36)
    draw_grid(image, left, GRID, 36, 30, tsm_arrivals())


def draw_tin(image, left):
    caption = [
        "1/4 of the channels move",
        "by offsets computed",
        "from the clip, here +0.5,",
        "+1.75, -0.5, -1.75 frames.",
    ]
    draw_frame(image, left, "TIN", caption, "channels", 8 * 36)
    draw_grid(image, left, GRID, 36, 30, tin_arrivals())


def draw_trn(image, left):
    caption = [
        "Small networks see tuples",
        "of frames in their order,",
        "here of a clip of 4 frames.",
    ]
    draw_frame(image, left, "TRN", caption, "tuples", 4 * 50)
    y = GRID
    for scale, name in [(4, "all four"), (3, "triples"), (2, "pairs")]:
        arrivals = trn_arrivals(scale)
        height = 40 * arrivals.shape[2]
        draw_grid(image, left, y, 50, 40, arrivals)
        write(image, left + 204, y + height // 2, name)
        y += height + 20


def draw_slowfast(image, left):
    caption = [
        "Fast pathway: all frames,",
        "few channels. Slow: every",
        "4th frame, many channels,",
        "each with fast frames.",
    ]
    draw_frame(image, left, "SlowFast", caption, "", 16 * 18)
    seen, added = slowfast_arrivals()
    write(image, left, GRID + 16, "the fast pathway sees")
    draw_grid(image, left, GRID + 34, 18, 40, impulses(16, 1).flatten(2))
    write(image, left, GRID + 112, "the slow pathway sees")
    draw_grid(image, left, GRID + 130, 18, 84, at_own_time(seen.sum(dim=1, keepdim=True)))
    write(image, left, GRID + 252, "each slow frame also gets")
    draw_grid(image, left, GRID + 270, 18, 52, at_own_time(added))
    for number, frame in enumerate(seen.argmax(dim=0).tolist()):
        write(image, left - 14, GRID + 294 + 52 * number, FRAMES[frame], anchor="rm")


@torch.no_grad()
def picture():
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    for number, draw_panel in enumerate([draw_tsn, draw_tsm, draw_tin, draw_trn, draw_slowfast]):
        draw_panel(image, number * PANEL + MARGIN)
    legend = "Each letter is a frame: it shows where that frame's values arrive, and in what share."
    write(image, MARGIN, LEGEND, legend + " In light grey cells nothing arrives.", 26)
    return image


if __name__ == "__main__":
    picture().save(PICTURE, optimize=True)
