"""What a setup is made of, as a digest: its own code, and what it uses of its module and around.

Own functions and classes count by their text and by the code that was loaded from it, and so does
all that they use; own modules by their whole text, and that of own modules which they import. Of an
installed package the file counts that a thing is from, of Python only the name.
"""

from __future__ import annotations

import dis
import functools
import hashlib
import inspect
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import Enum
from itertools import pairwise
from pathlib import Path, PurePath
from types import (
    BuiltinFunctionType,
    CellType,
    CodeType,
    FunctionType,
    MethodType,
    ModuleType,
)

from pytest_vmsandbox.errors import RequestInvalid
from pytest_vmsandbox.machine.templates.code_origin import Origin, origin_of, origin_of_file
from pytest_vmsandbox.machine.templates.layer import Template
from pytest_vmsandbox.machine.templates.loaded_code import all_within, functions_of, lines_of
from pytest_vmsandbox.machine.templates.module_file import file_of, imports_of
from pytest_vmsandbox.machine.templates.module_text import describe_module

_PLAIN = (type(None), bool, int, float, complex, str, bytes, range, type(...), PurePath)
_CACHED = type(functools.cache(len))
_CODE = (FunctionType, type, BuiltinFunctionType)
# What code is said to be from that was typed in or put together: many have each of these names, so
# what Python knows under it may be somebody else's text.
_ANYBODYS = ("<string>", "<stdin>")


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
    text = "\0".join([*walk.seen, f"key {key!r}"])
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


class _Walk:
    """Describes values; each function, class and module once, however they use each other."""

    def __init__(self, *, inputs: Sequence[str], lenient: bool) -> None:
        self._inputs = inputs
        self.seen: list[str] = []
        self._code: set[object] = set()
        self._modules: set[str] = set()
        self._around: list[object] = []
        self._classes = 0
        self._lenient = lenient

    def take(self, value: object, name: str) -> None:
        """Describe `value`, which is called `name` where it is used."""
        match value:
            case PurePath() | str() if str(value) in self._inputs:
                self.seen.append(f"{name} input {self._inputs.index(str(value))}")
            case Template():
                self.seen.append(f"{name} template {value.digest}")
            case Enum():
                self.seen.append(f"{name} {value!r}")
                self.take(type(value), "its class")
            case _ if isinstance(value, _PLAIN):
                self.seen.append(f"{name} {type(value).__name__} {value!r}")
            case re.Pattern():  # its repr is cut off
                self.seen.append(f"{name} pattern {value.flags} {value.pattern!r}")
            case set() | frozenset() if all(isinstance(item, _PLAIN) for item in value):
                self.seen.append(f"{name} set {sorted(map(repr, value))}")
            case ModuleType():
                self.seen.append(f"{name} module {value.__name__}")
                self._take_module(value.__name__)
            case FunctionType() | type() | BuiltinFunctionType():
                self._take_code(value, name)
            case _:
                self._take_parts(value, name)

    def _take_parts(self, value: object, name: str) -> None:
        if any(value is one for one in self._around):
            self.seen.append(f"{name} is around it")
            return
        parts = _parts_of(value)
        if parts is None:
            self._refuse(name, f"a {type(value).__name__}")
            return
        self.seen.append(f"{name} {type(value).__name__}")
        self._around.append(value)
        for part, item in parts:
            self.take(item, f"{name}.{part}")
        self._around.pop()
        self.seen.append("end")

    def _take_code(self, value: FunctionType | type | BuiltinFunctionType, name: str) -> None:
        self.seen.append(f"{name} {value.__module__}.{value.__qualname__}")
        if value in self._code:
            return
        self._code.add(value)
        origin = origin_of(value)
        if origin is Origin.INSTALLED:
            self._take_module(str(value.__module__))
        if origin is not Origin.OWN:
            self._take_wrapped(value)
        elif isinstance(value, FunctionType):
            self._take_function(value, name)
        elif isinstance(value, type):
            self._take_class(value, name)

    def _take_wrapped(self, value: object) -> None:
        """Of other people's function, what of our own it was made around."""
        for cell in getattr(value, "__closure__", None) or ():
            for _, held in _held(cell, ""):
                if isinstance(held, (*_CODE, functools.partial, MethodType)):
                    self.take(held, "it wraps")

    def _take_function(self, function: FunctionType, name: str) -> None:
        if self._classes and function.__code__.co_filename.startswith("<"):
            # It was made for its class, as for a dataclass, out of what that says.
            self.seen.extend([name, *lines_of(function.__code__)])
            return
        # Not of the function itself, which may say that it is another one (`functools.wraps`).
        self._take_text(function.__code__, name)
        self.seen.extend(lines_of(function.__code__))
        for used, what in _used_by(function):
            self.take(what, used)
        package = function.__globals__.get("__package__") or ""
        for module in sorted({*imports_of(function.__code__, package=package)}):
            self._take_module(module)
        for module in sorted(_modules_within(function)):
            self._take_module(module)

    def _take_class(self, cls: type, name: str) -> None:
        self._take_text(cls, name)
        for base in cls.__bases__:
            self.take(base, "its base")
        self._classes += 1
        for attribute, value in sorted(vars(cls).items(), key=lambda item: item[0]):
            for part in functions_of(value):
                self.take(part, attribute)
            if isinstance(value, _PLAIN) and not attribute.startswith("__"):
                self.take(value, attribute)
        self._classes -= 1

    def _take_text(self, value: CodeType | type, name: str) -> None:
        if isinstance(value, CodeType) and value.co_filename in _ANYBODYS:
            self._refuse(name, "without source")
            return
        try:
            self.seen.append(textwrap.dedent(inspect.getsource(value)))
        except (OSError, TypeError):
            self._refuse(name, "without source")

    def _take_module(self, name: str) -> None:
        self.seen.extend(describe_module(name, seen=self._modules))

    def _refuse(self, name: str, what: str) -> None:
        if not self._lenient:
            raise RequestInvalid(
                f"{name}, {what}, is used by the setup of a template, and nothing tells whether it "
                "is still the same the next time",
                'give build() a key="..." of your own, and another one whenever it changes',
            )


def _parts_of(value: object) -> Iterable[tuple[str, object]] | None:
    """What a value is made of; None where nobody can tell."""
    match value:
        case tuple() | list():
            return ((f"[{number}]", item) for number, item in enumerate(value))
        case dict():
            return (("item", pair) for pair in value.items())
        case functools.partial():
            return ((part, getattr(value, part)) for part in ("func", "args", "keywords"))
        case MethodType():
            return ((part, getattr(value, part)) for part in ("__func__", "__self__"))
        case _ if isinstance(value, _CACHED):
            return [("function", value.__wrapped__)]
    return None


def _used_by(function: FunctionType) -> Iterator[tuple[str, object]]:
    """What a function has of its surroundings: defaults, what it closes over, and globals."""
    yield "its defaults", function.__defaults__ or ()
    yield "its defaults", function.__kwdefaults__ or {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        yield from _held(cell, name)
    names = sorted(set(_globals_of(function.__code__)))
    around = function.__globals__
    yield from ((name, around[name]) for name in names if name in around)
    for module, attribute in _attributes_of_modules(function):
        if not isinstance(vars(module).get(attribute, module), ModuleType):
            yield f"{module.__name__}.{attribute}", getattr(module, attribute)


def _modules_within(function: FunctionType) -> set[str]:
    """What may be modules in packages that it uses, loaded yet or not."""
    return {f"{module.__name__}.{name}" for module, name in _attributes_of_modules(function)}


def _attributes_of_modules(function: FunctionType) -> Iterator[tuple[ModuleType, str]]:
    """What a function takes of modules of our own."""
    for name, attribute in sorted(set(_attributes_of(function.__code__))):
        module = function.__globals__.get(name)
        if (
            isinstance(module, ModuleType)
            and origin_of_file(file_of(module.__name__)) is Origin.OWN
        ):
            yield module, attribute


def _held(cell: CellType, name: str) -> Iterator[tuple[str, object]]:
    try:
        yield name, cell.cell_contents
    except ValueError:  # nothing is in it yet
        return


def _globals_of(code: CodeType) -> Iterator[str]:
    for each in all_within(code):
        for instruction in dis.get_instructions(each):
            if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                yield str(instruction.argval)


def _attributes_of(code: CodeType) -> Iterator[tuple[str, str]]:
    """The attributes that are taken of what has a name: (name, attribute)."""
    for each in all_within(code):
        instructions = list(dis.get_instructions(each))
        for loaded, taken in pairwise(instructions):
            if loaded.opname.startswith("LOAD_") and taken.opname in ("LOAD_ATTR", "LOAD_METHOD"):
                yield str(loaded.argval), str(taken.argval)
