"""Commands of README and docs that are cheap enough, carried out as they stand there, in a folder of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_docs import BLOCKS, ROOT, name

BIN = Path(sys.executable).parent


def carry_out(text: str, folder: Path) -> str:
    """Run a block in ``folder`` as a user with the environment would; what it printed."""
    here = os.environ | {"PYTHONPATH": str(ROOT), "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "COLUMNS": "200"}
    script = "set -eu\n" + text.replace(".venv/bin/", f"{BIN}/")
    done = subprocess.run(["bash", "-c", script], cwd=folder, env=here, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def blocks_of(test: str) -> list[tuple[str, str]]:
    """Page and text of each block whose marker names a test of this file."""
    return [
        (name(block.page), block.text) for block in BLOCKS if block.marker.endswith(f"{Path(__file__).name}::{test}")
    ]


def test_every_block_that_names_this_file_is_carried_out() -> None:
    named = [block for block in BLOCKS if f"{Path(__file__).name}::" in block.marker]
    tests = ("test_a_run_is_inspected", "test_three_clients_are_compared")
    assert len(named) == sum(len(blocks_of(test)) for test in tests)


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which README's example has been carried out, with less work than it says."""
    folder = tmp_path_factory.mktemp("compared")
    blocks = blocks_of("test_three_clients_are_compared")
    assert {page for page, _ in blocks} == {"README.md", "docs/compare.md"}
    assert blocks[0][1] == blocks[1][1]
    less = (
        blocks[0][1].replace("--seeds 2 --rounds 3", "--seeds 1 --rounds 1").replace('--set "', '--set "local-steps=1 ')
    )
    assert "--seeds 1" in less
    assert "local-steps=1" in less
    carry_out(less, folder)
    return folder


def test_three_clients_are_compared(compared: Path) -> None:
    table = (compared / "own" / "comparison" / "table.md").read_text()
    assert "`fedmerge`" in table
    assert "`local-twice` (control)" in table


def test_a_run_is_inspected(compared: Path) -> None:
    blocks = blocks_of("test_a_run_is_inspected")
    assert {page for page, _ in blocks} == {"README.md", "docs/runs.md"}
    (run,) = (compared / "own" / "comparison" / "runs").glob("fedmerge-*")
    shutil.copytree(run, compared / "runs" / "demo-fedmerge")
    for page, text in blocks:
        said = carry_out(text.replace("client-0", "berlin").replace("my-model", page[:4]), compared)
        assert "paris" in said
        exported = {path.name for path in (compared / page[:4]).iterdir()}
        assert exported >= {"adapter_config.json", "adapter_model.safetensors"}
