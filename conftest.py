"""What all our tests and examples share."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest_plugins = ["pytester", "tests.homes", "tests.people"]

# Tests count descriptors and processes: none may come to be for the test after them.
os.environ.setdefault("VMSANDBOX_POOL", "off")

_MACHINE_FIXTURES = frozenset(
    {
        *("vm", "async_vm", "vm_factory", "async_vm_factory", "vm_module", "vm_session"),
        *("vm_templates", "vm_jail", "worker"),
    }
)

# Of the runs of pytest that tests start: its plugin takes longer to import than all the others.
_WITHOUT_HYPOTHESIS = "-p no:hypothesispytest"


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marks of this repository."""
    config.addinivalue_line("markers", "machine: boots a machine (set by itself)")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test that boots a machine, so that `-m "not machine"` leaves it out."""
    for item in items:
        if not _MACHINE_FIXTURES.isdisjoint(getattr(item, "fixturenames", ())):
            item.add_marker("machine")


@pytest.fixture(scope="session", autouse=True)
def _runs_without_hypothesis() -> Iterator[None]:
    """By the environment, which this run and its workers have read already."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTEST_ADDOPTS", _WITHOUT_HYPOTHESIS)
        yield


@pytest.fixture
def pytester(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """The same for its runs, for which it forgets that variable."""
    monkeypatch.setenv("PYTEST_ADDOPTS", _WITHOUT_HYPOTHESIS)
    return pytester


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A folder that other users can reach, unlike `tmp_path`; gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="vmst-", dir="/tmp") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture
def open_descriptors() -> Callable[[], list[str]]:
    """Lists what this process holds open, to be compared before and after."""

    def listed() -> list[str]:
        return sorted(entry.name for entry in Path("/proc/self/fd").iterdir())

    return listed
