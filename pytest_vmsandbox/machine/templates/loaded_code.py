"""Code as it was loaded, in lines of text: what runs, whatever the file says by now."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import CodeType, FunctionType


def lines_of(code: CodeType) -> Iterator[str]:
    """All that decides what it does, and nothing of where it lies."""
    yield f"code {code.co_code.hex()}"
    yield f"takes {code.co_argcount} {code.co_posonlyargcount} {code.co_kwonlyargcount}"
    yield f"names {code.co_names} {code.co_varnames} {code.co_freevars} {code.co_cellvars}"
    yield f"flags {code.co_flags}"
    yield f"exceptions {getattr(code, 'co_exceptiontable', b'').hex()}"
    for constant in code.co_consts:
        yield from _constant(constant)


def _constant(constant: object) -> Iterator[str]:
    match constant:
        case CodeType():
            yield from lines_of(constant)
        case tuple():
            yield f"tuple {len(constant)}"
            for item in constant:
                yield from _constant(item)
        case frozenset():  # which has another order in each process
            yield f"set {sorted(' '.join(_constant(item)) for item in constant)}"
        case _:
            yield f"{type(constant).__name__} {constant!r}"


def all_within(code: CodeType) -> Iterator[CodeType]:
    """It, and the code of all functions and classes that are written in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from all_within(constant)


def functions_of(member: object) -> Iterator[object]:
    """The functions and classes that an attribute of a class stands for."""
    match member:
        case FunctionType() | type():
            yield member
        case staticmethod() | classmethod():
            yield member.__func__
        case property():
            yield from (part for part in (member.fget, member.fset, member.fdel) if part)
        case functools.cached_property():
            yield member.func
