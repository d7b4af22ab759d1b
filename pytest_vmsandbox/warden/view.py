"""A view: the root directory that a jailed process sees, built step by step from nothing.

All of it is done in a mount namespace of its own with the rights of one user, so that nothing can
be reached or covered here that this user could not reach anyway, and nothing of it is ever seen,
or left, outside. The new root lies over the old one until `enter`; sources are looked up in the
old one.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import ExitStack
from pathlib import PurePosixPath

from pytest_vmsandbox.linux.at import AtFlags, AtLocation
from pytest_vmsandbox.linux.mount_flags import MountFlags
from pytest_vmsandbox.linux.mount_tree import (
    MountAttrFlags,
    OpenTreeFlags,
    mount_setattr,
    move_mount,
    open_tree,
)
from pytest_vmsandbox.linux.mounts import UmountFlags, pivot_root, umount
from pytest_vmsandbox.linux.new_mount import new_mount
from pytest_vmsandbox.linux.openat2 import ResolveFlags, openat2
from pytest_vmsandbox.linux.owned_fd import OwnedFd
from pytest_vmsandbox.warden.steps import (
    Access,
    Bind,
    Device,
    Proc,
    ReadOnly,
    Step,
    Symlink,
    Tmpfs,
)

_WHOLE_TREE = int(OpenTreeFlags.OPEN_TREE_CLONE) | int(OpenTreeFlags.AT_RECURSIVE)
_RECURSIVE = int(AtFlags.AT_RECURSIVE)
_NOSUID, _NODEV = MountAttrFlags.MOUNT_ATTR_NOSUID, MountAttrFlags.MOUNT_ATTR_NODEV
_NOEXEC, _RDONLY = MountAttrFlags.MOUNT_ATTR_NOEXEC, MountAttrFlags.MOUNT_ATTR_RDONLY

_FILES_IN_A_MIB = 1024

# A symbolic link in the view is followed as it will be from inside; one of /proc never.
_INSIDE = ResolveFlags.RESOLVE_IN_ROOT | ResolveFlags.RESOLVE_NO_MAGICLINKS


class View:
    """A root that is being built; `enter` makes it the only one that this process sees."""

    def __init__(self) -> None:
        # Nothing that is mounted from here on is seen elsewhere, nor the other way round.
        mount_setattr("/", _RECURSIVE, propagation=MountFlags.PRIVATE)
        self._root: OwnedFd | None = None
        # The devices of file systems that exist in this view only: nowhere else is anything made.
        self._own: set[int] = set()

    def perform(self, step: Step) -> None:
        """Do one step; OSError names the call and the path that failed."""
        match step:
            case Tmpfs():
                mount = _tmpfs(step)
                self._own.add(os.fstat(mount).st_dev)
                self._attach(mount, step.target, directory=True)
            case Bind():
                self._bind(step)
            case Device():
                path = f"/dev/{step.name}"
                with open_tree(path, OpenTreeFlags.OPEN_TREE_CLONE) as device:
                    mount_setattr(AtLocation(device), attr_set=_NOSUID | _NOEXEC)
                    self._attach(device, path, directory=False)
            case Proc():
                self._attach(_proc(step), step.target, directory=True)
            case Symlink():
                parent, name = _split(step.target)
                with self._own_directory(parent) as directory:
                    os.symlink(step.text, name, dir_fd=directory)
            case ReadOnly():
                self._make_read_only(step)

    def open(self, path: str) -> OwnedFd:
        """What lies at `path` in the view (O_PATH), found as from inside."""
        return self._open(path)

    def enter(self) -> None:
        """Make it this process's root, and let go of the old one for good."""
        os.fchdir(self._made_root)
        # The old root goes on top of the new one, where it can be taken off (pivot_root(2)).
        pivot_root(".", ".")
        umount(".", UmountFlags.MNT_DETACH)
        os.chdir("/")
        # `..` of the root is the root, unless something lies over it still.
        if not os.path.samestat(os.stat("/.."), os.fstat(self._made_root)):  # noqa: PTH116
            raise OSError(errno.EBUSY, "the old root could not be taken off", "/")
        self._made_root.close()

    @property
    def _made_root(self) -> OwnedFd:
        if self._root is None:
            raise OSError(errno.ENOENT, "the view has no root yet")
        return self._root

    def _bind(self, step: Bind) -> None:
        with open_tree(step.source, _WHOLE_TREE) as tree:
            attributes = _NOSUID if step.devices else _NOSUID | _NODEV
            if step.access is Access.READ_ONLY:
                attributes |= _RDONLY
            mount_setattr(AtLocation(tree), _RECURSIVE, attr_set=attributes)
            self._attach(tree, step.target, directory=stat.S_ISDIR(os.fstat(tree).st_mode))

    def _make_read_only(self, step: ReadOnly) -> None:
        with ExitStack() as trees:
            stay = [(path, trees.enter_context(self._tree(path))) for path in step.writable]
            if step.target == "/":
                # Nothing may lie over the root, or `enter` would take that off, not the host.
                mount_setattr(AtLocation(self._made_root), _RECURSIVE, attr_set=_RDONLY)
            else:
                tree = trees.enter_context(self._tree(step.target))
                mount_setattr(AtLocation(tree), _RECURSIVE, attr_set=_RDONLY)
                stay.insert(0, (step.target, tree))
            for target, tree in stay:
                self._attach(tree, target, directory=stat.S_ISDIR(os.fstat(tree).st_mode))

    def _tree(self, path: str) -> OwnedFd:
        """A copy of what is mounted at and below a path, or of the directory or file there."""
        with self._open(path) as place:
            return open_tree(AtLocation(place), _WHOLE_TREE)

    def _attach(self, mount: OwnedFd, target: str, *, directory: bool) -> None:
        if target == "/":
            move_mount(AtLocation(mount), "/")
            self._root = OwnedFd(os.dup(mount))
            return
        with mount, self._place(target, directory=directory) as place:
            move_mount(AtLocation(mount), AtLocation(place))

    def _place(self, target: str, *, directory: bool) -> OwnedFd:
        """The mount point at `target`, made where it is missing."""
        if directory:
            return self._open(target, make_directory=True)
        try:
            return self._open(target)
        except FileNotFoundError:
            parent, name = _split(target)
            with self._own_directory(parent) as above:
                flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC
                os.close(os.open(name, flags, 0o644, dir_fd=above))
            return self._open(target)

    def _open(self, path: str, *, make_directory: bool = False) -> OwnedFd:
        try:
            return openat2(self._made_root, path, os.O_PATH, resolve=_INSIDE)
        except FileNotFoundError:
            if not make_directory or path == "/":
                raise
        parent, name = _split(path)
        with self._own_directory(parent) as above:
            os.mkdir(name, 0o755, dir_fd=above)
        return openat2(self._made_root, path, os.O_PATH, resolve=_INSIDE)

    def _own_directory(self, path: str) -> OwnedFd:
        """A directory in which things can be made: those of the host are left as they are."""
        directory = self._open(path, make_directory=True)
        if os.fstat(directory).st_dev not in self._own:
            directory.close()
            raise OSError(errno.EROFS, "nothing is made on the host's file systems", path)
        return directory


def _tmpfs(step: Tmpfs) -> OwnedFd:
    # An empty file takes none of its size, but a KiB of the kernel's memory; by default a tmpfs
    # holds as many as half the host's memory has pages (tmpfs(5), "nr_inodes").
    options = {
        "size": f"{step.size_mib}m",
        "nr_inodes": str(step.size_mib * _FILES_IN_A_MIB),
        "mode": f"{step.mode:o}",
    }
    return new_mount("tmpfs", options=options, attributes=_NOSUID | _NODEV)


def _proc(step: Proc) -> OwnedFd:
    options = {"subset": "pid"} if step.only_pids else {}
    return new_mount("proc", options=options, attributes=_NOSUID | _NODEV | _NOEXEC)


def _split(path: str) -> tuple[str, str]:
    whole = PurePosixPath(path)
    return str(whole.parent), whole.name
