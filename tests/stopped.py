"""python stopped.py --by SIGNAL --place PLACE --call N [...] train.py ...: the script, ended by a
signal in the N-th call of a function.

PLACE, where the signal comes:
step          before the weights are changed
validation    before a batch of videos is scored
save          when half of a checkpoint is written
"""
import argparse
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


def stop_in(place, nth_call, signal_name):
    """Replace a function by one that ends this process in its nth call."""
    module, name = PLACES[place]
    function = getattr(module, name)
    calls = []

    def stopping(*arguments, **options):
        calls.append(name)
        if len(calls) == nth_call:
            if place == "save":
                arguments[1].write_bytes(b"half of a checkpoint")
            target = os.getpid()
            if signal_name == "SIGINT":
                target = 0  # the process group: Ctrl-C in a terminal reaches the workers too
            os.kill(target, signal.Signals[signal_name])
        return function(*arguments, **options)

    setattr(module, name, stopping)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--by", required=True, help="name of the signal; SIGINT is Ctrl-C")
    parser.add_argument("--place", required=True, choices=PLACES)
    parser.add_argument("--call", required=True, type=int, help="1, 2, ...")
    parser.add_argument("--rank", default="0", help="of the process that is stopped")
    parser.add_argument("--start", default="fork", help="how the loader's workers are started")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args()

    multiprocessing.set_start_method(args.start)
    if args.by == "SIGINT":
        os.setpgrp()  # a group of its own, or pytest would be stopped too
        # A shell that starts pytest in the background has it ignore Ctrl-C.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # under torchrun: killed in the first two of three starts
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    if restarts < 2 and args.rank == os.environ.get("RANK", "0"):
        stop_in(args.place, args.call, args.by)
    sys.argv = args.command
    runpy.run_path(sys.argv[0], run_name="__main__")
