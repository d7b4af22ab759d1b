"""What can go wrong, sorted by what the reader can do about it.

VmSandboxError
├── HostUnfit          the host lacks something            a skip, with the remedy
├── RequestInvalid     the test asks for the impossible    an error at collection
│   ├── NameTaken      a machine of that name is there
│   └── AddressesExhausted
├── MachineFailed      VMM or guest failed                 with the evidence that was left
│   ├── BootFailed     it never answered
│   ├── GuestPanicked  its kernel gave up
│   ├── VmmDied        the process that emulates it ended
│   └── ChannelLost    its agent can no longer be believed or reached
├── NetworkFailed      the wires between machines failed   with what the switch said last
│   ├── BridgeLost     somebody removed a network's bridge
│   ├── TapLost        somebody removed a machine's tap
│   └── SwitchDied     the process that carries them ended
├── CommandFailed      check=True and a non-zero exit
├── TimedOut           a deadline passed (is a TimeoutError)
├── OutcomeUnknown     asked, and no answer came           never repeated in silence
├── SocketAuthError    the peer is not who it must be
└── TeardownRefused    removing it might do harm           left in place, named in the summary

Every error hands all its arguments on positionally, so that it survives pickling between
pytest-xdist's processes, and makes its sentence in `__str__`: cause, evidence, next step.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass


class VmSandboxError(Exception):
    """The root of everything that this package raises on purpose."""


class HostUnfit(VmSandboxError):
    """The host lacks something that was asked for; a test is skipped for it.

    `code` is stable and begins with ``VMS-``; `evidence` is what was seen, `remedy` a command
    or a sentence that would change it.
    """

    def __init__(self, code: str, need: str, evidence: str, remedy: str) -> None:
        super().__init__(code, need, evidence, remedy)
        self.code, self.need, self.evidence, self.remedy = code, need, evidence, remedy

    def __str__(self) -> str:
        return f"{self.code}: {self.need}\n  found: {self.evidence}\n  try:   {self.remedy}"


class RequestInvalid(VmSandboxError):
    """Something impossible was asked for; the sentence names the value."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.message, self.hint = message, hint

    def __str__(self) -> str:
        return f"{self.message}\n  hint: {self.hint}" if self.hint else self.message


class NameTaken(RequestInvalid):
    """A network has a machine of that name already; whoever asked is on no network then."""


class AddressesExhausted(RequestInvalid):
    """A network has no address left, or a worker no network; whoever asked is on none then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What a machine left to look at when it failed; empty texts where there was nothing."""

    console_tail: str = ""
    vmm_stderr: str = ""
    command_line: str = ""
    vmm_status: str = ""

    def __str__(self) -> str:
        parts = (
            ("VMM status", self.vmm_status),
            ("VMM stderr", self.vmm_stderr),
            ("command line", self.command_line),
            ("console, last lines", self.console_tail),
        )
        return "\n".join(
            f"--- {title} ---\n{visible(text.rstrip())}" for title, text in parts if text
        )


class MachineFailed(VmSandboxError):
    """The VMM or the guest failed; `machine` is its name, `evidence` what it left."""

    def __init__(self, machine: str, cause: str, evidence: Evidence | None = None) -> None:
        super().__init__(machine, cause, evidence)
        self.machine, self.cause, self.evidence = machine, cause, evidence or Evidence()

    def __str__(self) -> str:
        return f"{self.machine}: {self.cause}\n{self.evidence}".rstrip()


class BootFailed(MachineFailed):
    """The guest never came to answer."""


class GuestPanicked(MachineFailed):
    """The guest's kernel panicked, or oopsed where no oops was expected."""


class VmmDied(MachineFailed):
    """The VMM ended although nobody had asked it to."""


class ChannelLost(MachineFailed):
    """The line to the agent broke, or what came over it can't be believed."""


class NetworkFailed(VmSandboxError):
    """The networks between machines failed; `last_words` is what their switch printed."""

    def __init__(self, cause: str, last_words: str = "") -> None:
        super().__init__(cause, last_words)
        self.cause, self.last_words = cause, last_words

    def __str__(self) -> str:
        words = visible(self.last_words)
        return f"the network: {self.cause}" + (f"\n--- it printed ---\n{words}" if words else "")


class BridgeLost(NetworkFailed):
    """Somebody removed a network's bridge, and not we: it carries nothing any more.

    Its machines run on. Once all of them have been off, the network has another bridge.
    """


class TapLost(NetworkFailed):
    """Somebody removed a machine's tap, and not we: the machine is cut off from that network.

    It runs on, and the others hear each other. Once it has been off, it has another tap.
    """


class SwitchDied(NetworkFailed):
    """The process that carries the networks has ended, and with it all connections from here.

    Machines run on. A network whose machines are all off gets another switch.
    """


class CommandFailed(VmSandboxError):
    """A command in the guest ended with a non-zero status and `check=True` was asked for.

    `returncode` is negative for a signal, as in `subprocess`; output is text or bytes, as asked.
    """

    def __init__(
        self, command: object, returncode: int, stdout: str | bytes, stderr: str | bytes
    ) -> None:
        super().__init__(command, returncode, stdout, stderr)
        self.command, self.returncode = command, returncode
        self.stdout, self.stderr = stdout, stderr

    def __str__(self) -> str:
        how = _how_it_ended(self.returncode)
        streams = (("stdout", self.stdout), ("stderr", self.stderr))
        shown = [f"--- {name}, end ---\n{_tail(text)}" for name, text in streams if text]
        return "\n".join([f"command {self.command!r} {how}", *shown])


class TimedOut(VmSandboxError, TimeoutError):
    """A deadline passed: what was awaited, after how long, and what was last seen."""

    def __init__(self, awaited: str, after_s: float, last_seen: str = "") -> None:
        super().__init__(awaited, after_s, last_seen)
        self.awaited, self.after_s, self.last_seen = awaited, after_s, last_seen

    def __str__(self) -> str:
        sentence = f"{self.awaited}: not within {self.after_s:.1f} s"
        seen = visible(self.last_seen)
        return f"{sentence}\n--- last seen ---\n{seen}" if seen else sentence


class OutcomeUnknown(VmSandboxError):
    """A request was sent and no answer came: it may or may not have been carried out."""

    def __init__(self, request: str, reason: str) -> None:
        super().__init__(request, reason)
        self.request, self.reason = request, reason

    def __str__(self) -> str:
        return (
            f"{self.request}: whether it was carried out is unknown ({self.reason})\n"
            "  it was not repeated; look before you ask again"
        )


class SocketAuthError(VmSandboxError):
    """The peer of a socket is not who it must be; nothing was sent to it."""

    def __init__(
        self,
        message: str,
        expected_uid: int,
        actual_uid: int,
        context: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__(message, expected_uid, actual_uid, context)
        self.message, self.expected_uid, self.actual_uid = message, expected_uid, actual_uid
        self.context: dict[str, object] = {
            **(context or {}),
            "expected_uid": expected_uid,
            "actual_uid": actual_uid,
        }

    def __str__(self) -> str:
        seen = ", ".join(f"{key}={value}" for key, value in self.context.items())
        return f"{self.message} [{seen}]"


class TeardownRefused(VmSandboxError):
    """Removing `path` might do harm: it was left in place."""

    def __init__(self, path: str, because: str, inspect: str = "") -> None:
        super().__init__(path, because, inspect)
        self.path, self.because, self.inspect = path, because, inspect

    def __str__(self) -> str:
        sentence = f"{self.path} was left in place: {self.because}"
        return f"{sentence}\n  inspect: {self.inspect}" if self.inspect else sentence


def visible(text: str) -> str:
    """`text` with what would move a terminal's cursor or change its colours shown as escapes.

    What a guest printed is quoted in reports, and must not steer the terminal that shows it.
    """
    return "".join(
        character
        if character.isprintable() or character in "\n\t"
        else character.encode("unicode_escape").decode()
        for character in text
    )


def _how_it_ended(returncode: int) -> str:
    if returncode >= 0:
        return f"exited with {returncode}"
    try:
        return f"was ended by {signal.Signals(-returncode).name}"
    except ValueError:
        return f"was ended by signal {-returncode}"


def _tail(text: str | bytes, *, characters: int = 2000) -> str:
    shown = text.decode(errors="backslashreplace") if isinstance(text, bytes) else text
    return visible(shown[-characters:].rstrip())
