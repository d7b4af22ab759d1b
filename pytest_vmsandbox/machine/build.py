"""What a machine is made of, decided before it is started; and what it then is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

from pytest_vmsandbox.machine.disk_plan import DiskPlan
from pytest_vmsandbox.machine.frozen import Frozen
from pytest_vmsandbox.machine.living import Living
from pytest_vmsandbox.machine.wires import LooseWires, Wires
from pytest_vmsandbox.vmm.launch import Launcher
from pytest_vmsandbox.vmm.qemu import QemuConfig

if TYPE_CHECKING:
    from pytest_vmsandbox.machine.controller import MachineController


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineFacts:
    """What a machine is, for reports: acceleration, tier, image, versions, and where it came from.

    `wires` is what its cards are plugged into, `tap` or `socket`; empty where it has none.
    `lifecycle` is `restored` while its guest is one that came out of a template, which then has
    a `restore_id` like no other; a guest that booted is `booted` and has none.
    """

    accel: str
    tier: str
    image: str
    image_digest: str
    kernel: str
    vmm_version: str
    lifecycle: str
    restore_id: str
    wires: str = ""


class Nursery(Protocol):
    """Where a machine's twins come to be, and what becomes of them."""

    async def twins(self, build: Build, frozen: Frozen, *, count: int) -> list[MachineController]:
        """Machines of that build but for their names, not powered on yet.

        Whoever holds the machine holds them from here on, and ends them with it.
        """

    async def boot(self, machines: Sequence[MachineController]) -> None:
        """Power them on; when one fails, the others are given up."""

    async def end(self, machines: Sequence[MachineController]) -> None:
        """End them for good."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """All that a machine is made of, decided before it is started.

    `living` are the machines of its worker that are on, or are being powered on, which it joins.
    """

    id: str
    config: QemuConfig
    launcher: Launcher
    tier: str
    image: str
    image_digest: str
    time_scale: float
    qemu_version: str
    disks: Sequence[DiskPlan] = ()
    frozen: Frozen | None = None
    nursery: Nursery | None = None
    clock: str = "host"
    wires: Wires = field(default_factory=LooseWires)
    living: Living = field(default_factory=Living, compare=False, repr=False)

    def restored_from(self, frozen: Frozen) -> Build:
        """The same machine, but restored: memory and disks begin as they were frozen."""
        return replace(self, frozen=frozen, disks=frozen.disks.under(self.disks))
