"""Processes by descriptor."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from pytest_vmsandbox.deadline import Deadline
from pytest_vmsandbox.linux import (
    ExitStatus,
    PidFDFlags,
    pidfd_is_alive,
    pidfd_open,
    pidfd_reap,
    pidfd_send_signal,
    pidfd_wait_exit,
)

InChild = Callable[..., None]
SOON_S = 20


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


def in_time() -> Deadline:
    return Deadline.after(seconds=SOON_S)


def test_a_running_child_is_alive_until_it_is_killed(sleeper: subprocess.Popen[bytes]) -> None:
    with pidfd_open(sleeper.pid) as pidfd:
        assert not os.get_inheritable(pidfd)
        assert pidfd_is_alive(pidfd)
        assert pidfd_reap(pidfd) is None
        assert not pidfd_wait_exit(pidfd, deadline=Deadline.after(seconds=0.01))

        pidfd_send_signal(pidfd, signal.SIGTERM)

        assert pidfd_wait_exit(pidfd, deadline=in_time())
        assert not pidfd_is_alive(pidfd)


def test_a_zombie_is_not_alive_and_hears_no_signal(sleeper: subprocess.Popen[bytes]) -> None:
    with pidfd_open(sleeper.pid) as pidfd:
        pidfd_send_signal(pidfd, signal.SIGKILL)
        assert pidfd_wait_exit(pidfd, deadline=Deadline.after(seconds=None))

        os.kill(sleeper.pid, 0)  # what others ask: it says yes
        pidfd_send_signal(pidfd, 0)
        assert not pidfd_is_alive(pidfd)
        with pidfd_open(sleeper.pid) as again:
            assert not pidfd_is_alive(again)


def test_a_reaped_process_is_gone_for_good(sleeper: subprocess.Popen[bytes]) -> None:
    with pidfd_open(sleeper.pid) as pidfd:
        sleeper.kill()
        sleeper.wait()

        assert not pidfd_is_alive(pidfd)
        with pytest.raises(ProcessLookupError, match="pidfd_send_signal"):
            pidfd_send_signal(pidfd, signal.SIGKILL)
        with pytest.raises(ChildProcessError):
            pidfd_reap(pidfd)


@pytest.mark.parametrize(
    ("ending", "returncode"),
    [("raise SystemExit(0)", 0), ("raise SystemExit(7)", 7), ("os.abort()", -signal.SIGABRT)],
)
def test_reaping_tells_how_a_child_ended(ending: str, returncode: int) -> None:
    # Not through subprocess, which would reap it itself.
    pid = os.posix_spawn(sys.executable, [sys.executable, "-c", f"import os; {ending}"], os.environ)
    with pidfd_open(pid) as pidfd:
        assert pidfd_wait_exit(pidfd, deadline=in_time())
        assert pidfd_reap(pidfd) == ExitStatus(pid=pid, returncode=returncode)
        with pytest.raises(ChildProcessError):
            pidfd_reap(pidfd)


def test_anothers_process_is_watched_but_not_signalled(in_child: InChild, user_id: int) -> None:
    if user_id == 0:
        pytest.skip("VMS-TEST-ROOT: root may signal everybody")

    def body() -> None:
        with pidfd_open(1) as pidfd:
            assert pidfd_is_alive(pidfd)
            with pytest.raises(PermissionError):
                pidfd_send_signal(pidfd, 0)

    in_child(body)


def test_a_process_that_is_not_there_can_not_be_opened() -> None:
    with pytest.raises(ProcessLookupError, match="pidfd_open"):
        pidfd_open(2**22 + 1)


def test_a_descriptor_can_be_asked_not_to_block(sleeper: subprocess.Popen[bytes]) -> None:
    with pidfd_open(sleeper.pid, PidFDFlags.NONBLOCK) as pidfd:
        assert not os.get_blocking(pidfd)


def test_without_linux_there_is_nothing_to_reap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")

    with pytest.raises(OSError, match="waitid: Function not implemented"):
        pidfd_reap(0)


def test_a_closed_descriptor_is_no_dead_process(sleeper: subprocess.Popen[bytes]) -> None:
    pidfd = pidfd_open(sleeper.pid)
    pidfd.close()

    with pytest.raises(OSError, match="poll of a pidfd") as caught:
        pidfd_is_alive(pidfd)
    assert caught.value.errno == errno.EBADF
