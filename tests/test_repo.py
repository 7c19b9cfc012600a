"""Files import each other as the README says, its commands and code run in small, its tables are
the report's. The whole report runs too: on the toy by laptop.sh, on films by real.sh.

    python -m pytest tests/test_repo.py

All runs are an epoch of a few steps, in this process (conftest.call), because a new one needs
seconds to import torch.
"""
import argparse
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.run

import data
import evaluate
import real
import tables
import train
from conftest import ROOT, call, close, golden, needs_ffmpeg, python, write


MODELS = ["tsn", "trn", "tsm", "tin", "slowfast"]
SCRIPTS = ["data", "evaluate", "train", "ensemble"]
ARROWS = {"evaluate": {"data"}, "train": {"data", "evaluate"}, "ensemble": {"data", "evaluate"}}
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAP = r"mAP \d+\.\d\d"  # the last line of evaluate.py and ensemble.py

IMPORT_EACH_ALONE = """
import importlib, socket, sys

def refuse(*arguments):
    raise OSError("there is no network in this test")

socket.socket.connect = refuse
for name in sys.argv[1:]:
    for other in sys.argv[1:]:
        sys.modules.pop(other, None)
    importlib.import_module(name)
    print(name, *[other for other in sys.argv[1:] if other in sys.modules and other != name])
"""


def test_imports_follow_the_arrows_print_nothing_and_need_no_network(tmp_path):
    file = write(tmp_path / "import_each_alone.py", IMPORT_EACH_ALONE)
    run = python(file, *MODELS, *SCRIPTS, cwd=tmp_path, PYTHONPATH=ROOT)
    assert run.stderr == ""
    lines = [line.split() for line in run.stdout.splitlines()]
    assert {name: set(others) for name, *others in lines} == {
        name: ARROWS.get(name, set()) for name in MODELS + SCRIPTS}


# ---- README ------------------------------------------------------------------------------------

def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def block(language, words):
    """The one block in that language that holds the words."""
    [text] = [text for text in blocks(language) if words in text]
    return text


def test_the_tables_are_the_reports():
    """Each row of the report is a line with its recipe and, in this order, all of its figures."""
    lines = README.splitlines()
    for name in MODELS:
        module = importlib.import_module(name)
        assert {*module.REPORTED, "toy"} == set(module.RECIPES)
        for row, figures in module.REPORTED.items():
            if figures is not None:
                words = [f"`{name} {row}`", *[f"{figure:.2f}" for figure in np.atleast_1d(figures)]]
                pattern = ".*".join(map(re.escape, words))
                assert sum(re.search(pattern, line) is not None for line in lines) == 1, words
    for validation, test in tables.ENSEMBLES.values():
        assert re.search(rf"\b{validation}\b.*\b{test}\b", README)


def test_every_flag_of_the_readme_exists(capsys):
    helps = [torch.distributed.run.get_args_parser().format_help()]
    for script, *arguments in [("data", "extract"), ("data", "toy"), ("ensemble",), ("train",),
                               ("evaluate",), ("benchmark",), ("draw_curves",)]:
        call(script, *arguments, "--help")
        helps.append(capsys.readouterr().out)
    flags = set(re.findall(r"--[a-z][a-z-]+", " ".join(helps).replace("_", "-")))
    pages = [data.RECIPE, evaluate.RECIPE, train.RECIPE]
    for name in MODELS:
        pages += importlib.import_module(name).RECIPES.values()
    for page in pages:
        for key in page:
            flags |= {f"--{key}".replace("_", "-"), f"--no-{key}".replace("_", "-")}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)) <= flags


PYSLOWFAST = ("--model slowfast --depth 50 --fusion-kernel 7 --fusion-norm --fc-bias "
              "--slow-index linspace")


@pytest.mark.parametrize("case, flags", [
    ("tin_xtemporal_r50_t8", "--model tin --recipe r50_8f"),
    ("tin_deepcs233_r50_t8", "--model tin"),
    ("tsn_mmaction2_r101_t5", "--model tsn"),
    ("tsn_tsnpytorch_r101_t5", "--model tsn"),
    ("tsn_timm_irv2_t5", "--model tsn --recipe inception_resnet_v2_5f"),
    ("tsn_timm_senet154_t5", "--model tsn --recipe senet154_5f"),
    ("tsm_mmaction2_r50_t8", "--model tsm"),
    ("tsm_mit_r50_t8", "--model tsm"),
    ("tsm_mit_r50_t16", "--model tsm --recipe r50_16f"),
    ("trn_trnpytorch_r50_t8_multiscale", "--model trn"),
    ("trn_mmaction2_r50_t8_single", "--model trn --no-multiscale"),
    ("slowfast_xtemporal_8x8_r101", "--model slowfast"),
    ("slowfast_mmaction2_8x8_r50", "--model slowfast --depth 50 --fusion-kernel 7 --fc-bias"),
    ("slowfast_pyslowfast_8x8_r50", PYSLOWFAST),
    ("slowfast_pytorchvideo_8x8_r50", PYSLOWFAST),
])
def test_the_flags_of_public_weights_build_their_network(case, flags):
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    parser.add_argument("--recipe")
    args, others = parser.parse_known_args(flags.split())
    _, recipe = evaluate.open_model(args.model, args.recipe)
    evaluate.add_recipe_flags(parser, recipe)
    recipe.update(vars(parser.parse_args(others)))
    for option, value in golden(case).options.items():
        if option != "num_classes":
            assert recipe.get(option, value) == value


SMALL = {  # more flags, for a small run; of a flag that is given twice the last counts
    "data": "",
    "train": "--recipe toy --epochs 1 --batch 4 --workers 0 --device cpu",
    "evaluate": "--workers 0 --device cpu",
    "ensemble": "",
}


def commands(text):
    """The commands of a block that run our scripts or ffmpeg: [program or script, argument ...]."""
    for line in text.replace(" && ", "\n").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["torchrun"]:  # its own flags are parsed, and go no further
            launch = torch.distributed.run.get_args_parser().parse_args(words[1:])
            words = ["python", launch.training_script, *launch.training_script_args]
        if words[:1] == ["ffmpeg"]:
            yield words
        elif words[:1] == ["python"] and words[1].removesuffix(".py") in SCRIPTS:
            yield [words[1].removesuffix(".py"), *words[2:]]


def draw_film(path, hue):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = f"testsrc=size=64x48:rate=30:duration=0.5,hue=h={hue}"
    subprocess.run(["ffmpeg", "-nostdin", "-v", "error", "-f", "lavfi", "-i", picture, path],
                   check=True)


def prepare(script, arguments):
    """Make what a command expects to be there, if it is not: films and their list, a data folder, a
    trained network, public weights."""
    values = dict(zip(arguments, arguments[1:]))
    if script == "data" and "--list" in values:
        folder = Path(values["--videos"])
        if not folder.exists():
            for number in range(12):
                draw_film(folder / f"{number}.mp4", 30 * number)
        if not Path(values["--list"]).exists():
            numbers = range(12)
            if "--split" in values:  # some for each split
                numbers = range(4, 8) if values["--split"] == "train" else range(8, 10)
            classes = ["boating", "cooking", "a dance"]
            write(values["--list"], "".join(f"{i}.mp4,{classes[i % 3]}\n" for i in numbers))
    elif script in ("train", "evaluate") and "--data" in values:
        if not Path(values["--data"]).exists():
            shutil.copytree("runs/toy", values["--data"])
    if "--weights" in values and script == "evaluate" and not Path(values["--weights"]).exists():
        torch.save(golden("tin_xtemporal_r50_t8").checkpoint, values["--weights"])
    if "--checkpoint" in values and not Path(values["--checkpoint"]).exists():
        folder = Path(values["--checkpoint"]).parent
        run(["train", "--model", folder.name, "--out", str(folder)])
    if "--video" in values and not Path(values["--video"]).exists():
        draw_film(Path(values["--video"]), 0)


def run(command):
    script, *arguments = command
    if script == "ffmpeg":
        subprocess.run(["ffmpeg", "-nostdin", *arguments], check=True)
    else:
        prepare(script, arguments)
        assert call(script, *arguments, *SMALL[script].split()) == 0, command


@pytest.fixture
def newcomer(tmp_path, monkeypatch):
    """Where a newcomer works: a folder with a small toy, whose last video is called as in the whole
    toy."""
    monkeypatch.chdir(tmp_path)
    data.draw_toy("runs/toy", videos=8)
    os.symlink("00008", "runs/toy/frames/val/01200")
    return tmp_path


@needs_ffmpeg
@pytest.mark.parametrize("text", [text for text in blocks("bash") if list(commands(text))])
def test_the_commands_of_the_readme_run(newcomer, capsys, text):
    for command in commands(text):
        capsys.readouterr()
        run(command)
        last = capsys.readouterr().out.splitlines()[-1:]
        if command[0] == "ensemble" or (command[0] == "evaluate" and "--video" not in command):
            assert re.fullmatch(MAP, last[0])
        if command[0] == "train":
            assert re.fullmatch(rf"best val {MAP} \(epoch 1\)", last[0])


def test_a_new_model_is_a_new_file_and_no_other_edit(newcomer, monkeypatch, capsys):
    write("mymodel.py", block("python", "RECIPES = {"))
    monkeypatch.syspath_prepend(newcomer)
    monkeypatch.setattr(evaluate, "__file__", str(newcomer / "evaluate.py"))  # the file's folder
    run(["train", "--model", "mymodel"])
    run(["evaluate", "--checkpoint", "runs/mymodel/best.pt"])
    assert re.fullmatch(MAP, capsys.readouterr().out.splitlines()[-1])


def test_a_checkpoint_is_carried_away_and_exported(newcomer, monkeypatch):
    """ONNX itself needs packages that the tests do without; torch.export is the step before."""
    run(["train", "--model", "tin", "--out", "."])
    names = {}
    exec(block("python", 'torch.load("best.pt"'), names)

    def export(model, clips, file, dynamo, dynamic_shapes):
        names["exported"] = torch.export.export(model, clips, dynamic_shapes=dynamic_shapes)

    monkeypatch.setattr(torch.onnx, "export", export)
    exec(block("python", "torch.onnx.export"), names)
    clip = torch.randn(1, 8, 3, 224, 224)  # the example in the block has two
    with torch.no_grad():
        close(names["exported"].module()(clip), names["model"](clip), 1e-5)


# ---- the whole report --------------------------------------------------------------------------

def recorded(folder, script, *arguments, **environ):
    """The commands of one of our shell scripts, [[script, argument ...], ...]. None is run."""
    record = write(folder / "record", "")
    for name in ("python", "torchrun"):
        write(folder / "programs" / name, f'#!/bin/sh\necho "$*" >> "{record}"\n').chmod(0o755)
    path = f"{folder / 'programs'}:{os.environ['PATH']}"
    subprocess.run(["bash", ROOT / "tests" / script, *arguments], cwd=folder, check=True,
                   env={**os.environ, "PATH": path, **environ})
    return [[Path(words[0]).stem, *words[1:]] for words in map(str.split, open(record))]


def test_the_report_on_a_laptop(newcomer, capsys):
    environ = dict(DATA="runs/toy", FLAGS="--epochs 1 --batch 8 --clips 1 --crops 1 --workers 0 "
                   "--device cpu")
    commands = recorded(newcomer, "laptop.sh", "out", **environ)
    for script, *arguments in commands:
        assert call(script, *arguments) == 0
    printed = re.sub(" +", " ", capsys.readouterr().out)
    assert re.search(r"\| `r50_8f` \| 59.85 \| \d+\.\d\d \| \d+\.\d\d \|", printed)
    assert re.search(r"video and image models \| 67.22 \| 60.77 \| \d+\.\d\d \|", printed)

    # the same command again: nothing is evaluated twice
    again = recorded(newcomer, "laptop.sh", "out", **environ)
    assert again == [command for command in commands if command[0] != "evaluate"]


def test_the_flags_of_the_reports_claims(newcomer, monkeypatch):
    """They are read, but none of these networks is trained here."""
    commands = recorded(newcomer, "laptop.sh", "out", DATA="runs/toy", CLAIMS="1")
    recipes = {}
    for script, *arguments in commands:
        if script == "train":
            monkeypatch.setattr("sys.argv", ["train.py", *arguments])
            args = train.parse_arguments()
            recipes[Path(args.out).name] = args.recipe
    assert len(recipes) == 17
    assert recipes["tin-rate"]["lr"] == pytest.approx(recipes["tin"]["lr"] * 10 / 1.7, rel=0.01)


@needs_ffmpeg
def test_the_report_on_films(tmp_path, capsys):
    """Two networks on ten drawn films, in the folders of the tank's authors."""
    places = ["inside,gate", "outside,two_stations"]
    for split, count in [("train", 6), ("val", 4)]:
        lines = ["fname,label,place,location,camera_id,comment"]
        for i in range(count):
            action = real.GROUPS["tank"]["action"][i % 4]
            name = f"{split}{i}"
            draw_film(tmp_path / f"films/data/train/{action}/{name}.mp4", 40 * i)
            lines.append(f'{name}.npy,{action},{places[i % 2]},0,"a comment, or none"')
        write(tmp_path / f"films/data/train_val_split/{split}_data.csv", "\n".join(lines))

    environ = dict(NETWORKS="tsn slowfast", FRAMES="4", FLAGS=(
        "--epochs 1 --batch 2 --crop 32 --jitter 32 36 --test-resize 36 --test-crop 32 --scales 32 "
        "--clips 1 --crops 1 --workers 0 --device cpu"))
    commands = recorded(tmp_path, "real.sh", "tank", "films", "out", **environ)
    for script, *arguments in commands:
        assert call(script, *arguments) == 0
    printed = capsys.readouterr().out
    assert "\n0 problems\n" in printed

    # Of the actions, two are in two training films and two in one, and each validates once: AP 1/2,
    # 1/2, 1/4, 1/4. Both places tie, and so do both locations.
    assert "| labels' frequencies | - | 47.9 | 37.5 | 25.0 | 50.0 | 50.0 | 50.0 | 50.0 |" in printed
    [clip] = re.findall(r"\| tsn \| clip \|(.*)", printed)
    assert f"| tsn | shuffled |{clip}" in printed  # TSN cannot tell
    assert "| all | fitted |" in printed

    again = recorded(tmp_path, "real.sh", "tank", "films", "out", **environ)
    assert [command[0] for command in again] == [
        "data", "train", "train", "ensemble", "ensemble", "real", "real"]


def test_the_words_of_a_grid_film():
    assert real.grid_line("bbaf2n") == "bbaf2n.mp4,bin,blue,at,letter f,two,now"
    assert real.grid_line("swwzza") == "swwzza.mp4,set,white,with,letter z,zero,again"
