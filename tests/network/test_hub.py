"""The hub: real sockets at its ports, and what comes out of them."""

from __future__ import annotations

import asyncio
import errno
import io
import socket
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from random import Random

import pytest

from pytest_vmsandbox.linux import OwnedFd
from pytest_vmsandbox.network.frames import FrameReader, encode_frame
from pytest_vmsandbox.network.hub import LATE_AT_MOST, LEARNED_AT_MOST, Hub
from pytest_vmsandbox.network.impairment import Impairment
from pytest_vmsandbox.network.pcap import PcapWriter
from pytest_vmsandbox.network.port import WAITING_AT_MOST, Port, StreamPort, TapPort

EVERYBODY = b"\xff" * 6


def mac(number: int) -> bytes:
    return b"\x02\x76\x6d" + number.to_bytes(3, "big")


def frame(to: bytes, source: bytes, text: bytes = b"hello") -> bytes:
    return to + source + b"\x88\xb5" + text


class Card:
    """The machine's end of a port."""

    def __init__(self, hub: Hub, name: str) -> None:
        self.sock, theirs = socket.socketpair()
        self.sock.settimeout(0)
        self.port = StreamPort(name, theirs)
        self._reader = FrameReader()
        self._got: list[bytes] = []
        hub.plug(self.port)

    async def send(self, *frames: bytes) -> None:
        stream = b"".join(map(encode_frame, frames))
        await asyncio.get_running_loop().sock_sendall(self.sock, stream)

    async def hear(self, within_s: float = 30.0) -> bytes | None:
        """The next frame; None where none comes in time."""
        try:
            async with asyncio.timeout(within_s):
                while not self._got:
                    piece = await asyncio.get_running_loop().sock_recv(self.sock, 1 << 16)
                    assert piece, "the hub hung up"
                    self._got += self._reader.feed(piece)
        except TimeoutError:
            return None
        return self._got.pop(0)

    async def hears_nothing(self) -> bool:
        return await self.hear(0.05) is None


async def until(condition: Callable[[], bool]) -> None:
    """Return once it holds."""
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.fixture
async def hub() -> AsyncIterator[Hub]:
    hub = Hub(random=Random(7))
    yield hub
    hub.close()


@pytest.fixture
async def cards(hub: Hub) -> AsyncIterator[list[Card]]:
    """Three machines, 1, 2 and 3, called a, b and c, whom the hub has heard of."""
    cards = [Card(hub, name) for name in "abc"]
    for number, card in enumerate(cards, 1):
        await card.send(frame(EVERYBODY, mac(number), b"here"))
        for other in cards:
            if other is not card:
                assert await other.hear() is not None
    yield cards
    for card in cards:
        card.sock.close()


async def test_a_frame_goes_to_the_one_that_it_is_for(cards: list[Card]) -> None:
    one, two, three = cards
    sent = frame(mac(2), mac(1))

    await one.send(sent)

    assert await two.hear() == sent
    assert await three.hears_nothing()
    assert await one.hears_nothing()


async def test_broadcasts_and_strangers_go_to_all_others(cards: list[Card]) -> None:
    one, two, three = cards
    for to in (EVERYBODY, bytes.fromhex("333300000001"), mac(99)):
        sent = frame(to, mac(1))
        await one.send(sent)
        assert await two.hear() == sent
        assert await three.hear() == sent
        assert await one.hears_nothing()


async def test_a_machine_that_moves_is_found_where_it_is(cards: list[Card]) -> None:
    one, two, three = cards

    await three.send(frame(EVERYBODY, mac(2)))
    assert await one.hear() is not None
    assert await two.hear() is not None
    await one.send(frame(mac(2), mac(1)))

    assert await three.hear() is not None
    assert await two.hears_nothing()


async def test_who_was_unplugged_is_forgotten(hub: Hub, cards: list[Card]) -> None:
    one, two, three = cards
    hub.unplug("b")
    again = Card(hub, "b")

    await one.send(frame(mac(2), mac(1)))

    assert await again.hear() is not None  # a stranger now: everybody gets it
    assert await three.hear() is not None
    assert two.port.broken
    again.sock.close()


async def test_a_name_is_plugged_in_once(hub: Hub, cards: list[Card]) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(ValueError, match="port a already"):
        hub.plug(StreamPort("a", theirs))


async def test_a_cut_parts_two_sides_and_no_others_until_it_is_healed(
    hub: Hub, cards: list[Card]
) -> None:
    one, two, three = cards
    hub.cut([frozenset(("a", "b")), frozenset(("a", "c"))])

    await one.send(frame(EVERYBODY, mac(1)))
    await two.send(frame(mac(1), mac(2)), frame(mac(3), mac(2)))

    assert await three.hear() == frame(mac(3), mac(2))
    assert await one.hears_nothing()
    assert await two.hears_nothing()
    assert hub.counts.cut == 3

    hub.cut([])
    await one.send(frame(mac(2), mac(1)))
    assert await two.hear() is not None


async def test_a_delay_is_kept_and_nothing_is_overtaken(hub: Hub, cards: list[Card]) -> None:
    one, two, _ = cards
    hub.impairment = Impairment(delay_s=0.2)
    sent = [frame(mac(2), mac(1), f"{number:03}".encode()) for number in range(50)]

    began = time.monotonic()
    await one.send(*sent)
    first = await two.hear()
    took_s = time.monotonic() - began
    got = [first, *[await two.hear() for _ in sent[1:]]]

    assert got == sent
    assert 0.2 <= took_s < 5  # and not fifty times the delay


async def test_a_cut_stops_what_is_under_way_as_well(hub: Hub, cards: list[Card]) -> None:
    one, two, three = cards
    hub.impairment = Impairment(delay_s=0.2)
    await one.send(frame(EVERYBODY, mac(1), b"late"))
    await until(lambda: len(hub._late) == 2)
    hub.cut([frozenset("ab")])

    assert await three.hear() == frame(EVERYBODY, mac(1), b"late")
    assert await two.hears_nothing()
    assert hub.counts.cut == 1


async def test_another_rate_does_not_wait_for_what_the_former_had_to_carry(
    hub: Hub, cards: list[Card]
) -> None:
    one, two, _ = cards
    hub.impairment = Impairment(rate_bps=1e3)
    await one.send(frame(mac(2), mac(1), bytes(1500)))
    await until(lambda: len(hub._late) == 1)
    hub.impairment = Impairment()
    hub.impairment = Impairment(rate_bps=1e7)
    await one.send(frame(mac(2), mac(1), b"soon"))

    assert await two.hear(5) == frame(mac(2), mac(1), b"soon")


async def test_what_is_late_for_one_machine_fills_no_memory(hub: Hub, cards: list[Card]) -> None:
    one, _, three = cards
    hub.impairment = Impairment(delay_s=0.5)
    big = frame(mac(2), mac(1), bytes(60_000))
    for _ in range(LATE_AT_MOST // len(big) + 10):
        await one.send(big)
    await one.send(frame(mac(3), mac(1)))

    assert await three.hear() == frame(mac(3), mac(1))
    assert hub.counts.overflowed >= 10
    hub.impairment = Impairment(delay_s=0.001)
    await until(lambda: not hub._late)
    before = hub.counts.carried
    await one.send(frame(mac(3), mac(1)))
    await until(lambda: hub.counts.carried > before)


async def test_what_is_late_when_the_hub_is_closed_is_lost_without_a_word(
    hub: Hub, cards: list[Card]
) -> None:
    told: list[None] = []
    hub.caught_up = lambda: told.append(None)
    hub.impairment = Impairment(delay_s=0.1)
    await cards[0].send(frame(mac(2), mac(1)))
    await until(lambda: len(hub._late) == 1)
    hub.close()
    await asyncio.sleep(0.2)

    assert told == []


async def test_losses_are_as_many_as_asked_for_and_the_same_in_each_run(
    hub: Hub, cards: list[Card]
) -> None:
    one, two, _ = cards
    sent = [frame(mac(2), mac(1), f"{number:04}".encode()) for number in range(1000)]

    async def survivors() -> list[bytes]:
        hub._random.seed(1)
        hub.impairment = Impairment(loss=0.3)
        met = hub.counts.carried + hub.counts.lost + len(sent)
        await one.send(*sent)
        hub_done = frame(mac(2), mac(1), b"end")
        await until(lambda: hub.counts.carried + hub.counts.lost == met)
        hub.impairment = Impairment()
        await one.send(hub_done)
        got = []
        while (heard := await two.hear()) != hub_done:
            assert heard is not None
            got.append(heard)
        return got

    first, second = await survivors(), await survivors()

    assert first == second
    assert 600 < len(first) < 800
    assert hub.counts.lost == 2 * (1000 - len(first))


async def test_all_is_lost_where_that_is_asked_for(hub: Hub, cards: list[Card]) -> None:
    one, two, _ = cards
    hub.impairment = Impairment(loss=1.0)

    await one.send(*[frame(mac(2), mac(1))] * 20)

    assert await two.hears_nothing()


async def test_a_rate_is_kept_and_what_waits_too_long_is_lost(hub: Hub, cards: list[Card]) -> None:
    one, two, _ = cards
    hub.impairment = Impairment(rate_bps=800_000)  # 100 KB a second
    big = frame(mac(2), mac(1), bytes(986))  # a thousand bytes: 10 ms each

    began = time.monotonic()
    await one.send(*[big] * 50)
    for _ in range(50):
        assert await two.hear() is not None
    took_s = time.monotonic() - began
    await one.send(*[big] * 300)
    await until(lambda: hub.counts.overflowed > 150)

    assert 0.5 <= took_s < 5


async def test_each_machine_has_the_rate_for_itself(hub: Hub, cards: list[Card]) -> None:
    one, two, three = cards
    hub.impairment = Impairment(rate_bps=800_000)

    began = time.monotonic()
    await one.send(*[frame(EVERYBODY, mac(1), bytes(986))] * 30)
    for _ in range(30):
        assert await two.hear() is not None
        assert await three.hear() is not None

    assert time.monotonic() - began < 0.55  # one after the other it would be 0.6


async def test_what_is_captured_is_what_was_sent(hub: Hub, cards: list[Card]) -> None:
    one, two, _ = cards
    file = io.BytesIO()
    hub.captures[1] = PcapWriter(file)
    hub.impairment = Impairment(loss=1.0)

    await one.send(frame(mac(2), mac(1), b"lost, and yet sent"))
    await two.hears_nothing()

    assert file.getvalue().endswith(b"lost, and yet sent")


async def test_a_capture_that_can_not_be_written_harms_nobody_and_says_why(
    hub: Hub, cards: list[Card], tmp_path: Path
) -> None:
    one, two, _ = cards
    with Path("/dev/full").open("wb") as full, (tmp_path / "lan.pcap").open("wb") as file:
        writers = hub.captures[1], hub.captures[2] = PcapWriter(full), PcapWriter(file)
        await one.send(frame(mac(2), mac(1), b"one"), frame(mac(2), mac(1), b"two"))

        assert await two.hear() == frame(mac(2), mac(1), b"one")
        assert await two.hear() == frame(mac(2), mac(1), b"two")
        failures = [writer.failure for writer in writers]
    assert isinstance(failures[0], OSError)
    assert failures[0].errno == errno.ENOSPC
    assert failures[1] is None
    assert (tmp_path / "lan.pcap").read_bytes().endswith(b"two")


async def test_a_stream_is_read_in_pieces_so_that_others_have_their_turn(hub: Hub) -> None:
    turns: list[int] = []
    theirs, ours = socket.socketpair()
    port = StreamPort("a", theirs)
    blob = encode_frame(frame(EVERYBODY, mac(1), bytes(1000))) * 150
    ours.settimeout(0)
    sent = ours.send(blob)
    port.start(lambda _, frames: turns.append(sum(map(len, frames))))
    await until(lambda: sum(turns) > sent - 2000)
    port.close()
    ours.close()

    assert sent > 64 * 1024
    assert max(turns) <= 32 * 1024


async def test_catching_up_with_a_tap_ends_though_more_comes_all_the_time() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for sock in (ours, theirs):
        sock.settimeout(0)
    port = TapPort("a", OwnedFd(theirs.detach()))
    came: list[bytes] = []

    def refill(_: Port, frames: Sequence[bytes]) -> None:
        came.extend(frames)
        for _frame in frames if len(came) < 5000 else ():
            ours.send(frame(EVERYBODY, mac(1)))

    port.start(refill)
    for _ in range(64):
        ours.send(frame(EVERYBODY, mac(1)))
    port.catch_up()
    port.close()
    ours.close()

    assert 500 <= len(came) <= 1000


async def test_one_that_does_not_listen_loses_its_own_frames_and_nobody_elses(
    hub: Hub, cards: list[Card]
) -> None:
    one, two, three = cards
    big = frame(mac(2), mac(1), bytes(60_000))
    for _ in range(2 * WAITING_AT_MOST // len(big)):
        await one.send(big)
    await one.send(frame(mac(3), mac(1)))

    assert await three.hear() == frame(mac(3), mac(1))
    assert hub.counts.overflowed > 0
    assert len(two.port._waiting) < WAITING_AT_MOST + 2 * len(big)
    assert await two.hear() == big  # what it missed is gone, and the rest comes


async def test_a_vmm_that_sends_garbage_or_ends_harms_itself_only(
    hub: Hub, cards: list[Card]
) -> None:
    one, two, three = cards
    await asyncio.get_running_loop().sock_sendall(one.sock, b"\xff" * 100)
    two.sock.close()
    await until(lambda: bool(one.port.broken and two.port.broken))

    assert "no frame" in one.port.broken
    await three.send(frame(mac(1), mac(3)), frame(mac(2), mac(3)), frame(EVERYBODY, mac(3)))
    fourth = Card(hub, "d")
    await fourth.send(frame(mac(3), mac(4)))
    assert await three.hear() == frame(mac(3), mac(4))
    fourth.sock.close()


async def test_made_up_addresses_fill_no_memory(hub: Hub, cards: list[Card]) -> None:
    one, two, three = cards
    for start in range(1000, 1000 + LEARNED_AT_MOST + 500, 500):
        await one.send(*[frame(mac(2), mac(start + n)) for n in range(500)])
        for _ in range(500):
            assert await two.hear() is not None

    assert len(hub._learned) == LEARNED_AT_MOST
    await three.send(frame(mac(2), mac(3)))
    assert await two.hear() is not None
