"""Undoing what a ledger holds: safe to do twice, and only to what is provably the thing meant."""

from __future__ import annotations

import errno
import os
import shlex
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pytest_vmsandbox.deadline import Deadline
from pytest_vmsandbox.errors import TeardownRefused
from pytest_vmsandbox.lease.entries import CgroupEntry, Entry
from pytest_vmsandbox.lease.ledger import Account, own_pid_namespace
from pytest_vmsandbox.lease.leftover import Leftover, look_at
from pytest_vmsandbox.lease.privilege import Privilege
from pytest_vmsandbox.linux import (
    ProcessIdentity,
    pidfd_send_signal,
    pidfd_wait_exit,
    read_boot_id,
    read_mountinfo,
)

# For all of a run together. A warden ends when its owner does, a killed process and a control
# group that it leaves are a matter of milliseconds.
_ENDING_S = 5.0
_POLL_S = 0.01

_CGROUP_FILE_SYSTEMS = frozenset({"cgroup", "cgroup2"})

Report = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Circumstances:
    """What an undo depends on beside its entry."""

    run: Path
    same_boot: bool
    same_pid_namespace: bool
    privilege: Privilege
    deadline: Deadline


def undo_entries(
    account: Account, *, run: Path, privilege: Privilege, report: Report
) -> list[Leftover]:
    """Undo all open entries of the run at `run`, the last one first; gives back what was refused.

    A refusal does not keep the others from being undone. `report` gets a line for each step.
    After a reboot there is nothing left of processes and control groups.
    """
    if not account.entries:
        return []
    assert account.head is not None  # there are no entries before the head
    around = _Circumstances(
        run=run,
        same_boot=account.head.owner.boot_id == read_boot_id(),
        same_pid_namespace=account.head.pid_namespace == own_pid_namespace(),
        privilege=privilege,
        deadline=Deadline.after(seconds=_ENDING_S),
    )
    leftovers = []
    for entry in reversed(account.entries.values()):
        try:
            report(f"{entry}: {_undo(entry, around)}")
        except TeardownRefused as refused:
            leftovers.append(
                Leftover(path=run, reason=f"{entry}: {refused.because}", inspect=refused.inspect)
            )
    return leftovers


def _undo(entry: Entry, around: _Circumstances) -> str:
    """Undo one entry; says what was done."""
    if not around.same_boot:
        return "gone with the host's last boot"
    if isinstance(entry, CgroupEntry):
        return _remove_cgroup(entry.path, around)
    if not around.same_pid_namespace:
        # Its pid is a number of another container: here it is somebody else's, or nobody's.
        raise TeardownRefused(
            str(around.run), "it was started in another pid namespace", "lsns --type pid"
        )
    if entry.identity is None:
        return _require_never_started(around)
    return _end(entry.identity, around)


def _end(identity: ProcessIdentity, around: _Circumstances) -> str:
    if identity.pid in (1, os.getpid()):
        raise _still_there(identity.pid, "it is init, or ourselves")
    try:
        pidfd = identity.open_pidfd()
    except ProcessLookupError:
        if identity.is_alive():  # where /proc hides other users' processes
            raise _still_there(identity.pid, "it can't be told from another process") from None
        return "ended already"
    with pidfd:
        done, refusal = "killed", "it does not end"
        try:
            pidfd_send_signal(pidfd, signal.SIGKILL)
        except ProcessLookupError:
            return "ended already"
        except PermissionError as error:  # another user's: it ends with its owner, or stays
            done, refusal = "ended", f"we may not kill it ({error.strerror})"
        if not pidfd_wait_exit(pidfd, deadline=around.deadline):
            raise _still_there(identity.pid, refusal)
    return done


def _require_never_started(around: _Circumstances) -> str:
    """Return once no process mentions the run, whose name nobody else has, on its command line.

    What was started and not identified before the crash ends with its owner. It is only looked
    for: to name the run is no proof of being ours to kill.
    """
    while pids := _mentioning(os.fsencode(around.run.name)):
        if around.deadline.passed:
            raise _still_there(min(pids), "its command line names the run")
        time.sleep(_POLL_S)
    return "not there"


def _mentioning(word: bytes) -> list[int]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes()
        except OSError:  # it ended, or is hidden from us
            continue
        if word in words and int(process.name) != os.getpid():
            found.append(int(process.name))
    return found


def _still_there(pid: int, because: str) -> TeardownRefused:
    return TeardownRefused(f"/proc/{pid}", because, f"ps -fp {pid}")


def _remove_cgroup(path: Path, around: _Circumstances) -> str:
    real = Path(os.path.realpath(path))  # /sys/fs/cgroup/cpu may be a link to cpu,cpuacct
    if not real.exists():
        return "gone already"
    if not any(
        mount.fs_type in _CGROUP_FILE_SYSTEMS and mount.mount_point in map(str, real.parents)
        for mount in read_mountinfo()
    ):
        raise TeardownRefused(str(path), "it is in no cgroup file system", look_at(path))
    while True:
        try:
            around.privilege.remove_cgroup(real)
        except FileNotFoundError:
            return "gone already"
        except OSError as error:
            # Busy for a moment after its last process has ended.
            if error.errno == errno.EBUSY and not around.deadline.passed:
                time.sleep(_POLL_S)
                continue
            inspect = f"cat -- {shlex.quote(str(real / 'cgroup.procs'))}"
            raise TeardownRefused(str(path), error.strerror or str(error), inspect) from error
        return "removed"
