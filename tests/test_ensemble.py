"""An ensemble is the weighted mean of its files' probabilities, matched by path. The fitted weights
are those of the naive greedy search. The cross-fitted mAP is that of videos which the weights have
not seen. Files that do not go together are refused with the difference.

    python -m pytest tests/test_ensemble.py

The small examples by hand come first, then the tests follow ensemble.py from top to bottom.
"""
import json
import re
import zlib
from pathlib import Path

import numpy as np
import pytest

import ensemble
import evaluate
from conftest import ROOT, call, close

METRICS = dict(np.load(ROOT / "tests" / "golden" / "metrics.npz"))


# ---- by hand


def test_the_mean_of_two_models():
    """One video, two classes."""
    scores = np.array([[[0.2, 0.6]], [[0.4, 1.0]]], np.float32)
    close(ensemble.combine(scores), [[0.3, 0.8]], 1e-6)
    close(ensemble.combine(scores, [3, 1]), [[0.25, 0.7]], 1e-6)
    close(ensemble.combine(scores, [0, 5]), [[0.4, 1.0]], 1e-6)


def test_two_models_that_help_each_other_get_equal_weights():
    """Each ranks the label of one video first and that of the other video last, but not by much:
    AP 1 and 1/2, so mAP 3/4. Their mean ranks both labels first. The search takes the first of
    equals, then the other, and no later round is better than these two."""
    labels = np.array([[1, 0], [1, 0]])
    scores = np.array([[[0.9, 0.1], [0.4, 0.6]],
                       [[0.4, 0.6], [0.9, 0.1]]])
    assert [evaluate.sample_map(model, labels) for model in scores] == [3 / 4, 3 / 4]
    assert ensemble.fit_weights(scores, labels).tolist() == [1 / 2, 1 / 2]
    assert evaluate.sample_map(ensemble.combine(scores), labels) == 1


# ---- files

N, K = 60, 12
PATHS = [f"category/video_{i}" for i in range(N)]
CLASSES = [f"class {k}" for k in range(K)]


def draw_labels(seed, videos):
    """0/1 (videos, K), at least one label each."""
    rng = np.random.default_rng(seed)
    labels = (rng.random((videos, K)) < 0.1).astype(np.uint8)
    labels[np.arange(videos), rng.integers(K, size=videos)] = 1
    return labels


def draw_scores(labels, noise, seed):
    """The probabilities of a model that sees the labels through noise."""
    logits = 2.0 * labels - 2 + noise * np.random.default_rng(seed).normal(size=labels.shape)
    return (1 / (1 + np.exp(-logits))).astype(np.float32)


LABELS = draw_labels(0, N)
MODELS = np.stack([draw_scores(LABELS, 1.0, 0), draw_scores(LABELS, 1.2, 1),
                   draw_scores(LABELS, 1.6, 2)])


def write(name, scores, labels=LABELS, paths=PATHS, **meta):
    """A score file in the working folder."""
    arrays = {"paths": np.array(paths), "scores": scores, "meta": json.dumps(meta)}
    if labels is not None:
        arrays["labels"] = labels
    np.savez(name, **arrays)
    return name


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run(*arguments) -> (exit status, lines on stdout, lines on stderr) of ensemble.py. The
    working folder is tmp_path, with the models' files a.npz, b.npz and c.npz."""
    monkeypatch.chdir(tmp_path)
    for name, scores in zip("abc", MODELS):
        write(f"{name}.npz", scores, model=name, categories=CLASSES)

    def run(*arguments):
        status = call("ensemble", *arguments)
        captured = capsys.readouterr()
        return status, captured.out.splitlines(), captured.err.splitlines()

    return run


FILES = ["a.npz", "b.npz", "c.npz"]


@pytest.mark.parametrize("case", [0, 1, 4, 13, 15])
def test_one_file_has_the_figures_of_scikit_learn(run, case):
    """Its average="macro" is the class-level mAP. Cases 4 and 15 have videos without labels."""
    scores = METRICS[f"scores_{case}"]
    write("one.npz", scores, METRICS[f"labels_{case}"], [f"v{i}" for i in range(len(scores))])
    status, [*first, second, last], _ = run("one.npz")
    assert status == 0
    assert last == f"mAP {100 * METRICS[f'sklearn_{case}']:.2f}"
    assert f"class-level mAP {100 * METRICS[f'macro_{case}']:.2f}," in second
    assert len(first) == (case in (4, 15))
    for line in first:
        assert f"{100 * METRICS[f'positive_rows_{case}']:.2f}" in line


def changed(array, place, value):
    array = np.array(array)
    array[place] = value
    return array


@pytest.mark.parametrize("second, message", [
    (dict(scores=MODELS[1][:, :11], labels=LABELS[:, :11]), "11 classes, but a.npz has 12"),
    (dict(scores=MODELS[1][:58], labels=LABELS[:58], paths=PATHS[:58]),
     "2 are in only one of the two, such as category/video_58"),
    (dict(paths=[*PATHS[:-1], "another"]), "2 are in only one of the two, such as another"),
    (dict(labels=changed(LABELS, 7, 1)), "the labels of 1 videos are not those of a.npz, such as "
                                         "category/video_7"),
    (dict(labels=None), "only one of a.npz and b.npz has labels"),
    (dict(categories=[*CLASSES[:2], CLASSES[3], CLASSES[2], *CLASSES[4:]]),
     "class 2 is 'class 2' in a.npz, but 'class 3' in b.npz"),
    (dict(paths=[*PATHS[:-1], PATHS[0]]), "a path appears twice"),
    (dict(labels=LABELS[:, :5]), "labels (60, 5), but scores (60, 12)"),
    (dict(scores=MODELS[1][:, 0]), "60 paths, but scores (60,)"),
    (dict(scores=changed(MODELS[1], (3, 4), np.inf)), "a score is not a finite number"),
    (dict(labels=changed(LABELS, (3, 4), 2)), "a label is not 0 or 1"),
])
def test_files_that_do_not_go_together(run, second, message):
    write("b.npz", **{"scores": MODELS[1], "categories": CLASSES, **second})
    status, lines, [error] = run("a.npz", "b.npz", "--out", "out.npz")
    assert status == 2 and lines == []
    assert "b.npz" in error and message in error
    assert not Path("out.npz").exists()


def test_names_are_compared_where_both_files_hold_them(run):
    """A file of another program may hold none: then the number of classes must do."""
    swapped = [*CLASSES[:2], CLASSES[3], CLASSES[2], *CLASSES[4:]]
    write("foreign.npz", MODELS[1])
    write("swapped.npz", MODELS[1], categories=swapped)
    assert run("a.npz", "foreign.npz")[0] == run("foreign.npz", "a.npz")[0] == 0
    status, _, [error] = run("foreign.npz", "a.npz", "swapped.npz")
    assert status == 2
    assert "class 2 is 'class 2' in a.npz, but 'class 3' in swapped.npz" in error


@pytest.mark.parametrize("second", [
    dict(paths=np.array(PATHS, object)),  # a pickle
    dict(paths=np.array(PATHS)[:, None]),  # a table
    dict(scores=MODELS[0].astype(str)),
    dict(meta="[1]"),
    "text",
])
def test_other_files(run, second):
    if second == "text":
        Path("bad.npz").write_text("path,score_0\n")
    else:
        arrays = {"paths": np.array(PATHS), "scores": MODELS[0], "meta": "{}", **second}
        np.savez("bad.npz", **arrays)
    status, lines, [error] = run("a.npz", "bad.npz")
    assert status == 2 and lines == []
    assert "bad.npz: not a score file" in error


def test_the_order_of_rows_does_not_matter(run):
    for name, scores, seed in (("b.npz", MODELS[1], 1), ("c.npz", MODELS[2], 2)):
        order = np.random.default_rng(seed).permutation(N)
        write(f"shuffled_{name}", scores[order], LABELS[order], np.array(PATHS)[order])
    for flags in ([], ["--weights", 1, 2, 3], ["--fit"]):
        plain = run(*FILES, *flags, "--out", "plain.npz")
        shuffled = run("a.npz", "shuffled_b.npz", "shuffled_c.npz", *flags, "--out", "other.npz")
        assert [line.replace("shuffled_", "") for line in shuffled[1]] == plain[1]
        with np.load("plain.npz") as one, np.load("other.npz") as other:
            for key in ("paths", "scores", "labels"):
                assert np.array_equal(one[key], other[key])


# ---- the mean


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_copies_of_a_model_are_the_model(dtype):
    """Half precision becomes float32: the mean of several models would tie in it."""
    scores = MODELS[0].astype(dtype)
    result = ensemble.combine([scores] * 3)
    assert result.dtype == np.promote_types(dtype, np.float32)
    np.testing.assert_allclose(result, scores, rtol=1e-15)


@pytest.mark.parametrize("weights", [
    [1, 1], [1, -1, 1], [0, 0, 0], [1, np.nan, 1], [[1, 1, 1]]])
def test_weights_that_are_refused(weights):
    with pytest.raises(ValueError, match="--weights"):
        ensemble.combine(MODELS, weights)


# ---- fitting


def naive_greedy(scores, labels, rounds):
    """The definition: every candidate's mean is formed and ranked from the start."""
    chosen = []
    best_map = -1
    for _ in range(rounds):
        maps = []
        for m in range(len(scores)):
            mean = sum(scores[i].astype(float) for i in [*chosen, m]) / (len(chosen) + 1)
            maps.append(evaluate.average_precision(mean, labels).mean())
        winner = maps.index(max(maps))  # the first of equals
        chosen.append(winner)
        if maps[winner] > best_map:
            best_map = maps[winner]
            best = list(chosen)
    return np.array([best.count(m) / len(best) for m in range(len(scores))])


@pytest.mark.parametrize("kind", ["no ties", "ties", "rows without labels and rows with all"])
def test_weights_are_those_of_the_naive_greedy_search(kind):
    labels = draw_labels(1, videos=25)
    noises = [1.5, 1.5, 2, 2]
    scores = np.stack([draw_scores(labels, noise, m) for m, noise in enumerate(noises)])
    if kind == "ties":
        scores = np.round(scores * 8) / 8
    elif kind != "no ties":
        labels[:3] = 0
        labels[3:6] = 1
    weights = ensemble.fit_weights(scores, labels, rounds=15)
    close(weights, naive_greedy(scores, labels, 15), 1e-12)
    assert (weights > 0).sum() > 1


@pytest.mark.parametrize("scores, weights", [
    (MODELS[:1], [1]),
    (MODELS[[1, 1]], [1, 0]),  # the first of equals
    (np.stack([MODELS[1], LABELS, LABELS]), [0, 1, 0]),  # perfect alone, in the first round
])
def test_weights_of_one_model_and_of_equal_ones(scores, weights):
    assert ensemble.fit_weights(scores, LABELS).tolist() == weights


def cross_fit_by_hand():
    """Fold by fold, video by video: the weights of a video have not seen its fold."""
    scores = np.zeros((N, K))
    for fold in range(5):
        others = [i for i, path in enumerate(PATHS) if zlib.crc32(path.encode()) % 5 != fold]
        weights = naive_greedy(MODELS[:, others], LABELS[others], 50)
        for i in set(range(N)) - set(others):
            scores[i] = sum(weight * model[i] for weight, model in zip(weights, MODELS))
    return scores


def test_videos_of_one_fold_get_equal_weights():
    """Nothing is left to fit to. A list of one video is such a case."""
    result = ensemble.cross_fit(PATHS[:1], MODELS[:, :1], LABELS[:1])
    close(result, MODELS[:, :1].mean(axis=0), 1e-6)


# ---- the script


def test_fit_prints_and_writes_what_the_definition_says(run):
    status, lines, _ = run(*FILES, "--fit", "--out", "fitted.npz")
    assert status == 0
    held_out = cross_fit_by_hand()
    weights = naive_greedy(MODELS, LABELS, 50)

    def percent(scores):
        return f"{100 * evaluate.sample_map(scores, LABELS):.2f}"

    # each model: its mAP, what the mean loses or gains without it, its weight
    equal = MODELS.mean(axis=0)
    for m, line in enumerate(lines[1:4]):
        own, change, weight, name = line.split()
        without = evaluate.sample_map(np.delete(MODELS, m, axis=0).mean(axis=0), LABELS)
        assert own == percent(MODELS[m])
        assert change == f"{100 * (without - evaluate.sample_map(equal, LABELS)):+.2f}"
        assert weight == f"{weights[m]:.2f}"
        assert name == FILES[m]

    # the mAP of equal, fitted and cross-fitted weights; the last is the one to report
    fitted = np.tensordot(weights, MODELS.astype(float), axes=1)
    figures = re.findall(r"\d+\.\d\d", lines[4])
    assert figures == [percent(equal), percent(fitted), percent(held_out)]
    assert lines[-1] == f"mAP {figures[2]}"
    assert float(figures[2]) < float(figures[1])  # fitted weights look better than they are

    with np.load("fitted.npz") as file:
        np.testing.assert_allclose(file["scores"], held_out, rtol=1e-6)
        meta = json.loads(str(file["meta"]))
    assert meta["weights"] == pytest.approx(weights)
    assert f"{100 * meta['map']:.2f}" == figures[2]

    # the printed weights, pasted: the ensemble of the test list
    pasted = re.search(r"--weights( [\d.]+){3}$", lines[6])[0]
    run(*FILES, *pasted.split(), "--out", "pasted.npz")
    with np.load("pasted.npz") as file:
        np.testing.assert_allclose(file["scores"], fitted, rtol=1e-5)


def test_the_result_is_itself_a_score_file(run):
    first = run("a.npz", "b.npz", "--out", "pair")
    assert first == run("pair") and first[0] == 0
    assert run("pair", "c.npz", "--weights", 2, 1)[1] == run(*FILES)[1]
    with np.load("pair") as file:
        assert file["scores"].dtype == np.float32 and file["labels"].dtype == np.uint8
        meta = json.loads(str(file["meta"]))
    assert meta["files"] == ["a.npz", "b.npz"] and meta["categories"] == CLASSES
    assert [member["model"] for member in meta["members"]] == ["a", "b"]


def test_a_test_list_has_no_labels(run):
    for name, scores in zip(FILES, MODELS):
        write(name, scores, labels=None)
    status, lines, _ = run(*FILES, "--weights", 1, 0, 0, "--out", "out.npz")
    assert status == 0 and len(lines) == 1 and "no mAP" in lines[0]
    with np.load("out.npz") as file:
        assert "labels" not in file
        assert np.array_equal(file["scores"], MODELS[0])
    status, _, [error] = run(*FILES, "--fit")
    assert status == 2
    assert "--fit: a.npz has no labels to fit to" in error


def test_only_the_first_process_of_torchrun_works(run, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert run(*FILES, "--out", "out.npz") == (0, [], [])
    assert not Path("out.npz").exists()
