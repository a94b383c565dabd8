"""Scores of classifications beyond accuracy: F1, the area under the ROC curve, and calibration."""

from __future__ import annotations

import torch
from torch import Tensor

ECE_BINS = 15


def class_metrics(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Scores of ``logits [n, C]`` against ``labels [n]``, on the CPU; what cannot be computed is left out.

    ``f1``: see :func:`macro_f1`. ``auroc``: see :func:`macro_auroc`; only if a class has some of the examples and not
    all. ``ece``: expected calibration error, the mean distance between the answer's probability and its accuracy, over
    15 equal bins (Guo et al. 2017, equation 3). It needs finite probabilities.
    """
    found = {"f1": macro_f1(logits.argmax(dim=-1), labels, logits.shape[-1])}
    probabilities = logits.double().softmax(dim=-1)
    if not bool(probabilities.isfinite().all()):
        return found
    area = macro_auroc(probabilities, labels)
    return found | ({} if area is None else {"auroc": area}) | {"ece": calibration_error(probabilities, labels)}


def macro_f1(answers: Tensor, labels: Tensor, classes: int) -> float:
    """The mean F1 over classes, of ``answers [n]`` for ``labels [n]``; classes that occur in neither do not count."""
    from torchmetrics.functional.classification import multiclass_f1_score

    return float(multiclass_f1_score(answers, labels, num_classes=max(classes, 2), average="macro"))


def macro_auroc(probabilities: Tensor, labels: Tensor) -> float | None:
    """The mean area under the ROC curve over classes, each class against the rest; None if no class has a curve.

    Classes without an example, or with all of them, have no curve and do not count (torchmetrics' own mean over classes
    counts them as 0). With two classes, both have the same area.

    Args:
        probabilities: ``[n, C]``.
        labels: ``[n]``.
    """
    found = [area_under_curve(probabilities[:, c], labels == c) for c in range(probabilities.shape[1])]
    areas = [area for area in found if area is not None]
    return sum(areas) / len(areas) if areas else None


def area_under_curve(scores: Tensor, right: Tensor) -> float | None:
    """Area under the ROC curve of ``scores [n]`` for ``right [n]`` (booleans); None if all are right, or none is.

    This is the share of pairs, one right and one wrong, that the scores put in order; a tie counts one half (Mann and
    Whitney 1947). It is exact for any scores, whereas a sigmoid of large logits would make ties.
    """
    positive = int(right.sum())
    negative = len(right) - positive
    if not positive or not negative:
        return None
    return float((ranks(scores)[right].sum() - positive * (positive + 1) / 2) / (positive * negative))


def ranks(values: Tensor) -> Tensor:
    """Ranks ``[n]`` of ``values [n]`` from 1; equal values share the mean of their ranks.

    >>> ranks(torch.tensor([3.0, 1.0, 3.0])).tolist()
    [2.5, 1.0, 2.5]
    """
    _, group, counts = torch.unique(values, return_inverse=True, return_counts=True)
    middle: Tensor = counts.cumsum(dim=0).double() - (counts - 1) / 2
    return middle[group]


def calibration_error(probabilities: Tensor, labels: Tensor) -> float:
    """Expected calibration error of ``probabilities [n, C]`` for ``labels [n]``."""
    from torchmetrics.functional.classification import multiclass_calibration_error

    classes = max(probabilities.shape[1], 2)
    return float(multiclass_calibration_error(probabilities, labels, num_classes=classes, n_bins=ECE_BINS))
