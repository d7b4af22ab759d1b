"""Mutations of what a real agent really said, as many as VMSANDBOX_MUTATIONS says: no crash, no
hang, no growth.
"""

from __future__ import annotations

import asyncio
import gc
import os
import random
import socket
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from typing import cast

import pytest

from pytest_vmsandbox.deadline import Deadline
from pytest_vmsandbox.errors import ChannelLost
from pytest_vmsandbox.guest.channel import Channel, open_channel
from pytest_vmsandbox.guest.frames import FrameParser, encode_frame
from pytest_vmsandbox.guest.job import Job
from pytest_vmsandbox.guest.messages import ExecRequest
from pytest_vmsandbox.guest.streams import READ_WINDOW

pytestmark = pytest.mark.asyncio

MUTATIONS = int(os.environ.get("VMSANDBOX_MUTATIONS", "20000"))
GROWTH_MAX = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """What the agent said after its hello, and the jobs it spoke about."""

    said: bytes
    job_ids: tuple[int, ...]


class Tap:
    """Passes everything on between host and agent, and keeps what the agent says."""

    def __init__(self, agent: socket.socket) -> None:
        self.host, self._here = socket.socketpair()
        self._agent = agent
        self.said = bytearray()
        for sock in (self._here, agent):
            sock.settimeout(0)
        self._tasks = [
            asyncio.create_task(self._pass(self._here, agent, None)),
            asyncio.create_task(self._pass(agent, self._here, self.said)),
        ]

    async def _pass(
        self, source: socket.socket, sink: socket.socket, kept: bytearray | None
    ) -> None:
        loop = asyncio.get_running_loop()
        while data := await loop.sock_recv(source, 65536):
            if kept is not None:
                kept += data
            await loop.sock_sendall(sink, data)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)
        self._here.close()


async def record(agent: socket.socket, folder: Path) -> Recording:
    tap = Tap(agent)
    channel = await open_channel(
        tap.host, name="vm", nonce="c0ffee", deadline=Deadline.after(seconds=20)
    )
    del tap.said[:]
    job_ids: list[int] = []

    async def run(*argv: str, data: bytes | None = None) -> None:
        process = await channel.spawn(ExecRequest(argv=argv, stdin=data is not None))
        job_ids.append(process._job.id)
        await process.communicate(data)

    await run("sh", "-c", "echo out; echo err >&2; exit 3")
    await run("cat", data=b"x" * 500)
    await channel.ping(deadline=Deadline.after(seconds=20))
    with suppress(FileNotFoundError):
        await channel.spawn(ExecRequest(argv=["no-such-program"]))
    job_ids.append(channel._last_id)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        inside = await channel.dial(IPv4Address("127.0.0.1"), listening.getsockname()[1])
        served, _ = listening.accept()
        with served:
            served.sendall(b"answer")
        await inside.end()
        while await inside.read(100):
            pass
    job_ids.append(channel._last_id)
    (folder / "tree").mkdir()
    (folder / "tree" / "file").write_bytes(b"content")
    await channel.pull(str(folder / "tree"), folder / "copy")
    job_ids.append(channel._last_id)
    await channel.close()
    await tap.close()
    return Recording(said=bytes(tap.said), job_ids=tuple(job_ids))


class Transport:
    """Takes what the channel sends, and drops it."""

    def write(self, data: bytes) -> None:
        """Part of asyncio.Transport."""

    def abort(self) -> None:
        """Part of asyncio.Transport."""

    def set_write_buffer_limits(self, high: int | None = None) -> None:
        """Part of asyncio.WriteTransport."""


def listening(recording: Recording) -> Channel:
    """A channel that has asked for everything that the recording answers."""
    channel = Channel(name="vm")
    channel._line.connection_made(cast("asyncio.Transport", Transport()))
    channel._line.parser.believe()
    channel._token = bytes(16)
    for id_ in recording.job_ids:
        channel._jobs[id_] = Job(line=channel._line, id_=id_, stdin=True, stderr=True)
    return channel


def play(channel: Channel, said: bytes) -> None:
    while said and channel.lost is None:
        room = channel._line.get_buffer(-1)
        count = min(len(room), len(said))
        room[:count] = said[:count]
        said = said[count:]
        channel._line.buffer_updated(count)


def mutate_bytes(said: bytes, chance: random.Random) -> bytes:
    data = bytearray(said)
    for _ in range(chance.randint(1, 4)):
        at, other = chance.randrange(len(data)), chance.randrange(len(data))
        match chance.randrange(5):
            case 0:
                data[at] ^= 1 << chance.randrange(8)
            case 1:
                del data[at : at + chance.randrange(1, 40)]
            case 2:
                data[at:at] = chance.randbytes(chance.randrange(1, 40))
            case 3:
                data[at:at] = data[other : other + 200]
            case _:
                del data[at:]
        if not data:
            return b""
    return bytes(data)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


Said = tuple[int, int, int, bytes]


def mutate_frames(frames: list[Said], chance: random.Random) -> bytes:
    """Frames that are well-formed, and say something else, or at another time."""
    said = list(frames)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(said))
        type_, stream, id_, payload = said[at]
        match chance.randrange(6):
            case 0:
                said[at] = (chance.choice([*range(20), *range(60, 72)]), stream, id_, payload)
            case 1:
                said[at] = (type_, chance.randrange(4), id_, payload)
            case 2:
                said[at] = (type_, stream, chance.randrange(12), payload)
            case 3:
                said[at] = (type_, stream, id_, chance.randbytes(chance.randrange(12)))
            case 4:
                said.insert(chance.randrange(len(said)), said[at])
            case _:
                del said[at]
        if not said:
            return b""
    return b"".join(encode_frame(t, stream=s, id_=i, payload=p) for t, s, i, p in said)


def parse(said: bytes) -> list[Said]:
    parser = FrameParser()
    parser.believe()
    parser.room()[: len(said)] = said
    parser.filled(len(said))
    return [(f.type, f.stream, f.id, bytes(f.payload)) for f in parser.frames()]


async def test_no_mutation_of_a_real_stream_harms_the_host(
    start_agent: Callable[..., socket.socket], tmp_path: Path
) -> None:
    recording = await record(start_agent(), tmp_path)
    frames = parse(recording.said)
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}, {len(frames)} frames, {len(recording.said)} bytes")  # noqa: T201 - to run it again
    chance = random.Random(seed)
    complaints: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    gc.collect()
    gc.freeze()  # what other tests hold need not be looked at, each time
    verdicts = {"lost": 0, "believed": 0}
    resident = resident_grown = before = 0
    for number in range(MUTATIONS):
        said = mutate_bytes(recording.said, chance) if number % 2 else mutate_frames(frames, chance)
        channel = listening(recording)
        play(channel, said)
        jobs = list(channel._jobs.values())
        for job in jobs:
            assert len(job.stdout._buffer) <= READ_WINDOW
        assert channel.lost is None or isinstance(channel.lost, ChannelLost)
        verdicts["believed" if channel.lost is None else "lost"] += 1
        channel.fail(ChannelLost("vm", "over"))
        if number == MUTATIONS // 2:
            gc.collect()
            resident = resident_bytes()
        if number % 500 == 0:
            await asyncio.sleep(0)  # the loop forgets cancelled timers only when it turns
        if number % 2000 == 0:
            gc.collect()  # in a process that holds much, the collector itself waits for long
        if number == MUTATIONS - 2000:
            resident_grown = resident_bytes() - resident
            tracemalloc.start()  # it makes everything four times slower: the end is sample enough
            gc.collect()
            before = tracemalloc.get_traced_memory()[0]
    gc.collect()  # a channel and its parts know each other
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    gc.unfreeze()

    assert grown < GROWTH_MAX
    assert resident_grown < 4 * GROWTH_MAX
    assert complaints == []
    assert min(verdicts.values()) > MUTATIONS // 100, verdicts
