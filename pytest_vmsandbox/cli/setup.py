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
from pytest_vmsandbox.host.platform import current_platform
from pytest_vmsandbox.host.setup_plan import (
    MADE_BY_US,
    NOT_OURS_STATUS,
    PACKAGES,
    UNDOINGS,
    Command,
    Standing,
    Step,
    command_to_record,
    plan_setup,
    plan_undo,
    record_after_failure,
)
from pytest_vmsandbox.host.setup_record import SetupRecord, read_setup_record

# What sudoers takes as one user without quoting (sudoers(5), "User_List").
_PLAIN_NAME = re.compile(r"[a-z_][a-z0-9_-]*", re.ASCII)

_SUDO = ("sudo", "-n", "--")

# As shells say it of a program that is not there.
_NO_PROGRAM_STATUS = 127

_SYSTEM_PATH = f"{os.defpath}:/usr/local/sbin:/usr/sbin:/sbin"


class _CantPlan(Exception):
    """What is to be done can't be told; the message says why."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vmsandbox setup`."""
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and stop")
    parser.add_argument("--undo", action="store_true", help="take back what setup did, no more")
    parser.add_argument(
        "--user", help="who shall run tests (default: who called sudo, or who is asking)"
    )


def run(arguments: argparse.Namespace) -> int:
    """0: all is done, or was. 1: something could not be done; the rest of the plan was not tried.

    2: the request makes no sense. With `--dry-run` the same, as far as it can be foreseen.
    """
    try:
        user = None if arguments.undo else _test_user(arguments.user)
    except ValueError as error:
        _say(f"vmsandbox setup: {error}", to_stderr=True)
        return 2
    try:
        record = read_setup_record()
        standing = Standing() if arguments.undo else observe(record)
    except (OSError, ValueError, _CantPlan) as error:
        _say(f"vmsandbox setup: {error}", to_stderr=True)
        return 1
    plan = plan_undo(record) if arguments.undo else plan_setup(standing, user=user)
    unmet = standing.missing_packages if not standing.has_apt else ()
    if unmet:
        _say(f"no apt here: install these yourself: {' '.join(unmet)}")
    if not plan:
        _say("nothing to undo" if arguments.undo else "nothing to do: every step is done")
        return 1 if unmet else 0
    prefix = _way_to_root()
    if arguments.dry_run:
        problems = _foresee(
            plan,
            undo=arguments.undo,
            made_user=record.made_user,
            may_be_root=prefix is not None,
        )
        _describe(plan, problems)
        return 1 if unmet or problems else 0
    if prefix is None:
        _say("this takes root, and sudo wants a password; an administrator may run, as root:\n")
        _say(render_script(plan, undo=arguments.undo))
        return 1
    if arguments.undo:
        done = _undo(record, prefix=prefix)
    else:
        done = _perform(plan, prefix=prefix, record=record)
    return 1 if unmet or not done else 0


def observe(record: SetupRecord) -> Standing:
    """How this host stands now."""
    has_apt = shutil.which("apt-get") is not None
    missing = tuple(name for name in (_qemu_package(), *PACKAGES) if not _has_package(name))
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


def _describe(plan: Sequence[Step], problems: Sequence[str]) -> None:
    for step in plan:
        _say(f"would {step}")
    for problem in problems:
        _say(f"would fail: {problem}", to_stderr=True)


def _foresee(plan: Sequence[Step], *, undo: bool, made_user: bool, may_be_root: bool) -> list[str]:
    """Why the plan could not be performed, or not as a whole."""
    problems = [] if may_be_root else ["this takes root, and sudo wants a password"]
    programs = {command.argv[0] for step in plan for command in _commands(step, undo=undo)}
    path = f"{os.environ.get('PATH', '')}:{_SYSTEM_PATH}"
    problems += [
        f"no program {name}" for name in sorted(programs) if shutil.which(name, path=path) is None
    ]
    files = [entry for step in plan for entry in step.files.items()]
    problems += [
        f"{path} is not what vmsandbox setup wrote" for path, sha in files if _is_another(path, sha)
    ]
    if undo and made_user and _is_somebody_elses(QEMU_VM_USER):
        problems.append(f"user {QEMU_VM_USER} was not made by vmsandbox setup")
    return problems


def _perform(plan: Sequence[Step], *, prefix: Sequence[str], record: SetupRecord) -> bool:
    """Do the steps of a setup; the first that fails is the last."""
    for step in plan:
        _say(f"{step} ...")
        for command in _commands(step, undo=False):
            status = _run_as_root(command, prefix=prefix)
            if status:
                left_alone = status == NOT_OURS_STATUS
                kept = record_after_failure(
                    record, step, left_alone=left_alone, on_host=_is_on_host
                )
                if kept != step.record:
                    _run_as_root(command_to_record(kept), prefix=prefix)
                _say(f"failed: {step}", to_stderr=True)
                return False
        record = step.record
    return True


def _undo(record: SetupRecord, *, prefix: Sequence[str]) -> bool:
    """Take back what the record says; what is not ours any more stays, is said, and on record."""
    whole = True
    for undoing in UNDOINGS:
        step = undoing(record)
        if step is None:
            continue
        _say(f"{step} ...")
        statuses = [_run_as_root(command, prefix=prefix) for command in step.commands]
        if not any(statuses):
            statuses.append(_run_as_root(command_to_record(step.record), prefix=prefix))
        if set(statuses) - {0, NOT_OURS_STATUS}:
            _say(f"failed: {step}", to_stderr=True)
            return False
        if any(statuses):
            whole = False
        else:
            record = step.record
    return whole


def _run_as_root(command: Command, *, prefix: Sequence[str]) -> int:
    """The command's exit status; when it fails, what it printed is said."""
    try:
        done = subprocess.run(
            [*prefix, *command.argv],
            input=command.stdin,
            encoding="utf-8",
            errors="backslashreplace",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
    except OSError as error:
        _say(str(error), to_stderr=True)
        return _NO_PROGRAM_STATUS
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
    name = asked_for or os.environ.get("SUDO_USER") or _own_name()
    if name == "root":
        return None
    if not _PLAIN_NAME.fullmatch(name) or not _has_user(name):
        raise ValueError(f"no user {name!r} on this host, or not one that sudoers can name")
    return name


def _own_name() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        raise ValueError(f"uid {os.getuid()} has no name on this host; use --user") from None


def _has_user(name: str) -> bool:
    try:
        pwd.getpwnam(name)
    except KeyError:
        return False
    return True


def _has_package(name: str) -> bool:
    """Whether dpkg has it installed; where there is no dpkg, whether its program is there."""
    try:
        return _package_status(name) == "installed"
    except OSError:
        program = _PROGRAM_OF.get(name, current_platform().qemu_program)
        return shutil.which(program, path=_SYSTEM_PATH) is not None


def _is_on_host(name: str) -> bool:
    """Whether anything of the package is there that a purge would remove, configuration apart."""
    try:
        return _package_status(name) not in ("", "not-installed", "config-files")
    except OSError:
        return False


def _package_status(name: str) -> str:
    """The word of dpkg for it, empty where it does not know it (dpkg-query(1))."""
    done = subprocess.run(
        ["dpkg-query", "--show", "--showformat=${db:Status-Status}", name],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip()


_PROGRAM_OF = dict(
    zip(PACKAGES, ("setfacl", "sudo", "newuidmap", "mke2fs"), strict=True),
)


def _qemu_package() -> str:
    """The package with this processor's QEMU: of several names, the one that is there or known."""
    *newer, oldest = current_platform().qemu_packages
    return next((name for name in newer if _has_apt_name(name)), oldest)


def _has_apt_name(name: str) -> bool:
    try:
        done = subprocess.run(["apt-cache", "show", name], capture_output=True, check=False)
    except OSError:
        return False
    return done.returncode == 0


def _would_install(names: Sequence[str]) -> tuple[str, ...]:
    """All packages that apt would install for these: `Inst NAME ...` (apt-get(8), --simulate).

    _CantPlan, with apt's words, where it can't.
    """
    done = subprocess.run(
        ["apt-get", "--simulate", "install", "--no-install-recommends", *names],
        capture_output=True,
        text=True,
        env={**os.environ, "LC_ALL": "C"},
        check=False,
    )
    if done.returncode:
        raise _CantPlan(
            f"apt-get can't install {' '.join(names)}: {done.stderr.strip()[-400:]}\n"
            "(where apt has no lists yet: apt-get update)"
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
    except OSError:  # a directory, say
        return False


def _is_another(path: str, digest: str) -> bool:
    """Whether something is there that is not as recorded, as far as we may look."""
    try:
        there = Path(path).exists()
    except PermissionError:
        return False
    return there and not _is_in_place(path, digest)


def _is_somebody_elses(user: str) -> bool:
    """Whether that user is there, and was not made by us."""
    return _has_user(user) and pwd.getpwnam(user).pw_gecos != MADE_BY_US


def _say(text: str, *, to_stderr: bool = False) -> None:
    stream = sys.stderr if to_stderr else sys.stdout
    stream.write(f"{text}\n")
    stream.flush()
