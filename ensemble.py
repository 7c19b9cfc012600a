"""Score files of several models -> the weighted mean of their probabilities, and its mAP.

    python ensemble.py A.npz B.npz ... [--out FILE.npz]    equal weights
    python ensemble.py A.npz B.npz ... --weights 2 1 ...   weights in this proportion
    python ensemble.py A.npz B.npz ... --fit               fit weights to the labels in the files

Weights look better than they are on the videos to which they were fitted. So --fit also divides
the videos into fifths, and scores each fifth with weights that were fitted to the others. This
cross-fitted mAP is the one to report; FILE.npz gets these scores. The printed weights are fitted to
all videos: use them for the test list.

The files must hold the same videos; their rows are brought into the same order.

The report (arXiv 2003.05837): "ensemble all the above models", mAP 67.22 on validation and 60.77 on
test; it does not say with which weights.
M models, N videos, K classes.
"""
import argparse
import json
import os
import zlib

import numpy as np

import data
import evaluate


def combine(scores, weights=None):
    """The weighted mean over models: scores (M, N, K) -> (N, K), computed in float64, returned in
    the type of scores but at least in float32. weights: M non-negative numbers, in any proportion;
    None: equal."""
    scores = np.asarray(scores)
    if weights is None:
        weights = np.ones(len(scores))
    weights = np.asarray(weights, float)
    if weights.shape != (len(scores),):
        raise ValueError(f"--weights: {weights.size} numbers for {len(scores)} files")
    if not np.isfinite(weights).all() or weights.min() < 0 or weights.sum() == 0:
        raise ValueError(f"--weights {weights.tolist()}: must be non-negative and not all 0")
    mean = np.average(scores, axis=0, weights=weights)
    # float32 at least: if files hold half precision, many means would round to the same value
    return mean.astype(np.promote_types(scores.dtype, np.float32))


def fit_weights(scores, labels, rounds=50):
    """Weights (M,) of sum 1 under which scores (M, N, K) have a high mAP on labels (N, K).

    Greedy: each round adds one model to a running sum, the one that gives the highest mAP; a model
    may be added repeatedly. (AP depends on the order of scores alone, so a sum does as well as a
    mean.) The weights say how often each model was added up to and including the best round.
    This is the ensemble selection of Caruana and others (2004). For 10,000 videos, 313 classes and
    seven models it takes 10 seconds.
    """
    scores = np.asarray(scores, float)
    total = np.zeros_like(scores[0])
    counts = np.zeros(len(scores))
    best_map = -1.0
    for _ in range(rounds):
        maps = [evaluate.sample_map(total + own_scores, labels) for own_scores in scores]
        winner = int(np.argmax(maps))  # of equals, the first
        total += scores[winner]
        counts[winner] += 1
        if maps[winner] > best_map:
            best_map = maps[winner]
            best_counts = counts.copy()
    return best_counts / best_counts.sum()


def cross_fit(paths, scores, labels):
    """Scores (N, K): each fifth of the videos is combined by weights fitted to the other four."""
    # a hash of the path, since lists are often sorted by category
    folds = np.array([zlib.crc32(path.encode()) % 5 for path in paths])
    result = combine(scores)  # overwritten fold by fold
    for fold in np.unique(folds):
        in_fold = folds == fold
        if in_fold.all():
            break  # a list of a few videos: none is left to fit to, so the weights stay equal
        weights = fit_weights(scores[:, ~in_fold], labels[~in_fold])
        result[in_fold] = combine(scores[:, in_fold], weights)
    return result


def main():
    args = parse_arguments()
    if int(os.environ.get("RANK", 0)) > 0:  # under torchrun the first process does it all
        return 0

    # scores (M, N, K) and labels (N, K) or None, the videos in the first file's order; metas: what
    # each file says about its run
    paths, scores, labels, metas = align(args.files)
    weights = args.weights
    if args.fit:
        if labels is None:
            raise ValueError(f"--fit: {args.files[0]} has no labels to fit to")
        weights = fit_weights(scores, labels).tolist()
        result = cross_fit(paths, scores, labels)
        print_fit(args.files, scores, labels, weights, result)
    else:
        result = combine(scores, weights)

    note_softmax(metas)  # says it if softmax and sigmoid scores are mixed
    if args.out:
        meta = describe_ensemble(args, weights, metas, result, labels)
        evaluate.save_scores(args.out, paths, result, labels, meta)
    evaluate.print_metrics(result, labels)
    return 0


# ==== Skip on first reading: reading and aligning files, what is printed, flags ===================

# ---- reading and aligning files ------------------------------------------------------------------

def read_scores(name):
    """A scores.npz -> (paths, scores (N, K), labels (N, K) or None, meta). ValueError for any other
    file."""
    with open(name, "rb") as file:
        try:
            arrays = dict(np.load(file))
            paths = arrays["paths"].tolist()
            scores = arrays["scores"]
            meta = dict(json.loads(str(arrays.get("meta", "{}"))))
        except Exception:  # numpy raises many kinds of errors for damaged bytes
            raise ValueError(f"{name}: not a score file of evaluate.py --out") from None
    labels = arrays.get("labels")

    if arrays["paths"].ndim != 1 or not np.issubdtype(scores.dtype, np.number):
        raise ValueError(f"{name}: not a score file of evaluate.py --out")
    if scores.ndim != 2 or len(scores) != len(paths):
        raise ValueError(f"{name}: {len(paths)} paths, but scores {scores.shape}")
    if len(set(paths)) != len(paths):
        raise ValueError(f"{name}: a path appears twice")
    if not np.isfinite(scores).all():
        raise ValueError(f"{name}: a score is not a finite number")
    if labels is not None:
        if labels.shape != scores.shape:
            raise ValueError(f"{name}: labels {labels.shape}, but scores {scores.shape}")
        if not np.isin(labels, (0, 1)).all():
            raise ValueError(f"{name}: a label is not 0 or 1")
    return paths, scores, labels, meta


def note_softmax(metas):
    """Say it if some networks were scored by softmax, and others by sigmoid."""
    softmax = set()
    queue = list(metas)
    while queue:
        meta = queue.pop()
        if isinstance(meta.get("recipe"), dict):  # not in every file of another program
            softmax.add(meta["recipe"].get("loss") == "ce")
        if "members" in meta:  # an ensemble
            queue += [member for member in meta["members"] if isinstance(member, dict)]
    if len(softmax) > 1:
        print("note: some networks were scored by softmax (--loss ce), others by sigmoid; their "
              "probabilities differ in size, so equal weights are not equal shares (see --fit)")


def align(names):
    """Score files -> (paths, scores (M, N, K), labels (N, K) or None, [meta of each file]), all in
    the order of the first file. ValueError where classes, videos or labels differ."""
    first = names[0]
    paths, first_scores, labels, _ = read_scores(first)
    scores = []
    metas = []
    named = []  # files of other programs may not hold the names of the classes
    for name in names:  # the first, too, is compared with the first
        their_paths, their_scores, their_labels, meta = read_scores(name)
        num_classes = their_scores.shape[1]
        if num_classes != first_scores.shape[1]:
            raise ValueError(f"{name}: {num_classes} classes, but {first} has "
                             f"{first_scores.shape[1]}")
        different = sorted(set(paths) ^ set(their_paths))
        if different:
            raise ValueError(f"{name}: not the videos of {first}: {len(different)} are in only one "
                             f"of the two, such as {different[0]}")

        # bring the rows into the first file's order
        row_of = {path: row for row, path in enumerate(their_paths)}
        order = [row_of[path] for path in paths]
        scores.append(their_scores[order])
        metas.append(meta)

        if (labels is None) != (their_labels is None):
            raise ValueError(f"only one of {first} and {name} has labels")
        if labels is not None:
            same = (their_labels[order] == labels).all(axis=1)
            if not same.all():
                raise ValueError(f"{name}: the labels of {(~same).sum()} videos are not those of "
                                 f"{first}, such as {paths[np.argmin(same)]}")
        if "categories" in meta:
            named.append((meta["categories"], name))
            data.compare_categories(*named[0], *named[-1])
    return paths, np.stack(scores), labels, metas


# ---- what is printed and written -----------------------------------------------------------------

def percent(scores, labels):
    return 100 * evaluate.sample_map(scores, labels)


def print_fit(names, scores, labels, weights, cross_fitted):
    """Each model's share in the ensemble, then the mAPs of the whole, in percent."""
    equal = percent(combine(scores), labels)
    print("each file's mAP, how the equal-weight mAP changes without it, its fitted weight:")
    for m, name in enumerate(names):
        change = 0.0
        if len(names) > 1:
            others = np.delete(scores, m, axis=0)
            change = percent(combine(others), labels) - equal
        print(f"{percent(scores[m], labels):6.2f}  {change:+6.2f}  {weights[m]:5.2f}  {name}")
    print(f"equal weights {equal:.2f}   fitted {percent(combine(scores, weights), labels):.2f}   "
          f"cross-fitted {percent(cross_fitted, labels):.2f}")
    print("report the cross-fitted mAP (the last line below): the fitted weights have seen the "
          "labels")
    print(f"for the test list: --weights {' '.join(f'{weight:g}' for weight in weights)}")


def describe_ensemble(args, weights, metas, scores, labels):
    """The meta of the score file that --out writes."""
    meta = dict(
        model="ensemble",
        files=args.files,
        weights=weights,
        cross_fitted=args.fit,
        members=metas,
        classes=scores.shape[1],
        map=None,
    )
    for member in metas:
        if "categories" in member:
            meta["categories"] = member["categories"]
    if labels is not None:
        meta["map"] = evaluate.sample_map(scores, labels)
    return meta


# ---- flags ---------------------------------------------------------------------------------------

def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s FILE.npz ... [--weights W ... | --fit] [--out FILE.npz]   (--help)",
        allow_abbrev=False)
    parser.add_argument("files", nargs="+", metavar="FILE.npz",
                        help="files that evaluate.py --out has written, all for one list")
    weighting = parser.add_mutually_exclusive_group()
    weighting.add_argument("--weights", nargs="+", type=float, metavar="W",
                           help="a number for each file (default: equal)")
    weighting.add_argument("--fit", action="store_true", help="fit the weights to the labels")
    parser.add_argument("--out", metavar="FILE.npz", help="write the result, itself a score file")
    args = parser.parse_args()
    if args.out:
        evaluate.check_output(args.out)
    return args


if __name__ == "__main__":
    data.run_script(main)
