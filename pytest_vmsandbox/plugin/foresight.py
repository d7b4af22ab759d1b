"""Which machine the next test will want, told to the worker while this one runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pytest_vmsandbox.errors import VmSandboxError
from pytest_vmsandbox.plugin.markers import spec_of
from pytest_vmsandbox.plugin.session import base_spec, started_worker

if TYPE_CHECKING:
    from pytest_vmsandbox.machine.spec import MachineSpec

# What the last machine booted: the next test's fixture can't be asked before its time.
LAST_IMAGE = pytest.StashKey[str]()

_NEXT = pytest.StashKey[pytest.Item | None]()
_FIXTURES = frozenset({"vm", "async_vm"})


def remember_next(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Keep what comes after `item`."""
    item.stash[_NEXT] = nextitem


def foresee(item: pytest.Item) -> None:
    """Tell the worker what the test after `item` will want, if there is one that starts ahead.

    A guess: one that is wrong costs spare time of a processor, and nothing else.
    """
    worker = started_worker(item.config)
    if worker is not None and worker.settings.pool:
        worker.engine.run(worker.foresee(_spec_of_next(item)))


def _spec_of_next(item: pytest.Item) -> MachineSpec | None:
    following, image = item.stash.get(_NEXT, None), item.config.stash.get(LAST_IMAGE, None)
    if following is None or image is None or following.get_closest_marker("skip"):
        return None
    if _FIXTURES.isdisjoint(getattr(following, "fixturenames", ())):
        return None
    try:
        return spec_of(following, base_spec(item.config, image))
    except VmSandboxError:
        return None  # it will be told so itself
