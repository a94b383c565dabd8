"""Runs side by side: each runs once; one that fails or dies is named, and the others go on."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from server_app.tools.compare.processes import errors_once, one_by_one, side_by_side


class Heard:
    def __init__(self) -> None:
        self.begun: list[int] = []
        self.answers: list[int] = []
        self.whys: dict[int, str] = {}
        self.most = 0

    def started(self, index: int) -> None:
        self.begun.append(index)
        self.most = max(self.most, len(self.begun) - len(self.whys))

    def answered(self, index: int) -> None:
        self.answers.append(index)

    def ended(self, index: int, why: str) -> None:
        assert index not in self.whys
        self.whys[index] = why


def work(connection: Connection, clients: int, runs: Path, nodes: None) -> None:
    """Answers twice, leaves a file, and fails or dies where the config says so."""
    while True:
        config = json.loads(connection.recv_bytes())
        if config["do"] == "die":
            os._exit(9)
        for _ in range(clients):
            connection.send_bytes(json.dumps(("answered", "")).encode())
        (runs / config["name"]).write_text(str(os.getpid()))
        connection.send_bytes(json.dumps(("ended", config["do"])).encode())


def test_every_run_is_carried_out_and_a_death_costs_one(tmp_path: Path) -> None:
    heard = Heard()
    doing = ["", "die", "no luck", "", ""]
    configs = [{"do": what, "name": f"run-{index}"} for index, what in enumerate(doing)]
    side_by_side(configs, 2, tmp_path, heard, 2, work=work)
    assert heard.begun == [0, 1, 2, 3, 4]
    assert heard.most == 2
    assert sorted(heard.answers) == [0, 0, 2, 2, 3, 3, 4, 4]
    died = heard.whys.pop(1)
    assert died.startswith("its process ended with exit code 9")
    assert heard.whys == {0: "", 2: "no luck", 3: "", 4: ""}
    workers = {int(path.read_text()) for path in tmp_path.iterdir()}
    assert len(workers) <= 2
    for pid in workers:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_an_interruption_ends_the_processes(tmp_path: Path) -> None:
    class Impatient(Heard):
        def ended(self, index: int, why: str) -> None:
            raise KeyboardInterrupt

    configs = [{"do": "", "name": f"run-{index}"} for index in range(3)]
    with pytest.raises(KeyboardInterrupt):
        side_by_side(configs, 1, tmp_path, Impatient(), 1, work=work)
    (pid,) = {int(path.read_text()) for path in tmp_path.iterdir()}
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_one_by_one_tries_all(tmp_path: Path) -> None:
    def engine(config: object, clients: int, runs: Path, answered: Callable[[], None]) -> None:
        answered()
        if config == {"n": 0}:
            raise ValueError("no luck")

    heard = Heard()
    one_by_one([{"n": 0}, {"n": 1}], 2, tmp_path, heard, engine)
    assert heard.begun == heard.answers == [0, 1]
    assert heard.whys == {0: "ValueError: no luck", 1: ""}


def test_an_error_of_all_clients_is_one_line_and_once(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("test-of-errors-once")
    once = errors_once(logger)
    for client in ("a", "b"):
        try:
            raise KeyError(client)
        except KeyError:
            logger.exception("KeyError: labels")
        logger.warning("not shown")
    logger.removeFilter(once)
    assert [(record.getMessage(), record.exc_info) for record in caplog.records] == [("KeyError: labels", None)]
