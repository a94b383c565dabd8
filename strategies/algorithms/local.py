"""Local-only training: every client trains alone, from the same start. Federation has to beat this.

No adapter crosses the network. Each round trains the client's own slot for ``local-steps`` steps, so a comparison at
equal rounds is one at equal local work.
"""

from __future__ import annotations

from typing import Any

from fedalloy_adapters.layout import Layout
from strategies.framework import About, AlloyStrategy, Answer, Brief, Client, State, steps
from strategies.framework.options import NoOptions

SLOT = "local"


class Local(AlloyStrategy[NoOptions]):
    """Every client trains its own adapter and keeps it."""

    name = "local"
    about = About(
        "its own adapter, nothing shared",
        travels="0",
        group="reference",
        when="nothing may leave the client; every other strategy has to beat this",
    )

    def compatible(self, first: Layout, second: Layout) -> bool:
        """Always: nothing is merged."""
        return True

    def split(self, client: Client) -> str:
        """The split that the client trains on."""
        return "train"

    def brief(self, round_: int, client: Client) -> Brief:
        """Evaluate the client's adapter, then continue to train it."""
        mix = steps.mixture(SLOT)
        return Brief(
            [
                steps.initialise(SLOT, self.seed, keep_existing=round_ > 1),
                steps.evaluate(self.training, mix),
                steps.train(self.training, mix, [SLOT], split=self.split(client)),
            ]
        )

    def absorb(self, round_: int, client: Client, answer: Answer) -> None:
        """Nothing arrives."""

    def settle(self, round_: int) -> dict[str, Any]:
        """Nothing to merge."""
        return {}

    def deliver(self, client: Client) -> Brief:
        """Save and evaluate the client's own adapter."""
        mix = steps.mixture(SLOT)
        return Brief(
            [
                steps.initialise(SLOT, self.seed),  # a client that missed every round still has the common start
                steps.save(mix),
                steps.evaluate(self.training, mix),
            ]
        )

    def state(self) -> State:
        """Nothing: all state is at the clients."""
        return State()

    def load_state(self, state: State) -> None:
        """Nothing to load."""
