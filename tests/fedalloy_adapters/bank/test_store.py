"""The bank: rows in memory or in files, freed with their last holder, linked and not copied."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.bank.blocks import MemoryRow
from fedalloy_adapters.bank.store import Bank, BankError, FileRow, Storage, digest_of, link, tensor_of
from fedalloy_adapters.layout import Factor, LayoutError
from tests.fedalloy_adapters.samples import layout_of

LAYOUT = layout_of()


def adapter(seed: int) -> Adapter:
    return Adapter(LAYOUT, torch.randn(LAYOUT.size, generator=torch.Generator().manual_seed(seed)))


def on_disk(folder: Path, memory_bytes: int = 0) -> Storage:
    storage = Storage()
    storage.spill_to(folder, memory_bytes)
    return storage


def files(folder: Path) -> list[str]:
    gc.collect()
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("disk", [False, True])
def test_what_is_put_in_comes_out(tmp_path: Path, disk: bool) -> None:
    bank = Bank(on_disk(tmp_path / "bank") if disk else None)
    for seed, name in enumerate("cab"):
        bank[name] = adapter(seed)
    assert list(bank) == ["a", "b", "c"], "in the order of names, not of arrival"
    assert torch.equal(bank["a"].vector, adapter(1).vector)
    assert bank.layout_of("a") is LAYOUT
    assert isinstance(bank.rows()[0], FileRow if disk else MemoryRow)
    assert len(files(tmp_path / "bank")) == 3 if disk else not (tmp_path / "bank").exists()


def test_rows_beyond_the_memory_go_to_files(tmp_path: Path) -> None:
    bank = Bank(on_disk(tmp_path / "bank", memory_bytes=2 * 4 * LAYOUT.size))
    for seed in range(4):
        bank[str(seed)] = adapter(seed)
    assert [row.in_memory for row in bank.rows()] == [True, True, False, False]
    del bank["0"]
    gc.collect()
    bank["4"] = adapter(4)
    assert bank.rows(["4"])[0].in_memory, "memory that was freed is used again"


def test_a_row_lives_as_long_as_somebody_holds_it(tmp_path: Path) -> None:
    bank = Bank(on_disk(tmp_path / "bank"))
    bank["ada"] = adapter(0)
    (held,) = bank.rows(["ada"])
    bank["ada"] = adapter(1)  # a merge that waits to be sent still has the first upload
    assert len(files(tmp_path / "bank")) == 2
    assert torch.equal(tensor_of(held), adapter(0).vector)
    assert torch.equal(bank["ada"].vector, adapter(1).vector)
    del held
    assert len(files(tmp_path / "bank")) == 1
    bank.clear()
    assert files(tmp_path / "bank") == []


def test_what_is_taken_is_gone_from_the_bank() -> None:
    bank = Bank()
    bank["ada"] = adapter(0)
    taken = bank.taken()
    assert list(taken) == ["ada"]
    assert not bank


def test_a_checkpoint_links_files_and_a_new_process_takes_them_over(tmp_path: Path) -> None:
    storage = on_disk(tmp_path / "bank")
    row = storage.keep(adapter(0).vector)
    assert isinstance(row, FileRow)
    kept = tmp_path / "kept.safetensors"
    link(row, kept)
    assert kept.stat().st_ino == row.path.stat().st_ino, "no second copy of the numbers"
    del row
    assert files(tmp_path / "bank") == []
    other = Bank(on_disk(tmp_path / "bank"))
    other.put_row("ada", LAYOUT, FileRow(kept))
    kept.unlink()  # the checkpoint is removed some rounds later
    assert torch.equal(other["ada"].vector, adapter(0).vector)


def test_rows_of_a_checkpoint_come_into_a_bank_without_a_folder(tmp_path: Path) -> None:
    storage = on_disk(tmp_path / "bank")
    row = storage.keep(adapter(0).vector)
    bank = Bank()
    bank.put_row("ada", LAYOUT, row)
    assert torch.equal(bank["ada"].vector, adapter(0).vector)


def test_where_there_are_no_links_the_file_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr("os.link", refuse)
    row = on_disk(tmp_path / "bank").keep(adapter(0).vector)
    assert isinstance(row, FileRow)
    link(row, tmp_path / "kept")
    assert torch.equal(tensor_of(FileRow(tmp_path / "kept")), adapter(0).vector)


def test_what_an_earlier_process_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / "bank").mkdir()
    (tmp_path / "bank" / "00000000.safetensors").write_bytes(b"torn")
    on_disk(tmp_path / "bank")
    assert files(tmp_path / "bank") == []


@pytest.mark.parametrize("disk", [False, True])
def test_the_digest_is_that_of_the_numbers(tmp_path: Path, disk: bool) -> None:
    storage = on_disk(tmp_path / "bank") if disk else Storage()
    first, same, other = (storage.keep(adapter(seed).vector) for seed in (0, 0, 1))
    assert digest_of(first) == digest_of(same) == digest_of(MemoryRow(adapter(0).vector)) != digest_of(other)


def test_sums_need_one_layout() -> None:
    bank = Bank()
    bank["ada"], bank["ben"] = adapter(0), Adapter.zeros(layout_of(ranks=5))
    with pytest.raises(LayoutError, match="rank 5"):
        bank.combine(["ada", "ben"], torch.ones(1, 2))


@pytest.mark.parametrize("disk", [False, True])
def test_a_sum_is_that_of_the_adapters(tmp_path: Path, disk: bool) -> None:
    bank = Bank(on_disk(tmp_path / "bank") if disk else None)
    for seed, name in enumerate("ba"):
        bank[name] = adapter(seed)
    (found,) = bank.combine(["a", "b"], torch.tensor([[2.0, -1.0]]))
    torch.testing.assert_close(found.vector, 2 * adapter(1).vector - adapter(0).vector)


def test_a_mean_is_weighted_by_counts() -> None:
    bank = Bank.of({"ada": adapter(0), "ben": adapter(1)})
    expected = 0.75 * adapter(0).vector + 0.25 * adapter(1).vector
    torch.testing.assert_close(bank.mean({"ben": 10, "ada": 30}).vector, expected)


@pytest.mark.parametrize("disk", [False, True])
def test_parts_are_read_from_whole_rows(tmp_path: Path, disk: bool) -> None:
    bank = Bank(on_disk(tmp_path / "bank") if disk else None)
    part = LAYOUT.select([Factor.B, Factor.BIAS])
    bank["ada"], bank["ben"] = adapter(0), adapter(1).part(LAYOUT.select([Factor.A]))
    found = bank.parts(part)
    assert list(found) == ["ada"], "the other has no B"
    assert torch.equal(found["ada"].vector, adapter(0).part(part).vector)
    assert torch.equal(found.mean({"ada": 3}).vector, adapter(0).part(part).vector)


def test_a_row_of_another_size_is_refused() -> None:
    with pytest.raises(BankError, match=f"a row of 3 numbers for 'ada', expected {LAYOUT.size}"):
        Bank().put_row("ada", LAYOUT, MemoryRow(torch.ones(3)))


def test_a_file_that_became_shorter_is_an_error_and_no_signal(tmp_path: Path) -> None:
    row = on_disk(tmp_path / "bank").keep(torch.ones(5000))
    assert isinstance(row, FileRow)
    with row.path.open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(BankError, match="has become shorter"):
        tensor_of(row)
    with pytest.raises(BankError, match=r"cannot read .*No such file"):
        FileRow(tmp_path / "nothing")
    (tmp_path / "torn").write_bytes(b"\x05")
    with pytest.raises(BankError, match="is torn"):
        FileRow(tmp_path / "torn")


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No storage left on device")

    monkeypatch.setattr("fedalloy_adapters.bank.store.save_file", full)
    storage = on_disk(tmp_path / "bank")
    with pytest.raises(BankError, match=r"cannot write .*bank-memory-mb.*No storage left"):
        storage.keep(torch.ones(5))
    assert files(tmp_path / "bank") == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BankError, match="cannot make the folder"):
        on_disk(tmp_path / "file" / "bank")
