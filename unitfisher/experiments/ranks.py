"""One training by several processes, one a device, as torchrun starts them.

Each takes its share of every batch, and the gradients are averaged in one message a step, so the
training is that of one process up to rounding. Members are not distributed over processes instead,
because networks that need several devices are few and large. DistributedDataParallel is not used:
it has no place for the losses, which go with the gradients here, and needs a module without views.
"""

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Final, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

PATIENCE = timedelta(hours=6)  # for the others to wait while the first one measures and writes


class Ranks(NamedTuple):
    """Which of the processes this is."""

    rank: int = 0
    size: int = 1

    @classmethod
    def joined(cls) -> "Ranks":
        """Join the other processes that torchrun started; without torchrun there are none."""
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            return cls()
        backends = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backends, timeout=PATIENCE)
        return cls(dist.get_rank(), dist.get_world_size())

    def device(self, name: str) -> str:
        """Return this process's own device: "cuda" becomes "cuda:1" on the second, for example."""
        return f"cuda:{os.environ['LOCAL_RANK']}" if self.size > 1 and name == "cuda" else name

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, batch: Tensor) -> Tensor:
        """Return this process's cases of a batch's (..., n)."""
        return batch[..., self.rank :: self.size]

    def averaged(self, tensors: Sequence[Tensor], cases: int) -> list[Tensor]:
        """Turn sums over this process's ``cases`` into averages over all processes' cases."""
        if self.size == 1:
            return list(tensors)
        flat = torch.cat([*(t.flatten() for t in tensors), tensors[0].new_tensor([cases])])
        dist.all_reduce(flat)
        parts = flat[:-1].div_(flat[-1].clone()).split([t.numel() for t in tensors])
        return [part.view_as(t) for part, t in zip(parts, tensors, strict=True)]

    def agreed(self, decision: bool) -> bool:
        """Return the first process's decision, for which the others wait; uses no GPU."""
        if self.size == 1:
            return decision
        decided = torch.tensor(decision)
        dist.broadcast(decided, 0)
        return bool(decided)

    def gathered(self, own: Sequence[Tensor]) -> list[Tensor]:
        """Return the tensors of all processes, which are on the CPU, in order of rank."""
        if self.size == 1:
            return list(own)
        found: list[list[Tensor]] = [[]] * self.size
        dist.all_gather_object(found, list(own))
        return [tensor for tensors in found for tensor in tensors]

    def leave(self) -> None:
        if self.size > 1:
            dist.destroy_process_group()


ALONE: Final = Ranks()
