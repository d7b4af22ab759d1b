"""A command in a machine that is warm."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median

from benchmarks.by_hand import POLL_S, open_by_hand
from benchmarks.by_hand_image import prepare_by_hand_image
from benchmarks.measurement import Measurement, Unit, alternate
from benchmarks.ours import accel_of, open_machine, open_worker, prepared_image
from benchmarks.setting import Setting

CALLS = 200
BY_HAND_CALLS = 100

# Of so many calls at once nothing is counted: caches fill, translated code is made.
WARM_UP_CALLS = 20

_PEER = "guest-exec, by hand"


def measure_command(setting: Setting) -> Sequence[Measurement]:
    """`vm.run(["true"])` beside guest-exec and polling, both machines running all the time."""
    with open_worker(setting.cache_dir) as worker:
        image = prepared_image(worker)
        by_hand = prepare_by_hand_image(image, setting)
        accel = accel_of(worker)
        with open_machine(worker) as machine, open_by_hand(by_hand, accel=accel) as agent:
            milliseconds = alternate(
                {
                    "ours": lambda: _median_ms(lambda: machine.run(["true"]), CALLS),
                    "polling": lambda: _median_ms(lambda: agent.run(["true"]), BY_HAND_CALLS),
                    "restless": lambda: _median_ms(
                        lambda: agent.run(["true"], poll_s=0), BY_HAND_CALLS
                    ),
                },
                rounds=setting.rounds,
            )
    how = f"median of {CALLS} calls a round, warm; {accel}; "
    peers = {"polling": f"polled every {POLL_S * 1000:.0f} ms", "restless": "polled without pause"}
    return [
        Measurement(
            benchmark="command",
            what="vm.run(['true'])",
            unit=Unit.MILLISECONDS,
            values=milliseconds["ours"],
            how=how + f"by hand {BY_HAND_CALLS} calls",
            peer=f"{_PEER}, {polled}",
            peer_values=milliseconds[side],
        )
        for side, polled in peers.items()
    ]


def _median_ms(call: Callable[[], object], calls: int) -> float:
    for _ in range(WARM_UP_CALLS):
        call()
    seconds = []
    for _ in range(calls):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return median(seconds) * 1000
