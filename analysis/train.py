"""Train the networks of the ELU paper, all seeds, activations and rates of a preset side by side.

    python analysis/train.py --preset mnist --data-root DIR

records each network in a folder of its own under ``runs/<preset>``, keeps a checkpoint there, and
goes on from it with ``--resume``. Feeds the scripts in ``paper_figs/``.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
import tyro
from tqdm import tqdm

from unitfisher.experiments import DataNotFoundError, load
from unitfisher.experiments.presets import PRESETS, Member, Preset
from unitfisher.experiments.trainer import DivergedError, Trainer
from unitfisher.record import RecordExistsError

INTERRUPTED = 130  # exit code, as shells have it


@dataclass(frozen=True)
class Where:
    """Where to read, compute and write."""

    data_root: Path | None = None
    """Folder of the data as torchvision lays them out (or set UNITFISHER_DATA)."""
    out: Path | None = None
    """Folder of records and checkpoint; default runs/<preset>."""
    device: str = "cpu"
    """As torch names it: cpu, cuda, ..."""
    threads: int | None = None
    """Of torch on the CPU; default all cores."""
    resume: bool = False
    """Go on from the checkpoint in the folder."""
    checkpoint_every: float = 120
    """Seconds between checkpoints."""


def main(name: str, preset: Preset, where: Where) -> int:
    """Train all members; return the exit code."""
    if where.threads:
        torch.set_num_threads(where.threads)
    data = load(preset.dataset, where.data_root).to(where.device)
    folder = where.out or Path("runs") / name
    for form, members in by_form(preset.members):
        part = folder / form
        with Trainer(
            preset,
            members,
            data,
            part,
            resume=where.resume,
            checkpoint_every=where.checkpoint_every,
        ) as trainer:
            try:
                follow(trainer, f"{name}, {len(members)} networks")
            except KeyboardInterrupt:
                trainer.save()
                print(f"\nInterrupted after step {trainer.iteration}; go on with --resume.")
                return INTERRUPTED
    return 0


def by_form(members: Sequence[Member]) -> list[tuple[str, list[Member]]]:
    """Part the members by the form of their network: PReLU has parameters of its own."""
    by = groupby(sorted(members, key=_form), key=_form)
    return [(form, list(alike)) for form, alike in by]


def _form(member: Member) -> str:
    return member.activation if member.activation == "prelu" else ""


def follow(trainer: Trainer, title: str) -> None:
    """Train to the end with a progress bar."""
    with tqdm(
        total=trainer.iterations,
        initial=trainer.iteration,
        unit="step",
        desc=title,
        smoothing=0.01,
        mininterval=1,
    ) as bar:
        for progress in trainer:
            bar.update()
            if progress.loss is not None:
                bar.set_postfix_str(
                    f"epoch {progress.epoch}, loss {progress.loss:.4f}", refresh=False
                )


def parse(arguments: Sequence[str]) -> tuple[str, Preset, Where]:
    """Read the preset's name first, so that --help shows that preset's values."""
    arguments = [
        part for a in arguments for part in (a.split("=", 1) if a.startswith("--preset=") else [a])
    ]
    if "--preset" not in arguments:
        print(__doc__)
        sys.exit(f"train.py: name a --preset: {', '.join(PRESETS)}")
    at = arguments.index("--preset")
    name = arguments[at + 1] if at + 1 < len(arguments) else ""
    if name not in PRESETS:
        sys.exit(f"train.py: no preset {name!r}; there are {', '.join(PRESETS)}")
    rest = [*arguments[:at], *arguments[at + 2 :]]

    @tyro.conf.configure(tyro.conf.OmitArgPrefixes)
    def both(preset: Preset = PRESETS[name], where: Where = Where()) -> tuple[Preset, Where]:
        return preset, where

    return name, *tyro.cli(both, args=rest, prog=f"train.py --preset {name}")


if __name__ == "__main__":
    try:
        sys.exit(main(*parse(sys.argv[1:])))
    except (DataNotFoundError, RecordExistsError, DivergedError, ValueError) as error:
        sys.exit(f"train.py: {error}")
