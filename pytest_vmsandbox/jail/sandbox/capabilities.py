"""Which walls of a sandbox this host can build, and how to do without the others."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from pytest_vmsandbox.errors import RequestInvalid, VmSandboxError
from pytest_vmsandbox.jail.sandbox.apart import run_with_own_warden
from pytest_vmsandbox.jail.sandbox.config import PARAMETERS, parse_config

# What takes no wall, and for stronger wishes their word and the trial that shows that they work.
_WEAKEST = {"network": "undefined", "mounts": "undefined", "filesystem_writable_paths": "all"}
_TRIALS: Mapping[str, tuple[str, str]] = {
    "network": ("isolated", "isolated"),
    "mounts": ("isolated", "isolated"),
    "filesystem_writable_paths": ("any", "none"),
}


class SandboxDegraded(UserWarning):
    """A wall that was asked for can't be had here and was left out."""


class _Capabilities(Mapping[str, tuple[str, ...]]):
    """What can be asked for, by parameter of `run_sandbox`; tried at the first look, once.

    "any" stands for lists of paths, and for none.
    """

    def __getitem__(self, name: str) -> tuple[str, ...]:
        return _found()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(_WEAKEST)

    def __len__(self) -> int:
        return len(_WEAKEST)

    def __repr__(self) -> str:
        return repr(dict(self))


CAPABILITIES: Mapping[str, tuple[str, ...]] = _Capabilities()


def degrade_config_for_capabilities(
    config: Mapping[str, Any],
    warn: bool = True,  # noqa: FBT001, FBT002 - its place is fixed
) -> dict[str, Any]:
    """`config`, keyword arguments of `run_sandbox`, without the walls that can't be had here.

    For each that is left out there is a SandboxDegraded warning, unless `warn` is false; `config`
    itself stays as it is. RequestInvalid for what `run_sandbox` would refuse.
    """
    if unknown := sorted(set(config) - PARAMETERS):
        raise RequestInvalid(f"config: run_sandbox has no parameter {', '.join(unknown)}")
    parse_config("true", **config)
    degraded = dict(config)
    for name, weakest in _WEAKEST.items():
        if config.get(name, weakest) == weakest or len(CAPABILITIES[name]) > 1:
            continue
        degraded[name] = weakest
        if warn:
            warnings.warn(
                f"{name}={config[name]!r:.200} can't be had on this host: {weakest!r} it is",
                SandboxDegraded,
                stacklevel=2,
            )
    return degraded


@cache
def _found() -> Mapping[str, tuple[str, ...]]:
    strongest: Mapping[str, Any] = {name: value for name, (_, value) in _TRIALS.items()}
    everything = _works(strongest)
    return {
        name: (_WEAKEST[name], word)
        if everything or _works({name: strongest[name]})
        else (_WEAKEST[name],)
        for name, (word, _) in _TRIALS.items()
    }


def _works(wanted: Mapping[str, Any]) -> bool:
    """Whether a program that surely runs here runs so too."""
    config = parse_config([sys.executable, "-I", "-S", "-c", ""], **wanted)
    try:
        return run_with_own_warden(config).exit_code == 0
    except (OSError, VmSandboxError):
        return False
