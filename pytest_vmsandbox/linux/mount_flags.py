"""The flags of mount(2), and the words that people write for them."""

from __future__ import annotations

from enum import IntFlag


class MountFlags(IntFlag):
    """MS_* of <linux/mount.h>; each also without its prefix."""

    MS_RDONLY = RDONLY = 1
    MS_NOSUID = NOSUID = 2
    MS_NODEV = NODEV = 4
    MS_NOEXEC = NOEXEC = 8
    MS_SYNCHRONOUS = SYNCHRONOUS = 16
    MS_REMOUNT = REMOUNT = 32
    MS_MANDLOCK = MANDLOCK = 64
    MS_DIRSYNC = DIRSYNC = 128
    MS_NOSYMFOLLOW = NOSYMFOLLOW = 256
    MS_NOATIME = NOATIME = 1024
    MS_NODIRATIME = NODIRATIME = 2048
    MS_BIND = BIND = 4096
    MS_MOVE = MOVE = 8192
    MS_REC = REC = 16384
    MS_SILENT = SILENT = 32768
    MS_POSIXACL = POSIXACL = 1 << 16
    MS_UNBINDABLE = UNBINDABLE = 1 << 17
    MS_PRIVATE = PRIVATE = 1 << 18
    MS_SLAVE = SLAVE = 1 << 19
    MS_SHARED = SHARED = 1 << 20
    MS_RELATIME = RELATIME = 1 << 21
    MS_KERNMOUNT = KERNMOUNT = 1 << 22
    MS_I_VERSION = I_VERSION = 1 << 23
    MS_STRICTATIME = STRICTATIME = 1 << 24
    MS_LAZYTIME = LAZYTIME = 1 << 25
    MS_SUBMOUNT = SUBMOUNT = 1 << 26
    MS_NOREMOTELOCK = NOREMOTELOCK = 1 << 27
    MS_NOSEC = NOSEC = 1 << 28
    MS_BORN = BORN = 1 << 29
    MS_ACTIVE = ACTIVE = 1 << 30
    MS_NOUSER = NOUSER = 1 << 31

    PROPAGATION = MS_UNBINDABLE | MS_PRIVATE | MS_SLAVE | MS_SHARED
    """How mounts spread; a call changes it, or does something else, never both."""

    KERNEL_ONLY = (
        MS_KERNMOUNT | MS_SUBMOUNT | MS_NOREMOTELOCK | MS_NOSEC | MS_BORN | MS_ACTIVE | MS_NOUSER
    )
    """The kernel's own notes in the same word; mount(2) ignores them without a word."""

    @classmethod
    def fromstr(cls, text: str) -> MountFlags:
        """The flags that a comma list such as ``ro,nosuid,rbind`` stands for.

        Read from left to right, a later word overrides an earlier one. ValueError for a word that
        is not known, an empty one included; ``""`` is no flag at all.
        """
        return cls(0).change(text)

    def change(self, text: str) -> MountFlags:
        """These flags after the words of a comma list, as in `fromstr`, were applied to them."""
        flags = int(self)
        for word in text.split(",") if text else ():
            clears, sets = _meaning(word)
            flags = (flags & ~clears) | sets
        return MountFlags(flags)

    def tostr(self) -> str:
        """The comma list that `fromstr` reads back as these flags, and no other ones.

        ValueError where there is none: more than one propagation flag, bits without a word.
        """
        rest, said = int(self), []
        for word, bits in _SPOKEN.items():
            if rest & bits == bits:
                said.append((bits & -bits, word))
                rest &= ~bits
        if rest or (int(self) & _PROPAGATION).bit_count() > 1:
            raise ValueError(f"no mount options say {int(self):#x}")
        return ",".join(word for _lowest_bit, word in sorted(said))


_PROPAGATION = int(MountFlags.PROPAGATION)
_REC = int(MountFlags.MS_REC)

# Words that set a flag, and whose "no" form clears it (mount(8), proc_pid_mountinfo(5)).
_SWITCHES = {
    "mand": MountFlags.MS_MANDLOCK,
    "relatime": MountFlags.MS_RELATIME,
    "iversion": MountFlags.MS_I_VERSION,
    "strictatime": MountFlags.MS_STRICTATIME,
    "lazytime": MountFlags.MS_LAZYTIME,
}

# Flags that are a refusal themselves: the "no" form sets them, the bare word clears them.
_REFUSALS = {
    "suid": MountFlags.MS_NOSUID,
    "dev": MountFlags.MS_NODEV,
    "exec": MountFlags.MS_NOEXEC,
    "symfollow": MountFlags.MS_NOSYMFOLLOW,
    "atime": MountFlags.MS_NOATIME,
    "diratime": MountFlags.MS_NODIRATIME,
}

# Words whose opposite, where they have one, is another word.
_SETTERS = {
    "ro": MountFlags.MS_RDONLY,
    "sync": MountFlags.MS_SYNCHRONOUS,
    "remount": MountFlags.MS_REMOUNT,
    "dirsync": MountFlags.MS_DIRSYNC,
    "bind": MountFlags.MS_BIND,
    "move": MountFlags.MS_MOVE,
    "rec": MountFlags.MS_REC,
    "silent": MountFlags.MS_SILENT,
}

_OPPOSITES = {
    "rw": MountFlags.MS_RDONLY,
    "async": MountFlags.MS_SYNCHRONOUS,
    "loud": MountFlags.MS_SILENT,
}

_SPREADING = {
    "unbindable": MountFlags.MS_UNBINDABLE,
    "private": MountFlags.MS_PRIVATE,
    "slave": MountFlags.MS_SLAVE,
    "shared": MountFlags.MS_SHARED,
}


def _meanings() -> dict[str, tuple[int, int]]:
    """For each word: the bits it clears, then the bits it sets."""
    found: dict[str, tuple[int, int]] = {"rbind": (0, int(MountFlags.MS_BIND) | _REC)}
    for word, flag in _SWITCHES.items():
        found |= {word: (0, int(flag)), f"no{word}": (int(flag), 0)}
    for word, flag in _REFUSALS.items():
        found |= {word: (int(flag), 0), f"no{word}": (0, int(flag))}
    found |= {word: (0, int(flag)) for word, flag in _SETTERS.items()}
    found |= {word: (int(flag), 0) for word, flag in _OPPOSITES.items()}
    for word, flag in _SPREADING.items():
        found |= {word: (_PROPAGATION, int(flag)), f"r{word}": (_PROPAGATION, int(flag) | _REC)}
    return found


def _spoken() -> dict[str, int]:
    """The words of `tostr` in their order: those that say two flags at once come first."""
    recursive = {"rbind": int(MountFlags.MS_BIND) | _REC}
    recursive |= {f"r{word}": int(flag) | _REC for word, flag in _SPREADING.items()}
    refusals = {f"no{word}": int(flag) for word, flag in _REFUSALS.items()}
    plain = {word: int(flag) for word, flag in (_SETTERS | _SWITCHES | _SPREADING).items()}
    return recursive | refusals | plain


_MEANINGS = _meanings()
_SPOKEN = _spoken()


def _meaning(word: str) -> tuple[int, int]:
    try:
        return _MEANINGS[word]
    except KeyError:
        raise ValueError(f"not a mount option of the kernel: {word!r}") from None
