"""A writable disk as QEMU is told of it: a stack of files, of which the uppermost is written to."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

from pytest_vmsandbox.vmm.launch import Handed
from pytest_vmsandbox.vmm.qcow2 import size_at_most


class DiskFormat(StrEnum):
    """How a file holds a disk. QEMU is always told, and never looks: a guest may write anything."""

    RAW = "raw"
    QCOW2 = "qcow2"


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One file of a disk."""

    file: Handed
    format: DiskFormat


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskStack:
    """A disk of `size` bytes; `layers` from the uppermost, which is written to unless `read_only`.

    The uppermost of a writable disk is handed over open for writing.
    """

    serial: str
    size: int
    layers: Sequence[Layer]
    read_only: bool = False

    @property
    def files(self) -> tuple[Handed, ...]:
        """What QEMU is handed for it."""
        return tuple(layer.file for layer in self.layers)

    @property
    def written_bytes(self) -> int:
        """How long a file QEMU may come to write for it."""
        return 0 if self.read_only else size_at_most(self.size)

    def seen_through(self, files: Mapping[Handed, Path]) -> DiskStack:
        """The same with every path as QEMU will see it."""
        layers = tuple(replace(layer, file=files[layer.file]) for layer in self.layers)
        return replace(self, layers=layers)


def render_disk(disk: DiskStack, *, bus: str) -> Iterator[str]:
    """The options that give a machine this disk, its files as QEMU sees them."""
    node = {"node-name": disk.serial, **_node(disk.layers), "read-only": disk.read_only}
    if not disk.read_only:
        # Not opened but handed over: its owner is another user than QEMU, as a rule.
        descriptor = Path(str(disk.layers[0].file)).name
        yield from ("-add-fd", f"fd={descriptor},set={descriptor}")
        node["file"] = {**_file(f"/dev/fdset/{descriptor}"), "discard": "unmap"}
        # The host's page cache outlives QEMU; what would be flushed further is thrown away with
        # the machine. What a flush writes from QEMU's memory to the file, it still writes.
        node |= {"discard": "unmap", "cache": {"no-flush": True}}
    yield from ("-blockdev", json.dumps(node))
    # An error of the host's, a full disk for one, is none of the guest's: that is stopped.
    errors = "werror=stop,rerror=stop"
    device = f"virtio-blk-{bus},drive={disk.serial},serial={disk.serial},{errors}"
    yield from ("-device", device)


def disk_error(said: Mapping[str, object]) -> str:
    """What a BLOCK_IO_ERROR says of a file of the host's (qemu-qmp-ref(7))."""
    disk, done, why = (said.get(name) for name in ("node-name", "operation", "reason"))
    return f"the host could not {done} a file of the disk {disk}: {why}"


def _node(layers: Sequence[Layer]) -> dict[str, object]:
    upper, *lower = layers
    node: dict[str, object] = {"driver": upper.format, "file": _file(str(upper.file))}
    if upper.format is DiskFormat.QCOW2:
        # Said in any case: an image of somebody else's must not name a file of the host's here.
        node["backing"] = _node(lower) if lower else None
    return node


def _file(path: str) -> dict[str, object]:
    # Nobody else writes: the uppermost is this machine's alone, the others are read-only.
    return {"driver": "file", "filename": path, "locking": "off"}
