"""Print the report's tables, with our own figures beside the report's.

    python tests/tables.py [FILE.npz ...]

The files are score files of evaluate.py --out and ensemble.py --out; without any, the tables hold
the report's figures alone. Every figure is the mAP in percent. The output is Markdown.

The figures of several seeds (score files of one network by one protocol) become their mean and,
after ±, their sample standard deviation. The toy's networks are smaller than the report's: they
stand in their model's first row, and those of SlowFast in the row of their variant.
"""
import argparse
import importlib
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
import ensemble
import evaluate

ENSEMBLES = {  # mAP on validation and on test; report, Table 2
    "video models": ("66.71", "59.80"),
    "video and image models": ("67.22", "60.77"),
}


# ---- score files -------------------------------------------------------------------------------

def same(recipe, other, *keys):
    """Whether both have equal values, or none, for these keys."""
    return all(recipe.get(key) == other.get(key) for key in keys)


def find_row(path, model, recipe):
    """The row of the report in which a network stands."""
    module, toy = evaluate.open_model(model, "toy")
    keys = ["variant", "backbone", "depth", "frames"]
    if same(recipe, toy, "backbone", "depth"):
        keys = ["variant"]  # which image models lack
    for row in getattr(module, "REPORTED", {}):  # a reader's own model file has none
        if same(recipe, module.RECIPES[row], *keys):
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
    cells = defaultdict(list)
    for path in paths:
        _, scores, labels, meta = ensemble.read_scores(path)
        if meta["model"] == "ensemble":
            cell = ("ensemble", find_ensemble(path, meta["members"]), "")
        else:
            row = find_row(path, meta["model"], meta["recipe"])
            cell = (meta["model"], row, meta["protocol"]["name"])
        cells[cell].append(100 * evaluate.sample_map(scores, labels))
    return cells


# ---- tables ------------------------------------------------------------------------------------

def mean_and_spread(values):
    """Of the figures of several seeds; a single figure alone; "-" if there is none."""
    if len(values) == 0:
        return "-"
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}"


def print_row(*cells):
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def print_head(title, *columns):
    print(f"\n{title}\n")
    print_row(*columns)
    print_row(*["---"] * len(columns))


def print_networks(cells, title, models, protocols, columns):
    """columns: the headings of the report's figures."""
    print_head(title, "network", "recipe", *columns,
               *[f"ours, {protocol}" for protocol in protocols])
    for model in models:
        for row, figures in importlib.import_module(model).REPORTED.items():
            theirs = ["-"] * len(columns)
            if figures is not None:
                theirs = [f"{figure:.2f}" for figure in np.atleast_1d(figures)]
            ours = [mean_and_spread(cells[model, row, protocol]) for protocol in protocols]
            print_row(model, f"`{row}`", *theirs, *ours)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", metavar="FILE.npz", help="score files")
    cells = collect(parser.parse_args().files)
    # the report's order; it tried TRN, but gives no figure
    print_networks(cells, "Table 1. Image models", ["tsm", "tin", "tsn", "trn"],
                   ["clip", "dense"], ["report"])
    protocols = ["clip", "dense", "multiscale"]
    print_networks(cells, "Table 2. Video models", ["slowfast"], protocols,
                   [f"report, {protocol}" for protocol in protocols])
    print_head("Table 2, continued. Ensembles", "ensemble", "report, validation", "report, test",
               "ours, validation")
    for row, figures in ENSEMBLES.items():
        print_row(row, *figures, mean_and_spread(cells["ensemble", row, ""]))


if __name__ == "__main__":
    data.run_script(main)
