"""Files and output between host and guest."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from benchmarks.measurement import Measurement, Unit, alternate
from benchmarks.ours import open_machine, open_worker, prepared_image
from benchmarks.setting import Setting
from pytest_vmsandbox.machine.machine import Machine

FILE_MB: Final = 64
STDOUT_MB: Final = 100
TREE_FILES: Final = 2000
TREE_FOLDERS: Final = 20
TREE_FILE_BYTES: Final = 4096
MEMORY_MIB: Final = 512

_MB: Final = 1_000_000


def measure_files(setting: Setting) -> Sequence[Measurement]:
    """One large file, many small ones, and a command that prints a lot."""
    with (
        setting.scratch() as scratch,
        open_worker(setting.cache_dir) as worker,
    ):
        prepared_image(worker)
        setting.say(f"making a file of {FILE_MB} MB and a tree of {TREE_FILES} files")
        _make_file(scratch / "file")
        _make_tree(scratch / "tree")
        with open_machine(worker, memory_mib=MEMORY_MIB) as machine:
            rates = alternate(_acts(machine, scratch), rounds=setting.rounds)
            accel = machine.facts.accel
    return [
        Measurement(
            benchmark="files",
            what=what,
            unit=Unit.MEGABYTES_PER_SECOND,
            values=values,
            how=f"in a guest with {MEMORY_MIB} MiB, in memory there; {accel}",
        )
        for what, values in rates.items()
    ]


def _acts(machine: Machine, scratch: Path) -> dict[str, Callable[[], float]]:
    tree_mb = TREE_FILES * TREE_FILE_BYTES / _MB
    tree = f"a tree of {TREE_FILES} files of {TREE_FILE_BYTES >> 10} KiB"
    return {
        f"push of a file of {FILE_MB} MB": lambda: _push(machine, scratch / "file", FILE_MB),
        f"pull of a file of {FILE_MB} MB": lambda: _pull(machine, scratch / "file", FILE_MB),
        f"push of {tree}": lambda: _push(machine, scratch / "tree", tree_mb),
        f"pull of {tree}": lambda: _pull(machine, scratch / "tree", tree_mb),
        f"{STDOUT_MB} MB of stdout": lambda: _print(machine),
    }


def _push(machine: Machine, source: Path, megabytes: float) -> float:
    machine.run(["rm", "-rf", "/tmp/pushed"], check=True)
    started = time.perf_counter()
    machine.push(source, "/tmp/pushed")
    return megabytes / (time.perf_counter() - started)


def _pull(machine: Machine, source: Path, megabytes: float) -> float:
    machine.run(["rm", "-rf", "/tmp/pulled"], check=True)
    machine.push(source, "/tmp/pulled")
    target = source.with_suffix(".pulled")
    started = time.perf_counter()
    machine.pull("/tmp/pulled", target)
    seconds = time.perf_counter() - started
    _require_same(source, target)
    machine.run(["rm", "-rf", "/tmp/pulled"], check=True)
    return megabytes / seconds


def _print(machine: Machine) -> float:
    command = ["dd", "if=/dev/zero", "bs=1000000", f"count={STDOUT_MB}"]
    started = time.perf_counter()
    done = machine.run(command, check=True, encoding=None)
    seconds = time.perf_counter() - started
    if len(done.stdout) != STDOUT_MB * _MB:
        raise RuntimeError(f"{len(done.stdout)} bytes of stdout came, not {STDOUT_MB} MB")
    return STDOUT_MB / seconds


def _require_same(source: Path, pulled: Path) -> None:
    if _contents(source) != _contents(pulled):
        raise RuntimeError(f"{pulled} is not {source}")
    if pulled.is_dir():
        shutil.rmtree(pulled)
    else:
        pulled.unlink()


def _contents(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return {
        str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).digest() for file in files
    }


def _make_file(path: Path) -> None:
    with path.open("wb") as file:
        for _ in range(FILE_MB):
            file.write(os.urandom(_MB))


def _make_tree(path: Path) -> None:
    for number in range(TREE_FILES):
        folder = path / f"folder-{number % TREE_FOLDERS}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"file-{number}").write_bytes(os.urandom(TREE_FILE_BYTES))
