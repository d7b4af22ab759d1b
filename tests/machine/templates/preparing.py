"""Preparing templates in tests: a builder that counts, and machines out of what it made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pytest_vmsandbox import Machine, Template, TemplateBuilder
from pytest_vmsandbox.machine.controller import MachineController
from pytest_vmsandbox.machine.spec import MachineSpec
from pytest_vmsandbox.machine.templates.shelf import NAME
from pytest_vmsandbox.machine.worker import Worker


class Builder(TemplateBuilder):
    """A builder that counts the machines that it prepares, and sees that each one is ended."""

    def __init__(self, worker: Worker) -> None:
        super().__init__(worker, MachineSpec(), on_machine=self._count)
        self.prepared: list[MachineController] = []
        self.ended = 0

    def _count(self, machine: MachineController) -> Callable[[], None]:
        self.prepared.append(machine)
        return self._end_of_one

    def _end_of_one(self) -> None:
        self.ended += 1


class Restored:
    """A machine out of a template, for a `with`."""

    def __init__(self, worker: Worker, template: Template | str, **wishes: object) -> None:
        self._worker = worker
        spec = MachineSpec().changed({"template": template, **wishes})
        (self._controller,) = worker.engine.run(worker.make([spec]))

    def __enter__(self) -> Machine:
        self._worker.engine.run(self._worker.boot([self._controller]))
        return Machine(self._controller, self._worker.engine)

    def __exit__(self, *_: object) -> None:
        self._worker.engine.run(self._worker.end([self._controller]))


def require_made_once(builders: Sequence[Builder], **wishes: Any) -> None:
    """Have all of them build the same at the same time: one makes it, the others wait for it."""
    with ThreadPoolExecutor(len(builders)) as threads:
        building = [threads.submit(builder.build, **wishes) for builder in builders]
        made = {each.result().digest for each in building}

    assert sum(len(builder.prepared) for builder in builders) == 1
    assert len(made) == 1


def names_in(cache_dir: Path) -> set[str]:
    """What lies there beside templates, and their names."""
    directory = cache_dir / NAME
    return {path.name for path in directory.iterdir()} if directory.is_dir() else set()
