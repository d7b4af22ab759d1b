"""The disks of a template: all that was written to them, as files that never change.

They are called SERIAL.0, SERIAL.1 and so on, from the uppermost. What a test gave as a source is
not among them: that it is still the same is a matter of the recipe.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pytest_vmsandbox.linux import OwnedFd
from pytest_vmsandbox.machine.disk_layer import LayerRefused, check_layer
from pytest_vmsandbox.machine.disks import (
    READ_ONLY,
    FrozenDisks,
    files_of,
    keep,
    new_directory,
    new_file,
    remove_directory,
)
from pytest_vmsandbox.machine.sparse import copy_sparse, hash_sparse
from pytest_vmsandbox.vmm.disk import DiskFormat, Layer


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedLayer:
    """What the manifest says of a file: its format, its length, and the SHA-256 of its content."""

    format: str
    bytes: int
    sha256: str


SavedDisks = Mapping[str, Sequence[SavedLayer]]
"""The layers of every writable disk, by its serial."""


class DisksDamaged(Exception):
    """The files are not what the manifest says."""


def save_disks(disks: FrozenDisks, directory: Path) -> SavedDisks:
    """Copy the layers to new files in a directory of ours."""
    return {
        serial: tuple(_save(layer, directory / name) for name, layer in files_of(serial, layers))
        for serial, layers in disks.layers.items()
    }


def load_disks(saved: SavedDisks, directory: Path, *, room: Path) -> FrozenDisks:
    """The layers in a template's directory, kept in a new one in `room`, every byte checked.

    Whoever removes the template, or makes it anew, changes nothing of them. Raises DisksDamaged
    where one is wrong, OSError where one can't be read or kept; nothing is left then.
    """
    if not any(saved.values()):  # nothing was written
        return FrozenDisks(layers=dict.fromkeys(saved, ()))
    kept = new_directory(beside=room / "disks")
    try:
        layers = {
            serial: tuple(
                _load(layer, directory / name, kept / name)
                for name, layer in files_of(serial, layers)
            )
            for serial, layers in saved.items()
        }
    except BaseException:
        remove_directory(kept)
        raise
    return FrozenDisks(layers=layers, directory=kept)


def check_disks(saved: SavedDisks, directory: Path) -> None:
    """Compare every byte; raises what `load_disks` does."""
    for serial, layers in saved.items():
        for name, layer in files_of(serial, layers):
            with _opened(directory / name) as file:
                _check(layer, file, directory / name)


def parse_saved_disks(form: object) -> SavedDisks:
    """What a manifest says of disks; DisksDamaged where it can't."""
    if not isinstance(form, dict):
        raise DisksDamaged(f"{form!r} says nothing of disks")
    # A serial is the name of a file here.
    if wrong := [serial for serial in form if "/" in serial]:
        raise DisksDamaged(f"{wrong[0]!r} is no disk's serial")
    return {serial: _parse_layers(layers) for serial, layers in form.items()}


def _parse_layers(form: object) -> tuple[SavedLayer, ...]:
    if not isinstance(form, list):
        raise DisksDamaged(f"{form!r} are no layers of a disk")
    return tuple(map(_parse, form))


def _parse(form: object) -> SavedLayer:
    match form:
        case {"format": "raw" | "qcow2" as format_, "bytes": int(size), "sha256": str(digest)}:
            return SavedLayer(format=format_, bytes=size, sha256=digest)
    raise DisksDamaged(f"{form!r} is no layer of a disk")


def _save(layer: Layer, path: Path) -> SavedLayer:
    source = OwnedFd(os.open(str(layer.file), os.O_RDONLY | os.O_CLOEXEC))
    with source, new_file(path) as copy:
        size = os.fstat(source).st_size
        os.ftruncate(copy, size)
        digest = copy_sparse(source, copy)
        os.fchmod(copy, READ_ONLY)
    return SavedLayer(format=layer.format, bytes=size, sha256=digest)


def _load(saved: SavedLayer, path: Path, name: Path) -> Layer:
    with _opened(path) as file:
        keep(file, name)
    with _opened(name) as kept:  # what machines get, be it a copy
        _check(saved, kept, path)
        try:
            check_layer(kept, str(path), form=DiskFormat(saved.format))
        except LayerRefused as error:
            raise DisksDamaged(str(error)) from error
    return Layer(file=name, format=DiskFormat(saved.format))


def _opened(path: Path) -> OwnedFd:
    # O_NONBLOCK: nobody waits for whoever would write to a pipe.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    return OwnedFd(os.open(path, flags))


def _check(saved: SavedLayer, file: OwnedFd, path: Path) -> None:
    if (os.fstat(file).st_size, hash_sparse(file)) != (saved.bytes, saved.sha256):
        raise DisksDamaged(f"{path}: it is not what the manifest says")
