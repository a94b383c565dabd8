"""Pictures keep what is in them, whatever their file has: bits, floats, palettes, alpha, print colours, orientation."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from numpy.typing import NDArray

from client_app.own.files import load_own
from client_app.own.reading import images
from client_app.own.reading.images import ImageReader, read_image
from client_app.own.reading.text_files import DataError
from tests.client_app.own_clients import settings_of
from tests.toys import tiny_models, toy_data

RAMP = np.tile(np.linspace(0, 1, 32), (8, 1))


def saved(array: NDArray[Any], kind: str) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.fromarray(array).save(buffer, kind)
    return buffer.getvalue()


def read(image: bytes) -> NDArray[np.uint8]:
    return np.asarray(read_image(image, "row 1"))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("largest", [255, 4095, 65535])
def test_samples_of_more_than_eight_bits_keep_their_shades(kind: str, largest: int) -> None:
    found = read(saved(np.rint(RAMP * largest).astype(np.uint16), kind))
    assert found.shape == (8, 32, 3)
    assert int(np.abs(found[0, :, 0] - RAMP[0] * 255).max()) <= 1


def test_floats_and_signed_numbers_keep_their_shades() -> None:
    for array in (RAMP, RAMP * 255, RAMP * 3000 - 1000):
        found = read(saved(array.astype(np.float32), "TIFF"))
        assert int(np.abs(found[0, :, 0] - RAMP[0] * 255).max()) <= 1
    signed = read(saved((RAMP * 3000 - 1000).astype(np.int32), "TIFF"))
    assert int(np.abs(signed[0, :, 0] - RAMP[0] * 255).max()) <= 1
    with pytest.raises(DataError, match="row 1: the image has values that are not finite"):
        read(saved(np.where(RAMP > 0.5, np.nan, RAMP).astype(np.float32), "TIFF"))


def tiff(array: NDArray[Any], photometric: int) -> bytes:
    """Pillow writes neither zeros that are white, nor colours of 16 bits. One strip, little-endian."""
    height, width, colours = array.shape
    bits, data = array.dtype.itemsize * 8, array.tobytes()
    kind = 3 if array.dtype.kind == "f" else 1
    after = 8 + 2 + 12 * 10 + 4
    many = {258: [bits] * colours, 339: [kind] * colours}
    tags: dict[int, int] = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: after + 4 * colours}
    tags |= {277: colours, 278: height, 279: len(data), 339: kind}
    entries, beside = b"", b""
    for tag, value in tags.items():
        count = len(many.get(tag, [0]))
        if count > 2:
            entries += struct.pack("<HHII", tag, 3, count, after + len(beside))
            beside += struct.pack(f"<{count}H", *many[tag])
        else:
            entries += struct.pack("<HHIHH", tag, 3, count, value, 0)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + beside.ljust(4 * colours, b"\0") + data


@pytest.mark.parametrize(("kind", "largest"), [("u1", 255), ("<u2", 65535), ("<u2", 4095), ("<f4", 1)])
def test_an_image_whose_zeros_are_white_is_not_turned_round(kind: str, largest: int) -> None:
    """As scanners and X-ray machines write them."""
    for photometric, shades in ((1, RAMP), (0, 1 - RAMP)):
        found = read(tiff((RAMP * largest).astype(kind)[:, :, None], photometric))
        assert int(np.abs(found[0, :, 0] - shades[0] * 255).max()) <= 1


def test_colours_of_sixteen_bits_in_tiff_are_read_or_refused() -> None:
    full, dark = (np.repeat((RAMP * largest).astype("<u2")[:, :, None], 3, axis=2) for largest in (65535, 4095))
    assert int(np.abs(read(tiff(full, 2))[0, :, 0] - RAMP[0] * 255).max()) <= 1
    with pytest.raises(DataError, match="16 bits for each colour but values of fewer"):
        read(tiff(dark, 2))


def png_of_sixteen_bits_a_colour(array: NDArray[np.uint16]) -> bytes:
    """Pillow writes none. One filter byte (none) before each row, big-endian samples."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width, _ = array.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_colours_of_sixteen_bits_are_kept_or_refused() -> None:
    colours = np.repeat(RAMP[:, :, None], 3, axis=2)
    found = read(png_of_sixteen_bits_a_colour(np.rint(colours * 65535).astype(np.uint16)))
    assert int(np.abs(found[0, :, 0] - RAMP[0] * 255).max()) <= 1
    with pytest.raises(DataError, match="row 1: the image has 16 bits for each colour but values of fewer"):
        read(png_of_sixteen_bits_a_colour(np.rint(colours * 4095).astype(np.uint16)))


def test_transparent_parts_are_white_unless_the_image_is() -> None:
    black = np.zeros((4, 4, 4), dtype=np.uint8)
    black[1, 1, 3] = 255  # one opaque black pixel; what is transparent is black, too
    found = read(saved(black, "PNG"))
    assert found[1, 1].tolist() == [0, 0, 0]
    assert found[0, 0].tolist() == [255, 255, 255]
    black[..., :3] = 255
    found = read(saved(black, "PNG"))
    assert found[1, 1].tolist() == [255, 255, 255]
    assert found[0, 0].tolist() == [0, 0, 0]


def test_a_palette_with_a_transparent_colour_is_read_by_its_colours() -> None:
    image = PIL.Image.new("P", (2, 1))
    image.putpalette([10, 200, 30, 0, 0, 0])
    image.putdata([0, 1])
    buffer = io.BytesIO()
    image.save(buffer, "PNG", transparency=1)
    assert read(buffer.getvalue())[0].tolist() == [[10, 200, 30], [255, 255, 255]]


def test_colours_for_print_and_of_lab_are_the_same_colours() -> None:
    from PIL import ImageCms

    red = PIL.Image.new("RGB", (4, 4), (220, 30, 30))
    buffer = io.BytesIO()
    red.convert("CMYK").save(buffer, "TIFF")
    assert np.abs(read(buffer.getvalue())[0, 0].astype(int) - [220, 30, 30]).max() <= 2
    lab = ImageCms.profileToProfile(
        red, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    assert lab is not None
    buffer = io.BytesIO()
    lab.save(buffer, "TIFF")
    assert np.abs(read(buffer.getvalue())[0, 0].astype(int) - [220, 30, 30]).max() <= 4


@pytest.mark.parametrize("mode", ["RGB", "L", "I;16"])
def test_images_are_upright(mode: str) -> None:
    array = np.rint(RAMP[:, :16] * 2 * 255).astype(np.uint8)
    image = PIL.Image.fromarray(array.astype(np.uint16) * 257 if mode == "I;16" else array)
    image = image.convert(mode) if mode != "I;16" else image
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # the camera was turned: shown right when rotated by 90 degrees clockwise
    buffer = io.BytesIO()
    image.save(buffer, "TIFF" if mode == "I;16" else "PNG", exif=exif)
    found = read(buffer.getvalue())
    assert found.shape == (16, 8, 3)
    assert found[0, 0, 0] < 20
    assert found[-1, 0, 0] > 200


def test_only_small_images_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is 12 bytes as the model sees it; with room for 30, the one that was not used for longest goes."""
    monkeypatch.setattr(images, "MAX_CACHE_BYTES", 30)
    opened: list[int] = []

    def open_at(position: int) -> list[int]:
        opened.append(position)
        return [position]

    def processor(images: list[int], return_tensors: str) -> dict[str, torch.Tensor]:
        return {"pixel_values": torch.tensor([[float(image)] * 3 for image in images])}

    reader = ImageReader(processor, open_at)
    assert reader([0, 1]).inputs["pixel_values"].tolist() == [[0.0] * 3, [1.0] * 3]
    assert reader([1, 0, 2]).inputs["pixel_values"][:, 0].tolist() == [1.0, 0.0, 2.0]
    assert reader([0, 1]).inputs["pixel_values"][:, 0].tolist() == [0.0, 1.0]
    assert opened == [0, 1, 2, 1]


def test_a_split_keeps_images_as_the_model_sees_them(tmp_path: Path) -> None:
    base = tiny_models.save_vit(tmp_path / "vit")
    _, data = load_own(settings_of(toy_data.write_pictures(tmp_path / "x", 3, 0, size=400), tmp_path, base))
    train = data.splits["train"]
    batch = train.batch(torch.arange(len(train))).inputs["pixel_values"]
    reader = getattr(train, "read")  # noqa: B009
    assert isinstance(reader, ImageReader)
    assert reader._bytes == batch.numel() * batch.element_size()
    assert torch.equal(batch[2:3], train.batch(torch.tensor([2])).inputs["pixel_values"])


def test_images_of_several_frames_are_told(tmp_path: Path) -> None:
    folder = toy_data.write_pictures(tmp_path / "x", 3, 0)
    frames = [toy_data.picture(colour, 20, 0) for colour in toy_data.COLOURS]
    frames[0].save(folder / "red" / "moving.gif", save_all=True, append_images=frames[1:])
    settings = settings_of(folder, tmp_path, tiny_models.save_vit(tmp_path / "vit"))
    for _ in range(2):  # remembered
        assert "1 images have several frames; only the first frame of each is read" in load_own(settings)[1].notes
