"""The caller: a test that waits for its machine, and what it has been told."""

from __future__ import annotations

from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from pytest_vmsandbox.deadline import Deadline
from pytest_vmsandbox.errors import MachineFailed
from pytest_vmsandbox.machine.controller import MachineController
from pytest_vmsandbox.machine.engine import Engine

T = TypeVar("T")


class Caller:
    """Runs a machine's work on the engine, and notes when a test is told of its failure."""

    def __init__(self, controller: MachineController, engine: Engine) -> None:
        self.controller = controller
        self._engine = engine

    def deadline(self, timeout: float | None) -> Deadline:
        """`timeout` seconds from now, scaled to the host's speed; None never comes."""
        return Deadline.after(
            seconds=None if timeout is None else self.controller.seconds(timeout, timeout)
        )

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`; the calling thread waits."""
        with self._telling():
            return self._engine.run(work)

    async def bridge(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, awaited on whatever loop."""
        with self._telling():
            return await self._engine.bridge(work)

    @contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except MachineFailed:
            if self.controller.failure is not None:
                self.controller.failure_was_told = True
            raise
