"""How every script ends: with its exit code, or with a line that tells its user what to do."""

import re
import sys
from ast import literal_eval
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, Final, NoReturn

from unitfisher.experiments.data import DamagedDataError, DataNotFoundError
from unitfisher.experiments.losses import DivergedError
from unitfisher.locks import FolderInUseError

USER_ERRORS: Final = (
    DataNotFoundError,
    DamagedDataError,
    DivergedError,
    FolderInUseError,
    ModuleNotFoundError,
    OSError,
    ValueError,
)
KEYWORD: Final = re.compile(r"\b([a-z][a-z_.\d]*)=(\([^()]*\)|'[^']*'|[\w.+-]*\w)")


def run(main: Callable[[], object], *options: type[Any]) -> NoReturn:
    """Run a script and exit; errors that its user can mend are shown without a traceback.

    Args:
        main: Returns the exit code, or None.
        options: Dataclasses whose fields are the script's options.
    """
    try:
        code = main()
    except USER_ERRORS as error:
        names = {"resume", *(field.name for kind in options for field in fields(kind))}
        sys.exit(f"{Path(sys.argv[0]).name}: {as_typed(str(error), names)}")
    sys.exit(code if isinstance(code, int) else None)


def as_typed(text: str, names: set[str]) -> str:
    """Turn keywords into options of a command line: seeds=(0, 1) into --seeds 0 1."""

    def typed(keyword: re.Match[str]) -> str:
        name, value = keyword.groups()
        return _option(name, value) if name.split(".")[0] in names else keyword[0]

    return KEYWORD.sub(typed, text)


def _option(name: str, text: str) -> str:
    dashed = name.replace("_", "-")
    try:
        value = literal_eval(text)
    except (ValueError, SyntaxError):  # a placeholder, as in seeds=N, or not finite
        value = tuple(text.strip("(),").split(", "))
    if isinstance(value, bool):
        return f"--{dashed}" if value else f"--no-{dashed}"
    return " ".join([f"--{dashed}", *map(str, value if isinstance(value, tuple) else (value,))])
