"""The reaper: undoes what provably dead runs left below a base, and names what is in doubt.

A run is dead when nobody holds its lock and its owner, by boot, pid and start time, is not among
the living. It lives when its lock is held by its owner. Everything else is left in place. Several
reapers, and runs that begin and end, may be at the same base at the same time.
"""

from __future__ import annotations

import os
import shlex
import stat
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from pytest_vmsandbox.deadline import Deadline
from pytest_vmsandbox.errors import TeardownRefused, TimedOut
from pytest_vmsandbox.host.run_directory import RUN_DIRECTORY_MARKER
from pytest_vmsandbox.lease.layout import DEAD, LEDGER, LOCK, NAME
from pytest_vmsandbox.lease.ledger import Account, own_pid_namespace, read_ledger
from pytest_vmsandbox.lease.leftover import Leftover, leftover_of, look_at
from pytest_vmsandbox.lease.locks import hold_base_lock, hold_lock_of_the_dead, named_holder
from pytest_vmsandbox.lease.privilege import Privilege, best_privilege
from pytest_vmsandbox.lease.teardown import require_nothing_mounted, tear_down
from pytest_vmsandbox.lease.undo import Report, undo_entries

# Who takes a lock has written its name into it by then; who has just died has let go of it.
_TAKING_S = 0.2
_POLL_S = 0.01


class Standing(StrEnum):
    """What is known of a run."""

    ALIVE = "alive"
    DEAD = "dead"
    DOUBTFUL = "doubtful"


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run directory as it was found; `reason` and `inspect` say why it is in doubt."""

    path: Path
    standing: Standing
    account: Account | None = None
    reason: str = ""
    inspect: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reaped:
    """What a reaper did: the run directories that are gone, and what it left in place."""

    removed: list[Path] = field(default_factory=list)
    leftovers: list[Leftover] = field(default_factory=list)


def survey(base: Path) -> list[Run]:
    """The runs below `base`, by name, or the base itself where it is in doubt; changes nothing."""
    runs: list[Run] = []
    try:
        paths = _candidates(base)
    except TeardownRefused as refused:
        return [_doubtful(base, refused.because, refused.inspect)]
    for path in paths:
        try:
            runs.append(_look(path))
        except FileNotFoundError:  # it ended just now
            continue
        except TeardownRefused as refused:
            runs.append(_doubtful(path, refused.because, refused.inspect))
        except OSError as error:
            runs.append(_doubtful(path, str(error), look_at(path, content=True)))
    return runs


def reap(base: Path, *, privilege: Privilege | None = None, report: Report | None = None) -> Reaped:
    """Undo what dead runs left below `base`; a line for each step goes to `report`.

    What is in doubt, or can't be undone, is left in place and listed. Raises nothing for it.
    """
    done = Reaped()
    tell = report or (lambda _line: None)
    acting = privilege or best_privilege()
    try:
        paths = _candidates(base)
    except TeardownRefused as refused:
        done.leftovers.append(leftover_of(refused))
        return done
    for path in paths:
        try:
            refused_undos = _reap_one(path, privilege=acting, report=tell)
        except (BlockingIOError, FileNotFoundError):  # it lives; somebody else was faster
            continue
        except TeardownRefused as refused:
            done.leftovers.append(leftover_of(refused))
        except (OSError, TimedOut) as error:
            done.leftovers.append(
                Leftover(path=path, reason=str(error), inspect=look_at(path, content=True))
            )
        else:
            done.leftovers.extend(refused_undos)
            if not refused_undos:
                tell(f"{path}: removed")
                done.removed.append(path)
    return done


def end_run(path: Path, *, privilege: Privilege, report: Report) -> list[Leftover]:
    """Undo what the ledger of the run directory `path` holds, and remove it; we hold its lock.

    What could not be undone is given back, and the directory is then still there. Raises
    TeardownRefused where its ledger can't be relied on, or it can't be removed.
    """
    leftovers = undo_entries(_reliable_account(path), run=path, privilege=privilege, report=report)
    if not leftovers:
        tear_down(path, privilege=privilege)
    return leftovers


def _reap_one(path: Path, *, privilege: Privilege, report: Report) -> list[Leftover]:
    _require_ours(path)
    if not _is_marked(path):
        _remove_unmarked(path)
        return []
    if path.name.startswith(DEAD):
        _finish_removal(path, privilege=privilege)
        return []
    with _locked(path):
        _require_owner_dead(path, _reliable_account(path))
        return end_run(path, privilege=privilege, report=report)


def _look(path: Path) -> Run:
    _require_ours(path)
    if path.name.startswith(DEAD):
        return Run(path=path, standing=Standing.DEAD, reason="its removal has begun")
    if not _is_marked(path):
        with hold_base_lock(path.parent), suppress(BlockingIOError):
            _require_half_made(path)
            reason = "its making, or its removal, was interrupted"
            return Run(path=path, standing=Standing.DEAD, reason=reason)
    try:
        with _locked(path):
            account = _reliable_account(path)
            _require_owner_dead(path, account)
            return Run(path=path, standing=Standing.DEAD, account=account)
    except BlockingIOError:
        return Run(path=path, standing=Standing.ALIVE, account=_reliable_account(path))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of a marked run directory.

    Raises BlockingIOError where its owner or another reaper holds it, FileNotFoundError where the
    run has just ended, TeardownRefused where its lock is missing, or held although its owner ended.
    """
    deadline = Deadline.after(seconds=_TAKING_S)
    with ExitStack() as held:
        while True:
            try:
                held.enter_context(hold_lock_of_the_dead(path))
                break
            except BlockingIOError:
                _require_known_holder(path, deadline=deadline)
                time.sleep(_POLL_S)
            except FileNotFoundError:
                if _is_marked(path):  # it is still there, so it did not just end
                    raise TeardownRefused(
                        str(path), "its lock is missing", look_at(path, content=True)
                    ) from None
                raise
        yield


def _require_known_holder(path: Path, *, deadline: Deadline) -> None:
    """Raise BlockingIOError where whoever holds its lock is its owner, or a reaper.

    TeardownRefused at the deadline when it is neither: a process that was forked from the owner,
    say, which has the lock from it. Returns before, for a lock that is let go, or was just taken.
    """
    head = _reliable_account(path).head
    assert head is not None  # a reliable ledger has one
    holder = named_holder(path)
    # The pids of another namespace say nothing here.
    if (
        head.owner.is_alive()
        or head.pid_namespace != own_pid_namespace()
        or (holder and holder.is_alive())
    ):
        raise BlockingIOError(f"{path} is in use")
    if deadline.passed:
        raise TeardownRefused(
            str(path),
            f"its owner, pid {head.owner.pid}, is gone, but somebody still holds its lock",
            f"fuser -v -- {shlex.quote(str(path / LOCK))}",
        )


def _finish_removal(path: Path, *, privilege: Privilege) -> None:
    # No lock: nobody but a remover uses it, and removers don't hurt each other.
    try:
        tear_down(path, privilege=privilege)
    except TeardownRefused:
        if _is_marked(path):
            raise
        _remove_unmarked(path)  # another one has just taken the marker, its last step but one


def _candidates(base: Path) -> list[Path]:
    """What is named like a run directory or carries our marker, in a base that is ours alone."""
    try:
        seen = base.lstat()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise TeardownRefused(str(base), str(error.strerror), look_at(base)) from None
    others_write = seen.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if not stat.S_ISDIR(seen.st_mode) or seen.st_uid != os.geteuid() or others_write:
        raise TeardownRefused(str(base), "it is not a directory of ours alone", look_at(base))
    try:
        return sorted(
            path
            for path in base.iterdir()
            if path.name.startswith(DEAD)
            or NAME.fullmatch(path.name)
            or (not path.is_symlink() and _is_marked(path))
        )
    except FileNotFoundError:  # it went just now
        return []
    except OSError as error:
        raise TeardownRefused(str(base), str(error.strerror), look_at(base)) from None


def _is_marked(path: Path) -> bool:
    try:
        return stat.S_ISREG((path / RUN_DIRECTORY_MARKER).lstat().st_mode)
    except OSError:
        return False


def _require_ours(path: Path) -> None:
    seen = path.lstat()
    if not stat.S_ISDIR(seen.st_mode) or seen.st_uid != os.geteuid():
        raise TeardownRefused(str(path), "it is not a directory of ours", look_at(path))


def _reliable_account(path: Path) -> Account:
    """What its ledger says; TeardownRefused where there is none, or it is damaged."""
    try:
        account = read_ledger(path / LEDGER)
    except OSError as error:
        path.lstat()  # FileNotFoundError: the whole directory went
        raise TeardownRefused(
            str(path), f"its ledger: {error.strerror}", look_at(path, content=True)
        ) from None
    if account.damage:
        raise TeardownRefused(
            str(path),
            f"its ledger is damaged: {account.damage}",
            f"cat -v -- {shlex.quote(str(path / LEDGER))}",
        )
    return account


def _require_owner_dead(path: Path, account: Account) -> None:
    if account.head and account.head.owner.is_alive():
        pid = account.head.owner.pid
        raise TeardownRefused(
            str(path), f"nobody holds its lock, but its owner, pid {pid}, lives", f"ps -fp {pid}"
        )


def _remove_unmarked(path: Path) -> None:
    """Remove what died between its mkdir and its mark, or between that and its rmdir."""
    with hold_base_lock(path.parent):  # nobody is making one now
        _require_half_made(path)
        require_nothing_mounted(path)  # it would be somebody else's file that we unlink
        for name in (LEDGER, LOCK):
            (path / name).unlink(missing_ok=True)
        path.rmdir()


def _require_half_made(path: Path) -> None:
    """Raise BlockingIOError when it is marked by now; TeardownRefused when it is no run directory.

    The base's lock is held: nobody is making one.
    """
    if _is_marked(path):
        raise BlockingIOError(f"{path} is in use")
    if {entry.name for entry in path.iterdir()} - {LOCK, LEDGER}:
        raise TeardownRefused(
            str(path),
            f"it is named like a run directory and lacks our marker {RUN_DIRECTORY_MARKER}",
            look_at(path, content=True),
        )


def _doubtful(path: Path, reason: str, inspect: str) -> Run:
    return Run(path=path, standing=Standing.DOUBTFUL, reason=reason, inspect=inspect)
