"""The network of a setup: a way out to the world, or none."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING

from pytest_vmsandbox.deadline import Deadline
from pytest_vmsandbox.errors import RequestInvalid
from pytest_vmsandbox.machine.build import Build
from pytest_vmsandbox.machine.controller import MachineController
from pytest_vmsandbox.machine.spec import MachineSpec
from pytest_vmsandbox.machine.templates.layer import Template
from pytest_vmsandbox.machine.templates.lent_wires import LentWires
from pytest_vmsandbox.network.topology import NAT

if TYPE_CHECKING:
    from pytest_vmsandbox.machine.worker import Worker


def require_way_out(wanted: object, networks: Sequence[str]) -> bool:
    """Whether a setup that asked for `wanted` has a way out, whose machines are for `networks`.

    Raises RequestInvalid for what no setup can have.
    """
    if wanted is not None and wanted != NAT:
        raise RequestInvalid(
            f"setup_network={wanted!r}: a setup is on no network with other machines, for they "
            "decide what becomes of it, and nothing tells whether they are still the same",
            f'setup_network="{NAT}" is a way out to the world',
        )
    return wanted == NAT or NAT in networks


def cards_for(spec: MachineSpec, below: Template | None, *, way_out: bool) -> int:
    """How many network cards the machine of a setup has, and each machine out of its template.

    Raises RequestInvalid where the template `below` can't give it what a way out takes.
    """
    if below is None:
        return max(len(spec.networks), int(way_out))
    if way_out and not below.cards:
        raise RequestInvalid(
            f'setup_network="{NAT}" takes a network card, and {below!r}, on which it is to be '
            "made, has none; a frozen machine gets no new one",
            f'build that one with setup_network="{NAT}", or a network=, as well',
        )
    return below.cards


async def lend_way_out(worker: Worker, build: Build) -> Build:
    """The same on the network with a way out, called as nobody else is there."""
    name, taken = build.config.name, worker.networks.names_on(NAT)
    free = next(
        each for at in count(1) if (each := name if at == 1 else f"{name}-{at}") not in taken
    )
    config = replace(build.config, name=free)
    return await worker.wired(replace(build, config=config), make=LentWires)


async def take_back_way_out(machine: MachineController, seconds: float) -> None:
    """Have the guest know nothing of the network that its setup was on, if it was on one.

    That may take so many seconds, before scaling. RequestInvalid where it is powered off,
    NetworkFailed where the guest can't be made to forget, TimedOut where it takes longer.
    """
    wires = machine.build.wires
    if not isinstance(wires, LentWires):
        return
    deadline = Deadline.after(seconds=seconds * machine.build.time_scale)
    running = machine.running
    await running.wait_answering(deadline=deadline)
    try:
        async with asyncio.timeout(deadline.timeout_s):
            await running.unless_it_fails(wires.take_back(running.channel))
    except TimeoutError:
        if not deadline.passed:
            raise  # the guest's own ETIMEDOUT
        raise deadline.timed_out(f"{machine.name} to forget its way out") from None
    await machine.set_link(up=True)  # whatever the setup did to it
