"""Names: our lines in a guest's /etc/hosts, among whatever else stands there (hosts(5))."""

from __future__ import annotations

from collections.abc import Mapping

from pytest_vmsandbox.network.addresses import Address

PATH = "/etc/hosts"

_BEGIN = "# vmsandbox: the machines on its networks"
_END = "# vmsandbox: end"


def render_hosts(text: str, members: Mapping[str, Address]) -> str:
    """The file with these machines in it, instead of those that an earlier call had put there."""
    before, _, rest = text.partition(f"{_BEGIN}\n")
    _, _, after = rest.partition(f"{_END}\n")
    if before and not before.endswith("\n"):
        before += "\n"
    return before + render_block(members) + after if members else before + after


def render_block(members: Mapping[str, Address]) -> str:
    """Our lines alone, with these machines in them."""
    lines = "".join(
        f"{address} {name}\n"
        for name, known in members.items()
        for address in (known.ip, known.ip6)
    )
    return f"{_BEGIN}\n{lines}{_END}\n"
