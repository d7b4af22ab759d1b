"""What a pytest run that has nothing to do with machines pays for our being installed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.measurement import Measurement, Unit, alternate
from benchmarks.setting import Setting

# Hypothesis' plugin imports all of Hypothesis at a run's end, which would drown what we look for.
_BLOCKED: Final = ("-p", "no:cacheprovider", "-p", "no:hypothesispytest")
_PYTEST: Final = ("-m", "pytest", "--collect-only", "-q", *_BLOCKED)
_WITHOUT: Final = ("-p", "no:vmsandbox")
# By its module's name: -X importtime is silent on what importlib.metadata loads itself.
_BY_NAME: Final = (*_WITHOUT, "-p", "pytest_vmsandbox.plugin")
_NO_TESTS_COLLECTED: Final = 5
_UNWANTED: Final = ("PYTHONDONTWRITEBYTECODE", "PYTEST_ADDOPTS", "PYTEST_PLUGINS")
_PACKAGE: Final = "pytest_vmsandbox"

# Whole processes are noisy: so many pairs of them make one round.
PAIRS: Final = 4

# import time:       self |  cumulative | name, indented by two for each level (-X importtime)
_LINE: Final = re.compile(r"import time:\s+(\d+) \|\s+(\d+) \| ( *)(\S+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """One import, as `-X importtime` tells of it, once all that it imported has been told."""

    name: str
    depth: int
    cumulative_us: int

    @property
    def is_ours(self) -> bool:
        """Whether it is our package, or in it."""
        return self.name.partition(".")[0] == _PACKAGE


def measure_import(setting: Setting) -> Sequence[Measurement]:
    """By the interpreter's own account, and by whole processes with and without us."""
    with tempfile.TemporaryDirectory(prefix="import-") as scratch:
        empty = Path(scratch) / "empty"
        empty.mkdir()
        _processor_ms(empty, ())  # byte code is written, files come into the page cache
        told = alternate({"ours": lambda: _told_ms(empty)}, rounds=setting.rounds)
        processes = alternate(
            {
                "with": lambda: _processor_ms(empty, ()),
                "without": lambda: _processor_ms(empty, _WITHOUT),
            },
            rounds=setting.rounds * PAIRS,
        )
    pairs = list(zip(processes["with"], processes["without"], strict=True))
    return [
        Measurement(
            benchmark="import",
            what="imports of the plugin",
            unit=Unit.MILLISECONDS,
            values=told["ours"],
            how="-X importtime: our modules and all that only they import",
        ),
        Measurement(
            benchmark="import",
            what="what the plugin adds to a run",
            unit=Unit.MILLISECONDS,
            values=tuple(ours - theirs for ours, theirs in pairs),
            how=f"CPU time of pytest --collect-only, {len(pairs)} pairs with and without us",
        ),
        Measurement(
            benchmark="import",
            what="a run with the plugin",
            unit=Unit.MILLISECONDS,
            values=processes["with"],
            how="CPU time of pytest --collect-only in an empty directory",
            peer="-p no:vmsandbox",
            peer_values=processes["without"],
        ),
    ]


def parse_import_times(text: str) -> list[Imported]:
    """What `-X importtime` wrote on stderr, in its order: what is imported stands first."""
    return [
        Imported(name=name, depth=len(indent) // 2, cumulative_us=int(cumulative))
        for _, cumulative, indent, name in _LINE.findall(text)
    ]


def outermost(imports: Sequence[Imported]) -> list[Imported]:
    """Our imports that are not part of another import of ours."""
    found: list[Imported] = []
    inside: int | None = None  # the depth of the import of ours that we are in
    for each in reversed(imports):
        if inside is not None and each.depth > inside:
            continue
        inside = each.depth if each.is_ours else None
        if each.is_ours:
            found.append(each)
    return found


def _environment(directory: Path) -> dict[str, str]:
    """With byte code kept, as Python does unless told otherwise, but not in anyone's folders."""
    inherited = {k: v for k, v in os.environ.items() if k not in _UNWANTED}
    return {**inherited, "PYTHONPYCACHEPREFIX": str(directory.parent / "bytecode")}


def _told_ms(directory: Path) -> float:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *_PYTEST, *_BY_NAME],
        check=False,
        cwd=directory,
        env=_environment(directory),
        capture_output=True,
        text=True,
    )
    _require_collected(done.returncode, done.stderr)
    imports = outermost(parse_import_times(done.stderr))
    return sum(each.cumulative_us for each in imports) / 1000


def _processor_ms(directory: Path, options: Sequence[str]) -> float:
    # CPU time, user's and system's: wall clock tells more of the other processes of this host.
    process = subprocess.Popen(
        [sys.executable, *_PYTEST, *options],
        cwd=directory,
        env=_environment(directory),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _, status, usage = os.wait4(process.pid, 0)
    except BaseException:
        process.kill()
        process.wait()
        raise
    process.returncode = os.waitstatus_to_exitcode(status)
    _require_collected(process.returncode, "")
    return (usage.ru_utime + usage.ru_stime) * 1000


def _require_collected(returncode: int, stderr: str) -> None:
    if returncode != _NO_TESTS_COLLECTED:
        raise RuntimeError(f"pytest --collect-only ended with {returncode}: {stderr[-2000:]}")
