"""Differences of losses: to the same strategy at fp32, and to the stock app, client by client."""

from __future__ import annotations

import pytest

from tests.benchmarks.wire_bytes import STOCK, Sent, score_table


def sent(way: str, seed: int, **losses: float) -> Sent:
    return Sent(way, seed, 1, 1, 0, losses={f"client-{name[1:]}": loss for name, loss in losses.items()})


def test_differences_are_paired_by_seed_and_client() -> None:
    found = [
        sent(STOCK, 0, c0=1.0, c1=3.0),
        sent(STOCK, 1, c0=2.0, c1=4.0),
        sent("fedavg fp32", 0, c0=1.2, c1=3.2),
        sent("fedavg fp32", 1, c0=2.2, c1=4.2),
        sent("fedavg int4", 0, c0=1.3, c1=3.3),  # seed 1 is still to come
    ]
    table = score_table(found)
    assert table[STOCK] == {"mean": 2.5}
    exact, small = table["fedavg fp32"], table["fedavg int4"]
    assert "more" not in exact
    assert [exact[key] for key in ("than_stock", "stock_low", "stock_high")] == pytest.approx([0.2] * 3)
    assert small["more"] == pytest.approx(0.1)
    assert small["than_stock"] == pytest.approx(0.3)


def test_without_a_seed_in_common_nothing_is_compared() -> None:
    table = score_table([sent(STOCK, 1, c0=1.0), sent("fedavg fp32", 0, c0=1.2)])
    assert "than_stock" not in table["fedavg fp32"]
