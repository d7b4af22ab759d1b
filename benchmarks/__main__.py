"""`python -m benchmarks`: all of them, or those that are named."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from platformdirs import user_cache_path
from rich.console import Console

from benchmarks.boot import measure_boot
from benchmarks.command import measure_command
from benchmarks.files import measure_files
from benchmarks.fork import measure_fork
from benchmarks.freezing import measure_freezing
from benchmarks.image import measure_image
from benchmarks.import_cost import measure_import
from benchmarks.layer import measure_layer
from benchmarks.measurement import Measurement
from benchmarks.memory import measure_memory
from benchmarks.network import measure_network
from benchmarks.pool import measure_pool
from benchmarks.probes import measure_probes
from benchmarks.report import document_of, table_of
from benchmarks.restored import measure_restored
from benchmarks.setting import HostDescription, Setting
from benchmarks.throughput import measure_throughput
from benchmarks.walls import measure_walls
from pytest_vmsandbox.errors import VmSandboxError

BENCHMARKS: Final[dict[str, Callable[[Setting], Sequence[Measurement]]]] = {
    "restored": measure_restored,
    "pool": measure_pool,
    "throughput": measure_throughput,
    "memory": measure_memory,
    "freezing": measure_freezing,
    "fork": measure_fork,
    "layer": measure_layer,
    "network": measure_network,
    "boot": measure_boot,
    "command": measure_command,
    "image": measure_image,
    "import": measure_import,
    "files": measure_files,
    "probes": measure_probes,
    "walls": measure_walls,
}

ROUNDS: Final = 5
WIDTH: Final = 120
INTERRUPTED: Final = 128 + signal.SIGINT


def main() -> int:
    """Measure, print the table, write the JSON; 1 when a benchmark could not be run to its end."""
    arguments = _parse_arguments()
    terminal = Console(stderr=True)
    # A pipe has no width: the table then takes the width that it needs.
    console = Console() if sys.stdout.isatty() else Console(width=WIDTH)
    setting = Setting(
        rounds=arguments.rounds,
        cache_dir=arguments.cache_dir or user_cache_path("vmsandbox"),
        say=lambda text: terminal.print(f"  {text}", markup=False),
    )
    # Asked to end in either way, everything that was started is ended first.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    measured: list[Measurement] = []
    failed = False
    try:
        for name in arguments.benchmarks or BENCHMARKS:
            terminal.print(f"{name} ...", markup=False)
            try:
                measured += BENCHMARKS[name](setting)
            except VmSandboxError as error:
                failed = True
                terminal.print(f"{name} can't be measured here: {error}", markup=False)
            except Exception:  # noqa: BLE001 - what the others show is wanted none the less
                failed = True
                terminal.print(f"{name} failed:\n{traceback.format_exc()}", markup=False)
    except KeyboardInterrupt:
        terminal.print("interrupted; nothing of it is left", markup=False)
        return INTERRUPTED
    host = HostDescription.of_this_host()
    console.print(table_of(measured))
    console.print(str(host), markup=False, highlight=False)
    if arguments.json:
        text = json.dumps(document_of(measured, host), indent=2)
        arguments.json.write_text(text + "\n", encoding="utf-8")
    return int(failed)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "benchmarks", nargs="*", metavar="BENCHMARK", help=f"of {', '.join(BENCHMARKS)}; or all"
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"how many each ({ROUNDS})")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every value there")
    parser.add_argument("--cache-dir", type=Path, help="where images are kept (the user's cache)")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.benchmarks if name not in BENCHMARKS]:
        parser.error(f"no such benchmark: {', '.join(unknown)}")
    if arguments.rounds < 1:
        parser.error("--rounds must be at least 1")
    return arguments


if __name__ == "__main__":
    raise SystemExit(main())
