"""What a guest can do to its host: end its own channel, and nothing else."""

# The real thing is looked at with plain calls: a test's loop has nothing else to do meanwhile.
from __future__ import annotations

import asyncio
import os
import socket
import struct
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from pytest_vmsandbox.deadline import Deadline
from pytest_vmsandbox.errors import ChannelLost
from pytest_vmsandbox.guest.channel import NOBODY, Channel, open_channel
from pytest_vmsandbox.guest.frames import PAYLOAD_MAX, FrameType, encode_frame
from pytest_vmsandbox.guest.messages import PROTOCOL_VERSION, ExecRequest, Identity
from pytest_vmsandbox.guest.payload import encode_text
from pytest_vmsandbox.guest.streams import READ_WINDOW, WRITE_WINDOW

pytestmark = pytest.mark.asyncio

JOB = 1


def u32(number: int) -> bytes:
    return struct.pack("<I", number)


def frame(type_: int, payload: bytes = b"", *, id_: int = JOB, stream: int = 0) -> bytes:
    return encode_frame(type_, id_=id_, stream=stream, payload=payload)


def welcome(
    token: bytes,
    *,
    protocol: int = PROTOCOL_VERSION,
    refused: int = 0,
    hostname: str = "vm",
    restore_id: str = "",
) -> bytes:
    texts = ("1", "n", "boot", "6.1", "x86_64", hostname, restore_id)
    payload = token + struct.pack("<III", protocol, 1, 1) + b"".join(map(encode_text, texts))
    payload += u32(refused) + encode_text("hostname" if refused else "") + u32(0)
    return frame(FrameType.WELCOME, payload, id_=0)


STARTED = frame(FrameType.STARTED, u32(77))


class Guest:
    """The far end of the line, in the hands of an adversary."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        sock.settimeout(0)

    async def hear(self) -> bytes:
        return await asyncio.get_running_loop().sock_recv(self._sock, 1 << 20)

    async def say(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self._sock, data)


@asynccontextmanager
async def opening(
    *, identity: Identity = NOBODY
) -> AsyncIterator[tuple[asyncio.Task[Channel], Guest, bytes]]:
    """A channel that is being opened, its guest, and the token that it has to repeat."""
    ours, theirs = socket.socketpair()
    guest = Guest(theirs)
    with theirs:
        task = asyncio.create_task(
            open_channel(
                ours, name="vm", nonce="n", identity=identity, deadline=Deadline.after(seconds=20)
            )
        )
        yield task, guest, (await guest.hear())[16:32]


@asynccontextmanager
async def opened() -> AsyncIterator[tuple[Channel, Guest]]:
    """A channel whose guest has said hello."""
    async with opening() as (task, guest, token):
        await guest.say(welcome(token))
        channel = await task
        try:
            yield channel, guest
        finally:
            await channel.close()


LIES = {
    "noise": os.urandom(64),
    "zeros": bytes(1000),
    "unknown type": frame(200, id_=0),
    "a frame that only a host sends": frame(FrameType.EXEC),
    "a job that there is not": frame(FrameType.DATA, b"x", id_=55, stream=1),
    "an answer to nothing": frame(FrameType.DONE, id_=55),
    "a failure of nothing": frame(FrameType.FAILED, u32(2) + encode_text("x"), id_=55),
    "a start without a pid": frame(FrameType.STARTED),
    "pid 0": frame(FrameType.STARTED, u32(0)),
    "a huge pid": frame(FrameType.STARTED, u32(2**32 - 1)),
    "started twice": STARTED + STARTED,
    "exited before it started": frame(FrameType.EXITED, u32(0)),
    "exited twice": STARTED + frame(FrameType.EXITED, u32(0)) * 2,
    "an absurd status": STARTED + frame(FrameType.EXITED, u32(256)),
    "an absurd signal": STARTED + frame(FrameType.EXITED, struct.pack("<i", -65)),
    "a status with more behind it": STARTED + frame(FrameType.EXITED, u32(0) + b"x"),
    "errno 0": frame(FrameType.FAILED, u32(0) + encode_text("x")),
    "errno 5000": frame(FrameType.FAILED, u32(5000) + encode_text("x")),
    "a failure with a text that is too short": frame(FrameType.FAILED, u32(2) + u32(99) + b"x"),
    "a failure with an endless text": frame(FrameType.FAILED, u32(2) + u32(2**32 - 1)),
    "a failure after the start": STARTED + frame(FrameType.FAILED, u32(2) + encode_text("x")),
    "empty data": STARTED + frame(FrameType.DATA, stream=1),
    "data on stdin": STARTED + frame(FrameType.DATA, b"x", stream=0),
    "data on stream 9": STARTED + frame(FrameType.DATA, b"x", stream=9),
    "data after the end": STARTED
    + frame(FrameType.EOF, stream=1)
    + frame(FrameType.DATA, b"x", stream=1),
    "two ends": STARTED + frame(FrameType.EOF, stream=1) * 2,
    "an end of stream 200": STARTED + frame(FrameType.EOF, stream=200),
    "more data than credit": STARTED
    + frame(FrameType.DATA, bytes(65536), stream=1) * (READ_WINDOW // 65536 + 1),
    "credit for stdout": STARTED + frame(FrameType.CREDIT, u32(1), stream=1),
    "credit of nothing": STARTED + frame(FrameType.CREDIT, u32(0)),
    "credit for what was never sent": STARTED + frame(FrameType.CREDIT, u32(WRITE_WINDOW)),
    "credit in three bytes": STARTED + frame(FrameType.CREDIT, b"123"),
    "a welcome for somebody else": welcome(os.urandom(16)),
    "a malformed welcome": frame(FrameType.WELCOME, b"x" * 40, id_=0),
    "an agent that has started anew": frame(FrameType.STRANGER, id_=0),
}


@pytest.mark.parametrize("lie", LIES, ids=str)
async def test_a_lie_ends_the_channel_with_its_reason(lie: str) -> None:
    async with opened() as (channel, guest):
        spawning = asyncio.create_task(channel.spawn(ExecRequest(argv=["x"], stdin=True)))
        await guest.hear()
        await guest.say(LIES[lie])
        waiting = asyncio.create_task(channel.ping(deadline=Deadline.after(seconds=20)))

        with pytest.raises(ChannelLost) as caught:
            await waiting
        assert "broke the protocol" in caught.value.cause
        with suppress(ChannelLost, OSError):
            await spawning  # it may have started, or failed to, before the lie
        with pytest.raises(ChannelLost):
            await channel.spawn(ExecRequest(argv=["x"]))


async def test_the_same_welcome_again_is_no_lie() -> None:
    async with opening() as (task, guest, token):
        await guest.say(welcome(token) * 3)
        channel = await task
        pinging = asyncio.create_task(channel.ping(deadline=Deadline.after(seconds=20)))
        request = await guest.hear()
        await guest.say(frame(FrameType.DONE, id_=struct.unpack_from("<I", request, 8)[0]))

        assert await pinging >= 0
        await channel.close()


async def test_another_protocol_is_refused_in_words() -> None:
    async with opening() as (task, guest, token):
        await guest.say(welcome(token, protocol=1))
        with pytest.raises(ChannelLost, match="protocol 1"):
            await task


async def test_a_refused_identity_is_an_error_of_the_guest() -> None:
    async with opening() as (task, guest, token):
        await guest.say(welcome(token, refused=22))
        with pytest.raises(OSError, match=r"Invalid argument.*hostname"):
            await task


@pytest.mark.parametrize(
    ("says", "words"),
    [
        ({"hostname": "web-1", "restore_id": "r-2"}, "restore id is 'r-2', it was given 'r-1'"),
        ({"hostname": "web-1"}, "restore id is '', it was given 'r-1'"),
        ({"restore_id": "r-1"}, "host name is 'vm', it was given 'web-1'"),
    ],
)
async def test_a_guest_that_is_not_what_it_was_made_is_refused_in_words(
    says: dict[str, str], words: str
) -> None:
    given = Identity(restore_id="r-1", hostname="web-1")
    async with opening(identity=given) as (task, guest, token):
        await guest.say(welcome(token, **says))  # type: ignore[arg-type]
        with pytest.raises(ChannelLost, match=words):
            await task


async def test_endless_noise_before_the_hello_costs_no_memory() -> None:
    noise = os.urandom(65536)
    async with opening() as (task, guest, token):
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(300):
            await guest.say(noise)
        grown = tracemalloc.get_traced_memory()[0] - before
        tracemalloc.stop()
        await guest.say(welcome(token))

        assert grown < 1_000_000
        await (await task).close()


async def test_an_unread_stream_is_kept_only_up_to_its_window() -> None:
    async with opened() as (channel, guest):
        spawning = asyncio.create_task(channel.spawn(ExecRequest(argv=["x"])))
        await guest.hear()
        await guest.say(STARTED)
        process = await spawning
        await guest.say(frame(FrameType.DATA, bytes(65536), stream=1) * (READ_WINDOW // 65536))

        assert len(await process.stdout.readexactly(READ_WINDOW)) == READ_WINDOW
        assert channel.lost is None


RECORD = struct.Struct("<BBHIqI")


def record(kind: str, name: bytes = b"", *, link: bytes = b"", mode: int = 0o644) -> bytes:
    return RECORD.pack(ord(kind), len(name), len(link), mode, 0, 0) + name + link


def content(data: bytes) -> bytes:
    return u32(len(data)) + data + u32(0)


ROOT = record("D", mode=0o755)
LYING_TREES = {
    "a name with a slash": ROOT + record("F", b"a/b"),
    "dot dot": ROOT + record("D", b".."),
    "dot": ROOT + record("F", b"."),
    "a nul": ROOT + record("F", b"a\0b"),
    "an absolute name": ROOT + record("F", b"/etc/x"),
    "a root with a name": record("F", b"x") + content(b""),
    "an entry without a name": ROOT + record("F"),
    "leaving the root": record("U"),
    "an unknown kind": record("X"),
    "an end in the middle": ROOT + record("E"),
    "more after the root": record("F") + content(b"") + record("F"),
    "a huge chunk": record("F") + u32(2**31),
    "a link without a target": record("L"),
    "a link longer than any": RECORD.pack(ord("L"), 0, 5000, 0, 0, 0),
    "a mode of many bits": RECORD.pack(ord("F"), 0, 0, 2**31, 0, 0),
    "a tree without a bottom": ROOT + record("D", b"d") * 300,
    "the end of the stream": ROOT,
}


async def pull_from_liar(tree: bytes, target: Path, **options: int) -> Channel:
    async with opened() as (channel, guest):
        pulling = asyncio.create_task(channel.pull("/x", target, **options))
        await guest.hear()
        await guest.say(STARTED)
        for start in range(0, len(tree), 65536):
            await guest.say(frame(FrameType.DATA, tree[start : start + 65536], stream=1))
        await guest.say(
            frame(FrameType.EXITED, u32(0))
            + frame(FrameType.EOF, stream=1)
            + frame(FrameType.EOF, stream=2)
        )
        await pulling
        return channel


@pytest.mark.parametrize("lie", LYING_TREES, ids=str)
async def test_a_lying_tree_ends_the_channel_and_leaves_nothing(lie: str, tmp_path: Path) -> None:
    with pytest.raises(ChannelLost):
        await pull_from_liar(LYING_TREES[lie], tmp_path / "target")

    assert list(tmp_path.iterdir()) == []


async def test_a_planted_link_is_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    tree = (
        ROOT
        + record("L", b"way", link=os.fsencode(outside))
        + record("D", b"way", mode=0o755)
        + record("F", b"planted")
        + content(b"x")
        + record("U") * 2
        + record("E")
    )
    with pytest.raises(OSError, match="way"):
        await pull_from_liar(tree, tmp_path / "target")

    assert list(tmp_path.iterdir()) == [outside]
    assert list(outside.iterdir()) == []


async def test_a_file_is_not_written_through_a_planted_link(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    tree = (
        ROOT
        + record("L", b"f", link=os.fsencode(victim))
        + record("F", b"f")
        + content(b"theirs")
        + record("U")
        + record("E")
    )
    await pull_from_liar(tree, tmp_path / "target")

    assert victim.read_text() == "mine"
    assert (tmp_path / "target" / "f").read_text() == "theirs"


async def test_privilege_bits_of_the_guest_are_dropped(tmp_path: Path) -> None:
    await pull_from_liar(
        record("F", mode=0o6755) + content(b"#!") + record("E"), tmp_path / "target"
    )

    assert (tmp_path / "target").stat().st_mode & 0o7777 == 0o755


async def test_more_than_the_limit_is_refused_and_removed(tmp_path: Path) -> None:
    tree = record("F") + content(bytes(60_000)) + record("E")
    with pytest.raises(OSError, match="larger than allowed"):
        await pull_from_liar(tree, tmp_path / "target", limit_bytes=50_000)

    assert list(tmp_path.iterdir()) == []


async def test_a_file_that_never_ends_ends_the_channel_at_the_limit() -> None:
    piece = frame(FrameType.DATA, bytes(PAYLOAD_MAX), stream=1)
    async with opened() as (channel, guest):
        reading = asyncio.create_task(channel.read_file("/etc/hosts", limit=READ_WINDOW))
        await guest.hear()
        await guest.say(STARTED)

        async def endless() -> None:
            while True:
                await guest.say(piece)
                await asyncio.sleep(0)

        saying = asyncio.create_task(endless())
        with pytest.raises(ChannelLost, match="that were asked for"):
            await asyncio.wait_for(reading, timeout=10)
        saying.cancel()
        await asyncio.wait([saying])


async def test_the_loops_exception_handler_hears_nothing() -> None:
    heard: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: heard.append(context))
    for lie in LIES.values():
        async with opened() as (channel, guest):
            spawning = asyncio.create_task(channel.spawn(ExecRequest(argv=["x"], stdin=True)))
            await guest.hear()
            await guest.say(lie)
            await asyncio.wait([spawning], timeout=0.02)
            spawning.cancel()
            await asyncio.wait([spawning])
            del spawning

    assert heard == []
