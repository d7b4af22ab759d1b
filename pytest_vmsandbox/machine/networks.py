"""The networks of a worker: who is on which, what carries them, and what is wrong with them."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Container, Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, suppress
from dataclasses import replace
from itertools import count, product
from pathlib import Path
from typing import Any

from pytest_vmsandbox.errors import (
    AddressesExhausted,
    NetworkFailed,
    RequestInvalid,
    SwitchDied,
    TimedOut,
)
from pytest_vmsandbox.host.facts import Tier
from pytest_vmsandbox.linux import OwnedFd
from pytest_vmsandbox.machine.carried_network import CarriedNetwork
from pytest_vmsandbox.machine.kept_gateway import KeptGateway, StartGateway
from pytest_vmsandbox.machine.wires import LooseWires, PluggedWires, Wires
from pytest_vmsandbox.network.addresses import NETWORKS, WAY_OUT, Address, Lessor
from pytest_vmsandbox.network.client import SwitchLine
from pytest_vmsandbox.network.topology import NAT
from pytest_vmsandbox.network.way_out import WayOut
from pytest_vmsandbox.network.wire_kind import AUTO, WireKind

# For a tier, and a wish of WISHES.
StartSwitch = Callable[[Tier, str], AbstractAsyncContextManager[SwitchLine]]

_DIED = SwitchDied("the switch has ended; a network whose machines are all off gets another")


class Networks:
    """Networks by name. One exists while a machine is on it; the switch, from first need on.

    The switch, and the gateway of the one with a way out, are started in the tier of the first
    machine that is for a network. The switch decides what wires are made of, as far as `wish` does
    not; that is what they are from then on.
    """

    def __init__(
        self, start: StartSwitch, start_gateway: StartGateway, *, wish: str = AUTO
    ) -> None:
        self._start = start
        self._gateway = KeptGateway(start_gateway)
        self._wish = wish
        self._networks: dict[str, CarriedNetwork] = {}
        self._running = AsyncExitStack()
        self._tier: Tier | None = None
        self._line: SwitchLine | None = None
        self._starting = asyncio.Lock()
        self._captures = count(1)
        self._capturing: dict[int, SwitchLine] = {}
        self._failures: list[NetworkFailed] = []

    @property
    def lost(self) -> Sequence[str]:
        """What carried them and has died, or was taken away."""
        has_died = self._line is not None and self._line.over
        failures = (*self._failures, *((_DIED,) if has_died else ()))
        told = [f"{type(failure).__name__}: {failure.cause}" for failure in failures]
        return (*told, *self._gateway.lost)

    @property
    def kind(self) -> WireKind:
        """What wires are made of, once that is decided."""
        return WireKind(self._wish)

    async def loose(self, networks: Sequence[str], *, tier: Tier, cards: int = 0) -> LooseWires:
        """Wires for a machine that is to be on these networks, of the kind that they will be.

        There are as many as `cards`, where that is more than it has networks.
        """
        self._tier = self._tier or tier
        spare = max(cards - len(networks), 0)
        if not networks and not spare:
            return LooseWires()
        if self._line is None and self._wish != WireKind.SOCKET:
            await self._switch()
        open_tap = None if self.kind is WireKind.SOCKET else self.loose_tap
        return LooseWires(networks=networks, spare=spare, open_tap=open_tap)

    def join(
        self,
        machine: str,
        former: Wires,
        *,
        tier: Tier,
        time_scale: float = 1.0,
        make: Callable[..., PluggedWires] = PluggedWires,
    ) -> PluggedWires:
        """A machine's places on its networks, which are made where they are not there yet.

        `former` names them, and has the cards that its guest may still know by their old addresses:
        those of a template, or of a machine whose twin it is, and with which it is cut off.
        NameTaken where its name is on one, AddressesExhausted where one is full, or there are too
        many; it is on none then.
        """
        self._tier = self._tier or tier
        networks = former.networks
        addresses: dict[str, Address] = {}
        try:
            for name in networks:
                addresses[name] = self._made(name).lessor.lease(machine)
        except BaseException:
            for name in networks:
                if name in addresses:
                    self._networks[name].lessor.release(machine)
                if name in self._networks and not self._networks[name].members:
                    del self._networks[name]  # it was made just now
            raise
        wires = make(
            machine,
            addresses,
            self,
            former=[card.mac for card in former.cards[: len(networks)]],
            spare=former.spare,
            time_scale=time_scale,
        )
        for name in networks:
            self._networks[name].members[machine] = wires
            if isinstance(former, PluggedWires):
                self._networks[name].inherit(machine, former.machine)
        return wires

    async def close(self) -> None:
        """End the switch, and the gateway."""
        await self._gateway.close()
        await self._end_switch()

    # For wires

    async def loose_tap(self) -> OwnedFd:
        """Part of Switch."""
        return await (await self._switch()).loose_tap()

    async def plug(self, network: str, name: str) -> OwnedFd:
        """Part of Switch."""
        there = self._networks[network]
        if there.line is None or not there.plugged:
            # Those who are plugged into a switch that has ended hear nothing any more, and stay
            # together with whoever joins them; once all of them are off, they get another.
            there.line = await self._switch()
        machine = None
        if network == NAT:
            await self._gateway.serve(there.line, tier=self._tier or Tier.BARE)
            machine = there.lessor.number_of(name)
        try:
            wire = await there.line.plug(there.number, name, title=network, machine=machine)
        except OSError as error:
            raise NetworkFailed(f"{name} can't be plugged into {network!r}: {error}") from error
        there.plugged.add(name)
        if there.told is not there.line:  # nothing is sent there yet: its machine has not begun
            try:
                await there.have_wrong(there.cuts, there.impairment)
            except BaseException:
                wire.close()
                raise
        return wire

    async def unplug(self, network: str, name: str, address: Address) -> None:
        """Part of Switch."""
        there = self._networks[network]
        there.plugged.discard(name)
        if there.line is not None:
            addresses = (str(address.ip), str(address.ip6))
            await there.line.unplug(there.number, name, addresses)

    def members(self, network: str) -> Mapping[str, Address]:
        """Part of Switch."""
        return self._networks[network].lessor.members

    def way_out(self, network: str) -> WayOut | None:
        """Part of Switch."""
        return self._gateway.way_out if network == NAT else None

    def neighbours(self, wires: PluggedWires) -> Sequence[PluggedWires]:
        """Part of Switch."""
        found = {
            id(other): other
            for name in wires.addresses
            if name != NAT  # where nobody reaches another
            for other in self._networks[name].members.values()
        }
        return [other for other in found.values() if other is not wires]

    async def left(self, wires: PluggedWires) -> None:
        """Part of Switch."""
        for name in wires.addresses:
            network = self._networks.get(name)
            if network is None or network.members.get(wires.machine) is not wires:
                continue
            del network.members[wires.machine]
            network.lessor.release(wires.machine)
            if network.members:
                await network.let_go(wires.machine)
            else:
                await self._forget(name)

    async def _forget(self, name: str) -> None:
        """Have it no more, now that nobody is on it."""
        network = self._networks.pop(name)
        with suppress(NetworkFailed):  # it has ended, and remembers nothing
            if name == NAT:  # its gateway stays
                try:
                    await network.heal()
                except NetworkFailed:
                    await self._gateway.close()  # another one gets another network
                else:
                    return
            await network.drop()

    async def _switch(self) -> SwitchLine:
        """The switch that runs, started where none does."""
        async with self._starting:
            if self._line is not None and self._line.over:
                await self._end_switch()
            if self._line is None:
                started = self._start(self._tier or Tier.BARE, self._wish)
                self._line = await self._running.enter_async_context(started)
                self._line.told = self._failures.append
                self._wish = self._line.kind
            return self._line

    async def _end_switch(self) -> None:
        """End it; one that has died is told of."""
        if self._line is not None and self._line.over:
            self._failures.append(_DIED)
        self._line = None
        await self._running.aclose()

    # What a test does to them

    @property
    def names(self) -> Sequence[str]:
        """Those that there are now."""
        return tuple(self._networks)

    def names_on(self, network: str) -> Container[str]:
        """What the machines are called that are on it, if there is one."""
        there = self._networks.get(network)
        return () if there is None else there.members.keys()

    @property
    def disturbed(self) -> bool:
        """Whether anything is wrong with any of them, or is captured."""
        return bool(self._capturing) or any(each.disturbed for each in self._networks.values())

    async def settle(self) -> None:
        """Leave nothing of what a test did to them; OSError, in the end, where some stays.

        That a network is carried no more is said to whoever uses it next.
        """
        ending = [self._end_forgotten(number) for number in tuple(self._capturing)]
        healing = [each.heal() for each in tuple(self._networks.values())]
        await _do_all((*ending, *healing), ignored=(NetworkFailed, TimedOut))

    async def partition(
        self, one: Sequence[str], other: Sequence[str], *, network: str | None
    ) -> None:
        """Let nothing pass between machines of the two sides, by name, on top of earlier cuts."""
        if both := set(one) & set(other):
            raise RequestInvalid(f"{', '.join(sorted(both))} can't be on both sides of a partition")
        chosen = self._chosen(network)
        for machine in (*one, *other):
            if not any(machine in each.members for each in chosen):
                raise RequestInvalid(f"{machine} is on no network {network or ''}".rstrip())
        for each in chosen:
            pairs = {
                frozenset(pair)
                for pair in product(one, other)
                if all(machine in each.members for machine in pair)
            }
            await each.have_wrong(each.cuts | pairs, each.impairment)

    async def impair(self, *, network: str | None, **changes: float | None) -> None:
        """Change what is wrong with the wires: the fields of Impairment."""
        for each in self._chosen(network):
            changed = replace(each.impairment, **changes)  # type: ignore[arg-type]  # as it says
            await each.have_wrong(each.cuts, changed)

    async def heal(self, *, network: str | None = None) -> None:
        """Let everything pass again, at once; one network that fails keeps no other from it."""
        chosen = self._chosen(network) if self._networks else ()
        await _do_all([each.heal() for each in chosen])

    async def counts(self, *, network: str) -> Mapping[str, int]:
        """What became of its frames: carried, cut, lost, overflowed."""
        (each,) = self._chosen(network)
        return await each.carried_by.counts(each.number)

    async def start_capture(self, path: Path, *, network: str) -> int:
        """Write what is sent on it to a new file (pcap); the number ends it."""
        (each,) = self._chosen(network)
        number = next(self._captures)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        file = os.open(path, flags, 0o600)
        try:
            await each.carried_by.capture(each.number, number, file)
        finally:
            os.close(file)
        self._capturing[number] = each.carried_by
        return number

    async def end_capture(self, number: int) -> str:
        """Have all of it in the file, or say why it is not; one that has ended has."""
        line = self._capturing.pop(number, None)
        return "" if line is None else await line.end_capture(number)

    async def _end_forgotten(self, number: int) -> None:
        """End one that nobody has ended; OSError where not all of it is in its file."""
        if failure := await self.end_capture(number):
            raise OSError(f"a capture is not whole: {failure}")

    async def connect(
        self, network: str, address: str, port: int, *, timeout_s: float
    ) -> socket.socket:
        """A socket connected to a machine on it, from the host's end."""
        there = self._networks[network]
        return await there.carried_by.connect(there.number, address, port, timeout_s=timeout_s)

    def _made(self, name: str) -> CarriedNetwork:
        if name not in self._networks:
            taken = {each.number for each in self._networks.values()}
            numbers = (WAY_OUT,) if name == NAT else NETWORKS
            number = next((number for number in numbers if number not in taken), None)
            if number is None:
                raise AddressesExhausted(f"there are {len(NETWORKS)} networks already, and no more")
            self._networks[name] = CarriedNetwork(lessor=Lessor(name=name, network=number))
        return self._networks[name]

    def _chosen(self, name: str | None) -> list[CarriedNetwork]:
        """The network of that name, or all."""
        if (name is not None and name not in self._networks) or not self._networks:
            wanted = "a network" if name is None else f"a network {name!r}"
            there = ", ".join(self._networks) or "none"
            raise RequestInvalid(f"there is not {wanted} now", f"there is: {there}")
        return list(self._networks.values()) if name is None else [self._networks[name]]


async def _do_all(
    steps: Sequence[Coroutine[Any, Any, None]], *, ignored: tuple[type[Exception], ...] = ()
) -> None:
    """Do each, and raise afterwards the first error that is not ignored."""
    errors = await asyncio.gather(*steps, return_exceptions=True)
    for error in errors:
        if error is not None and not isinstance(error, ignored):
            raise error
