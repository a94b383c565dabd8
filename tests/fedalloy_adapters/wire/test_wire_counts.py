"""What is counted before it is parsed, and the bombs that are not parsed."""

from __future__ import annotations

import pytest
from flwr.app import ConfigRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from fedalloy_adapters.wire.flower_records import CONFIG_RECORD, RecordError, unpack
from fedalloy_adapters.wire.wire_counts import TooManyError, require_few
from proto.fedalloy.v1 import plan_pb2, report_pb2


def report_with(losses: int) -> report_pb2.Report:
    report = report_pb2.Report(version=1, run_name="run")
    report.results.add().fisher.SetInParent()
    train = report.results.add().train
    for number in range(losses):
        train.task_losses[f"t{number}"].mean = 1.0
    return report


@pytest.mark.parametrize("losses", [0, 1, 7])
def test_everything_is_counted_wherever_it_is(losses: int) -> None:
    """A map's entry counts with its key, its value, and the number in that."""
    data = report_with(losses).SerializeToString()
    assert require_few(data, report_pb2.Report.DESCRIPTOR, 100) == (6 + 4 * losses if losses else 5)


def test_packed_numbers_count_one_by_one() -> None:
    result = report_pb2.DistanceResult(squared=[1.0] * 50)
    assert require_few(result.SerializeToString(), result.DESCRIPTOR, 100) == 51
    with pytest.raises(TooManyError, match="has more than 50 values"):
        require_few(result.SerializeToString(), result.DESCRIPTOR, 50)


NOTES = report_pb2.Registration(tasks=[report_pb2.Task(notes=[""] * 60_000)])
BOMBS = {
    "task losses": ("report", report_pb2.Report, report_with(20_000).SerializeToString()),
    "results": ("report", report_pb2.Report, b"\x2a\x00" * 60_000),
    "notes": ("registration", report_pb2.Registration, NOTES.SerializeToString()),
    "counters": ("counters", report_pb2.Counters, b"\x1a\x02\x0a\x00" * 10_000),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_is_refused_before_it_is_parsed(bomb: str) -> None:
    key, kind, data = BOMBS[bomb]
    records = RecordDict({CONFIG_RECORD: ConfigRecord({key: data})})
    with pytest.raises(RecordError, match=r"has more than \d+ values"):
        unpack(records, key, kind)


@given(st.binary(max_size=300))
def test_any_bytes_are_counted_or_refused_and_nothing_else(data: bytes) -> None:
    for kind in (plan_pb2.Plan, report_pb2.Registration):
        assert 0 <= require_few(data, kind.DESCRIPTOR, 1000) <= 1000
