"""The platform: which operating system and processor this is, in our words."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

# uname(2)'s names of processors, where QEMU has another.
_QEMU_ARCHITECTURES = {"arm64": "aarch64", "amd64": "x86_64"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Platform:
    """`system` is `sys.platform` ("linux", "darwin"), `machine` is QEMU's architecture."""

    system: str
    machine: str

    @property
    def is_linux(self) -> bool:
        """Whether the kernel's words of this package mean something here."""
        return self.system == "linux"

    @property
    def qemu_program(self) -> str:
        """The QEMU that emulates this very processor."""
        return f"qemu-system-{self.machine}"


def current_platform() -> Platform:
    """The platform that this process runs on."""
    machine = os.uname().machine
    return Platform(system=sys.platform, machine=_QEMU_ARCHITECTURES.get(machine, machine))
