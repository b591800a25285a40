"""The comparison of estimators: what a row says, and that the table is whole."""

import json

import estimators
import pandas as pd
import pytest
import torch

TINY = estimators.Config(columns=(1, 2), repetitions=2, hidden=(4,), epochs=1, cases=64)


def test_a_row_says_spread_bias_and_what_was_told_of_it():
    exact = {name: torch.tensor([2.0]) for name in ("c", "s", "k")}
    drawn = [
        {"c": torch.tensor([c]), "s": torch.tensor([s]), "k": torch.tensor([k])}
        | {f"{name}_error": torch.tensor([1.0]) for name in ("c", "s", "k")}
        for c, s, k in [(1.0, 2.0, 4.0), (3.0, 6.0, 2.0)]
    ]
    row = estimators.errors(drawn, exact)
    root = 2**0.5  # the standard deviation of 1 and 3
    expected = {"spread_of_c": root / 2, "s_ratio": 2.0, "s_ratio_error": 1.0, "k_bias": 1.0}
    expected |= {"k_bias_error": 1.0, "told_c": 1 / root, "told_s": 1 / root / 2}
    assert {name: row[name] for name in expected} == pytest.approx(expected)


def test_dead_units_are_left_out():
    assert estimators.median(torch.tensor([torch.nan, 1.0, 3.0, 2.0])) == 2.0


def test_the_table_has_every_problem_estimator_and_number_of_columns(tmp_path, capsys):
    assert estimators.main(estimators.Config(**{**vars(TINY), "out": tmp_path})) == 0
    table = pd.read_csv(tmp_path / "table.csv")
    columns = {"exact": [9], "mc": [1, 2], "rademacher": [1, 2], "top-rademacher": [2, 3]}
    for _, rows in table.groupby("problem"):
        assert rows.groupby("fisher")["columns"].agg(list).to_dict() == columns
    assert table["problem"].nunique() == 3
    drawn = table[table["fisher"] != "exact"]
    assert (drawn["spread_of_c"] > 0).all()
    random = drawn["columns"] - drawn["fisher"].eq("top-rademacher")
    assert drawn["told_c"].notna().equals(random > 1)  # one column tells nothing of its error
    assert json.loads((tmp_path / "config.json").read_text())["config"]["repetitions"] == 2
    assert (tmp_path / "table.md").read_text() in capsys.readouterr().out


def test_impossible_numbers_are_refused():
    with pytest.raises(ValueError, match="repetitions must be 2 or more"):
        estimators.Config(repetitions=1)
