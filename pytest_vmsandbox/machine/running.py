"""A machine that is powered on: VMM, control line, console and agent, and what happens to them."""

from __future__ import annotations

import asyncio
import shlex
import socket
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any, TypeVar

from pytest_vmsandbox.deadline import Deadline
from pytest_vmsandbox.errors import (
    BootFailed,
    ChannelLost,
    Evidence,
    GuestPanicked,
    MachineFailed,
    TimedOut,
    VmmDied,
    VmSandboxError,
)
from pytest_vmsandbox.guest.channel import Channel, open_channel
from pytest_vmsandbox.guest.messages import Identity
from pytest_vmsandbox.jail.off_loop import to_its_end
from pytest_vmsandbox.machine.console import Console, ConsoleLine, KernelTrouble
from pytest_vmsandbox.machine.frozen import Frozen
from pytest_vmsandbox.machine.order import PowerOn
from pytest_vmsandbox.vmm.disk import disk_error
from pytest_vmsandbox.vmm.launch import VmmProcess
from pytest_vmsandbox.vmm.qemu import socket_name
from pytest_vmsandbox.vmm.qmp import QmpEvent, QmpSession, open_qmp

T = TypeVar("T")

# A panicking kernel prints its reason first and its trace afterwards: what is quoted should
# have both.
PANIC_TEXT_S = 0.3

# Between an agent that closes its port and the reason for it (reset, shutdown, panic).
REASON_S = 2.0

# How long somebody who is asked whether he is alive may take to say so.
SIGN_OF_LIFE_S = 1.0

CONSOLE_TAIL_LINES = 50


class BootStalled(BootFailed):
    """The boot showed no sign of life for so long that it hangs; another try may not."""


class Running:
    """A VMM and the guest in it; `open_running` (starting.py) makes it and ends it.

    Once it has failed, `failure` says of what, and every wait for it raises that.
    """

    def __init__(self, order: PowerOn, console: Console, process: VmmProcess) -> None:
        self.order = order
        self.process = process
        self.failure: MachineFailed | None = None
        # What whoever waits is told: the failure, or that the machine was ended.
        self._over: MachineFailed | None = None
        self.troubles: list[KernelTrouble] = []
        self.guest_shut_down = False
        self._shutdown_told = asyncio.Event()
        self._qmp: QmpSession | None = None
        self._channel: Channel | None = None
        self._agent: socket.socket  # `connect` makes it
        self._lines = AsyncExitStack()
        self._console = console
        self._status = "starting"
        self._disk_error = ""
        self._tasks: set[asyncio.Task[None]] = set()
        self._greeting: asyncio.Task[None] | None = None
        self._ending = False  # we kill it: nothing that happens to it now is a failure
        self._may_shut_down = False  # the guest was asked to power itself off
        self._failed = asyncio.Event()
        self._reset = asyncio.Event()
        self._answering = asyncio.Event()
        self._loaded = asyncio.Event()
        self._runs = asyncio.Event()
        self.ended = asyncio.Event()
        console.on_trouble = self.trouble

    @property
    def qmp(self) -> QmpSession:
        """The control line; `connect` makes it."""
        if self._qmp is None:
            raise self.failed(BootFailed, "the control line is not connected yet")
        return self._qmp

    @property
    def channel(self) -> Channel:
        """The agent's line; `boot` makes it."""
        if self._channel is None:
            raise self.failed(BootFailed, "the agent has not answered yet")
        return self._channel

    @property
    def kernel(self) -> str:
        """The guest's kernel release; empty until its agent has answered."""
        return self._channel.hello.kernel if self._channel else ""

    @property
    def restore_id(self) -> str:
        """What the agent was told when its guest was restored; empty for one that booted."""
        return self._channel.hello.restore_id if self._channel else ""

    @property
    def vmm_version(self) -> str:
        """QEMU's version; empty until it has greeted."""
        return self._qmp.version if self._qmp else ""

    @property
    def printed(self) -> bytes:
        """What the guest has printed on its console, as far as it is held."""
        return self._console.held

    # What others wait for

    async def unless_it_fails(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """The result of the work, or the machine's failure as soon as there is one."""
        work = asyncio.create_task(coroutine)
        failed = asyncio.create_task(self._failed.wait())
        both: list[asyncio.Task[Any]] = [work, failed]
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if self._over is not None and not work.done():
                raise self._over
            return await work
        finally:
            for task in both:
                task.cancel()
            # What the work still uses is its caller's to give back, who goes on only afterwards.
            await to_its_end(asyncio.gather(*both, return_exceptions=True))

    async def wait_answering(self, *, deadline: Deadline) -> None:
        """Return once the agent answers: at once, but for a guest that is just rebooting."""
        if self.failure is not None:
            raise self.failure
        if not self._answering.is_set():
            await self._within(self._answering, deadline, "the guest's agent")

    async def wait_rebooted(self, *, deadline: Deadline) -> None:
        """Return once the guest has been reset and its agent answers again."""
        await self._within(self._reset, deadline, "the guest's reset")
        await self.wait_answering(deadline=deadline)

    async def wait_ended(self, *, deadline: Deadline) -> None:
        """Return once the VMM has ended."""
        await self._within(self.ended, deadline, "the VMM's end")
        if self.failure is not None:
            raise self.failure

    def expect_reset(self) -> None:
        """The guest is about to be told to reboot: wait for the reset that comes now."""
        self._reset.clear()

    @asynccontextmanager
    async def expecting_its_end(self) -> AsyncIterator[None]:
        """In this block the guest may power itself off; that alone is no failure."""
        self._may_shut_down = True
        try:
            yield
        finally:
            self._may_shut_down = False

    async def vital_signs(self) -> str:
        """One line on who still answers: the VMM, the guest's agent."""
        deadline = Deadline.after(seconds=SIGN_OF_LIFE_S)
        vmm, agent = await asyncio.gather(
            _sign(self.qmp.execute("query-status", deadline=deadline)),
            _sign(self.channel.ping(deadline=deadline)),
        )
        return f"QEMU answers QMP: {vmm}; the guest's agent answers: {agent}"

    # What happens to it

    def fail(self, error: MachineFailed) -> None:
        """Record what it died of and tell everyone who waits for it; only the first counts."""
        if self.failure is None and not self._ending:
            self.failure = self._over = error
            self._console.fail(error)
            self._failed.set()
            if self._channel is not None:
                self._channel.fail(error)
            self._spawn(self.order.unplug())

    def trouble(self, trouble: KernelTrouble) -> None:
        """The kernel said on the console, or through pvpanic, that it is in trouble."""
        if trouble not in self.troubles:
            self.troubles.append(trouble)
            if trouble is KernelTrouble.PANIC:
                self._spawn(self._panic())

    def on_event(self, event: QmpEvent) -> None:
        """Follow what QEMU reports of itself."""
        match event.name:
            case "GUEST_PANICKED":
                self.trouble(KernelTrouble.PANIC)
            case "RESET":
                self._was_reset()
            case "SHUTDOWN":
                self.guest_shut_down = bool(event.data.get("guest"))
                self._shutdown_told.set()
            case "VSERPORT_CHANGE" if event.data.get("open") is False:
                self._spawn(self._port_closed())
            case "BLOCK_IO_ERROR":
                self._disk_error = disk_error(event.data)
            case "STOP":
                self._status = "paused"
                self._spawn(self._look_why_stopped())
            case "MIGRATION" if event.data.get("status") == "completed":
                self._loaded.set()
            case "RESUME":
                self._status = "running"
                self._runs.set()

    def _was_reset(self) -> None:
        self._answering.clear()
        # One reset may be reported more than once: only the last greeting counts.
        if self._greeting is not None:
            self._greeting.cancel()
        # While the first one is under way, it is repeated until it is heard.
        if self._channel is not None:
            self._greeting = self._spawn(self._greet_again())

    def evidence(self) -> Evidence:
        """What there is to look at now."""
        return Evidence(
            console_tail=self._console.tail(CONSOLE_TAIL_LINES),
            vmm_stderr=self.order.read_log_tail(),
            command_line=shlex.join(self.order.command),
            vmm_status=self._status,
        )

    def failed(self, kind: type[MachineFailed], cause: str) -> MachineFailed:
        """An error of `kind` with the present evidence."""
        return kind(self.order.config.name, cause, self.evidence())

    # How it starts and ends

    async def boot(self, *, deadline: Deadline) -> None:
        """Let the guest run and wait for its agent's hello."""
        await self.qmp.execute("cont", deadline=deadline)
        stall = self._spawn(self._watch_stall())
        await self._open_channel(Identity(hostname=self.order.config.name), deadline=deadline)
        stall.cancel()
        await self._furnish(deadline=deadline)
        self._answering.set()

    async def load(self, frozen: Frozen, *, deadline: Deadline) -> None:
        """Load the state of the devices, and let the guest run on."""
        with frozen.open_state() as state:
            # QEMU takes them in this order, and we need not wait for each answer.
            await asyncio.gather(
                self.keep_memory_out(deadline=deadline),
                self._announce_nobody(deadline=deadline),
                self.qmp.send_file("state", state, deadline=deadline),
                self.qmp.execute("migrate-incoming", {"uri": "fd:state"}, deadline=deadline),
            )
        if frozen.stands_still:
            await self._within(self._loaded, deadline, "the state of the devices being loaded")
            await self.qmp.execute("cont", deadline=deadline)
        await self._within(self._runs, deadline, "the restored guest to run")

    async def individualize(self, frozen: Frozen, *, deadline: Deadline) -> None:
        """Make the guest that was loaded, and runs, a machine of its own."""
        await self._open_channel(
            self.order.new_identity(),
            keep_processes=True,
            used_before=frozen.stands_still,
            deadline=deadline,
        )
        await self._furnish(deadline=deadline)
        self._answering.set()

    async def refresh(self, *, deadline: Deadline) -> None:
        """Give the restored guest, which has waited for somebody, the time of now and new entropy.

        What runs in it runs on. Raises as `Channel.handshake` does.
        """
        order = self.order
        await self.channel.handshake(
            nonce=order.nonce,
            identity=order.same_identity_now(),
            keep_processes=True,
            deadline=deadline,
        )

    async def keep_memory_out(self, *, deadline: Deadline) -> None:
        """Tell QEMU that RAM is no part of a migration where it lies in a shared file.

        Both sides of a migration have to be told; and to say when one has ended.
        """
        capabilities = [
            {"capability": name, "state": True} for name in ("x-ignore-shared", "events")
        ]
        await self.qmp.execute(
            "migrate-set-capabilities", {"capabilities": capabilities}, deadline=deadline
        )

    async def _announce_nobody(self, *, deadline: Deadline) -> None:
        """Have QEMU not say on a network that a guest has moved there: it has not."""
        if self.order.config.cards:
            await self.qmp.execute(
                "migrate-set-parameters", {"announce-rounds": 0}, deadline=deadline
            )

    async def connect(self, *, deadline: Deadline) -> None:
        """Connect console, control line and agent, each to the VMM that we started and no other."""
        self._spawn(self._watch_process())
        sock = await self._connect("console", deadline=deadline)
        loop = asyncio.get_running_loop()
        line, _ = await loop.create_unix_connection(lambda: ConsoleLine(self._console), sock=sock)
        self._lines.callback(line.close)
        sock = await self._connect("qmp", deadline=deadline)
        self._agent = await self._connect("agent", deadline=deadline)
        # Only now: QEMU answers here once it has built the machine, and listens long before.
        self._qmp = await self._lines.enter_async_context(
            open_qmp(sock, on_event=self.on_event, deadline=deadline)
        )

    async def close(self) -> None:
        """Kill the VMM and let go of every line; who still waits for it gets ChannelLost."""
        ended_by_us = self.failed(ChannelLost, "the machine was ended")
        self._ending = True
        self.process.kill()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._over = self.failure or ended_by_us
        self._failed.set()
        self._console.fail(self._over)
        if self._channel is not None:
            self._channel.fail(self._over)
            await self._channel.close()
        await self._lines.aclose()

    async def _connect(self, purpose: str, *, deadline: Deadline) -> socket.socket:
        return await self.unless_it_fails(self._connected(purpose, deadline=deadline))

    async def _connected(self, purpose: str, *, deadline: Deadline) -> socket.socket:
        # Ours to close as soon as there is one: who asked for it may be cancelled meanwhile.
        sock = await self.process.connect(socket_name(purpose), deadline=deadline)
        self._lines.callback(sock.close)  # whoever takes it over closes it earlier
        return sock

    # What is watched

    async def _watch_process(self) -> None:
        returncode = await self.process.wait()
        self._status = f"ended with {returncode}"
        if returncode == 0:
            await self._learn_of_shutdown()
        if not self.guest_shut_down:
            self.fail(self.failed(VmmDied, f"the VMM ended by itself, with {returncode}"))
        elif not self._may_shut_down:
            self.fail(self.failed(ChannelLost, "the guest shut itself down"))
        self.ended.set()

    async def _learn_of_shutdown(self) -> None:
        """QEMU tells of a shutdown and then ends: its last word may still be on its way."""
        with suppress(TimeoutError):
            async with asyncio.timeout(SIGN_OF_LIFE_S):
                await self._shutdown_told.wait()

    def _channel_lost(self, error: ChannelLost) -> None:
        self._spawn(self._explain_loss(error))

    async def _explain_loss(self, error: ChannelLost) -> None:
        """A line that breaks is mostly a sign of something else: wait for its reason."""
        await self.settle()
        if not self._may_shut_down:
            self.fail(self.failed(ChannelLost, error.cause))

    async def settle(self) -> None:
        """Return once it is known what it died of, or REASON_S has passed."""
        with suppress(TimeoutError):
            async with asyncio.timeout(REASON_S):
                await self._failed.wait()

    async def _watch_stall(self) -> None:
        seen = -1
        while seen != self._console.position:
            seen = self._console.position
            await asyncio.sleep(self.order.stall_s)
        cause = f"no sign of life for {self.order.stall_s:.0f} s"
        self.fail(self.failed(BootStalled, cause))

    async def _panic(self) -> None:
        await asyncio.sleep(PANIC_TEXT_S)
        lines = self._console.tail(200).splitlines()
        said = next((line for line in lines if "Kernel panic" in line), "the kernel panicked")
        self.fail(self.failed(GuestPanicked, said.strip()))

    async def _open_channel(
        self,
        identity: Identity,
        *,
        deadline: Deadline,
        keep_processes: bool = False,
        used_before: bool = False,
    ) -> None:
        """Wait for the agent's hello; from then on the loss of its line is a failure."""
        order = self.order
        self._channel = await self.unless_it_fails(
            open_channel(
                self._agent,
                name=order.config.name,
                nonce=order.nonce,
                identity=identity,
                keep_processes=keep_processes,
                used_before=used_before,
                deadline=deadline,
                silence_s=order.silence_s,
            )
        )
        self._channel.on_lost = self._channel_lost

    async def _furnish(self, *, deadline: Deadline) -> None:
        furnishing = self.order.furnish(self.channel)
        await self._by(deadline, "a guest that has its addresses", furnishing)

    async def _greet_again(self) -> None:
        order = self.order
        deadline = Deadline.after(seconds=order.boot_s)
        try:
            identity = Identity(hostname=order.config.name)
            await self.channel.handshake(nonce=order.nonce, identity=identity, deadline=deadline)
            await self._furnish(deadline=deadline)
        except (VmSandboxError, OSError) as error:
            self.fail(self.failed(BootFailed, f"after a reset: {error}"))
        else:
            self._answering.set()
            self._reset.set()

    async def _port_closed(self) -> None:
        await asyncio.sleep(REASON_S)
        if self._answering.is_set() and not self.ended.is_set() and not self._may_shut_down:
            with suppress(VmSandboxError):
                await self.channel.ping(deadline=Deadline.after(seconds=REASON_S))
                return
            self.fail(self.failed(ChannelLost, "the agent closed its port and does not answer"))

    async def _look_why_stopped(self) -> None:
        with suppress(VmSandboxError):
            answer = await self.qmp.execute(
                "query-status", deadline=Deadline.after(seconds=REASON_S)
            )
            match answer:
                case {"status": "internal-error" | "io-error" as status}:
                    self._status = status
                    why = self._disk_error or status
                    self.fail(self.failed(VmmDied, f"the VMM stopped the guest: {why}"))

    async def _within(self, event: asyncio.Event, deadline: Deadline, awaited: str) -> None:
        await self._by(deadline, awaited, event.wait())

    async def _by(self, deadline: Deadline, awaited: str, work: Coroutine[Any, Any, T]) -> T:
        try:
            async with asyncio.timeout(deadline.timeout_s):
                return await self.unless_it_fails(work)
        except TimeoutError as error:
            if isinstance(error, TimedOut):
                raise
            raise deadline.timed_out(awaited, self._console.tail()) from None

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


async def _sign(question: Coroutine[Any, Any, object]) -> str:
    try:
        await question
    except (VmSandboxError, TimeoutError) as error:
        return f"no ({type(error).__name__})"
    return "yes"
