"""Lent wires: the way out of a setup, taken back before its machine is frozen.

Whatever is restored from that machine, on another network or on none, must not know what it was
called there: no address, no route, no neighbour, no resolver.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pytest_vmsandbox.errors import NetworkFailed
from pytest_vmsandbox.guest.channel import Channel
from pytest_vmsandbox.guest.furnishing import NOTHING, Furnishing, Interface
from pytest_vmsandbox.machine.settings_file import (
    find_settings,
    remove_settings,
    uncover_settings,
    write_settings,
)
from pytest_vmsandbox.machine.wires import PluggedWires
from pytest_vmsandbox.network.addresses import placeholder_mac
from pytest_vmsandbox.network.hosts import PATH as HOSTS
from pytest_vmsandbox.network.hosts import render_hosts
from pytest_vmsandbox.network.way_out import RESOLV_CONF

_RESOLVERS = str(RESOLV_CONF)


class LentWires(PluggedWires):
    """Wires that a guest is furnished with for a while; it must be running to have them taken."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # What the guest had before we wrote to it, and what we wrote.
        self._had_hosts: bool | None = None
        self._resolvers: str | None = None
        self._ours: str | None = None

    def plan_furnishing(self) -> Furnishing:
        """Part of Wires: first the guest is asked what it has."""
        return NOTHING

    async def furnish(self, channel: Channel) -> None:
        """Part of Wires."""
        with self._failing("can't be asked whom it knows by name"):
            if self._had_hosts is None:
                self._had_hosts = await find_settings(channel, HOSTS) is not None
            found = await find_settings(channel, _RESOLVERS)
            if found is None or found != self._ours:  # else a disk has kept ours since it was off
                self._resolvers = found
            await super().furnish(channel)
            self._ours = await find_settings(channel, _RESOLVERS)

    async def take_back(self, channel: Channel) -> None:
        """Have the guest, which was furnished, know nothing of them any more.

        NetworkFailed where it can't be; nothing passes any more in either case.
        """
        self._channel = None
        self._stop_retrying()
        try:
            with self._failing("can't be made to forget its way out"):
                await self._forget_names(channel)
                await self._forget_resolvers(channel)
                for address in self.addresses.values():  # its peers are told
                    await channel.set_addresses(Interface(name=address.mac))
        finally:
            await self.unplug()
        with self._failing("can't be made to forget what its card was called"):
            # What the card has heard since is taken from it now, and is for nobody.
            for at, address in enumerate(self.addresses.values()):
                card = f"{address.mac},{placeholder_mac(at)}"
                await channel.set_addresses(Interface(name=card))

    async def _forget_names(self, channel: Channel) -> None:
        if await uncover_settings(channel, HOSTS):
            return
        found = await find_settings(channel, HOSTS)
        left = render_hosts(found or "", {})
        if found and not left and not self._had_hosts:
            await remove_settings(channel, HOSTS)
        elif found is not None and left != found:
            await write_settings(channel, HOSTS, left)

    async def _forget_resolvers(self, channel: Channel) -> None:
        if await find_settings(channel, _RESOLVERS) != self._ours:
            return  # the setup has chosen its own
        if await uncover_settings(channel, _RESOLVERS):
            return
        if self._resolvers is None:
            await remove_settings(channel, _RESOLVERS)
        else:
            await write_settings(channel, _RESOLVERS, self._resolvers)

    @contextmanager
    def _failing(self, what: str) -> Iterator[None]:
        try:
            yield
        except (NetworkFailed, TimeoutError):
            raise
        except OSError as error:
            raise NetworkFailed(f"{self.machine} {what}: {error}") from error
