"""The topology: which networks a machine asks to be on, checked before anything is made."""

from __future__ import annotations

import re

from pytest_vmsandbox.errors import RequestInvalid

# As many as fit on QEMU's q35 beside the devices that every machine has.
CARDS_AT_MOST = 8

# The one with a way out to the world.
NAT = "nat"

# A word that people choose; it is never an interface's name, so its length is theirs.
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?")
# Names that mean something else than "the machines that say the same name".
_RESERVED = {
    "host": "no machine is ever on the host's own network",
    "none": "network=None is a machine without a card",
}


def parse_networks(wanted: object) -> tuple[str, ...]:
    """The names of the networks, in the order of the machine's cards.

    `wanted` is None, one name, or a list or tuple of names. RequestInvalid names what can't be.
    """
    if wanted is None:
        return ()
    if isinstance(wanted, str):
        return (_checked(wanted),)
    if not isinstance(wanted, list | tuple):
        raise RequestInvalid(f"network={wanted!r} must be a name, a list of names, or None")
    names = tuple(_checked(name) for name in wanted)
    if len(set(names)) < len(names):
        raise RequestInvalid(f"network={wanted!r} names a network twice")
    if len(names) > CARDS_AT_MOST:
        raise RequestInvalid(f"network={wanted!r} has more than {CARDS_AT_MOST} networks")
    return names


def _checked(name: object) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise RequestInvalid(
            f"network={name!r} can't be a network's name", "1 to 32 of a-z, 0-9 and inner -"
        )
    if name in _RESERVED:
        raise RequestInvalid(f"network={name!r} is not a name to choose: {_RESERVED[name]}")
    return name
