"""Starting a machine: its VMM, the lines to it, and the guest in it, step by step, and its end."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from pytest_vmsandbox.deadline import Deadline
from pytest_vmsandbox.errors import (
    BootFailed,
    MachineFailed,
    NetworkFailed,
    OutcomeUnknown,
    SocketAuthError,
    TimedOut,
)
from pytest_vmsandbox.jail.off_loop import to_its_end
from pytest_vmsandbox.machine.console import Console
from pytest_vmsandbox.machine.order import PowerOn
from pytest_vmsandbox.machine.running import Running
from pytest_vmsandbox.machine.timings import Timings
from pytest_vmsandbox.vmm.launch import Launcher


@asynccontextmanager
async def open_running(
    order: PowerOn,
    *,
    launcher: Launcher,
    console: Console,
    timings: Timings,
    on_started: Callable[[Running], None],
) -> AsyncIterator[Running]:
    """Start the VMM, prove that its sockets are its own, boot the guest; kill it on the way out.

    `on_started` is told as soon as there is something to look at, however the boot goes on.
    Raises BootFailed, with what there was to see, when the guest does not come to answer, and
    NetworkFailed when it does, but can't be given what belongs to its networks.
    Whatever is raised, no process and no connection is left.
    """
    deadline = Deadline.after(seconds=order.boot_s)
    console.power_on()
    async with AsyncExitStack() as stack:
        with timings.measuring("spawn_s"):
            process = await stack.enter_async_context(launcher.launch(order.request))
            running = Running(order, console, process)
            on_started(running)
            stack.push_async_callback(_close, running)
            await _booting(running.connect(deadline=deadline), running)
        if order.frozen is None:
            with timings.measuring("boot_s"):
                await _booting(running.boot(deadline=deadline), running)
        else:
            with timings.measuring("restore_s"):
                with timings.measuring("load_s"):
                    await _booting(running.load(order.frozen, deadline=deadline), running)
                await _booting(running.individualize(order.frozen, deadline=deadline), running)
        yield running


async def _close(running: Running) -> None:
    """Close it to the last line, however often whoever gives it up is cancelled."""
    await to_its_end(running.close())


async def _booting(step: Coroutine[Any, Any, None], running: Running) -> None:
    """Do a step of the boot; whatever goes wrong in it is a BootFailed, but for its networks."""
    did_not = "it did not boot" if running.order.frozen is None else "it could not be restored"
    try:
        await step
    except BootFailed:
        raise
    except MachineFailed as error:
        raise running.failed(BootFailed, f"{did_not}: {error.cause}") from error
    except (TimedOut, OutcomeUnknown, SocketAuthError, NetworkFailed) as error:
        # A line that breaks is mostly a sign that the VMM has ended: that says more.
        if not isinstance(error, TimedOut):
            await running.settle()
        if isinstance(error, NetworkFailed) and not running.failure:
            raise
        cause = running.failure.cause if running.failure else str(error)
        raise running.failed(BootFailed, f"{did_not}: {cause}") from error
    except OSError as error:  # of the guest's, or of the host's files
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        raise running.failed(BootFailed, f"{did_not}: {what}") from error
