"""What tests/real.sh and tests/laptop.sh need Python for: lists, shuffled clips, tables.

    python tests/real.py lists tank|grid FOLDER OUT           the films' labels as csv files in OUT
    python tests/real.py shuffled CHECKPOINT DATA FILE.npz    scores of clips in a random order
    python tests/real.py table tank|grid OUT                  mAP of all labels and of each group
    python tests/real.py claims OUT ...                       the report's claims and our figures

The tables are Markdown, the figures percent. A figure of several seeds is their mean and, after ±,
their sample standard deviation.
"""
import argparse
import csv
import json
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
import evaluate

# A film has one label of each group.
GROUPS = {
    "tank": {
        "action": ["no_action", "bridge_up", "bridge_down", "train_in_out"],
        "place": ["inside", "outside"],
        "location": ["gate", "rusty_bridge", "station_outside", "turquoise_bridge", "two_stations"],
    },
    # The six letters of a file's name, in this order. The speakers were never given a w.
    "grid": {
        "command": ["bin", "lay", "place", "set"],
        "colour": ["blue", "green", "red", "white"],
        "preposition": ["at", "by", "in", "with"],
        "letter": [f"letter {letter}" for letter in "abcdefghijklmnopqrstuvxyz"],
        "digit": ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"],
        "adverb": ["again", "now", "please", "soon"],
    },
}
NETWORKS = ["tsn", "trn", "tsm", "tin", "slowfast", "slow", "fast", "video", "all"]


# ---- lists -------------------------------------------------------------------------------------

def tank_lines(file):
    """A list of the data set's authors, who name each film's features, NAME.npy -> csv lines."""
    lines = []
    with open(file, newline="", encoding="utf-8") as rows:
        for row in csv.DictReader(rows):
            name = row["fname"].removesuffix(".npy")
            labels = [row["label"], row["place"], row["location"]]
            lines.append(",".join([f"{row['label']}/{name}.mp4", *labels]))
    return lines


def grid_line(name):
    """bbaf2n -> "bbaf2n.mp4,bin,blue,at,letter f,two,now"."""
    labels = []
    for letter, (group, words) in zip(name, GROUPS["grid"].items()):
        if group == "letter":
            labels.append(f"letter {letter}")
        elif group == "digit":
            labels.append(words["z123456789".index(letter)])
        else:
            labels += [word for word in words if word[0] == letter]
    return ",".join([f"{name}.mp4", *labels])


def write_lists(films, folder, out):
    out.mkdir(parents=True, exist_ok=True)
    if films == "tank":
        for split in ["train", "val"]:
            lines = tank_lines(folder / "data" / "train_val_split" / f"{split}_data.csv")
            data.write_lines(out / f"{split}.csv", lines)
    else:
        names = sorted(file.stem for file in (folder / "data" / "s1").glob("*.mpg"))
        data.write_lines(out / "films.csv", [grid_line(name) for name in names])


# ---- shuffled clips ----------------------------------------------------------------------------

class Shuffled(torch.nn.Module):
    """A network that gets each clip's frames in a random order, the same in every run."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, clips):  # (B, T, 3, H, W)
        orders = torch.rand(clips.shape[:2], generator=self.generator).argsort(dim=1)  # (B, T)
        return self.model(torch.stack([clip[order] for clip, order in zip(clips, orders)]))


def score_shuffled(path, folder, out):
    checkpoint = evaluate.read_checkpoint(path)
    config = checkpoint["config"]
    recipe = config["recipe"]
    module, _ = evaluate.open_model(config["model"])
    _, _, device = evaluate.start_process()
    model, num_classes = evaluate.load_weights(module, recipe, checkpoint, path)
    videos = data.VideoList(folder, "val")
    views = evaluate.VideoViews(videos, recipe, evaluate.make_protocol(recipe))
    scores = evaluate.predict(Shuffled(model.to(device)), views, num_classes, recipe, device)
    labels = videos.label_matrix()
    paths = [videos.path(row) for row in range(len(videos))]
    meta = {"model": config["model"], "categories": videos.categories, "shuffled": True}
    evaluate.save_scores(out, paths, scores, labels, meta)
    evaluate.print_metrics(scores, labels)


# ---- tables ------------------------------------------------------------------------------------

def print_row(*cells):
    print(f"| {' | '.join(cells)} |")


def mean_and_spread(values):
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}"


def figures(scores, labels, categories, groups):
    """[mAP over all labels, then of each group its mAP and top-1 hit rate], from scores and labels
    (N, K)."""
    result = [evaluate.sample_map(scores, labels)]
    for words in groups.values():
        columns = [k for k, name in enumerate(categories) if name in words]
        top1, _ = evaluate.hit_rates(scores[:, columns], labels[:, columns])
        result += [evaluate.sample_map(scores[:, columns], labels[:, columns]), top1]
    return [100 * value for value in result]


def print_table(films, out):
    groups = GROUPS[films]
    columns = ["all labels"]
    for group in groups:
        columns += [group, "top-1"]
    print_row("network", "protocol", *columns)
    print_row(*["---"] * (2 + len(columns)))

    # every film gets the same scores: how many training films have each label
    train = data.VideoList(out / "data", "train")
    val = data.VideoList(out / "data", "val")
    scores = np.tile(train.class_counts, (len(val), 1))
    frequencies = figures(scores, val.label_matrix(), val.categories, groups)
    print_row("labels' frequencies", "-", *[f"{value:.1f}" for value in frequencies])

    for network in NETWORKS:
        for protocol in ["clip", "shuffled", "dense", "multiscale", "equal", "fitted"]:
            seeds = []
            for file in sorted(out.glob(f"seed*/{network}-{protocol}.npz")):
                with np.load(file) as arrays:
                    categories = json.loads(str(arrays["meta"]))["categories"]
                    seeds.append(figures(arrays["scores"], arrays["labels"], categories, groups))
            if seeds:
                cells = [mean_and_spread(values) for values in np.transpose(seeds)]
                print_row(network, protocol, *cells)


# A claim, the report's figures, the score file that should be better, and those of which the best
# should be worse.
MEMBERS = ["slowfast-multiscale", "slow-multiscale", "fast-multiscale"]
CLAIMS = [
    ("order matters: TSM against TSN", "59.85 (8 frames, ResNet-50), 58.92 (5, ResNet-101)",
     "tsm-clip", ["tsn-clip"]),
    ("order matters: TIN against TSN", "62.23, 58.92", "tin-clip", ["tsn-clip"]),
    ("TSM, frames in order against shuffled", "-", "tsm-clip", ["tsm-shuffled"]),
    ("TIN, frames in order against shuffled", "-", "tin-clip", ["tin-shuffled"]),
    ("a learned shift (TIN) against a fixed one (TSM)", "62.23, 59.85", "tin-clip", ["tsm-clip"]),
    ("loss x classes / labels against x 1", "\"a huge performance gain\"",
     "tin-clip", ["tin-scale1-clip"]),
    ("loss x classes / labels against x 4 that", "160 is best", "tin-clip", ["tin-scale4-clip"]),
    ("the factor on the loss against on the rate", "\"can not have the same performance\"",
     "tin-clip", ["tin-rate-clip"]),
    ("the same, weight decay divided by it", "-", "tin-clip", ["tin-rate-decay-clip"]),
    ("scaled BCE against LSEP", "BCE was used", "tin-clip", ["tin-lsep-clip"]),
    ("scaled BCE against LSEP / 5", "BCE was used", "tin-clip", ["tin-lsep-fifth-clip"]),
    ("scaled BCE against WARP", "BCE was used", "tin-clip", ["tin-warp-clip"]),
    ("scaled BCE against WARP / 5", "BCE was used", "tin-clip", ["tin-warp-fifth-clip"]),
    ("class weights, root, against none", "\"slightly\" better", "tin-sqrt-clip", ["tin-clip"]),
    ("class weights, ratio, against none", "\"slightly\" better", "tin-ratio-clip", ["tin-clip"]),
    ("TIN, 16 frames against 8", "62.49, 62.22 (ResNet-101)", "tin-16-clip", ["tin-clip"]),
    ("dense against one view, TSM", "0.5 to 1.1 more", "tsm-dense", ["tsm-clip"]),
    ("dense against one view, TIN", "0.5 to 1.1 more", "tin-dense", ["tin-clip"]),
    ("dense against one view, SlowFast", "61.52, 59.89", "slowfast-dense", ["slowfast-clip"]),
    ("multi-scale against dense, SlowFast", "63.52, 61.52",
     "slowfast-multiscale", ["slowfast-dense"]),
    ("Fast against SlowFast", "62.03 (32x2), 59.89 (8x8)", "fast-clip", ["slowfast-clip"]),
    ("SlowFast against Slow", "59.89 (8x8), 59.02 (8x4)", "slowfast-clip", ["slow-clip"]),
    ("Fast, all frames against half", "62.03 (32x2), 59.05 (16x2)",
     "fast-clip", ["fast-half-clip"]),
    ("the video models together against the best of them", "66.71, 64.81", "video-equal", MEMBERS),
    ("all models together against the best", "67.22, 64.81", "all-equal",
     ["tsn-dense", "trn-dense", "tsm-dense", "tin-dense", *MEMBERS]),
    ("cross-fitted against equal weights", "-", "all-fitted", ["all-equal"]),
]


def read_maps(out, name):
    """The mAP of a score file in every seed's folder."""
    maps = []
    for file in sorted(out.glob(f"seed*/{name}.npz")):
        with np.load(file) as arrays:
            maps.append(100 * evaluate.sample_map(arrays["scores"], arrays["labels"]))
    return maps


def judge(better, worse):
    """Of one seed, less than 3 points show nothing; of several, less than both spreads together."""
    noise = 3.0
    if len(better) > 1 and len(worse) > 1:
        noise = np.std(better, ddof=1) + np.std(worse, ddof=1)
    difference = np.mean(better) - np.mean(worse)
    if abs(difference) < noise:
        return "not shown"
    if difference > 0:
        return "holds"
    return "does not hold"


def print_claims(folders):
    print_row("claim", "report, mAP", *[f"{out.name}, mAP | verdict" for out in folders])
    print_row(*["---"] * (2 + 2 * len(folders)))
    for claim, report, name, others in CLAIMS:
        cells = []
        for out in folders:
            better = read_maps(out, name)
            worse = [read_maps(out, other) for other in others]
            worse = [maps for maps in worse if maps]  # those that were run
            if better and worse:
                worse = max(worse, key=np.mean)
                text = f"{mean_and_spread(better)}, {mean_and_spread(worse)}"
                cells += [text, judge(better, worse)]
            else:
                cells += ["not run", "-"]
        print_row(claim, report, *cells)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    lists = commands.add_parser("lists")
    lists.add_argument("films", choices=GROUPS)
    lists.add_argument("folder", type=Path)
    lists.add_argument("out", type=Path)
    shuffled = commands.add_parser("shuffled")
    shuffled.add_argument("checkpoint")
    shuffled.add_argument("data")
    shuffled.add_argument("out")
    table = commands.add_parser("table")
    table.add_argument("films", choices=GROUPS)
    table.add_argument("out", type=Path)
    claims = commands.add_parser("claims")
    claims.add_argument("out", type=Path, nargs="+")
    args = parser.parse_args()
    if args.command == "lists":
        write_lists(args.films, args.folder, args.out)
    elif args.command == "shuffled":
        score_shuffled(args.checkpoint, args.data, args.out)
    elif args.command == "table":
        print_table(args.films, args.out)
    else:
        print_claims(args.out)


if __name__ == "__main__":
    data.run_script(main)
