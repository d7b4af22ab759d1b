"""A trial: where probes look for programs, where they write, and how long each may take."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from pytest_vmsandbox.deadline import Deadline
from pytest_vmsandbox.host.facts import Capability, Fact, Verdict, fact_of
from pytest_vmsandbox.host.platform import Platform, current_platform
from pytest_vmsandbox.host.program import Outcome, run_program
from pytest_vmsandbox.host.unnamed_file import open_unnamed_file

# Administrators' programs are not on the PATH of an ordinary user, who may run them nevertheless.
_ADMINISTRATORS_PATH = ("/usr/local/sbin", "/usr/sbin", "/sbin")


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What all probes of one survey share; each probe has `deadline_s` for itself.

    That is long: a busy host must not look unfit, and only what hangs pays for it. The small
    guest has `guest_deadline_s`, because where KVM crawls all of it is spent.
    """

    run_dir: Path
    search_path: str
    deadline_s: float = 5.0
    guest_deadline_s: float = 1.0
    uid: int = field(default_factory=os.getuid)
    platform: Platform = field(default_factory=current_platform)

    def find(self, program: str) -> Path | None:
        """The program's absolute path, or None; only what may be executed counts."""
        found = shutil.which(program, path=self.search_path)
        return None if found is None else Path(found).absolute()

    def begin(self) -> Deadline:
        """The deadline of a probe that begins now; its steps share it."""
        return Deadline.after(seconds=self.deadline_s)

    async def run(
        self,
        argv: Sequence[str | os.PathLike[str]],
        *,
        stdin: bytes | IO[bytes] = b"",
        deadline: Deadline | None = None,
    ) -> Outcome:
        """Run it in a session of its own, with an environment in which nothing can prompt.

        `deadline` is the probe's own; without one this step is all of the probe.
        """
        seconds = (deadline or self.begin()).left_s
        with _as_file(stdin) as file:
            return await run_program(
                argv, deadline_s=seconds, env=_plain_environment(self.search_path), stdin=file
            )


def start_trial(*, run_dir: Path) -> Trial:
    """A trial of this host as it is, for this process's user.

    A run directory that is yet to be made stands for the one in which it will be.
    """
    present = next(path for path in (run_dir, *run_dir.parents) if path.is_dir())
    path = os.environ.get("PATH", os.defpath)
    return Trial(run_dir=present, search_path=os.pathsep.join((path, *_ADMINISTRATORS_PATH)))


def failed(
    capability: Capability, outcome: Outcome, *, remedy: str, verdict: Verdict = Verdict.UNUSABLE
) -> Fact:
    """The fact for a program that did not do what it must: a timeout is told apart."""
    if outcome.timed_out:
        verdict = Verdict.TIMEOUT
    return fact_of(capability, verdict, evidence=str(outcome), remedy=remedy)


def unsupported(capability: Capability, platform: Platform) -> Fact:
    """The fact where the platform has nothing of the kind."""
    return fact_of(
        capability,
        Verdict.UNSUPPORTED,
        evidence=f"not on {platform.system} on {platform.machine}, in this version",
        remedy="use a Linux host",
    )


def _as_file(content: bytes | IO[bytes]) -> AbstractContextManager[IO[bytes]]:
    return open_unnamed_file(content) if isinstance(content, bytes) else nullcontext(content)


def _plain_environment(search_path: str) -> dict[str, str]:
    # Built, not copied: no SUDO_ASKPASS, no DISPLAY, no LANG that changes what programs print.
    kept = {name: os.environ[name] for name in ("HOME", "TMPDIR") if name in os.environ}
    return {**kept, "PATH": search_path, "LC_ALL": "C"}
