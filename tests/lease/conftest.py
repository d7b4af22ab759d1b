"""What the tests of this room share: short bases, and throw-away children with mounts."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.linux.conftest import in_room, user_id
from tests.people import Kind, Person, person_reaches_checkout

__all__ = ["in_room", "user_id"]  # fixtures, found here by their names


@pytest.fixture
def base() -> Iterator[Path]:
    # pytest's own directories are too long for a socket's path
    with tempfile.TemporaryDirectory(prefix="vmsb-") as short:
        yield Path(short).resolve() / "b"


@pytest.fixture
def people(people: Mapping[Kind, Person]) -> Mapping[Kind, Person]:
    """The users of the session, where they can run what is tested here."""
    if not person_reaches_checkout(people[Kind.ORDINARY]):
        pytest.skip("other users can't reach this checkout or its interpreter")
    return people
