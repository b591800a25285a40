"""The Monitor: one line attached to a model, and its training steps are measured.

Two hooks stand on the model itself. When a step is due, the layers are watched for that one
forward pass; when the pass ends, the errors are sent back through the graph it has just built.
Labels, loss, parameters, gradients and the global random state are not touched.
"""

import warnings
import weakref
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from torch import Tensor, nn

from unitfisher.attachment import (
    UncoveredLayersWarning,
    name_uncovered,
    require_counts,
    require_numbers,
    require_unobserved,
    sample_units,
    unwrapped,
)
from unitfisher.calls import Seen
from unitfisher.errors import Estimator, require_choice
from unitfisher.history import ACTIVATIONS, PLAN, UNITS, History, columns_of_activations
from unitfisher.layers import Layers, select
from unitfisher.likelihoods import Likelihood, likelihood_of
from unitfisher.live import Live, Wanted
from unitfisher.loader import Batches, is_loader
from unitfisher.measurement import Measurement
from unitfisher.memory import DEFAULT, bytes_in
from unitfisher.observer import Observation, Observer, observe_now, require_finite
from unitfisher.passes import Chance, Pick, device_of, exactly, kept
from unitfisher.plan import Plan, Planner
from unitfisher.record import Run
from unitfisher.schedule import Overhead, Schedule, due
from unitfisher.statistics import UnitStatistics, bytes_of
from unitfisher.steps import LayerStep
from unitfisher.streaming import Streamed, observe_all
from unitfisher.window import State, Window

if TYPE_CHECKING:
    import pandas as pd


class MonitorState(TypedDict):
    """What a Monitor needs to go on after a restart."""

    step: int
    layers: list[str]
    generators: dict[str, Tensor]
    units: dict[str, Tensor]
    history: dict[str, list[dict[str, Any]]]
    written: dict[str, int]
    plan: dict[str, Any]
    window: State


class Monitor:
    """Measures every unit's Fisher quantities of a model in live training.

    Each n-th training forward pass is measured while it happens, from its own graph, and solved
    when `latest` or `natural_gradient` ask for it; or else when the next training pass begins.
    Passes in eval mode, under ``no_grad`` or inside ``torch.func`` transforms are neither measured
    nor counted. The model's parameters, gradients and the global random state stay bit-identical to
    an unobserved run.

    Args:
        model: Any module. A wrapper of one module (DataParallel, DDP) is seen through.
        layers: Pattern(s) on ``named_modules()`` names, module type(s) or a predicate
            ``(name, module) -> bool``; None: every trainable layer of a supported kind.
        likelihood: "categorical", "bernoulli", "gaussian" or a Likelihood object, for example
            ``Gaussian(variance=0.5)``.
        fisher: "exact", "mc" (drawn labels), "rademacher" (random signs), "top-rademacher" (the
            most probable class exactly, random signs over the rest) or "empirical".
        samples: Random columns; more do not change the scale, and from two on c, E_q(a), s and k
            have standard errors. "top-rademacher" has one more, which is exact.
        sharing: "expand" (every position a case), "joint" (the true Fisher block) or "reduce".
        damping: Relative, on the weight block: λ = damping · trace(A) / d for each unit.
        every: Measure every n-th training pass, the first included, or a predicate of the step.
        activations: Record mean and variance of every unit's output each n-th training pass, in
            the table "activations": no error is sent back for that. None: in measurements only.
        overhead: Instead of ``every``: measure as often as this share of the training time
            allows, 0.05 for 5 %.
        window: Pool the cases of the newest so many measured training batches.
        rows: Solve from this many cases, drawn at random (samples, or positions where they share
            weights): F stays unbiased and gets noisier, n_eff says how much. None: all.
        solver: "direct" (Cholesky) or "iterative" (conjugate gradients, where cases are more than
            inputs); "auto": iterative for many cases of many inputs, wide convolutions above all.
            Over a loader both are Cholesky, but "direct" refuses layers whose sums do not fit.
        units: Observe a fixed random sample of this many units per layer; None: all.
        output: Picks the logits from what forward returns: index, key, attribute or callable.
        on_nonfinite: "raise", or "record": a pass with NaN or infinity is kept as such.
        memory: Bytes, or text as "2 GiB", that a measurement may hold at one time, beside the pass
            that it measures; what is recorded without a ``record`` is not counted. None: what it
            takes; over a loader at most 4 GiB. See ``plan``.
        record: Folder or Run that receives what is measured; None: kept in memory.
        seed: Of drawn labels, signs and units.

    Raises:
        LayerSelectionError: No layer to observe, or they are observed already.
        ValueError: An unknown name or impossible number for an option.
        MemoryBudgetError: The results alone would take more than ``memory``; in a pass or in
            `measure`, before anything is allocated: the measurement would.

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(3, 4), nn.ELU(), nn.Linear(4, 2))
    >>> monitor = Monitor(model, every=1)
    >>> _ = model(torch.randn(10, 3))
    >>> tuple(monitor.latest["0"].k.shape)
    (4,)
    """

    targets: Tensor | None  # observed labels of the next training pass, then forgotten
    step: int  # training passes so far

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
        every: Schedule = 50,
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
        require_choice("on_nonfinite", on_nonfinite, ("raise", "record"))
        require_numbers(damping=damping, every=every, overhead=overhead)
        require_choice("solver", solver, ("auto", "direct", "iterative"))
        require_counts(window=window, rows=rows, units=units, activations=activations)
        budget = DEFAULT if memory is None else bytes_in(memory)
        every = every if overhead is None else Overhead(overhead)
        self.model = unwrapped(model)
        self.damping, self.every, self.on_nonfinite = damping, every, on_nonfinite
        self.activations = activations
        estimator = Estimator(likelihood_of(likelihood), fisher, samples, sharing)
        chosen = select(self.model, layers)
        require_unobserved(chosen)
        if layers is None:
            name_uncovered(self.model, chosen)
        planner = Planner(budget, rows, window, solver, float(damping), strict=memory is not None)
        self._observer = Observer(
            chosen, estimator, sample_units(chosen, units, seed), Chance(seed), output, planner
        )
        planner.attached(chosen, self._observer.units)
        self.targets, self.step = None, 0
        self._newest: Measurement | None = None
        config = {
            "layers": list(chosen),
            "units": units,
            "every": every,
            "window": window,
            "rows": rows,
            "estimator": estimator,
            "damping": damping,
            "memory": budget,
            "seed": seed,
        }
        self._history = History.opened(record, config)
        self._window = Window(window)
        self._paused = False
        self._uncalled: set[str] = set()
        self._live = Live(self.model, chosen, self._begin, self._end)
        self._close = weakref.finalize(self, self._history.close)
        self._close.atexit = False  # a run that closes at exit asks for what is held

    def __repr__(self) -> str:
        of, layers = type(self.model).__name__, ", ".join(self.layers)
        return f"<Monitor of {of} after {self.step} training passes: {layers}>"

    @property
    def layers(self) -> Mapping[str, nn.Module]:
        """The observed layers by name."""
        return self._observer.layers

    @property
    def latest(self) -> dict[str, UnitStatistics]:
        """The newest measurement by layer; empty before the first one.

        Raises:
            SingularFisherError: A unit's Fisher has no inverse at this damping.
        """
        return {} if self._newest is None else self._newest.statistics()

    @property
    def plan(self) -> Plan:
        """How the newest measurement was made, and what it held; the attributes' bytes add up.

        Before the first one, what is known of it. ``print(monitor.plan)`` shows a table.
        """
        assert self._planner.newest is not None
        return self._planner.newest

    @property
    def _planner(self) -> Planner:
        assert self._observer.planner is not None
        return self._observer.planner

    def measure(self, inputs: Any, targets: Tensor | None = None) -> dict[str, UnitStatistics]:
        """Measure now on this input, in eval mode, and leave the model exactly as it was.

        Args:
            inputs: The model's input, a tuple of its arguments or a mapping of keyword arguments;
                or a loader, any other iterable of batches: each an input, or a pair of input and
                targets. Its batches count as one, in memory of u·d² numbers a layer. Where these
                do not fit the loader is read again and again, for conjugate gradients: it must
                yield the same batches each time.
            targets: Observed labels; with them the gradient of the mean log-likelihood is taken
                too, and its cosine and bias-shift shares are filled in.

        Returns:
            Statistics by layer, also in ``latest`` and in the record.

        Raises:
            LoaderError: A loader that was read again gave other batches.
        """
        self._make_room()
        with exactly(device_of(self.model)):
            if not is_loader(inputs):
                observations = observe_now(self.model, inputs, self._observer, targets)
                self._keep(self._prepared(observations), self.step, "measure")
                return self.latest
            if targets is not None:
                raise ValueError("with a loader targets come in its batches: (inputs, targets)")
            planner = self._planner.over_batches(self.memory_usage()["latest"])
            batches = Batches(self.model, inputs, replace(self._observer, planner=planner))
            streamed = observe_all(batches, self.damping)
            self._planner.newest = planner.newest
            self._keep(streamed, self.step, "measure")
            return self.latest

    def natural_gradient(self) -> dict[str, LayerStep]:
        """Return the unit natural gradient of the current ``.grad``, by the newest measured Fisher.

        Gradients are taken as averaged over samples; where a loss also averages over T positions,
        multiply by T. The angles and shares of a complete gradient join the newest measurement.

        Returns:
            ``{layer: (dw, dw0)}`` in the shapes of weight and bias (rows of the observed units).

        Raises:
            ValueError: Nothing was measured yet, or no observed layer has a gradient.
        """
        if self._newest is None:
            raise ValueError(
                "nothing was measured yet: run a training pass or monitor.measure(x) (a model that "
                "was compiled after attaching calls no hooks: measure(x) is the way there)"
            )
        return self._newest.natural_gradients()

    def to_pandas(self, table: str = "units") -> "pd.DataFrame":
        """Return everything measured, one row per step, layer and unit.

        Args:
            table: "units", "activations" for the outputs' mean and variance of more steps, or
                "plan": how each layer was measured, in how much memory, whenever that changed.
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
        written = self._history.written()
        return {
            "step": self.step,
            "layers": list(self.layers),
            "generators": self._observer.chance.state(),
            "units": dict(self._observer.units),
            "history": {table: list(rows) for table, rows in self._history.rows.items()},
            "written": written,
            "plan": self._history.plan,
            "window": self._window.state(),
        }

    def load_state_dict(self, state: MonitorState) -> None:
        """Go on from `state_dict`.

        A record that is resumed (``record=Run(folder, config, resume=True)``) loses the rows that
        were written after that state, so that none stands there twice.

        Raises:
            ValueError: The state observes other layers' units than this Monitor.
        """
        mine = list(self.layers), list(self._observer.units)
        if (state["layers"], list(state["units"])) != mine:
            raise ValueError(
                f"the state is of layers {state['layers']} and samples units of layers "
                f"{list(state['units'])}, this Monitor's {mine[0]} and {mine[1]}: attach with the "
                f"same layers= and units="
            )
        self.step = state["step"]
        self._observer.chance.load(state["generators"])
        self._observer = replace(self._observer, units=dict(state["units"]))
        self._window.load(state["window"])
        self._history.go_back(state["history"], state["written"], state["plan"])

    def memory_usage(self) -> dict[str, int]:
        """Count the bytes held between passes: newest measurement, window and rows in memory."""
        latest = 0 if self._newest is None else bytes_of(self._newest.tensors)
        history = bytes_of(self._history.tensors)
        window = bytes_of(self._window.tensors)
        total = latest + window + history
        return {"latest": latest, "window": window, "history": history, "total": total}

    def _begin(self) -> Wanted | None:
        """Count a training pass; say what is wanted of it."""
        self._history.commit()
        step, self.step = self.step, self.step + 1
        targets, self.targets = self.targets, None
        if self._paused:
            return None
        errors = due(self.every, step)
        averages = self.activations is not None and step % self.activations == 0
        if not (errors or averages):
            return None
        return Wanted(step, errors, averages, targets)

    def _end(self, seen: Seen, result: Any, wanted: Wanted) -> None:
        """Measure a training pass, before its graph is used."""
        if wanted.averages and seen.calls:
            self._history.append(ACTIVATIONS, columns_of_activations(seen.averages(), wanted.step))
        if not wanted.errors:
            return
        with exactly(device_of(self.model)):
            self._make_room()
            try:
                with kept(self.model):
                    observations = self._observer.observe(result, seen, wanted.targets)
            finally:
                seen.forget_gradients()
            pooled = self._window.pooled(observations)
            self._keep(self._prepared(pooled), wanted.step, "train")

    def _prepared(self, observations: dict[str, Observation]) -> dict[str, Observation]:
        """Draw the rows asked for, and solve their systems as planned."""
        prepared = {}
        for name, of in observations.items():
            cases = of.cases
            if self._planner.rows is not None:
                cases = cases.drawn(self._planner.rows, self._observer.chance.on(cases.a.device))
            solver = self._planner.solver_of(name)
            prepared[name] = replace(of, cases=replace(cases, solver=solver))
        return prepared

    def _make_room(self) -> None:
        """What the newest measurement has solved it can solve again."""
        self._history.commit()
        if self._newest is not None:
            self._newest.forget_solved()

    def _keep(
        self,
        observations: Mapping[str, Observation] | Mapping[str, Streamed],
        step: int,
        phase: str,
    ) -> None:
        if self.on_nonfinite == "raise":
            require_finite(of.fault for of in observations.values())
        self._name_uncalled(observations)
        measurement = Measurement(
            observations,
            self.layers,
            self._observer.units,
            step,
            phase,
            self.damping,
            self.plan,
            device_of(self.model),
        )
        if phase == "measure":
            measurement.statistics()  # in training a gradient may come
        self._newest = measurement
        self._history.hold(measurement)

    def _name_uncalled(self, observations: Collection[str]) -> None:
        missing = self.layers.keys() - set(observations) - self._uncalled
        if missing:
            self._uncalled |= missing
            warnings.warn(
                f"layers {', '.join(sorted(map(repr, missing)))} were not called in a measured "
                f"pass: nothing is recorded of them there",
                UncoveredLayersWarning,
                stacklevel=2,
            )
