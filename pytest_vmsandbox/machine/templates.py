"""The templates of a worker: found in the cache or made there, kept in memory while it runs."""

from __future__ import annotations

import asyncio
import platform
import shlex
from contextlib import AsyncExitStack, ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

from pytest_vmsandbox.deadline import Deadline
from pytest_vmsandbox.errors import TimedOut
from pytest_vmsandbox.image.progress import Progress
from pytest_vmsandbox.machine.build import Build
from pytest_vmsandbox.machine.controller import MachineController
from pytest_vmsandbox.machine.freezing import freeze
from pytest_vmsandbox.machine.frozen import Frozen
from pytest_vmsandbox.machine.memory import new_memory
from pytest_vmsandbox.machine.template import Recipe, save_template
from pytest_vmsandbox.machine.template_cache import TemplateCache
from pytest_vmsandbox.vmm.launch import Handed, Memory, VmmView
from pytest_vmsandbox.vmm.qemu import QemuConfig, render_command

# What making one may take, waiting for another process that makes it included.
MAKE_S = 300.0
FREEZE_S = 30.0

NAME = "template"


class Templates:
    """Frozen machines by what they are made of; `close` gives their memory back.

    `incidents` tells of those that the cache could not take.
    """

    def __init__(self, cache: TemplateCache, *, progress: Progress) -> None:
        self._cache = cache
        self._progress = progress
        self.incidents: list[str] = []
        self._frozen: dict[str, Frozen] = {}
        self._finding = asyncio.Lock()

    async def frozen(self, build: Build) -> Frozen:
        """What a machine of that build is restored from; it is made if it is nowhere yet.

        `build` is the machine's own: the template is booted in its directory, in its tier.
        """
        recipe = recipe_of(build)
        async with self._finding:
            if recipe.digest not in self._frozen:
                self._frozen[recipe.digest] = await self._find_or_make(recipe, build)
            return self._frozen[recipe.digest]

    def close(self) -> None:
        """Give their memory back; machines that were restored keep what they have of it."""
        for frozen in self._frozen.values():
            frozen.close()
        self._frozen.clear()

    async def _find_or_make(self, recipe: Recipe, build: Build) -> Frozen:
        if found := await asyncio.to_thread(self._cache.load, recipe):
            return found
        deadline = Deadline.after(seconds=MAKE_S * build.time_scale)
        async with AsyncExitStack() as making:
            try:
                await making.enter_async_context(self._cache.making(recipe, deadline=deadline))
            except TimedOut:
                raise
            except OSError as error:
                return self._not_kept(await self._made(build), error)
            if found := await asyncio.to_thread(self._cache.load, recipe):
                return found
            frozen = await self._made(build)
            try:
                write = partial(save_template, recipe=recipe, frozen=frozen)
                await asyncio.to_thread(self._cache.publish, recipe, write)
            except OSError as error:
                self._not_kept(frozen, error)
            except BaseException:
                frozen.close()
                raise
            return frozen

    def _not_kept(self, frozen: Frozen, error: OSError) -> Frozen:
        """A disk that is full or can't be written to costs the next run time, and no more."""
        self.incidents.append(f"a template could not be kept, the next run makes it anew: {error}")
        return frozen

    async def _made(self, build: Build) -> Frozen:
        self._progress.step(f"template of {build.image}: booting it once, and freezing it")
        config = build.config
        with ExitStack() as undo:
            memory = new_memory("vmsandbox-template", size=config.memory_mib << 20)
            undo.callback(memory.close)
            shared = replace(config, name=NAME, memory=Memory(memory), freezable=True)
            machine = MachineController(replace(build, config=shared))
            try:
                await machine.power_on()
                nonce = machine.running.order.nonce
                deadline = Deadline.after(seconds=FREEZE_S * build.time_scale)
                state = await freeze(machine.running, deadline=deadline)
                undo.callback(state.close)
                console = machine.console.held
            finally:
                await machine.power_cut()
            memory.seal()  # the VMM is gone, which had it mapped
            undo.pop_all()
            return Frozen(nonce=nonce, memory=memory, state=state, console=console)


def recipe_of(build: Build) -> Recipe:
    """All that a machine's template depends on, and nothing of this run."""
    return Recipe(
        parts={
            "image": build.image_digest,
            # An image's manifest is believed; whoever put another kernel beside it gets that one.
            "files": ", ".join(
                _version_of(file) for file in build.config.files if isinstance(file, Path)
            ),
            "vmm": f"{build.config.program} {_version_of(Path(build.config.program))}",
            "command": shlex.join(render_command(_without_this_run(build.config))),
            "processor": _processor() if build.config.accel == "kvm" else "emulated",
        }
    )


def _without_this_run(config: QemuConfig) -> QemuConfig:
    names = {file: Path(f"file-{number}") for number, file in enumerate(config.files)}
    files: dict[Handed, Path] = {**names}
    neutral = replace(config, name=NAME, memory=None)
    return neutral.seen_through(VmmView(directory=Path("room"), files=files))


def _version_of(file: Path) -> str:
    """What tells a file from what anybody puts in its place."""
    seen = file.stat()
    return f"{seen.st_size} {seen.st_mtime_ns}"


def _processor() -> str:
    """The host's processor, which KVM shows to the guest (-cpu host)."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    wanted = ("model name", "flags", "Features")
    return f"{platform.machine()} " + "; ".join(
        sorted({line for line in lines if line.startswith(wanted)})
    )
