"""One global adapter, averaged by example count: what FedAvg and its variants share.

Clients may own different parameter groups (:mod:`fedalloy_adapters.groups`): the server then holds all of them, and
each group is averaged over those owners that took part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.algebra import stack, truncate, weighted_sum
from fedalloy_adapters.bank.store import Bank
from fedalloy_adapters.groups import average_groups, group_difference, union
from fedalloy_adapters.layout import Layout
from proto.fedalloy.v1 import adapter_pb2, plan_pb2
from strategies.families.by_modules import exact_average
from strategies.families.robust import robust_average
from strategies.framework import AlloyStrategy, Answer, Brief, Client, OptionsT, State, round_record, steps

SLOT = "global"


def average(adapters: Sequence[Adapter], examples: Sequence[int], space: str = "factor") -> Adapter:
    """Average of adapters of one layout, weighted by example counts, in that layout.

    Raises:
        LayoutError: the layouts differ.
    """
    total = sum(examples)
    weights = [count / total for count in examples]
    if space == "factor":
        return weighted_sum(adapters, weights)
    return truncate(stack(adapters, weights), adapters[0].layout)


class Averaging(AlloyStrategy[OptionsT]):
    """One adapter for all.

    Variants override what a client prepares (:meth:`prepare`), how it trains (:meth:`train`), which model is its own
    (:meth:`personal`) and what becomes of the uploads (:meth:`average`).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model: Adapter | None = None
        self.arrived = Bank(self.storage)
        self.late: dict[str, float] = {}  # weights of the late ones among the arrived answers

    def compatible(self, first: Layout, second: Layout) -> bool:
        """Groups that both have must be equal; a client without groups has one group, its whole adapter."""
        return group_difference(first, second) is None

    def difference(self, first: Layout, second: Layout) -> str:
        """The first difference in a group that both have."""
        return group_difference(first, second) or first.describe_difference(second)

    def enrol(self, client: Client) -> None:
        """The federation's layout has all groups of all clients; a group starts from the seed when it gets an owner."""
        super().enrol(client)
        if self.model is None:
            self.model = Adapter.initial(client.layout, self.seed)
        elif not self.model.layout.contains(client.layout):
            before = self.model
            self.model = Adapter.initial(union([before.layout, client.layout]), self.seed).with_part(before)

    def brief(self, round_: int, client: Client) -> Brief:
        """Install the global adapter, evaluate the client's model, train, send the global adapter back."""
        plan = [
            *self.prepare(round_, client),
            steps.evaluate(self.training, self.personal(client)),
            *self.train(round_, client),
            steps.send(self.training, SLOT),
        ]
        return Brief(plan, {SLOT: self.part_of(client)})

    def absorb(self, round_: int, client: Client, answer: Answer) -> None:
        """Keep the trained adapter until the round settles."""
        self.arrived[client.id] = answer.adapters[SLOT]

    def absorb_late(self, round_: int, client: Client, answer: Answer, weight: float) -> None:
        """Keep a late answer as if it were in time; its client counts for fewer examples."""
        self.absorb(round_, client, answer)
        self.late[client.id] = weight

    def settle(self, round_: int) -> dict[str, Any]:
        """Average; without answers the model stays."""
        arrived, late = self.arrived.taken(), self.late
        self.late = {}
        counts = {name: self.clients[name].examples for name in arrived}
        if late:  # in thousandths of an example
            counts = {name: max(1, round(1000 * count * late.get(name, 1.0))) for name, count in counts.items()}
        if arrived:
            self.model = self.average(arrived, counts)
        return {round_record.MERGED: len(arrived)} | ({"late": late} if late else {})

    def average(self, adapters: Mapping[str, Adapter], examples: Mapping[str, int]) -> Adapter:
        """The next global adapter from the uploads, by client."""

        def over_owners(group: str, owners: Bank) -> Adapter:
            if self.robust != "none":
                return robust_average(list(owners.values()), self.robust)
            weights = {name: self.weight_of(group, name, examples[name]) for name in owners}
            if self.space == "factor":
                return owners.mean(weights)
            total = sum(weights.values())
            return exact_average(owners, [weight / total for weight in weights.values()])

        return average_groups(self.global_model, adapters, over_owners)

    @property
    def robust(self) -> str:
        """What :meth:`average` uses instead of the mean, one of :data:`strategies.families.robust.RULES`."""
        return "none"

    @property
    def space(self) -> str:
        """Where :meth:`average` averages: ``"factor"`` or ``"delta"``."""
        return "factor"

    def weight_of(self, group: str, client: str, examples: int) -> int:
        """The client's weight in a group's average: its examples."""
        return examples

    def deliver(self, client: Client) -> Brief:
        """Deliver the global adapter and the client's model."""
        mix = self.personal(client)
        plan = [*self.prepare(0, client), steps.save(mix), steps.evaluate(self.training, mix)]
        return Brief(plan, {SLOT: self.part_of(client)})

    def prepare(self, round_: int, client: Client) -> list[steps.Step]:
        """Steps before the adapter is installed; round 0 is the delivery."""
        return []

    def train(self, round_: int, client: Client) -> list[steps.Step]:
        """Steps that train the global adapter, and other slots if there are any."""
        return [steps.train(self.training, steps.mixture(SLOT), [SLOT])]

    def personal(self, client: Client) -> plan_pb2.Mixture:
        """The client's model; here it is the global adapter."""
        return steps.mixture(SLOT)

    def part_of(self, client: Client) -> Adapter:
        """The groups that the client owns, in its layout."""
        model = self.global_model
        return model if model.layout.digest == client.layout.digest else model.part(client.layout)

    def state(self) -> State:
        """The global adapter's numbers and layout, which also covers clients that have not rejoined yet."""
        layout = self.global_model.layout.to_proto().SerializeToString(deterministic=True)
        return State({"model": self.global_model.vector}, {"layout": layout.hex()})

    def load_state(self, state: State) -> None:
        """Continue from saved numbers; clients are enrolled before."""
        layout = Layout.from_proto(adapter_pb2.Layout.FromString(bytes.fromhex(state.values["layout"])))
        saved = Adapter(layout, state.tensors["model"])
        whole = union([layout, self.global_model.layout])
        self.model = saved if whole.digest == layout.digest else Adapter.initial(whole, self.seed).with_part(saved)

    @property
    def global_model(self) -> Adapter:
        """The global adapter; :attr:`model` is None before the first client."""
        if self.model is None:
            raise RuntimeError("no client is enrolled yet")
        return self.model
