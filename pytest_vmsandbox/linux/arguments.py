"""What may be handed to a system call: texts without NUL, flags and numbers within range.

ctypes cuts a C string at its first NUL and an int at its 32nd bit without a word, so that the
kernel would act on something else than what was asked for. Everything here raises ValueError,
names the argument, and has no side effect.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from enum import IntFlag
from operator import index
from typing import TypeAlias

PathArgument: TypeAlias = str | bytes | os.PathLike[str] | os.PathLike[bytes]

INT_MAX = 2**31 - 1


def encode_path(path: PathArgument, *, argument: str) -> bytes:
    """`path` as the kernel reads it (the file system's encoding, surrogateescape)."""
    return _without_nul(os.fsencode(path), argument=argument)


def encode_optional(text: PathArgument | None, *, argument: str) -> bytes | None:
    """The same, where None stands for a null pointer."""
    return None if text is None else encode_path(text, argument=argument)


def check_bits(value: int, *, allowed: int, argument: str) -> int:
    """`value` as a plain int, all of whose bits are in `allowed`.

    Plain integers are compared: since Python 3.11 `flags & ~Flags.ALL` on an IntFlag misses
    high bits that the class does not know.
    """
    bits = int(index(value))
    unknown = bits & ~int(index(allowed))
    if unknown:  # a negative number has all its high bits set, and is caught here too
        raise ValueError(f"{argument}: {bits:#x} has bits that are not accepted: {unknown:#x}")
    return bits


def check_range(value: int, *, lowest: int, highest: int, argument: str) -> int:
    """`value` as a plain int between `lowest` and `highest`, both included."""
    number = int(index(value))
    if not lowest <= number <= highest:
        raise ValueError(f"{argument}: {number} is not in {lowest}..{highest}")
    return number


def check_fd(fd: int, *, argument: str) -> int:
    """`fd` as a plain int that fits a C int; whether it is open is for the kernel to say."""
    return check_range(fd, lowest=-1, highest=INT_MAX, argument=argument)


def bits_of(flags: Iterable[IntFlag]) -> int:
    """All bits of these members (or, given the class, of all its members) as a plain int."""
    together = 0
    for flag in flags:
        together |= int(flag)
    return together


def _without_nul(encoded: bytes, *, argument: str) -> bytes:
    if b"\0" in encoded:
        raise ValueError(f"{argument} holds a NUL byte: {encoded!r}")
    return encoded
