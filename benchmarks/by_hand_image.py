"""What the by-hand machine boots from: the distribution's kernel, busybox, qemu-guest-agent.

The initramfs holds no more than it takes, and is not compressed: both favour this side.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.setting import Setting
from pytest_vmsandbox.deadline import Deadline
from pytest_vmsandbox.image import cpio
from pytest_vmsandbox.image.apt import open_apt
from pytest_vmsandbox.image.image import Image
from pytest_vmsandbox.image.modules import copy_modules, parse_index
from pytest_vmsandbox.image.packages import PackageStore
from pytest_vmsandbox.image.programs import Program
from pytest_vmsandbox.image.recipe import DEBIAN_ARCHITECTURES, recipe_named

# Raised by hand with every change of what is below.
FORMAT: Final = 1

# By preference, since names differ between releases of Debian and Ubuntu.
_PACKAGES: Final = (
    ("busybox-static",),
    ("qemu-guest-agent",),
    ("libc6",),
    ("libglib2.0-0", "libglib2.0-0t64"),
    ("libpcre2-8-0",),
    ("libnuma1",),
    ("libudev1",),
    ("liburing2",),
)
_LIBRARY: Final = re.compile(
    r"(lib(c|m|pthread|dl|rt|glib-2\.0|gmodule-2\.0|pcre2-8|numa|udev|uring)|ld-linux-[\w-]+)\.so\.\d"
)
_DIRECTORIES: Final = ("bin", "dev", "etc", "lib", "lib64", "proc", "run", "sys", "tmp", "var")
_APPLETS: Final = ("sh", "mount", "insmod", "cat", "true", "sleep", "mdev", "poweroff")
_MODULES: Final = ("virtio_pci", "virtio_console")

_INIT: Final = """\
#!/bin/sh
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
for module in {modules}; do insmod "/lib/$module"; done
while :; do
    for port in /sys/class/virtio-ports/*; do
        read -r name < "$port/name" || continue
        [ "$name" = org.qemu.guest_agent.0 ] || continue
        exec qemu-ga --method=virtio-serial --path="/dev/${{port##*/}}" --statedir=/run
    done
    sleep 0.01
done
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ByHandImage:
    """Kernel and initramfs."""

    kernel: Path
    initramfs: Path


def prepare_by_hand_image(ours: Image, setting: Setting) -> ByHandImage:
    """That machine's kernel, as the distribution ships it, and an initramfs; kept in the cache.

    Raises HostUnfit where the packages can't be had.
    """
    place = setting.cache_dir / "benchmarks"
    made = place / f"by-hand-{FORMAT}-{ours.kernel_release}.cpio"
    if not made.is_file():
        setting.say("building the by-hand initramfs: busybox and qemu-guest-agent")
        place.mkdir(parents=True, exist_ok=True)
        with setting.scratch() as scratch:
            _build(ours, setting.cache_dir / "packages", scratch).rename(made)
    return ByHandImage(kernel=ours.compressed_kernel or ours.kernel, initramfs=made)


def _build(ours: Image, packages: Path, scratch: Path) -> Path:
    deadline = Deadline.after(seconds=600)
    extract_packages(_PACKAGES, ours, scratch, deadline=deadline)
    modules = extract_modules(_MODULES, ours, packages, scratch, deadline=deadline)
    built = scratch / "by-hand.cpio"
    with built.open("wb") as file:
        cpio.write_archive(_entries(scratch / "root", modules), file)
    return built


def extract_packages(
    wanted: Sequence[Sequence[str]], ours: Image, scratch: Path, *, deadline: Deadline
) -> Path:
    """Download packages, each given by its names by preference, and unpack them: the directory.

    Raises HostUnfit where they can't be had.
    """
    debian = DEBIAN_ARCHITECTURES[ours.architecture]
    with open_apt(scratch / "apt", architecture=debian, deadline=deadline) as apt:
        packages = apt.named([apt.first_offered(names) for names in wanted])
        apt.download(packages, scratch)
    root = scratch / "root"
    PackageStore(directory=scratch).extract(packages, root, deadline=deadline)
    return root


def extract_modules(
    names: Sequence[str], ours: Image, packages: Path, scratch: Path, *, deadline: Deadline
) -> Sequence[Path]:
    """The files to load, in order, as `modprobe --show-depends` would list them.

    Below `scratch`, where the package of busybox has been unpacked.
    """
    store, release = PackageStore(directory=packages), ours.kernel_release
    resolution = store.resolution(recipe_named("mini"), ours.architecture)
    if resolution is None or not store.is_complete(resolution):
        raise FileNotFoundError(f"{packages} has no packages of image mini: build it first")
    store.extract(resolution.kernel, scratch / "kernel", deadline=deadline)
    (found,) = [*scratch.glob("kernel/**/lib/modules/*"), *scratch.glob("kernel/lib/modules/*")][:1]
    tree = scratch / "tree" / "lib" / "modules" / release
    copy_modules(found, tree)
    busybox = Program(path=str(_busybox(scratch / "root")))
    busybox.run(["depmod", "-b", scratch / "tree", release], deadline=deadline)
    index = parse_index(
        dependencies=(tree / "modules.dep").read_text(encoding="utf-8"),
        builtin=(tree / "modules.builtin").read_text(encoding="utf-8"),
    )
    return [tree / path for path in index.load_order(names, essential=frozenset(names))]


def _busybox(root: Path) -> Path:
    return next(p for p in (root / "bin/busybox", root / "usr/bin/busybox") if p.is_file())


def _entries(root: Path, modules: Sequence[Path]) -> Iterator[cpio.Entry]:
    names = " ".join(module.name for module in modules)
    yield cpio.directory(".")
    yield from (cpio.directory(name) for name in _DIRECTORIES)
    yield cpio.character_device("dev/console", major=5, minor=1)
    yield cpio.file("init", _INIT.format(modules=names).encode(), permissions=0o755)
    yield cpio.file("bin/busybox", _busybox(root).read_bytes(), permissions=0o755)
    yield from (cpio.symlink(f"bin/{applet}", target="busybox") for applet in _APPLETS)
    agent = next(root.glob("usr/sbin/qemu-ga"))
    yield cpio.file("bin/qemu-ga", agent.read_bytes(), permissions=0o755)
    yield from (cpio.file(f"lib/{module.name}", module.read_bytes()) for module in modules)
    yield from _library_entries(root)


def _library_entries(root: Path) -> Iterator[cpio.Entry]:
    """The shared libraries flat in /lib under their sonames, and the loader in /lib64 too."""
    seen: set[str] = set()
    for path in sorted(root.rglob("*.so.*")):
        if _LIBRARY.fullmatch(path.name) and path.name not in seen:
            seen.add(path.name)
            # A loader is found by its full name, which begins with one or the other.
            for place in ("lib", "lib64") if path.name.startswith("ld-") else ("lib",):
                yield cpio.file(f"{place}/{path.name}", path.read_bytes(), permissions=0o755)
