"""Scores of classifications against their definitions, and where they do not exist."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from client_app.kinds.scores.classes import ECE_BINS, class_metrics, macro_auroc

GENERATOR = torch.Generator().manual_seed(0)
LOGITS = torch.randn(200, 4, generator=GENERATOR)
LABELS = torch.randint(0, 4, (200,), generator=GENERATOR)


def by_hand(probabilities: torch.Tensor, labels: torch.Tensor) -> float:
    """Guo et al. 2017, equation 3."""
    sure, said = probabilities.max(dim=1)
    bins = (sure * ECE_BINS).long().clamp_max(ECE_BINS - 1)
    total = 0.0
    for number in range(ECE_BINS):
        here = bins == number
        if here.any():
            right = (said[here] == labels[here]).double().mean()
            total += float(here.double().mean() * (right - sure[here].mean()).abs())
    return total


def test_area_and_calibration_by_their_definitions() -> None:
    found = class_metrics(LOGITS, LABELS)
    probabilities = LOGITS.double().softmax(dim=1)
    area = roc_auc_score(LABELS.numpy(), probabilities.numpy(), multi_class="ovr", average="macro")
    assert found["auroc"] == pytest.approx(area, abs=1e-6)
    assert found["ece"] == pytest.approx(by_hand(probabilities, LABELS), abs=1e-6)


def test_two_classes_and_ties() -> None:
    scores = torch.tensor([0.2, 0.2, 0.7, 0.7, 0.7, 0.4])
    labels = torch.tensor([0, 1, 1, 0, 1, 0])
    both = torch.stack([1 - scores, scores], dim=1)
    assert macro_auroc(both, labels) == pytest.approx(roc_auc_score(labels.numpy(), np.asarray(scores)), abs=1e-6)


def test_classes_that_tell_nothing_apart_do_not_count() -> None:
    some = torch.where(LABELS == 3, 0, LABELS)
    probabilities = LOGITS.double().softmax(dim=1)
    areas = [roc_auc_score((some == c).numpy(), probabilities[:, c].numpy()) for c in range(3)]
    assert macro_auroc(probabilities, some) == pytest.approx(sum(areas) / 3, abs=1e-6)
    alone = class_metrics(LOGITS, torch.zeros(200, dtype=torch.long))
    assert set(alone) == {"f1", "ece"}
    assert set(class_metrics(LOGITS * torch.nan, LABELS)) == {"f1"}
