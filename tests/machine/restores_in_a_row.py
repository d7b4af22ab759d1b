"""Restore many machines, one after the other, and print what is held before and after:

python -m tests.machine.restores_in_a_row NUMBER DIRECTORY
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import re
import sys
from contextlib import closing
from pathlib import Path

from platformdirs import user_cache_path

from pytest_vmsandbox.machine.controller import MachineController
from pytest_vmsandbox.machine.spec import MachineSpec
from pytest_vmsandbox.machine.worker import Worker, WorkerSettings

RESTORED = MachineSpec().changed({"lifecycle": "restored"})
WARM_UP = 10


def main(number: int, directory: Path) -> None:
    """Restore and end them; one line of JSON after the warm-up, and one at the end."""
    cache = os.environ.get("VMSANDBOX_CACHE_DIR")
    settings = WorkerSettings(
        cache_dir=Path(cache) if cache else user_cache_path("vmsandbox"), run_dir=directory / "run"
    )
    with closing(Worker(settings)) as worker:
        restore(worker, WARM_UP)
        sys.stdout.write(json.dumps(_held(worker)) + "\n")
        restore(worker, number)
        sys.stdout.write(json.dumps(_held(worker)) + "\n")


def restore(worker: Worker, number: int) -> None:
    """Restore so many, each of which looks for what the ones before it left."""
    run = worker.engine.run
    for _ in range(number):
        (machine,) = run(worker.make([RESTORED]))
        run(worker.boot([machine]))
        run(_sees_and_leaves(machine))
        run(worker.end([machine]))


async def _sees_and_leaves(machine: MachineController) -> None:
    """See nothing of an earlier machine; leave a file and a process for later ones to see."""
    assert machine.facts.lifecycle == "restored"
    seen = await machine.run("ls /root /tmp; ps")
    assert "left-" not in seen.stdout

    await machine.run("echo > /root/left-file", check=True)
    await machine.popen(["sh", "-c", "sleep 1000; : left-running"])
    seen = await machine.run("ls /root /tmp; ps")
    assert "left-file" in seen.stdout
    assert "left-running" in seen.stdout


def _held(worker: Worker) -> dict[str, object]:
    """What this worker has open and has made: descriptors, processes, memory, files."""
    gc.collect()
    return {
        "descriptors": sorted(_descriptors()),
        "processes": sorted(Path(f"/proc/{pid}/comm").read_text() for pid in _descendants()),
        "memory_bytes": _memory_bytes(),
        "files": sorted(str(path) for path in worker.directory.path.rglob("*")),
    }


def _descriptors() -> list[str]:
    """What each is, without the numbers that differ from one to the next."""
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the one that this very list is read by
            found.append(re.sub(r"\d+", "N", str(entry.readlink())))
    return found


def _descendants(pid: int | str = "self") -> list[str]:
    """Whatever we started, and what that started: wardens, and VMMs that are left."""
    listed = Path(f"/proc/{pid}/task").glob("*/children")
    children = [child for children in listed for child in children.read_text().split()]
    return [*children, *(below for child in children for below in _descendants(child))]


def _memory_bytes() -> int:
    """What this process and all its descendants hold that is in no file (proc_pid_statm(5))."""
    gc.collect()
    page = os.sysconf("SC_PAGESIZE")
    pids = ["self", *_descendants()]
    held = (Path(f"/proc/{pid}/statm").read_text().split() for pid in pids)
    return sum((int(resident) - int(shared)) * page for _, resident, shared, *_ in held)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
