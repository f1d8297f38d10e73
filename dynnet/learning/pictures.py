"""One stored picture: where its bytes lie, and what becomes of its pixels.

What is decoded is the content, whatever the file is called, of the formats named here and no others: some that Pillow
knows start programs. Greys of 16 bits keep their upper eight; of 32-bit integers and floats nobody knows what is white,
so they are refused. Transparency is dropped, and of an animation the first frame is taken. The orientation that EXIF
tells is ignored, as in timm's evaluation: pixels are taken as they are stored.
"""

from __future__ import annotations

import io
import os
import stat
import warnings
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from dynnet.errors import DataError

# Endings of files that are images: torchvision's, which are timm's and more.
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_LARGEST_FILE = 2**29  # bytes; as many as an uncompressed image has that Pillow takes for no bomb
_TAG_BITS = 258  # of a TIFF


def is_picture(name: str) -> bool:
    """Whether a file of this name should be an image."""
    return name.lower().endswith(SUFFIXES)


def printable(name: str) -> str:
    """The name of a file, which need not be UTF-8, as text that can be written anywhere."""
    return name.encode("utf-8", "backslashreplace").decode()


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """An ordinary file for reading. Opening a pipe or a device would wait for whoever writes there.

    Raises:
        OSError: it is none, or cannot be opened.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError("it is no ordinary file")
    return os.fdopen(descriptor, "rb")


class Stored(NamedTuple):
    """Where the bytes of a picture lie: in a file of its own, or from `offset` on in a tar.

    Attributes:
        path: of the file.
        offset: bytes before it.
        size: in bytes; None for all of the file.
    """

    path: str
    offset: int = 0
    size: int | None = None

    def read(self) -> bytes:
        """Its bytes.

        Raises:
            OSError: they cannot be read, or are fewer than expected, or more than a picture can have.
        """
        with open_regular(self.path) as file:
            size = os.fstat(file.fileno()).st_size if self.size is None else self.size
            if size > _LARGEST_FILE:
                raise OSError(f"it has {size} bytes, more than {_LARGEST_FILE}")
            file.seek(self.offset)
            content = file.read(size)
        if len(content) < size:
            raise OSError(f"{len(content)} of its {size} bytes are there")
        return content


def decode(stored: Stored | bytes | Image.Image, name: str, mode: str) -> Image.Image:
    """The picture, upright as it is stored.

    Args:
        stored: where it is, or itself.
        name: its name, for messages.
        mode: Pillow's, "RGB" or "L".

    Raises:
        DataError: it cannot be read, is too large, or of pixels without a known range.
    """
    try:
        if isinstance(stored, Stored):
            stored = stored.read()
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            warnings.filterwarnings("ignore", "Palette images with Transparency")  # it is dropped in any case
            if isinstance(stored, Image.Image):
                return _of_eight_bits(stored, name).convert(mode)
            with Image.open(io.BytesIO(stored), formats=_FORMATS) as image:
                return _of_eight_bits(image, name).convert(mode)
    except DataError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise DataError(
            f"image {name!r} is too large to be decoded: {error}; make it smaller, or raise "
            f"PIL.Image.MAX_IMAGE_PIXELS where you trust it"
        ) from error
    except UnidentifiedImageError as error:
        what = f"it is none of {', '.join(_FORMATS)}" if stored else "it is empty"
        raise DataError(f"cannot read image {name!r}: {what}; replace or remove it") from error
    except Exception as error:  # what is damaged makes decoders raise anything
        raise DataError(f"cannot read image {name!r}: {str(error) or repr(error)}; replace or remove it") from error


def _of_eight_bits(image: Image.Image, name: str) -> Image.Image:
    """The picture with 0..255 in every channel."""
    # Older versions of Pillow open greys of 16 bits as 32-bit integers where the format has none of those.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        (bits, *_) = getattr(image, "tag_v2", {}).get(_TAG_BITS, (16,))
        return Image.fromarray((np.asarray(image) >> (bits - 8)).astype(np.uint8))
    if image.mode in ("I", "F"):
        kind = {"I": "integers", "F": "floats"}[image.mode]
        raise DataError(
            f"cannot read image {name!r}: its greys are 32-bit {kind}, and nobody knows which of them is white; save "
            f"it with 8 or 16 bits"
        )
    return image
