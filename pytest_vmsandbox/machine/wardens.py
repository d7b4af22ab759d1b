"""The wardens of a worker: one for each tier that its machines run in, started on first need."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress

from pytest_vmsandbox.errors import HostUnfit
from pytest_vmsandbox.host.facts import Tier
from pytest_vmsandbox.lease.entries import ProcessEntry, Role
from pytest_vmsandbox.lease.run_directory import RunDirectory
from pytest_vmsandbox.linux import ProcessIdentity
from pytest_vmsandbox.warden.client import Warden, open_warden


class Wardens:
    """Wardens by tier; `close` ends them with all that they launched. Not for the tier bare.

    One that died by itself is replaced when it is next asked for; `lost` tells of each.
    """

    def __init__(self) -> None:
        self.lost: list[str] = []
        self._held: dict[Tier, tuple[Warden, AsyncExitStack]] = {}
        self._starting = asyncio.Lock()

    async def warden(self, tier: Tier, *, directory: RunDirectory) -> Warden:
        """A warden of that tier that lives; HostUnfit where none comes up."""
        async with self._starting:
            if tier in self._held and self._held[tier][0].over:
                await self._drop(tier)
            if tier not in self._held:
                stack = AsyncExitStack()
                warden = await stack.enter_async_context(
                    _recorded_warden(tier, directory=directory)
                )
                self._held[tier] = warden, stack
            return self._held[tier][0]

    async def close(self) -> None:
        """End them all; each one is tried."""
        held = [stack.aclose() for _, stack in self._held.values()]
        self._held.clear()
        results = await asyncio.gather(*held, return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result

    async def _drop(self, tier: Tier) -> None:
        warden, stack = self._held.pop(tier)
        words = warden.last_words or "it said nothing"
        self.lost.append(f"the warden of tier {tier} died and was replaced: {words}")
        await stack.aclose()


def accel_behind_walls(accel: str, warden: Warden, *, may_be_emulated: bool) -> str:
    """The acceleration for a VMM that runs as the warden's user, who may have less than we."""
    if accel != "kvm" or warden.greeting.kvm:
        return accel
    if may_be_emulated:
        return "tcg"
    raise HostUnfit(
        "VMS-KVM-DENIED",
        "KVM for the VMM's own user",
        f"uid {warden.greeting.uid}, as which VMMs run in this tier, may not open /dev/kvm",
        "vmsandbox setup (a udev rule), or --vm-tier=bare",
    )


@asynccontextmanager
async def _recorded_warden(tier: Tier, *, directory: RunDirectory) -> AsyncIterator[Warden]:
    ledger = directory.ledger
    with ledger.recorded(ProcessEntry(role=Role.WARDEN, tier=tier)) as number:
        async with open_warden(tier, log=directory.path / f"warden-{tier}.log") as warden:
            with suppress(ProcessLookupError):  # it is gone again; whoever asks next is told
                ledger.identify(number, ProcessIdentity.of(warden.pid))
            yield warden
