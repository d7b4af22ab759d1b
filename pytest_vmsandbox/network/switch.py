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
from contextlib import suppress
from ipaddress import ip_address
from typing import Any

from pytest_vmsandbox.linux.sock_diag import destroy_connections
from pytest_vmsandbox.network.addresses import WAY_OUT
from pytest_vmsandbox.network.border import Border
from pytest_vmsandbox.network.guarded_hub import GATEWAY_PORT, GuardedHub
from pytest_vmsandbox.network.host_end import close_host_end, open_host_end
from pytest_vmsandbox.network.hub import Hub
from pytest_vmsandbox.network.impairment import Impairment
from pytest_vmsandbox.network.pcap import PcapWriter
from pytest_vmsandbox.network.port import PacketPort, StreamPort

PACKET_BYTES = 64 * 1024
DESCRIPTORS_AT_MOST = 4

# What argv says of where it runs.
WALLED, BARE = "walled", "bare"

# The host's end is a port like the others; no machine can be called so.
HOST_PORT = "(host)"

# In seconds, seconds and times (tcp(7)).
_KEEPALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 5}


def main(line: socket.socket) -> None:
    """Serve `line` until it ends."""
    asyncio.run(_Switch(line, walled=WALLED in sys.argv).serve())


class _Switch:
    def __init__(self, line: socket.socket, *, walled: bool) -> None:
        self._line = line
        self._walled = walled
        self._hubs: dict[int, Hub] = {}
        self._captures: dict[int, int] = {}  # capture to network
        self._tasks: set[asyncio.Task[None]] = set()
        self._over = asyncio.Event()
        self._failure: BaseException | None = None
        self._operations: dict[str, Callable[[dict[str, Any], list[int]], dict[str, Any]]] = {
            "plug": self._plug,
            "guard": self._guard,
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
        self._send({"ready": True}, ())
        await self._over.wait()
        if self._failure is not None:
            raise self._failure

    def _fail(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self._failure = context.get("exception") or RuntimeError(str(context))
        self._over.set()

    # Requests

    def _readable(self) -> None:
        while not self._over.is_set():
            try:
                packet, descriptors, _, _ = socket.recv_fds(
                    self._line, PACKET_BYTES, DESCRIPTORS_AT_MOST, socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                return
            except OSError:
                packet, descriptors = b"", []
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

    def _perform(self, form: dict[str, Any], descriptors: list[int]) -> None:
        try:
            answer = self._operations[form["request"]](form, descriptors)
        except (OSError, ValueError, KeyError) as error:
            for descriptor in descriptors:
                os.close(descriptor)
            self._refuse(form, error)
        else:
            self._send({"number": form["number"], **answer}, ())

    def _refuse(self, form: dict[str, Any], error: Exception) -> None:
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

    def _hub(self, form: dict[str, Any]) -> Hub:
        return self._hub_of(form["network"])

    def _hub_of(self, network: int) -> Hub:
        if network not in self._hubs:
            self._hubs[network] = GuardedHub() if network == WAY_OUT else Hub()
        return self._hubs[network]

    def _plug(self, form: dict[str, Any], descriptors: list[int]) -> dict[str, Any]:
        (descriptor,) = descriptors
        hub = self._hub(form)
        if form["port"] in hub.ports:
            raise ValueError(f"there is a port {form['port']} already")
        port = StreamPort(form["port"], socket.socket(fileno=descriptor))
        if isinstance(hub, GuardedHub):
            hub.plug_machine(port, form["machine"])
        else:
            hub.plug(port)
        return {}

    def _guard(self, form: dict[str, Any], descriptors: list[int]) -> dict[str, Any]:
        (descriptor,) = descriptors
        hub = self._hub(form)
        if not isinstance(hub, GuardedHub):
            raise ValueError("it is a network without a way out")
        if GATEWAY_PORT in hub.ports:
            hub.unplug(GATEWAY_PORT)
        hub.border = Border(tuple(form["resolvers"]))
        hub.plug(StreamPort(GATEWAY_PORT, socket.socket(fileno=descriptor)))
        return {}

    def _unplug(self, form: dict[str, Any], _: list[int]) -> dict[str, Any]:
        hub = self._hub(form)
        hub.unplug(form["port"])
        if HOST_PORT in hub.ports:
            # A machine that is gone says no more, and TCP would wait for it (tcp(7), keepalive).
            for address in form["addresses"]:
                with suppress(OSError):  # this kernel can't: it takes the keepalive's time then
                    destroy_connections(ip_address(address))
        return {}

    def _cut(self, form: dict[str, Any], _: list[int]) -> dict[str, Any]:
        self._hub(form).cut(frozenset(pair) for pair in form["pairs"])
        return {}

    def _impair(self, form: dict[str, Any], _: list[int]) -> dict[str, Any]:
        self._hub(form).impairment = Impairment(**form["impairment"])
        return {}

    def _capture(self, form: dict[str, Any], descriptors: list[int]) -> dict[str, Any]:
        (descriptor,) = descriptors
        hub = self._hub(form)
        hub.captures[form["capture"]] = PcapWriter(open(descriptor, "wb"))  # noqa: SIM115, PTH123
        self._captures[form["capture"]] = form["network"]
        return {}

    def _end_capture(self, form: dict[str, Any], _: list[int]) -> dict[str, Any]:
        hub = self._hubs.get(self._captures.pop(form["capture"]))
        if hub is not None and (capture := hub.captures.pop(form["capture"], None)):
            capture.close()  # a network that is gone has closed it
        return {}

    def _counts(self, form: dict[str, Any], _: list[int]) -> dict[str, Any]:
        counts = self._hub(form).counts
        return {name: getattr(counts, name) for name in ("carried", "cut", "lost", "overflowed")}

    def _drop(self, form: dict[str, Any], _: list[int]) -> dict[str, Any]:
        hub = self._hubs.pop(form["network"], None)
        if hub is not None:
            has_host_end = HOST_PORT in hub.ports
            hub.close()
            if has_host_end:
                close_host_end(form["network"])
        return {}

    async def _connect(self, form: dict[str, Any]) -> None:
        try:
            self._require_host_end(form["network"])
            address, port = form["address"], form["port"]
            with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as sock:
                sock.settimeout(0)
                async with asyncio.timeout(form["timeout_s"]):
                    await asyncio.get_running_loop().sock_connect(sock, (address, port))
                _keep_alive(sock)
                self._send({"number": form["number"]}, [sock.fileno()])
        except TimeoutError:
            self._refuse(form, OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT)))
        except (OSError, ValueError) as error:
            self._refuse(form, error)

    def _require_host_end(self, network: int) -> None:
        if not self._walled:  # whatever were made here would be made in the host's own namespace
            raise OSError(errno.EOPNOTSUPP, "the switch has no network namespace of its own")
        hub = self._hub_of(network)
        if HOST_PORT not in hub.ports:
            hub.plug(PacketPort(HOST_PORT, open_host_end(network)))


def _keep_alive(sock: socket.socket) -> None:
    """Let a connection to a machine that is gone end with an error, within half a minute."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE.items():
        sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
