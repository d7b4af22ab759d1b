"""A reply: what a request waits for that starts no job."""

from __future__ import annotations

from pytest_vmsandbox.guest.waiting import Changes, fresh


class Reply:
    """A request that waits for DONE or FAILED."""

    __slots__ = ("changes", "done", "error")

    def __init__(self) -> None:
        self.done = False
        self.error: BaseException | None = None
        self.changes = Changes()

    def settle(self, error: BaseException | None) -> None:
        """It has come: None is DONE."""
        self.done, self.error = True, error
        self.changes.announce()

    async def wait(self) -> None:
        """Until it has come; raises the error that it is."""
        while not self.done:
            await self.changes.wait()
        if self.error is not None:
            raise fresh(self.error)
