"""The switch: a process that carries the frames of one worker's networks.

It reads requests from its stdin, one packet each, a JSON object and descriptors, from nobody but
the pytest process that started it, and ends with it. Behind walls it lives in a network namespace
of its own, which nobody else enters; in the tier bare it is told so, and makes no interface.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from ipaddress import ip_address
from itertools import count
from typing import Any, TypeAlias

from pytest_vmsandbox.linux.owned_fd import OwnedFd
from pytest_vmsandbox.linux.packets import received_packets
from pytest_vmsandbox.linux.sock_diag import destroy_connections
from pytest_vmsandbox.linux.tun import open_tap
from pytest_vmsandbox.network.addresses import WAY_OUT
from pytest_vmsandbox.network.border import Border
from pytest_vmsandbox.network.guarded_hub import GATEWAY_PORT, GuardedHub
from pytest_vmsandbox.network.hub import Hub
from pytest_vmsandbox.network.impairment import Impairment
from pytest_vmsandbox.network.link_watch import LinkWatch
from pytest_vmsandbox.network.pcap import PcapWriter
from pytest_vmsandbox.network.plane import Broken, Plane
from pytest_vmsandbox.network.port import StreamPort
from pytest_vmsandbox.network.socket_plane import SocketPlane
from pytest_vmsandbox.network.tap_plane import TapPlane
from pytest_vmsandbox.network.trial import decide_kind
from pytest_vmsandbox.network.wire_kind import WireKind

PACKET_BYTES = 64 * 1024
DESCRIPTORS_AT_MOST = 4

# What argv says of where it runs; after that stands which kind of wires is wished for.
WALLED, BARE = "walled", "bare"

# In seconds, seconds and times (tcp(7)).
_KEEPALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 5}


def main(line: socket.socket) -> None:
    """Serve `line` until it ends."""
    where, wish = sys.argv[1:]
    asyncio.run(_Switch(line, walled=where == WALLED, wish=wish).serve())


# What is answered, and the descriptors that are handed over with it, and closed here then.
_Answer: TypeAlias = tuple[dict[str, Any], Sequence[OwnedFd]]
_Operation: TypeAlias = Callable[[dict[str, Any], list[int]], _Answer]


class _Switch:
    def __init__(self, line: socket.socket, *, walled: bool, wish: str) -> None:
        self._line = line
        self._walled = walled
        self._kind, self._because = decide_kind(wish, walled=walled)
        self._planes: dict[int, Plane] = {}
        self._hubs: dict[int, Hub] = {}  # by which they are carried, or may be
        self._numbers = count()
        self._captures: dict[int, tuple[int, PcapWriter]] = {}  # with the network of each
        self._tasks: set[asyncio.Task[None]] = set()
        self._over = asyncio.Event()
        self._failure: BaseException | None = None
        self._operations: dict[str, _Operation] = {
            "plug": self._plug,
            "guard": self._guard,
            "loose": self._loose,
            "unplug": self._unplug,
            "cut": self._cut,
            "impair": self._impair,
            "capture": self._capture,
            "end_capture": self._end_capture,
            "counts": self._counts,
            "drop": self._drop,
        }

    async def serve(self) -> None:
        loop = asyncio.get_running_loop()
        # An error that nobody sees would be a network that carries nothing, without a word.
        loop.set_exception_handler(self._fail)
        self._line.settimeout(0)
        loop.add_reader(self._line, self._readable)
        if self._kind is WireKind.TAP:
            self._watch = LinkWatch()
        self._send({"ready": self._kind, "because": self._because}, ())
        await self._over.wait()
        if self._failure is not None:
            raise self._failure

    def _fail(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self._failure = context.get("exception") or RuntimeError(str(context))
        self._over.set()

    # Requests

    def _readable(self) -> None:
        for packet, descriptors in received_packets(
            self._line, bytes_at_most=PACKET_BYTES, descriptors_at_most=DESCRIPTORS_AT_MOST
        ):
            if not packet:
                self._over.set()
                return
            form = json.loads(packet)
            if form["request"] == "connect":
                task = asyncio.ensure_future(self._connect(form))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
            else:
                self._perform(form, descriptors)
            if self._over.is_set():
                return

    def _perform(self, form: dict[str, Any], descriptors: list[int]) -> None:
        try:
            answer, handed = self._operations[form["request"]](form, descriptors)
        except (OSError, ValueError, KeyError, Broken) as error:
            for descriptor in descriptors:
                os.close(descriptor)
            self._refuse(form, error)
        else:
            with ExitStack() as held:
                for descriptor in handed:
                    held.enter_context(descriptor)
                self._send({"number": form["number"], **answer}, handed)

    def _refuse(self, form: dict[str, Any], error: Exception) -> None:
        try:  # it may have been removed under our hands
            if form.get("network") in self._planes:
                self._planes[form["network"]].require_whole()
        except Broken as broken:
            error = broken
        if isinstance(error, Broken):
            self._send({"number": form["number"], **_form_of(error)}, ())
            return
        code = error.errno if isinstance(error, OSError) else errno.EINVAL
        sentence = (error.strerror if isinstance(error, OSError) else "") or str(error)
        self._send({"number": form["number"], "errno": code, "refused": sentence}, ())

    def _send(self, form: dict[str, Any], descriptors: Sequence[int]) -> None:
        self._line.settimeout(None)  # whoever asks reads the answer
        try:
            socket.send_fds(self._line, [json.dumps(form).encode()], descriptors)
        except OSError:
            self._over.set()
        finally:
            self._line.settimeout(0)

    # Operations

    def _plane(self, form: dict[str, Any]) -> Plane:
        """The network that is asked for, which must be whole; made when it is first mentioned."""
        number = form["network"]
        plane = self._planes.get(number)
        if plane is None:
            hub = GuardedHub() if number == WAY_OUT else Hub()
            plane = self._planes[number] = self._made(form, hub)
            self._hubs[number] = hub
        plane.require_whole()
        return plane

    def _made(self, form: dict[str, Any], hub: Hub) -> Plane:
        number = form["network"]
        if self._kind is WireKind.SOCKET:
            return SocketPlane(number, hub, walled=self._walled)
        return TapPlane(
            number,
            hub,
            title=form.get("title", str(number)),
            numbers=self._numbers,
            watch=self._watch,
            told=self._tell,
        )

    def _tell(self, broken: Broken) -> None:
        self._send(_form_of(broken), ())

    def _plug(self, form: dict[str, Any], _: list[int]) -> _Answer:
        return {}, [self._plane(form).plug(form["port"], machine=form["machine"])]

    def _guard(self, form: dict[str, Any], descriptors: list[int]) -> _Answer:
        (descriptor,) = descriptors
        self._plane(form)
        hub = self._hubs[form["network"]]
        if not isinstance(hub, GuardedHub):
            raise ValueError("it is a network without a way out")
        if GATEWAY_PORT in hub.ports:
            hub.unplug(GATEWAY_PORT)
        hub.border = Border(tuple(form["resolvers"]))
        hub.plug(StreamPort(GATEWAY_PORT, socket.socket(fileno=descriptor)))
        return {}, []

    def _loose(self, _: dict[str, Any], __: list[int]) -> _Answer:
        """An end like those that machines have, with nobody at the other."""
        return {}, [open_tap(f"loose{next(self._numbers)}", offloads=True)]

    def _unplug(self, form: dict[str, Any], _: list[int]) -> _Answer:
        if self._planes[form["network"]].unplug(form["port"]):
            # A machine that is gone says no more, and TCP would wait for it (tcp(7), keepalive).
            for address in form["addresses"]:
                with suppress(OSError):  # this kernel can't: it takes the keepalive's time then
                    destroy_connections(ip_address(address))
        return {}, []

    def _cut(self, form: dict[str, Any], _: list[int]) -> _Answer:
        self._plane(form).cut(frozenset(pair) for pair in form["pairs"])
        return {}, []

    def _impair(self, form: dict[str, Any], _: list[int]) -> _Answer:
        self._plane(form).impair(Impairment(**form["impairment"]))
        return {}, []

    def _capture(self, form: dict[str, Any], descriptors: list[int]) -> _Answer:
        plane = self._plane(form)
        (descriptor,) = descriptors
        writer = PcapWriter(open(descriptor, "wb"))  # noqa: SIM115, PTH123
        descriptors.clear()  # it is the writer's
        with ExitStack() as undo:
            undo.callback(writer.close)
            plane.capture(form["capture"], writer)
            undo.pop_all()
        self._captures[form["capture"]] = form["network"], writer
        return {}, []

    def _end_capture(self, form: dict[str, Any], _: list[int]) -> _Answer:
        network, writer = self._captures.pop(form["capture"])
        plane = self._planes.get(network)
        if plane is not None and form["capture"] in self._hubs[network].captures:
            plane.end_capture(form["capture"])
        # A network that is gone has closed it, also if there is another one of its number now.
        failure = writer.failure
        return {"failure": "" if failure is None else failure.strerror or str(failure)}, []

    def _counts(self, form: dict[str, Any], _: list[int]) -> _Answer:
        return dict(self._plane(form).counts()), []

    def _drop(self, form: dict[str, Any], _: list[int]) -> _Answer:
        plane = self._planes.pop(form["network"], None)
        self._hubs.pop(form["network"], None)
        if plane is not None:
            plane.close()
        return {}, []

    async def _connect(self, form: dict[str, Any]) -> None:
        try:
            self._plane(form).require_host_end()
            address, port = form["address"], form["port"]
            with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as sock:
                sock.settimeout(0)
                async with asyncio.timeout(form["timeout_s"]):
                    await asyncio.get_running_loop().sock_connect(sock, (address, port))
                _keep_alive(sock)
                self._send({"number": form["number"]}, [sock.fileno()])
        except TimeoutError:
            self._refuse(form, OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT)))
        except (OSError, ValueError, Broken) as error:
            self._refuse(form, error)


def _form_of(broken: Broken) -> dict[str, Any]:
    return {"broken": broken.part, "cause": broken.sentence}


def _keep_alive(sock: socket.socket) -> None:
    """Let a connection to a machine that is gone end with an error, within half a minute."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE.items():
        sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
