"""The machine made ahead: what a test waits for it, while tests leave a core idle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Final

from benchmarks.bare_qemu import Floor, machine_config
from benchmarks.measurement import Measurement, Unit, alternate, quotients
from benchmarks.ours import accel_of, open_machine, open_worker, prepared_image
from benchmarks.session import Session, run_session
from benchmarks.setting import Setting

TESTS: Final = 8

# How long each test leaves the host alone, in seconds.
IDLE_S: Final = 0.4

# QEMU is started so often in a round; the median is the round's value.
STARTS: Final = 5

_BENCHMARK: Final = "pool"
_AHEAD: Final = "answered by one made ahead"
_SOURCE: Final = f"""\
import time

import pytest
from benchmarks.stamps import note

@pytest.mark.parametrize("number", range({TESTS}))
def test_it(vm, number):
    vm.run(["true"], check=True)
    note({_AHEAD!r} if vm.timings.from_pool else "answered")
    time.sleep({IDLE_S})
"""


def measure_pool(setting: Setting) -> Sequence[Measurement]:
    """Real pytest sessions with the pool and without it; beside the floor."""
    ahead: list[int] = []
    with open_worker(setting.cache_dir) as worker, setting.scratch() as scratch:
        image, accel = prepared_image(worker), accel_of(worker)
        with open_machine(worker):
            pass  # the template is made
        directory = worker.directory.machine_directory("bench")
        floor = Floor.of(machine_config(worker, image, directory, accel=accel))

        def pooled_ms() -> float:
            session = _session(scratch, setting, pool="on")
            ahead.append(sum(step.step == _AHEAD for step in session.steps))
            return _waited_ms(session)

        milliseconds = alternate(
            {
                "on": pooled_ms,
                "off": lambda: _waited_ms(_session(scratch, setting, pool="off")),
                "floor": lambda: median(floor.to_greeting_ms() for _ in range(STARTS)),
            },
            rounds=setting.rounds,
        )
    made_ahead = f"{sum(ahead)} of {(TESTS - 1) * len(ahead)} machines were made ahead"
    return [
        Measurement(
            benchmark=_BENCHMARK,
            what="what a test waits, with the pool",
            unit=Unit.MILLISECONDS,
            values=milliseconds["on"],
            how=f"from the beginning of its setup to its first run(['true']) done; the median of "
            f"{TESTS - 1} tests of a session, but the first, each idle for {IDLE_S} s; "
            f"{made_ahead}",
            peer="--vm-pool=off",
            peer_values=milliseconds["off"],
        ),
        quotients(
            benchmark=_BENCHMARK,
            what="with the pool / floor",
            ours=milliseconds["on"],
            theirs=milliseconds["floor"],
            how="the floor: QEMU q35 to its greeting, and ended; wanted: at most 0.7",
        ),
    ]


def _session(directory: Path, setting: Setting, *, pool: str) -> Session:
    options = (f"--vm-cache-dir={setting.cache_dir}", f"--vm-pool={pool}", "-p", "no:xdist")
    return run_session(directory, _SOURCE, *options)


def _waited_ms(session: Session) -> float:
    began = [step.start for step in session.steps if step.step == "setup"]
    answered = [step.stop for step in session.steps if step.step.startswith("answered")]
    waited = [stop - start for start, stop in zip(began, answered, strict=True)]
    return median(waited[1:]) * 1000
