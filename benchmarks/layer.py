"""A service that a template's setup has started: its first answer, beside `true` in a bare one."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any, Final

from benchmarks.measurement import Measurement, Unit, alternate, quotients
from benchmarks.ours import open_machine, open_worker
from benchmarks.setting import Setting
from pytest_vmsandbox.machine.machine import Machine
from pytest_vmsandbox.machine.spec import MachineSpec
from pytest_vmsandbox.machine.templates.builder import TemplateBuilder

# Machines of each kind in a round; their median is the round's value.
LIVES: Final = 5

ANSWER: Final = "it works\n"

_BENCHMARK: Final = "layer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Life:
    """Milliseconds from asking for a machine to its answer, and of the command alone."""

    whole_ms: float
    command_ms: float


def measure_layer(setting: Setting) -> Sequence[Measurement]:
    """The httpd of busybox, started in `setup` and asked by wget in the guest, beside `true`."""
    lives: dict[str, list[Life]] = {"service": [], "bare": []}
    with open_worker(setting.cache_dir) as worker:
        builder = TemplateBuilder(worker, MachineSpec(), on_machine=lambda _: lambda: None)
        web = builder.build(setup=start_server, name="benchmark of a service")
        sides: dict[str, tuple[Callable[[Machine], object], dict[str, Any]]] = {
            "service": (_ask, {"template": web}),
            "bare": (_run_true, {}),
        }

        def live(side: str) -> float:
            act, wishes = sides[side]
            for _ in range(LIVES):
                started = time.perf_counter()
                with open_machine(worker, **wishes) as machine:
                    handed_over = time.perf_counter()
                    act(machine)
                    ended = time.perf_counter()
                whole, command = ended - started, ended - handed_over
                lives[side].append(Life(whole_ms=whole * 1000, command_ms=command * 1000))
            return median(each.whole_ms for each in lives[side][-LIVES:])

        for side in sides:
            live(side)  # the templates are made, the worker's warden has started
        for seen in lives.values():
            seen.clear()
        milliseconds = alternate(
            {side: partial(live, side) for side in sides}, rounds=setting.rounds
        )
    how = f"median of {LIVES} a round"
    return [
        Measurement(
            benchmark=_BENCHMARK,
            what="a service's first answer",
            unit=Unit.MILLISECONDS,
            values=milliseconds["service"],
            how=f"from asking for the machine to what wget got of httpd, both in the guest; {how}",
            peer="a bare machine's first command, run(['true'])",
            peer_values=milliseconds["bare"],
        ),
        quotients(
            benchmark=_BENCHMARK,
            what="service / bare",
            ours=milliseconds["service"],
            theirs=milliseconds["bare"],
            how="wanted: at most 1.5",
        ),
        Measurement(
            benchmark=_BENCHMARK,
            what="of it the command alone",
            unit=Unit.MILLISECONDS,
            values=tuple(each.command_ms for each in lives["service"]),
            how="from the machine being handed over: wget, httpd and the network, all of them cold",
            peer="run(['true']) alone",
            peer_values=tuple(each.command_ms for each in lives["bare"]),
        ),
    ]


def start_server(vm: Machine) -> None:
    """The setup."""
    vm.write_text("/srv/index.html", ANSWER)
    vm.popen(["httpd", "-f", "-p", "80", "-h", "/srv"])
    vm.wait_for_port(80)


def _ask(vm: Machine) -> None:
    if (answer := vm.run(["wget", "-qO-", "http://127.0.0.1/"])).stdout != ANSWER:
        raise RuntimeError(f"the service does not answer: {answer}")


def _run_true(vm: Machine) -> None:
    vm.run(["true"], check=True)
