"""The run directory: short, private, marked as ours, and swept up after a crash by the next run."""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from pytest_vmsandbox.errors import HostUnfit, TeardownRefused
from pytest_vmsandbox.host.run_directory import RUN_DIRECTORY_MARKER, mark_run_directory
from pytest_vmsandbox.linux import read_mountinfo

LOCK = "lock"

# A removal begins with this new name, so that nobody finds half a run directory under its own.
DEAD = ".dead-"

NAME = re.compile(r"r[0-9a-f]{8}-.+")

# Between a run directory's mkdir and its mark lie milliseconds.
UNMARKED_LIMIT_S = 60.0

# AF_UNIX paths end at 108 bytes, NUL included (unix(7)); the longest name that we put below
# a base is "/r0123abcd-gw999/m999/console.sock".
BASE_LIMIT = 108 - 40


@dataclass(frozen=True, slots=True, kw_only=True)
class RunDirectory:
    """Where one worker of one run keeps its machines' sockets and logs; `id` names it."""

    id: str
    path: Path

    def machine_directory(self, name: str) -> Path:
        """A new private directory for a machine."""
        directory = self.path / name
        directory.mkdir(mode=0o700)
        return directory


def default_base() -> Path:
    """Where run directories go unless `--vm-run-dir` says otherwise: short, and only ours."""
    if os.getuid() == 0:
        return Path("/run/vmsandbox")
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        candidate = Path(runtime)
        if candidate.is_dir() and os.access(candidate, os.W_OK):
            return candidate / "vmsandbox"
    return Path(f"/tmp/vmsandbox-{os.getuid()}")  # noqa: S108  # owner and mode are checked below


@contextmanager
def open_run_directory(base: Path, *, worker: str) -> Iterator[RunDirectory]:
    """A fresh run directory below `base`, removed on the way out.

    What dead runs of ours left below `base` is removed first. Raises HostUnfit when `base`
    is not ours alone, is too long for a socket's path, or can't be made.
    """
    base = base.absolute()  # once, and used everywhere below
    make_private(base)
    sweep(base)
    identity = f"r{secrets.token_hex(4)}"
    path = base / f"{identity}-{worker}"
    path.mkdir(mode=0o700)
    # Held while we live and let go by the kernel however we die: that is how the next run
    # tells a dead run from a live one.
    with FileLock(path / LOCK, mode=0o600, thread_local=False):
        mark_run_directory(path)
        try:
            yield RunDirectory(id=identity, path=path)
        finally:
            remove(path)


def sweep(base: Path) -> list[Path]:
    """Remove what dead runs of ours left directly below `base`; returns what was removed.

    That is run directories whose lock nobody holds, those whose removal was interrupted, and
    those whose run died before it could mark them. Everything else stays in place. Other
    processes may do the same at the same time.
    """
    removed: list[Path] = []
    for path in sorted(base.iterdir()):
        # it lives, somebody else removed it, or it can't be proved ours
        with suppress(TeardownRefused, OSError):
            if _sweep_one(path):
                removed.append(path)
    return removed


def _sweep_one(path: Path) -> bool:
    if path.name.startswith(DEAD):
        # No lock: nobody but a remover uses it, and removers don't hurt each other.
        _require_ours(path)
        _clear(path)
        return True
    if (path / RUN_DIRECTORY_MARKER).is_file() and not path.is_symlink():
        with _lock_of_the_dead(path):
            remove(path)
        return True
    return bool(NAME.fullmatch(path.name)) and _remove_unmarked(path)


def remove(path: Path) -> None:
    """Remove a run directory: ours by owner and marker, nothing mounted below it.

    The caller holds its lock. Raises TeardownRefused, with all of it still in place, when that
    does not hold. After any other failure what is left is called `.dead-...` and is taken up by
    the next sweep.
    """
    _require_ours(path)
    if not (path / RUN_DIRECTORY_MARKER).is_file():
        raise TeardownRefused(
            str(path), f"it lacks our marker {RUN_DIRECTORY_MARKER}", f"ls -la {path}"
        )
    _require_nothing_mounted(path)
    # A run that saw the marker under the old name finds nothing there from now on.
    dead = path.with_name(DEAD + path.name)
    path.rename(dead)
    _clear(dead)


def _clear(dead: Path) -> None:
    """Remove it with all that is in it, though others may be removing it as well."""
    _require_nothing_mounted(dead)
    while dead.is_dir():
        with suppress(FileNotFoundError):  # another remover was faster: see what remains
            for entry in dead.iterdir():
                if entry.name in (RUN_DIRECTORY_MARKER, LOCK):
                    continue
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                else:
                    entry.unlink()
            # The marker goes late: `sudo_rm` removes strangers' files only below one.
            (dead / RUN_DIRECTORY_MARKER).unlink(missing_ok=True)
            (dead / LOCK).unlink(missing_ok=True)
            dead.rmdir()


def _remove_unmarked(path: Path) -> bool:
    """Remove what a run left that died between mkdir and mark: nothing in it but a lock."""
    state = _require_ours(path)
    if time.time() - state.st_mtime < UNMARKED_LIMIT_S:
        return False
    names = [entry.name for entry in path.iterdir()]
    if names == [LOCK]:
        with _lock_of_the_dead(path):
            (path / LOCK).unlink()
            path.rmdir()
    elif not names:
        path.rmdir()
    return not path.exists()


@contextmanager
def _lock_of_the_dead(path: Path) -> Iterator[None]:
    """Hold the lock that a dead run left; BlockingIOError when somebody holds it.

    Not a FileLock, which makes what is missing, the directory too: a run that ends just now
    would come back as an empty shell. Both are flock(2), so they exclude each other.
    """
    lock = os.open(path / LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(lock)


def _require_ours(path: Path) -> os.stat_result:
    state = path.lstat()
    if not stat.S_ISDIR(state.st_mode) or state.st_uid != os.getuid():
        raise TeardownRefused(str(path), "it is not a directory of ours", f"ls -ld {path}")
    return state


def _require_nothing_mounted(path: Path) -> None:
    if mounted := [entry.mount_point for entry in read_mountinfo() if entry.is_below(path)]:
        shown = ", ".join(map(str, mounted))
        raise TeardownRefused(str(path), f"still mounted: {shown}", "findmnt")


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
