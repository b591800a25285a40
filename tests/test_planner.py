"""A budget is refused only where no choice of routes would fit into it."""

from dataclasses import replace
from itertools import product

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from unitfisher import MemoryBudgetError
from unitfisher.costs import admissible, bytes_of_group, least
from unitfisher.plan import PIECES
from unitfisher.planner import Budget
from unitfisher.shapes import Shape

DAMPING = 1e-3
LAYERS = st.builds(
    Shape,
    samples=st.sampled_from([16, 256, 2048]),
    positions=st.just(1),
    inputs=st.sampled_from([8, 128, 784, 2048]),
    units=st.sampled_from([1, 10, 512]),
    groups=st.just(1),
    itemsize=st.sampled_from([4, 8]),
    columns=st.just(0),
    averaged=st.just(False),
    engine=st.sampled_from(["compiled", "torch"]),
    replicates=st.just(0),
    folded=st.just(0),
)


def smallest(shapes: dict[str, Shape], kept: int, column: int) -> int:
    """Bytes of the best of all choices of one route for each layer."""
    choices = [
        [(s, route) for route in admissible(s.sizes(s.cases), DAMPING)] for s in shapes.values()
    ]
    return min(_bytes(choice, column) for choice in product(*choices)) + kept


def _bytes(choice: tuple[tuple[Shape, str], ...], column: int) -> int:
    solving = [
        bytes_of_group(s.sizes(s.cases), route) + 2 * s.bytes_of_results for s, route in choice
    ]
    workspaces = [least(s.sizes(s.cases), route) for s, route in choice]
    return max(solving) + PIECES * max(-(-column // PIECES), *workspaces)


WIDE = Shape(2048, 1, 784, 512, 1, 4, 0, False, "compiled")
TALL = Shape(12544, 1, 576, 128, 1, 4, 0, False, "compiled")


@example(layers=[TALL], column=10**8)  # "products" are faster, "sums" smaller
@example(layers=[WIDE], column=10**8)  # "sums" fits into the workspace that a column takes anyway
@given(layers=st.lists(LAYERS, min_size=1, max_size=3), column=st.sampled_from([0, 10**6, 10**8]))
def test_a_budget_is_refused_only_where_no_routes_fit(layers, column):
    shapes = {str(i): shape for i, shape in enumerate(layers)}
    ample = Budget(memory=2**50, damping=DAMPING, strict=True)
    kept = sum(layer.kept for layer in ample.plan(shapes, column).layers)
    enough = smallest(shapes, kept, column)
    plan = replace(ample, memory=enough).plan(shapes, column)
    assert plan.total <= enough
    with pytest.raises(MemoryBudgetError):
        replace(ample, memory=enough - 1).plan(shapes, column)
