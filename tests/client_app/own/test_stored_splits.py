"""Large splits lie in a file: what is trained and reported is what it would be in memory, and they are encoded once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from client_app.data.dataset import Dataset
from client_app.data.stored import StoredDataset
from client_app.own import stored_splits
from client_app.own.encoding import Encoder
from client_app.own.files import load_own
from tests.client_app.own_clients import settings_of
from tests.toys import tiny_models, toy_data


def same(ours: Dataset, theirs: Dataset) -> bool:
    chosen = torch.tensor([2, 0, 5])
    found, expected = ours.batch(chosen), theirs.batch(chosen)
    return torch.equal(found.labels, expected.labels) and all(
        torch.equal(found.inputs[name], tensor) for name, tensor in expected.inputs.items()
    )


@pytest.mark.parametrize("task", ["causal-lm", "text-classification"])
def test_a_split_in_a_file_is_the_split_in_memory(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if task == "causal-lm":
        tokenizer = tiny_models.character_tokenizer()
        config = tiny_models.llama_config(tokenizer, 32)
        base = tiny_models.save_model(tmp_path / "base", lambda: transformers.LlamaForCausalLM(config), tokenizer)
        rows: list[dict[str, Any]] = [{"prompt": f"{n}" * (n + 1), "completion": "yes"} for n in range(40)]
    else:
        base = tiny_models.save_bert(tmp_path / "base", ["good", "bad", "very"])
        rows = [{"text": "very " * n + ("good" if n % 2 else "bad"), "label": ["no", "yes"][n % 2]} for n in range(40)]
    path = toy_data.write_jsonl(tmp_path / "x.jsonl", rows)
    settings = settings_of(path, tmp_path / "state", base, max_length=24)
    _, plain = load_own(settings)
    monkeypatch.setattr(stored_splits, "IN_MEMORY_TOKENS", 100)
    monkeypatch.setattr(stored_splits, "PART", 7)
    _, first = load_own(settings)
    calls: list[int] = []
    encode = Encoder.encode
    monkeypatch.setattr(
        Encoder, "encode", lambda self, examples, labels: calls.append(len(examples)) or encode(self, examples, labels)
    )
    _, again = load_own(settings)
    assert max(calls) <= 7  # the first part, to see what is encoded; the rest is read
    for data in (first, again):
        train = data.splits["train"]
        assert isinstance(train, StoredDataset)
        assert same(train, plain.splits["train"])
        assert train.lengths is not None
        assert train.lengths.tolist() == plain.splits["train"].lengths.tolist()  # type: ignore[union-attr]
        assert data.notes == plain.notes
    assert any("were cut to 24 tokens" in note for note in plain.notes)
    files = sorted((tmp_path / "state" / ".cache" / "encoded").glob("*.arrow"))
    load_own(settings_of(path, tmp_path / "state", base, max_length=23))
    assert len(list((tmp_path / "state" / ".cache" / "encoded").glob("*.arrow"))) > len(files)  # other settings
