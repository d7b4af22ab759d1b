"""A kernel's modules: which depends on which, and which must be loaded to boot."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pytest_vmsandbox.errors import RequestInvalid
from pytest_vmsandbox.image.decompress import CannotDecompress, decompress

_COMPRESSED: Final = (".xz", ".gz", ".zst")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleIndex:
    """modules.dep and modules.builtin of one kernel (modules.dep(5)).

    `files` maps a module's name to its path below /lib/modules/RELEASE, `depends` a path to the
    paths that must be loaded before it.
    """

    files: Mapping[str, str]
    depends: Mapping[str, tuple[str, ...]]
    builtin: frozenset[str]

    def load_order(self, names: Iterable[str], *, essential: frozenset[str]) -> tuple[str, ...]:
        """The files to load, each after what it depends on, so that `names` are there.

        What is built in needs no file. What the kernel lacks is left out, or is RequestInvalid
        when it is in `essential`.
        """
        order: dict[str, None] = {}
        for name in names:
            if name in self.files:
                self._visit(self.files[name], order, ())
            elif name in essential and name not in self.builtin:
                raise RequestInvalid(
                    f"this kernel has no {name}, neither built in nor as a module",
                    "a machine needs it to boot; choose another kernel",
                )
        return tuple(order)

    def _visit(self, path: str, order: dict[str, None], above: tuple[str, ...]) -> None:
        if path in order or path in above:
            return
        for dependency in self.depends.get(path, ()):
            self._visit(dependency, order, (*above, path))
        order[path] = None


def module_name(path: str) -> str:
    """The kernel's name for the module in that file: kernel/a/virtio-rng.ko is virtio_rng."""
    return Path(path).name.split(".ko")[0].replace("-", "_")


def parse_index(*, dependencies: str, builtin: str) -> ModuleIndex:
    """Read the texts of modules.dep and modules.builtin."""
    depends = {}
    for line in dependencies.splitlines():
        path, colon, needed = line.partition(":")
        if colon:
            depends[path] = tuple(needed.split())
    return ModuleIndex(
        files={module_name(path): path for path in depends},
        depends=depends,
        builtin=frozenset(module_name(line) for line in builtin.splitlines() if line),
    )


def copy_modules(source: Path, target: Path) -> None:
    """Copy the modules below `source`, uncompressed, into the new directory `target`.

    Only what is about modules comes along, not the `build` and `source` links to headers.
    Raises RequestInvalid when a file can't be decompressed here.
    """
    for path in sorted(source.rglob("*")):
        relative = path.relative_to(source)
        if path.is_symlink() or not path.is_file():
            continue
        if ".ko" in path.suffixes:
            _copy_module(path, target / relative)
        elif relative.parent == Path() and path.name.startswith("modules."):
            _copy(path, target / relative)


def _copy_module(path: Path, target: Path) -> None:
    if path.suffix not in _COMPRESSED:
        _copy(path, target)
        return
    try:
        content = decompress(path.read_bytes())
    except CannotDecompress as reason:
        raise RequestInvalid(f"{path} can't be decompressed: {reason}") from reason
    target.parent.mkdir(parents=True, exist_ok=True)
    target.with_suffix("").write_bytes(content)


def _copy(path: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, target)
