"""The kernel's share of an image: made once for a kernel, whatever agent it is combined with.

It is laid out as an image is, so that it is opened and verified as one; its initramfs holds only
the modules to boot with. The kernel unpacks concatenated archives one over the other, so an
image's initramfs is a root file system with this one behind it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

from pytest_vmsandbox.deadline import Deadline
from pytest_vmsandbox.errors import HostUnfit, RequestInvalid
from pytest_vmsandbox.image import cpio
from pytest_vmsandbox.image.disk import make_modules_disk
from pytest_vmsandbox.image.kernel import Kernel, parse_kernel, uncompressed
from pytest_vmsandbox.image.modules import ModuleIndex, copy_modules, parse_index
from pytest_vmsandbox.image.programs import Program
from pytest_vmsandbox.image.recipe import BOOT_MODULES, ESSENTIAL_MODULES

VMLINUX: Final = "vmlinux"
VMLINUZ: Final = "vmlinuz"
BOOT_MODULES_ARCHIVE: Final = "boot-modules.cpio"
MODULES_DISK: Final = "modules.img"


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelFiles:
    """A kernel as it is installed: its file, and its directory of modules."""

    kernel: Path
    modules: Path

    def read(self) -> Kernel:
        """The kernel; HostUnfit when it may not be read, RequestInvalid when it is none."""
        try:
            return parse_kernel(self.kernel.read_bytes(), source=str(self.kernel))
        except PermissionError as error:
            raise HostUnfit(
                "VMS-HOST-KERNEL",
                f"reading the host's kernel {self.kernel}",
                str(error),
                f"sudo chmod +r {self.kernel}, or boot the packaged kernel of image mini",
            ) from error
        except OSError as error:
            raise RequestInvalid(f"{self.kernel}: {error.strerror}") from error


def installed_kernel(kernel: Path) -> KernelFiles:
    """The kernel at that path, as in /boot/vmlinuz-RELEASE, with its modules beside it.

    They are looked for in the same root's lib/modules, and where distributions keep a kernel
    in the directory of its modules, there. RequestInvalid when there are none.
    """
    release = KernelFiles(kernel=kernel, modules=kernel.parent).read().release
    root = kernel.parent.parent
    for place in (root / "lib/modules", root / "usr/lib/modules", kernel.parent.parent):
        if (place / release / "modules.builtin").is_file():
            return KernelFiles(kernel=kernel, modules=place / release)
    raise RequestInvalid(f"{kernel} is {release}, and {root}/lib/modules/{release} is not there")


def make_layer(
    files: KernelFiles, *, busybox: Path, scratch: Path, out: Path, deadline: Deadline
) -> Kernel:
    """Write the kernel's files into the directory `out`; `scratch` is a new directory."""
    kernel = files.read()
    tree = scratch / "lib" / "modules" / kernel.release
    copy_modules(files.modules, tree)
    # The guest's modprobe is busybox's: let the same program write what it will read.
    Program(path=str(busybox)).run(["depmod", "-b", scratch, kernel.release], deadline=deadline)
    (out / VMLINUZ).write_bytes(kernel.shipped)
    if (elf := uncompressed(kernel)) is not None:
        (out / VMLINUX).write_bytes(elf)
    _write_boot_modules(_read_index(tree), tree, out / BOOT_MODULES_ARCHIVE)
    make_modules_disk(scratch / "lib" / "modules", out / MODULES_DISK, deadline=deadline)
    return kernel


def _read_index(tree: Path) -> ModuleIndex:
    return parse_index(
        dependencies=(tree / "modules.dep").read_text(encoding="utf-8"),
        builtin=(tree / "modules.builtin").read_text(encoding="utf-8"),
    )


def _write_boot_modules(index: ModuleIndex, tree: Path, out: Path) -> None:
    paths = index.load_order(BOOT_MODULES, essential=ESSENTIAL_MODULES)
    # The parents come from the root file system that is unpacked first, but a layer's archive
    # has them too: it is then right by itself.
    entries = [cpio.directory(name) for name in ("etc", "etc/vmsandbox", "lib", "lib/modules")]
    entries.append(cpio.file("etc/vmsandbox/modules", "".join(f"{p}\n" for p in paths).encode()))
    made: set[str] = set()
    for path in paths:
        full = PurePosixPath("lib/modules", tree.name, path)
        for parent in [str(p) for p in reversed(full.parents[:-3])]:
            if parent not in made:
                made.add(parent)
                entries.append(cpio.directory(parent))
        entries.append(cpio.file(str(full), (tree / path).read_bytes()))
    with out.open("wb") as file:
        cpio.write_archive(entries, file)
