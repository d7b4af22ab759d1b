"""Kernels as distributions ship them."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_vmsandbox.errors import RequestInvalid
from pytest_vmsandbox.image.kernel import Kernel, has_pvh_note, parse_kernel, uncompressed

needs_x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="a bzImage is of x86")


@pytest.fixture(scope="module")
def shipped(unpacked: Path) -> bytes:
    return next((unpacked / "kernel" / "boot").glob("vmlinuz-*")).read_bytes()


def test_a_kernel_tells_its_release(shipped: bytes, unpacked: Path) -> None:
    kernel = parse_kernel(shipped, source="vmlinuz")

    (modules,) = (unpacked / "kernel" / "lib" / "modules").iterdir()
    assert kernel.release == modules.name


@needs_x86
def test_the_elf_inside_a_bzimage_can_be_entered_by_pvh(shipped: bytes) -> None:
    elf = uncompressed(parse_kernel(shipped, source="vmlinuz"))

    assert elf is not None
    assert elf.startswith(b"\x7fELF")
    assert has_pvh_note(elf)


@needs_x86
def test_an_elf_without_the_pvh_note_is_not_used(shipped: bytes) -> None:
    elf = uncompressed(parse_kernel(shipped, source="vmlinuz"))
    assert elf is not None

    assert not has_pvh_note(elf.replace(b"\x12\0\0\0Xen\0", b"\x13\0\0\0Xen\0"))


@needs_x86
def test_a_bzimage_whose_payload_is_broken_is_used_as_it_is(shipped: bytes) -> None:
    broken = shipped[:100_000] + bytes(5_000_000) + shipped[5_100_000:]

    assert uncompressed(parse_kernel(broken, source="vmlinuz")) is None


@pytest.mark.parametrize(
    "release", [b"../../etc", b"6.1/x", b"", b"6.1\n", b"-6.1", "6.1é".encode(), b"6"]
)
def test_a_release_that_is_none_is_refused(release: bytes) -> None:
    header = bytearray(0x1000)
    header[0x202:0x206] = b"HdrS"
    header[0x20E:0x210] = (0x400).to_bytes(2, "little")
    header[0x600 : 0x600 + len(release)] = release

    with pytest.raises(RequestInvalid, match="the-file is no kernel"):
        parse_kernel(bytes(header), source="the-file")


@given(st.binary(max_size=3000))
def test_a_file_that_is_no_kernel_is_said_to_be_none(garbage: bytes) -> None:
    with pytest.raises(RequestInvalid, match="the-file"):
        parse_kernel(garbage, source="the-file")


@given(st.binary(max_size=600))
def test_a_hostile_header_never_breaks_the_search_for_the_elf(garbage: bytes) -> None:
    shipped = (garbage + bytes(0x400))[:0x202] + b"HdrS" + garbage

    assert uncompressed(Kernel(release="6.1", shipped=shipped)) is None


@given(st.binary(max_size=400))
def test_a_hostile_elf_has_no_pvh_note(garbage: bytes) -> None:
    assert not has_pvh_note(b"\x7fELF\x02\x01" + garbage)
