"""The platform: which operating system and processor this is, in our words."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

# uname(2)'s names of processors, where QEMU has another.
_QEMU_ARCHITECTURES = {
    "arm64": "aarch64",
    "amd64": "x86_64",
    "i686": "i386",
    "armv7l": "arm",
    "ppc64le": "ppc64",
}

# The Debian and Ubuntu packages with the QEMU of an architecture; of two, the first is of newer
# distributions. Who is not here is in qemu-system-misc.
_QEMU_PACKAGES = {
    "x86_64": ("qemu-system-x86",),
    "i386": ("qemu-system-x86",),
    "aarch64": ("qemu-system-arm",),
    "arm": ("qemu-system-arm",),
    "ppc64": ("qemu-system-ppc",),
    "s390x": ("qemu-system-s390x", "qemu-system-misc"),
    "riscv64": ("qemu-system-riscv", "qemu-system-misc"),
}


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

    @property
    def qemu_packages(self) -> tuple[str, ...]:
        """The packages of Debian and Ubuntu that may have that QEMU, the likeliest first."""
        return _QEMU_PACKAGES.get(self.machine, ("qemu-system-misc",))


def current_platform() -> Platform:
    """The platform that this process runs on."""
    machine = os.uname().machine
    return Platform(system=sys.platform, machine=_QEMU_ARCHITECTURES.get(machine, machine))
