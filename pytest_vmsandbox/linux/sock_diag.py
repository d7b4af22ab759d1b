"""The TCP connections of a network namespace, found and ended over sock_diag(7)."""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address

from pytest_vmsandbox.linux.netlink import HEADER

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY, _SOCK_DESTROY = 20, 21
_NLM_F_REQUEST, _NLM_F_ACK, _NLM_F_DUMP = 0x1, 0x4, 0x300
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_ALL_STATES = 0xFFFFFFFF

_REQUEST = struct.Struct("=BBBxI")  # struct inet_diag_req_v2, before its id
_ANSWER = struct.Struct("=BBBB")  # struct inet_diag_msg, before its id
_ID_BYTES = 48  # struct inet_diag_sockid: ports, source, destination, interface, cookie
_DESTINATION_AT = 20
_NO_ID = bytes(40) + b"\xff" * 8  # INET_DIAG_NOCOOKIE
_ANSWER_BYTES = 1 << 16


def destroy_connections(to: IPv4Address | IPv6Address) -> int:
    """End every TCP connection to that address here; how many there were.

    Whoever holds one gets ECONNABORTED (since Linux 4.5). OSError EOPNOTSUPP from a kernel without
    CONFIG_INET_DIAG_DESTROY, EPERM without CAP_NET_ADMIN over the namespace.
    """
    family = socket.AF_INET if to.version == 4 else socket.AF_INET6  # noqa: PLR2004
    wanted = to.packed.ljust(16, b"\0")
    with socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG
    ) as line:
        _send(line, _SOCK_DIAG_BY_FAMILY, _NLM_F_DUMP, family, _NO_ID)
        there = [
            each for each in _dumped(line) if each[_DESTINATION_AT : _DESTINATION_AT + 16] == wanted
        ]
        for each in there:
            _send(line, _SOCK_DESTROY, _NLM_F_ACK, family, each)
            with suppress(FileNotFoundError):  # it ended by itself meanwhile
                _acknowledged(line)
    return len(there)


def _send(line: socket.socket, kind: int, flags: int, family: int, identity: bytes) -> None:
    body = _REQUEST.pack(family, socket.IPPROTO_TCP, 0, _ALL_STATES) + identity
    line.send(HEADER.pack(HEADER.size + len(body), kind, flags | _NLM_F_REQUEST, 0, 0) + body)


def _dumped(line: socket.socket) -> Iterator[bytes]:
    while True:
        answer = line.recv(_ANSWER_BYTES)
        at = 0
        while at < len(answer):
            length, kind, _, _, _ = HEADER.unpack_from(answer, at)
            body = answer[at + HEADER.size : at + length]
            if kind == _NLMSG_DONE:
                return
            if kind == _NLMSG_ERROR:
                raise _error(body)
            yield body[_ANSWER.size : _ANSWER.size + _ID_BYTES]
            at += length + -length % 4


def _acknowledged(line: socket.socket) -> None:
    answer = line.recv(_ANSWER_BYTES)
    (code,) = struct.unpack_from("=i", answer, HEADER.size)
    if code:
        raise _error(answer[HEADER.size :])


def _error(body: bytes) -> OSError:
    (code,) = struct.unpack_from("=i", body)
    return OSError(-code or errno.EIO, f"sock_diag: {os.strerror(-code or errno.EIO)}")
