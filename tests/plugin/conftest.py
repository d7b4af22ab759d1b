"""Runs of pytest inside a test: with our plugin, in a process of their own."""

from __future__ import annotations

from collections.abc import Callable

import pytest


@pytest.fixture
def run_pytest(pytester: pytest.Pytester) -> Callable[..., pytest.RunResult]:
    """Run pytest on `source` as a user would, apart from this run; worker="2" for xdist."""

    def run(source: str, *arguments: str) -> pytest.RunResult:
        pytester.makepyfile(source)
        return pytester.runpytest_subprocess("-p", "no:cacheprovider", *arguments, timeout=240)

    pytester.makeini("[pytest]\nasyncio_default_fixture_loop_scope = function\n")
    return run
