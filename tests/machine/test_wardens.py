"""What becomes of machines when a warden dies, and of what is in their directories."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from platformdirs import user_cache_path

from pytest_vmsandbox.errors import BootFailed, VmmDied
from pytest_vmsandbox.host.facts import Tier
from pytest_vmsandbox.host.tier import require_tier
from pytest_vmsandbox.lease.ledger import read_ledger
from pytest_vmsandbox.machine.spec import MachineSpec
from pytest_vmsandbox.machine.worker import Worker
from tests.precious import checksum, make_precious
from tests.signals import send_signal

TIER = os.environ.get("VMSANDBOX_TIER", "auto")


@pytest.fixture
def walled(worker: Worker) -> Worker:
    """A worker whose machines run behind walls."""
    if require_tier(TIER, worker.facts) is Tier.BARE:
        pytest.skip("the tier bare has no walls")
    return worker


async def _kill_warden(worker: Worker) -> None:
    warden = await worker._warden(require_tier(TIER, worker.facts))
    send_signal(warden.pid, signal.SIGKILL)
    while not warden.over:
        await asyncio.sleep(0.01)


def test_the_next_machine_gets_another_warden_and_the_summary_says_so(walled: Worker) -> None:
    spec = MachineSpec(tier=TIER)
    (first,) = walled.engine.run(walled.make([spec]))
    walled.engine.run(walled.boot([first]))
    groups = [
        Path(path)
        for entry in read_ledger(walled.directory.path / "ledger").entries.values()
        if (path := getattr(entry, "path", None))
    ]
    walled.engine.run(_kill_warden(walled))
    with pytest.raises(VmmDied):
        walled.engine.run(first.run("true"))
    (second,) = walled.engine.run(walled.make([spec]))
    walled.engine.run(walled.boot([second]))

    assert walled.engine.run(second.run("echo alive")).stdout == "alive\n"
    (incident,) = walled.incidents
    assert incident.startswith(f"the warden of tier {second.facts.tier} died and was replaced")
    walled.engine.run(walled.end([first, second]))
    walled.close()
    assert not any(group.exists() for group in groups)


def test_a_machine_whose_warden_died_can_be_powered_on_again(walled: Worker) -> None:
    (machine,) = walled.engine.run(walled.make([MachineSpec(tier=TIER)]))
    walled.engine.run(walled.boot([machine]))
    walled.engine.run(_kill_warden(walled))
    walled.engine.run(machine.power_cut())
    walled.engine.run(machine.power_on())

    assert walled.engine.run(machine.run("echo again")).stdout == "again\n"
    walled.engine.run(walled.end([machine]))


def test_what_went_wrong_by_chance_is_a_failure_and_no_unfit_host(
    walled: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    (machine,) = walled.engine.run(walled.make([MachineSpec(tier=TIER)]))
    warden = walled.engine.run(walled._warden(require_tier(TIER, walled.facts)))

    async def no_memory(*_: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(warden, "ask", no_memory)
    with pytest.raises(BootFailed, match=r"could not be started.*Cannot allocate memory"):
        walled.engine.run(walled.boot([machine]))
    monkeypatch.undo()
    walled.engine.run(walled.end([machine]))


MOUNTED_IN_ITS_DIRECTORY = """
import subprocess, sys
from contextlib import closing
from pathlib import Path
from pytest_vmsandbox.machine.spec import MachineSpec
from pytest_vmsandbox.machine.worker import Worker, WorkerSettings

precious, base, cache = map(Path, sys.argv[1:])
with closing(Worker(WorkerSettings(cache_dir=cache, run_dir=base))) as worker:
    (machine,) = worker.engine.run(worker.make([MachineSpec()]))
    target = machine.build.config.directory / "x"
    target.mkdir()
    subprocess.run(["mount", "--bind", precious, target], check=True)
    worker.engine.run(worker.end([machine]))
print(*base.iterdir())
"""


@pytest.mark.skipif(os.getuid() != 0, reason="takes root: it mounts")
def test_what_is_mounted_in_a_machine_s_directory_is_spared(scratch: Path) -> None:
    precious = scratch / "precious"
    before = make_precious(precious)
    done = subprocess.run(
        [
            *("unshare", "--mount", "--propagation", "private", "--"),
            *(sys.executable, "-c", MOUNTED_IN_ITS_DIRECTORY),
            *(precious, scratch / "run", _cache()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    assert (done.returncode, done.stderr, done.stdout) == (0, "", "\n")
    assert checksum(precious) == before


def _cache() -> Path:
    named = os.environ.get("VMSANDBOX_CACHE_DIR")
    return Path(named) if named else user_cache_path("vmsandbox")
