"""Plans and reports as Flower messages, on the server's side: what was sent decides what is accepted back."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flwr.app import Message, RecordDict

from adapters.adapter import Adapter
from adapters.codec import CodecError, Encoding, decode, encode, payload_size
from adapters.layout import Layout, LayoutError
from adapters.parts import layout_of_part, layouts_of_plan
from adapters.records import COUNTERS_TYPE, FORMAT_VERSION, PLAN_TYPE, REGISTER_TYPE, RecordError, pack, unpack
from proto.fedalloy.v1 import plan_pb2, report_pb2

CLIENT_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""Client ids, run names and slot names become folder names."""


class BadAnswerError(ValueError):
    """A client's reply is an error, or is not what the plan asked for."""


@dataclass(frozen=True)
class Dispatch:
    """One client's message of one round, and what its answer must look like.

    ``received`` holds the adapters as the client will decode them; ``expected`` the layout of every upload asked for;
    ``tensor_bytes`` the encoded numbers alone, by slot.
    """

    plan: plan_pb2.Plan
    content: RecordDict
    received: Mapping[str, Adapter]
    expected: Mapping[str, Layout]
    tensor_bytes: Mapping[str, int]

    def message(self, node_id: int, ttl: float | None = None) -> Message:
        """The Flower message to one node; ``ttl`` in seconds."""
        return Message(
            self.content, dst_node_id=node_id, message_type=PLAN_TYPE, ttl=ttl, group_id=str(self.plan.round)
        )


def plan_dispatch(
    steps: Sequence[plan_pb2.Step],
    adapters: Mapping[str, Adapter],
    *,
    client_id: str,
    layout: Layout,
    round_: int,
    seed: int,
    run_name: str,
    encoding: str = "fp32",
) -> Dispatch:
    """Encode one client's round. ``layout`` is the client's registered layout, which needs no repeating."""
    plan = plan_pb2.Plan(
        version=FORMAT_VERSION, run_name=run_name, client_id=client_id, round=round_, seed=seed, steps=steps
    )
    blobs, received, tensor_bytes = {}, {}, {}
    known = layouts_of_plan(layout, steps)
    for slot, adapter in adapters.items():
        encoded = encode(adapter, Encoding(encoding), include_layout=adapter.layout.digest not in known)
        blobs[slot], received[slot], tensor_bytes[slot] = encoded.blob, encoded.decoded, encoded.payload_bytes
    expected = {
        step.send.slot: layout_of_part(layout, step.send.part) for step in steps if step.WhichOneof("kind") == "send"
    }
    return Dispatch(plan, pack("plan", plan, blobs), received, expected, tensor_bytes)


def register_message(node_id: int, ttl: float | None = None) -> Message:
    """Ask a node who it is."""
    return Message(RecordDict(), dst_node_id=node_id, message_type=REGISTER_TYPE, ttl=ttl)


def counters_message(node_id: int, ttl: float | None = None) -> Message:
    """Ask a node for its counters only."""
    return Message(RecordDict(), dst_node_id=node_id, message_type=COUNTERS_TYPE, ttl=ttl)


def read_registration(reply: Message) -> tuple[report_pb2.Registration, Layout]:
    """The registration in a reply, with its validated layout.

    Raises:
        BadAnswerError: the node answered with an error, or its registration is not valid.
    """
    node = f"node {reply.metadata.src_node_id}"
    _require_content(reply, node)
    try:
        registration, _ = unpack(reply.content, "registration", report_pb2.Registration)
        if not CLIENT_ID.fullmatch(registration.client_id):
            raise RecordError(
                f"client id {registration.client_id[:80]!r}: expected 1 to 64 letters, digits, '.', '_' or '-', "
                "starting with a letter or digit"
            )
        return registration, Layout.from_proto(registration.layout)
    except (RecordError, LayoutError) as error:
        raise BadAnswerError(f"{node} sent a registration that is not valid: {error}") from None


def read_counters(reply: Message) -> report_pb2.Counters:
    """The counters in a reply.

    Raises:
        BadAnswerError: the node answered with an error or something else.
    """
    node = f"node {reply.metadata.src_node_id}"
    _require_content(reply, node)
    try:
        return unpack(reply.content, "counters", report_pb2.Counters)[0]
    except RecordError as error:
        raise BadAnswerError(f"{node}: {error}") from None


def read_answer(dispatch: Dispatch, reply: Message) -> tuple[report_pb2.Report, dict[str, Adapter]]:
    """Report and uploads of a reply, checked against what was asked.

    Raises:
        BadAnswerError: names the client, the expectation and the finding.
    """
    plan = dispatch.plan
    who = f"client {plan.client_id!r}"
    _require_content(reply, who)
    try:
        report, blobs = unpack(reply.content, "report", report_pb2.Report)
    except RecordError as error:
        raise BadAnswerError(f"{who}: {error}") from None
    for name in ("client_id", "run_name", "round"):
        found, wanted = getattr(report, name), getattr(plan, name)
        if found != wanted:
            raise BadAnswerError(f"{who} answered for {name} {found!r}, expected {wanted!r}")
    kinds = [result.WhichOneof("kind") for result in report.results]
    wanted_kinds = [step.WhichOneof("kind") for step in plan.steps]
    if kinds != wanted_kinds:
        raise BadAnswerError(f"{who} reports the steps {kinds}, expected {wanted_kinds}")
    _require_finite(who, report)
    if set(blobs) != set(dispatch.expected):
        raise BadAnswerError(f"{who} sent the slots {sorted(blobs)}, expected {sorted(dispatch.expected)}")
    adapters = {}
    for slot, blob in blobs.items():
        layout = dispatch.expected[slot]
        try:
            # Twice the plain numbers bounds any encoding with its header; a longer blob is refused unread.
            limit = 2 * payload_size(layout, Encoding.FP32) + 2**20
            adapters[slot] = decode(blob, expected=layout, references=_references(dispatch, layout), max_bytes=limit)
        except CodecError as error:
            raise BadAnswerError(f"{who} sent slot {slot!r}: {error}") from None
    return report, adapters


def _references(dispatch: Dispatch, layout: Layout) -> dict[bytes, Adapter]:
    parts = [adapter.part(layout) for adapter in dispatch.received.values() if adapter.layout.contains(layout)]
    return {part.digest: part for part in parts}


def _require_content(reply: Message, who: str) -> None:
    if reply.has_error():
        raise BadAnswerError(f"{who} failed (Flower error {reply.error.code}): {reply.error.reason}")


def _require_finite(who: str, report: report_pb2.Report) -> None:
    for step, result in enumerate(report.results):
        kind = result.WhichOneof("kind")
        if kind == "train" and not math.isfinite(result.train.mean_loss):
            raise BadAnswerError(f"{who} reports a training loss of {result.train.mean_loss} in step {step}")
        if kind == "evaluate":
            for name, value in result.evaluate.metrics.items():
                if not math.isfinite(value):
                    raise BadAnswerError(f"{who} reports {name} = {value} in step {step}")
