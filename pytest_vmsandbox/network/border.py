"""The border: which frames pass between a machine and the gateway of a network with a way out.

The gateway is a TCP/IP stack in a process (libslirp): for what a machine sends it opens sockets of
the host, whatever Ethernet address a frame was for. So a machine would reach the host's own
loopback, where services listen that trust whoever comes: libslirp turns its own addresses into
127.0.0.1 and ::1 (sotranslate_out in its socket.c), and takes 127.0.0.1 itself, 0.0.0.0, ::1 and
::ffff:127.0.0.1 as they are. What may pass is therefore listed here, by what each frame says of
itself; nothing else does.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import Self

from pytest_vmsandbox.network.addresses import IPV4, IPV6, WAY_OUT, address_of

# IEEE 802 numbers: ARP, IPv4, IPv6.
_ARP, _IPV4, _IPV6 = b"\x08\x06", b"\x08\x00", b"\x86\xdd"
# Protocol numbers of IP.
_ICMP, _TCP, _UDP, _ICMP6 = 1, 6, 17, 58
_DNS = (53).to_bytes(2, "big")

# ARP for IPv4 on Ethernet (RFC 826): who asks and who answers.
_ARP_BEGINS = bytes.fromhex("0001080006040001"), bytes.fromhex("0001080006040002")

# Neighbour discovery (RFC 4861): what may go out, and what may come in beside it.
_SOLICITATION, _ADVERTISEMENT = 135, 136
# A router's advertisement and a redirect: our agent has told the guest all that it must know, and
# would be overruled.
_OVERRULING = (134, 137)

# Where each begins in a frame.
_SOURCE_MAC, _TYPE, _IP = slice(6, 12), slice(12, 14), 14
_ARP_BEGIN, _ARP_MAC, _ARP_ADDRESS, _ARP_END = slice(14, 22), slice(22, 28), slice(28, 32), 42
_V4_SOURCE, _V4_TARGET, _V4_END = slice(26, 30), slice(30, 34), 34
_V6_SOURCE, _V6_TARGET, _V6_END = slice(22, 38), slice(38, 54), 54
_ND_TARGET, _ND_END = slice(62, 78), 78

# Version 4 without options: a way that a packet wants to go is nothing to us. And version 6.
_V4_PLAIN, _V6_VERSION = 0x45, 6

_NOBODY_V4, _NOBODY_V6 = bytes(4), bytes(16)

# What no router forwards, or what a host takes for itself: this network, loopback, link-local,
# multicast, reserved and broadcast (RFC 6890, RFC 3927), and our own networks.
_KEPT_V4 = (
    *map(IPv4Network, ("0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/4", "240.0.0.0/4")),
    IPV4,
)
# The same: unspecified, loopback and IPv4 in the clothes of IPv6 (all in ::/16), link-local,
# site-local, multicast (RFC 4291).
_KEPT_V6 = (*map(IPv6Network, ("::/16", "fe80::/10", "fec0::/10", "ff00::/8")), IPV6)


@dataclass(frozen=True, slots=True, kw_only=True)
class Speaker:
    """What a machine is called, as it stands in frames: nobody else may call himself so."""

    mac: bytes
    ipv4: bytes
    ipv6: bytes

    @classmethod
    def of(cls, machine: int) -> Self:
        """The machine of that number on the network with a way out."""
        address = address_of(WAY_OUT, machine)
        return cls(
            mac=bytes.fromhex(address.mac.replace(":", "")),
            ipv4=address.ip.packed,
            ipv6=address.ip6.packed,
        )

    def says(self, frame: bytes) -> bool:
        """Whether it is a frame of a kind that is known here, and of this machine.

        Somebody who said that he is another would get that one's answers.
        """
        if frame[_SOURCE_MAC] != self.mac:
            return False
        kind = frame[_TYPE]
        if kind == _IPV4:
            return len(frame) >= _V4_END and frame[_V4_SOURCE] == self.ipv4
        if kind == _IPV6:
            source = frame[_V6_SOURCE]
            ours = source in (self.ipv6, _NOBODY_V6) or _is_link_local(source)
            return len(frame) >= _V6_END and ours
        if kind != _ARP or len(frame) < _ARP_END or frame[_ARP_BEGIN] not in _ARP_BEGINS:
            return False
        # Who looks whether an address is free has none yet (RFC 5227).
        return frame[_ARP_MAC] == self.mac and frame[_ARP_ADDRESS] in (self.ipv4, _NOBODY_V4)


class Border:
    """What passes between machines and the gateway; `resolvers` may be asked by DNS there."""

    def __init__(self, resolvers: tuple[str, ...]) -> None:
        self._resolvers = frozenset(ip_address(resolver).packed for resolver in resolvers)

    def lets_out(self, speaker: Speaker, frame: bytes) -> bool:
        """Whether the gateway may hear this frame, which `speaker` says."""
        kind = frame[_TYPE]
        if kind == _IPV4:
            return self._lets_out_v4(frame)
        if kind == _IPV6:
            return self._lets_out_v6(speaker, frame)
        return frame[_ARP_ADDRESS] == speaker.ipv4  # it is ARP, or nobody had said it

    def lets_in(self, frame: bytes) -> bool:
        """Whether a machine may hear this frame of the gateway's."""
        kind = frame[_TYPE]
        if kind == _IPV6 and len(frame) > _V6_END and frame[_IP + 6] == _ICMP6:
            return frame[_V6_END] not in _OVERRULING
        return kind in (_ARP, _IPV4, _IPV6)

    def _lets_out_v4(self, frame: bytes) -> bool:
        if frame[_IP] != _V4_PLAIN:
            return False
        length = int.from_bytes(frame[_IP + 2 : _IP + 4], "big")
        if not _V4_END - _IP <= length <= len(frame) - _IP:
            return False
        protocol, target = frame[_IP + 9], frame[_V4_TARGET]
        if target in self._resolvers:
            # All but DF: the rest of a fragmented packet does not say which port it is for.
            whole = not int.from_bytes(frame[_IP + 6 : _IP + 8], "big") & 0xBFFF
            return whole and self._asks(protocol, frame[_V4_END : _IP + length])
        return protocol in (_ICMP, _TCP, _UDP) and _lies_outside(target)

    def _lets_out_v6(self, speaker: Speaker, frame: bytes) -> bool:
        length = int.from_bytes(frame[_IP + 4 : _IP + 6], "big")
        if frame[_IP] >> 4 != _V6_VERSION or length > len(frame) - _V6_END:
            return False
        # No header between this one and the payload is ever looked at, by us or by the gateway.
        protocol, target = frame[_IP + 6], frame[_V6_TARGET]
        payload = frame[_V6_END : _V6_END + length]
        if protocol == _ICMP6 and payload[:1] and payload[0] in (_SOLICITATION, _ADVERTISEMENT):
            return _is_neighbourly(speaker, frame, payload)
        if frame[_V6_SOURCE] != speaker.ipv6:
            return False
        if target in self._resolvers:
            return self._asks(protocol, payload)
        return protocol in (_ICMP6, _TCP, _UDP) and _lies_outside(target)

    def _asks(self, protocol: int, payload: bytes) -> bool:
        return protocol in (_TCP, _UDP) and payload[2:4] == _DNS


def _is_neighbourly(speaker: Speaker, frame: bytes, payload: bytes) -> bool:
    """Whether it is neighbour discovery in which the machine speaks of nobody but itself."""
    if len(frame) < _ND_END or frame[_V6_SOURCE] == _NOBODY_V6:
        return False
    if payload[0] == _SOLICITATION:
        return True
    target = frame[_ND_TARGET]
    return target == speaker.ipv6 or _is_link_local(target)


def _is_link_local(address: bytes) -> bool:
    return address[:1] == b"\xfe" and address[1:2] >= b"\x80" and address[1:2] < b"\xc0"


@lru_cache(maxsize=4096)
def _lies_outside(target: bytes) -> bool:
    """Whether a packet for that address is for somebody beyond the host."""
    if len(target) == len(_NOBODY_V4):
        v4 = IPv4Address(target)
        return not any(v4 in network for network in _KEPT_V4)
    v6 = IPv6Address(target)
    return not any(v6 in network for network in _KEPT_V6)
