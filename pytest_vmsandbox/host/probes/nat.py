"""Whether a QEMU has user-mode networking, by which machines get out to the world."""

from __future__ import annotations

import json
from pathlib import Path

from pytest_vmsandbox.host.facts import Capability, Fact, Verdict, fact_of
from pytest_vmsandbox.host.trial import Trial, failed, unsupported

_REMEDY = "a QEMU built with libslirp (--enable-slirp), as distributions build it"
_STACK = ("-netdev", "user,id=world", "-netdev", "hubport,id=inner,hubid=0,netdev=world")
_MACHINE = ("-M", "none", "-nodefaults", "-no-user-config", "-display", "none", "-qmp", "stdio")
_QUIT = b'{"execute": "qmp_capabilities"}\n{"execute": "quit"}\n'


async def probe_nat(trial: Trial, *, qemu: Path | None) -> Fact:
    """Start a QEMU without a machine that has such a network, and let it end."""
    if not trial.platform.is_linux:
        return unsupported(Capability.NAT, trial.platform)
    if qemu is None:
        evidence = f"no {trial.platform.qemu_program} starts here, whose user-mode network it is"
        remedy = "vmsandbox setup (see qemu)"
        return fact_of(Capability.NAT, Verdict.MISSING, evidence=evidence, remedy=remedy)
    outcome = await trial.run([qemu, *_MACHINE, *_STACK], stdin=_QUIT)
    if not outcome.ok or not has_answered(outcome.stdout):
        return failed(Capability.NAT, outcome, remedy=_REMEDY)
    evidence = f"{qemu} starts with a user-mode network"
    return fact_of(Capability.NAT, Verdict.OK, evidence=evidence)


def has_answered(printed: bytes) -> bool:
    """Whether it said what a QEMU says to both requests."""
    try:
        messages = [json.loads(line) for line in printed.splitlines() if line.strip()]
    except (ValueError, RecursionError):  # the second: a line of brackets
        return False
    done = [each for each in messages if isinstance(each, dict) and each.get("return") == {}]
    return len(done) == _QUIT.count(b"execute")
