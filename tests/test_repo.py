"""The house: which file may import which, copies that must stay equal, and a README that tells the truth.

    python -m pytest tests/test_repo.py
"""
import ast
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest

import data
from conftest import ROOT

MODELS = ("tsn", "trn", "tsm", "tin", "slowfast")
SCRIPTS = ("data", "evaluate", "train", "ensemble")
ALLOWED = {"evaluate": {"data"}, "train": {"data", "evaluate"}, "ensemble": {"data", "evaluate"}}
README = (ROOT / "README.md").read_text()


def source(name):
    return (ROOT / f"{name}.py").read_text()


def imports(name):
    """The names of all modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(source(name))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("name", MODELS + SCRIPTS)
def test_imports_follow_the_arrows(name):
    ours = imports(name) & {*MODELS, *SCRIPTS}
    assert ours == ALLOWED.get(name, set())
    others = imports(name) - ours - set(sys.stdlib_module_names)
    assert others <= {"torch", "torchvision", "numpy", "PIL"}


@pytest.mark.parametrize("name", ("data", "evaluate", "train"))
def test_scripts_do_not_know_the_models_by_name(name):
    code = source(name).split('"""', 2)[2]  # the docstring shows commands
    assert not re.search(r"\b(tsn|trn|tsm|slowfast|TSN\(|TRN\(|TSM\(|TIN\(|SlowFast\()\b", code)


def test_importing_prints_nothing_and_needs_no_network():
    code = ("import socket\ndef refuse(*args): raise OSError('no network here')\nsocket.socket.connect = refuse\n"
            f"import {', '.join(MODELS + SCRIPTS)}")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


@pytest.mark.parametrize("name", MODELS + SCRIPTS)
def test_lines_fit_120_columns(name):
    assert [number for number, line in enumerate(source(name).splitlines(), 1) if len(line) > 120] == []


def function(name, qualified):
    """The source of a function or method of a file."""
    nodes = ast.parse(source(name)).body
    for part in qualified.split("."):
        node = next(node for node in nodes if getattr(node, "name", None) == part)
        nodes = node.body
    return ast.get_source_segment(source(name), node)


def test_copies_are_equal():
    """Each model file works alone, so some lines stand in several on purpose; none may drift."""
    assert function("tsm", "residual") == function("tin", "residual")
    assert function("tsn", "TSN.forward") == function("tsm", "TSM.forward") == function("tin", "TIN.forward")
    bodies = {function(name, "convert").split('"""')[2].replace(f"{name}.py", "FILE.py") for name in ("tsm", "tin")}
    assert len(bodies) == 1
    recipes = {name: importlib.import_module(name).RECIPES for name in MODELS[:4]}
    first = [next(iter(rows.values())) for rows in recipes.values()]
    own = {"frames", "depth", "backbone", "multiscale", "shift_every", "published_map", "lr", "dropout"}
    for row in first[1:]:
        assert {key: value for key, value in row.items() if key not in own} == {
            key: value for key, value in first[0].items() if key not in own}


def test_ci_runs_the_readme_s_test_command():
    assert "python -m pytest tests\n" in README
    assert "python -m pytest tests\n" in (ROOT / ".ci" / "run").read_text()


def test_readme_s_files_functions_and_line_counts_exist():
    for name, lines in re.findall(r"\| \[(\w+)\.py\]\(\1\.py\) \|[^|]*\| (\d+) \|", README):
        assert (name, int(lines)) == (name, len(source(name).splitlines()))
    for name, attribute in re.findall(r"`(%s)\.(\w+)" % "|".join(MODELS + SCRIPTS), README):
        if attribute not in ("py", "npz"):
            assert hasattr(importlib.import_module(name), attribute), f"{name}.{attribute}"
    for path in re.findall(r"`?(tests/[\w./]+\.(?:py|png))", README):
        assert (ROOT / path).exists(), path


def test_readme_s_figures_are_the_recipes_():
    for name, figure in re.findall(r"\| \[(\w+)\.py\]\(\1\.py\) \|[^|]*\|[^|]*\| (\d\d\.\d\d) \|", README):
        if name in MODELS:
            assert float(figure) in [row["published_map"] for row in importlib.import_module(name).RECIPES.values()]


def test_readme_s_python_blocks_parse():
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(blocks) >= 3
    for block in blocks:
        compile(block, "README.md", "exec")


def test_readme_s_new_model_trains_without_another_edit(tmp_path):
    code = next(block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "FrameDifference" in block)
    for name in ("data", "evaluate", "train", "tsn"):
        (tmp_path / f"{name}.py").write_text(source(name))
    (tmp_path / "mymodel.py").write_text(code)
    data = [sys.executable, "data.py", "toy", "small", "--videos", "16"]
    assert subprocess.run(data, cwd=tmp_path, capture_output=True).returncode == 0
    command = "train.py --model mymodel --recipe toy --data small --epochs 1 --batch 8 --workers 0"
    run = subprocess.run([sys.executable, *command.split()], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert re.search(r"best val mAP \d+\.\d\d \(epoch 1\) order-blind ceiling \d+\.\d\d", run.stdout.splitlines()[-1])


def commands():
    """Every command of the README's shell blocks, without comments and torchrun's own flags: [script, flag, ...]."""
    for block in re.findall(r"```bash\n(.*?)```", README, re.S):
        if "tests/tables.py" in block:  # has a test of its own
            continue
        for line in block.replace("\\\n", " ").splitlines():
            for command in re.split(r"&&|;", line.split("  #")[0]):
                words = shlex.split(command)
                script = next((word for word in words if word.endswith(".py")), None)
                if words and words[0] in ("python", "torchrun") and script in {f"{name}.py" for name in SCRIPTS}:
                    yield words[words.index(script):]


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory):
    """The folder of somebody who has followed the README so far, in small: DATA, VIDEOS, a run, files of scores."""
    folder = tmp_path_factory.mktemp("newcomer")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert call("data.py", "toy", "DATA", "--videos", "16") == 0
        shutil.copytree("DATA", "runs/toy")
        small = "--recipe toy --epochs 1 --batch 8 --workers 0 --device cpu"
        assert call("train.py", "--model", "tin", "--data", "DATA", *small.split()) == 0
        if shutil.which("ffmpeg"):
            (folder / "VIDEOS").mkdir()
            for file in ("VIDEOS/one.mp4", "holiday.mp4"):
                subprocess.run(["ffmpeg", "-v", "error", "-f", "lavfi", "-i", "testsrc=size=64x48:rate=30:duration=0.3",
                                file], check=True)
            (folder / "trainingSet.csv").write_text("one.mp4,0,3\n")
        yield folder


def call(script, *flags):
    """A script's main in this process, as run_script runs it -> the exit status."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "argv", [script, *flags])
        data.run_script(importlib.import_module(script[:-3]).main)
    return stop.value.code or 0


@pytest.mark.parametrize("words", [*commands()], ids=" ".join)
def test_readme_s_commands_run(newcomer, monkeypatch, words):
    """In small and in this process: training stops after its recipe, extraction goes into a new folder."""
    script, *flags = words
    monkeypatch.chdir(newcomer)
    if script == "train.py" and "mymodel" in flags:
        pytest.skip("has a test of its own")
    if "extract" in flags or "--video" in flags:
        if shutil.which("ffmpeg") is None and os.environ.get("CI") != "true":
            pytest.skip("the program ffmpeg is missing")
        flags = [{"DATA": "NEW"}.get(flag, flag) for flag in flags]
    if script == "train.py":
        flags = [*flags, "--print-recipe"]
    if script == "ensemble.py":
        for name in flags:
            if name.endswith(".npz") and name not in ("tin.npz", "all.npz"):
                shutil.copy("tin.npz", name)
    assert call(script, *flags) == 0


def test_readme_s_report_on_a_laptop(tmp_path):
    """The block as it stands, with fewer models, on a toy of 16 videos."""
    block = next(block for block in re.findall(r"```bash\n(.*?)```", README, re.S) if "tests/tables.py" in block)
    for many, few in (("tsn trn tsm tin slowfast", "tsn slowfast"), ("{tsn,trn,tsm,tin}-{clip,dense}", "tsn-{clip,dense}"),
                      ("{tsn,trn,tsm,tin}-dense", "tsn-dense"), ("{slowfast,slow,fast}", "{slowfast,slow}")):
        assert many in block
        block = block.replace(many, few)
    block = "\n".join(line for line in block.splitlines() if "fast_16x2" not in line)
    for name in MODELS + SCRIPTS + ("tests/tables",):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / f"{name}.py", tmp_path / f"{name}.py")
    data.draw_toy(tmp_path / "runs" / "toy", videos=16)
    environment = {**os.environ, "FLAGS": "--epochs 1 --batch 8 --workers 0",
                   "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}
    run = subprocess.run(["bash", "-euc", block], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    tables = run.stdout[run.stdout.index("Table 1"):]
    figure = r"\d+\.\d\d"
    assert re.search(rf"^tsn +resnet18 +8 +{figure} +{figure} +58.92$", tables, re.M)
    assert re.search(rf"^slowfast_8x8 +{figure} +59.89 +{figure} +61.52 +{figure} +63.52$", tables, re.M)
    assert re.search(rf"^slow_8x8 +{figure} +- +{figure} +- +{figure} +-$", tables, re.M)
    assert re.search(rf"^SlowFast variants +2 +{figure} +66.71 \(test 59.80\)$", tables, re.M)
    assert re.search(rf"^with the image models +3 +{figure} +67.22 \(test 60.77\)$", tables, re.M)
