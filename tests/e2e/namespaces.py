"""A Flower federation in network namespaces: one for the SuperLink, one per SuperNode, a cable between each.

Nothing but Fleet traffic crosses a cable (addresses are static, IPv6 is off), and segmentation offload is off, so the
cable's interface counters are what a packet capture would show, in bytes, from a source that knows nothing of TCP.
"""

from __future__ import annotations

import array
import ctypes
import fcntl
import os
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

CLONE_NEWNET = 0x40000000
SIOCETHTOOL = 0x8946
OFFLOADS = {"tso": 0x1F, "gso": 0x24, "gro": 0x2C}  # ETHTOOL_STSO, ETHTOOL_SGSO, ETHTOOL_SGRO

T = TypeVar("T")


class NamespacesUnavailableError(RuntimeError):
    """This machine or user cannot make network namespaces; the message says what failed."""


@dataclass(frozen=True)
class Cable:
    """One SuperNode's link; ``interface`` is the SuperLink's end of it."""

    namespace: str
    interface: str
    server_address: str
    client_address: str


class Namespaces:
    """``server`` and one namespace per client, gone when the context ends.

    Raises:
        NamespacesUnavailableError: not Linux, no pyroute2, or no permission.
    """

    def __init__(self, clients: int) -> None:
        self.prefix = f"fa{os.getpid()}"
        self.server = f"{self.prefix}s"
        self.cables = [Cable(f"{self.prefix}c{i}", f"s{i}", f"10.77.{i}.1", f"10.77.{i}.2") for i in range(clients)]
        self._made: list[str] = []

    def __enter__(self) -> Namespaces:
        try:
            for name in [self.server, *(cable.namespace for cable in self.cables)]:
                self._create(name)
            for cable in self.cables:
                self._connect(cable)
        except Exception as error:
            self.close()
            raise NamespacesUnavailableError(f"cannot make network namespaces here: {error!r}") from error
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the namespaces (their interfaces go with them)."""
        from pyroute2 import netns

        while self._made:
            netns.remove(self._made.pop())

    def counters(self, cable: Cable) -> tuple[int, int]:
        """Bytes received from and sent to the client at the SuperLink's end of the cable, Ethernet headers included."""

        def read() -> tuple[int, int]:
            for line in Path("/proc/thread-self/net/dev").read_text().splitlines():
                name, _, rest = line.partition(":")
                if name.strip() == cable.interface:
                    fields = rest.split()
                    return int(fields[0]), int(fields[8])
            raise LookupError(cable.interface)

        return inside(self.server, read)

    def _create(self, name: str) -> None:
        from pyroute2 import IPRoute, netns

        netns.create(name)
        self._made.append(name)
        inside(name, _switch_ipv6_off)
        with IPRoute(netns=name) as ip:
            ip.link("set", index=ip.link_lookup(ifname="lo")[0], state="up")

    def _connect(self, cable: Cable) -> None:
        from pyroute2 import IPRoute

        with IPRoute(netns=self.server) as server, IPRoute(netns=cable.namespace) as client:
            server.link("add", ifname=cable.interface, kind="veth", peer={"ifname": "c0", "net_ns_fd": cable.namespace})
            ends = [
                (server, self.server, cable.interface, cable.server_address),
                (client, cable.namespace, "c0", cable.client_address),
            ]
            hardware = []
            for ip, namespace, interface, address in ends:
                index = ip.link_lookup(ifname=interface)[0]
                ip.addr("add", index=index, address=address, prefixlen=24)
                inside(namespace, lambda interface=interface: _switch_offloads_off(interface))
                ip.link("set", index=index, state="up")
                hardware.append((ip, index, address, ip.get_links(index)[0].get_attr("IFLA_ADDRESS")))
            # Static neighbours: no ARP on the cable.
            for (ip, index, _, _), (_, _, address, mac) in zip(hardware, reversed(hardware), strict=True):
                ip.neigh("add", dst=address, lladdr=mac, ifindex=index, state=0x80)


def inside(namespace: str, function: Callable[[], T]) -> T:
    """Call ``function`` in a thread that has entered ``namespace``."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            enter(namespace)
            outcome.extend([function(), None])
        except BaseException as error:
            outcome.extend([None, error])

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def enter(namespace: str) -> None:
    """Move the calling thread into ``namespace``."""
    with open(f"/var/run/netns/{namespace}") as handle:
        if ctypes.CDLL(None, use_errno=True).setns(handle.fileno(), CLONE_NEWNET) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), namespace)


def _switch_ipv6_off() -> None:
    for scope in ("all", "default"):
        path = Path(f"/proc/sys/net/ipv6/conf/{scope}/disable_ipv6")
        if path.exists():
            path.write_text("1")


def _switch_offloads_off(interface: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as handle:
        for command in OFFLOADS.values():
            value = array.array("B", struct.pack("II", command, 0))
            request = struct.pack("16sP", interface.encode(), value.buffer_info()[0])
            fcntl.ioctl(handle, SIOCETHTOOL, request)
