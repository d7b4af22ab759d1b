"""The ledger: what a run has acquired and not yet released, written before it is acquired.

A file of JSON lines to which only its run appends: a head, then one line for each thing that is
recorded, identified (a process, once it has been started) or struck out. A line that a crash cut
off was not acted upon, and is passed over; any other line that is not understood is damage, and
from damage nobody concludes anything.

A line is handed to the kernel, not to the disk. A process that is killed loses nothing that
write(2) took, and a host that crashes takes the processes and control groups with it that the
lines are about; the files that it leaves are the run directory itself. Only the head, which says
whose they are, is awaited on the disk.
"""

from __future__ import annotations

import json
import os
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from pytest_vmsandbox.lease.entries import (
    Entry,
    ProcessEntry,
    entry_to_json,
    identity_to_json,
    parse_entry,
    parse_identity,
)
from pytest_vmsandbox.lease.fields import fields_of, number_of, seconds_of, text_of
from pytest_vmsandbox.linux import ProcessIdentity

_FORMAT = 1
_LONGEST_LINE = 64 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """Whose ledger it is: the owner, the pid namespace that its pids count in, since when."""

    owner: ProcessIdentity
    pid_namespace: int
    worker: str
    since: float

    def to_json(self) -> dict[str, object]:
        """The first line."""
        return {
            "ledger": _FORMAT,
            "owner": identity_to_json(self.owner),
            "pid_namespace": self.pid_namespace,
            "worker": self.worker,
            "since": self.since,
        }

    @classmethod
    def parse(cls, value: object) -> Self:
        """Read the first line; ValueError for anything else."""
        fields = fields_of(value, "ledger", "owner", "pid_namespace", "worker", "since")
        if fields["ledger"] != _FORMAT:
            raise ValueError(f"a ledger of another format: {fields['ledger']!r}")
        return cls(
            owner=parse_identity(fields["owner"]),
            pid_namespace=number_of(fields["pid_namespace"]),
            worker=text_of(fields["worker"]),
            since=seconds_of(fields["since"]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """What a ledger says: its open entries by number, in the order in which they were recorded.

    With `damage`, which says what was not understood, entries may be missing or wrong.
    """

    head: Head | None
    entries: dict[int, Entry]
    damage: str = ""


class Ledger:
    """The ledger of a run that lives. Every method returns when the kernel has the line.

    They may be called from any thread, and take what a write(2) takes: some microseconds on any
    file system. OSError when it can't be written; then nothing was recorded.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lock = threading.Lock()
        self._last_number = 0

    @classmethod
    def create(cls, path: Path, *, worker: str) -> Self:
        """A new ledger of this process at `path`, its head on disk; OSError when there is one."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        ledger = cls(os.open(path, flags, 0o600))
        try:
            head = Head(
                owner=ProcessIdentity.current(),
                pid_namespace=own_pid_namespace(),
                worker=worker,
                since=time.time(),
            )
            ledger._append(head.to_json())
            os.fdatasync(ledger._descriptor)
            _sync_directory(path.parent)
        except BaseException:
            ledger.close()
            raise
        return ledger

    def record(self, entry: Entry) -> int:
        """Note that `entry` is about to be acquired; the number names it from now on."""
        with self._lock:
            number = self._last_number + 1
            self._append({"record": number, "entry": entry_to_json(entry)})
            self._last_number = number
            return number

    def identify(self, number: int, identity: ProcessIdentity) -> None:
        """Note which process the intended one has become."""
        with self._lock:
            self._append({"identify": number, "identity": identity_to_json(identity)})

    def strike(self, number: int) -> None:
        """Note that what was recorded under this number is released."""
        with self._lock:
            self._append({"strike": number})

    @contextmanager
    def recorded(self, entry: Entry) -> Iterator[int]:
        """Record `entry` before the block and strike it out behind it.

        When the block raises it stays open: the end of the run, which undoes what is open, looks
        whether it is still there.
        """
        number = self.record(entry)
        yield number
        self.strike(number)

    def close(self) -> None:
        """Close the file, which stays; a second time does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _append(self, value: dict[str, object]) -> None:
        line = json.dumps(value).encode() + b"\n"
        size = os.fstat(self._descriptor).st_size
        try:
            written = os.write(self._descriptor, line)
            if written != len(line):
                raise OSError(f"the disk took {written} of {len(line)} bytes")
        except OSError:
            # Half a line may only ever be the last one.
            os.ftruncate(self._descriptor, size)
            raise


def read_ledger(path: Path) -> Account:
    """What the ledger at `path` says; raises OSError where there is none to be read.

    A link, what is no plain file, what is not ours and what others may write is damage.
    """
    # Not to wait for the other end of a FIFO; for a plain file it means nothing.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:  # noqa: PTH123  # it is a descriptor
        seen = os.fstat(descriptor)
        others_write = seen.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if not stat.S_ISREG(seen.st_mode) or seen.st_uid != os.geteuid() or others_write:
            return Account(head=None, entries={}, damage="it is not a file that only we write")
        return parse_ledger(iter(lambda: file.readline(_LONGEST_LINE), b""))


def parse_ledger(lines: Iterator[bytes]) -> Account:
    """Read the lines of a ledger, each with its end; what is behind damage is not read."""
    reading = _Reading()
    for place, line in enumerate(lines, start=1):
        if not line.endswith(b"\n") and len(line) < _LONGEST_LINE:
            break  # the last one, cut off: what it was to announce was never begun
        try:
            reading.take(_parse_line(line))
        except ValueError as error:
            return reading.account(damage=f"line {place}: {error}"[:500])
    return reading.account(damage="" if reading.head else "it has no head")


def own_pid_namespace() -> int:
    """The number of the pid namespace that our pids count in (namespaces(7))."""
    return Path("/proc/self/ns/pid").stat().st_ino


class _Reading:
    """A ledger read so far."""

    def __init__(self) -> None:
        self.head: Head | None = None
        self._last_number = 0
        self._open: dict[int, Entry] = {}

    def take(self, value: object) -> None:
        """Read one line on; ValueError when it does not follow from those before."""
        if self.head is None:
            self.head = Head.parse(value)
            return
        match value:
            case {"record": number}:
                self._record(number_of(number), fields_of(value, "record", "entry")["entry"])
            case {"identify": number}:
                identity = fields_of(value, "identify", "identity")["identity"]
                self._identify(number_of(number), parse_identity(identity))
            case {"strike": number}:
                fields_of(value, "strike")
                del self._open[self._known(number_of(number))]
            case _:
                raise ValueError(f"no line of a ledger: {value!r}")

    def account(self, *, damage: str) -> Account:
        """What it says so far."""
        return Account(head=self.head, entries=dict(self._open), damage=damage)

    def _record(self, number: int, entry: object) -> None:
        if number != self._last_number + 1:
            raise ValueError(f"entry {number} follows {self._last_number}")
        self._open[number] = parse_entry(entry)
        self._last_number = number

    def _identify(self, number: int, identity: ProcessIdentity) -> None:
        entry = self._open[self._known(number)]
        if not isinstance(entry, ProcessEntry) or entry.identity is not None:
            raise ValueError(f"entry {number} is no process that is yet to be started")
        self._open[number] = replace(entry, identity=identity)

    def _known(self, number: int) -> int:
        if number not in self._open:
            raise ValueError(f"entry {number} is not open")
        return number


def _parse_line(line: bytes) -> object:
    try:
        value: object = json.loads(line.decode("ascii"))
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
