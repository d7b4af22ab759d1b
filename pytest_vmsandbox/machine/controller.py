"""The machine itself: its verbs, as coroutines on the engine's loop.

`Machine` and `AsyncMachine` are its two faces, for `def` and for `async def`.
"""

from __future__ import annotations

import asyncio
import math
import re
import secrets
import shutil
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_vmsandbox.deadline import Deadline
from pytest_vmsandbox.errors import (
    ChannelLost,
    Evidence,
    MachineFailed,
    OutcomeUnknown,
    RequestInvalid,
    TimedOut,
)
from pytest_vmsandbox.guest.channel import Channel
from pytest_vmsandbox.guest.messages import ExecRequest, WindowSize
from pytest_vmsandbox.guest.process import GuestProcess
from pytest_vmsandbox.machine.command import (
    Completed,
    Output,
    argv_of,
    decode,
    environment_of,
    run_command,
)
from pytest_vmsandbox.machine.console import Console
from pytest_vmsandbox.machine.running import (
    BootStalled,
    PowerOn,
    Running,
    open_running,
)
from pytest_vmsandbox.machine.timings import Timings
from pytest_vmsandbox.vmm.launch import Launcher
from pytest_vmsandbox.vmm.qemu import QemuConfig

# What a wait may take unless its caller says otherwise, in seconds, before scaling.
COMMAND_S = 120.0
TRANSFER_S = 300.0
POWER_S = 60.0
BOOT_S = 60.0
QMP_S = 20.0
CONDITION_S = 30.0

PORTS = range(1, 65536)

# A boot with no sign of life for this long hangs (seen about once in a thousand emulated
# boots on loaded hosts): it is tried once more, and counted.
STALL_S = 20.0
BOOT_ATTEMPTS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineFacts:
    """What a machine is: acceleration, tier, image and versions, for reports."""

    accel: str
    tier: str
    image: str
    image_digest: str
    kernel: str
    vmm_version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """All that a machine is made of, decided before it is started."""

    id: str
    config: QemuConfig
    launcher: Launcher
    tier: str
    image: str
    image_digest: str
    time_scale: float


class MachineController:
    """One machine, from its first power on to its end."""

    def __init__(self, build: Build) -> None:
        self.build = build
        self.name = build.config.name
        self.id = build.id
        self.timings = Timings()
        self.console = Console(log=build.config.directory / "console.log")
        self._running: Running | None = None
        self._power = AsyncExitStack()
        self._last: Running | None = None
        self._remembered = Evidence()
        # Whether a caller has been told what it died of: the faces note it.
        self.failure_was_told = False

    # Looking at it

    @property
    def facts(self) -> MachineFacts:
        """What it is, as far as it is known: kernel and VMM version only once it ran."""
        ran = self._last
        return MachineFacts(
            accel=self.build.config.accel,
            tier=self.build.tier,
            image=self.build.image,
            image_digest=self.build.image_digest,
            kernel=ran.channel.hello.kernel if ran else "",
            vmm_version=ran.qmp.version if ran else "",
        )

    @property
    def ends(self) -> frozenset[str]:
        """In which ways its guest ended, or nearly: of "panic", "oops" and "shutdown"."""
        ran = self._last
        if ran is None:
            return frozenset()
        shutdown = {"shutdown"} if ran.guest_shut_down else set()
        return frozenset({*map(str, ran.troubles), *shutdown})

    @property
    def failure(self) -> MachineFailed | None:
        """What it died of; None while it is well, or after it was switched off as asked."""
        return self._last.failure if self._last else None

    def evidence(self) -> Evidence:
        """What there is to look at, also after its end."""
        return self._last.evidence() if self._running and self._last else self._remembered

    # Power

    async def power_on(self, *, timeout: float | None = None) -> None:
        """Start it with its disks as they are; returns once its agent answers.

        Raises BootFailed when it does not answer within `timeout` seconds (60), and
        RequestInvalid when it is on. A boot that stalls is tried once more.
        """
        if self._running is not None:
            raise RequestInvalid(f"{self.name} is powered on already")
        for attempt in range(1, BOOT_ATTEMPTS + 1):
            self.timings.boot_attempts = attempt
            try:
                await self._power_on(boot_s=self._seconds(timeout, BOOT_S))
            except BootStalled:
                if attempt == BOOT_ATTEMPTS:
                    raise
            else:
                return

    async def power_cut(self) -> None:
        """Switch it off at once, as if the mains had failed; disks keep what was written."""
        self._remembered = self.evidence()
        self._running = None
        await self._power.aclose()

    async def shutdown(self, *, timeout: float | None = None) -> None:
        """Let the guest end everything in good order and power itself off.

        Raises TimedOut when it has not within `timeout` seconds (60); it is still on then.
        """
        running, deadline = self._on(), self._deadline(timeout, POWER_S)
        await running.wait_answering(deadline=deadline)
        async with running.expecting_its_end():
            await running.channel.poweroff()
            await running.wait_ended(deadline=deadline)
        await self.power_cut()

    async def reboot(self, *, timeout: float | None = None) -> None:
        """Let the guest restart itself; returns once its agent answers again.

        What runs in the guest ends. Raises TimedOut after `timeout` seconds (60).
        """
        running, deadline = self._on(), self._deadline(timeout, POWER_S)
        await running.wait_answering(deadline=deadline)
        running.expect_reset()
        await running.channel.reboot()
        await running.wait_rebooted(deadline=deadline)

    async def pause(self) -> None:
        """Stop the guest's processors where they are."""
        await self.qmp("stop")
        self._on().channel.heartbeat.suspend()

    async def resume(self) -> None:
        """Let the guest's processors go on."""
        await self.qmp("cont")
        self._on().channel.heartbeat.resume()

    async def close(self) -> None:
        """End it for good: neither process nor file of it is left. Safe to repeat."""
        with self.timings.measuring("teardown_s"):
            await self.power_cut()
            shutil.rmtree(self.build.config.directory, ignore_errors=True)

    # Commands

    async def run(  # noqa: PLR0913  # as subprocess.run has them
        self,
        command: str | Sequence[str],
        *,
        input: str | bytes | None = None,  # noqa: A002  # as in subprocess.run
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | int | None = None,
        timeout: float | None = None,
        check: bool = False,
        encoding: str | None = "utf-8",
    ) -> Completed[Any]:
        """Run a command in the guest to its end (compare `subprocess.run`).

        A text is a line for /bin/sh, a list is argv. `env` is added to the agent's own
        environment. Output is text in `encoding`, or bytes where that is None.
        Raises TimedOut after `timeout` seconds (120): the command's whole process group has
        been killed then. Raises CommandFailed for a non-zero status where `check` is set, and
        OSError (FileNotFoundError, PermissionError, ...) when it can't be started at all.
        """
        deadline = self._deadline(timeout, COMMAND_S)
        request = _request(command, env=env, cwd=cwd, user=user, stdin=input is not None)
        data = input.encode(encoding or "utf-8") if isinstance(input, str) else input
        started = time.perf_counter()
        channel = await self._channel(deadline)
        try:
            output = await run_command(channel, request, stdin=data, deadline=deadline)
        except TimedOut as error:
            raise await self._explained(error) from None
        if self.timings.first_command_s is None:
            self.timings.first_command_s = time.perf_counter() - started
        done = _completed(command, output, encoding)
        if check:
            done.check_returncode()
        return done

    async def popen(
        self,
        command: str | Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | int | None = None,
        pty: bool = False,
        rows: int = 24,
        columns: int = 80,
    ) -> GuestProcess:
        """Start a command in the guest and return it, with its streams."""
        request = _request(
            command,
            env=env,
            cwd=cwd,
            user=user,
            stdin=True,
            pty=WindowSize(rows=rows, columns=columns) if pty else None,
        )
        deadline = self._deadline(None, COMMAND_S)
        channel = await self._channel(deadline)
        async with self._in_time(deadline, f"the start of {command!r}"):
            return await channel.spawn(request)

    async def wait_until(
        self, command: str | Sequence[str], *, timeout: float | None = None
    ) -> None:
        """Return once `command` exits with 0, asked again and again in the guest.

        Raises TimedOut after `timeout` seconds (30), with the last attempt's output.
        """
        deadline = self._deadline(timeout, CONDITION_S)
        request = _request(command, env=None, cwd=None, user=None, stdin=False)
        last_seen = "it was never run to its end"
        for pause_s in _pauses():
            try:
                channel = await self._channel(deadline)
                output = await run_command(channel, request, stdin=None, deadline=deadline)
            except TimedOut:
                break
            except ChannelLost as lost:
                # A guest that reboots meanwhile is asked again, one that is gone is not.
                if self._on().failure is not None:
                    raise
                last_seen = lost.cause
            else:
                if output.returncode == 0:
                    return
                said = decode(output.stderr or output.stdout, "utf-8")
                last_seen = f"exit status {output.returncode}: {said}"
            if deadline.passed:
                break
            await asyncio.sleep(min(pause_s, deadline.left_s))
        raise deadline.timed_out(f"success of {command!r} in {self.name}", last_seen)

    async def wait_for_port(self, *where: int | str, timeout: float | None = None) -> None:
        """Return once a TCP port is listened on: `(80)` in this guest, `(host, 80)` from it.

        Raises TimedOut after `timeout` seconds (30).
        """
        await self.wait_until(_port_check(where), timeout=timeout)

    # Files

    async def push(self, source: Path | str, target: str, *, timeout: float | None = None) -> None:
        """Copy a file or a tree of the host into the guest, as `target`; modes are kept.

        Raises OSError as the guest or the host reported it (FileNotFoundError, ENOSPC, ...);
        no half-written file is left under a final name.
        """
        deadline = self._deadline(timeout, TRANSFER_S)
        channel = await self._channel(deadline)
        async with self._in_time(deadline, f"push of {source} to {target}"):
            await channel.push(Path(source), target)

    async def pull(self, source: str, target: Path | str, *, timeout: float | None = None) -> None:
        """Copy a file or a tree of the guest to the host, as `target`; modes are kept.

        Names and links from the guest never lead outside `target`.
        """
        deadline = self._deadline(timeout, TRANSFER_S)
        channel = await self._channel(deadline)
        async with self._in_time(deadline, f"pull of {source} to {target}"):
            await channel.pull(source, Path(target))

    async def read_bytes(self, path: str) -> bytes:
        """The content of a file in the guest; OSError as in `open`."""
        deadline = self._deadline(None, TRANSFER_S)
        channel = await self._channel(deadline)
        async with self._in_time(deadline, f"reading {path}"):
            return await channel.read_file(path)

    async def write_bytes(self, path: str, data: bytes, *, mode: int = 0o644) -> None:
        """Write a file in the guest, whole or not at all; OSError as in `open`."""
        deadline = self._deadline(None, TRANSFER_S)
        channel = await self._channel(deadline)
        async with self._in_time(deadline, f"writing {path}"):
            await channel.write_file(path, data, mode=mode)

    async def read_text(self, path: str, *, encoding: str = "utf-8") -> str:
        """The content of a text file in the guest."""
        return (await self.read_bytes(path)).decode(encoding)

    async def write_text(
        self, path: str, text: str, *, encoding: str = "utf-8", mode: int = 0o644
    ) -> None:
        """Write a text file in the guest, whole or not at all."""
        await self.write_bytes(path, text.encode(encoding), mode=mode)

    # Console and VMM

    async def wait_for_console(
        self, pattern: str, *, timeout: float | None = None
    ) -> re.Match[str]:
        """The first match of a regular expression on the console, now or later."""
        return await self.console.wait_for(pattern, deadline=self._deadline(timeout, CONDITION_S))

    async def qmp(self, command: str, arguments: Mapping[str, object] | None = None) -> object:
        """What QEMU returns for a QMP command (qemu-qmp-ref(7)): the way around our verbs.

        Raises RequestInvalid when QEMU refuses it.
        """
        running = self._on()
        try:
            return await running.qmp.execute(
                command, arguments, deadline=self._deadline(None, QMP_S)
            )
        except OutcomeUnknown:
            if running.failure is not None:
                raise running.failure from None
            raise

    async def screenshot(self, path: Path | str) -> None:
        """Save what the machine's display shows, as PNG."""
        picture = self.build.config.directory / f"screenshot-{secrets.token_hex(4)}.png"
        try:
            await self.qmp("screendump", {"filename": str(picture), "format": "png"})
            await asyncio.to_thread(shutil.copyfile, picture, path)
        finally:
            picture.unlink(missing_ok=True)

    # Inside

    async def _power_on(self, *, boot_s: float) -> None:
        order = PowerOn(
            config=self.build.config,
            nonce=secrets.token_hex(16),
            log=self.build.config.directory / "vmm.log",
            boot_s=boot_s,
            stall_s=STALL_S * self.build.time_scale,
        )
        self._last = None
        self._running = await self._power.enter_async_context(
            open_running(
                order, launcher=self.build.launcher, console=self.console, timings=self.timings
            )
        )
        self._last = self._running

    def _on(self) -> Running:
        if self._running is None:
            raise RequestInvalid(f"{self.name} is powered off", "power_on() starts it")
        return self._running

    async def _channel(self, deadline: Deadline) -> Channel:
        running = self._on()
        await running.wait_answering(deadline=deadline)
        return running.channel

    def _seconds(self, asked: float | None, usual: float) -> float:
        if asked is not None and not (asked >= 0 and math.isfinite(asked)):
            raise RequestInvalid(f"timeout={asked!r} must be a number of seconds, 0 or more")
        return (usual if asked is None else asked) * self.build.time_scale

    def _deadline(self, asked: float | None, usual: float) -> Deadline:
        return Deadline.after(seconds=self._seconds(asked, usual))

    @asynccontextmanager
    async def _in_time(self, deadline: Deadline, awaited: str) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(deadline.timeout_s):
                yield
        except TimeoutError as error:
            late = error if isinstance(error, TimedOut) else deadline.timed_out(awaited)
            raise await self._explained(late) from None

    async def _explained(self, error: TimedOut) -> TimedOut:
        """The same error, which also says who still answers, and what the console shows."""
        running = self._on()
        signs = [error.last_seen, await running.vital_signs()]
        if tail := self.console.tail(20):
            signs.append(f"console:\n{tail}")
        return TimedOut(
            f"{self.name}: {error.awaited}", error.after_s, "\n".join(filter(None, signs))
        )


def _request(
    command: str | Sequence[str],
    *,
    env: Mapping[str, str] | None,
    cwd: str | None,
    user: str | int | None,
    stdin: bool,
    pty: WindowSize | None = None,
) -> ExecRequest:
    return ExecRequest(
        argv=argv_of(command),
        env=environment_of(env),
        cwd=cwd,
        user=user,
        stdin=stdin,
        pty=pty,
    )


def _completed(
    command: str | Sequence[str], output: Output, encoding: str | None
) -> Completed[Any]:
    if encoding is None:
        return Completed(
            command=command,
            returncode=output.returncode,
            stdout=output.stdout,
            stderr=output.stderr,
        )
    return Completed(
        command=command,
        returncode=output.returncode,
        stdout=decode(output.stdout, encoding),
        stderr=decode(output.stderr, encoding),
    )


def _pauses() -> Iterator[float]:
    """Short pauses first: most conditions are met soon."""
    pause_s = 0.02
    while True:
        yield pause_s
        pause_s = min(pause_s * 1.5, 0.25)


def _port_check(where: tuple[int | str, ...]) -> list[str]:
    match where:
        case (int(port),) if port in PORTS:
            # proc_net_tcp: local address in hexadecimal, then the remote one, then 0A = LISTEN
            listening = f"^ *[0-9]+: [0-9A-F]+:{port:04X} [0-9A-F:]+ 0A "
            return [
                "sh",
                "-c",
                f"cat /proc/net/tcp /proc/net/tcp6 2>/dev/null | grep -qE '{listening}'",
            ]
        case (str(host), int(port)) if port in PORTS and host:
            # busybox's nc runs a program once it is connected
            return ["nc", "-w", "1", host, str(port), "-e", "true"]
    raise RequestInvalid(f"wait_for_port{where!r}: a port, or a host and a port, is needed")
