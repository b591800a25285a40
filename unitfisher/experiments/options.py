"""Which values of an experiment's options are possible, and which network and data take which."""

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import torch

from unitfisher.experiments.convnets import STACKS
from unitfisher.experiments.networks import require_known

PAPERS: Final = tuple(STACKS)
OF_ONE_SIZE: Final = ("cuda-convnet", "dsn", "maxout")  # fully connected behind images of 32×32
SIZE: Final = 32
FLAT: Final = ("digits", "mnist", "fashion-mnist")
CIFAR: Final = ("cifar-10", "cifar-100")


class Range(NamedTuple):
    """The allowed values of a number, or of every number of a tuple."""

    holds: Callable[[float], bool]
    words: str


COUNT: Final = Range(lambda n: n >= 1, "1 or more")
POSITIVE: Final = Range(lambda x: 0 < x < math.inf, "above 0 and finite")
NATURAL: Final = Range(lambda x: 0 <= x < math.inf, "0 or more and finite")
SEED: Final = Range(lambda n: 0 <= n < 2**31, "0 or more and below 2**31")
SHARE: Final = Range(lambda x: 0 <= x < 1, "0 or more and below 1")

MEASUREMENTS: Final = Range(lambda n: n >= 2, "2 or more: before and after training")

PHASE_RANGES: Final = MappingProxyType({"start": NATURAL, "factor": POSITIVE, "dropout": SHARE})
PRESET_RANGES: Final = MappingProxyType(
    {
        **dict.fromkeys(("epochs", "iterations", "every", "batch_size", "probe", "tested"), COUNT),
        **dict.fromkeys(("units", "rows", "hidden", "side", "crop", "validation"), COUNT),
        **dict.fromkeys(("stride", "pyramid"), COUNT),
        **dict.fromkeys(("rates", "weight_variance"), POSITIVE),
        **dict.fromkeys(("weight_decay", "dampings"), NATURAL),
        "seeds": SEED,
        **dict.fromkeys(("momentum", "dropout"), SHARE),
        "measurements": MEASUREMENTS,
    }
)


class Takers(NamedTuple):
    """The networks or data sets that take an option, and the value that means it is not set."""

    unset: object
    by: str  # "network" or "dataset"
    names: tuple[str, ...]


TAKERS: Final = MappingProxyType(
    {
        "hidden": Takers((), "network", ("mlp",)),
        "weight_variance": Takers(None, "network", ("mlp", *PAPERS)),
        "initial": Takers(None, "network", ("mlp", *PAPERS)),
        "norm": Takers("none", "network", ("mlp", *PAPERS, "nin", "dsn", "all-cnn-c")),
        "padding": Takers(None, "network", PAPERS),
        **dict.fromkeys(("stride", "pyramid", "dropout"), Takers(None, "network", ("imagenet15",))),
        "preprocessing": Takers("none", "dataset", CIFAR),
        "augmented": Takers(False, "dataset", CIFAR),
        "validation": Takers(None, "dataset", FLAT),
        "side": Takers(256, "dataset", ("photographs",)),
        "crop": Takers(224, "dataset", ("photographs",)),
    }
)


def require_ranges(
    options: Mapping[str, Any], ranges: Mapping[str, Range], prefix: str = ""
) -> None:
    """Refuse numbers out of their range; None is allowed. The prefix goes before names in errors.

    Raises:
        ValueError: Names the first one.
    """
    for name, allowed in ranges.items():
        value = options[name]
        numbers = value if isinstance(value, tuple) else () if value is None else (value,)
        if not all(map(allowed.holds, numbers)):
            raise ValueError(f"{prefix}{name}={value!r}, but must be {allowed.words}")


def require_several(options: Mapping[str, Any], *names: str) -> None:
    """Refuse lists that are empty, or name something twice; None is allowed."""
    for name in names:
        values = options[name]
        if values is None:
            continue
        if not values:
            raise ValueError(f"{name} is empty: name at least one")
        if len(set(values)) < len(values):
            raise ValueError(f"{name}={values!r}, but must name each once")


def require_device(name: str) -> None:
    """Refuse a device that torch does not find here; takes none of its memory."""
    try:
        device = torch.device(name)
        devices = torch.get_device_module(device).device_count()
    except RuntimeError as error:
        raise ValueError(f"device={name!r} is unknown to torch: {str(error)[:60]}...") from error
    if (device.index or 0) >= devices:
        raise ValueError(
            f"device={name!r} is not here: torch finds {devices or 'no'} devices of type "
            f"{device.type}; device='cpu' always is"
        )


def require_fitting(options: Mapping[str, Any]) -> None:
    """Refuse options of a preset that its network or its data do not take.

    Raises:
        ValueError: Names all of them, and what to give instead.
    """
    network, dataset = options["network"], options["dataset"]
    require_known(network, also=("mlp",))
    found = [*_misplaced(options), *_unfit_activations(network, options["activations"])]
    found += _unfit_dropout(network, options["phases"])
    if (network == "mlp") != (dataset in FLAT):
        takes = FLAT if network == "mlp" else (*CIFAR, "photographs")
        found.append(f"network={network!r} takes {', '.join(takes)}, not dataset={dataset!r}")
    if network == "mlp" and not options["hidden"]:
        found.append("hidden is empty: name the width of at least one layer")
    if dataset == "photographs" and options["crop"] > options["side"]:
        found.append(f"crop={options['crop']} is more than side={options['side']}")
    if network in OF_ONE_SIZE and dataset == "photographs" and options["crop"] != SIZE:
        found.append(f"network={network!r} takes images of {SIZE} pixels: give crop={SIZE}")
    if network != "mlp" and "reconstruction" in options["task"]:
        found.append(f"network={network!r} has no decoder: task='classification' is for it")
    if found:
        raise ValueError("; ".join(found))


def _misplaced(options: Mapping[str, Any]) -> list[str]:
    """Say which options are set for networks or data that do not take them."""
    return [
        f"{options[by]} does not take {name}={options[name]!r}, which is for {', '.join(names)}: "
        f"give {name}={unset!r}"
        for name, (unset, by, names) in TAKERS.items()
        if options[name] != unset and options[by] not in names
    ]


def _unfit_activations(network: str, activations: tuple[str, ...]) -> list[str]:
    if network == "maxout" and set(activations) != {"own"}:
        return ["maxout is an activation itself: give activations=('own',)"]
    if network == "mlp" and "own" in activations:
        return ["mlp has no activation of its own: name others in activations"]
    return []


def _unfit_dropout(network: str, phases: Sequence[Any]) -> list[str]:
    """Say which phases have dropout rates for another number of stacks than the network's."""
    unfit = {
        f"phases.{i}.dropout": phase.dropout
        for i, phase in enumerate(phases)
        if phase.dropout and len(phase.dropout) != len(STACKS.get(network, ()))
    }
    if not unfit:
        return []
    own = " ".join(f"{name}=()" for name in unfit)
    if network not in STACKS:
        return [f"network={network!r} has no stacks whose dropout phases could set: give {own}"]
    name, rates = next(iter(unfit.items()))
    return [
        f"network={network!r} has {len(STACKS[network])} stacks, not the {len(rates)} of "
        f"{name}={rates!r}: give a rate for each stack, or leave it the dropout it has with {own}"
    ]
