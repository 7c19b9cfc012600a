"""The house: which file may import which, copies that must stay equal, and a README that tells the truth.

    python -m pytest tests/test_repo.py
"""
import ast
import importlib
import re
import subprocess
import sys

import pytest

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
