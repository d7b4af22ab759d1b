"""A fresh machine for each test: restored, beside one booted by hand, and beside the floor."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Final

from benchmarks.bare_qemu import MEMORY_MIB, Floor, machine_config
from benchmarks.by_hand import open_by_hand
from benchmarks.by_hand_image import ByHandImage, prepare_by_hand_image
from benchmarks.measurement import Measurement, Unit, alternate, quotients
from benchmarks.ours import accel_of, open_machine, open_worker, prepared_image
from benchmarks.session import run_session
from benchmarks.setting import Setting
from pytest_vmsandbox.image.image import Image
from pytest_vmsandbox.machine.timings import Timings
from pytest_vmsandbox.machine.worker import Worker
from pytest_vmsandbox.vmm.qemu import MachineType

# Quick things are done so often in a round; their median is the round's value.
LIVES: Final = 5

# Tests of one pytest session; a machine booted by hand takes seconds.
TESTS: Final = 12
TESTS_BY_HAND: Final = 2

_BENCHMARK: Final = "restored"
_A_TEST: Final = "fixture, run(['true']), teardown"
_PEER: Final = "a fixture that boots QEMU and qemu-guest-agent, by hand"

_OURS: Final = """\
import pytest

@pytest.mark.parametrize("number", range({tests}))
def test_it(vm, number):
    vm.run(["true"], check=True)
"""

_BY_HAND: Final = """\
from pathlib import Path

import pytest
from benchmarks.by_hand import open_by_hand
from benchmarks.by_hand_image import ByHandImage

IMAGE = ByHandImage(kernel=Path({kernel!r}), initramfs=Path({initramfs!r}))

@pytest.fixture
def agent():
    with open_by_hand(IMAGE, accel={accel!r}) as agent:
        yield agent

@pytest.mark.parametrize("number", range({tests}))
def test_it(agent, number):
    assert agent.run(["true"]).returncode == 0
"""


def measure_restored(setting: Setting) -> Sequence[Measurement]:
    """The code of the fixtures by itself; and tests in real pytest sessions."""
    with open_worker(setting.cache_dir) as worker:
        image, accel = prepared_image(worker), accel_of(worker)
        by_hand = prepare_by_hand_image(image, setting)
        with open_machine(worker):
            pass  # the template is made, the worker's warden has started
        return [
            *_measure_fixtures(worker, image, by_hand, setting, accel=accel),
            *_measure_sessions(by_hand, setting, accel=accel),
        ]


def _measure_fixtures(
    worker: Worker, image: Image, by_hand: ByHandImage, setting: Setting, *, accel: str
) -> Iterator[Measurement]:
    directory = worker.directory.machine_directory("bench")

    def floor(machine_type: MachineType) -> Floor:
        config = machine_config(worker, image, directory, accel=accel, machine_type=machine_type)
        return Floor.of(config)

    q35, microvm = floor(MachineType.Q35), floor(MachineType.MICROVM)
    seen: list[Timings] = []
    milliseconds = alternate(
        {
            "ours": lambda: _median(lambda: _life_ms(worker, seen)),
            "by hand": lambda: _by_hand_ms(by_hand, accel=accel),
            "q35": lambda: _median(q35.to_greeting_ms),
            "built": lambda: _median(q35.to_answer_ms),
            "microvm": lambda: _median(microvm.to_greeting_ms),
        },
        rounds=setting.rounds,
    )
    yield Measurement(
        benchmark=_BENCHMARK,
        what=_A_TEST,
        unit=Unit.MILLISECONDS,
        values=milliseconds["ours"],
        how=f"the fixture's code in a warm worker, no pool; {accel}, {MEMORY_MIB} MiB, q35; "
        f"median of {LIVES} a round; wanted: by hand at least 20 times as long",
        peer=_PEER,
        peer_values=milliseconds["by hand"],
    )
    yield quotients(
        benchmark=_BENCHMARK,
        what="restored / floor",
        ours=milliseconds["ours"],
        theirs=milliseconds["q35"],
        how="the floor is q35's, below; wanted: at most 4.5",
    )
    floors = {
        "q35": "q35 as a machine has it, started to its QMP greeting, and ended",
        "built": "the same to its first QMP answer: it greets before its machine is built",
        "microvm": "microvm, to its greeting, and ended",
    }
    for side, how in floors.items():
        yield Measurement(
            benchmark=_BENCHMARK,
            what=f"the floor, {side}",
            unit=Unit.MILLISECONDS,
            values=milliseconds[side],
            how=f"QEMU {how}; subprocess.Popen, median of {LIVES} a round",
        )
    yield from _phases(seen)


def _phases(seen: Sequence[Timings]) -> Iterator[Measurement]:
    """Where a restored machine's time goes, by its own timings."""
    seconds: dict[str, list[float | None]] = {
        "spawn": [each.spawn_s for each in seen],
        "load": [each.load_s for each in seen],
        "restore (load and ready)": [each.restore_s for each in seen],
        "first command": [each.first_command_s for each in seen],
        "teardown": [each.teardown_s for each in seen],
    }
    for phase, values in seconds.items():
        if taken := tuple(value * 1000 for value in values if value is not None):
            yield Measurement(
                benchmark=_BENCHMARK,
                what=f"of it {phase}",
                unit=Unit.MILLISECONDS,
                values=taken,
                how="vm.timings of the same machines",
            )


def _measure_sessions(
    by_hand: ByHandImage, setting: Setting, *, accel: str
) -> Iterator[Measurement]:
    with setting.scratch() as scratch:
        sources = {
            "ours": _OURS.format(tests=TESTS),
            "by hand": _BY_HAND.format(
                kernel=str(by_hand.kernel),
                initramfs=str(by_hand.initramfs),
                accel=str(accel),
                tests=TESTS_BY_HAND,
            ),
        }
        options = {
            "ours": (f"--vm-cache-dir={setting.cache_dir}", "--vm-pool=off", "-p", "no:xdist"),
            "by hand": ("-p", "no:vmsandbox", "-p", "no:xdist"),
        }

        def test_ms(side: str) -> float:
            directory = scratch / side.replace(" ", "-")
            directory.mkdir(exist_ok=True)
            session = run_session(directory, sources[side], *options[side])
            return median(session.test_seconds()) * 1000

        milliseconds = alternate(
            {"ours": lambda: test_ms("ours"), "by hand": lambda: test_ms("by hand")},
            rounds=setting.rounds,
        )
    yield Measurement(
        benchmark=_BENCHMARK,
        what="a test in a pytest session",
        unit=Unit.MILLISECONDS,
        values=milliseconds["ours"],
        how=f"setup, call and teardown by pytest's own clock, no pool; the median of {TESTS} "
        f"tests of a session of its own, by hand of {TESTS_BY_HAND}",
        peer=_PEER,
        peer_values=milliseconds["by hand"],
    )


def _life_ms(worker: Worker, seen: list[Timings]) -> float:
    started = time.perf_counter()
    with open_machine(worker, memory_mib=MEMORY_MIB) as machine:
        machine.run(["true"], check=True)
    ended = time.perf_counter()
    seen.append(machine.timings)
    return (ended - started) * 1000


def _by_hand_ms(image: ByHandImage, *, accel: str) -> float:
    started = time.perf_counter()
    with open_by_hand(image, accel=accel) as agent:
        status = agent.run(["true"]).returncode
    if status != 0:
        raise RuntimeError(f"true ended with {status}")
    return (time.perf_counter() - started) * 1000


def _median(act: Callable[[], float]) -> float:
    return median(act() for _ in range(LIVES))
