"""Standard errors of what is drawn, against drawing again and again; influences by autograd."""

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import TOL, batches, normal, seeded, seeds
from torch import Tensor, nn
from torch.testing import assert_close

from unitfisher import Monitor, Run, UnitMoments, UnitStatistics, bias_shift_correction
from unitfisher.blocks import Block
from unitfisher.cases import UnitCases
from unitfisher.condensed import Condensed
from unitfisher.memory import within
from unitfisher.theory import theory
from unitfisher.uncertainty import _influence, variance_of_sum
from unitfisher.window import joined

DRAWS = 150
ERRORS = ("c_error", "mean_q_error", "s_error", "k_error")


def dense() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4))
    return model.double(), normal(seeded(1), 60, 4)


def plentiful() -> tuple[nn.Module, Tensor]:
    """Cases enough that some of them tell how s and k spread."""
    return dense()[0], normal(seeded(1), 800, 4)


def convolutional() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    grouped = nn.Conv2d(2, 4, 3, padding=1, groups=2)
    model = nn.Sequential(grouped, nn.ELU(), nn.Flatten(), nn.Linear(4 * 9, 3))
    return model.double(), normal(seeded(1), 40, 2, 3, 3)


def measured(model: nn.Module, x: Tensor | list[Tensor], **options) -> dict[str, UnitStatistics]:
    with Monitor(model, **options) as monitor:
        return monitor.measure(x)


def drawn(model: nn.Module, x: Tensor, rows: int | None = None, **options) -> dict[str, Tensor]:
    """What the first layer's theory says of the same samples, drawn for afresh in copies."""
    copies = x.repeat(DRAWS, *[1] * (x.dim() - 1))
    whole = measured(model, copies, layers="0", **options)["0"].cases
    own, units = whole.delta.shape[1] // DRAWS, torch.arange(whole.units)
    chance, found = seeded(0), []
    for start in range(0, own * DRAWS, own):
        part = slice(start, start + own)
        cases = replace(
            whole, received=whole.a[:, part], delta=whole.delta[:, part], samples=len(x)
        )
        cases = cases if rows is None else cases.drawn(rows, chance)
        found.append(
            theory(Block(("0",), (units,), cases, Condensed(cases), finite=True), 1e-3, None).theory
        )
    return {name: torch.stack([one[name] for one in found]) for name in found[0]}


# Coverage


DRAWN = {
    "labels": (dense, {"fisher": "mc", "samples": 4}, ("c", "mean_q", "s", "k")),
    "signs": (dense, {"fisher": "rademacher", "samples": 2}, ("c", "mean_q", "s", "k")),
    "top-and-signs": (dense, {"fisher": "top-rademacher", "samples": 2}, ("c", "mean_q", "s", "k")),
    "positions": (
        convolutional, {"fisher": "rademacher", "samples": 2}, ("c", "mean_q", "s", "k")
    ),
    "joint": (convolutional, {"fisher": "rademacher", "samples": 3, "sharing": "joint"}, ("c",)),
    "reduce": (
        convolutional, {"fisher": "mc", "samples": 4, "sharing": "reduce"}, ("c", "mean_q")
    ),
    "cases": (dense, {"rows": 30}, ("c", "mean_q")),
    "many-cases": (plentiful, {"rows": 300}, ("c", "mean_q", "s", "k")),
    "cases-and-labels": (dense, {"rows": 40, "fisher": "mc", "samples": 4}, ("c", "mean_q")),
    "many-cases-and-labels": (
        plentiful, {"rows": 400, "fisher": "mc", "samples": 4}, ("c", "mean_q", "s", "k")
    ),
    "cases-of-positions": (convolutional, {"rows": 120}, ("c", "mean_q")),
    "cases-of-positions-and-signs": (
        convolutional, {"rows": 240, "fisher": "rademacher", "samples": 2}, ("c", "mean_q")
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "options", "quantities"), DRAWN.values(), ids=DRAWN)
@pytest.mark.usefixtures("as_users_run_it")
def test_standard_errors_are_the_spread_over_draws(make, options, quantities):
    found = drawn(*make(), **options)
    for name in quantities:
        spread = found[name].var(0)
        seen = (found[name] - found[name].mean(0)) ** 2 / spread
        told = found[f"{name}_error"] ** 2 / spread
        off = (told - seen).flatten(1).mean(1)  # over units, and inputs
        noise = off.std() / DRAWS**0.5
        higher_order = 0.2 if name in ("s", "k") else 0.05
        assert off.mean().abs() <= 5 * noise + higher_order, name


@pytest.mark.parametrize("fisher", ["mc", "rademacher", "top-rademacher"])
def test_the_exact_value_is_within_five_standard_errors(fisher):
    model, x = dense()
    exact = measured(model, x)["0"]
    m = measured(model, x, fisher=fisher, samples=16)["0"]
    for name in ("c", "mean_q"):
        off = (getattr(m, name) - getattr(exact, name)).abs()
        assert (off <= 5 * getattr(m, f"{name}_error")).all()


def test_cases_drawn_with_one_column_each_have_an_error_that_is_no_less_than_the_spread():
    found = drawn(*dense(), rows=40, fisher="mc")
    spread, told = found["c"].var(0), found["c_error"].square().mean(0)
    assert (told >= 0.75 * spread).all()
    assert (told <= 3 * spread).all()


def test_memory_that_units_and_samples_may_take_does_not_change_the_errors():
    cases = measured(*convolutional(), fisher="rademacher", samples=2)["0"].cases
    block = Block(("0",), (torch.arange(cases.units),), cases, Condensed(cases), finite=True)
    together = theory(block, 1e-3, None).theory
    with within(1):
        apart = theory(replace(block, cases=replace(cases)), 1e-3, None).theory
    for name in ERRORS:
        assert_close(apart[name], together[name], **TOL)


def errors_of(cases: UnitCases) -> dict[str, Tensor]:
    block = Block(("0",), (torch.arange(cases.units),), cases, Condensed(cases), finite=True)
    found = theory(block, 1e-3, None).theory
    return {name: found[name] for name in ERRORS}


@st.composite
def sequences(draw) -> list[UnitCases]:
    """Batches of two drawn columns, whose samples have other numbers of positions each."""
    generator, samples = draw(seeds), draw(st.integers(2, 4))
    lengths = draw(st.lists(st.integers(1, 5), min_size=2, max_size=3))
    return [
        UnitCases(
            normal(generator, 1, samples * t, 1, 3),
            normal(generator, 2, samples * t, 1, 4),
            samples,
            replicates=2,
        )
        for t in lengths
    ]


class TimeFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.fc(x.transpose(0, 1)).tanh().mean(0))


class Latents(nn.Module):
    """Rows of a layer's own, no more than samples, which all samples see."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = normal(seeded(2), 4, 4).float()
        self.fc, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x @ self.fc(self.queries).T).softmax(-1) @ self.queries)


def test_rows_that_are_no_samples_have_no_error_that_takes_them_for_such():
    monitor = Monitor(Latents(), fisher="mc", samples=4)
    found = monitor.measure(normal(seeded(0), 6, 4).float())
    assert all(getattr(found["fc"], name).isnan().all() for name in ERRORS)
    assert all(getattr(found["head"], name).isfinite().all() for name in ERRORS)


def test_where_time_comes_first_no_error_is_told_that_takes_whose_case_is_whose():
    monitor = Monitor(TimeFirst(), fisher="mc", samples=4)
    found = monitor.measure(normal(seeded(0), 6, 8, 4).float())
    assert all(getattr(found["fc"], name).isnan().all() for name in ERRORS)
    assert all(getattr(found["head"], name).isfinite().all() for name in ERRORS)


@given(batches=sequences())
def test_one_batch_whose_samples_are_not_told_apart_makes_all_unknown(batches):
    told = joined([*batches, replace(batches[0], in_order=False)])
    assert variance_of_sum(told).isnan().all()


@given(batches=sequences())
def test_variances_of_samples_add_up_whatever_their_lengths(batches):
    apart = torch.stack([variance_of_sum(cases) for cases in batches])
    assert_close(variance_of_sum(joined(batches)), apart.sum(0), **TOL)


@given(batches=sequences(), generator=seeds)
def test_the_order_of_cases_is_invisible_to_errors(batches, generator):
    cases = joined(batches)
    order = torch.randperm(cases.delta.shape[1], generator=generator)
    parts = cases.a[:, order], cases.delta[:, order], cases.of_sample[order]
    shuffled = replace(cases, received=parts[0], delta=parts[1], sample=parts[2])
    for name, error in errors_of(cases).items():
        assert_close(errors_of(shuffled)[name], error, **TOL)


@given(batches=sequences())
def test_the_error_of_the_mean_is_that_of_the_sums_over_samples(batches):
    cases = joined(batches)
    x = cases.delta.squeeze(2) ** 2 - (cases.delta.squeeze(2) ** 2).mean(0)
    mean = torch.einsum("mu,md->ud", cases.D, cases.a[0, :, 0]) / cases.weight[:, None]
    parts = torch.einsum("kmu,mud->kmud", x, cases.a[0] - mean)
    own = [parts[:, cases.of_sample == i].sum(1) for i in range(cases.samples)]
    expected = (2 * torch.stack(own).square().sum((0, 1))).sqrt() / cases.weight[:, None]
    assert_close(errors_of(cases)["mean_q_error"], expected, **TOL)


def test_of_which_sample_a_case_is_need_not_be_kept_where_its_place_tells():
    batch = UnitCases(torch.randn(1, 6, 1, 3), torch.randn(2, 6, 1, 4), 3, replicates=2)
    longer = replace(batch, samples=2)
    assert joined([batch, batch]).sample is None
    assert joined([batch, longer]).sample.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 3, 4, 4, 4]
    assert joined([replace(one, replicates=1) for one in (batch, longer)]).sample is None
    chance = seeded(0)
    assert batch.drawn(4, chance).sample.shape == (4,)
    assert replace(batch, replicates=1).drawn(4, chance).sample is None
    assert replace(batch, samples=6).drawn(4, chance).sample is None


def test_layers_that_have_drawn_cases_of_other_samples_are_not_measured_together():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Tanh(), nn.Conv2d(4, 4, 1), nn.Flatten())
    x = normal(seeded(1), 6, 4, 3, 3)
    found = measured(model.double(), x, rows=30, fisher="mc", samples=2)
    assert found["0"].block is not found["2"].block
    assert not found["0"].cases.sample.equal(found["2"].cases.sample)


# How s and k follow D


@pytest.mark.parametrize("route", ["sums", "rows", "products"])
@given(batch=batches(), damping=st.sampled_from([0.0, 1e-3, 0.1]))
def test_influences_are_the_derivatives_by_D(route, batch, damping):
    assume(damping or route != "rows")  # more cases than inputs
    D = batch.D.clone().requires_grad_(True)
    s, k = bias_shift_correction(UnitMoments.of(batch.a, D).damped(damping))
    of_s, of_k = (torch.autograd.grad(x.sum(), D, retain_graph=True)[0] for x in (s, k))
    cases = UnitCases(batch.a[None, :, None], batch.D.sqrt()[None, :, None], len(batch.a))
    ((_, m, damped),) = Condensed(cases, route).damped_parts(damping)
    found = _influence(cases, m, damped)
    assert_close(found.s, of_s, **TOL)
    assert_close(found.k, of_k, **TOL)


# What is not estimated, and what cannot be told


def test_what_is_exact_has_no_error():
    model, x = dense()
    for m in Monitor(model).measure(x).values():
        assert all(getattr(m, name).eq(0).all() for name in ERRORS)


UNTOLD = {
    "one-column": (dense, {"fisher": "rademacher"}, ERRORS),
    "one-column-and-top": (dense, {"fisher": "top-rademacher"}, ERRORS),
    "joint": (convolutional, {"fisher": "mc", "samples": 2, "sharing": "joint"}, ERRORS[1:]),
    "few-drawn-cases": (dense, {"rows": 19}, ERRORS[2:]),
    "drawn-positions-one-column": (convolutional, {"rows": 120, "fisher": "mc"}, ERRORS),
}


@pytest.mark.parametrize(("make", "options", "names"), UNTOLD.values(), ids=UNTOLD)
def test_what_cannot_be_told_is_nan(make, options, names):
    model, x = make()
    m = Monitor(model, "0", **options).measure(x)["0"]
    assert all(getattr(m, name).isnan().all() for name in names)
    assert all(getattr(m, name).gt(0).all() for name in set(ERRORS) - set(names))


def test_units_that_few_drawn_cases_carry_have_no_error_of_s_and_k():
    model, x = plentiful()
    model[0].weight.data[0] *= 20  # saturated: its errors come from few cases
    m = Monitor(model, "0", rows=100).measure(x)["0"]
    few = m.n_eff < 5 * 4
    assert 0 < few.sum() < len(few)
    for name in ("s_error", "k_error"):
        assert getattr(m, name).isnan().tolist() == few.tolist()


def test_a_dead_unit_has_no_error_of_what_it_has_not():
    model, x = dense()
    model[0].weight.data[1], model[2].weight.data[:, 1] = 0.0, 0.0
    m = Monitor(model, fisher="mc", samples=3).measure(x)["0"]
    assert m.dead.tolist() == [False, True, False, False, False]
    assert m.c_error[1] == 0
    for name in ERRORS[1:]:
        assert getattr(m, name).isnan().reshape(5, -1).all(1).tolist() == m.dead.tolist()


# From one batch to several


@pytest.mark.parametrize("damping", [1e-3, 0.1])
def test_another_damping_has_the_errors_that_a_measurement_with_it_has(damping):
    model, x = dense()
    options = {"fisher": "rademacher", "samples": 2}
    found = measured(model, x, damping=1e-2, **options)["0"].damped(damping)
    expected = measured(model, x, damping=damping, **options)["0"]
    for name in ERRORS:
        assert_close(getattr(found, name), getattr(expected, name), **TOL)


def test_layers_measured_together_have_their_own_errors():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    x, options = normal(seeded(1), 30, 4), {"fisher": "mc", "samples": 3}
    together = measured(model.double(), x, layers=["0", "2"], **options)
    assert together["0"].block is together["2"].block
    for name in ("0", "2"):
        alone = measured(model, x, layers=name, **options)[name]
        for error in ERRORS:
            assert_close(getattr(together[name], error), getattr(alone, error), **TOL)


def test_layers_of_one_form_but_other_numbers_of_positions_know_of_how_many_cases_theirs_are():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Tanh(), nn.Conv2d(4, 4, 1, stride=2), nn.Flatten())
    x = normal(seeded(1), 6, 4, 4, 4)
    found = measured(model.double(), x, rows=8)
    assert [found[name].cases.population for name in ("0", "2")] == [6 * 16, 6 * 4]


def test_a_loader_tells_the_error_of_c():
    model, x = dense()
    options = {"fisher": "rademacher", "samples": 4}
    m = measured(model, [x[:20], x[20:]], **options)["0"]
    whole = measured(model, x, **options)["0"]
    assert_close(m.c_error, whole.c_error, rtol=0.5, atol=0)  # of other signs
    assert m.c_error.gt(0).all()
    assert all(getattr(m, name).isnan().all() for name in ERRORS[1:])
    one = measured(model, [x[:20], x[20:]], fisher="rademacher")["0"]
    assert all(getattr(one, name).isnan().all() for name in ERRORS)
    exact = measured(model, [x[:20], x[20:]])["0"]
    assert all(getattr(exact, name).eq(0).all() for name in ERRORS)


def test_a_window_pools_errors_and_keeps_them_through_a_restart():
    model, x = dense()
    options = {"fisher": "rademacher", "samples": 2, "every": 1, "window": 2}
    monitor = Monitor(model, **options)
    for part in (x[:30], x[30:]):
        model(part)
    pooled, state = monitor.latest["0"], monitor.state_dict()
    cases = pooled.cases
    assert (cases.replicates, cases.samples, cases.delta.shape[0]) == (2, 60, 2)
    monitor.detach()
    again = Monitor(model, **options)
    again.load_state_dict(state)
    model(x[:30])
    assert again.latest["0"].c_error.gt(0).all()


def test_the_record_tells_errors(tmp_path):
    model, x = dense()
    with (
        Run(tmp_path / "run") as run,
        Monitor(model, fisher="mc", samples=2, record=run) as monitor,
    ):
        m = monitor.measure(x)["0"]
        table = monitor.to_pandas()
    rows = table[table["layer"] == "0"]
    assert_close(torch.tensor(rows["k_error"].to_numpy()), m.k_error, rtol=0, atol=0)
    norms = torch.tensor(rows["mean_q_error"].to_numpy())
    assert_close(norms, m.mean_q_error.norm(dim=1), **TOL)
