"""What a recipe may say of its data."""

from __future__ import annotations

import math
from typing import Any

import pytest

from dynnet.errors import DataError
from dynnet.learning import hosted, sources
from dynnet.learning.data import DataConfig, load_data
from dynnet.learning.origins import TORCH, TORCH_FOLDERS


@pytest.fixture(autouse=True)
def nothing_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("opened")

    monkeypatch.setattr(hosted, "create_dataset", opened)
    monkeypatch.setattr(sources, "list_split", opened)
    monkeypatch.setattr(sources, "check_apart", opened)


def test_digits_are_in_no_folder() -> None:
    DataConfig(name="digits").check()
    with pytest.raises(
        DataError, match="data.root is 'mine', but data.name is 'digits', which needs no folder; for yours"
    ):
        DataConfig(name="digits", root="mine").check()


@pytest.mark.parametrize("name", ["", *TORCH, *TORCH_FOLDERS])
def test_known_names_pass(name: str) -> None:
    DataConfig(name=name, root="folder").check()
    DataConfig(name=name, root="C:\\folder", input_size=(1, 32, 32), mean=(0.5,), std=(0.5,)).check()
    DataConfig(name="hfds/uoft-cs/cifar10", test_split="test[:10%]", download=True).check()
    DataConfig(calibration=100, test=0.999, auto_augment="rand-m9-mstd0.5", seed=2**70, workers=0).check()


@pytest.mark.parametrize(
    "name",
    [
        "wds/x", "WDS/x", "tfds/mnist", "hfids/uoft-cs/cifar10", "torch/fake", "torch/torch/cifar10", "TORCH/CIFAR10",
        "folder", "pipe:touch x", "https://host/x", "/etc", "..", None, 7, "digits\0",
    ],
)  # fmt: skip
def test_other_names_are_refused_with_those_there_are(name: Any) -> None:
    with pytest.raises(
        DataError, match=r"(unknown )?data.name .*(choose from digits, torch/folder, .* or '' for|give text)"
    ):
        load_data(DataConfig(name=name, root="pipe:touch opened", download=True))


def test_hugging_face_is_asked_only_where_allowed_and_for_its_own() -> None:
    with pytest.raises(
        DataError, match="'hfds/uoft-cs/cifar10' asks Hugging Face for the data; allow it with data.dow"
    ):
        load_data(DataConfig(name="hfds/uoft-cs/cifar10"))
    for name in ("hfds/", "hfds/imagefolder", "hfds//etc", "hfds/../x", "hfds/./x", "hfds/a/b/c", "hfds/https://a/b"):
        with pytest.raises(DataError, match="names no dataset of Hugging Face; write hfds/OWNER/NAME"):
            load_data(DataConfig(name=name, download=True))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("root", "pipe:touch opened", "data.root is 'pipe:touch opened', an address; give a folder of this machine"),
        ("root", "https://host/data", "an address"),
        ("root", "hf://datasets/x", "an address"),
        ("root", "", "data.root is empty; give the folder of the dataset with --data"),
        ("root", None, "data.root is None; give text"),
        ("root", "a\0b", "give text"),
        ("train_split", "pipe:touch opened", "data.train_split is 'pipe:touch opened'; give the name of a split"),
        ("test_split", "../test", "data.test_split is '../test', which is no part of data.root"),
        ("test_split", "a\\..\\..\\b", "which is no part of data.root"),
        ("test_split", "/etc", "give the name of a split in data.root, no other place"),
        ("test_split", "C:\\x", "no other place"),
        ("test_split", "C:x", "no other place"),
        ("test_split", "\\\\host\\share", "no other place"),
        ("test_split", "", "no part of data.root"),
        ("test_split", ".", "no part of data.root"),
        ("test_split", "train", "data.train_split 'train' and data.test_split 'train' are the same images"),
        ("label", 3, "data.label is 3; give text"),
        ("input_size", (3, 32), r"data.input_size is \(3, 32\); give three whole numbers"),
        ("input_size", 32, "give three whole numbers"),
        ("input_size", (4, 32, 32), "give 1 channel for grey or 3 for colour"),
        ("input_size", (3, 0, 32), "a side of data.input_size .* is 0; give a whole number at least 1 and"),
        ("input_size", (3, 32, 10**6), "is 1000000; give a whole number"),
        ("input_size", (3, 32.0, 32), "is 32.0; give a whole number"),
        ("mean", (0.5, math.nan, 0.5), "a number of data.mean .* is nan; give a finite number"),
        ("mean", (), r"data.mean is \(\); give a number for each channel, or leave it out"),
        ("mean", 0.5, "data.mean is 0.5; give a number for each channel"),
        ("std", (0.5, 0, 0.5), "a number of data.std .* is 0; give a finite number above 0"),
        ("std", (math.inf,), "is inf; give a finite number above 0"),
        ("calibration", 0, "data.calibration is 0; give a finite number above 0"),
        ("calibration", -5, "data.calibration is -5"),
        ("calibration", math.nan, "data.calibration is nan"),
        ("calibration", 1.5, "data.calibration is 1.5; give a share below 1, or a whole number of images"),
        ("calibration", True, "data.calibration is True"),
        ("test", -0.2, "data.test is -0.2; give a finite number above 0"),
        ("test", "0.2", "data.test is '0.2'"),
        ("seed", -1, "data.seed is -1; give a whole number at least 0"),
        ("crop", -1, "data.crop is -1; give a whole number at least 0"),
        ("crop", 1.5, "data.crop is 1.5; give a whole number"),
        ("workers", -1, "data.workers is -1; give a whole number at least 0"),
        ("flip", 1, "data.flip is 1; give true or false"),
        ("download", "no", "data.download is 'no'; give true or false"),
        ("auto_augment", "random", "timm knows no policy data.auto_augment 'random': .*; give one such as"),
        ("auto_augment", "rand-q9", "timm knows no policy"),
        ("auto_augment", "rand-mx9", "timm knows no policy"),
        ("auto_augment", "", "data.auto_augment is ''; give timm's name of a policy"),
        ("auto_augment", 9, "data.auto_augment is 9; give timm's name of a policy"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_told_before_anything_is_opened(field: str, value: Any, message: str) -> None:
    fields: dict[str, Any] = {"name": "", "root": "folder", field: value}
    with pytest.raises(DataError, match=message):
        load_data(DataConfig(**fields))


@pytest.mark.parametrize(
    ("name", "train", "test"),
    [("torch/cifar10", "val", "test"), ("torch/mnist", "train", "training"), ("torch/imagenet", "val", "validation")],
)
def test_two_names_of_one_split_of_torchvision_are_seen_through(name: str, train: str, test: str) -> None:
    with pytest.raises(DataError, match=f"'{train}' and data.test_split '{test}' are the same images"):
        load_data(DataConfig(name=name, root="folder", train_split=train, test_split=test))
