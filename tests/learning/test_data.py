"""Datasets, splits and loaders."""

from __future__ import annotations

import dataclasses
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dynnet.errors import DataError
from dynnet.learning.data import DataConfig, load_data

DIGITS = DataConfig(crop=1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of eight 40x40 images to train on and four to test on."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 4)):
        for name, level in (("cat", 60), ("dog", 190)):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(level - 40, level + 40, (40, 40, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{i}.png")
    return tmp_path


@pytest.fixture
def packed(folder: Path, tmp_path: Path) -> Path:
    """The same, a tar for each split."""
    packed = tmp_path / "packed"
    packed.mkdir()
    for split in ("train", "test"):
        with tarfile.open(packed / f"{split}.tar", "w") as tar:
            for path in sorted((folder / split).rglob("*.png")):
                tar.add(path, str(path.relative_to(folder / split)))
    return packed


def config(root: Path, **kwargs: object) -> DataConfig:
    return DataConfig(name="", root=str(root), calibration=0.25, workers=0, **kwargs)  # type: ignore[arg-type]


def test_splits_are_disjoint_complete_and_a_matter_of_the_seed() -> None:
    data = load_data(DIGITS)
    names = [set(s.names) for s in (data.train, data.calibration, data.test)]
    assert sum(map(len, names)) == len(set.union(*names)) == 1797
    again, other = load_data(DIGITS), load_data(dataclasses.replace(DIGITS, seed=1))
    assert again.test.names == data.test.names
    assert again.train.names == data.train.names
    assert other.test.names != data.test.names


def test_an_evaluation_sees_every_image_once_in_order_and_untouched() -> None:
    data = load_data(DIGITS)
    batches = list(data.loader("test", 50))
    assert torch.equal(torch.cat([b.ids for b in batches]), torch.arange(len(data.test)))
    assert torch.equal(torch.cat([b.labels for b in batches]), data.test.labels)
    first = data.test.images[0].float() / 255
    torch.testing.assert_close(batches[0].images[0], (first - 0.5) / 0.5)


@pytest.mark.parametrize("world", [2, 3, 10])
def test_processes_share_a_batch_without_overlap(world: int) -> None:
    data = load_data(DIGITS)
    alone = list(data.train_loader(90 if world == 10 else 60, seed=5).epoch(2))
    parts = [
        list(data.train_loader(90 if world == 10 else 60, seed=5, rank=r, world=world).epoch(2)) for r in range(world)
    ]
    for step, whole in enumerate(alone):
        for rank in range(world):
            assert torch.equal(parts[rank][step].images, whole.images[rank::world])
            assert torch.equal(parts[rank][step].labels, whole.labels[rank::world])
    ids = [torch.cat([b.ids for b in data.loader("test", 50, rank=r, world=world)]) for r in range(world)]
    assert torch.equal(torch.cat(ids).sort().values, torch.arange(len(data.test)))


def test_an_epoch_can_be_entered_anywhere() -> None:
    loader = load_data(DIGITS).train_loader(64, seed=5)
    whole, tail = list(loader.epoch(3)), list(loader.epoch(3, start=7))
    assert len(whole) == len(loader)
    for a, b in zip(whole[7:], tail, strict=True):
        assert torch.equal(a.images, b.images)
    assert not torch.equal(whole[0].ids, next(loader.epoch(4)).ids)


def test_crops_and_mirrors_move_pixels_and_lose_none_inside() -> None:
    data = load_data(dataclasses.replace(DIGITS, crop=2, flip=True))
    batch = next(data.train_loader(256, seed=0).epoch(0))
    plain = (data.train.images[batch.ids].float() / 255 - 0.5) / 0.5
    shifted = {
        (dy, dx, flip)
        for b in range(64)
        for dy in range(5)
        for dx in range(5)
        for flip in (False, True)
        if torch.allclose(_crop(plain[b], dy, dx, flip), batch.images[b], atol=1e-5)
    }
    assert {f for _, _, f in shifted} == {False, True}
    assert len({(dy, dx) for dy, dx, _ in shifted}) > 15


def _crop(image: torch.Tensor, dy: int, dx: int, flip: bool) -> torch.Tensor:
    padded = torch.nn.functional.pad(image, (2, 2, 2, 2), value=-1.0)
    cut = padded[:, dy : dy + 8, dx : dx + 8]
    return cut.flip(2) if flip else cut


def test_folders_and_tars_give_the_same(folder: Path, packed: Path) -> None:
    a, b = load_data(config(folder)), load_data(config(packed))
    assert a.classes == b.classes == ("cat", "dog")
    assert a.input_size == (3, 40, 40)
    assert torch.equal(a.test.images, b.test.images)
    assert torch.equal(a.test.labels, b.test.labels)


def test_a_tar_may_be_read_by_many_processes(packed: Path) -> None:
    alone = load_data(config(packed, input_size=(3, 24, 24)))
    many = load_data(dataclasses.replace(config(packed, input_size=(3, 24, 24)), workers=2))
    many.test.pixels(0)
    for a, b in zip(alone.loader("test", 1), many.loader("test", 1), strict=True):
        assert torch.equal(a.images, b.images)


def test_torchvisions_datasets_are_read_too(folder: Path) -> None:
    timms, torchs = load_data(config(folder)), load_data(dataclasses.replace(config(folder), name="torch/image_folder"))
    assert torchs.classes == timms.classes
    assert torch.equal(torchs.test.labels, timms.test.labels)
    assert torch.equal(torchs.test.images, timms.test.images)


def test_large_images_are_streamed_with_timms_transforms(folder: Path) -> None:
    data = load_data(config(folder, input_size=(3, 24, 24)))
    batches = list(data.loader("test", 3))
    assert [len(b.labels) for b in batches] == [3, 3, 2]
    assert batches[0].images.shape == (3, 3, 24, 24)
    loader = data.train_loader(4, seed=1)
    whole, tail = list(loader.epoch(0)), list(loader.epoch(0, start=1))
    state = torch.get_rng_state()
    assert torch.equal(whole[1].images, tail[0].images)
    assert torch.equal(state, torch.get_rng_state())
    assert data.test.pixels(0).shape == (40, 40, 3)


def test_small_images_are_enlarged_from_memory_as_pillow_would(folder: Path) -> None:
    bicubic = {"interpolation": "bicubic"}
    data = load_data(config(folder, input_size=(3, 80, 80), crop=2, flip=True), bicubic)
    assert data.input_size == (3, 80, 80)
    assert data.preparation["crop_pct"] == 1.0
    batch = next(iter(data.loader("test", 8)))
    for pixels, id in zip(batch.images, batch.ids.tolist(), strict=True):
        picture = Image.fromarray(data.test.pixels(id)).resize((80, 80), Image.Resampling.BICUBIC)
        expected = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 127.5 - 1
        assert (pixels - expected).abs().max() < 1.5 / 127.5
    # What is drawn of an image does not depend on the size at which it is seen.
    small = load_data(config(folder, crop=2, flip=True), bicubic)
    a, b = (next(which.train_loader(4, seed=0).epoch(0)) for which in (small, data))
    assert torch.equal(a.ids, b.ids)
    assert (a.images - torch.nn.functional.avg_pool2d(b.images, 2)).abs().mean() < 0.1


@pytest.mark.parametrize("size", [None, (3, 24, 24)])
def test_an_unreadable_image_is_named_and_never_replaced(folder: Path, size: tuple[int, int, int] | None) -> None:
    (folder / "test" / "dog" / "2.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"cannot read image '.*dog/2.png'.*replace or remove it"):
        list(load_data(config(folder, input_size=size)).loader("test", 4))


def test_bad_folders_are_explained(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no data folder '/nowhere'"):
        load_data(config(Path("/nowhere")))
    (folder / "train").rename(folder / "trian")
    with pytest.raises(DataError, match=r"has no 'train' folder or train.tar; it holds \['test', 'trian'\]"):
        load_data(config(folder))
    (folder / "trian").rename(folder / "train")
    Image.new("RGB", (41, 40)).save(folder / "train" / "cat" / "odd.png")
    with pytest.raises(DataError, match=r"odd.png' of 'train' is 41x40, the first .* is 40x40; set data.input_size"):
        load_data(config(folder))
    (folder / "train" / "cat" / "odd.png").unlink()
    (folder / "test" / "emu").mkdir()
    Image.new("RGB", (40, 40)).save(folder / "test" / "emu" / "0.png")
    with pytest.raises(DataError, match="disagree on the classes: 2 against 3"):
        load_data(config(folder))


def test_impossible_splits_and_batches_are_refused() -> None:
    with pytest.raises(DataError, match="cannot hold 5000.0 out of 1438 images"):
        load_data(dataclasses.replace(DIGITS, calibration=5000.0))
    data = load_data(DIGITS)
    with pytest.raises(DataError, match="batch size 5000 exceeds the 1222 training images"):
        data.train_loader(5000, seed=0)
    with pytest.raises(DataError, match="does not divide among 3 processes"):
        data.train_loader(64, seed=0, world=3)
    for size in ((1, 4, 4), (1, 16, 32), (3, 32, 32)):
        with pytest.raises(DataError, match=r"has images of \(1, 8, 8\), which cannot be enlarged to data.input_size"):
            load_data(dataclasses.replace(DIGITS, input_size=size))
    with pytest.raises(DataError, match="has images of 1 channels, but mean and std have 3 and 1 values"):
        load_data(dataclasses.replace(DIGITS, mean=(0.1, 0.2, 0.3)))


def test_the_first_batches_of_a_sample_hold_all_classes(folder: Path) -> None:
    data = load_data(DataConfig(name="", root=str(folder), calibration=0.25, seed=0))
    in_order = next(iter(data.loader("train", 4))).labels
    assert len(set(in_order.tolist())) == 1  # as folders lie
    batches = list(data.sample_loader(5, seed=0))
    assert len(set(batches[0].labels.tolist())) == 2
    rows = torch.cat([batch.ids for batch in batches])
    assert sorted(rows.tolist()) == list(range(len(data.train)))  # each once, the last incomplete batch as well
    assert torch.equal(batches[0].images, next(iter(data.sample_loader(5, seed=0))).images)
