"""Namespaces, made and entered by children."""

from __future__ import annotations

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
        def now() -> Path:
            return Path(f"/proc/self/ns/{name}").readlink()

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
            preexec_fn=lambda: unshare(  # noqa: PLW1509 - there are no threads
                CloneFlags.NEWUTS | CloneFlags.NEWNET
            ),
        )
        assert child.stdout
        child.stdout.readline()
        with pidfd_open(child.pid) as pidfd:
            setns(pidfd, CloneFlags.NEWUTS | CloneFlags.NEWNET)
        for kind in ("uts", "net"):
            own = Path(f"/proc/self/ns/{kind}").readlink()
            assert own == Path(f"/proc/{child.pid}/ns/{kind}").readlink()
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
        second = subprocess.check_output([sys.executable, "-c", show], input=b"\n")
        assert second == b"2\n"
        first.communicate(b"\n")

    in_room(body)


def test_a_namespace_of_another_kind_than_was_asked_for_is_not_entered(in_room: InChild) -> None:
    def body() -> None:
        unshare(CloneFlags.NEWNET)
        with Path("/proc/self/ns/net").open() as namespace:
            with pytest.raises(OSError, match="setns: Invalid argument"):
                setns(namespace.fileno(), CloneFlags.NEWUTS)
            setns(namespace.fileno())

    in_room(body)


def test_a_process_with_threads_gets_no_user_namespace(in_child: InChild) -> None:
    def body() -> None:
        over = threading.Event()
        thread = threading.Thread(target=over.wait)
        thread.start()
        with pytest.raises(OSError, match="unshare: Invalid argument"):
            unshare(CloneFlags.NEWUSER)
        over.set()
        thread.join()

    in_child(body)


def test_an_ordinary_user_gets_nothing_outside_of_one(in_child: InChild, user_id: int) -> None:
    if user_id == 0:
        pytest.skip("VMS-TEST-ROOT: root does")

    def body() -> None:
        before = Path("/proc/self/ns/mnt").readlink()
        with pytest.raises(PermissionError):
            unshare(CloneFlags.NEWNS)
        assert Path("/proc/self/ns/mnt").readlink() == before

    in_child(body)


def test_no_flag_at_all_changes_nothing() -> None:
    before = Path("/proc/self/ns/mnt").readlink()

    unshare(0)

    assert Path("/proc/self/ns/mnt").readlink() == before


def test_a_descriptor_that_is_not_open_is_the_kernels_to_refuse() -> None:
    with pytest.raises(OSError, match="setns: Bad file descriptor"):
        setns(-1)
