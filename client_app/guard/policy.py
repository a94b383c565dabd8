"""The owner's policy: what a server may ask of this client, and how it is refused.

The owner's node-config decides (``client.allow-steps``, ...). For a key that it does not set, the server's run-config
can make the bound stricter than the default, never looser.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from proto.fedalloy.v1 import plan_pb2

STEPS = tuple(field.name for field in plan_pb2.Step.DESCRIPTOR.fields)
_NOTHING = "none"
_MAX_COUNTS = 1000
"""Counts of measured examples that are remembered for each split."""
STATISTICS = ("sketch", "fisher", "gram", "attribute", "density", "likeness", "select", "search")
"""Kinds of steps whose result is about examples, and neither a model nor its score."""


Parts = Callable[[str], Sequence[int]]


class PolicyError(ValueError):
    """The plan asks for something that this client's owner does not allow; the message names the key."""

    @property
    def told(self) -> str:
        """The whole message: the server may know its own request and the bound."""
        return str(self)


@dataclass(frozen=True)
class Policy:
    """The bounds; the field ``allow_steps`` is the key ``client.allow-steps``. 0: no bound."""

    allow_steps: str = ""
    """Comma-separated kinds of steps that a plan may contain (proto/README.md has the list); empty: all."""
    max_upload_mb: float = 0.0
    """Bound on all uploads of one plan together, in megabytes (10^6 bytes)."""
    max_download_mb: float = 4096.0
    """Bound on all adapters that come with one plan, in megabytes."""
    min_examples: int = 2
    """Fewest different examples that one step may train on or measure. Two different measurements of one split in a run
    must differ by at least as many examples; otherwise their difference would be about fewer."""
    max_steps: int = 100_000
    """Most training steps in one plan, batches of sketches among them; sharpness-aware ones count twice."""
    max_evaluations: int = 5_000
    """Most passes over a split in one plan: evaluations, candidates of selections, attributions."""
    max_slots: int = 1_000
    """Most slots that one plan may name."""
    max_rounds: int = 100_000
    """Largest number of a round."""
    max_seconds: float = 86_400.0
    """Longest time that one plan may take."""
    max_run_steps: int = 10_000_000
    """Most training steps in all plans of a run, including plans that were broken off."""
    max_run_evaluations: int = 500_000
    """Most evaluations and other passes over a split in a run."""
    max_run_statistics: int = 10_000
    """Most statistics of examples in a run: sketches, Fisher sums, Gram matrices, attributions, selections."""
    max_run_upload_mb: float = 0.0
    """Bound on all uploads of a run together, in megabytes."""
    max_total_steps: int = 0
    """Most training steps of all runs together."""
    max_total_upload_mb: float = 0.0
    """Bound on all uploads of all runs together, in megabytes."""
    min_sketch_noise: float = 0.0
    """Least standard deviation of the noise in every number of a sketch."""
    private_slots: str = ""
    """Comma-separated slots that never leave the client, nor anything made of them; a strategy that sends one is
    refused."""
    lend_adapter: bool = False
    """Whether clients that never trained may be given this client's adapter (``fedalloy adopt``): it is then on their
    machines. Only the owner decides this: run-config cannot set it."""

    def __post_init__(self) -> None:
        for name in self.allowed:
            if name not in STEPS:
                raise ValueError(f"client.allow-steps = {name!r}, expected one of {', '.join(STEPS)}")
        for item in fields(self):
            value = getattr(self, item.name)
            if not isinstance(value, str) and not 0 <= value < float("inf"):
                raise ValueError(f"{_key(item.name)} = {value}, expected a number of at least 0")

    @property
    def allowed(self) -> tuple[str, ...]:
        """The kinds of steps that a plan may contain."""
        named = _names(self.allow_steps)
        return () if named == (_NOTHING,) else named or STEPS

    @property
    def private(self) -> frozenset[str]:
        """The slots that never leave."""
        return frozenset(_names(self.private_slots))

    def stricter(self, other: Policy) -> Policy:
        """Combine two policies: the stricter one of every bound."""
        found: dict[str, Any] = {}
        for item in fields(self):
            ours, theirs = getattr(self, item.name), getattr(other, item.name)
            if item.name == "allow_steps":
                both = [name for name in self.allowed if name in other.allowed]
                found[item.name] = "" if both == list(STEPS) else ",".join(both) or _NOTHING
            elif item.name == "private_slots":
                found[item.name] = ",".join(sorted(self.private | other.private))
            elif item.name == "lend_adapter":
                found[item.name] = ours and theirs
            elif item.name.startswith("min_"):
                found[item.name] = max(ours, theirs)
            else:
                found[item.name] = min([value for value in (ours, theirs) if value] or [ours])
        return Policy(**found)

    def require_plan(self, plan: plan_pb2.Plan, blobs: Mapping[str, bytes]) -> None:
        """Check a plan before anything is done, as far as that is possible without the client's data.

        Raises:
            PolicyError: it asks for more than the owner allows.
        """
        who = f"client {plan.client_id!r}"
        for index, step in enumerate(plan.steps):
            kind = step.WhichOneof("kind")
            asked = [kind] if kind != "distill" else [kind, "train"]  # distilling trains, too
            missing = [name for name in asked if name is not None and name not in self.allowed]
            if missing:
                raise PolicyError(
                    f"{who} refuses step {index} ({kind}); its client.allow-steps has {', '.join(self.allowed)}, and "
                    f"not {' and '.join(missing)}"
                )
        for index, step in enumerate(plan.steps):
            if step.HasField("sketch") and not step.sketch.noise >= self.min_sketch_noise:
                raise PolicyError(
                    f"{who} refuses step {index} (sketch): noise {step.sketch.noise:g}, its client.min-sketch-noise is "
                    f"{self.min_sketch_noise:g}"
                )
            if step.send.for_newcomers and not self.lend_adapter:
                raise PolicyError(
                    f"{who} refuses step {index} (send): its adapter is not for clients that never trained "
                    "(client.lend-adapter)"
                )
        counts = {
            "max_download_mb": sum(map(len, blobs.values())) / 10**6,
            "max_steps": sum(map(_training_steps, plan.steps)),
            "max_evaluations": sum(map(_evaluations, plan.steps)),
            "max_slots": len({slot for step in plan.steps for slot in _slots_of(_body(step))} | set(blobs)),
            "max_rounds": plan.round,
        }
        for name, found in counts.items():
            most = getattr(self, name)
            if most and found > most:
                raise PolicyError(f"{who} refuses the plan: its {_key(name)} is {most:g}, and the plan has {found:g}")

    def require_scores(self, client_id: str, tests: Mapping[str, int], texts: Mapping[str, int]) -> None:
        """Require that every task's scores may leave, so that a client is refused at registration and not in a round.

        Args:
            client_id: the client.
            tests: test examples by task; a task without any has no scores.
            texts: how many texts a task's scores come from; 0: it writes none.

        Raises:
            PolicyError: there are fewer than ``min_examples`` of either.
        """
        for what, counts in (("test examples", tests), ("texts (generate-examples)", texts)):
            few = {task: count for task, count in counts.items() if 0 < count < self.min_examples}
            for task, count in few.items():
                raise PolicyError(
                    f"client {client_id!r}: task {task!r} has scores of {count} {what}, and its client.min-examples "
                    f"is {self.min_examples}; give it more, or set client.min-examples in its node-config"
                )

    def require_examples(
        self, plan: plan_pb2.Plan, size_of: Callable[[str], int], parts_of: Parts | None = None
    ) -> None:
        """Refuse a step on so few examples that its result would reveal single ones.

        Args:
            plan: what is asked.
            size_of: how many examples a split has now.
            parts_of: how many of each task, if the client has several.

        Raises:
            PolicyError: a step uses fewer than ``min_examples`` examples.
        """
        for index, step in enumerate(plan.steps):
            kind, body = step.WhichOneof("kind"), _body(step)
            split = body.train.split if kind == "distill" else getattr(body, "split", "")
            sizes: Sequence[int] = [size_of(split)] if split else [0]
            if parts_of is not None and kind in (
                "evaluate",
                "select",
                "search",
                "attribute",
                "density",
            ):  # these have results for each task
                sizes = parts_of(body.split)
            for size in sizes:
                looks_at = _examples(body, size, self.min_examples)
                if looks_at is not None and looks_at < self.min_examples:
                    raise PolicyError(
                        f"client {plan.client_id!r} refuses step {index} ({kind}): {looks_at} examples, its "
                        f"client.min-examples is {self.min_examples}"
                    )

    def require_apart(
        self, plan: plan_pb2.Plan, parts_of: Parts, seen: Mapping[str, Collection[int]]
    ) -> dict[str, list[int]]:
        """Refuse a measurement that differs from an earlier one by a few examples: the difference would reveal them.

        Args:
            plan: what is asked.
            parts_of: how many examples of each task a split has now.
            seen: how many examples of each split this run has measured before.

        Returns:
            ``seen`` with those of this plan.

        Raises:
            PolicyError: two counts differ by fewer than ``min_examples``.
        """
        counts = {split: set(found) for split, found in seen.items()}
        for index, step in enumerate(plan.steps):
            kind, body = step.WhichOneof("kind"), _body(step)
            if kind not in ("evaluate", "select", "search", "fisher", "gram"):
                continue
            known = counts.setdefault(body.split, set())
            for size in parts_of(body.split):
                count = shown_of(size, int(body.examples if kind == "evaluate" else body.samples), self.min_examples)
                near = [other for other in sorted(known) if count < size and 0 < abs(other - count) < self.min_examples]
                if near:
                    raise PolicyError(
                        f"client {plan.client_id!r} refuses step {index} ({kind}): {count} examples of {body.split!r}, "
                        f"and this run has measured {near[0]}; its client.min-examples is {self.min_examples}, and the "
                        f"difference would reveal {abs(near[0] - count)}"
                    )
                if count < size:
                    known.add(count)
        return {split: sorted(found)[:_MAX_COUNTS] for split, found in counts.items() if found}

    def require_small(self, client_id: str, uploads: Mapping[str, bytes]) -> None:
        """Bound the size of uploads.

        Raises:
            PolicyError: the uploads are larger than ``max_upload_mb``.
        """
        size = sum(map(len, uploads.values())) / 10**6
        if self.max_upload_mb and size > self.max_upload_mb:
            raise PolicyError(
                f"client {client_id!r} does not send {size:.3f} MB ({', '.join(sorted(uploads))}); its "
                f"client.max-upload-mb is {self.max_upload_mb:g}"
            )

    def require_private(self, plan: plan_pb2.Plan, hidden: Collection[str]) -> frozenset[str]:
        """Follow the private slots through a plan; return the slots that depend on them afterwards.

        Args:
            plan: what is asked.
            hidden: slots that held something private before it.

        Raises:
            PolicyError: the plan sends one of them.
        """
        found = set(hidden) | self.private
        for index, step in enumerate(plan.steps):
            kind, body = step.WhichOneof("kind"), _body(step)
            if kind == "send" and body.slot in found:
                raise PolicyError(
                    f"client {plan.client_id!r} refuses step {index} (send): slot {body.slot!r} is private "
                    "(client.private-slots), or made of one that is"
                )
            if kind == "sketch":  # its slot keeps the sketch before noise is added
                found.add(body.slot)
            for target, sources in _flows(kind, body):
                if set(sources) & found:
                    found.add(target)
                elif kind in ("merge", "initialise") and target not in self.private:
                    found.discard(target)  # it holds something else now
        return frozenset(found)


def _key(name: str) -> str:
    return f"client.{name.replace('_', '-')}"


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _body(step: plan_pb2.Step) -> Any:
    return getattr(step, step.WhichOneof("kind") or "initialise")


def tally_of(plan: plan_pb2.Plan) -> dict[str, int]:
    """How much of a run's bounds a plan uses."""
    return {
        "steps": sum(map(_training_steps, plan.steps)),
        "evaluations": sum(map(_evaluations, plan.steps)),
        "statistics": sum(step.WhichOneof("kind") in STATISTICS for step in plan.steps),
    }


def _training_steps(step: plan_pb2.Step) -> int:
    """Passes forward and backward; a sharpness-aware step has two."""
    trains = (step.train, step.distill.train)
    return int(sum(body.steps * (2 if body.sharpness_radius else 1) for body in trains) + step.sketch.batches)


def _evaluations(step: plan_pb2.Step) -> int:
    others = len(step.select.slots) + len(step.attribute.slots) + len(step.density.slots) + step.search.evaluations
    return sum(map(step.HasField, ("evaluate", "density", "likeness"))) + int(others)


def _slots_of(body: Any) -> Iterator[str]:
    """Names of slots in a step, wherever they are in it."""
    for field, value in body.ListFields():
        if field.name in (
            "slot",
            "slots",
            "target",
            "source",
            "first",
            "second",
            "copy_of",
            "keep_first",
            "keep_second",
        ):
            yield from [value] if isinstance(value, str) else value
        elif field.message_type is not None and field.name in ("mixture", "teacher", "terms", "train", "proximal"):
            for part in value if field.name == "terms" else [value]:
                yield from _slots_of(part)


def shown_of(size: int, asked: int, least: int) -> int:
    """How many of ``size`` examples a step looks at if it asks for ``asked`` (0: all).

    All of them, if it would leave out fewer than ``least``: the difference from all would reveal these.
    """
    return size if not asked or size - asked < least else asked


def _examples(body: Any, size: int, least: int) -> int | None:
    """How many of a split's ``size`` examples a step looks at; None for a step that looks at none."""
    if isinstance(body, plan_pb2.DistillStep):
        body = body.train
    if isinstance(body, plan_pb2.TrainStep):
        if body.HasField("fold") and body.fold.count:
            size //= body.fold.count
        return min(size, body.steps * body.batch_size) or None  # nothing to do is the plan's own error
    if isinstance(body, plan_pb2.SketchStep):
        return min(size, body.batches * body.batch_size) or None
    if isinstance(body, plan_pb2.FisherStep | plan_pb2.GramStep | plan_pb2.SelectStep | plan_pb2.SearchStep):
        return shown_of(size, int(body.samples), least)
    if isinstance(body, plan_pb2.EvaluateStep):
        return shown_of(size, int(body.examples), least) or None  # an empty split is its own error
    if isinstance(body, plan_pb2.AttributeStep | plan_pb2.DensityStep):
        return size or None
    return None


def _flows(kind: str | None, body: Any) -> Iterator[tuple[str, list[str]]]:
    """The slots that a step reads from, and the one that it writes to."""
    if kind == "initialise":
        if body.copy_of or not body.keep_existing:
            yield body.slot, [body.copy_of] if body.copy_of else []
    elif kind == "merge":
        precisions = [term.precision for term in body.mixture.terms if term.WhichOneof("coefficient") == "precision"]
        yield body.target, [*(term.slot for term in body.mixture.terms), *precisions]
    elif kind == "replace":
        yield body.target, [body.source]
    elif kind in ("select", "search"):
        yield body.target, list(body.slots)
    elif kind == "fisher":
        yield from ((keep, [slot]) for keep, slot in ((body.keep_first, body.first), (body.keep_second, body.second)))
    elif kind == "train":
        for slot in body.slots:
            yield slot, [body.proximal.slot]
    elif kind == "distill":
        for slot in body.train.slots:
            yield slot, [body.train.proximal.slot, body.teacher.shares, *(term.slot for term in body.teacher.terms)]
