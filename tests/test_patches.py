"""Patches of a convolution's input: held once, and the same however they are unfolded."""

import copy

import pytest
import torch
import torch.nn.functional as F
from drawn import CONVOLUTIONS, convolutions, transposed
from hypothesis import given
from hypothesis import strategies as st
from strategies import TOL, normal, seeds
from torch import nn
from torch.testing import assert_close

from unitfisher import Monitor
from unitfisher.capture import capture
from unitfisher.incoming import Incoming
from unitfisher.kinds import incoming
from unitfisher.patches import Patches, in_pieces, unfolded
from unitfisher.shapes import _folded


@st.composite
def patches(draw) -> Patches:
    layer, x = draw(st.sampled_from(list(CONVOLUTIONS)).flatmap(convolutions))
    found = incoming(layer, x, layer(x).shape)
    return found.cases() if draw(st.booleans()) else found


@given(generator=seeds, stride=st.integers(1, 3), dilation=st.integers(1, 2))
def test_they_are_those_of_torch(generator, stride, dilation):
    x, layer = (
        normal(generator, 3, 4, 7, 6),
        nn.Conv2d(4, 2, (3, 2), stride=stride, dilation=dilation),
    )
    found = unfolded(incoming(layer, x, layer.double()(x).shape))
    expected = F.unfold(x, (3, 2), dilation=dilation, stride=stride).mT
    assert_close(found.squeeze(0), expected, rtol=0, atol=0)


@given(x=patches())
def test_their_shape_is_known_before_they_are_unfolded(x):
    assert x.unfolded().shape == x.shape
    assert x.unfolded().dtype == x.dtype


@given(x=patches(), generator=seeds)
def test_some_are_some_of_all(x, generator):
    chosen = torch.randint(x.shape[1], (3,), generator=generator)
    assert x.at(chosen).equal(x.unfolded()[:, chosen])


@given(x=patches(), cached=st.sampled_from([1, 500, 2**21]))
def test_pieces_are_all_of_them_in_order(x, cached):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unitfisher.averages.CACHED", cached)
        parts, found = zip(*in_pieces(x), strict=True)
        assert torch.cat(found, 1).equal(x.unfolded())
        assert all(x.unfolded()[:, part].equal(a) for part, a in zip(parts, found, strict=True))


@given(x=patches(), cached=st.sampled_from([1, 500, 2**21]))
def test_they_average_to_what_they_do_unfolded(x, cached):
    units = 2 * x.shape[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unitfisher.averages.CACHED", cached)
        found = Incoming.of(x, units)
    assert_close(tuple(found), tuple(Incoming.of(x.unfolded(), units)), **TOL)


@given(case=st.sampled_from(list(CONVOLUTIONS)).flatmap(lambda n: convolutions(n) | transposed(n)))
def test_what_they_will_hold_is_known_from_the_shapes(case):
    layer, x = case
    with capture({"layer": layer}) as seen:
        y = layer(x)
    held = incoming(layer, x, y.shape).view.untyped_storage().nbytes()
    assert _folded(seen.calls[0], x.itemsize) == held


@pytest.mark.parametrize("sharing", ["expand", "joint"])
def test_a_measured_pass_holds_its_input_once(sharing):
    model = nn.Sequential(nn.Conv2d(8, 2, 3, padding=1), nn.AvgPool2d(16), nn.Flatten())
    monitor = Monitor(model, every=1, sharing=sharing, fisher="rademacher")
    model(torch.randn(4, 8, 16, 16))
    x, errors = 4 * 4 * 8 * 18**2, 4 * 4 * 2 * 16**2
    outputs = 16 * 2  # mean and variance
    assert monitor.memory_usage()["latest"] <= x + errors + outputs


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("sharing", ["expand", "joint"])
def test_an_input_may_be_changed_after_the_pass(sharing, padding):
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=padding), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    x = torch.randn(5, 2, 6, 6)
    monitor = Monitor(model, every=1, sharing=sharing)
    expected = monitor.measure(x)["0"]
    model(x)
    x.zero_()
    assert_close(monitor.latest["0"].s, expected.s, **TOL)


@pytest.mark.parametrize("options", [{}, {"sharing": "joint"}, {"rows": 40}], ids=str)
def test_many_say_what_few_say(options, monkeypatch):
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ELU(), nn.Flatten(), nn.Linear(108, 3))
    x = torch.randn(9, 2, 6, 6)
    few = Monitor(model, **options).measure(x)["0"]
    monkeypatch.setattr("unitfisher.cases.UNFOLDED_WHOLE", 0)
    many = Monitor(copy.deepcopy(model), **options).measure(x)["0"]
    for name in ("c", "mean", "mean_q", "s", "k"):
        assert_close(getattr(many, name), getattr(few, name), rtol=1e-4, atol=1e-5)
