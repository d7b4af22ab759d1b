"""Splicing: two connections made one, until both have ended."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, Protocol

LOOPBACK = "127.0.0.1"

_PIECE_BYTES = 256 * 1024


class ByteEnd(Protocol):
    """One end of a connection: bytes come and go, and it ends in each direction by itself."""

    async def read(self, limit: int) -> bytes:
        """The next bytes; none where no more will come."""

    async def write(self, data: bytes) -> None:
        """Send all of it."""

    async def end(self) -> None:
        """Say that no more will come."""


class SocketEnd:
    """A connected socket as an end."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._sock.settimeout(0)
        # What came in pieces goes on in pieces: Nagle's algorithm would hold the second back until
        # the other side has acknowledged the first, which may take it 40 ms (tcp(7)).
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    async def read(self, limit: int) -> bytes:
        """Part of ByteEnd."""
        return await asyncio.get_running_loop().sock_recv(self._sock, limit)

    async def write(self, data: bytes) -> None:
        """Part of ByteEnd."""
        await asyncio.get_running_loop().sock_sendall(self._sock, data)

    async def end(self) -> None:
        """Part of ByteEnd."""
        with suppress(OSError):  # the other side has hung up for good
            self._sock.shutdown(socket.SHUT_WR)


async def splice(one: ByteEnd, other: ByteEnd) -> None:
    """Carry what comes from each to the other until both have ended; the first error is raised."""
    await together(_pour(one, other), _pour(other, one))


async def together(*parts: Coroutine[Any, Any, None]) -> None:
    """Do all parts at once; the first that fails cancels the others and is raised as it is."""
    tasks = [asyncio.create_task(part) for part in parts]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pour(source: ByteEnd, target: ByteEnd) -> None:
    while piece := await source.read(_PIECE_BYTES):
        await target.write(piece)
    await target.end()


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    """Two sockets that are connected with each other, as `socket.socketpair`, but by TCP.

    So that one can tell the other of an error by `reset`, which no pair of the local kind can. For
    a moment a port of the loopback listens; a stranger who comes first is turned away.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.bind((LOOPBACK, 0))
        listener.listen()
        one = socket.create_connection(listener.getsockname())
        try:
            while True:
                other, address = listener.accept()
                if address == one.getsockname():
                    return one, other
                other.close()
        except BaseException:
            one.close()
            raise


def reset(sock: socket.socket) -> None:
    """Close a TCP connection so that the other side sees an error, not an end (socket(7))."""
    with suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()
