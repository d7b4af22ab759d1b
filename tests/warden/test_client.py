"""The client: what it makes of answers that come early, late, or not at all."""

from __future__ import annotations

import asyncio
import errno
import os
import re
import signal
import socket
import time
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from pytest_vmsandbox.errors import HostUnfit, RequestInvalid, TimedOut
from pytest_vmsandbox.host.facts import Tier
from pytest_vmsandbox.linux import OwnedFd, pidfd_is_alive
from pytest_vmsandbox.warden import client
from pytest_vmsandbox.warden.client import Warden, open_warden
from pytest_vmsandbox.warden.requests import DESCRIPTORS_AT_MOST, PACKET_BYTES
from tests.warden.conftest import (
    GROUP,
    SLEEP,
    TRUE,
    Streams,
    children_of,
    inner_of,
    order,
    python,
    run,
    until,
)


@pytest.fixture(autouse=True)
def _nothing_is_kept(open_descriptors: Callable[[], list[str]]) -> Any:
    before = open_descriptors()
    yield
    assert open_descriptors() == before


def signal_to(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except PermissionError:
        pytest.skip("takes a user who may signal the warden")


def fill(line: socket.socket) -> None:
    """Send requests until no more goes in."""
    with suppress(BlockingIOError):
        while True:
            line.send(b'{"number": 0, "request": "nothing"}')


async def nothing_runs(warden: Warden) -> None:
    """Return once the warden holds no process, and the client remembers none."""
    inner = inner_of(warden)
    await run(warden, order(TRUE))  # what was asked for before has been done
    await until(lambda: not children_of(inner))
    await until(lambda: not (warden._processes or warden._abandoned))
    assert not warden._early
    assert not warden._waiting


# Launches that nobody waits for any more


async def test_a_launch_that_is_cancelled_at_any_moment_leaves_nothing(warden: Warden) -> None:
    with Streams() as streams:

        async def launch() -> None:
            async with warden.launch(order(SLEEP, "60"), streams.descriptors):
                await asyncio.sleep(60)

        for step in range(40):
            task = asyncio.create_task(launch())
            await asyncio.sleep(step / 1000)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    await nothing_runs(warden)


async def test_a_launch_that_is_cancelled_just_as_it_is_answered_leaves_nothing(
    warden: Warden, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Streams() as streams:

        async def launch() -> None:
            async with warden.launch(order(SLEEP, "60"), streams.descriptors):
                pytest.fail("it was cancelled before")

        take = warden._take

        def take_and_cancel(form: dict[str, Any], descriptors: list[int]) -> None:
            take(form, descriptors)
            task.cancel()

        with monkeypatch.context() as patched:
            patched.setattr(warden, "_take", take_and_cancel)
            task = asyncio.create_task(launch())
            with pytest.raises(asyncio.CancelledError):
                await task

    await nothing_runs(warden)


async def test_an_answer_that_comes_too_late_is_undone(
    warden: Warden, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = inner_of(warden)
    with Streams() as streams:
        monkeypatch.setattr(client, "ANSWER_S", 0.2)
        signal_to(inner, signal.SIGSTOP)
        try:
            with pytest.raises(TimedOut, match="warden's answer"):
                async with warden.launch(order(SLEEP, "60"), streams.descriptors):
                    pass
        finally:
            signal_to(inner, signal.SIGCONT)
        monkeypatch.undo()

    await nothing_runs(warden)


async def test_a_process_that_ended_before_its_answer_is_read_has_its_exit_status(
    warden: Warden,
) -> None:
    with Streams() as streams:

        async def launch() -> int:
            ordered = python("raise SystemExit(5)")
            async with warden.launch(ordered, streams.descriptors) as process:
                return await process.wait()

        task = asyncio.create_task(launch())
        await asyncio.sleep(0)
        time.sleep(0.5)  # meanwhile nobody reads

        assert await task == 5
    assert not warden._early


async def test_a_kill_is_not_lost_on_a_line_that_is_full(warden: Warden) -> None:
    inner = inner_of(warden)
    with Streams() as streams:
        async with warden.launch(order(SLEEP, "60"), streams.descriptors) as process:
            signal_to(inner, signal.SIGSTOP)
            fill(warden._line)
            process.kill()
            signal_to(inner, signal.SIGCONT)

            assert await process.wait() == -signal.SIGKILL


async def test_what_a_warden_holds_is_for_none_of_its_children(warden: Warden) -> None:
    inner = inner_of(warden)
    with Streams() as streams:
        async with warden.launch(order(SLEEP, "60"), streams.descriptors):
            try:
                held = sorted(Path(f"/proc/{inner}/fdinfo").iterdir())
            except PermissionError:
                pytest.skip("takes a user who may look into the warden")
            # Its standard streams are 0 to 2; 02000000 is O_CLOEXEC (open(2), proc(5)).
            others = {file.name: file.read_text() for file in held if int(file.name) > 2}
            named = {name: str(Path(f"/proc/{inner}/fd/{name}").readlink()) for name in others}

            assert others
            inherited = [
                named[name]
                for name, about in others.items()
                if not int(re.findall(r"flags:\s*(\d+)", about)[0], 8) & 0o2000000
            ]
            assert inherited == []
            assert not [name for name in named.values() if "vmsandbox-warden" in name]


# Many


async def test_two_hundred_launches_cost_the_warden_nothing_that_lasts(warden: Warden) -> None:
    inner = inner_of(warden)

    def held() -> tuple[int, int]:
        try:
            descriptors = len(list(Path(f"/proc/{inner}/fd").iterdir()))
        except PermissionError:
            descriptors = 0
        (line,) = re.findall(r"VmRSS:\s*(\d+) kB", Path(f"/proc/{inner}/status").read_text())
        return descriptors, int(line)

    for _ in range(20):
        await run(warden, order(TRUE, group=GROUP))
    descriptors, rss_kib = held()
    for _ in range(200):
        assert (await run(warden, order(TRUE, group=GROUP)))[0] == 0
    descriptors_after, rss_kib_after = held()

    assert descriptors_after == descriptors
    assert rss_kib_after - rss_kib < 1024
    await nothing_runs(warden)


async def test_twenty_at_once_are_twenty_processes(warden: Warden) -> None:
    async with AsyncExitStack() as stack:
        streams = [stack.enter_context(Streams()) for _ in range(20)]
        processes = await asyncio.gather(
            *(
                stack.enter_async_context(
                    warden.launch(
                        python(f"print({number}, flush=True); input()", name=f"m{number}"),
                        [pair.descriptors[0], *pair.descriptors[1:]],
                    )
                )
                for number, pair in enumerate(streams)
            )
        )
        assert len({process.number for process in processes}) == 20
        await asyncio.gather(*(process.wait() for process in processes))
        assert [pair.text()[0] for pair in streams] == [f"{number}\n" for number in range(20)]


async def test_more_processes_than_descriptors_below_two_hundred_can_be_held(
    warden: Warden,
) -> None:
    # Each costs the warden two descriptors. Those that come with a request have high numbers then.
    async with AsyncExitStack() as stack:
        streams = stack.enter_context(Streams())
        for _ in range(110):
            started = warden.launch(order(SLEEP, "60"), streams.descriptors)
            await stack.enter_async_context(started)
        script = "import os, sys; sys.stdout.write(' '.join(os.readlink(f'/proc/self/fd/{n}')"
        script += " for n in range(3, 23)))"
        pipes = [tuple(map(OwnedFd, os.pipe())) for _ in range(20)]
        for pipe in pipes:
            for end in pipe:
                stack.callback(end.close)
        ends = [pipe[0] for pipe in pipes]

        _, out, err = await run(warden, python(script, files=(None,) * 20), ends)

        assert (out.split(), err) == (
            [str(Path(f"/proc/self/fd/{end}").readlink()) for end in ends],
            "",
        )


# What is not even sent


async def test_a_request_that_is_too_long_is_refused_at_once(warden: Warden) -> None:
    with pytest.raises(RequestInvalid, match=str(PACKET_BYTES)):
        await run(warden, order(TRUE, env={"A": "x" * PACKET_BYTES}))


async def test_a_request_with_too_many_descriptors_is_refused_at_once(warden: Warden) -> None:
    count = DESCRIPTORS_AT_MOST - 2
    with (
        OwnedFd(os.open(os.devnull, os.O_RDONLY)) as null,
        pytest.raises(RequestInvalid, match=str(DESCRIPTORS_AT_MOST)),
    ):
        await run(warden, order(TRUE, files=(None,) * count), [null] * count)


async def test_a_descriptor_that_is_closed_is_an_error_of_its_own(warden: Warden) -> None:
    with pytest.raises(OSError, match="Bad file descriptor") as caught:
        await run(warden, order(TRUE, files=(None,)), [999_999])

    assert caught.value.errno == errno.EBADF
    assert (await run(warden, order(TRUE)))[0] == 0


async def test_what_the_warden_refuses_is_refused_with_its_reason(warden: Warden) -> None:
    with pytest.raises(RequestInvalid, match="cwd='relative'"):
        await run(warden, order(TRUE, cwd="relative"))


# Wardens that don't come up, or don't end


async def test_a_warden_that_does_not_come_up_says_why(
    tier: Tier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "BOOTSTRAP", "raise SystemExit('out of order')")

    with pytest.raises(HostUnfit, match="out of order"):
        async with open_warden(tier, log=tmp_path / "log"):
            pass


async def test_a_warden_that_can_not_even_be_tried_says_why(
    tier: Tier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "render_start", lambda *_: ["/no/such/sudo"])

    with pytest.raises(HostUnfit, match="/no/such/sudo"):
        async with open_warden(tier, log=tmp_path / "log"):
            pass


async def test_a_warden_that_says_nothing_is_waited_for_so_long_and_no_longer(
    tier: Tier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "START_S", 0.3)
    monkeypatch.setattr(
        client,
        "BOOTSTRAP",
        "import socket; line = socket.socket(fileno=0); line.recv(1); line.recv(1)",
    )
    with pytest.raises(HostUnfit, match="greeting"):
        async with open_warden(tier, log=tmp_path / "log"):
            pass


async def test_a_warden_that_does_not_end_is_ended(
    tier: Tier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "END_S", 0.3)
    if tier not in (Tier.ROOT, Tier.USERNS):
        pytest.skip("takes a user who may signal the warden")
    async with AsyncExitStack() as stack:
        opened = open_warden(tier, log=tmp_path / "log")
        warden = await stack.enter_async_context(opened)
        inner = OwnedFd(os.pidfd_open(inner_of(warden)))
        os.kill(inner_of(warden), signal.SIGSTOP)
        with pytest.raises(TimedOut, match="end of the warden"):
            await stack.aclose()
    with inner:
        await until(lambda: not pidfd_is_alive(inner))


async def test_who_asks_a_warden_that_has_died_is_told_so(tier: Tier, tmp_path: Path) -> None:
    async with open_warden(tier, log=tmp_path / "log") as warden:
        with Streams() as streams:
            async with warden.launch(order(SLEEP, "60"), streams.descriptors) as process:
                signal_to(inner_of(warden), signal.SIGKILL)

                assert await process.wait() == -signal.SIGKILL
                process.kill()
                with pytest.raises(ConnectionError, match="warden has ended"):
                    await process.connect("socket")
