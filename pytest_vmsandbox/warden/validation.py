"""Validators: what may stand in a request to the warden, each a small closed list.

Each returns the value as it is to be used, or raises RequestInvalid, which names the value; none
has a side effect. Texts are matched from end to end, digits are ASCII digits, lengths are bytes,
and where a base, an owner or a table is missing, everything is refused.
"""

from __future__ import annotations

import os
import re
import socket
import stat
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import NoReturn, TypeVar

from pytest_vmsandbox.errors import RequestInvalid
from pytest_vmsandbox.linux.at import AT_FDCWD
from pytest_vmsandbox.linux.openat2 import ResolveFlags, openat2
from pytest_vmsandbox.linux.owned_fd import OwnedFd
from pytest_vmsandbox.linux.pidfd import pidfd_is_alive

# dev_valid_name() of the kernel lets more pass; quotes, `%` and `+` mean something to the tools
# that are handed such names, and nobody needs them.
_INTERFACE_NAME = re.compile(r"[A-Za-z0-9_.][A-Za-z0-9_.-]{0,14}")

_OCTET = r"(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_IPV4_ADDRESS = re.compile(rf"{_OCTET}(\.{_OCTET}){{3}}")
_IPV4_IN_IPV6 = b"\0" * 10 + b"\xff" * 2  # ::ffff:0:0/96 (RFC 4291, 2.5.5.2)

# The kernel's minor numbers have 20 bits; a device-mapper name has at most 127 bytes.
_LOOP_DEVICE = re.compile(r"/dev/loop(0|[1-9][0-9]{0,6})")
_OWN_DEVICE = re.compile(r"/dev/mapper/vmsandbox-[a-z0-9]([a-z0-9-]{0,114}[a-z0-9])?")

# The same as that of machine/spec.py, which lies above this room.
_MACHINE_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?")

Word = TypeVar("Word", bound=StrEnum)

_INIT = 1
_NO_LINKS = ResolveFlags.NO_SYMLINKS | ResolveFlags.NO_MAGICLINKS
_SHOWN = 200


def plain_text(name: str, value: object) -> str:
    """A text that can be handed to the kernel: without NUL, and of characters that have bytes."""
    if not isinstance(value, str):
        refuse(name, value, "must be a text")
    if "\0" in value:
        refuse(name, value, "must not hold a NUL")
    try:
        os.fsencode(value)
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can spell
        refuse(name, value, "must be of characters")
    return value


def argument_list(name: str, value: object) -> tuple[str, ...]:
    """An argv: at least the program, which is not empty, and texts without NUL."""
    if not isinstance(value, list | tuple) or not value:
        refuse(name, value, "must be a list of texts, the program first")
    words = tuple(plain_text(name, word) for word in value)
    if not words[0]:
        refuse(name, value, "must begin with a program")
    return words


def absolute_path(name: str, value: object) -> str:
    """An absolute path without `..`; nothing is looked up."""
    path = plain_text(name, value)
    if not path.startswith("/") or ".." in path.split("/"):
        refuse(name, value, "must be an absolute path without `..`")
    return path


def one_of(name: str, value: object, kind: type[Word]) -> Word:
    """The member of an enum of words that is spelled so."""
    if not isinstance(value, str) or value not in tuple(kind):
        refuse(name, value, f"must be one of {', '.join(kind)}")
    return kind(value)


def whole_number(name: str, value: object, allowed: range) -> int:
    """A whole number in `allowed`; neither a truth value nor a fraction is one."""
    if type(value) is not int or value not in allowed:
        refuse(name, value, f"must be a whole number, {allowed.start} to {allowed[-1]}")
    return value


def machine_name(name: str, value: object) -> str:
    """What a machine may be called: a host name of at most 32 characters."""
    return _matching(name, value, _MACHINE_NAME, "must be 1 to 32 of a-z, 0-9 and inner -")


def interface_name(value: object, *, prefix: str = "") -> str:
    """The name of a network interface; with a `prefix`, one that begins with it and goes on."""
    wanted = "must be an interface's name: 1 to 15 of A-Z, a-z, 0-9, _, . and inner -"
    name = _matching("interface", value, _INTERFACE_NAME, wanted)
    if name in (".", "..") or not name.startswith(prefix) or name == prefix:
        refuse("interface", value, f"{wanted}, beginning with {prefix!r}" if prefix else wanted)
    return name


def ipv4_address(value: object) -> str:
    """An IPv4 address, four decimal numbers without leading zeros."""
    return _matching("address", value, _IPV4_ADDRESS, "must be an IPv4 address")


def resolver_address(value: object) -> str:
    """The IPv4 or IPv6 address of a name server in its usual form; no port, no zone.

    An IPv4 address in the clothes of IPv6 is neither: rules for IPv4 would not see it.
    """
    if isinstance(value, str) and _IPV4_ADDRESS.fullmatch(value):
        return value
    try:
        packed = socket.inet_pton(socket.AF_INET6, value)  # type: ignore[arg-type]  # or TypeError
    except (OSError, TypeError, ValueError):
        packed = _IPV4_IN_IPV6
    if packed.startswith(_IPV4_IN_IPV6):
        refuse("resolver", value, "must be an IPv4 or IPv6 address")
    return socket.inet_ntop(socket.AF_INET6, packed)


def device_path(value: object) -> str:
    """A block device that may be ours: /dev/loopN, or a device-mapper name that begins as ours."""
    if isinstance(value, str) and _LOOP_DEVICE.fullmatch(value):
        return value
    return _matching(
        "device", value, _OWN_DEVICE, "must be /dev/loopN or /dev/mapper/vmsandbox-NAME"
    )


def path_below(base: str | os.PathLike[str] | None, path: object) -> Path:
    """An absolute path strictly below `base`, no part of which is a symlink now.

    Without a base, everything is refused, and so below `/`. The parts of the path are compared
    with the base's; then the kernel walks them from the base (openat2(2), RESOLVE_BENEATH and
    NO_SYMLINKS: it never follows, not even a link that would lead back inside). What is missing
    at the end of the path is not refused. Somebody who may write there can plant a link after
    this answer: who then opens the path must forbid links again.
    """
    wanted = f"must lie below {os.fspath(base) if base else 'a base, and there is none'}"
    text = plain_text("path", path)
    parts, base_parts = _clean_parts(text), _clean_parts(os.fspath(base) if base else "")
    if not parts or not base_parts or parts[: len(base_parts)] != base_parts:
        refuse("path", path, wanted)
    inner = parts[len(base_parts) :]
    if not inner:
        refuse("path", path, wanted)
    try:
        at = openat2(AT_FDCWD, "/" + "/".join(base_parts), os.O_PATH | os.O_DIRECTORY)
        with at:
            _walk(at, inner)
    except OSError as error:
        refuse("path", path, f"{wanted}, without links: {error.strerror}")
    return Path(text)


def signal_target(pid: object, launched: Mapping[int, int]) -> int:
    """The pid of a process in `launched` (pid to pidfd) that still runs, by its pidfd.

    So neither 0 and -1, which are many processes, nor ourselves, nor what somebody else started,
    nor a pid that is another's by now: its pidfd says that the one that was launched has ended.
    """
    known = type(pid) is int and pid > _INIT and pid != os.getpid() and pid in launched
    if not known or type(pid) is not int or not _runs(launched[pid]):
        refuse("process", pid, "must be a process that was launched here and still runs")
    return pid


def request_peer(uid: object, owner: int | None) -> int:
    """The uid of a peer who may make requests: root or the owner; without an owner, nobody."""
    if owner is None or type(uid) is not int or uid not in (0, owner):
        refuse("peer", uid, f"must be root or {'the owner' if owner is None else owner}")
    return uid


def trusted_program(path: object) -> OwnedFd:
    """Open a program that root may run; the descriptor is the caller's, to be executed itself.

    It is an absolute path to an executable regular file of root's that nobody else can write;
    the last part of the path is no symlink, and no part one of /proc's. The file that was looked at
    is the one that the descriptor runs (execveat(2), AT_EMPTY_PATH; `os.execve` does that),
    whatever has happened to the path. It is CLOEXEC, so that a script, which would be opened
    anew by path, can't be run with it. Inside a user namespace that does not map root, nothing is
    root's.
    """
    text = plain_text("program", path)
    if not text.startswith("/"):
        refuse("program", path, "must be an absolute path")
    try:
        flags = os.O_PATH | os.O_NOFOLLOW
        program = openat2(AT_FDCWD, text, flags, resolve=ResolveFlags.NO_MAGICLINKS)
    except OSError as error:
        refuse("program", path, f"must be a program: {error.strerror}")
    try:
        if fault := _fault_of_program(os.fstat(program)):
            refuse("program", path, fault)
    except BaseException:
        program.close()
        raise
    return program


def _fault_of_program(found: os.stat_result) -> str:
    if not stat.S_ISREG(found.st_mode):
        return "must be a regular file"
    if found.st_uid != 0:
        return f"must be root's, and is uid {found.st_uid}'s"
    # The group's bits are the mask of an ACL as well: nobody whom it names can write either.
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"must not be writable by others, and has the mode {stat.filemode(found.st_mode)}"
    if not found.st_mode & (stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH):
        return "must be executable"
    return ""


def _clean_parts(text: str) -> list[str]:
    """The parts of an absolute path; none for one that is not, or not written plainly."""
    first, *parts = text.split("/")
    return [] if first or any(part in ("", ".", "..") for part in parts) else parts


def _walk(at: OwnedFd, parts: list[str]) -> None:
    """Have the kernel walk as many of these parts as there are; OSError where it may not."""
    for end in range(len(parts), 0, -1):
        resolve = _NO_LINKS | ResolveFlags.BENEATH
        try:
            openat2(at, "/".join(parts[:end]), os.O_PATH, resolve=resolve).close()
        except FileNotFoundError:
            continue
        return


def _runs(pidfd: int) -> bool:
    try:
        return pidfd_is_alive(pidfd)
    except (OSError, ValueError):  # not open any more: it can't be known
        return False


def _matching(name: str, value: object, pattern: re.Pattern[str], wanted: str) -> str:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        refuse(name, value, wanted)
    return value


def refuse(name: str, value: object, wanted: str) -> NoReturn:
    """Raise RequestInvalid: `name` can't be `value`, whatever that is; it must be as `wanted`."""
    try:
        shown = f"{value!r:.{_SHOWN}}"
    except (ValueError, RecursionError):  # of more digits, or deeper, than Python likes to print
        shown = f"<{type(value).__name__}>"
    raise RequestInvalid(f"{name}={shown} {wanted}")
