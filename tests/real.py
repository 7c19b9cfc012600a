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
import os
from collections import defaultdict
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from tables import mean_and_spread, print_head, print_row  # with it, Python finds the scripts
import data
import ensemble
import evaluate

# A film has one label of each group.
GROUPS = {
    "tank": {
        "action": ["no_action", "bridge_up", "bridge_down", "train_in_out"],
        "place": ["inside", "outside"],
        "location": ["gate", "rusty_bridge", "station_outside", "turquoise_bridge", "two_stations"],
    },
    # The six characters of a file's name, in this order. The speakers were never given a w.
    "grid": {
        "command": ["bin", "lay", "place", "set"],
        "colour": ["blue", "green", "red", "white"],
        "preposition": ["at", "by", "in", "with"],
        "letter": list("abcdefghijklmnopqrstuvxyz"),
        "digit": ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"],
        "adverb": ["again", "now", "please", "soon"],
    },
}


# ---- lists -------------------------------------------------------------------------------------

def tank_lines(file):
    """A list of the data set's authors -> csv lines. It names the features of a film, NAME.npy, and
    not the film, NAME.mp4."""
    lines = []
    with open(file, newline="", encoding="utf-8") as rows:
        for row in csv.DictReader(rows):
            line = "{label}/{fname},{label},{place},{location}".format(**row)
            lines.append(line.replace(".npy", ".mp4"))
    return lines


def grid_line(name):
    """bbaf2n -> "bbaf2n.mp4,bin,blue,at,f,two,now"."""
    labels = []
    for letter, (group, words) in zip(name, GROUPS["grid"].items()):
        if group == "digit":
            labels.append(words["z123456789".index(letter)])
        else:
            labels += [word for word in words if word[0] == letter]
    return ",".join([f"{name}.mp4", *labels])


def write_lists(films, folder, out):
    os.makedirs(out, exist_ok=True)
    if films == "tank":
        for split in ["train", "val"]:
            lines = tank_lines(f"{folder}/data/train_val_split/{split}_data.csv")
            data.write_lines(f"{out}/{split}.csv", lines)
    else:
        files = sorted(Path(folder).glob("data/s1/*.mpg"))
        data.write_lines(f"{out}/films.csv", [grid_line(file.stem) for file in files])


# ---- shuffled clips ----------------------------------------------------------------------------

def shuffled(make_views):
    """evaluate.make_views, but each video's frames are in a random order, the same in every run."""
    generator = torch.Generator().manual_seed(0)

    def make_shuffled_views(*video):
        views = make_views(*video)
        order = torch.rand(views[0].shape[1], generator=generator).argsort()
        return [clips[:, order] for clips in views]

    return make_shuffled_views


def score_shuffled(checkpoint, folder, out):
    """evaluate.py, with shuffled frames. Without --workers 0, each loader process would have a copy
    of the generator, and repeat its orders."""
    command = ["evaluate.py", "--checkpoint", checkpoint, "--data", folder, "--out", out,
               "--workers", "0"]
    make_views = shuffled(evaluate.make_views)
    with mock.patch("sys.argv", command), mock.patch("evaluate.make_views", make_views):
        evaluate.main()


# ---- tables ------------------------------------------------------------------------------------

def score_files(out, names):
    """{a score file's name: [its (scores, labels, categories) of every seed]}. names: patterns,
    with spaces between them."""
    files = defaultdict(list)
    for name in names.split():
        for file in sorted(Path(out).glob(f"seed*/{name}.npz")):
            _, scores, labels, meta = ensemble.read_scores(file)
            files[file.stem].append((scores, labels, meta["categories"]))
    return files


def figures(groups, scores, labels, categories):
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
    columns = []
    for group in groups:
        columns += [group, "top-1"]
    print_head("mAP, and top-1 hit rates", "scores", "all labels", *columns)

    # every film gets the same scores: how many training films have each label
    train = data.VideoList(f"{out}/data", "train")
    val = data.VideoList(f"{out}/data", "val")
    scores = np.tile(train.class_counts, (len(val), 1))
    files = {"labels' frequencies": [(scores, val.label_matrix(), val.categories)]}
    files.update(score_files(out, "*"))
    for name, seeds in files.items():
        cells = np.transpose([figures(groups, *seed) for seed in seeds])
        print_row(name, *map(mean_and_spread, cells))


# A claim; the report's figures or words; the score file that should be better; others, the best of
# which should be worse (as patterns: t* are the image models).
CLAIMS = [
    ("order matters: TSM against TSN", "59.85 (8 frames, ResNet-50), 58.92 (5, ResNet-101)",
     "tsm-clip", "tsn-clip"),
    ("order matters: TIN against TSN", "62.23, 58.92", "tin-clip", "tsn-clip"),
    ("TSM, frames in order against shuffled", "-", "tsm-clip", "tsm-shuffled"),
    ("TIN, frames in order against shuffled", "-", "tin-clip", "tin-shuffled"),
    ("a learned shift (TIN) against a fixed one (TSM)", "62.23, 59.85", "tin-clip", "tsm-clip"),
    ("loss x classes / labels against x 1", "\"a huge performance gain\"",
     "tin-clip", "tin-scale1-clip"),
    ("loss x classes / labels against x 4 that", "160 is best", "tin-clip", "tin-scale4-clip"),
    ("the factor on the loss against on the rate", "\"can not have the same performance\"",
     "tin-clip", "tin-rate-clip"),
    ("the same, weight decay divided by it", "-", "tin-clip", "tin-rate-decay-clip"),
    ("scaled BCE against LSEP", "BCE was used", "tin-clip", "tin-lsep-clip"),
    ("scaled BCE against LSEP / 5", "BCE was used", "tin-clip", "tin-lsep-fifth-clip"),
    ("scaled BCE against WARP", "BCE was used", "tin-clip", "tin-warp-clip"),
    ("scaled BCE against WARP / 5", "BCE was used", "tin-clip", "tin-warp-fifth-clip"),
    ("class weights, root, against none", "\"slightly\" better", "tin-sqrt-clip", "tin-clip"),
    ("class weights, ratio, against none", "\"slightly\" better", "tin-ratio-clip", "tin-clip"),
    ("TIN, 16 frames against 8", "62.49, 62.22 (ResNet-101)", "tin-16-clip", "tin-clip"),
    ("dense against one view, TSM", "0.5 to 1.1 more", "tsm-dense", "tsm-clip"),
    ("dense against one view, TIN", "0.5 to 1.1 more", "tin-dense", "tin-clip"),
    ("dense against one view, SlowFast", "61.52, 59.89", "slowfast-dense", "slowfast-clip"),
    ("multi-scale against dense, SlowFast", "63.52, 61.52",
     "slowfast-multiscale", "slowfast-dense"),
    ("Fast against SlowFast", "62.03 (32x2), 59.89 (8x8)", "fast-clip", "slowfast-clip"),
    ("SlowFast against Slow", "59.89 (8x8), 59.02 (8x4)", "slowfast-clip", "slow-clip"),
    ("Fast, all frames against half", "62.03 (32x2), 59.05 (16x2)",
     "fast-clip", "fast-half-clip"),
    ("the video models together against the best of them", "66.71, 64.81", "video-equal",
     "*-multiscale"),
    ("all models together against the best", "67.22, 64.81", "all-equal",
     "t*-dense *-multiscale"),
    ("cross-fitted against equal weights", "-", "all-fitted", "all-equal"),
]


def best(out, names):
    """Of these score files the best: its mAPs, one of each seed. Empty if there is none."""
    maps = []
    for seeds in score_files(out, names).values():
        maps.append([100 * evaluate.sample_map(scores, labels) for scores, labels, _ in seeds])
    return max(maps, key=np.mean, default=[])


def judge(better, worse):
    """Where one side has a single seed, less than 3 points show nothing; otherwise, less than the
    sum of both standard deviations."""
    if not better or not worse:
        return "not run"
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
    columns = []
    for out in folders:
        columns += [f"{Path(out).name}, mAP", "verdict"]
    print_head("The report's claims", "claim", "report, mAP", *columns)
    for claim, report, name, others in CLAIMS:
        cells = []
        for out in folders:
            better = best(out, name)
            worse = best(out, others)
            cells += [f"{mean_and_spread(better)}, {mean_and_spread(worse)}", judge(better, worse)]
        print_row(claim, report, *cells)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    lists = commands.add_parser("lists")
    lists.add_argument("films", choices=GROUPS)
    lists.add_argument("folder")
    lists.add_argument("out")
    shuffled_clips = commands.add_parser("shuffled")
    shuffled_clips.add_argument("checkpoint")
    shuffled_clips.add_argument("data")
    shuffled_clips.add_argument("out")
    table = commands.add_parser("table")
    table.add_argument("films", choices=GROUPS)
    table.add_argument("out")
    claims = commands.add_parser("claims")
    claims.add_argument("out", nargs="+")
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
