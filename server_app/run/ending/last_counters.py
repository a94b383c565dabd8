"""The last messages of a run: they ask for the clients' kernel counters."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from flwr.app import Message

from server_app.ledger.recorder import Booking
from server_app.run.clients import client_status
from server_app.run.clients.client_status import OK, ClientRecord
from server_app.run.messages.exchange import Make, Reply
from strategies.framework.answers import read_counters
from strategies.framework.dispatch import counters_message
from strategies.framework.exchange import BadAnswerError

if TYPE_CHECKING:
    from server_app.run.loop import Run


def last_counters(run: Run, round_: int) -> None:
    """Ask for the counters once more: those in a reply were read before it was sent, so they miss the reply itself."""
    started = time.monotonic()
    if not run.wire.is_measuring:
        return
    records: dict[str, ClientRecord] = {}
    timeout = min(run.options.round_timeout, 60.0)
    watch = Booking(run.wire, round_, "query")
    asks: dict[str, Make] = {
        client.id: lambda client=client: counters_message(client.node_id, timeout)  # type: ignore[misc]
        for client in run.federation.present(watch)
    }
    for reply in run.federation.exchange(asks, timeout, watch):
        record: ClientRecord = {"status": OK, "seconds": round(reply.seconds, 3)}
        reading = None
        try:
            reading = read_counters(_require(reply)).wire
        except BadAnswerError as error:
            record |= {"status": client_status.FAILED, "reason": str(error)}
        run.wire.arrived(round_, reply.client_id, "query", reply.message, reading)
        records[reply.client_id] = record
    run.record("counters", round_, records, started)


def _require(reply: Reply) -> Message:
    if reply.message is None:
        raise BadAnswerError(f"client {reply.client_id!r} did not answer in time")
    return reply.message
