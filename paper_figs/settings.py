"""A training's settings: as they took effect, and in words for the foot of its figures."""

from collections.abc import Iterator, Mapping, Sequence
from inspect import signature
from itertools import groupby
from types import MappingProxyType
from typing import Any, Final

from unitfisher.experiments.convnets import STACKS
from unitfisher.experiments.images import PAD
from unitfisher.experiments.models import mlp
from unitfisher.experiments.networks import NETWORKS
from unitfisher.experiments.photographs import VALIDATION_CASES
from unitfisher.experiments.presets import Phase

Config = Mapping[str, Any]

# options that a preset may leave to its network
LEFT: Final = ("weight_variance", "initial", "padding", "stride", "pyramid", "dropout")
# options that some records are too old to name
NEWER: Final = MappingProxyType({**dict.fromkeys(LEFT), "decayed": "all", "validation": None})
PADDINGS: Final = MappingProxyType({"caffe": "Caffe's padding", "same": '"same" padding'})


def effective(config: Config) -> dict[str, Any]:
    """Fill in what a record's configuration leaves to the network, and what it is too old to name.

    A phase has the dropout of each stack and the layers that have it, whether it changes them or
    not.
    """
    network = config["network"]
    builder = mlp if network == "mlp" else NETWORKS.get(network)
    own = signature(builder).parameters if builder else {}
    left = {name: own[name].default for name in LEFT if name in own and config.get(name) is None}
    phases = list(_with_dropout(STACKS.get(network, ()), config["phases"]))
    newer = {name: value for name, value in NEWER.items() if name not in config}
    return {**config, **newer, **left, "phases": phases}


def _with_dropout(
    own: Sequence[float], phases: Sequence[Sequence[Any]]
) -> Iterator[tuple[Any, ...]]:
    dropout, dropped = own, "last"
    for phase in phases if phases or not own else [Phase(0)]:
        start, factor, rates, layers = phase
        dropout, dropped = (rates, layers) if rates else (dropout, dropped)
        yield start, factor, tuple(dropout), dropped


def in_words(config: Config, rates: Sequence[float], hidden: Sequence[float] = ()) -> str:
    """Name data, network and descent; ``hidden`` are rates that a figure leaves out."""
    return "; ".join(
        ", ".join(part)
        for part in (_of_data(config), _built(config), _descended(config, rates, hidden))
    )


def of_fisher(config: Config) -> str:
    """Name how the Fisher was measured on the probe set."""
    how = "exact Fisher" if config["fisher"] == "exact" else "Fisher by random signs"
    return f"{how} of {config['rows']} cases drawn" if config.get("rows") else how


def _of_data(config: Config) -> Iterator[str]:
    yield config["dataset"]
    yield from _prepared(config)
    yield from _evaluated(config)
    yield f"probe set of {config['probe']:,} training cases"


def _prepared(config: Config) -> Iterator[str]:
    if config["dataset"] == "photographs":
        yield f"{config['train_cases']:,} of {config['classes']:,} classes"
        yield "less their mean image"
        yield f"cropped at random to {config['crop']} of {config['side']} pixels and mirrored"
        return
    yield "GCN and ZCA" if config["preprocessing"] == "zca" else "pixels in [0, 1]"
    if config["augmented"]:
        yield f"padded by {PAD}, cropped and mirrored"


def _evaluated(config: Config) -> Iterator[str]:
    tested = config.get("tested")
    if config["dataset"] == "photographs":
        cases = f"{tested:,}" if tested else f"at most {VALIDATION_CASES:,}"
        yield f"evaluated on {cases} validation photographs"
    elif held := config.get("validation"):
        cases = f"{tested:,} of {held:,}" if tested else f"{held:,}"
        yield f"evaluated on {cases} cases held out of training"
    else:
        yield (
            f"evaluated on the first {tested:,} test cases"
            if tested
            else "evaluated on the test set"
        )


def _built(config: Config) -> Iterator[str]:
    runs = [(width, len(list(same))) for width, same in groupby(config["hidden"])]
    hidden = "-".join(f"{n}×{width}" if n > 1 else str(width) for width, n in runs)
    yield f"hidden {hidden}" if hidden else f"network {config['network']}"
    if config.get("norm", "none") != "none":
        yield f"{config['norm']} norm"
    if config.get("padding"):
        yield PADDINGS[config["padding"]]
    if config.get("stride"):
        yield f"first stride {config['stride']}"
    if config.get("pyramid"):
        yield f"pyramid {'-'.join(map(str, config['pyramid']))}"
    yield from _dropout(config)
    if config.get("weight_variance") is not None:
        drawn = (
            f"{config['initial']} initial weights" if config.get("initial") else "initial weights"
        )
        yield f"{drawn} of variance {config['weight_variance']:.3g}/fan-in"


def _dropout(config: Config) -> Iterator[str]:
    if config.get("dropout") is not None:
        yield f"dropout {config['dropout']:g} of fully connected layers"
    before: tuple[Any, ...] = ()
    for start, _, rates, layers in config["phases"]:
        if any(rates) and (rates, layers) != before:
            behind = "each stack" if layers == "last" else "all layers of each stack"
            since = f" from {_short(start)}" if start else ""
            yield f"dropout{since} {'-'.join(f'{rate:g}' for rate in rates)} behind {behind}"
        before = (rates, layers)


def _descended(config: Config, rates: Sequence[float], hidden: Sequence[float]) -> Iterator[str]:
    yield f"batch {config['batch_size']}"
    shown = ", ".join(f"{rate:g}" for rate in rates)
    others = f" (not shown: {', '.join(f'{rate:g}' for rate in hidden)})" if hidden else ""
    yield f"rate{'s' if len(rates) > 1 else ''} {shown}{others}{_schedule(config)}"
    if config["momentum"]:
        yield f"momentum {config['momentum']:g}"
    if config["weight_decay"]:
        on = {"all": "all parameters", "weights": "weights alone"}[config["decayed"]]
        yield f"L2 {config['weight_decay']:g} on {on}"
    if config.get("precision", "float32") != "float32":
        yield f"products in {config['precision']}"


def _schedule(config: Config) -> str:
    """Name the factors of the rate, and from which step on they hold."""
    factors = [(0, 1.0), *((start, factor) for start, factor, *_ in config["phases"])]
    changes = [
        f"×{factor:g} from {_short(start)}"
        for (start, factor), (_, before) in zip(factors[1:], factors, strict=False)
        if factor != before
    ]
    return f" ({', '.join(changes)})" if changes else " throughout"


def _short(step: int) -> str:
    return f"{step / 1000:g}k" if step >= 1000 else str(step)
