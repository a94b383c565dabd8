"""Plans and reports as Flower messages, on the server's side: what was sent decides what is accepted back."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from flwr.app import Message, RecordDict
from google.protobuf.message import Message as ProtoMessage

from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.bank.store import Made
from fedalloy_adapters.codec import (
    MAX_BLOB_BYTES,
    CodecError,
    CodecErrorCode,
    Encoded,
    Encoding,
    decode,
    encode,
    encoding_from_proto,
    payload_size,
)
from fedalloy_adapters.flower_records import (
    COUNTERS_TYPE,
    FORMAT_VERSION,
    MAX_MESSAGE_BYTES,
    PLAN_TYPE,
    REGISTER_TYPE,
    RecordError,
    pack,
    unpack,
)
from fedalloy_adapters.layout import Layout, LayoutError
from fedalloy_adapters.parts import layout_of_gram, layout_of_part, layout_of_sketch, layouts_of_plan
from fedalloy_adapters.words import one_line
from proto.fedalloy.v1 import plan_pb2, report_pb2

CLIENT_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""Client ids, run names and slot names become folder names."""
MAX_NUMBER = 1e9
"""No trained adapter comes near; products of larger numbers would overflow in a merge and take the server down."""
MAX_SUM = 1e60
"""No sum of squares or of damped inverses comes near; sums, products and squares of larger numbers would overflow."""
MAX_INTEGER = 2**63 - 1
MAX_TASKS, MAX_METRICS, MAX_NOTES, MAX_CONNECTIONS = 1000, 1000, 1000, 256
"""What one client may register, and report of one evaluation: it is written to ``rounds.jsonl`` in every round."""
MAX_REASON = 400
"""Characters of a reason of ours that may have a stranger's words in it."""
METRIC_NAME = re.compile(r"(?:[\w][\w .&+-]{0,63}/)?[a-z][a-z0-9_]{0,39}")
"""A metric, after the name of its task where there are several: it becomes a column's head and a word in a report."""
_RANGES = {
    "accuracy": (0.0, 1.0),
    "f1": (0.0, 1.0),
    "exact_match": (0.0, 1.0),
    "rouge_l": (0.0, 1.0),
    "chrf": (0.0, 100.0),
    "loss": (0.0, 1e60),
    "perplexity": (0.0, 1e308),
}
_PER_MODULE = {
    "fisher": [name for name, field in report_pb2.FisherResult.DESCRIPTOR.fields_by_name.items() if field.is_repeated],
    "distance": ["squared"],
}


class BadAnswerError(ValueError):
    """A client's reply is an error, or is not what the plan asked for.

    The finding may be in a stranger's words and goes to logs: it is cut, and is one line of printable text.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message, MAX_REASON))


@dataclass(frozen=True)
class Dispatch:
    """One client's message of one round, and what its answer must look like; ``layout`` is the client's.

    ``received`` has the adapters as the client will decode them, made again when they are asked for; ``expected`` the
    layout of every upload asked for;
    ``tensor_bytes`` the encoded numbers alone, by slot, and ``upload_bytes`` those of the uploads asked for;
    ``sketches`` names the uploads that are sketches.
    """

    plan: plan_pb2.Plan
    layout: Layout
    content: RecordDict
    received: Mapping[str, Adapter]
    expected: Mapping[str, Layout]
    tensor_bytes: Mapping[str, int]
    upload_bytes: Mapping[str, int]
    sketches: frozenset[str] = frozenset()

    @property
    def max_answer_bytes(self) -> int:
        """Most bytes that an answer to this may have."""
        return MAX_MESSAGE_BYTES + sum(_max_blob_bytes(layout) for layout in self.expected.values())

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
) -> Dispatch:
    """Encode one client's round. ``layout`` and ``reference`` are as registered, and need no repeating.

    Raises:
        LayoutError: a sketch is asked of a client that registered no reference model, or of more rows than that has.
    """
    plan = plan_pb2.Plan(
        version=FORMAT_VERSION,
        run_name=run_name,
        client_id=client_id,
        round=round_,
        seed=seed,
        steps=steps,
        run_key=run_key,
    )
    blobs: dict[str, bytes] = {}
    received: dict[str, Callable[[], Adapter]] = {}
    tensor_bytes: dict[str, int] = {}
    known = layouts_of_plan(layout, steps)
    for slot, adapter in adapters.items():
        encoded = _encode(adapter, Encoding(encoding), include_layout=adapter.layout.digest not in known)
        blobs[slot], tensor_bytes[slot] = encoded.blob, encoded.payload_bytes
        received[slot] = partial(_as_received, adapters, slot, Encoding(encoding))
    expected = {
        step.send.slot: layout_of_part(layout, step.send.part) for step in steps if step.WhichOneof("kind") == "send"
    }
    upload_bytes = {
        step.send.slot: payload_size(expected[step.send.slot], encoding_from_proto(step.send.encoding))
        for step in steps
        if step.WhichOneof("kind") == "send"
    }
    sketches = [step.sketch for step in steps if step.WhichOneof("kind") == "sketch"]
    for sketch in sketches:
        if reference is None:
            raise LayoutError(f"client {client_id!r} has no reference model for a sketch")
        expected[sketch.slot] = layout_of_sketch(reference, sketch.row_count)
        upload_bytes[sketch.slot] = payload_size(expected[sketch.slot], encoding_from_proto(sketch.encoding))
    for gram in [step.gram for step in steps if step.WhichOneof("kind") == "gram"]:
        expected[gram.slot] = layout_of_gram(layout)
        upload_bytes[gram.slot] = payload_size(expected[gram.slot], encoding_from_proto(gram.encoding))
    return Dispatch(
        plan,
        layout,
        pack("plan", plan, blobs),
        Made(received),
        expected,
        tensor_bytes,
        upload_bytes,
        frozenset(sketch.slot for sketch in sketches),
    )


def _encode(adapter: Adapter, encoding: Encoding, *, include_layout: bool) -> Encoded:
    """Numbers that fp16 does not have (one client's upload is enough) travel as they are: the run must go on."""
    try:
        return encode(adapter, encoding, include_layout=include_layout)
    except CodecError as error:
        if error.code is not CodecErrorCode.NOT_FINITE or not adapter.is_finite:
            raise
        return encode(adapter, Encoding.FP32, include_layout=include_layout)


def _as_received(adapters: Mapping[str, Adapter], slot: str, encoding: Encoding) -> Adapter:
    """What the client decodes; where nothing is lost, one copy of the numbers serves all that are sent the same."""
    adapter = adapters[slot]
    if not encoding.is_lossy and adapter.vector.dtype == torch.float32:
        return adapter
    return _encode(adapter, encoding, include_layout=False).decoded


def register_message(node_id: int, ttl: float | None = None) -> Message:
    """Ask a node who it is."""
    return Message(RecordDict(), dst_node_id=node_id, message_type=REGISTER_TYPE, ttl=ttl)


def counters_message(node_id: int, ttl: float | None = None) -> Message:
    """Ask a node for its counters only."""
    return Message(RecordDict(), dst_node_id=node_id, message_type=COUNTERS_TYPE, ttl=ttl)


def read_registration(reply: Message, node_id: int | None = None) -> tuple[report_pb2.Registration, Layout]:
    """The registration in a reply, with its validated layout.

    Args:
        reply: what the node answered.
        node_id: who was asked, where that is known: an error that the SuperLink made does not say.

    Raises:
        BadAnswerError: the node answered with an error, or its registration is not valid.
    """
    node = f"node {reply.metadata.src_node_id if node_id is None else node_id}"
    _require_content(reply, node)
    try:
        registration, _ = unpack(reply.content, "registration", report_pb2.Registration)
        if not CLIENT_ID.fullmatch(registration.client_id):
            raise RecordError(
                f"client id {registration.client_id[:80]!r}: expected 1 to 64 letters, digits, '.', '_' or '-', "
                "starting with a letter or digit"
            )
        if len(registration.tasks) > MAX_TASKS:
            raise RecordError(f"{len(registration.tasks)} tasks, expected at most {MAX_TASKS}")
        notes = sum(len(task.notes) for task in registration.tasks)
        if notes > MAX_NOTES:
            raise RecordError(f"{notes} notes, expected at most {MAX_NOTES}")
        layout = Layout.from_proto(registration.layout)
        try:
            require_size(layout)
        except LayoutError as error:
            raise LayoutError(f"client {registration.client_id!r}: {error}") from None
    except (RecordError, LayoutError) as error:
        raise BadAnswerError(f"{node} sent a registration that is not valid: {error}") from None
    _require_sane(f"client {registration.client_id!r} ({node})", registration)
    return registration, layout


def require_size(layout: Layout) -> None:
    """A layout is a claim, and the server is about to allocate it.

    Raises:
        LayoutError: more numbers than any blob can hold.
    """
    if payload_size(layout, Encoding.FP32) > MAX_BLOB_BYTES:
        raise LayoutError(f"claims {layout.size} numbers, expected at most {MAX_BLOB_BYTES // 4}")


def read_counters(reply: Message) -> report_pb2.Counters:
    """The counters in a reply.

    Raises:
        BadAnswerError: the node answered with an error or something else.
    """
    node = f"node {reply.metadata.src_node_id}"
    _require_content(reply, node)
    try:
        counters = unpack(reply.content, "counters", report_pb2.Counters)[0]
    except RecordError as error:
        raise BadAnswerError(f"{node}: {error}") from None
    _require_sane(node, counters)
    return counters


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
    for index, (step, result) in enumerate(zip(plan.steps, report.results, strict=True)):
        _require_same_step(f"{who}, step {index}", step, result)
        _require_complete(f"{who}, step {index}", step, result, len(dispatch.layout.modules))
    _require_sane(who, report)
    if set(blobs) != set(dispatch.expected):
        raise BadAnswerError(f"{who} sent the slots {sorted(blobs)}, expected {sorted(dispatch.expected)}")
    adapters = {}
    for slot, blob in blobs.items():
        layout = dispatch.expected[slot]
        try:
            references, limit = _References(dispatch, layout), _max_blob_bytes(layout)
            adapters[slot] = decode(blob, expected=layout, references=references, max_bytes=limit)
        except CodecError as error:
            raise BadAnswerError(f"{who} sent slot {slot!r}: {error}") from None
        largest = float(adapters[slot].vector.abs().max())
        if largest > MAX_NUMBER:
            raise BadAnswerError(
                f"{who} sent slot {slot!r} with numbers up to {largest:.3g}, expected at most {MAX_NUMBER:g}"
            )
    return report, adapters


def _max_blob_bytes(layout: Layout) -> int:
    """Twice the plain numbers bounds any encoding with its header; a longer blob is refused unread."""
    return 2 * payload_size(layout, Encoding.FP32) + 2**20


class _References(Mapping[bytes, Adapter]):
    """What the client may have sent a difference from, by digest; made only for an upload that names one."""

    def __init__(self, dispatch: Dispatch, layout: Layout) -> None:
        self._dispatch, self._layout = dispatch, layout

    def __getitem__(self, digest: bytes) -> Adapter:
        for adapter in self._dispatch.received.values():
            if adapter.layout.contains(self._layout):
                part = adapter if adapter.layout.digest == self._layout.digest else adapter.part(self._layout)
                if part.digest == digest:
                    return part
        raise KeyError(digest)

    def __iter__(self) -> Iterator[bytes]:
        raise NotImplementedError("references are looked up by digest")

    def __len__(self) -> int:
        return len(self._dispatch.received)


def _require_content(reply: Message, who: str) -> None:
    if reply.has_error():
        raise BadAnswerError(f"{who} failed (Flower error {reply.error.code}): {reply.error.reason}")


def _require_same_step(where: str, step: plan_pb2.Step, result: report_pb2.StepResult) -> None:
    """What a result says about its step is what the plan said: the label decides who reads the metrics."""
    names = {"evaluate": ("label", "split"), "send": ("slot",), "sketch": ("slot",), "gram": ("slot",)}
    kind = step.WhichOneof("kind") or ""
    for name in names.get(kind, ()):
        found, wanted = getattr(getattr(result, kind), name), getattr(getattr(step, kind), name)
        if found != wanted:
            raise BadAnswerError(f"{where} ({kind}): reports {name} {found[:200]!r}, expected {wanted!r}")
    if kind == "select":
        for name in ("losses", "weights"):
            numbers = getattr(result.select, name)
            if len(numbers) != len(step.select.slots):
                raise BadAnswerError(
                    f"{where} (select): {len(numbers)} numbers in {name}, expected one for each of "
                    f"{len(step.select.slots)} candidates"
                )
        if any(not 0 <= weight <= 1 for weight in result.select.weights):
            raise BadAnswerError(f"{where} (select): weights {list(result.select.weights)}, expected 0 to 1")


def _require_complete(where: str, step: plan_pb2.Step, result: report_pb2.StepResult, modules: int) -> None:
    """An evaluation has a loss, a replacement an outcome for every rule.

    Lists with one number per module have one per module, from 0 to ``MAX_SUM``.
    """
    kind = result.WhichOneof("kind") or ""
    if kind == "replace":
        found, wanted = ([item.task for item in items] for items in (result.replace.tasks, step.replace.rules))
        if found != wanted:
            raise BadAnswerError(f"{where} (replace): reports tasks {str(found)[:200]}, expected {wanted}")
    if kind == "evaluate":
        _require_metrics(f"{where} (evaluate)", result.evaluate.metrics)
    if kind == "evaluate" and "loss" not in result.evaluate.metrics:
        raise BadAnswerError(f"{where} (evaluate): no loss under the label {result.evaluate.label!r}")
    if kind not in ("fisher", "distance"):
        return
    body = getattr(result, kind)
    for name in _PER_MODULE[kind]:
        numbers = getattr(body, name)
        if len(numbers) != modules:
            raise BadAnswerError(
                f"{where} ({kind}): {len(numbers)} numbers in {name}, expected one for each of {modules} modules"
            )
        if any(not 0 <= number <= MAX_SUM for number in numbers):
            raise BadAnswerError(
                f"{where} ({kind}): {name} has {min(numbers):g} to {max(numbers):g}, expected 0 to {MAX_SUM:g}"
            )


def _require_metrics(where: str, metrics: Mapping[str, float]) -> None:
    """Names that can be shown anywhere, and what is known of a metric's range."""
    if len(metrics) > MAX_METRICS:
        raise BadAnswerError(f"{where}: {len(metrics)} metrics, expected at most {MAX_METRICS}")
    for name in metrics:
        if not METRIC_NAME.fullmatch(name):
            raise BadAnswerError(f"{where}: a metric {name[:80]!r}, expected a name like 'accuracy' or 'task/accuracy'")
        low, high = _RANGES.get(name.rpartition("/")[2], (-MAX_SUM, MAX_SUM))
        if math.isfinite(metrics[name]) and not low <= metrics[name] <= high:
            raise BadAnswerError(f"{where}: {name} = {metrics[name]:g}, expected {low:g} to {high:g}")


def _require_sane(who: str, message: ProtoMessage) -> None:
    """No NaN, no infinity, nothing that overflows where it is added up, no integer that a database cannot hold.

    A socket's cookie is a name, not a number.
    """
    wire = getattr(message, "wire", None)
    if wire is not None and len(wire.connections) > MAX_CONNECTIONS:
        raise BadAnswerError(f"{who} reports {len(wire.connections)} connections, expected at most {MAX_CONNECTIONS}")
    for name, number in _numbers(message):
        if not math.isfinite(number):
            raise BadAnswerError(f"{who} reports {name} = {number}, expected a finite number")
        if isinstance(number, float) and abs(number) > MAX_SUM:
            raise BadAnswerError(f"{who} reports {name} = {number:g}, expected at most {MAX_SUM:g}")
        if number > MAX_INTEGER and isinstance(number, int) and not name.endswith(".cookie"):
            raise BadAnswerError(f"{who} reports {name} = {number}, expected at most {MAX_INTEGER}")


def _numbers(message: ProtoMessage, path: str = "") -> Iterator[tuple[str, float]]:
    """Every number in a message with its path, like ``results[1].train.mean_loss``."""
    for field, value in message.ListFields():
        items: list[tuple[str, object]]
        if isinstance(value, Mapping):
            items = [(f"{path}{field.name}[{str(key)[:80]!r}]", value[key]) for key in value]
        elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
            items = [(f"{path}{field.name}[{index}]", item) for index, item in enumerate(value)]
        else:
            items = [(f"{path}{field.name}", value)]
        for name, item in items:
            if isinstance(item, ProtoMessage):
                yield from _numbers(item, f"{name}.")
            elif isinstance(item, float | int):
                yield name, item
