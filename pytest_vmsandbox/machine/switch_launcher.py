"""The switch launcher: a worker's switch as a process, behind walls where there are any."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from pytest_vmsandbox.deadline import Deadline
from pytest_vmsandbox.errors import HostUnfit, TimedOut, VmSandboxError
from pytest_vmsandbox.host.facts import Tier
from pytest_vmsandbox.host.way import interpreter, render_start
from pytest_vmsandbox.jail.vmm_view import ROOM, plan_vmm_view
from pytest_vmsandbox.linux import OwnedFd, ProcessIdentity
from pytest_vmsandbox.linux.tun import DEVICE
from pytest_vmsandbox.machine.log_tail import read_log_tail
from pytest_vmsandbox.network.client import ENTRY, MODULES, SwitchLine
from pytest_vmsandbox.network.switch import BARE, WALLED
from pytest_vmsandbox.network.wire_kind import WireKind
from pytest_vmsandbox.warden.bundle import bootstrap_of, open_bundle
from pytest_vmsandbox.warden.client import Warden
from pytest_vmsandbox.warden.requests import Launch, Limits, Network, Who
from pytest_vmsandbox.warden.steps import Device

START_S = 30.0
END_S = 10.0

# Far more than it ever has, with what is late for all machines of many networks (hub.py): what
# would be beyond this is a fault, and is not to take the host's memory.
ADDRESS_BYTES = 4 << 30


# Is told which process it is, before that is asked for anything.
Started = Callable[[ProcessIdentity], None]


@asynccontextmanager
async def open_walled_switch(
    warden: Warden, tier: Tier, *, wish: str, log: Path, started: Started
) -> AsyncIterator[SwitchLine]:
    """A switch behind walls, in a network namespace of its own; it ends with the warden.

    It sees a Python and, where taps may be wished for, what makes them; nothing else of the host.
    HostUnfit where it does not come up, or taps are wished for in vain.
    """
    python = interpreter(tier)
    tried = wish != WireKind.SOCKET and os.path.exists(DEVICE)  # noqa: ASYNC240, PTH110 - in memory
    devices = (Device(name="net/tun"),) if tried else ()
    order = Launch(
        who=Who.OWNER,
        name="switch",
        argv=(python, "-I", "-S", "-c", bootstrap_of(ENTRY), WALLED, wish),
        env={},
        cwd="/",
        steps=plan_vmm_view(Path(python), kvm=False, shown=devices),
        network=Network.WIRES,
        limits=Limits(address_bytes=ADDRESS_BYTES),
        files=(),
        room=str(ROOM),
        group=None,
    )
    with _line(log) as (ours, theirs, output):
        async with warden.launch(order, [theirs.fileno(), output, output]) as process:
            theirs.close()
            if process.pid:  # 0: it had ended before anybody could look
                started(process.identity)
            async with _ready(ours, wish, log) as line:
                yield line


@asynccontextmanager
async def open_bare_switch(*, wish: str, log: Path, started: Started) -> AsyncIterator[SwitchLine]:
    """A switch as our own child; it ends when we do, and makes no interface anywhere.

    HostUnfit where it does not come up, or taps are wished for.
    """
    if sys.platform != "linux":
        raise HostUnfit(
            "VMS-NETWORK-LINUX",
            "networks between machines",
            f"this is {sys.platform}, and they are made of what only Linux has",
            "run these tests on Linux; vm.forward() and vm.connect() work without a network",
        )
    with _line(log) as (ours, theirs, output):
        child = _spawn(theirs, output, wish)
        theirs.close()
        try:
            started(ProcessIdentity.of(child.pid))
            async with _ready(ours, wish, log) as line:
                yield line
        finally:
            ours.close()
            await asyncio.shield(asyncio.to_thread(_end, child))


@asynccontextmanager
async def _ready(ours: socket.socket, wish: str, log: Path) -> AsyncIterator[SwitchLine]:
    line = SwitchLine(ours, last_words=lambda: read_log_tail(log).strip())
    try:
        try:
            await line.ready(deadline=Deadline.after(seconds=START_S))
        except (VmSandboxError, OSError) as error:
            raise HostUnfit(
                "VMS-SWITCH-UNUSABLE",
                "a switch for networks between machines",
                str(error),  # which quotes what it printed: its log goes with the run
                "mend what it says, or another --vm-tier",
            ) from error
        if wish == WireKind.TAP and line.kind is not WireKind.TAP:
            raise HostUnfit(
                "VMS-TAP-DENIED",
                "taps for networks between machines",
                line.because,
                f"sudo chmod 0666 {DEVICE}; or --vm-wires=auto, which does without",
            )
        yield line
    finally:
        line.close()


@contextmanager
def _line(log: Path) -> Iterator[tuple[socket.socket, socket.socket, int]]:
    """A line with the bundle on its way to the other end, and where that may print to."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs, log.open("ab") as output:
        with OwnedFd(open_bundle(MODULES)) as bundle:
            socket.send_fds(ours, [b"\0"], [bundle])
        yield ours, theirs, output.fileno()


def _spawn(line: socket.socket, output: int, wish: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        render_start(Tier.BARE, "-c", bootstrap_of(ENTRY), BARE, wish),
        stdin=line.fileno(),
        stdout=output,
        stderr=output,
        start_new_session=True,
        cwd="/",
        env={"PATH": os.defpath, "LC_ALL": "C.UTF-8"},
    )


def _end(child: subprocess.Popen[bytes]) -> None:
    try:
        child.wait(END_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
        raise TimedOut("the end of the switch", END_S) from None
