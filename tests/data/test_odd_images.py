"""Odd images: each has one answer, which docs/data.md states."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, SAMPLEFORMAT
from torchvision.datasets import folder

from isd_repro.config import params
from isd_repro.data.sources import SUFFIXES, UnreadableError, decode_file, open_image, open_images
from isd_repro.data.store import convert
from isd_repro.runtime.errors import DataError
from tests.data import trees

FILES = trees.images({"n01": 2, "n02": 2}, val=1)
COLOUR = np.zeros((6, 8, 3), dtype=np.uint8) + np.array([200, 100, 40], dtype=np.uint8)
DOCUMENT = (Path(__file__).parents[2] / "docs" / "data.md").read_text("utf-8")


def saved(image: Image.Image, form: str, **settings: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **settings)
    return buffer.getvalue()


def pixels(payload: bytes, channels: int = 3) -> np.ndarray:
    """As a store keeps them, height x width x channels."""
    return convert(decode_file(payload), params.StoreSettings.model_validate({"channels": channels})).transpose(1, 2, 0)


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    return saved(Image.fromarray(COLOUR), "JPEG", exif=exif, quality=100)


def without_adobe_marker(payload: bytes) -> bytes:
    at = payload.index(b"\xff\xee")
    return payload[:at] + payload[at + 2 + int.from_bytes(payload[at + 2 : at + 4]) :]


def palette() -> bytes:
    image = Image.fromarray(COLOUR).convert("P", palette=Image.Palette.ADAPTIVE)
    return saved(image, "PNG", transparency=0)


def png(width: int, height: int, bits: int, kind: int, pixels: bytes) -> bytes:
    """Whatever its pixels are: `kind` is 0 for grey and 2 for colours."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = chunk(b"IHDR", struct.pack(">2I5B", width, height, bits, kind, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


def frames(form: str) -> bytes:
    others = [Image.fromarray(255 - COLOUR)]
    return saved(Image.fromarray(COLOUR), form, save_all=True, append_images=others, lossless=True)


CMYK = Image.fromarray(np.full((6, 8, 4), (20, 120, 200, 30), dtype=np.uint8), "CMYK")
NAIVE = np.asarray(CMYK.convert("RGB"))[0, 0]
READ: dict[str, tuple[Callable[[], bytes], tuple[int, int, int], int]] = {  # made by; expected colour; tolerance
    "CMYK JPEG": (lambda: saved(CMYK, "JPEG", quality=100), tuple(NAIVE.tolist()), 4),
    "PNG named .JPEG": (lambda: saved(Image.fromarray(COLOUR), "PNG"), (200, 100, 40), 0),
    "WebP named .JPEG": (lambda: saved(Image.fromarray(COLOUR), "WEBP", lossless=True), (200, 100, 40), 0),
    "EXIF rotation": (rotated, (200, 100, 40), 3),
    "palette with transparency": (palette, (200, 100, 40), 0),
    "animated GIF named .JPEG": (lambda: frames("GIF"), (200, 100, 40), 0),
    "animated WebP named .JPEG": (lambda: frames("WEBP"), (200, 100, 40), 0),
    "transparency": (
        lambda: saved(Image.fromarray(np.dstack([COLOUR, np.full((6, 8, 1), 7, np.uint8)])), "PNG"),
        (200, 100, 40),
        0,
    ),
    "grey": (lambda: saved(Image.fromarray(COLOUR[..., 0]), "JPEG", quality=100), (200, 200, 200), 1),
    "16-bit grey": (lambda: saved(Image.fromarray(np.full((6, 8), 200 * 257, np.uint16)), "PNG"), (200, 200, 200), 0),
    "two colours": (lambda: saved(Image.fromarray(COLOUR[..., 0] > 0), "PNG"), (255, 255, 255), 0),
    "TIFF named .JPEG": (lambda: saved(Image.fromarray(COLOUR), "TIFF"), (200, 100, 40), 0),
    "TIFF of several pages": (lambda: frames("TIFF"), (200, 100, 40), 0),
    "16-bit grey TIFF": (lambda: saved(Image.fromarray(np.full((6, 8), 200 * 257, np.uint16)), "TIFF"), (200, 200, 200), 0),
    "16-bit grey PGM": (lambda: saved(Image.fromarray(np.full((6, 8), 200 * 257, np.uint16)), "PPM"), (200, 200, 200), 0),
}


@pytest.mark.parametrize("kind", READ)
def test_an_odd_image_is_decoded(kind: str) -> None:
    made, colour, tolerance = READ[kind]
    found = pixels(made())
    assert found.shape == (6, 8, 3), "as the file has it: EXIF turns nothing"
    assert np.abs(found.astype(int) - np.array(colour)).max() <= tolerance
    assert kind.removesuffix(" named .JPEG").replace(" grey TIFF", " grey").replace(" grey PGM", " grey") in DOCUMENT


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate", "packbits"])
def test_a_compressed_tiff_has_the_pixels_of_a_plain_one(compression: str | None) -> None:
    assert (pixels(saved(Image.fromarray(COLOUR), "TIFF", compression=compression)) == COLOUR).all()


def test_a_tiff_is_turned_as_its_orientation_says() -> None:
    """Pillow applies this tag of TIFF, which is no EXIF, when it decodes the image."""
    payload = saved(Image.fromarray(COLOUR), "TIFF", tiffinfo={0x0112: 6})
    assert pixels(payload).shape == (8, 6, 3)
    assert open_image(payload).size == (6, 8), "the header says the same size"


def test_cmyk_with_and_without_adobes_marker_is_the_same() -> None:
    """Adobe writes CMYK inverted. Pillow, and so torchvision, takes every CMYK JPEG for one of Adobe's, and so do we."""
    made = saved(CMYK, "JPEG", quality=100)
    plain = without_adobe_marker(made)
    assert len(plain) < len(made)
    assert np.array_equal(pixels(made), pixels(plain))


@pytest.mark.parametrize("channels", [1, 3])
def test_grey_of_sixteen_bits_is_scaled_to_the_nearest(channels: int) -> None:
    values = np.array([[0, 128, 129, 256, 257, 385], [386, 32767, 32768, 65406, 65407, 65535]], dtype=np.uint16)
    found = pixels(saved(Image.fromarray(values), "PNG"), channels)
    assert found.tolist() == [[[round(int(value) / 257)] * channels for value in row] for row in values]


def test_sixteen_bits_of_colour_keep_their_high_bytes() -> None:
    """Pillow has no such mode and reads the high byte of each value."""
    row = b"\0" + struct.pack(">3H", 200 * 256 + 99, 100 * 256, 40 * 256 + 255) * 2
    assert pixels(png(2, 1, 16, 2, row)).tolist() == [[[200, 100, 40]] * 2]


def grey_tiff(tag: int, value: int) -> bytes:
    """16-bit grey, and one tag changed."""
    made = saved(Image.fromarray(np.full((6, 8), 4000, np.uint16)), "TIFF", tiffinfo={SAMPLEFORMAT: 1})
    [at] = [at for at in range(8, len(made) - 12) if made[at : at + 8] == struct.pack("<HHI", tag, 3, 1)]
    return made[: at + 8] + struct.pack("<H", value) + made[at + 10 :]


UNREADABLE: dict[str, Callable[[], bytes]] = {
    "truncated": lambda: trees.jpeg(1, 64, 64)[:-200],
    "truncated PNG": lambda: saved(Image.open(io.BytesIO(trees.jpeg(1, 64, 64))), "PNG")[:-2000],
    "empty": lambda: b"",
    "truncated TIFF": lambda: saved(Image.open(io.BytesIO(trees.jpeg(1, 64, 64))), "TIFF", compression="tiff_lzw")[:-2000],
    "truncated PPM": lambda: saved(Image.fromarray(COLOUR), "PPM")[:-20],
    "grey TIFF of 12 bits": lambda: grey_tiff(BITSPERSAMPLE, 12),
    "grey TIFF with 0 for white": lambda: grey_tiff(PHOTOMETRIC_INTERPRETATION, 0),
    "grey TIFF of signed values": lambda: grey_tiff(SAMPLEFORMAT, 2),
    "floats in a TIFF": lambda: saved(Image.fromarray(COLOUR[..., 0].astype(np.float32)), "TIFF"),
    "floats in a PPM": lambda: saved(Image.fromarray(COLOUR[..., 0].astype(np.float32)), "PPM"),
    "LAB in a TIFF": lambda: saved(Image.frombytes("LAB", (8, 6), COLOUR.tobytes()), "TIFF"),
    "no image": lambda: b"<html>404</html>",
}
HOSTILE: dict[str, Callable[[], bytes]] = {
    "a size that the file does not hold": lambda: png(100_000, 100_000, 8, 0, bytes(1000)),
    "EPS": lambda: saved(Image.fromarray(COLOUR), "EPS"),  # Pillow would start Ghostscript
    "PDF": lambda: saved(Image.fromarray(COLOUR), "PDF"),
    "TGA": lambda: saved(Image.fromarray(COLOUR), "TGA"),
}


@pytest.mark.parametrize("kind", [*UNREADABLE, *HOSTILE])
def test_an_image_that_cannot_be_decoded_is_unreadable(kind: str) -> None:
    with pytest.raises(UnreadableError):
        pixels((UNREADABLE | HOSTILE)[kind]())
    assert kind in HOSTILE or kind.startswith(("truncated", "grey TIFF")) or kind.split(" in a ")[0] in DOCUMENT


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1)])
@pytest.mark.parametrize("store", [{}, {"resize": "square", "side": 8}, {"resize": "short-side", "side": 8}])
def test_sides_of_one_pixel_are_resized_as_others(size: tuple[int, int], store: dict[str, object]) -> None:
    payload = saved(Image.new("RGB", size, (200, 100, 40)), "PNG")
    found = convert(decode_file(payload), params.StoreSettings.model_validate(store))
    short = 8 if store else 1
    assert min(found.shape[1:]) == short
    assert np.array_equal(found, np.broadcast_to(np.array([[[200]], [[100]], [[40]]], np.uint8), found.shape))


# --- files and folders ------------------------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return trees.write_plain(tmp_path / "images", FILES)


def names(root: Path) -> list[str]:
    with open_images(root) as listing:
        return [image.file for image in listing.images if image.cls == "n01" and image.split == "train"]


@pytest.mark.parametrize("left", [".ipynb_checkpoints", "__MACOSX", "@eaDir"])
@pytest.mark.parametrize("place", ["train", "val", "train/n01"])
def test_folders_that_programs_leave_are_passed_over_without_a_note(left: str, place: str, root: Path) -> None:
    (root / place / left).mkdir()
    (root / place / left / "n01_0-checkpoint.JPEG").write_bytes(trees.jpeg(1))
    with open_images(root) as listing:
        assert {image.key for image in listing.images} == set(FILES)
        assert listing.notes == ()
    assert left in DOCUMENT


@pytest.mark.parametrize(
    "name", ["with a space.JPEG", "ÅÄÖ 雪.jpeg", "A\u030a.JPEG", "x.JPG", "x.jPeG", "x.PNG", "two.dots.png"], ids=ascii
)
def test_a_name_is_kept_as_it_is(name: str, root: Path) -> None:
    (root / "train" / "n01" / name).write_bytes(trees.jpeg(1))
    assert name in names(root)


def test_the_suffixes_of_torchvision_are_read_in_any_case(root: Path) -> None:
    assert set(SUFFIXES) == set(folder.IMG_EXTENSIONS)
    for suffix in SUFFIXES:
        for name in (f"y{suffix}", f"z{suffix.upper()}"):
            Image.fromarray(COLOUR).save(root / "train" / "n01" / name)
        assert f"`{suffix}`" in DOCUMENT
    with open_images(root) as listing:
        added = [image for image in listing.images if image.file[0] in "yz"]
        assert len(added) == 2 * len(SUFFIXES)
        assert listing.notes == ()
        for image in added:
            assert np.asarray(listing.decode(listing.fetch(image)).convert("RGB")).shape == COLOUR.shape


@pytest.mark.parametrize("name", ["a\nb.JPEG", "a\tb.JPEG", "a\x1bb.JPEG"], ids=ascii)
def test_a_name_with_a_control_character_is_refused(name: str, root: Path) -> None:
    (root / "train" / "n01" / name).write_bytes(trees.jpeg(1))
    with pytest.raises(DataError, match="control or undecodable characters") as caught:
        names(root)
    assert "rename" in caught.value.hint


def test_a_link_that_leads_nowhere_is_named_when_it_is_read(root: Path) -> None:
    (root / "train" / "n01" / "link.JPEG").symlink_to(root / "gone.JPEG")
    with open_images(root) as listing:
        [image] = [image for image in listing.images if image.file == "link.JPEG"]
        with pytest.raises(DataError, match=r"link\.JPEG: cannot be read .No such file"):
            listing.fetch(image)


def test_a_link_to_an_image_or_a_folder_is_followed(root: Path) -> None:
    (root / "train" / "n01" / "link.JPEG").symlink_to(root / "train" / "n02" / "n02_0.JPEG")
    (root / "train" / "n03").symlink_to(root / "train" / "n02")
    (root / "val" / "n03").symlink_to(root / "val" / "n02")
    assert "link.JPEG" in names(root)
    with open_images(root) as listing:
        assert {image.cls for image in listing.images} == {"n01", "n02", "n03"}
