"""Neither chance nor the terminal decides a test: what tests/conftest.py sees to."""

from __future__ import annotations

import os
import random

import hypothesis
import numpy as np
import pytest
import torch
from torch import Tensor


@pytest.fixture(params=["here", "and there"])
def drawn(request: pytest.FixtureRequest) -> Tensor:
    return torch.rand(3)


def test_unseeded_numbers_are_the_same_in_every_test(drawn: Tensor) -> None:
    expected = torch.rand(3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(drawn, expected)
    assert torch.equal(torch.rand(3), expected)
    assert random.random() == random.Random(0).random()
    assert np.random.rand() == np.random.RandomState(0).rand()


def examples() -> list[str]:
    found = []

    @hypothesis.given(hypothesis.strategies.floats())
    def collect(value: float) -> None:
        found.append(repr(value))

    collect()
    return found


def test_properties_see_the_same_examples_in_every_run() -> None:
    assert examples() == examples()


def test_no_terminal_is_forced_on_what_commands_print() -> None:
    assert not {"COLUMNS", "FORCE_COLOR", "GITHUB_ACTIONS", "NO_COLOR"} & set(os.environ)
