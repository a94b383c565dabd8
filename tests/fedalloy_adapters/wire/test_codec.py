from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.layout import Entry, Factor, Layout
from fedalloy_adapters.wire.block_quantisation import BLOCK
from fedalloy_adapters.wire.codec import (
    NONCE_BYTES,
    CodecError,
    CodecErrorCode,
    Encoded,
    Encoding,
    decode,
    encode,
    encoding_from_proto,
    encoding_to_proto,
    payload_size,
)
from proto.fedalloy.v1 import adapter_pb2
from tests.fedalloy_adapters.samples import (
    INTEGERS,
    adapters,
    adapters_of,
    bits,
    examples,
    layout_of,
    layouts,
    random_adapter,
)

LAYOUT = layout_of(ranks={"q_proj": 2, "v_proj": 3})
ENCODINGS = list(Encoding)
LARGEST = {Encoding.FP32: None, Encoding.FP16: 65504.0, Encoding.BF16: 2.0**127} | dict.fromkeys(INTEGERS, 2.0**126)
"""Numbers up to these can be encoded; beyond them, see the tests of overflow."""
BLOCK_STEPS = {Encoding.INT8: 1 / 127, Encoding.INT4: 1 / 7, Encoding.INT2: 2 / 3}
"""Distance of two levels in units of the highest."""


def header_of(encoded: Encoded) -> adapter_pb2.AdapterHeader:
    length = int.from_bytes(encoded.blob[8:12], "little")
    return adapter_pb2.AdapterHeader.FromString(encoded.blob[12 : 12 + length])


def rows_of(adapter: Adapter) -> list[np.ndarray[tuple[int, int], np.dtype[np.float64]]]:
    """Every entry as a matrix, in float64."""
    matrices = []
    for entry, tensor in adapter.items():
        matrix = tensor.double().numpy()
        matrices.append(matrix.reshape(entry.shape[0], -1) if len(entry.shape) > 1 else matrix.reshape(1, -1))
    return matrices


def assert_blocks_within_bounds(before: np.ndarray, error: np.ndarray, encoding: Encoding) -> None:
    """A block's root mean square error is at most half a step, were its largest number the highest level."""
    for start in range(0, len(before), BLOCK):
        block = slice(start, start + BLOCK)
        # The scale is itself rounded to bfloat16, which ends at 2**-133.
        half_step = np.abs(before[block]).max() * BLOCK_STEPS[encoding] / 2
        if encoding is Encoding.INT8:  # no search: the bound is each number's
            assert (error[block] <= half_step * (1 + 2.0**-6) + 127 * 2.0**-133).all()
        assert np.sqrt(np.mean(error[block] ** 2)) <= half_step * (1 + 2.0**-6) + 7 * 2.0**-133


def assert_within_bounds(sent: Adapter, got: Adapter, encoding: Encoding) -> None:
    """Half a unit in the last place, or what a block allows."""
    for before, after in zip(rows_of(sent), rows_of(got), strict=True):
        error = np.abs(before - after)
        if encoding in BLOCK_STEPS:
            assert_blocks_within_bounds(before.reshape(-1), error.reshape(-1), encoding)
            continue
        unit, tiny = {"fp32": (0.0, 0.0), "fp16": (2.0**-11, 2.0**-25), "bf16": (2.0**-8, 2.0**-134)}[encoding]
        bound = np.abs(before) * unit + tiny
        assert (error <= bound).all(), (before, after)


@pytest.mark.parametrize("encoding", ENCODINGS)
@examples(60)
@given(st.data())
def test_round_trip(encoding: Encoding, data: st.DataObject) -> None:
    adapter = data.draw(adapters(LARGEST[encoding]))
    encoded = encode(adapter, encoding)
    decoded = decode(encoded.blob)
    assert decoded.layout == adapter.layout
    assert decoded.vector.dtype == torch.float32
    assert bits(decoded.vector) == bits(encoded.decoded.vector)
    assert decoded.digest == encoded.decoded.digest == header_of(encoded).content_digest
    assert encoded.payload_bytes == payload_size(adapter.layout, encoding) == header_of(encoded).payload_bytes
    assert_within_bounds(adapter, decoded, encoding)
    if encoding is Encoding.FP32:
        assert bits(decoded.vector) == bits(adapter.vector)
    again = encode(decoded, encoding)  # what has been through an encoding goes through it again unchanged
    if encoding in (Encoding.FP32, Encoding.FP16, Encoding.BF16):
        assert bits(again.decoded.vector) == bits(decoded.vector)


@pytest.mark.parametrize("encoding", ENCODINGS)
@examples(60)
@given(st.data())
def test_round_trip_of_differences(encoding: Encoding, data: st.DataObject) -> None:
    layout = data.draw(layouts())
    largest = 30000.0 if encoding is Encoding.FP16 else 2.0**120
    adapter, reference = data.draw(adapters_of(layout, largest)), data.draw(adapters_of(layout, largest))
    encoded = encode(adapter, encoding, reference=reference)
    decoded = decode(encoded.blob, references={reference.digest: reference})
    assert bits(decoded.vector) == bits(encoded.decoded.vector)
    assert decoded.digest == encoded.decoded.digest
    assert header_of(encoded).reference_digest == reference.digest
    difference = Adapter(layout, adapter.vector - reference.vector)
    got = Adapter(layout, decoded.vector.double() - reference.vector.double())
    for before, after, base in zip(rows_of(difference), rows_of(got), rows_of(reference), strict=True):
        # reference + d is rounded once more to binary32.
        rounding = (np.abs(base) + np.abs(before)) * 2.0**-22 + 2.0**-140
        if encoding in BLOCK_STEPS:
            error = np.maximum(np.abs(before - after) - rounding, 0).reshape(-1)
            assert_blocks_within_bounds(before.reshape(-1), error, encoding)
            continue
        relative = {Encoding.FP32: 0.0, Encoding.FP16: 2.0**-11, Encoding.BF16: 2.0**-8}[encoding]
        tiny = {Encoding.FP32: 0.0, Encoding.FP16: 2.0**-25, Encoding.BF16: 2.0**-134}[encoding]
        assert (np.abs(before - after) <= np.abs(before) * relative + tiny + rounding).all()


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_difference_from_itself_is_exact(encoding: Encoding) -> None:
    adapter = random_adapter(LAYOUT, 0)
    encoded = encode(adapter, encoding, reference=adapter)
    assert bits(encoded.decoded.vector) == bits(adapter.vector)
    assert not any(encoded.blob[-encoded.payload_bytes :])


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_blobs_of_one_adapter_differ_and_decode_alike(encoding: Encoding) -> None:
    adapter = random_adapter(LAYOUT, 0)
    first, second = encode(adapter, encoding), encode(adapter, encoding)
    assert first.blob != second.blob
    assert len(first.blob) == len(second.blob)
    assert len(header_of(first).nonce) == NONCE_BYTES == 16
    assert bits(decode(first.blob).vector) == bits(decode(second.blob).vector)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_layout_may_be_left_out_where_it_is_known(encoding: Encoding) -> None:
    adapter = random_adapter(LAYOUT, 0)
    short, full = encode(adapter, encoding, include_layout=False), encode(adapter, encoding)
    assert len(short.blob) < len(full.blob) - 50
    for options in ({"layouts": {LAYOUT.digest: LAYOUT}}, {"expected": LAYOUT}):
        assert decode(short.blob, **options).digest == decode(full.blob).digest
    with pytest.raises(CodecError) as caught:
        decode(short.blob, layouts={layout_of().digest: layout_of()})
    assert caught.value.code is CodecErrorCode.UNKNOWN_LAYOUT


def test_expected_layout_refuses_others_and_names_the_difference() -> None:
    for include in (True, False):
        blob = encode(random_adapter(LAYOUT, 0), include_layout=include).blob
        with pytest.raises(CodecError, match="rank 3 for 'v_proj', expected 2") as caught:
            decode(blob, expected=layout_of(), layouts={LAYOUT.digest: LAYOUT})
        assert caught.value.code is CodecErrorCode.BAD_LAYOUT


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_blob_may_be_any_bytes(kind: Any) -> None:
    adapter = random_adapter(LAYOUT, 0)
    assert decode(kind(encode(adapter, Encoding.INT8).blob)).digest == encode(adapter, Encoding.INT8).decoded.digest


def test_decoded_adapter_does_not_depend_on_the_blob() -> None:
    blob: Any = bytearray(encode(random_adapter(LAYOUT, 0)).blob)
    decoded = decode(blob)
    before = bits(decoded.vector)
    blob[-8:] = b"\xff" * 8
    assert bits(decoded.vector) == before
    decoded.vector.add_(1)  # writable


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_arguments_are_left_alone(encoding: Encoding) -> None:
    adapter, reference = random_adapter(LAYOUT, 0), random_adapter(LAYOUT, 1)
    before = bits(adapter.vector), bits(reference.vector)
    encoded = encode(adapter, encoding, reference=reference)
    decode(encoded.blob, references={reference.digest: reference}).vector.zero_()
    encoded.decoded.vector.zero_()
    assert (bits(adapter.vector), bits(reference.vector)) == before


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_trainable_and_double_adapters_can_be_sent(encoding: Encoding) -> None:
    adapter = random_adapter(LAYOUT, 0)
    expected = encode(adapter, encoding).decoded.digest
    assert encode(adapter.to(torch.float64), encoding).decoded.digest == expected
    assert encode(Adapter(LAYOUT, adapter.vector.clone().requires_grad_()), encoding).decoded.digest == expected


def test_int8_payload_is_that_of_the_specification() -> None:
    entries = (Entry("m", Factor.WEIGHT, (2, 3)), Entry("m", Factor.BIAS, (2,)), Entry("n", Factor.BIAS, (2,)))
    layout = Layout(entries, {}, "base")
    adapter = Adapter(layout, torch.tensor([127.0, -63.5, 0.5, 0.0, 0.0, -0.0, 254.0, -3.0, 0.0, -0.0]))
    payload = encode(adapter, Encoding.INT8).blob[-payload_size(layout, Encoding.INT8) :]
    # The upper 16 bits of the scales 1 and 2 are 0x3f80 and 0x4000; a block of zeros has scale 0 and codes 0. Ties go
    # to even codes: -63.5 + 127 -> 64, 0.5 + 127 -> 128, -1.5 + 127 -> 126.
    first, second = struct.pack("<H6B", 0x3F80, 254, 64, 128, 127, 127, 127), struct.pack("<H2B", 0x4000, 254, 126)
    assert payload == first + second + struct.pack("<H2B", 0, 0, 0)


@pytest.mark.parametrize("encoding", INTEGERS)
@pytest.mark.parametrize("size", [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5])
@pytest.mark.parametrize("scale", [2.0**-140, 1e-3, 1e30])
def test_blocks_of_any_number_of_numbers_are_within_bounds(encoding: Encoding, size: int, scale: float) -> None:
    layout = Layout((Entry("m", Factor.WEIGHT, (size,)), Entry("n", Factor.WEIGHT, (3,))), {}, "base")
    adapter = random_adapter(layout, 5, scale=scale)
    encoded = encode(adapter, encoding)
    decoded = decode(encoded.blob)
    assert bits(decoded.vector) == bits(encoded.decoded.vector)
    assert_within_bounds(adapter, decoded, encoding)


@pytest.mark.parametrize("encoding", [Encoding.INT8, Encoding.INT4])
def test_blocks_and_entries_do_not_disturb_each_other(encoding: Encoding) -> None:
    layout = Layout((Entry("q", Factor.B, (33, 4)), Entry("q", Factor.A, (4, 1))), {"q": 1.0}, "base")
    sizes = torch.tensor([1e-6] * BLOCK + [1e6] * BLOCK + [1e-3] * 4 + [1.0] * 4)
    adapter = Adapter(layout, sizes * torch.tensor([1.0, -1.0] * 68))
    assert torch.allclose(encode(adapter, encoding).decoded.vector, adapter.vector, rtol=0.01)


def test_fp16_and_bf16_keep_subnormals_and_round_to_even() -> None:
    layout = Layout((Entry("m", Factor.BIAS, (3,)),), {}, "base")
    half = encode(Adapter(layout, torch.tensor([2.0**-24, 1 + 2.0**-11, 1 + 3 * 2.0**-11])), Encoding.FP16)
    assert decode(half.blob).vector.tolist() == [2.0**-24, 1.0, 1 + 2.0**-9]
    brief = encode(Adapter(layout, torch.tensor([2.0**-133, 1 + 2.0**-8, 1 + 3 * 2.0**-8])), Encoding.BF16)
    assert decode(brief.blob).vector.tolist() == [2.0**-133, 1.0, 1 + 2.0**-6]


OVERFLOWS = [
    *[(encoding, number) for encoding in ENCODINGS for number in (math.nan, math.inf, -math.inf)],
    (Encoding.FP16, 65520.0),
    (Encoding.FP16, -1e30),
    (Encoding.BF16, 3.4e38),
]


@pytest.mark.parametrize(("encoding", "number"), OVERFLOWS)
def test_what_cannot_be_encoded_is_refused(encoding: Encoding, number: float) -> None:
    adapter = random_adapter(LAYOUT, 0)
    adapter.vector[5] = number
    with pytest.raises(CodecError) as caught:
        encode(adapter, encoding)
    assert caught.value.code is CodecErrorCode.NOT_FINITE


def test_doubles_and_differences_that_overflow_binary32_are_refused() -> None:
    layout = Layout((Entry("m", Factor.BIAS, (1,)),), {}, "base")
    big = Adapter(layout, torch.tensor([3e38]))
    for adapter, reference in (
        (Adapter(layout, torch.tensor([1e39], dtype=torch.float64)), None),
        (big, Adapter(layout, -big.vector)),
        (Adapter(layout, torch.tensor([1.0])), Adapter(layout, torch.tensor([math.inf]))),
        (Adapter(layout, torch.tensor([math.inf])), Adapter(layout, torch.tensor([math.inf]))),
    ):
        with pytest.raises(CodecError) as caught:
            encode(adapter, reference=reference)
        assert caught.value.code is CodecErrorCode.NOT_FINITE


def test_the_largest_numbers_encode_or_are_refused_but_never_decode_to_infinity() -> None:
    layout = Layout((Entry("m", Factor.BIAS, (1,)),), {}, "base")
    number = torch.finfo(torch.float32).max
    for encoding in ENCODINGS:
        for step in range(300):
            adapter = Adapter(layout, torch.tensor([number * (1 - step * 2.0**-24)]))
            try:
                encoded = encode(adapter, encoding)
            except CodecError as error:
                if error.code is not CodecErrorCode.NOT_FINITE:
                    raise
            else:
                assert decode(encoded.blob).is_finite


def test_reference_of_another_layout_is_refused_by_the_sender() -> None:
    with pytest.raises(CodecError, match="rank 2 for 'v_proj', expected 3") as caught:
        encode(random_adapter(LAYOUT, 0), reference=random_adapter(layout_of(), 0))
    assert caught.value.code is CodecErrorCode.BAD_LAYOUT


@pytest.mark.parametrize(
    ("encoding", "size"),
    [
        ("fp32", 8 * 4),
        ("fp16", 8 * 2),
        ("bf16", 8 * 2),
        ("int8", 2 * 2 + 6 + 2),
        ("int4", 2 * 2 + 3 + 1),
        ("int2", 2 * 2 + 2 + 1),
    ],
)
def test_payload_size(encoding: str, size: int) -> None:
    layout = Layout((Entry("m", Factor.WEIGHT, (2, 1, 3)), Entry("m", Factor.BIAS, (2,))), {}, "base")
    assert payload_size(layout, Encoding(encoding)) == size
    assert encode(Adapter.zeros(layout), Encoding(encoding)).payload_bytes == size


def test_encodings_have_wire_numbers_and_others_are_refused() -> None:
    assert [encoding_from_proto(encoding_to_proto(encoding)) for encoding in Encoding] == list(Encoding)
    assert [encoding.is_lossy for encoding in Encoding] == [False, True, True, True, True, True]
    for number in (0, 4, 8, -1):
        with pytest.raises(CodecError) as caught:
            encoding_from_proto(number)
        assert caught.value.code is CodecErrorCode.BAD_ENCODING


@pytest.mark.parametrize("encoding", INTEGERS)
@pytest.mark.parametrize("power", [-7, 5])
def test_balancing_the_factors_changes_nothing(encoding: Encoding, power: int) -> None:
    """A / c and c B with c a power of two decode to the same product, to the bit: scales are of blocks."""
    adapter = random_adapter(layout_of(), 3)
    balanced = adapter.clone()
    for entry in adapter.layout.entries:
        sign = {Factor.A: -1, Factor.B: 1}.get(entry.factor, 0)
        balanced.vector[adapter.layout.slice_of(entry.name)] *= 2.0 ** (sign * power)
    plain, other = encode(adapter, encoding).decoded, encode(balanced, encoding).decoded
    for entry in adapter.layout.entries:
        sign = {Factor.A: -1, Factor.B: 1}.get(entry.factor, 0)
        place = adapter.layout.slice_of(entry.name)
        assert bits(other.vector[place] * 2.0 ** (-sign * power)) == bits(plain.vector[place])
