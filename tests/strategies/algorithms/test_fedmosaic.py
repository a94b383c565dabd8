"""FedMosaic's server: groups 5 to 8, 11 and 14 of the specification's invariants; clients only send numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from flwr.app import Message
from torch import Tensor

from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.co_lora_names import SHARED, shared_layout, to_shared, with_shared
from fedalloy_adapters.factors import factor_from_proto
from fedalloy_adapters.layout import Entry, Factor, Layout
from fedalloy_adapters.parts import layout_of_part, layout_of_sketch
from fedalloy_adapters.wire.codec import Encoding, encode, encoding_from_proto
from fedalloy_adapters.wire.flower_records import pack
from proto.fedalloy.v1 import plan_pb2, report_pb2
from strategies.algorithms.fedmosaic import GATES, GLOBAL, LOCAL, SKETCH, FedMosaic, FedMosaicOptions, mosaic
from strategies.framework.answers import answer_from, client_from
from strategies.framework.exchange import MAX_NUMBER, Answer, BadAnswerError, Client, StrategyError
from strategies.framework.options import OptionError
from strategies.framework.steps import Training
from tests.strategies.conftest import REFERENCE, FakeNode, dispatch_of, layout_of, noise


def mixed_layout(base: str, d_in: int, d_out: int, rank: int = 3, prefix: str = "layers") -> Layout:
    """Two layers of two modules each; the second is a block end."""
    entries: list[Entry] = []
    names = {}
    for layer in (0, 1):
        for role in ("q", "v"):
            module = f"{prefix}.{layer}.{role}_proj"
            entries += [Entry(module, Factor.A, (rank, d_in)), Entry(module, Factor.B, (d_out, rank))]
            if layer == 1:
                entries += [Entry(module, Factor.P, (rank, rank)), Entry(module, Factor.Q, (rank,))]
                names[module] = f"blocks.0.{role}"
    entries.append(Entry("head", Factor.WEIGHT, (3, d_out)))
    modules = {entry.module for entry in entries if entry.factor.is_lora}
    return Layout(tuple(entries), dict.fromkeys(sorted(modules), 2.0), base, names)


SMALL = mixed_layout("small", 5, 4)
LARGE = mixed_layout("large", 8, 7, prefix="encoder.layer")
PLAIN = layout_of()


def client_of(name: str, layout: Layout) -> Client:
    return Client(name, 1, layout, 10, layout.base_fingerprint, reference=REFERENCE)


def strategy_of(layouts: Mapping[str, Layout], **options: Any) -> FedMosaic:
    strategy = FedMosaic(FedMosaicOptions(**options), Training(local_steps=30), seed=3)
    for name, layout in layouts.items():
        strategy.enrol(client_of(name, layout))
    return strategy


def upload_of(strategy: FedMosaic, name: str, round_: int = 1) -> Adapter:
    (send,) = [step.send for step in strategy.brief(1, strategy.clients[name]).steps if step.HasField("send")]
    return noise(name, round_, layout_of_part(strategy.clients[name].layout, send.part))


def sketch_of(strategy: FedMosaic, name: str, like: str | None = None) -> Adapter:
    (step,) = [step.sketch for step in strategy.brief(1, strategy.clients[name]).steps if step.HasField("sketch")]
    return noise(like or name, 0, layout_of_sketch(REFERENCE, step.row_count))


def answer(strategy: FedMosaic, name: str, round_: int = 1, like: str | None = None) -> Adapter:
    upload = upload_of(strategy, name, round_)
    found = {LOCAL: upload, SKETCH: sketch_of(strategy, name, like)}
    strategy.absorb(round_, strategy.clients[name], Answer(found, {}, {}, 10, report_pb2.Report()))
    return upload


def received(strategy: FedMosaic, name: str, round_: int = 2) -> Adapter:
    return strategy.brief(round_, strategy.clients[name]).adapters[GLOBAL]


def kinds(steps: Any) -> list[str]:
    return [step.WhichOneof("kind") for step in steps]


def test_two_clients_get_each_others_adapter() -> None:
    strategy = strategy_of({"ada": PLAIN, "ben": PLAIN})
    uploads = {name: answer(strategy, name) for name in ("ada", "ben")}
    strategy.settle(1)
    assert torch.equal(received(strategy, "ada").vector, uploads["ben"].vector)
    assert torch.equal(received(strategy, "ben").vector, uploads["ada"].vector)


def test_uniform_weights_with_self_are_the_unweighted_average() -> None:
    strategy = strategy_of(dict.fromkeys(("ada", "ben", "cyd"), PLAIN), include_self=True, temperature=1e9)
    uploads = [answer(strategy, name) for name in ("ada", "ben", "cyd")]
    strategy.settle(1)
    average = torch.stack([upload.vector for upload in uploads]).mean(dim=0)
    for name in ("ada", "ben", "cyd"):
        torch.testing.assert_close(received(strategy, name).vector, average)


def test_clients_that_upload_the_same_get_it_back() -> None:
    strategy = strategy_of(dict.fromkeys(("ada", "ben", "cyd"), SMALL))
    common = noise("common", 0, upload_of(strategy, "ada").layout)
    for name in ("ada", "ben", "cyd"):
        found = {LOCAL: common, SKETCH: sketch_of(strategy, name)}
        strategy.absorb(1, strategy.clients[name], Answer(found, {}, {}, 10, report_pb2.Report()))
    strategy.settle(1)
    torch.testing.assert_close(received(strategy, "ben").vector, common.vector)


def test_shared_tensors_cross_architectures_by_name_and_others_do_not() -> None:
    layouts = {"ada": SMALL, "ben": SMALL, "cyd": LARGE, "dan": LARGE}
    strategy = strategy_of(layouts, temperature=0.3)
    uploads = {name: answer(strategy, name) for name in layouts}
    weights = strategy.settle(1)["relevance"]
    got = received(strategy, "cyd")
    names = sorted(layouts)
    for role in ("q", "v"):
        for factor in (Factor.P, Factor.Q):
            expected = torch.zeros_like(got[f"encoder.layer.1.{role}_proj", factor])
            for weight, peer in zip(weights["cyd"], names, strict=True):
                prefix = "layers" if layouts[peer] is SMALL else "encoder.layer"
                expected += weight * uploads[peer][f"{prefix}.1.{role}_proj", factor]
            # the record's weights are rounded to four digits
            torch.testing.assert_close(got[f"encoder.layer.1.{role}_proj", factor], expected, atol=2e-3, rtol=0)
    for key in (("encoder.layer.0.q_proj", Factor.A), ("encoder.layer.0.v_proj", Factor.B), ("head", Factor.WEIGHT)):
        assert torch.equal(got[key], uploads["dan"][key])


def test_a_client_without_a_peer_of_its_architecture_keeps_its_own_in_other_layers() -> None:
    strategy = strategy_of({"ada": SMALL, "ben": SMALL, "cyd": LARGE})
    uploads = {name: answer(strategy, name) for name in ("ada", "ben", "cyd")}
    strategy.settle(1)
    got = received(strategy, "cyd")
    assert torch.equal(got["head", Factor.WEIGHT], uploads["cyd"]["head", Factor.WEIGHT])
    assert not torch.equal(got["encoder.layer.1.q_proj", Factor.P], uploads["cyd"]["encoder.layer.1.q_proj", Factor.P])
    assert got.is_finite


@pytest.mark.parametrize("share", [True, False])
def test_neither_gates_nor_the_basis_travel_and_shared_bytes_do_not_depend_on_the_model(share: bool) -> None:
    strategy = strategy_of({"ada": SMALL, "cyd": LARGE}, share_conventional_lora=share)
    sizes = {}
    for name, layout in (("ada", SMALL), ("cyd", LARGE)):
        upload = upload_of(strategy, name).layout
        assert not any(layout.is_basis(entry) or entry.factor is Factor.GATE for entry in upload.entries)
        shared = shared_layout(upload)
        assert shared is not None
        assert [entry.name for entry in shared.entries] == [
            f"blocks.0.{role}.{factor}" for role in ("q", "v") for factor in ("P", "Q")
        ]
        sizes[name] = dispatch_of(strategy, name).upload_bytes
    if not share:
        assert sizes["ada"] == sizes["cyd"] == {LOCAL: 2 * (3 * 3 + 3) * 4, SKETCH: 4 * 6 * 2}
    else:
        assert sizes["ada"][LOCAL] < sizes["cyd"][LOCAL]


def test_in_the_first_round_and_without_peers_the_global_adapter_is_a_copy_of_the_local_one() -> None:
    strategy = strategy_of({"ada": PLAIN, "ben": PLAIN})
    for _ in range(2):
        brief = strategy.brief(1, strategy.clients["ada"])
        assert brief.adapters == {}
        copies = [step.initialise for step in brief.steps if step.HasField("initialise") and step.initialise.copy_of]
        assert [(step.slot, step.copy_of, step.keep_existing) for step in copies] == [(GLOBAL, LOCAL, False)]
        answer(strategy, "ada")  # alone: nobody to learn from in round 2 either
        assert strategy.settle(1)["merged"] == 1


def test_a_client_that_misses_a_round_is_represented_by_its_last_upload() -> None:
    strategy = strategy_of({"ada": PLAIN, "ben": PLAIN})
    answer(strategy, "ada", 1)
    old = answer(strategy, "ben", 1)
    strategy.settle(1)
    answer(strategy, "ada", 2)
    strategy.settle(2)
    assert torch.equal(received(strategy, "ada", 3).vector, old.vector)
    late = client_of("cyd", PLAIN)
    strategy.enrol(late)
    assert strategy.brief(3, late).adapters == {}


def reply_of(strategy: FedMosaic, name: str, sketch: Tensor | bytes, round_: int = 1) -> Answer:
    """An honest answer, except for the numbers (float32) or the bytes of its sketch."""
    dispatch = dispatch_of(strategy, name, round_)
    message = dispatch.message(1, ttl=60)
    message.metadata.__dict__["_message_id"] = "message-1"
    report, blobs = FakeNode(name, strategy.clients[name].layout).run(dispatch.plan, {})
    if isinstance(sketch, bytes):
        blobs[SKETCH] = sketch
    elif sketch.isfinite().all():
        layout = layout_of_sketch(REFERENCE, len(sketch) // 6)
        blobs[SKETCH] = encode(Adapter(layout, sketch), Encoding.BF16, include_layout=False).blob
    else:  # our own encoder refuses these
        head, payload = blobs[SKETCH][: -2 * sketch.numel()], sketch.to(torch.bfloat16).view(torch.uint8)
        blobs[SKETCH] = head + bytes(payload.tolist())
    return answer_from(dispatch, Message(pack("report", report, blobs), reply_to=message))


@pytest.mark.parametrize(
    ("sketch", "finding"),
    [
        (torch.full((24,), math.nan), "NOT_FINITE"),
        (torch.full((24,), math.inf), "NOT_FINITE"),
        (torch.full((24,), 1e20), "numbers up to 9.97e\\+19, expected at most 1e\\+09"),
        (b"", "TRUNCATED"),
    ],
)
def test_a_hostile_sketch_is_refused_by_name_and_the_last_good_one_stands(sketch: Tensor | bytes, finding: str) -> None:
    strategy = strategy_of({"ada": PLAIN, "ben": PLAIN})
    for name in ("ada", "ben"):
        answer(strategy, name)
    strategy.settle(1)
    before = strategy.state()
    with pytest.raises(BadAnswerError, match=f"client 'ben' sent slot 'sketch'.*({finding})"):
        reply_of(strategy, "ben", sketch, 2)
    strategy.settle(2)
    assert all(torch.equal(tensor, before.tensors[name]) for name, tensor in strategy.state().tensors.items())


def test_a_sketch_with_too_few_numbers_is_refused() -> None:
    strategy = strategy_of({"ada": PLAIN})
    layout = layout_of_sketch(REFERENCE, 3)
    for include_layout in (True, False):
        blob = encode(Adapter.zeros(layout), Encoding.BF16, include_layout=include_layout).blob
        with pytest.raises(BadAnswerError, match="client 'ada' sent slot 'sketch'"):
            reply_of(strategy, "ada", blob)


@pytest.mark.parametrize("kind", ["cosine", "column-mean"])
@pytest.mark.parametrize("value", [0.0, 1e9, 1e-30])
def test_sketches_of_zeros_and_of_huge_numbers_leave_weights_that_sum_to_one(kind: str, value: float) -> None:
    names = ("ada", "ben", "cyd")
    strategy = strategy_of(dict.fromkeys(names, PLAIN), similarity=kind)
    for name in names:
        found = reply_of(strategy, name, torch.full((24,), value) if name == "ada" else torch.randn(24))
        strategy.absorb(1, strategy.clients[name], found)
    record = strategy.settle(1)
    for row in record["relevance"].values():
        assert sum(row) == pytest.approx(1, abs=1e-3)
    if value == 0:
        assert record["relevance"]["ada"] == [0, 0.5, 0.5]
    assert all(received(strategy, name).is_finite for name in names)
    json.dumps(record, allow_nan=False)


def test_a_client_that_never_answers_changes_nothing_for_the_others() -> None:
    names = ("ada", "ben", "cyd")
    strategy, without = strategy_of(dict.fromkeys(names, PLAIN)), strategy_of(dict.fromkeys(names[:2], PLAIN))
    for chosen in (strategy, without):
        for name in names[:2]:
            answer(chosen, name)
    assert strategy.settle(1) == without.settle(1)
    for name in names[:2]:
        assert torch.equal(received(strategy, name).vector, received(without, name).vector)
    assert strategy.brief(2, strategy.clients["cyd"]).adapters == {}
    assert kinds(strategy.deliver(strategy.clients["cyd"]).steps)[-2:] == ["save", "evaluate"]


@pytest.mark.parametrize(
    ("entries", "finding"),
    [
        ([], "reference model: "),
        ([Entry("down", Factor.GRADIENT, (4,))], "reference model: .*expected one matrix"),
        ([Entry("down", Factor.GRADIENT, (4, 2, 3))], "reference model: .*expected one matrix"),
        ([Entry(name, Factor.GRADIENT, (4, 2)) for name in "ab"], "reference model: .*expected one matrix"),
        ([Entry("down", Factor.GRADIENT, (2**20, 2**20))], "reference model: claims 1099511627776 numbers"),
        ([Entry("down", Factor.WEIGHT, (4, 2))], "reference model: .*expected one matrix"),
    ],
)
def test_a_hostile_reference_is_refused_when_the_client_registers(entries: list[Entry], finding: str) -> None:
    registration = FakeNode("ada", PLAIN).registration()
    del registration.reference.entries[:]
    registration.reference.entries.extend(Layout(tuple(entries), {}, "reference").to_proto().entries if entries else [])
    with pytest.raises(BadAnswerError, match=f"client 'ada': {finding}"):
        client_from(registration, PLAIN, 1)


def test_the_plan_trains_the_local_adapter_and_the_gates_beside_the_frozen_global_one() -> None:
    sketching = {"sketch_encoding": "int8", "sketch_new_weight": 0.25, "sketch_rows": 0.2}
    strategy = strategy_of({"ada": SMALL}, gate="input", gate_rate=7.0, shared_rate=1.5, **sketching)
    brief = strategy.brief(1, strategy.clients["ada"])
    assert kinds(brief.steps) == ["initialise", "initialise", "initialise", "evaluate", "train", "sketch", "send"]
    (train,) = [step.train for step in brief.steps if step.HasField("train")]
    assert list(train.slots) == [LOCAL, GATES]
    assert train.part.without_basis
    assert [(term.slot, term.gate.slot, term.gate.complement) for term in train.mixture.terms] == [
        (GLOBAL, GATES, False),
        (LOCAL, GATES, True),
    ]
    assert brief.steps[1].initialise.gate == plan_pb2.GATE_KIND_INPUT
    (sketch,) = [step.sketch for step in brief.steps if step.HasField("sketch")]
    assert (sketch.batches, sketch.row_count, sketch.new_weight) == (10, 2, 0.25)
    assert encoding_from_proto(sketch.encoding) is Encoding.INT8
    scales = {factor_from_proto(item.factor): item.scale for item in train.rate_scales}
    assert scales[Factor.P] == scales[Factor.Q] == 1.5
    assert kinds(strategy.deliver(strategy.clients["ada"]).steps) == ["initialise"] * 3 + ["save", "evaluate"]


def test_near_uniform_relevance_is_a_warning_in_the_record() -> None:
    names = ("ada", "ben", "cyd", "dan")
    strategy = strategy_of(dict.fromkeys(names, PLAIN))
    for name in names:
        answer(strategy, name, like="everybody")
    record = strategy.settle(1)
    assert record["entropy"] == 1
    assert "near uniform" in record["warning"]
    clear = strategy_of(dict.fromkeys(names, PLAIN), temperature=0.05)
    for name, like in zip(names, ("north", "north", "south", "south"), strict=True):
        answer(clear, name, like=like)
    record = clear.settle(1)
    assert "warning" not in record
    assert record["relevance"]["ada"][1] > 0.99


def test_mosaic_is_linear_in_p_so_merging_p_is_merging_updates() -> None:
    strategy = strategy_of({"ada": SMALL, "ben": SMALL})
    start = Adapter.initial(SMALL, 5)
    a, b = (start["layers.1.q_proj", factor].double() for factor in (Factor.A, Factor.B))
    torch.testing.assert_close(a @ a.T, torch.eye(3, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(b.T @ b, torch.eye(3, dtype=torch.float64), atol=1e-6, rtol=0)
    uploads = {name: upload_of(strategy, name) for name in ("ada", "ben")}
    merged = mosaic(uploads["ada"], uploads, {"ada": 0.3, "ben": 0.7}, {})
    deltas = {name: b @ uploads[name]["layers.1.q_proj", Factor.P].double().T @ a for name in uploads}
    found = b @ merged["layers.1.q_proj", Factor.P].double().T @ a
    torch.testing.assert_close(found, 0.3 * deltas["ada"] + 0.7 * deltas["ben"], atol=1e-6, rtol=0)
    p = uploads["ada"]["layers.1.q_proj", Factor.P].double()
    torch.testing.assert_close(deltas["ada"].norm(), p.norm(), atol=1e-6, rtol=0)
    units = torch.eye(9, dtype=torch.float64).view(9, 3, 3)
    assert int(torch.linalg.matrix_rank(torch.stack([(b @ unit.T @ a).flatten() for unit in units]))) == 9


def test_shared_tensors_go_there_and_back() -> None:
    adapter = noise("ada", 1, SMALL)
    shared = to_shared(adapter)
    assert shared.layout.base_fingerprint == SHARED
    other = with_shared(noise("cyd", 1, LARGE), shared)
    assert torch.equal(to_shared(other).vector, shared.vector)
    assert torch.equal(other["head", Factor.WEIGHT], noise("cyd", 1, LARGE)["head", Factor.WEIGHT])


def test_clients_that_do_not_fit_are_refused_by_name() -> None:
    strategy = strategy_of({"ada": SMALL})
    with pytest.raises(StrategyError, match="client 'ben' has"):
        strategy.enrol(client_of("ben", mixed_layout("other", 5, 4, rank=2)))
    with pytest.raises(StrategyError, match="client 'ben' has"):
        strategy.enrol(client_of("ben", PLAIN))
    with pytest.raises(StrategyError, match="client 'ben' has no reference model"):
        strategy.enrol(Client("ben", 1, SMALL, 10))
    other = Layout((Entry("down", Factor.GRADIENT, (10, 6)),), {}, "another")
    with pytest.raises(StrategyError, match="client 'ben' has as reference base model another, expected reference"):
        strategy.enrol(Client("ben", 1, SMALL, 10, reference=other))
    with pytest.raises(StrategyError, match="no P and Q to share"):
        strategy_of({"ada": PLAIN}, share_conventional_lora=False)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": 0.0},
        {"similarity": "dot"},
        {"gate": "vector"},
        {"sketch_rows": 0.0},
        {"sketch_new_weight": 1.5},
        {"sketch_noise": -1.0},
        {"sketch_batches": 0},
    ],
)
def test_options_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(wrong)).replace("_", "-")):
        FedMosaicOptions(**wrong)


@pytest.mark.parametrize("seed", range(5))
def test_what_is_merged_for_a_brief_is_within_what_an_upload_may_have(seed: int) -> None:
    """Merges are made when they are sent, after the round's state was checked; only rounding could exceed the bound."""
    names = ["ada", "ben", "cyd", "dan", "eve"]
    layout = layout_of()
    uploads = {name: Adapter(layout, torch.full((layout.size,), MAX_NUMBER)) for name in names}
    shares = torch.softmax(10 * torch.randn(5, generator=torch.Generator().manual_seed(seed)).double(), 0).tolist()
    for weights in (shares, [0.1, 0.0, 0.3, 0.2, 0.4]):
        merged = mosaic(uploads["ada"], uploads, {}, {"": dict(zip(names, weights, strict=True))})
        assert float(merged.vector.abs().max()) <= MAX_NUMBER
