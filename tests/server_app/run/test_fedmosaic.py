"""FedMosaic through the real round loop, client code and bundled data, in one process."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from client_app.plan.slots import SlotStore
from client_app.scenarios import digits, digits_multimodal
from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.groups import groups_of
from fedalloy_adapters.layout import Factor
from server_app.run.federation import NotEnoughClientsError
from server_app.run.run_directory import RunDirectory
from server_app.tools.cli import app
from server_app.tools.handover.export import export_adapter, is_in_parts
from tests.in_process import run_in_process
from tests.server_app.conftest import Runner
from tests.toys.multi_task_toys import TINY

QUICK: dict[str, Any] = {"strategy": "fedmosaic", "local_steps": 4, "num_server_rounds": 2, "lora_r": 2}


@pytest.fixture(scope="module")
def two_rounds(tmp_path_factory: pytest.TempPathFactory, base_cache: Path) -> RunDirectory:
    """Three clients with P and Q at the last block end."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / ".cache").symlink_to(base_cache)
    found: RunDirectory = run_in_process(folder, 3, run_name="test", **QUICK, lora_blocks=1)
    return found


def personal_accuracy(directory: RunDirectory) -> dict[str, float]:
    summary = json.loads((directory.path / "summary.json").read_text())
    return {name: client["accuracy"] for name, client in summary["clients"].items()}


def test_a_run_records_relevance_books_sketches_and_delivers_peft_adapters(
    two_rounds: RunDirectory, tmp_path: Path
) -> None:
    directory = two_rounds
    settled = [record["settled"] for record in directory.rounds() if record["phase"] == "train"]
    assert all(sum(row) == pytest.approx(1, abs=1e-3) for found in settled for row in found["relevance"].values())
    rows = sqlite3.connect(directory.path / "ledger.sqlite").execute(
        "SELECT round, kind, direction, bytes FROM tensor WHERE client = 'client-1' ORDER BY round, kind, direction"
    )
    booked = {(round_, kind, direction): nbytes for round_, kind, direction, nbytes in rows}
    sketch = int(0.4 * digits.BASE_RECIPE.width) * digits.BASE_RECIPE.mlp * 2
    assert booked[1, "sketch", "up"] == booked[2, "sketch", "up"] == sketch
    assert (1, "train", "down") not in booked
    assert booked[2, "train", "down"] == booked[2, "train", "up"] > 0
    destination = export_adapter(directory.path, "client-0", tmp_path / "model")
    assert not is_in_parts(destination)
    config = json.loads((destination / "adapter_config.json").read_text())
    assert config["lora_bias"] is True
    assert any(key.endswith("lora_B.bias") for key in load_file(destination / "adapter_model.safetensors"))


def test_gates_that_look_at_the_input_are_exported_in_parts(run: Runner, tmp_path: Path) -> None:
    directory = run(**QUICK, fedmosaic__gate="input")
    destination = tmp_path / "model"
    said = CliRunner().invoke(app, ["export", str(directory.path), "client-1", str(destination)])
    assert said.exit_code == 0
    assert "cannot be one PEFT adapter" in " ".join(said.output.split())
    assert is_in_parts(destination)
    assert sorted(path.name for path in destination.iterdir()) == [
        "gates.safetensors",
        "global",
        "local",
        "mixture.json",
    ]
    for slot in ("global", "local"):
        assert (destination / slot / "adapter_model.safetensors").is_file()
    terms = json.loads((destination / "mixture.json").read_text())["terms"]
    assert terms == [
        {"slot": "global", "gate": {"slot": "gates"}},
        {"slot": "local", "gate": {"slot": "gates", "complement": True}},
    ]
    assert all(key.startswith("gates/") for key in load_file(destination / "gates.safetensors"))


def test_each_clients_gates_and_sketch_stay_its_own_and_the_basis_stays_fixed(two_rounds: RunDirectory) -> None:
    directory = two_rounds
    gates: list[torch.Tensor] = []
    bases: list[torch.Tensor] = []
    for client in ("client-0", "client-1"):
        store = SlotStore(directory.path / "clients" / client, "digits-vit", dict)
        with store.transaction(99) as slots:
            assert set(slots.names()) == {"global", "local", "gates", "sketch"}
            gates.append(slots["gates"].vector)
            local = slots["local"].layout
            modules = [entry.module for entry in local.entries if local.is_basis(entry)]
            bases += [slots[slot].select((Factor.A, Factor.B), modules).vector for slot in ("local", "global")]
    assert gates[0].any()
    assert not torch.equal(gates[0], gates[1])
    assert len(bases) == 4
    assert all(torch.equal(bases[0], basis) for basis in bases[1:])


def test_a_run_repeats_bit_for_bit(run: Runner, two_rounds: RunDirectory) -> None:
    first, second = two_rounds, run(**QUICK, lora_blocks=1, run_name="test")
    assert personal_accuracy(first) == personal_accuracy(second)
    states = [directory.newest_checkpoint() for directory in (first, second)]
    assert states[0] is not None
    assert states[1] is not None
    for name, tensor in states[0].state.tensors.items():
        assert torch.equal(tensor, states[1].state.tensors[name])


def test_a_missing_alignment_is_a_refusal_that_names_it(run: Runner) -> None:
    with pytest.raises(NotEnoughClientsError, match="AlignmentError"):
        run(**QUICK, lora_blocks=1, lora_alignment="a" * 64)


def slots_of(directory: RunDirectory, client: str) -> dict[str, Adapter]:
    with SlotStore(directory.path / "clients" / client, "any", dict).transaction(99) as slots:
        return {name: slots[name].clone() for name in slots.names()}


def test_clients_of_several_tasks_and_modalities_take_part(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """One or two of five tasks over images, texts and both at each client: layouts that differ in groups."""
    tasks = ((("digit",), 0), (("number", "answer"), 1), (("compare",), 0), (("caption",), 1))
    monkeypatch.setattr(digits_multimodal, "RECIPE", TINY)
    monkeypatch.setattr(digits_multimodal, "CLIENTS", tasks)
    monkeypatch.setattr(digits_multimodal, "TESTED", dict.fromkeys(digits_multimodal.TESTED, 12))
    monkeypatch.setattr(digits_multimodal, "GENERATED", 2)
    directory = run(
        clients=4, strategy="fedmosaic", scenario="digits-multimodal", local_steps=2, batch_size=4, lora_r=2,
        fedmosaic__sketch_batches=2, fedmosaic__sketch_noise=0.0, on_divergence="last",
    )  # fmt: skip
    first, second = [record["settled"] for record in directory.rounds() if record["phase"] == "train"]
    assert first["merged"] == second["merged"] == 4
    assert all(sum(row) == pytest.approx(1, abs=1e-3) for row in second["relevance"].values())
    slots = {f"client-{index}": slots_of(directory, f"client-{index}") for index in range(4)}
    owned = {client: set(groups_of(found["local"].layout)) for client, found in slots.items()}
    assert len({frozenset(groups) for groups in owned.values()}) == 4
    summary = json.loads((directory.path / "summary.json").read_text())
    assert len(summary["clients"]) == 4
