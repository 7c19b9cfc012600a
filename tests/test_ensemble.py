"""An ensemble is the weighted mean of its files' probabilities, matched by path. Weights are fitted
by a greedy search. For the cross-fitted mAP each video is scored with weights that have not seen
it. Files that do not go together are refused, and the message names a difference.

    python -m pytest tests/test_ensemble.py

Other bad input is in test_bad_input.py.
"""
import json
import os

import numpy as np
import pytest

import ensemble
import evaluate
from conftest import call, close

# Two videos, each labelled with one of three classes, and the scores of three models. The comments
# give each video's average precision.
PATHS = ["first", "second"]
LABELS = np.array([[1, 0, 0], [0, 1, 0]], np.uint8)
A = np.array([[0.45, 0.05, 0.0], [0.3, 0.2, 0.0]], np.float32)  # 1, 1/2
B = np.array([[0.2, 0.3, 0.0], [0.05, 0.45, 0.0]], np.float32)  # 1/2, 1
C = np.array([[0.0, 1.0, 1.0], [1.0, 0.0, 1.0]], np.float32)    # 1/3, 1/3


# ---- the mean and the fit ------------------------------------------------------------------------

def test_the_mean_of_half_precision_scores_is_finer():
    """Between these two lies no number of half precision."""
    low = np.array([[0.5]], np.float16)
    high = np.array([[0.5005]], np.float16)
    assert low < ensemble.combine([low, high]) < high


def test_the_weights_are_those_of_the_best_round():
    """Each round of the search adds the model that makes the mean best. Round 1 takes A (the
    earliest of equals), round 2 takes B: their mean ranks both labels first. Round 3 is no better,
    so the weights are those after round 2."""
    assert ensemble.fit_weights([A, B, A, C], LABELS, rounds=3).tolist() == [1 / 2, 1 / 2, 0, 0]


def naive_greedy(scores, labels, rounds):
    """A model may be chosen again. Its weight is its share of the choices up to the best round."""
    chosen = []
    best_map = -1
    for _ in range(rounds):
        maps = []
        for m in range(len(scores)):
            maps.append(evaluate.sample_map(scores[[*chosen, m]].mean(axis=0), labels))
        chosen.append(np.argmax(maps))
        if max(maps) > best_map:
            best_map = max(maps)
            counts = np.bincount(chosen, minlength=len(scores))
    return counts / counts.sum()


def test_weights_are_those_of_the_naive_search():
    """Of three models: labels plus ever more noise, rounded so that scores tie."""
    rng = np.random.default_rng(0)
    labels = (rng.random((60, 12)) < 0.2).astype(int)
    noise = rng.normal(size=(3, 60, 12)) * [[[1.0]], [[1.2]], [[1.6]]]
    scores = np.round(labels + noise, 1)
    weights = ensemble.fit_weights(scores, labels, rounds=15)
    close(weights, naive_greedy(scores, labels, 15), 1e-12)
    assert (weights > 0).sum() > 1  # more than one is chosen


def test_cross_fitted_weights_have_not_seen_the_video():
    """A hash of the path divides the videos into fifths; "first" and "fourth" are in the same. So
    their weights are fitted to "second" alone, where B is best. Those of "second" are fitted to the
    other two, where A is best."""
    # "fourth" is a copy of "first"
    scores = np.array([A, B])[:, [0, 1, 0]]
    result = ensemble.cross_fit(["first", "second", "fourth"], scores, LABELS[[0, 1, 0]])
    close(result, np.array([B[0], A[1], B[0]]), 1e-6)


def test_a_single_video_gets_equal_weights():
    """There is no other to fit to."""
    scores = np.array([A, B])[:, :1]
    close(ensemble.cross_fit(PATHS[:1], scores, LABELS[:1]), [[0.325, 0.175, 0]], 1e-6)


# ---- the script ----------------------------------------------------------------------------------

def write_scores(name, scores, labels=LABELS, paths=PATHS, meta={}):
    """A score file in the working folder."""
    arrays = {"paths": np.array(paths), "scores": scores, "meta": json.dumps(meta)}
    if labels is not None:
        arrays["labels"] = labels
    np.savez(name, **arrays)


def read_scores(name):
    """A score file as a dict, and its meta."""
    file = dict(np.load(name))
    return file, json.loads(str(file["meta"]))


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run(*arguments, status=0) -> the lines that ensemble.py prints, those on stderr last. The
    working folder is tmp_path, with the models' files a.npz, b.npz and c.npz."""
    monkeypatch.chdir(tmp_path)
    for name, scores in (("a.npz", A), ("b.npz", B), ("c.npz", C)):
        write_scores(name, scores, meta={"model": name, "categories": ["run", "jump", "swim"]})

    def run(*arguments, status=0):
        assert call("ensemble", *arguments) == status
        return "".join(capsys.readouterr()).splitlines()

    return run


def test_the_result_is_itself_a_score_file(run):
    """The mean of two models counts twice beside a third: that is the mean of the three."""
    run("a.npz", "b.npz", "--out", "pair")
    file, meta = read_scores("pair")
    assert (file["scores"].dtype, file["labels"].dtype) == (np.float32, np.uint8)
    assert meta["files"] == ["a.npz", "b.npz"]
    assert meta["categories"] == ["run", "jump", "swim"]
    assert [member["model"] for member in meta["members"]] == ["a.npz", "b.npz"]

    lines = run("pair", "c.npz", "--weights", 2, 1, "--out", "three.npz")
    file, meta = read_scores("three.npz")
    close(file["scores"], (A + B + C) / 3, 1e-6)
    assert meta["map"] == pytest.approx(1 / 3)  # C's large scores put every label last
    assert lines[-1] == "mAP 33.33"


def test_fit_prints_what_each_model_gives(run):
    """Its mAP, what the mean of all gains without it, and its fitted weight. Without C the mean
    ranks the labels first, in place of last."""
    lines = run("a.npz", "b.npz", "c.npz", "--fit", "--out", "fitted.npz")
    assert [line.split() for line in lines[1:4]] == [
        ["75.00", "+0.00", "0.50", "a.npz"],
        ["75.00", "+0.00", "0.50", "b.npz"],
        ["33.33", "+66.67", "0.00", "c.npz"],
    ]
    assert lines[4].split() == "equal weights 33.33 fitted 100.00 cross-fitted 50.00".split()

    # the cross-fitted scores are written: each video gets the model that is better at the other
    assert lines[-1] == "mAP 50.00"
    file, meta = read_scores("fitted.npz")
    close(file["scores"], np.array([B[0], A[1]]), 1e-6)
    assert meta["weights"] == [0.5, 0.5, 0]  # fitted to both

    # the printed flags, pasted
    flags = "--weights 0.5 0.5 0"
    assert lines[6].endswith(flags)
    assert run("a.npz", "b.npz", "c.npz", *flags.split())[-1] == "mAP 100.00"


def test_a_single_model_has_all_the_weight(run):
    assert run("a.npz", "--fit")[1].split() == ["75.00", "+0.00", "1.00", "a.npz"]


def test_files_without_labels_are_averaged_without_a_map(run):
    write_scores("test.npz", A, labels=None)
    [line] = run("test.npz", "test.npz", "--out", "out.npz")
    assert "no mAP" in line
    file, _ = read_scores("out.npz")
    assert "labels" not in file
    close(file["scores"], A, 1e-6)


def test_softmax_beside_sigmoid_is_noted(run):
    """Also among the members of an ensemble."""
    for name, loss in [("softmax.npz", "ce"), ("sigmoid.npz", "bce")]:
        write_scores(name, A, meta={"recipe": {"loss": loss}})
    assert "softmax" not in run("softmax.npz", "softmax.npz", "--out", "pair.npz")[0]
    assert "by softmax (--loss ce), others by sigmoid" in run("pair.npz", "sigmoid.npz")[0]


def test_only_the_first_process_prints_and_writes(run, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert call("ensemble", "a.npz", "b.npz", "--out", "out.npz") == 0
    assert capsys.readouterr() == ("", "")
    assert not os.path.exists("out.npz")


# ---- reading and aligning files ------------------------------------------------------------------

def test_the_order_of_rows_does_not_matter(run):
    write_scores("reversed.npz", A[::-1], LABELS[::-1], PATHS[::-1])
    run("a.npz", "reversed.npz", "--out", "out.npz")
    file, _ = read_scores("out.npz")
    assert file["paths"].tolist() == PATHS
    assert file["labels"].tolist() == LABELS.tolist()
    close(file["scores"], A, 1e-6)


@pytest.mark.parametrize("changes, message", [
    # files that do not go together
    (dict(paths=["first", "third"]), "2 are in only one of the two, such as second"),
    (dict(labels=LABELS[::-1]), "the labels of 2 videos are not those of a.npz, such as first"),

    # arrays that do not fit each other, or hold no scores and labels
    (dict(paths=["first", "first"]), "a path appears twice"),
    (dict(labels=LABELS[:1]), "labels (1, 3), but scores (2, 3)"),
    (dict(scores=B[:1]), "2 paths, but scores (1, 3)"),
    (dict(scores=B + np.inf), "a score is not a finite number"),
    (dict(labels=2 * LABELS), "a label is not 0 or 1"),

    # files of other programs
    (dict(paths=np.array(PATHS, object)), "not a score file"),  # a pickle: it is not loaded
    (dict(scores=B.astype(str)), "not a score file"),
    (dict(meta=[1]), "not a score file"),
])
def test_a_file_that_does_not_fit_is_refused(run, changes, message):
    write_scores("b.npz", **{"scores": B, **changes})
    [error] = run("a.npz", "b.npz", status=2)
    assert "b.npz" in error
    assert message in error


def test_names_are_compared_where_both_files_hold_them(run):
    """A file of another program may hold none: then an equal number of classes suffices."""
    write_scores("foreign.npz", B)
    assert run("foreign.npz", "a.npz")[-1] == "mAP 100.00"
    write_scores("other.npz", B, meta={"categories": ["run", "jump", "dive"]})
    [error] = run("foreign.npz", "a.npz", "other.npz", status=2)
    assert "class 2 is 'swim' in a.npz, but 'dive' in other.npz" in error
