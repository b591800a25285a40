"""From rows to results: prepare what a group times, let it take turns, judge it by its bars."""

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import torch
from benchmark_cases import Case
from benchmark_peers import hush
from benchmark_results import Result, failed, grown, timed
from benchmark_rows import Row
from benchmark_scaling import growth
from benchmark_timing import PLAIN, Candidate, Effort, compare, faster, interleave

BANDS = (0, 5, 50, float("inf"))  # in plain steps: only rows of similar duration take turns
BLOCKS = 40  # rounds of a long training
LIMIT, LIMIT_ON_GPU = 180, 600  # seconds for a process; networks for GPUs are larger


def measure_all(rows: Sequence[Row], device: str, effort: Effort) -> Iterator[list[Result]]:
    """Yield the results of one group after another."""
    by_case: dict[str, list[Row]] = {}
    others: list[Row] = []
    for row in rows:
        group = others if row.kind != "turns" else by_case.setdefault(row.case.name, [])
        group.append(row)
    for group in by_case.values():
        yield take_turns(group, device, effort)
    for row in others:
        yield OTHERWISE[row.kind](row, device, effort)


def take_turns(rows: Sequence[Row], device: str, effort: Effort) -> list[Result]:
    """Measure the rows of one case, those of similar duration together."""
    named = {row.key: row for row in rows}
    results: list[Result] = []
    with ExitStack() as after:
        ready, errors = prepare(rows[0].case, rows, device, after)
        results += [failed(named[key], error) for key, error in errors.items()]
        plain = ready.pop(PLAIN)
        for low, high in pairwise(limit * plain.seconds for limit in BANDS):
            part = {key: each for key, each in ready.items() if low <= each.seconds < high}
            if part:
                times = interleave({PLAIN: plain, **part}, effort)
                results += [timed(named[key], compare(times, key)) for key in part]
    return results


def contest(row: Row, device: str, effort: Effort) -> list[Result]:
    """Say how often the row fits into the time of its fastest rival."""
    rivals = {rival.key: rival for rival in row.rivals}
    with ExitStack() as after:
        ready, errors = prepare(row.case, [row, *row.rivals], device, after)
        times = interleave(ready, effort)
    lost = [failed(rivals[key], error) for key, error in errors.items()]
    others = [timed(rivals[key], compare(times, key)) for key in ready if key in rivals]
    if not others:
        return [failed(row, "no rival ran"), *lost]
    fastest = min(others, key=lambda result: result.ms or math.inf)
    steps = compare(times, row.key).value
    note = f"against {rivals[fastest.key].title.split(' by ')[1]}; itself {steps:.3g} plain steps"
    return [timed(row, faster(times, row.key, fastest.key), note), *others, *lost]


def total(row: Row, device: str, effort: Effort) -> list[Result]:
    """Compare means, not medians: only few of the rounds contain a measurement."""
    if effort.most >= BLOCKS:
        effort = replace(effort, least=BLOCKS, most=BLOCKS)
    with ExitStack() as after:
        ready, _ = prepare(row.case, [row], device, after)
        times = interleave(ready, effort)
    return [timed(row, compare(times, row.key, middle=fmean))]


def prepare(
    case: Case, rows: Sequence[Row], device: str, after: ExitStack
) -> tuple[dict[str, Candidate], dict[str, str]]:
    """Warm up the plain step and every row; errors of other libraries are returned by row."""
    errors: dict[str, str] = {}
    if any(row.peer for row in rows):
        hush()
    ready = {PLAIN: Candidate.warmed(case.plain(case.on(device, after)))}
    for row in rows:
        try:
            ready[row.key] = Candidate.warmed(row.prepare(case.on(device, after)), row.threads)
        except Exception as error:
            if not row.peer:
                raise
            errors[row.key] = f"{type(error).__name__}: {error}".partition("\n")[0]
    return ready, errors


def apart(row: Row, device: str, effort: Effort) -> list[Result]:
    """Measure in a process of its own."""
    script = Path(__file__).with_name("benchmark_apart.py")
    asked = row.key, device, str(torch.get_num_threads()), json.dumps(asdict(effort))
    command = [sys.executable, str(script), *asked]
    limit = (LIMIT if device == "cpu" else LIMIT_ON_GPU) + effort.patience
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return [failed(row, f"took more than {limit:.0f} s")]
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return [failed(row, lines[-1] if lines else f"ended with code {done.returncode}")]
    return [Result(**json.loads(done.stdout.splitlines()[-1]))]


def scaling(row: Row, device: str, effort: Effort) -> list[Result]:
    """Fit the growth with one size, in a third of the time: it has fewer candidates."""
    less = replace(effort, seconds=effort.seconds / 3)
    return [grown(row, growth(row.name, row.prepare, device, less))]


OTHERWISE: Mapping[str, Callable[[Row, str, Effort], list[Result]]] = {
    "contest": contest,
    "total": total,
    "alone": apart,
    "GiB": apart,
    "result": apart,
    "step": apart,
    "scaling": scaling,
}
