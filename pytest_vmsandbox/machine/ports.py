"""Ports: connections from the test to what listens in a guest."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Coroutine
from ipaddress import IPv4Address
from typing import Any

from pytest_vmsandbox.deadline import Deadline
from pytest_vmsandbox.errors import RequestInvalid, VmSandboxError
from pytest_vmsandbox.guest.channel import Channel
from pytest_vmsandbox.guest.connection import GuestConnection
from pytest_vmsandbox.machine.build import Build
from pytest_vmsandbox.machine.core import MachineCore
from pytest_vmsandbox.machine.listening import PORTS
from pytest_vmsandbox.machine.splice import (
    LOOPBACK,
    SocketEnd,
    reset,
    splice,
    tcp_pair,
)

# What making a connection may take unless its caller says otherwise, in seconds, before scaling.
CONNECT_S = 30.0

_BACKLOG = 512
_INSIDE = IPv4Address(LOOPBACK)

# How long a forward rests when the next client can't be taken, in seconds.
_REST_S = 0.05


class Ports(MachineCore):
    """The verbs that reach what listens in the guest."""

    def __init__(self, build: Build) -> None:
        super().__init__(build)
        self._listeners: list[socket.socket] = []
        self._carrying: set[asyncio.Task[None]] = set()

    async def connect(
        self, port: int, *, network: str | None = None, timeout: float | None = None
    ) -> socket.socket:
        """A connected socket to a TCP port of the guest; it is the caller's, and blocks.

        It comes over that network, or its first; where the machine is on none, or the tier has no
        end of a network on the host, from inside the guest itself. OSError as in `socket.connect`
        (ConnectionRefusedError, ...); TimedOut after `timeout` seconds (30).
        """
        _require_port(port)
        if network is not None:
            self.address(network)
        deadline = self._deadline(timeout, CONNECT_S)
        async with self._in_time(deadline, f"a connection to port {port}"):
            sock = await self._dial(port, network, timeout_s=deadline.left_s)
        sock.settimeout(None)
        return sock

    async def forward(self, port: int, *, network: str | None = None) -> tuple[str, int]:
        """Where on the host to reach a TCP port of the guest: ("127.0.0.1", a free port).

        It stays there until the machine is closed, through reboots and power cuts. Each connection
        to it is one to the guest, as `connect` makes it; one that can't be made, or breaks, is
        reset.
        """
        _require_port(port)
        if network is not None:
            self.address(network)
        if self._closed:
            raise RequestInvalid(f"{self.name} has ended for good", "ask the factory for another")
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            listener.bind((LOOPBACK, 0))
            listener.listen(_BACKLOG)
            listener.settimeout(0)
        except BaseException:
            listener.close()
            raise
        self._listeners.append(listener)
        self._carry(self._accept(listener, port, network))
        host, chosen = listener.getsockname()
        return str(host), int(chosen)

    async def hang_up(self) -> None:
        """End every forward, and every connection that goes through us."""
        for task in self._carrying:
            task.cancel()
        await asyncio.gather(*self._carrying, return_exceptions=True)
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()

    async def _accept(self, listener: socket.socket, port: int, network: str | None) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                client, _ = await loop.sock_accept(listener)
            except OSError:
                # The client is gone, or nobody has a descriptor to spare (accept(2)).
                await asyncio.sleep(_REST_S)
                continue
            self._carry(self._forward_one(client, port, network))

    async def _forward_one(self, client: socket.socket, port: int, network: str | None) -> None:
        try:
            with await self._dial(port, network, timeout_s=self.seconds(None, CONNECT_S)) as guest:
                await splice(SocketEnd(client), SocketEnd(guest))
        except BaseException as error:
            reset(client)
            if not isinstance(error, VmSandboxError | OSError):
                raise
        else:
            client.close()

    async def _dial(self, port: int, network: str | None, *, timeout_s: float) -> socket.socket:
        running = self._on()
        wires = self.build.wires
        if wires.addresses:
            wanted = network or next(iter(wires.addresses))
            try:
                dialing = wires.connect(wanted, port, timeout_s=timeout_s)
                return await running.unless_it_fails(dialing)
            except OSError as error:
                if error.errno != errno.EOPNOTSUPP:
                    raise
        address = self.address(network).ip if wires.addresses else _INSIDE
        deadline = Deadline.after(seconds=timeout_s)
        channel = await self._channel(deadline)
        return await self._relay(channel, address, port, timeout_s=deadline.left_s)

    async def _relay(
        self, channel: Channel, address: IPv4Address, port: int, *, timeout_s: float
    ) -> socket.socket:
        """A socket whose other end the agent connects with that port."""
        ours, theirs = tcp_pair()
        try:
            async with asyncio.timeout(timeout_s):
                inside = await channel.dial(address, port)
        except BaseException as error:
            ours.close()
            theirs.close()
            if isinstance(error, OSError) and error.errno is not None:
                reached = f"port {port} of {address}, from inside {self.name}"
                raise OSError(error.errno, os.strerror(error.errno), reached) from None
            raise
        self._carry(_carry_through(inside, ours))
        return theirs

    def _carry(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._carrying.add(task)
        task.add_done_callback(self._carrying.discard)


async def _carry_through(inside: GuestConnection, sock: socket.socket) -> None:
    """Splice them; the other end of the pair ends as that inside does, and breaks as it breaks."""
    try:
        await splice(SocketEnd(sock), inside)
    except BaseException as error:
        reset(sock)
        if not isinstance(error, VmSandboxError | OSError):
            raise
    finally:
        sock.close()
        inside.close()


def _require_port(port: object) -> None:
    if not isinstance(port, int) or isinstance(port, bool) or port not in PORTS:
        raise RequestInvalid(f"port={port!r} must be a whole number from 1 to 65535")
