"""Public data sets as they are, where they lie beside this repository: each is taken for its kind of task."""

from __future__ import annotations

from pathlib import Path

import pytest

from client_app.kinds import KINDS
from client_app.own.files import read_own
from tests.benchmarks.data import cases, public_sets
from tests.client_app.own_clients import settings_of
from tests.test_repository import ROOT


@pytest.mark.parametrize("found", public_sets.SETS, ids=lambda one: one.name)
def test_a_public_data_set_is_taken_for_its_kind(found: public_sets.PublicSet, tmp_path: Path) -> None:
    if not (public_sets.DATA / found.path).exists():
        pytest.skip(f"{found.path} of github.com/{found.source} is not here (tests/benchmarks/data/public_sets.py)")
    path = public_sets.linked(found, public_sets.DATA, tmp_path / "links")
    keys = {name.replace("-", "_"): value for name, value in found.keys.items() if name.endswith("-column")}
    read = read_own(settings_of(path, tmp_path, data=keys))
    assert read.kind.name == found.kind
    assert set(read.splits) == {"train", "validation", "test"}
    assert bool(read.labels) == KINDS[found.kind].has_labels


def test_a_set_of_links_names_its_files_and_leaves_them_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "one.txt").write_text("text\tlabel\na\tb\n")
    found = public_sets.PublicSet("x", "o/r@1", "TSV", "text-classification", "data", "BERT", {"train.tsv": "one.txt"})
    link = Path(public_sets.linked(found, tmp_path, tmp_path / "links")) / "train.tsv"
    assert link.resolve() == tmp_path / "data" / "one.txt"
    absent = public_sets.PublicSet("x", "o/r@1", "TSV", "text-classification", "none", "ViT")
    assert "copy it from github.com/o/r@1" in public_sets.missing(absent, tmp_path)


def test_the_documentation_has_every_set_that_runs() -> None:
    page = (ROOT / "docs" / "results" / "public-data.md").read_text()
    rows = {line.split("|")[1].strip() for line in page.splitlines() if line.startswith("| ")}
    assert {found.name for found in public_sets.SETS} <= rows


def test_a_case_is_right_if_all_is_there_as_often_and_nothing_else() -> None:
    right = cases.Right([r"same: True"] * 2, r"same: False|Traceback")
    assert cases.wrong_in("same: True\nsame: True\n", right) == []
    assert cases.wrong_in("same: True\n", right) == ["lacks same: True"]
    assert cases.wrong_in("same: True\nsame: True\nsame: False", right) == ["has same: False"]
