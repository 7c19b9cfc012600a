"""An ensemble is the weighted mean of its files' probabilities, matched by path. The fitted weights
are those of the naive greedy search. The cross-fitted mAP is that of videos which the weights have
not seen. Files that do not go together are refused with the difference.

    python -m pytest tests/test_ensemble.py

The tests follow ensemble.py from top to bottom. Other bad input is in test_bad_input.py.
"""
import json
import os
import zlib

import numpy as np
import pytest

import ensemble
import evaluate
from conftest import call, close

# Two videos, each with one of three classes as its label. The first model ranks the label of the
# first video first and that of the second video second: AP 1 and 1/2. For the second model it is
# the other way round. The third ranks every label last: AP 1/3.
PATHS = ["first", "second"]
LABELS = np.array([[1, 0, 0], [0, 1, 0]], np.uint8)
A = np.array([[0.45, 0.05, 0.0], [0.3, 0.2, 0.0]], np.float32)
B = np.array([[0.2, 0.3, 0.0], [0.05, 0.45, 0.0]], np.float32)
C = np.array([[0.0, 1.0, 1.0], [1.0, 0.0, 1.0]], np.float32)


# ---- the mean ------------------------------------------------------------------------------------

def test_weights_of_a_mean_are_proportions():
    close(ensemble.combine([A, C]), [[0.225, 0.525, 0.5], [0.65, 0.1, 0.5]], 1e-6)
    close(ensemble.combine([A, C], [3, 1])[0], [0.3375, 0.2875, 0.25], 1e-6)


def test_the_mean_of_half_precision_is_in_single():
    """In half precision the means of several models would tie."""
    assert ensemble.combine([A.astype(np.float16)]).dtype == np.float32


# ---- fitting -------------------------------------------------------------------------------------

def test_two_models_that_help_each_other_get_equal_weights():
    """The mean of A and B ranks both labels first. The search takes the first of equals, A, and
    then B. A third round is no better, and the first of equally good ones counts."""
    assert ensemble.fit_weights([A, B, A, C], LABELS, rounds=3).tolist() == [1 / 2, 1 / 2, 0, 0]


def naive_greedy(scores, labels, rounds):
    """The definition: every candidate's mean is formed and ranked from the start."""
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


@pytest.fixture
def three_models():
    """Labels of 60 videos, (60, 12), and three models that see them through more and more noise."""
    rng = np.random.default_rng(0)
    labels = (rng.random((60, 12)) < 0.2).astype(int)
    noise = rng.normal(size=(3, 60, 12)) * [[[1.0]], [[1.2]], [[1.6]]]
    return labels, np.round(labels + noise, 1)  # rounded, so that scores tie


def test_weights_are_those_of_the_naive_search(three_models):
    labels, scores = three_models
    weights = ensemble.fit_weights(scores, labels, rounds=15)
    close(weights, naive_greedy(scores, labels, 15), 1e-12)
    assert (weights > 0).sum() > 1


def test_cross_fitted_weights_have_not_seen_the_video(three_models):
    labels, scores = three_models
    paths = [f"video {i}" for i in range(60)]
    result = ensemble.cross_fit(paths, scores, labels)
    folds = np.array([zlib.crc32(path.encode()) % 5 for path in paths])
    for fold in range(5):
        seen = folds != fold
        weights = ensemble.fit_weights(scores[:, seen], labels[seen])
        close(result[~seen], ensemble.combine(scores[:, ~seen], weights), 1e-12)


def test_where_no_other_video_is_left_the_weights_are_equal():
    scores = np.array([A, B])[:, :1]
    close(ensemble.cross_fit(PATHS[:1], scores, LABELS[:1]), scores.mean(axis=0), 1e-6)


# ---- the script ----------------------------------------------------------------------------------

def write(name, scores, labels=LABELS, paths=PATHS, meta={}):
    """A score file in the working folder."""
    arrays = {"paths": np.array(paths), "scores": scores, "meta": json.dumps(meta)}
    if labels is not None:
        arrays["labels"] = labels
    np.savez(name, **arrays)


def read(name):
    """A score file as a dict, and its meta."""
    file = dict(np.load(name))
    return file, json.loads(str(file["meta"]))


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run(*arguments) -> (exit status, lines on stdout, lines on stderr) of ensemble.py. The
    working folder is tmp_path, with the models' files a.npz, b.npz and c.npz."""
    monkeypatch.chdir(tmp_path)
    for name, scores in (("a.npz", A), ("b.npz", B), ("c.npz", C)):
        write(name, scores, meta={"model": name, "categories": ["run", "jump", "swim"]})

    def run(*arguments):
        status = call("ensemble", *arguments)
        captured = capsys.readouterr()
        return status, captured.out.splitlines(), captured.err.splitlines()

    return run


def test_the_result_is_itself_a_score_file(run):
    """The mean of two models counts twice beside a third: that is the mean of the three."""
    run("a.npz", "b.npz", "--out", "pair")
    file, meta = read("pair")
    assert (file["scores"].dtype, file["labels"].dtype) == (np.float32, np.uint8)
    assert meta["files"] == ["a.npz", "b.npz"]
    assert meta["categories"] == ["run", "jump", "swim"]
    assert [member["model"] for member in meta["members"]] == ["a.npz", "b.npz"]

    _, lines, _ = run("pair", "c.npz", "--weights", 2, 1, "--out", "three.npz")
    file, meta = read("three.npz")
    close(file["scores"], ensemble.combine([A, B, C]), 1e-6)
    assert meta["map"] == pytest.approx(1 / 3)
    assert lines[-1] == "mAP 33.33"


def test_fit_prints_and_writes(run):
    """Each model's mAP, how the mean of all improves without it, and its weight. Without C the mean
    ranks the labels first, in place of last.

    Weights that are fitted to one video of the two choose the model that is worse on the other.
    """
    _, lines, _ = run("a.npz", "b.npz", "c.npz", "--fit", "--out", "fitted.npz")
    assert [line.split() for line in lines[1:4]] == [
        ["75.00", "+0.00", "0.50", "a.npz"],
        ["75.00", "+0.00", "0.50", "b.npz"],
        ["33.33", "+66.67", "0.00", "c.npz"],
    ]
    assert lines[4].split() == "equal weights 33.33 fitted 100.00 cross-fitted 50.00".split()
    assert lines[-1] == "mAP 50.00"
    file, meta = read("fitted.npz")
    close(file["scores"], np.array([B[0], A[1]]), 1e-6)
    assert meta["weights"] == [0.5, 0.5, 0]

    # the printed weights, pasted: the ensemble of the test list
    flags = "--weights 0.5 0.5 0"
    assert lines[6].endswith(flags)
    assert run("a.npz", "b.npz", "c.npz", *flags.split())[1][-1] == "mAP 100.00"


def test_a_single_model_has_all_the_weight(run):
    _, lines, _ = run("a.npz", "--fit")
    assert lines[1].split() == ["75.00", "+0.00", "1.00", "a.npz"]


def test_a_test_list_has_no_labels(run):
    write("test.npz", A, labels=None)
    _, [line], _ = run("test.npz", "test.npz", "--out", "out.npz")
    assert "no mAP" in line
    file, _ = read("out.npz")
    assert "labels" not in file
    close(file["scores"], A, 1e-6)


def test_softmax_beside_sigmoid_is_said(run):
    """Also where one of them is inside an ensemble."""
    for name, loss in (("a.npz", "ce"), ("b.npz", "ce"), ("c.npz", "bce")):
        write(name, A, meta={"recipe": {"loss": loss}})
    _, lines, _ = run("a.npz", "b.npz", "--out", "pair.npz")
    assert "softmax" not in lines[0]
    for first in ("a.npz", "pair.npz"):
        _, lines, _ = run(first, "c.npz")
        assert "by softmax (--loss ce), others by sigmoid" in lines[0]


def test_only_the_first_process_works(run, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert run("a.npz", "b.npz", "--out", "out.npz") == (0, [], [])
    assert not os.path.exists("out.npz")


# ---- reading and aligning files ------------------------------------------------------------------

def test_the_order_of_rows_does_not_matter(run):
    write("reversed.npz", B[::-1], LABELS[::-1], PATHS[::-1])
    paths, scores, labels, _ = ensemble.align(["a.npz", "reversed.npz"])
    assert paths == PATHS
    assert np.array_equal(scores, [A, B])
    assert np.array_equal(labels, LABELS)


@pytest.mark.parametrize("second, message", [
    # files that do not go together
    (dict(paths=["first", "third"]), "2 are in only one of the two, such as second"),
    (dict(labels=LABELS[::-1]), "the labels of 2 videos are not those of a.npz, such as first"),

    # a file that does not go with itself
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
def test_a_file_that_does_not_fit_is_refused(run, second, message):
    write("b.npz", **{"scores": B, **second})
    status, lines, [error] = run("a.npz", "b.npz")
    assert (status, lines) == (2, [])
    assert "b.npz" in error
    assert message in error


def test_names_are_compared_where_both_files_hold_them(run):
    """A file of another program may hold none. Then equal numbers of classes have to do."""
    write("foreign.npz", B)
    assert run("foreign.npz", "a.npz")[0] == 0
    write("other.npz", B, meta={"categories": ["run", "jump", "dive"]})
    _, _, [error] = run("foreign.npz", "a.npz", "other.npz")
    assert "class 2 is 'swim' in a.npz, but 'dive' in other.npz" in error
