"""Removal of what another user has left, by that user's rights: it leads root nowhere."""

from __future__ import annotations

import pwd
import subprocess
from pathlib import Path

from pytest_vmsandbox.linux import mounts_at_or_below, read_mountinfo


def remove_as(owner: pwd.struct_passwd, path: Path) -> str:
    """Remove what is at `path` as its owner, whom `userdel` may have removed before; we are root.

    What stays there, and why: nothing as a rule. Where something is mounted, all of it stays; so
    does what is not the owner's.
    """
    if mounted := mounts_at_or_below(read_mountinfo(), path):
        return f"{path}: {mounted[0].mount_point} is mounted"
    is_folder = path.is_dir() and not path.is_symlink()
    if is_folder:  # a test may have closed a folder in it to its owner
        _call_as(owner, "chmod", "-R", "u+rwX", "--", path)
    complaint = _call_as(owner, "rm", "-rf", "--one-file-system", "--", path)
    # Where the folder around it is root's, the last entry is for root, and nothing below it.
    try:
        path.rmdir() if is_folder else path.unlink()
    except FileNotFoundError:
        pass
    except OSError as error:
        return f"{path}: {error.strerror}; {complaint}"
    return ""


def _call_as(owner: pwd.struct_passwd, *argv: str | Path) -> str:
    ids = (f"--reuid={owner.pw_uid}", f"--regid={owner.pw_gid}", "--clear-groups")
    done = subprocess.run(
        ["setpriv", *ids, "--inh-caps=-all", "--", *argv],
        cwd="/",
        capture_output=True,
        text=True,
        errors="backslashreplace",
        timeout=60,
        check=False,
    )
    return done.stderr.strip()
