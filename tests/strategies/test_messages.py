"""Plans out, answers in: honest answers arrive exactly, and no answer does worse than BadAnswerError."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict

from adapters.adapter import Adapter
from adapters.codec import MAGIC, MAX_BLOB_BYTES, Encoding, decode, encode, payload_size
from adapters.layout import Entry, Factor, Layout
from adapters.records import (
    ARRAY_DTYPE,
    ARRAY_RECORD,
    ARRAY_STYPE,
    CONFIG_RECORD,
    COUNTERS_TYPE,
    PLAN_TYPE,
    REGISTER_TYPE,
    pack,
    unpack,
)
from proto.fedalloy.v1 import adapter_pb2, plan_pb2, report_pb2
from strategies import steps
from strategies.base import answer_from, client_from
from strategies.messages import (
    BadAnswerError,
    Dispatch,
    counters_message,
    plan_dispatch,
    read_answer,
    read_counters,
    read_registration,
    register_message,
)
from strategies.steps import Training
from tests.strategies.conftest import FakeNode, error_from_the_superlink, layout_of, random_adapter

NAME, NODE = "berlin", 12345
LAYOUT = layout_of(rank=8)
PART = LAYOUT.select([Factor.B])
Blobs = dict[str, bytes]


def dispatch_of(uplink: str = "fp32", downlink: str = "fp32") -> Dispatch:
    """A round with two uploads: slot "global" whole, and the B of slot "extra" as int8 differences."""
    training, mix = Training(uplink_encoding=uplink), steps.mixture("global")
    return plan_dispatch(
        [
            steps.evaluate(training, mix),
            steps.train(training, mix, ["global"]),
            steps.send(training, "global"),
            steps.send(Training(uplink_encoding="int8"), "extra", factors=[Factor.B]),
        ],
        {"global": random_adapter(LAYOUT, 1), "extra": random_adapter(LAYOUT, 2)},
        client_id=NAME,
        layout=LAYOUT,
        round_=3,
        seed=4,
        run_name="run",
        encoding=downlink,
    )


def asked(dispatch: Dispatch) -> Message:
    message = dispatch.message(NODE, ttl=60)
    message.metadata.__dict__["_message_id"] = "message-1"
    return message


def honest(dispatch: Dispatch) -> tuple[report_pb2.Report, Blobs, FakeNode]:
    """What a client answers that follows the specification."""
    plan, blobs = unpack(asked(dispatch).content, "plan", plan_pb2.Plan)
    node = FakeNode(NAME, LAYOUT)
    report, uploads = node.run(plan, blobs)
    return report, uploads, node


def reply_with(dispatch: Dispatch, report: report_pb2.Report, blobs: Blobs) -> Message:
    return Message(pack("report", report, blobs), reply_to=asked(dispatch))


# ------------------------------------------------------------------------------------------------------ honest answers


@pytest.mark.parametrize("downlink", list(Encoding))
@pytest.mark.parametrize("uplink", list(Encoding))
def test_an_honest_answer_arrives_to_the_bit(uplink: Encoding, downlink: Encoding) -> None:
    dispatch = dispatch_of(uplink, downlink)
    report, blobs, node = honest(dispatch)
    found, adapters = read_answer(dispatch, reply_with(dispatch, report, blobs))
    assert found == report
    assert set(adapters) == {"global", "extra"}
    assert adapters["global"].layout.digest == LAYOUT.digest
    assert adapters["extra"].layout.digest == PART.digest
    digests = {result.send.slot: result.send.content_digest for result in report.results if result.HasField("send")}
    assert {slot: adapter.digest for slot, adapter in adapters.items()} == digests
    assert adapters["extra"].digest == dispatch.received["extra"].select([Factor.B]).digest  # was not trained
    if uplink is Encoding.FP32:
        assert torch.equal(adapters["global"].vector, node.slots["global"].vector)
    else:
        difference = adapters["global"].vector - node.slots["global"].vector
        assert 0 < float(difference.abs().max()) < 0.05
    answer = answer_from(dispatch, reply_with(dispatch, report, blobs))
    assert answer.examples == 10
    assert answer.received == dispatch.received
    assert dict(answer.metrics["personal"]) == dict(report.results[0].evaluate.metrics)


@pytest.mark.parametrize("downlink", list(Encoding))
def test_received_is_what_the_client_decodes_and_not_what_was_meant(downlink: Encoding) -> None:
    dispatch = dispatch_of(downlink=downlink)
    _, blobs = unpack(dispatch.content, "plan", plan_pb2.Plan)
    for slot, seed in (("global", 1), ("extra", 2)):
        decoded = decode(blobs[slot], expected=LAYOUT)
        assert decoded.digest == dispatch.received[slot].digest
        same = torch.equal(decoded.vector, random_adapter(LAYOUT, seed).vector)
        assert same == (downlink is Encoding.FP32)
        assert dispatch.tensor_bytes[slot] == payload_size(LAYOUT, downlink) < len(blobs[slot])


def test_a_plan_is_a_flower_message_of_its_own_kind() -> None:
    dispatch = dispatch_of()
    message = dispatch.message(NODE, ttl=60)
    assert message.metadata.message_type == PLAN_TYPE
    assert message.metadata.dst_node_id == NODE
    assert message.metadata.group_id == "3"
    assert message.metadata.ttl == 60
    plan, blobs = unpack(message.content, "plan", plan_pb2.Plan)
    assert plan == dispatch.plan
    assert (plan.version, plan.client_id, plan.run_name, plan.round, plan.seed) == (1, NAME, "run", 3, 4)
    assert set(blobs) == {"global", "extra"}
    assert register_message(NODE, 5).metadata.message_type == REGISTER_TYPE
    assert counters_message(NODE, 5).metadata.message_type == COUNTERS_TYPE


def test_layouts_that_the_client_knows_are_left_out() -> None:
    def with_layout(step_factors: list[Factor], sent: Layout) -> bool:
        dispatch = plan_dispatch(
            [steps.send(Training(), "s", factors=step_factors)],
            {"s": Adapter.zeros(sent)},
            client_id=NAME, layout=LAYOUT, round_=1, seed=0, run_name="run",
        )  # fmt: skip
        blob = dispatch.content.array_records[ARRAY_RECORD]["s"].data
        length = int.from_bytes(blob[8:12], "little")
        return adapter_pb2.AdapterHeader.FromString(blob[12 : 12 + length]).HasField("layout")

    assert not with_layout([], LAYOUT)
    assert not with_layout([Factor.B], PART)
    assert with_layout([], PART)
    assert with_layout([Factor.A], PART)
    assert with_layout([], layout_of(rank=16))


# ----------------------------------------------------------------------------------------------------- hostile answers


class Hostile:
    """An honest answer to be spoilt; what is left in it is sent."""

    def __init__(self) -> None:
        self.dispatch = dispatch_of()
        self.message = asked(self.dispatch)
        self.report, self.blobs, _ = honest(self.dispatch)

    @property
    def evaluate(self) -> report_pb2.EvaluateResult:
        return self.report.results[0].evaluate

    @property
    def train(self) -> report_pb2.TrainResult:
        return self.report.results[1].train

    def reply(self) -> Message:
        return Message(pack("report", self.report, self.blobs), reply_to=self.message)

    def content(self, records: dict[str, Any]) -> Message:
        return Message(RecordDict(records), reply_to=self.message)

    def raw_report(self, value: Any, key: str = "report") -> Message:
        packed = pack("report", self.report, self.blobs)
        return self.content({CONFIG_RECORD: ConfigRecord({key: value}), ARRAY_RECORD: packed[ARRAY_RECORD]})

    def array(self, data: bytes, dtype: str = ARRAY_DTYPE, stype: str = ARRAY_STYPE, shape: Any = None) -> Message:
        """Slot "global" as this array."""
        array = Array(dtype=dtype, shape=(len(data),) if shape is None else shape, stype=stype, data=data)
        records = pack("report", self.report, self.blobs)
        records.array_records[ARRAY_RECORD]["global"] = array
        return Message(records, reply_to=self.message)

    def encoded(self, slot: str, adapter: Adapter, **options: Any) -> Message:
        self.blobs[slot] = encode(adapter, **options).blob
        return self.reply()

    def header(self, slot: str = "global", **fields: Any) -> Message:
        """Other header fields around the same payload."""
        blob = self.blobs[slot]
        length = int.from_bytes(blob[8:12], "little")
        header = adapter_pb2.AdapterHeader.FromString(blob[12 : 12 + length])
        for name, value in fields.items():
            if name == "layout":
                header.layout.CopyFrom(value)
            else:
                setattr(header, name, value)
        head = header.SerializeToString()
        self.blobs[slot] = MAGIC + len(head).to_bytes(4, "little") + head + blob[12 + length :]
        return self.reply()

    def payload(self, slot: str, position: int, value: bytes) -> Message:
        """The payload patched at one position (negative: from its end); digests left as they are."""
        blob = bytearray(self.blobs[slot])
        start = 12 + int.from_bytes(blob[8:12], "little") + position if position >= 0 else len(blob) + position
        blob[start : start + len(value)] = value
        self.blobs[slot] = bytes(blob)
        return self.reply()


def spoil(change: Callable[[Hostile], Any]) -> Callable[[Hostile], Message]:
    def act(hostile: Hostile) -> Message:
        change(hostile)
        return hostile.reply()

    return act


def put(name: str, value: Any, where: str = "report") -> Callable[[Hostile], Message]:
    return spoil(lambda hostile: setattr(getattr(hostile, where), name, value))


def metric(name: str, value: float) -> Callable[[Hostile], Message]:
    return spoil(lambda hostile: hostile.evaluate.metrics.__setitem__(name, value))


def results(change: Callable[[list[report_pb2.StepResult]], list[report_pb2.StepResult]]) -> Callable[[Hostile], Message]:
    def act(hostile: Hostile) -> Message:
        changed = change(list(hostile.report.results))
        del hostile.report.results[:]
        hostile.report.results.extend(changed)
        return hostile.reply()

    return act


def blobs(change: Callable[[Blobs], Any]) -> Callable[[Hostile], Message]:
    return spoil(lambda hostile: change(hostile.blobs))


def reordered(layout: Layout) -> Layout:
    return Layout(layout.entries[::-1], layout.scalings, layout.base_fingerprint)


def claims(**changes: Any) -> adapter_pb2.Layout:
    """LAYOUT's message with one entry changed."""
    message = LAYOUT.to_proto()
    for name, value in changes.items():
        if name == "shape":
            del message.entries[0].shape[:]
            message.entries[0].shape.extend(value)
        else:
            setattr(message.entries[0], name, value)
    return message


BIG = float(np.float32(1e30))
NAN32, INF32 = np.float32("nan").tobytes(), np.float32("inf").tobytes()
Act = Callable[[Hostile], Message]
HOSTILE: dict[str, tuple[Act, str]] = {
    # no answer
    "client-error": (lambda h: Message(Error(2, "<class 'ValueError'>:<'boom'>"), reply_to=h.message), "failed .*2.*boom"),
    "superlink-error": (lambda h: error_from_the_superlink(h.message), r"failed \(Flower error 5\): Node Unavailable"),
    "error-without-reason": (lambda h: Message(Error(8), reply_to=h.message), "failed .*8"),
    "error-that-writes-its-own-log": (
        lambda h: Message(Error(2, "no\n\x1b[2JINFO: client 'paris' is fine"), reply_to=h.message), r"failed .*no  \[2JINFO: cl"
    ),
    "error-with-a-novel": (lambda h: Message(Error(2, "x" * 10**6), reply_to=h.message), r"failed .*x{100}.* \.\.\.$"),
    # no report
    "no-records": (lambda h: h.content({}), "expected bytes 'report'.*found NoneType"),
    "no-config-record": (lambda h: h.content({ARRAY_RECORD: ArrayRecord()}), "expected bytes 'report'.*found NoneType"),
    "report-under-another-key": (lambda h: h.raw_report(b"", "plan"), "expected bytes 'report'.*found NoneType"),
    "report-is-text": (lambda h: h.raw_report("report"), "expected bytes 'report'.*found str"),
    "report-is-a-list": (lambda h: h.raw_report([b"a", b"b"]), "expected bytes 'report'.*found list"),
    "report-is-garbage": (lambda h: h.raw_report(b"\xff\x00garbage\xfe"), "'report' is not a Report"),
    "report-is-cut": (lambda h: h.raw_report(h.report.SerializeToString()[:-3]), "'report' is not a Report"),
    "report-is-empty": (lambda h: h.raw_report(b""), "Report has version 0, expected 1"),
    "report-of-version-2": (put("version", 2), "Report has version 2, expected 1"),
    "report-is-a-registration": (
        lambda h: h.raw_report(FakeNode(NAME, LAYOUT).registration().SerializeToString()),
        "is not a Report|answered for|reports the steps",
    ),
    # somebody else's report
    "another-client": (put("client_id", "paris"), "answered for client_id 'paris', expected 'berlin'"),
    "no-client": (put("client_id", ""), "answered for client_id '', expected 'berlin'"),
    "long-client": (put("client_id", "p" * 10**6), "answered for client_id 'ppp"),
    "another-round": (put("round", 2), "answered for round 2, expected 3"),
    "another-run": (put("run_name", "old"), "answered for run_name 'old', expected 'run'"),
    # results that do not fit the plan
    "no-results": (results(lambda found: []), r"reports the steps \[\], expected \['evaluate', 'train', 'send', 'send'\]"),
    "one-result-less": (results(lambda found: found[:-1]), r"\['evaluate', 'train', 'send'\], expected"),
    "one-result-more": (results(lambda found: [*found, found[0]]), "'send', 'evaluate'], expected"),
    "results-in-another-order": (results(lambda found: found[::-1]), r"\['send', 'send', 'train', 'evaluate'\], expected"),
    "a-result-of-no-kind": (results(lambda found: [report_pb2.StepResult(), *found[1:]]), r"\[None, 'train'"),
    "a-result-of-another-kind": (
        results(lambda found: [found[0], report_pb2.StepResult(merge=report_pb2.MergeResult()), *found[2:]]),
        r"\['evaluate', 'merge', 'send', 'send'\], expected",
    ),
    "fifty-thousand-results": (results(lambda found: [report_pb2.StepResult()] * 50_000), r"reports the steps \[None"),
    "another-label": (put("label", "best", "evaluate"), r"step 0 \(evaluate\): reports label 'best', expected 'personal'"),
    "no-label": (put("label", "", "evaluate"), "reports label '', expected 'personal'"),
    "another-split": (put("split", "train", "evaluate"), "step 0 .*reports split 'train', expected 'test'"),
    "another-slot-in-the-report": (
        results(lambda found: [*found[:2], found[3], found[2]]), "step 2 .*reports slot 'extra', expected 'global'"
    ),
    # numbers that are none
    "nan-mean-loss": (put("mean_loss", float("nan"), "train"), r"reports results\[1\]\.train\.mean_loss = nan, expected a f"),
    "inf-first-loss": (put("first_loss", float("inf"), "train"), r"results\[1\]\.train\.first_loss = inf, expected"),
    "minus-inf-last-loss": (put("last_loss", -float("inf"), "train"), r"results\[1\]\.train\.last_loss = -inf"),
    "nan-train-seconds": (put("seconds", float("nan"), "train"), r"results\[1\]\.train\.seconds = nan"),
    "nan-evaluate-seconds": (put("seconds", float("nan"), "evaluate"), r"results\[0\]\.evaluate\.seconds = nan"),
    "nan-accuracy": (metric("accuracy", float("nan")), r"results\[0\]\.evaluate\.metrics\['accuracy'\] = nan"),
    "inf-loss": (metric("loss", float("inf")), r"results\[0\]\.evaluate\.metrics\['loss'\] = inf"),
    "nan-unknown-metric": (metric("m" * 10**5, float("nan")), r"results\[0\]\.evaluate\.metrics\['mmm"),
    "nan-seconds": (put("seconds", float("nan")), "reports seconds = nan"),
    "inf-clock": (spoil(lambda h: setattr(h.report.wire, "unix_time", float("inf"))), r"reports wire\.unix_time = inf"),
    # other uploads than those asked for
    "no-uploads": (blobs(lambda b: b.clear()), r"sent the slots \[\], expected \['extra', 'global'\]"),
    "a-slot-missing": (blobs(lambda b: b.pop("extra")), r"sent the slots \['global'\], expected \['extra', 'global'\]"),
    "a-slot-too-many": (blobs(lambda b: b.update(x=b["extra"])), r"\['extra', 'global', 'x'\], expected"),
    "a-slot-of-another-name": (blobs(lambda b: b.update(local=b.pop("extra"))), r"\['global', 'local'\], expected"),
    "slots-swapped": (blobs(lambda b: b.update({"global": b["extra"], "extra": b["global"]})), "slot 'global': UNKNOWN_LAYOUT"),
    # arrays of another kind
    "another-stype": (lambda h: h.array(h.blobs["global"], stype="numpy.ndarray"), "array 'global' has stype 'numpy.ndarray'"),
    "another-dtype": (lambda h: h.array(h.blobs["global"], dtype="float32"), "array 'global' is float32 of shape"),
    "another-shape": (lambda h: h.array(h.blobs["global"], shape=(1, 2)), r"of shape \(1, 2\), expected uint8"),
    # blobs that cannot be read
    "blob-empty": (blobs(lambda b: b.update({"global": b""})), "slot 'global': TRUNCATED: 0 bytes"),
    "blob-cut-in-the-magic": (blobs(lambda b: b.update({"global": b["global"][:5]})), "slot 'global': TRUNCATED"),
    "blob-cut-in-the-header": (blobs(lambda b: b.update({"global": b["global"][:30]})), "slot 'global': TRUNCATED"),
    "blob-cut-in-the-payload": (blobs(lambda b: b.update({"global": b["global"][:-1]})), "slot 'global': BAD_LENGTH"),
    "blob-with-a-tail": (blobs(lambda b: b.update({"global": b["global"] + b"\0"})), "slot 'global': BAD_LENGTH"),
    "blob-of-a-stranger": (blobs(lambda b: b.update({"extra": b"PK\x03\x04" + b["extra"][4:]})), "slot 'extra': BAD_MAGIC"),
    "blob-with-a-header-of-4-gigabytes": (
        blobs(lambda b: b.update({"global": b["global"][:8] + b"\xff" * 4 + b["global"][12:]})), "slot 'global': TOO_LARGE"
    ),
    "blob-with-garbage-for-a-header": (
        blobs(lambda b: b.update({"global": b["global"][:12] + b"\xff" * 60 + b["global"][72:]})), "slot 'global': BAD_HEADER"
    ),
    "blob-longer-than-it-can-be": (
        blobs(lambda b: b.update({"global": b["global"] + bytes(2 * payload_size(LAYOUT, Encoding.FP32) + 2**20)})),
        "slot 'global': TOO_LARGE: .* bytes, at most",
    ),
    "blob-of-version-2": (lambda h: h.header(version=2), "slot 'global': BAD_VERSION: version 2, expected 1"),
    "blob-with-a-short-nonce": (lambda h: h.header(nonce=b"1"), "slot 'global': BAD_HEADER"),
    "blob-with-a-short-digest": (lambda h: h.header(content_digest=b"1"), "slot 'global': BAD_HEADER"),
    "blob-that-claims-a-huge-payload": (lambda h: h.header(payload_bytes=2**63), "slot 'global': BAD_LENGTH"),
    "blob-of-an-unknown-encoding": (lambda h: h.header(encoding=99), "slot 'global': BAD_ENCODING"),
    "blob-of-no-encoding": (lambda h: h.header(encoding=0), "slot 'global': BAD_ENCODING"),
    "blob-of-another-encoding-than-it-says": (lambda h: h.header(encoding=2), "slot 'global': BAD_LENGTH"),
    "reference-that-nobody-holds": (lambda h: h.header("extra", reference_digest=b"\1" * 32), "slot 'extra': UNKNOWN_REFERENCE"),
    "reference-where-none-was-used": (
        lambda h: h.header(reference_digest=h.dispatch.received["extra"].digest), "slot 'global': BAD_DIGEST"
    ),
    # adapters of another layout
    "another-rank": (
        lambda h: h.encoded("global", random_adapter(layout_of(rank=16), 3)),
        r"^client 'berlin' sent slot 'global': BAD_LAYOUT: found rank 16 for 'q_proj', expected 8$",
    ),
    "another-rank-in-secret": (
        lambda h: h.encoded("global", random_adapter(layout_of(rank=16), 3), include_layout=False), "UNKNOWN_LAYOUT"
    ),
    "another-scaling": (lambda h: h.encoded("global", Adapter.zeros(layout_of(8, alpha=16))), "scaling 2.0 .*expected 1.0"),
    "another-base-model": (lambda h: h.encoded("global", Adapter.zeros(layout_of(8, base="o"))), "base model o, expected base-"),
    "other-modules": (
        lambda h: h.encoded("global", Adapter.zeros(layout_of(8, ("k_proj", "v_proj")))), "no tensor 'q_proj.A', expected"
    ),
    "another-width": (lambda h: h.encoded("global", Adapter.zeros(layout_of(8, d_in=7))), r"shape \(8, 7\) for 'q_proj.A', exp"),
    "another-order": (lambda h: h.encoded("global", Adapter.zeros(reordered(LAYOUT))), "the same tensors in another order"),
    "a-part-instead-of-the-whole": (lambda h: h.encoded("global", Adapter.zeros(PART)), "no tensor 'q_proj.A', expected"),
    "the-whole-instead-of-a-part": (lambda h: h.encoded("extra", Adapter.zeros(LAYOUT)), "slot 'extra': .*unknown tensor 'q_"),
    "another-part": (
        lambda h: h.encoded("extra", Adapter.zeros(LAYOUT.select([Factor.A]))), "slot 'extra': .*no tensor 'q_proj.B'"
    ),
    "layout-and-its-digest-differ": (lambda h: h.header(layout=layout_of(4).to_proto()), "slot 'global': BAD_LAYOUT"),
    "layout-without-entries": (lambda h: h.header(layout=adapter_pb2.Layout(base_fingerprint="b")), "BAD_LAYOUT: a layout needs"),
    "layout-of-astronomical-size": (lambda h: h.header(layout=claims(shape=[8, 2**31 - 1])), "slot 'global': BAD_LAYOUT"),
    "layout-with-zero-sizes": (lambda h: h.header(layout=claims(shape=[8, 0])), "expected sizes from 1"),
    "layout-with-an-unknown-factor": (lambda h: h.header(layout=claims(factor=77)), "unknown factor number 77"),
    "layout-with-an-unprintable-name": (lambda h: h.header(layout=claims(module="q\x1b[2J")), "not 1 to 512 bytes of printable"),
    # numbers that would spoil a merge
    "nan-in-the-payload": (lambda h: h.payload("global", 40, NAN32), "slot 'global': NOT_FINITE: .* in 'q_proj.A'"),
    "inf-in-the-payload": (lambda h: h.payload("global", -4, INF32), "slot 'global': NOT_FINITE: .* in 'head.bias'"),
    "nan-scale": (lambda h: h.payload("extra", 0, NAN32), "slot 'extra': NOT_FINITE"),
    "a-flipped-bit": (lambda h: h.payload("global", 5, b"\x77"), "slot 'global': BAD_DIGEST"),
    "astronomical-numbers": (
        lambda h: h.encoded("global", Adapter(LAYOUT, torch.full((LAYOUT.size,), -BIG))),
        r"sent slot 'global' with numbers up to 1e\+30, expected at most 1e\+09",
    ),
}  # fmt: skip


def test_the_hostile_answers_start_from_one_that_is_accepted() -> None:
    hostile = Hostile()
    for reply in (hostile.reply(), hostile.header(), hostile.payload("global", 0, b""), results(lambda r: r)(hostile)):
        read_answer(hostile.dispatch, reply)
    assert len(HOSTILE) >= 40


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_answer_is_refused_by_name(name: str) -> None:
    spoilt, finding = HOSTILE[name]
    hostile = Hostile()
    reply = spoilt(hostile)
    for reader in (read_answer, answer_from):
        with pytest.raises(BadAnswerError) as caught:
            reader(hostile.dispatch, reply)
        text = str(caught.value)
        assert text.startswith("client 'berlin'"), text
        assert re.search(finding, text), text
        assert len(text) < 2100
        assert text.isprintable()


def test_any_change_of_bytes_is_refused_or_changes_nothing() -> None:
    """Bytes of a blob may differ from an accepted one's in the nonce only; a report may say anything, but never crash."""
    dice = random.Random(0)
    dispatch = dispatch_of()
    report, uploads, _ = honest(dispatch)
    _, expected = read_answer(dispatch, reply_with(dispatch, report, uploads))
    refused = 0
    for _ in range(600):
        changed = dict(uploads)
        slot = dice.choice(sorted(changed))
        changed[slot] = mutated(changed[slot], dice)
        try:
            _, adapters = read_answer(dispatch, reply_with(dispatch, report, changed))
        except BadAnswerError:
            refused += 1
        else:
            assert all(adapters[name].digest == expected[name].digest for name in expected)
    assert refused > 300
    records = pack("report", report, uploads)
    for _ in range(600):
        records[CONFIG_RECORD] = ConfigRecord({"report": mutated(report.SerializeToString(), dice)})
        try:
            answer_from(dispatch, Message(records, reply_to=asked(dispatch)))
        except BadAnswerError as error:
            refused += 1
            assert str(error).startswith("client 'berlin'")
    assert refused > 500


def mutated(data: bytes, dice: random.Random) -> bytes:
    found = bytearray(data)
    for _ in range(dice.choice((1, 1, 2, 8))):
        position = dice.randrange(min(len(found), dice.choice((120, len(found)))))
        match dice.randrange(4):
            case 0:
                found[position] ^= 1 << dice.randrange(8)
            case 1:
                found[position] = dice.randrange(256)
            case 2:
                del found[position : position + dice.choice((1, 4, 100))]
            case _:
                found[position:position] = dice.randbytes(dice.choice((1, 4, 100)))
        if not found:
            break
    return bytes(found)


# ---------------------------------------------------------------------------------------- registrations and counters


def registration_reply(registration: report_pb2.Registration | bytes, key: str = "registration") -> Message:
    value = registration if isinstance(registration, bytes) else registration.SerializeToString()
    return Message(RecordDict({CONFIG_RECORD: ConfigRecord({key: value})}), reply_to=register_message(NODE))


def registered(**fields: Any) -> report_pb2.Registration:
    registration = FakeNode(NAME, LAYOUT, examples=17).registration()
    for name, value in fields.items():
        if name in ("layout", "wire"):
            getattr(registration, name).CopyFrom(value)
        else:
            setattr(registration, name, value)
    return registration


def test_an_honest_registration_is_a_client() -> None:
    registration, layout = read_registration(registration_reply(registered()))
    client = client_from(registration, layout, NODE)
    assert (client.id, client.node_id, client.examples, client.base_model) == (NAME, NODE, 17, "toy")
    assert client.layout.digest == LAYOUT.digest
    for name in ("a", "A-1_b.c", "0", "x" * 64):
        assert read_registration(registration_reply(registered(client_id=name)))[0].client_id == name


def test_examples_of_several_tasks_add_up_and_only_training_examples_count() -> None:
    registration = registered()
    registration.tasks.add(name="second", examples={"train": 3, "validation": 100})
    registration.tasks.add(name="third", examples={"test": 100})
    assert client_from(registration, LAYOUT, NODE).examples == 20


def without_scalings(layout: adapter_pb2.Layout) -> adapter_pb2.Layout:
    del layout.scalings[:]
    return layout


def twice_scaled(layout: adapter_pb2.Layout) -> adapter_pb2.Layout:
    layout.scalings.append(layout.scalings[0])
    return layout


def huge() -> adapter_pb2.Layout:
    shape = (2**20, 2**20)
    return Layout((Entry("m", Factor.WEIGHT, shape),), {}, "base").to_proto()


REGISTRATIONS: dict[str, tuple[Callable[[], Message], str]] = {
    **{
        f"client-id-{index}": (
            lambda name=name: registration_reply(registered(client_id=name)),  # type: ignore[misc]
            "not valid: client id .*: expected 1 to 64 letters",
        )
        for index, name in enumerate(
            ("", ".", "..", "../x", "a/b", "/etc", "a\\b", "-a", ".a", "a b", "a\n", "a\0", "é", "x" * 65, "y" * 10**6)
        )
    },
    "version-2": (lambda: registration_reply(registered(version=2)), "Registration has version 2, expected 1"),
    "garbage": (lambda: registration_reply(b"\xff\xff\xff"), "'registration' is not a Registration"),
    "empty": (lambda: registration_reply(b""), "Registration has version 0"),
    "another-key": (lambda: registration_reply(registered(), "report"), "expected bytes 'registration'"),
    "no-records": (lambda: Message(RecordDict(), reply_to=register_message(NODE)), "expected bytes 'registration'"),
    "error": (lambda: Message(Error(2, "no data-path"), reply_to=register_message(NODE)), "failed .*no data-path"),
    "no-layout": (lambda: registration_reply(registered(layout=adapter_pb2.Layout())), "a layout needs at least one entry"),
    "no-base": (
        lambda: registration_reply(registered(layout=adapter_pb2.Layout(entries=LAYOUT.to_proto().entries))), "base finger"
    ),
    "layout-with-an-unknown-factor": (lambda: registration_reply(registered(layout=claims(factor=9))), "unknown factor number 9"),
    "layout-with-a-tensor-twice": (lambda: registration_reply(registered(layout=claims(factor=2))), "occurs twice|has rank"),
    "layout-without-scalings": (
        lambda: registration_reply(registered(layout=without_scalings(LAYOUT.to_proto()))), "scalings and LoRA modules differ"
    ),
    "layout-with-two-scalings": (
        lambda: registration_reply(registered(layout=twice_scaled(LAYOUT.to_proto()))), "a module has two scalings"
    ),
    "layout-that-no-machine-holds": (
        lambda: registration_reply(registered(layout=huge())),
        f"claims an adapter of {2**40} numbers, expected at most {MAX_BLOB_BYTES // 4}",
    ),
    "nan-clock": (
        lambda: registration_reply(registered(wire=report_pb2.WireReading(unix_time=float("nan")))), "unix_time = nan"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REGISTRATIONS)
def test_a_hostile_registration_is_refused_and_its_node_named(name: str) -> None:
    make, finding = REGISTRATIONS[name]
    reply = make()
    with pytest.raises(BadAnswerError) as caught:
        read_registration(reply)
    text = str(caught.value)
    assert f"node {NODE}" in text, text
    assert re.search(finding, text), text
    assert len(text) < 2100
    assert text.isprintable()


def test_an_error_without_a_sender_is_named_by_who_was_asked() -> None:
    reply = error_from_the_superlink(register_message(NODE))
    assert reply.metadata.src_node_id == 1
    with pytest.raises(BadAnswerError, match=f"node {NODE} failed .*Node Unavailable"):
        read_registration(reply, NODE)


def test_counters() -> None:
    def counted(counters: report_pb2.Counters) -> Message:
        return Message(pack("counters", counters), reply_to=counters_message(NODE))

    reading = report_pb2.WireReading(unix_time=2.0, not_measured="no sockets here")
    counters = report_pb2.Counters(version=1, client_id=NAME, wire=reading)
    assert read_counters(counted(counters)) == counters
    for reply, finding in (
        (Message(Error(8, "gone"), reply_to=counters_message(NODE)), "failed .*gone"),
        (Message(RecordDict(), reply_to=counters_message(NODE)), "expected bytes 'counters'"),
        (counted(report_pb2.Counters(version=3)), "Counters has version 3, expected 1"),
        (counted(report_pb2.Counters(version=1, wire=report_pb2.WireReading(unix_time=float("inf")))), "unix_time = inf"),
        (registration_reply(b"\xff", "counters"), "is not a Counters"),
    ):
        with pytest.raises(BadAnswerError, match=f"node {NODE}.*{finding}"):
            read_counters(reply)
