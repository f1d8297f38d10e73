"""Datasets: where images come from, how they are split, and the loaders that feed them.

Everything random is a function of (seed, epoch, step) and nothing else, so a run can stop and go on anywhere, and any
number of processes sees the same global batches.

    B batch, N images of a split, C channels, H x W pixels, K classes
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, cast

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from timm.data import create_dataset, create_transform
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from dynnet.errors import DataError, did_you_mean

# Above this many pixels a side, images are decoded anew for every epoch instead of once into memory.
_SMALL_SIDE = 64


@dataclass(frozen=True)
class DataConfig:
    """What to learn from.

    Attributes:
        name: "digits" (scikit-learn's, no download), or any name for timm's `create_dataset`: "" for a folder (of
            class folders, or holding train.tar and test.tar), "torch/cifar10", "hfds/...".
        root: folder of the dataset; unused by "digits".
        label: how tables name the data; None takes the name.
        input_size: (C, H, W) that the model sees; None takes the images' own size if they are small, else the model's.
        mean, std: normalisation per channel of images in [0, 1]; None takes the model's.
        calibration: images held out of the training split for thresholds: a count, or a share below 1.
        test: share of the images that becomes the test split where a dataset has none.
        train_split, test_split: names of the splits, as the dataset knows them.
        seed: of the splits.
        crop: pixels of zero padding around a random crop in training (small images).
        flip: mirror half of the training images (small images).
        auto_augment: timm's policy string, for images that are not held in memory.
        workers: decoding processes, for images that are not held in memory.
        download: let torchvision or Hugging Face fetch the data.
    """

    name: str = "digits"
    root: str = ""
    label: str | None = None
    input_size: tuple[int, int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    calibration: float = 0.15
    test: float = 0.2
    train_split: str = "train"
    test_split: str = "test"
    seed: int = 0
    crop: int = 0
    flip: bool = False
    auto_augment: str | None = None
    workers: int = 2
    download: bool = False


class Batch(NamedTuple):
    """A batch as loaders give it: images (B, C, H, W) float, labels (B,) int64, ids (B,) int64 rows of the split."""

    images: Tensor
    labels: Tensor
    ids: Tensor


class Source(Protocol):
    """N labelled images, decoded on demand or held in memory."""

    labels: Tensor

    def __len__(self) -> int: ...
    def name(self, index: int) -> str: ...
    def pixels(self, index: int) -> np.ndarray:
        """(H, W, C) uint8, before any transform; for galleries."""
        ...


@dataclass(frozen=True)
class MemorySource:
    """Small images, decoded once.

    Attributes:
        images: (N, C, H, W) uint8.
        labels: (N,) int64.
        names: one a picture, for messages and tables.
    """

    images: Tensor
    labels: Tensor
    names: Sequence[str]

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        return self.names[index]

    def pixels(self, index: int) -> np.ndarray:
        return self.images[index].permute(1, 2, 0).numpy()

    def subset(self, rows: Tensor) -> MemorySource:
        return MemorySource(self.images[rows], self.labels[rows], [self.names[i] for i in rows.tolist()])


class StreamSource:
    """Images that are decoded each time they are needed.

    Args:
        dataset: what timm's `create_dataset` returned.
        rows: (N,) int64, the images of `dataset` that belong here.
        labels: (N,) int64, theirs.
        mode: Pillow's, "RGB" or "L".
    """

    def __init__(self, dataset: Any, rows: Tensor, labels: Tensor, mode: str) -> None:
        self.dataset, self.rows, self.labels, self.mode = dataset, rows, labels, mode

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        return _name(self.dataset, int(self.rows[index]))

    def image(self, index: int) -> Image.Image:
        return _decode(self.dataset, int(self.rows[index]), self.mode)

    def pixels(self, index: int) -> np.ndarray:
        image = np.asarray(self.image(index))
        return image[:, :, None] if image.ndim == 2 else image

    def subset(self, rows: Tensor) -> StreamSource:
        return StreamSource(self.dataset, self.rows[rows], self.labels[rows], self.mode)


@dataclass(frozen=True)
class Data:
    """Three disjoint splits and what a model must know of them.

    Attributes:
        train, calibration, test: the splits; thresholds are fitted on `calibration`, results come from `test`.
        classes: K names in the order of the labels.
        input_size: (C, H, W) of a batch's images.
        mean, std: (C,) normalisation.
        config: what it was made from.
    """

    train: MemorySource | StreamSource
    calibration: MemorySource | StreamSource
    test: MemorySource | StreamSource
    classes: tuple[str, ...]
    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    config: DataConfig

    @property
    def label(self) -> str:
        return self.config.label or self.config.name or Path(self.config.root).name

    def loader(
        self, split: Literal["train", "calibration", "test"], batch_size: int, *, rank: int = 0, world: int = 1
    ) -> Loader:
        """The images of one split in order, each once, without augmentation; over `world` processes each has a part."""
        return Loader(self, getattr(self, split), batch_size, augment=False, shuffle=False, rank=rank, world=world)

    def train_loader(self, batch_size: int, *, seed: int, rank: int = 0, world: int = 1) -> Loader:
        """Shuffled and augmented; `batch_size` is global, and incomplete batches are dropped."""
        return Loader(self, self.train, batch_size, augment=True, shuffle=True, seed=seed, rank=rank, world=world)


@dataclass
class Loader:
    """Batches of one split. Iterating gives epoch 0; `epoch(e, start)` any epoch from any step.

    The pixels of a batch depend on (seed, epoch, step) alone. With `world` > 1, this process gets rows `rank::world` of
    every global batch: nothing is seen twice, nothing left out.
    """

    data: Data
    source: MemorySource | StreamSource
    batch_size: int
    augment: bool
    shuffle: bool
    seed: int = 0
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if len(self.source) == 0:
            raise DataError(f"a split of {self.data.label!r} is empty; give it at least one image")
        if self.shuffle and self.batch_size > len(self.source):
            raise DataError(
                f"batch size {self.batch_size} exceeds the {len(self.source)} training images of "
                f"{self.data.label!r}; choose a smaller batch"
            )
        if self.batch_size % self.world and self.shuffle:
            raise DataError(
                f"global batch size {self.batch_size} does not divide among {self.world} processes; "
                f"choose a multiple of {self.world}"
            )

    def __len__(self) -> int:
        whole, rest = divmod(len(self.source), self.batch_size)
        return whole if self.shuffle else whole + bool(rest)

    def __iter__(self) -> Iterator[Batch]:
        return self.epoch(0)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of one epoch, from step `start` on."""
        rows = torch.arange(len(self.source))
        if self.shuffle:
            rows = torch.randperm(len(rows), generator=_generator(self.seed, epoch))
        batches = [rows[i * self.batch_size : (i + 1) * self.batch_size] for i in range(start, len(self))]
        if isinstance(self.source, MemorySource):
            return self._from_memory(self.source, epoch, start, batches)
        return self._from_stream(self.source, epoch, batches)

    def _from_memory(self, source: MemorySource, epoch: int, start: int, batches: list[Tensor]) -> Iterator[Batch]:
        shape = (1, len(self.data.mean), 1, 1)
        mean, std = (torch.tensor(v).view(shape) * 255 for v in (self.data.mean, self.data.std))
        for step, rows in enumerate(batches, start):
            mine = slice(self.rank, None, self.world)
            images = source.images[rows[mine]].float()
            if self.augment:
                # Drawn for the global batch, then sliced: the same pixels whatever the number of processes.
                images = _crop_and_flip(images, self.data.config, len(rows), mine, _generator(self.seed, epoch, step))
            images = ((images - mean) / std).contiguous(memory_format=torch.channels_last)
            yield Batch(images, source.labels[rows[mine]], rows[mine])

    def _from_stream(self, source: StreamSource, epoch: int, batches: list[Tensor]) -> Iterator[Batch]:
        config = self.data.config
        transform = create_transform(
            self.data.input_size,
            is_training=self.augment,
            auto_augment=config.auto_augment if self.augment else None,
            mean=self.data.mean,
            std=self.data.std,
        )
        stream = _Stream(source, transform, seed=(self.seed, epoch) if self.augment else None)
        loader: DataLoader[Any] = DataLoader(
            stream,
            batch_sampler=[b[self.rank :: self.world].tolist() for b in batches if len(b) > self.rank],
            num_workers=config.workers,
        )
        for images, labels, ids in loader:
            yield Batch(images, labels, ids)


def load_data(config: DataConfig, model_cfg: dict[str, Any] | None = None) -> Data:
    """Find, check and split a dataset.

    Args:
        config: what to load.
        model_cfg: timm's `pretrained_cfg` of the backbone; its input size, mean and std serve where `config` names
        none.

    Raises:
        DataError: the dataset is missing or empty, or an image held in memory cannot be read.
    """
    model_cfg = model_cfg or {}
    if config.name == "digits":
        source, classes = _digits()
        rest, test = _split(len(source), config.test, config.seed)
        pool: MemorySource | StreamSource = source.subset(rest)
        test_source: MemorySource | StreamSource = source.subset(test)
    else:
        pool, classes = _open(config, config.train_split)
        test_source, test_classes = _open(config, config.test_split)
        if classes != test_classes:
            raise DataError(
                f"the splits {config.train_split!r} and {config.test_split!r} of {config.root!r} disagree on the "
                f"classes: {len(classes)} against {len(test_classes)}; give both the same class folders"
            )
    train, calibration = _split(len(pool), config.calibration, config.seed)
    input_size = config.input_size or (
        cast(tuple[int, int, int], tuple(pool.images.shape[1:]))
        if isinstance(pool, MemorySource)
        else tuple(model_cfg.get("input_size", (3, 224, 224)))
    )
    channels = input_size[0]
    fits = len(model_cfg.get("mean", ())) == channels
    mean = config.mean or (tuple(model_cfg["mean"]) if fits else (0.5,) * channels)
    std = config.std or (tuple(model_cfg["std"]) if fits else (0.5,) * channels)
    if not len(mean) == len(std) == channels:
        raise DataError(
            f"{config.name or config.root!r} has images of {channels} channels, but mean and std have {len(mean)} and "
            f"{len(std)} values; set data.mean and data.std"
        )
    return Data(pool.subset(train), pool.subset(calibration), test_source, classes, input_size, mean, std, config)


def _digits() -> tuple[MemorySource, tuple[str, ...]]:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError("the digits come with scikit-learn; install it with `pip install scikit-learn`") from None
    digits = load_digits()
    # Sixteen grey levels, 0..16, stretched to 0..255.
    images = torch.from_numpy(digits.images * (255 / 16)).round().to(torch.uint8).unsqueeze(1)
    names = [f"digit {i}" for i in range(len(images))]
    return MemorySource(images, torch.from_numpy(digits.target).long(), names), tuple("0123456789")


def _open(config: DataConfig, split: str) -> tuple[MemorySource | StreamSource, tuple[str, ...]]:
    channels = config.input_size[0] if config.input_size else 3
    mode = "L" if channels == 1 else "RGB"
    root = Path(config.root)
    if config.root and not root.is_dir() and not config.download:
        raise DataError(f"no data folder {config.root!r}; give an existing one with --data, or allow data.download")
    name, where = config.name, config.root
    if not name:
        where = str(_split_folder(root, split))
    try:
        dataset = create_dataset(
            name, root=where, split=split, download=config.download, input_img_mode=mode, search_split=bool(name)
        )
        count = len(dataset)
    except (OSError, RuntimeError, AssertionError, ValueError, KeyError) as error:
        raise DataError(
            f"timm cannot open dataset {name or 'folder'!r} at {where!r}, split {split!r}: {error}"
        ) from error
    if count == 0:
        raise DataError(f"dataset {name or where!r}, split {split!r}, holds no images")
    labels = _labels(dataset)
    classes = _classes(dataset, labels)
    first = _decode(dataset, 0, mode)
    if max(first.size) > _SMALL_SIDE or (config.input_size and config.input_size[1:] != (first.height, first.width)):
        return StreamSource(dataset, torch.arange(count), labels, mode), classes
    images = np.empty((count, channels, first.height, first.width), np.uint8)
    for i in tqdm(range(count), desc=f"decoding {split}", leave=False, disable=None):
        pixels = np.asarray(_decode(dataset, i, mode))
        pixels = pixels[None] if mode == "L" else pixels.transpose(2, 0, 1)
        if pixels.shape != images.shape[1:]:
            raise DataError(
                f"image {_name(dataset, i)!r} is {pixels.shape[2]}x{pixels.shape[1]}, the first of the split is "
                f"{first.width}x{first.height}; set data.input_size to have all resized"
            )
        images[i] = pixels
    tar = getattr(getattr(getattr(dataset, "reader", None), "tar_state", None), "tf", None)
    if tar is not None:
        tar.close()
    return MemorySource(torch.from_numpy(images), labels, [_name(dataset, i) for i in range(count)]), classes


def _split_folder(root: Path, split: str) -> Path:
    """`root/split`, `root/split.tar`, or a usual synonym of the split."""
    synonyms = {"train": ("train", "training"), "test": ("test", "val", "validation", "valid", "eval")}
    for name in (split, *synonyms.get(split, ())):
        for path in (root / name, root / f"{name}.tar"):
            if path.exists():
                return path
    found = sorted(p.name for p in root.iterdir())[:8]
    raise DataError(
        f"{str(root)!r} has no {split!r} folder or {split}.tar; it holds {found}{did_you_mean(split, found)}"
    )


def _classes(dataset: Any, labels: Tensor) -> tuple[str, ...]:
    """K names, in the order of the labels; the labels themselves where the dataset has no names."""
    reader = getattr(dataset, "reader", None)
    for owner, attribute in ((dataset, "class_to_idx"), (reader, "class_to_idx"), (reader, "class_name_to_idx")):
        if to_index := getattr(owner, attribute, None):
            return tuple(str(name) for name in sorted(to_index, key=to_index.__getitem__))
    return tuple(str(i) for i in range(int(labels.max()) + 1))


def _labels(dataset: Any) -> Tensor:
    """(N,) int64, without decoding an image where the dataset allows it."""
    reader: Any = getattr(dataset, "reader", None)
    for owner in (dataset, reader):
        if getattr(owner, "targets", None) is not None:
            return torch.as_tensor(np.asarray(owner.targets)).long()
    if hasattr(reader, "samples"):
        return torch.tensor([int(sample[1]) for sample in reader.samples])
    if hasattr(reader, "label_key"):  # Hugging Face: a column
        return torch.as_tensor(np.asarray(reader.dataset[reader.label_key])).long()
    return torch.tensor([int(dataset[i][1]) for i in range(len(dataset))])


def _decode(dataset: Any, index: int, mode: str) -> Image.Image:
    try:
        # timm's own __getitem__ answers for an unreadable image with the next one, so its reader is asked directly.
        found = (dataset.reader if hasattr(dataset, "reader") else dataset)[index][0]
        if isinstance(found, Image.Image):
            return found.convert(mode)
        with (
            contextlib.closing(found) if hasattr(found, "close") else contextlib.nullcontext(),
            Image.open(found) as image,
        ):
            return image.convert(mode)
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
        raise DataError(f"cannot read image {_name(dataset, index)!r}: {error}; replace or remove it") from error


def _name(dataset: Any, index: int) -> str:
    if hasattr(dataset, "filename"):
        with contextlib.suppress(Exception):
            return str(dataset.filename(index))
    return f"image {index}"


def _split(count: int, held_out: float, seed: int) -> tuple[Tensor, Tensor]:
    """Rows kept and rows held out, both in their own order."""
    held = round(held_out) if held_out >= 1 else round(count * held_out)
    if not 0 < held < count:
        raise DataError(f"cannot hold {held_out} out of {count} images; give a share in (0, 1) or a smaller count")
    order = torch.randperm(count, generator=_generator(seed))
    return order[held:].sort().values, order[:held].sort().values


def _generator(*key: int) -> torch.Generator:
    """A generator whose stream depends on all of `key`."""
    state = np.random.SeedSequence(key).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(state[0]) << 32 | int(state[1]))


def _crop_and_flip(images: Tensor, config: DataConfig, total: int, mine: slice, generator: torch.Generator) -> Tensor:
    """Zero-padded random crops and mirrored halves, a batch at a time; rows `mine` of a global batch of `total`."""
    shifts = torch.randint(0, 2 * config.crop + 1, (2, total), generator=generator)[:, mine]
    mirrored = torch.rand(total, generator=generator)[mine] < 0.5
    batch, _, height, width = images.shape
    if config.crop:
        padded = F.pad(images, (config.crop,) * 4).permute(0, 2, 3, 1)
        rows = shifts[0].view(-1, 1, 1) + torch.arange(height).view(1, -1, 1)
        columns = shifts[1].view(-1, 1, 1) + torch.arange(width).view(1, 1, -1)
        images = padded[torch.arange(batch).view(-1, 1, 1), rows, columns].permute(0, 3, 1, 2)
    if config.flip:
        images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(3), images)
    return images


class _Stream(Dataset[tuple[Tensor, int, int]]):
    """A `StreamSource` seen through a transform, whose randomness depends on (seed, epoch, image) alone."""

    def __init__(self, source: StreamSource, transform: Any, seed: tuple[int, int] | None) -> None:
        self.source, self.transform, self.seed = source, transform, seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        image = self.source.image(index)
        with _seeded((*self.seed, index)) if self.seed else contextlib.nullcontext():
            pixels = self.transform(image)
        return pixels, int(self.source.labels[index]), index


@contextlib.contextmanager
def _seeded(key: tuple[int, ...]) -> Iterator[None]:
    """Python's, NumPy's and torch's global generators, seeded here and put back afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint32)[0])
    try:
        with torch.random.fork_rng(devices=[]):
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
