"""Building the default image, its packages being there."""

from __future__ import annotations

import os
import platform
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.measurement import Measurement, Unit, alternate
from benchmarks.ours import open_worker, prepared_image
from benchmarks.setting import Setting
from pytest_vmsandbox.guest.compiler import agent_binary
from pytest_vmsandbox.image.cache import ensure_image
from pytest_vmsandbox.image.progress import SilentProgress


def measure_image(setting: Setting) -> Sequence[Measurement]:
    """A whole build; and one on a kernel that is known, as after a change of the agent."""
    with open_worker(setting.cache_dir) as worker:
        prepared_image(worker)  # downloads what is missing
    agent = agent_binary(architecture=platform.machine(), cache_dir=setting.cache_dir)
    with setting.scratch() as scratch:
        _borrow(setting.cache_dir / "packages", scratch / "packages")
        seconds = alternate(
            {
                "whole": lambda: _build(scratch, agent, without=("images", "layers")),
                "known kernel": lambda: _build(scratch, agent, without=("images",)),
            },
            rounds=setting.rounds,
        )
    how = "packages downloaded, in a cache directory of its own"
    return [
        Measurement(benchmark="image", what=what, unit=Unit.SECONDS, values=seconds[side], how=how)
        for what, side in (
            ("building mini", "whole"),
            ("building mini on a known kernel", "known kernel"),
        )
    ]


def _build(cache_dir: Path, agent: Path, *, without: Sequence[str]) -> float:
    for name in without:
        shutil.rmtree(cache_dir / name, ignore_errors=True)
    started = time.perf_counter()
    ensure_image("mini", cache_dir=cache_dir, agent=agent, progress=SilentProgress())
    return time.perf_counter() - started


def _borrow(packages: Path, into: Path) -> None:
    into.mkdir()
    for path in packages.iterdir():
        if path.is_file():
            os.link(path, into / path.name)
