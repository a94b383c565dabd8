"""RELA's mathematics: section 7.4 of the specification, groups 6 and 10, against naive loops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from strategies.algorithms.fedmosaic_relevance import entropy, relevance, similarity

KINDS = ("cosine", "column-mean")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def everybody(count: int) -> Tensor:
    return torch.ones(count, count, dtype=torch.bool)


def naive(sketches: Tensor, kind: str) -> list[list[float]]:
    def cosine(a: Tensor, b: Tensor) -> float:
        return float((a * b).sum() / (a.square().sum().sqrt() * b.square().sum().sqrt()))

    if kind == "cosine":
        return [[cosine(a, b) for b in sketches] for a in sketches]
    width = sketches.shape[2]
    return [[sum(cosine(a[:, c], b[:, c]) for c in range(width)) / width for b in sketches] for a in sketches]


@pytest.mark.parametrize("kind", KINDS)
def test_similarity_is_the_naive_one_symmetric_and_one_on_the_diagonal(kind: str) -> None:
    sketches = draw(5, 4, 7)
    found = similarity(sketches, kind)
    torch.testing.assert_close(found, torch.tensor(naive(sketches, kind), dtype=torch.float64), atol=1e-12, rtol=0)
    assert torch.equal(found, found.T)
    torch.testing.assert_close(found.diagonal(), torch.ones(5, dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@given(scales=st.lists(st.floats(1e-6, 1e6), min_size=4, max_size=4))
def test_similarity_does_not_depend_on_the_scale_of_a_sketch(kind: str, scales: list[float]) -> None:
    sketches = draw(4, 3, 5)
    scaled = sketches * torch.tensor(scales, dtype=torch.float64)[:, None, None]
    torch.testing.assert_close(similarity(scaled, kind), similarity(sketches, kind), atol=1e-9, rtol=0)


def test_a_sketch_of_zeros_is_similar_to_nothing_and_gives_no_nan() -> None:
    sketches = draw(3, 2, 4)
    sketches[1] = 0
    for kind in KINDS:
        found = similarity(sketches, kind)
        assert torch.equal(found[1], torch.zeros(3, dtype=torch.float64))
        assert relevance(found, 0.5, everybody(3)).isfinite().all()


def test_the_column_mean_drowns_in_noise_that_the_cosine_bears() -> None:
    """The reason for the default: there, columns of tiny gradients count as much as all others."""
    scale = torch.logspace(0, -4, 64, dtype=torch.float64)
    common = draw(30, 64) * scale
    noisy = torch.stack([common, common]) + 1e-2 * draw(2, 30, 64, seed=1)
    assert similarity(noisy, "cosine")[0, 1] > 0.98
    assert similarity(noisy, "column-mean")[0, 1] < 0.6


@given(st.integers(2, 7), st.floats(0.05, 20), st.booleans(), st.integers(0, 9))
def test_weights_are_a_softmax_over_the_others(count: int, temperature: float, include_self: bool, seed: int) -> None:
    similarities = similarity(draw(count, 3, 4, seed=seed))
    found = relevance(similarities, temperature, everybody(count), include_self=include_self)
    for i in range(count):
        peers = [j for j in range(count) if include_self or j != i]
        exponentials = {j: math.exp(float(similarities[i, j]) / temperature) for j in peers}
        for j in range(count):
            expected = exponentials.get(j, 0.0) / sum(exponentials.values())
            assert math.isclose(float(found[i, j]), expected, rel_tol=1e-9, abs_tol=1e-12)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(count, dtype=torch.float64))
    assert include_self or not found.diagonal().any()


def test_weights_follow_the_clients_when_they_are_reordered() -> None:
    similarities, order = similarity(draw(5, 3, 4)), torch.tensor([3, 0, 4, 2, 1])
    found = relevance(similarities, 0.3, everybody(5))
    reordered = relevance(similarities[order][:, order], 0.3, everybody(5))
    torch.testing.assert_close(reordered, found[order][:, order])


def test_limits_of_the_temperature_equal_similarities_and_two_clients() -> None:
    similarities = similarity(draw(5, 3, 4))
    others = (1 - torch.eye(5, dtype=torch.float64)) / 4
    torch.testing.assert_close(relevance(similarities, 1e9, everybody(5)), others, atol=1e-8, rtol=0)
    torch.testing.assert_close(relevance(torch.ones(5, 5), 0.5, everybody(5)), others)
    nearest = relevance(similarities, 1e-6, everybody(5))
    alone = similarities.masked_fill(torch.eye(5, dtype=torch.bool), -2)
    assert torch.equal(nearest.argmax(dim=1), alone.argmax(dim=1))
    torch.testing.assert_close(nearest.max(dim=1).values, torch.ones(5, dtype=torch.float64))
    two = relevance(similarities[:2, :2], 0.5, everybody(2))
    assert torch.equal(two, torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64))


def test_clients_that_are_no_peers_get_no_weight_and_nobody_gets_nan() -> None:
    peers = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]], dtype=torch.bool)
    for include_self in (False, True):
        found = relevance(similarity(draw(3, 2, 3)), 0.5, peers, include_self=include_self)
        assert not found[2].any()
        assert not found[:2, 2].any()
        torch.testing.assert_close(found[:2].sum(dim=1), torch.ones(2, dtype=torch.float64))


def test_entropy_is_relative() -> None:
    weights = torch.tensor([[0.0, 0.5, 0.5], [0.0, 1.0, 0.0], [0.1, 0.9, 0.0]], dtype=torch.float64)
    found = entropy(weights)
    assert float(found[0]) == pytest.approx(1)
    assert math.isnan(found[1])
    assert float(found[2]) == pytest.approx(-(0.1 * math.log(0.1) + 0.9 * math.log(0.9)) / math.log(2))
