"""How a base model is held and computes: what its owner asks for is what the model gets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from client_app import session
from client_app.model.forward import target_losses
from client_app.model_settings import ModelSettings, SettingsError
from client_app.own.files import load_own
from client_app.settings import Settings
from tests.client_app.own_clients import settings_of
from tests.toys.tiny_models import save_llama


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama that writes letters."""
    return save_llama(tmp_path_factory.mktemp("llama"))


def writer(tmp_path: Path, llama: Path, count: int = 20, **model: object) -> Settings:
    """A client with questions and answers of various lengths."""
    rows = [{"prompt": "say " + "ab" * (i % 5), "completion": "ba" * (1 + i % 3)} for i in range(count)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return settings_of(path, tmp_path / "state", llama, **model)


def test_choices_are_checked() -> None:
    for wrong in ({"attention": "fast"}, {"model_dtype": "float16"}, {"logits_chunk_mb": -1}):
        with pytest.raises(SettingsError, match=next(iter(wrong)).replace("_", "-")):
            ModelSettings(**wrong)  # type: ignore[arg-type]


def test_the_model_computes_as_the_settings_say(tmp_path: Path, llama: Path) -> None:
    default, _ = load_own(writer(tmp_path, llama))
    asked, _ = load_own(writer(tmp_path, llama, attention="eager", model_dtype="bfloat16"))
    found = [(base.model.config._attn_implementation, base.model.dtype) for base in (default, asked)]  # type: ignore[union-attr]
    here = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    assert found == [("sdpa", here), ("eager", torch.bfloat16)]


def test_logits_are_bounded_as_the_settings_say(tmp_path: Path, llama: Path) -> None:
    model, data = session._load(writer(tmp_path, llama, logits_chunk_mb=7))
    assert model.target_losses.chunk_bytes == 7_000_000
    assert model.target_losses.body is not None
    assert not any("memory" in note for note in data.notes)


def test_a_model_that_cannot_spare_logits_says_so_in_its_notes(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target_losses, "_TOLERANCE", {torch.float32: -1.0})
    _, data = session._load(writer(tmp_path, llama))
    (note,) = [note for note in data.notes if "memory" in note]
    assert note.startswith("losses need more memory than they should: logits of parts of its hidden states differ")
