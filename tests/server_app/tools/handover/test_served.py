"""Exports for programs that serve models: products of folded and padded factors, refusals, and the converter."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from examples import tiny_models
from server_app.tools.cli import app
from server_app.tools.handover.export import ExportError, export_adapter, export_all
from server_app.tools.handover.served import CONVERTER, folded, max_lora_rank


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_models.save_llama(tmp_path_factory.mktemp("base") / "base", chat=True)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    return folder


@pytest.fixture
def run(tmp_path: Path, base: Path) -> Path:
    """Two clients; ada's modules have different ranks and alphas, bob's are alike."""
    folder = tmp_path / "runs" / "r"
    kinds = {"ada": {"rank_pattern": {"v_proj": 3}, "alpha_pattern": {"v_proj": 7, "q_proj": 5}}, "bob": {}}
    for client, patterns in kinds.items():
        config = LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "v_proj", "k_proj"], **patterns)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        torch.manual_seed(len(client))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
        model.save_pretrained(folder / "clients" / client / "adapter")
        path = folder / "clients" / client / "adapter" / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(base)}))
        about = {
            "client": client,
            "run": "r",
            "rank": 2,
            "tasks": {"t": "causal-lm"},
            "metrics": {"test": {"loss": 1.5}},
        }
        about |= {"examples": {"train": 40, "test": 9}}
        (folder / "clients" / client / "about.json").write_text(json.dumps(about))
    (folder / "config.toml").write_text('strategy = "ditto"\nlocal-steps = 7\n')
    records = [
        {"phase": "train", "round": n, "clients": {"ada": {"status": "ok", "metrics": {"personal": {"loss": 3.0 / n}}}}}
        for n in (1, 2)
    ]
    (folder / "rounds.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def logits(model: torch.nn.Module, base: Path) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**AutoTokenizer.from_pretrained(base)("hello there", return_tensors="pt")).logits  # type: ignore[no-any-return]


def own(run: Path, client: str, base: Path) -> torch.Tensor:
    """The logits of the client's model as its run has left it."""
    plain = AutoModelForCausalLM.from_pretrained(base)
    return logits(PeftModel.from_pretrained(plain, str(run / "clients" / client / "adapter")), base)


def test_folding_and_padding_leave_the_products_as_they_are() -> None:
    a, b = torch.randn(2, 5), torch.randn(4, 2)
    found = folded({"m.lora_A.weight": a, "m.lora_B.weight": b}, {"m": 3.0}, 4)
    assert found["m.lora_A.weight"].shape == (4, 5)
    torch.testing.assert_close(found["m.lora_B.weight"] @ found["m.lora_A.weight"], 3.0 * b @ a)


def test_every_form_that_loads_here_has_the_clients_own_logits(run: Path, base: Path, tmp_path: Path) -> None:
    expected = own(run, "ada", base)
    for form in ("peft", "vllm", "hub", "merged"):
        said: list[str] = []
        out = export_adapter(run, "ada", tmp_path / form, form, said.append)
        if form == "merged":
            found = logits(AutoModelForCausalLM.from_pretrained(out), base)
        elif form == "hub":  # no path of this machine
            assert str(base) not in "".join(path.read_text() for path in out.glob("*.[jm][sd]*"))
            found = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(out)), base)
            assert any("hf upload" in line for line in said)
        else:
            found = logits(AutoPeftModelForCausalLM.from_pretrained(str(out)), base)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4, msg=form)
    assert not torch.allclose(logits(AutoModelForCausalLM.from_pretrained(base), base), expected, atol=1e-2)
    config = json.loads((tmp_path / "vllm" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (3, 3, {}, {})
    state = load_file(tmp_path / "vllm" / "adapter_model.safetensors")
    shapes = {tensor.shape[0 if "lora_A" in key else 1] for key, tensor in state.items()}
    assert shapes == {3}


def test_the_card_says_what_it_is_and_holds_no_data(run: Path, tmp_path: Path) -> None:
    card = (export_adapter(run, "ada", tmp_path / "out", "hub") / "README.md").read_text()
    for line in (
        'base_model: "base"', "license: apache-2.0", "* task `t`: causal-lm", "* examples: train 40, test 9",
        "* strategy: ditto", "* local-steps: 7", "| test | loss | 1.5000 |", "| 2 | loss 1.5000 |",
    ):  # fmt: skip
        assert line in card.splitlines(), line
    assert card.startswith("---\n")


def test_all_clients_go_out_at_once_or_none(run: Path, tmp_path: Path) -> None:
    words = ["export", str(run), str(tmp_path / "all"), "--all", "--as", "vllm"]
    result = CliRunner().invoke(app, words, env={"COLUMNS": "400"})
    assert result.exit_code == 0, result.output
    assert "--max-loras 2 --max-lora-rank 8 --lora-modules ada=" in result.output
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == ["ada", "bob"]
    (run / "clients" / "bob" / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(ExportError, match="client 'bob' has no personal model yet"):
        export_all(run, tmp_path / "none", "peft")
    assert not any((tmp_path / "none").glob("*"))


def test_what_a_form_has_no_place_for_is_refused_with_the_reason(run: Path, tmp_path: Path) -> None:
    config = json.loads((run / "clients" / "bob" / "adapter" / "adapter_config.json").read_text())
    with_head = run / "clients" / "bob" / "adapter"
    state = load_file(with_head / "adapter_model.safetensors") | {"base_model.model.lm_head.weight": torch.zeros(2, 2)}
    from safetensors.torch import save_file

    save_file(state, with_head / "adapter_model.safetensors")
    (with_head / "adapter_config.json").write_text(json.dumps(config | {"modules_to_save": ["lm_head"]}))
    with pytest.raises(ExportError, match="no heads and no biases; --as merged"):
        export_adapter(run, "bob", tmp_path / "out", "vllm")
    parts = run / "clients" / "ada" / "adapter"
    (parts / "mixture.json").write_text("{}")
    for form in ("merged", "vllm", "gguf", "hub"):
        with pytest.raises(ExportError, match="coefficients that depend on the input"):
            export_adapter(run, "ada", tmp_path / "out", form)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ExportError, match="rank 600"):
        max_lora_rank(600)


def test_gguf_is_made_by_llama_cpps_converter_where_it_is_installed(
    run: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ExportError, match="git clone"):
        export_adapter(run, "ada", tmp_path / "out", "gguf")
    checkout = tmp_path / "llama.cpp"
    checkout.mkdir()
    script = (
        "import sys, pathlib, shutil\n"
        "model, _, out, _, kind = sys.argv[1:]\n"
        "assert kind == 'f32'\n"
        "shutil.copyfile(pathlib.Path(model) / 'model.safetensors', out)\n"
    )
    (checkout / CONVERTER).write_text(script)
    monkeypatch.setenv("LLAMA_CPP", str(checkout))
    out = export_adapter(run, "ada", tmp_path / "out", "gguf")
    assert {path.name for path in out.iterdir()} == {"model.gguf", "README.md", "metrics.json"}
    merged = export_adapter(run, "ada", tmp_path / "merged", "merged")
    assert (out / "model.gguf").read_bytes() == (merged / "model.safetensors").read_bytes()  # what it was given
    (checkout / CONVERTER).write_text("raise SystemExit('Model Foo is not supported')\n")
    with pytest.raises(ExportError, match="Model Foo is not supported"):
        export_adapter(run, "ada", tmp_path / "other", "gguf")
    assert sys.executable
