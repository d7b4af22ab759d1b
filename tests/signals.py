"""Signals to processes of a test's own that may run as another user: as the VMM, or as root."""

from __future__ import annotations

import os
import signal
import subprocess

# Who may signal what runs as the VMM's user, and what runs as root (see Tier).
_WAYS = (("sudo", "-n", "-u", "qemu-vm", "--"), ("sudo", "-n", "--"))


def send_signal(pid: int, number: signal.Signals) -> None:
    """Send a signal to a process that runs; through sudo where its user is not ours.

    Raises PermissionError where neither is allowed.
    """
    try:
        os.kill(pid, number)
    except PermissionError:
        command = ["kill", f"-{number.name.removeprefix('SIG')}", str(pid)]
        if not any(_succeeds(*way, *command) for way in _WAYS):
            raise


def _succeeds(*argv: str) -> bool:
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    return done.returncode == 0
