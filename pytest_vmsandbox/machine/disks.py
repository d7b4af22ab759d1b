"""The disks of one machine: its own files over what they begin as, kept while the machine lives."""

from __future__ import annotations

import errno
import os
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from pytest_vmsandbox.errors import RequestInvalid
from pytest_vmsandbox.linux import OwnedFd
from pytest_vmsandbox.machine.disk_layer import check_layer, is_untouched
from pytest_vmsandbox.machine.disk_plan import DiskPlan
from pytest_vmsandbox.machine.sparse import clone
from pytest_vmsandbox.vmm.disk import DiskFormat, DiskStack, Layer
from pytest_vmsandbox.vmm.launch import Writable
from pytest_vmsandbox.vmm.qcow2 import write_empty

# Others may read a layer, so that a VMM of another user can, which is handed it open; nobody else
# gets to it, since the directory is ours alone.
READ_ONLY = 0o444
# A warden takes 64 descriptors for a VMM; what is not for disks is far less than the rest.
FILES_AT_MOST = 48

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class FrozenDisks:
    """What was written to disks until one moment: what other machines' disks begin as.

    `layers` are by the serial of the disk, from the uppermost, on whatever source it has. Those
    in `directory` go with it; machines that have opened them keep what they have of them.
    """

    layers: Mapping[str, Sequence[Layer]] = field(default_factory=dict)
    directory: Path | None = None

    def under(self, plans: Sequence[DiskPlan]) -> tuple[DiskPlan, ...]:
        """Disks like these, but which begin as they were frozen."""
        return tuple(
            replace(plan, frozen=self.layers.get(plan.serial, plan.frozen)) for plan in plans
        )

    def copy(self) -> FrozenDisks:
        """The same files under names of their own, which go on their own."""
        if self.directory is None:
            return self
        directory = new_directory(beside=self.directory)
        try:
            layers = {
                serial: _linked(serial, layers, directory) for serial, layers in self.layers.items()
            }
        except BaseException:
            remove_directory(directory)
            raise
        return FrozenDisks(layers=layers, directory=directory)

    def close(self) -> None:
        """Remove their files."""
        if self.directory is not None:
            remove_directory(self.directory)


NO_DISKS = FrozenDisks()


class Disks:
    """What a machine writes to, from the first `open` to `close`, which removes it.

    The files are made in `directory`, and take room there only where the guest has written.
    """

    def __init__(self, plans: Sequence[DiskPlan], *, directory: Path) -> None:
        self._plans = plans
        self._directory = directory
        self._stacks: tuple[DiskStack, ...] | None = None
        self._held = ExitStack()
        self._closed = False

    def open(self) -> tuple[DiskStack, ...]:
        """The disks with all that was written to them so far, for a VMM.

        Raises OSError where the host has no room for them; nothing is left then. RequestInvalid
        once they are closed: what was written is gone, and fresh ones would hide that.
        """
        if self._closed:
            raise RequestInvalid(f"the disks in {self._directory} have been removed")
        if self._stacks is None:
            with ExitStack() as undo:
                directory = new_directory(beside=self._directory / "disks")
                undo.callback(remove_directory, directory)
                self._stacks = tuple(_open(plan, directory, undo) for plan in self._plans)
                self._held = undo.pop_all()
        for plan, stack in zip(self._plans, self._stacks, strict=True):
            _check(plan, stack)
        return self._stacks

    def require_room(self) -> None:
        """Raise RequestInvalid where what `freeze` would give is too deep for a machine."""
        depths = {
            plan.serial: len(plan.below) + (0 if plan.read_only else len(plan.frozen) + 2)
            for plan in self._plans
        }
        if sum(depths.values()) > FILES_AT_MOST:
            told = ", ".join(f"{serial}: {depth}" for serial, depth in depths.items())
            raise RequestInvalid(
                f"a copy's disks would be {sum(depths.values())} files, one on the other "
                f"({told}), more than {FILES_AT_MOST}",
                "each generation of copies that writes to a disk adds one: copy an earlier machine",
            )

    def freeze(self, stop: threading.Event | None = None) -> FrozenDisks:
        """A copy of all disks as they are now, which its receiver closes; GivenUp after `stop`.

        The guest must be stopped, so that QEMU has written all that it had. The copy shares its
        blocks with the disks where the file system can, and takes as much room as they where not. A
        disk that was not written to has no layer more than before.
        It is made beside this machine's directory, and outlives this machine.
        """
        if not self._plans:
            return NO_DISKS
        directory = new_directory(beside=self._directory)
        try:
            stacks = zip(self._plans, self.open(), strict=True)
            layers = {
                plan.serial: _freeze(plan, stack, directory, stop)
                for plan, stack in stacks
                if not plan.read_only
            }
        except BaseException:
            remove_directory(directory)
            raise
        return FrozenDisks(layers=layers, directory=directory)

    def close(self) -> None:
        """Remove what was written; safe to repeat. No VMM may have them any more."""
        self._closed = True
        self._held.close()
        self._stacks = None


def new_directory(*, beside: Path) -> Path:
    """A new private directory for files of disks, beside another directory."""
    return Path(tempfile.mkdtemp(prefix="disks-", dir=beside.parent))


def _open(plan: DiskPlan, directory: Path, undo: ExitStack) -> DiskStack:
    layers: tuple[Layer, ...] = plan.below
    if not plan.read_only:
        below = (*_linked(plan.serial, plan.frozen, directory), *plan.below)
        form = DiskFormat.QCOW2 if below else DiskFormat.RAW
        top = undo.enter_context(new_file(directory / f"{plan.serial}.written"))
        if form is DiskFormat.RAW:
            os.ftruncate(top, plan.size)
        else:
            write_empty(top, size=plan.size)
        layers = (Layer(file=Writable(top), format=form), *below)
    return DiskStack(serial=plan.serial, size=plan.size, layers=layers, read_only=plan.read_only)


def files_of(serial: str, layers: Iterable[T]) -> Iterator[tuple[str, T]]:
    """Layers of a disk, each with what its file is called: SERIAL.0 is the uppermost."""
    return ((f"{serial}.{number}", layer) for number, layer in enumerate(layers))


def _linked(serial: str, layers: Sequence[Layer], directory: Path) -> tuple[Layer, ...]:
    """The layers of a disk by names of our own, so that they last as long as we do."""
    return tuple(_named(layer, directory / name) for name, layer in files_of(serial, layers))


def _named(layer: Layer, name: Path) -> Layer:
    with OwnedFd(os.open(str(layer.file), os.O_RDONLY | os.O_CLOEXEC)) as file:
        keep(file, name)
    return replace(layer, file=name)


def keep(file: OwnedFd, name: Path) -> None:
    """Give an open file a name of ours too: that very file, whatever became of its own name.

    It is copied where it can't have another name: on another file system, or when it has none left.
    """
    directory = os.open(name.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    with OwnedFd(directory) as parent:
        try:
            # With a directory given, Python lets the kernel follow the link to the open file.
            os.link(f"/proc/self/fd/{file}", name.name, dst_dir_fd=parent)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOENT):
                raise
        else:
            return
    with new_file(name) as copy:
        clone(file, copy)
        os.fchmod(copy, READ_ONLY)


def _check(plan: DiskPlan, stack: DiskStack) -> None:
    """Look at all layers that VMMs wrote, and that one is about to be given."""
    if plan.read_only:
        return
    for layer in stack.layers[: 1 + len(plan.frozen)]:
        with _reopened(layer) as file:
            check_layer(file, f"the disk {plan.serial}", form=layer.format, size=plan.size)


def _reopened(layer: Layer) -> OwnedFd:
    """The file once more, with a place of its own in it."""
    file = layer.file
    path = f"/proc/self/fd/{file.descriptor}" if isinstance(file, Writable) else str(file)
    return OwnedFd(os.open(path, os.O_RDONLY | os.O_CLOEXEC))


def _freeze(
    plan: DiskPlan, stack: DiskStack, directory: Path, stop: threading.Event | None
) -> tuple[Layer, ...]:
    written = stack.layers[0]
    # By our names: those under which we were given them may be gone.
    below = _linked(plan.serial, stack.layers[1 : 1 + len(plan.frozen)], directory)
    path = directory / f"{plan.serial}.frozen"
    with _reopened(written) as top:
        if is_untouched(top, form=written.format, size=plan.size):
            return below
        with new_file(path) as copy:
            clone(top, copy, stop=stop)
            check_layer(copy, f"the disk {plan.serial}", form=written.format, size=plan.size)
            os.fchmod(copy, READ_ONLY)
    return (Layer(file=path, format=written.format), *below)


def remove_directory(directory: Path) -> None:
    """Remove a directory of ours; what resists is left to the end of the run."""
    with suppress(OSError):
        for file in directory.iterdir():
            file.unlink()
        directory.rmdir()


def new_file(path: Path) -> OwnedFd:
    """A new file of ours, open for reading and writing; its holder closes it."""
    return OwnedFd(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
