"""What a machine cost, step by step, in seconds."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields


@dataclass(slots=True)
class Timings:
    """Seconds of wall clock; None where a step has not been taken.

    `spawn_s` from the VMM's start to its sockets being connected and checked, `boot_s` from
    the guest's first instruction to its agent's hello, `first_command_s` the first command
    from request to result, `teardown_s` from the end being asked for to nothing being left.
    `boot_attempts` counts above one when a boot hung and was tried again.
    """

    spawn_s: float | None = None
    boot_s: float | None = None
    restore_s: float | None = None
    first_command_s: float | None = None
    teardown_s: float | None = None
    boot_attempts: int = 0

    @contextmanager
    def measuring(self, step: str) -> Iterator[None]:
        """Note how long the block takes as `step`, when it succeeds."""
        start = time.perf_counter()
        yield
        setattr(self, step, time.perf_counter() - start)

    def __str__(self) -> str:
        steps = (
            (field.name.removesuffix("_s"), getattr(self, field.name)) for field in fields(self)
        )
        return ", ".join(
            f"{name} {value:.3f} s" if isinstance(value, float) else f"{name} {value}"
            for name, value in steps
            if value is not None
        )
