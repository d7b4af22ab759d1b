"""A pytest session in a process of its own, and what it tells of its tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.session import run_session

TWO_TESTS = """\
import time
import pytest

@pytest.fixture
def slow():
    time.sleep(0.05)
    yield
    time.sleep(0.05)

@pytest.mark.parametrize("number", range(2))
def test_it(slow, number):
    time.sleep(0.1)
"""


@pytest.mark.parametrize("workers", ["0", "2"])
def test_what_a_test_takes_counts_its_fixtures_too(tmp_path: Path, workers: str) -> None:
    session = run_session(tmp_path, TWO_TESTS, "-p", "no:vmsandbox", "-n", workers)

    assert len(session.test_seconds()) == 2
    for test, seconds in zip(session.tests(), session.test_seconds(), strict=True):
        assert [step.step for step in test] == ["setup", "call", "teardown"]
        assert seconds >= 0.2
        assert test[-1].stop - test[0].start >= 0.2
    collected = [step for step in session.steps if step.step == "collected"]
    assert len(collected) == (2 if workers == "2" else 1)
    assert collected[0].stop <= session.tests()[0][0].start


def test_a_session_that_fails_is_no_measurement(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="assert 1 == 2"):
        run_session(tmp_path, "def test_it():\n    assert 1 == 2\n", "-p", "no:vmsandbox")
