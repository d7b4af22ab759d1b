"""Building: out of packages, a kernel and an agent, a directory that is an image."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Final

from pytest_vmsandbox.deadline import Deadline
from pytest_vmsandbox.errors import HostUnfit
from pytest_vmsandbox.image import cpio, layer
from pytest_vmsandbox.image.image import Image, sha256_of
from pytest_vmsandbox.image.initramfs import RootFiles, plan_entries
from pytest_vmsandbox.image.layer import KernelFiles, make_layer
from pytest_vmsandbox.image.manifest import MANIFEST_NAME, FileEntry, Manifest
from pytest_vmsandbox.image.packages import PackageStore, Resolution
from pytest_vmsandbox.image.programs import Program
from pytest_vmsandbox.image.recipe import Recipe

INITRAMFS: Final = "initramfs.cpio"

# Measured under TCG; docs/images.md says what each is for and what it saves.
COMMAND_LINES: Final = {
    "x86_64": ("console=ttyS0", "cryptomgr.notests", "no_timer_check"),
    "aarch64": ("console=ttyAMA0", "cryptomgr.notests"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Ingredients:
    """All that an image is made of; the digests below are over this and nothing else."""

    recipe: Recipe
    architecture: str
    resolution: Resolution
    agent: Path
    host_kernel: KernelFiles | None
    mke2fs_version: str

    @property
    def layer_digest(self) -> str:
        """Names the kernel's share of the image."""
        return _digest(self._kernel_facts())

    @property
    def image_digest(self) -> str:
        """Names the image."""
        return _digest(
            {
                "layer": self._kernel_facts(),
                "recipe": self.recipe.name,
                "agent": sha256_of(self.agent),
                "command_line": COMMAND_LINES[self.architecture],
            }
        )

    @property
    def made_from(self) -> dict[str, str]:
        """The ingredients by name, for people."""
        host = self.host_kernel
        return {
            **({} if host is None else {"host kernel": str(host.kernel)}),
            **{package.name: package.version for package in self.resolution.packages},
            "agent": sha256_of(self.agent),
            "builder": builder_digest()[:16],
            "mke2fs": self.mke2fs_version,
        }

    def _kernel_facts(self) -> dict[str, object]:
        host = self.host_kernel
        return {
            "builder": builder_digest(),
            "architecture": self.architecture,
            "packages": [asdict(package) for package in self.resolution.packages],
            "host kernel": None if host is None else _host_kernel_facts(host),
            "mke2fs": self.mke2fs_version,
        }


@cache
def builder_digest() -> str:
    """Names this version of the builder: the text of this room's modules.

    A version number would have to be raised by hand whenever the same ingredients come to make
    another image, and would be forgotten; an image that is made again for a comment costs seconds.
    """
    whole = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        whole.update(path.read_bytes())
    return whole.hexdigest()


def build_layer(
    wanted: Ingredients, *, store: PackageStore, scratch: Path, out: Path, deadline: Deadline
) -> None:
    """Write the kernel's share into the new directory `out`."""
    out.mkdir(parents=True)
    busybox = _extract_busybox(wanted, store, scratch / "others", deadline)
    files = wanted.host_kernel or _packaged_kernel(wanted, store, scratch / "kernel", deadline)
    kernel = make_layer(
        files, busybox=busybox, scratch=scratch / "tree", out=out, deadline=deadline
    )
    _finish(
        Manifest(
            name=f"kernel-{kernel.release}",
            digest=wanted.layer_digest,
            architecture=wanted.architecture,
            kernel_release=kernel.release,
            kernel=layer.VMLINUX if (out / layer.VMLINUX).exists() else layer.VMLINUZ,
            compressed_kernel=layer.VMLINUZ if (out / layer.VMLINUX).exists() else None,
            initramfs=layer.BOOT_MODULES_ARCHIVE,
            modules=layer.MODULES_DISK,
            made_from=wanted.made_from,
        ),
        out,
    )


def build_image(
    wanted: Ingredients,
    *,
    base: Image,
    store: PackageStore,
    scratch: Path,
    out: Path,
    deadline: Deadline,
) -> None:
    """Write the image into the new directory `out`; `base` is the layer for its kernel."""
    out.mkdir(parents=True)
    busybox = _extract_busybox(wanted, store, scratch / "others", deadline)
    applets = Program(path=str(busybox)).run(["--list-full"], deadline=deadline).stdout.split()
    root = RootFiles(agent=wanted.agent.read_bytes(), busybox=busybox.read_bytes(), applets=applets)
    with (out / INITRAMFS).open("wb") as file:
        cpio.write_archive(plan_entries(root), file)
        file.write(base.initramfs.read_bytes())
    for path in (base.kernel, base.compressed_kernel, base.modules):
        if path is not None:
            _link_or_copy(path, out / path.name)
    _finish(
        Manifest(
            name=wanted.recipe.name,
            digest=wanted.image_digest,
            architecture=wanted.architecture,
            kernel_release=base.kernel_release,
            kernel=base.kernel.name,
            compressed_kernel=_name(base.compressed_kernel),
            initramfs=INITRAMFS,
            modules=_name(base.modules),
            command_line=COMMAND_LINES[wanted.architecture],
            made_from=wanted.made_from,
        ),
        out,
    )


def _finish(manifest: Manifest, out: Path) -> None:
    # The manifest comes last, and says of each file what it must be.
    files = {
        name: FileEntry(size=(out / name).stat().st_size, sha256=sha256_of(out / name))
        for name in manifest.file_names
    }
    text = replace(manifest, files=files).render()
    (out / MANIFEST_NAME).write_text(text, encoding="utf-8")
    for path in out.iterdir():
        path.chmod(0o444)
    out.chmod(0o755)


def _extract_busybox(
    wanted: Ingredients, store: PackageStore, into: Path, deadline: Deadline
) -> Path:
    store.extract(wanted.resolution.others, into, deadline=deadline)
    for place in ("bin/busybox", "usr/bin/busybox"):
        if (into / place).is_file():
            return into / place
    raise _misses("busybox", wanted)


def _packaged_kernel(
    wanted: Ingredients, store: PackageStore, into: Path, deadline: Deadline
) -> KernelFiles:
    store.extract(wanted.resolution.kernel, into, deadline=deadline)
    kernels = sorted(into.glob("boot/vmlinuz-*"))
    modules = [*into.glob("lib/modules/*"), *into.glob("usr/lib/modules/*")]
    if len(kernels) != 1 or len(modules) != 1:
        raise _misses("one kernel with its modules", wanted)
    return KernelFiles(kernel=kernels[0], modules=modules[0])


def _misses(what: str, wanted: Ingredients) -> HostUnfit:
    names = ", ".join(package.name for package in wanted.resolution.packages)
    return HostUnfit(
        "VMS-IMAGE-PACKAGES",
        f"{what} in the packages of image {wanted.recipe.name}",
        f"not found in {names}",
        "--vm-image=PATH with another image (docs/images.md)",
    )


def _name(path: Path | None) -> str | None:
    return None if path is None else path.name


def _link_or_copy(source: Path, target: Path) -> None:
    # A layer and the images on it never change, so they can share what is on disk.
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _host_kernel_facts(host: KernelFiles) -> dict[str, object]:
    modules = [
        (str(path.relative_to(host.modules)), status.st_size, status.st_mtime_ns)
        for path in sorted(host.modules.rglob("*.ko*"))
        for status in [path.stat()]
    ]
    return {"kernel": sha256_of(host.kernel), "modules": modules}


def _digest(facts: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
