"""The two faces of a machine share this: what needs no waiting, and how verbs are turned."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from functools import wraps
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypedDict, TypeVar

from pytest_vmsandbox.errors import RequestInvalid
from pytest_vmsandbox.machine.build import MachineFacts
from pytest_vmsandbox.machine.caller import Caller
from pytest_vmsandbox.machine.console import Console
from pytest_vmsandbox.machine.controller import MachineController
from pytest_vmsandbox.machine.engine import Engine
from pytest_vmsandbox.machine.timings import Timings

if TYPE_CHECKING:
    from pytest_vmsandbox.machine.infra_host import GuestHost

P = ParamSpec("P")
T = TypeVar("T")


class StartOptions(TypedDict, total=False):
    """How a command is started: keyword arguments of `run` and `popen`."""

    env: Mapping[str, str] | None
    cwd: str | None
    user: str | int | None


class RunOptions(StartOptions, total=False):
    """Keyword arguments of `run` beside `encoding`."""

    input: str | bytes | None
    timeout: float | None
    check: bool


class PopenOptions(StartOptions, total=False):
    """Keyword arguments of `popen` beside `encoding`."""

    pty: bool
    rows: int
    columns: int


class Face:
    """A machine as a test holds it; `controller` is the machine itself, on the engine's loop."""

    def __init__(self, controller: MachineController, engine: Engine) -> None:
        self._controller = controller
        self._engine = engine
        self._caller = Caller(controller, engine)
        self._testinfra: GuestHost | None = None

    @property
    def name(self) -> str:
        """Its name, which is also its host name."""
        return self._controller.name

    @property
    def id(self) -> str:
        """What no other machine is called: run, worker and number."""
        return self._controller.id

    @property
    def ip(self) -> str:
        """Its IPv4 address on its first network; RequestInvalid where it is on none."""
        return str(self._controller.address().ip)

    @property
    def ip6(self) -> str:
        """Its IPv6 address on its first network; RequestInvalid where it is on none."""
        return str(self._controller.address().ip6)

    def ip_on(self, network: str) -> str:
        """Its IPv4 address on that network; RequestInvalid where it is not on it."""
        return str(self._controller.address(network).ip)

    def ip6_on(self, network: str) -> str:
        """Its IPv6 address on that network; RequestInvalid where it is not on it."""
        return str(self._controller.address(network).ip6)

    @property
    def facts(self) -> MachineFacts:
        """Acceleration, tier, image, kernel and VMM version."""
        return self._controller.facts

    @property
    def timings(self) -> Timings:
        """What it cost so far, in seconds."""
        return self._controller.timings

    @property
    def testinfra(self) -> GuestHost:
        """It as a pytest-testinfra `Host`, always the same one; takes the extra `testinfra`.

        Commands go over the agent's line, as root. testinfra knows no `await`: the calls of this
        `Host` block, those of an `AsyncMachine` too. RequestInvalid where it is not installed.
        """
        if self._testinfra is None:
            self._testinfra = _make_testinfra_host(self._caller)
        return self._testinfra

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id}>"


def _make_testinfra_host(caller: Caller) -> GuestHost:
    try:
        # Whoever does not use it need not have it, and does not pay for it.
        from pytest_vmsandbox.machine.infra_host import make_host  # noqa: PLC0415
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "testinfra":
            raise
        raise RequestInvalid(
            "vm.testinfra takes pytest-testinfra, which is not installed",
            "pip install 'pytest-vmsandbox[testinfra]'",
        ) from error
    return make_host(caller)


class ConsoleFace:
    """The serial console as a test sees it."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller

    @property
    def text(self) -> str:
        """All that the guest printed since the machine was made (its last 4 MiB)."""
        return self._console.text

    def tail(self, lines: int = 50) -> str:
        """The last `lines` lines of it."""
        return self._console.tail(lines)

    @property
    def _console(self) -> Console:
        return self._caller.controller.console


Verb = Callable[Concatenate[MachineController, P], Coroutine[Any, Any, T]]


def blocking(verb: Verb[P, T]) -> Callable[Concatenate[Face, P], T]:
    """The verb for `def`: the caller waits."""

    @wraps(verb)
    def call(self: Face, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._caller.run(verb(self._controller, *args, **kwargs))

    return call


def awaitable(verb: Verb[P, T]) -> Callable[Concatenate[Face, P], Coroutine[Any, Any, T]]:
    """The verb for `async def`: awaited on any loop."""

    @wraps(verb)
    async def call(self: Face, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._caller.bridge(verb(self._controller, *args, **kwargs))

    return call
