"""Generate the Python code of ``proto/fedalloy/v1/*.proto``.

    python proto/generate.py            # rewrite the committed files
    python proto/generate.py --check    # exit 1 if they differ from the .proto files

``protoc`` comes with grpcio-tools, which is pinned in ``pyproject.toml`` because its version decides which protobuf
runtimes can load the result. The one edit made to its output: generated modules import each other as
``fedalloy.v1``, but in this repository they live in the package ``proto.fedalloy.v1``.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from importlib import resources
from pathlib import Path

from grpc_tools import protoc

PROTO_ROOT = Path(__file__).resolve().parent
PACKAGE = PROTO_ROOT / "fedalloy" / "v1"


def generate(destination: Path) -> dict[str, str]:
    """Run protoc into ``destination``; return ``{file name: text}`` with package-qualified imports."""
    sources = sorted(str(path.relative_to(PROTO_ROOT)) for path in PACKAGE.glob("*.proto"))
    well_known = resources.files("grpc_tools") / "_proto"
    arguments = ["protoc", f"-I{PROTO_ROOT}", f"-I{well_known}"]
    arguments += [f"--python_out={destination}", f"--pyi_out={destination}", *sources]
    services = [source for source in sources if "\nservice " in (PROTO_ROOT / source).read_text()]
    with_services = [*arguments[:3], f"--grpc_python_out={destination}", *services]
    if protoc.main(arguments) != 0 or protoc.main(with_services) != 0:
        raise SystemExit("protoc failed; its message is above")
    return {
        path.name: path.read_text().replace("from fedalloy.v1 import", "from proto.fedalloy.v1 import")
        for path in sorted((destination / "fedalloy" / "v1").iterdir())
    }


def main() -> int:
    """Write or check the generated files; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare only, write nothing")
    check = parser.parse_args().check
    with tempfile.TemporaryDirectory() as folder:
        fresh = generate(Path(folder))
    drifted = []
    for name, text in fresh.items():
        target = PACKAGE / name
        if not target.exists() or target.read_text() != text:
            drifted.append(name)
            if not check:
                target.write_text(text)
    if drifted:
        print(("differs from its .proto: " if check else "written: ") + ", ".join(drifted))
    return 1 if check and drifted else 0


if __name__ == "__main__":
    sys.exit(main())
