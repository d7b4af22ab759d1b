"""The jail as a tool: commands of the host behind the walls of a worker."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

from pytest_vmsandbox.host.facts import Tier
from pytest_vmsandbox.host.tier import require_tier, require_walls
from pytest_vmsandbox.jail.sandbox.config import PathLike, SandboxParameters, parse_config
from pytest_vmsandbox.machine.worker import Worker


class Jail:
    """A worker's walls; `tier` says how they are built."""

    def __init__(self, worker: Worker, *, tier: str = "auto") -> None:
        self._worker = worker
        self._tier = tier

    @property
    def tier(self) -> Tier:
        """The tier that commands and machines get here; HostUnfit where there is none."""
        return require_tier(self._tier, self._worker.facts)

    def require(self) -> None:
        """Return where commands can run behind walls; HostUnfit in the tier bare."""
        require_walls(self._tier, self._worker.facts)

    def run(
        self, command: str | Sequence[PathLike], **parameters: Unpack[SandboxParameters]
    ) -> tuple[int, bytes | None, bytes | None]:
        """Run a command of this host behind walls: its exit status and its output.

        As `jail.sandbox.run_sandbox`, with its parameters, in the worker's warden: as qemu-vm in
        the tier qemu-vm, as ourselves in the others. HostUnfit in the tier bare.
        """
        config = parse_config(command, **parameters)
        work = self._worker.run_behind_walls(config, tier=self._tier)
        ended = self._worker.engine.run(work)
        return ended.exit_code, ended.out, ended.err
