from __future__ import annotations

import hashlib
import os
import tempfile
import threading
from pathlib import Path

import pytest

from pytest_vmsandbox.jail.off_loop import GivenUp
from pytest_vmsandbox.machine.sparse import clone, copy_sparse

MIB = 1 << 20


def _sparse(path: Path, *, size: int, written: dict[int, bytes]) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
        for offset, content in written.items():
            file.seek(offset)
            file.write(content)
    return path


def _copy(source: Path, target: Path) -> str:
    with source.open("rb") as old, target.open("w+b") as new:
        new.truncate(source.stat().st_size)
        return copy_sparse(old.fileno(), new.fileno())


@pytest.mark.parametrize(
    ("size", "written"),
    [
        (0, {}),
        (5 * MIB, {}),
        (5 * MIB + 7, {0: b"first", 3 * MIB - 2: b"over an edge", 5 * MIB + 6: b"!"}),
        (2 * MIB, {0: bytes(2 * MIB)}),
        (64 << 30, {63 << 30: b"far out"}),
    ],
)
def test_a_copy_has_the_same_content_and_holes(
    tmp_path: Path, size: int, written: dict[int, bytes]
) -> None:
    source = _sparse(tmp_path / "source", size=size, written=written)

    _copy(source, tmp_path / "copy")
    with source.open("rb") as old, (tmp_path / "clone").open("w+b") as new:
        clone(old.fileno(), new.fileno())

    for copy in (tmp_path / "copy", tmp_path / "clone"):
        assert copy.stat().st_size == size
        assert copy.stat().st_blocks <= source.stat().st_blocks + 2 * MIB // 512 * len(written)
        with copy.open("rb") as file:
            for offset, content in written.items():
                file.seek(offset)
                assert file.read(len(content)) == content
    if size <= 5 * MIB + 7:
        assert (tmp_path / "copy").read_bytes() == source.read_bytes()


def test_a_few_bytes_of_each_mebibyte_take_a_few_pages_of_a_copy(tmp_path: Path) -> None:
    """Taken as whole mebibytes they would be 256 times as much."""
    written = {at * MIB: b"x" * 4096 for at in range(64)}
    source = _sparse(tmp_path / "source", size=64 * MIB, written=written)
    held = source.stat().st_blocks

    _copy(source, tmp_path / "copy")
    with source.open("rb") as old, (tmp_path / "clone").open("w+b") as new:
        clone(old.fileno(), new.fileno())
    with source.open("rb") as old, tempfile.TemporaryFile(dir="/dev/shm") as elsewhere:
        clone(old.fileno(), elsewhere.fileno())
        taken = [os.fstat(elsewhere.fileno()).st_blocks]
        assert os.pread(elsewhere.fileno(), 64 * MIB, 0) == source.read_bytes()

    taken += [(tmp_path / name).stat().st_blocks for name in ("copy", "clone")]
    assert max(taken) <= 2 * held
    for name in ("copy", "clone"):
        assert (tmp_path / name).read_bytes() == source.read_bytes()


def test_a_copy_that_nobody_wants_any_more_is_given_up(tmp_path: Path) -> None:
    source = _sparse(tmp_path / "source", size=MIB, written={0: b"x" * MIB})
    stop = threading.Event()
    stop.set()

    # Elsewhere, so that it is not done at once by sharing blocks.
    with (
        source.open("rb") as old,
        tempfile.TemporaryFile(dir="/dev/shm") as new,
        pytest.raises(GivenUp),
    ):
        clone(old.fileno(), new.fileno(), stop=stop)


def test_the_digest_is_that_of_places_and_bytes_wherever_zeros_are_kept(tmp_path: Path) -> None:
    holes = _sparse(tmp_path / "holes", size=3 * MIB, written={MIB: b"x"})
    zeros = _sparse(tmp_path / "zeros", size=3 * MIB, written={0: bytes(3 * MIB), MIB: b"x"})
    moved = _sparse(tmp_path / "moved", size=3 * MIB, written={2 * MIB: b"x"})
    part = MIB.to_bytes(8) + b"x".ljust(MIB, b"\0")

    assert _copy(holes, tmp_path / "1") == hashlib.sha256(part).hexdigest()
    assert _copy(zeros, tmp_path / "2") == hashlib.sha256(part).hexdigest()
    assert _copy(moved, tmp_path / "3") != hashlib.sha256(part).hexdigest()
