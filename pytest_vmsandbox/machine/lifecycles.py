"""Whether a machine is restored or booted: what can't be restored is booted, and told of once."""

from __future__ import annotations

import re

from pytest_vmsandbox.errors import MachineFailed, OutcomeUnknown, RequestInvalid
from pytest_vmsandbox.machine.build import Build
from pytest_vmsandbox.machine.templates.template import Recipe
from pytest_vmsandbox.machine.templates.templates import Templates, recipe_of

_KERNEL_TIME = re.compile(r"\[ *\d+\.\d+\] ")

# Of what making a template may fail, and its machine boot none the less.
_CAN_NOT_BE_MADE = (RequestInvalid, MachineFailed, OutcomeUnknown, OSError)


class Lifecycles:
    """Finds what machines are restored from; `incidents` tells which could not be, and why."""

    def __init__(self, templates: Templates) -> None:
        self._templates = templates
        self._given_up: dict[str, Exception] = {}
        self._told: list[str] = []
        self._seen: set[str] = set()

    @property
    def incidents(self) -> list[str]:
        """What went wrong and was made good, for the summary."""
        return [*self._told, *self._templates.incidents]

    async def restored(self, build: Build, *, demanded: bool) -> Build:
        """The build with what it is restored from; as it is, to be booted, where there can be none.

        Raises RequestInvalid where there can be none for a machine whose restoring is `demanded`.
        What failed once is not tried again.
        """
        recipe = recipe_of(build)
        if recipe.digest not in self._given_up:
            if not demanded and not await self._pays(build, recipe):
                return build
            try:
                template = await self._templates.booted(build, recipe)
                return build.restored_from(template.frozen)
            except _CAN_NOT_BE_MADE as error:
                self._given_up[recipe.digest] = error
                self._told.append(f"booted each time, not restored: {recipe.title}: {_why(error)}")
        if not demanded:
            return build
        reason = self._given_up[recipe.digest]
        remedy = 'ask for lifecycle="booted", or for none'
        if build.clock == "frozen":
            remedy = 'clock="frozen" goes on from a template: leave it out'
        raise RequestInvalid(
            f"{build.config.name} can't be restored: {_why(reason)}", remedy
        ) from reason

    async def _pays(self, build: Build, recipe: Recipe) -> bool:
        """Whether a template will be used: not for an image that a test made for itself alone.

        One that we have met before, or somebody has made a template of, is none of these.
        """
        if all(disk.source is None for disk in build.disks) or recipe.digest in self._seen:
            return True
        self._seen.add(recipe.digest)
        return await self._templates.find(recipe) is not None


def _why(error: Exception) -> str:
    """The cause in one line, the same in each worker; the rest is for who looks for it."""
    cause = error.cause if isinstance(error, MachineFailed) else str(error)
    return _KERNEL_TIME.sub("", (cause.splitlines() or [type(error).__name__])[0])
