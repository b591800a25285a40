"""Records as ``analysis/train.py`` leaves them, of networks that were never trained."""

from collections.abc import Sequence
from dataclasses import asdict
from math import exp, nan
from pathlib import Path

import numpy as np

from unitfisher import Run
from unitfisher.experiments.presets import Member, Preset

LEVELS = {"elu": 1.0, "srelu": 1.1, "lrelu": 1.2, "relu": 1.3}  # of errors: ELU's is the lowest


def record(
    folder: Path,
    preset: Preset,
    times: Sequence[int],
    *,
    layers: Sequence[str] = ("first", "second", "third"),
    diverging: Sequence[Member] = (),
) -> None:
    """Record all members of a preset, at times in the unit that it is counted in."""
    for member in preset.members:
        config = asdict(preset) | {"device": "cpu"} | member._asdict()
        for several in ("activations", "rates", "seeds"):
            del config[several]
        with Run(folder / member.name, config) as run:
            for time in times:
                _record(
                    run, preset, member, time, layers, diverges=time > 0 and member in diverging
                )


def _record(
    run: Run, preset: Preset, member: Member, time: int, layers: Sequence[str], *, diverges: bool
) -> None:
    whole = preset.iterations or preset.epochs
    when = (
        {"epoch": time // 10, "iteration": time}
        if preset.iterations
        else {
            "epoch": time,
            "iteration": 10 * time,
        }
    )
    level = nan if diverges else LEVELS[member.activation] * (1 + 0.02 * member.seed)
    error = level * (20 + 60 * exp(-5 * time / whole))
    run.append(
        "training",
        {
            **when,
            "seconds": [float(time)],
            "monitoring": 0.1 * time,
            "train_loss": error / 20 if time else nan,
            "probe_loss": error / 20,
            "probe_error": error - 5,
            "test_loss": error / 15,
            "test_error": 99.0 if diverges else error,
            "test_top5_error": error / 3,
        },
    )
    units = np.arange(4)
    for place, layer in enumerate(layers):
        mean = level * (units + 1 + place) / 10 * (1 - exp(-time / whole))
        run.append(
            "activations", {**when, "layer": layer, "unit": units, "mean": mean, "var": mean}
        )
        for damping in [] if diverges else preset.dampings:
            grown = {"k": mean - 1, "sc": 1 + mean / damping, "corrected_mean_norm": mean}
            grown |= {"cosine": 0.2 * damping + mean / 4, "damping_share": mean * 0 + damping}
            grown |= {"bias_shift_share_natural": mean * damping + 0.001}
            grown |= {"bias_shift_share_gradient": mean, "mean_share": mean / 2}
            grown |= {"n_eff": 100 - mean, "dead": units < 0}
            run.append("path", {**when, "layer": layer, "damping": damping, "unit": units, **grown})
