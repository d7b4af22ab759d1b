"""Files: what of the host can be read or written, and ways to climb out of the view."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path

from tests.escape.attempts.calls import LIBC, checked, libc
from tests.escape.attempts.table import Refused, Targets, attempt


def _read(path: str) -> str:
    with open(path, "rb") as file:
        return f"read {len(file.read(4096))} bytes of {path}"


def _listed(path: str) -> str:
    return f"{path} has {len(os.listdir(path))} entries"


def _first(paths: Iterable[str]) -> str:
    """Read the first of these that can be read; the last error where none can."""
    last: OSError = FileNotFoundError(2, "none")
    for path in paths:
        try:
            return _read(path)
        except OSError as error:
            last = error
    raise last


def _can_write(path: str) -> str:
    os.close(os.open(path, os.O_WRONLY))
    return f"{path} is open for writing"


def _made_and_removed(path: str) -> str:
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    os.unlink(path)
    return f"made {path}"


@attempt("read /etc/shadow")
def shadow(targets: Targets) -> str:
    return _read("/etc/shadow")


@attempt("read /etc/passwd")
def passwd(targets: Targets) -> str:
    return _read("/etc/passwd")


@attempt("read a file of the owner's that nobody else may read")
def secret(targets: Targets) -> str:
    return _read(targets.secret)


@attempt("list /root")
def home_of_root(targets: Targets) -> str:
    return _listed("/root")


@attempt("list /home")
def homes(targets: Targets) -> str:
    return _listed("/home")


@attempt("list /tmp")
def temporary_files(targets: Targets) -> str:
    return _listed("/tmp")


@attempt("list /run")
def run(targets: Targets) -> str:
    return _listed("/run")


@attempt("list /var")
def var(targets: Targets) -> str:
    return _listed("/var")


@attempt("list /sys")
def sys(targets: Targets) -> str:
    return _listed("/sys")


@attempt("read the checkout")
def checkout(targets: Targets) -> str:
    return _read(f"{targets.checkout}/pyproject.toml")


@attempt("list the run directory")
def run_directory(targets: Targets) -> str:
    return _listed(targets.run_directory)


@attempt("read the files of the other machine, and of another worker's")
def neighbours_files(targets: Targets) -> str:
    roots = ("", *(f"/proc/{pid}/root" for pid in targets.neighbours))
    return _first(f"{root}{path}" for root in roots for path in targets.neighbour_files)


@attempt("read the environment of the process that runs the tests")
def environment(targets: Targets) -> str:
    return _read(f"/proc/{targets.driver}/environ")


@attempt("make a file in /usr")
def write_usr(targets: Targets) -> str:
    return _made_and_removed("/usr/vmsandbox-was-here")


@attempt("make a file in /")
def write_root(targets: Targets) -> str:
    return _made_and_removed("/vmsandbox-was-here")


@attempt("open a setting of the kernel in /proc/sys for writing", by_host=True)
def write_proc_sys(targets: Targets) -> str:
    return _can_write("/proc/sys/kernel/core_pattern")


@attempt("open /proc/sysrq-trigger for writing", by_host=True)
def sysrq(targets: Targets) -> str:
    return _can_write("/proc/sysrq-trigger")


@attempt("write to a file of its own in /proc")
def write_proc_self(targets: Targets) -> str:
    with open("/proc/self/oom_score_adj", "r+") as file:
        now = file.read()
        file.seek(0)
        file.write(now)
    return "wrote oom_score_adj"


@attempt("open the members of a control group for writing", by_host=True)
def control_groups(targets: Targets) -> str:
    with open("/proc/self/mountinfo") as file:
        groups = [line.split()[4] for line in file if " - cgroup" in line]
    for group in groups:
        try:
            return _can_write(f"{group}/cgroup.procs")
        except OSError:
            continue
    raise Refused("no control group that it may write")


@attempt("read the secret by a path with 40 times `..`")
def climb_by_dots(targets: Targets) -> str:
    os.chdir(targets.room)
    return _first(("../" * 40 + targets.secret[1:], "/" + "../" * 40 + targets.secret[1:]))


@attempt("read the secret through /proc/N/root and /proc/N/cwd of all that it knows of")
def climb_by_proc(targets: Targets) -> str:
    pids = ("1", "self", "thread-self", targets.driver, targets.victim, targets.warden)
    links = ("root", "cwd/" + "../" * 40)
    return _first(f"/proc/{pid}/{link}{targets.secret}" for pid in pids for link in links)


@attempt("leave by chroot into a folder, and `..` from outside it")
def climb_by_chroot(targets: Targets) -> str:
    outside = os.open("/", os.O_RDONLY)
    inner = f"{targets.room}/inner"
    os.makedirs(inner, exist_ok=True)
    os.chroot(inner)
    os.fchdir(outside)
    return _read("../" * 40 + targets.secret[1:])


@attempt("read the secret through a symbolic link that it makes in its room")
def climb_by_symlink(targets: Targets) -> str:
    link = f"{targets.room}/made"
    os.symlink(targets.secret, link)
    try:
        return _read(link)
    finally:
        os.unlink(link)


@attempt("read the secret through a symbolic link that was planted in its directory before")
def climb_by_planted_symlink(targets: Targets) -> str:
    return _read(f"{targets.room}/{targets.planted}")


@attempt("make a hard link to the secret")
def hard_link(targets: Targets) -> str:
    link = f"{targets.room}/hard"
    os.link(targets.secret, link)
    os.unlink(link)
    return "made it"


@attempt("open the secret by its file handle", by_host=True)
def file_handle(targets: Targets) -> str:
    handle = bytes.fromhex(targets.secret_handle)
    last: OSError = OSError(0, "nothing tried")
    for place in (str(Path(targets.secret).parent), "/usr", "/", targets.room):
        try:
            mount = os.open(place, os.O_RDONLY)
            fd = checked("open_by_handle_at", LIBC.open_by_handle_at(mount, handle, os.O_RDONLY))
            return f"read {os.read(fd, 100)!r}"
        except OSError as error:
            last = error
    raise last


@attempt("change the mode of its own program")
def own_program(targets: Targets) -> str:
    mode = stat.S_IMODE(os.stat("/proc/self/exe").st_mode)
    os.chmod("/proc/self/exe", mode)
    return "set it to what it was"


@attempt("make a block device and a character device")
def device_nodes(targets: Targets) -> str:
    for kind, device in ((stat.S_IFBLK, os.makedev(8, 0)), (stat.S_IFCHR, os.makedev(1, 1))):
        node = f"{targets.room}/node"
        os.mknod(node, kind | 0o600, device)
        os.unlink(node)
    return "made both"


@attempt("change what lies under /dev", by_host=True)
def devices_mode(targets: Targets) -> str:
    mode = stat.S_IMODE(os.stat("/dev/null").st_mode)
    libc("chmod", b"/dev/null", mode)
    return "set the mode of /dev/null to what it was"
