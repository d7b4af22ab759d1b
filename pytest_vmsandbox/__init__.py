"""Real Linux machines as pytest fixtures: isolated, authenticated, gone without a trace.

Names are imported when they are first used (PEP 562): pytest loads this package in every run,
and most runs need nothing of it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytest_vmsandbox.errors import (
        AddressesExhausted,
        BootFailed,
        BridgeLost,
        ChannelLost,
        CommandFailed,
        GuestPanicked,
        HostUnfit,
        MachineFailed,
        NameTaken,
        NetworkFailed,
        OutcomeUnknown,
        RequestInvalid,
        SocketAuthError,
        SwitchDied,
        TapLost,
        TeardownRefused,
        TimedOut,
        VmmDied,
        VmSandboxError,
    )
    from pytest_vmsandbox.host.facts import Capability, HostFacts
    from pytest_vmsandbox.machine.async_machine import AsyncMachine
    from pytest_vmsandbox.machine.command import Completed
    from pytest_vmsandbox.machine.copies import Snapshot
    from pytest_vmsandbox.machine.disk import Disk
    from pytest_vmsandbox.machine.jail import Jail
    from pytest_vmsandbox.machine.machine import Machine
    from pytest_vmsandbox.machine.network import Network
    from pytest_vmsandbox.machine.templates.builder import TemplateBuilder
    from pytest_vmsandbox.machine.templates.layer import Template
    from pytest_vmsandbox.plugin.fixtures import AsyncMachineFactory, MachineFactory

_HOMES = {
    "errors": (
        "AddressesExhausted",
        "BootFailed",
        "BridgeLost",
        "ChannelLost",
        "CommandFailed",
        "GuestPanicked",
        "HostUnfit",
        "MachineFailed",
        "NameTaken",
        "NetworkFailed",
        "OutcomeUnknown",
        "RequestInvalid",
        "SocketAuthError",
        "SwitchDied",
        "TapLost",
        "TeardownRefused",
        "TimedOut",
        "VmmDied",
        "VmSandboxError",
    ),
    "host.facts": ("Capability", "HostFacts"),
    "machine.async_machine": ("AsyncMachine",),
    "machine.command": ("Completed",),
    "machine.copies": ("Snapshot",),
    "machine.disk": ("Disk",),
    "machine.jail": ("Jail",),
    "machine.machine": ("Machine",),
    "machine.network": ("Network",),
    "machine.templates.builder": ("TemplateBuilder",),
    "machine.templates.layer": ("Template",),
    "plugin.fixtures": ("AsyncMachineFactory", "MachineFactory"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "AddressesExhausted",
    "AsyncMachine",
    "AsyncMachineFactory",
    "BootFailed",
    "BridgeLost",
    "Capability",
    "ChannelLost",
    "CommandFailed",
    "Completed",
    "Disk",
    "GuestPanicked",
    "HostFacts",
    "HostUnfit",
    "Jail",
    "Machine",
    "MachineFactory",
    "MachineFailed",
    "NameTaken",
    "Network",
    "NetworkFailed",
    "OutcomeUnknown",
    "RequestInvalid",
    "Snapshot",
    "SocketAuthError",
    "SwitchDied",
    "TapLost",
    "TeardownRefused",
    "Template",
    "TemplateBuilder",
    "TimedOut",
    "VmSandboxError",
    "VmmDied",
]


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
