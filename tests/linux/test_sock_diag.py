"""Ending TCP connections, in network namespaces of children."""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Callable
from ipaddress import ip_address, ip_interface

import pytest

from pytest_vmsandbox.linux import CloneFlags, unshare
from pytest_vmsandbox.linux.rtnetlink import RouteSocket
from pytest_vmsandbox.linux.sock_diag import destroy_connections

InChild = Callable[..., None]


def test_connections_to_an_address_are_ended_and_no_others(in_room: InChild) -> None:
    def body() -> None:
        unshare(CloneFlags.NEWNET)
        with RouteSocket() as route:
            route.set_up("lo")
            for address in ("10.0.0.1/32", "10.0.0.2/32", "fd00::1/128"):
                route.add_address("lo", ip_interface(address))

        def connected(to: tuple[str, int]) -> socket.socket:
            until = time.monotonic() + 10
            while True:  # the kernel routes to a new IPv6 address a moment later
                try:
                    return socket.create_connection(to)
                except OSError as error:
                    if error.errno != errno.ENETUNREACH or time.monotonic() > until:
                        raise

        def connection(address: str) -> socket.socket:
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            listener = socket.create_server((address, 0), family=family)
            held.append(listener)
            sock = connected(listener.getsockname()[:2])
            held.append(listener.accept()[0])
            return sock

        held: list[socket.socket] = []
        dead, dead6, alive = map(connection, ("10.0.0.1", "fd00::1", "10.0.0.2"))

        # Both ends are here, and so both connect to the address.
        assert destroy_connections(ip_address("10.0.0.1")) >= 1
        assert destroy_connections(ip_address("fd00::1")) >= 1
        assert destroy_connections(ip_address("10.0.0.9")) == 0

        for sock in (dead, dead6):
            sock.settimeout(5)
            with pytest.raises(ConnectionError):
                sock.recv(1)
        alive.sendall(b"x")
        assert held[-1].recv(1) == b"x"

    in_room(body)


def test_without_the_right_none_is_ended(in_child: InChild) -> None:
    def body() -> None:
        import os

        if os.geteuid() == 0:
            return
        listener = socket.create_server(("127.0.0.1", 0))
        sock = socket.create_connection(listener.getsockname())
        other, _ = listener.accept()
        with pytest.raises(PermissionError):
            destroy_connections(ip_address("127.0.0.1"))
        sock.sendall(b"x")
        assert other.recv(1) == b"x"

    in_child(body)
