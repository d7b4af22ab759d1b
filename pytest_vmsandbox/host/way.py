"""The way in which a tier starts a process: by which Python, as whom."""

from __future__ import annotations

import os
import re
import stat
import sys
from functools import cache
from pathlib import Path

from pytest_vmsandbox.host.facts import Tier

_SUDO = ("sudo", "-n")  # -n: it must never prompt
_WAYS: dict[Tier, tuple[str, ...]] = {
    Tier.ROOT: (),
    Tier.SUDO: (*_SUDO, "--"),
    Tier.QEMU_VM: (*_SUDO, "-u", "qemu-vm", "--"),
    Tier.USERNS: (),
    Tier.BARE: (),
}

# -I and -S: nothing of the environment, of the user or of site-packages is loaded.
_FLAGS = ("-I", "-S")
_OLDEST = (3, 11)
_SYSTEM = tuple(Path(f"/usr/bin/python3{minor}") for minor in ("", ".14", ".13", ".12", ".11"))


def render_start(tier: Tier, *arguments: str) -> list[str]:
    """The argv that starts a fresh Python as the tier starts its warden."""
    return [*_WAYS[tier], interpreter(tier), *_FLAGS, *arguments]


@cache
def interpreter(tier: Tier) -> str:
    """The Python for the tier: our own where the tier's user may run it, else the system's.

    Behind sudo it belongs to root, as do the folders above it, and nobody else can write it: what
    becomes another user is not what the one before could have put there. Where there is none, it
    is our own, and the probes find out.
    """
    own = Path(sys.executable).resolve()
    if tier in (Tier.SUDO, Tier.QEMU_VM):
        for candidate in (own, *_SYSTEM):
            if _is_new_enough(candidate.resolve()) and _is_for_everybody(candidate.resolve()):
                return str(candidate.resolve())
    return str(own)


def _is_new_enough(path: Path) -> bool:
    if path == Path(sys.executable).resolve():
        return True
    found = re.fullmatch(r"python(\d+)\.(\d+)", path.name)
    return found is not None and (int(found[1]), int(found[2])) >= _OLDEST


def _is_for_everybody(path: Path) -> bool:
    """Whether root owns it and all above it, and anybody may run it but nobody else write it."""
    try:
        states = [place.stat() for place in (path, *path.parents)]
    except OSError:
        return False
    return all(
        state.st_uid == 0
        and state.st_mode & stat.S_IXOTH
        and not state.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        for state in states
    ) and os.access(path, os.X_OK)
