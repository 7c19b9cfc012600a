"""Score files of several models -> one ranking: the weighted mean of their probabilities, and its sample-level mAP.

    python ensemble.py A.npz B.npz ... [--out FILE.npz]              equal weights; of one file, its own figures
    python ensemble.py A.npz B.npz ... --weights 2 1 ...             weights in this proportion
    python ensemble.py A.npz B.npz ... --fit --out FILE.npz          weights fitted to these labels, into FILE.json
    python ensemble.py A.npz B.npz ... --weights FILE.json           the same models, in this order, on the test list
    python ensemble.py ... --csv FILE.csv [--failed DATA/test_failed.txt]    a table that names every video

Fitted weights flatter the videos that they were fitted to. So --fit also fits five times to four fifths of the videos
and scores the fifth that those weights have not seen: this cross-fitted mAP is the one to report, and FILE.npz gets
these scores. The weights in FILE.json are fitted to all of the videos, for the test list.
Report: "ensemble all the above models", 67.22 on validation and 60.77 on test; it gives no weights.
M models, N videos, K classes, P labels of all videos together.
"""
import argparse
import csv
import io
import json
import os
import zlib
from pathlib import Path

import numpy as np

import data
import evaluate


def read_scores(name):
    """A scores.npz -> (paths, scores (N, K) as stored, labels (N, K) or None, meta); ValueError for any other file."""
    try:
        with np.load(name) as file:
            arrays = {"labels": None, "meta": "{}", **file}
        paths, scores, labels = arrays["paths"].tolist(), arrays["scores"], arrays["labels"]
        truth, meta = np.zeros_like(scores) if labels is None else labels, dict(json.loads(str(arrays["meta"])))
        numbers, different = np.isfinite(scores).all() and np.isin(truth, (0, 1)).all(), len(set(paths))
    except Exception as error:  # numpy lets through whatever the bytes did to it
        reason = getattr(error, "strerror", None) or "not a score file of evaluate.py --out"
        raise ValueError(f"{name}: {reason}") from None
    if scores.ndim != 2 or truth.shape != scores.shape or not different == len(paths) == len(scores):
        raise ValueError(f"{name}: {len(paths)} paths, {different} of them different, for scores {scores.shape} "
                         f"and labels {truth.shape}")
    if not numbers:
        raise ValueError(f"{name}: a score is not a finite number, or a label not 0 or 1")
    return paths, scores, labels, meta


def align(names):
    """Score files -> (paths, scores (M, N, K), labels (N, K) or None, [meta of each]), all in the first file's order.
    ValueError with the difference where classes, videos or labels differ."""
    files, aligned, known = [read_scores(name) for name in names], [], []
    for name, (paths, scores, labels, _) in zip(names, files):
        known.append({path: "without labels" if labels is None else f"labels {np.flatnonzero(labels[i]).tolist()}"
                      for i, path in enumerate(paths)})
        first, own, row = known[0], known[-1], {path: i for i, path in enumerate(paths)}
        if scores.shape[1] != files[0][1].shape[1]:
            raise ValueError(f"{name}: {scores.shape[1]} classes, in {names[0]} {files[0][1].shape[1]}")
        if others := [path for path in {**first, **own} if first.get(path) != own.get(path)]:
            raise ValueError(f"{name}: {len(others)} videos are not as in {names[0]}, such as {others[0]}: "
                             f"{own.get(others[0], 'absent')}, there {first.get(others[0], 'absent')}")
        aligned.append(scores[[row[path] for path in first]])
    return list(first), np.stack(aligned), files[0][2], [meta for *_, meta in files]


def combine(scores, weights=None):
    """The weighted mean over models: scores (M, N, K) -> (N, K) of the same float type. weights: M numbers from 0 up,
    in any proportion; None: equal."""
    scores, weights = np.asarray(scores), np.ones(len(scores)) if weights is None else np.asarray(weights, float)
    if weights.shape != scores.shape[:1] or not 0 < weights.sum() < np.inf or weights.min() < 0:
        raise ValueError(f"weights {weights.tolist()}: one for each of {len(scores)} files, from 0 up, not all 0")
    return np.average(scores, axis=0, weights=weights).astype(scores.dtype)  # in float64


def fit_weights(scores, labels, rounds=50):
    """Weights (M,) of sum 1 under which scores (M, N, K) have a high mAP on labels (N, K). Greedy: each round adds the
    model that helps the running sum most, the first of equals; the best round's counts win. Caruana and others 2004.

    AP asks for each of the P labels which classes score at least as high. A class that does so in every model, or in
    none, does so under any weights: only the other pairs of label and class, a part of P x K, are compared again."""
    labels = np.asarray(labels).astype(bool)
    rows, columns = np.nonzero(labels)  # (P,)
    ahead = np.stack([model[rows] >= model[rows, columns][:, None] for model in scores])  # (M, P, K)
    always = ahead.all(0)
    always[np.arange(len(rows)), columns] = False  # a label with itself is compared again: so each has a pair
    label, classes = np.nonzero(ahead.any(0) & ~always)  # (Q,), sorted by label
    gaps = [model[rows[label], classes].astype(float) - model[rows[label], columns[label]] for model in scores]
    true = np.flatnonzero(labels[rows[label], classes])  # the pairs of two labels
    first, first_true = (np.flatnonzero(np.diff(some, prepend=-1)) for some in (label, label[true]))  # (P,)
    fixed, hits, share = always.sum(1), (always & labels[rows]).sum(1), 1 / labels.sum(1)[rows]  # (P,)
    lead, counts, found = np.zeros(len(label)), np.zeros(len(scores)), []  # lead: of label over class, so far
    for _ in range(rounds):
        values = []  # of each model: the sum of all videos' AP if it joins
        for gap in gaps:
            more = gap >= lead
            precision = (hits + np.add.reduceat(more[true], first_true, dtype=np.int32)) / (
                fixed + np.add.reduceat(more, first, dtype=np.int32))
            values.append((share * precision).sum())
        best = int(np.argmax(values))
        lead, counts = lead - gaps[best], counts + (np.arange(len(counts)) == best)
        found.append((values[best], counts / counts.sum()))
    return max(found, key=lambda one: one[0])[1]


def fit(names, paths, scores, labels):
    """--fit: print what it found -> (cross-fitted scores (N, K), weights and figures for FILE.json)."""
    def percent(scores):
        return 100 * evaluate.sample_map(scores, labels)

    folds = np.array([zlib.crc32(path.encode()) % 5 for path in paths])  # not by row: lists are sorted by category
    held_out, weights, equal = np.empty_like(scores[0]), fit_weights(scores, labels), percent(combine(scores))
    for out in [folds == fold for fold in set(folds)]:
        held_out[out] = combine(scores[:, out], fit_weights(scores[:, ~out], labels[~out]))
    print("own mAP   left out   weight")  # left out: how the mAP of equal weights changes without this model
    for m, name in enumerate(names):
        others = np.delete(scores, m, axis=0) if len(names) > 1 else scores
        print(f"{percent(scores[m]):7.2f}   {percent(combine(others)) - equal:+8.2f}   {weights[m]:6.2f}   {name}")
    found = {"equal": equal, "fitted": percent(combine(scores, weights)), "cross-fitted": percent(held_out)}
    print("   ".join(f"{way} {value:.2f}" for way, value in found.items()))
    print("report the cross-fitted mAP, which is the one below: the fitted one has seen the labels it is measured by")
    return held_out, {"weights": weights.tolist(), **found}


def read_weights(given, models):
    """--weights: a number for each file, or the JSON that --fit wrote for files of these models in this order."""
    try:
        found = json.loads(data.read_text(given[0])) if given[0].endswith(".json") else {"weights": given}
        if found.get("models", models) == models:
            return [float(weight) for weight in found["weights"]]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"--weights {' '.join(given)}: a number for each file, or FILE.json of --fit") from None
    raise ValueError(f"{given[0]}: was fitted to files of the models {found['models']}, these are of {models}")


def write_csv(path, paths, scores, failed):
    """path,score_0,... of every video; `failed`, the lines of a <split>_failed.txt, name some that get the mean row."""
    text, names = io.StringIO(), dict.fromkeys([*paths, *(line.split("\t")[0] for line in failed if line.strip())])
    rows = np.concatenate([scores, np.tile(scores.mean(0), (len(names) - len(paths), 1))]).astype(str)
    csv.writer(text).writerow(["path", *(f"score_{k}" for k in range(scores.shape[1]))])
    csv.writer(text).writerows([name, *row] for name, row in zip(names, rows))
    data.write_lines(Path(path), text.getvalue().splitlines())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="FILE.npz", help="of evaluate.py --out, all of one list")
    ways = parser.add_mutually_exclusive_group()
    ways.add_argument("--weights", nargs="+", metavar="W", help="a number for each file, or FILE.json of --fit (equal)")
    ways.add_argument("--fit", action="store_true", help="fit the weights to the labels, for the test list (equal)")
    parser.add_argument("--out", metavar="FILE.npz", help="write the result, itself such a file (--fit: FILE.json too)")
    parser.add_argument("--csv", metavar="FILE.csv", help="write the result as text: path,score_0,...")
    parser.add_argument("--failed", metavar="FILE", help="<split>_failed.txt: its videos get the mean row in FILE.csv")
    args = parser.parse_args()
    if int(os.environ.get("RANK", 0)):  # under torchrun the first process does it all
        return
    if args.failed and not args.csv:
        raise ValueError(f"--failed {args.failed}: goes into the table of --csv")
    evaluate.check_outputs(args.out, args.csv)
    failed = data.read_text(args.failed).splitlines() if args.failed else []
    paths, scores, labels, metas = align(args.files)
    models = [meta.get("model") for meta in metas]
    if args.fit and labels is None:
        raise ValueError(f"--fit: {args.files[0]} has no labels to fit to")
    found = {"weights": read_weights(args.weights, models) if args.weights else [1.0] * len(models)}
    result = combine(scores, found["weights"])
    if args.fit:
        result, found = fit(args.files, paths, scores, labels)
    found = {"model": "ensemble", "files": args.files, "models": models, **found}
    if args.out and args.fit:
        data.write_lines(Path(args.out.removesuffix(".npz") + ".json"), [json.dumps(found, indent=1)])
    if args.out:
        found["map"] = None if labels is None else evaluate.sample_map(result, labels)
        evaluate.save_scores(args.out, paths, result, labels, {**found, "classes": result.shape[1], "members": metas})
    if args.csv:
        write_csv(args.csv, paths, result, failed)
    evaluate.print_metrics(result, labels)


if __name__ == "__main__":
    data.run_script(main)
