"""The serial console: what the guest's kernel says, kept in a log and watched for its death."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from contextlib import suppress
from enum import StrEnum
from pathlib import Path

from pytest_vmsandbox.deadline import Deadline

# A guest may print for ever. Memory keeps the end of it, the log on disk the beginning.
MEMORY_LIMIT = 4 * 1024 * 1024
LOG_LIMIT = 64 * 1024 * 1024


class KernelTrouble(StrEnum):
    """How a kernel says that it is in trouble (Documentation/admin-guide/bug-hunting.rst)."""

    PANIC = "panic"
    OOPS = "oops"


_TROUBLE = {
    KernelTrouble.PANIC: re.compile(rb"Kernel panic - not syncing"),
    KernelTrouble.OOPS: re.compile(
        rb"\[#\d+\] |BUG: unable to handle|kernel BUG at |BUG: KASAN: |Unable to handle kernel"
    ),
}
_LONGEST_SIGN = 64


class Console:
    """Everything that came over the guest's serial line since it first booted.

    For a restored machine that begins with the boot that its template was made of.

    Text is decoded as UTF-8, what is not is shown as backslash escapes, and carriage returns
    are dropped. At most the last `MEMORY_LIMIT` bytes are held; `log` has the first
    `LOG_LIMIT`. `on_trouble` is called once a boot for each trouble that the kernel reports.
    """

    def __init__(self, *, log: Path) -> None:
        self.log = log
        self.on_trouble: Callable[[KernelTrouble], None] = _no_one
        self._kept = bytearray()
        self._forgotten = 0
        self._begin = self._looked_at = 0
        self._seen: set[KernelTrouble] = set()
        self._news = asyncio.Event()
        self._failure: BaseException | None = None

    @property
    def text(self) -> str:
        """All that is held, as text."""
        return _as_text(self._kept)

    def tail(self, lines: int = 50) -> str:
        """The last `lines` lines."""
        return "\n".join(self.text.splitlines()[-lines:])

    @property
    def position(self) -> int:
        """How many bytes have come so far: a mark for `since`."""
        return self._forgotten + len(self._kept)

    def since(self, position: int) -> str:
        """What came after `position`, as far as it is still held."""
        return _as_text(self._kept[max(0, position - self._forgotten) :])

    async def wait_for(self, pattern: str, *, deadline: Deadline) -> re.Match[str]:
        """The first match of `pattern` in the whole text, now or once it has been printed.

        Raises TimedOut with the last lines when it has not come by the deadline, and what
        the machine died of when it is gone.
        """
        wanted = re.compile(pattern)
        while True:
            self._news.clear()
            if found := wanted.search(self.text):
                return found
            if self._failure is not None:
                raise self._failure
            try:
                async with asyncio.timeout(deadline.timeout_s):
                    await self._news.wait()
            except TimeoutError:
                raise deadline.timed_out(f"{pattern!r} on the console", self.tail()) from None

    def feed(self, data: bytes) -> None:
        """Take what the guest printed."""
        self._keep(data)
        self._look_for_trouble()
        self._forget()
        self._news.set()

    @property
    def held(self) -> bytes:
        """All that is held, as it came."""
        return bytes(self._kept)

    def recall(self, printed: bytes) -> None:
        """Take what the guest had printed before it was frozen: its troubles are old ones."""
        self._keep(printed)
        self._forget()
        self._news.set()

    def power_on(self) -> None:
        """A new boot begins: its troubles are new ones."""
        self._seen.clear()
        self._begin = self._looked_at = self.position
        self._failure = None

    def fail(self, error: BaseException) -> None:
        """Nothing more will come; waiters get `error`."""
        self._failure = error
        self._news.set()

    def _keep(self, data: bytes) -> None:
        room = LOG_LIMIT - self.position
        # A log that can't be written any more must not blind us to what comes.
        if room > 0:
            with suppress(OSError), self.log.open("ab") as log:
                log.write(data[:room])
        self._kept += data

    def _forget(self) -> None:
        if len(self._kept) > 2 * MEMORY_LIMIT:
            excess = len(self._kept) - MEMORY_LIMIT
            del self._kept[:excess]
            self._forgotten += excess

    def _look_for_trouble(self) -> None:
        # A sign may be split between two reads: look again at the end of the last one.
        start = max(self._begin, self._looked_at - _LONGEST_SIGN) - self._forgotten
        news = bytes(self._kept[max(0, start) :])
        self._looked_at = self.position
        for trouble, sign in _TROUBLE.items():
            if trouble not in self._seen and sign.search(news):
                self._seen.add(trouble)
                self.on_trouble(trouble)


class ConsoleLine(asyncio.Protocol):
    """The VMM's end of the serial line, poured into a `Console`."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def data_received(self, data: bytes) -> None:
        """Pass on what came (asyncio.Protocol)."""
        self._console.feed(data)


def _as_text(data: bytes | bytearray) -> str:
    return data.decode(errors="backslashreplace").replace("\r", "")


def _no_one(trouble: KernelTrouble) -> None:
    """Nobody listens yet."""
