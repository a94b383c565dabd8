"""FedMerge's mathematics: functions of models, logits and displacements.

Chen, Zhou, Long, Jiang, Zhang, "FedMerge: Federated Personalization via Model Merging", AAAI 2026; the formulas are in
:mod:`strategies.algorithms.fedmerge`. The P numbers of a model or an upload are a row of a bank, or of a tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedalloy_adapters.bank.blocks import Difference, Row, combine, products, rows_of

GUARD = 1e-12
"""Below this fraction of the largest possible inner product a logit step would amplify rounding: W stays."""


def merge_models(theta: Tensor, logits: Tensor) -> Tensor:
    """Merged models ``softmax(logits) [K, d] @ theta [d, P]`` as ``[K, P]``; the weights are taken in float64."""
    return combine(rows_of(theta), torch.softmax(logits.double(), dim=1))


def logit_gradient(theta: Tensor | Sequence[Row], logits: Tensor, displacement: Tensor | Sequence[Row]) -> Tensor:
    """``G_ij = w_ij <Theta_j - theta_i, D_i>``, ``[S, d]`` float64; rows sum to zero.

    Args:
        theta: models, d rows of P numbers.
        logits: ``[S, d]``, one row per client that answered.
        displacement: ``D_i = received - returned``, S rows.

    Inner products are taken in float64: for equal models, float32 rounding alone would look like a signal. They are
    taken with differences from the first model (rows of w sum to one), so that equal models give exactly zero.
    """
    weights = torch.softmax(logits.double(), dim=1)
    models = rows_of(theta)
    inner = products(rows_of(displacement), [Difference(model, models[0]) for model in models])
    return weights * (inner - (weights * inner).sum(dim=1, keepdim=True))


def logit_step(gradient: Tensor, shares: Tensor, lr: float, bound: float, *, per_row: bool = False) -> Tensor:
    """The max-norm step ``lr p G / max|p G|`` to subtract from the logits, ``[S, d]``; zero under the guard.

    This is the closed form of the authors' loop that repeats a fixed step until the logits have moved by ``lr``.

    Args:
        gradient: ``G`` ``[S, d]``.
        shares: ``p`` ``[S]`` (all ones to ignore the example counts).
        lr: largest logit change.
        bound: largest possible |inner product| in G, ``max_ij |Theta_j| |D_i|``; the guard is relative to it.
        per_row: normalise each client's row by its own maximum.
    """
    weighted = shares.double()[:, None] * gradient
    largest = weighted.abs().amax(dim=1, keepdim=True) if per_row else weighted.abs().max().expand(len(weighted), 1)
    usable = torch.isfinite(largest) & (largest > GUARD * bound)
    return torch.where(usable, lr * (weighted / torch.where(usable, largest, torch.ones_like(largest))), 0.0)


def model_coefficients(logits: Tensor, shares: Tensor, *, norm: str = "column", min_mass: float = 1e-3) -> Tensor:
    """``C_ij = p_i w_ij / m_j`` with column masses ``m_j = sum_i p_i w_ij``, ``[S, d]`` float64.

    ``norm = "none"`` does not divide. A column with a mass below ``min_mass`` is set to zero: otherwise an unused model
    would follow noise at the full rate.
    """
    weighted = shares.double()[:, None] * torch.softmax(logits.double(), dim=1)
    mass = weighted.sum(dim=0, keepdim=True)
    scaled = weighted / mass.clamp_min(1e-12) if norm == "column" else weighted
    return torch.where(mass < min_mass, torch.zeros_like(scaled), scaled)


def mean_row(logits: Tensor) -> Tensor:
    """The row of a new client: centred logits ``[d]`` of the mean weights over the rows of ``logits [K, d]``."""
    row = torch.softmax(logits.double(), dim=1).mean(dim=0).clamp_min(1e-30).log()
    return row - row.mean()


def cluster(uploads: Tensor | Sequence[Row], models: int, temperature: float, seed: int) -> tuple[Tensor, Tensor]:
    """k-means of K uploads of P numbers: centres ``[d, P]``, and logits ``[K, d]`` from minus the squared distances.

    k-means needs distances only. So it runs on K coordinates per upload that have the same distances (from the
    eigenvectors of the inner products, as in classical scaling). The centres are then means of uploads.

    Rows of the logits are centred; distances are divided by their mean times ``temperature``. With fewer clients than
    models, the remaining models start at the mean of all uploads.
    """
    from sklearn.cluster import KMeans  # imported here: scikit-learn takes a second to import

    count = min(models, len(uploads))
    rows = rows_of(uploads)
    points = _coordinates(rows)
    found = torch.from_numpy(KMeans(count, n_init=10, random_state=seed % 2**32).fit(points.numpy()).labels_)
    members = torch.nn.functional.one_hot(found.long(), models).T.double()
    members[members.sum(dim=1) == 0] = 1  # fewer uploads (or different ones) than models
    means = members / members.sum(dim=1, keepdim=True)
    centres = combine(rows, means)
    distances = torch.cdist(points, means @ points, compute_mode="donot_use_mm_for_euclid_dist").square()
    logits = -distances / (temperature * distances.mean().clamp_min(1e-30))
    return centres, logits - logits.mean(dim=1, keepdim=True)


def _coordinates(rows: Sequence[Row]) -> Tensor:
    """K coordinates for each row, ``[K, K]`` float64, with the same distances as the rows.

    All in one place, and by a driver that needs no more room: with thousands of clients each K x K counts.
    """
    from scipy.linalg import eigh

    centred = products([Difference(row, rows[0]) for row in rows])
    centred -= centred.mean(dim=0, keepdim=True)
    centred -= centred.mean(dim=1, keepdim=True)
    centred += centred.T.clone()
    centred /= 2
    values, vectors = eigh(centred.numpy().T, driver="evr", overwrite_a=True)  # columns first, or it is copied
    found = torch.from_numpy(vectors)
    found *= torch.from_numpy(values).clamp_min(0).sqrt()
    return found
