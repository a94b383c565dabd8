"""Chooses which model a client gets at the end, by the client's own validation examples.

With ``deliver-choice = "validation"`` every brief gets more steps, which no strategy knows about. The client keeps its
personal model from the beginning of the round, which every round evaluates on validation examples, and the server says
in the next round whether it was the best so far. The client also trains an adapter alone. At delivery each client
evaluates

* ``merged``: the model that the strategy delivers,
* ``best``: the personal model of its best round,
* ``global``: the adapter that it was sent last, if the strategy's model is more than that,
* ``local``: the adapter that it has trained alone, with as many steps as the strategy ``local``,

and gets the best of them by ``choice-metric``; among equals the first in this order. A client without validation
examples gets ``merged``. So no client is worse off than alone, except by chance on its validation examples. (Choosing
per client between a global and a local model by validation: Marfoq et al., and Mansour et al., "Three Approaches for
Personalization with Applications to Federated Learning", 2020, section 3.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from proto.fedalloy.v1 import plan_pb2
from server_app.run.asking import Asking
from server_app.run.clients.held_out import LABEL, PERSONAL, SPLIT
from server_app.run.options import RunOptions
from strategies import AlloyStrategy
from strategies.framework import steps
from strategies.framework.exchange import Answer, Brief, Client
from strategies.framework.options import OptionError

if TYPE_CHECKING:
    from server_app.run.ending.delivery import Delivery
    from server_app.run.loop import Run

HELD, BEST, ALONE = "choice-held", "choice-best", "choice-alone"
"""Slots at the client: the model at the start of the last round, the best round's, and the one trained alone."""
CANDIDATES = ("merged", "best", "global", "local")


class Choice:
    """Watches the clients' validation results over a run; see the module's docstring.

    Args:
        options: the run's; if they ask for neither a choice nor patience, briefs stay as they are.
        strategy: the run's strategy.
        saved: the result of :meth:`saved` before the run was interrupted.

    Raises:
        OptionError: the options ask for patience, but the strategy needs its last round.
    """

    def __init__(
        self, options: RunOptions, strategy: AlloyStrategy[Any], saved: Mapping[str, Any] | None = None
    ) -> None:
        if options.patience and not strategy.may_end_early:
            raise OptionError(
                f"patience = {options.patience} with strategy {strategy.name!r}, whose last round is not like the "
                "others; expected 0"
            )
        self.options = options
        self.strategy = strategy
        saved = saved or {}
        self.best: dict[str, float] = dict(saved.get("best", {}))
        """Each client's lowest cost so far."""
        self.rounds: dict[str, int] = dict(saved.get("rounds", {}))
        """The round of the lowest cost, by client."""
        self.kept: set[str] = set(saved.get("kept", ()))
        """Clients whose best model is in their slot."""
        self.pending: set[str] = set(saved.get("pending", ()))
        """Clients whose best model is what they held in their last round."""
        self.trained: set[str] = set(saved.get("trained", ()))
        """Clients that have answered in a round, and so have trained an adapter alone."""
        self.since = int(saved.get("since", 0))
        """Rounds since any client improved."""
        self._asked: dict[str, bool] = {}
        self._improved = False
        self._evaluated = False
        self._offered: dict[str, dict[str, plan_pb2.Mixture]] = {}

    @property
    def chooses(self) -> bool:
        """Whether clients are given the models that are best for them."""
        return self.options.deliver_choice == "validation"

    @property
    def exhausted(self) -> bool:
        """Whether no client has improved for ``patience`` rounds."""
        return 0 < self.options.patience <= self.since

    def saved(self) -> dict[str, Any]:
        """Everything that the next round depends on, as JSON values."""
        return {
            "best": self.best,
            "rounds": self.rounds,
            "kept": sorted(self.kept),
            "pending": sorted(self.pending),
            "trained": sorted(self.trained),
            "since": self.since,
        }

    # ------------------------------------------------------------------------------------------------------ in a round

    def brief(self, round_: int, client: Client, brief: Brief) -> Brief:
        """A round's brief with what the choice needs; batches and dropout of its train steps stay the same."""
        if not self.chooses or not client.held_out:
            return brief
        plan = list(brief.steps)
        place = _personal(plan)
        if place is not None and _is_sum(mix := plan[place].evaluate.mixture):
            self._asked[client.id] = client.id in self.pending
            copied = [steps.copy(BEST, HELD)] if self._asked[client.id] else []
            plan = _inserted(plan, place + 1, [*copied, steps.merge(HELD, mix)])
        if self._trains_alone:
            draw = steps.Draw(as_step=1 if place is None else 2)  # as under the strategy local
            plan += [
                steps.initialise(ALONE, self.strategy.seed, keep_existing=round_ > 1),
                steps.train(self.strategy.training, steps.mixture(ALONE), [ALONE], draw=draw),
            ]
        return replace(brief, steps=plan)

    def absorb(self, round_: int, client: Client, answer: Answer) -> None:
        """Take in a client's validation results."""
        self.trained.add(client.id)
        results = [result.evaluate for result in answer.report.results if result.HasField("evaluate")]
        metrics = answer.metrics.get(PERSONAL, {})
        if not metrics or not any(found.label == PERSONAL and found.split == SPLIT for found in results):
            return  # it was not asked, or reports no scores (its examples are under differential privacy)
        self._evaluated = True
        copied = self._asked.pop(client.id, None)
        if copied:
            self.kept.add(client.id)
        if self.chooses and copied is None:  # this model cannot be kept
            return
        cost = self.cost(metrics)
        better = cost < self.best.get(client.id, float("inf"))
        if better:
            self.best[client.id], self.rounds[client.id] = cost, round_
            self._improved = True
        if self.chooses:
            (self.pending.add if better else self.pending.discard)(client.id)

    def settle(self) -> None:
        """End the round. If a client was asked and gave no usable answer, the server does not know what it holds."""
        for name in self._asked:
            self.kept.discard(name)
            self.pending.discard(name)
            self.best.pop(name, None)
            self.rounds.pop(name, None)
        self.since = 0 if self._improved else self.since + self._evaluated
        self._asked, self._improved, self._evaluated = {}, False, False

    def cost(self, metrics: Mapping[str, float]) -> float:
        """The cost to minimise: the loss, or minus the accuracy with the loss as the tie-breaker."""
        if self.options.choice_metric == "accuracy" and "accuracy" in metrics:
            return -metrics["accuracy"] + 1e-9 * min(metrics["loss"], 1e6)
        return metrics["loss"]

    # ---------------------------------------------------------------------------------------------------- at the end

    def delivery(self, client: Client, brief: Brief, *, is_last: bool = True) -> Brief:
        """A delivery's brief with an evaluation of every candidate; ``is_last``: of the last state's models."""
        plan = list(brief.steps)
        place = _personal(plan)
        if not self.chooses or not client.held_out or place is None:
            return brief
        found = {"merged": plan[place].evaluate.mixture}
        more = []
        if is_last and client.id in self.kept | self.pending:
            found["best"] = steps.mixture(BEST)
            more += [steps.copy(BEST, HELD)] if client.id in self.pending else []
        whole = [slot for slot, adapter in brief.adapters.items() if adapter.layout.digest == client.layout.digest]
        if len(whole) == 1 and found["merged"] != steps.mixture(whole[0]):
            found["global"] = steps.mixture(whole[0])
        if self._trains_alone and client.id in self.trained:
            found["local"] = steps.mixture(ALONE)
        self._offered[client.id] = found
        for name, mix in found.items():
            more.append(steps.evaluate(self.strategy.training, mix, label_of(name), SPLIT, loss_only=True))
        return replace(brief, steps=[*plan, *more])

    def give(self, run: Run, round_: int, clients: Sequence[Client], found: Delivery) -> None:
        """Give clients their best models, unless they have them already."""
        again: dict[Client, Brief] = {}
        for client in clients if self.chooses else ():
            if client.id not in found.answers:
                continue
            record = self._choose(client, found.answers[client.id])
            found.records[client.id]["choice"] = record
            if record["given"] != "merged":
                mix = self._offered[client.id][record["given"]]
                again[client] = Brief([steps.save(mix), steps.evaluate(self.strategy.training, mix)])
        if not again:
            return
        answers: dict[str, Answer] = {}
        asking = Asking(run, "deliver", round_ + 1, again, 0)
        records = asking.carry_out(lambda _, client, answer: answers.update({client.id: answer}))
        for name, answer in answers.items():
            before = found.records[name]
            metrics = before["metrics"] | records[name]["metrics"]
            found.records[name] = before | {"metrics": metrics}
            found.answers[name] = answer
        for name in set(records) - set(answers):  # it keeps its first model
            found.records[name]["choice"] |= {"given": "merged", "failed": records[name].get("reason", "")}

    def _choose(self, client: Client, answer: Answer) -> dict[str, Any]:
        """The client's best model, and the reason, for the record."""
        told = {name: answer.metrics.get(label_of(name)) for name in CANDIDATES}
        found = {name: metrics for name, metrics in told.items() if metrics}
        if not found:
            return {"given": "merged", "why": "it has no validation examples, or does not tell its scores"}
        costs = {name: self.cost(values) for name, values in found.items()}
        given = min(costs, key=lambda name: costs[name])  # the first of equals
        validation = {name: dict(values) for name, values in found.items()}
        return {"given": given, "why": self._why(given, found, client), "validation": validation}

    @property
    def _trains_alone(self) -> bool:
        """Whether clients train an adapter alone beside the strategy's; one that shares nothing delivers just that."""
        return self.strategy.about.travels != "0"

    def _why(self, given: str, found: Mapping[str, Mapping[str, float]], client: Client) -> str:
        name = "accuracy" if self.options.choice_metric == "accuracy" and "accuracy" in found[given] else "loss"
        words = ", ".join(f"{who} {values[name]:.4f}" for who, values in found.items())
        best = f"; best of round {self.rounds[client.id]}" if given == "best" and client.id in self.rounds else ""
        return f"validation {name} on {client.held_out} examples: {words}{best}"


def label_of(candidate: str) -> str:
    """The label of a candidate's validation results."""
    return f"{LABEL} {candidate}"


def _personal(plan: list[plan_pb2.Step]) -> int | None:
    """The place in a plan where the personal model is evaluated."""
    found = [index for index, step in enumerate(plan) if step.HasField("evaluate") and step.evaluate.label == PERSONAL]
    return found[0] if found else None


def _is_sum(mix: plan_pb2.Mixture) -> bool:
    """Whether a mixture is surely one adapter: gates may look at the input."""
    return not mix.shares and not any(term.HasField("gate") for term in mix.terms)


def _inserted(plan: list[plan_pb2.Step], place: int, more: list[plan_pb2.Step]) -> list[plan_pb2.Step]:
    """Steps in a plan; train steps after them draw the batches that they drew before."""
    after = []
    for index, step in enumerate(plan[place:], start=place):
        moved = plan_pb2.Step()
        moved.CopyFrom(step)
        body = moved.train if moved.HasField("train") else moved.distill.train if moved.HasField("distill") else None
        if body is not None and not body.HasField("draw"):
            body.draw.as_step = index
        after.append(moved)
    return [*plan[:place], *more, *after]
