import json
import re
import runpy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import activation_changes
import all as everything
import autoencoder
import bias_shift_over_time
import bias_shift_per_layer
import cifar100
import cifar100_norm
import cifar_table
import final_values
import imagenet
import matplotlib.pyplot as plt
import mnist
import numpy as np
import pandas as pd
import pytest
import significance
import style
import summary
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from recorded import record
from summaries import summarise
from summary import Summary

from unitfisher.experiments import plotting
from unitfisher.experiments.markdown import spread
from unitfisher.experiments.panels import panels
from unitfisher.experiments.presets import PRESETS, Member, Preset

CIFAR = replace(PRESETS["cifar100-11"], seeds=tuple(range(6)), dampings=(0.1, 0.01))
SHORT = replace(CIFAR, activations=("relu", "elu"), seeds=(0,), iterations=200, tested=500)
PHOTOGRAPHS = replace(PRESETS["imagenet-15"], dampings=(0.1,))
DEEP = replace(PRESETS["mnist-autoencoder"], rates=(1e-2, 1e-3), dampings=(0.1,))
DIVERGING = [Member("elu", 1e-2, 0), Member("elu", 1e-2, 1), Member("srelu", 1e-2, 2)]
WHOLE = (0, 40_000, 80_000, 125_000, 165_000)


@pytest.fixture(autouse=True, scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("tables")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(summary, "FOLDER", folder)
        made(folder, "cifar100-11", CIFAR, WHOLE)
        made(folder, "cifar100-11-bn", replace(CIFAR, seeds=(0, 1), norm="batch"), WHOLE[:4])
        made(folder, "cifar10-11", replace(SHORT, dataset="cifar-10"), (0, 50, 100))
        made(folder, "imagenet-15", PHOTOGRAPHS, (0, 100_000, 200_000))
        made(folder, "mnist-autoencoder", DEEP, (0, 1, 2, 250), DIVERGING)
        yield


@pytest.fixture(scope="module")
def autoencoders(tables: None) -> Figure:
    return autoencoder.draw()


@pytest.fixture(scope="module")
def eleven(tables: None) -> Figure:
    return cifar100.draw()


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(summary, "FOLDER", tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    plt.close("all")


def made(
    folder: Path,
    name: str,
    preset: Preset,
    times: Sequence[int],
    diverging: Sequence[Member] = (),
) -> Summary:
    record(folder / "runs" / name, preset, times, diverging=diverging)
    made = summarise(name, [folder / "runs" / name])
    made.write()
    return made


def curves(ax: Axes) -> dict[str, np.ndarray]:
    named = [line for line in ax.lines if not line.get_label().startswith("_")]
    return {f"{line.get_label()} {line.get_linestyle()}": line.get_ydata() for line in named}


def published(ax: Axes) -> list[tuple[float, float]]:
    red = [line for line in ax.lines if line.get_color() == style.PUBLISHED]
    return [(line.get_xdata()[0], line.get_ydata()[0]) for line in red]


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def foot(figure: Figure) -> str:
    return " ".join(figure.get_supxlabel().split())


def test_tables_keep_what_was_recorded(tables: None) -> None:
    read = Summary.read("cifar100-11")
    run = summary.FOLDER / "runs" / "cifar100-11" / "srelu-lr0.01-s3"
    recorded = pd.read_parquet(run / "training")
    kept = read.training.query("activation == 'srelu' and seed == 3").reset_index(drop=True)
    pd.testing.assert_frame_equal(
        kept[recorded.columns], recorded, check_dtype=False, rtol=1e-4, check_exact=False
    )


def test_layers_stay_in_the_order_of_the_network() -> None:
    assert Summary.read("cifar100-11").layers["layer"].unique().tolist() == [
        "stem",
        "middle",
        "last",
    ]


def test_layers_are_averages_over_units() -> None:
    run = summary.FOLDER / "runs" / "imagenet-15" / "elu-lr0.001-s0"
    of_units = pd.read_parquet(run / "path").query("layer == 'last' and iteration == 200_000")
    row = Summary.read("imagenet-15").layers.query(
        "activation == 'elu' and layer == 'last' and iteration == 200_000"
    )
    assert row["k"].item() == pytest.approx(of_units["k"].median(), rel=1e-4)
    assert row["cosine"].item() == pytest.approx(of_units["cosine"].mean(), rel=1e-4)


def test_networks_that_have_not_begun_are_counted(empty: Path) -> None:
    made(empty, "cifar100-11", SHORT, (0, 100))
    waiting = empty / "runs" / "cifar100-11" / "lrelu-lr0.01-s0"
    waiting.mkdir()
    (waiting / "config.json").write_text("{}")
    growing = summarise("cifar100-11", [empty / "runs"])
    assert "100 of 165,000 iterations, 1 seed, 2 of 3 networks" in growing.conditions


def test_summaries_are_of_one_configuration(empty: Path) -> None:
    record(empty / "a", SHORT, (0, 100))
    record(empty / "b", replace(SHORT, norm="batch"), (0, 100))
    with pytest.raises(
        ValueError, match=r"b/elu-lr0.01-s0 was configured differently from .*a/elu"
    ):
        summarise("cifar100-11", [empty / "a", empty / "b"])


def test_a_network_counts_once_in_one_folder_and_is_refused_in_two(empty: Path) -> None:
    one, two = empty / "one", empty / "two"
    for folder in (one, two):
        record(folder, SHORT, (0, 100))
    again = empty / "two" / ".." / "one"
    assert summarise("twice", [one, again]).provenance["networks"] == 2
    with pytest.raises(ValueError, match=r"two/\S+ and \S+one/\S+ are of one network"):
        summarise("twins", [one, two])


def test_figures_of_one_rate_show_the_largest_that_stayed_finite(empty: Path) -> None:
    preset = replace(SHORT, rates=(0.1, 0.01, 0.001))
    summary = made(empty, "cifar100-11", preset, (0, 100), [Member("elu", 0.1, 0)])
    shown = summary.at_one_rate()
    assert set(shown.training["rate"]) == set(shown.layers["rate"]) == {0.01}
    assert "rate 0.01 (not shown: 0.1, 0.001)" in foot(cifar100.draw())


def test_networks_with_the_activation_they_were_published_with_are_shown(empty: Path) -> None:
    preset = replace(SHORT, network="cuda-convnet", weight_variance=None, activations=("own",))
    summary = made(empty, "cifar100-11", preset, (0, 100))
    assert "| as published | 0.01 |" in final_values.markdown(summary)
    assert any("as published, cuda-convnet" in row[0] for row in cifar_table.rows([summary]))
    assert legend(cifar100.draw()) == ["as published"]


def test_evaluations_within_an_epoch_are_counted_by_iterations(empty: Path) -> None:
    preset = replace(PRESETS["mnist"], seeds=(0,), epochs=2, every=50, dampings=(0.1,))
    summary = made(empty, "mnist", preset, (0, 50, 100))
    assert summary.time == "iteration"
    assert len(summary.final) == len(preset.activations)
    assert mnist.draw().axes[0].get_xlabel() == "iteration"


def test_summaries_need_records(empty: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no records below"):
        summarise("mnist", [empty])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "cifar100-11",
            "cifar-100, GCN and ZCA, padded by 4, cropped and mirrored, evaluated on the test set, "
            "probe set of 256 training cases; network cifar11, Caffe's padding, dropout "
            "0-0.1-0.2-0.3-0.4-0.5 behind each stack, uniform initial weights of variance "
            "1/fan-in; batch 100, rate 0.01 (×0.5 from 35k, ×0.05 from 85k, ×0.005 from 135k), "
            "momentum 0.9, L2 0.0005 on all parameters; 165,000 iterations, 6 seeds; ",
        ),
        (
            "imagenet-15",
            "photographs, 700 of 10 classes, less their mean image, cropped at random to 224 of "
            "256 pixels and mirrored, evaluated on at most 5,000 validation photographs, probe set "
            "of 64 training cases; network imagenet15, Caffe's padding, first stride 1, pyramid "
            "4-2-1, dropout 0.5 of fully connected layers, uniform initial weights of variance ",
        ),
        (
            "mnist-autoencoder",
            "mnist, pixels in [0, 1], evaluated on the test set, probe set of 4,096 training "
            "cases; hidden 1000-500-250-30-250-500-1000, uniform initial weights of variance "
            "0.333/fan-in; batch 64, rates 0.01, 0.001 throughout; 250 of 500 epochs, 3 seeds, "
            "diverged at rate 0.01: ELU (2 of 3 by epoch 1), SReLU (1 of 3 by epoch 1); ",
        ),
    ],
)
def test_conditions_of_every_preset(name: str, said: str) -> None:
    assert Summary.read(name).conditions.startswith(said)


def test_conditions_name_batch_normalisation() -> None:
    assert "; network cifar11, batch norm, Caffe" in Summary.read("cifar100-11-bn").conditions


def test_a_note_is_in_the_conditions(empty: Path) -> None:
    record(empty / "runs", SHORT, (0, 200))
    summarise("cifar100-11", [empty / "runs"], "three classes").write()
    assert "; three classes; " in Summary.read("cifar100-11").conditions


def test_autoencoder_has_a_panel_per_set_and_rate(autoencoders: Figure) -> None:
    assert [ax.get_title() for ax in autoencoders.axes[:2]] == ["rate 0.01", "rate 0.001"]
    assert all(ax.get_yscale() == "log" for ax in autoencoders.axes)
    assert [len(curves(ax)) for ax in autoencoders.axes] == [4, 4, 4, 4]
    assert legend(autoencoders) == ["ELU", "SReLU", "LReLU", "ReLU"]


def test_autoencoder_draws_medians_in_which_divergence_is_infinite(autoencoders: Figure) -> None:
    training = Summary.read("mnist-autoencoder").training
    relu = training.query("activation == 'relu' and rate == 0.01 and seed == 1 and epoch > 0")
    assert curves(autoencoders.axes[0])["ReLU -"] == pytest.approx(relu["train_loss"].to_numpy())
    assert np.isnan(curves(autoencoders.axes[0])["ELU -"]).all()  # two of three seeds
    srelu = training.query("activation == 'srelu' and rate == 0.01 and seed == 1 and epoch > 0")
    assert curves(autoencoders.axes[2])["SReLU -"] == pytest.approx(srelu["test_loss"].to_numpy())


def test_autoencoder_names_who_diverged(autoencoders: Figure) -> None:
    said = [[text.get_text() for text in ax.texts] for ax in autoencoders.axes]
    assert said == [["diverged:\nELU (2 of 3)\nSReLU (1 of 3)"], [], [], []]


def test_cifar100_has_both_values_in_three_parts(eleven: Figure) -> None:
    training = Summary.read("cifar100-11").training.query("activation == 'elu'")
    mean = training.groupby("iteration")["test_error"].mean()
    errors = [curves(ax)["ELU -"] for ax in eleven.axes[3:]]
    for drawn, part in zip(errors, ([*WHOLE], WHOLE[:2], WHOLE[3:]), strict=True):
        assert drawn == pytest.approx(mean[list(part)].to_numpy())
    assert [ax.get_title() for ax in eleven.axes[:3]] == [
        "all 165,000 iterations",
        "first quarter of these",
        "last quarter of these",
    ]


def test_cifar100_has_ribbons_over_seeds(eleven: Figure) -> None:
    assert [len(ax.collections) for ax in eleven.axes] == [4] * 6


def test_cifar100_marks_the_published_errors_after_as_many_iterations(eleven: Figure) -> None:
    assert published(eleven.axes[5]) == [(165_000, error) for error in (28.75, 29.35, 30.59, 31.56)]
    assert not any(published(ax) for ax in eleven.axes[:5])


def test_cifar100_names_the_published_errors_in_words_before(empty: Path) -> None:
    made(empty, "cifar100-11", SHORT, (0, 50, 200))
    figure = cifar100.draw()
    assert not any(published(ax) for ax in figure.axes)
    assert "published, after 165,000 iterations: test error ELU 28.75, SReLU" in foot(figure)
    assert "evaluated on the first 500 test cases, " in foot(figure)
    assert "; 200 of 165,000 iterations, 1 seed; " in foot(figure)
    assert "a single seed: lines without spread" in foot(figure)
    assert "no significance test: 1 pair of runs" in foot(figure)


def test_cifar100_tests_paired_runs(eleven: Figure) -> None:
    assert (
        f"that the final test error of ELU is lower: p = {1 / 64:.2g} against ReLU (6 pairs), "
    ) in foot(eleven)
    assert "not corrected for several comparisons" in foot(eleven)


def errors(values: Sequence[float], seeds: Sequence[int] | None = None) -> pd.DataFrame:
    return pd.DataFrame({"seed": seeds or range(len(values)), "test_error": values})


def test_significance_pairs_seeds() -> None:
    low = errors([1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1])
    high = errors([7, 6, 5, 4, 3, 2], [1, 2, 3, 4, 5, 6])
    assert significance.lower(low, high) == (6, pytest.approx(1 / 64))
    assert significance.lower(high, low) == (6, 1.0)


def test_significance_of_no_difference() -> None:
    assert significance.lower(errors([1.0] * 6), errors([1.0] * 6)) == (6, 1.0)


def test_significance_needs_as_many_pairs_as_can_reach_five_percent() -> None:
    assert significance.lower(errors([1] * 9), errors([2, 3, 4, 5])) == (4, None)
    assert significance.lower(errors([1] * 9), errors([2, 3, 4, 5, 6])) == (
        5,
        pytest.approx(1 / 32),
    )


def test_a_test_that_fails_is_not_told_as_lower() -> None:
    told = significance.told("ELU", {"ELU": errors([2, 3, 4, 5, 6]), "ReLU": errors([1] * 5)})
    assert told.endswith("that the final test error of ELU is lower: p = 1 against ReLU (5 pairs)")


def test_norm_compares_elu_with_each_other() -> None:
    figure = cifar100_norm.draw()
    assert [ax.get_title() for ax in figure.axes[:3]] == ["ELU, ReLU", "ELU, LReLU", "ELU, SReLU"]
    assert set(curves(figure.axes[3])) == {"ELU -", "ReLU -", "ELU --", "ReLU --"}
    assert legend(figure)[-2:] == ["without batch norm", "with batch norm"]
    assert "with batch norm: 125,000 of 165,000 iterations, 2 seeds" in foot(figure)
    assert "ReLU with batch norm (p" not in foot(figure)  # two pairs only


def test_norm_says_what_is_not_recorded(empty: Path) -> None:
    made(empty, "cifar100-11", SHORT, (0, 50, 200))
    figure = cifar100_norm.draw()
    assert set(curves(figure.axes[0])) == {"ELU -", "ReLU -"}
    assert "with batch norm: not recorded" in foot(figure)
    assert "python" not in foot(figure)


def test_imagenet_marks_what_its_axis_reaches() -> None:
    figure = imagenet.draw()
    assert published(figure.axes[1]) == [(160_000, 20), (200_000, 20)]
    assert [ax.get_ylabel().split("\n")[0] for ax in figure.axes] == [
        "training loss",
        "top-5 error (%)",
        "top-1 error (%)",
    ]


def test_imagenet_names_what_lies_beyond_its_axis(empty: Path) -> None:
    made(empty, "imagenet-15", PHOTOGRAPHS, (0, 100_000))
    figure = imagenet.draw()
    assert not published(figure.axes[1])
    assert "is reached by ELU after 160,000 iterations, ReLU after 200,000" in foot(figure)


def test_table_has_ours_beside_the_published() -> None:
    row = next(line for line in cifar_table.markdown().split("\n") if "| ELU, 11 conv" in line)
    final = Summary.read("cifar100-11").final.query("activation == 'elu'")["test_error"]
    ours = f"{final.mean():.2f} ± {final.std():.2f} (165,000 iterations, 6 seeds)"
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1] == "yes"
    assert cells[2] == "–"
    assert re.fullmatch(r"\d+\.\d \(100 of 165,000 iterations, 1 seed\)", cells[3])
    assert cells[4:] == ["*28.75 ± 0.24*", ours]


def test_table_has_rows_that_nobody_published() -> None:
    text = cifar_table.markdown()
    rows = [[cell.strip() for cell in line.split("|")[1:5]] for line in text.splitlines()]
    assert ["ELU, 11 convolutions, batch norm", "yes", "–", "–"] in rows


def test_table_tells_settings_once_where_only_the_norm_differs() -> None:
    ours = [line for line in cifar_table.markdown().splitlines() if line.startswith("- ours")]
    assert [note.split(";")[0] for note in ours if "-bn" in note] == [
        "- ours, cifar100-11-bn: as cifar100-11 with batch norm"
    ]
    assert sum("GCN and ZCA" in note for note in ours) == len(ours) - 1


def test_table_is_published_values_alone_without_ours(empty: Path) -> None:
    figure = cifar_table.draw()
    red = [text for text in figure.axes[0].texts if text.get_color() == style.PUBLISHED]
    assert {"18.04", "7.94", "8.81", "9.38", "7.25", "6.55"} < {text.get_text() for text in red}
    assert {text.get_style() for text in red} == {"italic"}
    assert "none of ours is recorded yet" in foot(figure)


def test_bias_shift_is_of_layers_that_receive_activations() -> None:
    figure = bias_shift_over_time.draw("imagenet-15")
    layers = Summary.read("imagenet-15").layers.query("activation == 'elu' and layer != 'stem'")
    share = layers.groupby("iteration")["mean_share"].mean()
    assert curves(figure.axes[0])["ELU -"] == pytest.approx(share.to_numpy())


def test_bias_shift_has_a_column_per_damping() -> None:
    figure = bias_shift_over_time.draw("mnist-autoencoder")
    k = next(ax for ax in figure.axes if ax.get_ylabel() == "k")
    assert k.get_title(loc="right") == "damping 0.1"
    assert figure.axes[-1].get_xlabel() == "epoch"
    assert "rate 0.001 (not shown: 0.01)" in foot(figure)  # none diverged there


def test_bias_shift_with_and_without_norm_stand_together() -> None:
    figure = bias_shift_per_layer.draw("cifar100-11")
    assert set(curves(figure.axes[0])) == {
        f"{name} {line}" for name in ("ELU", "SReLU", "LReLU", "ReLU") for line in ("-", "--")
    }
    assert [ax.get_title() for ax in figure.axes[:3]] == [
        "iteration 0",
        "iteration 80,000",
        "iteration 125,000",
    ]


def with_norm_at(empty: Path, without: Sequence[int], normalised: Sequence[int]) -> Figure:
    made(empty, "cifar100-11", SHORT, without)
    made(empty, "cifar100-11-bn", replace(SHORT, norm="batch"), normalised)
    return bias_shift_per_layer.draw("cifar100-11")


@pytest.mark.parametrize(
    ("without", "normalised", "shown"),
    [
        ((0, 100, 300, 1000, 3000), (0, 100, 300, 1000), (0, 300, 1000)),
        ((0, 100, 200, 400), (0, 50, 100, 400), (0, 100, 400)),
        ((0, 100, 200), (0, 50, 200), (0, 200)),
    ],
    ids=str,
)
def test_columns_are_times_at_which_both_were_measured(
    without: Sequence[int], normalised: Sequence[int], shown: Sequence[int], empty: Path
) -> None:
    figure = with_norm_at(empty, without, normalised)
    top = figure.axes[: len(shown)]
    assert [ax.get_title() for ax in top] == [f"iteration {time:,}" for time in shown]
    assert len(figure.axes) == 3 * len(shown)
    for ax, time in zip(top, shown, strict=True):
        for line, name in (("-", "cifar100-11"), ("--", "cifar100-11-bn")):
            layers = Summary.read(name).layers.query(
                "activation == 'elu' and damping == 0.01 and layer != 'stem'"
            )
            expected = layers.loc[layers["iteration"] == time, "mean_share"]
            assert curves(ax)[f"ELU {line}"] == pytest.approx(expected.to_numpy())


@pytest.mark.parametrize(
    ("without", "normalised", "columns"),
    [((0, 100, 200), (0, 50, 150), 2), ((100, 200), (50, 150), 1)],
    ids=["one common", "none common"],
)
def test_each_is_shown_at_its_last_measurement_where_few_times_are_common(
    without: Sequence[int], normalised: Sequence[int], columns: int, empty: Path
) -> None:
    figure = with_norm_at(empty, without, normalised)
    assert len(figure.axes) == 3 * columns
    last = figure.axes[columns - 1]
    assert last.get_title() == "iteration 200 without batch norm,\n150 with batch norm"
    for line, name, time in (("-", "cifar100-11", 200), ("--", "cifar100-11-bn", 150)):
        layers = Summary.read(name).layers.query(
            "activation == 'elu' and damping == 0.01 and layer != 'stem'"
        )
        expected = layers.loc[layers["iteration"] == time, "mean_share"]
        assert curves(last)[f"ELU {line}"] == pytest.approx(expected.to_numpy())


def test_titles_are_clear_of_the_letters_beside_them(empty: Path) -> None:
    figure = with_norm_at(empty, (0, 100, 200), (0, 50, 150))
    figure.canvas.draw()
    for ax in figure.axes[:2]:
        title, letter = (text.get_window_extent() for text in (ax.title, ax._left_title))
        assert not title.overlaps(letter)
        assert title.x1 < figure.bbox.x1


def test_layers_are_numbered_from_the_input() -> None:
    (line, *_) = bias_shift_per_layer.draw("imagenet-15").axes[0].lines
    assert line.get_xdata().tolist() == [2, 3]


def test_with_norm_the_untrained_network_is_told_to_be_without() -> None:
    assert "running statistics are the initial ones" in foot(
        bias_shift_per_layer.draw("cifar100-11")
    )
    assert "running statistics" not in foot(bias_shift_per_layer.draw("mnist-autoencoder"))


def test_what_is_mostly_made_by_the_damping_is_told(empty: Path) -> None:
    preset = replace(PHOTOGRAPHS, dampings=(0.6, 0.1))  # recorded with shares as large
    made(empty, "imagenet-15", preset, (0, 100))
    assert "(its share comes to 0.6 at damping 0.6)" in foot(
        bias_shift_over_time.draw("imagenet-15")
    )


def test_little_damping_is_not_told() -> None:
    assert "the damping makes" not in foot(bias_shift_over_time.draw("mnist-autoencoder"))


def test_all_draws_what_it_has_tables_of(
    empty: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(style, "FIGURES", empty / "figures")
    drawn = everything.main()
    assert [path.name for path in drawn] == ["activation_functions.png", "cifar_table.png"]
    assert all(path.stat().st_size > 10_000 for path in drawn)
    assert (empty / "figures" / "cifar_table.md").exists()
    told = capsys.readouterr().out
    assert "imagenet: no tables of imagenet-15; make them with python analysis/train.py" in told


def test_all_makes_the_tables_of_full_records_first(
    empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(style, "FIGURES", empty / "figures")
    record(empty / "runs", PHOTOGRAPHS, (0, 100))
    drawn = everything.main((("imagenet-15", empty / "runs"),))
    assert empty / "figures" / "imagenet.png" in drawn
    assert Summary.read("imagenet-15").training["iteration"].unique().tolist() == [0, 100]


@pytest.mark.parametrize("given", ["--help", "--nosuch"])
def test_a_script_without_options_has_help_and_refuses_others(
    given: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", [mnist.__file__, given])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(mnist.__file__, run_name="__main__")
    assert bool(ended.value.code) == (given == "--nosuch")
    assert given in "".join(capsys.readouterr())


def test_committed_tables_of_mnist_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(summary, "FOLDER", Path(summary.__file__).parent / "tables")
    figures = [mnist.draw(), activation_changes.draw(), bias_shift_per_layer.draw("mnist")]
    assert [len(figure.axes) for figure in figures] == [3, 8, 9]
    assert all(legend(figure) == ["ELU", "SReLU", "LReLU", "ReLU"] for figure in figures)
    assert all("300 epochs, 5 seeds" in foot(figure) for figure in figures)


def test_the_readme_tells_what_the_committed_tables_of_mnist_say(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(summary, "FOLDER", Path(summary.__file__).parent / "tables")
    trained = Summary.read("mnist").training.query("epoch > 0")

    def by_epoch(value: str) -> pd.DataFrame:
        return trained.pivot_table(value, ["epoch", "seed"], "activation")

    loss, error = by_epoch("train_loss"), by_epoch("test_error").groupby("epoch").mean()
    mean_below = loss.groupby("epoch").mean().eval("elu < relu")
    assert mean_below.loc[:26].all()
    assert not mean_below.loc[27:].any()
    assert not loss.eval("elu < relu").loc[35:].any()
    assert loss.eval("elu < relu").loc[34].any()
    assert (loss.groupby("epoch").mean().loc[35:] < 0.003).all(axis=None)
    assert (error.loc[4:].idxmin(axis=1) == "elu").all()
    assert error.loc[3].idxmin() != "elu"
    mean = by_epoch("mean_activation").loc[300]
    assert (mean["elu"] < mean["relu"]).all()
    assert mean["elu"].mean() / mean["relu"].mean() == pytest.approx(0.9, abs=0.01)


def test_changes_leave_out_the_untrained_network() -> None:
    three_evaluations = Summary.read("imagenet-15")  # one change without it, which cannot vary
    assert (three_evaluations.changes["variance"] == 0).all()
    assert (Summary.read("cifar100-11").changes["variance"] > 0).any()


def test_devices_and_versions_that_differ_are_all_named(empty: Path) -> None:
    record(empty / "runs", SHORT, (0, 200))
    file = empty / "runs" / "elu-lr0.01-s0" / "config.json"
    made_elsewhere = json.loads(file.read_text())
    made_elsewhere["device"] = "another machine"
    made_elsewhere["versions"]["torch"] = "9.9"
    file.write_text(json.dumps(made_elsewhere))
    conditions = summarise("cifar100-11", [empty / "runs"]).conditions
    assert re.search(r"another machine, .+, torch 9\.9, \d", conditions)


def ribbon(scale: str) -> tuple[float, float]:
    frame = pd.DataFrame({"activation": "elu", "seed": [0, 1, 2], "epoch": 1, "loss": [1.0, 1, 7]})
    _, ax = plt.subplots()
    ax.set_yscale(scale)
    plotting.plot_over(ax, frame, "loss", x="epoch")
    (drawn,) = ax.collections
    heights = drawn.get_paths()[0].vertices[:, 1]
    return heights.min(), heights.max()


def test_ribbons_are_mean_and_sd() -> None:
    assert ribbon("linear") == pytest.approx((3 - 12**0.5, 3 + 12**0.5))


def test_ribbons_on_logarithmic_axes_end_below_at_the_lowest_seed() -> None:
    assert ribbon("log") == pytest.approx((1, 3 + 12**0.5))


def test_no_text_is_smaller_than_print_allows() -> None:
    figure = bias_shift_over_time.draw("cifar100-11")
    assert figure.get_figwidth() <= 6.75
    written = [text for text in figure.findobj(Text) if text.get_text()]
    assert min(text.get_fontsize() for text in written) >= 6


def test_a_long_foot_takes_nothing_from_the_panels() -> None:
    heights = []
    for conditions in ("short", "as long as " + "a foot with many words " * 60):
        figure, ((ax,),) = panels(1, 1, 1.5)
        style.finish(figure, {}, conditions)
        figure.canvas.draw()
        heights.append(ax.get_window_extent().height)
    assert heights[1] > 0.75 * heights[0]


def test_dashed_lines_have_hollow_markers() -> None:
    frame = pd.DataFrame({"activation": "elu", "seed": 0, "epoch": [0, 1], "loss": [1.0, 2.0]})
    _, ax = plt.subplots()
    (line,) = plotting.plot_over(ax, frame, "loss", x="epoch", style="--").values()
    assert (line.get_linestyle(), line.get_markerfacecolor()) == ("--", "white")


def test_final_values_are_of_the_last_evaluation_of_all_seeds(tables: None) -> None:
    text = final_values.markdown(Summary.read("cifar100-11"))
    final = Summary.read("cifar100-11").final
    errors = final.loc[final["activation"] == "elu", "test_error"]
    row = next(line for line in text.splitlines() if line.startswith("| ELU "))
    assert f"| {spread(errors.mean(), errors.std())} " in row
    assert "top-5" not in text
    assert "top-5 error (%)" in final_values.markdown(Summary.read("imagenet-15"))
