"""The packages that recipes were resolved to, kept so that a rebuild needs no network."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pytest_vmsandbox.deadline import Deadline
from pytest_vmsandbox.image.apt import Apt, Package, open_apt
from pytest_vmsandbox.image.programs import Program
from pytest_vmsandbox.image.recipe import DEBIAN_ARCHITECTURES, Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolution:
    """What a recipe means on this host: `kernel` carries the kernel, `others` the rest."""

    kernel: tuple[Package, ...]
    others: tuple[Package, ...]

    @property
    def packages(self) -> tuple[Package, ...]:
        """All of them."""
        return self.kernel + self.others


@dataclass(frozen=True, slots=True, kw_only=True)
class PackageStore:
    """Package files, and the resolution of each recipe, in `directory`."""

    directory: Path

    def resolution(self, recipe: Recipe, architecture: str) -> Resolution | None:
        """What the recipe was resolved to the last time; None when it never was."""
        try:
            document = json.loads(self._kept(recipe, architecture).read_bytes())
            return Resolution(
                kernel=tuple(Package(**fields) for fields in document["kernel"]),
                others=tuple(Package(**fields) for fields in document["others"]),
            )
        except (OSError, ValueError, TypeError, KeyError):
            return None  # never made, or damaged: it is made again

    def resolve(
        self, recipe: Recipe, architecture: str, *, scratch: Path, deadline: Deadline
    ) -> Resolution:
        """Ask the host's package sources afresh, and download what is not here yet.

        HostUnfit when that fails; what was kept before is then still kept.
        """
        debian = DEBIAN_ARCHITECTURES[architecture]
        with open_apt(scratch, architecture=debian, deadline=deadline) as apt:
            resolution = Resolution(
                kernel=_kernel(apt, recipe, architecture), others=apt.named(recipe.packages)
            )
            self.directory.mkdir(parents=True, exist_ok=True)
            if missing := self._missing(resolution.packages):
                apt.download(missing, self.directory)
        self._keep(resolution, self._kept(recipe, architecture))
        self._remove_unused()
        return resolution

    def is_complete(self, resolution: Resolution) -> bool:
        """Whether every file is here, with its checksum."""
        return not self._missing(resolution.packages)

    def extract(self, packages: Sequence[Package], into: Path, *, deadline: Deadline) -> None:
        """Unpack the files of `packages` below `into`; no maintainer script runs."""
        into.mkdir(parents=True)
        dpkg_deb = Program.find("dpkg-deb")
        for package in packages:
            dpkg_deb.run(["--extract", self.directory / package.file_name, into], deadline=deadline)

    def _missing(self, packages: Sequence[Package]) -> list[Package]:
        return [p for p in packages if not p.is_whole(self.directory / p.file_name)]

    def _kept(self, recipe: Recipe, architecture: str) -> Path:
        return self.directory / f"{recipe.name}-{architecture}.json"

    def _remove_unused(self) -> None:
        # What no resolution names any more is an older version of something.
        named = {
            Package(**fields).file_name
            for path in self.directory.glob("*.json")
            for part in json.loads(path.read_bytes()).values()
            for fields in part
        }
        for path in self.directory.glob("*.deb"):
            if path.name not in named:
                path.unlink()

    def _keep(self, resolution: Resolution, path: Path) -> None:
        half = path.with_suffix(".half")
        half.write_text(json.dumps(asdict(resolution), indent=2), encoding="utf-8")
        half.replace(path)


def _kernel(apt: Apt, recipe: Recipe, architecture: str) -> tuple[Package, ...]:
    if not recipe.kernels:
        return ()
    return apt.kernel_parts(apt.first_offered(recipe.kernels_for(architecture)))
