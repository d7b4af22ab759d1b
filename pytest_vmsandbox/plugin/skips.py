"""What this host can't run: a skip with code, evidence and remedy, or a failure if required."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from pytest_vmsandbox.errors import HostUnfit
from pytest_vmsandbox.plugin.session import SETTINGS


@contextmanager
def skipping_what_is_unfit(item: pytest.Item) -> Iterator[None]:
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
