"""One engine for the cluster's tests, or one line that says why they were skipped."""

from __future__ import annotations

import pytest

from tests.docker.engine import ENGINE, Engine, NoEngineError, engine


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Start or find an engine for the first test; a skip from here is one line for all of them."""
    found = item.config.stash.get(ENGINE, None)
    if found is None:
        found = item.config.stash[ENGINE] = Engine()
        try:
            found.environment = found.cleanup.enter_context(engine())
        except NoEngineError as error:
            found.missing = str(error)
    if found.missing:
        pytest.skip(found.missing)
