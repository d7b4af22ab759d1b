"""The small guest: 64 KiB of firmware that counts, to see an accelerator run and how fast."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

# It runs CHUNKS times a loop of ROUNDS additions, stores and loads, and tells before and after
# each what the PIT shows. A chunk takes a third of a millisecond where TCG is quick, far less
# than a time slice: so most chunks are undisturbed on a busy host too, and their median counts.
CHUNKS = 31
ROUNDS = 100_000

# QEMU ends with (value << 1) | 1 when the guest writes value to isa-debug-exit.
_SUCCESS = 0x10
EXIT_STATUS = (_SUCCESS << 1) | 1

# The PIT counts down at this rate (8254 data sheet; the crystal of the IBM PC) and wraps after
# 65536 ticks, 55 ms.
_PIT_HZ = 1_193_182
_PIT_WRAP = 0x10000

_FIRMWARE_BYTES = 64 * 1024
_FIRMWARE_BASE = 0x1_0000_0000 - _FIRMWARE_BYTES  # it ends at 4 GiB
_PROTECTED_AT = 0x40
_GDT_POINTER_AT = 0x100
_GDT_AT = 0x110
_RESET_AT = 0xFFF0  # where every x86 begins
_DEBUG_PORT = 0xE9
_EXIT_PORT = 0xF4


def small_guest_arguments(firmware: Path, *, accelerator: str) -> list[str]:
    """QEMU's arguments that run the firmware in that file and end with EXIT_STATUS."""
    return [
        "-M", "q35", "-m", "2", "-nodefaults", "-no-user-config", "-no-reboot",
        "-display", "none", "-accel", accelerator, "-bios", str(firmware),
        "-debugcon", "stdio",
        "-device", f"isa-debug-exit,iobase={_EXIT_PORT:#x},iosize=0x4",
    ]  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Counted:
    """What the small guest told: how many chunks it finished, and their median in seconds."""

    chunks: int
    chunk_s: float


def parse_counted(told: bytes) -> Counted:
    """Read pairs of PIT counts, two bytes little-endian each; a half pair at the end is dropped."""
    pairs = struct.iter_unpack("<HH", told[: len(told) // 4 * 4])
    ticks = sorted((before - after) % _PIT_WRAP for before, after in pairs)
    # The median by hand: `statistics` takes longer to import than the facts to be recalled.
    middle = ticks[len(ticks) // 2] if ticks else 0
    return Counted(chunks=len(ticks), chunk_s=middle / _PIT_HZ)


def small_guest_firmware() -> bytes:
    """The image, to be mapped below 4 GiB (`-bios`): reset vector, 16-bit start, 32-bit loop.

    The loop runs in protected mode because an old processor's KVM emulates real mode, slowly,
    and yet boots a kernel well. Intel SDM volume 3, 10.9, "Mode switching".
    """
    image = bytearray(b"\xf4" * _FIRMWARE_BYTES)  # hlt
    for offset, code in (
        (0, _start_code()),
        (_PROTECTED_AT, _counting_code()),
        (_GDT_POINTER_AT, struct.pack("<HI", len(_gdt()) - 1, _FIRMWARE_BASE + _GDT_AT)),
        (_GDT_AT, _gdt()),
        (_RESET_AT, b"\xe9" + struct.pack("<H", 0x10000 - (_RESET_AT + 3))),  # jmp to 0
    ):
        image[offset : offset + len(code)] = code
    return bytes(image)


def _gdt() -> bytes:
    """No descriptor, 4 GiB of code, 4 GiB of data."""
    return struct.pack("<QQQ", 0, 0x00CF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF)


def _start_code() -> bytes:
    return b"".join(
        (
            b"\xfa",  # cli
            b"\x66\x2e\x0f\x01\x16" + struct.pack("<H", _GDT_POINTER_AT),  # lgdt cs:[...]
            b"\x0f\x20\xc0\x0c\x01\x0f\x22\xc0",  # cr0 |= PE
            b"\x66\xea" + struct.pack("<IH", _FIRMWARE_BASE + _PROTECTED_AT, 8),  # ljmp 8:...
        )
    )


def _counting_code() -> bytes:
    one_round = (
        b"\x01\xc8"  # add eax, ecx
        b"\xa3\x00\x10\x00\x00"  # mov [0x1000], eax
        b"\x33\x05\x04\x10\x00\x00"  # xor eax, [0x1004]
        b"\x49"  # dec ecx
    )
    tell_pit = (
        b"\x30\xc0\xe6\x43"  # latch channel 0
        + (b"\xe4\x40\xe6" + bytes([_DEBUG_PORT])) * 2  # low byte, high byte
    )
    chunk = b"".join(
        (
            tell_pit,
            b"\xb9" + struct.pack("<I", ROUNDS),  # mov ecx, ROUNDS
            one_round + _jump_back_if_not_zero(over=len(one_round)),
            tell_pit,
            b"\x4f",  # dec edi
        )
    )
    return b"".join(
        (
            b"\x66\xb8\x10\x00\x8e\xd8",  # ds = data
            b"\xb0\x34\xe6\x43\x30\xc0\xe6\x40\xe6\x40",  # PIT channel 0: mode 2, 65536
            b"\xbf" + struct.pack("<I", CHUNKS),  # mov edi, CHUNKS
            chunk + _jump_back_if_not_zero(over=len(chunk)),
            b"\xb0" + bytes([_SUCCESS]) + b"\xe6" + bytes([_EXIT_PORT]),
            b"\xf4\xeb\xfd",  # hlt, for ever
        )
    )


def _jump_back_if_not_zero(*, over: int) -> bytes:
    return b"\x75" + struct.pack("b", -(over + 2))
