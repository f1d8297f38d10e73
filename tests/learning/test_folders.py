"""Datasets on disk: every image once, with its class, or words."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from pathlib import Path

import pytest
from timm.data.readers.reader_image_folder import ReaderImageFolder
from torchvision.datasets import ImageFolder

from dynnet.errors import DataError
from dynnet.learning.folders import check_apart, list_split, natural


def put(root: Path, names: Iterable[str]) -> None:
    """Files that are called images; what is in them is not looked at here."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")


CLASSES = ("cat/1.png", "cat/2.jpg", "dog/1.png")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for split in ("train", "test"):
        put(tmp_path / split, CLASSES)
    return tmp_path


def test_a_folder_is_listed_as_timm_lists_it(tmp_path: Path) -> None:
    names = ["b10/x/2.png", "b10/x/10.png", "B9/a01.png", "B9/a1.jpeg", "c/d/e/1.PNG", "a1b2/1.jpg", "notes/readme.txt"]
    put(tmp_path / "train", names)
    listing, timms = list_split(tmp_path, "train"), ReaderImageFolder(str(tmp_path / "train"))
    assert listing.names == list(timms.filenames())
    assert {name: i for i, name in enumerate(listing.classes)} == timms.class_to_idx
    assert [listing.classes.index(label) for label in listing.labels] == [label for _, label in timms.samples]
    assert listing.classes == ("a1b2", "B9", "e", "x")
    assert natural("9" * 5000 + "²") > natural("8" * 5000 + "²")  # too many digits for one int


def test_by_first_folders_it_is_listed_as_torchvision_lists_it(tmp_path: Path) -> None:
    put(tmp_path / "train", ["cat/2019/10.png", "cat/2019/9.png", "cat/1.png", "Dog/a/x.tiff", "10/1.png", "9/1.png"])
    listing, torchs = list_split(tmp_path, "train", by_first=True), ImageFolder(str(tmp_path / "train"))
    assert [stored.path for stored in listing.stored] == [path for path, _ in torchs.samples]
    assert list(listing.classes) == torchs.classes == ["10", "9", "Dog", "cat"]
    assert [listing.classes.index(label) for label in listing.labels] == torchs.targets
    (tmp_path / "test.tar").write_bytes(b"")
    with pytest.raises(DataError, match="test.tar' is a tar, which torchvision does not read; leave data.name empty"):
        list_split(tmp_path, "test", by_first=True)


def test_hidden_files_and_folders_are_not_there(root: Path) -> None:
    before = list_split(root, "train")
    put(
        root / "train",
        [".ipynb_checkpoints/1.png", "cat/._1.png", "cat/.thumbnails/1.png", ".DS_Store", "cat/.gitkeep"],
    )
    assert list_split(root, "train") == before


@pytest.mark.parametrize("split", ["train", "test"])
def test_an_image_whose_class_is_not_clear_is_named(root: Path, split: str) -> None:
    put(root / split, ["cover.png"])
    with pytest.raises(DataError, match=r"image 'cover.png' of '.*' lies beside the folder '(cat|dog)', .*or away$"):
        list_split(root, split)
    with pytest.raises(DataError, match="image 'cover.png'"):
        list_split(root, split, by_first=True)
    (root / split / "cover.png").unlink()
    put(root / split, ["cat/2019/1.png"])
    with pytest.raises(DataError, match=r"image 'cat/\d.*' of .* beside the folder 'cat/2019', .* torch/image_folder"):
        list_split(root, split)
    assert list_split(root, split, by_first=True).classes == ("cat", "dog")


def test_images_without_class_folders_are_named(tmp_path: Path) -> None:
    put(tmp_path, ["train/1.png"])
    with pytest.raises(DataError, match="image '1.png' of '.*train' lies in no class folder; give each class a folder"):
        list_split(tmp_path, "train")


def test_an_empty_folder_is_no_class_yet_and_no_images_are_told(root: Path) -> None:
    (root / "train" / "eel").mkdir()
    put(root / "train", ["annotations/1.xml", "cat/empty/x.txt"])
    listing = list_split(root, "train")
    assert listing.classes == ("cat", "dog")
    assert listing.barren == {"eel", "annotations", "empty"}
    (root / "valid" / "cat").mkdir(parents=True)
    with pytest.raises(DataError, match="valid' holds no images; give it class folders of them"):
        list_split(root, "valid")


@pytest.mark.parametrize("to", ["..", ".", "../..", "../dog"])
def test_a_folder_that_is_there_twice_is_named(root: Path, to: str) -> None:
    (root / "train" / "cat" / "link").symlink_to(to)
    with pytest.raises(DataError, match="is the same folder as '.*'; remove the link"):
        list_split(root, "train")


def test_links_to_elsewhere_are_followed(root: Path, tmp_path: Path) -> None:
    put(tmp_path / "elsewhere", ["1.png", "2.png"])
    (root / "train" / "eel").symlink_to(tmp_path / "elsewhere")
    (root / "train" / "dog" / "2.png").symlink_to(tmp_path / "elsewhere" / "2.png")
    assert list_split(root, "train").labels == ["cat", "cat", "dog", "dog", "eel", "eel"]


@pytest.mark.parametrize("kind", ["pipe", "socket", "broken link", "device"])
def test_an_image_that_is_no_file_is_named_without_waiting(
    root: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root / "train" / "dog")  # a socket's path is short
    with socket.socket(socket.AF_UNIX) as server:
        for name in ("9.png", "9.txt"):  # and whatever is not called an image is left alone
            if kind == "pipe":
                os.mkfifo(name)
            elif kind == "socket" and name == "9.png":
                server.bind(name)
            elif kind != "socket":
                Path(name).symlink_to("nowhere" if kind == "broken link" else "/dev/zero")
        with pytest.raises(DataError, match=r"image '.*9.png' is no file, but a broken link, a pipe or a device"):
            list_split(root, "train")


def test_a_folder_may_be_called_like_an_image(root: Path) -> None:
    put(root / "train", ["eel.png/1.png"])
    assert list_split(root, "train").classes == ("cat", "dog", "eel.png")


def test_names_that_are_no_text(root: Path) -> None:
    os.rename(os.fsencode(root / "train/dog/1.png"), os.fsencode(root / "train/dog") + b"/\xe9.png")  # noqa: PTH104
    assert list_split(root, "train").names == ["cat/1.png", "cat/2.jpg", "dog/\\udce9.png"]
    os.rename(os.fsencode(root / "train/dog"), os.fsencode(root / "train") + b"/h\xe9ron")  # noqa: PTH104
    with pytest.raises(DataError, match=r"the name of class folder 'h\\udce9ron' in '.*' is not UTF-8; rename it"):
        list_split(root, "train")


def test_a_folder_that_may_not_be_read_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: str) -> None:
        raise PermissionError(13, "Permission denied", folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match="cannot look into '.*train': .*Permission denied.*; allow it, or remove it"):
        list_split(root, "train")


def test_what_is_neither_folder_nor_tar_is_named(root: Path) -> None:
    os.mkfifo(root / "pipe")
    put(root, ["file"])
    for split in ("pipe", "file"):
        with pytest.raises(DataError, match=f"{split}' is neither a folder nor a tar file; make it one of them"):
            list_split(root, split)
    with pytest.raises(DataError, match="no data folder '.*file'; give an existing one"):
        list_split(root / "file", "train")


def test_splits_do_not_share_images(root: Path) -> None:
    check_apart(root, ("train", "test"))
    (root / "val").symlink_to("test")
    for splits in (("test", "val"), ("train", "train/cat"), ("test/dog", "test")):
        with pytest.raises(
            DataError, match=f"the splits '{splits[0]}' and '{splits[1]}' of .* share images: .*two apart"
        ):
            check_apart(root, splits)
