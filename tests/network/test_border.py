"""The border: what passes it, and what does not."""

from __future__ import annotations

import pytest

from pytest_vmsandbox.network.addresses import RESOLVER, WAY_OUT, address_of
from pytest_vmsandbox.network.border import Border, Speaker
from tests.network.packets import (
    ICMP6,
    ITS_IP,
    ITS_MAC,
    MY_MAC,
    TCP,
    UDP,
    arp,
    ethernet,
    in_fragments,
    ipv4,
    ipv6,
    neighbour,
    segment,
    to,
)

ME = Speaker.of(2)
THEIRS = address_of(WAY_OUT, RESOLVER)
RESOLVERS = (str(THEIRS.ip), str(THEIRS.ip6))
BORDER = Border(RESOLVERS)
OUTSIDE = (
    "192.0.2.1",
    "10.0.0.1",
    "10.77.255.254",
    "172.16.0.1",
    "8.8.8.8",
    "2001:db8::1",
    "fd00::1",
)


def passes(frame: bytes, *, border: Border = BORDER) -> bool:
    return ME.says(frame) and border.lets_out(ME, frame)


@pytest.mark.parametrize("target", OUTSIDE)
def test_whoever_is_outside_is_reached(target: str) -> None:
    for protocol in (TCP, UDP):
        assert passes(to(protocol, target, 80))
    if ":" not in target:
        assert all(map(passes, in_fragments(UDP, target, 80)))


@pytest.mark.parametrize("target", RESOLVERS)
def test_the_resolver_is_asked_for_names_and_for_nothing_else(target: str) -> None:
    assert passes(to(UDP, target, 53))
    assert passes(to(TCP, target, 53))
    for port in (52, 54, 69, 80, 0, 53 << 8):
        assert not passes(to(UDP, target, port))
        assert not passes(to(TCP, target, port))
    assert not passes(to(UDP, target, 53), border=Border(()))
    if ":" not in target:
        assert not any(map(passes, in_fragments(UDP, target, 53)))


@pytest.mark.parametrize(
    "target",
    [
        *("0.0.0.0", "0.1.2.3", "127.0.0.1", "127.255.255.255", "169.254.169.254", "224.0.0.1"),
        *("240.0.0.1", "255.255.255.255", "10.76.255.254", "10.76.255.1", "10.76.0.2"),
        *("::", "::1", "::7f00:1", "::ffff:127.0.0.1", "::ffff:8.8.8.8", "::ffff:0:127.0.0.1"),
        *("fe80::2", "febf::2", "fec0::2", "ff02::1", "ff0e::1", str(ITS_IP.ip6)),
        "fd76:6d73:6200::2",
    ],
)
def test_what_a_host_takes_for_itself_is_never_reached(target: str) -> None:
    for protocol in (TCP, UDP):
        for port in (53, 80):
            assert not passes(to(protocol, target, port))


def test_nobody_speaks_in_another_s_name() -> None:
    somebody, somebody6 = "10.76.255.3", "fd76:6d73:6200:ff::3"
    assert passes(arp())
    assert passes(arp(answers=True))
    assert ME.says(arp(source="0.0.0.0"))  # who looks whether it is free
    for frame in (
        to(UDP, "8.8.8.8", 53, source=somebody),
        to(UDP, "2001:db8::1", 53, source=somebody6),
        arp(source=somebody),
        arp(source="0.0.0.0"),
        arp(mac=ITS_MAC),
        arp().replace(MY_MAC, ITS_MAC, 1),
        neighbour(136, about=somebody6),
        neighbour(136, about=str(ITS_IP.ip6)),
        neighbour(135, about=str(ITS_IP.ip6), source=somebody6),
        neighbour(135, about=str(ITS_IP.ip6), source="::"),
    ):
        assert not passes(frame)
    assert passes(neighbour(135, about=str(ITS_IP.ip6)))
    assert passes(neighbour(136, about=str(address_of(WAY_OUT, 2).ip6)))
    assert passes(neighbour(136, about="fe80::5", source="fe80::5"))


def test_what_is_no_plain_packet_stays_inside() -> None:
    good = to(UDP, "8.8.8.8", 9)
    data = segment(UDP, 9, source="10.76.255.2", target="8.8.8.8")
    whole = ipv4(data, UDP, "8.8.8.8")
    six = ipv6(data, UDP, "2001:db8::1")
    for frame in (
        good[:33],
        good[:14],
        to(TCP, "8.8.8.8", 80, options=bytes((131, 7, 4, 10, 0, 0, 1, 0))),
        ethernet(b"\x65" + whole[1:], 0x0800),
        ethernet(b"\x44" + whole[1:], 0x0800),
        ethernet(whole[:2] + b"\xff\xff" + whole[4:], 0x0800),
        ethernet(whole[:2] + b"\0\x05" + whole[4:], 0x0800),
        ethernet(six, 0x0800),
        ethernet(whole, 0x86DD),
        ethernet(six[:4] + b"\xff\xff" + six[6:], 0x86DD),
        *(ethernet(ipv6(data, header, "2001:db8::1"), 0x86DD) for header in (0, 43, 44, 60, 50)),
        *(ethernet(ipv4(data, other, "8.8.8.8"), 0x0800) for other in (2, 4, 41, 47)),
        *(ethernet(whole, kind) for kind in (0x88F8, 0x8100, 0x888E, 0x0027)),
        arp()[:20] + b"\0\x03" + arp()[22:],
        b"\xff" * 6 + MY_MAC + b"\x08\x06",
    ):
        assert not passes(frame)
    assert passes(good)


def test_the_gateway_answers_and_does_not_overrule_what_a_guest_was_told() -> None:
    def says(kind: int) -> bytes:
        return ethernet(ipv6(bytes((kind, 0, 0, 0)), ICMP6, "ff02::1"), 0x86DD)

    for kind in (1, 3, 128, 129, 135, 136):
        assert BORDER.lets_in(says(kind))
    for kind in (134, 137):
        assert not BORDER.lets_in(says(kind))
    assert BORDER.lets_in(to(UDP, "10.76.255.2", 9))
    assert BORDER.lets_in(to(TCP, "fd76:6d73:6200:ff::2", 9))
    assert BORDER.lets_in(arp())
    assert not BORDER.lets_in(ethernet(b"", 0x88F8))
