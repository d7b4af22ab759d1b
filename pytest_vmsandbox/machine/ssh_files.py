"""What ssh reads on the host: a configuration, and the host keys that it may meet."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

# A key's algorithm and itself, as a .pub file begins (sshd(8), AUTHORIZED_KEYS FILE FORMAT).
_KEY: Final = re.compile(
    r"((?:ssh|ecdsa|sk)-[A-Za-z0-9.@-]{1,60} [A-Za-z0-9+/]{16,16000}={0,2})(?:[ \t].*)?"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SshRoute:
    """How ssh reaches a guest: by `name`, at a port of the host's own loopback.

    `alias` is what its host keys are known by, and no other guest's.
    """

    name: str
    alias: str
    port: int
    user: str
    identity: Path
    known_hosts: Path


def parse_public_keys(text: str) -> Sequence[str]:
    """The keys in what a guest printed, without comments; lines that are none are left out."""
    found = (_KEY.fullmatch(line) for line in text.split("\n"))
    return [match[1] for match in found if match]


def render_known_hosts(alias: str, keys: Sequence[str]) -> str:
    """The text of a file of known hosts in which `alias` has those keys."""
    return "".join(f"{alias} {key}\n" for key in keys)


def render_configuration(route: SshRoute) -> str:
    """The text of an ssh_config(5) that knows that guest, and takes nothing from elsewhere."""
    options = {
        "HostName": "127.0.0.1",
        "Port": str(route.port),
        "User": route.user,
        "IdentityFile": _quoted(route.identity),
        "IdentitiesOnly": "yes",
        "IdentityAgent": "none",
        "PreferredAuthentications": "publickey",
        "BatchMode": "yes",
        "HostKeyAlias": route.alias,
        "UserKnownHostsFile": _quoted(route.known_hosts),
        "GlobalKnownHostsFile": "/dev/null",
        "StrictHostKeyChecking": "yes",
        "UpdateHostKeys": "no",
        "ForwardAgent": "no",
        "ForwardX11": "no",
        "ControlPath": "none",
    }
    lines = [f"    {name} {value}" for name, value in options.items()]
    return "\n".join([f"Host {route.name}", *lines, ""])


def _quoted(path: Path) -> str:
    # In a file's name ssh expands %h and its like.
    return f'"{path}"'.replace("%", "%%")
