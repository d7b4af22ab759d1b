"""How guests end: as the test meant them to, or as a failure of the test."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from pytest_vmsandbox.errors import GuestPanicked, MachineFailed
from pytest_vmsandbox.plugin.markers import expectations_of
from pytest_vmsandbox.plugin.session import machines_of

if TYPE_CHECKING:
    from pytest_vmsandbox.machine.controller import MachineController

# How long after a test's last line the end that it expects may still come.
LATE_S = 5.0
_LOOK_EVERY_S = 0.05


@contextmanager
def guests_ending_as_expected(item: pytest.Item) -> Iterator[None]:
    """Forgive a machine's failure that `vm_expect` announced, and report one that it did not.

    A test that expects an end fails when it does not come; one that expects none fails when
    a guest panicked or oopsed, or a machine died, and no call of the test was told.
    """
    expected = expectations_of(item)
    try:
        yield
    except MachineFailed as failure:
        # Each wait raises a copy of what the machine died of, so it is known by its name.
        ends = [m.ends for m in machines_of(item) if m.name == failure.machine and m.failure]
        if not any(expected & end for end in ends):
            raise
    if expected:
        _await_ends(machines_of(item), expected)
    for machine in machines_of(item):
        _raise_unexpected(machine, expected)


def _await_ends(machines: Sequence[MachineController], expected: frozenset[str]) -> None:
    over = time.monotonic() + LATE_S
    while not any(expected & machine.ends for machine in machines):
        if time.monotonic() > over:
            pytest.fail(
                f"the guest was expected to end by {' or '.join(sorted(expected))}, "
                f"and did not within {LATE_S:.0f} s of the test's end"
            )
        time.sleep(_LOOK_EVERY_S)


def _raise_unexpected(machine: MachineController, expected: frozenset[str]) -> None:
    if machine.failure is not None and not machine.failure_was_told:
        if not expected & machine.ends:
            raise machine.failure
    elif "oops" in machine.ends - expected and machine.failure is None:
        raise GuestPanicked(
            machine.name,
            'its kernel oopsed; @pytest.mark.vm_expect("oops") says that it may',
            machine.evidence(),
        )
