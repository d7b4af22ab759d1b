"""The gateway, a real one, and what of this host is reached through it: nothing of its loopback."""

from __future__ import annotations

import asyncio
import shutil
import socket
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from pytest_vmsandbox.errors import NetworkFailed
from pytest_vmsandbox.host.facts import QemuBuild
from pytest_vmsandbox.host.platform import current_platform
from pytest_vmsandbox.linux import ProcessIdentity
from pytest_vmsandbox.machine.gateway_launcher import Gateway, open_bare_gateway
from pytest_vmsandbox.machine.switch_launcher import open_bare_switch
from pytest_vmsandbox.network.addresses import RESOLVER, WAY_OUT, address_of
from pytest_vmsandbox.network.client import SwitchLine
from pytest_vmsandbox.network.frames import FrameReader, encode_frame
from pytest_vmsandbox.network.wire_kind import AUTO
from tests.network.packets import (
    ITS_IP,
    MY_MAC,
    TCP,
    UDP,
    arp,
    ethernet,
    in_fragments,
    ipv6,
    neighbour,
    segment,
    to,
)

pytestmark = pytest.mark.asyncio

_PROGRAM = shutil.which(current_platform().qemu_program)
needs_qemu = pytest.mark.skipif(_PROGRAM is None, reason="no QEMU")

ARP = b"\x08\x06"
THEIRS = address_of(WAY_OUT, RESOLVER)


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """What listens on the loopback of this host, for IPv4 and IPv6, all on one port."""

    port: int
    sockets: Sequence[socket.socket]

    def reached(self) -> bool:
        """Whether anybody has come by; who has is forgotten."""
        found = False
        for sock in self.sockets:
            try:
                while True:
                    if sock.type == socket.SOCK_STREAM:
                        sock.accept()[0].close()
                    else:
                        sock.recv(1000)
                    found = True
            except BlockingIOError:
                pass
        return found


@pytest.fixture
def services() -> Iterator[Services]:
    with ExitStack() as held:
        port, sockets = 0, []
        for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
            for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
                sock = held.enter_context(socket.socket(family, kind))
                sock.bind((host, port))
                sock.settimeout(0)
                if kind == socket.SOCK_STREAM:
                    sock.listen()
                port = sock.getsockname()[1]
                sockets.append(sock)
        yield Services(port=port, sockets=sockets)


def qemu() -> QemuBuild:
    assert _PROGRAM is not None
    return QemuBuild(path=_PROGRAM, version="", sandbox=True)


@pytest.fixture
async def gateway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Gateway]:
    """One that has IPv6, whether this host has it or not."""
    monkeypatch.setattr("pytest_vmsandbox.machine.gateway_launcher.host_has_ipv6", lambda: True)
    opened = open_bare_gateway(qemu(), log=tmp_path / "log", started=lambda _: None)
    async with opened as gateway:
        yield gateway


class Wire:
    """A machine's wire to a gateway, with what lies between."""

    def __init__(self, sock: socket.socket, line: SwitchLine | None = None) -> None:
        self.sock, self.line = sock, line
        self.sock.settimeout(0)
        self._reader = FrameReader()
        self._heard: list[bytes] = []

    async def say(self, *frames: bytes) -> None:
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(self.sock, b"".join(map(encode_frame, frames)))

    async def hear(self, kind: bytes) -> bytes:
        """The next frame of an Ethernet type; others are passed over."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(20):
            while True:
                while self._heard:
                    frame = self._heard.pop(0)
                    if frame[12:14] == kind:
                        return frame
                self._heard += self._reader.feed(await loop.sock_recv(self.sock, 1 << 16))

    async def all_was_heard(self) -> None:
        """Return when whatever was said has been dealt with: a question is answered in turn."""
        await self.say(arp())
        await self.hear(ARP)


def bare_switch(place: Path) -> AbstractAsyncContextManager[SwitchLine]:
    return open_bare_switch(wish=AUTO, log=place / "switch.log", started=lambda _: None)


async def plugged(line: SwitchLine, name: str, machine: int) -> socket.socket:
    """A machine's end of a wire, as its VMM has it."""
    wire = await line.plug(WAY_OUT, name, title="nat", machine=machine)
    return socket.socket(fileno=wire)


@pytest.fixture
async def behind_the_border(gateway: Gateway, tmp_path: Path) -> AsyncIterator[Wire]:
    """A machine's end of a wire to the switch, beyond which is the gateway."""
    resolvers = [str(THEIRS.ip), str(THEIRS.ip6)]
    async with bare_switch(tmp_path) as line:
        await line.guard(WAY_OUT, gateway.wire, resolvers)
        with await plugged(line, "me", 2) as sock:
            yield Wire(sock, line)
        assert not line.over
    assert (tmp_path / "switch.log").read_text() == ""


# A way by the gateway's own address that the packet wants to go (RFC 791, loose source route).
ROUTED = bytes((131, 7, 4)) + ITS_IP.ip.packed + b"\0"


def hostile(port: int) -> dict[str, list[bytes]]:
    """Frames that would reach the loopback of the host through libslirp, and their like."""
    inside, inside6 = str(ITS_IP.ip), str(ITS_IP.ip6)
    found = {
        f"{name} to {target}": [to(protocol, target, port)]
        for name, protocol in (("tcp", TCP), ("udp", UDP))
        for target in (
            *(inside, "10.76.255.9", "10.76.255.255", "255.255.255.255", "127.0.0.1", "0.0.0.0"),
            *("127.1.2.3", str(THEIRS.ip)),
            *(inside6, "fd76:6d73:6200:ff::9", "::1", "::", "ff02::1", "::ffff:127.0.0.1"),
            *("::ffff:0.0.0.0", "::127.0.0.1", str(THEIRS.ip6)),
        )
    }
    found |= {
        f"{name} to {target} in fragments": in_fragments(protocol, target, port)
        for name, protocol in (("tcp", TCP), ("udp", UDP))
        for target in (inside, "127.0.0.1", str(THEIRS.ip))
    }
    found |= {
        "by a source route": [to(TCP, inside, port, options=ROUTED)],
        "by a source route to the loopback": [to(TCP, "127.0.0.1", port, options=ROUTED)],
        "by a source route to the resolver": [to(TCP, str(THEIRS.ip), 53, options=ROUTED)],
        "by the broadcast address of Ethernet": [to(UDP, inside, port, mac=b"\xff" * 6)],
        "by an Ethernet address of nobody": [to(TCP, inside, port, mac=b"\x02" * 6)],
        "in another's name": [to(TCP, inside, port, source="10.76.255.3")],
        "as the host's end": [to(TCP, inside, port, source="10.76.255.1")],
        "with a VLAN tag": [
            b"".join((f[:12], b"\x81\0\0\1", f[12:])) for f in (to(TCP, inside, port),)
        ],
        "behind a header of IPv6": [behind_a_header(inside6, port)],
    }
    return found


def behind_a_header(target: str, port: int) -> bytes:
    data = segment(TCP, port, source=str(address_of(WAY_OUT, 2).ip6), target=target)
    return ethernet(ipv6(bytes((TCP, 0, 1, 4, 0, 0, 0, 0)) + data, 0, target), 0x86DD)


# Some of what libslirp brings to the loopback (4.7, seen).
KNOWN_TO_REACH = (
    *("tcp to 10.76.255.254", "tcp to 127.0.0.1", "tcp to 255.255.255.255", "tcp to 0.0.0.0"),
    *("tcp to fd76:6d73:6200:ff::9", "tcp to ::1", "tcp to ff02::1", "tcp to ::ffff:127.0.0.1"),
    *("udp to 10.76.255.254", "udp to 127.0.0.1", "tcp to 127.0.0.1 in fragments"),
    *("by a source route to the loopback", "by an Ethernet address of nobody"),
)

# What it takes for a connection over the loopback to be seen there, and many times over.
SETTLE_S = 0.5


@needs_qemu
async def test_nothing_that_a_machine_says_reaches_the_loopback_of_the_host(
    services: Services, behind_the_border: Wire
) -> None:
    for frames in hostile(services.port).values():
        await behind_the_border.say(*frames)
    await behind_the_border.all_was_heard()
    await asyncio.sleep(SETTLE_S)

    assert not services.reached()


@needs_qemu
async def test_without_the_border_it_is_reached(services: Services, gateway: Gateway) -> None:
    wire = Wire(gateway.wire)
    await wire.say(arp(), neighbour(135, about=str(ITS_IP.ip6)))
    frames = hostile(services.port)
    for name in KNOWN_TO_REACH:
        await wire.say(*frames[name])
        async with asyncio.timeout(20):
            while not services.reached():
                await asyncio.sleep(0.01)


@needs_qemu
async def test_machines_on_it_hear_nothing_of_each_other(gateway: Gateway, tmp_path: Path) -> None:
    async with bare_switch(tmp_path) as line:
        await line.guard(WAY_OUT, gateway.wire, [])
        with await plugged(line, "m2", 2) as first, await plugged(line, "m3", 3) as second:
            one, two = Wire(first), Wire(second)
            his = bytes.fromhex(address_of(WAY_OUT, 3).mac.replace(":", ""))
            await two.say(arp(mac=his, source="10.76.255.3"))  # so that it is known where he is
            await two.hear(ARP)

            await one.say(to(UDP, "10.76.255.3", 9, mac=his), arp(target="10.76.255.3"))
            await one.say(to(UDP, "10.76.255.3", 9, mac=b"\xff" * 6))
            # Nor does he get what is for another, whose name he takes.
            await two.say(arp(mac=his, source="10.76.255.2"), arp(mac=MY_MAC, source="10.76.255.2"))
            await one.all_was_heard()

            with pytest.raises(BlockingIOError):
                two.sock.recv(1)
            assert (await line.counts(WAY_OUT))["cut"] >= 2


@needs_qemu
async def test_one_that_ends_is_over_and_its_guard_takes_another(
    gateway: Gateway, behind_the_border: Wire, tmp_path: Path
) -> None:
    await behind_the_border.all_was_heard()
    gateway.process.kill()
    async with asyncio.timeout(20):
        while not gateway.over:
            await asyncio.sleep(0.01)
    line = behind_the_border.line
    assert line is not None
    opened = open_bare_gateway(qemu(), log=tmp_path / "log", started=lambda _: None)
    async with opened as another:
        await line.guard(WAY_OUT, another.wire, [])

        await behind_the_border.all_was_heard()


async def test_one_that_does_not_start_says_so_with_its_own_words(tmp_path: Path) -> None:
    program = tmp_path / "qemu"
    program.write_text("#!/bin/sh\necho no slirp here >&2; exit 1\n")
    program.chmod(0o755)
    wrong = QemuBuild(path=str(program), version="", sandbox=True)
    identities: list[ProcessIdentity] = []

    with pytest.raises(
        NetworkFailed, match="gateway of the network nat can't be started"
    ) as caught:
        async with open_bare_gateway(wrong, log=tmp_path / "log", started=identities.append):
            pass

    assert "no slirp here" in str(caught.value)
    assert len(identities) == 1
    assert not Path(f"/proc/{identities[0].pid}").exists()
