"""The kept gateway: the way out of a worker's machines, from first need to the worker's end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack

from pytest_vmsandbox.errors import NetworkFailed
from pytest_vmsandbox.host.facts import Tier
from pytest_vmsandbox.machine.gateway_launcher import Gateway
from pytest_vmsandbox.network.addresses import WAY_OUT
from pytest_vmsandbox.network.client import SwitchLine
from pytest_vmsandbox.network.way_out import WayOut

StartGateway = Callable[[Tier], AbstractAsyncContextManager[Gateway]]

_DIED = "the gateway of the network nat died; whoever comes there next brings another"


class KeptGateway:
    """At most one gateway, plugged into the switch that runs; one that has died is replaced."""

    def __init__(self, start: StartGateway) -> None:
        self._start = start
        self._running = AsyncExitStack()
        self._gateway: Gateway | None = None
        self._line: SwitchLine | None = None
        self._starting = asyncio.Lock()
        self._lost: list[str] = []

    @property
    def way_out(self) -> WayOut | None:
        """What guests are told of it; None before there was one."""
        return self._gateway.way_out if self._gateway else None

    @property
    def lost(self) -> Sequence[str]:
        """What there is to tell of those that died."""
        has_died = self._gateway is not None and self._gateway.over
        return (*self._lost, *((_DIED,) if has_died else ()))

    async def serve(self, line: SwitchLine, *, tier: Tier) -> None:
        """Have one that lives, at that switch. NetworkFailed where it can't be."""
        async with self._starting:
            gateway = self._gateway
            if gateway is not None and (gateway.over or self._line is not line):
                await self.close()
            if self._gateway is None:
                await self._open(line, tier)

    async def close(self) -> None:
        """End it; one that has died is told of."""
        self._lost = list(self.lost)
        self._gateway = self._line = None
        await self._running.aclose()

    async def _open(self, line: SwitchLine, tier: Tier) -> None:
        async with AsyncExitStack() as undo:
            gateway = await undo.enter_async_context(self._start(tier))
            resolvers = [str(address) for address in gateway.way_out.resolvers]
            try:
                await line.guard(WAY_OUT, gateway.wire, resolvers)
            except OSError as error:
                raise NetworkFailed(f"the switch does not take the gateway: {error}") from error
            gateway.wire.close()  # the switch has it
            self._running.push_async_exit(undo.pop_all())
            self._gateway, self._line = gateway, line
