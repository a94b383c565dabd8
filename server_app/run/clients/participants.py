"""Chooses the clients that a round asks if it does not ask all."""

from __future__ import annotations

import fnmatch
import random
from collections.abc import Mapping, Sequence

from strategies.framework.exchange import Client


def named(clients: Sequence[Client], patterns: str) -> list[Client]:
    """Clients that take part: see :func:`is_named`."""
    return [client for client in clients if is_named(client.id, patterns)]


def is_named(client_id: str, patterns: str) -> bool:
    """Whether a client is one of these, comma-separated, or fits a pattern among them; an empty text names all."""
    wanted = [pattern.strip() for pattern in patterns.split(",") if pattern.strip()]
    return not wanted or any(fnmatch.fnmatchcase(client_id, pattern) for pattern in wanted)


def choose(
    kind: str, clients: Sequence[Client], count: int, *, round_: int, seed: int, seconds: Mapping[str, float]
) -> list[Client]:
    """``count`` of these clients, in order of id.

    ``fastest``: as in straggler-resilient personalised federated learning (Tziotis, Shen, Pedarsani, Hassani and
    Mokhtari, "Straggler-Resilient Personalized Federated Learning", TMLR 2023): training starts with the clients that
    answer soonest, and the cohort doubles until it has all.

    Args:
        kind: ``"random"``, ``"round-robin"`` or ``"fastest"``.
        clients: the clients that are here, in order of id.
        count: clients per round; of the first round if the cohort grows.
        round_: from 1.
        seed: the run's seed; decides what is random.
        seconds: how long each client's last answer took. A client that never answered counts as fast, so that it is
            tried.
    """
    if kind == "fastest":
        count = min(len(clients), count * 2 ** min(round_ - 1, 32))
    if count >= len(clients):
        return list(clients)
    if kind == "round-robin":
        first = (round_ - 1) * count
        chosen = [clients[(first + index) % len(clients)] for index in range(count)]
    elif kind == "fastest":
        chosen = sorted(clients, key=lambda client: (seconds.get(client.id, 0.0), client.id))[:count]
    else:
        chosen = random.Random(f"{seed}:{round_}").sample(list(clients), count)
    return sorted(chosen, key=lambda client: client.id)
