"""cpio archives, read back by another program."""

from __future__ import annotations

import io
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_vmsandbox.image import cpio

ENTRIES = (
    cpio.directory("etc"),
    cpio.directory("tmp", permissions=0o1777),
    cpio.file("etc/motd", b"hello\n"),
    cpio.file("etc/empty", b""),
    cpio.symlink("sh", target="/bin/busybox"),
    cpio.character_device("console", major=5, minor=1),
)


def archive(*entries: cpio.Entry) -> bytes:
    out = io.BytesIO()
    cpio.write_archive(entries, out)
    return out.getvalue()


def test_another_cpio_lists_what_was_written(busybox: Path) -> None:
    listed = subprocess.run(
        [busybox, "cpio", "-itv"],
        input=archive(*ENTRIES),
        stdout=subprocess.PIPE,
        check=True,
        timeout=20,
        env={"TZ": "UTC"},
    ).stdout.decode()

    lines = [line.split() for line in listed.splitlines()]
    assert [line[0] for line in lines] == [
        *("drwxr-xr-x", "drwxrwxrwt", "-rw-r--r--", "-rw-r--r--", "lrwxrwxrwx", "crw-------"),
    ]
    assert {line[1] for line in lines} == {"0/0"}
    assert lines[4][-3:] == ["sh", "->", "/bin/busybox"]


@given(content=st.binary(max_size=300), name=st.from_regex(r"[a-z]{1,20}", fullmatch=True))
def test_another_cpio_gives_back_the_same_bytes(busybox: Path, content: bytes, name: str) -> None:
    whole = archive(cpio.file(name, content), cpio.file("behind-it", b"end"))

    given_back = subprocess.run(
        [busybox, "cpio", "-i", "--to-stdout"],
        input=whole,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        check=True,
        timeout=20,
    ).stdout

    assert given_back == content + b"end"
    assert len(whole) % 4 == 0


@pytest.mark.parametrize(
    ("entries", "complaint"),
    [
        ([cpio.file("etc/motd", b"")], "before its parent"),
        ([cpio.file("a", b""), cpio.directory("a")], "already"),
        ([cpio.file("/a", b"")], "relative"),
        ([cpio.file("../a", b"")], "relative"),
        ([cpio.file("a//b", b"")], "relative"),
        ([cpio.file("a\0b", b"")], "relative"),
        ([cpio.file("TRAILER!!!", b"")], "already"),
    ],
)
def test_an_archive_that_the_kernel_would_misread_is_refused(
    entries: list[cpio.Entry], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        archive(*entries)
