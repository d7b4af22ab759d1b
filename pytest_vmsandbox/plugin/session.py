"""What we keep for one pytest process: its settings, and its worker once one is needed."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from pytest_vmsandbox.plugin.options import Settings

if TYPE_CHECKING:
    from pytest_vmsandbox.machine.spec import MachineSpec
    from pytest_vmsandbox.machine.worker import Worker

SETTINGS = pytest.StashKey[Settings]()
_WORKER = pytest.StashKey["Worker"]()


def worker_of(config: pytest.Config) -> Worker:
    """The worker of this process, made on first need and closed with the run."""
    if _WORKER not in config.stash:
        from platformdirs import user_cache_path

        from pytest_vmsandbox.machine.worker import Worker, WorkerSettings
        from pytest_vmsandbox.plugin.progress import TerminalProgress
        from pytest_vmsandbox.vmm.qemu import MachineType

        settings = config.stash[SETTINGS]
        worker = Worker(
            WorkerSettings(
                id=os.environ.get("PYTEST_XDIST_WORKER", "main"),
                cache_dir=settings.cache_dir or user_cache_path("vmsandbox"),
                run_dir=settings.run_dir,
                timeout_scale=settings.timeout_scale,
                host_kernel=settings.host_kernel,
                reprobe=settings.reprobe,
                machine_type=MachineType(settings.machine),
                required=settings.require,
                pool=settings.pool == "on",
                wires=settings.wires,
            ),
            progress=TerminalProgress(config),
        )
        config.stash[_WORKER] = worker
        config.add_cleanup(worker.close)  # if pytest gets no further than that
    return config.stash[_WORKER]


def started_worker(config: pytest.Config) -> Worker | None:
    """The worker if anything needed one."""
    return config.stash.get(_WORKER, None)


def base_spec(config: pytest.Config, image: str) -> MachineSpec:
    """What machines are like where nothing else is said."""
    from pytest_vmsandbox.machine.spec import MachineSpec

    settings = config.stash[SETTINGS]
    return MachineSpec(
        image=image,
        memory_mib=settings.memory_mib,
        cpus=settings.cpus,
        accel=settings.accel,
        tier=settings.tier,
        lifecycle=settings.lifecycle,
    )
