"""A file of a disk that some VMM wrote: looked at before another one gets it."""

from __future__ import annotations

import os

from pytest_vmsandbox.errors import VmSandboxError
from pytest_vmsandbox.machine.sparse import next_data
from pytest_vmsandbox.vmm.disk import DiskFormat
from pytest_vmsandbox.vmm.qcow2 import is_empty, read_header


class LayerRefused(VmSandboxError):
    """A file of a disk is not what a VMM in good order leaves; no VMM gets it."""


def check_layer(file: int, name: str, *, form: DiskFormat, size: int | None = None) -> None:
    """Raise LayerRefused, which calls it `name`, unless it can be a layer of such a disk.

    A guest that broke out into its VMM can write what it likes to it: a header that names a file
    of the host's, say, which the next VMM would open.
    """
    if form is DiskFormat.RAW:
        if size is not None and (found := os.fstat(file).st_size) != size:
            raise LayerRefused(f"{name}: it has {found} bytes, and not {size}")
        return
    header = read_header(file)
    if header is None:
        raise LayerRefused(f"{name}: it is no qcow2 image any more")
    if header.objection:
        raise LayerRefused(f"{name}: it {header.objection}, unlike any layer of ours")
    if size is not None and header.size != size:
        raise LayerRefused(f"{name}: it is of a disk of {header.size} bytes, and not {size}")


def is_untouched(file: int, *, form: DiskFormat, size: int) -> bool:
    """Whether nothing was ever written to this uppermost layer: all shows through from below."""
    if form is DiskFormat.QCOW2:
        return is_empty(file, size=size)
    return next_data(file, 0) is None
