# The real thing is looked at with plain calls: a test's loop has nothing else to do meanwhile.
from __future__ import annotations

import asyncio
import hashlib
import itertools
import os
import random
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from pytest_vmsandbox.deadline import Deadline
from pytest_vmsandbox.guest.channel import Channel
from pytest_vmsandbox.guest.messages import ExecRequest

pytestmark = pytest.mark.asyncio

Facts = dict[str, tuple[object, ...]]


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that an ordinary user's agent can reach and write to; beside it is the host's."""
    # Not below tmp_path: each pytest that root starts closes its base directory to others again.
    folder = Path(tempfile.mkdtemp(prefix="vmsandbox-place-"))
    folder.chmod(0o711)
    inside = folder / "guest"
    inside.mkdir()
    inside.chmod(0o777)
    yield inside
    shutil.rmtree(folder)


def facts_of(root: Path) -> Facts:
    """What a copy must keep: kind, mode, time, and a file's digest or a link's target."""
    facts: Facts = {}
    for path in [root, *root.rglob("*")]:
        seen = path.lstat()
        name = str(path.relative_to(root))
        if path.is_symlink():
            facts[name] = ("link", os.readlink(path), seen.st_mtime_ns)  # noqa: PTH115 - bytes-exact
        elif path.is_dir():
            facts[name] = ("dir", stat.S_IMODE(seen.st_mode), seen.st_mtime_ns)
        else:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            facts[name] = ("file", stat.S_IMODE(seen.st_mode), seen.st_mtime_ns, digest)
    return facts


def plant_tree(root: Path, *, files: int) -> None:
    chance = random.Random(4)
    folders = [root]
    root.mkdir()
    for number in range(files):
        if number % 20 == 0:
            folders.append(chance.choice(folders) / f"d{number} ü")
            folders[-1].mkdir()
        file = chance.choice(folders) / f"f{number}"
        file.write_bytes(chance.randbytes(chance.choice([0, 1, 10, 3000, 70_000])))
        file.chmod(chance.choice([0o600, 0o644, 0o755, 0o444]))
        os.utime(file, ns=(0, 1_500_000_000_123_456_789 + number))
        if number % 10 == 0:
            (chance.choice(folders) / f"l{number}").symlink_to(chance.choice(["/etc", "gone", "."]))
    os.utime(root, ns=(0, 1_000_000_000_000_000_001))


async def test_what_was_written_is_read_back(channel: Channel, place: Path) -> None:
    for size in (0, 1, 65536, 1_000_001):
        data = os.urandom(size)
        await channel.write_file(str(place / "file"), data)

        assert await channel.read_file(str(place / "file")) == data


async def test_a_part_of_a_file_can_be_read(channel: Channel, place: Path) -> None:
    (place / "file").write_bytes(b"0123456789")
    path = str(place / "file")

    assert await channel.read_file(path, offset=3, limit=4) == b"3456"
    assert await channel.read_file(path, offset=8) == b"89"
    assert await channel.read_file(path, offset=99) == b""
    assert await channel.read_file(path, limit=0) == b""
    assert len(await channel.read_file("/dev/zero", limit=3_000_000)) == 3_000_000
    assert b"Name:" in await channel.read_file("/proc/self/status")


async def test_a_new_file_has_the_mode_asked_for_and_an_old_one_keeps_its_own(
    channel: Channel, place: Path
) -> None:
    await channel.write_file(str(place / "new"), b"")
    await channel.write_file(str(place / "script"), b"", mode=0o750)
    await channel.write_file(str(place / "script"), b"#!/bin/sh\n")
    modes = [stat.S_IMODE((place / name).stat().st_mode) for name in ("new", "script")]

    assert modes == [0o644, 0o750]


async def test_a_file_gets_the_owner_asked_for(root_channel: Channel, place: Path) -> None:
    path = place / "file"
    await root_channel.write_file(str(path), b"", owner="nobody:1234")
    assert (path.stat().st_uid, path.stat().st_gid) == (65534, 1234)
    await root_channel.write_file(str(path), b"again")
    assert (path.stat().st_uid, path.stat().st_gid) == (65534, 1234)
    with pytest.raises(ProcessLookupError):
        await root_channel.write_file(str(path), b"lost", owner="no-such-user")

    assert path.read_bytes() == b"again"
    assert list(place.iterdir()) == [path]


async def test_writing_follows_a_link_and_replaces_what_it_points_to(
    channel: Channel, place: Path
) -> None:
    (place / "real").write_bytes(b"old")
    (place / "link").symlink_to("real")
    await channel.write_file(str(place / "link"), b"new")

    assert (place / "link").is_symlink()
    assert (place / "real").read_bytes() == b"new"


async def test_a_device_is_written_to_not_replaced(channel: Channel) -> None:
    await channel.write_file("/dev/null", b"x" * 2_000_000)

    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)


async def test_a_file_of_proc_is_written_to(root_channel: Channel) -> None:
    before = Path("/proc/self/oom_score_adj").read_bytes()
    script = "echo $$; read x; cat /proc/$$/oom_score_adj"
    process = await root_channel.spawn(ExecRequest(argv=["sh", "-c", script], stdin=True))
    pid = int(await process.stdout.readline())
    await root_channel.write_file(f"/proc/{pid}/oom_score_adj", b"321\n")
    assert process.stdin is not None
    await process.stdin.write(b"\n")

    assert await process.stdout.read() == b"321\n"
    assert Path("/proc/self/oom_score_adj").read_bytes() == before
    with pytest.raises(OSError, match="Invalid argument"):
        await root_channel.write_file("/proc/self/oom_score_adj", b"nonsense\n")


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("/no/such/file", FileNotFoundError),
        ("/etc", IsADirectoryError),
        ("/etc/passwd/x", NotADirectoryError),
        ("/" + "x" * 300, OSError),
    ],
)
async def test_errors_are_those_of_the_guests_kernel(
    channel: Channel, path: str, error: type[OSError]
) -> None:
    with pytest.raises(error):
        await channel.read_file(path)
    with pytest.raises(error):
        await channel.write_file(path, b"x" * 1_000_000)


@pytest_asyncio.fixture
async def small_disk(
    start_agent: Callable[..., socket.socket],
    reach: Callable[[socket.socket], Awaitable[Channel]],
    place: Path,
) -> AsyncIterator[Channel]:
    """An agent whose `place` is a file system of 256 KiB, in a mount namespace of its own."""
    if os.getuid() != 0:
        pytest.skip("mounting needs root")
    channel = await reach(start_agent(before=("unshare", "--mount")))
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "small", str(place)]
    assert await (await channel.spawn(ExecRequest(argv=mount))).wait() == 0
    yield channel


async def test_a_full_disk_is_reported_and_leaves_nothing_half_made(
    small_disk: Channel, place: Path
) -> None:
    path = str(place / "file")
    await small_disk.write_file(path, b"old")
    with pytest.raises(OSError, match="No space left"):
        await small_disk.write_file(path, bytes(1_000_000))
    source = place.parent / "source"
    plant_tree(source, files=60)
    with pytest.raises(OSError, match="No space left"):
        await small_disk.push(source, str(place / "tree"))
    listing = await small_disk.spawn(ExecRequest(argv=["ls", "-A", str(place)]))

    assert await listing.stdout.read() == b"file\n"
    assert await small_disk.read_file(path) == b"old"


async def test_a_cancelled_write_leaves_what_was_there(channel: Channel, place: Path) -> None:
    path = place / "file"
    path.write_bytes(b"old")
    path.chmod(0o666)
    for rounds in range(30):
        task = asyncio.create_task(channel.write_file(str(path), bytes(5_000_000)))
        for _ in range(rounds):
            await asyncio.sleep(0.0005)
        if not task.done():
            task.cancel()
        await asyncio.wait([task])
    while channel._jobs:
        await asyncio.sleep(0.01)

    assert list(place.iterdir()) == [path]
    assert path.read_bytes() in {b"old", bytes(5_000_000)}
    await channel.ping(deadline=Deadline.after(seconds=20))


async def test_a_tree_of_two_thousand_files_goes_there_and_back_equal(
    channel: Channel, place: Path
) -> None:
    source = place.parent / "source"
    plant_tree(source, files=2000)
    await channel.push(source, str(place / "there"))
    await channel.pull(str(place / "there"), place.parent / "back")

    assert facts_of(place / "there") == facts_of(source)
    assert facts_of(place.parent / "back") == facts_of(source)


async def test_64_megabytes_go_there_and_back_equal(channel: Channel, place: Path) -> None:
    source = place.parent / "source"
    source.write_bytes(os.urandom(1 << 20) * 64)
    began = time.perf_counter()
    await channel.push(source, str(place / "there"))
    pushed = time.perf_counter()
    await channel.pull(str(place / "there"), place.parent / "back")
    pulled = time.perf_counter()
    print(f"push {64 / (pushed - began):.0f} MiB/s, pull {64 / (pulled - pushed):.0f} MiB/s")  # noqa: T201 - shown with -s

    assert facts_of(place.parent / "back") == facts_of(source)


# Around what is sent in one frame, and around half of that, above which nothing is put together.
LENGTHS = (0, 1, 32_763, 32_764, 32_765, 33_265, 65_500, 65_508, 65_531, 65_532, 65_533, 98_301)


@pytest.mark.parametrize("length", LENGTHS)
async def test_a_file_of_any_length_goes_there_and_back_equal(
    channel: Channel, place: Path, length: int
) -> None:
    source = place.parent / "source"
    source.write_bytes(random.Random(length).randbytes(length))

    await channel.push(source, str(place / "there"))
    await channel.pull(str(place / "there"), place.parent / "back")

    assert facts_of(place / "there") == facts_of(source)
    assert facts_of(place.parent / "back") == facts_of(source)


async def test_files_of_such_lengths_do_not_run_into_each_other_in_a_tree(
    channel: Channel, place: Path
) -> None:
    source = place.parent / "source"
    source.mkdir()
    for number, (first, second) in enumerate(itertools.product(LENGTHS, repeat=2)):
        (source / f"{number:03}-a").write_bytes(random.Random(number).randbytes(first))
        (source / f"{number:03}-b").write_bytes(random.Random(-number).randbytes(second))

    await channel.push(source, str(place / "there"))

    assert facts_of(place / "there") == facts_of(source)


async def test_a_pushed_file_replaces_one_that_was_there(channel: Channel, place: Path) -> None:
    source = place.parent / "source"
    source.write_bytes(b"new")
    source.chmod(0o4711)
    (place / "target").write_bytes(b"old")
    await channel.push(source, str(place / "target"))

    assert facts_of(place / "target") == facts_of(source)
    assert list(place.iterdir()) == [place / "target"]


async def test_a_pushed_tree_is_merged_into_a_directory_that_is_there(
    channel: Channel, place: Path
) -> None:
    source = place.parent / "source"
    (source / "both").mkdir(parents=True)
    (source / "both" / "new").write_text("new")
    (source / "replaced").write_text("new")
    await channel.push(source, str(place / "target"))
    (source / "replaced").write_text("newer")
    (source / "both" / "added").write_text("added")
    (source / "both" / "new").unlink()
    await channel.push(source, str(place / "target"))
    await channel.pull(str(place / "target"), place.parent / "back")
    await channel.pull(str(place / "target"), place.parent / "back")

    for copy in (place / "target", place.parent / "back"):
        texts = {str(p.relative_to(copy)): p.read_text() for p in copy.rglob("*") if p.is_file()}
        assert texts == {"both/new": "new", "both/added": "added", "replaced": "newer"}


async def test_push_and_pull_say_what_stands_in_the_way(channel: Channel, place: Path) -> None:
    file, folder = place.parent / "file", place.parent / "folder"
    file.write_text("x")
    folder.mkdir()
    (place / "folder").mkdir()
    (place / "file").write_text("x")
    with pytest.raises(FileNotFoundError):
        await channel.push(file, str(place / "no" / "such"))
    with pytest.raises(FileNotFoundError):
        await channel.push(place.parent / "gone", str(place / "x"))
    with pytest.raises(IsADirectoryError):
        await channel.push(file, str(place / "folder"))
    with pytest.raises(NotADirectoryError):
        await channel.push(folder, str(place / "file"))
    with pytest.raises(FileNotFoundError):
        await channel.pull(str(place / "gone"), place.parent / "x")
    with pytest.raises(FileNotFoundError):
        await channel.pull(str(place / "file"), place.parent / "no" / "such")
    with pytest.raises(IsADirectoryError):
        await channel.pull(str(place / "file"), folder)
    with pytest.raises(OSError, match="/dev/null"):
        await channel.pull("/dev/null", place.parent / "x")
    os.mkfifo(folder / "fifo")
    with pytest.raises(OSError, match="not a file"):
        await channel.push(folder, str(place / "y"))
    while channel._jobs:
        await asyncio.sleep(0.01)

    assert sorted(place.iterdir()) == [place / "file", place / "folder"]
    assert sorted(place.parent.iterdir()) == [file, folder, place]


async def test_what_the_guest_may_not_read_fails_the_pull_and_leaves_nothing(
    channel: Channel, place: Path
) -> None:
    shadow = await channel.spawn(ExecRequest(argv=["cat", "/etc/shadow"]))
    if (await shadow.communicate())[0]:
        pytest.skip("this agent may read everything")
    with pytest.raises(PermissionError):
        await channel.pull("/etc/shadow", place.parent / "back")

    assert not (place.parent / "back").exists()


async def test_a_cancelled_pull_leaves_nothing(channel: Channel, place: Path) -> None:
    (place / "file").write_bytes(bytes(30_000_000))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.005):
            await channel.pull(str(place / "file"), place.parent / "back")
    await channel.ping(deadline=Deadline.after(seconds=20))

    assert sorted(place.parent.iterdir()) == [place]


async def test_names_with_strange_bytes_are_kept(channel: Channel, place: Path) -> None:
    source = place.parent / "source"
    source.mkdir()
    name = os.fsdecode(b"\xff new\nline ")
    (source / name).write_text("x")
    await channel.push(source, str(place / name))

    assert (place / name / name).read_text() == "x"
    assert await channel.read_file(str(place / name / name)) == b"x"


async def test_a_hung_file_system_holds_up_nothing_else(channel: Channel, place: Path) -> None:
    os.mkfifo(place / "fifo")
    (place / "fifo").chmod(0o666)
    reading = asyncio.create_task(channel.read_file(str(place / "fifo")))  # open(2) waits
    for _ in range(20):
        await channel.ping(deadline=Deadline.after(seconds=20))
    assert not reading.done()
    (place / "fifo").write_bytes(b"at last")

    assert await reading == b"at last"


async def test_sync_returns(channel: Channel) -> None:
    await channel.sync()
