"""What `vmsandbox setup` did to this host, so that `--undo` undoes that and nothing else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

RECORD = Path("/var/lib/vmsandbox/setup.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class SetupRecord:
    """Each thing is recorded before it is done: undoing what was not done must do no harm.

    `packages` are those that were not installed before, dependencies included. `files` are ours,
    each with the SHA-256 of what we wrote. `sudo_users` may run as qemu-vm, `kvm_users` may open
    /dev/kvm. `made_user` is True where we made qemu-vm.
    """

    packages: tuple[str, ...] = ()
    made_user: bool = False
    files: Mapping[str, str] = field(default_factory=dict)
    sudo_users: tuple[str, ...] = ()
    kvm_users: tuple[str, ...] = ()

    @property
    def empty(self) -> bool:
        """Whether there is nothing to undo."""
        return self == SetupRecord()

    def with_file(self, path: str, content: str) -> dict[str, str]:
        """`files` with one more."""
        return {**self.files, path: hashlib.sha256(content.encode()).hexdigest()}

    def to_json(self) -> str:
        """The text of the record file."""
        form = {
            "packages": self.packages,
            "made_user": self.made_user,
            "files": dict(self.files),
            "sudo_users": self.sudo_users,
            "kvm_users": self.kvm_users,
        }
        return json.dumps(form, indent=1) + "\n"


def read_setup_record(path: Path = RECORD) -> SetupRecord:
    """The record, empty where there is no file.

    OSError where it can't be read, ValueError where it is not a record; both name the path.
    """
    try:
        return parse_setup_record(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return SetupRecord()
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from error


def parse_setup_record(text: str) -> SetupRecord:
    """Read what `to_json` made; ValueError for anything else."""
    match json.loads(text):
        case {
            "packages": list(packages),
            "made_user": bool(made_user),
            "files": dict(files),
            "sudo_users": list(sudo_users),
            "kvm_users": list(kvm_users),
        }:
            return SetupRecord(
                packages=tuple(map(str, packages)),
                made_user=made_user,
                files={str(path): str(digest) for path, digest in files.items()},
                sudo_users=tuple(map(str, sudo_users)),
                kvm_users=tuple(map(str, kvm_users)),
            )
    raise ValueError("not a record of vmsandbox setup")
