"""What restored machines take of the host's memory while they idle."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from benchmarks.measurement import Measurement, Unit
from benchmarks.ours import made, open_worker
from benchmarks.setting import Setting
from pytest_vmsandbox.errors import HostUnfit
from pytest_vmsandbox.machine.controller import MachineController
from pytest_vmsandbox.machine.worker import Worker

MACHINES: Final = 10
MEMORY_MIB: Final = 128

# How long they are left alone before they are looked at.
IDLE_S: Final = 1.0

_BENCHMARK: Final = "memory"

# The first line of a mapping in proc(5), smaps: addresses, rights, offset, device, inode, path.
_MAPPING: Final = re.compile(r"^[0-9a-f]+-[0-9a-f]+ ")


def measure_memory(setting: Setting) -> Sequence[Measurement]:
    """PSS of ten VMMs; and the same with all of the template, also what none of them has mapped."""
    with open_worker(setting.cache_dir) as worker:
        seen = [_look(worker) for _ in range(setting.rounds)]
    together = MACHINES * MEMORY_MIB
    pss, whole = [pss for pss, _ in seen], [whole for _, whole in seen]
    alone = f"PSS of {MACHINES} VMMs, idle for {IDLE_S:.0f} s: what several map counts once"
    return [
        _row(f"{MACHINES} restored machines", pss, unit=Unit.MEBIBYTES, how=alone),
        _row(
            f"{MACHINES} restored machines, of {MACHINES} x {MEMORY_MIB} MiB",
            [100 * mib / together for mib in pss],
            unit=Unit.PERCENT,
            how="the same; wanted: less than 25 %",
        ),
        _row(
            f"{MACHINES} restored machines and their whole template",
            whole,
            unit=Unit.MEBIBYTES,
            how="the same with those pages of the template, once, that none of them maps",
        ),
    ]


def _row(what: str, values: Sequence[float], *, unit: Unit, how: str) -> Measurement:
    return Measurement(
        benchmark=_BENCHMARK,
        what=what,
        unit=unit,
        values=tuple(values),
        how=how,
    )


def _look(worker: Worker) -> tuple[float, float]:
    """MiB that the VMMs take; and MiB with the whole template."""
    with ExitStack() as stack:
        machines = [
            stack.enter_context(made(worker, memory_mib=MEMORY_MIB)) for _ in range(MACHINES)
        ]
        frozen = machines[0].build.frozen
        if frozen is None:
            raise RuntimeError("these machines are not restored")
        worker.engine.run(worker.boot(machines))
        time.sleep(IDLE_S)
        counted = [_pss_kib(machine) for machine in machines]
        pss = sum(whole for whole, _ in counted) / 1024
        mapped = sum(of_template for _, of_template in counted) / 1024
        template = os.fstat(frozen.memory).st_blocks * 512 / (1 << 20)
    return pss, pss - mapped + template


def _pss_kib(machine: MachineController) -> tuple[int, int]:
    """PSS of its VMM, and of that what is the template's still, not copied; proc(5), smaps.

    HostUnfit where this user may not see it.
    """
    path = Path(f"/proc/{machine.running.process.pid}/smaps")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except PermissionError as error:
        raise HostUnfit(
            "VMS-PSS-DENIED", "to see a VMM's memory", str(error), "run it as root"
        ) from None
    whole = of_template = 0
    in_template = False
    for line in lines:
        if _MAPPING.match(line):
            in_template = "/memfd:" in line
        elif line.startswith("Pss:"):
            whole += int(line.split()[1])
            of_template += int(line.split()[1]) if in_template else 0
        elif line.startswith("Anonymous:") and in_template:
            of_template -= int(line.split()[1])  # copied when it was written
    return whole, of_template
