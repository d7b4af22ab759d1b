"""Power: on, off, reboot, pause."""

from __future__ import annotations

import asyncio
import secrets
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from functools import partial
from typing import Any

from pytest_vmsandbox.deadline import Deadline
from pytest_vmsandbox.errors import BootFailed, RequestInvalid, TeardownRefused
from pytest_vmsandbox.guest.channel import SILENCE_S
from pytest_vmsandbox.jail.off_loop import run_off_loop
from pytest_vmsandbox.lease.teardown import tear_down
from pytest_vmsandbox.machine.build import Build
from pytest_vmsandbox.machine.core import MachineCore
from pytest_vmsandbox.machine.disks import Disks
from pytest_vmsandbox.machine.frozen import Frozen
from pytest_vmsandbox.machine.order import PowerOn
from pytest_vmsandbox.machine.running import BootStalled, Running
from pytest_vmsandbox.machine.starting import open_running
from pytest_vmsandbox.vmm.launch import Memory

# What a wait may take unless its caller says otherwise, in seconds, before scaling.
BOOT_S = 60.0
POWER_S = 60.0

# A boot with no sign of life for this long hangs (seen about once in a thousand emulated
# boots on loaded hosts): it is tried once more, and counted.
STALL_S = 20.0
BOOT_ATTEMPTS = 2


class Power(MachineCore):
    """The verbs that decide whether a machine runs."""

    def __init__(self, build: Build) -> None:
        super().__init__(build)
        self._power = AsyncExitStack()
        self._boot: asyncio.Task[Any] | None = None
        self._to_restore = build.frozen
        self._is_itself = False
        # It is taken in, gone back, paused or resumed by one at a time.
        self._changing = asyncio.Lock()

    async def power_on(self, *, timeout: float | None = None) -> None:
        """Start it with its disks as they are; returns once its agent answers.

        Raises BootFailed when it does not answer within `timeout` seconds (60), and
        RequestInvalid when it is on. A boot that stalls is tried once more.
        """
        if self._closed:
            raise RequestInvalid(f"{self.name} has ended for good", "ask the factory for another")
        if self._running is not None or self._boot is not None:
            raise RequestInvalid(f"{self.name} is powered on already")
        self._boot = asyncio.current_task()
        self.build.living.add(self)
        try:
            await self._boot_patiently(Deadline.after(seconds=self.seconds(timeout, BOOT_S)))
        except BaseException:
            self.build.living.discard(self)
            raise
        finally:
            self._boot = None

    async def power_cut(self) -> None:
        """Switch it off at once, as if the mains had failed; disks keep what was written to them.

        What the guest has not flushed is lost, or not: docs/disks.md. A boot that is under way is
        given up.
        """
        if self._boot is not None and self._boot is not asyncio.current_task():
            self._boot.cancel()
            await asyncio.wait({self._boot})
        self._running = None
        await self._power.aclose()
        self.build.living.discard(self)

    async def shutdown(self, *, timeout: float | None = None) -> None:
        """Let the guest end everything in good order and power itself off.

        Raises TimedOut when it has not within `timeout` seconds (60); it is still on then.
        """
        running, deadline = self._on(), self._deadline(timeout, POWER_S)
        await running.wait_answering(deadline=deadline)
        async with running.expecting_its_end():
            async with self._in_time(deadline, "the agent's consent to power off"):
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
        async with self._in_time(deadline, "the agent's consent to reboot"):
            await running.channel.reboot()
        await running.wait_rebooted(deadline=deadline)

    async def pause(self) -> None:
        """Stop the guest's processors where they are."""
        async with self._changing:
            await self.qmp("stop")
            self._on().channel.heartbeat.suspend()
            self.build.wires.stand_still()

    async def resume(self) -> None:
        """Let the guest's processors go on."""
        async with self._changing:
            await self.qmp("cont")
            self._on().channel.heartbeat.resume()
            await self.build.wires.catch_up()

    async def close(self) -> None:
        """End it for good: neither process nor file of it is left. Safe to repeat."""
        self._closed = True  # whoever is about to power it on, or to restore it, gives up
        with self.timings.measuring("teardown_s"):
            await self.power_cut()
            # Whoever takes it in, or restores it, fails now, and then lets go of its disks.
            async with self._changing:
                self._remembered = self.evidence()
                try:
                    if self.build.disks:
                        await run_off_loop(self.disks.close)
                    # What resists, or is mounted there and not to be taken off by us, is left to
                    # the end of the run, which has sudo, and tells of what it can't remove.
                    with suppress(TeardownRefused):
                        await asyncio.to_thread(tear_down, self.build.config.directory)
                finally:
                    await self.build.wires.leave()

    async def _power_on_from(self, frozen: Frozen, *, timeout: float | None) -> None:
        """Power it on as itself of another time; it boots again as ever when that fails."""
        if self.build.disks:
            await run_off_loop(partial(self._take_disks, frozen))
        self._to_restore, self._is_itself = frozen, True
        try:
            await self.power_on(timeout=timeout)
        finally:
            self._to_restore, self._is_itself = None, False

    def _take_disks(self, frozen: Frozen) -> None:
        """Begin with the disks that were frozen; where that fails, it keeps those that it has."""
        plans = frozen.disks.under(self.build.disks)
        disks = Disks(plans, directory=self.build.config.directory)
        disks.open()
        disks, self.disks = self.disks, disks
        disks.close()

    async def _boot_patiently(self, deadline: Deadline) -> None:
        """Boot it, and once more if the first boot hangs."""
        for attempt in range(1, BOOT_ATTEMPTS + 1):
            self.timings.boot_attempts = attempt
            try:
                await self._power_on(boot_s=deadline.left_s)
            except BootFailed as failed:
                if attempt == BOOT_ATTEMPTS or not isinstance(failed, BootStalled):
                    self.failure_was_told = True
                    raise
            else:
                return

    async def _power_on(self, *, boot_s: float) -> None:
        scale = self.build.time_scale
        disks = await run_off_loop(self.disks.open) if self.build.disks else ()
        frozen, config = self._to_restore, replace(self.build.config, disks=disks)
        if frozen is not None:
            memory = Memory(frozen.memory)
            config = replace(config, memory=memory, restored=True)
            if not self._is_itself:  # its own console has all of it
                self.console.recall(frozen.console)
        wires = self.build.wires
        async with AsyncExitStack() as power:
            config = replace(config, cards=await power.enter_async_context(wires.plugged()))
            order = PowerOn(
                id=self.id,
                config=config,
                view=self.build.launcher.view(directory=config.directory, files=config.files),
                nonce=frozen.nonce if frozen else secrets.token_hex(16),
                log=config.directory / "vmm.log",
                boot_s=boot_s,
                stall_s=STALL_S * scale,
                silence_s=SILENCE_S * scale,
                frozen=frozen,
                is_itself=self._is_itself,
                clock=self.build.clock,
                plan_furnishing=(
                    wires.plan_resumption if self._is_itself else wires.plan_furnishing
                ),
                furnish=wires.resume if self._is_itself else wires.furnish,
                unplug=wires.unplug,
            )
            self.failure_was_told = False
            self._running = await power.enter_async_context(
                open_running(
                    order,
                    launcher=self.build.launcher,
                    console=self.console,
                    timings=self.timings,
                    on_started=self._look_at,
                )
            )
            self._power = power.pop_all()
        self._to_restore = None  # once off, what it remembers is on its disks: it boots

    def _look_at(self, running: Running) -> None:
        self._last = running
