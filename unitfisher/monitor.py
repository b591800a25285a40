"""The Monitor: attached to a model in one line, it measures training steps.

Two hooks stay on the model. When a step is due, the layers are hooked for that one forward pass;
when it ends, errors are sent back through the graph that it has built. Labels, loss, parameters,
gradients and the global random state are not touched.
"""

import weakref
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from torch import Tensor, nn

from unitfisher.attachment import (
    name_tied,
    name_uncovered,
    require_told_apart,
    require_unobserved,
    sample_units,
    unwrapped,
)
from unitfisher.calls import Seen
from unitfisher.chance import Chance
from unitfisher.choices import require_choice
from unitfisher.forward import Pick
from unitfisher.history import (
    ACTIVATIONS,
    PLAN,
    UNITS,
    History,
    HistoryState,
    columns_of_activations,
)
from unitfisher.instrument import Instrument
from unitfisher.layers import Layers, select
from unitfisher.likelihoods import Likelihood
from unitfisher.live import STANDING, Live, Wanted
from unitfisher.loader import is_loader
from unitfisher.memory import retain_freed
from unitfisher.observer import Observer
from unitfisher.options import Options
from unitfisher.plan import Plan
from unitfisher.planner import Planner
from unitfisher.provenance import differences, plain
from unitfisher.record import Run
from unitfisher.schedule import Schedule, due
from unitfisher.statistics import UnitStatistics, bytes_of
from unitfisher.steps import LayerStep
from unitfisher.window import State

if TYPE_CHECKING:
    import pandas as pd


class MonitorState(TypedDict):
    """What a Monitor needs to go on after a restart."""

    step: int
    identity: dict[str, Any]  # layers, and options that are not columns of a table
    generators: dict[str, Tensor]
    units: dict[str, Tensor]
    history: HistoryState
    window: State


class Monitor:
    """Measures the Fisher quantities of every unit of a model while it trains.

    Every n-th training forward pass is measured as it happens, through its own graph. Its results
    are solved for when `latest` or `natural_gradient` is used, at the latest when the next training
    pass begins. Passes in eval mode, under ``no_grad`` or inside ``torch.func`` transforms are
    neither measured nor counted. The model's parameters, gradients and the global random state stay
    bit-identical to an unobserved run.

    Args:
        model: Any module; in DataParallel and DistributedDataParallel the module they wrap.
        layers: Pattern(s) on ``named_modules()`` names, module type(s) or a predicate
            ``(name, module) -> bool``; None: every trainable layer of a supported kind. Those
            of an ``nn.MultiheadAttention`` are ``name.in_proj`` and ``name.out_proj``.
        likelihood: "categorical", "bernoulli", "gaussian" or a Likelihood object, for example
            ``Gaussian(variance=0.5)``.
        fisher: "exact", "mc" (drawn labels), "rademacher" (random signs), "top-rademacher" (the
            most probable class exactly, random signs over the rest) or "empirical".
        samples: Number of random columns, which are averaged; with two or more, c, E_q(a), s and k
            have standard errors. "top-rademacher" has one more, which is exact.
        sharing: "expand" (every position is a case), "joint" (the true Fisher block) or "reduce"
            (activations are averaged and errors summed over positions).
        damping: Relative, on the weight block: λ = damping · trace(A) / d for each unit.
        every: Measure every n-th training pass, the first included, or a predicate of the step.
            None: every 50th.
        activations: In every n-th training pass, record mean and variance of each unit's output in
            the table "activations", without a backward pass. None: in measurements only.
        overhead: Instead of ``every``: measure as often as this share of the training time
            allows, 0.05 for 5 %.
        window: Pool the cases of this many newest measured training batches.
        rows: Solve from this many cases, drawn at random (with "expand" positions, else samples):
            F stays unbiased but gets noisier, as n_eff shows. None: from all. A loader is always
            measured whole.
        solver: "direct" (Cholesky) or "iterative" (conjugate gradients, where there are more cases
            than inputs); "auto": what should be faster, iterative above all for wide convolutions.
            Over a loader all use Cholesky, from sums; where the sums do not fit in memory, "direct"
            raises, and the others iterate by reading the loader again and again.
        units: Observe a fixed random sample of this many units per layer; None: all.
        output: Picks the logits from what forward returns: index, key, attribute or callable. They
            are (n, C), or (n, T, C) with a label at each of T positions.
        on_nonfinite: "raise", or "record": keep a pass with NaN or infinity, marked as not finite.
        memory: The most that a measurement may hold at one time, in bytes or as text ("2 GiB"),
            not counting the measured pass itself nor rows recorded in memory. None: no limit; over
            a loader 4 GiB. See ``plan``.
        record: Folder or Run that receives the recorded rows; None: they are kept in memory.
        seed: Seed of drawn labels, signs, cases and units.

    Attributes:
        targets: Observed labels of the next training pass: set before the pass, which clears them.
            ``fisher="empirical"`` needs them; with any other, they give the pass its gradient, as
            in `measure`.
        step: Number of training passes so far; may be set.
        options: The options given.

    Raises:
        LayerSelectionError: There is no layer to observe, or one is observed already.
        ValueError: An unknown name or impossible number for an option.
        MemoryBudgetError: The results alone would take more than ``memory``. A training pass or
            `measure` raises it too, before allocating anything, if the measurement would.

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(3, 4), nn.ELU(), nn.Linear(4, 2))
    >>> monitor = Monitor(model, every=1)
    >>> _ = model(torch.randn(10, 3))
    >>> tuple(monitor.latest["0"].k.shape)
    (4,)
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Layers = None,
        likelihood: str | Likelihood = "categorical",
        *,
        fisher: str = "exact",
        samples: int = 1,
        sharing: str = "expand",
        damping: float = 1e-3,
        every: Schedule | None = None,
        overhead: float | None = None,
        activations: int | None = None,
        window: int = 1,
        rows: int | None = None,
        solver: str = "auto",
        units: int | None = None,
        output: Pick = None,
        on_nonfinite: str = "raise",
        memory: int | str | None = None,
        record: str | Path | Run | None = None,
        seed: int = 0,
    ) -> None:
        self.options = Options(
            likelihood=likelihood,
            fisher=fisher,
            samples=samples,
            sharing=sharing,
            damping=damping,
            every=every,
            overhead=overhead,
            activations=activations,
            window=window,
            rows=rows,
            solver=solver,
            units=units,
            output=output,
            on_nonfinite=on_nonfinite,
            memory=memory,
            seed=seed,
        )
        self.model, self.step = unwrapped(model), 0
        self.targets: Tensor | None = None
        estimator, planner = self.options.estimator(), Planner(self.options.budget())
        chosen = select(self.model, layers)
        require_unobserved(chosen)
        require_told_apart(chosen, record)
        if layers is None:
            name_uncovered(self.model, chosen)
        name_tied(self.model, chosen)
        sampled = sample_units(chosen, units, seed)
        planner.attached(chosen, sampled)
        config = {"layers": list(chosen), **self.options.recorded()}
        self._history = History.opened(record, config)
        observer = Observer(chosen, estimator, sampled, Chance(seed), output, planner)
        self._instrument = Instrument(self.model, self.options, observer, self._history)
        self._schedule, self._paused = self.options.schedule(), False
        self._live = Live(
            self.model, chosen, self._begin, self._end, self.detach, self._history.run
        )
        retain_freed()
        self._close = weakref.finalize(self, self._history.close)
        self._close.atexit = False  # at exit the run's own close() asks for pending rows

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles of a model that holds its Monitor have None in its place."""
        return type(None), ()

    def __repr__(self) -> str:
        model, layers = type(self.model).__name__, ", ".join(self.layers)
        return f"<Monitor of {model} after {self.step} training passes: {layers}>"

    @property
    def layers(self) -> Mapping[str, nn.Module]:
        """The observed layers by name."""
        return self._instrument.observer.layers

    @property
    def latest(self) -> dict[str, UnitStatistics]:
        """The newest measurement by layer; empty before the first one.

        Raises:
            SingularFisherError: A unit's Fisher has no inverse at this damping.
        """
        newest = self._instrument.newest
        return {} if newest is None else newest.statistics()

    @property
    def plan(self) -> Plan:
        """The newest measurement's plan: the route of each layer, and the memory it takes.

        Before the first measurement, what is known without shapes. ``print(monitor.plan)`` shows a
        table.
        """
        return self._instrument.plan

    def measure(self, inputs: Any, targets: Tensor | None = None) -> dict[str, UnitStatistics]:
        """Measure now on this input, in eval mode.

        The model's modes, buffers and gradients and torch's random state are left as they were;
        what a forward pass keeps in plain attributes is not.

        Args:
            inputs: The model's input, a tuple of its arguments or a mapping of keyword arguments;
                or a loader: any other iterable of batches, each an input or a pair of input and
                targets. Its batches count as one, in memory of u·d² numbers a layer. Where that
                does not fit, each iteration of conjugate gradients reads the loader again: it must
                yield the same batches each time.
            targets: Observed labels; with them the gradient of the mean log-likelihood is taken
                too, and its cosine and bias-shift shares are filled in.

        Returns:
            Statistics by layer, also in ``latest`` and in the record.

        Raises:
            LoaderError: A loader that was read again gave other batches.
            MemoryBudgetError: The measurement would take more than ``memory``.
            LayerSelectionError: No observed layer was called, or one cannot be observed.
            NonFiniteError: The pass holds NaN or infinity, unless ``on_nonfinite="record"``.
            OutputError: The output, or the targets, do not fit the likelihood.
            SingularFisherError: A unit's Fisher has no inverse: damp it.
            ValueError: The Monitor has a record and is detached; there are targets beside a loader;
                or the loader yields no batch.
        """
        if self._history.run is not None and not self._close.alive:
            raise ValueError(
                "this Monitor is detached and its record complete: measure before detach(), or "
                "attach another one"
            )
        if not is_loader(inputs):
            self._instrument.measure_input(inputs, targets, self.step)
        elif targets is None:
            self._instrument.measure_loader(inputs, self.step)
        else:
            raise ValueError("with a loader targets come in its batches: (inputs, targets)")
        return self.latest

    def natural_gradient(self) -> dict[str, LayerStep]:
        """Return the unit natural gradient of the current ``.grad``, by the newest measured Fisher.

        Gradients count as averaged over samples; if the loss also averages over T positions,
        multiply the result by T. Where a layer's gradient is complete, its cosine and bias-shift
        shares are added to the newest measurement.

        Returns:
            ``{layer: (dw, dw0)}`` in the shapes of weight and bias; with ``units=`` one row for
            each observed unit.

        Raises:
            ValueError: Nothing was measured yet, or no observed layer has a gradient.
            LoaderError: The loader that has to be read again has changed, or the model has.
            SingularFisherError: A unit's Fisher has no inverse: damp it.
        """
        newest = self._instrument.newest
        if newest is None:
            raise ValueError(
                "nothing was measured yet: run a training pass or monitor.measure(x) (a model that "
                "was compiled after attaching calls no hooks: measure(x) is the way there)"
            )
        return newest.natural_gradients()

    def to_pandas(self, table: str = "units") -> "pd.DataFrame":
        """Return everything measured, one row per step, layer and unit.

        Args:
            table: "units"; "activations" for mean and variance of outputs, at the steps chosen by
                ``activations=``; or "plan" for each layer's route and memory, when they changed.

        Raises:
            ValueError: There is no such table.
        """
        require_choice("table", table, (UNITS, ACTIVATIONS, PLAN))
        return self._history.frame(table)

    def flush(self) -> None:
        """Write everything measured so far to the record."""
        self._history.flush()

    def pause(self) -> None:
        """Measure no training pass until `resume`; passes still count as steps."""
        self._paused = True

    def resume(self) -> None:
        """Go on measuring."""
        self._paused = False

    def detach(self) -> None:
        """Take the hooks off the model and close the record; safe to call twice."""
        self._live.remove()
        self._close()

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def state_dict(self) -> MonitorState:
        """Return what is needed to go on after a restart: steps, random state, units, rows.

        Rows that are in a record stay there; their number is in the state.
        """
        history = self._history.state()
        instrument = self._instrument
        return {
            "step": self.step,
            "identity": self._identity(),
            "generators": instrument.observer.chance.state(),
            "units": dict(instrument.observer.units),
            "history": history,
            "window": instrument.window.state(),
        }

    def load_state_dict(self, state: MonitorState) -> None:
        """Go on from `state_dict`.

        If this Monitor resumes the record of the one that gave the state (``record=Run(folder,
        config, resume=True)``), rows written there after the state are dropped, so that none is
        recorded twice. Any other record keeps all its rows.

        Raises:
            ValueError: The state is that of a Monitor with other layers or options, or of none.
        """
        if missing := MonitorState.__required_keys__ - set(state):
            raise ValueError(f"this is no state of a Monitor: {', '.join(sorted(missing))} missing")
        if changes := differences(state["identity"], self._identity()):
            raise ValueError(
                f"the state is of a Monitor with other options: {'; '.join(changes)}; attach with "
                f"the same"
            )
        instrument = self._instrument
        self._history.load(state["history"])
        self.step, instrument.newest = state["step"], None
        instrument.observer.chance.load(state["generators"])
        instrument.observer = replace(instrument.observer, units=dict(state["units"]))
        instrument.window.load(state["window"])

    def _identity(self) -> dict[str, Any]:
        identity: dict[str, Any] = plain({"layers": list(self.layers), **self.options.identity()})
        return identity

    def memory_usage(self) -> dict[str, int]:
        """Return the bytes held between passes: "latest", "window", "history" (rows), "total"."""
        latest = self._instrument.bytes_of_newest()
        window = bytes_of(self._instrument.window.tensors)
        history = bytes_of(self._history.tensors)
        total = latest + window + history
        return {"latest": latest, "window": window, "history": history, "total": total}

    def _begin(self) -> Wanted | None:
        """Count a training pass; return what to measure in it, None for nothing."""
        self._history.commit()
        step, self.step = self.step, self.step + 1
        targets, self.targets = self.targets, None
        if self._paused:
            return None
        errors, each = due(self._schedule, step), self.options.activations
        averages = each is not None and step % each == 0
        return Wanted(step, errors, averages, targets) if errors or averages else None

    def _end(self, seen: Seen, result: Any, wanted: Wanted) -> None:
        """Record and measure a training pass, before the user's backward pass."""
        if wanted.averages and seen.calls:
            self._history.append(ACTIVATIONS, columns_of_activations(seen.averages(), wanted.step))
        if wanted.errors:
            self._instrument.measure_pass(seen, result, wanted.targets, wanted.step)


def detach_all(model: nn.Module) -> None:
    """Detach every Monitor of a model and its submodules, lost ones too.

    A Monitor stays attached when the last variable that held it is gone.
    """
    modules = set(unwrapped(model).modules())
    for live in [live for live in STANDING if live.model in modules]:
        live.detach()
