"""Image files to RGB pictures that keep what is in them, and the bounded memory for pictures that have been read."""

from __future__ import annotations

import io
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from client_app.data.dataset import Read
from client_app.own.reading.text_files import DataError

MAX_IMAGE_PIXELS = 100_000_000
MAX_CACHE_BYTES = 2**28
"""Most bytes of processed images that one split keeps; others are decoded again."""
_DEPTHS = (8, 10, 12, 14, 16)
_PHOTOMETRIC, _BITS_PER_SAMPLE, _MAX_SAMPLE_VALUE = 262, 258, 281
"""TIFF tags: what zero means (0: white), the depth, and the largest value that a sample may have."""


def read_image(source: Path | bytes, place: str) -> Any:
    """An image as RGB (``PIL.Image``), upright, decoded.

    Samples of more than 8 bits are scaled from their depth (the smallest of 8, 10, 12, 14, 16 bits that holds the
    image's largest value, or what a TIFF says), floats from 0 to 1 or from their own range. Transparent parts are
    white, or black where the image would vanish on white. Colours with a profile for print are converted by it.

    Args:
        source: a path or an encoded file.
        place: the row's, for the error.

    Raises:
        DataError: it cannot be decoded; names the file and the row.
    """
    import PIL.Image
    import PIL.ImageOps

    name = str(source) if isinstance(source, Path) else "the image"
    try:
        with PIL.Image.open(source if isinstance(source, Path) else io.BytesIO(source)) as image:
            if image.width * image.height > MAX_IMAGE_PIXELS:
                raise DataError(
                    f"{place}: {name} has {image.width} x {image.height} pixels, "
                    f"expected at most {MAX_IMAGE_PIXELS} in all"
                )
            return PIL.ImageOps.exif_transpose(_to_rgb(image))
    except DataError:
        raise
    except _ValueError as error:
        raise DataError(f"{place}: {name} {error}") from None
    except Exception as error:  # decoders may raise any error
        raise DataError(f"{place}: {name} is not an image that can be read: {error}") from None


def frames_in(source: Path | bytes) -> int:
    """How many pictures a file has; the first is read."""
    import PIL.Image

    with PIL.Image.open(source if isinstance(source, Path) else io.BytesIO(source)) as image:
        return int(getattr(image, "n_frames", 1))


class _ValueError(ValueError):
    """An image's numbers make no sense; the message ends a sentence that begins with the image's name."""


def _to_rgb(image: Any) -> Any:
    high_bytes_only = _high_bytes_only(image)  # before anything decodes it
    orientation = image.getexif()
    if image.mode == "F" or image.mode.startswith("I"):
        found = _eight_bits(image).convert("RGB")
    elif image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        found = _on_a_ground(image.convert("RGBA"))
    elif image.mode in ("CMYK", "LAB"):
        found = _by_profile(image)
    else:
        found = image.convert("RGB")
        if high_bytes_only and 0 < max(high for _, high in found.getextrema()) <= 16:
            raise _ValueError("has 16 bits for each colour but values of fewer; save it with 8 bits for each colour")
    found.info = {}
    exif = orientation.get(0x0112)
    if exif:
        found.getexif()[0x0112] = exif
    return found


def _eight_bits(image: Any) -> Any:
    import PIL.Image

    tags = dict(getattr(image, "tag_v2", {}))
    white_is_zero = tags.get(_PHOTOMETRIC) == 0
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise _ValueError("has values that are not finite")
    low, high = float(values.min()), float(values.max())
    if image.mode == "F":
        low, high = (0.0, 1.0) if low >= 0 and high <= 1 else (0.0, 255.0) if low >= 0 and high <= 255 else (low, high)
    elif low >= 0:
        told = tags.get(_MAX_SAMPLE_VALUE)
        largest = float(np.max(told)) if told else 0.0
        depths = [float(2**bits - 1) for bits in _DEPTHS if 2**bits > high]
        low, high = 0.0, largest if largest >= high > 0 else depths[0] if depths else high
    scaled = (values - low) * (255 / (high - low)) if high > low else np.zeros_like(values)
    if white_is_zero:  # Pillow turns such images round if they have 8 bits, not if they have more
        scaled = 255 - scaled
    return PIL.Image.fromarray(np.rint(scaled).astype(np.uint8))


def _on_a_ground(image: Any) -> Any:
    import PIL.Image

    for colour in ("white", "black"):
        ground = PIL.Image.new("RGBA", image.size, colour)
        ground.alpha_composite(image)
        found = ground.convert("RGB")
        extrema: Any = found.getextrema()
        if any(low != high for low, high in extrema):
            return found
    return PIL.Image.new("RGB", image.size, "white") if image.getextrema()[3][1] == 0 else image.convert("RGB")


def _by_profile(image: Any) -> Any:
    from PIL import ImageCms

    profile = image.info.get("icc_profile")
    wanted = ImageCms.createProfile("sRGB")
    try:
        if image.mode == "LAB":
            return ImageCms.profileToProfile(image, ImageCms.createProfile("LAB"), wanted, outputMode="RGB")
        if profile:
            return ImageCms.profileToProfile(image, io.BytesIO(profile), wanted, outputMode="RGB")
    except ImageCms.PyCMSError:  # a profile that is damaged, or for other colours
        pass
    return image.convert("RGB")


def _high_bytes_only(image: Any) -> bool:
    """Whether Pillow keeps the high byte of each colour only: PNG and TIFF files with 16 bits for each."""
    if image.format == "TIFF":
        return len(image.getbands()) > 1 and max(image.tag_v2.get(_BITS_PER_SAMPLE, (8,))) > 8
    return image.format == "PNG" and str(image.tile[0][3] if image.tile else "").endswith(";16B")


class ImageReader:
    """Processed images of a split by position, as tensors; keeps at most :data:`MAX_CACHE_BYTES` of them.

    Args:
        processor: the base model's own processor.
        open_at: decodes the images of the example at a position.
        nested: whether an example may have several images, so that the processor gets a list for each.
        names: those of its tensors that the model takes; none: all.
    """

    def __init__(
        self,
        processor: Any,
        open_at: Callable[[int], Sequence[Any]],
        *,
        nested: bool = False,
        names: Collection[str] = (),
    ) -> None:
        self.processor = processor
        self.open_at = open_at
        self.nested = nested
        self.names = names
        self._kept: OrderedDict[int, dict[str, Tensor]] = OrderedDict()
        self._bytes = 0

    def __call__(self, positions: Sequence[int]) -> Read:
        """The processor's tensors for the examples at ``positions``; an example's rows follow one another."""
        found = [self._one(position) for position in positions]
        if not all(_shapes(one) == _shapes(found[0]) for one in found):
            return self._padded([self.open_at(position) for position in positions])
        inputs = {name: torch.cat([one[name] for one in found]) for name in found[0]}
        counts = {name: torch.tensor([len(one[name]) for one in found]) for name in inputs}
        return Read(inputs, {name: rows for name, rows in counts.items() if bool((rows != 1).any())})

    def _padded(self, images: Sequence[Sequence[Any]]) -> Read:
        """All images at once, so that the processor pads them to the largest."""
        inputs, counts = self._processed(images), torch.tensor([len(own) for own in images])
        for name, tensor in inputs.items():
            if len(tensor) not in (len(images), int(counts.sum())):
                raise DataError(
                    f"the base model's image processor gives {len(tensor)} rows of {name!r} for {int(counts.sum())} "
                    f"images of {len(images)} examples, expected one for each"
                )
        several = [name for name, tensor in inputs.items() if len(tensor) != len(images)]
        return Read(inputs, dict.fromkeys(several, counts))

    def _one(self, position: int) -> dict[str, Tensor]:
        if position in self._kept:
            self._kept.move_to_end(position)
            return self._kept[position]
        found = self._processed([self.open_at(position)])
        self._kept[position] = found
        self._bytes += _bytes_of(found)
        while self._bytes > MAX_CACHE_BYTES:
            self._bytes -= _bytes_of(self._kept.popitem(last=False)[1])
        return found

    def _processed(self, images: Sequence[Sequence[Any]]) -> dict[str, Tensor]:
        given = [list(own) for own in images] if self.nested else [image for own in images for image in own]
        found = self.processor(images=given, return_tensors="pt")
        wanted = self.names or list(found)
        return {name: tensor for name, tensor in found.items() if isinstance(tensor, Tensor) and name in wanted}


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape[1:] for name, tensor in tensors.items()}


def _bytes_of(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
