"""Bounds on one client's influence: update norms and example counts, and a client's own policy."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from flwr.app import Context, Message, RecordDict

from client_app.guard.policy import Policy, PolicyError
from client_app.plan.interpreter import Interpreter
from client_app.plan.names import PlanError
from client_app.plan.slots import SlotStore
from client_app.settings import SettingsError, read_settings
from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.wire.codec import CodecError, decode, encode
from fedalloy_adapters.wire.flower_records import pack, unpack
from proto.fedalloy.v1 import plan_pb2, report_pb2
from server_app.run.federation import NotEnoughClientsError
from server_app.run.run_directory import RunDirectory
from strategies import STRATEGIES
from strategies.framework.limits import Limits, with_bounded_weight
from strategies.framework.options import OptionError
from tests.faults.killing import FAMILIES, LONG, MAIN
from tests.faults.nodes import NodeGrid, run_nodes, statuses
from tests.faults.reports import LAYOUT
from tests.strategies.conftest import FakeNode, client_of

CHOSEN = list(STRATEGIES) if LONG else [*MAIN, *FAMILIES]


def nodes(examples: int = 30) -> dict[int, FakeNode]:
    return {
        1: FakeNode("ada", LAYOUT, 10),
        2: FakeNode("ben", LAYOUT, 20),
        3: FakeNode("cyd", LAYOUT, examples),
    }


def giant(plan: plan_pb2.Plan, message: Message, honest: Message) -> list[Message]:
    """Honest in form: the same upload a hundred thousand times as large."""
    report, blobs = unpack(honest.content, "report", report_pb2.Report)
    for slot, blob in blobs.items():
        known = {layout.digest: layout for layout in (LAYOUT, *parts())}
        try:
            adapter = decode(blob, layouts=known)
        except CodecError:  # a sketch
            continue
        blobs[slot] = encode(Adapter(adapter.layout, adapter.vector * 1e5), include_layout=False).blob
    return [Message(pack("report", report, blobs), reply_to=message)]


def parts() -> list[Any]:
    from fedalloy_adapters.layout import Factor

    factors = (Factor.A, Factor.B, Factor.WEIGHT, Factor.BIAS)
    return [LAYOUT.select([f for f in factors if f is not left]) for left in factors]


def final_state(directory: Any) -> dict[str, torch.Tensor]:
    found = directory.newest_checkpoint()
    assert found is not None
    return dict(found.state.tensors)


def largest(state: dict[str, torch.Tensor]) -> float:
    return max((float(tensor.double().abs().max()) for tensor in state.values() if tensor.numel()), default=0.0)


def test_a_giant_update_is_clipped_to_the_bound_and_named(tmp_path: Path) -> None:
    free = run_nodes(tmp_path, NodeGrid(nodes(), {3: giant}), run_name="free", max_update_ratio=0.0)
    kept = run_nodes(
        tmp_path, NodeGrid(nodes(), {3: giant}), run_name="kept", max_update_norm=5.0, max_update_ratio=0.0
    )
    assert largest(final_state(free)) > 1e3
    assert largest(final_state(kept)) < 1e2
    record = next(found for found in kept.rounds() if found["phase"] == "train")["clients"]
    assert record["cyd"]["status"] == "ok"
    assert record["cyd"]["clipped"]["global"] > 1e4
    assert all(norm < 1e3 for norm in record["ada"].get("clipped", {}).values())


def test_the_clipped_update_has_the_direction_of_the_whole_one_and_the_bound_as_its_norm(tmp_path: Path) -> None:
    sent: list[Adapter] = []

    def listen(plan: plan_pb2.Plan, message: Message, honest: Message) -> list[Message]:
        _, down = unpack(message.content, "plan", plan_pb2.Plan)
        _, up = unpack(honest.content, "report", report_pb2.Report)
        if up:
            sent.extend(decode(blobs["global"], layouts={LAYOUT.digest: LAYOUT}) for blobs in (down, up))
        return [honest]

    lonely = {1: FakeNode("ada", LAYOUT, 10)}
    config = {"min_clients": 1, "num_server_rounds": 1}
    directory = run_nodes(tmp_path, NodeGrid(lonely, {1: listen}), max_update_norm=0.25, **config)
    received, trained = (adapter.vector.double() for adapter in sent[:2])
    moved = final_state(directory)["model"].double() - received
    assert float((trained - received).norm()) > 0.25
    assert float(moved.norm()) == pytest.approx(0.25, rel=1e-5)
    assert float(torch.nn.functional.cosine_similarity(moved, trained - received, dim=0)) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("strategy", CHOSEN)
def test_a_giant_update_is_refused_where_the_run_says_so(strategy: str, tmp_path: Path) -> None:
    config: dict[str, Any] = {"strategy": strategy, "max_update_norm": 1e3, "update_norm_action": "reject"}
    directory = run_nodes(tmp_path, NodeGrid(nodes(), {3: giant}), **config)
    for record in [found for found in directory.rounds() if found["phase"] == "train"]:
        cyd = record["clients"]["cyd"]
        if cyd["status"] == "ok":  # a round without uploads
            continue
        assert cyd["status"] == "rejected"
        assert "expected at most 1000 (max-update-norm)" in cyd["reason"]
        assert record["clients"]["ada"]["status"] == "ok"
    assert all(bool(tensor.isfinite().all()) for tensor in final_state(directory).values())


@pytest.mark.parametrize("strategy", CHOSEN)
def test_the_largest_numbers_that_are_accepted_leave_every_state_finite(strategy: str, tmp_path: Path) -> None:
    """Just below the bound of the format, without a bound of the run: a bad model, and a server that goes on.

    Where the honest client is sent numbers so large that its answer is beyond the bound, the run says so and ends.
    """
    config: dict[str, Any] = {"strategy": strategy, "num_server_rounds": 3, "min_clients": 1}
    try:
        run_nodes(tmp_path, NodeGrid(nodes(), {3: giant, 2: giant}), **config)
    except NotEnoughClientsError as error:
        assert "0 of at least 1 clients gave a usable answer" in str(error)  # noqa: PT017
        assert "expected at most 1e+09" in (tmp_path / "run" / "rounds.jsonl").read_text()
    else:
        assert len(statuses(RunDirectory(tmp_path / "run"))) == 3
    assert all(bool(tensor.isfinite().all()) for tensor in final_state(RunDirectory(tmp_path / "run")).values())


def test_a_lying_example_count_weighs_no_more_than_the_bound(tmp_path: Path) -> None:
    twice: dict[str, Any] = {"max_examples_ratio": 2.0}
    honest = run_nodes(tmp_path, NodeGrid(nodes(40)), run_name="honest", **twice)  # twice the median of 10, 20 and 40
    lied = run_nodes(tmp_path, NodeGrid(nodes(10**9)), run_name="lied", **twice)
    free = run_nodes(tmp_path, NodeGrid(nodes(10**9)), run_name="free", max_examples_ratio=0.0)
    assert torch.equal(final_state(honest)["model"], final_state(lied)["model"])
    assert not torch.equal(final_state(free)["model"], final_state(lied)["model"])


def test_the_bound_on_counts_is_a_multiple_of_the_median() -> None:
    counts = {"ada": 10, "ben": 20, "cyd": 10**6}
    liar = client_of("cyd", LAYOUT, 10**6)
    assert with_bounded_weight(Limits(max_examples_ratio=3.0), liar, counts).examples == 60
    assert with_bounded_weight(Limits(max_examples_ratio=0.01), liar, counts).examples == 1
    assert with_bounded_weight(Limits(), liar, counts).examples == 30
    assert with_bounded_weight(Limits(max_examples_ratio=0.0), liar, counts) is liar
    with pytest.raises(OptionError, match="max-update-norm = nan"):
        Limits(max_update_norm=float("nan"))
    with pytest.raises(OptionError, match="expected one of clip, reject"):
        Limits(update_norm_action="ignore")


# -------------------------------------------------------------------------------------------------- a client's policy


def settings_of(node: dict[str, Any], run: dict[str, Any]) -> Any:
    place = {"partition-id": 0, "num-partitions": 2}
    return read_settings(Context(1, 7, place | node, RecordDict(), run))


def test_node_config_decides_the_policy_and_run_config_only_where_it_is_silent() -> None:
    node = {"client.allow-steps": "train, evaluate", "client.max-upload-mb": 2}
    run = {"client.allow-steps": "train,evaluate,send", "client.max-upload-mb": 500.0}
    assert settings_of(node, run).policy == Policy("train, evaluate", 2.0)
    assert settings_of({}, run).policy == Policy("train,evaluate,send", 500.0)
    assert settings_of({}, {}).policy == Policy()
    with pytest.raises(SettingsError, match=r"client\.allow-steps = 'exec', expected one of initialise, train"):
        settings_of({"client.allow-steps": "train,exec"}, {})
    with pytest.raises(SettingsError, match=r"client\.max-upload-mb"):
        settings_of({"client.max-upload-mb": float("nan")}, {})


class NoTouch:
    """Stands for model, data and slots: a plan that is refused reaches none of them."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"touched: {name}")


def test_a_step_that_the_owner_does_not_allow_is_refused_before_anything_is_done() -> None:
    plan = plan_pb2.Plan(version=1, client_id="ada", round=1, steps=[
        plan_pb2.Step(evaluate={"label": "x", "split": "test"}), plan_pb2.Step(send={"slot": "local"}),
    ])  # fmt: skip
    nothing: Any = NoTouch()
    interpreter = Interpreter("ada", nothing, nothing, nothing, policy=Policy("train,evaluate"))
    with pytest.raises(PolicyError, match=r"refuses step 1 \(send\); its client.allow-steps has train, evaluate"):
        interpreter.run(plan, {})


@pytest.mark.parametrize(
    ("last", "said"),
    [
        (plan_pb2.Step(), r"'ada' does not know step 1 of the plan; it knows initialise, train, .* older than the ser"),
        (plan_pb2.Step(send={"slot": "local", "encoding": 4}), r"'ada', step 1 \(send\): .*unknown encoding number 4"),  # type: ignore[arg-type]
        (plan_pb2.Step(gram={"slot": "local"}), r"'ada', step 1 \(gram\): .*unknown encoding number 0"),  # type: ignore[arg-type]
    ],
    ids=["step", "send", "gram"],
)
def test_what_a_client_does_not_know_is_refused_before_it_trains(last: plan_pb2.Step, said: str) -> None:
    first = plan_pb2.Step(train={"split": "train"})
    plan = plan_pb2.Plan(version=1, client_id="ada", round=1, steps=[first, last])
    nothing: Any = NoTouch()
    with pytest.raises(PlanError, match=said):
        Interpreter("ada", nothing, nothing, nothing).run(plan, {})


def test_too_large_an_upload_stays_at_the_client_and_changes_nothing(tmp_path: Path) -> None:
    model: Any = SimpleNamespace(layout=LAYOUT, own_layout=None, initial=lambda seed: Adapter.initial(LAYOUT, seed))
    data: Any = SimpleNamespace(splits={"train": []}, each_task={})
    plan = plan_pb2.Plan(version=1, client_id="ada", round=1, steps=[
        plan_pb2.Step(initialise={"slot": "local", "seed": 1}), plan_pb2.Step(send={"slot": "local", "encoding": 1}),
    ])  # fmt: skip

    def carry_out(policy: Policy) -> dict[str, bytes]:
        store = SlotStore(tmp_path, "toy", lambda: {"head.weight": torch.zeros(3, 5), "head.bias": torch.zeros(3)})
        with store.transaction(1) as slots:
            return Interpreter("ada", model, data, slots, policy=policy).run(plan, {})[1]

    size = len(carry_out(Policy())["local"]) / 10**6
    with pytest.raises(PolicyError, match=r"does not send 0\.\d+ MB \(local\); its client\.max-upload-mb is 0\.0"):
        carry_out(Policy(max_upload_mb=0.9 * size))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(PolicyError):
        carry_out(Policy(max_upload_mb=1e-6))
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert len(carry_out(Policy(max_upload_mb=1.1 * size))) == 1
