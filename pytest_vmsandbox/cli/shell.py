"""`vmsandbox shell`: a terminal in a fresh machine."""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import sys
import termios
import tty
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from pytest_vmsandbox.cli.arguments import add_machine_arguments
from pytest_vmsandbox.cli.exit_status import OUTPUT_CLOSED
from pytest_vmsandbox.cli.machine import open_machine
from pytest_vmsandbox.cli.output import OutputClosedError, write_all
from pytest_vmsandbox.errors import RequestInvalid
from pytest_vmsandbox.guest.process import GuestProcess
from pytest_vmsandbox.machine.controller import MachineController

CHUNK = 64 * 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the image and the machine's shape."""
    add_machine_arguments(parser)
    parser.add_argument("image", nargs="?", default="mini", help="a recipe's name, or a path")


def run(arguments: argparse.Namespace) -> int:
    """Give this terminal to a shell in the machine until it ends; its exit status is ours."""
    if not os.isatty(sys.stdin.fileno()):
        raise RequestInvalid(
            "stdin is no terminal", "for a command without one: vmsandbox run -- COMMAND"
        )
    try:
        with open_machine(arguments) as (controller, engine), _raw_terminal(sys.stdin.fileno()):
            status = engine.run(_talk(controller))
    except OutputClosedError:
        return OUTPUT_CLOSED
    return status if status >= 0 else 128 - status


async def _talk(controller: MachineController) -> int:
    columns, rows = shutil.get_terminal_size()
    shell = await controller.popen(["/bin/sh", "-l"], pty=True, rows=rows, columns=columns)
    tasks = [asyncio.create_task(_type(shell)), asyncio.create_task(_follow_size(shell))]
    try:
        while shell.stdout is not None and (data := await shell.stdout.read(CHUNK)):
            write_all(sys.stdout.fileno(), data)
        return await shell.wait()
    finally:
        for task in tasks:
            task.cancel()


async def _type(shell: GuestProcess) -> None:
    """Pass on what is typed."""
    typed: asyncio.Queue[bytes] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    keyboard = sys.stdin.fileno()
    loop.add_reader(keyboard, lambda: typed.put_nowait(os.read(keyboard, CHUNK)))
    try:
        while shell.stdin is not None and (data := await typed.get()):
            with suppress(BrokenPipeError):
                await shell.stdin.write(data)
    finally:
        loop.remove_reader(keyboard)


async def _follow_size(shell: GuestProcess) -> None:
    """Pass on a change of the window's size.

    Looked at twice a second: SIGWINCH can be handled in the main thread only, which waits for
    the engine.
    """
    known = shutil.get_terminal_size()
    while True:
        await asyncio.sleep(0.5)
        if (size := shutil.get_terminal_size()) != known:
            known = size
            await shell.resize(rows=size.lines, columns=size.columns)


@contextmanager
def _raw_terminal(descriptor: int) -> Iterator[None]:
    """Every key goes to the guest, Ctrl-C too; the terminal is as before on the way out."""
    before = termios.tcgetattr(descriptor)
    tty.setraw(descriptor)
    try:
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
