"""Blobs that no honest sender makes: each must end in the right error, and without allocating what it claims."""

from __future__ import annotations

import contextlib
import math
import os
import struct
import tracemalloc
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedalloy_adapters.layout import Layout, LayoutError
from fedalloy_adapters.wire.codec import (
    CodecError,
    CodecErrorCode,
    Encoding,
    decode,
    encode,
)
from proto.fedalloy.v1 import adapter_pb2
from tests.fedalloy_adapters.samples import bits, examples
from tests.fedalloy_adapters.wire.hostile_blobs import (
    ADAPTER,
    HEAD_LENGTH,
    HELD,
    HONEST,
    HOSTILE,
    LAYOUT,
    OTHER,
    REFERENCE,
    Parts,
    T,
    assemble,
)


def test_the_honest_blob_is_accepted() -> None:
    assert bits(decode(HONEST, references=HELD).vector) == bits(ADAPTER.vector)
    assert len(HOSTILE) >= 100
    assert {code for _, code in HOSTILE.values()} == set(CodecErrorCode)


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_blob_ends_in_its_error(case: str) -> None:
    blob, code = HOSTILE[case]
    with pytest.raises(CodecError) as caught:
        decode(blob, references=HELD)
    assert caught.value.code is code, str(caught.value)
    assert str(caught.value).startswith(f"{code.value}: ")
    assert len(str(caught.value)) < 1500, "a stranger decides how long our log lines are"
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize("encoding", list(Encoding))
def test_a_blob_cut_anywhere_is_an_error(encoding: Encoding) -> None:
    blob = encode(ADAPTER, encoding).blob
    length = int.from_bytes(blob[8:12], "little")
    for end in range(len(blob)):
        with pytest.raises(CodecError) as caught:
            decode(blob[:end])
        assert caught.value.code is (CodecErrorCode.TRUNCATED if end < 12 + length else CodecErrorCode.BAD_LENGTH)


def test_longer_blobs_than_asked_for_are_refused_before_anything_else() -> None:
    decode(HONEST, max_bytes=len(HONEST))
    for blob in (HONEST, bytes(len(HONEST))):
        with pytest.raises(CodecError) as caught:
            decode(blob, max_bytes=len(HONEST) - 1)
        assert caught.value.code is CodecErrorCode.TOO_LARGE


def test_checks_come_in_the_order_of_the_specification() -> None:
    """Everything is wrong; each repair uncovers the next error of the table in proto/README.md."""
    parts = Parts(reference=REFERENCE)
    good, payload = adapter_pb2.AdapterHeader.FromString(parts.header.SerializeToString()), parts.payload
    head = parts.header
    head.version, head.nonce, head.encoding, head.payload_bytes = 9, b"", adapter_pb2.ENCODING_UNSPECIFIED, 1
    head.layout_digest, head.content_digest = bytes(32), bytes(32)
    payload = struct.pack(f"<{LAYOUT.size}f", *[math.nan] * LAYOUT.size)
    expected, references = OTHER.layout, dict(HELD)
    found = []

    def attempt() -> None:
        with pytest.raises(CodecError) as caught:
            decode(assemble(head, payload), expected=expected, references=references)
        found.append(caught.value.code)

    attempt()
    head.version = 1
    attempt()
    head.nonce = good.nonce
    attempt()
    head.layout_digest = good.layout_digest
    attempt()
    expected = LAYOUT
    attempt()
    head.encoding = good.encoding
    attempt()
    head.payload_bytes = good.payload_bytes
    attempt()
    references[REFERENCE.digest] = OTHER
    attempt()
    references[REFERENCE.digest] = REFERENCE
    attempt()
    payload = parts.payload
    attempt()
    head.content_digest = good.content_digest
    assert decode(assemble(head, payload), expected=expected, references=references).is_finite
    assert found == [
        T.BAD_VERSION,
        T.BAD_HEADER,
        T.BAD_LAYOUT,
        T.BAD_LAYOUT,
        T.BAD_ENCODING,
        T.BAD_LENGTH,
        T.UNKNOWN_REFERENCE,
        T.BAD_LAYOUT,
        T.NOT_FINITE,
        T.BAD_DIGEST,
    ]


def test_unknown_fields_of_a_header_are_ignored() -> None:
    """A later minor revision may add fields."""
    parts = Parts()
    head = parts.header.SerializeToString() + b"\xfa\x01\x03new"  # field 31, length 3
    assert decode(assemble(head, parts.payload)).digest == ADAPTER.digest


def peak_of(action: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def resident_peak() -> int:
    """Highest resident size of this process in bytes, which also sees what PyTorch allocates."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


BIG_CLAIMS = [case for case in HOSTILE if case.startswith("claims") or case.startswith("header claims")]


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's /proc")
def test_claims_allocate_nearly_nothing() -> None:
    def attempt() -> None:
        for case in BIG_CLAIMS:
            blob, code = HOSTILE[case]
            with pytest.raises(CodecError) as caught:
                decode(blob)
            assert caught.value.code is code

    attempt()  # imports, caches
    before = resident_peak()
    assert len(HOSTILE["claims 10^12 numbers"][0]) < 250
    assert peak_of(attempt) < 200_000
    assert resident_peak() - before < 2**20


def test_memory_of_a_long_header_is_a_small_multiple_of_the_blob() -> None:
    """The dearest layout per byte: as many tensors as fit, with the shortest names."""
    count = 20_000
    message = adapter_pb2.Layout(base_fingerprint="b")
    for number in range(count):
        message.entries.add(module=format(number, "x"), factor=adapter_pb2.FACTOR_BIAS, shape=[1])
    digest = Layout.from_proto(message).digest
    head = adapter_pb2.AdapterHeader(
        version=1, nonce=bytes(16), encoding=adapter_pb2.ENCODING_FP32, layout_digest=digest, layout=message,
        content_digest=bytes(32), payload_bytes=0,
    )  # fmt: skip
    blob = assemble(head, b"")
    del message, head

    def attempt() -> None:
        with pytest.raises(CodecError) as caught:
            decode(blob)
        assert caught.value.code is CodecErrorCode.BAD_LENGTH

    assert peak_of(attempt) < 100 * len(blob)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """An honest blob with bytes flipped, inserted, deleted or repeated; mostly in the header, where it hurts."""
    encoding = draw(st.sampled_from(list(Encoding)))
    reference = draw(st.sampled_from([None, REFERENCE]))
    blob = bytearray(Parts(encoding, reference=reference, include_layout=draw(st.booleans())).blob)
    for _ in range(draw(st.integers(1, 4))):
        header_end = min(len(blob), 12 + HEAD_LENGTH)
        position = draw(st.one_of(st.integers(0, max(header_end - 1, 0)), st.integers(0, max(len(blob) - 1, 0))))
        match draw(st.sampled_from(["flip", "set", "insert", "delete", "repeat"])):
            case "flip" if blob:
                blob[position] ^= 1 << draw(st.integers(0, 7))
            case "set" if blob:
                blob[position] = draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]))
            case "insert":
                blob[position:position] = draw(st.binary(min_size=1, max_size=12))
            case "delete":
                del blob[position : position + draw(st.integers(1, 12))]
            case "repeat":
                blob[position:position] = blob[position : position + draw(st.integers(1, 40))]
    if draw(st.booleans()) and len(blob) >= 12:  # keep the header's length right, to get further in
        blob[8:12] = struct.pack("<I", max(0, HEAD_LENGTH + len(blob) - len(HONEST)) % 2**32)
    return bytes(blob)


@examples(500)
@given(damaged())
def test_damaged_blobs_decode_equal_or_end_in_a_codec_error(blob: bytes) -> None:
    known = {LAYOUT.digest: LAYOUT}
    try:
        decoded = decode(blob, layouts=known, references={REFERENCE.digest: REFERENCE})
    except CodecError:
        return
    # A nonce, an unknown field, or a header field said twice may change and nothing is lost.
    assert decoded.layout.digest == LAYOUT.digest
    possible = {encode(ADAPTER, e, reference=r).decoded.digest for e in Encoding for r in (None, REFERENCE)}
    assert decoded.digest in possible


@examples(300)
@given(st.binary(max_size=300))
def test_any_bytes_as_header_end_in_a_codec_error(head: bytes) -> None:
    with pytest.raises(CodecError):
        decode(assemble(head, b""))


@examples(200)
@given(st.data())
def test_headers_of_the_right_form_with_any_values_end_in_a_codec_error(data: st.DataObject) -> None:
    """Protocol Buffers parses these, so the codec's own checks have to refuse them."""
    numbers = st.one_of(st.integers(0, 6), st.integers(0, 2**32 - 1))
    text = st.text(max_size=6)
    message = adapter_pb2.Layout(base_fingerprint=data.draw(text))
    for _ in range(data.draw(st.integers(0, 3))):
        message.entries.add(
            module=data.draw(text), factor=data.draw(st.integers(-1, 6)), shape=data.draw(st.lists(numbers, max_size=9))
        )
    for _ in range(data.draw(st.integers(0, 2))):
        message.scalings.add(module=data.draw(text), scaling=data.draw(st.floats()))
    digests = st.one_of(st.just(bytes(32)), st.binary(max_size=33))
    head = adapter_pb2.AdapterHeader(
        version=data.draw(st.sampled_from([1, 1, 1, 0, 2])),
        nonce=data.draw(st.one_of(st.just(bytes(16)), st.binary(max_size=17))),
        encoding=data.draw(st.integers(-1, 8)),  # type: ignore[arg-type]
        layout_digest=data.draw(digests),
        content_digest=data.draw(digests),
        reference_digest=data.draw(st.one_of(st.just(b""), digests)),
        payload_bytes=data.draw(st.integers(0, 2**64 - 1)),
        layout=message if data.draw(st.booleans()) else None,
    )
    if data.draw(st.booleans()):
        with contextlib.suppress(LayoutError):
            head.layout_digest = Layout.from_proto(message).digest
    with pytest.raises(CodecError):
        decode(assemble(head, data.draw(st.binary(max_size=64))), layouts={bytes(32): LAYOUT})
