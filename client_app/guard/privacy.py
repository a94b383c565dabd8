"""Record-level differential privacy: the owner's budget, what has been spent of it, and the accounting.

The guarantee is that of DP-SGD (Abadi et al., "Deep Learning with Differential Privacy", 2016): everything that leaves,
in all runs together, is (epsilon, delta)-indistinguishable from what would have left without any one training example.
The budget belongs to a data set and outlives runs, restarts and kills: a plan's spending is recorded before it begins,
and is never given back. The accountants are Opacus's.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from client_app.guard.policy import PolicyError
from fedalloy_adapters.files.atomic_files import locked, private_folder, write_durably
from fedalloy_adapters.files.sealed_json import sealed, unsealed
from proto.fedalloy.v1 import plan_pb2, report_pb2

PRIVATE_STEPS = ("initialise", "train", "merge", "evaluate", "save", "send", "distance")
"""Kinds of steps that a plan may have: training is private, and the others only use its results."""
COVERS = (
    "each training example, in all runs together; not how many there are, nor what is measured on held-out examples"
)


class PrivacyError(PolicyError):
    """The budget is spent, or a plan asks for something that is not private."""


@dataclass(frozen=True)
class Privacy:
    """The owner's settings; the field ``max_grad_norm`` is the key ``dp.max-grad-norm``."""

    epsilon: float = 0.0
    """Total epsilon that may ever be spent on these data; 0 means no differential privacy."""
    delta: float = 0.0
    """Probability with which the bound may fail; well below one divided by the number of examples."""
    max_grad_norm: float = 1.0
    """Each example's gradient, over all numbers that are trained together, is scaled down to this norm."""
    noise_multiplier: float = 1.0
    """Standard deviation of the noise, in multiples of that norm; with more noise the budget lasts longer."""
    accountant: str = "rdp"
    """``rdp`` (Renyi) or ``prv`` (privacy random variables; tighter, slower)."""
    data_set: str = ""
    """Name of the budget. Empty: it is named after the place of the data. Give the same name to the same records in two
    places."""
    metrics: str = "none"
    """``none``: no score leaves. ``held-out``: scores of validation and test examples leave, without protection."""

    def __post_init__(self) -> None:
        for name, least in (("epsilon", 0), ("delta", 0), ("max_grad_norm", 0), ("noise_multiplier", 0)):
            value = getattr(self, name)
            if not least <= value < float("inf"):
                raise ValueError(f"dp.{name.replace('_', '-')} = {value}, expected a number of at least 0")
        if self.epsilon and not (0 < self.delta < 1 and self.max_grad_norm > 0 and self.noise_multiplier > 0):
            raise ValueError("dp.epsilon needs a dp.delta between 0 and 1, and a max-grad-norm and noise above 0")
        if self.accountant not in ("rdp", "prv") or self.metrics not in ("none", "held-out"):
            raise ValueError(
                f"dp.accountant = {self.accountant!r} and dp.metrics = {self.metrics!r}, expected rdp or prv, and none "
                "or held-out"
            )

    def tells(self, split: str) -> bool:
        """Whether scores of a split may leave."""
        return self.metrics == "held-out" and "train" not in split.split("+")


@dataclass(frozen=True)
class Spending:
    """``steps`` steps of the Poisson-sampled Gaussian mechanism."""

    noise_multiplier: float
    sample_rate: float
    steps: int


def epsilon_of(spent: Iterable[Spending], delta: float, accountant: str = "rdp") -> float:
    """What has been spent, by Opacus's accountant.

    Raises:
        PrivacyError: Opacus is not installed.
    """
    history = [(item.noise_multiplier, item.sample_rate, item.steps) for item in spent if item.steps]
    if not history:
        return 0.0
    counter = _accountant(accountant)
    counter.history = history
    return float(counter.get_epsilon(delta))


def spending_of(plan: plan_pb2.Plan, privacy: Privacy, size_of: Callable[[str], int]) -> list[Spending]:
    """What a plan may spend; ``size_of`` says how many examples a split has."""
    found = []
    for step in plan.steps:
        size = size_of(step.train.split) // max(1, step.train.fold.count) if step.HasField("train") else 0
        if size:
            rate = rate_of(int(step.train.batch_size), size)
            found.append(Spending(privacy.noise_multiplier, rate, int(step.train.steps)))
    return found


def rate_of(batch_size: int, size: int) -> float:
    """The probability that an example is drawn, for batches of ``batch_size`` on average."""
    return min(1.0, batch_size / size)


def require_private_steps(plan: plan_pb2.Plan) -> None:
    """Refuse steps that are not private, by name.

    Raises:
        PrivacyError: a step is not one of :data:`PRIVATE_STEPS`, weighs examples by their losses, or is
            sharpness-aware.
    """
    for index, step in enumerate(plan.steps):
        if reason := why_not_private(step):
            raise PrivacyError(f"client {plan.client_id!r} refuses step {index} ({step.WhichOneof('kind')}): {reason}")


def why_not_private(step: plan_pb2.Step) -> str:
    """Why this step cannot be carried out under differential privacy; empty if it can."""
    kind = step.WhichOneof("kind")
    if kind not in PRIVATE_STEPS:
        return f"differential privacy (dp.epsilon) allows only {', '.join(PRIVATE_STEPS)}"
    if kind == "train" and step.train.attributed_to:
        return "attributed-to is not private"
    if kind == "train" and step.train.sharpness_radius:  # it looks at each batch twice
        return "sharpness-aware is not private"
    return ""


class Budget:
    """The budget of one data set: ``<state-dir>/privacy/<name>.json``."""

    def __init__(self, state_dir: Path, privacy: Privacy, data: str) -> None:
        self.privacy = privacy
        name = privacy.data_set or data
        self.path = state_dir / "privacy" / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.json"
        self.name = name

    @property
    def spent(self) -> float:
        """Epsilon so far."""
        return self._epsilon(self._read())

    def after(self, more: Sequence[Spending]) -> float:
        """The epsilon that these would bring it to; nothing is recorded."""
        return self._epsilon(self._with(more))

    def charge(self, more: Sequence[Spending]) -> float:
        """Record what is about to be spent; return the epsilon after it.

        Raises:
            PrivacyError: it would be more than the owner grants; nothing is written then.
        """
        private_folder(self.path.parent)
        with locked(self.path.with_suffix(".lock")):
            history = self._with(more)
            epsilon = self._epsilon(history)
            if not epsilon <= self.privacy.epsilon:
                raise PrivacyError(
                    f"the privacy budget is exhausted: epsilon would be {epsilon:.4g} with this plan, and dp.epsilon "
                    f"is {self.privacy.epsilon:g}"
                )
            if more:
                lines = [[item.noise_multiplier, item.sample_rate, item.steps] for item in history]
                write_durably(self.path, sealed({"data": self.name, "history": lines}))
            return epsilon

    def said(self, epsilon: float) -> report_pb2.RecordPrivacy:
        """The budget as reports and registrations state it."""
        privacy = self.privacy
        return report_pb2.RecordPrivacy(
            epsilon=epsilon,
            delta=privacy.delta,
            budget=privacy.epsilon,
            noise_multiplier=privacy.noise_multiplier,
            covers=COVERS,
        )

    def _with(self, more: Sequence[Spending]) -> list[Spending]:
        """What has been spent and what is to be; neighbours that differ only in their steps are one entry."""
        history = self._read()
        for item in more:
            last = history[-1] if history else None
            if last and (last.noise_multiplier, last.sample_rate) == (item.noise_multiplier, item.sample_rate):
                history[-1] = Spending(item.noise_multiplier, item.sample_rate, last.steps + item.steps)
            else:
                history.append(item)
        return history

    def _epsilon(self, history: Sequence[Spending]) -> float:
        found = epsilon_of(history, self.privacy.delta, self.privacy.accountant)
        return found if not math.isnan(found) else math.inf

    def _read(self) -> list[Spending]:
        try:
            found = unsealed(self.path.read_bytes())["history"]
            return [Spending(float(noise), float(rate), int(steps)) for noise, rate, steps in found]
        except FileNotFoundError:
            return []
        except (ValueError, TypeError, KeyError, OSError) as error:
            raise PrivacyError(f"the privacy budget {self.path.name} is damaged ({type(error).__name__})") from None


def _accountant(name: str) -> Any:
    try:
        from opacus.accountants import create_accountant
    except ImportError:
        raise PrivacyError("dp.epsilon needs Opacus: pip install 'fedalloy[privacy]'") from None
    return create_accountant(name)


_MARK = "private"


def require_private_run(directory: Path, client_id: str) -> None:
    """A run's slots must have been private from their beginning.

    Raises:
        PrivacyError: there are slots from before.
    """
    if (directory / "slots" / "state.json").exists() and not (directory / _MARK).exists():
        raise PrivacyError(
            f"client {client_id!r} has slots of this run from before dp.epsilon was set; start another run"
        )


def mark_private(directory: Path) -> None:
    """Mark this run's slots: from now on they hold private results only."""
    if not (directory / _MARK).exists():
        write_durably(directory / _MARK, b"")
