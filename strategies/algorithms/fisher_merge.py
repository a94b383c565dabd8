r"""Fisher merging: the mean of adapters in which every number is weighted by its Fisher information.

Matena, Raffel, "Merging Models with Fisher-Weighted Averaging", NeurIPS 2022:
:math:`\theta_i = \sum_k p_k f_{ki} \theta_{ki} / \sum_k p_k f_{ki}`, in factor space (all start from one A), with the
diagonal empirical information of A, B and head, plus ``damping`` times its mean. ``normalise`` divides each client's
information by its norm, so that confident clients do not decide alone. Twice the upload.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.algebra import precision_mean_of
from fedalloy_adapters.bank.store import Bank
from strategies.families.one_shot import LOCAL, OneShot
from strategies.framework import About, Client, steps
from strategies.framework.options import require_range

INFORMATION = "information"


@dataclass(frozen=True)
class FisherMergeOptions:
    """How the information is taken."""

    samples: int = 30
    """Largest number of training examples for computing the information."""
    damping: float = 1e-3
    """Factor of the mean information, which is added to the information of every number."""
    normalise: bool = True
    """Divide each client's information by its norm, so that only its distribution over the numbers counts."""

    def __post_init__(self) -> None:
        require_range("samples", self.samples, 1, 2**31 - 1)
        require_range("damping", self.damping, 0)


class FisherMerge(OneShot[FisherMergeOptions]):
    """A mean weighted number by number."""

    name = "fisher-merge"
    about = About(
        "one merge of all local adapters at the end, each number weighted by its Fisher information",
        travels="2 P up once, P down once",
        when="there is only one exchange, and it may have twice the bytes",
    )

    def extra(self, client: Client) -> list[steps.Step]:
        """Compute the information and upload it."""
        return [
            steps.fisher(
                LOCAL,
                LOCAL,
                split="train",
                samples=self.options.samples,
                damping=self.options.damping,
                keep=(INFORMATION, ""),
            ),
            steps.send(self.training, INFORMATION, relative_to_received=False, sums_of_squares=True),
        ]

    def merge(self, uploads: Mapping[str, Bank], shares: Sequence[float]) -> Adapter:
        """The weighted mean; an upload's information may not be negative, whatever a client sends."""

        def pairs() -> Iterator[tuple[Adapter, Adapter]]:
            for name, share in zip(uploads[LOCAL], shares, strict=True):
                found = uploads[INFORMATION][name]
                information = found.vector.clamp_min(0)
                size = float(information.double().norm()) if self.options.normalise else 1.0
                yield uploads[LOCAL][name], Adapter(found.layout, share * information / max(size, 1e-30) + 1e-12)

        return precision_mean_of(pairs())
