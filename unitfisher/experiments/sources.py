"""Where an ensemble's batches come from: tensors on the device, or photographs read meanwhile."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from unitfisher.experiments.data import Dataset, held_out, probe
from unitfisher.experiments.images import PAD, Batch, Crops, augmented, draw_crops
from unitfisher.experiments.orders import Orders
from unitfisher.experiments.photographs import PhotographSets
from unitfisher.experiments.presets import Member, Preset
from unitfisher.experiments.ranks import ALONE, Ranks
from unitfisher.experiments.seeds import CROPS, mixed
from unitfisher.experiments.streams import Stream

EVALUATED = 2_000_000  # input numbers in one batch of an evaluation
PROBE_SEED = 1  # the same probe set in every run


@runtime_checkable
class Source(Protocol):
    """Training batches for each member, and fixed sets to evaluate on."""

    cases: int  # in the training set
    classes: int
    shape: torch.Size  # of one case's input
    device: torch.device

    def __len__(self) -> int:
        """Count the batches of an epoch."""
        ...

    def next(self) -> Batch:
        """Return the next batch of every member, (m, n, ...)."""
        ...

    def probe(self, cases: int) -> Batch:
        """Return the same training cases every time, without augmentation or random crops."""
        ...

    def test(self, cases: int | None = None) -> Iterator[Batch]:
        """Run once through the first test cases; None: all."""
        ...

    def state(self) -> dict[str, Any]: ...

    def load(self, state: Mapping[str, Any]) -> None: ...


def source_of(
    preset: Preset,
    data: Dataset | PhotographSets,
    members: Sequence[Member],
    generators: Sequence[torch.Generator],
    workers: int,
    ranks: Ranks,
) -> Source:
    """Open the members' batches; orders are drawn by their generators.

    Raises:
        ValueError: The members have several seeds, and the data are photographs; or the last batch
            is too small to be shared by the processes, or to be normalised; or the preset's
            validation leaves nothing to train on.
    """
    size = preset.batch_size
    if preset.validation is not None and isinstance(data, Dataset):
        data = held_out(data, preset.validation)
    cases = len(data.train if isinstance(data, PhotographSets) else data.train_x)
    if preset.norm == "batch" and _last(cases, size) == 1:
        raise ValueError(
            f"the last batch of an epoch, 1 of {cases} cases in batches of {size}, has no variance "
            "that batch normalisation could divide by: choose another batch size"
        )
    if isinstance(data, PhotographSets):
        seeds = {member.seed for member in members}
        if len(seeds) > 1:
            raise ValueError(f"photographs are read for one seed at a time, not for {seeds}")
        seed = members[0].seed
        return Read(data, size, seed, len(members), workers=workers, ranks=ranks)
    crops = {m.seed: torch.Generator().manual_seed(mixed(m.seed, CROPS)) for m in members}
    augment = [crops[member.seed] for member in members] if preset.augmented else []
    return Held(data, size, generators, augment, ranks=ranks)


class Held:
    """A data set that lies on the device.

    Args:
        data: Inputs and classes.
        size: Cases in a batch.
        generators: One for each member, which draws its orders. Members of a seed share one.
        augment: One for each member, which draws its crops and flips; empty: no augmentation.
        ranks: Which of the processes that share each batch this is.
    """

    def __init__(
        self,
        data: Dataset,
        size: int,
        generators: Sequence[torch.Generator],
        augment: Sequence[torch.Generator] = (),
        *,
        ranks: Ranks = ALONE,
    ) -> None:
        _require_sharable(len(data.train_x), size, ranks)
        self.data, self.augment, self.ranks = data, augment, ranks
        self.cases, self.classes = len(data.train_x), data.classes
        self.shape = data.train_x.shape[1:]
        self.device = data.train_x.device
        self.orders = Orders(len(data.train_x), size, generators)

    def __len__(self) -> int:
        return len(self.orders)

    def next(self) -> Batch:
        whole = self.orders.next()
        cases = self.ranks.share(whole).to(self.device)
        x, y = self.data.train_x[cases], self.data.train_y[cases]
        return Batch(self._augmented(x, whole.shape[1]) if self.augment else x, y)

    def probe(self, cases: int) -> Batch:
        return Batch(*probe(self.data, cases, torch.Generator().manual_seed(PROBE_SEED)))

    def test(self, cases: int | None = None) -> Iterator[Batch]:
        x, y = self.data.test_x[:cases], self.data.test_y[:cases]
        together = max(1, EVALUATED // x[0].numel())
        return map(Batch, x.split(together), y.split(together))

    def state(self) -> dict[str, Any]:
        drawn = [generator.get_state() for generator in self.augment]
        return {"orders": dict(self.orders.state()), "augment": drawn}

    def load(self, state: Mapping[str, Any]) -> None:
        self.orders.load(state["orders"])
        for generator, drawn in zip(self.augment, state["augment"], strict=True):
            generator.set_state(drawn)

    def _augmented(self, x: Float[Tensor, "m n ..."], whole: int) -> Float[Tensor, "m n ..."]:
        """Crop and mirror; drawn for the whole batch, of which this process may have a share."""
        crops = {g: draw_crops((whole,), 2 * PAD, g) for g in dict.fromkeys(self.augment)}
        drawn = map(torch.stack, zip(*(crops[g] for g in self.augment), strict=True))
        of_members = Crops(*map(self.ranks.share, drawn))
        return augmented(x, of_members)


class Read:
    """Photographs that workers read while the networks train; all members see the same ones."""

    def __init__(
        self,
        sets: PhotographSets,
        size: int,
        seed: int,
        members: int,
        *,
        workers: int = 0,
        ranks: Ranks = ALONE,
    ) -> None:
        _require_sharable(len(sets.train), size, ranks)
        self.sets, self.members, self.workers = sets, members, workers
        self.cases, self.classes = len(sets.train), int(sets.train.files.labels.max()) + 1
        self.device = sets.train.mean.device
        self.stream = Stream(sets.train, size, seed, workers=workers, ranks=ranks)
        self.shape = self.probe(1).x.shape[1:]

    def __len__(self) -> int:
        return len(self.stream)

    def next(self) -> Batch:
        x, y = self.stream.next()
        return Batch(x.expand(self.members, *x.shape), y.expand(self.members, *y.shape))

    def probe(self, cases: int) -> Batch:
        train = self.sets.train
        drawn = torch.randperm(len(train), generator=torch.Generator().manual_seed(PROBE_SEED))
        return next(train.subset(drawn[:cases]).in_order(cases))

    def test(self, cases: int | None = None) -> Iterator[Batch]:
        validation = self.sets.validation
        some = torch.arange(min(len(validation), cases or len(validation)))
        together = max(1, EVALUATED // self.shape.numel())
        return validation.subset(some).in_order(together, workers=self.workers)

    def state(self) -> dict[str, Any]:
        return dict(self.stream.state())

    def load(self, state: Mapping[str, Any]) -> None:
        self.stream.load(state)  # type: ignore[arg-type]


def _require_sharable(cases: int, size: int, ranks: Ranks) -> None:
    if (last := _last(cases, size)) < ranks.size:
        raise ValueError(
            f"the last batch of an epoch, {last} of {cases} cases in batches of {size}, cannot be "
            f"shared by {ranks.size} processes: choose another batch size"
        )


def _last(cases: int, size: int) -> int:
    """Count the cases in the last batch of an epoch."""
    return cases % size or min(size, cases)
