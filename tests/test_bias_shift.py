import json
import shutil
from dataclasses import replace
from pathlib import Path

import bias_shift
import claims
import jobs
import numpy as np
import pandas as pd
import pytest
import tables
import workers
from matplotlib.figure import Figure

from unitfisher.experiments.markdown import spread

TINY = bias_shift.Config(
    activations=("relu", "elu"),
    seeds=(0,),
    epochs=2,
    layers=2,
    probe=300,
    units=4,
    measurements=3,
    processes=1,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> bias_shift.Config:
    config = replace(TINY, out=tmp_path_factory.mktemp("made"))
    bias_shift.main(config)
    return config


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("figures.draw_all", lambda _, folder, __: [folder / "none.png"])


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: object) -> bool:
        raise AssertionError("a run was made")

    monkeypatch.setattr("workers.run", run)


def test_four_figures_in_two_formats(made: bias_shift.Config) -> None:
    names = {path.stem for path in (made.folder / "figures").glob("*.p[nd][gf]")}
    assert names == {"mean_activation", "shares_per_layer", "correction_factors", "angle"}
    assert len(list((made.folder / "figures").iterdir())) == 8


def test_figures_say_what_was_run_where(
    made: bias_shift.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    feet: list[str] = []

    def keep(figure: Figure, stem: Path) -> list[Path]:
        feet.append(figure.get_supxlabel())
        return [stem]

    monkeypatch.setattr("figures.write", keep)
    bias_shift.main(made)
    device = json.loads((made.folder / "digits-elu-s0" / "config.json").read_text())["device"]
    for said in ("rate 0.01, batch 64, 2 epochs", "seeds 0", device, "Ribbons: ± sd"):
        assert [said in " ".join(foot.split()) for foot in feet] == [True] * 4


def test_table_has_every_quantity_of_every_activation(made: bias_shift.Config) -> None:
    table = pd.read_csv(made.folder / "table.csv")
    assert set(table["quantity"]) == {quantity.name for quantity in tables.QUANTITIES}
    assert set(table["activation"]) == {"relu", "elu"}
    assert set(table["when"]) == {"through training", "at the end"}


def test_table_speaks_of_the_record(made: bias_shift.Config) -> None:
    table = pd.read_csv(made.folder / "table.csv").query("when == 'at the end'")
    path = pd.read_parquet(made.folder / "digits-elu-s0" / "path")
    path = path.query("epoch == 2 and damping == 0.01 and layer != 'hidden1'")
    row = table.query("quantity == 'cosine' and damping == 0.01 and activation == 'elu'")
    assert row["mean"].item() == pytest.approx(path["cosine"].mean())


def test_record_keeps_live_and_probe_measurements(made: bias_shift.Config) -> None:
    phases = pd.read_parquet(made.folder / "digits-elu-s0" / "units")["phase"]
    assert set(phases) == {"train", "measure"}


def test_measuring_does_not_change_training(made: bias_shift.Config, tmp_path: Path) -> None:
    job = bias_shift.plan(replace(made, measurements=2, units=2, out=tmp_path))[1]
    jobs.run(job, lambda _: None)
    one, other = (
        pd.read_parquet(folder / job.config.name / "training") for folder in (made.folder, tmp_path)
    )
    pd.testing.assert_frame_equal(one, other, check_exact=True)


def test_one_activation_alone_gets_a_table_and_no_verdict(
    made: bias_shift.Config, undrawn: None, capsys: pytest.CaptureFixture[str]
) -> None:
    bias_shift.main(replace(made, activations=("elu",)))
    assert "run it with at least one more" in capsys.readouterr().out


def test_finished_runs_are_not_made_again(
    made: bias_shift.Config, refused: None, undrawn: None, capsys: pytest.CaptureFixture[str]
) -> None:
    bias_shift.main(made)
    assert "2 of 2 runs are finished already" in capsys.readouterr().out


def test_another_configuration_is_refused(made: bias_shift.Config, refused: None) -> None:
    with pytest.raises(jobs.RunMismatchError, match=r"units was 4 and is 5.*another --out"):
        bias_shift.main(replace(made, units=5))


def test_a_finished_run_without_its_tables_is_refused(
    made: bias_shift.Config, tmp_path: Path, refused: None
) -> None:
    shutil.copytree(made.folder, tmp_path / "published", ignore=shutil.ignore_patterns("path"))
    with pytest.raises(jobs.RunMismatchError, match=r"without its tables path.*another --out"):
        bias_shift.main(replace(made, out=tmp_path / "published"))


def test_a_folder_that_holds_no_run_is_refused(tmp_path: Path, refused: None) -> None:
    (tmp_path / "digits-elu-s0").mkdir()
    (tmp_path / "digits-elu-s0" / "thesis.tex").touch()
    with pytest.raises(jobs.RunMismatchError, match="no run; choose another --out"):
        bias_shift.main(replace(TINY, out=tmp_path))
    assert (tmp_path / "digits-elu-s0" / "thesis.tex").exists()


def test_an_interrupted_run_is_made_again_and_the_others_are_kept(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    undrawn: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = replace(TINY, epochs=1, measurements=2, out=tmp_path)

    def interrupted_in_elu(job: jobs.Job, tell: jobs.Tell) -> bool:
        return jobs.run(job, tell, lambda: job.config.activation == "elu") or interrupt()

    def interrupt() -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("workers.run", interrupted_in_elu)
        assert bias_shift.main(config) == 130
    assert "1 of 2 runs are finished and kept" in capsys.readouterr().out
    assert [jobs.state(job) for job in bias_shift.plan(config)] == ["finished", "unfinished"]

    assert bias_shift.main(config) == 0
    assert "1 of 2 runs are finished already" in capsys.readouterr().out
    assert [jobs.state(job) for job in bias_shift.plan(config)] == ["finished", "finished"]


@pytest.mark.slow
def test_several_processes_make_the_same_runs_as_one(
    made: bias_shift.Config, tmp_path: Path
) -> None:
    workers.run_all(bias_shift.plan(replace(made, out=tmp_path)), 2, lambda _: None)
    for name in ("digits-relu-s0", "digits-elu-s0"):
        one, other = (pd.read_parquet(at / name / "path") for at in (made.folder, tmp_path))
        pd.testing.assert_frame_equal(one, other, check_exact=True)


@pytest.mark.parametrize(
    ("gains", "verdict"),
    [
        ([0.2, 0.3, 0.25], "holds"),
        ([-0.2, -0.3, -0.25], "does not hold"),
        ([0.2, 0.3, -0.01], "not decided"),
        ([0.01, 0.5, 0.01], "not decided"),
        ([0.3], "not decided"),
        ([float("nan")] * 3, "not decided"),
    ],
    ids=["agree", "reversed", "one seed against", "spread too wide", "one seed", "no value"],
)
def test_the_rule(gains: list[float], verdict: str) -> None:
    assert claims.judge(pd.Series(gains)) == verdict


def test_the_rule_says_how_often_chance_alone_fulfils_it() -> None:
    draw, repeats = np.random.default_rng(0), 4_000
    for seeds, share in claims.CHANCE.items():
        gains = draw.normal(size=(repeats, seeds))
        verdicts = [claims.judge(pd.Series(of)) for of in gains]
        error = 5 * (share * (1 - share) / repeats) ** 0.5 + 0.005  # standard errors, rounding
        for verdict in ("holds", "does not hold"):
            assert verdicts.count(verdict) / repeats == pytest.approx(share, abs=error)
        assert f"{100 * share:.0f} % ({seeds} seeds)" in claims.RULE


def test_a_written_report_gets_todays_rule_and_keeps_its_verdicts() -> None:
    old = "a run\n\n```\nan older rule\n```\n\n- **holds**\n"
    assert claims.restated(old) == f"a run\n\n```\n{claims.RULE}```\n\n- **holds**\n"


def by_seed(quantity: str, activation: str, values: list[float], damping: str = "") -> pd.DataFrame:
    return pd.DataFrame(
        {
            "quantity": quantity,
            "activation": activation,
            "damping": damping,
            "seed": range(len(values)),
            "value": values,
        }
    )


COSINE = claims.CLAIMS[3]
MEAN = claims.CLAIMS[0]


def test_verdicts_that_differ_between_dampings_depend_on_the_damping() -> None:
    frame = pd.concat(
        [
            by_seed("cosine", "relu", [0.1, 0.11, 0.12], "0.1"),
            by_seed("cosine", "elu", [0.3, 0.31, 0.32], "0.1"),
            by_seed("cosine", "relu", [0.1, 0.11, 0.12], "0.001"),
            by_seed("cosine", "elu", [0.05, 0.06, 0.04], "0.001"),
        ]
    )
    found = claims.compare(frame, COSINE, "at the end")
    assert [c.verdict for c in found] == ["holds", "does not hold"]
    assert claims.headline(found) == "depends on the damping"


def test_closer_to_zero_means_the_absolute_value() -> None:
    relu = by_seed("mean_activation", "relu", [0.1, 0.11, 0.12])
    elu = by_seed("mean_activation", "elu", [-0.3, -0.31, -0.33])
    (found,) = claims.compare(pd.concat([relu, elu]), MEAN, "at the end")
    assert found.verdict == "does not hold"


def test_headline_says_against_whom() -> None:
    frame = pd.concat(
        [
            by_seed("mean_activation", "elu", [0.2, 0.21, 0.22]),
            by_seed("mean_activation", "relu", [0.4, 0.42, 0.41]),
            by_seed("mean_activation", "srelu", [0.1, 0.12, 0.11]),
        ]
    )
    found = claims.compare(frame, MEAN, "at the end")
    assert claims.headline(found) == "holds against ReLU; does not hold against SReLU"


def test_measured_epochs_hold_the_first_and_the_last() -> None:
    assert jobs.measured_epochs(60, 8) == [0, 1, 2, 4, 8, 15, 30, 60]
    assert jobs.measured_epochs(60, 2) == [0, 60]
    assert jobs.measured_epochs(1, 5) == [0, 1]


@pytest.mark.parametrize(
    ("mean", "sd", "written"),
    [
        (0.82693, 0.00062, "0.8269 ± 0.0006"),
        (0.1234, 0.056, "0.123 ± 0.056"),
        (1234.5, 67.8, "1234 ± 68"),
        (-0.6, 1.31, "-0.6 ± 1.3"),
        (0.0, 0.0, "0.0 ± 0.0"),
        (1.8e-5, 9.21e-7, "1.8e-05 ± 9.2e-07"),
        (0.1234, float("nan"), "0.123"),
        (float("nan"), float("nan"), "-"),
    ],
)
def test_spread_is_written_with_the_digits_it_has(mean: float, sd: float, written: str) -> None:
    assert spread(mean, sd) == written


@pytest.mark.parametrize(
    "change",
    [{"dampings": (-1.0,)}, {"device": "nonsense"}, {"seeds": (1, 1)}, {"measurements": 1}],
    ids=str,
)
def test_impossible_options_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        replace(TINY, **change)
