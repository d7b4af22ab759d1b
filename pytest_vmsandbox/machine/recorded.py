"""The recorded launcher: a VMM stands in the run's ledger before it is started."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from pytest_vmsandbox.host.facts import Tier
from pytest_vmsandbox.lease.entries import ProcessEntry, Role
from pytest_vmsandbox.lease.ledger import Ledger
from pytest_vmsandbox.vmm.launch import Handed, Launcher, LaunchRequest, VmmProcess, VmmView


class RecordedLauncher:
    """Another launcher, with a ledger in which each VMM stands while it lives."""

    def __init__(self, launcher: Launcher, *, ledger: Ledger, tier: Tier) -> None:
        self._launcher = launcher
        self._ledger = ledger
        self._tier = tier

    def view(self, *, directory: Path, files: Sequence[Handed]) -> VmmView:
        """How the other launcher's VMM would see these."""
        return self._launcher.view(directory=directory, files=files)

    @asynccontextmanager
    async def launch(self, request: LaunchRequest) -> AsyncIterator[VmmProcess]:
        """Start it; it is recorded before, and struck out after its end."""
        entry = ProcessEntry(
            role=Role.VMM, tier=self._tier, machine_id=request.id, machine_name=request.name
        )
        with self._ledger.recorded(entry) as number:
            async with self._launcher.launch(request) as process:
                if process.identity.pid:  # 0: it had ended before anybody could look
                    self._ledger.identify(number, process.identity)
                yield process
