"""What a network adds to a restored machine, from asking for it to its first answer."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from functools import partial
from statistics import median
from typing import Final

from benchmarks.measurement import Act, Measurement, Unit, alternate
from benchmarks.ours import open_machine
from benchmarks.setting import Setting
from pytest_vmsandbox.machine.worker import Worker
from pytest_vmsandbox.network.wire_kind import WireKind

# Machines of each kind in a round; their median is the round's value.
LIVES: Final = 5

_BENCHMARK: Final = "network"


def measure_start(
    workers: Mapping[WireKind, Worker], setting: Setting, *, accel: str
) -> Iterator[Measurement]:
    """Machines on a network that nobody else is on, beside machines without one.

    `workers` are by the kind of wires that their networks are of.
    """
    acts: dict[str, Act] = {
        str(kind): partial(_start_ms, worker, "empty") for kind, worker in workers.items()
    }
    anyone = next(iter(workers.values()))
    everyone: dict[str, Act] = {**acts, "without": partial(_start_ms, anyone, None)}
    for act in everyone.values():
        act()  # the templates are made, and the switches have started
    milliseconds = alternate(everyone, rounds=setting.rounds)
    how = f"restored, from asking for it to the result of run(['true']); median of {LIVES} a round"
    for kind in acts:
        yield Measurement(
            benchmark=_BENCHMARK,
            what=f"start of a machine on a network, {kind}",
            unit=Unit.MILLISECONDS,
            values=milliseconds[kind],
            how=f"{how}; {accel}",
            peer="the same without a network",
            peer_values=milliseconds["without"],
        )


def _start_ms(worker: Worker, network: str | None) -> float:
    taken = []
    for _ in range(LIVES):
        started = time.perf_counter()
        with open_machine(worker, network=network) as machine:
            machine.run(["true"], check=True)
            taken.append(time.perf_counter() - started)
    return median(taken) * 1000
