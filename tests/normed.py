"""Networks with batch normalisation, trained by one process or by several that share batches."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unitfisher.experiments import Dataset
from unitfisher.experiments.norms import share_norms
from unitfisher.experiments.presets import PRESETS, Phase
from unitfisher.experiments.ranks import Ranks
from unitfisher.experiments.trainer import Trainer

PRESET = replace(
    PRESETS["cifar10-11"],
    norm="batch",
    activations=("relu", "elu"),
    preprocessing="none",
    phases=(Phase(0, dropout=(0.0,) * 6, dropped="all"),),  # else each process has its own draws
    batch_size=6,
)


def images() -> Dataset:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(23, 3, 8, 8, generator=generator, dtype=torch.float64)
    return Dataset(x, torch.arange(23) % 10, x[:2], torch.arange(2))


def trained(folder: str, ranks: Ranks | None = None) -> None:
    """Take five steps in double precision, the fourth on what is left of an epoch: five cases."""
    torch.set_num_threads(1)
    ranks = ranks or Ranks.joined()
    with (
        in_double(),
        Trainer(PRESET, PRESET.members, images(), Path(folder), ranks=ranks) as trainer,
    ):
        for _ in range(5):
            trainer.step()
    found = trainer.ensemble.state_dict(), trainer.losses.sum
    torch.save(found, Path(folder, f"{ranks.rank}.pt"))
    ranks.leave()


@contextmanager
def in_double() -> Iterator[None]:
    """Make what is made in double precision: rounding grows where a batch has a few cases."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def normalised(folder: str, ranks: Ranks | None = None) -> None:
    """Send a share of the cases through a network, and back; two steps of running averages."""
    ranks = ranks or Ranks.joined()
    model = network()
    if ranks.size > 1:
        share_norms(model)
    for seed in (1, 2):
        x = batch(seed)[ranks.rank :: ranks.size].clone().requires_grad_()
        model.zero_grad()
        y = model(x)
        y.tanh().square().sum().backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    torch.save((y.detach(), x.grad, found, model.state_dict()), Path(folder, f"{ranks.rank}.pt"))
    ranks.leave()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    norms = nn.BatchNorm2d(4), nn.BatchNorm2d(5, momentum=None, affine=False)
    model = nn.Sequential(
        *(nn.Conv2d(3, 4, 3), norms[0], nn.ELU(), nn.Sequential(nn.Conv2d(4, 5, 3), norms[1])),
        *(nn.Flatten(), nn.Linear(5 * 16, 3), nn.BatchNorm1d(3, track_running_stats=False)),
    )
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d) and norm.affine:
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
    return model.double()


def batch(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(7, 3, 8, 8, generator=generator, dtype=torch.float64) + 3.0


def saved(folder: Path, rank: int = 0) -> Any:
    return torch.load(folder / f"{rank}.pt", weights_only=True)
