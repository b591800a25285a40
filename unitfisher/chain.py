"""Layers in a row: each one's output, after one function, is what the next one receives.

Whoever knows that of a model need not follow its function calls nor copy its outputs: they stand
there when the pass is over, and its graph tells whether it went the same way again.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor

from unitfisher.calls import Call, Seen, version_of


class Link(NamedTuple):
    """What a layer's output goes through before it is received."""

    layer: str
    node: str | None  # of the graph, as autograd names it; None: it goes on as it is
    nonlinearity: str | None


class Chain:
    """The links of a model's passes: learnt from one that was followed, looked up in later ones."""

    def __init__(self) -> None:
        self.links: list[Link] = []
        self.searched = False

    def settle(self, seen: Seen, result: Any) -> None:
        """Take the outputs of a pass that was not followed, or learn from one that was.

        Outputs of a layer behind which the model went another way than before are lost: NaN. All
        passes are followed from then on.

        Args:
            seen: What `capture` saw, with ``follow=not self.links``.
            result: What the model returned.
        """
        if self.links:
            self._look_up(seen, result)
        elif not self.searched and seen.calls:
            self.searched = True
            self.links = _links(seen, result)

    def _look_up(self, seen: Seen, result: Any) -> None:
        expected = iter(self.links)
        for call, received in _with_received(seen, result):
            link = next(expected, None)
            if link is not None and _link(call, received, link.nonlinearity) == link:
                call.take(received, link.nonlinearity, lasting=True)
            else:
                call.lose()
                self.links = []
        seen.retained += [t for call in seen.calls for t in (call.x, call.y) if t.retains_grad]


def _links(seen: Seen, result: Any) -> list[Link]:
    """Learn the links of a pass; none where something else lies between layers."""
    links = []
    for call, received in _with_received(seen, result):
        call.settled()
        link = _link(call, received, call.nonlinearity)
        if link is None or call.output is None or call.output() is not received:
            return []
        links.append(link)
    return links


def _with_received(seen: Seen, result: Any) -> Iterator[tuple[Call, Any]]:
    """Pair each call with what the next one received; the last one with what was returned."""
    following = [later.x for later in seen.calls[1:]]
    return zip(seen.calls, [*following, result], strict=True)


def _link(call: Call, received: Any, nonlinearity: str | None) -> Link | None:
    """Read from the graph by what one function a layer's output became what was received."""
    if call.edge is None or not isinstance(received, Tensor) or received.shape != call.shape:
        return None
    node, own = received.grad_fn, received is call.y
    if own and node is call.edge.node:
        unchanged = version_of(received) == call.y_version
        return Link(call.layer, None, nonlinearity) if unchanged else None
    once = version_of(received) == (call.y_version + 1 if own else 0)
    if node is None or not once or [of for of, _ in node.next_functions] != [call.edge.node]:
        return None
    return Link(call.layer, node.name(), nonlinearity)
