"""Whether sudo runs what the warden is, as whom it must be, and never asks for a password."""

from __future__ import annotations

from pytest_vmsandbox.host.facts import Capability, Fact, Tier, Verdict, fact_of
from pytest_vmsandbox.host.probes.qemu_vm_user import USER
from pytest_vmsandbox.host.trial import Trial, failed, unsupported
from pytest_vmsandbox.host.way import interpreter, render_start

# The warden is a Python that starts VMMs, so Python must start and be allowed to execute: a
# NOEXEC in sudoers lets the first pass and stops the second.
_PROGRAM = "import os; os.execv('/usr/bin/id', ['id', '-u'])"


async def probe_sudo(trial: Trial) -> Fact:
    """Whether sudo makes us root."""
    remedy = "an administrator may grant it, or use another tier; see docs/hosts.md"
    return await _probe(trial, Capability.SUDO, tier=Tier.SUDO, expected="0", remedy=remedy)


async def probe_sudo_qemu_vm(trial: Trial, *, user: Fact) -> Fact:
    """Whether sudo makes us qemu-vm; not tried where that user does not exist."""
    remedy = "vmsandbox setup (one line in /etc/sudoers.d)"
    if not user.present:
        return fact_of(
            Capability.SUDO_QEMU_VM,
            Verdict.UNSUPPORTED if user.verdict is Verdict.UNSUPPORTED else Verdict.MISSING,
            evidence=f"no user {USER}: {user.evidence}",
            remedy=remedy,
        )
    uid = user.evidence.rsplit(" ", 1)[1]
    return await _probe(
        trial, Capability.SUDO_QEMU_VM, tier=Tier.QEMU_VM, expected=uid, remedy=remedy
    )


async def _probe(
    trial: Trial, capability: Capability, *, tier: Tier, expected: str, remedy: str
) -> Fact:
    if not trial.platform.is_linux:
        return unsupported(capability, trial.platform)
    if trial.find("sudo") is None:
        return fact_of(
            capability,
            Verdict.MISSING,
            evidence="no program sudo",
            remedy="vmsandbox setup (apt-get install sudo)",
        )
    outcome = await trial.run(render_start(tier, "-c", _PROGRAM))
    if b"unable to execute" in outcome.stderr:
        # sudo let us, and the other user can't reach our interpreter: a home of mode 0700.
        remedy = f"make {interpreter(tier)} reachable for that user (a+x on the folders above it)"
        return failed(capability, outcome, remedy=remedy)
    if not outcome.ok:
        return failed(capability, outcome, remedy=remedy, verdict=Verdict.DENIED)
    shown = outcome.text.strip()
    if shown != expected:
        return fact_of(
            capability,
            Verdict.UNUSABLE,
            evidence=f"sudo ran us as uid {shown[:80]!r}, not {expected}",
            remedy=remedy,
        )
    return fact_of(capability, Verdict.OK, evidence=f"sudo -n runs Python as uid {shown}")
