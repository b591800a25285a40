"""Layers in a row: each one's output, after one function, is what the next one receives.

Whoever knows that of a model need not follow its function calls nor copy its outputs: they stand
there when the pass is over, and its graph tells whether it went the same way again.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor

from unitfisher.calls import Call, Seen, version_of

SAME = "as it is"


class Link(NamedTuple):
    """What a layer's output goes through before it is received."""

    layer: str
    way: str
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
        if not seen.calls:
            return
        if self.links:
            self._look_up(seen, result)
        elif not self.searched:
            self.searched = True
            self.links = _links(seen, result)
        if self.links:  # it is a row
            seen.row = [received for _, received in _with_received(seen, result)]

    def _look_up(self, seen: Seen, result: Any) -> None:
        expected = iter(self.links)
        for call, received in _with_received(seen, result):
            link = next(expected, None)
            if link is not None and call.layer == link.layer and _way(call, received) == link.way:
                call.take(received, link.nonlinearity, lasting=True)
            else:
                call.lose()
                self.links = []
            standing = call.x, call.y, received
            seen.retained += [t for t in standing if isinstance(t, Tensor) and t.retains_grad]


def _links(seen: Seen, result: Any) -> list[Link]:
    """Learn the links of a pass; none where something else lies between layers."""
    links = []
    for call, received in _with_received(seen, result):
        call.settled()
        way = _way(call, received)
        if way is None or call.output is None or call.output() is not received:
            return []
        links.append(Link(call.layer, way, call.nonlinearity))
    return links


def _with_received(seen: Seen, result: Any) -> Iterator[tuple[Call, Any]]:
    """Pair each call with what the next one received; the last one with what was returned."""
    following = [later.x for later in seen.calls[1:]]
    return zip(seen.calls, [*following, result], strict=True)


def _way(call: Call, received: Any) -> str | None:
    """Read from the graph by what one function a layer's output became what was received.

    Returns:
        Its node, as autograd names it; SAME for none; None for any other way.
    """
    if call.edge is None or not isinstance(received, Tensor) or received.shape != call.shape:
        return None
    own, node, layer = received is call.y, received.grad_fn, call.edge.node
    version = version_of(received)
    if own and node is layer:
        return SAME if version == call.y_version else None
    if node is None or version != (call.y_version + 1 if own else 0):
        return None
    before = node.next_functions
    return node.name() if len(before) == 1 and before[0][0] is layer else None
