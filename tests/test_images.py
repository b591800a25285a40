"""CIFAR reaches a network whitened as the source whitens it, and files are checked."""

import hashlib
import pickle
import tarfile
from pathlib import Path
from typing import NamedTuple
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import TOL, normal, seeded, seeds
from torch import Tensor
from torch.testing import assert_close

from unitfisher.experiments import DataNotFoundError, Dataset, whitening
from unitfisher.experiments.data import DamagedDataError
from unitfisher.experiments.images import Crops, augmented, cropped, draw_crops, kept, load_cifar
from unitfisher.experiments.whitening import Zca, contrast_normalised, whitened


def unreachable(*_: object, **__: object) -> None:
    raise URLError("no network")


@pytest.fixture
def small_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An archive as the one to be downloaded, of two training images and one test image."""
    from torchvision.datasets import CIFAR10

    folder = tmp_path / "made" / CIFAR10.base_folder
    folder.mkdir(parents=True)
    pixels = np.arange(3 * 3072).reshape(3, 3072).astype(np.uint8)
    contents = {
        "data_batch_1": {"data": pixels[:2], "labels": [7, 2]},
        "test_batch": {"data": pixels[2:], "labels": [1]},
        "batches.meta": {"label_names": list("abcdefghij")},
    }
    checksums = {}
    for name, content in contents.items():
        (folder / name).write_bytes(pickle.dumps(content))
        checksums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    archive = tmp_path / CIFAR10.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, CIFAR10.base_folder)
    train, test, meta = checksums.items()
    monkeypatch.setattr(CIFAR10, "train_list", [train])
    monkeypatch.setattr(CIFAR10, "test_list", [test])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "filename": meta[0], "md5": meta[1]})
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    return tmp_path


def test_cifar_comes_out_of_the_archive_by_channel_row_and_column(small_cifar: Path) -> None:
    data = load_cifar("cifar-10", small_cifar)
    expected = (torch.arange(3 * 3072) % 256).view(3, 3, 32, 32) / 255
    assert_close(torch.cat([data.train_x, data.test_x]), expected)


def test_cifar_keeps_the_classes_in_the_order_of_the_images(small_cifar: Path) -> None:
    data = load_cifar("cifar-10", small_cifar)
    assert [data.train_y.tolist(), data.test_y.tolist()] == [[7, 2], [1]]


def test_damaged_cifar_file_is_named(small_cifar: Path) -> None:
    load_cifar("cifar-10", small_cifar)
    (small_cifar / "cifar-10-batches-py" / "test_batch").write_bytes(b"cut sh")
    with pytest.raises(DamagedDataError, match="cifar-10-batches-py/test_batch is damaged"):
        load_cifar("cifar-10", small_cifar)


def test_absent_cifar_without_a_network_says_what_to_unpack_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    with pytest.raises(
        DataNotFoundError, match=r"python/train is absent .*unpack cifar-100-python.tar.gz from"
    ):
        load_cifar("cifar-100", tmp_path)


def test_unknown_cifar_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'cifar-10' and 'cifar-100'"):
        load_cifar("cifar-20", tmp_path)


@pytest.mark.data
@pytest.mark.parametrize(("name", "classes"), [("cifar-10", 10), ("cifar-100", 100)])
def test_cifar_is_read_whole(name: str, classes: int, data_root: Path) -> None:
    data = load_cifar(name, data_root)
    assert data.train_x.shape[1:] == data.test_x.shape[1:] == (3, 32, 32)
    assert data.train_y.bincount().tolist() == [50_000 // classes] * classes
    assert data.test_y.bincount().tolist() == [10_000 // classes] * classes
    assert data.train_x.min() == 0
    assert data.train_x.max() == 1


@st.composite
def pictures(draw, least: int = 1) -> Tensor:
    """Draw images with pixels in [0, 1], none of them of one colour."""
    n, channels, side = (
        draw(st.integers(least, 12)),
        draw(st.integers(1, 3)),
        draw(st.integers(2, 4)),
    )
    return torch.rand(n, channels, side, side, generator=draw(seeds), dtype=torch.float64)


@given(x=pictures())
def test_normalised_images_have_the_norm_and_no_mean(x: Tensor) -> None:
    rows = contrast_normalised(x).flatten(1)
    assert_close(rows.norm(dim=1), torch.full_like(rows[:, 0], 55.0), **TOL)
    assert_close(rows.mean(1), torch.zeros_like(rows[:, 0]), **TOL)


@given(x=pictures(), gain=st.floats(0.1, 10), brightness=st.floats(-10, 10))
def test_normalisation_sees_neither_brightness_nor_contrast(
    x: Tensor, gain: float, brightness: float
) -> None:
    assert_close(contrast_normalised(gain * x + brightness), contrast_normalised(x), **TOL)


@given(value=st.floats(0, 1, width=32))
def test_image_of_one_colour_becomes_zero(value: float) -> None:
    x = torch.full((1, 3, 32, 32), value)
    assert torch.equal(contrast_normalised(x), torch.zeros_like(x))


def pylearn2(train: np.ndarray, x: np.ndarray) -> np.ndarray:
    def gcn(X: np.ndarray) -> np.ndarray:
        X = X - X.mean(axis=1)[:, None]
        return X / (np.sqrt((X**2).sum(axis=1)) / 55.0)[:, None]

    train, x = gcn(train), gcn(x)
    mean = train.mean(axis=0)
    covariance = np.cov(train, rowvar=False, bias=True) + 0.1 * np.identity(train.shape[1])
    values, vectors = np.linalg.eigh(covariance)
    return (x - mean) @ np.dot(vectors * (1.0 / np.sqrt(values)), vectors.T)


@given(x=pictures(least=4))
@settings(max_examples=10)
def test_both_steps_are_those_of_pylearn2(x: Tensor) -> None:
    train, test = contrast_normalised(x[2:]), contrast_normalised(x[:2])
    expected = pylearn2(x[2:].flatten(1).numpy(), x[:2].flatten(1).numpy())
    assert_close(Zca.fit(train)(test).flatten(1), torch.from_numpy(expected), **TOL)


@given(x=pictures(), gain=st.floats(0.1, 10))
def test_whitening_leaves_variances_of_the_eigenbasis_over_themselves_and_the_bias(
    x: Tensor, gain: float
) -> None:
    x = gain * x
    rows, white = x.flatten(1), Zca.fit(x)(x).flatten(1)
    variances, E = torch.linalg.eigh(rows.mT.cov(correction=0))
    found = E.mT @ white.mT.cov(correction=0) @ E
    assert_close(found, torch.diag(variances / (variances + 0.1)), **TOL)


@given(x=pictures())
def test_whitened_training_images_have_no_mean(x: Tensor) -> None:
    assert_close(Zca.fit(x)(x).mean(0), torch.zeros_like(x[0]), **TOL)


@given(x=pictures())
def test_whitening_is_symmetric(x: Tensor) -> None:
    P = Zca.fit(x).P
    assert_close(P, P.mT, **TOL)


@given(x=pictures(), part=st.integers(1, 12))
def test_parts_make_no_difference(x: Tensor, part: int) -> None:
    expected = Zca.fit(x)(contrast_normalised(x))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(whitening, "PART", part)
        assert_close(Zca.fit(x)(contrast_normalised(x)), expected, **TOL)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.rand(0, 4), "no images"),
        (torch.tensor([[0.0, torch.nan], [0.0, 1.0]]), "NaN"),
    ],
    ids=["none", "nan"],
)
def test_what_cannot_be_whitened_is_refused(x: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Zca.fit(x)


def some_images(seed: int = 0) -> Dataset:
    x, y = torch.rand(12, 3, 4, 4, generator=seeded(seed)), torch.arange(12)
    return Dataset(x[:8], y[:8], x[8:], y[8:])


def test_test_images_leave_no_trace_in_the_statistics(tmp_path: Path) -> None:
    data = some_images()
    other = Dataset(data.train_x, data.train_y, data.test_x[:1] ** 2, data.test_y[:1])
    found = whitened(other, "some", tmp_path / "b").train_x
    assert torch.equal(found, whitened(data, "some", tmp_path / "a").train_x)


def test_test_images_are_whitened_by_the_training_images(tmp_path: Path) -> None:
    data = some_images()
    expected = Zca.fit(contrast_normalised(data.train_x))(contrast_normalised(data.test_x))
    assert_close(whitened(data, "some", tmp_path).test_x, expected)


def test_what_was_fitted_is_not_fitted_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = whitened(some_images(), "some", tmp_path / "cache")
    monkeypatch.setattr(Zca, "fit", None)
    assert torch.equal(whitened(some_images(), "some", tmp_path / "cache").train_x, first.train_x)


@pytest.mark.parametrize(
    ("seed", "constant", "value"), [(1, "VERSION", 1), (0, "NORM", 10.0), (0, "FILTER_BIAS", 1.0)]
)
def test_other_images_or_constants_are_fitted_anew(
    seed: int, constant: str, value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whitened(some_images(), "some", tmp_path)
    monkeypatch.setattr(whitening, constant, value)
    whitened(some_images(seed), "some", tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("content", [b"", b"short", bytes(10_000)], ids=["empty", "cut", "other"])
def test_broken_file_is_made_again_with_a_warning(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "kept.pt"
    path.write_bytes(content)
    with pytest.warns(UserWarning, match=r"kept.pt is of no use .*computed again"):
        kept(path, lambda: {"x": torch.ones(3)})
    assert torch.equal(kept(path, dict)["x"], torch.ones(3))


def test_values_are_returned_where_the_disk_does_not_take_them(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="kept.pt") as warned:
        values = kept(tmp_path / "file" / "kept.pt", lambda: {"x": torch.ones(3)})
    assert "was not written" in str(warned[-1].message)
    assert torch.equal(values["x"], torch.ones(3))


def test_nothing_but_the_file_is_left_behind(tmp_path: Path) -> None:
    kept(tmp_path / "kept.pt", lambda: {"x": torch.ones(3)})
    assert [path.name for path in tmp_path.iterdir()] == ["kept.pt"]


@pytest.mark.data
def test_whitened_cifar_has_the_variances_of_the_law(data_root: Path, tmp_path: Path) -> None:
    data = load_cifar("cifar-100", data_root)
    x, y = data.train_x[:2000, ..., 8:24, 8:24], data.train_y[:2000]
    found = whitened(Dataset(x, y, x[:9], y[:9]), "cifar-100", tmp_path).train_x
    before, after = (
        torch.linalg.eigvalsh(images.flatten(1).double().mT.cov(correction=0))
        for images in (contrast_normalised(x), found)
    )
    assert_close(after, before / (before + 0.1), rtol=0, atol=1e-5)  # of float32 images


class Geometry(NamedTuple):
    x: Tensor
    seed: int


@st.composite
def geometries(draw) -> Geometry:
    many = draw(st.lists(st.integers(1, 4), min_size=1, max_size=2))
    size = [draw(st.integers(1, 5)) for _ in range(3)]
    x = normal(draw(seeds), *many, *size)
    return Geometry(x, draw(st.integers(0, 2**32)))


def one_by_one(case: Geometry, crops: Crops) -> Tensor:
    h, w = case.x.shape[-2:]
    images = case.x.flatten(0, -4)
    seen = []
    for image, top, left, mirrored in zip(
        images, *(d.flatten().tolist() for d in crops), strict=True
    ):
        padded = F.pad(image, [4] * 4)[:, top : top + h, left : left + w]
        seen.append(padded.flip(-1) if mirrored else padded)
    return torch.stack(seen).view_as(case.x)


@given(case=geometries())
def test_augmentation_is_padding_cropping_and_mirroring_one_by_one(case: Geometry) -> None:
    crops = draw_crops(case.x.shape[:-3], 8, seeded(case.seed))
    assert torch.equal(augmented(case.x, crops), one_by_one(case, crops))


def test_draws_of_one_member_are_shared_by_all_when_wished() -> None:
    x = torch.rand(3, 5, 2, 12, 10)
    crops = draw_crops((5,), 4, seeded())
    alone = [cropped(member, crops, (8, 6)) for member in x]
    assert torch.equal(cropped(x, crops, (8, 6)), torch.stack(alone))


def test_every_shift_and_side_is_as_likely() -> None:
    n, kinds = 81_000, 2 * 9 * 9
    crops = draw_crops((n,), 8, seeded())
    kind = (crops.top * 9 + crops.left) * 2 + crops.mirrored
    counts = kind.bincount(minlength=kinds)
    assert len(counts) == kinds
    expected, error = n / kinds, (n / kinds) ** 0.5
    assert (counts - expected).abs().max() < 5 * error


def test_augmenting_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    augmented(torch.rand(3, 3, 8, 8, generator=seeded()), draw_crops((3,), 8, seeded()))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.gpu
def test_augmentation_is_the_same_on_a_gpu(device: torch.device) -> None:
    x, crops = torch.rand(50, 3, 32, 32), draw_crops((50,), 8, seeded())
    assert torch.equal(augmented(x.to(device), crops).cpu(), augmented(x, crops))


@pytest.mark.gpu
def test_whitening_is_the_same_on_a_gpu(device: torch.device, tmp_path: Path) -> None:
    found = whitened(some_images().to(device), "some", tmp_path / "gpu").train_x.cpu()
    assert_close(found, whitened(some_images(), "some", tmp_path / "cpu").train_x)
