"""How a training goes on: records, checkpoints, resuming, and what is refused."""

import json
import math
import platform
from dataclasses import replace
from multiprocessing.synchronize import Event
from pathlib import Path

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from forked import FORKED, forked, succeeded
from strategies import seeded
from torch.testing import assert_close
from trainings import SMALL, ended, few

from unitfisher import Monitor
from unitfisher.experiments import Dataset, checkpoints, mlp
from unitfisher.experiments.allocation import keep_freed_memory
from unitfisher.experiments.dropout import generators_of
from unitfisher.experiments.losses import DivergedError
from unitfisher.experiments.presets import PRESETS, Phase, Preset
from unitfisher.experiments.ranks import Ranks
from unitfisher.experiments.trainer import Trainer
from unitfisher.locks import FolderInUseError
from unitfisher.record import RecordExistsError


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    return ended(tmp_path_factory.mktemp("trained"))


CLOCKS = ["seconds", "monitoring"]


def assert_same_records(one: Path, other: Path, preset: Preset) -> None:
    for member in preset.members:
        for table in ("training", "activations", "path", "units", "finished"):
            frames = [pd.read_parquet(run / member.name / table) for run in (one, other)]
            frames = [frame.drop(columns=CLOCKS, errors="ignore") for frame in frames]
            pd.testing.assert_frame_equal(*frames)


@pytest.mark.parametrize("task", ["classification", "reconstruction", "bernoulli-reconstruction"])
@pytest.mark.usefixtures("as_users_run_it")
def test_a_training_that_was_cut_ends_bit_identical(task: str, tmp_path: Path) -> None:
    fisher = "exact" if task == "classification" else "rademacher"
    preset = replace(SMALL, task=task, fisher=fisher, momentum=0.5, weight_decay=1e-4)
    preset = replace(preset, activations=("elu",), rates=(1e-3, 1e-2), dampings=(1e-1, 1e-3))
    data = few()
    with Trainer(preset, preset.members, data, tmp_path / "whole") as whole:
        for _ in whole:
            pass
    cut = Trainer(preset, preset.members, data, tmp_path / "cut")
    for progress in cut:
        if progress.iteration == 3:
            cut.save()
        if progress.iteration == 7:  # in the second epoch: its first evaluation is undone
            break
    cut.close()
    with Trainer(preset, preset.members, data, tmp_path / "cut", resume=True) as resumed:
        assert resumed.iteration == 3
        for _ in resumed:
            pass
    for name, tensor in whole.ensemble.state_dict().items():
        assert torch.equal(resumed.ensemble.state_dict()[name], tensor)
    assert_same_records(tmp_path / "whole", tmp_path / "cut", preset)


@pytest.mark.usefixtures("as_users_run_it")
def test_a_training_that_was_cut_before_its_first_checkpoint_begins_anew(
    trained: Trainer, tmp_path: Path
) -> None:
    cut = Trainer(SMALL, SMALL.members, few(), tmp_path)
    for progress in cut:
        if progress.iteration == 7:  # in the second epoch
            break
    cut.close()
    with Trainer(SMALL, SMALL.members, few(), tmp_path, resume=True) as begun:
        assert begun.iteration == 0
        for _ in begun:
            pass
    assert_same_records(trained.checkpoint.parent, tmp_path, SMALL)


def test_a_training_is_not_overwritten(tmp_path: Path) -> None:
    with Trainer(SMALL, SMALL.members, few(), tmp_path) as trainer:
        next(iter(trainer))
    with pytest.raises(RecordExistsError, match="already holds a run"):
        Trainer(SMALL, SMALL.members, few(), tmp_path)


def test_a_checkpoint_is_not_overwritten(tmp_path: Path) -> None:
    with Trainer(SMALL, SMALL.members, few(), tmp_path) as trainer:
        trainer.save()
    with pytest.raises(RecordExistsError, match="already holds a training"):
        Trainer(SMALL, SMALL.members, few(), tmp_path)


def test_other_members_do_not_resume_a_checkpoint(tmp_path: Path) -> None:
    with Trainer(SMALL, SMALL.members, few(), tmp_path) as trainer:
        trainer.save()
    with pytest.raises(ValueError, match=r"checkpoint.pt is of relu-lr0.01-s0, .* not of elu"):
        Trainer(SMALL, SMALL.members[2:], few(), tmp_path, resume=True)


def test_another_versions_checkpoint_says_what_to_do(tmp_path: Path) -> None:
    with Trainer(SMALL, SMALL.members, few(), tmp_path) as trainer:
        trainer.save()
        state = trainer.state()
    del state["format"], state["watches"][0]["monitor"]["identity"]  # as it once was
    torch.save(state, trainer.checkpoint)
    with pytest.raises(ValueError, match=r"checkpoint.pt .* format 0, .* 3: resume with the vers"):
        Trainer(SMALL, SMALL.members, few(), tmp_path, resume=True)


def test_who_changes_the_form_of_checkpoints_raises_their_format(tmp_path: Path) -> None:
    with Trainer(SMALL, SMALL.members, few(), tmp_path) as trainer:
        state = trainer.state()
    forms = {"checkpoint": state, "source": state["source"], "orders": state["source"]["orders"]}
    forms |= {"watch": state["watches"][0], "monitor": state["watches"][0]["monitor"]}
    assert state["format"] == 3
    assert {name: " ".join(sorted(form)) for name, form in forms.items()} == {
        "checkpoint": "descent diverged ensemble format iteration loss members monitoring random "
        "seconds source watches",
        "source": "augment orders",
        "orders": "generators orders position",
        "watch": "monitor rows",
        "monitor": "generators history identity step units window",
    }


@pytest.mark.usefixtures("as_users_run_it")
def test_a_member_that_diverges_is_named_and_leaves_the_others_alone(tmp_path: Path) -> None:
    preset = replace(SMALL, task="reconstruction", fisher="rademacher", rates=(1e-3, 1e3))
    with (
        Trainer(preset, preset.members, few(), tmp_path) as trainer,
        pytest.warns(UserWarning, match="relu-lr1000-s0, .*elu-lr1000-s1 diverged by step 5"),
    ):
        for _ in trainer:
            pass
    losses = {
        member.name: pd.read_parquet(tmp_path / member.name / "training")["train_loss"].iloc[-1]
        for member in preset.members
    }
    assert all((loss != loss) == ("1000" in name) for name, loss in losses.items())


def test_a_training_whose_loss_is_not_finite_stops_and_keeps_the_last_checkpoint(
    tmp_path: Path,
) -> None:
    preset = replace(SMALL, task="reconstruction", fisher="rademacher", rates=(1e3,))
    with Trainer(preset, preset.members, few(), tmp_path) as trainer:
        trainer.save()
        kept = trainer.checkpoint.read_bytes()
        with pytest.raises(
            DivergedError, match=r"checkpoint.pt was written when the loss was still finite"
        ):
            for _ in trainer:
                pass
        assert trainer.checkpoint.read_bytes() == kept


def test_a_full_disk_leaves_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with Trainer(SMALL, SMALL.members, few(), tmp_path) as trainer:
        trainer.save()
        kept = trainer.checkpoint.read_bytes()
        trainer.step()
        monkeypatch.setattr("unitfisher.experiments.checkpoints.write_atomically", full)
        with pytest.warns(UserWarning, match="no checkpoint was written .*No space left"):
            trainer.save()
        assert trainer.checkpoint.read_bytes() == kept


def test_a_checkpoint_of_more_processes_is_refused_before_anything_is_changed(
    tmp_path: Path,
) -> None:
    with Trainer(SMALL, SMALL.members, few(), tmp_path) as trainer:
        state = trainer.state()
        trainer.step()
        with pytest.raises(ValueError, match="of 2 processes .* not of 1 on cpu: resume as it was"):
            trainer.load(state | {"random": 2 * state["random"]})
        assert trainer.iteration == 1
        trainer.load(state)
        assert trainer.iteration == 0


def test_the_fishers_of_a_member_are_those_of_its_network(trained: Trainer) -> None:
    x, y = trained.watches.each[3].probe
    alone = mlp([64, 16, 12, 10], "elu", seeded(0))
    alone.load_state_dict(trained.ensemble.members[3].state_dict())
    expected = Monitor(alone, "hidden*", units=8).measure(x, targets=y)
    path = pd.read_parquet(trained.checkpoint.parent / "elu-lr0.01-s1" / "path")
    path = path[(path["epoch"] == 2) & (path["damping"] == 1e-3)]
    for layer, of in expected.items():
        found = path[path["layer"] == layer]
        # a member's weights lie otherwise in memory: products in float32 round otherwise
        k = torch.tensor(found["k"].to_numpy())
        assert_close(k, of.k, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_the_record_says_of_how_many_cases_and_classes(trained: Trainer) -> None:
    text = (trained.checkpoint.parent / "elu-lr0.01-s1" / "config.json").read_text()
    config = json.loads(text)["config"]
    assert (config["train_cases"], config["classes"]) == (len(trained.source.data.train_x), 10)


def test_freed_memory_is_kept_where_the_c_library_can() -> None:
    can = platform.libc_ver()[0] == "glibc"
    assert succeeded(forked(lambda: keep_freed_memory() is can))  # it is of a whole process


def test_a_phase_that_names_no_dropout_goes_on_with_the_one_before_it() -> None:
    few, many = (0.1,) * 6, (0.3,) * 6
    first, second = Phase(2, 1.0, few, "all"), Phase(4, 0.5)
    preset = replace(PRESETS["cifar10-11"], phases=(first, second, Phase(6, 0.1, many)))
    found = {step: preset.phase(step) for step in (1, 3, 5, 7)}
    expected = {1: Phase(0), 3: first, 5: Phase(4, 0.5, few, "all"), 7: Phase(6, 0.1, many)}
    assert found == expected


def test_a_training_resumed_in_a_phase_that_names_no_dropout_has_the_one_before_it(
    tmp_path: Path,
) -> None:
    x = torch.rand(4, 3, 8, 8, generator=seeded(0))
    data = Dataset(x, torch.arange(4), x[:1], torch.arange(1))
    phases = (Phase(0), Phase(1, 1.0, (0.9,) * 6), Phase(2, 0.5))
    preset = replace(PRESETS["cifar10-11"], activations=("elu",), batch_size=2, phases=phases)
    with Trainer(preset, preset.members, data, tmp_path) as whole:
        for step in range(3):
            if step == 2:
                whole.save()
            whole.step()
    with Trainer(preset, preset.members, data, tmp_path, resume=True) as resumed:
        resumed.step()
    assert_close(resumed.ensemble.state_dict(), whole.ensemble.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    "change",
    [
        *({"epochs": 0}, {"seeds": ()}, {"seeds": (-1,)}, {"seeds": (1, 1)}, {"measurements": 1}),
        *({"phases": (Phase(9), Phase(0))}, {"hidden": ()}, {"hidden": (8, 0)}),
        *({"rates": (0.1, -1.0)}, {"rates": (math.nan,)}, {"momentum": 1.5}, {"momentum": -0.1}),
        *({"weight_decay": -1e-4}, {"weight_variance": 0.0}, {"dampings": (-1.0,)}),
        *({"phases": (Phase(0, -1.0),)}, {"phases": (Phase(-1),)}),
        {"phases": (Phase(0, 1.0, (1.0,)),)},
    ],
    ids=str,
)
def test_impossible_presets_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        replace(SMALL, **change)


def test_losses_are_minus_log_likelihoods() -> None:
    from unitfisher.experiments.tasks import TASKS

    z, x = torch.randn(4, 3, generator=seeded(0)), torch.rand(4, 3, generator=seeded(1))
    gaussian = -torch.distributions.Normal(z, 1.0).log_prob(x).sum(1)
    gaussian = gaussian - 1.5 * torch.log(torch.tensor(2 * torch.pi))
    assert_close(TASKS["reconstruction"].loss(z, x), gaussian)
    bernoulli = -(x * F.logsigmoid(z) + (1 - x) * F.logsigmoid(-z)).sum(1)
    assert_close(TASKS["bernoulli-reconstruction"].loss(z, x), bernoulli)


def listing(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


@pytest.mark.parametrize(
    "change",
    [{"rates": (0.02,)}, {"seeds": (0, 1, 2)}, {"units": 5}],
    ids=["rate", "seed", "units"],
)
def test_a_refused_resume_leaves_the_folder_as_it_was(
    change: dict[str, object], tmp_path: Path
) -> None:
    with Trainer(SMALL, SMALL.members, few(), tmp_path) as trainer:
        trainer.save()
    before = listing(tmp_path)
    other = replace(SMALL, **change)
    with pytest.raises(ValueError, match="resume"):
        Trainer(other, other.members, few(), tmp_path, resume=True)
    assert listing(tmp_path) == before


def test_a_refused_beginning_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    with Trainer(SMALL, SMALL.members, few(), tmp_path) as trainer:
        next(iter(trainer))
    before = listing(tmp_path)
    other = replace(SMALL, seeds=(2, 0))
    with pytest.raises(RecordExistsError, match="resume=True"):
        Trainer(other, other.members, few(), tmp_path)
    assert listing(tmp_path) == before


def test_a_checkpoint_of_networks_of_another_form_is_refused(tmp_path: Path) -> None:
    with Trainer(SMALL, SMALL.members, few(), tmp_path) as trainer:
        state = trainer.state()
    state["ensemble"]["stacked.norm1.weight"] = torch.ones(4, 16)
    torch.save(state, trainer.checkpoint)
    with pytest.raises(ValueError, match=r"another form .*stacked.norm1.weight.*begin anew"):
        Trainer(SMALL, SMALL.members, few(), tmp_path, resume=True)


def train_on(folder: Path, held: Event, end: Event) -> None:
    with Trainer(SMALL, SMALL.members, few(), folder) as trainer:
        trainer.save()
        held.set()
        end.wait()


def test_a_second_process_waits_until_the_first_is_gone_however_it_went(tmp_path: Path) -> None:
    held, end = FORKED.Event(), FORKED.Event()
    first = FORKED.Process(target=train_on, args=(tmp_path, held, end), daemon=True)
    first.start()
    assert held.wait(60)
    before = listing(tmp_path)
    with pytest.raises(FolderInUseError, match=f"{tmp_path} is in use by another process"):
        Trainer(SMALL, SMALL.members, few(), tmp_path, resume=True)
    assert listing(tmp_path) == before
    first.kill()
    first.join()
    with Trainer(SMALL, SMALL.members, few(), tmp_path, resume=True) as trainer:
        trainer.step()


def test_a_process_goes_on_with_its_own_random_states() -> None:
    cpu = torch.device("cpu")
    states = []
    for rank in range(2):
        torch.manual_seed(rank)
        chances = generators_of(SMALL.members, cpu, rank)
        states += checkpoints.random_states(cpu, chances)
    chances = [torch.Generator() for _ in SMALL.members]
    checkpoints.load_random(states, cpu, chances, Ranks(1, 2))
    assert torch.initial_seed() == 1
    expected = generators_of(SMALL.members, cpu, 1)
    for found, own in zip(chances, expected, strict=True):
        assert torch.equal(found.get_state(), own.get_state())
