"""The data plane of sockets: frames go through the hub, and a card is a stream to it."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterable, Mapping

from pytest_vmsandbox.linux.owned_fd import OwnedFd
from pytest_vmsandbox.network.host_end import close_host_end, open_host_end
from pytest_vmsandbox.network.hub import Hub
from pytest_vmsandbox.network.impairment import Impairment
from pytest_vmsandbox.network.pcap import PcapWriter
from pytest_vmsandbox.network.plane import HOST_PORT
from pytest_vmsandbox.network.port import PacketPort, StreamPort


class SocketPlane:
    """A Plane that needs nothing of the host; without walls the host has no end of it."""

    def __init__(self, number: int, hub: Hub, *, walled: bool) -> None:
        self._number = number
        self._walled = walled
        self._hub = hub

    def plug(self, port: str, *, machine: int | None) -> OwnedFd:
        """Part of Plane."""
        if port in self._hub.ports:
            raise ValueError(f"there is a port {port} already")
        ours, theirs = socket.socketpair()
        self._hub.plug_machine(StreamPort(port, ours), machine)
        return OwnedFd(theirs.detach())

    def unplug(self, port: str) -> bool:
        """Part of Plane."""
        self._hub.unplug(port)
        return HOST_PORT in self._hub.ports

    def cut(self, pairs: Iterable[frozenset[str]]) -> None:
        """Part of Plane."""
        self._hub.cut(pairs)

    def impair(self, impairment: Impairment) -> None:
        """Part of Plane."""
        self._hub.impairment = impairment

    def capture(self, number: int, writer: PcapWriter) -> None:
        """Part of Plane."""
        self._hub.captures[number] = writer

    def end_capture(self, number: int) -> None:
        """Part of Plane."""
        self._hub.captures.pop(number).close()

    def counts(self) -> Mapping[str, int]:
        """Part of Plane."""
        counts = self._hub.counts
        return {name: getattr(counts, name) for name in ("carried", "cut", "lost", "overflowed")}

    def require_host_end(self) -> None:
        """Part of Plane."""
        if not self._walled:  # whatever were made here would be made in the host's own namespace
            raise OSError(errno.EOPNOTSUPP, "the switch has no network namespace of its own")
        if HOST_PORT not in self._hub.ports:
            self._hub.plug(PacketPort(HOST_PORT, open_host_end(self._number)))

    def require_whole(self) -> None:
        """Part of Plane: it is whole as long as we are."""

    def close(self) -> None:
        """Part of Plane."""
        has_host_end = HOST_PORT in self._hub.ports
        self._hub.close()
        if has_host_end:
            close_host_end(self._number)
