"""A kernel as distributions ship it, and the form of it that a VMM boots soonest."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from typing import Final

from pytest_vmsandbox.errors import RequestInvalid
from pytest_vmsandbox.image.decompress import CannotDecompress, decompress

_BOOT_MAGIC: Final = 0x202
_XEN_ELFNOTE_PHYS32_ENTRY: Final = 18
_PT_NOTE: Final = 4
_RELEASE: Final = re.compile(rb"[0-9]+\.[0-9][\w.+~-]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """A kernel's release (`uname -r`), and the file that was shipped."""

    release: str
    shipped: bytes


def parse_kernel(shipped: bytes, *, source: str) -> Kernel:
    """Read a bzImage (x86) or Image (arm64); RequestInvalid, naming `source`, if it is neither."""
    if shipped[_BOOT_MAGIC : _BOOT_MAGIC + 4] == b"HdrS":
        return Kernel(release=_release_of_bzimage(shipped, source), shipped=shipped)
    banner = re.search(rb"Linux version ([0-9][^ ]*) ", _plain_image(shipped))
    if banner is None:
        raise RequestInvalid(f"{source} is no kernel: neither a bzImage nor an Image")
    return Kernel(release=_checked_release(banner[1], source), shipped=shipped)


def uncompressed(kernel: Kernel) -> bytes | None:
    """The ELF file inside a bzImage, which a VMM starts sooner: nothing is left to unpack.

    None where the shipped form has to do: it is no bzImage, can't be decompressed here, or a VMM
    could not enter it for want of a PVH note. Source: Linux, x86 boot protocol, setup_sects,
    payload_offset and payload_length (since 2.08).
    """
    shipped = kernel.shipped
    if shipped[_BOOT_MAGIC : _BOOT_MAGIC + 4] != b"HdrS":
        return None
    try:
        setup_sectors = shipped[0x1F1] or 4
        offset, length = struct.unpack_from("<II", shipped, 0x248)
        start = (setup_sectors + 1) * 512 + offset
        elf = decompress(shipped[start : start + length])
    except (CannotDecompress, struct.error, IndexError):
        return None
    return elf if has_pvh_note(elf) else None


def has_pvh_note(elf: bytes) -> bool:
    """Whether a VMM can enter this 64-bit little-endian ELF kernel by PVH.

    Source: Xen's public/elfnote.h, XEN_ELFNOTE_PHYS32_ENTRY.
    """
    try:
        program_headers, size, count = _program_headers(elf)
        for index in range(count):
            kind, _, start, _, _, length = struct.unpack_from(
                "<IIQQQQ", elf, program_headers + index * size
            )
            if kind == _PT_NOTE and _has_note(elf[start : start + length]):
                return True
    except struct.error:
        return False
    return False


def _release_of_bzimage(shipped: bytes, source: str) -> str:
    # The boot protocol's kernel_version: a pointer, less 0x200, to "RELEASE (builder) #1 ...".
    (pointer,) = struct.unpack_from("<H", shipped, 0x20E)
    text = shipped[pointer + 0x200 : pointer + 0x200 + 200].split(b"\0")[0]
    return _checked_release(text.split(b" ")[0], source)


def _checked_release(release: bytes, source: str) -> str:
    # It names directories, and it comes from a file: nothing but a release may pass.
    if not _RELEASE.fullmatch(release):
        raise RequestInvalid(f"{source} is no kernel: its release is {release[:40]!r}")
    return release.decode("ascii")


def _program_headers(elf: bytes) -> tuple[int, int, int]:
    if elf[:6] != b"\x7fELF\x02\x01":
        return 0, 0, 0
    (offset,) = struct.unpack_from("<Q", elf, 0x20)
    size, count = struct.unpack_from("<HH", elf, 0x36)
    return offset, size, count


def _has_note(notes: bytes) -> bool:
    position = 0
    while position + 12 <= len(notes):
        name_size, size, kind = struct.unpack_from("<III", notes, position)
        name = notes[position + 12 : position + 12 + name_size]
        if name == b"Xen\0" and kind == _XEN_ELFNOTE_PHYS32_ENTRY:
            return True
        position += 12 + (name_size + 3) // 4 * 4 + (size + 3) // 4 * 4
    return False


def _plain_image(shipped: bytes) -> bytes:
    try:
        return decompress(shipped)
    except CannotDecompress:
        return shipped
