"""The way to the server: whom a warden serves, and what it is itself."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from pytest_vmsandbox.host.facts import Tier
from pytest_vmsandbox.host.way import render_start
from pytest_vmsandbox.warden.bundle import BOOTSTRAP, open_bundle
from pytest_vmsandbox.warden.client import open_warden
from tests.warden.conftest import TRUE, RawLine, inner_of, order, run

SOMEBODY = 61_003


@pytest.fixture
def of_somebody() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A socketpair that another user made."""
    if os.getuid() != 0:
        pytest.skip("takes root: it becomes another user")
    ours, theirs = socket.socketpair()
    child = os.fork()
    if child == 0:
        os.setgroups([])
        os.setresgid(SOMEBODY, SOMEBODY, SOMEBODY)
        os.setresuid(SOMEBODY, SOMEBODY, SOMEBODY)
        pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        socket.send_fds(theirs, [b"x"], [end.fileno() for end in pair])
        os._exit(0)
    _, descriptors, _, _ = socket.recv_fds(ours, 1, 2)
    os.waitpid(child, 0)
    for end in (ours, theirs):
        end.close()
    one, other = (socket.socket(fileno=descriptor) for descriptor in descriptors)
    with one, other:
        yield one, other


def start(
    pair: tuple[socket.socket, socket.socket], environment: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """Start a warden on a line; that is at its end after the bundle."""
    ours, theirs = pair
    bundle = open_bundle()
    socket.send_fds(ours, [b"\0"], [bundle])
    os.close(bundle)
    ours.shutdown(socket.SHUT_WR)
    return subprocess.run(
        render_start(Tier.ROOT, "-c", BOOTSTRAP),
        stdin=theirs.fileno(),
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=60,
    )


def test_a_line_that_another_user_made_is_not_served(
    of_somebody: tuple[socket.socket, socket.socket],
) -> None:
    done = start(of_somebody, {})

    assert done.returncode != 0
    assert f"peer={SOMEBODY} must be root or 0" in done.stderr
    of_somebody[0].settimeout(20)
    of_somebody[1].close()
    assert of_somebody[0].recv(1) == b""  # not even greeted


@pytest.mark.parametrize("said", ["", "x", "-1", "0", str(SOMEBODY + 1), f"{SOMEBODY}\n1"])
def test_nor_is_it_where_sudo_was_called_by_a_third(
    of_somebody: tuple[socket.socket, socket.socket], said: str
) -> None:
    done = start(of_somebody, {"SUDO_UID": said})

    assert done.returncode != 0
    assert "RequestInvalid" in done.stderr or "ValueError" in done.stderr


def test_who_called_sudo_is_served_and_is_the_owner(
    of_somebody: tuple[socket.socket, socket.socket],
) -> None:
    done = start(of_somebody, {"SUDO_UID": str(SOMEBODY)})

    assert (done.returncode, done.stderr) == (0, "")
    greeting = json.loads(of_somebody[0].recv(1 << 16))
    assert greeting["uid"] not in (0, SOMEBODY)


async def test_what_sudo_once_said_of_somebody_else_is_no_word_on_us(
    tier: Tier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SUDO_UID", str(SOMEBODY))
    async with open_warden(tier, log=tmp_path / "log") as warden:
        assert await run(warden, order(TRUE)) == (0, "", "")


def test_we_are_served_whatever_sudo_said_before_we_became_ourselves(tier: Tier) -> None:
    if tier not in (Tier.ROOT, Tier.USERNS):
        pytest.skip("sudo itself says who called it")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        done = start((ours, theirs), {"SUDO_UID": str(SOMEBODY)})

        assert (done.returncode, done.stderr) == (0, "")
        assert b'"uid"' in ours.recv(1 << 16)


def test_a_line_that_is_no_socket_is_not_served() -> None:
    argv = render_start(Tier.USERNS, "-c", BOOTSTRAP)
    done = subprocess.run(
        argv, stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=60
    )

    assert done.returncode != 0


def test_the_peer_is_who_made_the_pair() -> None:
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with one, other:
        said = other.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("iII"))
    assert struct.unpack("iII", said) == (os.getpid(), os.getuid(), os.getgid())


def test_a_warden_says_as_whom_vmms_run(raw: RawLine, tier: Tier) -> None:
    uid = raw.greeting["uid"]

    assert uid != 0
    assert (uid == os.getuid()) == (tier is Tier.USERNS)


def test_a_warden_has_its_own_processes_and_mounts_and_the_host_s_network(raw: RawLine) -> None:
    inner = inner_of(raw)

    def namespace(process: object, name: str) -> str:
        return str(Path(f"/proc/{process}/ns/{name}").readlink())

    try:
        namespace(inner, "pid")
    except PermissionError:
        pytest.skip("takes a user who may look into the warden")
    for name in ("pid", "mnt", "ipc"):
        assert namespace(inner, name) != namespace("self", name)
    assert namespace(inner, "net") == namespace("self", "net")
    assert (namespace(inner, "user") == namespace("self", "user")) == (os.getuid() == 0)


def test_what_the_host_unmounts_is_kept_busy_by_no_warden(
    raw: RawLine, scratch: Path, open_descriptors: Callable[[], list[str]]
) -> None:
    if os.getuid() != 0:
        pytest.skip("takes root: it mounts")
    inner = inner_of(raw)

    def seen() -> bool:
        return str(scratch) in Path(f"/proc/{inner}/mountinfo").read_text()

    options = Path("/proc/self/mountinfo").read_text().splitlines()
    (root,) = (line for line in options if line.split()[4] == "/")
    subprocess.run(["mount", "-t", "tmpfs", "none", scratch], check=True)
    try:
        assert seen() == ("shared:" in root)
    finally:
        subprocess.run(["umount", scratch], check=True)
    assert not seen()
