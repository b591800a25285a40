"""Photographs are read, cropped and streamed batch by batch, and damaged files are named."""

import gc
import multiprocessing
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from strategies import seeded
from torch import Tensor
from torch.testing import assert_close

from unitfisher.experiments import DataNotFoundError, photographs, streams
from unitfisher.experiments.data import DamagedDataError
from unitfisher.experiments.images import Batch, Files, draw_crops
from unitfisher.experiments.photographs import Photographs, PhotographSets, load_photographs
from unitfisher.experiments.ranks import Ranks
from unitfisher.experiments.streams import Stream


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
    for turn in range(4):  # the worker reads two batches ahead
        assert same(stream.next(), alone.next())
        workers = multiprocessing.active_children()
        assert workers or turn
        for worker in workers:
            os.kill(worker.pid, signal.SIGINT)


def test_workers_go_with_their_stream(sets: PhotographSets) -> None:
    gc.disable()  # it would also end them, only later, and in whatever process it runs
    others = multiprocessing.active_children()
    try:
        Stream(sets.train, 4, seed=0, workers=1).next()
        for worker in set(multiprocessing.active_children()) - set(others):
            worker.join(10)
        assert set(multiprocessing.active_children()) <= set(others)
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
