"""Which clients a round asks: those that were named, and those that a choice picks."""

from __future__ import annotations

import pytest

from server_app.run.clients.participants import choose, named
from strategies.framework.exchange import Client
from tests.strategies.conftest import client_of, layout_of

CLIENTS = [client_of(name, layout_of()) for name in ("ada", "ben", "cyd", "dan", "site-1", "site-2")]


def chosen(kind: str, count: int, round_: int, seconds: dict[str, float] | None = None) -> list[str]:
    found = choose(kind, CLIENTS, count, round_=round_, seed=3, seconds=seconds or {})
    return [client.id for client in found]


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ("", ["ada", "ben", "cyd", "dan", "site-1", "site-2"]),
        ("ben", ["ben"]),
        ("site-*, ada", ["ada", "site-1", "site-2"]),
        ("nobody", []),
    ],
)
def test_names_and_patterns(patterns: str, expected: list[str]) -> None:
    assert [client.id for client in named(CLIENTS, patterns)] == expected


def test_random_is_the_same_in_a_run_that_is_repeated() -> None:
    first = chosen("random", 2, 1)
    assert chosen("random", 2, 1) == first == sorted(first)
    assert len({tuple(chosen("random", 2, round_)) for round_ in range(1, 20)}) > 3


def test_round_robin_asks_all_before_it_asks_one_again() -> None:
    rounds = [chosen("round-robin", 4, round_) for round_ in (1, 2, 3)]
    assert rounds == [
        ["ada", "ben", "cyd", "dan"],
        ["ada", "ben", "site-1", "site-2"],
        ["cyd", "dan", "site-1", "site-2"],
    ]


def test_the_fastest_begin_and_the_cohort_doubles() -> None:
    seconds = {"ada": 9.0, "ben": 1.0, "cyd": 5.0, "dan": 2.0, "site-1": 7.0, "site-2": 3.0}
    assert chosen("fastest", 1, 1, seconds) == ["ben"]
    assert chosen("fastest", 1, 2, seconds) == ["ben", "dan"]
    assert chosen("fastest", 1, 3, seconds) == ["ben", "cyd", "dan", "site-2"]
    assert len(chosen("fastest", 1, 4, seconds)) == 6
    del seconds["ada"]
    assert chosen("fastest", 1, 1, seconds) == ["ada"], "who has not been tried is"


def test_where_all_are_asked_nobody_is_left_out() -> None:
    everyone: list[Client] = choose("random", CLIENTS, 6, round_=1, seed=0, seconds={})
    assert everyone == CLIENTS
