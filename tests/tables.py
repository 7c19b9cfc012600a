"""Print the report's tables whole, with our own figures beside the report's.

    python tests/tables.py [FILE.npz ...]

The files are score files of evaluate.py --out and ensemble.py --out; without any, the tables hold
the report's figures alone. Every figure is the mAP in percent. The output is Markdown.

The figures of several seeds (score files of different checkpoints) become their mean and, after ±,
their sample standard deviation. Bad input is reported in one line, and the exit status is then 2.
"""
import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
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
NONE = "-"  # a cell without a figure
NOTE = """
Ours are the figures of the score files. The toy's networks are smaller than the report's: they
stand in their model's first row, and those of SlowFast in the row of their variant.
"""


def read_meta(path):
    """What a score file says about itself, a dict; raises OSError or ValueError."""
    try:
        with np.load(path) as file:
            meta = json.loads(str(file["meta"]))
    except OSError:
        raise
    except Exception:  # numpy raises many kinds of errors for other files
        raise ValueError(f"{path}: not a score file of evaluate.py or ensemble.py") from None
    if meta["map"] is None:
        raise ValueError(f"{path}: scores of a list without labels have no mAP")
    return meta


def backbone_of(recipe):
    """The backbone's name; TSM, TIN and SlowFast give the depth of a ResNet instead."""
    if "backbone" in recipe:
        return recipe["backbone"]
    return f"resnet{recipe['depth']}"


def report_rows(module):
    """The rows of a model file's RECIPES that are the report's: all but the toy."""
    rows = dict(module.RECIPES)
    del rows["toy"]
    return rows


def find_row(path, meta):
    """The row of the report in which a network stands.

    The toy's networks are smaller than all of the report's. They stand in their model's first row,
    those of SlowFast in the row of their variant. Raises ValueError for a network without a row.
    """
    if meta["model"] not in MODELS:
        raise ValueError(f"{path}: the report has no network {meta['model']}")
    module = MODELS[meta["model"]]
    recipe = meta["recipe"]
    backbone = backbone_of(recipe)
    is_toy = backbone == backbone_of(module.RECIPES["toy"])

    for row, values in report_rows(module).items():
        if "variant" in values and values["variant"] != recipe["variant"]:
            continue
        same_network = backbone == backbone_of(values) and recipe["frames"] == values["frames"]
        if is_toy or same_network:
            return row
    raise ValueError(f"{path}: {meta['model']} with {backbone} is in no row of the report")


def networks(meta):
    """The metas of all single networks in a score file. Members of an ensemble may be ensembles."""
    if meta["model"] != "ensemble":
        return [meta]
    members = []
    for member in meta["members"]:
        members += networks(member)
    return members


def find_ensemble(path, meta):
    """The row of ENSEMBLES in which an ensemble stands. Raises ValueError if there is none."""
    models = {network["model"] for network in networks(meta)}
    if models == {"slowfast"}:
        return "video models"
    if "slowfast" in models:
        return "video and image models"
    raise ValueError(f"{path}: the report has no ensemble without SlowFast")


def check_seed(path, meta, other_path, other):
    """Raise ValueError unless two score files of one cell are the same run with two seeds."""
    ours = networks(meta)
    others = networks(other)
    for key in ("model", "recipe", "protocol"):
        if [network[key] for network in ours] != [network[key] for network in others]:
            raise ValueError(f"{path}: another {key} than {other_path}, which is in the same cell")
    if [network["checkpoint"] for network in ours] == [network["checkpoint"] for network in others]:
        raise ValueError(f"{path}: of the same checkpoint as {other_path}")


def collect(paths):
    """Sort score files into cells, {(model, row, protocol): [mAP in percent, ...]}.

    Raises OSError or ValueError for a file that cannot be read or has no cell.
    """
    cells = {}
    first = {}  # cell: (path, meta) of its first file
    for path in paths:
        meta = read_meta(path)
        if meta["model"] == "ensemble":
            cell = ("ensemble", find_ensemble(path, meta), "")
        else:
            cell = (meta["model"], find_row(path, meta), meta["protocol"]["name"])

        if cell in first:
            check_seed(path, meta, *first[cell])
        else:
            first[cell] = (path, meta)
            cells[cell] = []
        cells[cell].append(100 * meta["map"])
    return cells


def reported_figure(value):
    """The text of a cell with a figure of the report, None where the report has none."""
    if value is None:
        return NONE
    return f"{value:.2f}"


def our_figure(maps):
    """The text of a cell with our figures: a single one, or mean ± sample standard deviation."""
    if not maps:
        return NONE
    mean = np.mean(maps)
    if len(maps) == 1:
        return f"{mean:.2f}"
    return f"{mean:.1f} ± {np.std(maps, ddof=1):.1f}"


def image_table(cells):
    """The lines of Table 1, the head first."""
    lines = [["network", "backbone", "frames", "recipe", "report"]]
    if cells:
        lines[0] += ["ours, one view", "ours, dense"]
    for model, module in IMAGE_MODELS.items():
        for row, values in report_rows(module).items():
            backbone = BACKBONES[backbone_of(values)]
            line = [model.upper(), backbone, str(values["frames"]), f"`{row}`"]
            line.append(reported_figure(module.REPORTED.get(row)))
            if cells:
                for protocol in ["clip", "dense"]:
                    line.append(our_figure(cells.get((model, row, protocol))))
            lines.append(line)
    return lines


def video_table(cells):
    """The lines of Table 2 above its ensembles, the head first."""
    lines = [["network", "recipe", "report, one clip", "report, dense", "report, multi-scale"]]
    if cells:
        lines[0] += ["ours, one clip", "ours, dense", "ours, multi-scale"]
    for row, values in report_rows(slowfast).items():
        pathways, _, size = values["variant"].partition("_")
        name = {"slowfast": "SlowFast", "fast": "Fast", "slow": "Slow"}[pathways]
        line = [f"{name} {size}", f"`{row}`"]
        for value in slowfast.REPORTED.get(row) or (None, None, None):
            line.append(reported_figure(value))
        if cells:
            for protocol in ["clip", "dense", "multiscale"]:
                line.append(our_figure(cells.get(("slowfast", row, protocol))))
        lines.append(line)
    return lines


def ensemble_table(cells):
    """The lines of Table 2's ensembles, the head first."""
    lines = [["ensemble", "report, validation", "report, test"]]
    if cells:
        lines[0].append("ours, validation")
    for row, (validation, test) in ENSEMBLES.items():
        line = [row, validation, test]
        if cells:
            line.append(our_figure(cells.get(("ensemble", row, ""))))
        lines.append(line)
    return lines


def print_table(title, lines):
    """Print lines of cells as a Markdown table; padded columns make it readable as text."""
    widths = []
    for column in zip(*lines):
        widths.append(max(len(cell) for cell in column))

    print(f"\n{title}\n")
    head, *body = lines
    rule = ["-" * width for width in widths]
    for line in [head, rule, *body]:
        cells = [cell.ljust(width) for cell, width in zip(line, widths)]
        print(f"| {' | '.join(cells)} |")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", metavar="FILE.npz", help="score files")
    args = parser.parse_args()

    try:
        cells = collect(args.files)
    except (OSError, ValueError) as error:
        print(f"tables.py: {error}", file=sys.stderr)
        return 2
    print_table("Table 1. Image models, mAP on validation in percent", image_table(cells))
    print_table("Table 2. Video models, mAP on validation in percent", video_table(cells))
    print_table("Table 2, continued. Ensembles, mAP in percent", ensemble_table(cells))
    if cells:
        print(NOTE.rstrip())
    return 0


if __name__ == "__main__":
    sys.exit(main())
