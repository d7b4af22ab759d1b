"""prctl(2), in children."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pytest_vmsandbox.linux import (
    PrctlOption,
    prctl,
    prctl_set_child_subreaper,
    prctl_set_no_new_privs,
    prctl_set_pdeathsig,
)

InChild = Callable[..., None]


def test_an_option_is_set_and_read_back(in_child: InChild) -> None:
    def body() -> None:
        name = ctypes.create_string_buffer(b"renamed")
        prctl(PrctlOption.SET_NAME, ctypes.addressof(name))
        assert Path("/proc/self/comm").read_text() == "renamed\n"
        assert prctl(PrctlOption.SET_DUMPABLE, 0) == 0
        assert prctl(PrctlOption.GET_DUMPABLE) == 0
        prctl(PrctlOption.SET_DUMPABLE, 1)
        assert prctl(PrctlOption.GET_DUMPABLE) == 1

    in_child(body)


def test_what_the_kernel_refuses_names_the_call() -> None:
    with pytest.raises(OSError, match="prctl: Invalid argument") as caught:
        prctl(PrctlOption.SET_DUMPABLE, 77)

    assert caught.value.errno == errno.EINVAL


def test_a_negative_argument_is_the_long_that_it_stands_for() -> None:
    # PR_SET_NO_NEW_PRIVS wants exactly 1, so that -1 is refused however it is spelled.
    for value in (-1, 2**64 - 1):
        with pytest.raises(OSError, match="prctl: Invalid argument"):
            prctl(PrctlOption.SET_NO_NEW_PRIVS, value)


@pytest.mark.parametrize("value", [-(2**63) + 5, 2**63 + 5])
def test_an_argument_reaches_the_kernel_with_all_its_bits(in_child: InChild, value: int) -> None:
    def body(given: int) -> None:
        prctl(PrctlOption.SET_TIMERSLACK, given)
        assert Path("/proc/self/timerslack_ns").read_text() == f"{2**63 + 5}\n"

    in_child(body, value)


@pytest.mark.parametrize("option", [0, -1, 17, 2**31, 2**40 + 1, 2**63, 2**64 + 1])
def test_an_unknown_option_is_refused(option: int) -> None:
    with pytest.raises(ValueError, match=f"^prctl: no such option: {option}$"):
        prctl(option)


def test_a_child_dies_with_its_parent(in_child: InChild) -> None:
    def body() -> None:
        reader, writer = os.pipe()
        parent = os.fork()
        if parent == 0:
            if os.fork() == 0:
                os.close(reader)
                prctl_set_pdeathsig(signal.SIGKILL)
                os.write(writer, b"set")
                signal.pause()
            signal.pause()
        os.close(writer)
        assert os.read(reader, 9) == b"set"
        os.kill(parent, signal.SIGKILL)
        os.waitpid(parent, 0)
        assert os.read(reader, 9) == b""  # the end of the pipe: the grandchild is gone

    in_child(body)


def test_the_death_signal_is_taken_back(in_child: InChild) -> None:
    def body() -> None:
        def now() -> int:
            number = ctypes.c_int(-1)
            prctl(PrctlOption.GET_PDEATHSIG, ctypes.addressof(number))
            return number.value

        prctl_set_pdeathsig(signal.SIGTERM)
        assert now() == signal.SIGTERM
        prctl_set_pdeathsig(64)
        assert now() == 64
        prctl_set_pdeathsig(0)
        assert now() == 0

    in_child(body)


def test_a_subreaper_gets_the_orphans(in_child: InChild) -> None:
    def body() -> None:
        def adopted() -> bool:
            reader, writer = os.pipe()
            middle = os.fork()
            if middle == 0:
                if os.fork():
                    os._exit(0)
                os.read(reader, 1)
                os._exit(7)
            os.close(reader)
            os.waitpid(middle, 0)
            os.write(writer, b"x")
            os.close(writer)
            try:
                _pid, status = os.wait()
            except ChildProcessError:
                return False
            return os.waitstatus_to_exitcode(status) == 7

        assert not adopted()
        prctl_set_child_subreaper()
        assert adopted()
        prctl_set_child_subreaper(enabled=False)
        assert not adopted()

    in_child(body)


def test_new_privileges_are_given_up_for_good(in_child: InChild) -> None:
    def body() -> None:
        prctl_set_no_new_privs()
        assert prctl(PrctlOption.GET_NO_NEW_PRIVS) == 1
        inside = "print('NoNewPrivs:\\t1' in open('/proc/self/status').read())"
        done = subprocess.run([sys.executable, "-c", inside], capture_output=True, check=True)
        assert done.stdout == b"True\n"

    in_child(body)
