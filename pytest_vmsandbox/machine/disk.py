"""A disk, as a test asks for it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pytest_vmsandbox.errors import RequestInvalid
from pytest_vmsandbox.vmm.disk import DiskFormat
from pytest_vmsandbox.vmm.qemu import MODULES_SERIAL

# Whole sectors; the longest file that ext4 has is 16 TiB.
SECTOR_BYTES = 512
SIZES = range(SECTOR_BYTES, (8 << 40) + 1)

# Slots of q35's root bus that are free beside what every machine has, and some to spare.
DISKS_AT_MOST = 16

_UNITS = {"K": 10, "M": 20, "G": 30, "T": 40}
_SIZE = re.compile(r"([0-9]+)([KMGT])", re.ASCII)
# virtio-blk hands over 20 bytes (VIRTIO_BLK_ID_BYTES); a node of QEMU's begins with a letter.
_SERIAL = re.compile(r"[a-zA-Z][a-zA-Z0-9_-]{0,19}", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """A disk of a machine's own, which is gone with it: blank, or beginning as `source`.

    `size` is a number of bytes, or a text with K, M, G or T (powers of 1024) like "1G"; with a
    source it may be left out, or be more than the source has. `source` is a disk image on the
    host, which is never written to; its `format` is raw or qcow2, told from its first bytes
    if it is not given. Nothing of a `read_only` disk is copied, and nobody can write to it.
    In the guest it is /dev/disk/by-id/virtio-SERIAL; `serial` is disk0, disk1 and so on by default.
    A wrong value raises RequestInvalid, which names it.
    """

    size: int | str | None = None
    source: Path | str | None = None
    format: str | None = None
    serial: str | None = None
    read_only: bool = False

    def __post_init__(self) -> None:
        if self.size is not None:
            parse_size(self.size)
        _require_path(self.source)
        if self.format is not None and self.format not in tuple(DiskFormat):
            raise RequestInvalid(f"format={self.format!r} must be one of {', '.join(DiskFormat)}")
        _require_serial(self.serial)
        if not isinstance(self.read_only, bool):
            raise RequestInvalid(f"read_only={self.read_only!r} must be True or False")
        if self.source is None:
            self._require_blank()
        elif self.read_only and self.size is not None:
            raise RequestInvalid(f"size={self.size!r} can't be that of a disk that is read-only")

    def _require_blank(self) -> None:
        if self.size is None:
            raise RequestInvalid("a disk needs a size, or a source", 'for instance Disk(size="1G")')
        if self.format is not None:
            raise RequestInvalid(f"format={self.format!r} is that of a source, and there is none")
        if self.read_only:
            raise RequestInvalid("read_only=True is of no use to a disk without a source")


def parse_size(value: object) -> int:
    """A size in bytes from a number, or a text like "1G"; RequestInvalid names what is wrong."""
    size = value
    if isinstance(value, str) and (match := _SIZE.fullmatch(value)):
        # Longer ones are beyond any disk, and slow to read.
        size = int(match[1]) << _UNITS[match[2]] if len(match[1]) <= len(str(SIZES.stop)) else -1
    if not isinstance(size, int) or isinstance(size, bool):
        raise RequestInvalid(
            f"size={value!r} must be a number of bytes, or a text with K, M, G or T",
            'for instance "512M" or "1G"',
        )
    if size not in SIZES or size % SECTOR_BYTES:
        raise RequestInvalid(
            f"size={value!r} must be a multiple of {SECTOR_BYTES} bytes, and 8T at most"
        )
    return size


def require_disks(disks: object) -> tuple[Disk, ...]:
    """The disks of one machine; RequestInvalid where these are none, or can't be together."""
    if not isinstance(disks, list | tuple):
        raise RequestInvalid(f"disks={disks!r} must be a list of disks")
    for disk in disks:
        if not isinstance(disk, Disk):
            raise RequestInvalid(f"disks: {disk!r} is no Disk", 'for instance Disk(size="1G")')
    if len(disks) > DISKS_AT_MOST:
        raise RequestInvalid(f"disks: {len(disks)} are more than {DISKS_AT_MOST}")
    serials = serials_of(disks)
    for serial in serials:
        if serials.count(serial) > 1:
            raise RequestInvalid(f"disks: two of them have the serial {serial!r}")
    return tuple(disks)


def serials_of(disks: Sequence[Disk]) -> list[str]:
    """What they are called in the guest, in their order."""
    return [disk.serial or f"disk{number}" for number, disk in enumerate(disks)]


def _require_path(source: object) -> None:
    if source is not None and (not isinstance(source, str | Path) or not str(source)):
        raise RequestInvalid(f"source={source!r} must be the path of a disk image")
    if source is not None and "\0" in str(source):
        raise RequestInvalid(f"source={source!r} can't be a path")


def _require_serial(serial: object) -> None:
    if serial is None:
        return
    if not isinstance(serial, str) or not _SERIAL.fullmatch(serial):
        raise RequestInvalid(
            f"serial={serial!r} can't be a disk's serial",
            "a letter, then up to 19 letters, digits, - and _",
        )
    if serial == MODULES_SERIAL:
        raise RequestInvalid(f"serial={serial!r} is that of a disk of ours")
