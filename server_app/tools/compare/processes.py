"""Runs in separate processes, several at a time, for ``fedalloy compare --jobs``.

A worker is a Python process with one torch thread that carries out one run after the other by
:mod:`server_app.tools.compare.in_process_grid`. Parent and worker exchange JSON over a pipe: a run-config one way,
``answered`` and ``ended`` the other. A worker that dies takes its run with it and no other; the next run gets a new
one.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import signal
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, Protocol

from flwr.app import Context, Message, RecordDict

from fedalloy_adapters.layout import Layout
from proto.fedalloy.v1 import report_pb2
from server_app.tools.compare.in_process_grid import InProcessGrid

Config = Mapping[str, Any]
Engine = Callable[[Config, int, Path, Callable[[], None]], None]
"""Carries out one run, or raises: ``(run-config, clients, runs folder, call after every answer)``."""
Nodes = Mapping[str, Mapping[str, Any]]
"""Node-config by client id."""


class Watch(Protocol):
    """Called about runs, by their place in the list."""

    def started(self, index: int) -> None:
        """A run begins."""

    def answered(self, index: int) -> None:
        """One of its clients has answered."""

    def ended(self, index: int, why: str) -> None:
        """A run has ended; ``why`` says why it failed, or is empty."""


class NotWorthError(RuntimeError):
    """The result of a run would equal that of another one."""


def require_worth(config: Config, runs: Path) -> None:
    """Refuse a run that re-fits heads if the clients of a comparison have none.

    Raises:
        NotWorthError: the run would equal another one; the message says which.
    """
    if config["strategy"] != "fedavg-head":
        return
    for path in runs.glob("*/registrations/*.pb"):
        said = report_pb2.Registration.FromString(path.read_bytes())
        if not Layout.from_proto(said.layout).head_modules:
            raise NotWorthError("it would equal fedavg: the clients' models have no head to re-fit")


def in_process(
    config: Config, clients: int, runs: Path, answered: Callable[[], None], nodes: Nodes | None = None
) -> None:
    """The engine without a network: the wire is not measured, everything else is the same.

    ``nodes`` has more node-config for each client, by client id.
    """
    from server_app.run.loop import run

    require_worth(config, runs)

    def count(node: int, message: Message, reply: Message | None) -> Message | None:
        answered()
        return reply

    config = {**config, "runs-dir": str(runs)}
    own = [{"client-id": name, **node} for name, node in (nodes or {}).items()]
    grid = InProcessGrid(clients, runs, config, own.__getitem__ if own else None, count)
    run(grid, Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config=config))


def one_by_one(configs: Sequence[Config], clients: int, runs: Path, watch: Watch, engine: Engine) -> None:
    """Carry out runs in this process, in order; if one fails, the others are still tried."""
    for index, config in enumerate(configs):
        watch.started(index)
        watch.ended(index, _attempt(engine, config, clients, runs, lambda index=index: watch.answered(index)))  # type: ignore[misc]


def side_by_side(
    configs: Sequence[Config],
    clients: int,
    runs: Path,
    watch: Watch,
    count: int,
    nodes: Nodes | None = None,
    work: Callable[..., None] | None = None,
) -> None:
    """The same in ``count`` processes, with runs started in order. The processes end with this function.

    ``nodes`` is as for :func:`in_process`; ``work`` is a worker's function, by default one that calls it for each run.
    """
    waiting = list(enumerate(configs))[::-1]
    busy: dict[Connection, tuple[int, SpawnProcess]] = {}
    idle: list[tuple[Connection, SpawnProcess]] = []
    started: list[SpawnProcess] = []
    try:
        while waiting or busy:
            while waiting and len(busy) < count:
                connection, process = idle.pop() if idle else _start(work or _work, clients, runs, nodes)
                started += [process] if process not in started else []
                index, config = waiting.pop()
                busy[connection] = index, process
                watch.started(index)
                _tell(connection, dict(config))
            for ready in wait(list(busy)):
                assert isinstance(ready, Connection)
                index, process = busy[ready]
                try:
                    said, why = json.loads(ready.recv_bytes())
                except (EOFError, OSError):  # nothing more will come
                    process.join()
                    del busy[ready]
                    watch.ended(index, f"its process ended with exit code {process.exitcode} (killed? out of memory?)")
                    continue
                if said == "answered":
                    watch.answered(index)
                else:
                    idle.append((ready, busy.pop(ready)[1]))
                    watch.ended(index, why)
    finally:
        for process in started:
            process.kill()  # its run begins anew the next time
            process.join()


def _start(work: Callable[..., None], clients: int, runs: Path, nodes: Nodes | None) -> tuple[Connection, SpawnProcess]:
    # spawn, because torch and gRPC have threads, which a fork would lose.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(theirs, clients, runs, nodes), daemon=True)
    process.start()
    theirs.close()  # otherwise the worker's end would not be noticed
    return ours, process


def _work(connection: Connection, clients: int, runs: Path, nodes: Nodes | None) -> None:
    """A worker's main function."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent as well, which ends this process
    errors_once(logging.getLogger("flwr"))
    import torch

    torch.set_num_threads(1)
    try:
        while True:
            config = json.loads(connection.recv_bytes())
            why = _attempt(
                partial(in_process, nodes=nodes), config, clients, runs, lambda: _tell(connection, ("answered", ""))
            )
            _tell(connection, ("ended", why))
    except (EOFError, OSError):  # the parent is gone
        return


class _Once(logging.Filter):
    """Lets each error through in one line, without its traceback, and only the first time."""

    def __init__(self) -> None:
        super().__init__()
        self._said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        record.exc_info = record.exc_text = record.stack_info = None
        text, known = record.getMessage(), len(self._said)
        self._said.add(text)
        return len(self._said) > known


def errors_once(logger: logging.Logger) -> logging.Filter:
    """Make a logger print errors only, each in one line and once: all clients of all runs may have the same."""
    once = _Once()
    logger.setLevel(logging.ERROR)
    logger.addFilter(once)
    return once


def _attempt(engine: Engine, config: Config, clients: int, runs: Path, answered: Callable[[], None]) -> str:
    try:
        engine(config, clients, runs, answered)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _tell(connection: Connection, what: object) -> None:
    connection.send_bytes(json.dumps(what).encode())
