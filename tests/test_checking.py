"""Shapes are checked in tests, and in no more than the first examples of a law."""

from itertools import count

import jaxtyping
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import CHECKED

from unitfisher.solvers import outer

examples = count()


def test_shapes_are_checked() -> None:
    with pytest.raises(jaxtyping.TypeCheckError):
        outer(torch.ones(2, 3), torch.ones(1, 3))


@given(n=st.integers(0, 999))
def test_shapes_are_checked_in_the_first_examples_of_a_law(n: int) -> None:
    checked = next(examples) < CHECKED
    assert checked is not jaxtyping.config.jaxtyping_disable
