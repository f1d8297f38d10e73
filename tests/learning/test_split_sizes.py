"""All splits of a dataset give images of one size, decided once; and what workers cannot decode."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dynnet.errors import DataError
from dynnet.learning.data import Data, DataConfig, load_data
from dynnet.learning.sources import MemorySource

MODEL = {"input_size": (3, 96, 96), "mean": (0.5,) * 3, "std": (0.5,) * 3}
SPLITS = ("train", "calibration", "test")
Sizes = Sequence[tuple[int, int]]  # (W, H)


def data(
    root: Path, train: Sizes, test: Sizes, size: tuple[int, int, int] | None = None, workers: int = 0, crop: int = 0
) -> Data:
    rng = np.random.default_rng(0)
    for split, sizes in (("train", train), ("test", test)):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True, exist_ok=True)
            for i, (width, height) in enumerate(sizes):
                image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
                image.save(root / split / name / f"{i}.png")
    config = DataConfig(name="", root=str(root), calibration=0.3, input_size=size, workers=workers, crop=crop)
    return load_data(config, MODEL)


def shapes(loaded: Data) -> set[tuple[int, ...]]:
    return {tuple(batch.images.shape[1:]) for split in SPLITS for batch in loaded.loader(split, 2)}  # type: ignore[arg-type]


@pytest.mark.parametrize("test", [[(48, 48)], [(200, 100), (10, 20)]])
def test_a_test_split_of_another_size_is_seen_as_the_model_sees_training(tmp_path: Path, test: Sizes) -> None:
    loaded = data(tmp_path, [(100, 80)] * 4, test)
    assert loaded.input_size == (3, 96, 96)
    assert shapes(loaded) == {(3, 96, 96)}
    assert next(loaded.train_loader(2, seed=0).epoch(0)).images.shape[1:] == (3, 96, 96)


MIXED = [
    ([(32, 32)] * 4, [(28, 28)], "image 'cat/0.png' of 'test' is 28x28, the first to learn from is 32x32"),
    ([(32, 32)] * 4, [(100, 80)], "image 'cat/0.png' of 'test' is 100x80, the first to learn from is 32x32"),
    ([(32, 32), (40, 40)], [(32, 32)], "image 'cat/1.png' of 'train' is 40x40, the first to learn from is 32x32"),
    ([(32, 32), (200, 100)], [(32, 32)], "image 'cat/1.png' of 'train' is 200x100"),
]


@pytest.mark.parametrize(("train", "test", "message"), MIXED)
def test_small_images_of_several_sizes_are_refused_and_the_remedy_works(
    tmp_path: Path, train: Sizes, test: Sizes, message: str
) -> None:
    with pytest.raises(DataError, match=f"{message}.*; set data.input_size to have all resized$"):
        data(tmp_path, train, test)
    for size in ((3, 32, 32), (1, 40, 24)):
        loaded = data(tmp_path, train, test, size)
        assert loaded.input_size == size
        assert shapes(loaded) == {size}


def test_images_of_one_small_size_are_held_as_they_are(tmp_path: Path) -> None:
    for size in (None, (3, 24, 32)):
        loaded = data(tmp_path, [(32, 24)] * 4, [(32, 24)], size)
        assert isinstance(loaded.train, MemorySource)
        assert shapes(loaded) == {(3, 24, 32)}
    with pytest.raises(DataError, match=r"data.crop of 24 pixels can leave nothing of images of \(3, 24, 32\)"):
        data(tmp_path, [(32, 24)] * 4, [(32, 24)], crop=24)


def test_a_model_of_other_channels_changes_no_images(tmp_path: Path) -> None:
    data(tmp_path, [(100, 80)] * 4, [(48, 48)])
    loaded = load_data(DataConfig(name="", root=str(tmp_path), workers=0), {"input_size": (1, 28, 28)})
    assert loaded.input_size == (3, 28, 28)
    assert shapes(loaded) == {(3, 28, 28)}


def test_a_class_without_test_images_keeps_its_number(tmp_path: Path) -> None:
    loaded = data(tmp_path, [(8, 8)] * 4, [(8, 8)])
    for folder, name in (("train", "bee"), ("train", "eel"), ("test", "bee"), ("test", "eel"), ("test", "ant")):
        (tmp_path / folder / name).mkdir()
        if folder == "train":
            Image.new("RGB", (8, 8)).save(tmp_path / folder / name / "0.png")
    loaded = load_data(loaded.config)
    assert loaded.classes == ("bee", "cat", "dog", "eel")
    assert loaded.test.labels.tolist() == [1, 2]
    (tmp_path / "test" / "eel").rmdir()
    with pytest.raises(DataError, match=r"classes: 4 against 3, only 'train' has \['eel'\]; .* may be empty in 'test'"):
        load_data(loaded.config)


@pytest.mark.parametrize("workers", [0, 2])
def test_what_a_worker_cannot_decode_is_one_line(tmp_path: Path, workers: int) -> None:
    loaded = data(tmp_path, [(100, 80)] * 4, [(100, 80)] * 2, workers=workers)
    path = tmp_path / "test" / "dog" / "1.png"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(DataError, match="^cannot read image 'dog/1.png': [^\n]*; replace or remove it$") as caught:
        list(loaded.loader("test", 2))
    assert caught.type is DataError
    path.unlink()
    with socket.socket(socket.AF_UNIX) as server, pytest.MonkeyPatch.context() as patch:
        patch.chdir(path.parent)  # a socket's path is short
        server.bind("1.png")
        with pytest.raises(DataError, match="cannot read image 'dog/1.png': [^\n]*; replace or remove it$"):
            list(loaded.loader("test", 2))


def test_a_strip_that_would_be_a_bomb_when_resized_is_named(tmp_path: Path) -> None:
    loaded = data(tmp_path, [(100, 80)] * 4, [(20000, 1), (1, 20000)])
    with pytest.raises(
        DataError, match=r"'cat/0.png' is 20000x1, too long a strip to be resized: .*; remove it, or cut"
    ):
        list(loaded.loader("test", 1))


def test_a_transform_that_fails_is_told_with_the_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = data(tmp_path, [(100, 80)] * 4, [(100, 80)])

    def fail(image: Image.Image) -> None:
        raise ValueError("bits must be between 1 and 8")

    monkeypatch.setattr("dynnet.learning.data.create_transform", lambda *args, **kwargs: fail)
    with pytest.raises(
        DataError, match="transform of image 'cat/0.png' failed: bits must .*; choose another data.auto"
    ):
        list(loaded.loader("test", 1))


def test_the_names_of_labels_of_a_torchvision_folder(tmp_path: Path) -> None:
    loaded = data(tmp_path, [(8, 8)] * 4, [(8, 8)])
    (tmp_path / "train" / "cat" / "2019").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "train" / "cat" / "2019" / "0.png")
    config = DataConfig(name="torch/image_folder", root=str(tmp_path), calibration=1, workers=0)
    with_years = load_data(config)
    assert with_years.classes == loaded.classes == ("cat", "dog")
    labels = torch.cat([with_years.train.labels, with_years.calibration.labels])
    assert torch.bincount(labels).tolist() == [5, 4]
