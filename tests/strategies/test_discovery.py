"""Strategies are found by their names: a new one is a new file."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

import strategies
from strategies import CONTROLS, MAIN, STRATEGIES, find_strategies

ONE = """
from strategies.algorithms.fedavg import FedAvg
from strategies.framework.contract import About

class {kind}(FedAvg):
    name = "{name}"
    about = About("something", group="{group}")

class Helper(FedAvg):
    pass
"""
Build = Callable[..., ModuleType]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Build]:
    """A package of these modules, by name; it is forgotten afterwards."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def build(**modules: str) -> ModuleType:
        folder = tmp_path / "found_here"
        folder.mkdir()
        (folder / "__init__.py").touch()
        for name, text in modules.items():
            (folder / f"{name}.py").write_text(text)
        importlib.invalidate_caches()
        return importlib.import_module("found_here")

    yield build
    for name in [name for name in sys.modules if name.partition(".")[0] == "found_here"]:
        del sys.modules[name]


def test_a_class_with_a_name_is_a_strategy_and_nothing_else_is(package: Build) -> None:
    """FedAvg, which both files import, and a class without a name are not."""
    found = find_strategies(
        package(
            a=ONE.format(kind="Zulu", name="zulu", group="related"),
            b=ONE.format(kind="Alpha", name="alpha", group="related"),
            c=ONE.format(kind="Most", name="most", group="main"),
            mathematics="def norm(x):\n    return abs(x)\n",
        )
    )
    assert list(found) == ["most", "alpha", "zulu"]  # by group, then by name, whatever the file is called
    assert [kind.__name__ for kind in found.values()] == ["Most", "Alpha", "Zulu"]


def test_two_of_one_name_are_both_named(package: Build) -> None:
    one = ONE.format(kind="First", name="same", group="related")
    two = ONE.format(kind="Second", name="same", group="related")
    with pytest.raises(ImportError, match=r"named 'same': found_here\.a\.First and found_here\.b\.Second"):
        find_strategies(package(a=one, b=two))


def test_one_that_says_nothing_about_itself_is_named(package: Build) -> None:
    text = ONE.format(kind="Mute", name="mute", group="related").replace("about =", "other =")
    with pytest.raises(ImportError, match=r"strategy 'mute' \(found_here.a.Mute\) has no `about`"):
        find_strategies(package(a=text))


def test_every_class_with_a_name_in_the_files_is_found() -> None:
    """Looked for as text, so that a strategy that discovery loses is missed."""
    folder = Path(strategies.__file__).parent / "algorithms"
    names = [
        line for path in folder.glob("*.py") for line in path.read_text().splitlines() if line.startswith("    name = ")
    ]
    assert sorted(line.split('"')[1] for line in names) == sorted(STRATEGIES)


def test_groups_that_comparisons_and_fault_tests_use() -> None:
    assert set(MAIN) == {"fedmerge", "fedmosaic", "potara", "tap"}
    assert set(CONTROLS) == {"fedavg-head", "fedavg-tuned", "local-all", "local-twice"}
    assert list(STRATEGIES)[:2] == ["fedavg", "local"]
