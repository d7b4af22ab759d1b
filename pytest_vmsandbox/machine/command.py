"""A command in the guest: asked for like `subprocess.run`, answered like it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Generic, TypeVar

from pytest_vmsandbox.deadline import Deadline
from pytest_vmsandbox.errors import CommandFailed, RequestInvalid, TimedOut, VmSandboxError
from pytest_vmsandbox.guest.channel import Channel
from pytest_vmsandbox.guest.messages import ExecRequest
from pytest_vmsandbox.guest.process import GuestProcess
from pytest_vmsandbox.guest.streams import ReadStream, WriteStream
from pytest_vmsandbox.machine.splice import together

Text = TypeVar("Text", str, bytes)

# What a command prints is held in memory until it ends: beyond this, read a stream.
OUTPUT_LIMIT = 512 * 1024 * 1024
CHUNK = 1024 * 1024

# What an error quotes of each stream, in bytes.
SHOWN = 2000

# How long a command that is given up may take to be killed.
KILL_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Completed(Generic[Text]):
    """A command that has ended (compare `subprocess.CompletedProcess`).

    `returncode` is the exit status, or minus the number of the signal that ended it.
    """

    command: str | Sequence[str]
    returncode: int
    stdout: Text
    stderr: Text

    def check_returncode(self) -> None:
        """Raise CommandFailed unless the exit status is 0."""
        if self.returncode != 0:
            raise CommandFailed(self.command, self.returncode, self.stdout, self.stderr)


def argv_of(command: str | Sequence[str]) -> tuple[str, ...]:
    """A text is a line for /bin/sh, a list is argv.

    Raises RequestInvalid for an empty command, a word that is not a text, or a NUL in one.
    """
    words = ("/bin/sh", "-c", command) if isinstance(command, str) else tuple(command)
    if not words or not words[0] or (isinstance(command, str) and not command.strip()):
        raise RequestInvalid(f"{command!r} is no command: there is nothing to run")
    for word in words:
        if not isinstance(word, str):
            raise RequestInvalid(f"{word!r} in {command!r} is not a text", "str() it")
        if "\0" in word:
            raise RequestInvalid(f"{word!r} has a NUL, which no argument can have (execve(2))")
    return words


def environment_of(env: Mapping[str, str] | None) -> Mapping[str, str]:
    """The variables to be added to the guest's; raises RequestInvalid on one that can't be."""
    for name, value in (env or {}).items():
        if not isinstance(name, str) or not name or "=" in name or "\0" in name:
            raise RequestInvalid(f"{name!r} can't be an environment variable's name")
        if not isinstance(value, str) or "\0" in value:
            raise RequestInvalid(f"env[{name!r}]={value!r} must be a text without NUL")
    return dict(env or {})


def decode(data: bytes, encoding: str) -> str:
    """The text of a command's output; bytes that don't decode stay visible as escapes."""
    return data.decode(encoding, errors="backslashreplace")


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """How a command ended and all that it printed, as bytes."""

    returncode: int
    stdout: bytes
    stderr: bytes


async def run_command(
    channel: Channel, request: ExecRequest, *, stdin: bytes | None, deadline: Deadline
) -> Output:
    """Run a command to its end and collect its output.

    Raises TimedOut at the deadline, with the end of what it had printed, and RequestInvalid
    when it prints more than OUTPUT_LIMIT. Whatever is raised, its whole process group has
    been killed.
    """
    stdout, stderr = bytearray(), bytearray()
    shown = " ".join(map(str, request.argv))
    try:
        async with asyncio.timeout(deadline.timeout_s):
            process = await channel.spawn(request)
            async with _ending(process):
                await together(
                    _feed(process.stdin, stdin or b""),
                    _collect(process.stdout, stdout, shown),
                    _collect(process.stderr, stderr, shown),
                    _wait(process),
                )
                return Output(
                    returncode=await process.wait(), stdout=bytes(stdout), stderr=bytes(stderr)
                )
    except TimeoutError as error:
        if isinstance(error, TimedOut) or not deadline.passed:
            raise
        raise deadline.timed_out(f"the end of {shown!r}", _ends(stdout, stderr)) from None


@asynccontextmanager
async def _ending(process: GuestProcess) -> AsyncIterator[None]:
    """Kill the process's group unless the block ends well."""
    try:
        yield
    except BaseException:
        with suppress(VmSandboxError, TimeoutError):
            async with asyncio.timeout(KILL_S):
                await process.kill()
        raise


async def _feed(stdin: WriteStream | None, data: bytes) -> None:
    if stdin is not None:
        # A command may end without having read its input, as in subprocess.
        with suppress(BrokenPipeError):
            await stdin.write(data)
            await stdin.close()


async def _collect(stream: ReadStream | None, into: bytearray, shown: str) -> None:
    while stream is not None and (data := await stream.read(CHUNK)):
        into += data
        if len(into) > OUTPUT_LIMIT:
            raise RequestInvalid(
                f"{shown!r} printed more than {OUTPUT_LIMIT >> 20} MiB, which run() would hold",
                "popen() gives its output as a stream",
            )


async def _wait(process: GuestProcess) -> None:
    await process.wait()


def _ends(stdout: bytearray, stderr: bytearray) -> str:
    return "\n".join(
        f"{name}: ...{bytes(data[-SHOWN:]).decode(errors='backslashreplace')}"
        for name, data in (("stdout", stdout), ("stderr", stderr))
        if data
    )
