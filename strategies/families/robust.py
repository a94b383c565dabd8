"""Averages that one upload among several cannot take over: by coordinate, or by choosing one upload.

* ``median``: of every number (Yin, Chen, Ramchandran, Bartlett, "Byzantine-Robust Distributed Learning", ICML 2018).
* ``trimmed``: the mean without the smallest and the largest of every number (same paper, with one liar assumed).
* ``krum``: the upload with the nearest neighbours (Blanchard et al., "Machine Learning with Adversaries: Byzantine
  Tolerant Gradient Descent", NeurIPS 2017, with one liar assumed).

None looks at example counts, because a liar could claim any. Personalised clients differ, so honest numbers are far
apart and robust rules cost accuracy: see docs/failures.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fedalloy_adapters.adapter import Adapter, stack_vectors

RULES = ("none", "median", "trimmed", "krum")
LIARS = 1


def robust_average(adapters: Sequence[Adapter], rule: str) -> Adapter:
    """The average by one of :data:`RULES` of adapters with one layout; with fewer than three, their mean.

    Raises:
        ValueError: an unknown rule.
    """
    matrix = stack_vectors(list(adapters))  # [N, P]
    count = len(matrix)
    if count < 2 * LIARS + 1:
        return Adapter(adapters[0].layout, matrix.mean(dim=0))
    if rule in ("median", "trimmed"):
        cut = (count - 1) // 2 if rule == "median" else LIARS
        return Adapter(adapters[0].layout, matrix.sort(dim=0).values[cut : count - cut].mean(dim=0))
    if rule == "krum":
        distances = torch.cdist(matrix.double(), matrix.double()).square()
        nearest = max(1, count - LIARS - 2)
        scores = distances.sort(dim=1).values[:, 1 : 1 + nearest].sum(dim=1)
        return Adapter(adapters[0].layout, matrix[int(scores.argmin())].clone())
    raise ValueError(f"unknown rule {rule!r}, expected one of {', '.join(RULES[1:])}")
