"""Delivers models at the end: those of the last state, or of the best state to clients that got worse."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from flwr.common.logger import log

from server_app.run.asking import Asking
from server_app.run.clients.client_status import OK, REJECTED, ClientRecord
from server_app.run.clients.held_out import LABEL, Fall, Score, with_held_out
from server_app.run.ending.adoption import adopt
from strategies.framework.exchange import Answer, Client

if TYPE_CHECKING:
    from server_app.run.loop import Run

WARNING = 30


@dataclass
class Delivery:
    """The results of a delivery, by client."""

    answers: dict[str, Answer] = field(default_factory=dict)
    records: dict[str, ClientRecord] = field(default_factory=dict)
    fallen: dict[str, Fall] = field(default_factory=dict)

    @property
    def diverged(self) -> dict[str, dict[str, Any]]:
        """For ``summary.json``: the clients that got worse, and the round of the model that they were given."""
        return {
            name: fall.record() | {"delivered_round": self.records[name].get("state")}
            for name, fall in sorted(self.fallen.items())
        }


def hand_out(
    run: Run, round_: int, clients: Sequence[Client], needed: int, known: Collection[str] | None = None
) -> Delivery:
    """Deliver every client's model, and evaluate it; clients that got worse fall back (``on-divergence``).

    Args:
        run: the run whose state is delivered.
        round_: the number of the plans: the state's rounds plus one.
        clients: the clients that are here.
        needed: clients that went away are waited for until there are this many usable answers.
        known: ids of those that belong to the run; the others came after its last round and adopt a model, if there is
            one (:mod:`server_app.run.ending.adoption`). None: all belong to it.
    """
    adopted, records = adopt(run, round_, [c for c in clients if known is not None and c.id not in known])
    clients = [client for client in clients if client.id not in adopted]
    found = _ask(run, round_, clients, min(needed, len(clients)))
    best = run.held_out.best_state
    for client in clients:
        fall = _fall(run, client, found, best)
        if fall is not None:
            found.fallen[client.id] = fall
            log(WARNING, "%s is worse than it was: %s", client.id, fall.words(round_ - 1))
    back = [client for client in clients if client.id in found.fallen and found.fallen[client.id].is_better_before]
    if run.choice.chooses:  # clients that answered choose, also among their best round's models
        back = [client for client in back if client.id not in found.answers]
    if back and best is not None and run.options.on_divergence == "best":
        _fall_back(run, best, back, found)
        run.round_now = round_
    run.choice.give(run, round_, clients, found)
    found.answers |= adopted
    for name, record in records.items():
        if name in adopted:
            found.records[name] = record
        elif name in found.records:  # it was delivered like the others
            found.records[name]["not_adopted"] = record.get("reason", record["status"])
    return found


def _ask(run: Run, round_: int, clients: Sequence[Client], needed: int) -> Delivery:
    found = Delivery()
    briefs = {client: with_held_out(run.strategy.deliver(client), client, run.options) for client in clients}
    is_last = round_ > run.completed
    briefs = {client: run.choice.delivery(client, brief, is_last=is_last) for client, brief in briefs.items()}
    asking = Asking(run, "deliver", round_, briefs, needed)
    found.records = asking.carry_out(lambda _, client, answer: found.answers.update({client.id: answer}))
    for record in found.records.values():
        record["state"] = round_ - 1
    return found


def _fall(run: Run, client: Client, found: Delivery, best: int | None) -> Fall | None:
    record = found.records[client.id]
    if client.id in found.answers:
        metrics = found.answers[client.id].metrics.get(LABEL)
        return run.held_out.fallen(client.id, Score.of(metrics), best) if metrics else None
    if record["status"] == REJECTED and "a finite number" in record["reason"]:
        return run.held_out.fallen(client.id, None, best)
    return None


def _fall_back(run: Run, best: int, clients: Sequence[Client], found: Delivery) -> None:
    """Give these clients their models of the state ``best``, if it is still on the disk and has them."""
    before, last = run.directory.checkpoint(best), run.directory.newest_checkpoint()
    if before is None or last is None:
        log(WARNING, "the state after round %d is no longer on the disk: the last models stay", best)
        return
    known = {entry["id"] for entry in before.run.get("clients", ())}
    back = [client for client in clients if client.id in known]
    names = ", ".join(client.id for client in back)
    log(
        WARNING,
        "given the models after round %d instead: %s (on-divergence='last' leaves the last ones)",
        best,
        names,
    )
    for client in back:
        run.holdings.forget(client.id)
    run.restore(before.state)
    earlier = _ask(run, best + 1, back, 0)
    run.restore(last.state)
    for name, record in earlier.records.items():
        if record["status"] == OK:
            found.records[name], found.answers[name] = record, earlier.answers[name]
