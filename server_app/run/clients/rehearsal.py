"""A rehearsal: what a strategy would ask of a client in every round of a run.

Nobody answers in it, so requests that depend on answers do not appear; a strategy names those that look at examples
(``asks_later``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from client_app.guard.privacy import why_not_private
from strategies import AlloyStrategy
from strategies.framework.exchange import Brief, Client, StrategyError


def rehearsed(strategy: AlloyStrategy[Any], client: Client) -> Iterator[tuple[int, Client, Brief]]:
    """A client's briefs, those of the rounds (from 1) and that of the delivery, each with its round and the client.

    Args:
        strategy: it stays as it is; a new one with the same options is played.
        client: two others like it take part, too.
    """
    played = type(strategy)(strategy.options, strategy.training, strategy.seed, strategy.rounds)
    played.limits = strategy.limits
    for number, name in enumerate((client.id, "another", "a-third"), 1):
        played.enrol(replace(client, id=name, node_id=number))
    rounds = max(strategy.rounds, 1)
    for round_ in range(1, rounds + 1):
        briefs = {known.id: played.brief(round_, known) for known in played.clients.values()}
        yield round_, played.clients[client.id], briefs[client.id]
        played.settle(round_)
    me = played.clients[client.id]
    yield rounds + 1, me, played.deliver(me)


def why_not_for_private_clients(strategy: AlloyStrategy[Any], client: Client) -> str:
    """Why a client whose examples are under differential privacy cannot take part; empty if it can."""
    try:
        asked = [(step, round_) for round_, _, brief in rehearsed(strategy, client) for step in brief.steps]
    except StrategyError:  # it does not fit, which its enrolment says
        return ""
    except Exception as error:  # a layout beside which no other client was asked; it must not end the run
        return f"strategy {strategy.name!r} cannot be rehearsed with its layout ({type(error).__name__})"
    for step, round_ in asked:
        if reason := why_not_private(step):
            what = f"{step.WhichOneof('kind')} in round {round_}"
            return f"strategy {strategy.name!r} is not private: it would ask for {what}, and {reason}"
    if strategy.asks_later:
        return f"strategy {strategy.name!r} is not private: it would ask for {' and '.join(strategy.asks_later)}"
    return ""
