"""Requests that nobody should make, VMSANDBOX_TEST_FUZZED of them, to a warden that runs."""

from __future__ import annotations

import json
import os
import random
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from pytest_vmsandbox.errors import RequestInvalid
from pytest_vmsandbox.linux import OwnedFd
from pytest_vmsandbox.warden.requests import (
    DESCRIPTORS_AT_MOST,
    Launch,
    Request,
    parse_packet,
    parse_request,
)
from pytest_vmsandbox.warden.steps import Bind, render_step
from tests.warden.conftest import GROUP, SLEEP, TRUE, RawLine, children_of, inner_of, order
from tests.warden.test_requests import CONNECT, OPEN_FILE, SIGNAL, WRONG, form_of

REQUESTS = int(os.environ.get("VMSANDBOX_TEST_FUZZED", "20000"))

# How many of the mutated launches may be valid, and are really performed: they take a while.
VALID_AT_MOST = 150

# More of them wait to be read than a line holds: nobody would go on.
BATCH = 32

Raw: TypeAlias = tuple[bytes, tuple[int, ...]]

SIMPLE: list[object] = [
    *(None, True, False, 0, 1, -1, 7, 1.5, 2**31, 2**53, 2**63, 10**30, float("nan"), float("inf")),
    *("", "/", "..", "/..", "a", "\0", "\ud800", "\udcff", "/proc/self/mem", "/etc/shadow", "null"),
    *([], {}, [[]], {"": ""}, [None], "x" * 300, "9" * 400, "launch", "signal", "vmm", "host"),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Packet:
    """What is sent, and what the warden has to take it for; None for what it has to refuse."""

    data: bytes
    descriptors: tuple[int, ...]
    number: int | None
    wanted: Request | None


def packet_of(data: bytes, descriptors: tuple[int, ...]) -> Packet:
    number = wanted = None
    with suppress(RequestInvalid):
        number, form = parse_packet(data)
        if len(descriptors) <= DESCRIPTORS_AT_MOST:
            wanted = parse_request(form, descriptors=len(descriptors))
    return Packet(data=data, descriptors=descriptors, number=number, wanted=wanted)


class Fuzzer:
    """Makes packets; `valid` says how many of its launches the warden will have to perform."""

    def __init__(self, seed: int, *, folder: Path, running: int, descriptors: list[int]) -> None:
        self.random = random.Random(seed)
        self.running = running
        self.descriptors = descriptors
        self.valid = 0
        self.launch: dict[str, Any] = {
            "number": 5,
            **form_of(order(TRUE, str(folder), room=None, cwd=str(folder), group=GROUP)),
        }
        self.launch["steps"] = [
            *({"step": "tmpfs", "target": "/", "size_mib": 1, "mode": 0o755},),
            *(_bind("/usr", "/usr"), _bind(str(folder), str(folder))),
            *({"step": "symlink", "target": f"/{name}", "text": f"usr/{name}"} for name in LINKS),
        ]
        self.small = [{"number": 6, **form, "process": running} for form in (CONNECT, OPEN_FILE)]
        # Signals to what runs are left out: one that is valid would end it.
        self.small += [{"number": 7, **form} for form in (CONNECT, OPEN_FILE, SIGNAL)]

    def packet(self) -> Packet:
        kinds = (self._noise, self._bits, self._words, self._small, self._launch, self._launch)
        while True:
            data, descriptors = self.random.choice(kinds)()
            if not data:
                continue  # that ends the line
            made = packet_of(data, descriptors)
            if self._may_be_sent(made):
                return made

    def _may_be_sent(self, made: Packet) -> bool:
        if isinstance(made.wanted, Launch):
            self.valid += 1
            return self.valid <= VALID_AT_MOST
        return True

    def _noise(self) -> Raw:
        length = self.random.choice((1, 2, 10, 100, 1000))
        return self.random.randbytes(length), self._some()

    def _bits(self) -> Raw:
        """A request with some bytes changed, doubled, or left out."""
        data = bytearray(json.dumps(self.random.choice([*self.small, self.launch])).encode())
        for _ in range(self.random.randint(1, 4)):
            place = self.random.randrange(len(data))
            match self.random.randrange(4):
                case 0:
                    data[place] = self.random.randrange(256)
                case 1:
                    data[place:place] = data[place : place + self.random.randrange(40)]
                case 2:
                    del data[place : place + self.random.randrange(40)]
                case _:
                    data[place:place] = self.random.choice(WORDS)
            if not data:
                break
        return bytes(data), self._some()

    def _words(self) -> Raw:
        return b"".join(self.random.choices(WORDS, k=self.random.randint(1, 40))), ()

    def _small(self) -> Raw:
        form = dict(self.random.choice(self.small))
        self._change(form)
        return json.dumps(form).encode(), self._some(seldom=True)

    def _launch(self) -> Raw:
        form = dict(self.launch, steps=[dict(step) for step in self.launch["steps"]])
        for _ in range(self.random.randint(1, 3)):
            match self.random.randrange(3):
                case 0:
                    key = self.random.choice(sorted(WRONG))
                    form[key] = self.random.choice(WRONG[key])
                case 1:
                    self._change(form)
                case _ if isinstance(form.get("steps"), list) and form["steps"]:
                    step = self.random.choice(form["steps"])
                    if isinstance(step, dict):
                        self._change(step)
        return json.dumps(form).encode(), self._three()

    def _change(self, form: dict[str, Any]) -> None:
        key = self.random.choice([*sorted(form), "number", "request", "step"])
        match self.random.randrange(4):
            case 0:
                form.pop(key, None)
            case 1:
                form[f"{key}s"] = form.get(key)
            case _:
                form[key] = self.random.choice(SIMPLE)

    def _three(self) -> tuple[int, ...]:
        if self.random.random() < 0.9:
            return tuple(self.random.choices(self.descriptors, k=3))
        return self._some()

    def _some(self, *, seldom: bool = False) -> tuple[int, ...]:
        if self.random.random() < (0.95 if seldom else 0.7):
            return ()
        count = self.random.choice((1, 2, 3, 4, 5, 63, 64, 65, 200))
        return tuple(self.random.choices(self.descriptors, k=count))


LINKS = [path.name for path in map(Path, ("/bin", "/lib", "/lib64")) if path.is_symlink()]

WORDS = [
    *(
        b"{",
        b"}",
        b"[",
        b"]",
        b":",
        b",",
        b'"',
        b"\\",
        b"\0",
        b" ",
        b"\n",
        b"null",
        b"true",
        b"NaN",
    ),
    *(
        b'"number"',
        b'"request"',
        b'"launch"',
        b'"signal"',
        b'"process"',
        b'"step"',
        b"-1",
        b"1e999",
    ),
    *(
        b'"\\ud800"',
        b'"\\u0000"',
        b"\xff",
        b"\xef\xbb\xbf",
        b"9" * 5000,
        b"[" * 990,
        b'{"a":' * 990,
    ),
    *(b'{"number":1,"request":"launch"', b'"steps":[', b'{"number":1,'),
]


def _bind(source: str, target: str) -> dict[str, object]:
    return render_step(Bind(source=source, target=target))


@contextmanager
def odd_descriptors(line: socket.socket, folder: Path) -> Iterator[list[int]]:
    """Descriptors of many kinds."""
    with ExitStack() as undo:
        made = [
            os.open(os.devnull, os.O_RDWR),
            os.open(folder, os.O_RDONLY),
            os.open(folder / "precious", os.O_RDONLY),
            os.open(folder / "precious", os.O_PATH),
            os.memfd_create("odd"),
            os.pidfd_open(os.getpid()),
            *os.pipe(),
            *(end.detach() for end in socket.socketpair()),
        ]
        for descriptor in made:
            undo.callback(os.close, descriptor)
        yield [*made, line.fileno()]


@dataclass(frozen=True, slots=True)
class State:
    """What must be as before."""

    children: list[int]
    descriptors: int | None
    mounts: str
    groups: list[str]
    ours: list[str]
    files: dict[str, tuple[bytes, int]]


def state_of(raw: RawLine, folder: Path, ours: list[str]) -> State:
    # What came with a request is closed after its answer, and before the next request is read.
    raw.send({"number": 1})
    raw.receive()
    inner = inner_of(raw)
    try:
        descriptors = len(list(Path(f"/proc/{inner}/fd").iterdir()))
    except PermissionError:
        descriptors = None
    return State(
        children=children_of(inner),
        descriptors=descriptors,
        mounts=_mounts_of(inner),
        groups=[
            parent
            for parent in raw.greeting["groups"]
            if (Path(parent) / f"vmsandbox-{GROUP}").exists()
        ],
        ours=ours,
        files={
            path.name: (path.read_bytes(), path.stat().st_mode) for path in sorted(folder.iterdir())
        },
    )


def _mounts_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/mountinfo").read_text()
    except PermissionError:
        return ""


def test_no_request_does_more_than_it_says(
    raw: RawLine, scratch: Path, open_descriptors: Callable[[], list[str]]
) -> None:
    seed = int(os.environ.get("VMSANDBOX_TEST_SEED", random.SystemRandom().getrandbits(32)))
    sys.stdout.write(f"seed {seed}\n")
    (scratch / "precious").write_text("precious")
    with odd_descriptors(raw.line, scratch) as odd:
        raw.send({"number": 1, **form_of(order(SLEEP, "600"))}, odd[:1] * 3)
        running = raw.receive()["process"]
        before = state_of(raw, scratch, open_descriptors())
        fuzzer = Fuzzer(seed, folder=scratch, running=running, descriptors=odd)

        launched = fuzz(raw, fuzzer)

        raw.send({"number": 2, **form_of(order(TRUE, group=GROUP))}, odd[:1] * 3)
        answer = raw.receive()
        assert answer["number"] == 2
        assert raw.receive() == {"ended": answer["process"], "returncode": 0}
        assert launched > 0
        assert state_of(raw, scratch, open_descriptors()) == before


def fuzz(raw: RawLine, fuzzer: Fuzzer) -> int:
    """Send them all, look at each answer; how many launches were performed."""
    launched, ended = set(), set()
    started = 0
    for _ in range(0, REQUESTS, BATCH):
        batch = [fuzzer.packet() for _ in range(BATCH)]
        for packet in batch:
            raw.send(packet.data, packet.descriptors)
        answers: list[dict[str, Any]] = []
        while len(answers) < BATCH:
            answer = raw.receive()
            if "ended" in answer:
                ended.add(answer["ended"])
            else:
                answers.append(answer)
        for packet, answer in zip(batch, answers, strict=True):
            check(packet, answer)
            if "process" in answer:
                launched.add(answer["process"])
                started += 1
    while not launched <= ended:
        ended.add(raw.receive()["ended"])
    assert fuzzer.running not in ended
    return started


def check(packet: Packet, answer: dict[str, Any]) -> None:
    """Only a valid launch starts something; what is refused says why, by its number."""
    assert ("process" in answer) <= isinstance(packet.wanted, Launch), (packet, answer)
    if packet.wanted is None:
        assert answer["refused"], (packet, answer)
        assert answer["errno"] is None, (packet, answer)
    if len(packet.descriptors) <= DESCRIPTORS_AT_MOST:
        assert answer["number"] == packet.number, (packet, answer)


@pytest.mark.parametrize("length", [160 * 1024 + 1, 200 * 1024])
def test_a_packet_that_is_too_long_is_refused(raw: RawLine, length: int) -> None:
    form = {"number": 1, **form_of(order(TRUE)), "env": {"A": ""}}
    form["env"]["A"] = "x" * (length - len(json.dumps(form)))
    with OwnedFd(os.open(os.devnull, os.O_RDWR)) as null:
        raw.send(form, [null] * 3)

    assert "too long" in raw.receive()["refused"]


def test_a_long_packet_within_the_limit_is_served(raw: RawLine) -> None:
    form = {"number": 1, **form_of(order(TRUE)), "env": {"A": "x" * 100_000}}
    with OwnedFd(os.open(os.devnull, os.O_RDWR)) as null:
        raw.send(form, [null] * 3)

    assert "process" in raw.receive()


def test_numbers_are_the_asker_s_own_affair(raw: RawLine) -> None:
    for number in (9, 3, 3, 2**53 - 1, 0):
        raw.send({"number": number, "request": "signal", "process": 99, "signal": 9})

        assert raw.receive()["number"] == number
