"""`vmsandbox ps`: the runs on this host, their machines, and what dead ones left."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TypedDict

from pytest_vmsandbox.cli.runs import add_run_dir_argument, ask_each_base
from pytest_vmsandbox.errors import visible
from pytest_vmsandbox.lease.entries import Entry, ProcessEntry
from pytest_vmsandbox.lease.leftover import look_at
from pytest_vmsandbox.lease.reaper import Run, Standing, survey


class ProcessRow(TypedDict):
    """A process that a run has recorded: a machine's VMM, or its warden."""

    role: str
    machine_id: str
    machine_name: str
    tier: str
    pid: int | None
    age_s: float


class RunRow(TypedDict):
    """A run directory, as `--json` shows it."""

    path: str
    state: str
    worker: str | None
    pid: int | None
    age_s: float | None
    processes: list[ProcessRow]
    others: list[str]
    reason: str
    inspect: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vmsandbox ps`."""
    add_run_dir_argument(parser)
    parser.add_argument("--json", action="store_true", help="machine-readable; docs/usage.md")


def run(arguments: argparse.Namespace) -> int:
    """Always 0: what is in doubt is shown, and nothing is changed."""
    answers = ask_each_base(arguments, _rows_of, failed=_not_seen)
    rows = [row for answer in answers for row in answer]
    if arguments.json:
        text = json.dumps({"runs": rows}, indent=1)
    else:
        text = "\n".join(line for row in rows for line in _render(row)) or "no runs"
    sys.stdout.write(f"{visible(text)}\n")
    return 0


def _rows_of(base: Path) -> list[RunRow]:
    return [_row(found, now=time.time()) for found in survey(base)]


def _not_seen(base: Path, reason: str) -> list[RunRow]:
    run = Run(path=base, standing=Standing.DOUBTFUL, reason=reason, inspect=look_at(base))
    return [_row(run, now=time.time())]


def _row(found: Run, *, now: float) -> RunRow:
    head = found.account.head if found.account else None
    entries: list[Entry] = list(found.account.entries.values()) if found.account else []
    return {
        "path": str(found.path),
        "state": found.standing.value,
        "worker": head.worker if head else None,
        "pid": head.owner.pid if head else None,
        "age_s": _age_s(head.since, now) if head else None,
        "processes": [_process_row(e, now=now) for e in entries if isinstance(e, ProcessEntry)],
        "others": [str(e) for e in entries if not isinstance(e, ProcessEntry)],
        "reason": found.reason,
        "inspect": found.inspect,
    }


def _process_row(entry: ProcessEntry, *, now: float) -> ProcessRow:
    return {
        "role": entry.role.value,
        "machine_id": entry.machine_id,
        "machine_name": entry.machine_name,
        "tier": entry.tier.value,
        "pid": entry.identity.pid if entry.identity else None,
        "age_s": _age_s(entry.since, now),
    }


def _age_s(since: float, now: float) -> float:
    return round(max(0.0, now - since), 1)


def _render(row: RunRow) -> Iterator[str]:
    owner = [f"worker {row['worker']}", f"pid {row['pid']}"] if row["worker"] else []
    age = [f"for {_shown(row['age_s'])}"] if row["age_s"] is not None else []
    yield "  ".join([f"{row['state']:<8}", row["path"], *owner, *age])
    for process in row["processes"]:
        name = process["machine_name"] or process["role"]
        pid = "not started" if process["pid"] is None else f"pid {process['pid']}"
        identity = [process["machine_id"]] if process["machine_id"] else []
        words = [name, *identity, f"tier {process['tier']}", pid]
        yield f"{'':10}{'  '.join(words)}  for {_shown(process['age_s'])}"
    for other in row["others"]:
        yield f"{'':10}{other}"
    if row["reason"]:
        yield f"{'':10}{row['reason']}"
    if row["inspect"]:
        yield f"{'':10}inspect: {row['inspect']}"


def _shown(age_s: float | None) -> str:
    seconds = int(age_s or 0)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length} {unit}"
    return f"{seconds} s"
