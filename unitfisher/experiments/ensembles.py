"""Networks of one form trained as one: small networks leave a machine idle, many of them do not."""

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.utils._pytree import tree_map

from unitfisher.experiments.dropout import MemberDropout
from unitfisher.experiments.norms import SharedBatchNorm


class Ensemble(nn.Module):
    """Members of one form as one module, each parameter stacked along a first dimension.

    Members differ in their weights and in modules without parameters, such as the activation
    function. Linear layers are batched products; a module without parameters runs once for
    consecutive members that have the same one; any other module is vmapped (``torch.func``), except
    on a CPU. Training the ensemble on the sum of the members' losses trains each as if alone.

    Args:
        members: Sequential networks, of which this takes copies.
        chances: Each member's generator, which its dropout draws from; on the device to train on.
            None: all draw from torch's global one.

    Raises:
        ValueError: The members are not of one form; says where they differ.
    """

    def __init__(
        self,
        members: Sequence[nn.Sequential],
        chances: Sequence[torch.Generator] | None = None,
    ) -> None:
        super().__init__()
        self.stacked = _stacked(members, "", chances)
        self._forms = tuple(members)

    def forward(self, x: Float[Tensor, "m n ..."]) -> Any:
        """Apply each member to its own cases; return their outputs stacked."""
        return self.stacked(x)

    @property
    def members(self) -> tuple[nn.Module, ...]:
        """The members as plain modules that share the ensemble's memory, and train with it."""
        stacked = {**dict(self.stacked.named_parameters()), **dict(self.stacked.named_buffers())}
        device = next((t.device for t in stacked.values()), None)
        for i, member in enumerate(self._forms):
            member.to(device)  # not every type of device takes the place of another below
            for name, parameter in member.named_parameters():
                parameter.data = stacked[name].data[i]
            for name, buffer in member.named_buffers():
                buffer.data = stacked[name].data[i]
        return self._forms


def _stacked(
    modules: Sequence[nn.Module], name: str, chances: Sequence[torch.Generator] | None
) -> nn.Module:
    first = modules[0]
    _require_one_form(modules, name)
    if isinstance(first, nn.Sequential):
        parts = OrderedDict(
            (child, _stacked([m.get_submodule(child) for m in modules], f"{name}.{child}", chances))
            for child, _ in first.named_children()
        )
        return nn.Sequential(parts)
    if type(first) is nn.Linear:
        return StackedLinear(modules)
    if chances is not None and (drops := [m for m in modules if type(m) is nn.Dropout]):
        return MemberDropout(drops, chances)
    if not first.state_dict():
        return Memberwise(modules)
    return Vmapped(modules)


def _require_one_form(modules: Sequence[nn.Module], name: str) -> None:
    forms = {
        (
            isinstance(m, nn.Sequential) and tuple(child for child, _ in m.named_children()),
            tuple((key, tuple(t.shape)) for key, t in m.state_dict().items()),
            type(m) if m.state_dict() else None,
        )
        for m in modules
    }
    if len(forms) > 1:
        raise ValueError(
            f"an ensemble's members must have one form, but their {name.lstrip('.') or 'networks'} "
            f"differ: {' and '.join(sorted({str(m) for m in modules}))}"
        )


class StackedLinear(nn.Module):
    """One linear layer of every member."""

    weight: Float[nn.Parameter, "m u d"]
    bias: Float[nn.Parameter, "m u"] | None

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        _take_parameters(self, layers)
        # inputs first in memory, as autograd hands out its gradient: the update is twice as fast
        self.weight.data = self.weight.mT.contiguous().mT
        if "bias" not in self._parameters:
            self.bias = None

    def forward(self, x: Float[Tensor, "m n d"]) -> Float[Tensor, "m n u"]:
        if self.bias is None:
            return torch.bmm(x, self.weight.mT)
        return torch.baddbmm(self.bias[:, None], x, self.weight.mT)


class Memberwise(nn.Module):
    """A module without parameters per member; consecutive members with the same one run as one."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        runs = [list(alike) for _, alike in groupby(modules, key=str)]
        self.distinct = nn.ModuleList(run[0] for run in runs)
        self.sizes = [len(run) for run in runs]

    def forward(self, x: Float[Tensor, "m n ..."]) -> Float[Tensor, "m n ..."]:
        parts = [
            module(part.flatten(0, 1)).unflatten(0, part.shape[:2])
            for module, part in zip(self.distinct, x.split(self.sizes), strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class Vmapped(nn.Module):
    """Any module of every member, through ``torch.func.vmap``.

    On a CPU members run one after the other: there a convolution batched over weights costs several
    times as much. So do members whose batch normalisation communicates with other processes.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        _take_parameters(self, modules)
        self._form = [modules[0]]  # in a list, so that torch does not register its parameters
        self._communicates = any(isinstance(m, SharedBatchNorm) for m in modules[0].modules())

    def forward(self, x: Float[Tensor, "m n ..."]) -> Any:
        one = partial(_called, self._form[0].train(self.training))
        state = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        if x.device.type == "cpu" or self._communicates:
            apart = zip(*(tensor.unbind() for tensor in state.values()), strict=True)
            own = [dict(zip(state, tensors, strict=True)) for tensors in apart]
            outputs = [one(s, cases) for s, cases in zip(own, x.unbind(), strict=True)]
            return tree_map(lambda *each: torch.stack(each), *outputs)
        return vmap(one, randomness="different")(state, x)


def _called(form: nn.Module, state: dict[str, Tensor], x: Tensor) -> Any:
    return functional_call(form, state, (x,))


def _take_parameters(stack: nn.Module, modules: Sequence[nn.Module]) -> None:
    parameters, buffers = stack_module_state(list(modules))
    for name, parameter in parameters.items():
        _holder(stack, name).register_parameter(
            name.rpartition(".")[2], nn.Parameter(parameter.detach())
        )
    for name, buffer in buffers.items():
        _holder(stack, name).register_buffer(name.rpartition(".")[2], buffer)


def _holder(stack: nn.Module, name: str) -> nn.Module:
    """Return the submodule that holds a dotted name; make it, empty, where there is none."""
    for part in name.split(".")[:-1]:
        if part not in dict(stack.named_children()):
            stack.add_module(part, nn.Module())
        stack = stack.get_submodule(part)
    return stack
