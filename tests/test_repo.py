"""What can be checked of README: which files need which, its tables and flags, and its commands and
code, run in small. The whole report runs too: on the toy by laptop.sh, on films by real.sh. Two
functions of real.py are at the end.

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
import real
import tables
import train
from conftest import (ROOT, call, close, golden, golden_options, needs_ffmpeg, python,
                      scripts_with_tiny, write)

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
    """A line for each file: which of these files are loaded once it has been imported. Nothing else
    is printed."""
    run = python(ROOT / "tests" / "alone.py", *MODELS, "data", "evaluate", "train", "ensemble",
                 PYTHONPATH=ROOT, TORCH_HOME=tmp_path)
    assert (run.returncode, run.stdout, run.stderr) == (0, IMPORTS, "")
    assert not (tmp_path / "hub").exists()  # where downloads would go


def test_the_tables_have_the_figures_of_the_model_files():
    """A row of the report is in README: its recipe, then its figures."""
    for name in MODELS:
        module = importlib.import_module(name)
        assert {*module.REPORTED, "toy"} == set(module.RECIPES)
        for row, figures in module.REPORTED.items():
            cells = "no figure"
            if figures is not None:
                cells = " | ".join(f"{figure:.2f}" for figure in np.atleast_1d(figures))
            assert f"| `{name} {row}` | {cells}" in README
    for validation, test in tables.ENSEMBLES.values():
        assert f"| {validation} (test {test}) |" in README


# ---- flags -------------------------------------------------------------------------------------

def test_every_flag_of_the_readme_exists(capsys):
    commands = ["data extract", "evaluate", "ensemble"]
    commands += [f"train --model {name}" for name in MODELS]
    for command in commands:
        call(*command.split(), "--help")
    helps = torch.distributed.run.get_args_parser().format_help() + capsys.readouterr().out
    flag = r"(?<![\w-])--[a-z][a-z-]+"
    known = re.findall(flag, helps.replace("_", "-"))  # torchrun's help has --max_restarts
    assert set(re.findall(flag, README)) - set(known) == set()


def parsed(flags, monkeypatch):
    """What train.py reads from the flags."""
    monkeypatch.setattr("sys.argv", ["train.py", *flags.split()])
    return train.parse_arguments()


def test_the_flags_of_the_claims_are_those_of_the_runs(tmp_path, monkeypatch):
    """README's table names flags that laptop.sh uses. train.py reads them; nothing is trained."""
    runs = []
    for file, *arguments in recorded(tmp_path, "laptop.sh", "out", CLAIMS="1"):
        if file == "train.py":
            runs.append(" ".join(arguments))
    for flags in runs:
        parsed(flags, monkeypatch)
    claims = re.findall(r"`(--model .*)` \|\n", README)
    assert len(claims) == 9
    for flags in claims:
        assert any(f"{flags} " in f"{run} " for run in runs), flags


PYSLOWFAST = "--fusion-norm --fc-bias --slow-index linspace"


@pytest.mark.parametrize("flags, cases", [
    ("--model tsn", "tsn_mmaction2_r101_t5 tsn_tsnpytorch_r101_t5"),
    ("--model tsn --recipe inception_resnet_v2_5f", "tsn_timm_irv2_t5"),
    ("--model tsn --recipe senet154_5f", "tsn_timm_senet154_t5"),
    ("--model trn", "trn_trnpytorch_r50_t8_multiscale"),
    ("--model trn --no-multiscale", "trn_mmaction2_r50_t8_single"),
    ("--model tsm", "tsm_mmaction2_r50_t8 tsm_mit_r50_t8"),
    ("--model tsm --recipe r50_16f", "tsm_mit_r50_t16"),
    ("--model tin --recipe r50_8f", "tin_xtemporal_r50_t8 tin_deepcs233_r50_t8"),
    ("--model slowfast", "slowfast_xtemporal_8x8_r101"),
    ("--model slowfast --depth 50", "slowfast_xtemporal_8x8_r50"),
    ("--model slowfast --depth 200", "slowfast_xtemporal_8x8_r200"),
    ("--model slowfast --fusion-kernel 7 --fc-bias", "slowfast_mmaction2_8x8_r101"),
    ("--model slowfast --depth 50 --fusion-kernel 7 --fc-bias", "slowfast_mmaction2_8x8_r50"),
    ("--model slowfast --recipe r101_fast_16x2 --fc-bias", "slowfast_mmaction2_fast_16x2_r101"),
    ("--model slowfast --recipe r101_slow_8x8 --depth 50 --fc-bias",
     "slowfast_mmaction2_slow_8x8_r50 slowfast_pyslowfast_slow_8x8_r50 "
     "slowfast_pytorchvideo_slow_8x8_r50"),
    (f"--model slowfast --depth 50 --fusion-kernel 7 {PYSLOWFAST}",
     "slowfast_pyslowfast_8x8_r50 slowfast_pyslowfast_c2_8x8_r50 slowfast_pytorchvideo_8x8_r50"),
    (f"--model slowfast --variant slowfast_4x16 --depth 50 {PYSLOWFAST}",
     "slowfast_pyslowfast_4x16_r50"),
])
def test_these_flags_give_the_options_of_a_golden_case(flags, cases, monkeypatch):
    """Most are flags that the model files' comments name, copied by hand; cases are those of
    tests/golden."""
    recipe = parsed(f"--data DATA {flags}", monkeypatch).recipe
    for case in cases.split():
        options = golden_options(case)
        del options["num_classes"]
        assert options.items() <= recipe.items()


# ---- README's commands and code ----------------------------------------------------------------

SMALL = {  # more flags, for a small run; of a flag that is given twice the last counts
    "train": "--recipe toy --epochs 1 --batch 4 --workers 0 --device cpu",
    "evaluate": "--workers 0 --device cpu",
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
    assert call(script, *arguments, *SMALL.get(script, "").split()) == 0, arguments


def run_block(words):
    """Run a block's scripts in this process. What stands before them is left out: the installation,
    python, torchrun and its flags."""
    text = block("bash", words).replace("\\\n", " ")  # lines that go on in the next one
    for line in text.splitlines():
        command = shlex.split(line)
        while not command[0].endswith(".py"):
            del command[0]
        run(command[0].removesuffix(".py"), *command[1:])


def draw_film(path):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    picture = "testsrc=size=64x48:rate=30:duration=0.5"
    subprocess.run(["ffmpeg", "-nostdin", "-v", "error", "-f", "lavfi", "-i", picture, path],
                   check=True)


def draw_films(folder, count):
    """-> the lines of their list, in three classes."""
    lines = []
    for i in range(count):
        draw_film(f"{folder}/{i}.mp4")
        lines.append(f"{i}.mp4,{['boating', 'cooking', 'dancing'][i % 3]}\n")
    return lines


def test_the_first_command_runs(newcomer):
    run_block("requirements.txt && torchrun train.py")


@needs_ffmpeg
def test_the_commands_for_your_own_videos_run(newcomer):
    write("labels.csv", "".join(draw_films("VIDEOS", 12)))
    draw_film("new.mp4")
    run_block("labels.csv")
    assert Path("new.png").exists()


@needs_ffmpeg
def test_a_toy_video_is_labelled(newcomer):
    run("train", "--model", "tin")
    os.symlink("00008", "runs/toy/frames/val/01200")  # README's is not in this small toy
    make_video, label_it = block("bash", "toy.mp4").splitlines()
    subprocess.run(shlex.split(make_video), check=True)
    run("evaluate", *label_it.split()[2:])


@needs_ffmpeg
def test_the_commands_for_mmit_run(newcomer):
    lines = draw_films("videos", 6)
    write("trainingSet.csv", "".join(lines[:4]))
    write("validationSet.csv", "".join(lines[4:]))
    run_block("trainingSet.csv")


def test_public_weights_are_evaluated(newcomer):
    shutil.copytree("runs/toy", "DATA")
    torch.save(golden("tin_xtemporal_r50_t8").checkpoint, "tin_r50_8f_mmit.pth.tar")
    run_block("tin_r50_8f_mmit.pth.tar")


def test_a_new_model_is_a_new_file_and_no_other_edit(newcomer):
    scripts_with_tiny(newcomer)
    shutil.copy(ROOT / "tsn.py", newcomer)
    write("mymodel.py", block("python", "RECIPES = {"))
    process = python("train.py", "--model", "mymodel", *SMALL["train"].split())
    assert "\nbest val mAP" in process.stdout, process.stderr


def test_a_checkpoint_is_carried_away_and_exported(newcomer, monkeypatch):
    """ONNX itself needs packages that the tests do without; torch.export is the step before."""
    run("train", "--model", "tin", "--out", ".")

    def get_state_dict(weights):  # without a download
        return torchvision.models.resnet101().state_dict()

    def export(model, clips, file, dynamo, dynamic_shapes):
        exported = torch.export.export(model, clips, dynamic_shapes=dynamic_shapes).module()
        clip = torch.randn(1, 8, 3, 224, 224)  # the example in the block has two
        with torch.no_grad():
            close(exported(clip), model(clip), 1e-5)

    monkeypatch.setattr(torchvision.models.ResNet101_Weights, "get_state_dict", get_state_dict)
    monkeypatch.setattr(torch.onnx, "export", export)
    monkeypatch.syspath_prepend(newcomer)
    text = block("python", 'torch.load("best.pt"') + block("python", "torch.onnx.export")
    write("elsewhere.py", text)
    importlib.import_module("elsewhere")


# ---- the whole report --------------------------------------------------------------------------

def recorded(folder, script, *arguments, **environ):
    """The commands that one of our shell scripts would run, [[file, argument, ...], ...]. Its
    python and torchrun are replaced by programs that only print their arguments."""
    for name in ("python", "torchrun"):
        write(folder / name, '#!/bin/sh\necho "$*"\n').chmod(0o755)
    environ["PATH"] = f"{folder}:{os.environ['PATH']}"
    lines = subprocess.check_output(["bash", ROOT / "tests" / script, *arguments], cwd=folder,
                                    text=True, env={**os.environ, **environ})
    return [line.split() for line in lines.splitlines()]


def run_report(folder, script, *arguments, **environ):
    """Run these commands in this process -> the files that the same script would run next time."""
    for file, *flags in recorded(folder, script, *arguments, **environ):
        assert call(Path(file).stem, *flags) == 0
    return [command[0] for command in recorded(folder, script, *arguments, **environ)]


def test_laptop_sh_runs_and_goes_on_where_it_stopped(newcomer, capsys):
    again = run_report(newcomer, "laptop.sh", "out", DATA="runs/toy", FLAGS=(
        "--epochs 1 --batch 8 --clips 1 --crops 1 --workers 0 --device cpu"))
    # All seven are called with --resume, two ensembles are made, and nothing is evaluated twice.
    assert again == 7 * ["train.py"] + 2 * ["ensemble.py"] + ["tests/tables.py"]
    printed = capsys.readouterr().out
    assert re.search(r"\| `r50_8f` \| 59.85 \| \d+\.\d\d \| \d+\.\d\d \|", printed)
    assert re.search(r"video and image models \| 67.22 \| 60.77 \| \d+\.\d\d \|", printed)


@needs_ffmpeg
def test_real_sh_runs_and_goes_on_where_it_stopped(tmp_path, capsys):
    """Two networks on ten drawn films, in the folders of the tank's authors."""
    for split, count in [("train", 6), ("val", 4)]:
        lines = ["fname,label,place,location,camera_id,comment"]
        for i in range(count):
            action = real.GROUPS["tank"]["action"][i % 4]
            place = ["inside,gate", "outside,two_stations"][i % 2]
            draw_film(tmp_path / f"films/data/train/{action}/{split}{i}.mp4")
            lines.append(f'{split}{i}.npy,{action},{place},0,"a comment, or none"')
        write(tmp_path / f"films/data/train_val_split/{split}_data.csv", "\n".join(lines))

    again = run_report(
        tmp_path, "real.sh", "tank", "films", "out", NETWORKS="tsn slowfast", FRAMES="4", FLAGS=(
            "--epochs 1 --batch 2 --crop 32 --jitter 32 36 --test-resize 36 --test-crop 32 "
            "--scales 32 --clips 1 --crops 1 --workers 0 --device cpu"))
    assert again == ["data.py", "train.py", "train.py", "ensemble.py", "ensemble.py",
                     "tests/real.py", "tests/real.py"]
    printed = capsys.readouterr().out
    assert "\n0 problems\n" in printed

    # A label's score is its number of training films: of the four actions 2, 2, 1 and 1, of both
    # places 3, of both locations 3. The four films of validation have different actions.
    #   all labels  place and location are two of the four labels at 3: 2/4 each; the action is the
    #               third right one of six or of eight: 3/6 or 3/8. The mean is 47.92.
    #   actions     one of two equals, 1/2, or of four, 1/4; first is always the same: 1 film of 4
    #   places      one of two equals, 1/2; first is always the same: 2 films of 4
    #   locations   likewise
    assert "| labels' frequencies | 47.92 | 37.50 | 25.00 " + 4 * "| 50.00 " + "|\n" in printed
    [figures] = re.findall(r"\| tsn-clip \|(.*)", printed)
    assert f"| tsn-shuffled |{figures}" in printed  # TSN cannot tell
    assert "| all-fitted |" in printed


def test_every_shuffled_video_has_an_order_of_its_own():
    def make_views():
        return [torch.arange(8)[None]]  # one clip at one scale

    make_shuffled = real.shuffled(make_views)
    first = make_shuffled()[0][0].tolist()
    second = make_shuffled()[0][0].tolist()
    assert sorted(first) == list(range(8))
    assert first != second


def test_the_words_of_a_grid_film():
    assert real.grid_line("bbaf2n") == "bbaf2n.mp4,bin,blue,at,f,two,now"
    assert real.grid_line("swwzza") == "swwzza.mp4,set,white,with,z,zero,again"
