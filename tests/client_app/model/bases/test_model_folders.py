"""Other files beside a model's weights are reported or refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from client_app.model.bases.model_folders import BaseModelError, find_model
from client_app.own.files import load_own
from tests.client_app.own_clients import settings_of
from tests.toys import tiny_models, toy_data


@pytest.mark.parametrize("leftover", ["pytorch_model.bin", "tf_model.h5", "model.onnx", "consolidated.safetensors"])
def test_weights_beside_the_weights_are_told_and_change_nothing(leftover: str, tmp_path: Path) -> None:
    folder = tiny_models.save_llama(tmp_path / "llama")
    before = find_model(str(folder), tmp_path)
    (folder / leftover).write_bytes(b"x" * 100)
    after = find_model(str(folder), tmp_path)
    assert after.fingerprint == before.fingerprint
    assert before.notes == ()
    assert after.notes == (f"beside the model's weights there are {leftover}, which are not read",)


def test_a_whole_model_beside_another_in_shards_is_refused(tmp_path: Path) -> None:
    folder = tiny_models.save_llama(tmp_path / "llama")
    shard = folder / "model-00001-of-00001.safetensors"
    shard.write_bytes((folder / "model.safetensors").read_bytes())
    weights = {"metadata": {}, "weight_map": {"model.norm.weight": shard.name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(weights))
    with pytest.raises(BaseModelError, match=r"has model\.safetensors and .*index\.json, expected one of"):
        find_model(str(folder), tmp_path)
    (folder / "model.safetensors").unlink()
    find_model(str(folder), tmp_path)


def test_a_second_chat_template_is_told(tmp_path: Path) -> None:
    folder = tiny_models.save_llama(tmp_path / "llama")
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}\n")
    assert find_model(str(folder), tmp_path).notes == ()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    for template, notes in (("{{ messages[0].content }}", 0), ("{{ messages[-1].content }}", 1)):
        (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
        assert len(find_model(str(folder), tmp_path).notes) == notes
    assert "another chat template than chat_template.jinja" in find_model(str(folder), tmp_path).notes[0]


def test_layers_that_the_configuration_does_not_have_are_told(tmp_path: Path) -> None:
    folder = tiny_models.save_llama(tmp_path / "llama")
    path = toy_data.write_jsonl(tmp_path / "x.jsonl", toy_data.echoes(10, 0, "abc"))
    assert not any("no place" in note for note in load_own(settings_of(path, tmp_path, folder))[1].notes)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    notes = load_own(settings_of(path, tmp_path, folder))[1].notes
    told = "9 parameters of the checkpoint have no place in this model (model.layers.1.input_layernorm.weight, ...)"
    assert told in notes


def test_a_tokenizer_of_another_model_is_told(tmp_path: Path) -> None:
    folder = tiny_models.save_llama(tmp_path / "llama")
    path = toy_data.write_jsonl(tmp_path / "x.jsonl", toy_data.echoes(10, 0, "abc"))
    assert not any("tokenizer" in note for note in load_own(settings_of(path, tmp_path, folder))[1].notes)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": 50}))
    _, data = load_own(settings_of(path, tmp_path, folder))
    assert "eos_token_id is 2 for the tokenizer, 50 in the model's configuration" in data.notes
    tiny_models.word_tokenizer(["a"]).save_pretrained(folder)
    _, data = load_own(settings_of(path, tmp_path, folder))
    assert any("the tokenizer has 6 tokens, the model embeddings of 104: are they a pair?" in n for n in data.notes)
