"""One phase of a round: send every client its brief, read answers as they arrive, and absorb them when all are here.

Memory does not grow with the number of clients meanwhile: only the form of the expected answer is kept of a sent
message, and answers are in the run's bank.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from statistics import median
from typing import TYPE_CHECKING

from flwr.app import Message, RecordDict
from flwr.common.logger import log

from fedalloy_adapters.bank.store import Bank
from server_app.ledger.recorder import Booking
from server_app.run.clients import client_status
from server_app.run.clients.client_status import OK, REJECTED, ClientRecord
from server_app.run.messages.exchange import Make, Reply
from strategies.framework.answers import answer_from
from strategies.framework.dispatch import Dispatch
from strategies.framework.exchange import Answer, BadAnswerError, Brief, Client, StrategyError
from strategies.framework.limits import within_round

if TYPE_CHECKING:
    from server_app.run.loop import Run

INFO, WARNING = 20, 30


class Asking:
    """What each client was asked in one phase, and the outcome.

    Args:
        run: whose clients are asked.
        phase: ``"train"`` or ``"deliver"``.
        round_: its number.
        briefs: what each client is sent and asked to do.
        needed: clients that went away are waited for until there are this many usable answers.
    """

    def __init__(self, run: Run, phase: str, round_: int, briefs: Mapping[Client, Brief], needed: int) -> None:
        self.run = run
        self.phase = phase
        self.round = round_
        self.needed = needed
        self.records: dict[str, ClientRecord] = {}
        self._briefs = briefs
        self._clients = {client.id: client for client in briefs}
        self._dispatches: dict[str, Dispatch] = {}
        self._tensors: dict[str, Mapping[str, int]] = {}
        self._whole: set[str] = set()
        self._pinned = run.held_out.best_state
        self._answers: dict[str, Answer] = {}
        self._seconds: list[float] = []
        self._started = time.monotonic()

    def carry_out(self, absorb: Callable[[int, Client, Answer], None]) -> dict[str, ClientRecord]:
        """Ask everybody and absorb good answers; a record for every client asked."""
        run, options = self.run, self.run.options
        run.round_now = self.round
        run.progress.phase(self.phase, self.round, self._clients)
        makes: dict[str, Make] = {name: lambda name=name: self._make(name) for name in self._clients}  # type: ignore[misc]
        watch = Booking(run.wire, self.round, self.phase, self._tensors)
        slowest: dict[str, float] = {}
        for reply in run.federation.exchange(
            makes, options.round_timeout, watch, self._enough, self._again, self._patience
        ):
            record = self._take(reply)
            run.progress.answered(reply.client_id, record)
            spent = client_status.times_of(record)
            slowest = max(slowest, spent, key=lambda times: sum(times.values()))
            self._log(reply.client_id, client_status.line(record), good=record["status"] == OK)
        run.holdings.tidy()
        for what, seconds in slowest.items():
            run.spent[what] += seconds
        # Only when all are here, because the bound on an update's length depends on the others' updates.
        late = run.late.due(self.round, set(self._answers)) if self.phase == "train" else {}
        answers = self._answers | {name: answer for name, (_, answer, _) in late.items()}
        for name, answer in sorted(within_round(run.strategy.limits, answers).items()):
            if name in late:
                client, _, weight = late[name]
                run.strategy.absorb_late(self.round, client, answer, weight)
                continue
            record = self.records[name]
            try:
                absorb(self.round, self._clients[name], answer)
            except StrategyError as error:
                record |= {"status": REJECTED, "reason": str(error)}
                self._log(name, client_status.line(record))
                continue
            if answer.clipped:
                record["clipped"] = client_status.clipped(answer)
                self._log(name, client_status.clipped_line(record))
        return dict(sorted(self.records.items()))

    def _make(self, client_id: str) -> Message:
        run, client = self.run, self._clients[client_id]
        holding = run.holdings.of(client_id)
        dispatch = run.strategy.dispatch(
            self.round, client, self._briefs[client], run.name, run.run_key, holding, pinned=self._pinned
        )
        node_id = run.enrolment.clients[client_id].node_id
        run.requests.signed(dispatch.content, "plan")
        message = dispatch.message(node_id, ttl=run.options.round_timeout + 60)
        run.federation.intake.expect(dispatch.max_answer_bytes)
        self._tensors[client_id] = dispatch.down_by_encoding()
        self._dispatches[client_id] = replace(dispatch, content=RecordDict())  # the SuperLink has the blobs now
        return message

    def _again(self, client_id: str, reply: Message) -> bool:
        """A client that has lost what it held (its disk, or a round whose answer did not arrive) is sent everything."""
        lost = client_status.has_lost_reference(reply) and self.run.holdings.forget(client_id)
        self._whole.update({client_id} if lost else ())
        return lost

    def _enough(self) -> bool:
        return client_status.usable(self.records) >= self.needed

    def _patience(self) -> float:
        """Seconds left for the clients that have not answered.

        A client that lies about nothing but answers at once moves the median by one place: most must have answered.
        """
        options, usable = self.run.options, len(self._seconds)
        found = math.inf
        if options.quorum and usable >= max(options.quorum, self.needed):
            found = options.grace
        if options.grace_ratio and usable >= max(options.least, len(self._clients) // 2 + 1):
            so_far = time.monotonic() - self._started
            found = min(found, max(options.grace, options.grace_ratio * median(self._seconds) - so_far))
        return found

    def _take(self, reply: Reply) -> ClientRecord:
        client = self._clients[reply.client_id]
        dispatch = self._dispatches.pop(client.id, None)
        if reply.message is None and dispatch is not None and self.phase == "train":
            self.run.late.expect(self.round, client.id, dispatch)
        self.records[client.id] = record = self._read(client, dispatch, reply)
        if client.id in self._whole:
            record["sent_whole"] = True  # it did not hold what the server assumed
        is_good = record["status"] == OK
        (self.run.holdings.answered if is_good else self.run.holdings.forget)(client.id)
        if is_good:
            self._seconds.append(reply.seconds)
        if is_good and self.phase == "train":
            self.run.answer_seconds[client.id] = reply.seconds
        return record

    def _read(self, client: Client, dispatch: Dispatch | None, reply: Reply) -> ClientRecord:
        run, phase, round_ = self.run, self.phase, self.round
        record: ClientRecord = {"seconds": round(reply.seconds, 3)}
        if reply.attempts > 1:
            record["attempts"] = reply.attempts
        if reply.message is None or reply.message.has_error() or dispatch is None:
            run.wire.arrived(round_, client.id, phase, reply.message)
            if reply.message is None:
                return record | client_status.of_silence(reply.seconds, run.options.round_timeout, run.options.quorum)
            return record | client_status.of_error(reply.message)
        try:
            answer = answer_from(dispatch, reply.message, run.strategy.limits)
        except BadAnswerError as error:
            run.wire.arrived(round_, client.id, phase, reply.message, None, dispatch)
            return record | {"status": REJECTED, "reason": str(error)}
        run.wire.arrived(round_, client.id, phase, reply.message, answer.report.wire, dispatch)
        held = Bank(run.strategy.storage)
        held.update(answer.adapters)
        self._answers[client.id] = replace(answer, adapters=held)
        return record | client_status.of_answer(answer, dispatch.residuals)

    def _log(self, client_id: str, text: str, *, good: bool = False) -> None:
        log(INFO if good else WARNING, "[%s %d] %s: %s", self.phase, self.round, client_id, text)
