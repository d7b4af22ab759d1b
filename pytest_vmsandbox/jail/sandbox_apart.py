"""A thread and a warden for one command: it needs no loop of its caller's, and disturbs none."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from pytest_vmsandbox.errors import HostUnfit
from pytest_vmsandbox.host.facts import Capability, Tier, Verdict, code_of
from pytest_vmsandbox.host.platform import current_platform
from pytest_vmsandbox.jail.sandbox_config import SandboxConfig
from pytest_vmsandbox.jail.sandbox_run import Ended, run_in
from pytest_vmsandbox.linux import OwnedFd
from pytest_vmsandbox.warden.client import open_warden

T = TypeVar("T")
_Task: TypeAlias = asyncio.Task[object]


def run_with_own_warden(config: SandboxConfig) -> Ended:
    """Run the command of `config` by a warden that lives as long; HostUnfit without walls."""
    if not (platform := current_platform()).is_linux:
        raise HostUnfit(
            code_of(Capability.JAIL, Verdict.UNSUPPORTED),
            "walls around a command",
            f"this is {platform.system}",
            "they are made of namespaces, which only Linux has",
        )
    return run_apart(lambda: _run(config))


def run_apart(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run `work` to its end on a loop in a thread of its own, and give its result.

    What is raised in the waiting thread (Ctrl-C, a test's timeout) cancels `work`, which is
    waited for: it undoes what it did. Then the exception goes on.
    """
    begun: Future[tuple[asyncio.AbstractEventLoop, _Task]] = Future()
    done: Future[T] = Future()

    async def begin() -> T:
        task = asyncio.current_task()
        if task is not None:
            begun.set_result((asyncio.get_running_loop(), task))
        return await work()

    def run() -> None:
        try:
            done.set_result(asyncio.run(begin()))
        except BaseException as error:  # noqa: BLE001 - it is raised where somebody waits
            done.set_exception(error)

    # The kernel ends the warden with the thread that started it: a daemon leaves none behind.
    thread = threading.Thread(target=run, name="vmsandbox-sandbox", daemon=True)
    thread.start()
    try:
        return done.result()
    except BaseException:
        if not done.done():
            loop, task = begun.result()
            loop.call_soon_threadsafe(task.cancel)
        raise
    finally:
        thread.join()


async def _run(config: SandboxConfig) -> Ended:
    tier = Tier.ROOT if os.getuid() == 0 else Tier.USERNS
    # What the warden prints goes where nothing has to be removed, however we end.
    with OwnedFd(os.memfd_create("vmsandbox-warden")) as log:
        async with open_warden(tier, log=Path(f"/proc/self/fd/{log}")) as warden:
            return await run_in(warden, config)
