"""Opening within bounds, against real links, mounts and renames."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pytest_vmsandbox.linux import AT_FDCWD, ResolveFlags, openat2

OUT_OF_BOUNDS = (errno.EXDEV, errno.ELOOP)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A tree with ways out of it; `secret` lies outside, `inside/secret` within."""
    (tmp_path / "secret").write_text("outside")
    root = tmp_path / "root"
    (root / "inside").mkdir(parents=True)
    (root / "secret").write_text("inside")
    (root / "up").symlink_to("../secret")
    (root / "absolute").symlink_to(tmp_path / "secret")
    (root / "rooted").symlink_to("/secret")
    (root / "inside/link").symlink_to("../secret")
    return root


def read(at: int, path: str, resolve: int) -> str:
    with openat2(at, path, os.O_RDONLY, resolve=resolve) as fd:
        return os.read(fd, 99).decode()


def open_directory(path: Path) -> int:
    return os.open(path, os.O_PATH | os.O_DIRECTORY)


def test_a_descriptor_is_owned_and_not_inherited(root: Path) -> None:
    with openat2(AT_FDCWD, root / "secret", os.O_RDONLY) as fd:
        assert not os.get_inheritable(fd)
        assert os.read(fd, 99) == b"inside"

    assert fd.closed


@pytest.mark.parametrize("path", ["up", "absolute", "rooted", "../secret", "/secret", "inside/.."])
def test_beneath_a_directory_nothing_leads_out(root: Path, path: str) -> None:
    at = open_directory(root)
    try:
        if path == "inside/..":  # goes up, and not out
            openat2(at, path, os.O_PATH, resolve=ResolveFlags.BENEATH).close()
            return
        with pytest.raises(OSError, match="openat2: ") as caught:
            openat2(at, path, os.O_RDONLY, resolve=ResolveFlags.BENEATH)
    finally:
        os.close(at)

    assert caught.value.errno == errno.EXDEV
    assert str(caught.value.filename).endswith(path)


@pytest.mark.parametrize("path", ["up", "rooted", "../../../secret", "/secret", "inside/link"])
def test_in_a_root_every_way_stays_in_it(root: Path, path: str) -> None:
    at = open_directory(root)
    try:
        assert read(at, path, ResolveFlags.IN_ROOT) == "inside"
    finally:
        os.close(at)


@pytest.mark.parametrize("path", ["up", "inside/link"])
def test_without_symlinks_one_anywhere_is_refused(root: Path, path: str) -> None:
    with pytest.raises(OSError, match="openat2: ") as caught:
        openat2(AT_FDCWD, root / path, os.O_RDONLY, resolve=ResolveFlags.NO_SYMLINKS)

    assert caught.value.errno == errno.ELOOP


def test_magic_links_and_other_file_systems_are_refused_where_asked(root: Path) -> None:
    for path, resolve, expected in (
        ("/proc/self/root", ResolveFlags.NO_MAGICLINKS, errno.ELOOP),
        ("/proc/version", ResolveFlags.NO_XDEV, errno.EXDEV),
    ):
        openat2(AT_FDCWD, path, os.O_RDONLY).close()
        with pytest.raises(OSError, match="openat2: ") as caught:
            openat2(AT_FDCWD, path, os.O_RDONLY, resolve=resolve)
        assert caught.value.errno == expected


def test_a_mode_goes_with_a_new_file_only(root: Path) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    openat2(AT_FDCWD, root / "new", flags, mode=0o400).close()

    assert (root / "new").stat().st_mode & 0o7777 == 0o400
    with pytest.raises(OSError, match="openat2: Invalid argument"):
        openat2(AT_FDCWD, root / "new", os.O_RDONLY, mode=0o400)


def test_what_is_not_cached_is_an_answer_and_not_tried_again(root: Path) -> None:
    flags = os.O_WRONLY | os.O_CREAT

    with pytest.raises(BlockingIOError, match="openat2: "):
        openat2(AT_FDCWD, root / "new", flags, mode=0o600, resolve=ResolveFlags.CACHED)
    assert not (root / "new").exists()


RENAMING = """
import os, sys
print(flush=True)
while True:
    os.rename("one", "two")
    os.rename("two", "one")
"""


def test_a_rename_under_way_does_not_show(root: Path) -> None:
    (root / "one").touch()
    at = open_directory(root)
    way = "/".join(["inside", ".."] * 5 + ["secret"])
    with subprocess.Popen(
        [sys.executable, "-c", RENAMING], cwd=root, stdout=subprocess.PIPE
    ) as renaming:
        try:
            assert renaming.stdout is not None
            renaming.stdout.readline()
            for _round in range(2000):
                assert read(at, way, ResolveFlags.IN_ROOT) == "inside"
        finally:
            renaming.kill()
            os.close(at)


@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("openat2: flags", lambda bits: openat2(AT_FDCWD, "/no such place", bits)),
        ("openat2: resolve", lambda bits: openat2(AT_FDCWD, "/no such place", 0, resolve=bits)),
    ],
)
@pytest.mark.parametrize("bits", [-1, 1 << 31, 1 << 32, 1 << 63, 1 << 64])
def test_unknown_flags_are_refused(argument: str, call: object, bits: int) -> None:
    assert callable(call)
    with pytest.raises(ValueError, match=f"^{argument}: "):
        call(bits)


def test_a_nul_and_bad_numbers_are_refused(root: Path) -> None:
    with pytest.raises(ValueError, match="NUL"):
        openat2(AT_FDCWD, f"{root}/secret\0/x", os.O_RDONLY)
    for mode in (-1, 0o10000, 1 << 64):
        with pytest.raises(ValueError, match=r"^openat2: mode: "):
            openat2(AT_FDCWD, root / "new", os.O_CREAT | os.O_WRONLY, mode=mode)
    with pytest.raises(ValueError, match=r"^fd: "):
        openat2(1 << 32, "secret", os.O_RDONLY)
    assert not (root / "new").exists()
