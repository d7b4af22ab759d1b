"""Capturing: a running machine as it is at one instant, frozen, while it goes on.

QEMU sends all of itself down a pipe, as if to another host; memory goes to a file of its own, the
state of the devices stays a stream (vmm/migration_stream.py). Other machines are then restored
from both as from a template. The guest stands still meanwhile.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial

from pytest_vmsandbox.deadline import Deadline
from pytest_vmsandbox.errors import RequestInvalid, TimedOut, VmmDied, VmSandboxError
from pytest_vmsandbox.jail.off_loop import run_stoppable, to_its_end
from pytest_vmsandbox.linux import OwnedFd
from pytest_vmsandbox.machine.disks import NO_DISKS, Disks, FrozenDisks
from pytest_vmsandbox.machine.frozen import Frozen, state_of
from pytest_vmsandbox.machine.memory import GuestMemory, new_memory, write_pages
from pytest_vmsandbox.machine.running import Running
from pytest_vmsandbox.vmm.migration_stream import StreamSplitter
from pytest_vmsandbox.vmm.qemu import RAM

_STREAM = "capture"
# What anybody may have (pipe(7), /proc/sys/fs/pipe-max-size). A smaller one is only slower.
_PIPE_BYTES = 1 << 20
# No limit (bytes a second): migrations are slowed down for the sake of networks.
_UNLIMITED = 1 << 50
# What letting a guest go on may take when nobody waits for it any more.
_GO_ON_S = 10.0
_POLL_S = 0.002
PAUSED = "paused"
_RUNS, _WAS_SENT = "running", "postmigrate"
# A migration that is over, or never was (qapi/migration.json, MigrationStatus); whatever else it
# is called, QEMU is still busy with it.
_SETTLED = {"none", "completed", "failed", "cancelled"}


async def capture(
    running: Running, disks: Disks, *, deadline: Deadline, time_scale: float
) -> Frozen:
    """The machine as it is now, which is the caller's; it goes on, or stays paused if it was.

    RequestInvalid where something forbids it, StreamRefused where QEMU's own stream can't be read,
    TimedOut at the deadline, OSError where the host has no room for its disks. Whatever is raised,
    the guest goes on as before, and nothing is left; one that can't go on has failed, and all who
    wait for it are told.
    """
    with ExitStack() as undo:
        memory = new_memory("vmsandbox-fork", size=running.order.config.memory_mib << 20)
        undo.callback(memory.close)
        try:
            async with asyncio.timeout(deadline.timeout_s):
                taken = await running.unless_it_fails(
                    _capture(running, memory, disks, undo, deadline=deadline, time_scale=time_scale)
                )
        except TimeoutError as error:
            if isinstance(error, TimedOut):
                raise
            raise deadline.timed_out(f"all of {running.order.config.name}'s memory") from None
        memory.seal()
        frozen = Frozen(
            nonce=running.order.nonce,
            memory=memory,
            state=state_of(taken.state),
            console=taken.console,
            disks=taken.disks,
            stands_still=True,
        )
        undo.pop_all()
        return frozen


async def is_as_it_was_sent(running: Running, deadline: Deadline) -> bool:
    """Whether it has not run since the last capture, which was of a paused machine."""
    return await status_of(running, deadline=deadline) == _WAS_SENT


@dataclass(frozen=True, slots=True, kw_only=True)
class _Taken:
    """All of a machine but its memory: state of the devices, disks, what it had printed."""

    state: bytes
    disks: FrozenDisks
    console: bytes


async def _capture(
    running: Running,
    memory: GuestMemory,
    disks: Disks,
    undo: ExitStack,
    *,
    deadline: Deadline,
    time_scale: float,
) -> _Taken:
    """Write its memory to `memory`, and give the rest; `undo` is told how to remove the disks."""
    qmp = running.qmp
    await running.keep_memory_out(deadline=deadline)
    await qmp.execute("migrate-set-parameters", {"max-bandwidth": _UNLIMITED}, deadline=deadline)
    splitter = StreamSplitter(block=RAM, size=memory.size, write=partial(write_pages, memory))

    disks.require_room()

    def freeze(stop: threading.Event) -> FrozenDisks:
        frozen = disks.freeze(stop)
        undo.callback(frozen.close)
        return frozen

    async with _standing_still(running, deadline=deadline, go_on_s=_GO_ON_S * time_scale):
        # Closed before the guest goes on: QEMU may wait for a reader, and answers nobody then.
        with _pipe() as (reading, writing):
            await qmp.send_file(_STREAM, writing, deadline=deadline)
            await qmp.execute("migrate", {"uri": f"fd:{_STREAM}"}, deadline=deadline)
            writing.close()  # QEMU's is the last one: it ends the stream by closing it
            await _read(reading, splitter)
        await _require_completed(running, deadline=deadline)
        # Disks are of the same instant: the guest stands still, and QEMU has written all that
        # it had of them (it would leave them to another host now).
        return _Taken(
            state=splitter.finish(),
            disks=await run_stoppable(freeze) if running.order.config.disks else NO_DISKS,
            console=running.printed,
        )


@contextmanager
def _pipe() -> Iterator[tuple[OwnedFd, OwnedFd]]:
    """A pipe that is read without waiting, and written to by somebody who waits."""
    reading, writing = map(OwnedFd, os.pipe2(os.O_CLOEXEC))
    with reading, writing:
        os.set_blocking(reading, False)
        with suppress(OSError):
            fcntl.fcntl(reading, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        yield reading, writing


async def _read(reading: OwnedFd, splitter: StreamSplitter) -> None:
    """Feed the splitter until the stream ends."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()

    def read() -> None:
        if ended.done():
            return
        try:
            count = os.readv(reading, [splitter.room()])
            if count:
                splitter.filled(count)
            else:
                ended.set_result(None)
        except BlockingIOError:
            pass
        except (OSError, VmSandboxError) as error:
            ended.set_exception(error)

    loop.add_reader(reading, read)
    try:
        await ended
    finally:
        loop.remove_reader(reading)


@asynccontextmanager
async def _standing_still(
    running: Running, *, deadline: Deadline, go_on_s: float
) -> AsyncIterator[None]:
    """The guest's processors stop for the block, and go on after it unless they stood before."""
    was = await status_of(running, deadline=deadline)
    if was not in (_RUNS, PAUSED):
        raise RequestInvalid(
            f"{running.order.config.name} is {was}: nothing can be made of it",
            "a machine can be copied while it runs or is paused",
        )
    try:
        if was == _RUNS:
            running.channel.heartbeat.suspend()
            await running.qmp.execute("stop", deadline=deadline)
        yield
    finally:
        # Also for a caller who is cancelled, however often: the guest must not stand for ever.
        in_time = Deadline.after(seconds=go_on_s)
        await to_its_end(_go_on(running, runs=was == _RUNS, deadline=in_time))


async def _go_on(running: Running, *, runs: bool, deadline: Deadline) -> None:
    """Nothing of a migration is under way any more, and the guest runs if it did.

    Where that can't be, the machine has failed.
    """
    try:
        while await _migration(running, deadline=deadline) not in _SETTLED:
            await running.qmp.execute("migrate_cancel", deadline=deadline)
            await asyncio.sleep(_POLL_S)
        if runs:
            await running.qmp.execute("cont", deadline=deadline)
            running.channel.heartbeat.resume()
    except VmSandboxError as error:
        await running.settle()  # what it died of, if it did, is known in a moment
        cause = f"the guest does not go on after it was copied: {error}"
        running.fail(running.failed(VmmDied, cause))


async def _require_completed(running: Running, *, deadline: Deadline) -> None:
    # The stream has ended; some versions of QEMU say so of the migration a little later.
    name = running.order.config.name
    while True:
        match await running.qmp.execute("query-migrate", deadline=deadline):
            case {"status": "completed"}:
                return
            case {"error-desc": str(reason)}:
                raise RequestInvalid(f"{name} can't be copied: {reason}")
            case {"status": str(status)} if status not in _SETTLED:
                await asyncio.sleep(_POLL_S)
            case answer:
                raise RequestInvalid(f"{name} can't be copied: {answer}")


async def _migration(running: Running, *, deadline: Deadline) -> str:
    match await running.qmp.execute("query-migrate", deadline=deadline):
        case {"status": str(status)}:
            return status
    return "none"


async def status_of(running: Running, *, deadline: Deadline) -> str:
    """What QEMU calls the state that its guest is in (qapi/run-state.json, RunState)."""
    match await running.qmp.execute("query-status", deadline=deadline):
        case {"status": str(status)}:
            return status
    return "unknown"
