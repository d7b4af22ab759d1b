"""Arguments that several subcommands share, and the environment that stands in for them."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from platformdirs import user_cache_path

_ANY_TIER = "auto"
_ANY_LIFECYCLE = "restored"


def add_cache_argument(parser: argparse.ArgumentParser) -> None:
    """Declare --cache-dir."""
    parser.add_argument("--cache-dir", type=Path, help="where images are kept (the user's cache)")


def cache_of(arguments: argparse.Namespace) -> Path:
    """The cache directory that was asked for, by argument or environment, or the user's."""
    return _path_of(arguments.cache_dir, "VMSANDBOX_CACHE_DIR") or user_cache_path("vmsandbox")


def run_dir_of(arguments: argparse.Namespace) -> Path | None:
    """The base of run directories that was asked for, by argument or environment."""
    return _path_of(arguments.run_dir, "VMSANDBOX_RUN_DIR")


def tier_of(arguments: argparse.Namespace) -> str:
    """The tier that was asked for, by argument or environment; whether there is one, others say."""
    return arguments.tier or os.environ.get("VMSANDBOX_TIER") or _ANY_TIER


def lifecycle_of(arguments: argparse.Namespace) -> str:
    """The lifecycle that was asked for, by argument or environment."""
    return arguments.lifecycle or os.environ.get("VMSANDBOX_LIFECYCLE") or _ANY_LIFECYCLE


def add_machine_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what a machine is like, as the pytest options do."""
    add_cache_argument(parser)
    parser.add_argument(
        "--run-dir", type=Path, help="where its sockets and logs lie (a short path, ours alone)"
    )
    parser.add_argument("--memory-mib", type=int, default=128, help="memory in MiB (128)")
    parser.add_argument("--cpus", type=int, default=1, help="processors (1)")
    parser.add_argument("--accel", default="auto", help="auto, kvm or tcg")
    parser.add_argument(
        "--lifecycle",
        help="restored (out of a template that was booted once) or booted; "
        "VMSANDBOX_LIFECYCLE, restored",
    )
    parser.add_argument(
        "--tier", help="auto, root, sudo, qemu-vm, userns or bare (no walls); VMSANDBOX_TIER, auto"
    )


def _path_of(given: Path | None, variable: str) -> Path | None:
    named = os.environ.get(variable)
    return given or (Path(named) if named else None)
