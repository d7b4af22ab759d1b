"""The templates of a worker: found in the cache or made there, kept in memory while it runs."""

from __future__ import annotations

import asyncio
import platform
import shlex
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

from pytest_vmsandbox.deadline import Deadline
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
    """Frozen machines by what they are made of; `close` gives their memory back."""

    def __init__(self, cache: TemplateCache, *, progress: Progress) -> None:
        self._cache = cache
        self._progress = progress
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
        async with self._cache.making(recipe, deadline=deadline):
            if found := await asyncio.to_thread(self._cache.load, recipe):
                return found
            self._progress.step(f"template of {build.image}: booting it once, and freezing it")
            await self._make(recipe, build)
            made = await asyncio.to_thread(self._cache.load, recipe)
            if made is None:
                raise OSError(f"the template {recipe.digest[:16]} was gone as soon as it was made")
            return made

    async def _make(self, recipe: Recipe, build: Build) -> None:
        config = build.config
        with new_memory("vmsandbox-template", size=config.memory_mib << 20) as memory:
            shared = replace(config, name=NAME, memory=Memory(memory), freezable=True)
            machine = MachineController(replace(build, config=shared))
            try:
                await machine.power_on()
                nonce = machine.running.order.nonce
                deadline = Deadline.after(seconds=FREEZE_S * build.time_scale)
                state = await freeze(machine.running, deadline=deadline)
            finally:
                await machine.power_cut()
            memory.seal()  # the VMM is gone, which had it mapped
            with closing(Frozen(nonce=nonce, memory=memory, state=state)) as frozen:
                write = partial(save_template, recipe=recipe, frozen=frozen)
                await asyncio.to_thread(self._cache.publish, recipe, write)


def recipe_of(build: Build) -> Recipe:
    """All that a machine's template depends on, and nothing of this run."""
    return Recipe(
        parts={
            "image": build.image_digest,
            "vmm": _identity_of(Path(build.config.program)),
            "command": shlex.join(render_command(_without_this_run(build.config))),
            "processor": _processor() if build.config.accel == "kvm" else "emulated",
        }
    )


def _without_this_run(config: QemuConfig) -> QemuConfig:
    names = {file: Path(f"file-{number}") for number, file in enumerate(config.files)}
    files: dict[Handed, Path] = {**names}
    neutral = replace(config, name=NAME, memory=None)
    return neutral.seen_through(VmmView(directory=Path("room"), files=files))


def _identity_of(program: Path) -> str:
    """The program, for as long as nobody installs another one there."""
    seen = program.stat()
    return f"{program} {seen.st_size} {seen.st_mtime_ns}"


def _processor() -> str:
    """The host's processor, which KVM shows to the guest (-cpu host)."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    wanted = ("model name", "flags", "Features")
    return f"{platform.machine()} " + "; ".join(
        sorted({line for line in lines if line.startswith(wanted)})
    )
