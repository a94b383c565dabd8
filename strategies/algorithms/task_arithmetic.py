r"""Task arithmetic: the sum of all deltas, scaled.

Ilharco, Ribeiro, Wortsman, Gururangan, Schmidt, Hajishirzi, Farhadi, "Editing Models with Task Arithmetic", ICLR 2023:
:math:`\Delta = \lambda \sum_k \Delta_k`; :math:`\lambda = 1/S` is the mean of S clients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.bank.store import Bank
from strategies.families.by_modules import exact_average
from strategies.families.one_shot import LOCAL, OneShot, OneShotOptions
from strategies.framework import About
from strategies.framework.options import require_range


@dataclass(frozen=True)
class TaskArithmeticOptions(OneShotOptions):
    """How much of the sum is taken."""

    scale: float = 0.3
    """Lambda, to be chosen on validation data."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range("scale", self.scale, 0)


class TaskArithmetic(OneShot[TaskArithmeticOptions]):
    """A scaled sum."""

    name = "task-arithmetic"
    about = About(
        "the scaled sum of all local adapters at the end",
        travels="P up once, P down once",
        when="there is only one exchange, and tasks do not contradict each other",
    )

    def merge(self, uploads: Mapping[str, Bank], shares: Sequence[float]) -> Adapter:
        """Exact in delta space, then truncated."""
        return exact_average(uploads[LOCAL], [self.options.scale] * len(shares), self.options.rank)
