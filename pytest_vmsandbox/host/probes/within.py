"""Within: the way in which a tier starts a process, and the probes' inside run in that way."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from pytest_vmsandbox.host.facts import Capability, Fact, Tier, Verdict, fact_of
from pytest_vmsandbox.host.trial import Trial, failed

_SUDO = ("sudo", "-n")  # -n: it must never prompt
_WAYS: dict[Tier, tuple[str, ...]] = {
    Tier.ROOT: (),
    Tier.SUDO: (*_SUDO, "--"),
    Tier.QEMU_VM: (*_SUDO, "-u", "qemu-vm", "--"),
    Tier.USERNS: (),
    Tier.BARE: (),
}
_INSIDE = Path(__file__).with_name("inside.py")
_PYTHON = (sys.executable, "-I", "-S")

# The inside ends itself a little before we give up on it: behind sudo we may not kill it.
_OWN_END = 0.9


def render_start(tier: Tier, *arguments: str) -> list[str]:
    """The argv that starts a fresh Python as the tier starts its warden."""
    return [*_WAYS[tier], *_PYTHON, *arguments]


async def probe_within(
    trial: Trial, capability: Capability, *, tier: Tier, remedy: str, in_namespaces: bool = True
) -> Fact:
    """Try the capability in the way of the tier; `inside.py` says how."""
    seconds = f"{trial.deadline_s * _OWN_END:.3f}"
    through = ("userns",) if in_namespaces and tier in (Tier.QEMU_VM, Tier.USERNS) else ()
    outcome = await trial.run(
        render_start(tier, "-", capability.value, seconds, trial.search_path, *through),
        stdin=_INSIDE.read_bytes(),
    )
    if not outcome.ok:
        return failed(capability, outcome, remedy=remedy)
    verdict, evidence = parse_report(outcome.stdout)
    return fact_of(capability, verdict, evidence=evidence, remedy=remedy, tier=tier)


def parse_report(printed: bytes) -> tuple[Verdict, str]:
    """Read what the inside printed; anything else is UNUSABLE, and is the evidence."""
    try:
        match json.loads(printed):
            case {"verdict": str(verdict), "evidence": str(evidence)}:
                return Verdict(verdict), evidence
    except (ValueError, RecursionError):  # the second: thousands of brackets
        pass
    return Verdict.UNUSABLE, f"the probe printed {printed[:200]!r}"
