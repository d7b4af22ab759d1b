# The real thing is looked at with plain calls: a test's loop has nothing else to do meanwhile.
from __future__ import annotations

import asyncio
import os
import platform
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from pytest_vmsandbox.deadline import Deadline
from pytest_vmsandbox.errors import ChannelLost, GuestPanicked, TimedOut
from pytest_vmsandbox.guest.channel import Channel, open_channel
from pytest_vmsandbox.guest.frames import FrameType, encode_frame
from pytest_vmsandbox.guest.messages import ExecRequest, Identity

pytestmark = pytest.mark.asyncio

StartAgent = Callable[..., socket.socket]


def within(seconds: float) -> Deadline:
    return Deadline.after(seconds=seconds)


async def test_the_hello_states_the_facts_of_the_machine(channel: Channel) -> None:
    hello = channel.hello

    assert hello.nonce == "c0ffee"
    assert hello.boot_id == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert (hello.kernel, hello.architecture) == (platform.release(), platform.machine())
    assert hello.hostname == platform.node()
    assert (hello.is_init, hello.sessions, hello.restore_id) == (False, 1, "")


async def test_a_wrong_nonce_is_another_machine(start_agent: StartAgent) -> None:
    with pytest.raises(ChannelLost, match="another machine"):
        await open_channel(start_agent(), name="vm", nonce="beef", deadline=within(20))


async def test_nobody_answers_by_the_deadline(start_agent: StartAgent) -> None:
    ours, theirs = socket.socketpair()
    with theirs, pytest.raises(TimedOut, match="hello"):
        await open_channel(ours, name="vm", nonce="", deadline=within(0.4))

    assert ours.fileno() == -1


async def test_a_line_that_closes_before_the_hello_is_lost() -> None:
    ours, theirs = socket.socketpair()
    theirs.close()
    with pytest.raises(ChannelLost):
        await open_channel(ours, name="vm", nonce="", deadline=within(20))


async def test_pings_are_answered_while_everything_else_is_busy(channel: Channel) -> None:
    busy = [await channel.spawn(ExecRequest(argv=["yes"])) for _ in range(5)]
    for _ in range(20):
        assert 0 < await channel.ping(deadline=within(20)) < 20

    for process in busy:
        await process.kill()


async def test_a_new_host_is_answered_after_what_a_former_one_left(start_agent: StartAgent) -> None:
    sock = start_agent()
    for cut in (1, 10, 15, 17, 100, 5000):
        copy = sock.dup()
        channel = await open_channel(
            sock, name="vm", nonce="c0ffee", deadline=within(20), used_before=True
        )
        process = await channel.spawn(ExecRequest(argv=["yes"]))
        await process.stdout.read(100_000)  # and leave the rest on the line
        await channel.close()
        copy.settimeout(None)
        copy.sendall(encode_frame(FrameType.DATA, id_=99, payload=bytes(60_000))[:cut])
        sock = copy
    sock.close()


async def test_half_an_exec_of_a_former_host_is_never_carried_out(
    start_agent: StartAgent, tmp_path: Path
) -> None:
    sock = start_agent()
    copy = sock.dup()
    channel = await open_channel(
        sock, name="vm", nonce="c0ffee", deadline=within(20), used_before=True
    )
    await channel.close()
    mark = tmp_path / "mark"
    copy.sendall(encode_frame(FrameType.EXEC, id_=7, payload=f"touch {mark}".encode())[:-4])
    channel = await open_channel(
        copy, name="vm", nonce="c0ffee", deadline=within(20), used_before=True
    )
    process = await channel.spawn(ExecRequest(argv=["true"]))

    assert await process.wait() == 0
    assert not mark.exists()
    await channel.close()


async def test_a_new_session_kills_what_the_former_one_had_started(channel: Channel) -> None:
    process = await channel.spawn(ExecRequest(argv=["sleep", "100"]))
    waiting = asyncio.create_task(process.wait())
    await asyncio.sleep(0)
    hello = await channel.handshake(nonce="c0ffee", deadline=within(20))

    with pytest.raises(ChannelLost, match="anew"):
        await waiting
    assert hello.sessions == 2
    while Path(f"/proc/{process.pid}/cmdline").exists():
        await asyncio.sleep(0.01)


async def test_a_new_session_can_let_the_former_ones_processes_run_on(channel: Channel) -> None:
    script = "while read x; do :; done; echo never; yes | head -c 1000000; exec sleep 100"
    process = await channel.spawn(ExecRequest(argv=["sh", "-c", f"yes & {script}"], stdin=True))
    await channel.handshake(nonce="c0ffee", deadline=within(20), keep_processes=True)
    await channel.handshake(nonce="c0ffee", deadline=within(20), keep_processes=True)
    again = await channel.spawn(ExecRequest(argv=["echo", "heard"]))

    assert await again.stdout.read() == b"heard\n"
    assert Path(f"/proc/{process.pid}").exists()
    os.killpg(process.pid, signal.SIGKILL)


async def test_the_restore_id_is_remembered_by_the_agent(channel: Channel) -> None:
    first = await channel.handshake(
        nonce="c0ffee", deadline=within(20), identity=Identity(restore_id="r-1")
    )
    second = await channel.handshake(nonce="c0ffee", deadline=within(20))

    assert (first.restore_id, second.restore_id) == ("r-1", "r-1")


async def test_the_end_of_the_agent_ends_every_wait(channel: Channel) -> None:
    told: list[BaseException] = []

    def find_out(error: ChannelLost) -> None:
        told.append(error)
        channel.fail(error)

    channel.on_lost = find_out
    process = await channel.spawn(ExecRequest(argv=["sh", "-c", "echo $PPID; sleep 100"]))
    agent = int(await process.stdout.readline())
    waits = [
        asyncio.create_task(process.wait()),
        asyncio.create_task(process.stdout.read()),
        asyncio.create_task(channel.read_file("/dev/zero")),
    ]
    await asyncio.sleep(0.05)
    os.kill(agent, signal.SIGKILL)

    ended = await asyncio.gather(*waits, return_exceptions=True)
    assert [type(error) for error in ended] == [ChannelLost] * 3
    assert len(told) == 1
    with pytest.raises(ChannelLost):
        await channel.spawn(ExecRequest(argv=["true"]))
    os.killpg(process.pid, signal.SIGKILL)


async def test_every_wait_raises_what_the_machine_says(channel: Channel) -> None:
    process = await channel.spawn(ExecRequest(argv=["cat"], stdin=True))
    assert process.stdin is not None
    waits = [
        asyncio.create_task(process.wait()),
        asyncio.create_task(process.stdout.readline()),
        asyncio.create_task(process.stdin.write(bytes(2_000_000))),
        asyncio.create_task(channel.spawn(ExecRequest(argv=["sleep", "9"]))),
    ]
    await asyncio.sleep(0)
    channel.fail(GuestPanicked("vm", "kernel panic"))

    ended = await asyncio.gather(*waits, return_exceptions=True)
    assert [type(error) for error in ended] == [GuestPanicked] * 4
    assert len({id(error) for error in ended}) == 4
    with pytest.raises(GuestPanicked):
        await channel.ping(deadline=within(20))


async def test_a_cancelled_request_leaves_the_channel_usable(channel: Channel) -> None:
    for _ in range(50):
        task = asyncio.create_task(channel.ping(deadline=within(20)))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    await channel.ping(deadline=within(20))

    assert (channel._jobs, channel._replies) == ({}, {})


async def test_a_guest_that_stands_still_is_noticed_while_somebody_waits(
    start_agent: StartAgent,
) -> None:
    channel = await open_channel(
        start_agent(), name="vm", nonce="c0ffee", deadline=within(20), silence_s=0.5
    )
    process = await channel.spawn(ExecRequest(argv=["sh", "-c", "echo $PPID; sleep 1.5"]))
    agent = int(await process.stdout.readline())
    assert await process.wait() == 0  # thrice the silence, but it answers pings
    await asyncio.sleep(0.1)
    os.kill(agent, signal.SIGSTOP)
    try:
        await asyncio.sleep(1.5)
        assert channel.lost is None  # nobody waits
        with pytest.raises(ChannelLost, match="silent"):
            await channel.spawn(ExecRequest(argv=["true"]))
    finally:
        os.kill(agent, signal.SIGCONT)
        await channel.close()


async def test_a_suspended_heartbeat_lets_a_paused_machine_be(start_agent: StartAgent) -> None:
    channel = await open_channel(
        start_agent(), name="vm", nonce="c0ffee", deadline=within(20), silence_s=0.3
    )
    process = await channel.spawn(ExecRequest(argv=["sh", "-c", "echo $PPID; read x"], stdin=True))
    agent = int(await process.stdout.readline())
    channel.heartbeat.suspend()
    os.kill(agent, signal.SIGSTOP)
    await asyncio.sleep(1)
    os.kill(agent, signal.SIGCONT)
    channel.heartbeat.resume()
    process.close()

    assert await process.wait() == 1
    await channel.close()


async def test_a_closed_channel_says_so(channel: Channel) -> None:
    await channel.close()
    await channel.close()
    with pytest.raises(ChannelLost, match="closed"):
        await channel.ping(deadline=within(20))
