r"""FLoRA: the exact average of the deltas is added to every client's base, and each round trains a fresh adapter.

Wang, Shen, He, Sun, Wang, Zhang, Peng, Li, "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous
Low-Rank Adaptations", NeurIPS 2024. The server stacks :math:`A' = [A_k], B' = [p_k s_k B_k]` (one factor is scaled, not
both): :math:`B'A' = \sum_k p_k s_k B_k A_k`, of rank S r, which every client merges into its base; then A is drawn
again, the same for all clients, and B is zero. Ranks may differ. S times as much goes down as up.

The base stays as it is on disk (:mod:`strategies.families.merged_base`), so nothing is lost with a quantised base,
either.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.bank.store import Bank
from fedalloy_adapters.layout import Layout
from strategies.families.fedavg import SLOT
from strategies.families.merged_base import MergedBase, exact_sum
from strategies.framework import About, Brief, Client, steps
from strategies.framework.options import NoOptions


class FLoRA(MergedBase[NoOptions]):
    """Stacking, and starting again."""

    name = "flora"
    about = About(
        "the exact average in its base, and a fresh adapter in each round",
        travels="P up, S P down",
        when="ranks differ between clients, and the bytes of S adapters are cheap",
    )

    def compatible(self, first: Layout, second: Layout) -> bool:
        """Ranks and scalings may differ."""
        return first.difference(second, any_rank=True) is None and first.modules == second.modules

    def difference(self, first: Layout, second: Layout) -> str:
        """The first difference other than ranks and scalings."""
        return first.difference(second, any_rank=True) or first.describe_difference(second)

    def part_of(self, client: Client) -> Adapter:
        """A fresh adapter at the client's own rank, which it draws itself."""
        return Adapter.initial(client.layout, self.seed)

    def brief(self, round_: int, client: Client) -> Brief:
        """The changed base; uploads are sent whole, and do not start from a received adapter."""
        brief = super().brief(round_, client)
        return Brief([_absolute(step) for step in brief.steps], brief.adapters)

    def sent(self, client: Client) -> dict[str, Callable[[], Adapter]]:
        """Only the stack travels down; the adapter does not."""
        return {slot: recipe for slot, recipe in super().sent(client).items() if slot != SLOT}

    def prepare(self, round_: int, client: Client) -> list[steps.Step]:
        """A new adapter, drawn from the seed and the round, on the changed base."""
        fresh = steps.initialise(SLOT, self.seed + round_, keep_existing=False, keep_own_heads=True)
        return [fresh, *super().prepare(round_, client)]

    def average(self, adapters: Mapping[str, Adapter], examples: Mapping[str, int]) -> Adapter:
        """Add the exact average to the base."""
        total = sum(examples.values())
        bank = Bank.of(adapters)
        self.add(exact_sum(bank, [examples[name] / total for name in bank]))
        return self.global_model


def _absolute(step: steps.Step) -> steps.Step:
    if step.HasField("send"):
        step.send.relative_to_received = False
    return step
