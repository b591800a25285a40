"""A training's settings are told as they took effect, also where its record is older than them."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import settings
import summary
from recorded import record
from summaries import summarise
from summary import Summary

from unitfisher.experiments.presets import PRESETS, Phase, Preset

NEW = ("initial", "stride", "pyramid", "dropout", "validation", "decayed")
SHORT = replace(PRESETS["cifar100-11"], activations=("elu",), iterations=200, dampings=(0.1,))
IMAGENET = replace(PRESETS["imagenet-15"], activations=("elu",), dampings=(0.1,))
MNIST = PRESETS["mnist"]


def config(preset: Preset) -> dict[str, Any]:
    of_cases = {"train_cases": 700, "classes": 10}
    return settings.effective(json.loads(json.dumps(asdict(preset) | of_cases)))


def words(preset: Preset) -> str:
    return settings.in_words(config(preset), preset.rates)


def grown_old(folder: Path) -> None:
    for file in folder.rglob("config.json"):
        made = json.loads(file.read_text())
        for name in NEW:
            del made["config"][name]
        file.write_text(json.dumps(made))


def test_what_is_left_to_the_network_is_filled_in() -> None:
    found = config(IMAGENET)
    assert {name: found[name] for name in settings.LEFT} == {
        "weight_variance": 1.0,
        "initial": "uniform",
        "padding": "caffe",
        "stride": 1,
        "pyramid": (4, 2, 1),
        "dropout": 0.5,
    }


def test_what_is_set_stays() -> None:
    given = {"padding": "same", "stride": 2, "pyramid": (3, 1), "dropout": 0.0, "initial": "normal"}
    found = config(replace(IMAGENET, **given))
    assert {name: found[name] for name in given} == {**given, "pyramid": [3, 1]}


def test_networks_of_others_are_not_told_to_have_options_that_they_lack() -> None:
    network = {"network": "torchvision:resnet18", "weight_variance": None, "phases": ()}
    found = config(replace(PRESETS["cifar10-11"], **network))
    assert not any(found[name] for name in settings.LEFT)
    assert found["phases"] == []


def test_settings_can_be_filled_in_twice() -> None:
    for preset in PRESETS.values():
        once = config(preset)
        again = settings.effective(json.loads(json.dumps(once)))
        assert json.dumps(again) == json.dumps(once)


def test_phases_have_the_dropout_before_them() -> None:
    phases = (Phase(5, 0.1), Phase(7, 0.1, (0.5,) * 6, "all"), Phase(9, 0.01))
    own, all_layers = ((0.0, 0.1, 0.2, 0.3, 0.4, 0.5), "last"), ((0.5,) * 6, "all")
    found = config(replace(SHORT, phases=phases))["phases"]
    assert found == [(5, 0.1, *own), (7, 0.1, *all_layers), (9, 0.01, *all_layers)]
    assert config(replace(SHORT, phases=()))["phases"] == [(0, 1.0, *own)]


@pytest.mark.parametrize(
    ("preset", "told"),
    [
        (replace(MNIST, validation=10_000), "evaluated on 10,000 cases held out of training"),
        (replace(MNIST, validation=9, tested=5), "evaluated on 5 of 9 cases held out of training"),
        (replace(MNIST, tested=2_000), "evaluated on the first 2,000 test cases"),
        (replace(IMAGENET, tested=60), "evaluated on 60 validation photographs"),
        (replace(MNIST, probe=50), "probe set of 50 training cases"),
        (replace(MNIST, initial="normal"), "normal initial weights of variance 2/fan-in"),
        (replace(SHORT, padding="same"), '"same" padding'),
        (replace(SHORT, decayed="weights"), "L2 0.0005 on weights alone"),
        (
            replace(SHORT, preprocessing="none", augmented=False),
            "cifar-100, pixels in [0, 1], eval",
        ),
        (replace(IMAGENET, stride=2, pyramid=(6, 1)), "first stride 2, pyramid 6-1"),
        (replace(IMAGENET, dropout=0.0), "dropout 0 of fully connected layers"),
        (PRESETS["cifar10-18"], "from 70k 0-0.1-0.2-0.3-0.4-0.5-0 behind all layers of each stack"),
        (PRESETS["cifar10-18"], "rate 0.01 (×0.1 from 35k, ×0.01 from 120k)"),
    ],
)
def test_choices_are_told_in_words(preset: Preset, told: str) -> None:
    assert told in words(preset)


def test_how_the_fisher_was_measured_is_told() -> None:
    assert settings.of_fisher(config(MNIST)) == "exact Fisher"
    assert settings.of_fisher(config(SHORT)) == "Fisher by random signs of 512 cases drawn"


def test_tables_keep_the_padding_that_took_effect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(summary, "FOLDER", tmp_path)
    record(tmp_path / "runs", SHORT, (0, 200))
    summarise("cifar100-11", [tmp_path / "runs"]).write()
    kept = json.loads((tmp_path / "cifar100-11" / "provenance.json").read_text())["config"]
    assert (kept["padding"], kept["initial"], kept["decayed"]) == ("caffe", "uniform", "all")


@pytest.mark.parametrize("preset", [SHORT, IMAGENET, replace(MNIST, dampings=(0.1,), seeds=(0,))])
def test_records_from_before_these_options_are_told_the_same(
    preset: Preset, tmp_path: Path
) -> None:
    for name in ("old", "new"):
        record(tmp_path / name, preset, (0, 100))
    grown_old(tmp_path / "old")
    old, new = (summarise("any", [tmp_path / name]) for name in ("old", "new"))
    assert old.config == new.config
    assert old.settings == new.settings


def test_records_from_before_these_options_join_later_ones(tmp_path: Path) -> None:
    record(tmp_path / "old", SHORT, (0, 100))
    grown_old(tmp_path / "old")
    record(tmp_path / "new", replace(SHORT, seeds=(1,)), (0, 100))
    assert summarise("both", [tmp_path]).seeds == 2
    record(tmp_path / "other", replace(SHORT, seeds=(2,), decayed="weights"), (0, 100))
    with pytest.raises(ValueError, match="other/elu-lr0.01-s2 was configured differently"):
        summarise("all", [tmp_path])


def test_committed_tables_tell_the_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(summary, "FOLDER", Path(summary.__file__).parent / "tables")
    for name in ("cifar100-11", "cifar100-11-bn", "imagenet-15"):
        assert "Caffe's padding" in Summary.read(name).conditions
