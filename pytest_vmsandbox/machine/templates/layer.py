"""A template that a test suite prepared: what a `setup` made of a machine, frozen behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_vmsandbox.machine.templates.template import Recipe

if TYPE_CHECKING:
    from pytest_vmsandbox.machine.spec import MachineSpec


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Template:
    """What machines are restored from with `template=`; `TemplateBuilder.build` makes it.

    `spec` is the shape that all of them have, `root` the digest of the booted machine that is
    below all setups. On at most as many networks as there are `cards` each of them may be.
    """

    name: str
    recipe: Recipe
    root: str
    spec: MachineSpec
    cards: int = 0

    @property
    def digest(self) -> str:
        """The SHA-256, in hexadecimal, over all that it was made of."""
        return self.recipe.digest

    def __repr__(self) -> str:
        return f"<Template {self.name} {self.digest[:12]}>"
