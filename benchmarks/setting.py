"""The setting of a run of benchmarks: rounds, cache, and what this host is."""

from __future__ import annotations

import os
import platform
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What every benchmark is given. `say` tells people what goes on now."""

    rounds: int
    cache_dir: Path
    say: Callable[[str], None]

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A new directory on the file system of the cache, removed with the block."""
        parent = self.cache_dir / "benchmarks"
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="scratch-", dir=parent) as directory:
            yield Path(directory)


@dataclass(frozen=True, slots=True, kw_only=True)
class HostDescription:
    """What the figures were measured on; without it they mean nothing."""

    processor: str
    processors: int
    kernel: str
    distribution: str
    python: str
    qemu: str
    load: tuple[float, float, float]

    @classmethod
    def of_this_host(cls) -> HostDescription:
        """As it is now."""
        return cls(
            processor=_processor(),
            processors=os.cpu_count() or 1,
            kernel=platform.release(),
            distribution=_distribution(),
            python=platform.python_version(),
            qemu=_qemu(),
            load=os.getloadavg(),
        )

    def __str__(self) -> str:
        load = " ".join(f"{value:.1f}" for value in self.load)
        return (
            f"{self.processors} x {self.processor}, Linux {self.kernel}, {self.distribution}, "
            f"Python {self.python}, {self.qemu}, load {load}"
        )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _distribution() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", platform.system())
    except OSError:
        return platform.system()


def _qemu() -> str:
    program = f"qemu-system-{platform.machine()}"
    try:
        said = subprocess.run(
            [program, "--version"], check=True, capture_output=True, text=True, timeout=20
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return "no QEMU"
    return said.splitlines()[0].partition("(")[0].strip()
