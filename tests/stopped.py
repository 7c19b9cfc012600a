"""python stopped.py train.py ...: the script, ended by a signal in the middle of a call.

STOPS in the environment, a JSON list, says where: in the first start, in torchrun's first restart,
and so on. A stop is {"rank": which process, "place": see PLACES, "call": which call (1, 2, ...),
"signal": its name}. Ctrl-C reaches the loader's workers too, as in a terminal. START: how the
workers are started.
"""
import json
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
            if signal_name == "SIGINT":
                os.kill(0, signal.SIGINT)  # 0: the process group
            else:
                os.kill(os.getpid(), signal.Signals[signal_name])
        return function(*arguments, **options)

    setattr(module, name, stopping)


if __name__ == "__main__":
    multiprocessing.set_start_method(os.environ.get("START", "fork"))
    start = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    stops = json.loads(os.environ["STOPS"])
    if start < len(stops):
        stop = stops[start]
        if stop["signal"] == "SIGINT":
            os.setpgrp()
            # A shell that starts pytest in the background has it ignore Ctrl-C.
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if stop["rank"] == int(os.environ.get("RANK", 0)):
            stop_in(stop["place"], stop["call"], stop["signal"])
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
