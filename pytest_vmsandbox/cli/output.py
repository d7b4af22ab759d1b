"""Our stdout and stderr, to which a guest's are copied."""

from __future__ import annotations

import os


class OutputClosedError(Exception):
    """Whoever read our output reads no more."""


def write_all(descriptor: int, data: bytes) -> None:
    """Write all of it to our stdout or stderr; OutputClosedError when nobody reads it."""
    view = memoryview(data)
    try:
        while view:
            view = view[os.write(descriptor, view) :]
    except BrokenPipeError:
        raise OutputClosedError from None
