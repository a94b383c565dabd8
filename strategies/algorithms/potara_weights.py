r"""Closed-form weights for merging two adapters of one client: the federated one and its own.

With ``theta(w) = w theta_fed + (1 - w) theta_local`` and, about the client's own optimum,

* a: mean squared error of the federated adapter, b: of the local one, c: their mean inner product,

the error of the merge is ``V(w) = w^2 a + (1-w)^2 b + 2 w (1-w) c``, with ``D = a + b - 2c`` smallest at

.. math:: w^* = (b - c) / D, \qquad V(w^*) = (ab - c^2) / D \le \min(a, b),

and an error e in the weight costs exactly ``D e^2``. Zou, Shisher, Brinton and Tripathi, "Communication-Efficient
Personalized Adaptation via Federated-Local Model Merging" (Potara), 2026; the estimators that see
heterogeneity (:func:`shared_variance`, :func:`random_effects`, :func:`plug_in`) are ours, for theta_fed close to
``sum_j p_j theta_j``. The weight is always that of the *federated* adapter.

Everything here is plain float64 numbers: from scalars that clients report to weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

OUTLYING = 10.0
"""Variances are cut to this factor times the median: no honest client among a few is so far from the others."""
IDENTICAL = 1e-6
"""If D is below this share of a + b, the two adapters are the same, and any weight gives the same model."""


@dataclass(frozen=True)
class Weight:
    """A weight and its origin: ``raw`` before clipping to [0, 1], the moments, a ``flag`` for special cases."""

    value: float
    raw: float
    a: float
    b: float
    c: float
    denominator: float
    flag: str = ""


def closed_form(a: float, b: float, c: float = 0.0, denominator: float | None = None) -> Weight:
    """``w = (b - c) / (a + b - 2c)``, clipped to [0, 1].

    Args:
        a: mean squared error of the federated adapter; negative counts as 0.
        b: of the local one.
        c: mean inner product of the two errors.
        denominator: replaces a + b - 2c, if there is another estimate of it.

    Returns:
        A weight flagged ``"undefined"`` with 0.5 if a moment is not finite, or if all are 0 and no distance is given;
        ``"identical"`` with 1 if the adapters do not differ; ``"clipped"`` if the raw weight lies outside [0, 1].
    """
    if not all(math.isfinite(number) for number in (a, b, c, denominator or 0.0)):
        return Weight(0.5, 0.5, a, b, c, math.nan, "undefined")
    a, b = max(a, 0.0), max(b, 0.0)
    distance = a + b - 2 * c if denominator is None else denominator
    if a + b == 0 or not math.isfinite(distance):
        return Weight(0.5, 0.5, a, b, c, distance, "undefined")
    if distance <= IDENTICAL * (a + b):
        return Weight(1.0, 1.0, a, b, c, distance, "identical")
    raw = (b - c) / distance
    value = min(max(raw, 0.0), 1.0)
    return Weight(value, raw, a, b, c, distance, "" if value == raw else "clipped")


def fisher_weight(variance_fed: float, variance_local: float, covariance: float = 0.0) -> Weight:
    """The weight from traces of damped inverse Fisher information; the covariance is bounded by both variances.

    The bound keeps a noisy correlation from extrapolating.
    """
    return closed_form(variance_fed, variance_local, min(covariance, 0.999 * min(variance_fed, variance_local)))


def tempered(numbers: Tensor) -> Tensor:
    """Clients' reports ``[K]``, each cut to :data:`OUTLYING` times the median: one liar could dominate a sum.

    For a client's own weight its own numbers are used uncut. With fewer than three clients nothing is cut.
    """
    if len(numbers) < 3:
        return numbers
    return numbers.clamp(max=OUTLYING * float(numbers.quantile(0.5)))


def shared_variance(variances: Tensor, shares: Tensor) -> list[Weight]:
    """Federated average of independent local estimates: ``a = sum p_j^2 b_j`` and ``c = p_k b_k``.

    Args:
        variances: b ``[K]``, the clients' own mean squared errors.
        shares: p ``[K]``, their weights in the average; 0 for a client that took no part.
    """
    pooled = float((shares.square() * tempered(variances)).sum())
    return [closed_form(pooled, b, p * b) for b, p in zip(variances.tolist(), shares.tolist(), strict=True)]


def heterogeneity(variances: Tensor, distances: Tensor, shares: Tensor) -> float:
    """Moment estimate of ``t``, the mean squared distance of a client's optimum from the federation's mean optimum.

    ``t = max(0, (sum p_k q_k - sum p_k (1 - p_k) b_k) / (1 - sum p_k^2))``; 0 for a single client.

    Args:
        variances: b ``[K]``.
        distances: q ``[K]``, squared distances of the federated adapter and the client's own, in the metric of b.
        shares: p ``[K]``.
    """
    spread = 1 - float(shares.square().sum())
    if spread <= 1e-12:
        return 0.0
    excess = (shares * tempered(distances)).sum() - (shares * (1 - shares) * tempered(variances)).sum()
    return max(0.0, float(excess) / spread)


def random_effects(variances: Tensor, distances: Tensor, shares: Tensor) -> list[Weight]:
    """:func:`shared_variance`, with what the clients' differences add to the federated adapter's error.

    ``a_k = sum p_j^2 b_j + t (1 - 2 p_k + sum p_j^2)`` with t of :func:`heterogeneity`.
    """
    t = heterogeneity(variances, distances, shares)
    squares = float(shares.square().sum())
    pooled = float((shares.square() * tempered(variances)).sum())
    return [
        closed_form(pooled + t * (1 - 2 * p + squares), b, p * b)
        for b, p in zip(variances.tolist(), shares.tolist(), strict=True)
    ]


def plug_in(variances: Tensor, distances: Tensor, shares: Tensor) -> list[Weight]:
    """Each client's own distance instead of the common t: ``w = (1 - p) b / max(q, a_0 + (1 - 2p) b)``.

    Positive-part James-Stein towards the federated adapter, with ``a_0 = sum p_j^2 b_j``.
    """
    pooled = float((shares.square() * tempered(variances)).sum())
    weights = []
    for b, q, p in zip(variances.tolist(), distances.tolist(), shares.tolist(), strict=True):
        if p == 1:  # 0 / 0: the federated adapter is the client's own, trained for longer
            weights.append(Weight(1.0, 1.0, b, b, b, q, "alone"))
            continue
        denominator = max(q, pooled + b - 2 * p * b)
        weights.append(closed_form(denominator - b + 2 * p * b, b, p * b, denominator))
    return weights


def grid(points: int) -> list[float]:
    """``points`` weights from 0 to 1, evenly.

    Raises:
        ValueError: fewer than three points.
    """
    if points < 3:
        raise ValueError(f"{points} points, expected at least 3 (0, one half and 1)")
    return [index / (points - 1) for index in range(points)]


def best_of(losses: Sequence[float]) -> Weight:
    """Line search: the weight of the smallest loss on an even grid; ties go to the larger weight.

    With exactly three losses (at 0, 1/2 and 1), the vertex of the parabola through them; if it opens downwards, the
    better endpoint.
    """
    weights = grid(len(losses))
    found = min(zip(losses, [-weight for weight in weights], strict=True))
    value = -found[1]
    if len(losses) == 3:
        at_local, half, at_fed = losses
        curvature = at_local + at_fed - 2 * half
        if curvature > 0:
            raw = (3 * at_local + at_fed - 4 * half) / (4 * curvature)
            value = min(max(raw, 0.0), 1.0)
            return Weight(value, raw, math.nan, math.nan, math.nan, math.nan, "" if value == raw else "clipped")
        value = 1.0 if at_fed <= at_local else 0.0
    return Weight(value, value, math.nan, math.nan, math.nan, math.nan)


@dataclass(frozen=True)
class Evidence:
    """One client's report: each list has one number per module (``losses``: one per point of the grid).

    ``b`` is the calibrated mean squared error of the local adapter and ``q`` the squared distance of the two adapters,
    in the metric of b; ``b`` is empty if the client has too few examples to estimate it. ``distance`` is the squared
    distance of the deltas, whatever the metric. Variances and covariance are empty if the rule does not use them;
    ``more`` has these three lists for other dampings.
    """

    examples: int
    takes_part: bool
    variance_fed: Sequence[float]
    variance_local: Sequence[float]
    covariance: Sequence[float]
    distance: Sequence[float]
    b: Sequence[float] = ()
    q: Sequence[float] = ()
    losses: Sequence[float] = ()
    samples: int = 0
    dropped: int = 0
    more: Sequence[Sequence[Sequence[float]]] = ()

    def at(self, index: int) -> Evidence:
        """The same at another damping, by its place in ``more``."""
        fed, local, covariance = self.more[index]
        return replace(self, variance_fed=fed, variance_local=local, covariance=covariance)


MODES = (
    "client-fisher",
    "client-fisher-clipped",
    "server-scalar",
    "random-effects",
    "plugin",
    "line-search",
    "half",
)


def weigh(
    evidence: Sequence[Evidence], mode: str, module: int | None = None, fed_scale: str = "client", total: int = 0
) -> list[Weight]:
    """The weight of every client by one of :data:`MODES`.

    Args:
        evidence: one per client, in the order of the weights.
        mode: the rule.
        module: from this module's numbers alone; None: from the sums over modules.
        fed_scale: ``"total"`` takes the federated adapter's information as that of all clients' examples.
        total: examples of all clients that trained the federated adapter, in case some of them did not report.

    Returns:
        Weights; flagged ``"identical"`` with 1 if the two adapters do not differ (except in mode "half"), and
        ``"no-held-out"`` with 0.5 if a line search had no examples to search with.
    """
    weights = _weigh(evidence, mode, module, fed_scale, total)
    if mode == "half":
        return weights
    apart = [sum(client.distance) if module is None else client.distance[module] for client in evidence]
    return [
        weight if distance > 0 else replace(weight, value=1.0, raw=1.0, flag="identical")
        for weight, distance in zip(weights, apart, strict=True)
    ]


def _weigh(evidence: Sequence[Evidence], mode: str, module: int | None, fed_scale: str, total: int) -> list[Weight]:
    if mode == "half":
        return [_without_moments(0.5) for _ in evidence]
    if mode == "line-search":
        undecided = _without_moments(0.5, "no-held-out")
        return [best_of(client.losses) if client.losses else undecided for client in evidence]

    def numbers(rows: Sequence[Sequence[float]]) -> Tensor:
        return torch.tensor([sum(row) if module is None else row[module] for row in rows], dtype=torch.float64)

    examples = torch.tensor([client.examples for client in evidence], dtype=torch.float64)
    counted = examples * torch.tensor([client.takes_part for client in evidence])
    everybody = max(total, float(counted.sum()))
    shares = counted / max(everybody, 1.0)
    if mode in ("random-effects", "plugin"):
        known = torch.tensor([len(client.b) > 0 for client in evidence])
        variances = numbers([client.b or [math.nan] * len(client.distance) for client in evidence])
        # Too few examples to estimate b: take the others', scaled inversely with the number of examples.
        variances = torch.where(known, variances, (variances * examples)[known].mean() / examples)
        rule = random_effects if mode == "random-effects" else plug_in
        return rule(variances, numbers([client.q for client in evidence]), shares)
    local = numbers([client.variance_local for client in evidence])
    if mode == "server-scalar":
        return shared_variance(local / examples, shares)
    fed = numbers([client.variance_fed for client in evidence])
    covariance = numbers([client.covariance for client in evidence])
    if fed_scale == "total" and everybody > 0:
        scale = examples / everybody
        fed, covariance = fed * scale, covariance * scale.sqrt()
    if mode != "client-fisher-clipped":
        covariance = torch.zeros_like(covariance)
    return [fisher_weight(*row) for row in zip(fed.tolist(), local.tolist(), covariance.tolist(), strict=True)]


def _without_moments(value: float, flag: str = "") -> Weight:
    return Weight(value, value, math.nan, math.nan, math.nan, math.nan, flag)
