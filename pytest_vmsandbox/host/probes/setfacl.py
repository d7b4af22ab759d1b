"""Whether an access control entry sticks in the run directory: set, and read back."""

from __future__ import annotations

from pytest_vmsandbox.host.facts import Capability, Fact, Verdict, fact_of
from pytest_vmsandbox.host.trial import Trial, failed, unsupported
from pytest_vmsandbox.host.unnamed_file import STDIN, open_unnamed_file

_REMEDY = "vmsandbox setup (apt-get install acl); or --vm-run-dir on ext4, xfs, btrfs or tmpfs"


async def probe_setfacl(trial: Trial) -> Fact:
    """The program can be there and the file system refuse, so only reading back counts."""
    if not trial.platform.is_linux:
        return unsupported(Capability.SETFACL, trial.platform)
    for program in ("setfacl", "getfacl"):
        if trial.find(program) is None:
            evidence = f"no program {program}"
            return fact_of(Capability.SETFACL, Verdict.MISSING, evidence=evidence, remedy=_REMEDY)
    try:
        return await _set_and_read_back(trial)
    except OSError as error:
        evidence = f"nothing can be made in {trial.run_dir}: {error}"
        return fact_of(Capability.SETFACL, Verdict.UNUSABLE, evidence=evidence, remedy=_REMEDY)


async def _set_and_read_back(trial: Trial) -> Fact:
    # Our own uid: in a user namespace no other can be named.
    entry = f"user:{trial.uid}:rw-"
    deadline = trial.begin()
    with open_unnamed_file(within=trial.run_dir) as file:
        set_it = await trial.run(
            ["setfacl", "-m", entry, "--", STDIN], stdin=file, deadline=deadline
        )
        if not set_it.ok:
            return failed(Capability.SETFACL, set_it, remedy=_REMEDY)
        got_it = await trial.run(
            ["getfacl", "--numeric", "--absolute-names", "--", STDIN], stdin=file, deadline=deadline
        )
    if not got_it.ok:
        return failed(Capability.SETFACL, got_it, remedy=_REMEDY)
    if entry not in got_it.text.splitlines():
        evidence = f"{entry} was set in {trial.run_dir} and did not stick"
        return fact_of(Capability.SETFACL, Verdict.UNUSABLE, evidence=evidence, remedy=_REMEDY)
    evidence = f"an entry was set and read back in {trial.run_dir}"
    return fact_of(Capability.SETFACL, Verdict.OK, evidence=evidence)
