"""`vmsandbox setup`: make this host fit, one step after the other, each said before it is done."""

from __future__ import annotations

import argparse
import hashlib
import os
import pwd
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from pytest_vmsandbox.host.permissions import QEMU_VM_USER
from pytest_vmsandbox.host.setup_plan import (
    NOT_OURS_STATUS,
    PACKAGES,
    Command,
    Standing,
    Step,
    command_to_record,
    plan_setup,
    plan_undo,
)
from pytest_vmsandbox.host.setup_record import SetupRecord, read_setup_record

# What sudoers takes as one user without quoting (sudoers(5), "User_List").
_PLAIN_NAME = re.compile(r"[a-z_][a-z0-9_-]*", re.ASCII)

_SUDO = ("sudo", "-n", "--")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vmsandbox setup`."""
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and stop")
    parser.add_argument("--undo", action="store_true", help="take back what setup did, no more")
    parser.add_argument(
        "--user", help="who shall run tests (default: who called sudo, or who is asking)"
    )


def run(arguments: argparse.Namespace) -> int:
    """0: all is done, or was. 1: something could not be done; the rest of the plan was not tried.

    2: the request makes no sense.
    """
    try:
        record = read_setup_record()
        user = None if arguments.undo else _test_user(arguments.user)
    except ValueError as error:
        _say(f"vmsandbox setup: {error}", to_stderr=True)
        return 2
    standing = Standing() if arguments.undo else observe(record)
    plan = plan_undo(record) if arguments.undo else plan_setup(standing, user=user)
    unmet = standing.missing_packages if not standing.has_apt else ()
    if unmet:
        _say(f"no apt here: install these yourself: {' '.join(unmet)}")
    if not plan:
        _say("nothing to undo" if arguments.undo else "nothing to do: every step is done")
        return 1 if unmet else 0
    if arguments.dry_run:
        _describe(plan)
        return 0
    prefix = _way_to_root()
    if prefix is None:
        _say("this takes root, and sudo wants a password; an administrator may run, as root:\n")
        _say(render_script(plan, undo=arguments.undo))
        return 1
    if arguments.undo:
        done = _undo(plan, prefix=prefix)
    else:
        done = _perform(plan, prefix=prefix, record=record)
    return 1 if unmet or not done else 0


def observe(record: SetupRecord) -> Standing:
    """How this host stands now."""
    has_apt = shutil.which("apt-get") is not None
    missing = tuple(name for name in PACKAGES if not _has_package(name))
    return Standing(
        missing_packages=missing,
        installing=_would_install(missing) if has_apt and missing else (),
        has_apt=has_apt,
        has_user=_has_user(QEMU_VM_USER),
        has_kvm=Path("/dev/kvm").exists(),
        record=record,
        ours_in_place=[path for path, sha in record.files.items() if _is_in_place(path, sha)],
    )


def render_script(plan: Sequence[Step], *, undo: bool) -> str:
    """The plan as a shell script for an administrator, record included."""
    lines = ["set -e"]
    for step in plan:
        lines += [f"# {step}", *map(str, _commands(step, undo=undo))]
    return "\n".join(lines)


def _describe(plan: Sequence[Step]) -> None:
    for step in plan:
        _say(f"would {step}")


def _perform(plan: Sequence[Step], *, prefix: Sequence[str], record: SetupRecord) -> bool:
    """Do the steps of a setup; the first that fails is the last."""
    for step in plan:
        _say(f"{step} ...")
        for command in _commands(step, undo=False):
            status = _run_as_root(command, prefix=prefix)
            if status == NOT_OURS_STATUS:  # nothing was done, so nothing stays on record of it
                _run_as_root(command_to_record(record), prefix=prefix)
            if status:
                _say(f"failed: {step}", to_stderr=True)
                return False
        record = step.record
    return True


def _undo(plan: Sequence[Step], *, prefix: Sequence[str]) -> bool:
    """Do the steps of an undo; what is not ours any more is passed over, and is said."""
    whole = True
    for step in plan:
        _say(f"{step} ...")
        for command in _commands(step, undo=True):
            status = _run_as_root(command, prefix=prefix)
            if status not in (0, NOT_OURS_STATUS):
                _say(f"failed: {step}", to_stderr=True)
                return False
            whole = whole and not status
    return whole


def _run_as_root(command: Command, *, prefix: Sequence[str]) -> int:
    """The command's exit status; when it fails, what it printed is said."""
    done = subprocess.run(
        [*prefix, *command.argv],
        input=command.stdin,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    if done.returncode:
        _say(done.stdout.strip(), to_stderr=True)
    return done.returncode


def _commands(step: Step, *, undo: bool) -> tuple[Command, ...]:
    """What is to be done must be on record first; what was undone stays on it until it is."""
    recording = command_to_record(step.record)
    return (*step.commands, recording) if undo else (recording, *step.commands)


def _way_to_root() -> tuple[str, ...] | None:
    if os.getuid() == 0:
        return ()
    try:
        done = subprocess.run(
            [*_SUDO, "true"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            start_new_session=True,  # no terminal, so it can't prompt
            timeout=5,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return _SUDO if done.returncode == 0 else None


def _test_user(asked_for: str | None) -> str | None:
    """Who shall run tests; None for root. ValueError for nobody of this host."""
    name = asked_for or os.environ.get("SUDO_USER") or pwd.getpwuid(os.getuid()).pw_name
    if name == "root":
        return None
    if not _PLAIN_NAME.fullmatch(name) or not _has_user(name):
        raise ValueError(f"no user {name!r} on this host, or not one that sudoers can name")
    return name


def _has_user(name: str) -> bool:
    try:
        pwd.getpwnam(name)
    except KeyError:
        return False
    return True


def _has_package(name: str) -> bool:
    """Whether dpkg has it installed; where there is no dpkg, whether its program is there."""
    try:
        done = subprocess.run(
            ["dpkg-query", "--show", "--showformat=${db:Status-Status}", name],
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        return shutil.which(_PROGRAM_OF[name], path=f"{os.defpath}:/usr/sbin:/sbin") is not None
    return done.stdout.strip() == "installed"


_PROGRAM_OF = dict(
    zip(
        PACKAGES,
        ("qemu-system-x86_64", "setfacl", "sudo", "newuidmap", "mke2fs", "nft"),
        strict=True,
    )
)


def _would_install(names: Sequence[str]) -> tuple[str, ...]:
    """All packages that apt would install for these: `Inst NAME ...` (apt-get(8), --simulate)."""
    done = subprocess.run(
        ["apt-get", "--simulate", "install", "--no-install-recommends", *names],
        capture_output=True,
        text=True,
        env={**os.environ, "LC_ALL": "C"},
        check=False,
    )
    lines = (line.split() for line in done.stdout.splitlines())
    # `Inst NAME [OLD VERSION] (...)` is an upgrade: not ours to remove.
    return tuple(
        words[1] for words in lines if words[:1] == ["Inst"] and not words[2].startswith("[")
    )


def _is_in_place(path: str, digest: str) -> bool:
    """Whether the file is as recorded; one that we may not look at is believed to be."""
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest() == digest
    except FileNotFoundError:
        return False
    except PermissionError:
        return True


def _say(text: str, *, to_stderr: bool = False) -> None:
    stream = sys.stderr if to_stderr else sys.stdout
    stream.write(f"{text}\n")
    stream.flush()
