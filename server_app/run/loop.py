"""One run: register, rounds, delivery, last counters, summary. Everything is on disk before the next thing starts."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.common.logger import log
from flwr.serverapp import Grid

from fedalloy_adapters.words import one_line
from server_app.ledger.recorder import Booking, WireLog, explained
from server_app.run.asking import Asking
from server_app.run.clients import client_status
from server_app.run.clients.client_status import LEFT, REJECTED, ClientRecord
from server_app.run.clients.enrolment import Enrolment
from server_app.run.clients.held_out import HeldOut
from server_app.run.clients.participants import choose, named
from server_app.run.clients.strikes import Strikes
from server_app.run.ending.choice import Choice
from server_app.run.ending.delivery import Delivery, hand_out
from server_app.run.ending.last_counters import last_counters
from server_app.run.ending.late_delivery import deliver_late
from server_app.run.ending.summary import given_in, headline, summary_of
from server_app.run.evaluations import spared
from server_app.run.federation import (
    SAY_SECONDS,
    Federation,
    NoClientError,
    NotEnoughClientsError,
    one_reason,
    require_enough,
)
from server_app.run.known_runs import note_run
from server_app.run.messages.exchange import Reply
from server_app.run.messages.late_answers import LateAnswers
from server_app.run.messages.reasons import is_from_client
from server_app.run.messages.requests import Requests
from server_app.run.options import RunOptions, as_toml, default_run_name, read_run_options, run_on
from server_app.run.progress import Progress
from server_app.run.resume import (
    changed_code,
    checkpoint_of,
    clients_to_json,
    code_versions,
    open_again,
    saved_clients,
)
from server_app.run.run_directory import Checkpoint, RunDirectory
from server_app.run.trackers import Trackers
from strategies import AlloyStrategy, strategy_from_run_config
from strategies.framework import round_record
from strategies.framework.exchange import Answer, Client, State
from strategies.framework.holdings import Holdings, without_holdings
from strategies.framework.limits import unsound

INFO, WARNING = 20, 30


def run(grid: Grid, context: Context) -> RunDirectory:
    """Carry out a run, from the start or (``resume``) from its last complete round; returns its directory.

    Raises:
        OptionError: run-config is not valid.
        RunDirectoryError: the run directory exists, cannot be written, or cannot be continued.
        NotEnoughClientsError: fewer than ``min-clients`` registered, are here or answered; everything so far is saved.
    """
    options = read_run_options(context.run_config)
    strategy = strategy_from_run_config(context.run_config)
    if options.resume:
        directory = open_again(Path(options.resume).expanduser(), context.run_config, options)
    else:
        name = options.run_name or default_run_name(context.run_config, context.run_id)
        directory = RunDirectory.create(Path(options.runs_dir).expanduser(), name, as_toml(context.run_config))
    name = directory.path.resolve().name
    note_run(directory.path)
    log(INFO, "FedAlloy run %s in %s", name, directory.path.resolve())
    ledger = directory.path / "ledger.sqlite"
    requests = Requests(name, context.run_config, options.sign_with)
    with directory.alone(), explained(ledger), WireLog(ledger, name, grid) as wire:
        whole = Run(grid, options, strategy, directory, wire, requests)
        with whole.trackers:
            try:
                whole.run()
            except NotEnoughClientsError as error:
                whole.record("stopped", whole.completed, {}, time.monotonic(), reason=str(error))
                raise
            finally:
                whole.progress.remove()
    return directory


class Run:
    """The loop of one run; see the module's docstring."""

    def __init__(
        self,
        grid: Grid,
        options: RunOptions,
        strategy: AlloyStrategy[Any],
        directory: RunDirectory,
        wire: WireLog,
        requests: Requests,
    ) -> None:
        self.options = options
        self.strategy = strategy
        self.directory = directory
        self.wire = wire
        self.name = requests.run_name
        self.requests = requests
        self.run_key = directory.run_key()
        self.enrolment = Enrolment(strategy, directory, options.site_mode)
        strategy.storage.spill_to(directory.path / "bank", int(options.bank_memory_mb * 10**6))
        self.federation = Federation(
            grid, options.poll_interval, _say, self._arrived, self.enrolment, requests.registration
        )
        self.late = LateAnswers(strategy)
        self.federation.late = self.late.take
        self.holdings = Holdings(strategy.storage)
        self.strikes = Strikes(options.strikes)
        self.held_out = HeldOut()
        self.choice = Choice(options, strategy)
        self.trackers = Trackers(options.trackers, directory.path, directory.config() if options.trackers else {})
        self.progress = Progress(directory.path, options.num_server_rounds)
        self.completed = 0
        self.spent: dict[str, float] = defaultdict(float)  # seconds of each phase's slowest client, by activity
        self.started = time.monotonic()
        self.round_now = 0
        self.answer_seconds: dict[str, float] = {}  # of each client's last answer
        self._registered: dict[str, ClientRecord] = {}

    def run(self) -> None:
        """Run from the first message, or the last complete round, to the summary."""
        checkpoint = checkpoint_of(self.directory) if self.options.resume else None
        if checkpoint is not None:
            self._continue_from(checkpoint)
        self._register(checkpoint)
        if self.options.is_over:
            deliver_late(self)
            return
        for round_ in range(self.completed + 1, self.options.num_server_rounds + 1):
            self._round(round_)
            if self.choice.exhausted:
                log(INFO, "round %d is the last: no client improved in %d rounds (patience)", round_, self.choice.since)
                break
        final = self._deliver(self.completed + 1)
        last_counters(self, self.completed + 2)
        self._summarise(final)

    # --------------------------------------------------------------------------------------------- clients and rounds

    def _continue_from(self, checkpoint: Checkpoint) -> None:
        self.completed = checkpoint.round
        self.spent = defaultdict(float, checkpoint.run.get("spent", {}))
        self.answer_seconds = dict(checkpoint.run.get("answer_seconds", {}))
        self.started -= checkpoint.run["seconds"]
        self.strikes = Strikes(self.options.strikes, checkpoint.run.get("strikes"))
        self.choice = Choice(self.options, self.strategy, checkpoint.run.get("choice"))
        record = checkpoint.run["record"]
        self.held_out = HeldOut(self.directory.rounds())
        if self.options.is_over:  # completed rounds stay
            return
        if record not in self.directory.rounds():  # a kill between checkpoint and record
            self.directory.append_round(record)
        self.held_out = HeldOut(self.directory.rounds())
        changed = changed_code(checkpoint.run.get("code"))
        if changed:
            log(WARNING, "resumed with other code: numbers may differ from those of a run that was not interrupted; %s",
                "; ".join(f"{name} {words}" for name, words in changed.items()))  # fmt: skip
        self.record("resumed", checkpoint.round, {}, time.monotonic(), **({"code": changed} if changed else {}))
        log(INFO, "resumed after round %d of %d", checkpoint.round, self.options.num_server_rounds)

    def _register(self, checkpoint: Checkpoint | None) -> None:
        started = time.monotonic()
        saved = saved_clients(self.directory, checkpoint) if checkpoint is not None else []
        self.enrolment.keys.update({known.client.id: known.key for known in saved})
        watch = Booking(self.wire, 0, "query")
        self.progress.phase("register", self.completed, ())
        self.federation.register(self.options.least, self.options.startup_timeout, watch)
        self.enrolment.restore(saved)
        if checkpoint is not None:
            self.holdings.take_from(checkpoint.state)
            self.restore(checkpoint.state)
        self.enrolment.enrol_newcomers()
        records = self._registered | {
            who: {"status": status, "reason": why, **self.enrolment.node_of(who)}
            for status, found in ((LEFT, self.enrolment.away), (REJECTED, self.enrolment.refused))
            for who, why in found.items()
        }
        record = self.record("register", self.completed, records, started)
        require_enough(self.enrolment, self.options)
        if checkpoint is None:
            self._checkpoint(0, record)

    def _arrived(self, reply: Reply, client: Client | None) -> None:
        """A node has registered, at the start or during a round."""
        reading = client.registration.wire if client is not None else None
        self.wire.arrived(self.round_now, reply.client_id, "query", reply.message, reading)
        if client is None:
            self.wire.fetched(reply.client_id, is_from_client(reply.message))
            return
        self.wire.registered(reply.client_id, client.id)
        key = self.enrolment.names.get(client.id, "")
        self.progress.answered(client.id, {"status": client_status.OK, "seconds": round(reply.seconds, 3)})
        self._registered[client.id] = record = client_status.of_registration(client, key, reply.seconds)
        log(INFO, "registered client %s: %d training examples, %s", client.id, client.examples, record["base"])
        for note in [note for task in client.registration.tasks for note in task.notes][: client_status.SHOWN]:
            log(INFO, "%s's data: %s", client.id, one_line(note))

    def gather(self, round_: int) -> list[Client]:
        """Clients that are online, newcomers among them; waits for ``min-clients`` of those that take part.

        Raises:
            NotEnoughClientsError: they did not come within ``startup-timeout``.
        """
        self.round_now = round_
        started, next_word = time.monotonic(), 0.0
        while True:
            watch = Booking(self.wire, round_, "query")
            self.federation.present(watch)
            self.enrolment.enrol_newcomers()
            present = self.federation.present(watch)
            wanted = present if self.options.is_over else named(present, self.options.clients)
            if len(wanted) >= self.options.least:
                return present
            now, here = time.monotonic(), ", ".join(client.id for client in wanted) or "nobody"
            count = f"round {round_}: {len(wanted)} of at least {self.options.least} clients are here ({here})"
            if now - started > self.options.startup_timeout:
                raise NotEnoughClientsError(
                    f"{count} after {self.options.startup_timeout:.0f} s (startup-timeout). Everything up to round "
                    f"{self.completed} is saved; when they are back, {self.directory.how_to_resume}"
                )
            if now >= next_word:
                log(INFO, "%s; waiting", count)
                self.progress.phase("waiting", round_, ())
                next_word = now + SAY_SECONDS
            time.sleep(max(self.options.poll_interval, 0.2))

    def _round(self, round_: int) -> None:
        started = time.monotonic()
        present = self.gather(round_)
        wanted = named(present, self.options.clients)
        everyone = self.strategy.needs_everyone(round_)
        due = wanted if everyone else self.strikes.due(round_, wanted, self.options.least)
        chosen = self._sample(round_, due)
        needed = min(self.options.least, len(chosen))
        briefs = {c: spared(self.strategy.brief(round_, c), c, round_, self.options) for c in chosen}
        briefs = {c: self.choice.brief(round_, c, brief) for c, brief in briefs.items()}
        records = Asking(self, "train", round_, briefs, needed).carry_out(self._absorb)
        self.strikes.book(round_, records)
        records |= self._absent(present) | self.strikes.resting(wanted, due)
        answered = client_status.usable(records)
        if answered < needed:
            self.record("train", round_, records, started)
            reason = "" if answered else one_reason({name: r.get("reason", "") for name, r in records.items()})
            if reason:
                raise NoClientError(
                    f"round {round_}: none of {len(records)} clients could, all for one reason: {reason}. The round "
                    f"does not count; when this is fixed, {self.directory.how_to_resume}"
                )
            raise NotEnoughClientsError(
                f"round {round_}: {answered} of at least {needed} clients gave a usable answer; "
                f"see {self.directory.path / 'rounds.jsonl'}. The round does not count; to do it again, "
                f"{self.directory.how_to_resume}"
            )
        self.held_out.take(round_, records)
        for name, fall in self.held_out.fallen_in(round_ - 1).items() if round_ > 1 else ():
            log(WARNING, "[train %d] %s began this round with a worse model: %s", round_, name, fall.words(round_ - 1))
        settled = self._settle(round_)
        self.choice.settle()
        record = self._record_of("train", round_, records, started, settled=settled)
        self._checkpoint(round_, record)
        self._tell(record)

    def _absorb(self, round_: int, client: Client, answer: Answer) -> None:
        self.strategy.absorb(round_, client, answer)
        self.choice.absorb(round_, client, answer)

    def _settle(self, round_: int) -> dict[str, Any]:
        """Merge. If the result has numbers that the server would refuse from a client, the last state stays."""
        settled = dict(self.strategy.settle(round_))
        reason = unsound(self.strategy.state())
        before = self.directory.newest_checkpoint() if reason is not None else None
        if reason is None or before is None:
            return settled
        log(WARNING, "round %d is not merged: %s", round_, reason)
        self.restore(before.state)  # clients still hold what this round has sent them
        return settled | {round_record.UNSOUND: reason}

    def restore(self, state: State) -> None:
        """Give the strategy its own part of a checkpoint's state."""
        self.strategy.load_state(without_holdings(state))

    def _checkpoint(self, round_: int, record: Mapping[str, Any]) -> None:
        about = {
            "clients": clients_to_json(self.enrolment.clients, self.enrolment.keys),
            "code": code_versions(),
            "strikes": self.strikes.saved(),
            "choice": self.choice.saved(),
            "spent": dict(self.spent),
            "answer_seconds": self.answer_seconds,
            "seconds": time.monotonic() - self.started,
            "record": record,
        }
        state = self.strategy.state()
        self.holdings.add_to(state)
        self.directory.save_checkpoint(round_, state, self.options.keep_checkpoints, about, self.held_out.best_state)
        self.completed = round_

    def _deliver(self, round_: int) -> Delivery:
        started = time.monotonic()
        known = set(self.enrolment.clients)
        present = self.gather(round_)
        wanted = named(present, self.options.clients)
        found = hand_out(self, round_, wanted, min(self.options.least, len(wanted)), known)
        self.record("deliver", round_, found.records | self._absent(present), started)
        return found

    @property
    def participants(self) -> list[Client]:
        """Enrolled clients that take part (``clients``), in order of id."""
        return named([client for _, client in sorted(self.enrolment.clients.items())], self.options.clients)

    def _absent(self, present: list[Client]) -> dict[str, ClientRecord]:
        return {client.id: {"status": client_status.ABSENT} for client in self.participants if client not in present}

    def _sample(self, round_: int, clients: list[Client]) -> list[Client]:
        if self.strategy.needs_everyone(round_):
            return clients
        fraction = self.strategy.fraction(self.options.fraction_clients)
        count = max(self.options.least, round(fraction * len(clients)))
        kind = self.strategy.participants or self.options.participants
        return choose(kind, clients, count, round_=round_, seed=self.options.seed, seconds=self.answer_seconds)

    def record(
        self, phase: str, round_: int, clients: Mapping[str, ClientRecord], started: float, **more: Any
    ) -> dict[str, Any]:
        """Append what happened in a phase to ``rounds.jsonl``."""
        record = self._record_of(phase, round_, clients, started, **more)
        self._tell(record)
        return record

    def _tell(self, record: dict[str, Any]) -> None:
        """Report to the run's files first, then to its trackers."""
        self.directory.append_round(record)
        if self.options.trackers:
            self.trackers.take(record, self.wire.ledger.by_client())

    def _record_of(
        self, phase: str, round_: int, clients: Mapping[str, ClientRecord], started: float, **more: Any
    ) -> dict[str, Any]:
        record: dict[str, Any] = {
            "phase": phase,
            "round": round_,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - started, 3),
            "clients": dict(sorted(clients.items())),
        }
        if self.federation.overdue_answers:
            record["late_answers"] = dict(sorted(self.federation.overdue_answers.items()))
            self.federation.overdue_answers.clear()
        return record | more

    def _summarise(self, final: Delivery) -> None:
        clients = {
            client.id: {**final.answers[client.id].metrics["personal"], "examples": client.examples}
            for _, client in sorted(self.enrolment.clients.items())
            if client.id in final.answers
        }
        private = {
            client_id: client_status.privacy_of(final.answers[client_id].report.privacy)
            for client_id in clients
            if final.answers[client_id].report.HasField("privacy")
        }
        summary = summary_of(
            self.options, clients, time.monotonic() - self.started, self.spent, self.wire.totals(),
            dict([run_on(self.directory.config())]),
        )  # fmt: skip
        refused = dict(sorted(self.enrolment.refused.items()))
        missing = sorted({client.id for client in self.participants} - set(clients))
        away = sorted(set(self.enrolment.away) - set(self.enrolment.clients))
        summary |= {"refused": refused, "absent": away, "not_delivered": missing, "diverged": final.diverged}
        summary |= {"privacy": private} if private else {}
        summary |= given_in(final.records)
        self.directory.write_summary(summary)
        log(WARNING if refused or away or missing or final.fallen else INFO, "finished: %s", headline(summary))


def _say(text: str) -> None:
    log(INFO, "%s", text)
