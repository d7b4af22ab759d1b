"""`python -m benchmarks` works; what it measures is for people to judge."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

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


@pytest.mark.parametrize("arguments", [["nonsense"], ["import", "--rounds", "0"]])
def test_what_can_not_be_measured_is_refused_before_anything_is(arguments: list[str]) -> None:
    done = run_benchmarks(*arguments)

    assert done.returncode == 2
    assert "usage: python -m benchmarks" in done.stderr
    assert done.stdout == ""
