"""The house at a glance: rooms, README, the longest file and function, and what one strategy's commit touched.

    python -m tests.benchmarks.house
    python -m tests.benchmarks.house --commit "The strategy fedapm"

Sizes are of the files that git knows; generated code is left out. Nothing is written.
"""

from __future__ import annotations

import argparse
import ast
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
ROOMS = ("proto", "fedalloy_adapters", "strategies", "client_app", "server_app", "examples", "tests")
STRATEGY = "The strategy fedapm"


def git(*arguments: str) -> str:
    """The output of git in this repository."""
    return subprocess.run(("git", *arguments), cwd=ROOT, capture_output=True, text=True, check=True).stdout


def sources() -> list[Path]:
    """Python files by their path from the root."""
    known = [Path(line) for line in git("ls-files", "*.py").splitlines()]
    return [path for path in known if path.parts[0] in ROOMS and "_pb2" not in path.name and (ROOT / path).exists()]


def lines_of(path: Path) -> int:
    """How many lines a file has."""
    return (ROOT / path).read_text().count("\n")


def tree(files: list[Path]) -> Iterator[str]:
    """One line for each folder of the packages, and one for all tests: modules and lines."""
    rooms = defaultdict[Path, list[Path]](list)
    for path in files:
        rooms[Path("tests") if path.parts[0] == "tests" else path.parent].append(path)
    for room in sorted(rooms):
        name = "  " * (len(room.parts) - 1) + room.name + "/"
        yield f"{name:<32}{len(rooms[room]):>4} files {sum(map(lines_of, rooms[room])):>7} lines"


def functions(files: list[Path]) -> Iterator[tuple[int, str]]:
    """Length and place of every function outside the tests, with its docstring."""
    for path in files:
        if path.parts[0] == "tests":
            continue
        for node in ast.walk(ast.parse((ROOT / path).read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
                yield node.end_lineno - node.lineno + 1, f"{path}: {node.name}"


def commit_of(subject: str) -> str:
    """``git show --stat`` of the newest commit with this subject."""
    found = git("log", "--format=%h", "--fixed-strings", f"--grep={subject}").split()
    return git("show", "--stat=110", "--format=%h %s", found[0]).rstrip() if found else f"no commit says {subject!r}"


def main() -> None:
    """Print everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", default=STRATEGY, help="the subject of a strategy's commit")
    subject = parser.parse_args().commit
    files = sources()
    print("\n".join(tree(files)), "\n")
    print(f"README.md         {lines_of(Path('README.md'))} lines")
    count, longest = max((lines_of(path), str(path)) for path in files)
    print(f"longest file      {count} lines, {longest}")
    count, longest = max(functions(files))
    print(f"longest function  {count} lines, {longest}\n")
    print(commit_of(subject))


if __name__ == "__main__":
    main()
