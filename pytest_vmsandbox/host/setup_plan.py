"""The plan of `vmsandbox setup`: small steps, each of which says what it is and how it is done.

Steps are commands with their input, so that one and the same plan can be shown (`--dry-run`),
performed by root, performed through sudo, or handed to an administrator.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath

from pytest_vmsandbox.host.permissions import QEMU_VM_USER
from pytest_vmsandbox.host.setup_record import RECORD, SetupRecord

# Beside QEMU's own, which the processor decides.
PACKAGES = ("acl", "sudo", "uidmap", "e2fsprogs")

SUDOERS_FILE = "/etc/sudoers.d/vmsandbox"
UDEV_FILE = "/etc/udev/rules.d/65-vmsandbox-kvm.rules"

# In the user's GECOS field: by it we know the user that we made.
MADE_BY_US = "made by vmsandbox setup"

# With this a step's command says that something is not ours, and that it left it as it is.
NOT_OURS_STATUS = 3

# $1: where to; $2: the SHA-256 of what we wrote there last time, or nothing; $3: the mode;
# from $4: a command that must accept the draft. Sudo and udev pass over the draft, by its name.
_WRITE = """\
set -eu
target=$1 known=$2 mode=$3; shift 3
draft=${target%/*}/.${target##*/}.draft
if [ -e "$target" ] && [ "$(sha256sum <"$target")" != "$known  -" ]; then
  echo "$target is there and is not what vmsandbox setup wrote; left as it is" >&2; exit 3
fi
mkdir -p "${target%/*}"
trap 'rm -f "$draft"' EXIT
install -m "$mode" /dev/stdin "$draft"
[ $# = 0 ] || "$@" "$draft"
mv "$draft" "$target"
"""

_REMOVE = """\
set -eu
[ -e "$1" ] || exit 0
if [ "$(sha256sum <"$1")" != "$2  -" ]; then
  echo "$1 is not what vmsandbox setup wrote; left as it is" >&2; exit 3
fi
rm -f -- "$1"
"""

_REMOVE_USER = """\
set -eu
entry=$(getent passwd "$1") || exit 0
case $entry in
  *:"$2":*) userdel "$1" ;;
  *) echo "user $1 was not made by vmsandbox setup; left as it is" >&2; exit 3 ;;
esac
"""

# A host without udev (a container) has no daemon to tell; the list is then set on the device.
_OPEN_KVM = """\
set -eu
[ -e /dev/kvm ] || exit 0
setfacl -m "$1" /dev/kvm
! command -v udevadm >/dev/null || udevadm control --reload-rules 2>/dev/null || true
"""

_CLOSE_KVM = """\
set -eu
! command -v udevadm >/dev/null || udevadm control --reload-rules 2>/dev/null || true
[ -e /dev/kvm ] || exit 0
setfacl -x "$1" /dev/kvm
getfacl -cp /dev/kvm | grep -Eq '^(user|group):[^:]' || setfacl -b /dev/kvm
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One command for root, with what it reads."""

    argv: tuple[str, ...]
    stdin: str = ""

    def __str__(self) -> str:
        line = shlex.join(self.argv)
        return f"{line} <<'END'\n{self.stdin}END" if self.stdin else line


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One thing to do: a sentence, the commands, and the record that goes with it.

    In a setup the record is written before the commands, in an undo after them. `files` are those
    that it writes or removes, with the SHA-256 that each may have by then ("": none, it must not
    be there).
    """

    sentence: str
    commands: tuple[Command, ...]
    record: SetupRecord
    files: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.sentence


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """How the host stands: what a plan depends on.

    `installing` are all packages that installing `missing_packages` brings; `has_apt` is False on
    other distributions, where they can only be named.
    """

    missing_packages: tuple[str, ...] = ()
    installing: tuple[str, ...] = ()
    has_apt: bool = True
    has_user: bool = False
    has_kvm: bool = False
    record: SetupRecord = field(default_factory=SetupRecord)
    ours_in_place: Collection[str] = ()  # files of the record that are there, as recorded


def plan_setup(standing: Standing, *, user: str | None) -> tuple[Step, ...]:
    """The steps that are still to be done, in order; none when all is done.

    `user` is who shall run tests, None where that is root alone.
    """
    steps: list[Step] = []
    record = standing.record
    if standing.missing_packages and standing.has_apt:
        added = (name for name in standing.installing if name not in record.packages)
        record = replace(record, packages=(*record.packages, *added))
        steps.append(_install(standing.missing_packages, record))
    if not standing.has_user:
        record = replace(record, made_user=True)
        steps.append(_make_user(record))
    if user is not None:
        users = _with(record.sudo_users, user)
        content = render_sudoers(users)
        if _is_to_write(SUDOERS_FILE, content, standing):
            known = record.files.get(SUDOERS_FILE, "")
            files = record.with_file(SUDOERS_FILE, content)
            record = replace(record, sudo_users=users, files=files)
            steps.append(_allow_sudo(user, content, known=known, record=record))
    if standing.has_kvm:
        users = _with(record.kvm_users, QEMU_VM_USER)
        users = users if user is None else _with(users, user)
        content = render_udev_rule(users)
        if _is_to_write(UDEV_FILE, content, standing):
            known = record.files.get(UDEV_FILE, "")
            files = record.with_file(UDEV_FILE, content)
            record = replace(record, kvm_users=users, files=files)
            steps.append(_open_kvm(users, content, known=known, record=record))
    return tuple(steps)


def plan_undo(record: SetupRecord) -> tuple[Step, ...]:
    """The steps that take back what the record says, last done first."""
    steps: list[Step] = []
    for undoing in UNDOINGS:
        step = undoing(record)
        if step is not None:
            steps.append(step)
            record = step.record
    return tuple(steps)


def _close_kvm(record: SetupRecord) -> Step | None:
    if UDEV_FILE not in record.files:
        return None
    names = ",".join(f"u:{user}" for user in record.kvm_users)
    return Step(
        sentence=f"remove {UDEV_FILE}, and {names} from /dev/kvm",
        commands=(_remove(UDEV_FILE, record), _script(_CLOSE_KVM, names)),
        record=replace(record, kvm_users=(), files=_without(record, UDEV_FILE)),
        files={UDEV_FILE: record.files[UDEV_FILE]},
    )


def _forbid_sudo(record: SetupRecord) -> Step | None:
    if SUDOERS_FILE not in record.files:
        return None
    return Step(
        sentence=f"remove {SUDOERS_FILE}",
        commands=(_remove(SUDOERS_FILE, record),),
        record=replace(record, sudo_users=(), files=_without(record, SUDOERS_FILE)),
        files={SUDOERS_FILE: record.files[SUDOERS_FILE]},
    )


def _remove_user(record: SetupRecord) -> Step | None:
    if not record.made_user:
        return None
    return Step(
        sentence=f"remove the user {QEMU_VM_USER}",
        commands=(_script(_REMOVE_USER, QEMU_VM_USER, MADE_BY_US),),
        record=replace(record, made_user=False),
    )


def _remove_packages(record: SetupRecord) -> Step | None:
    if not record.packages:
        return None
    return Step(
        sentence=f"remove the packages {' '.join(record.packages)}",
        # dpkg refuses where somebody else's package needs one of them, and apt would remove that.
        commands=(Command(argv=("dpkg", "--purge", *record.packages)),),
        record=replace(record, packages=()),
    )


# Each takes back one thing that the record says, where it says it; last done first.
UNDOINGS: tuple[Callable[[SetupRecord], Step | None], ...] = (
    *(_close_kvm, _forbid_sudo, _remove_user, _remove_packages),
)


def record_after_failure(
    before: SetupRecord, step: Step, *, left_alone: bool, on_host: Callable[[str], bool]
) -> SetupRecord:
    """What is to be on record after a step of a setup failed: no more than may have been done.

    Nothing of a step that left what it met as it was. Of packages, those on the host now: they
    were not when the step was planned.
    """
    if left_alone:
        return before
    added = [name for name in step.record.packages if name not in before.packages]
    brought = tuple(name for name in added if on_host(name))
    return replace(step.record, packages=(*before.packages, *brought))


def render_sudoers(users: Sequence[str]) -> str:
    """The sudoers lines: each user may become qemu-vm, and nobody else (sudoers(5))."""
    lines = [f"{user} ALL=({QEMU_VM_USER}) NOPASSWD: ALL" for user in users]
    return "\n".join(
        ["# Written by vmsandbox setup; vmsandbox setup --undo removes it.", *lines, ""]
    )


def render_udev_rule(users: Sequence[str]) -> str:
    """The udev rule that lets these users, not the world, open /dev/kvm (udev(7))."""
    return (
        "# Written by vmsandbox setup; vmsandbox setup --undo removes it.\n"
        f'KERNEL=="kvm", RUN+="/usr/bin/setfacl -m {_entries(users)} /dev/kvm"\n'
    )


def command_to_record(record: SetupRecord) -> Command:
    """Write the record, or remove it with its folder when there is nothing left to undo."""
    if record.empty:
        folder = PurePosixPath(RECORD).parent
        return _script('rm -f -- "$1" && rmdir -- "$2"', str(RECORD), str(folder))
    argv = ("install", "-D", "-m", "0644", "/dev/stdin", str(RECORD))
    return Command(argv=argv, stdin=record.to_json())


def _install(names: Sequence[str], record: SetupRecord) -> Step:
    argv = (
        *("env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-o", "DPkg::Lock::Timeout=120"),
        *("install", "--yes", "--no-install-recommends", *names),
    )
    sentence = f"install the packages {' '.join(names)}"
    return Step(sentence=sentence, commands=(Command(argv=argv),), record=record)


def _make_user(record: SetupRecord) -> Step:
    argv = (
        *("useradd", "--system", "--user-group", "--no-create-home"),
        *("--home-dir", "/nonexistent", "--shell", "/usr/sbin/nologin"),
        *("--comment", MADE_BY_US, QEMU_VM_USER),
    )
    sentence = f"make the system user {QEMU_VM_USER}, without shell or home"
    return Step(sentence=sentence, commands=(Command(argv=argv),), record=record)


def _allow_sudo(user: str, content: str, *, known: str, record: SetupRecord) -> Step:
    accepted_by = ("visudo", "-q", "-c", "-f")
    command = _script(_WRITE, SUDOERS_FILE, known, "0440", *accepted_by, stdin=content)
    sentence = f"let {user} run commands as {QEMU_VM_USER}: {SUDOERS_FILE}"
    return Step(sentence=sentence, commands=(command,), record=record, files={SUDOERS_FILE: known})


def _open_kvm(users: Sequence[str], content: str, *, known: str, record: SetupRecord) -> Step:
    commands = (
        _script(_WRITE, UDEV_FILE, known, "0644", stdin=content),
        _script(_OPEN_KVM, _entries(users)),
    )
    sentence = f"let {' and '.join(users)} open /dev/kvm: {UDEV_FILE}"
    return Step(sentence=sentence, commands=commands, record=record, files={UDEV_FILE: known})


def _remove(path: str, record: SetupRecord) -> Command:
    return _script(_REMOVE, path, record.files[path])


def _script(text: str, *arguments: str, stdin: str = "") -> Command:
    return Command(argv=("sh", "-c", text, "sh", *arguments), stdin=stdin)


def _entries(users: Sequence[str]) -> str:
    return ",".join(f"u:{user}:rw" for user in users)


def _with(users: tuple[str, ...], user: str) -> tuple[str, ...]:
    return users if user in users else (*users, user)


def _without(record: SetupRecord, path: str) -> dict[str, str]:
    return {other: digest for other, digest in record.files.items() if other != path}


def _is_to_write(path: str, content: str, standing: Standing) -> bool:
    as_recorded = standing.record.files == standing.record.with_file(path, content)
    return not (as_recorded and path in standing.ours_in_place)
