"""What a machine is to be like, as a test asked for it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from pytest_vmsandbox.errors import RequestInvalid
from pytest_vmsandbox.machine.disk import Disk, require_disks
from pytest_vmsandbox.machine.templates.layer import Template
from pytest_vmsandbox.network.topology import parse_networks

# The least that the default image's kernel boots in, tried.
MEMORY_MIB = range(80, 1024 * 1024)
CPUS = range(1, 256)
NAME_LENGTH = range(1, 33)
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?")


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineSpec:
    """A machine's shape; the marker's and the factory's arguments are its fields.

    `image` is a recipe's name or the path of an image directory, `accel` one of auto, kvm,
    tcg, hvf, `tier` demands the tier that the machine runs in; `network` names the networks that
    it is on, whose other machines say the same names. What can't be `restored` is booted,
    unless that was `demanded`. Its `clock` shows the host's time, or goes on where its template's
    stopped (frozen), which only a restored one can do: it is restored then, wherever machines are
    usually booted. With a `template`, or the name of one, its shape is that of the
    template. A wrong value raises RequestInvalid, which names it.
    """

    image: str = "mini"
    memory_mib: int = 128
    cpus: int = 1
    accel: str = "auto"
    tier: str = "auto"
    lifecycle: str = "restored"
    clock: str = "host"
    network: str | Sequence[str] | None = None
    name: str | None = None
    template: Template | str | None = None
    disks: Sequence[Disk] = ()
    # The fields that a test asked for itself, in place of what machines are usually like.
    demanded: frozenset[str] = field(default=frozenset(), compare=False)

    def __post_init__(self) -> None:
        _require_text("image", self.image)
        _require_number("memory_mib", self.memory_mib, MEMORY_MIB)
        _require_number("cpus", self.cpus, CPUS)
        _require_word("accel", self.accel, ("auto", "kvm", "tcg", "hvf"))
        _require_word("tier", self.tier, ("auto", "root", "sudo", "qemu-vm", "userns", "bare"))
        _require_word("lifecycle", self.lifecycle, ("booted", "restored"))
        _require_word("clock", self.clock, ("host", "frozen"))
        if self.clock == "frozen" and self.lifecycle == "booted" and "lifecycle" in self.demanded:
            raise RequestInvalid(
                'clock="frozen" goes on from a template, and lifecycle="booted" has none',
                "leave one of them out; date -s sets the clock of a machine that booted",
            )
        if not isinstance(self.template, Template | None):
            _require_text("template", self.template)
        _ = self.networks
        if self.name is not None and not (
            isinstance(self.name, str) and _NAME.fullmatch(self.name)
        ):
            raise RequestInvalid(
                f"name={self.name!r} can't be a machine's name",
                "a host name: 1 to 32 of a-z, 0-9 and -, not at either end",
            )
        # A list may change, or be another's: what was looked at is what is kept.
        object.__setattr__(self, "disks", require_disks(self.disks))

    @property
    def is_restored(self) -> bool:
        """Whether it is to come out of a template, where there can be one."""
        frozen_clock = self.clock == "frozen"
        return self.lifecycle == "restored" or self.template is not None or frozen_clock

    @property
    def networks(self) -> tuple[str, ...]:
        """The names of its networks, in the order of its cards."""
        return parse_networks(self.network)

    def changed(self, wishes: Mapping[str, Any]) -> MachineSpec:
        """The same spec with `wishes` (field to value) in place of its own values.

        Raises RequestInvalid on a name that is no field, or a value that it can't have.
        """
        known = tuple(one.name for one in fields(self) if one.compare)
        for wish in wishes:
            if wish not in known:
                raise RequestInvalid(f"a machine has no {wish!r}", f"known are: {', '.join(known)}")
        texts: dict[str, Any] = {name: _frozen(value) for name, value in wishes.items()}
        return replace(self, **texts, demanded=self.demanded | texts.keys())

    def shaped_like(self, other: MachineSpec) -> MachineSpec:
        """The shape of `other`, but for what was demanded of this one."""
        shape = {
            name: getattr(other, name)
            for name in ("image", "memory_mib", "cpus", "disks", "accel", "network")
            if name not in self.demanded
        }
        return replace(self, **shape)


def _frozen(wish: object) -> object:
    """A wish as a value that nobody changes afterwards."""
    match wish:
        case Path():
            return str(wish)
        case list():
            return tuple(wish)
    return wish


def _require_text(name: str, value: object) -> None:
    if not isinstance(value, str) or not value:
        raise RequestInvalid(f"{name}={value!r} must be a text that is not empty")


def _require_number(name: str, value: object, allowed: range) -> None:
    # bool is an int to Python, and a mistake here
    if not isinstance(value, int) or isinstance(value, bool) or value not in allowed:
        raise RequestInvalid(
            f"{name}={value!r} must be a whole number from {allowed.start} to {allowed.stop - 1}"
        )


def _require_word(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise RequestInvalid(f"{name}={value!r} must be one of {', '.join(allowed)}")
