"""Counting how often a loader is read: what the table says, and that it is whole."""

import json

import pandas as pd
import passes
import pytest
import torch

TINY = {"width": 96, "lengths": (2.0,), "dampings": (0.1, 0.01), "epochs": 1}


def test_a_loader_counts_how_often_it_is_read():
    loader = passes.Counted(torch.arange(6).split(2))
    assert [part.tolist() for _ in range(3) for part in loader] == [[0, 1], [2, 3], [4, 5]] * 3
    assert loader.times == 3


@pytest.mark.usefixtures("as_users_run_it")
def test_the_table_has_every_problem_length_and_damping(tmp_path, capsys):
    assert passes.main(passes.Config(**TINY, out=tmp_path)) == 0
    table = pd.read_csv(tmp_path / "table.csv").set_index(["inputs", "cases / inputs", "damping"])
    assert table.index.is_unique
    assert [len(level) for level in table.index.levels] == [2, 1, 2]
    assert table["converged"].all()
    counted = table["passes"].unstack("damping")
    assert (counted > 2).all(axis=None)
    assert (counted[0.1] < counted[0.01]).all()  # damping makes the systems easier
    assert json.loads((tmp_path / "config.json").read_text())["config"]["width"] == 96
    assert (tmp_path / "table.md").read_text() in capsys.readouterr().out


def test_layers_whose_sums_fit_anyhow_are_refused():
    with pytest.raises(ValueError, match="width must be 96 or more"):
        passes.Config(width=8)
