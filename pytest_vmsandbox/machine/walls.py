"""The walls of a worker: a warden for each tier that its machines run in, started on first need."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress

from pytest_vmsandbox.host.facts import Tier
from pytest_vmsandbox.lease.entries import ProcessEntry, Role
from pytest_vmsandbox.lease.run_directory import RunDirectory
from pytest_vmsandbox.linux import ProcessIdentity
from pytest_vmsandbox.warden.client import Warden, open_warden


class Walls:
    """Wardens by tier; `close` ends them with all that they launched. Not for the tier bare."""

    def __init__(self) -> None:
        self._wardens: dict[Tier, Warden] = {}
        self._held = AsyncExitStack()
        self._starting = asyncio.Lock()

    async def warden(self, tier: Tier, *, directory: RunDirectory) -> Warden:
        """The warden of that tier; HostUnfit where it does not come up."""
        async with self._starting:
            if tier not in self._wardens:
                self._wardens[tier] = await self._held.enter_async_context(
                    _recorded_warden(tier, directory=directory)
                )
            return self._wardens[tier]

    async def close(self) -> None:
        """End them all."""
        self._wardens.clear()
        await self._held.aclose()


@asynccontextmanager
async def _recorded_warden(tier: Tier, *, directory: RunDirectory) -> AsyncIterator[Warden]:
    ledger = directory.ledger
    with ledger.recorded(ProcessEntry(role=Role.WARDEN, tier=tier)) as number:
        async with open_warden(tier, log=directory.path / f"warden-{tier}.log") as warden:
            with suppress(ProcessLookupError):  # it is gone again; whoever asks next is told
                ledger.identify(number, ProcessIdentity.of(warden.pid))
            yield warden
