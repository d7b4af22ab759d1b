"""Whether images can be built here: apt's lists, dpkg-deb and mke2fs, each put to use."""

from __future__ import annotations

from pathlib import Path

from pytest_vmsandbox.host.facts import Capability, Fact, Verdict, fact_of
from pytest_vmsandbox.host.scratch import open_scratch
from pytest_vmsandbox.host.trial import Trial, failed, unsupported

_REMEDY = "vmsandbox setup on Debian or Ubuntu; elsewhere --vm-image=DIR with an image made there"
_PROGRAMS = ("apt-get", "dpkg-deb", "mke2fs")
_CONTROL = "Package: probe\nVersion: 1\nArchitecture: all\nMaintainer: probe\nDescription: probe\n"


async def probe_image_builder(trial: Trial) -> Fact:
    """Name apt's sources with a private state, pack and unpack a package, fill a file system."""
    if not trial.platform.is_linux:
        return unsupported(Capability.IMAGE_BUILDER, trial.platform)
    for program in _PROGRAMS:
        if trial.find(program) is None:
            evidence = f"no program {program}"
            return fact_of(
                Capability.IMAGE_BUILDER, Verdict.MISSING, evidence=evidence, remedy=_REMEDY
            )
    deadline = trial.begin()
    with open_scratch() as scratch:
        for argv in _miniature(scratch):
            outcome = await trial.run(argv, deadline=deadline)
            if not outcome.ok:
                return failed(Capability.IMAGE_BUILDER, outcome, remedy=_REMEDY)
            if argv[0] == "apt-get" and not outcome.text.strip():
                return fact_of(
                    Capability.IMAGE_BUILDER,
                    Verdict.UNUSABLE,
                    evidence="apt-get knows no package source (update --print-uris is empty)",
                    remedy="add a source to /etc/apt/sources.list.d",
                )
        if not (scratch / "unpacked/file").is_file():
            evidence = "dpkg-deb unpacked nothing of what it had packed"
            return fact_of(
                Capability.IMAGE_BUILDER, Verdict.UNUSABLE, evidence=evidence, remedy=_REMEDY
            )
    evidence = "apt-get knows sources; dpkg-deb and mke2fs did their work in miniature"
    return fact_of(Capability.IMAGE_BUILDER, Verdict.OK, evidence=evidence)


def _miniature(scratch: Path) -> list[list[str]]:
    """Prepare a package tree, and say what is to be run on it."""
    tree, package = scratch / "tree", scratch / "probe.deb"
    control = tree / "DEBIAN/control"
    control.parent.mkdir(parents=True)
    tree.chmod(0o755)  # dpkg-deb refuses a tree that others may not read
    control.parent.chmod(0o755)
    control.write_text(_CONTROL, encoding="ascii")
    (tree / "file").write_text("x", encoding="ascii")
    private = (f"Dir::State={scratch}/apt", f"Dir::Cache={scratch}/apt")
    options = [word for option in private for word in ("-o", option)]
    return [
        ["apt-get", *options, "update", "--print-uris"],
        ["dpkg-deb", "-Znone", "--root-owner-group", "--build", str(tree), str(package)],
        ["dpkg-deb", "--extract", str(package), str(scratch / "unpacked")],
        ["mke2fs", "-q", "-t", "ext4", "-d", str(tree), str(scratch / "disk"), "1M"],
    ]
