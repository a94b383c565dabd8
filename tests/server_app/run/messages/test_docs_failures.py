"""Every message that docs/failures.md quotes is one that the code writes, word for word.

A word in the page may stand for another one (a client's name, a number); ``...`` stands for any words.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Error, Message

from client_app.own.examples import DataError, guess_kind
from client_app.plan.training import TrainingError, _diverged
from client_app.session import _read
from client_app.settings import DataSettings, NodeConfigError, require_node_keys
from fedalloy_adapters.words import one_line
from proto.fedalloy.v1 import plan_pb2
from server_app.run.clients.client_status import FAILED as FAILED_ONE
from server_app.run.clients.client_status import line
from server_app.run.clients.held_out import Fall, Score
from server_app.run.ending.failure import FAILED, STOPPED
from server_app.run.ending.summary import headline
from server_app.run.federation import NotEnoughClientsError, _waiting_for
from server_app.run.messages.reasons import CODES, LOST, OFFLINE
from server_app.tools.cluster.validate import check_run_config
from tests.faults.nodes import NodeGrid, nodes, run_nodes
from tests.server_app.run.clients.test_enrolment import RAISED, Killed, Refusing
from tests.test_repository import ROOT

PAGE = (ROOT / "docs" / "failures.md").read_text()
REASON = "DataError: line 17, column 'label'"
WORSE = {"movies": {"loss": 15.7, "first_loss": 2.76, "delivered_round": 0}}


def raised(kind: type[Exception], action: Callable[[], Any]) -> str:
    with pytest.raises(kind) as found:
        action()
    return one_line(found.value, 4000)


class AllRefuse(NodeGrid):
    """No node can register."""

    def replies(self, message: Message) -> list[Message]:
        return [Message(Error(2, RAISED), reply_to=message)]


def table() -> list[str]:
    """The messages of the page's table."""
    (body,) = re.findall(r"\| message \| means \|\n\|---\|---\|\n((?:\|.*\n)+)", PAGE)
    return [row.split("`")[1] for row in body.splitlines()]


def blocks() -> list[str]:
    """The lines of the page's blocks of messages; one that goes on in the next line is one."""
    found = re.findall(r"```text\n(.*?)```", PAGE, re.S)
    return [one for block in found for one in re.sub(r",\n(?=or )", ", ", block).splitlines()]


def of_refusals(tmp_path: Path) -> dict[str, str]:
    """Each message of a run whose clients are refused or gone, by a word that only it contains."""
    four = nodes("ada", "ben", "cyd", "dee")
    none = {number + 10: node for number, node in four.items()}
    killed = Killed(nodes("ada", "ben", "cyd"))
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("flwr").addHandler(handler)
    try:
        run_nodes(tmp_path, killed, min_clients=2, run_name="killed")
    finally:
        logging.getLogger("flwr").removeHandler(handler)

    def stops(grid: NodeGrid, name: str, **config: Any) -> str:
        return raised(NotEnoughClientsError, lambda: run_nodes(tmp_path, grid, run_name=name, **config))

    return {
        "all": stops(Refusing(nodes("ada", "ben", "cyd")), "all", min_clients=0),
        "few": stops(Refusing(nodes("ada", "ben", "cyd")), "few", min_clients=3),
        "none": stops(AllRefuse(none), "none", min_clients=2),
        "absent": next(said for said in lines if said.startswith("absent: ")),
    }


@pytest.fixture
def produced(tmp_path: Path) -> list[str]:
    """What the code writes; names and numbers that are its arguments are those of the page."""
    refusals = of_refusals(tmp_path)
    step = plan_pb2.TrainStep(learning_rate=10.0, steps=30)
    nan = str(_diverged("training loss became nan at step 2 of 30", step))
    settings = DataSettings(messages_column="mesages")
    fall = Fall(Score(2.76), Score(15.7), None, None)
    two = {name: {"perplexity": 15.823} for name in ("movies", "news")}
    (wrong,) = check_run_config({"lora-r": 0})
    delivery = (ROOT / "server_app" / "run" / "ending" / "delivery.py").read_text()
    (given,) = re.findall(r'"(given the models after .*)"', delivery)
    asked = {name: "" for name in ("movies", "news", "farm")}
    return [
        f"ERROR :     {FAILED}{wrong}",
        f"ERROR :     {STOPPED}{refusals['few']}",
        f"finished: {headline({'clients': two, 'diverged': WORSE})}",
        f"finished: {headline({'clients': two, 'refused': {'shop': REASON}})}",
        line({"status": FAILED_ONE, "reason": f"TrainingError: {nan}"}),
        *(refusals[name] for name in ("all", "few", "none", "absent")),
        raised(NodeConfigError, lambda: require_node_keys({"data-pth": "x"})),
        raised(NodeConfigError, lambda: _read(_settings_without_data())),
        CODES[8],
        OFFLINE,
        LOST,
        raised(DataError, lambda: guess_kind({"messages": []}, settings)),
        str(TrainingError(nan)),
        f"shop is worse than it was: {fall.words(2)}",
        given % (3, "shop"),
        _waiting_for(["shop"], asked, 85, enough=True),
        _waiting_for(["shop"], {}, 85, enough=False),
    ]


def _settings_without_data() -> Any:
    from types import SimpleNamespace as Some

    return Some(data=Some(data_path=""), model=Some(base_model="/base"), scenario="digits")


def is_written(quoted: str, produced: list[str]) -> bool:
    """Whether one of the lines begins as the page quotes it, whatever the client's name and the numbers."""
    pattern = re.escape(re.sub(r"\.\.\.$", "", quoted)).replace(re.escape("..."), ".*")
    pattern = re.sub(r"\d+(?:\\\.\d+)?", r"\\d+(?:\\.\\d+)?", pattern)
    return any(re.match(pattern, re.sub(r"\bcyd\b", "news", said)) for said in produced)


def test_every_message_of_the_page_is_one_that_the_code_writes(produced: list[str]) -> None:
    inline = re.findall(r"`((?:failed \(|finished: )[^`]*)`", PAGE)
    quoted = [*table(), *blocks(), *inline]
    assert len(quoted) >= 20
    unknown = [message for message in quoted if not is_written(message, produced)]
    assert unknown == []


def test_a_message_that_nobody_writes_is_found(produced: list[str]) -> None:
    assert not is_written("its process went away: killed, or out of memory?", produced)
