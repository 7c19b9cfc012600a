"""Run a script. In the N-th call of a function, process RANK and its workers get a signal.

    python stopped.py SIGNAL MODULE.FUNCTION N START RANK train.py ...
    python stopped.py SIGKILL torch.save 2 fork 0 train.py --model tin

START: how the loader's workers are started. If the call is one of torch.save, half of a checkpoint
is written first. Under torchrun this happens in the first two starts; the third runs to its end.
"""
import importlib
import itertools
import multiprocessing
import os
import runpy
import signal
import sys

sys.path[0] = os.getcwd()  # the scripts of the current folder


def signal_in_nth_call(place, nth_call, signal_name):
    """Replace a function by one that sends the signal in its nth call."""
    module_name, _, name = place.rpartition(".")
    module = importlib.import_module(module_name)
    function = getattr(module, name)
    calls = itertools.count(1)

    def stopping(*arguments, **options):
        if next(calls) == nth_call:
            if place == "torch.save":
                arguments[1].write_bytes(b"half of a checkpoint")
            os.kill(0, signal.Signals[signal_name])  # 0: the group of this process
        return function(*arguments, **options)

    setattr(module, name, stopping)


if __name__ == "__main__":
    signal_name, place, nth_call, start, rank, *command = sys.argv[1:]
    multiprocessing.set_start_method(start)
    # A group of its own, or pytest would be stopped too. Under torchrun it has one.
    if os.getpgrp() != os.getpid():
        os.setpgrp()
    # A shell that starts pytest in the background makes it ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    if restarts < 2 and rank == os.environ.get("RANK", "0"):
        signal_in_nth_call(place, int(nth_call), signal_name)
    sys.argv = command
    runpy.run_path(sys.argv[0], run_name="__main__")
