"""The other side: what a careful engineer writes by hand to run commands in a machine.

QEMU with a guest agent on virtio-serial, awaited by guest-sync, commands by guest-exec and polling.
Nothing of ours is used, and nothing is done worse than it is usually done.
"""

from __future__ import annotations

import base64
import json
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.by_hand_image import ByHandImage

MEMORY_MIB: Final = 128
BOOT_S: Final = 60.0
COMMAND_S: Final = 60.0

# How often guest-sync is asked anew. QEMU keeps the bytes until the guest opens the port, so
# the first one is mostly answered at once; asking more often only makes the agent answer more.
SYNC_EVERY_S: Final = 0.5

# How long to wait between two looks at a command that has not ended.
POLL_S: Final = 0.005

# `quiet`: a serial port of an emulated machine is slow, and so is a kernel that prints to it.
COMMAND_LINE: Final = "console=ttyS0 quiet panic=-1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """How a command ended."""

    returncode: int
    stdout: bytes
    stderr: bytes


class GuestAgent:
    """A client of qemu-guest-agent (qemu-ga-ref(7))."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._lines = sock.makefile("rb")

    def wait_answering(self) -> None:
        """Return once the agent is there, and nothing of an earlier talk is left to be read."""
        deadline = time.monotonic() + BOOT_S
        asked = 0
        buffer = b""
        while time.monotonic() < deadline:
            asked += 1
            self._send("guest-sync", {"id": asked})
            self._sock.settimeout(SYNC_EVERY_S)
            try:
                buffer += self._sock.recv(4096)
            except TimeoutError:
                continue
            if buffer.endswith(b"\n") and json.loads(buffer.splitlines()[-1]) == {"return": asked}:
                self._sock.settimeout(COMMAND_S)
                return
        raise TimeoutError(f"no answer from the guest agent in {BOOT_S:.0f} s")

    def run(self, argv: Sequence[str], *, poll_s: float = POLL_S) -> Answer:
        """Run a command in the guest to its end, looking for it every `poll_s` seconds."""
        deadline = time.monotonic() + COMMAND_S
        request = {"path": argv[0], "arg": list(argv[1:]), "capture-output": True}
        started = self.execute("guest-exec", request)
        while time.monotonic() < deadline:
            status = self.execute("guest-exec-status", {"pid": started["pid"]})
            if status["exited"]:
                return Answer(
                    returncode=status.get("exitcode", -1),
                    stdout=base64.b64decode(status.get("out-data", "")),
                    stderr=base64.b64decode(status.get("err-data", "")),
                )
            if poll_s:
                time.sleep(poll_s)
        raise TimeoutError(f"{argv[0]} has not ended in {COMMAND_S:.0f} s")

    def execute(self, command: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """What the agent returns for `command`, one that returns an object."""
        self._send(command, arguments)
        match json.loads(self._lines.readline()):
            case {"return": dict(returned)}:
                return returned
            case answer:
                raise RuntimeError(f"{command}: {answer}")

    def close(self) -> None:
        """Hang up."""
        self._lines.close()
        self._sock.close()

    def _send(self, command: str, arguments: dict[str, Any]) -> None:
        message = {"execute": command, "arguments": arguments}
        self._sock.sendall(json.dumps(message).encode() + b"\n")


Start = Callable[..., subprocess.Popen[bytes]]
"""As `subprocess.Popen`, which it may also be."""


@contextmanager
def open_by_hand(
    image: ByHandImage,
    *,
    accel: str,
    cpu: str = "",
    memory_mib: int = MEMORY_MIB,
    devices: Sequence[str] = (),
    start: Start = subprocess.Popen,
) -> Iterator[GuestAgent]:
    """A machine that has booted and answers, as a fixture would hand it over; ended afterwards.

    `devices` are options of QEMU beside its own.
    """
    with tempfile.TemporaryDirectory(prefix="by-hand-") as name:
        directory = Path(name)
        cpu = cpu or ("host" if accel == "kvm" else "max")
        argv = [
            *_argv(image, directory, accel=accel),
            *("-cpu", cpu, "-m", f"{memory_mib}M", *devices),
        ]
        with _qemu(argv, directory, start) as process:
            sock = _connect(directory / "agent.sock", process)
            agent = GuestAgent(sock)
            try:
                agent.wait_answering()
                yield agent
            except TimeoutError as error:
                console = (directory / "console.log").read_text(errors="replace")
                error.add_note(f"console: {console[-2000:]}")
                raise
            finally:
                agent.close()


@contextmanager
def _qemu(argv: Sequence[str], directory: Path, start: Start) -> Iterator[subprocess.Popen[bytes]]:
    with (directory / "qemu.log").open("wb") as log:
        process = start(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def _argv(image: ByHandImage, directory: Path, *, accel: str) -> list[str]:
    program = shutil.which("qemu-system-x86_64") or "qemu-system-x86_64"
    return [
        program,
        *("-M", "q35", "-accel", accel, "-smp", "1"),
        *("-nodefaults", "-no-user-config", "-no-reboot"),
        *("-display", "none", "-serial", f"file:{directory / 'console.log'}"),
        *("-kernel", str(image.kernel), "-initrd", str(image.initramfs)),
        *("-append", COMMAND_LINE),
        *("-device", "virtio-serial-pci", "-device", "virtio-rng-pci"),
        *("-chardev", f"socket,id=agent,path={directory / 'agent.sock'},server=on,wait=off"),
        *("-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0"),
    ]


def _connect(path: Path, process: subprocess.Popen[bytes]) -> socket.socket:
    deadline = time.monotonic() + BOOT_S
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        while True:
            try:
                sock.connect(str(path))
            except OSError as error:
                if time.monotonic() > deadline or process.poll() is not None:
                    log = (path.parent / "qemu.log").read_text(errors="replace")
                    raise TimeoutError(f"QEMU made no socket: {log}") from error
                time.sleep(0.005)
            else:
                return sock
    except BaseException:
        sock.close()
        raise
