"""The key with which a worker's ssh is let into its guests."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pytest_vmsandbox.errors import HostUnfit

_FOLDER = "ssh"
_FILE = "id_ed25519"

# It takes milliseconds.
_KEYGEN_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SshKey:
    """A private key at `path`, for its owner alone, and the line that is its public half."""

    path: Path
    public: str


def worker_key(directory: Path) -> SshKey:
    """The key in that run directory, which goes with it; made by whoever comes first.

    Raises HostUnfit where the host has no ssh-keygen, or that fails.
    """
    folder = directory / _FOLDER
    if not folder.exists():
        made = Path(tempfile.mkdtemp(dir=directory, prefix=_FOLDER))
        try:
            _generate(made / _FILE)
            # Another thread may have come first: a folder that is not empty is not replaced.
            made.rename(folder)
        except OSError:
            if not folder.exists():
                raise
        finally:
            for name in (_FILE, f"{_FILE}.pub"):
                (made / name).unlink(missing_ok=True)
            with suppress(FileNotFoundError):
                made.rmdir()
    public = (folder / f"{_FILE}.pub").read_text(encoding="ascii").strip()
    return SshKey(path=folder / _FILE, public=public)


def _generate(path: Path) -> None:
    program = shutil.which("ssh-keygen")
    if program is None:
        raise _unfit("no ssh-keygen in PATH")
    comment = f"vmsandbox {path.parent.parent.name}"
    done = subprocess.run(
        [program, "-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", path],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_KEYGEN_S,
        check=False,
    )
    if done.returncode:
        raise _unfit(f"ssh-keygen ended with {done.returncode}: {done.stderr.strip()}")


def _unfit(evidence: str) -> HostUnfit:
    return HostUnfit(
        "VMS-SSH-KEYGEN",
        "ssh-keygen, of OpenSSH's client",
        evidence,
        "apt-get install openssh-client",
    )
