"""OpenSSH's server, of the host's own package sources, as a tree to be pushed into a guest.

Kept in the user's cache: apt is asked once on a host.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock

from pytest_vmsandbox import Machine
from pytest_vmsandbox.deadline import Deadline
from pytest_vmsandbox.image.apt import Apt, Package, open_apt
from pytest_vmsandbox.image.programs import Program
from pytest_vmsandbox.image.recipe import DEBIAN_ARCHITECTURES, host_architecture
from tests.machine.templates.template_caches import USERS

# Of all that it depends on: its own parts, and libraries.
_WANTED = re.compile(r"(openssh-|lib|zlib).*")

PROGRAMS = ("usr/sbin/sshd", "usr/bin/ssh-keygen", "usr/lib/openssh/sftp-server")
NEWER_PROGRAMS = ("usr/lib/openssh/sshd-session", "usr/lib/openssh/sshd-auth")

CONFIGURATION = """\
UsePAM no
PasswordAuthentication no
HostKey /etc/ssh/ssh_host_ed25519_key
Subsystem sftp /usr/lib/openssh/sftp-server
"""


def sshd_tree() -> Path:
    """Where it is: made, by whoever comes first; HostUnfit where the packages can't be had."""
    place = USERS / "sshd-for-tests"
    if place.exists():
        return place
    USERS.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{place}.lock"):
        if not place.exists():
            with tempfile.TemporaryDirectory(dir=USERS, prefix="sshd-") as scratch:
                _make(Path(scratch)).rename(place)
    return place


def start_sshd(vm: Machine, tree: Path) -> None:
    """Put it into a guest, with a host key of its own, and start it."""
    for part in sorted(tree.iterdir()):
        vm.push(part, f"/{part.name}")
    vm.run("mkdir -p /etc/ssh /run/sshd", check=True)
    vm.run("echo sshd:x:101:65534::/run/sshd:/bin/false >> /etc/passwd", check=True)
    vm.write_text("/etc/ssh/sshd_config", CONFIGURATION)
    key = "/etc/ssh/ssh_host_ed25519_key"
    vm.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    # A child of pid 1 that leads its session takes itself for a daemon already, and stays.
    vm.popen(["/usr/sbin/sshd", "-D"])
    vm.wait_for_port(22)


def _make(scratch: Path) -> Path:
    deadline = Deadline.after(seconds=240)
    whole = scratch / "whole"
    (scratch / "packages").mkdir()
    with open_apt(
        scratch / "apt", architecture=DEBIAN_ARCHITECTURES[host_architecture()], deadline=deadline
    ) as apt:
        packages = _with_libraries(apt)
        apt.download(packages, scratch / "packages")
    dpkg_deb = Program.find("dpkg-deb")
    for package in packages:
        file = scratch / "packages" / package.file_name
        dpkg_deb.run(["--extract", file, whole], deadline=deadline)
    return _picked(whole, scratch / "picked")


def _with_libraries(apt: Apt) -> list[Package]:
    found: dict[str, Package] = {}
    unread = ["openssh-server"]
    while unread:
        stanzas = apt._show(unread)
        found |= {stanza.package.name: stanza.package for stanza in stanzas}
        named = {name for stanza in stanzas for name in stanza.depends}
        unread = sorted(name for name in named - set(found) if _WANTED.fullmatch(name))
    return list(found.values())


def _picked(whole: Path, into: Path) -> Path:
    """Only the programs, and the libraries that they are linked with, where the loader looks."""
    newer = [name for name in NEWER_PROGRAMS if (whole / name).exists()]
    programs = [whole / name for name in (*PROGRAMS, *newer)]
    for path in programs:
        _copy(path, into / path.relative_to(whole))
    (loader,) = (path for path in whole.glob("**/ld-linux-*.so.*") if path.parent.parent != whole)
    for program in programs:
        for library in _libraries(program, loader, whole):
            _copy(library, into / "lib" / loader.parent.name / library.name)
    # Where programs say that their interpreter is: /lib64 on x86-64, /lib elsewhere.
    _copy(loader, into / ("lib64" if "x86-64" in loader.name else "lib") / loader.name)
    return into


def _libraries(program: Path, loader: Path, whole: Path) -> Iterator[Path]:
    """What the loader would load, as it says itself: it is of this architecture."""
    folders = {str(path) for path in whole.glob(f"**/{loader.parent.name}")}
    listed = subprocess.run(
        [loader, "--library-path", ":".join(sorted(folders)), "--list", program],
        capture_output=True,
        text=True,
        check=True,
    )
    for found in re.findall(r"=> (/\S+)", listed.stdout):
        assert Path(found).is_relative_to(whole), listed.stdout
        yield Path(found)


def _copy(path: Path, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, to)
    to.chmod(0o755)
