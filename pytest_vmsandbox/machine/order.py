"""The order to start a machine: what its VMM is told, and how long that may take."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pytest_vmsandbox.guest.channel import Channel
from pytest_vmsandbox.guest.furnishing import Furnishing
from pytest_vmsandbox.guest.messages import Identity
from pytest_vmsandbox.machine.frozen import Frozen
from pytest_vmsandbox.machine.log_tail import read_log_tail
from pytest_vmsandbox.vmm.launch import LaunchRequest, VmmView
from pytest_vmsandbox.vmm.qemu import QemuConfig, render_command

# What QEMU says of its control socket at each start, before it is connected: no evidence.
_ROUTINE = ": info: QEMU waiting for connection on: "
# What a restored guest's kernel gets to tell it from its twins (random(4) wants 32 at least).
_SEED_BYTES = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class PowerOn:
    """How a machine is to be started.

    A boot of it may take `boot_s` seconds, and `stall_s` without a word on the console; a guest
    that is waited for may be silent for `silence_s`. With `frozen` it is restored, not booted; its
    `nonce` is then that of the boot that was frozen. It gets a machine-id and a host name of its
    own, unless it `is_itself`: the very machine that was captured. With the `clock` "frozen" its
    time goes on from the instant at which it was frozen, with "host" it is the host's.
    `plan_furnishing` gives what one that is restored is told together with its identity: its
    addresses; `furnish` tells a guest, whenever it has been met, what of that it has not been told
    yet; `unplug` lets whoever is connected to it know that it has failed, and will not answer.
    """

    id: str
    config: QemuConfig
    view: VmmView
    nonce: str
    log: Path
    boot_s: float
    stall_s: float
    silence_s: float
    plan_furnishing: Callable[[], Furnishing]
    furnish: Callable[[Channel], Coroutine[Any, Any, None]]
    unplug: Callable[[], Coroutine[Any, Any, None]]
    frozen: Frozen | None = None
    is_itself: bool = False
    clock: str = "host"

    @property
    def command(self) -> list[str]:
        """The VMM's argv; the guest is told its nonce, and to stay where it is if it panics."""
        words = (*self.config.command_line, "panic=0", f"vmsandbox.nonce={self.nonce}")
        config = self.config.seen_through(self.view)
        return render_command(replace(config, command_line=words))

    @property
    def request(self) -> LaunchRequest:
        """What a launcher is asked for."""
        config = self.config
        return LaunchRequest(
            id=self.id,
            name=config.name,
            argv=self.command,
            directory=config.directory,
            log=self.log,
            files=config.files,
            memory_mib=config.vmm_memory_mib,
            kvm=config.accel == "kvm",
            written_bytes=config.written_bytes,
        )

    def new_identity(self) -> Identity:
        """What a restored machine shares with no other (docs/templates.md); made anew each time."""
        entropy, now = os.urandom(_SEED_BYTES), self._clock_ns()
        furnishing = self.plan_furnishing()
        if self.is_itself:
            again = f"{self.id}-{secrets.token_hex(8)}"
            return Identity(restore_id=again, unix_ns=now, entropy=entropy, furnishing=furnishing)
        return Identity(
            restore_id=self.id,
            hostname=self.config.name,
            machine_id=secrets.token_hex(16),
            unix_ns=now,
            entropy=entropy,
            furnishing=furnishing,
        )

    def same_identity_now(self) -> Identity:
        """For one that has waited since it was restored: who it is stays, what ages is new."""
        entropy = os.urandom(_SEED_BYTES)
        return Identity(restore_id=self.id, unix_ns=self._clock_ns(), entropy=entropy)

    def _clock_ns(self) -> int:
        """What the guest's clock is stepped to; 0 leaves it as it is."""
        return 0 if self.clock == "frozen" else time.time_ns()

    def read_log_tail(self) -> str:
        """The end of the VMM's log without its routine; empty where there is none."""
        tail = read_log_tail(self.log)
        return "".join(line for line in tail.splitlines(keepends=True) if _ROUTINE not in line)
