"""Files and trees, between host and guest.

Each transfer is a child of the agent with streams like any command's, so a hung file system in
the guest holds up that transfer only. Errors of the guest are raised as the OSError they would be
here.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from pytest_vmsandbox.errors import ChannelLost
from pytest_vmsandbox.guest.frames import ProtocolViolated
from pytest_vmsandbox.guest.job import Job
from pytest_vmsandbox.guest.messages import KEEP_MODE, NO_LIMIT, TransferKind, guest_error
from pytest_vmsandbox.guest.streams import ReadStream
from pytest_vmsandbox.guest.tree import read_tree, receive_tree
from pytest_vmsandbox.guest.waiting import fresh

_REPORT_MAX = 8192
_ERRNO_SIZE = 4


class Transfers(Protocol):
    """What a transfer needs of the channel."""

    name: str

    def start_transfer(self, kind: TransferKind, **fields: object) -> Job:
        """Start one."""

    def abandon(self, job: Job) -> None:
        """End it, and have what is half-made removed."""

    def line_broke(self, cause: str) -> None:
        """The guest is not to be believed any more."""

    @property
    def lost(self) -> BaseException | None:
        """Why the channel can't be used."""


async def read_file(
    channel: Transfers, path: str, *, offset: int = 0, limit: int | None = None
) -> bytes:
    """The file's bytes from `offset`, at most `limit`; /proc and devices are read to their end."""
    wanted = NO_LIMIT if limit is None else limit
    job = channel.start_transfer(TransferKind.GET, path=path, position=offset, limit=wanted)
    try:
        data = await job.stdout.read() if limit is None else await _read_up_to(job, limit + 1)
        if limit is not None and len(data) > limit:
            raise _distrust(channel, f"more than the {limit} bytes of a file that were asked for")
        await _succeeded(job)
    finally:
        _leave(channel, job)
    return data


async def _read_up_to(job: Job, size: int) -> bytes:
    data = bytearray()
    while piece := await job.stdout.read(size - len(data)):
        data += piece
    return bytes(data)


async def write_file(
    channel: Transfers,
    path: str,
    data: bytes,
    *,
    mode: int | None = None,
    owner: str | None = None,
) -> None:
    """Make `path` hold exactly `data`.

    A regular file appears whole or not at all (a temporary file beside it is renamed over it); a
    failure such as ENOSPC, or a cancellation, leaves what was there. A link is followed. What can't
    be replaced (a device, a file of /proc or /sys) is written to instead, in one write(2) up to
    1 MiB. `mode` None keeps an existing file's mode, else 0644; `owner` is `user` or
    `user:group`, names or numbers of the guest.
    """
    kept = KEEP_MODE if mode is None else mode
    job = channel.start_transfer(
        TransferKind.PUT, path=path, position=len(data), mode=kept, owner=owner or ""
    )
    try:
        await _write_all(job, data)
        await _succeeded(job)
    finally:
        _leave(channel, job)


async def push(channel: Transfers, source: Path, target: str) -> None:
    """Copy a host file or tree to exactly the name `target` in the guest.

    Modes and modification times are kept, links are copied as links, owners become the agent's.
    `target`'s directory must exist. A new target appears whole or not at all; into a directory that
    is there a tree is merged. Constant memory.
    """
    job = channel.start_transfer(TransferKind.TREE_PUT, path=target)
    try:
        assert job.stdin is not None
        with suppress(BrokenPipeError):  # the guest has failed, and tells why below
            for piece in read_tree(source):
                await job.stdin.write(piece)
        await _succeeded(job)
    finally:
        _leave(channel, job)


async def pull(
    channel: Transfers, source: str, target: Path, *, limit_bytes: int | None = None
) -> None:
    """Copy a file or tree of the guest to exactly the path `target` on the host.

    As `push`, the other way round; but set-user-id, set-group-id and sticky bits are dropped. Links
    are copied, never followed, and may point anywhere: mind who reads the result. Beyond
    `limit_bytes` of content OSError(EFBIG) is raised.
    """
    job = channel.start_transfer(TransferKind.TREE_GET, path=source)
    try:
        try:
            await receive_tree(job.stdout, target, limit_bytes=limit_bytes)
        except EOFError:  # the guest has failed, and tells why below
            await _succeeded(job)
            raise ProtocolViolated("a tree that ends in the middle") from None
        await _succeeded(job)
    except ProtocolViolated as violation:
        raise _distrust(channel, str(violation)) from violation
    finally:
        _leave(channel, job)


async def perform(
    channel: Transfers, kind: TransferKind, *, path: str = "", more: bytes = b""
) -> None:
    """Something that a child does without a stream: sync, machine-id, addresses."""
    job = channel.start_transfer(kind, path=path, more=more)
    try:
        await _succeeded(job)
    finally:
        _leave(channel, job)


async def _write_all(job: Job, data: bytes) -> None:
    assert job.stdin is not None
    with suppress(BrokenPipeError):
        await job.stdin.write(data)


async def _succeeded(job: Job) -> None:
    status = await job.wait_exited()
    if status == 0:
        return
    assert job.stderr is not None
    report = await _read_report(job.stderr)
    if status < 0 or len(report) < _ERRNO_SIZE:
        raise OSError(errno.EIO, f"the guest's transfer ended with {status}")
    raise guest_error(
        int.from_bytes(report[:_ERRNO_SIZE], "little"), os.fsdecode(report[_ERRNO_SIZE:])
    )


async def _read_report(stream: ReadStream) -> bytes:
    report = b""
    while len(report) < _REPORT_MAX and (part := await stream.read(_REPORT_MAX - len(report))):
        report += part
    return report


def _leave(channel: Transfers, job: Job) -> None:
    if job.returncode is None:
        channel.abandon(job)
    job.close_outputs()


def _distrust(channel: Transfers, cause: str) -> BaseException:
    cause = f"the guest broke the protocol: {cause}"
    channel.line_broke(cause)
    return fresh(channel.lost) if channel.lost else ChannelLost(channel.name, cause)
