r"""RELA: who is relevant to whom, from sketches of their gradients; pure functions of tensors.

FedMosaic (arXiv 2506.11024; ICLR 2026 as Co-LoRA): with :math:`S_{ij}` the similarity of clients i and j,
:math:`w_{i\cdot} = softmax_{j \ne i}(S_{ij} / \tau)` are the weights of client i's own "global" adapter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fedalloy_adapters.bank.blocks import Row, products

_ROWS = 256
"""Rows of an N x N matrix that are computed at a time: N may be thousands, and a second such matrix counts."""


def cosines(rows: Sequence[Row]) -> Tensor:
    """:func:`similarity` of kind ``"cosine"`` of the rows of a bank, which are read once."""
    inner = products(rows)
    norms = inner.diagonal().sqrt().clamp_min(1e-12)
    for some, own in zip(torch.split(inner, _ROWS), torch.split(norms, _ROWS), strict=True):
        some.div_(own[:, None] * norms)
    return inner


def similarity(sketches: Tensor, kind: str = "cosine") -> Tensor:
    """Similarity of all pairs, ``[N, N]`` float64, symmetric, 1 on the diagonal.

    Args:
        sketches: ``[N, rows, columns]``.
        kind: ``"cosine"`` of the flat sketches (the paper), or ``"column-mean"``, the mean over the columns of the
            cosine of single columns (the authors' code). The second gives columns of tiny gradients the same weight as
            others, so noise affects it far more. A sketch or column of zeros is similar to nothing, not even to itself.
    """
    if kind == "column-mean":
        columns = torch.nn.functional.normalize(sketches.double(), dim=1)
        flat = columns.flatten(1) / math.sqrt(sketches.shape[2])
    else:
        flat = torch.nn.functional.normalize(sketches.double().flatten(1), dim=1)
    product = flat @ flat.T
    return (product + product.T) / 2


def relevance(
    similarities: Tensor, temperature: float, peers: Tensor, *, include_self: bool = False, most: float = 1.0
) -> Tensor:
    """Weights ``[N, N]``: each row a softmax of ``similarities / temperature`` over that client's peers.

    Args:
        similarities: ``[N, N]``.
        temperature: towards zero the nearest peer takes all, towards infinity all peers are equal.
        peers: ``[N, N]`` bool, who may contribute to whom; the diagonal does not count.
        include_self: a client is one of its own peers, if it has any other.
        most: a peer's largest weight, if there are enough peers for that bound; see :func:`capped`.

    Returns:
        Rows that sum to one, and a row of zeros for a client without peers.
    """
    itself = torch.eye(len(peers), dtype=torch.bool)
    allowed = peers & ~itself
    has_peers = allowed.any(dim=1, keepdim=True)
    if include_self:
        allowed = allowed | (itself & has_peers)
    found = (similarities.double() / temperature).masked_fill_(~allowed, -math.inf)
    for rows in torch.split(found, _ROWS):
        rows.copy_(torch.softmax(rows, dim=1))
    return capped(found.masked_fill_(~has_peers, 0.0), most)


def capped(weights: Tensor, most: float) -> Tensor:
    """Rows of weights with none above ``most``; the excess goes to the other weights in proportion.

    If a row has too few peers for that (only one, for example), its weights are equal. Rows keep their sums.
    """
    if most >= 1:
        return weights
    found = weights.clone()
    for row in found:
        peers = row > 0
        bound = max(most, 1 / max(int(peers.sum()), 1))
        for _ in range(int(peers.sum())):
            over = row > bound
            rest = peers & ~over & (row < bound)
            if not bool(over.any()) or not bool(rest.any()):
                break
            excess = float((row[over] - bound).sum())
            row[over] = bound
            row[rest] *= 1 + excess / float(row[rest].sum())
    return found


def entropy(weights: Tensor) -> Tensor:
    """Entropy of each row over its maximum, ``[N]`` in [0, 1]: 1 for uniform weights; NaN with fewer than two peers."""
    counts = (weights > 0).sum(dim=1)
    found = -torch.special.xlogy(weights, weights).sum(dim=1)
    return torch.where(counts > 1, found / counts.double().log(), math.nan)
