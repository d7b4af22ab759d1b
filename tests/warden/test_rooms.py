"""Rooms: reaching what a VMM, taken over, has put into its own directory."""

from __future__ import annotations

import asyncio
import errno
import os
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from pytest_vmsandbox.errors import RequestInvalid, SocketAuthError
from pytest_vmsandbox.host.socket_auth import verify_machine_peer
from pytest_vmsandbox.linux import pidfd_is_alive
from pytest_vmsandbox.warden.client import JailedProcess, Warden
from pytest_vmsandbox.warden.steps import Bind, ReadOnly, Symlink, Tmpfs
from tests.warden.conftest import PYTHON, SLEEP, TRUE, Streams, order, python, run, see, until

# A VMM that was taken over, and what it leaves in its directory for us to step on.
TRAPS = """
import fcntl, os, socket, sys, time
os.chdir("/machine")
def listen(path, kind=socket.SOCK_STREAM, backlog=5):
    sock = socket.socket(socket.AF_UNIX, kind)
    sock.bind(path)
    if kind != socket.SOCK_DGRAM:
        sock.listen(backlog)
    return sock
held = [listen("socket"), listen("datagrams", socket.SOCK_DGRAM),
        listen("packets", socket.SOCK_SEQPACKET)]
listen("left").close()
full = listen("full", backlog=0)
first = socket.socket(socket.AF_UNIX); first.connect("full")
os.symlink("socket", "link to a socket")
os.link("socket", "second name")
os.symlink("/etc/shadow", "link to a file")
os.symlink("/proc/self/fd/0", "link to a descriptor")
os.symlink("loop", "loop")
os.mkfifo("pipe")
os.mkdir("folder")
open("file", "w").write("text")
open("secret", "w").write("text"); os.chmod("secret", 0)
with open("huge", "w") as file:
    os.truncate("huge", 1 << 40)
leased = os.open("leased", os.O_CREAT | os.O_RDWR, 0o600)
try:
    fcntl.fcntl(leased, fcntl.F_SETLEASE, fcntl.F_WRLCK)
except OSError:  # not every kernel and every file system knows leases
    os.unlink("leased")
print("ready", flush=True)
{then}
"""

THEN_SLEEP = "time.sleep(60)"
THEN_SWAP = """
while True:
    for name in ("socket", "link to a file", "folder", "socket", "pipe"):
        os.rename(name, "place")
        os.rename("place", name)
"""


@asynccontextmanager
async def trapped(warden: Warden, then: str = THEN_SLEEP) -> AsyncIterator[JailedProcess]:
    """A process whose room is full of traps."""
    with Streams() as streams:
        script = python(TRAPS.replace("{then}", then))
        async with warden.launch(script, streams.descriptors) as process:
            streams.out_end.close()
            said = await asyncio.to_thread(os.read, streams.out, 99)
            if said != b"ready\n":
                streams.err_end.close()
                pytest.fail(os.read(streams.err, 9999).decode())
            yield process


@pytest.mark.parametrize("name", ["socket", "second name"])
async def test_a_socket_is_connected_to_and_proves_whose_it_is(warden: Warden, name: str) -> None:
    async with trapped(warden) as process:
        with await process.connect(name) as sock:
            assert sock.getblocking() is False
            verify_machine_peer(
                sock, uid=warden.greeting.uid, identity=process.identity, pidfd=process.pidfd
            )


async def test_a_socket_of_another_process_is_found_out(warden: Warden) -> None:
    async with trapped(warden) as one, trapped(warden) as two:
        with await one.connect("socket") as sock, pytest.raises(SocketAuthError):
            verify_machine_peer(
                sock, uid=warden.greeting.uid, identity=two.identity, pidfd=two.pidfd
            )


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("nothing", errno.ENOENT),
        ("left", errno.ECONNREFUSED),
        ("full", errno.EAGAIN),
        ("datagrams", errno.EPROTOTYPE),
        ("packets", errno.EPROTOTYPE),
        ("link to a socket", errno.ENOTSOCK),
        ("link to a file", errno.ENOTSOCK),
        ("loop", errno.ENOTSOCK),
        ("pipe", errno.ENOTSOCK),
        ("folder", errno.ENOTSOCK),
        ("file", errno.ENOTSOCK),
        ("x" * 256, errno.ENAMETOOLONG),
    ],
)
async def test_what_is_no_socket_that_listens_is_not_connected_to(
    warden: Warden, name: str, code: int
) -> None:
    async with trapped(warden) as process:
        with pytest.raises(OSError, match=r"\w") as caught:
            await process.connect(name)
        assert caught.value.errno == code
        assert pidfd_is_alive(process.pidfd)
        with await process.connect("socket"):
            pass


@pytest.mark.parametrize("name", [".", "..", "", "../etc/shadow", "/etc/shadow", "folder/x"])
async def test_no_way_leads_out_of_a_room(warden: Warden, name: str) -> None:
    async with trapped(warden) as process:
        with pytest.raises(RequestInvalid, match="name of a file"):
            await process.connect(name)
        with pytest.raises(RequestInvalid, match="name of a file"):
            await process.open_file(name)


async def test_a_file_is_read(warden: Warden) -> None:
    async with trapped(warden) as process:
        with await process.open_file("file") as file:
            assert file.read() == b"text"
            assert stat.S_ISREG(os.fstat(file.fileno()).st_mode)


@pytest.mark.parametrize(
    ("name", "codes"),
    [
        ("nothing", {errno.ENOENT}),
        ("link to a file", {errno.ELOOP}),
        ("link to a descriptor", {errno.ELOOP}),
        ("loop", {errno.ELOOP}),
        ("pipe", {errno.EINVAL}),
        ("folder", {errno.EINVAL}),
        ("socket", {errno.ENXIO}),
        ("leased", {errno.EAGAIN, errno.ENOENT}),
    ],
)
async def test_what_is_no_file_is_not_opened_and_nobody_waits(
    warden: Warden, name: str, codes: set[int]
) -> None:
    async with trapped(warden) as process, asyncio.timeout(5):
        with pytest.raises(OSError, match=r"\w") as caught:
            await process.open_file(name)
        assert caught.value.errno in codes


async def test_what_is_swapped_all_the_time_is_a_socket_or_an_error(warden: Warden) -> None:
    connected = 0
    async with trapped(warden, THEN_SWAP) as process:
        for _ in range(500):
            try:
                sock = await process.connect("place")
            except OSError as error:
                if error.errno not in {errno.ENOENT, errno.ENOTSOCK, errno.EAGAIN}:
                    raise
                continue
            with sock:
                connected += 1
                peer = sock.getpeername()
            assert peer == "socket"
    assert connected


async def test_who_was_launched_without_a_room_has_none(warden: Warden) -> None:
    with Streams() as streams:
        async with warden.launch(order(SLEEP, "60", room=None), streams.descriptors) as process:
            with pytest.raises(RequestInvalid, match="without a room"):
                await process.connect("socket")


async def test_the_room_of_who_has_ended_is_gone(warden: Warden) -> None:
    with Streams() as streams:
        async with warden.launch(order(TRUE), streams.descriptors) as process:
            await process.wait()
            with pytest.raises(ProcessLookupError):
                await process.connect("socket")
            with pytest.raises(ProcessLookupError):
                await process.open_file("file")


async def test_who_ends_at_any_moment_is_gone_or_listens_no_more(warden: Warden) -> None:
    async with trapped(warden) as process:
        process.kill()
        with suppress(ConnectionRefusedError, ProcessLookupError):
            while True:
                with suppress(BlockingIOError):  # so many wait to be accepted
                    (await process.connect("socket")).close()


async def test_nothing_that_the_warden_holds_of_another_is_bound_into_a_view(
    warden: Warden,
) -> None:
    # Whoever builds a view begins as a copy of the warden, which holds rooms and pidfds of all.
    script = "import json, os; print(json.dumps([os.stat('/x').st_ino, os.stat('/').st_ino]))"
    async with trapped(warden), trapped(warden):
        for source in (*(f"/proc/self/fd/{number}" for number in range(24)), "/proc/1/root"):
            steps = (*order(PYTHON).steps[:-1], Bind(source=source, target="/x"))
            try:
                found, root = await see(warden, python(script, steps=steps))
            except OSError:
                continue
            assert found == root, source  # its own view, once more


async def test_a_room_is_where_it_is_as_seen_from_inside(warden: Warden) -> None:
    steps = (
        *order(PYTHON).steps[:-1],
        Tmpfs(target="/elsewhere", size_mib=1, mode=0o700),
        Symlink(target="/room", text="/elsewhere"),
        ReadOnly(target="/", writable=("/elsewhere",)),
    )
    script = "import time; open('/elsewhere/file', 'w').write('x'); print(1, flush=True)"
    script += "; time.sleep(60)"
    with Streams() as streams:
        ordered = python(script, steps=steps, room="/room")
        async with warden.launch(ordered, streams.descriptors) as process:
            await asyncio.to_thread(os.read, streams.out, 9)
            with await process.open_file("file") as file:
                assert file.read() == b"x"


# Views


MOUNTS = """
import json, os
def lines():
    for line in open("/proc/self/mountinfo"):
        fields = line.split()
        yield fields[4], fields[5].split(","), fields[6:fields.index("-")]
print(json.dumps([list(lines()), os.path.samefile("/", "/.."), sorted(os.listdir("/"))]))
"""


async def test_a_view_is_made_of_what_was_planned_and_of_nothing_else(warden: Warden) -> None:
    ordered = python(MOUNTS)
    planned = {
        getattr(step, "target", None) or f"/dev/{getattr(step, 'name', '')}"
        for step in ordered.steps
        if not isinstance(step, Symlink | ReadOnly)
    }
    hosts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    bound = [step.target for step in ordered.steps if isinstance(step, Bind)]
    below = {path for path in hosts if any(path.startswith(f"{top}/") for top in bound)}

    mounts, is_top, names = await see(warden, ordered)

    assert {target for target, _, _ in mounts} == planned | below
    assert is_top
    assert set(names) <= {*("bin", "sbin", "lib", "lib32", "lib64", "libx32", "usr", "nix"), "etc",
                          "dev", "proc", "machine"}  # fmt: skip
    for target, options, propagation in mounts:
        assert "nosuid" in options, target
        assert not propagation, target
        if target == "/machine":
            assert "nodev" in options
        else:
            assert "ro" in options, target
            assert ("nodev" in options) != target.startswith("/dev/"), target
    rooms = [options for target, options, _ in mounts if target == "/machine"]
    assert "rw" in rooms[-1]


@pytest.mark.parametrize(
    "step",
    [
        Tmpfs(target="/to-root", size_mib=1),
        Bind(source="/usr", target="/to-root"),
        Tmpfs(target="/dots/to-root", size_mib=1),
    ],
    ids=str,
)
async def test_nothing_is_laid_over_the_root_by_way_of_a_link(
    warden: Warden, step: Tmpfs | Bind
) -> None:
    steps = (
        *order(TRUE).steps[:-1],
        Symlink(target="/to-root", text="/"),
        Symlink(target="/dots", text="/usr/../.."),
        step,
    )

    with pytest.raises(OSError, match="old root"):
        await run(warden, order(TRUE, steps=steps))


@pytest.mark.parametrize(
    "text", ["/proc/self/root", "/proc/1/root", "/proc/self/fd/3", "/proc/self/cwd"]
)
async def test_no_link_of_proc_is_followed_out_of_a_view(warden: Warden, text: str) -> None:
    steps = (
        *order(TRUE).steps[:-1],
        Symlink(target="/way", text=text),
        Tmpfs(target="/way/tmp/found", size_mib=1),
    )

    with pytest.raises(OSError, match=r"\w") as caught:
        await run(warden, order(TRUE, steps=steps))

    assert caught.value.errno in {errno.ELOOP, errno.ENOENT, errno.ENOTDIR, errno.EACCES}


async def test_what_is_mounted_in_a_view_is_seen_nowhere_else(
    warden: Warden, scratch: Path
) -> None:
    (scratch / "folder").mkdir()
    scratch.chmod(0o755)
    before = Path("/proc/self/mountinfo").read_text()
    steps = (
        Bind(source="/", target="/"),
        Tmpfs(target=f"{scratch}/folder", size_mib=1),
    )
    script = f"open('{scratch}/folder/file', 'w').write('x'); print(1, flush=True); time.sleep(60)"
    with Streams() as streams:
        ordered = python(f"import time; {script}", steps=steps, room=None)
        async with warden.launch(ordered, streams.descriptors):
            assert await asyncio.to_thread(os.read, streams.out, 9) == b"1\n"
            assert list((scratch / "folder").iterdir()) == []
            assert Path("/proc/self/mountinfo").read_text() == before
    await until(lambda: Path("/proc/self/mountinfo").read_text() == before)


async def test_a_source_that_its_user_can_not_reach_is_not_reached_by_the_warden_either(
    warden: Warden, scratch: Path
) -> None:
    if warden.greeting.uid == os.getuid():
        pytest.skip("the user of VMMs is ourselves")
    (scratch / "private").mkdir(mode=0o700)
    (scratch / "private/folder").mkdir()
    steps = (*order(TRUE).steps[:-1], Bind(source=f"{scratch}/private/folder", target="/x"))

    with pytest.raises(PermissionError, match="private/folder"):
        await run(warden, order(TRUE, steps=steps))
