"""Labels are names, numbers or missing: what rows of each kind are taken for, told and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from client_app.own.files import Found, read_own
from client_app.own.reading.text_files import DataError
from tests.client_app.own_clients import settings_of
from tests.toys import toy_data

Rows = list[dict[str, Any]]
TEXTS = [f"text {number}" for number in range(12)]


def read(path: Path, labels: str = "", task: str = "", **data: Any) -> Found:
    return read_own(settings_of(path, path.parent / "state", data=data, labels=labels, task=task))


def table(path: Path, labels: list[Any], header: str = "text,label") -> Path:
    lines = [header, *(f"{text},{label}" for text, label in zip(TEXTS, labels, strict=False))]
    path.write_text("\n".join(lines) + "\n")
    return path


def lines(path: Path, labels: list[Any], column: str = "label", text: str = "text") -> Path:
    return toy_data.write_jsonl(path, [{"text": f"{text} {n}", column: label} for n, label in enumerate(labels)])


@pytest.mark.parametrize("first", ["5.0", "5.000", "0", "3.25"])
def test_numbers_in_a_csv_file_are_numbers_whatever_the_first_one_looks_like(first: str, tmp_path: Path) -> None:
    path = table(tmp_path / "x.csv", [first, *(f"{n / 3:.3f}" for n in range(11))])
    assert read(path).kind.name == "regression"
    assert read(path, task="text-classification").kind.name == "text-classification"


def test_numbers_in_json_are_numbers_although_the_first_is_an_integer(tmp_path: Path) -> None:
    assert read(lines(tmp_path / "x.jsonl", [n / 3 for n in range(12)])).kind.name == "regression"
    assert read(lines(tmp_path / "ids.jsonl", [float(n % 3) for n in range(12)])).labels == ("0", "1", "2")


def test_numbers_among_names_are_names_and_versions_are_told_by_labels(tmp_path: Path) -> None:
    assert read(table(tmp_path / "x.csv", ["3.8", "other"] * 6)).labels == ("3.8", "other")
    versions = table(tmp_path / "versions.csv", ["1.5", "2.0"] * 6)
    assert read(versions, labels="1.5,2.0").labels == ("1.5", "2.0")
    assert read(versions).kind.name == "regression"


def test_measured_numbers_of_images_are_not_classes(tmp_path: Path) -> None:
    rows = [f"{number}.png,{number / 3:.3f}" for number in range(6)]
    for number in range(6):
        toy_data.picture("red", 8, number).save(tmp_path / f"{number}.png")
    path = tmp_path / "x.csv"
    path.write_text("\n".join(["image,label", *rows]) + "\n")
    with pytest.raises(DataError, match=r"line 3: label '0\.333' is a number .* task = 'image-classification' to take"):
        read(path)
    assert len(read(path, task="image-classification").labels) == 6


@pytest.mark.parametrize("missing", [-1, -1.0, None])
def test_a_test_split_of_missing_numbers_is_left_out(missing: Any, tmp_path: Path) -> None:
    lines(tmp_path / "train.jsonl", [n / 3 for n in range(12)])
    lines(tmp_path / "test.jsonl", [missing] * 5, text="other")
    found = read(tmp_path)
    assert sum(map(len, found.splits.values())) == 12
    assert "5 rows of test have no 'label' and are left out" in found.findings
    lines(tmp_path / "train.jsonl", [-1.0, *(n / 3 for n in range(11))])  # here -1 is a number like others
    if missing is not None:
        assert len(read(tmp_path).splits["test"]) == 5


@pytest.mark.parametrize("tags", [[], [-1, -1], None])
def test_a_test_split_without_tags_is_left_out(tags: Any, tmp_path: Path) -> None:
    rows = [{"tokens": ["a", f"b{n}"], "ner_tags": ["O", "B-X"]} for n in range(8)]
    toy_data.write_jsonl(tmp_path / "train.jsonl", rows)
    toy_data.write_jsonl(tmp_path / "test.jsonl", [{"tokens": ["a", f"c{n}"], "ner_tags": tags} for n in range(4)])
    found = read(tmp_path)
    assert set(found.labels) == {"O", "B-X"}
    assert "4 rows of test have no 'ner_tags' and are left out" in found.findings


def test_labels_that_spell_a_missing_value_are_told(tmp_path: Path) -> None:
    told = "2 examples have a label that spells a missing value (nan, none, null, na)"
    assert told in read(table(tmp_path / "x.csv", ["a", "nan", "b", "NaN", *"abababab"])).findings
    assert read(table(tmp_path / "y.csv", ["a", "nancy", "b"] * 4)).findings == []


def test_columns_of_zeros_and_ones_are_labels(tmp_path: Path) -> None:
    path = table(tmp_path / "x.csv", [f"{n % 2},{n % 3 // 2},0" for n in range(12)], "text,toxic,obscene,threat")
    found = read(path, label_column="toxic, obscene,threat")
    assert found.kind.name == "multi-label-classification"
    assert found.labels == ("toxic", "obscene", "threat")  # also the one that no row has
    by_text = {example.text: example.told["labels"] for split in found.splits.values() for example in split}
    assert by_text["text 1"] == ("toxic",)
    assert by_text["text 5"] == ("toxic", "obscene")
    assert by_text["text 6"] == ()
    rows = [{"text": text, "toxic": bool(n % 2), "obscene": float(n % 3 == 0)} for n, text in enumerate(TEXTS)]
    other = toy_data.write_jsonl(tmp_path / "x.jsonl", rows)
    assert read(other, label_column="toxic,obscene").splits["train"].counts()["toxic"] > 0
    with pytest.raises(DataError, match=r"'toxic' is not one of the labels of this run \(obscene, threat\)"):
        read(path, labels="obscene,threat", label_column="toxic,obscene")


def test_a_column_of_labels_with_another_number_or_none_is_refused(tmp_path: Path) -> None:
    path = table(tmp_path / "x.csv", ["1,0", "0,2", *["1,1"] * 10], "text,toxic,obscene")
    with pytest.raises(DataError, match="line 3, column 'obscene': '2', expected 0 or 1, as the column is a label"):
        read(path, label_column="toxic,obscene")
    with pytest.raises(DataError, match="label-column = 'toxic,rude': there is no such column"):
        read(path, label_column="toxic,rude")
    with pytest.raises(DataError, match="label-column = 'lable': there is no such column"):  # not a text to write
        read(path, label_column="lable")


@pytest.mark.parametrize("labels", [[[0, 1], [1, 0]], [[True, False], [False, True]], ["[0, 1, 0]", "[1, 0, 0]"]])
def test_vectors_of_zeros_and_ones_are_refused_and_the_way_is_named(labels: list[Any], tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"text": t, "label": labels[n % 2]}) + "\n" for n, t in enumerate(TEXTS)))
    with pytest.raises(DataError, match=r"expected the names .* or a column for each .*label-column = 'first,second'"):
        read(path, task="multi-label-classification")
