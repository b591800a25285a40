from collections.abc import Callable
from math import prod
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import torch.nn.functional as F
from strategies import seeded
from torch import nn
from torch.testing import assert_close

from unitfisher.experiments import (
    ACTIVATIONS,
    DataNotFoundError,
    Dataset,
    evaluate,
    load,
    mlp,
    probe,
    train,
)
from unitfisher.experiments.data import DamagedDataError
from unitfisher.experiments.tasks import TASKS
from unitfisher.experiments.training import batches


def few() -> Dataset:
    data = load("digits")
    return Dataset(data.train_x[:200], data.train_y[:200], data.test_x[:20], data.test_y[:20])


def test_digits_are_those_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    data = load("digits")
    ours = torch.cat([data.train_x * 16, data.train_y[:, None]], 1)
    ours = torch.cat([ours, torch.cat([data.test_x * 16, data.test_y[:, None]], 1)])
    theirs = torch.cat([torch.tensor(x), torch.tensor(y)[:, None]], 1).float()
    assert sorted(ours.tolist()) == sorted(theirs.tolist())


def test_every_class_has_the_same_share_of_test_digits() -> None:
    data = load("digits")
    test, train = data.test_y.bincount(), data.train_y.bincount()
    assert_close(test / (test + train), torch.full((10,), 0.2), atol=0.003, rtol=0)


def test_the_split_is_the_same_every_time() -> None:
    assert torch.equal(load("digits").train_x, load("digits").train_x)


def test_probe_is_a_subset_without_repetition() -> None:
    data = load("digits")
    numbered = data.train_x.clone()
    numbered[:, 0] = torch.arange(len(numbered))
    x, _ = probe(type(data)(numbered, data.train_y, data.test_x, data.test_y), 100, seeded())
    assert len(x[:, 0].unique()) == 100


def test_unknown_data_set_is_refused() -> None:
    with pytest.raises(ValueError, match="'digits', 'mnist' and 'fashion-mnist'"):
        load("cifar")


def test_mnist_without_a_folder_says_how_to_name_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UNITFISHER_DATA", raising=False)
    with pytest.raises(DataNotFoundError, match="--data-root DIR or set UNITFISHER_DATA"):
        load("mnist")


def test_absent_mnist_without_a_network_says_what_to_copy_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    with pytest.raises(DataNotFoundError, match=r"copy its four \*-ubyte files to .*MNIST/raw"):
        load("mnist", tmp_path)


def write_idx(root: Path, train_labels: int) -> None:
    """Write an MNIST of three black images each for training and testing."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", train_labels), ("t10k", 3)):
        for kind, sizes in (("images-idx3", (3, 28, 28)), ("labels-idx1", (count,))):
            head = bytes([0, 0, 8, len(sizes)]) + b"".join(n.to_bytes(4, "big") for n in sizes)
            (raw / f"{part}-{kind}-ubyte").write_bytes(head + bytes(prod(sizes)))


def test_labels_of_other_images_are_refused(tmp_path: Path) -> None:
    write_idx(tmp_path, train_labels=2)
    with pytest.raises(DamagedDataError, match=r"raw has 3 images and 2 labels for training"):
        load("mnist", tmp_path)


SPOILS = {
    "cut": lambda x: x[:-1],
    "cut in its header": lambda x: x[:5],
    "empty": lambda x: b"",
    "longer": lambda x: x + b"x",
    "written over": lambda x: b"x" * len(x),
}


@pytest.mark.parametrize("spoil", SPOILS.values(), ids=SPOILS)
@pytest.mark.parametrize("damaged", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_a_damaged_file_is_named(
    damaged: str, spoil: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    write_idx(tmp_path, train_labels=3)
    file = tmp_path / "MNIST" / "raw" / damaged
    file.write_bytes(spoil(file.read_bytes()))
    with pytest.raises(DamagedDataError, match=f"{damaged} is damaged"):
        load("mnist", tmp_path)


@pytest.mark.data
def test_mnist_is_read_whole(data_root: Path) -> None:
    data = load("mnist", data_root)
    assert data.train_x.shape == (60_000, 784)
    assert data.test_y.bincount().tolist()[:2] == [980, 1135]
    assert data.train_x.max() == 1


@pytest.mark.parametrize(
    ("activation", "expected"),
    [
        ("relu", [0.0, 0.0, 0.5]),
        ("lrelu", [-0.2, -0.05, 0.5]),
        ("srelu", [-1.0, -0.5, 0.5]),
        ("elu", [-0.8646647, -0.3934693, 0.5]),
    ],
)
def test_activation_is_the_papers(activation: str, expected: list[float]) -> None:
    assert_close(
        ACTIVATIONS[activation].module()(torch.tensor([-2.0, -0.5, 0.5])), torch.tensor(expected)
    )


def test_one_seed_gives_every_activation_the_same_weights() -> None:
    first, second = (mlp([5, 4, 4, 3], name, seeded()) for name in ("relu", "elu"))
    assert all(map(torch.equal, first.parameters(), second.parameters()))


def test_unknown_activation_is_refused() -> None:
    with pytest.raises(ValueError, match="there are relu, lrelu, srelu, elu, prelu"):
        mlp([5, 4, 3], "tanh", seeded())


def test_layers_are_named_for_reading() -> None:
    names = [name for name, _ in mlp([5, 4, 4, 3], "elu", seeded()).named_children()]
    assert names == ["hidden1", "act1", "hidden2", "act2", "output"]


def test_weights_are_he_uniform() -> None:
    weight = mlp([600, 400, 3], "elu", seeded())[0].weight
    assert weight.abs().max() <= 0.1  # √(6 / 600)
    assert_close(weight.var().item(), 2 / 600, rtol=0.02, atol=0)  # 5 sd of 240,000 draws


def test_weights_may_have_the_variance_of_torchs_own() -> None:
    ours = mlp([600, 400, 3], "elu", seeded(), weight_variance=1 / 3)[0].weight
    bound = 600**-0.5
    assert 0.999 * bound < ours.abs().max() <= bound


def test_top_5_errors_are_of_classes_beyond_the_five_largest_outputs() -> None:
    outputs = torch.tensor([[5.0, 4, 3, 2, 1, 0, -1]] * 7)
    task, classes = TASKS["classification"], torch.arange(7)
    assert task.error(outputs, classes) == pytest.approx(6 / 7)
    assert task.error(outputs, classes, within=5) == pytest.approx(2 / 7)
    assert evaluate(nn.Identity(), [(outputs, classes)]).top5_error == pytest.approx(2 / 7)


def test_making_a_network_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    mlp([5, 4, 3], "elu", seeded())
    assert torch.equal(before, torch.get_rng_state())


def test_training_is_plain_gradient_descent() -> None:
    data = few()
    ours, theirs = (mlp([64, 8, 10], "elu", seeded()) for _ in range(2))
    for _ in train(ours, data, 2, seeded(1)):
        pass
    generator = seeded(1)
    for _ in range(2):
        for chosen in torch.randperm(len(data.train_x), generator=generator).split(64):
            F.cross_entropy(theirs(data.train_x[chosen]), data.train_y[chosen]).backward()
            for parameter in theirs.parameters():
                parameter.data -= 0.01 * parameter.grad
                parameter.grad = None
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_close(a, b)


def test_training_stops_before_the_first_step_and_after_each_epoch() -> None:
    model = mlp([64, 4, 10], "elu", seeded())
    assert list(train(model, few(), 2, seeded())) == [0, 1, 2]


def test_an_epoch_shows_every_case_once() -> None:
    data = load("digits")
    seen = torch.cat([y for _, y in batches(data, 64, seeded())])
    assert torch.equal(seen.bincount(), data.train_y.bincount())


@pytest.mark.parametrize("mode", [nn.Module.train, nn.Module.eval], ids=["train", "eval"])
def test_evaluation_keeps_the_mode(mode: Callable[[nn.Module], nn.Module]) -> None:
    model = mode(nn.Sequential(nn.Linear(2, 2)))
    before = model.training
    evaluate(model, [(torch.zeros(3, 2), torch.tensor([0, 1, 1]))])
    assert model.training == before


def test_evaluation_counts_wrong_answers_and_ignores_dropout() -> None:
    model = nn.Sequential(nn.Identity(), nn.Dropout(0.9))
    logits = torch.tensor([[9.0, 0.0], [9.0, 0.0], [0.0, 9.0], [0.0, 9.0]])
    labels = torch.tensor([0, 0, 1, 0])
    score = evaluate(model, zip(logits.split(3), labels.split(3), strict=True))
    assert score.error == 0.25
    assert score.loss == pytest.approx(F.cross_entropy(logits, torch.tensor([0, 0, 1, 0])).item())
