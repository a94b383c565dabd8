"""TAP's options, some of which are tables of numbers by task."""

from __future__ import annotations

import math
from dataclasses import dataclass

from strategies.families.fedavg import SLOT as GLOBAL
from strategies.framework.options import OptionError, require_choice, require_range

PERSONAL, RECEIVED, FINETUNED, DISTILLED = "personal", "received", "finetuned", "distilled"
DELIVERED = {"tap": DISTILLED, "stage1": PERSONAL, "finetuned": FINETUNED, "global": GLOBAL}


@dataclass(frozen=True)
class TapOptions:
    """Options of both stages; tables are ``"name=number,..."`` with names of tasks, or of kinds of tasks."""

    margin: float = 0.01
    """Margin m of tasks that ``margins`` does not name; may be ``inf`` (never replace) or ``-inf`` (always)."""
    margins: str = "text-classification=0.005"
    """Margin m by task or kind."""
    margin_mode: str = "abs"
    """``"abs"``, or ``"rel"``: ``h_W (1 + m) < h_X``."""
    history: str = "train-mean"
    """h is the ``"train-mean"`` of the last training of each adapter (the paper), or a ``"probe"``: the loss of both on
    the validation split at the same moment. For few examples and full participation: see docs/paper-settings.md."""
    history_norm: str = "per-sample"
    """Mean loss ``"per-sample"`` of the task, or ``"batch-share"``."""
    replace_source: str = "trained"
    """Compare and copy W as ``"trained"`` in this round, or as received (``"global"``)."""
    replace_scope: str = "full"
    """What is replaced: ``"full"``: all groups of R(o); ``"exclusive"``: R(o) without the groups that it shares with a
    task whose rule does not fire."""
    seed_mode: str = "client"
    """Seed of batches: one per ``"client"``, or that of the ``"reference"`` code: t for all clients, and 2t after a
    replacement."""
    warm_up_rounds: int = 0
    """Rounds in which the learning rate rises linearly from a third of its value; 0 means none."""
    weight: str = "total"
    """A client's weight in a group's average: the ``"total"`` of its examples, or the examples of its tasks that use
    the group (``"task"``)."""
    distill_steps: int = 50
    """J, in optimiser steps; the authors' J of 50 micro-batches, four accumulated, is 13."""
    distill_rate: float = 0.333
    """Factor of ``learning-rate`` in stage 2."""
    finetune_steps: int = 0
    """Steps of fine-tuning that make V; 0: as many as ``distill-steps``."""
    kd_teacher: str = "finetuned"
    """The teacher: V (``"finetuned"``) or W as it is (``"global"``)."""
    kd_reduction: str = "per-position-mean"
    """How the distillation loss combines the positions of a text: ``"per-position-mean"``, or ``"first-dim"`` (their
    sum)."""
    kd_weight: float = 1.0
    """Factor of all ``kd_weights``; with 0 stage 2 is plain training."""
    kd_weights: str = (
        "text-classification=1,image-classification=0.002,image-text-classification=0.002,causal-lm=0.512,"
        "image-text-to-text=0.512"
    )
    """Lambda by task or kind; 0 for those not named."""
    kd_losses: str = ""
    """Distillation loss by task or kind: ``kl`` (the default) or ``mse``."""
    temperature: float = 1.0
    """T, the temperature of distillation."""
    deliver: str = "tap"
    """Which model is the client's: ``"tap"``, X after ``"stage1"``, V (``"finetuned"``), or W (``"global"``)."""

    def __post_init__(self) -> None:
        require_choice("tap.margin-mode", self.margin_mode, ("abs", "rel"))
        require_choice("tap.history", self.history, ("train-mean", "probe"))
        require_choice("tap.history-norm", self.history_norm, ("per-sample", "batch-share"))
        require_choice("tap.replace-source", self.replace_source, ("trained", "global"))
        require_choice("tap.replace-scope", self.replace_scope, ("full", "exclusive"))
        require_choice("tap.seed-mode", self.seed_mode, ("client", "reference"))
        require_choice("tap.weight", self.weight, ("total", "task"))
        require_choice("tap.kd-teacher", self.kd_teacher, ("finetuned", "global"))
        require_choice("tap.kd-reduction", self.kd_reduction, ("per-position-mean", "first-dim"))
        require_choice("tap.deliver", self.deliver, DELIVERED)
        require_range("tap.warm-up-rounds", self.warm_up_rounds, 0, 10**6)
        require_range("tap.distill-steps", self.distill_steps, 1, 2**31 - 1)
        require_range("tap.finetune-steps", self.finetune_steps, 0, 2**31 - 1)
        require_range("tap.kd-weight", self.kd_weight, 0)
        require_range("tap.temperature", self.temperature, 1e-6)
        require_range("tap.distill-rate", self.distill_rate, 1e-9)
        margins = {"margin": self.margin, **table("tap.margins", self.margins)}
        if any(math.isnan(margin) for margin in margins.values()):
            raise OptionError(f"tap.margin = {self.margin}, tap.margins = {self.margins!r}, expected numbers or inf")
        for name, weight in table("tap.kd-weights", self.kd_weights).items():
            require_range(f"tap.kd-weights: {name}", weight, 0)
        for name, loss in pairs("tap.kd-losses", self.kd_losses).items():
            require_choice(f"tap.kd-losses: {name}", loss, ("kl", "mse"))


def pairs(key: str, text: str) -> dict[str, str]:
    """The table ``"name=value,..."`` of an option.

    Raises:
        OptionError: an item has no name or no value.
    """
    found = {}
    for item in filter(None, (item.strip() for item in text.split(","))):
        name, equals, value = item.partition("=")
        if not name.strip() or not equals:
            raise OptionError(f"{key} = {text!r}, expected name=value pairs separated by commas")
        if name.strip() in found:
            raise OptionError(f"{key} = {text!r}, expected each name once, found {name.strip()!r} twice")
        found[name.strip()] = value.strip()
    return found


def table(key: str, text: str) -> dict[str, float]:
    """:func:`pairs`, with numbers for values.

    Raises:
        OptionError: a value is not a number.
    """
    try:
        return {name: float(value) for name, value in pairs(key, text).items()}
    except OptionError:
        raise
    except ValueError:
        raise OptionError(f"{key} = {text!r}, expected a number after each name") from None
