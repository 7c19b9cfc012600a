"""An ensemble is the weighted mean of its files' probabilities, matched by path. The fitted weights
are those of the naive greedy search. The cross-fitted mAP is that of videos which the weights have
not seen. Files that do not go together are refused with the difference.

    python -m pytest tests/test_ensemble.py

The tests follow ensemble.py from top to bottom. Other bad input is in test_bad_input.py.
"""
import json
import re
import zlib
from pathlib import Path

import numpy as np
import pytest

import ensemble
import evaluate
from conftest import call, close

# ---- the mean ------------------------------------------------------------------------------------

def test_the_mean_of_two_models():
    """One video, two classes. Weights are proportions: 3 and 1 are 3/4 and 1/4."""
    scores = np.array([[[0.2, 0.6]], [[0.4, 1.0]]], np.float32)
    close(ensemble.combine(scores), [[0.3, 0.8]], 1e-6)
    close(ensemble.combine(scores, [3, 1]), [[0.25, 0.7]], 1e-6)


# three models that see the labels of 60 videos through more and more noise
N = 60
K = 12
PATHS = [f"category/video_{i}" for i in range(N)]
CLASSES = [f"class {k}" for k in range(K)]
rng = np.random.default_rng(0)
LABELS = (rng.random((N, K)) < 0.1).astype(np.uint8)
LABELS[np.arange(N), rng.integers(K, size=N)] = 1  # every video has a label
NOISE = np.array([1.0, 1.2, 1.6]).reshape(3, 1, 1)
MODELS = 1 / (1 + np.exp(2 - 2.0 * LABELS - NOISE * rng.normal(size=(3, N, K))))
MODELS = MODELS.astype(np.float32)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_copies_of_a_model_are_the_model(dtype):
    """Half precision becomes float32: the mean of several models would tie in it."""
    scores = MODELS[0].astype(dtype)
    mean = ensemble.combine([scores] * 3)
    assert mean.dtype == np.promote_types(dtype, np.float32)
    np.testing.assert_allclose(mean, scores, rtol=1e-15)


@pytest.mark.parametrize("weights", [[0, 0, 0], [1, np.nan, 1]])
def test_weights_without_a_mean_are_refused(weights):
    with pytest.raises(ValueError, match="--weights"):
        ensemble.combine(MODELS, weights)


# ---- fitting -------------------------------------------------------------------------------------

def test_two_models_that_help_each_other_get_equal_weights():
    """Each ranks the label of one video first and that of the other video last, but not by much:
    AP 1 and 1/2, so mAP 3/4. Their mean ranks both labels first. The search takes the first of
    equals, then the other, and no later round is better than these two."""
    labels = np.array([[1, 0], [1, 0]])
    scores = np.array([[[0.9, 0.1], [0.4, 0.6]],
                       [[0.4, 0.6], [0.9, 0.1]]])
    assert ensemble.fit_weights(scores, labels).tolist() == [1 / 2, 1 / 2]


def naive_greedy(scores, labels, rounds):
    """The definition: every candidate's mean is formed and ranked from the start."""
    chosen = []
    best_map = -1
    for _ in range(rounds):
        maps = []
        for m in range(len(scores)):
            mean = np.mean([scores[i].astype(float) for i in [*chosen, m]], axis=0)
            maps.append(evaluate.sample_map(mean, labels))
        chosen.append(maps.index(max(maps)))  # the first of equals
        if max(maps) > best_map:
            best_map = max(maps)
            best = list(chosen)
    return np.bincount(best, minlength=len(scores)) / len(best)


def test_weights_are_those_of_the_naive_search():
    """Also where scores tie, and where a video has no label or all."""
    scores = np.round(MODELS * 8) / 8
    labels = LABELS.copy()
    labels[:3] = 0
    labels[3:6] = 1
    weights = ensemble.fit_weights(scores, labels, rounds=15)
    close(weights, naive_greedy(scores, labels, 15), 1e-12)
    assert (weights > 0).sum() > 1


def test_the_first_of_equal_models_and_of_equal_rounds_wins():
    """The second and the third model are perfect, so that no later round is better."""
    scores = np.stack([MODELS[1], LABELS, LABELS])
    assert ensemble.fit_weights(scores, LABELS).tolist() == [0, 1, 0]


def test_cross_fitted_weights_have_not_seen_the_video():
    scores = ensemble.cross_fit(PATHS, MODELS, LABELS)
    folds = np.array([zlib.crc32(path.encode()) % 5 for path in PATHS])
    for fold in range(5):
        seen = folds != fold
        weights = ensemble.fit_weights(MODELS[:, seen], LABELS[seen])
        close(scores[~seen], np.average(MODELS[:, ~seen], axis=0, weights=weights), 1e-6)


def test_where_no_other_video_is_left_the_weights_are_equal():
    scores = ensemble.cross_fit(PATHS[:1], MODELS[:, :1], LABELS[:1])
    close(scores, MODELS[:, :1].mean(axis=0), 1e-6)


# ---- the script ----------------------------------------------------------------------------------

FILES = ["a.npz", "b.npz", "c.npz"]


def write(name, scores, labels=LABELS, paths=PATHS, meta="{}"):
    """A score file in the working folder. meta: a JSON text."""
    arrays = {"paths": np.array(paths), "scores": scores, "meta": meta}
    if labels is not None:
        arrays["labels"] = labels
    np.savez(name, **arrays)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run(*arguments) -> (exit status, lines on stdout, lines on stderr) of ensemble.py. The
    working folder is tmp_path, with the models' files a.npz, b.npz and c.npz."""
    monkeypatch.chdir(tmp_path)
    for name, scores in zip(FILES, MODELS):
        write(name, scores, meta=json.dumps({"model": name, "categories": CLASSES}))

    def run(*arguments):
        status = call("ensemble", *arguments)
        captured = capsys.readouterr()
        return status, captured.out.splitlines(), captured.err.splitlines()

    return run


def percent(scores):
    return f"{100 * evaluate.sample_map(scores, LABELS):.2f}"


def test_the_result_is_itself_a_score_file(run):
    """The mean of two models counts twice beside a third: that is the mean of the three."""
    first = run("a.npz", "b.npz", "--out", "pair")
    assert first == run("pair")
    assert run("pair", "c.npz", "--weights", 2, 1)[1] == run(*FILES)[1]

    file = np.load("pair")
    assert (file["scores"].dtype, file["labels"].dtype) == (np.float32, np.uint8)
    meta = json.loads(str(file["meta"]))
    assert meta["files"] == ["a.npz", "b.npz"]
    assert meta["categories"] == CLASSES
    assert [member["model"] for member in meta["members"]] == ["a.npz", "b.npz"]


def test_fit_prints_and_writes(run):
    status, lines, _ = run(*FILES, "--fit", "--out", "fitted.npz")
    assert status == 0
    weights = ensemble.fit_weights(MODELS, LABELS)
    equal = MODELS.mean(axis=0)
    fitted = ensemble.combine(MODELS, weights)
    held_out = ensemble.cross_fit(PATHS, MODELS, LABELS)

    # the noisiest model: its mAP, what the mean loses or gains without it, its weight
    own, change, weight, name = lines[3].split()
    without = MODELS[:2].mean(axis=0)
    gain = evaluate.sample_map(without, LABELS) - evaluate.sample_map(equal, LABELS)
    assert (own, change, name) == (percent(MODELS[2]), f"{100 * gain:+.2f}", "c.npz")
    assert weight == f"{weights[2]:.2f}"

    # the mAP of equal, fitted and cross-fitted weights; the last is the one to report
    figures = re.findall(r"\d+\.\d\d", lines[4])
    assert figures == [percent(equal), percent(fitted), percent(held_out)]
    assert lines[-1] == f"mAP {figures[2]}"
    file = np.load("fitted.npz")
    assert np.array_equal(file["scores"], held_out)
    assert json.loads(str(file["meta"]))["weights"] == weights.tolist()

    # the printed weights, pasted: the ensemble of the test list
    pasted = re.search(r"--weights( [\d.]+){3}$", lines[6])[0]
    run(*FILES, *pasted.split(), "--out", "pasted.npz")
    np.testing.assert_allclose(np.load("pasted.npz")["scores"], fitted, rtol=1e-5)


def test_a_single_model_has_all_the_weight(run):
    _, lines, _ = run("a.npz", "--fit")
    assert lines[1].split() == [percent(MODELS[0]), "+0.00", "1.00", "a.npz"]


def test_a_test_list_has_no_labels(run):
    for name, scores in zip(FILES, MODELS):
        write(name, scores, labels=None)
    _, [line], _ = run(*FILES, "--weights", 1, 0, 0, "--out", "out.npz")
    assert "no mAP" in line
    file = np.load("out.npz")
    assert "labels" not in file
    assert np.array_equal(file["scores"], MODELS[0])


def test_softmax_beside_sigmoid_is_said(run):
    """Also where one of them is inside an ensemble."""
    for name, loss in (("a.npz", "ce"), ("b.npz", "ce"), ("c.npz", "bce")):
        write(name, MODELS[0], meta=json.dumps({"recipe": {"loss": loss}}))
    _, lines, _ = run("a.npz", "b.npz", "--out", "pair.npz")
    assert "softmax" not in "".join(lines)
    for first in ("a.npz", "pair.npz"):
        _, lines, _ = run(first, "c.npz")
        assert "by softmax (--loss ce), others by sigmoid" in lines[0]


def test_only_the_first_process_works(run, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert run(*FILES, "--out", "out.npz") == (0, [], [])
    assert not Path("out.npz").exists()


# ---- reading and aligning files ------------------------------------------------------------------

def test_the_order_of_rows_does_not_matter(run):
    order = np.random.default_rng(1).permutation(N)
    write("shuffled.npz", MODELS[1][order], LABELS[order], np.array(PATHS)[order])
    paths, scores, labels, _ = ensemble.align(["a.npz", "shuffled.npz"])
    assert paths == PATHS
    assert np.array_equal(scores, MODELS[:2])
    assert np.array_equal(labels, LABELS)


@pytest.mark.parametrize("second, message", [
    # files that do not go together
    (dict(paths=[*PATHS[:-1], "another"]), "2 are in only one of the two, such as another"),
    (dict(labels=0 * LABELS), "the labels of 60 videos are not those of a.npz, such as category"),

    # a file that does not go with itself
    (dict(paths=[*PATHS[:-1], PATHS[0]]), "a path appears twice"),
    (dict(labels=LABELS[:5]), "labels (5, 12), but scores (60, 12)"),
    (dict(scores=MODELS[1][:5]), "60 paths, but scores (5, 12)"),
    (dict(scores=np.full((N, K), np.inf)), "a score is not a finite number"),
    (dict(labels=2 * LABELS), "a label is not 0 or 1"),

    # files of other programs
    (dict(paths=np.array(PATHS, object)), "not a score file"),  # a pickle: it is not loaded
    (dict(scores=MODELS[1].astype(str)), "not a score file"),
    (dict(meta="[1]"), "not a score file"),
])
def test_a_file_that_does_not_fit_is_refused(run, second, message):
    write("b.npz", **{"scores": MODELS[1], **second})
    status, lines, [error] = run("a.npz", "b.npz")
    assert (status, lines) == (2, [])
    assert "b.npz" in error
    assert message in error


def test_names_are_compared_where_both_files_hold_them(run):
    """A file of another program may hold none. Then equal numbers of classes have to do."""
    write("foreign.npz", MODELS[1])
    assert run("foreign.npz", "a.npz")[0] == 0

    names = [*CLASSES[:-1], "another"]
    write("other.npz", MODELS[1], meta=json.dumps({"categories": names}))
    _, _, [error] = run("foreign.npz", "a.npz", "other.npz")
    assert "class 11 is 'class 11' in a.npz, but 'another' in other.npz" in error
