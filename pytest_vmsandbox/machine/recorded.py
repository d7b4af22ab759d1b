"""The recorded launcher: what a VMM and its warden acquire stands in the run's ledger first."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

from pytest_vmsandbox.host.facts import Tier
from pytest_vmsandbox.lease.entries import CGROUP_PREFIX, CgroupEntry, ProcessEntry, Role
from pytest_vmsandbox.lease.ledger import Ledger
from pytest_vmsandbox.vmm.launch import Handed, Launcher, LaunchRequest, VmmProcess, VmmView


class RecordedLauncher:
    """Another launcher, with a ledger: the VMM and its control groups are recorded.

    `groups` are the directories in which that launcher makes a control group for each VMM.
    """

    def __init__(
        self, launcher: Launcher, *, ledger: Ledger, tier: Tier, groups: Sequence[str] = ()
    ) -> None:
        self._launcher = launcher
        self._ledger = ledger
        self._tier = tier
        self._groups = groups

    def view(self, *, directory: Path, files: Sequence[Handed]) -> VmmView:
        """How the other launcher's VMM would see these."""
        return self._launcher.view(directory=directory, files=files)

    @asynccontextmanager
    async def launch(self, request: LaunchRequest) -> AsyncIterator[VmmProcess]:
        """Start it; what it acquires is on disk before, and struck out after its end."""
        entry = ProcessEntry(
            role=Role.VMM, tier=self._tier, machine_id=request.id, machine_name=request.name
        )
        with ExitStack() as recorded:
            for parent in self._groups:
                path = Path(parent, f"{CGROUP_PREFIX}{request.id}")
                recorded.enter_context(self._ledger.recorded(CgroupEntry(path=path)))
            number = recorded.enter_context(self._ledger.recorded(entry))
            async with self._launcher.launch(request) as process:
                if process.identity.pid:  # 0: it had ended before anybody could look
                    self._ledger.identify(number, process.identity)
                yield process
