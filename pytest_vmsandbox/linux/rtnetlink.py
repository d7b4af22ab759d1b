"""Interfaces and addresses over rtnetlink(7), in the caller's network namespace."""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import IPv4Interface, IPv4Network, IPv6Interface, IPv6Network
from typing import Self

from pytest_vmsandbox.linux.interface_name import check_interface_name
from pytest_vmsandbox.linux.netlink import HEADER, LINK

_RTM_NEWLINK, _RTM_DELLINK, _RTM_GETLINK, _RTM_NEWADDR = 16, 17, 18, 20
_RTM_NEWRULE, _RTM_DELRULE = 32, 33
_NLM_F_REQUEST, _NLM_F_ACK, _NLM_F_EXCL, _NLM_F_CREATE = 0x1, 0x4, 0x200, 0x400
_NLMSG_ERROR = 2

_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MTU, _IFLA_MASTER, _IFLA_LINKINFO = 1, 3, 4, 10, 18
_IFLA_STATS64, _IFLA_AF_SPEC = 23, 26
_IFLA_INFO_KIND, _IFLA_INFO_DATA = 1, 2
_VETH_INFO_PEER = 1
_IFLA_INET_CONF = 1
# <linux/ip.h>, IPV4_DEVCONF_: settings of one interface (ip-sysctl.rst).
_FORWARDING, _RP_FILTER, _ARP_IGNORE = 1, 8, 19
_STRICT = 1  # of RP_FILTER: what comes from where nothing would go is dropped (RFC 3704)
_OWN_ADDRESSES, _NO_ADDRESS = 1, 8  # of ARP_IGNORE: for which of ours ARP is answered
_IFLA_INET6_ADDR_GEN_MODE, _IN6_ADDR_GEN_MODE_NONE = 8, 1
# <linux/if_link.h>, IFLA_BR_: what a bridge of ours is, whatever the kernel makes of others.
_BRIDGE_FORWARD_DELAY, _BRIDGE_AGEING, _BRIDGE_STP, _BRIDGE_GROUP_MASK = 1, 4, 5, 9
_BRIDGE_MULTICAST_SNOOPING, _BRIDGE_LEARNED_AT_MOST = 23, 49
_IFA_ADDRESS, _IFA_LOCAL, _IFA_FLAGS = 1, 2, 8
_IFA_F_NODAD = 0x02
_IFF_UP = 0x1
# <linux/fib_rules.h>
_FRA_DST, _FRA_IIFNAME, _FRA_PRIORITY, _FRA_TABLE = 1, 3, 6, 15
_FR_ACT_TO_TBL, _FR_ACT_BLACKHOLE = 1, 6
LOCAL_TABLE = 255  # what is the host itself (ip-route(8))

_ADDRESS = struct.Struct("=BBBBI")  # struct ifaddrmsg
_ATTRIBUTE = struct.Struct("=HH")  # struct rtattr
_RULE = struct.Struct("=BBBBBxxBI")  # struct fib_rule_hdr
_STATS = struct.Struct("=8Q")  # the beginning of struct rtnl_link_stats64
_ANSWER_BYTES = 65536

# All but those that the standard keeps to each wire: STP, PAUSE and LACP (br_private.h).
_ALL_GROUPS = 0xFFF8


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkStats:
    """What became of the frames that an interface was given to send."""

    sent: int
    dropped: int


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
        self.close()

    def close(self) -> None:
        """Hang up; what was made stays."""
        self._socket.close()

    def add_veth(self, name: str, peer: str) -> None:
        """Make a pair of interfaces: what goes into one comes out of the other (veth(4))."""
        other = LINK.pack(socket.AF_UNSPEC, 0, 0, 0, 0) + _name(peer)
        self._make("veth", name, _attribute(_VETH_INFO_PEER, other))

    def add_bridge(self, name: str, *, ageing_s: int, learned_at_most: int) -> None:
        """Make a bridge that carries from the first moment on, and keeps no frame to itself.

        It knows where an address is for `ageing_s` seconds; with 0 all goes everywhere.
        """
        options = {
            _BRIDGE_FORWARD_DELAY: struct.pack("=I", 0),
            _BRIDGE_STP: struct.pack("=I", 0),
            _BRIDGE_AGEING: struct.pack("=I", ageing_s * 100),  # USER_HZ
            _BRIDGE_GROUP_MASK: struct.pack("=H", _ALL_GROUPS),
            # Snooping wants somebody who asks, and there is nobody: multicast would end.
            _BRIDGE_MULTICAST_SNOOPING: b"\0",
            _BRIDGE_LEARNED_AT_MOST: struct.pack("=I", learned_at_most),  # since Linux 6.7
        }
        self._make("bridge", name, _attributes(options))

    def set_master(self, name: str, bridge: str | None) -> None:
        """Make an interface a port of that bridge, and of no other; None: of none."""
        index = 0 if bridge is None else self._index(bridge)
        master = _attribute(_IFLA_MASTER, struct.pack("=I", index))
        self._change(name, master, what=f"make a port of {bridge}:")

    def set_mtu(self, name: str, mtu: int) -> None:
        """Have an interface take packets of up to so many bytes."""
        self._change(name, _attribute(_IFLA_MTU, struct.pack("=I", mtu)), what="set the MTU of")

    def be_silent(self, name: str) -> None:
        """Have the kernel give an interface no IPv6 address, and so say nothing there by itself."""
        none = _attribute(_IFLA_INET6_ADDR_GEN_MODE, bytes((_IN6_ADDR_GEN_MODE_NONE,)))
        inet6 = _attribute(_IFLA_AF_SPEC, _attribute(socket.AF_INET6, none))
        try:
            self._change(name, inet6, what="silence")
        except OSError as error:
            if error.errno != errno.EAFNOSUPPORT:  # a kernel without IPv6 is as silent
                raise

    def stats(self, name: str) -> LinkStats:
        """What an interface has sent so far."""
        body = LINK.pack(socket.AF_UNSPEC, 0, self._index(name), 0, 0)
        answer = self._exchange(_RTM_GETLINK, body, _NLM_F_REQUEST, what=f"look at {name}")
        found = _read_attributes(answer, HEADER.size + LINK.size)
        _, sent, _, _, _, _, _, dropped = _STATS.unpack_from(found[_IFLA_STATS64])
        return LinkStats(sent=sent, dropped=dropped)

    def set_mac(self, name: str, mac: bytes) -> None:
        """Give an interface its Ethernet address."""
        self._change(name, _attribute(_IFLA_ADDRESS, mac), what="address")

    def forbid_forwarding(self, name: str) -> None:
        """Have the kernel pass on no IPv4 packet that came over this interface."""
        self._set_ipv4(name, {_FORWARDING: 0}, what="forbid forwarding on")

    def hold_aloof(self, name: str, *, answers: bool) -> None:
        """Have our own IPv4 take nothing from an interface that has none of our addresses.

        With `answers` it is one that may be given some: for them, and no others, ARP is answered.
        """
        ignore = _OWN_ADDRESSES if answers else _NO_ADDRESS
        settings = {_FORWARDING: 0, _RP_FILTER: _STRICT, _ARP_IGNORE: ignore}
        self._set_ipv4(name, settings, what="hold aloof from")

    def _set_ipv4(self, name: str, settings: Mapping[int, int], *, what: str) -> None:
        values = {setting: struct.pack("=I", value) for setting, value in settings.items()}
        inet = _attribute(socket.AF_INET, _attribute(_IFLA_INET_CONF, _attributes(values)))
        self._change(name, _attribute(_IFLA_AF_SPEC, inet), what=what)

    def set_up(self, name: str) -> None:
        """Bring an interface up."""
        self._change(name, b"", flags=_IFF_UP, what="bring up")

    def set_down(self, name: str) -> None:
        """Take an interface down: it carries nothing."""
        self._change(name, b"", change=_IFF_UP, what="take down")

    def delete(self, name: str) -> None:
        """Remove an interface; its peer goes with it."""
        body = LINK.pack(socket.AF_UNSPEC, 0, self._index(name), 0, 0)
        self._ask(_RTM_DELLINK, body, 0, what=f"delete {name}")

    def add_address(self, name: str, address: IPv4Interface | IPv6Interface) -> None:
        """Add an address, without asking whether somebody else has it (RFC 4862, 5.4)."""
        family = socket.AF_INET if address.version == 4 else socket.AF_INET6  # noqa: PLR2004
        index = self._index(name)
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

    def _make(self, kind: str, name: str, options: bytes) -> None:
        about = _text(_IFLA_INFO_KIND, kind) + _attribute(_IFLA_INFO_DATA, options)
        info = _attribute(_IFLA_LINKINFO, about)
        body = LINK.pack(socket.AF_UNSPEC, 0, 0, 0, 0) + _name(name) + info
        self._ask(_RTM_NEWLINK, body, _NLM_F_CREATE | _NLM_F_EXCL, what=f"make {kind} {name}")

    def _change(
        self, name: str, attributes: bytes, *, what: str, flags: int = 0, change: int = 0
    ) -> None:
        index = self._index(name)
        body = LINK.pack(socket.AF_UNSPEC, 0, index, flags, flags | change) + attributes
        self._ask(_RTM_NEWLINK, body, 0, what=f"{what} {name}")

    def _index(self, name: str) -> int:
        """By this line, not if_nametoindex(3): whoever has no descriptor left can undo things."""
        body = LINK.pack(socket.AF_UNSPEC, 0, 0, 0, 0) + _name(name)
        try:
            answer = self._exchange(_RTM_GETLINK, body, _NLM_F_REQUEST, what=f"look for {name}")
        except OSError as error:
            if error.errno != errno.ENODEV:
                raise
            raise OSError(errno.ENODEV, f"rtnetlink: there is no interface {name}") from None
        _, _, index, _, _ = LINK.unpack_from(answer, HEADER.size)
        return int(index)

    def _ask(self, kind: int, body: bytes, flags: int, *, what: str) -> None:
        flags |= _NLM_F_REQUEST | _NLM_F_ACK
        answer = self._exchange(kind, body, flags, what=what)
        _, told, _, _, _ = HEADER.unpack_from(answer)
        if told != _NLMSG_ERROR:
            raise OSError(errno.EPROTO, f"rtnetlink: {what}: no answer but a message {told}")

    def _exchange(self, kind: int, body: bytes, flags: int, *, what: str) -> bytes:
        self._socket.send(HEADER.pack(HEADER.size + len(body), kind, flags, 0, 0) + body)
        answer = self._socket.recv(_ANSWER_BYTES)
        _, told, _, _, _ = HEADER.unpack_from(answer)
        (error,) = struct.unpack_from("=i", answer, HEADER.size)
        if told == _NLMSG_ERROR and error:
            raise OSError(-error, f"rtnetlink: {what}: {os.strerror(-error)}")
        return answer


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


def _attribute(kind: int, value: bytes) -> bytes:
    padding = bytes(-len(value) % 4)
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), kind) + value + padding


def _attributes(values: Mapping[int, bytes]) -> bytes:
    return b"".join(_attribute(kind, value) for kind, value in values.items())


def _read_attributes(message: bytes, at: int) -> dict[int, bytes]:
    found = {}
    while at + _ATTRIBUTE.size <= len(message):
        length, kind = _ATTRIBUTE.unpack_from(message, at)
        found[kind] = message[at + _ATTRIBUTE.size : at + length]
        at += length + -length % 4
    return found


def _name(name: str) -> bytes:
    return _text(_IFLA_IFNAME, check_interface_name(name))


def _text(kind: int, value: str) -> bytes:
    return _attribute(kind, value.encode() + b"\0")
