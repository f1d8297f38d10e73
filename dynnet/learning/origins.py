"""Which datasets a recipe may name, and where they may lie.

A name is a word out of a list: with others timm would read shards by a shell command, or ask servers. A place is a
folder of this machine, a split is a folder or a file in it. Servers are asked only where `download` allows it.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from dynnet.errors import DataError, did_you_mean

DIGITS = "digits"
FOLDER = ""
HUGGING_FACE = "hfds/"
# Folders, labelled as torchvision does.
TORCH_FOLDERS = ("torch/folder", "torch/image_folder")
# These have one split to train on and one other, by whatever name.
_TORCH_PAIRS = ("torch/cifar10", "torch/cifar100", "torch/fashion_mnist", "torch/kmnist", "torch/mnist", "torch/qmnist")
TORCH = (*_TORCH_PAIRS, "torch/imagenet", "torch/inat", "torch/inaturalist", "torch/places365")
_NAMES = (DIGITS, *TORCH_FOLDERS, *TORCH)

# The names that timm takes for the same split of torchvision's datasets.
_TRAIN, _EVAL = ("train", "training"), ("val", "valid", "validation", "eval", "evaluation")

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")  # of two letters or more: C: is a drive
_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)


def check_name(name: Any, download: bool) -> None:
    """Refuse all but the datasets that can be opened safely.

    Args:
        name: "" for a folder.
        download: whether servers may be asked.

    Raises:
        DataError: an unknown name, or one that needs a server which may not be asked.
    """
    if name in (FOLDER, *_NAMES):
        return
    text = _text(name, "data.name")
    if not text.startswith(HUGGING_FACE):
        raise DataError(
            f"unknown data.name {text!r}{did_you_mean(text, _NAMES)}; choose from {', '.join(_NAMES)}, "
            f"{HUGGING_FACE}OWNER/NAME, or '' for a folder"
        )
    if not _REPOSITORY.fullmatch(text.removeprefix(HUGGING_FACE)):
        raise DataError(f"data.name {text!r} names no dataset of Hugging Face; write {HUGGING_FACE}OWNER/NAME")
    if not download:
        raise DataError(f"data.name {text!r} asks Hugging Face for the data; allow it with data.download")


def check_root(name: str, root: Any) -> None:
    """Refuse what is no folder of this machine.

    Raises:
        DataError: an address, a command, or no folder where one is needed.
    """
    text = _text(root, "data.root")
    if _SCHEME.match(text):
        raise DataError(f"data.root is {text!r}, an address; give a folder of this machine")
    if text and name == DIGITS:
        raise DataError(
            f"data.root is {text!r}, but data.name is {name!r}, which needs no folder; for yours set data.name ''"
        )
    if not text and name != DIGITS and not name.startswith(HUGGING_FACE):
        raise DataError("data.root is empty; give the folder of the dataset with --data")


def check_splits(name: str, train: Any, test: Any) -> None:
    """Refuse splits that leave the folder of the dataset, and two that are the same.

    Raises:
        DataError: an empty or absolute path, an address, "..", or splits that share images.
    """
    for what, split in (("data.train_split", train), ("data.test_split", test)):
        text = _text(split, what)
        path = PureWindowsPath(text)  # takes both kinds of slashes
        if _SCHEME.match(text) or path.anchor or PurePosixPath(text).anchor:
            raise DataError(f"{what} is {text!r}; give the name of a split in data.root, no other place")
        if not path.parts or ".." in path.parts:
            raise DataError(f"{what} is {text!r}, which is no part of data.root; give the name of a split in it")
    if _same(name, train) == _same(name, test):
        raise DataError(
            f"data.train_split {train!r} and data.test_split {test!r} are the same images; give two different splits"
        )


def _same(name: str, split: str) -> str:
    """One name for all by which timm knows a split."""
    if name in _TORCH_PAIRS:
        return "train" if split in _TRAIN else "test"
    return next((names[0] for names in (_TRAIN, _EVAL) if name in TORCH and split in names), split)


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str) or "\0" in value:
        raise DataError(f"{what} is {value!r}; give text")
    return value
