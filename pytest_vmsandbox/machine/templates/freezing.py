"""Freezing: a booted machine stopped for good, and the state of its devices taken out of QEMU."""

from __future__ import annotations

import asyncio

from pytest_vmsandbox.deadline import Deadline
from pytest_vmsandbox.errors import BootFailed, RequestInvalid
from pytest_vmsandbox.linux import OwnedFd
from pytest_vmsandbox.machine.frozen import new_state
from pytest_vmsandbox.machine.running import Running

# How often QEMU is asked whether it has finished; it takes some ten milliseconds.
_POLL_S = 0.002
_STATE = "state"
# What RCU and timers of the guest need to clean up behind a process that has ended.
_SETTLE_S = 0.05


async def freeze(running: Running, *, deadline: Deadline) -> OwnedFd:
    """Stop the guest and give the state of its devices, which is the caller's.

    Its memory is what was shared with it, its disks what `Disks.freeze` copies now. The channel to
    its agent stays open, with nothing under way: a restored guest then finds its line as it was.
    The VMM is good for nothing but being ended afterwards. RequestInvalid names the device that
    forbids it; BootFailed when QEMU could not.
    """
    await running.channel.sync()
    await _settle(running, deadline=deadline)
    # Not stopped by us: QEMU does that at the end of the migration, and notes that it ran until
    # then, so that what is restored runs at once.
    qmp = running.qmp
    state = new_state()
    try:
        await running.keep_memory_out(deadline=deadline)
        await qmp.send_file(_STATE, state, deadline=deadline)
        await qmp.execute("migrate", {"uri": f"fd:{_STATE}"}, deadline=deadline)
        await _completed(running, deadline=deadline)
    except BaseException:
        state.close()
        raise
    return state


async def _settle(running: Running, *, deadline: Deadline) -> None:
    """Let the kernel finish what is over: else each restored machine would have to do it."""
    await asyncio.sleep(_SETTLE_S)
    await running.channel.ping(deadline=deadline)  # its pages are its own again after a fork
    await asyncio.sleep(_SETTLE_S)


async def _completed(running: Running, *, deadline: Deadline) -> None:
    while True:
        match await running.qmp.execute("query-migrate", deadline=deadline):
            case {"status": "completed"}:
                return
            case {"blocked-reasons": list(reasons)}:
                raise RequestInvalid(f"it can't be frozen: {'; '.join(map(str, reasons))}")
            case {"status": "failed" | "cancelled", **rest}:
                reason = rest.get("error-desc", "QEMU does not say why")
                raise running.failed(BootFailed, f"it could not be frozen: {reason}")
        await asyncio.sleep(_POLL_S)
