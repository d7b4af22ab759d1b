"""The file system that the kernel unpacks into memory: only what booting needs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Final

from pytest_vmsandbox.image import cpio

_DIRECTORIES: Final = (
    *("bin", "dev", "etc", "etc/vmsandbox", "home", "lib", "lib/modules", "media", "mnt", "opt"),
    *("proc", "run", "sbin", "srv", "sys", "usr", "usr/bin", "usr/lib", "usr/sbin", "usr/share"),
    *("var", "var/cache", "var/lib", "var/log", "var/spool"),
)
_FILES: Final = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\n"
    "nobody:x:65534:65534:nobody:/nonexistent:/bin/false\n",
    "etc/group": "root:x:0:\nnogroup:x:65534:\n",
    "etc/hosts": "127.0.0.1 localhost\n::1 localhost\n",
    # Empty, as machine-id(5) asks of images that are used more than once; the agent fills it.
    "etc/machine-id": "",
    "etc/os-release": 'ID=vmsandbox-mini\nNAME="vmsandbox mini"\nPRETTY_NAME="vmsandbox mini"\n',
    "etc/profile": "export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\n",
    "etc/shells": "/bin/sh\n",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RootFiles:
    """What goes into the root file system, beside what is the same in every image.

    `applets` are the full paths, without the first slash, under which busybox is called.
    """

    agent: bytes
    busybox: bytes
    applets: Sequence[str]


def plan_entries(wanted: RootFiles) -> Iterator[cpio.Entry]:
    """The archive's entries, parents first. The agent is /init."""
    # The kernel's own root directory is open to all, as /tmp is.
    yield cpio.directory(".")
    yield from (cpio.directory(name) for name in _DIRECTORIES)
    yield cpio.directory("root", permissions=0o700)
    yield cpio.directory("tmp", permissions=0o1777)
    yield cpio.directory("var/tmp", permissions=0o1777)
    yield cpio.symlink("var/run", target="/run")
    # The kernel opens /dev/console for init before anything is mounted on /dev.
    yield cpio.character_device("dev/console", major=5, minor=1)
    yield cpio.character_device("dev/null", major=1, minor=3, permissions=0o666)
    yield from (cpio.file(name, text.encode()) for name, text in _FILES.items())
    yield cpio.file("init", wanted.agent, permissions=0o755)
    yield cpio.file("bin/busybox", wanted.busybox, permissions=0o755)
    # Links that are there need no `busybox --install` in the guest, which costs time.
    for applet in sorted(set(wanted.applets) - {"bin/busybox", "init"}):
        if str(PurePosixPath(applet).parent) in _DIRECTORIES:
            yield cpio.symlink(applet, target="/bin/busybox")
