"""Connections that the agent makes, to real listeners on the loopback of this host."""

from __future__ import annotations

import asyncio
import hashlib
import random
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address

import pytest

from pytest_vmsandbox.deadline import Deadline
from pytest_vmsandbox.errors import ChannelLost
from pytest_vmsandbox.guest.channel import Channel
from pytest_vmsandbox.guest.connection import GuestConnection
from pytest_vmsandbox.guest.frames import FrameType
from pytest_vmsandbox.guest.messages import ExecRequest
from tests.guest.conftest import NONCE

pytestmark = pytest.mark.asyncio

HERE = IPv4Address("127.0.0.1")
SOON_S = 20


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server((str(HERE), 0)) as listening:
        listening.settimeout(SOON_S)
        yield listening


def port_of(listener: socket.socket) -> int:
    return int(listener.getsockname()[1])


async def connected(
    channel: Channel, listener: socket.socket
) -> tuple[GuestConnection, socket.socket]:
    """Both ends of a connection."""
    inside = await channel.dial(HERE, port_of(listener))
    served, _ = await asyncio.to_thread(listener.accept)
    served.settimeout(SOON_S)
    return inside, served


async def read_all(inside: GuestConnection) -> bytes:
    received = bytearray()
    async with asyncio.timeout(SOON_S):
        while piece := await inside.read(1 << 16):
            received += piece
    return bytes(received)


def heard(served: socket.socket) -> bytes:
    with served.makefile("rb") as file:
        return file.read()


async def works(channel: Channel) -> bool:
    process = await channel.spawn(ExecRequest(argv=["echo", "it does"]))
    return await process.communicate() == (b"it does\n", b"")


def reset(served: socket.socket) -> None:
    served.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    served.close()


@pytest.mark.parametrize("address", [HERE, IPv6Address("::1")], ids=str)
async def test_bytes_come_and_go(channel: Channel, address: IPv4Address | IPv6Address) -> None:
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    with socket.create_server((str(address), 0), family=family) as listening:
        inside = await channel.dial(address, port_of(listening))
        served, _ = listening.accept()
        with served:
            await inside.write(b"question")
            assert served.recv(100) == b"question"
            served.sendall(b"answer")
            assert await inside.read(100) == b"answer"
    inside.close()


async def test_twenty_megabytes_go_and_come_back_equal(
    channel: Channel, listener: socket.socket
) -> None:
    sent = random.Random(1).randbytes(20 << 20)
    inside, served = await connected(channel, listener)

    def echo() -> None:
        with served:
            while piece := served.recv(1 << 16):
                served.sendall(piece)

    async def send() -> None:
        await inside.write(sent)
        await inside.end()

    _, back, _ = await asyncio.gather(asyncio.to_thread(echo), read_all(inside), send())

    assert hashlib.sha256(back).digest() == hashlib.sha256(sent).digest()


async def test_each_direction_ends_by_itself(channel: Channel, listener: socket.socket) -> None:
    inside, served = await connected(channel, listener)
    with served:
        await inside.write(b"all of it")
        await inside.end()
        assert await asyncio.to_thread(heard, served) == b"all of it"
        served.sendall(b"answer")
    assert await read_all(inside) == b"answer"

    inside, served = await connected(channel, listener)
    with served:
        served.shutdown(socket.SHUT_WR)
        assert await read_all(inside) == b""
        await inside.write(b"more")
        await inside.end()
        assert await asyncio.to_thread(heard, served) == b"more"


async def test_nobody_listens(channel: Channel, listener: socket.socket) -> None:
    listener.close()
    with socket.socket() as bound:
        bound.bind((str(HERE), 0))
        with pytest.raises(ConnectionRefusedError):
            await channel.dial(HERE, port_of(bound))

    assert await works(channel)


async def test_a_connection_that_breaks_is_no_end(
    channel: Channel, listener: socket.socket
) -> None:
    inside, served = await connected(channel, listener)
    served.sendall(b"half of it")
    assert await inside.read(100) == b"half of it"
    reset(served)

    with pytest.raises(ConnectionResetError):
        await read_all(inside)
    assert await works(channel)


async def test_whoever_writes_to_a_connection_that_broke_is_told(
    channel: Channel, listener: socket.socket
) -> None:
    inside, served = await connected(channel, listener)
    reset(served)

    async def write_on() -> None:
        while True:
            await inside.write(b"x" * 1000)

    with pytest.raises(BrokenPipeError):
        await asyncio.wait_for(write_on(), SOON_S)
    with pytest.raises(OSError, match=r"reset|Broken pipe"):
        await read_all(inside)


async def test_letting_go_breaks_it_for_the_other_side(
    channel: Channel, listener: socket.socket
) -> None:
    inside, served = await connected(channel, listener)
    with served:
        inside.close()
        with pytest.raises(ConnectionResetError):
            await asyncio.to_thread(served.recv, 100)

    assert await works(channel)


async def test_letting_go_of_what_has_ended_breaks_nothing(
    channel: Channel, listener: socket.socket
) -> None:
    inside, served = await connected(channel, listener)
    with served:
        await inside.write(b"all of it")
        await inside.end()
        served.shutdown(socket.SHUT_WR)
        assert await read_all(inside) == b""
        inside.close()
        assert await asyncio.to_thread(heard, served) == b"all of it"


async def test_letting_go_of_what_has_ended_loses_nothing_that_is_on_its_way(
    channel: Channel, listener: socket.socket
) -> None:
    sent = random.Random(2).randbytes(4 << 20)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
    inside, served = await connected(channel, listener)

    def read_late() -> bytes:
        time.sleep(0.5)
        return heard(served)

    with served:
        served.shutdown(socket.SHUT_WR)
        assert await read_all(inside) == b""
        reading = asyncio.create_task(asyncio.to_thread(read_late))
        await inside.write(sent)
        await inside.end()
        inside.close()
        assert hashlib.sha256(await reading).digest() == hashlib.sha256(sent).digest()


async def test_a_stream_that_nobody_reads_holds_up_its_writer_alone(
    channel: Channel, listener: socket.socket
) -> None:
    inside, served = await connected(channel, listener)
    with served:
        served.settimeout(0)
        with suppress(BlockingIOError):
            while True:
                served.send(bytes(1 << 20))
                await asyncio.sleep(0.1)  # it goes on to where there is room
        assert await works(channel)
    inside.close()


async def test_a_connection_that_is_given_up_before_it_is_one_leaves_none(
    channel: Channel,
) -> None:
    with socket.socket() as full:
        full.bind((str(HERE), 0))
        full.listen(0)
        held = []
        for _ in range(4):  # until the queue takes no more: the kernel drops what comes then
            sock = socket.socket()
            sock.settimeout(0.2)
            held.append(sock)
            if sock.connect_ex(full.getsockname()):
                break

        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await channel.dial(HERE, port_of(full))
        assert await works(channel)
        assert not channel._jobs
        for sock in held:
            sock.close()


async def test_a_new_session_breaks_those_of_the_former_one(
    channel: Channel, listener: socket.socket
) -> None:
    inside, served = await connected(channel, listener)
    with served:
        await channel.handshake(nonce=NONCE, deadline=Deadline.after(seconds=SOON_S))
        with pytest.raises(ConnectionResetError):
            await asyncio.to_thread(served.recv, 100)
    with pytest.raises(ChannelLost):
        await inside.read(1)

    assert await works(channel)


async def test_a_signal_breaks_it_and_is_sent_to_nobody(
    channel: Channel, listener: socket.socket
) -> None:
    inside, served = await connected(channel, listener)
    with served:
        await channel.signal_job(inside._job, 9)
        with pytest.raises(ConnectionResetError):
            await asyncio.to_thread(served.recv, 100)

    assert await works(channel)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        struct.pack("<IB", 1 << 16, 4) + HERE.packed,
        struct.pack("<IB", 1 << 16, 4) + HERE.packed + b"\x07\0\0",
        struct.pack("<IB", 1 << 16, 5) + b"12345\x07\0",
        struct.pack("<IB", 1 << 16, 16) + HERE.packed + b"\x07\0",
        struct.pack("<IB", 1 << 16, 0) + b"\x07\0",
    ],
    ids=["empty", "no port", "too long", "no such family", "too short", "no address"],
)
async def test_a_malformed_request_is_refused(channel: Channel, payload: bytes) -> None:
    with pytest.raises(OSError, match="Invalid argument"):
        await channel._request(FrameType.CONNECT, payload)

    assert await works(channel)


@pytest.mark.parametrize("how", ["in order", "by the server", "by us"])
async def test_the_agent_keeps_nothing_of_what_has_ended(
    channel: Channel, listener: socket.socket, how: str
) -> None:
    async def held() -> int:
        process = await channel.spawn(ExecRequest(argv=["sh", "-c", "ls /proc/$PPID/fd | wc -l"]))
        return int((await process.communicate())[0])

    async def one() -> None:
        inside, served = await connected(channel, listener)
        if how == "by the server":
            reset(served)
            with pytest.raises(ConnectionResetError):
                await read_all(inside)
        elif how == "in order":
            served.close()
            await inside.end()
            assert await read_all(inside) == b""
        inside.close()
        await channel.ping(deadline=Deadline.after(seconds=SOON_S))
        served.close()

    await one()
    before = await held()
    for _ in range(30):
        await one()

    assert await held() < before + 5  # 30 connections would have left 30, or 60
    assert not channel._jobs
