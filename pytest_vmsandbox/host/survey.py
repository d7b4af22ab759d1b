"""The survey: every probe of this host, in parallel, and what is chosen from the answers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from pytest_vmsandbox.deadline import Deadline
from pytest_vmsandbox.host.acceleration import (
    choose_accel,
    confirm_kvm,
    is_said_by_kernel,
    measure_time_scale,
)
from pytest_vmsandbox.host.facts import (
    Capability,
    Fact,
    HostFacts,
    QemuBuild,
    Tier,
    Verdict,
    fact_of,
)
from pytest_vmsandbox.host.platform import current_platform
from pytest_vmsandbox.host.probes.bridge import probe_bridge
from pytest_vmsandbox.host.probes.cgroups import probe_cgroups
from pytest_vmsandbox.host.probes.image_builder import probe_image_builder
from pytest_vmsandbox.host.probes.jail import probe_jail
from pytest_vmsandbox.host.probes.kvm import probe_kvm
from pytest_vmsandbox.host.probes.nat import probe_nat
from pytest_vmsandbox.host.probes.qemu import probe_qemu
from pytest_vmsandbox.host.probes.qemu_vm_user import probe_qemu_vm_user
from pytest_vmsandbox.host.probes.setfacl import probe_setfacl
from pytest_vmsandbox.host.probes.sudo import probe_sudo, probe_sudo_qemu_vm
from pytest_vmsandbox.host.probes.tap import probe_tap
from pytest_vmsandbox.host.probes.user_namespaces import probe_user_namespaces
from pytest_vmsandbox.host.remember import (
    Key,
    is_final,
    key_of,
    recall,
    remember,
    surveying_alone,
)
from pytest_vmsandbox.host.tier import candidate_tiers, choose_tier
from pytest_vmsandbox.host.trial import Trial, start_trial


async def probe_host(*, cache_dir: Path, run_dir: Path, reprobe: bool = False) -> HostFacts:
    """All facts of this host for this user: remembered ones, or tried now and remembered.

    Raises nothing for what the host lacks. Nothing is left in `run_dir`, which need not be there
    yet. With `reprobe` whatever is remembered is tried again, KVM with a kernel included.
    """
    trial = start_trial(run_dir=run_dir)
    key = _key(trial)
    known = None if reprobe else recall(cache_dir, key)
    if known is not None:
        return known
    # Workers start together; one surveys, so that they don't slow each other into timeouts.
    deadline = Deadline.after(seconds=2 * trial.deadline_s)
    async with surveying_alone(cache_dir, key, deadline=deadline):
        known = None if reprobe else recall(cache_dir, key)
        if known is None:
            known = await survey(trial)
            remember(cache_dir, key, known)
    return known


def recall_host(*, cache_dir: Path, run_dir: Path) -> HostFacts | None:
    """What is remembered of this host for this user, or None; nothing is tried."""
    return recall(cache_dir, _key(start_trial(run_dir=run_dir)))


def keep_kernels_word(
    facts: HostFacts, former: HostFacts | None, *, cache_dir: Path, run_dir: Path
) -> HostFacts:
    """The facts with what a kernel once said of KVM, where the small guest ran again; remembered.

    For a survey anew without a kernel to try: the last step was not, so its word stands.
    """
    if former is None or is_final(facts[Capability.KVM]):
        return facts
    kvm = former[Capability.KVM]
    if not is_said_by_kernel(kvm):
        return facts
    return _settled(facts, kvm, cache_dir=cache_dir, run_dir=run_dir)


async def settle_kvm(
    facts: HostFacts,
    *,
    cache_dir: Path,
    run_dir: Path,
    kernel: Path,
    initramfs: Path,
    command_line: str,
) -> HostFacts:
    """The facts after a kernel was tried under KVM, and remembered for this boot of the host.

    Returns at once where KVM is known to be absent, or was confirmed before.
    """
    if is_final(facts[Capability.KVM]) or facts.qemu is None:
        return facts
    kvm = await confirm_kvm(
        qemu=Path(facts.qemu.path), kernel=kernel, initramfs=initramfs, command_line=command_line
    )
    return _settled(facts, kvm, cache_dir=cache_dir, run_dir=run_dir)


def _settled(facts: HostFacts, kvm: Fact, *, cache_dir: Path, run_dir: Path) -> HostFacts:
    accel = choose_accel(kvm, current_platform())
    settled = replace(facts.with_fact(kvm), accel=accel.accel, accel_reason=accel.reason)
    remember(cache_dir, _key(start_trial(run_dir=run_dir)), settled)
    return settled


async def survey(trial: Trial) -> HostFacts:
    """Try everything now; every probe has its own deadline, which kills and reaps."""
    (machine_facts, build, time_scale), ground = await asyncio.gather(
        _survey_machines(trial), _survey_ground(trial)
    )
    facts = {fact.capability: fact for fact in (*machine_facts, *ground)}
    tier = choose_tier(facts, uid=trial.uid)
    accel = choose_accel(facts[Capability.KVM], trial.platform)
    return HostFacts(
        facts=facts,
        tier=tier.tier,
        tier_reason=tier.reason,
        accel=accel.accel,
        accel_reason=accel.reason,
        time_scale=time_scale,
        qemu=build,
    )


async def _survey_machines(trial: Trial) -> tuple[Sequence[Fact], QemuBuild | None, float]:
    """QEMU, KVM, the way out and the speed of TCG: all of them only with a QEMU that starts."""
    qemu, build = await probe_qemu(trial)
    if build is None:
        nat = await probe_nat(trial, qemu=None)
        return (qemu, await probe_kvm(trial, qemu=None), nat), None, 1.0
    program = Path(build.path)
    nat = await probe_nat(trial, qemu=program)  # alone: what is measured is this host's speed
    kvm, time_scale = await asyncio.gather(
        probe_kvm(trial, qemu=program), measure_time_scale(trial, qemu=program)
    )
    return (qemu, kvm, nat), build, time_scale


async def _survey_ground(trial: Trial) -> list[Fact]:
    """Users, privileges, walls and wires: the last two in the way that the warden will start."""
    builder = asyncio.create_task(probe_image_builder(trial))
    acl = asyncio.create_task(probe_setfacl(trial))
    ways = await _survey_ways(trial)
    walls = await _survey_walls(trial, candidate_tiers(ways, uid=trial.uid))
    return [*ways.values(), *walls, await builder, await acl]


async def _survey_ways(trial: Trial) -> Mapping[Capability, Fact]:
    user = asyncio.create_task(probe_qemu_vm_user(trial))

    async def sudo_qemu_vm() -> Fact:
        return await probe_sudo_qemu_vm(trial, user=await user)

    found = await asyncio.gather(
        probe_sudo(trial), sudo_qemu_vm(), probe_user_namespaces(trial), user
    )
    return {fact.capability: fact for fact in found}


async def _survey_walls(trial: Trial, ways: Iterable[Tier]) -> tuple[Fact, ...]:
    """A jail in the best way in which one can be built, and the wires in that same way."""
    jail = _no_way_to(Capability.JAIL)
    for tier in ways:
        jail = await probe_jail(trial, tier=tier)
        if jail.present:
            break
    if not jail.present or jail.tier is None:
        wires = (Capability.BRIDGE, Capability.TAP, Capability.CGROUPS)
        return jail, *map(_no_way_to, wires)
    return jail, *await asyncio.gather(
        *(probe(trial, tier=jail.tier) for probe in (probe_bridge, probe_tap, probe_cgroups))
    )


def _no_way_to(capability: Capability) -> Fact:
    return fact_of(
        capability,
        Verdict.UNUSABLE,
        evidence="not tried: no tier but bare is open to this user",
        remedy="vmsandbox setup; vmsandbox doctor says what would unlock a tier",
    )


def _key(trial: Trial) -> Key:
    program = trial.find(trial.platform.qemu_program)
    return key_of(qemu=program, search_path=trial.search_path, run_dir=trial.run_dir)
