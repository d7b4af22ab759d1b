"""The state of a network namespace as the kernel tells it: by netlink, and by /proc/net."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr
_REQUEST_DUMP = 0x1 | 0x300  # NLM_F_REQUEST | NLM_F_DUMP
_ERROR, _DONE = 2, 3
_NETLINK_NETFILTER = 12
_NFTABLES = 10 << 8  # NFNL_SUBSYS_NFTABLES

Attributes: TypeAlias = tuple[tuple[int, bytes], ...]

# What is asked for; how long the fixed part of each answer is; and attributes that change by
# themselves: counters, and how long ago something was. <linux/rtnetlink.h>, <linux/if_link.h>
_ROUTING = {
    "links": (18, 16, {7, 23, 26}),  # the last one holds IPv6's counters
    "addresses": (22, 8, {6}),
    "routes": (26, 12, {12}),
    "rules": (34, 12, set()),
    "queues": (38, 20, {3, 7}),
}
# <linux/netfilter/nf_tables.h>
_NETFILTER = {"tables": 1, "chains": 4, "rules": 7, "sets": 10, "objects": 19}

_FILES = (
    *("ip_tables_names", "ip6_tables_names", "arp_tables_names"),
    *("if_inet6", "dev_mcast", "igmp", "packet", "vlan/config"),
)
_SETTINGS = ("ipv4/ip_forward", "ipv4/conf/*/forwarding", "ipv6/conf/*/forwarding", "bridge/*")

# Everything but neighbours, which come and go: RTMGRP_* of <linux/rtnetlink.h>.
_GROUPS = 0x1 | 0x8 | 0x10 | 0x20 | 0x40 | 0x80 | 0x100 | 0x200 | 0x400 | 0x800 | 0x20000
_SOL_NETLINK, _ADD_MEMBERSHIP = 270, 1
_NFNLGRP_NFTABLES = 7


def read_state() -> dict[str, object]:
    """All of the caller's network namespace that somebody could change; equal while nobody does."""
    state: dict[str, object] = {
        name: _routing(kind, fixed, without) for name, (kind, fixed, without) in _ROUTING.items()
    }
    state["neighbours"] = sorted(
        (body[:8], dict(_attributes(body[12:])).get(1))  # family, interface; NDA_DST
        for body in _dump(socket.NETLINK_ROUTE, 30, bytes(12))
    )
    for name, kind in _NETFILTER.items():
        state[f"nftables {name}"] = _netfilter(_NFTABLES | kind)
    for name in _FILES:
        state[name] = _content(Path("/proc/thread-self/net", name))
    for pattern in _SETTINGS:
        for path in sorted(Path("/proc/sys/net").glob(pattern)):
            state[str(path)] = _content(path)
    return state


class Notices:
    """Whatever the kernel tells of changes in the network namespace that it was made in."""

    def __init__(self) -> None:
        self._sockets = [
            socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, protocol)
            for protocol in (socket.NETLINK_ROUTE, _NETLINK_NETFILTER)
        ]
        routing, netfilter = self._sockets
        routing.bind((0, _GROUPS))
        netfilter.bind((0, 0))
        with suppress(PermissionError):  # an ordinary user is told nothing of it
            netfilter.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, _NFNLGRP_NFTABLES)
        for each in self._sockets:
            each.settimeout(0)

    def drain(self) -> list[tuple[int, bytes]]:
        """All since the last time: kinds of messages, and the messages."""
        found = []
        for each in self._sockets:
            while True:
                try:
                    found += list(_messages(each.recv(1 << 20)))
                except BlockingIOError:
                    break
        return found

    def close(self) -> None:
        """Hear no more."""
        for each in self._sockets:
            each.close()


def _routing(kind: int, fixed: int, without: set[int]) -> list[tuple[bytes, Attributes]]:
    return sorted(
        (
            body[:fixed],
            tuple(each for each in _attributes(body[fixed:]) if each[0] not in without),
        )
        for body in _dump(socket.NETLINK_ROUTE, kind, bytes(fixed))
    )


def _netfilter(kind: int) -> list[bytes] | str:
    try:
        return sorted(_dump(_NETLINK_NETFILTER, kind, bytes(4)))
    except OSError as error:  # there is none in this kernel, or it is not for us to see
        return str(error)


def _dump(protocol: int, kind: int, body: bytes) -> Iterator[bytes]:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, protocol) as line:
        line.settimeout(20)
        line.send(_HEADER.pack(_HEADER.size + len(body), kind, _REQUEST_DUMP, 0, 0) + body)
        while True:
            for told, content in _messages(line.recv(1 << 20)):
                if told == _DONE:
                    return
                if told == _ERROR:
                    (code,) = struct.unpack_from("=i", content)
                    raise OSError(-code, os.strerror(-code))
                yield content


def _messages(packet: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at < len(packet):
        length, kind, _, _, _ = _HEADER.unpack_from(packet, at)
        yield kind, packet[at + _HEADER.size : at + length]
        at += length + -length % 4


def _attributes(text: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + 4 <= len(text):
        length, kind = struct.unpack_from("=HH", text, at)
        yield kind, text[at + 4 : at + length]
        at += length + -length % 4


def _content(path: Path) -> str:
    try:
        return path.read_text()
    except OSError as error:
        return f"{type(error).__name__}"
