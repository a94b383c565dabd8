"""What clients hold from earlier messages; the next one is a difference from that (``proto/README.md`` section 8.2).

The difference is taken from what the client has *decoded*, so what an encoding drops in one round is part of the next
round's difference, and errors do not add up: error feedback, without a separate residual. A client that may not hold
what is noted here gets everything whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.bank.store import Bank, Storage, tensor_of
from fedalloy_adapters.layout import Layout
from proto.fedalloy.v1 import adapter_pb2
from strategies.framework.exchange import State

_KEY = "holdings"


class Holdings:
    """By client and slot, what was sent and answered. Equal adapters of many clients are one row."""

    def __init__(self, storage: Storage | None = None) -> None:
        self._bank = Bank(storage)
        self._held: dict[str, dict[str, str]] = {}
        self._sent: dict[str, dict[str, str]] = {}

    def of(self, client: str) -> Holding:
        """What one client holds, for its next message."""
        return Holding(self, client)

    def held(self, client: str, slot: str) -> Adapter | None:
        """What the client holds for a slot; None if that is not known."""
        digest = self._held.get(client, {}).get(slot)
        return None if digest is None else self._bank[digest]

    def send(self, client: str, slot: str, decoded: Adapter) -> Callable[[], Adapter]:
        """Note what a client is sent, as it will decode it; the recipe reads it back."""
        digest = decoded.digest.hex()
        if digest not in self._bank:
            self._bank[digest] = decoded
        self._sent.setdefault(client, {})[slot] = digest
        layout, row = decoded.layout, self._bank.rows([digest])[0]
        return lambda: Adapter(layout, tensor_of(row))

    def answered(self, client: str) -> None:
        """The client has carried out the plan: it holds what it was sent."""
        if sent := self._sent.pop(client, None):
            self._held[client] = self._held.get(client, {}) | sent

    def forget(self, client: str) -> bool:
        """Note that what the client holds is unknown; return whether it was believed to hold anything."""
        self._sent.pop(client, None)
        return bool(self._held.pop(client, None))

    def tidy(self) -> None:
        """Drop what no client holds."""
        needed = {digest for table in (self._held, self._sent) for slots in table.values() for digest in slots.values()}
        for digest in [digest for digest in self._bank if digest not in needed]:
            del self._bank[digest]

    def add_to(self, state: State) -> None:
        """Put everything into a strategy's state, between rounds; if nothing is held, add nothing."""
        if not self._held:
            return
        if _KEY in state.values:
            raise ValueError(f"the strategy's state has {_KEY!r} already")
        layouts = {digest: self._bank.layout_of(digest) for digest in self._bank}
        state.keep(_KEY, self._bank)
        state.values[_KEY] = {
            "clients": self._held,
            "layout_of": {digest: layout.digest.hex() for digest, layout in layouts.items()},
            "layouts": {
                layout.digest.hex(): layout.to_proto().SerializeToString(deterministic=True).hex()
                for layout in layouts.values()
            },
        }

    def take_from(self, state: State) -> None:
        """Continue from what :meth:`add_to` put there."""
        saved = state.values.get(_KEY, {"clients": {}, "layout_of": {}, "layouts": {}})
        layouts = {
            digest: Layout.from_proto(adapter_pb2.Layout.FromString(bytes.fromhex(text)))
            for digest, text in saved["layouts"].items()
        }
        self._bank.clear()
        for digest, layout in saved["layout_of"].items():
            self._bank.put_row(digest, layouts[layout], state.row(f"{_KEY}/{digest}"))
        self._held, self._sent = {client: dict(slots) for client, slots in saved["clients"].items()}, {}


def without_holdings(state: State) -> State:
    """What a checkpoint has of the strategy alone: strategies may count their tensors."""

    def kept(found: Mapping[str, Any]) -> dict[str, Any]:
        return {name: one for name, one in found.items() if name.partition("/")[0] != _KEY}

    return State(kept(state.tensors), kept(state.values), kept(state.rows))


@dataclass(frozen=True)
class Holding:
    """What one client holds."""

    _all: Holdings
    _client: str

    def reference(self, slot: str, adapter: Adapter) -> Adapter | None:
        """The adapter that this one is sent as a difference from; None if there is none, or none close to it."""
        held = self._all.held(self._client, slot)
        if held is None or held.layout.digest != adapter.layout.digest:
            return None
        meant = adapter.vector.detach().to("cpu", held.vector.dtype)
        return held if float((meant - held.vector).norm()) < float(meant.norm()) else None

    def has(self, slot: str) -> bool:
        """Whether the client was sent anything for this slot before."""
        return self._all.held(self._client, slot) is not None

    def send(self, slot: str, decoded: Adapter) -> Callable[[], Adapter]:
        """See :meth:`Holdings.send`."""
        return self._all.send(self._client, slot, decoded)
