"""Packets, made by hand: what a guest that wants harm can put on its wire."""

from __future__ import annotations

import struct
from ipaddress import ip_address
from itertools import count

from pytest_vmsandbox.network.addresses import GATEWAY, WAY_OUT, address_of

ME = address_of(WAY_OUT, 2)
MY_MAC = bytes.fromhex(ME.mac.replace(":", ""))
ITS_IP = address_of(WAY_OUT, GATEWAY)
ITS_MAC = bytes.fromhex("52550a4cfffe")  # slirp's own, made of its address

TCP, UDP, ICMP6 = 6, 17, 58
_PORTS = count(20000)  # libslirp knows whoever sends datagrams by his port alone


def checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071)."""
    if len(data) % 2:
        data += b"\0"
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def packed(address: str) -> bytes:
    return ip_address(address).packed


def ethernet(
    payload: bytes, kind: int, *, source: bytes = MY_MAC, target: bytes = ITS_MAC
) -> bytes:
    return (target + source + kind.to_bytes(2, "big") + payload).ljust(60, b"\0")


def segment(protocol: int, port: int, *, source: str, target: str, text: bytes = b"") -> bytes:
    """A SYN, or a datagram, with a checksum that is right for these addresses."""
    ends, source_port = packed(source) + packed(target), next(_PORTS)
    if protocol == TCP:
        words = (source_port, port, 1000, 0, 5 << 4, 2, 8192)
        header, at = struct.pack("!HHIIBBH", *words) + bytes(4), 16
    else:
        header, at = struct.pack("!HHHH", source_port, port, 8 + len(text), 0), 6
    data = header + text
    pseudo = ends + struct.pack("!I", len(data)) + bytes((0, 0, 0, protocol))
    return data[:at] + struct.pack("!H", checksum(pseudo + data)) + data[at + 2 :]


def ipv4(
    data: bytes,
    protocol: int,
    target: str,
    *,
    source: str = str(ME.ip),
    options: bytes = b"",
    fragment: int = 0,
) -> bytes:
    """An IPv4 packet; `fragment` is the field of flags and offset."""
    words = 5 + len(options) // 4
    length = words * 4 + len(data)
    ends = packed(source) + packed(target)
    fields = (0x40 | words, 0, length, 7, fragment, 64, protocol)
    header = struct.pack("!BBHHHBB", *fields) + bytes(2) + ends + options
    header = header[:10] + struct.pack("!H", checksum(header)) + header[12:]
    return header + data


def ipv6(data: bytes, protocol: int, target: str, *, source: str = str(ME.ip6)) -> bytes:
    fields = (0x60000000, len(data), protocol, 255)
    return struct.pack("!IHBB", *fields) + packed(source) + packed(target) + data


def to(
    protocol: int,
    target: str,
    port: int,
    *,
    source: str = "",
    text: bytes = b"hello",
    mac: bytes = ITS_MAC,
    options: bytes = b"",
) -> bytes:
    """A frame with a SYN, or a datagram, for that address and port."""
    if ":" in target:
        source = source or str(ME.ip6)
        data = segment(protocol, port, source=source, target=target, text=text)
        return ethernet(ipv6(data, protocol, target, source=source), 0x86DD, target=mac)
    source = source or str(ME.ip)
    data = segment(protocol, port, source=source, target=target, text=text)
    packet = ipv4(data, protocol, target, source=source, options=options)
    return ethernet(packet, 0x0800, target=mac)


def in_fragments(protocol: int, target: str, port: int) -> list[bytes]:
    """The same in two pieces, the second of which does not say which port it is for."""
    text = b"" if protocol == TCP else b"hello, and more"
    data = segment(protocol, port, source=str(ME.ip), target=target, text=text)
    more = 0x2000
    pieces = (
        ipv4(data[:8], protocol, target, fragment=more),
        ipv4(data[8:], protocol, target, fragment=1),
    )
    return [ethernet(piece, 0x0800) for piece in pieces]


def arp(
    *,
    target: str = str(ITS_IP.ip),
    mac: bytes = MY_MAC,
    source: str = str(ME.ip),
    answers: bool = False,
) -> bytes:
    """Who has it?"""
    fields = (1, 0x0800, 6, 4, 1 + answers, mac, packed(source), bytes(6), packed(target))
    return ethernet(struct.pack("!HHBBH6s4s6s4s", *fields), 0x0806, source=mac, target=b"\xff" * 6)


def neighbour(kind: int, *, about: str, source: str = str(ME.ip6)) -> bytes:
    """A neighbour's solicitation (135) or advertisement (136)."""
    target = str(ITS_IP.ip6)
    data = struct.pack("!BBHI", kind, 0, 0, 0) + packed(about) + bytes((1, 1)) + MY_MAC
    pseudo = (
        packed(source) + packed(target) + struct.pack("!I", len(data)) + bytes((0, 0, 0, ICMP6))
    )
    data = data[:2] + struct.pack("!H", checksum(pseudo + data)) + data[4:]
    return ethernet(ipv6(data, ICMP6, target, source=source), 0x86DD)
