"""Arguments that several subcommands share."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from platformdirs import user_cache_path
from rich.console import Console

from pytest_vmsandbox.cli.progress import RichProgress
from pytest_vmsandbox.machine.controller import MachineController
from pytest_vmsandbox.machine.engine import Engine
from pytest_vmsandbox.machine.spec import MachineSpec
from pytest_vmsandbox.machine.worker import Worker, WorkerSettings

# Exit statuses, as shells use them.
NOT_EXECUTABLE = 126
NOT_FOUND = 127
OUTPUT_CLOSED = 128 + 13  # as if SIGPIPE had ended us


class OutputClosedError(Exception):
    """Whoever read our output reads no more."""


def add_cache_argument(parser: argparse.ArgumentParser) -> None:
    """Declare --cache-dir."""
    parser.add_argument("--cache-dir", type=Path, help="where images are kept (the user's cache)")


def cache_of(arguments: argparse.Namespace) -> Path:
    """The cache directory that was asked for, by argument or environment, or the user's."""
    given: Path | None = arguments.cache_dir
    named = os.environ.get("VMSANDBOX_CACHE_DIR")
    return given or (Path(named) if named else user_cache_path("vmsandbox"))


def add_machine_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what a machine is like, as the pytest options do."""
    add_cache_argument(parser)
    parser.add_argument("--memory-mib", type=int, default=128, help="memory in MiB (128)")
    parser.add_argument("--cpus", type=int, default=1, help="processors (1)")
    parser.add_argument("--accel", default="auto", help="auto, kvm or tcg")
    parser.add_argument(
        "--tier", default="auto", help="auto, root, sudo, qemu-vm, userns or bare (no walls)"
    )


@contextmanager
def open_machine(arguments: argparse.Namespace) -> Iterator[tuple[MachineController, Engine]]:
    """A fresh machine as the arguments describe it, and the engine it lives on."""
    spec = MachineSpec(
        image=arguments.image,
        memory_mib=arguments.memory_mib,
        cpus=arguments.cpus,
        accel=arguments.accel,
        tier=arguments.tier,
    )
    with RichProgress(Console(stderr=True)) as progress:
        worker = Worker(WorkerSettings(id="cli", cache_dir=cache_of(arguments)), progress=progress)
        with closing(worker):
            (controller,) = worker.engine.run(worker.make([spec]))
            try:
                worker.engine.run(worker.boot([controller]))
                progress.hide()
                yield controller, worker.engine
            finally:
                worker.engine.run(worker.end([controller]))


def report_not_started(error: OSError) -> int:
    """Say why a command could not be started in the guest; returns our exit status for it."""
    print(f"vmsandbox: {error}", file=sys.stderr)  # noqa: T201  # a command line talks
    return NOT_FOUND if isinstance(error, FileNotFoundError) else NOT_EXECUTABLE


def write_all(descriptor: int, data: bytes) -> None:
    """Write all of it to our stdout or stderr; OutputClosedError when nobody reads it."""
    view = memoryview(data)
    try:
        while view:
            view = view[os.write(descriptor, view) :]
    except BrokenPipeError:
        raise OutputClosedError from None
