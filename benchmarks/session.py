"""A real pytest session, in a process of its own, and when what was done in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks import stamps

SESSION_S: Final = 300.0
_ROOT: Final = Path(__file__).resolve().parents[1]
_UNWANTED: Final = (
    *("PYTEST_ADDOPTS", "PYTEST_PLUGINS", "PYTEST_XDIST_WORKER", "PYTHONDONTWRITEBYTECODE"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A step of a test, what it noted, or the end of a collection; times since the epoch."""

    process: str
    step: str
    start: float
    stop: float
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """What was done, in the order in which it ended."""

    steps: Sequence[Step]

    def tests(self) -> list[list[Step]]:
        """The steps of each test, in each process by itself."""
        found: list[list[Step]] = []
        for process in sorted({each.process for each in self.steps}):
            found += _tests([each for each in self.steps if each.process == process])
        return found

    def test_seconds(self) -> list[float]:
        """What each test took, set up and torn down."""
        return [sum(step.seconds for step in test) for test in self.tests()]


def run_session(directory: Path, source: str, *options: str) -> Session:
    """Run that test file in a directory of its own; RuntimeError unless every test passes."""
    (directory / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
    (directory / "test_it.py").write_text(source, encoding="utf-8")
    noted = directory / "stamps"
    noted.unlink(missing_ok=True)
    plugins = ("-p", "benchmarks.stamps", "-p", "no:cacheprovider")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *plugins, *options, "test_it.py"],
        check=False,
        cwd=directory,
        env=_environment(directory, noted),
        capture_output=True,
        text=True,
        timeout=SESSION_S,
    )
    if done.returncode != 0:
        raise RuntimeError(f"pytest ended with {done.returncode}: {done.stdout[-3000:]}")
    lines = noted.read_text(encoding="utf-8").splitlines()
    return Session(steps=[Step(**json.loads(line)) for line in lines])


def _tests(steps: Sequence[Step]) -> Iterator[list[Step]]:
    test: list[Step] = []
    for each in steps:
        if each.step in ("setup", "call", "teardown"):
            test.append(each)
        if each.step == "teardown":
            yield test
            test = []


def _environment(directory: Path, noted: Path) -> dict[str, str]:
    """With byte code kept, as Python does unless told otherwise, but not in anyone's folders."""
    inherited = {name: value for name, value in os.environ.items() if name not in _UNWANTED}
    path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
    bytecode = str(directory / "bytecode")
    return {
        **inherited,
        "PYTHONPATH": path,
        "PYTHONPYCACHEPREFIX": bytecode,
        stamps.FILE: str(noted),
    }
