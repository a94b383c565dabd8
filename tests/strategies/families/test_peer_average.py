"""Weights of clients for one another."""

from __future__ import annotations

import pytest
import torch

from strategies.families.peer_average import MOST_RECORDED, PeerWeights

WEIGHTS = PeerWeights(["ada", "ben"], torch.tensor([[0.0, 1.0], [0.25, 0.75]], dtype=torch.float64))


def test_a_row_is_read_by_name() -> None:
    assert dict(WEIGHTS) == {"ada": {"ada": 0.0, "ben": 1.0}, "ben": {"ada": 0.25, "ben": 0.75}}
    assert WEIGHTS.used("ada") == {"ben": 1.0}
    assert WEIGHTS.used("cyd") == {}
    assert len(PeerWeights([], torch.zeros(0, 0))) == 0


@pytest.mark.parametrize("count", [MOST_RECORDED, MOST_RECORDED + 1])
def test_a_matrix_that_nobody_can_look_at_is_not_recorded(count: int) -> None:
    found = PeerWeights([f"client-{number}" for number in range(count)], torch.full((count, count), 1 / 3)).recorded(2)
    assert len(found) == (count if count <= MOST_RECORDED else 0)
    assert all(row == [0.33] * count for row in found.values())
