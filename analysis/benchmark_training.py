"""How fast do the trainings go, and what do their Monitors take of the time?

    python analysis/benchmark_training.py

times an ensemble against its members one after the other, the loaders of photographs, the
networks alone and both together, and the Monitors' share of whole trainings at their schedules.
"""

import time
from collections.abc import Sequence
from dataclasses import replace

import tyro
from benchmark_photographs import of_photographs
from benchmark_report import write
from benchmark_results import Result
from benchmark_shares import of_shares
from benchmark_steps import of_cifar, of_ensemble
from benchmark_trainers import Config

from unitfisher.experiments import scripts
from unitfisher.experiments.allocation import keep_freed_memory
from unitfisher.provenance import plain, provenance


def main(config: Config) -> None:
    """Measure, and save after each group of rows."""
    start, results = time.perf_counter(), []
    for measure in (of_ensemble, of_cifar, of_photographs, of_shares):
        results += measure(config)
        save(results, config, time.perf_counter() - start)
    print((config.folder / "benchmark.md").read_text())


def save(results: Sequence[Result], config: Config, seconds: float) -> None:
    """Write benchmark.json and benchmark.md."""
    record = provenance(plain(replace(config, out=None))) | {"seconds": round(seconds, 1)}
    sentence = (
        f"{record['device']}; torch {record['versions']['torch']}; {record['created']}, "
        f"{seconds:.0f} s. Medians with quartiles over rounds; all data are made up; "
        f"{config.precision}{', compiled' if config.compile else ''}."
    )
    write(results, config.folder, record, sentence)


if __name__ == "__main__":
    keep_freed_memory()  # as train.py does
    scripts.run(lambda: main(tyro.cli(Config)), Config)
