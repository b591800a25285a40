"""Processes that import nothing anew: forks of a test, or of one that has what takes seconds."""

import multiprocessing
import os
import runpy
import signal
import sys
from collections.abc import Callable, Container
from itertools import count

import pytest
import train

from unitfisher.experiments.sources import Held

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(
    ["pandas", "pytest", "torchvision.datasets", "tyro", "unitfisher.experiments.trainer"]
)


def forked(act: Callable[[], bool]) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        signal.alarm(20)
        code = 0 if act() else 1
    finally:
        os._exit(code)


def succeeded(child: int) -> bool:
    return os.waitpid(child, 0)[1] == 0


def command(*given: str) -> None:
    """Run the script in this process, as Python does."""
    sys.argv = [train.__file__, *given]
    try:
        runpy.run_path(train.__file__, run_name="__main__")
    except SystemExit as end:
        print(end.code, file=sys.stderr, flush=True)  # torch's processes end without it
        raise


def interrupt(patch: pytest.MonkeyPatch, of: type, method: str, at: Container[int]) -> None:
    """Let Ctrl-C come at the end of these calls of a method, counted from 0."""
    whole, calls = getattr(of, method), count()

    def interrupted(*given: object, **options: object) -> object:
        done = whole(*given, **options)
        if next(calls) in at:
            signal.raise_signal(signal.SIGINT)
        return done

    patch.setattr(of, method, interrupted)


def interrupted(*given: str) -> None:
    """Run the command in this process; Ctrl-C comes to the first of several in the third step."""
    with pytest.MonkeyPatch.context() as patch:
        if os.environ.get("RANK", "0") == "0":
            interrupt(patch, Held, "next", {2})
        assert train.main(*train.parse(given)) == train.INTERRUPTED
