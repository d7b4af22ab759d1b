"""The kernel's words: system calls, flags, namespaces, mounts and processes, typed."""

from pytest_vmsandbox.linux.at import AT_FDCWD, AtFlags, AtLocation
from pytest_vmsandbox.linux.capabilities import Capabilities, CapabilitySets
from pytest_vmsandbox.linux.cgroups import own_and_above, read_own_groups
from pytest_vmsandbox.linux.clone import CloneFlags
from pytest_vmsandbox.linux.eventfd import EventFD, EventFDFlags
from pytest_vmsandbox.linux.id_maps import write_identity_maps
from pytest_vmsandbox.linux.keyring import join_session_keyring
from pytest_vmsandbox.linux.libc import call_libc
from pytest_vmsandbox.linux.mount_flags import MountFlags
from pytest_vmsandbox.linux.mount_tree import (
    MountAttrFlags,
    MountSetattrFlags,
    MoveMountFlags,
    OpenTreeFlags,
    mount_setattr,
    move_mount,
    open_tree,
)
from pytest_vmsandbox.linux.mountinfo import (
    MountInfo,
    mounts_at_or_below,
    parse_mountinfo,
    read_mountinfo,
)
from pytest_vmsandbox.linux.mounts import UmountFlags, mount, pivot_root, umount
from pytest_vmsandbox.linux.namespaces import setns, unshare
from pytest_vmsandbox.linux.openat2 import ResolveFlags, openat2
from pytest_vmsandbox.linux.owned_fd import OwnedFd
from pytest_vmsandbox.linux.pidfd import (
    ExitStatus,
    PidFDFlags,
    pidfd_is_alive,
    pidfd_open,
    pidfd_reap,
    pidfd_send_signal,
    pidfd_wait_exit,
)
from pytest_vmsandbox.linux.prctl import (
    PrctlOption,
    prctl,
    prctl_raise_ambient_capabilities,
    prctl_set_child_subreaper,
    prctl_set_no_new_privs,
    prctl_set_pdeathsig,
)
from pytest_vmsandbox.linux.privileges import SecureBits, drop_all_capabilities
from pytest_vmsandbox.linux.process_identity import ProcessIdentity, ProcessStat, read_boot_id
from pytest_vmsandbox.linux.seccomp import deny_system_calls

__all__ = [
    "AT_FDCWD",
    "AtFlags",
    "AtLocation",
    "Capabilities",
    "CapabilitySets",
    "CloneFlags",
    "EventFD",
    "EventFDFlags",
    "ExitStatus",
    "MountAttrFlags",
    "MountFlags",
    "MountInfo",
    "MountSetattrFlags",
    "MoveMountFlags",
    "OpenTreeFlags",
    "OwnedFd",
    "PidFDFlags",
    "PrctlOption",
    "ProcessIdentity",
    "ProcessStat",
    "ResolveFlags",
    "SecureBits",
    "UmountFlags",
    "call_libc",
    "deny_system_calls",
    "drop_all_capabilities",
    "join_session_keyring",
    "mount",
    "mount_setattr",
    "mounts_at_or_below",
    "move_mount",
    "open_tree",
    "openat2",
    "own_and_above",
    "parse_mountinfo",
    "pidfd_is_alive",
    "pidfd_open",
    "pidfd_reap",
    "pidfd_send_signal",
    "pidfd_wait_exit",
    "pivot_root",
    "prctl",
    "prctl_raise_ambient_capabilities",
    "prctl_set_child_subreaper",
    "prctl_set_no_new_privs",
    "prctl_set_pdeathsig",
    "read_boot_id",
    "read_mountinfo",
    "read_own_groups",
    "setns",
    "umount",
    "unshare",
    "write_identity_maps",
]
