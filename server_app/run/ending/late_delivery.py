"""Models after a run's end: to clients that were absent when it delivered, and to clients that never trained.

Nothing is trained, and the last state is handed out again. A client that the run does not know adopts a model
(:mod:`server_app.run.ending.adoption`), and so does one that is named for it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from flwr.common.logger import log

from server_app.run.clients.client_status import OK, ClientRecord
from server_app.run.clients.participants import is_named
from server_app.run.ending.delivery import hand_out
from server_app.run.ending.last_counters import last_counters
from server_app.run.ending.summary import given_in, headline, with_scores
from server_app.run.federation import SAY_SECONDS, NotEnoughClientsError
from server_app.run.run_directory import RunDirectory, RunDirectoryError
from strategies.framework.exchange import Client

if TYPE_CHECKING:
    from server_app.run.loop import Run

INFO = 20
ALL, MISSING, NEW = "all", "missing", "new"


def wanted_clients(deliver: str, directory: RunDirectory) -> list[str]:
    """Ids of the clients that should get their models: named ones, ``all``, or (``missing``) those without one.

    ``all`` and ``missing`` leave out those that do not take part (``clients``).

    Raises:
        RunDirectoryError: the run is not finished, or has no such client; names those that it has.
    """
    if not (directory.path / "summary.json").exists():
        raise RunDirectoryError(f"the run in {directory.path} is not finished; {directory.how_to_resume}")
    known = sorted(path.stem for path in (directory.path / "registrations").glob("*.pb"))
    taking_part = [name for name in known if is_named(name, str(directory.config().get("clients", "")))]
    if deliver == ALL:
        return taking_part
    if deliver == MISSING:
        return [name for name in taking_part if last_delivery(directory).get(name, {}).get("status") != OK]
    names = [name.strip() for name in deliver.split(",") if name.strip()]
    if unknown := sorted(set(names) - set(known)):
        raise RunDirectoryError(
            f"the run in {directory.path} has no client {', '.join(map(repr, unknown))}; it has {', '.join(known)}"
        )
    return names


def wanted_newcomers(adopt: str, directory: RunDirectory) -> list[str]:
    """Ids of the clients that should adopt a model; ``new`` names none of them.

    Raises:
        RunDirectoryError: the run is not finished, or one of them has trained in it.
    """
    if not (directory.path / "summary.json").exists():
        raise RunDirectoryError(f"the run in {directory.path} is not finished; {directory.how_to_resume}")
    names = [name.strip() for name in adopt.split(",") if name.strip() and name.strip() != NEW]
    if trained := sorted(set(names) & have_trained(directory)):
        raise RunDirectoryError(
            f"{', '.join(trained)} trained in the run in {directory.path}, expected clients that never did; their own "
            f"models: fedalloy deliver {directory.path}"
        )
    return names


def have_trained(directory: RunDirectory) -> set[str]:
    """Ids of the clients that gave a usable answer in a round."""
    rounds = [record["clients"] for record in directory.rounds() if record["phase"] == "train"]
    return {name for clients in rounds for name, said in clients.items() if said["status"] == OK}


def last_delivery(directory: RunDirectory) -> Mapping[str, ClientRecord]:
    """Each client's outcome when models were delivered."""
    found = [record["clients"] for record in directory.rounds() if record["phase"] == "deliver"]
    return found[-1] if found else {}


def deliver_late(run: Run) -> None:
    """Hand out models; the record and the summary then have old and new deliveries together.

    Raises:
        NotEnoughClientsError: nobody who was asked for came within ``startup-timeout``, or answered.
    """
    started, round_ = time.monotonic(), run.completed + 1
    if run.options.adopt:
        known: set[str] = set()
        here = _newcomers(run, round_)
    else:
        known = {name for name in _enrolled_before(run.directory) if is_named(name, run.options.clients)}
        wanted = wanted_clients(run.options.deliver, run.directory)
        if not wanted:
            log(INFO, "finished: every client has its model already")
            return
        here = _wait_for(run, wanted, round_)
    found = hand_out(run, round_, here, 1, known)
    answers = found.answers
    run.record("deliver", round_, {**last_delivery(run.directory), **found.records}, started)
    last_counters(run, round_ + 1)
    summary: dict[str, Any] = json.loads((run.directory.path / "summary.json").read_text())
    for client in here:
        if client.id in answers:
            scores = {**answers[client.id].metrics["personal"], "examples": client.examples}
            summary["clients"] = dict(sorted({**summary["clients"], client.id: scores}.items()))
    missing = [name for name in summary.get("not_delivered", []) if name not in summary["clients"]]
    before = {name: lost for name, lost in summary.get("diverged", {}).items() if name not in answers}
    diverged = dict(sorted((before | found.diverged).items()))
    summary |= {key: summary.get(key, {}) | of for key, of in given_in(found.records).items()}
    summary = with_scores(summary | {"not_delivered": missing, "diverged": diverged})
    run.directory.write_summary(summary)
    if not answers:
        raise NotEnoughClientsError(f"no model was delivered; see {run.directory.path / 'rounds.jsonl'}")
    log(INFO, "finished: %s delivered; %s", ", ".join(sorted(answers)), headline(summary))


def _newcomers(run: Run, round_: int) -> list[Client]:
    """The clients that should adopt a model.

    Raises:
        NotEnoughClientsError: none of them is here.
    """
    wanted = wanted_newcomers(run.options.adopt, run.directory)
    if wanted:
        return _wait_for(run, wanted, round_)
    trained = have_trained(run.directory)
    here = [client for client in run.gather(round_) if client.id not in trained]
    if not here:
        refused = run.enrolment.why_refused()
        why = f"; refused: {refused}" if refused else ""
        raise NotEnoughClientsError(f"every client that is online has trained in this run; nobody is new{why}")
    return here


def _enrolled_before(directory: RunDirectory) -> set[str]:
    """Ids of the clients that the run knew when its last round was over."""
    last = directory.newest_checkpoint()
    return {str(entry["id"]) for entry in last.run.get("clients", ())} if last is not None else set()


def _wait_for(run: Run, wanted: list[str], round_: int) -> list[Client]:
    """The wanted clients that come within ``startup-timeout``; the wait ends when all are here."""
    started, next_word = time.monotonic(), 0.0
    while True:
        here = [client for client in run.gather(round_) if client.id in wanted]
        away, now = sorted(set(wanted) - {client.id for client in here}), time.monotonic()
        if not away or (now - started > run.options.startup_timeout and here):
            return here
        if now - started > run.options.startup_timeout:
            raise NotEnoughClientsError(
                f"{', '.join(away)} did not come within {run.options.startup_timeout:.0f} s (startup-timeout); start "
                "the SuperNode, and ask again"
            )
        if now >= next_word:
            log(INFO, "waiting for %s to come online", ", ".join(away))
            next_word = now + SAY_SECONDS
        time.sleep(max(run.options.poll_interval, 0.2))
