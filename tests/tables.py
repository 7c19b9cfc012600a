"""Print the report's tables, with our own figures beside the report's.

    python tests/tables.py [FILE.npz ...]

The files are score files of evaluate.py --out and ensemble.py --out; without any, the tables hold
the report's figures alone. Every figure is the mAP in percent. The output is Markdown.

The figures of several seeds (score files of one network by one protocol) become their mean and,
after ±, their sample standard deviation. The toy's networks are smaller than the report's: they
stand in their model's first row, and those of SlowFast in the row of their variant.
"""
import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
import slowfast
import tin
import trn
import tsm
import tsn

# The report's order; it tried TRN, but gives no figure.
IMAGE_MODELS = {"tsm": tsm, "tin": tin, "tsn": tsn, "trn": trn}
MODELS = {**IMAGE_MODELS, "slowfast": slowfast}

BACKBONES = {
    "resnet50": "ResNet-50",
    "resnet101": "ResNet-101",
    "inception_resnet_v2": "Inception-ResNet-v2",
    "senet154": "SENet-154",
}
ENSEMBLES = {  # mAP on validation and on test; report, Table 2
    "video models": ("66.71", "59.80"),
    "video and image models": ("67.22", "60.77"),
}


# ---- score files -------------------------------------------------------------------------------

def read_meta(path):
    """What a score file says about itself."""
    try:
        with np.load(path) as file:
            meta = json.loads(str(file["meta"]))
    except Exception:  # numpy raises many kinds of errors for other files
        raise ValueError(f"{path}: cannot be read as a score file") from None
    if meta["map"] is None:
        raise ValueError(f"{path}: scores of a list without labels have no mAP")
    return meta


def find_row(path, model, recipe):
    """The row of the report in which a network stands."""
    if model not in MODELS:
        raise ValueError(f"{path}: the report has no network {model}")
    rows = MODELS[model].RECIPES
    size = "depth" if model == "slowfast" else "backbone"
    for row, values in rows.items():
        if row == "toy" or values.get("variant") != recipe.get("variant"):
            continue
        if recipe[size] == rows["toy"][size]:
            return row
        if recipe[size] == values[size] and recipe["frames"] == values["frames"]:
            return row
    raise ValueError(f"{path}: the report has no {model} of this size")


def find_ensemble(path, members):
    """The row of ENSEMBLES in which an ensemble stands."""
    models = {member["model"] for member in members}
    if "slowfast" not in models:
        raise ValueError(f"{path}: the report has no ensemble without SlowFast")
    if models == {"slowfast"}:
        return "video models"
    return "video and image models"


def collect(paths):
    """Sort score files into cells, {(model, row, protocol): [mAP in percent, ...]}."""
    cells = {}
    for path in paths:
        meta = read_meta(path)
        if meta["model"] == "ensemble":
            cell = ("ensemble", find_ensemble(path, meta["members"]), "")
        else:
            row = find_row(path, meta["model"], meta["recipe"])
            cell = (meta["model"], row, meta["protocol"]["name"])
        cells.setdefault(cell, []).append(100 * meta["map"])
    return cells


# ---- tables ------------------------------------------------------------------------------------

def reported(value):
    if value is None:
        return "-"
    return f"{value:.2f}"


def ours(cells, *cell):
    """The mean over the seeds and the spread, or a single figure."""
    maps = cells.get(cell, [])
    if not maps:
        return "-"
    if len(maps) == 1:
        return f"{maps[0]:.2f}"
    return f"{np.mean(maps):.1f} ± {np.std(maps, ddof=1):.1f}"


def print_row(*cells):
    print(f"| {' | '.join(cells)} |")


def print_head(title, *columns):
    print(f"\n{title}\n")
    print_row(*columns)
    print_row(*["---"] * len(columns))


def print_image_models(cells):
    print_head("Table 1. Image models", "network", "backbone", "frames", "recipe", "report",
               "ours, one view", "ours, dense")
    for model, module in IMAGE_MODELS.items():
        for row, figure in module.REPORTED.items():
            recipe = module.RECIPES[row]
            print_row(model.upper(), BACKBONES[recipe["backbone"]], str(recipe["frames"]),
                      f"`{row}`", reported(figure), ours(cells, model, row, "clip"),
                      ours(cells, model, row, "dense"))


def print_video_models(cells):
    print_head("Table 2. Video models", "network", "recipe", "report, one clip", "report, dense",
               "report, multi-scale", "ours, one clip", "ours, dense", "ours, multi-scale")
    for row, figures in slowfast.REPORTED.items():
        pathways, size = slowfast.RECIPES[row]["variant"].split("_")
        name = pathways.capitalize().replace("Slowfast", "SlowFast")
        one_clip, dense, multiscale = figures or [None, None, None]
        print_row(f"{name} {size}", f"`{row}`", reported(one_clip), reported(dense),
                  reported(multiscale), ours(cells, "slowfast", row, "clip"),
                  ours(cells, "slowfast", row, "dense"),
                  ours(cells, "slowfast", row, "multiscale"))


def print_ensembles(cells):
    print_head("Table 2, continued. Ensembles", "ensemble", "report, validation", "report, test",
               "ours, validation")
    for row, (validation, test) in ENSEMBLES.items():
        print_row(row, validation, test, ours(cells, "ensemble", row, ""))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", metavar="FILE.npz", help="score files")
    cells = collect(parser.parse_args().files)
    print_image_models(cells)
    print_video_models(cells)
    print_ensembles(cells)


if __name__ == "__main__":
    data.run_script(main)
