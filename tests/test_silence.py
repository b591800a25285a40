"""What a Monitor may not change: the training itself, and whatever else the model is used for."""

import copy
import gc
import io
import pickle
import random
import sys
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch
from networks import CLASSES, NETWORKS, Checkpointed, Faulty, Network, loss_of, mlp
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap
from torch.overrides import _get_current_function_mode_stack as function_modes
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from unitfisher import LayerSelectionError, Monitor, NonFiniteError, Run, detach_all

STEPS = 50
OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "adam": partial(torch.optim.Adam, lr=1e-2),
}
FISHERS = {
    "exact": {"fisher": "exact", "sharing": "expand"},
    "mc": {"fisher": "mc", "samples": 2, "sharing": "joint"},
    "rademacher": {"fisher": "rademacher", "sharing": "reduce"},
    "empirical": {"fisher": "empirical", "sharing": "expand"},
}
per_network = pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)


pytestmark = pytest.mark.usefixtures("as_users_run_it")  # the type checker draws from `random`


def is_layer(name: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d)


def train(
    network: Network,
    monitored: dict[str, Any] | None = None,
    *,
    optimizer: str = "sgd",
    accumulate: int = 1,
    set_to_none: bool = True,
    precision: torch.dtype | None = None,
    between: Callable[[Monitor, Tensor], object] | None = None,
) -> list[Any]:
    """What a seeded training leaves behind: each step's gradients, and the end of it."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  (the global source is the one to guard)
    model = network.seeded()
    monitor = Monitor(model, layers=is_layer, **monitored) if monitored else None
    update = OPTIMIZERS[optimizer](model.parameters())
    gradients = []
    for step in range(STEPS):
        x, y = network.batch()
        if monitor and monitored["fisher"] == "empirical":
            monitor.targets = y
        with torch.autocast("cpu", precision) if precision else nullcontext():
            loss = loss_of(model(x), y)
        loss.backward()
        if monitor and between:
            between(monitor, x)
        gradients.append(copied([p.grad for p in model.parameters()]))
        if (step + 1) % accumulate == 0:
            update.step()
            update.zero_grad(set_to_none=set_to_none)
    if monitor:
        assert (monitor.step, len(monitor.latest) > 0) == (STEPS, True)
    return [gradients, content(model), chance()]


unobserved = cache(train)


def content(model: nn.Module) -> list[Any]:
    modes = [module.training for module in model.modules()]
    return [modes, copied(list(model.state_dict().values()) + [p.grad for p in model.parameters()])]


def copied(tensors: list[Tensor | None]) -> list[Tensor | None]:
    return [None if t is None else t.detach().clone() for t in tensors]


def chance() -> list[Any]:
    kind, key, *rest = np.random.get_state()  # noqa: NPY002
    return [torch.get_rng_state(), random.getstate(), [kind, key.tolist(), *rest]]


def identical(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(identical, one, other))
    return bool(one == other)


@per_network
def test_training_is_bit_identical_when_every_step_is_measured(network):
    assert identical(train(network, {"every": 1, **FISHERS["exact"]}), unobserved(network))


@pytest.mark.parametrize("fisher", FISHERS.values(), ids=FISHERS)
@pytest.mark.parametrize("name", ["conv-batchnorm-dropout-in-place", "sequence"])
def test_training_is_bit_identical_with_every_kind_of_fisher(name, fisher):
    network = NETWORKS[name]
    assert identical(train(network, {"every": 2, **fisher}), unobserved(network))


@per_network
def test_training_with_adam_is_bit_identical_when_some_steps_are_measured(network):
    observed = train(network, {"every": 7, **FISHERS["exact"]}, optimizer="adam")
    assert identical(observed, unobserved(network, optimizer="adam"))


@per_network
def test_natural_gradients_and_probes_between_the_steps_leave_training_bit_identical(network):
    def ask(monitor: Monitor, x: Tensor) -> None:
        monitor.natural_gradient()
        if monitor.step % 10 == 0:
            monitor.measure(x)

    observed = train(network, {"every": 7, **FISHERS["rademacher"]}, between=ask)
    assert identical(observed, unobserved(network))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradient_accumulation_is_bit_identical(set_to_none):
    network, how = NETWORKS["mlp"], {"accumulate": 3, "set_to_none": set_to_none}
    observed = train(network, {"every": 1, **FISHERS["exact"]}, **how)
    assert identical(observed, unobserved(network, **how))


@pytest.mark.parametrize("name", ["mlp", "conv-batchnorm-dropout-in-place"])
def test_training_under_autocast_is_bit_identical(name):
    network, how = NETWORKS[name], {"precision": torch.bfloat16}
    observed = train(network, {"every": 1, **FISHERS["exact"]}, **how)
    assert identical(observed, unobserved(network, **how))


def test_a_gradient_kept_within_the_network_is_bit_identical():
    class Keeping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Linear(4, 5), nn.Linear(5, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            self.hidden = self.first(x).relu()
            self.hidden.retain_grad()
            return self.head(self.hidden)

    network = Network(Keeping, (4,))
    alone, watched = network.seeded(), network.seeded()
    x, y = network.batch()
    Monitor(watched, every=1)
    for model in (alone, watched):
        loss_of(model(x), y).backward()
    assert identical(watched.hidden.grad, alone.hidden.grad)


def hooks(model: nn.Module) -> list[object]:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [hook for m in model.modules() for kind in kinds for hook in getattr(m, kind).values()]


def left_by_a_pass(model: nn.Module) -> list[object]:
    return [*function_modes(), *(hook for child in model.children() for hook in hooks(child))]


@per_network
def test_between_passes_only_the_model_itself_carries_hooks(network):
    model = network.seeded()
    Monitor(model, layers=is_layer, every=1)
    model(network.batch()[0])
    assert left_by_a_pass(model) == []


def test_detaching_takes_every_hook_off_and_may_be_repeated():
    model = mlp()
    monitor = Monitor(model, every=1)
    model(torch.randn(5, 4))
    monitor.detach()
    monitor.detach()
    assert hooks(model) == []


@pytest.mark.parametrize("error", [ValueError("no"), torch.OutOfMemoryError("no")])
def test_an_exception_in_forward_leaves_nothing_on_the_layers(error):
    model = Faulty()
    Monitor(model, every=1)
    model.error = error
    with pytest.raises(type(error)):
        model(torch.randn(5, 4))
    assert left_by_a_pass(model) == []


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_the_pass_after_an_exception_is_measured_and_leaves_nothing(error):
    model = Faulty()
    monitor = Monitor(model, every=1)
    model.error = error
    with pytest.raises(type(error)):
        model(torch.randn(5, 4))
    model.error = None
    model(torch.randn(5, 4))
    assert (monitor.latest["head"].step, left_by_a_pass(model)) == (1, [])


def test_detaching_after_an_interruption_leaves_nothing():
    model = Faulty()
    monitor = Monitor(model, every=1)
    model.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        model(torch.randn(5, 4))
    monitor.detach()
    assert hooks(model) + function_modes() == []


def test_an_error_of_the_monitor_itself_leaves_nothing():
    model = mlp()
    Monitor(model, every=1)
    with pytest.raises(NonFiniteError):
        model(torch.full((5, 4), torch.nan))
    assert left_by_a_pass(model) == []


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


QUIET = {
    "no-grad": (torch.no_grad, lambda monitor: monitor.model.train()),
    "inference": (torch.inference_mode, lambda monitor: monitor.model.train()),
    "eval": (nullcontext, lambda monitor: monitor.model.eval()),
    "paused": (nullcontext, lambda monitor: monitor.pause()),
    "not-its-turn": (nullcontext, lambda monitor: monitor.load_state_dict(far(monitor))),
}


def far(monitor: Monitor) -> Any:
    return {**monitor.state_dict(), "step": 1}


@pytest.mark.parametrize(("context", "begin"), QUIET.values(), ids=QUIET)
def test_a_thousand_passes_that_are_not_measured_hold_no_memory(context, begin):
    model, x = mlp(), torch.randn(5, 4)
    monitor = Monitor(model, every=10**6)
    begin(monitor)
    before = live_tensors()
    with context():
        for _ in range(1000):
            model(x)
    assert (live_tensors() - before, monitor.memory_usage()["total"]) == (0, 0)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_passes_without_a_graph_are_neither_counted_nor_measured(context):
    model = mlp()
    monitor = Monitor(model, every=1)
    with context():
        model(torch.randn(5, 4))
    assert (monitor.step, monitor.latest) == (0, {})


def test_eval_passes_are_neither_counted_nor_measured():
    model = mlp().eval()
    monitor = Monitor(model, every=1)
    model(torch.randn(5, 4)).sum().backward()
    assert (monitor.step, monitor.latest) == (0, {})


def test_a_measured_pass_keeps_no_graph_alive():
    class Marked(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, z: Tensor, mark: object) -> Tensor:
            ctx.mark = mark
            return z.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
            return g, None

    class Mark: ...

    class Marking(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return Marked.apply(super().forward(x), self.mark.pop())

    model = Marking(4, CLASSES)
    model.mark = [Mark()]
    node = weakref.ref(model.mark[0])
    monitor = Monitor(nn.Sequential(nn.Linear(4, 4), model), every=1)
    monitor.model(torch.randn(5, 4))
    gc.collect()
    assert (node(), len(monitor.latest)) == (None, 2)


def test_a_model_that_nobody_keeps_takes_its_monitor_with_it(tmp_path):
    model = mlp()
    monitor = weakref.ref(Monitor(model, every=1, record=tmp_path))
    model(torch.randn(5, 4))
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert (alive(), monitor()) == (None, None)


@pytest.mark.parametrize("whole", [False, True], ids=["a-block", "whole-model"])
def test_a_checkpointed_pass_is_counted_once(whole):
    model = mlp() if whole else Checkpointed()
    monitor = Monitor(model, layers=nn.Linear, every=1)
    x = torch.randn(8, 4)
    z = checkpoint(model, x, use_reentrant=False) if whole else model(x)
    z.sum().backward()
    assert monitor.step == 1


@pytest.mark.parametrize("whole", [False, True], ids=["a-block", "whole-model"])
def test_a_checkpointed_pass_gives_the_numbers_of_a_plain_one(whole):
    network = Network(partial(Checkpointed, again=not whole, noisy=False), (4,))
    plain = Network(partial(Checkpointed, again=False, noisy=False), (4,)).seeded()
    model, (x, _) = network.seeded(), network.batch()
    expected, found = Monitor(plain, every=1), Monitor(model, every=1)
    plain(x)
    checkpoint(model, x, use_reentrant=False) if whole else model(x)
    for name, m in expected.latest.items():
        assert_close(found.latest[name].k, m.k, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(
    torch.__version__ < "2.13", reason="a backward pass inside two checkpoints fails in torch"
)
def test_a_checkpoint_of_the_whole_model_leaves_its_gradients_bit_identical():
    network = Network(Checkpointed, (4,))
    alone, watched = network.seeded(), network.seeded()
    x, y = network.batch()
    Monitor(watched, layers=nn.Linear, every=1)
    for model in (alone, watched):
        torch.manual_seed(1)
        loss_of(checkpoint(model, x, use_reentrant=False), y).backward()
    assert identical(content(watched), content(alone))


def squared(model: nn.Module, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    return functional_call(model, parameters, (x,)).square().sum()


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


TRANSFORMED = {
    "grad": lambda m, x: grad(partial(squared, m))(parameters_of(m), x),
    "vmap": lambda m, x: {"": vmap(m)(x)},
    "vmap-of-grad": lambda m, x: vmap(grad(partial(squared, m)), (None, 0))(parameters_of(m), x),
    "jacrev": lambda m, x: jacrev(lambda p: functional_call(m, p, (x,)))(parameters_of(m)),
    "export": lambda m, x: {"": torch.export.export(m, (x,)).module()(x)},
    "compile": lambda m, x: {"": torch.compile(m, backend="eager")(x)},
    "trace": lambda m, x: {"": torch.jit.trace(m, (x,))(x)},
}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize("transformed", TRANSFORMED.values(), ids=TRANSFORMED)
def test_the_monitor_stands_aside_while_the_model_is_transformed(transformed):
    network = NETWORKS["mlp"]
    alone, watched = network.seeded(), network.seeded()
    monitor, (x, _) = Monitor(watched, every=1), network.batch()
    expected, found = transformed(alone, x), transformed(watched, x)
    assert (monitor.step, monitor.latest) == (0, {})
    assert identical(list(found.values()), list(expected.values()))


def test_the_monitor_stands_aside_while_a_cuda_graph_is_captured(monkeypatch):
    """Replays call no hooks, and while it is captured nothing can wait for a number."""
    model = mlp()
    monitor = Monitor(model, every=1)
    model(torch.randn(5, 4))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    model(torch.randn(5, 4))
    monkeypatch.undo()
    assert (monitor.step, monitor._instrument.newest.known) == (
        1,
        {},
    )  # counted once, not solved yet


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved_and_loaded,
}
per_copy = pytest.mark.parametrize("copy_of", COPIES.values(), ids=COPIES)


@per_copy
def test_a_copy_of_a_monitored_model_trains_unobserved(copy_of):
    model = mlp()
    monitor = Monitor(model, every=1)
    twin = copy_of(model)
    twin(torch.randn(5, 4)).sum().backward()
    assert (monitor.step, monitor.latest) == (0, {})
    assert all(parameter.grad is not None for parameter in twin.parameters())


@per_copy
def test_the_original_is_measured_on_after_it_was_copied(copy_of):
    model = mlp()
    monitor = Monitor(model, every=1)
    model(torch.randn(5, 4))
    copy_of(model)
    model(torch.randn(5, 4))
    assert monitor.latest["0"].step == 1


@per_copy
def test_a_copy_takes_a_monitor_of_its_own(copy_of):
    model = mlp()
    Monitor(model, every=1)
    twin = copy_of(model)
    monitor = Monitor(twin, every=1)
    twin(torch.randn(5, 4))
    assert (monitor.step, len(monitor.latest)) == (1, 3)


def test_a_saved_model_loads_where_the_package_is_not_installed(monkeypatch):
    model = mlp()
    Monitor(model, every=1)
    saved = pickle.dumps(model)
    for name in [name for name in sys.modules if name.split(".")[0] == "unitfisher"]:
        monkeypatch.setitem(sys.modules, name, None)  # importing it is an error
    twin = pickle.loads(saved)
    assert identical(content(twin), content(model))
    assert twin(torch.randn(5, 4)).requires_grad


def test_attaching_renames_nothing_in_the_state_of_the_model():
    alone, watched = mlp(), mlp()
    monitor = Monitor(watched, every=1)
    watched(torch.randn(5, 4))
    assert watched.state_dict().keys() == alone.state_dict().keys()
    assert str(monitor.model) == str(alone)


class Peculiar(nn.Module):
    """Writes to its buffers, draws random numbers and does things when its mode is switched."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, CLASSES)
        self.norm = nn.BatchNorm1d(CLASSES)
        self.drop = nn.Dropout(0.5)
        for name in ("in_place", "replaced"):
            self.register_buffer(name, torch.zeros(()))
        self.register_buffer("absent", None)

    def train(self, mode: bool = True) -> nn.Module:
        with torch.no_grad():
            self.head.weight += 1  # as an adapter that merges its weights for evaluation
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        self.in_place += torch.rand(())
        self.replaced = self.replaced + torch.rand(())
        self.absent = x
        return self.drop(self.norm(self.head(x)))


def a_probe(model: nn.Module) -> None:
    Monitor(model, layers=nn.Linear).measure(torch.randn(6, 4))


def a_failing_probe(model: nn.Module) -> None:
    monitor, x = Monitor(model, layers=nn.Linear), torch.full((6, 4), torch.nan)
    with pytest.raises(NonFiniteError):
        monitor.measure(x)


@pytest.mark.parametrize("probe", [a_probe, a_failing_probe])
def test_measuring_leaves_the_model_exactly_as_it_was(probe):
    model = Peculiar()
    model(torch.randn(6, 4)).sum().backward()
    model.norm.training = False  # frozen, in a model that trains
    before = content(model)
    probe(model)
    assert identical(content(model), before)


def test_measuring_draws_nothing_from_the_global_chance():
    model, x = Peculiar(), torch.randn(6, 4)
    monitor = Monitor(model, layers=nn.Linear, fisher="mc")
    before = chance()
    monitor.measure(x)
    assert identical(chance(), before)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_measuring_is_the_same_in_every_gradient_mode(context):
    model, x = mlp(), torch.randn(6, 4)
    monitor = Monitor(model)
    expected = monitor.measure(x)["0"].k
    with context():
        found = monitor.measure(x.clone())["0"].k
    assert identical(found, expected)


def test_measuring_between_forward_and_backward_leaves_the_gradients_bit_identical():
    network = NETWORKS["conv-batchnorm-dropout-in-place"]
    alone, watched = network.seeded(), network.seeded()
    monitor, (x, y) = Monitor(watched, layers=is_layer), network.batch()
    for model in (alone, watched):
        torch.manual_seed(1)
        loss = loss_of(model(x), y)
        if model is watched:
            monitor.measure(x)
        loss.backward()
    assert identical(content(watched), content(alone))


def test_a_loader_that_draws_leaves_no_trace():
    model, data = mlp(), TensorDataset(torch.randn(8, 4))
    state = torch.get_rng_state()
    with Monitor(model) as monitor:
        for loader in (DataLoader(data, 4), DataLoader(data, 4, shuffle=True)):
            monitor.measure(loader)
            assert torch.get_rng_state().equal(state)


def test_copies_of_a_model_that_holds_its_monitor_hold_none(tmp_path):
    model = nn.Sequential(nn.Linear(4, 3))
    model.monitor = Monitor(model, every=1, record=tmp_path / "run")
    assert copy.deepcopy(model).monitor is None
    assert pickle.loads(pickle.dumps(model)).monitor is None
    model(torch.randn(5, 4))
    assert len(model.monitor.to_pandas()) == 3


def test_a_lost_monitor_can_be_detached():
    model = mlp()
    Monitor(model)
    with pytest.raises(LayerSelectionError, match=r"unitfisher.detach_all\(model\)"):
        Monitor(model)
    detach_all(model)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    Monitor(model).detach()


def test_a_run_forgets_the_monitors_that_are_detached(tmp_path):
    with Run(tmp_path / "run") as run:
        monitor = Monitor(mlp(), record=run)
        history = weakref.ref(monitor._history)
        monitor.detach()
        del monitor
        gc.collect()
        assert history() is None
