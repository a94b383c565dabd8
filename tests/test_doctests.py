"""The examples in docstrings of the algebra and of merge rules give what they say."""

from __future__ import annotations

import doctest
import importlib

import pytest

MODULES = (
    "fedalloy_adapters.algebra",
    "strategies.algorithms.fedamp",
    "strategies.algorithms.nan_merge",
    "strategies.algorithms.pfedgraph",
    "strategies.algorithms.ties",
)


@pytest.mark.parametrize("module", MODULES)
def test_examples_in_docstrings_are_right(module: str) -> None:
    result = doctest.testmod(importlib.import_module(module))
    assert result.attempted, f"{module} has no example"
    assert not result.failed
