"""Freezing a machine that has booted; and the first machine of a session that finds it frozen."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Final

from benchmarks.measurement import Measurement, Unit
from benchmarks.ours import made, open_worker
from benchmarks.session import Session, run_session
from benchmarks.setting import Setting
from pytest_vmsandbox.image.progress import SilentProgress
from pytest_vmsandbox.machine.build import Build
from pytest_vmsandbox.machine.controller import MachineController
from pytest_vmsandbox.machine.memory import new_memory
from pytest_vmsandbox.machine.templates.cache import TemplateCache
from pytest_vmsandbox.machine.templates.templates import (
    Templates,
    freeze_for_good,
    recipe_of,
    sharing,
)

MEMORY_MIB: Final = 128

_BENCHMARK: Final = "freezing"
_SOURCE: Final = """\
def test_it(vm):
    vm.run(["true"], check=True)
"""


def measure_freezing(setting: Setting) -> Sequence[Measurement]:
    """From a machine that answers to a template on disk; from collected tests to a machine."""
    with open_worker(setting.cache_dir) as worker, setting.scratch() as scratch:
        frozen, kept = [], []
        for number in range(setting.rounds):
            with made(worker, lifecycle="booted", memory_mib=MEMORY_MIB) as controller:
                work = _freeze_ms(controller.build, scratch / str(number))
                frozen_ms, kept_ms = worker.engine.run(work)
                frozen.append(frozen_ms)
                kept.append(kept_ms)
    return [
        Measurement(
            benchmark=_BENCHMARK,
            what="freezing a machine that has booted",
            unit=Unit.MILLISECONDS,
            values=tuple(frozen),
            how=f"{MEMORY_MIB} MiB; the devices' state taken, its VMM ended, its memory sealed",
        ),
        Measurement(
            benchmark=_BENCHMARK,
            what="the same, and kept in the cache",
            unit=Unit.MILLISECONDS,
            values=tuple(kept),
            how="written, with its checksums, and published; wanted: at most 300 ms",
        ),
        _measure_second_session(setting),
    ]


async def _freeze_ms(build: Build, cache_dir: Path) -> tuple[float, float]:
    """Milliseconds from an answering machine to a frozen one, and to a template in a new cache."""
    recipe = recipe_of(build)
    with ExitStack() as stack:
        templates = Templates(
            TemplateCache(cache_dir),
            room=lambda: build.config.directory.parent,
            progress=SilentProgress(),
        )
        stack.callback(templates.close)
        memory = new_memory("benchmark", size=build.config.memory_mib << 20)
        shared = sharing(build, memory)
        machine = MachineController(replace(shared, id=f"{build.id}-t"))
        try:
            await machine.power_on()
            async with templates.making(recipe) as making:
                started = time.perf_counter()
                frozen = await freeze_for_good(machine, memory)
                frozen_s = time.perf_counter() - started
                kept = await templates.publish(making, recipe, frozen)
                kept_s = time.perf_counter() - started
        finally:
            await machine.power_cut()
        if kept.manifest is None:
            raise RuntimeError(f"{cache_dir} does not keep it: {templates.incidents}")
        return frozen_s * 1000, kept_s * 1000


def _measure_second_session(setting: Setting) -> Measurement:
    with setting.scratch() as scratch:

        def session() -> Session:
            options = (f"--vm-cache-dir={setting.cache_dir}", "-p", "no:xdist")
            return run_session(scratch, _SOURCE, *options)

        session()  # the first: it leaves its template in the cache, and byte code
        milliseconds = [_first_machine_ms(session()) for _ in range(setting.rounds)]
    return Measurement(
        benchmark=_BENCHMARK,
        what="the first machine of a second session",
        unit=Unit.MILLISECONDS,
        values=tuple(milliseconds),
        how="a pytest process: from the end of its collection to `vm` being handed over; the "
        "template is read and checked, a warden started; wanted: at most 500 ms",
    )


def _first_machine_ms(session: Session) -> float:
    collected = next(each for each in session.steps if each.step == "collected")
    handed_over = next(each for each in session.steps if each.step == "setup")
    return (handed_over.stop - collected.stop) * 1000
