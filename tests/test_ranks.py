"""Several processes share every batch, and train as one would."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
import train
from forked import command
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.testing import assert_close

from unitfisher.experiments import Dataset
from unitfisher.experiments.presets import PRESETS
from unitfisher.experiments.ranks import Ranks
from unitfisher.experiments.sources import Held
from unitfisher.experiments.trainer import Trainer

DIGITS = (
    "--preset mnist --dataset digits --hidden 16 12 --seeds 0 1 --activations relu elu --every 5 "
    "--probe 100 --measurements 2 --units 4 --momentum 0.9 --threads 1 --checkpoint-every 0"
)
PAIR = tuple(Ranks(rank, 2) for rank in range(2))


def launched(logs: Path, *given: str) -> str:
    """Run the command in two processes, as torchrun does; return what they say."""
    rendezvous = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "run_id": logs.name}
    files = DefaultLogsSpecs(str(logs), redirects=Std.ALL)
    config = LaunchConfig(
        1, 1, 2, **rendezvous, start_method="forkserver", monitor_interval=0.1, logs_specs=files
    )
    elastic_launch(config, command)(*DIGITS.split(), *given)
    return "".join(file.read_text() for file in sorted(logs.rglob("stdout.log")))


def by_torchrun(*given: str) -> subprocess.CompletedProcess[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launched = [*torchrun, "--nproc-per-node", "2", train.__file__, *DIGITS.split(), *given]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(launched, env=environment, capture_output=True, text=True, check=False)


def checkpoint(out: Path) -> dict[str, object]:
    return torch.load(out / "checkpoint.pt", weights_only=True)


def test_two_processes_train_as_one_and_resume(tmp_path: Path) -> None:
    alone, pair = tmp_path / "alone", tmp_path / "pair"
    assert (
        train.main(*train.parse([*DIGITS.split(), "--iterations", "12", "--out", str(alone)])) == 0
    )
    options = ["--iterations", "12", "--out", str(pair)]
    said = launched(tmp_path / "logs", *options)
    assert said.count("4 networks, 12 steps") == 1  # the first alone reports
    one, two = checkpoint(alone), checkpoint(pair)
    assert_close(two["ensemble"], one["ensemble"])
    assert_close(two["descent"], one["descent"])
    assert len(two["random"]) == 2
    for name in ("relu-lr0.01-s0", "elu-lr0.01-s1"):
        columns = ["iteration", "train_loss", "test_loss"]
        records = [pd.read_parquet(run / name / "training")[columns] for run in (alone, pair)]
        pd.testing.assert_frame_equal(*records, rtol=1e-4)
    launched(tmp_path / "again", *options, "--resume")
    refused = pytest.raises(ValueError, match="is of 2 processes .* not of 1 on cpu")
    with refused:
        train.main(*train.parse([*DIGITS.split(), *options, "--resume"]))


def test_an_error_in_one_process_ends_all(tmp_path: Path) -> None:
    (tmp_path / "relu-lr0.01-s0").mkdir()
    (tmp_path / "relu-lr0.01-s0" / "config.json").touch()  # which only the first looks at
    done = by_torchrun("--iterations", "12", "--out", str(tmp_path))
    assert done.returncode != 0
    assert "already holds a run" in done.stderr


def images() -> Dataset:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(23, 3, 8, 8, generator=generator)
    return Dataset(x, torch.arange(23), x[:2], torch.arange(2))


def opened(ranks: Ranks) -> Held:
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    crops = [torch.Generator().manual_seed(seed) for seed in range(2)]
    return Held(images(), 5, generators, crops, ranks=ranks)


def test_shares_of_images_are_the_batch_of_one_process_crops_and_all() -> None:
    whole, *shares = map(opened, (Ranks(), *PAIR))
    for _ in range(6):  # into the second epoch
        x, y = whole.next()
        for ranks, share in zip(PAIR, shares, strict=True):
            own = share.next()
            assert torch.equal(own.x, x[:, ranks.rank :: 2])
            assert torch.equal(own.y, ranks.share(y))


def test_batches_with_less_cases_than_processes_are_refused() -> None:
    with pytest.raises(ValueError, match="the last batch of an epoch, 3 of 23 .* by 4 processes"):
        opened(Ranks(0, 4))


def test_running_statistics_of_shares_are_refused(tmp_path: Path) -> None:
    preset = replace(PRESETS["cifar10-11"], norm="batch", activations=("elu",))
    with pytest.raises(ValueError, match="batch normalisation would see shares of a batch"):
        Trainer(preset, preset.members, images(), tmp_path, ranks=PAIR[1])
