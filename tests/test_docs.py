"""README and docs: links lead somewhere, commands are real ones, and each says which test runs it or why none does."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import click
import pytest
import typer

from server_app.run.options import known_keys
from server_app.tools.cli import app
from server_app.tools.commands.arguments import parse_run_config
from strategies.framework.options import OptionError
from tests.test_repository import ROOT

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "docker" / "README.md"]
PAGES += [ROOT / "examples" / "README.md", ROOT / "proto" / "README.md"]
PAGES += sorted(DOCS.rglob("*.md"))
BLOCK = re.compile(r"(?:^<!-- (?P<marker>.*?) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S)
README_LINES = 190


@dataclass(frozen=True)
class Block:
    """A shell block of a page; ``marker``: the HTML comment in the line before it."""

    page: Path
    marker: str
    text: str

    def commands(self) -> Iterator[list[str]]:
        """Words of each command, without comments and ``VARIABLE=value`` before it."""
        for line in self.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            for command in _split(words):
                while command and re.fullmatch(r"[A-Z_]+=.*", command[0]):
                    command = command[1:]
                if command:
                    yield [command[0].removeprefix(".venv/bin/"), *command[1:]]


def _split(words: list[str]) -> Iterator[list[str]]:
    command: list[str] = []
    for word in [*words, ";"]:
        if word in {";", "&&", "|", ">"}:
            yield command
            command = []
        else:
            command.append(word)


def shell_blocks() -> list[Block]:
    found = []
    for page in PAGES:
        for match in BLOCK.finditer(page.read_text()):
            if match["language"] == "sh":
                found.append(Block(page, match["marker"] or "", match["text"]))
    return found


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


BLOCKS = shell_blocks()
IDS = [f"{name(block.page)}:{block.text.split()[0]}" for block in BLOCKS]


def test_the_readme_is_one_that_is_read() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= README_LINES


# ---------------------------------------------------------------------------------------------------------------- links


def prose(page: Path) -> str:
    """The page without its code blocks."""
    return BLOCK.sub("", page.read_text())


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.M)
    plain = [re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading) for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in plain}


def links(page: Path) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", prose(page))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for link in links(page):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{name(page)}: {link} leads nowhere"
        assert target.is_relative_to(ROOT), f"{name(page)}: {link} leads out of the repository"
        if anchor:
            assert anchor in anchors(target), f"{name(page)}: {name(target)} has no heading #{anchor}"


def test_every_page_is_linked_from_its_index_and_leads_back() -> None:
    leads_to = {page: {(page.parent / link.partition("#")[0]).resolve() for link in links(page)} for page in PAGES}
    first, results = DOCS / "index.md", DOCS / "results" / "index.md"
    for page in sorted(DOCS.rglob("*.md")):
        index = results if page.parent.name == "results" and page != results else first
        assert page == first or page in leads_to[index], f"{name(index)} does not lead to {name(page)}"
        assert page == first or first in leads_to[page], f"{name(page)} does not lead back to {name(first)}"
    assert first in leads_to[ROOT / "README.md"]
    assert ROOT / "README.md" in leads_to[first]


def test_the_site_has_every_page() -> None:
    listed = set(re.findall(r"^ +- ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M))
    assert listed == {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    if importlib.util.find_spec("mkdocs") is None or importlib.util.find_spec("material") is None:
        pytest.skip("mkdocs-material is not installed (extra docs)")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    shown = (tmp_path / "site" / "architecture" / "index.html").read_text()
    assert "/blob/main/strategies/framework/contract.py" in shown, "links to sources lead to the repository"
    assert 'href="../resident-trainer/"' in shown


# ------------------------------------------------------------------------------------------------------------- commands


@pytest.mark.parametrize("block", BLOCKS, ids=IDS)
def test_a_shell_block_says_which_test_runs_it_or_why_none_does(block: Block) -> None:
    kind, _, rest = block.marker.partition(": ")
    assert kind in {"tested", "not run"}, (
        f"before the block: <!-- tested: tests/... --> or <!-- not run: reason -->\n{block.text}"
    )
    assert rest, f"{block.marker}: of what, or why?"
    for path in re.findall(r"tests/[\w/]+\.py(?:::\w+)?", rest) if kind == "tested" else []:
        file, _, function = path.partition("::")
        assert (ROOT / file).exists(), f"{block.marker}: there is no {file}"
        assert not function or f"def {function}(" in (ROOT / file).read_text(), f"{file} has no {function}"
    assert kind != "tested" or "tests/" in rest, f"{block.marker}: a path below tests/ is expected"


@pytest.mark.parametrize("block", BLOCKS, ids=IDS)
def test_commands_exist_and_know_their_options(block: Block) -> None:
    for command in block.commands():
        check(command)


def check(command: list[str]) -> None:
    """Raises where a command of ours, a module, a target or a run-config key does not exist."""
    program, *arguments = command
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert {word for word in arguments if "=" not in word} <= set(targets), command
    elif program == "fedalloy":
        parse(arguments)
    elif program in {"python", "python3"} and arguments[0] == "-m":
        module = ROOT.joinpath(*arguments[1].split("."))
        file = module / "__main__.py" if module.is_dir() else module.with_suffix(".py")
        assert file.exists(), f"{command}: there is no {file}"
        for option in (word for word in arguments[2:] if word.startswith("--")):
            assert f'"{option}"' in file.read_text(), f"{arguments[1]} has no option {option}"
    elif program == "docker" and "-f" in arguments:
        for flag, file_name in pairwise(arguments):
            assert flag != "-f" or (ROOT / file_name).exists(), command
    for flag, value in pairwise(command):
        if flag in {"--set", "--run-config"} and not value.endswith(".toml"):
            unknown = set(parse_run_config(value)) - set(known_keys())
            assert not unknown, f"{command}: unknown run-config keys {sorted(unknown)}"


def parse(arguments: list[str]) -> None:
    """Parse a command line of ``fedalloy`` without carrying it out."""
    command: click.Command = typer.main.get_command(app)
    context = click.Context(command, info_name="fedalloy")
    while isinstance(command, click.Group):
        _, found, arguments = command.resolve_command(context, arguments)
        assert found is not None
        command = found
    command.make_context(command.name, arguments, parent=context)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("make demon", "demon"),
        ("fedalloy compair digits", "No such command"),
        ("fedalloy compare digits --seed 3", "No such option"),
        (".venv/bin/python -m tests.benchmarks.accuracy.digits_headrom", "there is no"),
        (".venv/bin/python -m tests.benchmarks.accuracy.digits_headroom --sed 3", "no option --sed"),
        ("flwr run . --run-config \"fedmerge.model=3\"", "unknown run-config keys"),
        ("docker compose -f docker/composed.yaml up", "composed"),
    ],
)  # fmt: skip
def test_a_wrong_command_is_noticed(wrong: str, said: str) -> None:
    (command,) = Block(ROOT, "", wrong).commands()
    with pytest.raises((AssertionError, click.ClickException, OptionError)) as raised:
        check(command)
    assert said in str(getattr(raised.value, "message", raised.value))


def _messages(page: str) -> list[str]:
    """The messages in the first column of a page's tables of messages."""
    text = (ROOT / page).read_text()
    tables = re.findall(r"^\| message \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", text, re.M)
    return [row for table in tables for row in re.findall(r"^\| `(.+?)` \|", table, re.M)]


EXAMPLES = r"'[^']*'|\d+(?:\.\d+)?|\.\.\.|\b(?:shop|news|nan|node-config has)\b|: "
"""What stands in a message of a page where the code has a value."""


@pytest.mark.parametrize("message", _messages("docs/failures.md"))
def test_messages_on_the_page_of_failures_are_those_of_the_code(message: str) -> None:
    parts = [part.strip(" :;,()=?") for part in re.split(EXAMPLES, message)]
    wanted = [part for part in parts if len(part.split()) > 1]
    assert wanted, message
    for part in wanted:
        assert part in _code(), f"docs/failures.md has {message!r}, and no message of the code has {part!r}"


@functools.cache
def _code() -> str:
    """All sources, with the pieces of each text joined."""
    files = [path for room in ("server_app", "client_app", "strategies") for path in (ROOT / room).rglob("*.py")]
    return re.sub(r'"\s*\n\s*f?"', "", "\n".join(path.read_text() for path in sorted(files)))


# ------------------------------------------------------------------------------------------------- recorded sessions

SESSIONS = [match["text"] for match in BLOCK.finditer((DOCS / "terminal.md").read_text())]


def test_recorded_commands_exist_and_know_their_options() -> None:
    typed = re.findall(r"^\$ (.*)$", "".join(SESSIONS), re.M)
    assert {line.split()[1] for line in typed} >= {"runs", "watch", "report", "export"}
    for command in Block(DOCS / "terminal.md", "", "\n".join(typed)).commands():
        check(command)


def test_recordings_fit_into_80_columns() -> None:
    assert max(len(line) for session in SESSIONS for line in session.splitlines()) <= 80
