from __future__ import annotations

import fcntl
import json
import os
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from client_app.model.personal import PersonalModel
from client_app.plan.slots import SlotError, SlotStore
from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.files.sealed_json import unsealed
from fedalloy_adapters.layout import Factor
from tests.client_app.plan.slot_toys import Abort, after, start_of
from tests.client_app.slot_worker import (
    HEADS,
    LAYOUT,
    PART,
    carry_out,
    numbers,
    store_in,
)
from tests.fedalloy_adapters.files.peft_reading import read_peft_directory
from tests.fedalloy_adapters.samples import bits, layout_of, random_adapter
from tests.fedalloy_adapters.tiny_vit import assert_same_logits, base_of, build, logits_of


def files_of(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


# -------------------------------------------------------------------------------------------------- reading and writing


def test_a_new_client_holds_nothing(tmp_path: Path) -> None:
    with store_in(tmp_path / "new" / "client").transaction(1) as slots:
        assert slots.names() == []
        assert "global" not in slots
        assert slots.residual("global") is None
        with pytest.raises(SlotError, match="no slot 'global'; this client holds: none"):
            slots["global"]


def test_slots_survive_to_the_bit(tmp_path: Path) -> None:
    adapter = numbers(LAYOUT, 0)
    adapter.vector[:4] = torch.tensor([-0.0, 1e-45, 3.4e38, -1e-30])
    wide = random_adapter(
        layout_of(ranks={"q_proj": 7, "v_proj": 1}, scalings={"q_proj": 0.1, "v_proj": 12.5 / 7}, head=None), 1
    )
    double = Adapter(LAYOUT, torch.randn(LAYOUT.size, dtype=torch.float64))
    with store_in(tmp_path).transaction(1) as slots:
        slots["global"], slots["wide"], slots["double"] = adapter, wide, double
        assert slots.names() == ["double", "global", "wide"]
        assert "wide" in slots
        assert slots["global"] is adapter
    with store_in(tmp_path).transaction(2) as slots:
        assert slots.names() == ["double", "global", "wide"]
        assert bits(slots["global"].vector) == bits(adapter.vector)
        assert slots["wide"].layout == wide.layout
        assert bits(slots["wide"].vector) == bits(wide.vector)
        assert torch.equal(slots["double"].vector, double.vector)
        with pytest.raises(SlotError, match="no slot 'local'; this client holds: double, global, wide"):
            slots["local"]


def test_what_a_plan_changes_is_seen_by_its_later_steps(tmp_path: Path) -> None:
    carry_out(store_in(tmp_path), 1)
    with store_in(tmp_path).transaction(2) as slots:
        new, residual = numbers(LAYOUT, 9), numbers(PART, 9)
        slots["global"] = new
        slots.set_residual("global", residual)
        assert slots["global"] is new
        assert slots.residual("global") is residual
    assert start_of(tmp_path, 3) == after(1) | {"global": (new.digest, residual.digest)}


def test_residuals_are_kept(tmp_path: Path) -> None:
    first, second = numbers(LAYOUT, 0), numbers(LAYOUT, 1)
    dropped, more = numbers(PART, 0), numbers(PART, 1)
    with store_in(tmp_path).transaction(1) as slots:
        slots["a"], slots["b"] = first, second
        slots.set_residual("a", dropped)
    expected = {"a": (first.digest, dropped.digest), "b": (second.digest, None)}
    with store_in(tmp_path).transaction(2) as slots:
        slots["b"] = first  # a plan that never looks at slot a
    expected["b"] = (first.digest, None)
    assert start_of(tmp_path, 3) == expected
    with store_in(tmp_path).transaction(3) as slots:
        slots["a"] = second  # replaced without having been read
    expected["a"] = (second.digest, dropped.digest)
    assert start_of(tmp_path, 4) == expected
    with store_in(tmp_path).transaction(4) as slots:
        slots["a"] = first
        found = slots.residual("a")  # asked for after the replacement: what an upload does
        assert found is not None
        assert found.digest == dropped.digest
        assert slots["a"] is first
    with store_in(tmp_path).transaction(5) as slots:
        slots.set_residual("a", more)  # the slot itself untouched
    expected["a"] = (first.digest, more.digest)
    assert start_of(tmp_path, 6) == expected


def test_what_was_received_is_kept_with_the_slot_and_as_it_was_before_a_round(tmp_path: Path) -> None:
    first, second, trained = numbers(LAYOUT, 0), numbers(LAYOUT, 1), numbers(LAYOUT, 2)

    def held(round_: int) -> bytes | None:
        found: list[Adapter | None] = []

        def look(slots: SlotStore) -> None:
            found.append(slots.received("a"))
            raise Abort

        with pytest.raises(Abort), store_in(tmp_path).transaction(round_) as slots:
            look(slots)
        return None if found[0] is None else found[0].digest

    assert held(1) is None
    for round_, received in ((1, first), (2, second)):
        with store_in(tmp_path).transaction(round_) as slots:
            slots["b"] = received  # installed, and not trained
            slots.set_received("b", received)
            slots.set_received("a", received)
            slots["a"] = trained
            slots.set_residual("a", numbers(PART, round_))
    assert held(3) == second.digest
    assert held(2) == first.digest
    with store_in(tmp_path).transaction(3) as slots:
        slots["a"] = trained  # unseen
    assert held(4) == second.digest
    expected = {"a": (trained.digest, numbers(PART, 2).digest), "b": (second.digest, None)}
    assert start_of(tmp_path, 4) == expected


def test_a_failed_plan_changes_nothing(tmp_path: Path) -> None:
    for round_ in (1, 2):
        carry_out(store_in(tmp_path), round_)
    before = files_of(tmp_path)
    store = store_in(tmp_path)

    def fail(slots: SlotStore) -> None:
        slots["global"] = numbers(LAYOUT, 7)
        slots["new"] = numbers(LAYOUT, 8)
        slots.set_residual("local", numbers(PART, 9))
        slots.save_personal(numbers(LAYOUT, 10))
        raise Abort

    with pytest.raises(Abort), store.transaction(3) as slots:
        fail(slots)
    assert files_of(tmp_path) == before
    with store.transaction(3) as slots:  # the same object, too, has forgotten what failed
        assert slots.names() == ["global", "local"]
        assert slots["global"].digest == after(1, 2)["global"][0]
    assert read_peft_directory(tmp_path / "adapter", LAYOUT, HEADS).is_finite


def test_a_first_plan_that_fails_leaves_no_slot(tmp_path: Path) -> None:
    def fail(slots: SlotStore) -> None:
        slots["global"] = numbers(LAYOUT, 7)
        raise Abort

    with pytest.raises(Abort), store_in(tmp_path).transaction(1) as slots:
        fail(slots)
    assert files_of(tmp_path) == {}
    assert start_of(tmp_path, 1) == {}


def test_a_commit_that_fails_changes_nothing(tmp_path: Path) -> None:
    """The base turns out to have no such head when the slot is written: half of the files are there already."""
    carry_out(store_in(tmp_path), 1)
    before = files_of(tmp_path)
    store = SlotStore(tmp_path, "toy", dict)
    with pytest.raises(ValueError, match="no parameter"), store.transaction(2) as slots:
        slots["global"] = numbers(LAYOUT, 1)
    assert start_of(tmp_path, 2) == after(1)
    assert files_of(tmp_path) == before


def test_slots_that_a_plan_leaves_alone_are_not_read_nor_written(tmp_path: Path) -> None:
    carry_out(store_in(tmp_path), 1)
    before = files_of(tmp_path)
    carry_out(store_in(tmp_path), 2)
    now = files_of(tmp_path)
    for name in ("adapter_config.json", "adapter_model.safetensors", "exact.safetensors"):
        assert now[f"slots/local/{name}"] == before[f"slots/local/{name}"]
        assert now[f"history/1/global/{name}"] == before[f"slots/global/{name}"]
    assert now["slots/global/exact.safetensors"] != before["slots/global/exact.safetensors"]


def test_file_systems_without_links_get_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise PermissionError("no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    for round_ in (1, 2, 3):
        carry_out(store_in(tmp_path), round_)
    assert start_of(tmp_path, 4) == after(1, 2, 3)


def test_folder_holds_what_the_documentation_says(tmp_path: Path) -> None:
    for round_ in (1, 2):
        carry_out(store_in(tmp_path), round_)
    slot_files = {"adapter_config.json", "adapter_model.safetensors", "exact.safetensors"}
    assert {path.name for path in tmp_path.iterdir()} == {"slots", "history", "adapter", ".lock"}
    assert {path.name for path in (tmp_path / "slots").iterdir()} == {"global", "local", "state.json"}
    assert {path.name for path in (tmp_path / "slots" / "local").iterdir()} == slot_files
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == slot_files - {"exact.safetensors"}
    assert unsealed((tmp_path / "slots" / "state.json").read_text()) == {"round": 2}


# --------------------------------------------------------------------------------------------------------------- rounds


def test_a_round_carried_out_again_starts_from_the_slots_before_it(tmp_path: Path) -> None:
    for round_ in (1, 2, 3):
        carry_out(store_in(tmp_path), round_)
    assert start_of(tmp_path, 3) == after(1, 2)
    for salt in (1, 2):
        carry_out(store_in(tmp_path), 3, salt)
        assert start_of(tmp_path, 4) == after(1, 2) | after(3, salt=salt)
        assert start_of(tmp_path, 3) == after(1, 2)
    carry_out(store_in(tmp_path), 4)
    assert start_of(tmp_path, 4) == after(1, 2) | after(3, salt=2)


def test_the_first_round_carried_out_again_starts_from_nothing(tmp_path: Path) -> None:
    carry_out(store_in(tmp_path), 1)
    assert start_of(tmp_path, 1) == {}
    carry_out(store_in(tmp_path), 1, salt=5)
    assert start_of(tmp_path, 2) == after(1, salt=5)
    assert start_of(tmp_path, 1) == {}


def test_a_client_may_miss_rounds(tmp_path: Path) -> None:
    carry_out(store_in(tmp_path), 2)
    carry_out(store_in(tmp_path), 5)
    assert start_of(tmp_path, 9) == after(2, 5)
    assert start_of(tmp_path, 5) == after(2)
    assert start_of(tmp_path, 3) == after(2)


@pytest.mark.parametrize("keep", [1, 2, 4])
def test_as_many_rounds_can_be_carried_out_again_as_states_are_kept(keep: int, tmp_path: Path) -> None:
    for round_ in range(1, 8):
        carry_out(store_in(tmp_path, keep), round_)
    assert sorted(path.name for path in (tmp_path / "history").iterdir()) == [str(n) for n in range(7 - keep, 7)]
    for round_ in range(7, 7 - keep, -1):
        assert start_of(tmp_path, round_, keep) == after(*range(1, round_))
    first = 8 - keep
    with pytest.raises(SlotError, match="no longer holds"):
        start_of(tmp_path, first - 1, keep)
    carry_out(store_in(tmp_path, keep), first, salt=1)  # what came after it is given up
    assert start_of(tmp_path, 9, keep) == after(*range(1, first)) | after(first, salt=1)
    carry_out(store_in(tmp_path, keep), first + 1, salt=2)
    assert start_of(tmp_path, first + 1, keep) == after(*range(1, first)) | after(first, salt=1)


def test_a_round_whose_beginning_is_lost_is_refused(tmp_path: Path) -> None:
    """Training on from later slots would look like success and be another experiment."""
    for round_ in (1, 2, 3):
        carry_out(store_in(tmp_path), round_)
    before = files_of(tmp_path)
    for round_ in (1, 2):
        with pytest.raises(SlotError, match=f"round {round_} has been carried out.*after round 2 and 3"):
            start_of(tmp_path, round_)
    assert files_of(tmp_path) == before


def test_two_processes_take_turns(tmp_path: Path) -> None:
    """A resumed run may ask for a round while the process of the old run still trains it."""

    def is_free() -> bool:
        with (tmp_path / ".lock").open() as other:
            try:
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True

    with store_in(tmp_path).transaction(1):
        assert not is_free()
    assert is_free()
    with pytest.raises(Abort), store_in(tmp_path).transaction(2):
        raise Abort
    assert is_free()


# ----------------------------------------------------------------------------------------------------------------- PEFT


def loaded(folder: Path) -> PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # transformers about itself
        return PeftModel.from_pretrained(build(), folder).eval()


def test_slots_and_the_personal_model_load_in_peft(tmp_path: Path) -> None:
    model = PersonalModel(base_of(), rank=4, alpha=12.5)
    adapter, mine = random_adapter(model.layout, 1, scale=0.2), random_adapter(model.layout, 2, scale=0.2)
    with SlotStore(tmp_path, "tiny-vit", lambda: model.heads).transaction(1) as slots:
        slots["global"] = adapter
        slots.set_residual("global", adapter.select([Factor.B]))
        slots.save_personal(mine)
    for folder, expected in ((tmp_path / "slots" / "global", adapter), (tmp_path / "adapter", mine)):
        model.load("slot", expected)
        model.activate({"slot": 1.0})
        assert_same_logits(logits_of(loaded(folder)), logits_of(model.module), 1e-6)
        assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "tiny-vit"


def test_the_state_that_plans_pin_stays_until_none_does(tmp_path: Path) -> None:
    def plan(round_: int, pinned: int | None) -> list[str]:
        with store_in(tmp_path).transaction(round_, pinned) as slots:
            slots["global"] = numbers(LAYOUT, 0, round_)
        return sorted(path.name for path in (tmp_path / "history").iterdir())

    kept = [plan(1, None), plan(2, 0), plan(3, 1), plan(5, 1), plan(6, 4)]
    assert kept == [["0"], ["0", "1"], ["1", "2"], ["1", "3"], ["3", "5"]]  # after round 4 it had what round 3 left
    with store_in(tmp_path).transaction(5, 4) as slots:
        assert slots["global"].digest == numbers(LAYOUT, 0, 3).digest
    assert plan(6, None) == ["5"]
