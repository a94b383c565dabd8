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
from server_app.run.federation import NotEnoughClientsError
from server_app.run.run_directory import RunDirectory
from server_app.tools.align import AlignCommandError, Aligned, align_models
from server_app.tools.cli import app
from tests.in_process import run_in_process
from tests.server_app.conftest import Runner
from tests.toys import tiny_models, toy_data

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
    with pytest.raises(ScenarioError, match="'digits' has nothing to align, expected one of: digits-mixed, mixed-arch"):
        bases_to_align("digits", runs_dir / ".cache")


@pytest.mark.parametrize("share", [True, False])
def test_clients_of_two_architectures_share_p_and_q(run: Runner, runs_dir: Path, share: bool) -> None:
    path = align_models(Aligned("digits-mixed"), 1, 2, 0, 0.5, False, runs_dir, Console(quiet=True))
    directory = run(clients=4, **MIXED, lora_alignment=path.stem, fedmosaic__share_conventional_lora=share)
    summary = json.loads((directory.path / "summary.json").read_text())
    assert len(summary["clients"]) == 4
    loaded = directory.newest_checkpoint()
    assert loaded is not None
    sizes = {name: tensor.numel() for name, tensor in loaded.state.tensors.items() if name.startswith("upload/")}
    if share:
        assert sizes["upload/client-0"] < sizes["upload/client-2"]
    else:
        assert set(sizes.values()) == {6 * (2 * 2 + 2)}  # six modules of one block end, whatever the architecture
    aligned = load_file(path)
    for client, width in (("client-0", 16), ("client-2", 24)):
        exact = load_file(directory.path / "clients" / client / "adapter" / "adapter_model.safetensors")
        assert any(value.shape == (4, width) for value in exact.values())
    assert len(aligned) == 2 * 6 * 2


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A Llama (2 layers, width 16), a BERT (2 layers, width 32), and a smaller Llama with which both compare data."""
    folder, words = tmp_path_factory.mktemp("families"), toy_data.VOCABULARY
    return {
        "llama": tiny_models.save_llama_reader(folder / "llama", words, width=16),
        "bert": tiny_models.save_bert(folder / "bert", words),
        "small": tiny_models.save_llama_reader(folder / "small", words, width=8, layers=1),
    }


def test_a_llama_beside_a_bert_on_their_own_data(
    runs_dir: Path, families: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    public = toy_data.write_jsonl(runs_dir / "public.jsonl", toy_data.opinions(30, 9))
    models = f"{families['llama']},{families['bert']}"
    command = ["align", "--models", models, "--public", f"data-path='{public}'", "--blocks", "1", "--rank", "2"]
    result = CliRunner().invoke(app, [*command, "--state-dir", str(runs_dir)])
    assert result.exit_code == 0, result.output
    (alignment,) = (runs_dir / "alignments").glob("*.safetensors")
    paths = [toy_data.write_jsonl(runs_dir / f"{seed}.jsonl", toy_data.opinions(20, seed)) for seed in range(3)]
    config: dict[str, Any] = MIXED | {"labels": "neg,pos", "lora_alignment": alignment.stem, "run_name": "families"}

    def start(**more: Any) -> RunDirectory:
        bases = [families[name] for name in ("llama", "bert", "llama")]
        found: RunDirectory = run_in_process(
            runs_dir,
            3,
            node_config=lambda index: {"data-path": str(paths[index]), "base-model": str(bases[index])},
            num_server_rounds=2,
            **(config | more),
        )
        return found

    with pytest.raises(NotEnoughClientsError, match="client 'client-1' has as reference base model"):
        start()
    directory = start(reference_model=str(families["small"]), run_name="shared")
    settled = [record["settled"] for record in directory.rounds() if record["phase"] == "train"]
    assert all(found["relevance"]["client-1"][0] > 0 for found in settled)
    assert "relevance for client-1" in caplog.text
    assert "relative entropy of the relevance" in caplog.text or "near uniform" in caplog.text
    loaded = directory.newest_checkpoint()
    assert loaded is not None
    sketches = [tensor for name, tensor in loaded.state.tensors.items() if name.startswith("sketch/")]
    assert {tensor.numel() for tensor in sketches} == {3 * 16}  # 0.4 of 8 rows, 16 columns: of the small Llama
    assert len({tensor.sum().item() for tensor in sketches}) == 3


def test_models_with_different_tokenizers_are_aligned_and_share_p_and_q(
    runs_dir: Path, families: dict[str, Path], tmp_path: Path
) -> None:
    """A BERT that reads words and a Llama that reads characters."""
    bases = [tiny_models.save_llama(tmp_path / "letters", width=16), families["bert"]]
    paths = [toy_data.write_jsonl(tmp_path / f"{n}.jsonl", toy_data.opinions(40, n)) for n in range(3)]
    public = {"data-path": str(paths[2]), "labels": "neg,pos"}
    what = Aligned(models=[str(base) for base in bases], public=public)
    path = align_models(what, 1, 2, 0, 0.5, False, runs_dir, Console(quiet=True))
    directory = run_in_process(
        runs_dir, 2, node_config=lambda index: {"data-path": str(paths[index]), "base-model": str(bases[index])},
        strategy="fedmosaic", num_server_rounds=1, local_steps=2, labels="neg,pos", lora_r=2, lora_blocks=1,
        lora_alignment=path.stem, reference_model=str(families["small"]),
    )  # fmt: skip
    summary = json.loads((directory.path / "summary.json").read_text())
    assert len(summary["clients"]) == 2


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
        align_models(Aligned("digits-mixed"), 9, 2, 0, 0.5, False, runs_dir, Console(quiet=True))
    result = CliRunner().invoke(app, ["align", "digits", "--state-dir", str(runs_dir)])
    assert result.exit_code == 1
