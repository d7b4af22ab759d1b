"""The templates of a worker: found in the cache or made there, kept in memory while it runs."""

from __future__ import annotations

import asyncio
import platform
import shlex
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

from pytest_vmsandbox.deadline import Deadline
from pytest_vmsandbox.errors import RequestInvalid, TimedOut
from pytest_vmsandbox.host.facts import Tier
from pytest_vmsandbox.image.progress import Progress
from pytest_vmsandbox.jail.off_loop import run_off_loop, run_stoppable
from pytest_vmsandbox.machine.build import Build
from pytest_vmsandbox.machine.capture import PAUSED, status_of
from pytest_vmsandbox.machine.controller import MachineController
from pytest_vmsandbox.machine.frozen import Frozen
from pytest_vmsandbox.machine.memory import GuestMemory, new_memory, seal
from pytest_vmsandbox.machine.templates.cache import Kept, Making, TemplateCache
from pytest_vmsandbox.machine.templates.freezing import freeze
from pytest_vmsandbox.machine.templates.layer import Template
from pytest_vmsandbox.machine.templates.template import Recipe, Standing, save_template
from pytest_vmsandbox.vmm.launch import Handed, Memory, VmmView
from pytest_vmsandbox.vmm.qemu import QemuConfig, render_command

FREEZE_S = 30.0

NAME = "template"


class Templates:
    """Frozen machines by what they are made of; `close` gives their memory back.

    `room` is the directory for disks of those that were read; `incidents` tells of those that the
    cache could not take.
    """

    def __init__(
        self, cache: TemplateCache, *, room: Callable[[], Path], progress: Progress
    ) -> None:
        self._cache = cache
        self._room = room
        self._progress = progress
        self._kept: dict[str, Kept] = {}
        self._unreadable: set[str] = set()
        self._finding = asyncio.Lock()
        self.incidents: list[str] = []

    async def booted(self, build: Build, recipe: Recipe) -> Kept:
        """The template of a machine that was booted and nothing else; made if it is nowhere yet.

        `build` is the machine's own, and `recipe` is that of it: the template is booted in its
        directory, in its tier.
        """
        async with self._finding:
            if found := await self.find(recipe):
                return found
            async with self.making(recipe) as making:
                if found := await self.find(recipe):
                    return found
                self._progress.step(f"template of {build.image}: booting it once, and freezing it")
                return await self.publish(making, recipe, await _boot_and_freeze(build))

    async def restored(self, build: Build, template: Template) -> Build:
        """The build with what it is restored from; it must be of the machine that was prepared."""
        kept = await self.kept(build, template)
        return build.restored_from(kept.frozen)

    async def kept(self, build: Build, template: Template | None) -> Kept:
        """That template, or the one of a machine that was booted and nothing else.

        Raises RequestInvalid where the template is of another machine than `build`, or is gone.
        """
        if template is None:
            return await self.booted(build, recipe_of(build))
        require_made_of(build, template)
        if (found := await self.find(template.recipe)) is None:
            raise RequestInvalid(f"{template!r} is gone", "call vm_templates.build() again")
        return found

    def held(self, build: Build, template: Template | None) -> Frozen | None:
        """What `kept` would give, if it is in memory already; nothing is read, and nothing made."""
        if template is not None:
            require_made_of(build, template)
        recipe = recipe_of(build) if template is None else template.recipe
        found = self._kept.get(recipe.digest)
        return found.frozen if found else None

    async def find(self, recipe: Recipe) -> Kept | None:
        """The template of that recipe, if we have it or it is in the cache and whole."""
        if recipe.digest not in self._kept:
            # What was loaded for somebody who waits no more is given back at once.
            loading = asyncio.create_task(
                asyncio.to_thread(self._cache.load, recipe, room=self._room())
            )
            try:
                found = await asyncio.shield(loading)
            except asyncio.CancelledError:
                loading.add_done_callback(_give_back)
                raise
            except TimedOut:
                raise
            except OSError as error:  # of the host: what others may use is not replaced for it
                self._unreadable.add(recipe.digest)
                self.not_kept(recipe, error)
                return None
            if found is None:
                return None
            if self._kept.setdefault(recipe.digest, found) is not found:
                found.close()  # another one was quicker
        return self._kept[recipe.digest]

    @asynccontextmanager
    async def making(self, recipe: Recipe) -> AsyncIterator[Making | None]:
        """Be the only one who makes it; None where the cache can't be written."""
        deadline = Deadline.after(seconds=None)  # its maker lives, and a setup may take long

        def tell(waited_s: float) -> None:
            waits = f"{recipe.title}: waiting for another process, which makes it"
            self._progress.step(f"{waits} ({waited_s:.0f} s)" if waited_s >= 1 else waits)

        async with AsyncExitStack() as stack:
            making = None
            try:
                making = await stack.enter_async_context(
                    self._cache.making(recipe, deadline=deadline, on_wait=tell)
                )
            except TimedOut:
                raise
            except OSError as error:
                self.not_kept(recipe, error)
            yield making

    async def publish(
        self, making: Making | None, recipe: Recipe, frozen: Frozen, *, base: Kept | None = None
    ) -> Kept:
        """Put it into the cache; where that can't be, it lives as long as we do.

        `frozen` is ours from here on.
        """
        self._kept[recipe.digest] = Kept(manifest=None, frozen=frozen, locks=())
        standing = _standing(base)
        wanted = making is not None and recipe.digest not in self._unreadable
        if making is not None and wanted and (base is None or standing is not None):
            write = partial(save_template, recipe=recipe, frozen=frozen, base=standing)

            def publish() -> None:
                self._kept[recipe.digest] = making.publish(write, frozen)

            try:
                await run_off_loop(publish)
            except OSError as error:
                self.not_kept(recipe, error)
        return self._kept[recipe.digest]

    def close(self) -> None:
        """Give their memory back; machines that were restored keep what they have of it."""
        for kept in self._kept.values():
            kept.close()
        self._kept.clear()

    def not_kept(self, recipe: Recipe, why: object) -> None:
        """Tell of one that lives as long as we do."""
        told = f"{recipe.title}: made for this run only, it could not be kept: {why}"
        if told not in self.incidents:
            self.incidents.append(told)


async def _boot_and_freeze(build: Build) -> Frozen:
    memory = new_memory("vmsandbox-template", size=build.config.memory_mib << 20)
    try:
        machine = MachineController(sharing(build, memory))
        try:
            await machine.power_on()
            frozen = await freeze_for_good(machine, memory)
            # The machine whose directory this is recalls all that was printed, and logs it.
            machine.console.log.unlink(missing_ok=True)
            return frozen
        finally:
            await machine.power_cut()
            await run_off_loop(machine.disks.close)
    except BaseException:
        memory.close()
        raise


def sharing(build: Build, memory: GuestMemory) -> Build:
    """The same, but its memory is `memory`, where it can be frozen."""
    config = replace(build.config, name=NAME, memory=Memory(memory), freezable=True)
    return replace(build, config=config)


async def require_running(machine: MachineController) -> None:
    """Raise RequestInvalid where it is powered off or paused: nobody answers there."""
    deadline = Deadline.after(seconds=FREEZE_S * machine.build.time_scale)
    if await status_of(machine.running, deadline=deadline) == PAUSED:
        raise RequestInvalid(
            f"{machine.name} is paused: no template can be made of it", "resume it in the setup"
        )


async def freeze_for_good(machine: MachineController, memory: GuestMemory) -> Frozen:
    """Freeze a machine that shares `memory` with us; it is ended.

    Whatever is raised, `memory` is still the caller's.
    """
    machine.disks.require_room()
    nonce = machine.running.order.nonce
    deadline = Deadline.after(seconds=FREEZE_S * machine.build.time_scale)
    state = await freeze(machine.running, deadline=deadline)
    try:
        console = machine.console.held
        await machine.power_cut()
        disks = await run_stoppable(machine.disks.freeze)
        memory.seal()  # the VMM is gone, which had it mapped
        seal(state)
    except BaseException:
        state.close()
        raise
    return Frozen(nonce=nonce, memory=memory, disks=disks, state=state, console=console)


def require_made_of(build: Build, template: Template) -> None:
    """Raise RequestInvalid where the template is of another machine than `build`."""
    recipe = recipe_of(build)
    if recipe.digest != template.root:
        raise RequestInvalid(
            f"{template!r} was made of another machine: {template.recipe.title}; "
            f"asked for is {recipe.title}",
            "what is asked for beside it must be what it was built with",
        )


def recipe_of(build: Build) -> Recipe:
    """All that a machine's template depends on, and nothing of this run."""
    config = build.config
    return Recipe(
        title=_title(build),
        parts={
            "image": build.image_digest,
            # An image's manifest is believed; whoever put another kernel beside it gets that one.
            "files": ", ".join(
                _version_of(file) for file in config.files if isinstance(file, Path)
            ),
            "vmm": f"{config.program} {build.qemu_version} {_version_of(Path(config.program))}",
            "disks": "; ".join(plan.identity for plan in build.disks),
            "command": shlex.join(render_command(_without_this_run(config))),
            # What a VMM without walls wrote is for no VMM that has them.
            "walls": "no" if build.tier == Tier.BARE else "yes",
            "processor": _processor() if config.accel == "kvm" else f"emulated by {_clock()}",
            "wires": _wires(config),
        },
    )


def _title(build: Build) -> str:
    config = build.config
    words = [build.image, f"{config.memory_mib} MiB", f"{config.cpus} cpus", config.accel]
    if config.cards:
        words.append("1 card" if len(config.cards) == 1 else f"{len(config.cards)} cards")
    return ", ".join(words)


def _without_this_run(config: QemuConfig) -> QemuConfig:
    wires = [replace(card, wire=Path(f"card-{at}")) for at, card in enumerate(config.cards)]
    config = replace(config, cards=wires)
    names = {file: Path(f"file-{number}") for number, file in enumerate(config.files)}
    files: dict[Handed, Path] = {**names}
    neutral = replace(config, name=NAME, memory=None)
    return neutral.seen_through(VmmView(directory=Path("room"), files=files))


def _wires(config: QemuConfig) -> str:
    """What a guest may leave to its cards: with taps that is the kernel's to say (tun.c)."""
    if not config.cards:
        return "none"
    return f"taps of {platform.release()}" if any(card.tap for card in config.cards) else "sockets"


def _version_of(file: Path) -> str:
    """What tells a file from what anybody puts in its place."""
    seen = file.stat()
    return f"{seen.st_size} {seen.st_mtime_ns}"


@cache
def _processor() -> str:
    """The host's processor, which KVM shows to the guest (-cpu host), and the KVM that does so."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    wanted = ("model name", "flags", "Features")
    return f"{platform.machine()} {platform.release()} " + "; ".join(
        sorted({line for line in lines if line.startswith(wanted)})
    )


@cache
def _clock() -> str:
    """What an emulated guest has measured its clock by: the host's processor, and its TSC."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    models = sorted(
        {line.partition(":")[2].strip() for line in lines if line.startswith("model name")}
    )
    tsc = Path("/sys/devices/system/cpu/cpu0/tsc_freq_khz")
    known = tsc.read_text(encoding="ascii").strip() if tsc.exists() else "unknown"
    return f"{platform.machine()} {'; '.join(models)}, TSC {known}"


def _standing(base: Kept | None) -> Standing | None:
    """What a layer on `base` says of it; None where `base` itself could not be kept."""
    if base is None or base.manifest is None:
        return None
    return Standing(manifest=base.manifest, frozen=base.frozen)


def _give_back(loading: asyncio.Task[Kept | None]) -> None:
    if not loading.cancelled() and loading.exception() is None and (found := loading.result()):
        found.close()
