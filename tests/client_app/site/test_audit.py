"""A client's record, verified and added up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from client_app.guard.record import Record
from client_app.site.audit import AuditError, audit


def record_of(folder: Path) -> Record:
    record = Record(folder, "ada")
    for round_ in (1, 2, 3):
        slots = {"global": {"bytes": 100 + round_, "numbers": 80}}
        record.append("left", run="a", round=round_, steps=["train", "send"], report={"bytes": 10}, slots=slots)
    record.append("refused", run="b", error="no")
    return record


def test_a_whole_record_is_added_up_by_run(tmp_path: Path) -> None:
    record = record_of(tmp_path)
    found = audit(record.path, expected=record.newest)
    assert (found.problems, found.torn, found.lines, found.newest) == ([], [], 4, record.newest)
    run = found.runs["a"]
    assert (run.plans, run.uploads, run.numbers, run.reports, run.steps) == (3, 306, 240, 30, {"train": 3, "send": 3})
    assert found.runs["b"].refused == 1
    with pytest.raises(AuditError, match="No such file"):
        audit(tmp_path / "none.jsonl")


@pytest.mark.parametrize("line", [0, 1, 2])
@pytest.mark.parametrize("how", ["changed", "taken out", "doubled"])
def test_a_changed_record_is_found(line: int, how: str, tmp_path: Path) -> None:
    record = record_of(tmp_path)
    lines = record.path.read_bytes().splitlines(keepends=True)
    said = json.loads(lines[line])
    said["slots"]["global"]["bytes"] = 1
    new = {"changed": [json.dumps(said).encode() + b"\n"], "taken out": [], "doubled": [lines[line]] * 2}[how]
    record.path.write_bytes(b"".join(lines[:line] + new + lines[line + 1 :]))
    assert any("does not follow" in problem for problem in audit(record.path).problems)


def test_a_record_that_was_cut_is_found_by_a_hash_that_was_noted(tmp_path: Path) -> None:
    record = record_of(tmp_path)
    lines = record.path.read_bytes().splitlines(keepends=True)
    record.path.write_bytes(b"".join(lines[:-1]))
    assert not audit(record.path).problems
    assert "the record was cut" in audit(record.path, record.newest).problems[0]


def test_a_torn_line_is_named_and_vouched_for_by_the_next(tmp_path: Path) -> None:
    record = record_of(tmp_path)
    with record.path.open("ab") as file:
        file.write(b'{"event": "le')
    record.append("refused", run="b", error="again")
    found = audit(record.path)
    assert (found.problems, found.torn) == ([], [5])
    record.path.write_bytes(record.path.read_bytes().replace(b'{"event": "le\n', b'{"event": "la\n'))
    assert "line 6: the torn line before it" in audit(record.path).problems[0]
