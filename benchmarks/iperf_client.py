"""A client of iperf3's server that sends through whatever connected sockets it is given.

iperf3 itself makes its connections, and vm.connect() hands out one that is made; so its protocol
is spoken here (iperf_api.h and iperf_client_api.c of iperf 3).
"""

from __future__ import annotations

import json
import secrets
import socket
import struct
import time
from collections.abc import Callable
from contextlib import closing
from typing import Any, Final

from pytest_vmsandbox.deadline import Deadline

PORT: Final = 5201

PIECE_BYTES: Final = 128 * 1024
ANSWER_S: Final = 30.0
RETRY_S: Final = 0.1

_COOKIE_BYTES: Final = 36
_PARAM_EXCHANGE, _CREATE_STREAMS, _TEST_START, _TEST_RUNNING = 9, 10, 1, 2
_ACCESS_DENIED = -1
_TEST_END, _EXCHANGE_RESULTS, _DISPLAY_RESULTS, _IPERF_DONE = 4, 13, 14, 16


def send_mbit_per_s(dial: Callable[[], socket.socket], *, seconds: float) -> float:
    """Send for so long; Mbit/s as the server counted and timed what came.

    RuntimeError where it says anything else than it should.
    """
    cookie = secrets.token_hex(_COOKIE_BYTES // 2).encode() + b"\0"
    with closing(_begin(dial, cookie)) as control:
        _send_json(control, {"tcp": True, "time": round(seconds), "parallel": 1})
        _require(control, _CREATE_STREAMS)
        with closing(dial()) as stream:
            stream.settimeout(ANSWER_S)
            stream.sendall(cookie)
            _require(control, _TEST_START)
            _require(control, _TEST_RUNNING)
            sent = _fill(stream, seconds)
            _say(control, _TEST_END)
            _require(control, _EXCHANGE_RESULTS)
            _send_json(control, _results(sent, seconds))
            theirs = _receive_json(control)
            _require(control, _DISPLAY_RESULTS)
            _say(control, _IPERF_DONE)
    (came,) = theirs["streams"]
    return float(came["bytes"]) * 8e-6 / (float(came["end_time"]) - float(came["start_time"]))


def round_trips_ms(sock: socket.socket, *, times: int) -> list[float]:
    """Milliseconds of so many: one byte there, to an echo, and back, one after the other."""
    sock.settimeout(ANSWER_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    taken = []
    for number in range(times):
        byte = bytes([number % 256])
        started = time.perf_counter()
        sock.sendall(byte)
        came = sock.recv(1)
        taken.append((time.perf_counter() - started) * 1000)
        if came != byte:
            raise RuntimeError(f"the echo of {byte!r} is {came!r}")
    return taken


def _begin(dial: Callable[[], socket.socket], cookie: bytes) -> socket.socket:
    """The control connection of a test that the server has accepted."""
    deadline = Deadline.after(seconds=ANSWER_S)
    while True:
        # It turns away who comes before it has done with the test before.
        try:
            return _accepted(dial(), cookie)
        except ConnectionError:
            if deadline.passed:
                raise
            time.sleep(RETRY_S)


def _accepted(control: socket.socket, cookie: bytes) -> socket.socket:
    try:
        control.settimeout(ANSWER_S)
        control.sendall(cookie)
        _require(control, _PARAM_EXCHANGE)
    except BaseException:
        control.close()
        raise
    return control


def _fill(stream: socket.socket, seconds: float) -> int:
    piece = bytes(PIECE_BYTES)
    sent = 0
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        stream.sendall(piece)
        sent += len(piece)
    return sent


def _results(sent: int, seconds: float) -> dict[str, Any]:
    """What a client tells of itself; the server looks for every field."""
    stream = {"id": 1, "bytes": sent, "retransmits": -1, "jitter": 0, "errors": 0, "packets": 0}
    return {
        "cpu_util_total": 0,
        "cpu_util_user": 0,
        "cpu_util_system": 0,
        "sender_has_retransmits": 0,
        "streams": [{**stream, "start_time": 0, "end_time": seconds}],
    }


def _say(control: socket.socket, state: int) -> None:
    control.sendall(struct.pack("b", state))


def _require(control: socket.socket, wanted: int) -> None:
    (state,) = struct.unpack("b", _receive(control, 1))
    if state == _ACCESS_DENIED:
        raise ConnectionRefusedError("iperf3's server is still busy with another test")
    if state != wanted:
        raise RuntimeError(f"iperf3's server is in state {state}, not {wanted}")


def _send_json(control: socket.socket, document: dict[str, Any]) -> None:
    text = json.dumps(document).encode()
    control.sendall(struct.pack("!I", len(text)) + text)


def _receive_json(control: socket.socket) -> dict[str, Any]:
    (length,) = struct.unpack("!I", _receive(control, 4))
    return dict(json.loads(_receive(control, length)))


def _receive(control: socket.socket, length: int) -> bytes:
    came = b""
    while len(came) < length:
        piece = control.recv(length - len(came))
        if not piece:
            raise ConnectionResetError("iperf3's server has hung up")
        came += piece
    return came
