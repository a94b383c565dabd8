"""A Docker engine for the tests: the one that answers, else one that a script beside the checkout starts for them.

Nothing of it outlives the test process: the script's shell waits for the end of its standard input, however that comes,
and then stops what it started.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = Path(os.environ.get("FEDALLOY_ENGINE_SCRIPT", ROOT.parent / "shared" / "tools" / "docker-engine.sh"))
OLDEST_COMPOSE = (2, 20, 2)  # `required: false` of a dependency
BASE_IMAGE = "python:3.11-slim-bookworm"  # the Dockerfile's
_BASE = (("image", "inspect", BASE_IMAGE), ("pull", "--quiet", BASE_IMAGE))
_SHELL = """
. "$1"
engine_up || { echo "no: $ENGINE_WHY"; exit 0; }
echo "up: $DOCKER_HOST $DOCKER_CONFIG"
cat > /dev/null
engine_down
"""


CAP = 25 * 60
"""Seconds for everything here, the engine's start and the image's build included; an idle machine needs a third."""


@dataclass
class Engine:
    """What the tests of this folder share; ``missing`` says why there is none."""

    deadline: float = field(default_factory=lambda: time.monotonic() + CAP)
    environment: dict[str, str] = field(default_factory=dict)
    missing: str = ""
    cleanup: ExitStack = field(default_factory=ExitStack)


ENGINE = pytest.StashKey[Engine]()


class NoEngineError(RuntimeError):
    """No Docker engine can be had here; the message is the reason."""


@contextmanager
def engine() -> Iterator[dict[str, str]]:
    """The environment in which ``docker compose`` works.

    Raises:
        NoEngineError: it does not, and nothing here can change that.
    """
    environment = dict(os.environ)
    problem = _problem(environment)
    if not problem and (not SCRIPT.exists() or _can_build(environment)):
        yield environment
        return
    if not SCRIPT.exists() or environment.get("CC_ENGINE") == "off":
        raise NoEngineError(problem)
    given = {"CC_INSTALL": "1"} | environment
    shell = subprocess.Popen(
        ["bash", "-c", _SHELL, "engine", str(SCRIPT)], env=given, text=True, start_new_session=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert shell.stdin is not None
    assert shell.stdout is not None
    try:
        said = next((line for line in shell.stdout if line.startswith(("up: ", "no: "))), "no: it said nothing")
        if said.startswith("no: "):
            raise NoEngineError("; ".join(dict.fromkeys(filter(None, [problem, said[4:].strip()]))))
        host, _, config = said[4:].rstrip("\n").partition(" ")
        mine = {"DOCKER_HOST": host, "DOCKER_CONFIG": config}
        environment |= {name: value for name, value in mine.items() if value}
        yield environment
    finally:
        shell.stdin.close()
        shell.wait(timeout=120)
        shell.stdout.close()


def _problem(environment: dict[str, str]) -> str:
    """Why ``docker compose`` does not work in this environment; empty if it does."""
    if environment.get("CC_ENGINE") == "off":
        return "no Docker engine: turned off (CC_ENGINE=off)"
    try:
        info = _docker(environment, "info", "--format", "{{.ServerVersion}}")
        if info.returncode != 0:
            return "no Docker engine answers"
        version = _docker(environment, "compose", "version", "--short")
    except FileNotFoundError:
        return "no docker command"
    except subprocess.TimeoutExpired:
        return "the Docker engine does not answer"
    found = tuple(int(part) for part in re.findall(r"\d+", version.stdout)[:3])
    if version.returncode != 0 or found < OLDEST_COMPOSE:
        wanted = ".".join(map(str, OLDEST_COMPOSE))
        return f"docker compose {version.stdout.strip() or 'is missing'}, expected {wanted} or newer"
    return ""


def _can_build(environment: dict[str, str]) -> bool:
    """Whether the image's base is there or can be pulled."""
    try:
        return any(_docker(environment, *command).returncode == 0 for command in _BASE)
    except subprocess.TimeoutExpired:
        return False


def _docker(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["docker", *arguments], capture_output=True, text=True, env=environment, timeout=60, check=False
    )
