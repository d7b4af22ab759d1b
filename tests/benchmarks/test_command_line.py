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


@pytest.mark.machine
def test_restored_machines_are_weighed_frozen_forked_and_asked(
    vm_host: HostFacts, tmp_path: Path
) -> None:
    if vm_host.tier not in ("root", "sudo", "userns", "bare"):
        pytest.skip("the memory of another user's processes can't be looked at")
    figures = tmp_path / "figures"

    done = run_benchmarks(
        *("memory", "freezing", "fork", "layer"),
        *("--rounds", "1", "--json", figures, "--cache-dir", CACHE),
    )

    measured = {each["what"]: each for each in json.loads(figures.read_text())["measurements"]}
    if done.returncode and "VMS-PSS-DENIED" in done.stderr:
        pytest.skip("the memory of this VMM can't be looked at")
    assert done.returncode == 0, done.stderr
    (alone,) = measured["10 restored machines"]["values"]
    (share,) = measured["10 restored machines, of 10 x 128 MiB"]["values"]
    (together,) = measured["10 restored machines and their whole template"]["values"]
    assert share == pytest.approx(100 * alone / 1280)
    assert 10 < alone < together < 10 * 128
    (frozen,) = measured["freezing a machine that has booted"]["values"]
    (kept,) = measured["the same, and kept in the cache"]["values"]
    assert 0 < frozen < kept
    assert measured["vm.fork(4), 256 MiB, idle"]["median"] > 0
    assert measured["a service's first answer"]["ratio"] > 0


def test_one_that_fails_does_not_keep_the_others_from_being_shown(tmp_path: Path) -> None:
    program = (
        "import sys; import benchmarks.__main__ as command;"
        "command.BENCHMARKS['probes'] = lambda setting: 1 / 0;"
        "sys.exit(command.main())"
    )
    options = ["probes", "import", "--rounds", "1", "--cache-dir", tmp_path]

    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, options)],
        check=False,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )

    assert done.returncode == 1
    assert "probes failed:" in done.stderr
    assert "ZeroDivisionError" in done.stderr
    assert "import: imports of the plugin" in done.stdout


@pytest.mark.parametrize("arguments", [["nonsense"], ["import", "--rounds", "0"]])
def test_what_can_not_be_measured_is_refused_before_anything_is(arguments: list[str]) -> None:
    done = run_benchmarks(*arguments)

    assert done.returncode == 2
    assert "usage: python -m benchmarks" in done.stderr
    assert done.stdout == ""
