"""A settings file of a guest that we write to: in place, or over it where the root is read-only."""

from __future__ import annotations

import errno
from pathlib import PurePosixPath

from pytest_vmsandbox.guest.channel import Channel
from pytest_vmsandbox.guest.messages import ExecRequest

# No list of names that anybody wrote is as long; what a guest makes of its file is not to fill us.
MAX_BYTES = 1 << 20

_READ_BYTES = 64 * 1024

# The file in /run stays one and the same, so that what lies over the other changes with it.
_COVER = """
set -e
cat > "$1"
chmod 0644 "$1"
grep -qF "${1#/run} $2 " /proc/self/mountinfo || mount --bind "$1" "$2"
"""

_UNCOVER = """
umount "$2" && rm -f "$1"
"""

# What a link names, not the link.
_REMOVE = """
rm -f -- "$(readlink -f "$2")"
"""


async def read_settings(channel: Channel, path: str) -> str:
    """What stands in the file; nothing where there is none. OSError(EFBIG) beyond MAX_BYTES."""
    return await find_settings(channel, path) or ""


async def find_settings(channel: Channel, path: str) -> str | None:
    """The same, but None where there is no file."""
    try:
        data = await channel.read_file(path, limit=MAX_BYTES + 1)
    except FileNotFoundError:
        return None
    if len(data) > MAX_BYTES:
        raise OSError(errno.EFBIG, f"longer than {MAX_BYTES} bytes", path)
    return data.decode(errors="surrogateescape")


async def write_settings(channel: Channel, path: str, text: str) -> None:
    """Have `text` in the file, 0644, for whoever opens it by its name.

    Where its file system is read-only, a file of /run is mounted over the one that is there, as
    systemd does it for the machine-id (systemd-machine-id-commit.service(8)). OSError where neither
    can be; the file is as it was then.
    """
    data = text.encode(errors="surrogateescape")
    try:
        await channel.write_file(path, data, mode=0o644)
    except OSError as error:
        if error.errno != errno.EROFS or not await _cover(channel, path, data):
            raise


async def remove_settings(channel: Channel, path: str) -> None:
    """Have the file no more, or none of ours over it. OSError where that can't be."""
    if not await _run(channel, _REMOVE, path):
        raise OSError(errno.EIO, "it can't be removed", path)


async def uncover_settings(channel: Channel, path: str) -> bool:
    """Have the file's own content again where one of ours was mounted over it; whether it was.

    What anybody else has mounted there stays.
    """
    mounts = await channel.read_file("/proc/self/mountinfo", limit=MAX_BYTES)
    if not _is_covered(path, mounts.decode(errors="surrogateescape")):
        return False
    if not await _run(channel, _UNCOVER, path):
        raise OSError(errno.EBUSY, "what was mounted over it stays", path)
    return True


def _is_covered(path: str, mounts: str) -> bool:
    """Whether what is uppermost there is a file of ours (proc_pid_mountinfo(5))."""
    _, _, name = _cover_of(path).rpartition("/")
    mounted = (line.split(" ")[3:5] for line in mounts.splitlines())
    there = [words[0] for words in mounted if words[1:] == [path]]
    return bool(there) and there[-1].endswith(f"/{name}")


def _cover_of(path: str) -> str:
    return f"/run/vmsandbox-{PurePosixPath(path).name}"


async def _cover(channel: Channel, path: str, data: bytes) -> bool:
    return await _run(channel, _COVER, path, data)


async def _run(channel: Channel, script: str, path: str, data: bytes = b"") -> bool:
    """Whether that script went well."""
    argv = ["/bin/sh", "-c", script, "sh", _cover_of(path), path]
    process = await channel.spawn(ExecRequest(argv=argv, stdin=True, merge_stderr=True))
    assert process.stdin is not None  # it was asked for
    try:
        await process.stdin.write(data)
        await process.stdin.close()
    except BrokenPipeError:
        pass
    while await process.stdout.read(_READ_BYTES):
        pass
    return await process.wait() == 0
