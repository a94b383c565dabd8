"""Sixty-two ways in which data can be wrong: each is an error that names the file and, where there is one, the line."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from client_app.own.files import read_own
from client_app.own.reading.images import read_image
from client_app.own.reading.text_files import DataError
from client_app.settings import DataSettings, ModelSettings, Settings

GOOD = [json.dumps({"text": f"a text {n}", "label": "pos" if n % 2 else "neg"}) for n in range(8)]
CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
PROMPT = {"prompt": "1+1=", "completion": "2"}


@dataclass(frozen=True)
class Case:
    """A file's content, and what the error must say: where, and words of the finding."""

    content: bytes
    where: str
    words: str
    name: str = "data.jsonl"
    task: str = "text-classification"
    options: dict[str, Any] = field(default_factory=dict)
    labels: str = ""


def lines(*wrong: str | bytes, good: list[str] = GOOD) -> bytes:
    """Two good lines, the wrong ones (the first is line 3), and the rest."""
    rows = [*good[:2], *wrong, *good[2:]]
    return b"\n".join(row if isinstance(row, bytes) else row.encode() for row in rows) + b"\n"


def row(**values: Any) -> str:
    return json.dumps({"text": "a text", "label": "pos"} | values)


def table(*rows: str, name: str = "data.csv") -> Case:
    content = "\n".join(["text,label", *(f"text {n},{n % 2}" for n in range(4)), *rows]) + "\n"
    return Case(content.encode(), "line 6", "", name)


def turns(*messages: Any) -> bytes:
    return lines(json.dumps({"messages": list(messages)}), good=[json.dumps(CHAT)] * 6)


USER, ASSISTANT = CHAT["messages"]
CASES: dict[str, Case] = {
    "not JSON": Case(lines("{text: 1}"), "line 3, column 2", "not valid JSON"),
    "cut in the middle": Case(lines()[:-20], "line 8", "not valid JSON"),
    "two objects on a line": Case(lines(f"{GOOD[0]} {GOOD[1]}"), "line 3", "Extra data"),
    "a JSON array": Case(f"[{', '.join(GOOD)}]".encode(), "line 1", "a JSON array"),
    "a list on a line": Case(lines('["a", "b"]'), "line 3", "a list, expected an object"),
    "a number on a line": Case(lines("17"), "line 3", "a int, expected an object"),
    "an empty object": Case(lines("{}"), "line 3", "without columns"),
    "a column twice": Case(lines('{"text": "a", "text": "b", "label": "pos"}'), "line 3", "'text' occurs twice"),
    "NaN": Case(lines('{"text": "a", "label": NaN}'), "line 3", "NaN"),
    "infinity": Case(lines('{"text": "a", "label": -Infinity}'), "line 3", "-Infinity"),
    "an endless integer": Case(lines('{"text": "a", "label": ' + "9" * 5000 + "}"), "line 3", "digits"),
    "nested without end": Case(lines("[" * 100_000), "line 3", "nested too deeply"),
    "Latin-1": Case(lines('{"text": "café", "label": "pos"}'.encode("latin-1")), "line 3, column 14", "is not UTF-8"),
    "UTF-16": Case("\n".join(GOOD).encode("utf-16"), "line 1", "UTF-16"),
    "a NUL byte": Case(lines(b'{"text": "a\0b", "label": "pos"}'), "line 3, column 12", "NUL"),
    "half a surrogate pair": Case(lines('{"text": "\\ud800", "label": "pos"}'), "line 3, column 'text'", "surrogate"),
    "compressed without .gz": Case(gzip.compress(lines()), "line 1", "compressed"),
    "Parquet called JSONL": Case(b"PAR1" + bytes(64), "line 1", "Parquet"),
    "damaged gzip": Case(gzip.compress(lines())[:-30], "data.jsonl.gz", "", "data.jsonl.gz"),
    "not gzip at all": Case(lines(), "data.jsonl.gz", "", "data.jsonl.gz"),
    "an empty file": Case(b"", "data.jsonl", "no rows"),
    "blank lines only": Case(b"\n\n \n", "data.jsonl", "no rows"),
    "another format": Case(b"x", "data.xlsx", "expected .jsonl", "data.xlsx"),
    "a missing column": Case(lines('{"txt": "a", "label": "pos"}'), "line 3", "did you mean 'txt'"),
    "no label": Case(lines('{"text": "a"}'), "line 3", "no column 'label'"),
    "a null": Case(lines(row(text=None)), "line 3, column 'text'", "null"),
    "a number as text": Case(lines(row(text=3.5)), "line 3, column 'text'", "3.5 is float"),
    "a list as text": Case(lines(row(text=["a"])), "line 3, column 'text'", "is list"),
    "an empty text": Case(lines(row(text="  ")), "line 3, column 'text'", "an empty text"),
    "a fraction as label": Case(lines(row(label=0.5)), "line 3, column 'label'", "0.5 is float"),
    "an empty label": Case(lines(row(label="")), "line 3, column 'label'", "an empty label"),
    "a comma in a label": Case(lines(row(label="a,b")), "line 3, column 'label'", "a comma"),
    "the text as label": Case(lines(row(label="x" * 300)), "line 3, column 'label'", "300 characters"),
    "one label only": Case(lines(good=[GOOD[0]] * 8), "line 1", "the only label is 'neg'"),
    "a label that is not the run's": Case(
        lines(row(label="positive")), "line 3", "'positive' is not one of the labels", labels="pos,neg"
    ),
    "two rows": Case("\n".join(GOOD[:2]).encode(), "line 1", "2 examples, expected at least 3"),
    "a split of another name": Case(
        lines(row(split="holdout"), good=[row(split="train"), row(split="test", label="neg")] * 3),
        "line 3, column 'split'",
        "'holdout'",
        options={"split_column": "split"},
    ),
    "CSV with a field too many": table("a, b,1"),
    "CSV with a field too few": table("a"),
    "CSV with an open quote": table('"a,1'),
    "CSV with text after a quote": table('"a"b,1'),
    "CSV with a column twice": Case(b"text,text\na,b\n", "line 1", "'text' occurs twice", "data.csv"),
    "CSV with a column without a name": Case(b"text,,label\na,b,c\n", "line 1", "field 2", "data.csv"),
    "CSV with a header only": Case(b"text,label\n", "data.csv", "no rows", "data.csv"),
    "CSV called TSV": Case(b"text,label\na,b\nc,d\ne,f\n", "line 2", "no column 'label'", "data.tsv"),
    "CSV put together of files with byte order marks": Case(
        "text,label\na,b\n\ufeffc,d\ne,f\n".encode(), "line 3", "a byte order mark inside", "data.csv"
    ),
    "two JSON arrays": Case(
        f"[{GOOD[0]}, {GOOD[1]}]\n[{GOOD[2]}]\n".encode(), "line 2", "after the end of the array", "data.json"
    ),
    "damaged Parquet": Case(b"PAR1" + bytes(64) + b"PAR1", "data.parquet", "not valid Parquet", "data.parquet"),
    "an empty completion": Case(
        lines(json.dumps({"prompt": "a", "completion": ""}), good=[json.dumps(PROMPT)] * 6),
        "line 3, column 'completion'",
        "an empty text",
        task="causal-lm",
    ),
    "a prompt without completion": Case(
        lines('{"prompt": "a"}', good=[json.dumps(PROMPT)] * 6), "line 3", "no column 'completion'", task="causal-lm"
    ),
    "nothing to learn from": Case(
        lines('{"question": "a"}', good=[json.dumps(PROMPT)] * 6), "line 3", "no column 'prompt'", task="causal-lm"
    ),
    "messages that are no list": Case(
        lines('{"messages": 3}', good=[json.dumps(CHAT)] * 6), "line 3, column 'messages'", "a list", task="causal-lm"
    ),
    "a message without a role": Case(
        turns({"content": "hi"}, ASSISTANT), "line 3, column 'messages', message 1", "role", task="causal-lm"
    ),
    "an unknown role": Case(
        turns({"role": "bot", "content": "hi"}, ASSISTANT), "message 1", "'bot', expected one of", task="causal-lm"
    ),
    "no answer at the end": Case(turns(USER, ASSISTANT, USER), "line 3", "the last message", task="causal-lm"),
    "a system message later on": Case(
        turns(USER, {"role": "system", "content": "x"}, ASSISTANT), "message 2", "system", task="causal-lm"
    ),
    "nobody asks": Case(turns(ASSISTANT), "line 3", "no message of the user", task="causal-lm"),
    "an image that is not there": Case(
        lines('{"image": "no.png", "label": "a"}', good=['{"image": "good.png", "label": "b"}'] * 4),
        "line 3, column 'image'",
        "no file",
        task="image-classification",
    ),
    "an image at a web address": Case(
        lines('{"image": "http://x/a.png", "label": "a"}', good=['{"image": "good.png", "label": "b"}'] * 4),
        "line 3, column 'image'",
        "on this machine",
        task="image-classification",
    ),
    "a number as image": Case(
        lines('{"image": 3, "label": "a"}', good=['{"image": "good.png", "label": "b"}'] * 4),
        "line 3, column 'image'",
        "path of an image",
        task="image-classification",
    ),
}


def settings_for(path: Path, case: Case) -> Settings:
    model = ModelSettings(task=case.task, labels=case.labels)
    data = DataSettings(data_path=str(path), **case.options)
    return Settings("berlin", path.parent / "state", "digits", 0, 1, 0, 8, 16.0, 0.0, model, data)


def good_image(path: Path) -> None:
    PIL.Image.new("RGB", (4, 4)).save(path)


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_file_is_refused_by_file_and_line(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    good_image(tmp_path / "good.png")
    path = tmp_path / case.name
    path.write_bytes(case.content)
    with pytest.raises(DataError) as caught:
        read_own(settings_for(path, case))
    said = str(caught.value)
    assert said.startswith(str(path))
    assert case.where in said
    assert case.words in said
    assert len(said) < 600


def test_the_same_files_without_the_wrong_line_are_good(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    for task, good in (("text-classification", GOOD), ("causal-lm", [json.dumps(CHAT)] * 6)):
        path.write_bytes(lines(good=good))
        found = read_own(settings_for(path, Case(b"", "", "", task=task)))
        assert sum(map(len, found.splits.values())) == len(good)


def png() -> bytes:
    buffer = io.BytesIO()
    PIL.Image.effect_noise((64, 64), 50).save(buffer, "PNG")
    return buffer.getvalue()


WRONG_IMAGES: dict[str, Callable[[], bytes]] = {
    "text": lambda: b"this is not an image",
    "empty": lambda: b"",
    "cut": lambda: png()[:-200],
    "damaged": lambda: png()[:200] + bytes(400) + png()[600:],
}


@pytest.mark.parametrize("kind", WRONG_IMAGES)
def test_an_image_that_cannot_be_decoded_is_named_with_its_row(kind: str, tmp_path: Path) -> None:
    good_image(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(WRONG_IMAGES[kind]())
    rows = ['{"image": "good.png", "label": "b"}', '{"image": "bad.png", "label": "a"}'] * 2
    path = tmp_path / "data.jsonl"
    path.write_bytes(lines(good=rows))
    found = read_own(settings_for(path, Case(b"", "", "", task="image-classification")))
    bad = next(e for split in found.splits.values() for e in split if str(e.images[0]).endswith("bad.png"))
    with pytest.raises(DataError, match=r"data\.jsonl, line \d: .*bad\.png is not an image") as caught:
        read_image(bad.images[0], bad.place)
    assert "line 2" in str(caught.value) or "line 4" in str(caught.value)


def test_a_folder_with_a_file_of_no_split_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(lines())
    (tmp_path / "more.jsonl").write_bytes(lines())
    with pytest.raises(DataError, match=r"more\.jsonl: .*begin with its split"):
        read_own(settings_for(tmp_path, Case(b"", "", "")))


def test_a_missing_file_is_not_taken_for_a_hub_id(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such file or folder"):
        read_own(settings_for(tmp_path / "none.jsonl", Case(b"", "", "")))


def test_a_hub_id_that_is_not_in_the_cache_says_what_to_download(tmp_path: Path) -> None:
    settings = settings_for(tmp_path / "x", Case(b"", "", ""))
    wanted = DataSettings(data_path="nobody/nothing-here")
    with pytest.raises(DataError, match=r"datasets\.load_dataset\('nobody/nothing-here'\)"):
        read_own(Settings(**{**vars(settings), "data": wanted}))
