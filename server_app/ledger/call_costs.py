"""The cost of one gRPC call on the wire beyond its protobuf, from the lone small calls that the sampler saw."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from server_app.ledger.rows import Key, SmallCallRow

# Serialised request and answer with a 64-bit node id: PullMessages (nothing there), SendNodeHeartbeat.
POLL_PROTO, HEARTBEAT_PROTO = (13, 0), (22, 2)


@dataclass(frozen=True)
class CallCost:
    """Bytes up and down of one small gRPC call without its protobuf, and of the pings that go with a group of calls."""

    call: tuple[float, float]
    pings: tuple[float, float]

    @property
    def poll(self) -> tuple[float, float]:
        """Bytes up and down of one poll without a message."""
        return self.call[0] + POLL_PROTO[0], self.call[1] + POLL_PROTO[1]


@dataclass(frozen=True)
class _LoneCall:
    phase: str
    key: Key
    up: int
    down: int
    pings_up: int
    pings_down: int
    count: int


def call_cost(rows: Sequence[SmallCallRow], keys: Collection[Key], ping: int) -> CallCost | None:
    """The median lone poll of the connections ``keys``.

    Without such a poll, the median over all clients; without any poll, the cheapest lone heartbeat (some carry a
    timeout as well); None if there was no lone call at all. gRPC sends HTTP/2 pings after a pause; they travel in
    segments of their own.

    Args:
        rows: small calls of all connections.
        keys: connections of one client.
        ping: bytes of a ping, with what TLS adds.
    """
    calls = [call for row in rows if (call := _lone_call(row, ping)) is not None]
    if not calls:
        return None
    # A heartbeat between two runs' messages passes for a poll, but its answer is not empty.
    beats = [(call.down, call.count) for call in calls if call.phase == "heartbeat"]
    heartbeat = _median(beats) if beats else math.inf
    polls = [call for call in calls if call.phase == "poll" and call.down < heartbeat]
    polls = [call for call in polls if call.key in keys] or polls
    count = sum(call.count for call in calls)
    pings = [sum(getattr(call, name) * call.count for call in calls) / count for name in ("pings_up", "pings_down")]
    if polls:
        up = _median([(call.up, call.count) for call in polls]) - POLL_PROTO[0]
        down = _median([(call.down, call.count) for call in polls]) - POLL_PROTO[1]
    else:
        up = min(call.up for call in calls) - HEARTBEAT_PROTO[0]
        down = min(call.down for call in calls) - HEARTBEAT_PROTO[1]
    return CallCost((up, down), (pings[0], pings[1]))


def _lone_call(row: SmallCallRow, ping: int) -> _LoneCall | None:
    """A row of ``small_call`` without its pings; None for half a call (the answer came too late)."""
    pings_up, pings_down = (ping * (count - 1) for count in (row.data_in, row.data_out))
    up, down = row.up - pings_up, row.down - pings_down
    if min(up, down) <= ping:
        return None
    return _LoneCall(row.phase, row.key, up, down, pings_up, pings_down, row.count)


def _median(values: list[tuple[int, int]]) -> float:
    """Median of values with counts."""
    values = sorted(values)
    half = sum(count for _, count in values) / 2
    seen = 0
    for value, count in values:
        seen += count
        if seen >= half:
            return float(value)
    raise ValueError("no values")
