"""The switch as a process: what it is asked for, and how it ends."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Self

import pytest

from pytest_vmsandbox.errors import HostUnfit, SwitchDied
from pytest_vmsandbox.linux import OwnedFd
from pytest_vmsandbox.machine import switch_launcher
from pytest_vmsandbox.machine.switch_launcher import open_bare_switch
from pytest_vmsandbox.network.client import SwitchLine
from pytest_vmsandbox.network.frames import FrameReader, encode_frame
from pytest_vmsandbox.network.impairment import Impairment
from pytest_vmsandbox.network.wire_kind import AUTO

FRAME = b"\xff" * 6 + b"\x02\x76\x6d\x00\x00\x02" + b"\x88\xb5" + b"hello"


@pytest.fixture
async def line(tmp_path: Path) -> AsyncIterator[SwitchLine]:
    """A switch in the tier bare; it must end without having said anything."""
    log = tmp_path / "switch.log"
    async with open_bare_switch(wish=AUTO, log=log, started=lambda _: None) as line:
        yield line
    assert log.read_text() == ""


class Card:
    """A machine's end of a wire."""

    def __init__(self, wire: OwnedFd) -> None:
        self.sock = socket.socket(fileno=wire)
        self.sock.settimeout(10)

    @classmethod
    async def plugged(cls, line: SwitchLine, network: int, name: str) -> Self:
        return cls(await line.plug(network, name, title="lan"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    async def hear(self) -> bytes:
        """The next frame; nothing where the switch hangs up."""
        piece = await asyncio.to_thread(self.sock.recv, 1 << 16)
        return FrameReader().feed(piece)[0] if piece else b""


async def test_frames_pass_between_cards_of_a_network_and_to_no_other(line: SwitchLine) -> None:
    with (
        await Card.plugged(line, 0, "one") as one,
        await Card.plugged(line, 0, "two") as two,
        await Card.plugged(line, 1, "one") as stranger,
    ):
        one.sock.sendall(encode_frame(FRAME))

        assert await two.hear() == FRAME
        assert await line.counts(0) == {"carried": 1, "cut": 0, "lost": 0, "overflowed": 0}
        assert (await line.counts(1))["carried"] == 0
        stranger.sock.settimeout(0.05)
        with pytest.raises(TimeoutError):
            stranger.sock.recv(1)


async def test_all_that_can_be_asked_for(line: SwitchLine, tmp_path: Path) -> None:
    with (
        await Card.plugged(line, 7, "one") as one,
        await Card.plugged(line, 7, "two") as two,
        (tmp_path / "lan.pcap").open("wb") as file,
    ):
        await line.capture(7, 1, file.fileno())
        await line.cut(7, [frozenset(("one", "two"))])
        one.sock.sendall(encode_frame(FRAME))
        while (await line.counts(7))["cut"] < 1:
            await asyncio.sleep(0.01)
        await line.cut(7, ())
        await line.impair(7, Impairment(loss=1.0))
        one.sock.sendall(encode_frame(FRAME))
        while (await line.counts(7))["lost"] < 1:
            await asyncio.sleep(0.01)
        await line.end_capture(1)
        await line.unplug(7, "one", ["10.76.7.2"])

        assert await one.hear() == b""
        assert (tmp_path / "lan.pcap").read_bytes().count(FRAME) == 2
        await line.drop(7)
        assert await two.hear() == b""


async def test_a_capture_that_can_not_be_written_is_told_of_also_when_its_network_is_gone(
    line: SwitchLine,
) -> None:
    for dropped in (False, True):
        with await Card.plugged(line, 7, "one") as one, Path("/dev/full").open("wb") as full:
            await line.capture(7, 1, full.fileno())
            one.sock.sendall(encode_frame(FRAME))
            await asyncio.sleep(0.1)
            if dropped:
                await line.drop(7)
            assert await line.end_capture(1) == os.strerror(errno.ENOSPC)
            await line.drop(7)


async def test_what_can_not_be_is_refused_and_nothing_else_suffers(line: SwitchLine) -> None:
    with await Card.plugged(line, 0, "one") as one:
        with pytest.raises(OSError, match="port one already"):
            await line.plug(0, "one", title="lan")
        with pytest.raises(OSError, match="nobody"):
            await line.unplug(0, "nobody", [])
        with await Card.plugged(line, 0, "two") as two:
            one.sock.sendall(encode_frame(FRAME))

            assert await two.hear() == FRAME


async def test_in_the_tier_bare_it_makes_no_interface_anywhere(line: SwitchLine) -> None:
    before = socket.if_nameindex()

    with pytest.raises(OSError, match="no network namespace") as caught:
        await line.connect(0, "10.76.0.2", 80, timeout_s=5)

    assert caught.value.errno == errno.EOPNOTSUPP
    assert socket.if_nameindex() == before


async def test_when_it_ends_every_wait_is_over_and_says_why(line: SwitchLine) -> None:
    asking = [asyncio.ensure_future(line.counts(0)) for _ in range(3)]
    line._line.shutdown(socket.SHUT_RDWR)

    for result in await asyncio.gather(*asking, return_exceptions=True):
        assert isinstance(result, SwitchDied | dict)
    with pytest.raises(SwitchDied, match="the switch has ended"):
        await line.counts(0)
    assert line.over


async def test_one_that_does_not_come_up_is_told_of_with_what_it_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(switch_launcher, "ENTRY", "pytest_vmsandbox.network.nobody")
    log = tmp_path / "switch.log"
    opened = open_bare_switch(wish=AUTO, log=log, started=lambda _: None)

    with pytest.raises(HostUnfit, match="VMS-SWITCH-UNUSABLE") as caught:
        await opened.__aenter__()

    assert "No module named 'pytest_vmsandbox.network.nobody'" in caught.value.evidence
    assert str(log) not in str(caught.value)


async def test_it_ends_with_its_line_and_closes_what_it_holds(tmp_path: Path) -> None:
    opened = open_bare_switch(wish=AUTO, log=tmp_path / "log", started=lambda _: None)
    async with opened as line:
        one = await Card.plugged(line, 0, "one")
    with one:
        assert await one.hear() == b""
    assert (tmp_path / "log").read_text() == ""


async def test_a_hundred_questions_at_once_are_all_answered_even_where_some_give_up(
    line: SwitchLine,
) -> None:
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    asking = [asyncio.ensure_future(line.counts(number)) for number in range(100)]
    await asyncio.sleep(0)
    for task in asking[::3]:
        task.cancel()

    results = await asyncio.gather(*asking, return_exceptions=True)

    assert sum(isinstance(result, dict) for result in results) >= 60
    assert await line.counts(0)
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
