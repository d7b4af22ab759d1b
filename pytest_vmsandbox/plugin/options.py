"""Our options: each on the command line, in the ini file and in the environment, in that order."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One option: `parse` turns its text into a value or raises ValueError."""

    name: str
    help: str
    parse: Callable[[str], Any]
    default: Any = None

    @property
    def flag(self) -> str:
        """As on the command line: --vm-memory-mib."""
        return f"--{self.name.replace('_', '-')}"

    @property
    def variable(self) -> str:
        """As in the environment: VMSANDBOX_MEMORY_MIB."""
        return f"VMSANDBOX_{self.name.removeprefix('vm_').upper()}"

    def read(self, config: pytest.Config) -> Any:  # noqa: ANN401  # as each option has it
        """Its value for this run; pytest.UsageError names the source and the text that is wrong."""
        for source, text in (
            (self.flag, config.getoption(self.name)),
            (f"ini option {self.name}", config.getini(self.name)),
            (f"environment variable {self.variable}", os.environ.get(self.variable)),
        ):
            if text:
                try:
                    return self.parse(text)
                except ValueError as error:
                    raise pytest.UsageError(f"{source}: {text!r} {error}") from None
        return self.default


def _one_of(*words: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in words:
            raise ValueError(f"is none of {', '.join(words)}")
        return text

    return parse


def _whole(*, least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not (text.isascii() and text.isdigit()) or int(text) < least:
            raise ValueError(f"is not a whole number of at least {least}")
        return int(text)

    return parse


def _factor(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError("is not a number") from None
    if not (value > 0 and math.isfinite(value)):
        raise ValueError("is not a number above 0")
    return value


def _capabilities(text: str) -> frozenset[str]:
    from pytest_vmsandbox.host.facts import Capability

    words = frozenset(word.strip() for word in text.split(",") if word.strip())
    known = {"all", *Capability}
    if unknown := sorted(words - known):
        raise ValueError(f"has {', '.join(unknown)}, known are {', '.join(sorted(known))}")
    return words


OPTIONS = (
    Option(
        name="vm_image",
        parse=str,
        default="mini",
        help="what machines boot: a recipe's name (mini, ...) or the path of an image directory",
    ),
    Option(
        name="vm_memory_mib",
        parse=_whole(least=80),
        default=128,
        help="a machine's memory in MiB (128)",
    ),
    Option(name="vm_cpus", parse=_whole(least=1), default=1, help="a machine's processors (1)"),
    Option(
        name="vm_accel",
        parse=_one_of("auto", "kvm", "tcg", "hvf"),
        default="auto",
        help="auto (KVM where a kernel really boots on it, else TCG), kvm, tcg or hvf",
    ),
    Option(
        name="vm_tier",
        parse=_one_of("auto", "root", "sudo", "qemu-vm", "userns", "bare"),
        default="auto",
        help="how VMMs are walled in: auto (the best that this host has), root, sudo, qemu-vm, "
        "userns, or bare (no walls)",
    ),
    Option(
        name="vm_lifecycle",
        parse=_one_of("restored", "booted"),
        default="restored",
        help="restored (out of a template that was booted once) or booted (each time)",
    ),
    Option(
        name="vm_pool",
        parse=_one_of("on", "off"),
        default="on",
        help="on: while a test runs, the next one's machine is restored if a processor idles (on)",
    ),
    Option(
        name="vm_wires",
        parse=_one_of("auto", "tap", "socket"),
        default="auto",
        help="what networks are made of: auto (taps where one can be had, else sockets), tap or "
        "socket",
    ),
    Option(
        name="vm_require",
        parse=_capabilities,
        default=frozenset(),
        help="capabilities (comma list, or `all`) whose lack fails a test instead of skipping it",
    ),
    Option(
        name="vm_keep",
        parse=_one_of("never", "on-failure", "always"),
        default="never",
        help="when to keep a machine's console log, VMM log and command line: "
        "never, on-failure or always",
    ),
    Option(
        name="vm_artifacts",
        parse=Path,
        default=Path("vm-artifacts"),
        help="the directory where they are kept (vm-artifacts below the root directory)",
    ),
    Option(
        name="vm_timeout_scale",
        parse=_factor,
        default=1.0,
        help="what every timeout is multiplied by (1)",
    ),
    Option(name="vm_cache_dir", parse=Path, help="where images are kept (the user's cache)"),
    Option(
        name="vm_run_dir",
        parse=Path,
        help="where sockets and logs of running machines lie: a short path, ours alone",
    ),
    Option(
        name="vm_host_kernel",
        parse=Path,
        help="boot this kernel of the host (/boot/vmlinuz-...) with its modules",
    ),
    Option(
        name="vm_machine",
        parse=_one_of("q35", "microvm"),
        default="q35",
        help="QEMU's machine type: q35, or microvm, which has no PCI and no display, and whose "
        "boot under TCG may hang while it calibrates its clocks (q35)",
    ),
    Option(
        name="vm_durations",
        parse=_whole(least=0),
        default=0,
        help="show the N machines that took longest, step by step",
    ),
)


def add_options(parser: pytest.Parser) -> None:
    """Make them known to pytest."""
    group = parser.getgroup("vmsandbox", "real machines (pytest-vmsandbox)")
    for option in OPTIONS:
        group.addoption(option.flag, dest=option.name, default=None, help=option.help)
        parser.addini(option.name, help=option.help, default="")
    group.addoption(
        "--vm-reprobe",
        action="store_true",
        help="try again what this host can do, instead of remembering it",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the options say for this run; a field for each of them."""

    image: str
    memory_mib: int
    cpus: int
    accel: str
    tier: str
    lifecycle: str
    pool: str
    wires: str
    require: frozenset[str]
    keep: str
    artifacts: Path
    timeout_scale: float
    cache_dir: Path | None
    run_dir: Path | None
    host_kernel: Path | None
    machine: str
    durations: int
    reprobe: bool


def read_settings(config: pytest.Config) -> Settings:
    """Read them all; pytest.UsageError on the first that is wrong."""
    values = {option.name.removeprefix("vm_"): option.read(config) for option in OPTIONS}
    return Settings(**values, reprobe=config.getoption("vm_reprobe"))
