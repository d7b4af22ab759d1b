"""Whether a QEMU starts here, and what it was built with: asked over QMP, in one run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from pytest_vmsandbox.deadline import Deadline
from pytest_vmsandbox.host.facts import Capability, Fact, QemuBuild, Verdict, fact_of
from pytest_vmsandbox.host.program import Outcome
from pytest_vmsandbox.host.trial import Trial, failed

_SANDBOX = ["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"]
_ASK = ["-M", "none", "-nodefaults", "-no-user-config", "-display", "none", "-qmp", "stdio"]

# Answered in this order, after the greeting.
_QUESTIONS: tuple[dict[str, object], ...] = (
    {"execute": "qmp_capabilities"},
    {"execute": "query-machines"},
    {"execute": "qom-list-types", "arguments": {"implements": "accel"}},
    {"execute": "quit"},
)


async def probe_qemu(trial: Trial) -> tuple[Fact, QemuBuild | None]:
    """The fact, and the QEMU where there is one; seccomp is tried, and lived without."""
    program = trial.find(trial.platform.qemu_program)
    packages = " or ".join(trial.platform.qemu_packages)
    remedy = f"vmsandbox setup (apt-get install {packages})"
    if program is None:
        evidence = f"no {trial.platform.qemu_program} on the PATH"
        missing = fact_of(Capability.QEMU, Verdict.MISSING, evidence=evidence, remedy=remedy)
        return missing, None
    deadline = trial.begin()
    outcome = await _ask(trial, [str(program), *_ASK, *_SANDBOX], deadline)
    build = _build_of(program, outcome, sandbox=True)
    if build is None and not outcome.timed_out:  # built without seccomp, or on macOS
        outcome = await _ask(trial, [str(program), *_ASK], deadline)
        build = _build_of(program, outcome, sandbox=False)
    if build is None:
        return failed(Capability.QEMU, outcome, remedy=remedy), None
    walls = "seccomp" if build.sandbox else "no seccomp"
    evidence = f"QEMU {build.version} at {build.path} ({', '.join(build.accelerators)}; {walls})"
    return fact_of(Capability.QEMU, Verdict.OK, evidence=evidence), build


async def _ask(trial: Trial, argv: Sequence[str], deadline: Deadline) -> Outcome:
    questions = "".join(json.dumps(question) + "\n" for question in _QUESTIONS)
    return await trial.run(argv, stdin=questions.encode(), deadline=deadline)


def _build_of(program: Path, outcome: Outcome, *, sandbox: bool) -> QemuBuild | None:
    if not outcome.ok:
        return None
    try:
        return parse_build(outcome.stdout, program=program, sandbox=sandbox)
    except ValueError:
        return None


def parse_build(printed: bytes, *, program: Path, sandbox: bool) -> QemuBuild:
    """Read the QMP answers; ValueError when they are not a QEMU's."""
    try:
        messages = [json.loads(line) for line in printed.splitlines() if line.strip()]
    except RecursionError:  # a line of brackets
        raise ValueError("not the answers of a QEMU") from None
    answers = [message for message in messages if not _is_event(message)]
    match answers:
        case [
            {
                "QMP": {
                    "version": {
                        "qemu": {"major": int(major), "minor": int(minor), "micro": int(micro)}
                    }
                }
            },
            {"return": _},
            {"return": [*machines]},
            {"return": [*accelerators]},
            *_,
        ]:
            return QemuBuild(
                path=str(program),
                version=f"{major}.{minor}.{micro}",
                machines=_names(machines),
                accelerators=tuple(
                    name.removesuffix("-accel") for name in _names(accelerators) if "-" in name
                ),
                sandbox=sandbox,
            )
    raise ValueError("not the answers of a QEMU")


def _is_event(message: object) -> bool:
    return isinstance(message, dict) and "event" in message


def _names(entries: list[object]) -> tuple[str, ...]:
    names = (
        name
        for entry in entries
        if isinstance(entry, dict)
        for name in (entry.get("name"), entry.get("alias"))
        if isinstance(name, str)
    )
    return tuple(sorted(set(names)))
