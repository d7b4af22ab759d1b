"""The table of attempts: what a hostile program in the VMM's place tries, each under a name.

These modules run twice over: in the tests, which read the table, and in a jail, out of a zip file
and with nothing but the standard library.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass

# The descriptor by which an attempt tells what came of it; the only one of the suite's own.
RESULTS = 500


class Refused(Exception):
    """The attempt came to nothing, and no system call said so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """What the hostile program is told of the host: more than it could ever guess."""

    room: str
    image: str
    image_on_host: str
    log: str
    secret: str
    secret_handle: str
    planted: str
    checkout: str
    run_directory: str
    neighbour_files: tuple[str, ...]
    neighbour_sockets: tuple[str, ...]
    neighbours: tuple[int, ...]
    neighbour_names: tuple[str, ...]
    neighbour_keys: tuple[int, ...]
    victim: int
    driver: int
    warden: int
    tcp_port: int
    tcp6_port: int
    udp_port: int
    abstract: str
    listener: str
    key: int
    ipc_key: int
    queue: str
    shared_file: str
    memory_mib: int

    def render(self) -> str:
        """The form in which it is handed to the hostile program."""
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, text: str) -> Targets:
        """Read what `render` made."""
        form = json.loads(text)
        lists = {name: tuple(value) for name, value in form.items() if isinstance(value, list)}
        return cls(**{**form, **lists})


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One thing to try. It returns what was got, or raises OSError or Refused.

    `not_apart` says why walls do not stop it, and `not_apart_in` in which tiers (all, where it is
    empty); with `bounded_by`, they do stop it where this controller of control groups is to be had.
    `harmful` attempts are made behind walls only. `unproved` says why it gets out nowhere, not
    even without walls; `by_host` that this depends on what the host has and allows.
    """

    name: str
    does: str
    run: Callable[[Targets], str]
    subject: str
    not_apart: str
    not_apart_in: tuple[str, ...]
    bounded_by: str
    harmful: bool
    unproved: str
    by_host: bool

    def gets_out_of(self, tier: str, *, limits: Collection[str]) -> bool:
        """Whether the walls of a tier that sets these limits let it pass, as is known."""
        if self.bounded_by:
            return self.bounded_by not in limits
        return bool(self.not_apart) and (not self.not_apart_in or tier in self.not_apart_in)


ATTEMPTS: dict[str, Attempt] = {}


def attempt(
    does: str,
    *,
    not_apart: str = "",
    not_apart_in: tuple[str, ...] = (),
    bounded_by: str = "",
    harmful: bool = False,
    unproved: str = "",
    by_host: bool = False,
) -> Callable[[Callable[[Targets], str]], Callable[[Targets], str]]:
    """Put a function into the table, under its own name."""

    def put(run: Callable[[Targets], str]) -> Callable[[Targets], str]:
        name = run.__name__.replace("_", "-")
        assert name not in ATTEMPTS, name
        ATTEMPTS[name] = Attempt(
            name=name,
            does=does,
            run=run,
            subject=run.__module__.rpartition(".")[2],
            not_apart=not_apart,
            not_apart_in=not_apart_in,
            bounded_by=bounded_by,
            harmful=harmful,
            unproved=unproved,
            by_host=by_host,
        )
        return run

    return put
