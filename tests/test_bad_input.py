"""Bad input to any command is one line on stderr and exit status 2. The line names the file, the
list line or the flag, and says what is wanted. There is no traceback, and no file is left behind.
What only looks bad, such as a space in a path, works.

    python -m pytest tests/test_bad_input.py

One table holds all commands. They run in this process, in a folder that has a toy of 16 videos, a
trained network, its scores, and spoilt variants of these. Less common damage to lists, frames and
checkpoints is tested beside the functions that read them.
"""
import argparse
import os
import shlex
import shutil

import numpy as np
import pytest
import torch

import data
from conftest import call

TRAIN = "train --model tsn --recipe toy --data toy --epochs 1 --batch 8 --workers 0 --device cpu"

# A command -> [(more arguments, words of the line)]. Where a flag is given twice, the last counts.
TABLE = {
    "data toy": [
        ("", "required: OUT"),
        ("toy", "toy: already there; name a new folder"),
        ("new --videos 7", "--videos 7: at least 8"),
        ("new --videos many", "argument --videos: invalid int value: 'many'"),
        ("new --seed -1", "--seed -1: at least 0"),
        ("file/new", "'file/new"),  # `file` is no folder
    ],
    "data extract --videos videos --out new": [
        ("", "one of the arguments --split --val is required"),
        ("--val 0.2 --split train", "not allowed with argument --val"),
        ("--split a/b", "--split a/b: a name such as train"),
        ("--val 1", "--val 1.0: a fraction between 0 and 1, such as 0.2"),
        ("--val 0.2 --workers 0", "--workers 0: from 1 to 1000"),
        ("--val 0.2 --videos gone", "gone: no such folder"),
        ("--val 0.2 --videos empty", "empty: no video in it (endings: mp4 m4v"),
        ("--val 0.2 --videos twins", "would both be called text: rename one"),
        ("--val 0.2 --out file", "'file/frames'"),
        ("--val 0.2 --list gone.csv", "'gone.csv'"),
        ("--val 0.2 --list nothing", "nothing: lists no video"),
        ("--val 0.2 --list binary", "binary: not a text file in UTF-8; save it as one"),
        ("--val 0.2 --list semicolons.csv", "semicolons.csv:1: the file is read as csv"),
        ("--val 0.2 --list columns.csv", "columns.csv:1: a label appears twice"),
        ("--val 0.2 --list mixed.csv", "mixed.csv:1: 'text.mp4,cooking,3' mixes class"),
        ("--val 0.2 --list mmaction2.txt", "can be read in several ways; choose one with --format"),

        # toy/categories.txt is there: the list must fit it
        ("--val 0.2 --out toy --list names.csv", "names.csv:1: the class 'cooking' is not in"),
        ("--val 0.2 --out toy --list ids.csv", "ids.csv:1: label 10, but the last class"),

        # the line says what was expected
        ("--val 0.2 --list ids.csv --format ours", "path num_frames id[,id...]"),
        ("--val 0.2 --list mmaction2.txt --format csv", "name.mp4,id[,id...]"),
        ("--val 0.2 --list ids.csv --format mmaction2-frames", "path num_frames id [id ...]"),
        ("--val 0.2 --list ids.csv --format mmaction2-videos", "name.mp4 id [id ...]"),
        ("--val 0.2 --list ids.csv --format excel", "argument --format: invalid choice: 'excel'"),
    ],
    "data check": [
        ("gone", "gone/categories.txt: missing; write the names of the classes there"),
        ("file", "file/categories.txt: missing"),
        ("no-names", "no-names/categories.txt: names no class"),
        ("gap", "gap/categories.txt:2: an empty line would shift the ids"),
        ("twice", "twice/categories.txt: the name 'moving+right' appears twice"),
        ("ids", "ids/categories.txt: the ids must be 0 to 1, each once"),
        ("no-lists", "no-lists: no train.txt, val.txt or test.txt; python data.py extract --out"),
        ("nothing-listed", "nothing-listed/train.txt: lists no video"),
        ("no-labels", "no-labels/train.txt:1: the file is read as ours"),
        ("label", "label/train.txt:1: label 10, but the last class of categories.txt is 9"),
        ("outside", "outside/train.txt:1: '../00000' must be a relative path"),
        ("absolute", "absolute/train.txt:1: '/00000' must be a relative path"),
        ("bytes", "bytes/train.txt: not a text file in UTF-8"),
    ],
    f"{TRAIN} --out new": [
        # the data folder
        ("--data gone", "gone/categories.txt: missing; write the names of the classes there"),
        ("--data no-lists", "no-lists/train.txt: missing; python data.py extract --out no-lists"),
        ("--data no-val", "no-val/val.txt: missing; python data.py extract --out no-val --split"),
        ("--data unlabelled", "unlabelled/val.txt: no video has a label"),
        ("--data lost --batch 1 --out begun", "lost/train.txt:1: lost/frames/train/gone/img_"),
        ("--loss ce", "toy/train.txt:1: 2 labels; --loss ce needs exactly one for every video"),

        # flags
        ("--no-such-flag 1", "unrecognized arguments: --no-such-flag"),
        ("--batch 17", "--batch 17: more than the 16 videos of toy/train.txt; try --batch 16"),
        ("--batch 0", "--batch 0: at least 1"),
        ("--batch 1 --frames 1 --out begun", "Expected more than 1 value per channel"),
        ("--workers -1", "--workers -1: at least 0"),
        ("--save-every 0", "--save-every 0: at least 1"),
        ("--seed -1", "--seed -1: at least 0"),
        ("--epochs 0", "--epochs 0: at least 1"),
        ("--frames 0", "--frames 0: at least 1"),
        ("--crop 37", "--crop 37: larger than the short side that it is cut from"),
        ("--jitter 36", "--jitter [36]: two numbers, the smaller one first"),
        ("--jitter 40 36", "--jitter [40, 36]: two numbers, the smaller one first"),
        ("--mean 0.5 0.5", "--mean and --std: three numbers each"),
        ("--std 0 1 1", "--mean and --std: three numbers each"),
        ("--lr fast", "argument --lr: invalid float value: 'fast'"),
        ("--lr nan", "--lr nan: must be finite and not negative"),
        ("--momentum -1", "--momentum -1.0: must be finite and not negative"),
        ("--dropout 2", "dropout probability has to be between 0 and 1, but got 2"),
        ("--loss hinge", "--loss hinge: known are bce, lsep, warp, ce"),
        ("--schedule linear", "--schedule linear: known are step, cosine"),
        ("--sampling dense", "--sampling dense: known are segments, clip"),
        ("--augment none", "--augment none: known are multiscale, jitter"),
        ("--class-weight log", "--class-weight log: known are none, sqrt, ratio"),
        ("--class-weight sqrt --loss lsep", "--class-weight sqrt: goes with --loss bce"),
        ("--amp int8", "argument --amp: invalid choice: 'int8'"),
        ("--device moon", "--device moon: "),
        ("--device cuda:99", "--device cuda:99: "),
        ("--out file/run", "'file/run'"),

        # the network and its first weights
        ("--model gone", "--model gone: no model file; there are slowfast, tin, trn, tsm, tsn"),
        ("--model ../tsn", "--model ../tsn: no model file"),
        ("--model data", "--model data: no model file"),
        ("--recipe gone", "--recipe gone: tsn.py has the rows r101_5f, "),
        ("--backbone resnet9", "resnet9"),
        ("--init imagnet", "--init imagnet: no such file"),
        ("--init nothing", "nothing: not a PyTorch checkpoint, or truncated"),
        ("--init object.pt", "object.pt: asks for a Python object that is not a tensor"),
        ("--init run/best.pt --backbone resnet34", "conv1.weight is not in the file"),
        ("--init run/best.pt --model slowfast", "run/best.pt: slowfast.py has no place for"),
    ],
    f"{TRAIN} --out run": [  # where a run with these settings has finished
        ("", "run/last.pt: a run is there already; continue it with --resume"),
        ("--resume --lr 0.5", "run/last.pt: belongs to another run: lr 0.03 there, 0.5 here"),
        ("--resume --lr 0.5", "; to start a new run from its weights: --init run/last.pt --out"),
        ("--resume --seed 1", "seed 0 there, 1 here"),
        ("--resume --model trn", "model tsn there, trn here"),
        ("--resume --epochs 2 --batch 4", "batch 8 there, 4 here, epochs 1 there, 2 here"),
        ("--resume --data shorter", "another list, of 16 videos; the list here has 15; to start"),
        ("--resume --data longer", "another list, of 16 videos; the list here has 17; to start"),
        ("--resume --data reordered", "another list, of 16 videos; the list here has 16; to start"),
        ("--resume --data swapped", "class 0 is 'moving+left' in this data folder, but '"),
    ],
    "evaluate --checkpoint run/best.pt --data toy --workers 0": [
        ("--checkpoint gone.pt", "'gone.pt'"),
        ("--checkpoint toy", "'toy'"),
        ("--checkpoint cut.pt", "cut.pt: not a PyTorch checkpoint, or truncated"),
        ("--checkpoint tensor.pt", "tensor.pt: not a PyTorch checkpoint"),
        ("--checkpoint val.npz", "val.npz: not a PyTorch checkpoint"),
        ("--checkpoint plain.pt", "for other people's files: --model NAME --weights plain.pt"),
        ("--data gone", "gone/categories.txt: missing; write the names of the classes there"),
        ("--data no-val", "no-val/val.txt: missing; python data.py extract --out no-val --split"),
        ("--data lost", "lost/val.txt:1: lost/frames/train/gone/img_"),
        ("--data swapped", "class 0 is 'moving+right' in run/best.pt, but 'moving+left' in"),
        ("--data fewer", "run/best.pt names 10 classes, fewer/categories.txt 9"),
        ("--split gone", "toy/gone.txt: missing"),
        ("--recipe toy", "--recipe are for other people's weights"),
        ("--batch 0", "--batch 0: at least 1"),
        ("--view-batch 0", "--view-batch 0: at least 1"),
        ("--workers -1", "--workers -1: at least 0"),
        ("--clips 0", "--clips 0: at least 1"),
        ("--scales 36 0", "--scales [36, 0]: at least 1"),
        ("--crops 5", "--crops 5: known are 1, 3, random"),
        ("--test-crop 99", "--test-crop 99: larger than the short side that it is cut from"),
        ("--no-such-flag 1", "unrecognized arguments: --no-such-flag"),
        ("--out gone/out.npz", "gone/out.npz: there is no such folder, or it cannot be written to"),
        ("--out toy", "toy: is a folder; name a file"),
        ("--json", "--json and --picture go with --video"),
        ("--picture out.png", "--json and --picture go with --video"),
    ],
    "evaluate --checkpoint run/best.pt --video videos/text.mp4": [
        ("", "videos/text.mp4: 0 frames; ffmpeg: "),
        ("--video gone.mp4", "gone.mp4: 0 frames; ffmpeg: "),
        ("--top 0", "--top 0: at least 1"),
        ("--out out.npz", "--out goes with a list of videos, not with --video"),
        ("--picture out.tune", "--picture out.tune: unknown kind of picture; try .png"),
        ("--picture gone/out.png", "gone/out.png: there is no such folder"),
    ],
    "evaluate --model tsn --recipe toy --weights plain.pt --data toy": [
        ("--model gone", "--model gone: no model file; there are slowfast, tin, trn, tsm, tsn"),
        ("--model slowfast", "plain.pt: slowfast.py has no place for the key"),
        ("--recipe gone", "--recipe gone: tsn.py has the rows r101_5f, "),
        ("--backbone resnet34", "plain.pt: does not fit the network: backbone.layer1.2."),
        ("--data fewer", "plain.pt knows 10 classes, fewer/categories.txt names 9"),
    ],
    "evaluate --model tsn --data toy": [
        ("", "which network? --checkpoint FILE, or --model NAME --weights FILE"),
    ],
    "ensemble val.npz": [
        ("gone.npz", "gone.npz: no such file"),
        ("nothing", "nothing: not a score file of evaluate.py --out"),
        ("run/best.pt", "run/best.pt: not a score file of evaluate.py --out"),
        ("train.npz", "train.npz: not the videos of val.npz: 20 are in only one"),
        ("swapped.npz", "class 0 is 'moving+right' in val.npz, but 'moving+left' in swapped.npz"),
        ("relabelled.npz", "relabelled.npz: the labels of 1 videos are not those of val.npz"),
        ("unlabelled.npz", "only one of val.npz and unlabelled.npz has labels"),
        ("fewer.npz", "fewer.npz: 9 classes, but val.npz has 10"),
        ("--weights 1 2", "--weights: 2 numbers for 1 files"),
        ("--weights -1", "--weights [-1.0]: numbers from 0 up, not all 0"),
        ("--weights weights.json", "argument --weights: invalid float value: 'weights.json'"),
        ("--weights 1 --fit", "not allowed with argument --weights"),
        ("--out gone/out.npz", "gone/out.npz: there is no such folder, or it cannot be written to"),
    ],
    "ensemble unlabelled.npz": [
        ("--fit", "--fit: unlabelled.npz has no labels to fit to"),
    ],
}
CASES = []
for command, rows in TABLE.items():
    for arguments, words in rows:
        CASES.append((command, arguments, words))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The working folder, with all that the table names."""
    home = os.getcwd()
    folder = tmp_path_factory.mktemp("bad input")  # with a space, on purpose
    os.chdir(folder)
    data.draw_toy("toy", videos=16)
    make_data_folders()
    make_files()

    assert call(*TRAIN.split(), "--out", "run") == 0
    for split in ("train", "val"):
        assert call("evaluate", "--checkpoint", "run/best.pt", "--data", "toy", "--workers", 0,
                    "--split", split, "--out", f"{split}.npz") == 0
    make_checkpoints()
    make_score_files()
    yield folder
    os.chdir(home)


def make_data_folders():
    first, second, *others = data.TOY_CATEGORIES
    with open("toy/train.txt") as file:
        lines = list(file)
    data_folder("no-names", categories="")
    data_folder("gap", categories="\n".join([first, "", second, *others]))
    data_folder("twice", categories="\n".join([first, second, first, *others]))
    data_folder("ids", categories="a,1\nb,2\n")
    data_folder("swapped", categories="\n".join([second, first, *others]))
    data_folder("fewer", categories="\n".join([first, second, *others[:-1]]))
    data_folder("no-lists", train=None, val=None)
    data_folder("no-val", val=None)
    data_folder("nothing-listed", train="train/00000 0 1\n")  # 0 frames
    data_folder("no-labels", train="train/00000 24\n")
    data_folder("label", train="train/00000 24 10,3\n")
    data_folder("outside", train="../00000 24 1\n")
    data_folder("absolute", train="/00000 24 1\n")
    data_folder("bytes", train=b"\xff\xfe\x00\n")
    data_folder("unlabelled", val="train/00000 24 -1\n")
    data_folder("lost", train="train/gone 24 0\n", val="train/gone 24 0\n")
    data_folder("shorter", train="".join(lines[1:]))
    data_folder("longer", train="".join([*lines, "train/again 24 0\n"]))
    data_folder("reordered", train="".join(reversed(lines)))


def data_folder(name, **contents):
    """The toy's frames, and its lists but for those given: their text, None: no such list."""
    os.mkdir(name)
    os.symlink(os.path.abspath("toy/frames"), f"{name}/frames")
    for file in ("categories", "train", "val"):
        shutil.copy(f"toy/{file}.txt", name)
    for file, content in contents.items():
        if content is None:
            os.remove(f"{name}/{file}.txt")
        else:
            write(f"{name}/{file}.txt", content)


def write(path, content):
    if isinstance(content, str):
        content = content.encode()
    with open(path, "wb") as file:
        file.write(content)


def make_files():
    for name in ("empty", "begun", "videos", "twins"):
        os.mkdir(name)
    for path in ("file", "videos/text.mp4", "twins/text.mp4", "twins/text.avi"):
        write(path, "some text\n")
    write("nothing", "")
    write("binary", b"\xff\xfe\x00\n")
    write("semicolons.csv", "text.mp4;0\n")
    write("columns.csv", "text.mp4,1,0,0\n")
    write("mixed.csv", "text.mp4,cooking,3\n")
    write("names.csv", "text.mp4,cooking\n")
    write("ids.csv", "text.mp4,10\n")
    write("mmaction2.txt", "text.mp4 92 69\n")


def make_checkpoints():
    checkpoint = torch.load("run/best.pt", weights_only=True)
    torch.save(checkpoint["model"], "plain.pt")
    torch.save(torch.zeros(3), "tensor.pt")
    torch.save({"args": argparse.Namespace(lr=0.1)}, "object.pt")
    shutil.copy("run/best.pt", "cut.pt")
    os.truncate("cut.pt", 5000)


def make_score_files():
    scores = dict(np.load("val.npz"))
    first, second = data.TOY_CATEGORIES[:2]
    meta = str(scores["meta"]).replace(f'"{first}", "{second}"', f'"{second}", "{first}"')
    labels = scores["labels"].copy()
    labels[0] = 1 - labels[0]
    np.savez("swapped.npz", **{**scores, "meta": np.array(meta)})
    np.savez("relabelled.npz", **{**scores, "labels": labels})
    np.savez("unlabelled.npz", paths=scores["paths"], scores=scores["scores"])
    np.savez("fewer.npz", paths=scores["paths"], scores=scores["scores"][:, :9])


def tree(folder):
    """{every path below a folder: a file's size and time of change, None for a folder}."""
    paths = {}
    for path in folder.rglob("*"):
        paths[path] = None
        if path.is_file():
            paths[path] = (path.stat().st_size, path.stat().st_mtime_ns)
    return paths


@pytest.mark.parametrize("command, arguments, words", CASES)
def test_one_line_and_nothing_left_behind(folder, capsys, command, arguments, words):
    if "extract" in command or "--video" in command:
        if shutil.which("ffmpeg") is None and os.environ.get("CI") != "true":
            pytest.skip("the program ffmpeg is missing")
    before = tree(folder)
    assert call(*command.split(), *arguments.split()) == 2
    lines = capsys.readouterr().err.splitlines()
    assert words in lines[-1]
    if not lines[0].startswith("usage:"):  # argparse prints its usage first
        lines = [line for line in lines if not line.endswith(" s left")]  # without the progress
        assert len(lines) == 1
    assert tree(folder) == before


@pytest.mark.parametrize("command", [
    "data check 'a link'",
    f"{TRAIN} --data 'a link' --out 'a run' --resume",  # there is nothing to resume: it starts
    "evaluate --checkpoint run/best.pt --data 'a link' --workers 0",
    "evaluate --checkpoint run/best.pt --data short --workers 2",
    "ensemble val.npz --out 'two words.npz'",
    "data toy --videos 8 'a folder/a new folder'",
])
def test_what_only_looks_bad_works(folder, command):
    """Links and spaces. In `short`, a list of one video for two workers: it has 2 frames, for 8
    segments, and its name looks like a list line."""
    if not os.path.exists("a link"):
        os.symlink("toy", "a link")
        data_folder("short", val="train/00000 24 1 2 3\n")
        os.remove("short/frames")
        shutil.copytree("toy/frames/train/00000", "short/frames/train/00000 24 1")
    assert call(*shlex.split(command)) == 0
