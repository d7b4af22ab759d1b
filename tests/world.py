"""A world of its own: a command in a network namespace beyond which there is one web server.

    unshare --net --mount python -m tests.world RESOLV_CONF COMMAND...

The command has a way out to 192.0.2.1 and 2001:db8::1, which are in a second namespace, answer by
HTTP, and are the resolver that its /etc/resolv.conf names. There is nothing else; no packet leaves
the two namespaces. Where the caller is not root, `--user --map-current-user --keep-caps` as well.
"""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import threading
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from pytest_vmsandbox.linux.mount_flags import MountFlags
from pytest_vmsandbox.linux.mounts import mount

HERE, THERE = ("192.0.2.2", "2001:db8::2"), ("192.0.2.1", "2001:db8::1")
NAME = "world.test"
PAGE = b"the world\n"

_A, _AAAA = 1, 28


class _Page(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(PAGE)))
        self.end_headers()
        self.wfile.write(PAGE)

    def log_message(self, *_: object) -> None:
        """Nobody reads it."""


class _DualStack(ThreadingHTTPServer):
    address_family = socket.AF_INET6


def _answer(question: bytes) -> bytes:
    """The answer to one question (RFC 1035): the addresses of NAME, and of nothing else."""
    end = question.index(b"\0", 12)
    labels, rest = [], question[12:end]
    while rest:
        labels.append(rest[1 : 1 + rest[0]].decode().lower())
        rest = rest[1 + rest[0] :]
    (kind,) = struct.unpack("!H", question[end + 1 : end + 3])
    asked = question[12 : end + 5]
    known = ".".join(labels) == NAME
    found = {
        _A: socket.inet_pton(socket.AF_INET, THERE[0]),
        _AAAA: socket.inet_pton(socket.AF_INET6, THERE[1]),
    }
    address = found.get(kind) if known else None
    flags = 0x8580 | (0 if known else 3)
    header = question[:2] + struct.pack("!HHHHH", flags, 1, 1 if address else 0, 0, 0)
    if not address:
        return header + asked
    return header + asked + struct.pack("!HHHIH", 0xC00C, kind, 1, 60, len(address)) + address


def _by_datagrams(sock: socket.socket) -> None:
    while True:
        question, asker = sock.recvfrom(4096)
        sock.sendto(_answer(question), asker)


def _by_streams(listener: socket.socket) -> None:
    while True:
        with listener.accept()[0] as sock:
            (length,) = struct.unpack("!H", sock.recv(2, socket.MSG_WAITALL))
            answer = _answer(sock.recv(length, socket.MSG_WAITALL))
            sock.sendall(struct.pack("!H", len(answer)) + answer)


def serve() -> None:
    """Be the world until stdin ends."""
    datagrams = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    datagrams.bind(("::", 53))
    streams = socket.create_server(("::", 53), family=socket.AF_INET6, dualstack_ipv6=True)
    page = _DualStack(("::", 80), _Page)
    for work, what in ((_by_datagrams, datagrams), (_by_streams, streams)):
        threading.Thread(target=work, args=(what,), daemon=True).start()
    threading.Thread(target=page.serve_forever, daemon=True).start()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.read()


def _ip(*words: str, namespace_of: int | None = None) -> None:
    inside = () if namespace_of is None else ("nsenter", f"--net=/proc/{namespace_of}/ns/net")
    subprocess.run([*inside, "ip", *words], check=True, stdin=subprocess.DEVNULL)


def main(resolv_conf: str, *command: str) -> int:
    """Run the command in the world that the namespaces which we are in will be."""
    mount(resolv_conf, "/etc/resolv.conf", "", MountFlags.BIND)
    with ExitStack() as undo:
        world = subprocess.Popen(
            ["unshare", "--net", sys.executable, "-m", "tests.world"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        undo.callback(world.wait)
        assert world.stdin is not None
        assert world.stdout is not None
        undo.callback(world.stdin.close)
        assert world.stdout.readline() == b"ready\n"
        _ip("link", "add", "here", "type", "veth", "peer", "name", "there", "netns", str(world.pid))
        for interface, addresses, where in (("here", HERE, None), ("there", THERE, world.pid)):
            _ip("link", "set", "lo", "up", namespace_of=where)
            _ip("link", "set", interface, "up", namespace_of=where)
            for address, prefix in zip(addresses, (24, 64), strict=True):
                words = ("address", "add", f"{address}/{prefix}", "dev", interface)
                _ip(*words, *(("nodad",) if ":" in address else ()), namespace_of=where)
        for gateway in THERE:
            _ip("route", "add", "default", "via", gateway)
        plain = ["setpriv", "--inh-caps=-all", "--ambient-caps=-all", "--"] if os.getuid() else []
        return subprocess.run([*plain, *command], check=False, stdin=subprocess.DEVNULL).returncode


if __name__ == "__main__":
    if sys.argv[1:]:
        sys.exit(main(*sys.argv[1:]))
    serve()
