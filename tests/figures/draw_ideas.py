"""The five ideas in one picture, drawn by the operators themselves: tests/figures/ideas.png of the README.

    python tests/figures/draw_ideas.py

For every frame an impulse, 1 in all channels of that frame and 0 elsewhere, goes through the operator. Where it
arrives, there the frame's colour is drawn, as wide as its weight: another operator is another picture.
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
PANEL, WIDTH, HEIGHT = 240, 1200, 420  # pixels: of one panel's width, of the picture
LEFT, TOP, BOTTOM = 34, 66, 322  # of a panel's grid, in the panel; the grids are up to 200 wide
LETTERS = "abcdefghijklmnop"  # of frames
INK, GREY, PALE = (40, 40, 40), (120, 120, 120), (236, 236, 236)
COLOURS = [(86, 138, 214), (244, 160, 72), (98, 184, 110), (222, 98, 98), (160, 128, 208), (190, 150, 110),
           (232, 146, 198), (206, 206, 84)]  # of frames a to h, and again from i on


def impulses(frames, channels):
    """x (frames, frames, channels, 1, 1), a batch of impulses: item s is 1 in frame s."""
    return torch.eye(frames)[:, :, None, None, None].repeat(1, 1, channels, 1, 1)


def tsn_arrivals():
    """TSN without its weights: what its features are made of (s, t, channel), and what its logits are (s, class)."""
    net = tsn.TSN(16, segments=8, backbone="resnet18").eval()
    net.backbone, net.fc = torch.nn.Flatten(), torch.nn.Identity()
    return net.features(impulses(8, 16)), net(impulses(8, 16))


def tsm_arrivals():
    """(s, t, channel)"""
    return tsm.temporal_shift(impulses(8, 16)).flatten(2)


def tin_arrivals(offsets=(0.5, 1.75)):
    """(s, t, channel) of TIN's module, all of whose parameters are 0 but those that say the offsets."""
    module = tin.TemporalInterlace(16, frames=8)
    for parameter in module.parameters():
        torch.nn.init.zeros_(parameter)
    module.offset_fc2.bias.copy_(torch.logit(torch.tensor(offsets) / 4 + 0.5))
    return module(impulses(8, 16)).flatten(2)


def trn_arrivals(scale):
    """(s, t, tuple): whether the small network of this scale sees frame s = t in its n-th tuple. Of 4 frames."""
    seen, relation = [], trn.Relation(4, scale, hidden=1, num_classes=1).eval()
    relation.hidden.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    relation(torch.eye(4)[:, :, None].repeat(1, 1, 256))
    return in_place(seen[0].amax(dim=2))


def slowfast_arrivals():
    """(s, t, row) of 16 frames: what the fast pathway sees, what the slow one does, and what each slow frame is told by
    the first lateral; then the frames that the slow pathway picked."""
    seen, net = {}, slowfast.SlowFast(1, depth=14).eval()
    for name in ("fast", "slow"):
        conv = getattr(net, name).conv1
        conv.register_forward_hook(lambda module, inputs, output, name=name: seen.update({name: inputs[0]}))
    net(impulses(16, 3).expand(-1, -1, -1, 32, 32))
    fast, slow = (seen[name].amax(dim=(1, 3, 4)) for name in ("fast", "slow"))  # (s, frame of the pathway)
    torch.nn.init.ones_(net.fuse[0].conv.weight)
    told = net.fuse[0](torch.zeros(16, 0, 4, 1, 1), impulses(16, 8).transpose(1, 2)).amax(dim=(1, 3, 4))
    rows = fast.amax(dim=1, keepdim=True), slow.amax(dim=1, keepdim=True), told.clamp(max=1)
    return [in_place(x) for x in rows] + [slow.argmax(dim=0).tolist()]


def in_place(arrivals):
    """(s, row), which frames a row has, at their own places in time: (s, t, row)."""
    return torch.diag_embed(arrivals.T).permute(1, 2, 0)


class Panel:
    """One fifth of the picture: title, caption, grids of cells with frames' colours. Coordinates are the panel's."""

    def __init__(self, image, number, words):
        self.image, self.draw, self.left, self.words = image, ImageDraw.Draw(image), number * PANEL, words

    def write(self, x, y, text, size=12, fill=INK, anchor="lm"):
        if self.words:
            self.draw.text((self.left + x, y), text, fill, ImageFont.load_default(size=size), anchor)

    def cell(self, x, y, width, height, weights):
        """The box of one value: from left to right each frame's colour as wide as its weight, its letter where it fits.
        The widths are chosen so that weights drawn here, eighths and quarters, are whole pixels: nothing to round."""
        x += self.left
        self.draw.rectangle((x, y, x + width - 2, y + height - 2), PALE)
        start = 0.0
        for frame, weight in enumerate(weights.tolist()):
            left, right = (round(x + (width - 1) * min(1.0, end)) for end in (start, start + weight))
            start += weight
            if right > left:
                self.draw.rectangle((left, y, right - 1, y + height - 2), COLOURS[frame % 8])
            if right - left >= 9:
                self.write((left + right) / 2 - self.left, y + height / 2 - 1, LETTERS[frame], 10, anchor="mm")

    def grid(self, arrivals, top=TOP, width=25, height=16, left=LEFT):
        """arrivals (s, t, row): a column for every t, a row for every channel."""
        for t in range(arrivals.shape[1]):
            for row in range(arrivals.shape[2]):
                self.cell(left + width * t, top + height * row, width, height, arrivals[:, t, row])

    def axes(self, down, across=194):
        """"time" and an arrow to the right; what the rows are, turned by a quarter, beside them."""
        self.write(LEFT, 54, "time", fill=GREY)
        x = self.left + LEFT + across
        self.draw.line((self.left + LEFT + 30, 54, x, 54), GREY)
        self.draw.polygon([(x, 51), (x + 6, 54), (x, 57)], GREY)
        if self.words and down:
            label = Image.new("RGB", (80, 16), "white")
            ImageDraw.Draw(label).text((40, 8), down, GREY, ImageFont.load_default(size=12), "mm")
            self.image.paste(label.rotate(90, expand=True), (self.left + 12, (TOP + BOTTOM) // 2 - 40))

    def caption(self, title, text):
        self.write(LEFT, 30, title, 17)
        for n, line in enumerate(text.split("\n")):
            self.write(LEFT, 342 + 17 * n, line, 13)


@torch.no_grad()
def picture(words=True):
    """The picture as an RGB image; words=False leaves the text out, for the test."""
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    panels = [Panel(image, number, words) for number in range(5)]

    panel, (features, logits) = panels[0], tsn_arrivals()
    panel.caption("TSN", "every frame by itself, then\nthe mean: each counts 1/8")
    panel.axes("channels", across=140)
    panel.grid(features, width=19)
    panel.grid(logits[:, None], width=33, left=LEFT + 8 * 19 + 6)
    panel.write(LEFT + 8 * 19 + 22, 54, "logits", 11, GREY, "mm")

    panel = panels[1]
    panel.caption("TSM", "1/8 of the channels one frame\nearlier, 1/8 one frame later")
    panel.axes("channels")
    panel.grid(tsm_arrivals())

    panel = panels[2]
    panel.caption("TIN", "1/4 of the channels by computed\ndistances, here +0.5, +1.75,\n-0.5 and -1.75 frames")
    panel.axes("channels")
    panel.grid(tin_arrivals())

    panel, top = panels[3], TOP
    panel.caption("TRN", "small networks over ordered\ntuples, here of four frames")
    panel.axes("tuples")
    for scale in (4, 3, 2):
        arrivals = trn_arrivals(scale)
        height = 22 * arrivals.shape[2]
        panel.grid(arrivals, top, width=38, height=22)
        panel.write(LEFT + 160, top + height / 2, f"of {scale}", 12, GREY)
        top += height + 7

    panel, (fast, slow, told, picked) = panels[4], slowfast_arrivals()
    panel.caption(
        "SlowFast", "fast: all frames, few channels\nslow: every 4th, many channels,\ntold by 5 fast frames each")
    panel.axes("")
    for what, arrivals, top, height in (("fast sees", fast, TOP + 18, 20), ("slow sees", slow, TOP + 66, 44),
                                        ("slow is told", told, TOP + 138, 28)):
        panel.write(LEFT, top - 11, what, 12, GREY)
        panel.grid(arrivals, top, width=12, height=height)
    for n, frame in enumerate(picked):
        panel.write(LEFT - 6, TOP + 151 + 28 * n, LETTERS[frame], 12, GREY, "rm")

    panels[0].write(LEFT, 404, "A colour is the frame that a value came from, its width in the cell that frame's "
                    "weight; grey: zero, nothing arrives.", 13, GREY)
    return image


if __name__ == "__main__":
    picture().save(PICTURE, optimize=True)
    print(f"{PICTURE}: {PICTURE.stat().st_size / 1000:.0f} kB")
