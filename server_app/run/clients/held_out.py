"""The clients' scores on their validation examples after each round: which state is best, and which clients got worse.

State s is the run's state after s rounds. In round r, clients evaluate the model that the round begins with, which
belongs to state r - 1; a delivery evaluates the last one. Nothing here looks at the test split, on which delivered
models are evaluated once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from proto.fedalloy.v1 import plan_pb2
from server_app.run.options import RunOptions
from strategies.framework.exchange import Brief, Client

LABEL, SPLIT, PERSONAL = "held-out", "validation", "personal"
"""The label and the split of the evaluation that a delivery adds; and strategies' label for a client's own model."""
MARGIN = 0.02
"""Share by which a loss must be higher to count as worse: validation examples are few."""
FEWEST = 8
"""Examples of which a loss says whether a model became worse; with fewer, an untrained model wins by chance."""
LEARNED = 0.05
"""A model whose accuracy is this much above the first one's has learned, whatever its loss: it may only be
overconfident."""


@dataclass(frozen=True)
class Score:
    """One model's score: mean loss, and accuracy if its task has one."""

    loss: float
    accuracy: float | None = None

    @classmethod
    def of(cls, metrics: Mapping[str, float]) -> Score:
        """The score in one evaluation's metrics."""
        return cls(float(metrics["loss"]), metrics.get("accuracy"))


@dataclass(frozen=True)
class Fall:
    """A client that got worse: the scores of its first model, of its model of the best state, and of its model now."""

    first: Score
    now: Score | None
    best: Score | None
    best_state: int | None

    def words(self, rounds: int) -> str:
        """One line about it, after this many rounds."""
        now = "not finite" if self.now is None else f"{self.now.loss:.3g}"
        said = f"validation loss {now} after {_rounds(rounds)}, {self.first.loss:.3g} before training"
        if self.best is not None and self.best_state and self.best_state != rounds:
            said += f", {self.best.loss:.3g} after {_rounds(self.best_state)}"
        return said

    @property
    def is_better_before(self) -> bool:
        """Whether the best state's model is better than the one it has now."""
        return self.best is not None and (self.now is None or self.best.loss < self.now.loss)

    def record(self) -> dict[str, Any]:
        """For ``summary.json``."""
        return {
            "loss": self.now.loss if self.now is not None else None,
            "first_loss": self.first.loss,
            "best_loss": self.best.loss if self.best is not None else None,
            "best_round": self.best_state,
        }


class HeldOut:
    """Scores by client and state.

    Args:
        records: those of the rounds so far, as in ``rounds.jsonl``.
    """

    def __init__(self, records: Iterable[Mapping[str, Any]] = ()) -> None:
        self._scores: dict[str, dict[int, Score]] = {}
        self._examples: dict[str, int] = {}
        for record in records:
            if record["phase"] == "train":
                self.take(record["round"], record["clients"])

    def take(self, round_: int, clients: Mapping[str, Mapping[str, Any]]) -> None:
        """Take in the clients' scores in a round, of the models that it began with."""
        for name, said in clients.items():
            looked = said.get("evaluated", {}).get(PERSONAL, {})
            if looked.get("split") == SPLIT:
                self._examples[name] = int(looked["examples"])
                self._scores.setdefault(name, {})[round_ - 1] = Score.of(said["metrics"][PERSONAL])

    @property
    def best_state(self) -> int | None:
        """The state whose models are best on average, each against its client's first one; None if nothing is known.

        A state counts only if at least half as many clients have evaluated it as the state with most; the earlier of
        equals wins.
        """
        found: dict[int, list[float]] = {}
        for scores in self._scores.values():
            first = scores[min(scores)].loss
            for state, score in scores.items():
                found.setdefault(state, []).append(score.loss - first)
        most = max(map(len, found.values()), default=0)
        means = {state: sum(losses) / len(losses) for state, losses in found.items() if 2 * len(losses) >= most}
        return min(means, key=lambda state: (means[state], state), default=None)

    def fallen(self, client: str, now: Score | None, best_state: int | None = None) -> Fall | None:
        """How the client got worse with a model that scores ``now`` (None: its loss is not finite); None if it did not.

        A client got worse if its loss is above that of its first model, or if more than half of the best state's gain
        is gone. Of a client that looks at fewer than :data:`FEWEST` examples only a loss that is not finite is known.
        """
        scores = self._scores.get(client)
        if not scores:
            return None
        first = scores[min(scores)]
        state = self.best_state if best_state is None else best_state
        best = scores.get(state) if state is not None else None
        fall = Fall(first, now, best, state if best is not None else None)
        if now is None:
            return fall
        if self._examples[client] < FEWEST:
            return None
        gained = max(0.0, first.loss - best.loss) if best is not None else 0.0
        if now.loss <= (first.loss - gained / 2) * (1 + MARGIN):
            return None
        if now.accuracy is not None and first.accuracy is not None:
            best_accuracy = best.accuracy if best is not None and best.accuracy is not None else first.accuracy
            if now.accuracy - first.accuracy > max(LEARNED, (best_accuracy - first.accuracy) / 2):
                return None
        return fall

    def fallen_in(self, state: int) -> dict[str, Fall]:
        """Clients that got worse with the model of a state, by name."""
        found = {name: self.fallen(name, scores[state]) for name, scores in self._scores.items() if state in scores}
        return {name: fall for name, fall in sorted(found.items()) if fall is not None}


def with_held_out(brief: Brief, client: Client, options: RunOptions) -> Brief:
    """A delivery's brief that also evaluates the client's model on the validation examples that rounds look at."""
    steps: list[plan_pb2.Step] = []
    for step in brief.steps:
        steps.append(step)
        if client.held_out and step.WhichOneof("kind") == "evaluate" and step.evaluate.label == PERSONAL:
            also = plan_pb2.Step()
            also.CopyFrom(step)
            also.evaluate.label, also.evaluate.split, also.evaluate.loss_only = LABEL, SPLIT, True
            also.evaluate.examples = options.evaluate_examples
            steps.append(also)
    return replace(brief, steps=steps)


def _rounds(count: int) -> str:
    return f"{count} round{'' if count == 1 else 's'}"
