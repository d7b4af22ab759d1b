"""`vmsandbox run`: one command in a fresh machine."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import threading
from contextlib import suppress

from pytest_vmsandbox.cli.arguments import add_machine_arguments
from pytest_vmsandbox.cli.exit_status import NOT_EXECUTABLE, NOT_FOUND, OUTPUT_CLOSED
from pytest_vmsandbox.cli.machine import open_machine
from pytest_vmsandbox.cli.output import OutputClosedError, write_all
from pytest_vmsandbox.errors import RequestInvalid, VmSandboxError
from pytest_vmsandbox.guest.streams import ReadStream, WriteStream
from pytest_vmsandbox.machine.controller import MachineController

CHUNK = 64 * 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the image and the machine's shape; the command stands behind `--`."""
    add_machine_arguments(parser)
    parser.usage = "%(prog)s [options] [IMAGE] -- COMMAND [ARGUMENT ...]"
    parser.add_argument("image", nargs="?", default="mini", help="a recipe's name, or a path")


def run(arguments: argparse.Namespace) -> int:
    """Run it; its stdin, stdout, stderr and exit status are ours, 128+N for signal N.

    127 when there is no such command in the guest, 126 when it can't be started, 141 when
    nobody reads our output any more.
    """
    if not arguments.behind_dashes:
        raise RequestInvalid("there is no command", "vmsandbox run [IMAGE] -- COMMAND")
    os.read(sys.stdin.fileno(), 0)  # what can't be read is refused before anything boots
    try:
        with open_machine(arguments) as (controller, engine):
            status = engine.run(_attached(controller, arguments.behind_dashes))
    except OutputClosedError:
        return OUTPUT_CLOSED
    return status if status >= 0 else 128 - status


async def _attached(controller: MachineController, command: list[str]) -> int:
    try:
        process = await controller.popen(command)
    except VmSandboxError:  # some are OSErrors too
        raise
    except OSError as error:
        return _report_not_started(error)
    feeding = asyncio.create_task(_feed(process.stdin))
    try:
        await asyncio.gather(
            _copy(process.stdout, sys.stdout.fileno()), _copy(process.stderr, sys.stderr.fileno())
        )
        return await process.wait()
    finally:
        feeding.cancel()


def _report_not_started(error: OSError) -> int:
    """Say why it could not be started in the guest; returns our exit status for it."""
    sys.stderr.write(f"vmsandbox: {error}\n")
    return NOT_FOUND if isinstance(error, FileNotFoundError) else NOT_EXECUTABLE


async def _copy(source: ReadStream | None, target: int) -> None:
    while source is not None and (data := await source.read(CHUNK)):
        await asyncio.to_thread(write_all, target, data)


async def _feed(stdin: WriteStream | None) -> None:
    """Pass our stdin on; the command may end before it does."""
    if stdin is None:
        return
    chunks: asyncio.Queue[bytes] = asyncio.Queue(maxsize=4)
    reader = threading.Thread(
        target=_read_all, args=(asyncio.get_running_loop(), chunks), daemon=True
    )
    reader.start()
    with suppress(BrokenPipeError):
        while data := await chunks.get():
            await stdin.write(data)
    await stdin.close()


def _read_all(loop: asyncio.AbstractEventLoop, chunks: asyncio.Queue[bytes]) -> None:
    """Read until the end in a thread of its own: a terminal or a pipe can't be polled alike."""
    data = b"more"
    while data:
        try:
            data = os.read(sys.stdin.fileno(), CHUNK)
        except OSError:  # a terminal that hung up: there is no more
            data = b""
        with suppress(RuntimeError):  # the loop ended with the command
            asyncio.run_coroutine_threadsafe(chunks.put(data), loop).result()
