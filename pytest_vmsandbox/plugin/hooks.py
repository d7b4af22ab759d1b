"""What we do at each of pytest's steps."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING

import pytest

from pytest_vmsandbox.errors import (
    HostUnfit,
    RequestInvalid,
    TeardownRefused,
    VmSandboxError,
    visible,
)
from pytest_vmsandbox.plugin.expectations import guests_ending_as_expected
from pytest_vmsandbox.plugin.foresight import foresee, remember_next
from pytest_vmsandbox.plugin.holding import begin, forget_ended, machines_of, running
from pytest_vmsandbox.plugin.markers import (
    LIFECYCLE,
    MARKERS,
    capabilities_of,
    check_markers,
    lifecycles_of,
)
from pytest_vmsandbox.plugin.options import add_options, read_settings
from pytest_vmsandbox.plugin.report import (
    add_evidence,
    describe_host,
    forget_failure,
    keep_artifacts,
    record_jail,
    record_machines,
    summarize,
)
from pytest_vmsandbox.plugin.session import SETTINGS, started_worker, worker_of
from pytest_vmsandbox.plugin.skips import skipping_what_is_unfit
from pytest_vmsandbox.plugin.unittest_items import TestCaseOutcomes

if TYPE_CHECKING:
    from pytest_vmsandbox.machine.worker import Worker

FIXTURES = frozenset(
    {
        *("vm", "async_vm", "vm_factory", "async_vm_factory", "vm_module", "vm_session"),
        *("vm_templates", "vm_host", "vm_jail", "vm_network"),
    }
)


HOST_LINES = "vmsandbox_host"
LEFTOVER_LINES = "vmsandbox_leftovers"
WORKERS_HOST = pytest.StashKey[list[str]]()
LEFTOVERS = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Offer our options."""
    add_options(parser)


def pytest_configure(config: pytest.Config) -> None:
    """Read the options, so that a wrong one ends the run before it begins; declare the markers."""
    config.stash[SETTINGS] = read_settings(config)
    config.pluginmanager.register(TestCaseOutcomes(), "vmsandbox-testcases")
    for line in MARKERS:
        config.addinivalue_line("markers", line)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Check the markers of each test as it is collected: a wrong one is an error there."""
    report = yield
    errors = [
        error
        for item in report.result or ()
        if isinstance(item, pytest.Item) and (error := _marker_error(item))
    ]
    if errors:
        report.outcome, report.result = "failed", []
        report.longrepr = "\n".join(errors)
    return report


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test once booted and once restored, where its mark says `lifecycle="both"`."""
    if lifecycles := lifecycles_of(metafunc.definition):
        metafunc.fixturenames.append(LIFECYCLE)
        metafunc.parametrize(LIFECYCLE, lifecycles)


def pytest_report_collectionfinish(config: pytest.Config, items: list[pytest.Item]) -> list[str]:
    """Say which acceleration and tier the machines get and why, where a test asks for one."""
    if config.option.collectonly or not any(_needs_machine(item) for item in items):
        return []
    return _host_lines(worker_of(config), config.stash[SETTINGS].tier)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, None, None]:
    """Note how shared machines stand as the test begins; skip what this host can't run."""
    begin(item)
    forget_failure(item)
    with skipping_what_is_unfit(item):
        for capability in capabilities_of(item):
            worker_of(item.config).facts.require(capability)
        return (yield)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Note which test comes next."""
    remember_next(item, nextitem)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    """Hold what became of the guests against what the test expects; foresee the next machine."""
    foresee(item)
    with skipping_what_is_unfit(item), guests_ending_as_expected(item), running(item):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, None, None]:
    """Leave the networks of machines that outlive the test as they were before it."""
    try:
        return (yield)
    finally:
        worker = started_worker(item.config)
        if worker is not None and worker.networks.disturbed:
            worker.engine.run(worker.networks.settle())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Put on each report which machines there were, and on a failed one what they left."""
    report = yield
    if (jail := getattr(item, "funcargs", {}).get("vm_jail")) is not None:
        record_jail(report, jail)
    if machines := machines_of(item):
        record_machines(report, machines)
        if report.failed:
            add_evidence(report, item, machines)
        keep_artifacts(item, report, machines)
    if report.when == "teardown":
        forget_ended(item)
    return report


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Give everything back; tell the controller (xdist) of this worker's host and leftovers."""
    worker = started_worker(session.config)
    if worker is None:
        return
    tier = session.config.stash[SETTINGS].tier
    host, left = _host_lines(worker, tier), _close(worker)
    output = getattr(session.config, "workeroutput", None)
    if output is None:
        session.config.stash[LEFTOVERS] = left
    else:
        output[HOST_LINES], output[LEFTOVER_LINES] = host, left


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: object) -> None:
    """Take what a worker told (xdist)."""
    config: pytest.Config = getattr(node, "config")  # noqa: B009  # xdist has no types for it
    told = getattr(node, "workeroutput", {})
    if lines := told.get(HOST_LINES):
        config.stash[WORKERS_HOST] = lines
    config.stash.setdefault(LEFTOVERS, []).extend(told.get(LEFTOVER_LINES, []))


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Count the skips by their code, and show what machines cost."""
    left: list[str] = config.stash.setdefault(LEFTOVERS, [])
    lines = [
        *config.stash.get(WORKERS_HOST, []),
        *sorted(set(left)),
        *summarize(terminalreporter, durations=config.stash[SETTINGS].durations),
    ]
    if lines:
        terminalreporter.section("machines", sep="-")
        for line in lines:
            terminalreporter.write_line(line)


def _host_lines(worker: Worker, tier: str) -> list[str]:
    try:
        return describe_host(worker.facts, tier)
    except HostUnfit as unfit:
        # The tests that need a machine are skipped for it; others are none of its business.
        return [f"vmsandbox: {unfit.code}: {unfit.evidence}"]


def _close(worker: Worker) -> list[str]:
    """Close it; what was left in place, and whatever else went wrong, in lines."""
    failures = []
    try:
        worker.close()
    except TeardownRefused:
        pass  # one of its leftovers
    except VmSandboxError as error:
        failures.append(str(error))
    left = [f"left in place: {leftover}" for leftover in worker.leftovers]
    return [visible(line) for line in (*worker.incidents, *left, *failures)]


def _needs_machine(item: pytest.Item) -> bool:
    return not FIXTURES.isdisjoint(getattr(item, "fixturenames", ()))


def _marker_error(item: pytest.Item) -> str | None:
    try:
        check_markers(item)
    except RequestInvalid as error:
        path, line, name = item.location
        return f"{path}:{(line or 0) + 1}: {name}: {error}"
    return None
