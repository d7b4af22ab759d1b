"""Copies of a machine that runs: twins beside it, and snapshots that it goes back to."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

from benchmarks.measurement import Measurement, Unit
from benchmarks.ours import open_machine, open_worker
from benchmarks.setting import Setting
from pytest_vmsandbox.machine.machine import Machine
from pytest_vmsandbox.machine.worker import Worker

T = TypeVar("T")

MEMORY_MIB: Final = 256
TWINS: Final = 4

# What the guest has written to its memory where it is said to be filled.
FILLED_MIB: Final = 96

_BENCHMARK: Final = "fork"
_VERBS: Final = (
    (f"vm.fork({TWINS})", "from the call until all twins answer; wanted: at most 1000 ms"),
    ("vm.snapshot()", "from the call to its return; the machine goes on"),
    ("vm.restore(snapshot)", "from the call until it answers"),
)


def measure_fork(setting: Setting) -> Sequence[Measurement]:
    """Fork, snapshot and restore, of an idle machine and of one that has much in its memory."""
    measured: list[Measurement] = []
    with open_worker(setting.cache_dir) as worker:
        with open_machine(worker, memory_mib=MEMORY_MIB):
            pass  # the template is made, the worker's warden has started
        for filled in (False, True):
            rounds = [_copy_ms(worker, filled=filled) for _ in range(setting.rounds)]
            machine = f"{MEMORY_MIB} MiB, {f'{FILLED_MIB} of them filled' if filled else 'idle'}"
            measured += [
                Measurement(
                    benchmark=_BENCHMARK,
                    what=f"{what}, {machine}",
                    unit=Unit.MILLISECONDS,
                    values=values,
                    how=how,
                )
                for (what, how), values in zip(_VERBS, zip(*rounds, strict=True), strict=True)
            ]
    return measured


def _copy_ms(worker: Worker, *, filled: bool) -> tuple[float, float, float]:
    """Milliseconds of the verbs, in their order."""
    with open_machine(worker, memory_mib=MEMORY_MIB) as machine:
        if filled:
            size = f"bs=1M count={FILLED_MIB}"
            machine.run(f"dd if=/dev/urandom of=/dev/shm/filler {size}", check=True)
        machine.run("echo kept > /run/kept", check=True)
        twins, forked_ms = _timed(lambda: machine.fork(TWINS))
        snapshot, taken_ms = _timed(machine.snapshot)
        _, restored_ms = _timed(lambda: machine.restore(snapshot))
        for each in (machine, *twins):
            _require_kept(each)
    return forked_ms, taken_ms, restored_ms


def _timed(act: Callable[[], T]) -> tuple[T, float]:
    started = time.perf_counter()
    result = act()
    return result, (time.perf_counter() - started) * 1000


def _require_kept(machine: Machine) -> None:
    if (seen := machine.read_text("/run/kept")) != "kept\n":
        raise RuntimeError(f"{machine.name} is no copy: {seen!r}")
