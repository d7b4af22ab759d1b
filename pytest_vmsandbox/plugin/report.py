"""What reports say of machines: evidence on failures, artifacts on disk, and a summary."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import pytest
from _pytest._code.code import ExceptionRepr

from pytest_vmsandbox.errors import HostUnfit, visible
from pytest_vmsandbox.plugin.artifacts import write_artifacts
from pytest_vmsandbox.plugin.holding import mark_of
from pytest_vmsandbox.plugin.session import SETTINGS

if TYPE_CHECKING:
    from pytest_vmsandbox.host.facts import HostFacts
    from pytest_vmsandbox.machine.controller import MachineController
    from pytest_vmsandbox.machine.jail import Jail

# Reports cross from xdist's workers to its controller as JSON, with whatever is in them.
RECORDS = "vm_machines"
NOT_KEPT = "vm_not_kept"

# The name of what is said of each machine among a report's properties.
PROPERTY = "vmsandbox"

CONSOLE_LINES = 100
_SKIP_CODE = re.compile(r"\bVMS(?:-[A-Z0-9]+)+")
_FAILED = pytest.StashKey[bool]()


def describe_host(facts: HostFacts, tier: str) -> list[str]:
    """Lines for pytest's header: the tier that was chosen or asked for, acceleration, and why."""
    return [
        f"vmsandbox: tier {_describe_tier(facts, tier)}",
        f"vmsandbox: acceleration {facts.accel}: {facts.accel_reason}",
    ]


def _describe_tier(facts: HostFacts, wanted: str) -> str:
    from pytest_vmsandbox.host.tier import require_tier

    why = facts.tier_reason if wanted == "auto" else "asked for"
    try:
        tier = require_tier(wanted, facts)
    except HostUnfit as unfit:
        return f"{wanted} was asked for and can't be had: {unfit.code}: {unfit.evidence}"
    warning = ", no walls: VMMs may do what you may" if tier == "bare" else ""
    return f"{tier}{warning}: {why}"


def record_jail(report: pytest.TestReport, jail: Jail) -> None:
    """Put on the report in which tier its commands of the host ran."""
    with suppress(HostUnfit):
        report.user_properties.append((PROPERTY, f"vm_jail: tier {jail.tier}"))


def record_machines(report: pytest.TestReport, machines: Sequence[MachineController]) -> None:
    """Put on the report what its machines were and cost; JUnit XML shows what they were."""
    for machine in machines:
        report.user_properties.append((PROPERTY, f"{machine.name}: {_describe(machine)}"))
    setattr(
        report,
        RECORDS,
        [
            {
                "id": machine.id,
                # plain texts: execnet carries no members of an enum
                "tier": str(machine.facts.tier),
                "accel": str(machine.facts.accel),
                "lifecycle": machine.facts.lifecycle,
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
        for title, text in _sections(machine, mark_of(item, machine).position):
            if isinstance(report.longrepr, ExceptionRepr):
                report.longrepr.addsection(title, text)
            else:
                report.sections.append((title, text))


def forget_failure(item: pytest.Item) -> None:
    """A test begins: what became of an earlier attempt at it does not count."""
    item.stash[_FAILED] = False


def keep_artifacts(
    item: pytest.Item, report: pytest.TestReport, machines: Sequence[MachineController]
) -> None:
    """Write the machines' logs below `--vm-artifacts` where they are wanted.

    After each phase, because the logs on disk go with the machine. Where that can't be done
    the report says so, and the summary after it; the test's outcome stays what it is.
    """
    item.stash[_FAILED] = item.stash.get(_FAILED, False) or report.failed
    keep = item.config.stash[SETTINGS].keep
    if keep == "never" or (keep == "on-failure" and not item.stash[_FAILED]):
        return
    base = item.config.rootpath / item.config.stash[SETTINGS].artifacts
    for machine in machines:
        try:
            write_artifacts(base, item.nodeid, machine)
        except OSError as error:
            setattr(report, NOT_KEPT, f"{machine.id}: {error}")


def summarize(reporter: pytest.TerminalReporter, *, durations: int) -> Iterator[str]:
    """Lines for the end of the run: skips by code, boots that hung, the slowest machines."""
    from pytest_vmsandbox.machine.timings import Timings

    skips = Counter(
        found.group()
        for report in reporter.stats.get("skipped", [])
        if (found := _SKIP_CODE.search(str(report.longrepr)))
    )
    for code, times in skips.most_common():
        yield f"{times} skipped: {code} ({_where_to_look(code)})"
    for not_kept in sorted(_all_of(reporter, NOT_KEPT)):
        yield visible(f"artifacts not kept: {not_kept}")
    records = _records(reporter)
    retried = sum((record["timings"]["boot_attempts"] or 1) - 1 for record in records)
    if retried:
        yield f"{retried} boots hung and were tried again"
    slowest = sorted(records, key=lambda one: Timings(**one["timings"]).total_s, reverse=True)
    for record in slowest[:durations]:
        timings = Timings(**record["timings"])
        yield f"{timings.total_s:.2f} s {record['id']} ({record['lifecycle']}): {timings}"


def _where_to_look(code: str) -> str:
    from pytest_vmsandbox.host.facts import capability_of, doctor_shows

    if doctor_shows(code):
        return "vmsandbox doctor tells more"
    if capability_of(code) is not None:
        return "docs/hosts.md explains it"
    page = "images" if code.startswith("VMS-IMAGE-") else "usage"
    return f"docs/{page}.md explains it"


def _sections(machine: MachineController, since: int) -> Iterator[tuple[str, str]]:
    evidence = machine.evidence()
    console = "\n".join(machine.console.since(since).splitlines()[-CONSOLE_LINES:])
    for what, text in (
        ("facts", _describe(machine)),
        ("console", console),
        ("VMM log", evidence.vmm_stderr),
        ("VMM status", evidence.vmm_status),
        ("command line", evidence.command_line),
        ("timings", str(machine.timings)),
    ):
        if text.strip():
            yield f"{machine.name}: {what}", visible(text.rstrip())


def _describe(machine: MachineController) -> str:
    facts = machine.facts
    versions = f"kernel {facts.kernel or 'unknown'}, QEMU {facts.vmm_version or 'unknown'}"
    lifecycle = f"{facts.lifecycle} {facts.restore_id}".rstrip()
    return f"tier {facts.tier}, {facts.accel}, {lifecycle}, image {facts.image}, {versions}"


def _records(reporter: pytest.TerminalReporter) -> list[dict[str, Any]]:
    """The last record of each machine: later reports know more of it."""
    found: dict[str, dict[str, Any]] = {}
    for reports in reporter.stats.values():
        for report in reports:
            for record in getattr(report, RECORDS, []):
                if record["id"] not in found or getattr(report, "when", "") == "teardown":
                    found[record["id"]] = record
    return list(found.values())


def _all_of(reporter: pytest.TerminalReporter, attribute: str) -> set[str]:
    reports = (report for some in reporter.stats.values() for report in some)
    return {found for report in reports if (found := getattr(report, attribute, None))}
