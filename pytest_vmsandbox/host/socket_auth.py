"""Whoever is at the other end of a UNIX socket: asked of the kernel, before a byte is sent.

The kernel names the process that called listen(2) on the socket that was connected to (unix(7),
SO_PEERCRED), as it was then. On a listener that we made and passed on the peer would be
ourselves, and nothing would be proved: a VMM makes its own sockets.

`verify_socket_peer` compares the user. A machine's sockets go through `connect_machine_socket`,
which compares the process too: several VMMs may run as one user.
"""

from __future__ import annotations

import asyncio
import os
import pwd
import socket
import stat
import struct
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TypeAlias

from pytest_vmsandbox.deadline import Deadline
from pytest_vmsandbox.errors import SocketAuthError
from pytest_vmsandbox.host.peer_process import (
    Difference,
    find_difference_linux,
    find_difference_macos,
    read_effective_uid,
    stands_for_others,
)
from pytest_vmsandbox.host.platform import current_platform
from pytest_vmsandbox.linux.process_identity import ProcessIdentity

__all__ = [
    "PeerCredentials",
    "SocketAuthError",
    "connect_and_verify",
    "connect_machine_socket",
    "create_unix_socket",
    "get_peer_credentials",
    "verify_machine_peer",
    "verify_socket_peer",
]

# struct ucred: pid, uid, gid (unix(7)).
_UCRED = struct.Struct("iII")

# macOS, <sys/un.h> and <sys/ucred.h>: struct xucred is cr_version, cr_uid, cr_ngroups and sixteen
# groups, 76 bytes; XUCRED_VERSION is 0.
_SOL_LOCAL = 0
_LOCAL_PEERCRED = 1
_XUCRED = struct.Struct("IIh16I")
_XUCRED_VERSION = 0

# How often a VMM that does not listen yet is tried again; it takes some 20 ms to get there.
_RETRY_S = 0.003

AnyPath: TypeAlias = "str | os.PathLike[str]"


@dataclass(frozen=True)
class PeerCredentials:
    """The user, and where the platform tells them the group and the process, of a peer."""

    uid: int
    gid: int | None = None
    pid: int | None = None


# Who it is


def get_peer_credentials(sock: socket.socket) -> PeerCredentials:
    """The credentials of the peer of a connected UNIX socket.

    Raises SocketAuthError for any other socket, a peer that has no pid for us (not connected, or
    in a pid namespace that we can't see), a platform that we can't ask, and any error.
    """
    if sock.family != socket.AF_UNIX:
        raise SocketAuthError(
            "Not a UNIX socket: it has no peer credentials", 0, 0, {"socket_family": sock.family}
        )
    platform = current_platform().system
    ask = {"linux": _ask_linux, "darwin": _ask_macos}.get(platform)
    if ask is None:
        raise SocketAuthError("Peer credentials can't be had here", 0, 0, {"platform": platform})
    try:
        return ask(sock)
    except (OSError, struct.error) as error:
        raise SocketAuthError(f"Peer credentials can't be read: {error}", 0, 0) from error


def _ask_linux(sock: socket.socket) -> PeerCredentials:
    answer = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    pid, uid, gid = _UCRED.unpack(answer)
    if pid == 0:
        raise SocketAuthError(
            "The peer has no process that we can see: not connected, or in another pid namespace",
            0,
            0,
            {"peer_pid": pid, "peer_uid": uid},
        )
    return PeerCredentials(uid=uid, gid=gid, pid=pid)


def _ask_macos(sock: socket.socket) -> PeerCredentials:
    answer = sock.getsockopt(_SOL_LOCAL, _LOCAL_PEERCRED, _XUCRED.size)
    version, uid, *_groups = _XUCRED.unpack(answer)
    if version != _XUCRED_VERSION:
        raise SocketAuthError("Unknown version of xucred", 0, 0, {"xucred_version": version})
    return PeerCredentials(uid=uid)


def verify_socket_peer(
    sock: socket.socket, expected_uid: int, socket_path: str | None = None
) -> None:
    """Return if the peer's uid is `expected_uid`; root is nobody special.

    Raises SocketAuthError with both uids, `socket_path` and the peer's pid otherwise, and also
    where that uid stands for every user that our user namespace does not know.
    """
    peer = get_peer_credentials(sock)
    if peer.uid != expected_uid:
        raise _mismatch(expected_uid, peer.uid, peer_pid=peer.pid, socket_path=socket_path)
    if current_platform().is_linux and stands_for_others(peer.uid):
        raise SocketAuthError(
            f"Socket peer UID {peer.uid} may be any user that our user namespace does not map",
            expected_uid,
            peer.uid,
            {"socket_path": socket_path, "peer_pid": peer.pid},
        )


def _mismatch(
    expected_uid: int, actual_uid: int, *, peer_pid: int | None, socket_path: str | None
) -> SocketAuthError:
    expected, got = _describe_user(expected_uid), _describe_user(actual_uid)
    return SocketAuthError(
        f"Socket peer UID mismatch: expected {expected}, got {got}",
        expected_uid,
        actual_uid,
        {"socket_path": socket_path, "peer_pid": peer_pid},
    )


def _describe_user(uid: int) -> str:
    try:
        name = pwd.getpwuid(uid).pw_name
    except (KeyError, OverflowError):
        name = str(uid)
    return f"{name} ({uid})"


def verify_machine_peer(
    sock: socket.socket,
    *,
    uid: int,
    identity: ProcessIdentity,
    pidfd: int | None,
    socket_path: str | None = None,
) -> None:
    """Return if the peer is the very process `identity`, and runs as `uid`.

    The kernel's own handle of the peer (SO_PEERPIDFD) is compared with `pidfd`, which is ours of
    the VMM; where one of them is missing, pid and start time are. On macOS only the pid.
    The credentials of a socket are those at its listen(2): on Linux the process must also have
    `uid` as its effective uid still, where /proc shows that.
    Raises SocketAuthError when it is another one, or when that process is gone.
    """
    verify_socket_peer(sock, uid, socket_path)
    peer = get_peer_credentials(sock)
    uid_now = None

    def compare() -> Difference | None:
        if current_platform().is_linux:
            return find_difference_linux(sock, peer_pid=peer.pid, identity=identity, pidfd=pidfd)
        return find_difference_macos(sock, identity=identity)

    try:
        found = compare()
        if current_platform().is_linux and not found:
            uid_now = read_effective_uid(identity.pid)
            # Again: had it ended in between, the uid may be that of a successor with its pid.
            found = compare()
    except (OSError, ValueError, struct.error) as error:
        raise SocketAuthError(
            f"Socket peer process can't be looked at: {error}",
            uid,
            peer.uid,
            {"socket_path": socket_path, "peer_pid": peer.pid},
        ) from error
    if found:
        raise SocketAuthError(
            f"Socket peer is another process: {found}",
            uid,
            peer.uid,
            {"socket_path": socket_path, "peer_pid": peer.pid, "expected_pid": identity.pid},
        )
    if uid_now not in {None, uid}:
        raise _mismatch(uid, uid_now, peer_pid=peer.pid, socket_path=socket_path)


# Connecting, and listening


async def connect_and_verify(
    path: AnyPath,
    expected_uid: int,
    timeout: float = 5.0,
    buffer_limit: int = 16 * 1024 * 1024,
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect to the UNIX socket `path`, whose listener must run as `expected_uid`.

    Nothing is sent before the peer is verified. Raises SocketAuthError, TimeoutError after
    `timeout` seconds, OSError; the socket is closed then, on cancellation too.
    `buffer_limit` bytes is the longest line or separator search of the reader.
    """
    text = os.fspath(path)
    async with asyncio.timeout(timeout):
        with ExitStack() as undo:
            sock = undo.enter_context(_new_socket())
            await _connect_with_patience(sock, text)
            verify_socket_peer(sock, expected_uid, text)
            streams = await asyncio.open_unix_connection(sock=sock, limit=buffer_limit)
            undo.pop_all()  # the writer owns it now
            return streams


async def connect_machine_socket(
    path: AnyPath, *, uid: int, pidfd: int | None, identity: ProcessIdentity, deadline: Deadline
) -> socket.socket:
    """Connect to a socket that the VMM itself makes at `path`, as soon as it listens.

    Gives a connected, non-blocking, close-on-exec socket whose peer is the process `identity`,
    running as `uid` (see `verify_machine_peer`); nothing has been sent over it.
    Raises SocketAuthError for any other peer and for anything but a socket at `path`, a symbolic
    link included; TimedOut when the VMM does not listen by the deadline; OSError when connecting
    is not allowed. Nothing is left open then.
    """
    text = os.fspath(path)
    while True:
        with ExitStack() as undo:
            sock = undo.enter_context(_new_socket())
            try:
                _require_socket(text, uid=uid)
                connected = _connect(sock, text)
                last_seen = "its backlog is full"
            except (FileNotFoundError, ConnectionRefusedError) as error:
                connected, last_seen = False, str(error)
            if connected:
                verify_machine_peer(sock, uid=uid, identity=identity, pidfd=pidfd, socket_path=text)
                undo.pop_all()
                return sock
        if deadline.passed:
            raise deadline.timed_out(f"the VMM listening on {text}", last_seen)
        await asyncio.sleep(min(_RETRY_S, deadline.left_s))


def create_unix_socket(path: AnyPath, backlog: int = 128) -> socket.socket:
    """A socket that is bound to `path` and listens.

    Raises OSError, and then it is closed; what was at `path` is never removed. Not for a VMM: its
    clients would take us for the VMM (see above).
    """
    with ExitStack() as undo:
        sock = undo.enter_context(_new_socket())
        sock.settimeout(None)
        sock.bind(os.fspath(path))
        sock.listen(backlog)
        undo.pop_all()
        return sock


def _new_socket() -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(0)
    return sock


async def _connect_with_patience(sock: socket.socket, path: str) -> None:
    while True:
        if _connect(sock, path):
            return
        await asyncio.sleep(_RETRY_S)


def _connect(sock: socket.socket, path: str) -> bool:
    """Whether it is connected; False when the listener's backlog is full, try again then.

    Not loop.sock_connect(): it takes EAGAIN for "in progress", as it is on TCP, and finds the
    socket connected that is not.
    """
    try:
        sock.connect(path)
    except BlockingIOError:
        return False
    return True


def _require_socket(path: str, *, uid: int) -> None:
    """Raise unless `path` itself is a socket: FileNotFoundError or SocketAuthError."""
    seen = os.lstat(path)
    if not stat.S_ISSOCK(seen.st_mode):
        kind = "symbolic link" if stat.S_ISLNK(seen.st_mode) else "other file"
        raise SocketAuthError(
            f"Not a socket but a {kind}: {path}", uid, seen.st_uid, {"socket_path": path}
        )
