"""Who may touch a file: mode, owner, access control list, and sudo where that takes root.

Every question is asked of the host's own programs, and fails closed: a program that is missing,
fails, prints nonsense or does not answer in time gives False (or None), logged at debug level.
Nothing here prompts, and no program outlives its call. What raises says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import grp
import logging
import os
import pwd
import re
import signal
import stat
import tempfile
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from pytest_vmsandbox.errors import HostUnfit
from pytest_vmsandbox.host.platform import current_platform
from pytest_vmsandbox.host.program import Outcome, run_program
from pytest_vmsandbox.host.run_directory import is_below_run_directory

QEMU_VM_USER = "qemu-vm"

_PROBE_DEADLINE_S = 5.0
_COMMAND_DEADLINE_S = 10.0
_REMOVAL_DEADLINE_S = 60.0

# A name or a number. With `,` or `:` in it, setfacl would read further entries, chown a group.
_USER_PATTERN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\$?", re.ASCII)
_PERMS_PATTERN = re.compile(r"[rwx-]{1,3}")
_ACL_ENTRY = re.compile(
    r"(?P<key>(?:default:)?(?:user|group|mask|other):[^:\s]*):(?P<perms>[r-][w-][x-])(?:\s.*)?"
)

_TRAVERSABLE = stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH

AnyPath: TypeAlias = "str | os.PathLike[str]"

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _ProbeCache:
    """What was probed in this process; None: not yet. A cached False counts too."""

    qemu_vm_user: bool | None = None
    sudo_as_qemu_vm: bool | None = None
    setfacl_available: bool | None = None
    getfacl_available: bool | None = None


_probe_cache = _ProbeCache()


# The user that VMMs run as


@functools.lru_cache(maxsize=1)
def get_qemu_vm_uid() -> int | None:
    """The uid of `qemu-vm`, or None where there is no such user; looked up once per process."""
    try:
        return pwd.getpwnam(QEMU_VM_USER).pw_uid
    except KeyError:
        return None


def get_expected_socket_uid(use_qemu_vm_user: bool) -> int:  # noqa: FBT001 -- a fixed name
    """The uid that the peer of a VMM's socket must have.

    Raises HostUnfit when `qemu-vm` is asked for and does not exist: our own uid in its place
    would accept the very processes that the user is there to keep out.
    """
    if not use_qemu_vm_user:
        return os.getuid()
    uid = get_qemu_vm_uid()
    if uid is None:
        raise HostUnfit(
            "VMS-QEMU-VM-USER-MISSING",
            f"VMMs are to run as the user {QEMU_VM_USER}",
            "the user database has no such user",
            "vmsandbox setup",
        )
    return uid


async def probe_qemu_vm_user() -> bool:
    """Whether the user `qemu-vm` exists; cached."""
    if not current_platform().is_linux:
        _probe_cache.qemu_vm_user = False
    if _probe_cache.qemu_vm_user is None:
        argv = ["/usr/bin/id", QEMU_VM_USER]
        _probe_cache.qemu_vm_user = await _probe(argv, capture=False)
    return _probe_cache.qemu_vm_user


async def probe_sudo_as_qemu_vm() -> bool:
    """Whether sudo lets us run programs as `qemu-vm` without a password; cached.

    sudo is not even run where the user does not exist.
    """
    if not current_platform().is_linux:
        _probe_cache.sudo_as_qemu_vm = False
    if _probe_cache.sudo_as_qemu_vm is None:
        _probe_cache.sudo_as_qemu_vm = await probe_qemu_vm_user() and await _try_sudo()
    return _probe_cache.sudo_as_qemu_vm


async def _try_sudo() -> bool:
    if await _probe(["sudo", "-n", "-u", QEMU_VM_USER, "/bin/true"]):
        return True
    line = f"{_user_name(os.getuid())} ALL=({QEMU_VM_USER}) NOPASSWD: ALL"
    logger.warning("sudo to %s does not work; a line for visudo: %s", QEMU_VM_USER, line)
    return False


# Access control lists (acl(5), setfacl(1), getfacl(1))


async def _probe_setfacl() -> bool:
    """Whether setfacl runs; whether a file system takes ACLs, `probe_acl_support` says; cached."""
    if not current_platform().is_linux:
        _probe_cache.setfacl_available = False
    if _probe_cache.setfacl_available is None:
        _probe_cache.setfacl_available = await _probe(["setfacl", "--version"])
    return _probe_cache.setfacl_available


async def _probe_getfacl() -> bool:
    """Whether getfacl runs; cached."""
    if not current_platform().is_linux:
        _probe_cache.getfacl_available = False
    if _probe_cache.getfacl_available is None:
        _probe_cache.getfacl_available = await _probe(["getfacl", "--version"])
    return _probe_cache.getfacl_available


async def probe_acl_support(directory: AnyPath) -> bool:
    """Whether files in `directory` take ACLs: one is set there and read back; not cached.

    Programs may be there and the file system refuse. Nothing is left in the directory.
    """
    if not os.fspath(directory):
        return False  # to tempfile, the working directory
    me = _user_name(os.getuid())
    try:
        with tempfile.NamedTemporaryFile(dir=directory, prefix=".acl-") as trial:
            return await set_acl_user(trial.name, me, "rw") and await verify_user_access(
                trial.name, me, "rw"
            )
    except (OSError, ValueError) as error:
        logger.debug("no trial file in %s: %s", directory, error)
        return False


async def set_acl_user(path: AnyPath, user: str, perms: str = "rw") -> bool:
    """Give `user` an ACL entry with exactly `perms` on `path`; whether that was done."""
    if not (_is_user(user) and _PERMS_PATTERN.fullmatch(perms)):
        logger.debug("refused as an ACL entry: %r %r", user, perms)
        return False
    return await _run(["setfacl", "-m", f"u:{user}:{perms}", "--", _operand(path)])


async def remove_acl_user(path: AnyPath, user: str) -> bool:
    """Take the ACL entry of `user` off `path`; one that is not there counts as taken."""
    if not _is_user(user):
        logger.debug("refused as a user: %r", user)
        return False
    return await _run(["setfacl", "-x", f"u:{user}", "--", _operand(path)])


async def get_acl(path: AnyPath) -> dict[str, str] | None:
    """The ACL of `path`, as in ``{"user::": "rw-", "user:qemu-vm": "rw-", "mask::": "rw-"}``.

    Default entries keep their prefix (``default:user::``). The letters are those of the entry,
    not yet limited by the mask. None when the ACL can't be read.
    """
    seen = await _outcome(["getfacl", "-p", "--", _operand(path)], deadline_s=_COMMAND_DEADLINE_S)
    return parse_acl(seen.text) if seen.ok else None


def parse_acl(text: str) -> dict[str, str]:
    """Read what getfacl prints; lines that are no entries (comments, nonsense) are skipped."""
    acl = {}
    # Not splitlines(): a form feed in the name of the file, which the first comment holds, is no
    # end of a line; getfacl writes a line feed in it as \012.
    for line in text.split("\n"):
        if entry := _ACL_ENTRY.fullmatch(line):
            key = entry["key"]
            acl[f"{key}:" if key.endswith(":") else key] = entry["perms"]
    return acl


async def verify_user_access(path: AnyPath, user: str, perms: str = "rw") -> bool:
    """Whether the ACL of `path` has an entry for `user` that gives every letter of `perms`.

    An entry gives no more than the mask lets through: chmod rewrites the mask. False when the
    ACL can't be read, and for `perms` that ask for nothing.
    """
    wanted = set(perms) - {"-"}
    if not (wanted and _is_user(user) and _PERMS_PATTERN.fullmatch(perms)):
        return False
    acl = await get_acl(path)
    if acl is None:
        return False
    # The kernel keeps no named entry without a mask (posix_acl_valid): there, something is wrong.
    given = set(acl.get(f"user:{user}", "")) & set(acl.get("mask::", ""))
    return wanted <= given


# Mode and owner


async def chmod_async(path: AnyPath, mode: str) -> bool:
    """Set the mode of `path`, octal or symbolic as chmod(1) takes it; whether that was done."""
    return await _run(["chmod", "--", mode, os.fspath(path)])


async def chmod_executable(path: AnyPath) -> None:
    """Set the mode of `path` to exactly 0o755; raises OSError."""
    try:
        await asyncio.to_thread(os.chmod, path, 0o755)
    except ValueError as error:  # a path that no file system can have
        raise OSError(errno.EINVAL, str(error), os.fspath(path)) from error


async def get_mode(path: AnyPath) -> int | None:
    """The whole `st_mode` of `path`, file type included; None when it can't be looked at."""
    seen = await _stat(path)
    return None if seen is None else seen.st_mode


async def get_owner(path: AnyPath) -> tuple[str, str] | None:
    """User and group of `path`, in decimal where they have no name; None when stat fails."""
    seen = await _stat(path)
    return None if seen is None else (_user_name(seen.st_uid), _group_name(seen.st_gid))


async def chown_async(path: AnyPath, user: str, group: str) -> bool:
    """Give `path` to `user` and `group` through sudo, which never prompts; whether that worked."""
    if not (_is_user(user) and _is_user(group)):
        logger.debug("refused as an owner: %r %r", user, group)
        return False
    return await _run(["sudo", "-n", "chown", "--", f"{user}:{group}", os.fspath(path)])


async def chown_to_qemu_vm(path: AnyPath) -> bool:
    """Give `path` to `qemu-vm` and its group, through sudo."""
    return await chown_async(path, QEMU_VM_USER, QEMU_VM_USER)


async def can_access(path: AnyPath, mode: int = os.R_OK | os.W_OK) -> bool:
    """Whether we ourselves (by real uid, access(2)) may use `path` so."""
    try:
        return await asyncio.to_thread(os.access, path, mode)
    except ValueError:  # a NUL in the path
        return False


async def grant_qemu_vm_access(path: AnyPath) -> bool:
    """Let `qemu-vm` read and write `path` itself, by ACL; False without the user.

    A symbolic link is refused: setfacl would follow it, to a place of somebody else's choice.
    """
    if not await probe_qemu_vm_user():
        return False
    if not await asyncio.to_thread(_is_no_link, path):
        return False
    return await set_acl_user(path, QEMU_VM_USER, "rw")


async def grant_qemu_vm_file_access(path: AnyPath, *, writable: bool = False) -> bool:
    """Let `qemu-vm` reach `path` and read it, or own it when `writable`.

    When a parent can't be made traversable the file itself is not touched. A symbolic link is
    refused: chmod and chown would follow it, as root. Links among the parents are followed.
    """
    parents = await asyncio.to_thread(_parents, path)
    if parents is None or not await ensure_traversable(parents):
        return False
    if writable:
        return await chown_to_qemu_vm(path)
    return await chmod_async(path, "a+r")


async def ensure_traversable(dirs: Iterable[AnyPath]) -> bool:
    """Let everybody pass through each of `dirs`; False if that failed for any, the rest is done.

    One that everybody may pass already is not touched: it may be /tmp, which is not ours.
    """
    passable = [await _make_traversable(directory) for directory in dirs]
    return all(passable)


async def _make_traversable(directory: AnyPath) -> bool:
    mode = await get_mode(directory)
    if mode is None or not stat.S_ISDIR(mode):
        return False
    return mode & _TRAVERSABLE == _TRAVERSABLE or await chmod_async(directory, "a+x")


def _parents(path: AnyPath) -> list[Path] | None:
    """All folders on the way to `path`, innermost first, those behind symbolic links too.

    None for a symbolic link, and for a path that leads nowhere.
    """
    if not _is_no_link(path):
        return None
    try:
        written = Path(path).absolute()
        ways = dict.fromkeys([*written.parents, *written.resolve().parents])
    except (OSError, ValueError, RuntimeError) as error:  # the last, in Python 3.11: a loop
        logger.debug("no way to %r: %s", str(path), error)
        return None
    return [folder for folder in ways if folder != Path("/")]


def _is_no_link(path: AnyPath) -> bool:
    """Whether `path` is a file that we can see to be no symbolic link, or nothing yet."""
    if not os.fspath(path):
        return False  # to Path, the working directory
    try:
        mode = Path(path).lstat().st_mode  # of Path: without the slash that leads through a link
    except FileNotFoundError:
        return True
    except (OSError, ValueError) as error:
        logger.debug("lstat %r: %s", str(path), error)
        return False
    if stat.S_ISLNK(mode):
        logger.debug("%s is a symbolic link: no access through it", path)
        return False
    return True


# Through sudo, as root


async def sudo_exec(
    args: Sequence[str],
    start_new_session: bool = True,  # noqa: FBT001, FBT002 -- a fixed signature
    stdout: int | None = PIPE,
    stderr: int | None = PIPE,
) -> Process:
    """Start ``sudo *args`` and return the process, which the caller waits for; raises OSError.

    In a session of its own, the default, sudo has no terminal to prompt on, stdin is empty, and a
    graphical prompt is ruled out too: without a rule that needs no password it fails at once.
    """
    # The variable goes before sudo.conf's askpass program (sudo(8), ENVIRONMENT).
    env = {**os.environ, "SUDO_ASKPASS": "/bin/false"} if start_new_session else None
    return await asyncio.create_subprocess_exec(
        "sudo",
        *args,
        stdin=DEVNULL if start_new_session else None,
        stdout=stdout,
        stderr=stderr,
        env=env,
        start_new_session=start_new_session,
    )


async def sudo_rm(path: AnyPath) -> bool:
    """Remove `path` and all below it as root; whether that was done.

    Refused (False) unless it is strictly below a run directory of ours, see
    `is_below_run_directory`.
    """
    if not await asyncio.to_thread(is_below_run_directory, path):
        logger.warning("not removed, it is not below a run directory of ours: %r", str(path))
        return False
    try:
        process = await sudo_exec(["rm", "-rf", "--", str(Path(path))])
    except (OSError, ValueError) as error:  # ValueError: a path that no file system can have
        logger.debug("sudo rm: %s", error)
        return False
    try:
        await asyncio.wait_for(process.communicate(), _REMOVAL_DEADLINE_S)
    except TimeoutError:
        logger.debug("sudo rm %s: not within %s s", path, _REMOVAL_DEADLINE_S)
    finally:
        await _end(process)
    return process.returncode == 0


async def _end(process: Process) -> None:
    """Kill what has not ended yet, with its session, and reap it where we may kill it."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
            await process.wait()


# What the above has in common


async def _probe(argv: Sequence[str], *, capture: bool = True) -> bool:
    return (await _outcome(argv, deadline_s=_PROBE_DEADLINE_S, capture=capture)).ok


async def _run(argv: Sequence[str]) -> bool:
    return (await _outcome(argv, deadline_s=_COMMAND_DEADLINE_S)).ok


async def _outcome(argv: Sequence[str], *, deadline_s: float, capture: bool = True) -> Outcome:
    outcome = await run_program(argv, deadline_s=deadline_s, capture=capture)
    if not outcome.ok:
        logger.debug("%s", outcome)
    return outcome


async def _stat(path: AnyPath) -> os.stat_result | None:
    try:
        return await asyncio.to_thread(os.stat, path)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        logger.debug("stat %r: %s", str(path), error)
        return None


def _operand(path: AnyPath) -> str:
    """The path as an argument of setfacl or getfacl, which take `-` for "names on stdin"."""
    text = os.fspath(path)
    return "./-" if text == "-" else text


def _is_user(name: str) -> bool:
    return _USER_PATTERN.fullmatch(name) is not None


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _group_name(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)
