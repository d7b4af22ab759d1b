"""What a setup is made of, as a digest: its own source, and what it uses of its module and around.

Of other people's code (the standard library, installed packages) only the names count.
"""

from __future__ import annotations

import dis
import functools
import hashlib
import inspect
import re
import sys
import sysconfig
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import Enum
from pathlib import Path, PurePath
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType

from pytest_vmsandbox.errors import RequestInvalid
from pytest_vmsandbox.machine.layer import Template

_INSTALLED = tuple(Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib"))
_PACKAGE = __name__.partition(".")[0]
_PLAIN = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    range,
    type(...),
    PurePath,
    Enum,
    re.Pattern,
)


def digest_setup(
    setup: Callable[..., object], *, inputs: Sequence[Path] = (), key: str | None = None
) -> str:
    """The SHA-256 of all that decides what `setup` does, as far as Python knows it.

    Where `inputs` lie does not count.

    Where it uses what can't be told by its text (an open file, a fixture's object, a function with
    no source), RequestInvalid names that, unless `key` stands for it.
    """
    walk = _Walk(inputs=[str(path) for path in inputs], lenient=key is not None)
    walk.take(setup, "setup")
    return hashlib.sha256("\0".join([*walk.seen, f"key {key!r}"]).encode()).hexdigest()


class _Walk:
    """Describes values; each function once, however they call each other."""

    def __init__(self, *, inputs: Sequence[str], lenient: bool) -> None:
        self._inputs = inputs
        self.seen: list[str] = []
        self._functions: set[object] = set()
        self._lenient = lenient

    def take(self, value: object, name: str) -> None:
        """Describe `value`, which is called `name` where it is used."""
        match value:
            case PurePath() | str() if str(value) in self._inputs:
                self.seen.append(f"{name} input {self._inputs.index(str(value))}")
            case Template():
                self.seen.append(f"{name} template {value.digest}")
            case _ if isinstance(value, _PLAIN):
                self.seen.append(f"{name} {type(value).__name__} {value!r}")
            case set() | frozenset() if all(isinstance(item, _PLAIN) for item in value):
                self.seen.append(f"{name} set {sorted(map(repr, value))}")
            case ModuleType():
                self.seen.append(f"{name} module {value.__name__}")
            case FunctionType() | type() | BuiltinFunctionType():
                self._take_code(value, name)
            case _:
                self._take_parts(value, name)

    def _take_parts(self, value: object, name: str) -> None:
        parts: Iterable[tuple[str, object]]
        match value:
            case tuple() | list():
                parts = ((f"[{number}]", item) for number, item in enumerate(value))
            case dict():
                parts = (("item", pair) for pair in value.items())
            case functools.partial():
                parts = ((part, getattr(value, part)) for part in ("func", "args", "keywords"))
            case MethodType():
                parts = ((part, getattr(value, part)) for part in ("__func__", "__self__"))
            case _:
                self._refuse(name, f"a {type(value).__name__}")
                return
        self.seen.append(f"{name} {type(value).__name__}")
        for part, item in parts:
            self.take(item, f"{name}.{part}")
        self.seen.append("end")

    def _take_code(self, value: FunctionType | type | BuiltinFunctionType, name: str) -> None:
        self.seen.append(f"{name} {value.__module__}.{value.__qualname__}")
        if value in self._functions or _is_of_others(value):
            return
        self._functions.add(value)
        try:
            self.seen.append(textwrap.dedent(inspect.getsource(value)))
        except (OSError, TypeError):
            self._refuse(name, "without source")
        if isinstance(value, FunctionType):
            for used, what in _used_by(value):
                self.take(what, used)

    def _refuse(self, name: str, what: str) -> None:
        if not self._lenient:
            raise RequestInvalid(
                f"{name}, {what}, is used by the setup of a template, and nothing tells whether it "
                "is still the same the next time",
                'give build() a key="..." of your own, and another one whenever it changes',
            )


def _is_of_others(value: object) -> bool:
    """Whether it is of an installed package, of Python, or of this package."""
    module = getattr(value, "__module__", None) or "builtins"
    if module.partition(".")[0] == _PACKAGE:
        return True
    if module.partition(".")[0] in sys.stdlib_module_names and module != "__main__":
        return True
    file = getattr(sys.modules.get(module), "__file__", None)
    return file is not None and any(
        Path(file).resolve().is_relative_to(place) for place in _INSTALLED
    )


def _used_by(function: FunctionType) -> Iterator[tuple[str, object]]:
    """What a function has of its surroundings: defaults, what it closes over, and globals."""
    yield "its defaults", function.__defaults__ or ()
    yield "its defaults", function.__kwdefaults__ or {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # nothing is in it yet
            continue
    for name in sorted(set(_globals_of(function.__code__))):
        if name in function.__globals__:
            yield name, function.__globals__[name]


def _globals_of(code: CodeType) -> Iterator[str]:
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            yield str(instruction.argval)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _globals_of(constant)
