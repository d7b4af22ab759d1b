"""Mount points that were missing: made below a directory of the host, and removed afterwards.

Several sandboxes, of this process, of others, and of other users, may need the same one at the
same time. To take away a directory on which somebody has mounted something takes the mount away
as well, so that everybody holds a shared lock (flock(2)) on the mount points in use, and only
who gets it exclusively may remove one. That one was made by us, and for this, is noted in a
register before anybody else can use it; whoever uses it last removes it, and what a killed
process left is taken up by the next one that needs it, or by the next run.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pytest_vmsandbox.deadline import Deadline
from pytest_vmsandbox.errors import HostUnfit, RequestInvalid, TeardownRefused
from pytest_vmsandbox.lease.leftover import Leftover, leftover_of, look_at
from pytest_vmsandbox.lease.locks import hold_directory_lock
from pytest_vmsandbox.lease.run_directory import make_private
from pytest_vmsandbox.linux import OwnedFd
from pytest_vmsandbox.linux.openat2 import ResolveFlags, openat2

REGISTER = "mount-points"

# Under its lock some directories are made, or removed.
_REGISTER_S = 30.0

# A symbolic link is followed as it is from inside, one of /proc never.
INSIDE = ResolveFlags.RESOLVE_IN_ROOT | ResolveFlags.RESOLVE_NO_MAGICLINKS


@dataclass(frozen=True, slots=True, kw_only=True)
class MountPoint:
    """A place for a mount: `path`, as seen from inside the directory `root` of the host."""

    root: str
    path: str
    directory: bool


@contextmanager
def open_mount_points(points: Iterable[MountPoint], *, base: Path) -> Iterator[None]:
    """See that each mount point is there; what had to be made is gone afterwards.

    A way is followed as from inside its root: neither a symbolic link nor `..` leads outside.
    What was made is removed only while it is still the same, and empty. RequestInvalid, with
    nothing left, for one that can't be made, or that is a file where a directory must be;
    TeardownRefused for one that can't be removed: all others are. TimedOut where somebody stays
    at the register: what was made is then left to whoever comes next. HostUnfit where `base`,
    the base of run directories in which the register lies, is not ours alone.
    """
    wanted = tuple(points)
    if not wanted:
        yield
        return
    held: list[_Held] = []
    register = _Register(base)
    try:
        with register.locked():
            for point in wanted:
                _hold(point, register=register, held=held)
        yield
    finally:
        _let_go(held, register=register)


def remove_abandoned_mount_points(*, base: Path) -> list[Leftover]:
    """Remove what killed processes made and nobody uses, as they would have done themselves.

    Gives back what can't be removed, or `base` itself where its register can't be read, is not
    ours alone, or is busy; raises nothing for it. What has been moved away is left where it is.
    """
    try:
        if not (base / REGISTER).is_dir():
            return []
        register = _Register(base)
        with register.locked():
            return _remove_abandoned(register)
    except HostUnfit as error:
        reason = f"its mount points: {error.need} is needed: {error.evidence}"
    except OSError as error:  # TimedOut is one
        reason = f"its mount points: {error}"
    return [Leftover(path=base, reason=reason, inspect=look_at(base))]


def _remove_abandoned(register: _Register) -> list[Leftover]:
    """The same, with the register locked."""
    held: list[_Held] = []
    leftovers = []
    for path in register.paths():
        with suppress(OSError), ExitStack() as undo:
            flags = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
            above = undo.enter_context(OwnedFd(os.open(path.parent, flags | os.O_DIRECTORY)))
            found = undo.enter_context(OwnedFd(os.open(path.name, flags, dir_fd=above)))
            if register.has(os.fstat(found)):
                _keep(found, above, path.name, register=register, held=held)
    for one in reversed(held):
        try:
            one.let_go()
        except TeardownRefused as refused:
            leftovers.append(leftover_of(refused))
    return leftovers


def _let_go(held: Iterable[_Held], *, register: _Register) -> None:
    """Remove what nobody else uses, the last one first, and let go of all."""
    with ExitStack() as undo:
        for one in held:
            undo.callback(one.close)
        with register.locked(), ExitStack() as removing:
            for one in held:
                removing.callback(one.let_go)


class _Register:
    """Which mount points were made by us: a file for each, named for its device and inode."""

    def __init__(self, base: Path) -> None:
        make_private(base)
        self._directory = base / REGISTER
        self._directory.mkdir(mode=0o700, exist_ok=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Alone among the processes of this user; not held while a command runs.

        TimedOut where another one stays at it.
        """
        deadline = Deadline.after(seconds=_REGISTER_S)
        with hold_directory_lock(self._directory, deadline=deadline):
            yield

    def note(self, made: OwnedFd) -> None:
        seen = os.fstat(made)
        path = os.fsencode(os.readlink(f"/proc/self/fd/{made}"))  # noqa: PTH115
        self._file(seen).write_bytes(b"%d\n%s" % (seen.st_mtime_ns, path))

    def paths(self) -> list[Path]:
        """Where they were made, what lies above others first."""
        notes = [file.read_bytes().partition(b"\n") for file in self._directory.iterdir()]
        return sorted(
            Path(os.fsdecode(path))
            for _, _, path in notes
            if path.startswith(b"/") and b"\0" not in path
        )

    def forget(self, made: os.stat_result) -> None:
        self._file(made).unlink(missing_ok=True)

    def has(self, seen: os.stat_result) -> bool:
        return self._file(seen).exists()

    def drop_unless_unchanged(self, seen: os.stat_result) -> None:
        """Forget what a killed process noted, if this may be another file with its number."""
        with suppress(FileNotFoundError):
            noted, _, _ = self._file(seen).read_bytes().partition(b"\n")
            if noted != b"%d" % seen.st_mtime_ns:
                self.forget(seen)

    def _file(self, seen: os.stat_result) -> Path:
        return self._directory / f"{seen.st_dev}-{seen.st_ino}"


class _Held:
    """One component of the way to a mount point: its parent's descriptor, and its own lock."""

    def __init__(self, register: _Register, parent: OwnedFd, name: str, lock: OwnedFd) -> None:
        self._register, self._parent, self._name, self._lock = register, parent, name, lock

    def close(self) -> None:
        """Let go of it, and remove nothing; a second time does nothing."""
        self._parent.close()
        self._lock.close()

    def let_go(self) -> None:
        """Remove it if it was made by us and nobody else uses it."""
        with self._parent, self._lock:
            seen = os.fstat(self._lock)
            if not self._register.has(seen):
                return
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return  # who uses it will remove it
            in_place = self._is_at_its_place(seen)
            if in_place or seen.st_nlink == 0:
                self._register.forget(seen)
            if in_place:
                self._remove(seen)

    def _is_at_its_place(self, seen: os.stat_result) -> bool:
        try:
            found = os.stat(self._name, dir_fd=self._parent, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return os.path.samestat(found, seen)

    def _remove(self, seen: os.stat_result) -> None:
        try:
            if stat.S_ISDIR(seen.st_mode):
                os.rmdir(self._name, dir_fd=self._parent)
            elif seen.st_size == 0:
                os.unlink(self._name, dir_fd=self._parent)
        except OSError as error:
            # what somebody has put something into is not ours any more
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                path = f"{os.readlink(f'/proc/self/fd/{self._parent}')}/{self._name}"  # noqa: PTH115
                raise TeardownRefused(
                    path, str(error.strerror), f"findmnt; ls -la {path}"
                ) from error


def _hold(point: MountPoint, *, register: _Register, held: list[_Held]) -> None:
    """Hold each component that is ours, or the last; make what is missing."""
    with ExitStack() as undo:
        flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
        root = undo.enter_context(OwnedFd(os.open(point.root, flags)))
        parts = PurePosixPath(point.path).parts[1:]
        above = root
        try:
            for depth in range(1, len(parts) + 1):
                is_last = depth == len(parts)
                directory = point.directory or not is_last
                way = "/".join(parts[:depth])
                found = undo.enter_context(
                    _find_or_make(root, way, above, directory=directory, register=register)
                )
                if stat.S_ISDIR(os.fstat(found).st_mode) != directory:
                    raise RequestInvalid(
                        f"extra_mounts: /{way} in {point.root} is "
                        f"{'no' if directory else 'a'} directory"
                    )
                if is_last or register.has(os.fstat(found)):
                    _keep(found, above, parts[depth - 1], register=register, held=held)
                above = found
        except OSError as error:
            raise RequestInvalid(
                f"extra_mounts: {point.path} is not in {point.root}, and can't be made: "
                f"{error.strerror}"
            ) from error


def _find_or_make(
    root: OwnedFd, way: str, above: OwnedFd, *, directory: bool, register: _Register
) -> OwnedFd:
    """What is at `way` below `root`, opened as a place only, made in `above` where missing."""
    with suppress(FileNotFoundError):
        return openat2(root, way, os.O_PATH, resolve=INSIDE)
    name = PurePosixPath(way).name
    try:
        if directory:
            os.mkdir(name, 0o755, dir_fd=above)
        else:
            flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC
            os.close(os.open(name, flags, 0o644, dir_fd=above))
    except FileExistsError:
        raise OSError(errno.ELOOP, "a symbolic link on the way leads nowhere") from None
    made = openat2(above, name, os.O_PATH | os.O_NOFOLLOW, resolve=INSIDE)
    register.note(made)
    if register.has(os.fstat(above)):
        register.note(above)  # what we have just made in it is no reason to doubt it
    return made


def _keep(
    found: OwnedFd, above: OwnedFd, name: str, *, register: _Register, held: list[_Held]
) -> None:
    """Lock what is behind `found`, which is called `name` in `above`, and note that in `held`."""
    if not stat.S_ISDIR(mode := os.fstat(found).st_mode) and not stat.S_ISREG(mode):
        return  # no sandbox has made it, and to open a device or a pipe does something
    try:
        lock = OwnedFd(os.open(f"/proc/self/fd/{found}", os.O_RDONLY | os.O_CLOEXEC))
    except PermissionError:
        return  # what sandboxes make can be read by all
    held.append(_Held(register, OwnedFd(os.dup(above)), name, lock))
    with suppress(BlockingIOError):
        if register.has(seen := os.fstat(lock)):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            register.drop_unless_unchanged(seen)  # nobody alive uses it
    with suppress(BlockingIOError):  # a lock that is somebody else's business
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
