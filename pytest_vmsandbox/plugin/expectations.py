"""How guests end: as the test meant them to, or as a failure of the test."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from pytest_vmsandbox.errors import GuestPanicked, MachineFailed
from pytest_vmsandbox.plugin.holding import machines_of, new_ends, new_failure
from pytest_vmsandbox.plugin.markers import expectations_of

if TYPE_CHECKING:
    from pytest_vmsandbox.machine.controller import MachineController

# How long after a test's last line the end that it expects may still come.
LATE_S = 5.0
# How long after its first word a panic may take to be recorded as the machine's failure.
RECORDED_S = 2.0
_LOOK_EVERY_S = 0.05


@contextmanager
def guests_ending_as_expected(item: pytest.Item) -> Iterator[None]:
    """Forgive a machine's failure that `vm_expect` announced, and report one that it did not.

    A test that expects an end fails when it does not come; one that expects none fails when
    a guest panicked or oopsed, or a machine died, and no call of the test was told. Only what
    happened during the test counts, to machines that it uses.
    """
    with forgiving_expected_ends(item):
        yield
    if expected := expectations_of(item):
        _await_ends(item, expected)
    for machine in machines_of(item):
        _raise_unexpected(item, machine, expected)


@contextmanager
def forgiving_expected_ends(item: pytest.Item) -> Iterator[None]:
    """Swallow failures of machines that ended as announced, also those in an exception group."""
    expected = expectations_of(item)

    def is_expected(error: BaseException) -> bool:
        # Each wait raises a copy of what the machine died of, so it is known by its name.
        return isinstance(error, MachineFailed) and any(
            expected & new_ends(item, machine)
            for machine in machines_of(item)
            if machine.name == error.machine and new_failure(item, machine)
        )

    try:
        yield
    except MachineFailed as failure:
        if not is_expected(failure):
            raise
    except BaseExceptionGroup as group:
        _, others = group.split(is_expected)
        if others is not None:
            raise


def _await_ends(item: pytest.Item, expected: frozenset[str]) -> None:
    over = time.monotonic() + LATE_S
    while not any(expected & new_ends(item, machine) for machine in machines_of(item)):
        if time.monotonic() > over:
            pytest.fail(
                f"the guest was expected to end by {' or '.join(sorted(expected))}, "
                f"and did not within {LATE_S:.0f} s of the test's end"
            )
        time.sleep(_LOOK_EVERY_S)


def _raise_unexpected(
    item: pytest.Item, machine: MachineController, expected: frozenset[str]
) -> None:
    ends = new_ends(item, machine)
    if "panic" in ends - expected:
        _await_failure(item, machine)
    if failure := new_failure(item, machine):
        if not machine.failure_was_told and not expected & ends:
            raise failure
    elif trouble := ends & {"panic", "oops"} - expected:
        word = "panicked" if "panic" in trouble else "oopsed"
        raise GuestPanicked(
            machine.name,
            f"its kernel {word}; @pytest.mark.vm_expect says that it may",
            machine.evidence(),
        )


def _await_failure(item: pytest.Item, machine: MachineController) -> None:
    """A panic is known from its first line, and recorded once all of its text has come."""
    over = time.monotonic() + RECORDED_S
    while new_failure(item, machine) is None and time.monotonic() < over:
        time.sleep(_LOOK_EVERY_S)
