"""Blobs that no honest sender makes, over a hundred by name, and the error that each must end in."""

from __future__ import annotations

import math
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.layout import Entry, Factor, Layout
from fedalloy_adapters.wire.codec import (
    MAGIC,
    MAX_HEADER_BYTES,
    CodecErrorCode,
    Encoding,
    encode,
    encoding_to_proto,
)
from proto.fedalloy.v1 import adapter_pb2
from tests.fedalloy_adapters.samples import layout_of, random_adapter

LAYOUT = layout_of(ranks={"q_proj": 2, "v_proj": 3})
ADAPTER = random_adapter(LAYOUT, 0)
REFERENCE = random_adapter(LAYOUT, 1)
OTHER = random_adapter(layout_of(), 2)
# LoRA A of (2, 3) and a bias: small enough to write payloads by hand.
SMALL = Layout((Entry("q", Factor.A, (2, 3)), Entry("q", Factor.BIAS, (2,))), {"q": 1.0}, "base")


def assemble(header: adapter_pb2.AdapterHeader | bytes, payload: bytes) -> bytes:
    head = header if isinstance(header, bytes) else header.SerializeToString()
    return MAGIC + struct.pack("<I", len(head)) + head + payload


@dataclass
class Parts:
    """An honest blob in pieces, for a test to spoil; ``layout`` gets a fitting digest again, ``blob`` is the result."""

    encoding: Encoding = Encoding.FP32
    adapter: Adapter = field(default_factory=lambda: ADAPTER)
    reference: Adapter | None = None
    include_layout: bool = True
    header: adapter_pb2.AdapterHeader = field(init=False)
    payload: bytes = field(init=False)

    def __post_init__(self) -> None:
        encoded = encode(self.adapter, self.encoding, reference=self.reference, include_layout=self.include_layout)
        length = int.from_bytes(encoded.blob[8:12], "little")
        self.header = adapter_pb2.AdapterHeader.FromString(encoded.blob[12 : 12 + length])
        self.payload = encoded.blob[12 + length :]

    @property
    def blob(self) -> bytes:
        return assemble(self.header, self.payload)


def spoil(change: Callable[[Parts], object], **options: object) -> bytes:
    parts = Parts(**options)  # type: ignore[arg-type]
    change(parts)
    return parts.blob


def recount(length: int) -> bytes:
    """An honest blob that claims another length of its header."""
    return MAGIC + struct.pack("<I", length) + Parts().blob[12:]


def shortened(parts: Parts) -> None:
    parts.payload = parts.payload[:-1]
    parts.header.payload_bytes -= 1


def header(**fields: object) -> bytes:
    """An honest blob with some header fields replaced."""

    def change(parts: Parts) -> None:
        for name, value in fields.items():
            setattr(parts.header, name, value)

    return spoil(change)


def layout(change: Callable[[adapter_pb2.Layout], object]) -> bytes:
    """An honest blob whose layout message has been spoilt."""
    return spoil(lambda parts: change(parts.header.layout))


def entry(**fields: object) -> Callable[[adapter_pb2.Layout], None]:
    """Replace fields of the layout's first entry; ``shape`` too."""

    def change(message: adapter_pb2.Layout) -> None:
        for name, value in fields.items():
            if name == "shape":
                del message.entries[0].shape[:]
                message.entries[0].shape.extend(value)  # type: ignore[arg-type]
            else:
                setattr(message.entries[0], name, value)

    return change


def claiming(*shapes: tuple[int, ...], encoding: Encoding = Encoding.FP32, payload: bytes = b"") -> bytes:
    """A blob with a valid layout of weights of these shapes, a fitting digest, and nearly nothing in it."""
    claimed = Layout(tuple(Entry(f"m{i}", Factor.WEIGHT, shape) for i, shape in enumerate(shapes)), {}, "base")
    return assemble(
        adapter_pb2.AdapterHeader(
            version=1,
            nonce=bytes(16),
            encoding=encoding_to_proto(encoding),
            layout_digest=claimed.digest,
            layout=claimed.to_proto(),
            content_digest=bytes(32),
            payload_bytes=min(4 * claimed.size, 2**64 - 1),
        ),
        payload,
    )


def handmade(numbers: bytes, encoding: Encoding, reference: Adapter | None = None) -> bytes:
    """A blob of layout SMALL with a payload written by hand."""
    head = adapter_pb2.AdapterHeader(
        version=1,
        nonce=bytes(16),
        encoding=encoding_to_proto(encoding),
        layout_digest=SMALL.digest,
        layout=SMALL.to_proto(),
        content_digest=bytes(32),
        reference_digest=reference.digest if reference else b"",
        payload_bytes=len(numbers),
    )
    return assemble(head, numbers)


def in_blocks(scales: tuple[float, float], codes: tuple[int, int], bits: int) -> bytes:
    """Integers of layout SMALL: each entry is one block of equal codes; its scale is cut to 16 bits."""
    payload = b""
    for count, scale, code in zip((6, 2), scales, codes, strict=True):
        packed = sum(code << (bits * position) for position in range(count))
        payload += struct.pack("<f", scale)[2:] + packed.to_bytes(-(-count * bits // 8), "little")
    return payload


def int8(scales: tuple[float, float], codes: tuple[int, int] = (128, 128)) -> bytes:
    return in_blocks(scales, codes, 8)


def int4(scales: tuple[float, float], codes: tuple[int, int] = (8, 8)) -> bytes:
    return in_blocks(scales, codes, 4)


def int2(scales: tuple[float, float], codes: tuple[int, int] = (2, 2)) -> bytes:
    return in_blocks(scales, codes, 2)


HONEST = Parts().blob
HEAD_LENGTH = int.from_bytes(HONEST[8:12], "little")
BIG = Adapter(SMALL, torch.full((SMALL.size,), 3e38))
UTF8 = HONEST.replace(b"classifier", b"class\xc3\x28ier")  # the length stays, the text is no longer UTF-8

T, L = CodecErrorCode, 2**31 - 1
HOSTILE: dict[str, tuple[bytes, CodecErrorCode]] = {
    # the prefix
    "empty": (b"", T.TRUNCATED),
    "one byte": (HONEST[:1], T.TRUNCATED),
    "magic only": (HONEST[:8], T.TRUNCATED),
    "ends inside the header's length": (HONEST[:11], T.TRUNCATED),
    "ends before the header": (HONEST[:12], T.TRUNCATED),
    "ends inside the header": (HONEST[: 12 + HEAD_LENGTH // 2], T.TRUNCATED),
    "ends one byte before the payload": (HONEST[: 12 + HEAD_LENGTH - 1], T.TRUNCATED),
    "wrong magic": (b"GALLOY\x00\x01" + HONEST[8:], T.BAD_MAGIC),
    "magic of another version": (b"FALLOY\x00\x02" + HONEST[8:], T.BAD_MAGIC),
    "a safetensors file": (struct.pack("<Q", 64) + b'{"a":{"dtype":"F32","shape":[1]}}', T.BAD_MAGIC),
    "a pickle": (b"\x80\x04\x95" + bytes(40), T.BAD_MAGIC),
    "zeros": (bytes(1000), T.BAD_MAGIC),
    "random bytes": (random.Random(0).randbytes(1000), T.BAD_MAGIC),
    "header claims 4 GiB": (recount(2**32 - 1), T.TOO_LARGE),
    "header claims one byte more than allowed": (MAGIC + struct.pack("<I", MAX_HEADER_BYTES + 1), T.TOO_LARGE),
    "header claims all that is allowed": (recount(MAX_HEADER_BYTES), T.TRUNCATED),
    "header claims one byte more than there is": (recount(len(HONEST) - 11), T.TRUNCATED),
    # the header
    "header claims one byte less": (recount(HEAD_LENGTH - 1), T.BAD_HEADER),
    "header claims the payload too": (recount(len(HONEST) - 12), T.BAD_HEADER),
    "random bytes as header": (assemble(random.Random(1).randbytes(200), Parts().payload), T.BAD_HEADER),
    "text that is not UTF-8": (UTF8, T.BAD_HEADER),
    "groups nested a thousand deep": (assemble(b"\x7b" * 1000 + b"\x7c" * 1000, b""), T.BAD_HEADER),
    "empty header": (assemble(b"", Parts().payload), T.BAD_VERSION),
    "version 0": (header(version=0), T.BAD_VERSION),
    "version 2": (header(version=2), T.BAD_VERSION),
    "no nonce": (header(nonce=b""), T.BAD_HEADER),
    "nonce too long": (header(nonce=bytes(17)), T.BAD_HEADER),
    "no layout digest": (header(layout_digest=b""), T.BAD_HEADER),
    "layout digest too long": (header(layout_digest=bytes(33)), T.BAD_HEADER),
    "no content digest": (header(content_digest=b""), T.BAD_HEADER),
    "content digest too short": (header(content_digest=bytes(31)), T.BAD_HEADER),
    "reference digest of one byte": (header(reference_digest=b"\0"), T.BAD_HEADER),
    "reference digest of 64 bytes": (header(reference_digest=bytes(64)), T.BAD_HEADER),
    # the layout
    "layout left out and not known": (Parts(include_layout=False).blob, T.UNKNOWN_LAYOUT),
    "layout of another digest": (header(layout_digest=bytes(32)), T.BAD_LAYOUT),
    "layout of another adapter": (spoil(lambda p: p.header.layout.CopyFrom(OTHER.layout.to_proto())), T.BAD_LAYOUT),
    "empty layout": (layout(lambda m: m.Clear()), T.BAD_LAYOUT),
    "layout without entries": (layout(lambda m: m.ClearField("entries")), T.BAD_LAYOUT),
    "layout without scalings": (layout(lambda m: m.ClearField("scalings")), T.BAD_LAYOUT),
    "layout without base": (layout(lambda m: m.ClearField("base_fingerprint")), T.BAD_LAYOUT),
    "tensor twice": (layout(lambda m: m.entries.append(m.entries[0])), T.BAD_LAYOUT),
    "scaling twice": (layout(lambda m: m.scalings.append(m.scalings[0])), T.BAD_LAYOUT),
    "scaling of an unknown module": (layout(lambda m: m.scalings.add(module="k", scaling=1.0)), T.BAD_LAYOUT),
    "scaling negative": (layout(lambda m: setattr(m.scalings[0], "scaling", -1.0)), T.BAD_LAYOUT),
    "scaling zero": (layout(lambda m: setattr(m.scalings[0], "scaling", 0.0)), T.BAD_LAYOUT),
    "scaling NaN": (layout(lambda m: setattr(m.scalings[0], "scaling", math.nan)), T.BAD_LAYOUT),
    "scaling infinite": (layout(lambda m: setattr(m.scalings[0], "scaling", math.inf)), T.BAD_LAYOUT),
    "factor unspecified": (layout(entry(factor=0)), T.BAD_LAYOUT),
    "factor unknown": (layout(entry(factor=5)), T.BAD_LAYOUT),
    "factor negative": (layout(entry(factor=-1)), T.BAD_LAYOUT),
    "name empty": (layout(entry(module="")), T.BAD_LAYOUT),
    "name too long": (layout(entry(module="x" * 513)), T.BAD_LAYOUT),
    "name of a megabyte": (layout(entry(module="x" * 2**20)), T.BAD_LAYOUT),
    "name with newline": (layout(entry(module="q\nproj")), T.BAD_LAYOUT),
    "name with escape sequence": (layout(entry(module="\x1b[2Jq_proj")), T.BAD_LAYOUT),
    "name with NUL": (layout(entry(module="q_proj\0")), T.BAD_LAYOUT),
    "name with direction mark": (layout(entry(module="q\u202eproj")), T.BAD_LAYOUT),
    "base with control character": (layout(lambda m: setattr(m, "base_fingerprint", "a\x07")), T.BAD_LAYOUT),
    "no dimensions": (layout(entry(factor=adapter_pb2.FACTOR_WEIGHT, shape=())), T.BAD_LAYOUT),
    "nine dimensions": (layout(entry(factor=adapter_pb2.FACTOR_WEIGHT, shape=(1,) * 9)), T.BAD_LAYOUT),
    "a million dimensions": (layout(entry(factor=adapter_pb2.FACTOR_WEIGHT, shape=(1,) * 10**6)), T.BAD_LAYOUT),
    "size zero": (layout(entry(shape=(2, 0))), T.BAD_LAYOUT),
    "size 2^31": (layout(entry(shape=(2, 2**31))), T.BAD_LAYOUT),
    "size 2^32 - 1": (layout(entry(shape=(2, 2**32 - 1))), T.BAD_LAYOUT),
    "LoRA with three dimensions": (layout(entry(shape=(2, 2, 2))), T.BAD_LAYOUT),
    "ranks of A and B differ": (layout(entry(shape=(1, 8))), T.BAD_LAYOUT),
    "layout transposed, same number of numbers": (layout(entry(shape=(2, 4)[::-1])), T.BAD_LAYOUT),
    # encoding and length
    "encoding unspecified": (header(encoding=0), T.BAD_ENCODING),
    "encoding unknown": (header(encoding=8), T.BAD_ENCODING),
    "encoding negative": (header(encoding=-1), T.BAD_ENCODING),
    "no payload": (HONEST[: 12 + HEAD_LENGTH], T.BAD_LENGTH),
    "payload ends one byte early": (HONEST[:-1], T.BAD_LENGTH),
    "trailing byte": (HONEST + b"\0", T.BAD_LENGTH),
    "trailing blob": (HONEST + HONEST, T.BAD_LENGTH),
    "payload_bytes zero": (header(payload_bytes=0), T.BAD_LENGTH),
    "payload_bytes one less, payload too": (spoil(shortened), T.BAD_LENGTH),
    "payload_bytes 2^64 - 1": (header(payload_bytes=2**64 - 1), T.BAD_LENGTH),
    "payload of another encoding": (header(encoding=adapter_pb2.ENCODING_FP16), T.BAD_LENGTH),
    "claims 10^12 numbers": (claiming((10**6, 10**6)), T.BAD_LENGTH),
    "claims 2^62 numbers": (claiming((L, L), payload=bytes(100)), T.BAD_LENGTH),
    "claims 2^248 numbers, more than any integer": (claiming((L,) * 8), T.BAD_LENGTH),
    # 65536 x 65536 x 65536 x 65536 = 2^64: nothing, to arithmetic with 64 bits.
    "claims 2^64 numbers, which wrap around to 0": (claiming((65536,) * 4), T.BAD_LENGTH),
    "claims 2^64 + 1 numbers, which wrap around to 1": (claiming((65536,) * 4, (1,), payload=bytes(4)), T.BAD_LENGTH),
    "claims 2^62 numbers of 4 bytes, which wrap around": (claiming((32768, 32768, 65536, 65536)), T.BAD_LENGTH),
    "claims 10^12 numbers of eight bits": (claiming((10**6, 10**6), encoding=Encoding.INT8), T.BAD_LENGTH),
    "claims 10^12 numbers of four bits": (claiming((10**6, 10**6), encoding=Encoding.INT4), T.BAD_LENGTH),
    "claims 10^12 numbers of two bits": (claiming((10**6, 10**6), encoding=Encoding.INT2), T.BAD_LENGTH),
    "four bits, one scale too few": (handmade(int4((1.0, 1.0))[:-3], Encoding.INT4), T.BAD_LENGTH),
    "four bits, one byte too many": (handmade(int4((1.0, 1.0)) + b"\0", Encoding.INT4), T.BAD_LENGTH),
    "eight bits, one scale too few": (handmade(int8((1.0, 1.0))[:-4], Encoding.INT8), T.BAD_LENGTH),
    "four bits that are eight": (handmade(int8((1.0, 1.0)), Encoding.INT4), T.BAD_LENGTH),
    "eight bits that are four": (handmade(int4((1.0, 1.0)), Encoding.INT8), T.BAD_LENGTH),
    "two bits that are four": (handmade(int4((1.0, 1.0)), Encoding.INT2), T.BAD_LENGTH),
    "four bits that are two": (handmade(int2((1.0, 1.0)), Encoding.INT4), T.BAD_LENGTH),
    # references
    "unknown reference": (Parts(reference=REFERENCE).blob, T.UNKNOWN_REFERENCE),
    "reference that never was": (header(reference_digest=b"\1" * 32), T.UNKNOWN_REFERENCE),
    "reference of another layout": (header(reference_digest=OTHER.digest), T.BAD_LAYOUT),
    "sum with the reference overflows": (handmade(struct.pack("<8f", *[3e38] * 8), Encoding.FP32, BIG), T.NOT_FINITE),
    # numbers
    "NaN in fp32": (handmade(struct.pack("<8f", *[1.0] * 7, math.nan), Encoding.FP32), T.NOT_FINITE),
    "infinity in fp32": (handmade(struct.pack("<8f", math.inf, *[1.0] * 7), Encoding.FP32), T.NOT_FINITE),
    "signalling NaN in fp32": (handmade(struct.pack("<8I", 0x7FA00000, *[0] * 7), Encoding.FP32), T.NOT_FINITE),
    "NaN in fp16": (handmade(struct.pack("<8e", *[1.0] * 7, math.nan), Encoding.FP16), T.NOT_FINITE),
    "infinity in fp16": (handmade(struct.pack("<8H", 0x7C00, *[0] * 7), Encoding.FP16), T.NOT_FINITE),
    "NaN in bf16": (handmade(struct.pack("<8H", 0x7FC1, *[0] * 7), Encoding.BF16), T.NOT_FINITE),
    "infinity in bf16": (handmade(struct.pack("<8H", 0xFF80, *[0] * 7), Encoding.BF16), T.NOT_FINITE),
    "eight bits, NaN scale": (handmade(int8((1.0, math.nan)), Encoding.INT8), T.NOT_FINITE),
    "eight bits, NaN scale of zeros": (handmade(int8((1.0, math.nan), (127, 127)), Encoding.INT8), T.NOT_FINITE),
    "eight bits, infinite scale": (handmade(int8((math.inf, 1.0)), Encoding.INT8), T.NOT_FINITE),
    "eight bits, infinite scale of zeros": (handmade(int8((math.inf, 1.0), (127, 127)), Encoding.INT8), T.NOT_FINITE),
    "eight bits, scale times level overflows": (handmade(int8((3e38, 1.0), (254, 127)), Encoding.INT8), T.NOT_FINITE),
    "four bits, NaN scale": (handmade(int4((1.0, math.nan)), Encoding.INT4), T.NOT_FINITE),
    "four bits, NaN scale of a block of zeros": (handmade(int4((math.nan, 1.0), (7, 7)), Encoding.INT4), T.NOT_FINITE),
    "four bits, infinite scale": (handmade(int4((math.inf, 1.0)), Encoding.INT4), T.NOT_FINITE),
    "four bits, infinite scale of zeros": (handmade(int4((math.inf, 1.0), (7, 7)), Encoding.INT4), T.NOT_FINITE),
    "four bits, scale times level overflows": (handmade(int4((3e38, 1.0), (14, 7)), Encoding.INT4), T.NOT_FINITE),
    "two bits, NaN scale": (handmade(int2((math.nan, 1.0)), Encoding.INT2), T.NOT_FINITE),
    "two bits, infinite scale": (handmade(int2((1.0, -math.inf)), Encoding.INT2), T.NOT_FINITE),
    "two bits, scale times level overflows": (handmade(int2((3e38, 1.0), (3, 2)), Encoding.INT2), T.NOT_FINITE),
    "two bits, sum with the reference": (handmade(int2((1e38, 1e38), (3, 3)), Encoding.INT2, BIG), T.NOT_FINITE),
    # the digest
    "four bits, negative scale": (handmade(int4((-1.0, 1.0)), Encoding.INT4), T.BAD_DIGEST),
    "four bits, the code that no sender writes": (handmade(int4((1.0, 1.0), (15, 8)), Encoding.INT4), T.BAD_DIGEST),
    "four bits, scale 0 with codes": (handmade(int4((0.0, 0.0), (14, 14)), Encoding.INT4), T.BAD_DIGEST),
    "content digest of something else": (header(content_digest=bytes(32)), T.BAD_DIGEST),
    "content digest of another adapter": (header(content_digest=REFERENCE.digest), T.BAD_DIGEST),
    "one bit of the payload flipped": (HONEST[:-1] + bytes([HONEST[-1] ^ 1]), T.BAD_DIGEST),
    "minus zero for zero": (handmade(struct.pack("<8f", *[-0.0] * 8), Encoding.FP32), T.BAD_DIGEST),
    "eight bits, negative scale": (handmade(int8((-1.0, 1.0)), Encoding.INT8), T.BAD_DIGEST),
    "eight bits, scale 0 with codes": (handmade(int8((0.0, 0.0), (254, 254)), Encoding.INT8), T.BAD_DIGEST),
    "eight bits, the code that no sender writes": (handmade(int8((1.0, 1.0), (255, 128)), Encoding.INT8), T.BAD_DIGEST),
    "encoding of version 0.1.0": (header(encoding=4), T.BAD_ENCODING),
    "another reference's difference": (
        spoil(lambda p: setattr(p.header, "reference_digest", ADAPTER.digest), reference=REFERENCE), T.BAD_DIGEST
    ),
}  # fmt: skip
HELD = {adapter.digest: adapter for adapter in (ADAPTER, OTHER, BIG)}
