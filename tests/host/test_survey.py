"""The survey as the four kinds of users find it, and what of it is remembered."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pytest_vmsandbox.host.facts import Accel, Capability, HostFacts, Tier, Verdict, fact_of
from pytest_vmsandbox.host.survey import probe_host, settle_kvm

if TYPE_CHECKING:
    from tests.host.conftest import Stubs
    from tests.people import Person

SURVEY = """
import asyncio, json, tempfile
from pathlib import Path
from pytest_vmsandbox.host.survey import probe_host
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder)
    facts = asyncio.run(probe_host(cache_dir=path / "cache", run_dir=path / "yet" / "to be made"))
print(json.dumps(facts.to_json()))
"""


def present(facts: HostFacts) -> set[Capability]:
    return {capability for capability, fact in facts.facts.items() if fact.present}


def test_each_kind_of_user_gets_its_own_tier_and_facts(person: Person) -> None:
    facts = HostFacts.from_json(person.python(SURVEY))

    sudo = {
        "ROOT": {Capability.SUDO, Capability.SUDO_QEMU_VM},
        "ORDINARY": set(),
        "SUDO_TO_QEMU_VM": {Capability.SUDO_QEMU_VM},
        "SUDO_TO_ALL": {Capability.SUDO, Capability.SUDO_QEMU_VM},
    }[person.kind.name]
    best = {
        "ROOT": Tier.ROOT,
        "ORDINARY": Tier.USERNS,
        "SUDO_TO_QEMU_VM": Tier.QEMU_VM,
        "SUDO_TO_ALL": Tier.SUDO,
    }[person.kind.name]
    may_be_root = person.kind.name in ("ROOT", "SUDO_TO_ALL")
    found = present(facts)
    assert Capability.QEMU_VM_USER in found
    assert found & {Capability.SUDO, Capability.SUDO_QEMU_VM} == sudo
    for capability in {Capability.SUDO, Capability.SUDO_QEMU_VM} - sudo:
        assert facts[capability].verdict is Verdict.DENIED
        assert "password is required" in facts[capability].evidence
    if facts.tier is not Tier.BARE:  # it is, where the host's own walls let nobody build any
        assert facts.tier is best
        assert {Capability.JAIL, Capability.BRIDGE} <= found
    if not may_be_root and not Path("/dev/net/tun").stat().st_mode & 0o006:
        assert facts[Capability.TAP].verdict is Verdict.DENIED
    if person.kind.name != "ROOT" and not Path("/dev/kvm").stat().st_mode & 0o006:
        assert facts[Capability.KVM].verdict is Verdict.DENIED
        assert facts.accel is Accel.TCG


@pytest.mark.asyncio
async def test_a_survey_leaves_the_run_directory_as_it_was(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()

    facts = await probe_host(cache_dir=tmp_path / "cache", run_dir=run_dir)

    assert set(facts.facts) == set(Capability)
    assert not list(run_dir.iterdir())
    assert facts.time_scale >= 1


@pytest.mark.asyncio
async def test_a_second_survey_runs_no_program(tmp_path: Path, stubs: Stubs) -> None:
    for name in ("id", "sudo", "setfacl", "getfacl"):
        stubs.put(name, "exit 1")
    cache = tmp_path / "cache"

    first = await probe_host(cache_dir=cache, run_dir=tmp_path)
    calls = stubs.calls("id")
    again = await probe_host(cache_dir=cache, run_dir=tmp_path)

    assert len(calls) == 1
    assert stubs.calls("id") == calls
    assert again == first


@pytest.mark.asyncio
async def test_a_survey_that_is_asked_to_tries_again(tmp_path: Path, stubs: Stubs) -> None:
    stubs.put("id", "exit 1")
    await probe_host(cache_dir=tmp_path, run_dir=tmp_path)
    stubs.put("id", "echo 4242")

    stale = await probe_host(cache_dir=tmp_path, run_dir=tmp_path)
    fresh = await probe_host(cache_dir=tmp_path, run_dir=tmp_path, reprobe=True)
    later = await probe_host(cache_dir=tmp_path, run_dir=tmp_path)

    assert not stale[Capability.QEMU_VM_USER].present
    assert fresh[Capability.QEMU_VM_USER].evidence == "qemu-vm is uid 4242"
    assert later[Capability.QEMU_VM_USER].present


@pytest.mark.asyncio
async def test_a_host_without_any_program_is_bare_or_walled_and_says_so(
    tmp_path: Path, only_stubs: Stubs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pytest_vmsandbox.host.trial._ADMINISTRATORS_PATH", ())

    facts = await probe_host(cache_dir=tmp_path / "cache", run_dir=tmp_path)

    for capability in (
        *(Capability.QEMU, Capability.KVM, Capability.SUDO, Capability.SETFACL),
        *(Capability.NAT, Capability.IMAGE_BUILDER, Capability.QEMU_VM_USER),
    ):
        assert not facts[capability].present
        assert facts[capability].remedy
    assert facts.qemu is None
    assert facts.accel is Accel.TCG


def test_a_remembered_survey_costs_another_process_next_to_nothing(tmp_path: Path) -> None:
    asyncio.run(probe_host(cache_dir=tmp_path, run_dir=tmp_path))
    script = (
        "import asyncio, sys, time; from pathlib import Path\n"
        "from pytest_vmsandbox.host.survey import probe_host\n"
        "began = time.process_time(); path = Path(sys.argv[1])\n"
        "asyncio.run(probe_host(cache_dir=path, run_dir=path))\n"
        "print(time.process_time() - began)"
    )

    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )

    assert json.loads(done.stdout) < 0.05  # CPU seconds: what else the host does is not counted


@pytest.mark.asyncio
async def test_kvm_that_is_known_to_be_absent_is_not_tried_with_a_kernel(tmp_path: Path) -> None:
    facts = await probe_host(cache_dir=tmp_path, run_dir=tmp_path)
    no_kvm = facts.with_fact(fact_of(Capability.KVM, Verdict.MISSING, evidence="none"))
    nothing = tmp_path / "nothing"

    settled = await settle_kvm(
        no_kvm,
        cache_dir=tmp_path,
        run_dir=tmp_path,
        kernel=nothing,
        initramfs=nothing,
        command_line="",
    )

    assert settled is no_kvm


@pytest.mark.asyncio
async def test_what_a_kernel_said_of_kvm_is_remembered(tmp_path: Path) -> None:
    facts = await probe_host(cache_dir=tmp_path, run_dir=tmp_path)
    if facts.qemu is None:
        pytest.skip("takes QEMU")
    hopeful = facts.with_fact(fact_of(Capability.KVM, Verdict.UNCONFIRMED, evidence="ran"))
    nothing = tmp_path / "nothing"

    settled = await settle_kvm(
        hopeful,
        cache_dir=tmp_path,
        run_dir=tmp_path,
        kernel=nothing,
        initramfs=nothing,
        command_line="",
    )

    assert settled[Capability.KVM].verdict is Verdict.UNUSABLE
    assert settled.accel is Accel.TCG
    assert settled[Capability.KVM].code in settled.accel_reason
    assert await probe_host(cache_dir=tmp_path, run_dir=tmp_path) == settled


def test_workers_that_start_together_survey_once(tmp_path: Path, stubs: Stubs) -> None:
    stubs.put("id", "exit 1")

    async def several() -> list[HostFacts]:
        return await asyncio.gather(
            *(probe_host(cache_dir=tmp_path / "cache", run_dir=tmp_path) for _ in range(3))
        )

    found = asyncio.run(several())

    assert len(stubs.calls("id")) == 1
    assert found[0] == found[1] == found[2]


def test_a_survey_without_a_place_to_remember_it_is_made_nevertheless(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")

    facts = asyncio.run(probe_host(cache_dir=blocked, run_dir=tmp_path))

    assert set(facts.facts) == set(Capability)
