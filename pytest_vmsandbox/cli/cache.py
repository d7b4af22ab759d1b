"""`vmsandbox cache`: list, verify and clear the templates that machines are restored from."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import TypedDict

from rich.console import Console

from pytest_vmsandbox.cli.arguments import add_cache_argument, cache_of
from pytest_vmsandbox.cli.progress import RichProgress
from pytest_vmsandbox.errors import RequestInvalid, visible
from pytest_vmsandbox.machine.templates.cache import Shelved, TemplateCache
from pytest_vmsandbox.machine.templates.template import OtherFormat, TemplateDamaged

_DAMAGED = "damaged"


class TemplateRow(TypedDict):
    """A template, as `--json` shows it; `digest` is the beginning that names its directory."""

    digest: str
    title: str
    base: str | None
    bytes: int
    unused_s: float
    in_use: bool
    trouble: str
    path: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare `list`, `verify` and `clear`."""
    add_cache_argument(parser)
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="the templates, the one used last at the end")
    listing.add_argument("--json", action="store_true", help="machine-readable; docs/usage.md")
    listing.set_defaults(action=_list)
    verify = actions.add_parser("verify", help="compare every byte with the manifests")
    verify.set_defaults(action=_verify)
    clear = actions.add_parser("clear", help="remove what no process uses")
    clear.add_argument("digest", nargs="?", help="only this one (its beginning will do)")
    clear.set_defaults(action=_clear)


def run(arguments: argparse.Namespace) -> int:
    """Do the action that was asked for.

    1 when `verify` found one that is damaged, or `clear` had to leave the one it was asked for.
    """
    status: int = arguments.action(arguments)
    return status


def _list(arguments: argparse.Namespace) -> int:
    cache = TemplateCache(cache_of(arguments))
    rows = [_row(cache, one, now=time.time()) for one in cache.shelved()]
    if arguments.json:
        text = json.dumps({"templates": rows}, indent=1)
    else:
        text = "\n".join(map(_render, rows)) or "no templates"
    sys.stdout.write(f"{visible(text)}\n")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    cache = TemplateCache(cache_of(arguments))
    console, damaged = Console(highlight=False, soft_wrap=True), 0
    with RichProgress(console) as progress:
        for one in cache.shelved():
            progress.step(_named(one))
            told = _judgement(cache, one, every_byte=True)
            damaged += told.startswith(_DAMAGED)
            console.print(f"{_named(one)}  {told or 'whole'}", markup=False)
            progress.forget()
    return 1 if damaged else 0


def _clear(arguments: argparse.Namespace) -> int:
    cache = TemplateCache(cache_of(arguments))
    wanted = [
        one for one in cache.shelved() if one.directory.name.startswith(arguments.digest or "")
    ]
    if arguments.digest is not None and (len(wanted) != 1 or not arguments.digest):
        found = f"{len(wanted)} templates begin with" if wanted else "no template begins with"
        raise RequestInvalid(
            f"{found} {arguments.digest!r} in {cache.directory}",
            "`vmsandbox cache list` shows them",
        )
    left = _removed_as_far_as_may_be(cache, wanted)
    if arguments.digest is None:
        cache.tidy()
    for one in left:
        sys.stdout.write(f"left {visible(_named(one))}: in use, by a process or another template\n")
    return 1 if left and arguments.digest is not None else 0


def _removed_as_far_as_may_be(cache: TemplateCache, wanted: list[Shelved]) -> list[Shelved]:
    """What is left of them; what stands on another is removed before that one."""
    while True:
        removed = [one for one in wanted if cache.remove(one.directory)]
        for one in removed:
            sys.stdout.write(f"removed {visible(_named(one))}\n")
        wanted = [one for one in wanted if one not in removed]
        if not removed or not wanted:
            return wanted


def _row(cache: TemplateCache, one: Shelved, *, now: float) -> TemplateRow:
    base = one.manifest.base if one.manifest else None
    return {
        "digest": one.directory.name,
        "title": one.manifest.title if one.manifest else "",
        "base": base.digest[: len(one.directory.name)] if base else None,
        "bytes": one.bytes,
        "unused_s": round(max(0.0, now - one.last_use), 1),
        "in_use": cache.in_use(one.directory),
        "trouble": _judgement(cache, one, every_byte=False),
        "path": str(one.directory),
    }


def _judgement(cache: TemplateCache, one: Shelved, *, every_byte: bool) -> str:
    """What is wrong with it; without `every_byte`, only what its manifest shows."""
    try:
        cache.check(one.directory, every_byte=every_byte)
    except FileNotFoundError:
        return "gone meanwhile"
    except OtherFormat:
        return "of another version of pytest-vmsandbox"
    except TemplateDamaged as damaged:
        return f"{_DAMAGED}: {damaged}"
    return ""


def _render(row: TemplateRow) -> str:
    state = "in use" if row["in_use"] else f"unused for {_duration(row['unused_s'])}"
    trouble = [row["trouble"]] if row["trouble"] else []
    base = [f"on {row['base'][:12]}"] if row["base"] else []
    size = f"{row['bytes'] / (1 << 20):7.1f} MiB"
    return "  ".join([row["digest"][:12], size, row["title"] or "?", *base, state, *trouble])


def _named(one: Shelved) -> str:
    return f"{one.directory.name[:12]}  {one.manifest.title if one.manifest else '?'}"


def _duration(seconds: float) -> str:
    for unit, length_s in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length_s:
            return f"{seconds / length_s:.0f} {unit}"
    return f"{seconds:.0f} s"
