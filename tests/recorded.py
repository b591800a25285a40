"""Records as ``analysis/train.py`` leaves them, of networks that were never trained."""

from collections.abc import Sequence
from dataclasses import asdict
from math import exp, nan
from pathlib import Path

import numpy as np

from unitfisher import Run
from unitfisher.experiments.presets import Member, Preset

LEVELS = {
    "own": 1.0,
    "elu": 1.0,
    "srelu": 1.1,
    "lrelu": 1.2,
    "relu": 1.3,
}  # of errors: ELU's is the lowest
LAYERS = ("stem", "middle", "last")
UNITS = np.array([0, 1, 2, 7])  # a median that is no mean


def record(
    folder: Path, preset: Preset, times: Sequence[int], diverging: Sequence[Member] = ()
) -> None:
    """Record all members of a preset, at times in the unit that it is counted in."""
    for member in preset.members:
        config = asdict(preset) | {"device": "cpu"} | member._asdict()
        for several in ("activations", "rates", "seeds"):
            del config[several]
        config |= {"train_cases": 700, "classes": 10}
        with Run(folder / member.name, config) as run:
            for time in times:
                lost = member in diverging and time > 0
                _record(run, preset, time, nan if lost else _level(member))


def _level(member: Member) -> float:
    return LEVELS[member.activation] * (1 + 0.02 * member.seed)


def _record(run: Run, preset: Preset, time: int, level: float) -> None:
    counted = (time // 500, time) if preset.iterations else (time, 10 * time)
    when = dict(zip(("epoch", "iteration"), counted, strict=True))
    whole = preset.iterations or preset.epochs
    error = level * (20 + 50 * exp(-5 * time / whole))
    training = {"seconds": [float(time)], "monitoring": 0.1 * time}
    training |= {"train_loss": error / 20 if time else nan, "test_loss": error / 15}
    training |= {"probe_loss": error / 20, "probe_error": error - 5}
    training |= {"test_error": error, "test_top5_error": error / 3}
    run.append("training", when | training)
    for place, layer in enumerate(LAYERS):
        mean = level * (UNITS + 1 + place) / 10 * (1 - exp(-time / whole))
        of_units = when | {"layer": layer, "unit": UNITS}
        run.append("activations", of_units | {"mean": mean, "var": mean})
        for damping in preset.dampings if level == level else ():
            quantities = {"k": mean - 1, "sc": 1 + mean / damping, "cosine": mean / 4 + damping}
            quantities |= {"corrected_mean_norm": mean, "damping_share": damping + 0 * mean}
            quantities |= {"bias_shift_share_natural": mean * damping + 0.001}
            quantities |= {"bias_shift_share_gradient": mean / 2, "mean_share": mean / 3}
            quantities |= {"n_eff": 100 - mean, "dead": UNITS < 0}
            run.append("path", of_units | {"damping": damping} | quantities)
