"""Random generators apart from torch's global ones, which are never touched."""

from collections.abc import Mapping

import torch
from torch import Tensor


class Chance:
    """One generator per device, each seeded with ``seed``."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.generators: dict[str, torch.Generator] = {}

    def on(self, device: torch.device) -> torch.Generator:
        name = str(device)
        if name not in self.generators:
            self.generators[name] = torch.Generator(device).manual_seed(self.seed)
        return self.generators[name]

    def state(self) -> dict[str, Tensor]:
        return {name: g.get_state() for name, g in self.generators.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        for name, saved in state.items():
            self.on(torch.device(name)).set_state(saved.cpu())
