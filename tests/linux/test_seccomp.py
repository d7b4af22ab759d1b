"""The filter in children that try what it denies, and read by a small interpreter of BPF."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import mmap
import os
import pty
import shutil
import signal
import socket
import subprocess
import sys
import termios
import threading
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_vmsandbox.linux import (
    CloneFlags,
    PrctlOption,
    deny_system_calls,
    prctl,
    seccomp,
    setns,
    unshare,
)

InChild = Callable[..., None]
MACHINE = os.uname().machine

pytestmark = pytest.mark.skipif(
    MACHINE not in seccomp._MACHINES, reason=f"VMS-TEST-NO-FILTER: no numbers for {MACHINE}"
)

X86_64, AARCH64 = range(2)
ALLOW, KILL = seccomp._RET_ALLOW, seccomp._RET_KILL_PROCESS
NEW_NAMESPACES = [flag for flag in CloneFlags.NS_FLAGS if flag is not CloneFlags.NEWTIME]


def answer(place: int, number: int, *arguments: int, arch: int | None = None) -> int:
    """What the filter of that machine says to a call."""
    program = list(seccomp._render(seccomp.CALLS_NO_VMM_NEEDS, place))
    words = {0: number, 4: seccomp._AUDIT_ARCH[seccomp._MACHINES[place]] if arch is None else arch}
    for index, argument in enumerate(arguments):
        words |= {16 + 8 * index: argument % 2**32, 20 + 8 * index: argument >> 32 & 0xFFFFFFFF}
    held, at = 0, 0
    while True:
        step = program[at]
        at += 1
        match step.code:
            case seccomp._LOAD_WORD:
                held = words.get(step.k, 0)
                continue
            case seccomp._RETURN:
                return step.k
            case seccomp._JUMP_EQUAL:
                taken = held == step.k
            case seccomp._JUMP_AT_LEAST:
                taken = held >= step.k
            case seccomp._JUMP_ANY_BIT:
                taken = bool(held & step.k)
            case other:
                raise AssertionError(f"no such instruction: {other:#x}")
        at += step.jt if taken else step.jf


def refusal(number: int) -> int:
    return seccomp._RET_ERRNO | number


@pytest.mark.parametrize("place", [X86_64, AARCH64])
@given(number=st.integers(0, 2**32 - 1) | st.integers(0, 600), argument=st.integers(0, 2**64 - 1))
def test_each_number_gets_the_answer_that_the_table_gives_it(
    place: int, number: int, argument: int
) -> None:
    denied = {numbers[place] for numbers in seccomp._DENIED.values()}
    checked = {check.numbers[place] for check in seccomp._CHECKS}

    said = answer(place, number, argument, argument)

    if number >= 0x40000000:
        assert said == refusal(errno.ENOSYS)
    elif number not in checked:
        assert said == (refusal(errno.EPERM) if number in denied else ALLOW)


@pytest.mark.parametrize("place", [X86_64, AARCH64])
@given(arch=st.integers(0, 2**32 - 1), number=st.integers(0, 2**32 - 1))
def test_another_architecture_is_the_end(place: int, arch: int, number: int) -> None:
    if arch != seccomp._AUDIT_ARCH[seccomp._MACHINES[place]]:
        assert answer(place, number, arch=arch) == KILL


@pytest.mark.parametrize("place", [X86_64, AARCH64])
@given(high=st.integers(0, 2**32 - 1))
def test_the_high_half_of_a_checked_argument_says_nothing(place: int, high: int) -> None:
    ioctl, fcntl_, clone, clone3, personality, socket_, socketpair = (
        check.numbers[place] for check in seccomp._CHECKS
    )
    above = high << 32
    for flag in NEW_NAMESPACES:
        assert answer(place, clone, above | flag | signal.SIGCHLD) == refusal(errno.EPERM)
    thread = CloneFlags.VM | CloneFlags.THREAD | CloneFlags.SIGHAND | CloneFlags.SETTLS
    for flags in (thread, signal.SIGCHLD, CloneFlags.VM | CloneFlags.VFORK, 0):
        assert answer(place, clone, above | int(flags)) == ALLOW
    assert answer(place, clone3, above) == refusal(errno.ENOSYS)
    assert answer(place, personality, above | 0xFFFFFFFF) == ALLOW
    assert answer(place, personality, above | 0x40000) == refusal(errno.EPERM)
    assert answer(place, ioctl, 0, above | termios.TIOCSTI) == refusal(errno.EPERM)
    assert answer(place, ioctl, termios.TIOCSTI, above | 0xAE80) == ALLOW
    assert answer(place, fcntl_, 0, above | fcntl.F_SETLEASE) == refusal(errno.EPERM)
    assert answer(place, fcntl_, fcntl.F_SETLEASE, above | fcntl.F_SETLK) == ALLOW
    for call in (socket_, socketpair):
        assert answer(place, call, above | socket.AF_INET6) == ALLOW
        assert answer(place, call, above | socket.AF_VSOCK) == refusal(errno.EAFNOSUPPORT)


def test_each_denied_call_is_refused_before_and_after_exec(in_child: InChild) -> None:
    place = seccomp._MACHINES.index(MACHINE)
    numbers = [n for pair in seccomp._DENIED.values() if (n := pair[place]) is not None]
    assert len(numbers) > 40

    def body(numbers: list[int]) -> None:
        # Arguments that can do no harm should a call come through: no descriptor, no address.
        trying = (
            "import ctypes\n"
            "libc = ctypes.CDLL(None, use_errno=True)\n"
            "def ask(number):\n"
            "    return libc.syscall(number, *[ctypes.c_long(-1)] * 6), ctypes.get_errno()\n"
            f"answers = [ask(number) for number in {numbers}]\n"
            "assert set(answers) == {(-1, 1)}, answers\n"
        )
        assert deny_system_calls()
        assert prctl(PrctlOption.GET_NO_NEW_PRIVS) == 1
        exec(trying, {})
        subprocess.run([sys.executable, "-c", trying], check=True)

    in_child(body, numbers)


def test_processes_and_threads_are_made_and_namespaces_are_not(in_child: InChild) -> None:
    def body(clone: int, clone3: int, flags: list[int]) -> None:
        assert deny_system_calls()
        libc = ctypes.CDLL(None, use_errno=True)
        for flag in flags:
            child = libc.syscall(clone, ctypes.c_ulong(flag | signal.SIGCHLD), None, None, None, 0)
            if child == 0:
                os._exit(0)
            assert (child, ctypes.get_errno()) == (-1, errno.EPERM), hex(flag)
        assert libc.syscall(clone3, None, 0) == -1
        assert ctypes.get_errno() == errno.ENOSYS
        seen: list[int] = []
        thread = threading.Thread(target=seen.append, args=(1,))
        thread.start()
        thread.join()
        assert seen == [1]
        assert subprocess.run(["true"], check=False).returncode == 0

    place = seccomp._MACHINES.index(MACHINE)
    in_child(
        body,
        seccomp._CHECKS[2].numbers[place],
        seccomp._CHECKS[3].numbers[place],
        [int(flag) for flag in NEW_NAMESPACES],
    )


def test_sockets_are_of_the_families_that_a_network_namespace_covers(in_child: InChild) -> None:
    def body() -> None:
        assert deny_system_calls()
        for family in (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK):
            socket.socket(family, socket.SOCK_DGRAM).close()
        for pair in socket.socketpair():
            pair.close()
        for family in (socket.AF_VSOCK, socket.AF_ALG, socket.AF_PACKET):
            with pytest.raises(OSError, match="Address family not supported"):
                socket.socket(family, socket.SOCK_DGRAM)

    in_child(body)


def test_nothing_is_typed_into_a_terminal(in_child: InChild) -> None:
    def body() -> None:
        leader, follower = pty.openpty()
        assert deny_system_calls()
        termios.tcgetattr(follower)  # which is an ioctl as well
        with pytest.raises(PermissionError):
            fcntl.ioctl(follower, termios.TIOCSTI, b"x")
        os.set_blocking(follower, False)
        with pytest.raises(BlockingIOError):
            os.read(follower, 1)
        os.close(leader)

    in_child(body)


@pytest.mark.skipif(MACHINE != "x86_64", reason="VMS-TEST-MACHINE: only x86 has a second gate")
def test_a_call_by_the_32_bit_gate_kills(in_child: InChild) -> None:
    def body() -> None:
        code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        code.write(b"\xb8\x14\x00\x00\x00\xcd\x80\xc3")  # mov eax, 20 (getpid); int 0x80; ret
        address = ctypes.addressof(ctypes.c_char.from_buffer(code))
        call = ctypes.CFUNCTYPE(ctypes.c_int)(address)

        def ending(before: Callable[[], object]) -> int:
            child = os.fork()
            if child == 0:
                before()
                call()
                os._exit(7)
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

        if ending(lambda: None) == 7:  # else this kernel was built without that gate
            assert ending(deny_system_calls) == -signal.SIGSYS

    in_child(body)


def test_only_what_was_named_is_denied(in_child: InChild) -> None:
    def body() -> None:
        assert deny_system_calls(["setns"])
        with pytest.raises(PermissionError):
            setns(0)
        unshare(0)  # which changes nothing
        assert deny_system_calls(["unshare"])
        with pytest.raises(PermissionError):
            unshare(0)
        with pytest.raises(PermissionError):
            setns(0)

    in_child(body)


def test_a_name_without_a_number_is_refused(in_child: InChild) -> None:
    def body() -> None:
        with pytest.raises(ValueError, match="no numbers are known for: no_such_call, read"):
            deny_system_calls(["chroot", "read", "no_such_call"])
        assert prctl(PrctlOption.GET_NO_NEW_PRIVS) == 0
        assert prctl(PrctlOption.GET_SECCOMP) == 0

    in_child(body)


@pytest.mark.parametrize("machine", ["riscv64", "i686", "armv7l"])
def test_on_other_machines_nothing_is_installed_and_that_is_said(
    machine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    uname = os.uname()
    monkeypatch.setattr(os, "uname", lambda: os.uname_result((*uname[:4], machine)))

    assert deny_system_calls() is False
    assert prctl(PrctlOption.GET_NO_NEW_PRIVS) == 0
    assert prctl(PrctlOption.GET_SECCOMP) == 0


def test_qemu_with_its_own_filter_runs_behind_it(in_child: InChild) -> None:
    if shutil.which("qemu-system-x86_64") is None:
        pytest.skip("VMS-TEST-NO-QEMU: apt install qemu-system-x86")

    def body() -> None:
        assert deny_system_calls()
        asked = [{"execute": name} for name in ("qmp_capabilities", "cont", "query-status", "quit")]
        done = subprocess.run(
            [
                *("qemu-system-x86_64", "-machine", "q35", "-nodefaults", "-display", "none"),
                *("-S", "-accel", "tcg,thread=multi", "-smp", "2", "-qmp", "stdio", "-sandbox"),
                "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
            ],
            input="".join(json.dumps(command) + "\n" for command in asked),
            capture_output=True,
            text=True,
            check=False,
            timeout=50,
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert '"status": "running"' in done.stdout

    in_child(body)
