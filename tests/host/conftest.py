"""What the tests of this room share: stub programs, file systems to try."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.children import remember_children
from tests.people import run

# Programs that are not what they seem


@dataclass(frozen=True, slots=True, kw_only=True)
class Stubs:
    """A folder of stub programs, which stands first in PATH; each call of a stub is recorded."""

    directory: Path

    def put(self, name: str, body: str = "exit 0") -> Path:
        """A shell script; it gets no further than `body` says."""
        return self.put_raw(
            name,
            f"#!/bin/sh\n{{ printf '%s\\037' \"$@\"; echo; }} >> {self._calls(name)}\n{body}\n",
        )

    def put_raw(self, name: str, text: str) -> Path:
        program = self.directory / name
        program.write_text(text)
        program.chmod(0o755)
        return program

    def calls(self, name: str) -> list[list[str]]:
        """The arguments of each call so far."""
        calls = self._calls(name)
        if not calls.exists():
            return []
        return [line.split("\037")[:-1] for line in calls.read_text().splitlines()]

    def _calls(self, name: str) -> Path:
        return self.directory / f"{name}.calls"


@pytest.fixture
def stubs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stubs:
    """Stub programs in front of the host's own."""
    directory = tmp_path / "stubs"
    directory.mkdir()
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
    return Stubs(directory=directory)


@pytest.fixture
def only_stubs(stubs: Stubs, monkeypatch: pytest.MonkeyPatch) -> Stubs:
    """Stub programs, and no others to be found in PATH."""
    monkeypatch.setenv("PATH", str(stubs.directory))
    return stubs


# Folders and file systems


def require_root_to_mount() -> None:
    if os.getuid() != 0:
        pytest.skip("takes root: it mounts a file system")


@contextmanager
def mounted(target: Path, *arguments: str | Path) -> Iterator[Path]:
    """Mount something on `target`, which is made; skip the test where mount(8) refuses."""
    require_root_to_mount()
    target.mkdir()
    done = subprocess.run(
        ["mount", *arguments, target], capture_output=True, text=True, timeout=60, check=False
    )
    if done.returncode != 0:
        pytest.skip(f"mount {arguments}: {done.stderr.strip()}")
    try:
        yield target
    finally:
        run("umount", "--", target)
        target.rmdir()


@pytest.fixture
def tmpfs(scratch: Path) -> Iterator[Path]:
    with mounted(scratch / "tmpfs", "-t", "tmpfs", "-o", "size=1m", "none") as root:
        yield root


@pytest.fixture
def ext4(scratch: Path) -> Iterator[Path]:
    require_root_to_mount()
    disk = scratch / "ext4.img"
    with disk.open("wb") as file:
        file.truncate(4 << 20)
    run("mkfs.ext4", "-q", "-F", disk)
    with mounted(scratch / "ext4", "-o", "loop", disk) as root:
        yield root


@pytest.fixture
def without_acls(scratch: Path) -> Iterator[Path]:
    """A file system that takes no ACLs, however well setfacl runs."""
    with mounted(scratch / "ramfs", "-t", "ramfs", "none") as root:
        yield root


# What must not be left behind


@pytest.fixture(autouse=True)
def _children_before() -> None:
    remember_children()
