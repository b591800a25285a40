"""Kills, exits, forks, damaged files and full disks: what a run keeps of its rows."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import duckdb
import pandas as pd
import polars as pl
import pytest
from forked import forked, succeeded
from run_files import NEVER, wait_until

import unitfisher.table
from unitfisher.locks import FolderInUseError
from unitfisher.record import DamagedRecordError, Run

ROOT = Path(unitfisher.table.__file__).parents[1]


# One process imports the package, then forks a writer for each line that it reads: to import
# anew for each of them would take most of this file's time.
WRITERS = """
import os, sys, time
import unitfisher.table
from unitfisher.record import Run

unitfisher.table.PART_ROWS = 1000


def write_forever(folder, step):
    run = Run(folder, {"seed": 0}, resume=True, flush_interval=0.2)
    print("pid", os.getpid(), flush=True)
    while True:
        run.append("units", {"step": step, "time": time.monotonic(), "layer": "hidden1"})
        step += 1
        if step % 500 == 0:
            print(step, flush=True)
        time.sleep(1e-4)


def exit_without_closing(folder, step):
    run = Run(folder, flush_interval=1000)
    run.append("units", {"step": step})
    sys.exit("an error")


def exit_with_a_full_disk(folder, step):
    run = Run(folder, flush_interval=1000)
    run.append("units", {"step": step})
    run.flush()
    run.append("units", {"step": step + 1})

    def no_space(descriptor):
        raise OSError(28, "No space left on device")

    os.fsync, sys.stderr = no_space, sys.stdout


def fork_while_writing(folder, step):
    run = Run(folder, flush_interval=1000)
    run.append("units", {"step": step})
    flushed, tell = os.pipe()
    if os.fork() == 0:
        try:
            run.append("units", {"step": step + 1})
        except RuntimeError as error:
            print(error, flush=True)
        os.read(flushed, 1)
        sys.exit()
    run.append("units", {"step": step + 2})
    run.flush()
    os.write(tell, b"!")
    os.wait()


for line in sys.stdin:
    name, folder, step = line.rstrip().split("|")
    if os.fork() == 0:
        sys.stdin.close()
        globals()[name](folder, int(step))
        sys.exit()
    os.wait()
    print("ended", flush=True)
"""


@pytest.fixture(scope="module")
def writers():
    with subprocess.Popen(
        [sys.executable, "-c", WRITERS],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield process


def start(writers, name, folder, step=0):
    writers.stdin.write(f"{name}|{folder}|{step}\n")
    writers.stdin.flush()


def what_is_said(writers):
    """Lines up to the writer's end, which is waited for."""
    return list(iter(writers.stdout.readline, "ended\n"))


def test_a_kill_loses_no_more_than_the_interval(tmp_path, writers):
    folder, step = tmp_path / "run", 0
    for lines in (4, 3, 5):
        start(writers, "write_forever", folder, step)
        pid = int(writers.stdout.readline().removeprefix("pid "))
        for _ in range(lines):
            writers.stdout.readline()
        os.kill(pid, signal.SIGKILL)
        killed = time.monotonic()
        what_is_said(writers)
        table = pd.read_parquet(folder / "units")
        assert len(table) > step
        step = len(table)
        assert table["step"].tolist() == list(range(step))
        assert killed - table["time"].iloc[-1] < 0.2 + 0.8  # interval, and a slow flush
    glob = f"{folder}/units/*.parquet"
    assert pl.read_parquet(glob)["step"].to_list() == list(range(step))
    assert duckdb.sql(f"select step from read_parquet('{glob}')").fetchall() == [
        (i,) for i in range(step)
    ]


def test_an_exit_loses_nothing(tmp_path, writers):
    start(writers, "exit_without_closing", tmp_path / "run", 7)
    what_is_said(writers)
    assert Run(tmp_path / "run", resume=True).read()["step"].tolist() == [7]


def test_a_fork_writes_nothing(tmp_path, writers):
    start(writers, "fork_while_writing", tmp_path / "run")
    assert "this is its fork" in "".join(what_is_said(writers))
    assert Run(tmp_path / "run", resume=True).read()["step"].tolist() == [0, 2]


def test_one_process_writes_a_run_at_a_time(tmp_path):
    run = Run(tmp_path / "run")

    def refused() -> bool:
        try:
            Run(tmp_path / "run", resume=True)
        except FolderInUseError as error:
            return "in use by another process" in str(error)
        return False

    assert succeeded(forked(refused))
    run.append("units", {"step": [0]})
    run.close()
    assert succeeded(forked(lambda: len(Run(tmp_path / "run", resume=True).read()) == 1))


def test_a_run_that_is_opened_again_goes_on_where_it_was(tmp_path):
    first = Run(tmp_path / "run")
    first.append("units", {"step": [0]})
    with Run(tmp_path / "run", resume=True) as second:
        second.append("units", {"step": [1]})
        assert second.read()["step"].tolist() == [0, 1]
        with pytest.raises(RuntimeError, match="is closed"):
            first.append("units", {"step": [2]})


@pytest.mark.parametrize("file", ["config.json", "units/part-00000.parquet"])
def test_a_damaged_file_of_a_run_is_named_when_it_is_opened(file, tmp_path):
    with Run(tmp_path / "run") as run:
        run.append("units", {"step": [0]})
    damaged = tmp_path / "run" / file
    damaged.write_bytes(damaged.read_bytes()[:20])
    with pytest.raises(DamagedRecordError, match=rf"{file} cannot be read .*bring back a copy"):
        Run(tmp_path / "run", resume=True)


def no_space(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_keeps_the_rows_in_memory(tmp_path, monkeypatch):
    run = Run(tmp_path / "run", flush_interval=NEVER)
    run.append("units", {"step": 0})
    run.flush()
    run.append("units", {"step": 1})
    with monkeypatch.context() as full:
        full.setattr(os, "fsync", no_space)
        with pytest.raises(OSError, match=r"part-00000.parquet was not written \(No space left"):
            run.flush()
        run.append("units", {"step": 2})
        with pytest.raises(OSError, match="3 rows are kept in memory: make room"):
            run.close()
    assert pd.read_parquet(run.folder / "units")["step"].tolist() == [0]
    assert [path.name for path in run.folder.glob(".*")] == [".lock"]
    run.close()
    assert run.read()["step"].tolist() == [0, 1, 2]


def test_what_a_full_disk_costs_is_told_at_exit(tmp_path, writers):
    start(writers, "exit_with_a_full_disk", tmp_path / "run")
    (said,) = what_is_said(writers)
    assert "part-00000.parquet was not written (No space left on device); its newest rows" in said
    assert pd.read_parquet(tmp_path / "run" / "units")["step"].tolist() == [0]


def test_a_full_disk_is_told_once_and_tried_again(tmp_path, monkeypatch):
    run = Run(tmp_path / "run", flush_interval=0.1)
    tries = []

    def fsync(descriptor):
        tries.append(descriptor)
        no_space(descriptor)

    with monkeypatch.context() as full:
        full.setattr(os, "fsync", fsync)
        run.append("units", {"step": 0})
        with pytest.warns(UserWarning, match=r"1 rows are kept in memory: .* 0\.1 s") as warned:
            wait_until(lambda: len(tries) > 3)
    assert len(warned) == 1
    wait_until(lambda: (run.folder / "units" / "part-00000.parquet").exists())
    run.close()
    assert run.read()["step"].tolist() == [0]


def test_a_kill_while_truncating_leaves_first_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(unitfisher.table, "PART_ROWS", 3)
    run = Run(tmp_path)
    for step in range(9):
        run.append("units", {"step": [step]})
        run.flush()
    monkeypatch.setattr(os, "replace", no_space)
    with pytest.raises(OSError, match="No space"):
        run.truncate("units", 2)
    assert list(pd.read_parquet(tmp_path / "units")["step"]) == [0, 1, 2]
