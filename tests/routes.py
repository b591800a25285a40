"""Functions that have a compiled kernel, and both routes of each: by the kernel and by torch."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import pytest

COMPILER = any(map(shutil.which, [os.environ.get("CC", "").split(" ")[0] or "cc", "gcc", "clang"]))
needs_compiler = pytest.mark.skipif(not COMPILER, reason="NOT TESTED COMPILED: no C compiler")
per_native = pytest.mark.parametrize("native", ["0", "1"])


@contextmanager
def kernels(native: str) -> Iterator[None]:
    """Switch them off ("0") or on ("1"), as a user does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNITFISHER_NATIVE", native)
        yield


def by_torch(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def without_kernels(*given: Any) -> Any:
        with kernels("0"):
            return function(*given)

    return without_kernels


def per_route(function: Callable[..., Any]) -> pytest.MarkDecorator:
    """Give a test the function as ``route``, by its kernel and by torch."""
    compiled = pytest.param(function, marks=needs_compiler, id="compiled")
    return pytest.mark.parametrize(
        "route", [compiled, pytest.param(by_torch(function), id="torch")]
    )
