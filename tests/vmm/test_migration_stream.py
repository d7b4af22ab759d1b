"""Migration streams: a real one of QEMU, and what may become of it."""

from __future__ import annotations

import asyncio
import json
import os
import random
import struct
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from pytest_vmsandbox.deadline import Deadline
from pytest_vmsandbox.vmm.bare import BareLauncher
from pytest_vmsandbox.vmm.launch import LaunchRequest
from pytest_vmsandbox.vmm.migration_stream import PAGE, StreamRefused, StreamSplitter
from pytest_vmsandbox.vmm.qmp import QmpSession, open_qmp

QEMU = "qemu-system-x86_64"
SIZE = 8 << 20
# The firmware has run by then: some of the memory is in use.
FIRMWARE_S = 1.0


class Split:
    """A stream, split: memory as it was put together, and what is left."""

    def __init__(self, stream: bytes, *, step: int = 1 << 30, block: str = "ram") -> None:
        self.memory = bytearray(SIZE)
        self.calls = 0
        splitter = StreamSplitter(block=block, size=SIZE, write=self._write)
        left = memoryview(stream)
        while left:
            room = splitter.room()
            count = min(len(room), len(left), step)
            room[:count] = left[:count]
            splitter.filled(count)
            left = left[count:]
        self.state = splitter.finish()

    def _write(self, offset: int, pieces: Sequence[memoryview]) -> None:
        self.calls += 1
        for piece in pieces:
            assert offset + len(piece) <= SIZE
            self.memory[offset : offset + len(piece)] = piece
            offset += len(piece)


def _argv(directory: Path, *more: str, backend: str) -> list[str]:
    return [
        *(QEMU, "-machine", "q35,memory-backend=ram", "-m", f"{SIZE >> 20}M", "-nodefaults"),
        *("-object", f"{backend},id=ram,size={SIZE >> 20}M", "-display", "none", "-accel", "tcg"),
        *("-device", "VGA,vgamem_mb=2", "-qmp", f"unix:{directory}/qmp.sock,server=on,wait=on"),
        *more,
    ]


async def _state_of(session: QmpSession, path: Path, deadline: Deadline) -> bytes:
    """All that QEMU sends of itself; it stands still from then on."""
    capability = {"capability": "x-ignore-shared", "state": True}
    await session.execute(
        "migrate-set-capabilities", {"capabilities": [capability]}, deadline=deadline
    )
    await session.execute("stop", deadline=deadline)
    with path.open("w+b") as file:
        await session.send_file("out", file.fileno(), deadline=deadline)
        await session.execute("migrate", {"uri": "fd:out"}, deadline=deadline)
        while True:
            match await session.execute("query-migrate", deadline=deadline):
                case {"status": "completed"}:
                    return path.read_bytes()
                case {"status": "failed" | "cancelled"} as answer:
                    raise AssertionError(answer)
            await asyncio.sleep(0.01)


async def _sent(directory: Path) -> tuple[bytes, bytes]:
    """The stream of a machine whose firmware has run, and its memory as QEMU itself dumps it."""
    deadline = Deadline.after(seconds=60)
    request = LaunchRequest(
        id="m1",
        argv=_argv(directory, backend="memory-backend-ram"),
        directory=directory,
        log=directory / "log",
    )
    async with BareLauncher().launch(request) as process:
        sock = await process.connect("qmp.sock", deadline=deadline)
        async with open_qmp(sock, on_event=lambda event: None, deadline=deadline) as session:
            await asyncio.sleep(FIRMWARE_S)
            stream = await _state_of(session, directory / "stream", deadline)
            # Below 640 KiB and above 1 MiB RAM is where it seems to be; between lie ROMs.
            dump = bytearray()
            for start, size in ((0, 0xA0000), (1 << 20, SIZE - (1 << 20))):
                name = directory / f"dump-{start}"
                await session.execute(
                    "pmemsave",
                    {"val": start, "size": size, "filename": str(name)},
                    deadline=deadline,
                )
                dump += name.read_bytes()
            return stream, bytes(dump)


@pytest.fixture(scope="module")
def sent() -> Iterator[tuple[bytes, bytes]]:
    with tempfile.TemporaryDirectory(prefix="vmsb-") as short:
        yield asyncio.run(_sent(Path(short)))


@pytest.fixture(scope="module")
def stream(sent: tuple[bytes, bytes]) -> bytes:
    return sent[0]


def test_memory_is_what_the_machine_had(sent: tuple[bytes, bytes]) -> None:
    stream, dump = sent
    split = Split(stream)

    assert split.memory[:0xA0000] + split.memory[1 << 20 :] == dump
    assert any(split.memory)


def test_nothing_else_is_lost(stream: bytes) -> None:
    split = Split(stream)

    pages = len(stream) - len(split.state)
    assert pages >= sum(PAGE for at in range(0, SIZE, PAGE) if any(split.memory[at : at + PAGE]))
    # Devices, and the description of them behind, are as QEMU sent them.
    tail = len(stream) - stream.index(b"\x05timer")
    assert split.state[-tail:] == stream[-tail:]
    assert b"vga.vram" in split.state


@pytest.mark.parametrize("step", [4095, 65536])
def test_it_may_come_in_pieces_of_any_size(stream: bytes, step: int) -> None:
    whole, split = Split(stream), Split(stream, step=step)

    assert split.state == whole.state
    assert split.memory == whole.memory


def test_it_may_come_byte_for_byte() -> None:
    page = bytes(range(256)) * (PAGE // 256)
    short = _made(FIRST, _long(PAGE | 0x28) + page, _zeros(2 * PAGE, SIZE))
    whole, split = Split(short), Split(short, step=1)

    assert split.state == whole.state
    assert split.memory == whole.memory
    assert split.memory[PAGE : 2 * PAGE] == page


def test_qemu_takes_what_is_left_and_is_the_same_machine(stream: bytes) -> None:
    """The memory is mapped privately, and the rest loaded: it then sends the same stream."""

    async def send_again(directory: Path) -> bytes:
        split = Split(stream)
        (directory / "memory").write_bytes(split.memory)
        (directory / "state").write_bytes(split.state)
        deadline = Deadline.after(seconds=60)
        backend = f"memory-backend-file,mem-path={directory}/memory,share=off"
        request = LaunchRequest(
            id="m2",
            argv=_argv(directory, "-incoming", "defer", backend=backend),
            directory=directory,
            log=directory / "log",
        )
        loaded = asyncio.Event()
        async with BareLauncher().launch(request) as process:
            sock = await process.connect("qmp.sock", deadline=deadline)
            async with open_qmp(
                sock,
                on_event=lambda event: (
                    loaded.set() if event.data.get("status") == "completed" else None
                ),
                deadline=deadline,
            ) as session:
                capabilities = [
                    {"capability": name, "state": True} for name in ("x-ignore-shared", "events")
                ]
                await session.execute(
                    "migrate-set-capabilities", {"capabilities": capabilities}, deadline=deadline
                )
                with (directory / "state").open("rb") as state:
                    await session.send_file("in", state.fileno(), deadline=deadline)
                await session.execute("migrate-incoming", {"uri": "fd:in"}, deadline=deadline)
                async with asyncio.timeout(30):
                    await loaded.wait()
                assert await session.execute("query-status", deadline=deadline) == {
                    "running": False,
                    "singlestep": False,
                    "status": "paused",
                }
                return await _state_of(session, directory / "again", deadline)

    with tempfile.TemporaryDirectory(prefix="vmsb-") as short:
        again = asyncio.run(send_again(Path(short)))

    assert Split(again).memory == Split(stream).memory


def test_a_stream_that_is_cut_anywhere_is_refused(stream: bytes) -> None:
    choice = random.Random(1)  # no secret
    cuts = {*range(0, 400, 7), *(choice.randrange(len(stream)) for _ in range(40))}
    cuts |= {len(stream) - n for n in (1, 2, 100, 5000)}
    for cut in cuts:
        with pytest.raises(StreamRefused):
            Split(stream[:cut])


def test_a_stream_with_more_behind_it_is_refused(stream: bytes) -> None:
    with pytest.raises(StreamRefused, match="no end"):
        Split(stream + b"\0")


def test_a_stream_whose_form_is_changed_is_refused_or_the_same(stream: bytes) -> None:
    """Whatever byte of a header is changed: never other pages, and never out of bounds."""
    whole = Split(stream)
    choice = random.Random(2)  # no secret
    begin = stream.index(b"\x03ram")
    places = [*range(begin + 120), *(choice.randrange(len(stream) // 4) for _ in range(60))]
    same = 0
    for place in places:
        changed = bytearray(stream)
        changed[place] ^= 1 << choice.randrange(8)
        try:
            split = Split(bytes(changed))
        except StreamRefused:
            continue
        # A byte of what is inside: one page, or one byte of the state, is another one then.
        same += 1
        pages = (slice(at, at + PAGE) for at in range(0, SIZE, PAGE))
        differing = [page for page in pages if split.memory[page] != whole.memory[page]]
        assert len(differing) <= 1
        assert len(split.state) == len(whole.state)
    assert same < len(places)


def _long(word: int) -> bytes:
    return struct.pack(">Q", word)


def _made(
    *records: bytes, size: int = SIZE, version: int = 4, more: bytes = b"", between: bytes = b""
) -> bytes:
    """A stream with these records of pages, made by hand; `between` comes before they do."""
    head = b"QEVM" + struct.pack(">I", 3) + b"\7" + struct.pack(">I", 3) + b"q35" + more
    section = struct.pack(">I", 2)
    start = b"\1" + section + b"\3ram" + struct.pack(">II", 0, version)
    sizes = _long(size | 4) + b"\3ram" + _long(size) + _long(0) + _long(0x10)
    footer = b"\x7e" + section
    pages = b"\3" + section + b"".join(records) + _long(0x10) + footer
    text = json.dumps({"page_size": PAGE, "devices": []}).encode()
    devices = b"\4" + b"any device" + b"\0\6" + struct.pack(">I", len(text)) + text
    return head + start + sizes + footer + between + pages + devices


def _zeros(first: int, last: int) -> bytes:
    return b"".join(_long(at | 0x22) + b"\0" for at in range(first, last, PAGE))


FIRST = _long(0x02) + b"\3ram\0"
ALL = FIRST + _zeros(PAGE, SIZE)


def test_a_page_that_comes_again_counts_as_it_came_last() -> None:
    page, other = b"x" * PAGE, b"y" * PAGE
    data = FIRST + _long(PAGE | 0x28) + page + _long(2 * PAGE | 0x28) + page
    again = _long(PAGE | 0x22) + b"\0" + _long(2 * PAGE | 0x28) + other
    split = Split(_made(data, _zeros(3 * PAGE, SIZE), again))

    assert not any(split.memory[: 2 * PAGE])
    assert split.memory[2 * PAGE : 3 * PAGE] == other
    assert not any(split.memory[3 * PAGE :])


def _command(number: int, content: bytes = b"") -> bytes:
    return b"\x08" + struct.pack(">HH", number, len(content)) + content


@pytest.mark.parametrize("step", [1 << 30, 1])
def test_newer_ones_say_that_the_last_part_begins_and_it_is_kept(step: int) -> None:
    page = b"x" * PAGE
    some = _long(PAGE | 0x28) + page
    rest = b"\2" + struct.pack(">I", 2) + _long(0x10) + b"\x7e" + struct.pack(">I", 2)
    records = (FIRST, some, _zeros(2 * PAGE, SIZE))
    split = Split(_made(*records, between=rest + _command(11)), step=step)

    assert split.memory[PAGE : 2 * PAGE] == page
    assert split.state.count(_command(11)) == 1
    assert split.state.replace(_command(11), b"") == Split(_made(*records, between=rest)).state


@pytest.mark.parametrize(
    ("made", "why"),
    [
        (b"QEVM\0\0\0\2" + _made(ALL)[8:], "version 3"),
        (b"JUNK" + _made(ALL)[4:], "version 3"),
        (_made(ALL, version=5), "version 5"),
        (_made(ALL, size=SIZE - PAGE), "no block"),
        (_made(ALL, more=b"\5\1x\0\0\0\1"), "configuration"),
        (_made(FIRST + _zeros(PAGE, SIZE - PAGE)), "only"),
        (_made(FIRST + _zeros(2 * PAGE, SIZE)), "missing"),
        (_made(ALL + _long(SIZE | 0x22) + b"\0"), "a page at"),
        (_made(ALL + _long(0x28 | 0x40) + bytes(PAGE)), "flags"),
        (_made(ALL + _long(0x100 | 0x20) + bytes(4)), "flags"),
        (_made(ALL + _long(0x22) + b"\xff"), "all of 0xff"),
        (_made(ALL + _long(0x02) + b"\5other\0"), "other"),
        (_made(_long(0x22) + b"\0" + ALL), "None"),
        (_made(ALL, between=_command(2, bytes(4))), "command 2 with 4 bytes"),
        (_made(ALL, between=_command(11, b"x")), "command 11 with 1 bytes"),
        (_made(ALL, between=_command(11) * 2), "kind 0x8"),
        (_made(ALL)[:-1] + _command(11), "no end"),
    ],
)
def test_what_is_not_known_is_refused_and_named(made: bytes, why: str) -> None:
    with pytest.raises(StreamRefused, match=why):
        Split(made)


def test_what_is_made_by_hand_would_be_taken() -> None:
    assert not any(Split(_made(ALL)).memory)


def test_a_state_without_end_is_given_up() -> None:
    with pytest.raises(StreamRefused, match="beside the memory"):
        Split(_made(ALL) + bytes(65 << 20))


def test_a_large_machine_is_split_in_less_time_than_it_takes_to_send(stream: bytes) -> None:
    page = os.urandom(PAGE)
    records = [_long(at | 0x28) + page for at in range(PAGE, SIZE, PAGE)]
    made = _made(FIRST, *records)
    split = Split(made)  # warm

    began = time.process_time()
    split = Split(made)
    took_s = time.process_time() - began

    # Neighbours are written together; a limit far from what is usual, for slow hosts.
    assert split.calls < SIZE // PAGE // 100
    assert took_s < 1
