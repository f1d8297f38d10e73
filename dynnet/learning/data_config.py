"""What a recipe says of its data, and what it may say."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from timm.data import create_transform

from dynnet.errors import DataError
from dynnet.learning.origins import check_name, check_root, check_splits
from dynnet.learning.ranges import check_range

_LARGEST_SIDE = 4096  # pixels of what a model sees


@dataclass(frozen=True)
class DataConfig:
    """What to learn from.

    Attributes:
        name: "digits" (scikit-learn's, no download); "" for a folder that holds a folder or a tar for each split, in
            it class folders, or class folders alone; "torch/cifar10" and others of torchvision that timm knows,
            "torch/image_folder" for a folder whose classes are the first folders in a split and not the last;
            "hfds/OWNER/NAME" of Hugging Face.
        root: folder of the dataset; unused by "digits".
        label: how tables name the data; None takes the name.
        input_size: (C, H, W) that the model sees, C of 1 or 3; None takes the images' own size if they are small and
            all of one, else the model's. Small ones may be enlarged by a factor: they are held in memory as they are.
        mean, std: normalisation per channel of images in [0, 1]; None takes the model's.
        calibration: images held out of the training split for thresholds: a count, or a share below 1.
        test: as many become the test split where a dataset has none, counted in the same way.
        train_split, test_split: names of the splits, as the dataset knows them.
        seed: of the splits.
        crop: pixels of zero padding around a random crop in training (small images, before they are enlarged).
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

    @property
    def splits(self) -> tuple[str, str]:
        """To train on, and to test on."""
        return self.train_split, self.test_split

    def check(self) -> None:
        """Refuse what cannot be meant; nothing is opened for it.

        Raises:
            DataError: a field of another type or range.
        """
        for what, flag in (("data.flip", self.flip), ("data.download", self.download)):
            if not isinstance(flag, bool):
                raise DataError(f"{what} is {flag!r}; give true or false")
        if self.label is not None and not isinstance(self.label, str):
            raise DataError(f"data.label is {self.label!r}; give text, or leave it out")
        check_name(self.name, self.download)
        check_root(self.name, self.root)
        check_splits(self.name, self.train_split, self.test_split)
        if self.input_size is not None:
            _check_size(self.input_size)
        for what, values in (("mean", self.mean), ("std", self.std)):
            if values is not None:
                _check_channels(f"data.{what}", values, low=0 if what == "std" else -math.inf)
        for what, part in (("data.calibration", self.calibration), ("data.test", self.test)):
            check_range(part, what, 0, math.inf, open_low=True, error=DataError)
            if part >= 1 and part != int(part):
                raise DataError(f"{what} is {part!r}; give a share below 1, or a whole number of images")
        for what, count in (("data.seed", self.seed), ("data.crop", self.crop), ("data.workers", self.workers)):
            check_range(count, what, 0, math.inf, whole=True, error=DataError)
        if self.auto_augment is not None:
            _check_policy(self.auto_augment)


def _check_size(size: Any) -> None:
    if not isinstance(size, tuple | list) or len(size) != 3:
        raise DataError(f"data.input_size is {size!r}; give three whole numbers: channels, height, width")
    if size[0] not in (1, 3):
        raise DataError(f"data.input_size is {size!r}; give 1 channel for grey or 3 for colour first")
    for side in size[1:]:
        check_range(side, f"a side of data.input_size {size!r}", 1, _LARGEST_SIDE, whole=True, error=DataError)


def _check_channels(what: str, values: Any, low: float) -> None:
    """One finite number for each channel, above `low`."""
    if not isinstance(values, tuple | list) or not values:
        raise DataError(f"{what} is {values!r}; give a number for each channel, or leave it out")
    for value in values:
        check_range(value, f"a number of {what} {values!r}", low, math.inf, open_low=True, error=DataError)


def _check_policy(policy: Any) -> None:
    if not isinstance(policy, str) or not policy:
        raise DataError(f"data.auto_augment is {policy!r}; give timm's name of a policy, such as 'rand-m9-mstd0.5'")
    try:
        create_transform((3, 32, 32), is_training=True, auto_augment=policy)
    except Exception as error:  # timm's own: assertions, missing keys, broken numbers
        raise DataError(
            f"timm knows no policy data.auto_augment {policy!r}: {str(error) or repr(error)}; give one such as "
            f"'rand-m9-mstd0.5'"
        ) from error
