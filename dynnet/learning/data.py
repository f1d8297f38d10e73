"""Datasets: where images come from, how they are split, and the loaders that feed them.

Everything random is a function of (seed, epoch, step) and nothing else, so a run can stop and go on anywhere, and any
number of processes sees the same global batches.

    B batch, N images of a split, C channels, H x W pixels, K classes
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from dynnet.errors import DataError
from dynnet.learning.data_config import DataConfig
from dynnet.learning.in_memory import crop_and_flip, enlarged
from dynnet.learning.origins import DIGITS
from dynnet.learning.processes import processors
from dynnet.learning.randomness import generator_of, seeded
from dynnet.learning.sources import MemorySource, Source, StreamSource, digits, enlarges, open_splits, origin


class Batch(NamedTuple):
    """A batch as loaders give it: images (B, C, H, W) float, labels (B,) int64, ids (B,) int64 rows of the split."""

    images: Tensor
    labels: Tensor
    ids: Tensor


@dataclass(frozen=True)
class Data:
    """Three disjoint splits and what a model must know of them.

    Attributes:
        train, calibration, test: the splits; thresholds are fitted on `calibration`, results come from `test`.
        classes: K names in the order of the labels.
        input_size: (C, H, W) of a batch's images.
        mean, std: (C,) normalisation.
        crop_pct, crop_mode: of the evaluation's resizing, where images are not held in memory.
        interpolation: of all resizing but that of training images that are not.
        config: what it was made from.
    """

    train: Source
    calibration: Source
    test: Source
    classes: tuple[str, ...]
    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float
    crop_mode: str
    interpolation: str
    config: DataConfig

    @property
    def preparation(self) -> dict[str, Any]:
        """What a model that learns from these must know to be used: as in timm's `pretrained_cfg`."""
        return {
            "input_size": self.input_size,
            "mean": self.mean,
            "std": self.std,
            "crop_pct": 1.0 if isinstance(self.train, MemorySource) else self.crop_pct,
            "crop_mode": "center" if isinstance(self.train, MemorySource) else self.crop_mode,
            "interpolation": self.interpolation,
            "label_names": self.classes,
        }

    @property
    def label(self) -> str:
        return self.config.label or self.config.name or Path(self.config.root).name

    @property
    def origin(self) -> str:
        """Where they come from, in words."""
        return origin(self.config.name, self.config.root, self.config.splits)

    def loader(
        self,
        split: Literal["train", "calibration", "test"],
        batch_size: int,
        *,
        rank: int = 0,
        world: int = 1,
        whole: bool = False,
    ) -> Loader:
        """The images of one split in order, each once, without augmentation; over `world` processes each has a part."""
        return Loader(self, getattr(self, split), batch_size, rank=rank, world=world, whole=whole)

    def sample_loader(self, batch_size: int, *, seed: int) -> Loader:
        """The training images shuffled, without augmentation: for whoever looks at the first few batches only. In their
        own order they are those of one class, in many datasets."""
        return Loader(self, self.train, batch_size, shuffle=True, seed=seed)

    def train_loader(self, batch_size: int, *, seed: int, rank: int = 0, world: int = 1) -> Loader:
        """Shuffled and augmented; `batch_size` is global, and incomplete batches are dropped."""
        return Loader(
            self, self.train, batch_size, augment=True, shuffle=True, drop_last=True, seed=seed, rank=rank, world=world
        )


@dataclass
class Loader:
    """Batches of one split. Iterating gives epoch 0; `epoch(e, start)` any epoch from any step.

    The pixels of a batch depend on (seed, epoch, step) alone. With `world` > 1, this process gets rows `rank::world` of
    every global batch, or, if they are to stay `whole`, batches `rank::world`: nothing is seen twice, nothing left out.
    """

    data: Data
    source: Source
    batch_size: int
    augment: bool = False
    shuffle: bool = False
    drop_last: bool = False
    seed: int = 0
    rank: int = 0
    world: int = 1
    whole: bool = False

    def __post_init__(self) -> None:
        if len(self.source) == 0:
            raise DataError(f"a split of {self.data.label!r} is empty; give it at least one image")
        if self.drop_last and self.batch_size > len(self.source):
            raise DataError(
                f"batch size {self.batch_size} exceeds the {len(self.source)} training images of "
                f"{self.data.label!r}; choose a smaller batch"
            )
        if self.whole and len(self) < self.world:
            raise DataError(
                f"{len(self)} batches of {self.data.label!r} for {self.world} processes; start fewer, or choose a "
                f"smaller batch"
            )
        if self.drop_last and self.batch_size % self.world:
            raise DataError(
                f"global batch size {self.batch_size} does not divide among {self.world} processes; "
                f"choose a multiple of {self.world}"
            )

    def __len__(self) -> int:
        whole, rest = divmod(len(self.source), self.batch_size)
        return whole if self.drop_last else whole + bool(rest)

    def __iter__(self) -> Iterator[Batch]:
        return self.epoch(0)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of one epoch, from step `start` on."""
        batches = self.rows(epoch)[start:]
        if isinstance(self.source, MemorySource):
            return self._from_memory(self.source, epoch, start, batches)
        return self._from_stream(self.source, epoch, batches)

    def rows(self, epoch: int = 0) -> list[Tensor]:
        """Rows of the split, (B,) for each batch of an epoch; for those of this process alone if they are whole."""
        rows = torch.arange(len(self.source))
        if self.shuffle:
            rows = torch.randperm(len(rows), generator=generator_of(self.seed, epoch))
        batches = [rows[i * self.batch_size : (i + 1) * self.batch_size] for i in range(len(self))]
        return batches[self.rank :: self.world] if self.whole else batches

    @property
    def _mine(self) -> slice:
        """Of the rows of a batch."""
        return slice(None) if self.whole else slice(self.rank, None, self.world)

    def _from_memory(self, source: MemorySource, epoch: int, start: int, batches: list[Tensor]) -> Iterator[Batch]:
        shape = (1, len(self.data.mean), 1, 1)
        mean, std = (torch.tensor(v).view(shape) * 255 for v in (self.data.mean, self.data.std))
        for step, rows in enumerate(batches, start):
            mine = self._mine
            if len(rows[mine]) == 0:
                continue  # the last batch of an evaluation may be smaller than the world
            images = source.images[rows[mine]].float()
            if self.augment:
                # Drawn for the global batch, then sliced: the same pixels whatever the number of processes.
                images = crop_and_flip(images, self.data.config, len(rows), mine, generator_of(self.seed, epoch, step))
            images = enlarged(images, self.data.input_size[1:], self.data.interpolation)
            yield Batch((images - mean) / std, source.labels[rows[mine]], rows[mine])

    def _from_stream(self, source: StreamSource, epoch: int, batches: list[Tensor]) -> Iterator[Batch]:
        config = self.data.config
        transform = create_transform(
            self.data.input_size,
            is_training=self.augment,
            auto_augment=config.auto_augment if self.augment else None,
            mean=self.data.mean,
            std=self.data.std,
            crop_pct=self.data.crop_pct,
            crop_mode=self.data.crop_mode,
            interpolation=self.data.interpolation if not self.augment else "random",
        )
        across = max(self.data.input_size[1:]) / self.data.crop_pct
        stream = _Stream(source, transform, across, seed=(self.seed, epoch) if self.augment else None)
        loader: DataLoader[Any] = DataLoader(
            stream,
            batch_sampler=[b[self._mine].tolist() for b in batches if len(b[self._mine])],
            num_workers=min(config.workers, processors()),
            collate_fn=_collate,
        )
        for batch in loader:
            if isinstance(batch, DataError):
                raise batch
            yield batch


def load_data(config: DataConfig, model_cfg: dict[str, Any] | None = None) -> Data:
    """Find, check and split a dataset.

    Args:
        config: what to load.
        model_cfg: timm's `pretrained_cfg` of the backbone; its input size, mean, std and way of resizing serve where
            `config` names none.

    Raises:
        DataError: a field of `config` that cannot be meant, told before anything is opened; the dataset is missing or
            empty, or an image held in memory cannot be read.
    """
    config.check()
    model_cfg = model_cfg or {}
    pool, test, classes = _open_splits(config)
    train, calibration = _split(len(pool), config.calibration, config.seed)
    input_size = _input_size(config, model_cfg, pool)
    mean, std = _normalisation(config, model_cfg, input_size[0])
    return Data(
        pool.subset(train),
        pool.subset(calibration),
        test,
        classes,
        input_size,
        mean,
        std,
        crop_pct=model_cfg.get("crop_pct") or 0.875,
        crop_mode=str(model_cfg.get("crop_mode") or "center"),
        interpolation=str(model_cfg.get("interpolation") or "bilinear"),
        config=config,
    )


def _open_splits(config: DataConfig) -> tuple[Source, Source, tuple[str, ...]]:
    """What is there to learn from, the test split, and the names of the K classes."""
    pool: Source
    test: Source | None = None
    if config.name == DIGITS:
        pool, classes = digits()
    else:
        pool, test, classes = open_splits(config.name, config.root, config.splits, config.input_size, config.download)
    if test is not None:
        return pool, test, classes
    rest, held = _split(len(pool), config.test, config.seed)
    return pool.subset(rest), pool.subset(held), classes


def _input_size(config: DataConfig, model_cfg: dict[str, Any], pool: Source) -> tuple[int, int, int]:
    """(C, H, W) of a batch's images."""
    wanted = cast(tuple[int, int, int] | None, tuple(config.input_size) if config.input_size else None)
    if not isinstance(pool, MemorySource):
        # Images are decoded in colour unless the recipe wants grey, whatever channels the model has.
        return wanted or (3, *model_cfg.get("input_size", (3, 224, 224))[1:])
    held = cast(tuple[int, int, int], tuple(pool.images.shape[1:]))
    if wanted and not (wanted[0] == held[0] and enlarges(held[1:], wanted[1:])):
        raise DataError(
            f"{config.name!r} has images of {held}, which cannot be enlarged to data.input_size {wanted}; leave "
            f"data.input_size out, or give a multiple"
        )
    if config.crop >= min(held[1:]):
        raise DataError(f"data.crop of {config.crop} pixels can leave nothing of images of {held}; give a smaller one")
    return wanted or held


def _normalisation(
    config: DataConfig, model_cfg: dict[str, Any], channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std, (C,) each."""
    fits = len(model_cfg.get("mean", ())) == channels
    mean = config.mean or (tuple(model_cfg["mean"]) if fits else (0.5,) * channels)
    std = config.std or (tuple(model_cfg["std"]) if fits else (0.5,) * channels)
    if not len(mean) == len(std) == channels:
        raise DataError(
            f"{config.name or config.root!r} has images of {channels} channels, but mean and std have {len(mean)} and "
            f"{len(std)} values; set data.mean and data.std"
        )
    return mean, std


def _split(count: int, held_out: float, seed: int) -> tuple[Tensor, Tensor]:
    """Rows kept and rows held out, both in their own order."""
    held = round(held_out) if held_out >= 1 else round(count * held_out)
    if not 0 < held < count:
        raise DataError(f"cannot hold {held_out} out of {count} images; give a share in (0, 1) or a smaller count")
    order = torch.randperm(count, generator=generator_of(seed))
    return order[held:].sort().values, order[:held].sort().values


class _Stream(Dataset[tuple[Tensor, int, int] | DataError]):
    """A `StreamSource` seen through a transform, whose randomness depends on (seed, epoch, image) alone.

    Errors are handed over instead of raised: torch would wrap one from another process in that process's traceback.
    """

    def __init__(self, source: StreamSource, transform: Any, across: float, seed: tuple[int, int] | None) -> None:
        self.source, self.transform, self.across, self.seed = source, transform, across, seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int] | DataError:
        try:
            image = self.source.image(index)
            self._check_shape(image, index)
        except DataError as error:
            return error
        try:
            with seeded(*self.seed, index) if self.seed else contextlib.nullcontext():
                pixels = self.transform(image)
        except Exception as error:  # some draws of timm's policies fail with some versions of Pillow
            return DataError(
                f"timm's transform of image {self.source.name(index)!r} failed: {error}; choose another "
                f"data.auto_augment if there is one"
            )
        return pixels, int(self.source.labels[index]), index

    def _check_shape(self, image: Image.Image, index: int) -> None:
        """Refuse a strip that would become a bomb when its short side is resized to `across` pixels."""
        pixels = self.across**2 * max(image.size) / min(image.size)
        if Image.MAX_IMAGE_PIXELS and pixels > Image.MAX_IMAGE_PIXELS:
            raise DataError(
                f"image {self.source.name(index)!r} is {image.width}x{image.height}, too long a strip to be resized: "
                f"it would have {pixels:.0f} pixels; remove it, or cut it"
            )


def _collate(samples: list[tuple[Tensor, int, int] | DataError]) -> Batch | DataError:
    """A batch, or the first error in it."""
    for sample in samples:
        if isinstance(sample, DataError):
            return sample
    return Batch(*default_collate(samples))
