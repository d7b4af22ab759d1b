"""The fixtures that tests ask for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, Self, overload

import pytest

from pytest_vmsandbox.plugin.artifacts import place_capture
from pytest_vmsandbox.plugin.foresight import LAST_IMAGE
from pytest_vmsandbox.plugin.holding import Held, hold, running_test
from pytest_vmsandbox.plugin.markers import spec_of
from pytest_vmsandbox.plugin.session import SETTINGS, base_spec, worker_of

if TYPE_CHECKING:
    from pytest_vmsandbox.host.facts import HostFacts
    from pytest_vmsandbox.machine.async_machine import AsyncMachine
    from pytest_vmsandbox.machine.controller import MachineController
    from pytest_vmsandbox.machine.jail import Jail
    from pytest_vmsandbox.machine.machine import Machine
    from pytest_vmsandbox.machine.network import Network
    from pytest_vmsandbox.machine.spec import MachineSpec
    from pytest_vmsandbox.machine.templates.builder import TemplateBuilder


class MachineFactory(Protocol):
    """Makes machines for `def test`: one, or a list when `count` is given."""

    @overload
    def __call__(self, *, count: None = None, **wishes: Any) -> Machine: ...
    @overload
    def __call__(self, *, count: int, **wishes: Any) -> list[Machine]: ...


class AsyncMachineFactory(Protocol):
    """Makes machines for `async def test`: one, or a list when `count` is given."""

    @overload
    async def __call__(self, *, count: None = None, **wishes: Any) -> AsyncMachine: ...
    @overload
    async def __call__(self, *, count: int, **wishes: Any) -> list[AsyncMachine]: ...


@pytest.fixture(scope="session")
def vm_host(pytestconfig: pytest.Config) -> HostFacts:
    """Every capability of this host with evidence and remedy; `.tier`, `.accel`."""
    return worker_of(pytestconfig).facts


@pytest.fixture(scope="session")
def vm_jail(pytestconfig: pytest.Config) -> Jail:
    """The walls of this worker: `.run(argv, ...)` runs a command of the host behind them."""
    from pytest_vmsandbox.machine.jail import Jail

    jail = Jail(worker_of(pytestconfig), tier=pytestconfig.stash[SETTINGS].tier)
    jail.require()
    return jail


@pytest.fixture(scope="session")
def vm_network(pytestconfig: pytest.Config) -> Network:
    """The networks between this worker's machines: `.partition(a, b)`, `.delay("50ms")`, ..."""
    from pytest_vmsandbox.machine.network import Network

    worker = worker_of(pytestconfig)
    base = pytestconfig.rootpath / pytestconfig.stash[SETTINGS].artifacts
    return Network(worker.networks, worker.engine, place=partial(place_capture, base))


@pytest.fixture(scope="session")
def vm_image(pytestconfig: pytest.Config) -> str:
    """The image that machines boot; override it in a conftest, or by `--vm-image`."""
    return pytestconfig.stash[SETTINGS].image


@pytest.fixture
def vm(request: pytest.FixtureRequest, vm_image: str) -> Iterator[Machine]:
    """A fresh machine, for this test alone."""
    with _one_machine(request, vm_image) as machine:
        yield machine


@pytest.fixture
def async_vm(request: pytest.FixtureRequest, vm_image: str) -> Iterator[AsyncMachine]:
    """A fresh machine for this test alone, its verbs awaited, on any event loop."""
    # Not an async fixture: machines live on the engine's loop, so that no loop scope of
    # pytest-asyncio has to be met.
    from pytest_vmsandbox.machine.async_machine import AsyncMachine

    with _Machines(request) as machines:
        (controller,) = machines.engine.run(machines.start([_wanted(request, vm_image)]))
        yield AsyncMachine(controller, machines.engine)


@pytest.fixture(scope="module")
def vm_module(request: pytest.FixtureRequest, vm_image: str) -> Iterator[Machine]:
    """One machine for all tests of a module; a `vm` mark on the module says what it is like."""
    with _one_machine(request, vm_image) as machine:
        yield machine


@pytest.fixture(scope="session")
def vm_session(request: pytest.FixtureRequest, vm_image: str) -> Iterator[Machine]:
    """One machine for all tests of a worker."""
    with _one_machine(request, vm_image) as machine:
        yield machine


@pytest.fixture
def vm_factory(request: pytest.FixtureRequest, vm_image: str) -> Iterator[MachineFactory]:
    """Makes fresh machines for this test: `(count=, image=, memory_mib=, cpus=, name=, ...)`."""
    from pytest_vmsandbox.machine.machine import Machine

    with _Machines(request) as machines:

        def make(*, count: int | None = None, **wishes: Any) -> Machine | list[Machine]:
            specs = specs_for(_wanted(request, vm_image), count=count, wishes=wishes)
            made = [
                Machine(controller, machines.engine)
                for controller in machines.engine.run(machines.start(specs))
            ]
            return made[0] if count is None else made

        yield make  # type: ignore[misc]  # what `count` is decides which it gives


@pytest.fixture
def async_vm_factory(
    request: pytest.FixtureRequest, vm_image: str
) -> Iterator[AsyncMachineFactory]:
    """Makes fresh machines for this test, awaited; arguments as for `vm_factory`."""
    from pytest_vmsandbox.machine.async_machine import AsyncMachine

    with _Machines(request) as machines:

        async def make(
            *, count: int | None = None, **wishes: Any
        ) -> AsyncMachine | list[AsyncMachine]:
            specs = specs_for(_wanted(request, vm_image), count=count, wishes=wishes)
            made = [
                AsyncMachine(controller, machines.engine)
                for controller in await machines.engine.bridge(machines.start(specs))
            ]
            return made[0] if count is None else made

        yield make  # type: ignore[misc]  # what `count` is decides which it gives


@pytest.fixture(scope="session")
def vm_templates(request: pytest.FixtureRequest, vm_image: str) -> TemplateBuilder:
    """Builds templates: `vm_templates.build(setup=, base=, inputs=, name=, ...)`."""
    from pytest_vmsandbox.machine.templates.builder import TemplateBuilder

    def seen(machine: MachineController) -> Callable[[], None]:
        held = Held(machine=machine, fixture="vm_templates")
        hold(request.node, held)
        return held.end

    usual = base_spec(request.config, vm_image)
    return TemplateBuilder(worker_of(request.config), usual, on_machine=seen)


def specs_for(
    base: MachineSpec, *, count: int | None, wishes: Mapping[str, Any]
) -> list[MachineSpec]:
    """`count` shapes (one for None) like `base` but for `wishes`, names numbered from 1.

    Raises RequestInvalid where `count` is not a number from 1.
    """
    from pytest_vmsandbox.errors import RequestInvalid

    wanted = base.changed(wishes)
    if count is None:
        return [wanted]
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise RequestInvalid(f"count={count!r} must be a whole number from 1")
    if wanted.name is None:
        return [wanted] * count
    return [wanted.changed({"name": f"{wanted.name}-{n}"}) for n in range(1, count + 1)]


def _wanted(request: pytest.FixtureRequest, image: str) -> MachineSpec:
    request.config.stash[LAST_IMAGE] = image
    return spec_of(request.node, base_spec(request.config, image))


@contextmanager
def _one_machine(request: pytest.FixtureRequest, image: str) -> Iterator[Machine]:
    from pytest_vmsandbox.machine.machine import Machine

    with _Machines(request) as machines:
        (controller,) = machines.engine.run(machines.start([_wanted(request, image)]))
        yield Machine(controller, machines.engine)


class _Machines:
    """The machines that one fixture makes: they end with it, and stay known to reports."""

    def __init__(self, request: pytest.FixtureRequest) -> None:
        self._worker = worker_of(request.config)
        self._config = request.config
        self._node: pytest.Item | pytest.Collector = request.node
        self._making = False
        self._fixture = request.fixturename or ""
        self._held: list[Held] = []
        self.engine = self._worker.engine

    async def start(self, specs: Sequence[MachineSpec]) -> list[MachineController]:
        self._making = True
        try:
            made = await self._worker.make(specs, hold=self._hold)
        finally:
            self._making = False
        await self._worker.boot(made)
        return made

    def _hold(self, machine: MachineController) -> None:
        # Before it is started, on the engine's thread: neither a boot that fails nor an
        # interrupted test loses sight of a machine, or of a machine's twin.
        held = Held(machine=machine, fixture=self._fixture)
        self._held.append(held)
        test = None if self._making else running_test(self._config)
        if test is None or test is self._node:
            hold(self._node, held)
            return
        # A twin of a machine that tests share, which this one made for itself.
        hold(test, held)
        test.addfinalizer(partial(self._end, held))

    def __enter__(self) -> Self:
        return self

    def _end(self, twin: Held) -> None:
        twin.end()
        self._held.remove(twin)
        self.engine.run(self._worker.end([twin.machine]))

    def __exit__(self, *_: object) -> None:
        for held in self._held:
            held.end()
        self.engine.run(self._worker.end([held.machine for held in self._held]))
