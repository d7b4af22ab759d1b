"""The client: our end of the switch's line."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any
from weakref import WeakSet

from pytest_vmsandbox.deadline import Deadline
from pytest_vmsandbox.errors import BridgeLost, NetworkFailed, SwitchDied, TapLost
from pytest_vmsandbox.linux.disconnect import disconnect
from pytest_vmsandbox.linux.owned_fd import OwnedFd
from pytest_vmsandbox.linux.packets import received_packets
from pytest_vmsandbox.network.impairment import Impairment
from pytest_vmsandbox.network.plane import Part
from pytest_vmsandbox.network.switch import DESCRIPTORS_AT_MOST, PACKET_BYTES
from pytest_vmsandbox.network.topology import NAT
from pytest_vmsandbox.network.wire_kind import WireKind

# All that a switch process is made of, beside the standard library.
MODULES = tuple(
    f"pytest_vmsandbox.{name}"
    for name in (
        "deadline",
        "errors",
        "linux.interface_name",
        "linux.link_notices",
        "linux.netlink",
        "linux.owned_fd",
        "linux.packets",
        "linux.rtnetlink",
        "linux.sock_diag",
        "linux.tun",
        "network.addresses",
        "network.border",
        "network.cable",
        "network.frames",
        "network.guarded_hub",
        "network.host_end",
        "network.hub",
        "network.impairment",
        "network.link_watch",
        "network.own_address",
        "network.pcap",
        "network.plane",
        "network.port",
        "network.socket_plane",
        "network.switch",
        "network.tap_plane",
        "network.trial",
        "network.wire_kind",
    )
)
ENTRY = "pytest_vmsandbox.network.switch"

# What it is that somebody took away, and we raise for it.
_BROKEN: Mapping[Part, type[NetworkFailed]] = {Part.BRIDGE: BridgeLost, Part.TAP: TapLost}

# What an answer may take, in seconds, on the slowest of hosts.
ANSWER_S = 30.0


class SwitchLine:
    """A line to a switch that runs; every wait for it ends with SwitchDied once it has ended.

    Networks are known by number, machines on them by name. `last_words` says what it printed.
    `kind` is that of its wires, once it is ready, and `because` why they are no taps; `told` is
    called with the error when anybody took away what they are made of: BridgeLost or TapLost.
    """

    def __init__(self, line: socket.socket, *, last_words: Callable[[], str]) -> None:
        self._line = line
        self._line.settimeout(0)
        self._last_words = last_words
        self._numbers = 0
        self._waiting: dict[int, asyncio.Future[tuple[dict[str, Any], list[int]]]] = {}
        self._connected: WeakSet[socket.socket] = WeakSet()
        self._loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[None] = self._loop.create_future()
        self.over = False
        self.kind, self.because = WireKind.SOCKET, ""
        self.told: Callable[[NetworkFailed], None] = _nobody
        self._loop.add_reader(line, self._readable)

    async def ready(self, *, deadline: Deadline) -> None:
        """Return once it listens."""
        try:
            async with asyncio.timeout(deadline.timeout_s):
                await asyncio.shield(self._ready)
        except TimeoutError:
            raise deadline.timed_out("the switch", self._last_words()) from None

    def close(self) -> None:
        """Hang up, whereupon it ends."""
        if not self.over:
            self._lose()
        self._line.close()

    # What it can be asked for

    async def plug(
        self, network: int, name: str, *, title: str, machine: int | None = None
    ) -> OwnedFd:
        """A machine's end of a new wire, for the caller to hand to its VMM, and close.

        `title` is what errors call the network. On a network with a way out, `machine` is its
        number there, in whose name alone it speaks. OSError where it can't be made.
        """
        _, received = await self._ask(
            "plug", network=network, port=name, title=title, machine=machine
        )
        return _only(received)

    async def loose_tap(self) -> OwnedFd:
        """An end like those of machines, where those are taps, with nobody at the other."""
        _, received = await self._ask("loose")
        return _only(received)

    async def guard(self, network: int, gateway: socket.socket, resolvers: Sequence[str]) -> None:
        """Have this gateway, instead of another, on the network with a way out.

        Beside what lies beyond it only the `resolvers` there are reached (border.py).
        """
        answered = list(resolvers)
        await self._ask("guard", [gateway.fileno()], network=network, title=NAT, resolvers=answered)

    async def unplug(self, network: int, name: str, addresses: Sequence[str]) -> None:
        """Carry it no more; whoever was connected to these addresses from here gets an error."""
        await self._ask("unplug", network=network, port=name, addresses=list(addresses))

    async def cut(self, network: int, pairs: Iterable[frozenset[str]]) -> None:
        """Let nothing pass between these pairs of machines, and everything between others."""
        await self._order("cut", network=network, pairs=[sorted(pair) for pair in pairs])

    async def impair(self, network: int, impairment: Impairment) -> None:
        """Treat every frame on the network so from now on."""
        await self._order("impair", network=network, impairment=asdict(impairment))

    async def capture(self, network: int, number: int, file: int) -> None:
        """Write every frame that is sent to a file, until `end_capture`."""
        await self._order("capture", [file], network=network, capture=number)

    async def end_capture(self, number: int) -> str:
        """Write no more; what was written is in the file. Why that is not all, if it is not."""
        answer = await self._order("end_capture", capture=number)
        return str(answer["failure"])

    async def counts(self, network: int) -> Mapping[str, int]:
        """What became of the network's frames: carried, cut, lost, overflowed."""
        answer = await self._order("counts", network=network)
        return {name: count for name, count in answer.items() if name != "number"}

    async def drop(self, network: int) -> None:
        """Forget a network, with all that was wrong with it."""
        await self._order("drop", network=network)

    async def connect(
        self, network: int, address: str, port: int, *, timeout_s: float
    ) -> socket.socket:
        """A socket connected to a machine, from the host's end of the network.

        OSError as in `socket.connect`; EOPNOTSUPP where there can be no such end.
        """
        _, received = await self._ask(
            "connect",
            network=network,
            address=address,
            port=port,
            timeout_s=timeout_s,
            answer_s=timeout_s + ANSWER_S,
        )
        sock = socket.socket(fileno=_only(received))
        self._connected.add(sock)
        return sock

    async def _order(
        self, request: str, descriptors: Sequence[int] = (), **form: object
    ) -> Mapping[str, Any]:
        """What is answered; NetworkFailed also where it can't be done, and nothing is then."""
        try:
            answer, _ = await self._ask(request, descriptors, answer_s=ANSWER_S, **form)
        except OSError as error:
            cause = error.strerror or str(error)
            raise NetworkFailed(f"the switch can't do this ({request}): {cause}") from error
        return answer

    async def _ask(
        self,
        request: str,
        descriptors: Sequence[int] = (),
        *,
        answer_s: float = ANSWER_S,
        **form: object,
    ) -> tuple[dict[str, Any], list[int]]:
        if self.over:
            raise self._lost()
        self._numbers += 1
        number = self._numbers
        answer = self._loop.create_future()
        self._waiting[number] = answer
        packet = json.dumps({"number": number, "request": request, **form}).encode()
        deadline = Deadline.after(seconds=answer_s)
        try:
            async with asyncio.timeout(answer_s):
                await self._send(packet, descriptors)
                told, received = await answer
        except BaseException as error:
            # We may have been cancelled after the answer came, and before we were called.
            if answer.done() and not answer.cancelled() and not answer.exception():
                for descriptor in answer.result()[1]:
                    os.close(descriptor)
            if isinstance(error, TimeoutError):
                raise deadline.timed_out("the switch's answer", self._last_words()) from None
            raise
        finally:
            del self._waiting[number]
        if "broken" in told:
            raise _broken(told)
        if "refused" in told:
            raise OSError(told["errno"], told["refused"])
        return told, received

    async def _send(self, packet: bytes, descriptors: Sequence[int]) -> None:
        while True:
            try:
                socket.send_fds(self._line, [packet], list(descriptors))
            except BlockingIOError:
                await asyncio.sleep(0.005)
            except OSError:
                self._lose()
                raise self._lost() from None
            else:
                return

    def _readable(self) -> None:
        for packet, descriptors in received_packets(
            self._line, bytes_at_most=PACKET_BYTES, descriptors_at_most=DESCRIPTORS_AT_MOST
        ):
            if not packet:
                self._lose()
                return
            self._take(json.loads(packet), descriptors)

    def _take(self, form: dict[str, Any], descriptors: list[int]) -> None:
        if "ready" in form:
            self.kind, self.because = WireKind(form["ready"]), form["because"]
            self._ready.set_result(None)
            return
        if "number" not in form:
            self.told(_broken(form))
            return
        waiting = self._waiting.get(form["number"])
        if waiting is not None and not waiting.done():
            waiting.set_result((form, descriptors))
            return
        for descriptor in descriptors:
            os.close(descriptor)

    def _lose(self) -> None:
        if self.over:
            return
        self.over = True
        self._loop.remove_reader(self._line)
        for sock in self._connected:  # what they say is carried no more, and nobody would tell
            with suppress(OSError):  # it is closed, or has ended
                disconnect(sock)
        awaited: list[asyncio.Future[Any]] = [*self._waiting.values(), self._ready]
        for future in awaited:
            if not future.done():
                future.set_exception(self._lost())
                future.exception()  # it may be that nobody waits any more

    def _lost(self) -> SwitchDied:
        return SwitchDied("the switch has ended, which carried it", self._last_words())


def _only(received: Sequence[int]) -> OwnedFd:
    if not received:  # we may hold no more (recvmsg(2), MSG_CTRUNC)
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    return OwnedFd(received[0])


def _broken(form: Mapping[str, Any]) -> NetworkFailed:
    return _BROKEN[Part(form["broken"])](form["cause"])


def _nobody(_: NetworkFailed) -> None:
    """Whom nobody asked to be told."""
