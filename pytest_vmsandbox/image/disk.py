"""The modules disk: a read-only ext4 file system made out of a directory, without privilege."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from pytest_vmsandbox.deadline import Deadline
from pytest_vmsandbox.image.programs import Program

_BLOCK: Final = 4096
_INODE: Final = 256
_ROOT_INODE: Final = 2
_FIRST_FREE_INODE: Final = 11
_UUID: Final = "6d6f6475-6c65-4d69-8e69-766d73616e64"
# 0 would mean "now" to e2fsprogs, and a deletion time of 0 means "never deleted".
_MADE_AT: Final = {"E2FSPROGS_FAKE_TIME": "1"}


def make_modules_disk(tree: Path, out: Path, *, deadline: Deadline) -> None:
    """Write `out`, an ext4 file system with the content of `tree`, just large enough.

    Everything in it belongs to root and has no age, whoever makes it and when. It has no
    journal, since nothing ever writes to it. mke2fs -d reads the tree itself, so neither a mount
    nor root is needed; mke2fs(8). The time stamps in `tree` are set to 0.
    """
    paths = sorted(tree.rglob("*"))
    blocks = sum(max(1, math.ceil(path.lstat().st_size / _BLOCK)) for path in paths)
    for path in paths:
        os.utime(path, (0, 0), follow_symlinks=False)
    inodes = len(paths) + 64
    # Room for the groups' bitmaps and tables, and for extent trees: 2 % and half a MiB.
    blocks += math.ceil(inodes * _INODE / _BLOCK) + blocks // 50 + 128
    Program.find("mke2fs").run(
        [
            *("-q", "-F", "-t", "ext4", "-b", str(_BLOCK), "-I", str(_INODE), "-N", str(inodes)),
            *("-m", "0", "-O", "^has_journal,^resize_inode,^metadata_csum,^64bit"),
            *("-E", f"root_owner=0:0,hash_seed={_UUID},lazy_itable_init=1,nodiscard"),
            *("-U", _UUID, "-L", "modules", "-d", tree, out, str(blocks)),
        ],
        deadline=deadline,
        environment=_MADE_AT,
    )
    commands = out.with_suffix(".debugfs")
    commands.write_text("\n".join(_normalise(len(paths))), encoding="ascii")
    Program.find("debugfs").run(
        ["-w", "-f", commands, out], deadline=deadline, environment=_MADE_AT
    )
    commands.unlink()


def _normalise(count: int) -> Iterator[str]:
    # mke2fs -d copies owners and times, and a ctime can't be set on a file: debugfs(8) sets all
    # of it in the image, in a hundredth of a second.
    for inode in (_ROOT_INODE, *range(_FIRST_FREE_INODE, _FIRST_FREE_INODE + count + 1)):
        for name in ("uid", "gid", "atime", "ctime", "mtime", "crtime"):
            yield f"sif <{inode}> {name} 0"
        for name in ("atime_extra", "ctime_extra", "mtime_extra", "crtime_extra"):
            yield f"sif <{inode}> {name} 0"
