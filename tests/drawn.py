"""Layers of every kind with an input of two samples, drawn with all their geometry."""

from typing import NamedTuple

from hypothesis import strategies as st
from networks import filled
from strategies import normal, seeds
from torch import Tensor, nn

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


class Case(NamedTuple):
    """A layer and an input of two samples for it."""

    layer: nn.Module
    x: Tensor


@st.composite
def linear_layers(draw, leading: st.SearchStrategy) -> Case:
    d, units, generator = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(seeds)
    layer = nn.Linear(d, units, bias=draw(st.booleans()))
    return Case(filled(layer, generator), normal(generator, 2, *draw(leading), d))


@st.composite
def geometries(draw, axes: int) -> tuple[tuple[int, ...], ...]:
    """Draw kernel, dilation, stride and a size, a small number for each axis."""
    few = 2 if axes == 3 else 3
    per_axis = st.lists(st.integers(1, few), min_size=axes, max_size=axes).map(tuple)
    kernel, dilation, stride, size = (draw(per_axis) for _ in range(4))
    return kernel, tuple(min(rate, 2) for rate in dilation), stride, size


@st.composite
def convolutions(draw, axes: int) -> Case:
    kernel, dilation, stride, margin = draw(geometries(axes))
    size = [r * (k - 1) + m for r, k, m in zip(dilation, kernel, margin, strict=True)]
    padding = draw(st.sampled_from(["same", "valid", "numbers"]))
    if padding == "same":
        stride = (1,) * axes
    if padding == "numbers":
        padding = tuple(draw(st.integers(0, min(2, length - 1))) for length in size)
    groups, c_in, c_out = draw(st.sampled_from([(1, 2, 2), (2, 4, 2), (2, 2, 4), (3, 3, 3)]))
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    options |= {"padding_mode": mode, "bias": draw(st.booleans())}
    generator = draw(seeds)
    layer = CONVOLUTIONS[axes](c_in, c_out, kernel, **options)
    return Case(filled(layer, generator), normal(generator, 2, c_in, *size))


@st.composite
def transposed(draw, axes: int) -> Case:
    kernel, dilation, stride, size = draw(geometries(axes))
    spans = zip(kernel, dilation, strict=True)
    padding = tuple(draw(st.integers(0, rate * (taps - 1) // 2)) for taps, rate in spans)
    steps = zip(stride, dilation, strict=True)
    more = tuple(draw(st.integers(0, max(pair) - 1)) for pair in steps)
    groups, c_in, c_out = draw(st.sampled_from([(1, 2, 3), (2, 4, 2), (2, 2, 4), (3, 3, 3)]))
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    options |= {"output_padding": more, "bias": draw(st.booleans())}
    generator = draw(seeds)
    layer = TRANSPOSED[axes](c_in, c_out, kernel, **options)
    return Case(filled(layer, generator), normal(generator, 2, c_in, *size))
