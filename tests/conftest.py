import os
from functools import wraps
from pathlib import Path

import jaxtyping
import pytest
import torch
from strategies import CHECKED

torch.set_num_threads(1)  # the tests' networks are small: a second thread only waits


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device here: run this test where there is one")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def as_users_run_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes are not checked: where that would take most of the time, or be in the way."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture(autouse=True)
def _first_examples_checked(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shapes are checked in the first examples of a law: in all, that takes most of the time."""
    law = getattr(getattr(request.node, "obj", None), "hypothesis", None)
    if law is None:
        return
    example, left = law.inner_test, CHECKED

    @wraps(example)
    def checked_at_first(*given: object, **drawn: object) -> None:
        nonlocal left
        try:
            example(*given, **drawn)
        except BaseException:
            left = 0  # what failed is tried again, under the same conditions
            raise
        left -= 1
        if left == 0:
            monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)

    monkeypatch.setattr(law, "inner_test", checked_at_first)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of the real data sets, for tests marked ``data``."""
    root = os.environ.get("UNITFISHER_DATA")
    if not root:
        pytest.skip("NOT TESTED ON REAL DATA: set UNITFISHER_DATA to a torchvision data root")
    return Path(root)
