"""Users of peers that are not what they seem: unmapped ones, and those changed since listen(2)."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pytest_vmsandbox.errors import SocketAuthError
from pytest_vmsandbox.host import peer_process, socket_auth
from pytest_vmsandbox.host.peer_process import read_effective_uid, stands_for_others
from pytest_vmsandbox.host.socket_auth import verify_machine_peer, verify_socket_peer
from pytest_vmsandbox.linux.process_identity import ProcessIdentity
from tests.people import CHECKOUT, as_user, plain_environment

root_only = pytest.mark.skipif(os.getuid() != 0, reason="takes root: it has servers of other users")

NOBODY = 65534

# Listens, and then becomes, uid by uid, what it reads: real, effective, saved.
SERVER = """
import os, socket, sys
server = socket.socket(socket.AF_UNIX)
server.bind(sys.argv[1])
os.chmod(sys.argv[1], 0o666)
server.listen(5)
print("listening", flush=True)
for line in sys.stdin:
    os.setresuid(*map(int, line.split()))
    print("changed", flush=True)
"""


@contextmanager
def serving(path: Path, *, uid: int | None = None) -> Iterator[subprocess.Popen[str]]:
    path.parent.chmod(0o777)
    with subprocess.Popen(
        [sys.executable, "-S", "-E", "-c", SERVER, path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        user=uid,
        group=uid,
        extra_groups=None if uid is None else [],
    ) as server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == "listening\n"
            yield server
        finally:
            server.kill()


def become(server: subprocess.Popen[str], *uids: int) -> None:
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(f"{' '.join(map(str, uids))}\n")
    server.stdin.flush()
    assert server.stdout.readline() == "changed\n"


@contextmanager
def connected(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(path))
        yield sock


# The uid that stands for every user without one

SEEN_FROM_A_NAMESPACE = """
import socket, sys
from pytest_vmsandbox.host.socket_auth import get_peer_credentials, verify_socket_peer
sock = socket.socket(socket.AF_UNIX)
sock.connect(sys.argv[1])
uid = get_peer_credentials(sock).uid
try:
    verify_socket_peer(sock, uid, "/x")
except Exception as error:
    print(uid, type(error).__name__, error.actual_uid, error.context["socket_path"])
else:
    print(uid, "accepted")
"""


def seen_from_namespace(path: Path, *options: str) -> str:
    """What a process in a user namespace of its own makes of the peer."""
    possible = subprocess.run(["unshare", "--user", *options, "true"], check=False)
    if possible.returncode != 0:
        pytest.skip("no user namespaces here")
    done = subprocess.run(
        ["unshare", "--user", *options, sys.executable, "-c", SEEN_FROM_A_NAMESPACE, path],
        cwd=CHECKOUT,
        env=plain_environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_a_peer_without_a_uid_in_our_namespace_is_nobody_whom_we_expect(scratch: Path) -> None:
    with serving(scratch / "socket"):
        seen = seen_from_namespace(scratch / "socket")

    assert seen == f"{NOBODY} SocketAuthError {NOBODY} /x\n"


@root_only
def test_nor_is_one_beside_a_map_that_has_others(scratch: Path) -> None:
    with serving(scratch / "socket", uid=54321):
        seen = seen_from_namespace(scratch / "socket", "--map-root-user")

    assert seen == f"{NOBODY} SocketAuthError {NOBODY} /x\n"


def test_a_peer_that_our_namespace_maps_is_accepted(scratch: Path) -> None:
    with serving(scratch / "socket"):
        as_root = seen_from_namespace(scratch / "socket", "--map-root-user")
        as_nobody = seen_from_namespace(scratch / "socket", f"--map-user={NOBODY}")

    assert (as_root, as_nobody) == ("0 accepted\n", f"{NOBODY} accepted\n")


@root_only
def test_the_real_user_of_that_number_is_accepted_where_every_uid_is_mapped(scratch: Path) -> None:
    if Path("/proc/self/uid_map").read_text().split() != ["0", "0", "4294967295"]:
        pytest.skip("takes the initial user namespace")

    with serving(scratch / "socket", uid=NOBODY), connected(scratch / "socket") as sock:
        verify_socket_peer(sock, NOBODY)


@pytest.mark.parametrize(
    ("uid_map", "stands"),
    [
        ("", True),
        ("         0     100000      65534\n", True),
        ("         0     100000      65535\n", False),
        ("0 1000 1\n65534 5 1\n", False),
        ("65535 100000 10\n", True),
        (None, True),
    ],
)
def test_the_overflow_uid_stands_for_others_unless_it_is_mapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uid_map: str | None, *, stands: bool
) -> None:
    (tmp_path / "self").mkdir()
    if uid_map is not None:
        (tmp_path / "self" / "uid_map").write_text(uid_map)
    monkeypatch.setattr(peer_process, "_PROC", tmp_path)

    assert stands_for_others(NOBODY) is stands
    assert not stands_for_others(0)


def test_the_overflow_uid_is_the_one_that_the_host_has_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sys" / "kernel").mkdir(parents=True)
    (tmp_path / "sys" / "kernel" / "overflowuid").write_text("7\n")
    monkeypatch.setattr(peer_process, "_PROC", tmp_path)

    assert stands_for_others(7)
    assert not stands_for_others(NOBODY)


# Processes that changed their user after they began to listen


@root_only
@pytest.mark.parametrize("with_pidfd", [True, False])
def test_a_process_that_has_become_another_user_is_refused(
    scratch: Path, *, with_pidfd: bool
) -> None:
    with serving(scratch / "socket") as server, connected(scratch / "socket") as sock:
        pidfd = os.pidfd_open(server.pid) if with_pidfd else None
        identity = ProcessIdentity.of(server.pid)
        verify_machine_peer(sock, uid=0, identity=identity, pidfd=pidfd)
        become(server, 0, 54321, 0)

        with pytest.raises(SocketAuthError) as caught:
            verify_machine_peer(sock, uid=0, identity=identity, pidfd=pidfd, socket_path="/x")

        if pidfd is not None:
            os.close(pidfd)
    error = caught.value
    assert error.message == "Socket peer UID mismatch: expected root (0), got 54321 (54321)"
    assert (error.expected_uid, error.actual_uid) == (0, 54321)
    assert (error.context["socket_path"], error.context["peer_pid"]) == ("/x", server.pid)


@root_only
def test_only_the_effective_uid_counts(scratch: Path) -> None:
    with serving(scratch / "socket") as server, connected(scratch / "socket") as sock:
        become(server, 54321, 0, 54322)

        identity = ProcessIdentity.of(server.pid)
        verify_machine_peer(sock, uid=0, identity=identity, pidfd=None)
        assert read_effective_uid(server.pid) == 0


@pytest.mark.parametrize("kernel", ["new", "old"])
@pytest.mark.parametrize("with_pidfd", [True, False])
def test_a_process_that_ends_while_it_is_looked_at_is_refused(
    scratch: Path, monkeypatch: pytest.MonkeyPatch, kernel: str, *, with_pidfd: bool
) -> None:
    with serving(scratch / "socket") as server, connected(scratch / "socket") as sock:
        pidfd = os.pidfd_open(server.pid) if with_pidfd else None
        identity = ProcessIdentity.of(server.pid)
        if kernel == "old":
            monkeypatch.setattr(peer_process, "SO_PEERPIDFD", 9999)

        def end_it_and_see_a_successor(_pid: int) -> int:
            server.kill()
            server.wait()
            return os.getuid()

        monkeypatch.setattr(socket_auth, "read_effective_uid", end_it_and_see_a_successor)
        with pytest.raises(SocketAuthError, match="Socket peer"):
            verify_machine_peer(sock, uid=os.getuid(), identity=identity, pidfd=pidfd)
        if pidfd is not None:
            os.close(pidfd)


def test_a_process_that_is_gone_has_no_uid() -> None:
    with subprocess.Popen(["true"]) as gone:
        gone.wait()

    assert read_effective_uid(gone.pid) is None
    assert read_effective_uid(os.getpid()) == os.geteuid()


SEEN_WITH_HIDDEN_PROCESSES = """
import os, socket, sys
from pytest_vmsandbox.host.peer_process import read_effective_uid
from pytest_vmsandbox.host.socket_auth import verify_machine_peer
from pytest_vmsandbox.linux.process_identity import ProcessIdentity
path, boot_id, pid, start_ticks = sys.argv[1:]
identity = ProcessIdentity(boot_id=boot_id, pid=int(pid), start_ticks=int(start_ticks))
sock = socket.socket(socket.AF_UNIX)
sock.connect(path)
pidfd = os.pidfd_open(identity.pid)
verify_machine_peer(sock, uid=0, identity=identity, pidfd=pidfd)
print(os.getuid(), read_effective_uid(identity.pid))
"""


@root_only
@pytest.mark.parametrize("hidden", ["1", "2"])
def test_a_process_that_proc_hides_is_known_by_its_pidfd_alone(scratch: Path, hidden: str) -> None:
    if not kernel_tells_pidfds():
        pytest.skip("takes Linux 6.5: SO_PEERPIDFD")
    with serving(scratch / "socket") as server:
        identity = ProcessIdentity.of(server.pid)
        mount = f'mount -t proc -o hidepid={hidden} proc /proc && exec "$@"'
        done = subprocess.run(
            [
                *("unshare", "--mount", "sh", "-c", mount, "sh"),
                *as_user("nobody"),
                *(sys.executable, "-c", SEEN_WITH_HIDDEN_PROCESSES, scratch / "socket"),
                *(identity.boot_id, str(identity.pid), str(identity.start_ticks)),
            ],
            cwd=CHECKOUT,
            env=plain_environment(),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    if "ModuleNotFoundError" in done.stderr or "Permission denied" in done.stderr:
        pytest.skip("an ordinary user can't reach this checkout or its interpreter")
    assert (done.stdout, done.stderr) == (f"{NOBODY} None\n", "")


def kernel_tells_pidfds() -> bool:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        try:
            pidfd = ours.getsockopt(socket.SOL_SOCKET, peer_process.SO_PEERPIDFD)
        except OSError:
            return False
        os.close(pidfd)
        return True
