"""Batch normalisation of a batch that several processes share.

``nn.SyncBatchNorm`` does that on GPUs alone, and one member at a time.
"""

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def share_norms(module: nn.Module) -> None:
    """Replace every batch normalisation in a module by one over all processes' cases."""
    for name, child in module.named_children():
        if isinstance(child, _BatchNorm):
            setattr(module, name, SharedBatchNorm.of(child))
        else:
            share_norms(child)


class SharedBatchNorm(_BatchNorm):
    """A BatchNorm1d, 2d or 3d whose training mean and variance are over all processes' cases."""

    @classmethod
    def of(cls, norm: _BatchNorm) -> "SharedBatchNorm":
        """Make one from an ordinary module, with its parameters and running averages."""
        shared = cls(
            norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats
        )
        shared._parameters, shared._buffers = norm._parameters, norm._buffers
        return shared

    def _check_input_dim(self, input: Tensor) -> None:
        """Accept any number of dimensions: this stands for BatchNorm1d, 2d and 3d."""

    def forward(self, x: Float[Tensor, "n u *t"]) -> Float[Tensor, "n u *t"]:
        if not self.training:
            return super().forward(x)
        axes, shape = (0, *range(2, x.dim())), (-1, *[1] * (x.dim() - 2))
        wide = x.float() if x.element_size() < 4 else x
        cases = _summed(wide.new_tensor(x.numel() / x.shape[1]))
        mean = _summed(wide.sum(axes)) / cases
        about = wide - mean.view(shape)
        var = _summed(about.square().sum(axes)) / cases
        if self.track_running_stats:
            self._follow(mean.detach(), (var * cases / (cases - 1)).detach())
        y = about * (var + self.eps).rsqrt().view(shape)
        if self.affine:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(x.dtype)

    def _follow(self, mean: Float[Tensor, " u"], var: Float[Tensor, " u"]) -> None:
        """Update the running averages."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        factor = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, factor)
        self.running_var.lerp_(var, factor)


class _Summed(torch.autograd.Function):
    """The sum over all processes; its gradient is the sum of the processes' gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Tensor:
        return _summed(gradients[0])


def _summed(x: Tensor) -> Tensor:
    total: Tensor = _Summed.apply(x)
    return total
