"""The number of threads of a client on a CPU: the owner's choice, or the client's share of the cores."""

from __future__ import annotations

import os
from pathlib import Path

from fedalloy_adapters.files.atomic_files import write_durably

SUPERNODE = "flower-supernode"
_REMEMBERED = "torch-threads"


def threads_for(asked: int, state_dir: Path) -> int:
    """Threads of a client.

    With another number of threads, numbers are added in another order. So a client keeps its first number, stored in
    its state directory, until the machine's cores change.

    Args:
        asked: node-config's ``torch-threads``; 0: the cores, divided by the clients on this machine.
        state_dir: the client's.
    """
    if asked:
        return asked
    cores, remembered = usable_cores(), state_dir / _REMEMBERED
    try:
        known_cores, threads = map(int, remembered.read_text().split())
        if known_cores == cores and 1 <= threads <= cores:
            return threads
    except (OSError, ValueError):
        pass
    clients = clients_here()
    threads = max(1, cores // clients) if clients else 1
    write_durably(remembered, f"{cores} {threads}\n".encode())
    return threads


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def clients_here() -> int:
    """SuperNodes that run on this machine; 0 if there are none, or no ``/proc`` (a simulation, a debugger, a test)."""
    found: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (folder / "cmdline").read_bytes().split(b"\0")[:3]
            parent = int((folder / "stat").read_text(errors="replace").rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            continue
        if any(os.path.basename(argument) == SUPERNODE.encode() for argument in arguments):
            found[int(folder.name)] = parent
    return sum(
        parent not in found for parent in found.values()
    )  # a SuperNode's child has the same arguments for a while
