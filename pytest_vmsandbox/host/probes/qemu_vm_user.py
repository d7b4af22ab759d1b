"""Whether the system user qemu-vm is there, as the name service answers a fresh process."""

from __future__ import annotations

import re

from pytest_vmsandbox.host.facts import Capability, Fact, Verdict, fact_of
from pytest_vmsandbox.host.trial import Trial, failed, unsupported

USER = "qemu-vm"

_UID = re.compile(r"[0-9]{1,10}", re.ASCII)
_NO_UID = 0xFFFF_FFFF  # (uid_t) -1 names nobody (chown(2))
_REMEDY = "vmsandbox setup (makes the user)"


async def probe_qemu_vm_user(trial: Trial) -> Fact:
    """OK with the uid as evidence."""
    if not trial.platform.is_linux:
        return unsupported(Capability.QEMU_VM_USER, trial.platform)
    # A child, with a deadline: where users come from a directory server, this can hang.
    outcome = await trial.run(["id", "-u", USER])
    if not outcome.ok:
        verdict = Verdict.UNUSABLE if outcome.returncode is None else Verdict.MISSING
        return failed(Capability.QEMU_VM_USER, outcome, remedy=_REMEDY, verdict=verdict)
    uid = outcome.text.strip()
    if not _UID.fullmatch(uid) or int(uid) >= _NO_UID:
        evidence = f"id -u {USER} printed {uid[:80]!r}"
        return fact_of(Capability.QEMU_VM_USER, Verdict.UNUSABLE, evidence=evidence, remedy=_REMEDY)
    return fact_of(Capability.QEMU_VM_USER, Verdict.OK, evidence=f"{USER} is uid {uid}")
