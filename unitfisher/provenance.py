"""The provenance of a run: its configuration as plain JSON, the versions, the device, the time."""

import math
import platform
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor


def provenance(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is recorded of a run when it begins."""
    return {
        "config": plain(config),
        "versions": {
            "python": platform.python_version(),
            "unitfisher": version_of("unitfisher"),
            "torch": str(torch.__version__),
            "numpy": np.__version__,
            "pandas": version_of("pandas"),
            "pyarrow": pa.__version__,
        },
        "device": device(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def version_of(package: str) -> str:
    """Return a package's version, or "not installed"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def device() -> str:
    """Describe the machine, as "AMD EPYC 9654, 2 threads, NVIDIA H200"."""
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else None
    cpu = model[1] if model else platform.processor() or platform.machine()
    gpu = [torch.cuda.get_device_name()] if torch.cuda.is_available() else []
    threads = torch.get_num_threads()
    return ", ".join([cpu, f"{threads} thread{'s' if threads > 1 else ''}", *gpu])


def plain(value: Any) -> Any:
    """Return a value as it reads back from JSON; what JSON cannot represent becomes text."""
    if is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else str(value)
        case Mapping():
            return {str(key): plain(item) for key, item in value.items()}
        case list() | tuple():
            return [plain(item) for item in value]
        case set() | frozenset():
            return sorted((plain(item) for item in value), key=repr)
        case np.generic() | np.ndarray() | Tensor():
            return plain(value.tolist())
        case Path():
            return str(value)
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))  # an address differs in every process


def differences(recorded: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """List what changed from one plain configuration to another, by dotted key."""
    was, now = _flat(recorded), _flat(given)
    return [
        f"{key} was {_shown(was, key)} and is {_shown(now, key)}"
        for key in sorted(was | now)
        if (key in was, was.get(key)) != (key in now, now.get(key))
    ]


def _flat(config: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= _flat(value, f"{path}{key}.") if isinstance(value, dict) else {path + key: value}
    return flat


def _shown(config: Mapping[str, Any], key: str) -> str:
    return repr(config[key]) if key in config else "absent"
