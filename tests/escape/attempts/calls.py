"""System calls that Python has no word for."""

from __future__ import annotations

import ctypes
import errno
import os

LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.syscall.restype = ctypes.c_long
LIBC.mount.argtypes = [ctypes.c_char_p] * 3 + [ctypes.c_ulong, ctypes.c_char_p]
LIBC.shmat.restype = ctypes.c_void_p

# On x86_64 and on aarch64.
_NUMBERS = {
    "pivot_root": (155, 41),
    "reboot": (169, 142),
    "quotactl": (179, 60),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "kexec_load": (246, 104),
    "add_key": (248, 217),
    "keyctl": (250, 219),
    "capset": (126, 91),
    "ioprio_set": (251, 30),
    "perf_event_open": (298, 241),
    "kcmp": (312, 272),
    "bpf": (321, 280),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "clone3": (435, 435),
    "pidfd_getfd": (438, 438),
    "mount_setattr": (442, 442),
}
_PLACE = {"x86_64": 0, "aarch64": 1}[os.uname().machine]

Word = int | bytes | ctypes.Array[ctypes.c_char] | None


def syscall(name: str, *words: Word) -> int:
    """syscall(2) by name; OSError where it fails."""
    arguments = [ctypes.c_long(word) if isinstance(word, int) else word for word in words]
    return checked(name, LIBC.syscall(ctypes.c_long(_NUMBERS[name][_PLACE]), *arguments))


def libc(name: str, *words: Word) -> int:
    """A function of the C library that answers -1 and errno."""
    return checked(name, getattr(LIBC, name)(*words))


def checked(name: str, result: int) -> int:
    """The result, or OSError for -1."""
    if result == -1:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
    return result


def passes(name: str, *words: Word, harmless: int) -> str:
    """Ask for nonsense: who may ask is told `harmless`, anybody else EPERM; nothing is done."""
    try:
        syscall(name, *words)
    except OSError as error:
        if error.errno != harmless:
            raise
        return f"the kernel got as far as {errno.errorcode[harmless]}"
    return "it was done"
