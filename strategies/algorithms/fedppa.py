r"""FedPPA: the client's own adapter is aligned with the global one little by little while it trains.

Prasetia, Saputra, Putra, "FedPPA: Progressive Parameter Alignment for Personalized Federated Learning", 2025 (arXiv
2510.14698). Only its abstract and summaries were available. Derived from them: a client keeps its own adapter
:math:`m_k` and is sent the average :math:`\bar m` of the modules that all have in common. Its local steps are divided
into S ``stages``; before stage s

.. math:: m_k \leftarrow m_k + \frac{s}{S} \eta (\bar m - m_k)

on the common modules, then all modules are trained. So the pull grows while the client learns, and its knowledge is not
overwritten at once, as it would be by installing :math:`\bar m`; ``alignment`` is :math:`\eta`. The client's own part
(``own``) is never aligned. The paper also takes in clients whose architectures differ, and may weigh clients by the
entropy of their labels; here layouts are equal, label counts stay at the client, and clients are weighed by examples.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from proto.fedalloy.v1 import plan_pb2
from strategies.families.fedavg import SLOT
from strategies.families.own_part import OwnPart, OwnPartOptions
from strategies.framework import About, Answer, Brief, Client, steps
from strategies.framework.options import require_range

LOCAL = "local"


@dataclass(frozen=True)
class FedPPAOptions(OwnPartOptions):
    """Which part is the client's own, and how the rest is aligned."""

    alignment: float = 0.5
    """Eta, how far the last stage of a round moves towards the global adapter: 0 not at all, 1 all the way."""
    stages: int = 3
    """Parts that a round's local steps are divided into."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range("alignment", self.alignment, 0, 1)
        require_range("stages", self.stages, 1, 100)


class FedPPA(OwnPart[FedPPAOptions]):
    """Each client's own adapter, aligned with the average of all."""

    name = "fedppa"
    about = About(
        "its own adapter, aligned step by step with the average",
        travels="the rest up, the rest down",
        when="labels differ, and a client should keep its own knowledge early in training",
    )

    def prepare(self, round_: int, client: Client) -> list[steps.Step]:
        """The client's own, and a slot for the average, from the common start."""
        return [steps.initialise(LOCAL, self.seed), *super().prepare(round_, client)]

    def brief(self, round_: int, client: Client) -> Brief:
        """Evaluate, align and train in stages, send the common part."""
        common = self.shared(round_, client).modules
        total = self.local_steps(client)
        stages = min(self.options.stages, total)
        mix = self.personal(client)
        plan = [*self.prepare(round_, client), steps.evaluate(self.training, mix)]
        for stage in range(1, stages + 1):
            count = total * stage // stages - total * (stage - 1) // stages
            plan += [*self._align(client, stage / stages), steps.train(self.training, mix, [LOCAL], steps=count)]
        plan.append(steps.send(self.training, LOCAL, modules=common, relative_to_received=False, comes_back=True))
        return Brief(plan, self.received(client))

    def absorb(self, round_: int, client: Client, answer: Answer) -> None:
        """Keep the common part."""
        super().absorb(round_, client, replace(answer, adapters={SLOT: answer.adapters[LOCAL]}))

    def personal(self, client: Client) -> plan_pb2.Mixture:
        """The client's own adapter."""
        return steps.mixture(LOCAL)

    def _align(self, client: Client, progress: float) -> list[steps.Step]:
        own, step = self.own_modules(client.layout), progress * self.options.alignment
        away = {module: 0.0 if module in own else step for module in client.layout.modules}
        stay = {module: 1 - share for module, share in away.items()}
        aligned = steps.mixture(LOCAL, SLOT, coefficients=[stay, away])
        # A head that only this client has is in no shared layout, so it stays, too.
        return [steps.own_heads(SLOT, steps.mixture(LOCAL)), steps.merge(LOCAL, aligned, space="factor")]
