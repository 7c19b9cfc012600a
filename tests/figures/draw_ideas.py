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
GRID_HEIGHT = 480
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
    clips = torch.zeros(frames, frames, channels, 1, 1)
    for s in range(frames):
        clips[s, s] = 1
    return clips


def at_own_time(arrivals):
    """Give every frame its own column: arrivals (S, R) -> (S, T, R), zero unless s == t."""
    frames, rows = arrivals.shape
    columns = torch.zeros(frames, frames, rows)
    for s in range(frames):
        columns[s, s] = arrivals[s]
    return columns


def tsn_arrivals():
    """What arrives in TSN's features (S, T, C), and in its logits (S, C)."""
    net = tsn.TSN(16, segments=8, backbone="resnet18").eval()

    # without its weights, features and logits are the frames' own values
    net.backbone = torch.nn.Flatten()
    net.fc = torch.nn.Identity()
    clips = impulses(8, 16)
    return net.features(clips), net(clips)


def tsm_arrivals():
    """What arrives behind TSM's shift, (S, T, C)."""
    return tsm.temporal_shift(impulses(8, 16)).flatten(2)


def tin_arrivals():
    """What arrives behind TIN's module for offsets of 0.5 and 1.75 frames, (S, T, C)."""
    module = tin.TemporalInterlace(16, frames=8)
    for parameter in module.parameters():
        torch.nn.init.zeros_(parameter)

    # offset = 4 * (sigmoid(bias) - 0.5)
    offsets = torch.tensor([0.5, 1.75])
    module.offset_fc2.bias.copy_(torch.logit(offsets / 4 + 0.5))
    return module(impulses(8, 16)).flatten(2)


def trn_arrivals():
    """The frames in TRN's tuples: all four frames, the triples and the pairs, (S, T, R) each."""
    net = trn.TRN(1, segments=4, backbone="resnet18").eval()
    net.backbone = torch.nn.Flatten()
    net.frame = torch.nn.Identity()

    # the input of a small network's first layer holds, for every tuple, its frames' values
    arrivals = []

    def remember_input(module, inputs, output):
        tuples = inputs[0].amax(dim=2)  # (S, R)
        arrivals.append(at_own_time(tuples))

    for relation in net.relations:
        relation.hidden.register_forward_hook(remember_input)
    net(impulses(4, 256))
    return arrivals


def slowfast_arrivals():
    """What SlowFast's fast pathway and its slow pathway see of 16 frames, (S, T, 1) each; what the
    first lateral adds to every slow frame, (S, T, R); and the numbers of the slow frames."""
    net = slowfast.SlowFast(1, depth=14).eval()

    # what the pathways see is the input of their first layers
    seen = {}

    def remember_input(module, inputs, output):
        seen[module] = inputs[0].amax(dim=(1, 3, 4))  # (S, frames of the pathway)

    net.fast.conv1.register_forward_hook(remember_input)
    net.slow.conv1.register_forward_hook(remember_input)
    net(impulses(16, 3).expand(-1, -1, -1, 32, 32))
    fast = seen[net.fast.conv1]
    slow = seen[net.slow.conv1]
    slow_frames = slow.argmax(dim=0).tolist()

    # a lateral of ones, from 8 fast channels into a slow pathway that has no channels of its own
    lateral = net.fuse[0]
    torch.nn.init.ones_(lateral.conv.weight)
    no_channels = torch.zeros(16, 0, len(slow_frames), 1, 1)
    fast_channels = impulses(16, 8).transpose(1, 2)  # (S, C, T, 1, 1)
    added = lateral(no_channels, fast_channels).amax(dim=(1, 3, 4))  # (S, slow frames)
    added = added.clamp(max=1)

    fast = at_own_time(fast.amax(dim=1, keepdim=True))
    slow = at_own_time(slow.amax(dim=1, keepdim=True))
    return fast, slow, at_own_time(added), slow_frames


# ---- the picture --------------------------------------------------------------------------------


class Page:
    """The picture. Without words, text is left out; the test compares the rest pixel by pixel."""

    def __init__(self, words):
        self.words = words
        self.image = Image.new("RGB", (WIDTH, HEIGHT), "white")
        self.draw = ImageDraw.Draw(self.image)

    def text(self, x, y, text, size=24, colour=INK, anchor="lm"):
        if self.words:
            font = ImageFont.load_default(size=size)
            self.draw.text((x, y), text, colour, font, anchor)

    def upward_text(self, x, y, text):
        """Text that reads from bottom to top, its centre at (x, y)."""
        label = Image.new("RGB", (160, 32), "white")
        font = ImageFont.load_default(size=24)
        ImageDraw.Draw(label).text((80, 16), text, GREY, font, anchor="mm")
        if self.words:
            self.image.paste(label.rotate(90, expand=True), (x - 16, y - 80))

    def cell(self, x, y, width, height, weights):
        """One value. weights (S,): how much of it comes from each frame, drawn as the width of the
        frame's colour. Where the colour is wide enough, it holds the frame's name."""
        right = x + width - GAP
        bottom = y + height - GAP
        self.draw.rectangle((x, y, right - 1, bottom - 1), EMPTY)

        # all widths here are whole pixels: the weights are eighths and quarters
        start = x
        for frame, weight in enumerate(weights.tolist()):
            end = min(start + round(weight * (width - GAP)), right)
            if end > start:
                self.draw.rectangle((start, y, end - 1, bottom - 1), COLOURS[frame % 8])
            if end - start >= 14:
                self.text((start + end) / 2, (y + bottom) / 2, FRAMES[frame], 18, anchor="mm")
            start = end

    def grid(self, x, y, width, height, arrivals):
        """Cells of this width and height: a column for every frame, a row for every channel.
        arrivals (S, T, R)."""
        frames, columns, rows = arrivals.shape
        for column in range(columns):
            for row in range(rows):
                weights = arrivals[:, column, row]
                self.cell(x + column * width, y + row * height, width, height, weights)

    def frame_panel(self, left, title, caption, rows, time_width):
        """All of a panel but its grid: title, arrow of time, name of the rows, caption."""
        self.text(left, TITLE, title, 36)
        for number, line in enumerate(caption):
            self.text(left, CAPTION + 34 * number, line, 26)

        self.text(left, AXIS, "time", colour=GREY)
        end = left + time_width - GAP
        self.draw.line((left + 60, AXIS, end - 10, AXIS), GREY, width=2)
        self.draw.polygon([(end - 12, AXIS - 6), (end, AXIS), (end - 12, AXIS + 6)], GREY)
        if rows:
            self.upward_text(left - 22, GRID + GRID_HEIGHT // 2, rows)


def draw_tsn(page, left):
    caption = ["Each frame on its own;", "the logits are averaged."]
    page.frame_panel(left, "TSN", caption, "channels", time_width=8 * 26)
    features, logits = tsn_arrivals()
    page.grid(left, GRID, 26, 30, features)

    # one column behind the frames'
    x = left + 8 * 26 + 12
    page.text(x + 32, AXIS, "logits", colour=GREY, anchor="mm")
    page.grid(x, GRID, 68, 30, logits[:, None])


def draw_tsm(page, left):
    caption = ["1/8 of the channels move", "one frame earlier, and", "1/8 one frame later."]
    page.frame_panel(left, "TSM", caption, "channels", time_width=8 * 36)
    page.grid(left, GRID, 36, 30, tsm_arrivals())


def draw_tin(page, left):
    caption = [
        "1/4 of the channels move",
        "by distances computed",
        "from the clip, here +0.5,",
        "+1.75, -0.5, -1.75 frames.",
    ]
    page.frame_panel(left, "TIN", caption, "channels", time_width=8 * 36)
    page.grid(left, GRID, 36, 30, tin_arrivals())


def draw_trn(page, left):
    caption = [
        "Small networks see tuples",
        "of frames in their order,",
        "here of a clip of 4 frames.",
    ]
    page.frame_panel(left, "TRN", caption, "tuples", time_width=4 * 50)
    y = GRID
    for name, arrivals in zip(["all four", "triples", "pairs"], trn_arrivals()):
        height = 40 * arrivals.shape[2]
        page.grid(left, y, 50, 40, arrivals)
        page.text(left + 4 * 50 + 4, y + height // 2, name, colour=GREY)
        y += height + 20


def draw_slowfast(page, left):
    caption = [
        "Fast pathway: all frames,",
        "few channels. Slow: every",
        "4th frame, many channels,",
        "plus 5 fast frames each.",
    ]
    page.frame_panel(left, "SlowFast", caption, "", time_width=16 * 18)
    fast, slow, added, slow_frames = slowfast_arrivals()

    page.text(left, GRID + 16, "the fast pathway sees", colour=GREY)
    page.grid(left, GRID + 34, 18, 40, fast)
    page.text(left, GRID + 112, "the slow pathway sees", colour=GREY)
    page.grid(left, GRID + 130, 18, 84, slow)
    page.text(left, GRID + 252, "added to each slow frame", colour=GREY)
    page.grid(left, GRID + 270, 18, 52, added)
    for number, frame in enumerate(slow_frames):
        page.text(left - 14, GRID + 294 + 52 * number, FRAMES[frame], colour=GREY, anchor="rm")


@torch.no_grad()
def picture(words=True):
    """The picture as an RGB image; without words for the test."""
    page = Page(words)
    for number, draw_panel in enumerate([draw_tsn, draw_tsm, draw_tin, draw_trn, draw_slowfast]):
        draw_panel(page, number * PANEL + MARGIN)
    legend = "Each colour is a frame: it shows where that frame's values arrive, and in what share."
    page.text(MARGIN, LEGEND, legend + " Light grey is zero.", 26, GREY)
    return page.image


if __name__ == "__main__":
    picture().save(PICTURE, optimize=True)
    print(f"{PICTURE}: {PICTURE.stat().st_size / 1000:.0f} kB")
