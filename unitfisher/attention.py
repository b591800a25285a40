"""The products inside ``nn.MultiheadAttention``, which calls no module for them.

Its forward hands the weights to ``F.linear``; there they are seen, as long as that forward runs.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import torch.nn.functional as F
from torch import Tensor, nn

APART: Final = (
    "whose queries, keys and values are not one tensor: units of one layer see the same, and these "
    "do not"
)


class Projection(nn.Linear):
    """One of the products, as a linear layer with the attention's own parameters; never called.

    Args:
        attention: In which it is computed.
        part: "in_proj", of which a third of the units each makes queries, keys and values of what
            the attention receives; or "out_proj".
    """

    attention: nn.MultiheadAttention
    part: str

    def __init__(self, attention: nn.MultiheadAttention, part: str) -> None:
        nn.Module.__init__(self)
        vars(self).update(attention=attention, part=part)  # not as a module inside this one
        self.renew()

    def renew(self) -> None:
        """Take the parameters that the attention has now."""
        self._parameters.update(_products(self.attention)[self.part])
        self.out_features, self.in_features = self.weight.shape

    def __eq__(self, other: object) -> bool:
        """Say whether it is the same product, whoever asked for it."""
        return isinstance(other, Projection) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @property
    def _key(self) -> tuple[nn.Module, str]:
        return self.attention, self.part


def named_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield a model's modules by name, and the products of its attentions as if they were some."""
    products: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            prefix = f"{name}." if name else ""
            own = {prefix + part: Projection(module, part) for part in _products(module)}
            yield name, module
            yield from own.items()
            products |= own
        elif name not in products:  # the one called out_proj only holds parameters
            yield name, module


def in_products(attention: nn.MultiheadAttention) -> set[nn.Parameter | None]:
    """Return the parameters of its products."""
    return {p for own in _products(attention).values() for p in own.values()}


def _products(attention: nn.MultiheadAttention) -> dict[str, dict[str, nn.Parameter | None]]:
    """Return weight and bias of each product whose weight is one parameter, and not computed."""
    own, out = attention._parameters, attention.out_proj._parameters
    found = {
        "in_proj": {"weight": own.get("in_proj_weight"), "bias": own.get("in_proj_bias")},
        "out_proj": {"weight": out.get("weight"), "bias": out.get("bias")},
    }
    return {part: of for part, of in found.items() if of["weight"] is not None}


class Watch:
    """Stands in for ``F.linear`` from `begin` to `end`, while one attention's forward runs.

    Args:
        projections: Of that attention, by name.
        note: Called with name, layer, x and y of a call, which have samples first.
        refuse: Called with the name of a layer, and why a call of it shows nothing.
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
        self.linear, F.linear, self._stands = F.linear, self, True

    def end(self, *_: object) -> None:
        if self._stands:
            F.linear, self._stands = self.linear, False

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Multiply, and note it; attention has positions first, and samples second."""
        y: Tensor = self.linear(*args, **kwargs)
        if len(args) < 2:
            return y  # of another thread: attention gives them in order
        x, weight = args[:2]
        own, out = self.attention._parameters, self.attention.out_proj._parameters
        packed = own.get("in_proj_weight")
        if weight is out.get("weight"):
            x, z = (t.unflatten(0, (-1, self._samples)) for t in (x, y))
            return self._noted("out_proj", x, z).flatten(0, 1)
        if weight is packed:
            self._samples = x.shape[1]
            return self._noted("in_proj", x, y)
        if packed is not None and weight._base is packed:  # some rows of it, for x alone
            self._samples = x.shape[1]
            if "in_proj" in self.by_part:
                self.refuse(self.by_part["in_proj"][0], APART)
        elif weight is own.get("q_proj_weight"):
            self._samples = x.shape[1]
        return y

    def _noted(self, part: str, x: Tensor, y: Tensor) -> Tensor:
        """Return y, led through what was noted, at which errors arrive then."""
        if part not in self.by_part:
            return y
        y = y.transpose(0, 1)
        self.note(*self.by_part[part], x.transpose(0, 1), y)
        return y.transpose(0, 1)
