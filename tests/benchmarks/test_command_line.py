"""`python -m benchmarks` works; what it measures is for people to judge."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from platformdirs import user_cache_path

from pytest_vmsandbox import HostFacts

ROOT = Path(__file__).parents[2]
CACHE = os.environ.get("VMSANDBOX_CACHE_DIR") or user_cache_path("vmsandbox")

if not (ROOT / "benchmarks" / "__main__.py").is_file():
    pytest.skip("the benchmarks are not beside these tests", allow_module_level=True)


def run_benchmarks(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *map(str, arguments)],
        check=False,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def test_one_benchmark_alone_prints_a_table_and_writes_every_value(tmp_path: Path) -> None:
    done = run_benchmarks(
        "import", "--rounds", "1", "--json", tmp_path / "figures", "--cache-dir", tmp_path / "cache"
    )

    assert done.returncode == 0, done.stderr
    assert "import: imports of the plugin" in done.stdout
    document = json.loads((tmp_path / "figures").read_text())
    told, added, whole = document["measurements"]
    assert told["values"] == [told["median"]]
    assert told["median"] > 0
    assert added["unit"] == "ms"
    assert whole["ratio"] > 0
    assert len(whole["values"]) == len(whole["peer_values"]) == len(added["values"])
    assert document["host"]["processors"] > 0


@pytest.mark.machine
def test_the_walls_are_measured_beside_none_where_there_are_any(
    vm_host: HostFacts, tmp_path: Path
) -> None:
    figures = tmp_path / "figures"

    done = run_benchmarks("walls", "--rounds", "1", "--json", figures, "--cache-dir", CACHE)

    measured = json.loads(figures.read_text())["measurements"]
    if vm_host.tier == "bare":
        assert (done.returncode, measured) == (1, [])
        assert "walls can't be measured here: VMS-" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    named = {each["what"]: each for each in measured}
    assert named[f"start of a warden, tier {vm_host.tier}"]["values"]
    for what in ("launch of QEMU -M none", "boot to first answer", "teardown"):
        both, added = named[what], named[f"what the walls add to it ({what})"]
        pairs = list(zip(both["values"], both["peer_values"], strict=True))
        assert added["values"] == [ours - theirs for ours, theirs in pairs]
        assert named[f"walls / bare ({what})"]["values"] == [
            ours / theirs for ours, theirs in pairs
        ]


@pytest.mark.parametrize("arguments", [["nonsense"], ["import", "--rounds", "0"]])
def test_what_can_not_be_measured_is_refused_before_anything_is(arguments: list[str]) -> None:
    done = run_benchmarks(*arguments)

    assert done.returncode == 2
    assert "usage: python -m benchmarks" in done.stderr
    assert done.stdout == ""
