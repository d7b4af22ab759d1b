"""A QMP session: the VMM's control line, over a socket whose peer has been checked."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

from qemu.qmp import ExecInterruptedError, ExecuteError, QMPClient, QMPError, Runstate, StateError

from pytest_vmsandbox.deadline import Deadline
from pytest_vmsandbox.errors import OutcomeUnknown, RequestInvalid


@dataclass(frozen=True, slots=True, kw_only=True)
class QmpEvent:
    """Something that QEMU reported of itself (qemu-qmp-ref(7), "Events")."""

    name: str
    data: Mapping[str, object]


class QmpSession:
    """Commands to one VMM; `open_qmp` makes it."""

    def __init__(self, client: QMPClient) -> None:
        self._client = client
        # While QEMU takes a descriptor nothing else may come over the line: the thread that reads
        # it looks at what the other one is just taking, and may crash (QEMU 7.2, tcp_chr_recv() and
        # tcp_get_msgfds() of chardev/char-socket.c).
        self._handing = asyncio.Lock()

    @property
    def version(self) -> str:
        """QEMU's version as it greeted us, for instance "7.2.22"."""
        greeting = self._client.greeting
        if greeting is None:
            return "unknown"
        match greeting.QMP.version:
            case {"qemu": {"major": int(major), "minor": int(minor), "micro": int(micro)}}:
                return f"{major}.{minor}.{micro}"
        return "unknown"

    async def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, *, deadline: Deadline
    ) -> object:
        """What QEMU returns for `command` (qemu-qmp-ref(7)).

        Raises RequestInvalid when QEMU refuses it, OutcomeUnknown when the line breaks before
        the answer, TimedOut when no answer comes by the deadline.
        """
        async with self._answered(command, arguments, deadline):
            async with self._handing:
                pass
            return await self._client.execute(command, arguments)

    async def send_file(self, name: str, descriptor: int, *, deadline: Deadline) -> None:
        """Hand QEMU a descriptor, which it then knows by `name` (getfd); ours stays open.

        Raises as `execute` does.
        """
        arguments = {"fdname": name}
        async with self._answered("getfd", arguments, deadline), self._handing:
            self._client.send_fd_scm(descriptor)
            await self._client.execute("getfd", arguments)

    @asynccontextmanager
    async def _answered(
        self, command: str, arguments: Mapping[str, object] | None, deadline: Deadline
    ) -> AsyncIterator[None]:
        """Have what goes wrong meanwhile raised as `execute` does."""
        try:
            async with asyncio.timeout(deadline.timeout_s):
                yield
        except ExecuteError as error:
            raise RequestInvalid(f"QMP {command}: {error}", f"arguments: {arguments}") from error
        except (ExecInterruptedError, StateError, OSError, EOFError) as error:
            if isinstance(error, TimeoutError):
                raise deadline.timed_out(f"QEMU's answer to {command}") from error
            raise OutcomeUnknown(f"QMP {command}", str(error) or "the line broke") from error


@asynccontextmanager
async def open_qmp(
    sock: socket.socket, *, on_event: Callable[[QmpEvent], None], deadline: Deadline
) -> AsyncIterator[QmpSession]:
    """Negotiate on a connected, verified socket; events go to `on_event` until it is left.

    The socket belongs to the session from here on. Raises OutcomeUnknown when QEMU hangs up,
    TimedOut when it does not greet by the deadline.
    """
    client = QMPClient("vmm")
    client.logger.setLevel(logging.CRITICAL)  # every failure is raised; none is also logged
    try:
        async with asyncio.timeout(deadline.timeout_s):
            await client.connect(sock)
    except TimeoutError as error:
        sock.close()
        raise deadline.timed_out("QEMU's QMP greeting") from error
    except QMPError as error:
        sock.close()
        raise OutcomeUnknown("QMP negotiation", str(error)) from error
    events = asyncio.create_task(_pass_on(client, on_event))
    try:
        yield QmpSession(client)
    finally:
        events.cancel()
        with suppress(asyncio.CancelledError):
            await events
        # The VMM may have died first: what the reader saw of that is known elsewhere.
        with suppress(QMPError, OSError, EOFError):
            if client.runstate is not Runstate.IDLE:
                await client.disconnect()


async def _pass_on(client: QMPClient, on_event: Callable[[QmpEvent], None]) -> None:
    async for message in client.events:
        match message:
            case {"event": str(name), **rest}:
                data = rest.get("data")
                on_event(QmpEvent(name=name, data=data if isinstance(data, dict) else {}))
