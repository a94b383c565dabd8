"""Large splits lie in a file: what is trained and reported is what it would be in memory, and they are encoded once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from client_app.data.dataset import Dataset
from client_app.data.stored import StoredDataset, StoredGroups, give_back_memory
from client_app.own import stored_splits
from client_app.own.checked import Checked
from client_app.own.encoding import Encoder
from client_app.own.files import load_own, read_own
from client_app.own.reading import text_files
from client_app.own.reading.text_files import DataError
from tests.benchmarks.client_step import peak_reset, status_of
from tests.client_app.kinds import kind_data
from tests.client_app.own_clients import settings_of
from tests.toys import tiny_models, toy_data

PROMPTS: list[dict[str, Any]] = [{"prompt": f"{n}" * (n + 1), "completion": "yes"} for n in range(40)]
TEXTS: list[dict[str, Any]] = [
    {"text": "very " * n + ("good" if n % 2 else "bad"), "label": ["no", "yes"][n % 2]} for n in range(40)
]
CASES: dict[str, list[dict[str, Any]]] = {
    "causal-lm": PROMPTS,
    "text-classification": TEXTS,
    "multi-label-classification": kind_data.several_labels(40),
    "regression": kind_data.numbers(40),
    "token-classification": kind_data.tagged_words(40),
    "question-answering": kind_data.questions(40),
    "preferences": kind_data.preferred(40),
    "sentence-pairs": kind_data.pairs(),
}


def same(ours: Dataset, theirs: Dataset) -> bool:
    chosen = torch.tensor([2, 0, 5])
    for found, expected in (
        (ours.batch(chosen), theirs.batch(chosen)),
        (ours.subset(chosen).batch(torch.tensor([1])), theirs.subset(chosen).batch(torch.tensor([1]))),
    ):
        assert found.inputs.keys() == expected.inputs.keys()
        for name, tensor in expected.inputs.items():
            used = found.inputs[name]  # several texts of an example may be padded further in memory
            assert torch.equal(used, tensor[..., : used.shape[-1]]), name
        assert found.labels.dtype == expected.labels.dtype
        assert torch.equal(found.labels, expected.labels)
    return True


@pytest.mark.parametrize("task", CASES)
def test_a_split_in_a_file_is_the_split_in_memory(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if task in ("causal-lm", "preferences"):
        tokenizer = tiny_models.character_tokenizer()
        config = tiny_models.llama_config(tokenizer, 32)
        base = tiny_models.save_model(tmp_path / "base", lambda: transformers.LlamaForCausalLM(config), tokenizer)
    else:
        base = tiny_models.save_bert(tmp_path / "base", ["very", *toy_data.VOCABULARY])
    path = toy_data.write_jsonl(tmp_path / "x.jsonl", CASES[task])
    settings = settings_of(path, tmp_path / "state", base, max_length=24, task=task)
    _, plain = load_own(settings)
    monkeypatch.setattr(stored_splits, "IN_MEMORY_TOKENS", 20)
    monkeypatch.setattr(stored_splits, "PART", 7)
    monkeypatch.setattr(text_files, "IN_MEMORY_BYTES", 100)
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
        assert isinstance(train, StoredDataset | StoredGroups)
        assert same(train, plain.splits["train"])
        lengths = plain.splits["train"].lengths
        assert lengths is None or lengths.equal(train.lengths)  # type: ignore[arg-type]
        assert data.notes == plain.notes
    files = sorted((tmp_path / "state" / ".cache" / "encoded").glob("*.arrow"))
    load_own(settings_of(path, tmp_path / "state", base, max_length=23, task=task))
    assert len(list((tmp_path / "state" / ".cache" / "encoded").glob("*.arrow"))) > len(files)  # other settings


def test_texts_that_are_cut_are_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_models.save_bert(tmp_path / "base", ["good", "bad", "very"])
    path = toy_data.write_jsonl(tmp_path / "x.jsonl", TEXTS)
    notes = []
    for few in (stored_splits.IN_MEMORY_TOKENS, 20, 20):
        monkeypatch.setattr(stored_splits, "IN_MEMORY_TOKENS", few)
        notes.append(load_own(settings_of(path, tmp_path / "state", base, max_length=24))[1].notes)
    assert any("18 of 40 texts were cut to 24 tokens" in note for note in notes[0])
    assert notes[0] == notes[1] == notes[2]


def test_rows_with_another_number_of_texts_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_models.save_bert(tmp_path / "base", toy_data.VOCABULARY)
    rows = [*kind_data.pairs(), *({**row, "negative": "bad film"} for row in kind_data.pairs())]
    monkeypatch.setattr(stored_splits, "IN_MEMORY_TOKENS", 20)
    monkeypatch.setattr(stored_splits, "PART", 1)
    path = toy_data.write_jsonl(tmp_path / "x.jsonl", rows)
    with pytest.raises(DataError, match=r"x\.jsonl, line \d+: [23] texts, expected [23] as in the first row"):
        load_own(settings_of(path, tmp_path / "state", base))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks of memory are read where Linux has them")
def test_loading_a_large_file_takes_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """60 MB, most of it in a column that is not read: neither the text nor its rows are ever in memory as a whole."""
    tokenizer = tiny_models.character_tokenizer()
    config = tiny_models.llama_config(tokenizer, 32)
    base = tiny_models.save_model(tmp_path / "base", lambda: transformers.LlamaForCausalLM(config), tokenizer)
    for name, count in (("few", 40), ("many", 8_000)):
        with (tmp_path / f"{name}.jsonl").open("w") as file:
            for number in range(count):
                row = {"prompt": f"{number:016d}", "completion": "yes", "source": f"{number}" * 2000}
                file.write(json.dumps(row) + "\n")
    assert (tmp_path / "many.jsonl").stat().st_size > 60e6
    monkeypatch.setattr(stored_splits, "IN_MEMORY_TOKENS", 20)
    load_own(settings_of(tmp_path / "few.jsonl", tmp_path / "few", base, max_length=64))  # imports pyarrow
    give_back_memory()
    before = peak_reset()
    _, data = load_own(settings_of(tmp_path / "many.jsonl", tmp_path / "many", base, max_length=64))
    assert isinstance(data.splits["train"], StoredDataset)
    assert status_of("VmHWM") - before < (tmp_path / "many.jsonl").stat().st_size  # text and rows were three times that


def test_examples_are_read_from_their_rows_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "IN_MEMORY_BYTES", 100)
    path = toy_data.write_jsonl(tmp_path / "x.jsonl", TEXTS)
    split = read_own(settings_of(path, tmp_path)).splits["train"]
    assert isinstance(split, Checked)
    assert split[3].text == list(split)[3].text == split[2:5][1].text
    path.write_text(path.read_text().replace("very", "much"))
    with pytest.raises(DataError, match="was changed while it was read"):
        split[3]
