"""When measuring is due: its time stays within its share of the training time."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unitfisher.schedule import Overhead, due


class Clock:
    """Time as the test lets it pass."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def train(overhead: Overhead, clock: Clock, plain: list[float], cost: float) -> list[int]:
    measured = []
    for step, seconds in enumerate(plain):
        if due(overhead, step):
            measured.append(step)
            clock.now += cost
        clock.now += seconds
    return measured


@given(
    share=st.floats(0.01, 0.5),
    step=st.floats(1e-3, 1.0),
    cost=st.floats(0.1, 100.0),
)
def test_measuring_takes_its_share_of_the_training_time(share, step, cost):
    clock = Clock()
    steps = min(20 * int(cost / share) + 20, 20_000)
    measured = train(Overhead(share, clock), clock, [step] * steps, cost * step)
    spent, allowed = len(measured) * cost, share * steps
    assert measured[0] == 0
    assert min(allowed, steps * cost) - 2 * cost - 1 <= spent <= allowed + 2 * cost


def test_a_pause_does_not_pay_for_measurements():
    clock = Clock()
    plain = [1.0] * 10 + [1000.0] + [1.0] * 10
    assert train(Overhead(0.05, clock), clock, plain, cost=2.0) == [0]


def test_a_pause_after_a_measured_step_is_not_its_cost():
    plain = [1.0] * 60
    clock = Clock()
    undisturbed = train(Overhead(0.25, clock), clock, plain, cost=1.0)
    plain[undisturbed[1]] = 1000.0
    disturbed = train(Overhead(0.25, clock), clock, plain, cost=1.0)
    assert len(undisturbed) - 2 <= len(disturbed) < len(undisturbed)


def test_a_measurement_that_costs_nothing_is_made_each_time():
    clock = Clock()
    assert train(Overhead(0.05, clock), clock, [1.0] * 9, cost=0.0) == [0, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize(
    ("schedule", "expected"), [(3, [0, 3, 6]), (lambda s: s in (1, 5), [1, 5])]
)
def test_a_number_or_a_predicate_decides(schedule, expected):
    assert [step for step in range(8) if due(schedule, step)] == expected


class Gpu:
    """Works behind the clock, until so much is queued that the host has to wait."""

    def __init__(self, clock: Clock, queue: float) -> None:
        self.clock, self.queue, self.done = clock, queue, clock.now

    def launch(self, seconds: float) -> None:
        self.clock.now += 0.01 * seconds
        self.done = max(self.done, self.clock.now) + seconds
        self.clock.now = max(self.clock.now, self.done - self.queue)

    def wait(self) -> None:
        self.clock.now = max(self.clock.now, self.done)


@pytest.mark.parametrize("queue", [0.0, 3.0, 30.0])
@pytest.mark.parametrize("cost", [0.5, 8.0])
def test_work_that_a_gpu_does_later_counts_where_it_was_asked_for(queue, cost):
    clock = Clock()
    gpu, measured = Gpu(clock, queue), 0
    overhead = Overhead(0.05, clock, gpu.wait)
    for step in range(2000):
        if due(overhead, step):
            measured += 1
            gpu.launch(cost)
        gpu.launch(1.0)
    # waiting interrupts the queue: steps look shorter than they are, and measurements dearer
    assert 60 <= measured * cost <= 100 + 2 * cost
