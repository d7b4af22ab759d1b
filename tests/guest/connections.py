"""Connections of every kind, for a test to end:  python -m tests.guest.connections

All are made here, between addresses of this network namespace, and known by a line of stdout. Then
each line of stdin is answered: which of them are over.
"""

from __future__ import annotations

import socket
import sys
import time

ADDRESSES = {
    "v4": "10.1.2.3",
    "v6": "fd00::5",
    "mapped": "::ffff:10.1.2.3",
    "loopback": "127.0.0.1",
}


def connected(address: str) -> tuple[socket.socket, socket.socket]:
    """Both ends of a connection from an address to itself, over which a little has gone."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as listener:
        if family == socket.AF_INET6:  # or none of them may be one of IPv4
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind((address, 0))
        listener.listen()
        one = socket.create_connection(listener.getsockname()[:2])
        other, _ = listener.accept()
    for _ in range(20):  # until TCP has something to learn from it
        one.send(b"x")
        other.recv(1)
        other.send(b"x")
        one.recv(1)
    return one, other


def is_over(sock: socket.socket) -> bool:
    """Whether somebody has ended it."""
    return sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) != 0 or _has_no_peer(sock)


def _has_no_peer(sock: socket.socket) -> bool:
    try:
        sock.getpeername()
    except OSError:
        return True
    return False


def main() -> None:
    """Make them, and tell of them."""
    there = {name: connected(address) for name, address in ADDRESSES.items()}
    for name in ("v4", "v6"):
        first, second = connected(ADDRESSES[name])
        first.close()  # which is in TIME_WAIT from here on
        time.sleep(0.1)
        second.close()
        datagrams = socket.socket(second.family, socket.SOCK_DGRAM)
        datagrams.connect((ADDRESSES[name], 9))
        there[f"datagrams {name}"] = (datagrams, datagrams)
    while True:
        over = [name for name, both in there.items() if any(map(is_over, both))]
        sys.stdout.write(f"over: {', '.join(over)}\n")
        sys.stdout.flush()
        if not sys.stdin.readline():
            return


if __name__ == "__main__":
    main()
