"""The modules disk: a read-only ext4 file system made out of a directory, without privilege."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Final

from pytest_vmsandbox.deadline import Deadline
from pytest_vmsandbox.image.programs import Program

_BLOCK: Final = 4096
_INODE: Final = 256
# Any fixed value will do: with it, and fixed times, the same tree gives nearly the same bytes.
_UUID: Final = "6d6f6475-6c65-4d69-8e69-766d73616e64"


def make_modules_disk(tree: Path, out: Path, *, deadline: Deadline) -> None:
    """Write `out`, an ext4 file system with the content of `tree`, just large enough.

    It has no journal, since nothing ever writes to it. mke2fs -d reads the tree itself, so
    neither a mount nor root is needed; mke2fs(8).
    """
    blocks, inodes = 0, 0
    for path in sorted(tree.rglob("*")):
        status = path.lstat()
        blocks += max(1, math.ceil(status.st_size / _BLOCK))
        inodes += 1
        os.utime(path, (0, 0), follow_symlinks=False)
    inodes += 64
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
    )
