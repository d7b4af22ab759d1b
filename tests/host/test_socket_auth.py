"""Peers of UNIX sockets: strangers of every kind are refused before a byte is sent to them."""

from __future__ import annotations

import asyncio
import inspect
import os
import pickle
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import FrozenInstanceError, dataclass
from pathlib import Path

import pytest

from pytest_vmsandbox.deadline import Deadline
from pytest_vmsandbox.errors import SocketAuthError, TimedOut
from pytest_vmsandbox.host import peer_process, socket_auth
from pytest_vmsandbox.host.peer_process import is_same_process, pid_of
from pytest_vmsandbox.host.socket_auth import (
    PeerCredentials,
    connect_and_verify,
    connect_machine_socket,
    create_unix_socket,
    get_peer_credentials,
    verify_machine_peer,
    verify_socket_peer,
)
from pytest_vmsandbox.linux.process_identity import ProcessIdentity

root_only = pytest.mark.skipif(os.getuid() != 0, reason="takes root: it has servers of other users")

# Serves one client, and says how many bytes it sent before it went away.
SERVER = """
import os, socket, sys, time
how, path = sys.argv[1:3]
if how == "inherited":
    server = socket.socket(fileno=int(path))
else:
    server = socket.socket(socket.AF_UNIX)
    server.bind(path)
    os.chmod(path, 0o666)
    if how == "late":
        time.sleep(0.3)
    server.listen(int(sys.argv[3]) if how == "backlog" else 5)
print("listening", flush=True)
if how == "backlog":
    sys.stdin.read()
    sys.exit()
if how == "orphaned" and os.fork():
    os._exit(0)
client, _ = server.accept()
received = b""
while chunk := client.recv(65536):
    received += chunk
    if received.endswith(b"?"):
        client.sendall(b"!" * 100000 + b"\\n")
print(len(received), flush=True)
"""


@dataclass(slots=True)
class Server:
    """A process that serves a socket."""

    process: subprocess.Popen[str]
    path: Path

    @property
    def identity(self) -> ProcessIdentity:
        return ProcessIdentity.of(self.process.pid)

    def wait_listening(self) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "listening\n"

    def bytes_received(self) -> int:
        """What its first client sent, which must have gone away."""
        assert self.process.stdout is not None
        return int(self.process.stdout.readline())


Serve = Callable[..., Server]


@pytest.fixture
def serve(scratch: Path) -> Iterator[Serve]:
    """Starts servers; they are gone afterwards."""
    with ExitStack() as undo:
        scratch.chmod(0o777)

        def start(
            name: str = "socket",
            *extra: str,
            how: str = "plainly",
            uid: int | None = None,
            inherits: int | None = None,
            ready: bool = True,
        ) -> Server:
            path = scratch / name
            where = str(path) if inherits is None else str(inherits)
            process = undo.enter_context(
                subprocess.Popen(
                    [sys.executable, "-S", "-E", "-c", SERVER, how, where, *extra],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    user=uid,
                    group=uid,
                    extra_groups=None if uid is None else [],
                    pass_fds=[] if inherits is None else [inherits],
                )
            )
            undo.callback(process.kill)
            server = Server(process, path)
            if ready:
                server.wait_listening()
            return server

        yield start


@contextmanager
def pidfd_of(server: Server) -> Iterator[int]:
    pidfd = os.pidfd_open(server.process.pid)
    try:
        yield pidfd
    finally:
        os.close(pidfd)


@contextmanager
def connected(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(path))
        yield sock


class Recorded(socket.socket):
    """A socket whose getsockopt gives what was recorded elsewhere, or raises it."""

    answers: dict[tuple[int, int, int], bytes | OSError]

    def getsockopt(self, level: int, option: int, size: int = 0) -> bytes:  # type: ignore[override]
        answer = self.answers[level, option, size]
        if isinstance(answer, OSError):
            raise answer
        return answer


@pytest.fixture
def recorded() -> Iterator[Recorded]:
    with Recorded(socket.AF_UNIX) as sock:
        sock.answers = {}
        yield sock


@pytest.fixture
def on_macos(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")


@pytest.fixture
def old_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel before 6.5: an option that this one does not know, gives what it gave."""
    monkeypatch.setattr(peer_process, "SO_PEERPIDFD", 9999)


# Credentials


def test_credentials_are_a_frozen_value_with_a_uid_and_perhaps_more() -> None:
    peer = PeerCredentials(7)

    assert (peer.uid, peer.gid, peer.pid) == (7, None, None)
    with pytest.raises(FrozenInstanceError):
        peer.uid = 8  # type: ignore[misc]


def test_the_peer_is_the_process_that_listens(serve: Serve) -> None:
    server = serve()

    with connected(server.path) as sock:
        peer = get_peer_credentials(sock)

    assert peer == PeerCredentials(os.getuid(), os.getgid(), server.process.pid)


@root_only
def test_the_peer_of_another_user_has_that_users_ids(serve: Serve) -> None:
    server = serve(uid=54321)

    with connected(server.path) as sock:
        peer = get_peer_credentials(sock)

    assert (peer.uid, peer.gid) == (54321, 54321)


def test_a_socket_that_is_not_connected_has_no_peer() -> None:
    with socket.socket(socket.AF_UNIX) as sock, pytest.raises(SocketAuthError) as caught:
        get_peer_credentials(sock)

    assert (caught.value.expected_uid, caught.value.actual_uid) == (0, 0)
    assert caught.value.context["peer_pid"] == 0
    assert caught.value.context["peer_uid"] == 0xFFFFFFFF
    assert caught.value.message == (
        "The peer has no process that we can see: not connected, or in another pid namespace"
    )


def test_a_tcp_socket_is_refused_with_its_family() -> None:
    with socket.socket(socket.AF_INET) as sock, pytest.raises(SocketAuthError) as caught:
        get_peer_credentials(sock)

    assert (caught.value.expected_uid, caught.value.actual_uid) == (0, 0)
    assert caught.value.context["socket_family"] == socket.AF_INET
    assert caught.value.message == "Not a UNIX socket: it has no peer credentials"


def test_a_closed_socket_is_refused_with_the_reason() -> None:
    sock = socket.socket(socket.AF_UNIX)
    sock.close()

    with pytest.raises(SocketAuthError) as caught:
        get_peer_credentials(sock)

    assert isinstance(caught.value.__cause__, OSError)
    assert (caught.value.expected_uid, caught.value.actual_uid) == (0, 0)
    assert caught.value.message == "Peer credentials can't be read: [Errno 9] Bad file descriptor"


@pytest.mark.parametrize("size", [0, 11, 13])
def test_an_answer_of_another_size_is_refused(recorded: Recorded, size: int) -> None:
    recorded.answers[socket.SOL_SOCKET, socket.SO_PEERCRED, 12] = b"\1" * size

    with pytest.raises(SocketAuthError) as caught:
        get_peer_credentials(recorded)

    assert isinstance(caught.value.__cause__, struct.error)
    assert (caught.value.expected_uid, caught.value.actual_uid) == (0, 0)


def test_ids_above_two_thousand_million_are_not_negative(recorded: Recorded) -> None:
    recorded.answers[socket.SOL_SOCKET, socket.SO_PEERCRED, 12] = struct.pack(
        "iII", 9, 4294967294, 4294967293
    )

    assert get_peer_credentials(recorded) == PeerCredentials(4294967294, 4294967293, 9)


def test_another_platform_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "plan9")

    with socket.socket(socket.AF_UNIX) as sock, pytest.raises(SocketAuthError) as caught:
        get_peer_credentials(sock)

    assert caught.value.context["platform"] == "plan9"
    assert (caught.value.expected_uid, caught.value.actual_uid) == (0, 0)
    assert caught.value.message == "Peer credentials can't be had here"


SEEN_FROM_INSIDE = """
import socket, sys
from pytest_vmsandbox.host.socket_auth import verify_socket_peer
sock = socket.socket(socket.AF_UNIX)
sock.connect(sys.argv[1])
try:
    verify_socket_peer(sock, int(sys.argv[2]))
except Exception as error:
    print(type(error).__name__, error.context["peer_pid"])
"""


@root_only
def test_a_peer_in_a_pid_namespace_that_we_cannot_see_is_refused(serve: Serve) -> None:
    server = serve()

    done = subprocess.run(
        ["unshare", "--pid", "--fork", sys.executable, "-c", SEEN_FROM_INSIDE, server.path, "0"],
        cwd=Path(socket_auth.__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert (done.stdout, done.stderr) == ("SocketAuthError 0\n", "")
    assert server.bytes_received() == 0


# macOS, by recorded answers: xucred for uid 501 in groups 20, 12 and 61, and for the highest uid

XUCRED_501 = bytes.fromhex("00000000f501000003000000140000000c0000003d000000" + "00000000" * 13)
XUCRED_HIGHEST = bytes.fromhex("00000000feffffff01000000feffffff" + "00000000" * 15)
XUCRED_VERSION_1 = bytes.fromhex(
    "01000000f501000003000000140000000c0000003d000000" + "00000000" * 13
)


@pytest.mark.usefixtures("on_macos")
@pytest.mark.parametrize(("answer", "uid"), [(XUCRED_501, 501), (XUCRED_HIGHEST, 4294967294)])
def test_macos_tells_the_uid_alone(recorded: Recorded, answer: bytes, uid: int) -> None:
    recorded.answers[0, 1, 76] = answer

    assert get_peer_credentials(recorded) == PeerCredentials(uid, None, None)
    verify_socket_peer(recorded, uid)
    with pytest.raises(SocketAuthError):
        verify_socket_peer(recorded, 0)


@pytest.mark.usefixtures("on_macos")
def test_macos_with_an_unknown_version_is_refused(recorded: Recorded) -> None:
    recorded.answers[0, 1, 76] = XUCRED_VERSION_1

    with pytest.raises(SocketAuthError) as caught:
        get_peer_credentials(recorded)

    assert caught.value.context["xucred_version"] == 1
    assert (caught.value.expected_uid, caught.value.actual_uid) == (0, 0)
    assert caught.value.message == "Unknown version of xucred"


@pytest.mark.usefixtures("on_macos")
@pytest.mark.parametrize("answer", [b"", XUCRED_501[:8], XUCRED_501[:75], XUCRED_501 + b"\0"])
def test_macos_with_an_answer_of_another_size_is_refused(recorded: Recorded, answer: bytes) -> None:
    recorded.answers[0, 1, 76] = answer

    with pytest.raises(SocketAuthError) as caught:
        get_peer_credentials(recorded)

    assert isinstance(caught.value.__cause__, struct.error)


@pytest.mark.usefixtures("on_macos")
def test_macos_without_a_peer_is_refused(recorded: Recorded) -> None:
    recorded.answers[0, 1, 76] = OSError(57, "Socket is not connected")

    with pytest.raises(SocketAuthError) as caught:
        get_peer_credentials(recorded)

    assert isinstance(caught.value.__cause__, OSError)


@pytest.mark.usefixtures("on_macos")
def test_macos_compares_the_pid_of_a_machine(recorded: Recorded) -> None:
    recorded.answers = {(0, 1, 76): XUCRED_501, (0, 2, 4): struct.pack("i", 77)}
    right = ProcessIdentity(boot_id="", pid=77, start_ticks=0)
    wrong = ProcessIdentity(boot_id="", pid=78, start_ticks=0)

    verify_machine_peer(recorded, uid=501, identity=right, pidfd=None)
    with pytest.raises(SocketAuthError, match="expected pid 78, got 77"):
        verify_machine_peer(recorded, uid=501, identity=wrong, pidfd=None)
    with pytest.raises(SocketAuthError, match="UID mismatch"):
        verify_machine_peer(recorded, uid=502, identity=right, pidfd=None)


# The user


def test_the_right_user_is_accepted_in_silence(serve: Serve) -> None:
    with connected(serve().path) as sock:
        verify_socket_peer(sock, os.getuid())


@root_only
def test_root_is_nobody_special(serve: Serve) -> None:
    server = serve()

    with connected(server.path) as sock, pytest.raises(SocketAuthError) as caught:
        verify_socket_peer(sock, 1, str(server.path))

    error = caught.value
    assert error.message == "Socket peer UID mismatch: expected daemon (1), got root (0)"
    assert (error.expected_uid, error.actual_uid) == (1, 0)
    assert error.context["socket_path"] == str(server.path)
    assert error.context["peer_pid"] == server.process.pid
    assert (error.context["expected_uid"], error.context["actual_uid"]) == (1, 0)


@root_only
def test_a_stranger_is_refused_where_root_is_expected(serve: Serve) -> None:
    with connected(serve(uid=54321).path) as sock, pytest.raises(SocketAuthError) as caught:
        verify_socket_peer(sock, 0)

    assert caught.value.message == "Socket peer UID mismatch: expected root (0), got 54321 (54321)"
    assert caught.value.context["socket_path"] is None


def test_a_uid_that_no_user_can_have_is_a_mismatch_like_any_other(serve: Serve) -> None:
    with connected(serve().path) as sock, pytest.raises(SocketAuthError, match=str(2**40)):
        verify_socket_peer(sock, 2**40)


def test_the_error_survives_pickling(serve: Serve) -> None:
    with connected(serve().path) as sock, pytest.raises(SocketAuthError) as caught:
        verify_socket_peer(sock, 54321, "/x")

    again = pickle.loads(pickle.dumps(caught.value))

    assert str(again) == str(caught.value)
    assert again.context == caught.value.context


# Connecting to a user


async def test_a_verified_connection_speaks_and_reads_long_lines(serve: Serve) -> None:
    server = serve()

    reader, writer = await connect_and_verify(server.path, os.getuid())
    writer.write(b"hello?")
    line = await reader.readline()
    writer.close()
    await writer.wait_closed()

    assert line == b"!" * 100_000 + b"\n"
    assert server.bytes_received() == 6


async def test_the_buffer_limit_is_the_callers(serve: Serve) -> None:
    reader, writer = await connect_and_verify(serve().path, os.getuid(), buffer_limit=1000)
    writer.write(b"?")

    with pytest.raises(ValueError, match="limit"):
        await reader.readline()

    writer.close()
    await writer.wait_closed()


def test_the_expected_uid_has_no_default_and_the_others_the_documented_ones() -> None:
    parameters = inspect.signature(connect_and_verify).parameters

    assert list(parameters) == ["path", "expected_uid", "timeout", "buffer_limit"]
    assert parameters["expected_uid"].default is inspect.Parameter.empty
    assert parameters["timeout"].default == 5.0
    assert parameters["buffer_limit"].default == 16 * 1024 * 1024
    assert inspect.signature(create_unix_socket).parameters["backlog"].default == 128


async def test_a_stranger_gets_no_byte_and_the_socket_is_closed(
    serve: Serve, open_descriptors: Callable[[], list[str]]
) -> None:
    server = serve()
    before = open_descriptors()

    with pytest.raises(SocketAuthError) as caught:
        await connect_and_verify(server.path, 54321)

    assert caught.value.context["socket_path"] == str(server.path)
    assert open_descriptors() == before
    assert server.bytes_received() == 0


async def test_what_connecting_raises_passes_through_and_the_socket_is_closed(
    scratch: Path, open_descriptors: Callable[[], list[str]]
) -> None:
    before = open_descriptors()
    with socket.socket(socket.AF_UNIX) as deaf:
        deaf.bind(str(scratch / "deaf"))

        with pytest.raises(FileNotFoundError):
            await connect_and_verify(scratch / "missing", os.getuid())
        with pytest.raises(ConnectionRefusedError):
            await connect_and_verify(scratch / "deaf", os.getuid())
        with pytest.raises(OSError, match="too long"):
            await connect_and_verify(scratch / ("x" * 200), os.getuid())

    assert open_descriptors() == before


async def test_a_limit_that_is_none_is_refused_and_the_socket_is_closed(
    serve: Serve, open_descriptors: Callable[[], list[str]]
) -> None:
    server = serve()
    before = open_descriptors()

    with pytest.raises(ValueError, match="Limit"):
        await connect_and_verify(server.path, os.getuid(), buffer_limit=0)

    assert open_descriptors() == before
    assert server.bytes_received() == 0


@contextmanager
def crowded(server: Server) -> Iterator[None]:
    """Fill the backlog of a server that accepts nobody."""
    with ExitStack() as undo:
        try:
            while True:
                sock = undo.enter_context(socket.socket(socket.AF_UNIX))
                sock.settimeout(0)
                sock.connect(str(server.path))
        except BlockingIOError:
            pass
        yield


async def test_a_listener_that_accepts_nobody_is_a_timeout_and_the_socket_is_closed(
    serve: Serve, open_descriptors: Callable[[], list[str]]
) -> None:
    server = serve("socket", "0", how="backlog")
    with crowded(server):
        before = open_descriptors()

        with pytest.raises(TimeoutError):
            await connect_and_verify(server.path, os.getuid(), timeout=0.1)

        assert open_descriptors() == before


async def test_a_listener_that_has_room_again_is_connected_to(serve: Serve) -> None:
    server = serve("socket", "0", how="backlog")
    crowd = ExitStack()
    crowd.enter_context(crowded(server))
    connecting = asyncio.create_task(connect_and_verify(server.path, os.getuid()))
    await asyncio.sleep(0.05)
    assert not connecting.done()

    connecting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await connecting

    crowd.close()


# Listening


def test_a_socket_that_we_make_listens(scratch: Path) -> None:
    with create_unix_socket(scratch / "socket") as server, connected(scratch / "socket") as client:
        assert server.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == 1
        assert server.getblocking()
        assert not server.get_inheritable()
        accepted, _ = server.accept()
        accepted.close()
        assert get_peer_credentials(client).pid == os.getpid()


def test_the_backlog_is_the_callers(scratch: Path) -> None:
    with create_unix_socket(scratch / "socket", backlog=0), ExitStack() as undo:
        clients = [undo.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(2)]
        for client in clients:
            client.settimeout(0)
        clients[0].connect(str(scratch / "socket"))
        with pytest.raises(BlockingIOError):
            clients[1].connect(str(scratch / "socket"))


@pytest.mark.parametrize("what", ["file", "socket"])
def test_what_is_there_already_is_never_removed(
    scratch: Path, what: str, open_descriptors: Callable[[], list[str]]
) -> None:
    path = scratch / "socket"
    if what == "file":
        path.write_text("precious")
    else:
        create_unix_socket(path).close()
    inode = path.stat().st_ino
    before = open_descriptors()

    with pytest.raises(OSError, match="in use"):
        create_unix_socket(path)

    assert path.stat().st_ino == inode
    assert open_descriptors() == before


# The process

MODES = ["by pidfd", "without a pidfd of ours", "on an old kernel", "on an old kernel, no pidfd"]


@pytest.fixture(params=MODES)
def held(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[Server], int | None]]:
    """How the process is known: gives the pidfd to compare with, or none."""
    with ExitStack() as undo:
        if "old kernel" in request.param:
            monkeypatch.setattr(peer_process, "SO_PEERPIDFD", 9999)

        def hold(server: Server) -> int | None:
            if request.param in {MODES[1], MODES[3]}:
                return None
            return undo.enter_context(pidfd_of(server))

        yield hold


Held = Callable[[Server], int | None]


def test_the_process_itself_is_accepted(serve: Serve, held: Held) -> None:
    server = serve()

    with connected(server.path) as sock:
        verify_machine_peer(sock, uid=os.getuid(), identity=server.identity, pidfd=held(server))


def test_another_process_of_the_same_user_is_refused(serve: Serve, held: Held) -> None:
    ours, theirs = serve("ours"), serve("theirs")

    with connected(theirs.path) as sock, pytest.raises(SocketAuthError) as caught:
        verify_machine_peer(
            sock,
            uid=os.getuid(),
            identity=ours.identity,
            pidfd=held(ours),
            socket_path="/x",
        )

    error = caught.value
    assert error.message == (
        f"Socket peer is another process: expected pid {ours.process.pid}, got {theirs.process.pid}"
    )
    assert error.context["peer_pid"] == theirs.process.pid
    assert error.context["expected_pid"] == ours.process.pid
    assert error.context["socket_path"] == "/x"
    assert (error.expected_uid, error.actual_uid) == (os.getuid(), os.getuid())
    assert theirs.bytes_received() == 0


@root_only
def test_the_right_process_as_the_wrong_user_is_refused(serve: Serve, held: Held) -> None:
    server = serve()

    with connected(server.path) as sock, pytest.raises(SocketAuthError, match="UID mismatch"):
        verify_machine_peer(sock, uid=54321, identity=server.identity, pidfd=held(server))


def test_a_process_with_the_right_pid_and_another_start_is_refused(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve()
    seen = server.identity
    older = ProcessIdentity(boot_id=seen.boot_id, pid=seen.pid, start_ticks=seen.start_ticks - 1)

    with connected(server.path) as sock:
        for option in (peer_process.SO_PEERPIDFD, 9999):
            monkeypatch.setattr(peer_process, "SO_PEERPIDFD", option)
            with pytest.raises(SocketAuthError, match="start time") as caught:
                verify_machine_peer(sock, uid=os.getuid(), identity=older, pidfd=None)
            assert caught.value.message == (
                "Socket peer is another process: "
                f"expected start time {older.start_ticks}, got {seen.start_ticks}"
            )


def test_the_right_pid_with_the_pidfd_of_another_is_refused(serve: Serve) -> None:
    server, other = serve("one"), serve("other")

    with (
        connected(server.path) as sock,
        pidfd_of(other) as pidfd,
        pytest.raises(SocketAuthError) as caught,
    ):
        verify_machine_peer(sock, uid=os.getuid(), identity=server.identity, pidfd=pidfd)

    assert caught.value.message == (
        "Socket peer is another process: "
        f"expected process {server.process.pid}, got another one, by its pidfd"
    )


def test_a_descriptor_that_is_no_pidfd_is_refused(serve: Serve) -> None:
    server = serve()

    with (
        connected(server.path) as sock,
        pytest.raises(SocketAuthError) as caught,
        Path("/dev/null").open("rb") as null,
    ):
        verify_machine_peer(sock, uid=os.getuid(), identity=server.identity, pidfd=null.fileno())

    assert (caught.value.expected_uid, caught.value.actual_uid) == (os.getuid(), os.getuid())


def test_a_listener_that_we_made_ourselves_is_refused(
    serve: Serve, held: Held, scratch: Path
) -> None:
    with create_unix_socket(scratch / "socket") as listener:
        server = serve(inherits=listener.fileno(), how="inherited")

        with (
            connected(scratch / "socket") as sock,
            pytest.raises(SocketAuthError, match=f"got {os.getpid()}"),
        ):
            verify_machine_peer(sock, uid=os.getuid(), identity=server.identity, pidfd=held(server))
        assert server.bytes_received() == 0


def test_a_listener_that_outlived_its_process_is_refused(serve: Serve, held: Held) -> None:
    server = serve(how="orphaned", ready=False)
    pidfd, identity = held(server), server.identity
    server.wait_listening()
    server.process.wait(timeout=60)

    with connected(server.path) as sock, pytest.raises(SocketAuthError) as caught:
        verify_machine_peer(sock, uid=os.getuid(), identity=identity, pidfd=pidfd)

    assert caught.value.context["peer_pid"] == identity.pid
    # Kernels before 6.16 give no pidfd of a process that was reaped, and say EINVAL.
    assert any(
        caught.value.message.endswith(end)
        for end in (
            f"expected process {identity.pid}, got one that has ended",
            f"expected process {identity.pid}, got another one, by its pidfd",
            "Invalid argument",
            f"No such process: '/proc/{identity.pid}/stat'",
        )
    ), caught.value.message
    assert server.bytes_received() == 0


@pytest.mark.parametrize("error", [OSError(22, "Invalid argument"), OSError(61, "No data")])
def test_a_kernel_that_will_not_tell_is_not_taken_for_an_old_one(
    recorded: Recorded, error: OSError
) -> None:
    recorded.answers = {
        (socket.SOL_SOCKET, socket.SO_PEERCRED, 12): struct.pack("iII", os.getpid(), 0, 0),
        (socket.SOL_SOCKET, 77, 4): error,
    }

    with pytest.raises(SocketAuthError, match=error.strerror) as caught:
        verify_machine_peer(recorded, uid=0, identity=ProcessIdentity.current(), pidfd=None)

    assert caught.value.__cause__ is error
    assert caught.value.message == f"Socket peer process can't be looked at: {error}"
    assert caught.value.context["peer_pid"] == os.getpid()
    assert "socket_path" in caught.value.context


def test_looking_at_the_process_leaves_no_descriptor(
    serve: Serve, open_descriptors: Callable[[], list[str]]
) -> None:
    server, other = serve("one"), serve("other")
    with connected(server.path) as sock, pidfd_of(server) as pidfd, pidfd_of(other) as wrong:
        before = open_descriptors()

        verify_machine_peer(sock, uid=os.getuid(), identity=server.identity, pidfd=pidfd)
        with pytest.raises(SocketAuthError):
            verify_machine_peer(sock, uid=os.getuid(), identity=server.identity, pidfd=wrong)

        assert open_descriptors() == before


# Pidfds


def test_a_pidfd_tells_its_pid_and_that_it_is_gone(serve: Serve) -> None:
    server = serve()

    with pidfd_of(server) as pidfd:
        assert pid_of(pidfd) == server.process.pid
        pair = os.pipe()
        with pytest.raises(ValueError, match=f"^descriptor {pair[0]} is not a pidfd$"):
            pid_of(pair[0])
        for end in pair:
            os.close(end)
        server.process.kill()
        server.process.wait(timeout=60)
        assert pid_of(pidfd) == -1


def test_two_pidfds_are_of_one_process_only_while_it_is_there(serve: Serve) -> None:
    server, other = serve("one"), serve("other")

    with pidfd_of(server) as one, pidfd_of(server) as same, pidfd_of(other) as another:
        assert is_same_process(one, same)
        assert not is_same_process(one, another)
        for process in (server.process, other.process):
            process.kill()
            process.wait(timeout=60)
        assert not is_same_process(one, same)
        assert not is_same_process(one, another)


def test_two_processes_that_had_one_pid_are_told_apart(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, other = serve("one"), serve("other")

    with pidfd_of(server) as one, pidfd_of(other) as another:
        if os.fstat(one).st_ino == os.fstat(another).st_ino:
            pytest.skip("this kernel gives pidfds no inodes of their own (before 6.9)")
        monkeypatch.setattr(peer_process, "pid_of", lambda _pidfd: 7)  # as after a reuse

        assert not is_same_process(one, another)


def test_the_first_process_of_a_pid_namespace_is_a_process_like_any_other(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pidfd_of(serve()) as one, os.fdopen(os.dup(one)) as same:
        monkeypatch.setattr(peer_process, "pid_of", lambda _pidfd: 1)  # as it sees itself

        assert is_same_process(one, same.fileno())


def test_processes_that_we_cannot_see_are_never_taken_for_one(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Before Linux 6.9 all pidfds share an inode, and all such processes have pid 0 to us.
    with pidfd_of(serve()) as one:
        monkeypatch.setattr(peer_process, "pid_of", lambda _pidfd: 0)

        assert not is_same_process(one, one)


def test_a_difference_is_a_frozen_value_that_reads_aloud() -> None:
    difference = peer_process.Difference("pid", 1, 2)

    assert str(difference) == "expected pid 1, got 2"
    assert hash(difference) == hash(peer_process.Difference("pid", 1, 2))
    with pytest.raises(FrozenInstanceError):
        difference.what = "uid"  # type: ignore[misc]


# Connecting to a machine


async def connect(
    server: Server, *, seconds: float = 30, path: Path | None = None
) -> socket.socket:
    with pidfd_of(server) as pidfd:
        return await connect_machine_socket(
            path or server.path,
            uid=os.getuid(),
            pidfd=pidfd,
            identity=server.identity,
            deadline=Deadline.after(seconds=seconds),
        )


async def test_the_socket_of_a_machine_is_connected_and_quiet(serve: Serve) -> None:
    server = serve()

    with await connect(server) as sock:
        assert sock.family == socket.AF_UNIX
        assert sock.type == socket.SOCK_STREAM
        assert not sock.getblocking()
        assert not sock.get_inheritable()
        assert sock.getpeername() == str(server.path)

    assert server.bytes_received() == 0


async def test_a_machine_that_does_not_listen_yet_is_waited_for(serve: Serve) -> None:
    server = serve(how="late", ready=False)
    connecting = asyncio.create_task(connect(server))
    await asyncio.sleep(0.02)
    assert not connecting.done()

    with await connecting as sock:
        assert get_peer_credentials(sock).pid == server.process.pid


async def test_what_an_earlier_process_left_on_the_path_does_not_end_the_wait(
    serve: Serve, scratch: Path
) -> None:
    stale = scratch / "stale"
    create_unix_socket(stale).close()
    server = serve(how="late", ready=False)
    connecting = asyncio.create_task(connect(server, path=stale))
    await asyncio.sleep(0.02)
    assert not connecting.done()

    server.wait_listening()
    server.path.rename(stale)
    with await connecting as sock:
        assert get_peer_credentials(sock).pid == server.process.pid


@pytest.mark.parametrize(
    ("what", "seen"),
    [
        ("nothing", "No such file"),
        ("deaf", "refused"),
        ("crowd", "its backlog is full"),
    ],
)
async def test_a_machine_that_never_listens_is_a_timeout_that_says_what_was_seen(
    serve: Serve, scratch: Path, open_descriptors: Callable[[], list[str]], what: str, seen: str
) -> None:
    server = serve("socket", "0", how="backlog")
    path = {"nothing": scratch / "nothing", "crowd": server.path}.get(what, scratch / "deaf")
    with ExitStack() as undo:
        deaf = undo.enter_context(socket.socket(socket.AF_UNIX))
        deaf.bind(str(scratch / "deaf"))
        undo.enter_context(crowded(server))
        before = open_descriptors()

        with pytest.raises(TimedOut) as caught:
            await connect(server, path=path, seconds=0.1)

        assert open_descriptors() == before
    assert caught.value.awaited == f"the VMM listening on {path}"
    assert caught.value.after_s == 0.1
    assert seen in caught.value.last_seen
    assert caught.value.last_seen == seen or what != "crowd"


def test_a_machine_is_looked_for_many_times_a_second() -> None:
    assert 0 < socket_auth._RETRY_S <= 0.02


async def test_a_deadline_that_has_passed_still_allows_one_try(serve: Serve) -> None:
    (await connect(serve(), seconds=0)).close()


@pytest.mark.parametrize(
    ("what", "named"), [("link", "symbolic link"), ("file", "other file"), ("folder", "other file")]
)
async def test_what_is_no_socket_is_refused_at_once(
    serve: Serve, scratch: Path, open_descriptors: Callable[[], list[str]], what: str, named: str
) -> None:
    server = serve()
    path = scratch / what
    if what == "link":
        path.symlink_to(server.path)
    elif what == "file":
        path.touch()
    else:
        path.mkdir()
    before = open_descriptors()

    with pytest.raises(SocketAuthError) as caught:
        await connect(server, path=path)

    assert caught.value.message == f"Not a socket but a {named}: {path}"

    assert open_descriptors() == before
    assert caught.value.context["socket_path"] == str(path)
    assert caught.value.expected_uid == os.getuid()
    assert caught.value.actual_uid == os.getuid()


async def test_an_impostor_on_the_path_gets_no_byte(
    serve: Serve, open_descriptors: Callable[[], list[str]]
) -> None:
    machine, impostor = serve("machine"), serve("impostor")
    before = open_descriptors()

    with pytest.raises(SocketAuthError, match="another process") as caught:
        await connect(machine, path=impostor.path)

    assert caught.value.context["socket_path"] == str(impostor.path)
    assert open_descriptors() == before
    assert impostor.bytes_received() == 0


async def test_a_socket_file_swapped_between_look_and_connect_gains_nothing(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine, impostor = serve("machine"), serve("impostor")
    look = socket_auth._require_socket

    def look_and_be_cheated(path: str, *, uid: int) -> None:
        look(path, uid=uid)
        impostor.path.rename(path)

    monkeypatch.setattr(socket_auth, "_require_socket", look_and_be_cheated)

    with pytest.raises(SocketAuthError, match="another process"):
        await connect(machine)

    assert impostor.bytes_received() == 0


async def test_what_connecting_to_a_machine_raises_passes_through(
    serve: Serve, scratch: Path, open_descriptors: Callable[[], list[str]]
) -> None:
    server = serve()
    (scratch / "file").touch()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other_type:
        other_type.bind(str(scratch / "datagrams"))
        before = open_descriptors()

        with pytest.raises(NotADirectoryError):
            await connect(server, path=scratch / "file" / "socket")
        with pytest.raises(OSError, match="wrong type"):
            await connect(server, path=scratch / "datagrams")

        assert open_descriptors() == before


async def test_a_cancelled_wait_leaves_no_socket(
    serve: Serve, scratch: Path, open_descriptors: Callable[[], list[str]]
) -> None:
    server = serve()
    before = open_descriptors()
    waiting = asyncio.create_task(connect(server, path=scratch / "nothing"))
    await asyncio.sleep(0.02)

    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting

    assert open_descriptors() == before
