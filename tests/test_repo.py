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
MAP = r"mAP \d+\.\d\d"  # the last line of evaluate.py and ensemble.py
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
    missing = r"os\.(?:fork|setpgrp|setsid|getpgrp|killpg|nice|uname)|signal\.SIG(?:ALRM|KILL|USR)"
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


def test_copied_functions_are_equal():
    assert function("tsm", "residual") == function("tin", "residual")
    assert function("tsm", "convert") == function("tin", "convert")
    assert function("tsn", "TSN.forward") == function("tsm", "TSM.forward")
    assert function("tsn", "TSN.forward") == function("tin", "TIN.forward")
    for name in ["trn", "tsm", "tin"]:
        assert function("tsn", "our_name") == function(name, "our_name")


def passage(name, first, last):
    """A file's lines from the first that begins with `first` to one that begins with `last`."""
    lines = [line.strip() for line in source(name).splitlines()]
    start = [line.startswith(first) for line in lines].index(True)
    end = [line.startswith(last) for line in lines[start:]].index(True)
    return lines[start : start + end + 1]


@pytest.mark.parametrize("first, last, names", [
    ("# the classifier", "nn.init.zeros_", ["tsn", "tsm", "tin"]),
    ("frames = clip.shape[1]", "x = clip.flatten", ["tsn", "trn", "tsm", "tin"]),
    ("# the ResNet's first layers", "for i, block", ["tsm", "tin"]),
    ("x = net.avgpool", "return x.unflatten", ["tsm", "tin"]),
    ("# its residual blocks", '(BLOCK + r"downsample', ["tsn", "trn"]),
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
    [text] = [text for text in blocks(language) if words in text]
    return text


def test_the_readme_is_finished_and_short():
    assert "@@" not in README  # a place for a figure that is still to be measured
    assert len(README.splitlines()) <= 250


def test_the_gate_runs_the_tests_as_the_readme_says():
    assert "python -m pytest tests\n" in block("bash", "pytest")
    assert "python -m pytest tests\n" in (ROOT / ".ci" / "run").read_text()


def recipe_keys():
    keys = {*data.RECIPE, *evaluate.RECIPE, *train.RECIPE}
    for name in MODELS:
        for row in importlib.import_module(name).RECIPES.values():
            keys |= set(row)
    return keys


def test_files_functions_and_flags_of_the_readme_exist():
    for path in re.findall(r"\]\(([\w/.]+)\)", README) + re.findall(r"tests/[\w/]+\.\w+", README):
        assert (ROOT / path).exists(), path
    text = re.sub(r"```python.*?```", "", README, flags=re.DOTALL)  # those have tests of their own
    for name, word in re.findall(rf"\b({'|'.join(MODELS + SCRIPTS)})\.(\w+)", text):
        if word not in ("py", "txt", "pt", "npz", "onnx"):
            assert hasattr(importlib.import_module(name), word), f"{name}.{word}"

    # flags: torchrun's, those that stand in a script, and every key of a recipe
    flags = {"--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint", "--max-restarts"}
    for name in [*SCRIPTS, "tests/benchmark", "tests/figures/draw_curves"]:
        flags |= set(re.findall(r'"(--[a-z-]+)"', source(name)))
    for key in recipe_keys():
        flags |= {f"--{key}".replace("_", "-"), f"--no-{key}".replace("_", "-")}
    assert set(re.findall(r"--[a-z][a-z-]+", README)) <= flags

    section = README.split("## Where the report is silent")[1].split("\n## ")[0]
    keys = set(re.findall(r"`(\w+)`", section))
    assert len(keys) > 10
    assert keys <= recipe_keys()


def test_the_tables_are_the_reports():
    """Every row of the report stands in the README once, with its recipe and all of its figures."""
    cells_of = {}
    for line in README.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        for cell in cells:
            if re.fullmatch(rf"`(?:{'|'.join(MODELS)}) \w+`", cell):
                assert cell not in cells_of
                cells_of[cell] = cells

    expected = set()
    for name in MODELS:
        module = importlib.import_module(name)
        for row, figures in module.REPORTED.items():
            cell = f"`{name} {row}`"
            expected.add(cell)
            cells = cells_of[cell]
            place = cells.index(cell) + 1
            if figures is None:
                assert cells[place].startswith("no figure")
            elif name == "slowfast":
                assert cells[place : place + 3] == [f"{figure:.2f}" for figure in figures]
            else:
                assert cells[place] == f"{figures:.2f}"
                assert cells[place - 2] == str(module.RECIPES[row]["frames"])
        assert {*module.REPORTED, "toy"} == set(module.RECIPES)
    assert set(cells_of) == expected
    for validation, test in tables.ENSEMBLES.values():
        assert re.search(rf"\| {validation}\b.{{1,10}}\b{test}\b", README)


def test_the_examples_of_the_readme_are_right():
    frames = re.search(r"boating/river (\d+) 144,246", README)[1]
    indices = re.search(r"frame indices +([\d ]+\d) ", README)[1].split()
    assert indices == [str(index) for index in data.segment_indices(int(frames), 8)]
    assert f"{len(list(ROOT.glob('tests/golden/*_*.npz')))} recorded cases" in README

    assert "run 0.9, swim 0.8, jump 0.3" in README
    assert "= 0.833" in README
    assert round(evaluate.average_precision([[0.9, 0.8, 0.3]], [[1, 0, 1]])[0], 3) == 0.833


PYSLOWFAST = ("--model slowfast --depth 50 --fusion-kernel 7 --fusion-norm --fc-bias "
              "--slow-index linspace --mean 0.45 0.45 0.45 --std 0.225 0.225 0.225 "
              "--test-resize 256 --test-crop 224")


@pytest.mark.parametrize("case, flags", [
    ("tin_xtemporal_r50_t8", "--model tin --recipe r50_8f"),
    ("tin_deepcs233_r50_t8", "--model tin"),
    ("slowfast_xtemporal_8x8_r101", "--model slowfast"),
    ("tsn_mmaction2_r101_t5", "--model tsn --test-crop 256"),
    ("tsn_tsnpytorch_r101_t5", "--model tsn"),
    ("tsm_mmaction2_r50_t8", "--model tsm"),
    ("tsm_mit_r50_t8", "--model tsm"),
    ("trn_trnpytorch_r50_t8_multiscale", "--model trn"),
    ("slowfast_mmaction2_8x8_r50", "--model slowfast --depth 50 --fusion-kernel 7 --fc-bias"),
    ("slowfast_pyslowfast_8x8_r50", PYSLOWFAST),
    ("slowfast_pytorchvideo_8x8_r50", PYSLOWFAST),
])
def test_the_flags_of_public_checkpoints_fit_them(case, flags):
    """They build the network into which the golden tests load this layout."""
    assert f"`{flags}`" in README
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    parser.add_argument("--recipe")
    args, others = parser.parse_known_args(flags.split())
    _, recipe = evaluate.open_model(args.model, args.recipe)
    evaluate.add_recipe_flags(parser, recipe)
    recipe.update(vars(parser.parse_args(others)))

    for option, value in golden(case).options.items():
        if option != "num_classes":
            assert recipe["frames" if option == "segments" else option] == value


# ---- the README's commands, in small ---------------------------------------------------------

BLOCKS = {  # how a block of commands begins -> its test
    "python3 -m venv .venv && . .venv/bin/activate && pip install -r requirements.txt && torchrun":
        "test_try_it",
    "python3 -m venv .venv && . .venv/bin/activate && pip install -r requirements.txt && python":
        "test_the_gate_runs_the_tests_as_the_readme_says",
    "python data.py extract --videos VIDEOS": "test_your_own_videos",
    "ffmpeg": "test_label_a_video",
    "python evaluate.py --model tin --recipe r50_8f --weights": "test_a_public_checkpoint",
    "python data.py extract --videos videos": "test_m_mit_itself",
}
SMALL = {  # flags for a small run; of a flag that is given twice the last counts
    "data": "",
    "train": "--recipe toy --epochs 1 --batch 4 --workers 0 --device cpu",
    "evaluate": "--workers 0 --device cpu",
    "ensemble": "",
}


def test_every_block_of_commands_has_a_test():
    for text in blocks("bash"):
        [test] = [BLOCKS[begin] for begin in BLOCKS if text.startswith(begin)]
        assert test in globals()


def run_commands(text):
    """Run commands of the README. torchrun's own flags are parsed, and go no further."""
    for line in text.splitlines():
        program, *arguments = shlex.split(line, comments=True)
        if program == "ffmpeg":
            subprocess.run([program, *arguments], check=True, stdin=subprocess.DEVNULL)
            continue
        if program == "torchrun":
            launch = torch.distributed.run.get_args_parser().parse_args(arguments)
            arguments = [launch.training_script, *launch.training_script_args]
        script = Path(arguments[0]).stem
        assert call(script, *arguments[1:], *SMALL[script].split()) == 0, line


def draw_videos(folder, number):
    """Videos of half a second: 0.mp4, 1.mp4 ..."""
    os.makedirs(folder)
    for i in range(number):
        picture = f"testsrc=size=64x48:rate=30:duration=0.5,hue=h={30 * i}"
        subprocess.run(["ffmpeg", "-v", "error", "-f", "lavfi", "-i", picture, f"{folder}/{i}.mp4"],
                       check=True, stdin=subprocess.DEVNULL)


@pytest.fixture
def newcomer(tmp_path, monkeypatch):
    """Where a newcomer works: a folder with a small toy in runs/toy."""
    monkeypatch.chdir(tmp_path)
    data.draw_toy("runs/toy", videos=8)
    return tmp_path


def test_try_it(newcomer, capsys):
    """The virtual environment is left to .ci/run."""
    command = block("bash", "torchrun train.py --model tin\n").split(" && ")[-1]
    run_commands(command)
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(rf"best val {MAP} \(epoch 1\)", last)


@needs_ffmpeg
def test_your_own_videos(newcomer, capsys):
    """From a folder of clips and a csv with class names to the labels of a new clip."""
    draw_videos("VIDEOS", 12)
    os.rename("VIDEOS/11.mp4", "new.mp4")
    classes = ["boating", "cooking", "a dance"]
    lines = [f"{i}.mp4,{classes[i % 3]}\n" for i in range(11)]
    Path("labels.csv").write_text("".join(lines))
    run_commands(block("bash", "--list labels.csv"))

    out = capsys.readouterr().out
    assert "11 videos extracted, 0 failed" in out
    assert "next: python data.py check DATA" in out
    assert "9 videos, 1.00 labels each" in out
    assert "2 videos, 1.00 labels each" in out
    assert "\n0 problems\n" in out
    assert "warning: 2 steps are too few to learn much" in out
    assert re.search(f"^{MAP}$", out, re.MULTILINE)
    assert sorted(re.findall(r"^ +\d+\.\d\d %  (.+)$", out, re.MULTILINE)) == sorted(classes)
    assert Path("new.png").stat().st_size > 0


@needs_ffmpeg
def test_label_a_video(newcomer, capsys):
    run_commands("torchrun train.py --model tin")
    os.rename("runs/toy/frames/val/00008", "runs/toy/frames/val/01200")  # as in the whole toy
    run_commands(block("bash", "--picture toy.png"))
    file, *labels = capsys.readouterr().out.splitlines()[-4:]
    assert file == "toy.mp4"
    assert {label.split(" %  ")[1] for label in labels} <= set(data.TOY_CATEGORIES)
    assert Path("toy.png").stat().st_size > 0


def test_a_public_checkpoint(newcomer, capsys):
    """The file has its authors' layout, and redrawn weights for the toy's ten classes."""
    torch.save(golden("tin_xtemporal_r50_t8").checkpoint, "tin_r50_8f_mmit.pth.tar")
    os.rename("runs/toy", "DATA")
    run_commands(block("bash", "--weights tin_r50_8f_mmit.pth.tar"))
    assert re.fullmatch(MAP, capsys.readouterr().out.splitlines()[-1])


@needs_ffmpeg
def test_m_mit_itself(newcomer, capsys):
    draw_videos("videos", 6)
    Path("trainingSet.csv").write_text("0.mp4,0,1\n1.mp4,1\n2.mp4,2\n3.mp4,0,2\n")
    Path("validationSet.csv").write_text("4.mp4,0,1\n5.mp4,2\n")
    os.mkdir("DATA")
    Path("DATA/categories.txt").write_text("boating,0\ncooking,1\na dance,2\n")
    run_commands(block("bash", "--list trainingSet.csv"))
    out = capsys.readouterr().out
    assert "for the test list: --weights " in out
    assert re.fullmatch(MAP, out.splitlines()[-1])
    assert Path("all.npz").exists()


# ---- the README's code -----------------------------------------------------------------------

def test_a_new_model_is_a_new_file_and_no_other_edit(newcomer, monkeypatch, capsys):
    Path("mymodel.py").write_text(block("python", "class FrameDifference"))
    monkeypatch.syspath_prepend(newcomer)
    monkeypatch.setattr(evaluate, "__file__", str(newcomer / "evaluate.py"))  # the file's folder
    sys.modules.pop("mymodel", None)
    assert "`torchrun train.py --model mymodel`" in README
    run_commands("torchrun train.py --model mymodel")
    run_commands("python evaluate.py --checkpoint runs/mymodel/best.pt")
    assert re.fullmatch(MAP, capsys.readouterr().out.splitlines()[-1])

    mymodel = sys.modules.pop("mymodel")
    from_torchvision = mymodel.convert({"conv1.weight": torch.zeros(64, 3, 7, 7)})
    assert list(from_torchvision) == ["tsn.backbone.conv1.weight"]


def test_a_checkpoint_is_carried_away_and_exported(newcomer, monkeypatch):
    """ONNX itself needs packages that the tests do without; torch.export is the step before."""
    run_commands("torchrun train.py --model tin --out .")
    names = {}
    exec(block("python", 'torch.load("best.pt"'), names)
    assert not names["model"].training

    def export(model, clips, file, dynamo, dynamic_shapes):
        names["exported"] = torch.export.export(model, clips, dynamic_shapes=dynamic_shapes)

    monkeypatch.setattr(torch.onnx, "export", export)
    exec(block("python", "torch.onnx.export"), names)
    clip = torch.randn(1, 8, 3, 224, 224)  # the example in the block has two
    with torch.no_grad():
        close(names["exported"].module()(clip), names["model"](clip), 1e-5)


def test_a_caffe2_file_becomes_one_that_convert_reads(newcomer):
    arrays = {"conv1_w": np.ones((64, 3, 1, 7, 7)), "t_conv1_w": np.ones((8, 3, 5, 7, 7)),
              "res_conv1_bn_s": np.arange(64.0), "lr": np.float32(0.1)}
    with open("SLOWFAST_8x8_R50.pkl", "wb") as file:
        pickle.dump({"blobs": {**arrays, "note": "text"}}, file)
    exec(block("python", "import pickle"), {})
    checkpoint = evaluate.read_checkpoint("slowfast.pt")
    state = evaluate.convert(importlib.import_module("slowfast"), checkpoint, "slowfast.pt")
    close(state["slow.conv1.weight"], arrays["conv1_w"], 0)
    close(state["fast.conv1.weight"], arrays["t_conv1_w"], 0)
    close(state["slow.bn1.weight"], arrays["res_conv1_bn_s"], 0)


# ---- the report on a laptop ------------------------------------------------------------------

def laptop_commands(folder, **environ):
    """The commands that tests/laptop.sh starts; none is run."""
    programs = folder / "programs"
    programs.mkdir(exist_ok=True)
    for name in ("python", "torchrun"):
        (programs / name).write_text('#!/bin/sh\necho "$(basename "$0") $*" >> "$RECORD"\n')
        (programs / name).chmod(0o755)
    record = folder / "record"
    record.write_text("")
    environ = {"PATH": f"{programs}:{os.environ['PATH']}", "RECORD": str(record), **environ}
    subprocess.run(["bash", ROOT / "tests" / "laptop.sh", "results"], cwd=folder, check=True,
                   env={**os.environ, **environ})
    return record.read_text().splitlines()


def test_the_report_on_a_laptop(newcomer, capsys):
    """Every command of laptop.sh, in this process: one step of training for each network, and three
    views in every protocol but the first."""
    flags = dict(DATA="runs/toy", FLAGS="--epochs 1 --batch 8 --workers 0 --device cpu")
    commands = laptop_commands(newcomer, **flags)
    for command in commands:
        script, *arguments = command.split()[1:]
        if "dense" in arguments or "multiscale" in arguments:
            arguments += ["--clips", "1", "--scales", "32"]
        assert call(Path(script).stem, *arguments) == 0, command
    scripts = [command.split()[1] for command in commands]
    assert [scripts.count(f"{name}.py") for name in ("train", "evaluate", "ensemble")] == [7, 17, 2]

    # the same command again, when all is there: nothing is evaluated twice
    again = laptop_commands(newcomer, **flags)
    assert again == [command for command in commands if "evaluate.py" not in command]

    # the tables, with another figure in every score file: 1, 2 ... in the order of laptop.sh
    files = commands[-1].split()[2:]
    for number, file in enumerate(files, 1):
        with np.load(file) as scores:
            meta = json.loads(str(scores["meta"]))
        np.savez(file, meta=json.dumps({**meta, "map": number / 100}))
    capsys.readouterr()
    assert call("tables", *files) == 0
    printed = re.sub(" +", " ", capsys.readouterr().out)
    for row in ["TSM | ResNet-50 | 8 | `r50_8f` | 59.85 | 5.00 | 6.00",
                "TIN | ResNet-50 | 8 | `r50_8f` | 62.23 | 7.00 | 8.00",
                "TSN | ResNet-101 | 5 | `r101_5f` | 58.92 | 1.00 | 2.00",
                "TRN | ResNet-50 | 8 | `r50_8f` | - | 3.00 | 4.00",
                "SlowFast 8x8 | `r101_8x8` | 59.89 | 61.52 | 63.52 | 9.00 | 10.00 | 11.00",
                "Fast 16x2 | `r101_fast_16x2` | 59.05 | 61.55 | 63.45 | 15.00 | 16.00 | 17.00",
                "Slow 8x8 | `r101_slow_8x8` | - | - | - | 12.00 | 13.00 | 14.00",
                "video models | 66.71 | 59.80 | 18.00",
                "video and image models | 67.22 | 60.77 | 19.00"]:
        assert f"| {row} |" in printed
    for name in MODELS:
        for row in importlib.import_module(name).REPORTED:
            assert f"| `{row}` |" in printed


def test_several_seeds_on_a_laptop(tmp_path):
    assert 'SEEDS="0 1 2" bash tests/laptop.sh' in README
    commands = laptop_commands(tmp_path, SEEDS="0 1 2")
    seeds = [re.search(r"--seed (\d)", command)[1] for command in commands if "train.py" in command]
    assert seeds == ["0"] * 7 + ["1"] * 7 + ["2"] * 7
    assert commands[-1].count(".npz") == 3 * (17 + 2)
