"""Networks of taps: a real switch behind walls, a real bridge, and frames through both."""

from __future__ import annotations

import asyncio
import fcntl
import os
import resource
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import pytest

from pytest_vmsandbox.errors import BridgeLost, HostUnfit, NetworkFailed, TapLost
from pytest_vmsandbox.host.facts import Tier
from pytest_vmsandbox.linux import OwnedFd
from pytest_vmsandbox.machine.switch_launcher import open_walled_switch
from pytest_vmsandbox.network.addresses import address_of
from pytest_vmsandbox.network.client import SwitchLine
from pytest_vmsandbox.network.impairment import Impairment
from pytest_vmsandbox.network.wire_kind import WireKind
from pytest_vmsandbox.warden.client import open_warden
from tests.network.packets import ICMP6, TCP, checksum, ethernet, ipv4, ipv6, to

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has taps")

EVERYBODY = b"\xff" * 6
_TUNGETDEVNETNS = 0x54E3
_VNET_HEADER = 10
_LOOPBACK = ["lo"]


@pytest.fixture
async def line(tmp_path: Path) -> AsyncIterator[SwitchLine]:
    """A switch that makes taps; it must end without having said anything."""
    tier = Tier.ROOT if os.getuid() == 0 else Tier.USERNS
    log = tmp_path / "switch.log"
    async with AsyncExitStack() as held:
        try:
            warden = await held.enter_async_context(open_warden(tier, log=tmp_path / "warden.log"))
            yield await held.enter_async_context(
                open_walled_switch(warden, tier, wish=WireKind.TAP, log=log, started=lambda _: None)
            )
        except HostUnfit as unfit:
            pytest.skip(str(unfit))
    assert log.read_text() == ""


def mac(number: int) -> bytes:
    """That of a machine; the one before the first is the host's end."""
    return b"\x02\x76\x6d\x00\x00" + bytes((1 + number,))


def frame(to: bytes, source: int, text: bytes = b"hello") -> bytes:
    return (to + mac(source) + b"\x88\xb5" + text).ljust(60, b"\0")


class Card:
    """A machine's end of a wire, as a VMM has it."""

    def __init__(self, number: int, tap: OwnedFd) -> None:
        self.number, self.tap = number, tap

    def say(self, to: bytes, text: bytes, *, header: bytes = bytes(_VNET_HEADER)) -> None:
        os.write(self.tap, header + frame(to, self.number, text))

    def heard(self) -> list[bytes]:
        """All that has come by now, but for what the kernel says by itself."""
        found = []
        while True:
            try:
                found.append(os.read(self.tap, 1 << 17)[_VNET_HEADER:])
            except BlockingIOError:
                return [each for each in found if each[12:14] == b"\x88\xb5"]

    async def hear(self, text: bytes) -> None:
        """Return once a frame came, exactly one, that says so."""
        async with asyncio.timeout(10):
            while not (heard := self.heard()):
                await asyncio.sleep(0.001)
        assert [each[14 : 14 + len(text)] for each in heard] == [text]


@pytest.fixture
async def cards(line: SwitchLine) -> AsyncIterator[list[Card]]:
    """Three machines, called 1, 2 and 3, on network 0."""
    cards = [Card(at, await line.plug(0, str(at), title="lan")) for at in (1, 2, 3)]
    yield cards
    for card in cards:
        card.tap.close()


def inside(tap: int, *command: str) -> str:
    """What a command prints in the network namespace of a tap; only root may look there."""
    if os.getuid():
        pytest.skip("VMS-TEST-NOT-ROOT: only root may enter the switch's network namespace")
    with OwnedFd(fcntl.ioctl(tap, _TUNGETDEVNETNS)) as namespace:
        entering = ("nsenter", f"--net=/proc/self/fd/{namespace}", *command)
        done = subprocess.run(
            entering, pass_fds=[namespace], capture_output=True, text=True, check=True
        )
    return done.stdout


def interfaces(tap: int) -> list[str]:
    links = inside(tap, "ip", "-o", "link").splitlines()
    return sorted(link.split(": ")[1] for link in links)


async def test_frames_pass_at_once_to_the_one_that_they_are_for(cards: list[Card]) -> None:
    one, two, three = cards

    one.say(EVERYBODY, b"who is there")
    await two.hear(b"who is there")
    await three.hear(b"who is there")
    two.say(mac(1), b"I am")
    await one.hear(b"I am")
    one.say(mac(2), b"good")
    await two.hear(b"good")

    assert three.heard() == []


async def test_multicast_and_link_local_groups_pass(cards: list[Card]) -> None:
    one, two, three = cards
    for group in ("333300000001", "01005e0000fb", "0180c200000e"):
        one.say(bytes.fromhex(group), b"all")
        await two.hear(b"all")
        await three.hear(b"all")
    assert one.heard() == []


@pytest.mark.parametrize("cut", [False, True])
async def test_frames_with_a_vlan_tag_or_of_a_longer_mtu_pass_as_they_are(
    line: SwitchLine, cards: list[Card], *, cut: bool
) -> None:
    if cut:
        await line.cut(0, [frozenset("12")])
    one, _, three = cards
    tagged = EVERYBODY + mac(1) + bytes.fromhex("8100002a88b5") + b"x" * 8000
    os.write(one.tap, bytes(_VNET_HEADER) + tagged)

    heard = b""
    async with asyncio.timeout(10):
        while heard != tagged:
            await asyncio.sleep(0.001)
            with suppress(BlockingIOError):
                heard = os.read(three.tap, 1 << 17)[_VNET_HEADER:]


async def test_what_is_wrong_is_wrong_until_it_is_healed(
    line: SwitchLine, cards: list[Card]
) -> None:
    one, two, three = cards

    await line.cut(0, [frozenset("12")])
    one.say(EVERYBODY, b"cut")
    await three.hear(b"cut")
    assert two.heard() == []
    assert (await line.counts(0))["cut"] == 1
    await line.cut(0, ())
    await line.impair(0, Impairment(loss=1.0))
    one.say(EVERYBODY, b"lost")
    while (await line.counts(0))["lost"] < 3:  # two machines, and the host's end
        await asyncio.sleep(0.01)
    await line.impair(0, Impairment())
    for card in (two, three):
        assert card.heard() == []
    one.say(EVERYBODY, b"healed")

    await two.hear(b"healed")
    await three.hear(b"healed")


async def test_in_every_change_of_hands_no_frame_is_carried_twice_and_none_comes_back(
    line: SwitchLine, cards: list[Card]
) -> None:
    one, two, three = cards
    sent = 0
    for turn in range(10):
        await asyncio.gather(
            line.cut(0, [frozenset("23")] if turn % 2 else ()), _say_much(one, turn)
        )
        sent += 50
    await asyncio.sleep(0.2)

    for card in (two, three):
        heard = [each[14:20] for each in card.heard()]
        assert len(heard) == len(set(heard))
        assert len(heard) > sent / 2
    assert one.heard() == []


async def _say_much(card: Card, turn: int) -> None:
    for number in range(50):
        card.say(EVERYBODY, f"{turn:02}{number:04}".encode())
        await asyncio.sleep(0)


async def test_a_frame_that_is_late_at_healing_time_still_comes(
    line: SwitchLine, cards: list[Card]
) -> None:
    one, two, _ = cards
    await line.impair(0, Impairment(delay_s=0.3))
    one.say(EVERYBODY, b"late")
    await asyncio.sleep(0.1)
    await line.impair(0, Impairment())

    await two.hear(b"late")
    await line.counts(0)  # what is under way in that instant may be lost
    one.say(EVERYBODY, b"soon")
    await two.hear(b"soon")


async def test_a_network_is_gone_with_what_is_late_on_it_and_others_go_on(
    line: SwitchLine, cards: list[Card]
) -> None:
    await line.impair(0, Impairment(delay_s=1.0))
    cards[0].say(EVERYBODY, b"late")
    await asyncio.sleep(0.1)
    await line.impair(0, Impairment())
    for card in cards:
        await line.unplug(0, str(card.number), [])
    await line.drop(0)
    await asyncio.sleep(1.2)

    assert await line.counts(1)
    (await line.plug(0, "1", title="lan")).close()


async def test_who_moved_while_nothing_was_wrong_is_found_where_he_is(
    line: SwitchLine, cards: list[Card]
) -> None:
    one, two, three = cards
    slow, well = Impairment(delay_s=0.001), Impairment()
    await line.impair(0, slow)
    two.say(mac(1), b"here")
    await one.hear(b"here")
    await line.impair(0, well)
    await line.counts(0)
    os.write(three.tap, bytes(_VNET_HEADER) + frame(mac(1), two.number, b"moved"))
    await one.hear(b"moved")
    three.heard()  # of when the bridge did not know whom it is for
    await line.impair(0, slow)
    one.say(mac(2), b"found")

    await three.hear(b"found")


async def test_a_change_that_can_not_be_made_is_made_for_nobody_and_can_be_made_later(
    tmp_path: Path,
) -> None:
    tier = Tier.ROOT if os.getuid() == 0 else Tier.USERNS
    switches: list[int] = []
    async with AsyncExitStack() as held:
        try:
            warden = await held.enter_async_context(open_warden(tier, log=tmp_path / "warden.log"))
            opened = open_walled_switch(
                warden,
                tier,
                wish=WireKind.TAP,
                log=tmp_path / "switch.log",
                started=lambda identity: switches.append(identity.pid),
            )
            line = await held.enter_async_context(opened)
        except HostUnfit as unfit:
            pytest.skip(str(unfit))
        if not switches[0]:
            pytest.skip("it is not known which process the switch is")
        first = switches[0]  # of its own processes, and there is one more
        switch = int(Path(f"/proc/{first}/task/{first}/children").read_text())
        one, two = [Card(at, await line.plug(0, str(at), title="lan")) for at in (1, 2)]
        with one.tap, two.tap:
            limits = resource.prlimit(switch, resource.RLIMIT_NOFILE)
            there = set(map(int, os.listdir(f"/proc/{switch}/fd")))  # noqa: PTH208
            # First for nothing, then for some of the ways, and for all of them at last.
            free = [number for number in range(4 * len(there) + 40) if number not in there]
            refused = 0
            for last in free:
                resource.prlimit(switch, resource.RLIMIT_NOFILE, (last, limits[1]))
                try:
                    await line.impair(0, Impairment(loss=1.0))
                except NetworkFailed:
                    refused += 1
                else:
                    break
                one.say(EVERYBODY, b"as before")
                await two.hear(b"as before")
            resource.prlimit(switch, resource.RLIMIT_NOFILE, limits)
            assert refused
            one.say(EVERYBODY, b"lost")
            await asyncio.sleep(0.2)
            assert two.heard() == []
            await line.impair(0, Impairment())
            await line.cut(0, [frozenset("12")])
            one.say(EVERYBODY, b"cut")
            await asyncio.sleep(0.2)
            assert two.heard() == []
            assert (await line.counts(0))["cut"] == 1
    assert (tmp_path / "switch.log").read_text() == ""


# A TCP segment of 4000 bytes over IPv4 as a guest leaves it to its card: to be cut into pieces of
# 1000 bytes, with only the addresses in its checksum (struct virtio_net_hdr).
_SEGMENT = bytes.fromhex("450010000000400040060000 0a4c0002 0a4c0003") + bytes.fromhex(
    "04d20050 00000001 00000000 50100400 0000 0000"
)
_TO_BE_CUT = bytes((1, 1)) + (54).to_bytes(2, "little") + (1000).to_bytes(2, "little")
_TO_BE_CUT += (34).to_bytes(2, "little") + (16).to_bytes(2, "little")


async def test_a_capture_shows_what_guests_leave_to_their_cards_as_it_is_on_a_wire(
    line: SwitchLine, cards: list[Card], tmp_path: Path
) -> None:
    one, two, _ = cards
    two.say(EVERYBODY, b"here")
    await one.hear(b"here")
    segment = bytearray(_SEGMENT + b"x" * 4000)
    segment[2:4] = len(segment).to_bytes(2, "big")
    segment[10:12] = _checksum(bytes(segment[:20])).to_bytes(2, "big")
    pseudo = segment[12:20] + b"\0\x06" + (len(segment) - 20).to_bytes(2, "big")
    segment[36:38] = (0xFFFF - _checksum(bytes(pseudo))).to_bytes(2, "big")
    with (tmp_path / "lan.pcap").open("wb") as file:
        await line.capture(0, 1, file.fileno())

    os.write(one.tap, _TO_BE_CUT + mac(2) + mac(1) + b"\x08\x00" + segment)
    async with asyncio.timeout(10):
        while (await line.counts(0))["carried"] < 5:  # by reading, as a VMM does
            two.heard()
            await asyncio.sleep(0.01)
    await line.end_capture(1)

    frames = list(_frames((tmp_path / "lan.pcap").read_bytes()))
    assert [len(each) for each in frames] == [1054] * 4
    for each in frames:
        packet = each[14:]
        addresses = packet[12:20] + b"\0\x06" + (len(packet) - 20).to_bytes(2, "big")
        assert _checksum(packet[:20]) == 0
        assert _checksum(addresses + packet[20:]) == 0


def _checksum(data: bytes | bytearray) -> int:
    """RFC 1071."""
    total = sum(int.from_bytes(data[at : at + 2].ljust(2, b"\0")) for at in range(0, len(data), 2))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return 0xFFFF - total


def _frames(pcap: bytes) -> list[bytes]:
    found, at = [], 24
    while at < len(pcap):
        length = int.from_bytes(pcap[at + 8 : at + 12], "little")
        found.append(pcap[at + 16 : at + 16 + length])
        at += 16 + length
    return found


async def test_the_switch_leaves_no_interface_of_a_machine_or_a_network_that_is_gone(
    line: SwitchLine, cards: list[Card]
) -> None:
    loose = await line.loose_tap()
    await line.cut(0, [frozenset("12")])
    assert len(interfaces(loose)) > len(cards)
    for card in cards:
        await line.unplug(0, str(card.number), [])
    await line.drop(0)

    left = interfaces(loose)
    loose.close()

    assert [name for name in left if not name.startswith("loose")] == _LOOPBACK


@pytest.mark.parametrize(
    ("interface", "cut", "what"),
    [
        ("net0", False, "the bridge"),
        ("tap1", False, "the tap of 2"),
        ("tap1", True, "the tap of 2"),
        ("pair1", True, "the tap of 2"),
        ("hub1", True, "the tap of 2"),
        ("way0", True, "the bridge"),
    ],
)
async def test_an_interface_that_anybody_removes_is_told_of_at_once_and_at_the_next_use(
    line: SwitchLine, cards: list[Card], interface: str, *, cut: bool, what: str
) -> None:
    told: list[NetworkFailed] = []
    line.told = told.append
    if cut:
        await line.cut(0, [frozenset("12")])
    inside(cards[0].tap, "ip", "link", "delete", interface)
    async with asyncio.timeout(10):
        while not told:
            await asyncio.sleep(0.01)

    expected = f"{what} on network 'lan' was removed by somebody: {interface}"
    lost = BridgeLost if what == "the bridge" else TapLost
    assert [(type(error), error.cause) for error in told] == [(lost, expected)]
    for use in (
        line.counts(0),
        line.cut(0, ()),
        line.impair(0, Impairment()),
        line.connect(0, "10.76.0.2", 80, timeout_s=5),
        line.plug(0, "4", title="lan"),
    ):
        with pytest.raises(lost, match=expected):
            await use
    assert await line.counts(1)
    if interface == "tap1":  # the others go on, and whoever has lost it is given another
        await line.unplug(0, "2", [])
        await line.cut(0, ())
        (await line.plug(0, "2", title="lan")).close()
        cards[0].say(EVERYBODY, b"we go on")
        await cards[2].hear(b"we go on")


async def test_the_use_right_after_a_removal_is_told_of_it(
    line: SwitchLine, cards: list[Card]
) -> None:
    inside(cards[0].tap, "ip", "link", "delete", "net0")

    with pytest.raises(BridgeLost, match="the bridge on network 'lan'"):
        await line.counts(0)


async def test_what_is_under_way_when_the_bridge_goes_is_told_of_it(
    line: SwitchLine, cards: list[Card]
) -> None:
    nobody = asyncio.ensure_future(line.connect(0, "10.76.0.99", 80, timeout_s=2))
    await asyncio.sleep(0.2)
    inside(cards[0].tap, "ip", "link", "delete", "net0")

    with pytest.raises(BridgeLost, match="the bridge on network 'lan'"):
        await nobody


async def test_a_machine_that_hangs_up_is_no_failure(line: SwitchLine, cards: list[Card]) -> None:
    told: list[NetworkFailed] = []
    line.told = told.append
    cards[1].tap.close()
    await line.unplug(0, "2", [])
    cards[0].say(EVERYBODY, b"still here")

    await cards[2].hear(b"still here")
    assert told == []


ARP_QUESTION = bytes.fromhex("0806 0001 0800 06 04 0001".replace(" ", ""))


async def _answers(line: SwitchLine, card: Card, number: int) -> list[bytes]:
    """The Ethernet addresses that answer a machine who asks for an address of its network."""
    question = ARP_QUESTION + mac(card.number) + bytes((10, 76, 0, 1 + card.number)) + bytes(6)
    packet = EVERYBODY + mac(card.number) + question + bytes((10, 76, 0, number))
    os.write(card.tap, bytes(_VNET_HEADER) + packet.ljust(60, b"\0"))
    found = []
    for _ in range(30):
        await asyncio.sleep(0.01)
        await line.counts(0)
        try:
            while True:
                heard = os.read(card.tap, 1 << 17)[_VNET_HEADER:]
                if heard[12:14] == b"\x08\x06" and heard[20:22] == b"\0\2":
                    found.append(heard[22:28])
        except BlockingIOError:
            pass
    return found


async def test_the_host_has_one_end_of_a_network_and_forwards_from_none(
    line: SwitchLine, cards: list[Card]
) -> None:
    inside(cards[0].tap, "sysctl", "-q", "-w", "net.ipv4.ip_forward=1")
    other = await line.plug(1, "4", title="dmz")
    for network in (0, 1):
        with pytest.raises(OSError, match=r"timed out|No route"):
            await line.connect(network, f"10.76.{network}.9", 80, timeout_s=0.1)

    assert await _answers(line, cards[0], 1) == [mac(0)]
    await line.cut(0, [frozenset("12")])
    assert await _answers(line, cards[0], 1) == [mac(0)]
    later = await line.plug(0, "5", title="lan")
    forwarding = inside(cards[0].tap, "ip", "-4", "-o", "netconf").splitlines()
    for tap in (other, later):
        tap.close()

    ours = ("net1", "pair", "hub", "way", "tap3", "tap4")
    found = [words for row in forwarding if (words := row.split())[1].startswith(ours)]
    assert len(found) >= 12
    for words in found:
        assert words[words.index("forwarding") + 1] == "off", words
        assert words[words.index("rp_filter") + 1] == "strict", words


def _echo(to: bytes, source: Card) -> bytes:
    """An ICMP echo request to the host's end, in a frame for that Ethernet address."""
    message = bytes((8, 0, 0, 0, 0, 1, 0, 1)) + b"x" * 32
    message = message[:2] + _checksum(message).to_bytes(2, "big") + message[4:]
    header = bytearray(bytes.fromhex("450000000000400040010000"))
    header += bytes((10, 76, 0, 1 + source.number, 10, 76, 0, 1))
    header[2:4] = (len(header) + len(message)).to_bytes(2, "big")
    header[10:12] = _checksum(header).to_bytes(2, "big")
    return to + mac(source.number) + b"\x08\x00" + header + message


async def _is_answered(line: SwitchLine, card: Card, to: bytes) -> bool:
    await _answers(line, card, 1)  # so that the host's end knows who asks
    os.write(card.tap, bytes(_VNET_HEADER) + _echo(to, card))
    for _ in range(30):
        await asyncio.sleep(0.01)
        try:
            while True:
                heard = os.read(card.tap, 1 << 17)[_VNET_HEADER:]
                if heard[12:14] == b"\x08\x00" and heard[23] == 1 and heard[34] == 0:
                    return True
        except BlockingIOError:
            pass
    return False


async def test_what_a_machine_says_reaches_the_hosts_end_by_its_network_alone(
    line: SwitchLine, cards: list[Card]
) -> None:
    with pytest.raises(OSError, match=r"timed out|No route"):
        await line.connect(0, "10.76.0.9", 80, timeout_s=0.1)
    assert await _is_answered(line, cards[0], mac(0))
    await line.cut(0, [frozenset("12")])
    assert await _is_answered(line, cards[0], mac(0))
    link = inside(cards[0].tap, "ip", "-o", "link", "show", "pair0").split()
    its_own = bytes.fromhex(link[link.index("link/ether") + 1].replace(":", ""))

    assert not await _is_answered(line, cards[0], its_own)


def _from_another_network(version: int) -> list[bytes]:
    """What a machine of network 1 says to the host's end of network 0, as if it were on that."""
    victim, host, gate = address_of(0, 2), address_of(0, 1), address_of(1, 1)
    gate_mac = bytes.fromhex(gate.mac.replace(":", ""))
    source, target = (victim.ip6, host.ip6) if version == 6 else (victim.ip, host.ip)
    syn = to(TCP, str(target), 80, source=str(source), mac=gate_mac)
    if version == 4:
        message = bytes((8, 0, 0, 0, 0, 1, 0, 1)) + b"SECRET"
        message = message[:2] + checksum(message).to_bytes(2, "big") + message[4:]
        echo = ipv4(message, 1, str(target), source=str(source))
        return [syn, ethernet(echo, 0x0800, target=gate_mac)]
    message = bytes((128, 0, 0, 0, 0, 1, 0, 1)) + b"SECRET"
    ends = source.packed + target.packed + len(message).to_bytes(4, "big") + bytes((0, 0, 0, ICMP6))
    message = message[:2] + checksum(ends + message).to_bytes(2, "big") + message[4:]
    echo = ipv6(message, ICMP6, str(target), source=str(source))
    return [syn, ethernet(echo, 0x86DD, target=gate_mac)]


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("has_host_end", [False, True])
async def test_no_network_reaches_another_by_way_of_the_hosts_ends(
    line: SwitchLine, cards: list[Card], *, version: int, has_host_end: bool
) -> None:
    one = cards[0]
    stranger = await line.plug(1, "4", title="dmz")
    for network in (0, 1) if has_host_end else (0,):
        with pytest.raises(OSError, match=r"timed out|No route"):
            await line.connect(network, f"10.76.{network}.9", 80, timeout_s=0.1)
    # The host's end knows where the victim is, and need not ask for it.
    if version == 4:
        assert await _answers(line, one, 1)
    else:
        inside(one.tap, *_NEIGHBOUR, str(address_of(0, 2).ip6), "lladdr", address_of(0, 2).mac)

    for packet in _from_another_network(version):
        os.write(stranger, bytes(_VNET_HEADER) + packet)
    await asyncio.sleep(0.3)

    heard = []
    with suppress(BlockingIOError):
        while True:
            heard.append(os.read(one.tap, 1 << 17)[_VNET_HEADER:])
    stranger.close()
    kind = b"\x86\xdd" if version == 6 else b"\x08\x00"
    assert [each for each in heard if each[:6] == mac(1) and each[12:14] == kind] == []


_NEIGHBOUR = ("ip", "neighbour", "replace", "dev", "net0")


async def test_there_is_only_what_is_needed_and_it_says_nothing_by_itself(
    line: SwitchLine, cards: list[Card]
) -> None:
    assert interfaces(cards[0].tap) == ["lo", "net0", "tap0", "tap1", "tap2"]
    for card in cards:
        card.heard()
    await line.cut(0, [frozenset("12")])
    await asyncio.sleep(1)

    for card in cards:
        with pytest.raises(BlockingIOError):
            os.read(card.tap, 1 << 17)
