"""A type of device apart from the CPU: the tests for GPUs run on it where there is none."""

import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType

import torch

NAME, SINGLE = "separate", "separate:2"  # the second without double precision
SOURCE = Path(__file__).with_suffix(".cpp")
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")


def load() -> None:
    """Compile the device and make it known to torch, in this process and for good."""
    from torch.utils.cpp_extension import include_paths, library_paths

    headers = [flag for path in include_paths() for flag in ("-isystem", path)]
    libraries = [*(f"-L{path}" for path in library_paths()), "-ltorch_cpu", "-lc10"]
    flags = ["-std=c++20", "-fPIC", "-shared", *headers]
    with tempfile.TemporaryDirectory() as folder:
        library = str(Path(folder, "device.so"))
        subprocess.run([COMPILER, *flags, str(SOURCE), *libraries, "-o", library], check=True)
        torch.ops.load_library(library)
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, _module())


def _module() -> ModuleType:
    """Return what ``torch.cuda`` is to a GPU."""
    module = ModuleType(f"torch.{NAME}")
    module.is_available = module.is_initialized = lambda: True
    module._is_in_bad_fork = lambda: False
    module.device_count = lambda: 3
    module.device = nullcontext
    module.current_device = lambda: 0
    module.get_amp_supported_dtype = lambda: [torch.bfloat16]
    module.manual_seed_all = torch.ops.separate.seed
    module.get_rng_state = lambda device: torch.ops.separate.random_state(device.index or 0)
    module.set_rng_state = lambda state, device: torch.ops.separate.set_random_state(
        state, device.index or 0
    )
    sys.modules[module.__name__] = module
    return module
