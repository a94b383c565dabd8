from __future__ import annotations

from typing import Any

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from google.protobuf.message import Message

from fedalloy_adapters.wire.codec import decode, encode
from fedalloy_adapters.wire.flower_records import (
    ARRAY_RECORD,
    ARRAY_STYPE,
    BESIDE,
    CONFIG_RECORD,
    COUNTERS_TYPE,
    MAX_BESIDE_BYTES,
    PLAN_TYPE,
    REGISTER_TYPE,
    RecordError,
    pack,
    unpack,
)
from proto.fedalloy.v1 import plan_pb2, report_pb2
from tests.fedalloy_adapters.samples import layout_of, random_adapter

PLAN = plan_pb2.Plan(version=1, run_name="run", client_id="berlin", round=3)


def over_the_wire(records: RecordDict) -> RecordDict:
    """As Flower sends it."""
    return recorddict_from_proto(recorddict_to_proto(records))


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("plan", PLAN),
        ("report", report_pb2.Report(version=1, client_id="berlin", round=3)),
        ("registration", report_pb2.Registration(version=1, client_id="berlin", layout=layout_of().to_proto())),
        ("counters", report_pb2.Counters(version=1, client_id="berlin")),
    ],
)
def test_messages_and_adapters_survive_flower(key: str, message: Message) -> None:
    adapters = {slot: random_adapter(layout_of(), seed) for seed, slot in enumerate(("global", "local"))}
    blobs = {slot: encode(adapter).blob for slot, adapter in adapters.items()}
    found, arrays = unpack(over_the_wire(pack(key, message, blobs)), key, type(message))
    assert found == message
    assert arrays == blobs
    assert {slot: decode(blob).digest for slot, blob in arrays.items()} == {s: a.digest for s, a in adapters.items()}


def test_small_adapters_lie_beside_the_message_in_half_as_many_pieces() -> None:
    blobs = {"global": b"\x00\xff\x80", "local": b""}
    records = pack("plan", PLAN, blobs, beside=True)
    assert list(records) == ["fedalloy"]
    assert unpack(over_the_wire(records), "plan", plan_pb2.Plan) == (PLAN, blobs)
    pieces = [len(get_all_nested_objects(pack("plan", PLAN, {"global": b"1"}, beside=side))) for side in (True, False)]
    assert pieces == [2, 5]  # and the message itself


def test_large_adapters_are_arrays_whoever_reads_what() -> None:
    records = pack("plan", PLAN, {"a": bytes(MAX_BESIDE_BYTES), "b": b"1"}, beside=True)
    assert list(records) == ["fedalloy", "adapters"]


@pytest.mark.parametrize(
    ("value", "reason"),
    [("text", "found str"), (bytes(MAX_BESIDE_BYTES + 1), "expected arrays"), (b"2", "occurs twice")],
)
def test_adapters_beside_the_message_that_are_refused(value: Any, reason: str) -> None:
    records = pack("plan", PLAN, {"global": b"1"})
    records.config_records[CONFIG_RECORD][f"{BESIDE}global"] = value
    with pytest.raises(RecordError, match=reason):
        unpack(records, "plan", plan_pb2.Plan)


def test_form_is_that_of_the_specification() -> None:
    records = pack("plan", PLAN, {"global": b"\x00\xff\x80"})
    assert dict(records.config_records[CONFIG_RECORD]) == {"plan": PLAN.SerializeToString()}
    assert list(records) == ["fedalloy", "adapters"]
    array = records.array_records["adapters"]["global"]
    assert (array.dtype, tuple(array.shape), array.stype, array.data) == (
        "uint8", (3,), "fedalloy.adapter.v1", b"\x00\xff\x80"
    )  # fmt: skip
    assert (PLAN_TYPE, REGISTER_TYPE, COUNTERS_TYPE) == ("train.plan", "query.register", "query.counters")


@pytest.mark.parametrize("blobs", [None, {}])
def test_without_adapters_there_is_no_array_record(blobs: dict[str, bytes] | None) -> None:
    records = over_the_wire(pack("plan", PLAN, blobs))
    assert list(records) == ["fedalloy"]
    assert unpack(records, "plan", plan_pb2.Plan) == (PLAN, {})
    records[ARRAY_RECORD] = ArrayRecord()
    assert unpack(records, "plan", plan_pb2.Plan) == (PLAN, {})


def test_other_records_and_keys_are_ignored() -> None:
    records = pack("plan", PLAN, {"global": b"abc"})
    records.config_records[CONFIG_RECORD]["later"] = 1
    records["metrics"] = ConfigRecord({"plan": b"not this one"})
    records["other arrays"] = ArrayRecord(
        {"x": Array(dtype="float32", shape=(1,), stype="numpy.ndarray", data=b"1234")}
    )
    assert unpack(over_the_wire(records), "plan", plan_pb2.Plan) == (PLAN, {"global": b"abc"})


def with_array(**fields: object) -> RecordDict:
    records = pack("plan", PLAN)
    settings: dict[str, Any] = {"dtype": "uint8", "shape": (3,), "stype": ARRAY_STYPE, "data": b"abc"} | fields
    records[ARRAY_RECORD] = ArrayRecord({"global": Array(**settings)})
    return records


def with_config(value: object) -> RecordDict:
    return RecordDict({CONFIG_RECORD: ConfigRecord({"plan": value})})  # type: ignore[dict-item]


REFUSED: dict[str, tuple[RecordDict, str]] = {
    "nothing": (RecordDict(), "expected bytes 'plan' in the config record 'fedalloy', found NoneType"),
    "another record": (RecordDict({"other": ConfigRecord({"plan": b""})}), "found NoneType"),
    "arrays in its place": (RecordDict({CONFIG_RECORD: ArrayRecord()}), "found NoneType"),
    "another key": (pack("report", PLAN), "found NoneType"),
    "text": (with_config("plan"), "found str"),
    "a number": (with_config(3), "found int"),
    "a list of bytes": (with_config([b"a"]), "found list"),
    "bytes that are no message": (with_config(b"\xff\xff\xff"), "'plan' is not a Plan"),
    "text that is not UTF-8": (with_config(b"\x08\x01\x12\x01\xff"), "'plan' is not a Plan"),
    "a message cut short": (with_config(PLAN.SerializeToString()[:-3]), "'plan' is not a Plan"),
    "no version": (with_config(b""), "Plan has version 0, expected 1"),
    "a later version": (pack("plan", plan_pb2.Plan(version=2)), "Plan has version 2, expected 1"),
    "stype of NumPy": (with_array(stype="numpy.ndarray"), "array 'global' has stype 'numpy.ndarray'"),
    "a later stype": (with_array(stype="fedalloy.adapter.v2"), "'fedalloy.adapter.v2', expected 'fedalloy.adapter.v1'"),
    "float32": (with_array(dtype="float32"), "array 'global' is float32"),
    "a shape too small": (with_array(shape=(2,)), r"shape (2,), expected uint8 of shape (3,)"),
    "a shape too large": (with_array(shape=(2**31 - 1,)), "shape (2147483647,)"),
    "a matrix": (with_array(shape=(1, 3)), "shape (1, 3)"),
    "no shape": (with_array(shape=()), "shape ()"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_of_the_form_is_refused_by_name(case: str) -> None:
    records, text = REFUSED[case]
    with pytest.raises(RecordError) as caught:
        unpack(over_the_wire(records), "plan", plan_pb2.Plan)
    assert text in str(caught.value)
