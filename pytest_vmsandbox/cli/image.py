"""`vmsandbox image`: build, list, verify and remove what machines boot from."""

from __future__ import annotations

import argparse
import platform
from pathlib import Path

from rich.console import Console

from pytest_vmsandbox.cli.arguments import add_cache_argument, cache_of
from pytest_vmsandbox.cli.progress import RichProgress
from pytest_vmsandbox.errors import RequestInvalid
from pytest_vmsandbox.guest.compiler import agent_binary
from pytest_vmsandbox.image.cache import ensure_image, list_images, remove_image
from pytest_vmsandbox.image.image import verify_image
from pytest_vmsandbox.image.recipe import RECIPES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare `build`, `list`, `verify` and `rm`."""
    add_cache_argument(parser)
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    build = actions.add_parser("build", help="build an image, or see that it is there")
    build.add_argument("name", nargs="?", default="mini", help=f"one of {', '.join(RECIPES)}")
    build.add_argument("--refresh", action="store_true", help="ask for newer packages first")
    build.add_argument("--host-kernel", type=Path, help="boot this kernel of the host")
    build.set_defaults(action=_build)
    listing = actions.add_parser("list", help="the images in the cache, and what can be built")
    listing.set_defaults(action=_list)
    verify = actions.add_parser("verify", help="compare every file with its checksum")
    verify.set_defaults(action=_verify)
    remove = actions.add_parser("rm", help="remove images from the cache")
    remove.add_argument("name", help="a name, or name:digest (its beginning will do)")
    remove.set_defaults(action=_remove)


def run(arguments: argparse.Namespace) -> int:
    """Do the action that was asked for."""
    status: int = arguments.action(arguments)
    return status


def _build(arguments: argparse.Namespace) -> int:
    cache = cache_of(arguments)
    console = Console()
    with RichProgress(console) as progress:
        progress.step("the agent")
        agent = agent_binary(architecture=platform.machine(), cache_dir=cache)
        image = ensure_image(
            arguments.name,
            cache_dir=cache,
            agent=agent,
            progress=progress,
            host_kernel=arguments.host_kernel,
            refresh=arguments.refresh,
        )
    console.print(f"{image.name} {image.digest[:12]}  kernel {image.kernel_release}")
    console.print(str(image.directory), soft_wrap=True)
    return 0


def _list(arguments: argparse.Namespace) -> int:
    console = Console(soft_wrap=True, highlight=False)
    for image in list_images(cache_of(arguments)):
        console.print(
            f"{image.name}:{image.digest[:12]}  {image.kernel_release}  {image.directory}"
        )
    for recipe in RECIPES.values():
        console.print(f"can be built: {recipe.name}: {recipe.summary}")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    console = Console()
    damaged = 0
    for image in list_images(cache_of(arguments)):
        wrong = verify_image(image)
        damaged += bool(wrong)
        console.print(f"{image.name} {image.digest[:12]}  {'damaged' if wrong else 'whole'}")
        for name, what in wrong.items():
            console.print(f"  {name}: {what}")
    return 1 if damaged else 0


def _remove(arguments: argparse.Namespace) -> int:
    cache = cache_of(arguments)
    name, _, digest = arguments.name.rpartition(":")
    found = [
        image
        for image in list_images(cache)
        if image.name == (name or digest) and (not name or image.digest.startswith(digest))
    ]
    if not found:
        raise RequestInvalid(
            f"no image {arguments.name!r} in {cache}", "`vmsandbox image list` shows them"
        )
    for image in found:
        remove_image(image, cache_dir=cache)
        Console().print(f"removed {image.directory}", soft_wrap=True)
    return 0
