"""Run-config, its reference and the table of strategies are made from the code."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path

import pytest

from server_app.run.options import OPTIONS, known_keys
from server_app.run.run_directory import dotted
from server_app.tools import reference
from server_app.tools.reference import BEGIN, END, as_markdown, options_of, run_config_toml, with_run_config
from strategies import STRATEGIES


@dataclasses.dataclass(frozen=True)
class Inherited:
    rank: int = 3
    """Of the adapter; ``0``: none."""


@dataclasses.dataclass(frozen=True)
class Own(Inherited):
    max_share: float = 0.5
    """Below :func:`len`,
    or ``a | b``."""
    quiet: bool = False
    """Say nothing."""

    def __post_init__(self) -> None:
        """Not an option."""


def test_an_option_is_a_field_with_its_meaning_below_it() -> None:
    found = options_of(Own, "own.")
    assert [(option.key, option.type, option.default) for option in found] == [
        ("own.rank", "integer", 3),
        ("own.max-share", "number", 0.5),
        ("own.quiet", "true or false", False),
    ]
    assert [option.meaning for option in found] == [
        "Of the adapter; `0`: none.",
        "Below `len`, or `a \\| b`.",
        "Say nothing.",
    ]


@dataclasses.dataclass(frozen=True)
class Silent:
    rank: int = 3
    share: float = 0.5
    """The only option with a description."""


@dataclasses.dataclass(frozen=True)
class Listed:
    names: tuple[str, ...] = ()
    """Run-config has no lists."""


@dataclasses.dataclass(frozen=True)
class Open:
    rank: int
    """Without a default."""


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Silent, "Silent.rank has no string below it"),
        (Listed, r"Listed.names is a tuple\[str, ...\], expected one of bool, int, float, str"),
        (Open, "Open.rank has no default"),
    ],
)
def test_a_field_that_cannot_be_an_option_is_named(kind: type[object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        options_of(kind)


def test_every_key_of_run_config_is_in_what_flower_reads_with_its_default() -> None:
    config = tomllib.loads(run_config_toml())["tool"]["flwr"]["app"]["config"]
    assert dict(dotted(config)) == known_keys()


def test_every_key_is_declared_once() -> None:
    keys = [option.key for prefix, kind in OPTIONS for option in options_of(kind, prefix)]
    assert sorted(keys) == sorted(set(keys))


def test_only_what_stands_between_the_markers_is_replaced() -> None:
    before, after = "[project]\nname = 'x'\n", "\n[tool.ruff]\n"
    text = with_run_config(f"{before}{BEGIN}\nold = 1\n{END}{after}")
    assert text.startswith(before + BEGIN)
    assert text.endswith(END + after)
    assert "old = 1" not in text
    assert with_run_config(text) == text


@pytest.mark.parametrize("text", ["", BEGIN, f"{BEGIN}\n{END}\n{BEGIN}\n{END}\n"])
def test_markers_that_are_missing_or_twice_there_are_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="expected one line"):
        with_run_config(text)


def test_pages_have_a_row_for_every_key_and_every_strategy() -> None:
    options, strategies = reference.options_page(), reference.strategies_page()
    assert [key for key in known_keys() if f"| `{key}` |" not in options] == []
    assert [name for name in STRATEGIES if f"| [`{name}`](../strategies/" not in strategies] == []
    for name, kind in STRATEGIES.items():
        assert kind.about.when, f"{name} does not say when to try it"
        assert f" | {kind.about.when} | " in strategies
        assert (f"(options.md#{name})" in strategies) == bool(dataclasses.fields(kind.Options))
        assert (f"\n## {name}\n" in options) == bool(dataclasses.fields(kind.Options))


def test_a_strategys_row_links_to_the_paper_that_its_docstring_names() -> None:
    assert reference.paper_of(STRATEGIES["potara"]) == " ([paper](https://arxiv.org/abs/2602.18658))"
    assert reference.paper_of(STRATEGIES["local"]) == ""
    assert f"{reference.paper_of(STRATEGIES['tap'])} |" in reference.strategies_page()


def test_check_names_what_differs_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    project = tmp_path / "pyproject.toml"
    project.write_text(f"{BEGIN}\n{END}\n")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "data-and-models.md").write_text("")
    monkeypatch.setattr(reference, "ROOT", tmp_path)
    monkeypatch.setattr(reference, "strategies_page", lambda: "a table\n")  # its paths are below the real root
    monkeypatch.setattr(reference, "with_kinds", lambda page: page)
    assert reference.main(["--check"]) == 1
    assert "pyproject.toml, docs/options.md, docs/strategies.md" in capsys.readouterr().out
    assert project.read_text() == f"{BEGIN}\n{END}\n"
    assert reference.main([]) == 0
    assert reference.main(["--check"]) == 0
    assert tomllib.loads(project.read_text())["tool"]["flwr"]["app"]["config"]["local-steps"] == 30


def test_markup_of_docstrings_becomes_markdown() -> None:
    assert as_markdown("See :class:`~a.b.C`\n  and\n``x``.") == "See `a.b.C` and `x`."
