"""Checkpoints link the bank's files, and a torn one is passed over."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.bank.store import Bank, FileRow, Storage, tensor_of
from server_app.run.run_directory import RunDirectory
from strategies.framework.exchange import State
from tests.strategies.conftest import layout_of, random_adapter

LAYOUT = layout_of()


def bank_in(folder: Path) -> Bank:
    storage = Storage()
    storage.spill_to(folder, 0)
    return Bank(storage)


def saved(directory: RunDirectory, round_: int, bank: Bank) -> None:
    state = State({"theta": torch.ones(3)}, {"clients": list(bank)})
    state.keep("upload", bank)
    directory.save_checkpoint(round_, state, 2)


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    return RunDirectory.create(tmp_path, "run", "")


def test_a_checkpoint_links_rows_and_outlives_the_bank(directory: RunDirectory) -> None:
    bank = bank_in(directory.path / "bank")
    bank["ada"], bank["ben"] = random_adapter(LAYOUT, 0), random_adapter(LAYOUT, 1)
    saved(directory, 1, bank)
    (row,) = bank.rows(["ada"])
    assert isinstance(row, FileRow)
    assert row.path.stat().st_nlink == 2, "the same file, not a copy"
    del row
    bank.clear()
    found = directory.newest_checkpoint()
    assert found is not None
    again = bank_in(directory.path / "bank")  # what a resumed run does
    for name in found.state.values["clients"]:
        again.put_row(name, LAYOUT, found.state.row(f"upload/{name}"))
    for round_ in (2, 3, 4):  # the first one is removed
        saved(directory, round_, again)
    assert torch.equal(again["ben"].vector, random_adapter(LAYOUT, 1).vector)


def test_rows_in_memory_are_tensors_of_the_checkpoint(directory: RunDirectory) -> None:
    bank = Bank.of({"ada": random_adapter(LAYOUT, 0)})
    saved(directory, 1, bank)
    found = directory.newest_checkpoint()
    assert found is not None
    assert torch.equal(tensor_of(found.state.row("upload/ada")), random_adapter(LAYOUT, 0).vector)


@pytest.mark.parametrize("damage", ["other numbers", "shorter", "gone"])
def test_a_checkpoint_with_a_torn_row_is_passed_over(directory: RunDirectory, damage: str) -> None:
    bank = bank_in(directory.path / "bank")
    bank["ada"] = random_adapter(LAYOUT, 0)
    saved(directory, 1, bank)
    bank["ada"] = Adapter(LAYOUT, random_adapter(LAYOUT, 1).vector)
    saved(directory, 2, bank)
    (file,) = (directory.path / "checkpoints" / "round-0002" / "rows").iterdir()
    if damage == "gone":
        file.unlink()
    elif damage == "shorter":
        file.write_bytes(file.read_bytes()[:-4])
    else:
        file.write_bytes(file.read_bytes()[:-4] + b"\x01\x02\x03\x04")
    found = directory.newest_checkpoint()
    assert found is not None
    assert found.round == 1
