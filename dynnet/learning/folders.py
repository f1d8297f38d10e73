"""A dataset on disk: one folder or tar a split, in it one folder a class; or class folders alone.

What is hidden (its name begins with a dot) is not there. An image whose class nobody knows is refused, never left out,
and so is one that would be there twice.
"""

from __future__ import annotations

import itertools
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynnet.errors import DataError, did_you_mean
from dynnet.learning.pictures import Stored, is_picture, printable
from dynnet.learning.tars import Parts, scan

_SYNONYMS = {"train": ("train", "training"), "test": ("test", "val", "validation", "valid", "eval")}


@dataclass(frozen=True)
class Listing:
    """The images of one split, N of them, in order.

    Attributes:
        stored: where each lies.
        names: its path below the split.
        labels: the name of its class.
        classes: names of the classes that have images, in order.
        barren: names of folders without images, each of which is a class if it has images in another split.
    """

    stored: list[Stored]
    names: list[str]
    labels: list[str]
    classes: tuple[str, ...]
    barren: frozenset[str]


def list_split(root: Path, split: str, by_first: bool = False) -> Listing:
    """The images of a split.

    Args:
        root: folder of the dataset.
        split: its name, of a folder or a tar.
        by_first: an image's class is the first folder on its way, as in torchvision, and not the last, as in timm.

    Raises:
        DataError: the split is missing, has no images, images beside class folders, or loops.
    """
    return list_place(split_place(root, split), by_first)


def list_place(place: Path, by_first: bool = False) -> Listing:
    """The images of a folder or tar, see `list_split`."""
    if by_first and not place.is_dir():
        raise DataError(f"{str(place)!r} is a tar, which torchvision does not read; leave data.name empty")
    images, folders = _walk(place) if place.is_dir() else scan(place)
    if not images:
        raise DataError(f"{str(place)!r} holds no images; give it class folders of them")
    return _listing(str(place), images, folders, by_first)


def split_place(root: Path, split: str) -> Path:
    """`root/split`, `root/split.tar`, or a usual synonym of the split.

    Raises:
        DataError: there is none, or it is neither a folder nor a tar.
    """
    try:
        if not root.is_dir():
            raise DataError(f"no data folder {str(root)!r}; give an existing one with --data")
        for name in (split, *_SYNONYMS.get(split, ())):
            for place in (root / name, root / f"{name}.tar"):
                if place.is_dir() or (place.is_file() and place.suffix.lower() == ".tar"):
                    return place
                if place.exists():
                    raise DataError(f"{str(place)!r} is neither a folder nor a tar file; make it one of them")
        found = sorted(path.name for path in root.iterdir())[:8]
    except OSError as error:
        raise DataError(f"cannot look into {str(root)!r}: {error}; allow it") from error
    raise DataError(
        f"{str(root)!r} has no {split!r} folder or {split}.tar; it holds {found}{did_you_mean(split, found)}"
    )


def is_undivided(root: Path, splits: tuple[str, str]) -> bool:
    """Does a folder hold class folders alone, and nothing that is called like a split?"""
    try:
        inside = [path for path in root.iterdir() if not path.name.startswith(".")]
    except OSError:
        return False  # whoever lists it tells
    known = {name.lower() for split in splits for name in (split, *_SYNONYMS.get(split, ()))}
    named = any(path.name.lower().removesuffix(".tar") in known for path in inside)
    return not named and sum(path.is_dir() for path in inside) > 1


def check_apart(root: Path, splits: tuple[str, str]) -> None:
    """Refuse splits that share images.

    Raises:
        DataError: both are the same place, or one is inside the other.
    """
    one, other = (split_place(root, split).resolve() for split in splits)
    if one == other or one in other.parents or other in one.parents:
        raise DataError(
            f"the splits {splits[0]!r} and {splits[1]!r} of {str(root)!r} share images: they are {str(one)!r} and "
            f"{str(other)!r}; give two apart"
        )


def _walk(root: Path) -> tuple[list[tuple[Parts, Stored]], set[Parts]]:
    """The images below a folder, and all folders. Links are followed, once."""
    images: list[tuple[Parts, Stored]] = []
    folders: set[Parts] = set()
    seen: dict[str, str] = {}  # real path to the path on which it was met
    todo: list[tuple[Parts, str]] = [((), str(root))]
    while todo:
        above, folder = todo.pop()
        real = os.path.realpath(folder)
        if real in seen:
            raise DataError(f"{folder!r} is the same folder as {seen[real]!r}; remove the link")
        seen[real] = folder
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    parts = (*above, entry.name)
                    if entry.is_dir():
                        folders.add(parts)
                        todo.append((parts, entry.path))
                    elif is_picture(entry.name):
                        if not entry.is_file():
                            raise DataError(
                                f"image {entry.path!r} is no file, but a broken link, a pipe or a device; remove it"
                            )
                        images.append((parts, Stored(entry.path)))
        except OSError as error:
            raise DataError(f"cannot look into {folder!r}: {error}; allow it, or remove it") from error
    return images, folders


def _listing(place: str, images: list[tuple[Parts, Stored]], folders: set[Parts], by_first: bool) -> Listing:
    """The images in order, each with its class."""
    holders = {parts[:-1]: parts for parts, _ in images}  # folders that hold images, with one of them
    for holder in holders:
        for beside in (holder[:depth] for depth in range(min(len(holder), 1 if by_first else len(holder)))):
            if beside in holders:
                raise DataError(
                    f"image {'/'.join(holders[beside])!r} of {place!r} lies beside the folder "
                    f"{'/'.join(holder[: len(beside) + 1])!r}, which holds images too, so its class is not clear; move "
                    f"it into a class folder, or away" + _first_folder_instead(beside)
                )
    if () in holders:
        raise DataError(f"image {holders[()][0]!r} of {place!r} lies in no class folder; give each class a folder")
    which = 0 if by_first else -1
    images.sort(key=_torchvisions_order if by_first else _timms_order)
    labels = [parts[:-1][which] for parts, _ in images]
    names = ["/".join(parts) for parts, _ in images]
    if len(set(names)) < len(names):
        twice = next(name for name, after in itertools.pairwise(names) if name == after)
        raise DataError(f"{place!r} holds {twice!r} twice; pack it anew")
    classes = tuple(sorted(set(labels), key=None if by_first else lambda name: (natural(name), name)))
    for name in classes:
        if printable(name) != name:
            raise DataError(f"the name of class folder {name!r} in {place!r} is not UTF-8; rename it")
    alive = {holder[:depth] for holder in holders for depth in range(len(holder) + 1)}
    barren = frozenset(folder[which] for folder in folders - alive) - set(classes)
    return Listing([stored for _, stored in images], [printable(name) for name in names], labels, classes, barren)


def _first_folder_instead(beside: Parts) -> str:
    return ", or name the data torch/image_folder to have the first folder as the class" if beside else ""


def natural(name: str) -> list[Any]:
    """Sorts as timm does: digits as numbers, whatever the case of letters."""
    # Numbers of thousands of digits are read in pieces, for Python refuses to read them whole.
    return [int(piece) if i % 2 else piece for i, piece in enumerate(re.split(r"(\d{1,999})", name.lower()))]


def _timms_order(image: tuple[Parts, Stored]) -> Any:
    path = "/".join(image[0])
    return natural(path), path


def _torchvisions_order(image: tuple[Parts, Stored]) -> Any:
    return image[0][0], "/".join(image[0][:-1]), image[0][-1]
