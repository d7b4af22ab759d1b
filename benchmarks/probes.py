"""What this host can do: found out, and remembered."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.measurement import Measurement, Unit, alternate
from benchmarks.setting import Setting
from pytest_vmsandbox.host.survey import probe_host
from pytest_vmsandbox.lease.bases import default_base
from pytest_vmsandbox.lease.run_directory import make_private


def measure_probes(setting: Setting) -> Sequence[Measurement]:
    """All probes together, tried anew; and what a second run pays for the answers."""
    run_dir = default_base()
    make_private(run_dir)
    with setting.scratch() as scratch:
        _probe(scratch, run_dir, reprobe=True)
        milliseconds = alternate(
            {
                "tried": lambda: _probe(scratch, run_dir, reprobe=True),
                "remembered": lambda: _probe(scratch, run_dir, reprobe=False),
            },
            rounds=setting.rounds,
        )
    return [
        Measurement(
            benchmark="probes",
            what=f"all host probes, {side}",
            unit=Unit.MILLISECONDS,
            values=values,
            how="every capability of this host for this user; no kernel is booted",
        )
        for side, values in milliseconds.items()
    ]


def _probe(cache_dir: Path, run_dir: Path, *, reprobe: bool) -> float:
    started = time.perf_counter()
    asyncio.run(probe_host(cache_dir=cache_dir, run_dir=run_dir, reprobe=reprobe))
    return (time.perf_counter() - started) * 1000
