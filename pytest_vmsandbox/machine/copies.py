"""Copies of a machine: snapshots that it goes back to, and twins that go on beside it."""

from __future__ import annotations

import threading
from contextlib import closing
from typing import TYPE_CHECKING, Self

from pytest_vmsandbox.deadline import Deadline
from pytest_vmsandbox.errors import RequestInvalid
from pytest_vmsandbox.jail.off_loop import to_its_end
from pytest_vmsandbox.machine.build import Build
from pytest_vmsandbox.machine.capture import capture, is_as_it_was_sent
from pytest_vmsandbox.machine.frozen import Frozen
from pytest_vmsandbox.machine.power import BOOT_S, Power

if TYPE_CHECKING:
    from pytest_vmsandbox.machine.controller import MachineController

# What taking a machine in may take unless its caller says otherwise, in seconds, before scaling.
CAPTURE_S = 60.0


class Snapshot:
    """A machine as it was at one instant: `snapshot()` gives it, `restore()` takes it.

    It holds as much of the host's memory as the guest had in use, and of the run directory as its
    disks had taken, until it is closed or its machine ends. Leaving it as a context closes it.
    """

    def __init__(self, machine: str, frozen: Frozen) -> None:
        self._machine = machine
        self._frozen: Frozen | None = frozen
        self._closing = threading.Lock()  # by whatever thread, while the engine reads it

    def copy(self) -> Frozen:
        """What it holds, for the caller to close; RequestInvalid once it is closed."""
        with self._closing:
            if self._frozen is None:
                raise RequestInvalid(f"{self!r} holds nothing any more")
            return self._frozen.copy()

    @property
    def closed(self) -> bool:
        """Whether its memory has been given back."""
        return self._frozen is None

    def close(self) -> None:
        """Give its memory back; harmless when that has been done."""
        with self._closing:
            frozen, self._frozen = self._frozen, None
            if frozen is not None:
                frozen.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Snapshot of {self._machine}{', closed' if self.closed else ''}>"


class Copies(Power):
    """The verbs that make more of a machine than one."""

    def __init__(self, build: Build) -> None:
        super().__init__(build)
        self._snapshots: list[Snapshot] = []
        # A paused machine does not change, and QEMU can send it only once.
        self._as_paused: Frozen | None = None

    async def snapshot(self, *, timeout: float | None = None) -> Snapshot:
        """The machine as it is now, memory, processes and all: `restore` goes back to it.

        The guest stands still meanwhile (tenths of a second where it has much memory in use), and
        goes on; one that is paused stays so. The snapshot ends with the machine, or by `close()`.
        Raises RequestInvalid when it is powered off, MachineFailed when it has failed, TimedOut
        after `timeout` seconds (60), OSError where the host has no room; the machine goes on then
        as if nothing had been.
        """
        snapshot = Snapshot(self.name, await self._captured(self._deadline(timeout, CAPTURE_S)))
        self._snapshots = [one for one in self._snapshots if not one.closed]
        self._snapshots.append(snapshot)
        return snapshot

    async def restore(self, snapshot: Snapshot, *, timeout: float | None = None) -> None:
        """Make the machine what it was when `snapshot` was taken, and let it run.

        Whatever became of it since is gone: it may have failed, or be powered off. Open streams of
        `popen` end with ChannelLost; processes of then run on, but nobody hears them. Its names
        and machine-id are those of then; the clock shows the present, and the kernel's random
        numbers are new. Raises RequestInvalid for a snapshot that is closed or another machine's,
        BootFailed when it does not answer within `timeout` seconds (60): it is powered off then,
        and can be restored again.
        """
        if snapshot not in self._snapshots:
            raise RequestInvalid(
                f"{self.name} can't be restored from {snapshot!r}",
                "it takes one of its own, while it is there",
            )
        async with self._changing:
            with closing(snapshot.copy()) as frozen:
                await self.power_cut()
                await self._power_on_from(frozen, timeout=timeout)

    async def fork(self, count: int, *, timeout: float | None = None) -> list[MachineController]:
        """Machines like this one as it is now: memory, processes and all; it goes on itself.

        Each has a name (`NAME-fork-1` and so on), an id, a machine-id and random numbers of its
        own, and a clock that shows the present; they share memory until they write to it, and end
        when this one does, or with the test that made them of a machine that tests share. All run,
        also where this one is paused; what `popen` had started here runs on in them, but nobody
        hears it. Raises RequestInvalid when it is powered off or
        `count` is no number from 1, MachineFailed when it or one of them fails, OSError where the
        host has no room, TimedOut after `timeout` seconds (60); there are no new machines then, and
        this one goes on.
        """
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise RequestInvalid(f"fork({count!r}): a whole number from 1 is needed")
        self._require_copyable()
        nursery = self.build.nursery
        if nursery is None:
            raise RequestInvalid(f"{self.name} can't be forked: nobody would end its twins")
        deadline = self._deadline(timeout, BOOT_S)
        with closing(await self._captured(deadline)) as frozen:
            twins = await nursery.twins(self.build, frozen, count=count)
            try:
                async with self._in_time(deadline, "the answers of its twins"):
                    await nursery.boot(twins)
            except BaseException:
                await to_its_end(nursery.end(twins))
                raise
        return twins

    async def resume(self) -> None:
        """Let the guest's processors go on."""
        await super().resume()
        self._forget_pause()

    async def power_cut(self) -> None:
        """Switch it off at once, as if the mains had failed; disks keep what was written.

        A boot that is under way is given up.
        """
        await super().power_cut()
        self._forget_pause()

    async def close(self) -> None:
        """End it for good, and its snapshots with it. Safe to repeat."""
        try:
            await super().close()
        finally:
            # Last: one that was being taken may have become one of them.
            for snapshot in self._snapshots:
                snapshot.close()

    def _require_copyable(self) -> None:
        if self.build.config.freezable:
            raise RequestInvalid(
                "a machine that is being prepared as a template can't be copied",
                "copy a machine out of the template, in the test",
            )

    async def _captured(self, deadline: Deadline) -> Frozen:
        self._require_copyable()
        running = self._on()
        async with self._in_time(deadline, "an instant to take it in"):
            await running.wait_answering(deadline=deadline)
            async with self._changing:
                if running is not self._running:
                    raise RequestInvalid(f"{self.name} was powered off meanwhile")
                if self._as_paused is not None and await is_as_it_was_sent(running, deadline):
                    return self._as_paused.copy()
                self._forget_pause()
                with self.timings.measuring("capture_s"):
                    frozen = await capture(
                        running, self.disks, deadline=deadline, time_scale=self.build.time_scale
                    )
                try:
                    if await is_as_it_was_sent(running, deadline):
                        self._as_paused = frozen.copy()
                except BaseException:
                    frozen.close()
                    raise
                return frozen

    def _forget_pause(self) -> None:
        if self._as_paused is not None:
            self._as_paused.close()
            self._as_paused = None
