"""One of a worker's networks."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass, field

from pytest_vmsandbox.errors import NetworkFailed, RequestInvalid
from pytest_vmsandbox.machine.wires import PluggedWires
from pytest_vmsandbox.network.addresses import Lessor
from pytest_vmsandbox.network.client import SwitchLine
from pytest_vmsandbox.network.impairment import Impairment


@dataclass(slots=True, kw_only=True)
class CarriedNetwork:
    """Who is on it, what carries it, and what is wrong with it."""

    lessor: Lessor
    line: SwitchLine | None = None  # which carries it, once a machine was on
    plugged: set[str] = field(default_factory=set)
    members: dict[str, PluggedWires] = field(default_factory=dict)
    cuts: frozenset[frozenset[str]] = frozenset()
    impairment: Impairment = field(default_factory=Impairment)
    told: SwitchLine | None = None  # which knows what is wrong with it
    # What is told after the network was dropped would have the switch make it anew.
    _telling: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def number(self) -> int:
        """What the switch calls it."""
        return self.lessor.network

    @property
    def carried_by(self) -> SwitchLine:
        """The switch that carries it; RequestInvalid before any machine on it was on."""
        if self.line is None:
            raise RequestInvalid(f"no machine on network {self.lessor.name!r} has been on yet")
        return self.line

    @property
    def disturbed(self) -> bool:
        """Whether anything is wrong with it, or may be."""
        doubtful = self.line not in (None, self.told) and not self.carried_by.over
        return bool(self.cuts) or not self.impairment.none or doubtful

    async def have_wrong(self, cuts: frozenset[frozenset[str]], impairment: Impairment) -> None:
        """Have this wrong with it, and nothing else; what is refused is not noted down."""
        async with self._telling:
            await self._tell(cuts, impairment)

    async def _tell(self, cuts: frozenset[frozenset[str]], impairment: Impairment) -> None:
        line, self.told = self.carried_by, None
        await line.cut(self.number, cuts)
        await line.impair(self.number, impairment)
        self.cuts, self.impairment, self.told = cuts, impairment, line

    async def heal(self) -> None:
        """Have nothing wrong with it."""
        if self.line is None:
            self.cuts, self.impairment = frozenset(), Impairment()
            return
        try:
            await self.have_wrong(frozenset(), Impairment())
        except NetworkFailed:  # it carries nothing, and what will has nothing to inherit
            self.cuts, self.impairment = frozenset(), Impairment()
            raise

    def inherit(self, twin: str, original: str) -> None:
        """Part a twin, which is not plugged in yet, from whomever its original is parted from."""
        others = [pair - {original} for pair in self.cuts if original in pair]
        if others:
            self.cuts |= {other | {twin} for other in others}
            self.told = None

    async def let_go(self, machine: str) -> None:
        """Have nothing wrong any more with one that is gone: its name may be another's."""
        async with self._telling:
            kept = frozenset(pair for pair in self.cuts if machine not in pair)
            if kept == self.cuts:
                return
            self.cuts, self.told = kept, None
            if self.line is not None:
                with suppress(NetworkFailed, OSError):  # it is told before the next is plugged in
                    await self._tell(kept, self.impairment)

    async def drop(self) -> None:
        """Be carried no more: nobody is on it."""
        async with self._telling:
            line, self.line = self.line, None
            if line is not None:
                await line.drop(self.number)
