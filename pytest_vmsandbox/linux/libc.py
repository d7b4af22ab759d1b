"""The C library, reached through ctypes: every call declared, every failure an OSError.

A wrapper that this C library lacks is called by number through syscall(2) (numbers from the
kernel's own headers, a test compares them); where there is no number either, and anywhere but
on Linux, the answer is OSError(ENOSYS).
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from collections.abc import Callable
from ctypes import c_char_p, c_int, c_long, c_uint, c_ulong, c_void_p
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias

from pytest_vmsandbox.linux.arguments import PathArgument, check_range, encode_path

Argument: TypeAlias = int | bytes | Any | None
"""What ctypes turns into the declared C type; `Any` stands for `byref(structure)`."""

_MACHINES = ("x86_64", "aarch64", "riscv64", "s390x")


@dataclass(frozen=True, slots=True)
class _Call:
    """One call: its C types, and its number on each of `_MACHINES`."""

    argtypes: tuple[type[Any], ...]
    numbers: tuple[int, int, int, int]


_SIGNED = (c_int, c_long)
_AT = (c_int, c_char_p)

_CALLS = {
    "capget": _Call((c_void_p, c_void_p), (125, 90, 90, 184)),
    "capset": _Call((c_void_p, c_void_p), (126, 91, 91, 185)),
    "connect": _Call((c_int, c_void_p, c_uint), (42, 203, 203, 362)),
    # The system call behind eventfd() is eventfd2: the first one took no flags.
    "eventfd": _Call((c_uint, c_int), (290, 19, 19, 323)),
    "fsconfig": _Call((c_int, c_uint, c_char_p, c_char_p, c_int), (431, 431, 431, 431)),
    "fsmount": _Call((c_int, c_uint, c_uint), (432, 432, 432, 432)),
    "fsopen": _Call((c_char_p, c_uint), (430, 430, 430, 430)),
    # libkeyutils has a wrapper, the C library has none. The first argument is an address in some
    # operations and a number in others: those that we use want an address.
    "keyctl": _Call((c_int, c_void_p, c_ulong, c_ulong, c_ulong), (250, 219, 219, 280)),
    "mount": _Call((c_char_p, c_char_p, c_char_p, c_ulong, c_char_p), (165, 40, 40, 21)),
    "mount_setattr": _Call((*_AT, c_uint, c_void_p, c_ulong), (442, 442, 442, 442)),
    "move_mount": _Call((*_AT, *_AT, c_uint), (429, 429, 429, 429)),
    "open_tree": _Call((*_AT, c_uint), (428, 428, 428, 428)),
    "openat2": _Call((*_AT, c_void_p, c_ulong), (437, 437, 437, 437)),
    "pidfd_open": _Call((c_int, c_uint), (434, 434, 434, 434)),
    "pidfd_send_signal": _Call((c_int, c_int, c_void_p, c_uint), (424, 424, 424, 424)),
    "pivot_root": _Call((c_char_p, c_char_p), (155, 41, 41, 217)),
    "prctl": _Call((c_int, c_ulong, c_ulong, c_ulong, c_ulong), (157, 167, 167, 172)),
    "setns": _Call((c_int, c_int), (308, 268, 268, 339)),
    "umount2": _Call((c_char_p, c_int), (166, 39, 39, 52)),
    "unshare": _Call((c_int,), (272, 97, 97, 303)),
}


def call_libc(
    name: str,
    *arguments: Argument,
    path: PathArgument | None = None,
    path2: PathArgument | None = None,
) -> int:
    """Call `name`, one of the calls of this package, and return what it returned.

    Raises OSError with errno, the call's name in the sentence, and `path` (and `path2`) as its
    file names. OSError(ENOSYS) where the call can't be made at all; nothing has happened then.
    ValueError, with nothing done, for a number that its C type would cut, and for a NUL in bytes.
    """
    if name in _CALLS:
        _check_arguments(name, _CALLS[name], arguments)
    function = _find_call(name)
    if function is None:
        raise os_error(errno.ENOSYS, name, path, path2)
    result = function(*arguments)
    if result == -1:
        raise os_error(ctypes.get_errno(), name, path, path2)
    return result


def os_error(
    code: int, call: str, path: PathArgument | None = None, path2: PathArgument | None = None
) -> OSError:
    """The OSError (of the subclass that belongs to `code`) for a failed `call`."""
    sentence = f"{call}: {os.strerror(code)}"
    if path is None:
        return OSError(code, sentence)
    if path2 is None:
        return OSError(code, sentence, os.fsdecode(path))
    return OSError(code, sentence, os.fsdecode(path), None, os.fsdecode(path2))


def _check_arguments(name: str, call: _Call, arguments: tuple[Argument, ...]) -> None:
    """Refuse what ctypes would cut; wrong types and too few arguments it refuses itself."""
    for place, (argtype, argument) in enumerate(zip(call.argtypes, arguments, strict=False), 1):
        if isinstance(argument, bytes):
            encode_path(argument, argument=f"{name}: argument {place}")
        elif isinstance(argument, int):
            bits = 8 * ctypes.sizeof(argtype)
            lowest = -(2 ** (bits - 1)) if argtype in _SIGNED else 0
            highest = 2**bits - 1 + lowest
            said = f"{name}: argument {place}"
            check_range(argument, lowest=lowest, highest=highest, argument=said)


@cache
def _find_call(name: str) -> Callable[..., int] | None:
    call = _CALLS.get(name)
    # Other systems have a mount() and a prctl() too, with other arguments.
    if call is None or sys.platform != "linux":
        return None
    return _find_wrapper(name, call) or _find_system_call(call)


def _find_wrapper(name: str, call: _Call) -> Callable[..., int] | None:
    try:
        wrapper = _library()[name]
    except AttributeError:
        return None
    wrapper.argtypes, wrapper.restype = call.argtypes, c_int
    return wrapper


def _find_system_call(call: _Call) -> Callable[..., int] | None:
    number = _number(call, machine=os.uname().machine)
    if number is None:
        return None
    syscall = _library()["syscall"]  # indexing makes a new object each time: argtypes stay apart
    syscall.argtypes, syscall.restype = (c_long, *call.argtypes), c_long
    return lambda *arguments: syscall(number, *arguments)


def _number(call: _Call, *, machine: str) -> int | None:
    # A 32-bit process on a 64-bit kernel has other numbers than uname(2) suggests.
    if machine not in _MACHINES or sys.maxsize <= 2**32:
        return None
    return call.numbers[_MACHINES.index(machine)]


@cache
def _library() -> ctypes.CDLL:
    # None is what the interpreter itself is linked with; find_library() would run a compiler.
    return ctypes.CDLL(None, use_errno=True)
