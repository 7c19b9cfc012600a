"""The house is in order: which file imports which, and which passages are copies. The README tells
the truth: the files, functions, flags and figures that it names exist, its commands and code run.

    python -m pytest tests/test_repo.py

The README's commands run in small: an epoch of one or two steps, on generated videos. They run in
this process (conftest.call), because a new one needs seconds to import torch.
"""
import argparse
import ast
import importlib
import json
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.run

import data
import evaluate
import tables
import train
from conftest import ROOT, call, close, golden, python

MODELS = ["tsn", "trn", "tsm", "tin", "slowfast"]
SCRIPTS = ["data", "evaluate", "train", "ensemble"]
README = (ROOT / "README.md").read_text(encoding="utf-8")
needs_ffmpeg = pytest.mark.skipif(
    shutil.which("ffmpeg") is None and os.environ.get("CI") != "true",
    reason="the program ffmpeg is missing")


def source(name):
    return (ROOT / f"{name}.py").read_text(encoding="utf-8")


# ---- the house -------------------------------------------------------------------------------

ARROWS = {"evaluate": {"data"}, "train": {"data", "evaluate"}, "ensemble": {"data", "evaluate"}}


def imports(name):
    """The modules that a file imports, wherever in it."""
    modules = set()
    for node in ast.walk(ast.parse(source(name))):
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            modules.add(node.module.split(".")[0])
    return modules


@pytest.mark.parametrize("name", MODELS + SCRIPTS)
def test_imports_follow_the_arrows(name):
    ours = imports(name) & {*MODELS, *SCRIPTS}
    assert ours == ARROWS.get(name, set())
    others = imports(name) - ours - sys.stdlib_module_names
    assert others <= {"torch", "torchvision", "numpy", "PIL"}


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_need_nothing_that_windows_lacks(name):
    assert not imports(name) & {"resource", "fcntl", "termios", "pwd", "grp", "pty", "syslog"}
    missing = r"os\.(fork|setpgrp|setsid|getpgrp|killpg|nice|uname)|signal\.SIG(ALRM|KILL|USR1)"
    assert re.findall(missing, source(name)) == []


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_know_no_model(name):
    """A new model is a new file and no other edit. (Help texts may name one as an example.)"""
    for node in ast.walk(ast.parse(source(name))):
        if isinstance(node, ast.Constant):
            assert node.value not in MODELS
        if isinstance(node, ast.Name):
            assert node.id.lower() not in MODELS


def test_importing_prints_nothing_and_needs_no_network(tmp_path):
    (tmp_path / "offline.py").write_text(
        "import importlib, socket, sys\n"
        "def refuse(*arguments):\n"
        "    raise OSError('there is no network in this test')\n"
        "socket.socket.connect = refuse\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n")
    run = python(tmp_path / "offline.py", *MODELS, *SCRIPTS, cwd=tmp_path, PYTHONPATH=ROOT)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_lines_fit_100_columns():
    wide = []
    for path in [*ROOT.glob("*.py"), *ROOT.glob("tests/**/*.py"), *ROOT.glob("tests/*.sh")]:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if len(line) > 100:
                wide.append(f"{path.name}:{number}")
    assert wide == []


# ---- copies: a model file works alone, so some passages stand in several ---------------------

def function(name, qualified):
    """The source of a function or method, without its docstring."""
    body = ast.parse(source(name)).body
    for part in qualified.split("."):
        [node] = [node for node in body if getattr(node, "name", None) == part]
        body = node.body
    text = ast.get_source_segment(source(name), node)
    return text.replace(ast.get_docstring(node, clean=False) or "", "")


def passage(name, first, last):
    """A file's lines from the first that begins with `first` to one that begins with `last`."""
    lines = source(name).splitlines()
    start = [line.strip().startswith(first) for line in lines].index(True)
    end = [line.strip().startswith(last) for line in lines[start:]].index(True)
    return lines[start : start + end + 1]


def test_copied_functions_are_equal():
    assert function("tsm", "residual") == function("tin", "residual")
    assert function("tsm", "convert") == function("tin", "convert")
    assert function("tsn", "TSN.forward") == function("tsm", "TSM.forward")
    assert function("tsn", "TSN.forward") == function("tin", "TIN.forward")
    for name in ["trn", "tsm", "tin"]:
        assert function("tsn", "our_name") == function(name, "our_name")


@pytest.mark.parametrize("first, last, names", [
    ("# the classifier", "nn.init.zeros_", ["tsn", "tsm", "tin"]),
    ("frames = clip.shape[1]", "x = clip.flatten", ["tsn", "trn", "tsm", "tin"]),
    ("# the ResNet's first layers", "for i, block", ["tsm", "tin"]),
    ("x = net.avgpool", "return x.unflatten", ["tsm", "tin"]),
    ("# its residual blocks", "(BLOCK + r\"downsample", ["tsn", "trn"]),
    ("BACKBONE =", "BLOCK =", ["tsn", "trn", "tsm", "tin"]),
    ("# The tensors may be", "break", ["tsn", "trn", "tsm", "tin"]),
    ("# Files from before", "return state", ["tsn", "trn", "tsm", "tin"]),
])
def test_copied_passages_are_equal(first, last, names):
    for name in names[1:]:
        assert passage(name, first, last) == passage(names[0], first, last)


# ---- what the README names and says ----------------------------------------------------------

def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def block(language, words):
    """The one block in that language that holds the words."""
    [found] = [text for text in blocks(language) if words in text]
    return found


def test_the_readme_is_finished_and_short():
    assert "@@" not in README  # a place for a figure that is still to be measured
    assert len(README.splitlines()) <= 250


def test_the_gate_runs_the_readme_s_tests():
    assert "python -m pytest tests\n" in block("bash", "pytest")
    assert "python -m pytest tests\n" in (ROOT / ".ci" / "run").read_text()


def test_the_readme_s_files_functions_and_flags_exist():
    for path in re.findall(r"\]\(([\w/.]+)\)", README) + re.findall(r"tests/[\w/]+\.\w+", README):
        assert (ROOT / path).exists(), path
    for name, attribute in re.findall(rf"\b({'|'.join(MODELS + SCRIPTS)})\.(\w+)", README):
        if attribute not in ("py", "npz", "onnx"):
            assert hasattr(importlib.import_module(name), attribute), (name, attribute)

    # flags: written out in a script, or a key of a recipe; the others are torchrun's
    flags = {"--help", "--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint",
             "--max-restarts"}
    for name in SCRIPTS:
        flags |= set(re.findall(r'"(--[a-z-]+)"', source(name)))
    for key in recipe_keys():
        flag = key.replace("_", "-")
        flags |= {f"--{flag}", f"--no-{flag}"}
    assert set(re.findall(r"--[a-z][a-z-]+", README)) <= flags


def recipe_keys():
    keys = {**data.RECIPE, **evaluate.RECIPE, **train.RECIPE}
    for name in MODELS:
        for row in importlib.import_module(name).RECIPES.values():
            keys.update(row)
    return set(keys)


def test_the_settings_of_where_the_report_is_silent_exist():
    section = README.split("## Where the report is silent")[1].split("\n## ")[0]
    keys = re.findall(r"`(\w+)`", section)
    assert len(keys) > 10
    assert set(keys) <= recipe_keys()


def test_the_tables_are_the_report_s():
    """Each row of the report stands in the README once, with its recipe and all of its figures."""
    lines = {}
    for line in README.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        for cell in cells:
            match = re.fullmatch(rf"`({'|'.join(MODELS)}) (\w+)`", cell)
            if match and "--" not in line:
                assert match.groups() not in lines
                lines[match.groups()] = cells

    rows = {}
    for name in MODELS:
        module = importlib.import_module(name)
        for row in module.RECIPES:
            if row != "toy":
                rows[name, row] = module.REPORTED[row]
    assert set(lines) == set(rows)

    for (name, row), figures in rows.items():
        cells = lines[name, row]
        place = cells.index(f"`{name} {row}`") + 1
        if figures is None:
            assert cells[place].startswith("no figure")
        elif name == "slowfast":
            assert cells[place : place + 3] == [f"{figure:.2f}" for figure in figures]
        else:
            assert cells[place] == f"{figures:.2f}"
            assert cells[place - 2] == str(importlib.import_module(name).RECIPES[row]["frames"])
    for validation, test in tables.ENSEMBLES.values():
        assert re.search(rf"\| {validation}\b.{{1,10}}\b{test}\b", README)


def test_the_examples_can_be_checked():
    line = re.search(r"boating/river (\d+) 144,246", README)
    indices = re.search(r"frame indices +([\d ]+?)  ", README)[1].split()
    assert [int(index) for index in indices] == data.segment_indices(int(line[1]), 8).tolist()
    assert f"{len(list(ROOT.glob('tests/golden/*_*.npz')))} recorded cases" in README

    assert "run 0.9, swim 0.8, jump 0.3" in README and "= 0.833" in README
    precision = evaluate.average_precision([[0.9, 0.8, 0.3]], [[1, 0, 1]])
    assert round(precision[0], 3) == 0.833


# ---- the README's commands, in small ---------------------------------------------------------

SMALL = {  # flags that make a command small; of a flag that is given twice the last counts
    "data": "",
    "train": "--recipe toy --epochs 1 --batch 4 --workers 0 --device cpu",
    "evaluate": "--workers 0 --device cpu",
    "ensemble": "",
}
BY_HAND = ["python3 -m venv .venv", ". .venv/bin/activate", "pip install -r requirements.txt",
           "python -m pytest tests"]  # .ci/run does these
BLOCKS = {  # the first command of a block that is run -> its test
    "torchrun train.py --model tin\n": "test_try_it",
    "python -m pytest tests\n": "test_the_gate_runs_the_readme_s_tests",
    "python data.py extract --videos VIDEOS": "test_your_own_videos",
    "ffmpeg": "test_label_a_video",
    "python evaluate.py --model tin --recipe r50_8f": "test_a_public_checkpoint",
    "python data.py extract --videos videos": "test_m_mit_itself",
}


def test_every_block_of_commands_has_a_test():
    for text in blocks("bash"):
        [test] = [test for words, test in BLOCKS.items() if words in text.split("\n", 1)[0] + "\n"]
        assert test in globals()
    assert len(blocks("bash")) == len(BLOCKS)


def run_commands(text):
    """Run a block of commands. torchrun's own flags are parsed, and go no further."""
    for line in text.splitlines():
        line = " ".join(shlex.split(line, comments=True))
        for command in line.split(" && "):
            if command not in BY_HAND:
                run_command(command)


def run_command(command):
    program, *arguments = command.split()
    if program == "ffmpeg":
        subprocess.run([program, *arguments], check=True, stdin=subprocess.DEVNULL)
        return
    if program == "torchrun":
        launch = torch.distributed.run.get_args_parser().parse_args(arguments)
        arguments = [launch.training_script, *launch.training_script_args]
    script = arguments[0].removesuffix(".py")
    assert call(script, *arguments[1:], *SMALL[script].split()) == 0, command


def draw_videos(folder, number):
    """Videos of half a second: 0.mp4, 1.mp4 ..."""
    os.makedirs(folder)
    for i in range(number):
        subprocess.run(
            ["ffmpeg", "-v", "error", "-f", "lavfi", "-i",
             f"testsrc=size=64x48:rate=30:duration=0.5,hue=h={30 * i}", f"{folder}/{i}.mp4"],
            check=True, stdin=subprocess.DEVNULL)


@pytest.fixture
def newcomer(tmp_path, monkeypatch):
    """Where a newcomer works: an empty folder with a small toy in runs/toy."""
    monkeypatch.chdir(tmp_path)
    data.draw_toy("runs/toy", videos=8)
    return tmp_path


def test_try_it(newcomer, capsys):
    run_commands(block("bash", "torchrun train.py --model tin\n"))
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(r"best val mAP \d+\.\d\d \(epoch 1\)", last)


@needs_ffmpeg
def test_your_own_videos(newcomer, capsys):
    """From a folder of twelve clips and a csv with class names to the labels of a new clip."""
    draw_videos("VIDEOS", 12)
    shutil.move("VIDEOS/11.mp4", "new.mp4")
    classes = ["boating", "cooking", "a dance"]
    lines = [f"{i}.mp4,{classes[i % 3]}\n" for i in range(11)]
    (newcomer / "labels.csv").write_text("".join(lines))
    run_commands(block("bash", "--list labels.csv"))

    out = capsys.readouterr().out
    assert "11 videos extracted, 0 failed" in out
    assert "next: python data.py check DATA" in out
    assert "9 videos, 1.00 labels each" in out and "2 videos, 1.00 labels each" in out
    assert "\n0 problems\n" in out
    assert "warning: 2 steps are too few to learn much" in out
    assert re.search(r"^mAP \d+\.\d\d$", out, re.MULTILINE)
    assert sorted(re.findall(r"^ +\d+\.\d\d %  (.+)$", out, re.MULTILINE)) == sorted(classes)
    assert (newcomer / "new.png").stat().st_size > 0


@needs_ffmpeg
def test_label_a_video(newcomer, capsys):
    run_commands(block("bash", "torchrun train.py --model tin\n"))
    assert not (newcomer / "runs/toy/frames/val/01200").exists()  # the whole toy's first video
    os.rename("runs/toy/frames/val/00008", "runs/toy/frames/val/01200")
    run_commands(block("bash", "--picture toy.png"))
    lines = capsys.readouterr().out.splitlines()[-4:]
    assert lines[0] == "toy.mp4"
    for line in lines[1:]:
        assert line.split(" %  ")[1] in data.TOY_CATEGORIES
    assert (newcomer / "toy.png").stat().st_size > 0


def test_a_public_checkpoint(newcomer, capsys):
    """The file in its authors' layout, with redrawn weights for the toy's ten classes."""
    torch.save(golden("tin_xtemporal_r50_t8").checkpoint, "tin_r50_8f_mmit.pth.tar")
    os.rename("runs/toy", "DATA")
    run_commands(block("bash", "--weights tin_r50_8f_mmit.pth.tar"))
    assert re.fullmatch(r"mAP \d+\.\d\d", capsys.readouterr().out.splitlines()[-1])


PYSLOWFAST = ("--model slowfast --depth 50 --fusion-kernel 7 --fusion-norm --fc-bias "
              "--slow-index linspace --mean 0.45 0.45 0.45 --std 0.225 0.225 0.225")
PUBLIC = {  # a layout of tests/golden -> the README's flags for it
    "tin_xtemporal_r50_t8": "--model tin --recipe r50_8f",
    "tin_deepcs233_r50_t8": "--model tin",
    "slowfast_xtemporal_8x8_r101": "--model slowfast",
    "tsn_mmaction2_r101_t5": "--model tsn --test-crop 256",
    "tsn_tsnpytorch_r101_t5": "--model tsn",
    "tsm_mmaction2_r50_t8": "--model tsm",
    "tsm_mit_r50_t8": "--model tsm",
    "trn_trnpytorch_r50_t8_multiscale": "--model trn",
    "slowfast_mmaction2_8x8_r50": "--model slowfast --depth 50 --fusion-kernel 7 --fc-bias",
    "slowfast_pyslowfast_8x8_r50": PYSLOWFAST,
    "slowfast_pyslowfast_c2_8x8_r50": PYSLOWFAST,
    "slowfast_pytorchvideo_8x8_r50": PYSLOWFAST,
}


@pytest.mark.parametrize("case, flags", PUBLIC.items())
def test_the_flags_of_public_checkpoints_fit_them(case, flags):
    """Names and shapes of every tensor, as in evaluate.py's strict load."""
    assert f"`{flags}`" in README
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    parser.add_argument("--recipe")
    args, others = parser.parse_known_args(flags.split())
    module, recipe = evaluate.open_model(args.model, args.recipe)
    evaluate.add_recipe_flags(parser, recipe)
    recipe.update(vars(parser.parse_args(others)))

    with np.load(ROOT / "tests" / "golden" / f"{case}.npz") as file:
        meta = json.loads(str(file["meta"]))
    with torch.device("meta"):  # shapes without memory
        tensors = {}
        for key, shape in meta["shapes"].items():
            tensors[(meta["container"]["prefix"] or "") + key] = torch.empty(shape)
        checkpoint = {meta["container"]["key"] or "state_dict": tensors}
        evaluate.load_weights(module, recipe, checkpoint, case)


@needs_ffmpeg
def test_m_mit_itself(newcomer, capsys):
    draw_videos("videos", 6)
    (newcomer / "trainingSet.csv").write_text("0.mp4,0,1\n1.mp4,1\n2.mp4,2\n3.mp4,0,2\n")
    (newcomer / "validationSet.csv").write_text("4.mp4,0,1\n5.mp4,2\n")
    (newcomer / "DATA").mkdir()
    (newcomer / "DATA" / "categories.txt").write_text("boating,0\ncooking,1\na dance,2\n")
    run_commands(block("bash", "--list trainingSet.csv"))
    out = capsys.readouterr().out
    assert "for the test list: --weights " in out
    assert re.fullmatch(r"mAP \d+\.\d\d", out.splitlines()[-1])
    assert (newcomer / "all.npz").exists()


# ---- the README's code -----------------------------------------------------------------------

def test_a_new_model_is_a_new_file_and_no_other_edit(newcomer, monkeypatch, capsys):
    (newcomer / "mymodel.py").write_text(block("python", "class FrameDifference"))
    monkeypatch.syspath_prepend(newcomer)
    monkeypatch.setattr(evaluate, "__file__", str(newcomer / "evaluate.py"))  # beside it
    sys.modules.pop("mymodel", None)
    assert "`torchrun train.py --model mymodel`" in README
    run_commands("torchrun train.py --model mymodel")
    run_commands("python evaluate.py --checkpoint runs/mymodel/best.pt")
    assert re.fullmatch(r"mAP \d+\.\d\d", capsys.readouterr().out.splitlines()[-1])

    # its convert: a file of our own, and one of torchvision's
    mymodel = sys.modules.pop("mymodel")
    ours = torch.load("runs/mymodel/best.pt", weights_only=True)
    mymodel.build(mymodel.RECIPES["toy"], 10).load_state_dict(mymodel.convert(ours))
    torchvisions = mymodel.convert({"conv1.weight": torch.zeros(64, 3, 7, 7)})
    assert list(torchvisions) == ["tsn.backbone.conv1.weight"]


def test_a_checkpoint_is_carried_away_and_exported(newcomer, monkeypatch):
    """ONNX itself needs packages that the tests do without; torch.export is the step before."""
    run_commands(block("bash", "torchrun train.py --model tin\n"))
    shutil.copy("runs/tin/best.pt", "best.pt")
    names = {}
    exec(block("python", 'torch.load("best.pt"'), names)
    model = names["model"]
    assert not model.training

    def export(model, arguments, file, dynamo, dynamic_shapes):
        names["exported"] = torch.export.export(model, arguments, dynamic_shapes=dynamic_shapes)

    monkeypatch.setattr(torch.onnx, "export", export)
    exec(block("python", "torch.onnx.export"), names)
    clips = torch.randn(1, 8, 3, 224, 224)  # the example in the block has two
    with torch.no_grad():
        close(names["exported"].module()(clips), model(clips), 1e-5)


def test_a_caffe2_file_becomes_one_that_convert_reads(newcomer):
    rng = np.random.default_rng(0)
    arrays = {"conv1_w": rng.normal(size=(64, 3, 1, 7, 7)), "res_conv1_bn_s": rng.normal(size=64),
              "t_conv1_w": rng.normal(size=(8, 3, 5, 7, 7)), "lr": np.float32(0.1)}
    with open("SLOWFAST_8x8_R50.pkl", "wb") as file:
        pickle.dump({"blobs": {**arrays, "note": "text"}}, file)
    exec(block("python", "import pickle"), {})
    state = evaluate.convert(importlib.import_module("slowfast"),
                             evaluate.read_checkpoint("slowfast.pt"), "slowfast.pt")
    assert set(state) == {"slow.conv1.weight", "fast.conv1.weight", "slow.bn1.weight"}
    close(state["slow.conv1.weight"], arrays["conv1_w"], 0)


# ---- the report on a laptop ------------------------------------------------------------------

RECORDER = '#!/bin/sh\necho "$(basename "$0") $*" >> "$RECORD"\n'


def laptop_commands(folder, **environ):
    """What tests/laptop.sh starts, a command a line; nothing is run."""
    programs = folder / "programs"
    programs.mkdir(exist_ok=True)
    for name in ("python", "torchrun"):
        (programs / name).write_text(RECORDER)
        (programs / name).chmod(0o755)
    record = folder / "record"
    record.write_text("")
    subprocess.run(
        ["bash", ROOT / "tests" / "laptop.sh", "results"], cwd=folder, check=True,
        env={**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "RECORD": record, **environ})
    return record.read_text().splitlines()


def test_the_report_on_a_laptop(newcomer, capsys):
    """Every command of laptop.sh, in this process, with one step of training for each network."""
    flags = dict(DATA="runs/toy", FLAGS="--epochs 1 --batch 8 --workers 0 --device cpu")
    commands = laptop_commands(newcomer, **flags)
    for command in commands:
        script, *arguments = command.split()[1:]
        assert call(Path(script).stem, *arguments) == 0, command
    scripts = [command.split()[1] for command in commands]
    assert [scripts.count(f"{name}.py") for name in ("train", "evaluate", "ensemble")] == [7, 17, 2]

    # the same command again, when all is there: evaluate.py has nothing to do
    again = laptop_commands(newcomer, **flags)
    assert again == [command for command in commands if "evaluate.py" not in command]

    # the tables
    printed = capsys.readouterr().out.split("Table 1.")[1]
    figure = r"\d+\.\d\d"
    for row in [
        rf"\| TSM +\| ResNet-50 +\| 8 +\| `r50_8f` +\| 59\.85 +\| {figure} +\| {figure} +\|",
        rf"\| TSN +\| ResNet-101 +\| 5 +\| `r101_5f` +\| 58\.92 +\| {figure} +\| {figure} +\|",
        rf"\| TRN +\| ResNet-50 +\| 8 +\| `r50_8f` +\| - +\| {figure} +\| {figure} +\|",
        r"\| Slow 8x8 +\| `r101_slow_8x8` +\| -" + r" +\| -" * 2 + rf" +\| {figure}" * 3,
        r"\| Fast 16x2 +\| .*?59\.05 +\| 61\.55 +\| 63\.45" + rf" +\| {figure}" * 3,
        rf"\| video models +\| 66\.71 +\| 59\.80 +\| {figure} +\|",
        rf"\| video and image models +\| 67\.22 +\| 60\.77 +\| {figure} +\|",
    ]:
        assert re.search(row, printed), row


def test_several_seeds_on_a_laptop(tmp_path):
    assert 'SEEDS="0 1 2" bash tests/laptop.sh' in README
    commands = laptop_commands(tmp_path, SEEDS="0 1 2")
    seeds = [re.search(r"--seed (\d)", command)[1] for command in commands if "train.py" in command]
    assert seeds == ["0"] * 7 + ["1"] * 7 + ["2"] * 7
    assert commands[-1].count(".npz") == 3 * 19
