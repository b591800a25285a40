"""Precision is that of our own for as long as we compute, and the user's before and after."""

from collections.abc import Iterator
from threading import Event, Thread

import pytest
import torch
from networks import mlp

from unitfisher import Monitor, NonFiniteError
from unitfisher.precision import exactly

CUDNN, MKLDNN = torch.backends.cudnn, torch.backends.mkldnn
MATRIX_PRODUCTS = (torch.backends.cuda.matmul, MKLDNN.matmul)
OTHERS = (MKLDNN.conv, MKLDNN.rnn)
ON_A_GPU = (CUDNN.conv, CUDNN.rnn)


def precisions() -> list[str]:
    of_each = [m.fp32_precision for m in (*MATRIX_PRODUCTS, *OTHERS, *ON_A_GPU)]
    return [torch.get_float32_matmul_precision(), *of_each]


@pytest.fixture(params=["highest", "high", "medium"])
def asked(request: pytest.FixtureRequest) -> Iterator[list[str]]:
    torch.set_float32_matmul_precision(request.param)
    yield precisions()
    torch.set_float32_matmul_precision("highest")


def test_the_precision_of_matrix_products_is_left_as_it_was(asked):
    model, x = mlp(), torch.randn(6, 4)
    monitor = Monitor(model, every=1)
    model(x)
    monitor.measure(x)
    assert precisions() == asked


def test_the_precision_of_matrix_products_follows_what_is_said_of_all_later():
    backends = torch.backends
    asked = backends.fp32_precision
    try:
        backends.fp32_precision = "tf32"
        for product in MATRIX_PRODUCTS:
            product.fp32_precision = "none"  # nothing of its own
        Monitor(mlp()).measure(torch.randn(6, 4))
        backends.fp32_precision = "ieee"
        assert {m.fp32_precision for m in MATRIX_PRODUCTS} == {"ieee"}
    finally:
        backends.fp32_precision = asked


def test_the_precision_is_that_of_before_when_the_last_of_several_threads_has_measured(asked):
    inside, first_left, found = Event(), Event(), list[str]()

    def second() -> None:
        with exactly(torch.device("cpu")):
            inside.set()
            first_left.wait(10)
            found.extend(m.fp32_precision for m in (*MATRIX_PRODUCTS, *OTHERS))

    thread = Thread(target=second)
    with exactly(torch.device("cpu")):
        thread.start()
        inside.wait(10)
    first_left.set()
    thread.join()
    assert found == 4 * ["ieee"]
    assert precisions() == asked


def test_an_error_leaves_the_precision_and_the_gradient_mode_as_they_were(asked):
    model = mlp()
    Monitor(model, every=1)
    with pytest.raises(NonFiniteError):
        model(torch.full((5, 4), torch.nan))
    assert (precisions(), torch.is_grad_enabled()) == (asked, True)


@pytest.mark.parametrize("asked", ["tf32", "ieee"])
def test_convolutions_on_a_gpu_have_full_precision_inside_and_what_was_asked_after(
    asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default they have less: 10 bits of the mantissa."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    try:
        for each in ON_A_GPU:
            each.fp32_precision = asked
        with exactly(torch.device("cpu")):
            assert {each.fp32_precision for each in ON_A_GPU} == {"ieee"}
        assert {each.fp32_precision for each in ON_A_GPU} == {asked}
        assert asked == "ieee" or CUDNN.allow_tf32  # the older flag agrees with the default
    finally:
        CUDNN.allow_tf32 = True  # the default
