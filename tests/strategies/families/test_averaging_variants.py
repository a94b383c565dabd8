"""Variants of averaging: the defining property of each, against dense matrices, and what is sent."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.algebra import stack
from fedalloy_adapters.bank.store import Bank
from fedalloy_adapters.layout import Factor
from fedalloy_adapters.parts import layout_of_part
from strategies import STRATEGIES
from strategies.algorithms.fedex_lora import residual
from strategies.families import by_modules
from strategies.families.merged_base import compact, exact_sum
from strategies.framework.exchange import StrategyError
from tests.strategies.conftest import client_of, layout_of, random_adapter
from tests.strategies.fleet import COUNTS, LAYOUT, NAMES, SHARES, Fleet, dense, sent, size, trained


@pytest.mark.parametrize("name", ["flora", "fedex-lora", "ffa-lora", "rolora"])
def test_aggregation_is_exact(name: str) -> None:
    """Every client's model is the average of the models (not of the factors) that the clients trained."""
    fleet = Fleet(name)
    for _ in range(3):
        fleet.play()
    models = [trained(fleet, who) for who in NAMES]
    for saved in fleet.deliver().values():
        for module in LAYOUT.lora_modules:
            ideal = sum(share * model[module] for share, model in zip(SHARES, models, strict=True))
            torch.testing.assert_close(dense(saved, module), torch.as_tensor(ideal), rtol=0, atol=2e-5)
            assert float((models[0][module] - ideal).abs().max()) > 0.05  # there was something to average


def test_fedavg_is_not_exact() -> None:
    fleet = Fleet("fedavg")
    fleet.play()
    models = [trained(fleet, who)["q_proj"] for who in NAMES]
    ideal = sum(share * model for share, model in zip(SHARES, models, strict=True))
    assert float((dense(fleet.deliver()["ada"], "q_proj") - ideal).abs().max()) > 1e-3


@pytest.mark.parametrize("name", ["flora", "fedex-lora"])
def test_a_lost_answer_adds_nothing_twice_and_a_late_client_catches_up(name: str) -> None:
    fleet = Fleet(name)
    fleet.play()
    fleet.play(deaf="ben")  # carried out, and nobody knows
    fleet.play(only=("ada", "cyd"))
    fleet.play()
    found = fleet.deliver()
    for module in LAYOUT.lora_modules:
        for other in ("ben", "cyd"):
            torch.testing.assert_close(dense(found["ada"], module), dense(found[other], module), rtol=0, atol=1e-5)


def test_the_residual_has_the_rank_that_is_sent() -> None:
    adapters = [random_adapter(layout_of(rank=2, d_in=20, d_out=30), seed, dtype=torch.float64) for seed in range(4)]
    found = residual(adapters, [0.1, 0.2, 0.3, 0.4])
    assert set(found.layout.ranks.values()) == {3 * 2}
    mean = Adapter(adapters[0].layout, sum(w * a.vector for w, a in zip([0.1, 0.2, 0.3, 0.4], adapters, strict=True)))
    for module in found.layout.lora_modules:
        ideal = sum(w * dense(a, module) for w, a in zip([0.1, 0.2, 0.3, 0.4], adapters, strict=True))
        torch.testing.assert_close(
            dense(found, module) + dense(mean, module), torch.as_tensor(ideal), rtol=0, atol=1e-5
        )
    assert float(found["head", Factor.WEIGHT].abs().max()) == 0


def test_ranks_may_differ_and_everybody_gets_the_best_approximation() -> None:
    layouts = [layout_of(rank=2, alpha=4.0), layout_of(rank=4, alpha=4.0), layout_of(rank=3, alpha=4.0)]
    fleet = Fleet("flexlora", layouts)
    fleet.play()
    for module in LAYOUT.lora_modules:
        mean = sum(share * dense(fleet[who].slots["global"], module) for share, who in zip(SHARES, NAMES, strict=True))
        u, sigma, v = torch.linalg.svd(torch.as_tensor(mean))
        for who, rank in zip(NAMES, (2, 4, 3), strict=True):
            adapter = fleet.brief(who).adapters["global"]
            assert adapter.layout.ranks[module] == rank
            best = u[:, :rank] @ torch.diag(sigma[:rank]) @ v[:rank]
            torch.testing.assert_close(dense(adapter, module), best, rtol=0, atol=1e-5)
            rows = adapter[module, Factor.A] @ adapter[module, Factor.A].T  # the singular values are in B
            torch.testing.assert_close(rows, torch.eye(rank), rtol=0, atol=1e-5)
    stacked = Fleet("flora", layouts)
    stacked.play()
    update = stacked.brief("ada").adapters["update"]
    assert update.layout.ranks["q_proj"] == 5  # 2 + 4 + 3, and no more than the matrix has
    with pytest.raises(StrategyError, match="base model other"):
        stacked.strategy.enrol(client_of("dan", layout_of(base="other")))


def test_full_rank_flexlora_is_flora() -> None:
    adapters = [random_adapter(layout_of(rank=5), seed, dtype=torch.float64) for seed in range(3)]
    flex = STRATEGIES["flexlora"](seed=3)
    flex.enrol(client_of("ada", layout_of(rank=5)))
    uploads = dict(zip(NAMES, adapters, strict=True))
    merged = flex.average(uploads, dict(zip(NAMES, COUNTS, strict=True)))  # type: ignore[attr-defined]
    stack = exact_sum(Bank.of(uploads), [count / sum(COUNTS) for count in COUNTS])
    for module in LAYOUT.lora_modules:
        torch.testing.assert_close(dense(merged, module), dense(stack, module), rtol=0, atol=1e-10)


def test_what_crosses_the_network() -> None:
    a, b, head = size(Factor.A), size(Factor.B), size(Factor.WEIGHT, Factor.BIAS)
    expected = {
        "fedprox": ({"global": a + b + head}, a + b + head),
        "ffa-lora": ({"global": b + head}, b + head),
        "rolora": ({"global": b + head}, a + head),  # what the first round averaged; what the second does
        "fedsa-lora": ({"global": a}, a),
        "fedrep": ({"global": a + b}, a + b),
        "ditto": ({"global": a + b + head}, a + b + head),
        "apfl": ({"global": a + b + head}, a + b + head),
        "feddpa": ({"global": a + b + head}, a + b + head),
        "fml": ({"global": a + b + head}, a + b + head),
        "fedalt": ({"rest": a + b + head}, a + b + head),
        "fedamp": ({"cloud": a + b + head}, a + b + head),
        "pfedgraph": ({"local": a + b + head}, a + b + head),
        "fedfomo": ({"peer-0": a + b + head, "peer-1": a + b + head}, a + b + head),
        "ifca": ({"candidate-0": a + b + head, "candidate-1": a + b + head}, a + b + head),
    }
    for name, (down, up) in expected.items():
        fleet = Fleet(name)
        fleet.play()
        assert sent(fleet.brief("ada")) == down, name
        fleet.play()
        (send,) = [step.send for step in fleet["ada"].plans[-1].steps if step.HasField("send")]
        assert layout_of_part(LAYOUT, send.part).size == up, name


def test_flora_sends_down_as_many_ranks_as_there_are_clients() -> None:
    wide = layout_of(rank=2, d_in=40, d_out=30)
    fleet = Fleet("flora", [wide] * 3)
    fleet.play()
    update = fleet.brief("ada").adapters
    assert set(update) == {"update"}
    assert set(update["update"].layout.ranks.values()) == {3 * 2}


def test_fedprox_without_pull_is_fedavg() -> None:
    plans = []
    for name, options in (("fedavg", {}), ("fedprox", {"mu": 0.0}), ("fedprox", {"mu": 0.5})):
        plans.append([str(step) for step in Fleet(name, **options).brief("ada").steps])
    assert plans[0] == plans[1]
    (pulled,) = [step.train.proximal for step in Fleet("fedprox", mu=0.5).brief("ada").steps if step.HasField("train")]
    assert (pulled.slot, pulled.mu) == ("global", 0.5)


def test_rolora_takes_turns_and_sends_everything_to_a_client_that_missed_one() -> None:
    fleet = Fleet("rolora")
    start = fleet.strategy.global_model  # type: ignore[attr-defined]
    fleet.play()
    first = fleet.strategy.global_model  # type: ignore[attr-defined]
    assert torch.equal(first.select([Factor.A]).vector, start.select([Factor.A]).vector)
    assert not torch.equal(first.select([Factor.B]).vector, start.select([Factor.B]).vector)
    fleet.play(only=("ada", "cyd"))
    second = fleet.strategy.global_model  # type: ignore[attr-defined]
    assert not torch.equal(second.select([Factor.A]).vector, first.select([Factor.A]).vector)
    assert torch.equal(second.select([Factor.B]).vector, first.select([Factor.B]).vector)
    assert sent(fleet.brief("ada")) == {"global": size(Factor.A, Factor.WEIGHT, Factor.BIAS)}
    assert sent(fleet.brief("ben")) == {"global": LAYOUT.size}
    saved = fleet.deliver()
    assert torch.equal(saved["ada"].vector, saved["ben"].vector)


def test_fedsa_keeps_b_and_head_where_they_are() -> None:
    fleet = Fleet("fedsa-lora")
    fleet.play()
    own = {who: fleet[who].slots["global"] for who in NAMES}
    saved = fleet.deliver()
    for factor in (Factor.B, Factor.WEIGHT, Factor.BIAS):
        for who in NAMES:
            assert torch.equal(saved[who].select([factor]).vector, own[who].select([factor]).vector)
    mean = sum(share * own[who].select([Factor.A]).vector for share, who in zip(SHARES, NAMES, strict=True))
    torch.testing.assert_close(saved["ada"].select([Factor.A]).vector, torch.as_tensor(mean), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["flora", "fedex-lora"])
def test_updates_of_the_base_lie_in_files_and_a_checkpoint_refers_to_them(name: str, tmp_path: Path) -> None:
    fleet, in_memory = Fleet(name), Fleet(name)
    fleet.strategy.storage.spill_to(tmp_path / "bank", 0)
    for _ in range(2):
        fleet.play(deaf="ben")  # lacks both rounds' updates afterwards
        in_memory.play(deaf="ben")
    state = fleet.strategy.state()
    assert [key for key in state.rows if key.startswith("update/")] == ["update/000000", "update/000001"]
    other = Fleet(name)
    other.strategy.storage.spill_to(tmp_path / "other", 0)
    other.strategy.load_state(state)
    other.round_ = fleet.round_
    for who in NAMES:
        for again in (other, in_memory):
            expected, found = fleet.brief(who), again.brief(who)
            assert expected.steps == found.steps
            assert set(expected.adapters) == set(found.adapters)
            for slot, adapter in expected.adapters.items():
                assert torch.equal(adapter.vector, found.adapters[slot].vector)
    assert "update" in fleet.brief("ben").adapters


def test_a_sum_of_a_few_modules_at_a_time_is_that_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    bank = Bank.of({who: random_adapter(layout_of(rank=4), seed) for seed, who in enumerate(NAMES)})
    whole = compact(stack(list(bank.values()), SHARES))
    monkeypatch.setattr(by_modules, "_TOGETHER", 1)
    assert torch.equal(exact_sum(bank, SHARES).vector, whole.vector)
    assert exact_sum(bank, SHARES).layout.digest == whole.layout.digest
