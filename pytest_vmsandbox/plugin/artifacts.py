"""What is kept of a machine on disk: its logs, its command line, what it was."""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytest_vmsandbox.machine.controller import MachineController

# A name may have 255 bytes on most file systems (NAME_MAX); this leaves room for the hash.
_NAME_LIMIT = 100


def write_artifacts(base: Path, nodeid: str, machine: MachineController) -> None:
    """Write `console.log`, `vmm.log`, `command.txt` and `facts.json` to `base/TEST/MACHINE`.

    The logs are whole where the machine still has its directory, else as far as memory holds
    them; what an earlier call could keep more of stays. Raises OSError.
    """
    directory = base / _name(nodeid, of=nodeid) / _name(machine.name, of=machine.id)
    directory.mkdir(parents=True, exist_ok=True)
    directory.chmod(0o700)  # a console may hold secrets of the guest
    evidence = machine.evidence()
    logs = machine.build.config.directory
    _write_log(directory / "console.log", logs / "console.log", remembered=machine.console.text)
    _write_log(directory / "vmm.log", logs / "vmm.log", remembered=evidence.vmm_stderr)
    (directory / "command.txt").write_bytes(_encoded(evidence.command_line + "\n"))
    facts = {**asdict(machine.facts), "timings": asdict(machine.timings)}
    (directory / "facts.json").write_bytes(_encoded(json.dumps(facts, indent=2) + "\n"))


def place_capture(base: Path, network: str) -> Path:
    """A new file for a capture on that network, in the folder of the test that runs now."""
    test, _, _ = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")  # ends with its phase
    directory = base / _name(test, of=test)
    directory.mkdir(parents=True, exist_ok=True)
    directory.chmod(0o700)  # a capture may hold secrets of the guests
    numbers = (f"-{number}" if number > 1 else "" for number in count(1))
    paths = (directory / f"{network}{number}.pcap" for number in numbers)
    return next(path for path in paths if not path.exists())


def _write_log(target: Path, source: Path, *, remembered: str) -> None:
    # The file lacks the end of a very long log and memory its beginning; the file may be gone.
    try:
        on_disk = source.read_bytes().replace(b"\r", b"")
    except FileNotFoundError:
        on_disk = b""
    text = max(on_disk, _encoded(remembered), key=len)
    if not target.exists() or target.stat().st_size <= len(text):
        target.write_bytes(text)


def _name(text: str, *, of: str) -> str:
    """A file name that people recognize, and that nothing but `of` has."""
    slug = re.sub(r"[^A-Za-z0-9_.-]+", "_", text)[:_NAME_LIMIT]
    return f"{slug}-{hashlib.sha256(_encoded(of)).hexdigest()[:8]}"


def _encoded(text: str) -> bytes:
    return text.encode(errors="backslashreplace")
