from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from pytest_vmsandbox.vmm.qcow2 import Qcow2Header, read_header, write_empty

needs_qemu_img = pytest.mark.skipif(not shutil.which("qemu-img"), reason="qemu-img is not here")


def _qemu_img(*words: str | Path) -> str:
    done = subprocess.run(
        ["qemu-img", *words], check=True, capture_output=True, text=True, timeout=60
    )
    return done.stdout


def _header(path: Path) -> Qcow2Header | None:
    with path.open("rb") as file:
        return read_header(file.fileno())


def _write(path: Path, size: int) -> Path:
    with path.open("w+b") as file:
        write_empty(file.fileno(), size=size)
    return path


@needs_qemu_img
@pytest.mark.parametrize("size", [512, 1 << 20, (512 << 20) + 512, 1 << 40, 8 << 40])
def test_qemu_finds_nothing_wrong_with_an_empty_image(tmp_path: Path, size: int) -> None:
    path = _write(tmp_path / "empty", size)

    assert "No errors were found" in _qemu_img("check", "-f", "qcow2", path)
    assert f"({size} bytes)" in _qemu_img("info", "-f", "qcow2", path)


@needs_qemu_img
def test_an_empty_image_reads_as_zeros(tmp_path: Path) -> None:
    path = _write(tmp_path / "empty", 4 << 20)
    _qemu_img("convert", "-f", "qcow2", "-O", "raw", path, tmp_path / "raw")

    assert (tmp_path / "raw").read_bytes() == bytes(4 << 20)


def test_an_empty_image_takes_little_room(tmp_path: Path) -> None:
    state = _write(tmp_path / "empty", 8 << 40).stat()

    assert state.st_blocks * 512 <= 64 << 10


def test_its_own_header_is_read_back(tmp_path: Path) -> None:
    assert _header(_write(tmp_path / "empty", 12 << 20)) == Qcow2Header(
        size=12 << 20, encrypted=False, has_backing_file=False, has_data_file=False
    )


@needs_qemu_img
def test_what_an_image_leans_on_is_seen(tmp_path: Path) -> None:
    base, over, split = tmp_path / "base", tmp_path / "over", tmp_path / "split"
    _qemu_img("create", "-q", "-f", "qcow2", base, "1M")
    _qemu_img("create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", over)
    _qemu_img("create", "-q", "-f", "qcow2", "-o", f"data_file={tmp_path}/data", split, "1M")

    headers = [_header(path) for path in (base, over, split)]

    assert [header and header.has_backing_file for header in headers] == [False, True, False]
    assert [header and header.has_data_file for header in headers] == [False, False, True]


def test_encryption_is_seen(tmp_path: Path) -> None:
    path = _write(tmp_path / "secret", 1 << 20)
    with path.open("r+b") as file:
        file.seek(32)  # crypt_method
        file.write((2).to_bytes(4))  # LUKS

    header = _header(path)

    assert header is not None
    assert header.encrypted


@pytest.mark.parametrize("content", [b"", b"QFI\xfb", b"QFI\xfb" + bytes(90), os.urandom(4096)])
def test_what_is_cut_off_or_something_else_is_none(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "image"
    path.write_bytes(content)

    assert _header(path) is None
