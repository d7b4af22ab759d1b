"""Names of interfaces: what the kernel takes for one, and nothing that a tool would misread."""

from __future__ import annotations

_BYTES_AT_MOST = 15  # IFNAMSIZ, with the NUL that ends it


def check_interface_name(name: str) -> str:
    """The name itself; ValueError where no interface can be called so (dev_valid_name())."""
    length = len(name.encode())
    if not 1 <= length <= _BYTES_AT_MOST:
        raise ValueError(f"an interface's name has 1 to {_BYTES_AT_MOST} bytes: {name!r}")
    if name in (".", "..") or name.startswith("-"):
        raise ValueError(f"{name!r} can't be an interface's name")
    if not name.isascii() or not name.isprintable() or set(name) & set(" /:%"):
        raise ValueError(f"an interface's name has no blank, /, : or % in it: {name!r}")
    return name
