"""What a machine cost, step by step, in seconds."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(slots=True)
class Timings:
    """Seconds of wall clock; None where a step has not been taken.

    `spawn_s` from the VMM's start to its sockets being connected and checked, `boot_s` from
    the guest's first instruction to its agent's hello, `restore_s` from the frozen state being
    handed over to the guest having an identity of its own, of which `load_s` is until it runs;
    `first_command_s` the first command from request to result, `teardown_s` from the end being
    asked for to nothing being left. A machine has a `boot_s`, a `restore_s`, or both if it was
    restored and powered on again later. `boot_attempts` counts above one when a boot hung and was
    tried again. `waited_s` is what its test waited until it had it. With `from_pool` it was started
    ahead: no test waited for the steps until then, and the total counts `waited_s` in their place.
    `capture_s` is how long its latest snapshot or fork took to take it in, about as long as its
    guest stood still; it is no part of the total.
    """

    spawn_s: float | None = None
    boot_s: float | None = None
    load_s: float | None = None
    restore_s: float | None = None
    first_command_s: float | None = None
    capture_s: float | None = None
    teardown_s: float | None = None
    waited_s: float | None = None
    boot_attempts: int = 0
    from_pool: bool = False

    @property
    def total_s(self) -> float:
        """All that has been measured so far and a test waited for, together."""
        until_ready = (self.spawn_s, self.boot_s, self.restore_s)
        steps: tuple[float | None, ...] = (
            *((self.waited_s,) if self.from_pool else until_ready),
            *(self.first_command_s, self.teardown_s),
        )
        return sum(step for step in steps if step is not None)

    @contextmanager
    def measuring(self, step: str) -> Iterator[None]:
        """Note how long the block takes as `step`, when it succeeds."""
        start = time.perf_counter()
        yield
        setattr(self, step, time.perf_counter() - start)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count what the block takes as time that a test waits for the machine."""
        start = time.perf_counter()
        yield
        self.waited_s = (self.waited_s or 0) + time.perf_counter() - start

    def __str__(self) -> str:
        ready_s = None
        if self.load_s is not None and self.restore_s is not None:
            ready_s = self.restore_s - self.load_s
        restored = {"load": self.load_s, "ready": ready_s}
        steps = {
            "spawn": self.spawn_s,
            "boot": self.boot_s,
            **(restored if ready_s is not None else {"restore": self.restore_s}),
            "first command": self.first_command_s,
            "teardown": self.teardown_s,
        }
        shown = [f"{name} {value:.3f} s" for name, value in steps.items() if value is not None]
        if self.boot_attempts > 1:
            shown.append(f"{self.boot_attempts} boot attempts")
        if self.from_pool:
            waited = "" if self.waited_s is None else f", waited {self.waited_s:.3f} s"
            shown.append(f"from the pool{waited}")
        return ", ".join(shown)
