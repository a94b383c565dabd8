"""Reports that must be refused, whatever the plan was and whatever the strategy: each is made from an honest answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict

from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.layout import Layout
from fedalloy_adapters.wire.codec import MAGIC, encode
from fedalloy_adapters.wire.flower_records import ARRAY_DTYPE, ARRAY_RECORD, ARRAY_STYPE, CONFIG_RECORD, pack, unpack
from proto.fedalloy.v1 import adapter_pb2, report_pb2
from tests.strategies.conftest import FakeNode, layout_of
from tests.strategies.hostile import claims

LAYOUT = layout_of()
Blobs = dict[str, bytes]


@dataclass
class Answer:
    """An honest answer to be spoilt; ``before`` is what the client answered the round before."""

    message: Message
    report: report_pb2.Report
    blobs: Blobs
    before: Message | None = None

    @classmethod
    def of(cls, message: Message, honest: Message, before: Message | None) -> Answer:
        report, blobs = unpack(honest.content, "report", report_pb2.Report)
        if not blobs:  # a plan that asks for no upload: whatever comes is too much
            blobs = {"local": encode(Adapter.zeros(LAYOUT)).blob}
        return cls(message, report, blobs, before)

    @property
    def slot(self) -> str:
        return sorted(self.blobs)[0]

    def reply(self) -> Message:
        return Message(pack("report", self.report, self.blobs), reply_to=self.message)

    def raw(self, value: Any, key: str = "report") -> Message:
        return Message(RecordDict({CONFIG_RECORD: ConfigRecord({key: value})}), reply_to=self.message)

    def array(self, dtype: str = ARRAY_DTYPE, stype: str = ARRAY_STYPE, shape: Any = None) -> Message:
        blob = self.blobs[self.slot]
        records = pack("report", self.report, self.blobs)
        array = Array(dtype=dtype, shape=(len(blob),) if shape is None else shape, stype=stype, data=blob)
        records.array_records[ARRAY_RECORD][self.slot] = array
        return Message(records, reply_to=self.message)

    def blob(self, change: Callable[[bytes], bytes]) -> Message:
        self.blobs[self.slot] = change(self.blobs[self.slot])
        return self.reply()

    def header(self, **fields: Any) -> Message:
        """Other header fields around the same payload."""
        blob = self.blobs[self.slot]
        end = 12 + int.from_bytes(blob[8:12], "little")
        header = adapter_pb2.AdapterHeader.FromString(blob[12:end])
        for name, value in fields.items():
            if name == "layout":
                header.layout.CopyFrom(value)
            else:
                setattr(header, name, value)
        head = header.SerializeToString()
        return self.blob(lambda old: MAGIC + len(head).to_bytes(4, "little") + head + old[end:])

    def adapter(self, layout: Layout, value: float = 0.0) -> Message:
        return self.blob(lambda old: encode(Adapter(layout, torch.full((layout.size,), value))).blob)

    def results(self, change: Callable[[list[Any]], list[Any]]) -> Message:
        changed = change(list(self.report.results))
        del self.report.results[:]
        self.report.results.extend(changed)
        return self.reply()

    def put(self, **fields: Any) -> Message:
        for name, value in fields.items():
            setattr(self.report, name, value)
        return self.reply()

    def evaluated(self, **fields: Any) -> Message:
        """Change the first result of an evaluation."""
        found = next(result.evaluate for result in self.report.results if result.HasField("evaluate"))
        for name, value in fields.items():
            if name == "metric":
                found.metrics["loss"] = value
            else:
                setattr(found, name, value)
        return self.reply()

    def trained(self, value: float) -> Message:
        results = [r.distill if r.HasField("distill") else r for r in self.report.results]  # which has one in it
        next(result.train for result in results if result.HasField("train")).mean_loss = value
        return self.reply()

    def wire(self, **fields: Any) -> Message:
        for name, value in fields.items():
            if name == "bytes_sent":
                self.report.wire.connections.add(bytes_sent=value)
            else:
                setattr(self.report.wire, name, value)
        return self.reply()


def another_kind(result: report_pb2.StepResult) -> report_pb2.StepResult:
    if result.HasField("merge"):
        return report_pb2.StepResult(evaluate={})
    return report_pb2.StepResult(merge={"max_rank": 1})


def rename(answer: Answer, name: str) -> Message:
    answer.blobs[name] = answer.blobs.pop(answer.slot)
    return answer.reply()


def measured(answer: Answer, names: list[str]) -> Message:
    """With metrics that nobody asked for."""
    found = next(result.evaluate for result in answer.report.results if result.HasField("evaluate"))
    for name in names:
        found.metrics[name] = 1.0
    return answer.reply()


def connected(answer: Answer, count: int) -> Message:
    for _ in range(count):
        answer.report.wire.connections.add(bytes_sent=1)
    return answer.reply()


def extra(answer: Answer, name: str) -> Message:
    answer.blobs[name] = answer.blobs[answer.slot]
    return answer.reply()


NAN, INF, HUGE = float("nan"), float("inf"), float(np.float32(1e30))
KINDS: dict[str, Callable[[Answer], Message]] = {
    # no report
    "client-error": lambda a: Message(Error(2, "boom"), reply_to=a.message),
    "error-that-forges-a-log": lambda a: Message(Error(2, "no\n\x1b[2JINFO fine" + "x" * 10**5), reply_to=a.message),
    "expired": lambda a: Message(Error(3, "Message Unavailable"), reply_to=a.message),
    "no-records": lambda a: Message(RecordDict({}), reply_to=a.message),
    "only-arrays": lambda a: Message(RecordDict({ARRAY_RECORD: ArrayRecord()}), reply_to=a.message),
    "text": lambda a: a.raw("report"),
    "list": lambda a: a.raw([b"a", b"b"]),
    "garbage": lambda a: a.raw(b"\xff\x00garbage\xfe"),
    "cut": lambda a: a.raw(a.report.SerializeToString()[:-3]),
    "empty": lambda a: a.raw(b""),
    "another-key": lambda a: a.raw(a.report.SerializeToString(), "plan"),
    "a-registration": lambda a: a.raw(FakeNode("cyd", LAYOUT).registration().SerializeToString()),
    "version-2": lambda a: a.put(version=2),
    # somebody else's, another round's, another run's
    "another-client": lambda a: a.put(client_id="ada"),
    "no-client": lambda a: a.put(client_id=""),
    "path-as-client": lambda a: a.put(client_id="../../../etc/passwd"),
    "client-of-a-megabyte": lambda a: a.put(client_id="c" * 10**6),
    "replayed": lambda a: Message((a.before or a.put(round=0)).content, reply_to=a.message),
    "round-before": lambda a: a.put(round=a.report.round - 1),
    "round-after": lambda a: a.put(round=a.report.round + 1),
    "another-run": lambda a: a.put(run_name="other"),
    "path-as-run": lambda a: a.put(run_name="../other"),
    # results that do not fit the plan
    "no-results": lambda a: a.results(lambda found: []),
    "one-less": lambda a: a.results(lambda found: found[:-1]),
    "one-more": lambda a: a.results(lambda found: [*found, found[0]]),
    "no-kind": lambda a: a.results(lambda found: [report_pb2.StepResult(), *found[1:]]),
    "another-kind": lambda a: a.results(lambda found: [another_kind(found[0]), *found[1:]]),
    "fifty-thousand-results": lambda a: a.results(lambda found: [report_pb2.StepResult()] * 50_000),
    "another-label": lambda a: a.evaluated(label="best"),
    "another-split": lambda a: a.evaluated(split="secrets"),
    # numbers that are none
    "nan-loss": lambda a: a.evaluated(metric=NAN),
    "inf-loss": lambda a: a.evaluated(metric=INF),
    "nan-train-loss": lambda a: a.trained(NAN),
    "seconds-whose-sum-is-infinite": lambda a: a.put(seconds=1.7e308),
    "a-loss-whose-sum-is-infinite": lambda a: a.evaluated(metric=-1.7e308),
    "metrics-without-end": lambda a: measured(a, [f"metric-{number}" for number in range(20_000)]),
    "a-metric-with-an-essay-for-a-name": lambda a: measured(a, ["word " * 100]),
    "a-thousand-connections": lambda a: connected(a, 1000),
    "nan-seconds": lambda a: a.put(seconds=NAN),
    "inf-clock": lambda a: a.wire(unix_time=INF),
    "counter-beyond-any-database": lambda a: a.wire(bytes_sent=2**63),
    "examples-beyond-counting": lambda a: a.put(examples=2**64 - 1),
    # other uploads than asked for
    "slot-renamed": lambda a: rename(a, "other"),
    "path-as-slot": lambda a: rename(a, "../../ada/slots/local"),
    "absolute-path-as-slot": lambda a: extra(a, "/etc/cron.d/x"),
    "one-slot-more": lambda a: extra(a, "more"),
    # blobs that cannot be read, or claim what they are not
    "blob-empty": lambda a: a.blob(lambda old: b""),
    "blob-cut": lambda a: a.blob(lambda old: old[:-1]),
    "blob-with-a-tail": lambda a: a.blob(lambda old: old + b"\0"),
    "blob-of-a-stranger": lambda a: a.blob(lambda old: b"PK\x03\x04" + old[4:]),
    "blob-with-a-pickle": lambda a: a.blob(lambda old: b"\x80\x04cos\nsystem\n(S'true'\ntR."),
    "header-of-4-gigabytes": lambda a: a.blob(lambda old: old[:8] + b"\xff" * 4 + old[12:]),
    "garbage-for-a-header": lambda a: a.blob(lambda old: old[:12] + b"\xff" * 60 + old[72:]),
    "longer-than-it-can-be": lambda a: a.blob(lambda old: old + bytes(4 * 2**20)),
    "header-version-2": lambda a: a.header(version=2),
    "claims-8-exabytes": lambda a: a.header(payload_bytes=2**63),
    "unknown-encoding": lambda a: a.header(encoding=99),
    "unknown-reference": lambda a: a.header(reference_digest=b"\1" * 32),
    "layout-of-astronomical-size": lambda a: a.header(layout=claims(LAYOUT, shape=[2**31 - 1, 2**31 - 1])),
    "layout-with-zero-sizes": lambda a: a.header(layout=claims(LAYOUT, shape=[8, 0])),
    "layout-with-an-unprintable-name": lambda a: a.header(layout=claims(LAYOUT, module="q\x1b[2J")),
    # adapters that do not fit, numbers that would spoil a merge
    "another-rank": lambda a: a.adapter(layout_of(rank=16)),
    "another-base": lambda a: a.adapter(layout_of(base="other")),
    "astronomical-numbers": lambda a: a.adapter(LAYOUT, HUGE),
    "nan-in-the-payload": lambda a: a.blob(lambda old: old[:-4] + np.float32(NAN).tobytes()),
    "inf-in-the-payload": lambda a: a.blob(lambda old: old[:-4] + np.float32(INF).tobytes()),
    "a-flipped-bit": lambda a: a.blob(lambda old: old[:-2] + bytes([old[-2] ^ 1]) + old[-1:]),
    # Flower's arrays of another kind
    "another-stype": lambda a: a.array(stype="numpy.ndarray"),
    "another-dtype": lambda a: a.array(dtype="float32"),
    "another-shape": lambda a: a.array(shape=(1, 2)),
}
