"""python stopped.py SIGNAL PLACE CALL RANK START train.py ...: the script, ended by a signal.

SIGNAL  its name; SIGINT is Ctrl-C, which in a terminal reaches the loader's workers too
PLACE   the function in whose call the signal comes: step, validation or save
CALL    which call of it (1, 2, ...)
RANK    of which process; torchrun's first restart is stopped in the same way, later ones are not
START   how the loader's workers are started: fork, spawn or forkserver
"""
import multiprocessing
import os
import runpy
import signal
import sys

import torch

sys.path[0] = os.getcwd()  # the scripts of the current folder
import evaluate

PLACES = {
    "step": (torch.nn.utils, "clip_grad_norm_"),
    "validation": (evaluate, "score_views"),
    "save": (torch, "save"),
}


def stop_in(place, call, signal_name):
    """Replace a function by one that ends this process when it is called so many times."""
    module, name = PLACES[place]
    function = getattr(module, name)
    calls = []

    def stopping(*arguments, **options):
        calls.append(name)
        if len(calls) == call:
            if place == "save":
                arguments[1].write_bytes(b"half of a checkpoint")
            process = os.getpid()
            if signal_name == "SIGINT":
                process = 0  # the process group
            os.kill(process, signal.Signals[signal_name])
        return function(*arguments, **options)

    setattr(module, name, stopping)


if __name__ == "__main__":
    signal_name, place, call, rank, start = sys.argv[1:6]
    multiprocessing.set_start_method(start)
    if signal_name == "SIGINT":
        os.setpgrp()
        # A shell that starts pytest in the background has it ignore Ctrl-C.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    if restarts < 2 and rank == os.environ.get("RANK", "0"):
        stop_in(place, int(call), signal_name)
    del sys.argv[:6]
    runpy.run_path(sys.argv[0], run_name="__main__")
