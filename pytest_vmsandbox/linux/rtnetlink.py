"""Interfaces and addresses over rtnetlink(7), in the caller's network namespace."""

from __future__ import annotations

import errno
import os
import socket
import struct
from dataclasses import dataclass
from ipaddress import IPv4Interface, IPv4Network, IPv6Interface, IPv6Network
from typing import Self

_RTM_NEWLINK, _RTM_DELLINK, _RTM_NEWADDR = 16, 17, 20
_RTM_NEWRULE, _RTM_DELRULE = 32, 33
_NLM_F_REQUEST, _NLM_F_ACK, _NLM_F_EXCL, _NLM_F_CREATE = 0x1, 0x4, 0x200, 0x400
_NLMSG_ERROR = 2

_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_LINKINFO, _IFLA_AF_SPEC = 1, 3, 18, 26
_IFLA_INFO_KIND, _IFLA_INFO_DATA = 1, 2
_VETH_INFO_PEER = 1
_IFLA_INET_CONF = 1
_IPV4_DEVCONF_FORWARDING = 1
_IFA_ADDRESS, _IFA_LOCAL, _IFA_FLAGS = 1, 2, 8
_IFA_F_NODAD = 0x02
_IFF_UP = 0x1
# <linux/fib_rules.h>
_FRA_DST, _FRA_IIFNAME, _FRA_PRIORITY, _FRA_TABLE = 1, 3, 6, 15
_FR_ACT_TO_TBL, _FR_ACT_BLACKHOLE = 1, 6
LOCAL_TABLE = 255  # what is the host itself (ip-route(8))

_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr
_LINK = struct.Struct("=BxHiII")  # struct ifinfomsg
_ADDRESS = struct.Struct("=BBBBI")  # struct ifaddrmsg
_ATTRIBUTE = struct.Struct("=HH")  # struct rtattr
_RULE = struct.Struct("=BBBBBxxBI")  # struct fib_rule_hdr
_ANSWER_BYTES = 65536


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """Where the kernel looks for the way of a packet (ip-rule(8)); the lowest priority is first.

    For packets that came over `interface`, or all; to addresses in `to`, or all; of the family of
    `to`. With a `table` of None they are dropped.
    """

    priority: int
    to: IPv4Network | IPv6Network
    interface: str = ""
    table: int | None = LOCAL_TABLE


class RouteSocket:
    """A line to the kernel's routing; OSError names what was asked for."""

    def __init__(self) -> None:
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def add_veth(self, name: str, peer: str) -> None:
        """Make a pair of interfaces: what goes into one comes out of the other (veth(4))."""
        other = _LINK.pack(socket.AF_UNSPEC, 0, 0, 0, 0) + _text(_IFLA_IFNAME, peer)
        data = _attribute(_IFLA_INFO_DATA, _attribute(_VETH_INFO_PEER, other))
        info = _attribute(_IFLA_LINKINFO, _text(_IFLA_INFO_KIND, "veth") + data)
        body = _LINK.pack(socket.AF_UNSPEC, 0, 0, 0, 0) + _text(_IFLA_IFNAME, name) + info
        self._ask(_RTM_NEWLINK, body, _NLM_F_CREATE | _NLM_F_EXCL, what=f"make veth {name}")

    def set_mac(self, name: str, mac: bytes) -> None:
        """Give an interface its Ethernet address."""
        self._change(name, _attribute(_IFLA_ADDRESS, mac), what="address")

    def forbid_forwarding(self, name: str) -> None:
        """Have the kernel pass on no IPv4 packet that came over this interface."""
        off = _attribute(_IPV4_DEVCONF_FORWARDING, struct.pack("=I", 0))
        inet = _attribute(socket.AF_INET, _attribute(_IFLA_INET_CONF, off))
        self._change(name, _attribute(_IFLA_AF_SPEC, inet), what="forbid forwarding on")

    def set_up(self, name: str) -> None:
        """Bring an interface up."""
        self._change(name, b"", flags=_IFF_UP, what="bring up")

    def delete(self, name: str) -> None:
        """Remove an interface; its peer goes with it."""
        body = _LINK.pack(socket.AF_UNSPEC, 0, _index(name), 0, 0)
        self._ask(_RTM_DELLINK, body, 0, what=f"delete {name}")

    def add_address(self, name: str, address: IPv4Interface | IPv6Interface) -> None:
        """Add an address, without asking whether somebody else has it (RFC 4862, 5.4)."""
        family = socket.AF_INET if address.version == 4 else socket.AF_INET6  # noqa: PLR2004
        index = _index(name)
        body = b"".join(
            (
                _ADDRESS.pack(family, address.network.prefixlen, 0, 0, index),
                _attribute(_IFA_LOCAL, address.packed),
                _attribute(_IFA_ADDRESS, address.packed),
                _attribute(_IFA_FLAGS, struct.pack("=I", _IFA_F_NODAD)),
            )
        )
        flags = _NLM_F_CREATE | _NLM_F_EXCL
        self._ask(_RTM_NEWADDR, body, flags, what=f"give {name} the address {address}")

    def add_rule(self, rule: Rule) -> None:
        """Add a rule; FileExistsError where there is that one.

        OSError EOPNOTSUPP from a kernel without CONFIG_IP_MULTIPLE_TABLES.
        """
        flags = _NLM_F_CREATE | _NLM_F_EXCL
        self._ask(_RTM_NEWRULE, _render_rule(rule), flags, what=f"add {rule}")

    def delete_rule(self, rule: Rule) -> None:
        """Remove a rule; FileNotFoundError where there is none such."""
        self._ask(_RTM_DELRULE, _render_rule(rule), 0, what=f"delete {rule}")

    def _change(self, name: str, attributes: bytes, *, what: str, flags: int = 0) -> None:
        index = _index(name)
        body = _LINK.pack(socket.AF_UNSPEC, 0, index, flags, flags) + attributes
        self._ask(_RTM_NEWLINK, body, 0, what=f"{what} {name}")

    def _ask(self, kind: int, body: bytes, flags: int, *, what: str) -> None:
        flags |= _NLM_F_REQUEST | _NLM_F_ACK
        self._socket.send(_HEADER.pack(_HEADER.size + len(body), kind, flags, 0, 0) + body)
        answer = self._socket.recv(_ANSWER_BYTES)
        _, told, _, _, _ = _HEADER.unpack_from(answer)
        (error,) = struct.unpack_from("=i", answer, _HEADER.size)
        if told != _NLMSG_ERROR:
            raise OSError(errno.EPROTO, f"rtnetlink: {what}: no answer but a message {told}")
        if error:
            raise OSError(-error, f"rtnetlink: {what}: {os.strerror(-error)}")


def _render_rule(rule: Rule) -> bytes:
    family = socket.AF_INET if rule.to.version == 4 else socket.AF_INET6  # noqa: PLR2004
    action = _FR_ACT_BLACKHOLE if rule.table is None else _FR_ACT_TO_TBL
    table = rule.table or 0
    rendered = _RULE.pack(family, rule.to.prefixlen, 0, 0, table, action, 0)
    if rule.to.prefixlen:
        rendered += _attribute(_FRA_DST, rule.to.network_address.packed)
    if rule.interface:
        rendered += _text(_FRA_IIFNAME, rule.interface)
    return rendered + b"".join(
        _attribute(kind, struct.pack("=I", value))
        for kind, value in ((_FRA_PRIORITY, rule.priority), (_FRA_TABLE, table))
    )


def _index(name: str) -> int:
    try:
        return socket.if_nametoindex(name)
    except OSError:
        raise OSError(errno.ENODEV, f"rtnetlink: there is no interface {name}") from None


def _attribute(kind: int, value: bytes) -> bytes:
    padding = bytes(-len(value) % 4)
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), kind) + value + padding


def _text(kind: int, value: str) -> bytes:
    return _attribute(kind, value.encode() + b"\0")
