"""Doing something in another user's place: the kernel then checks what that user may do."""

from __future__ import annotations

import os
import pwd
import select
import signal
from collections.abc import Callable
from contextlib import ExitStack

from pytest_vmsandbox.deadline import Deadline
from pytest_vmsandbox.linux import pidfd_open, pidfd_reap, pidfd_send_signal

_NOBODY = 65534
_CHUNK_BYTES = 64 * 1024
_DONE, _FAILED = "done", "failed"


def call_as_user(uid: int, work: Callable[[], str], *, deadline: Deadline) -> str:
    """What `work` returns when that user does it, in a forked child; we are root.

    Raises OSError when it raised anything, the user could not be taken on, or killed it, which they
    may, and TimedOut, with the child gone, at the deadline: that user's file systems may never
    answer. There should be no other threads in this process.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        _be_the_child(uid, work, writing)
    with ExitStack() as undo:
        undo.callback(os.close, reading)
        os.close(writing)
        child = undo.enter_context(pidfd_open(pid))
        undo.callback(_end, child)
        kind, answer = _parse(_read_all(reading, deadline=deadline))
    if kind != _DONE:
        raise OSError(f"as uid {uid}: {answer}")
    return answer


def _render(kind: str, answer: str) -> bytes:
    """A line with the kind and the length of the answer, and the answer."""
    data = answer.encode(errors="backslashreplace")
    return b"%s %d\n%s" % (kind.encode(), len(data), data)


def _parse(message: bytes) -> tuple[str, str]:
    """Kind and answer; a failure where it is not whole."""
    head, _, data = message.partition(b"\n")
    kind, _, length = head.decode().partition(" ")
    if not length.isdecimal() or int(length) != len(data):
        return _FAILED, "it ended without an answer"
    return kind, data.decode()


def _be_the_child(uid: int, work: Callable[[], str], writing: int) -> None:
    status = 1
    try:
        _become(uid)
        try:
            message = _render(_DONE, work())
        except Exception as error:  # noqa: BLE001  # it is told to the parent
            message = _render(_FAILED, str(error))
        with open(writing, "wb") as pipe:  # it is a descriptor
            pipe.write(message)
        status = 0
    finally:
        # Nothing of the parent's is to be closed, flushed or undone here.
        os._exit(status)


def _become(uid: int) -> None:
    """Be that user for good, with the groups that the user database says, or none."""
    try:
        user = pwd.getpwuid(uid)
        groups, group = os.getgrouplist(user.pw_name, user.pw_gid), user.pw_gid
    except KeyError:
        groups, group = [], _NOBODY
    os.setgroups(groups)
    os.setresgid(group, group, group)
    os.setresuid(uid, uid, uid)


def _read_all(descriptor: int, *, deadline: Deadline) -> bytes:
    poller = select.poll()
    poller.register(descriptor, select.POLLIN)
    chunks: list[bytes] = []
    while True:
        timeout_s = deadline.timeout_s
        if not poller.poll(None if timeout_s is None else timeout_s * 1000):
            raise deadline.timed_out("an answer in another user's place")
        chunk = os.read(descriptor, _CHUNK_BYTES)
        if not chunk:
            return b"".join(chunks)
        chunks.append(chunk)


def _end(child: int) -> None:
    pidfd_send_signal(child, signal.SIGKILL)  # harmless once it has ended
    poller = select.poll()
    poller.register(child, select.POLLIN)
    poller.poll()
    pidfd_reap(child)
