"""Namespaces, made and entered by children."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from pytest_vmsandbox.linux import CloneFlags, pidfd_open, setns, unshare

InChild = Callable[..., None]

# The names in /proc/PID/ns; pid and user namespaces have tests of their own.
KINDS = {
    "NEWCGROUP": "cgroup",
    "NEWIPC": "ipc",
    "NEWNET": "net",
    "NEWNS": "mnt",
    "NEWTIME": "time_for_children",
    "NEWUTS": "uts",
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_namespace_of_each_kind_is_made_and_the_old_one_entered_again(
    in_room: InChild, kind: str
) -> None:
    def body(flag: str, name: str) -> None:
        def now() -> str:
            return os.readlink(f"/proc/self/ns/{name}")

        # Old and new belong to one user namespace of ours: only there may we go back and forth.
        unshare(CloneFlags[flag])
        first = now()
        with Path(f"/proc/self/ns/{name}").open() as namespace:
            unshare(CloneFlags[flag])
            assert now() != first
            setns(namespace.fileno(), CloneFlags[flag])
            assert now() == first

    in_room(body, kind, KINDS[kind])


def test_all_kinds_are_the_namespace_flags() -> None:
    both = {flag.name for flag in CloneFlags.NS_FLAGS}

    assert both == {f"CLONE_{kind}" for kind in [*KINDS, "NEWPID", "NEWUSER"]}
    assert CloneFlags.UNSHARE_FLAGS & CloneFlags.NS_FLAGS == CloneFlags.NS_FLAGS


def test_an_ordinary_user_gets_everything_inside_a_user_namespace(in_room: InChild) -> None:
    def body() -> None:
        unshare(CloneFlags.NEWUTS | CloneFlags.NEWNET | CloneFlags.NEWIPC)
        socket.sethostname("elsewhere")
        assert socket.gethostname() == "elsewhere"
        assert [name for _index, name in socket.if_nameindex()] == ["lo"]

    in_room(body)
    assert socket.gethostname() != "elsewhere"


def test_the_namespaces_of_a_process_are_entered_by_pidfd(in_room: InChild) -> None:
    def body() -> None:
        inside = "import sys; sys.stdout.write('\\n'); sys.stdout.flush(); sys.stdin.read()"
        child = subprocess.Popen(
            [sys.executable, "-c", inside],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            preexec_fn=lambda: unshare(CloneFlags.NEWUTS | CloneFlags.NEWNET),
        )
        assert child.stdout
        child.stdout.readline()
        with pidfd_open(child.pid) as pidfd:
            setns(pidfd, CloneFlags.NEWUTS | CloneFlags.NEWNET)
        for kind in ("uts", "net"):
            own = os.readlink(f"/proc/self/ns/{kind}")
            assert own == os.readlink(f"/proc/{child.pid}/ns/{kind}")
        child.communicate(b"")

    in_room(body)


def test_the_next_child_is_the_first_process_of_a_new_pid_namespace(in_room: InChild) -> None:
    def body() -> None:
        unshare(CloneFlags.NEWPID)
        show = "import os; print(os.getpid(), flush=True); input()"
        first = subprocess.Popen(
            [sys.executable, "-c", show], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert first.stdout
        assert first.stdout.readline() == b"1\n"
        with Path(f"/proc/{first.pid}/ns/pid").open() as namespace:
            setns(namespace.fileno(), CloneFlags.NEWPID)
        second = subprocess.run([sys.executable, "-c", show], input=b"\n", capture_output=True)
        assert second.stdout == b"2\n"
        first.communicate(b"\n")

    in_room(body)


def test_a_namespace_of_another_kind_than_was_asked_for_is_not_entered(in_room: InChild) -> None:
    def body() -> None:
        unshare(CloneFlags.NEWNET)
        with Path("/proc/self/ns/net").open() as namespace:
            try:
                setns(namespace.fileno(), CloneFlags.NEWUTS)
            except OSError as error:
                assert error.errno == errno.EINVAL
                assert "setns" in str(error)
            else:
                raise AssertionError("a net namespace passed for a uts namespace")
            setns(namespace.fileno())

    in_room(body)


def test_a_process_with_threads_gets_no_user_namespace(in_child: InChild) -> None:
    def body() -> None:
        over = threading.Event()
        thread = threading.Thread(target=over.wait)
        thread.start()
        try:
            unshare(CloneFlags.NEWUSER)
        except OSError as error:
            assert error.errno == errno.EINVAL
            assert "unshare" in str(error)
        else:
            raise AssertionError("it got one")
        finally:
            over.set()
            thread.join()

    in_child(body)


def test_an_ordinary_user_gets_nothing_outside_of_one(in_child: InChild, user_id: int) -> None:
    if user_id == 0:
        pytest.skip("VMS-TEST-ROOT: root does")

    def body() -> None:
        before = os.readlink("/proc/self/ns/mnt")
        try:
            unshare(CloneFlags.NEWNS)
        except PermissionError:
            assert os.readlink("/proc/self/ns/mnt") == before
        else:
            raise AssertionError("an ordinary user got a mount namespace")

    in_child(body)


def test_no_flag_at_all_changes_nothing() -> None:
    before = os.readlink("/proc/self/ns/mnt")

    unshare(0)

    assert os.readlink("/proc/self/ns/mnt") == before


def test_a_descriptor_that_is_not_open_is_the_kernels_to_refuse() -> None:
    with pytest.raises(OSError, match="setns: Bad file descriptor"):
        setns(-1)
