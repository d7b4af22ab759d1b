"""A recipe: which packages an image is made of, and what its kernel loads first."""

from __future__ import annotations

import platform
from dataclasses import dataclass, replace
from typing import Final

from pytest_vmsandbox.errors import HostUnfit, RequestInvalid

# What the machine is called by uname(2), and by dpkg.
DEBIAN_ARCHITECTURES: Final = {"x86_64": "amd64", "aarch64": "arm64"}

# Everything between the kernel's first line and our agent's hello. In this order; what a kernel
# has built in, or lacks, is left out, but for the essential ones.
BOOT_MODULES: Final = (
    "virtio_pci",
    "virtio_mmio",
    "virtio_console",
    "virtio_blk",
    # ext4 asks the crypto API for it by name, which no list of dependencies shows.
    "crc32c_generic",
    "ext4",
    "virtio_rng",
    "pvpanic_pci",
)
ESSENTIAL_MODULES: Final = frozenset({"virtio_console", "virtio_blk", "ext4"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How an image of that name is made.

    `kernels` are packages, by preference: the first that the host's package sources offer is
    followed to the kernel that it depends on, so Debian's names and Ubuntu's stand side by side.
    None at all: the kernel comes from the host.
    """

    name: str
    summary: str
    kernels: tuple[str, ...]
    packages: tuple[str, ...] = ("busybox-static",)

    def kernels_for(self, architecture: str) -> tuple[str, ...]:
        """The kernel packages by preference, as dpkg names them on `architecture`."""
        debian = DEBIAN_ARCHITECTURES[architecture]
        return tuple(name.format(architecture=debian) for name in self.kernels)


RECIPES: Final = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            name="mini",
            summary="the distribution's cloud kernel, busybox, our agent",
            kernels=("linux-image-cloud-{architecture}", "linux-image-virtual"),
        ),
        Recipe(
            name="mini-full",
            summary="as mini, with the kernel for all hardware: 9p, and every driver",
            kernels=("linux-image-{architecture}", "linux-image-generic"),
        ),
    )
}


def on_host_kernel(recipe: Recipe) -> Recipe:
    """The same without a packaged kernel, under a name of its own."""
    return replace(recipe, name=f"{recipe.name}-on-host-kernel", kernels=())


def recipe_named(name: str) -> Recipe:
    """The recipe of that name; RequestInvalid, naming those that exist, when there is none."""
    if name not in RECIPES:
        raise RequestInvalid(
            f"there is no image recipe {name!r}",
            f"recipes: {', '.join(RECIPES)}; a directory is written with a slash, as in ./{name}",
        )
    return RECIPES[name]


def host_architecture() -> str:
    """The host's architecture, as uname(2) says it; HostUnfit when we have no recipe for it."""
    machine = {"arm64": "aarch64", "amd64": "x86_64"}.get(platform.machine(), platform.machine())
    if machine not in DEBIAN_ARCHITECTURES:
        raise HostUnfit(
            "VMS-IMAGE-BUILDER",
            "images are built on the architecture that they are for",
            f"this host is {machine}; recipes are for {', '.join(DEBIAN_ARCHITECTURES)}",
            "--vm-image=PATH with an image that was built elsewhere (docs/images.md)",
        )
    return machine
