"""The run directory: short, private, marked as ours, and swept up after a crash by the next run."""

from __future__ import annotations

import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from pytest_vmsandbox.errors import HostUnfit, TeardownRefused
from pytest_vmsandbox.host.run_directory import RUN_DIRECTORY_MARKER, mark_run_directory
from pytest_vmsandbox.linux import read_mountinfo

LOCK = "lock"

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
    """Remove the run directories below `base` whose run is certainly dead; returns them."""
    removed: list[Path] = []
    for path in sorted(base.iterdir()):
        if not (path / RUN_DIRECTORY_MARKER).is_file() or path.is_symlink():
            continue
        try:
            with FileLock(path / LOCK, timeout=0):
                remove(path)
        except (Timeout, TeardownRefused, OSError):
            continue  # it lives, or it can't be proved ours: left in place
        removed.append(path)
    return removed


def remove(path: Path) -> None:
    """Remove a run directory: ours by owner and marker, nothing mounted below it.

    Raises TeardownRefused, with all of it still in place, when that does not hold.
    """
    state = path.lstat()
    if not stat.S_ISDIR(state.st_mode) or state.st_uid != os.getuid():
        raise TeardownRefused(str(path), "it is not a directory of ours", f"ls -ld {path}")
    if not (path / RUN_DIRECTORY_MARKER).is_file():
        raise TeardownRefused(
            str(path), f"it lacks our marker {RUN_DIRECTORY_MARKER}", f"ls -la {path}"
        )
    if mounted := [entry.mount_point for entry in read_mountinfo() if entry.is_below(path)]:
        shown = ", ".join(map(str, mounted))
        raise TeardownRefused(str(path), f"still mounted: {shown}", "findmnt")
    # The marker goes last, so that an interrupted removal is taken up by the next sweep.
    for entry in path.iterdir():
        if entry.name in (RUN_DIRECTORY_MARKER, LOCK):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    (path / RUN_DIRECTORY_MARKER).unlink()
    (path / LOCK).unlink(missing_ok=True)
    path.rmdir()


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
