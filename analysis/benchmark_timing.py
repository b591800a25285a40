"""Time candidates by turns, and compare them within one run.

On a shared machine absolute times mean little and ratios of separate runs less. So candidates
take turns, round after round, together with the plain step; a round in which the plain step was
slow was disturbed, and is discarded.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median, quantiles

import torch

PLAIN = "plain"
DISTURBED = 1.5  # slow round: × the median plain step; disturbed ratio: upper / lower quartile
BUSY = 0.1  # cores: at most this is quiet
TURN = 0.03  # seconds: faster candidates are repeated, after one call that is not timed

Clock = Callable[[], float]
Seconds = dict[str, list[float]]  # per candidate, one entry a round


@dataclass(frozen=True)
class Candidate:
    """Something to be timed, with a number of CPU threads of its own if it needs that."""

    run: Callable[[], object]
    seconds: float  # of one call, roughly
    threads: int | None = None

    @classmethod
    def warmed(cls, run: Callable[[], object], threads: int | None = None) -> "Candidate":
        """Call it twice: the first call allocates, the second is timed."""
        with threads_of(threads):
            run()
            start = device_clock()
            run()
            return cls(run, device_clock() - start, threads)

    @property
    def repeats(self) -> int:
        return max(1, round(TURN / max(self.seconds, 1e-9)))


@dataclass(frozen=True)
class Ratio:
    """How many times longer one candidate takes than another (by medians), and its spread."""

    value: float
    low: float  # quartiles of the rounds' own ratios
    high: float
    ms: float  # of one call
    of_ms: float  # of one call of the other candidate
    rounds: int
    discarded: int

    @property
    def disturbed(self) -> bool:
        """Whether other work on the machine makes the ratio meaningless."""
        return 2 * self.discarded > self.rounds or self.high > DISTURBED * self.low


@dataclass(frozen=True)
class Effort:
    """When to stop: after ``seconds``, but not before ``least`` nor after ``most`` rounds."""

    seconds: float = 12.0
    least: int = 3
    most: int = 200
    patience: float = 0.0  # seconds to wait for a quiet machine first
    cpu: bool = False  # count this process's own time on the cores


def interleave(
    candidates: Mapping[str, Candidate], effort: Effort, clock: Clock | None = None
) -> Seconds:
    """Time all candidates round by round; each round begins with another one.

    Args:
        candidates: By name, warmed up.
        effort: When to stop.
        clock: Seconds; None: the one that the effort asks for.
    """
    clock = clock or (time.process_time if effort.cpu else device_clock)
    await_quiet(effort.patience)
    names = list(candidates)
    times: Seconds = {name: [] for name in names}
    end, rounds = clock() + effort.seconds, 0
    while rounds < effort.least or (rounds < effort.most and clock() < end):
        first = rounds % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(_turn(candidates[name], clock))
        rounds += 1
    return times


def compare(
    times: Seconds, name: str, to: str = PLAIN, middle: Callable[[list[float]], float] = median
) -> Ratio:
    """Divide medians (or means) over the rounds whose plain step was undisturbed."""
    usual = median(times[PLAIN])
    kept = [i for i, t in enumerate(times[PLAIN]) if t <= DISTURBED * usual]
    mine, others = ([times[which][i] for i in kept] for which in (name, to))
    ratios = [a / b for a, b in zip(mine, others, strict=True)]
    low, _, high = quantiles(ratios, n=4, method="inclusive") if len(kept) > 1 else ratios * 3
    a, b = middle(mine), middle(others)
    rounds = len(times[PLAIN])
    return Ratio(a / b, low, high, 1e3 * a, 1e3 * b, rounds, rounds - len(kept))


def faster(times: Seconds, name: str, rival: str) -> Ratio:
    """How often ``name`` fits into its rival's time."""
    ratio = compare(times, rival, name)
    return replace(ratio, ms=ratio.of_ms, of_ms=ratio.ms)


def device_clock() -> float:
    """Seconds, read when the device has done everything asked of it."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def await_quiet(patience: float) -> None:
    """Wait until nothing else runs on the machine, for at most ``patience`` seconds."""
    end = time.perf_counter() + patience
    while time.perf_counter() < end and _busy_cores(0.5) > BUSY:
        pass


def _busy_cores(seconds: float) -> float:
    """How many cores are at work while this process sleeps; 0 where that cannot be told."""
    before = _ticks()
    time.sleep(seconds)
    return (_ticks() - before) / (100 * seconds)


def _ticks() -> int:
    """Hundredths of a second that cores were at work since the start."""
    path = Path("/proc/stat")
    if not path.exists():
        return 0
    user, nice, system, _, _, *interrupts = map(int, path.read_text().split()[1:8])
    return user + nice + system + sum(interrupts)


@contextmanager
def threads_of(number: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if number is not None:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        if number is not None:
            torch.set_num_threads(before)


def _turn(candidate: Candidate, clock: Clock) -> float:
    with threads_of(candidate.threads):
        if candidate.repeats > 1:
            candidate.run()  # brings its weights back into the cache
        start = clock()
        for _ in range(candidate.repeats):
            candidate.run()
        return (clock() - start) / candidate.repeats
