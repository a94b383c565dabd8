"""Exports that other libraries load by themselves: task, tokenizer, card; merged in float32."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from examples import tiny_models
from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.files.peft_format import write_peft_directory
from server_app.tools.handover.export import ExportError, export_adapter
from tests.client_app.model.bases.test_base_models import base_of, saved, some_data
from tests.client_app.own_clients import personal


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run in which client ada has a personal model of rank 4; the clients trained rank 2."""
    base = tiny_models.save_llama(tmp_path / "base", chat=True)
    folder = tmp_path / "runs" / "r" / "clients" / "ada"
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=4, target_modules=["q_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder / "adapter")
    path = folder / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text()) | {"base_model_name_or_path": str(base), "task_type": None}
    path.write_text(json.dumps(config))
    about = {"client": "ada", "run": "r", "rank": 2, "tasks": {"t": "causal-lm"}, "metrics": {"test": {"loss": 1.5}}}
    about["base_precision"] = "nf4"
    (folder / "about.json").write_text(json.dumps(about))
    return tmp_path / "runs" / "r"


def test_a_peft_export_loads_by_itself_and_a_merge_gives_the_same_answers(run: Path, tmp_path: Path) -> None:
    said: list[str] = []
    adapter = export_adapter(run, "ada", tmp_path / "adapter", say=said.append)
    assert said == ["rank 4: the clients trained rank 2, and this model is the sum of several adapters, which stack"]
    assert "| test | loss | 1.5000 |" in (adapter / "README.md").read_text()
    assert json.loads((adapter / "metrics.json").read_text()) == {"test": {"loss": 1.5}}
    merged = export_adapter(run, "ada", tmp_path / "merged", "merged")
    tokens = AutoTokenizer.from_pretrained(adapter)("hello", return_tensors="pt")
    assert AutoTokenizer.from_pretrained(merged).chat_template
    with torch.no_grad():
        whole = AutoModelForCausalLM.from_pretrained(merged)
        assert whole.dtype == torch.float32
        expected = AutoPeftModelForCausalLM.from_pretrained(str(adapter))(**tokens).logits
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")(**tokens).logits
        assert torch.allclose(whole(**tokens).logits, expected, atol=1e-4)
    assert not torch.allclose(plain, expected, atol=1e-2)


def test_what_cannot_be_merged_says_so_and_leaves_nothing(run: Path, tmp_path: Path) -> None:
    (run / "clients" / "ada" / "about.json").unlink()
    with pytest.raises(ExportError, match="cannot be merged"):
        export_adapter(run, "ada", tmp_path / "out", "merged")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("architecture", ["roberta", "distilbert"])
def test_an_exported_classifier_is_the_clients(architecture: str, tmp_path: Path) -> None:
    """RoBERTa's head has modules inside ``classifier``: with a task type, PEFT looks for the whole of it."""
    base = saved(tmp_path / "base", architecture, "text-classification")
    model = personal(base_of(base, "text-classification"))
    layout = model.whole_layout
    adapter = Adapter(layout, torch.randn(layout.size, generator=torch.Generator().manual_seed(0)) * 0.1)
    model.load("local", adapter)
    folder = tmp_path / "runs" / "r" / "clients" / "ada"
    write_peft_directory(folder / "adapter", adapter, str(base), model.heads, model.drawn)
    about = {"client": "ada", "run": "r", "rank": 2, "tasks": {"t": "text-classification"}, "metrics": {}}
    (folder / "about.json").write_text(json.dumps(about))
    out = export_adapter(tmp_path / "runs" / "r", "ada", tmp_path / "out")
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3, ignore_mismatched_sizes=True)
    inputs = dict(some_data("text-classification").inputs)
    with torch.no_grad():
        found = PeftModel.from_pretrained(plain, str(out)).eval()(**inputs).logits
        assert torch.allclose(found, model.logits(inputs), atol=1e-5)
