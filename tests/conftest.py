"""Plumbing that every test shares: quiet libraries, one thread, tiers by folder. Fixtures live near their tests."""

from __future__ import annotations

import gc
import os
from pathlib import Path

# Before anything imports torch or Flower. Test processes and the processes they start share two cores on CI.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import pytest

# No test asserts a duration; by default hypothesis fails an example that takes 200 ms, as any may on a busy machine.
hypothesis.settings.register_profile("fedalloy", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("fedalloy")

FAULTS = Path(__file__).parent / "faults"
E2E = (Path(__file__).parent / "e2e", Path(__file__).parent / "docker")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything below tests/e2e, tests/docker and tests/faults is of that tier; a test marked gpu needs one."""
    without_gpu = pytest.mark.skip(reason="no CUDA device on this machine")
    for item in items:
        if any(folder in item.path.parents for folder in E2E):
            item.add_marker(pytest.mark.e2e)
        if FAULTS in item.path.parents:
            item.add_marker(pytest.mark.faults)
        if item.get_closest_marker("gpu") is not None and not _has_gpu():
            item.add_marker(without_gpu)


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


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
