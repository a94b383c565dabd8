from __future__ import annotations

import io
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_files
from flwr.cli.install import install_from_fab

from server_app.ledger.flower_costs import bundle_size
from server_app.tools.bundle.pack import packed
from server_app.tools.cluster.superlink import ClusterError

ROOT = Path(__file__).resolve().parents[4]
PACKAGES = ("proto", "fedalloy_adapters", "strategies", "client_app", "server_app")
BOTH = """
import sys
from pathlib import Path
from flwr.supercore.object_ref import load_app, validate
app = Path(sys.argv[1])
for part in ("client", "server"):
    reference = f"fedalloy_bundle.{part}:app"
    assert validate(reference, project_dir=app) == (True, None)
    print(type(load_app(reference, RuntimeError, app)).__name__)
    print(Path(sys.modules[f"{part}_app.app"].__file__).relative_to(app))
"""


@pytest.fixture(scope="module")
def plain() -> bytes:
    paths = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    names = [path.relative_to(ROOT).as_posix() for path in paths]
    files: dict[str, bytes | Path] = {name: ROOT / name for name in [*names, "pyproject.toml", "LICENSE"]}
    return build_fab_from_files(files)[0]


@pytest.fixture(scope="module")
def installed(plain: bytes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where Flower's own installer, which checks hashes, puts the packed bundle."""
    return install_from_fab(packed(plain), tmp_path_factory.mktemp("home"), skip_prompt=True)


def test_a_packed_bundle_is_small_and_the_same_again(plain: bytes) -> None:
    small = packed(plain)
    assert len(small) < 400_000  # every client downloads it once per run
    assert len(small) < 0.3 * len(plain)
    assert packed(plain) == small


def test_both_apps_run_from_the_repositorys_own_files(plain: bytes, installed: Path) -> None:
    done = subprocess.run([sys.executable, "-c", BOTH, str(installed)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        *("ClientApp", "sources/client_app/app.py"),
        *("ServerApp", "sources/server_app/app.py"),
    ]
    assert [path.name for path in installed.glob(".sources-*")] == []
    with zipfile.ZipFile(io.BytesIO(plain)) as archive:
        for name in archive.namelist():
            if name.endswith(".py"):
                assert (installed / "sources" / name).read_bytes() == archive.read(name)
    assert bundle_size(installed) == bundle_size(installed / "sources") == len(packed(plain))


def test_what_is_no_checkout_of_this_app_is_not_packed(plain: bytes) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("pyproject.toml", "[project]\n")
    with pytest.raises(ClusterError, match=r"has no .info/CONTENT, LICENSE, client_app/app.py"):
        packed(buffer.getvalue())
