"""Texts in a file: the batches of texts in memory, whatever is chosen; no file that is not whole; bounded memory."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

from client_app.data import stored
from client_app.data.dataset import MASK, Dataset
from client_app.data.joined import join
from client_app.data.stored import StoredDataset, TokenFile, write_tokens
from client_app.data.targets import IGNORED

LENGTHS = [3, 7, 1, 5] * 40


def rows() -> Iterator[dict[str, list[int]]]:
    for number, length in enumerate(LENGTHS):
        ids = [number % 50 + 5] * length
        yield {"input_ids": ids, "labels": [IGNORED, *ids[1:]]}


def in_memory() -> Dataset:
    items, width = list(rows()), max(LENGTHS)
    ids, labels = (
        torch.tensor([one[name] + [filling] * (width - len(one[name])) for one in items])
        for name, filling in (("input_ids", 2), ("labels", IGNORED))
    )
    mask = (torch.arange(width) < torch.tensor(LENGTHS)[:, None]).long()
    return Dataset({"input_ids": ids, MASK: mask}, labels, "causal-lm")


def test_batches_are_those_of_texts_in_memory(tmp_path: Path) -> None:
    file = write_tokens(tmp_path / "x" / "train.arrow", rows(), lambda: {"truncated": 3})
    assert file.about == {"truncated": 3}
    again = TokenFile.opened(file.path)
    assert again is not None
    split, plain = StoredDataset.of(again, "causal-lm", padding=2), in_memory()
    assert len(split) == len(plain) == 160
    assert split.lengths is not None
    assert split.lengths.tolist() == LENGTHS
    chosen = torch.tensor([150, 2, 70, 2])
    for ours, theirs in (
        (split.batch(chosen), plain.batch(chosen)),
        (split.subset(chosen).batch(torch.tensor([3, 0])), plain.subset(chosen).batch(torch.tensor([3, 0]))),
        (join([split, plain]).batch(torch.tensor([170, 5])), join([plain, plain]).batch(torch.tensor([170, 5]))),
    ):
        assert ours.inputs.keys() == theirs.inputs.keys()
        for name, tensor in theirs.inputs.items():
            assert torch.equal(ours.inputs[name], tensor), name
        assert torch.equal(ours.labels, theirs.labels)
    assert int(split.sample().inputs["input_ids"].max()) == 54
    assert split.sample().inputs[MASK].sum(dim=1).min() == 1


def test_labels_of_classes_stay_in_memory(tmp_path: Path) -> None:
    examples = [{"input_ids": [5, 6, 7][: n + 1], "target": [n] * (3 - n)} for n in range(3)]
    file = write_tokens(tmp_path / "train.arrow", examples, dict)
    labels = file.lists("target", IGNORED)
    assert labels.tolist() == [[0, 0, 0], [1, 1, IGNORED], [2, IGNORED, IGNORED]]
    split = StoredDataset.of(file, "text-classification", labels[:, 0])
    assert split.batch(torch.tensor([2, 0])).labels.tolist() == [2, 0]
    assert split.batch(torch.tensor([2, 0])).inputs.keys() == {"input_ids", MASK}
    assert split.batch(torch.tensor([2, 0])).inputs["input_ids"].tolist() == [[5, 6, 7], [5, 0, 0]]


def test_datasets_reads_the_file(tmp_path: Path) -> None:
    file = write_tokens(tmp_path / "train.arrow", rows(), dict)
    table = datasets.Dataset.from_file(str(file.path))
    assert table[1]["input_ids"] == [6] * 7
    assert table["length"][:4] == LENGTHS[:4]


def test_a_file_that_is_not_whole_does_not_count(tmp_path: Path) -> None:
    def breaks() -> Iterator[dict[str, list[int]]]:
        yield from rows()
        raise ValueError("a bad row")

    path = tmp_path / "train.arrow"
    with pytest.raises(ValueError, match="a bad row"):
        write_tokens(path, breaks(), dict)
    assert list(tmp_path.iterdir()) == []
    write_tokens(path, rows(), dict)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert TokenFile.opened(path) is None
    write_tokens(path, rows(), dict)
    path.with_suffix(".json").unlink()
    assert TokenFile.opened(path) is None


def test_unused_files_go(tmp_path: Path) -> None:
    old = write_tokens(tmp_path / "old.arrow", rows(), dict)
    long_ago = time.time() - stored.UNUSED_SECONDS - 60
    os.utime(old.path.with_suffix(".json"), (long_ago, long_ago))
    new = write_tokens(tmp_path / "new.arrow", rows(), dict)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new.arrow", "new.json"]
    assert new.rows([0])[0]["labels"].tolist() == [IGNORED, 5, 5]


def test_reading_all_of_it_takes_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """48 MB on disk, of which at most 4 MB are mapped and read at a time."""
    monkeypatch.setattr(stored, "MAPPED_BYTES", 4 * 2**20)
    ids = np.arange(2048, dtype=np.int32)
    file = write_tokens(tmp_path / "x.arrow", ({"input_ids": ids, "labels": ids} for _ in range(3000)), dict)
    split = StoredDataset.of(file, "causal-lm")
    split.batch(torch.arange(8))
    before, most = resident(), 0
    for start in range(0, 3000, 100):
        assert split.batch(torch.arange(start, start + 4)).inputs["input_ids"].shape == (4, 2048)
        split.file.rows(range(start, start + 100))
        most = max(most, resident() - before)
    assert most < 24e6 < file.path.stat().st_size


def resident() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024
