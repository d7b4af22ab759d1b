"""A worker: one xdist worker's engine, run directory, images and machines.

The one place that introduces the rooms to each other.
"""

from __future__ import annotations

import asyncio
import os
import platform
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import count
from pathlib import Path

from pytest_vmsandbox.errors import RequestInvalid
from pytest_vmsandbox.guest.compiler import agent_binary
from pytest_vmsandbox.host.facts import Capability, HostFacts, Tier, Verdict
from pytest_vmsandbox.host.survey import probe_host, settle_kvm
from pytest_vmsandbox.host.tier import require_tier, require_walls
from pytest_vmsandbox.image.cache import ensure_image
from pytest_vmsandbox.image.image import Image
from pytest_vmsandbox.image.progress import Progress, SilentProgress
from pytest_vmsandbox.jail.mount_points import remove_abandoned_mount_points
from pytest_vmsandbox.jail.sandbox.config import SandboxConfig
from pytest_vmsandbox.jail.sandbox.run import Ended, run_in
from pytest_vmsandbox.lease.bases import bases_to_reap, default_base, settled
from pytest_vmsandbox.lease.entries import ProcessEntry, Role
from pytest_vmsandbox.lease.leftover import Leftover
from pytest_vmsandbox.lease.run_directory import (
    RunDirectory,
    make_private,
    open_run_directory,
)
from pytest_vmsandbox.machine.build import Build
from pytest_vmsandbox.machine.controller import MachineController
from pytest_vmsandbox.machine.disk_plan import plan_disks
from pytest_vmsandbox.machine.engine import Engine
from pytest_vmsandbox.machine.gateway_launcher import (
    Gateway,
    open_bare_gateway,
    open_walled_gateway,
)
from pytest_vmsandbox.machine.lifecycles import Lifecycles
from pytest_vmsandbox.machine.living import Living
from pytest_vmsandbox.machine.networks import Networks
from pytest_vmsandbox.machine.nursery import Hold, WorkerNursery
from pytest_vmsandbox.machine.pool import Pool
from pytest_vmsandbox.machine.recorded import RecordedLauncher
from pytest_vmsandbox.machine.spec import MachineSpec
from pytest_vmsandbox.machine.switch_launcher import open_bare_switch, open_walled_switch
from pytest_vmsandbox.machine.templates.cache import TemplateCache
from pytest_vmsandbox.machine.templates.layer import Template
from pytest_vmsandbox.machine.templates.templates import Templates
from pytest_vmsandbox.machine.turn import take_turn
from pytest_vmsandbox.machine.warden_launcher import WardenLauncher
from pytest_vmsandbox.machine.wardens import Wardens, accel_behind_walls
from pytest_vmsandbox.machine.wires import LooseWires, PluggedWires
from pytest_vmsandbox.network.client import SwitchLine
from pytest_vmsandbox.network.topology import NAT
from pytest_vmsandbox.network.wire_kind import AUTO
from pytest_vmsandbox.vmm.bare import BareLauncher
from pytest_vmsandbox.vmm.launch import Launcher
from pytest_vmsandbox.vmm.qemu import MODULES_SERIAL, MachineType, QemuConfig
from pytest_vmsandbox.warden.client import Warden


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """What a worker is told; `id` is the xdist worker's name, at most 8 characters long.

    `required` are capabilities that no machine may do without, though it asked for `auto`: with
    `jail` among them none runs in the tier bare, with `kvm` none is emulated. Without `pool` none
    is started before it is asked for. `wires` is what networks are made of, one of WISHES.
    """

    cache_dir: Path
    id: str = "main"
    run_dir: Path | None = None
    timeout_scale: float = 1.0
    host_kernel: Path | None = None
    reprobe: bool = False
    machine_type: MachineType = MachineType.Q35
    required: frozenset[str] = frozenset()
    pool: bool = True
    wires: str = AUTO


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """What one machine has and no other: its id on this host, its name, its directory."""

    id: str
    name: str
    directory: Path


class Worker:
    """Makes machines. Everything is acquired on first need and given back by `close`."""

    def __init__(self, settings: WorkerSettings, *, progress: Progress | None = None) -> None:
        self.settings = settings
        self.engine = Engine()
        self._progress = progress or SilentProgress()
        self._acquired = ExitStack()
        self._numbers = count(1)
        self.names: set[str] = set()
        self._images: dict[str, Image] = {}
        self._preparing = asyncio.Lock()
        # More boots at once than processors only make each of them slower.
        self._booting = asyncio.Semaphore(os.cpu_count() or 1)
        self._facts: HostFacts | None = None
        self._wardens = Wardens()
        self._entering = asyncio.Lock()
        self.networks = Networks(self._open_switch, self._open_gateway, wish=settings.wires)
        # Those that tests prepared, by name.
        self.prepared: dict[str, Template] = {}
        self.templates = Templates(
            TemplateCache(settings.cache_dir),
            room=lambda: self.directory.path,
            progress=self._progress,
        )
        self._lifecycles = Lifecycles(self.templates)
        self._pool = Pool(self._make_ahead, turn=partial(take_turn, settings.cache_dir))
        self._made: list[MachineSpec] = []
        self._living = Living()

    @property
    def facts(self) -> HostFacts:
        """What this host can do; probed on first use, or remembered from this boot of it."""
        if self._facts is None:
            return self.engine.run(self._known_facts())
        return self._facts

    @cached_property
    def directory(self) -> RunDirectory:
        """The run directory, made and locked on first use; what dead runs left is undone."""
        directory = self._acquired.enter_context(
            open_run_directory(self._base, worker=self.settings.id)
        )
        refused = {leftover.path for leftover in directory.leftovers}
        for base in bases_to_reap(settled(self._base)):
            if base not in refused:
                directory.leftovers.extend(remove_abandoned_mount_points(base=base))
        return directory

    @property
    def leftovers(self) -> Sequence[Leftover]:
        """What earlier runs, or this one at its end, had to leave in place."""
        return self.directory.leftovers if "directory" in vars(self) else ()

    @property
    def incidents(self) -> Sequence[str]:
        """What went wrong and was made good, for the summary."""
        lost = (*self._wardens.lost, *self.networks.lost)
        return (*lost, *self._lifecycles.incidents, *self._living.incidents)

    async def make(
        self, specs: Sequence[MachineSpec], *, hold: Hold = lambda _: None
    ) -> list[MachineController]:
        """Machines of these shapes, not powered on yet but for one that was started ahead.

        `hold` is told of each, and later of their twins, before it is powered on.
        Raises HostUnfit where this host can't have one, RequestInvalid for what can't be.
        """
        self._made.extend(spec for spec in specs if spec not in self._made)
        nursery = WorkerNursery(self, hold)
        made = []
        for spec in specs:
            began = time.perf_counter()
            machine = await self._pool.take(spec) or await self._make(spec)
            machine.timings.waited_s = time.perf_counter() - began
            machine.build = replace(machine.build, nursery=nursery)
            hold(machine)
            made.append(machine)
        return made

    async def foresee(self, spec: MachineSpec | None) -> None:
        """Say which machine is likely to be wanted next, so that it may be started ahead.

        Only one that is restored, and like another that was made before: it takes but a moment.
        """
        wanted = spec is not None and spec.is_restored and spec in self._made
        self._pool.foresee(spec if wanted and self.settings.pool else None)

    async def place(self, name: str | None = None) -> Place:
        """Where one more machine may be, called `name` or by its number."""
        directory, number = await self._entered(), next(self._numbers)
        name = name or f"vm{number}"
        self.names.add(name)
        return Place(
            id=f"{directory.id}-{self.settings.id}-m{number}",
            name=name,
            directory=directory.machine_directory(f"m{number}"),
        )

    @property
    def progress(self) -> Progress:
        """Who is told of what takes long."""
        return self._progress

    async def boot(self, machines: Sequence[MachineController]) -> None:
        """Power them on, as many at once as there are processors.

        Returns once all answer; when one fails, the others' boots are given up.
        """
        boots = [asyncio.create_task(self._boot(machine)) for machine in machines]
        try:
            await asyncio.gather(*boots)
        finally:
            for boot in boots:
                if not boot.cancelling():  # gather may have: a second one would hurry its clean-up
                    boot.cancel()
            await asyncio.gather(*boots, return_exceptions=True)

    async def end(self, machines: Sequence[MachineController]) -> None:
        """End these machines; each one is tried, whatever becomes of the others."""
        results = await asyncio.gather(
            *(machine.close() for machine in machines), return_exceptions=True
        )
        self.names.difference_update(machine.name for machine in machines)
        failures = [result for result in results if isinstance(result, Exception)]
        if failures:
            raise ExceptionGroup("machines did not end in good order", failures)

    async def run_behind_walls(self, config: SandboxConfig, *, tier: str) -> Ended:
        """Run a command of the host in the warden of that tier; HostUnfit where there is none."""
        walled = require_walls(tier, await self._known_facts())
        return await run_in(await self._warden(walled), config, base=self._base)

    async def image(self, wanted: str) -> Image:
        """The image by that name or path; built, by whoever comes first, when it is not there."""
        async with self._preparing:
            if wanted not in self._images:
                self._images[wanted] = await asyncio.to_thread(self._ensure_image, wanted)
            return self._images[wanted]

    def close(self) -> None:
        """Give everything back: machines and wardens end, the engine stops, the run directory goes.

        Raises TeardownRefused when something had to be left, which is then in `leftovers`.
        """
        try:
            if self.engine.running:
                self.engine.run(self._end_all())
        finally:
            self.engine.close()
            self.templates.close()
            self._acquired.close()

    async def _end_all(self) -> None:
        async with AsyncExitStack() as ending:  # from the last to the first, come what may
            # The wardens kill what still runs.
            for each in (self._wardens, self.networks, self._living, self._pool):
                ending.push_async_callback(each.close)

    @asynccontextmanager
    async def _open_switch(self, tier: Tier, wish: str) -> AsyncIterator[SwitchLine]:
        """The switch of this worker's networks."""
        directory = await self._entered()
        log = directory.path / "switch.log"
        entry = ProcessEntry(role=Role.SWITCH, tier=tier)
        with directory.ledger.recorded(entry) as number:
            started = partial(directory.ledger.identify, number)
            if tier is Tier.BARE:
                opened = open_bare_switch(wish=wish, log=log, started=started)
            else:
                warden = await self._warden(tier)
                opened = open_walled_switch(warden, tier, wish=wish, log=log, started=started)
            async with opened as line:
                yield line

    @asynccontextmanager
    async def _open_gateway(self, tier: Tier) -> AsyncIterator[Gateway]:
        """The gateway of this worker's network with a way out."""
        directory, facts = await self._entered(), await self._known_facts()
        facts.require(Capability.QEMU)
        assert facts.qemu is not None  # what was just required has found it
        log = directory.path / "gateway.log"
        entry = ProcessEntry(role=Role.GATEWAY, tier=tier)
        with directory.ledger.recorded(entry) as number:
            started = partial(directory.ledger.identify, number)
            if tier is Tier.BARE:
                opened = open_bare_gateway(facts.qemu, log=log, started=started)
            else:
                warden = await self._warden(tier)
                opened = open_walled_gateway(warden, facts.qemu, log=log, started=started)
            async with opened as gateway:
                yield gateway

    async def _boot(self, machine: MachineController) -> None:
        if machine.is_on:
            return
        with machine.timings.waiting():
            async with self._booting:
                await machine.power_on()

    async def _make(self, spec: MachineSpec) -> MachineController:
        return MachineController(await self.wired(await self._build(spec)))

    async def wired(
        self, build: Build, *, make: Callable[..., PluggedWires] = PluggedWires
    ) -> Build:
        """The same on its networks, where it gets what nobody else there is called.

        Where that can't be, nothing is left of what was planned for it.
        """
        if not build.wires.networks:
            return build
        name, tier = build.config.name, Tier(build.tier)
        try:
            wires = self.networks.join(
                name, build.wires, tier=tier, time_scale=build.time_scale, make=make
            )
            return replace(build, wires=wires)
        except BaseException:
            # What it has of the machine that it is like is not its own.
            await self.end([MachineController(replace(build, wires=LooseWires()))])
            raise

    async def _make_ahead(self, spec: MachineSpec) -> MachineController | None:
        """One that nobody has asked for yet: out of a template in memory, or None.

        Not where a disk has a source: the test before may write it anew; nor where it is on a
        network: the test before would meet somebody of whom it knows nothing.
        """
        template = None if spec.template is None else self._prepared(spec.template)
        shape = spec.shaped_like(template.spec) if template else spec
        if shape.networks:
            return None
        build = await self.plan(shape, cards=template.cards if template else 0)
        try:
            frozen = self.templates.held(build, template)
            if frozen is not None and all(plan.source is None for plan in build.disks):
                return MachineController(build.restored_from(frozen))
        except BaseException:
            await self._abandon(build)
            raise
        await self._abandon(build)
        return None

    async def _abandon(self, build: Build) -> None:
        """Remove what `plan` made."""
        await MachineController(build).close()

    async def _build(self, spec: MachineSpec) -> Build:
        if spec.template is not None:
            return await self._build_of(self._prepared(spec.template), spec)
        build = await self.plan(spec)
        if spec.is_restored:
            demanded = "lifecycle" in spec.demanded or spec.clock == "frozen"
            build = await self._lifecycles.restored(build, demanded=demanded)
        return build

    async def _build_of(self, template: Template, spec: MachineSpec) -> Build:
        if spec.lifecycle == "booted" and "lifecycle" in spec.demanded:
            raise RequestInvalid(f"a machine out of {template!r} can't be lifecycle='booted'")
        build = await self.plan(spec.shaped_like(template.spec), cards=template.cards)
        return await self.templates.restored(build, template)

    def _prepared(self, template: Template | str) -> Template:
        if isinstance(template, Template):
            return template
        if template not in self.prepared:
            raise RequestInvalid(
                f"template={template!r} has not been built; "
                f"known are: {', '.join(self.prepared) or 'none'}",
                f"let the test use the fixture that calls vm_templates.build(name={template!r})",
            )
        return self.prepared[template]

    async def plan(self, spec: MachineSpec, *, cards: int = 0) -> Build:
        """All that a machine of that shape is made of, but what it would be restored from.

        It has as many network cards as `cards`, where that is more than it has networks.
        Its directory is made with it: whoever does not start the machine ends it all the same.
        """
        facts = await self._known_facts()
        facts.require(Capability.QEMU)
        assert facts.qemu is not None  # what was just required has found it
        if NAT in spec.networks:
            facts.require(Capability.NAT)
        walled = Capability.JAIL in self.settings.required
        tier = (require_walls if walled else require_tier)(spec.tier, facts)
        image = await self.image(spec.image)
        accel = await self._accel(spec.accel, image)
        if tier is not Tier.BARE:
            may_be_emulated = spec.accel == "auto" and Capability.KVM not in self.settings.required
            accel = accel_behind_walls(
                accel, await self._warden(tier), may_be_emulated=may_be_emulated
            )
        launcher = await self._launcher(tier)
        disks = await asyncio.to_thread(plan_disks, spec.disks) if spec.disks else ()
        # Last: whoever is cancelled before leaves no directory.
        place = await self.place(spec.name)
        wires = await self.networks.loose(spec.networks, tier=tier, cards=cards)
        config = QemuConfig(
            program=facts.qemu.path,
            name=place.name,
            directory=place.directory,
            kernel=image.kernel,
            initramfs=image.initramfs,
            command_line=image.command_line,
            machine_type=self.settings.machine_type,
            accel=accel,
            seccomp=facts.qemu.sandbox,
            memory_mib=spec.memory_mib,
            cpus=spec.cpus,
            read_only_disks={MODULES_SERIAL: image.modules} if image.modules else {},
            cards=wires.cards,
        )
        return Build(
            id=place.id,
            config=config,
            launcher=launcher,
            tier=tier,
            image=image.name,
            image_digest=image.digest,
            qemu_version=facts.qemu.version,
            time_scale=self.settings.timeout_scale * facts.time_scale,
            disks=disks,
            clock=spec.clock,
            wires=wires,
            living=self._living,
        )

    async def _launcher(self, tier: Tier) -> Launcher:
        ledger = (await self._entered()).ledger
        launcher: Launcher = BareLauncher()
        if tier is not Tier.BARE:
            launcher = WardenLauncher(partial(self._warden, tier), ledger=ledger)
        return RecordedLauncher(launcher, ledger=ledger, tier=tier)

    async def _warden(self, tier: Tier) -> Warden:
        return await self._wardens.warden(tier, directory=await self._entered())

    async def _entered(self) -> RunDirectory:
        """The run directory; made off the loop, since what dead runs left may take a while."""
        async with self._entering:
            if "directory" not in vars(self):
                await asyncio.to_thread(lambda: self.directory)
            return self.directory

    async def _accel(self, wanted: str, image: Image) -> str:
        facts = await self._known_facts()
        if wanted in ("auto", "kvm") and facts[Capability.KVM].verdict is Verdict.UNCONFIRMED:
            self._facts = facts = await settle_kvm(
                facts,
                cache_dir=self.settings.cache_dir,
                run_dir=self._base,
                kernel=image.kernel,
                initramfs=image.initramfs,
                command_line=" ".join(image.command_line),
            )
        if wanted == "auto" and Capability.KVM not in self.settings.required:
            return facts.accel
        if wanted in ("auto", "kvm"):
            facts.require(Capability.KVM)
            return "kvm"
        return wanted

    async def _known_facts(self) -> HostFacts:
        if self._facts is None:
            self._facts = await probe_host(
                cache_dir=self.settings.cache_dir,
                run_dir=self._base,
                reprobe=self.settings.reprobe,
            )
        return self._facts

    @cached_property
    def _base(self) -> Path:
        base = self.settings.run_dir or default_base()
        make_private(base)
        return base

    def _ensure_image(self, wanted: str) -> Image:
        cache_dir = self.settings.cache_dir
        agent = agent_binary(architecture=platform.machine(), cache_dir=cache_dir)
        return ensure_image(
            wanted,
            cache_dir=cache_dir,
            agent=agent,
            progress=self._progress,
            host_kernel=self.settings.host_kernel,
        )
