"""Bad input to every command: one clear line that names the file, the list line or the flag, exit status 2, and nothing
left behind. What only looks bad (paths with spaces, more segments than frames, a link to a folder) works.

    python -m pytest tests/test_bad_input.py

Commands run in this process, in a folder that holds a toy of 16 videos and what was made of it. A sweep over the
commands; what a single function refuses is tested beside that function.
"""
import importlib
import os
import sys

import numpy as np
import pytest

import data

TRAIN = "--model tsn --recipe toy --epochs 1 --batch 8 --workers 0 --device cpu"


def call(script, *args):
    """Run a script's main in this process, as run_script does -> its exit status."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "argv", [f"{script}.py", *map(str, args)])
        data.run_script(importlib.import_module(script).main)
    return stop.value.code or 0


def tree(folder):
    """{every path below a folder, links not followed: its size and time of change}."""
    return {path: (path.lstat().st_size, path.lstat().st_mtime_ns) for path in folder.rglob("*")
            if path.is_symlink() or not path.is_dir()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A toy, variants of its lists, a checkpoint, score files and files of wrong kinds: all that the tables name."""
    folder, home = tmp_path_factory.mktemp("bad input"), os.getcwd()  # with a space, on purpose
    os.chdir(folder)
    data.draw_toy("toy", videos=16)
    lists = {name: (folder / "toy" / f"{name}.txt").read_text() for name in ("train", "val", "categories")}

    def variant(name, **changed):
        (folder / name).mkdir()
        os.symlink(folder / "toy" / "frames", folder / name / "frames")
        for file, text in {**lists, **changed}.items():
            if text is not None:
                (folder / name / f"{file}.txt").write_bytes(text if isinstance(text, bytes) else text.encode())

    first, rest = lists["train"].split("\n", 1)
    path, frames, labels = first.split()
    variant("no categories", categories=None)
    variant("empty categories", categories="")
    variant("no train", train=None)
    variant("no val", val=None)
    variant("empty", train="")
    variant("truncated", train=f"{path} {frames}\n{rest}")
    variant("wrong", train=f"{path} many {labels}\n{rest}")
    variant("label", train=f"{path} {frames} 10,3\n{rest}")
    variant("huge", train=f"{path} 1000000000000 {labels}\n", val=f"{path} 1000000000000 {labels}\n")
    variant("binary", train=b"\xff\xfe\x00\n")
    variant("outside", train=f"../{path} {frames} {labels}\n{rest}")
    variant("spaced", train=f"a video {frames} {labels}\n{rest}")
    variant("gone frames", train=f"train/gone {frames} {labels}\n", val=f"train/gone {frames} {labels}\n")
    variant("unlabelled", val=f"{path} {frames} -1\n")
    variant("short", val=f"{path} 2 {labels}\n")  # fewer frames than segments
    os.symlink("loop", "loop")
    os.symlink("toy", "link to the toy")
    (folder / "file").write_text("not a folder, not a video, not a checkpoint\n")
    (folder / "nothing").touch()
    (folder / "videos").mkdir()
    (folder / "no videos").mkdir()
    (folder / "videos" / "text.mp4").write_text("text\n")
    assert call("train", *TRAIN.split(), "--data", "toy", "--out", "run") == 0
    for split in ("train", "val"):
        assert call("evaluate", "--checkpoint", "run/best.pt", "--data", "toy", "--split", split, "--workers", 0,
                    "--out", f"{split}.npz") == 0
    (folder / "cut.npz").write_bytes((folder / "val.npz").read_bytes()[:300])
    (folder / "cut.pt").write_bytes((folder / "run" / "best.pt").read_bytes()[:5000])
    np.savez(folder / "other.npz", something=1)
    yield folder
    os.chdir(home)


NOWHERE = "/proc/nowhere" if os.path.isdir("/proc") else "file/nowhere"  # where not even root can write
COMMANDS = {
    "data toy": [
        ("toy", "already there"),
        ("new --videos 7", "--videos 7"),
        ("new --videos -1", "--videos -1"),
        ("new --seed -1", "--seed -1"),
        ("new --videos many", "invalid int value: 'many'"),
        (f"{NOWHERE}/new", "nowhere"),
        ("file/new", "file"),
        ("", "required: OUT"),
    ],
    "data extract": [
        ("--videos gone --out new --split train", "gone: no such folder"),
        ("--videos file --out new --split train", "file: no such folder"),
        ("--videos loop --out new --split train", "loop: no such folder"),
        ("--videos no+videos --out new --split train", "no videos: no such folder, or no video in it"),
        ("--videos videos --out new --split a/b", "--split a/b"),
        ("--videos videos --out new --split train --workers 0", "--workers 0"),
        ("--videos videos --out new --split train --list gone.txt", "gone.txt"),
        ("--videos videos --out new --split train --list nothing", "nothing: lists no video"),
        ("--videos videos --out new --split train --list binary/train.txt", "binary/train.txt: not a text file"),
        ("--videos videos --out new --split train --list wrong/train.txt", "wrong/train.txt:1: 'many'"),
        ("--videos videos --out new --split train --list videos", "videos"),
        (f"--videos videos --out {NOWHERE} --split train", "nowhere"),
        ("--videos videos --out file --split train", "file"),
        ("--videos videos --out new", "required: --split"),
    ],
    "data check": [
        ("gone", "gone/categories.txt"),
        ("file", "file/categories.txt"),
        ("loop", "loop/categories.txt"),
        ("no+categories", "no categories/categories.txt"),
        ("empty+categories", "empty categories/categories.txt"),
        ("empty", "empty/train.txt: lists no video"),
        ("truncated", "truncated/train.txt:1"),
        ("wrong", "wrong/train.txt:1: 'many'"),
        ("label", "label/train.txt:1: label 10, but the categories end at 9"),
        ("binary", "binary/train.txt: not a text file"),
        ("outside", "outside/train.txt:1: "),
        ("spaced", "spaced/train.txt:1: "),
        ("gone+frames", "train/gone: 0 of 24 frames"),
        ("huge", "of 1000000000000 frames"),
    ],
    "train": [
        ("--data toy --out run", "run/last.pt: a run is there already"),
        ("--data gone", "gone/categories.txt"),
        ("--data loop", "loop/categories.txt"),
        ("--data no+train", "no train/train.txt"),
        ("--data no+val", "no val/val.txt"),
        ("--data empty", "empty/train.txt: lists no video"),
        ("--data empty+categories", "empty categories/categories.txt"),
        ("--data wrong", "wrong/train.txt:1: 'many'"),
        ("--data label", "label/train.txt:1: label 10"),
        ("--data binary", "binary/train.txt: not a text file"),
        ("--data unlabelled", "unlabelled/val.txt: no video has a label"),
        ("--data gone+frames --batch 1", "gone frames/train.txt:1: "),
        ("--data huge --batch 1", "huge/train.txt:1: "),
        ("--data toy --batch 17", "--batch 17: "),
        ("--data toy --batch 1000000000", "at most 16, the videos of toy/train.txt"),
        ("--data toy --batch 0", "--batch 0: at least 1"),
        ("--data toy --batch 8 --accumulate 3", "--accumulate 3"),
        ("--data toy --accumulate 0", "--accumulate"),
        ("--data toy --workers -1", "--workers"),
        ("--data toy --save-every -1", "--save-every"),
        ("--data toy --epochs 0", "--epochs 0: at least 1"),
        ("--data toy --frames 0", "--frames 0: at least 1"),
        ("--data toy --crop 37", "--crop 37: larger than the short side"),
        ("--data toy --lr fast", "invalid float value: 'fast'"),
        ("--data toy --lr -1", "--lr -1"),
        ("--data toy --lr nan", "--lr nan"),
        ("--data toy --dropout 2", "--dropout 2"),
        ("--data toy --momentum -1", "--momentum -1"),
        ("--data toy --seed -1", "--seed"),
        ("--data toy --loss hinge", "invalid choice: 'hinge'"),
        ("--data toy --no-such-flag 1", "--no-such-flag"),
        ("--data toy --recipe gone", "--recipe gone: tsn.py has"),
        ("--data toy --model gone", "--model gone: there is no gone.py"),
        ("--data toy --model ../tsn", "--model ../tsn: there is no"),
        ("--data toy --model data", "data.py has no RECIPES"),
        ("--data toy --backbone resnet9", "resnet9"),
        ("--data toy --device moon", "--device moon"),
        ("--data toy --device cuda:99", "--device cuda"),
        ("--data toy --init gone.pth", "gone.pth"),
        ("--data toy --init file", "file: no checkpoint"),
        ("--data toy --init nothing", "nothing: no checkpoint"),
        ("--data toy --init cut.pt", "cut.pt: no checkpoint, or one that was cut short"),
        ("--data toy --init toy", "toy"),
        (f"--data toy --out {NOWHERE}/run", "nowhere"),
        ("--data toy --out file", "file"),
        ("--data toy --out loop", "loop"),
    ],
    "evaluate": [
        ("--data toy", "which network?"),
        ("--checkpoint gone.pt --data toy", "gone.pt"),
        ("--checkpoint file --data toy", "file: no checkpoint"),
        ("--checkpoint nothing --data toy", "nothing: no checkpoint"),
        ("--checkpoint cut.pt --data toy", "cut.pt: no checkpoint, or one that was cut short"),
        ("--checkpoint toy --data toy", "toy"),
        ("--checkpoint loop --data toy", "loop"),
        ("--checkpoint val.npz --data toy", "val.npz"),
        ("--model tsn --weights gone.pt --data toy", "gone.pt"),
        ("--model gone --weights run/best.pt --data toy", "--model gone: there is no gone.py"),
        ("--model slowfast --weights run/best.pt --data toy", "slowfast.py has no place"),
        ("--checkpoint run/best.pt --data gone", "gone/categories.txt"),
        ("--checkpoint run/best.pt --data no+val", "no val/val.txt"),
        ("--checkpoint run/best.pt --data toy --split gone", "toy/gone.txt"),
        ("--checkpoint run/best.pt --data gone+frames", "gone frames/val.txt:1: "),
        ("--checkpoint run/best.pt --data huge", "huge/val.txt:1: "),
        ("--checkpoint run/best.pt --data toy --batch 0", "--batch 0: at least 1"),
        ("--checkpoint run/best.pt --data toy --view-batch 0", "--view-batch 0: at least 1"),
        ("--checkpoint run/best.pt --data toy --workers -1", "--workers -1"),
        ("--checkpoint run/best.pt --data toy --clips 0", "--clips 0: at least 1"),
        ("--checkpoint run/best.pt --data toy --scales 0", "at least 1"),
        ("--checkpoint run/best.pt --data toy --test-crop 99", "--test-crop 99: larger than the short side"),
        ("--checkpoint run/best.pt --data toy --protocol all", "invalid choice: 'all'"),
        ("--checkpoint run/best.pt --data toy --device moon", "--device moon"),
        ("--checkpoint run/best.pt --data toy --out gone/out.npz", "gone/out.npz: there is no such folder"),
        (f"--checkpoint run/best.pt --data toy --out {NOWHERE}/out.npz", "nowhere"),
        ("--checkpoint run/best.pt --data toy --out file/out.npz", "file/out.npz"),
        ("--checkpoint run/best.pt --video gone.mp4", "gone.mp4"),
        ("--checkpoint run/best.pt --video videos/text.mp4", "videos/text.mp4: "),
        ("--checkpoint run/best.pt --video nothing", "nothing: "),
        ("--checkpoint run/best.pt --video toy", "toy: "),
        ("--checkpoint run/best.pt --video videos/text.mp4 --top 0", "--top 0: at least 1"),
        ("--checkpoint run/best.pt --video videos/text.mp4 --picture out.tune", "out.tune"),
        ("--checkpoint run/best.pt --video videos/text.mp4 --picture gone/out.png", "there is no such folder"),
    ],
    "ensemble": [
        ("", "required: FILE.npz"),
        ("gone.npz", "gone.npz"),
        ("nothing", "nothing: not a score file"),
        ("file", "file: not a score file"),
        ("toy", "toy"),
        ("cut.npz", "cut.npz: not a score file"),
        ("other.npz", "other.npz: not a score file"),
        ("run/best.pt", "run/best.pt: not a score file"),
        ("val.npz train.npz", "train.npz: "),
        ("val.npz --weights 1 2", "one for each of 1 files"),
        ("val.npz --weights -1", "weights"),
        ("val.npz --weights 0", "weights"),
        ("val.npz --weights many", "--weights many: a number for each file"),
        ("val.npz --weights gone.json", "gone.json"),
        ("val.npz --failed file", "--failed file: goes into the table of --csv"),
        ("val.npz --csv out.csv --failed gone.txt", "gone.txt"),
        ("val.npz --out gone/out.npz", "gone/out.npz"),
        (f"val.npz --out {NOWHERE}/out.npz", "nowhere"),
        ("val.npz --csv gone/out.csv", "gone/out.csv"),
    ],
}


@pytest.mark.parametrize("command, flags, says", [
    (command, flags, says) for command, cases in COMMANDS.items() for flags, says in cases])
def test_one_line_and_nothing_left_behind(folder, capsys, command, flags, says):
    before = tree(folder)
    words = [word.replace("+", " ") for word in flags.split()]  # a + is a space in a name
    if command == "train":
        words = [*TRAIN.split(), "--out", "new", *words]  # of a flag given twice the second counts
    assert call(*command.split(), *words) == 2
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert says in (out if command == "data check" and "problems" in out else lines[-1]), (out, lines)
    assert "Traceback" not in "\n".join(lines)
    if "usage:" not in lines[0]:  # argparse's own errors come below it
        progress = [line for line in lines if line.endswith(" s left")]
        assert len(lines) - len(progress) == ("problems" not in out), lines
    assert tree(folder) == before


@pytest.mark.parametrize("command", [
    "data check link+to+the+toy",
    "evaluate --checkpoint run/best.pt --data link+to+the+toy --workers 0",
    "evaluate --checkpoint run/best.pt --data short --workers 0",
    "evaluate --checkpoint run/best.pt --data short --workers 2",
    "ensemble val.npz --csv a+table.csv"])
def test_what_only_looks_bad_works(folder, command):
    """A link and a space in a path, 8 segments of a video of 2 frames, fewer videos than workers."""
    assert call(*[word.replace("+", " ") for word in command.split()]) == 0
