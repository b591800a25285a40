"""Models that are a chain: a layer's output, after at most one function, is the next one's input.

For such a model function calls need not be followed, nor outputs copied: outputs still exist after
the pass, and its graph shows whether it took the same path as the pass before.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor

from unitfisher.calls import Call, Seen, version_of

SAME = "as it is"


class Link(NamedTuple):
    """The function between a layer's output and the next layer's input."""

    layer: str
    way: str  # its autograd node, or SAME for none
    nonlinearity: str | None


class Chain:
    """A model's links: learnt from one pass that was followed, and checked in later ones."""

    def __init__(self) -> None:
        self.links: list[Link] = []
        self.searched = False

    def settle(self, seen: Seen, result: Any) -> None:
        """Take the outputs of a pass that was not followed, or learn the links from one that was.

        Where the model took another path behind a layer, that layer's outputs are lost (NaN), and
        all later passes are followed.

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
        if self.links:  # the model is a chain
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
    """Return the links of a pass; none if more than one function lies between two layers."""
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
    """Return the one function that turned a layer's output into ``received``, as the graph says.

    Returns:
        The name of its autograd node; SAME if there is none; None for any other path.
    """
    if call.edge is None or not isinstance(received, Tensor) or received.shape != call.shape:
        return None
    same, node, layer = received is call.y, received.grad_fn, call.edge.node
    version = version_of(received)
    if same and node is layer:
        return SAME if version == call.y_version else None
    if node is None or version != (call.y_version + 1 if same else 0):
        return None
    before = node.next_functions
    return node.name() if len(before) == 1 and before[0][0] is layer else None
