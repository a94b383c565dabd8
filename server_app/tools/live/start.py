"""``fedalloy run``: checks everything that can be checked, starts the run, follows it, and reports its end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from server_app.run.options import least_clients, plain_run_name
from server_app.tools.cluster.superlink import SuperLink
from server_app.tools.cluster.validate import check_clients, check_run_config
from server_app.tools.demo import free_name
from server_app.tools.live.follow import Follower, verdict
from server_app.tools.live.state import FINISHED


@dataclass(frozen=True)
class Order:
    """What to run, and where.

    ``runs`` is the folder of runs as this machine sees it, None if it does not. ``clients`` has node-config by client
    id for the clients with files on this machine, which are tried first.
    """

    config: Mapping[str, Any]
    superlink: SuperLink
    runs: Path | None = None
    clients: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def completed(order: Order) -> Order:
    """The order with the run's name and folder filled in."""
    config = dict(order.config)
    if "resume" not in config:
        name = plain_run_name(config)
        if order.runs is not None:
            config.setdefault("run-name", free_name(order.runs, name))
            config["runs-dir"] = str(order.runs.resolve())
        else:
            config.setdefault("run-name", f"{name}-{time.strftime('%Y%m%d-%H%M%S')}")
    return Order(config, order.superlink, order.runs, order.clients)


def run_path(order: Order) -> Path | None:
    """The run's folder, if this machine has it."""
    if order.config.get("resume"):
        return Path(order.config["resume"]).expanduser()
    return order.runs / str(order.config["run-name"]) if order.runs is not None else None


def checked(order: Order, console: Console) -> Iterator[str]:
    """Yield everything that is wrong: with run-config, the run's name, each client's files, model, and one batch.

    Raises:
        ClusterError: the SuperLink cannot be reached.
    """
    config = order.config
    yield from check_run_config(config)
    path = run_path(order)
    if path is not None and "resume" not in config and (path / "config.toml").exists():
        yield f"{path} already holds a run; choose another run-name, or continue it with resume"
    for client, line, sound in check_clients(order.clients, config) if order.clients else ():
        if sound:
            console.print(f"client {client!r}: {_brief(line)}", highlight=False, markup=False, soft_wrap=True)
        else:
            yield f"client {client!r}: {line}"
    online = order.superlink.online()
    least = least_clients(int(config.get("min-clients", 0)), str(config.get("clients", "")))
    if online < least:
        console.print(
            f"{online} SuperNodes are online, the run waits for {least} (startup-timeout)",
            highlight=False,
            soft_wrap=True,
        )


def _brief(line: str) -> str:
    """What is said of a client, in about 80 columns: ``fedalloy validate`` also has sizes, memory and seconds."""
    left_out = ("trainable parameters", "bytes of an adapter", "memory at least", "a step of")
    return "; ".join(part for part in line.splitlines() if not any(words in part for words in left_out))


def run(order: Order, console: Console, stops: Callable[[], bool]) -> tuple[bool, str]:
    """Start a completed order and follow it to its end; returns whether it succeeded, and a message.

    Args:
        order: see :func:`completed`.
        console: where it is shown.
        stops: says at Ctrl-C whether the run should be stopped.

    Raises:
        ClusterError: Flower refused the run, or the SuperLink is gone.
        KeyboardInterrupt: Ctrl-C; the run was stopped, or goes on.
    """
    path = run_path(order)
    if path is None:
        console.print(
            "the run's folder is not on this machine (--runs-dir): its output is in the log, and no progress is shown",
            highlight=False,
            soft_wrap=True,
        )
        outcome = order.superlink.run(order.config)
        return outcome.completed, outcome.words if outcome.completed else outcome.why()
    with Follower(path, console) as follower:

        def asked() -> bool:
            follower.pause()
            return stops()

        outcome = order.superlink.run(order.config, follower.look, stops=asked)
        state = follower.look(now=True)
    if outcome.completed and state is not None and state.summary:
        if state.state != FINISHED:  # the ServerApp's process is on its way out
            return True, f"finished: {path}"
        return verdict(state)
    return False, outcome.why(path)
