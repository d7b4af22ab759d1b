"""A machine of the command line's own, as its arguments describe it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager

from rich.console import Console

from pytest_vmsandbox.cli.arguments import cache_of, lifecycle_of, run_dir_of, tier_of
from pytest_vmsandbox.cli.progress import RichProgress
from pytest_vmsandbox.errors import visible
from pytest_vmsandbox.machine.controller import MachineController
from pytest_vmsandbox.machine.engine import Engine
from pytest_vmsandbox.machine.spec import MachineSpec
from pytest_vmsandbox.machine.worker import Worker, WorkerSettings


@contextmanager
def open_machine(arguments: argparse.Namespace) -> Iterator[tuple[MachineController, Engine]]:
    """A fresh machine as the arguments describe it, and the engine it lives on."""
    spec = MachineSpec(
        image=arguments.image,
        memory_mib=arguments.memory_mib,
        cpus=arguments.cpus,
        accel=arguments.accel,
        tier=tier_of(arguments),
        lifecycle=lifecycle_of(arguments),
    )
    settings = WorkerSettings(
        id="cli", cache_dir=cache_of(arguments), run_dir=run_dir_of(arguments)
    )
    with RichProgress(Console(stderr=True)) as progress:
        worker = Worker(settings, progress=progress)
        with closing(worker):
            (controller,) = worker.engine.run(worker.make([spec]))
            try:
                worker.engine.run(worker.boot([controller]))
                progress.hide()
                for incident in worker.incidents:
                    sys.stderr.write(f"vmsandbox: {visible(incident)}\n")
                yield controller, worker.engine
            finally:
                worker.engine.run(worker.end([controller]))
