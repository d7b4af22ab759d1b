"""The gateway launcher: a worker's way out as a process, behind walls where there are any.

Its network namespace is the host's, or it would lead nowhere: of all that stands behind walls it
alone shares that. Else it is walled in like any process of the owner's, and of the host's files it
sees its program, and resolv.conf.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    asynccontextmanager,
    contextmanager,
)
from pathlib import Path
from typing import Protocol

from pytest_vmsandbox.errors import NetworkFailed, VmSandboxError
from pytest_vmsandbox.host.facts import QemuBuild
from pytest_vmsandbox.jail.vmm_view import ROOM, plan_vmm_view
from pytest_vmsandbox.linux import ProcessIdentity
from pytest_vmsandbox.machine.log_tail import read_log_tail
from pytest_vmsandbox.network.gateway import knock, render_gateway
from pytest_vmsandbox.network.way_out import RESOLV_CONF, WayOut, host_has_ipv6, plan_way_out
from pytest_vmsandbox.vmm.bare import BareLauncher
from pytest_vmsandbox.vmm.launch import LaunchRequest
from pytest_vmsandbox.vmm.launch import Wire as WireEnd
from pytest_vmsandbox.warden.client import Warden
from pytest_vmsandbox.warden.requests import Launch, Limits, Network, Who
from pytest_vmsandbox.warden.steps import Bind

START_S = 30.0

# What a guest that opens connections without end costs the host: descriptors, and their buffers.
OPEN_FILES = 4096
ADDRESS_BYTES = 8 << 30
LOG_BYTES = 16 << 20

_NAME = "gateway"
_FIRST_FILE = 3  # after the streams

Started = Callable[[ProcessIdentity], None]


class Process(Protocol):
    """A process that was started."""

    identity: ProcessIdentity

    def kill(self) -> None:
        """End it at once."""

    async def wait(self) -> int:
        """Its exit status once it has ended."""


class Gateway:
    """A gateway that answers; `wire` is the switch's end, which whoever plugs it in closes."""

    def __init__(self, process: Process, wire: socket.socket, way_out: WayOut) -> None:
        self.process = process
        self.wire = wire
        self.way_out = way_out
        self._ended = asyncio.ensure_future(process.wait())

    @property
    def over(self) -> bool:
        """Whether it has ended."""
        return self._ended.done()

    def close(self) -> None:
        """Look at its process no more."""
        self._ended.cancel()


@asynccontextmanager
async def open_walled_gateway(
    warden: Warden, qemu: QemuBuild, *, log: Path, started: Started
) -> AsyncIterator[Gateway]:
    """A gateway behind walls; it ends with the warden. NetworkFailed where it does not come up."""
    ipv6 = host_has_ipv6()
    argv = render_gateway(qemu.path, wire=_FIRST_FILE, ipv6=ipv6, seccomp=qemu.sandbox)
    order = Launch(
        who=Who.OWNER,
        name=_NAME,
        argv=tuple(argv),
        env={"PATH": "/usr/bin:/bin", "TMPDIR": str(ROOM)},
        cwd="/",
        steps=plan_vmm_view(Path(qemu.path), kvm=False, shown=_resolv_conf()),
        network=Network.HOST,
        limits=Limits(address_bytes=ADDRESS_BYTES, open_files=OPEN_FILES, file_bytes=LOG_BYTES),
        files=(None,),
        room=str(ROOM),
        group=None,
    )
    with _wire() as (ours, theirs), _streams(log) as streams:
        launching = warden.launch(order, [*streams, theirs.fileno()])
        async with _answering(launching, ours, theirs, ipv6=ipv6, log=log, started=started) as it:
            yield it


@asynccontextmanager
async def open_bare_gateway(
    qemu: QemuBuild, *, log: Path, started: Started
) -> AsyncIterator[Gateway]:
    """A gateway as our own child, which dies with us. NetworkFailed where it does not come up."""
    ipv6 = host_has_ipv6()
    with _wire() as (ours, theirs):
        wire = theirs.fileno()
        request = LaunchRequest(
            id=_NAME,
            argv=render_gateway(qemu.path, wire=wire, ipv6=ipv6, seccomp=qemu.sandbox),
            directory=log.parent,
            log=log,
            files=(WireEnd(wire),),
        )
        launching = BareLauncher().launch(request)
        async with _answering(launching, ours, theirs, ipv6=ipv6, log=log, started=started) as it:
            yield it


@asynccontextmanager
async def _answering(
    launching: AbstractAsyncContextManager[Process],
    ours: socket.socket,
    theirs: socket.socket,
    *,
    ipv6: bool,
    log: Path,
    started: Started,
) -> AsyncIterator[Gateway]:
    async with AsyncExitStack() as stack:
        try:
            process = await stack.enter_async_context(launching)
            theirs.close()
            if process.identity.pid:  # 0: it had ended before anybody could look
                started(process.identity)
            async with asyncio.timeout(START_S):
                await knock(ours)
        except (OSError, VmSandboxError) as error:  # TimeoutError is one of the first
            cause = str(error) or f"it does not answer within {START_S:g} s"
            sentence = f"the gateway of the network nat can't be started: {cause}"
            raise NetworkFailed(sentence, read_log_tail(log).strip()) from error
        gateway = Gateway(process, ours, plan_way_out(_host_resolv_conf(), ipv6=ipv6))
        stack.callback(gateway.close)
        yield gateway


@contextmanager
def _wire() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    ours.settimeout(0)
    with ours, theirs:
        yield ours, theirs


@contextmanager
def _streams(log: Path) -> Iterator[tuple[int, int, int]]:
    with Path(os.devnull).open("rb") as nothing, log.open("ab") as output:
        yield nothing.fileno(), output.fileno(), output.fileno()


def _resolv_conf() -> tuple[Bind, ...]:
    """The host's, wherever it lies: it is mostly a link into /run."""
    file = RESOLV_CONF.resolve()
    return (Bind(source=str(file), target=str(RESOLV_CONF)),) if file.is_file() else ()


def _host_resolv_conf() -> str:
    try:
        return RESOLV_CONF.read_text(errors="surrogateescape")
    except OSError:
        return ""
