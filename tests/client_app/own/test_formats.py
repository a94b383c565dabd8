"""Every kind of task from every format of files: the same examples; and labels that are not what they seem."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from client_app.kinds import KINDS
from client_app.own.files import read_own
from tests.client_app.kinds import kind_data
from tests.client_app.own_clients import settings_of
from tests.test_repository import ROOT
from tests.toys import toy_data

Rows = list[dict[str, Any]]
COUNT = 16


def _json_lines(path: Path, rows: Rows) -> Path:
    return toy_data.write_jsonl(path, rows)


def _json(path: Path, rows: Rows) -> Path:
    path.write_text(json.dumps({"data": rows}, indent=1, ensure_ascii=False))
    return path


def _table(path: Path, rows: Rows) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)
    return path


def _cell(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list | dict) else value


def _zipped(write: Callable[[Path, Rows], Path]) -> Callable[[Path, Rows], Path]:
    def zipped(path: Path, rows: Rows) -> Path:
        plain = write(path.with_suffix(""), rows)
        path.write_bytes(gzip.compress(plain.read_bytes()))
        plain.unlink()
        return path

    return zipped


def _parquet(path: Path, rows: Rows) -> Path:
    import datasets

    datasets.Dataset.from_list(rows).to_parquet(path)
    return path


def _arrow(path: Path, rows: Rows) -> Path:
    import datasets

    datasets.Dataset.from_list(rows).save_to_disk(path.parent / "saved")
    (found,) = (path.parent / "saved").glob("*.arrow")
    return found.rename(path)


def _saved(path: Path, rows: Rows) -> Path:
    import datasets

    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(path)
    return path


def _shards(path: Path, rows: Rows) -> str:
    for number, part in enumerate((rows[: COUNT // 2], rows[COUNT // 2 :])):
        toy_data.write_jsonl(path.parent / f"part-{number}.jsonl", part)
    return str(path.parent / "part-*.jsonl")


def _repository(path: Path, rows: Rows) -> Path:
    """As the hub has them: shards below ``data``, and a README beside it."""
    (path / "data").mkdir(parents=True)
    _parquet(path / "data" / "train-00000-of-00001.parquet", rows)
    (path / "README.md").write_text("# A data set\n")
    return path


FORMATS: Mapping[str, tuple[str, Callable[[Path, Rows], Path | str]]] = {
    "JSONL": ("x.jsonl", _json_lines),
    "JSONL.gz": ("x.jsonl.gz", _zipped(_json_lines)),
    "JSON": ("x.json", _json),
    "CSV": ("x.csv", _table),
    "CSV.gz": ("x.csv.gz", _zipped(_table)),
    "TSV": ("x.tsv", _table),
    "Parquet": ("x.parquet", _parquet),
    "Arrow": ("x.arrow", _arrow),
    "`save_to_disk`": ("folder", _saved),
    "several files": ("x", _shards),
    "copy of a hub repository": ("copy", _repository),
}
"""By the name that the documentation has: the file's name, and how rows are written."""

TURNS = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "that"}]


def _numbered(rows: Rows) -> Rows:
    """Rows that differ, so that none is a copy."""
    return [{**row, "text": f"{row['text']} {number}"} for number, row in enumerate(rows)]


def _conversations() -> Rows:
    return [{"messages": [{"role": "user", "content": f"what {n}?"}, TURNS[1]]} for n in range(COUNT)]


def _with_images(**more: str) -> Rows:
    return [
        {"image": f"{n}.png", **more, **({"label": "ab"[n % 2]} if "prompt" not in more else {})} for n in range(COUNT)
    ]


ROWS: Mapping[str, Callable[[], Rows]] = {
    "causal-lm": _conversations,
    "text-classification": lambda: _numbered(toy_data.opinions(COUNT, 0)),
    "image-text-to-text": lambda: _with_images(prompt="?", completion="red"),
    "image-classification": _with_images,
    "image-text-classification": lambda: _with_images(text="red"),
    "regression": lambda: _numbered(kind_data.numbers(COUNT)),
    "multi-label-classification": lambda: _numbered(kind_data.several_labels(COUNT)),
    "token-classification": lambda: kind_data.tagged_words(COUNT),
    "question-answering": lambda: kind_data.questions(COUNT),
    "preferences": lambda: kind_data.preferred(COUNT),
    "sentence-pairs": lambda: kind_data.pairs()[:COUNT],
}


def contents(path: Path | str, state: Path, kind: str) -> list[str]:
    """What the examples say, in order of what they say."""
    found = read_own(settings_of(path, state, task=kind))
    assert found.kind.name == kind
    return sorted(example.content for split in found.splits.values() for example in split)


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_reads_the_same_examples_from_every_format(kind: str, tmp_path: Path) -> None:
    rows = ROWS[kind]()
    if "image" in rows[0]:  # beside the file, where paths begin
        for number, row in enumerate(rows):
            row["image"] = str(tmp_path / row["image"])
            toy_data.picture("red", 8, number).save(row["image"])
    wanted = contents(toy_data.write_jsonl(tmp_path / "wanted.jsonl", rows), tmp_path / "state", kind)
    assert len(wanted) == len(rows)
    for name, (file, write) in FORMATS.items():
        folder = tmp_path / file.replace(".", "-")
        folder.mkdir()
        assert contents(write(folder / file, rows), tmp_path / "state", kind) == wanted, name


@pytest.mark.parametrize(
    ("labels", "alike"),
    [(("yes", "Yes"), 2), (("1", "\uff11"), 2), (("a", "a\u200b"), 2), (("\U0001f937\u200d\u2640", "\U0001f937"), 0)],
)
def test_labels_that_look_alike_are_told(labels: Sequence[str], alike: int, tmp_path: Path) -> None:
    rows = [{"text": f"text {n}", "label": (*labels, "no")[n % 3]} for n in range(12)]
    found = read_own(settings_of(toy_data.write_jsonl(tmp_path / "x.jsonl", rows), tmp_path))
    assert len(found.labels) == 3
    told = [f"{alike} of 3 labels look like another one (case, width, zeros, what is not seen)"] if alike else []
    assert found.findings == told


def test_the_documentation_names_the_formats_and_kinds_that_are_tried_here() -> None:
    page = (ROOT / "docs" / "data-and-models.md").read_text()
    told = page.split("and each from")[1].split("(`tests/")[0].replace("\n", " ")
    assert [name for name in FORMATS if name not in told] == []
    assert set(ROWS) == set(KINDS)
