"""The outcome of a client in a phase: the ``status`` in ``rounds.jsonl``, and its line in the log."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from flwr.app import Message

from fedalloy_adapters.wire.codec import CodecErrorCode
from fedalloy_adapters.words import one_line
from proto.fedalloy.v1 import report_pb2
from server_app.run.messages.exchange import NODE_UNAVAILABLE
from server_app.run.messages.reasons import reason_of
from server_app.run.messages.replies import REFUSED
from strategies.framework.exchange import Answer, Client

OK = "ok"
"""A usable answer came in time and counts."""
REJECTED = "rejected"
"""An answer came and was refused: not what was asked for, for another round, not finite, too far, twice, ..."""
FAILED = "failed"
"""The client reported a failure, or its process ended more than once."""
LATE = "late"
"""No answer came in time; one that comes later is counted in ``late_answers`` of a later record, and not used."""
LEFT = "left"
"""The client's node went away during the phase and did not come back in time."""
ABSENT = "absent"
"""The client's node was not online when the phase began; it was not asked."""
RESTED = "rested"
"""The client was online and not asked, because it had been silent or refused several times in a row (``strikes``)."""
OUTCOMES = (OK, REJECTED, FAILED, LATE, LEFT, ABSENT, RESTED)

SHOWN = 5
SPENT = {
    "evaluation": ("evaluate", "select", "search"),
    "statistics": ("fisher", "sketch", "gram", "distance", "attribute", "density", "likeness"),
}
"""Kinds of steps by the name under which their time is recorded, beside training."""
EVALUATED = ("personal", "held-out")
"""Evaluations whose record names the split and the number of examples."""
ClientRecord = dict[str, Any]


def usable(records: Mapping[str, ClientRecord]) -> int:
    """How many clients gave an answer that counts."""
    return len([record for record in records.values() if record["status"] == OK])


def of_registration(client: Client, key: str, seconds: float) -> ClientRecord:
    """A client's identity: its registration, its node, and the name under which its key is registered."""
    said = client.registration
    record: ClientRecord = {
        "status": OK,
        "examples": client.examples,
        "seconds": round(seconds, 3),
        "node": str(client.node_id),
        "key": key,
        "tasks": sorted({one_line(task.kind, 60) for task in client.registration.tasks}),
        "base": one_line(client.base_model),
        "trainer": "installed" if said.trainer == report_pb2.TRAINER_MODE_INSTALLED else "bundled",
    }
    if said.HasField("privacy"):
        record["privacy"] = privacy_of(said.privacy)
    return record


def privacy_of(said: report_pb2.RecordPrivacy) -> dict[str, Any]:
    """What a client reports about the privacy of its training examples."""
    return {
        "epsilon": round(said.epsilon, 6),
        "delta": said.delta,
        "budget": said.budget,
        "noise_multiplier": said.noise_multiplier,
        "covers": one_line(said.covers),
    }


def of_silence(waited: float, timeout: float, quorum: int = 0) -> ClientRecord:
    """No answer within ``round-timeout``, or within less: a quorum (``cut_off``) or ``grace-ratio`` ended the round."""
    record: ClientRecord = {"status": LATE, "reason": f"no answer within {min(waited, timeout):.0f} s"}
    if waited < timeout and quorum:
        record |= {"reason": f"{record['reason']}, when the quorum's grace period ended", "cut_off": True}
    elif waited < timeout:
        record["reason"] += ", when most had long answered (grace-ratio)"
    return record


def of_error(message: Message) -> ClientRecord:
    """The client's or Flower's error instead of an answer."""
    status = {NODE_UNAVAILABLE: LEFT, REFUSED: REJECTED}.get(message.error.code, FAILED)
    return {"status": status, "reason": reason_of(message.error)}


def has_lost_reference(message: Message) -> bool:
    """The client does not hold the adapter from which it was sent a difference; it keeps nothing of that plan."""
    return message.has_error() and CodecErrorCode.UNKNOWN_REFERENCE in (message.error.reason or "")


def of_answer(answer: Answer, residuals: Mapping[str, float] | None = None) -> ClientRecord:
    """The record of a good answer, including the norms of what encodings have dropped so far in both directions."""
    results = answer.report.results
    trains = [r.distill.train if r.HasField("distill") else r.train for r in results if _trains(r)]
    record: ClientRecord = {
        "status": OK,
        "client_seconds": round(answer.report.seconds, 3),
        "train_seconds": round(sum(train.seconds for train in trains), 3),
        **{f"{what}_seconds": round(_seconds(answer, kinds), 3) for what, kinds in SPENT.items()},
        "train_loss": [None if train.diverged or train.withheld else round(train.mean_loss, 6) for train in trains],
        "metrics": {label: dict(values) for label, values in answer.metrics.items()},
    }
    scored = [r.evaluate for r in results if r.HasField("evaluate") and r.evaluate.metrics]
    looked = [evaluated for evaluated in scored if evaluated.label in EVALUATED]
    if looked:
        record["evaluated"] = {e.label: {"split": e.split, "examples": e.examples} for e in looked}
    if answer.report.HasField("privacy"):
        record["privacy"] = privacy_of(answer.report.privacy)
    if residuals:
        record["down_residual"] = {slot: float(f"{norm:.6g}") for slot, norm in residuals.items()}
    kept = {r.send.slot: r.send.residual_norm for r in results if r.HasField("send") and r.send.residual_norm}
    if kept:
        record["up_residual"] = {slot: float(f"{norm:.6g}") for slot, norm in kept.items()}
    if answer.clipped:
        record["clipped"] = clipped(answer)
    return record


def _seconds(answer: Answer, kinds: Collection[str]) -> float:
    return sum(result.seconds for result in answer.report.results if result.WhichOneof("kind") in kinds)


def times_of(record: ClientRecord) -> dict[str, float]:
    """Seconds of training, evaluation and statistics, as the client reports, but together at most its answer's time."""
    left, found = float(record.get("seconds", 0.0)), {}
    for what in ("train", *SPENT):
        found[what] = min(float(record.get(f"{what}_seconds", 0.0)), left)
        left -= found[what]
    return found


def clipped(answer: Answer) -> dict[str, float]:
    """The norms of updates that were too long, by slot."""
    return {slot: round(norm, 6) for slot, norm in answer.clipped.items()}


def clipped_line(record: ClientRecord) -> str:
    """These norms in words."""
    return ", ".join(f"{slot} clipped from norm {norm:g}" for slot, norm in record["clipped"].items())


def _trains(result: report_pb2.StepResult) -> bool:
    return result.WhichOneof("kind") in ("train", "distill")


def line(record: ClientRecord) -> str:
    """One client's record as a line of the log."""
    if record["status"] != OK:
        return f"{record['status']} ({record.get('reason', '')})"
    times = {what: seconds for what, seconds in times_of(record).items() if seconds >= 0.05}
    told = ", ".join(f"{'training' if what == 'train' else what} {seconds:.1f}" for what, seconds in times.items())
    parts = [f"{record['seconds']:.1f} s ({told})" if told else f"{record['seconds']:.1f} s"]
    if "privacy" in record:
        parts.append(f"epsilon {record['privacy']['epsilon']:.3f} of {record['privacy']['budget']:g}")
    else:
        parts += ["diverged" if loss is None else f"loss {loss:.3f} in training" for loss in record["train_loss"]]
    parts += [clipped_line(record)] if "clipped" in record else []
    scored = [
        f"{label} {name} {metrics[name]:.3f}{_of_answers(name, metrics)}"
        for label, metrics in record["metrics"].items()
        for name in (("accuracy",) if "accuracy" in metrics else ("exact_match", "perplexity"))
        if name in metrics
    ]
    scored.sort(key=lambda text: not text.startswith("personal "))  # a line search has dozens
    if record["train_loss"] and scored and scored[0].startswith("personal "):  # every plan evaluates first
        scored[0] = f"before it: {scored[0]}"
    parts += scored[:SHOWN] + [f"... ({len(scored) - SHOWN} more in rounds.jsonl)"] * (len(scored) > SHOWN)
    return ", ".join(parts)


def _of_answers(name: str, metrics: Mapping[str, float]) -> str:
    return f" of {metrics['answers']:.0f} answers" if name == "exact_match" and "answers" in metrics else ""
