"""Several processes share every batch, and train as one would."""

import signal
from collections.abc import Callable
from pathlib import Path

import normed
import pandas as pd
import pytest
import torch
import train
from forked import command, interrupted
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.testing import assert_close

from unitfisher.experiments import Dataset
from unitfisher.experiments.ranks import Ranks
from unitfisher.experiments.sources import Held

DIGITS = (
    "--preset mnist --dataset digits --hidden 16 12 --seeds 0 1 --activations relu elu --every 5 "
    "--probe 100 --measurements 2 --units 4 --momentum 0.9 --threads 1 --checkpoint-every 0"
)
HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)  # by torch, from then on
PAIR = tuple(Ranks(rank, 2) for rank in range(2))


def by_two(logs: Path, run: Callable[..., None], *given: str) -> str:
    """Run this in two processes, as torchrun does; return what they say."""
    rendezvous = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "run_id": logs.name}
    files = DefaultLogsSpecs(str(logs), redirects=Std.ALL)
    config = LaunchConfig(
        1,
        1,
        2,
        **rendezvous,
        start_method="forkserver",
        monitor_interval=0.1,
        logs_specs=files,
        max_restarts=0,
    )
    before = {number: signal.getsignal(number) for number in HANDLED}
    try:
        elastic_launch(config, run)(*given)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return "".join(file.read_text() for file in sorted(logs.rglob("stdout.log")))


def checkpoint(out: Path) -> dict[str, object]:
    return torch.load(out / "checkpoint.pt", weights_only=True)


def test_two_processes_train_as_one_end_together_and_resume(tmp_path: Path) -> None:
    alone, pair = tmp_path / "alone", tmp_path / "pair"
    assert (
        train.main(*train.parse([*DIGITS.split(), "--iterations", "12", "--out", str(alone)])) == 0
    )
    given = [*DIGITS.split(), "--iterations", "12", "--out", str(pair)]
    by_two(tmp_path / "logs", interrupted, *given, "--checkpoint-every", "1000")
    assert checkpoint(pair)["iteration"] == 3
    said = by_two(tmp_path / "again", command, *given, "--resume")
    assert said.count("4 networks, 12 steps") == 1  # the first alone reports
    one, two = checkpoint(alone), checkpoint(pair)
    assert_close(two["ensemble"], one["ensemble"])
    assert_close(two["descent"], one["descent"])
    assert len(two["random"]) == 2 * (1 + len(two["members"]))
    for name in ("relu-lr0.01-s0", "elu-lr0.01-s1"):
        columns = ["iteration", "train_loss", "test_loss"]
        records = [pd.read_parquet(run / name / "training")[columns] for run in (alone, pair)]
        pd.testing.assert_frame_equal(*records, rtol=1e-4)
    refused = pytest.raises(ValueError, match="is of 2 processes .* not of 1 on cpu")
    with refused:
        train.main(*train.parse([*given, "--resume"]))


def test_an_error_in_one_process_ends_all(tmp_path: Path) -> None:
    logs, out = tmp_path / "logs", tmp_path / "out"
    (out / "relu-lr0.01-s0").mkdir(parents=True)
    (out / "relu-lr0.01-s0" / "config.json").touch()  # which only the first looks at
    with pytest.raises(ChildFailedError):
        by_two(logs, command, *DIGITS.split(), "--iterations", "12", "--out", str(out))
    assert any("already holds a run" in log.read_text() for log in logs.rglob("stderr.log"))


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


def test_batch_normalisation_is_of_the_whole_batch(tmp_path: Path) -> None:
    """Of four cases and of three: what comes out, every gradient, the running averages."""
    normed.normalised(str(tmp_path), Ranks())
    y, dx, gradients, state = normed.saved(tmp_path)
    by_two(tmp_path / "logs", normed.normalised, str(tmp_path))
    shares = [normed.saved(tmp_path, rank) for rank in range(2)]
    for rank, (own_y, own_dx, _, own_state) in enumerate(shares):
        assert_close(own_y, y[rank::2])
        assert_close(own_dx, dx[rank::2])
        assert_close(own_state, state)
    for name, gradient in gradients.items():
        assert_close(shares[0][2][name] + shares[1][2][name], gradient)


def test_networks_with_batch_normalisation_train_as_in_one_process(tmp_path: Path) -> None:
    alone, pair = tmp_path / "alone", tmp_path / "pair"
    normed.trained(str(alone), Ranks())
    by_two(tmp_path / "logs", normed.trained, str(pair))
    (state, loss), (one, loss_1), (other, loss_2) = (
        normed.saved(alone),
        *(normed.saved(pair, rank) for rank in range(2)),
    )
    assert_close(one, state, rtol=1e-6, atol=1e-9)
    assert_close(one, other, rtol=0, atol=0)
    assert_close((loss_1, loss_2), (loss, loss), rtol=1e-6, atol=1e-6)
