"""The builder of templates: a machine, what a test suite makes of it, and the frozen result."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from pytest_vmsandbox.errors import RequestInvalid
from pytest_vmsandbox.machine.async_machine import AsyncMachine
from pytest_vmsandbox.machine.build import Build
from pytest_vmsandbox.machine.controller import MachineController
from pytest_vmsandbox.machine.engine import Engine
from pytest_vmsandbox.machine.frozen import Frozen
from pytest_vmsandbox.machine.machine import Machine
from pytest_vmsandbox.machine.memory import GuestMemory, copy_memory
from pytest_vmsandbox.machine.spec import MachineSpec
from pytest_vmsandbox.machine.templates.cache import Kept
from pytest_vmsandbox.machine.templates.input_digest import digest_inputs
from pytest_vmsandbox.machine.templates.layer import Template
from pytest_vmsandbox.machine.templates.setup_digest import digest_setup
from pytest_vmsandbox.machine.templates.setup_network import (
    cards_for,
    lend_way_out,
    require_way_out,
    take_back_way_out,
)
from pytest_vmsandbox.machine.templates.template import Recipe
from pytest_vmsandbox.machine.templates.templates import (
    FREEZE_S,
    freeze_for_good,
    recipe_of,
    require_made_of,
    require_running,
    sharing,
)
from pytest_vmsandbox.machine.worker import Worker
from pytest_vmsandbox.network.topology import NAT

Setup: TypeAlias = (
    Callable[[Machine], object] | Callable[[AsyncMachine], Coroutine[Any, Any, object]]
)


class TemplateBuilder:
    """Builds templates for one worker; what `vm_templates` gives.

    `usual` is the shape of machines where nothing else is asked for, `on_machine` is told of each
    machine that is being prepared, and of its end.
    """

    def __init__(
        self,
        worker: Worker,
        usual: MachineSpec,
        *,
        on_machine: Callable[[MachineController], Callable[[], None]],
    ) -> None:
        self._worker = worker
        self._engine = worker.engine
        self._usual = usual
        self._on_machine = on_machine

    def build(
        self,
        *,
        setup: Setup,
        base: Template | str | None = None,
        inputs: Sequence[Path | str] = (),
        name: str | None = None,
        key: str | None = None,
        setup_network: str | None = None,
        **wishes: Any,
    ) -> Template:
        """A template of what `setup(vm)` makes of a machine; made once, and kept across sessions.

        The machine stands on `base`: another template, an image's name, or the usual image;
        `wishes` are what `vm_factory` takes. `setup` is called with a running machine, or awaited
        with an `AsyncMachine`, on a loop of its own, if it is an `async def`. Whatever runs in the
        guest when it returns, started by `popen` or as a daemon, runs in every machine out of the
        template; streams of `popen` end with the setup: what the process prints later is dropped,
        and its stdin stays open and silent.

        It is made anew when the base changes, the source of `setup` or of what it uses of your
        own code, the values that it closes over, or the content of `inputs`, the files and
        trees that it copies; and with another `key`, which stands for all else. Whoever comes
        first makes it, others wait.

        With `setup_network="nat"`, or where its machines are on that network themselves, `setup`
        has a way out to the world, by the first card of its machine; that is taken back before the
        freeze, and what is restored is on the networks of `wishes`, or on none. No setup is on a
        network with other machines.

        `name` (that of `setup`) is how `@pytest.mark.vm(template="...")` calls it. Raises
        RequestInvalid where that name was given to something else, or Python can't tell what
        `setup` is made of, or for another `setup_network`; whatever `setup` raises goes on, and
        nothing is kept then.
        """
        with ExitStack() as undo:
            spec = self._spec(base, wishes)
            way_out = require_way_out(setup_network, spec.networks)
            below = base if isinstance(base, Template) else None
            cards = cards_for(spec, below, way_out=way_out)
            shape = spec.changed({"network": NAT}) if way_out else spec
            build = self._engine.run(self._worker.plan(shape, cards=cards))
            undo.callback(self._end, MachineController(build))
            ingredients = partial(_ingredients, setup, inputs, key, way_out=way_out)
            template = self._planned(
                setup, build, below, spec=spec, name=name, ingredients=ingredients
            )
            known = self._worker.prepared.get(template.name)
            if known is None:
                self._ensure(template, build, below, setup, ingredients)
                self._worker.prepared[template.name] = template
            elif known.digest != template.digest:
                raise RequestInvalid(
                    f"there is a template {template.name!r} of something else already",
                    "give one of them another name",
                )
            return known or template

    def _spec(self, base: Template | str | None, wishes: dict[str, Any]) -> MachineSpec:
        if "template" in wishes or wishes.get("lifecycle") == "booted":
            raise RequestInvalid("what a template is made on is its base=")
        if isinstance(base, Template):
            return self._usual.changed(wishes).shaped_like(base.spec)
        return self._usual.changed(wishes if base is None else {**wishes, "image": base})

    def _planned(
        self,
        setup: Setup,
        build: Build,
        below: Template | None,
        *,
        spec: MachineSpec,
        name: str | None,
        ingredients: Callable[[], dict[str, str]],
    ) -> Template:
        if not callable(setup):
            raise RequestInvalid(f"setup={setup!r} must be something that is called with a machine")
        name = getattr(setup, "__name__", "") if name is None else name
        if not name or not name.isprintable():
            raise RequestInvalid(f"name={name!r} can't be a template's name", "give build() a name")
        if below is not None:
            require_made_of(build, below)
        root = recipe_of(build)
        base = below.recipe if below else root
        recipe = Recipe(
            title=f"{name}, on {base.title}",
            parts={
                "base": base.digest,
                "clock": spec.clock,
                **ingredients(),
            },
        )
        cards = len(build.config.cards)
        return Template(name=name, recipe=recipe, root=root.digest, spec=spec, cards=cards)

    def _ensure(
        self,
        template: Template,
        build: Build,
        below: Template | None,
        setup: Setup,
        ingredients: Callable[[], dict[str, str]],
    ) -> None:
        """Find it, or make it; it is kept if its ingredients are still the same then."""
        templates, run = self._worker.templates, self._engine.run
        if run(templates.find(template.recipe)):
            return
        with self._engine.entered(templates.making(template.recipe)) as making:
            if run(templates.find(template.recipe)):
                return
            base = run(templates.kept(build, below))
            self._worker.progress.step(f"template {template.name}: running its setup")
            frozen = self._prepared(build, base, setup)
            parts = template.recipe.parts
            try:
                changed = [name for name, part in ingredients().items() if part != parts[name]]
            except BaseException:
                frozen.close()
                raise
            if changed:
                why = f"its {' and '.join(changed)} changed while it was made"
                templates.not_kept(template.recipe, why)
            kept_by = None if changed else making
            run(templates.publish(kept_by, template.recipe, frozen, base=base))

    def _prepared(self, build: Build, base: Kept, setup: Setup) -> Frozen:
        """What `setup` makes of a machine that is restored from `base`, frozen."""
        run = self._engine.run
        with ExitStack() as undo:
            memory = run(_copied(base.frozen.memory))
            undo.callback(memory.close)
            with self._machine(build, base, memory) as machine:
                self._set_up(machine, setup)
                run(require_running(machine))
                run(take_back_way_out(machine, FREEZE_S))
                frozen = run(freeze_for_good(machine, memory))
            undo.pop_all()
            return frozen

    @contextmanager
    def _machine(
        self, build: Build, base: Kept, memory: GuestMemory
    ) -> Iterator[MachineController]:
        """A machine out of `base` that writes to `memory`."""
        shared = sharing(build, memory).restored_from(replace(base.frozen, memory=memory))
        if NAT in shared.wires.networks:
            shared = self._engine.run(lend_way_out(self._worker, shared))
        machine = MachineController(shared)
        ended = self._on_machine(machine)
        try:
            self._engine.run(self._worker.boot([machine]))
            yield machine
        finally:
            ended()
            self._end(machine)

    def _set_up(self, machine: MachineController, setup: Setup) -> None:
        if not inspect.iscoroutinefunction(setup):
            result = setup(Machine(machine, self._engine))  # type: ignore[arg-type]
            if not inspect.iscoroutine(result):
                return
            result.close()
            raise RequestInvalid(f"{setup!r} gives a coroutine", "make it an `async def`")
        # Not on the engine, where its verbs are carried out, and not on a loop of the tests', on
        # which whoever waits here may be.
        loop = Engine()
        try:
            loop.run(setup(AsyncMachine(machine, self._engine)))  # type: ignore[arg-type]
        finally:
            loop.close()

    def _end(self, machine: MachineController) -> None:
        self._engine.run(self._worker.end([machine]))


def _ingredients(
    setup: Setup, inputs: Sequence[Path | str], key: str | None, *, way_out: bool
) -> dict[str, str]:
    return {
        **({"way out": NAT} if way_out else {}),
        "inputs": digest_inputs(inputs),
        "setup": digest_setup(setup, inputs=[Path(path) for path in inputs], key=key),
    }


async def _copied(memory: GuestMemory) -> GuestMemory:
    return await asyncio.to_thread(copy_memory, memory, "vmsandbox-template")
