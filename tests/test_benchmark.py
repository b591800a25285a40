import json
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import benchmark
import benchmark_apart
import benchmark_cases as cases
import benchmark_measure as measuring
import benchmark_memory
import benchmark_photographs as photographs
import benchmark_results as results
import benchmark_shares as shares
import benchmark_timing as timing
import benchmark_training as training
import pytest
import torch
from benchmark_rows import ROWS, Row, peer
from torch import nn

from unitfisher.experiments.presets import PRESETS

EFFORT = timing.Effort(0.0, least=2)
QUICK = ("mnist-64/hooks", "mnist-64/all-sign", "mnist-512/natural-128")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    assert benchmark.main(benchmark.Config(rows=QUICK, quick=True, out=folder)) == 0
    return folder


def test_json_has_every_row_asked_for_and_the_conditions(made: Path) -> None:
    record = json.loads((made / "benchmark.json").read_text())
    assert [row["key"] for row in record["rows"]] == list(QUICK)
    assert {"config", "versions", "device", "threads", "compiled_kernel", "finished"} <= set(record)
    assert record["config"]["quick"] is True


def test_json_has_ratio_spread_and_times_of_a_measured_row(made: Path) -> None:
    hooks = json.loads((made / "benchmark.json").read_text())["rows"][0]
    assert hooks["low"] <= hooks["high"]
    assert hooks["value"] == pytest.approx(hooks["ms"] / hooks["plain_ms"])
    assert (hooks["bar"], hooks["stretch"], hooks["rounds"]) == (1.01, 1.0, 2)


def test_an_unknown_row_is_named_with_its_neighbours() -> None:
    with pytest.raises(benchmark.BadUseError, match=r"'mnist-64/hoks'.*mnist-64/hooks"):
        benchmark.choose(ROWS, ["mnist-64/hoks"])


def test_time_on_the_cores_is_counted_for_one_thread_only() -> None:
    with pytest.raises(benchmark.BadUseError, match="needs --threads 1"):
        benchmark.Config(clock="cpu")


def test_a_pattern_chooses_rows_in_their_order() -> None:
    chosen = [row.key for row in benchmark.choose(ROWS, ["*training/*", "*/hooks"])]
    trainings = ["training/every-50th", "long-training/overhead"]
    beside = [each for key in trainings for each in (key, f"{key}-torch")]
    assert chosen == ["mnist-64/hooks", *beside]


def test_names_of_rows_and_rivals_are_unique() -> None:
    keys = [each.key for row in ROWS for each in (row, *row.rivals)]
    assert len(keys) == len(set(keys))


def taking(seconds: dict[str, float], effort: timing.Effort) -> tuple[str, timing.Seconds]:
    calls, now = [], [0.0]

    def run(name: str) -> None:
        calls.append(name)
        now[0] += seconds[name]

    candidates = {name: timing.Candidate(partial(run, name), t) for name, t in seconds.items()}
    times = timing.interleave(candidates, effort, clock=lambda: now[0])
    return "".join(calls), times


def test_candidates_take_turns_and_each_round_begins_with_another() -> None:
    calls, _ = taking({"p": 1.0, "a": 1.0, "b": 1.0}, timing.Effort(0.0, least=3))
    assert calls == "pab" + "abp" + "bpa"


def test_fast_candidates_are_repeated_within_their_turn() -> None:
    calls, times = taking({"p": timing.TURN / 4}, timing.Effort(0.0, least=1))
    assert calls == "p" * 5  # one more, untimed, to come back into the cache
    assert times["p"] == [pytest.approx(timing.TURN / 4)]


def test_rounds_end_when_the_time_is_over() -> None:
    _, times = taking({"p": 2.0}, timing.Effort(9.0))
    assert len(times["p"]) == 5


def test_ratio_is_of_medians_over_undisturbed_rounds() -> None:
    times = {"plain": [1.0, 1.0, 1.2, 9.0, 1.0], "a": [2.0, 2.2, 3.0, 90.0, 2.1]}
    ratio = timing.compare(times, "a")
    assert (ratio.value, ratio.ms, ratio.of_ms) == pytest.approx((2.15, 2150.0, 1000.0))
    assert (ratio.low, ratio.high) == pytest.approx((2.075, 2.275))
    assert (ratio.rounds, ratio.discarded, ratio.disturbed) == (5, 1, False)


def test_rounds_that_disagree_are_called_disturbed() -> None:
    times = {"plain": [1.0] * 4, "a": [1.0, 2.0, 3.0, 4.0]}
    assert timing.compare(times, "a").disturbed


def test_rival_is_divided_by_the_row() -> None:
    times = {"plain": [1.0] * 3, "mine": [2.0] * 3, "rival": [50.0] * 3}
    ratio = timing.faster(times, "mine", "rival")
    assert (ratio.value, ratio.ms, ratio.of_ms) == pytest.approx((25.0, 2000.0, 50000.0))


@pytest.mark.parametrize(
    ("kind", "value", "verdict"),
    [
        ("turns", 1.9, "stretch"),
        ("turns", 2.5, "met"),
        ("turns", 3.1, "missed"),
        ("contest", 3.1, "met"),
        ("contest", 1.9, "missed"),
    ],
)
def test_verdict(kind: results.Kind, value: float, verdict: str) -> None:
    stretch = 4.0 if kind == "contest" else 2.0
    row = Row(cases.MNIST_64, "row", "", None, 3.0, stretch, kind)
    assert results.judge(row, value) == verdict


def tiny() -> cases.Batch:
    return nn.Linear(3, 10), torch.zeros(4, 3), torch.zeros(4, dtype=torch.long)


TINY = cases.Case("tiny", "tiny net", tiny, cases.plain_step)


def broken(at: cases.Setting) -> cases.Run:
    raise ImportError("no such library\nand more of it")


def slept(seconds: float, at: cases.Setting) -> cases.Run:
    return partial(time.sleep, seconds)


def test_a_peer_that_fails_is_listed_with_its_error() -> None:
    found = measuring.take_turns([peer(TINY, "peer", "peer", broken)], "cpu", EFFORT)
    assert [(r.verdict, r.note) for r in found] == [("failed", "ImportError: no such library")]


def test_a_failure_of_our_own_is_not_hidden() -> None:
    with pytest.raises(ImportError, match="no such library"):
        measuring.take_turns([Row(TINY, "own", "own", broken)], "cpu", EFFORT)


def test_a_contest_is_decided_by_the_fastest_rival() -> None:
    rivals = tuple(
        peer(TINY, name, f"... by {name}", prepare)
        for name, prepare in {
            "slow": partial(slept, 0.1),
            "fast": partial(slept, 0.05),
            "broken": broken,
        }.items()
    )
    row = Row(TINY, "row", "row", partial(slept, 0.02), 1.0, None, "contest", rivals)
    mine, *others = measuring.contest(row, "cpu", EFFORT)
    assert mine.note.startswith("against fast")
    assert [other.verdict for other in others] == ["", "", "failed"]


@pytest.mark.skipif(not benchmark_memory.CLEAR.exists(), reason="peaks are Linux's here")
def test_peak_of_memory_is_that_of_one_call() -> None:
    def prepare(at: cases.Setting) -> cases.Run:
        return lambda: torch.ones(2**24) + torch.ones(2**24)

    found = benchmark_apart.peak(Row(TINY, "row", "row", prepare, 4.0, kind="result"), "cpu")
    assert found.value == pytest.approx(3.0, abs=0.1)


def test_a_process_that_takes_too_long_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "LIMIT", 0.0)
    (row,) = benchmark.choose(ROWS, ["fc-4096/memory"])
    (found,) = measuring.apart(row, "cpu", EFFORT)
    assert (found.verdict, found.note) == ("failed", "took more than 0 s")


def test_a_process_on_a_gpu_has_more_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "LIMIT", 1e9)
    monkeypatch.setattr(measuring, "LIMIT_ON_GPU", 0.5)
    (row,) = benchmark.choose(ROWS, ["imagenet-15/measure"])
    (found,) = measuring.apart(row, "cuda", replace(EFFORT, patience=0.25))
    assert (found.verdict, found.note) == ("failed", "took more than 1 s")


def test_rates_are_of_what_is_read_after_the_store() -> None:
    taken: list[int] = []
    rates = photographs.sustained(map(taken.append, range(100)), 4, rounds=2)
    assert len(rates) == 2
    assert len(taken) == photographs.AHEAD + 2 * photographs.BATCHES


@pytest.mark.slow
def test_photographs_are_read_and_trained_on_in_every_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(photographs, "MADE_UP", 16)
    monkeypatch.setitem(sys.modules, "nvidia", None)
    config = training.Config(network="nin", crop=32, batch=2, rounds=2, out=tmp_path)
    rows = training.of_photographs(config)
    names = [row.key.removeprefix("photographs/") for row in rows]
    assert names == ["here", "workers", "dali", "alone", "read", "step", "measurement"]
    assert [row.verdict for row in rows] == ["", "", "failed", *[""] * 4]
    training.save(rows, config, 1.0)
    assert "NVIDIA DALI" in (tmp_path / "benchmark.md").read_text()


@pytest.mark.parametrize("name", ["dense", "images"])
def test_the_monitors_share_is_of_a_whole_training(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {"seeds": (0, 1), "probe": 8, "units": 2, "rows": 8, "measurements": 2, "batch_size": 10}
    dense = replace(PRESETS["mnist"], hidden=(4, 3), activations=("relu", "elu"), epochs=3, **few)
    images = replace(PRESETS["cifar100-11"], iterations=30, every=10, tested=8, **few)
    monkeypatch.setattr(shares, "PRESETS", {"dense": dense, "images": images})
    monkeypatch.setattr(shares, "MNIST", (40, 784))
    monkeypatch.setattr(shares, "CIFAR", (40, 3, 8, 8))
    (row,) = shares.of_shares(training.Config(shares=(name,), rounds=2))
    networks, steps = {"dense": (4, 12), "images": (2, 30)}[name]
    assert row.note.startswith(f"{networks} networks, {steps} steps in ")
    assert 0 < row.value < 100
