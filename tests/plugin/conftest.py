"""Runs of pytest inside a test: with our plugin, in a process of their own."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from platformdirs import user_cache_path

# Found before pytester gives each run a home of its own: images are built once.
CACHE = os.environ.get("VMSANDBOX_CACHE_DIR") or str(user_cache_path("vmsandbox"))


@pytest.fixture(autouse=True)
def _shared_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMSANDBOX_CACHE_DIR", CACHE)
    monkeypatch.delenv("VMSANDBOX_POOL", raising=False)  # a run has it on, as its user's would


@pytest.fixture
def run_pytest(pytester: pytest.Pytester) -> Callable[..., pytest.RunResult]:
    """Run pytest on `source` as a user would, in a process apart from this run."""

    def run(source: str, *arguments: str) -> pytest.RunResult:
        pytester.makepyfile(source)
        return pytester.runpytest_subprocess("-p", "no:cacheprovider", *arguments, timeout=240)

    pytester.makeini("[pytest]\nasyncio_default_fixture_loop_scope = function\n")
    return run
