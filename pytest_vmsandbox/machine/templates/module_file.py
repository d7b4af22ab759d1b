"""Which file a module comes from, and which modules code imports; nothing is imported for it."""

from __future__ import annotations

import dis
import importlib.util
import sys
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path
from types import CodeType


def file_of(module: str) -> Path | None:
    """The file of a module, loaded or not; None where it has none, or there is no such module."""
    if module in sys.modules:
        file = getattr(sys.modules[module], "__file__", None)
        return Path(file) if isinstance(file, str) else None
    parts, places, origin = module.split("."), None, None
    for number in range(len(parts)):
        try:
            spec = PathFinder.find_spec(".".join(parts[: number + 1]), places)
        except (ImportError, ValueError):
            return None
        if spec is None:
            return None
        places, origin = spec.submodule_search_locations, spec.origin
        if places is None and number + 1 < len(parts):
            return None
    return Path(origin) if origin else None


def imports_of(code: CodeType, *, package: str) -> Iterator[str]:
    """The names of modules that it imports, and of what may be modules that it imports from them.

    `package` is that of the module which the code is in.
    """
    before = list(dis.get_instructions(code))
    for number, instruction in enumerate(before):
        if instruction.opname == "IMPORT_NAME":
            level, names = before[number - 2].argval, before[number - 1].argval
            yield from _named(str(instruction.argval), level, names or (), package)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from imports_of(constant, package=package)


def _named(module: str, level: int, names: tuple[str, ...], package: str) -> Iterator[str]:
    try:
        full = importlib.util.resolve_name("." * level + module, package)
    except ImportError:  # from above the uppermost package
        return
    parts = full.split(".")
    yield from (".".join(parts[: end + 1]) for end in range(len(parts)))
    yield from (f"{full}.{name}" for name in names if name != "*")
