"""One-shot merging: clients train alone, upload once at the end, and all get one merged adapter.

A rule is a file that merges the uploads in :meth:`OneShot.merge`. Linear rules merge exactly, as a
stack of ranks, and are then truncated to the clients' rank (``rank = 0``) or to another. Rules that look at single
numbers of a delta need it dense, one module at a time (:func:`merge_dense`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.algebra import folded
from fedalloy_adapters.bank.cores import on_all_cores
from fedalloy_adapters.bank.store import Bank
from fedalloy_adapters.layout import Factor
from strategies.families.by_modules import at_rank, bank_of
from strategies.framework import AlloyStrategy, Answer, Brief, Client, OptionsT, State, round_record, steps
from strategies.framework.options import require_range

_COPIES = 6
"""How many dense copies of a module's deltas a merge holds at a time, at most."""
LOCAL, MERGED = "local", "merged"
Rule = Callable[[str, Tensor], Tensor]
"""``(tensor name, numbers [N, ...]) -> merged [...]``."""


@dataclass(frozen=True)
class OneShotOptions:
    """The size of the merge."""

    rank: int = 0
    """Rank of the merged adapter; 0 means the rank of the clients' own adapters. It is at most the sum of all clients'
    ranks."""

    def __post_init__(self) -> None:
        require_range("rank", self.rank, 0, 2**20)


def merge_dense(adapters: Sequence[Adapter] | Bank, rule: Rule, rank: int = 0) -> Adapter:
    """A rule on the deltas as dense matrices, module by module, then the best approximation at ``rank`` (SVD).

    Weights and biases are merged by the same rule, as they are.
    """
    bank, layout = bank_of(adapters), at_rank(adapters, rank)
    result = Adapter.zeros(layout)
    whole = bank.common_layout(list(bank))

    def merge(module: str) -> None:
        parts = list(bank.parts(whole.select((), [module])).values())
        for entry in parts[0].layout.entries:
            if not entry.factor.is_lora:
                found = torch.stack([part[module, entry.factor] for part in parts])
                result[module, entry.factor].copy_(rule(entry.name, found))
        if module not in whole.lora_modules:
            return
        pairs = [folded(part, module) for part in parts]
        u, sigma, v_t = torch.linalg.svd(rule(module, torch.stack([b @ a for a, b in pairs])), full_matrices=False)
        kept = min(layout.ranks[module], len(sigma))
        root = sigma[:kept].sqrt()
        result[module, Factor.A][:kept] = root[:, None] * v_t[:kept]
        result[module, Factor.B][:, :kept] = u[:, :kept] * root / layout.scalings[module]

    shapes = {(entry.module, entry.factor): entry.shape for entry in whole.entries}
    largest = max((shapes[m, Factor.A][1] * shapes[m, Factor.B][0] for m in whole.lora_modules), default=0)
    on_all_cores(merge, list(whole.modules), _COPIES * 4 * largest * len(bank))
    return result


class OneShot(AlloyStrategy[OptionsT]):
    """Local training, then one merge. Between rounds nothing travels."""

    may_end_early = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.uploads: dict[str, Bank] = {}  # by slot, then by client
        self.trained: set[str] = set()
        self.merged: Adapter | None = None

    @abstractmethod
    def merge(self, uploads: Mapping[str, Bank], shares: Sequence[float]) -> Adapter:
        """Merge the uploads, given by slot and client; ``shares`` of the examples sum to one."""

    def extra(self, client: Client) -> list[steps.Step]:
        """Steps of the last round between training and upload, for what a rule needs beyond the adapters."""
        return []

    def needs_everyone(self, round_: int) -> bool:
        """Always: local rounds cost no bytes, and all clients are to be merged."""
        return True

    def brief(self, round_: int, client: Client) -> Brief:
        """Train alone; in the last round, upload."""
        mix = steps.mixture(LOCAL)
        plan = [
            steps.initialise(LOCAL, self.seed, keep_existing=client.id in self.trained),
            steps.evaluate(self.training, mix),
            steps.train(self.training, mix, [LOCAL]),
        ]
        if self._is_last(round_):
            plan += [*self.extra(client), steps.send(self.training, LOCAL, relative_to_received=False)]
        return Brief(plan)

    def absorb(self, round_: int, client: Client, answer: Answer) -> None:
        """Keep what was uploaded."""
        self.trained.add(client.id)
        if LOCAL in answer.adapters:
            for slot, adapter in answer.adapters.items():
                self.uploads.setdefault(slot, Bank(self.storage))[client.id] = adapter

    def settle(self, round_: int) -> dict[str, Any]:
        """Merge, in the last round."""
        arrived, self.uploads = self.uploads, {}
        names = list(arrived.get(LOCAL, ()))
        if names:
            counts = [self.clients[name].examples for name in names]
            self.merged = self.merge(arrived, [n / sum(counts) for n in counts])
        return {round_record.MERGED: len(names)}

    def deliver(self, client: Client) -> Brief:
        """The merge; before there is one, the client's own adapter."""
        mix = steps.mixture(LOCAL if self.merged is None else MERGED)
        plan = [steps.initialise(LOCAL, self.seed)]
        if self.merged is not None:
            # For a head that only the client has; the received adapter replaces everything else.
            plan.append(steps.copy(MERGED, LOCAL))
        plan += [steps.save(mix), steps.evaluate(self.training, mix)]
        return Brief(plan, {} if self.merged is None else {MERGED: self.merged})

    def state(self) -> State:
        """Who has trained, and the merge."""
        tensors = {} if self.merged is None else {"merged": self.merged.vector}
        ranks = {} if self.merged is None else self.merged.layout.ranks
        return State(tensors, {"trained": sorted(self.trained), "ranks": ranks})

    def load_state(self, state: State) -> None:
        """Continue from saved numbers; clients are enrolled before."""
        self.trained = set(state.values["trained"])
        if "merged" in state.tensors:
            layout = next(iter(self.clients.values())).layout
            layout = layout if layout.ranks == state.values["ranks"] else layout.with_ranks(state.values["ranks"])
            self.merged = Adapter(layout, state.tensors["merged"])

    def _is_last(self, round_: int) -> bool:
        """Without a known end, every round may be the last."""
        return round_ >= self.rounds
