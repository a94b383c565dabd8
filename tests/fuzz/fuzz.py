"""Coverage-guided fuzzing with atheris: ``python -m tests.fuzz.fuzz TARGET [libFuzzer options]``.

TARGET is adapter, plan, report, registration, slots or rounds. Needs the extra "fuzz". The corpus starts from honest
input; ``-max_total_time=600`` is what a release gets.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["fedalloy_adapters", "client_app", "strategies", "proto"]):
    from tests.fuzz import targets


def main() -> None:
    name, options = sys.argv[1], sys.argv[2:]
    corpus = Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-"))
    for number, data in enumerate(targets.seeds()[name]):
        (corpus / f"seed-{number}").write_bytes(data)
    limits = [f"-max_len={2**16}", "-rss_limit_mb=4096", "-timeout=20"]
    atheris.Setup([sys.argv[0], str(corpus), *limits, *options], targets.TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
