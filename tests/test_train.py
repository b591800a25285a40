"""Every preset trains on real data through the one command, and goes on after it was killed."""

import functools
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

import jaxtyping
import pandas as pd
import pytest
import torch
import train
from forked import FORKED, command, interrupt
from interrupts import first_interrupt, interrupts_ignored
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path

from unitfisher.experiments import Dataset, data_of, scripts
from unitfisher.experiments.data import DamagedDataError
from unitfisher.experiments.losses import DivergedError
from unitfisher.experiments.photographs import PhotographSets
from unitfisher.experiments.presets import PRESETS, Preset
from unitfisher.experiments.sources import Held
from unitfisher.experiments.trainer import Trainer
from unitfisher.experiments.watching import Watch

CLOCKS = ("seconds", "monitoring")
TABLES = ["activations", "finished", "path", "plan", "training", "units"]
SHORT = (
    "--measurements 2 --dampings 1e-2 1e-3 --units 2 --rows 16 --probe 8 --tested 8 "
    "--batch-size 2 --threads 1"
)
# whitening takes a minute of every process: test_images has it on real images
CIFAR = "--preprocessing none --rates 1e-6 --phases.1.start 2 --phases.2.start 3 --every 6"
# the 18-net's phases on a smaller network
SMALLER = " ".join(["--network cifar11", *(f"--phases.{i}.dropout 0 0 0 0 0 .5" for i in range(4))])
CHECKED = ("cifar100-11", "imagenet-15")  # whose shapes are, the first time
OVERRIDES = {
    "mnist": "--seeds 0 1 --activations relu elu --iterations 30 --every 20",
    "mnist-autoencoder": "--seeds 0 1 --rates 1e-4 1e-5 --activations elu --iterations 9 --every 6",
    "cifar100-11": f"{CIFAR} --activations relu elu --norm batch --iterations 7",
    "cifar10-11": f"{CIFAR} --activations prelu elu --iterations 7",
    "cifar100-18": f"{CIFAR} --iterations 4",
    "cifar10-18": f"{CIFAR} {SMALLER} --iterations 7 --activations srelu",
    "imagenet-15": "--activations elu --side 40 --crop 32 --iterations 2 --every 2",
}


def arguments(name: str, data_root: Path, out: Path, cache: Path) -> list[str]:
    root = data_root / "imagenet10" if name.startswith("imagenet") else data_root
    folders = ["--data-root", str(root), "--out", str(out), "--cache", str(cache)]
    return ["--preset", name, *SHORT.split(), *OVERRIDES[name].split(), *folders]


@functools.cache
def first_cases(dataset: str, root: Path) -> Dataset:
    """Load a set of data whole, and keep as many cases as any process can be given."""
    of_it = next(preset for preset in PRESETS.values() if preset.dataset == dataset)
    whole = data_of(replace(of_it, preprocessing="none"), root)
    return Dataset(*(getattr(whole, part.name)[:500].clone() for part in fields(whole)))


def loaded(preset: Preset, root: Path, cache: Path) -> Dataset | PhotographSets:
    if preset.dataset == "photographs":
        return data_of(preset, root, cache=cache)
    return first_cases(preset.dataset, root)


def logged(log: Path, given: Sequence[str], data: Dataset | PhotographSets | None) -> None:
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
    if data is None:
        command(*given)
    train.data_of = lambda *_, **__: data
    train.main(*train.parse(given))


def sent(
    number: signal.Signals,
    given: Sequence[str],
    checkpoint: Path,
    log: Path,
    data: Dataset | PhotographSets | None = None,
) -> tuple[int | None, str]:
    """Start the command, and send it a signal as soon as there is a checkpoint."""
    more = ["--checkpoint-every", "0"]
    process = FORKED.Process(target=logged, args=(log, [*given, *more], data))
    process.start()
    while process.is_alive() and not checkpoint.exists():
        time.sleep(0.001)
    os.kill(process.pid, number)
    process.join()
    return process.exitcode, log.read_text()


def assert_same_checkpoints(one: Path, other: Path) -> None:
    states = [torch.load(path, weights_only=True) for path in (one, other)]
    for state in states:
        for clock in CLOCKS:
            del state[clock]
        for watch in state["watches"]:
            del watch["monitor"]["history"]["run"]  # which record it is
    (leaves, form), (others, other_form) = map(tree_flatten_with_path, states)
    assert form == other_form
    for (path, a), (_, b) in zip(leaves, others, strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b, keystr(path)


def assert_same_records(one: Path, other: Path) -> None:
    for folder in sorted(path.parent for path in one.rglob("config.json")):
        tables = sorted({part.parent.relative_to(one) for part in folder.rglob("*.parquet")})
        assert [table.name for table in tables] == TABLES
        for table in tables:
            frames = [pd.read_parquet(run / table) for run in (one, other)]
            frames = [frame.drop(columns=list(CLOCKS), errors="ignore") for frame in frames]
            pd.testing.assert_frame_equal(*frames)


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_a_training_that_was_killed_ends_bit_identical(
    name: str, data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", name not in CHECKED)
    whole, cut, cache = tmp_path / "whole", tmp_path / "cut", tmp_path / "cache"
    given = arguments(name, data_root, cut, cache)
    preset, where = train.parse(given)[1:]
    data = loaded(preset, where.data_root, cache)
    code, said = sent(signal.SIGKILL, given, cut / "checkpoint.pt", tmp_path / "log", data)
    assert code == -signal.SIGKILL, said
    monkeypatch.setattr(train, "data_of", lambda *_, **__: data)
    done = torch.load(cut / "checkpoint.pt", weights_only=True)["iteration"]
    assert 0 < done < preset.iterations

    assert train.main(*train.parse(arguments(name, data_root, whole, cache))) == 0
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    assert train.main(*train.parse([*given, "--resume"])) == 0
    for checkpoint in whole.rglob("checkpoint.pt"):
        assert_same_checkpoints(checkpoint, cut / checkpoint.relative_to(whole))
    assert_same_records(whole, cut)
    for checkpoint in tmp_path.rglob("checkpoint.pt"):  # pytest keeps files, and these are large
        checkpoint.unlink()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cifar100-18", "imagenet-15"])
def test_the_largest_networks_of_the_presets_take_a_step(name: str, tmp_path: Path) -> None:
    preset = replace(PRESETS[name], activations=("elu",), batch_size=2, probe=1)
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    data = Dataset(x, torch.arange(4), x[:1], torch.arange(1))
    with Trainer(preset, preset.members, data, tmp_path) as trainer:
        some = [p[:, :100] for p in trainer.parameters]
        before = [numbers.clone() for numbers in some]
        trainer.step()
        assert trainer.losses.sum.isfinite().all()
        moved = [not torch.equal(*pair) for pair in zip(some, before, strict=True)]
    assert all(moved)


def images() -> Dataset:
    generator = torch.Generator().manual_seed(0)
    return Dataset(
        torch.randn(4, 3, 32, 32, generator=generator),
        torch.arange(4),
        torch.randn(2, 3, 32, 32, generator=generator),
        torch.arange(2),
    )


def other(network: str, *activations: str, task: str = "classification") -> Preset:
    return replace(
        PRESETS["cifar10-11"],
        network=network,
        task=task,
        activations=activations,
        weight_variance=None,
        preprocessing="none",
        phases=(),
        rates=(1e-6,),
        iterations=2,
        every=2,
        batch_size=2,
        probe=4,
        units=2,
        rows=8,
        measurements=2,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "layers"),
    [
        (other("cuda-convnet", "elu", "relu"), 3),
        (other("nin", "elu"), 8),
        (other("dsn", "elu", "own"), 8),
        (other("dsn", "elu", task="squared-hinge"), 8),
        (other("maxout", "own"), 4),
        (other("all-cnn-c", "elu"), 8),
        (other("torchvision:swin_t", "own"), 29),
    ],
    ids=lambda value: f"{value.network} {value.task}" if isinstance(value, Preset) else "",
)
@pytest.mark.filterwarnings("ignore:layers .*attn.* were not called")  # a function reads them
def test_every_network_of_the_table_is_trained_and_measured(
    preset: Preset, layers: int, tmp_path: Path
) -> None:
    with Trainer(preset, preset.members, images(), tmp_path) as trainer:
        before = trainer.ensemble.state_dict()
        before = {name: tensor.clone() for name, tensor in before.items()}
        for _ in trainer:
            pass
        after = trainer.ensemble.state_dict()
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    matrices = {name for name, p in trainer.ensemble.named_parameters() if p.ndim > 2}
    assert matrices <= moved  # all but vectors, where a small step may round to none
    for member in preset.members:
        record = tmp_path / member.name
        assert pd.read_parquet(record / "training")["train_loss"].notna().iloc[-1]
        path = pd.read_parquet(record / "path")
        assert path["layer"].nunique() == layers
        assert path["bias_shift_share_gradient"].notna().any()


def test_the_loss_of_dsn_is_that_of_all_its_classifiers(tmp_path: Path) -> None:
    preset, data = other("dsn", "elu", task="squared-hinge"), images()
    with Trainer(preset, preset.members, data, tmp_path) as trainer:
        dsn = trainer.ensemble.members[0].network.train()
        for drop in (dsn.trunk.drop1, dsn.trunk.drop2):
            drop.p = 0.0
        logits, companions = dsn(data.train_x)
        signs = torch.ones(4, 4).scatter(1, data.train_y[:, None], -1.0)
        hinges = [(1 + signs * z).clamp(min=0) ** 2 for z in (logits, *companions)]
        expected = sum(hinge.sum(1).mean() for hinge in hinges)
        found = trainer._losses(trainer.ensemble(data.train_x[None]), data.train_y[None])
    assert len(hinges) == 4
    torch.testing.assert_close(found, expected[None])


TINY = (
    "--preset mnist --dataset digits --hidden 8 --seeds 0 --activations relu elu --iterations 6 "
    "--every 3 --probe 50 --measurements 2 --units 2 --threads 1"
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    assert train.main(*train.parse([*TINY.split(), "--out", str(out)])) == 0
    return out


def assert_goes_on_to(whole: Path, cut: Path, given: Sequence[str]) -> None:
    assert train.main(*train.parse([*given, "--resume"])) == 0
    assert_same_checkpoints(whole / "checkpoint.pt", cut / "checkpoint.pt")
    assert_same_records(whole, cut)


@pytest.mark.parametrize(
    ("of", "method", "call", "last"),
    [(Held, "next", 0, 1), (Held, "next", 3, 4), (Watch, "record", 0, 1), (Watch, "record", 2, 3)],
    ids=["first step", "a step", "first evaluation", "an evaluation"],
)
def test_an_interrupted_training_ends_after_the_step_and_goes_on_bit_identical(
    of: type, method: str, call: int, last: int, whole: Path, tmp_path: Path
) -> None:
    given = [*TINY.split(), "--out", str(tmp_path)]
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, of, method, {call})
        assert train.main(*train.parse(given)) == train.INTERRUPTED
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["iteration"] == last
    assert_goes_on_to(whole, tmp_path, given)


@pytest.mark.gpu
def test_an_interrupted_training_on_a_gpu_goes_on_bit_identical(
    device: torch.device, tmp_path: Path
) -> None:
    whole, cut = (
        [*TINY.split(), "--device", str(device), "--out", str(tmp_path / out)]
        for out in ("whole", "cut")
    )
    assert train.main(*train.parse(whole)) == 0
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, Held, "next", {3})
        assert train.main(*train.parse(cut)) == train.INTERRUPTED
    assert_goes_on_to(tmp_path / "whole", tmp_path / "cut", cut)


def test_a_second_interrupt_leaves_the_last_checkpoint(whole: Path, tmp_path: Path) -> None:
    given = [*TINY.split(), "--out", str(tmp_path)]
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, Watch, "record", {2, 3})  # of both members, after three steps
        assert train.main(*train.parse([*given, "--checkpoint-every", "0"])) == train.INTERRUPTED
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["iteration"] == 2
    assert_goes_on_to(whole, tmp_path, given)


def test_a_second_interrupt_ends_what_was_begun_in_the_background() -> None:
    noted: list[str] = []
    with interrupts_ignored(), first_interrupt(lambda: noted.append("the first")):
        signal.raise_signal(signal.SIGINT)
        assert noted == ["the first"]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_an_interrupt_from_outside_ends_the_process_as_shells_expect(tmp_path: Path) -> None:
    given = [*TINY.split(), "--iterations", "100000", "--out", str(tmp_path)]
    code, said = sent(signal.SIGINT, given, tmp_path / "checkpoint.pt", tmp_path / "log")
    assert (code, "Traceback" in said) == (130, False)
    assert "Ctrl-C again ends at once" in said


def losses(out: Path) -> list[float]:
    return pd.read_parquet(out / "elu-lr0.01-s0" / "training")["train_loss"].tolist()[1:]


def test_half_precision_trains_as_well(tmp_path: Path) -> None:
    for out, more in {"plain": [], "half": ["--precision", "bfloat16"]}.items():
        given = [*TINY.split(), *more, "--out", str(tmp_path / out)]
        assert train.main(*train.parse(given)) == 0
    found = losses(tmp_path / "half")
    assert found == pytest.approx(losses(tmp_path / "plain"), rel=0.02)
    assert found != losses(tmp_path / "plain")


@pytest.mark.usefixtures("as_users_run_it")  # the type checker is not made to be compiled
def test_a_compiled_training_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    aot = functools.partial(
        torch.compile, backend="aot_eager"
    )  # all of it but machine code, in seconds
    monkeypatch.setattr(torch, "compile", aot)
    for out, more in {"plain": [], "compiled": ["--compile"]}.items():
        given = [*TINY.split(), *more, "--out", str(tmp_path / out)]
        assert train.main(*train.parse(given)) == 0
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_the_end_says_how_fast_it_was_and_what_the_monitors_took(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(*train.parse([*TINY.split(), "--out", str(tmp_path)])) == 0
    said = capsys.readouterr().out
    assert re.search(r"2 networks, 6 steps in \d+ s: .* steps/s; Monitors .*% of the time", said)


def test_a_record_that_lost_rows_is_named(tmp_path: Path) -> None:
    given = [*TINY.split(), "--out", str(tmp_path)]
    assert train.main(*train.parse(given)) == 0
    shutil.rmtree(tmp_path / "elu-lr0.01-s0" / "training")
    with pytest.raises(DamagedDataError, match=r"elu-lr0.01-s0 has 0 of the 3 rows of 'training'"):
        train.main(*train.parse([*given, "--resume"]))


def test_a_resumed_training_computes_in_the_same_precision(tmp_path: Path) -> None:
    given = [*TINY.split(), "--out", str(tmp_path)]
    assert train.main(*train.parse(given)) == 0
    with pytest.raises(ValueError, match="another configuration: precision"):
        train.main(*train.parse([*given, "--resume", "--precision", "bfloat16"]))


def test_a_training_that_diverged_before_its_first_checkpoint_says_that_there_is_none(
    tmp_path: Path,
) -> None:
    given = [*TINY.split(), "--rates", "1e38", "--out", str(tmp_path)]
    with pytest.raises(DivergedError, match="no checkpoint was kept"):
        train.main(*train.parse(given))


@pytest.mark.parametrize("left", [0, 1000, 20_000])
def test_a_damaged_checkpoint_is_named(left: int, tmp_path: Path) -> None:
    given = [*TINY.split(), "--out", str(tmp_path)]
    assert train.main(*train.parse(given)) == 0
    checkpoint = tmp_path / "checkpoint.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:left])
    with pytest.raises(DamagedDataError, match=r"checkpoint.pt cannot be read .*delete"):
        train.main(*train.parse([*given, "--resume"]))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("--device nonsense", r"--device nonsense is unknown"),
        ("--padding same", "mlp does not take --padding same, which is for cifar11"),
        ("--augmented", r"digits does not take --augmented, .*: give --no-augmented"),
        ("--network cifar11 --hidden", "cifar11 takes cifar-10, .* not --dataset digits"),
        ("--network timm:vit --hidden --dataset cifar-10 --weight-variance None", "timm"),
        ("--rates 0.1 -1", r"--rates 0.1 -1.0, but must be above 0"),
        ("--rates nan", r"--rates nan, but must be above 0"),
        ("--norm batch --batch-size 3", r"1 of 4 cases in batches of 3, .* another batch size"),
        ("--seeds 99999999999", r"--seeds 99999999999, but must be 0 or more and below 2\*\*31"),
        ("--dampings -1", r"--dampings -1.0, but must be 0 or more"),
        ("--checkpoint-every -1", r"--checkpoint-every -1.0, but must be 0 or more"),
    ],
    ids=str,
)
def test_what_a_user_can_mend_is_told_in_a_line_with_the_options_as_typed(
    given: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setattr(train, "data_of", lambda *_, **__: images())
    arguments = [*TINY.split(), "--out", str(tmp_path), *given.split()]
    with pytest.raises(SystemExit) as ended:
        scripts.run(lambda: train.main(*train.parse(arguments)), Preset, train.Where)
    assert re.search(told, str(ended.value.code))
    assert "\n" not in str(ended.value.code)


def test_dropout_of_another_number_of_stacks_is_refused_with_the_options_that_take_it_away() -> (
    None
):
    given = ["--preset", "cifar10-18", "--network", "dsn", "--weight-variance", "None"]
    with pytest.raises(SystemExit, match="dsn has no stacks .*: give (.*)") as ended:
        scripts.run(lambda: train.parse(given), Preset)
    _, preset, _ = train.parse([*given, *str(ended.value.code).partition("give ")[2].split()])
    assert [phase.dropout for phase in preset.phases] == [()] * 4


def test_a_folder_that_holds_a_training_says_how_to_go_on(whole: Path) -> None:
    with pytest.raises(SystemExit, match=r"already holds a training.* or continue with --resume$"):
        scripts.run(
            lambda: train.main(*train.parse([*TINY.split(), "--out", str(whole)])), train.Where
        )


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_lists_the_presets_and_says_how_to_see_their_options(
    option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="^0$"):
        train.parse([option])
    said = capsys.readouterr().out
    assert "--preset NAME --help" in said
    for name in PRESETS:
        assert re.search(rf"^  {name} .*(steps|epochs)$", said, re.MULTILINE)


@pytest.mark.parametrize(
    ("given", "option", "value"),
    [
        ("--activation elu", "activations", ("elu",)),
        ("--activation=elu", "activations", ("elu",)),
        ("--seed 3", "seeds", (3,)),
        ("--seed 3 4", "seeds", (3, 4)),
        ("--rate 0.5", "rates", (0.5,)),
        ("--rates 0.5 --rate 0.1", "rates", (0.1,)),
        ("--seed 3 --seeds 1 2", "seeds", (1, 2)),
    ],
)
def test_one_activation_seed_or_rate_can_be_named_as_one(
    given: str, option: str, value: tuple[object, ...]
) -> None:
    _, preset, _ = train.parse(["--preset", "mnist", *given.split()])
    assert preset == replace(PRESETS["mnist"], **{option: value})


def test_help_of_a_preset_names_these(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="^0$"):
        train.parse(["--preset", "mnist", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "--activation, --seed and --rate stand for --activations, --seeds and --rates" in said
    assert set(train.PLURALS) == {"--activation", "--seed", "--rate"}


def test_keywords_are_named_as_typed() -> None:
    said = "seeds=(0, 1), resume=True or augmented=False; phases.1.factor='x'; n=5, and hidden=()."
    expected = "--seeds 0 1, --resume or --no-augmented; --phases.1.factor x; n=5, and --hidden."
    names = {"seeds", "resume", "augmented", "phases", "hidden"}
    assert scripts.as_typed(said, names) == expected
