"""FedMosaic over clients that own different parameter groups: each group is averaged among its owners."""

from __future__ import annotations

import pytest
import torch

from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.groups import layout_of_groups
from fedalloy_adapters.layout import Entry, Layout
from proto.fedalloy.v1 import report_pb2
from strategies.algorithms.fedmosaic import LOCAL, SKETCH
from strategies.framework.exchange import Answer, StrategyError
from tests.fedalloy_adapters.test_groups import layout_of
from tests.strategies.algorithms.test_fedmosaic import LARGE, SMALL, answer, client_of, received, sketch_of, strategy_of
from tests.strategies.conftest import noise

SEES = layout_of("shared", "mod/image", "head/digit")
READS = layout_of("shared", "mod/text", "head/number")
BOTH = layout_of("shared", "mod/image", "mod/text", "head/digit")
LAYOUTS = {"ada": SEES, "ben": READS, "cyd": BOTH}


def test_each_group_is_averaged_among_its_other_owners_by_their_relevance() -> None:
    strategy = strategy_of(LAYOUTS, temperature=0.3)
    uploads = {name: answer(strategy, name) for name in LAYOUTS}
    weights = strategy.settle(1)["relevance"]
    got = received(strategy, "ada")
    assert got.layout.digest == SEES.digest
    shared = layout_of_groups(SEES, ["shared"])
    expected = (
        weights["ada"][1] * uploads["ben"].part(shared).vector + weights["ada"][2] * uploads["cyd"].part(shared).vector
    )
    # the record's weights are rounded to four digits
    torch.testing.assert_close(got.part(shared).vector, expected, atol=2e-3, rtol=0)
    for group in ("mod/image", "head/digit"):  # one other client has these
        part = layout_of_groups(SEES, [group])
        assert torch.equal(got.part(part).vector, uploads["cyd"].part(part).vector)
    own = layout_of_groups(READS, ["head/number"])  # nobody else has it
    assert torch.equal(received(strategy, "ben").part(own).vector, uploads["ben"].part(own).vector)


@pytest.mark.parametrize("layouts", [LAYOUTS, {"ada": SMALL, "ben": SMALL, "cyd": LARGE}], ids=["groups", "models"])
def test_state_continues_to_the_same_briefs(layouts: dict[str, Layout]) -> None:
    first, second = strategy_of(layouts), strategy_of(layouts)
    for name in layouts:
        answer(first, name)
    first.settle(1)
    second.load_state(first.state())
    for name in layouts:
        assert torch.equal(received(first, name).vector, received(second, name).vector)


def test_clients_of_one_set_of_groups_get_what_clients_without_groups_would() -> None:
    plain = Layout(
        tuple(Entry(entry.module.replace("::", "."), entry.factor, entry.shape) for entry in SEES.entries),
        {module.replace("::", "."): scaling for module, scaling in SEES.scalings.items()},
        SEES.base_fingerprint,
    )
    names, found = ("ada", "ben", "cyd"), []
    numbers = {name: noise(name, 1, SEES).vector for name in names}
    for layout in (SEES, plain):
        strategy = strategy_of(dict.fromkeys(names, layout))
        for name in names:
            adapters = {LOCAL: Adapter(layout, numbers[name]), SKETCH: sketch_of(strategy, name)}
            strategy.absorb(1, strategy.clients[name], Answer(adapters, {}, {}, 10, report_pb2.Report()))
        strategy.settle(1)
        found.append({name: received(strategy, name).vector for name in names})
    for name in names:
        torch.testing.assert_close(found[0][name], found[1][name])


def test_a_group_that_differs_and_gates_by_tokens_are_refused_by_name() -> None:
    strategy = strategy_of({"ada": SEES})
    with pytest.raises(StrategyError, match=r"client 'ben' has .*in group 'shared'"):
        strategy.enrol(client_of("ben", layout_of("shared", "mod/text", rank=3)))
    with pytest.raises(StrategyError, match=r"client 'ada' has several tasks, .*fedmosaic\.gate = 'input'"):
        strategy_of({"ada": SEES}, gate="input")
