"""QEMU with nothing of ours around it: a child, its command line, and what it says first."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pytest_vmsandbox.deadline import Deadline
from pytest_vmsandbox.image.image import Image
from pytest_vmsandbox.machine.warden_launcher import RETRY_S
from pytest_vmsandbox.machine.worker import Worker
from pytest_vmsandbox.vmm.bare import BareLauncher
from pytest_vmsandbox.vmm.qemu import MachineType, QemuConfig, render_command, socket_name

MEMORY_MIB: Final = 128
LISTENS_S: Final = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Bare:
    """A QEMU that has greeted, the milliseconds that took, and the line to it."""

    greeted_ms: float
    qmp: socket.socket

    def execute(self, command: str) -> None:
        """Return once QEMU has answered; RuntimeError where it refuses."""
        self.qmp.sendall(json.dumps({"execute": command}).encode() + b"\n")
        if b'"return"' not in (said := self.qmp.recv(4096)):
            raise RuntimeError(f"QEMU does not do {command}: {said!r}")


@contextmanager
def open_bare(argv: Sequence[str], qmp: Path) -> Iterator[Bare]:
    """Start it with `subprocess.Popen`, wait for its greeting on the socket `qmp`; killed after."""
    started = time.perf_counter()
    deadline = Deadline.after(seconds=LISTENS_S)
    streams = subprocess.DEVNULL
    process = subprocess.Popen(argv, stdin=streams, stdout=streams, stderr=streams)
    try:
        with _connect(qmp, deadline=deadline) as sock:
            require_greeting(sock.recv(4096))
            yield Bare(greeted_ms=(time.perf_counter() - started) * 1000, qmp=sock)
    finally:
        process.kill()
        process.wait()
        for made in qmp.parent.glob("*.sock"):
            made.unlink()


def require_greeting(said: bytes) -> None:
    """RuntimeError where that is not how QEMU greets."""
    if b'"QMP"' not in said:
        raise RuntimeError(f"QEMU does not greet: {said!r}")


def machine_config(
    worker: Worker,
    image: Image,
    directory: Path,
    *,
    accel: str,
    machine_type: MachineType = MachineType.Q35,
) -> QemuConfig:
    """What a machine of the plugin's is, paused before its first instruction."""
    return QemuConfig(
        program=qemu_of(worker),
        name="bench",
        directory=directory,
        kernel=image.kernel,
        initramfs=image.initramfs,
        command_line=image.command_line,
        machine_type=machine_type,
        accel=accel,
        memory_mib=MEMORY_MIB,
        cpus=1,
    )


def bare_command(config: QemuConfig) -> list[str]:
    """The argv for it with no walls around."""
    view = BareLauncher().view(directory=config.directory, files=config.files)
    return render_command(config.seen_through(view))


def qemu_of(worker: Worker) -> str:
    """The program, of a worker that has made a machine or an image."""
    assert worker.facts.qemu is not None  # what was made needed it
    return worker.facts.qemu.path


@dataclass(frozen=True, slots=True, kw_only=True)
class Floor:
    """QEMU started and ended, and no guest: less than that no machine can cost."""

    argv: Sequence[str]
    qmp: Path

    @classmethod
    def of(cls, config: QemuConfig) -> Floor:
        """With that machine."""
        return cls(argv=bare_command(config), qmp=config.directory / socket_name("qmp"))

    def to_greeting_ms(self) -> float:
        """Started, to its QMP greeting, and ended."""
        started = time.perf_counter()
        with open_bare(self.argv, self.qmp):
            pass
        return (time.perf_counter() - started) * 1000

    def to_answer_ms(self) -> float:
        """Started, to its first QMP answer, and ended: it greets before its machine is built."""
        started = time.perf_counter()
        with open_bare(self.argv, self.qmp) as bare:
            bare.execute("qmp_capabilities")
        return (time.perf_counter() - started) * 1000


def _connect(path: Path, *, deadline: Deadline) -> socket.socket:
    """A connection as soon as it listens, tried as often as the walled side tries."""
    while True:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError) as error:
            sock.close()
            if deadline.passed:
                raise deadline.timed_out(f"QEMU listening on {path}", str(error)) from None
            time.sleep(RETRY_S)
        else:
            return sock
