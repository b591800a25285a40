"""The command in processes that import nothing anew: forks of one that has what takes seconds."""

import multiprocessing
import runpy
import sys

import train

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["torchvision.datasets", "tyro", "unitfisher.experiments.trainer"])


def command(*given: str) -> None:
    """Run the script in this process, as Python does."""
    sys.argv = [train.__file__, *given]
    runpy.run_path(train.__file__, run_name="__main__")
