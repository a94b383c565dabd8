"""What is installed: all strategies are found, and packages with names like ours, in the same folder, still import."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

from strategies import STRATEGIES

ROOT = Path(__file__).parents[1]
LOOK = """
import sys
sys.path[:] = [place for place in sys.path if place != {root!r}]  # an editable installation
import proto.fedalloy.v1.plan_pb2 as plan, strategies
assert plan.__file__.startswith({site!r}) and strategies.__file__.startswith({site!r}), (plan, strategies)
print(*strategies.STRATEGIES)
"""


def unpack(site: Path) -> None:
    """The wheel's files, as pyproject.toml lists them."""
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    for package in wheel["packages"]:
        shutil.copytree(
            ROOT / package, site / package, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True
        )
    for name in wheel["exclude"]:
        (site / name).unlink()


def look(site: Path, more: str = "") -> list[str]:
    code = LOOK.format(site=str(site), root=str(ROOT)) + more
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=site, env={"PYTHONPATH": str(site)}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


def test_a_wheel_has_every_strategy(tmp_path: Path) -> None:
    unpack(tmp_path)
    assert look(tmp_path) == list(STRATEGIES)


def test_proto_plus_and_adapter_hub_in_the_same_folder_still_import(tmp_path: Path) -> None:
    """Stand-ins with the files that proto-plus 1.29 and adapters 1.3 have at the top."""
    theirs = {"proto/__init__.py": "class Message: pass", "proto/message.py": "", "adapters/__init__.py": "Adapter = 1"}
    unpack(tmp_path)
    for name, text in theirs.items():
        assert not (tmp_path / name).exists(), f"the wheel has {name}, too: whoever is installed last overwrites it"
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    look(tmp_path, "import adapters, proto; proto.Message, adapters.Adapter")
