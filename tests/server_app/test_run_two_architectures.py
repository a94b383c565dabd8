"""Two architectures in one federation, with bases that are hardly trained: alignment, run, and what crosses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors.torch import load_file
from typer.testing import CliRunner

from client_app.scenarios import ScenarioError, bases_to_align, digits_mixed, load_scenario
from server_app.align import AlignCommandError, align_scenario
from server_app.cli import app
from server_app.federation import NotEnoughClientsError
from tests.server_app.conftest import Runner

MIXED: dict[str, Any] = {
    "strategy": "fedmosaic", "scenario": "digits-mixed", "local_steps": 3, "lora_r": 2, "lora_blocks": 1,
    "fedmosaic__sketch_noise": 0.0,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _small_bases(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, width, depth in (("SMALL", 16, 2), ("LARGE", 24, 3)):
        recipe = replace(getattr(digits_mixed, name), width=width, depth=depth, heads=2, mlp=2 * width, steps=3)
        monkeypatch.setattr(digits_mixed, name, recipe)


def test_every_group_has_both_architectures_and_all_have_one_reference(runs_dir: Path) -> None:
    found = [load_scenario("digits-mixed", index, 8, 0, runs_dir / ".cache") for index in range(8)]
    widths = [base.model.config.hidden_size for base, _ in found]  # type: ignore[union-attr]
    assert widths == [16] * 4 + [24] * 4
    references = {base.reference.fingerprint for base, _ in found if base.reference is not None}
    assert len(references) == 1
    for index in range(4):
        ours, theirs = (data.splits["test"] for _, data in (found[index], found[index + 4]))
        assert ours.inputs["pixel_values"].equal(theirs.inputs["pixel_values"])
        assert ours.labels.equal(theirs.labels)
    with pytest.raises(ScenarioError, match="'digits' has nothing to align; of these there are: digits-mixed"):
        bases_to_align("digits", runs_dir / ".cache")


@pytest.mark.parametrize("share", [True, False])
def test_clients_of_two_architectures_share_p_and_q(run: Runner, runs_dir: Path, share: bool) -> None:
    path = align_scenario("digits-mixed", 1, 2, 0, 0.5, False, runs_dir, Console(quiet=True))
    directory = run(clients=4, **MIXED, lora_alignment=path.stem, fedmosaic__share_conventional_lora=share)
    summary = json.loads((directory.path / "summary.json").read_text())
    assert len(summary["clients"]) == 4
    loaded = directory.load_checkpoint()
    assert loaded is not None
    sizes = {name: tensor.numel() for name, tensor in loaded[1].tensors.items() if name.startswith("upload/")}
    if share:
        assert sizes["upload/client-0"] < sizes["upload/client-2"]
    else:
        assert set(sizes.values()) == {6 * (2 * 2 + 2)}  # six modules of one block end, whatever the architecture
    aligned = load_file(path)
    for client, width in (("client-0", 16), ("client-2", 24)):
        exact = load_file(directory.path / "clients" / client / "adapter" / "adapter_model.safetensors")
        assert any(value.shape == (4, width) for value in exact.values())
    assert len(aligned) == 2 * 6 * 2


def test_strategies_that_merge_whole_adapters_refuse_a_second_architecture_by_name(run: Runner) -> None:
    with pytest.raises(NotEnoughClientsError, match="client 'client-2' has base model"):
        run(clients=4, **(MIXED | {"strategy": "fedavg", "lora_blocks": 0}))


def test_the_command_writes_the_file_and_says_what_to_run(runs_dir: Path) -> None:
    arguments = ["align", "digits-mixed", "--blocks", "1", "--rank", "2", "--state-dir", str(runs_dir)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    (path,) = (runs_dir / "alignments").glob("*.safetensors")
    assert f"lora-alignment='{path.stem}'" in result.output
    again = CliRunner().invoke(app, arguments)
    assert [item.name for item in (runs_dir / "alignments").iterdir()] == [path.name], again.output


def test_what_cannot_be_aligned_is_one_line(runs_dir: Path) -> None:
    with pytest.raises(AlignCommandError, match="9 blocks of 2 layers"):
        align_scenario("digits-mixed", 9, 2, 0, 0.5, False, runs_dir, Console(quiet=True))
    result = CliRunner().invoke(app, ["align", "digits", "--state-dir", str(runs_dir)])
    assert result.exit_code == 1
