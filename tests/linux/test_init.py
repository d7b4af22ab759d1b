"""The room's front door."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import pytest_vmsandbox.linux as room

FIXED_NAMES = [
    "CloneFlags",
    "MountFlags",
    "MountAttrFlags",
    "MountSetattrFlags",
    "MoveMountFlags",
    "OpenTreeFlags",
    "UmountFlags",
    "EventFDFlags",
    "PrctlOption",
    "AtFlags",
    "AtLocation",
    "mount",
    "umount",
    "mount_setattr",
    "move_mount",
    "open_tree",
    "pivot_root",
    "unshare",
    "setns",
    "prctl",
    "prctl_set_pdeathsig",
    "prctl_set_child_subreaper",
    "prctl_raise_ambient_capabilities",
    "call_libc",
    "CapabilitySets",
    "EventFD",
]


def test_the_front_door_exports_what_it_imports_and_nothing_else() -> None:
    tree = ast.parse(Path(room.__file__).read_text(encoding="utf-8"))
    imported = [
        alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names
    ]

    assert sorted(imported) == sorted(room.__all__)
    assert list(room.__all__) == sorted(set(room.__all__))


@pytest.mark.parametrize("name", FIXED_NAMES)
def test_a_promised_name_can_be_had_at_the_front_door(name: str) -> None:
    assert name in room.__all__
    assert getattr(room, name) is not None


ELSEWHERE = """
import ctypes, dataclasses, enum, os, pathlib, resource, select, signal, sys
for module, names in (
    (os, ("eventfd", "pidfd_open", "waitid", "P_PIDFD", "setns", "unshare")),
    (select, ("epoll", "EPOLLET", "EPOLLOUT")),
    (signal, ("pidfd_send_signal",)),
):
    for name in names:
        if hasattr(module, name):
            delattr(module, name)
sys.platform = "darwin"

import errno
from pytest_vmsandbox import linux
assert "subprocess" not in sys.modules and "asyncio" not in sys.modules

calls = {
    "mount": lambda: linux.mount("a", "/b", "tmpfs"),
    "umount": lambda: linux.umount("/b"),
    "mount_setattr": lambda: linux.mount_setattr("/b", attr_set=1),
    "move_mount": lambda: linux.move_mount("/a", "/b"),
    "open_tree": lambda: linux.open_tree("/b"),
    "pivot_root": lambda: linux.pivot_root("/a", "/b"),
    "unshare": lambda: linux.unshare(linux.CloneFlags.NEWNS),
    "setns": lambda: linux.setns(0),
    "prctl": lambda: linux.prctl(linux.PrctlOption.GET_DUMPABLE),
    "pdeathsig": lambda: linux.prctl_set_pdeathsig(9),
    "capget": lambda: linux.CapabilitySets.capget(),
    "eventfd": lambda: linux.EventFD(),
    "pidfd_open": lambda: linux.pidfd_open(1),
    "pidfd_send_signal": lambda: linux.pidfd_send_signal(0, 0),
    "pidfd_reap": lambda: linux.pidfd_reap(0),
    "openat2": lambda: linux.openat2(linux.AT_FDCWD, "/b", 0),
    "keyring": lambda: linux.join_session_keyring(),
    "privileges": lambda: linux.drop_all_capabilities(),
    "unknown": lambda: linux.call_libc("no_such_call"),
}
for name, call in calls.items():
    try:
        call()
    except OSError as error:
        assert error.errno == errno.ENOSYS, (name, error)
    else:
        raise AssertionError(name)
assert linux.deny_system_calls() is False
"""


def test_on_another_system_it_imports_and_every_call_is_an_enosys() -> None:
    done = subprocess.run(
        [sys.executable, "-B", "-c", ELSEWHERE],
        env={"PYTHONPATH": str(Path(room.__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )

    assert (done.returncode, done.stderr) == (0, "")
