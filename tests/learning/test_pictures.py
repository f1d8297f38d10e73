"""Pictures: right pixels, or words."""

from __future__ import annotations

import io
import os
import socket
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dynnet.errors import DataError
from dynnet.learning import pictures
from dynnet.learning.pictures import Stored, decode, printable

RAMP = np.tile(np.linspace(0, 1, 16), (8, 1))  # black on the left, white on the right
COLOUR = Image.fromarray((np.stack([RAMP, RAMP[:, ::-1], RAMP * 0], -1) * 255).astype(np.uint8))


def stored(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_greys_of_16_bits_keep_their_upper_eight(kind: str, mode: str) -> None:
    deep = (RAMP * 65535).astype(np.uint16)
    image = decode(stored(Image.fromarray(deep), kind), "deep", mode)
    assert np.array_equal(image.convert("L"), deep >> 8)
    assert (image.getpixel((0, 0)), image.getpixel((15, 0))) == {"L": (0, 255), "RGB": ((0,) * 3, (255,) * 3)}[mode]


def test_greys_of_12_bits_keep_theirs() -> None:
    # Two pixels of 12 bits, 0 and 4095, packed into three bytes.
    tags = [(256, 2), (257, 1), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 1), (279, 3)]
    entries = b"".join(struct.pack("<HHII", tag, 3, 1, value) for tag, value in tags)
    content = b"II*\0" + struct.pack("<I", 12) + b"\x00\x0f\xff\0" + struct.pack("<H", len(tags)) + entries + bytes(4)
    assert np.asarray(decode(content, "deep", "L")).tolist() == [[0, 255]]


@pytest.mark.parametrize(("kind", "what"), [(np.float32, "floats"), (np.int32, "integers")])
def test_greys_whose_white_nobody_knows_are_refused(kind: type, what: str) -> None:
    content = stored(Image.fromarray(RAMP.astype(kind)), "TIFF")
    with pytest.raises(DataError, match=f"'x.tif': its greys are 32-bit {what}, .*; save it with 8 or 16"):
        decode(content, "x.tif", "RGB")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "1", "L", "CMYK"])
def test_other_kinds_are_what_pillow_makes_of_them(mode: str) -> None:
    image = COLOUR.convert(mode)
    content = stored(image, "TIFF" if mode == "CMYK" else "PNG")
    assert np.array_equal(decode(content, "x", "RGB"), image.convert("RGB"))
    assert np.array_equal(decode(content, "x", "L"), image.convert("L"))


def test_transparency_is_dropped_without_a_word() -> None:
    plain = COLOUR.quantize(16)
    content = stored(plain, transparency=bytes(range(16)))
    assert np.array_equal(decode(content, "x", "RGB"), plain.convert("RGB"))


def test_the_orientation_of_exif_is_ignored_as_timm_ignores_it() -> None:
    exif = Image.Exif()
    exif[0x0112] = 3  # to be turned by 180 degrees
    content = stored(COLOUR, "JPEG", quality=95, exif=exif)
    assert np.array_equal(decode(content, "x", "RGB"), decode(stored(COLOUR, "JPEG", quality=95), "x", "RGB"))


def test_the_first_frame_of_an_animation_is_taken() -> None:
    content = stored(COLOUR, "GIF", save_all=True, append_images=[COLOUR.rotate(180)])
    assert np.array_equal(decode(content, "x", "RGB"), decode(stored(COLOUR, "GIF"), "x", "RGB"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (b"not an image", "it is none of BMP, GIF, JPEG, PNG, PPM, TIFF, WEBP"),
        # Pillow would hand this to Ghostscript.
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n", "it is none of BMP"),
        (b"P6 0 0 255\n", ""),
        (b"GIF89a" + bytes(7) + b";", ""),
        (stored(COLOUR, "JPEG")[:200], ""),
    ],
    ids=["empty", "text", "program", "no pixels", "no pixels of a gif", "cut"],
)
def test_what_is_no_image_is_named(content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=f"cannot read image 'cat/x.png': {message}.*; replace or remove it$"):
        decode(content, "cat/x.png", "RGB")


@pytest.mark.parametrize("limit", [100, 50])  # Pillow warns above one, and raises above twice as many
def test_bombs_are_named(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(DataError, match="image 'cat/x.png' is too large to be decoded: .*make it smaller, or raise"):
        decode(stored(COLOUR), "cat/x.png", "RGB")


def test_only_ordinary_files_are_read_and_nothing_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    os.mkfifo("pipe.png")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.png")
        for name in ("pipe.png", "socket.png", ".", "nowhere.png"):
            with pytest.raises(DataError, match="cannot read image 'x': .*; replace or remove it"):
                decode(Stored(name), "x", "RGB")


def test_no_more_and_no_less_than_the_bytes_of_an_image_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = stored(COLOUR)
    (tmp_path / "x").write_bytes(b"before" + content + b"after")
    place = Stored(str(tmp_path / "x"), 6, len(content))
    assert place.read() == content
    with pytest.raises(DataError, match=r"'x': \d+ of its 9999 bytes are there"):
        decode(place._replace(size=9999), "x", "RGB")
    monkeypatch.setattr(pictures, "_LARGEST_FILE", 10)
    for large in (place, Stored(place.path)):
        with pytest.raises(DataError, match=r"'x': it has \d+ bytes, more than 10"):
            decode(large, "x", "RGB")


def test_any_name_can_be_written() -> None:
    assert printable("mañana 猫.png") == "mañana 猫.png"
    assert printable(os.fsdecode(b"caf\xe9.png")) == "caf\\udce9.png"
