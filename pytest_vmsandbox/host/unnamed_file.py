"""An unnamed file: what a program of the host is given to read, and nobody can leave behind."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

# What a program calls its stdin, where it takes a path.
STDIN = Path("/dev/stdin")


@contextmanager
def open_unnamed_file(content: bytes = b"", *, within: Path | None = None) -> Iterator[IO[bytes]]:
    """A file with that content, to be read from its beginning; gone when nobody has it open.

    In memory where `within` names no directory whose file system it is to be on; OSError where
    none can be made there.
    """
    with _made(within) as file:
        file.write(content)
        file.seek(0)
        yield file


def path_in_child(file: IO[bytes]) -> Path:
    """What a child that inherits the file may call it; opened so, it begins at its beginning."""
    return Path(f"/proc/self/fd/{file.fileno()}")


def _made(within: Path | None) -> IO[bytes]:
    if within is None and hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("vmsandbox"), "w+b", buffering=0)
    return TemporaryFile(buffering=0, dir=within)
