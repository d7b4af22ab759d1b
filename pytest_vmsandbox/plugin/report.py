"""What reports say of machines: evidence on failures, artifacts on disk, and a summary."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from _pytest._code.code import ExceptionRepr

from pytest_vmsandbox.errors import visible
from pytest_vmsandbox.plugin.session import SETTINGS, machines_of

if TYPE_CHECKING:
    from pytest_vmsandbox.host.facts import HostFacts
    from pytest_vmsandbox.machine.controller import MachineController

# Reports cross from xdist's workers to its controller as JSON, with whatever is in them.
RECORDS = "vm_machines"

CONSOLE_LINES = 100
_SKIP_CODE = re.compile(r"\bVMS(?:-[A-Z0-9]+)+")
_MARKS = pytest.StashKey[dict[str, int]]()
_FAILED = pytest.StashKey[bool]()


def describe_host(facts: HostFacts) -> list[str]:
    """Lines for pytest's header: tier and acceleration, and why."""
    return [
        f"vmsandbox: tier bare (this version builds no walls; the host has {facts.tier})",
        f"vmsandbox: acceleration {facts.accel} ({facts.accel_reason})",
    ]


def mark_consoles(item: pytest.Item) -> None:
    """Note where the consoles of machines that are there already stand: the test begins here."""
    item.stash[_MARKS] = {machine.id: machine.console.position for machine in machines_of(item)}


def record_machines(report: pytest.TestReport, machines: Sequence[MachineController]) -> None:
    """Put on the report what its machines were and cost."""
    setattr(
        report,
        RECORDS,
        [
            {
                "id": machine.id,
                # plain texts: execnet carries no members of an enum
                "tier": str(machine.facts.tier),
                "accel": str(machine.facts.accel),
                "timings": asdict(machine.timings),
            }
            for machine in machines
        ],
    )


def add_evidence(
    report: pytest.TestReport, item: pytest.Item, machines: Sequence[MachineController]
) -> None:
    """Add what the machines left to a failed report: terminal, xdist and JUnit XML show it."""
    for machine in machines:
        since = item.stash.get(_MARKS, {}).get(machine.id, 0)
        for title, text in _sections(machine, since):
            if isinstance(report.longrepr, ExceptionRepr):
                report.longrepr.addsection(title, text)
            else:
                report.sections.append((title, text))


def keep_artifacts(
    item: pytest.Item, report: pytest.TestReport, machines: Sequence[MachineController]
) -> None:
    """Write the machines' logs below `--vm-artifacts` when the test is over and they are wanted."""
    item.stash[_FAILED] = item.stash.get(_FAILED, False) or report.failed
    keep = item.config.stash[SETTINGS].keep
    wanted = keep == "always" or (keep == "on-failure" and item.stash[_FAILED])
    if report.when != "teardown" or not wanted:
        return
    base = item.config.rootpath / item.config.stash[SETTINGS].artifacts
    for machine in machines:
        directory = base / re.sub(r"[^A-Za-z0-9_.-]+", "_", item.nodeid) / machine.name
        _write_artifacts(directory, machine)


def summarize(reporter: pytest.TerminalReporter, *, durations: int) -> Iterator[str]:
    """Lines for the end of the run: skips by code, boots that hung, the slowest machines."""
    skips = Counter(
        found.group()
        for report in reporter.stats.get("skipped", [])
        if (found := _SKIP_CODE.search(str(report.longrepr)))
    )
    for code, times in skips.most_common():
        yield f"{times} skipped by this host: {code} (vmsandbox doctor tells more)"
    records = _records(reporter)
    retried = sum((record["timings"]["boot_attempts"] or 1) - 1 for record in records)
    if retried:
        yield f"{retried} boots hung and were tried again"
    slowest = sorted(records, key=_duration, reverse=True)[:durations]
    for record in slowest:
        yield f"{_duration(record):.2f} s {record['id']}: {_shown(record['timings'])}"


def _sections(machine: MachineController, since: int) -> Iterator[tuple[str, str]]:
    evidence = machine.evidence()
    console = "\n".join(machine.console.since(since).splitlines()[-CONSOLE_LINES:])
    for what, text in (
        ("console", console),
        ("VMM log", evidence.vmm_stderr),
        ("VMM status", evidence.vmm_status),
        ("command line", evidence.command_line),
        ("timings", str(machine.timings)),
    ):
        if text.strip():
            yield f"{machine.name}: {what}", visible(text.rstrip())


def _write_artifacts(directory: Path, machine: MachineController) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    directory.chmod(0o700)  # a console may hold secrets of the guest
    evidence = machine.evidence()
    facts = {**asdict(machine.facts), "timings": asdict(machine.timings)}
    for name, text in (
        ("console.log", machine.console.text),
        ("vmm.log", evidence.vmm_stderr),
        ("command.txt", evidence.command_line + "\n"),
        ("facts.json", json.dumps(facts, indent=2) + "\n"),
    ):
        (directory / name).write_text(text)


def _records(reporter: pytest.TerminalReporter) -> list[dict[str, Any]]:
    """The last record of each machine: later reports know more of it."""
    found: dict[str, dict[str, Any]] = {}
    for reports in reporter.stats.values():
        for report in reports:
            for record in getattr(report, RECORDS, []):
                if record["id"] not in found or getattr(report, "when", "") == "teardown":
                    found[record["id"]] = record
    return list(found.values())


def _duration(record: dict[str, Any]) -> float:
    return sum(value for value in record["timings"].values() if isinstance(value, float))


def _shown(timings: dict[str, Any]) -> str:
    return ", ".join(
        f"{name.removesuffix('_s')} {value:.3f} s"
        for name, value in timings.items()
        if isinstance(value, float)
    )
