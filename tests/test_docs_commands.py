"""Commands of README and docs that are cheap enough, carried out as they stand there, in a folder of their own.

They run in this process: starting Python and importing torch takes longer than the commands do.
"""

from __future__ import annotations

import os
import runpy
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from server_app.tools.cli import app
from server_app.tools.compare import command as comparison
from tests.test_docs import BLOCKS, Block, name

EXECUTED = ("test_three_clients_are_compared", "test_a_run_is_inspected")
CLIENT = "berlin"
"""Of the example; where pages say ``client-0``, a client of the demo."""


def blocks_of(test: str) -> list[Block]:
    """The blocks whose marker names a test of this file."""
    return [block for block in BLOCKS if block.marker.endswith(f"{Path(__file__).name}::{test}")]


def carry_out(block: Block, *changes: tuple[str, str]) -> str:
    """Run a block's commands in the working directory, with some words changed; what they printed."""
    text = block.text
    for old, new in changes:
        assert old in text, f"{name(block.page)}: {old!r} is not in\n{text}"
        text = text.replace(old, new)
    said = ""
    for program, *arguments in Block(block.page, block.marker, text).commands():
        words = [os.path.expandvars(word) for word in arguments]
        if program == "python":
            assert words[0] == "-m"
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("sys.argv", words[1:])
                runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            assert program == "fedalloy"
            result = CliRunner().invoke(app, words, env={"COLUMNS": "200"})
            assert result.exit_code == 0, f"{program} {words}:\n{result.output}\n{result.exception!r}"
            said += result.output
    return said


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which README's example has been carried out, with less work than it says, and without controls."""
    folder = tmp_path_factory.mktemp("compared")
    readme, _ = blocks_of("test_three_clients_are_compared")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("PWD", str(folder))
        patch.setattr(comparison, "CONTROLS", ())
        carry_out(readme, ("--seeds 2 --rounds 3", "--seeds 1 --rounds 2"), ('--set "', '--set "local-steps=1 '))
    return folder


def test_every_block_that_names_this_file_is_carried_out() -> None:
    named = [block for block in BLOCKS if f"{Path(__file__).name}::" in block.marker]
    assert len(named) == sum(len(blocks_of(test)) for test in EXECUTED)


def test_three_clients_are_compared(compared: Path) -> None:
    readme, page = blocks_of("test_three_clients_are_compared")
    assert (name(readme.page), name(page.page)) == ("README.md", "docs/compare.md")
    assert readme.text == page.text
    lines = (compared / "own" / "comparison" / "table.md").read_text().splitlines()
    assert {line.split()[1] for line in lines if line.startswith("| ")} >= {"local", "fedavg", "fedmerge"}


def test_a_run_is_inspected(compared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = blocks_of("test_a_run_is_inspected")
    assert [name(block.page) for block in blocks] == ["README.md", "docs/runs.md"]
    (run,) = (compared / "own" / "comparison" / "runs").glob("fedmerge-*")
    shutil.copytree(run, compared / "runs" / "demo-fedmerge")
    monkeypatch.chdir(compared)
    for number, block in enumerate(blocks):
        said = carry_out(block, ("client-0", CLIENT), ("my-model", f"model-{number}"))
        assert CLIENT in said
        exported = {path.name for path in (compared / f"model-{number}").iterdir()}
        assert exported >= {"adapter_config.json", "adapter_model.safetensors"}
