"""Files that are complete after a kill at any moment (write elsewhere, flush, rename), and locks between processes.

Only the owner can read the folders and files made here, whatever the umask: adapters and logs reveal much about the
data behind them.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

FOLDER_MODE, FILE_MODE = 0o700, 0o600
LOOK_SECONDS = 0.05


def private_folder(path: Path) -> Path:
    """Make the folder and its missing parents, for this user only. An existing folder keeps its mode.

    Raises:
        OSError: the folder cannot be made.
    """
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    for folder in reversed(missing):
        with contextlib.suppress(FileExistsError):  # another process made it meanwhile
            folder.mkdir(mode=FOLDER_MODE)
    return path


def private_mask() -> None:
    """From now on only this user can read new files of this process, including those that libraries make."""
    os.umask(0o777 & ~FOLDER_MODE)


def open_private(path: Path, flags: int) -> int:
    """A descriptor of a file that only this user may open; a missing file is created.

    Raises:
        OSError: the file cannot be made or opened.
    """
    descriptor = os.open(path, flags | os.O_CREAT | os.O_CLOEXEC, FILE_MODE)
    found = os.fstat(descriptor)
    if found.st_uid == os.geteuid() and stat.S_IMODE(found.st_mode) & 0o077:  # made by an earlier version
        os.fchmod(descriptor, FILE_MODE)
    return descriptor


def write_durably(path: Path, data: bytes) -> None:
    """Write a file through a temporary one in the same folder (made if needed): write, fsync, rename.

    Raises:
        OSError: the disk is full or the folder cannot be written; names the file. What was there before stays.
    """
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        private_folder(path.parent)
        with open(open_private(temporary, os.O_WRONLY | os.O_TRUNC), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # the error of a full disk names no file
        raise
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def write_lightly(path: Path, found: object) -> None:
    """Replace a JSON file in an existing folder. It is not flushed to the disk, so a crash of the machine may lose it.

    Raises:
        OSError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        with open(open_private(temporary, os.O_WRONLY | os.O_TRUNC), "w") as file:
            json.dump(found, file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: Path, *, wait: bool = True, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold a lock between processes; a process that dies releases it.

    The file stays: if it were removed, the next process would lock another file. Other users cannot open it; otherwise
    they could lock it and hold us up for as long as they like.

    Args:
        path: the lock file.
        wait: whether to wait while another process holds it.
        waiting: called repeatedly during the wait; an exception from it ends the wait.

    Raises:
        BlockingIOError: another process holds it, and ``wait`` is false.
        OSError: the file cannot be made.
    """
    descriptor = open_private(path, os.O_RDWR)
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not wait:
                    raise
            if waiting is not None:
                waiting()
            time.sleep(LOOK_SECONDS)
        yield
    finally:
        os.close(descriptor)
