"""A training's checkpoint: one file, replaced as a whole, which only the same training can resume.

`Trainer.state` says what it holds.
"""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Final

import pyarrow as pa
import torch
from torch import Tensor

from unitfisher.experiments.data import DamagedDataError
from unitfisher.experiments.presets import Member, named
from unitfisher.experiments.ranks import Ranks
from unitfisher.table import write_atomically

FORMAT: Final = 3  # increased when the contents of `Trainer.state` take another form


def read(path: Path) -> dict[str, Any]:
    """Read a state onto the CPU, where the states of random generators have to be.

    Raises:
        DamagedDataError: The file cannot be read.
    """
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, UnpicklingError) as error:
        reason = str(error) or type(error).__name__
        raise DamagedDataError(
            f"{path} cannot be read as a checkpoint ({reason}); bring back a copy, or delete "
            "it to begin anew"
        ) from error
    return state


def write(path: Path, state: Mapping[str, Any]) -> None:
    """Replace the file; where the disk is full the old one stays, and a warning says so."""
    content = pa.BufferOutputStream()  # which gives its bytes without a copy: they may be GiB
    torch.save(state, content)
    try:
        write_atomically(path, content.getvalue(), path.with_suffix(".unfinished"))
    except OSError as error:
        warnings.warn(f"no checkpoint was written ({error}); the last one stays", stacklevel=3)


def require_own(
    state: Mapping[str, Any],
    members: Sequence[Member],
    device: torch.device,
    ranks: Ranks,
    path: Path,
) -> None:
    """Refuse a checkpoint that these members cannot resume from, before anything is changed.

    Raises:
        ValueError: It holds other members or another version's format, or was written by another
            number of processes or on another kind of device.
    """
    written = state.get("format", 0)  # the first format did not name itself
    if written != FORMAT:
        raise ValueError(
            f"{path} is a checkpoint of format {written}, and this unitfisher reads "
            f"format {FORMAT}: resume with the version that began it, which config.json of its "
            "records names, or begin anew in another folder"
        )
    found = [Member(*member) for member in state["members"]]
    if found != list(members):
        raise ValueError(
            f"{path} is of {named(found)}, not of {named(members)}; "
            "resume with the same activations, rates and seeds, or choose another folder"
        )
    each = _generators(device) + len(members)
    if len(state["random"]) != each * ranks.size:
        raise ValueError(
            f"{path} is of {len(state['random']) // each} processes on one kind of device, "
            f"not of {ranks.size} on {device}: resume as it was begun"
        )


def require_form(state: Mapping[str, Tensor], own: Mapping[str, Tensor], path: Path) -> None:
    """Refuse the parameters of networks of another form.

    Raises:
        ValueError: Names some parameters that differ in shape, or that only one of them has.
    """
    found, expected = (
        {(key, tuple(tensor.shape)) for key, tensor in tensors.items()} for tensors in (state, own)
    )
    if differing := sorted({key for key, _ in found ^ expected}):
        raise ValueError(
            f"{path} is of networks of another form (they differ in {', '.join(differing[:3])}): "
            "resume with the version that began it, or begin anew in another folder"
        )


def random_states(device: torch.device, chances: Sequence[torch.Generator]) -> list[Tensor]:
    """Return the states of torch's global generators in this process, and of the members' own."""
    states = [torch.get_rng_state()]
    if device.type != "cpu":
        states.append(torch.get_device_module(device).get_rng_state(device))
    return [*states, *(chance.get_state() for chance in chances)]


def load_random(
    states: Sequence[Tensor],
    device: torch.device,
    chances: Sequence[torch.Generator],
    ranks: Ranks,
) -> None:
    """Restore this process's generators; ``states`` are those of all processes, by rank."""
    each, first = _generators(device) + len(chances), _generators(device)
    own = states[each * ranks.rank : each * (ranks.rank + 1)]
    torch.set_rng_state(own[0])
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(own[1], device)
    for chance, state in zip(chances, own[first:], strict=True):
        chance.set_state(state)


def _generators(device: torch.device) -> int:
    """Count torch's global generators that a training on this device draws from."""
    return 1 if device.type == "cpu" else 2
