"""Score files -> the report's two tables, with its published figures beside ours.

    python tests/tables.py FILE.npz ...        of evaluate.py --out and ensemble.py --out

A row is a checkpoint, a column a protocol; models that sample segments go into Table 1, those that sample clips into
Table 2, and ensembles, by their number of members, into its last rows. mAP in percent, "-": no such file.
"""
import importlib
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
REPORT = {"slowfast_8x8": ("59.89", "61.52", "63.52")}  # one clip, dense, multi-scale
ENSEMBLES = [("SlowFast variants", "66.71 (test 59.80)"), ("with the image models", "67.22 (test 60.77)")]


def read_meta(path):
    with np.load(path) as file:
        return json.loads(str(file["meta"]))


def percent(value):
    return "-" if value is None else f"{100 * value:.2f}"


def print_table(title, head, rows):
    """Columns as wide as their widest entry: the first to the left, the others to the right."""
    rows = [head, *rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    print(f"\n{title}\n")
    for row in rows:
        print("   ".join(text.rjust(width) if i else text.ljust(width) for i, (text, width) in
                         enumerate(zip(row, widths))).rstrip())


def main(paths):
    metas = [read_meta(path) for path in paths]
    singles, found = {}, {}  # checkpoint: its recipe and model; (checkpoint, protocol): mAP
    for meta in metas:
        if meta["model"] != "ensemble":
            singles[meta["checkpoint"]] = meta
            found[meta["checkpoint"], meta["protocol"]["name"]] = meta["map"]
    image, video = [], []
    for checkpoint, meta in singles.items():
        recipe, ours = meta["recipe"], [percent(found.get((checkpoint, name))) for name in
                                        ("clip", "dense", "multiscale")]
        if recipe["sampling"] == "segments":
            rows = importlib.import_module(meta["model"]).RECIPES
            published = next(iter(rows.values()))["published_map"]
            backbone = recipe.get("backbone") or f"resnet{recipe['depth']}"
            image.append([meta["model"], backbone, str(recipe["frames"]), *ours[:2], str(published or "-")])
        else:
            published = REPORT.get(recipe["variant"], ("-",) * 3)
            video.append([recipe["variant"], *[text for pair in zip(ours, published) for text in pair]])
    print_table("Table 1: networks of images", ["", "backbone", "frames", "one view", "clips x crops", "the report"],
                sorted(image))
    print_table("Table 2: networks of clips, each figure with the report's beside it",
                ["", "one clip", "report", "dense", "report", "multi-scale", "report"], sorted(video, reverse=True))
    ensembles = sorted((meta for meta in metas if meta["model"] == "ensemble"), key=lambda meta: len(meta["members"]))
    print_table("Ensembles", ["", "members", "mAP", "the report"],
                [[name, str(len(meta["members"])), percent(meta["map"]), published]
                 for meta, (name, published) in zip(ensembles, ENSEMBLES)])


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(sys.argv[1:])
