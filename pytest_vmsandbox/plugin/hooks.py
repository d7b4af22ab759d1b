"""What we do at each of pytest's steps."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from pytest_vmsandbox.errors import HostUnfit, RequestInvalid
from pytest_vmsandbox.plugin.expectations import guests_ending_as_expected
from pytest_vmsandbox.plugin.markers import (
    MARKERS,
    capabilities_of,
    check_markers,
)
from pytest_vmsandbox.plugin.options import add_options, read_settings
from pytest_vmsandbox.plugin.report import (
    add_evidence,
    describe_host,
    keep_artifacts,
    mark_consoles,
    record_machines,
    summarize,
)
from pytest_vmsandbox.plugin.session import SETTINGS, machines_of, started_worker, worker_of

FIXTURES = frozenset(
    {"vm", "async_vm", "vm_factory", "async_vm_factory", "vm_module", "vm_session", "vm_host"}
)


HOST_LINES = "vmsandbox_host"
WORKERS_HOST = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Offer our options."""
    add_options(parser)


def pytest_configure(config: pytest.Config) -> None:
    """Read the options, so that a wrong one ends the run before it begins; declare the markers."""
    config.stash[SETTINGS] = read_settings(config)
    for line in MARKERS:
        config.addinivalue_line("markers", line)


@pytest.hookimpl(wrapper=True)
def pytest_pycollect_makeitem() -> Generator[None, Any, Any]:
    """Check the markers of each test as it is collected: a wrong one is an error there."""
    made = yield
    for item in made if isinstance(made, list) else ():
        if isinstance(item, pytest.Function):
            _checked(item)
    return made


def pytest_report_collectionfinish(config: pytest.Config, items: list[pytest.Item]) -> list[str]:
    """Say which acceleration and tier the machines get and why, where a test asks for one."""
    if not any(_needs_machine(item) for item in items):
        return []
    return describe_host(worker_of(config).facts)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, None, None]:
    """Skip what this host can't run; note where the consoles of shared machines stand."""
    with _skipping_what_is_unfit(item):
        for capability in capabilities_of(item):
            worker_of(item.config).facts.require(capability)
        mark_consoles(item)
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    """Hold what became of the guests against what the test expects."""
    with _skipping_what_is_unfit(item), guests_ending_as_expected(item):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Put on each report which machines there were, and on a failed one what they left."""
    report = yield
    if machines := machines_of(item):
        record_machines(report, machines)
        if report.failed:
            add_evidence(report, item, machines)
        keep_artifacts(item, report, machines)
    return report


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Tell the controller (xdist) what this worker's host can do."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None and (worker := started_worker(session.config)):
        output[HOST_LINES] = describe_host(worker.facts)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: object) -> None:
    """Take what a worker told (xdist)."""
    config: pytest.Config = getattr(node, "config")  # noqa: B009  # xdist has no types for it
    lines = getattr(node, "workeroutput", {}).get(HOST_LINES)
    if lines:
        config.stash[WORKERS_HOST] = lines


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Count the skips by their code, and show what machines cost."""
    lines = [
        *config.stash.get(WORKERS_HOST, []),
        *summarize(terminalreporter, durations=config.stash[SETTINGS].durations),
    ]
    if lines:
        terminalreporter.section("machines", sep="-")
        for line in lines:
            terminalreporter.write_line(line)


@contextmanager
def _skipping_what_is_unfit(item: pytest.Item) -> Iterator[None]:
    """Turn HostUnfit into a skip, but where `--vm-require` wants a failure."""
    try:
        yield
    except HostUnfit as unfit:
        if _is_required(unfit, item.config.stash[SETTINGS].require):
            raise
        raise pytest.skip.Exception(str(unfit), _use_item_location=True) from unfit


def _is_required(unfit: HostUnfit, required: frozenset[str]) -> bool:
    from pytest_vmsandbox.host.facts import capability_of

    return "all" in required or capability_of(unfit.code) in required


def _needs_machine(item: pytest.Item) -> bool:
    return not FIXTURES.isdisjoint(getattr(item, "fixturenames", ()))


def _checked(item: pytest.Item) -> None:
    try:
        check_markers(item)
    except RequestInvalid as error:
        path, line, name = item.location
        where = f"{path}:{(line or 0) + 1}: {name}"
        raise pytest.Collector.CollectError(f"{where}: {error}") from error
