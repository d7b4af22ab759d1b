"""A frozen machine, in memory: all that restored ones begin with. Nobody can change it any more."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass, replace

from pytest_vmsandbox.linux import OwnedFd
from pytest_vmsandbox.machine.disks import NO_DISKS, FrozenDisks
from pytest_vmsandbox.machine.memory import GuestMemory, seal


@dataclass(frozen=True, slots=True, kw_only=True)
class Frozen:
    """Memory, disks, the state of the devices, and the nonce of the boot that was frozen.

    `console` is what its guest had printed, which whoever is restored from it has printed too. One
    that `stands_still` was captured by stopping its guest, which has to be told to go on. Its
    holder closes it; machines that were restored keep what they have of it.
    """

    nonce: str
    memory: GuestMemory
    state: OwnedFd
    console: bytes = b""
    disks: FrozenDisks = NO_DISKS
    stands_still: bool = False

    def copy(self) -> Frozen:
        """The same once more, to be closed on its own."""
        with ExitStack() as undo:
            memory = undo.enter_context(GuestMemory(os.dup(self.memory)))
            state = undo.enter_context(OwnedFd(os.dup(self.state)))
            copy = replace(self, memory=memory, state=state, disks=self.disks.copy())
            undo.pop_all()
            return copy

    def open_state(self) -> OwnedFd:
        """The state from its beginning: whoever reads it moves no one else's place in it."""
        return OwnedFd(os.open(f"/proc/self/fd/{self.state}", os.O_RDONLY | os.O_CLOEXEC))

    def read_state(self) -> bytes:
        """The whole state, as QEMU wrote it for a migration."""
        return os.pread(self.state, os.fstat(self.state).st_size, 0)

    def close(self) -> None:
        """Give memory, state and disks back."""
        self.memory.close()
        self.state.close()
        self.disks.close()


def state_of(content: bytes) -> OwnedFd:
    """A sealed file in memory that holds the state of devices; its holder closes it."""
    file = new_state()
    try:
        with open(os.dup(file), "wb") as writer:  # noqa: PTH123 - a descriptor has no path
            writer.write(content)
        seal(file)
    except BaseException:
        file.close()
        raise
    return file


def new_state() -> OwnedFd:
    """An empty file in memory for QEMU to write the state of its devices to.

    Whoever freezes seals it once QEMU has ended: a VMM that is restored from it holds it too, and
    opens it anew for writing by /proc/self/fd, whatever it was handed.
    """
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    return OwnedFd(os.memfd_create("vmsandbox-state", flags))
