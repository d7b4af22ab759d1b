"""Caches of templates of a test's own, with the images of the user's."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from platformdirs import user_cache_path

# Found before any test changes the environment.
USERS = Path(os.environ.get("VMSANDBOX_CACHE_DIR") or user_cache_path("vmsandbox"))


def make_cache(directory: Path) -> Path:
    """Make `directory` a cache with all that is in the user's but its templates."""
    directory.mkdir(exist_ok=True)
    for name in ("images", "layers", "packages"):
        (directory / name).symlink_to(USERS / name)
    for path in USERS.glob("agent-*"):
        (directory / path.name).symlink_to(path)
    for path in USERS.glob("host-*.json"):
        shutil.copy2(path, directory)
    return directory
