"""How clients train: the run's options, and how they become settings when one client's message is made.

A strategy's plan does not say how long a client trains under ``local-epochs``, nor where a round stands in the run's
schedule: neither belongs to the method. Both are filled in here, in the same way for every strategy.

A run that names a base model, sets none of the keys in :data:`KEYS` and is no built-in scenario gets settings by kind
of task and by the model's width. Both are known once a client has registered, so learning rate and batch size are
filled in when its message is made. The rates follow publications; no search for them was made here.
"""

from __future__ import annotations

import bisect
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, replace

from fedalloy_adapters.factors import Factor
from fedalloy_adapters.layout import Layout
from fedalloy_adapters.wire.codec import Encoding
from proto.fedalloy.v1 import plan_pb2
from strategies.framework.options import OptionError, require_choice, require_range

OPTIMIZERS = {"adamw": plan_pb2.OPTIMIZER_ADAMW, "sgd": plan_pb2.OPTIMIZER_SGD}
SCHEDULES = {
    "constant": plan_pb2.SCHEDULE_CONSTANT,
    "linear": plan_pb2.SCHEDULE_LINEAR,
    "cosine": plan_pb2.SCHEDULE_COSINE,
    "polynomial": plan_pb2.SCHEDULE_POLYNOMIAL,
    "inverse_sqrt": plan_pb2.SCHEDULE_INVERSE_SQRT,
    "cosine_with_restarts": plan_pb2.SCHEDULE_COSINE_WITH_RESTARTS,
}
_MOST = 2**31 - 1


@dataclass(frozen=True)
class Training:
    """How clients train in a round, and how adapters travel; the same for every strategy."""

    local_steps: int = 30
    """Optimiser steps in each round."""
    local_epochs: float = 0.0
    """Passes that a client makes over its training examples in each round, instead of ``local-steps``: a client with
    more data does more work. 0.5 is half a pass; at least one step is made. 0: ``local-steps`` counts."""
    batch_size: int = 16
    """Examples in each step."""
    learning_rate: float = 5e-3
    """The optimiser's learning rate at the start of its schedule, after the warm-up."""
    schedule: str = "constant"
    """How the learning rate moves, as in ``transformers.get_scheduler``: ``constant``, ``linear``, ``cosine`` or
    ``polynomial`` (power 2) to zero, ``inverse_sqrt``, or ``cosine_with_restarts`` (three times to zero)."""
    schedule_over: str = "round"
    """``round``: the schedule starts again in every round; ``run``: it covers all rounds of the run, and a client that
    was not asked in some rounds continues where the others are. Training at delivery has a schedule of its own."""
    warmup_steps: int = 0
    """Steps at the beginning of the schedule in which the learning rate rises from zero."""
    warmup_ratio: float = 0.0
    """The same as a share of all steps of the schedule, instead of ``warmup-steps``."""
    weight_decay: float = 0.0
    """Weight decay: decoupled for AdamW, a part of the gradient for SGD."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm; 0 does not clip."""
    optimizer: str = "adamw"
    """``adamw`` or ``sgd``. With ``sgd`` and ``max-grad-norm = 0`` an adapter moves by its gradients times the rate,
    and a pull acts as its formula says (FedMerge, Ditto, Reptile, which then is FedAvg)."""
    momentum: float = 0.0
    """Momentum of SGD; 0 means none."""
    optimizer_state: str = "fresh"
    """``fresh``: the optimiser starts anew in every round, as in the papers; ``keep``: a slot's next training continues
    with its moments, which stay on the client's disk, though they belong to the adapter before the merge."""
    training_defaults: str = "auto"
    """``auto``: a run that names a ``base-model`` and sets no learning rate, batch, steps, epochs, schedule, warm-up or
    optimizer gets them by kind of task and size of model (docs/training.md). ``plain``: the defaults here."""
    evaluate_split: str = "test"
    """The split on which delivered models are evaluated, once: ``validation`` or ``test``. Rounds evaluate on
    validation examples; a client without any uses this split in rounds, too."""
    uplink_encoding: str = "fp16"
    """How adapters travel from clients: ``fp32``, ``fp16``, ``bf16``, ``int8``, ``int4`` or ``int2``. All but ``fp32``
    store the difference from an adapter that both ends hold, if there is one. ``int2`` is for differences only; else
    ``int4`` takes its place. Sums of squares and second moments travel in ``bf16`` instead."""
    downlink_encoding: str = "fp16"
    """How adapters travel to clients, in the same way."""

    def __post_init__(self) -> None:
        require_range("local-steps", self.local_steps, 1, 2**31 - 1)  # uint32 on the wire
        require_range("batch-size", self.batch_size, 1, 2**31 - 1)
        require_range("weight-decay", self.weight_decay, 0)
        require_range("max-grad-norm", self.max_grad_norm, 0)
        if not 0 < self.learning_rate < float("inf"):
            raise OptionError(f"learning-rate = {self.learning_rate}, expected a positive number")
        require_range("local-epochs", self.local_epochs, 0, 1e6)
        require_choice("schedule", self.schedule, SCHEDULES)
        require_choice("schedule-over", self.schedule_over, ("round", "run"))
        require_range("warmup-steps", self.warmup_steps, 0, 2**31 - 1)
        require_range("warmup-ratio", self.warmup_ratio, 0, 1)
        if self.warmup_steps and self.warmup_ratio:
            raise OptionError(
                f"warmup-steps = {self.warmup_steps} and warmup-ratio = {self.warmup_ratio}, expected one of them"
            )
        require_choice("optimizer", self.optimizer, OPTIMIZERS)
        require_choice("optimizer-state", self.optimizer_state, ("fresh", "keep"))
        if not 0 <= self.momentum < 1:
            raise OptionError(f"momentum = {self.momentum}, expected at least 0 and below 1")
        if self.momentum and self.optimizer != "sgd":
            raise OptionError(f"momentum = {self.momentum} with optimizer {self.optimizer!r}, expected 'sgd'")
        require_choice("training-defaults", self.training_defaults, ("auto", "plain", "by-kind"))
        require_choice("evaluate-split", self.evaluate_split, ("validation", "test"))
        require_choice("uplink-encoding", self.uplink_encoding, list(Encoding))
        require_choice("downlink-encoding", self.downlink_encoding, list(Encoding))


KEYS = (
    *("learning_rate", "batch_size", "local_steps", "local_epochs"),
    *("schedule", "schedule_over", "warmup_steps", "warmup_ratio", "optimizer"),
)
"""Fields of :class:`Training` that belong together: a run that sets one of them gets none of these defaults."""
WIDTHS = (128, 1024, 2048, 6144)
"""Borders between sizes of models, by the median number of inputs of their adapted modules."""


@dataclass(frozen=True)
class Defaults:
    """For some kinds: learning rates (below the first of :data:`WIDTHS`, then from each on), batch size, and why."""

    kinds: tuple[str, ...]
    rates: tuple[float, float, float, float, float]
    batch: int
    why: str


TABLE = (
    Defaults(
        ("causal-lm", "image-text-to-text"),
        (5e-3, 1e-3, 5e-4, 2e-4, 1e-4),
        8,
        "QLoRA (Dettmers et al. 2023) trains models of 7B and 13B at 2e-4, of 33B and 65B at 1e-4; narrower ones take "
        "more. Long texts make small batches.",
    ),
    Defaults(
        ("preferences",),
        (5e-4, 5e-5, 2e-5, 1e-5, 5e-6),
        8,
        "Preferences move a model that can already write, at a tenth of the rate or less (Zephyr's DPO: 5e-6 at 7B).",
    ),
    Defaults(
        ("image-classification", "image-text-classification"),
        (5e-3, 2e-3, 1e-3, 5e-4, 2e-4),
        32,
        "PEFT's example trains ViT-base at 5e-3 with batches of 128; smaller batches take less.",
    ),
    Defaults(
        ("sentence-pairs",),
        (5e-3, 5e-4, 3e-4, 2e-4, 1e-4),
        32,
        "A text learns to differ from the other examples of its batch, so a small batch teaches little.",
    ),
    Defaults(
        (),
        (5e-3, 5e-4, 3e-4, 2e-4, 1e-4),
        16,
        "LoRA (Hu et al. 2021, table 9) trains RoBERTa-base at 4e-4 to 5e-4, and RoBERTa-large at 2e-4 to 4e-4.",
    ),
)
"""The last row is for every other kind."""


def resolved(training: Training, base_model: str) -> Training:
    """What ``training-defaults = "auto"`` means in this run, with the settings that all kinds share.

    One pass over a client's examples in each round, and at least ``local-steps``: otherwise a hundred examples would
    make only a dozen steps. The rate falls over the whole run, because clients continue from each other's work.
    """
    plain = Training()
    untouched = all(getattr(training, name) == getattr(plain, name) for name in KEYS)
    if training.training_defaults == "plain" or not (base_model and untouched):
        return replace(training, training_defaults="plain") if training.training_defaults == "by-kind" else training
    chosen = replace(training, training_defaults="by-kind", local_epochs=1.0)
    return replace(chosen, schedule="cosine", schedule_over="run", warmup_ratio=0.05)


def settings_for(training: Training, kinds: Iterable[str], layout: Layout) -> Training:
    """``training`` with a client's own rate and batch size, if the run leaves them to its kinds of tasks and its model.

    With several kinds, the smallest rate and batch size count.
    """
    if training.training_defaults != "by-kind":
        return training
    rows = [next(row for row in TABLE if kind in row.kinds or not row.kinds) for kind in kinds] or [TABLE[-1]]
    size = bisect.bisect_right(WIDTHS, width(layout))
    return replace(
        training, learning_rate=min(row.rates[size] for row in rows), batch_size=min(row.batch for row in rows)
    )


def width(layout: Layout) -> int:
    """The median number of inputs of the adapted modules; 0 if there are none."""
    inputs = [entry.shape[1] for entry in layout.entries if entry.factor is Factor.A]
    return int(statistics.median_low(inputs)) if inputs else 0


def settings_words(training: Training, kinds: Iterable[str], layout: Layout) -> str:
    """One line for the log: the settings of such clients; empty if the run has set them."""
    if training.training_defaults != "by-kind":
        return ""
    kinds = sorted(set(kinds))
    found = settings_for(training, kinds, layout)
    return (
        f"{', '.join(kinds)}, width {width(layout)}: learning-rate {found.learning_rate:g}, "
        f"batch-size {found.batch_size}, local-epochs {found.local_epochs:g} (at least {found.local_steps} steps), "
        f"schedule {found.schedule} over the {found.schedule_over}, warmup-ratio {found.warmup_ratio:g}: chosen by "
        "kind and size, because the run sets none of them (training-defaults)"
    )


def local_steps(training: Training, examples: int) -> int:
    """Optimiser steps in one round of a client with this many training examples.

    >>> local_steps(Training(local_epochs=1.5, batch_size=16), 100)
    11
    """
    if not training.local_epochs:
        return training.local_steps
    batches = math.ceil(examples / training.batch_size)  # of one pass; the last one may be smaller
    least = training.local_steps if training.training_defaults == "by-kind" else 1
    return max(least, min(_MOST, math.ceil(training.local_epochs * batches)))


def counted(
    steps: Iterable[plan_pb2.Step],
    training: Training,
    examples: tuple[int, int],
    round_: int,
    rounds: int,
    own: Training | None = None,
) -> list[plan_pb2.Step]:
    """The steps, with the length of the client's training and its learning rate's place in the schedule filled in.

    Args:
        steps: of a brief; they are not changed.
        training: the run's options.
        examples: the client's numbers of training and validation examples, which make up its epochs.
        round_: from 1; the delivery is one after the last, and has a schedule of its own.
        rounds: of the whole run; 0 if not known: then the schedule is the round's.
        own: ``training`` with the client's own learning rate and batch size; None: they are the run's.
    """
    own = own or training
    over_run = training.schedule_over == "run" and 0 < round_ <= rounds
    found = []
    for step in steps:
        kind = step.WhichOneof("kind")
        if kind in ("train", "distill"):
            copied = plan_pb2.Step()
            copied.CopyFrom(step)
            step, body = copied, copied.train if kind == "train" else copied.distill.train
            body.steps = body.steps or local_steps(own, _examples(body, *examples))
            if own != training:
                _make_own(body, training, own)
            total = body.steps * (rounds if over_run else 1)
            if over_run:
                body.schedule_done, body.schedule_total = (round_ - 1) * body.steps, total
            warmup = training.warmup_steps or math.ceil(training.warmup_ratio * total)
            body.warmup_steps = min(warmup, total)
        found.append(step)
    return found


def _make_own(body: plan_pb2.TrainStep, training: Training, own: Training) -> None:
    """Give a step the client's rate, or the same share of it, instead of the run's; a gate's own rate stays."""
    ratio = own.learning_rate / training.learning_rate
    body.learning_rate *= ratio
    for scale in body.rate_scales:
        scale.scale /= ratio if scale.scale != 1 else 1
    if body.batch_size == training.batch_size:
        body.batch_size = own.batch_size


def _examples(body: plan_pb2.TrainStep, train: int, validation: int) -> int:
    """How many of the client's examples a train step uses."""
    return (train + validation * ("validation" in body.split)) // max(1, body.fold.count)
