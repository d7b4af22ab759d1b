"""User namespaces that map one id to itself."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pytest_vmsandbox.linux import CloneFlags, unshare, write_identity_maps

InChild = Callable[..., None]


def test_a_caller_keeps_its_own_ids_and_has_no_others(in_room: InChild) -> None:
    def body() -> None:
        # Seen from the room, whose root an ordinary user is.
        user, group = os.geteuid(), os.getegid()
        unshare(CloneFlags.NEWUSER)
        assert os.geteuid() == 65534
        write_identity_maps(uid=user, gid=group, deny_setgroups=True)
        assert (os.geteuid(), os.getegid()) == (user, group)
        for name in ("uid_map", "gid_map"):
            assert Path("/proc/self", name).read_text().split() == [str(user), str(user), "1"]
        assert Path("/proc/self/setgroups").read_text() == "deny\n"
        with pytest.raises(OSError, match="Invalid argument"):
            os.setresuid(user + 1, user + 1, user + 1)

    in_room(body)


def test_a_childs_ids_are_mapped_by_its_parent(in_child: InChild, user_id: int) -> None:
    if user_id != 0:
        pytest.skip("VMS-TEST-NOT-ROOT: another's ids can be mapped by root only")

    def body() -> None:
        told, tell = os.pipe()
        asked, ask = os.pipe()
        child = os.fork()
        if child == 0:
            os.setgroups([])
            unshare(CloneFlags.NEWUSER)
            os.write(tell, b"x")
            os.read(asked, 1)
            os.setresgid(4322, 4322, 4322)
            os.setresuid(4321, 4321, 4321)
            os._exit(7 if (os.getuid(), os.getgid()) == (4321, 4322) else 8)
        os.read(told, 1)
        write_identity_maps(child, uid=4321, gid=4322, deny_setgroups=False)
        assert Path(f"/proc/{child}/setgroups").read_text() == "allow\n"
        os.write(ask, b"x")
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7

    in_child(body)


def test_a_refusal_names_the_file_and_what_came_before_it_is_written(in_room: InChild) -> None:
    def body() -> None:
        user = os.geteuid()
        unshare(CloneFlags.NEWUSER)
        # Somebody else's id is no capability of ours any more.
        with pytest.raises(PermissionError, match="write: ") as caught:
            write_identity_maps(uid=user, gid=user + 1, deny_setgroups=True)
        assert caught.value.filename == "/proc/self/gid_map"
        assert caught.value.errno == errno.EPERM
        assert Path("/proc/self/uid_map").read_text().split() == [str(user), str(user), "1"]
        # A map is for good.
        with pytest.raises(PermissionError) as caught:
            write_identity_maps(uid=user, gid=user, deny_setgroups=False)
        assert caught.value.filename == "/proc/self/uid_map"

    in_room(body)


def test_a_process_that_is_not_there_has_no_maps() -> None:
    with pytest.raises(FileNotFoundError) as caught:
        write_identity_maps(2**22 + 1, uid=1, gid=1, deny_setgroups=False)

    assert caught.value.filename == f"/proc/{2**22 + 1}/uid_map"


@pytest.mark.parametrize("number", [-1, 2**32 - 1, 2**32, 2**64])
def test_an_id_that_nobody_can_have_is_refused(number: int) -> None:
    pid = 2**22 + 1
    with pytest.raises(ValueError, match=r"^uid: "):
        write_identity_maps(pid, uid=number, gid=1, deny_setgroups=True)
    with pytest.raises(ValueError, match=r"^gid: "):
        write_identity_maps(pid, uid=1, gid=number, deny_setgroups=True)


@pytest.mark.parametrize("pid", [0, -1, 2**31])
def test_a_pid_that_nobody_can_have_is_refused(pid: int) -> None:
    with pytest.raises(ValueError, match=r"^pid: "):
        write_identity_maps(pid, uid=1, gid=1, deny_setgroups=True)
