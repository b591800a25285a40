"""The same numbers on a GPU as on the CPU, and no more waiting for it than is needed.

These tests, and others marked ``gpu``, run on a GPU where there is one; on any machine they run on
a simulated device, in a process of their own.
"""

import copy
import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from networks import CLASSES, NETS, batches, inputs, prepared
from separate_device import COMPILER, NAME, SINGLE
from strategies import all_sharings
from torch import Tensor, nn
from torch.testing import assert_close

import unitfisher
from unitfisher import Monitor

TESTS = Path(__file__).parent
TOL = {"rtol": 1e-6, "atol": 1e-9}


@pytest.mark.slow
@pytest.mark.skipif(
    sys.platform != "linux" or not COMPILER,
    reason="NOT TESTED ON A SIMULATED GPU, which takes Linux and a C++ compiler",
)
def test_all_tests_for_gpus_pass_on_a_simulated_one() -> None:
    files = [p for p in sorted(TESTS.glob("test_*.py")) if "@pytest.mark.gpu" in p.read_text()]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "--numprocesses=0", *map(str, files)]
    environment = os.environ | {"UNITFISHER_TEST_DEVICE": NAME}
    done = subprocess.run(
        command, cwd=TESTS.parent, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-2_000:]
    assert re.search(r"\d\d passed", done.stdout)


every_network = pytest.mark.parametrize("of", NETS)
DRAWN = [(of, fisher) for of in NETS for fisher in ("rademacher", "top-rademacher", "mc")]
DRAWN.remove(("sequence", "top-rademacher"))  # which takes one label a sample


def copies(of: str, device: torch.device) -> list[tuple[nn.Module, Tensor, Tensor]]:
    """One of ``NETS`` with a batch and its labels, on the CPU and on the device."""
    model, x, y = prepared(of)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # devices draw other masks
    return [(copy.deepcopy(model).to(d), x.to(d), y.to(d)) for d in (torch.device("cpu"), device)]


def numbers(measurement: Mapping[str, unitfisher.UnitStatistics]) -> dict[str, Tensor]:
    """All that a measurement says of every layer."""
    return {
        f"{layer}.{name}": value
        for layer, one in measurement.items()
        for name in dir(one)
        if not name.startswith("_")
        and isinstance(value := getattr(one, name), Tensor)
        and value.is_floating_point()
    }


def assert_same(here: dict[str, Tensor], there: dict[str, Tensor], device: torch.device) -> None:
    assert there
    assert {value.device for value in there.values()} == {device}
    assert_close({name: value.cpu() for name, value in there.items()}, here, **TOL, equal_nan=True)


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x).reshape(-1, CLASSES), y.reshape(-1))


@pytest.mark.gpu
@every_network
@all_sharings
@pytest.mark.parametrize(
    "options",
    [{}, {"solver": "iterative"}, {"solver": "direct", "units": 2, "damping": 0.1}],
    ids=str,
)
def test_statistics_are_the_same(of, sharing, options, device):
    here, there = (
        numbers(Monitor(model, sharing=sharing, **options).measure(x, targets=y))
        for model, x, y in copies(of, device)
    )
    assert_same(here, there, device)


@pytest.mark.gpu
@every_network
@pytest.mark.parametrize("window", [1, 2])
def test_training_passes_are_measured_the_same(of, window, device):
    def measured(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        monitor = Monitor(model, every=1, window=window, activations=1)
        for batch, labels in zip(x.split(40), y.split(40), strict=True):
            model.zero_grad()
            loss_of(model, batch, labels).backward()
        steps = monitor.natural_gradient()
        moves = {f"{layer}.{i}": dw for layer, step in steps.items() for i, dw in enumerate(step)}
        return numbers(monitor.latest) | {n: dw for n, dw in moves.items() if dw is not None}

    here, there = (measured(*copy) for copy in copies(of, device))
    assert_same(here, there, device)


@pytest.mark.gpu
@every_network
def test_loaders_are_measured_the_same(of, device):
    """The batches come from the CPU, as those of a ``DataLoader`` do."""
    here, there = (
        numbers(Monitor(model).measure(batches(x.cpu(), y.cpu())))
        for model, x, y in copies(of, device)
    )
    assert_same(here, there, device)


@pytest.mark.gpu
def test_a_loader_that_is_read_again_is_measured_the_same(device):
    model, x = (
        nn.Sequential(nn.Linear(90, 40), nn.ELU(), nn.Linear(40, CLASSES)).double(),
        inputs(300, 90),
    )
    monitors = [Monitor(copy.deepcopy(model).to(d), memory="2 MiB") for d in ("cpu", device)]
    here, there = (numbers(monitor.measure(list(x.split(50)))) for monitor in monitors)
    assert monitors[1].latest["0"].route == "passes"
    assert_same(here, there, device)


@pytest.mark.gpu
@pytest.mark.parametrize(("of", "fisher"), DRAWN)
def test_what_is_drawn_at_random_is_drawn_on_the_device(of, fisher, device):
    _, (model, x, y) = copies(of, device)
    found = []
    for _ in range(2):
        with Monitor(model, fisher=fisher, samples=2, rows=30) as monitor:
            found.append(numbers(monitor.measure(x, targets=y)))
    assert_same({name: value.cpu() for name, value in found[0].items()}, found[1], device)


@pytest.mark.gpu
def test_the_theorems_are_the_same(device):
    a, D, g = inputs(40, 6), inputs(40, 3).square(), inputs(3, 7)

    def found(*given: Tensor) -> dict[str, Tensor]:
        a, D, g = given
        m = unitfisher.UnitMoments.of(a, D).damped(1e-3)
        s, k = unitfisher.bias_shift_correction(m)
        dw, dw0 = unitfisher.unit_natural_gradient(m, g[:, :6], g[:, 6])
        shift = unitfisher.theorem_2(m, g[:, :6], g[:, 6])
        return {"s": s, "k": k, "dw": dw, "dw0": dw0, "shift": shift, "Var_q": m.Var_q}

    assert_same(found(a, D, g), found(*(x.to(device) for x in (a, D, g))), device)


@pytest.mark.gpu
@every_network
@all_sharings
def test_fishers_and_gradients_of_samples_are_the_same(of, sharing, device):
    def formed(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        fishers = unitfisher.unit_fisher(model, x, sharing=sharing)
        gradients = unitfisher.per_sample_gradients(model, x, y)
        means = {name: of.mean for name, of in unitfisher.activation_statistics(model, x).items()}
        return {
            f"{i}.{n}": t
            for i, all in enumerate((fishers, gradients, means))
            for n, t in all.items()
        }

    here, there = (formed(*copy) for copy in copies(of, device))
    assert_same(here, there, device)


@pytest.mark.gpu
def test_training_is_bit_identical_with_and_without_the_monitor(device, tmp_path):
    random = torch.get_device_module(device)

    def trained(**options: object) -> list[Tensor]:
        torch.manual_seed(0)
        _, (model, x, y) = copies("mlp", device)
        model.insert(2, nn.Dropout(0.3))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with ExitStack() as stack:
            if options:
                stack.enter_context(Monitor(model, every=2, fisher="rademacher", **options))
            for _ in range(6):
                optimizer.zero_grad()
                loss_of(model, x, y).backward()
                optimizer.step()
        return [p.detach().cpu() for p in model.parameters()] + [random.get_rng_state(device)]

    plain, watched = trained(), trained(record=tmp_path / "run")
    assert all(map(torch.equal, plain, watched))
    assert pd.read_parquet(tmp_path / "run" / "units")["k"].notna().all()


@pytest.mark.gpu
def test_measuring_leaves_the_random_state_of_the_device(device):
    _, (model, x, _) = copies("mlp", device)
    model.register_forward_hook(lambda module, args, z: z + 0 * torch.randn_like(z))
    random = torch.get_device_module(device)
    before = random.get_rng_state(device)
    Monitor(model).measure(x)
    assert torch.equal(random.get_rng_state(device), before)


@pytest.mark.gpu
@pytest.mark.parametrize("on_host", [True, False])
def test_a_monitor_goes_on_from_its_state_wherever_it_is_loaded(on_host, device):
    _, (model, x, y) = copies("mlp", device)

    def measured(monitor: Monitor, passes: int) -> pd.DataFrame:
        for _ in range(passes):
            loss_of(model, x, y).backward()
        return monitor.to_pandas()

    with Monitor(model, every=1, fisher="rademacher") as whole:
        expected = measured(whole, 4)
    with Monitor(model, every=1, fisher="rademacher") as first:
        measured(first, 2)
        kept = io.BytesIO()
        torch.save(first.state_dict(), kept)
    with Monitor(model, every=1, fisher="rademacher") as second:
        kept.seek(0)
        second.load_state_dict(
            torch.load(kept, map_location="cpu" if on_host else device, weights_only=True)
        )
        found = measured(second, 2)
    pd.testing.assert_frame_equal(found, expected)


@pytest.fixture
def single(device: torch.device) -> torch.device:
    """A device without double precision."""
    if device.type == NAME:
        return torch.device(SINGLE)
    if not torch.backends.mps.is_available():
        pytest.skip("this GPU has double precision")
    return torch.device("mps", 0)


@pytest.mark.gpu
@every_network
@all_sharings
def test_without_double_precision_measurements_are_those_of_the_cpu(of, sharing, single):
    def measured(model: nn.Module, x: Tensor, y: Tensor) -> Iterator[dict[str, Tensor]]:
        monitor = Monitor(model, every=1, sharing=sharing, activations=1)
        loss_of(model, x, y).backward()
        steps = monitor.natural_gradient()
        yield numbers(monitor.latest)
        for name, (dw, dw0) in steps.items():
            layer = model.get_submodule(name)
            g, g0 = layer.weight.grad, None if layer.bias is None else layer.bias.grad
            again, _ = monitor.latest[name].natural_gradient(g, g0)
            assert {dw.device, again.device} == {x.device}
            yield {"dw": dw, "again": again} | ({} if dw0 is None else {"dw0": dw0})
        yield numbers(monitor.measure(x, targets=y))
        yield numbers(monitor.measure(batches(x, y)))
        yield unitfisher.unit_fisher(model, x, sharing=sharing, fisher="rademacher")

    model, x, y = copies(of, torch.device("cpu"))[0]
    model, x = model.float(), x.float()
    here = list(measured(copy.deepcopy(model), x, y))
    there = measured(model.to(single), x.to(single), y.to(single))
    for one, other in zip(here, there, strict=True):
        on_host = {name: value.cpu() for name, value in other.items()}
        assert_close(on_host, one, rtol=1e-3, atol=1e-6, equal_nan=True)


@pytest.mark.gpu
@every_network
def test_without_double_precision_gradients_of_samples_stay_on_the_device(of, single):
    model, x, y = copies(of, torch.device("cpu"))[0]
    here = unitfisher.per_sample_gradients(model.float(), x.float(), y)
    model, x, y = model.to(single), x.float().to(single), y.to(single)
    there = unitfisher.per_sample_gradients(model, x, y)
    assert {g.device for g in there.values()} == {single}
    assert_close({n: g.cpu() for n, g in there.items()}, here, rtol=1e-4, atol=1e-6)
    assert unitfisher.per_sample_gradients(model, x, fisher="exact")


@pytest.mark.gpu
def test_a_model_on_two_devices_is_measured_as_on_one(device):
    if torch.get_device_module(device).device_count() < 2:
        pytest.skip("needs two devices")
    other = torch.device(device.type, 1 - device.index)
    (whole, x, y), (parted, _, _) = copies("mlp", device)
    parted[2:].to(other)
    parted[2].register_forward_pre_hook(lambda module, args: args[0].to(other))
    here = Monitor(whole).measure(x, targets=y)
    there = Monitor(parted).measure(x.to(device), targets=y.to(other))
    for layer, place in {"0": device, "2": other, "4": other}.items():
        assert_same(numbers({layer: here[layer]}), numbers({layer: there[layer]}), place)
