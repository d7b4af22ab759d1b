"""Our side: a machine as the plugin makes it, without pytest around it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from pytest_vmsandbox.image.image import Image
from pytest_vmsandbox.machine.controller import MachineController
from pytest_vmsandbox.machine.machine import Machine
from pytest_vmsandbox.machine.spec import MachineSpec
from pytest_vmsandbox.machine.worker import Worker, WorkerSettings
from pytest_vmsandbox.network.wire_kind import AUTO


@contextmanager
def open_worker(cache_dir: Path, *, wires: str = AUTO) -> Iterator[Worker]:
    """A worker that has acquired nothing yet."""
    settings = WorkerSettings(id="bench", cache_dir=cache_dir, wires=wires)
    with closing(Worker(settings)) as worker:
        yield worker


@contextmanager
def open_machine(worker: Worker, **wishes: Any) -> Iterator[Machine]:
    """A machine of that shape that answers, restored if nothing else is asked for; ended after."""
    with made(worker, **wishes) as controller:
        worker.engine.run(worker.boot([controller]))
        yield Machine(controller, worker.engine)


def prepared_image(worker: Worker) -> Image:
    """The default image, built before any clock runs."""
    return worker.engine.run(worker.image("mini"))


def accel_of(worker: Worker) -> str:
    """What `auto` means here, settled as the first machine settles it."""
    with made(worker, lifecycle="booted") as controller:
        return controller.facts.accel


@contextmanager
def made(worker: Worker, **wishes: Any) -> Iterator[MachineController]:
    """A machine of that shape that is not powered on yet; ended with the block, and its twins."""
    held: list[MachineController] = []
    (controller,) = worker.engine.run(
        worker.make([MachineSpec().changed(wishes)], hold=held.append)
    )
    try:
        yield controller
    finally:
        worker.engine.run(worker.end(held))
