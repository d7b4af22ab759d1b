"""Processes named for good."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_vmsandbox.linux import (
    MountFlags,
    ProcessIdentity,
    ProcessStat,
    mount,
    pidfd_send_signal,
    read_boot_id,
)
from pytest_vmsandbox.linux import process_identity as module

InChild = Callable[..., None]


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


def end_without_reaping(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)


def test_we_are_ourselves_and_alive() -> None:
    me = ProcessIdentity.current()

    assert me == ProcessIdentity.of(os.getpid())
    assert me.pid == os.getpid()
    assert me.boot_id == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert me.is_alive()


def test_a_process_is_alive_until_it_is_a_zombie(sleeper: subprocess.Popen[bytes]) -> None:
    it = ProcessIdentity.of(sleeper.pid)
    assert it.is_alive()

    end_without_reaping(sleeper)
    assert ProcessStat.read(sleeper.pid).state == "Z"
    assert not it.is_alive()
    assert ProcessIdentity.of(sleeper.pid) == it

    sleeper.wait()
    assert not it.is_alive()
    with pytest.raises(ProcessLookupError, match="/proc/"):
        ProcessIdentity.of(sleeper.pid)


def test_a_reused_pid_is_another_process() -> None:
    me = ProcessIdentity.current()

    assert not replace(me, start_ticks=me.start_ticks + 1).is_alive()
    assert not replace(me, boot_id="00000000-0000-0000-0000-000000000000").is_alive()
    for other in (
        replace(me, start_ticks=me.start_ticks - 1),
        replace(me, boot_id="00000000-0000-0000-0000-000000000000"),
    ):
        before = sorted(Path("/proc/self/fd").iterdir())
        with pytest.raises(ProcessLookupError, match="pidfd_open"):
            other.open_pidfd()
        assert sorted(Path("/proc/self/fd").iterdir()) == before


def test_it_is_opened_as_long_as_it_is_the_same(sleeper: subprocess.Popen[bytes]) -> None:
    it = ProcessIdentity.of(sleeper.pid)
    with it.open_pidfd() as pidfd:
        pidfd_send_signal(pidfd, signal.SIGSTOP)
    assert it.is_alive()  # stopped is not dead

    end_without_reaping(sleeper)
    with pytest.raises(ProcessLookupError):
        it.open_pidfd()
    sleeper.wait()
    with pytest.raises(ProcessLookupError):
        it.open_pidfd()


def test_a_process_lives_on_when_only_its_first_thread_left() -> None:
    code = """
import ctypes, threading, sys
def rest():
    print("ready", flush=True)
    sys.stdin.read()
    import os
    os._exit(0)
threading.Thread(target=rest).start()
ctypes.CDLL(None).syscall({exit}, 0)
"""
    number = {"x86_64": 60, "s390x": 1}.get(os.uname().machine, 93)
    with subprocess.Popen(
        [sys.executable, "-c", code.format(exit=number)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout
        process.stdout.readline()
        it = ProcessIdentity.of(process.pid)
        while ProcessStat.read(process.pid).state != "Z":
            os.sched_yield()

        assert it.is_alive()
        it.open_pidfd().close()
        process.communicate(b"")
    assert not it.is_alive()


def test_where_proc_hides_a_process_doubt_means_alive(in_room: InChild) -> None:
    def body() -> None:
        child = subprocess.Popen(["sleep", "60"])
        it = ProcessIdentity.of(child.pid)
        Path("empty/sys/kernel/random").mkdir(parents=True)
        Path("empty/sys/kernel/random/boot_id").write_text(it.boot_id)
        mount("empty", "/proc", None, MountFlags.BIND)
        assert it.is_alive()
        # One that we may not signal is there too.
        assert replace(it, pid=1).is_alive()
        child.kill()
        child.wait()
        assert not it.is_alive()

    in_room(body)


def test_what_can_not_be_read_is_not_said_to_be_dead(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    me = ProcessIdentity.current()
    boot_id = tmp_path / "sys/kernel/random/boot_id"
    boot_id.parent.mkdir(parents=True)
    boot_id.write_text(me.boot_id)
    (tmp_path / str(me.pid) / "stat").mkdir(parents=True)  # reading a directory is an OSError
    monkeypatch.setattr(module, "_PROC", tmp_path)

    assert me.is_alive()


def test_without_proc_there_is_no_boot_id(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "_PROC", tmp_path)

    with pytest.raises(OSError, match="boot_id") as caught:
        read_boot_id()
    assert caught.value.errno == errno.ENOSYS


NASTY = ["a) R 1 1 1", "(", ")", "a b", "((", "x\n(y)", "Z)"]


@pytest.mark.parametrize("name", NASTY)
def test_a_program_may_have_any_name(name: str) -> None:
    code = """
import sys
open("/proc/self/comm", "w").write(sys.argv[1])
print("ready", flush=True)
sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout
        process.stdout.readline()

        stat = ProcessStat.read(process.pid)

        assert stat.pid == process.pid
        assert stat.comm == name.rstrip("\n")
        assert stat.parent_pid == os.getpid()
        assert stat.threads == 1
        assert ProcessIdentity.of(process.pid).is_alive()
        process.communicate(b"")


@given(st.binary(max_size=20).filter(lambda name: b"\0" not in name))
def test_the_name_never_moves_the_other_fields(name: bytes) -> None:
    fields = b"S 1 2 2 0 -1 4194560 0 0 0 0 0 0 0 0 20 0 3 0 6543 0 0"

    stat = ProcessStat.parse(b"42 (" + name + b") " + fields + b"\n")

    assert (stat.pid, stat.state, stat.parent_pid) == (42, "S", 1)
    assert (stat.threads, stat.start_ticks) == (3, 6543)
    assert os.fsencode(stat.comm) == name


@pytest.mark.parametrize(
    "line",
    [b"", b"42", b"42 (x", b"42 x) S" + b" 1" * 30, b"42 (x) S 1 2", b"x (x) S" + b" 1" * 30],
)
def test_anything_else_is_no_stat(line: bytes) -> None:
    with pytest.raises(ValueError, match=r"not a line of|invalid literal"):
        ProcessStat.parse(line)
