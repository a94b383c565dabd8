"""One run: register, rounds, delivery, last counters, summary. Everything is on disk before the next thing starts."""

from __future__ import annotations

import random
import subprocess
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import flwr
from flwr.app import Context, Message
from flwr.common.logger import log
from flwr.serverapp import Grid

from proto.fedalloy.v1 import report_pb2
from server_app.federation import Federation, NotEnoughClientsError, Reply
from server_app.options import RunOptions, as_toml, read_run_options
from server_app.run_directory import RunDirectory
from server_app.wire_log import WireLog
from strategies import AlloyStrategy, strategy_from_run_config
from strategies.base import Answer, Brief, Client, StrategyError, answer_from
from strategies.messages import BadAnswerError, Dispatch, counters_message, plan_dispatch, read_counters

INFO, WARNING = 20, 30
_SHOWN = 5
ClientRecord = dict[str, Any]


def run(grid: Grid, context: Context) -> RunDirectory:
    """Run what run-config says and return the finished run's directory.

    Raises:
        OptionError: run-config is not valid.
        RunDirectoryError: the run directory exists or cannot be written.
        NotEnoughClientsError: fewer than ``min-clients`` registered or answered a round; everything so far is saved.
    """
    options = read_run_options(context.run_config)
    strategy = strategy_from_run_config(context.run_config)
    name = options.run_name or f"{options.strategy}-{options.scenario}-{context.run_id}"
    directory = RunDirectory.create(Path(options.runs_dir).expanduser(), name, as_toml(context.run_config))
    log(INFO, "FedAlloy run %s in %s", name, directory.path.resolve())
    with WireLog(directory.path / "ledger.sqlite", name, grid) as wire:
        try:
            Run(grid, options, strategy, directory, wire, name).run()
        except NotEnoughClientsError as error:
            directory.append_round(
                {"phase": "stopped", "round": 0, "clients": {}, "reason": str(error), "seconds": 0.0}
            )
            raise
    return directory


class Run:
    """The loop of one run; see the module's docstring."""

    def __init__(
        self,
        grid: Grid,
        options: RunOptions,
        strategy: AlloyStrategy,
        directory: RunDirectory,
        wire: WireLog,
        name: str,
    ) -> None:
        self.options = options
        self.strategy = strategy
        self.directory = directory
        self.wire = wire
        self.name = name
        self.federation = Federation(grid, options.poll_interval, lambda text: log(INFO, "%s", text))
        self.training_seconds = 0.0
        self.started = time.monotonic()

    def run(self) -> None:
        """From the first message to the summary."""
        self._register()
        for round_ in range(1, self.options.num_server_rounds + 1):
            self._round(round_)
        final = self._deliver(self.options.num_server_rounds + 1)
        self._last_counters(self.options.num_server_rounds + 2)
        self._summarise(final)

    def _register(self) -> None:
        started = time.monotonic()
        records: dict[str, ClientRecord] = {}
        watch = _Booking(self.wire, 0, "query")
        arrivals: dict[str, Reply] = {}
        for reply in self.federation.register(self.options.min_clients, self.options.startup_timeout, watch):
            arrivals[reply.client_id] = reply
        names = {f"node {client.node_id}": client for client in self.federation.clients.values()}
        for node, reply in arrivals.items():
            client = names.get(node)
            self.wire.arrived(0, node, "query", reply.message, client.registration.wire if client else None)
            if client is None:
                continue
            self.wire.registered(node, client.id)
            log(INFO, "registered client %s: %d training examples, %s", client.id, client.examples, client.base_model)
            for note in [note for task in client.registration.tasks for note in task.notes][:_SHOWN]:
                log(INFO, "%s's data: %.200r", client.id, note)  # a stranger's words: quoted, and cut
            records[client.id] = {"status": "ok", "examples": client.examples, "seconds": round(reply.seconds, 3)}
        for client_id in sorted(self.federation.clients):  # enrolled in order of id, not of arrival
            try:
                self.strategy.enrol(self.federation.clients[client_id])
            except StrategyError as error:
                del self.federation.clients[client_id]
                self.federation.refused[client_id] = str(error)
                log(WARNING, "refused: %s", error)
        for who, why in self.federation.refused.items():
            records[who] = {"status": "rejected", "reason": why}
        self._record("register", 0, records, started)
        if len(self.federation.clients) < self.options.min_clients:
            reasons = "; ".join(self.federation.refused.values())
            raise NotEnoughClientsError(
                f"{len(self.federation.clients)} of at least {self.options.min_clients} clients fit. {reasons}"
            )

    def _round(self, round_: int) -> None:
        started = time.monotonic()
        chosen = self._sample(round_)
        records = self._ask("train", round_, {c: self.strategy.brief(round_, c) for c in chosen}, self.strategy.absorb)
        settled = self.strategy.settle(round_)
        self.directory.save_checkpoint(round_, self.strategy.state(), self.options.keep_checkpoints)
        answered = sum(record["status"] == "ok" for record in records.values())
        self._record("train", round_, records, started, settled)
        if answered < min(self.options.min_clients, len(chosen)):
            raise NotEnoughClientsError(
                f"round {round_}: {answered} of at least {self.options.min_clients} clients gave a usable answer; "
                f"see {self.directory.path / 'rounds.jsonl'}"
            )

    def _deliver(self, round_: int) -> dict[str, Answer]:
        started = time.monotonic()
        answers: dict[str, Answer] = {}
        briefs = {client: self.strategy.deliver(client) for client in self._clients()}
        records = self._ask("deliver", round_, briefs, lambda _, client, answer: answers.update({client.id: answer}))
        self._record("deliver", round_, records, started)
        return answers

    def _last_counters(self, round_: int) -> None:
        """The counters in a reply were read before it was sent, so the last reply needs one more question."""
        started = time.monotonic()
        if not self.wire.is_measuring:
            return
        records: dict[str, ClientRecord] = {}
        timeout = min(self.options.round_timeout, 60.0)
        messages = {client.id: counters_message(client.node_id, timeout) for client in self._clients()}
        for reply in self.federation.exchange(messages, timeout, _Booking(self.wire, round_, "query")):
            record: ClientRecord = {"status": "ok", "seconds": round(reply.seconds, 3)}
            reading = None
            try:
                reading = read_counters(_require(reply)).wire
            except BadAnswerError as error:
                record |= {"status": "failed", "reason": str(error)}
            self.wire.arrived(round_, reply.client_id, "query", reply.message, reading)
            records[reply.client_id] = record
        self._record("counters", round_, records, started)

    def _ask(
        self,
        phase: str,
        round_: int,
        briefs: Mapping[Client, Brief],
        absorb: Callable[[int, Client, Answer], None],
    ) -> dict[str, ClientRecord]:
        """Send every client its brief; absorb good answers as they arrive; a record for every client asked."""
        clients = {client.id: client for client in briefs}
        dispatches = {client.id: self._dispatch(round_, client, brief) for client, brief in briefs.items()}
        messages = {
            name: dispatch.message(clients[name].node_id, ttl=self.options.round_timeout + 60)
            for name, dispatch in dispatches.items()
        }
        tensors = {name: dispatch.tensor_bytes for name, dispatch in dispatches.items()}
        watch = _Booking(self.wire, round_, phase, tensors)
        records: dict[str, ClientRecord] = {}
        slowest = 0.0
        for reply in self.federation.exchange(messages, self.options.round_timeout, watch):
            client = clients[reply.client_id]
            records[client.id] = record = self._absorb(phase, round_, client, dispatches[client.id], reply, absorb)
            slowest = max(slowest, float(record.get("train_seconds", 0.0)))
            log(
                INFO if record["status"] == "ok" else WARNING, "[%s %d] %s: %s", phase, round_, client.id, _line(record)
            )
        self.training_seconds += slowest
        return dict(sorted(records.items()))

    def _absorb(
        self,
        phase: str,
        round_: int,
        client: Client,
        dispatch: Dispatch,
        reply: Reply,
        absorb: Callable[[int, Client, Answer], None],
    ) -> ClientRecord:
        record: ClientRecord = {"seconds": round(reply.seconds, 3)}
        if reply.message is None or reply.message.has_error():
            self.wire.arrived(round_, client.id, phase, reply.message)
            if reply.message is None:
                return record | {"status": "late", "reason": f"no answer within {self.options.round_timeout:.0f} s"}
            return record | {"status": "failed", "reason": reply.message.error.reason}
        try:
            answer = answer_from(dispatch, reply.message)
        except BadAnswerError as error:
            self.wire.arrived(round_, client.id, phase, reply.message, None, dispatch)
            return record | {"status": "rejected", "reason": str(error)}
        self.wire.arrived(round_, client.id, phase, reply.message, answer.report.wire, dispatch)
        absorb(round_, client, answer)
        results = answer.report.results
        trains = [r.distill.train if r.HasField("distill") else r.train for r in results if _trains(r)]
        return record | {
            "status": "ok",
            "client_seconds": round(answer.report.seconds, 3),
            "train_seconds": round(sum(train.seconds for train in trains), 3),
            "train_loss": [None if train.diverged else round(train.mean_loss, 6) for train in trains],
            "metrics": {label: dict(values) for label, values in answer.metrics.items()},
        }

    def _dispatch(self, round_: int, client: Client, brief: Brief) -> Dispatch:
        return plan_dispatch(
            brief.steps,
            brief.adapters,
            client_id=client.id,
            layout=client.layout,
            round_=round_,
            seed=self.options.seed,
            run_name=self.name,
            encoding=self.strategy.training.downlink_encoding,
            reference=client.reference,
        )

    def _clients(self) -> list[Client]:
        return [self.federation.clients[client_id] for client_id in sorted(self.federation.clients)]

    def _sample(self, round_: int) -> list[Client]:
        clients = self._clients()
        count = max(self.options.min_clients, round(self.options.fraction_clients * len(clients)))
        if count >= len(clients) or self.strategy.needs_everyone(round_):
            return clients
        chosen = random.Random(f"{self.options.seed}:{round_}").sample(clients, count)
        return sorted(chosen, key=lambda client: client.id)

    def _record(
        self,
        phase: str,
        round_: int,
        clients: Mapping[str, ClientRecord],
        started: float,
        settled: Mapping[str, Any] | None = None,
    ) -> None:
        record: dict[str, Any] = {
            "phase": phase,
            "round": round_,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - started, 3),
            "clients": dict(clients),
        }
        if settled is not None:
            record["settled"] = dict(settled)
        self.directory.append_round(record)

    def _summarise(self, final: Mapping[str, Answer]) -> None:
        clients = {
            client.id: {**final[client.id].metrics["personal"], "examples": client.examples}
            for client in self._clients()
            if client.id in final
        }
        scores = [metrics["accuracy"] for metrics in clients.values() if "accuracy" in metrics]
        total = time.monotonic() - self.started
        totals, unexplained = self.wire.totals()
        summary = {
            "strategy": self.options.strategy,
            "rounds": self.options.num_server_rounds,
            "seed": self.options.seed,
            "scenario": self.options.scenario,
            "clients": clients,
            "mean_accuracy": sum(scores) / len(scores) if scores else None,
            "worst_accuracy": min(scores) if scores else None,
            "bytes": totals,
            "unexplained_wire_fraction": unexplained,
            "seconds": {
                "total": round(total, 3),
                "training": round(self.training_seconds, 3),
                "overhead": round(total - self.training_seconds, 3),
            },
            "flwr": flwr.__version__,
            "git": git_commit(),
        }
        self.directory.write_summary(summary)
        log(INFO, "finished: mean accuracy %s, worst %s", summary["mean_accuracy"], summary["worst_accuracy"])


class _Booking:
    """Books what one exchange pushes: see :class:`server_app.federation.Watch`."""

    def __init__(
        self, wire: WireLog, round_: int, kind: str, tensors: Mapping[str, Mapping[str, int]] | None = None
    ) -> None:
        self.wire, self.round, self.kind, self.tensors = wire, round_, kind, tensors or {}

    def pushing(self, client_id: str) -> None:
        self.wire.pushing(self.round, client_id, self.kind)

    def pushed(self, client_id: str, message: Message) -> None:
        self.wire.pushed(self.round, client_id, self.kind, message, self.tensors.get(client_id, {}))


def git_commit() -> str | None:
    """The commit of the checkout that the process was started in, or None."""
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    except OSError:  # no git here
        return None
    return found.stdout.strip() or None if found.returncode == 0 else None


def _require(reply: Reply) -> Message:
    if reply.message is None:
        raise BadAnswerError(f"client {reply.client_id!r} did not answer in time")
    return reply.message


def _trains(result: report_pb2.StepResult) -> bool:
    return result.WhichOneof("kind") in ("train", "distill")


def _line(record: ClientRecord) -> str:
    if record["status"] != "ok":
        return f"{record['status']} ({record.get('reason', '')})"
    parts = [f"{record['seconds']:.1f} s"]
    parts += ["diverged" if loss is None else f"loss {loss:.3f}" for loss in record["train_loss"]]
    scored = [
        f"{label} {name} {metrics[name]:.3f}"
        for label, metrics in record["metrics"].items()
        for name in (("accuracy",) if "accuracy" in metrics else ("exact_match", "perplexity"))
        if name in metrics
    ]
    scored.sort(key=lambda text: not text.startswith("personal "))  # a line search has dozens
    parts += scored[:_SHOWN] + [f"... ({len(scored) - _SHOWN} more in rounds.jsonl)"] * (len(scored) > _SHOWN)
    return ", ".join(parts)
