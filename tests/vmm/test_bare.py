"""The bare launcher, with programs that are quicker than a VMM."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest

from pytest_vmsandbox.errors import HostUnfit
from pytest_vmsandbox.vmm.bare import BareLauncher
from pytest_vmsandbox.vmm.launch import LaunchRequest


def _request(tmp_path: Path, *argv: str) -> LaunchRequest:
    return LaunchRequest(id="m1", argv=argv, directory=tmp_path, log=tmp_path / "vmm.log")


async def test_leaving_the_context_kills_and_reaps(tmp_path: Path) -> None:
    async with BareLauncher().launch(_request(tmp_path, "sleep", "100")) as process:
        assert Path(f"/proc/{process.pid}").exists()

    assert not Path(f"/proc/{process.pid}").exists()
    assert process.pidfd is None


async def test_a_stopped_process_is_killed_all_the_same(tmp_path: Path) -> None:
    async with BareLauncher().launch(_request(tmp_path, "sleep", "100")) as process:
        os.kill(process.pid, signal.SIGSTOP)

    assert not Path(f"/proc/{process.pid}").exists()


async def test_a_cancelled_task_leaves_no_process(tmp_path: Path) -> None:
    pids: list[int] = []

    async def hold() -> None:
        async with BareLauncher().launch(_request(tmp_path, "sleep", "100")) as process:
            pids.append(process.pid)
            await asyncio.sleep(100)

    task = asyncio.create_task(hold())
    while not pids:
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert not Path(f"/proc/{pids[0]}").exists()


async def test_several_waiters_learn_of_the_end(tmp_path: Path) -> None:
    async with BareLauncher().launch(_request(tmp_path, "sh", "-c", "exit 3")) as process:
        statuses = tuple(await asyncio.gather(process.wait(), process.wait(), process.wait()))

    assert statuses == (3, 3, 3)


async def test_a_signal_is_a_negative_status(tmp_path: Path) -> None:
    async with BareLauncher().launch(_request(tmp_path, "sleep", "100")) as process:
        process.kill()

        assert await process.wait() == -signal.SIGKILL


async def test_its_output_goes_to_the_log_and_its_input_is_empty(tmp_path: Path) -> None:
    request = _request(tmp_path, "sh", "-c", "cat; echo out; echo err >&2")
    async with BareLauncher().launch(request) as process:
        await process.wait()

    assert request.log.read_text() == "out\nerr\n"


async def test_it_has_a_session_of_its_own_and_none_of_our_descriptors(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.set_inheritable(write, True)  # noqa: FBT003  # its only argument
    request = _request(
        tmp_path,
        sys.executable,
        "-c",
        "import os; print(os.getsid(0), *os.listdir('/proc/self/fd'))",
    )
    async with BareLauncher().launch(request) as process:
        await process.wait()
    os.close(read)
    os.close(write)

    session, *descriptors = request.log.read_text().split()
    assert int(session) == process.pid
    assert set(descriptors) <= {"0", "1", "2", "3"}


async def test_a_program_that_is_not_there_is_an_unfit_host(tmp_path: Path) -> None:
    with pytest.raises(HostUnfit, match="VMS-QEMU"):
        async with BareLauncher().launch(_request(tmp_path, "/no/such/qemu")):
            pass


async def test_no_descriptor_is_left_after_many_launches(tmp_path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(20):
        async with BareLauncher().launch(_request(tmp_path, "true")) as process:
            await process.wait()

    assert len(list(Path("/proc/self/fd").iterdir())) == before
