"""The run directory: short, private, marked as ours, and reaped after a crash by the next run."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from pytest_vmsandbox.errors import HostUnfit, TeardownRefused
from pytest_vmsandbox.host.run_directory import mark_run_directory
from pytest_vmsandbox.lease.bases import bases_to_reap, settled
from pytest_vmsandbox.lease.layout import LEDGER
from pytest_vmsandbox.lease.ledger import Ledger
from pytest_vmsandbox.lease.leftover import Leftover, leftover_of
from pytest_vmsandbox.lease.locks import hold_base_lock, hold_lock_of_the_living
from pytest_vmsandbox.lease.privilege import best_privilege
from pytest_vmsandbox.lease.reaper import end_run, reap

# AF_UNIX paths end at 108 bytes, NUL included (unix(7)); the longest name that we put below
# a base is "/r0123abcd-gw999/m999/console.sock".
BASE_LIMIT = 108 - 40


@dataclass(frozen=True, slots=True, kw_only=True)
class RunDirectory:
    """Where one worker of one run keeps its machines' sockets and logs; `id` names it.

    What is acquired is first put down in `ledger`. `leftovers` is what was found of earlier runs,
    or at the end of this one, and had to be left in place.
    """

    id: str
    path: Path
    ledger: Ledger
    leftovers: list[Leftover] = field(default_factory=list)

    def machine_directory(self, name: str) -> Path:
        """A new private directory for a machine."""
        directory = self.path / name
        directory.mkdir(mode=0o700)
        return directory


@contextmanager
def open_run_directory(base: Path, *, worker: str) -> Iterator[RunDirectory]:
    """A fresh run directory below `base`, on the way out undone by its ledger and removed.

    What dead runs of ours left below `base`, or where else our runs lie by default, is undone
    first. Raises HostUnfit when `base` is not ours alone, is too long for a socket's path, or
    can't be made; TeardownRefused, on the way out, when something had to be left, which is then in
    `leftovers` too.
    """
    base = settled(base)
    make_private(base)
    found = [leftover for each in bases_to_reap(base) for leftover in reap(each).leftovers]
    identity = f"r{secrets.token_hex(4)}"
    path = base / f"{identity}-{worker}"
    with ExitStack() as held:
        directory = RunDirectory(
            id=identity,
            path=path,
            ledger=_begin(path, worker=worker, held=held),
            leftovers=found,
        )
        owner = os.getpid()
        try:
            yield directory
        finally:
            # A process that was forked from ours may get here too; what is there is not its own.
            if os.getpid() == owner:
                _end(directory)


def _begin(path: Path, *, worker: str, held: ExitStack) -> Ledger:
    """Make the run directory, locked and marked. Whoever dies in here has acquired nothing yet."""
    with hold_base_lock(path.parent):
        path.mkdir(mode=0o700)
        # Held while we live: that is how the next run tells a dead run from a live one.
        held.enter_context(hold_lock_of_the_living(path))
        ledger = Ledger.create(path / LEDGER, worker=worker)
        held.callback(ledger.close)
        # The mark comes last: what carries it has a lock and a ledger.
        mark_run_directory(path)
    return ledger


def _end(directory: RunDirectory) -> None:
    try:
        left = end_run(directory.path, privilege=best_privilege(), report=lambda _line: None)
    except TeardownRefused as refused:
        directory.leftovers.append(leftover_of(refused))
        raise
    directory.leftovers.extend(left)
    if left:
        reasons = "; ".join(leftover.reason for leftover in left)
        raise TeardownRefused(str(directory.path), reasons, left[0].inspect)


def make_private(base: Path) -> None:
    """Make `base`, the parent of run directories, or prove that it is ours alone.

    Raises HostUnfit when it is not, can't be made, or is too long for a socket's path.
    """
    if len(os.fsencode(base)) > BASE_LIMIT:
        raise HostUnfit(
            "VMS-RUN-DIR-TOO-LONG",
            "a short run directory",
            f"{base} has more than {BASE_LIMIT} bytes: a socket below it could not be bound",
            "give a shorter one: --vm-run-dir=/tmp/vms",
        )
    try:
        base.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = base.lstat()
    except OSError as error:
        raise HostUnfit(
            "VMS-RUN-DIR-UNUSABLE",
            "a run directory",
            f"{base}: {error.strerror}",
            "give another one: --vm-run-dir=DIR",
        ) from error
    if not stat.S_ISDIR(state.st_mode) or state.st_uid != os.getuid() or state.st_mode & 0o022:
        raise HostUnfit(
            "VMS-RUN-DIR-UNUSABLE",
            "a run directory that is ours alone",
            f"{base}: owner {state.st_uid}, mode {stat.filemode(state.st_mode)}",
            f"remove it, or give another one: --vm-run-dir=DIR (ls -ld {base})",
        )
