"""Learned coefficients of a mixture, and how fast they learn.

A gate is one number that has to move far: from 0.5 to 0.9 its logit moves by 2.2. An optimiser that normalises its
steps (AdamW) moves a number by about its learning rate in a step, so at an adapter's rate of some thousandths a gate
stays where it began. So gates have their own learning rate, which does not scale with the adapters'. A gate that
depends on its module's input has one number for each input number, and all of them move its logit together: there, the
adapters' rate is fast enough.
"""

from __future__ import annotations

from fedalloy_adapters.layout import Factor
from strategies.framework.options import require_range
from strategies.framework.steps import Training

GATE_RATE = 0.1
"""Learning rate of a gate that is one number: from 0.5 to 0.9 in 22 steps at least."""


def require_gate_rate(rate: float) -> None:
    """Refuse a rate that is negative or not finite; 0 stands for the default.

    Raises:
        OptionError: naming the key.
    """
    require_range("gate-rate", rate, 0)


def gate_scale(training: Training, kind: str, rate: float) -> dict[Factor, float]:
    """For ``rate_scales`` of a train step: gates of this kind learn at ``rate``, whatever the adapters' rate is.

    Args:
        training: the adapters' rate.
        kind: ``"scalar"``, ``"input"`` or ``"token"``.
        rate: the gates' rate; 0 means :data:`GATE_RATE`, or the adapters' rate for gates that depend on the input.
    """
    chosen = rate or (GATE_RATE if kind == "scalar" else training.learning_rate)
    return {Factor.GATE: chosen / training.learning_rate}
