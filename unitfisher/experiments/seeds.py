"""Seeds of generators that must not repeat one another's numbers."""

from typing import Final

import numpy as np

CROPS: Final = 2**30  # what a generator draws; above all numbers of epochs
MASKS: Final = 2**30 + 1


def mixed(*numbers: int) -> int:
    """Derive a seed from several numbers, of 32 bits: on a CPU torch reads no more of them."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
