import json
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow.parquet as pq
import pytest
import torch
from run_files import NEVER, parts, wait_until

import unitfisher.table
from unitfisher.record import RecordExistsError, Run

ROOT = Path(unitfisher.table.__file__).parents[1]


@dataclass(frozen=True)
class Training:
    lr: float
    data: Path


def twice(x):
    return 2 * x


# What goes in comes out


def test_rows_come_back_in_order_with_scalars_repeated(tmp_path):
    with Run(tmp_path / "run") as run:
        run.append("units", {"step": 0, "layer": "a", "k": torch.tensor([1.0, 2.0])})
        run.append("units", {"step": 1, "layer": "bc", "k": torch.tensor([3.0])})
    expected = pd.DataFrame(
        {"step": [0, 0, 1], "layer": ["a", "a", "bc"], "k": np.float32([1, 2, 3])}
    )
    pd.testing.assert_frame_equal(run.read(), expected)


def test_scalars_alone_are_one_row(tmp_path):
    with Run(tmp_path / "run") as run:
        run.append("steps", {"step": 3, "loss": torch.tensor(0.5), "done": False, "by": "adam"})
    assert run.read("steps").to_dict("records") == [
        {"step": 3, "loss": 0.5, "done": False, "by": "adam"}
    ]


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (np.float32([0.1]), "float32"),
        (np.float64([0.1]), "float64"),
        (np.float16([0.1]), "float32"),
        (torch.tensor([0.1], dtype=torch.bfloat16), "float32"),
        (torch.tensor([0.1], dtype=torch.float64), "float64"),
        (0.1, "float64"),
        (np.int32([7]), "int64"),
        (torch.tensor([7], dtype=torch.uint8), "int64"),
        (7, "int64"),
        (np.array([True]), "bool"),
        (torch.tensor([True]), "bool"),
        ("hidden1", "str"),
        (["hidden1"], "str"),
        (pd.Series(["hidden1"]).to_numpy(), "str"),
    ],
    ids=lambda value: str(getattr(value, "dtype", value)),
)
def test_types_are_kept(tmp_path, value, dtype):
    with Run(tmp_path / "run") as run:
        run.append("units", {"x": value})
    column = run.read()["x"]
    assert column.dtype == dtype
    assert column[0] == (value if np.ndim(value) == 0 else value[0])


def test_later_rows_take_the_type_of_the_first(tmp_path):
    with Run(tmp_path / "run") as run:
        run.append("units", {"x": np.float32([1])})
        run.append("units", {"x": np.float64([2])})
        run.append("units", {"x": torch.tensor([3])})
    assert run.read()["x"].dtype == np.float32
    assert run.read()["x"].tolist() == [1, 2, 3]


def test_nan_stays_nan_and_is_not_null(tmp_path):
    with Run(tmp_path / "run") as run:
        run.append("units", {"k": torch.tensor([float("nan"), 1.0])})
    column = pq.read_table(run.folder / "units")["k"]
    assert column.null_count == 0
    assert np.isnan(column.to_numpy()).tolist() == [True, False]


def test_rows_are_those_of_the_moment_of_appending(tmp_path):
    weight, array = torch.nn.Parameter(torch.ones(2)), np.ones(2)
    with Run(tmp_path / "run") as run:
        run.append("units", {"weight": weight, "array": array})
        weight.data.zero_()
        array[:] = 0
    assert run.read().to_numpy().tolist() == [[1, 1], [1, 1]]


def test_a_table_without_rows_has_its_columns(tmp_path):
    with Run(tmp_path / "run") as run:
        run.append("units", {"k": torch.ones(0), "layer": "hidden1"})
    assert run.read().columns.tolist() == ["k", "layer"]
    assert run.tables == ["units"]


@pytest.mark.gpu
def test_append_does_not_wait_for_the_gpu(device, tmp_path):
    if device.type != "cuda":
        pytest.skip("only CUDA says when it is waited for")
    x = torch.ones(3, device=device)
    with Run(tmp_path / "run", flush_interval=NEVER) as run:
        torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                torch.cuda._sleep(10**8)
                run.append("units", {"x": x + 1, "mean": x.mean()})
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert run.read().to_numpy().tolist() == [[2, 1]] * 3


# Files


def test_every_reader_sees_one_table(tmp_path, monkeypatch):
    monkeypatch.setattr(unitfisher.table, "PART_ROWS", 10)
    with Run(tmp_path / "run") as run:
        for step in range(25):
            run.append("units", {"step": step, "layer": "a" * step, "k": np.float32([0, step])})
            run.flush()
    frame, glob = run.read(), f"{run.folder}/units/*.parquet"
    assert parts(run) == [f"part-0000{i}.parquet" for i in range(5)]
    assert frame["step"].tolist() == [step for step in range(25) for _ in range(2)]
    pd.testing.assert_frame_equal(frame, pd.read_parquet(run.folder / "units"))
    pd.testing.assert_frame_equal(frame, pl.read_parquet(glob).to_pandas(), check_dtype=False)
    assert pl.read_parquet(run.folder / "units").rows() == pl.read_parquet(glob).rows()
    assert duckdb.sql(f"select * from read_parquet('{glob}')").fetchall() == list(
        frame.itertuples(index=False, name=None)
    )
    assert len({pq.read_schema(path) for path in (run.folder / "units").iterdir()}) == 1


def test_many_appends_leave_few_files(tmp_path, monkeypatch):
    monkeypatch.setattr(unitfisher.table, "PART_ROWS", 1_500)
    with Run(tmp_path / "run", flush_interval=0.02) as run:
        for step in range(5_000):
            run.append("units", {"step": step})
    assert run.read()["step"].tolist() == list(range(5_000))
    assert 1 <= len(parts(run)) <= 4


def test_a_closed_part_is_never_touched_again(tmp_path, monkeypatch):
    monkeypatch.setattr(unitfisher.table, "PART_ROWS", 2)
    with Run(tmp_path / "run") as run:
        run.append("units", {"step": [0, 1]})
        run.flush()
        first = (run.folder / "units" / "part-00000.parquet").stat()
        run.append("units", {"step": [2]})
    assert (run.folder / "units" / "part-00000.parquet").stat() == first
    assert len(parts(run)) == 2


def test_a_flush_without_new_rows_writes_nothing(tmp_path):
    with Run(tmp_path / "run") as run:
        run.append("units", {"step": 0})
        run.flush()
        before = (run.folder / "units" / "part-00000.parquet").stat()
        run.flush()
        assert (run.folder / "units" / "part-00000.parquet").stat() == before


def test_rows_reach_the_disk_by_themselves(tmp_path):
    run = Run(tmp_path / "run", flush_interval=0.05)
    run.append("units", {"step": 0})
    wait_until(lambda: (run.folder / "units" / "part-00000.parquet").exists())
    assert pd.read_parquet(run.folder / "units")["step"].tolist() == [0]
    run.close()


def test_a_reader_meanwhile_sees_the_rows_up_to_some_moment(tmp_path, monkeypatch):
    monkeypatch.setattr(unitfisher.table, "PART_ROWS", 500)
    run = Run(tmp_path / "run", flush_interval=0.005)
    done = threading.Event()

    def write():
        step = 0
        while not done.is_set():
            run.append("units", {"step": np.arange(step, step + 5)})
            step += 5
            time.sleep(0.0005)

    run.append("units", {"step": np.arange(0)})
    run.flush()
    writer = threading.Thread(target=write)
    writer.start()
    lengths = []

    def read():
        steps = pd.read_parquet(run.folder / "units")["step"].to_numpy()
        np.testing.assert_array_equal(steps, np.arange(len(steps)))
        lengths.append(len(steps))
        return len(set(lengths)) > 20

    try:
        wait_until(read)
    finally:
        done.set()
        writer.join()
        run.close()
    assert lengths == sorted(lengths)


# Which folder


def test_resume_goes_on_after_the_last_part(tmp_path):
    for step, config in enumerate([{"lr": 0.1}, {"lr": 0.1}, None]):
        with Run(tmp_path / "run", config, resume=True) as run:
            run.append("units", {"step": step, "k": np.float32(step)})
    assert run.config == {"lr": 0.1}
    assert parts(run) == ["part-00000.parquet", "part-00001.parquet", "part-00002.parquet"]
    assert run.read()["step"].tolist() == [0, 1, 2]


def test_resume_keeps_the_types_and_columns_of_before(tmp_path):
    with Run(tmp_path / "run") as run:
        run.append("units", {"k": np.float32([1])})
    with Run(tmp_path / "run", resume=True) as run:
        run.append("units", {"k": np.float64([2])})
        with pytest.raises(ValueError, match=r"has the columns \['k'\], not \['s'\]; .* another"):
            run.append("units", {"s": 1.0})
    assert run.read()["k"].dtype == np.float32


def test_resume_clears_away_what_a_killed_writer_left(tmp_path):
    Run(tmp_path / "run").close()
    (tmp_path / "run" / ".unfinished").write_bytes(b"PAR1")
    run = Run(tmp_path / "run", resume=True)
    assert {path.name for path in run.folder.iterdir()} == {"config.json", ".lock"}


def test_a_kill_before_the_configuration_leaves_an_empty_folder(tmp_path):
    (tmp_path / ".unfinished").write_text("{")
    assert Run(tmp_path, {"lr": 0.1}).config == {"lr": 0.1}


@pytest.mark.parametrize("kept", [0, 1, 2, 3, 5, 6, 7, 99])
@pytest.mark.parametrize("resumed", [False, True])
def test_a_truncated_table_has_its_first_rows_and_goes_on_after_them(
    tmp_path, monkeypatch, resumed, kept
):
    monkeypatch.setattr(unitfisher.table, "PART_ROWS", 3)
    run = Run(tmp_path)
    for step in range(7):
        run.append("units", {"step": [step]})
        run.flush()
    if resumed:
        run.close()
        run = Run(tmp_path, resume=True)
    run.truncate("units", kept)
    assert run.count() == min(kept, 7)
    run.append("units", {"step": [-1]})
    run.close()
    assert list(run.read()["step"]) == [*range(min(kept, 7)), -1]


def test_a_table_without_rows_is_counted_as_none(tmp_path):
    assert Run(tmp_path).count("units") == 0


def test_a_run_is_not_overwritten(tmp_path):
    with Run(tmp_path / "run", {"lr": 0.1}) as run:
        run.append("units", {"k": 1.0})
    with pytest.raises(RecordExistsError, match="run already holds a run; .* resume=True"):
        Run(tmp_path / "run", {"lr": 0.1})
    with pytest.raises(FileExistsError):
        Run(tmp_path / "run")


def test_a_run_that_ended_before_its_first_row_is_begun_anew(tmp_path):
    first = Run(tmp_path / "run", {"lr": 0.1})
    with pytest.raises(RecordExistsError, match="already holds a run"):
        Run(tmp_path / "run", {"lr": 0.1})
    first.close()
    with Run(tmp_path / "run", {"lr": 0.2}) as second:
        second.append("units", {"k": 1.0})
    assert second.config == {"lr": 0.2}
    assert second.id != first.id
    assert second.read("units")["k"].tolist() == [1.0]


@pytest.mark.parametrize("text", ["", "[]", '{"model_type": "gpt2"}'])
def test_a_config_of_something_else_is_not_overwritten(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(RecordExistsError, match="already holds a run"):
        Run(tmp_path)
    assert (tmp_path / "config.json").read_text() == text


def test_a_run_with_other_files_beside_it_is_not_overwritten(tmp_path):
    Run(tmp_path, {"lr": 0.1}).close()
    (tmp_path / "notes.txt").touch()
    with pytest.raises(RecordExistsError, match="already holds a run"):
        Run(tmp_path)
    assert "0.1" in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_of_other_files_is_refused(tmp_path, resume):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(RecordExistsError, match="holds thesis.tex but no run .* empty folder"):
        Run(tmp_path, resume=resume)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_resume_with_another_configuration_names_what_differs(tmp_path):
    Run(tmp_path / "run", {"optimizer": {"lr": 0.1, "name": "sgd"}, "seed": 0}).close()
    with pytest.raises(
        ValueError,
        match=r"optimizer.lr was 0.1 and is 0.2; seed was 0 and is absent; "
        r"width was absent and is 'wide'; restore it, or choose another folder",
    ):
        Run(
            tmp_path / "run",
            {"optimizer": {"lr": 0.2, "name": "sgd"}, "width": "wide"},
            resume=True,
        )


# What is written down beside the rows


def config(seed):
    return {
        "training": Training(lr=np.float64(0.1), data=Path("data")),
        "schedule": twice,
        "activation": torch.nn.ELU,
        "widths": (100, np.int64(10)),
        "layers": {"b", "a"},
        "damping": float("inf"),
        "device": torch.device("cpu"),
        "seed": torch.tensor(seed),
        "note": None,
        1: {"nested": [Path("x")]},
    }


def test_the_configuration_may_hold_anything(tmp_path):
    run = Run(tmp_path / "run", config(seed=3))
    assert run.config == json.loads((run.folder / "config.json").read_text())["config"]
    assert run.config == {
        "training": {"lr": 0.1, "data": "data"},
        "schedule": "<function twice>",
        "activation": "<class 'torch.nn.modules.activation.ELU'>",
        "widths": [100, 10],
        "layers": ["a", "b"],
        "damping": "inf",
        "device": "device(type='cpu')",
        "seed": 3,
        "note": None,
        "1": {"nested": ["x"]},
    }
    assert Run(tmp_path / "run", config(seed=3), resume=True).config == run.config


def test_versions_device_and_time_are_recorded(tmp_path):
    run = Run(tmp_path / "run")
    recorded = json.loads((run.folder / "config.json").read_text())
    assert recorded["versions"]["torch"] == torch.__version__
    assert recorded["versions"].keys() >= {"python", "numpy", "unitfisher", "pandas", "pyarrow"}
    assert f", {torch.get_num_threads()} thread" in recorded["device"]
    assert pd.Timestamp(recorded["created"]).tz is not None


# What is refused


@pytest.mark.parametrize(
    ("columns", "error", "message"),
    [
        ({"a": [1, 2], "b": [1, 2, 3]}, ValueError, r"one length, not {'a': 2, 'b': 3}"),
        ({}, ValueError, "takes columns of one length, not {}"),
        ({"a": torch.ones(2, 3)}, ValueError, r"'a' of .*units has shape \(2, 3\); give one value"),
        ({"a": np.array([1j])}, TypeError, "'a' of .*units holds complex128, which is not"),
        ({"a": np.array(["x", None])}, TypeError, "holds object, which is not recorded; give"),
        ({"a": 2**63}, TypeError, "holds uint64, .* integers that fit int64"),
        ({"a": torch.ones(1, dtype=torch.complex64)}, TypeError, "holds torch.complex64"),
    ],
)
def test_columns_that_cannot_be_kept_are_refused(tmp_path, columns, error, message):
    run = Run(tmp_path / "run")
    with pytest.raises(error, match=message):
        run.append("units", columns)
    assert run.tables == []
    run.append("units", {"a": 1})
    assert len(run.read()) == 1


@pytest.mark.parametrize(
    ("columns", "error", "message"),
    [
        ({"step": 0}, ValueError, r"has the columns \['step', 'k'\], not \['step'\]; .* another"),
        ({"step": 0, "k": 1.0, "s": 1.0}, ValueError, r"not \['step', 'k', 's'\]"),
        ({"step": 0.5, "k": 1.0}, TypeError, "'step' of .*units holds int64 since .* double"),
        ({"step": 0, "k": "high"}, TypeError, "'k' of .* cannot take string; convert it"),
    ],
)
def test_a_table_keeps_its_columns(tmp_path, columns, error, message):
    run = Run(tmp_path / "run")
    run.append("units", {"step": 0, "k": 1.0})
    with pytest.raises(error, match=message):
        run.append("units", columns)
    assert len(run.read()) == 1


@pytest.mark.parametrize("name", ["", "a/b", "..", "my units", "1st"])
def test_a_table_is_named_like_a_variable(tmp_path, name):
    with pytest.raises(ValueError, match="must be named like a variable, as 'units' is"):
        Run(tmp_path / "run").append(name, {"step": 0})


def test_a_closed_run_takes_no_rows_but_can_be_read(tmp_path):
    run = Run(tmp_path / "run")
    run.append("units", {"step": 0})
    run.close()
    run.close()
    with pytest.raises(RuntimeError, match="run .*run is closed; append before"):
        run.append("units", {"step": 1})
    assert len(run.read()) == 1


def test_an_error_inside_the_context_keeps_the_rows(tmp_path):
    def fail():
        with Run(tmp_path / "run") as run:
            run.append("units", {"step": 0})
            raise ArithmeticError("of the training loop")

    with pytest.raises(ArithmeticError, match="of the training loop"):
        fail()
    assert pd.read_parquet(tmp_path / "run" / "units")["step"].tolist() == [0]


def test_a_missing_table_is_named_with_those_that_exist(tmp_path):
    run = Run(tmp_path / "run")
    with pytest.raises(LookupError, match="has no table 'units'; it has none yet"):
        run.read()
    run.append("steps", {"step": 0})
    run.append("layers", {"step": 0})
    with pytest.raises(LookupError, match=r"has no table 'units'; it has \['layers', 'steps'\]"):
        run.read("units")
    assert run.tables == ["layers", "steps"]


def test_tuples_are_recorded_each_time_whether_they_repeat_or_not(tmp_path):
    one, other = ("first", "second"), ("third",)
    with Run(tmp_path / "run") as run:
        for names in (one, one, other, one, other):
            run.append("units", {"layer": names, "unit": tuple(range(len(names)))})
            if names is other:
                run.flush()
    expected = [*one, *one, *other, *one, *other]
    assert run.read("units")["layer"].tolist() == expected
    assert run.read("units")["unit"].tolist() == [0, 1, 0, 1, 0, 0, 1, 0]


def test_a_list_that_is_changed_between_appends_is_recorded_as_it_was(tmp_path):
    names = ["first", "second"]
    with Run(tmp_path / "run") as run:
        run.append("units", {"layer": names})
        names[0] = "changed"
        run.append("units", {"layer": names})
    assert run.read("units")["layer"].tolist() == ["first", "second", "changed", "second"]
