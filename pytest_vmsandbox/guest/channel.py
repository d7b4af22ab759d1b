"""The channel: the host's end of one agent's line, with everything that goes over it.

It runs on one asyncio loop. The guest is not trusted: whatever it sends that no agent of ours would
send ends this channel (ChannelLost), and nothing else. A cancelled call leaves the channel usable.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

from pytest_vmsandbox.deadline import Deadline
from pytest_vmsandbox.errors import ChannelLost
from pytest_vmsandbox.guest import files
from pytest_vmsandbox.guest.connection import GuestConnection
from pytest_vmsandbox.guest.frames import (
    FRAME_MAX,
    Frame,
    FrameType,
    ProtocolViolated,
    encode_frame,
)
from pytest_vmsandbox.guest.furnishing import Interface, encode_addresses
from pytest_vmsandbox.guest.heartbeat import Heartbeat
from pytest_vmsandbox.guest.job import Job
from pytest_vmsandbox.guest.line import Line
from pytest_vmsandbox.guest.messages import (
    PROTOCOL_VERSION,
    TOKEN_SIZE,
    ExecRequest,
    Hello,
    Identity,
    Power,
    TransferKind,
    encode_connect,
    encode_exec,
    encode_hello,
    encode_request,
    encode_transfer,
    parse_failure,
    parse_status,
    parse_welcome,
)
from pytest_vmsandbox.guest.process import GuestProcess
from pytest_vmsandbox.guest.reply import Reply
from pytest_vmsandbox.guest.streams import READ_WINDOW
from pytest_vmsandbox.guest.waiting import Changes, fresh

SILENCE_S = 30.0
# The first hello may vanish (virtio-serial drops what is sent while it opens), so it is repeated;
# half a frame of a former host may have swallowed it, so later ones come with padding, which
# completes any frame. Not at once: a booting guest would have to read the padding first.
_FIRST_RETRY_S = 0.25
_PAD_AFTER_S = 3.0
_PADDING = bytes(FRAME_MAX)

NOBODY = Identity()


async def open_channel(  # noqa: PLR0913 - each a fact of its own about one handshake
    sock: socket.socket,
    *,
    name: str,
    nonce: str,
    deadline: Deadline,
    identity: Identity = NOBODY,
    keep_processes: bool = False,
    used_before: bool = False,
    silence_s: float = SILENCE_S,
) -> Channel:
    """A channel to the agent behind `sock`, which the caller has connected and verified.

    `used_before` says that a former host has used this line, and may have left half a frame on it.

    Raises TimedOut when no agent answers by the deadline, ChannelLost when the line breaks or
    another machine answers; `sock` is closed then. Otherwise it belongs to the channel.
    """
    channel = Channel(name=name, silence_s=silence_s)
    try:
        await channel.connect(sock)
        await channel.handshake(
            nonce=nonce,
            deadline=deadline,
            identity=identity,
            keep_processes=keep_processes,
            used_before=used_before,
        )
    except BaseException:
        await channel.close()
        raise
    return channel


class Channel:
    """One agent, reached. `hello` holds what it said of itself at the last handshake."""

    hello: Hello

    def __init__(self, *, name: str, silence_s: float = SILENCE_S) -> None:
        self.name = name
        # Told when the line breaks by itself. A line that breaks is mostly a sign of something
        # else: whoever listens finds out what, and says it by fail(); until then waits go on.
        self.on_lost: Callable[[ChannelLost], None] = self.fail
        self._line = Line(self)
        self._jobs: dict[int, Job] = {}
        self._replies: dict[int, Reply] = {}
        self._last_id = 0
        self._error: BaseException | None = None
        self._token: bytes | None = None
        self._welcome: Hello | None = None
        self._changes = Changes()
        self._beats: dict[int, Reply] = {}
        self.heartbeat = Heartbeat(
            silence_s=silence_s,
            ping=self._beat,
            received=lambda: self._line.bytes_received,
            fell_silent=lambda: self.line_broke(f"the guest has been silent for {silence_s:g} s"),
        )

    async def connect(self, sock: socket.socket) -> None:
        """Take over the socket; nothing is sent yet."""
        try:
            await asyncio.get_running_loop().create_unix_connection(lambda: self._line, sock=sock)
        except BaseException:
            sock.close()
            raise

    # ---- handshake ----

    async def handshake(
        self,
        *,
        nonce: str,
        deadline: Deadline,
        identity: Identity = NOBODY,
        keep_processes: bool = False,
        used_before: bool = False,
    ) -> Hello:
        """Introduce ourselves (again, after a reboot or a restore) and learn who answers.

        Outstanding work fails with ChannelLost first. The agent kills what a former session had
        started, or lets it run on unheard if `keep_processes`, and gives the machine `identity`.
        Raises TimedOut when nobody answers by the deadline, ChannelLost when another machine does,
        or one that says it is not what it was told to be, OSError of the guest when the machine
        can't have that identity.
        """
        self._require_usable()
        self._fail_outstanding(ChannelLost(self.name, "the channel was opened anew"))
        self._token, self._welcome = os.urandom(TOKEN_SIZE), None
        self._line.parser.hunt()
        token, began = self._token, time.monotonic_ns()

        def hello() -> bytes:
            passed = time.monotonic_ns() - began  # the clock has gone on when it is repeated
            now = replace(identity, unix_ns=identity.unix_ns and identity.unix_ns + passed)
            return encode_hello(token, keep_processes=keep_processes, identity=now)

        pad_after_s = 0.0 if used_before else _PAD_AFTER_S
        answer = await self._introduce(hello, deadline=deadline, pad_after_s=pad_after_s)
        self._check_identity(answer, nonce=nonce, given=identity)
        self.hello = answer
        if answer.refusal is not None:
            raise answer.refusal
        return answer

    async def _introduce(
        self, hello: Callable[[], bytes], *, deadline: Deadline, pad_after_s: float
    ) -> Hello:
        began, wait_s = time.monotonic(), _FIRST_RETRY_S
        self._line.send(hello())
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(min(wait_s, deadline.left_s)):
                    return await self._wait_welcome()
            if deadline.passed:
                raise deadline.timed_out(f"{self.name}: the agent's hello", self._last_seen())
            wait_s *= 2
            if self._line.waits_to_send == 0:
                padded = time.monotonic() - began >= pad_after_s
                self._line.send(_PADDING + hello() if padded else hello())

    async def _wait_welcome(self) -> Hello:
        while self._welcome is None:
            self._require_usable()
            await self._changes.wait()
        return self._welcome

    def _check_identity(self, answer: Hello, *, nonce: str, given: Identity) -> None:
        cause = ""
        if answer.protocol != PROTOCOL_VERSION:
            cause = f"its agent speaks protocol {answer.protocol}, we speak {PROTOCOL_VERSION}"
        elif answer.nonce != nonce:
            cause = f"another machine answered: nonce {answer.nonce!r}, expected {nonce!r}"
        elif answer.refusal is None:
            cause = _what_it_is_not(answer, given)
        if cause:
            self._lose(ChannelLost(self.name, cause))
            self._require_usable()

    def _last_seen(self) -> str:
        received = self._line.bytes_received
        return f"{received} bytes came over its line" if received else "nothing came over its line"

    # ---- requests ----

    async def ping(self, *, deadline: Deadline) -> float:
        """The seconds until the agent answered; TimedOut when it does not by the deadline."""
        began = time.monotonic()
        try:
            async with asyncio.timeout(deadline.timeout_s):
                await self._request(FrameType.PING)
        except TimeoutError:
            raise deadline.timed_out(f"{self.name}: an answer to a ping") from None
        return time.monotonic() - began

    async def spawn(self, request: ExecRequest) -> GuestProcess:
        """Start a command; OSError of the guest (FileNotFoundError, ...) when that fails.

        When cancelled, the process is killed if it has come to be.
        """
        payload = encode_exec(request, window=READ_WINDOW)
        has_stderr = request.pty is None and not request.merge_stderr
        has_stdin = request.stdin or request.pty is not None
        job = self._start(FrameType.EXEC, payload, stdin=has_stdin, stderr=has_stderr)
        return GuestProcess(job, self, pid=await self._started(job))

    async def dial(self, address: IPv4Address | IPv6Address, port: int) -> GuestConnection:
        """Connect to a TCP port from inside the guest; OSError of the guest, as of connect(2).

        When cancelled, it is given up.
        """
        payload = encode_connect(address, port, window=READ_WINDOW)
        job = self._start(FrameType.CONNECT, payload, stdin=True, stderr=False)
        await self._started(job)
        return GuestConnection(job, self)

    async def read_file(self, path: str, *, offset: int = 0, limit: int | None = None) -> bytes:
        """The file's bytes from `offset`, at most `limit`; OSError as open() would raise it."""
        return await files.read_file(self, path, offset=offset, limit=limit)

    async def write_file(
        self, path: str, data: bytes, *, mode: int | None = None, owner: str | None = None
    ) -> None:
        """Make `path` a file of exactly `data`, at once (see files.write_file)."""
        await files.write_file(self, path, data, mode=mode, owner=owner)

    async def push(self, source: Path, target: str) -> None:
        """Copy a host file or tree to the guest (see files.push)."""
        await files.push(self, source, target)

    async def pull(self, source: str, target: Path, *, limit_bytes: int | None = None) -> None:
        """Copy a file or tree of the guest to the host (see files.pull)."""
        await files.pull(self, source, target, limit_bytes=limit_bytes)

    async def set_addresses(self, interface: Interface) -> None:
        """Give it its addresses instead of those it has, and bring it up.

        It can carry then, if it has a carrier. Without any address it is down in the end, and is
        up at once when it has one; connections from the addresses that it had have been ended, as
        far as the guest's kernel can.
        """
        more = encode_addresses(interface)
        await files.perform(self, TransferKind.ADDRESSES, path=interface.name, more=more)

    async def sync(self) -> None:
        """Write everything to the guest's disks (sync(2)); returns when that has finished."""
        await files.perform(self, TransferKind.SYNC)

    async def poweroff(self) -> None:
        """Ask for an orderly end; returns when the agent has begun with it."""
        await self._request(FrameType.POWER, bytes((Power.OFF,)))

    async def reboot(self) -> None:
        """Ask for an orderly reboot; returns when the agent has begun with it."""
        await self._request(FrameType.POWER, bytes((Power.REBOOT,)))

    # ---- jobs, for processes and transfers ----

    def start_transfer(self, kind: TransferKind, **fields: object) -> Job:
        """Start a transfer; its stdin can be written at once."""
        payload = encode_transfer(kind, window=READ_WINDOW, **fields)  # type: ignore[arg-type] # checked there
        return self._start(FrameType.TRANSFER, payload, stdin=True, stderr=True)

    async def signal_job(self, job: Job, signal_number: int) -> None:
        """Part of process.JobControl."""
        if job.is_over:
            return
        payload = job.id.to_bytes(4, "little") + int(signal_number).to_bytes(4, "little")
        await self._request(FrameType.SIGNAL, payload)

    async def kill_job(self, job: Job) -> None:
        """Part of process.JobControl."""
        if not job.is_over:
            await self._request(FrameType.KILL, job.id.to_bytes(4, "little"))

    async def resize_job(self, job: Job, *, rows: int, columns: int) -> None:
        """Part of process.JobControl."""
        size = rows.to_bytes(2, "little") + columns.to_bytes(2, "little")
        await self._request(FrameType.RESIZE, job.id.to_bytes(4, "little") + size)

    def abandon(self, job: Job) -> None:
        """Nobody waits for it any more: kill it, and read nothing of it. Never waits."""
        if not job.is_over and self._error is None:
            self._send_request(FrameType.KILL, job.id.to_bytes(4, "little"))
        job.close_outputs()

    def _start(self, type_: FrameType, payload: bytes, *, stdin: bool, stderr: bool) -> Job:
        self._require_usable()
        job = Job(line=self._line, id_=self._next_id(), stdin=stdin, stderr=stderr)
        frames = encode_request(type_, id_=job.id, payload=payload)
        self._jobs[job.id] = job
        self._line.send(frames)
        self._arrange_heartbeat()
        return job

    async def _started(self, job: Job) -> int:
        try:
            return await job.wait_started()
        except asyncio.CancelledError:
            self.abandon(job)
            raise

    async def _request(self, type_: FrameType, payload: bytes = b"") -> None:
        self._require_usable()
        await self._send_request(type_, payload).wait()

    def _send_request(self, type_: FrameType, payload: bytes = b"") -> Reply:
        id_, reply = self._next_id(), Reply()
        frame = encode_frame(type_, id_=id_, payload=payload)
        self._replies[id_] = reply  # kept until it is answered, whether or not anybody waits
        self._line.send(frame)
        self._arrange_heartbeat()
        return reply

    def _next_id(self) -> int:
        self._last_id = self._last_id % 0xFFFFFFFF + 1
        return self._last_id

    def _beat(self) -> None:
        if not self._beats:  # one at a time, and it does not keep itself alive
            id_ = self._next_id()
            self._beats[id_] = Reply()
            self._line.send(encode_frame(FrameType.PING, id_=id_))

    def _arrange_heartbeat(self) -> None:
        self.heartbeat.want(wanted=bool(self._jobs or self._replies) and self._error is None)

    # ---- what the line tells ----

    def frame_came(self, frame: Frame) -> None:
        """Part of line.Listener."""
        match frame.type:
            case FrameType.WELCOME:
                self._welcomed(frame.payload)
            case FrameType.DONE | FrameType.FAILED:
                self._answered(frame)
            case FrameType.STRANGER:
                raise ProtocolViolated("its agent has started anew, and knows us no more")
            case _:
                self._about_job(frame)

    def _welcomed(self, payload: memoryview) -> None:
        # Before ours has come, another token is an answer to a former host.
        try:
            token, hello = parse_welcome(payload)
        except ProtocolViolated:
            if self._welcome is None:
                return
            raise
        if token == self._token:
            self._line.parser.believe()
            self._welcome = hello
            self._changes.announce()
        elif self._welcome is not None:
            raise ProtocolViolated("a welcome for somebody else")

    def _answered(self, frame: Frame) -> None:
        error = parse_failure(frame.payload) if frame.type == FrameType.FAILED else None
        job = self._jobs.get(frame.id)
        if job is not None and error is not None:
            job.refused(error)
            self._forget_if_over(job)
            return
        reply = self._replies.pop(frame.id, None) or self._beats.pop(frame.id, None)
        if reply is None:
            raise ProtocolViolated(f"an answer to request {frame.id}, which nobody made")
        reply.settle(error)
        self._arrange_heartbeat()

    def _about_job(self, frame: Frame) -> None:
        job = self._jobs.get(frame.id)
        if job is None:
            raise ProtocolViolated(f"frame {frame.type} about job {frame.id}, which there is not")
        match frame.type:
            case FrameType.DATA:
                job.data_came(frame.stream, frame.payload)
                return
            case FrameType.CREDIT:
                job.credit_came(frame.stream, frame.payload)
                return
            case FrameType.EOF:
                job.eof_came(frame.stream)
            case FrameType.STARTED:
                job.started(frame.payload)
            case FrameType.EXITED:
                job.exited(parse_status(frame.payload))
            case _:
                raise ProtocolViolated(f"frame type {frame.type}")
        self._forget_if_over(job)

    def _forget_if_over(self, job: Job) -> None:
        if job.is_over:
            del self._jobs[job.id]
            job.over()
            self._arrange_heartbeat()

    # ---- ends ----

    def line_broke(self, cause: str) -> None:
        """Part of line.Listener; also what the heartbeat says."""
        self._line.abort()
        self.heartbeat.want(wanted=False)
        self.on_lost(ChannelLost(self.name, cause))

    def fail(self, error: BaseException) -> None:
        """The guest is gone, says who knows: every wait, now and later, raises `error`."""
        self._lose(error)

    async def close(self) -> None:
        """Hang up; what is outstanding raises ChannelLost. The agent keeps its processes."""
        self._lose(ChannelLost(self.name, "the channel has been closed"))
        await self._line.close()

    @property
    def lost(self) -> BaseException | None:
        """Why nothing more can be heard; None while the channel is usable."""
        return self._error

    def _lose(self, error: BaseException) -> None:
        if self._error is None:
            self._error = error
        self._line.abort()
        self._fail_outstanding(self._error)
        self._changes.announce()

    def _fail_outstanding(self, error: BaseException) -> None:
        jobs, replies = list(self._jobs.values()), list(self._replies.values())
        self._jobs.clear()
        self._replies.clear()
        self._beats.clear()
        for job in jobs:
            job.fail(error)
        for reply in replies:
            reply.settle(error)
        self._arrange_heartbeat()

    def _require_usable(self) -> None:
        if self._error is not None:
            raise fresh(self._error)


def _what_it_is_not(answer: Hello, given: Identity) -> str:
    """What it says of itself in place of what we made it; empty where it took all of that."""
    for what, said, wished in (
        ("restore id", answer.restore_id, given.restore_id),
        ("host name", answer.hostname, given.hostname),
    ):
        if wished and said != wished:
            return f"the guest says its {what} is {said!r}, it was given {wished!r}"
    return ""
