"""The platform's names of QEMU and of its packages."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from pytest_vmsandbox.host.platform import Platform, current_platform
from pytest_vmsandbox.host.probes.qemu import probe_qemu
from pytest_vmsandbox.host.trial import Trial

MACHINES = {
    "x86_64": "qemu-system-x86",
    "i386": "qemu-system-x86",
    "aarch64": "qemu-system-arm",
    "arm": "qemu-system-arm",
    "ppc64": "qemu-system-ppc",
    "loongarch64": "qemu-system-misc",
    "s390x": "qemu-system-misc",
    "riscv64": "qemu-system-misc",
}


def platform(machine: str) -> Platform:
    return Platform(system="linux", machine=machine)


@pytest.mark.parametrize(("machine", "package"), MACHINES.items())
def test_each_processor_has_its_package(machine: str, package: str) -> None:
    assert platform(machine).qemu_packages[-1] == package


@pytest.mark.asyncio
@pytest.mark.parametrize("machine", MACHINES)
async def test_a_missing_qemu_is_remedied_by_its_package(tmp_path: Path, machine: str) -> None:
    host = platform(machine)

    fact, _ = await probe_qemu(Trial(run_dir=tmp_path, search_path="", platform=host))

    assert f"no {host.qemu_program}" in fact.evidence
    assert all(package in fact.remedy for package in host.qemu_packages)


def test_this_hosts_package_is_the_one_its_qemu_came_from() -> None:
    host = current_platform()
    program = shutil.which(host.qemu_program)
    if program is None or shutil.which("dpkg-query") is None:
        pytest.skip("takes a QEMU that dpkg knows")
    owner = subprocess.run(
        ["dpkg-query", "--search", program], capture_output=True, text=True, check=False
    )
    if owner.returncode:
        pytest.skip(f"takes a QEMU that dpkg knows: {owner.stderr}")

    assert owner.stdout.split(":")[0] in host.qemu_packages
