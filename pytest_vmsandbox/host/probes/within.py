"""Within: the inside of the probes, run in the way in which a tier starts its warden."""

from __future__ import annotations

import json
from pathlib import Path

from pytest_vmsandbox.host.facts import Capability, Fact, Tier, Verdict, fact_of
from pytest_vmsandbox.host.trial import Trial, failed
from pytest_vmsandbox.host.way import render_start

_INSIDE = Path(__file__).with_name("inside.py")
_PROGRAMS = {Capability.JAIL: Path(__file__).with_name("inside_jail.py")}

# The inside ends itself a little before we give up on it: behind sudo we may not kill it.
_OWN_END = 0.9


async def probe_within(
    trial: Trial, capability: Capability, *, tier: Tier, remedy: str, in_namespaces: bool = True
) -> Fact:
    """Try the capability in the way of the tier; a program beside this module says how."""
    seconds = f"{trial.deadline_s * _OWN_END:.3f}"
    through = ("userns",) if in_namespaces and tier in (Tier.QEMU_VM, Tier.USERNS) else ()
    outcome = await trial.run(
        render_start(tier, "-", capability.value, seconds, trial.search_path, *through),
        stdin=_PROGRAMS.get(capability, _INSIDE).read_bytes(),
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
