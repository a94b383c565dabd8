"""The examples in docstrings of the algebra and of merge rules give what they say."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = [ROOT / "fedalloy_adapters" / "algebra.py", *sorted((ROOT / "strategies").rglob("*.py"))]
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in FILES
    if ">>> " in path.read_text(encoding="utf-8")
]


def test_merge_rules_have_examples() -> None:
    assert len(MODULES) >= 5


@pytest.mark.parametrize("module", MODULES)
def test_examples_in_docstrings_are_right(module: str) -> None:
    result = doctest.testmod(importlib.import_module(module))
    assert result.attempted, f"{module} has no example"
    assert not result.failed
