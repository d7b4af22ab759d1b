"""Networks: between two guests, and from the test to a guest, beside plain QEMU by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Final

from benchmarks.bare_qemu import bare_command, machine_config
from benchmarks.by_hand_image import prepare_by_hand_image
from benchmarks.iperf_client import PORT, round_trips_ms, send_mbit_per_s
from benchmarks.iperf_programs import IperfPrograms, iperf, prepare_iperf_programs
from benchmarks.measurement import Act, Measurement, Unit, alternate
from benchmarks.network_by_hand import PlainMachine, open_by_hand_network
from benchmarks.network_sides import (
    ECHO,
    MEMORY_MIB,
    PORTS,
    Dial,
    Pair,
    Sides,
    open_alone,
    open_ours,
    plain_sides,
)
from benchmarks.network_start import measure_start
from benchmarks.ours import accel_of, open_worker, prepared_image
from benchmarks.setting import Setting
from pytest_vmsandbox.errors import HostUnfit
from pytest_vmsandbox.image.image import Image
from pytest_vmsandbox.machine.worker import Worker
from pytest_vmsandbox.network.wire_kind import WireKind

# What each transfer takes, and how many round trips make one value.
SECONDS: Final = 2
TRIPS: Final = 200

_BENCHMARK: Final = "network"
_PING_AVERAGE: Final = re.compile(r"min/avg/max = [\d.]+/([\d.]+)/")

_TAPS: Final = "plain QEMU, taps on a bridge"
_BRIDGE: Final = f"{_TAPS}, from there"
_HOSTFWD: Final = "plain QEMU, user-mode networking, hostfwd"

Values = Mapping[str, tuple[float, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One of our sides, and the plain one beside it."""

    what: str
    ours: str
    theirs: str
    peer: str


_PAIRS: Final = tuple(
    Comparison(what=f"guest to guest, {kind}", ours=kind, theirs="plain", peer=_TAPS)
    for kind in WireKind
)
_WAYS: Final = (
    *(
        Comparison(
            what=f"test to guest, vm.{verb}, {kind}",
            ours=f"{verb} {kind}",
            theirs=theirs,
            peer=peer,
        )
        for kind in WireKind
        for verb, theirs, peer in (
            ("connect", "bridge", _BRIDGE),
            ("forward", "bridge", _BRIDGE),
            ("forward", "hostfwd", _HOSTFWD),
        )
    ),
    Comparison(
        what="test to guest, vm.forward without a network",
        ours="agent",
        theirs="hostfwd",
        peer=_HOSTFWD,
    ),
)


def measure_network(setting: Setting) -> Sequence[Measurement]:
    """Throughput and latency of machines that run, and what a network adds to a start."""
    with ExitStack() as held:
        worker = held.enter_context(open_worker(setting.cache_dir, wires=WireKind.SOCKET))
        image, accel = prepared_image(worker), accel_of(worker)
        programs = prepare_iperf_programs(image, setting)
        workers = {WireKind.SOCKET: worker}
        sides = held.enter_context(open_ours(worker, programs, WireKind.SOCKET))
        sides |= held.enter_context(open_alone(worker, programs))
        try:
            tapped = held.enter_context(open_worker(setting.cache_dir, wires=WireKind.TAP))
            sides |= held.enter_context(open_ours(tapped, programs, WireKind.TAP))
            workers[WireKind.TAP] = tapped
        except HostUnfit as unfit:
            setting.say(f"without taps of ours: {unfit}")
        try:
            plain = _plain_machine(worker, image, programs, setting, held, accel=accel)
            sides |= plain_sides(held.enter_context(open_by_hand_network(plain, forwarded=PORTS)))
        except OSError as error:
            setting.say(f"nothing to compare with, since no tap can be had here: {error}")
        setting.say(f"transfers of {SECONDS} s each, and round trips")
        return [
            *_rates(sides, setting, accel),
            *_latencies(sides, setting, accel),
            *measure_start(workers, setting, accel=accel),
        ]


def _plain_machine(
    worker: Worker,
    image: Image,
    programs: IperfPrograms,
    setting: Setting,
    held: ExitStack,
    *,
    accel: str,
) -> PlainMachine:
    """With the processor that a machine of ours has."""
    scratch = held.enter_context(setting.scratch())
    config = machine_config(worker, image, Path("/"), accel=accel)
    ours = bare_command(config)
    by_hand = prepare_by_hand_image(image, setting)
    return PlainMachine(
        image=programs.added_to(by_hand, scratch / "initramfs"),
        accel=ours[ours.index("-accel") + 1],
        cpu=ours[ours.index("-cpu") + 1],
        memory_mib=MEMORY_MIB,
    )


def _rates(sides: Sides, setting: Setting, accel: str) -> Iterator[Measurement]:
    how = f"iperf3, {SECONDS} s"
    between = _seen(
        {name: partial(_pair_mbit, pair) for name, pair in sides.pairs.items()}, setting
    )
    ways = _seen({name: partial(_way_mbit, dial) for name, dial in sides.ways.items()}, setting)
    unit = Unit.MEGABITS_PER_SECOND
    yield from _compared("throughput", _PAIRS, between, unit, f"{how}; {accel}")
    how = f"{how}, its client in the test's Python; {accel}"
    yield from _compared("throughput", _WAYS, ways, unit, how)


def _latencies(sides: Sides, setting: Setting, accel: str) -> Iterator[Measurement]:
    between = _seen({name: partial(_ping_ms, pair) for name, pair in sides.pairs.items()}, setting)
    ways = _seen({name: partial(_trip_ms, dial) for name, dial in sides.ways.items()}, setting)
    unit = Unit.MILLISECONDS
    how = f"the average of {TRIPS} pings there and back; {accel}"
    yield from _compared("latency", _PAIRS, between, unit, how)
    how = f"the median of {TRIPS} bytes there and back, by TCP to an echo; {accel}"
    yield from _compared("latency", _WAYS, ways, unit, how)


def _seen(acts: Mapping[str, Act], setting: Setting) -> Values:
    """Each one's values, after a first time that is not counted."""
    for act in acts.values():
        act()
    return alternate(acts, rounds=setting.rounds)


def _compared(
    quantity: str, comparisons: Sequence[Comparison], seen: Values, unit: Unit, how: str
) -> Iterator[Measurement]:
    for each in comparisons:
        if each.ours not in seen:
            continue
        theirs = seen.get(each.theirs, ())
        yield Measurement(
            benchmark=_BENCHMARK,
            what=f"{quantity}, {each.what}",
            unit=unit,
            values=seen[each.ours],
            how=how,
            peer=each.peer if theirs else "",
            peer_values=theirs,
        )


def _pair_mbit(pair: Pair) -> float:
    command = iperf("-c", pair.server, "-t", str(SECONDS), "-J")
    told = json.loads(pair.client(" ".join(command)))
    return float(told["end"]["sum_received"]["bits_per_second"]) * 1e-6


def _ping_ms(pair: Pair) -> float:
    told = pair.client(f"busybox ping -q -A -c {TRIPS} {pair.server}")
    if (found := _PING_AVERAGE.search(told)) is None:
        raise RuntimeError(f"ping says: {told}")
    return float(found[1])


def _way_mbit(dial: Dial) -> float:
    return send_mbit_per_s(partial(dial, PORT), seconds=SECONDS)


def _trip_ms(dial: Dial) -> float:
    with dial(ECHO) as sock:
        return median(round_trips_ms(sock, times=TRIPS))
