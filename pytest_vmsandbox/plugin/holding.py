"""Which machines a test holds, and what of them is news to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pytest_vmsandbox.errors import MachineFailed
    from pytest_vmsandbox.machine.controller import MachineController


@dataclass(slots=True, kw_only=True)
class Held:
    """A machine, the fixture that made it, and whether that fixture has ended it."""

    machine: MachineController
    fixture: str
    ended: bool = False

    def end(self) -> None:
        """Its fixture has ended it: the reports of this phase are the last to tell of it."""
        self.ended = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """How a machine stood when a test began: what was so before is not that test's doing."""

    position: int = 0
    ends: frozenset[str] = frozenset()
    failure: MachineFailed | None = None


HELD = pytest.StashKey[list[Held]]()
_RUNNING = pytest.StashKey[pytest.Item]()
_MARKS = pytest.StashKey[dict[str, Mark]]()


def begin(item: pytest.Item) -> None:
    """Let go of what an earlier attempt at `item` held, and mark how shared machines stand."""
    item.stash[HELD] = []
    item.stash[_MARKS] = {
        held.machine.id: Mark(
            position=held.machine.console.position,
            ends=held.machine.ends,
            failure=held.machine.failure,
        )
        for held in _in_reach(item)
    }


def hold(node: pytest.Item | pytest.Collector, held: Held) -> None:
    """Keep a machine in sight of the tests below `node`."""
    node.stash.setdefault(HELD, []).append(held)


@contextmanager
def running(item: pytest.Item) -> Iterator[None]:
    """In the block the body of `item` runs, and neither a fixture's nor another test's."""
    item.config.stash[_RUNNING] = item
    try:
        yield
    finally:
        del item.config.stash[_RUNNING]


def running_test(config: pytest.Config) -> pytest.Item | None:
    """The test whose body runs now."""
    return config.stash.get(_RUNNING, None)


def forget_ended(item: pytest.Item) -> None:
    """Let go of the machines whose fixtures are over: the last report of them is made."""
    for node in item.listchain():
        if HELD in node.stash:
            node.stash[HELD] = [held for held in node.stash[HELD] if not held.ended]


def machines_of(item: pytest.Item) -> list[MachineController]:
    """The machines that `item` uses: its own, and the shared ones whose fixture it asks for.

    A machine that came up during the test is one of them, by whatever way it was asked for.
    """
    marks, asked = item.stash.get(_MARKS, {}), getattr(item, "fixturenames", ())
    return [
        held.machine
        for held in _in_reach(item)
        if held.fixture in asked or held.machine.id not in marks
    ]


def mark_of(item: pytest.Item, machine: MachineController) -> Mark:
    """How `machine` stood when `item` began."""
    return item.stash.get(_MARKS, {}).get(machine.id, Mark())


def new_failure(item: pytest.Item, machine: MachineController) -> MachineFailed | None:
    """What the machine died of during `item`."""
    failure = machine.failure
    return None if failure is mark_of(item, machine).failure else failure


def new_ends(item: pytest.Item, machine: MachineController) -> frozenset[str]:
    """In which ways its guest ended during `item`: of "panic", "oops" and "shutdown"."""
    mark = mark_of(item, machine)
    if mark.failure is not None and machine.failure is not mark.failure:
        return machine.ends  # it was dead and has been powered on since: all is new
    return machine.ends - mark.ends


def _in_reach(item: pytest.Item) -> list[Held]:
    return [held for node in item.listchain() for held in node.stash.get(HELD, ())]
