"""How many fresh machines a second two workers get, and what processor time each of them takes."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Final

from benchmarks.cpu_time import TreeClock
from benchmarks.measurement import Measurement, Unit, alternate
from benchmarks.ours import made, open_machine, open_worker
from benchmarks.session import Session, run_session
from benchmarks.setting import Setting
from pytest_vmsandbox.machine.timings import Timings
from pytest_vmsandbox.machine.worker import Worker

TESTS: Final = 60
WORKERS: Final = 2

# Machines whose processor time is added up for one round's value.
LIVES: Final = 6

_BENCHMARK: Final = "throughput"
_SOURCE: Final = f"""\
import pytest

@pytest.mark.parametrize("number", range({TESTS}))
def test_it(vm, number):
    vm.run(["true"], check=True)
"""


def measure_throughput(setting: Setting) -> Sequence[Measurement]:
    """Tests a second in real pytest-xdist sessions; processor time in one worker, by phase."""
    phases: dict[str, list[float]] = defaultdict(list)
    with open_worker(setting.cache_dir) as worker:
        with open_machine(worker):
            pass  # the template is made, the worker's warden has started
        for _ in range(setting.rounds):
            for phase, seconds in _phases_of(worker).items():
                phases[phase].append(seconds * 1000)
    with setting.scratch() as scratch:
        options = ("-n", str(WORKERS), f"--vm-cache-dir={setting.cache_dir}")

        def rate(pool: str) -> float:
            return _rate(run_session(scratch, _SOURCE, *options, f"--vm-pool={pool}"))

        rates = alternate(
            {"off": lambda: rate("off"), "on": lambda: rate("on")}, rounds=setting.rounds
        )
    whole_ms = median(phases["whole"])
    limit = (os.cpu_count() or 1) / (whole_ms / 1000)
    return [
        Measurement(
            benchmark=_BENCHMARK,
            what=f"fresh machines a second, -n {WORKERS}",
            unit=Unit.PER_SECOND,
            values=rates["on"],
            how=f"{TESTS} tests of a pytest-xdist session, each with its own machine and one "
            f"command, but for each worker's first; wanted: at least 12; {os.cpu_count()} "
            f"processors have time for {limit:.1f}, at {whole_ms:.0f} ms a machine",
        ),
        Measurement(
            benchmark=_BENCHMARK,
            what=f"fresh machines a second, -n {WORKERS} --vm-pool=off",
            unit=Unit.PER_SECOND,
            values=rates["off"],
            how="the same, none of them made ahead",
        ),
        *_shown(phases),
    ]


def _shown(phases: dict[str, list[float]]) -> Iterator[Measurement]:
    for phase, values in phases.items():
        yield Measurement(
            benchmark=_BENCHMARK,
            what=f"processor time of a machine, {phase}",
            unit=Unit.MILLISECONDS,
            values=tuple(values),
            how=f"all processes of a worker together: Python, warden, VMM; mean of {LIVES} a round",
        )


def _rate(session: Session) -> float:
    """Tests a second, without each worker's first: it starts a warden and reads the template."""
    by_process: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for test in session.tests():
        by_process[test[0].process].append((test[0].start, test[-1].stop))
    later = [span for spans in by_process.values() for span in sorted(spans)[1:]]
    began, ended = min(start for start, _ in later), max(stop for _, stop in later)
    return len(later) / (ended - began)


@dataclass(slots=True)
class CpuTimings(Timings):
    """Timings that also note the processor time of each step, of all our processes."""

    clock: TreeClock = field(default_factory=TreeClock)
    spent: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def measuring(self, step: str) -> Iterator[None]:
        """The same, and the processor time."""
        before = self.clock.seconds()
        with Timings.measuring(self, step):
            yield
        self.spent[step] = self.clock.seconds() - before


def _phases_of(worker: Worker) -> dict[str, float]:
    """The mean processor time of a machine's phases."""
    names = {"spawn_s": "spawn", "load_s": "load", "restore_s": "load and ready"}
    spent: dict[str, float] = defaultdict(float)
    clock = TreeClock()
    for _ in range(LIVES):
        before = clock.seconds()
        with made(worker) as controller:
            timings = controller.timings = CpuTimings(clock=clock)
            worker.engine.run(worker.boot([controller]))
            ready = clock.seconds()
            worker.engine.run(controller.run(["true"], check=True))
            ran = clock.seconds()
        ended = clock.seconds()
        for step, name in names.items():
            if step in timings.spent:
                spent[name] += timings.spent[step]
        spent["first command"] += ran - ready
        spent["teardown"] += ended - ran
        spent["whole"] += ended - before
    return {name: seconds / LIVES for name, seconds in spent.items()}
