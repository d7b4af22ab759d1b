"""Trees: files, directories and symbolic links as a stream of records (docs/protocol.md).

D opens a directory, U leaves it, F is a file with its content in chunks, L a link, E the end. A
name is one component and every step is taken from an open directory, following nothing, so that
no record can reach outside the target.
"""

# Names are bytes, and steps are taken from descriptors: pathlib has neither.
# ruff: noqa: PTH115, PTH118, PTH123, PTH208

from __future__ import annotations

import errno
import os
import secrets
import stat
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from pytest_vmsandbox.guest.frames import PAYLOAD_MAX, ProtocolViolated
from pytest_vmsandbox.guest.streams import ReadStream

DEPTH_MAX = 256
ENTRIES_MAX = 1_000_000
_RECORD = struct.Struct("<BBHIqI")
_LENGTH = struct.Struct("<I")
_CHUNK = PAYLOAD_MAX - _LENGTH.size
_NAME_MAX = 255
_LINK_MAX = 4095
_PERMISSIONS = 0o777
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One entry of a tree."""

    kind: str
    name: bytes = b""
    link: bytes = b""
    mode: int = 0
    mtime_ns: int = 0

    def encode(self) -> bytes:
        """Its bytes on the stream."""
        head = _RECORD.pack(
            ord(self.kind), len(self.name), len(self.link), self.mode, self.mtime_ns, 0
        )
        return head + self.name + self.link


_LEAVE = Record(kind="U").encode()
_END = Record(kind="E").encode()


# ---- host to guest ----


def read_tree(source: Path) -> Iterator[bytes | memoryview]:
    """The stream for `source`; each piece is valid until the next is asked for.

    Raises OSError for what can't be read, and for anything but files, directories and links.
    """
    yield from _packed(
        _read_entry(os.fsencode(source), b"", depth=0, buffer=bytearray(PAYLOAD_MAX))
    )


def _packed(pieces: Iterator[bytes | memoryview]) -> Iterator[bytes | memoryview]:
    """Small pieces put together, so that a tree of small files does not become as many frames."""
    gathered = bytearray()
    for piece in pieces:
        large = len(piece) > PAYLOAD_MAX // 2
        if gathered and (large or len(gathered) + len(piece) > PAYLOAD_MAX):
            yield bytes(gathered)
            gathered.clear()
        if large:
            yield piece
        else:
            gathered += piece
    gathered += _END
    yield bytes(gathered)


def _read_entry(
    path: bytes, name: bytes, *, depth: int, buffer: bytearray
) -> Iterator[bytes | memoryview]:
    seen = os.lstat(path)
    mode = stat.S_IMODE(seen.st_mode)
    if depth > DEPTH_MAX:
        raise OSError(errno.ELOOP, "the tree is too deep", os.fsdecode(path))
    if stat.S_ISLNK(seen.st_mode):
        link = os.readlink(path)
        yield Record(kind="L", name=name, link=link, mtime_ns=seen.st_mtime_ns).encode()
    elif stat.S_ISREG(seen.st_mode):
        yield Record(kind="F", name=name, mode=mode, mtime_ns=seen.st_mtime_ns).encode()
        yield from _read_content(path, buffer)
    elif stat.S_ISDIR(seen.st_mode):
        yield Record(kind="D", name=name, mode=mode, mtime_ns=seen.st_mtime_ns).encode()
        for entry in sorted(os.listdir(path)):
            yield from _read_entry(os.path.join(path, entry), entry, depth=depth + 1, buffer=buffer)
        yield _LEAVE
    else:
        raise OSError(errno.EOPNOTSUPP, "not a file, directory or link", os.fsdecode(path))


def _read_content(path: bytes, buffer: bytearray) -> Iterator[bytes | memoryview]:
    view = memoryview(buffer)
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    with open(fd, "rb", buffering=0) as file:
        while count := file.readinto(view[_LENGTH.size :]):
            _LENGTH.pack_into(buffer, 0, count)
            yield view[: _LENGTH.size + count]
    yield _LENGTH.pack(0)


# ---- guest to host ----


async def receive_tree(stream: ReadStream, target: Path, *, limit_bytes: int | None = None) -> None:
    """Write the tree that comes over `stream` to `target`.

    A new name appears whole or not at all; into a directory that is there the tree is merged.
    set-user-id, set-group-id and sticky bits are dropped: the guest may not hand programs of its
    making to the host with them. Raises ProtocolViolated for what no agent of ours would send,
    OSError(EFBIG) beyond `limit_bytes`, and the host's own OSErrors.
    """
    with _Target(target, limit_bytes=limit_bytes) as writer:
        await _receive_entry(stream, writer, await _receive_record(stream))
        if (await _receive_record(stream)).kind != "E":
            raise ProtocolViolated("a tree that goes on after its root")
        writer.finish()


async def _receive_record(stream: ReadStream) -> Record:
    head = await stream.readexactly(_RECORD.size)
    kind, name_length, link_length, mode, mtime_ns, _ = _RECORD.unpack(head)
    if chr(kind) not in "DFLUE" or link_length > _LINK_MAX or mode & ~0o7777:
        raise ProtocolViolated(f"not a tree record: {head.hex(' ')}")
    rest = await stream.readexactly(name_length + link_length) if name_length + link_length else b""
    return Record(
        kind=chr(kind),
        name=_checked_name(rest[:name_length]),
        link=rest[name_length:],
        mode=mode & _PERMISSIONS,
        mtime_ns=mtime_ns,
    )


def _checked_name(name: bytes) -> bytes:
    if name in {b".", b".."} or b"/" in name or b"\0" in name:
        raise ProtocolViolated(f"a tree entry named {name!r}")
    return name


async def _receive_entry(stream: ReadStream, writer: _Target, root: Record) -> None:
    record, depth = root, 0
    while True:
        if (record.name == b"") != (depth == 0 or record.kind == "U"):
            raise ProtocolViolated(f"tree entry {record.kind} named {record.name!r}")
        match record.kind:
            case "D":
                writer.enter(record)
                depth += 1
            case "U" if depth > 0:
                writer.leave()
                depth -= 1
            case "F":
                await _receive_content(stream, writer, record)
            case "L":
                writer.link(record)
            case _:
                raise ProtocolViolated(f"tree entry {record.kind} at depth {depth}")
        if depth == 0:
            return
        record = await _receive_record(stream)


async def _receive_content(stream: ReadStream, writer: _Target, record: Record) -> None:
    fd = writer.create(record)
    try:
        while length := _LENGTH.unpack(await stream.readexactly(_LENGTH.size))[0]:
            if length > _CHUNK:
                raise ProtocolViolated(f"a chunk of {length} bytes")
            writer.write(fd, await stream.readexactly(length))
        os.fchmod(fd, record.mode)
        os.utime(fd, ns=(record.mtime_ns, record.mtime_ns))
    finally:
        os.close(fd)


class _Target:
    """Where a tree is written: open directories from the target's parent down to where we are."""

    def __init__(self, target: Path, *, limit_bytes: int | None) -> None:
        if target.name in {"", ".."}:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
        self._final = os.fsencode(target.name)
        self._left = limit_bytes
        self._entries = 0
        self._path = str(target)
        self._open: list[tuple[int, Record | None]] = []
        self._parent = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._existing = _kind_of(self._parent, self._final)
        self._root = self._final
        if self._existing != stat.S_IFDIR:
            self._root = b".%s.vmsandbox-%s" % (self._final[:200], secrets.token_hex(4).encode())

    def __enter__(self) -> Self:
        self._open.append((self._parent, None))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        while len(self._open) > 1:
            os.close(self._open.pop()[0])
        if self._root != self._final:
            _remove(self._parent, self._root)
        os.close(self._parent)

    def finish(self) -> None:
        """The tree is whole: let it appear under its name."""
        if self._root != self._final:
            os.rename(self._root, self._final, src_dir_fd=self._parent, dst_dir_fd=self._parent)
            self._root = self._final

    def enter(self, record: Record) -> None:
        """Make a directory, or take the one that is there, and go into it."""
        if len(self._open) > DEPTH_MAX + 1:
            raise ProtocolViolated("a tree without a bottom")
        here, name = self._place(record)
        with suppress(FileExistsError):
            os.mkdir(name, 0o700, dir_fd=here)
        self._open.append((os.open(name, _DIRECTORY, dir_fd=here), record))

    def leave(self) -> None:
        """The directory is complete: give it its mode and time."""
        fd, record = self._open.pop()
        try:
            if record is not None:
                os.fchmod(fd, record.mode)
                os.utime(fd, ns=(record.mtime_ns, record.mtime_ns))
        finally:
            os.close(fd)

    def create(self, record: Record) -> int:
        """A new, empty file in place of what is there."""
        here, name = self._place(record)
        try:
            return os.open(name, _NEW_FILE, 0o600, dir_fd=here)
        except FileExistsError:
            os.unlink(name, dir_fd=here)
            return os.open(name, _NEW_FILE, 0o600, dir_fd=here)

    def write(self, fd: int, data: bytes) -> None:
        """Content, as far as the limit allows."""
        if self._left is not None:
            self._left -= len(data)
            if self._left < 0:
                raise OSError(errno.EFBIG, "the guest's tree is larger than allowed", self._path)
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]

    def link(self, record: Record) -> None:
        """A symbolic link, which nothing here ever follows."""
        here, name = self._place(record)
        if not record.link or b"\0" in record.link:
            raise ProtocolViolated(f"a link to {record.link!r}")
        try:
            os.symlink(record.link, name, dir_fd=here)
        except FileExistsError:
            os.unlink(name, dir_fd=here)
            os.symlink(record.link, name, dir_fd=here)
        times = (record.mtime_ns, record.mtime_ns)
        os.utime(name, ns=times, dir_fd=here, follow_symlinks=False)

    def _place(self, record: Record) -> tuple[int, bytes]:
        self._entries += 1
        if self._entries > ENTRIES_MAX:
            raise OSError(errno.EFBIG, "the guest's tree has too many entries", self._path)
        if len(self._open) > 1:
            return self._open[-1][0], record.name
        if self._existing is not None and (self._existing == stat.S_IFDIR) != (record.kind == "D"):
            code = errno.ENOTDIR if record.kind == "D" else errno.EISDIR
            raise OSError(code, os.strerror(code), self._path)
        return self._parent, self._root


def _kind_of(dir_fd: int, name: bytes) -> int | None:
    try:
        return stat.S_IFMT(os.stat(name, dir_fd=dir_fd, follow_symlinks=False).st_mode)
    except FileNotFoundError:
        return None


def _remove(dir_fd: int, name: bytes) -> None:
    """Remove what we made, if it is there; directories are made ours again first."""
    kind = _kind_of(dir_fd, name)
    if kind is None:
        return
    if kind != stat.S_IFDIR:
        os.unlink(name, dir_fd=dir_fd)
        return
    os.chmod(name, 0o700, dir_fd=dir_fd)
    fd = os.open(name, _DIRECTORY, dir_fd=dir_fd)
    try:
        for entry in os.listdir(fd):
            _remove(fd, os.fsencode(entry))
    finally:
        os.close(fd)
    os.rmdir(name, dir_fd=dir_fd)
