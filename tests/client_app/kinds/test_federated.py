"""Every new kind of task through a run of two clients, and out of it: as an adapter, and merged into its base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from client_app.kinds import kind_of
from server_app.tools.handover.export import export_adapter
from tests.client_app.kinds.test_kinds import NEW, WORDS
from tests.in_process import run_in_process
from tests.toys import tiny_models, toy_data


@pytest.mark.parametrize("kind", NEW)
def test_a_new_kind_is_federated_and_exported(kind: str, tmp_path: Path) -> None:
    made, about = NEW[kind][0](), kind_of(kind)
    parts = {"a": made[: len(made) // 2], "b": made[len(made) // 2 :]}
    paths = [toy_data.write_jsonl(tmp_path / f"{name}.jsonl", part) for name, part in parts.items()]
    writes = about.auto_model == "AutoModelForCausalLM"
    base = tiny_models.save_llama(tmp_path / "base") if writes else tiny_models.save_bert(tmp_path / "base", WORDS)
    directory = run_in_process(
        tmp_path / "runs",
        2,
        node_config=lambda index: {"data-path": str(paths[index]), "split-fractions": "0.5,0.25,0.25"},
        strategy="fedavg",
        base_model=str(base),
        target_modules="all-linear",
        lora_r=2,
        local_steps=2,
        learning_rate=1e-2,
        num_server_rounds=1,
    )
    summary = json.loads((directory.path / "summary.json").read_text())
    assert set(summary["clients"]) == {"client-0", "client-1"}
    for scores in summary["clients"].values():  # an area under a curve needs both answers among a few examples
        assert set(about.scores) & set(scores)
    adapter = export_adapter(directory.path, "client-0", tmp_path / "adapter")
    assert json.loads((adapter / "adapter_config.json").read_text())["task_type"] == about.peft_task
    merged = export_adapter(directory.path, "client-0", tmp_path / "merged", "merged")
    load: Any = getattr(transformers, about.auto_model).from_pretrained
    whole = load(merged).eval()
    labels = {"num_labels": whole.config.num_labels} if about.head else {}
    plain: Any = peft.PeftModel.from_pretrained(load(base, **labels), str(adapter)).eval()
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    with torch.no_grad():
        one, other, bare = (model(**inputs)[0] for model in (plain, whole, load(base, **labels).eval()))
    assert torch.allclose(one, other, atol=1e-5)
    assert not torch.allclose(one, bare, atol=1e-5)
