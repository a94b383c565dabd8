"""An adapter as one blob of bytes, and back; the format is specified in ``proto/README.md``.

A blob is ``magic (8) | header length (4, little-endian) | AdapterHeader | payload``. Decoding trusts nothing: every
failure is a :class:`CodecError` with one of a closed set of codes, and no more memory is allocated than the bytes at
hand justify.
"""

from __future__ import annotations

import enum
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from google.protobuf.message import DecodeError
from torch import Tensor

from fedalloy_adapters.adapter import Adapter, all_finite, require_same_layout
from fedalloy_adapters.layout import Layout, LayoutError
from fedalloy_adapters.wire.block_quantisation import EIGHT_BITS, FOUR_BITS, TWO_BITS, pack_blocks, unpack_blocks
from proto.fedalloy.v1 import adapter_pb2

MAGIC = b"FALLOY\x00\x01"
VERSION = 1
NONCE_BYTES = 16
MAX_HEADER_BYTES = 16 * 2**20
MAX_BLOB_BYTES = 4 * 2**30


class CodecErrorCode(enum.StrEnum):
    """Everything that can be wrong with a blob."""

    TRUNCATED = "TRUNCATED"
    BAD_MAGIC = "BAD_MAGIC"
    BAD_VERSION = "BAD_VERSION"
    BAD_HEADER = "BAD_HEADER"
    TOO_LARGE = "TOO_LARGE"
    UNKNOWN_LAYOUT = "UNKNOWN_LAYOUT"
    BAD_LAYOUT = "BAD_LAYOUT"
    BAD_ENCODING = "BAD_ENCODING"
    BAD_LENGTH = "BAD_LENGTH"
    NOT_FINITE = "NOT_FINITE"
    UNKNOWN_REFERENCE = "UNKNOWN_REFERENCE"
    BAD_DIGEST = "BAD_DIGEST"


class CodecError(ValueError):
    """A blob cannot be decoded, or an adapter cannot be encoded; ``code`` says why."""

    def __init__(self, code: CodecErrorCode, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code

    @property
    def told(self) -> str:
        """What the sender of the blob may read of this error."""
        return str(self)


class Encoding(enum.StrEnum):
    """How numbers are stored."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    INT8 = "int8"
    INT4 = "int4"
    INT2 = "int2"

    @property
    def is_lossy(self) -> bool:
        """Whether a binary32 number may change."""
        return self is not Encoding.FP32

    @property
    def whole(self) -> Encoding:
        """The encoding for an adapter that is not a difference: two bits have no zero, and lose too much for good."""
        return Encoding.INT4 if self is Encoding.INT2 else self

    @property
    def for_sums(self) -> Encoding:
        """The encoding for sums of squares, by which merges divide: a small one must not become zero."""
        return Encoding.BF16 if self.is_lossy else self

    @property
    def for_starts(self) -> Encoding:
        """The encoding for whole adapters from which the next round starts: integers drop small steps, each time."""
        return Encoding.FP16 if self in _IN_BLOCKS else self


_TO_PROTO = {
    Encoding.FP32: adapter_pb2.ENCODING_FP32,
    Encoding.FP16: adapter_pb2.ENCODING_FP16,
    Encoding.BF16: adapter_pb2.ENCODING_BF16,
    Encoding.INT8: adapter_pb2.ENCODING_INT8,
    Encoding.INT4: adapter_pb2.ENCODING_INT4,
    Encoding.INT2: adapter_pb2.ENCODING_INT2,
}
_FROM_PROTO: dict[int, Encoding] = {int(number): encoding for encoding, number in _TO_PROTO.items()}
_WIDTH = {Encoding.FP32: 4, Encoding.FP16: 2, Encoding.BF16: 2}
_IN_BLOCKS = {Encoding.INT8: EIGHT_BITS, Encoding.INT4: FOUR_BITS, Encoding.INT2: TWO_BITS}
"""The integer encodings."""


def encoding_to_proto(encoding: Encoding) -> adapter_pb2.Encoding:
    """The wire's number for an encoding."""
    return _TO_PROTO[encoding]


def encoding_from_proto(number: int) -> Encoding:
    """The encoding for a wire number.

    Raises:
        CodecError: BAD_ENCODING.
    """
    if number not in _FROM_PROTO:
        raise CodecError(CodecErrorCode.BAD_ENCODING, f"unknown encoding number {number}")
    return _FROM_PROTO[number]


@dataclass(frozen=True)
class Encoded:
    """A blob, and the adapter that its receiver will hold after decoding it."""

    blob: bytes
    decoded: Adapter
    payload_bytes: int
    encoding: Encoding


def payload_size(layout: Layout, encoding: Encoding) -> int:
    """Bytes of the payload: the numbers, and the scales of the integer encodings."""
    if encoding in _IN_BLOCKS:
        return sum(_IN_BLOCKS[encoding].size(entry.size) for entry in layout.entries)
    return layout.size * _WIDTH[encoding]


def encode(
    adapter: Adapter,
    encoding: Encoding = Encoding.FP32,
    *,
    reference: Adapter | None = None,
    include_layout: bool = True,
) -> Encoded:
    """Pack an adapter into one blob.

    Args:
        adapter: what to send; its numbers are sent as (at most) binary32.
        encoding: how the numbers are stored.
        reference: send the difference from this adapter, which the receiver must hold (same layout).
        include_layout: whether the blob has the layout; a receiver that knows it by its digest does not need it.

    Raises:
        CodecError: NOT_FINITE for NaN or infinity (also if fp16 would overflow), BAD_LAYOUT for a reference with
            another layout.
    """
    layout = adapter.layout
    numbers = adapter.vector.detach().to("cpu", torch.float32)
    base = torch.zeros(0)
    if reference is not None:
        _require_layout(layout, reference.layout)
        base = reference.vector.detach().to("cpu", torch.float32)
        numbers = numbers - base
    if not all_finite(numbers):
        raise CodecError(CodecErrorCode.NOT_FINITE, "the adapter has NaN or infinite numbers")
    payload = _pack(layout, numbers, encoding)
    restored = _unpack(layout, payload, encoding)
    decoded = Adapter(layout, restored if reference is None else base + restored)
    if not decoded.is_finite:
        raise CodecError(CodecErrorCode.NOT_FINITE, f"{encoding} overflows at {float(numbers.abs().max()):.4g}")
    header = adapter_pb2.AdapterHeader(
        version=VERSION,
        nonce=os.urandom(NONCE_BYTES),
        encoding=encoding_to_proto(encoding),
        layout_digest=layout.digest,
        content_digest=decoded.digest,
        payload_bytes=len(payload),
    )
    if include_layout:
        header.layout.CopyFrom(layout.to_proto())
    if reference is not None:
        header.reference_digest = reference.digest
    head = header.SerializeToString()
    blob = b"".join((MAGIC, len(head).to_bytes(4, "little"), head, payload))
    return Encoded(blob, decoded, len(payload), encoding)


def decode(
    blob: bytes,
    *,
    layouts: Mapping[bytes, Layout] | None = None,
    expected: Layout | None = None,
    encoding: Encoding | None = None,
    references: Mapping[bytes, Adapter] | None = None,
    max_bytes: int = MAX_BLOB_BYTES,
) -> Adapter:
    """Unpack a blob; the result has float32 numbers on the CPU and has been checked against its content digest.

    Args:
        blob: the bytes.
        layouts: layouts that the receiver knows, by digest, for blobs without a layout.
        expected: refuse any other layout than this one.
        encoding: refuse any other encoding than this one.
        references: adapters that the receiver holds, by content digest, for blobs that are differences.
        max_bytes: refuse a longer blob.

    Raises:
        CodecError: with one of the codes of :class:`CodecErrorCode`.
    """
    header, payload = _split(blob, max_bytes)
    layout = _layout_of(header, layouts or {}, expected)
    found = encoding_from_proto(header.encoding)
    if encoding not in (None, found):
        raise CodecError(CodecErrorCode.BAD_ENCODING, f"encoded as {found}, expected {encoding}")
    needed = payload_size(layout, found)
    if not (header.payload_bytes == len(payload) == needed):
        raise CodecError(
            CodecErrorCode.BAD_LENGTH,
            f"payload has {len(payload)} bytes, header claims {header.payload_bytes}, "
            f"{found} of {layout.size} numbers needs {needed}",
        )
    numbers = _unpack(layout, payload, found)
    if header.reference_digest:
        reference = (references or {}).get(header.reference_digest)
        if reference is None:
            raise CodecError(
                CodecErrorCode.UNKNOWN_REFERENCE, f"difference from adapter {header.reference_digest[:6].hex()}"
            )
        _require_layout(layout, reference.layout)
        numbers = reference.vector.to("cpu", torch.float32) + numbers
    if not all_finite(numbers):
        raise CodecError(CodecErrorCode.NOT_FINITE, f"payload has NaN or infinite numbers{_where(layout, numbers)}")
    adapter = Adapter(layout, numbers)
    if adapter.digest != header.content_digest:
        raise CodecError(CodecErrorCode.BAD_DIGEST, "the decoded adapter is not the one that the header names")
    return adapter


def header_of(blob: bytes) -> adapter_pb2.AdapterHeader:
    """A blob's header; the payload is not decoded.

    Raises:
        CodecError: it has none.
    """
    return _split(blob, MAX_BLOB_BYTES)[0]


def _split(blob: bytes, max_bytes: int) -> tuple[adapter_pb2.AdapterHeader, memoryview]:
    """Header and payload; no number is decoded yet."""
    if len(blob) > max_bytes:
        raise CodecError(CodecErrorCode.TOO_LARGE, f"{len(blob)} bytes, at most {max_bytes} are accepted")
    prefix = len(MAGIC) + 4
    if len(blob) < prefix:
        raise CodecError(CodecErrorCode.TRUNCATED, f"{len(blob)} bytes, a blob has at least {prefix}")
    if blob[: len(MAGIC)] != MAGIC:
        raise CodecError(CodecErrorCode.BAD_MAGIC, f"starts with {bytes(blob[:8])!r}, expected {MAGIC!r}")
    length = int.from_bytes(blob[len(MAGIC) : prefix], "little")
    if length > MAX_HEADER_BYTES:
        raise CodecError(CodecErrorCode.TOO_LARGE, f"header of {length} bytes, at most {MAX_HEADER_BYTES} are accepted")
    if prefix + length > len(blob):
        raise CodecError(CodecErrorCode.TRUNCATED, f"header of {length} bytes in a blob of {len(blob)}")
    header = adapter_pb2.AdapterHeader()
    try:
        header.ParseFromString(bytes(blob[prefix : prefix + length]))
    except DecodeError as error:
        raise CodecError(CodecErrorCode.BAD_HEADER, f"not an AdapterHeader ({error})") from None
    if header.version != VERSION:
        raise CodecError(CodecErrorCode.BAD_VERSION, f"version {header.version}, expected {VERSION}")
    for name in ("layout_digest", "content_digest"):
        if len(getattr(header, name)) != hashlib.sha256().digest_size:
            raise CodecError(CodecErrorCode.BAD_HEADER, f"{name} has {len(getattr(header, name))} bytes, expected 32")
    if len(header.nonce) != NONCE_BYTES:
        raise CodecError(CodecErrorCode.BAD_HEADER, f"nonce has {len(header.nonce)} bytes, expected {NONCE_BYTES}")
    if len(header.reference_digest) not in (0, 32):
        raise CodecError(CodecErrorCode.BAD_HEADER, "reference_digest is neither absent nor 32 bytes")
    return header, memoryview(blob)[prefix + length :]


def _layout_of(header: adapter_pb2.AdapterHeader, known: Mapping[bytes, Layout], expected: Layout | None) -> Layout:
    if header.HasField("layout"):
        try:
            layout = Layout.from_proto(header.layout)
        except LayoutError as error:
            raise CodecError(CodecErrorCode.BAD_LAYOUT, str(error)) from None
        if layout.digest != header.layout_digest:
            raise CodecError(CodecErrorCode.BAD_LAYOUT, "the layout is not the one that layout_digest names")
    elif expected is not None and header.layout_digest == expected.digest:
        layout = expected
    elif header.layout_digest in known:
        layout = known[header.layout_digest]
    else:
        raise CodecError(CodecErrorCode.UNKNOWN_LAYOUT, f"layout {header.layout_digest[:6].hex()} is not known here")
    if expected is not None:
        _require_layout(expected, layout)
    return layout


def _require_layout(expected: Layout, found: Layout) -> None:
    try:
        require_same_layout(expected, found)
    except LayoutError as error:
        raise CodecError(CodecErrorCode.BAD_LAYOUT, str(error)) from None


def _pack(layout: Layout, numbers: Tensor, encoding: Encoding) -> bytes:
    if encoding is Encoding.FP32:
        return numbers.numpy().astype("<f4", copy=False).tobytes()
    if encoding is Encoding.FP16:
        half = numbers.to(torch.float16)
        if not all_finite(half):
            raise CodecError(CodecErrorCode.NOT_FINITE, f"fp16 overflows at {float(numbers.abs().max()):.4g}")
        return half.numpy().astype("<f2", copy=False).tobytes()
    if encoding is Encoding.BF16:
        brief = numbers.to(torch.bfloat16)
        if not all_finite(brief):
            raise CodecError(CodecErrorCode.NOT_FINITE, f"bf16 overflows at {float(numbers.abs().max()):.4g}")
        return brief.view(torch.int16).numpy().astype("<i2", copy=False).tobytes()
    kind = _IN_BLOCKS[encoding]
    return b"".join(pack_blocks(numbers[layout.slice_of(entry.name)], kind) for entry in layout.entries)


def _unpack(layout: Layout, payload: bytes | memoryview, encoding: Encoding) -> Tensor:
    """Numbers as float32 ``[P]``; the payload's length has been checked."""
    if encoding is Encoding.FP32:
        return torch.from_numpy(np.frombuffer(payload, "<f4").astype(np.float32))
    if encoding is Encoding.FP16:
        return torch.from_numpy(np.frombuffer(payload, "<f2").astype(np.float32))
    if encoding is Encoding.BF16:
        bits = torch.from_numpy(np.frombuffer(payload, "<i2").astype(np.int16))
        return bits.view(torch.bfloat16).to(torch.float32)
    kind = _IN_BLOCKS[encoding]
    numbers = torch.empty(layout.size)
    position = 0
    for entry in layout.entries:
        numbers[layout.slice_of(entry.name)] = unpack_blocks(payload, position, entry.size, kind)
        position += kind.size(entry.size)
    return numbers


def _where(layout: Layout, numbers: Tensor) -> str:
    for entry in layout.entries:
        if not all_finite(numbers[layout.slice_of(entry.name)]):
            return f" in {entry.name!r}"
    return ""
