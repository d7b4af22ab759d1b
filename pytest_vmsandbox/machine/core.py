"""The core that all verbs of a machine stand on: is it on, does it answer, is there time."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from pytest_vmsandbox.deadline import Deadline
from pytest_vmsandbox.errors import (
    Evidence,
    MachineFailed,
    OutcomeUnknown,
    RequestInvalid,
    TimedOut,
)
from pytest_vmsandbox.guest.channel import Channel
from pytest_vmsandbox.machine.build import Build, MachineFacts
from pytest_vmsandbox.machine.console import Console
from pytest_vmsandbox.machine.disks import Disks
from pytest_vmsandbox.machine.running import Running
from pytest_vmsandbox.machine.timings import Timings
from pytest_vmsandbox.network.addresses import Address

QMP_S = 20.0


class MachineCore:
    """One machine, powered on or not."""

    def __init__(self, build: Build) -> None:
        self.build = build
        self.name = build.config.name
        self.id = build.id
        self.disks = Disks(build.disks, directory=build.config.directory)
        self.timings = Timings()
        self.console = Console(log=build.config.directory / "console.log")
        # Whether a caller has been told what it died of: the faces note it.
        self.failure_was_told = False
        self._running: Running | None = None
        self._last: Running | None = None
        # What there was to look at when its directory was removed.
        self._remembered: Evidence | None = None
        self._closed = False

    @property
    def facts(self) -> MachineFacts:
        """What it is, as far as it is known: kernel and VMM version only once it ran."""
        ran = self._last
        return MachineFacts(
            accel=self.build.config.accel,
            tier=self.build.tier,
            image=self.build.image,
            image_digest=self.build.image_digest,
            kernel=ran.kernel if ran else "",
            vmm_version=ran.vmm_version if ran else "",
            lifecycle="restored" if self._is_restored else "booted",
            restore_id=ran.restore_id if ran else "",
            wires=self.build.wires.kind if self.build.wires.networks else "",
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

    @property
    def is_on(self) -> bool:
        """Whether it is powered on."""
        return self._running is not None

    @property
    def running(self) -> Running:
        """What runs; RequestInvalid when it is powered off."""
        return self._on()

    def evidence(self) -> Evidence:
        """What there is to look at, also after its end."""
        if self._remembered is not None:
            return self._remembered
        return self._last.evidence() if self._last else Evidence()

    def address(self, network: str | None = None) -> Address:
        """What it is called on that network, or its first; RequestInvalid where it is on none."""
        there = self.build.wires.addresses
        wanted = next(iter(there), None) if network is None else network
        if wanted is None or wanted not in there:
            where = "no network" if network is None else f"no network {network!r}"
            raise RequestInvalid(
                f"{self.name} is on {where}",
                f'it is on: {", ".join(there) or "none"}; network="lan"',
            )
        return there[wanted]

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

    def seconds(self, asked: float | None, usual: float) -> float:
        """The seconds that were asked for, or the usual ones, scaled to this host's speed.

        Raises RequestInvalid where they are no number from 0.
        """
        if asked is not None and not (asked >= 0 and math.isfinite(asked)):
            raise RequestInvalid(f"timeout={asked!r} must be a number of seconds, 0 or more")
        return (usual if asked is None else asked) * self.build.time_scale

    @property
    def _is_restored(self) -> bool:
        """Whether its guest, or the one that it will be powered on with, was frozen before."""
        ran = self._last
        if ran is None:
            return self.build.frozen is not None
        return bool(ran.restore_id) if ran.kernel else ran.order.frozen is not None

    def _on(self) -> Running:
        if self._running is None:
            raise RequestInvalid(f"{self.name} is powered off", "power_on() starts it")
        return self._running

    async def _channel(self, deadline: Deadline) -> Channel:
        running = self._on()
        await running.wait_answering(deadline=deadline)
        return running.channel

    def _deadline(self, asked: float | None, usual: float) -> Deadline:
        return Deadline.after(seconds=self.seconds(asked, usual))

    @asynccontextmanager
    async def _in_time(self, deadline: Deadline, awaited: str) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(deadline.timeout_s):
                yield
        except TimedOut as error:
            raise await self._explained(error) from None
        except TimeoutError:
            if not deadline.passed:
                raise  # the guest's own ETIMEDOUT
            raise await self._explained(deadline.timed_out(awaited)) from None

    async def _explained(self, error: TimedOut) -> TimedOut:
        """The same error, which also says who still answers, and what the console shows."""
        signs = [error.last_seen]
        if self._running is not None:
            signs.append(await self._running.vital_signs())
        if tail := self.console.tail(20):
            signs.append(f"console:\n{tail}")
        return TimedOut(
            f"{self.name}: {error.awaited}", error.after_s, "\n".join(filter(None, signs))
        )
