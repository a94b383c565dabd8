"""Registration: no single client decides for the others, or makes the server allocate more than it has sent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fedalloy_adapters.layout import Entry, Factor, Layout
from server_app.run.run_directory import RunDirectory
from strategies import STRATEGIES, strategy_from_run_config
from strategies.framework.exchange import BadAnswerError, Client, StrategyError
from strategies.framework.limits import Limits, require_affordable
from tests.faults.nodes import NodeGrid, run_nodes, statuses
from tests.faults.reports import LAYOUT
from tests.strategies.conftest import FakeNode, client_of, layout_of

OTHER = layout_of(rank=2)
HUGE = layout_of(rank=1, modules=("q_proj",), d_in=300_000_000)
"""1.2 GB in a hundred bytes."""


def nodes(**layouts: Layout) -> dict[int, FakeNode]:
    return {number: FakeNode(name, layout, 10 * number) for number, (name, layout) in enumerate(layouts.items(), 1)}


def registered(directory: RunDirectory) -> dict[str, Any]:
    found: dict[str, Any] = directory.rounds()[0]["clients"]
    return found


def tensors(directory: RunDirectory) -> dict[str, torch.Tensor]:
    found = directory.newest_checkpoint()
    assert found is not None
    return dict(found.state.tensors)


def test_the_first_client_does_not_decide_for_the_others(tmp_path: Path) -> None:
    grid = NodeGrid(nodes(ada=LAYOUT, ben=LAYOUT) | {9: FakeNode("aaa", OTHER)})
    directory = run_nodes(tmp_path, grid)
    assert registered(directory)["aaa"]["reason"] == (
        "client 'aaa' has rank 2 for 'q_proj', expected 4 (as client 'ada' has); 1 of 3 new clients fit its layout, "
        "2 fit the most common one"
    )
    assert statuses(directory) == [{"ada": "ok", "ben": "ok"}] * 2
    without = tensors(run_nodes(tmp_path, NodeGrid(nodes(ada=LAYOUT, ben=LAYOUT)), run_name="without"))
    assert all(torch.equal(tensor, without[name]) for name, tensor in tensors(directory).items())


def test_a_tie_is_decided_by_the_order_of_ids_and_who_comes_late_fits_who_is_there(tmp_path: Path) -> None:
    grid = NodeGrid(nodes(ada=OTHER, ben=LAYOUT, cyd=LAYOUT, dan=OTHER, eve=LAYOUT, flo=LAYOUT))
    grid.online = {1, 2, 3, 4}
    grid.at[4] = lambda grid: grid.online.update((5, 6))
    directory = run_nodes(tmp_path, grid, num_server_rounds=4)
    assert statuses(directory)[-1] == {"ada": "ok", "dan": "ok"}
    assert "fit its layout" not in registered(directory)["ben"]["reason"]


def test_who_has_nothing_to_train_on_has_no_vote(tmp_path: Path) -> None:
    grid = NodeGrid(nodes(ben=LAYOUT, cyd=LAYOUT) | {7 + i: FakeNode(f"a{i}", OTHER, 0) for i in range(3)})
    assert statuses(run_nodes(tmp_path, grid)) == [{"ben": "ok", "cyd": "ok"}] * 2


def test_layouts_that_may_differ_are_all_taken_in_by_order_of_id(tmp_path: Path) -> None:
    first, second = (layout_of(modules=(f"mod/{name}::q_proj",)) for name in ("a", "b"))
    wrong = layout_of(modules=("mod/b::q_proj",), rank=2)
    grid = NodeGrid(nodes(ada=second, ben=first, cyd=first, dan=second) | {9: FakeNode("aaa", wrong)})
    directory = run_nodes(tmp_path, grid)
    assert statuses(directory) == [dict.fromkeys(("ada", "ben", "cyd", "dan"), "ok")] * 2
    assert "(as client 'ada' has); 3 of 5 new clients fit its layout, 5 fit" in registered(directory)["aaa"]["reason"]
    strategy = strategy_from_run_config({"strategy": "fedavg"})
    mixed = [client_of(name, layout) for name, layout in (("cyd", first), ("ada", second), ("ben", first))]
    assert strategy.votes(mixed) == {"ada": 3, "ben": 3, "cyd": 3}


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_takes_the_majority_in_first(name: str) -> None:
    strategy = strategy_from_run_config({"strategy": name})
    odd = client_of("aaa", layout_of(base="another-model"))
    votes = strategy.votes([odd, client_of("cyd", LAYOUT), client_of("ben", LAYOUT)])
    if name.startswith("local") or name == "pfedhn":  # which take any layout
        assert votes == {"aaa": 3, "ben": 3, "cyd": 3}
    else:
        assert list(votes.items()) == [("ben", 2), ("cyd", 2), ("aaa", 1)]


def test_a_reference_model_is_voted_on_as_well() -> None:
    strategy = strategy_from_run_config({"strategy": "fedmosaic", "fedmosaic.share-conventional-lora": True})
    other = Layout((Entry("down_proj", Factor.GRADIENT, (9, 6)),), {}, "reference")
    odd = Client("aaa", 1, LAYOUT, 10, reference=other)
    votes = strategy.votes([odd, client_of("ben", LAYOUT), client_of("cyd", LAYOUT)])
    assert list(votes) == ["ben", "cyd", "aaa"]
    strategy.enrol(client_of("ben", LAYOUT))
    with pytest.raises(StrategyError, match=r"client 'aaa' has as reference .*\(as client 'ben' has\)"):
        strategy.enrol(odd)


def test_an_adapter_is_not_allocated_on_somebodys_word(tmp_path: Path) -> None:
    grid = NodeGrid(nodes(ada=LAYOUT, ben=LAYOUT, huge=HUGE))
    directory = run_nodes(tmp_path, grid, strategy="local")  # which takes any layout
    assert registered(directory)["huge"]["reason"] == (
        "client 'huge' registered an adapter of 1200 MB, expected at most 1024 (max-adapter-mb)"
    )
    assert statuses(directory) == [{"ada": "ok", "ben": "ok"}] * 2
    small = run_nodes(tmp_path, NodeGrid(nodes(ada=LAYOUT, ben=LAYOUT, cyd=layout_of(d_in=300))), run_name="small",
                      strategy="local", max_adapter_mb=0.005)  # fmt: skip
    assert "cyd" not in statuses(small)[0]


def test_a_reference_model_is_not_either() -> None:
    gradient = Layout((Entry("down_proj", Factor.GRADIENT, (2**20, 300)),), {}, "reference")
    with pytest.raises(BadAnswerError, match=r"'ada' registered a reference gradient of 1258\.29 MB, expected at most"):
        require_affordable(Limits(), Client("ada", 1, LAYOUT, 10, reference=gradient))


def test_the_bound_on_weights_is_of_what_clients_registered(tmp_path: Path) -> None:
    grid = NodeGrid({n: FakeNode(name, LAYOUT, e) for n, (name, e) in enumerate(zip("abc", (2, 100, 60)), 1)})  # noqa: B905
    grid.online = {1, 2}
    grid.at[4] = lambda grid: grid.online.add(3)
    found = run_nodes(tmp_path, grid, num_server_rounds=3, max_examples_ratio=1.0).newest_checkpoint()
    assert found is not None
    assert {client["id"]: client["examples"] for client in found.run["clients"]} == {"a": 2, "b": 51, "c": 60}
