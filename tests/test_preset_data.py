"""A preset is trained through the library as its documentation says."""

from dataclasses import replace
from pathlib import Path
from textwrap import dedent

import pandas as pd
import pytest
import torch

import unitfisher.experiments
from unitfisher.experiments import PRESETS, Dataset, Preset, Trainer, data_of
from unitfisher.experiments.data import held_out

TINY = replace(
    PRESETS["mnist"],
    dataset="digits",
    hidden=(16,),
    rates=(0.1,),
    seeds=(0,),
    every=23,
    probe=50,
    units=2,
    measurements=2,
)


def documented() -> str:
    doc = str(unitfisher.experiments.__doc__)
    return dedent(next(part for part in doc.split("\n\n") if part.startswith("    ")))


def test_the_five_lines_of_the_documentation_train_a_preset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names = {name: getattr(unitfisher.experiments, name) for name in ("Trainer", "data_of")}
    exec(documented(), names | {"PRESETS": {"mnist": TINY}, "replace": replace, "Path": Path})
    assert len(documented().splitlines()) == 5
    assert "Progress(epoch=20, iteration=460, loss=0." in capsys.readouterr().out
    for name in ("relu", "elu"):
        training = pd.read_parquet(tmp_path / "runs" / "mnist" / f"{name}-lr0.1-s0" / "training")
        assert training["epoch"].tolist() == list(range(21))
        assert training["test_error"].iloc[-1] < 20


def test_members_with_parameters_of_their_own_are_another_form(tmp_path: Path) -> None:
    preset = replace(TINY, activations=("relu", "prelu", "elu"), rates=(0.1, 0.01))
    forms = preset.forms
    assert list(forms) == ["", "prelu"]
    assert [m.name for m in forms["prelu"]] == ["prelu-lr0.1-s0", "prelu-lr0.01-s0"]
    assert [m.activation for m in forms[""]] == ["relu", "relu", "elu", "elu"]
    for form, members in forms.items():
        with Trainer(preset, members, data_of(preset), tmp_path / form) as trainer:
            trainer.step()
            assert trainer.losses.sum.isfinite().all()


@pytest.mark.data
def test_data_of_a_preset_are_whitened_if_it_says_so(
    data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = []
    monkeypatch.setattr(
        "unitfisher.experiments.preset_data.whitened",
        lambda *args: told.append(args[1:]) or args[0],
    )
    plain = data_of(replace(PRESETS["cifar10-11"], preprocessing="none"), data_root)
    assert not told
    data = data_of(PRESETS["cifar10-11"], data_root, cache=tmp_path)
    assert told == [("cifar-10", tmp_path)]
    assert torch.equal(data.test_x, plain.test_x)


def small_images() -> Dataset:
    x = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return Dataset(x, torch.arange(4), x[:1], torch.arange(1))


def moved(preset: Preset, folder: Path) -> dict[str, torch.Tensor]:
    """How far the parameters move in a step whose gradients are all zero."""
    with Trainer(preset, preset.members, data_of(TINY), folder) as trainer:
        with torch.no_grad():
            for parameter in trainer.parameters:
                parameter += 1.0
        before = {name: p.detach().clone() for name, p in trainer.ensemble.named_parameters()}
        trainer.optimizer.step([torch.zeros_like(p) for p in trainer.parameters])
        after = trainer.ensemble.named_parameters()
        return {name: (p - before[name]).abs().max() for name, p in after}


@pytest.mark.parametrize(("decayed", "biases"), [("all", True), ("weights", False)])
def test_the_penalty_of_a_preset_is_on_what_it_says(
    decayed: str, biases: bool, tmp_path: Path
) -> None:
    preset = replace(TINY, activations=("elu",), norm="batch", weight_decay=0.1, decayed=decayed)
    distances = moved(preset, tmp_path)
    vectors = {name for name in distances if "weight" not in name or "norm" in name}
    assert vectors == {name for name in distances if name.endswith("bias")} | {
        "stacked.norm1.weight"
    }
    assert {name: bool(distance > 0) for name, distance in distances.items()} == {
        name: biases or name not in vectors for name in distances
    }


@pytest.mark.parametrize("network", ["mlp", "cifar11"])
def test_initial_weights_of_a_preset_are_drawn_as_it_says(network: str, tmp_path: Path) -> None:
    preset = TINY if network == "mlp" else replace(PRESETS["cifar10-11"], preprocessing="none")
    data = data_of(TINY) if network == "mlp" else small_images()
    beyond = []
    for initial in (None, "uniform", "normal"):
        preset = replace(preset, activations=("elu",), probe=4, batch_size=2, initial=initial)
        with Trainer(preset, preset.members, data, tmp_path / str(initial)) as trainer:
            weight = next(p for p in trainer.parameters if p.ndim > 2)[0]
        bound = (3 * preset.weight_variance / weight[0].numel()) ** 0.5
        beyond.append((weight.abs() > bound).float().mean())
    assert beyond[:2] == [0, 0]
    assert beyond[2] > 0.05


@pytest.mark.slow
def test_pyramid_stride_and_dropout_of_a_preset_are_the_networks(tmp_path: Path) -> None:
    preset = replace(
        PRESETS["imagenet-15"],
        activations=("elu",),
        probe=1,
        units=1,
        stride=2,
        pyramid=(2, 1),
        dropout=0.25,
    )
    with Trainer(preset, preset.members, small_images(), tmp_path) as trainer:
        network = trainer.ensemble.members[0]
    assert network.stack1.conv1.stride == (2, 2)
    assert network.hidden1.in_features == 1024 * 5
    assert [network.drop1.p, network.drop2.p] == [0.25, 0.25]


def test_validation_cases_are_left_out_of_training_and_evaluated_on(tmp_path: Path) -> None:
    data = data_of(TINY)
    preset = replace(TINY, activations=("elu",), validation=300)
    with Trainer(preset, preset.members, data, tmp_path) as trainer:
        assert trainer.source.cases == len(data.train_x) - 300
        trained = trainer.source.data.train_x
        ((held, y),) = trainer.source.test()
    cases = [x.tobytes() for x in torch.cat([trained, held]).numpy()]
    assert sorted(cases) == sorted(x.tobytes() for x in data.train_x.numpy())
    at = {
        x.tobytes(): int(label) for x, label in zip(data.train_x.numpy(), data.train_y, strict=True)
    }
    assert [at[x.tobytes()] for x in held.numpy()] == y.tolist()
    assert y.unique().tolist() == list(range(10))


def test_validation_cases_are_the_same_every_time() -> None:
    data = data_of(TINY)
    assert torch.equal(held_out(data, 9).test_x, held_out(data, 10).test_x[:9])


def test_validation_must_leave_something_to_train_on(tmp_path: Path) -> None:
    data = data_of(TINY)
    preset = replace(TINY, validation=len(data.train_x))
    with pytest.raises(ValueError, match=r"validation=\d+ leaves none of \d+ cases to train on"):
        Trainer(preset, preset.members, data, tmp_path)
