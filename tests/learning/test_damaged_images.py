"""Whatever happened to an image or a tar: its error says so, or all of it is there."""

from __future__ import annotations

import contextlib
import io
import random
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dynnet.errors import DataError
from dynnet.learning.data import Batch, DataConfig, load_data
from dynnet.learning.pictures import decode
from dynnet.learning.tars import scan
from tests.watching import watched

# What else Pillow says of damage, a warning, is not what is looked at here.
pytestmark = pytest.mark.filterwarnings("ignore:::PIL")

Damage = Callable[[bytes, random.Random], bytes]


def pictures() -> dict[str, bytes]:
    """Small images of many kinds, as files hold them."""
    rng = np.random.default_rng(0)
    colour = Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8))
    grey16 = Image.fromarray(rng.integers(0, 65536, (20, 24), dtype=np.uint16))
    kinds: dict[str, tuple[Image.Image, str, dict[str, object]]] = {
        "png": (colour, "PNG", {}),
        "grey of 16 bits": (grey16, "PNG", {}),
        "palette": (colour.quantize(16), "PNG", {"transparency": bytes(range(16))}),
        "jpeg": (colour, "JPEG", {}),
        "progressive jpeg": (colour, "JPEG", {"progressive": True}),
        "cmyk": (colour.convert("CMYK"), "JPEG", {}),
        "bmp": (colour, "BMP", {}),
        "animation": (colour, "GIF", {"save_all": True, "append_images": [colour.rotate(180)]}),
        "tiff": (grey16, "TIFF", {}),
        "packed tiff": (colour, "TIFF", {"compression": "tiff_lzw"}),
        "webp": (colour, "WEBP", {"lossless": True}),
        "ppm": (colour, "PPM", {}),
    }
    return {name: stored(image, kind, **options) for name, (image, kind, options) in kinds.items()}


def stored(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def packed(images: dict[str, bytes], kind: int = tarfile.PAX_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=kind) as tar:
        for name, content in images.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


def tars() -> list[bytes]:
    """Plain, with a tar inside, and with names that need headers of their own."""
    short = {f"{name}/{i}.png": b"x" * 700 for name in ("cat", "dog") for i in range(3)}
    long = {f"{name[:-4]}{'é' * 60}.png": content for name, content in short.items()}
    nested = packed({"cat/0.png": b"x", "dog.tar": packed({"1.png": b"y" * 600, "2.png": b"z"})})
    return [packed(short), nested, packed(long), packed(long, tarfile.GNU_FORMAT)]


def cut(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content))]


def flipped(content: bytes, rng: random.Random) -> bytes:
    damaged = bytearray(content)
    # Half of the damage falls on the first bytes, which say what the rest means.
    for _ in range(rng.randint(1, 6)):
        damaged[rng.randrange(rng.choice([min(64, len(damaged)), len(damaged)]))] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def overwritten(content: bytes, rng: random.Random) -> bytes:
    start, length = rng.randrange(len(content)), rng.randint(1, 80)
    return (
        content[:start]
        + rng.choice([rng.randbytes(length), bytes(length), b"\xff" * length])
        + content[start + length :]
    )


def moved(content: bytes, rng: random.Random) -> bytes:
    one, other = sorted(rng.randrange(len(content)) for _ in range(2))
    return content[:one] + content[other:] + content[one:other]


DAMAGES: tuple[Damage, ...] = (cut, flipped, overwritten, moved)


def check_pictures(count: int) -> int:
    """How many of `count` damaged images are refused; all others must have pixels, and all of them where only cut."""
    refused = 0
    intact = pictures()
    for seed in range(count):
        rng = random.Random(seed)
        name, damage = rng.choice(sorted(intact)), rng.choice(DAMAGES)
        content = damage(intact[name], rng)
        mode = rng.choice(["RGB", "L"])
        told = f"seed {seed}: {name}, {damage.__name__}"
        try:
            image = decode(content, told, mode)
        except DataError as error:
            refused += told in str(error)
            continue
        assert image.mode == mode, told
        assert min(image.size) > 0, told
        if damage is cut:
            assert np.array_equal(image, decode(intact[name], name, mode)), told
    return refused


def check_tars(count: int, folder: Path) -> int:
    """How many of `count` damaged tars are refused; all others must hold as many images as before."""
    refused = 0
    path = folder / "damaged.tar"
    for seed in range(count):
        rng = random.Random(seed)
        original, damage = rng.choice(tars()), rng.choice(DAMAGES)
        path.write_bytes(damage(original, rng))
        try:
            images, _ = scan(path)
        except DataError as error:
            refused += "damaged.tar" in str(error)
            continue
        path.write_bytes(original)
        # No checksum guards a name in a header of its own: damage may take the ending of an image from it.
        assert "é" in images[0][0][-1] or len(images) == len(scan(path)[0]), f"seed {seed}: {damage.__name__}"
    return refused


def test_a_damaged_image_is_refused_or_has_pixels() -> None:
    assert 150 < check_pictures(300) < 300


def test_a_damaged_tar_is_refused_or_is_whole(tmp_path: Path) -> None:
    assert 60 < check_tars(120, tmp_path) < 120


@pytest.mark.parametrize("kind", sorted(pictures()))
def test_no_image_is_half_there(kind: str) -> None:
    content = pictures()[kind]
    whole = decode(content, kind, "RGB")
    for length in range(0, len(content), max(1, len(content) // 40)):
        try:
            assert np.array_equal(decode(content[:length], kind, "RGB"), whole), length
        except DataError:
            continue


def test_no_tar_is_half_there(tmp_path: Path) -> None:
    path = tmp_path / "cut.tar"
    for content in tars():
        path.write_bytes(content)
        whole = scan(path)[0]
        for length in range(0, len(content), 512):
            path.write_bytes(content[:length])
            try:
                assert scan(path)[0] == whole, length
            except DataError:
                continue


@pytest.mark.sweep
def test_many_damaged_images_and_tars_are_told_in_little_memory(tmp_path: Path) -> None:
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert check_pictures(5000) > 2500
    assert check_tars(5000, tmp_path) > 2500
    # An image may have as many pixels as Pillow takes for no bomb: 90 millions, four bytes each, twice.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB


@pytest.mark.sweep
@pytest.mark.parametrize("seed", range(200))
def test_a_dataset_with_damage_gives_all_its_batches_or_an_error_in_words(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    images = {f"{name}/{i}.png": rng.choice(list(pictures().values())) for name in ("cat", "dog") for i in range(4)}
    name, damage = rng.choice(sorted(images)), rng.choice(DAMAGES)
    whole, hurt = packed(images), packed(images | {name: damage(images[name], rng)})
    (tmp_path / "train.tar").write_bytes(whole)
    (tmp_path / "test.tar").write_bytes(rng.choice([hurt, damage(whole, rng)]))
    size = rng.choice([None, (3, 20, 24), (1, 16, 16)])
    config = DataConfig(name="", root=str(tmp_path), calibration=0.25, input_size=size, workers=0)
    batches: list[Batch] = []
    with watched(tmp_path) as seen, contextlib.suppress(DataError):
        batches = list(load_data(config).loader("test", 3))
    assert seen == []
    if not batches:
        return
    assert sum(len(batch.labels) for batch in batches) == len(images)
    assert len({batch.images.shape[1:] for batch in batches}) == 1
