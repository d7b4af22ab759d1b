"""The parent's death: what a process that we start is to end with."""

from __future__ import annotations

import shutil
from collections.abc import Sequence


def dying_with_us() -> Sequence[str]:
    """What to put before a command so that the kernel ends it when the calling thread ends.

    PR_SET_PDEATHSIG must be set in the child, between fork and exec, where Python may not run
    in a process with threads; setpriv(1) sets it and turns into the command (same pid).
    Empty where there is no setpriv.
    """
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "KILL", "--"] if setpriv else []
