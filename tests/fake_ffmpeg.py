"""Takes the place of ffmpeg in test_data.py. It writes two frames. A video's text may tell it to do
something after the first one, or to write nothing."""
import os
import shutil
import signal
import sys
from pathlib import Path

DATA = Path("../../..")  # the data folder: ffmpeg runs in DATA/frames/.part-NAME/ROW

video = Path(sys.argv[sys.argv.index("-i") + 1].removeprefix("file:"))
text = video.read_text()
if text == "write nothing":
    sys.exit(0)

Path("img_00001.jpg").touch()
if text == "get killed":
    os.kill(os.getpid(), signal.SIGKILL)
elif text == "end as if interrupted":
    sys.exit(255)  # ffmpeg's status then
elif text == "fail":
    sys.exit(1)
elif text == "fail without a session of its own":
    if os.getsid(0) != os.getpid():
        sys.exit(1)
elif text == "report a full disk":
    print("av_interleaved_write_frame(): No space left on device", file=sys.stderr)
    sys.exit(0)
elif text == "kill the parent":
    os.kill(os.getppid(), signal.SIGKILL)
    sys.exit(0)
elif text == "copy the frame to its place":
    shutil.copytree(".", DATA / "frames" / video.stem)
elif text == "write categories.txt":
    (DATA / "categories.txt").write_text("run\n")
elif text == "write val.txt":
    (DATA / "val.txt").write_text("c 2 0\n")
elif text != "":
    raise ValueError(f"no such instruction: {text}")

Path("img_00002.jpg").touch()
