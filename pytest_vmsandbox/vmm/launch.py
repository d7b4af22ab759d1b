"""The launcher: what starts a VMM, behind whatever walls it stands for."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pytest_vmsandbox.linux import ProcessIdentity


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchRequest:
    """A VMM to be started: its `argv`, and the `directory` where its sockets and logs lie.

    stdout and stderr of the process go to `log`, stdin is /dev/null.
    """

    argv: Sequence[str]
    directory: Path
    log: Path


class VmmProcess(Protocol):
    """A VMM that was started, known for good by its pidfd (None where there are none)."""

    pid: int
    uid: int
    pidfd: int | None
    identity: ProcessIdentity

    async def wait(self) -> int:
        """Its exit status once it has ended; negative for a signal."""

    def kill(self) -> None:
        """End it at once (SIGKILL); harmless when it has ended already."""


class Launcher(Protocol):
    """Runs a VMM; leaving the context kills and reaps it.

    A machine that is to end in good order has been shut down before that; what is left then
    is thrown away with its disks, and nothing is quicker or surer than SIGKILL.
    """

    def launch(self, request: LaunchRequest) -> AbstractAsyncContextManager[VmmProcess]:
        """Start it; the process is ours until the context is left."""
