"""The host programs that make an image: found, run with a deadline, and quoted when they fail."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pytest_vmsandbox.deadline import Deadline
from pytest_vmsandbox.errors import HostUnfit, VmSandboxError

# An ordinary user's PATH has no sbin on Debian, and mke2fs lives there.
_ALSO_IN = "/usr/local/sbin:/usr/sbin:/sbin"


class ProgramFailed(VmSandboxError):
    """A host program ended with a failure; `last_lines` is what it said at the end."""

    def __init__(self, command: str, how: str, last_lines: str) -> None:
        super().__init__(command, how, last_lines)
        self.command, self.how, self.last_lines = command, how, last_lines

    def __str__(self) -> str:
        return f"{self.command} {self.how}\n{self.last_lines}".rstrip()


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A host program at `path`."""

    path: str

    @classmethod
    def find(cls, name: str) -> Program:
        """The program of that name; HostUnfit when an image can't be built without it."""
        found = shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:{_ALSO_IN}")
        if found is None:
            raise HostUnfit(
                "VMS-IMAGE-BUILDER",
                f"building an image takes {name}, of Debian, Ubuntu and their relatives",
                f"no {name} in PATH or {_ALSO_IN}",
                "--vm-image=PATH with an image that was built elsewhere (docs/images.md)",
            )
        return cls(path=found)

    def run(
        self,
        arguments: Sequence[str | Path],
        *,
        deadline: Deadline,
        cwd: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run it to its end, with `environment` added to ours; both streams are caught.

        Raises ProgramFailed, with its last lines, when it fails, and TimedOut when the deadline
        passes; it has then been killed.
        """
        command = [self.path, *map(str, arguments)]
        try:
            done = subprocess.run(
                command,
                check=False,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=deadline.timeout_s,
                cwd=cwd,
                env={**os.environ, "LC_ALL": "C.UTF-8", **(environment or {})},
            )
        except subprocess.TimeoutExpired as late:
            said = late.stderr or b""
            text = said.decode(errors="replace") if isinstance(said, bytes) else said
            raise deadline.timed_out(Path(self.path).name, last_seen=_last_lines(text)) from None
        if done.returncode:
            raise ProgramFailed(
                Path(self.path).name,
                f"ended with {done.returncode}",
                _last_lines(done.stdout + done.stderr),
            )
        return done


def _last_lines(text: str, *, count: int = 12) -> str:
    return "\n".join(text.rstrip().splitlines()[-count:])
