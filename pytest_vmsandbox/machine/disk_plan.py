"""A disk before a machine has it: what it begins as, looked up on the host."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pytest_vmsandbox.errors import RequestInvalid
from pytest_vmsandbox.linux import OwnedFd
from pytest_vmsandbox.machine.disk import SECTOR_BYTES, SIZES, Disk, parse_size, serials_of
from pytest_vmsandbox.vmm.disk import DiskFormat, Layer
from pytest_vmsandbox.vmm.qcow2 import MAGIC, read_header


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskPlan:
    """What a disk of `size` bytes begins as.

    `frozen` are layers of ours, from the uppermost, that lie on `source`, which is the user's.
    """

    serial: str
    size: int
    source: Layer | None = None
    read_only: bool = False
    frozen: Sequence[Layer] = ()

    @property
    def below(self) -> tuple[Layer, ...]:
        """The source, if it has one, for a stack of layers."""
        return () if self.source is None else (self.source,)

    @property
    def identity(self) -> str:
        """One line that tells it from every disk that begins otherwise, for a recipe."""
        kind = "read-only" if self.read_only else "writable"
        return f"{self.serial} {self.size} {kind} {_identity(self.source)}"


def plan_disks(disks: Sequence[Disk]) -> tuple[DiskPlan, ...]:
    """Look at the sources of these disks.

    Raises RequestInvalid, which names the disk's source, where it can't be one.
    """
    pairs = zip(disks, serials_of(disks), strict=True)
    return tuple(_plan(disk, serial) for disk, serial in pairs)


def _plan(disk: Disk, serial: str) -> DiskPlan:
    if disk.source is None:
        return DiskPlan(serial=serial, size=parse_size(disk.size))
    path = Path(disk.source).absolute()
    held, form = _look_at(path, disk.format)
    size = held if disk.size is None else parse_size(disk.size)
    if size < held:
        raise RequestInvalid(
            f"size={disk.size!r} is less than the {held} bytes of source={str(path)!r}"
        )
    return DiskPlan(
        serial=serial,
        size=size,
        source=Layer(file=path, format=form),
        read_only=disk.read_only,
    )


def _look_at(path: Path, wanted: str | None) -> tuple[int, DiskFormat]:
    """The size of the disk in an image, and the image's format."""
    try:
        # O_NONBLOCK: a pipe is no image, and nobody waits for whoever would write to it.
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
        with OwnedFd(os.open(path, flags)) as image:
            return _measure(image, path, wanted)
    except OSError as error:
        raise RequestInvalid(f"source={str(path)!r}: {error.strerror}") from error


def _measure(image: OwnedFd, path: Path, wanted: str | None) -> tuple[int, DiskFormat]:
    found = os.fstat(image)
    if not stat.S_ISREG(found.st_mode):
        raise RequestInvalid(f"source={str(path)!r} is not a regular file")
    is_qcow2 = os.pread(image, len(MAGIC), 0) == MAGIC
    form = DiskFormat(wanted or (DiskFormat.QCOW2 if is_qcow2 else DiskFormat.RAW))
    size = found.st_size if form is DiskFormat.RAW else _size_of_qcow2(image, path)
    if size not in SIZES or size % SECTOR_BYTES:
        raise RequestInvalid(
            f"source={str(path)!r}: a disk of {size} bytes; "
            f"they must be a multiple of {SECTOR_BYTES}, and 8T at most"
        )
    return size, form


def _size_of_qcow2(image: OwnedFd, path: Path) -> int:
    header = read_header(image)
    if header is None:
        raise RequestInvalid(f"source={str(path)!r} is no qcow2 image, or is cut off")
    if header.objection:
        raise RequestInvalid(
            f"source={str(path)!r} {header.objection}",
            f"an image of its own: qemu-img convert -O qcow2 {path} whole.qcow2",
        )
    return header.size


def _identity(source: Layer | None) -> str:
    if source is None:
        return "blank"
    # st_ctime moves with every change, and nobody can set it (inode(7)).
    found = Path(str(source.file)).stat()
    change = f"{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"
    return f"{source.format} {found.st_dev} {found.st_ino} {change}"
