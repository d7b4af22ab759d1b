"""What this host can do, it is found to do; what its kernel or file systems refuse, it is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from pytest_vmsandbox.host.facts import Capability, Tier, Verdict
from pytest_vmsandbox.host.probes import inside
from pytest_vmsandbox.host.probes.image_builder import probe_image_builder
from pytest_vmsandbox.host.probes.qemu import parse_build, probe_qemu
from pytest_vmsandbox.host.probes.setfacl import probe_setfacl
from pytest_vmsandbox.host.probes.within import parse_report, probe_within
from pytest_vmsandbox.host.trial import Trial

as_root = pytest.mark.skipif(os.getuid() != 0, reason="takes root")


@pytest.mark.asyncio
async def test_a_qemu_tells_what_it_was_built_with(trial: Trial) -> None:
    if trial.find(trial.platform.qemu_program) is None:
        pytest.skip("takes QEMU")

    fact, build = await probe_qemu(trial)

    assert fact.present
    assert build is not None
    assert "tcg" in build.accelerators
    assert "accel" not in build.accelerators
    assert build.version in fact.evidence
    assert Path(build.path).is_absolute()


@pytest.mark.asyncio
async def test_a_qemu_without_seccomp_is_lived_with(trial: Trial, tmp_path: Path) -> None:
    real = trial.find(trial.platform.qemu_program)
    if real is None:
        pytest.skip("takes QEMU")
    program = tmp_path / trial.platform.qemu_program
    program.write_text(f'#!/bin/sh\ncase "$*" in *-sandbox*) exit 1;; esac\nexec {real} "$@"\n')
    program.chmod(0o755)

    fact, build = await probe_qemu(Trial(run_dir=tmp_path, search_path=f"{tmp_path}:/bin"))

    assert build is not None
    assert not build.sandbox
    assert "no seccomp" in fact.evidence


@pytest.mark.parametrize("printed", [b"", b"{}", b"[]", b'{"QMP": {}}\n{"return": {}}', b"\xff"])
def test_answers_that_are_no_qemus_are_refused(printed: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 -- json's own is one too
        parse_build(printed, program=Path("/q"), sandbox=True)


@pytest.mark.asyncio
async def test_an_entry_sticks_on_a_file_system_with_acls(trial: Trial) -> None:
    if trial.find("setfacl") is None:
        pytest.skip("takes setfacl")

    assert (await probe_setfacl(trial)).present


@pytest.mark.asyncio
async def test_no_entry_sticks_on_a_file_system_without_acls(without_acls: Path) -> None:
    trial = Trial(run_dir=without_acls, search_path=os.defpath)

    fact = await probe_setfacl(trial)

    assert fact.code == "VMS-SETFACL-UNUSABLE"
    assert "not supported" in fact.evidence


@pytest.mark.asyncio
async def test_a_run_directory_that_cannot_be_written_has_no_acls(tmp_path: Path) -> None:
    trial = Trial(run_dir=tmp_path / "not there", search_path=os.defpath)

    fact = await probe_setfacl(trial)

    assert not fact.present
    assert "not there" in fact.evidence


@pytest.mark.asyncio
async def test_images_can_be_built_where_apt_knows_sources(trial: Trial) -> None:
    if any(trial.find(program) is None for program in ("apt-get", "dpkg-deb", "mke2fs")):
        pytest.skip("takes apt-get, dpkg-deb and mke2fs")

    fact = await probe_image_builder(trial)

    assert fact.present, fact.evidence


@as_root
@pytest.mark.asyncio
@pytest.mark.parametrize("tier", [Tier.ROOT, Tier.USERNS])
@pytest.mark.parametrize("capability", [Capability.JAIL, Capability.BRIDGE, Capability.TAP])
async def test_walls_and_wires_are_made_and_nothing_of_them_stays(
    capability: Capability, tier: Tier, trial: Trial
) -> None:
    mounts = Path("/proc/self/mountinfo").read_text()
    links = set(Path("/sys/class/net").iterdir())

    fact = await probe_within(trial, capability, tier=tier, remedy="none")

    assert fact.present or fact.verdict in (Verdict.MISSING, Verdict.DENIED), fact.evidence
    assert fact.tier is tier
    assert Path("/proc/self/mountinfo").read_text() == mounts
    assert set(Path("/sys/class/net").iterdir()) == links


@as_root
@pytest.mark.asyncio
async def test_no_control_group_stays_behind(trial: Trial) -> None:
    await probe_within(trial, Capability.CGROUPS, tier=Tier.ROOT, remedy="none")

    assert not list(Path("/sys/fs/cgroup").rglob("vmsandbox-probe-*"))


INSIDE = Path(inside.__file__).read_text(encoding="utf-8")


def run_inside(what: str, *, seconds: float = 20, text: str = INSIDE) -> tuple[str, str]:
    """What the inside's program reports, as itself or changed."""
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-", what, str(seconds), os.defpath],
        input=text,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stderr == ""
    report = json.loads(done.stdout)
    return report["verdict"], report["evidence"]


def inside_with(definition: str) -> str:
    """The inside with one of its functions replaced."""
    call = 'if __name__ == "__main__":'
    assert call in INSIDE
    return INSIDE.replace(call, f"{definition}\n\n\n{call}")


@pytest.fixture
def cgroup_parent() -> Path:
    """Where the probe makes its group."""
    if os.getuid() != 0:
        pytest.skip("takes root")
    verdict, evidence = run_inside("cgroups")
    if verdict != "ok":
        pytest.skip(f"takes control groups: {evidence}")
    return Path(evidence.split(" limited in ")[1]).parent


SLOW_TO_LIMIT = "def limit_cgroup(group, limits):\n    time.sleep(60)"
LATE_TO_REMOVE = """\
remove_at_once = remove_cgroup


def remove_cgroup(group):
    signal.raise_signal(signal.SIGALRM)
    remove_at_once(group)"""


@pytest.mark.parametrize("definition", [SLOW_TO_LIMIT, LATE_TO_REMOVE])
def test_an_alarm_leaves_no_control_group(cgroup_parent: Path, definition: str) -> None:
    seconds = 0.5 if definition is SLOW_TO_LIMIT else 20

    verdict, evidence = run_inside("cgroups", seconds=seconds, text=inside_with(definition))

    assert (verdict, evidence) == ("timeout", "no end within the time given")
    assert not list(cgroup_parent.glob("vmsandbox-probe-*"))


@pytest.fixture
def group_of_the_living(cgroup_parent: Path) -> Iterator[Path]:
    group = cgroup_parent / f"vmsandbox-probe-{os.getpid()}"
    group.mkdir()
    yield group
    group.rmdir()


def test_what_a_killed_probe_left_is_swept_and_nothing_else(
    cgroup_parent: Path, group_of_the_living: Path
) -> None:
    with subprocess.Popen(["true"]) as gone:
        pass
    stale = cgroup_parent / f"vmsandbox-probe-{gone.pid}"
    stale.mkdir()

    verdict, evidence = run_inside("cgroups")

    assert verdict == "ok", evidence
    assert not stale.exists()
    assert group_of_the_living.exists()


# A hierarchy without a source, on a mount point of any bytes, is the only one there.
ODD_MOUNTS = """
import ctypes, os, sys
folder, kind = sys.argv[1].encode(), sys.argv[2].encode()
libc = ctypes.CDLL(None, use_errno=True)
place = folder + b"/ \\xff \\\\040\\n\\r - x"
for source, kind, target, words in (
    (b"", b"tmpfs", folder, None),
    (b"", kind, place, None if kind == b"cgroup2" else b"memory"),
):
    os.makedirs(target, exist_ok=True)
    if libc.mount(source, target, kind, 0, words):
        sys.exit(f"mount {kind}: {os.strerror(ctypes.get_errno())}")
os.execv(sys.executable, [sys.executable, "-I", "-S", *sys.argv[3:]])
"""
CGROUP_PLACES = """\
if __name__ == "__main__":
    print(json.dumps([os.fsencode(place).hex() for place, _ in possible_cgroups()]))
"""


@as_root
@pytest.mark.parametrize("kind", ["cgroup2", "cgroup"])
def test_a_hierarchy_is_found_whatever_its_mount_is_called(tmp_path: Path, kind: str) -> None:
    program = tmp_path / "program"
    program.write_text(INSIDE[: INSIDE.index('if __name__ == "__main__":')] + CGROUP_PLACES)
    done = subprocess.run(
        ["unshare", "--mount", sys.executable, "-c", ODD_MOUNTS, tmp_path / "m", kind, program],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if done.stderr.startswith("mount "):
        pytest.skip(f"takes the mount of a hierarchy: {done.stderr}")

    places = [bytes.fromhex(place) for place in json.loads(done.stdout)]

    assert os.fsencode(tmp_path) + b"/m/ \xff \\040\n\r - x" in places


@pytest.mark.parametrize(
    ("root", "own", "expected"),
    [
        ("/", "/user.slice/app.slice/run.scope", ["/user.slice/app.slice/run.scope"]),
        ("/box", "/box/ours", ["/ours"]),
        ("/box", "/elsewhere", []),
        ("/", "/../ours", []),
        ("/", "/", []),
        ("/", "", []),
    ],
)
def test_a_group_is_tried_in_our_own_and_in_all_above_it(
    root: str, own: str, expected: list[str]
) -> None:
    places = inside.own_and_above(Path("/cg"), Path(root), own)

    assert list(map(str, places[:1] if expected else [])) == [f"/cg{path}" for path in expected]
    assert places[-1] == Path("/cg")
    assert all(above == below.parent for below, above in pairwise(places))


def test_what_cannot_be_read_is_no_traceback() -> None:
    broken = 'def try_bridge():\n    b"\\xff".decode()'

    _, evidence = run_inside(
        "bridge", text=inside_with(broken).replace("TRIES[what]", "0, try_bridge")
    )

    assert "can't decode byte 0xff" in evidence


PROBE_WITHIN_LIMITS = """
import asyncio, json, sys
from pathlib import Path
from pytest_vmsandbox.host.facts import Capability, Tier
from pytest_vmsandbox.host.probes.user_namespaces import probe_user_namespaces
from pytest_vmsandbox.host.probes.within import probe_within
from pytest_vmsandbox.host.trial import start_trial
trial = start_trial(run_dir=Path("/tmp"))
if sys.argv[1] == "user_namespaces":
    fact = asyncio.run(probe_user_namespaces(trial))
else:
    fact = asyncio.run(probe_within(trial, Capability(sys.argv[1]), tier=Tier.ROOT, remedy="x"))
print(json.dumps([fact.present, fact.code, fact.evidence, fact.remedy]))
"""


@pytest.mark.parametrize(
    ("limit", "capability", "code"),
    [
        ("max_user_namespaces", "user_namespaces", "VMS-USER-NAMESPACES-UNUSABLE"),
        ("max_mnt_namespaces", "user_namespaces", "VMS-USER-NAMESPACES-UNUSABLE"),
        ("max_mnt_namespaces", "jail", "VMS-JAIL-UNUSABLE"),
        ("max_pid_namespaces", "jail", "VMS-JAIL-UNUSABLE"),
        ("max_net_namespaces", "bridge", "VMS-BRIDGE-UNUSABLE"),
        ("max_net_namespaces", "tap", "VMS-TAP-UNUSABLE"),
    ],
)
def test_a_limit_of_no_namespaces_is_felt(limit: str, capability: str, code: str) -> None:
    # The limit is set in a user namespace of this test's own (namespaces(7)), not on the host.
    inside = f'echo 0 >/proc/sys/user/{limit} && exec "$0" -c "$1" "$2"'
    done = subprocess.run(
        [
            *("unshare", "--user", "--map-root-user", "sh", "-c", inside),
            *(sys.executable, PROBE_WITHIN_LIMITS, capability),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"takes user namespaces: {done.stderr.strip()[-200:]}")

    present, found_code, evidence, remedy = json.loads(done.stdout)

    assert not present
    assert found_code == code
    assert "No space left on device" in evidence  # ENOSPC is what unshare(2) says
    if limit == "max_user_namespaces":
        assert remedy == "sudo sysctl -w user.max_user_namespaces=15000"


@pytest.mark.parametrize(
    "printed", [b"", b"nonsense", b"[]", b'{"verdict": "fine", "evidence": ""}', b'{"verdict": 1}']
)
def test_a_report_that_is_none_proves_nothing(printed: bytes) -> None:
    verdict, _ = parse_report(printed)

    assert verdict is Verdict.UNUSABLE
