"""The server: reads requests one by one, performs each, answers it, and tells who has ended."""

from __future__ import annotations

import errno
import json
import os
import select
import signal
import socket
import stat
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass

from pytest_vmsandbox.errors import RequestInvalid, VmSandboxError
from pytest_vmsandbox.linux.owned_fd import OwnedFd
from pytest_vmsandbox.linux.packets import receive_packet
from pytest_vmsandbox.linux.pidfd import pidfd_send_signal
from pytest_vmsandbox.warden.groups import Group, Hierarchy
from pytest_vmsandbox.warden.launch import (
    Launched,
    LaunchFailed,
    User,
    launch,
    sentence_of,
    whatever_is_in_flight,
)
from pytest_vmsandbox.warden.requests import (
    DESCRIPTORS_AT_MOST,
    PACKET_BYTES,
    Connect,
    Launch,
    OpenFile,
    Request,
    Signal,
    Who,
    parse_packet,
    parse_request,
)
from pytest_vmsandbox.warden.validation import signal_target


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What is sent back: a form, and descriptors that go with it and are closed here then."""

    form: dict[str, object]
    descriptors: Sequence[OwnedFd | socket.socket] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Held:
    """A process that was launched and has not ended, and its control group."""

    launched: Launched
    group: Group | None

    def close(self) -> None:
        self.launched.pidfd.close()
        if self.launched.room is not None:
            self.launched.room.close()
        if self.group is not None:
            self.group.close()


class Server:
    """Serves one line until its other end is closed; then everything that it launched is ended."""

    def __init__(
        self, line: socket.socket, *, users: dict[Who, User], hierarchies: Sequence[Hierarchy]
    ) -> None:
        self._line = line
        self._users = users
        self._hierarchies = hierarchies
        self._held: dict[int, _Held] = {}

    def serve(self, *, lifeline: int) -> None:
        """Answer until the line ends, or the process at the other end of `lifeline` does."""
        woken, wake = socket.socketpair()
        for end in (woken, wake):
            end.settimeout(0)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # or no wakeup is written
        signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
        poller = select.poll()
        for descriptor in (self._line.fileno(), woken.fileno(), lifeline):
            poller.register(descriptor, select.POLLIN)
        try:
            while True:
                ready = {descriptor for descriptor, _ in poller.poll()}
                if lifeline in ready:
                    return
                if woken.fileno() in ready:
                    with suppress(BlockingIOError):
                        woken.recv(4096)
                    self._reap()
                if self._line.fileno() in ready and not self._serve_one():
                    return
        finally:
            self._end_all()

    def _serve_one(self) -> bool:
        """Read a request and answer it; False once the line has ended."""
        try:
            packet, descriptors, flags = receive_packet(
                self._line, bytes_at_most=PACKET_BYTES, descriptors_at_most=DESCRIPTORS_AT_MOST
            )
        except ConnectionResetError:  # it has ended, with answers that nobody read
            return False
        with ExitStack() as given:
            owned = [given.enter_context(OwnedFd(descriptor)) for descriptor in descriptors]
            if not packet and not owned:
                return False
            if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                self._refuse(None, RequestInvalid("the request is too long, or holds too much"))
                return True
            self._answer(packet, owned)
        return True

    def _answer(self, packet: bytes, descriptors: Sequence[OwnedFd]) -> None:
        number = None
        try:
            number, form = parse_packet(packet)
            request = parse_request(form, descriptors=len(descriptors))
            answer = self._perform(request, descriptors)
        except (VmSandboxError, LaunchFailed, OSError, ValueError) as error:
            self._refuse(number, error)
            return
        with ExitStack() as sent:
            for descriptor in answer.descriptors:
                sent.enter_context(descriptor)
            self._send({"number": number, **answer.form}, answer.descriptors)

    def _refuse(self, number: int | None, error: Exception) -> None:
        match error:
            case LaunchFailed(code=code, sentence=sentence):
                form: dict[str, object] = {"errno": code, "refused": sentence}
            case OSError():
                form = {"errno": error.errno or errno.EIO, "refused": sentence_of(error)}
            case _:
                form = {"errno": None, "refused": str(error)}
        self._send({"number": number, **form})

    def _send(
        self, form: dict[str, object], descriptors: Sequence[OwnedFd | socket.socket] = ()
    ) -> None:
        numbers = [descriptor.fileno() for descriptor in descriptors]
        # Who has gone away is told nothing; the end of the line is read next.
        with suppress(BrokenPipeError, ConnectionResetError), whatever_is_in_flight():
            socket.send_fds(self._line, [json.dumps(form).encode()], numbers)

    # The operations

    def _perform(self, request: Request, descriptors: Sequence[OwnedFd]) -> Answer:
        match request:
            case Launch():
                return self._launch(request, descriptors)
            case Connect():
                return Answer(form={}, descriptors=[_connect(self._room(request), request.socket)])
            case OpenFile():
                return Answer(form={}, descriptors=[_open_file(self._room(request), request.file)])
            case Signal():
                pidfd_send_signal(self._process(request.process), request.signal)
                return Answer(form={})

    def _launch(self, order: Launch, descriptors: Sequence[OwnedFd]) -> Answer:
        with ExitStack() as undo:
            group: Group | None = None
            confine: Callable[[], None] = _nothing
            if order.group is not None and self._hierarchies:
                group = Group(order.group, hierarchies=self._hierarchies, limits=order.limits)
                undo.callback(group.close)
                confine = group.enter
            launched = launch(order, descriptors, user=self._users[order.who], confine=confine)
            self._held[launched.pid] = _Held(launched=launched, group=group)
            undo.pop_all()
        pidfd = OwnedFd(os.dup(launched.pidfd))
        return Answer(form={"process": launched.pid}, descriptors=[pidfd])

    def _process(self, pid: int) -> OwnedFd:
        return self._held[signal_target(pid, self._pidfds())].launched.pidfd

    def _pidfds(self) -> dict[int, int]:
        return {pid: held.launched.pidfd for pid, held in self._held.items()}

    def _room(self, request: Connect | OpenFile) -> OwnedFd:
        if request.process not in self._held:  # it may just have ended: whoever asks can't know
            raise ProcessLookupError(errno.ESRCH, f"there is no process {request.process} here")
        room = self._held[request.process].launched.room
        if room is None:
            raise RequestInvalid(f"process {request.process} was launched without a room")
        return room

    # Who has ended

    def _reap(self) -> None:
        """Reap every child that has ended: ours, and orphans, since we are pid 1."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if held := self._held.pop(pid, None):
                held.close()
                self._send({"ended": pid, "returncode": os.waitstatus_to_exitcode(status)})

    def _end_all(self) -> None:
        for held in self._held.values():
            with suppress(ProcessLookupError):
                pidfd_send_signal(held.launched.pidfd, signal.SIGKILL)
        for held in self._held.values():
            with suppress(ChildProcessError):
                os.waitid(os.P_PIDFD, held.launched.pidfd, os.WEXITED)
            held.close()
        self._held.clear()


def _nothing() -> None:
    """No control group is asked for, or none can be had."""


def _connect(room: OwnedFd, name: str) -> socket.socket:
    """A connection to a socket in a room; only to a socket, whatever the process put there."""
    # Opened before it is looked at, and connected through that very descriptor: a symbolic link
    # put there in between leads nowhere.
    with OwnedFd(os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=room)) as place:
        if not stat.S_ISSOCK(os.fstat(place).st_mode):
            raise OSError(errno.ENOTSOCK, "not a socket", name)
        return _connected(f"/proc/self/fd/{int(place)}")


def _connected(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(0)  # a full backlog must not stop the warden
        sock.connect(path)
    except BaseException:
        sock.close()
        raise
    return sock


def _open_file(room: OwnedFd, name: str) -> OwnedFd:
    """A regular file in a room, open for reading."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    file = OwnedFd(os.open(name, flags, dir_fd=room))
    if not stat.S_ISREG(os.fstat(file).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a regular file", name)
    return file
