"""Where run directories may lie on this host: our own bases, and as root those of others."""

from __future__ import annotations

import os
import re
from pathlib import Path

_SHARED_TEMPORARY = Path("/tmp")  # noqa: S108  # a base in it is looked at as its owner
_RUNTIME = Path("/run/user")
_BASE_OF = re.compile(r"vmsandbox-(?P<uid>0|[1-9][0-9]{0,9})", re.ASCII)
_UID = re.compile(r"0|[1-9][0-9]{0,9}", re.ASCII)


def default_base() -> Path:
    """Where run directories go unless `--vm-run-dir` says otherwise: short, and only ours."""
    if os.getuid() == 0:
        return Path("/run/vmsandbox")
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and os.access(runtime, os.W_OK) and Path(runtime).is_dir():
        return Path(runtime) / "vmsandbox"
    return _base_in_tmp(os.getuid())  # whose owner and mode are checked where it is made


def settled(base: Path) -> Path:
    """`base` as it is called everywhere from now on: absolute, and no link leads to it.

    It may be one itself; whoever uses it refuses that.
    """
    return Path(os.path.realpath(base.absolute().parent), base.name)


def own_bases() -> list[Path]:
    """The bases that our runs have by default: which one depends on how the session began."""
    uid = os.getuid()
    others = () if uid == 0 else (_RUNTIME / str(uid) / "vmsandbox", _base_in_tmp(uid))
    return list(dict.fromkeys((default_base(), *others)))


def bases_to_reap(base: Path) -> list[Path]:
    """What a run at `base`, which is settled, reaps: that, and if it is a default, the others too.

    A run that had `--vm-run-dir` has nothing to do with them.
    """
    ours = [settled(each) for each in own_bases()]
    return [base, *(each for each in ours if each != base)] if base in ours else [base]


def bases_of_others() -> list[tuple[int, Path]]:
    """The bases that other users have by default, each with the uid that it must belong to.

    Only names and owners are looked at. Whoever goes on does so in that user's place
    (`call_as_user`): what is in there, and what it leads to, is theirs to choose.
    """
    in_tmp = [
        (int(name["uid"]), path, path)
        for path in _entries(_SHARED_TEMPORARY)
        if (name := _BASE_OF.fullmatch(path.name))
    ]
    in_runtime = [
        (int(path.name), path, path / "vmsandbox")
        for path in _entries(_RUNTIME)
        if _UID.fullmatch(path.name)
    ]
    return [
        (uid, base)
        for uid, owned, base in [*in_tmp, *in_runtime]
        if uid != os.getuid() and _belongs_to(owned, uid)
    ]


def _base_in_tmp(uid: int) -> Path:
    return _SHARED_TEMPORARY / f"vmsandbox-{uid}"


def _entries(directory: Path) -> list[Path]:
    return sorted(directory.iterdir()) if directory.is_dir() else []


def _belongs_to(path: Path, uid: int) -> bool:
    try:
        return path.lstat().st_uid == uid
    except OSError:
        return False
