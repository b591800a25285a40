"""Second moments of weighted cases, compiled and in torch, against a plain sum in double."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from routes import needs_compiler, per_route
from strategies import mostly_ones, normal, seeded, seeds
from torch import Tensor
from torch.testing import assert_close

from unitfisher import native
from unitfisher.second_moments import second_moments

EPS = torch.finfo(torch.float32).eps
by_each_route = per_route(second_moments)


@st.composite
def layers(draw) -> tuple[Tensor, Tensor, Tensor]:
    """Activations of groups, weights of which a fifth is zero, an origin for all or each unit."""
    generator, groups = draw(seeds), draw(st.sampled_from([1, 3]))
    n, d = (
        draw(st.sampled_from([1, 63, 64, 65, 200])),
        draw(st.sampled_from([1, 4, 23, 24, 25, 50])),
    )
    u = groups * draw(st.integers(1, 3))
    a = (normal(generator, groups, n, d) + draw(st.sampled_from([0.0, 1000.0]))).float()
    D = draw(st.sampled_from([1e-30, 1.0])) * normal(generator, n, u) ** 6
    origin = a.mean(1).repeat_interleave(u // groups, 0) + normal(generator, u, d).float()
    one = groups == 1 and draw(st.booleans())
    return a, D * mostly_ones(generator, n, u), origin[0] if one else origin


def about(a: Tensor, origin: Tensor, u: int) -> Tensor:
    """Each unit's cases less its origin, in double."""
    own = a.double().repeat_interleave(u // len(a), 0)
    return own - origin.double().expand(u, -1).unsqueeze(1)


@by_each_route
@given(layer=layers())
def test_every_unit_gets_its_own_sums(route, layer):
    a, D, origin = layer
    found, x, w = route(*layer), about(a, origin, D.shape[1]), D.T.unsqueeze(-1)
    size = (w * x.abs()).mT @ x.abs()  # of the terms: what single precision rounds
    wrong = (found.second - (w * x).mT @ x).abs()
    assert (wrong <= (16 + len(D)) * EPS * size).all()
    wrong = (found.first - (w * x).sum(1)).abs()
    assert (wrong <= (16 + len(D)) * EPS * (w * x.abs()).sum(1)).all()


@needs_compiler
@given(layer=layers())
def test_compiled_sums_grow_in_double_precision(layer):
    a, D, origin = layer
    found, x, w = (
        second_moments(*layer),
        about(a, origin, D.shape[1]),
        D.T.unsqueeze(-1),
    )
    diagonal = (w * x**2).sum(1)  # of terms of one sign: no more than a block of them rounds
    assert_close(found.second.diagonal(dim1=1, dim2=2), diagonal, rtol=20 * EPS, atol=0)
    assert torch.equal(found.second, found.second.mT)


@needs_compiler
def test_threads_change_no_bit(monkeypatch):
    generator = seeded(0)
    a, D = normal(generator, 1, 200, 30).float(), normal(generator, 200, 9) ** 2
    alone = second_moments(a, D, a.mean(1)[0])
    monkeypatch.setattr(native, "FLOP_PER_THREAD", 1)
    torch.set_num_threads(2)
    found = second_moments(a, D, a.mean(1)[0])
    torch.set_num_threads(1)
    assert torch.equal(found.second, alone.second)
    assert torch.equal(found.first, alone.first)


def test_what_is_not_plain_single_precision_goes_by_torch(monkeypatch):
    monkeypatch.setattr("unitfisher.second_moments._by_kernel", None)
    generator = seeded(0)
    a, D = normal(generator, 1, 20, 3), normal(generator, 20, 2) ** 2
    x = about(a, a.mean(1)[0], 2)
    expected = (D.T.unsqueeze(-1) * x).mT @ x
    assert_close(second_moments(a, D, a.mean(1)[0]).second, expected, rtol=1e-12, atol=1e-12)
    a = a.float().requires_grad_()
    second_moments(a, D, a.detach().mean(1)[0]).second.sum().backward()
    assert a.grad.isfinite().all()


@by_each_route
def test_memory_beside_the_cases_is_left_alone(route):
    generator = seeded(0)
    a, D = normal(generator, 1, 70, 30).float(), normal(generator, 70, 3) ** 2
    origin = normal(generator, 3, 30).float()
    beside = [
        torch.cat([x.flatten(), torch.full_like(x.flatten(), torch.nan)]) for x in (a, origin)
    ]
    inside = [x[: x.numel() // 2].view(y.shape) for x, y in zip(beside, (a, origin), strict=True)]
    assert torch.equal(route(inside[0], D, inside[1]).second, route(a, D, origin).second)


@by_each_route
def test_a_unit_without_weights_sums_to_zero(route):
    generator = seeded(0)
    a, D = normal(generator, 1, 70, 30).float(), normal(generator, 70, 3) ** 2
    D[:, 1] = 0
    found = route(a, D, a.mean(1)[0])
    assert found.second[1].eq(0).all()
    assert found.first[1].eq(0).all()
    assert found.second[2].ne(0).all()
