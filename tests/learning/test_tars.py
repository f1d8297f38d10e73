"""Tars: all of their images, or words."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from timm.data.readers.reader_image_in_tar import ReaderImageInTar

from dynnet.errors import DataError
from dynnet.learning.folders import list_split
from dynnet.learning.tars import scan

FILES = {"cat/10.png": b"ten" * 300, "cat/9.png": b"nine", "dog/0.JPG": b"zero", "dog/notes.txt": b"none"}


def packed(files: dict[str, bytes], *others: tarfile.TarInfo) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for member in others:
            tar.addfile(member)
    return file.getvalue()


def other(name: str, kind: bytes, to: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, to
    return member


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "train.tar"


def test_a_tar_is_listed_as_timm_lists_it(path: Path) -> None:
    path.write_bytes(packed(FILES))
    listing, timms = list_split(path.parent, "train"), ReaderImageInTar(str(path))
    assert listing.names == list(timms.filenames()) == ["cat/9.png", "cat/10.png", "dog/0.JPG"]
    assert [listing.classes.index(label) for label in listing.labels] == list(timms.targets)
    assert [stored.read() for stored in listing.stored] == [timms[i][0].read() for i in range(3)]
    timms.tar_state.tf.close()


def test_what_is_hidden_in_a_tar_is_not_there_and_empty_folders_are_no_classes_yet(path: Path) -> None:
    path.write_bytes(packed({f"./{name}": content for name, content in FILES.items()}))
    before = list_split(path.parent, "train")
    hidden = {".ipynb_checkpoints/1.png": b"x", "cat/._9.png": b"x", "cat/.old/1.png": b"x", "cat/.more.tar": b"x"}
    path.write_bytes(packed(FILES | hidden, other("eel", tarfile.DIRTYPE)))
    listing = list_split(path.parent, "train")
    assert (listing.names, listing.classes) == (before.names, before.classes)
    assert listing.barren == {"eel"}
    path.write_bytes(packed(FILES | {"cover.png": b"x"}))
    with pytest.raises(DataError, match="image 'cover.png' of '.*train.tar' lies beside the folder"):
        list_split(path.parent, "train")


def test_a_tar_in_a_tar_is_a_folder(path: Path) -> None:
    inner = {name.removeprefix("cat/"): content for name, content in FILES.items() if name.startswith("cat")}
    path.write_bytes(packed({"cat.tar": packed(inner), "dog/0.png": b"zero"}))
    listing = list_split(path.parent, "train")
    assert listing.names == ["cat/9.png", "cat/10.png", "dog/0.png"]
    assert [stored.read() for stored in listing.stored] == [b"nine", b"ten" * 300, b"zero"]
    path.write_bytes(packed({"a.tar": packed({"b.tar": packed(FILES)})}))
    with pytest.raises(DataError, match="holds tars in tars in it, such as 'a/b.tar'; unpack it"):
        scan(path)


@pytest.mark.parametrize("packer", [gzip.compress, bz2.compress, lzma.compress], ids=["gzip", "bzip2", "xz"])
def test_a_compressed_tar_is_told(path: Path, packer: Callable[[bytes], bytes], request: pytest.FixtureRequest) -> None:
    path.write_bytes(packer(packed(FILES)))
    with pytest.raises(DataError, match=f"is compressed with {request.node.callspec.id}, .*; uncompress it"):
        scan(path)
    path.write_bytes(packed({"cat.tar": packer(packed(FILES))}))
    with pytest.raises(DataError, match="train.tar', in it 'cat', is compressed"):
        scan(path)


def test_a_tar_without_its_end_is_refused(path: Path) -> None:
    content = packed(FILES)
    end = 512 * 2 * len(FILES) + 512  # headers and contents, one of which has two blocks
    path.write_bytes(content[: end + 512])  # one block of zeros is enough
    assert len(scan(path)[0]) == 3
    for length in (end, end - 512, end - 700, 3 * 512, 600, 512, 100, 0):
        path.write_bytes(content[:length])
        with pytest.raises(DataError, match=r"the tar '.*train.tar' is (damaged or )?cut short.*pack it anew"):
            scan(path)


def test_a_damaged_header_and_a_second_tar_are_refused(path: Path) -> None:
    content = bytearray(packed(FILES))
    content[3 * 512] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="is damaged: there is no header at byte 1536"):
        scan(path)
    path.write_bytes(packed(FILES) + packed(FILES))
    with pytest.raises(DataError, match="goes on after its end mark, as joined ones do; pack all into one"):
        scan(path)


@pytest.mark.parametrize(
    "member",
    [
        other("cat/1.png", tarfile.SYMTYPE, "/etc/passwd"),
        other("cat/1.png", tarfile.LNKTYPE, "cat/9.png"),
        other("cat/1.png", tarfile.CHRTYPE),
        other("cat/1.png", tarfile.FIFOTYPE),
        other("cat/../../1.png", tarfile.REGTYPE),
    ],
    ids=["symbolic link", "hard link", "device", "pipe", "outside"],
)
def test_an_image_that_is_no_ordinary_file_is_named(path: Path, member: tarfile.TarInfo) -> None:
    path.write_bytes(packed(FILES, member))
    with pytest.raises(DataError, match=f"'{member.name}' in the tar '.*' is no ordinary file .*--hard-dereference"):
        scan(path)


def test_links_and_devices_that_are_no_images_and_absolute_names_do_no_harm(path: Path) -> None:
    absolute = {f"/{name}": content for name, content in FILES.items()}
    path.write_bytes(packed(absolute, other("x", tarfile.CHRTYPE), other("y", tarfile.SYMTYPE, "/")))
    assert [parts for parts, _ in scan(path)[0]] == [("cat", "10.png"), ("cat", "9.png"), ("dog", "0.JPG")]


def test_an_image_that_is_there_twice_is_named(path: Path) -> None:
    file = io.BytesIO(packed(FILES))
    with tarfile.open(fileobj=file, mode="a") as tar:
        tar.addfile(other("./cat/9.png", tarfile.REGTYPE))
    path.write_bytes(file.getvalue())
    with pytest.raises(DataError, match="holds 'cat/9.png' twice"):
        list_split(path.parent, "train")


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        *(
            (kind, size)
            for kind in (tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE)
            for size in (-512, 2**40)
        ),
        (tarfile.REGTYPE, -1),
        (tarfile.GNUTYPE_LONGNAME, -1),
    ],
)
def test_sizes_that_lead_back_or_far_away_end_in_words(path: Path, kind: bytes, size: int) -> None:
    member = other("cat/1.png", kind)
    member.size = size
    header = member.tobuf(tarfile.GNU_FORMAT)
    path.write_bytes(packed(FILES)[: 9 * 512] + header + packed(FILES))
    with pytest.raises(DataError, match="train.tar' is damaged"):
        scan(path)


def test_pipes_and_empty_tars_are_told(path: Path) -> None:
    path.write_bytes(packed({}))
    with pytest.raises(DataError, match="train.tar' holds no images"):
        list_split(path.parent, "train")
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DataError, match="cannot read the tar '.*': it is no ordinary file; pack it anew"):
        scan(path)
    with pytest.raises(DataError, match="train.tar' is neither a folder nor a tar file"):
        list_split(path.parent, "train")
