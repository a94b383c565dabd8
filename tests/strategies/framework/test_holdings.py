"""Differences from what a client holds: errors do not add up, and no client gets a difference from what it lacks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.bank.store import Storage
from fedalloy_adapters.wire.codec import CodecError, Encoding, decode, encode, encoding_from_proto
from fedalloy_adapters.wire.flower_records import unpack
from proto.fedalloy.v1 import plan_pb2
from strategies.framework import steps
from strategies.framework.dispatch import Dispatch, plan_dispatch
from strategies.framework.exchange import State
from strategies.framework.holdings import Holding, Holdings, without_holdings
from strategies.framework.steps import Training
from tests.fedalloy_adapters.samples import INTEGERS, distance
from tests.strategies.conftest import layout_of, random_adapter

LAYOUT = layout_of(rank=8)
LOSSY = [encoding for encoding in Encoding if encoding.is_lossy]


def dispatch_of(adapter: Adapter, encoding: str, holding: Holding | None, round_: int = 1) -> Dispatch:
    return plan_dispatch(
        [steps.send(Training(), "global")],
        {"global": adapter},
        client_id="berlin",
        layout=LAYOUT,
        round_=round_,
        seed=1,
        run_name="run",
        encoding=encoding,
        holding=holding,
    )


def parts_of(dispatch: Dispatch) -> tuple[plan_pb2.Plan, bytes]:
    plan, blobs = unpack(dispatch.message(1).content, "plan", plan_pb2.Plan)
    return plan, blobs["global"]


def walk(rounds: int, step: float = 0.05) -> list[Adapter]:
    """Adapters that move a little in every round, always in nearly the same direction."""
    found, drift = [random_adapter(LAYOUT, 0)], random_adapter(LAYOUT, 99)
    for round_ in range(1, rounds):
        moved = step * drift.vector + 0.3 * step * random_adapter(LAYOUT, round_).vector
        found.append(Adapter(LAYOUT, found[-1].vector + moved))
    return found


@pytest.mark.parametrize("encoding", INTEGERS)
def test_what_was_decoded_adds_up_to_what_was_meant_and_without_feedback_it_does_not(encoding: Encoding) -> None:
    """Without it, each round's change is encoded and its rounding is lost; with it, the client follows."""
    meant = walk(30)
    holdings, client, errors = Holdings(), meant[0], []
    open_loop = meant[0].vector
    for round_, adapter in enumerate(meant, start=1):
        dispatch = dispatch_of(adapter, encoding, holdings.of("berlin"), round_)
        client = decode(parts_of(dispatch)[1], layouts={LAYOUT.digest: LAYOUT}, references={client.digest: client})
        assert client.digest == dispatch.received["global"].digest
        assert dispatch.residuals["global"] == pytest.approx(distance(client, adapter), rel=1e-5)
        holdings.answered("berlin")
        errors.append(distance(client, adapter))
        if round_ > 1:
            change = Adapter(LAYOUT, adapter.vector - meant[round_ - 2].vector)
            open_loop = open_loop + encode(change, encoding).decoded.vector
    lost = float((open_loop - meant[-1].vector).norm())
    steady = errors[5:]
    assert max(steady) < 2 * min(steady), "the error grows"
    assert lost > 3 * errors[-1]
    assert errors[-1] < 0.5 * distance(encode(meant[-1], encoding.whole).decoded, meant[-1])


def test_the_first_blob_is_whole_and_the_next_a_difference_from_what_was_answered() -> None:
    holdings, (first, second, third) = Holdings(), walk(3)
    one = dispatch_of(first, "int4", holdings.of("berlin"))
    plan, blob = parts_of(one)
    assert plan.keep_received
    held = decode(blob, layouts={LAYOUT.digest: LAYOUT})
    unanswered = parts_of(dispatch_of(second, "int4", holdings.of("berlin"), 2))[1]
    decode(unanswered, layouts={LAYOUT.digest: LAYOUT})  # whole again
    dispatch_of(first, "int4", holdings.of("berlin"))
    holdings.answered("berlin")
    difference = parts_of(dispatch_of(second, "int4", holdings.of("berlin"), 2))[1]
    with pytest.raises(CodecError, match="UNKNOWN_REFERENCE"):
        decode(difference, layouts={LAYOUT.digest: LAYOUT})
    found = decode(difference, layouts={LAYOUT.digest: LAYOUT}, references={held.digest: held})
    assert distance(found, second) < 0.2 * distance(held, second) + distance(held, first)
    assert distance(found, second) < distance(held, first)
    other = parts_of(dispatch_of(second, "int4", holdings.of("rome"), 2))[1]
    decode(other, layouts={LAYOUT.digest: LAYOUT})  # another client holds nothing
    assert holdings.forget("berlin")
    assert not holdings.forget("berlin")
    decode(parts_of(dispatch_of(third, "int4", holdings.of("berlin"), 3))[1], layouts={LAYOUT.digest: LAYOUT})


def test_nothing_of_a_forgotten_residual_comes_back() -> None:
    """A client that lost its reference is sent the same bits as a new client, except for the nonce."""
    holdings, fresh, (first, second) = Holdings(), Holdings(), walk(2)
    dispatch_of(first, "int4", holdings.of("berlin"))
    holdings.answered("berlin")
    holdings.forget("berlin")
    again = dispatch_of(second, "int4", holdings.of("berlin"), 2).received["global"]
    assert again.digest == dispatch_of(second, "int4", fresh.of("berlin"), 2).received["global"].digest


@pytest.mark.parametrize("encoding", LOSSY)
def test_holdings_continue_to_the_bit(encoding: Encoding, tmp_path: Path) -> None:
    storage = Storage()
    storage.spill_to(tmp_path, 0)
    adapters = walk(4)
    holdings, other = Holdings(), Holdings(storage)
    for round_, adapter in enumerate(adapters[:3], start=1):
        for client in ("berlin", "rome"):
            dispatch_of(adapter, encoding, holdings.of(client), round_)
            holdings.answered(client)
        holdings.tidy()
    state = State({"model": torch.ones(2)}, {"round": 3})
    holdings.add_to(state)
    assert len(state.tensors) == 2, "two clients that hold the same are one row"
    other.take_from(state)
    own = without_holdings(state)
    assert set(own.tensors) == {"model"}
    assert own.values == {"round": 3}
    expected = dispatch_of(adapters[3], encoding, holdings.of("rome"), 4).received["global"]
    assert dispatch_of(adapters[3], encoding, other.of("rome"), 4).received["global"].digest == expected.digest
    assert list(tmp_path.iterdir())


def test_a_state_from_before_there_were_holdings_holds_nothing() -> None:
    state = State({"model": torch.ones(2)}, {})
    Holdings().add_to(state)
    assert state.values == {}
    holdings = Holdings()
    holdings.take_from(state)
    assert not holdings.forget("berlin")


def test_fp32_keeps_nothing_and_what_is_far_from_the_held_one_travels_whole() -> None:
    holdings, (first, _) = Holdings(), walk(2)
    assert not parts_of(dispatch_of(first, "fp32", holdings.of("berlin")))[0].keep_received
    holdings.answered("berlin")
    assert not holdings.forget("berlin")
    dispatch_of(first, "int8", holdings.of("berlin"))
    holdings.answered("berlin")
    opposite = Adapter(LAYOUT, -first.vector)
    decode(parts_of(dispatch_of(opposite, "int8", holdings.of("berlin"), 2))[1], layouts={LAYOUT.digest: LAYOUT})


def test_what_is_no_difference_has_no_fewer_than_four_bits() -> None:
    first, second = walk(2)
    holdings = Holdings()
    sizes = []
    for round_, adapter in enumerate((first, second), start=1):
        sizes.append(dispatch_of(adapter, "int2", holdings.of("berlin"), round_).tensor_bytes["global"])
        holdings.answered("berlin")
    assert sizes[0] == dispatch_of(first, "int4", None).tensor_bytes["global"]
    assert sizes[1] < 0.6 * sizes[0]
    training = Training(uplink_encoding="int2")
    assert (
        steps.send(training, "local", relative_to_received=False).send.encoding
        != steps.send(training, "local").send.encoding
    )


@pytest.mark.parametrize("encoding", Encoding)
def test_no_sum_of_squares_becomes_zero(encoding: Encoding) -> None:
    """The denominators of merges span orders of magnitude: with one scale for many, small ones would become zero."""
    training = Training(uplink_encoding=encoding)
    sums = steps.send(training, "local", relative_to_received=False, sums_of_squares=True).send.encoding
    assert steps.gram(training, "moments", steps.mixture("local")).gram.encoding == sums
    wide = encoding_from_proto(sums)
    assert wide is (Encoding.BF16 if encoding.is_lossy else encoding)
    sizes = Adapter(LAYOUT, 10.0 ** torch.linspace(-12, 3, LAYOUT.size))
    assert bool((encode(sizes, wide).decoded.vector > 0).all())


@pytest.mark.parametrize("encoding", INTEGERS)
def test_whole_adapters_that_come_back_are_no_integers(encoding: Encoding) -> None:
    """Rounded to one grid in each round, steps of less than half of its width would be lost for good."""
    training, holdings = Training(uplink_encoding=encoding), Holdings()
    found = steps.send(training, "local", relative_to_received=False, comes_back=True).send
    assert encoding_from_proto(found.encoding) is Encoding.FP16
    assert encoding_from_proto(steps.send(training, "local", comes_back=True).send.encoding) is encoding
    used = []
    for adapter in (random_adapter(LAYOUT, 1), random_adapter(LAYOUT, 2)):  # too far apart for a difference
        used += dispatch_of(adapter, encoding, holdings.of("berlin")).sent_as.values()
        holdings.answered("berlin")
    assert used == [encoding.whole, Encoding.FP16]


def test_a_strategy_cannot_take_the_name_under_which_holdings_are_kept() -> None:
    holdings = Holdings()
    dispatch_of(random_adapter(LAYOUT, 1), "int8", holdings.of("berlin"))
    holdings.answered("berlin")
    with pytest.raises(ValueError, match="'holdings' already"):
        holdings.add_to(State({}, {"holdings": {}}))
