import os
from functools import wraps
from pathlib import Path

import jaxtyping
import pytest
import separate_device
import torch
from strategies import CHECKED

torch.set_num_threads(1)  # the tests' networks are small: a second thread only waits


@pytest.fixture(scope="session")
def accelerator() -> torch.device | None:
    if os.environ.get("UNITFISHER_TEST_DEVICE") == separate_device.NAME:
        separate_device.load()
        return torch.device(separate_device.NAME, 0)
    return torch.device("cuda", 0) if torch.cuda.is_available() else None


@pytest.fixture
def device(accelerator: torch.device | None) -> torch.device:
    """Where tests marked ``gpu`` run: a GPU, or what is made to be like one."""
    if accelerator is None:
        pytest.skip("no GPU here: test_gpu.py runs this test on a simulated one")
    return accelerator


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
