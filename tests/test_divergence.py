"""Counting steps to divergence: what the table says of who diverges and who does not."""

from dataclasses import replace

import divergence
import pandas as pd
import pytest

from unitfisher.experiments.presets import PRESETS

FIERCE = 1e12  # a rate that no network bears
SMALL = replace(
    PRESETS["mnist"],
    dataset="digits",
    hidden=(8, 8),
    weight_variance=1 / 3,
    activations=("relu", "elu"),
    rates=(0.01, FIERCE),
)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(divergence, "BEGINNINGS", {"small": (SMALL, 5)})


def test_a_row_for_every_network_says_when_it_diverged(small, tmp_path, capsys):
    assert divergence.main(divergence.Config(presets=("small",), out=tmp_path)) == 0
    table = pd.read_csv(tmp_path / "table.csv")
    assert len(table) == 4
    fierce = table["rate"] == FIERCE
    assert table.loc[~fierce, "diverged at"].isna().all()
    assert table.loc[fierce, "diverged at"].between(2, 5).all()  # the first loss is of no step yet
    said = capsys.readouterr().out
    assert (tmp_path / "table.md").read_text() in said
    assert "none in 5" in said


def test_photographs_that_are_not_there_are_left_out_aloud(tmp_path, capsys):
    config = divergence.Config(presets=("imagenet-15",), data_root=tmp_path, cache=tmp_path)
    assert list(divergence.begun("imagenet-15", config)) == []
    assert "imagenet-15 is left out: " in capsys.readouterr().err


def test_unknown_presets_are_refused():
    with pytest.raises(ValueError, match="no beginning of mnist: choose from"):
        divergence.Config(presets=("mnist",))
