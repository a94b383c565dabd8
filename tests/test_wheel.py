"""A wheel and a bundle, built and unpacked: strategies are found, and packages with names like ours still import."""

from __future__ import annotations

import io
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

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
    """The wheel's files, as a fresh installation of it has them."""
    if find_spec("hatchling") is None:
        pytest.skip("hatchling, which builds the wheel, is not installed (make installs it)")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(site / "built")]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, text=True)
    (wheel,) = (site / "built").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)


def unpack_bundle(site: Path) -> None:
    """The files that Flower ships to a client: its own process has nothing else of this repository."""
    from flwr.cli.build import build_fab_from_files

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    sources = [path for package in packages for path in (ROOT / package).rglob("*.py")]
    files = {path.relative_to(ROOT).as_posix(): path for path in [*sources, ROOT / "pyproject.toml", ROOT / "LICENSE"]}
    fab, _ = build_fab_from_files(files)
    with zipfile.ZipFile(io.BytesIO(fab)) as archive:
        archive.extractall(site)


def look(site: Path, more: str = "") -> list[str]:
    code = LOOK.format(site=str(site), root=str(ROOT)) + more
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=site, env={"PYTHONPATH": str(site)}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


@pytest.mark.parametrize("made", [unpack, unpack_bundle])
def test_what_is_installed_has_every_strategy(made: Callable[[Path], None], tmp_path: Path) -> None:
    made(tmp_path)
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
