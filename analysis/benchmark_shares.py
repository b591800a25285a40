"""The share of a whole training's time that its Monitors take, as rows of the table."""

from dataclasses import replace
from statistics import median

from benchmark_results import Result, judged
from benchmark_timing import device_clock
from benchmark_trainers import CIFAR, MNIST, Config, opened, random_data, seconds_of

from unitfisher.experiments.presets import PRESETS
from unitfisher.experiments.watching import Moment, Watch

BAR = 5.0  # percent


def of_shares(config: Config) -> list[Result]:
    """Measure the Monitors' share of the time of each training asked for."""
    return [of_share(name, config) for name in config.shares]


def of_share(name: str, config: Config) -> Result:
    """Extrapolate timed steps and measurements to a whole training, by the preset's schedule."""
    preset = PRESETS[name]
    images = preset.network != "mlp"
    if images:  # members of convolutional networks take as long as each would alone
        preset = replace(preset, activations=preset.activations[-1:])
    preset = replace(preset, rates=preset.rates[:1])
    data = random_data(CIFAR if images else MNIST, 100 if images else 10).to(config.device)
    with opened(preset, data, config) as t:
        step = median(seconds_of(t.step, config.rounds))
        t.ensemble.eval()
        watch, evaluations = t.watches.each[-1], t.iterations // t.every + 1
        measured = sorted(watch.measured)
        recorded(watch, measured[1])
        plain_record = [recorded(watch, 1) for _ in range(config.rounds)]
        with_fisher = [recorded(watch, measured[1]) for _ in range(max(2, config.rounds // 2))]
    whole, passes = (median(column) for column in zip(*plain_record, strict=True))
    fishers = (median(seconds for _, seconds in with_fisher) - passes) * len(measured)
    members = len(t.members)
    total = t.iterations * step + members * (evaluations * whole + fishers)
    share = members * (evaluations * passes + fishers) / total
    note = f"{members} networks, {t.iterations} steps in {total / 3600:.3g} h; Fishers "
    note += f"{members * fishers / total:.2%}, the rest passes over the probe set, loss included"
    title = f"Monitors in a training of {name}, share of the time"
    return Result(
        f"share/{name}",
        title,
        f"n = {preset.batch_size}",
        BAR,
        None,
        "%",
        judged(100 * share, BAR, more=False),
        value=100 * share,
        note=note,
        rounds=config.rounds,
    )


def recorded(watch: Watch, iteration: int) -> tuple[float, float]:
    """Record at a step; return the seconds it took, and the Monitor's part of them."""
    start = device_clock()
    of_monitor = watch.record(Moment(0, iteration, 0.0, 0.0), 1.0)
    return device_clock() - start, of_monitor
