"""iperf3 for guests that have none: program, libraries and loader, and a card's modules."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.by_hand_image import ByHandImage, extract_modules, extract_packages
from benchmarks.setting import Setting
from pytest_vmsandbox.deadline import Deadline
from pytest_vmsandbox.image import cpio
from pytest_vmsandbox.image.image import Image

# Raised by hand with every change of what is below.
FORMAT: Final = 1

# Where it lies in a guest.
PLACE: Final = "/iperf"

# By preference, since names differ between releases of Debian and Ubuntu. Busybox has depmod.
_PACKAGES: Final = (
    ("iperf3",),
    ("libiperf0",),
    ("libsctp1", "libsctp1t64"),
    ("libssl3", "libssl3t64"),
    ("libc6",),
    ("busybox-static",),
)
_FILES: Final = ("libiperf.so.0", "libsctp.so.1", "libcrypto.so.3", "libc.so.6", "libm.so.6")
_MODULES: Final = ("virtio_net",)


@dataclass(frozen=True, slots=True, kw_only=True)
class IperfPrograms:
    """A directory that is to be `PLACE` in a guest; the modules are numbered in their order."""

    directory: Path

    @property
    def files(self) -> Sequence[Path]:
        """All of them."""
        return sorted(self.directory.iterdir())

    def added_to(self, image: ByHandImage, target: Path) -> ByHandImage:
        """The same image with them in it, the new initramfs in the file `target`."""
        archive = io.BytesIO()
        cpio.write_archive(self._entries(), archive)
        # The kernel unpacks archives that stand one after the other (buffer-format.rst).
        target.write_bytes(image.initramfs.read_bytes() + archive.getvalue())
        return ByHandImage(kernel=image.kernel, initramfs=target)

    def _entries(self) -> Iterator[cpio.Entry]:
        place = PLACE.strip("/")
        yield cpio.directory(place)
        for path in self.files:
            yield cpio.file(f"{place}/{path.name}", path.read_bytes(), permissions=0o755)


def iperf(*arguments: str) -> list[str]:
    """The argv, in a guest that has them."""
    return [f"{PLACE}/loader", "--library-path", PLACE, f"{PLACE}/iperf3", *arguments]


def prepare_iperf_programs(ours: Image, setting: Setting) -> IperfPrograms:
    """Those for that machine's kernel; kept in the cache.

    Raises HostUnfit where the packages can't be had.
    """
    made = setting.cache_dir / "benchmarks" / f"iperf-{FORMAT}-{ours.kernel_release}"
    if not made.is_dir():
        setting.say("fetching iperf3 and its libraries")
        with setting.scratch() as scratch:
            _gather(ours, setting.cache_dir / "packages", scratch).rename(made)
    return IperfPrograms(directory=made)


def _gather(ours: Image, packages: Path, scratch: Path) -> Path:
    deadline = Deadline.after(seconds=600)
    root = extract_packages(_PACKAGES, ours, scratch, deadline=deadline)
    modules = extract_modules(_MODULES, ours, packages, scratch, deadline=deadline)
    gathered = scratch / "iperf"
    gathered.mkdir()
    wanted = {name: name for name in _FILES} | {"iperf3": "bin/iperf3", "loader": "ld-linux-*.so.*"}
    for name, pattern in wanted.items():
        found = next(path for path in sorted(root.rglob(pattern)) if path.is_file())
        shutil.copyfile(found, gathered / name)  # what a link leads to, under the link's name
        (gathered / name).chmod(0o755)
    for number, module in enumerate(modules):
        shutil.copyfile(module, gathered / f"{number}-{module.name}")
    return gathered
