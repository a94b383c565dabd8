from __future__ import annotations

import ast
import io
import re
import stat
import subprocess
import sys
import tomllib
import zipfile
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from server_app.run.run_directory import dotted

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("proto", "fedalloy_adapters", "strategies", "client_app", "server_app")
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())


def _sources(*folders: str) -> list[Path]:
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    assert found
    return found


def _imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every module that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text(), filename=str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.relative_to(ROOT)}:{node.lineno}: relative import"
            assert node.module is not None
            yield node.lineno, node.module
            # `from a import b` may name the module a.b.
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def test_import_contracts_hold() -> None:
    lint_imports = Path(sys.executable).parent / "lint-imports"
    if not lint_imports.exists():
        pytest.skip("import-linter is not installed")
    result = subprocess.run(
        [lint_imports, "--no-logo", "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_no_underscore_module_of_another_package_is_imported() -> None:
    wrong = []
    for path in _sources(*PACKAGES):
        own = path.relative_to(ROOT).parts[0]
        for line, name in _imports(path):
            package, *rest = name.split(".")
            if package in PACKAGES and package != own and any(part.startswith("_") for part in rest):
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {name}")
    assert not wrong


def test_every_import_of_this_repository_finds_its_module() -> None:
    # Tests are not type-checked, and many import inside a function: a moved module is missed here and not weeks later.
    roots = (*PACKAGES, "tests", "examples")
    wrong = []
    for path in _sources(*roots):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                init = ROOT / node.module.replace(".", "/") / "__init__.py"
                empty = init.exists() and not init.read_text()  # then what is taken from it are modules
                names = [f"{node.module}.{alias.name}" if empty else node.module for alias in node.names]
            for name in names:
                at = ROOT / name.replace(".", "/")
                if name.split(".")[0] in roots and not (at.is_dir() or at.with_suffix(".py").exists()):
                    wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}: {name}")
    assert not wrong


def test_no_file_has_more_than_400_lines() -> None:
    lines = {path.relative_to(ROOT): path.read_text().count("\n") for path in _sources(*PACKAGES, "tests", "examples")}
    assert not {path: count for path, count in lines.items() if count > 400 and "_pb2" not in path.name}


def test_no_function_has_more_than_60_lines() -> None:
    # Its docstring counts, too. A longer one needs a line here, and a reason.
    longer: dict[str, str] = {}
    found = {}
    for path in _sources(*PACKAGES, "examples"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
                found[f"{path.relative_to(ROOT)}:{node.name}"] = node.end_lineno - node.lineno + 1
    assert not {name: count for name, count in found.items() if count > 60 and name not in longer}
    assert {name for name, count in found.items() if count > 60} == set(longer), "an exception that is none any more"


def test_no_folder_holds_more_than_a_dozen_modules() -> None:
    # Where modules are alike and found by name, the folder is a list and may be long.
    lists = {"strategies/algorithms", "tests/strategies/algorithms", "client_app/plan", "tests/client_app/plan"}
    sizes = Counter(path.parent.relative_to(ROOT).as_posix() for path in _sources(*PACKAGES, "tests", "examples"))
    assert not {folder: count for folder, count in sizes.items() if count > 12 and folder not in lists}


def test_the_name_proto_is_used_only_below_fedalloy() -> None:
    # Google's proto-plus has the same import name: `import proto` bare would find whichever comes first.
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in _sources(*PACKAGES, "tests")
        for line, name in _imports(path)
        if name.split(".")[0] == "proto" and not f"{name}.".startswith("proto.fedalloy.v1.")
    ]
    assert not wrong


def test_third_party_imports_are_declared_dependencies() -> None:
    project = PROJECT["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    declared = {re.split(r"[^A-Za-z0-9._-]", line)[0].lower().replace("_", "-") for group in groups for line in group}
    distributions = packages_distributions()
    wrong = set()
    for path in _sources(*PACKAGES):
        for line, name in _imports(path):
            package = name.split(".")[0]
            if package in PACKAGES or package in sys.stdlib_module_names:
                continue
            # google is a namespace of many distributions; the one that we import is protobuf's.
            owners = ["protobuf"] if name.startswith("google.protobuf") else distributions.get(package, [package])
            if not {owner.lower().replace("_", "-") for owner in owners} & declared:
                wrong.add(f"{path.relative_to(ROOT)}:{line}: {package} is in no dependency list of pyproject.toml")
    assert not wrong


def test_every_dependency_has_an_upper_bound() -> None:
    project = PROJECT["project"]
    lines = [*project["dependencies"], *(line for group in project["optional-dependencies"].values() for line in group)]
    assert [line for line in lines if not re.search(r"<|==", line.split(";")[0])] == []


def test_generated_files_are_as_the_code_says() -> None:
    from server_app.tools.reference import generated

    drifted = [path.name for path, text in generated().items() if not path.exists() or path.read_text() != text]
    assert not drifted, "run `make docs`, and commit what it changes: users' commands contain these keys"


def test_flower_accepts_every_run_config_key_and_has_the_defaults_of_the_code() -> None:
    from server_app.run.options import known_keys

    written = dict(dotted(PROJECT["tool"]["flwr"]["app"]["config"]))
    assert written == known_keys()
    assert {key: type(value) for key, value in written.items()} == {
        key: type(value) for key, value in known_keys().items()
    }


@pytest.fixture(scope="module")
def bundle() -> dict[str, bytes]:
    """Files of the bundle that Flower would ship, as it would build it from this folder."""
    from flwr.cli.build import build_fab_from_files

    # Only what git would track: walking an environment below the root would cost seconds.
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    files: dict[str, bytes | Path] = {
        name: ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()
    }
    # What may lie around on somebody's machine and must not travel.
    files |= {"runs/x/clients/a/data.json": b"{}", "notes.md": b"", "secret.toml": b"", "tests/helper.py": b""}
    fab, _ = build_fab_from_files(files)
    with zipfile.ZipFile(io.BytesIO(fab)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _imported(*starts: str) -> set[str]:
    """Files of the packages that these modules import, directly or not, at any place in them."""
    files = {path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): path for path in _sources(*PACKAGES)}
    files = {name.removesuffix(".__init__"): path for name, path in files.items()}
    found, todo = set[str](), list(starts)
    while todo:
        name = todo.pop()
        if name in found or name not in files:
            continue
        found.add(name)
        todo.append(name.rpartition(".")[0])
        for node in ast.walk(ast.parse(files[name].read_text())):
            if isinstance(node, ast.Import):
                todo += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                todo += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return {files[name].relative_to(ROOT).as_posix() for name in found}


def test_bundle_contains_what_the_apps_import_and_nothing_else(bundle: dict[str, bytes]) -> None:
    # The trainer is started by its name, strategies and kinds of tasks are found by theirs.
    folders = ("strategies/algorithms", "client_app/kinds")
    found = [f"{folder.replace('/', '.')}.{path.stem}" for folder in folders for path in (ROOT / folder).glob("*.py")]
    wanted = _imported("server_app.app", "client_app.app", "client_app.trainer.server", *found)
    assert set(bundle) == wanted | {"pyproject.toml", "LICENSE", ".info/CONTENT"}


def test_bundle_is_small(bundle: dict[str, bytes]) -> None:
    # With `flwr run` every client downloads it once per run as it is; tools/bundle has `fedalloy submit`.
    assert sum(len(content) for content in bundle.values()) < 1_850_000


def _skips_without_reason(path: Path) -> Iterator[int]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "pytest.mark.skip":
            yield node.lineno  # bare; a call of it is taken out below
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            keywords = {keyword.arg for keyword in node.keywords}
            if name == "pytest.mark.skip" and (node.args or "reason" in keywords):
                yield -node.lineno
            if name in {"pytest.mark.skipif", "pytest.importorskip"} and "reason" not in keywords:
                yield node.lineno
            if name == "pytest.skip" and not node.args and "reason" not in keywords:
                yield node.lineno


def test_every_skip_gives_a_reason() -> None:
    wrong = []
    for path in _sources("tests"):
        lines = set(_skips_without_reason(path))
        wrong += [f"{path.relative_to(ROOT)}:{line}" for line in lines if line > 0 and -line not in lines]
    assert not wrong


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("@pytest.mark.skip\ndef f(): ...", {1}),
        ("pytest.skip()", {1}),
        ("pytest.mark.skipif(True)", {1}),
        ("pytest.skip('no GPU')", set()),
    ],
)
def test_the_search_for_skips_finds_them(source: str, lines: set[int], tmp_path: Path) -> None:
    path = tmp_path / "test_example.py"
    path.write_text(source)
    assert set(_skips_without_reason(path)) == lines


def test_every_source_file_has_a_test_file_or_a_line_that_says_which_covers_it() -> None:
    listed: dict[str, dict[str, str]] = tomllib.loads((ROOT / "tests" / "mirror.toml").read_text())
    lines = listed["imported"] | listed["reached"]
    without = set()
    for path in _sources(*PACKAGES[1:]):
        source = path.relative_to(ROOT)
        own = ROOT / "tests" / source.parent / f"test_{source.name}"
        if source.name != "__init__.py" and source.parent.name != "algorithms" and not own.exists():
            without.add(str(source))
    assert without - set(lines) == set(), "write a test file of the same name, or a line in tests/mirror.toml"
    assert set(lines) - without == set(), "these have a test file of their own, or are gone: remove the line"
    for source, test in lines.items():
        assert (ROOT / "tests" / test).exists(), f"{source}: there is no tests/{test}"
    for source, test in listed["imported"].items():
        module = source.removesuffix(".py").replace("/", ".")
        assert module in {name for _, name in _imports(ROOT / "tests" / test)}, f"tests/{test} imports no {module}"


def test_ci_script_is_executable() -> None:
    assert (ROOT / ".ci" / "run").stat().st_mode & stat.S_IXUSR


def test_neither_this_code_nor_flower_reads_pkcs7_messages() -> None:
    """What docs/security.md says about CVE-2026-69247; where this fails, read that page again."""
    (flower,) = (find_spec("flwr") or pytest.fail("no Flower")).submodule_search_locations or ()
    sources = [*_sources(*PACKAGES), *Path(flower).rglob("*.py")]
    assert len(sources) > 300
    assert not [path for path in sources if "pkcs7" in path.read_text().lower()]


def test_every_package_says_that_it_is_typed() -> None:
    assert not [package for package in PACKAGES if not (ROOT / package / "py.typed").exists()]


def test_the_version_has_its_place_in_the_changes() -> None:
    version = PROJECT["project"]["version"].partition(".dev")[0]
    assert re.search(rf"^## {re.escape(version)}\b", (ROOT / "CHANGELOG.md").read_text(), re.M), version
