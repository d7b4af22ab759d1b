"""The walls: what they cost a worker once, and each of its machines."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Final

from benchmarks.bare_qemu import LISTENS_S, machine_config, open_bare, qemu_of, require_greeting
from benchmarks.measurement import Measurement, Unit, alternate
from benchmarks.ours import accel_of, open_machine, open_worker, prepared_image
from benchmarks.setting import Setting
from pytest_vmsandbox.deadline import Deadline
from pytest_vmsandbox.errors import HostUnfit
from pytest_vmsandbox.host.facts import HostFacts, Tier
from pytest_vmsandbox.host.tier import require_tier, require_walls
from pytest_vmsandbox.image.image import Image
from pytest_vmsandbox.machine.warden_launcher import WardenLauncher
from pytest_vmsandbox.machine.wardens import Wardens
from pytest_vmsandbox.machine.worker import Worker
from pytest_vmsandbox.vmm.bare import BareLauncher
from pytest_vmsandbox.vmm.launch import Handed, LaunchRequest
from pytest_vmsandbox.vmm.qemu import render_command, socket_name
from pytest_vmsandbox.warden.client import Warden

# A launch takes some tens of milliseconds: so many pairs of them make one round.
PAIRS: Final = 4

MEMORY_MIB: Final = 128

_BENCHMARK: Final = "walls"
_QMP: Final = socket_name("qmp")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rival:
    """A command line that is started behind walls and without: each side's paths are its own."""

    what: str
    walled: LaunchRequest
    bare: Sequence[str]
    bare_socket: Path


def measure_walls(setting: Setting) -> Sequence[Measurement]:
    """A warden's start in each tier; a VMM and a machine behind the best walls, and bare."""
    with open_worker(setting.cache_dir) as worker:
        tier = require_walls("auto", worker.facts)
        image, accel = prepared_image(worker), accel_of(worker)
        return [
            *_measure_wardens(worker, setting),
            *_measure_launches(worker, image, tier, setting, accel=accel),
            *_measure_machines(worker, tier, setting, accel=accel),
        ]


# A warden


def _measure_wardens(worker: Worker, setting: Setting) -> list[Measurement]:
    tiers = _walled_tiers(worker.facts)
    milliseconds = alternate(
        {tier: partial(_start_ms, worker, tier) for tier in tiers}, rounds=setting.rounds
    )
    return [
        Measurement(
            benchmark=_BENCHMARK,
            what=f"start of a warden, tier {tier}",
            unit=Unit.MILLISECONDS,
            values=milliseconds[tier],
            how="a fresh Python, its namespaces, its greeting; once for each worker",
        )
        for tier in tiers
    ]


def _walled_tiers(facts: HostFacts) -> list[Tier]:
    """The tiers with walls that the user who runs this can have here."""
    found = []
    for tier in Tier:
        with suppress(HostUnfit):
            found.append(require_walls(require_tier(tier, facts), facts))
    return found


def _start_ms(worker: Worker, tier: Tier) -> float:
    started = time.perf_counter()
    with _open_warden(worker, tier):
        return (time.perf_counter() - started) * 1000


@contextmanager
def _open_warden(worker: Worker, tier: Tier) -> Iterator[Warden]:
    wardens = Wardens()
    try:
        yield worker.engine.run(wardens.warden(tier, directory=worker.directory))
    finally:
        worker.engine.run(wardens.close())


# A VMM


def _measure_launches(
    worker: Worker, image: Image, tier: Tier, setting: Setting, *, accel: str
) -> list[Measurement]:
    measured: list[Measurement] = []
    directory = worker.directory.machine_directory("bench")
    with _open_warden(worker, tier) as warden:
        launcher = WardenLauncher.through(warden)
        for rival in (
            _empty_machine(worker, directory),
            _whole_machine(worker, image, launcher, directory, accel=accel),
        ):
            milliseconds = alternate(
                {
                    "walled": partial(_walled_ms, worker, launcher, rival),
                    "bare": partial(_bare_ms, rival),
                },
                rounds=setting.rounds * PAIRS,
            )
            measured += _compare(
                f"launch of {rival.what}",
                unit=Unit.MILLISECONDS,
                ours=milliseconds["walled"],
                theirs=milliseconds["bare"],
                how=f"from the request to the QMP greeting; tier {tier}",
                peer="subprocess.Popen, the same command line",
            )
    return measured


def _empty_machine(worker: Worker, directory: Path) -> Rival:
    """The least that QEMU can be: no board, and a QMP socket."""

    def command(seen_in: Path) -> list[str]:
        qmp = f"socket,id=qmp,path={seen_in / _QMP},server=on,wait=off"
        board = ("-machine", "none", "-nodefaults", "-no-user-config", "-display", "none")
        return [qemu_of(worker), *board, "-chardev", qmp, "-mon", "chardev=qmp,mode=control"]

    return Rival(
        what="QEMU -M none",
        walled=_request(command(Path("/machine")), directory),
        bare=command(directory),
        bare_socket=directory / _QMP,
    )


def _whole_machine(
    worker: Worker, image: Image, launcher: WardenLauncher, directory: Path, *, accel: str
) -> Rival:
    """What a machine of the plugin's is, paused before its first instruction."""
    config = machine_config(worker, image, directory, accel=accel)
    view = launcher.view(directory=directory, files=config.files)
    bare = BareLauncher().view(directory=directory, files=config.files)
    walled = render_command(config.seen_through(view))
    return Rival(
        what="QEMU q35 with kernel and initramfs",
        walled=_request(walled, directory, files=config.files, memory_mib=config.vmm_memory_mib),
        bare=render_command(config.seen_through(bare)),
        bare_socket=directory / _QMP,
    )


def _request(
    argv: Sequence[str],
    directory: Path,
    *,
    files: Sequence[Handed] = (),
    memory_mib: int | None = None,
) -> LaunchRequest:
    return LaunchRequest(
        id=f"bench-{directory.parent.name}"[:32],
        argv=argv,
        directory=directory,
        log=directory / "vmm.log",
        files=files,
        memory_mib=memory_mib,
    )


def _walled_ms(worker: Worker, launcher: WardenLauncher, rival: Rival) -> float:
    return worker.engine.run(_walled(launcher, rival))


async def _walled(launcher: WardenLauncher, rival: Rival) -> float:
    started = time.perf_counter()
    deadline = Deadline.after(seconds=LISTENS_S)
    async with launcher.launch(rival.walled) as process:
        with await process.connect(_QMP, deadline=deadline) as sock:
            require_greeting(await asyncio.get_running_loop().sock_recv(sock, 4096))
            return (time.perf_counter() - started) * 1000


def _bare_ms(rival: Rival) -> float:
    with open_bare(rival.bare, rival.bare_socket) as bare:
        return bare.greeted_ms


# A machine


def _measure_machines(
    worker: Worker, tier: Tier, setting: Setting, *, accel: str
) -> list[Measurement]:
    teardowns: dict[Tier, list[float]] = {tier: [], Tier.BARE: []}

    def live(wanted: Tier) -> float:
        booted_s, ended_ms = _live(worker, wanted)
        teardowns[wanted].append(ended_ms)
        return booted_s

    with open_machine(worker, tier=tier, lifecycle="booted"):
        pass  # the worker's warden has started
    seconds = alternate(
        {"walled": partial(live, tier), "bare": partial(live, Tier.BARE)}, rounds=setting.rounds
    )
    how = f"a machine that a warm worker makes; tier {tier}, {accel}, {MEMORY_MIB} MiB, q35"
    return [
        *_compare(
            "boot to first answer",
            unit=Unit.SECONDS,
            ours=seconds["walled"],
            theirs=seconds["bare"],
            how=how,
            peer="tier bare",
        ),
        *_compare(
            "teardown",
            unit=Unit.MILLISECONDS,
            ours=teardowns[tier],
            theirs=teardowns[Tier.BARE],
            how=how,
            peer="tier bare",
        ),
    ]


def _live(worker: Worker, tier: Tier) -> tuple[float, float]:
    """A whole life: seconds to the first answer, milliseconds of the end."""
    started = time.perf_counter()
    with open_machine(worker, tier=tier, memory_mib=MEMORY_MIB, lifecycle="booted") as machine:
        machine.run(["true"], check=True)
        booted_s = time.perf_counter() - started
        started = time.perf_counter()
    return booted_s, (time.perf_counter() - started) * 1000


# Both


def _compare(
    what: str,
    *,
    unit: Unit,
    ours: Sequence[float],
    theirs: Sequence[float],
    how: str,
    peer: str,
) -> Iterator[Measurement]:
    """Both sides, and of each pair how many times as long it takes with walls, and how much."""
    pairs = tuple(zip(ours, theirs, strict=True))
    yield Measurement(
        benchmark=_BENCHMARK,
        what=what,
        unit=unit,
        values=tuple(ours),
        how=how,
        peer=peer,
        peer_values=tuple(theirs),
    )
    yield Measurement(
        benchmark=_BENCHMARK,
        what=f"walls / bare ({what})",
        unit=Unit.TIMES,
        values=tuple(our / their for our, their in pairs),
        how=f"quotients of pairs; of the medians: {median(ours) / median(theirs):.3g}",
    )
    yield Measurement(
        benchmark=_BENCHMARK,
        what=f"what the walls add to it ({what})",
        unit=unit,
        values=tuple(our - their for our, their in pairs),
        how=f"differences of pairs; of the medians: {median(ours) - median(theirs):.3g} {unit}",
    )
