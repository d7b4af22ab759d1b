"""How a call reaches the kernel, and how its failure comes back."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pytest_vmsandbox.linux import (
    AT_FDCWD,
    AtLocation,
    CapabilitySets,
    CloneFlags,
    EventFD,
    MountAttrFlags,
    OpenTreeFlags,
    PrctlOption,
    UmountFlags,
    call_libc,
    join_session_keyring,
    libc,
    mount,
    mount_setattr,
    move_mount,
    open_tree,
    openat2,
    pidfd_open,
    pidfd_send_signal,
    pivot_root,
    prctl,
    read_mountinfo,
    setns,
    umount,
    unshare,
)

InChild = Callable[..., None]


def test_a_failure_is_an_os_error_with_number_call_and_path() -> None:
    with pytest.raises(FileNotFoundError) as caught:
        call_libc("umount2", b"/no such place", 0, path="/no such place")

    assert caught.value.errno == errno.ENOENT
    assert caught.value.filename == "/no such place"
    assert str(caught.value) == ("[Errno 2] umount2: No such file or directory: '/no such place'")


def test_a_failure_may_have_no_path_or_two() -> None:
    with pytest.raises(OSError, match="setns") as caught:
        call_libc("setns", -1, 0)
    assert caught.value.filename is None

    with pytest.raises(OSError, match="pivot_root") as caught:
        call_libc("pivot_root", b"/no a", b"/no b", path=b"/no a", path2=Path("/no b"))
    assert (caught.value.filename, caught.value.filename2) == ("/no a", "/no b")


def test_a_call_that_nobody_knows_is_not_implemented() -> None:
    with pytest.raises(OSError, match="no_such_call") as caught:
        call_libc("no_such_call", 1, b"x", path="/p")

    assert caught.value.errno == errno.ENOSYS
    assert caught.value.filename == "/p"


def test_arguments_are_typed_before_the_call() -> None:
    with pytest.raises(ctypes.ArgumentError):
        call_libc("umount2", "text is not bytes", 0)
    with pytest.raises(TypeError):
        call_libc("umount2")


@pytest.mark.parametrize(
    ("name", "arguments", "place"),
    [
        ("setns", (2**31, 0), 1),
        ("setns", (2**32 - 1, 0), 1),  # -1, to a C int
        ("setns", (-(2**31) - 1, 0), 1),
        ("umount2", (b"/no such place", 2**32), 2),
        ("pidfd_open", (2**31 - 1, 2**32), 2),
        ("pidfd_open", (2**31 - 1, -1), 2),
        ("prctl", (3, 2**64, 0, 0, 0), 2),
        ("prctl", (3, 0, 0, 0, -1), 5),
        ("mount", (None, b"/no such place", None, 2**64, None), 4),
        ("capget", (2**64, None), 1),
    ],
)
def test_a_number_that_its_type_would_cut_is_refused(
    name: str, arguments: tuple[object, ...], place: int
) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: argument {place}: -?\d+ is not in "):
        call_libc(name, *arguments)


@pytest.mark.parametrize("bad", [b"/no such place\0", b"\0", b"/\0/no such place"])
def test_a_nul_in_bytes_is_refused(bad: bytes) -> None:
    with pytest.raises(ValueError, match=r"^umount2: argument 1 holds a NUL byte"):
        call_libc("umount2", bad, 0)


def test_the_ends_of_a_types_range_reach_the_kernel() -> None:
    for fd in (-(2**31), 2**31 - 1):
        with pytest.raises(OSError, match="setns: Bad file descriptor"):
            call_libc("setns", fd, 0)
    with pytest.raises(OSError, match="pidfd_open: Invalid argument"):
        call_libc("pidfd_open", 1, 2**32 - 1)
    with pytest.raises(OSError, match="prctl: Invalid argument"):
        call_libc("prctl", 38, 2**64 - 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS takes 1 only


def test_every_call_works_by_number_where_the_library_has_no_wrapper(in_room: InChild) -> None:
    def body() -> None:
        class Bare:
            """A C library with nothing but syscall()."""

            def __getitem__(self, name: str) -> object:
                if name != "syscall":
                    raise AttributeError(name)
                return ctypes.CDLL(None, use_errno=True)[name]

        bare = Bare()
        libc._find_call.cache_clear()
        libc._library = lambda: bare  # type: ignore[assignment]  # a library, to those who index it
        assert libc._find_wrapper("mount", libc._CALLS["mount"]) is None

        for name in ("a", "b", "root"):
            Path(name).mkdir()
        mount("it", "a", "tmpfs", 0, "size=64k")
        with open_tree("a", OpenTreeFlags.CLONE) as tree:
            mount_setattr(AtLocation(tree), attr_set=MountAttrFlags.NOEXEC)
            move_mount(AtLocation(tree), "b")
        (found,) = [one for one in read_mountinfo() if one.is_at("/mnt/b")]
        assert "noexec" in found.options
        umount("b", UmountFlags.DETACH)
        with EventFD(3) as counter:
            assert counter.read() == 3
        assert prctl(PrctlOption.GET_DUMPABLE) in (0, 1, 2)
        with pidfd_open(os.getpid()) as pidfd:
            pidfd_send_signal(pidfd, 0)
        CapabilitySets.capget().capset()
        with openat2(AT_FDCWD, "a", os.O_PATH) as directory:
            assert os.fstat(directory).st_ino == Path("a").stat().st_ino
        assert join_session_keyring() > 0
        unshare(CloneFlags.NEWUTS)
        with Path("/proc/self/ns/uts").open() as namespace:
            setns(namespace.fileno(), CloneFlags.NEWUTS)
        with pytest.raises(OSError, match="pivot_root: Invalid argument"):
            pivot_root("root", "root")  # which is no mount
        with pytest.raises(FileNotFoundError, match="umount2") as caught:
            umount("/no such place")
        assert caught.value.filename == "/no such place"

    in_room(body)


@pytest.mark.parametrize("machine", ["i686", "armv7l", "mips64", ""])
def test_a_machine_whose_numbers_are_not_known_has_none(machine: str) -> None:
    call = libc._CALLS["mount"]

    assert libc._number(call, machine=machine) is None
    assert libc._number(call, machine="x86_64") == 165


def test_a_32_bit_process_has_no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "maxsize", 2**31 - 1)

    assert libc._number(libc._CALLS["mount"], machine="x86_64") is None


def test_without_a_wrapper_and_a_number_a_call_is_not_implemented(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Empty:
        def __getitem__(self, name: str) -> object:
            raise AttributeError(name)

    monkeypatch.setattr(libc, "_library", Empty)
    monkeypatch.setattr(libc, "_MACHINES", ())
    libc._find_call.cache_clear()
    try:
        with pytest.raises(OSError, match="umount2: Function not implemented") as caught:
            umount("/no such place")
    finally:
        libc._find_call.cache_clear()

    assert caught.value.errno == errno.ENOSYS


def test_ten_thousand_calls_good_and_bad_leave_no_descriptor(in_room: InChild) -> None:
    def body() -> None:
        def attempt(call: Callable[[], object]) -> None:
            try:
                call()
            except (OSError, ValueError):
                return

        here = os.open(".", os.O_PATH)
        me = os.getpid()
        calls: list[Callable[[], object]] = [
            lambda: EventFD(1).close(),
            lambda: EventFD(-1),
            lambda: EventFD(0, 1 << 40),
            lambda: open_tree(".").close(),
            lambda: open_tree(AtLocation(here), OpenTreeFlags.CLONE).close(),
            lambda: open_tree("/no such place"),
            lambda: open_tree("/mnt\0", OpenTreeFlags.CLONE),
            lambda: openat2(here, ".", os.O_PATH).close(),
            lambda: openat2(here, "no such place", os.O_RDONLY),
            lambda: openat2(here, ".", 1 << 40),
            lambda: pidfd_open(me).close(),
            lambda: pidfd_open(2**31 - 1),
            lambda: move_mount("/no such place", "."),
            lambda: mount_setattr(AtLocation(here), attr_set=MountAttrFlags.NODEV),
            lambda: mount_setattr(".", attr_clr=MountAttrFlags.IDMAP),
            lambda: mount("it", "/no such place", "tmpfs"),
            lambda: umount("/no such place"),
            lambda: pivot_root(".", "/no such place"),
            lambda: setns(here),
            lambda: unshare(1 << 40),
            lambda: prctl(PrctlOption.GET_DUMPABLE),
            CapabilitySets.capget,
            read_mountinfo,
        ]
        for call in calls:
            attempt(call)
        before = sorted(Path("/proc/self/fd").iterdir())
        for _round in range(10_000 // len(calls)):
            for call in calls:
                attempt(call)
        assert sorted(Path("/proc/self/fd").iterdir()) == before

    in_room(body)
