"""Datasets that timm opens for us."""

from __future__ import annotations

import io
import struct
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dynnet.errors import DataError
from dynnet.learning.data import DataConfig, load_data
from dynnet.learning.hosted import Hosted

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 28, 28), dtype=np.uint8)
LABELS = np.arange(12, dtype=np.uint8) % 10


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for split in ("train", "t10k"):
        header = struct.pack(">4I", 2051, *PIXELS.shape)
        (raw / f"{split}-images-idx3-ubyte").write_bytes(header + PIXELS.tobytes())
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 2049, 12) + LABELS.tobytes())
    return tmp_path


def config(root: Path, **kwargs: Any) -> DataConfig:
    return DataConfig(**{"name": "torch/mnist", "root": str(root), "calibration": 2, "workers": 0} | kwargs)


def test_torchvisions_datasets_are_read(mnist: Path) -> None:
    data = load_data(config(mnist, input_size=(1, 28, 28)))
    assert torch.equal(data.test.images[:, 0], torch.from_numpy(PIXELS))
    assert data.test.labels.tolist() == LABELS.tolist()
    assert data.classes[3] == "3 - three"
    resized = load_data(config(mnist, input_size=(3, 20, 20)))
    assert next(iter(resized.loader("test", 4))).images.shape == (4, 3, 20, 20)


def test_damage_and_absence_are_told_in_words(mnist: Path, tmp_path: Path) -> None:
    raw = mnist / "MNIST" / "raw"
    (raw / "t10k-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 2049, 12) + bytes([200] * 12))
    with pytest.raises(DataError, match="split 'test' has labels from 200 to 200 for 10 classes; choose a split with"):
        load_data(config(mnist))
    (raw / "t10k-labels-idx1-ubyte").write_bytes(b"x" * 100)
    with pytest.raises(DataError, match="timm cannot open dataset 'torch/mnist', split 'test' at .*; mend or fetch it"):
        load_data(config(mnist))
    with pytest.raises(DataError, match="'torch/cifar10', split 'train' at .*not found or corrupted"):
        load_data(config(mnist, name="torch/cifar10"))
    with pytest.raises(DataError, match="no data folder '.*nowhere'; .* or allow data.download"):
        load_data(config(tmp_path / "nowhere"))


class Files:
    """As torchvision keeps ImageNet."""

    def __init__(self, folder: Path, targets: Any = (0, 1)) -> None:
        Image.fromarray(np.full((8, 8), 65535, np.uint16)).save(folder / "0.png")
        self.imgs = [(str(folder / "0.png"), 0), (str(folder / "1.png"), 1)]
        self.targets = list(targets)
        self.class_to_idx = {"tench": 0, "Tinca tinca": 0, "goldfish": 1}


def test_a_class_has_one_name_and_files_are_decoded_by_us(tmp_path: Path) -> None:
    images = Hosted(Files(tmp_path), "told")
    assert images.classes == ("tench", "goldfish")
    assert images.image(0, "L").getextrema() == (255, 255)
    with pytest.raises(DataError, match=r"cannot read image '.*1.png': .*No such file.*; replace or remove it"):
        images.image(1, "L")
    images._paths = ["only one"]
    assert images.name(1) == "image 1"
    with pytest.raises(DataError, match="cannot read image 1 of told: .*; mend or fetch it"):
        images.image(1, "L")


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ((), "told holds no images"),
        ((-1, -1), "told has labels from -1 to -1 for 2 classes; choose a split with labels"),
        ((0.5, 1.0), "cannot read the labels of told: they are float64 of 1 dimensions; one class an image"),
        (("a", "b"), "cannot read the labels of told: they are <U1"),
        (((0, 1), (1, 0)), "int64 of 2 dimensions"),
        (((0, 1), (1,)), "cannot read the labels of told"),
    ],
)
def test_labels_are_classes(tmp_path: Path, targets: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Hosted(Files(tmp_path, targets), "told")


def test_splits_that_number_their_classes_in_another_order_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def create(name: str, split: str, **kwargs: Any) -> Files:
        files = Files(tmp_path)
        files.class_to_idx = {"cat": 0, "dog": 1} if split == "train" else {"dog": 0, "cat": 1}
        return files

    monkeypatch.setattr("dynnet.learning.hosted.create_dataset", create)
    with pytest.raises(
        DataError, match="'train' and 'test' of 'torch/imagenet' number the same classes in another order"
    ):
        load_data(config(tmp_path, name="torch/imagenet"))


def test_inaturalist_is_read_in_order_and_its_files_by_us(tmp_path: Path) -> None:
    for split in ("2021_train", "2021_valid"):
        for label, name in enumerate(("a", "b")):
            folder = tmp_path / split / f"{label:05d}_{name}_{'_'.join('cdefgh')}"
            folder.mkdir(parents=True)
            for i in (2, 0, 1):
                Image.fromarray(np.full((8, 8), 65535 * label, np.uint16)).save(folder / f"{i}.png")
    data = load_data(config(tmp_path, name="torch/inat", input_size=(1, 8, 8), test_split="val"))
    assert [Path(name).name for name in data.test.names] == ["0.png", "1.png", "2.png"] * 2
    assert data.test.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.test.images.flatten(1).unique(dim=1).flatten().tolist() == [0, 0, 0, 255, 255, 255]


class Rows:
    """As much of a dataset of Hugging Face as timm asks for."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows
        self.info = SimpleNamespace(features={"label": SimpleNamespace(names=["cat", "dog"])}, splits=None)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: Any) -> Any:
        return [row[key] for row in self.rows] if isinstance(key, str) else self.rows[key]

    def cast_column(self, *column: Any) -> Rows:
        return self


def test_hugging_face_is_read_through_timm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.BytesIO()
    Image.fromarray(PIXELS[0]).save(file, "PNG")
    (tmp_path / "1.png").write_bytes(file.getvalue())
    places = [{"bytes": file.getvalue(), "path": None}, {"bytes": None, "path": str(tmp_path / "1.png")}]
    module, asked = ModuleType("datasets"), []

    def load_dataset(name: str, **kwargs: Any) -> Rows:
        asked.append((name, kwargs["split"]))
        return Rows([{"image": places[i % 2], "label": i % 2} for i in range(4)])

    module.load_dataset, module.Image = load_dataset, lambda decode: None  # type: ignore[attr-defined]
    for name in [name for name in sys.modules if name.startswith("timm.data.readers.reader_hfds")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "datasets", module)
    data = load_data(DataConfig(name="hfds/a/pets", download=True, calibration=2, input_size=(1, 28, 28)))
    assert asked == [("a/pets", "train"), ("a/pets", "test")]
    assert data.classes == ("cat", "dog")
    assert data.test.labels.tolist() == [0, 1, 0, 1]
    assert all(torch.equal(image[0], torch.from_numpy(PIXELS[0])) for image in data.test.images)
    monkeypatch.delitem(sys.modules, "timm.data.readers.reader_hfds")  # it knows the module of this test
    (tmp_path / "a" / "pets").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="would be read from the folder 'a/pets' here; run elsewhere, or rename that"):
        load_data(DataConfig(name="hfds/a/pets", download=True))
    assert len(asked) == 2


def test_a_missing_package_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.delitem(sys.modules, "timm.data.readers.reader_hfds", raising=False)
    with pytest.raises(DataError, match="timm cannot open dataset 'hfds/a/pets', split 'train' at '': .*datasets"):
        load_data(DataConfig(name="hfds/a/pets", download=True))
