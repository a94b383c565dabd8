"""Plumbing that every test shares: quiet libraries, one thread, tiers by folder. Fixtures of one folder
live there."""

from __future__ import annotations

import gc
import io
import logging
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

# Before anything imports torch or Flower. Test processes and the processes they start share two cores on CI.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import pytest

from strategies.framework.training import Training

# What tests read of a command's output depends on neither the terminal nor the CI service that they run in.
for name in (
    "CLICOLOR_FORCE", "COLUMNS", "FORCE_COLOR", "GITHUB_ACTIONS", "LINES", "NO_COLOR", "PY_COLORS", "TERMINAL_WIDTH",
    "TTY_COMPATIBLE",
):  # fmt: skip
    os.environ.pop(name, None)

# No test asserts a duration; by default hypothesis fails an example that takes 200 ms, as any may on a busy machine.
# The same examples in every run, for a test that fails now and then tells nobody what broke it; tests/fuzz and
# FUZZ_EXAMPLES look for new ones.
hypothesis.settings.register_profile(
    "fedalloy", deadline=None, derandomize=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("fedalloy")


def exact() -> None:
    """In this process, adapters travel in fp32 where nothing says otherwise: most tests compare with closed forms.

    Processes that tests start have the product's default.
    """
    fields = zip(Training.__dataclass_fields__, Training.__init__.__defaults__ or (), strict=True)
    defaults = tuple("fp32" if key.endswith("_encoding") else value for key, value in fields)
    Training.__init__.__defaults__ = defaults


exact()

FAULTS = Path(__file__).parent / "faults"
E2E = (Path(__file__).parent / "e2e", Path(__file__).parent / "docker")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything below tests/e2e, tests/docker and tests/faults is of that tier; a test marked gpu needs one.

    Tests marked long begin first, or one worker would still be busy with them when all others are done.
    """
    without_gpu = pytest.mark.skip(reason="no CUDA device on this machine")
    for item in items:
        if any(folder in item.path.parents for folder in E2E):
            item.add_marker(pytest.mark.e2e)
        if FAULTS in item.path.parents:
            item.add_marker(pytest.mark.faults)
        if item.get_closest_marker("gpu") is not None and not _has_gpu():
            item.add_marker(without_gpu)
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.fixture
def printed() -> Iterator[io.StringIO]:
    """What Flower's logger prints; as it was afterwards."""
    logger, found = logging.getLogger("flwr"), io.StringIO()
    handler, before = logging.StreamHandler(found), list(logger.filters)
    logger.addHandler(handler)
    yield found
    logger.removeHandler(handler)
    logger.filters[:] = before


@pytest.fixture(scope="session")
def base_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where built-in scenarios keep their base models, which take seconds to make: one folder for all workers' tests.

    A ``.cache`` of state directories; a file lock decides which process makes a model.
    """
    own = tmp_path_factory.getbasetemp()
    shared = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "base-models"
    shared.mkdir(exist_ok=True)
    return shared


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup() -> Iterator[None]:
    """A fixture draws the same numbers in every run, whatever was drawn before it."""
    _seed()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    """A test draws the same numbers alone, in another order, and on another worker."""
    _seed()
    return (yield)


def pytest_collection_finish() -> None:
    """Clients collect garbage before they load a model; libraries and tests need not be searched each time."""
    gc.collect()
    gc.freeze()


def pytest_report_header() -> str:
    """The versions that numbers depend on."""
    from importlib.metadata import PackageNotFoundError, version

    found = []
    for name in ("flwr", "torch", "transformers", "peft", "protobuf", "grpcio"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} not installed")
    return ", ".join(found)


def _seed() -> None:
    random.seed(0)
    # Not imported for this: some tests need neither. A torch that is imported later starts with a seed of its own.
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
