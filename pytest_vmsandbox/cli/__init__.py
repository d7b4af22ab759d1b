"""The command `vmsandbox`: one module for each subcommand."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from pytest_vmsandbox.cli.exit_status import INTERRUPTED, UNFIT
from pytest_vmsandbox.errors import VmSandboxError

COMMANDS = {
    "doctor": "what this host can do, with evidence and remedies",
    "setup": "make this host fit: packages, the user qemu-vm, sudoers, /dev/kvm",
    "image": "build, list, verify and remove images",
    "cache": "list, verify and clear the templates that machines are restored from",
    "run": "one command in a fresh machine; its exit status is ours",
    "shell": "a terminal in a fresh machine",
    "ps": "the runs on this host, their machines, and what dead runs left",
    "reap": "undo what dead runs left, and name what is in doubt",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit status.

    2 for a usage that is wrong, 125 when the host or a machine failed us, 130 after Ctrl-C;
    `run` knows more of them.
    """
    _fill_closed_streams()
    words, behind_dashes = _split(sys.argv[1:] if argv is None else argv)
    arguments = _parser(words).parse_args(words)
    arguments.behind_dashes = behind_dashes
    try:
        status: int = arguments.perform(arguments)
    except (VmSandboxError, OSError) as error:
        print(f"vmsandbox: {error}", file=sys.stderr)  # noqa: T201  # a command line talks
        return UNFIT
    except KeyboardInterrupt:
        return INTERRUPTED
    return status


def _fill_closed_streams() -> None:
    """Make /dev/null of a stdin, stdout or stderr that we were started without.

    The next file that is opened would get its number, and be read or written in its place.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # that is how Python says that it was closed
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115, PTH123  # to the very end


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """What stands before the first `--` and behind it: argparse would forget where it stood."""
    words = list(argv)
    if "--" not in words:
        return words, []
    place = words.index("--")
    return words[:place], words[place + 1 :]


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vmsandbox", description="Real Linux machines for tests (pytest-vmsandbox)."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=f"{summary}.")
        # Only the one that was asked for is loaded, so that each starts quickly.
        if name in words:
            module = import_module(f"pytest_vmsandbox.cli.{name}")
            module.add_arguments(command)
            command.set_defaults(perform=module.run)
    return parser
