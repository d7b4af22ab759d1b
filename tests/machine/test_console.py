from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from pytest_vmsandbox.deadline import Deadline
from pytest_vmsandbox.errors import GuestPanicked, TimedOut
from pytest_vmsandbox.machine import console as console_module
from pytest_vmsandbox.machine.console import Console, KernelTrouble


@pytest.fixture
def troubles() -> list[KernelTrouble]:
    return []


@pytest.fixture
def console(tmp_path: Path, troubles: list[KernelTrouble]) -> Console:
    console = Console(log=tmp_path / "console.log")
    console.on_trouble = troubles.append
    return console


def test_text_is_what_was_printed_without_carriage_returns(console: Console) -> None:
    console.feed(b"one\r\ntwo\r\n")

    assert console.text == "one\ntwo\n"
    assert console.log.read_bytes() == b"one\r\ntwo\r\n"


def test_tail_gives_the_last_lines(console: Console) -> None:
    console.feed(b"".join(b"line %d\n" % n for n in range(100)))

    assert console.tail(2) == "line 98\nline 99"


def test_since_gives_what_came_after_a_mark(console: Console) -> None:
    console.feed(b"before\n")
    mark = console.position
    console.feed(b"after\n")

    assert console.since(mark) == "after\n"


def test_bytes_that_are_no_text_stay_visible(console: Console) -> None:
    console.feed(b"\xff\x00ok")

    assert console.text == "\\xff\x00ok"


def test_memory_and_log_are_bounded_and_marks_stay_right(
    console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console_module, "MEMORY_LIMIT", 1000)
    monkeypatch.setattr(console_module, "LOG_LIMIT", 5000)
    for number in range(1000):
        console.feed(b"%09d\n" % number)
    mark = console.position
    console.feed(b"the end\n")

    assert len(console.text) <= 2000 + 8
    assert console.log.stat().st_size == 5000
    assert console.log.read_bytes().startswith(b"000000000\n")
    assert console.since(mark) == "the end\n"
    assert console.text.endswith("000000999\nthe end\n")


@pytest.mark.parametrize("cut", range(1, 26))
def test_a_panic_is_noticed_wherever_the_reads_are_cut(
    console: Console, troubles: list[KernelTrouble], cut: int
) -> None:
    line = b"Kernel panic - not syncing: sysrq triggered crash\r\n"
    console.feed(b"[ 1.0] " + line[:cut])
    console.feed(line[cut:])
    console.feed(b"---[ end Kernel panic - not syncing: sysrq triggered crash ]---\r\n")

    assert troubles == [KernelTrouble.PANIC]


def test_an_oops_is_noticed_and_no_panic(console: Console, troubles: list[KernelTrouble]) -> None:
    console.feed(b"BUG: unable to handle page fault for address\nOops: 0002 [#1]\n")

    assert troubles == [KernelTrouble.OOPS]


def test_a_new_boot_has_new_troubles(console: Console, troubles: list[KernelTrouble]) -> None:
    console.feed(b"Kernel panic - not syncing: one\n")
    console.power_on()
    console.feed(b"x" * 100 + b"\nKernel panic - not syncing: two\n")

    assert troubles == [KernelTrouble.PANIC, KernelTrouble.PANIC]


async def test_wait_for_finds_what_is_there_and_what_comes(console: Console) -> None:
    console.feed(b"boot: ok\n")
    there = await console.wait_for(r"boot: (\w+)", deadline=Deadline.after(seconds=5))
    waiting = asyncio.create_task(console.wait_for(r"login:", deadline=Deadline.after(seconds=5)))
    await asyncio.sleep(0.01)
    console.feed(b"log")
    await asyncio.sleep(0.01)
    console.feed(b"in: ")

    assert there.group(1) == "ok"
    assert (await waiting).group() == "login:"


async def test_wait_for_says_what_was_last_seen(console: Console) -> None:
    console.feed(b"something else\n")

    with pytest.raises(TimedOut) as late:
        await console.wait_for("login:", deadline=Deadline.after(seconds=0.05))
    assert "something else" in str(late.value)
    assert "'login:' on the console" in str(late.value)


async def test_waiters_are_told_when_the_machine_is_gone(console: Console) -> None:
    waiting = asyncio.create_task(console.wait_for("login:", deadline=Deadline.after(seconds=5)))
    await asyncio.sleep(0.01)
    console.fail(GuestPanicked("vm1", "Kernel panic - not syncing: gone"))

    with pytest.raises(GuestPanicked):
        await waiting
