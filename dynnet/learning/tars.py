"""What a tar holds, and where. Nothing is unpacked, and names in it lead nowhere: they only tell classes.

A tar that is cut short, damaged or packed in another way is refused as a whole, for it would give a part of its images
without a word.
"""

from __future__ import annotations

import os
import tarfile
from pathlib import Path
from typing import BinaryIO

from dynnet.errors import DataError
from dynnet.learning.pictures import Stored, is_picture, open_regular

Parts = tuple[str, ...]  # of a path: folders, and a name at the end

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_LARGEST_READ = 2**20  # bytes; headers are smaller, and a damaged one may claim any size


def scan(path: Path) -> tuple[list[tuple[Parts, Stored]], set[Parts]]:
    """The images in a tar, or in the tars in it, and its folders. A tar in a tar is a folder of its name.

    Raises:
        DataError: it cannot be read, is cut short, damaged or compressed, or holds images that are links.
    """
    try:
        with open_regular(path) as file:
            contents = _Contents(str(path))
            contents.add(_Window(file, 0, os.fstat(file.fileno()).st_size))
            return contents.images, contents.folders
    except OSError as error:
        raise DataError(f"cannot read the tar {str(path)!r}: {error}; pack it anew") from error


class _Window:
    """A part of a file as a file, which is read in small pieces only."""

    def __init__(self, file: BinaryIO, start: int, size: int) -> None:
        self.file, self.start, self.size, self.place = file, start, size, 0

    def tell(self) -> int:
        return self.place

    def seek(self, place: int) -> int:
        if place < 0:
            raise ValueError(f"a header points to byte {place}")
        self.place = place
        return place

    def read(self, count: int) -> bytes:
        if not 0 <= count <= _LARGEST_READ:
            raise ValueError(f"a header claims {count} bytes")
        self.file.seek(self.start + self.place)
        content = self.file.read(max(0, min(count, self.size - self.place)))
        self.place += len(content)
        return content


class _Contents:
    """The images and folders that were found in a tar so far."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.images: list[tuple[Parts, Stored]] = []
        self.folders: set[Parts] = set()

    def add(self, window: _Window, above: Parts = ()) -> None:
        """All of a tar, or of one in it, which then stands for the folder `above`."""
        what = f"the tar {self.path!r}" + (f", in it {'/'.join(above)!r}," if above else "")
        start = window.read(6)
        for magic, packer in _COMPRESSED.items():
            if start.startswith(magic):
                raise DataError(
                    f"{what} is compressed with {packer}, and images are read from anywhere in it; uncompress it"
                )
        window.seek(0)
        try:
            end = self._add_members(window, above)
        except DataError:
            raise
        except Exception as error:  # what is damaged makes tarfile raise anything
            raise DataError(f"{what} is damaged or cut short: {error}; pack it anew") from error
        window.seek(end)
        block = window.read(tarfile.BLOCKSIZE)
        if len(block) < tarfile.BLOCKSIZE:
            raise DataError(f"{what} is cut short: its end mark is missing; copy or pack it anew")
        if any(block):
            raise DataError(f"{what} is damaged: there is no header at byte {end}; copy or pack it anew")
        while rest := window.read(_LARGEST_READ):
            if rest.strip(b"\0"):
                raise DataError(f"{what} goes on after its end mark, as joined ones do; pack all into one")

    def _add_members(self, window: _Window, above: Parts) -> int:
        """Where the members end, in bytes."""
        # Told what tarfile needs of a file, it never reads more than headers.
        with tarfile.open(fileobj=window, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:  # type: ignore[call-overload]
            reached = -1
            while (member := tar.next()) is not None:
                if member.size < 0 or member.offset <= reached:
                    raise ValueError(f"the header at byte {member.offset} leads back")
                stored = member.isreg() and not member.issparse()
                if stored and member.offset_data + member.size > window.size:
                    raise ValueError(f"{member.name!r} reaches beyond its end")
                reached = member.offset
                self._add_member(member, window, above)
            return tar.offset

    def _add_member(self, member: tarfile.TarInfo, window: _Window, above: Parts) -> None:
        inside = tuple(part for part in member.name.split("/") if part not in ("", "."))
        if not inside and member.isreg():
            raise ValueError(f"the file at byte {member.offset} has no name")
        if not inside or any(part.startswith(".") and part != ".." for part in inside):
            return  # the tar itself, or hidden
        parts = (*above, *inside)
        nested = inside[-1].lower().endswith(".tar")
        if member.isdir():
            self.folders.add(parts)
            return
        if not is_picture(inside[-1]) and not nested:
            return
        if ".." in inside or not member.isreg() or member.issparse():
            raise DataError(
                f"{'/'.join(parts)!r} in the tar {self.path!r} is no ordinary file of a folder in it, but a link, a "
                f"device, sparse or outside; pack the files themselves (tar --dereference --hard-dereference)"
            )
        start = window.start + member.offset_data
        if not nested:
            self.images.append((parts, Stored(self.path, start, member.size)))
            return
        if above:
            raise DataError(f"the tar {self.path!r} holds tars in tars in it, such as {'/'.join(parts)!r}; unpack it")
        folder = (*parts[:-1], parts[-1][: -len(".tar")])
        self.folders.add(folder)
        self.add(_Window(window.file, start, member.size), folder)
