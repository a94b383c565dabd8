"""FedAvg of a part of the adapter; the rest stays at the client, or never changes.

A variant says which part travels in a round (:meth:`PartAverage.shared`), and what is trained
(:meth:`Averaging.train`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.bank.store import Bank
from fedalloy_adapters.layout import Factor, Layout
from strategies.families.fedavg import SLOT, Averaging
from strategies.framework import Brief, Client, OptionsT, steps

NOT_A = (Factor.B, Factor.WEIGHT, Factor.BIAS)
NOT_B = (Factor.A, Factor.WEIGHT, Factor.BIAS)


@dataclass(frozen=True)
class Part:
    """Tensors with one of these factors, of one of these modules; an empty list does not restrict."""

    factors: Sequence[Factor] = ()
    modules: Sequence[str] = ()

    def of(self, layout: Layout) -> Layout:
        """This part of a layout."""
        return layout.select(self.factors, self.modules)


class PartAverage(Averaging[OptionsT]):
    """One shared part; the whole adapter starts from the seed at the client and never travels."""

    def shared(self, round_: int, client: Client) -> Part:
        """What the client sends in this round."""
        raise NotImplementedError

    def wanted(self, round_: int, client: Client) -> Part:
        """What the client is sent before it trains; round 0 is the delivery. By default, what it sends."""
        return self.shared(round_, client)

    def brief(self, round_: int, client: Client) -> Brief:
        """Install the part, evaluate, train, send a part back."""
        wanted, shared = self.wanted(round_, client), self.shared(round_, client)
        plan = [
            *self.prepare(round_, client),
            steps.evaluate(self.training, self.personal(client)),
            *self.train(round_, client),
            steps.send(
                self.training,
                SLOT,
                factors=shared.factors,
                modules=shared.modules,
                relative_to_received=wanted.of(client.layout).contains(shared.of(client.layout)),
                comes_back=True,
            ),
        ]
        return Brief(plan, self.received(client, wanted))

    def deliver(self, client: Client) -> Brief:
        """Deliver the part, inside the adapter that the client holds."""
        return Brief(super().deliver(client).steps, self.received(client))

    def prepare(self, round_: int, client: Client) -> list[steps.Step]:
        """The whole adapter, from the seed."""
        return [steps.initialise(SLOT, self.seed)]

    def average(self, adapters: Mapping[str, Adapter], examples: Mapping[str, int]) -> Adapter:
        """The part is averaged in factor space: this is exact if the other factor is common."""
        return self.global_model.with_part(Bank.of(adapters).mean(examples))

    def compatible(self, first: Layout, second: Layout) -> bool:
        """Equal layouts: parts of groups are not shared here."""
        return first.digest == second.digest

    def received(self, client: Client, wanted: Part | None = None) -> dict[str, Adapter]:
        """What the client is sent; without ``wanted``, what the delivery sends."""
        wanted = self.wanted(0, client) if wanted is None else wanted
        return {SLOT: self.global_model.part(wanted.of(client.layout))}
