"""CIFAR and photographs reach a network as the sources preprocess them, and files are checked."""

import gc
import hashlib
import multiprocessing
import os
import pickle
import signal
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from strategies import TOL, normal, seeds
from torch import Tensor
from torch.testing import assert_close

from unitfisher.experiments import DataNotFoundError, Dataset, photographs, streams, whitening
from unitfisher.experiments.images import (
    Batch,
    Crops,
    DamagedDataError,
    Files,
    augmented,
    cropped,
    draw_crops,
    kept,
    load_cifar,
)
from unitfisher.experiments.photographs import Photographs, PhotographSets, load_photographs
from unitfisher.experiments.ranks import Ranks
from unitfisher.experiments.streams import Stream
from unitfisher.experiments.whitening import Zca, contrast_normalised, whitened


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


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
def test_augmentation_is_the_same_on_a_gpu() -> None:
    x, crops = torch.rand(50, 3, 32, 32), draw_crops((50,), 8, seeded())
    assert torch.equal(augmented(x.cuda(), crops).cpu(), augmented(x, crops))


@pytest.mark.gpu
def test_whitening_is_the_same_on_a_gpu(tmp_path: Path) -> None:
    found = whitened(some_images().to("cuda"), "some", tmp_path / "gpu").train_x.cpu()
    assert_close(found, whitened(some_images(), "some", tmp_path / "cpu").train_x)


def photograph(
    path: Path, seed: int, *, mode: str = "RGB", size: tuple[int, int] = (70, 50)
) -> None:
    coarse = torch.randint(256, (6, 8, 3), generator=seeded(seed), dtype=torch.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(coarse.numpy()).resize(size).convert(mode).save(path, "JPEG", quality=95)


@pytest.fixture(scope="session")
def album(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of training images, some grey and of CMYK; two of validation images."""
    folder = tmp_path_factory.mktemp("album")
    for i in range(10):
        mode, size = ("RGB", "L", "CMYK")[min(i % 5, 2)], (40 + 10 * i, 120 - 10 * i)
        photograph(folder / "train" / "abc"[i % 3] / f"{i}.JPEG", i, mode=mode, size=size)
    for i in range(6):
        photograph(folder / "val" / "ac"[i % 2] / f"{i}.JPEG", 100 + i)
    return folder


@pytest.fixture(scope="session")
def sets(album: Path, tmp_path_factory: pytest.TempPathFactory) -> PhotographSets:
    return load_photographs(album, tmp_path_factory.mktemp("cache"))


def validated(album: Path, sets: PhotographSets) -> list[Path]:
    return [album / "val" / name.decode() for name in sets.validation.files.names]


def whole(path: Path) -> Tensor:
    rgb = Image.open(path).convert("RGB").resize((256, 256), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.asarray(rgb) / np.float32(255)).permute(2, 0, 1)


def mean_of(album: Path) -> Tensor:
    return torch.stack([whole(path) for path in sorted(album.glob("train/*/*"))]).mean(0)


def test_the_mean_is_that_of_the_training_images(album: Path, sets: PhotographSets) -> None:
    assert_close(sets.validation.mean, mean_of(album))


def test_validation_images_are_centre_crops_less_the_mean(
    album: Path, sets: PhotographSets
) -> None:
    found = torch.cat([batch.x for batch in sets.validation.in_order(4)])
    expected = torch.stack([whole(path) for path in validated(album, sets)])
    assert_close(found, (expected - mean_of(album))[..., 16:240, 16:240])


def test_training_images_are_the_drawn_crops_less_the_mean(
    album: Path, sets: PhotographSets
) -> None:
    stream, paths = Stream(sets.train, 4, seed=3), sorted(album.glob("train/*/*"))
    found = torch.cat([stream.next().x for _ in range(3)])
    generator = streams._generator(3, 0)
    order = torch.randperm(10, generator=generator)
    crops = draw_crops((10,), 32, generator)
    for x, case in zip(found, order, strict=True):
        top, left, mirrored = (int(draw[case]) for draw in crops)
        seen = (whole(paths[case]) - mean_of(album))[:, top : top + 224, left : left + 224]
        assert_close(x, seen.flip(-1) if mirrored else seen)


def test_photographs_of_another_size_are_resized_and_cropped_to_it(
    album: Path, tmp_path: Path
) -> None:
    sets = load_photographs(album, tmp_path, side=40, seen=32)
    first = next(sets.validation.in_order(1)).x[0]
    path = validated(album, sets)[0]
    rgb = Image.open(path).convert("RGB").resize((40, 40), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.asarray(rgb) / np.float32(255)).permute(2, 0, 1)
    assert_close(first, (pixels - sets.train.mean)[:, 4:36, 4:36])
    assert Stream(sets.train, 4, seed=0).next().x.shape == (4, 3, 32, 32)


def test_crops_larger_than_the_photographs_are_refused(album: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="crops of 41 pixels do not fit photographs of 40"):
        load_photographs(album, tmp_path, side=40, seen=41)


def test_grey_photographs_have_three_equal_channels(sets: PhotographSets) -> None:
    grey = sets.train.files[list(sets.train.files.names).index(b"b/1.JPEG")].x
    assert torch.equal(grey, grey[:1].expand(3, -1, -1))


def test_classes_are_numbered_as_in_training(sets: PhotographSets) -> None:
    labels = torch.cat([batch.y for batch in sets.validation.in_order(4)])
    assert labels.tolist() == [{b"a": 0, b"c": 2}[n[:1]] for n in sets.validation.files.names]


def test_the_first_validation_images_are_not_all_of_the_first_class(sets: PhotographSets) -> None:
    assert len({name[:1] for name in sets.validation.files.names[:3]}) == 2


def test_the_subset_for_validation_is_always_the_same(album: Path, tmp_path: Path) -> None:
    first, second = (load_photographs(album, tmp_path, cases=3).validation for _ in range(2))
    assert len(set(first.files.names)) == 3
    assert first.files.names.tolist() == second.files.names.tolist()


def test_the_mean_is_computed_once(
    album: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load_photographs(album, tmp_path).train.mean
    monkeypatch.setattr(photographs, "_mean", None)
    assert torch.equal(load_photographs(album, tmp_path).train.mean, first)


def copied(album: Path, folder: Path) -> Path:
    for path in album.glob("*/*/*"):
        copy = folder / path.relative_to(album)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    return folder


def test_other_files_have_another_mean(album: Path, tmp_path: Path) -> None:
    folder = copied(album, tmp_path / "copy")
    load_photographs(folder, tmp_path / "cache")
    photograph(folder / "train" / "a" / "0.JPEG", 99)
    found = load_photographs(folder, tmp_path / "cache").train.mean
    assert_close(found, mean_of(folder))


def test_class_that_was_not_trained_on_is_refused(album: Path, tmp_path: Path) -> None:
    folder = copied(album, tmp_path)
    photograph(folder / "val" / "d" / "0.JPEG", 0)
    with pytest.raises(ValueError, match=r"val has classes that .*train has not: \['d'\]"):
        load_photographs(folder, tmp_path)


def test_absent_photographs_are_asked_for(tmp_path: Path) -> None:
    with pytest.raises(DataNotFoundError, match="train holds no images .* for each class there"):
        load_photographs(tmp_path, tmp_path)


@pytest.fixture
def damaged(sets: PhotographSets, album: Path, tmp_path: Path) -> Iterator[PhotographSets]:
    folder = copied(album, tmp_path)
    path = folder / "train" / "b" / "4.JPEG"
    path.write_bytes(path.read_bytes()[:500])
    names = [name.decode() for name in sets.train.files.names]
    files = Files(folder / "train", names, sets.train.files.labels.tolist())
    return PhotographSets(Photographs(files, sets.train.mean), sets.validation)


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_photograph_is_named(damaged: PhotographSets, workers: int) -> None:
    stream = Stream(damaged.train, 10, seed=0, workers=workers)
    with pytest.raises(DamagedDataError, match=r"train/b/4.JPEG cannot be read as an image"):
        stream.next()


def test_damage_repaired_the_stream_goes_on_as_if_there_had_been_none(
    damaged: PhotographSets, album: Path, sets: PhotographSets
) -> None:
    stream = Stream(damaged.train, 10, seed=0)
    with pytest.raises(DamagedDataError):
        stream.next()
    good = (album / "train" / "b" / "4.JPEG").read_bytes()
    (damaged.train.files.folder / "b" / "4.JPEG").write_bytes(good)
    assert same(stream.next(), Stream(sets.train, 10, seed=0).next())


def same(a: Batch, b: Batch) -> bool:
    return torch.equal(a.x, b.x) and torch.equal(a.y, b.y)


def test_an_epoch_shows_every_photograph_once(sets: PhotographSets) -> None:
    stream = Stream(sets.train, 4, seed=0)
    labels = torch.cat([stream.next().y for _ in range(len(stream))])
    assert torch.equal(labels.bincount(), sets.train.files.labels.bincount())
    assert (stream.epoch, stream.position) == (1, 0)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("done", [0, 1, 3, 5])
def test_stream_goes_on_as_if_never_stopped(done: int, workers: int, sets: PhotographSets) -> None:
    through, first = (Stream(sets.train, 4, seed=1) for _ in range(2))
    for _ in range(done):
        assert same(through.next(), first.next())
    resumed = Stream(sets.train, 4, seed=1, workers=workers)
    resumed.load(first.state())
    for _ in range(4):
        assert same(through.next(), resumed.next())


@pytest.mark.parametrize("workers", [0, 1])
def test_processes_read_their_shares_of_the_same_batches(
    workers: int, sets: PhotographSets
) -> None:
    whole = Stream(sets.train, 4, seed=1)
    shares = [Stream(sets.train, 4, 1, workers=workers, ranks=Ranks(r, 2)) for r in range(2)]
    for _ in range(4):  # into the second epoch
        batch = whole.next()
        for rank, share in enumerate(shares):
            assert same(share.next(), Batch(batch.x[rank::2], batch.y[rank::2]))


def test_what_workers_read_ahead_is_not_in_the_state(sets: PhotographSets) -> None:
    stream = Stream(sets.train, 4, seed=0, workers=2)
    stream.next()
    assert (stream.state()["epoch"], stream.state()["position"]) == (0, 1)


def test_workers_leave_interrupts_to_the_process_that_wants_their_batches(
    sets: PhotographSets,
) -> None:
    stream, alone = (Stream(sets.train, 4, seed=0, workers=workers) for workers in (1, 0))
    for _ in range(4):  # the worker reads two batches ahead
        assert same(stream.next(), alone.next())
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, signal.SIGINT)


def test_workers_go_with_their_stream(sets: PhotographSets) -> None:
    gc.disable()  # it would also end them, only later, and in whatever process it runs
    try:
        Stream(sets.train, 4, seed=0, workers=1).next()
        assert not multiprocessing.active_children()
    finally:
        gc.enable()


@pytest.mark.parametrize(("batch_size", "seed"), [(5, 0), (4, 1)])
def test_stream_of_another_kind_is_not_gone_on_with(
    batch_size: int, seed: int, sets: PhotographSets
) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        Stream(sets.train, 4, seed=0).load(Stream(sets.train, batch_size, seed).state())


def test_reading_leaves_the_global_generator_alone(sets: PhotographSets) -> None:
    before = torch.get_rng_state()
    Stream(sets.train, 4, seed=0, workers=1).next()
    next(sets.validation.in_order(4))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.data
def test_imagenets_photographs_are_read(data_root: Path, tmp_path: Path) -> None:
    for part in ("train", "val"):
        for folder in (data_root / "imagenet10" / part).iterdir():
            (tmp_path / part / folder.name).mkdir(parents=True)
            for path in sorted(folder.iterdir())[:5]:
                (tmp_path / part / folder.name / path.name).symlink_to(path)
    train, validation = load_photographs(tmp_path, tmp_path / "cache")
    x, y = Stream(train, 50, seed=0).next()
    assert (x.shape, y.bincount().tolist()) == ((50, 3, 224, 224), [5] * 10)
    assert x.mean().abs() < 0.01  # crops see less of the edges than the mean does
    assert len(torch.cat([batch.y for batch in validation.in_order(32)])) == 50
