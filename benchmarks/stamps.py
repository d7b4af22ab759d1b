"""A pytest plugin that notes when what was done: `-p benchmarks.stamps`, the file by environment.

It imports nothing of ours, so that runs without us can be measured by it too.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Final

import pytest

FILE: Final = "BENCHMARKS_STAMPS"


def pytest_collection_finish() -> None:
    """Note the end of the collection."""
    note("collected")


def pytest_runtest_makereport(call: pytest.CallInfo[object]) -> None:
    """Note a step of a test: setup, call or teardown."""
    _write({"step": call.when, "start": call.start, "stop": call.stop, "seconds": call.duration})


def note(step: str) -> None:
    """Note that a test has come so far; for tests themselves."""
    now = time.time()
    _write({"step": step, "start": now, "stop": now, "seconds": 0.0})


def _write(stamp: dict[str, object]) -> None:
    process = os.environ.get("PYTEST_XDIST_WORKER", "main")
    line = json.dumps({"process": process, **stamp}) + "\n"
    # One short write that appends: xdist's workers share the file.
    with Path(os.environ[FILE]).open("a", encoding="utf-8") as file:
        file.write(line)
