"""A row in is an example in: quotes, blanks, several files, splits without labels, and copies under other names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from client_app.own.files import load_own, read_own
from client_app.own.reading.readers import read_table
from client_app.own.reading.text_files import DataError
from tests.client_app.own_clients import settings_of
from tests.toys import tiny_models, toy_data

ROWS = [{"text": f"text {n}", "label": ("no", "yes")[n % 2]} for n in range(12)]


def write(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, newline="")
    return path


def values(path: Path | str, config: str = "") -> list[tuple[str | None, dict[str, Any]]]:
    table = read_table(str(path), config)
    return [(split, dict(row.values)) for split, row in zip(table.splits, table.rows, strict=True)]


def test_quotes_in_a_tsv_file_do_not_join_rows(tmp_path: Path) -> None:
    """As in GLUE's files: nothing is quoted, and a text may begin or end with a quote."""
    lines = ["text\tlabel", '"He came\t1', "plain\t0", 'and went"\t1', 'a "word"\t0']
    table = read_table(str(write(tmp_path / "x.tsv", "\n".join(lines) + "\n")))
    assert [row.values["text"] for row in table.rows] == ['"He came', "plain", 'and went"', 'a "word"']
    assert table.findings == ["quotes are read as they are (3 lines): read as quotes they would join rows"]
    joined = write(tmp_path / "joined.tsv", "\n".join(["text\tlabel", '"a\t1', 'b"\t0', "c\t1"]))
    assert [row.values["text"] for row in read_table(str(joined)).rows] == ['"a', 'b"', "c"]
    quoted = write(tmp_path / "quoted.tsv", 'text\tlabel\n"one\ntwo"\t1\n"a ""b"""\t0\n')
    assert [row.values["text"] for row in read_table(str(quoted)).rows] == ["one\ntwo", 'a "b"']
    told = ["1 rows have several lines, in quotes (the longest has 2 lines)"]
    assert read_table(str(quoted)).findings == told


def test_a_quote_that_joins_whole_rows_of_a_csv_file_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", 'text,label\nfine,1\n"a,1\nb,0\nc",1\nd,0\n')
    with pytest.raises(DataError, match=r"x\.csv, line 3: a quote joins lines 3 to 5 in one row"):
        read_table(str(path))


def test_a_csv_file_of_several_put_together_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", "\ufefftext,label\na,1\n\ufefftext,label\nb,0\n")
    with pytest.raises(DataError, match=r"x\.csv, line 3: the header once more"):
        read_table(str(path))


def test_semicolons_and_blank_lines_are_told(tmp_path: Path) -> None:
    table = read_table(str(write(tmp_path / "x.csv", "text;label\r\na, b;1\r\n\r\nc;0\r\n")))
    assert [dict(row.values) for row in table.rows] == [{"text": "a, b", "label": "1"}, {"text": "c", "label": "0"}]
    assert [row.place.rsplit(", ")[-1] for row in table.rows] == ["line 2", "line 4"]
    assert table.findings == ["fields are divided by semicolons", "1 blank lines were skipped"]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("wrap", [lambda rows: rows, lambda rows: {"version": 1, "data": rows}])
def test_json_files_have_arrays_and_name_lines(tmp_path: Path, indent: int | None, wrap: Any) -> None:
    path = write(tmp_path / "x.json", json.dumps(wrap(ROWS), indent=indent))
    assert [row for _, row in values(path)] == ROWS
    last = read_table(str(path)).rows[-1]
    lines = path.read_text().split("\n")
    number = int(last.place.rsplit(" ", 1)[1])
    assert "text 11" in "\n".join(lines[number - 1 : number + 2])
    broken = write(tmp_path / "y.json", path.read_text().replace('"text 3"', "text 3"))
    with pytest.raises(DataError, match=r"y\.json, line \d+, column \d+: not valid JSON"):
        read_table(str(broken))
    toy_data.write_jsonl(tmp_path / "z.json", ROWS)  # one object a line
    assert [row for _, row in values(tmp_path / "z.json")] == ROWS


def test_several_files_by_a_pattern(tmp_path: Path) -> None:
    for number in range(3):
        toy_data.write_jsonl(tmp_path / f"part-{number}.jsonl", ROWS[4 * number : 4 * number + 4])
    assert values(tmp_path / "part-*.jsonl") == [(None, row) for row in ROWS]
    toy_data.write_jsonl(tmp_path / "split" / "train-0.jsonl", ROWS[:8])
    toy_data.write_jsonl(tmp_path / "split" / "test-0.jsonl", ROWS[8:])
    assert values(tmp_path / "split" / "*.jsonl") == [("test", r) for r in ROWS[8:]] + [("train", r) for r in ROWS[:8]]


def test_folders_as_datasets_and_the_hub_have_them(tmp_path: Path) -> None:
    named = datasets.ClassLabel(names=["no", "yes"])
    features = datasets.Features({"text": datasets.Value("string"), "label": named})
    numbered = [row | {"label": ("no", "yes").index(row["label"])} for row in ROWS]
    train, test = (datasets.Dataset.from_list(part, features=features) for part in (numbered[:8], numbered[8:]))
    expected = [("train", row) for row in ROWS[:8]] + [("test", row) for row in ROWS[8:]]
    datasets.DatasetDict({"train": train, "test": test, "extra": test}).save_to_disk(tmp_path / "saved")
    assert values(tmp_path / "saved") == expected
    assert read_table(str(tmp_path / "saved")).findings == ["4 rows of split 'extra' are not used"]
    train.save_to_disk(tmp_path / "alone")
    assert values(tmp_path / "alone") == [(None, row) for row in ROWS[:8]]
    assert values(next((tmp_path / "alone").glob("*.arrow"))) == [(None, row) for row in numbered[:8]]
    for config in ("sst2", "cola"):
        (tmp_path / "hub" / config).mkdir(parents=True)
        train.to_parquet(tmp_path / "hub" / config / "train-00000-of-00001.parquet")
        test.to_parquet(tmp_path / "hub" / config / "validation_matched-00000-of-00001.parquet")
    assert values(tmp_path / "hub", "sst2") == [(("train", "validation")[s == "test"], row) for s, row in expected]
    write(
        tmp_path / "hub" / "README.md",
        "---\nconfigs:\n- config_name: one\n  data_files:\n  - split: train\n    path: sst2/train-*\n"
        "- config_name: two\n  data_files:\n  - split: test\n    path: [cola/*]\n---\n# A card\n",
    )
    assert values(tmp_path / "hub", "one") == expected[:8]
    with pytest.raises(DataError, match="data-config = '', expected one of one, two"):
        values(tmp_path / "hub")


@pytest.mark.parametrize("unlabelled", [-1, None, ""])
def test_a_test_split_without_labels_is_left_out_and_told(tmp_path: Path, unlabelled: Any) -> None:
    for name, part in (("train", ROWS), ("validation", ROWS[:4])):
        toy_data.write_jsonl(tmp_path / "x" / f"{name}.jsonl", part)
    toy_data.write_jsonl(tmp_path / "x" / "test.jsonl", [row | {"label": unlabelled} for row in ROWS[:5]])
    found = read_own(settings_of(tmp_path / "x", tmp_path))
    assert {name: len(split) for name, split in found.splits.items()} == {"train": 11, "validation": 4, "test": 1}
    assert "5 rows of test have no 'label' and are left out" in found.findings
    assert "21 rows were read, 16 are examples" in found.findings
    found = read_own(settings_of(tmp_path / "x", tmp_path, data={"split_fractions": "1,0,0"}))
    assert {name: len(split) for name, split in found.splits.items()} == {"train": 12, "validation": 4}
    toy_data.write_jsonl(tmp_path / "x" / "test.jsonl", [*ROWS[:2], ROWS[2] | {"label": None}])
    with pytest.raises(DataError, match=r"test\.jsonl, line 3, column 'label': null"):
        read_own(settings_of(tmp_path / "x", tmp_path))


def test_copies_of_an_image_are_found_by_content(tmp_path: Path) -> None:
    base = tiny_models.save_vit(tmp_path / "vit")
    for split, seed in (("train", 0), ("test", 50)):  # other pictures of the same names
        toy_data.write_pictures(tmp_path / "named" / split, 6, seed)
    assert not any("in train" in n for n in load_own(settings_of(tmp_path / "named", tmp_path, base))[1].notes)
    for colour in toy_data.COLOURS:
        (tmp_path / "twins" / colour).mkdir(parents=True)
        for number in range(20):
            toy_data.picture(colour, 20, number // 2).save(tmp_path / "twins" / colour / f"{number}.png")
    found = read_own(settings_of(tmp_path / "twins", tmp_path))
    contents = {name: {example.content for example in split} for name, split in found.splits.items()}
    assert not contents["train"] & (contents["test"] | contents["validation"])
    assert any("copies" in note for note in load_own(settings_of(tmp_path / "twins", tmp_path, base))[1].notes)


def labels_of(tmp_path: Path, *labels: Any, shared: str = "") -> tuple[str, ...]:
    rows = [{"text": f"t {n}", "label": labels[n % len(labels)]} for n in range(12)]
    return read_own(settings_of(toy_data.write_jsonl(tmp_path / "x.jsonl", rows), tmp_path, labels=shared)).labels


def test_a_label_is_its_name(tmp_path: Path) -> None:
    assert labels_of(tmp_path, "s\u00e9c", "se\u0301c", "x") == ("s\u00e9c", "x")
    assert labels_of(tmp_path, "se\u0301c", "x", shared="x,s\u00e9c") == ("x", "s\u00e9c")
    assert labels_of(tmp_path, "🤷‍♀️", "👍🏽") == ("👍🏽", "🤷‍♀️")
    assert labels_of(tmp_path, "می‌خواهم", "خبر") == ("خبر", "می‌خواهم")
    assert labels_of(tmp_path, "tr\u00e8s\u00a0bon", "bof") == ("bof", "tr\u00e8s\u00a0bon")
    assert labels_of(tmp_path, 1.0, 2.0, 10.0) == ("1", "2", "10")
    with pytest.raises(DataError, match="control character"):
        labels_of(tmp_path, "a\x07b", "c")


def test_columns_that_are_not_read_are_told(tmp_path: Path) -> None:
    rows = [row | {"idx": 1, "source": "web"} for row in ROWS]
    found = read_own(settings_of(toy_data.write_jsonl(tmp_path / "x.jsonl", rows), tmp_path))
    assert found.findings == ["columns that are not read: 'idx', 'source'"]


def test_a_first_column_without_a_name_is_the_numbers_of_rows(tmp_path: Path) -> None:
    """As pandas writes them."""
    path = write(tmp_path / "x.csv", ",text,label\n0,a b,yes\n1,c d,no\n2,e f,yes\n")
    assert values(path)[1] == (None, {"": "1", "text": "c d", "label": "no"})
    assert "columns that are not read: ''" in read_own(settings_of(path, tmp_path)).findings
    for header in ("text,,label", ""):
        with pytest.raises(DataError, match="no rows" if not header else "field 2 of the header is empty"):
            read_table(str(write(tmp_path / "y.csv", f"{header}\n" + ("a,b,c\n" if header else ""))))


def test_quotes_after_a_blank_are_letters_and_told(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", 'text,label\n"a", "yes"\nb,no\n"c", "yes"\n')
    found = read_table(str(path))
    assert [row.values["label"] for row in found.rows] == [' "yes"', "no", ' "yes"']
    assert found.findings == ["2 fields have a blank before their quotes, which are read as letters"]


def test_the_longest_row_of_a_csv_file_is_told(tmp_path: Path) -> None:
    """A quote too many joins rows; where others have several lines, too, a reader of the notes can see it."""
    path = write(tmp_path / "x.csv", 'text,label\n"one\ntwo",a\n"oops,a\nb,b\nc,a\nbad",b\nd,a\n')
    told = "2 rows have several lines, in quotes (the longest has 4 lines)"
    assert read_table(str(path)).findings == [told]
