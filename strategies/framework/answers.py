"""Replies of clients, read and checked: a registration, an answer to a plan, counters.

What was sent decides what is accepted back.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from flwr.app import Message
from google.protobuf.message import Message as ProtoMessage

from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.layout import Layout, LayoutError
from fedalloy_adapters.parts import layout_of_sketch
from fedalloy_adapters.wire.codec import MAX_BLOB_BYTES, CodecError, Encoding, decode, payload_size
from fedalloy_adapters.wire.flower_records import RecordError, unpack
from proto.fedalloy.v1 import plan_pb2, report_pb2
from strategies.framework.dispatch import Dispatch
from strategies.framework.exchange import MAX_NUMBER, Answer, BadAnswerError, Client
from strategies.framework.limits import Limits, bounded, require_affordable

CLIENT_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""Client ids, run names and slot names become folder names."""
MAX_SUM = 1e60
"""No sum of squares or of damped inverses comes near; sums, products and squares of larger numbers may overflow."""
MAX_INTEGER = 2**63 - 1
MAX_COUNTER = 2**50
"""Most bytes or segments of one connection: a petabyte, so that many of them can still be added up."""
MAX_TASKS, MAX_METRICS, MAX_NOTES, MAX_CONNECTIONS = 1000, 1000, 1000, 256
"""Most that one client may register, or report about one evaluation: ``rounds.jsonl`` has it in every round."""
METRIC_NAME = re.compile(r"(?:[\w][\w .&+-]{0,63}/)?[a-z][a-z0-9_]{0,39}(?::[\w][\w .&+-]{0,63})?")
"""A metric's name, after its task's name if there are several tasks: it becomes a column's heading in a report."""
_RANGES = {
    "accuracy": (0.0, 1.0),
    "f1": (0.0, 1.0),
    "auroc": (0.0, 1.0),
    "ece": (0.0, 1.0),
    "exact_match": (0.0, 1.0),
    "rouge_l": (0.0, 1.0),
    "chrf": (0.0, 100.0),
    "loss": (0.0, 1e60),
    "perplexity": (0.0, 1e308),
}


def _lists_of(message: type[ProtoMessage]) -> list[str]:
    """Fields that are lists of numbers."""
    fields = message.DESCRIPTOR.fields_by_name.items()
    return [name for name, field in fields if field.is_repeated and field.message_type is None]


_PER_MODULE = {
    "fisher": _lists_of(report_pb2.FisherResult),
    "distance": _lists_of(report_pb2.DistanceResult),
    "fisher.more": _lists_of(report_pb2.DampedFisher),
}


def read_client(reply: Message, node_id: int, limits: Limits) -> Client:
    """The client that a reply registers, within the limits of the run.

    Args:
        reply: what the node answered.
        node_id: the node that was asked.
        limits: the run's.

    Raises:
        BadAnswerError: the node answered with an error, its registration is not valid, or its adapter is too large.
    """
    client = client_from(*read_registration(reply, node_id), node_id)
    require_affordable(limits, client)
    return client


def claimed_id(reply: Message) -> str:
    """The client id in a registration that may otherwise be wrong; empty if there is none."""
    try:
        said = unpack(reply.content, "registration", report_pb2.Registration)[0].client_id
    except RecordError:
        return ""
    return said if CLIENT_ID.fullmatch(said) else ""


def read_registration(reply: Message, node_id: int | None = None) -> tuple[report_pb2.Registration, Layout]:
    """The registration in a reply, with its validated layout.

    Args:
        reply: what the node answered.
        node_id: the node that was asked, if known: an error from the SuperLink itself does not name it.

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


def client_from(registration: report_pb2.Registration, layout: Layout, node_id: int) -> Client:
    """The client that a checked registration describes.

    Raises:
        BadAnswerError: its reference model's layout is not valid.
    """
    reference = None
    if registration.HasField("reference"):
        try:
            reference = Layout.from_proto(registration.reference)
            require_size(reference)
            layout_of_sketch(reference, 1)
            reference = reference.shared
        except LayoutError as error:
            raise BadAnswerError(f"client {registration.client_id!r}: reference model: {error}") from None
    rest = _without_layouts(registration)
    client = Client(registration.client_id, node_id, layout.shared, 0, registration.base_model, rest, reference)
    return replace(client, examples=client.claimed)


def _without_layouts(registration: report_pb2.Registration) -> report_pb2.Registration:
    """A registration without its layouts, which a thousand clients have in common; read anew to free their memory."""
    rest = report_pb2.Registration()
    rest.CopyFrom(registration)
    rest.ClearField("layout")
    rest.ClearField("reference")
    return report_pb2.Registration.FromString(rest.SerializeToString())


def require_size(layout: Layout) -> None:
    """Check the size that a layout claims, because the server is about to allocate it.

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


def answer_from(dispatch: Dispatch, reply: Message, limits: Limits | None = None) -> Answer:
    """The checked answer in a client's reply, within the limits of the run.

    Raises:
        BadAnswerError: the reply is an error, not what the plan asked for, or beyond a limit; names client and reason.
    """
    report, adapters = read_answer(dispatch, reply)
    kept = bounded(limits or Limits(), dispatch, adapters)
    metrics = {
        result.evaluate.label: dict(result.evaluate.metrics)
        for result in report.results
        if result.WhichOneof("kind") == "evaluate"
    }
    return Answer(kept.adapters, dispatch.received, metrics, int(report.examples), report, kept.clipped)


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
            adapters[slot] = decode(
                blob, expected=layout, encoding=dispatch.asked_as[slot], references=_References(dispatch, layout),
                max_bytes=dispatch.max_blob_bytes(slot),
            )  # fmt: skip
        except CodecError as error:
            raise BadAnswerError(f"{who} sent slot {slot!r}: {error}") from None
        largest = float(adapters[slot].vector.abs().max())
        if largest > MAX_NUMBER:
            raise BadAnswerError(
                f"{who} sent slot {slot!r} with numbers up to {largest:.3g}, expected at most {MAX_NUMBER:g}"
            )
    return report, adapters


class _References(Mapping[bytes, Adapter]):
    """The adapters that an upload may be a difference from, by digest; made only for an upload that names one."""

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
    """Require that a result describes its step as the plan did: the label decides who reads the metrics."""
    names = {"evaluate": ("label", "split"), "send": ("slot",), "sketch": ("slot",), "gram": ("slot",)}
    kind = step.WhichOneof("kind") or ""
    for name in names.get(kind, ()):
        found, wanted = getattr(getattr(result, kind), name), getattr(getattr(step, kind), name)
        if found != wanted:
            raise BadAnswerError(f"{where} ({kind}): reports {name} {found[:200]!r}, expected {wanted!r}")
    if kind == "density":
        _require_density(f"{where} (density)", step.density, result.density)
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
    if kind == "search":
        for name in ("coefficients", "slot_losses"):
            numbers = getattr(result.search, name)
            if len(numbers) != len(step.search.slots):
                raise BadAnswerError(
                    f"{where} (search): {len(numbers)} numbers in {name}, expected one for each of "
                    f"{len(step.search.slots)} slots"
                )
        if any(abs(number) > step.search.bound for number in result.search.coefficients):
            raise BadAnswerError(
                f"{where} (search): coefficients {list(result.search.coefficients)}, expected at most "
                f"{step.search.bound:g}"
            )


def _require_density(where: str, step: plan_pb2.DensityStep, result: report_pb2.DensityResult) -> None:
    """Require a share of each slot, and moments of each Gaussian (if the plan has none, of one)."""
    weights, wanted = [gaussian.weight for gaussian in result.gaussians], max(1, len(step.gaussians))
    for name, shares, count in (("shares", list(result.shares), len(step.slots)), ("gaussians", weights, wanted)):
        if len(shares) != count or any(share < 0 for share in shares) or not abs(sum(shares) - 1) < 1e-6:
            raise BadAnswerError(f"{where}: {len(shares)} {name}, expected {count} of them that sum to 1")
    for gaussian in result.gaussians:
        if len(gaussian.mean) != step.dimensions or len(gaussian.variance) != step.dimensions:
            raise BadAnswerError(f"{where}: a Gaussian's moments are not {step.dimensions} numbers each")
        if any(abs(mean) > MAX_NUMBER for mean in gaussian.mean):
            raise BadAnswerError(f"{where}: a mean beyond {MAX_NUMBER:g}")
        if any(not 0 <= variance <= MAX_NUMBER**2 for variance in gaussian.variance):
            raise BadAnswerError(f"{where}: a variance that is not from 0 to {MAX_NUMBER**2:g}")


def _require_complete(where: str, step: plan_pb2.Step, result: report_pb2.StepResult, modules: int) -> None:
    """Require a loss of each evaluation, unless the client's owner withholds scores, and an outcome of each rule.

    Lists by module must have one number per module, from 0 to ``MAX_SUM``.
    """
    kind = result.WhichOneof("kind") or ""
    if kind == "replace":
        found, wanted = ([item.task for item in items] for items in (result.replace.tasks, step.replace.rules))
        if found != wanted:
            raise BadAnswerError(f"{where} (replace): reports tasks {str(found)[:200]}, expected {wanted}")
    if kind == "evaluate":
        metrics = result.evaluate.metrics
        _require_metrics(f"{where} (evaluate)", metrics)
        if "loss" not in metrics and not (result.evaluate.withheld and not metrics):
            raise BadAnswerError(f"{where} (evaluate): no loss under the label {result.evaluate.label!r}")
    if kind not in ("fisher", "distance"):
        return
    _require_lists(where, kind, getattr(result, kind), modules)
    if kind == "fisher" and len(result.fisher.more) != len(step.fisher.more_dampings):
        raise BadAnswerError(
            f"{where} (fisher): {len(result.fisher.more)} more dampings, expected {len(step.fisher.more_dampings)}"
        )
    for more in result.fisher.more if kind == "fisher" else ():
        _require_lists(where, "fisher.more", more, modules)


def _require_lists(where: str, kind: str, body: ProtoMessage, modules: int) -> None:
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
    """Require names that can be shown anywhere, and numbers in the metric's range, if that is known."""
    if len(metrics) > MAX_METRICS:
        raise BadAnswerError(f"{where}: {len(metrics)} metrics, expected at most {MAX_METRICS}")
    for name in metrics:
        if not METRIC_NAME.fullmatch(name):
            raise BadAnswerError(f"{where}: a metric {name[:80]!r}, expected a name like 'accuracy' or 'task/accuracy'")
        low, high = _RANGES.get(name.rpartition("/")[2].partition(":")[0], (-MAX_SUM, MAX_SUM))
        if math.isfinite(metrics[name]) and not low <= metrics[name] <= high:
            raise BadAnswerError(f"{where}: {name} = {metrics[name]:g}, expected {low:g} to {high:g}")


def _require_sane(who: str, message: ProtoMessage) -> None:
    """Refuse NaN, infinity, numbers that would overflow when added up, and integers that a database cannot hold.

    A socket's cookie is a name, not a number, so it may have any value.
    """
    wire = getattr(message, "wire", None)
    if wire is not None and len(wire.connections) > MAX_CONNECTIONS:
        raise BadAnswerError(f"{who} reports {len(wire.connections)} connections, expected at most {MAX_CONNECTIONS}")
    for name, number in _numbers(message):
        if not math.isfinite(number):
            raise BadAnswerError(f"{who} reports {name} = {number}, expected a finite number")
        if isinstance(number, float) and abs(number) > MAX_SUM:
            raise BadAnswerError(f"{who} reports {name} = {number:g}, expected at most {MAX_SUM:g}")
        most = MAX_COUNTER if ".connections[" in name else MAX_INTEGER
        if number > most and isinstance(number, int) and not name.endswith(".cookie"):
            raise BadAnswerError(f"{who} reports {name} = {number}, expected at most {most}")


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
