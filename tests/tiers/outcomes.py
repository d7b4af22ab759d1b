"""A pytest plugin that chooses what a tier's run is about, and writes down what came of it.

It is loaded with `-p tests.tiers.outcomes` in the controller and in each xdist worker.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

import pytest

# Rooms whose tests depend on the tier though they boot nothing.
WALLED_ROOMS = ("tests/warden/", "tests/jail/", "tests/escape/")

# It installs us for users of its own, and in the tier that they have.
TIERLESS = ("tests/repository/test_wheel.py",)

# Reasons for which a test that needs a machine may skip in any tier.
_EXPECTED = re.compile(
    r"takes root|not as root|made by root|memory of this VMM can't|"  # who runs it
    r"VMS-KVM-|no KVM|VMS-TAP-|"  # what no tier changes
    r"the tier bare has no walls|the tier bare was asked for|VMS-TIER-BARE"
)

_NEEDS_MACHINE = "needs_machine"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcomes:
    """What came of a run: numbers, and whom they count; `skipped` by reason."""

    passed: int = 0
    failed: list[str] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)
    skipped_machines: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> Self:
        """What the plugin wrote; nothing at all, where pytest did not get so far."""
        return cls(**json.loads(path.read_text())) if path.exists() else cls()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("tiers")
    group.addoption("--outcomes", type=Path, help="where to write what came of the run")
    group.addoption("--walls-only", action="store_true", help="machines, and rooms with walls")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.outcomes and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Recorder(config.option.outcomes))


@pytest.hookimpl(trylast=True)  # machine tests are marked by then
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.option.walls_only:
        return
    chosen = [
        item
        for item in items
        if item.get_closest_marker("machine") or item.nodeid.startswith(WALLED_ROOMS)
        if not item.nodeid.startswith(TIERLESS)
    ]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
    items[:] = chosen


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Iterator[None]:
    report: pytest.TestReport = yield  # type: ignore[assignment]  # a wrapper's yield gives it
    setattr(report, _NEEDS_MACHINE, item.get_closest_marker("machine") is not None)
    return report  # type: ignore[return-value]  # and its return passes it on


class _Recorder:
    """Counts in the controller."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._passed = 0
        self._failed: list[str] = []
        self._skipped: Counter[str] = Counter()
        self._skipped_machines: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._failed.append(f"{report.nodeid} ({report.when})")
        elif report.skipped:
            self._skip(report)
        elif report.when == "call":
            self._passed += 1

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._failed.append(f"{report.nodeid} (collection)")

    def pytest_sessionfinish(self) -> None:
        outcomes = Outcomes(
            passed=self._passed,
            failed=self._failed,
            skipped=dict(self._skipped.most_common()),
            skipped_machines=self._skipped_machines,
        )
        self._path.write_text(json.dumps(asdict(outcomes)))

    def _skip(self, report: pytest.TestReport) -> None:
        reason = reason_of(report)
        self._skipped[short(reason)] += 1
        if getattr(report, _NEEDS_MACHINE, False) and not _EXPECTED.search(reason):
            self._skipped_machines.append(f"{report.nodeid}: {reason.splitlines()[0]}")


def reason_of(report: pytest.TestReport) -> str:
    """Why it was skipped."""
    if isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ")
    return getattr(report, "wasxfail", "no reason")


def short(reason: str) -> str:
    """A reason as it stands in a table: its code, or its first words."""
    if code := re.match(r"VMS-[A-Z0-9-]+", reason):
        return code[0]
    return reason.splitlines()[0].partition(":")[0][:50]
