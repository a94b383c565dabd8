"""constraints.txt is the one lock: whole, within pyproject's ranges, and what everything here is installed from.

Files are compared with files. What is installed on this machine decides nothing.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
LINES = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
PINS = [Requirement(line.split("#")[0]) for line in LINES]
LOCK = {canonicalize_name(pin.name): pin for pin in PINS}
NAMED = [
    *PROJECT["project"]["dependencies"],
    *(line for extra in PROJECT["project"]["optional-dependencies"].values() for line in extra),
]
BUILT_WITH = PROJECT["build-system"]["requires"]


def pin_of(line: str) -> str:
    """The version that the lock has of what a line of pyproject asks for."""
    (specifier,) = LOCK[canonicalize_name(Requirement(line).name)].specifier
    return specifier.version


def test_each_line_of_the_lock_is_one_exact_version_of_one_package() -> None:
    for requirement in LOCK.values():
        assert re.fullmatch(r"==[0-9][\w.]*", str(requirement.specifier)), f"{requirement} is no exact version"
        assert not requirement.extras, f"pip allows no extras in constraints: {requirement}"
    assert len(LOCK) == len(PINS), "a package is locked twice: the same version has to do for every Python and platform"


@pytest.mark.parametrize("line", [*NAMED, *BUILT_WITH])
def test_the_lock_has_every_dependency_within_its_range(line: str) -> None:
    assert canonicalize_name(Requirement(line).name) in LOCK, f"constraints.txt lacks {line}: make lock"
    assert Requirement(line).specifier.contains(pin_of(line)), f"{line}: locked to {pin_of(line)}; make lock"


def test_the_lock_has_nothing_that_nobody_asks_for() -> None:
    """uv notes who asked for a package; one whose askers are gone is a rest of an older pyproject."""
    asked, builders = ({canonicalize_name(Requirement(line).name) for line in lines} for lines in (NAMED, BUILT_WITH))
    for line, name in zip(LINES, LOCK, strict=True):
        askers = [asker.strip() for asker in line.partition("# via ")[2].split(",") if asker]
        assert ("fedalloy (pyproject.toml)" in askers) == (name in asked), f"{line}: make lock"
        assert askers or name in builders | {"editables"}, f"nobody asks for {line}: make lock"
        for asker in askers:
            assert asker == "fedalloy (pyproject.toml)" or asker in LOCK, f"{line}: {asker} is not in the lock"


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13", "3.14"])
@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_the_lock_applies_to_every_python_and_platform_that_is_supported(python: str, platform: str) -> None:
    """A dependency that pyproject wants somewhere is not locked only elsewhere."""
    here: Any = {"python_version": python, "python_full_version": f"{python}.1", "sys_platform": platform}
    here |= {"platform_machine": "x86_64" if platform == "linux" else "arm64", "implementation_name": "cpython"}
    here |= {"platform_python_implementation": "CPython", "extra": ""}

    def holds(marker: Marker | None) -> bool:
        return marker is None or marker.evaluate(here)

    for line in map(Requirement, NAMED):
        locked = LOCK[canonicalize_name(line.name)]
        assert not holds(line.marker) or holds(locked.marker), f"{locked} does not lock {line} there"


def installs(*arguments: str) -> list[str]:
    """What ``make`` would run to make an environment in which nothing is installed yet."""
    command = ["make", "--dry-run", "--always-make", "-C", str(ROOT), "VENV=nowhere", *arguments]
    command += ["nowhere/.installed-for-pyproject"]
    # Not with the variables of a make that runs these tests.
    clean = {"PATH": os.environ["PATH"]}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=clean)
    found = re.findall(r"^.*-m pip .*\binstall .*$", done.stdout, re.MULTILINE)
    assert len(found) == 3, done.stdout
    return found


def test_make_installs_from_the_lock() -> None:
    assert all(" -c constraints.txt " in line for line in installs())
    assert '"torch"' in installs()[0]


def test_make_installs_the_newest_without_pins() -> None:
    assert not [line for line in installs("PINS=") if "constraints" in line or " -c " in line]


def test_another_torch_is_not_held_back_by_the_pins_of_the_tested_one() -> None:
    found = installs("TORCH=torch==2.12.1")
    assert '"torch==2.12.1"' in found[0]
    assert all(" -c nowhere/pins-but-torch.txt " in line for line in found)


def test_the_pins_of_a_tested_torch_are_all_told_from_the_others() -> None:
    """The expression of the Makefile and of the Dockerfile, over the lock: torch and what torch alone brings."""
    makefile, dockerfile = (ROOT / "Makefile").read_text(), (ROOT / "docker" / "Dockerfile").read_text()
    (expression,) = re.findall(r"grep -vE '(.*?)'", makefile)
    assert re.findall(r"sed -i -E '/(.*)/d' constraints.txt", dockerfile) == [expression]
    left = [line for line in LINES if not re.match(expression, line)]
    assert all(f"{name}==" in "\n".join(left) for name in ("torchmetrics", "numpy", "sympy"))
    assert not [line for line in left if re.match(r"(torch|triton|nvidia|cuda)\b", line)]


def test_the_image_and_ci_install_from_the_lock() -> None:
    dockerfile = (ROOT / "docker" / "Dockerfile").read_text()
    assert "PIP_CONSTRAINT=/src/constraints.txt" in dockerfile
    assert dockerfile.index("COPY constraints.txt ./") < dockerfile.index("pip install")
    assert not re.findall(r"[\w-]+[=~]=\d", dockerfile), "a version stands in the Dockerfile"
    ignored = (ROOT / "docker" / "Dockerfile.dockerignore").read_text().splitlines()
    assert "!constraints.txt" in ignored
    assert "/constraints.txt" in PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    assert (ROOT / ".ci" / "run").read_text().rstrip().endswith("make test </dev/null")
    assert not list(ROOT.glob("docker/**/constraints*.txt")), "one lock"


@pytest.mark.parametrize("extras", ["", "privacy", "privacy report"])
def test_the_image_gets_the_extras_that_it_is_asked_for(extras: str) -> None:
    """The Dockerfile's own line, as its shell runs it."""
    dockerfile = (ROOT / "docker" / "Dockerfile").read_text()
    (line,) = re.findall(r'(python -c ".*?") > wanted.txt', dockerfile, re.DOTALL)
    command = line.replace("python", f"'{sys.executable}'", 1)
    given = {**os.environ, "EXTRAS": extras}
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, env=given, capture_output=True, text=True, check=True)
    optional = PROJECT["project"]["optional-dependencies"]
    wanted = [*PROJECT["project"]["dependencies"], *(item for extra in extras.split() for item in optional[extra])]
    assert done.stdout.splitlines() == wanted


HELD_BACK = re.findall(r"^\| ([\w-]+) \| `([^`]+)` \|", (ROOT / "docs" / "security.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize(("name", "bound"), HELD_BACK)
def test_what_is_held_back_is_locked_below_the_bound_that_the_docs_name(name: str, bound: str) -> None:
    assert SpecifierSet(bound).contains(pin_of(name))
    for line in map(Requirement, NAMED):
        if canonicalize_name(line.name) == name and line.specifier:
            (upper,) = [str(part) for part in line.specifier if part.operator == "<"]
            assert upper == bound


def test_who_says_in_pyproject_that_a_package_is_held_back_says_in_the_docs_why() -> None:
    comments = re.findall(r"((?:^ *#.*\n)+) *\"([\w-]+)", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    said = {name for comment, name in comments if "docs/security.md" in comment}
    assert {"click", "cryptography", "protobuf", "rich", "typer"} <= said
    assert said <= {name for name, _ in HELD_BACK}
