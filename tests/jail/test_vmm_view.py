"""A VMM's view: the program with what it needs, and not what lies beside it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from pytest_vmsandbox.errors import HostUnfit
from pytest_vmsandbox.host.facts import Tier
from pytest_vmsandbox.jail.vmm_view import plan_vmm_view
from pytest_vmsandbox.machine.walled import WalledLauncher
from pytest_vmsandbox.vmm.launch import LaunchRequest
from pytest_vmsandbox.warden.client import open_warden
from pytest_vmsandbox.warden.steps import Bind


def bound(program: Path) -> set[str]:
    """What of the host is shown for a program that is not shown for one of the system's."""
    plain = plan_vmm_view(Path("/usr/bin/true"), kvm=False)
    steps = [step for step in plan_vmm_view(program, kvm=False) if step not in plain]
    assert all(isinstance(step, Bind) for step in steps)
    return {step.source for step in steps if isinstance(step, Bind)}


@pytest.fixture
def home(scratch: Path) -> Path:
    """A home with a program of its own, and with more."""
    home = scratch / "home"
    for name in ("bin", ".ssh", "lib", "share/qemu", "share/keyrings", "opt", "pc-bios"):
        (home / name).mkdir(parents=True)
    (home / ".ssh" / "id").write_text("secret")
    shutil.copy("/usr/bin/find", home / "bin" / "find")
    return home


def test_beside_a_program_in_a_home_only_its_libraries_and_data_are_shown(home: Path) -> None:
    names = ("bin/find", "lib", "share/qemu")

    assert bound(home / "bin" / "find") == {str(home / name) for name in names}


def test_of_the_folder_of_a_program_only_its_data_are_shown(home: Path) -> None:
    assert bound(home / "qemu") == {str(home / "qemu"), str(home / "pc-bios")}


def test_what_homebrew_links_to_is_shown(home: Path) -> None:
    (home / "Cellar").mkdir()

    assert {str(home / "Cellar"), str(home / "opt")} <= bound(home / "bin" / "find")


@pytest.mark.parametrize("program", ["/usr/bin/find", "/bin/find", "/usr/local/bin/qemu"])
def test_for_a_program_of_the_system_nothing_more_is_shown(program: str) -> None:
    if not Path(program).parent.resolve().is_relative_to("/usr"):
        pytest.skip("VMS-TEST-HOST: this host's /bin is not in /usr")

    assert bound(Path(program)) == set()


async def test_a_program_in_a_home_runs_and_does_not_see_the_home(
    home: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    argv = [str(home / "bin" / "find"), str(home)]
    request = LaunchRequest(id="view", argv=argv, directory=tmp_path, log=log)
    tier = Tier.ROOT if os.getuid() == 0 else Tier.USERNS
    try:
        async with (
            open_warden(tier, log=tmp_path / "warden.log") as warden,
            WalledLauncher(warden).launch(request) as process,
        ):
            status = await process.wait()
    except HostUnfit as unfit:
        pytest.skip(str(unfit))

    assert status == 0
    shown = ("", "/bin", "/bin/find", "/lib", "/share", "/share/qemu")
    assert sorted(log.read_text().split()) == [f"{home}{name}" for name in shown]
