"""Unpacks the sources of a packed app bundle, beside this folder, and puts them first on the path.

This is all that such a bundle adds. ``sources`` is a ZIP with the repository's files, unchanged.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parent / "sources"

if not SOURCES.exists():
    # Several processes may do this at once, each in a folder of its own; the first one done renames its folder.
    made = Path(tempfile.mkdtemp(prefix=".sources-", dir=HERE.parent))
    with zipfile.ZipFile(HERE / "sources") as archive:
        archive.extractall(made)
    made.chmod(HERE.stat().st_mode)
    with contextlib.suppress(OSError):
        made.rename(SOURCES)
    shutil.rmtree(made, ignore_errors=True)
if str(SOURCES) not in sys.path:
    sys.path.insert(0, str(SOURCES))
