"""FedMosaic through the real round loop, client code and bundled data, in one process."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from rich.console import Console
from safetensors.torch import load_file
from typer.testing import CliRunner

from client_app.plan.slots import SlotStore
from client_app.scenarios import digits, digits_multimodal
from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.groups import groups_of
from fedalloy_adapters.layout import Factor
from server_app.run.federation import NotEnoughClientsError
from server_app.run.run_directory import RunDirectory
from server_app.tools.align import Aligned, align_models
from server_app.tools.cli import app
from server_app.tools.handover.export import export_adapter, is_in_parts
from tests.in_process import run_in_process
from tests.server_app.conftest import Runner
from tests.toys import tiny_models, toy_data
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


@pytest.mark.parametrize("family", ["llava", "qwen-vl"])
def test_models_that_look_are_aligned_and_share_at_the_blocks_of_their_language_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """A whole federation of two architectures: alignment, registration, training, sketches, P and Q, delivery."""
    if family == "llava":
        bases = [tiny_models.save_llava(tmp_path / "small", vision_layers=4)]
        bases.append(tiny_models.save_llava(tmp_path / "large", vision_layers=2, layers=5))
    else:
        # The processor as saved would need torchvision, for videos.
        monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", lambda *a, **k: tiny_models.QwenProcessor())
        bases = [tiny_models.save_qwen_vl(tmp_path / "small", vision_layers=3)]
        bases.append(tiny_models.save_qwen_vl(tmp_path / "large", vision_layers=1, layers=5))
    data = [toy_data.write_captions(tmp_path / f"data-{index}", 8, index) for index in range(2)]
    what = Aligned(
        models=[str(base) for base in bases], public={"data-path": str(data[0]), "target-modules": "language-model"}
    )
    path = align_models(what, 2, 2, 0, 0.5, False, tmp_path, Console(quiet=True))
    directory = run_in_process(
        tmp_path, 2, node_config=lambda index: {"base-model": str(bases[index]), "data-path": str(data[index])},
        strategy="fedmosaic", num_server_rounds=2, local_steps=1, batch_size=2, lora_blocks=2, lora_r=2,
        lora_alignment=path.stem, target_modules="language-model", reference_model=str(bases[0]),
        generate_examples=2, max_new_tokens=1, fedmosaic__sketch_batches=2, run_name="looks",
        on_divergence="last",
    )  # fmt: skip
    first, second = [record for record in directory.rounds() if record["phase"] == "train"]
    assert first["settled"]["merged"] == second["settled"]["merged"] == 2
    assert first["settled"]["relevance"] == {"client-0": [0, 1], "client-1": [1, 0]}
    ours, theirs = (slots_of(directory, f"client-{index}") for index in range(2))
    for slots, ends in ((ours, (0, 1)), (theirs, (1, 4))):
        sharing = {e.module for e in slots["local"].layout.entries if e.factor is Factor.P}
        assert {module.split(".layers.")[1].split(".")[0] for module in sharing} == {str(end) for end in ends}
        assert all(".language_model.layers." in module for module in slots["local"].layout.lora_modules)
        aligned = load_file(path)
        for module in sharing:
            basis = aligned[f"{slots['local'].layout.base_fingerprint}/{module}.A"]
            assert torch.equal(slots["local"][module, Factor.A], basis)
    # In the second round, each client's global adapter is the one that the other client sent after the first.
    before = directory.checkpoint(1)
    assert before is not None
    sent = before.state.tensors["upload/client-1"]
    for module, name in ours["global"].layout.shared_names.items():
        received = ours["global"][module, Factor.P]
        (there,) = [m for m, other in theirs["local"].layout.shared_names.items() if other == name]
        trained = theirs["local"].layout.select(without_basis=True)
        assert torch.equal(received.reshape(-1), sent[trained.slice_of(f"{there}.P")])
        assert received.any()
    for client in ("client-0", "client-1"):
        assert (directory.path / "clients" / client / "adapter" / "adapter_model.safetensors").is_file()


def test_clients_of_several_tasks_and_modalities_take_part(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each client has one or two of five tasks over images, texts, or both; layouts differ in their groups."""
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
    before = directory.checkpoint(1)
    assert before is not None
    sent = {name: Adapter(slots[name]["local"].layout, before.state.tensors[f"upload/{name}"]) for name in slots}
    (module,) = (name for name in slots["client-1"]["local"].layout.modules if name.startswith("pair/text/classify::"))
    for one, other in (("client-1", "client-2"), ("client-2", "client-1")):  # nobody else classifies texts
        for factor in (Factor.A, Factor.B):
            assert torch.equal(slots[one]["global"][module, factor], sent[other][module, factor])
        assert slots[one]["global"][module, Factor.B].any()
        gates = slots[one]["gates"]
        assert any(gates[entry.module, Factor.GATE].any() for entry in gates.layout.entries)
    summary = json.loads((directory.path / "summary.json").read_text())
    assert len(summary["clients"]) == 4
