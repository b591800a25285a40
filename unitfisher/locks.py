"""A lock, so that only one process writes in a folder."""

import os
import warnings
from errno import EACCES, EAGAIN
from pathlib import Path

LOCK = ".lock"  # the file's name


class FolderInUseError(RuntimeError):
    """Another process writes in the folder."""


class FolderLock:
    """Holds a folder for this process, until it is released or the process has died.

    Args:
        folder: Made if need be; the file ``.lock`` in it stays, and means nothing by itself.

    Raises:
        FolderInUseError: Another process holds it.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT)
        try:
            _lock(self._file)
        except OSError as error:
            os.close(self._file)
            if error.errno not in (EACCES, EAGAIN):  # how systems say that it is held
                raise
            raise FolderInUseError(
                f"{folder} is in use by another process: wait for its end, or choose another folder"
            ) from error

    def release(self) -> None:
        """Let others have the folder; safe to call twice."""
        if self._file >= 0:
            os.close(self._file)
        self._file = -1


def _lock(file: int) -> None:
    # lockf locks are the process's, not the open file's: workers that survive it hold none
    try:
        from fcntl import LOCK_EX, LOCK_NB, lockf
    except ModuleNotFoundError:  # no Unix
        return
    try:
        lockf(file, LOCK_EX | LOCK_NB)
    except OSError as error:
        if error.errno in (EACCES, EAGAIN):
            raise
        warnings.warn(f"the folder is not locked against other processes ({error})", stacklevel=5)
