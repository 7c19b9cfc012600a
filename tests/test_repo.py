"""README is true: which files need which, its tables, its commands and code in small. The whole
report runs too: on the toy by laptop.sh, on films by real.sh.

    python -m pytest tests/test_repo.py

Most commands run in this process (conftest.call), because a new one needs seconds to import torch.
"""
import importlib
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
import torchvision

import data
import evaluate
import real
import tables
import train
from conftest import ROOT, call, close, golden, golden_options, needs_ffmpeg, python, write

MODELS = ["tsn", "trn", "tsm", "tin", "slowfast"]
README = (ROOT / "README.md").read_text(encoding="utf-8")
IMPORTS = """\
tsn
trn
tsm
tin
slowfast
data
data evaluate
data evaluate train
data evaluate ensemble
"""


def test_a_file_needs_these_others_and_downloads_nothing(tmp_path):
    """A line a file: itself and what it imports. Nothing else is printed."""
    run = python(ROOT / "tests" / "alone.py", *MODELS, "data", "evaluate", "train", "ensemble",
                 PYTHONPATH=ROOT, TORCH_HOME=tmp_path)
    assert (run.returncode, run.stdout, run.stderr) == (0, IMPORTS, "")
    assert not (tmp_path / "hub").exists()  # where downloads would go


def test_the_tables_are_the_reports():
    """A row of the report is one line of README: its recipe, then its figures."""
    for name in MODELS:
        module = importlib.import_module(name)
        assert {*module.REPORTED, "toy"} == set(module.RECIPES)
        for row, figures in module.REPORTED.items():
            [line] = [line for line in README.splitlines() if f"| `{name} {row}` |" in line]
            if figures is not None:
                for figure in np.atleast_1d(figures):
                    line = line[line.index(f"| {figure:.2f} "):]  # right of the one before
    for validation, test in tables.ENSEMBLES.values():
        assert re.search(rf"\b{validation}\b.*\b{test}\b", README)


# ---- public weights ----------------------------------------------------------------------------

def test_every_flag_of_the_readme_exists(capsys):
    helps = [torch.distributed.run.get_args_parser().format_help()]
    for script, *arguments in [("data", "extract"), ("data", "toy"), ("ensemble",), ("train",),
                               ("evaluate",)]:
        call(script, *arguments, "--help")
        helps.append(capsys.readouterr().out)
    flags = set(re.findall(r"--[a-z][a-z-]+", " ".join(helps).replace("_", "-")))
    recipes = [data.RECIPE, evaluate.RECIPE, train.RECIPE]
    for name in MODELS:
        recipes += importlib.import_module(name).RECIPES.values()
    for recipe in recipes:
        for key in recipe:
            flags |= {f"--{key}".replace("_", "-"), f"--no-{key}".replace("_", "-")}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)) <= flags


def test_the_flags_of_the_claims_are_read(monkeypatch):
    _, claims = README.split("## The report's claims on the toy")
    rows = re.findall(r"^\|.*`(--model .*)` \|$", claims, re.MULTILINE)
    assert rows
    for flags in rows:
        monkeypatch.setattr("sys.argv", ["train.py", *flags.split()])
        train.parse_arguments()


PYSLOWFAST = "--fusion-norm --fc-bias --slow-index linspace"


@pytest.mark.parametrize("case, flags", [
    ("tsn_mmaction2_r101_t5", "--model tsn"),
    ("tsn_tsnpytorch_r101_t5", "--model tsn"),
    ("tsn_timm_irv2_t5", "--model tsn --recipe inception_resnet_v2_5f"),
    ("tsn_timm_senet154_t5", "--model tsn --recipe senet154_5f"),
    ("trn_trnpytorch_r50_t8_multiscale", "--model trn"),
    ("trn_mmaction2_r50_t8_single", "--model trn --no-multiscale"),
    ("tsm_mmaction2_r50_t8", "--model tsm"),
    ("tsm_mit_r50_t8", "--model tsm"),
    ("tsm_mit_r50_t16", "--model tsm --recipe r50_16f"),
    ("tin_xtemporal_r50_t8", "--model tin --recipe r50_8f"),
    ("tin_deepcs233_r50_t8", "--model tin"),
    ("slowfast_xtemporal_8x8_r101", "--model slowfast"),
    ("slowfast_xtemporal_8x8_r50", "--model slowfast --depth 50"),
    ("slowfast_xtemporal_8x8_r200", "--model slowfast --depth 200"),
    ("slowfast_mmaction2_8x8_r50", "--model slowfast --depth 50 --fusion-kernel 7 --fc-bias"),
    ("slowfast_mmaction2_8x8_r101", "--model slowfast --fusion-kernel 7 --fc-bias"),
    ("slowfast_mmaction2_slow_8x8_r50",
     "--model slowfast --recipe r101_slow_8x8 --depth 50 --fc-bias"),
    ("slowfast_mmaction2_fast_16x2_r101", "--model slowfast --recipe r101_fast_16x2 --fc-bias"),
    ("slowfast_pyslowfast_8x8_r50",
     f"--model slowfast --depth 50 --fusion-kernel 7 {PYSLOWFAST}"),
    ("slowfast_pyslowfast_c2_8x8_r50",
     f"--model slowfast --depth 50 --fusion-kernel 7 {PYSLOWFAST}"),
    ("slowfast_pytorchvideo_8x8_r50",
     f"--model slowfast --depth 50 --fusion-kernel 7 {PYSLOWFAST}"),
    ("slowfast_pyslowfast_4x16_r50",
     f"--model slowfast --variant slowfast_4x16 --depth 50 {PYSLOWFAST}"),
    ("slowfast_pyslowfast_slow_8x8_r50",
     "--model slowfast --recipe r101_slow_8x8 --depth 50 --fc-bias"),
    ("slowfast_pytorchvideo_slow_8x8_r50",
     "--model slowfast --recipe r101_slow_8x8 --depth 50 --fc-bias"),
])
def test_the_flags_of_public_weights_are_their_options(case, flags, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py", "--data", "DATA", *flags.split()])
    recipe = train.parse_arguments().recipe
    for option, value in golden_options(case).items():
        if option != "num_classes":
            assert recipe[option] == value


# ---- README's commands and code ----------------------------------------------------------------

SMALL = {  # more flags, for a small run; of a flag that is given twice the last counts
    "data": "",
    "train": "--recipe toy --epochs 1 --batch 4 --workers 0 --device cpu",
    "evaluate": "--workers 0 --device cpu",
    "ensemble": "",
}


@pytest.fixture
def newcomer(tmp_path, monkeypatch):
    """The folder of someone who reads README, with a small toy."""
    monkeypatch.chdir(tmp_path)
    data.draw_toy("runs/toy", videos=8)
    return tmp_path


def block(language, words):
    """The one block of README in this language that holds these words."""
    [text] = [text for text in re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)
              if words in text]
    return text


def run(script, *arguments):
    assert call(script, *arguments, *SMALL[script].split()) == 0, arguments


def run_block(words):
    """Run a block's scripts in this process, even where README names more."""
    text = block("bash", words).replace("\\\n", " ")  # lines that go on in the next one
    for line in text.splitlines():
        command = shlex.split(line)
        while not command[0].endswith(".py"):  # installation, python, torchrun's flags
            del command[0]
        run(command[0].removesuffix(".py"), *command[1:])


def draw_film(path, hue=0):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = f"testsrc=size=64x48:rate=30:duration=0.5,hue=h={hue}"
    subprocess.run(["ffmpeg", "-nostdin", "-v", "error", "-f", "lavfi", "-i", picture, path],
                   check=True)


def draw_films(folder, count):
    """-> the lines of their list, in three classes."""
    lines = []
    for i in range(count):
        draw_film(f"{folder}/{i}.mp4", hue=30 * i)
        lines.append(f"{i}.mp4,{['boating', 'cooking', 'dancing'][i % 3]}\n")
    return lines


def test_the_first_command(newcomer):
    run_block("requirements.txt && torchrun train.py")


@needs_ffmpeg
def test_your_own_videos(newcomer):
    write("labels.csv", "".join(draw_films("VIDEOS", 12)))
    draw_film("new.mp4")
    run_block("labels.csv")


@needs_ffmpeg
def test_a_toy_video_is_labelled(newcomer):
    run("train", "--model", "tin")
    os.symlink("00008", "runs/toy/frames/val/01200")  # as a video of the whole toy is called
    join, label = block("bash", "toy.mp4").splitlines()
    subprocess.run(shlex.split(join), check=True)
    run("evaluate", *label.split()[2:])


@needs_ffmpeg
def test_mmit_itself(newcomer):
    lines = draw_films("videos", 6)
    write("trainingSet.csv", "".join(lines[:4]))
    write("validationSet.csv", "".join(lines[4:]))
    run_block("trainingSet.csv")


def test_public_weights(newcomer):
    shutil.copytree("runs/toy", "DATA")
    torch.save(golden("tin_xtemporal_r50_t8").checkpoint, "tin_r50_8f_mmit.pth.tar")
    run_block("tin_r50_8f_mmit.pth.tar")


def test_a_new_model_is_a_new_file_and_no_other_edit(newcomer):
    for name in ["data", "evaluate", "train", "tsn"]:
        shutil.copy(ROOT / f"{name}.py", newcomer)
    write("mymodel.py", block("python", "RECIPES = {"))
    process = python("train.py", "--model", "mymodel", *SMALL["train"].split())
    assert "\nbest val mAP" in process.stdout, process.stderr


def test_a_checkpoint_is_carried_away_and_exported(newcomer, monkeypatch):
    """ONNX itself needs packages that the tests do without; torch.export is the step before."""
    run("train", "--model", "tin", "--out", ".")
    text = block("python", 'torch.load("best.pt"') + block("python", "torch.onnx.export")
    write("elsewhere.py", text)
    exported = []

    def export(model, clips, file, dynamo, dynamic_shapes):
        exported.append(torch.export.export(model, clips, dynamic_shapes=dynamic_shapes))

    def get_state_dict(weights):  # without a download
        return torchvision.models.resnet101().state_dict()

    monkeypatch.setattr(torchvision.models.ResNet101_Weights, "get_state_dict", get_state_dict)
    monkeypatch.syspath_prepend(newcomer)
    monkeypatch.setattr(torch.onnx, "export", export)
    model = importlib.import_module("elsewhere").model
    clip = torch.randn(1, 8, 3, 224, 224)  # the example in the block has two
    with torch.no_grad():
        close(exported[0].module()(clip), model(clip), 1e-5)


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


def test_the_flags_of_the_reports_claims(tmp_path, monkeypatch):
    """They are read, but none of these networks is trained here."""
    for script, *arguments in recorded(tmp_path, "laptop.sh", "out", CLAIMS="1"):
        if script == "train":
            monkeypatch.setattr("sys.argv", ["train.py", *arguments])
            train.parse_arguments()


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


def test_shuffled_clips_have_orders_of_their_own():
    clips = torch.arange(8).repeat(2, 1).view(2, 8, 1, 1, 1)
    first, second = real.Shuffled(torch.nn.Flatten())(clips).tolist()
    assert sorted(first) == sorted(second) == list(range(8))
    assert first != second
    assert first != sorted(first)


def test_the_words_of_a_grid_film():
    assert real.grid_line("bbaf2n") == "bbaf2n.mp4,bin,blue,at,letter f,two,now"
    assert real.grid_line("swwzza") == "swwzza.mp4,set,white,with,letter z,zero,again"
