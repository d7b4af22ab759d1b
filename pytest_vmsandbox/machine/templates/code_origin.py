"""Whose code it is, by the file it lies in: the tests' own, an installed package's, or Python's."""

from __future__ import annotations

import hashlib
import sysconfig
from enum import Enum, auto
from functools import cache
from pathlib import Path
from types import FunctionType

from pytest_vmsandbox.machine.templates.module_file import file_of

_INSTALLED = tuple(Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib"))
_INSTALLED_NAMES = frozenset({"site-packages", "dist-packages"})
_PYTHON = tuple(Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib"))
_US = Path(__file__).resolve().parents[2]


class Origin(Enum):
    """Own code counts by what is in it, an installed one's by its file, Python's by its name."""

    OWN = auto()
    INSTALLED = auto()
    PYTHON = auto()


def origin_of(value: object) -> Origin:
    """Whose function or class that is: by where its code lies, whatever it says of its module."""
    if isinstance(value, FunctionType):
        return origin_of_file(value.__code__.co_filename)
    file = file_of(str(getattr(value, "__module__", None) or "builtins"))
    if file is None and getattr(value, "__module__", None) == "__main__":
        return Origin.OWN
    return origin_of_file(file)


def origin_of_file(file: str | Path | None) -> Origin:
    """Whose that file is; without one, Python's, in which it is built."""
    if file is None or str(file).startswith("<frozen "):
        return Origin.PYTHON
    if str(file).startswith("<"):
        return Origin.OWN
    return _origin_of(Path(file))


def digest_of_file(file: Path) -> str:
    """The SHA-256 of what is in it; nothing where it can't be read."""
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError:
        return ""


@cache
def _origin_of(file: Path) -> Origin:
    path = file.resolve()
    if path.is_relative_to(_US):
        return Origin.PYTHON  # it comes with the recipe of the machine, as the agent does
    if not _INSTALLED_NAMES.isdisjoint(path.parts) or any(map(path.is_relative_to, _INSTALLED)):
        return Origin.INSTALLED
    return Origin.PYTHON if any(map(path.is_relative_to, _PYTHON)) else Origin.OWN
