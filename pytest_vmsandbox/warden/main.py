"""The warden's way from a fresh Python to the server: who asks, which namespaces, as whom.

The outer half was started by pytest, or by sudo; it waits, and dies with whoever started it. The
inner half is pid 1 of a pid namespace: with it the kernel ends everything that it launched.
"""

from __future__ import annotations

import json
import os
import pwd
import signal
import socket
import stat
import struct
from dataclasses import dataclass

from pytest_vmsandbox.linux.at import AtFlags
from pytest_vmsandbox.linux.clone import CloneFlags
from pytest_vmsandbox.linux.id_maps import write_identity_maps
from pytest_vmsandbox.linux.mount_flags import MountFlags
from pytest_vmsandbox.linux.mount_tree import mount_setattr
from pytest_vmsandbox.linux.mounts import mount
from pytest_vmsandbox.linux.namespaces import unshare
from pytest_vmsandbox.linux.prctl import prctl_set_pdeathsig
from pytest_vmsandbox.warden.groups import find_hierarchies
from pytest_vmsandbox.warden.launch import User
from pytest_vmsandbox.warden.requests import Who
from pytest_vmsandbox.warden.server import Server
from pytest_vmsandbox.warden.validation import request_peer

VMM_USER = "qemu-vm"

# Where that user was not made: uids that systemd gives to services for a while, and nobody has
# for good (systemd's "Users, Groups, UIDs and GIDs").
_DYNAMIC_UIDS = range(61184, 65520)

_UCRED = struct.Struct("iII")
_KVM = "/dev/kvm"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Peer:
    """Whoever made the socketpair, which is pytest; as the kernel says."""

    uid: int
    gid: int


def main(line: socket.socket) -> None:
    """Serve `line`, the warden's stdin, until it ends."""
    peer = _trusted_peer(line)
    rootful = os.geteuid() == 0
    if not rootful:
        uid, gid = os.geteuid(), os.getegid()  # in the new namespace nobody is mapped yet
        unshare(CloneFlags.CLONE_NEWUSER)
        write_identity_maps(os.getpid(), uid=uid, gid=gid, deny_setgroups=True)
    # Whoever started us is gone: be gone too. Not earlier: a new user namespace may end it.
    prctl_set_pdeathsig(signal.SIGKILL)
    unshare(CloneFlags.CLONE_NEWNS | CloneFlags.CLONE_NEWPID | CloneFlags.CLONE_NEWIPC)
    # What the host mounts and unmounts is seen here, so that nothing is kept busy; nothing that
    # is done here is seen there.
    mount_setattr("/", int(AtFlags.AT_RECURSIVE), propagation=MountFlags.SLAVE)
    lifeline, held_open = os.pipe()
    inner = os.fork()
    if inner == 0:
        os.close(held_open)
        prctl_set_pdeathsig(signal.SIGKILL)
        _serve(line, lifeline=lifeline, peer=peer, rootful=rootful)
        os._exit(0)
    line.close()
    os.close(lifeline)
    os.waitpid(inner, 0)
    os._exit(0)


def _serve(line: socket.socket, *, lifeline: int, peer: _Peer, rootful: bool) -> None:
    mount("proc", "/proc", "proc", MountFlags.NOSUID | MountFlags.NODEV | MountFlags.NOEXEC)
    users = _rootful_users(peer) if rootful else _rootless_users()
    hierarchies = find_hierarchies()
    greeting = {
        "uid": users[Who.VMM].uid,
        "owner_uid": users[Who.OWNER].uid,
        "kvm": _may_open(_KVM, users[Who.VMM]),
        "groups": [str(hierarchy.parent) for hierarchy in hierarchies],
        "limits": sorted(name for hierarchy in hierarchies for name in hierarchy.files),
    }
    line.send(json.dumps(greeting).encode())
    Server(line, users=users, hierarchies=hierarchies).serve(lifeline=lifeline)


def _trusted_peer(line: socket.socket) -> _Peer:
    """Who is at the other end: root, or the one for whom sudo started us, or ourselves."""
    _, uid, gid = _UCRED.unpack(line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    request_peer(uid, owner=int(os.environ.get("SUDO_UID", os.geteuid())))
    return _Peer(uid=uid, gid=gid)


def _rootful_users(peer: _Peer) -> dict[Who, User]:
    try:
        entry = pwd.getpwnam(VMM_USER)
        uid, gid = entry.pw_uid, entry.pw_gid
    except KeyError:
        uid = gid = _free_uid()
    vmm = User(uid=uid, gid=gid, groups=_groups_for_kvm())
    return {Who.VMM: vmm, Who.OWNER: User(uid=peer.uid, gid=peer.gid, groups=())}


def _rootless_users() -> dict[Who, User]:
    ourselves = User(uid=os.geteuid(), gid=os.getegid(), groups=None)
    return {Who.VMM: ourselves, Who.OWNER: ourselves}


def _free_uid() -> int:
    for uid in _DYNAMIC_UIDS:
        try:
            pwd.getpwuid(uid)
        except KeyError:
            return uid
    raise LookupError(f"every uid in {_DYNAMIC_UIDS} is taken, and there is no {VMM_USER}")


def _groups_for_kvm() -> tuple[int, ...]:
    """The group that may use /dev/kvm, where there is one: no other group is kept."""
    try:
        device = os.stat(_KVM)  # noqa: PTH116 - pathlib is not loaded in the warden
    except OSError:
        return ()
    of_group = stat.S_IRGRP | stat.S_IWGRP
    return (device.st_gid,) if device.st_mode & of_group == of_group and device.st_gid else ()


def _may_open(path: str, user: User) -> bool:
    """Whether `user` may read and write it, found out by doing it."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    try:
        if user.groups is not None:
            os.setgroups(user.groups)
            os.setresgid(user.gid, user.gid, user.gid)
            os.setresuid(user.uid, user.uid, user.uid)
        os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        os._exit(1)
    os._exit(0)
