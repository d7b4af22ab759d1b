"""Others: what else can be put into a VMM's place. A neighbour, a besieger, a planter of traps."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import threading
from collections.abc import Callable
from pathlib import Path

from tests.escape.attempts.calls import libc
from tests.escape.attempts.memory import vandal
from tests.escape.attempts.resources import besiege

GIFT = "a hundred descriptors for you"

_PR_SET_PDEATHSIG = 1
_IPC_CREAT = 0o1000

SECRET = "what a machine keeps for itself\n"


def neighbour(room: Path, name: str, ipc_key: str) -> None:
    """A machine that minds its own business; whoever asks is answered by a thread of its own.

    It has shared memory under that key as well, and an abstract socket of that name.
    """
    (room / "secret").write_text(SECRET)
    libc("shmget", int(ipc_key), 4096, _IPC_CREAT | 0o666)
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as abstract:
        abstract.bind(f"\0{name}")
        abstract.listen(8)
        listener.bind(str(room / "qmp.sock"))
        listener.listen(8)
        while True:
            asked, _ = listener.accept()
            threading.Thread(target=_answer, args=(asked, room)).start()


def _answer(asked: socket.socket, room: Path) -> None:
    with asked:
        asked.sendall((room / "secret").read_bytes())


def siege(room: Path) -> None:
    """Take all that can be taken, say so, and hold it."""
    with (room / "held").open("w") as held:  # now: there will be no descriptor for it later
        held.write(json.dumps(besiege(room)))
        held.flush()
        while True:
            signal.pause()


def planter(room: Path, listener: str, secret: str) -> None:
    """Put traps where the warden and pytest will look, and wait."""
    for name, put in (_TRAPS | _GIFTS).items():
        put(str(room / name), listener, secret)
    (room / "planted").write_text("all of them")
    while True:
        signal.pause()


def _socket_of_a_child(path: str, listener: str, secret: str) -> None:
    ready, done = os.pipe()
    if os.fork() == 0:
        libc("prctl", _PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(path)
            sock.listen()
            os.write(done, b"x")
            signal.pause()
    os.read(ready, 1)


_KEPT: list[socket.socket] = []


def _socket(path: str, *, kind: int = socket.SOCK_STREAM, queue: int | None = 8) -> None:
    sock = socket.socket(socket.AF_UNIX, kind)
    sock.bind(path)
    if queue is not None:
        sock.listen(queue)
    _KEPT.append(sock)


def _full_socket(path: str, listener: str, secret: str) -> None:
    _socket(path, queue=0)
    waiting = socket.socket(socket.AF_UNIX)
    waiting.connect(path)
    _KEPT.append(waiting)


def _gift_socket(path: str, listener: str, secret: str) -> None:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(path)
    sock.listen()
    threading.Thread(target=_give, args=(sock,), daemon=True).start()


def _give(sock: socket.socket) -> None:
    while True:
        asked, _ = sock.accept()
        with asked:
            folder = os.open("/", os.O_RDONLY)
            socket.send_fds(asked, [GIFT.encode()], [folder] * 100)
            os.close(folder)


def _file(path: str, listener: str, secret: str) -> None:
    Path(path).write_text("no socket")


def _node(path: str, listener: str, secret: str) -> None:
    # A character device with the numbers 0, 0 is nothing (it is how overlayfs hides a file).
    os.mknod(path, stat.S_IFCHR | 0o666, 0)


_TRAPS: dict[str, Callable[[str, str, str], None]] = {
    "link-to-listener": lambda path, listener, _: os.symlink(listener, path),
    "link-to-secret": lambda path, _, secret: os.symlink(secret, path),
    "link-to-itself": lambda path, *_: os.symlink(path, path),
    "link-to-proc": lambda path, *_: os.symlink("/proc/self/fd/0", path),
    "fifo": lambda path, *_: os.mkfifo(path),
    "directory": lambda path, *_: os.mkdir(path),
    "file": _file,
    "nothing-device": _node,
    "socket-of-a-child": _socket_of_a_child,
    "datagram-socket": lambda path, *_: _socket(path, kind=socket.SOCK_DGRAM, queue=None),
    "packet-socket": lambda path, *_: _socket(path, kind=socket.SOCK_SEQPACKET),
    "deaf-socket": lambda path, *_: _socket(path, queue=None),
    "full-socket": _full_socket,
}

TRAPS = tuple(_TRAPS)
_GIFTS = {"gift-socket": _gift_socket}
ROLES: dict[str, Callable[..., None]] = {
    "neighbour": neighbour,
    "siege": siege,
    "planter": planter,
    "vandal": vandal,
}
