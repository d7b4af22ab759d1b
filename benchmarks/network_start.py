"""What a network adds to a restored machine, from asking for it to its first answer."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from statistics import median
from typing import Final

from benchmarks.measurement import Measurement, Unit, alternate, quotients
from benchmarks.ours import open_machine
from benchmarks.setting import Setting
from pytest_vmsandbox.machine.worker import Worker

# Machines of each kind in a round; their median is the round's value.
LIVES: Final = 5

_BENCHMARK: Final = "network"


def measure_start(worker: Worker, setting: Setting, *, accel: str) -> Iterator[Measurement]:
    """Machines on a network that nobody else is on, beside machines without one."""
    acts = {
        "with": partial(_start_ms, worker, "alone-here"),
        "without": partial(_start_ms, worker, None),
    }
    for act in acts.values():
        act()  # the templates are made, and the switch has started
    milliseconds = alternate(acts, rounds=setting.rounds)
    how = f"restored, from asking for it to the result of run(['true']); median of {LIVES} a round"
    yield Measurement(
        benchmark=_BENCHMARK,
        what="start of a machine on a network",
        unit=Unit.MILLISECONDS,
        values=milliseconds["with"],
        how=f"{how}; {accel}",
        peer="the same without a network",
        peer_values=milliseconds["without"],
    )
    yield quotients(
        benchmark=_BENCHMARK,
        what="on a network / without (start)",
        ours=milliseconds["with"],
        theirs=milliseconds["without"],
        how="round by round",
    )


def _start_ms(worker: Worker, network: str | None) -> float:
    taken = []
    for _ in range(LIVES):
        started = time.perf_counter()
        with open_machine(worker, network=network) as machine:
            machine.run(["true"], check=True)
            taken.append(time.perf_counter() - started)
    return median(taken) * 1000
