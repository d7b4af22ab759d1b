"""What a machine is made of, decided before it is started; and what it then is."""

from __future__ import annotations

from dataclasses import dataclass

from pytest_vmsandbox.machine.frozen import Frozen
from pytest_vmsandbox.vmm.launch import Launcher
from pytest_vmsandbox.vmm.qemu import QemuConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineFacts:
    """What a machine is: acceleration, tier, image and versions, for reports."""

    accel: str
    tier: str
    image: str
    image_digest: str
    kernel: str
    vmm_version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """All that a machine is made of, decided before it is started."""

    id: str
    config: QemuConfig
    launcher: Launcher
    tier: str
    image: str
    image_digest: str
    time_scale: float
    frozen: Frozen | None = None
