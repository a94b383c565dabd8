"""One round's dispatch, the honest answer to it, and a table of answers that must be refused with their findings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict

from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.layout import Factor, Layout
from fedalloy_adapters.wire.codec import MAGIC, Encoding, encode
from fedalloy_adapters.wire.flower_records import (
    ARRAY_DTYPE,
    ARRAY_RECORD,
    ARRAY_STYPE,
    CONFIG_RECORD,
    pack,
    unpack,
)
from proto.fedalloy.v1 import adapter_pb2, plan_pb2, report_pb2
from strategies.framework import steps
from strategies.framework.dispatch import Dispatch, plan_dispatch
from strategies.framework.steps import Training
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


class Hostile:
    """An honest answer that a test spoils before it is sent."""

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


def results(
    change: Callable[[list[report_pb2.StepResult]], list[report_pb2.StepResult]],
) -> Callable[[Hostile], Message]:
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


def claims(layout: Layout = LAYOUT, **changes: Any) -> adapter_pb2.Layout:
    """A layout's message with one entry changed."""
    message = layout.to_proto()
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
    "client-error": (
        lambda h: Message(Error(2, "<class 'ValueError'>:<'boom'>"), reply_to=h.message),
        "failed .*2.*boom",
    ),
    "superlink-error": (lambda h: error_from_the_superlink(h.message), r"failed \(Flower error 5\): Node Unavailable"),
    "error-without-reason": (lambda h: Message(Error(8), reply_to=h.message), "failed .*8"),
    "error-that-writes-its-own-log": (
        lambda h: Message(Error(2, "no\n\x1b[2JINFO: client 'paris' is fine"), reply_to=h.message),
        r"failed .*no  \[2JINFO: cl",
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
    "no-results": (
        results(lambda found: []),
        r"reports the steps \[\], expected \['evaluate', 'train', 'send', 'send'\]",
    ),
    "one-result-less": (results(lambda found: found[:-1]), r"\['evaluate', 'train', 'send'\], expected"),
    "one-result-more": (results(lambda found: [*found, found[0]]), "'send', 'evaluate'], expected"),
    "results-in-another-order": (
        results(lambda found: found[::-1]),
        r"\['send', 'send', 'train', 'evaluate'\], expected",
    ),
    "a-result-of-no-kind": (results(lambda found: [report_pb2.StepResult(), *found[1:]]), r"\[None, 'train'"),
    "a-result-of-another-kind": (
        results(lambda found: [found[0], report_pb2.StepResult(merge=report_pb2.MergeResult()), *found[2:]]),
        r"\['evaluate', 'merge', 'send', 'send'\], expected",
    ),
    "fifty-thousand-results": (results(lambda found: [report_pb2.StepResult()] * 50_000), "has more than 50000 values"),
    "another-label": (
        put("label", "best", "evaluate"),
        r"step 0 \(evaluate\): reports label 'best', expected 'personal'",
    ),
    "no-label": (put("label", "", "evaluate"), "reports label '', expected 'personal'"),
    "another-split": (put("split", "train", "evaluate"), "step 0 .*reports split 'train', expected 'test'"),
    "another-slot-in-the-report": (
        results(lambda found: [*found[:2], found[3], found[2]]),
        "step 2 .*reports slot 'extra', expected 'global'",
    ),
    # values that are no numbers
    "nan-mean-loss": (
        put("mean_loss", float("nan"), "train"),
        r"reports results\[1\]\.train\.mean_loss = nan, expected a f",
    ),
    "inf-first-loss": (put("first_loss", float("inf"), "train"), r"results\[1\]\.train\.first_loss = inf, expected"),
    "minus-inf-last-loss": (put("last_loss", -float("inf"), "train"), r"results\[1\]\.train\.last_loss = -inf"),
    "nan-train-seconds": (put("seconds", float("nan"), "train"), r"results\[1\]\.train\.seconds = nan"),
    "nan-evaluate-seconds": (put("seconds", float("nan"), "evaluate"), r"results\[0\]\.evaluate\.seconds = nan"),
    "nan-accuracy": (metric("accuracy", float("nan")), r"results\[0\]\.evaluate\.metrics\['accuracy'\] = nan"),
    "inf-loss": (metric("loss", float("inf")), r"results\[0\]\.evaluate\.metrics\['loss'\] = inf"),
    "nan-unknown-metric": (metric("m" * 30, float("nan")), r"results\[0\]\.evaluate\.metrics\['mmm"),
    "nan-seconds": (put("seconds", float("nan")), "reports seconds = nan"),
    "inf-clock": (spoil(lambda h: setattr(h.report.wire, "unix_time", float("inf"))), r"reports wire\.unix_time = inf"),
    "a-counter-that-no-database-holds": (
        spoil(lambda h: h.report.wire.connections.add(bytes_sent=2**63)),
        r"reports wire\.connections\[0\]\.bytes_sent = 9223372036854775808, expected at most 1125899906842624",
    ),
    "more-examples-than-there-are": (
        put("examples", 2**64 - 1),
        "reports examples = 18446744073709551615, expected at",
    ),
    # other uploads than those asked for
    "no-uploads": (blobs(lambda b: b.clear()), r"sent the slots \[\], expected \['extra', 'global'\]"),
    "a-slot-missing": (blobs(lambda b: b.pop("extra")), r"sent the slots \['global'\], expected \['extra', 'global'\]"),
    "a-slot-too-many": (blobs(lambda b: b.update(x=b["extra"])), r"\['extra', 'global', 'x'\], expected"),
    "a-slot-of-another-name": (blobs(lambda b: b.update(local=b.pop("extra"))), r"\['global', 'local'\], expected"),
    "slots-swapped": (
        blobs(lambda b: b.update({"global": b["extra"], "extra": b["global"]})),
        "slot 'global': UNKNOWN_LAYOUT",
    ),
    # arrays of another kind
    "another-stype": (
        lambda h: h.array(h.blobs["global"], stype="numpy.ndarray"),
        "array 'global' has stype 'numpy.ndarray'",
    ),
    "another-dtype": (lambda h: h.array(h.blobs["global"], dtype="float32"), "array 'global' is float32 of shape"),
    "another-shape": (lambda h: h.array(h.blobs["global"], shape=(1, 2)), r"of shape \(1, 2\), expected uint8"),
    # blobs that cannot be read
    "blob-empty": (blobs(lambda b: b.update({"global": b""})), "slot 'global': TRUNCATED: 0 bytes"),
    "blob-cut-in-the-magic": (blobs(lambda b: b.update({"global": b["global"][:5]})), "slot 'global': TRUNCATED"),
    "blob-cut-in-the-header": (blobs(lambda b: b.update({"global": b["global"][:30]})), "slot 'global': TRUNCATED"),
    "blob-cut-in-the-payload": (blobs(lambda b: b.update({"global": b["global"][:-1]})), "slot 'global': BAD_LENGTH"),
    "blob-with-a-tail": (blobs(lambda b: b.update({"global": b["global"] + b"\0"})), "slot 'global': BAD_LENGTH"),
    "blob-of-a-stranger": (
        blobs(lambda b: b.update({"extra": b"PK\x03\x04" + b["extra"][4:]})),
        "slot 'extra': BAD_MAGIC",
    ),
    "blob-with-a-header-of-4-gigabytes": (
        blobs(lambda b: b.update({"global": b["global"][:8] + b"\xff" * 4 + b["global"][12:]})),
        "slot 'global': TOO_LARGE",
    ),
    "blob-with-garbage-for-a-header": (
        blobs(lambda b: b.update({"global": b["global"][:12] + b"\xff" * 60 + b["global"][72:]})),
        "slot 'global': BAD_HEADER",
    ),
    "blob-longer-than-it-can-be": (
        blobs(lambda b: b.update({"global": b["global"] + bytes(2**20)})),
        "slot 'global': TOO_LARGE: .* bytes, at most",
    ),
    "blob-of-version-2": (lambda h: h.header(version=2), "slot 'global': BAD_VERSION: version 2, expected 1"),
    "blob-with-a-short-nonce": (lambda h: h.header(nonce=b"1"), "slot 'global': BAD_HEADER"),
    "blob-with-a-short-digest": (lambda h: h.header(content_digest=b"1"), "slot 'global': BAD_HEADER"),
    "blob-that-claims-a-huge-payload": (lambda h: h.header(payload_bytes=2**63), "slot 'global': BAD_LENGTH"),
    "blob-of-an-unknown-encoding": (lambda h: h.header(encoding=99), "slot 'global': BAD_ENCODING"),
    "blob-of-no-encoding": (lambda h: h.header(encoding=0), "slot 'global': BAD_ENCODING"),
    "blob-of-another-encoding-than-it-says": (
        lambda h: h.header(encoding=2),
        "slot 'global': BAD_ENCODING: encoded as fp16, expected fp32",
    ),
    "a-larger-encoding-than-asked-for": (
        lambda h: h.encoded("extra", random_adapter(PART, 3), encoding=Encoding.FP32),
        "slot 'extra': BAD_ENCODING: encoded as fp32, expected int8",
    ),
    "reference-that-nobody-holds": (
        lambda h: h.header("extra", reference_digest=b"\1" * 32),
        "slot 'extra': UNKNOWN_REFERENCE",
    ),
    "reference-where-none-was-used": (
        lambda h: h.header(reference_digest=h.dispatch.received["extra"].digest),
        "slot 'global': BAD_DIGEST",
    ),
    # adapters of another layout
    "another-rank": (
        lambda h: h.encoded("global", random_adapter(layout_of(rank=16), 3)),
        r"^client 'berlin' sent slot 'global': BAD_LAYOUT: found rank 16 for 'q_proj', expected 8$",
    ),
    "another-rank-in-secret": (
        lambda h: h.encoded("global", random_adapter(layout_of(rank=16), 3), include_layout=False),
        "UNKNOWN_LAYOUT",
    ),
    "another-scaling": (
        lambda h: h.encoded("global", Adapter.zeros(layout_of(8, alpha=16))),
        "scaling 2.0 .*expected 1.0",
    ),
    "another-base-model": (
        lambda h: h.encoded("global", Adapter.zeros(layout_of(8, base="o"))),
        "base model o, expected base-",
    ),
    "other-modules": (
        lambda h: h.encoded("global", Adapter.zeros(layout_of(8, ("k_proj", "v_proj")))),
        "no tensor 'q_proj.A', expected",
    ),
    "another-width": (
        lambda h: h.encoded("global", Adapter.zeros(layout_of(8, d_in=7))),
        r"shape \(8, 7\) for 'q_proj.A', exp",
    ),
    "another-order": (
        lambda h: h.encoded("global", Adapter.zeros(reordered(LAYOUT))),
        "the same tensors in another order",
    ),
    "a-part-instead-of-the-whole": (
        lambda h: h.encoded("global", Adapter.zeros(PART)),
        "no tensor 'q_proj.A', expected",
    ),
    "the-whole-instead-of-a-part": (
        lambda h: h.encoded("extra", Adapter.zeros(LAYOUT)),
        "slot 'extra': .*unknown tensor 'q_",
    ),
    "another-part": (
        lambda h: h.encoded("extra", Adapter.zeros(LAYOUT.select([Factor.A]))),
        "slot 'extra': .*no tensor 'q_proj.B'",
    ),
    "layout-and-its-digest-differ": (lambda h: h.header(layout=layout_of(4).to_proto()), "slot 'global': BAD_LAYOUT"),
    "layout-without-entries": (
        lambda h: h.header(layout=adapter_pb2.Layout(base_fingerprint="b")),
        "BAD_LAYOUT: a layout needs",
    ),
    "layout-of-astronomical-size": (
        lambda h: h.header(layout=claims(shape=[8, 2**31 - 1])),
        "slot 'global': BAD_LAYOUT",
    ),
    "layout-with-zero-sizes": (lambda h: h.header(layout=claims(shape=[8, 0])), "expected sizes from 1"),
    "layout-with-an-unknown-factor": (lambda h: h.header(layout=claims(factor=77)), "unknown factor number 77"),
    "layout-with-an-unprintable-name": (
        lambda h: h.header(layout=claims(module="q\x1b[2J")),
        "not 1 to 512 bytes of printable",
    ),
    # numbers that would spoil a merge
    "nan-in-the-payload": (lambda h: h.payload("global", 40, NAN32), "slot 'global': NOT_FINITE: .* in 'q_proj.A'"),
    "inf-in-the-payload": (lambda h: h.payload("global", -4, INF32), "slot 'global': NOT_FINITE: .* in 'head.bias'"),
    "nan-scale": (lambda h: h.payload("extra", 0, NAN32[2:]), "slot 'extra': NOT_FINITE"),  # a bfloat16
    "a-flipped-bit": (lambda h: h.payload("global", 5, b"\x77"), "slot 'global': BAD_DIGEST"),
    "astronomical-numbers": (
        lambda h: h.encoded("global", Adapter(LAYOUT, torch.full((LAYOUT.size,), -BIG))),
        r"sent slot 'global' with numbers up to 1e\+30, expected at most 1e\+09",
    ),
}
