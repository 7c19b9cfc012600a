"""Bad input to any command gives one line on stderr (beside lines of progress, and a line of usage
if argparse objects) and exit status 2. The line names the file, the list line or the flag, and says
what is wanted; some lines are Python's, PyTorch's or FFmpeg's own. There is no traceback, and no
file is left behind. What only looks bad, such as a space in a path, works.

    python -m pytest tests/test_bad_input.py

TABLE holds the bad commands. All run in this process, in a folder that has the toy (16 videos, in
runs/toy, where the scripts look if no --data is given), a trained network, its scores, and damaged
copies of these; `gone` is never there, and `file` is a text file. Other damage to lists, frames,
weights and score files is tested beside the functions that read them.
"""
import os
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import data
from conftest import call, needs_ffmpeg, write

TABLE = [  # (command, part of the line on stderr)
    # data.py toy
    ("data toy runs/toy", "runs/toy: already there; name a new folder"),
    ("data toy new --videos 7", "argument --videos: 7: at least 8"),
    ("data toy file/new", "Not a directory: 'file/new"),  # `file` is not a folder

    # data.py extract
    ("data extract --videos videos --out new --split a/b", "--split a/b: a name such as train"),
    ("data extract --videos videos --out new --split categories", "--split categories: a name"),
    ("data extract --videos videos --out new --split a_failed", "--split a_failed: a name"),
    ("data extract --videos videos --out new --val 0", "--val 0.0: a fraction between 0 and 1"),
    ("data extract --videos videos --out new --val 1",
     "--val 1.0: a fraction between 0 and 1, such as 0.2"),
    ("data extract --videos gone --out new --val 0.2", "gone: no such folder"),
    ("data extract --videos empty --out new --val 0.2", "empty: no video in it (endings: mp4 "),
    ("data extract --videos twins --out new --val 0.2",
     "twins/text.avi and twins/text.mp4 would both be called text: rename one"),
    ("data extract --videos videos --out file --val 0.2", "Not a directory: 'file/frames'"),
    ("data extract --videos videos --out new --val 0.2 --list gone.csv",
     "No such file or directory: 'gone.csv'"),
    ("data extract --videos videos --out new --val 0.2 --list no-lines",
     "no-lines: lists no video that has frames"),
    ("data extract --videos videos --out new --val 0.2 --list file --format mmaction2-videos",
     "file:1: the file is read as mmaction2-videos, but 'some text' does not fit"),
    ("data extract --videos videos --out new --val 0.2 --list not-utf8",
     "not-utf8: not a text file in UTF-8; save it as one"),

    # data.py check
    ("data check gone", "gone/categories.txt: missing; write the names of the classes there"),
    ("data check no-names", "no-names/categories.txt: names no class"),
    ("data check gap",
     "gap/categories.txt:2: an empty line would shift the ids of all classes below it; remove it"),
    ("data check twice", "twice/categories.txt: the name 'moving+right' appears twice"),
    ("data check no-lists", "no-lists: no train.txt, val.txt or test.txt; python data.py extract"),

    # train.py: the data folder
    ("train --model tsn --data gone", "gone/train.txt: missing; python data.py extract --out gone"),
    ("train --model tsn --data no-labels", "no-labels/train.txt: no video has a label"),
    ("train --model tsn --data no-val-labels", "no-val-labels/val.txt: no video has a label"),
    # These runs fail in their first step, when their folder is made already. It stays, empty. So
    # they get one that was there before, `begun`.
    ("train --model tsn --data lost --recipe toy --batch 1 --workers 0 --out begun",
     "lost/train.txt:1: lost/frames/train/gone/img_"),  # then any frame's number
    ("train --model tsn --loss ce",
     "runs/toy/train.txt:1: 2 labels; --loss ce needs exactly one for every video"),

    # train.py: flags. Of those that argparse checks, one of each kind.
    ("train --model tsn --no-such-flag 1", "unrecognized arguments: --no-such-flag 1"),
    ("train --model tsn --workers -1", "argument --workers: -1: at least 0"),  # no key of a recipe
    ("train --model tsn --frames 0", "argument --frames: 0: at least 1"),      # an integer
    ("train --model tsn --lr nan", "argument --lr: nan: at least 0"),          # a decimal number
    ("train --model tsn --loss hinge", "argument --loss: invalid choice: 'hinge'"),
    ("train --model tsn --mean 0.5 0.5", "argument --mean: expected 3 arguments"),
    # from here on, train.py's own checks
    ("train --model tsn --epochs 0", "--epochs 0: at least 1"),
    ("train --model tsn --loss-scale 0", "--loss-scale 0: must be larger than 0"),
    ("train --model tsn --batch 17",
     "--batch 17: more than the 16 videos of runs/toy/train.txt; try --batch 16"),
    ("train --model tsn --batch 1 --frames 1 --out begun",  # batch norm needs two values
     "Expected more than 1 value per channel when training"),
    ("train --model tsn --crop 37",  # the row toy has jitter (36, 36)
     "--crop 37: larger than the short side that it is cut from, --jitter 36"),
    ("train --model tsn --std 0 1 1", "--std [0.0, 1.0, 1.0]: no standard deviation is 0"),
    ("train --model tsn --jitter 40 36", "--jitter [40, 36]: the smaller number comes first"),
    ("train --model tsn --dropout 2", "dropout probability has to be between 0 and 1, but got 2"),
    ("train --model tsn --class-weight sqrt --loss lsep",
     "--class-weight sqrt: goes with --loss bce"),
    ("train --model tsn --device moon", "--device moon: Expected one of cpu, cuda, "),
    ("train --model tsn --device cuda:99", "--device cuda:99: "),  # the reason depends on PyTorch
    ("train --model tsn --out file/run", "Not a directory: 'file/run'"),

    # train.py: the network and its first weights
    ("train", "which network? --model NAME, a model file such as tin"),
    ("train --model gone", "--model gone: no model file; there are slowfast, tin, trn, tsm, tsn"),
    ("train --model data", "--model data: no model file"),  # though data.py is there
    ("train --model tsn --recipe gone", "--recipe gone: tsn.py has the rows r101_5f, "),
    ("train --model tsn --init imagnet",  # a misspelling
     "--init imagnet: no such file, and neither imagenet nor none"),
    ("train --model slowfast --init imagenet",
     "--init imagenet: torchvision has no weights for this network; name a file, or none"),
    ("train --model tsn --init imagenet --backbone senet154",
     "--init imagenet: torchvision has no senet154; name a file, or none"),
    ("train --model slowfast --init run/best.pt",
     "--init run/best.pt: backbone.conv1.weight is not in the network; the file belongs to another "
     "network or size"),

    # train.py: a run is there, of tsn's row toy with --epochs 1. Classes and lists are compared
    # before settings. With --data, the row toy must be named.
    ("train --model tsn --out run",
     "run/last.pt: a run is there already; continue it with --resume, or name another --out"),
    ("train --model trn --out run --resume --epochs 1 --lr 0.5 --seed 1",
     "run/last.pt: belongs to another run: model tsn there, trn here, seed 0 there, 1 here, "
     "lr 0.03 there, 0.5 here, "),
    ("train --model tsn --out run --resume --data reordered --recipe toy",
     "run/last.pt: was trained on another list, of 16 videos; the list here has 16; to start a "
     "new run from its weights: --init run/last.pt --out NEW"),
    ("train --model tsn --out run --resume --data shorter-val --recipe toy",
     "run/last.pt: was validated on another val.txt, of 4 videos; the list here has 1, so its "
     "best mAP would not compare"),
    ("train --model tsn --out run --resume --data swapped --recipe toy",
     "class 0 is 'moving+left' in this data folder, but 'moving+right' in run/last.pt"),
    ("train --model tsn --out log",
     "log/log.jsonl: a run is there already; continue it with --resume, or name another --out"),
    ("train --model tsn --out best --resume",
     "best/best.pt: is there, but no last.pt to go on from; name another --out"),

    # evaluate.py
    ("evaluate", "which network? --checkpoint FILE, or --model NAME --weights FILE"),
    ("evaluate --checkpoint gone.pt", "No such file or directory: 'gone.pt'"),
    ("evaluate --checkpoint cut.pt", "cut.pt: not a PyTorch checkpoint, or truncated"),
    ("evaluate --checkpoint tensor.pt", "tensor.pt: not a PyTorch checkpoint"),
    ("evaluate --checkpoint plain.pt", "for other people's files: --model NAME --weights plain.pt"),
    # from a loader's worker, whose error holds its traceback
    ("evaluate --checkpoint run/best.pt --data lost --workers 1",
     "evaluate.py: lost/val.txt:1: lost/frames/train/gone/img_"),
    ("evaluate --checkpoint run/best.pt --data swapped",
     "class 0 is 'moving+right' in run/best.pt, but 'moving+left' in swapped/categories.txt"),
    ("evaluate --checkpoint run/best.pt --data fewer",
     "run/best.pt names 10 classes, fewer/categories.txt 9"),
    ("evaluate --checkpoint run/best.pt --split gone", "runs/toy/gone.txt: missing; "),
    ("evaluate --checkpoint run/best.pt --recipe toy",
     "--model, --weights and --recipe are for other people's weights"),
    ("evaluate --checkpoint run/best.pt --no-such-flag", "unrecognized arguments: --no-such-flag"),
    ("evaluate --checkpoint run/best.pt --test-crop 99",
     "--test-crop 99: larger than the short side that it is cut from, --test-resize 36"),
    ("evaluate --checkpoint run/best.pt --out gone/a.npz",
     "gone/a.npz: there is no such folder, or it cannot be written to"),
    ("evaluate --checkpoint run/best.pt --out empty", "empty: is a folder; name a file"),
    ("evaluate --checkpoint run/best.pt --picture a.png", "--json and --picture go with --video"),
    ("evaluate --model tsn --weights plain.pt --recipe toy --data fewer",
     "plain.pt knows 10 classes, fewer/categories.txt names 9"),

    # evaluate.py --video
    ("evaluate --checkpoint run/best.pt --video videos/text.mp4",
     "videos/text.mp4: 0 frames; ffmpeg: "),  # then its reason
    # flags are checked before a video is opened: there is no a.mp4
    ("evaluate --checkpoint run/best.pt --video a.mp4 --out a.npz",
     "--out goes with a list of videos, not with --video"),
    ("evaluate --checkpoint run/best.pt --video a.mp4 --picture a.xyz",
     "--picture a.xyz: unknown kind of picture; try .png"),
    ("evaluate --checkpoint run/best.pt --video a.mp4 b.mp4 --picture a.png",
     "--picture: of one video, but --video names 2"),

    # ensemble.py
    ("ensemble gone.npz", "No such file or directory: 'gone.npz'"),
    ("ensemble run/best.pt", "run/best.pt: not a score file of evaluate.py --out"),
    ("ensemble val.npz unlabelled.npz", "only one of val.npz and unlabelled.npz has labels"),
    ("ensemble val.npz fewer.npz", "fewer.npz: 9 classes, but val.npz has 10"),
    ("ensemble val.npz --weights 1 2", "--weights: 2 numbers for 1 files"),
    ("ensemble val.npz --weights -1", "--weights [-1.0]: must be non-negative and not all 0"),
    ("ensemble val.npz --weights 0", "--weights [0.0]: must be non-negative and not all 0"),
    ("ensemble val.npz --weights nan", "--weights [nan]: must be non-negative and not all 0"),
    ("ensemble unlabelled.npz --fit", "--fit: unlabelled.npz has no labels to fit to"),
    ("ensemble val.npz --out gone/a.npz",
     "gone/a.npz: there is no such folder, or it cannot be written to"),
]
CASES = []
for command, expected in TABLE:
    marks = []
    if "extract" in command or command.endswith("--video videos/text.mp4"):
        marks.append(needs_ffmpeg)
    CASES.append(pytest.param(command, expected, marks=marks, id=command))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Make a folder with all that the commands name, and work in it."""
    home = os.getcwd()
    folder = tmp_path_factory.mktemp("bad input")  # with a space, on purpose
    os.chdir(folder)
    os.mkdir("empty")
    os.mkdir("begun")
    for path in ("file", "videos/text.mp4", "twins/text.mp4", "twins/text.avi"):
        write(path, "some text\n")
    write("no-lines", "")
    write("log/log.jsonl", "")
    write("not-utf8", b"\xff\xfe\x00\n")

    # data folders
    data.draw_toy("runs/toy", videos=16)
    os.symlink("runs/toy", "a link")
    first, second, *others = data.TOY_CATEGORIES  # moving+right, moving+left, ...
    toy_with("no-names", categories=[])
    toy_with("gap", categories=[first, "", second, *others])
    toy_with("twice", categories=[first, second, first, *others])
    toy_with("swapped", categories=[second, first, *others])
    toy_with("fewer", categories=data.TOY_CATEGORIES[:-1])
    toy_with("no-labels", train=["train/00000 24 -1"])
    toy_with("no-val-labels", val=["train/00000 24 -1"])
    toy_with("shorter-val", val=["val/00016 24 0"])
    toy_with("lost", train=["train/gone 24 0"], val=["train/gone 24 0"])
    toy_with("reordered", train=reversed(Path("runs/toy/train.txt").read_text().splitlines()))
    write("no-lists/categories.txt", "a class\n")

    # "short" lists one video. Its path, "train/00000 24 1", itself looks like a list line; then
    # come 2 frames, fewer than the 8 segments, and the label 3.
    toy_with("short", val=["train/00000 24 1 2 3"])
    os.remove("short/frames")  # the link
    shutil.copytree("runs/toy/frames/train/00000", "short/frames/train/00000 24 1")

    # a run and its scores
    assert call("train", "--model", "tsn", "--epochs", 1, "--workers", 0, "--out", "run") == 0
    assert call("evaluate", "--checkpoint", "run/best.pt", "--workers", 0, "--out", "val.npz") == 0
    content = Path("run/best.pt").read_bytes()
    write("best/best.pt", content)
    write("cut.pt", content[:5000])
    torch.save(torch.load("run/best.pt", weights_only=True)["model"], "plain.pt")
    torch.save(torch.zeros(3), "tensor.pt")
    file = dict(np.load("val.npz"))
    labels = file.pop("labels")
    np.savez("unlabelled.npz", **file)
    file["scores"] = file["scores"][:, :9]
    np.savez("fewer.npz", **file, labels=labels[:, :9])
    yield folder
    os.chdir(home)


def toy_with(name, **files):
    """A copy of the toy, with its frames shared and other lines in some of its text files."""
    os.mkdir(name)
    os.symlink(os.path.abspath("runs/toy/frames"), f"{name}/frames")
    for file in ("categories", "train", "val"):
        shutil.copy(f"runs/toy/{file}.txt", name)
    for file, lines in files.items():
        data.write_lines(f"{name}/{file}.txt", lines)


def tree(folder):
    """{every path below a folder: when a file was changed, None for a folder}."""
    times = {}
    for path in folder.rglob("*"):
        times[path] = None
        if path.is_file():
            times[path] = path.stat().st_mtime_ns
    return times


@pytest.mark.parametrize("command, expected", CASES)
def test_bad_input_is_one_line_and_leaves_no_file(folder, capsys, command, expected):
    before = tree(folder)
    assert call(*shlex.split(command)) == 2
    lines = capsys.readouterr().err.splitlines()
    if lines[0].startswith("usage:"):  # argparse's line before the error
        del lines[0]
    errors = [line for line in lines if not line.endswith(" s left")]  # so ends a progress line
    assert len(errors) == 1, errors
    assert expected in errors[0]
    assert tree(folder) == before


@pytest.mark.parametrize("command, result", [
    ("data check 'a link'", None),
    # with nothing to resume, a run starts
    ("train --model tsn --recipe toy --data 'a link' --epochs 1 --out 'a run' --resume",
     "a run/best.pt"),
    ("evaluate --checkpoint run/best.pt --data 'a link' --out linked.npz", "linked.npz"),
    # an odd name, and one video for two workers
    ("evaluate --checkpoint run/best.pt --data short --workers 2 --out short.npz", "short.npz"),
    ("ensemble val.npz --out 'two words.npz'", "two words.npz"),
    ("data toy --videos 8 'a folder/a new folder'", "a folder/a new folder/train.txt"),
])
def test_unusual_input_works(folder, command, result):
    assert call(*shlex.split(command)) == 0
    if result:
        assert os.path.exists(result)
