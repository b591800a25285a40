"""Train the networks of the ELU paper, all seeds, activations and rates of a preset side by side.

    python analysis/train.py --preset mnist --data-root DIR

records each network in a folder of its own under ``runs/<preset>``, keeps a checkpoint there, and
goes on from it with ``--resume``. Ctrl-C ends the training after the step at hand, with a
checkpoint; a second one ends it at once, and the last checkpoint stands. Several GPUs share every
batch where torchrun starts it:

    torchrun --nproc-per-node 2 analysis/train.py --preset imagenet-15 --device cuda

Feeds the scripts in ``paper_figs/``.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from interrupts import INTERRUPTED, first_interrupt
from tqdm import tqdm

from unitfisher.experiments import PRESETS, Preset, Trainer, data_of, scripts
from unitfisher.experiments.allocation import keep_freed_memory
from unitfisher.experiments.options import COUNT, NATURAL, require_device, require_ranges
from unitfisher.experiments.ranks import Ranks

PLURALS = {"--activation": "--activations", "--seed": "--seeds", "--rate": "--rates"}
ALSO = (
    "--activation, --seed and --rate stand for --activations, --seeds and --rates; where both are "
    "given, the last counts."
)
WHERE_RANGES = {"threads": COUNT, "workers": NATURAL, "checkpoint_every": NATURAL}


@dataclass(frozen=True)
class Where:
    """Where to read, compute and write, and how."""

    data_root: Path | None = None
    """Folder of the data as torchvision lays them out (or set UNITFISHER_DATA)."""
    out: Path | None = None
    """Folder of records and checkpoint; default runs/<preset>."""
    cache: Path | None = None
    """Folder of whitening and mean images, computed once; default <out>/cache."""
    device: str = "cpu"
    """As torch names it: cpu, cuda, ..."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of products in training; parameters and measurements stay in float32."""
    compile: bool = False
    """Train through torch.compile."""
    threads: int | None = None
    """Threads of torch on the CPU; default all cores."""
    workers: int = 0
    """Processes that read photographs."""
    resume: bool = False
    """Go on from the checkpoint in the folder."""
    checkpoint_every: float = 120.0
    """Seconds between checkpoints."""

    def __post_init__(self) -> None:
        require_ranges(asdict(self), WHERE_RANGES)
        require_device(self.device)


def main(name: str, preset: Preset, where: Where) -> int:
    """Train all members; return the exit code."""
    if where.threads:
        torch.set_num_threads(where.threads)
    ranks = Ranks.joined()
    where = replace(where, device=ranks.device(where.device))
    try:
        return train_all(name, preset, where, ranks)
    except KeyboardInterrupt:
        print("\nInterrupted; go on from the last checkpoint with --resume.")
        return INTERRUPTED
    finally:
        ranks.leave()


def train_all(name: str, preset: Preset, where: Where, ranks: Ranks) -> int:
    """Train the members form by form."""
    folder = where.out or Path("runs") / name
    data = data_of(
        preset,
        where.data_root,
        cache=where.cache or folder / "cache",
        device=where.device,
        workers=where.workers,
    )
    for form, members in preset.forms.items():
        with Trainer(
            preset,
            members,
            data,
            folder / form,
            resume=where.resume,
            checkpoint_every=where.checkpoint_every,
            precision=where.precision,
            compiled=where.compile,
            workers=where.workers,
            ranks=ranks,
        ) as trainer:
            with first_interrupt(trainer.stop):
                follow(trainer, f"{name}, {len(members)} networks")
            if trainer.stopped:
                if ranks.is_first:
                    print(f"Interrupted after step {trainer.iteration}; go on with --resume.")
                return INTERRUPTED
            if ranks.is_first:
                print(conclusion(trainer))
    return 0


def follow(trainer: Trainer, title: str) -> None:
    """Train to the end with a progress bar."""
    with tqdm(
        total=trainer.iterations,
        initial=trainer.iteration,
        unit="step",
        desc=title,
        smoothing=0.1,  # follows the present speed: the first steps may be slow
        mininterval=1,
        disable=not trainer.ranks.is_first,
    ) as bar:
        for progress in trainer:
            bar.update()
            if progress.loss is not None:
                bar.set_postfix_str(
                    f"epoch {progress.epoch}, loss {progress.loss:.4f}", refresh=False
                )


def conclusion(trainer: Trainer) -> str:
    """Say in a line what was trained, how fast, and the Monitors' share of the time."""
    steps, seconds = trainer.iteration, trainer.seconds
    return (
        f"{len(trainer.members)} networks, {steps} steps in {seconds:.0f} s: "
        f"{steps / seconds:.3g} steps/s; Monitors {trainer.monitoring / seconds:.1%} of the time"
    )


def parse(arguments: Sequence[str]) -> tuple[str, Preset, Where]:
    """Read the preset's name first, so that --help shows that preset's values."""
    arguments = [part for a in arguments for part in _in_full(a)]
    if "--preset" not in arguments:
        if {"--help", "-h"} & set(arguments):
            print(f"{__doc__}\n{listed(PRESETS)}")
            sys.exit(0)
        sys.exit(f"train.py: name a --preset: {', '.join(PRESETS)}; --help says what they are")
    at = arguments.index("--preset")
    name = arguments[at + 1] if at + 1 < len(arguments) else ""
    if name not in PRESETS:
        sys.exit(f"train.py: no preset {name!r}; there are {', '.join(PRESETS)}")
    rest = [*arguments[:at], *arguments[at + 2 :]]

    def both(
        preset: Annotated[Preset, tyro.conf.arg(name="")] = PRESETS[name],
        where: Annotated[Where, tyro.conf.arg(name="")] = Where(),
    ) -> tuple[Preset, Where]:
        return preset, where

    return name, *tyro.cli(
        both,
        args=rest,
        prog=f"train.py --preset {name}",
        description=f"{described(PRESETS[name])}. {ALSO}",
    )


def _in_full(argument: str) -> list[str]:
    """Split --preset=NAME, and put an option that names one thing for that which names several."""
    option, *value = argument.split("=", 1)
    if option == "--preset":
        return [option, *value]
    return ["=".join([PLURALS.get(option, option), *value])]


def listed(presets: Mapping[str, Preset]) -> str:
    """List the presets with what they train."""
    lines = [f"  {name:18} {described(preset)}" for name, preset in presets.items()]
    return "\n".join(["Presets; --preset NAME --help lists all options of one:", *lines, ""])


def described(preset: Preset) -> str:
    """Say in a line what a preset trains: which networks, on what data, for how long."""
    layers = f", {len(preset.hidden)} hidden layers" if preset.hidden else ""
    rates = f" at rates {', '.join(f'{rate:g}' for rate in preset.rates)}"
    length = f"{preset.iterations} steps" if preset.iterations else f"{preset.epochs} epochs"
    seeds = f"{len(preset.seeds)} seed{'s' if len(preset.seeds) > 1 else ''}"
    return (
        f"{preset.task} of {preset.dataset}: {preset.network}{layers}; "
        f"{', '.join(preset.activations)}{rates}; {seeds}; {length}"
    )


if __name__ == "__main__":
    keep_freed_memory()
    scripts.run(lambda: main(*parse(sys.argv[1:])), Preset, Where)
