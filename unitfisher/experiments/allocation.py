"""Memory that a training gives back and takes again at every step."""

import ctypes

# mallopt's parameters, as glibc's malloc.h numbers them
TRIM_THRESHOLD, MMAP_MAX = -1, -4
NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let this process keep what it frees for what it allocates next.

    glibc gives large pieces back to the system, which clears every page anew when they are asked
    for again: for the gradients of an ensemble that is a tenth of a step on a CPU. A process that
    trains and does nothing else has no use for giving back.

    Returns:
        Whether that was set: False where the C library has no such setting.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(MMAP_MAX, 0) and mallopt(TRIM_THRESHOLD, NEVER))
