"""The linear products inside ``nn.MultiheadAttention``, for which it calls no module.

Its forward calls ``F.linear`` with the weights; `WatchedLinear` replaces that while it runs.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import torch.nn.functional as F
from torch import Tensor, nn

APART: Final = (
    "whose queries, keys and values are not one tensor, while all units of a layer must receive "
    "the same input: pass one tensor for all three"
)


class Projection(nn.Linear):
    """One of the products, as a linear layer with the attention's own parameters; never called.

    Args:
        attention: The attention that computes the product.
        part: "in_proj", whose units compute queries, keys and values, a third each, from the
            attention's input; or "out_proj".
    """

    attention: nn.MultiheadAttention
    part: str

    def __init__(self, attention: nn.MultiheadAttention, part: str) -> None:
        nn.Module.__init__(self)
        vars(self).update(attention=attention, part=part)  # so that torch registers no submodule
        self.renew()

    def renew(self) -> None:
        """Take the attention's present parameters."""
        self._parameters.update(_products(self.attention)[self.part])
        self.out_features, self.in_features = self.weight.shape

    def __eq__(self, other: object) -> bool:
        """Compare by attention and part: every `named_layers` makes new objects."""
        return isinstance(other, Projection) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @property
    def _key(self) -> tuple[nn.Module, str]:
        return self.attention, self.part


def named_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield a model's modules by name, and the products of its attentions as further modules."""
    products: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            prefix = f"{name}." if name else ""
            projections = {prefix + part: Projection(module, part) for part in _products(module)}
            yield name, module
            yield from projections.items()
            products |= projections
        elif name not in products:  # not the real out_proj, which only holds parameters
            yield name, module


def in_products(attention: nn.MultiheadAttention) -> set[nn.Parameter | None]:
    """Return the parameters of an attention's products."""
    return {p for parameters in _products(attention).values() for p in parameters.values()}


def _products(attention: nn.MultiheadAttention) -> dict[str, dict[str, nn.Parameter | None]]:
    """Return weight and bias of each product whose weight is one plain, not computed, parameter."""
    own, out = attention._parameters, attention.out_proj._parameters
    found = {
        "in_proj": {"weight": own.get("in_proj_weight"), "bias": own.get("in_proj_bias")},
        "out_proj": {"weight": out.get("weight"), "bias": out.get("bias")},
    }
    return {part: pair for part, pair in found.items() if pair["weight"] is not None}


class WatchedLinear:
    """Replaces ``F.linear`` from `begin` to `end`, while one attention's forward runs.

    Args:
        projections: The attention's observed products, by layer name.
        note: Called with name, layer, input and output of a product; samples are the first axis.
        refuse: Called with a layer's name, and the reason why its call cannot be observed.
    """

    def __init__(
        self,
        projections: Mapping[str, Projection],
        note: Callable[[str, nn.Module, Tensor, Tensor], None],
        refuse: Callable[[str, str], None],
    ) -> None:
        self.by_part = {layer.part: (name, layer) for name, layer in projections.items()}
        self.attention = next(iter(projections.values())).attention
        self.note, self.refuse = note, refuse
        self.linear, self._stands, self._samples = F.linear, False, 0
        for layer in projections.values():
            layer.renew()

    def begin(self, *_: object) -> None:
        if not self._stands:
            self.linear, F.linear, self._stands = F.linear, self, True

    def end(self, *_: object) -> None:
        if self._stands:
            F.linear, self._stands = self.linear, False

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Multiply, and note the product; attention has axes (positions, samples, features)."""
        y: Tensor = self.linear(*args, **kwargs)
        if len(args) < 2:
            return y  # another thread's call: attention passes the weight by position
        x, weight = args[:2]
        parameters, out = self.attention._parameters, self.attention.out_proj._parameters
        packed = parameters.get("in_proj_weight")
        if weight is out.get("weight"):
            x, z = (t.unflatten(0, (-1, self._samples)) for t in (x, y))
            return self._noted("out_proj", x, z).flatten(0, 1)
        if weight is packed:
            self._samples = x.shape[1]
            return self._noted("in_proj", x, y)
        if packed is not None and weight._base is packed:  # x is the input of some units
            self._samples = x.shape[1]
            if "in_proj" in self.by_part:
                self.refuse(self.by_part["in_proj"][0], APART)
        elif weight is parameters.get("q_proj_weight"):
            self._samples = x.shape[1]
        return y

    def _noted(self, part: str, x: Tensor, y: Tensor) -> Tensor:
        """Note a product; return y as a view of the noted tensor, so that errors arrive there."""
        if part not in self.by_part:
            return y
        y = y.transpose(0, 1)
        self.note(*self.by_part[part], x.transpose(0, 1), y)
        return y.transpose(0, 1)
