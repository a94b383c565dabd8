"""Briefs as Flower messages: one client's plan and adapters, encoded, and what its answer must look like."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from flwr.app import Message, RecordDict

from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.bank.store import Made, largest_of
from fedalloy_adapters.layout import Layout, LayoutError
from fedalloy_adapters.parts import layout_of_gram, layout_of_part, layout_of_sketch, layouts_of_plan
from fedalloy_adapters.wire.codec import (
    CodecError,
    CodecErrorCode,
    Encoded,
    Encoding,
    encode,
    encoding_from_proto,
    payload_size,
)
from fedalloy_adapters.wire.flower_records import (
    COUNTERS_TYPE,
    FORMAT_VERSION,
    MAX_MESSAGE_BYTES,
    PLAN_TYPE,
    REGISTER_TYPE,
    pack,
)
from proto.fedalloy.v1 import plan_pb2
from strategies.framework.exchange import MAX_NUMBER
from strategies.framework.holdings import Holding

_UPLOADS = ("send", "sketch", "gram")
"""Kinds of steps that ask for an upload."""


@dataclass(frozen=True)
class Dispatch:
    """One client's message of one round, and what its answer must look like; ``layout`` is the client's.

    By slot: ``received`` has the adapters as the client will decode them, made again at each access; ``expected`` the
    layout of every upload asked for; ``tensor_bytes`` the bytes of the encoded numbers alone, and ``upload_bytes``
    those of the uploads; ``residuals`` the norm of what the encoding dropped, if the client keeps what it receives;
    ``sent_as`` the encoding, and ``asked_as`` that of the uploads. ``sketches`` names the uploads that are sketches.
    """

    plan: plan_pb2.Plan
    layout: Layout
    content: RecordDict
    received: Mapping[str, Adapter]
    expected: Mapping[str, Layout]
    tensor_bytes: Mapping[str, int]
    upload_bytes: Mapping[str, int]
    sketches: frozenset[str] = frozenset()
    residuals: Mapping[str, float] = field(default_factory=dict)
    sent_as: Mapping[str, Encoding] = field(default_factory=dict)
    asked_as: Mapping[str, Encoding] = field(default_factory=dict)

    def down_by_encoding(self) -> dict[str, int]:
        """Bytes of the encoded numbers that are sent, by encoding."""
        found = Counter[str]()
        for slot, size in self.tensor_bytes.items():
            found[self.sent_as[slot]] += size
        return dict(found)

    def up_by_encoding(self) -> dict[str, int]:
        """Bytes of the encoded numbers that are asked for, by encoding."""
        found = Counter[str]()
        for slot, size in self.upload_bytes.items():
            found[self.asked_as[slot]] += size
        return dict(found)

    @property
    def max_answer_bytes(self) -> int:
        """Most bytes that an answer to this may have."""
        return MAX_MESSAGE_BYTES + sum(map(self.max_blob_bytes, self.expected))

    def max_blob_bytes(self, slot: str) -> int:
        """Most bytes of an upload: its numbers, and a header with a layout; a longer blob is refused unread."""
        return self.upload_bytes[slot] + 2**20

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
    reference: Layout | None = None,
    run_key: bytes = b"",
    holding: Holding | None = None,
    pinned: int | None = None,
    beside: bool = False,
) -> Dispatch:
    """Encode one client's round. The client registered ``layout`` and ``reference``, so they are not sent again.

    The client is to keep its slots as they were after the round ``pinned``: the run may return there.
    ``beside``: it has said that it reads small adapters beside the plan.

    With a ``holding`` a lossy encoding stores the difference from what the client holds, if that is smaller.

    Raises:
        LayoutError: a sketch is asked of a client without a reference model, or has more rows than that model.
    """
    plan = plan_pb2.Plan(
        version=FORMAT_VERSION,
        run_name=run_name,
        client_id=client_id,
        round=round_,
        seed=seed,
        steps=steps,
        run_key=run_key,
        pinned_round=pinned,
        reads_beside=True,
    )
    sent = Encoding(encoding)
    plan.keep_received = holding is not None and sent.is_lossy and len(adapters) > 0
    adapters = Made({slot: partial(_sendable, adapters, slot) for slot in adapters})
    down = _sent(adapters, sent, layouts_of_plan(layout, steps), holding if plan.keep_received else None)
    asked = _asked(steps, layout, reference, client_id)
    return Dispatch(
        plan,
        layout,
        pack("plan", plan, down.blobs, beside=beside),
        Made(down.received),
        {slot: expected for slot, (expected, _) in asked.items()},
        down.tensor_bytes,
        {slot: payload_size(expected, upload) for slot, (expected, upload) in asked.items()},
        frozenset(step.sketch.slot for step in steps if step.WhichOneof("kind") == "sketch"),
        down.residuals,
        down.sent_as,
        {slot: upload for slot, (_, upload) in asked.items()},
    )


@dataclass
class _Sent:
    """What goes down with a plan, by slot; see :class:`Dispatch`."""

    blobs: dict[str, bytes] = field(default_factory=dict)
    received: dict[str, Callable[[], Adapter]] = field(default_factory=dict)
    tensor_bytes: dict[str, int] = field(default_factory=dict)
    residuals: dict[str, float] = field(default_factory=dict)
    sent_as: dict[str, Encoding] = field(default_factory=dict)


def _sent(
    adapters: Mapping[str, Adapter], encoding: Encoding, known: Mapping[bytes, Layout], holding: Holding | None
) -> _Sent:
    """Encode ``adapters``: as differences if there is a ``holding``; ``known`` layouts are left out."""
    down = _Sent()
    for slot, adapter in adapters.items():
        held = holding.reference(slot, adapter) if holding is not None else None
        again = held is None and holding is not None and holding.has(slot)  # whole, and not for the first time
        used = encoding.for_starts if again else encoding
        encoded = _encode(adapter, used, held, include_layout=adapter.layout.digest not in known)
        down.blobs[slot], down.tensor_bytes[slot] = encoded.blob, encoded.payload_bytes
        down.sent_as[slot] = encoded.encoding
        if holding is not None:
            down.received[slot] = holding.send(slot, encoded.decoded)
            down.residuals[slot] = float((adapter.vector - encoded.decoded.vector).double().norm())
        else:
            down.received[slot] = partial(_as_received, adapters, slot, encoding)
    return down


def _asked(
    steps: Sequence[plan_pb2.Step], layout: Layout, reference: Layout | None, client_id: str
) -> dict[str, tuple[Layout, Encoding]]:
    """Layout and encoding of every upload that the steps ask for, by slot.

    Raises:
        LayoutError: a sketch is asked of a client without a reference model, or has too many rows.
    """
    by_kind = {kind: [getattr(s, kind) for s in steps if s.WhichOneof("kind") == kind] for kind in _UPLOADS}
    asked = {send.slot: (layout_of_part(layout, send.part), send.encoding) for send in by_kind["send"]}
    for sketch in by_kind["sketch"]:
        if reference is None:
            raise LayoutError(f"client {client_id!r} has no reference model for a sketch")
        asked[sketch.slot] = layout_of_sketch(reference, sketch.row_count), sketch.encoding
    for gram in by_kind["gram"]:
        asked[gram.slot] = layout_of_gram(layout), gram.encoding
    return {slot: (expected, encoding_from_proto(number)) for slot, (expected, number) in asked.items()}


def _encode(adapter: Adapter, encoding: Encoding, reference: Adapter | None = None, *, include_layout: bool) -> Encoded:
    """Encode; numbers beyond fp16 travel in fp32, because one client's upload must not stop the run."""
    if reference is None:
        encoding = encoding.whole
    try:
        return encode(adapter, encoding, reference=reference, include_layout=include_layout)
    except CodecError as error:
        if error.code is not CodecErrorCode.NOT_FINITE or not adapter.is_finite:
            raise
        return encode(adapter, Encoding.FP32, include_layout=include_layout)


def _sendable(adapters: Mapping[str, Adapter], slot: str) -> Adapter:
    """The adapter to send, without numbers that the server would refuse in an answer.

    A merge of uploads within the bound may exceed it (a sum of several, a product of two factors). The client would
    start from such numbers and be rejected for what it was sent. NaN becomes 0.
    """
    adapter = adapters[slot]
    if largest_of(adapter.vector) <= MAX_NUMBER:  # False for NaN, too
        return adapter
    bounded = torch.nan_to_num(adapter.vector, nan=0.0, posinf=MAX_NUMBER, neginf=-MAX_NUMBER)
    return Adapter(adapter.layout, bounded.clamp(-MAX_NUMBER, MAX_NUMBER))


def _as_received(adapters: Mapping[str, Adapter], slot: str, encoding: Encoding) -> Adapter:
    """What the client decodes; if the encoding loses nothing, all clients with the same adapter share one copy."""
    adapter = adapters[slot]
    if not encoding.is_lossy and adapter.vector.dtype == torch.float32:
        return adapter
    return _encode(adapter, encoding, include_layout=False).decoded


def register_message(node_id: int, ttl: float | None = None, content: RecordDict | None = None) -> Message:
    """Ask a node who it is; ``content`` may name the run."""
    return Message(content or RecordDict(), dst_node_id=node_id, message_type=REGISTER_TYPE, ttl=ttl)


def counters_message(node_id: int, ttl: float | None = None) -> Message:
    """Ask a node for its counters only."""
    return Message(RecordDict(), dst_node_id=node_id, message_type=COUNTERS_TYPE, ttl=ttl)
