"""Rows that stay in their file equal the rows of a small file in memory, wherever they are in it."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import datasets
import pytest

from client_app.own.reading import readers, text_files
from client_app.own.reading.readers import Table, read_table
from client_app.own.reading.text_files import ChosenRows, DataError, JoinedRows, Row, StoredRows, TextLines

ROWS = [{"text": f"text {n}, é \N{PARTY POPPER}", "label": str(n % 2)} for n in range(30)]
OBJECTS = [json.dumps(row, ensure_ascii=n % 3 == 0) for n, row in enumerate(ROWS)]
QUOTED = ['"' + row["text"].replace(" ", "\n") + '""said"""' + f",{row['label']}" for row in ROWS]
FILES = {
    "x.jsonl": "\n".join(OBJECTS),
    "blank.jsonl": "\n\n" + "\n \n".join(OBJECTS) + "\n\n",
    "mark.jsonl": "\ufeff" + "\r\n".join(OBJECTS) + "\r\n",
    "lines.json": "\n".join(OBJECTS) + "\n",
    "packed.jsonl.gz": "\n".join(OBJECTS) + "\n",
    "x.csv": "text,label\n" + "\n".join(QUOTED) + "\n",
    "windows.csv": "\ufefftext;label\r\n" + "\r\n".join(f"a {n};{n % 2}" for n in range(30)) + "\r\n\r\n",
    "old.csv": "text,label\r" + "\r".join(f"é {n},{n % 2}" for n in range(30)),
    "hidden.tsv": "text\tlabel\n" + "\n".join(f'"é {n}\t{n % 2}' for n in range(30)),
    "packed.tsv.gz": "text\tlabel\n" + "\n".join(f"é {n}\t{n % 2}" for n in range(30)),
}


def write(path: Path, content: str) -> Path:
    data = content.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("name", FILES)
def test_rows_in_a_file_are_rows_in_memory(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / name, FILES[name])
    known = read_table(str(path))
    assert isinstance(known.rows, list)
    assert len(known.rows) == 30
    monkeypatch.setattr(text_files, "IN_MEMORY_BYTES", 10)
    monkeypatch.setattr(text_files, "_BLOCK", 7)
    found = read_table(str(path))
    assert not isinstance(found.rows, list)
    assert list(found.rows) == known.rows
    assert found.findings == known.findings
    for at in (29, 0, 7, -1):
        assert found.rows[at] == known.rows[at]
    assert found.rows[3:9:2] == known.rows[3:9:2]
    with pytest.raises(IndexError):
        found.rows[30]


def test_rows_of_several_files_and_of_data_sets_stay_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "part-0.jsonl", "\n".join(OBJECTS[:20]))
    datasets.Dataset.from_list(ROWS[20:]).to_parquet(tmp_path / "part-1.parquet")

    def read() -> Table:
        return read_table(str(tmp_path / "part-*"), cache_dir=tmp_path / "cache")

    known = read()
    assert isinstance(known.rows, list)
    monkeypatch.setattr(text_files, "IN_MEMORY_BYTES", 10)
    monkeypatch.setattr(readers, "IN_MEMORY_BYTES", 10)
    found = read()
    assert isinstance(found.rows, JoinedRows)
    assert list(found.rows) == known.rows
    assert [found.rows[n] for n in (29, 20, 19, 0)] == [known.rows[n] for n in (29, 20, 19, 0)]
    some = ChosenRows.of(found.rows, [25, 3])
    assert [row.values["text"] for row in some] == [ROWS[25]["text"], ROWS[3]["text"]]
    assert some[1].place.endswith("line 4")


def test_an_error_in_a_large_file_has_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "IN_MEMORY_BYTES", 10)
    with pytest.raises(DataError, match=r"x\.jsonl, line 31, column 1: not valid JSON"):
        read_table(str(write(tmp_path / "x.jsonl", "\n".join([*OBJECTS, "x"]))))
    with pytest.raises(DataError, match=r"x\.csv, line 122: 3 fields, expected 2"):
        read_table(str(write(tmp_path / "x.csv", "\n".join(["text,label", *QUOTED, "a,b,c"]))))


def test_a_line_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "MAX_LINE", 100)
    monkeypatch.setattr(text_files, "_BLOCK", 64)
    with pytest.raises(DataError, match=r"line 2: (more than 100|\d+) bytes, expected at most"):
        list(TextLines(write(tmp_path / "x.jsonl", "short\n" + "a" * 1000)))


def test_a_file_that_changes_is_not_read_on(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", "\n".join(OBJECTS))
    lines = TextLines(path)
    rows = StoredRows(lines, lambda text, number: Row({"text": text}, str(number), tmp_path), [0], [5], [1])
    assert rows[0].values == {"text": OBJECTS[0][:5]}
    with path.open("a") as file:
        file.write("more")
    with pytest.raises(DataError, match="was changed while it was read"):
        rows[0]
