"""A network namespace of our own: programs and sockets in it, and nothing of it outside."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, Final, TypeVar

from pytest_vmsandbox.linux.clone import CloneFlags
from pytest_vmsandbox.linux.namespaces import unshare

T = TypeVar("T")

TIMEOUT_S: Final = 20.0


class OwnNamespace:
    """What is done in it is done by one thread, which alone of us is there (setns(2), threads)."""

    def __init__(self, thread: ThreadPoolExecutor) -> None:
        self._thread = thread
        self.started: list[subprocess.Popen[bytes]] = []

    def run(self, *argv: str) -> None:
        """Run a command there to its end; OSError, with what it said, if it fails."""
        run = partial(subprocess.run, argv, capture_output=True, text=True, timeout=TIMEOUT_S)
        if (done := self._do(run)).returncode != 0:
            raise OSError(f"{' '.join(argv)}: {done.stderr.strip()}")

    def start(self, argv: Sequence[str], **streams: Any) -> subprocess.Popen[bytes]:
        """Start a process there; it ends with the namespace at the latest."""

        def start() -> subprocess.Popen[bytes]:
            self.started.append(subprocess.Popen(argv, **streams))
            return self.started[-1]

        return self._do(start)

    def connect(self, address: str, port: int) -> socket.socket:
        """A connected socket from there; whoever has it may use it anywhere."""
        return self._do(lambda: socket.create_connection((address, port), TIMEOUT_S))

    def _do(self, act: Callable[[], T]) -> T:
        return self._thread.submit(act).result()


@contextmanager
def open_own_namespace() -> Iterator[OwnNamespace]:
    """A new one, with its loopback up; PermissionError for those who are not root.

    It goes with the thread and the processes in it, which are killed with the block.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="namespace") as thread:
        thread.submit(unshare, CloneFlags.NEWNET).result()
        inside = OwnNamespace(thread)
        try:
            inside.run("ip", "link", "set", "lo", "up")
            yield inside
        finally:
            thread.shutdown()  # whatever is being started has been, then
            for process in inside.started:
                process.kill()
                process.wait()
