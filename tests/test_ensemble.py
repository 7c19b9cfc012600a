"""The ensemble is the weighted mean of its files' probabilities, aligned by path; the weights that it fits are those of
the naive greedy search, its cross-fitted mAP is that of videos the weights have not seen, and files that do not go
together are refused with the difference.

    python -m pytest tests/test_ensemble.py
"""
import csv
import json
import re
import runpy
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

import data
import ensemble
import evaluate
from conftest import ROOT

METRICS = np.load(ROOT / "tests" / "golden" / "metrics.npz")
N, K = 60, 12
PATHS = [f"category/video_{i}" for i in range(N)]


def labels_of(rng, videos=N):
    """0/1 (videos, K): one label at least."""
    labels = (rng.random((videos, K)) < 0.1).astype(np.uint8)
    labels[np.arange(videos), rng.integers(K, size=videos)] = 1
    return labels


def model(labels, noise, seed):
    """The probabilities of a model that sees the labels through noise."""
    logits = 2.0 * labels - 2 + noise * np.random.default_rng(seed).normal(size=labels.shape)
    return (1 / (1 + np.exp(-logits))).astype(np.float32)


LABELS = labels_of(np.random.default_rng(0))
MODELS = np.stack([model(LABELS, noise, seed) for seed, noise in enumerate((1.0, 1.2, 1.6))])
NOISE = np.random.default_rng(9).random((N, K), dtype=np.float32)


def write(name, scores, labels=LABELS, paths=PATHS, **meta):
    """A score file in the working folder; without labels where they are None."""
    arrays = {} if labels is None else {"labels": labels}
    np.savez(name, paths=np.array(paths), scores=scores, meta=json.dumps(meta), **arrays)
    return str(name)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run(*arguments) -> (exit status, lines on stdout, lines on stderr) of ensemble.py in tmp_path, in our process."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["ensemble.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            data.run_script(ensemble.main)
        out, err = capsys.readouterr()
        return end.value.code or 0, out.splitlines(), err.splitlines()

    return run


def last_map(lines):
    """The figure of the last line, which is nothing but it."""
    word, figure = lines[-1].split(" ")
    assert word == "mAP" and len(figure.split(".")[1]) == 2
    return float(figure)


# The figures of one file.


@pytest.mark.filterwarnings("ignore:Mean of empty slice", "ignore:invalid value encountered")  # case 12 has no label
@pytest.mark.parametrize("case", range(16))
def test_one_file_has_the_figures_of_scikit_learn(run, case):
    scores, labels = METRICS[f"scores_{case}"], METRICS[f"labels_{case}"]
    status, lines, _ = run(write("one.npz", scores, labels, [f"v{i}" for i in range(len(scores))]))
    assert status == 0 and lines[-1] == f"mAP {100 * METRICS[f'sklearn_{case}']:.2f}"
    assert lines[0].startswith(f"{len(scores)} videos, {(labels.sum(1) == 0).sum()} without labels")
    if labels.any():
        assert re.findall(r"\d+\.\d\d", lines[0]) == [f"{100 * METRICS[f'positive_rows_{case}']:.2f}"]
        assert lines[1].startswith(f"class-level mAP {100 * METRICS[f'macro_{case}']:.2f}")


def test_the_script_itself(tmp_path, monkeypatch, capsys):
    """As the other tests call it, but as the program that it is."""
    monkeypatch.chdir(tmp_path)
    write("one.npz", MODELS[0])
    for name, status in (("one.npz", 0), ("other.npz", 2)):
        monkeypatch.setattr(sys, "argv", ["ensemble.py", name])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / "ensemble.py"), run_name="__main__")
        out, err = capsys.readouterr()
        assert (end.value.code or 0) == status
        if status:
            assert not out and err == "ensemble.py: other.npz: No such file or directory\n"
        else:
            assert last_map(out.splitlines()) == round(100 * evaluate.sample_map(MODELS[0], LABELS), 2)


# The mean.


@pytest.mark.parametrize("weights, expected", [
    (None, MODELS.astype(float).mean(0)),
    ([1, 0, 0], MODELS[0]),
    ([0, 5, 0], MODELS[1]),
    ([2, 1, 1], MODELS[0].astype(float) / 2 + MODELS[1].astype(float) / 4 + MODELS[2].astype(float) / 4),
    (np.array([0.5, 0, 0.5]), MODELS[0].astype(float) / 2 + MODELS[2].astype(float) / 2),
])
def test_combine(weights, expected):
    result = ensemble.combine(MODELS, weights)
    assert result.dtype == np.float32
    np.testing.assert_array_equal(result, np.asarray(expected, np.float32))


@pytest.mark.parametrize("copies", [1, 2, 3, 7])
def test_copies_of_a_model_are_the_model_bit_for_bit(copies):
    for scores in (MODELS[0], MODELS[0].astype(float), MODELS[0].astype(np.float16)):
        result = ensemble.combine(np.stack([scores] * copies))
        assert result.dtype == scores.dtype
        if scores.dtype == float:  # in its own precision a third of it is rounded
            np.testing.assert_allclose(result, scores, rtol=1e-15)
        else:
            np.testing.assert_array_equal(result, scores)


@pytest.mark.parametrize("weights", [
    [1, 1], [1, 1, 1, 1], [1, -1, 1], [0, 0, 0], [1, np.nan, 1], [1, np.inf, 1], [[1, 1, 1]],
])
def test_combine_refuses_weights(weights):
    with pytest.raises(ValueError, match="one for each of 3 files, from 0 up, not all 0"):
        ensemble.combine(MODELS, weights)


# Fitting.


def naive_greedy(scores, labels, rounds):
    """The definition: every candidate's mean is formed and ranked whole."""
    chosen, found = [], []
    for _ in range(rounds):
        values = [sum(evaluate.average_precision(sum(scores[i].astype(float) for i in [*chosen, m]), labels))
                  for m in range(len(scores))]
        best = max(range(len(scores)), key=lambda m: (values[m], -m))
        chosen.append(best)
        found.append((values[best], [chosen.count(m) / len(chosen) for m in range(len(scores))]))
    return max(found, key=lambda one: one[0])[1]


@pytest.mark.parametrize("kind", ["continuous", "mostly ties", "rows without labels, rows with all", "no label at all"])
@pytest.mark.parametrize("seed", [0, 1])
def test_weights_are_those_of_the_naive_greedy_search(kind, seed):
    labels = labels_of(np.random.default_rng(seed), videos=25)
    scores = np.stack([model(labels, noise, [seed, m]) for m, noise in enumerate((1.5, 1.5, 2, 2))])
    if kind == "mostly ties":
        scores = np.round(scores * 8) / 8
    elif kind.startswith("rows"):
        labels[:3], labels[3:6] = 0, 1
    elif kind.startswith("no"):
        labels[:] = 0
    fitted = ensemble.fit_weights(scores, labels, rounds=15)
    np.testing.assert_allclose(fitted, naive_greedy(scores, labels, 15), atol=1e-12)
    assert fitted.sum() == pytest.approx(1) and (kind.startswith("no") or (fitted > 0).sum() > 1)


@pytest.mark.parametrize("scores, weights", [
    (MODELS[:1], [1]),
    (MODELS[[1, 1]], [1, 0]),  # of equals the first
    (np.stack([MODELS[1], LABELS, LABELS]).astype(np.float32), [0, 1, 0]),  # perfect alone, in the first round
])
def test_weights_of_one_model_and_of_copies(scores, weights):
    fitted = ensemble.fit_weights(scores, LABELS)
    assert fitted.tolist() == weights
    np.testing.assert_array_equal(ensemble.combine(scores, fitted), scores[np.argmax(weights)])


def test_a_model_of_noise_gets_next_to_nothing_and_fitting_never_costs():
    scores = np.concatenate([NOISE[None], MODELS])
    fitted = ensemble.fit_weights(scores, LABELS)
    assert fitted[0] < 0.05 and fitted.min() >= 0 and fitted.sum() == pytest.approx(1)
    own = [evaluate.sample_map(one, LABELS) for one in scores]
    assert evaluate.sample_map(ensemble.combine(scores, fitted), LABELS) > max(own) > own[0] + 0.2


def fit_by_hand():
    """(cross-fitted scores, weights on all) of MODELS, fold by fold and video by video."""
    held_out = np.zeros_like(NOISE)
    for fold in range(5):
        train = [i for i, path in enumerate(PATHS) if zlib.crc32(path.encode()) % 5 != fold]
        weights = naive_greedy(MODELS[:, train], LABELS[train], 50)
        for i in set(range(N)) - set(train):
            held_out[i] = sum(weight * scores[i].astype(float) for weight, scores in zip(weights, MODELS))
    return held_out, naive_greedy(MODELS, LABELS, 50)


@pytest.fixture(scope="module")
def by_hand():
    return fit_by_hand()


def test_fit_prints_writes_and_reports_what_the_definition_says(run, by_hand):
    names = [write(f"{name}.npz", scores, model=name) for name, scores in zip("abc", MODELS)]
    status, lines, err = run(*names, "--fit", "--out", "fitted.npz")
    assert status == 0 and not err
    held_out, weights = by_hand

    def percent(scores):
        return 100 * evaluate.sample_map(scores, LABELS)

    assert lines[0].split() == ["own", "mAP", "left", "out", "weight"]
    equal = percent(MODELS.astype(float).mean(0))
    for m, line in enumerate(lines[1:4]):
        without = percent(np.delete(MODELS, m, 0).astype(float).mean(0))
        assert line.split() == [f"{percent(MODELS[m]):.2f}", f"{without - equal:+.2f}", f"{weights[m]:.2f}", names[m]]
    fitted = percent(np.tensordot(weights, MODELS.astype(float), 1))
    assert lines[4] == f"equal {equal:.2f}   fitted {fitted:.2f}   cross-fitted {percent(held_out):.2f}"
    assert lines[5].startswith("report the cross-fitted mAP")
    assert last_map(lines) == round(percent(held_out), 2) < round(fitted, 2)
    assert fitted >= max(percent(scores) for scores in MODELS)

    found = json.loads(Path("fitted.json").read_text())
    assert found["files"] == names and found["models"] == ["a", "b", "c"]
    np.testing.assert_allclose(found["weights"], weights, atol=1e-12)
    np.testing.assert_allclose([found[way] for way in ("equal", "fitted", "cross-fitted")],
                               [equal, fitted, percent(held_out)], atol=1e-9)
    with np.load("fitted.npz") as file:  # without pickles
        np.testing.assert_allclose(file["scores"], held_out, rtol=1e-6)
        assert json.loads(str(file["meta"]))["map"] == pytest.approx(percent(held_out) / 100)
    assert run("fitted.npz")[1] == lines[6:]


def test_neither_the_order_of_rows_nor_copies_of_rows_elsewhere_matter(run):
    rng, names = np.random.default_rng(5), []
    plain = [write(f"{name}.npz", scores, model=name) for name, scores in zip("abc", MODELS)]
    for name, scores in zip("abc", MODELS):
        order = rng.permutation(N) if names else np.arange(N)
        names.append(write(f"{name}_permuted.npz", scores[order], LABELS[order], np.array(PATHS)[order], model=name))
    for flags in ([], ["--weights", "1", "2", "3"], ["--fit"]):
        one, other = run(*plain, *flags, "--out", "one.npz"), run(*names, *flags, "--out", "other.npz")
        assert [line.replace("_permuted", "") for line in other[1]] == one[1]
        with np.load("one.npz") as first, np.load("other.npz") as second:
            for key in ("paths", "scores", "labels"):
                np.testing.assert_array_equal(first[key], second[key])


def test_weights_from_json_are_for_the_same_models_of_another_list(run, by_hand):
    names = [write(f"{name}.npz", scores, model=name) for name, scores in zip("abc", MODELS)]
    run(*names, "--fit", "--out", "fitted.npz")
    paths = [path + "_test" for path in PATHS]
    tests = [write(f"{name}_test.npz", scores, None, paths, model=name) for name, scores in zip("abc", MODELS)]
    status, lines, _ = run(*tests, "--weights", "fitted.json", "--out", "test.npz")
    assert status == 0 and lines == ["the list has no labels: scores, but no mAP"]
    with np.load("test.npz") as file:
        assert "labels" not in file and file["paths"].tolist() == paths
        np.testing.assert_allclose(file["scores"], np.tensordot(by_hand[1], MODELS.astype(float), 1), rtol=1e-6)
        meta = json.loads(str(file["meta"]))
    assert meta["map"] is None and meta["classes"] == K and [one["model"] for one in meta["members"]] == ["a", "b", "c"]
    status, _, err = run(tests[1], tests[0], tests[2], "--weights", "fitted.json")
    assert status == 2 and err == ["ensemble.py: fitted.json: was fitted to files of the models ['a', 'b', 'c'], these "
                                   "are of ['b', 'a', 'c']"]


def test_the_result_is_itself_a_score_file(run):
    names = [write(f"{m}.npz", scores, model="tin", iteration=m) for m, scores in enumerate(MODELS)]
    first = run(*names[:2], "--out", "pair")  # a name without .npz stays as it is
    assert first == run("pair") and first[0] == 0
    assert run("pair", names[2], "--weights", "2", "1")[1] == run(*names)[1]
    with np.load("pair") as file:
        assert file["scores"].dtype == np.float32 and file["labels"].dtype == np.uint8
        meta = json.loads(str(file["meta"]))
    assert meta["files"] == names[:2] and meta["weights"] == [1, 1]
    assert meta["members"] == [{"model": "tin", "iteration": m} for m in range(2)]
    assert not list(Path().glob("*.part-*")) and not list(Path().glob("*.json"))


def test_csv_names_every_video_the_failed_ones_too(run):
    paths = ["a,b", 'say "hi"', "ü", *PATHS[3:]]
    names = [write(f"{m}.npz", scores, None, paths) for m, scores in enumerate(MODELS)]
    lines = ["z/broken\tffmpeg: no frame", "z/other\twhy", "", f"{PATHS[5]}\twhole by now"]
    Path("test_failed.txt").write_text("\n".join(lines))
    assert run(*names, "--csv", "out.csv", "--failed", "test_failed.txt")[0] == 0
    with open("out.csv", encoding="utf-8", newline="") as file:
        head, *rows = csv.reader(file)
    assert head == ["path", *(f"score_{k}" for k in range(K))]
    assert [row[0] for row in rows] == [*paths, "z/broken", "z/other"]
    scores = np.array([row[1:] for row in rows], np.float32)
    expected = ensemble.combine(MODELS)
    np.testing.assert_array_equal(scores[:N], expected)  # nothing is lost in print
    np.testing.assert_allclose(scores[N:], np.stack([expected.mean(0)] * 2), rtol=1e-5)
    assert run(*names, "--csv", "whole.csv")[0] == 0
    assert Path("whole.csv").read_text().splitlines() == Path("out.csv").read_text().splitlines()[:-2]


def test_only_the_first_process_of_torchrun_speaks(run, monkeypatch):
    write("one.npz", MODELS[0])
    monkeypatch.setenv("RANK", "1")
    assert run("one.npz", "--out", "two.npz") == (0, [], []) and not Path("two.npz").exists()


# Refusals.


def other(array, place, value):
    """A copy with another value there."""
    array = np.array(array)
    array[place] = value
    return array


@pytest.mark.parametrize("second, says", [
    (dict(scores=MODELS[1][:, :11], labels=LABELS[:, :11]), "b.npz: 11 classes, in a.npz 12"),
    (dict(scores=MODELS[1][:58], labels=LABELS[:58], paths=PATHS[:58]), "b.npz: 2 videos are not as in a.npz, such as "
     f"category/video_58: absent, there labels {np.flatnonzero(LABELS[58]).tolist()}"),
    (dict(paths=[*PATHS[:-1], "new"]), "2 videos are not as in a.npz, such as category/video_59: absent, there "),
    (dict(scores=np.concatenate([MODELS[1], MODELS[1][:1]]), labels=np.concatenate([LABELS, LABELS[:1]]),
          paths=[*PATHS, "new"]), f"such as new: labels {np.flatnonzero(LABELS[0]).tolist()}, there absent"),
    (dict(labels=other(LABELS, 7, 1)), "b.npz: 1 videos are not as in a.npz, such as category/video_7: labels "
     f"{list(range(K))}, there labels {np.flatnonzero(LABELS[7]).tolist()}"),
    (dict(labels=None), "such as category/video_0: without labels, there labels "),
    (dict(paths=[*PATHS[:-1], PATHS[0]]), "b.npz: 60 paths, 59 of them different"),
    (dict(paths=PATHS[:-1]), "b.npz: 59 paths, 59 of them different, for scores (60, 12) and labels (60, 12)"),
    (dict(labels=LABELS[:, :5]), "for scores (60, 12) and labels (60, 5)"),
    (dict(scores=MODELS[1][0]), "for scores (12,) and labels (60, 12)"),
    (dict(scores=MODELS[1][:, 0], labels=LABELS[:, 0]), "for scores (60,) and labels (60,)"),
    (dict(scores=other(MODELS[1], (3, 4), np.nan)), "b.npz: a score is not a finite number"),
    (dict(scores=other(MODELS[1], (3, 4), np.inf)), "b.npz: a score is not a finite number"),
    (dict(labels=other(LABELS, (3, 4), 2)), "or a label not 0 or 1"),
])
def test_files_that_do_not_go_together(run, second, says):
    files = write("a.npz", MODELS[0]), write("b.npz", **{"scores": MODELS[1], **second})
    status, lines, err = run(*files, "--out", "out.npz")
    assert status == 2 and not lines and len(err) == 1 and err[0].startswith("ensemble.py: b.npz: ") and says in err[0]
    assert not Path("out.npz").exists()


def spoil(kind):
    """Write bad.npz."""
    write("bad.npz", MODELS[0])
    content = Path("bad.npz").read_bytes()
    if kind == "pickled":
        np.savez("bad.npz", paths=np.array(PATHS, object), scores=MODELS[0])
    elif kind == "one array":
        np.save("bad.npy", MODELS[0])
        Path("bad.npy").replace("bad.npz")
    elif kind == "no paths":
        np.savez("bad.npz", scores=MODELS[0])
    elif kind.startswith("meta"):
        np.savez("bad.npz", paths=np.array(PATHS), scores=MODELS[0], meta="{" if kind == "meta" else "[1]")
    elif kind == "words":
        np.savez("bad.npz", paths=np.array(PATHS), scores=MODELS[0].astype(str))
    elif kind == "a table of paths":
        np.savez("bad.npz", paths=np.array(PATHS)[:, None], scores=MODELS[0])
    else:
        Path("bad.npz").write_bytes({"text": b"path,score_0\n", "empty": b"", "cut": content[:5000]}[kind])


@pytest.mark.parametrize("kind", ["text", "empty", "cut", "pickled", "one array", "no paths", "meta", "meta, a list",
                                  "words", "a table of paths"])
def test_other_files(run, kind):
    spoil(kind)
    line = "ensemble.py: bad.npz: not a score file of evaluate.py --out"
    assert run(write("a.npz", MODELS[0]), "bad.npz") == (2, [], [line])


@pytest.mark.parametrize("flags, says", [
    ("--weights 1", "weights [1.0]: one for each of 2 files, from 0 up, not all 0"),
    ("--weights 1 -1", "weights [1.0, -1.0]: one for each of 2 files"),
    ("--weights 0 0", "weights [0.0, 0.0]: one for each of 2 files"),
    ("--weights 1 x", "--weights 1 x: a number for each file, or FILE.json of --fit"),
    ("--weights none.json", "none.json"),
    ("--weights text.json", "--weights text.json: a number for each file, or FILE.json of --fit"),
    ("--weights list.json", "--weights list.json: a number for each file, or FILE.json of --fit"),
    ("--weights other.json", "--weights other.json: a number for each file, or FILE.json of --fit"),
    ("--weights short.json", "weights [1.0]: one for each of 2 files"),
    ("--failed text.json", "--failed text.json: goes into the table of --csv"),
    ("--csv out.csv --failed none.txt", "none.txt"),
    ("--out out.npz --csv table.csv --failed none.txt", "none.txt"),
    ("--out none/out.npz", "none/out.npz: there is no such folder"),
    ("--out .", ".: there is no such folder, or it cannot be written there"),
    ("--out out.npz --csv .", ".: there is no such folder, or it cannot be written there"),
    ("--out out.npz --csv none/out.csv", "none/out.csv: there is no such folder"),
])
def test_flags_that_are_refused(run, flags, says):
    for name, text in (("text", "weights"), ("list", "[1, 2]"), ("other", '{"lr": 1}'), ("short", '{"weights": [1]}')):
        Path(f"{name}.json").write_text(text)
    status, lines, err = run(write("a.npz", MODELS[0]), write("b.npz", MODELS[1]), *flags.split())
    assert status == 2 and not lines and len(err) == 1 and err[0].startswith("ensemble.py: ") and says in err[0]
    assert {path.name for path in Path().iterdir()} == {
        "a.npz", "b.npz", "text.json", "list.json", "other.json", "short.json"}


def test_nothing_can_be_fitted_without_labels(run):
    line = "ensemble.py: --fit: a.npz has no labels to fit to"
    assert run(write("a.npz", MODELS[0], None), "--fit") == (2, [], [line])
    status, _, err = run("a.npz", "--fit", "--weights", "1")
    assert status == 2 and "not allowed with argument" in err[-1]
