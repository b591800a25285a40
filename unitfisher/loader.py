"""Reading of a loader's batches, once or several times; then with the same cases each time."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import isclose
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from unitfisher.cases import UnitCases
from unitfisher.chance import Chance
from unitfisher.memory import within
from unitfisher.observation import Observation
from unitfisher.observer import Observer, observe_now
from unitfisher.plan import MemoryBudgetError
from unitfisher.planner import Planner
from unitfisher.precision import exactly
from unitfisher.reach import NothingObservedError
from unitfisher.untouched import device_of

SAME = 1e-5  # relative tolerance of sums over a batch, which a device may add in any order
WAYS_OUT = "observe fewer units (units=...), leave layers out (layers=...), allow more \
(memory=...), or measure one batch from fewer cases (rows=...)"


class LoaderError(ValueError):
    """A loader that had to be read again gave other batches, or the model has changed."""


def is_loader(inputs: Any) -> bool:
    """Return whether this is an iterable of batches, not the input of one pass."""
    single = isinstance(inputs, Tensor | tuple | Mapping)
    return isinstance(inputs, Iterable) and not single


@dataclass
class Batches:
    """The observations of a model on the batches of a loader.

    Each reading draws the same random numbers, from the observer's generators and, in the loader,
    from torch's global one. In the end all generators are as a single reading leaves them.
    """

    model: nn.Module
    loader: Iterable[Any]
    observer: Observer

    def __post_init__(self) -> None:
        self._ours, self._global = self.observer.chance.state(), torch.get_rng_state()
        self._seen: list[dict[str, Checksum]] = []
        self._nothing = NothingObservedError()  # of the newest batch in which nothing was observed
        self.samples = 0  # number of them in the first reading

    def once(self) -> Iterator[dict[str, Observation]]:
        """Read for the first time; yield the observations of each batch, by layer.

        Raises:
            ValueError: There is no batch, or nothing to observe in any.
            MemoryBudgetError: The layers take too much memory, or need an iterator read again.
        """
        batches, planner, shown = iter(self.loader), self.planner, False
        for batch in batches:
            observations = self._observed(batch, self.observer, graded=True)
            one = next(iter(observations.values()), None)
            self.samples += self._nothing.samples if one is None else one.cases.samples
            shown = shown or one is not None
            if planner.budget.passing and batches is self.loader:
                raise MemoryBudgetError(_used_up(planner.budget.passing))
            passing = planner.budget.passing & observations.keys()
            self._seen.append({name: Checksum.of(observations[name].cases) for name in passing})
            yield observations
            observations.clear()  # before those of the next batch are made
        if not self._seen:
            raise ValueError("the loader yields no batch (an iterator that was used up?)")
        if not shown:
            raise self._nothing

    def again(self, layers: Collection[str]) -> Iterator[dict[str, UnitCases]]:
        """Read again; yield the cases of each batch, for layers solved by passes over the loader.

        Raises:
            LoaderError: The cases are not those of the first reading.
        """
        chance, read = Chance(self.observer.chance.seed), 0
        chance.load(self._ours)
        watched = {name: self.observer.layers[name] for name in layers}
        observer = replace(self.observer, layers=watched, chance=chance, planner=None)
        graded = observer.estimator.fisher == "empirical"
        with torch.random.fork_rng([]):
            torch.set_rng_state(self._global)
            for read, batch in enumerate(self.loader, 1):
                observations = self._observed(batch, observer, graded)
                cases = {name: observation.cases for name, observation in observations.items()}
                observations.clear()
                seen = self._seen[read - 1] if read <= len(self._seen) else {}
                if any(not Checksum.of(c).like(seen.get(name)) for name, c in cases.items()):
                    raise LoaderError(_changed(f"a batch {read}", layers))
                yield cases
                cases.clear()  # before those of the next batch are made
        if read < len(self._seen):
            raise LoaderError(_changed(f"{read} batches", layers))

    @contextmanager
    def as_measured(self) -> Iterator[None]:
        """Compute in the same precision as in the first reading, within the same memory."""
        with exactly(device_of(self.model)), within(self.planner.workspace):
            yield

    @property
    def planner(self) -> Planner:
        assert self.observer.planner is not None
        return self.observer.planner

    def _observed(self, batch: Any, observer: Observer, graded: bool) -> dict[str, Observation]:
        batch = tree_map_only(Tensor, lambda t: t.to(device_of(self.model)), batch)
        inputs, targets = _inputs_and_targets(batch)
        try:
            return observe_now(self.model, inputs, observer, targets if graded else None)
        except NothingObservedError as nothing:
            self._nothing = nothing
            return {}


def _inputs_and_targets(batch: Any) -> tuple[Any, Tensor | None]:
    """Split a batch: a pair is (inputs, targets), any other list or tuple is arguments alone."""
    if not isinstance(batch, list | tuple):
        return batch, None
    if len(batch) == 2:
        return batch[0], batch[1]
    return tuple(batch), None


class Checksum(NamedTuple):
    """Sums over a layer's cases, which other inputs, weights or random numbers would change."""

    squares: float
    weight: float

    @classmethod
    def of(cls, cases: UnitCases) -> "Checksum":
        squares = torch.linalg.vector_norm(cases.a, dtype=torch.float64) ** 2
        return cls(float(squares), float(cases.D.sum()))

    def like(self, other: "Checksum | None") -> bool:
        pairs = zip(self, other or (), strict=False)
        return other is not None and all(isclose(*pair, rel_tol=SAME) for pair in pairs)


def _changed(what: str, layers: Collection[str]) -> str:
    return (
        f"the loader gave {what} unlike in its first reading, or the model has changed: the sums "
        f"of layers {named(layers)} do not fit into memory, so their systems are solved by reading "
        f"the loader again and again. Give one that yields the same batches in the same order (a "
        f"DataLoader with shuffle=False, a list), {WAYS_OUT}"
    )


def _used_up(layers: Collection[str]) -> str:
    return (
        f"the sums of layers {named(layers)} do not fit into memory, and an iterator can be read "
        f"only once: give a loader that can be read again (a DataLoader with shuffle=False, a "
        f"list), {WAYS_OUT}"
    )


def named(layers: Iterable[str]) -> str:
    return ", ".join(map(repr, sorted(layers)))
